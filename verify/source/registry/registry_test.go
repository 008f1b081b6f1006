package registry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// start serves h on loopback and returns where.
func start(t testing.TB, h http.Handler) *url.URL {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// client is a client of its own, so that no connection outlives the test.
func client(t testing.TB, config *tls.Config) *http.Client {
	transport := registry.Transport(config)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// open serves h on loopback and returns a mirror source for it.
func open(t testing.TB, h http.Handler) *registry.Source {
	t.Helper()
	return registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, h), Client: client(t, nil)})
}

func serve(c sourcetest.Content) *sourcetest.Registry {
	return &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path}
}

// signed is a content with one image and n signatures of it.
func signed(n int) (c sourcetest.Content, subject ocispec.Descriptor, want []verify.Evidence) {
	subject = c.Image("app")
	for i := range n {
		want = append(want, c.Sign(subject, sourcetest.MediaTypeA, fmt.Sprint("envelope ", i)))
	}
	return c, subject, want
}

func TestSource(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*sourcetest.Registry){
		"API":            func(*sourcetest.Registry) {},
		"API unfiltered": func(g *sourcetest.Registry) { g.NoFilter = true },
		"API in pages":   func(g *sourcetest.Registry) { g.PageSize = 2 },
		"tags":           func(g *sourcetest.Registry) { g.NoAPI = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sourcetest.Run(t, func(t *testing.T, c sourcetest.Content) verify.Source {
				g := serve(c)
				set(g)
				return open(t, g)
			})
		})
	}
}

func TestTagged(t *testing.T) {
	sourcetest.RunTagged(t, func(t *testing.T, c sourcetest.Content) verify.Source { return open(t, serve(c)) })
}

func TestRequests(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		noAPI bool
		want  int
	}{
		"API": {false, 3},
		"tag": {true, 4},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, subject, want := signed(1)
			g := serve(c)
			g.NoAPI = tt.noAPI
			src := open(t, g)
			for range 2 { // nothing is remembered, also not that the API is missing
				before := len(g.Requests())
				got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
				if err != nil {
					t.Error(err)
				}
				sourcetest.Check(t, got, want, 0)
				if list := g.Requests()[before:]; len(list) != tt.want {
					t.Errorf("requests:\n%s", strings.Join(list, "\n"))
				}
			}
		})
	}
}

// What a source could not find out is said, and is not "no signature".
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	say := func(code int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) }
	}
	answer := func(mediaType, body string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			io.WriteString(w, body)
		}
	}
	for name, tt := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request)
		err    error
		text   string // of the error, after the class
	}{
		"401": {say(401), verify.ErrUnauthorized, "GET /v2/team/app/referrers/...: 401 Unauthorized"},
		"403": {say(403), verify.ErrUnauthorized, "GET /v2/team/app/referrers/...: 403 Forbidden"},
		"401 with a realm elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://auth.corp/token?secret=s3cret",service="x"`)
			w.WriteHeader(401)
		}, verify.ErrUnauthorized, `401 Unauthorized: tokens would come from another host, "auth.corp"`},
		"400":             {say(400), verify.ErrUnreachable, "400 Bad Request"},
		"429":             {say(429), verify.ErrUnreachable, "429 Too Many Requests"},
		"500":             {say(500), verify.ErrUnreachable, "500 Internal Server Error"},
		"503":             {say(503), verify.ErrUnreachable, "503 Service Unavailable"},
		"204":             {say(204), verify.ErrUnreachable, "204 No Content"},
		"304":             {say(304), verify.ErrUnreachable, "304 Not Modified"},
		"404":             {say(404), verify.ErrNoReferrers, "no Referrers API and no tag sha256-"},
		"405":             {say(405), verify.ErrUnreachable, "GET /v2/team/app/manifests/...: 405"},
		"a login page":    {answer("text/html", "<html>"), verify.ErrNoReferrers, "is no index of referrers"},
		"nothing":         {answer(ocispec.MediaTypeImageIndex, ""), verify.ErrUnreachable, "not JSON"},
		"half an answer":  {answer(ocispec.MediaTypeImageIndex, `{"manifests":[`), verify.ErrUnreachable, "not JSON"},
		"no list":         {answer(ocispec.MediaTypeImageIndex, `{"manifests":7}`), verify.ErrUnreachable, "manifests is no list"},
		"deep":            {answer(ocispec.MediaTypeImageIndex, strings.Repeat("[", 200_000)), verify.ErrUnreachable, "not JSON"},
		"million entries": {answer(ocispec.MediaTypeImageIndex, `{"manifests":[`+strings.Repeat("{},", 1_000_000)+`{}]}`), verify.ErrBudget, "entries"},
		"cut short": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, `{"manifests":[]}`)
		}, verify.ErrUnreachable, "unexpected EOF"},
		"4 GiB announced": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Content-Length", "4294967296")
			w.WriteHeader(200)
		}, verify.ErrBudget, "limit 4194304"},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			for chunk := bytes.Repeat([]byte(" "), 64<<10); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}, verify.ErrBudget, "limit 4194304"},
		"gzip": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, `{"manifests":[]}`)
			z.Close()
		}, verify.ErrUnreachable, "content encoding"},
		"closed": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, verify.ErrUnreachable, "EOF"},
		"huge header": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Junk", strings.Repeat("x", 1<<20))
		}, verify.ErrUnreachable, "GET /v2/team/app/referrers/...: "},
		"redirected to itself": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
		}, verify.ErrUnreachable, "redirected too often"},
		"redirected to the metadata service": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://169.254.169.254/latest/", http.StatusFound)
		}, verify.ErrUnreachable, "redirected: http://169.254.169.254 is another host"},
		"redirected with a password": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://root:s3cret@"+r.Host+"/", http.StatusFound)
		}, verify.ErrUnreachable, "redirected: "},
		"redirected to another scheme": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+r.Host+"/", http.StatusFound)
		}, verify.ErrUnreachable, "redirected: "},
		"page on another host": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `<http://169.254.169.254/s3cret?token=s3cret>; rel="next"`)
			answer(ocispec.MediaTypeImageIndex, `{"manifests":[]}`)(w, r)
		}, verify.ErrUnreachable, "not the same origin"},
		"page with a password": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `<http://root:s3cret@`+r.Host+r.URL.Path+`>; rel="next"`)
			answer(ocispec.MediaTypeImageIndex, `{"manifests":[]}`)(w, r)
		}, verify.ErrUnreachable, "is another host"},
		"pages without end": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `<`+r.URL.Path+`?token=s3cret>; rel="next"`)
			answer(ocispec.MediaTypeImageIndex, `{"manifests":[]}`)(w, r)
		}, verify.ErrBudget, "pages"},
		"second page missing": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Has("page") {
				w.WriteHeader(404)
				return
			}
			w.Header().Set("Link", `<`+r.URL.Path+`?page=2>; rel="next"`)
			answer(ocispec.MediaTypeImageIndex, `{"manifests":[]}`)(w, r)
		}, verify.ErrUnreachable, "404 Not Found"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, subject, _ := signed(0)
			var requests atomic.Int32
			src := open(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				for _, h := range []string{"Authorization", "Cookie"} {
					if r.Header.Get(h) != "" {
						t.Errorf("%s was sent", h)
					}
				}
				if r.Header.Get("Accept-Encoding") != "identity" {
					t.Errorf("Accept-Encoding %q", r.Header.Get("Accept-Encoding"))
				}
				tt.answer(w, r)
			}))
			got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if !errors.Is(err, tt.err) || !strings.Contains(fmt.Sprint(err), tt.text) {
				t.Errorf("error %v\nwant  %v: %s", err, tt.err, tt.text)
			}
			text := fmt.Sprint(err)
			if strings.Contains(text, "s3cret") || strings.Contains(text, "artifactType") || len(text) > 400 {
				t.Errorf("error says too much: %s", text)
			}
			sourcetest.Check(t, got, nil, 0)
			if n := int(requests.Load()); n > verify.DefaultLimits.Pages {
				t.Errorf("%d requests", n)
			}
		})
	}
}

// The tag index can fail in its own ways.
func TestTagIndex(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	tag := "sha256-" + subject.Digest.Encoded()
	lie := func(mediaType, d, body string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", mediaType)
			if d != "" {
				w.Header().Set("Docker-Content-Digest", d)
			}
			io.WriteString(w, body)
		}
	}
	for name, tt := range map[string]struct {
		answer func(http.ResponseWriter)
		err    error
	}{
		"no digest, empty": {lie(ocispec.MediaTypeImageIndex, "", `{"manifests":[]}`), nil},
		"parameters":       {lie(ocispec.MediaTypeImageIndex+"; charset=utf-8", "", `{"manifests":[]}`), nil},
		"another digest":   {lie(ocispec.MediaTypeImageIndex, digest.FromString("x").String(), `{"manifests":[]}`), verify.ErrUnreachable},
		"bad digest":       {lie(ocispec.MediaTypeImageIndex, "sha256:..", `{"manifests":[]}`), verify.ErrUnreachable},
		"no index":         {lie(ocispec.MediaTypeImageManifest, "", `{"layers":[]}`), verify.ErrNoReferrers},
		"the subject":      {lie(ocispec.MediaTypeImageIndex, string(subject.Digest), string(c.Blobs[subject.Digest])), verify.ErrNoReferrers},
		"not JSON":         {lie(ocispec.MediaTypeImageIndex, "", `x`), verify.ErrUnreachable},
		"unauthorized":     {func(w http.ResponseWriter) { w.WriteHeader(401) }, verify.ErrUnauthorized},
		"broken":           {func(w http.ResponseWriter) { w.WriteHeader(502) }, verify.ErrUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := serve(c)
			g.NoAPI = true
			g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/manifests/"+tag) {
					return false
				}
				tt.answer(w)
				return true
			}
			got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
			if !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
			sourcetest.Check(t, got, nil, 0)
		})
	}
	t.Run("other repository", func(t *testing.T) {
		t.Parallel()
		g := serve(c)
		g.Repository = "team/other"
		if got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{}); !errors.Is(err, verify.ErrNoReferrers) || len(got) > 0 {
			t.Errorf("%d signatures, error %v", len(got), err)
		}
	})
	t.Run("405 for the API", func(t *testing.T) {
		t.Parallel()
		g := serve(c)
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/referrers/") {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return true
			}
			return false
		}
		got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		sourcetest.Check(t, got, want, 0)
	})
}

// A signature that the registry fails to send hides no other, and the answer is
// not conclusive; one that it sends wrong is bad, and the answer is.
func TestOneBadAnswer(t *testing.T) {
	t.Parallel()
	say := func(code int) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, _ *http.Request, _ []byte) { w.WriteHeader(code) }
	}
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request, raw []byte)
		err    error
	}{
		"404":    {say(404), nil},
		"401":    {say(401), verify.ErrUnauthorized},
		"403":    {say(403), verify.ErrUnauthorized},
		"429":    {say(429), verify.ErrUnreachable},
		"500":    {say(500), verify.ErrUnreachable},
		"closed": {func(http.ResponseWriter, *http.Request, []byte) { panic(http.ErrAbortHandler) }, verify.ErrUnreachable},
		"cut short": {func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			w.Write(raw[:len(raw)/2])
		}, verify.ErrUnreachable},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request, raw []byte) {
			http.Redirect(w, r, "http://127.0.0.1:1/bucket/"+r.URL.Path+"?X-Amz-Signature=s3cret", http.StatusTemporaryRedirect)
		}, verify.ErrUnreachable},
		"gzip": {func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			z.Write(raw)
			z.Close()
		}, verify.ErrUnreachable},
		"other bytes": {func(w http.ResponseWriter, r *http.Request, raw []byte) { w.Write(bytes.ToUpper(raw)) }, nil},
		"other digest in the header": {func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
			w.Write(raw)
		}, nil},
		"one byte more": {func(w http.ResponseWriter, r *http.Request, raw []byte) { w.Write(append(raw, ' ')) }, nil},
		"one byte more, chunked": {func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Write(raw)
			w.(http.Flusher).Flush()
			w.Write([]byte{' '})
		}, nil},
		"one byte less": {func(w http.ResponseWriter, r *http.Request, raw []byte) { w.Write(raw[1:]) }, nil},
	} {
		for _, part := range []string{"manifest", "envelope"} {
			t.Run(part+" "+name, func(t *testing.T) {
				t.Parallel()
				c, subject, want := signed(3)
				bad := want[0].Manifest.Digest
				if part == "envelope" {
					bad = digest.FromBytes(want[0].Blob)
				}
				g := serve(c)
				g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.HasSuffix(r.URL.Path, bad.String()) {
						return false
					}
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					tt.answer(w, r, bytes.Clone(c.Blobs[bad]))
					return true
				}
				got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
				if !errors.Is(err, tt.err) || strings.Contains(fmt.Sprint(err), "s3cret") {
					t.Errorf("error %v, want %v", err, tt.err)
				}
				sourcetest.Check(t, got, want[1:], 1)
			})
		}
	}
	t.Run("manifest with another content type is what its digest says", func(t *testing.T) {
		t.Parallel()
		c, subject, want := signed(2)
		g := serve(c)
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, want[0].Manifest.Digest.String()) {
				return false
			}
			w.Header().Set("Content-Type", "text/html")
			w.Write(c.Blobs[want[0].Manifest.Digest])
			return true
		}
		got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		sourcetest.Check(t, got, want, 0)
	})
}

// A registry that stops talking, or says one byte and then nothing, holds a
// question no longer than its context.
func TestHanging(t *testing.T) {
	t.Parallel()
	for _, part := range []string{"/referrers/", "/manifests/", "/blobs/"} {
		for name, first := range map[string]string{"at once": "", "after a byte": "{"} {
			t.Run(part+name, func(t *testing.T) {
				t.Parallel()
				c, subject, _ := signed(2)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				g := serve(c)
				g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, part) {
						return false
					}
					w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
					io.WriteString(w, first)
					if first != "" {
						w.(http.Flusher).Flush()
					}
					cancel() // the deadline comes while the registry hangs
					<-r.Context().Done()
					return true
				}
				got, err := sourcetest.Find(ctx, open(t, g), subject, verify.Limits{})
				if !errors.Is(err, verify.ErrUnreachable) {
					t.Errorf("error %v", err)
				}
				sourcetest.Check(t, got, nil, 0)
			})
		}
	}
}

// A client's own timeout counts like the deadline, and says so.
func TestTimeout(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	c := client(t, nil)
	c.Timeout = 20 * time.Millisecond
	u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: c})
	_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), "/referrers/...: no answer in time") {
		t.Errorf("error %v", err)
	}
}

func TestRefusedConnection(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	srv := httptest.NewServer(http.NotFoundHandler())
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	srv.Close()
	// With the default client, which keeps nothing of a connection that failed.
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u})
	_, err = sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) || fmt.Sprint(err) != "source did not answer: GET /v2/team/app/referrers/...: connection refused" {
		t.Errorf("error %v", err)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	srv := httptest.NewUnstartedServer(serve(c))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that shall fail
	srv.StartTLS()
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	trusting := srv.Client().Transport.(*http.Transport).TLSClientConfig
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, trusting)})
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)

	src = registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil)})
	if _, err = sourcetest.Find(t.Context(), src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), "x509") {
		t.Errorf("unknown authority: %v", err)
	}
	u.Scheme = "http"
	src = registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, trusting)})
	if _, err = sourcetest.Find(t.Context(), src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("http to an https port: %v", err)
	}
}

func TestPathPrefix(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	g := serve(c)
	g.Repository = "hub/dev/" + sourcetest.Name.Path
	u := start(t, g)
	u.Path = "/hub/dev/"
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil)})
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
	if want := "mirror http://" + u.Host + "/hub/dev/"; src.Name() != want {
		t.Errorf("name %q, want %q", src.Name(), want)
	}
}

// Redirects within the mirror are followed.
func TestRedirectWithin(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	g := serve(c)
	g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/v2/team/app/blobs/") || r.URL.Query().Has("again") {
			return false
		}
		http.Redirect(w, r, r.URL.Path+"?again", http.StatusTemporaryRedirect)
		return true
	}
	got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
}

// More referrers than the limit end the question; what was before it counts.
func TestFlood(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(20)
	g := serve(c)
	got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{Referrers: 7})
	if !errors.Is(err, verify.ErrBudget) {
		t.Errorf("error %v", err)
	}
	sourcetest.Check(t, got, want[:7], 0)
	if n := len(g.Requests()); n != 1+2*7 {
		t.Errorf("%d requests", n)
	}
}

// A registry that claims to have filtered costs nothing for what it left in.
func TestFilterLie(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	for i := range 300 {
		c.List(subject, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/spdx+json",
			Digest: digest.FromString(fmt.Sprint(i)), Size: 1,
		})
	}
	g := serve(c)
	g.NoFilter = true
	g.Intercept = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
		return false
	}
	got, err := sourcetest.Find(t.Context(), open(t, g), subject, verify.Limits{})
	if err != nil || len(got) != 1 || len(g.Requests()) != 3 {
		t.Errorf("%d handed over, %d requests, error %v", len(got), len(g.Requests()), err)
	}
	sourcetest.Check(t, got, want, 0)
}

// What cannot be asked for is not asked for.
func TestBadQuestions(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	at := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	dead := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		t.Errorf("asked %s", r.URL)
		return nil, errors.New("no")
	})}
	ok := sourcetest.Name
	for name, tt := range map[string]struct {
		host    string
		url     *url.URL
		in      verify.Name
		subject digest.Digest
	}{
		"no URL":             {ok.Host, nil, ok, subject.Digest},
		"no host":            {"", at("http://m"), ok, subject.Digest},
		"no host, no name":   {"", at("http://m"), verify.Name{Path: ok.Path}, subject.Digest},
		"other host":         {"docker.io", at("http://m"), ok, subject.Digest},
		"other scheme":       {ok.Host, at("ftp://m"), ok, subject.Digest},
		"file":               {ok.Host, at("file:///etc"), ok, subject.Digest},
		"password":           {ok.Host, at("http://root:s3cret@m"), ok, subject.Digest},
		"query":              {ok.Host, at("http://m?token=s3cret"), ok, subject.Digest},
		"opaque":             {ok.Host, at("http:m"), ok, subject.Digest},
		"docker.io":          {ok.Host, at("https://docker.io"), ok, subject.Digest},
		"prefix":             {ok.Host, at("http://m/a/../b"), ok, subject.Digest},
		"no path":            {ok.Host, at("http://m"), verify.Name{Host: ok.Host}, subject.Digest},
		"path that climbs":   {ok.Host, at("http://m/hub"), verify.Name{Host: ok.Host, Path: "../secret"}, subject.Digest},
		"path with a query":  {ok.Host, at("http://m"), verify.Name{Host: ok.Host, Path: "a?b"}, subject.Digest},
		"no digest":          {ok.Host, at("http://m"), ok, ""},
		"digest that climbs": {ok.Host, at("http://m"), ok, "sha256:../../x"},
	} {
		src := registry.New(registry.Mirror{Host: tt.host, URL: tt.url, Client: dead})
		d := subject
		d.Digest = tt.subject
		err := src.Find(t.Context(), tt.in, d, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
		if !errors.Is(err, verify.ErrUnreachable) {
			t.Errorf("%s: error %v", name, err)
		}
		if _, _, err := src.Manifest(t.Context(), tt.in, tt.subject); err == nil {
			t.Errorf("%s: a manifest", name)
		}
		if text := fmt.Sprint(src.Name(), err); strings.Contains(text, "s3cret") {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func TestManifest(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	g := serve(c)
	both := c.Add("", []byte(`{"mediaType":"`+ocispec.MediaTypeImageManifest+`","manifests":[],"layers":[]}`))
	big := c.Add("", append([]byte(`{"layers":[]}`), bytes.Repeat([]byte(" "), 4<<20)...))
	changed := c.Add("", []byte(`{"layers":[1]}`))
	c.Blobs[changed.Digest] = []byte(`{"layers":[2]}`)
	g.Content = c
	src := open(t, g)

	got, raw, err := src.Manifest(t.Context(), sourcetest.Name, subject.Digest)
	if err != nil || got.MediaType != subject.MediaType || got.Digest != subject.Digest || got.Size != subject.Size ||
		digest.FromBytes(raw) != subject.Digest {
		t.Errorf("%v, error %v", got, err)
	}
	if n := len(g.Requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
	if _, _, err = src.Manifest(t.Context(), sourcetest.Name, both.Digest); !errors.Is(err, oci.ErrAmbiguous) {
		t.Errorf("ambiguous: %v", err)
	}
	if _, _, err = src.Manifest(t.Context(), sourcetest.Name, digest.FromString("nothing")); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("missing: %v", err)
	}
	if _, _, err = src.Manifest(t.Context(), sourcetest.Name, big.Digest); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("big: %v", err)
	}
	if _, _, err = src.Manifest(t.Context(), sourcetest.Name, changed.Digest); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("changed: %v", err)
	}
}

func TestManifestRefused(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	src := open(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }))
	if _, _, err := src.Manifest(t.Context(), sourcetest.Name, subject.Digest); !errors.Is(err, verify.ErrUnauthorized) {
		t.Errorf("error %v", err)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Whatever a registry answers to the listing, the question ends within its limits,
// stays at the registry, and hands over only what has the digest it is listed with.
func FuzzReferrers(f *testing.F) {
	c, subject, want := signed(2)
	list := func(n int) string {
		g := serve(c)
		w := httptest.NewRecorder()
		g.ServeHTTP(w, httptest.NewRequest("GET", "/v2/team/app/referrers/"+subject.Digest.String(), nil))
		return strings.Repeat(w.Body.String(), n)
	}
	f.Add(200, ocispec.MediaTypeImageIndex, "", "artifactType", list(1))
	f.Add(200, ocispec.MediaTypeImageIndex+"; x=y", `</v2/team/app/referrers/x?y=z>; rel="next"`, "", list(2))
	f.Add(404, "text/plain", "", "", "")
	f.Add(200, ocispec.MediaTypeImageIndex, `<//other/x>`, "artifactType", `{"manifests":[{"mediaType":"`+ocispec.MediaTypeImageManifest+`","digest":"x","size":-1}]}`)
	f.Add(302, "", "/elsewhere", "", "")
	f.Add(401, "", `Bearer realm="https://mirror.test/token"`, "", `{"token":"x"}`)
	f.Add(401, "", `Bearer realm="https://mIrror.test:443/token"`, "", `{"token":"x"}`)
	f.Add(401, "", `Bearer realm="https://other.test/token"`, "", `{"token":"x"}`)
	f.Fuzz(func(t *testing.T, code int, contentType, link, filters, body string) {
		requests := 0
		client := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			requests++
			// Another spelling of the same origin is the mirror itself.
			if p := r.URL.Port(); r.URL.Scheme != "https" || !strings.EqualFold(r.URL.Hostname(), "mirror.test") || p != "" && p != "443" || strings.HasPrefix(r.Header.Get("Authorization"), "Basic") {
				t.Fatalf("asked %s %v", r.URL, r.Header)
			}
			resp := &http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: r, ContentLength: -1}
			_, ref, _ := strings.Cut(r.URL.Path, "sha256:")
			if raw, ok := c.Blobs[digest.Digest("sha256:"+ref)]; ok && !strings.Contains(r.URL.Path, "/referrers/") {
				resp.Header.Set("Content-Type", ocispec.MediaTypeImageManifest)
				resp.Body = io.NopCloser(bytes.NewReader(raw))
				return resp, nil
			}
			resp.StatusCode = code
			resp.Header.Set("Content-Type", contentType)
			resp.Header.Set("Link", link)
			resp.Header.Set("Location", link)
			resp.Header.Set("WWW-Authenticate", link)
			resp.Header.Set("OCI-Filters-Applied", filters)
			resp.Body = io.NopCloser(strings.NewReader(body))
			return resp, nil
		})}
		src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: &url.URL{Scheme: "https", Host: "mirror.test"}, Client: client})
		limits := verify.Limits{Pages: 3, Signatures: 5}
		got, err := sourcetest.Find(t.Context(), src, subject, limits)
		// Each may be redirected twice, and one be challenged.
		if requests > 3*(limits.Pages+2*limits.Signatures)+4 {
			t.Errorf("%d requests", requests)
		}
		for _, ev := range got {
			if ev.Err == nil && string(ev.Blob) != string(want[0].Blob) && string(ev.Blob) != string(want[1].Blob) {
				t.Errorf("blob %q", ev.Blob)
			}
		}
		known := false
		for _, class := range []error{nil, verify.ErrUnreachable, verify.ErrUnauthorized, verify.ErrNoReferrers, verify.ErrBudget} {
			known = known || errors.Is(err, class)
		}
		if !known || len(fmt.Sprint(err)) > 1000 {
			t.Errorf("error %v", err)
		}
	})
}
