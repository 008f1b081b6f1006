package inspect

import (
	"context"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
)

// A importer is a store, and a source beside it, that notes what it is given.
type importer struct {
	ev   []verify.Evidence
	kept int
}

func (s *importer) Name() string { return "shelf" }

func (s *importer) Find(_ context.Context, _ verify.Name, _ ocispec.Descriptor, _ *verify.Budget, yield func(verify.Evidence) bool) error {
	for _, ev := range s.ev {
		if !yield(ev) {
			break
		}
	}
	return nil
}

func (s *importer) Keep(verify.Image, ocispec.Descriptor, verify.Evidence) { s.kept++ }

func (s *importer) Parents(context.Context, digest.Digest, *verify.Budget, func(digest.Digest, []byte) bool) error {
	return nil
}

// yes is a checker to which everything is a signature.
type yes struct{}

func (yes) Kind() verify.Kind       { return notary.Kind }
func (yes) Anchors(string) []string { return nil }

func (yes) Check(_ context.Context, _ verify.Evidence, want ocispec.Descriptor, _ string) verify.Finding {
	return verify.Finding{Reason: verify.Verified, Signed: want.Digest}
}

// Who asks changes nothing: what is found is shown and not kept.
func TestLookingKeepsNothing(t *testing.T) {
	store, mirror := &importer{}, &importer{ev: []verify.Evidence{{Manifest: ocispec.Descriptor{Digest: "sha256:a"}}}}
	engine := &verify.Engine{Store: store, Sources: func(verify.Name) []verify.Source { return []verify.Source{mirror} }, Checkers: []verify.Checker{yes{}}, Now: time.Now}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("app"), Size: 3}
	by, err := verify.SignedBy(verify.Leaf{Kind: notary.Name, Authority: "prod", Hash: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	q := verify.Question{
		Image: verify.Image{Name: verify.Name{Host: "h", Path: "p"}, Target: d, Manifest: d, Config: "c", Use: verify.UsePrefetch, Binding: verify.BoundRecord},
		Rule:  &verify.Rule{Name: "prod", Require: by},
	}
	if got := engine.Evaluate(t.Context(), q); !got.Allowed() || store.kept != 1 {
		t.Fatalf("%s, kept %d", got.Reason, store.kept)
	}
	got := signatures(t.Context(), Active{Config: &config.Config{}, Engine: engine}, q)
	if len(got) != 1 || got[0].Reason != verify.Verified.String() || got[0].Source != "shelf" {
		t.Errorf("%+v", got)
	}
	if store.kept != 1 {
		t.Error("it was kept")
	}
}
