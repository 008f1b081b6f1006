package notary

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/veraison/go-cose"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// What most tests use. None of it changes.
var (
	image   = notarytest.NewBlob(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2}`)).Descriptor
	other   = notarytest.NewBlob(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":3}`)).Descriptor
	acme    = notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
	signer  = acme.Leaf(notarytest.CertOptions{})
	mallory = notarytest.NewCA(notarytest.CAOptions{Intermediates: 1}).Leaf(notarytest.CertOptions{})
	noon    = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	formats = []string{MediaTypeJWS, MediaTypeCOSE}
)

const acmeIdentity = "x509.subject: C=US, ST=WA, O=acme"

func at(t time.Time) func() time.Time { return func() time.Time { return t } }

func acmeStore(t testing.TB) *Store {
	t.Helper()
	s, err := LoadStore(notarytest.Stores{"ca/acme/root.crt": acme.PEM()}.FS())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newChecker(t testing.TB, store *Store, now time.Time, s ...verify.Statement) *Checker {
	t.Helper()
	c, err := New(s, store, Options{Now: at(now)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func check(c *Checker, mediaType string, blob []byte, want ocispec.Descriptor) verify.Finding {
	return c.Check(context.Background(), verify.Evidence{MediaType: mediaType, Blob: blob}, want, "prod")
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func TestGoodSignature(t *testing.T) {
	for _, key := range []notarytest.KeyType{notarytest.P256, notarytest.P384, notarytest.RSA2048, notarytest.RSA3072} {
		s := acme.Leaf(notarytest.CertOptions{Key: key})
		for _, mediaType := range formats {
			for _, identity := range []string{"*", acmeIdentity, "x509.subject: O=acme, C=US, S=WA, CN=signer"} {
				c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod", identity))
				f := check(c, mediaType, notarytest.MustSign(s, image, notarytest.SignOptions{MediaType: mediaType}), image)
				if f.Reason != verify.Verified || f.Signed != image.Digest || len(f.Warnings) > 0 || f.Detail != "" {
					t.Errorf("%s %s %q: %+v", key, mediaType, identity, f)
				}
				if want := (verify.Signer{Subject: "CN=signer,O=acme,ST=WA,C=US", Thumbprint: s.Thumbprint(), Anchor: "ca:acme/root.crt"}); f.Signer != want {
					t.Errorf("%s %s: signer %+v", key, mediaType, f.Signer)
				}
				if !f.Until.Equal(notarytest.End) {
					t.Errorf("%s %s: until %v", key, mediaType, f.Until)
				}
			}
		}
	}
}

// TestMetadata: annotations that were signed are handed on, and only those of a
// signature that counts.
func TestMetadata(t *testing.T) {
	c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod", "*"))
	o := notarytest.SignOptions{Annotations: map[string]string{"env": "prod", "build": "7"}}
	for _, o.MediaType = range formats {
		if f := check(c, o.MediaType, notarytest.MustSign(signer, image, o), image); !maps.Equal(f.Metadata, o.Annotations) {
			t.Errorf("%s: metadata %v of %+v", o.MediaType, f.Metadata, f)
		}
		if f := check(c, o.MediaType, notarytest.MustSign(mallory, image, o), image); f.Reason == verify.Verified || f.Metadata != nil {
			t.Errorf("%s of a stranger: %+v", o.MediaType, f)
		}
	}
}

// TestFindings checks one envelope after the other under one statement of level
// strict that trusts acmeIdentity, in both formats where the envelope exists in
// both.
func TestFindings(t *testing.T) {
	type opts = notarytest.SignOptions
	sign := func(s *notarytest.Signer, desc ocispec.Descriptor, o opts) func(string) []byte {
		return func(mediaType string) []byte {
			o.MediaType = mediaType
			return notarytest.MustSign(s, desc, o)
		}
	}
	leaf := func(o notarytest.CertOptions) *notarytest.Signer { return acme.Leaf(o) }
	critical := func(oid ...int) []pkix.Extension {
		return []pkix.Extension{{Id: oid, Critical: true, Value: []byte{5, 0}}}
	}
	// A chain of the attacker's with the real root, which is no secret, behind it.
	grafted := &notarytest.Signer{Key: mallory.Key, Chain: append(slices.Clone(mallory.Chain[:2]), acme.Root())}
	stolen := &notarytest.Signer{Key: mallory.Key, Chain: append([]*x509.Certificate{mallory.Chain[0]}, acme.Chain...)}
	twoNames := must(asn1.Marshal(pkix.RDNSequence{
		{{Type: asn1.ObjectIdentifier{2, 5, 4, 6}, Value: "US"}}, {{Type: asn1.ObjectIdentifier{2, 5, 4, 8}, Value: "WA"}},
		{{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: "acme"}},
		{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "mallory"}}, {{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "signer"}},
	}))
	// 1.3.6.1.5.5.7.48.2: nobody can be asked there whether a certificate was revoked.
	caIssuers := must(asn1.Marshal([]struct {
		Method   asn1.ObjectIdentifier
		Location asn1.RawValue
	}{{asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 2}, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte("http://127.0.0.1:1/ca.crt")}}}))
	email := notarytest.Name("signer")
	email.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, Value: "a@b.example"}}
	units := notarytest.Name("signer")
	units.OrganizationalUnit = []string{"a", "b"}
	hash := notarytest.Name("signer=#" + strings.Repeat("41", 20000))
	payload := func(format string, a ...any) opts { return opts{Payload: fmt.Appendf(nil, format, a...)} }

	for _, test := range []struct {
		name     string
		envelope func(mediaType string) []byte
		reason   verify.Reason
		detail   string // a part of it
	}{
		{"good", sign(signer, image, opts{}), verify.Verified, ""},
		{"annotations", sign(signer, image, opts{Annotations: map[string]string{"a": "b"}}), verify.Verified, ""},
		{"attribute not critical", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "a.b", Value: "c"}}}), verify.Verified, ""},
		{"signed in 2074", sign(signer, image, opts{SigningTime: year(2074)}), verify.Verified, ""},
		{"nonsense extension, not critical", sign(leaf(notarytest.CertOptions{Extensions: []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}}), image, opts{}), verify.Verified, ""},

		{"other CA", sign(mallory, image, opts{}), verify.SignerUntrusted, "no trust store"},
		{"self-signed", sign(notarytest.SelfSigned(notarytest.CertOptions{}), image, opts{}), verify.SignerUntrusted, "no trust store"},
		{"other CA, for another image", sign(mallory, other, opts{}), verify.SignerUntrusted, ""},
		{"other CA, expired", sign(mallory, image, opts{Expiry: noon}), verify.SignerUntrusted, ""},
		{"other CA, plugin", sign(mallory, image, opts{Plugin: "x"}), verify.SignerUntrusted, ""},
		{"other CA, critical attribute", sign(mallory, image, opts{Attributes: []notarytest.Attribute{{Key: "a", Critical: true, Value: "c"}}}), verify.SignerUntrusted, ""},
		{"other CA, broken", func(m string) []byte {
			return rawSign(&notarytest.Signer{Key: signer.Key, Chain: mallory.Chain}, m)
		}, verify.SignerUntrusted, ""}, // found out before any public-key operation
		{"other CA with the root behind it", func(m string) []byte { return rawSign(grafted, m) }, verify.SignatureInvalid, "not issued by"},
		{"other leaf with the chain behind it", func(m string) []byte { return rawSign(stolen, m) }, verify.SignatureInvalid, "not issued by"},
		{"key of another", func(m string) []byte {
			return rawSign(&notarytest.Signer{Key: mallory.Key, Chain: signer.Chain}, m)
		}, verify.SignatureInvalid, "broken"},

		{"other subject", sign(leaf(notarytest.CertOptions{Subject: pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"evil"}}}), image, opts{}), verify.IdentityMismatch, "O=evil"},
		{"two units", sign(leaf(notarytest.CertOptions{Subject: units}), image, opts{}), verify.IdentityMismatch, "no x509.subject can name"},
		{"e-mail", sign(leaf(notarytest.CertOptions{Subject: email}), image, opts{}), verify.IdentityMismatch, "no x509.subject can name"},
		{"=# in a name", sign(leaf(notarytest.CertOptions{Subject: hash}), image, opts{}), verify.IdentityMismatch, ""},
		{"two common names", sign(leaf(notarytest.CertOptions{RawSubject: twoNames}), image, opts{}), verify.IdentityMismatch, "2.5.4.3 more than once"},

		{"another image", sign(signer, other, opts{}), verify.SignatureInvalid, "for another image: \"" + other.Digest.String()},
		{"another size", sign(signer, ocispec.Descriptor{MediaType: image.MediaType, Digest: image.Digest, Size: 20}, opts{}), verify.SignatureInvalid, "another size: 20"},
		{"another media type", sign(signer, ocispec.Descriptor{MediaType: "a/b", Digest: image.Digest, Size: image.Size}, opts{}), verify.SignatureInvalid, "another media type"},
		{"payload without target", sign(signer, image, payload(`{"a":1}`)), verify.SignatureInvalid, "another image"},
		{"payload with null target", sign(signer, image, payload(`{"targetArtifact":null}`)), verify.SignatureInvalid, "another image"},
		{"payload with something else in it that is read", sign(signer, image, payload(`{"targetArtifact":{"mediaType":%q,"digest":%q,"size":%d,"annotations":7}}`, image.MediaType, image.Digest, image.Size)), verify.SignatureInvalid, "payload: "},
		{"payload of another type", sign(signer, image, opts{ContentType: "application/json"}), verify.SignatureInvalid, "content type"},

		{"critical attribute", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "a.b", Critical: true, Value: "c"}}}), verify.CriticalAttribute, `"a.b"`},
		{"plugin", sign(signer, image, opts{Plugin: "x"}), verify.PluginUnsupported, "io.cncf.notary.verificationPlugin"},
		{"plugin with a path", sign(signer, image, opts{Plugin: "../../../bin/sh"}), verify.PluginUnsupported, ""},
		{"plugin, empty", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPlugin", Critical: true, Value: ""}}}), verify.PluginUnsupported, ""},
		{"plugin, a number", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPlugin", Critical: true, Value: 1}}}), verify.PluginUnsupported, ""},
		{"plugin, not critical", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPlugin", Value: "x"}}}), verify.PluginUnsupported, ""},
		{"plugin version alone", sign(signer, image, opts{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPluginMinVersion", Value: "1.0.0"}}}), verify.PluginUnsupported, ""},
		{"plugin, other identity", sign(leaf(notarytest.CertOptions{Subject: pkix.Name{CommonName: "x"}}), image, opts{Plugin: "x"}), verify.PluginUnsupported, ""},
		{"plugin, for another image", sign(signer, other, opts{Plugin: "x"}), verify.SignatureInvalid, "another image"},

		{"critical extension", sign(leaf(notarytest.CertOptions{Extensions: critical(1, 2, 3, 4, 5)}), image, opts{}), verify.CriticalAttribute, "certificate 0 of the chain has the critical extension 1.2.3.4.5"},

		{"expired", sign(signer, image, opts{Expiry: noon}), verify.SignatureExpired, "2026-06-01"},
		{"expired leaf", sign(leaf(notarytest.CertOptions{NotAfter: noon}), image, opts{}), verify.CertificateExpired, "certificate 0 of the chain is valid from"},
		{"leaf of the future", sign(leaf(notarytest.CertOptions{NotBefore: noon.Add(time.Second)}), image, opts{SigningTime: noon.Add(time.Hour)}), verify.CertificateExpired, "not now, at 2026-06-01T12:00:00Z"},
		{"CRL", sign(leaf(notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}}), image, opts{}), verify.RevocationUnknown, `names a CRL or an OCSP responder ("http://127.0.0.1:1/crl"), and nobody is asked`},
		{"OCSP", sign(leaf(notarytest.CertOptions{OCSP: []string{"http://127.0.0.1:1"}}), image, opts{}), verify.RevocationUnknown, `certificate "CN=signer`},
		{"where the issuer's certificate is", sign(leaf(notarytest.CertOptions{Extensions: []pkix.Extension{{Id: authorityInfoAccess, Value: caIssuers}}}), image, opts{}), verify.Verified, ""},
		{"delta CRL alone", sign(leaf(notarytest.CertOptions{Extensions: []pkix.Extension{{Id: freshestCRL, Value: []byte{0x30, 0}}}}), image, opts{}), verify.RevocationUnknown, ""},

		{"signing authority", sign(signer, image, opts{Scheme: notarytest.SchemeSigningAuthority}), verify.SignerUntrusted, "notary.x509.signingAuthority"},
		{"signing authority, plugin", sign(signer, image, opts{Scheme: notarytest.SchemeSigningAuthority, Plugin: "x"}), verify.SignerUntrusted, ""},
		{"signing authority, for another image", sign(signer, other, opts{Scheme: notarytest.SchemeSigningAuthority}), verify.SignerUntrusted, ""},

		{"nothing", func(string) []byte { return nil }, verify.SignatureInvalid, ""},
		{"null", func(string) []byte { return []byte("null") }, verify.SignatureInvalid, ""},
		{"CBOR null", func(string) []byte { return []byte{0xf6} }, verify.SignatureInvalid, ""},
		{"{}", func(string) []byte { return []byte("{}") }, verify.SignatureInvalid, ""},
		{"[]", func(string) []byte { return []byte("[]") }, verify.SignatureInvalid, ""},
		{"200k [", func(string) []byte { return []byte(strings.Repeat("[", 200_000)) }, verify.SignatureInvalid, ""},
		{"200k CBOR arrays", func(string) []byte { return []byte("\xd2\x84\x40\xa1\x00" + strings.Repeat("\x81", 200_000)) }, verify.SignatureInvalid, ""},
		{"one byte less", func(m string) []byte { b := sign(signer, image, opts{})(m); return b[:len(b)-1] }, verify.SignatureInvalid, ""},
		{"one byte more", func(m string) []byte { return append(sign(signer, image, opts{})(m), 'x') }, verify.SignatureInvalid, ""},
		{"twice", func(m string) []byte { b := sign(signer, image, opts{})(m); return append(b, b...) }, verify.SignatureInvalid, ""},
		{"the other format", func(m string) []byte {
			if m == MediaTypeJWS {
				m = MediaTypeCOSE
			} else {
				m = MediaTypeJWS
			}
			return sign(signer, image, opts{})(m)
		}, verify.SignatureInvalid, "not a Notary Project envelope"},
		{"too long", func(m string) []byte {
			return append(sign(signer, image, opts{})(m), strings.Repeat(" ", 256<<10)...)
		}, verify.LimitExceeded, "limit 262144"},
		{"chain of 12", sign(notarytest.NewCA(notarytest.CAOptions{Intermediates: 10}).Leaf(notarytest.CertOptions{}), image, opts{}), verify.LimitExceeded, "12 certificates, limit 10"},
		{"chain of 10", sign(notarytest.NewCA(notarytest.CAOptions{Intermediates: 8}).Leaf(notarytest.CertOptions{}), image, opts{}), verify.SignerUntrusted, ""},
	} {
		for _, mediaType := range formats {
			t.Run(test.name+" "+mediaType, func(t *testing.T) {
				c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod", acmeIdentity))
				f := check(c, mediaType, test.envelope(mediaType), image)
				if f.Reason != test.reason || !strings.Contains(f.Detail, test.detail) {
					t.Errorf("%s (%s), want %s (%s)", f.Reason, f.Detail, test.reason, test.detail)
				}
				if (f.Signed != "") != (f.Reason == verify.Verified) || len(f.Detail) > 400 {
					t.Errorf("finding %+v", f)
				}
			})
		}
	}
}

// TestAnyIdentity: where every certificate of the trust stores will do, so does one
// whose subject no x509.subject can name.
func TestAnyIdentity(t *testing.T) {
	units := notarytest.Name("signer")
	units.OrganizationalUnit = []string{"a", "b"}
	for _, m := range formats {
		blob := notarytest.MustSign(acme.Leaf(notarytest.CertOptions{Subject: units}), image, notarytest.SignOptions{MediaType: m})
		for identity, want := range map[string]verify.Reason{"*": verify.Verified, acmeIdentity: verify.IdentityMismatch} {
			if f := check(newChecker(t, acmeStore(t), noon, notarytest.Statement("prod", identity)), m, blob, image); f.Reason != want {
				t.Errorf("%s, %q: %s (%s)", m, identity, f.Reason, f.Detail)
			}
		}
	}
}

func year(year int) time.Time { return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// rawSign signs image without asking whether key and chain belong together.
func rawSign(s *notarytest.Signer, mediaType string) []byte {
	if mediaType == MediaTypeJWS {
		return notarytest.RawJWS(s, mustJSON(notarytest.JWSHeader(s)), notarytest.Payload(image, nil))
	}
	return notarytest.RawCOSE(s, notarytest.COSEHeader(s), notarytest.Payload(image, nil), nil)
}

// TestAmbiguous has a trusted signer sign bytes that readers could take for two
// things. Each has a twin that differs in nothing else and is good.
func TestAmbiguous(t *testing.T) {
	header := mustJSON(notarytest.JWSHeader(signer))
	payload := notarytest.Payload(image, nil)
	target := func(d ocispec.Descriptor) string {
		return string(mustJSON(map[string]any{"mediaType": d.MediaType, "digest": d.Digest, "size": d.Size}))
	}
	jws := func(header, payload []byte) []byte { return notarytest.RawJWS(signer, header, payload) }
	cbor := func(payload []byte) []byte {
		return notarytest.RawCOSE(signer, notarytest.COSEHeader(signer), payload, nil)
	}
	in := func(b []byte, old, with string) []byte {
		if !strings.Contains(string(b), old) {
			t.Fatalf("no %s in %s", old, b)
		}
		return []byte(strings.Replace(string(b), old, with, 1))
	}
	good := jws(header, payload)
	c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod"))
	for _, test := range []struct {
		name, mediaType string
		envelope        []byte
		ok              bool
	}{
		{"JWS", MediaTypeJWS, good, true},
		{"JWS, spaces", MediaTypeJWS, in(good, `"payload":`, ` "payload" : `), true},
		{"JWS, unknown member", MediaTypeJWS, in(good, `{"header"`, `{"x":[{"x":{}}],"header"`), true},
		{"JWS, two payloads", MediaTypeJWS, in(good, `{"header"`, `{"payload":"e30","header"`), false},
		{"JWS, PAYLOAD", MediaTypeJWS, in(good, `{"header"`, `{"PAYLOAD":"e30","header"`), false},
		{"JWS, two headers", MediaTypeJWS, in(good, `{"header"`, `{"header":{},"header"`), false},
		{"JWS, two chains", MediaTypeJWS, in(good, `"x5c":`, `"x5c":[],"x5c":`), false},
		{"JWS, X5C", MediaTypeJWS, in(good, `"x5c":`, `"X5C":[],"x5c":`), false},
		{"JWS, crit and Crit", MediaTypeJWS, jws(in(header, `"crit"`, `"Crit":["io.cncf.notary.signingScheme","a"],"a":1,"crit"`), payload), false},
		{"JWS, two algorithms", MediaTypeJWS, jws(in(header, `"alg"`, `"alg":"none","alg"`), payload), false},
		{"JWS, two targets", MediaTypeJWS, jws(header, []byte(`{"targetArtifact":`+target(other)+`,"targetArtifact":`+target(image)+`}`)), false},
		{"JWS, targetartifact", MediaTypeJWS, jws(header, []byte(`{"targetArtifact":`+target(other)+`,"targetartifact":`+target(image)+`}`)), false},
		{"JWS, two digests", MediaTypeJWS, jws(header, in(payload, `"digest"`, `"digest":"`+other.Digest.String()+`","digest"`)), false},
		{"JWS, long s", MediaTypeJWS, jws(header, in(payload, `"size"`, `"ſize":19,"size"`)), false},
		{"COSE", MediaTypeCOSE, cbor(payload), true},
		{"COSE, spaces in the payload", MediaTypeCOSE, cbor([]byte("\n " + string(payload) + "\n")), true},
		{"COSE, trailing data in the payload", MediaTypeCOSE, cbor([]byte(string(payload) + "{}")), false},
		{"COSE, payload is an array", MediaTypeCOSE, cbor([]byte("[" + string(payload) + "]")), false},
		{"COSE, two targets", MediaTypeCOSE, cbor([]byte(`{"targetArtifact":` + target(other) + `,"targetArtifact":` + target(image) + `}`)), false},
		{"COSE, nested payload", MediaTypeCOSE, cbor([]byte(`{"targetArtifact":` + target(image) + `,"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`)), false},
		{"COSE, untagged", MediaTypeCOSE, cbor(payload)[1:], false},
		{"COSE, other tag", MediaTypeCOSE, append([]byte{0xd1}, cbor(payload)[1:]...), false},
	} {
		f := check(c, test.mediaType, test.envelope, image)
		if ok := f.Reason == verify.Verified; ok != test.ok || !ok && f.Reason != verify.SignatureInvalid {
			t.Errorf("%s: %s (%s)", test.name, f.Reason, f.Detail)
		}
	}
	// COSE allows numbers as names of attributes.
	h := notarytest.COSEHeader(signer)
	h[int64(-70000)], h[cose.HeaderLabelCritical] = "x", []any{"io.cncf.notary.signingScheme", int64(-70000)}
	if f := check(c, MediaTypeCOSE, notarytest.RawCOSE(signer, h, payload, nil), image); f.Reason != verify.CriticalAttribute {
		t.Errorf("critical COSE attribute with a number for a name: %s (%s)", f.Reason, f.Detail)
	}
}

func TestOtherMediaTypes(t *testing.T) {
	c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod"))
	for _, m := range []string{"", "application/json", "application/jose", "application/jose+json; charset=utf-8", "APPLICATION/JOSE+JSON", "application/cose; cose-type=\"cose-sign1\""} {
		for _, good := range formats {
			f := check(c, m, notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: good}), image)
			if f.Reason != verify.SignatureInvalid || !strings.Contains(f.Detail, "media type") {
				t.Errorf("%q: %s (%s)", m, f.Reason, f.Detail)
			}
		}
	}
}

// TestCriticalExtensions puts extensions that Go's parser calls handled, and
// that nobody processes, into each certificate of the chain.
func TestCriticalExtensions(t *testing.T) {
	constraints := pkix.Extension{Id: []int{2, 5, 29, 30}, Critical: true, // permits only example.com
		Value: must(asn1.Marshal(struct {
			Permitted []struct {
				Name asn1.RawValue
			} `asn1:"tag:0"`
		}{[]struct{ Name asn1.RawValue }{{asn1.RawValue{Class: 2, Tag: 2, Bytes: []byte("example.com")}}}}))}
	policy := pkix.Extension{Id: []int{2, 5, 29, 36}, Critical: true, Value: []byte{0x30, 3, 0x80, 1, 0}}
	for _, ext := range []pkix.Extension{constraints, policy} {
		with := notarytest.CertOptions{Extensions: []pkix.Extension{ext}}
		soft := with
		soft.Extensions = []pkix.Extension{{Id: ext.Id, Value: ext.Value}}
		for where, o := range map[string]notarytest.CAOptions{
			"root":         {CertOptions: with, Intermediates: 1},
			"intermediate": {Intermediate: with, Intermediates: 1},
		} {
			ca := notarytest.NewCA(o)
			if got := len(ca.Root().UnhandledCriticalExtensions); got > 0 {
				t.Errorf("%s: this Go no longer handles %s", where, ext.Id)
			}
			store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": ca.PEM()}.FS()))
			blob := notarytest.MustSign(ca.Leaf(notarytest.CertOptions{}), image, notarytest.SignOptions{})
			f := check(newChecker(t, store, noon, notarytest.Statement("prod")), MediaTypeJWS, blob, image)
			if f.Reason != verify.CriticalAttribute || !strings.Contains(f.Detail, ext.Id.String()) {
				t.Errorf("%s with critical %s: %s (%s)", where, ext.Id, f.Reason, f.Detail)
			}
		}
		ca := notarytest.NewCA(notarytest.CAOptions{CertOptions: soft})
		store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": ca.PEM()}.FS()))
		blob := notarytest.MustSign(ca.Leaf(notarytest.CertOptions{}), image, notarytest.SignOptions{})
		if f := check(newChecker(t, store, noon, notarytest.Statement("prod")), MediaTypeJWS, blob, image); f.Reason != verify.Verified {
			t.Errorf("%s that is not critical: %s (%s)", ext.Id, f.Reason, f.Detail)
		}
	}
}

// TestLevels runs good and bad envelopes through every level. What a level logs
// becomes a warning; nothing but a good signature is ever VERIFIED.
func TestLevels(t *testing.T) {
	expiring := func(o notarytest.CertOptions) []byte {
		return notarytest.MustSign(acme.Leaf(o), image, notarytest.SignOptions{Expiry: noon.Add(-time.Hour)})
	}
	revocable := notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}, NotAfter: noon.Add(-time.Minute)}
	worst := expiring(revocable)
	all := []verify.Reason{verify.SignatureExpired, verify.CertificateExpired, verify.RevocationUnknown}
	for _, test := range []struct {
		level    string
		override map[string]string
		reason   verify.Reason // of worst
		warnings []verify.Reason
	}{
		{"strict", nil, verify.SignatureExpired, nil},
		{"strict", map[string]string{"expiry": "log"}, verify.CertificateExpired, all[:1]},
		{"strict", map[string]string{"expiry": "log", "authenticTimestamp": "log"}, verify.RevocationUnknown, all[:2]},
		{"strict", map[string]string{"expiry": "log", "authenticTimestamp": "log", "revocation": "log"}, verify.Verified, all},
		{"strict", map[string]string{"expiry": "log", "authenticTimestamp": "log", "revocation": "skip"}, verify.Verified, all[:2]},
		{"permissive", nil, verify.Verified, all},
		{"permissive", map[string]string{"expiry": "enforce"}, verify.SignatureExpired, nil},
		{"permissive", map[string]string{"revocation": "enforce"}, verify.RevocationUnknown, all[:2]},
		{"permissive", map[string]string{"revocation": "skip"}, verify.Verified, all[:2]},
		{"permissive", map[string]string{"authenticity": "log"}, verify.Verified, all},
		{"strict", map[string]string{"authenticity": "log"}, verify.SignatureExpired, nil},
		{"audit", nil, verify.Verified, all},
		{"audit", map[string]string{"authenticity": "enforce"}, verify.Verified, all},
		{"audit", map[string]string{"authenticTimestamp": "enforce"}, verify.CertificateExpired, all[:1]},
		{"skip", nil, verify.PolicyInvalid, nil},
	} {
		s := notarytest.Statement("prod", acmeIdentity)
		s.Level, s.Override = test.level, test.override
		if s.Level == "skip" {
			s.TrustStores, s.TrustedIdentities = nil, nil
		}
		c := newChecker(t, acmeStore(t), noon, s)
		if f := check(c, MediaTypeJWS, worst, image); f.Reason != test.reason || !slices.Equal(f.Warnings, test.warnings) {
			t.Errorf("%s %v: %s %v (%s)", test.level, test.override, f.Reason, f.Warnings, f.Detail)
		}
		good := verify.Verified
		if s.Level == "skip" {
			good = verify.PolicyInvalid
		}
		for _, m := range formats {
			if f := check(c, m, notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: m}), image); f.Reason != good || len(f.Warnings) > 0 {
				t.Errorf("%s %v: a good signature: %s %v", test.level, test.override, f.Reason, f.Warnings)
			}
			for name, blob := range map[string][]byte{
				"garbage":     []byte("garbage"),
				"self-signed": notarytest.MustSign(notarytest.SelfSigned(notarytest.CertOptions{}), image, notarytest.SignOptions{MediaType: m}),
				"other CA":    notarytest.MustSign(mallory, image, notarytest.SignOptions{MediaType: m}),
				"other":       notarytest.MustSign(signer, other, notarytest.SignOptions{MediaType: m}),
				"subject":     notarytest.MustSign(acme.Leaf(notarytest.CertOptions{Subject: pkix.Name{CommonName: "x"}}), image, notarytest.SignOptions{MediaType: m}),
				"plugin":      notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: m, Plugin: "x"}),
				"critical":    notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: m, Attributes: []notarytest.Attribute{{Key: "a", Critical: true, Value: 1}}}),
			} {
				if f := check(c, m, blob, image); f.Reason == verify.Verified || f.Signed != "" {
					t.Errorf("%s %v: %s is %s", test.level, test.override, name, f.Reason)
				}
			}
		}
	}
}

// TestUntil walks the clock over the ends of what a finding rests on: it is
// VERIFIED before and not after, whatever the machine's clock says.
func TestUntil(t *testing.T) {
	end := year(2028)
	for name, blob := range map[string][]byte{
		EndsSignature:   notarytest.MustSign(signer, image, notarytest.SignOptions{Expiry: end}),
		EndsCertificate: notarytest.MustSign(acme.Leaf(notarytest.CertOptions{NotAfter: end}), image, notarytest.SignOptions{Expiry: end.Add(time.Hour)}),
	} {
		for _, now := range []time.Time{notarytest.Begin, noon, end.Add(-1)} {
			f := check(newChecker(t, acmeStore(t), now, notarytest.Statement("prod")), MediaTypeJWS, blob, image)
			if f.Reason != verify.Verified || !f.Until.Equal(end) || f.Ends != name {
				t.Errorf("%s at %v: %s until %v, when %q ends", name, now, f.Reason, f.Until, f.Ends)
			}
		}
		for _, now := range []time.Time{{}, time.Unix(0, 0), notarytest.Begin.Add(-1), end, end.Add(1), year(2074), year(3000)} {
			f := check(newChecker(t, acmeStore(t), now, notarytest.Statement("prod")), MediaTypeJWS, blob, image)
			if f.Reason != verify.CertificateExpired && f.Reason != verify.SignatureExpired {
				t.Errorf("%s at %v: %s (%s)", name, now, f.Reason, f.Detail)
			}
		}
	}
	// What is only logged ends a finding too, as long as it is ahead.
	s := notarytest.Statement("prod")
	s.Level = "permissive"
	blob := notarytest.MustSign(signer, image, notarytest.SignOptions{Expiry: end})
	if f := check(newChecker(t, acmeStore(t), end, s), MediaTypeJWS, blob, image); f.Reason != verify.Verified || !f.Until.Equal(notarytest.End) {
		t.Errorf("permissive, expired: %s until %v", f.Reason, f.Until)
	}
	blob = notarytest.MustSign(acme.Leaf(notarytest.CertOptions{NotAfter: end}), image, notarytest.SignOptions{})
	if f := check(newChecker(t, acmeStore(t), end, s), MediaTypeJWS, blob, image); f.Reason != verify.Verified || !f.Until.Equal(notarytest.End) {
		t.Errorf("permissive, leaf expired: %s until %v", f.Reason, f.Until)
	}
}

func TestAnchors(t *testing.T) {
	own := notarytest.SelfSigned(notarytest.CertOptions{})
	for name, test := range map[string]struct {
		stores notarytest.Stores
		signer *notarytest.Signer
		anchor string
	}{
		"root":         {notarytest.Stores{"ca/acme/bundle.pem": notarytest.PEM(mallory.Chain[2], acme.Root())}, signer, "ca:acme/bundle.pem"},
		"intermediate": {notarytest.Stores{"ca/acme/i.cer": acme.Chain[0].Raw}, signer, "ca:acme/i.cer"},
		"itself":       {notarytest.Stores{"ca/acme/self.crt": notarytest.PEM(own.Chain[0])}, own, "ca:acme/self.crt"},
		"other type":   {notarytest.Stores{"ca/acme/m.crt": notarytest.PEM(mallory.Chain[2]), "signingAuthority/acme/root.crt": acme.PEM(), "tsa/acme/root.crt": acme.PEM()}, signer, ""},
		"other name":   {notarytest.Stores{"ca/acme/m.crt": notarytest.PEM(mallory.Chain[2]), "ca/acme2/root.crt": acme.PEM()}, signer, ""},
	} {
		store := must(LoadStore(test.stores.FS()))
		f := check(newChecker(t, store, noon, notarytest.Statement("prod")), MediaTypeJWS, notarytest.MustSign(test.signer, image, notarytest.SignOptions{}), image)
		want := verify.Verified
		if test.anchor == "" {
			want = verify.SignerUntrusted
		}
		if f.Reason != want || f.Signer.Anchor != test.anchor || f.Signer.Thumbprint != test.signer.Thumbprint() {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

// TestRevocable: where the statement enforces revocation, any certificate but the
// root that names a place to ask makes the answer unknown.
func TestRevocable(t *testing.T) {
	crl := notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}}
	for name, test := range map[string]struct {
		ca     notarytest.CAOptions
		reason verify.Reason
	}{
		"root":         {notarytest.CAOptions{CertOptions: crl, Intermediates: 1}, verify.Verified},
		"intermediate": {notarytest.CAOptions{Intermediate: crl, Intermediates: 1}, verify.RevocationUnknown},
	} {
		ca := notarytest.NewCA(test.ca)
		store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": ca.PEM()}.FS()))
		blob := notarytest.MustSign(ca.Leaf(notarytest.CertOptions{}), image, notarytest.SignOptions{})
		f := check(newChecker(t, store, noon, notarytest.Statement("prod")), MediaTypeJWS, blob, image)
		if f.Reason != test.reason {
			t.Errorf("%s: %s (%s)", name, f.Reason, f.Detail)
		}
	}
}

func TestRefusals(t *testing.T) {
	c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod"))
	ev := verify.Evidence{MediaType: MediaTypeJWS, Blob: notarytest.MustSign(signer, image, notarytest.SignOptions{})}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	broken := ev
	broken.Err = fmt.Errorf("layer of 3 bytes")
	for name, test := range map[string]struct {
		ctx       context.Context
		ev        verify.Evidence
		want      ocispec.Descriptor
		statement string
		reason    verify.Reason
	}{
		"good":              {context.Background(), ev, image, "prod", verify.Verified},
		"unknown statement": {context.Background(), ev, image, "dev", verify.PolicyInvalid},
		"no statement":      {context.Background(), ev, image, "", verify.PolicyInvalid},
		"no descriptor":     {context.Background(), ev, ocispec.Descriptor{}, "prod", verify.Internal},
		"no media type":     {context.Background(), ev, ocispec.Descriptor{Digest: image.Digest, Size: image.Size}, "prod", verify.Internal},
		"no digest":         {context.Background(), ev, ocispec.Descriptor{MediaType: image.MediaType, Size: image.Size}, "prod", verify.Internal},
		"ended":             {ended, ev, image, "prod", verify.Pending},
		"unread":            {context.Background(), broken, image, "prod", verify.SignatureInvalid},
	} {
		if f := c.Check(test.ctx, test.ev, test.want, test.statement); f.Reason != test.reason {
			t.Errorf("%s: %s (%s)", name, f.Reason, f.Detail)
		}
	}
	if f := (&Checker{}).Check(context.Background(), ev, image, "prod"); f.Reason != verify.PolicyInvalid {
		t.Errorf("zero Checker: %s", f.Reason)
	}
	tight := must(New([]verify.Statement{notarytest.Statement("prod")}, acmeStore(t), Options{Limits: verify.Limits{Certificates: 2}, Now: at(noon)}))
	if f := check(tight, ev.MediaType, ev.Blob, image); f.Reason != verify.LimitExceeded {
		t.Errorf("chain of 3, limit 2: %s", f.Reason)
	}
	tight = must(New([]verify.Statement{notarytest.Statement("prod")}, acmeStore(t), Options{Limits: verify.Limits{EnvelopeBytes: int64(len(ev.Blob) - 1)}, Now: at(noon)}))
	if f := check(tight, ev.MediaType, ev.Blob, image); f.Reason != verify.LimitExceeded {
		t.Errorf("envelope one byte over the limit: %s", f.Reason)
	}
	panics := must(New([]verify.Statement{notarytest.Statement("prod")}, acmeStore(t), Options{Now: func() time.Time { panic("broken clock") }}))
	if f := check(panics, ev.MediaType, ev.Blob, image); f.Reason != verify.SignatureInvalid || !strings.Contains(f.Detail, "panic") {
		t.Errorf("panic: %s (%s)", f.Reason, f.Detail)
	}
}

// TestHugeKey: a key of 200,000 bits would cost minutes in each check of a
// signature. It is refused before the first, also where the chain is trusted.
func TestHugeKey(t *testing.T) {
	der := hugeKey(t, acme.Chain[0].Raw)
	env := map[string]any{}
	if err := json.Unmarshal(notarytest.MustSign(signer, image, notarytest.SignOptions{}), &env); err != nil {
		t.Fatal(err)
	}
	env["header"] = map[string]any{"x5c": [][]byte{signer.Chain[0].Raw, der, acme.Root().Raw}}
	start := time.Now()
	f := check(newChecker(t, acmeStore(t), noon, notarytest.Statement("prod")), MediaTypeJWS, mustJSON(env), image)
	if f.Reason != verify.SignatureInvalid || !strings.Contains(f.Detail, "200000 bits") {
		t.Errorf("%s (%s)", f.Reason, f.Detail)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %v", d)
	}
}

// hugeKey puts an RSA key of 200,000 bits into a certificate; its signature is
// then wrong, which costs nothing to find out for who looks at the key first.
func hugeKey(t *testing.T, der []byte) []byte {
	t.Helper()
	var c struct {
		TBS struct {
			Version    int `asn1:"explicit,tag:0"`
			Serial     asn1.RawValue
			Algorithm  asn1.RawValue
			Issuer     asn1.RawValue
			Validity   asn1.RawValue
			Subject    asn1.RawValue
			Key        asn1.RawValue
			Extensions asn1.RawValue
		}
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &c); err != nil {
		t.Fatal(err)
	}
	n := make([]byte, 25000)
	for i := range n {
		n[i] = 0xff
	}
	key := must(asn1.Marshal(struct {
		N asn1.RawValue
		E int
	}{asn1.RawValue{Tag: asn1.TagInteger, Bytes: append([]byte{0}, n...)}, 65537}))
	c.TBS.Key = asn1.RawValue{FullBytes: must(asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}, Parameters: asn1.NullRawValue},
		asn1.BitString{Bytes: key, BitLength: 8 * len(key)},
	}))}
	return must(asn1.Marshal(c))
}

func TestRequirement(t *testing.T) {
	store := func(s notarytest.Stores) *Store { return must(LoadStore(s.FS())) }
	one := store(notarytest.Stores{"ca/acme/root.crt": acme.PEM(), "ca/b/m.crt": notarytest.PEM(mallory.Chain[2])})
	base := notarytest.Statement("prod", acmeIdentity)
	requirement := func(s verify.Statement, st *Store) [32]byte { return newChecker(t, st, noon, s).Requirement(s.Name) }
	want := requirement(base, one)
	if want == [32]byte{} {
		t.Fatal("the requirement is zero")
	}

	same := base
	same.Name, same.Scopes = "other", []string{"registry.local/app"}
	for name, got := range map[string][32]byte{
		"name and scopes": requirement(same, one),
		"unrelated store": requirement(base, store(notarytest.Stores{"ca/acme/root.crt": acme.PEM(), "tsa/t/root.crt": acme.PEM()})),
		"DER, not PEM":    requirement(base, store(notarytest.Stores{"ca/acme/root.crt": acme.Root().Raw})),
	} {
		if got != want {
			t.Errorf("%s: the requirement changed", name)
		}
	}

	seen := map[[32]byte]string{want: "base"}
	for name, change := range map[string]func(s *verify.Statement){
		"level":      func(s *verify.Statement) { s.Level = "permissive" },
		"override":   func(s *verify.Statement) { s.Override = map[string]string{"expiry": "log"} },
		"override 2": func(s *verify.Statement) { s.Override = map[string]string{"revocation": "log"} },
		"timestamp":  func(s *verify.Statement) { s.VerifyTimestamp = "always" },
		"identities": func(s *verify.Statement) { s.TrustedIdentities = []string{"*"} },
		"identity more": func(s *verify.Statement) {
			s.TrustedIdentities = append(slices.Clone(s.TrustedIdentities), "x509.subject: C=DE, ST=BE, O=b")
		},
		"identity as long": func(s *verify.Statement) {
			s.TrustedIdentities = []string{strings.Replace(acmeIdentity, "acme", "evil", 1)}
		},
		"store more": func(s *verify.Statement) { s.TrustStores = []string{"ca:acme", "ca:b"} },
		"store":      func(s *verify.Statement) { s.TrustStores = []string{"ca:b"} },
	} {
		s := base
		s.Override = maps.Clone(base.Override)
		change(&s)
		got := requirement(s, one)
		if seen[got] != "" {
			t.Errorf("%s: the requirement is that of %s", name, seen[got])
		}
		seen[got] = name
	}
	for name, s := range map[string]*Store{
		"certificate": store(notarytest.Stores{"ca/acme/root.crt": notarytest.PEM(mallory.Chain[2])}),
		"added":       store(notarytest.Stores{"ca/acme/root.crt": notarytest.PEM(acme.Root(), mallory.Chain[2])}),
		"renamed":     store(notarytest.Stores{"ca/acme/r.crt": acme.PEM()}),
	} {
		got := requirement(base, s)
		if seen[got] != "" {
			t.Errorf("%s: the requirement is that of %s", name, seen[got])
		}
		seen[got] = name
	}

	// What moves from one part to the next is another requirement.
	parts := map[[32]byte]bool{}
	moved := []verify.Statement{
		{TrustedIdentities: []string{"ab"}, TrustStores: []string{"c"}}, {TrustedIdentities: []string{"a"}, TrustStores: []string{"bc"}},
		{TrustedIdentities: []string{"ab", "c"}}, {TrustedIdentities: []string{"a", "bc"}}, {TrustStores: []string{"ab", "c"}},
		{Level: "ab", VerifyTimestamp: "c"}, {Level: "a", VerifyTimestamp: "bc"},
	}
	for _, s := range moved {
		parts[requirementOf(s, one)] = true
	}
	if len(parts) != len(moved) {
		t.Errorf("%d requirements of %d statements", len(parts), len(moved))
	}

	none := verify.Statement{Name: "none", Scopes: []string{"*"}, Level: "skip"}
	c := newChecker(t, one, noon, base, none)
	for _, name := range []string{"none", "unknown", ""} {
		if c.Requirement(name) != [32]byte{} {
			t.Errorf("%q has a requirement", name)
		}
	}
}

// Where a trust store has no certificate none of its type counts, as in notation,
// and the others do: the last root can be taken away.
func TestEmptyTrustStore(t *testing.T) {
	store := must(LoadStore(notarytest.Stores{
		"ca/acme/root.crt": acme.PEM(), "signingAuthority/acme/root.crt": acme.PEM(), "tsa/t/root.crt": tsaCA.PEM(),
	}.FS()))
	envelope := stamp(MediaTypeJWS, tsa, notarytest.TokenOptions{})
	for stores, reason := range map[string]verify.Reason{
		"ca:acme": verify.Verified, "ca:acme ca:gone": verify.SignerUntrusted, "ca:gone ca:acme": verify.SignerUntrusted,
		"ca:gone": verify.SignerUntrusted, "ca:gone ca:away": verify.SignerUntrusted,
		"ca:gone signingAuthority:acme": verify.SignerUntrusted, "ca:acme signingAuthority:gone": verify.Verified,
		"ca:acme tsa:gone": verify.TimestampInvalid, "ca:acme tsa:t": verify.Verified, "ca:acme tsa:t tsa:gone": verify.TimestampInvalid,
	} {
		s := notarytest.Statement("prod", acmeIdentity)
		s.TrustStores = strings.Fields(stores)
		c, err := New([]verify.Statement{s}, store, Options{Now: at(noon)})
		if err != nil {
			t.Errorf("%s: %v", stores, err)
			continue
		}
		f := check(c, MediaTypeJWS, envelope, image)
		if f.Reason != reason || c.Requirement("prod") == [32]byte{} {
			t.Errorf("%s: %s: %s", stores, f.Reason, f.Detail)
		}
	}
	if !store.Holds("ca:acme") || store.Holds("ca:gone") {
		t.Error("Holds is wrong")
	}
}

func TestNewRefuses(t *testing.T) {
	store := must(LoadStore(notarytest.Stores{
		"ca/acme/root.crt": acme.PEM(), "tsa/t/root.crt": acme.PEM(), "signingAuthority/s/root.crt": acme.PEM(),
	}.FS()))
	for name, test := range map[string]struct {
		change func(s *verify.Statement)
		want   string
	}{
		"no store":           {func(s *verify.Statement) { s.TrustStores = nil }, "trust stores"},
		"no identity":        {func(s *verify.Statement) { s.TrustedIdentities = nil }, "identities"},
		"tsa alone":          {func(s *verify.Statement) { s.TrustStores = []string{"tsa:t"} }, "no signer"},
		"store type":         {func(s *verify.Statement) { s.TrustStores = []string{"CA:acme"} }, `"CA:acme"`},
		"store without type": {func(s *verify.Statement) { s.TrustStores = []string{"acme"} }, `"acme"`},
		"level":              {func(s *verify.Statement) { s.Level = "Strict" }, `"Strict"`},
		"no level":           {func(s *verify.Statement) { s.Level = "" }, "level"},
		"override check":     {func(s *verify.Statement) { s.Override = map[string]string{"integrity": "log"} }, `"integrity"`},
		"override action":    {func(s *verify.Statement) { s.Override = map[string]string{"expiry": "ignore"} }, `"ignore"`},
		"override skip":      {func(s *verify.Statement) { s.Override = map[string]string{"authenticity": "skip"} }, "cannot be skipped"},
		"skip overridden": {func(s *verify.Statement) {
			*s = verify.Statement{Name: "prod", Level: "skip", Override: map[string]string{"expiry": "log"}}
		}, "overridden"},
		"skip with stores": {func(s *verify.Statement) { s.Level = "skip" }, "no use"},
		"timestamp":        {func(s *verify.Statement) { s.VerifyTimestamp = "never" }, "verifyTimestamp"},
		"identity kind":    {func(s *verify.Statement) { s.TrustedIdentities = []string{"x509.san:a"} }, "x509.san"},
		"identity DN":      {func(s *verify.Statement) { s.TrustedIdentities = []string{"x509.subject: CN=a"} }, "mandatory"},
		"identity and *":   {func(s *verify.Statement) { s.TrustedIdentities = []string{"*", acmeIdentity} }, "wildcard"},
		"no name":          {func(s *verify.Statement) { s.Name = "" }, "no name"},
	} {
		s := notarytest.Statement("prod", acmeIdentity)
		test.change(&s)
		_, err := New([]verify.Statement{s}, store, Options{Now: at(noon)})
		if err == nil || !strings.Contains(err.Error(), test.want) || s.Name != "" && !strings.Contains(err.Error(), `statement "prod"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := notarytest.Statement("prod")
	if _, err := New([]verify.Statement{s, s}, store, Options{Now: at(noon)}); err == nil {
		t.Error("two statements of one name")
	}
	if _, err := New([]verify.Statement{s}, store, Options{}); err == nil {
		t.Error("no clock")
	}
	if _, err := New([]verify.Statement{s}, nil, Options{Now: at(noon)}); err == nil {
		t.Error("no store")
	}
	if c, err := New(nil, &Store{}, Options{Now: at(noon)}); err != nil || c == nil {
		t.Errorf("no statements: %v", err)
	}
}
