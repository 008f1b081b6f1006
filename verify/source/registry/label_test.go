package registry_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// listedAs lists all referrers of subject as of that type.
func listedAs(c *sourcetest.Content, subject digest.Digest, label string) {
	for i := range c.Referrers[subject] {
		c.Referrers[subject][i].ArtifactType = label
	}
}

// TestLabels: what a list says of a manifest does not decide before the manifest is
// read, by the API, filtered or not, and by the tag.
func TestLabels(t *testing.T) {
	for _, label := range []string{"", ocispec.MediaTypeEmptyJSON, ocispec.MediaTypeImageConfig, "application/vnd.unknown.config.v1+json"} {
		for name, set := range map[string]func(*sourcetest.Registry){
			"API": func(g *sourcetest.Registry) { g.NoFilter = true },
			"tag": func(g *sourcetest.Registry) { g.NoAPI = true },
		} {
			t.Run(name+" "+label, func(t *testing.T) {
				c, subject, want := signed(2)
				for i := range 30 { // SBOMs and the like, which are no signatures
					c.Sign(subject, "application/spdx+json", fmt.Sprint("an SBOM ", i), func(m *ocispec.Manifest) { m.ArtifactType = "application/spdx+json" })
				}
				listedAs(&c, subject.Digest, label)
				g := serve(c)
				set(g)
				got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{Signatures: 2})
				if err != nil {
					t.Error(err)
				}
				sourcetest.Check(t, got, want, 0)
				// Nothing but others is nothing.
				delete(c.Referrers, subject.Digest)
				c.Sign(subject, "application/spdx+json", "an SBOM", func(m *ocispec.Manifest) { m.ArtifactType = "application/spdx+json" })
				listedAs(&c, subject.Digest, label)
				got, err = sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
				if len(got) != 0 || err != nil {
					t.Errorf("%d signatures, error %v", len(got), err)
				}
			})
		}
	}
}

// TestListTypes: an index of referrers is one whatever the registry calls it.
func TestListTypes(t *testing.T) {
	for _, contentType := range []string{"application/json", "text/plain; charset=utf-8", "application/vnd.docker.distribution.manifest.list.v2+json"} {
		c, subject, want := signed(1)
		g := serve(c)
		g.NoFilter = true
		inner := serve(c)
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/referrers/") {
				inner.ServeHTTP(typed{w, contentType}, r)
				return true
			}
			return false
		}
		got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
		if err != nil {
			t.Errorf("%s: %v", contentType, err)
		}
		sourcetest.Check(t, got, want, 0)
	}
}

// typed answers as another content type.
type typed struct {
	http.ResponseWriter
	contentType string
}

func (w typed) WriteHeader(status int) {
	w.Header().Set("Content-Type", w.contentType)
	w.ResponseWriter.WriteHeader(status)
}

func (w typed) Write(b []byte) (int, error) {
	w.Header().Set("Content-Type", w.contentType)
	return w.ResponseWriter.Write(b)
}

// TestOrder: many signatures that do not count hide none that is listed with a
// certificate that the rule trusts, and big ones no small ones.
func TestOrder(t *testing.T) {
	thumbprint := sourcetest.Kind.Annotation()
	anchor := strings.Repeat("ab", 32)
	for _, tt := range []struct {
		name   string
		junk   int
		pages  int
		limits verify.Limits
		cut    bool
	}{
		{"100 before it", 100, 0, verify.Limits{}, false},
		{"on pages before it", 100, 30, verify.Limits{}, false},
		{"more than may be listed", 400, 50, verify.Limits{}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, subject, _ := signed(0)
			for i := range tt.junk {
				c.Sign(subject, sourcetest.MediaTypeA, fmt.Sprint("junk ", i), func(m *ocispec.Manifest) {
					m.Annotations = map[string]string{thumbprint: `["` + strings.Repeat("0", 64) + `"]`}
				})
			}
			want := c.Sign(subject, sourcetest.MediaTypeA, "envelope", func(m *ocispec.Manifest) {
				m.Annotations = map[string]string{thumbprint: `["` + strings.Repeat("1", 64) + `","` + anchor + `"]`}
			})
			g := serve(c)
			g.PageSize = tt.pages
			b := verify.NewBudget(sourcetest.Kind, tt.limits)
			b.Anchors = []string{strings.Repeat("f", 64), anchor}
			s := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil)})
			found := 0
			err := s.Find(t.Context(), sourcetest.Name, subject, b, func(ev verify.Evidence) bool {
				if found++; ev.Manifest.Digest == want.Manifest.Digest {
					found = -1000
				}
				return found > 0
			})
			if found >= 0 || err != nil {
				t.Errorf("after %d signatures it was not found, error %v", found, err)
			}
			// Without it, what was cut is said.
			b = verify.NewBudget(sourcetest.Kind, tt.limits)
			err = s.Find(t.Context(), sourcetest.Name, subject, b, func(verify.Evidence) bool { return true })
			if !errors.Is(err, verify.ErrBudget) {
				t.Errorf("101 signatures and more, of which 100 may be read: %v", err)
			}
		})
	}
	c, subject, _ := signed(0)
	for range 3 {
		big := strings.Repeat("x", 1000*(4-len(c.Referrers[subject.Digest])))
		c.Sign(subject, sourcetest.MediaTypeA, "envelope "+big[:5], func(m *ocispec.Manifest) { m.Annotations = map[string]string{"pad": big} })
	}
	got, err := sourcetest.Find(t.Context(), open(t, serve(c)), subject, verify.Limits{})
	if err != nil || len(got) != 3 || got[0].Manifest.Size > got[1].Manifest.Size || got[1].Manifest.Size > got[2].Manifest.Size {
		t.Errorf("%d signatures, error %v, not small before big", len(got), err)
	}
}

// TestClaimsAreCounted: entries that only claim a certificate which the rule trusts, and
// are no signatures, cost a bounded number of requests, and hide none that is listed as a
// signature.
func TestClaimsAreCounted(t *testing.T) {
	thumbprint := sourcetest.Kind.Annotation()
	anchor := strings.Repeat("ab", 32)
	claims := map[string]string{thumbprint: `["` + anchor + `"]`}
	c, subject, _ := signed(0)
	var junk []ocispec.Descriptor
	for i := range 2000 {
		junk = append(junk, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(fmt.Sprint(i)), Size: 2, Annotations: claims})
	}
	want := c.Sign(subject, sourcetest.MediaTypeA, "envelope", func(m *ocispec.Manifest) { m.Annotations = claims })
	c.Referrers[subject.Digest] = append(junk, c.Referrers[subject.Digest]...)
	g := serve(c)
	g.NoFilter, g.PageSize = true, 1000
	requests := 0
	g.Intercept = func(http.ResponseWriter, *http.Request) bool { requests++; return false }
	s := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil)})
	b := verify.NewBudget(sourcetest.Kind, verify.Limits{Wall: time.Minute})
	b.Anchors = []string{anchor}
	found := false
	err := s.Find(t.Context(), sourcetest.Name, subject, b, func(ev verify.Evidence) bool {
		found = found || ev.Err == nil && ev.Manifest.Digest == want.Manifest.Digest
		return !found
	})
	if !found || err != nil {
		t.Errorf("found %v, error %v", found, err)
	}
	if requests > 450 {
		t.Errorf("%d requests", requests)
	}
	b = verify.NewBudget(sourcetest.Kind, verify.Limits{})
	b.Anchors = []string{anchor}
	c.Referrers[subject.Digest] = junk
	if err := s.Find(t.Context(), sourcetest.Name, subject, b, func(verify.Evidence) bool { return true }); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("more were listed than were looked at: %v", err)
	}
}
