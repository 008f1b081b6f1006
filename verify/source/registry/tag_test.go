package registry_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// tagged is a registry without the Referrers API in which every tag leads to index, of
// which the header says that digest.
func tagged(t *testing.T, index []byte, said digest.Digest) *registry.Source {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		w.Header().Set("Content-Length", fmt.Sprint(len(index)))
		if said != "" {
			w.Header().Set("Docker-Content-Digest", said.String())
		}
		w.Write(index)
	}))
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	return registry.New(registry.Mirror{Host: "registry.test", URL: u})
}

// TestTaggedIndex: an index with the referrers tag is what the registry says that it is.
func TestTaggedIndex(t *testing.T) {
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("app"), Size: 3}
	index := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}`)
	itself := subject
	itself.Digest = digest.FromBytes(index)
	for _, tt := range []struct {
		name    string
		subject ocispec.Descriptor
		said    digest.Digest
		want    string // in the error; empty: none
	}{
		{name: "no digest is said", subject: subject},
		{name: "its digest", subject: subject, said: digest.FromBytes(index)},
		{name: "its digest by another algorithm", subject: subject, said: digest.SHA512.FromBytes(index)},
		{name: "another digest", subject: subject, said: digest.FromString("other"), want: "does not match its Docker-Content-Digest"},
		{name: "the subject itself", subject: itself, want: "is no index of referrers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tagged(t, index, tt.said).Find(t.Context(), sourcetest.Name, tt.subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// TestTaggedIndexIsNotKept: a long index with the referrers tag is read into the memory
// that all long lists share, as a page of the Referrers API is.
func TestTaggedIndexIsNotKept(t *testing.T) {
	const long, times = 3 << 20, 8
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("app"), Size: 3}
	head, tail := `{"schemaVersion":2,"mediaType":"`+ocispec.MediaTypeImageIndex+`","manifests":[],"annotations":{"x":"`, `"}}`
	s := tagged(t, []byte(head+strings.Repeat("x", long-len(head)-len(tail))+tail), "")
	find := func() {
		if err := s.Find(t.Context(), sourcetest.Name, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true }); err != nil {
			t.Fatal(err)
		}
	}
	find()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range times {
		find()
	}
	runtime.ReadMemStats(&after)
	n := (after.TotalAlloc - before.TotalAlloc) / times
	t.Logf("%d KiB allocated for each", n>>10)
	// The buffer itself may be made anew each time, since a garbage collection takes it.
	if n > 7<<20 {
		t.Errorf("%d bytes allocated for a list of %d", n, long)
	}
}
