package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/notary/notarytest"
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

// A mirror that has one signature cannot fill the store with what it makes of it, and
// what is worth more is kept whatever else there is.
func TestRefreshTakesFewAlike(t *testing.T) {
	conf := t.TempDir()
	write(t, conf, "version: 1\nmode: enforce\n")
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var i image
	app := i.manifest("app", digest.SHA256)
	now := time.Now()
	// As often as wanted: the same envelope, with spaces behind it.
	variants := func(n, from int, o notarytest.SignOptions) (list feed) {
		envelope := notarytest.MustSign(world().signer, app, o)
		for i := range n {
			raw := append(bytes.Clone(envelope), bytes.Repeat([]byte{' '}, from+i)...)
			list = append(list, notarytest.Manifest(raw, verify.MediaTypeJWS, app, notarytest.ArtifactType).Evidence())
		}
		return list
	}
	s := store.New(t.TempDir(), store.Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: time.Now})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	var mirror feed
	var engine *verify.Engine
	setup, err := c.Setup(func(e *verify.Engine) verify.Judge {
		engine = e
		e.Sources = func(verify.Name) []verify.Source { return []verify.Source{mirror} }
		return e
	}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	p := plan(c, setup, engine, s)
	img := verify.Image{
		Name: verify.Name{Host: "registry.test", Path: "team/app"}, Target: app, Manifest: app, Config: app.Digest,
		Vouched: true, Use: verify.UseAhead, Binding: verify.BoundRecord,
	}
	q := verify.Question{Image: img, Rule: setup.Policy.Select(img)}
	total := 0
	for _, step := range []struct {
		name   string
		mirror feed
		want   int
	}{
		{"the first ones", variants(40, 0, notarytest.SignOptions{}), alike},
		{"more of them", variants(40, 40, notarytest.SignOptions{}), 0},
		{"one that ends later", variants(1, 0, notarytest.SignOptions{Expiry: now.Add(time.Hour)}), 1},
		{"after many others", append(variants(40, 80, notarytest.SignOptions{}), variants(1, 0, notarytest.SignOptions{Expiry: now.Add(2 * time.Hour)})...), 1},
		{"nothing new", variants(40, 0, notarytest.SignOptions{}), 0},
	} {
		mirror = step.mirror
		got, tried := p.Ask(ctx, q)
		if got != step.want {
			t.Errorf("%s: %d are kept, not %d: %v", step.name, got, step.want, tried)
		}
		total += step.want
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			if n, _ := s.Signatures(); n == total {
				break
			} else if time.Now().After(end) {
				t.Fatalf("%s: %d signatures in the store, not %d", step.name, n, total)
			}
		}
	}
}
