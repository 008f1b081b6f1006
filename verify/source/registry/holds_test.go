package registry_test

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// TestHolds: a 404 for the image itself is the only no, and a registry that has served
// something of the repository need not have this image to say that nothing refers to it.
func TestHolds(t *testing.T) {
	answer := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Location", "https://elsewhere.test/")
			w.WriteHeader(status)
			return true
		}
	}
	for _, tt := range []struct {
		name      string
		intercept func(http.ResponseWriter, *http.Request) bool
		stranger  bool // the registry does not have the image
		listed    bool
		before    func(*testing.T, *registry.Source, *sourcetest.Content) // asked first
		want      error
		requests  int // for the image's manifest
	}{
		{name: "it has the image", listed: true, requests: 1},
		{name: "it has it and cannot list", requests: 1},
		{name: "it does not have it", listed: true, stranger: true, want: verify.ErrAbsent, requests: 1},
		{name: "it does not have it and cannot list", stranger: true, want: verify.ErrAbsent, requests: 1},
		{name: "it has others of the repository", listed: true, stranger: true, before: findOne},
		{name: "it has others and cannot list", stranger: true, before: findOne, want: verify.ErrAbsent, requests: 1},
		{name: "it sends us elsewhere", listed: true, intercept: answer(http.StatusTemporaryRedirect), requests: 1},
		{name: "it fails", listed: true, intercept: answer(http.StatusInternalServerError), want: verify.ErrUnreachable, requests: 1},
		{name: "it refuses us", listed: true, intercept: answer(http.StatusForbidden), want: verify.ErrUnauthorized, requests: 1},
		{name: "it says 410", listed: true, intercept: answer(http.StatusGone), want: verify.ErrUnreachable, requests: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c sourcetest.Content
			image := c.Image("signed")
			c.Sign(image, sourcetest.MediaTypeA, "envelope")
			if tt.stranger {
				var other sourcetest.Content
				image = other.Image("unknown")
			}
			reg := &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path, Intercept: tt.intercept}
			s := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, reg), Client: client(t, nil), Breaker: registry.NewBreaker(time.Now, rand.Float64)})
			if tt.before != nil {
				tt.before(t, s, &c)
			}
			before := len(reg.Requests())
			err := s.Holds(t.Context(), sourcetest.Name, image, tt.listed, verify.NewBudget(sourcetest.Kind, verify.Limits{}))
			if !errors.Is(err, tt.want) || tt.want == nil && err != nil {
				t.Errorf("error is %v, want %v", err, tt.want)
			}
			n := 0
			for _, r := range reg.Requests()[before:] {
				if strings.HasSuffix(r, "/manifests/"+image.Digest.String()) {
					n++
				}
			}
			if n != tt.requests {
				t.Errorf("%d requests, want %d: %q", n, tt.requests, reg.Requests())
			}
		})
	}
}

// findOne asks for signatures of what there is.
func findOne(t *testing.T, s *registry.Source, c *sourcetest.Content) {
	t.Helper()
	n := 0
	if err := s.Find(t.Context(), sourcetest.Name, c.Images[0], verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { n++; return true }); err != nil || n != 1 {
		t.Fatalf("%d signatures, error %v", n, err)
	}
}

// TestUntypedManifest: a registry that serves manifests as something else is said to be
// at fault, and not the image.
func TestUntypedManifest(t *testing.T) {
	for _, contentType := range []string{"application/json", "text/plain; charset=utf-8", "application/vnd.docker.distribution.manifest.v1+prettyjws"} {
		var c sourcetest.Content
		image := c.Image("image")
		s := registry.New(registry.Mirror{Host: sourcetest.Name.Host, Client: client(t, nil), URL: start(t, &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path, Intercept: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", contentType)
			_, _ = w.Write(c.Blobs[image.Digest])
			return true
		}})})
		_, _, err := s.Manifest(t.Context(), sourcetest.Name, image.Digest)
		kind, _, _ := strings.Cut(contentType, ";")
		if !errors.Is(err, verify.ErrUnreachable) || errors.Is(err, oci.ErrAmbiguous) || !strings.Contains(err.Error(), `answered with type "`+kind+`", instead of`) {
			t.Errorf("%s: %v", contentType, err)
		}
	}
}
