package node

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Who imports an image from an archive learns why its signature is not found.
func TestExplain(t *testing.T) {
	rec := newRecords()
	r := NewResolver(rec, testOptions())
	base := rec.image("app", "app")
	of := func(mediaType, layer string) ocispec.Descriptor {
		return rec.put(mediaType, ocispec.Manifest{MediaType: mediaType,
			Config: ocispec.Descriptor{MediaType: images.MediaTypeDockerSchema2Config, Digest: base.config.Digest, Size: base.config.Size},
			Layers: []ocispec.Descriptor{{MediaType: layer, Digest: digest.FromString(layer), Size: 3}}})
	}
	imported := of(images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2Layer)
	pulled := of(images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2LayerGzip)
	answer := verify.Deny(verify.SignatureMissing, "nothing found")
	v := r.Explain(&ledger{answer: func(verify.Image) verify.Decision { return answer }})
	ask := func(target ocispec.Descriptor) string {
		t.Helper()
		img := r.ahead(t.Context(), verify.Name{Host: "r.example", Path: "app"}, Record{"r.example/app", target})
		if img.Fault != nil {
			t.Fatal(img.Fault)
		}
		d := v.Verify(t.Context(), img)
		if d.Allowed() || d.Reason != answer.Reason {
			t.Errorf("the answer was changed: %v %s", d.Allowed(), d.Reason)
		}
		return d.Detail
	}
	if s := ask(imported); !strings.Contains(s, "tidewaiter bundle create") || !strings.HasSuffix(s, "; nothing found") {
		t.Errorf("imported: %s", s)
	}
	for _, d := range []ocispec.Descriptor{pulled, base.manifest} {
		if s := ask(d); s != "nothing found" {
			t.Errorf("%s: %s", d.MediaType, s)
		}
	}
	if d := v.Verify(t.Context(), verify.Image{}); d.Detail != "nothing found" {
		t.Errorf("an image that is not known: %s", d.Detail)
	}
	answer = verify.Deny(verify.SignerUntrusted, "another")
	if s := ask(imported); s != "another" {
		t.Errorf("another reason: %s", s)
	}
}
