// Package hosts holds what Tidewaiter reads in containerd's certs.d against what
// containerd's own package makes of the same files.
package hosts

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	mrand "math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"

	"github.com/tidewaiter/tidewaiter/nri/containerd/certsd"
)

// disk reads as it is.
type disk struct{}

func (disk) List(dir string) (names []string, err error) {
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, certsd.ErrNotDirectory
	}
	list, err := os.ReadDir(dir)
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names, err
}

func (disk) Read(name string, _ int64) ([]byte, error) { return os.ReadFile(name) }

// line is one registry in one line.
func line(scheme, host, root string, header http.Header, c *tls.Config) string {
	s := fmt.Sprintf("%s://%s%s", scheme, host, path.Join("/", root))
	canonical := http.Header{}
	for k, v := range header {
		canonical[http.CanonicalHeaderKey(k)] = v
	}
	s += fmt.Sprintf(" %q", map[string][]string(canonical))
	if scheme == "https" {
		s += fmt.Sprintf(" cas=%v certificates=%d skip=%v", c.RootCAs != nil, len(c.Certificates), c.InsecureSkipVerify)
	}
	return s
}

// theirs is what containerd would pull from, without what it adds by itself: other
// schemes and unchecked certificates of localhost.
func theirs(t *testing.T, dir, host string) (list []string) {
	t.Helper()
	found, err := config.ConfigureHosts(t.Context(), config.HostOptions{HostDir: config.HostDirFromRoot(dir)})(host)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range found {
		if !r.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		c := &tls.Config{}
		switch transport := r.Client.Transport.(type) {
		case *http.Transport:
			if transport.TLSClientConfig != nil {
				c = transport.TLSClientConfig
			}
		default: // it tries https first where http and a certificate are written
			r.Scheme = "http"
		}
		list = append(list, line(r.Scheme, r.Host, r.Path, r.Header, c))
	}
	return list
}

// ours is what Tidewaiter would ask, the host itself included.
func ours(t *testing.T, dir, host string) (list []string) {
	t.Helper()
	registries, _, err := certsd.Read(dir, disk{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{host, ""} {
		for _, r := range registries {
			if r.Host != name {
				continue
			}
			all := r.Mirrors
			if r.Origin != nil {
				all = append(all, *r.Origin)
			}
			for _, m := range all {
				c := m.TLS
				if c == nil {
					c = &tls.Config{}
				}
				scheme, at := "https", host
				if m.URL != nil {
					scheme, at = m.URL.Scheme, m.URL.Host
				} else if at == "docker.io" {
					at = "registry-1.docker.io"
				}
				list = append(list, line(scheme, at, m.Root, http.Header(m.Header), c))
			}
			return list
		}
	}
	if host == "docker.io" {
		host = "registry-1.docker.io"
	}
	return []string{line("https", host, "/v2", nil, &tls.Config{})}
}

// pki writes a CA, and a certificate with its key, into dir.
func pki(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "node.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, filepath.Join(dir, "node.key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs})))
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func same(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, host := range names {
		if got, want := ours(t, dir, host), theirs(t, dir, host); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%s: read\n  %s\ncontainerd reads\n  %s", host, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
		}
	}
}

func TestK3sFiles(t *testing.T) {
	const from = "../../nri/containerd/certsd/testdata"
	for _, name := range []string{"k3s", "k3s-no-default-endpoint", "k3s-untrimmed"} {
		dir := t.TempDir()
		pki(t, dir)
		certs := filepath.Join(dir, "certs.d")
		err := filepath.WalkDir(filepath.Join(from, name), func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			// The files that it names are those of a k3s node.
			text := strings.NewReplacer(
				"/var/lib/rancher/k3s/agent/server-ca.crt", dir+"/node.crt", "/var/lib/rancher/k3s/agent/client-k3s-controller", dir+"/node",
				"/etc/rancher/k3s/mirror-ca.crt", dir+"/node.crt", "/etc/rancher/k3s/node", dir+"/node").Replace(string(raw))
			rel, err := filepath.Rel(filepath.Join(from, name), p)
			write(t, filepath.Join(certs, rel), text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		same(t, certs, "docker.io", "quay.io", "127.0.0.1:6443", "other.test", "other.test:5000", "registry.example.com:5000", "mirror.example.com")
	}
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/r.test_5000_/hosts.toml", "[host.'https://one.test']")
	write(t, dir+"/r.test:5000/hosts.toml", "[host.'https://two.test']")
	write(t, dir+"/s.test:5000/hosts.toml", "[host.'https://three.test']")
	write(t, dir+"/empty.test/hosts.toml", "")
	write(t, dir+"/bare.test/readme", "")
	all := []string{"r.test:5000", "s.test:5000", "empty.test", "bare.test", "docker.io", "other.test"}
	same(t, dir, all...)
	write(t, dir+"/_default/hosts.toml", "server = 'https://four.test'\n[host.'http://five.test:5000']")
	same(t, dir, all...)
	pki(t, dir+"/bare.test")
	if err := os.Rename(dir+"/bare.test/node.crt", dir+"/bare.test/node.cert"); err != nil {
		t.Fatal(err)
	}
	same(t, dir, all...)
}

// TestCombinations writes hosts.toml files of everything that there is to say, in
// some thousand combinations, always the same.
func TestCombinations(t *testing.T) {
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs.d")
	pki(t, filepath.Join(certs, "r.test"))
	rnd := mrand.New(mrand.NewPCG(1, 2))
	urls := []string{"https://a.test", "http://a.test:5000", "https://a.test/", "https://a.test/v2", "https://a.test/v2/", "https://a.test/hub", "https://a.test/hub/v2",
		"https://a.test/v2/hub/", "a.test", "a.test:5000/x", "http://10.0.0.5:80/a/b", "https://[2001:db8::1]:5000", "https://r.test", "https://r.test/x"}
	fields := []string{
		"capabilities = ['pull']", "capabilities = ['resolve', 'push']", "capabilities = ['Pull', 'referrers']", "capabilities = []",
		"override_path = true", "override_path = false", "skip_verify = true", "skip_verify = false",
		"ca = 'node.crt'", "ca = ['node.crt']", "ca = [ # one\n 'node.crt',\n]",
		"client = [['node.crt', 'node.key']]", "client = [['node.crt', 'node.key'], ['node.crt', 'node.key']]",
		"dial_timeout = '3s'", "unknown = 1", "header = {x-one = 'a'}", "header.x-two = ['a', \"b\\u0020c\"]",
	}
	some := func(b *strings.Builder) {
		used := map[string]bool{}
		for range rnd.IntN(5) {
			f := fields[rnd.IntN(len(fields))]
			name := strings.FieldsFunc(f, func(r rune) bool { return r == ' ' || r == '.' })[0]
			if !used[name] {
				used[name] = true
				b.WriteString(f + "\n")
			}
		}
	}
	for i := range 2000 {
		var b strings.Builder
		if rnd.IntN(2) == 0 {
			fmt.Fprintf(&b, "server = '%s'\n", urls[rnd.IntN(len(urls))])
		}
		some(&b)
		if rnd.IntN(3) == 0 {
			b.WriteString("[host]\n")
		}
		used := map[string]bool{}
		for range rnd.IntN(4) {
			u := urls[rnd.IntN(len(urls))]
			if used[u] {
				continue
			}
			used[u] = true
			fmt.Fprintf(&b, "[host.\"%s\"]\n", u)
			some(&b)
			if rnd.IntN(3) == 0 {
				fmt.Fprintf(&b, "  [host.\"%s\".rewrite]\n  '^a' = 'b'\n", u)
			}
		}
		write(t, filepath.Join(certs, "r.test", "hosts.toml"), b.String())
		same(t, certs, "r.test")
		if t.Failed() {
			t.Fatalf("file %d:\n%s", i, b.String())
		}
	}
}
