package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestAirGap has images on the node, signatures on a stick, and no network.
func TestAirGap(t *testing.T) {
	each(t, func(s *scene) {
		stick := t.TempDir()
		stored := func(word string, by *notarytest.Signer) *node.Image {
			img := s.push(s.reg, "app:"+word, node.ImageOptions{Word: word, Index: true, Decoys: decoys})
			s.pull(img.Name)
			if by != nil {
				env := notarytest.MustSign(by, img.Target, notarytest.SignOptions{})
				s.store(stick, notarytest.Manifest(env, notary.MediaTypeJWS, img.Target, 0))
			}
			return img
		}
		good, foreign, bare := stored("stick", release), stored("stick-foreign", stranger), stored("stick-bare", nil)
		s.must(s.reg.Stop())
		defer func() { s.must(s.reg.Start()) }()

		c := s.policy()
		c.More = map[string]any{"sources": map[string]any{"layouts": []string{stick}, "mirrors": c.Mirrors}}
		c.Mirrors = nil
		s.configure(c)
		s.start()
		s.allowed(good.Name, "stick", node.ContainerOptions{})
		s.allowed(good.Pinned(), "stick", node.ContainerOptions{})
		// The stick alone does not know all signatures that there are.
		s.denied(bare.Name, verify.SourceUnreachable, node.ContainerOptions{})
		s.denied(foreign.Name, verify.SourceUnreachable, node.ContainerOptions{})
		s.must(s.reg.Start())
		s.denied(bare.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.denied(foreign.Name, verify.SignerUntrusted, node.ContainerOptions{})

		// Without power, and without the stick: what is on the node is not believed.
		s.must(s.reg.Stop())
		s.must(os.Rename(stick, stick+"-gone"))
		s.allowed(good.Name, "stick", node.ContainerOptions{})
		s.must(s.gate.Stop())
		s.start()
		s.denied(good.Name, verify.SourceUnreachable, node.ContainerOptions{})
		s.must(os.Rename(stick+"-gone", stick))
		s.allowed(good.Name, "stick", node.ContainerOptions{})
	})
}

// store adds a signature to an OCI image layout.
func (s *scene) store(dir string, a notarytest.Artifact) {
	s.Helper()
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	if b, err := os.ReadFile(filepath.Join(dir, "index.json")); err == nil {
		s.must(json.Unmarshal(b, &index))
	}
	index.Manifests = append(index.Manifests, a.Manifest.Descriptor)
	b, err := json.Marshal(index)
	s.must(err)
	files := map[string][]byte{"index.json": b, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	for _, blob := range []notarytest.Blob{a.Manifest, a.Config, a.Envelope} {
		files[filepath.Join("blobs/sha256", blob.Descriptor.Digest.Encoded())] = blob.Content
	}
	for name, content := range files {
		s.must(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		s.must(os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
}

// TestChangedDisk changes the configuration of a signed image in the content store
// while the power is off. containerd itself does not notice and would run it.
func TestChangedDisk(t *testing.T) {
	each(t, func(s *scene) {
		img := s.signed("app:disk", "disk-good")
		other := s.signed("app:disk-other", "other")
		s.configure(s.policy())
		s.start()
		s.allowed(img.Name, "disk-good", node.ContainerOptions{})
		s.pull(other.Name)

		s.must(s.gate.Stop())
		s.must(s.StopContainerd(syscall.SIGTERM))
		file := filepath.Join(s.Dir, "root/io.containerd.content.v1.content/blobs/sha256", img.Config.Digest.Encoded())
		was, err := os.ReadFile(file)
		s.must(err)
		changed := bytes.ReplaceAll(was, []byte("disk-good"), []byte("disk-evil"))
		if bytes.Equal(was, changed) {
			s.Fatalf("%s does not hold the word", file)
		}
		put := func(content []byte) {
			s.Helper()
			s.must(os.Chmod(file, 0o644))
			s.must(os.WriteFile(file, content, 0o444))
		}
		put(changed)
		defer put(was)
		s.must(s.StartContainerd(s.ctx))
		s.start()
		line := s.denied(img.Name, verify.ImageMismatch, node.ContainerOptions{Pull: node.PullNever})
		if !strings.Contains(line, img.Config.Digest.String()) || !strings.Contains(line, "the disk was changed or is failing") {
			s.Error(line)
		}
		s.allowed(other.Name, "other", node.ContainerOptions{})

		// Without the gate it does run: the case above is one.
		s.must(s.gate.Stop())
		s.must(s.Require(s.ctx, false))
		s.allowed(img.Name, "disk-evil", node.ContainerOptions{Pull: node.PullNever})
		s.must(s.Require(s.ctx, true))
	})
}
