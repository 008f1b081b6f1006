package notary

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/notaryproject/notation-core-go/signature"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// judge makes the finding about an envelope that is intact, reaches an anchor,
// has a trusted identity and is about the image. It uses no clock but now.
func (st *statement) judge(info *signature.SignerInfo, now time.Time, maxCertificates int) verify.Finding {
	chain := info.CertificateChain
	var f verify.Finding
	// fails reports whether a failed check settles the matter, and else notes it.
	fails := func(a action, r verify.Reason) bool {
		if a == warn {
			f.Warnings = append(f.Warnings, r)
		}
		return a == enforce
	}
	refuse := func(r verify.Reason, detail string) verify.Finding {
		n := no(r, detail)
		n.Warnings = f.Warnings
		return n
	}

	for _, a := range info.SignedAttributes.ExtendedAttributes {
		if a.Critical {
			return refuse(verify.CriticalAttribute, "signed attribute "+text.Quote(fmt.Sprint(a.Key), 64)+" is critical and not understood")
		}
	}
	for i, c := range chain {
		if oid := criticalExtension(c); oid != "" {
			return refuse(verify.CriticalAttribute, fmt.Sprintf("certificate %d of the chain has the critical extension %s, which is not understood", i, oid))
		}
	}

	if end := info.SignedAttributes.Expiry; !end.IsZero() {
		if !now.Before(end) {
			if fails(st.actions.expiry, verify.SignatureExpired) {
				return refuse(verify.SignatureExpired, "the signature expired at "+date(end))
			}
		} else {
			f.Until, f.Ends = end, EndsSignature
		}
	}

	// As in the library, the revocation of a TSA belongs to the timestamp: no override
	// of revocation excuses it (verifier.go:954-971).
	tsa, reason, err := st.valid(info, now, maxCertificates)
	if err == nil {
		if reason, err = verify.RevocationUnknown, answerable(tsa); err != nil {
			err = fmt.Errorf("the timestamp's %w; no override of revocation excuses a TSA: take one whose certificates name neither", err)
		}
	}
	if err != nil && fails(st.actions.timestamp, reason) {
		return refuse(reason, err.Error())
	}
	if st.restsOnNow(info, now) {
		for _, c := range chain {
			if now.Before(c.NotAfter) && (f.Until.IsZero() || c.NotAfter.Before(f.Until)) {
				f.Until, f.Ends = c.NotAfter, EndsCertificate
			}
		}
	}

	if err := answerable(chain); err != nil && fails(st.actions.revocation, verify.RevocationUnknown) {
		return refuse(verify.RevocationUnknown, err.Error())
	}
	if f.Until.IsZero() {
		// A timestamp, and a signing authority's word, do not end. An answer without
		// an end is not kept, so that no container would ever find it.
		f.Until, f.Ends = now.Add(again), EndsNothing
	}
	f.Reason = verify.Verified
	return f
}

// What ends a finding, for Finding.Ends.
const (
	EndsSignature   = "signature"   // its own expiry
	EndsCertificate = "certificate" // NotAfter of a certificate of the signer's chain
	EndsNothing     = "nothing"     // it is only looked at again then
)

// again is when a finding that rests on nothing that ends is made anew.
const again = 24 * time.Hour

// restsOnNow reports whether the chain must be valid now, rather than when the
// signature was made (trust-store-trust-policy.md, "Authentic timestamp").
func (st *statement) restsOnNow(info *signature.SignerInfo, now time.Time) bool {
	if info.SignedAttributes.SigningScheme == signature.SigningSchemeX509SigningAuthority {
		return false // the authority is trusted to tell the time
	}
	return st.tsa == nil || st.afterExpiry && !slices.ContainsFunc(info.CertificateChain, func(c *x509.Certificate) bool {
		return !now.Before(c.NotAfter)
	})
}

// valid checks that the chain was valid when it had to be, and says what it is
// if not. Where a timestamp proves it, it returns the chain of the TSA.
func (st *statement) valid(info *signature.SignerInfo, now time.Time, maxCertificates int) ([]*x509.Certificate, verify.Reason, error) {
	switch {
	case st.restsOnNow(info, now):
		return nil, verify.CertificateExpired, validAt(info.CertificateChain, now, "now, at "+date(now))
	case info.SignedAttributes.SigningScheme == signature.SigningSchemeX509SigningAuthority:
		at := info.SignedAttributes.SigningTime
		return nil, verify.CertificateExpired, validAt(info.CertificateChain, at, "when it was signed, at "+date(at))
	case st.afterExpiry && len(info.UnsignedAttributes.TimestampSignature) == 0:
		return nil, verify.CertificateExpired, fmt.Errorf("%w; and the signature has no timestamp", validAt(info.CertificateChain, now, "now, at "+date(now)))
	}
	chain, err := timestamped(info, st.tsa, maxCertificates)
	return chain, verify.TimestampInvalid, err
}

// validAt reports a certificate of chain that is not valid at t, which when says
// in words. The last second of NotAfter is given away, so that a finding is good
// until the time that it says.
func validAt(chain []*x509.Certificate, t time.Time, when string) error {
	for i, c := range chain {
		if t.Before(c.NotBefore) || !t.Before(c.NotAfter) {
			return fmt.Errorf("certificate %d of the chain is valid from %s to %s, not %s", i, date(c.NotBefore), date(c.NotAfter), when)
		}
	}
	return nil
}

// Extensions that are processed: keyUsage and basicConstraints by the library's
// rules for chains, extKeyUsage as far as the specification has rules for it.
var understood = []asn1.ObjectIdentifier{{2, 5, 29, 15}, {2, 5, 29, 19}, {2, 5, 29, 37}}

// criticalExtension returns the OID, and the name where it is a usual one, of an extension that is critical and that
// nobody processes. Certificate.UnhandledCriticalExtensions is no help: the parser
// takes nameConstraints and others off it for Certificate.Verify, which the
// library does not call.
func criticalExtension(c *x509.Certificate) string {
next:
	for _, ext := range c.Extensions {
		if !ext.Critical {
			continue
		}
		for _, oid := range understood {
			if ext.Id.Equal(oid) {
				continue next
			}
		}
		if name := extensions[ext.Id.String()]; name != "" {
			return name + " (" + ext.Id.String() + ")"
		}
		return ext.Id.String()
	}
	return ""
}

var (
	crlDistributionPoints = asn1.ObjectIdentifier{2, 5, 29, 31}
	freshestCRL           = asn1.ObjectIdentifier{2, 5, 29, 46}
	authorityInfoAccess   = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 1}
	ocspMethod            = []byte{6, 8, 0x2b, 6, 1, 5, 5, 7, 0x30, 1} // DER of 1.3.6.1.5.5.7.48.1
)

// answerable reports a certificate of chain of which it would have to be asked
// whether it was revoked. A root answers for itself; an empty chain is fine.
func answerable(chain []*x509.Certificate) error {
	for i, c := range chain {
		if i < len(chain)-1 && revocable(c) {
			return fmt.Errorf("certificate %s names a CRL or an OCSP responder%s, and nobody is asked", text.Quote(c.Subject.String(), 128), addresses(c))
		}
	}
	return nil
}

// addresses are some of those that c names, as text of who made it.
func addresses(c *x509.Certificate) string {
	const shown = 3
	var list []string
	for _, a := range slices.Concat(c.CRLDistributionPoints, c.OCSPServer) {
		if len(list) < shown {
			list = append(list, text.Quote(a, 80))
		}
	}
	if len(list) == 0 {
		return ""
	}
	return " (" + strings.Join(list, ", ") + ")"
}

// revocable reports whether c names a place to ask whether it was revoked, in
// whatever form: the parsed fields hold URLs only.
func revocable(c *x509.Certificate) bool {
	for _, ext := range c.Extensions {
		if ext.Id.Equal(crlDistributionPoints) || ext.Id.Equal(freshestCRL) ||
			ext.Id.Equal(authorityInfoAccess) && bytes.Contains(ext.Value, ocspMethod) {
			return true
		}
	}
	return false
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }
