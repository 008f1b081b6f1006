package inspect

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// TestVerifyIsTheGate generates nodes, and asks about images of each both the engine as
// the daemon builds it, which knows the image from the runtime, and verify, which knows
// a digest. They answer alike. Only if no source that answers holds the image, nor a
// signature of it, verify cannot find out: it has nobody else to learn from what the
// digest is of.
func TestVerifyIsTheGate(t *testing.T) {
	nodes := 500
	if testing.Short() {
		nodes = 50
	}
	ask := []string{"signed", "unsigned", "foreign", "misnamed", "swapped", "expired", "index", "inner", "long", "attested", "lied"}
	// One server plays the mirrors of all nodes, one node after the other.
	var mirrors atomic.Pointer[[]http.Handler]
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest := strings.TrimPrefix(r.URL.Path, "/v2/m")
		n := int(rest[0] - '0')
		r.URL.Path = "/v2" + rest[1:]
		(*mirrors.Load())[n].ServeHTTP(w, r)
	}))
	defer srv.Close()
	seen := map[string]int{}
	for seed := range nodes {
		g := &generator{Rand: rand.New(rand.NewPCG(uint64(seed), 7)), dir: inMemory(t), url: srv.URL, names: ask}
		text := g.node(t)
		mirrors.Store(&g.mirrors)
		c, err := config.Load(filepath.Join(g.dir, "etc"))
		if err != nil {
			t.Fatalf("node %d: %v\n%s", seed, err, text)
		}
		state := filepath.Join(g.dir, "state")
		var asked []string
		for _, i := range g.Perm(len(ask))[:3] {
			asked = append(asked, ask[i])
		}
		// First verify, since the gate keeps what it finds. Both begin anew with each image,
		// since a registry that has served a repository is believed more of it.
		said, unresolved := map[string]verify.Decision{}, map[string]bool{}
		for _, name := range asked {
			j, err := NewOffline(t.Context(), c, state)
			if err != nil {
				t.Fatal(err)
			}
			n := verify.Name{Host: sourcetest.Name.Host, Path: sourcetest.Name.Path, Digest: imagetest.World().Images[name].Target.Digest}
			d, img := j.Judge(t.Context(), n, n.String(), "")
			said[name], unresolved[name] = d, img.Fault != nil
			j.Close()
		}
		gate, end := runStore(t, c, state)
		for _, name := range asked {
			got, want := said[name], gate().Verify(t.Context(), asGate(t, imagetest.World().Images[name], c.Revision))
			key := want.Reason.String()
			switch {
			case got.Reason == want.Reason && got.Allowed() == want.Allowed() && (!got.Allowed() || slices.Equal(got.Signers, want.Signers) && got.Source == want.Source):
			case unresolved[name] && got.Reason.Inconclusive():
				key = "unresolved by verify"
			default:
				t.Errorf("node %d, image %s: the gate says %s (%s), verify %s (%s)\n%s\ntried %+v\n and  %+v", seed, name, want.Reason, want.Detail, got.Reason, got.Detail, text, want.Tried, got.Tried)
			}
			seen[key]++
		}
		end()
		if err := os.RemoveAll(g.dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%v", seen)
	for _, r := range []verify.Reason{verify.Verified, verify.SignatureMissing, verify.SignerUntrusted, verify.SourceUnreachable, verify.SourceNoReferrers, verify.PolicyNoMatch} {
		if seen[r.String()] < nodes/50 {
			t.Errorf("%s only %d times: the nodes show little", r, seen[r.String()])
		}
	}
	if n := seen["unresolved by verify"]; n > nodes*3/4 {
		t.Errorf("verify did not learn %d times of %d of what the digest is: the nodes show little", n, 3*nodes)
	}
}

// asGate is an image as the gate knows it when a container is made from it.
func asGate(t *testing.T, i *imagetest.Image, revision verify.Revision) verify.Image {
	t.Helper()
	m, doc, err := containerd.Select(t.Context(), func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
		raw, ok := i.Content[d.Digest]
		if !ok {
			return nil, fs.ErrNotExist
		}
		return raw, nil
	}, i.Target)
	if err != nil {
		t.Fatal(err)
	}
	return verify.Image{
		Name: sourcetest.Name, Target: i.Target, Manifest: m, Config: doc.Config.Digest,
		LayersVerified: true, Use: verify.UsePrefetch, Binding: verify.BoundRuntime, Revision: revision,
	}
}

// A generator makes one node.
type generator struct {
	*rand.Rand
	dir, url string
	names    []string // of images
	mirrors  []http.Handler
}

// draw returns one of list.
func draw[T any](g *generator, list ...T) T { return list[g.IntN(len(list))] }

// some returns what a source holds, and what that is in words.
func (g *generator) some(t *testing.T) (sourcetest.Content, string) {
	var names []string
	for _, n := range g.names {
		if g.IntN(3) > 0 {
			names = append(names, n)
		}
	}
	without := draw(g, "", "", "", "images", "signatures", "manifests")
	c, err := imagetest.Content(names, without)
	if err != nil {
		t.Fatal(err)
	}
	return c, fmt.Sprintf("%v without %q", names, without)
}

// node writes configuration and state of a node and returns what it is in words.
func (g *generator) node(t *testing.T) string {
	var text, yaml strings.Builder
	fmt.Fprintln(&yaml, "version: 1\nmode: enforce\nsources:")
	add := func(dir string) {
		c, what := g.some(t)
		if err := imagetest.WriteLayout(filepath.Join(g.dir, dir), c); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&text, "%s: %s\n", dir, what)
	}
	if g.IntN(3) == 0 {
		add("state/store")
	}
	for i := range draw(g, 0, 0, 1, 2) {
		add(fmt.Sprintf("state/archives/b%d", i))
	}
	if n := draw(g, 0, 0, 1, 2); n > 0 {
		fmt.Fprintln(&yaml, "  layouts:")
		for i := range n {
			dir := fmt.Sprintf("layout%d", i)
			if add(dir); g.IntN(8) == 0 {
				if err := os.RemoveAll(filepath.Join(g.dir, dir, "index.json")); err != nil {
					t.Fatal(err)
				}
				fmt.Fprintln(&text, "which is damaged")
			}
			fmt.Fprintln(&yaml, "    - "+filepath.Join(g.dir, dir))
		}
	}
	network := draw(g, "never", "mirrors", "mirrors")
	fmt.Fprintf(&yaml, "  network: %s\n", network)
	if n := draw(g, 0, 1, 1, 2); network != "never" {
		fmt.Fprintln(&yaml, "  certsDir: none")
		if n > 0 {
			fmt.Fprintln(&yaml, "  mirrors:")
		}
		for i := range n {
			c, what := g.some(t)
			does := draw(g, "", "", "tags", "tags", "notags", "stranger", "fails", "refuses")
			r := &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path, NoAPI: does == "tags" || does == "notags", NoTags: does == "notags"}
			switch does {
			case "stranger":
				r.Repository = "another/app"
			case "fails", "refuses":
				r.Intercept = func(w http.ResponseWriter, _ *http.Request) bool {
					w.WriteHeader(map[string]int{"fails": http.StatusInternalServerError, "refuses": http.StatusForbidden}[does])
					return true
				}
			}
			g.mirrors = append(g.mirrors, r)
			fmt.Fprintf(&yaml, "    - {host: registry.test, url: %q}\n", fmt.Sprintf("%s/m%d", g.url, i))
			fmt.Fprintf(&text, "mirror %d (%s): %s\n", i, does, what)
		}
	}
	s := notarytest.Statement("prod", draw(g, imagetest.Identity, imagetest.Identity, "*", "x509.subject: C=US, ST=WA, O=others"))
	s.Level = draw(g, "strict", "strict", "permissive")
	s.Scopes = []string{draw(g, "*", "*", "*", "registry.test/team/app", "registry.test/other")}
	etc := filepath.Join(g.dir, "etc")
	if err := notarytest.WriteConfig(etc, notarytest.Stores{"ca/acme/root.crt": imagetest.World().Root}, s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(etc, "config.yaml"), []byte(yaml.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s%s%+v", text.String(), yaml.String(), s)
}

// inMemory makes a directory, in memory if there is a place for that: the store waits
// for the disk each time that it writes.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tidewaiter-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// runStore runs the store in the directory state as the daemon does. gate makes an
// decider as the daemon has it, but for the cache.
func runStore(t *testing.T, c *config.Config, state string) (gate func() *verify.Decider, end func()) {
	t.Helper()
	s, end := kept(t, state, store.Options{Kinds: []verify.Kind{notary.Kind}, Image: func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
		for _, i := range imagetest.World().Images {
			if raw, ok := i.Content[d.Digest]; ok {
				return raw, nil
			}
		}
		return nil, fs.ErrNotExist
	}})
	s.Trust(c.Trusts())
	return func() *verify.Decider {
		setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator { e.Store = s; return e }, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		e := &verify.Decider{}
		e.Swap(setup)
		return e
	}, end
}

// TestJunkClaims: whoever may push lists manifests that claim the digest to be of other
// sizes. The signature that counts is found behind them, where nothing holds the image.
func TestJunkClaims(t *testing.T) {
	img := imagetest.World().Images["signed"]
	c, err := imagetest.Content([]string{"signed"}, "images")
	if err != nil {
		t.Fatal(err)
	}
	var junk []ocispec.Descriptor
	add := func(b notarytest.Blob) {
		c.Blobs[b.Descriptor.Digest] = b.Content
	}
	stranger := notarytest.NewCA(notarytest.CAOptions{}).Leaf(notarytest.CertOptions{})
	for i := range 30 {
		lie := img.Target
		lie.Size += int64(1 + i)
		payload := img.Target // half of them do not even sign what they claim
		if i%2 == 0 {
			payload = lie
		}
		a := notarytest.Manifest(notarytest.MustSign(stranger, payload, notarytest.SignOptions{}), notary.MediaTypeJWS, lie, notarytest.ArtifactType)
		for _, b := range []notarytest.Blob{a.Manifest, a.Config, a.Envelope} {
			add(b)
		}
		a.Manifest.Descriptor.ArtifactType = notary.ArtifactType
		junk = append(junk, a.Manifest.Descriptor)
	}
	c.Referrers[img.Target.Digest] = append(junk, c.Referrers[img.Target.Digest]...)
	srv := httptest.NewServer(&sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path})
	defer srv.Close()
	dir := t.TempDir()
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": imagetest.World().Root}, notarytest.Statement("prod", imagetest.Identity)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), fmt.Appendf(nil, "version: 1\nmode: enforce\nsources:\n  network: mirrors\n  certsDir: none\n  mirrors: [{host: registry.test, url: %q}]\n", srv.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	j, err := NewOffline(t.Context(), cfg, "")
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	n := sourcetest.Name
	n.Digest = digest.Digest(img.Target.Digest)
	if d, _ := j.Judge(t.Context(), n, n.String(), ""); !d.Allowed() {
		t.Errorf("%s: %s", d.Reason, d.Detail)
	}
}
