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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
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
		"none": {files, []string{"network: mirrors", "certsDir: none"}, map[string]string{"docker.io": "", "quay.io": ""}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lines := tt.lines
			if !strings.Contains(fmt.Sprint(lines), "certsDir: none") {
				lines = append(lines, "certsDir: "+certsD(t, tt.files...))
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
	second := certsD(t, "docker.io/hosts.toml", "[host.'https://second.site']", "ghcr.io/hosts.toml", "[host.'https://ghcr.site']")
	// toml is containerd's configuration with a config_path.
	toml := func(text string) string {
		return write(t, map[string]string{"config.toml": text}) + "/config.toml"
	}
	const v3 = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n"
	imports := write(t, map[string]string{
		"config.toml":    "version = 2\nimports = ['conf.d/*.toml']\n[plugins.'io.containerd.grpc.v1.cri'.registry]\n  config_path = '/nowhere'\n",
		"conf.d/50.toml": v3 + "  config_path = '" + second + "'\n",
	}) + "/config.toml"
	for name, tt := range map[string]struct {
		known    []runtime
		want     string
		warnings []string // pieces of each
	}{
		"the first that is there":  {known: []runtime{{"/nowhere", []string{"/nowhere/certs.d"}}, {"/nowhere", []string{k3s}}, {"/nowhere", []string{own}}}, want: k3s, warnings: []string{own + " is not"}},
		"one":                      {known: []runtime{{"/nowhere", []string{"/nowhere/certs.d"}}, {"/nowhere", []string{own}}}, want: own},
		"none":                     {known: []runtime{{"/nowhere", []string{"/nowhere/certs.d"}}}},
		"containerd's two":         {known: []runtime{{"/nowhere", []string{own, second}}}, want: own + ":" + second},
		"one of its two":           {known: []runtime{{"/nowhere", []string{"/nowhere/certs.d", second}}}, want: second},
		"config_path":              {known: []runtime{{toml(v3 + "config_path = '" + second + "'\n"), []string{own}}}, want: second},
		"config_path with a colon": {known: []runtime{{toml(v3 + "config_path = '" + own + ":" + second + "'\n"), []string{k3s}}}, want: own + ":" + second},
		"config_path in an import": {known: []runtime{{imports, []string{own}}}, want: second},
		"config_path that is not there": {known: []runtime{{toml(v3 + "config_path = '/nowhere/certs.d'\n"), []string{own}}}, want: own,
			warnings: []string{own + " is read instead: in a pod, mount it at the same path"}},
		"a usual one that is not there": {known: []runtime{{toml(v3 + "config_path = '/nowhere/certs.d'\n"), []string{"/nowhere/certs.d"}}}},
		"tables":                        {known: []runtime{{toml(v3 + "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'docker.io']\nendpoint = ['https://a.site']\n"), []string{own}}}, warnings: []string{"has registry.mirrors, which the gate does not read"}},
		"logins":                        {known: []runtime{{toml(v3 + "[plugins.'io.containerd.cri.v1.images'.registry.configs.'a.site'.auth]\npassword = 'secret'\n"), []string{"/nowhere"}}}, warnings: []string{"has registry.configs, which"}},
		"not TOML":                      {known: []runtime{{toml("password = secret\n"), []string{own}}}, want: own, warnings: []string{"config.toml: is not a configuration of containerd"}},
	} {
		d, err := openDirectory(t.TempDir())
		must(t, err)
		var c Config
		must(t, d.hostsIn(nil, tt.known, &c))
		must(t, d.Close())
		ok := c.Hosts == tt.want && len(c.Warnings) == len(tt.warnings)
		for i, w := range c.Warnings {
			ok = ok && strings.Contains(w.Text, tt.warnings[i]) && !strings.Contains(w.Text, "secret")
		}
		if !ok {
			t.Errorf("%s: got %s, %v", name, c.Hosts, c.Warnings)
		}
		for _, r := range tt.known[:1] {
			if !slices.Contains(d.outside, r.config) {
				t.Errorf("%s: %s is not watched", name, r.config)
			}
		}
	}
	if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("certsDir: /nowhere/certs.d")))); err == nil {
		t.Error("a directory that is named and not there is no error")
	}
}

// TestHostsSeveral: in their order, as containerd has them, and in both forms.
func TestHostsSeveral(t *testing.T) {
	t.Parallel()
	one := certsD(t, "docker.io/hosts.toml", "[host.'https://one.site']")
	two := certsD(t, "docker.io/hosts.toml", "[host.'https://two.site']", "ghcr.io/hosts.toml", "[host.'https://ghcr.site']")
	all := certsD(t, "_default/hosts.toml", "[host.'https://all.site']")
	for hosts, want := range map[string][2]string{ // of docker.io and ghcr.io
		one + ":" + two:              {"https://one.site", "https://ghcr.site"},
		"[" + two + ", " + one + "]": {"https://two.site", "https://ghcr.site"},
		one + ":" + all + ":" + two:  {"https://one.site", "https://all.site"},
		"/nowhere/certs.d:" + two:    {"https://two.site", "https://ghcr.site"},
	} {
		c, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors", "certsDir: "+hosts))))
		must(t, err)
		for i, host := range []string{"docker.io", "ghcr.io"} {
			if got := namesOf(c, host); got != want[i] {
				t.Errorf("%s: %s: %q, want %q", hosts, host, got, want[i])
			}
		}
	}
	for hosts, want := range map[string]string{
		one + ":":                        "absolute paths of certs.d directories",
		"[" + one + ", certs.d]":         "absolute paths of certs.d directories",
		one + ":" + one:                  "twice",
		"[auto]":                         "absolute paths of certs.d directories",
		"[" + one + ":" + two + "]":      "absolute paths of certs.d directories",
		"/nowhere/a:/nowhere/b":          "/nowhere/a: no such file or directory",
		strings.Repeat("/a/b:", 8) + one: "names",
	} {
		if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+quoted(hosts))))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", hosts, err)
		}
	}
}

// quoted is s as text of YAML, unless it is a list.
func quoted(s string) string {
	if strings.HasPrefix(s, "[") {
		return s
	}
	return "'" + s + "'"
}

// TestPlainHTTP: a mirror over http is one warning for each place, until it is accepted by
// name. That it is not looked at who answers is another matter.
func TestPlainHTTP(t *testing.T) {
	t.Parallel()
	dir := certsD(t, "docker.io/hosts.toml", "server = 'http://10.0.0.5:5000'\n[host.'http://10.0.0.5:5000']\n", "quay.io/hosts.toml", "[host.'http://10.0.0.5:5000']\n", "ghcr.io/hosts.toml", "[host.'https://skip.site']\n  skip_verify = true\n")
	count := func(more ...string) (n int, c *Config) {
		c, err := Load(write(t, with(notation(), "config.yaml", sourcesOf(append([]string{"certsDir: " + dir, "mirrors: [{host: a.site, url: 'http://b.site'}]"}, more...)...))))
		must(t, err)
		for _, w := range c.Warnings {
			if strings.Contains(w.Text, "anybody on the way") {
				n++
			}
		}
		return n, c
	}
	if n, c := count(); n != 4 { // two files over http, one not verified, and config.yaml
		t.Errorf("%d: %v", n, c.Warnings)
	}
	unused := func(c *Config) (list []string) {
		for _, w := range c.Warnings {
			if strings.HasPrefix(w.Field, "sources.acceptPlainHTTP") {
				list = append(list, w.Field+": "+w.Text)
			}
		}
		return list
	}
	n, c := count("acceptPlainHTTP: ['10.0.0.5:5000', skip.site, '10.0.0.5', c.site]")
	if n != 2 {
		t.Errorf("%d: %v", n, c.Warnings)
	}
	// One that nothing asks over http, such as one without its port, accepts nothing.
	want := []string{"sources.acceptPlainHTTP[1]: nothing at skip.site is asked", "sources.acceptPlainHTTP[2]: nothing at 10.0.0.5 is asked", "sources.acceptPlainHTTP[3]: nothing at c.site is asked"}
	if got := unused(c); !slices.EqualFunc(got, want, strings.HasPrefix) {
		t.Errorf("got %q, want %q", got, want)
	}
	n, c = count("acceptPlainHTTP: ['10.0.0.5:5000', b.site]")
	if got := unused(c); len(got) > 0 {
		t.Errorf("%q", got)
	}
	if n != 1 {
		t.Errorf("%d: %v", n, c.Warnings)
	}
	_, without := count()
	for _, host := range []string{"docker.io", "quay.io", "ghcr.io", "a.site"} {
		if a, b := namesOf(c, host), namesOf(without, host); a != b {
			t.Errorf("%s: it changes what is asked: %q and %q", host, a, b)
		}
	}
	for _, bad := range []string{"acceptPlainHTTP: true", "acceptPlainHTTP: ['http://a.site']", "acceptPlainHTTP: [a.site, a.site]", "acceptPlainHTTP: ['*']"} {
		if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf(bad)))); err == nil || !strings.Contains(err.Error(), "sources.acceptPlainHTTP") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestPlainHTTPSecrets: that signatures may be hidden can be accepted by name. That a
// password or a header goes out in plain text is said all the same, and so is a host that
// is asked over http itself.
func TestPlainHTTPSecrets(t *testing.T) {
	t.Parallel()
	const accept = "acceptPlainHTTP: ['10.0.0.5:5000']"
	login := `{"auths": {"10.0.0.5:5000": {"username": "u", "password": "p"}}}`
	for name, tt := range map[string]struct {
		file   string
		accept string
		login  bool
		want   string // of the one warning; empty: there is none
	}{
		"accepted":                 {"[host.'http://10.0.0.5:5000']\n", accept, false, ""},
		"accepted, with a login":   {"[host.'http://10.0.0.5:5000']\n", accept, true, "read the credentials"},
		"accepted, with a header":  {"[host.'http://10.0.0.5:5000']\n  [host.'http://10.0.0.5:5000'.header]\n    x-secret = 'a'\n", accept, false, "read the credentials"},
		"not accepted":             {"[host.'http://10.0.0.5:5000']\n", "network: origin", true, "can hide signatures"},
		"the host itself":          {"server = 'http://10.0.0.5:5000'\n", "network: origin", false, "can hide signatures"},
		"itself, and not asked":    {"server = 'http://10.0.0.5:5000'\n", "network: mirrors", false, ""},
		"itself, accepted":         {"server = 'http://10.0.0.5:5000'\n", accept, false, ""},
		"itself, login":            {"server = 'http://10.0.0.5:5000'\n", accept, true, "read the credentials"},
		"itself, without checking": {"skip_verify = true\n", accept, true, "can hide signatures"},
	} {
		dir := certsD(t, "10.0.0.5:5000/hosts.toml", tt.file)
		all := with(notation(), "config.yaml", sourcesOf("certsDir: "+dir, tt.accept))
		if tt.login {
			all = with(notation(), "config.yaml", sourcesOf("certsDir: "+dir, tt.accept, "credentials: logins.json"), "logins.json", login)
		}
		c, err := Load(write(t, all))
		must(t, err)
		var got []string
		for _, w := range c.Warnings {
			if strings.Contains(w.Text, "anybody on the way") {
				got = append(got, w.Text)
			}
		}
		if tt.want == "" && len(got) > 0 || tt.want != "" && (len(got) != 1 || !strings.Contains(got[0], tt.want)) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// TestNoMirror: a node that enforces, and can never ask anybody.
func TestNoMirror(t *testing.T) {
	t.Parallel()
	some := certsD(t, "docker.io/hosts.toml", "[host.'https://one.site']")
	for name, tt := range map[string]struct {
		text string
		want bool
	}{
		"none":             {"version: 1\nmode: enforce\nsources: {network: mirrors, certsDir: none}\n", true},
		"in audit":         {"version: 1\nmode: audit\nsources: {network: mirrors, certsDir: none}\n", false},
		"a mirror":         {"version: 1\nmode: enforce\nsources: {network: mirrors, certsDir: none, mirrors: [{host: docker.io, url: 'https://b.site'}]}\n", false},
		"a hosts.toml":     {"version: 1\nmode: enforce\nsources: {network: mirrors, certsDir: " + some + "}\n", false},
		"an empty certs.d": {"version: 1\nmode: enforce\nsources: {network: mirrors, certsDir: " + t.TempDir() + "}\n", true},
		"never":            {"version: 1\nmode: enforce\nsources: {network: never}\n", false},
		"the host itself":  {"version: 1\nmode: enforce\nsources: {certsDir: none}\n", false},
	} {
		c, err := Load(write(t, with(notation(), "config.yaml", tt.text)))
		must(t, err)
		if got := slices.ContainsFunc(c.Warnings, func(w policy.Warning) bool { return w.Field == "sources.network" }); got != tt.want {
			t.Errorf("%s: %v", name, c.Warnings)
		}
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
		_, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+certs))))
		e := (*Error)(nil)
		if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), certs) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%q: got %v", text, err)
		} else if got := strings.TrimPrefix(err.Error(), certs); got != want && !strings.Contains(text, "nowhere") && !strings.Contains(text, "pipe") {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
	certs := certsD(t, "docker.io/hosts.toml", "#")
	must(t, os.Chmod(certs+"/docker.io/hosts.toml", 0o666))
	if _, err := Load(write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+certs)))); err == nil || !strings.Contains(err.Error(), "everybody can write") {
		t.Errorf("a file that everybody can write: %v", err)
	}
}

func TestWatchHosts(t *testing.T) {
	certs := filepath.Join(t.TempDir(), "certs.d")
	fill(t, certs, map[string]string{"docker.io/hosts.toml": "[host.'https://a.site']"})
	dir := write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors", "certsDir: "+certs)))
	first := load1(t, dir)
	w := startWatching(t, dir, first, time.Hour)
	w.quiet("the start")
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://b.site']")
	if c := w.good("hosts.toml replaced"); c.Revision == first.Revision || namesOf(c, "docker.io") != "https://b.site" {
		t.Errorf("got %s", namesOf(c, "docker.io"))
	}
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://c.site'")
	w.bad("broken", "/docker.io/hosts.toml:1: not TOML")
	replace(t, certs+"/docker.io", "hosts.toml", "[host.'https://a.site']")
	if c := w.good("as it was"); c.Revision != first.Revision {
		t.Error("another revision")
	}
	must(t, os.Mkdir(certs+"/quay.io", 0o755))
	if c := w.good("a directory for another host"); c.Revision == first.Revision {
		t.Error("the same revision")
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
			verify.NewBudget(notary.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
		if text := fmt.Sprintf("%v %s %s %v %+v %#v", err, s.Name(), c.Revision, c.Warnings, c, *c); strings.Contains(text, "geheim") {
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
		return load1(t, write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors", "certsDir: "+certsD(t,
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
	content := sourcetest.Content{Kind: notary.Kind}
	subject := content.Image("app")
	content.Sign(subject, notary.MediaTypeJWS, "envelope")
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
	direct := secured(&sourcetest.Registry{Content: content, Repository: "app", Intercept: func(w http.ResponseWriter, r *http.Request) bool {
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
	listed := "mirrors: [{host: registry.test, url: \"" + direct.String() + "\", ca: ca.crt, cert: node.crt, key: node.key%s}]"
	toml := certsD(t, "registry.test/hosts.toml", "[host.'"+direct.String()+"']\nca = ['ca.crt']\nclient = [['node.crt', 'node.key']]\n",
		"registry.test/ca.crt", ca, "registry.test/node.crt", cert, "registry.test/node.key", key)
	itself := certsD(t, strings.Replace(direct.Host, ":", "_", 1)+"_/ca.crt", ca)
	unchecked := certsD(t, "registry.test/hosts.toml", "[host.'"+direct.String()+"']\nskip_verify = true\n")
	redirects := "blobHosts: [\"" + cdn.Host + "\"]"
	for name, tt := range map[string]struct {
		host, sources, hosts, with, field string
		shown, followed                   bool
	}{
		"mirror":               {"registry.test", fmt.Sprintf(listed, ", "+redirects), "none", "", "", true, true},
		"mirror, not listed":   {"registry.test", fmt.Sprintf(listed, ""), "none", redirects, "sources.mirrors[0].blobHosts", true, false},
		"mirror, command line": {"registry.test", fmt.Sprintf(listed, ""), "none", "", "", true, true},
		"hosts.toml":           {"registry.test", "", toml, redirects, "", true, true},
		"hosts.toml, nothing":  {"registry.test", "", toml, "", "sources.blobHosts", true, false},
		"the host itself":      {direct.Host, "", itself, redirects, "", false, true},
		"the host, nothing":    {direct.Host, "", itself, "", "sources.blobHosts", false, false},
		"any host, no address": {direct.Host, "", itself, "blobHosts: [\"*:" + cdn.Port() + "\"]", "sources.blobHosts", false, false},
		"unchecked":            {"registry.test", "", unchecked, redirects, "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			blobs.Store(0)
			known.Store(0)
			lines := []string{"certsDir: " + tt.hosts}
			for _, l := range []string{tt.sources, tt.with} {
				if l != "" {
					lines = append(lines, l)
				}
			}
			c := load1(t, write(t, with(notation(), "ca.crt", ca, "node.crt", cert, "node.key", key, "config.yaml", sourcesOf(lines...))))
			if name == "mirror, command line" {
				p, err := registry.ParsePattern(cdn.Host)
				must(t, err)
				c.Redirect([]registry.Pattern{p})
			}
			n := verify.Name{Host: tt.host, Path: "app"}
			list := c.Sources()(n)
			if len(list) != 1 {
				t.Fatalf("%d sources", len(list))
			}
			var got []verify.Evidence
			err := list[0].Find(t.Context(), n, subject, verify.NewBudget(notary.Kind, verify.Limits{}), func(e verify.Evidence) bool { got = append(got, e); return true })
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
				text = "another host for the blob: if it is its own, add " + cdn.Host + " to " + tt.field
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
			c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+certsD(t, dir, text)))))
			if errs := find(t, c, at, "a"); len(errs) != 1 || !errors.Is(errs[0], verify.ErrUnreachable) || got.all() != "" {
				t.Errorf("%s, %s: %v", at, text, errs)
			}
		}
	}
	at := plain.Listener.Addr().String()
	c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+certsD(t, strings.Replace(at, ":", "_", 1)+"_/hosts.toml", "server = 'http://"+at+"'")))))
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

// engineOf is the engine that c builds.
func engineOf(t *testing.T, c *Config) (e *verify.Engine) {
	t.Helper()
	_, err := c.Snapshot(func(built *verify.Engine) verify.Evaluator { e = built; return built }, time.Now)
	must(t, err)
	return e
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
		setup, err := c.Snapshot(judgeItself, time.Now)
		must(t, err)
		var e verify.Decider
		e.Swap(setup)
		return e.Verify(t.Context(), image)
	}
	if c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("network: never")))); !engineOf(t, c).Closed {
		t.Error("with network: never a node with nothing but its store is told that a source is missing")
	}
	if c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("network: mirrors")))); engineOf(t, c).Closed {
		t.Error("a node without any mirror takes its empty store for an answer")
	}
	for _, line := range []string{"network: never", "network: mirrors"} {
		if d := ask(line, "certsDir: none"); d.Allowed() || d.Reason != verify.SourceUnreachable || !strings.Contains(d.Detail, "no source of signatures is configured") || n.Load() != 0 {
			t.Errorf("%s: %s %s, %d connections", line, d.Reason, d.Detail, n.Load())
		}
	}
	certs := certsD(t, "_default/hosts.toml", "[host.'http://"+at+"']")
	if d := ask("network: mirrors", "certsDir: "+certs); d.Reason != verify.SourceUnreachable || n.Load() == 0 {
		t.Errorf("mirrors: %s, %d connections", d.Reason, n.Load())
	}
	n.Store(0)
	if d := ask("certsDir: none"); d.Reason != verify.SourceUnreachable || n.Load() == 0 {
		t.Errorf("its own mirror: %s, %d connections", d.Reason, n.Load())
	}
	for lines, want := range map[string]string{
		"mirrors: [{host: docker.io, url: 'http://" + at + "'}]": "sources.mirrors: has no use with network: never",
		"certsDir: " + certs:     "sources.certsDir: has no use with network: never",
		"certsDir: auto":         "sources.certsDir: has no use with network: never",
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
		setup, err := c.Snapshot(judgeItself, time.Now)
		must(t, err)
		setup.Mode = verify.Enforce
		var e verify.Decider
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
		c := load1(t, write(t, with(notation(), "config.yaml", sourcesOf("certsDir: "+from))))
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
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+"aliases:\n  - {from: 127.0.0.1:31999/, to: docker.io/}\nsources:\n  certsDir: none\n  mirrors:\n    - {host: docker.io, url: '"+srv.URL+"', ns: true, rewrite: {'^library/(.*)$': 'hub/$1'}}\n")))
	setup, err := c.Snapshot(judgeItself, time.Now)
	must(t, err)
	setup.Mode = verify.Enforce
	var e verify.Decider
	e.Swap(setup)
	name, err := policy.ParseName("127.0.0.1:31999/library/nginx:1.27-zarf-3793515731")
	must(t, err)
	img := verify.Image{Name: name, Use: verify.UseQuestion, Binding: verify.BoundDigest, Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}}
	img.Manifest = img.Target
	d := e.Verify(t.Context(), img)
	// The second pair looks for signatures of other tools, for the hint in the answer.
	list, tag := "nobody /v2/hub/nginx/referrers ns=docker.io", "nobody /v2/hub/nginx/manifests"
	want := strings.Join([]string{list, tag + " ns=docker.io", list, tag + "/" + strings.Replace(img.Target.Digest.String(), ":", "-", 1) + ".sig ns=docker.io"}, ", ")
	if asked := got.all(); d.Reason != verify.SignatureMissing || d.Rule != "prod" || asked != want {
		t.Errorf("%s %s by rule %q, asked %s", d.Reason, d.Detail, d.Rule, asked)
	}
	if s := d.Message(img, ""); !strings.Contains(s, "127.0.0.1:31999/library/nginx:1.27-zarf-3793515731") {
		t.Errorf("message %s", s)
	}
	img.Name.Host = "127.0.0.1:3199"
	if d := e.Verify(t.Context(), img); d.Reason != verify.PolicyNoMatch {
		t.Errorf("another host: %s", d.Reason)
	}
}
