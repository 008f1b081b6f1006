package main

import (
	"archive/tar"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// fixture is the command that makes what scripts work on:
//
//	fixture config DIR [mode=audit] [timeout=300ms] [level=skip] [scope=host/path] [mirror=HOST=URL] [layout=DIR]
//	fixture layout DIR IMAGE... [without=images|signatures|manifests]
//	fixture tar FILE DIR
//	fixture break DIR DIGEST other|pipe|link|huge
//	fixture mirror VAR IMAGE... [without=...] [as=team/app] [does=tags|notags|refuses|hangs|floods|drips|redirects]
//
// A layout or mirror holds the images as team/app, a mirror under their names as tags
// too. A mirror stores its URL in
// VAR, and ends with the script; what it was asked, "fixture requests VAR FILE"
// writes down; "fixture started VAR" waits until it was asked. A configuration trusts signatures of imagetest.Identity for every image.
func fixture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: fixture config|layout|tar|mirror|requests NAME ...")
	}
	option := map[string]string{}
	var names []string
	for _, a := range args[2:] {
		if k, v, found := strings.Cut(a, "="); found {
			option[k] = v
		} else {
			names = append(names, a)
		}
	}
	switch args[0] {
	case "config":
		fixtureConfig(ts, ts.MkAbs(args[1]), option)
	case "layout":
		c, err := imagetest.Content(names, option["without"])
		ts.Check(err)
		ts.Check(imagetest.WriteLayout(ts.MkAbs(args[1]), c))
	case "tar":
		f, err := os.Create(ts.MkAbs(args[1]))
		ts.Check(err)
		w := tar.NewWriter(f)
		ts.Check(w.AddFS(os.DirFS(ts.MkAbs(names[0]))))
		ts.Check(w.Close())
		ts.Check(f.Close())
	case "mirror":
		c, err := imagetest.Content(names, option["without"])
		ts.Check(err)
		fixtureMirror(ts, args[1], c, option)
	case "requests":
		g := registries.of(ts.Getenv(args[1]))
		ts.Check(os.WriteFile(ts.MkAbs(names[0]), []byte(strings.Join(g.Requests(), "\n")), 0o644))
	case "break":
		breakBlob(ts, ts.MkAbs(args[1]), digest.Digest(names[0]), names[1])
	case "started":
		for g := registries.of(ts.Getenv(args[1])); len(g.Requests()) == 0; {
			time.Sleep(10 * time.Millisecond)
		}
	default:
		ts.Fatalf("no fixture %s", args[0])
	}
}

func fixtureConfig(ts *testscript.TestScript, dir string, option map[string]string) {
	s := notarytest.Statement("prod", imagetest.Identity)
	if scope := option["scope"]; scope != "" {
		s.Scopes = []string{scope}
	}
	if level := option["level"]; level != "" {
		s.Level = level
	}
	if s.Level == "skip" {
		s.TrustStores, s.TrustedIdentities = nil, nil
		s.Scopes = []string{"registry.test/team/app"}
	}
	ts.Check(notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": imagetest.World().Root}, s))
	mode, wall := "enforce", "10s"
	if m := option["mode"]; m != "" {
		mode = m
	}
	if w := option["wall"]; w != "" {
		wall = w
	}
	y := fmt.Sprintf("version: 1\nmode: %s\nlimits:\n  timeout: %s\n", mode, wall)
	if option["mirror"] != "" || option["layout"] != "" {
		y += "sources:\n"
	}
	if m := option["mirror"]; m != "" {
		host, url, _ := strings.Cut(m, "=")
		y += fmt.Sprintf("  mirrors:\n    - host: %q\n      url: %s\n", host, url)
	}
	if l := option["layout"]; l != "" {
		y += fmt.Sprintf("  layouts:\n    - %s\n", ts.MkAbs(l))
	}
	ts.Check(os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(y), 0o644))
}

// breakBlob puts something else where the layout in dir has the blob d.
func breakBlob(ts *testscript.TestScript, dir string, d digest.Digest, how string) {
	blob := filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded())
	raw, err := os.ReadFile(blob)
	ts.Check(err)
	ts.Check(os.Remove(blob))
	switch how {
	case "other":
		ts.Check(os.WriteFile(blob, append([]byte(" "), raw[:len(raw)-1]...), 0o644))
	case "pipe":
		ts.Check(syscall.Mkfifo(blob, 0o644))
	case "link":
		outside := filepath.Join(filepath.Dir(dir), "outside")
		ts.Check(os.WriteFile(outside, raw, 0o644))
		ts.Check(os.Symlink(outside, blob))
	case "huge":
		ts.Check(os.WriteFile(blob, nil, 0o644))
		ts.Check(os.Truncate(blob, 1<<40))
	default:
		ts.Fatalf("nobody knows how to break with %s", how)
	}
}

// registries are the mirrors of all scripts, by URL.
var registries registryList

type registryList struct {
	mu  sync.Mutex
	all map[string]*sourcetest.Registry
}

func (l *registryList) add(url string, g *sourcetest.Registry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[string]*sourcetest.Registry{}
	}
	l.all[url] = g
}

func (l *registryList) of(url string) *sourcetest.Registry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[url]
}

// fixtureRedirects serves g with https and its blobs at another port, as public
// registries do, the host and port of which is in VAR_cdn. GitHub's has no Referrers
// API either, and leads who asks for it to its web pages.
func fixtureRedirects(ts *testscript.TestScript, variable string, g *sourcetest.Registry) {
	cdn := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(g.Content.Blobs[digest.Digest("sha256:"+path.Base(r.URL.Path))])
	}))
	ts.Defer(cdn.Close)
	g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.Contains(r.URL.Path, "/blobs/"):
			_, hex, _ := strings.Cut(path.Base(r.URL.Path), ":")
			http.Redirect(w, r, cdn.URL+"/secret-path/"+hex+"?sig=s3cret", http.StatusTemporaryRedirect)
		case strings.Contains(r.URL.Path, "/referrers/"):
			http.Redirect(w, r, "https://web.test/-/v2/packages?sig=s3cret", http.StatusSeeOther)
		default:
			return false
		}
		return true
	}
	srv := httptest.NewTLSServer(g)
	ts.Defer(srv.Close)
	file := ts.MkAbs("ca.crt") // of both
	ts.Check(os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o644))
	ts.Setenv("SSL_CERT_FILE", file)
	ts.Setenv(variable, srv.URL)
	ts.Setenv(variable+"_cdn", strings.TrimPrefix(cdn.URL, "https://"))
}

func fixtureMirror(ts *testscript.TestScript, variable string, c sourcetest.Content, option map[string]string) {
	g := &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path, Tags: map[string]digest.Digest{}}
	for name, img := range imagetest.World().Images {
		if _, held := c.Blobs[img.Target.Digest]; held {
			g.Tags[name] = img.Target.Digest
		}
	}
	if as := option["as"]; as != "" {
		g.Repository = as
	}
	g.Tags = map[string]digest.Digest{}
	for name, img := range imagetest.World().Images {
		g.Tags[name] = img.Target.Digest
	}
	end := make(chan struct{}) // closed when the script ends
	wait := func(r *http.Request) {
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}
	switch does := option["does"]; does {
	case "":
	case "tags":
		g.NoAPI = true
	case "notags":
		g.NoAPI, g.NoTags = true, true
	case "refuses":
		g.Intercept = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token?secret=hunter2"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	case "redirects":
		fixtureRedirects(ts, variable, g)
		return
	case "hangs":
		g.Intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			wait(r)
			return true
		}
	case "floods":
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					break
				}
			}
			return true
		}
	case "drips":
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			for r.Context().Err() == nil {
				w.Write([]byte(" "))
				w.(http.Flusher).Flush()
				select {
				case <-time.After(20 * time.Millisecond):
				case <-end:
					return true
				}
			}
			return true
		}
	default:
		ts.Fatalf("a mirror does not know how to %s", does)
	}
	srv := httptest.NewServer(g)
	ts.Defer(srv.Close)
	ts.Defer(func() { close(end) })
	registries.add(srv.URL, g)
	ts.Setenv(variable, srv.URL)
}
