package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/nri"
	records "github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
)

// This file puts together what `tidewaiter run` does, in this process.

// engine makes the engine that believes stores.
func engine(stores notarytest.Stores, sources func(verify.Name) []verify.Source) (*verify.Engine, verify.Policy, error) {
	store, err := notary.LoadStore(stores.FS())
	if err != nil {
		return nil, nil, err
	}
	statements := []verify.Statement{notarytest.Statement("all")}
	checker, err := notary.New(statements, store, notary.Options{Now: time.Now})
	if err != nil {
		return nil, nil, err
	}
	rules, _, err := policy.New(statements, verify.Enforce, checker.Require)
	if err != nil {
		return nil, nil, err
	}
	return &verify.Engine{Sources: sources, Checkers: []verify.Checker{checker}, Limits: verify.DefaultLimits, Now: time.Now}, rules, nil
}

// mirrors are the sources of a registry's images.
func mirrors(r *node.Registry) (func(verify.Name) []verify.Source, error) {
	u, err := url.Parse(r.URL())
	if err != nil {
		return nil, err
	}
	s := []verify.Source{registry.New(registry.Mirror{Host: r.Host, URL: u})}
	return func(verify.Name) []verify.Source { return s }, nil
}

// A memory is a containerd with one image and one container.
type memory struct {
	target ocispec.Descriptor
	blobs  map[digest.Digest][]byte
	chain  string
	config digest.Digest
}

func (m *memory) Image(context.Context, string) (ocispec.Descriptor, error) { return m.target, nil }
func (m *memory) Images(context.Context) ([]records.Record, error) {
	return []records.Record{{Name: "registry.example/app:1", Target: m.target}}, nil
}
func (m *memory) Blob(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return m.blobs[d.Digest], nil
}
func (m *memory) Pulled(context.Context, digest.Digest) (bool, error) { return true, nil }
func (m *memory) Snapshot(context.Context, string, string) (records.Snapshot, error) {
	return records.Snapshot{Parent: m.chain}, nil
}
func (m *memory) Snapshotters(context.Context) ([]string, error) { return []string{"overlayfs"}, nil }
func (m *memory) SandboxRuntime(context.Context, string) (string, error) {
	return "io.containerd.runc.v2", nil
}
func (m *memory) ContainerConfig(context.Context, string) (digest.Digest, error) {
	return m.config, nil
}

func (m *memory) add(mediaType string, v any) ocispec.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	m.blobs[d.Digest] = b
	return d
}

// signed is a source that holds one signature.
type signed struct{ evidence verify.Evidence }

func (signed) Name() string { return "memory" }
func (s signed) Find(_ context.Context, _ verify.Name, _ ocispec.Descriptor, _ *verify.Budget, yield func(verify.Evidence) bool) error {
	yield(s.evidence)
	return nil
}

// local makes the gate's own part of a warm decision, with containerd and the
// registry in memory: it decides on a container whose image has been verified.
// told says that the runtime tells the image, as containerd 2.4 does.
func local(told bool) (decide func() error, end func(), err error) {
	m := &memory{blobs: map[digest.Digest][]byte{}}
	layers := []digest.Digest{digest.FromString("layer")}
	config := m.add(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: layers},
	})
	m.target = m.add(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: layers[0], Size: 5}},
	})
	m.chain, m.config = identity.ChainID(layers).String(), config.Digest

	ca := notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
	envelope, err := notarytest.Sign(ca.Leaf(notarytest.CertOptions{}), m.target, notarytest.SignOptions{})
	if err != nil {
		return nil, nil, err
	}
	source := signed{notarytest.Manifest(envelope, notary.MediaTypeJWS, m.target, notarytest.ArtifactType).Evidence()}
	e, rules, err := engine(notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, func(verify.Name) []verify.Source { return []verify.Source{source} })
	if err != nil {
		return nil, nil, err
	}
	c := cache.New(e, cache.Options{Now: time.Now})
	decider := &verify.Decider{}
	decider.Swap(&verify.Snapshot{Policy: rules, Evaluator: c, Wait: time.Second})
	resolver := records.NewResolver(m, records.Options{ParseName: policy.ParseName, ParseRecord: policy.Record, Now: time.Now})
	resolver.Connected(!told)
	g := &nri.Gate{Resolver: resolver, Verifier: decider, Observe: func(nri.Answer) {}, Now: time.Now, Node: "bench"}

	target, id := m.target.Digest.String(), config.Digest.String()
	if !told {
		target, id = "", ""
	}
	asked := request("c", &node.Pod{ID: "pod", Name: "p", Namespace: "ns"}, "registry.example/app:1", target, id)
	req := &api.ValidateContainerAdjustmentRequest{Pod: asked.Pod, Container: asked.Container}
	decide = func() error { return g.ValidateContainerAdjustment(context.Background(), req) }
	return decide, func() { c.Close() }, decide()
}

// An own is what a warm decision costs in the gate itself.
type own struct {
	allocs, bytes int64
	took          time.Duration
}

func measureOwn(told bool) (own, error) {
	decide, end, err := local(told)
	if err != nil {
		return own{}, fmt.Errorf("in process: %w", err)
	}
	defer end()
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := decide(); err != nil {
				b.Fatal(err)
			}
		}
	})
	return own{r.AllocsPerOp(), r.AllocedBytesPerOp(), time.Duration(r.NsPerOp())}, nil
}
