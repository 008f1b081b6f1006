package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/decisionlog"
	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A log keeps what was logged. It is safe for concurrent use.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take returns the entries since the last call.
func (l *logged) take(t *testing.T) (list []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.b.Bytes()) {
		if bytes.Contains(line, []byte("hunter2")) {
			t.Errorf("the log holds a secret: %s", line)
		}
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(err)
		}
		list = append(list, m)
	}
	l.b.Reset()
	return list
}

// entries wants those messages, in that order, and returns the entries. It waits
// for them, since a verification is logged after those who wait have the answer.
func (l *logged) entries(t *testing.T, messages ...string) []map[string]any {
	t.Helper()
	var list []map[string]any
	for end := time.Now().Add(time.Minute); len(list) < len(messages) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		list = append(list, l.take(t)...)
	}
	var got []string
	for _, m := range list {
		got = append(got, m["msg"].(string))
	}
	if strings.Join(got, "; ") != strings.Join(messages, "; ") {
		t.Fatalf("the log says %q, want %q", got, messages)
	}
	return list
}

func newDaemon(t *testing.T) (*daemon, *logged) {
	t.Helper()
	t.Cleanup(func() {
		if err := leaktest.Find(); err != nil {
			t.Error(err)
		}
	})
	log := &logged{}
	records, err := containerd.Dial(filepath.Join(t.TempDir(), "none.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	d := &daemon{
		options:  Options{Node: "edge-17"},
		log:      slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		resolver: containerd.NewResolver(records, resolverOptions(nil)),
		answers:  make(chan *nri.Answer, unwritten),
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { d.write(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	t.Cleanup(d.close)
	return d, log
}

// write makes a configuration directory that trusts the world's signers for every
// image, with that config.yaml.
func write(t *testing.T, dir, yaml string) {
	t.Helper()
	if err := imagetest.WriteConfig(dir, yaml); err != nil {
		t.Fatal(err)
	}
}

// ask asks the daemon about an image as the gate does, and gives it some time.
func ask(t *testing.T, d *daemon, name string) verify.Decision {
	t.Helper()
	target := imagetest.World().Images[name].Target
	n, err := policy.ParseName("registry.test/team/app@" + target.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	img := verify.Image{
		Name: n, Target: target, Manifest: target, Config: target.Digest,
		Use: verify.UseContainer, Binding: verify.BoundSnapshot,
	}
	if s := d.decider.Snapshot(); s != nil {
		img.Revision = s.Revision
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		answer := d.decider.Verify(t.Context(), img)
		if answer.Reason != verify.Pending || time.Now().After(end) {
			return answer
		}
	}
}

// The life of a daemon: nothing, something broken, a configuration, another, and
// a broken one after that.
func TestApply(t *testing.T) {
	d, log := newDaemon(t)
	dir := t.TempDir()
	layout := filepath.Join(dir, "usb")
	serveLayout(t, layout, "signed", "unsigned")
	etc := filepath.Join(dir, "etc")
	load := func() { d.apply(config.Load(etc)) }

	if got := ask(t, d, "signed"); got.Allowed() || got.Reason != verify.PolicyInvalid {
		t.Errorf("without a configuration: %s", got.Reason)
	}
	load()
	e := log.entries(t, "configuration rejected")[0]
	if e["level"] != "ERROR" || e["consequence"] != "no configuration is in force: every container is denied" || !strings.Contains(e["error"].(string), "no configuration") {
		t.Errorf("the log says %v", e)
	}
	if got := ask(t, d, "signed"); got.Allowed() || got.Reason != verify.PolicyInvalid {
		t.Errorf("after a broken configuration: %s", got.Reason)
	}

	images, err := imagetest.Content([]string{"unsigned"}, "")
	if err != nil {
		t.Fatal(err)
	}
	none := httptest.NewTLSServer(&sourcetest.Registry{Repository: "team/app", Content: images})
	t.Cleanup(none.Close)
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, notarytest.PEM(none.Certificate()), 0o644); err != nil {
		t.Fatal(err)
	}
	yaml := "version: 1\nmode: enforce\nsources:\n  layouts: [" + layout + "]\n  mirrors:\n    - {host: registry.test, url: " + none.URL + ", ca: " + ca + "}\n"
	write(t, etc, yaml)
	load()
	e = log.entries(t, "configuration in force")[0]
	first := d.decider.Snapshot()
	if e["mode"] != "enforce" || e["revision"] != first.Revision.String() {
		t.Errorf("the log says %v", e)
	}
	if got := ask(t, d, "signed"); !got.Allowed() || got.Reason != verify.Verified || got.Revision != first.Revision {
		t.Errorf("signed: %s: %s", got.Reason, got.Detail)
	}
	if got := ask(t, d, "unsigned"); got.Allowed() || got.Reason != verify.SignatureMissing {
		t.Errorf("unsigned: %s: %s", got.Reason, got.Detail)
	}
	report := log.entries(t, "verification", "verification")[0]["decision"].(map[string]any)
	if report["reason"] != "VERIFIED" || !strings.Contains(report["message"].(string), "on node edge-17") {
		t.Errorf("the log says %v", report)
	}

	// Another one, with something doubtful: what it asks of the image is the same.
	old := d.cache
	write(t, etc, yaml+"    - {host: registry.test, url: http://127.0.0.1:1}\n")
	load()
	warned := log.entries(t, "configuration", "configuration in force")[0]
	if warned["level"] != "WARN" || !strings.Contains(warned["warning"].(string), "sources.mirrors[1].url") {
		t.Errorf("the log says %v", warned)
	}
	second := d.decider.Snapshot()
	if second.Revision == first.Revision {
		t.Error("the revision is the same")
	}
	if got := ask(t, d, "signed"); !got.Allowed() || got.Revision != second.Revision {
		t.Errorf("after the reload: %s", got.Reason)
	}
	d.retired.Wait()
	log.entries(t)
	img := verify.Image{Target: imagetest.World().Images["signed"].Target, Manifest: imagetest.World().Images["signed"].Target, Config: "sha256:x", Use: verify.UseContainer, Binding: verify.BoundSnapshot}
	require, err := verify.SignedBy(verify.Leaf{Kind: "notary", Authority: "prod", Hash: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	if got := old.Evaluate(t.Context(), verify.Question{Image: img, Rule: &verify.Rule{Require: require}}); got.Reason != verify.Pending {
		t.Errorf("a retired cache answers %s", got.Reason)
	}

	// A broken one changes nothing, and what is wrong in it is not repeated.
	write(t, etc, "version: 1\nmode: audit\nsources:\n  mirrors:\n    - host: registry.test\n      url: http://me:hunter2@127.0.0.1:1\n")
	load()
	e = log.entries(t, "configuration rejected")[0]
	if e["consequence"] != "the last good configuration stays in force" || !strings.Contains(e["error"].(string), "config.yaml:6: sources.mirrors[0].url: must not hold a user or password") {
		t.Errorf("the log says %v", e)
	}
	if d.decider.Snapshot() != second {
		t.Error("the last good configuration is not in force any more")
	}
	if got := ask(t, d, "unsigned"); got.Allowed() {
		t.Error("a broken configuration lets an unsigned image run")
	}

	// Audit is a mode of the whole node.
	write(t, etc, strings.Replace(yaml, "enforce", "audit", 1))
	load()
	if got := ask(t, d, "unsigned"); !got.Allowed() || got.Reason != verify.AuditOnly {
		t.Errorf("in audit: %s", got.Reason)
	}
	log.take(t)

	d.close()
	if got := ask(t, d, "signed"); got.Allowed() {
		t.Error("a daemon that ended lets an image run")
	}
}

// An answer that allows outlives a change that it does not rest on, as of a password,
// and no other.
func TestApplyKeepsAnswers(t *testing.T) {
	d, log := newDaemon(t)
	dir := t.TempDir()
	c, err := imagetest.Content([]string{"signed"}, "")
	if err != nil {
		t.Fatal(err)
	}
	g := &sourcetest.Registry{Content: c, Repository: "team/app"}
	srv := httptest.NewTLSServer(g)
	t.Cleanup(srv.Close)
	etc, ca, passwords := filepath.Join(dir, "etc"), filepath.Join(dir, "ca.crt"), filepath.Join(dir, "passwords.json")
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	password := func(s string) string {
		return `{"auths": {"` + strings.TrimPrefix(srv.URL, "https://") + `": {"username": "edge", "password": "` + s + `"}}}`
	}
	put(ca, string(notarytest.PEM(srv.Certificate())))
	put(passwords, password("hunter2 of old"))
	write(t, etc, "version: 1\nmode: enforce\nsources:\n  credentials: "+passwords+"\n  mirrors:\n    - {host: registry.test, url: "+srv.URL+", ca: "+ca+"}\n")
	load := func() { d.apply(config.Load(etc)) }
	load()
	if got := ask(t, d, "signed"); got.Reason != verify.Verified {
		t.Fatalf("signed: %s: %s", got.Reason, got.Detail)
	}
	first, asked := d.decider.Snapshot(), len(g.Requests())

	put(passwords, password("hunter2 of today"))
	load()
	if d.decider.Snapshot().Revision == first.Revision {
		t.Fatal("the password is not part of the revision")
	}
	if got := ask(t, d, "signed"); got.Reason != verify.Verified || got.Revision != d.decider.Snapshot().Revision {
		t.Errorf("after another password: %s: %s", got.Reason, got.Detail)
	}
	if s := d.cache.Stats(); s.Started != 0 || len(g.Requests()) != asked {
		t.Errorf("after another password: %d verifications, %d requests, want none more than %d", s.Started, len(g.Requests()), asked)
	}

	if err := notarytest.WriteConfig(etc, notarytest.Stores{"ca/acme/another.crt": notarytest.NewCA(notarytest.CAOptions{}).PEM()}, notarytest.Statement("prod", imagetest.Identity)); err != nil {
		t.Fatal(err)
	}
	load()
	if got := ask(t, d, "signed"); got.Reason != verify.Verified {
		t.Errorf("with one more root: %s: %s", got.Reason, got.Detail)
	}
	if s := d.cache.Stats(); s.Started != 1 || len(g.Requests()) == asked {
		t.Errorf("with one more root: %d verifications, want 1", s.Started)
	}
	if err := os.Remove(filepath.Join(etc, "truststore/x509/ca/acme/root.crt")); err != nil {
		t.Fatal(err)
	}
	load()
	if got := ask(t, d, "signed"); got.Reason != verify.SignerUntrusted {
		t.Errorf("without its root: %s: %s", got.Reason, got.Detail)
	}
	log.take(t)
}

// What is on the node is found however many registries hang.
func TestApplyAsksTheNodeFirst(t *testing.T) {
	d, log := newDaemon(t)
	dir := t.TempDir()
	layout := filepath.Join(dir, "usb")
	serveLayout(t, layout, "signed")
	stop := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-stop:
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(stop) })
	write(t, filepath.Join(dir, "etc"), "version: 1\nmode: enforce\nlimits: {timeout: 60s}\nsources:\n  layouts: ["+layout+"]\n  mirrors:\n    - {host: \"*\", url: "+srv.URL+"}\n")
	d.apply(config.Load(filepath.Join(dir, "etc")))
	unsigned := verify.Image{
		Name: verify.Name{Host: "registry.test", Path: "team/app"}, Use: verify.UseContainer, Binding: verify.BoundSnapshot, Revision: d.decider.Snapshot().Revision,
	}
	for i := range 10 { // each hangs, or waits for one that does
		unsigned.Target = imagetest.World().Images["unsigned"].Target
		unsigned.Target.Digest = digest.FromString(fmt.Sprint(i))
		unsigned.Manifest, unsigned.Config = unsigned.Target, unsigned.Target.Digest
		d.decider.Verify(t.Context(), unsigned)
	}
	for end := time.Now().Add(time.Minute); d.cache.Stats().Waiting != 8 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if s := d.cache.Stats(); s.Running != 2 || s.Waiting != 8 {
		t.Errorf("stats %+v", s)
	}
	if got := ask(t, d, "signed"); got.Reason != verify.Verified || len(got.Tried) != 1 {
		t.Errorf("signed: %s: %s: %v", got.Reason, got.Detail, got.Tried)
	}
	d.close()
	log.take(t)
}

// An image is marked while it is checked ahead of time, not for a container, and one that
// an earlier process may have died of is looked at again once it was judged.
func TestMarks(t *testing.T) {
	d, log := newDaemon(t)
	dir, run := t.TempDir(), t.TempDir()
	target := imagetest.World().Images["signed"].Target
	note := filepath.Join(run, "ahead")
	if err := os.WriteFile(note, []byte(target.Digest.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.marks = reconcile.OpenMarks(run, d.log)
	d.prefetch = &reconcile.Prefetch{Images: d.resolver, Log: d.log, Marks: d.marks}
	layout := filepath.Join(dir, "usb")
	serveLayout(t, layout, "signed", "unsigned")
	write(t, filepath.Join(dir, "etc"), "version: 1\nmode: enforce\nsources: {network: never, layouts: ["+layout+"]}\n")
	d.apply(config.Load(filepath.Join(dir, "etc")))
	if got := ask(t, d, "unsigned"); got.Reason != verify.SignatureMissing || !d.marks.Skips(target.Digest) {
		t.Errorf("unsigned: %s; the other is skipped: %t", got.Reason, d.marks.Skips(target.Digest))
	}
	d.survived(verify.Image{Target: target}, verify.Deny(verify.Pending, ""))
	if !d.marks.Skips(target.Digest) {
		t.Error("an image that nothing is known of is not skipped any more")
	}
	if got := ask(t, d, "signed"); got.Reason != verify.Verified {
		t.Errorf("signed: %s: %s", got.Reason, got.Detail)
	}
	for end := time.Now().Add(time.Minute); d.marks.Skips(target.Digest) && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if d.marks.Skips(target.Digest) {
		t.Error("an image that was judged is still skipped")
	}
	q := verify.Question{Image: verify.Image{Target: target, Use: verify.UseContainer}}
	for use, want := range map[verify.Use]string{verify.UseContainer: "", verify.UsePrefetch: target.Digest.String() + "\n"} {
		if err := os.WriteFile(note, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		q.Image.Use = use
		end := d.begin(q)
		if raw, err := os.ReadFile(note); err != nil || string(raw) != want {
			t.Errorf("use %d: marked %q, %v", use, raw, err)
		}
		end()
		if raw, err := os.ReadFile(note); err != nil || len(raw) != 0 {
			t.Errorf("use %d: after it %q, %v", use, raw, err)
		}
	}
	log.take(t)
}

// A verification that hangs under an old configuration is given up with it.
func TestApplyEndsFlights(t *testing.T) {
	d, log := newDaemon(t)
	asked := make(chan struct{}, 100)
	ended := make(chan struct{}, 100)
	stop := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-r.Context().Done():
			ended <- struct{}{}
		case <-stop:
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(stop) })
	etc := t.TempDir()
	write(t, etc, "version: 1\nmode: audit\nlimits:\n  timeout: 60s\nsources:\n  mirrors:\n    - host: registry.test\n      url: "+srv.URL+"\n")
	d.apply(config.Load(etc))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	target := imagetest.World().Images["signed"].Target
	img := verify.Image{
		Name: verify.Name{Host: "registry.test", Path: "team/app"}, Target: target, Manifest: target, Config: target.Digest,
		Use: verify.UseContainer, Binding: verify.BoundSnapshot,
	}
	img.Revision = d.decider.Snapshot().Revision
	if got := d.decider.Verify(ctx, img); got.Would != verify.Pending {
		t.Fatalf("would be %s: %s", got.Would, got.Detail)
	}
	wait := func(c <-chan struct{}, what string) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(time.Minute):
			t.Fatal(what)
		}
	}
	wait(asked, "the mirror was not asked")
	write(t, etc, "version: 1\nmode: audit\n")
	d.apply(config.Load(etc))
	wait(ended, "the request goes on under a configuration that is not in force")
	d.retired.Wait()
	log.take(t)
}

// What the hook says is logged once, with everything that a script needs and
// nothing that the pod's author should not have written down.
func TestObserve(t *testing.T) {
	d, log := newDaemon(t)
	img := verify.Image{Name: verify.Name{Host: "registry.test", Path: "team/app", Tag: "v1"}, Pod: verify.Pod{Namespace: "shop", Name: "web-1", Container: "web"}}
	d.observe(nri.Answer{Image: img, Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Took: time.Millisecond, Hook: "ValidateContainerAdjustment"})
	e := log.entries(t, "decision")[0]
	report := e["decision"].(map[string]any)
	pod, _ := report["pod"].(map[string]any)
	if e["level"] != "INFO" || e["hook"] != "ValidateContainerAdjustment" || e["took"] != "1ms" || report["reason"] != "POLICY_NO_MATCH" ||
		report["allowed"] != false || report["schema"] != verify.Schema || pod["name"] != "web-1" || strings.HasPrefix(report["decidedAt"].(string), "0001") {
		t.Errorf("the log says %v", e)
	}
	d.observe(nri.Answer{Image: img, Decision: verify.Decision{Reason: verify.Verified}})
	if e := log.entries(t, "decision")[0]; e["level"] != "DEBUG" {
		t.Errorf("an allowed repeat is logged as %v", e["level"])
	}
}

// What is not the normal course is remembered, whatever is logged.
func TestRemembers(t *testing.T) {
	log := &logged{}
	d := &daemon{log: slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelError})), answers: make(chan *nri.Answer, 8)}
	d.ring = decisionlog.Open("", d.log)
	d.observe(nri.Answer{ID: "c1", Decision: verify.Decision{Reason: verify.Verified}, Hook: "CreateContainer"})
	d.observe(nri.Answer{ID: "c2", Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Hook: "CreateContainer"})
	d.judged(&config.Config{})(verify.Question{}, verify.Deny(verify.SignatureMissing, "none"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d.write(ctx)
	p, err := d.ring.Page(control.Filter{Denied: true})
	if err != nil || len(p.Lines) != 2 || p.More {
		t.Fatalf("%+v %v", p, err)
	}
	v, a := p.Lines[0], p.Lines[1]
	if v.Kind != control.VerificationLine || a.Kind != control.AnswerLine || a.Container != "c2" || a.Mode != "enforce" || time.Since(a.At) > time.Minute {
		t.Errorf("%+v", p.Lines)
	}
	if all, err := d.ring.Page(control.Filter{}); err != nil || len(all.Lines) != 2 {
		t.Errorf("%+v %v", all, err)
	}
}

// A log that nobody reads does not stop the hook; what was lost is said.
func TestObserveDoesNotBlock(t *testing.T) {
	log := &logged{}
	d := &daemon{log: slog.New(slog.NewJSONHandler(log, nil)), answers: make(chan *nri.Answer, 2)}
	for range 5 {
		d.observe(nri.Answer{Decision: verify.Deny(verify.PolicyNoMatch, "no rule")})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d.write(ctx)
	if e := log.entries(t, "the log is too slow: answers were given and not written", "decision", "decision")[0]; e["answers"] != 3.0 {
		t.Errorf("the log says %v", e)
	}
}

func serveLayout(t *testing.T, dir string, names ...string) {
	t.Helper()
	c, err := imagetest.Content(names, "")
	if err == nil {
		err = imagetest.WriteLayout(dir, c)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Pods are taken away only under a configuration that enforces: none is not one.
func TestEnforces(t *testing.T) {
	var d daemon
	if d.enforces() {
		t.Error("without a configuration")
	}
	for mode, want := range map[verify.Mode]bool{verify.Enforce: true, verify.Audit: false} {
		d.decider.Swap(&verify.Snapshot{Mode: mode})
		if d.enforces() != want {
			t.Errorf("in %s: %t", mode, d.enforces())
		}
	}
}
