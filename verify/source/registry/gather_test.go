package registry_test

import (
	"errors"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// Who makes an archive lists referrers of every type, in pages or by tag, and reads them.
func TestGather(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	subject := c.Image("app")
	signature := c.Sign(subject, sourcetest.MediaTypeA, "envelope")
	for range 3 {
		c.Sign(subject, "application/spdx+json", "an SBOM", func(m *ocispec.Manifest) { m.ArtifactType = "application/spdx+json" })
	}
	for name, g := range map[string]*sourcetest.Registry{
		"API":     {},
		"pages":   {PageSize: 1},
		"by tag":  {NoAPI: true},
		"nothing": {NoAPI: true, NoTags: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g.Content, g.Repository = c, sourcetest.Name.Path
			srv := httptest.NewServer(g)
			defer srv.Close()
			u, err := url.Parse(srv.URL)
			if err != nil {
				t.Fatal(err)
			}
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u})
			list := func(artifactType string, l verify.Limits) ([]ocispec.Descriptor, error) {
				return src.Referrers(t.Context(), sourcetest.Name, subject, artifactType, verify.NewBudget(sourcetest.Kind, l))
			}
			all, err := list("", verify.Limits{})
			if g.NoTags {
				if !errors.Is(err, verify.ErrNoReferrers) || all != nil {
					t.Errorf("%d referrers, error %v", len(all), err)
				}
				return
			}
			if err != nil || len(all) != 4 {
				t.Errorf("%d referrers, error %v", len(all), err)
			}
			if some, err := list(sourcetest.ArtifactType, verify.Limits{}); err != nil || len(some) == 0 || some[0].Digest != signature.Manifest.Digest {
				t.Errorf("%d signatures, error %v", len(some), err)
			}
			if some, err := list("", verify.Limits{Referrers: 3}); !errors.Is(err, verify.ErrBudget) || some != nil {
				t.Errorf("%d of 3 referrers, error %v", len(some), err)
			}

			free := func(int64) error { return nil }
			raw, err := src.Fetch(t.Context(), sourcetest.Name, signature.Manifest, true, free)
			if err != nil || digest.FromBytes(raw) != signature.Manifest.Digest {
				t.Errorf("manifest %q, error %v", raw, err)
			}
			envelope := ocispec.Descriptor{Digest: digest.FromBytes(signature.Blob), Size: int64(len(signature.Blob))}
			if raw, err = src.Fetch(t.Context(), sourcetest.Name, envelope, false, free); err != nil || string(raw) != "envelope" {
				t.Errorf("blob %q, error %v", raw, err)
			}
			envelope.Size--
			if raw, err = src.Fetch(t.Context(), sourcetest.Name, envelope, false, free); err == nil {
				t.Errorf("a blob that is longer than it says: %q", raw)
			}
			asked := len(g.Requests())
			_, err = src.Fetch(t.Context(), sourcetest.Name, signature.Manifest, true, func(int64) error { return verify.ErrBudget })
			if !errors.Is(err, verify.ErrBudget) || len(g.Requests()) != asked {
				t.Errorf("error %v, %d requests more", err, len(g.Requests())-asked)
			}
			if _, err = src.Fetch(t.Context(), sourcetest.Name, ocispec.Descriptor{Digest: "sha256:../x"}, false, free); err == nil {
				t.Error("a digest that is a path")
			}
		})
	}
}
