// Package notarytest makes Notary Project signatures, and the certificates,
// trust stores and trust policies that go with them, for tests. Envelopes come
// from notation-core-go, so that they are what notation writes; RawJWS and
// RawCOSE sign anything, for envelopes that no honest tool would write.
//
// Everything has fixed dates (see Begin, End and SigningTime), no network is
// used, and what cannot go wrong in a correct test panics instead of returning
// an error. Keys are random. Nothing here belongs in a program.
package notarytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"sync/atomic"
	"time"
)

// Dates where options are silent.
var (
	Begin       = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC) // NotBefore of certificates
	End         = time.Date(2075, 1, 1, 0, 0, 0, 0, time.UTC) // NotAfter of certificates
	SigningTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) // of signatures
)

// A KeyType is a kind of key. The zero KeyType is P256, which is fast to make.
type KeyType string

// Kinds of keys. RSA keys take a second or more to make.
const (
	P256    KeyType = "P-256"
	P384    KeyType = "P-384"
	RSA2048 KeyType = "RSA-2048"
	RSA3072 KeyType = "RSA-3072"
)

func (o CertOptions) generate() crypto.Signer {
	var key crypto.Signer
	var err error
	if o.Seed != "" {
		h := sha256.Sum256([]byte(o.Seed)) // is below the order of the curve but for one seed in 2^32
		return must(ecdsa.ParseRawPrivateKey(elliptic.P256(), h[:]))
	}
	switch o.Key {
	case "", P256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case RSA3072:
		key, err = rsa.GenerateKey(rand.Reader, 3072)
	default:
		err = fmt.Errorf("no key type %q", o.Key)
	}
	return must(key, err)
}

// Name is a subject that trusted identities can name: C=US, ST=WA, O=acme, CN=cn.
func Name(cn string) pkix.Name {
	return pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"acme"}, CommonName: cn}
}

// CertOptions say what is unusual about one certificate. The zero value is a
// good one.
type CertOptions struct {
	Subject             pkix.Name // default: Name with the certificate's role as CN
	RawSubject          []byte    // DER of the subject, instead of Subject
	Key                 KeyType
	Seed                string           // makes key and serial number the same in every process; the key is P256
	NotBefore, NotAfter time.Time        // default: Begin, End
	Extensions          []pkix.Extension // further extensions, critical or not
	CRL, OCSP           []string         // URLs of distribution points and responders
	ExtKeyUsage         []x509.ExtKeyUsage
}

// CAOptions describe a CA. The zero value is a root on P-256 that issues leaves
// itself.
type CAOptions struct {
	CertOptions               // of the root
	Intermediates int         // number of intermediate CAs between root and leaf
	Intermediate  CertOptions // of each intermediate
}

// A CA issues signing certificates.
type CA struct {
	Chain []*x509.Certificate // issuing CA first, root last
	key   crypto.Signer       // of the issuing CA
}

// NewCA makes a CA with new keys.
func NewCA(o CAOptions) *CA {
	key := o.generate()
	root := caTemplate(o.CertOptions, "root")
	cert := issue(root, root, key.Public(), key)
	ca := &CA{Chain: []*x509.Certificate{cert}, key: key}
	for i := range o.Intermediates {
		key := o.Intermediate.generate()
		cert := issue(caTemplate(o.Intermediate, fmt.Sprintf("intermediate %d", i+1)), ca.Chain[0], key.Public(), ca.key)
		ca = &CA{Chain: append([]*x509.Certificate{cert}, ca.Chain...), key: key}
	}
	return ca
}

// Root is the root certificate.
func (ca *CA) Root() *x509.Certificate { return ca.Chain[len(ca.Chain)-1] }

// PEM is the root certificate as a trust store holds it.
func (ca *CA) PEM() []byte { return PEM(ca.Root()) }

// CRL is a list of the certificates that the issuing CA revoked, made at Begin and
// good until End, in DER.
func (ca *CA) CRL(revoked ...*x509.Certificate) []byte {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: Begin, NextUpdate: End}
	for _, c := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: Begin})
	}
	return must(x509.CreateRevocationList(rand.Reader, list, ca.Chain[0], ca.key))
}

// Leaf issues a signing certificate.
func (ca *CA) Leaf(o CertOptions) *Signer {
	key := o.generate()
	cert := issue(template(o, "signer"), ca.Chain[0], key.Public(), ca.key)
	return &Signer{Key: key, Chain: append([]*x509.Certificate{cert}, ca.Chain...)}
}

// SelfSigned makes a signing certificate that is its own root.
func SelfSigned(o CertOptions) *Signer {
	key := o.generate()
	t := template(o, "self-signed")
	return &Signer{Key: key, Chain: []*x509.Certificate{issue(t, t, key.Public(), key)}}
}

// A Signer is a key with its certificate chain, leaf first, root last. Tests may
// change both.
type Signer struct {
	Key   crypto.Signer
	Chain []*x509.Certificate
}

// Thumbprint is the hexadecimal SHA-256 of the leaf certificate.
func (s *Signer) Thumbprint() string {
	h := sha256.Sum256(s.Chain[0].Raw)
	return hex.EncodeToString(h[:])
}

// PEM encodes certificates.
func PEM(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

var serial atomic.Int64

func template(o CertOptions, role string) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber:          big.NewInt(serial.Add(1)),
		Subject:               o.Subject,
		RawSubject:            o.RawSubject,
		NotBefore:             o.NotBefore,
		NotAfter:              o.NotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           o.ExtKeyUsage,
		ExtraExtensions:       o.Extensions,
		CRLDistributionPoints: o.CRL,
		OCSPServer:            o.OCSP,
	}
	if o.Seed != "" {
		h := sha256.Sum256([]byte("serial" + o.Seed))
		t.SerialNumber.SetBytes(h[:16])
	}
	if t.Subject.String() == "" && t.RawSubject == nil {
		t.Subject = Name(role)
	}
	if t.NotBefore.IsZero() {
		t.NotBefore = Begin
	}
	if t.NotAfter.IsZero() {
		t.NotAfter = End
	}
	return t
}

func caTemplate(o CertOptions, role string) *x509.Certificate {
	t := template(o, role)
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	t.IsCA, t.BasicConstraintsValid = true, true
	return t
}

func issue(t, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, parent, pub, steady{key}))))
}

// steady signs the same bytes alike each time, where the algorithm can.
type steady struct{ crypto.Signer }

func (s steady) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.Signer.Sign(nil, digest, opts)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic("notarytest: " + err.Error())
	}
	return v
}
