package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/mirror"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// certsD makes a certs.d of files.
func certsD(t *testing.T, files ...string) string {
	t.Helper()
	return write(t, with(map[string]string{"none.test/hosts.toml": "#"}, files...))
}

// sourcesOf is config.yaml with these sources.
func sourcesOf(lines ...string) string {
	return minimal + "sources:\n  " + strings.Join(lines, "\n  ") + "\n"
}

func namesOf(c *Config, host string) string {
	var list []string
	for _, s := range c.Sources()(verify.Name{Host: host, Path: "a/b"}) {
		list = append(list, strings.TrimPrefix(s.Name(), "mirror "))
	}
	return strings.Join(list, " ")
}

func TestHosts(t *testing.T) {
	t.Parallel()
	files := []string{
		"docker.io/hosts.toml", "server = 'https://registry-1.docker.io'\n[host.'https://m.site/v2']\n[host.'http://10.0.0.5:5000/hub']\n",
		"r.site_5000_/hosts.toml", "server = 'http://r.site:5000'\n",
		"pushed.site/hosts.toml", "server = 'https://pushed.site'\ncapabilities = ['push']\n",
	}
	fallback := append(files[:len(files):len(files)], "_default/hosts.toml", "[host.'https://any.site']\n")
	twice := []string{
		"docker.io/hosts.toml", "server = 'https://m.site'\n[host.'https://m.site']\n[host.'https://m.site/hub']\n",
		"quay.io/hosts.toml", "server = 'https://quay.io'\n[host.'https://quay.io']\ncapabilities = ['pull', 'resolve']\n",
		"r.site/hosts.toml", "[host.'https://r.site']\n",
		"s.site/hosts.toml", "server = 'https://m.site'\nskip_verify = true\n[host.'https://m.site']\n",
		"t.site/hosts.toml", "server = 'https://m.site'\n[host.'https://m.site'.rewrite]\n'^(.*)$' = 'x/$1'\n",
	}
	for name, tt := range map[string]struct {
		files []string
		lines []string
		want  map[string]string
	}{
		"not said": {files, nil, map[string]string{
			"docker.io": "https://m.site http://10.0.0.5:5000/hub/v2", "r.site:5000": "http://r.site:5000", "pushed.site": "", "quay.io": "https://quay.io"}},
		"mirrors": {files, []string{"network: mirrors"}, map[string]string{
			"docker.io": "https://m.site http://10.0.0.5:5000/hub/v2", "r.site:5000": "", "pushed.site": "", "quay.io": "", "169.254.169.254": ""}},
		"origin": {files, []string{"network: origin"}, map[string]string{
			"docker.io": "https://m.site http://10.0.0.5:5000/hub/v2 https://registry-1.docker.io", "r.site:5000": "http://r.site:5000", "pushed.site": "", "quay.io": "https://quay.io"}},
		"default": {fallback, []string{"network: origin"}, map[string]string{
			"docker.io": "https://m.site http://10.0.0.5:5000/hub/v2 https://registry-1.docker.io", "quay.io": "https://any.site https://quay.io", "pushed.site": ""}},
		"default, mirrors": {fallback, []string{"network: mirrors"}, map[string]string{"quay.io": "https://any.site", "169.254.169.254": "https://any.site", "r.site:5000": ""}},
		"config.yaml goes before": {files, []string{"network: origin", "mirrors:", "  - {host: docker.io, url: 'https://c.site/x'}", "  - {host: docker.io, url: 'https://m.site/hub'}", "  - {host: quay.io, url: 'https://quay.io', ns: true}"}, map[string]string{
			"docker.io": "https://c.site/x https://m.site/hub http://10.0.0.5:5000/hub/v2 https://registry-1.docker.io", "quay.io": "https://quay.io"}},
		"named twice": {twice, []string{"network: origin"}, map[string]string{
			"docker.io": "https://m.site https://m.site/hub/v2", "quay.io": "https://quay.io", "r.site": "https://r.site",
			"s.site": "https://m.site https://m.site", "t.site": "https://m.site https://m.site"}},
		"none": {files, []string{"network: mirrors", "hosts: none"}, map[string]string{"docker.io": "", "quay.io": ""}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lines := tt.lines
			if !strings.Contains(fmt.Sprint(lines), "hosts: none") {
				lines = append(lines, "hosts: "+certsD(t, tt.files...))
			}
			c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf(lines...))))
			for host, want := range tt.want {
				if got := namesOf(c, host); got != want {
					t.Errorf("%s: %q, want %q", host, got, want)
				}
			}
		})
	}
}

func TestHostsUsual(t *testing.T) {
	t.Parallel()
	k3s, own := certsD(t, "docker.io/hosts.toml", "[host.'https://k3s.site']"), certsD(t, "docker.io/hosts.toml", "[host.'https://own.site']")
	for _, tt := range []struct {
		usual    []string
		want     string
		warnings int
	}{
		{[]string{"/nowhere/certs.d", k3s, own}, k3s, 1},
		{[]string{"/nowhere/certs.d", own}, own, 0},
		{[]string{"/nowhere/certs.d"}, "", 0},
	} {
		d, err := openDirectory(t.TempDir())
		must(t, err)
		var c Config
		must(t, d.hostsIn("", tt.usual, &c))
		must(t, d.Close())
		if c.Hosts != tt.want || len(c.Warnings) != tt.warnings || len(d.trees) != len(tt.usual) {
			t.Errorf("%v: got %s, %v", tt.usual, c.Hosts, c.Warnings)
		}
	}
	if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("hosts: /nowhere/certs.d")))); err == nil {
		t.Error("a directory that is named and not there is no error")
	}
}

// A hosts.toml that is broken is an error, and the host that it is about is not
// asked in its place.
func TestHostsBroken(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"server = 'https://a.site'\n[host.'https://b.site'\n":        "/docker.io/hosts.toml:2: not TOML",
		"[header]\nAuthorization = \"Basic geheim-geheim\n":          "/docker.io/hosts.toml:2: not TOML",
		"[host.'https://me:geheim@b.site']\n":                        "/docker.io/hosts.toml:1: the URL of a host has a user, query or fragment",
		"\n[host.'https://b.site']\nca = 'nowhere.crt'\n":            `/docker.io/hosts.toml:3: "nowhere.crt": no such file or directory`,
		"# " + strings.Repeat("x", 64<<10):                           "/docker.io/hosts.toml: larger than 65536 bytes",
		"[host.'https://b.site']\nclient = ['pipe']\n":               `/docker.io/hosts.toml:1: "pipe": not a regular file`,
		"[host.'https://b.site'.rewrite]\n'^(' = 'x'\n":              `/docker.io/hosts.toml:2: rewrite: "^(" is no regular expression`,
		"[host.'https://b.site']\ncapabilities = ['pull', 'walk']\n": `/docker.io/hosts.toml:2: unknown capability "walk"`,
	} {
		certs := certsD(t, "docker.io/hosts.toml", text)
		must(t, syscall.Mkfifo(filepath.Join(certs, "docker.io", "pipe"), 0o600))
		_, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("hosts: "+certs))))
		e := (*Error)(nil)
		if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), certs) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%q: got %v", text, err)
		} else if got := strings.TrimPrefix(err.Error(), certs); got != want && !strings.Contains(text, "nowhere") && !strings.Contains(text, "pipe") {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
	certs := certsD(t, "docker.io/hosts.toml", "#")
	must(t, os.Chmod(certs+"/docker.io/hosts.toml", 0o666))
	if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("hosts: "+certs)))); err == nil || !strings.Contains(err.Error(), "everybody can write") {
		t.Errorf("a file that everybody can write: %v", err)
	}
}

func TestWatchHosts(t *testing.T) {
	certs := filepath.Join(t.TempDir(), "certs.d")
	fill(t, certs, map[string]string{"docker.io/hosts.toml": "[host.'https://a.site']"})
	dir := write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors", "hosts: "+certs)))
	first := load1(t, dir)
	w := startWatching(t, dir, first, time.Hour)
	w.quiet("the start")
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://b.site']")
	if c := w.good("hosts.toml replaced"); c.Epoch == first.Epoch || namesOf(c, "docker.io") != "https://b.site" {
		t.Errorf("got %s", namesOf(c, "docker.io"))
	}
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://c.site'")
	w.bad("broken", "/docker.io/hosts.toml:1: not TOML")
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://a.site']")
	if c := w.good("as it was"); c.Epoch != first.Epoch {
		t.Error("another epoch")
	}
	must(t, os.Mkdir(certs+"/quay.io", 0o755))
	if c := w.good("a directory for another host"); c.Epoch == first.Epoch {
		t.Error("the same epoch")
	}
	fill(t, certs, map[string]string{"quay.io/hosts.toml": "[host.'https://q.site']"})
	for { // it may be seen while it is empty
		if c := w.good("a file in it"); namesOf(c, "quay.io") == "https://q.site" {
			break
		}
	}
}

// asked records what a registry with no signatures is asked.
type asked struct {
	mu   sync.Mutex
	list []string
}

func (a *asked) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	who := "nobody"
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		who = "node"
	}
	path, _, _ := strings.Cut(r.URL.Path, "/sha256:")
	a.list = append(a.list, strings.TrimSpace(who+" "+path+" ns="+r.URL.Query().Get("ns")+" "+r.Header.Get("X-Site")))
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	io.WriteString(w, `{"schemaVersion": 2, "mediaType": "`+ocispec.MediaTypeImageIndex+`", "manifests": []}`)
}

func (a *asked) all() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := strings.Join(a.list, ", ")
	a.list = nil
	return s
}

// find asks the sources of c for signatures, and fails where one is shown a secret.
func find(t *testing.T, c *Config, host, path string) (errs []error) {
	t.Helper()
	n := verify.Name{Host: host, Path: path}
	for _, s := range c.Sources()(n) {
		err := s.Find(t.Context(), n, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1},
			verify.NewBudget(verify.Limits{}), func(verify.Evidence) bool { return true })
		if text := fmt.Sprintf("%v %s %s %v %+v %#v", err, s.Name(), c.Epoch, c.Warnings, c, *c); strings.Contains(text, "geheim") {
			t.Errorf("a secret is shown: %s", text)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// A real server with a certificate of a private CA, which wants a client
// certificate, as k3s's embedded registry does.
func TestHostsTLS(t *testing.T) {
	cert, key := pairOf(t, "node")
	var got asked
	srv := httptest.NewUnstartedServer(&got)
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM([]byte(cert))
	srv.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes
	srv.StartTLS()
	defer srv.Close()
	defer srv.CloseClientConnections()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	all := "[host.'" + srv.URL + "/x/v2']\ncapabilities = ['pull', 'resolve']\noverride_path = true\nca = ['ca.crt']\nclient = [['node.crt', 'node.key']]\n" +
		"[host.'" + srv.URL + "/x/v2'.rewrite]\n'^rancher/(.*)' = 'mirrorproject/rancher-images/$1'\n[host.'" + srv.URL + "/x/v2'.header]\nX-Site = 'geheim-geheim'\n"
	load := func(text string) *Config {
		return load1(t, write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors", "hosts: "+certsD(t,
			"docker.io/hosts.toml", text, "docker.io/ca.crt", ca, "docker.io/node.crt", cert, "docker.io/node.key", key)))))
	}
	c := load(all)
	if errs := find(t, c, "docker.io", "rancher/pause"); errs != nil {
		t.Fatal(errs)
	}
	if s := got.all(); s != "node /x/v2/mirrorproject/rancher-images/pause/referrers ns=docker.io geheim-geheim" {
		t.Errorf("asked %s", s)
	}
	if errs := find(t, c, "docker.io", "library/nginx"); errs != nil || got.all() != "node /x/v2/library/nginx/referrers ns=docker.io geheim-geheim" {
		t.Error("another path is asked for", errs)
	}
	for name, text := range map[string]string{
		"without CA":          strings.Replace(all, "ca = ['ca.crt']\n", "", 1),
		"without certificate": strings.Replace(all, "client = [['node.crt', 'node.key']]\n", "", 1),
	} {
		if errs := find(t, load(text), "docker.io", "library/nginx"); len(errs) != 1 || !errors.Is(errs[0], verify.ErrUnreachable) {
			t.Errorf("%s: %v", name, errs)
		}
	}
	c = load(strings.Replace(all, "ca = ['ca.crt']", "skip_verify = true", 1))
	if errs := find(t, c, "docker.io", "library/nginx"); errs != nil || got.all() == "" || !strings.Contains(fmt.Sprint(c.Warnings), "can hide signatures") {
		t.Errorf("skip_verify: %v, %v", errs, c.Warnings)
	}
}

// Each kind of registry has its blobs where the field says that it may have them, the
// certificates there come from the registry's CA, and no other is shown there.
func TestRedirects(t *testing.T) {
	var content sourcetest.Content
	subject := content.Image("app")
	content.Sign(subject, verify.MediaTypeJWS, "envelope")
	secured := func(h http.Handler) *url.URL {
		srv := httptest.NewUnstartedServer(h)
		srv.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.StartTLS()
		t.Cleanup(srv.Close)
		u, err := url.Parse(srv.URL)
		must(t, err)
		return u
	}
	var blobs atomic.Int64
	cdn := secured(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) > 0 || len(r.Header) != 2 {
			t.Errorf("was told %v", r.Header)
		}
		blobs.Add(1)
		w.Write([]byte("envelope"))
	}))
	var known atomic.Int64
	registry := secured(&sourcetest.Registry{Content: content, Repository: "app", Intercept: func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if len(r.TLS.PeerCertificates) > 0 {
			known.Add(1)
		}
		http.Redirect(w, r, cdn.String()+"/x?sig=geheim-geheim", http.StatusTemporaryRedirect)
		return true
	}})
	own := httptest.NewTLSServer(nil) // all of httptest have the same certificate
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificate().Raw}))
	own.Close()
	cert, key := pairOf(t, "node")
	listed := "mirrors: [{host: registry.test, url: \"" + registry.String() + "\", ca: ca.crt, cert: node.crt, key: node.key%s}]"
	toml := certsD(t, "registry.test/hosts.toml", "[host.'"+registry.String()+"']\nca = ['ca.crt']\nclient = [['node.crt', 'node.key']]\n",
		"registry.test/ca.crt", ca, "registry.test/node.crt", cert, "registry.test/node.key", key)
	itself := certsD(t, strings.Replace(registry.Host, ":", "_", 1)+"_/ca.crt", ca)
	unchecked := certsD(t, "registry.test/hosts.toml", "[host.'"+registry.String()+"']\nskip_verify = true\n")
	redirects := "redirects: [\"" + cdn.Host + "\"]"
	for name, tt := range map[string]struct {
		host, sources, hosts, with, field string
		shown, followed                   bool
	}{
		"mirror":               {"registry.test", fmt.Sprintf(listed, ", "+redirects), "none", "", "", true, true},
		"mirror, not listed":   {"registry.test", fmt.Sprintf(listed, ""), "none", redirects, "sources.mirrors[0].redirects", true, false},
		"mirror, command line": {"registry.test", fmt.Sprintf(listed, ""), "none", "", "", true, true},
		"hosts.toml":           {"registry.test", "", toml, redirects, "", true, true},
		"hosts.toml, nothing":  {"registry.test", "", toml, "", "sources.redirects", true, false},
		"the host itself":      {registry.Host, "", itself, redirects, "", false, true},
		"the host, nothing":    {registry.Host, "", itself, "", "sources.redirects", false, false},
		"any host, no address": {registry.Host, "", itself, "redirects: [\"*:" + cdn.Port() + "\"]", "sources.redirects", false, false},
		"unchecked":            {"registry.test", "", unchecked, redirects, "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			blobs.Store(0)
			known.Store(0)
			lines := []string{"hosts: " + tt.hosts}
			for _, l := range []string{tt.sources, tt.with} {
				if l != "" {
					lines = append(lines, l)
				}
			}
			c := load1(t, write(t, with(notation(), "ca.crt", ca, "node.crt", cert, "node.key", key, "config.yaml", sourcesOf(lines...))))
			if name == "mirror, command line" {
				p, err := mirror.ParsePattern(cdn.Host)
				must(t, err)
				c.Redirect([]mirror.Pattern{p})
			}
			n := verify.Name{Host: tt.host, Path: "app"}
			list := c.Sources()(n)
			if len(list) != 1 {
				t.Fatalf("%d sources", len(list))
			}
			var got []verify.Evidence
			err := list[0].Find(t.Context(), n, subject, verify.NewBudget(verify.Limits{}), func(e verify.Evidence) bool { got = append(got, e); return true })
			if strings.Contains(fmt.Sprint(err, c.Warnings), "geheim") || strings.Contains(fmt.Sprint(err), "/x") {
				t.Errorf("a secret is shown: %v", err)
			}
			if shown := known.Load() == 1; shown != tt.shown {
				t.Errorf("the registry knows the node: %v", shown)
			}
			if tt.followed {
				if err != nil || len(got) != 1 || string(got[0].Blob) != "envelope" || blobs.Load() != 1 {
					t.Errorf("%v, %v, %d requests", err, got, blobs.Load())
				}
				return
			}
			text := "is another host"
			if tt.field != "" {
				text = "at another host: if that is right, add " + cdn.Host + " to " + tt.field
			}
			if tt.hosts == unchecked {
				text = "certificate"
			}
			if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), text) || blobs.Load() != 0 {
				t.Errorf("%v, %d requests", err, blobs.Load())
			}
		})
	}
}

// What is written of localhost counts, and nothing else: containerd would try http
// after https there, and not check certificates.
func TestHostsLocalhost(t *testing.T) {
	var got asked
	plain := httptest.NewServer(&got)
	defer plain.Close()
	secure := httptest.NewUnstartedServer(&got)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	for _, at := range []string{plain.Listener.Addr().String(), secure.Listener.Addr().String()} {
		dir := strings.Replace(at, ":", "_", 1) + "_/hosts.toml"
		for _, text := range []string{"#", "server = 'https://" + at + "'", "[host.'https://" + at + "']"} {
			c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("hosts: "+certsD(t, dir, text)))))
			if errs := find(t, c, at, "a"); len(errs) != 1 || !errors.Is(errs[0], verify.ErrUnreachable) || got.all() != "" {
				t.Errorf("%s, %s: %v", at, text, errs)
			}
		}
	}
	at := plain.Listener.Addr().String()
	c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("hosts: "+certsD(t, strings.Replace(at, ":", "_", 1)+"_/hosts.toml", "server = 'http://"+at+"'")))))
	if errs := find(t, c, at, "a"); errs != nil || got.all() != "nobody /v2/a/referrers ns=" {
		t.Error("what is written is not asked", errs)
	}
}

// counter counts connections and answers none.
func counter(t *testing.T) (at string, n *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	n = new(atomic.Int64)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String(), n
}

// With network: never nobody is connected to, also not where containerd has mirrors
// and where the image's host is its own; the same configuration without it connects.
func TestNetworkNever(t *testing.T) {
	at, n := counter(t)
	image := verify.Image{
		Name: verify.Name{Host: at, Path: "a"}, Config: digest.FromString("c"), Use: verify.UseQuestion, Binding: verify.BoundDigest,
		Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1},
	}
	image.Manifest = image.Target
	ask := func(lines ...string) verify.Decision {
		c := load1(t, write(t, with(notation(), "config.yaml", "version: 1\nmode: enforce\nsources:\n  "+strings.Join(lines, "\n  ")+"\n", "trustpolicy.json", trustPolicy("*"))))
		setup, err := c.Setup(judgeItself, time.Now)
		must(t, err)
		var e verify.Enforcer
		e.Swap(setup)
		return e.Verify(t.Context(), image)
	}
	for _, line := range []string{"network: never", "network: mirrors"} {
		if d := ask(line, "hosts: none"); d.Allowed() || d.Reason != verify.SourceUnreachable || !strings.Contains(d.Detail, "no source of signatures is configured") || n.Load() != 0 {
			t.Errorf("%s: %s %s, %d connections", line, d.Reason, d.Detail, n.Load())
		}
	}
	certs := certsD(t, "_default/hosts.toml", "[host.'http://"+at+"']")
	if d := ask("network: mirrors", "hosts: "+certs); d.Reason != verify.SourceUnreachable || n.Load() == 0 {
		t.Errorf("mirrors: %s, %d connections", d.Reason, n.Load())
	}
	n.Store(0)
	if d := ask("hosts: none"); d.Reason != verify.SourceUnreachable || n.Load() == 0 {
		t.Errorf("its own mirror: %s, %d connections", d.Reason, n.Load())
	}
	for lines, want := range map[string]string{
		"mirrors: [{host: docker.io, url: 'http://" + at + "'}]": "sources.mirrors: has no use with network: never",
		"hosts: " + certs:        "sources.hosts: has no use with network: never",
		"hosts: auto":            "sources.hosts: has no use with network: never",
		"credentials: auth.json": "sources.credentials: has no use with network: never",
	} {
		if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("network: never", lines), "auth.json", "{}"))); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v", lines, err)
		}
	}
}

// An image that no rule matches, or that a rule denies, costs no connection.
func TestDeniedAsksNobody(t *testing.T) {
	at, n := counter(t)
	for scope, want := range map[string]verify.Reason{"docker.io/library/nginx": verify.PolicyNoMatch, "*": verify.PolicyInvalid} {
		text := strings.Replace(trustPolicy(scope), `"strict"`, `"audit"`, 1)
		c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("mirrors: [{host: '*', url: 'http://"+at+"'}]"), "trustpolicy.json", text)))
		setup, err := c.Setup(judgeItself, time.Now)
		must(t, err)
		setup.Mode = verify.Enforce
		var e verify.Enforcer
		e.Swap(setup)
		img := verify.Image{Name: verify.Name{Host: "quay.io", Path: "a"}, Use: verify.UseQuestion, Binding: verify.BoundDigest, Target: ocispec.Descriptor{Digest: digest.FromString("x")}}
		img.Manifest = img.Target
		if d := e.Verify(t.Context(), img); d.Reason != want || n.Load() != 0 {
			t.Errorf("%s: %s after %d connections", scope, d.Reason, n.Load())
		}
	}
}

// A pod may name any host. Those that are this machine's own on the link, as
// metadata services, are connected to only if the node's files name them.
func TestLinkLocal(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"none", certsD(t, "_default/hosts.toml", "skip_verify = true")} {
		c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("hosts: "+from))))
		for _, host := range []string{"169.254.169.254", "[fe80::1]:5000"} {
			if errs := find(t, c, host, "a"); len(errs) != 1 || !errors.Is(errs[0], verify.ErrUnreachable) || !strings.Contains(errs[0].Error(), "link-local") {
				t.Errorf("%s: %v", host, errs)
			}
		}
	}
}

// Rules and sources know an image by the name that the alias gives back, and the
// answer names it as the pod does.
func TestAliases(t *testing.T) {
	var got asked
	srv := httptest.NewServer(&got)
	defer srv.Close()
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+"aliases:\n  - {from: 127.0.0.1:31999/, to: docker.io/}\nsources:\n  hosts: none\n  mirrors:\n    - {host: docker.io, url: '"+srv.URL+"', ns: true, rewrite: {'^library/(.*)$': 'hub/$1'}}\n")))
	setup, err := c.Setup(judgeItself, time.Now)
	must(t, err)
	setup.Mode = verify.Enforce
	var e verify.Enforcer
	e.Swap(setup)
	name, err := policy.ParseName("127.0.0.1:31999/library/nginx:1.27-zarf-3793515731")
	must(t, err)
	img := verify.Image{Name: name, Use: verify.UseQuestion, Binding: verify.BoundDigest, Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}}
	img.Manifest = img.Target
	d := e.Verify(t.Context(), img)
	if d.Reason != verify.SignatureMissing || d.Rule != "prod" || got.all() != "nobody /v2/hub/nginx/referrers ns=docker.io" {
		t.Errorf("%s %s by rule %q", d.Reason, d.Detail, d.Rule)
	}
	if s := d.Message(img, ""); !strings.Contains(s, "127.0.0.1:31999/library/nginx:1.27-zarf-3793515731") {
		t.Errorf("message %s", s)
	}
	img.Name.Host = "127.0.0.1:3199"
	if d := e.Verify(t.Context(), img); d.Reason != verify.PolicyNoMatch {
		t.Errorf("another host: %s", d.Reason)
	}
}
