package notary

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"github.com/notaryproject/notation-core-go/signature"

	"github.com/tidewaiter/tidewaiter/verify"
)

// judge makes the finding about an envelope that is intact, reaches an anchor,
// has a trusted identity and is about the image. It uses no clock but now.
func (st *statement) judge(info *signature.SignerInfo, now time.Time) verify.Finding {
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
			return refuse(verify.CriticalAttribute, "signed attribute "+verify.Quote(fmt.Sprint(a.Key), 64)+" is critical and not understood")
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
			f.Until = earlier(f.Until, end)
		}
	}

	// Without a timestamp, validity rests on now (trust-store-trust-policy.md,
	// "Authentic timestamp"). The last second of NotAfter is given away so that the
	// finding ends when it says.
	problem := ""
	for i, c := range chain {
		switch {
		case now.Before(c.NotBefore):
			problem = fmt.Sprintf("certificate %d of the chain is not valid before %s", i, date(c.NotBefore))
		case !now.Before(c.NotAfter):
			problem = fmt.Sprintf("certificate %d of the chain expired at %s", i, date(c.NotAfter))
		default:
			f.Until = earlier(f.Until, c.NotAfter)
		}
	}
	if problem != "" && fails(st.actions.timestamp, verify.CertificateExpired) {
		return refuse(verify.CertificateExpired, problem+"; it is "+date(now)+" here")
	}

	for i, c := range chain[:len(chain)-1] { // the root answers for itself
		if revocable(c) {
			if fails(st.actions.revocation, verify.RevocationUnknown) {
				return refuse(verify.RevocationUnknown, fmt.Sprintf("certificate %d of the chain names a CRL or an OCSP responder, and nobody is asked", i))
			}
			break
		}
	}
	f.Reason = verify.Verified
	return f
}

// Extensions that are processed: keyUsage and basicConstraints by the library's
// rules for chains, extKeyUsage as far as the specification has rules for it.
var understood = []asn1.ObjectIdentifier{{2, 5, 29, 15}, {2, 5, 29, 19}, {2, 5, 29, 37}}

// criticalExtension returns the OID of an extension that is critical and that
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

// earlier is the earlier of two times, of which a may be zero: none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }
