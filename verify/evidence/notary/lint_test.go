package notary

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestLint looks at one trust anchor, or two, at a time at which what notarytest makes
// is valid unless a row says otherwise.
func TestLint(t *testing.T) {
	now := notarytest.Begin.Add(time.Hour)
	past := notarytest.CertOptions{NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour)}
	critical := func(id ...int) notarytest.CertOptions {
		return notarytest.CertOptions{Extensions: []pkix.Extension{{Id: id, Critical: true, Value: []byte{0x30, 3, 0x80, 1, 0}}}}
	}
	ca := func(o notarytest.CertOptions) []byte {
		return notarytest.NewCA(notarytest.CAOptions{CertOptions: o}).PEM()
	}
	made := func(change func(*x509.Certificate)) []byte {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: notarytest.Name("made"), NotBefore: notarytest.Begin, NotAfter: notarytest.End,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true}
		change(c)
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return notarytest.PEM(cert)
	}
	leaf := notarytest.PEM(notarytest.SelfSigned(notarytest.CertOptions{}).Chain[0])
	named := verify.Statement{TrustedIdentities: []string{"x509.subject: other"}}
	const none = "no certificate in them can vouch"
	for name, c := range map[string]struct {
		files     notarytest.Stores
		statement verify.Statement
		want      []string // texts, in order
	}{
		"good":                  {notarytest.Stores{"ca/acme/a.crt": ca(notarytest.CertOptions{})}, verify.Statement{}, nil},
		"empty":                 {notarytest.Stores{}, verify.Statement{}, nil},
		"ended":                 {notarytest.Stores{"ca/acme/a.crt": ca(past)}, verify.Statement{}, []string{"every signature under it is CERTIFICATE_EXPIRED", none}},
		"ended beside a good":   {notarytest.Stores{"ca/acme/a.crt": ca(past), "ca/acme/b.crt": ca(notarytest.CertOptions{})}, verify.Statement{}, []string{"ended at"}},
		"ended, with a TSA":     {notarytest.Stores{"ca/acme/a.crt": ca(past), "tsa/t/t.crt": ca(notarytest.CertOptions{})}, verify.Statement{TrustStores: []string{"ca:acme", "tsa:t"}}, []string{"only what was signed before counts"}},
		"ended, no time needed": {notarytest.Stores{"signingAuthority/s/a.crt": ca(past)}, verify.Statement{TrustStores: []string{"signingAuthority:s"}}, []string{"only what was signed before counts"}},
		"not yet":               {notarytest.Stores{"ca/acme/a.crt": ca(notarytest.CertOptions{NotBefore: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour)})}, verify.Statement{}, []string{"is not valid before", none}},
		"policy constraints":    {notarytest.Stores{"ca/acme/a.crt": ca(critical(2, 5, 29, 36))}, verify.Statement{}, []string{"critical extension policyConstraints (2.5.29.36)", none}},
		"unknown extension":     {notarytest.Stores{"ca/acme/a.crt": ca(critical(1, 2, 3, 4))}, verify.Statement{}, []string{"critical extension 1.2.3.4,", none}},
		"no keyCertSign":        {notarytest.Stores{"ca/acme/a.crt": made(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })}, verify.Statement{}, []string{"lacks keyCertSign", none}},
		"no key usage":          {notarytest.Stores{"ca/acme/a.crt": made(func(c *x509.Certificate) { c.KeyUsage = 0 })}, verify.Statement{}, []string{"has no key usage", none}},
		"key usage not critical": {notarytest.Stores{"ca/acme/a.crt": made(func(c *x509.Certificate) {
			c.KeyUsage, c.ExtraExtensions = 0, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 1, 6}}}
		})}, verify.Statement{}, []string{"key usage that is not critical", none}},
		"key usage not critical, tsa": {notarytest.Stores{"ca/acme/a.crt": ca(notarytest.CertOptions{}), "tsa/t/a.crt": made(func(c *x509.Certificate) {
			c.KeyUsage, c.ExtraExtensions = 0, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 1, 6}}}
		})}, verify.Statement{TrustStores: []string{"ca:acme", "tsa:t"}}, nil},
		"leaf for servers": {notarytest.Stores{"ca/acme/a.crt": notarytest.PEM(notarytest.SelfSigned(notarytest.CertOptions{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}).Chain[0])}, verify.Statement{}, []string{"no signing certificate either", none}},
		"leaf":             {notarytest.Stores{"ca/acme/a.crt": leaf}, verify.Statement{}, nil},
		"leaf of another":  {notarytest.Stores{"ca/acme/a.crt": leaf}, named, []string{"vouches for itself alone", none}},
		"tsa ended":        {notarytest.Stores{"ca/acme/a.crt": ca(notarytest.CertOptions{}), "tsa/t/t.crt": ca(past)}, verify.Statement{TrustStores: []string{"ca:acme", "tsa:t"}}, []string{"timestamps that are made now do not count"}},
		"tsa broken":       {notarytest.Stores{"ca/acme/a.crt": ca(notarytest.CertOptions{}), "tsa/t/t.crt": ca(critical(2, 5, 29, 36))}, verify.Statement{TrustStores: []string{"ca:acme", "tsa:t"}}, []string{"policyConstraints", "no certificate in its tsa stores"}},
	} {
		store, err := LoadStore(c.files.FS())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		s := notarytest.Statement("prod")
		if c.statement.TrustStores != nil {
			s.TrustStores = c.statement.TrustStores
		}
		if c.statement.TrustedIdentities != nil {
			s.TrustedIdentities = c.statement.TrustedIdentities
		}
		doubts := Lint([]verify.Statement{s}, store, func(string, string) bool { return false }, now)
		ok := len(doubts) == len(c.want)
		for i := range doubts {
			ok = ok && strings.Contains(doubts[i].Text, c.want[i])
		}
		if !ok {
			t.Errorf("%s: %s, want %q", name, fmt.Sprint(doubts), c.want)
		}
		// What is wrong with a certificate is said once, what it does to a statement each time.
		twice := Lint([]verify.Statement{s, {Level: "skip", TrustStores: s.TrustStores}, s}, store, func(string, string) bool { return false }, now)
		alone := 0
		for _, d := range doubts {
			if d.Store < 0 {
				alone++
			}
		}
		if len(twice) != len(doubts)+alone {
			t.Errorf("%s, twice: %s", name, fmt.Sprint(twice))
		}
	}
}
