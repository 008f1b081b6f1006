package oci

import (
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestMediaTypeOf(t *testing.T) {
	const image, index = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, tt := range []struct{ raw, listed, want string }{ // want empty: ambiguous
		{raw: `{"layers":[],"config":{}}`, listed: "", want: image},
		{raw: `{"layers":[]}`, listed: "", want: image},
		{raw: `{"config":{}}`, listed: "", want: image},
		{raw: `{"manifests":[]}`, listed: "", want: index},
		{raw: `{"layers":[]}`, listed: image, want: image},
		{raw: `{"layers":[]}`, listed: DockerManifest, want: DockerManifest},
		{raw: `{"manifests":[]}`, listed: DockerList, want: DockerList},
		{raw: `{"layers":[],"mediaType":"` + image + `"}`, listed: "", want: image},
		{raw: `{"manifests":[],"mediaType":"` + index + `"}`, listed: index, want: index},
		{raw: `{"layers":[]}`, listed: index, want: ""},
		{raw: `{"manifests":[]}`, listed: image, want: ""},
		{raw: `{"layers":[],"mediaType":"` + image + `"}`, listed: DockerManifest, want: ""},
		{raw: `{"layers":[],"mediaType":"` + index + `"}`, listed: "", want: ""},
		{raw: `{"layers":[],"mediaType":"` + index + `"}`, listed: index, want: ""},
		{raw: `{"manifests":[],"mediaType":"` + image + `"}`, listed: image, want: ""},
		{raw: `{"layers":[],"mediaType":"text/plain"}`, listed: "", want: ""},
		{raw: `{"layers":[]}`, listed: "text/plain", want: ""},
		{raw: `{"layers":[],"manifests":[]}`, listed: "", want: ""},
		{raw: `{"config":{},"manifests":[]}`, listed: index, want: ""},
		{raw: `{"layers":null,"manifests":[]}`, listed: index, want: ""},
		{raw: `{"layers":[],"manifests":null}`, listed: image, want: ""},
		{raw: `{"LAYERS":[],"manifests":[]}`, listed: index, want: ""}, // decoders that fold case would read it otherwise
		{raw: `{}`, listed: image, want: ""},
		{raw: `null`, listed: image, want: ""},
		{raw: `[]`, listed: index, want: ""},
		{raw: ``, listed: "", want: ""},
		{raw: `{"layers":[]} x`, listed: "", want: ""},
		{raw: `{"layers":[],"mediaType":7}`, listed: "", want: ""},
	} {
		got, err := MediaTypeOf([]byte(tt.raw), tt.listed)
		if got != tt.want || (err == nil) != (tt.want != "") || err != nil && !errors.Is(err, ErrAmbiguous) {
			t.Errorf("%s, listed as %q: %q, %v; want %q", tt.raw, tt.listed, got, err, tt.want)
		}
	}
}

// TestParent: a document counts as the parent of what it names exactly, if it is what its
// digest says.
func TestParent(t *testing.T) {
	child := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d1, Size: 7}
	config := ocispec.Descriptor{Digest: d1}
	index := `{"manifests":[` + entry("") + `]}`
	manifest := func(mediaType string) string {
		return `{"config":{"mediaType":"` + mediaType + `","digest":"` + d1 + `","size":7},"layers":[]}`
	}
	for _, tt := range []struct {
		name, raw string
		child     ocispec.Descriptor
		want      string // media type of the parent; empty: it is none
	}{
		{name: "index", raw: index, child: child, want: ocispec.MediaTypeImageIndex},
		{name: "another size", raw: index, child: ocispec.Descriptor{MediaType: child.MediaType, Digest: d1, Size: 8}},
		{name: "another type", raw: index, child: ocispec.Descriptor{MediaType: DockerManifest, Digest: d1, Size: 7}},
		{name: "config", raw: manifest(ocispec.MediaTypeImageConfig), child: config, want: ocispec.MediaTypeImageManifest},
		{name: "Docker's config", raw: manifest(DockerConfig), child: config, want: ocispec.MediaTypeImageManifest},
		{name: "config of another type", raw: manifest("application/x"), child: config},
		{name: "config as if listed", raw: manifest(ocispec.MediaTypeImageConfig), child: child},
		{name: "listed as if config", raw: index, child: config},
		{name: "no child", raw: index},
		{name: "ambiguous", raw: `{"layers":[],"manifests":[` + entry("") + `]}`, child: child},
		{name: "unread", raw: `{"manifests":[` + entry("") + `,7]}`, child: child},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := digest.FromString(tt.raw)
			got, ok := Parent(d, []byte(tt.raw), tt.child)
			want := ocispec.Descriptor{}
			if tt.want != "" {
				want = ocispec.Descriptor{MediaType: tt.want, Digest: d, Size: int64(len(tt.raw))}
			}
			if ok != (tt.want != "") || got.MediaType != want.MediaType || got.Digest != want.Digest || got.Size != want.Size {
				t.Errorf("%+v, %v; want %+v", got, ok, want)
			}
			if _, ok := Parent(d, []byte(tt.raw+" "), tt.child); ok {
				t.Error("a document that is not what its digest says is a parent")
			}
		})
	}
}
