package registry_test

import (
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// TestOthers: what a source notes of an image that only cosign has signed.
func TestOthers(t *testing.T) {
	t.Parallel()
	const bundle, empty = "application/vnd.dev.sigstore.bundle.v0.3+json", ocispec.MediaTypeEmptyJSON
	content := map[string]string{"dev.sigstore.bundle.content": "dsse-envelope", "dev.sigstore.bundle.predicateType": "<b>hostile</b>"}
	type entry struct {
		listed      string // artifact type in the list
		is          string // artifact type of the manifest
		annotations map[string]string
	}
	for name, tt := range map[string]struct {
		entries []entry
		tag     bool
		noAPI   bool
		want    string
	}{
		"nothing":                          {},
		"an SBOM":                          {entries: []entry{{listed: "application/spdx+json"}}},
		"an SBOM, listed as its config":    {entries: []entry{{listed: empty, is: "application/spdx+json"}}},
		"a bundle":                         {entries: []entry{{listed: bundle}}, want: "a sigstore bundle is there"},
		"no API":                           {entries: []entry{{listed: bundle}}, noAPI: true, want: "a sigstore bundle is there"},
		"a tag":                            {tag: true, want: "a cosign tag is there"},
		"no API and no list":               {noAPI: true, tag: true, want: "a cosign tag is there"},
		"listed as its config":             {entries: []entry{{listed: empty, is: bundle, annotations: content}}, want: "a sigstore bundle is there"},
		"as its config, no annotations":    {entries: []entry{{listed: empty, is: bundle}}, want: "a sigstore bundle is there"},
		"bundles and a tag":                {entries: []entry{{listed: bundle}, {listed: "application/spdx+json"}, {listed: bundle}, {listed: bundle}}, tag: true, want: "3 sigstore bundles and a cosign tag are there"},
		"cosign 2 in OCI mode":             {entries: []entry{{listed: "application/vnd.dev.cosign.artifact.sig.v1+json"}}, tag: true, want: "a cosign signature and a cosign tag are there"},
		"a bundle, a signature, and a tag": {entries: []entry{{listed: bundle}, {listed: "application/vnd.dev.cosign.artifact.sig.v1+json"}}, tag: true, want: "a sigstore bundle, a cosign signature and a cosign tag are there"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := &sourcetest.Registry{Repository: sourcetest.Name.Path, Tags: map[string]digest.Digest{}, NoAPI: tt.noAPI}
			subject := reg.Content.Image("app")
			for i, e := range tt.entries {
				d := reg.Content.Add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"mediaType":%q,"artifactType":%q,"config":{},"layers":[],"x":%d}`, ocispec.MediaTypeImageManifest, e.is, i))
				d.ArtifactType, d.Annotations = e.listed, e.annotations
				reg.Content.List(subject, d)
			}
			if tt.tag {
				reg.Tags[subject.Digest.Algorithm().String()+"-"+subject.Digest.Encoded()+".sig"] = reg.Content.Image("signature").Digest
			}
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, reg), Client: client(t, nil)})
			b := verify.NewBudget(sourcetest.Kind, verify.Limits{})
			err := src.Find(t.Context(), sourcetest.Name, subject, b, func(verify.Evidence) bool {
				t.Error("it is a signature")
				return true
			})
			if holds := src.Holds(t.Context(), sourcetest.Name, subject, err == nil, b); holds != nil {
				t.Error(holds)
			}
			if got := b.Others.String(); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if n := len(reg.Requests()); n > 7 {
				t.Errorf("%d requests: %v", n, reg.Requests())
			}
		})
	}
}
