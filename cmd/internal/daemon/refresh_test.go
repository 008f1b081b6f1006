package daemon

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// A feed is a mirror that hands over what it likes.
type feed []verify.Evidence

func (feed) Name() string { return "mirror http://127.0.0.1:1" }

func (f feed) Find(_ context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	for _, ev := range f {
		if err := b.Signature(); err != nil {
			return err
		}
		if !yield(ev) {
			break
		}
	}
	return nil
}

// A keeping is a store that runs, under a configuration and a clock.
type keeping struct {
	*store.Store
	t      *testing.T
	setup  *verify.Snapshot
	engine *verify.Engine
	plan   *reconcile.RefreshPlan
	mirror feed
	stop   func()
}

// keep runs the store below dir. Its mirror hands over what k.mirror says.
func keep(t *testing.T, dir string, c *config.Config, now func() time.Time, content *imagetest.Image, size int64) *keeping {
	t.Helper()
	k := &keeping{t: t}
	k.Store = store.New(dir, store.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: now, Size: size, Kinds: []verify.Kind{notary.Kind},
		Image: func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
			if raw, ok := content.Content[d.Digest]; ok {
				return raw, nil
			}
			return nil, fs.ErrNotExist
		}})
	k.Trust(c.Trusts())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = k.Run(ctx) }()
	k.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(k.stop)
	setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator {
		e.Store, e.Sources = k.Store, func(verify.Name) []verify.Source { return []verify.Source{k.mirror} }
		k.engine = e
		return e
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	k.setup = setup
	k.plan = plan(c, setup, k.engine, k.Store)
	return k
}

// question is what the configuration asks of an image of that repository.
func (k *keeping) question(repository string, target, manifest ocispec.Descriptor, config digest.Digest) verify.Question {
	img := verify.Image{
		Name: verify.Name{Host: "registry.test", Path: repository}, Target: target, Manifest: manifest, Config: config,
		LayersVerified: true, Use: verify.UsePrefetch, Binding: verify.BoundRecord,
	}
	return verify.Question{Image: img, Rule: k.setup.Policy.Select(img)}
}

// refresh looks for signatures of an image that is a manifest.
func (k *keeping) refresh(repository string, target ocispec.Descriptor, from ...verify.Evidence) reconcile.Gain {
	k.t.Helper()
	k.mirror = from
	gain, _ := k.plan.Ask(k.t.Context(), k.question(repository, target, target, target.Digest))
	k.settled()
	return gain
}

// settled waits until everything is written. Stopping does that.
func (k *keeping) settled() {
	k.t.Helper()
	for end := time.Now().Add(time.Minute); k.Busy(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			k.t.Fatal("the store does not come to rest")
		}
	}
}

// judge answers with nothing but the store.
func (k *keeping) judge(q verify.Question) verify.Decision {
	e := *k.engine
	e.Sources = func(verify.Name) []verify.Source { return nil }
	return e.Evaluate(k.t.Context(), q)
}

// copied is a copy of the store's directory as it is at this moment, as after a power cut.
func copied(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// What can count longest is kept, in whatever order a mirror hands it over.
func TestRefreshKeepsWhatLasts(t *testing.T) {
	conf := t.TempDir()
	acme, stamps := notarytest.NewCA(notarytest.CAOptions{}), notarytest.NewCA(notarytest.CAOptions{})
	start := time.Now()
	leaf := acme.Leaf(notarytest.CertOptions{NotAfter: start.Add(24 * time.Hour)})
	tsa := stamps.TSA(notarytest.CertOptions{Subject: notarytest.Name("tsa")})
	statement := notarytest.Statement("prod")
	statement.TrustStores, statement.VerifyTimestamp = append(statement.TrustStores, "tsa:t"), "afterCertExpiry"
	if err := notarytest.WriteConfig(conf, notarytest.Stores{"ca/acme/root.crt": acme.PEM(), "tsa/t/root.crt": stamps.PEM()}, statement); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "config.yaml"), []byte("version: 1\nmode: enforce\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var i imagetest.Image
	app := i.Manifest("app", digest.SHA256)
	envelope := notarytest.MustSign(leaf, app, notarytest.SignOptions{})
	evidence := func(raw []byte) verify.Evidence {
		return notarytest.Manifest(raw, notary.MediaTypeJWS, app, notarytest.ArtifactType).Evidence()
	}
	copy := func(n int) verify.Evidence {
		return evidence(append(bytes.Clone(envelope), bytes.Repeat([]byte{' '}, n)...))
	}
	renewed := func(n int) verify.Evidence {
		return evidence(notarytest.MustSign(leaf, app, notarytest.SignOptions{SigningTime: notarytest.SigningTime.Add(time.Duration(n) * time.Hour)}))
	}
	one, two := renewed(1), renewed(2)
	stamped := evidence(notarytest.Timestamp(envelope, notary.MediaTypeJWS, func(sig []byte) []byte { return notarytest.Token(tsa, sig, notarytest.TokenOptions{}) }))
	foreign := notarytest.NewCA(notarytest.CAOptions{}).TSA(notarytest.CertOptions{})
	forged := evidence(notarytest.Timestamp(envelope, notary.MediaTypeJWS, func(sig []byte) []byte {
		return notarytest.Token(foreign, sig, notarytest.TokenOptions{})
	}))
	for _, tt := range []struct {
		name    string
		refresh []feed // one after another
		spare   int    // at the last
		kept    int
		want    verify.Reason // after the end of the certificate
	}{
		{name: "the timestamped one", refresh: []feed{{stamped}}, kept: 1, want: verify.Verified},
		{name: "the timestamped one, then two copies without", refresh: []feed{{stamped, copy(0), copy(1)}}, kept: 3, want: verify.Verified},
		{name: "two copies without, then the timestamped one", refresh: []feed{{copy(0), copy(1), stamped}}, kept: 3, want: verify.Verified},
		{name: "two plain ones, and a week later the timestamped one", refresh: []feed{{one, two}, {one, two, stamped}}, kept: 3, want: verify.Verified},
		{name: "copies with a timestamp of a stranger before it", refresh: []feed{{copy(0), forged, copy(1), stamped}}, spare: 1, kept: 3, want: verify.Verified},
		{name: "none with a timestamp", refresh: []feed{{copy(0), copy(1), copy(2), renewed(3)}}, spare: 1, kept: 2, want: verify.CertificateExpired},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			k := keep(t, dir, c, func() time.Time { return start }, &i, 0)
			var gain reconcile.Gain
			for _, from := range tt.refresh {
				gain = k.refresh("team/app", app, from...)
			}
			if gain.Spare != tt.spare || gain.Unkept != 0 {
				t.Errorf("the last refresh says %+v, want %d spare", gain, tt.spare)
			}
			if n, _ := k.Signatures(); n != tt.kept {
				t.Errorf("%d signatures are kept, want %d", n, tt.kept)
			}
			later := keep(t, copied(t, dir), c, func() time.Time { return start.Add(48 * time.Hour) }, &i, 0)
			if d := later.judge(later.question("team/app", app, app, app.Digest)); d.Reason != tt.want {
				t.Errorf("after the end of the certificate: %s %s", d.Reason, d.Detail)
			}
		})
	}
}

// A mirror that has one signature cannot fill the store with what it makes of it, and
// neither can a signer with signatures of which each ends later than the one before.
func TestRefreshTakesFewAlike(t *testing.T) {
	conf := t.TempDir()
	write(t, conf, "version: 1\nmode: enforce\n")
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var i imagetest.Image
	app := i.Manifest("app", digest.SHA256)
	now := time.Now()
	// As often as wanted: the same envelope, with spaces behind it.
	variants := func(n, from int, o notarytest.SignOptions) (list feed) {
		envelope := notarytest.MustSign(imagetest.World().Signer, app, o)
		for i := range n {
			raw := append(bytes.Clone(envelope), bytes.Repeat([]byte{' '}, from+i)...)
			list = append(list, notarytest.Manifest(raw, notary.MediaTypeJWS, app, notarytest.ArtifactType).Evidence())
		}
		return list
	}
	ends := func(after time.Duration) notarytest.SignOptions {
		return notarytest.SignOptions{Expiry: now.Add(after)}
	}
	var growing feed
	for i := range 40 {
		growing = append(growing, variants(1, 0, ends(time.Duration(i+3)*time.Hour))...)
	}
	k := keep(t, t.TempDir(), c, time.Now, &i, 0)
	for _, step := range []struct {
		name   string
		mirror feed
		fresh  int
		spare  int
		total  int
	}{
		{name: "the first ones", mirror: variants(40, 0, ends(time.Hour)), fresh: 2, spare: 38, total: 2},
		{name: "more of them", mirror: variants(40, 40, ends(time.Hour)), spare: 40, total: 2},
		{name: "one that ends later", mirror: variants(1, 0, ends(2*time.Hour)), fresh: 1, total: 2},
		{name: "each ends later than the one before", mirror: growing, fresh: 2, total: 2},
		{name: "with other metadata that is signed", mirror: variants(3, 0, notarytest.SignOptions{Expiry: now.Add(time.Hour), Annotations: map[string]string{"stage": "prod"}}), fresh: 2, spare: 1, total: 4},
		{name: "one that does not end, after many others", mirror: append(variants(40, 80, ends(time.Hour)), variants(1, 0, notarytest.SignOptions{})...), fresh: 1, spare: 40, total: 4},
		{name: "one more of these", mirror: variants(1, 0, notarytest.SignOptions{}), spare: 1, total: 4},
	} {
		got := k.refresh("team/app", app, step.mirror...)
		if want := (reconcile.Gain{Fresh: step.fresh, Spare: step.spare}); got != want {
			t.Errorf("%s: %+v, want %+v", step.name, got, want)
		}
		if n, _ := k.Signatures(); n != step.total {
			t.Errorf("%s: %d signatures in the store, not %d", step.name, n, step.total)
		}
	}
}

// Of an image that has more signatures than one question may look at, all are weighed: one
// that counts less than others of its class is not kept, wherever these lie in the store.
func TestRefreshWeighsAll(t *testing.T) {
	const classes, batch = 130, 20
	conf := t.TempDir()
	write(t, conf, "version: 1\nmode: enforce\n")
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var i imagetest.Image
	app := i.Manifest("app", digest.SHA256)
	now := time.Now()
	of := func(class int, ends time.Duration, spaces int) verify.Evidence {
		envelope := notarytest.MustSign(imagetest.World().Signer, app, notarytest.SignOptions{Expiry: now.Add(ends), Annotations: map[string]string{"build": fmt.Sprint(class)}})
		raw := append(envelope, bytes.Repeat([]byte{' '}, spaces)...)
		return notarytest.Manifest(raw, notary.MediaTypeJWS, app, notarytest.ArtifactType).Evidence()
	}
	k := keep(t, t.TempDir(), c, time.Now, &i, 0)
	for from := 0; from < classes; from += batch {
		var list feed
		for class := from; class < min(from+batch, classes); class++ {
			list = append(list, of(class, 3*time.Hour, 0), of(class, 2*time.Hour, 1))
		}
		k.refresh("team/app", app, list...)
	}
	if n, _ := k.Signatures(); n != 2*classes {
		t.Fatalf("%d signatures in the store, not %d", n, 2*classes)
	}
	for from := 0; from < classes; from += batch {
		var less feed
		for class := from; class < min(from+batch, classes); class++ {
			less = append(less, of(class, time.Hour, 2))
		}
		if got, want := k.refresh("team/app", app, less...), (reconcile.Gain{Spare: len(less)}); got != want {
			t.Errorf("from %d: %+v, want %+v", from, got, want)
		}
	}
	if n, _ := k.Signatures(); n != 2*classes {
		t.Errorf("%d signatures in the store, not %d", n, 2*classes)
	}
}
