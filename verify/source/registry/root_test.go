package registry_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A registry that has its API elsewhere, and the repository under another name, is
// asked there: also for further pages, to which its links lead, and by tag.
func TestRoot(t *testing.T) {
	t.Parallel()
	for root, at := range map[string]string{
		"": "/v2", "/v2": "/v2", "/": "", "/hub/v2": "/hub/v2", "/artifactory/api/docker/remote": "/artifactory/api/docker/remote",
		"/v2/" + sourcetest.Name.Path: "/v2/" + sourcetest.Name.Path, "/v2/v2": "/v2/v2",
	} {
		for _, noAPI := range []bool{false, true} {
			t.Run(root, func(t *testing.T) {
				t.Parallel()
				c, subject, want := signed(3)
				g := serve(c)
				g.PageSize, g.NoAPI = 2, noAPI
				var mu sync.Mutex
				wrong := ""
				u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					rest, found := strings.CutPrefix(r.URL.Path, at+"/"+sourcetest.Name.Path+"/")
					if !found || r.Header.Get("X-Site") != "yes" {
						mu.Lock()
						wrong += r.URL.Path + " "
						mu.Unlock()
					}
					r.URL.Path = "/v2/" + sourcetest.Name.Path + "/" + rest
					rec := httptest.NewRecorder()
					g.ServeHTTP(rec, r)
					for k, v := range rec.Header() {
						w.Header()[k] = v
					}
					// Its links are to where it is.
					if link := w.Header().Get("Link"); link != "" {
						w.Header().Set("Link", strings.Replace(link, "</v2/", "<"+at+"/", 1))
					}
					w.WriteHeader(rec.Code)
					w.Write(rec.Body.Bytes())
				}))
				src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Root: root, Header: http.Header{"X-Site": {"yes"}, "Accept": {"text/html"}}, Client: client(t, nil)})
				got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
				if err != nil || wrong != "" {
					t.Fatalf("error %v, asked at %s", err, wrong)
				}
				sourcetest.Check(t, got, want, 0)
				name := "mirror " + u.String()
				if at != "/v2" {
					name += at
				}
				if src.Name() != name {
					t.Errorf("name %s, want %s", src.Name(), name)
				}
			})
		}
	}
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: &url.URL{Scheme: "http", Host: "127.0.0.1:1", Path: "/hub"}, Root: "/x"})
	_, subject, _ := signed(0)
	if _, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("two paths: %v", err)
	}
}

func TestRewrite(t *testing.T) {
	t.Parallel()
	rule := func(from, to string) registry.Rewrite {
		return registry.Rewrite{From: regexp.MustCompile(from), To: to}
	}
	for name, tt := range map[string]struct {
		rules []registry.Rewrite
		want  string // "": nobody is asked
	}{
		"none":              {nil, sourcetest.Name.Path},
		"anchored":          {[]registry.Rewrite{rule("^(.*)$", "mirrorproject/$1")}, "mirrorproject/" + sourcetest.Name.Path},
		"no match":          {[]registry.Rewrite{rule("^nothing/", "x/")}, sourcetest.Name.Path},
		"first that counts": {[]registry.Rewrite{rule("^nothing/", "x/"), rule("^", "a/"), rule("^", "b/")}, "a/" + sourcetest.Name.Path},
		"no repository":     {[]registry.Rewrite{rule("^", "../")}, ""},
		"another path":      {[]registry.Rewrite{rule("^.*$", "x/manifests/y?z")}, ""},
		"empty":             {[]registry.Rewrite{rule("^.*$", "")}, ""},
		"long":              {[]registry.Rewrite{rule("^.*$", strings.Repeat("a", 513))}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, subject, _ := signed(0)
			var mu sync.Mutex
			var asked []string
			u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				path, _, _ := strings.Cut(r.URL.RequestURI(), "/referrers/")
				mu.Lock()
				asked = append(asked, strings.TrimPrefix(path, "/v2/"))
				mu.Unlock()
				w.WriteHeader(http.StatusForbidden)
			}))
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Rewrite: tt.rules, Client: client(t, nil)})
			_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if tt.want == "" {
				if !errors.Is(err, verify.ErrUnreachable) || asked != nil {
					t.Errorf("asked %q: %v", asked, err)
				}
			} else if len(asked) != 1 || asked[0] != tt.want {
				t.Errorf("asked %q: %v", asked, err)
			}
		})
	}
}

// Headers go to the mirror alone, also not to where it redirects to or has its
// tokens from, and no error repeats them.
func TestHeaderIsSecret(t *testing.T) {
	t.Parallel()
	const secret = "geheim-geheim-geheim"
	_, subject, _ := signed(0)
	elsewhere := start(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked elsewhere: %v", r.Header) }))
	var realm *url.URL
	tokens := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Site") != "" || r.Header.Get("Authorization") != "" {
			t.Error("the token server is told")
		}
		w.Write([]byte(`{"token": "abc"}`))
	}))
	realm = tokens
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.String()+"/"+r.Header.Get("X-Site"), http.StatusTemporaryRedirect)
		},
		"challenge": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm.String()+`/t",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
		"echo": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", r.Header.Get("X-Site"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, h), Realm: realm, RealmClient: client(t, nil), Client: client(t, nil),
				Header: http.Header{"X-Site": {secret}, "Authorization": {"Basic " + secret}}})
			_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if err == nil || strings.Contains(err.Error(), "geheim") {
				t.Errorf("error %v", err)
			}
		})
	}
}
