package notary

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/verifier/truststore"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

func TestLoadStore(t *testing.T) {
	stores := notarytest.Stores{
		"ca/acme/root.crt":            acme.PEM(),
		"ca/acme/two.PEM":             append(append([]byte("# acme\n"), notarytest.PEM(mallory.Chain[2])...), "# end\n"...),
		"ca/acme/der.cer":             acme.Chain[0].Raw,
		"signingAuthority/s/self.crt": notarytest.PEM(notarytest.SelfSigned(notarytest.CertOptions{}).Chain[0]),
		"tsa/t/root.crt":              acme.PEM(),
	}
	s, err := LoadStore(stores.FS())
	if err != nil {
		t.Fatal(err)
	}
	// notation reads the same certificates from the same files.
	d := t.TempDir()
	if err := notarytest.WriteConfig(d, stores); err != nil {
		t.Fatal(err)
	}
	theirs := truststore.NewX509TrustStore(dir.NewSysFS(d))
	for _, name := range []string{"ca:acme", "signingAuthority:s", "tsa:t"} {
		kind, name, _ := strings.Cut(name, ":")
		got, err := s.GetCertificates(context.Background(), truststore.Type(kind), name)
		if err != nil {
			t.Error(err)
		}
		want, err := theirs.GetCertificates(context.Background(), truststore.Type(kind), name)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%s:%s: %d certificates, notation has %d, %v", kind, name, len(got), len(want), err)
		}
		for i := range got {
			if !got[i].Equal(want[i]) {
				t.Errorf("%s:%s: certificate %d differs", kind, name, i)
			}
		}
	}
	for _, name := range []string{"acm", "acme/", "../ca/acme", ""} {
		if got, _ := s.GetCertificates(context.Background(), truststore.TypeCA, name); len(got) > 0 || s.Holds("ca:"+name) {
			t.Errorf("there is a store %q", name)
		}
	}
}

func TestLoadStoreEmpty(t *testing.T) {
	for name, fsys := range map[string]fs.FS{
		"nothing": fstest.MapFS{}, "no x509": fstest.MapFS{"README": {}}, "absent": os.DirFS(filepath.Join(t.TempDir(), "absent")),
		"empty": fstest.MapFS{"x509/ca/acme": {Mode: fs.ModeDir}},
	} {
		s, err := LoadStore(fsys)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, _ := s.GetCertificates(context.Background(), truststore.TypeCA, "acme"); len(got) > 0 || s.Holds("ca:acme") {
			t.Errorf("%s: has certificates", name)
		}
	}
}

func TestLoadStoreRefuses(t *testing.T) {
	good := acme.PEM()
	key := []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
	for name, test := range map[string]struct {
		path    string
		content []byte
		want    string
	}{
		"empty file":         {"ca/acme/a.crt", nil, "no certificate"},
		"junk":               {"ca/acme/a.crt", []byte("junk"), ""},
		"ending":             {"ca/acme/a.txt", good, "must end in"},
		"no ending":          {"ca/acme/README", good, "must end in"},
		"backup":             {"ca/acme/root.crt~", good, "must end in"},
		"key":                {"ca/acme/a.pem", key, `PEM block 1 is no certificate but "PRIVATE KEY"`},
		"certificate, key":   {"ca/acme/a.pem", append(bytes.Clone(good), key...), "PEM block 2 is no certificate"},
		"trusted":            {"ca/acme/a.pem", bytes.ReplaceAll(good, []byte("CERTIFICATE"), []byte("TRUSTED CERTIFICATE")), "is a TRUSTED CERTIFICATE, openssl's form"},
		"newline missing":    {"ca/acme/a.pem", append(append(bytes.Clone(good), bytes.TrimSpace(good)...), good...), "PEM block 3 of 3 does not decode: a newline is missing before its -----BEGIN"},
		"first block broken": {"ca/acme/a.pem", append([]byte("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"), good...), "does not decode"},
		"last block cut":     {"ca/acme/a.pem", append(bytes.Clone(good), good[:len(good)-30]...), "does not decode"},
		"leaf":               {"ca/acme/a.crt", notarytest.PEM(signer.Chain[0]), "not a CA"},
		"leaf behind a CA":   {"ca/acme/a.crt", notarytest.PEM(acme.Root(), signer.Chain[0]), "not a CA"},
		"intermediate, tsa":  {"tsa/t/a.crt", notarytest.PEM(acme.Chain[0]), "not a self-signed root"},
		"large":              {"ca/acme/a.crt", append(bytes.Clone(good), make([]byte, maxStoreFile)...), "larger"},
		"type":               {"CA/acme/a.crt", good, "no such type"},
		"file for a store":   {"ca/acme.crt", good, "not a directory"},
		"deeper":             {"ca/acme/sub/a.crt", good, "must end in"},
		"directory.crt":      {"ca/acme/sub.crt/a.crt", good, "not a regular file"},
	} {
		_, err := LoadStore(notarytest.Stores{test.path: test.content}.FS())
		at := "x509/" + test.path
		if i := strings.Index(at, "/sub"); i > 0 {
			at = at[:i]
		}
		if name == "type" {
			at = "x509/CA"
		}
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), at) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLoadStoreLabel: notation takes what older tools call a certificate, too.
func TestLoadStoreLabel(t *testing.T) {
	s, err := LoadStore(notarytest.Stores{"ca/acme/a.pem": bytes.ReplaceAll(acme.PEM(), []byte("CERTIFICATE"), []byte("X509 CERTIFICATE"))}.FS())
	if err != nil || !s.Holds("ca:acme") {
		t.Error(err)
	}
}

func TestLoadStoreBounds(t *testing.T) {
	many := notarytest.Stores{}
	for i := range maxStoreFiles + 1 {
		many[fmt.Sprintf("ca/acme/%04d.cer", i)] = acme.Root().Raw
	}
	if _, err := LoadStore(many.FS()); err == nil || !strings.Contains(err.Error(), "files") {
		t.Errorf("%d files: %v", len(many), err)
	}
	var bundle []*x509.Certificate
	for range 600 {
		bundle = append(bundle, acme.Root())
	}
	large := notarytest.Stores{}
	for i := range 9 {
		large[fmt.Sprintf("ca/acme/%d.pem", i)] = notarytest.PEM(bundle...)
	}
	if _, err := LoadStore(large.FS()); err == nil || !strings.Contains(err.Error(), "certificates") {
		t.Errorf("5,400 certificates: %v", err)
	}
}

// TestLoadStoreLinks: links are refused wherever they are, as by notation.
func TestLoadStoreLinks(t *testing.T) {
	for _, at := range []string{"x509/ca/acme/root.crt", "x509/ca/acme", "x509/ca"} {
		d := t.TempDir()
		real := filepath.Join(t.TempDir(), "real")
		if filepath.Ext(at) == ".crt" {
			if err := os.WriteFile(real, acme.PEM(), 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Mkdir(real, 0o700); err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(d, filepath.FromSlash(at))
		if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(real, link); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadStore(os.DirFS(d)); err == nil || !strings.Contains(err.Error(), at) || !strings.Contains(err.Error(), "links") {
			t.Errorf("%s: %v", at, err)
		}
	}
}

type brokenFS struct{ fs.FS }

func (b brokenFS) Open(name string) (fs.File, error) {
	if strings.HasSuffix(name, ".crt") {
		return nil, errors.New("input/output error")
	}
	return b.FS.Open(name)
}

func TestLoadStoreUnreadable(t *testing.T) {
	_, err := LoadStore(brokenFS{notarytest.Stores{"ca/acme/root.crt": acme.PEM()}.FS()})
	if err == nil || !strings.Contains(err.Error(), "input/output") || !strings.Contains(err.Error(), "root.crt") {
		t.Errorf("%v", err)
	}
}

func FuzzParseCertificates(f *testing.F) {
	f.Add(acme.PEM())
	f.Add(acme.Root().Raw)
	f.Add(append(acme.PEM(), notarytest.PEM(signer.Chain...)...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := parseCertificates(data)
		if err == nil && len(certs) == 0 {
			t.Error("neither certificates nor an error")
		}
		if err == nil && bytes.Count(data, []byte("-----BEGIN")) > 0 && len(certs) != bytes.Count(data, []byte("-----BEGIN")) {
			t.Error("a block was passed over")
		}
	})
}
