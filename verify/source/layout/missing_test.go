package layout_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A layout that lacks a file which may have been a signature does not answer that there
// is none. Manifests of other platforms may be missing.
func TestMissing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		missing func(subject, other ocispec.Descriptor, ev verify.Evidence) digest.Digest
		tags    bool // with referrers tags
		broken  int  // signatures that are handed over with an error
		err     error
	}{
		{
			name:    "the manifest of another platform",
			missing: func(_, other ocispec.Descriptor, _ verify.Evidence) digest.Digest { return other.Digest },
		},
		{
			name:    "the index of the image",
			missing: func(subject, _ ocispec.Descriptor, _ verify.Evidence) digest.Digest { return subject.Digest },
			err:     verify.ErrUnreachable,
		},
		{
			name:    "the manifest of a signature",
			missing: func(_, _ ocispec.Descriptor, ev verify.Evidence) digest.Digest { return ev.Manifest.Digest },
			err:     verify.ErrUnreachable,
		},
		{
			name:    "the manifest of a signature that a referrers tag lists",
			missing: func(_, _ ocispec.Descriptor, ev verify.Evidence) digest.Digest { return ev.Manifest.Digest },
			tags:    true, broken: 1, err: verify.ErrUnreachable,
		},
		{
			name:    "an envelope",
			missing: func(_, _ ocispec.Descriptor, ev verify.Evidence) digest.Digest { return digest.FromBytes(ev.Blob) },
			broken:  1, err: verify.ErrUnreachable,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var content sourcetest.Content
			here, other := content.Image("arm64"), content.Image("amd64")
			raw, err := json.Marshal(ocispec.Index{
				Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{here, other},
			})
			if err != nil {
				t.Fatal(err)
			}
			content.Images = nil
			subject := content.Add(ocispec.MediaTypeImageIndex, raw)
			content.Images = []ocispec.Descriptor{subject}
			ev := content.Sign(subject, sourcetest.MediaTypeA, "good")
			dir := t.TempDir()
			sourcetest.Layout(t, dir, content, c.tags)
			remove(t, blob(dir, c.missing(subject, other, ev)))
			got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
			if !errors.Is(err, c.err) {
				t.Errorf("error %v, want %v", err, c.err)
			}
			broken := 0
			for _, e := range got {
				if e.Err != nil {
					broken++
				}
			}
			if broken != c.broken {
				t.Errorf("%d signatures that cannot be read, want %d", broken, c.broken)
			}
		})
	}
}
