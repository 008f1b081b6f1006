package notary

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

func desc(s string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(s), Size: int64(len(s))}
}

// opened is the one blob that Kind.Open returns.
func opened(raw []byte, subject ocispec.Descriptor) (ocispec.Descriptor, error) {
	list, err := Kind.Open(raw, subject)
	if err != nil || len(list) != 1 {
		return ocispec.Descriptor{}, errors.Join(err, fmt.Errorf("%d blobs", len(list)))
	}
	return list[0], nil
}

func TestKindOpen(t *testing.T) {
	subject := desc("subject")
	layer := ocispec.Descriptor{MediaType: MediaTypeCOSE, Digest: digest.FromString("envelope"), Size: 12, Annotations: map[string]string{"a": "b"}}
	proper := func() ocispec.Manifest {
		m := ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactType,
			Config: ocispec.DescriptorEmptyJSON, Subject: &subject, Layers: []ocispec.Descriptor{layer},
		}
		m.SchemaVersion = 2
		return m
	}
	for _, tt := range []struct {
		name   string
		change func(*ocispec.Manifest)
		want   string // part of the error; empty: none
	}{
		{"proper", func(*ocispec.Manifest) {}, ""},
		{"older style", func(m *ocispec.Manifest) { m.ArtifactType, m.Config.MediaType = "", ArtifactType }, ""},
		{"both", func(m *ocispec.Manifest) { m.Config.MediaType = ArtifactType }, ""},
		{"annotated subject", func(m *ocispec.Manifest) { s := subject; s.Annotations = map[string]string{"a": "b"}; m.Subject = &s }, ""},
		{"index", func(m *ocispec.Manifest) { m.MediaType = ocispec.MediaTypeImageIndex }, "media type"},
		{"no media type", func(m *ocispec.Manifest) { m.MediaType = "" }, "media type"},
		{"cosign", func(m *ocispec.Manifest) { m.ArtifactType = "application/vnd.dev.cosign.artifact.sig.v1+json" }, "not a notary signature"},
		{"another type with a signature's config", func(m *ocispec.Manifest) { m.ArtifactType, m.Config.MediaType = "x", ArtifactType }, "not a notary signature"},
		{"no type", func(m *ocispec.Manifest) { m.ArtifactType = "" }, "not a notary signature"},
		{"no subject", func(m *ocispec.Manifest) { m.Subject = nil }, "subject"},
		{"subject of another digest", func(m *ocispec.Manifest) { s := desc("subjecT"); m.Subject = &s }, "subject"},
		{"subject of another size", func(m *ocispec.Manifest) { s := subject; s.Size++; m.Subject = &s }, "subject"},
		{"subject of another type", func(m *ocispec.Manifest) { s := subject; s.MediaType = "x"; m.Subject = &s }, "subject"},
		{"no layer", func(m *ocispec.Manifest) { m.Layers = nil }, "0 layers"},
		{"two layers", func(m *ocispec.Manifest) { m.Layers = append(m.Layers, layer) }, "2 layers"},
		{"no digest", func(m *ocispec.Manifest) { m.Layers[0].Digest = "" }, "digest"},
		{"a path as digest", func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../etc/passwd" }, "digest"},
		{"empty envelope", func(m *ocispec.Manifest) { m.Layers[0].Size = 0 }, ""},
		{"negative size", func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }, "size -1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := proper()
			tt.change(&m)
			raw, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			got, err := opened(raw, subject)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || got.Digest != "" {
					t.Errorf("envelope is %v, error %v, want one about %q", got.Digest, err, tt.want)
				}
				return
			}
			if err != nil || got.Digest != layer.Digest || got.Size != m.Layers[0].Size || got.MediaType != MediaTypeCOSE || got.Annotations != nil {
				t.Errorf("envelope is %+v, error %v", got, err)
			}
		})
	}
	// A decoder that meets another type than it wants goes on, and says so at the end.
	m := proper()
	m.Annotations = map[string]string{"a": "b"}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := opened([]byte(strings.Replace(string(raw), `{"a":"b"}}`, "7}", 1)), subject); err == nil || !strings.Contains(err.Error(), "annotations") {
		t.Errorf("annotations that are a number: %v", err)
	}
	for _, raw := range []string{"", "null", "{}", "[]", "junk", `{"layers":{}}`, strings.Repeat("[", 200_000), `{"subject":null,"layers":[{}]}`} {
		if d, err := opened([]byte(raw), subject); err == nil || d.Digest != "" {
			t.Errorf("%.20q is a signature manifest", raw)
		}
	}
}

// TestSignatureSize: a longer manifest is refused by its length, and that leaves
// nothing open.
func TestSignatureSize(t *testing.T) {
	subject := desc("subject")
	raw := func(n int) []byte {
		head := `{"mediaType":"` + ocispec.MediaTypeImageManifest + `","artifactType":"` + ArtifactType + `","subject":{"mediaType":"` + subject.MediaType +
			`","digest":"` + subject.Digest.String() + fmt.Sprintf(`","size":%d},"layers":[{"digest":%q}],"annotations":{"a":"`, subject.Size, digest.FromString("x"))
		return []byte(head + strings.Repeat(",", n-len(head)-3) + `"}}`)
	}
	if _, err := opened(raw(oci.MaxSignature), subject); err != nil {
		t.Errorf("as long as it may be: %v", err)
	}
	if _, err := opened(raw(oci.MaxSignature+1), subject); err == nil || errors.Is(err, evidence.ErrBudget) || !strings.Contains(err.Error(), "65537 bytes, limit 65536") {
		t.Errorf("a byte more: %v", err)
	}
}

func FuzzKindOpen(f *testing.F) {
	subject := desc("subject")
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.cncf.notary.signature",` +
		`"subject":{"mediaType":"` + subject.MediaType + `","digest":"` + subject.Digest.String() + `","size":7},` +
		`"layers":[{"mediaType":"application/cose","digest":"` + digest.FromString("x").String() + `","size":1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := opened(raw, subject)
		if err != nil && (d.Digest != "" || d.Size != 0) {
			t.Error("an envelope comes with an error")
		}
		if err == nil && (d.Digest.Validate() != nil || d.Size < 0) {
			t.Errorf("the envelope is %+v", d)
		}
	})
}
