package notary

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"time"

	corex509 "github.com/notaryproject/notation-core-go/x509"
	"github.com/notaryproject/notation-go/verifier/truststore"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Doubt is something about the certificates that a statement trusts which its author
// may not mean.
type Doubt struct {
	Statement int    // index in the trust policy
	Store     int    // index in the statement's trust stores; -1: of all of them
	Text      string // one clause
}

// Lint returns what keeps certificates of the trust stores of statements from being part
// of a chain that counts at now, and which statements are left without one. identifies
// reports whether one trusted identity names the subject of a certificate. What is wrong
// with a certificate whatever the statement is said once. Of trust stores that are
// missing or empty it says nothing.
func Lint(statements []verify.Statement, store *Store, identifies func(identity, subject string) bool, now time.Time) (doubts []Doubt) {
	said := map[string]bool{}
	for i, s := range statements {
		if s.Level == "skip" {
			continue
		}
		total, useful := map[bool]int{}, map[bool]int{} // by whether they are of tsa stores
		add := func(j int, a anchor, fault string) {
			doubt := fmt.Sprintf("%s (%s) %s", a.name, text.Quote(a.cert.Subject.String(), 128), fault)
			if !said[doubt] {
				doubts = append(doubts, Doubt{i, j, doubt})
			}
			said[doubt] = true
		}
		hasTSA := slices.ContainsFunc(s.TrustStores, func(n string) bool { return kind(n) == truststore.TypeTSA && store.Holds(n) })
		for j, name := range s.TrustStores {
			t := kind(name)
			for _, a := range store.anchors[name] {
				total[t == truststore.TypeTSA]++
				if why := flaw(a.cert, t); why != "" {
					add(j, a, why)
					continue
				}
				switch {
				case t == truststore.TypeTSA:
				case !a.cert.IsCA && !identified(s, a.cert, identifies):
					add(j, a, "issues nothing and vouches for itself alone, and trustedIdentities does not name its subject: IDENTITY_MISMATCH")
					continue
				}
				if why, over := ended(a.cert, t, hasTSA, now); why != "" {
					if add(j, a, why); over {
						continue
					}
				}
				useful[t == truststore.TypeTSA]++
			}
		}
		if total[false] > 0 && useful[false] == 0 {
			doubts = append(doubts, Doubt{i, -1, "no certificate in them can vouch for a signature now: every image of this statement is refused"})
		}
		if total[true] > 0 && useful[true] == 0 {
			doubts = append(doubts, Doubt{i, -1, "no certificate in its tsa stores can vouch for a timestamp: TIMESTAMP_INVALID"})
		}
	}
	return doubts
}

// kind is the type of the trust store of that name.
func kind(store string) truststore.Type {
	t, _, _ := strings.Cut(store, ":")
	return truststore.Type(t)
}

func identified(s verify.Statement, c *x509.Certificate, identifies func(identity, subject string) bool) bool {
	return slices.ContainsFunc(s.TrustedIdentities, func(id string) bool { return id == "*" || identifies(id, c.Subject.String()) })
}

// ended says what the validity of an anchor means at now, and whether it is over for
// each signature.
func ended(c *x509.Certificate, t truststore.Type, hasTSA bool, now time.Time) (why string, over bool) {
	switch {
	case now.Before(c.NotBefore):
		return "is not valid before " + date(c.NotBefore), t == truststore.TypeCA && !hasTSA
	case now.Before(c.NotAfter):
		return "", false
	case t == truststore.TypeTSA:
		return "ended at " + date(c.NotAfter) + ": timestamps that are made now do not count", false
	case t == truststore.TypeCA && !hasTSA:
		return "ended at " + date(c.NotAfter) + ": every signature under it is CERTIFICATE_EXPIRED", true
	}
	return "ended at " + date(c.NotAfter) + ": only what was signed before counts", false
}

// flaw says why no chain with c counts whenever it is looked at, or "". The rules are
// the library's for chains (corex509.ValidateCodeSigningCertChain, which wants a leaf)
// and those of judge.
func flaw(c *x509.Certificate, t truststore.Type) string {
	if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() > maxRSABits {
		return fmt.Sprintf("has an RSA key of %d bits, more than %d: every signature under it is SIGNATURE_INVALID", k.N.BitLen(), maxRSABits)
	}
	if oid := criticalExtension(c); oid != "" {
		return "has the critical extension " + oid + ", which is not understood: every signature under it is CRITICAL_ATTRIBUTE"
	}
	if !c.IsCA && t != truststore.TypeTSA {
		if err := corex509.ValidateCodeSigningCertChain([]*x509.Certificate{c}, nil); err != nil {
			return "is no CA, and no signing certificate either: " + text.Clean(err.Error(), 240)
		}
		return ""
	}
	const broken = ": every chain with it is broken"
	switch present, critical := keyUsage(c); {
	case !c.BasicConstraintsValid || !c.IsCA:
		return "has no basic constraints that make it a CA" + broken
	case !present:
		return "has no key usage; a CA needs a critical one with keyCertSign" + broken
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return "may not issue certificates: its key usage lacks keyCertSign" + broken
	case !critical && t != truststore.TypeTSA:
		return "has a key usage that is not critical" + broken
	}
	if bytes.Equal(c.RawSubject, c.RawIssuer) {
		if err := c.CheckSignatureFrom(c); err != nil {
			return "is not signed by its own key, or in a way that does not count (" + text.Clean(err.Error(), 120) + ")" + broken
		}
	}
	return ""
}

var keyUsageOID = asn1.ObjectIdentifier{2, 5, 29, 15}

func keyUsage(c *x509.Certificate) (present, critical bool) {
	for _, ext := range c.Extensions {
		if ext.Id.Equal(keyUsageOID) {
			return true, ext.Critical
		}
	}
	return false, false
}

// extensions are the names of those that CAs mark as critical.
var extensions = map[string]string{
	"2.5.29.9": "subjectDirectoryAttributes", "2.5.29.16": "privateKeyUsagePeriod", "2.5.29.17": "subjectAltName", "2.5.29.18": "issuerAltName",
	"2.5.29.30": "nameConstraints", "2.5.29.31": "cRLDistributionPoints", "2.5.29.32": "certificatePolicies", "2.5.29.33": "policyMappings",
	"2.5.29.36": "policyConstraints", "2.5.29.46": "freshestCRL", "2.5.29.54": "inhibitAnyPolicy",
	"1.3.6.1.5.5.7.1.1": "authorityInfoAccess", "1.3.6.1.5.5.7.1.3": "qcStatements", "1.3.6.1.5.5.7.1.11": "subjectInfoAccess",
	"1.3.6.1.5.5.7.48.1.5": "ocsp-nocheck", "2.16.840.1.113730.1.1": "netscape-cert-type",
}
