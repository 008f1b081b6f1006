package daemon

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
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

// Any file of the store may be damaged, in any way, while the gate runs or before. Then
// an image whose signature it was is refused as one of which it is not known whether it
// is signed, other images start, and what containerd or a mirror has is had from there.
func TestStoreRepairs(t *testing.T) {
	conf := t.TempDir()
	write(t, conf, "version: 1\nmode: enforce\n")
	c, err := config.Load(conf)
	if err != nil {
		t.Fatal(err)
	}
	var node, nothing imagetest.Image
	plain, healthy, inner := node.Manifest("plain", digest.SHA256), node.Manifest("healthy", digest.SHA256), node.Manifest("inner", digest.SHA256)
	index := node.Index(inner)
	config := func(d ocispec.Descriptor) digest.Digest {
		var m ocispec.Manifest
		if err := json.Unmarshal(node.Content[d.Digest], &m); err != nil {
			t.Fatal(err)
		}
		return m.Config.Digest
	}
	sign := func(d ocispec.Descriptor) notarytest.Artifact {
		return notarytest.Manifest(notarytest.MustSign(imagetest.World().Signer, d, notarytest.SignOptions{}), notary.MediaTypeJWS, d, notarytest.ArtifactType)
	}
	ofPlain, ofHealthy, ofIndex := sign(plain), sign(healthy), sign(index)
	imported := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("made by the runtime"), Size: 19}
	questions := map[string]func(*keeping) verify.Question{
		"plain":       func(k *keeping) verify.Question { return k.question("team/app", plain, plain, config(plain)) },
		"healthy":     func(k *keeping) verify.Question { return k.question("team/app", healthy, healthy, config(healthy)) },
		"by manifest": func(k *keeping) verify.Question { return k.question("team/app", inner, inner, config(inner)) },
		"imported":    func(k *keeping) verify.Question { return k.question("team/app", imported, imported, config(inner)) },
	}
	whole := t.TempDir()
	k := keep(t, whole, c, time.Now, &node, 0)
	for _, of := range []struct {
		Target, manifest ocispec.Descriptor
		notarytest.Artifact
	}{{plain, plain, ofPlain}, {healthy, healthy, ofHealthy}, {index, inner, ofIndex}} {
		k.keeps(of.Target, of.manifest, of.Evidence())
	}
	k.stop()
	live := map[digest.Digest]bool{plain.Digest: true, healthy.Digest: true, inner.Digest: true, index.Digest: true}

	at := func(d digest.Digest) string { return filepath.Join("blobs/sha256", d.Encoded()) }
	kinds := []struct {
		name  string
		file  string
		costs []string // of the questions
		again string   // who has it
	}{
		{name: "envelope", file: at(ofPlain.Envelope.Descriptor.Digest), costs: []string{"plain"}, again: "mirror"},
		{name: "signature manifest", file: at(ofPlain.Manifest.Descriptor.Digest), costs: []string{"plain"}, again: "mirror"},
		{name: "envelope of an index", file: at(ofIndex.Envelope.Descriptor.Digest), costs: []string{"by manifest", "imported"}, again: "mirror"},
		{name: "signature manifest of an index", file: at(ofIndex.Manifest.Descriptor.Digest), costs: []string{"by manifest", "imported"}, again: "mirror"},
		{name: "manifest", file: at(plain.Digest), again: "containerd"},
		{name: "index", file: at(index.Digest), costs: []string{"by manifest", "imported"}, again: "containerd"},
		{name: "manifest that an index lists", file: at(inner.Digest), costs: []string{"imported"}, again: "containerd"},
		{name: "empty config", file: at(ocispec.DescriptorEmptyJSON.Digest), again: "nobody"},
		{name: "index.json", file: ocispec.ImageIndexFile, again: "nobody"},
		{name: "oci-layout", file: ocispec.ImageLayoutFile, again: "nobody"},
	}
	ways := map[string]func([]byte) []byte{
		"zeros":   func(b []byte) []byte { return make([]byte, len(b)) },
		"empty":   func([]byte) []byte { return nil },
		"cut":     func(b []byte) []byte { return b[:len(b)/2] },
		"flipped": func(b []byte) []byte { b = bytes.Clone(b); b[len(b)/2] ^= 1; return b },
	}
	all := slices.Sorted(maps.Keys(questions))
	for _, kind := range kinds {
		for way, damage := range ways {
			for _, running := range []bool{false, true} {
				name := kind.name + ", " + way
				if running {
					name += ", while it runs"
				}
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					dir := copied(t, whole)
					harm := func() {
						path := filepath.Join(dir, "store", kind.file)
						raw, err := os.ReadFile(path)
						if err == nil {
							err = os.WriteFile(path, damage(raw), 0o600)
						}
						if err != nil {
							t.Fatal(err)
						}
					}
					said := func(k *keeping, what string, costs []string) {
						t.Helper()
						for _, q := range all {
							want := verify.Verified
							if slices.Contains(costs, q) {
								want = verify.SourceUnreachable
							}
							if d := k.judge(questions[q](k)); d.Reason != want {
								t.Errorf("%s, %s: %s, want %s: %s", what, q, d.Reason, want, d.Detail)
							}
						}
					}
					if !running {
						harm()
					}
					k := keep(t, dir, c, time.Now, &nothing, 0)
					if running {
						said(k, "before", nil)
						harm()
					}
					for range 3 {
						said(k, "nobody has it", kind.costs)
					}
					k.stop()
					k = keep(t, dir, c, time.Now, &nothing, 0)
					said(k, "after a restart", kind.costs)
					k.stop()

					k = keep(t, dir, c, time.Now, &node, 0)
					k.Retain(maps.Clone(live))
					k.settled()
					if kind.again != "mirror" {
						said(k, "containerd has the image", nil)
					}
					k.refresh("team/app", plain, ofPlain.Evidence())
					k.refresh("team/app", index, ofIndex.Evidence())
					k.Retain(maps.Clone(live))
					k.settled()
					said(k, "the mirror has it", nil)
					k.stop()
					k = keep(t, dir, c, time.Now, &nothing, 0)
					said(k, "in the end", nil)
					k.stop()
				})
			}
		}
	}
}
