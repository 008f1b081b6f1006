package notary

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/notaryproject/notation-core-go/signature"
	corex509 "github.com/notaryproject/notation-core-go/x509"
	"github.com/notaryproject/tspclient-go"
)

// timestamped verifies the RFC 3161 countersignature of an envelope and that the
// whole signing chain was valid when it was made (trust-store-trust-policy.md,
// "Authentic timestamp"). It returns the TSA's chain, of which the caller checks
// revocation. No clock is read: the token says when, and it is believed because
// its chain ends at a root of a tsa trust store and was valid at that time.
//
// The token is not signed by who signed the envelope, anybody can put one into a
// good envelope: what could cost much is refused before any signature is checked.
func timestamped(info *signature.SignerInfo, roots *x509.CertPool, maxCertificates int) ([]*x509.Certificate, error) {
	if len(info.UnsignedAttributes.TimestampSignature) == 0 {
		return nil, errors.New("the signature has no timestamp")
	}
	token, err := tspclient.ParseSignedToken(info.UnsignedAttributes.TimestampSignature)
	if err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	// RFC 3161 section 2.4.2: no other signatures than the TSA's.
	if n := len(token.SignerInfos); n != 1 {
		return nil, fmt.Errorf("timestamp with %d signatures", n)
	}
	if n := len(token.Certificates); n > maxCertificates {
		return nil, fmt.Errorf("timestamp with %d certificates, limit %d", n, maxCertificates)
	}
	for _, c := range token.Certificates {
		if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() > maxRSABits {
			return nil, fmt.Errorf("timestamp with an RSA key of %d bits, more than %d", k.N.BitLen(), maxRSABits)
		}
	}
	tst, err := token.Info()
	if err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	at, err := tst.Validate(info.Signature)
	if err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	chain, err := token.Verify(context.Background(), x509.VerifyOptions{Roots: roots, CurrentTime: at.Value})
	if err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	if err := corex509.ValidateTimestampingCertChain(chain); err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	for i, c := range chain {
		if oid := criticalExtension(c); oid != "" {
			return nil, fmt.Errorf("certificate %d of the timestamp has the critical extension %s, which is not understood", i, oid)
		}
	}
	for _, ext := range tst.Extensions {
		if ext.Critical {
			return nil, fmt.Errorf("the timestamp has the critical extension %s, which is not understood", ext.Id)
		}
	}
	if at.Accuracy < 0 {
		return nil, errors.New("the timestamp has an accuracy below zero")
	}
	for i, c := range info.CertificateChain {
		if !at.BoundedAfter(c.NotBefore) || !at.BoundedBefore(c.NotAfter) {
			return nil, fmt.Errorf("certificate %d of the chain was not valid when the timestamp was made, at %s", i, date(at.Value))
		}
	}
	return chain, nil
}
