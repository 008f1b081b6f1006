package inspect

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
)

// FuzzClaim feeds manifests of signatures that anybody may have written. What is
// taken from one is about the digest that was asked for, and an image.
func FuzzClaim(f *testing.F) {
	asked := digest.FromString("image")
	f.Add([]byte(`{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + asked.String() + `","size":7}}`))
	f.Add([]byte(`{"subject":{"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json","digest":"` + asked.String() + `","size":7},"Subject":{"size":-1}}`))
	f.Add([]byte(`{"subject":{"mediaType":"application/pdf","digest":"` + asked.String() + `","size":7}}`))
	f.Add([]byte(`{"subject":null}`))
	for _, img := range imagetest.World().Images {
		for _, s := range img.Signed {
			f.Add(s.Manifest.Content)
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, ok := claim(raw, asked)
		if !ok && d.Digest != "" {
			t.Errorf("a descriptor without a yes: %v", d)
		}
		if ok && (d.Digest != asked || d.Size < 0 || !strings.Contains(d.MediaType, "manifest") && !strings.Contains(d.MediaType, "index")) {
			t.Errorf("took %v", d)
		}
	})
}

func TestClaim(t *testing.T) {
	s := imagetest.World().Images["signed"].Signed[0]
	if d, ok := claim(s.Manifest.Content, s.Subject.Digest); !ok || d.MediaType != s.Subject.MediaType || d.Size != s.Subject.Size {
		t.Errorf("a true one: %v, %v", d, ok)
	}
	for name, raw := range map[string]string{
		"another digest":   `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:00","size":7}}`,
		"no image":         `{"subject":{"mediaType":"application/pdf","digest":"` + s.Subject.Digest.String() + `","size":7}}`,
		"a negative size":  `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + s.Subject.Digest.String() + `","size":-1}}`,
		"a fraction":       `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + s.Subject.Digest.String() + `","size":1.5}}`,
		"no subject":       `{}`,
		"something else":   `[]`,
		"nothing whatever": ``,
	} {
		if d, ok := claim([]byte(raw), s.Subject.Digest); ok {
			t.Errorf("%s: took %v", name, d)
		}
	}
}

func TestUnique(t *testing.T) {
	a := ocispec.Descriptor{MediaType: "a", Digest: "sha256:a", Size: 1}
	b := a
	b.Size = 2
	if u := unique([]ocispec.Descriptor{a, b, a, b, b}); len(u) != 2 || u[0].Size != 1 || u[1].Size != 2 {
		t.Errorf("unique: %v", u)
	}
}
