package layout_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// TestLayoutBelow: a directory or tar file with a layout one level down says so, and not
// what the file system said.
func TestLayoutBelow(t *testing.T) {
	var c sourcetest.Content
	image := c.Image("app")
	top := t.TempDir()
	sourcetest.Layout(t, filepath.Join(top, "app"), c, false)
	packed := filepath.Join(t.TempDir(), "top.tar")
	sourcetest.Tar(t, top, packed)
	for _, path := range []string{top, packed} {
		_, err := sourcetest.Find(t.Context(), layout.New(path), image, verify.Limits{})
		if err == nil || !strings.HasSuffix(err.Error(), "it is no OCI image layout: no oci-layout at its top; one is in app/ there") {
			t.Errorf("%s: %v", filepath.Base(path), err)
		}
	}
	_, err := sourcetest.Find(t.Context(), layout.New(filepath.Join(top, "app", "blobs")), image, verify.Limits{})
	if err == nil || !strings.HasSuffix(err.Error(), "no oci-layout at its top") {
		t.Errorf("beside it: %v", err)
	}
}
