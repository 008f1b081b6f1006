// Package notation compares `tidewaiter verify` with the notation CLI: the real
// programs, on the same configuration directories, layouts and registries, for a
// matrix of signatures and trust policies. Where they differ, differences says so
// and docs/notation.md explains it.
package notation_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A place is where a signature is found, in manifests of a style.
type place struct {
	name   string
	style  notarytest.Style
	layout bool
	tagged bool // by referrers tag
	paged  bool // one referrer a page
}

var places = []place{
	{name: "layout", style: notarytest.ConfigType, layout: true},
	{name: "layout-tags", style: notarytest.ConfigType, layout: true, tagged: true},
	{name: "layout-new", style: notarytest.ArtifactType, layout: true},
	{name: "referrers", style: notarytest.ArtifactType},
	{name: "referrers-old", style: notarytest.ConfigType},
	{name: "referrers-paged", style: notarytest.ArtifactType, paged: true},
	{name: "tags", style: notarytest.ArtifactType, tagged: true},
}

// A question is put to both programs.
type question struct {
	exhibit *exhibit
	form    form
	setting *setting
	place   *place
}

func (q question) String() string {
	return strings.Join([]string{q.exhibit.name, q.form.envelope, q.form.scheme, q.setting.name, q.place.name}, "/")
}

// questions are all that are put. Every exhibit meets the levels, in both
// envelopes and schemes, and lies in each kind of place; those that speak of time,
// revocation or identity meet every setting.
func questions(exhibits []exhibit) (list []question) {
	seen := map[string]bool{}
	put := func(e *exhibit, f form, s *setting, p *place) {
		q := question{e, f, s, p}
		if (e.only == "" || e.only == f.envelope) && !(e.registry && p.layout) && !seen[q.String()] {
			seen[q.String()] = true
			list = append(list, q)
		}
	}
	jwsX509, jwsAuthority, coseX509, coseAuthority := forms[0], forms[1], forms[2], forms[3]
	layout := &places[0]
	in := func(e *exhibit, f form, names ...string) {
		for k := range settings {
			if len(names) == 0 || slices.Contains(names, settings[k].name) {
				put(e, f, &settings[k], layout)
			}
		}
	}
	for i := range exhibits {
		e := &exhibits[i]
		in(e, jwsX509, "strict", "permissive", "audit", "tsa")
		in(e, coseAuthority, "strict")
		if !e.few {
			in(e, jwsX509, "skip", "authenticity-logged", "identity")
			in(e, coseAuthority, "permissive", "audit", "identity", "tsa")
			in(e, jwsAuthority, "strict", "permissive")
			in(e, coseX509, "strict", "permissive")
		}
		if e.other {
			in(e, jwsX509, "identity")
			in(e, coseAuthority, "identity")
		}
		if e.wide {
			in(e, jwsX509)
			in(e, coseX509)
			in(e, jwsAuthority, "ca-store-alone", "tsa", "tsa-after-expiry")
		}
		for k := range places {
			// Three that differ little from others hold some.
			if p := &places[k]; e.wide || e.registry || p.name != "referrers-old" && p.name != "referrers-paged" && p.name != "layout-tags" {
				put(e, jwsX509, &settings[0], p)
			}
		}
	}
	good := &exhibits[0]
	for k := range settings { // the scopes of registries
		put(good, jwsX509, &settings[k], &places[len(places)-1])
	}
	for k := range directories {
		if directories[k].meets == nil {
			put(good, jwsX509, &directories[k], layout)
		}
		for i := range exhibits {
			if slices.Contains(directories[k].meets, exhibits[i].name) {
				put(&exhibits[i], jwsX509, &directories[k], layout)
			}
		}
	}
	return list
}

// plugin is a verification plugin that is installed and accepts everything.
const plugin = "yes"

const pluginProgram = `#!/bin/sh
cat >/dev/null
case $1 in
get-plugin-metadata) echo '{"name":"yes","description":"says yes","version":"1.0.0","url":"https://example.org","supportedContractVersions":["1.0"],"capabilities":["SIGNATURE_VERIFIER.TRUSTED_IDENTITY"]}' ;;
verify-signature) echo '{"verificationResults":{"SIGNATURE_VERIFIER.TRUSTED_IDENTITY":{"success":true}},"processedAttributes":[]}' ;;
esac
`

// A stage holds everything that the programs read.
type stage struct {
	dir        string
	notation   string
	tidewaiter string
	hosts      map[string]string                   // of places: "127.0.0.1:41234"
	asked      map[*place]map[string]digest.Digest // by exhibit and form
}

func kept(e *exhibit, f form) string { return e.name + "-" + f.envelope + "-" + f.scheme }

func newStage(t *testing.T) (*stage, []exhibit) {
	st := &stage{dir: t.TempDir(), hosts: map[string]string{}, asked: map[*place]map[string]digest.Digest{}}
	var err error
	if st.notation, err = node.FindNotation(t.Context(), os.Stderr); err != nil {
		t.Fatal(err)
	}
	if st.tidewaiter, err = node.BuildTidewaiter(t.Context()); err != nil {
		t.Fatal(err)
	}
	crls := map[string][]byte{}
	server := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if crls[r.URL.Path] == nil {
			http.NotFound(w, r)
		}
		_, _ = w.Write(crls[r.URL.Path])
	}))
	makeWorld()
	list := exhibits("http://"+server, crls)
	registries := map[*place]*sourcetest.Registry{}
	for i := range places {
		if p := &places[i]; !p.layout {
			registries[p] = &sourcetest.Registry{Repository: "team/app", NoAPI: p.tagged}
			if p.paged {
				registries[p].PageSize = 1
			}
		}
	}
	for _, q := range questions(list) {
		made := st.asked[q.place]
		if made == nil {
			made = map[string]digest.Digest{}
			st.asked[q.place] = made
		}
		name := kept(q.exhibit, q.form)
		if made[name] != "" {
			continue
		}
		b := &box{Content: &sourcetest.Content{Kind: notary.Kind}, style: q.place.style, name: q.place.name + " " + name}
		if q.exhibit.arrange != nil {
			made[name] = q.exhibit.arrange(b, q.form)
		} else {
			image := b.image("")
			b.attach(image, q.form, q.exhibit.envelope(q.form, image))
			made[name] = image.Digest
		}
		if q.place.layout {
			sourcetest.Layout(t, st.layout(q), *b.Content, q.place.tagged)
			continue
		}
		into := &registries[q.place].Content
		into.Images = append(into.Images, b.Images...)
		for d, raw := range b.Blobs {
			if into.Blobs == nil {
				into.Blobs = map[digest.Digest][]byte{}
			}
			into.Blobs[d] = raw
		}
		for d, list := range b.Referrers {
			if into.Referrers == nil {
				into.Referrers = map[digest.Digest][]ocispec.Descriptor{}
			}
			into.Referrers[d] = list
		}
	}
	repositories := []string{scope}
	for p, r := range registries {
		st.hosts[p.name] = serve(t, heads(r))
		repositories = append(repositories, st.hosts[p.name]+"/team/app")
	}
	for _, s := range slices.Concat(settings, directories) {
		if err := s.write(st.config(s.name), repositories); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(st.dir, "libexec", "plugins", plugin, "notation-"+plugin)
	if err := errors.Join(os.MkdirAll(filepath.Dir(program), 0o755), os.WriteFile(program, []byte(pluginProgram), 0o755), os.Mkdir(filepath.Join(st.dir, "home"), 0o755)); err != nil {
		t.Fatal(err)
	}
	return st, list
}

func serve(t *testing.T, h http.Handler) (host string) {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// heads answers HEAD as GET: what notation resolves a digest with.
func heads(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			r = r.Clone(r.Context())
			r.Method = http.MethodGet // the server leaves the body out
		}
		h.ServeHTTP(w, r)
	})
}

func (st *stage) config(setting string) string { return filepath.Join(st.dir, "config", setting) }

func (st *stage) layout(q question) string {
	return filepath.Join(st.dir, "layouts", q.place.name, kept(q.exhibit, q.form))
}

// An answer is what a program said.
type answer struct {
	yes    bool
	reason string // code of Tidewaiter's, or "no answer"
	text   string // what was printed
}

// ask puts q to both programs.
func (st *stage) ask(ctx context.Context, q question) (notation, tidewaiter answer) {
	d := string(st.asked[q.place][kept(q.exhibit, q.form)])
	config, name, layout := st.config(q.setting.name), scope, st.layout(q)
	if q.setting.ask != "" {
		name = q.setting.ask
	}
	var forNotation, forTidewaiter []string
	if q.place.layout {
		forNotation = []string{"verify", "--oci-layout", layout + "@" + d, "--scope", name}
		forTidewaiter = []string{"--layout", layout, name + "@" + d}
	} else {
		host := st.hosts[q.place.name]
		name = host + "/team/app"
		forNotation = []string{"verify", "--insecure-registry", name + "@" + d}
		forTidewaiter = []string{"--mirror", host + "=http://" + host, name + "@" + d}
	}
	home := "HOME=" + filepath.Join(st.dir, "home")
	env := []string{home, "NOTATION_EXPERIMENTAL=1", "NOTATION_CONFIG=" + config, "NOTATION_CACHE=" + filepath.Join(st.dir, "cache"), "NOTATION_LIBEXEC=" + filepath.Join(st.dir, "libexec"), "PATH=" + os.Getenv("PATH")}
	_, stderr, status := run(ctx, env, st.notation, forNotation...)
	notation = answer{yes: status == 0, text: stderr}

	stdout, stderr, status := run(ctx, []string{home}, st.tidewaiter, append([]string{"verify", "--output", "json", "--config-dir", config}, forTidewaiter...)...)
	tidewaiter = answer{yes: status == 0, reason: "no answer", text: stdout + stderr}
	var report struct {
		Allowed bool
		Reason  string
	}
	if stdout != "" {
		if err := json.Unmarshal([]byte(stdout), &report); err != nil || report.Allowed != (status == 0) {
			tidewaiter = answer{reason: "nonsense", text: fmt.Sprintf("exit status %d, %v: %s", status, err, stdout)}
		} else {
			tidewaiter.reason = report.Reason
		}
	} else if status != 2 {
		tidewaiter = answer{reason: "nonsense", text: fmt.Sprintf("exit status %d without an answer: %s", status, stderr)}
	}
	return notation, tidewaiter
}

// run runs a program; status is -1 if it did not end by itself.
func run(ctx context.Context, env []string, program string, args ...string) (stdout, stderr string, status int) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = env, &out, &errs, time.Second
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return "", err.Error(), -1
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestMatrix(t *testing.T) {
	st, list := newStage(t)
	all := questions(list)
	type result struct {
		question
		notation, tidewaiter answer
	}
	results := make([]result, len(all))
	start := time.Now()
	var wg sync.WaitGroup
	next := make(chan int)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := range next {
				n, tw := st.ask(t.Context(), all[i])
				results[i] = result{all[i], n, tw}
			}
		})
	}
	for i := range all {
		next <- i
	}
	close(next)
	wg.Wait()

	said := map[string]bool{} // whether notation says yes
	for _, r := range results {
		said[r.String()] = r.notation.yes
	}
	var yes, no, stricter, blind int
	used := map[string]bool{} // patterns without alternatives that fitted a difference
	for _, r := range results {
		complain := func(format string, args ...any) {
			t.Errorf("%s: %s\nnotation: %v: %.600s\ntidewaiter: %v, %s: %.900s", r.question, fmt.Sprintf(format, args...),
				r.notation.yes, strings.TrimSpace(r.notation.text), r.tidewaiter.yes, r.tidewaiter.reason, r.tidewaiter.text)
		}
		// What each should say.
		answer := r.exhibit.answer(r.form, *r.setting) && !(r.exhibit.long && r.place.paged)
		notation := answer
		tidewaiter, witness := notation, r.String()
		var fit []int // of differences
		for i, d := range differences {
			if !answer || !d.is(r.String()) {
				continue
			}
			if fit = append(fit, i); d.witness == nil {
				tidewaiter = false
			} else {
				notation, witness = false, d.witness(witness)
			}
		}
		switch {
		case r.tidewaiter.reason == "nonsense":
			complain("no decision")
		case r.tidewaiter.yes && !r.notation.yes && (notation || !tidewaiter):
			complain("tidewaiter says yes and notation no, and that is not listed")
		case r.notation.yes != notation || r.tidewaiter.yes != tidewaiter:
			complain("notation should say %v and tidewaiter %v", notation, tidewaiter)
		case !tidewaiter && !slices.ContainsFunc(fit, func(i int) bool { return slices.Contains(differences[i].reasons, r.tidewaiter.reason) }) && len(fit) > 0:
			complain("that is not the reason listed")
		case notation && tidewaiter:
			yes++
		case !notation && !tidewaiter:
			no++
		case notation:
			stricter++
		default:
			if blind++; !said[witness] {
				complain("notation does not say yes to %s either", witness)
			}
		}
		for _, i := range fit {
			if d := differences[i]; notation != tidewaiter && (d.witness != nil || slices.Contains(d.reasons, r.tidewaiter.reason)) {
				for _, p := range d.patterns() {
					used[p] = used[p] || matches(p, r.String())
				}
			}
		}
	}
	for _, d := range differences {
		for _, p := range d.patterns() {
			if !used[p] {
				t.Errorf("the difference %q is listed with %s, and there is none", d.name, p)
			}
		}
	}
	t.Logf("%d questions in %s: both say yes to %d and no to %d, tidewaiter alone no to %d, notation alone no to %d",
		len(results), time.Since(start).Round(time.Second), yes, no, stricter, blind)
	if yes < 100 || no < 100 {
		t.Error("a matrix of one answer shows nothing")
	}
}

// TestDocumented: docs/notation.md has a heading for each difference.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/notation.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range differences {
		if !strings.Contains(string(doc), "\n### "+d.name+"\n") {
			t.Errorf("docs/notation.md does not explain %q", d.name)
		}
	}
}

// matches reports whether a pattern, of which "*" may be parts, is key.
func matches(pattern, key string) bool {
	ok, err := path.Match(pattern, key)
	if err != nil {
		panic(err)
	}
	return ok
}
