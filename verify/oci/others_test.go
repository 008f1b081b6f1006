package oci

import (
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestOthersBound: a source can list as much as it likes.
func TestOthersBound(t *testing.T) {
	var o Others
	for i := range 2 * maxOthers {
		d := ocispec.Descriptor{ArtifactType: sigstoreBundle + strings.Repeat("x", i), Digest: digest.FromString(fmt.Sprint(i))}
		o.Add(d)
		o.Add(d)
	}
	if got, want := o.String(), "at least 100 sigstore bundles are there"; got != want || len(o.bundles) != maxOthers {
		t.Errorf("%q of %d, want %q", got, len(o.bundles), want)
	}
}
