package offline

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
)

// TestJunkOnce has a mirror list ten thousand signatures that are none, once, and the
// power go. Nothing of that stays: with a mirror that is well again the image starts, and
// then without any.
func TestJunkOnce(t *testing.T) {
	onEach(t, func(s *site) {
		r := s.registry("registry.example", node.RegistryOptions{})
		img, signatures := s.push(r, "app:1", node.ImageOptions{}, signing{by: release})
		index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
		for i := range 10_000 {
			d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: notary.ArtifactType, Digest: digest.FromString(fmt.Sprint(i)), Size: 700}
			index.Manifests = append(index.Manifests, d)
		}
		junk, err := json.Marshal(index)
		s.must(err)
		r.Fault(func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if !strings.Contains(req.URL.Path, "/referrers/") {
					h.ServeHTTP(w, req)
					return
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				_, _ = w.Write(junk)
			})
		})
		s.must(node.WriteConfig(s.config, policy(mirrors(r.Mirror()))))
		s.registered(node.GateOptions{})
		s.denied(img.Name, node.PullIfNotPresent, append(refusals, verify.LimitExceeded, verify.SignatureInvalid)...)
		s.cut()
		r.Fault(nil)
		s.boot(img, node.GateOptions{})
		s.kept(signatures...)
		s.cut()
		s.network(false)
		s.boot(img, node.GateOptions{})
		s.sound()
	})
}

// TestPoisonedTag has a mirror deny that it has a Referrers API, and serve an index by
// tag of what is not a signature by whom the policy trusts.
func TestPoisonedTag(t *testing.T) {
	onEach(t, func(s *site) {
		r := s.registry("tags.example", node.RegistryOptions{NoReferrers: true})
		poisoned, _ := s.push(r, "app:poisoned", node.ImageOptions{})
		foreign := artifact(poisoned, signing{by: stranger})
		s.must(r.Attach(s.ctx, poisoned, foreign, node.AttachOptions{}))
		other, _ := s.push(r, "app:other", node.ImageOptions{})
		good := artifact(other, signing{by: release})
		s.must(r.Attach(s.ctx, other, good, node.AttachOptions{}))
		// The good signature of another image is listed as one of this.
		tag := strings.Replace(poisoned.Target.Digest.String(), ":", "-", 1)
		raw, err := json.Marshal(ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
			Manifests: []ocispec.Descriptor{foreign.Manifest.Descriptor, good.Manifest.Descriptor, other.Target},
		})
		s.must(err)
		s.must(r.PutManifest(s.ctx, "app", tag, ocispec.MediaTypeImageIndex, raw))
		s.must(node.WriteConfig(s.config, policy(mirrors(r.Mirror()))))
		s.registered(node.GateOptions{})
		s.denied(poisoned.Name, node.PullIfNotPresent, append(refusals, verify.SignatureInvalid)...)
		s.allowed(other, node.PullIfNotPresent)
		// With the good one among them it is found.
		s.sign(r, poisoned, signing{by: release})
		s.stop()
		s.registered(node.GateOptions{})
		s.allowed(poisoned, node.PullIfNotPresent)
	})
}

// TestRolledBack puts the state directory back to what it was before an image was
// verified, and then deletes it: that costs what was verified since, and gives nothing.
func TestRolledBack(t *testing.T) {
	onEach(t, func(s *site) {
		r := s.registry("registry.example", node.RegistryOptions{})
		first, _ := s.push(r, "app:first", node.ImageOptions{}, signing{by: release})
		second, _ := s.push(r, "app:second", node.ImageOptions{}, signing{by: release})
		bare, _ := s.push(r, "app:bare", node.ImageOptions{})
		s.must(node.WriteConfig(s.config, policy(mirrors(r.Mirror()))))
		s.registered(node.GateOptions{})
		s.allowed(first, node.PullIfNotPresent)
		s.settled(first)
		s.stop()
		was := filepath.Join(s.TempDir(), "was")
		s.must(exec.CommandContext(s.ctx, "cp", "-a", s.disk.Dir, was).Run())
		s.registered(node.GateOptions{})
		s.allowed(second, node.PullIfNotPresent)
		s.denied(bare.Name, node.PullIfNotPresent, verify.SignatureMissing)
		s.settled(second)
		s.stop()
		s.network(false)
		empty := func() {
			entries, err := os.ReadDir(s.disk.Dir)
			s.must(err)
			for _, e := range entries {
				if e.Name() != "lost+found" {
					s.must(os.RemoveAll(filepath.Join(s.disk.Dir, e.Name())))
				}
			}
		}
		empty()
		s.must(exec.CommandContext(s.ctx, "cp", "-a", was+"/store", s.disk.Dir).Run())
		s.registered(node.GateOptions{})
		s.allowed(first, node.PullNever)
		for _, img := range []*node.Image{second, bare} {
			s.denied(img.Name, node.PullNever, verify.SourceUnreachable)
		}
		s.stop()
		empty()
		s.registered(node.GateOptions{})
		for _, img := range []*node.Image{first, second, bare} {
			s.denied(img.Name, node.PullNever, verify.SourceUnreachable)
		}
	})
}
