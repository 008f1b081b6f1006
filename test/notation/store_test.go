package notation_test

import (
	"context"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// TestStore has the node's store read by oras-go and by notation.
func TestStore(t *testing.T) {
	t.Parallel()
	program, err := node.FindNotation(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	ca := notarytest.NewCA(notarytest.CAOptions{})
	signer := ca.Leaf(notarytest.CertOptions{})
	config := filepath.Join(t.TempDir(), "config")
	if err := notarytest.WriteConfig(config, notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme")); err != nil {
		t.Fatal(err)
	}
	c := sourcetest.Content{Kind: notary.Kind}
	state := t.TempDir()
	s := store.New(state, store.Options{
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: time.Now, Kinds: []verify.Kind{notary.Kind},
		Image: func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
			if raw, ok := c.Blobs[d.Digest]; ok {
				return raw, nil
			}
			return nil, fs.ErrNotExist
		},
	})
	kept := map[notarytest.Style]ocispec.Descriptor{notarytest.ArtifactType: c.Image("new"), notarytest.ConfigType: c.Image("old")}
	envelopes := map[notarytest.Style]digest.Digest{}
	for style, image := range kept {
		a := notarytest.Manifest(notarytest.MustSign(signer, image, notarytest.SignOptions{}), notary.MediaTypeJWS, image, style)
		ev := a.Evidence()
		envelopes[style] = a.Envelope.Descriptor.Digest
		s.Keep(verify.Image{Target: image, Manifest: image}, image, ev)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // Run writes what waits
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}

	dir := filepath.Join(state, "store")
	reader, err := oci.NewFromFS(t.Context(), os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	for style, image := range kept {
		got, err := reader.Resolve(t.Context(), image.Digest.String())
		if err != nil || got.Digest != image.Digest || got.MediaType != image.MediaType {
			t.Errorf("oras-go resolves %s to %v, %v", image.Digest, got, err)
		}
		list, err := reader.Predecessors(t.Context(), image)
		if err != nil || len(list) != 1 {
			t.Fatalf("oras-go finds %d signatures of %s, %v", len(list), image.Digest, err)
		}
		successors, err := content.Successors(t.Context(), reader, list[0])
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, d := range successors {
			if raw, err := content.FetchAll(t.Context(), reader, d); err != nil {
				t.Errorf("oras-go cannot fetch %s: %v", d.Digest, err)
			} else {
				found = found || d.Digest == envelopes[style] && len(raw) > 0
			}
		}
		if !found {
			t.Error("oras-go does not lead to the envelope")
		}
	}

	// notation 1.3.2 sees in layouts only signatures of the older style.
	env := []string{"HOME=" + t.TempDir(), "NOTATION_EXPERIMENTAL=1", "NOTATION_CONFIG=" + config, "PATH=" + os.Getenv("PATH")}
	stdout, stderr, status := run(t.Context(), env, program, "verify", "--oci-layout", dir+"@"+kept[notarytest.ConfigType].Digest.String(), "--scope", scope)
	if status != 0 {
		t.Errorf("notation: exit status %d\n%s%s", status, stdout, stderr)
	}
	// Tidewaiter itself reads it as any layout.
	bin, err := node.BuildTidewaiter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for style, image := range kept {
		stdout, stderr, status := run(t.Context(), env, bin, "verify", "--config-dir", config, "--layout", dir, scope+"@"+image.Digest.String())
		if status != 0 {
			t.Errorf("tidewaiter verify --layout, style %v: exit status %d\n%s%s", style, status, stdout, stderr)
		}
	}
	other := c.Image("other")
	if _, _, status := run(t.Context(), env, program, "verify", "--oci-layout", dir+"@"+other.Digest.String(), "--scope", scope); status == 0 {
		t.Error("notation verifies what is not there")
	}
}
