package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestReasonOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want Reason
	}{
		{ErrUnreachable, SourceUnreachable},
		{ErrUnauthorized, SourceUnauthorized},
		{ErrNoReferrers, SourceNoReferrers},
		{ErrBudget, BudgetExceeded},
		{fmt.Errorf("mirror: %w", ErrUnauthorized), SourceUnauthorized},
		{errors.Join(ErrUnreachable, ErrBudget), BudgetExceeded},
		{context.DeadlineExceeded, SourceUnreachable},
		{errors.New("anything else"), SourceUnreachable},
	} {
		if got := reasonOf(tt.err); got != tt.want {
			t.Errorf("%v is %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestLimitsOr(t *testing.T) {
	if got := (Limits{}).Or(DefaultLimits); got != DefaultLimits {
		t.Errorf("zero limits are %+v", got)
	}
	one := Limits{1, 2, 3, 4, 5, 6, 7, 8}
	if got := one.Or(DefaultLimits); got != one {
		t.Errorf("set limits became %+v", got)
	}
	want := DefaultLimits
	want.Pages, want.Wall = 1, time.Second
	if got := (Limits{Pages: 1, Wall: time.Second}).Or(DefaultLimits); got != want {
		t.Errorf("limits are %+v, want %+v", got, want)
	}
}

func TestBudgetCounts(t *testing.T) {
	b := NewBudget(Limits{Pages: 1, Referrers: 2, Signatures: 3})
	for name, tt := range map[string]struct {
		take func() error
		n    int
	}{
		"pages":      {b.Page, 1},
		"referrers":  {b.Referrer, 2},
		"signatures": {b.Signature, 3},
	} {
		for i := range tt.n {
			if err := tt.take(); err != nil {
				t.Errorf("%s, %d of %d: %v", name, i+1, tt.n, err)
			}
		}
		for range 2 { // and stays spent
			if err := tt.take(); !errors.Is(err, ErrBudget) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s beyond the limit: %v", name, err)
			}
		}
	}
}

func TestBudgetBytes(t *testing.T) {
	const manifest, envelope = "manifest", "envelope"
	type step struct {
		what string
		n    int64
		ok   bool
		max  int64 // MaxManifest afterwards
	}
	for name, steps := range map[string][]step{
		"a manifest at its limit":    {{manifest, 100, true, 100}, {manifest, 101, false, 100}},
		"an envelope at its limit":   {{envelope, 10, true, 100}, {envelope, 11, false, 100}},
		"nothing":                    {{manifest, 0, true, 100}, {envelope, 0, true, 100}},
		"negative gives nothing":     {{manifest, -1, false, 100}, {manifest, math.MinInt64, false, 100}, {manifest, 100, true, 100}},
		"huge":                       {{manifest, math.MaxInt64, false, 100}, {envelope, math.MaxInt64, false, 100}},
		"both come from the total":   {{manifest, 100, true, 100}, {manifest, 100, true, 50}, {envelope, 10, true, 40}, {manifest, 41, false, 40}, {manifest, 40, true, 0}, {envelope, 1, false, 0}},
		"a refusal costs nothing":    {{manifest, 101, false, 100}, {manifest, 100, true, 100}, {manifest, 100, true, 50}},
		"an envelope is no manifest": {{envelope, 100, false, 100}},
	} {
		t.Run(name, func(t *testing.T) {
			b := NewBudget(Limits{ManifestBytes: 100, EnvelopeBytes: 10, TotalBytes: 250})
			for i, s := range steps {
				take := b.Manifest
				if s.what == envelope {
					take = b.Envelope
				}
				err := take(s.n)
				if (err == nil) != s.ok || err != nil && !errors.Is(err, ErrBudget) {
					t.Errorf("step %d: %s of %d: %v", i, s.what, s.n, err)
				}
				if got := b.MaxManifest(); got != s.max {
					t.Errorf("step %d: then a manifest may have %d bytes, want %d", i, got, s.max)
				}
			}
		})
	}
}

func TestEnvelopeIn(t *testing.T) {
	subject := desc("subject")
	layer := ocispec.Descriptor{MediaType: MediaTypeCOSE, Digest: of("envelope"), Size: 12, Annotations: map[string]string{"a": "b"}}
	proper := func() ocispec.Manifest {
		m := ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactTypeNotation,
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
		{"older style", func(m *ocispec.Manifest) { m.ArtifactType, m.Config.MediaType = "", ArtifactTypeNotation }, ""},
		{"both", func(m *ocispec.Manifest) { m.Config.MediaType = ArtifactTypeNotation }, ""},
		{"annotated subject", func(m *ocispec.Manifest) { s := subject; s.Annotations = map[string]string{"a": "b"}; m.Subject = &s }, ""},
		{"index", func(m *ocispec.Manifest) { m.MediaType = ocispec.MediaTypeImageIndex }, "media type"},
		{"no media type", func(m *ocispec.Manifest) { m.MediaType = "" }, "media type"},
		{"cosign", func(m *ocispec.Manifest) { m.ArtifactType = "application/vnd.dev.cosign.artifact.sig.v1+json" }, "not a Notary Project signature"},
		{"another type with a signature's config", func(m *ocispec.Manifest) { m.ArtifactType, m.Config.MediaType = "x", ArtifactTypeNotation }, "not a Notary Project signature"},
		{"no type", func(m *ocispec.Manifest) { m.ArtifactType = "" }, "not a Notary Project signature"},
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
			got, err := EnvelopeIn(raw, subject)
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
	if _, err := EnvelopeIn([]byte(strings.Replace(string(raw), `{"a":"b"}}`, "7}", 1)), subject); err == nil || !strings.Contains(err.Error(), "annotations") {
		t.Errorf("annotations that are a number: %v", err)
	}
	for _, raw := range []string{"", "null", "{}", "[]", "junk", `{"layers":{}}`, strings.Repeat("[", 200_000), `{"subject":null,"layers":[{}]}`} {
		if d, err := EnvelopeIn([]byte(raw), subject); err == nil || d.Digest != "" {
			t.Errorf("%.20q is a signature manifest", raw)
		}
	}
}

func TestBounded(t *testing.T) {
	for n, ok := range map[int]bool{0: true, maxElements: true, maxElements + 1: false} {
		err := Bounded([]byte("[" + strings.Repeat("0,", n) + "0]"))
		if (err == nil) != ok || err != nil && !errors.Is(err, ErrBudget) {
			t.Errorf("%d elements: %v", n, err)
		}
	}
	raw := []byte(`{"layers":[` + strings.Repeat("{},", maxElements) + `{}, {}]}`)
	if _, err := EnvelopeIn(raw, desc("subject")); !errors.Is(err, ErrBudget) {
		t.Errorf("a signature manifest of many layers: %v", err)
	}
}

func TestMediaTypeOf(t *testing.T) {
	const image, index = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, tt := range []struct{ raw, listed, want string }{ // want empty: ambiguous
		{`{"layers":[],"config":{}}`, "", image},
		{`{"layers":[]}`, "", image},
		{`{"config":{}}`, "", image},
		{`{"manifests":[]}`, "", index},
		{`{"layers":[]}`, image, image},
		{`{"layers":[]}`, dockerManifest, dockerManifest},
		{`{"manifests":[]}`, dockerList, dockerList},
		{`{"layers":[],"mediaType":"` + image + `"}`, "", image},
		{`{"manifests":[],"mediaType":"` + index + `"}`, index, index},
		{`{"layers":[]}`, index, ""},
		{`{"manifests":[]}`, image, ""},
		{`{"layers":[],"mediaType":"` + image + `"}`, dockerManifest, ""},
		{`{"layers":[],"mediaType":"` + index + `"}`, "", ""},
		{`{"layers":[],"mediaType":"` + index + `"}`, index, ""},
		{`{"manifests":[],"mediaType":"` + image + `"}`, image, ""},
		{`{"layers":[],"mediaType":"text/plain"}`, "", ""},
		{`{"layers":[]}`, "text/plain", ""},
		{`{"layers":[],"manifests":[]}`, "", ""},
		{`{"config":{},"manifests":[]}`, index, ""},
		{`{"layers":null,"manifests":[]}`, index, ""},
		{`{"layers":[],"manifests":null}`, image, ""},
		{`{"LAYERS":[],"manifests":[]}`, index, ""}, // decoders that fold case would read it otherwise
		{`{}`, image, ""},
		{`null`, image, ""},
		{`[]`, index, ""},
		{``, "", ""},
		{`{"layers":[]} x`, "", ""},
		{`{"layers":[],"mediaType":7}`, "", ""},
	} {
		got, err := MediaTypeOf([]byte(tt.raw), tt.listed)
		var f *Fault
		if got != tt.want || (err == nil) != (tt.want != "") || err != nil && (!errors.As(err, &f) || f.Reason != ImageAmbiguous) {
			t.Errorf("%s, listed as %q: %q, %v; want %q", tt.raw, tt.listed, got, err, tt.want)
		}
	}
}

func FuzzEnvelopeIn(f *testing.F) {
	subject := desc("subject")
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.cncf.notary.signature",` +
		`"subject":{"mediaType":"` + subject.MediaType + `","digest":"` + subject.Digest.String() + `","size":7},` +
		`"layers":[{"mediaType":"application/cose","digest":"` + of("x").String() + `","size":1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := EnvelopeIn(raw, subject)
		if err != nil && (d.Digest != "" || d.Size != 0) {
			t.Error("an envelope comes with an error")
		}
		if err == nil && (d.Digest.Validate() != nil || d.Size < 0) {
			t.Errorf("the envelope is %+v", d)
		}
	})
}
