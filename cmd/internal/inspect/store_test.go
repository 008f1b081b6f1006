package inspect

import (
	"context"
	"encoding/json"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// kept runs the store and the archives below dir.
func kept(t *testing.T, dir string, o store.Options) (s *store.Store, end func()) {
	t.Helper()
	o.Log, o.Now, o.Kinds = slog.New(slog.DiscardHandler), time.Now, []verify.Kind{notary.Kind}
	a := archives.New(dir, archives.Options{Log: o.Log, Now: o.Now, Kinds: o.Kinds})
	o.Archives = a
	s = store.New(dir, o)
	ctx, cancel := context.WithCancel(t.Context())
	var both sync.WaitGroup
	both.Go(func() { _ = s.Run(ctx) })
	both.Go(func() { _ = a.Run(ctx) })
	return s, func() { cancel(); both.Wait() }
}

// judgeWith judges an image with nothing but the store in dir.
func judgeWith(t *testing.T, c *config.Config, dir string, img verify.Image) verify.Decision {
	t.Helper()
	s, end := kept(t, dir, store.Options{})
	defer end()
	setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator {
		e.Store = s
		e.Sources = func(verify.Name) []verify.Source { return nil }
		return e
	}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	var decider verify.Decider
	decider.Swap(setup)
	img.Revision = setup.Revision
	return decider.Verify(t.Context(), img)
}

// hostile puts files into the store below dir, or into an archive that lists them all.
func hostile(t *testing.T, dir string, archive bool, files map[digest.Digest][]byte) {
	t.Helper()
	c := sourcetest.Content{Kind: notary.Kind, Blobs: files}
	for name, raw := range files {
		if mediaType, err := oci.MediaTypeOf(raw, ""); err == nil {
			c.Images = append(c.Images, ocispec.Descriptor{MediaType: mediaType, Digest: name, Size: int64(len(raw))})
		}
	}
	at := "store"
	if archive {
		at = "archives/evil"
	}
	if err := imagetest.WriteLayout(filepath.Join(dir, at), c); err != nil {
		t.Fatal(err)
	}
}

// TestHostileStore has a state directory that an attacker has filled, the store or a
// archive: whatever is in it, an image is allowed only where the directory holds a signature by a
// trusted signer of the image, or of an index that lists its manifest.
func TestHostileStore(t *testing.T) {
	conf := t.TempDir()
	if err := imagetest.WriteConfig(conf, "version: 1\nmode: enforce\n"); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var i imagetest.Image
	app, evil := i.Manifest("app", digest.SHA256), i.Manifest("evil", digest.SHA256)
	both, mine := i.Index(app), i.Index(evil)
	lie := evil
	lie.Size++
	lies := i.Index(lie)
	stranger := notarytest.SelfSigned(notarytest.CertOptions{Subject: notarytest.Name("release")})
	artifact := func(by *notarytest.Signer, payload, subject ocispec.Descriptor) notarytest.Artifact {
		return notarytest.Manifest(notarytest.MustSign(by, payload, notarytest.SignOptions{}), notary.MediaTypeJWS, subject, notarytest.ArtifactType)
	}
	// An attacker has all signatures that there are, and can make any other files.
	var pool [][]byte
	blobs := func(list ...notarytest.Artifact) {
		for _, a := range list {
			pool = append(pool, a.Manifest.Content, a.Envelope.Content, a.Config.Content)
		}
	}
	signer := imagetest.World().Signer
	good, goodIndex := artifact(signer, app, app), artifact(signer, both, both)
	blobs(good, goodIndex,
		artifact(signer, app, evil), artifact(signer, both, evil), artifact(signer, both, mine), artifact(signer, lies, evil), artifact(signer, lies, lies),
		artifact(stranger, evil, evil), artifact(stranger, mine, mine), artifact(stranger, app, app))
	for _, raw := range i.Content {
		pool = append(pool, raw)
	}
	verdict, err := json.Marshal(map[string]any{"allowed": true, "reason": "VERIFIED", "target": evil.Digest})
	if err != nil {
		t.Fatal(err)
	}
	pool = append(pool, verdict, []byte(`{"manifests":[{"mediaType":"`+evil.MediaType+`","digest":"`+evil.Digest.String()+`","size":1}],"subject":{"digest":"`+evil.Digest.String()+`"}}`))

	ask := func(dir string, d ocispec.Descriptor) verify.Decision {
		return judgeWith(t, c, dir, verify.Image{
			Name: verify.Name{Host: "registry.test", Path: "team/app"}, Target: d, Manifest: d, Config: d.Digest,
			LayersVerified: true, Use: verify.UsePrefetch, Binding: verify.BoundRecord, // nobody waits
		})
	}
	empty := t.TempDir()
	for _, d := range []ocispec.Descriptor{app, evil} {
		if got := ask(empty, d); got.Allowed() {
			t.Fatalf("an empty store allows %s: %s", d.Digest, got.Reason)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	allowed := 0
	for round := range 60 {
		dir := t.TempDir()
		files := map[digest.Digest][]byte{}
		for _, raw := range pool {
			if round > 0 && random.IntN(4) == 0 {
				continue
			}
			name := digest.FromBytes(raw)
			switch {
			case round == 0:
			case random.IntN(6) == 0: // content under another's name
				name = digest.FromBytes(pool[random.IntN(len(pool))])
			case random.IntN(6) == 0: // content changed
				raw = append([]byte{}, raw...)
				raw[random.IntN(len(raw))] ^= 1 << random.IntN(8)
			}
			files[name] = raw
		}
		hostile(t, dir, round%2 == 1, files)
		held := func(d digest.Digest) bool {
			raw, ok := files[d]
			return ok && digest.FromBytes(raw) == d
		}
		has := func(a notarytest.Artifact) bool {
			return held(a.Manifest.Descriptor.Digest) && held(a.Envelope.Descriptor.Digest)
		}
		justified := has(good) || has(goodIndex) && held(both.Digest)
		got := ask(dir, app)
		if got.Allowed() != justified {
			t.Errorf("round %d: app: allowed %v, justified %v: %s %s", round, got.Allowed(), justified, got.Reason, got.Detail)
		}
		if got.Allowed() {
			allowed++
		}
		if got := ask(dir, evil); got.Allowed() {
			t.Errorf("round %d: evil is allowed: %s by %v over %s", round, got.Reason, got.Signers, got.Signed)
		}
	}
	if allowed < 5 || allowed > 55 {
		t.Errorf("app was allowed %d of 60 times: the rounds say nothing", allowed)
	}
}
