package offline

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestStart starts a gate that has 20 certificates in its trust stores and 500
// signatures in its store, without a network, and prints how long it takes until it is
// registered and until the first container runs. docs/performance.md has the target.
func TestStart(t *testing.T) {
	const certificates, signatures = 20, 500
	onEach(t, func(s *site) {
		good, _ := s.fromTar("start.example")
		store := filepath.Join(s.disk.Dir, "store")
		s.store(store, artifact(good[0], signing{by: release}))
		for i := range signatures - 1 {
			manifest, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Annotations: map[string]string{"n": fmt.Sprint(i)}})
			s.must(err)
			subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
			a := artifact(&node.Image{Target: subject}, signing{by: release, cose: i%2 == 0})
			for _, b := range []notarytest.Blob{a.Manifest, a.Envelope, {Descriptor: subject, Content: manifest}} {
				s.must(os.WriteFile(filepath.Join(store, "blobs/sha256", b.Descriptor.Digest.Encoded()), b.Content, 0o600))
			}
		}
		c := policy(map[string]any{"network": "never"})
		for i := 1; i < certificates; i++ {
			c.Stores[fmt.Sprintf("ca/acme/other-%d.crt", i)] = notarytest.NewCA(notarytest.CAOptions{}).PEM()
		}
		s.must(node.WriteConfig(s.config, c))

		var registered, first []time.Duration
		for range 7 {
			s.must(s.RemovePods(s.ctx))
			s.must(s.StopContainerd(9))
			began := time.Now()
			first = append(first, s.boot(good[0], node.GateOptions{}))
			ctx, cancel := s.within()
			l, err := s.gate.Wait(ctx, 0, node.Registered)
			cancel()
			s.must(err)
			for _, starting := range s.gate.Lines() {
				if starting.Msg == "starting" && starting.Time.After(began) {
					registered = append(registered, l.Time.Sub(starting.Time))
				}
			}
			s.stop()
		}
		slices.Sort(registered)
		slices.Sort(first)
		s.Logf("%d certificates, %d signatures, medians of %d: registered %v after the first line of the log, the first container ran %v after the start of the process",
			certificates, signatures, len(first), registered[len(registered)/2].Round(time.Millisecond), first[len(first)/2].Round(time.Millisecond))
	})
}
