package certsd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// tree is files by absolute name.
type tree map[string]string

func (f tree) List(dir string) ([]string, error) {
	if _, file := f[dir]; file {
		return nil, ErrNotDirectory
	}
	var names []string
	for name := range f {
		if rest, found := strings.CutPrefix(name, dir+"/"); found {
			first, _, _ := strings.Cut(rest, "/")
			names = append(names, first)
		}
	}
	slices.Sort(names)
	if names = slices.Compact(names); names == nil {
		return nil, fs.ErrNotExist
	}
	return names, nil
}

func (f tree) Read(name string, limit int64) ([]byte, error) {
	s, found := f[name]
	switch {
	case !found:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	case int64(len(s)) > limit:
		return nil, errors.New("too large")
	}
	return []byte(s), nil
}

// pair is a certificate and its key in PEM.
var pair = sync.OnceValues(func() (cert, key string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	if err != nil {
		panic(err)
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs}))
})

// show is a mirror in one line.
func show(m Mirror) string {
	s := "-"
	if m.URL != nil {
		s = m.URL.String()
	}
	s += " " + m.Root
	if m.TLS != nil {
		s += fmt.Sprintf(" tls(ca %v, certs %d, skip %v)", m.TLS.RootCAs != nil, len(m.TLS.Certificates), m.TLS.InsecureSkipVerify)
	}
	for _, r := range m.Rewrite {
		s += fmt.Sprintf(" %s=>%s", r.From, r.To)
	}
	for _, k := range slices.Sorted(func(yield func(string) bool) {
		for k := range m.Header {
			if !yield(k) {
				return
			}
		}
	}) {
		s += " " + k + "=" + strings.Join(m.Header[k], "|")
	}
	return s
}

func showAll(list []Registry) string {
	var b strings.Builder
	for _, r := range list {
		fmt.Fprintf(&b, "%s\n", r.Host)
		for _, m := range r.Mirrors {
			fmt.Fprintf(&b, "  %s\n", show(m))
		}
		if r.Origin != nil {
			fmt.Fprintf(&b, "  itself %s\n", show(*r.Origin))
		}
	}
	return b.String()
}

// TestK3s reads what k3s writes: testdata/README.md says what that is.
func TestK3s(t *testing.T) {
	const embedded = "https://127.0.0.1:6443 /v2 tls(ca true, certs 1, skip false)"
	const rewrites = "^library/(.*)$=>hub/$1 ^rancher/(.*)=>mirrorproject/rancher-images/$1"
	const mirrors = `  ` + embedded + `
  https://registry.example.com:5000 /v2 tls(ca true, certs 1, skip false) ` + rewrites + `
  https://harbor.example.com /proxy/v2 `
	const configured = `mirror.example.com
  itself https://mirror.example.com /v2 tls(ca false, certs 0, skip true)
quay.io
  ` + embedded + `
  https://mirror.example.com /v2 tls(ca false, certs 0, skip true)
  itself `
	const last = `
registry.example.com:5000
  itself https://registry.example.com:5000 /v2 tls(ca true, certs 1, skip false)
`
	const all = `
  ` + embedded + `
  http://10.0.0.5:5000 /v2
  itself - /v2
127.0.0.1:6443
  itself https://127.0.0.1:6443 /v2 tls(ca true, certs 1, skip false)
docker.io
`
	cert, key := pair()
	for dir, want := range map[string]string{
		"k3s":                     all + mirrors + rewrites + "\n  itself https://registry-1.docker.io /v2\n" + configured + "https://quay.io /v2" + last,
		"k3s-no-default-endpoint": all + mirrors + rewrites + "\n  itself - /v2\n" + configured + "- /v2" + last,
		"k3s-untrimmed": `
  http://10.0.0.5:5000 /v2
  itself - /v2
127.0.0.1:6443
  itself https://127.0.0.1:6443 /v2 tls(ca true, certs 1, skip false)
docker.io
` + strings.TrimSuffix(mirrors, " ") + `
  itself https://registry-1.docker.io /v2
quay.io
  https://mirror.example.com /v2 tls(ca false, certs 0, skip true)
  itself - /v2
`,
	} {
		files := tree{
			"/var/lib/rancher/k3s/agent/server-ca.crt": cert, "/var/lib/rancher/k3s/agent/client-k3s-controller.crt": cert, "/var/lib/rancher/k3s/agent/client-k3s-controller.key": key,
			"/etc/rancher/k3s/mirror-ca.crt": cert, "/etc/rancher/k3s/node.crt": cert, "/etc/rancher/k3s/node.key": key,
		}
		names, err := filepath.Glob(filepath.Join("testdata", dir, "*", "hosts.toml"))
		if err != nil || len(names) < 4 {
			t.Fatal(names, err)
		}
		for _, name := range names {
			raw, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			files["/c/"+filepath.Base(filepath.Dir(name))+"/hosts.toml"] = string(raw)
		}
		list, warnings, err := Read("/c", files)
		if err != nil || len(warnings) != 0 {
			t.Fatal(err, warnings)
		}
		if got := showAll(list); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", dir, got, want)
		}
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	cert, key := pair()
	for name, tt := range map[string]struct {
		files tree
		want  string
		warn  string
	}{
		"nothing in it": {tree{"/c/docker.io/readme": "x"}, "docker.io\n  itself - /v2\n", ""},
		"empty":         {tree{"/c/docker.io/hosts.toml": ""}, "docker.io\n  itself - /v2\n", "/c/docker.io/hosts.toml: is empty: read as if it were not there, as containerd does"},
		"order and doubles": {tree{"/c/r.test/hosts.toml": `
[host."https://b.test"]
[host."https://a.test"]
[host."https://b.test".header]
x-a = "1"
[host."https://a.test".header]
X-B = ["1", "2"]
`}, "r.test\n  https://b.test /v2 X-A=1\n  https://a.test /v2 X-B=1|2\n  itself - /v2\n", ""},
		"paths": {tree{"/c/r.test/hosts.toml": `
server = "r.test/"
[host."https://a.test/v2"]
[host."https://b.test/hub"]
[host."https://c.test/hub/"]
override_path = true
[host."https://d.test"]
override_path = true
[host."HTTPS.test:5000"]
[host."https://e.test/v2/hub"]
override_path = true
[host."https://f.test//x/../y/"]
`}, `r.test
  https://a.test /v2
  https://b.test /hub/v2
  https://c.test /hub
  https://d.test /
  https://https.test:5000 /v2
  https://e.test /v2/hub
  https://f.test /y/v2
  itself https://r.test /v2
`, ""},
		"capabilities": {tree{"/c/r.test/hosts.toml": `
server = "https://r.test"
capabilities = ["push"]
[host."https://a.test"]
capabilities = ["resolve", "push"]
[host."https://b.test"]
capabilities = ["PULL", "referrers"]
[host."https://c.test"]
capabilities = []
`}, "r.test\n  https://b.test /v2\n  https://c.test /v2\n", ""},
		"server is another": {tree{"/c/docker.io/hosts.toml": `server = "http://10.0.0.5:5000"`, "/c/r.test/hosts.toml": `server = "https://r.test:443"`, "/c/_default/hosts.toml": `server = "https://m.test"`},
			"\n  https://m.test /v2\ndocker.io\n  http://10.0.0.5:5000 /v2\nr.test\n  itself https://r.test:443 /v2\n", ""},
		"no server": {tree{"/c/r.test/hosts.toml": "capabilities = ['push']\nskip_verify = true\n"}, "r.test\n  itself - /v2 tls(ca false, certs 0, skip true)\n", ""},
		"localhost": {tree{"/c/localhost_5000_/hosts.toml": "[host.'http://localhost:5000']\n"}, "localhost:5000\n  http://localhost:5000 /v2\n  itself - /v2\n", ""},
		"TLS": {tree{"/c/r.test/hosts.toml": `
[host."https://a.test"]
ca = "ca.crt"
client = "both.pem"
[host."https://b.test"]
ca = ["/pki/ca.crt", "ca.crt"] # both
client = [ # comment
  ["c.pem", "c.key"], ["both.pem", ""],
]
[host."https://c.test"]
client = ["both.pem"]
`, "/pki/ca.crt": cert, "/c/r.test/ca.crt": cert, "/c/r.test/both.pem": cert + key, "/c/r.test/c.pem": cert, "/c/r.test/c.key": key},
			"r.test\n  https://a.test /v2 tls(ca true, certs 1, skip false)\n  https://b.test /v2 tls(ca true, certs 2, skip false)\n  https://c.test /v2 tls(ca false, certs 1, skip false)\n  itself - /v2\n", ""},
		"as docker": {tree{"/c/r.test/a.crt": cert, "/c/r.test/n.cert": cert, "/c/r.test/n.key": key, "/c/r.test/m.cert": cert + key},
			"r.test\n  itself - /v2 tls(ca true, certs 2, skip false)\n", ""},
		"two directories": {tree{"/c/r.test:5000/hosts.toml": "[host.'https://a.test']", "/c/r.test_5000_/hosts.toml": "[host.'https://b.test']"},
			"r.test:5000\n  https://b.test /v2\n  itself - /v2\n", ""},
		"a file":           {tree{"/c/notes": "", "/c/.git/hosts.toml": "!", "/c/r.test/hosts.toml": "#"}, "r.test\n  itself - /v2\n", ""},
		"unknown":          {tree{"/c/r.test/hosts.toml": "\ncolour = 1\n[host.'https://a.test']\nserver = 'https://a.test'\n"}, "r.test\n  https://a.test /v2\n  itself - /v2\n", "/c/r.test/hosts.toml:2: unknown key \"colour\" is not used"},
		"rewrite of root":  {tree{"/c/r.test/hosts.toml": "[rewrite]\n'^a' = 'b'\n"}, "r.test\n  itself - /v2\n", "/c/r.test/hosts.toml:2: rewrite is used in the table of a host alone"},
		"empty and inline": {tree{"/c/r.test/hosts.toml": "host = {'https://a.test' = {}}\n"}, "r.test\n  itself - /v2\n", `/c/r.test/hosts.toml:1: host "https://a.test" has no table of its own and is not used, as containerd does not use it`},
		"not a table":      {tree{"/c/r.test/hosts.toml": "[host]\n'https://a.test' = {capabilities = ['pull']}\n"}, "r.test\n  itself - /v2\n", `/c/r.test/hosts.toml:2: host "https://a.test" has no table of its own and is not used, as containerd does not use it`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			list, warnings, err := Read("/c", tt.files)
			if err != nil {
				t.Fatal(err)
			}
			if got := showAll(list); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
			if tt.warn == "" && len(warnings) > 0 || tt.warn != "" && (len(warnings) == 0 || warnings[0].Error() != tt.warn) {
				t.Errorf("warnings %v", warnings)
			}
		})
	}
}

// Whoever has a host's images come from mirrors has not the host itself asked because
// a link to them is broken.
func TestLinkToNowhere(t *testing.T) {
	t.Parallel()
	dir := dangling{tree{"/c/r.test/hosts.toml": "#"}}
	if list, _, err := Read("/c", dir); err == nil || list != nil || err.Error() != "/c/docker.io: file does not exist" {
		t.Error(list, err)
	}
}

// dangling has a directory more in /c, which is not there.
type dangling struct{ tree }

func (d dangling) List(dir string) ([]string, error) {
	names, err := d.tree.List(dir)
	if dir == "/c" {
		names = append(names, "docker.io")
	}
	return names, err
}

func TestBroken(t *testing.T) {
	t.Parallel()
	cert, _ := pair()
	for name, tt := range map[string]struct{ toml, want string }{
		"syntax":         {"server = 'x'\n[host.'https://a.test']\ncapabilities = [\"pull\"\n[x]\n", ":4: not TOML"},
		"open string":    {"[header]\n\nAuthorization = \"Basic hunter2hunter2\n", ":3: not TOML"},
		"capability":     {"\n[host.'https://a.test']\ncapabilities = ['pull', 'fly']", `:3: unknown capability "fly"`},
		"no list":        {"capabilities = 'pull'", ":1: capabilities must be a list of texts"},
		"twice":          {"ca = 'a'\nca = 'b'", `:2: "ca" is given twice`},
		"table twice":    {"[host.'https://a.test']\n[host.'https://a.test']", `:2: table "host.https://a.test" is given twice`},
		"skip":           {"skip_verify = 'yes'", ":1: skip_verify must be true or false"},
		"password":       {"[host.'https://me:hunter2hunter2@a.test']", ":1: the URL of a host has a user, query or fragment"},
		"query":          {"server = 'https://a.test?token=hunter2'", ":1: the URL of a host has a user, query or fragment"},
		"scheme":         {"\n[host.'httpx://a.test']", ":2: the URL of a host must start with http:// or https://"},
		"no host":        {"[host.'']", ":1: the URL of a host is not one"},
		"path":           {"[host.'https://a.test/%2e%2e/x']\noverride_path = true", ":1: the URL of a host has a path that no registry is at"},
		"regexp":         {"[host.'https://a.test'.rewrite]\n'(' = 'x'", `:2: rewrite: "(" is no regular expression`},
		"escape":         {"[host.'https://a.test'.rewrite]\n\"^a\\d\" = 'x'", ":2: not TOML"},
		"header name":    {"[header]\n'a b' = 'x'", ":2: header: a name that no header can have"},
		"header value":   {"[header]\nx = \"hunter2\\nX: y\"", `:2: header "x": a value that no header can have`},
		"header list":    {"header = ['x']", ":1: header must be a table"},
		"list of tables": {"[[host]]\nx = 1", ":1: host is no list of tables"},
		"host":           {"host = 'https://a.test'", ":1: a host must be a table: [host.\"URL\"]"},
		"ca":             {"[host.'https://a.test']\nca = 'gone.crt'", `:1: "gone.crt": file does not exist`},
		"no ca":          {"ca = 'hosts.toml'", `:1: "hosts.toml": holds no certificate in PEM`},
		"client":         {"client = 'cert'", `:1: "cert": is not, with "cert", a certificate and its key in PEM`},
		"client triple":  {"client = [['a', 'b', 'c']]", ":1: client has more than 2 entries"},
		"timeout":        {"dial_timeout = 'soon'", ":1: dial_timeout is no duration"},
		"deep":           {"a" + strings.Repeat(".a", 20) + " = 1", ":1: a key has more than 16 parts"},
		"hosts":          {strings.Join(numbered(maxHosts+1, "[host.'https://a%d.test']"), "\n"), ":33: has more than 32 hosts"},
		"headers":        {"[header]\n" + strings.Join(numbered(maxHeaders+1, "x%d = 'y'"), "\n"), ":34: header: more than 32 values"},
		"rewrites":       {"[host.'https://a.test'.rewrite]\n" + strings.Join(numbered(maxRewrites+1, "x%d = 'y'"), "\n"), ":66: a host has more than 64 rewrites"},
		"long header":    {"[header]\nx = '" + strings.Repeat("y", maxHeader+1) + "'", ":2: header is longer than 8192 bytes"},
		"long":           {strings.Repeat("#", maxFile+1), ": too large"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			list, _, err := Read("/c", tree{"/c/docker.io/hosts.toml": tt.toml, "/c/docker.io/cert": cert})
			e := (*Error)(nil)
			if !errors.As(err, &e) || err.Error() != "/c/docker.io/hosts.toml"+tt.want || list != nil {
				t.Errorf("got %v, %v", list, err)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret: %v", err)
			}
		})
	}
	many := tree{}
	for _, name := range numbered(maxRegistries+1, "/c/r%d.test/hosts.toml") {
		many[name] = ""
	}
	if _, _, err := Read("/c", many); err == nil || !strings.Contains(err.Error(), "more than 256 directories") {
		t.Error(err)
	}
	if _, _, err := Read("/nowhere", tree{}); err == nil {
		t.Error("no directory, and no error")
	}
	big := tree{}
	for _, n := range numbered(20, "ca%d") {
		big["/c/r.test/"+n+".crt"] = cert + strings.Repeat("#\n", maxPEM/2-len(cert))
	}
	in := numbered(maxPEMs, "'ca%d.crt'")
	big["/c/r.test/hosts.toml"] = "ca = [" + strings.Join(in, ",") + "]"
	big["/c/s.test/hosts.toml"] = "ca = ['../r.test/ca1.crt']"
	if _, _, err := Read("/c", big); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Error("no bound of all files together:", err)
	}
}

func numbered(n int, format string) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprintf(format, i))
	}
	return list
}

func TestProxy(t *testing.T) {
	list, _, err := Read("/c", tree{"/c/docker.io/hosts.toml": "server = 'https://registry-1.docker.io'\n[host.'https://docker.io']\n[host.'http://10.0.0.5:5000']\n"})
	if err != nil {
		t.Fatal(err)
	}
	r := list[0]
	if r.Mirrors[0].Proxy("docker.io") || !r.Mirrors[1].Proxy("docker.io") || !r.Mirrors[1].Proxy("quay.io") || r.Origin.Proxy("docker.io") || (Mirror{}).Proxy("quay.io") {
		t.Error("not as containerd says ns=")
	}
	if !r.Mirrors[1].Insecure() || r.Mirrors[0].Insecure() {
		t.Error("not insecure over http")
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"k3s/docker.io", "k3s-untrimmed/docker.io", "k3s/_default", "k3s/quay.io", "k3s/127.0.0.1_6443_"} {
		raw, err := os.ReadFile(path.Join("testdata", name, "hosts.toml"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte("server = 'x'\n[host.'a'.header]\nx = [\"a\"]\n[host.'a']\nca = \"x\"\nclient = [['a','b'],'c']\nx = {y = {z = 1}}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > maxFile {
			return
		}
		got, err := parse(raw)
		if err != nil {
			if err.Line < 1 || err.Line > 1+strings.Count(string(raw), "\n") || err.Text == "" || len(err.Text) > 400 || text.Clean(err.Text, 1000) != err.Text {
				t.Fatalf("error %#v", err)
			}
			return
		}
		for _, e := range append(got.hosts, got.root) {
			if e.url == nil && e != got.root || e.url != nil && (e.url.Hostname() == "" || e.url.User != nil || e.url.Path != "") || !strings.HasPrefix(e.root, "/") || path.Clean(e.root) != e.root {
				t.Fatalf("took %+v", e)
			}
		}
	})
}
