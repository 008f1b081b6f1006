package layout_test

import (
	"fmt"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// TestLabels: what index.json, or the index of a referrers tag, says of a manifest does
// not decide before the manifest is read.
func TestLabels(t *testing.T) {
	for _, label := range []string{"", ocispec.MediaTypeEmptyJSON, ocispec.MediaTypeImageConfig} {
		for _, tagged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s tagged %t", label, tagged), func(t *testing.T) {
				var c sourcetest.Content
				subject := c.Image("app")
				want := []verify.Evidence{c.Sign(subject, sourcetest.MediaTypeA, "envelope")}
				c.Sign(subject, "application/spdx+json", "an SBOM", func(m *ocispec.Manifest) { m.ArtifactType = "application/spdx+json" })
				for i := range c.Referrers[subject.Digest] {
					c.Referrers[subject.Digest][i].ArtifactType = label
				}
				dir := filepath.Join(t.TempDir(), "layout")
				sourcetest.Layout(t, dir, c, tagged)
				got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{Signatures: 1})
				if err != nil {
					t.Error(err)
				}
				sourcetest.Check(t, got, want, 0)
			})
		}
	}
}
