package daemon

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// Tenants are two signers, each of whom the configuration trusts for one repository.
type tenants struct {
	config *config.Config
	ca     *notarytest.CA // of a
	a, b   *notarytest.Signer
	imagetest.Image
}

func newTenants(t *testing.T) *tenants {
	t.Helper()
	first, second := notarytest.NewCA(notarytest.CAOptions{}), notarytest.NewCA(notarytest.CAOptions{})
	statement := func(name string) verify.Statement {
		s := notarytest.Statement(name)
		s.Scopes, s.TrustStores = []string{"registry.test/" + name + "/app"}, []string{"ca:" + name}
		return s
	}
	conf := t.TempDir()
	if err := notarytest.WriteConfig(conf, notarytest.Stores{"ca/a/root.crt": first.PEM(), "ca/b/root.crt": second.PEM()}, statement("a"), statement("b")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "config.yaml"), []byte("version: 1\nmode: enforce\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	return &tenants{config: c, ca: first, a: first.Leaf(notarytest.CertOptions{}), b: second.Leaf(notarytest.CertOptions{})}
}

func (w *tenants) signature(by *notarytest.Signer, subject ocispec.Descriptor, o notarytest.SignOptions) verify.Evidence {
	return notarytest.Manifest(notarytest.MustSign(by, subject, o), notary.MediaTypeJWS, subject, notarytest.ArtifactType).Evidence()
}

// keeps has the store keep evidence without looking at what else it has, as a gate of
// long ago would have.
func (k *keeping) keeps(target, manifest ocispec.Descriptor, list ...verify.Evidence) {
	k.t.Helper()
	for _, ev := range list {
		k.Keep(verify.Image{Target: target, Manifest: manifest}, target, ev)
	}
	k.settled()
}

// stands checks the answer of the store that runs, and of what a power cut leaves.
func (w *tenants) stands(t *testing.T, k *keeping, dir string, ask func(*keeping) verify.Question, want verify.Reason) {
	t.Helper()
	if d := k.judge(ask(k)); d.Reason != want {
		t.Errorf("%s: %s, want %s", d.Reason, d.Detail, want)
	}
	again := keep(t, copied(t, dir), w.config, time.Now, &w.Image, 0)
	defer again.stop()
	if d := again.judge(ask(again)); d.Reason != want {
		t.Errorf("after a power cut: %s: %s, want %s", d.Reason, d.Detail, want)
	}
}

// A tenant who signs another's image many times takes none of its evidence away.
func TestTenantSignsAnothersImage(t *testing.T) {
	w, dir := newTenants(t), t.TempDir()
	app := w.Manifest("app", digest.SHA256)
	ask := func(k *keeping) verify.Question { return k.question("b/app", app, app, app.Digest) }
	k := keep(t, dir, w.config, time.Now, &w.Image, 0)
	k.refresh("b/app", app, w.signature(w.b, app, notarytest.SignOptions{}))
	var flood []verify.Evidence
	for i := range 120 {
		flood = append(flood, w.signature(w.a, app, notarytest.SignOptions{Expiry: time.Now().Add(time.Duration(i+1) * time.Hour)}))
	}
	k.refresh("a/app", app, flood...)
	if n, _ := k.Signatures(); n != 1+alike {
		t.Errorf("%d signatures are kept", n)
	}
	w.stands(t, k, dir, ask, verify.Verified)
	for i := range flood { // each by another certificate
		flood[i] = w.signature(w.ca.Leaf(notarytest.CertOptions{}), app, notarytest.SignOptions{})
	}
	k.keeps(app, app, flood...)
	if n, _ := k.Signatures(); n < 120 {
		t.Fatalf("%d signatures are kept", n)
	}
	w.stands(t, k, dir, ask, verify.Verified)
}

// The same for signers who are told apart by their imagetest.Identity alone.
func TestSignersTakeTurns(t *testing.T) {
	dir := t.TempDir()
	ca := notarytest.NewCA(notarytest.CAOptions{})
	name := notarytest.Name("other")
	name.Organization = []string{"other"}
	w := &tenants{a: ca.Leaf(notarytest.CertOptions{Subject: name}), b: ca.Leaf(notarytest.CertOptions{})}
	conf := t.TempDir()
	if err := notarytest.WriteConfig(conf, notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, notarytest.Statement("b", imagetest.Identity)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "config.yaml"), []byte("version: 1\nmode: enforce\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.config, err = config.Load(conf); err != nil {
		t.Fatal(err)
	}
	app := w.Manifest("app", digest.SHA256)
	k := keep(t, dir, w.config, time.Now, &w.Image, 0)
	k.keeps(app, app, w.signature(w.b, app, notarytest.SignOptions{}))
	var flood []verify.Evidence
	for i := range 120 {
		flood = append(flood, w.signature(w.a, app, notarytest.SignOptions{Expiry: time.Now().Add(time.Duration(i+1) * time.Hour)}))
	}
	k.keeps(app, app, flood...)
	w.stands(t, k, dir, func(k *keeping) verify.Question { return k.question("b/app", app, app, app.Digest) }, verify.Verified)

	listed := w.Manifest("listed", digest.SHA256)
	index := w.Index(listed)
	k.keeps(index, listed, w.signature(w.b, index, notarytest.SignOptions{}))
	for i := range 12 {
		theirs := w.Index(listed, w.Manifest(fmt.Sprint("theirs ", i), digest.SHA256))
		k.keeps(theirs, listed, w.signature(w.a, theirs, notarytest.SignOptions{}))
	}
	w.stands(t, k, dir, func(k *keeping) verify.Question { return k.question("b/app", listed, listed, listed.Digest) }, verify.Verified)
}

// What the manifest of a signature claims does not put it before others: neither an
// envelope with a space before it, nor one that is an index besides, is taken for a chain
// that could not be read.
func TestTenantClaimsAnothersChain(t *testing.T) {
	for name, disguise := range map[string]func([]byte) []byte{
		"space": func(raw []byte) []byte { return append([]byte(" \n"), raw...) },
		"index": func(raw []byte) []byte { return append([]byte(`{"manifests":[],`), raw[1:]...) },
	} {
		t.Run(name, func(t *testing.T) {
			w, dir := newTenants(t), t.TempDir()
			app := w.Manifest("app", digest.SHA256)
			k := keep(t, dir, w.config, time.Now, &w.Image, 0)
			k.keeps(app, app, w.signature(w.b, app, notarytest.SignOptions{}))
			anchor := k.engine.Checkers[0].Anchors("b")[0]
			var flood []verify.Evidence
			for i := range 120 {
				raw := notarytest.MustSign(w.a, app, notarytest.SignOptions{Expiry: time.Now().Add(time.Duration(i+1) * time.Hour)})
				ev := notarytest.Manifest(disguise(raw), notary.MediaTypeJWS, app, notarytest.ArtifactType).Evidence()
				var m ocispec.Manifest
				if err := json.Unmarshal(ev.Document, &m); err != nil {
					t.Fatal(err)
				}
				m.Annotations = map[string]string{notarytest.Thumbprints: fmt.Sprintf("[%q,%q]", digest.FromString(fmt.Sprint(i)).Encoded(), anchor)}
				ev.Document = imagetest.Encode(m)
				ev.Manifest = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(ev.Document), Size: int64(len(ev.Document))}
				if f := k.engine.Checkers[0].Check(t.Context(), ev, app, "a"); f.Reason != verify.Verified {
					t.Fatalf("it does not meet the tenant's own rule: %+v", f)
				}
				flood = append(flood, ev)
			}
			k.keeps(app, app, flood...)
			w.stands(t, k, dir, func(k *keeping) verify.Question { return k.question("b/app", app, app, app.Digest) }, verify.Verified)
		})
	}
}

// A tenant who lists another's manifest in indexes, or makes manifests with its config,
// takes none of its evidence away.
func TestTenantListsAnothersManifest(t *testing.T) {
	w, dir := newTenants(t), t.TempDir()
	app := w.Manifest("app", digest.SHA256)
	var doc ocispec.Manifest
	if err := json.Unmarshal(w.Content[app.Digest], &doc); err != nil {
		t.Fatal(err)
	}
	index := w.Index(app)
	k := keep(t, dir, w.config, time.Now, &w.Image, 0)
	k.keeps(index, app, w.signature(w.b, index, notarytest.SignOptions{}))
	for i := range 12 {
		theirs := w.Index(app, w.Manifest(fmt.Sprint("theirs ", i), digest.SHA256))
		k.keeps(theirs, app, w.signature(w.a, theirs, notarytest.SignOptions{}))
		same := w.Put(ocispec.MediaTypeImageManifest, imagetest.Encode(ocispec.Manifest{
			Versioned: doc.Versioned, MediaType: doc.MediaType, Config: doc.Config, Layers: []ocispec.Descriptor{}, Annotations: map[string]string{"n": fmt.Sprint(i)},
		}), digest.SHA256)
		k.keeps(same, same, w.signature(w.a, same, notarytest.SignOptions{}))
	}
	byManifest := func(k *keeping) verify.Question { return k.question("b/app", app, app, doc.Config.Digest) }
	w.stands(t, k, dir, byManifest, verify.Verified)
	imported := w.Put(ocispec.MediaTypeImageManifest, imagetest.Encode(ocispec.Manifest{Versioned: doc.Versioned, MediaType: doc.MediaType, Config: doc.Config, Layers: []ocispec.Descriptor{{Digest: app.Digest}}}), digest.SHA256)
	w.stands(t, k, dir, func(k *keeping) verify.Question { return k.question("b/app", imported, imported, doc.Config.Digest) }, verify.Verified)

	// What was not looked at is not known.
	other := w.Manifest("other", digest.SHA256)
	for i := range 12 {
		theirs := w.Index(other, w.Manifest(fmt.Sprint("others ", i), digest.SHA256))
		k.keeps(theirs, other, w.signature(w.a, theirs, notarytest.SignOptions{}))
	}
	w.stands(t, k, dir, func(k *keeping) verify.Question { return k.question("b/app", other, other, other.Digest) }, verify.LimitExceeded)
}

// A tenant whose indexes list all that the store remembers leaves others their share.
func TestTenantFillsTheLinks(t *testing.T) {
	w, dir := newTenants(t), t.TempDir()
	k := keep(t, dir, w.config, time.Now, &w.Image, 0)
	live := map[digest.Digest]bool{}
	listed := func() {
		all := map[digest.Digest]bool{}
		for d := range live {
			all[d] = true
		}
		k.Retain(all)
		k.settled()
	}
	for i := range 32 {
		var many []ocispec.Descriptor
		for j := range 2048 {
			many = append(many, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(fmt.Sprint(i, j)), Size: 7})
		}
		theirs := w.Index(many...)
		live[theirs.Digest] = true
		listed()
		k.keeps(theirs, theirs, w.signature(w.a, theirs, notarytest.SignOptions{}))
	}
	app := w.Manifest("app", digest.SHA256)
	index := w.Index(app)
	live[index.Digest], live[app.Digest] = true, true
	listed()
	k.keeps(index, app, w.signature(w.b, index, notarytest.SignOptions{}))
	again := keep(t, copied(t, dir), w.config, time.Now, &w.Image, 0)
	for name, k := range map[string]*keeping{"it runs": k, "after a power cut": again} {
		d := k.judge(k.question("b/app", app, app, app.Digest))
		for end := time.Now().Add(time.Minute); strings.Contains(d.Detail, "still being read") && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			d = k.judge(k.question("b/app", app, app, app.Digest))
		}
		if d.Reason != verify.Verified {
			t.Errorf("%s: %s: %s", name, d.Reason, d.Detail)
		}
	}
}

// A tenant who fills the store leaves others their share of it.
func TestTenantFillsTheStore(t *testing.T) {
	w, dir := newTenants(t), t.TempDir()
	const size = 256 << 10
	k := keep(t, dir, w.config, time.Now, &w.Image, size)
	live := map[digest.Digest]bool{}
	large := func(name string, bytes int) ocispec.Descriptor {
		d := w.Put(ocispec.MediaTypeImageManifest, imagetest.Encode(ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString(name)},
			Layers: []ocispec.Descriptor{}, Annotations: map[string]string{"x": strings.Repeat("x", bytes)},
		}), digest.SHA256)
		live[d.Digest] = true
		return d
	}
	listed := func() {
		all := map[digest.Digest]bool{}
		for d := range live {
			all[d] = true
		}
		k.Retain(all)
		k.settled()
	}
	before := large("before", 8<<10)
	k.keeps(before, before, w.signature(w.b, before, notarytest.SignOptions{}))
	var theirs []ocispec.Descriptor
	for i := range 40 {
		d := large(fmt.Sprint("theirs ", i), 30<<10)
		theirs = append(theirs, d)
		listed()
		k.keeps(d, d, w.signature(w.a, d, notarytest.SignOptions{}))
	}
	ask := func(repository string, d ocispec.Descriptor) func(k *keeping) verify.Question {
		return func(k *keeping) verify.Question { return k.question(repository, d, d, d.Digest) }
	}
	for end := time.Now().Add(time.Minute); !strings.Contains(k.Trouble(), "ca:a/root.crt") && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		k.keeps(theirs[39], theirs[39], w.signature(w.a, theirs[39], notarytest.SignOptions{}))
	}
	if s := k.Trouble(); !strings.Contains(s, "full") || !strings.Contains(s, "ca:a/root.crt") {
		t.Errorf("trouble %q", s)
	}
	w.stands(t, k, dir, ask("b/app", before), verify.Verified)
	after := large("after", 8<<10)
	listed()
	gain := k.refresh("b/app", after, w.signature(w.b, after, notarytest.SignOptions{}))
	if gain.Fresh != 1 {
		t.Errorf("%+v", gain)
	}
	w.stands(t, k, dir, ask("b/app", before), verify.Verified)
	w.stands(t, k, dir, ask("b/app", after), verify.Verified)
	// And once more: they take none of it back.
	for _, d := range theirs {
		k.keeps(d, d, w.signature(w.a, d, notarytest.SignOptions{}))
	}
	w.stands(t, k, dir, ask("b/app", before), verify.Verified)
	w.stands(t, k, dir, ask("b/app", after), verify.Verified)
	if _, bytes := k.Signatures(); bytes > size {
		t.Errorf("%d bytes", bytes)
	}
	// Without a larger share somewhere nothing on the node gives way: each to its own.
	n := 0
	for _, d := range theirs {
		if got := k.judge(ask("a/app", d)(k)); got.Reason == verify.Verified {
			n++
		}
	}
	if n < 3 {
		t.Errorf("%d of the other's images are left", n)
	}
}
