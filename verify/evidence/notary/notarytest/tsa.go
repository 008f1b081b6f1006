package notarytest

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"math/big"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/tspclient-go"
	"github.com/veraison/go-cose"
)

// TimestampingUsage is the extended key usage of a TSA's certificate, critical
// as RFC 3161 section 2.3 asks.
var TimestampingUsage = pkix.Extension{
	Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true,
	Value: must(asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})),
}

// TSA issues the certificate of a timestamping authority. Extensions of o come
// after TimestampingUsage. Its key must be P256.
func (ca *CA) TSA(o CertOptions) *Signer {
	o.Extensions = append([]pkix.Extension{TimestampingUsage}, o.Extensions...)
	return ca.Leaf(o)
}

// TokenOptions say what is unusual about a timestamp. The zero value is a good
// one, made at SigningTime.
type TokenOptions struct {
	Time       time.Time
	Accuracy   int              // in seconds
	Extensions []pkix.Extension // of the TSTInfo
	// Certificates in the token, which need no order; default: all but the root.
	Certificates []*x509.Certificate
	Signers      int // how often the signer info occurs; default: once
}

var (
	oidSHA256          = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidSignedData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidTSTInfo         = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}
	oidContentType     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningCertV2   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47}
)

type (
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values asn1.RawValue `asn1:"set"`
	}
	signerID struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	signerInfo struct {
		Version    int
		ID         signerID
		Digest     pkix.AlgorithmIdentifier
		Attributes []attribute `asn1:"set,tag:0"`
		Algorithm  pkix.AlgorithmIdentifier
		Signature  []byte
	}
	encapsulated struct {
		Type    asn1.ObjectIdentifier
		Content []byte `asn1:"explicit,tag:0"`
	}
	signedData struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      encapsulated
		Certificates asn1.RawValue
		Signers      []signerInfo `asn1:"set"`
	}
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content signedData `asn1:"explicit,tag:0"`
	}
)

// Token is the RFC 3161 timestamp token of tsa over message.
func Token(tsa *Signer, message []byte, o TokenOptions) []byte {
	if o.Time.IsZero() {
		o.Time = SigningTime
	}
	if o.Certificates == nil {
		o.Certificates = tsa.Chain[:len(tsa.Chain)-1]
	}
	leaf, sha := tsa.Chain[0], pkix.AlgorithmIdentifier{Algorithm: oidSHA256}
	imprint := sha256.Sum256(message)
	info := must(asn1.Marshal(tspclient.TSTInfo{
		Version: 1, Policy: asn1.ObjectIdentifier{1, 2, 3}, SerialNumber: big.NewInt(serial.Add(1)), GenTime: o.Time.UTC(),
		MessageImprint: tspclient.MessageImprint{HashAlgorithm: sha, HashedMessage: imprint[:]},
		Accuracy:       tspclient.Accuracy{Seconds: o.Accuracy}, Extensions: o.Extensions,
	}))
	infoSum, leafSum := sha256.Sum256(info), sha256.Sum256(leaf.Raw)
	set := func(v any) asn1.RawValue {
		return asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSet, IsCompound: true, Bytes: must(asn1.Marshal(v))}
	}
	type certID struct{ Hash []byte }
	attributes := []attribute{
		{oidContentType, set(oidTSTInfo)},
		{oidMessageDigest, set(infoSum[:])},
		{oidSigningCertV2, set(struct{ Certs []certID }{[]certID{{leafSum[:]}}})},
	}
	sum := sha256.Sum256(must(asn1.MarshalWithParams(attributes, "set")))
	signer := signerInfo{
		Version: 1, ID: signerID{asn1.RawValue{FullBytes: leaf.RawIssuer}, leaf.SerialNumber}, Digest: sha, Attributes: attributes,
		Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidECDSAWithSHA256},
		Signature: must(tsa.Key.Sign(nil, sum[:], crypto.SHA256)),
	}
	data := signedData{
		Version: 3, Digests: []pkix.AlgorithmIdentifier{sha}, Content: encapsulated{oidTSTInfo, info},
		Certificates: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true},
	}
	for _, c := range o.Certificates {
		data.Certificates.Bytes = append(data.Certificates.Bytes, c.Raw...)
	}
	for range max(o.Signers, 1) {
		data.Signers = append(data.Signers, signer)
	}
	return must(asn1.Marshal(contentInfo{oidSignedData, data}))
}

// Timestamp puts into envelope, as its countersignature, what token makes of its
// signature. It is not signed, so that the envelope stays intact with any token.
func Timestamp(envelope []byte, mediaType string, token func(signature []byte) []byte) []byte {
	const name = "io.cncf.notary.timestampSignature"
	t := token(must(must(signature.ParseEnvelope(mediaType, envelope)).Content()).SignerInfo.Signature)
	if mediaType == mediaTypeCOSE {
		var msg cose.Sign1Message
		if err := msg.UnmarshalCBOR(envelope); err != nil {
			panic("notarytest: " + err.Error())
		}
		msg.Headers.RawUnprotected, msg.Headers.Unprotected[name] = nil, t
		return must(msg.MarshalCBOR())
	}
	var jws map[string]any
	if err := json.Unmarshal(envelope, &jws); err != nil {
		panic("notarytest: " + err.Error())
	}
	jws["header"].(map[string]any)[name] = t
	return must(json.Marshal(jws))
}
