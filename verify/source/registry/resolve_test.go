package registry

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// TestResolve asks what a tag leads to: of a registry that knows, and of some that do
// not say.
func TestResolve(t *testing.T) {
	raw := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{},"layers":[]}`)
	d := digest.FromBytes(raw)
	g := &sourcetest.Registry{
		Content:    sourcetest.Content{Blobs: map[digest.Digest][]byte{d: raw, "sha256:" + digest.Digest(strings.Repeat("0", 64)): raw}},
		Repository: sourcetest.Name.Path,
		Tags:       map[string]digest.Digest{"v1": d, "lies": "sha256:" + digest.Digest(strings.Repeat("0", 64))},
	}
	g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, "/refused"):
			w.WriteHeader(http.StatusUnauthorized)
		case strings.HasSuffix(r.URL.Path, "/broken"):
			w.WriteHeader(http.StatusInternalServerError)
		case strings.HasSuffix(r.URL.Path, "/junk"):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Write([]byte("junk"))
		default:
			return false
		}
		return true
	}
	srv := httptest.NewServer(g)
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	s := New(Mirror{Host: sourcetest.Name.Host, URL: u})
	if got, err := s.Resolve(t.Context(), sourcetest.Name, "v1"); err != nil || got != d {
		t.Errorf("v1 is %s (%v), want %s", got, err, d)
	}
	for tag, is := range map[string]func(error) bool{
		"none":        func(err error) bool { return errors.Is(err, fs.ErrNotExist) },
		"lies":        func(err error) bool { return errors.Is(err, verify.ErrUnreachable) },
		"refused":     func(err error) bool { return errors.Is(err, verify.ErrUnauthorized) },
		"broken":      func(err error) bool { return errors.Is(err, verify.ErrUnreachable) },
		"junk":        func(err error) bool { return errors.Is(err, oci.ErrAmbiguous) },
		"a/../../b":   func(err error) bool { return strings.HasPrefix(err.Error(), "tag ") },
		d.String():    func(err error) bool { return strings.HasPrefix(err.Error(), "tag ") },
		"":            func(err error) bool { return strings.HasPrefix(err.Error(), "tag ") },
		"x?y=z&a=b#c": func(err error) bool { return strings.HasPrefix(err.Error(), "tag ") },
	} {
		if got, err := s.Resolve(t.Context(), sourcetest.Name, tag); err == nil || !is(err) || got != "" {
			t.Errorf("%s is %s: %v", tag, got, err)
		}
	}
}
