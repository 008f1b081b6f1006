package notarytest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/golang-jwt/jwt/v4"
	"github.com/notaryproject/notation-core-go/signature"
	_ "github.com/notaryproject/notation-core-go/signature/cose" // registers the envelope type
	_ "github.com/notaryproject/notation-core-go/signature/jws"  // registers the envelope type
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/veraison/go-cose"
)

// Signing schemes (signature-specification.md, "Signing Schemes").
const (
	SchemeX509             = string(signature.SigningSchemeX509)
	SchemeSigningAuthority = string(signature.SigningSchemeX509SigningAuthority)
)

// PayloadType is the content type of the payload that is signed.
const PayloadType = "application/vnd.cncf.notary.payload.v1+json"

// An Attribute is an extended signed attribute. COSE keys may also be int64.
type Attribute = signature.Attribute

// SignOptions say what is unusual about a signature. The zero value is a JWS
// of scheme notary.x509, made at SigningTime, that does not expire.
type SignOptions struct {
	MediaType   string // mediaTypeJWS (default) or mediaTypeCOSE
	Scheme      string
	SigningTime time.Time
	Expiry      time.Time
	Attributes  []Attribute
	Plugin      string            // verification plugin named in the envelope, a critical attribute
	Annotations map[string]string // of the target artifact in the payload
	ContentType string            // default: PayloadType
	Payload     []byte            // instead of the payload for the descriptor; JSON
}

// Payload is what is signed for desc: its media type, digest and size, with
// annotations.
func Payload(desc ocispec.Descriptor, annotations map[string]string) []byte {
	return must(json.Marshal(map[string]any{"targetArtifact": ocispec.Descriptor{
		MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, Annotations: annotations,
	}}))
}

// Sign returns the envelope of a signature by s over desc, as notation makes it.
func Sign(s *Signer, desc ocispec.Descriptor, o SignOptions) ([]byte, error) {
	if o.MediaType == "" {
		o.MediaType = mediaTypeJWS
	}
	if o.Scheme == "" {
		o.Scheme = SchemeX509
	}
	if o.SigningTime.IsZero() {
		o.SigningTime = SigningTime
	}
	if o.ContentType == "" {
		o.ContentType = PayloadType
	}
	if o.Payload == nil {
		o.Payload = Payload(desc, o.Annotations)
	}
	if o.Plugin != "" {
		o.Attributes = append(o.Attributes[:len(o.Attributes):len(o.Attributes)],
			Attribute{Key: "io.cncf.notary.verificationPlugin", Critical: true, Value: o.Plugin})
	}
	key, err := signature.NewLocalSigner(s.Chain, s.Key)
	if err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	env, err := signature.NewEnvelope(o.MediaType)
	if err != nil {
		return nil, fmt.Errorf("envelope: %w", err)
	}
	req := &signature.SignRequest{
		Payload:                  signature.Payload{ContentType: o.ContentType, Content: o.Payload},
		Signer:                   key,
		SigningTime:              o.SigningTime,
		Expiry:                   o.Expiry,
		ExtendedSignedAttributes: o.Attributes,
		SigningAgent:             "notarytest",
		SigningScheme:            signature.SigningScheme(o.Scheme),
	}
	return env.Sign(req)
}

// MustSign is Sign for options that are known to be good.
func MustSign(s *Signer, desc ocispec.Descriptor, o SignOptions) []byte {
	return must(Sign(s, desc, o))
}

// JWSHeader is the protected header that a JWS by s has, ready to be changed
// and handed to RawJWS.
func JWSHeader(s *Signer) map[string]any {
	return map[string]any{
		"alg": jwsAlgorithm(s), "cty": PayloadType, "crit": []string{"io.cncf.notary.signingScheme"},
		"io.cncf.notary.signingScheme": SchemeX509,
		"io.cncf.notary.signingTime":   SigningTime.Format(time.RFC3339),
	}
}

// RawJWS signs any protected header and payload with the key of s and returns a
// JWS envelope with the chain of s.
func RawJWS(s *Signer, protected, payload []byte) []byte {
	b64 := base64.RawURLEncoding.EncodeToString
	signed := b64(protected) + "." + b64(payload)
	sig := must(jwt.GetSigningMethod(jwsAlgorithm(s)).Sign(signed, s.Key))
	return must(json.Marshal(map[string]any{
		"protected": b64(protected), "payload": b64(payload), "signature": sig,
		"header": map[string]any{"x5c": raw(s)},
	}))
}

// COSEHeader is the protected header that a COSE envelope by s has, ready to be
// changed and handed to RawCOSE. Times are tagged as the specification asks.
func COSEHeader(s *Signer) cose.ProtectedHeader {
	return cose.ProtectedHeader{
		cose.HeaderLabelAlgorithm:      coseAlgorithm(s),
		cose.HeaderLabelContentType:    PayloadType,
		cose.HeaderLabelCritical:       []any{"io.cncf.notary.signingScheme"},
		"io.cncf.notary.signingScheme": SchemeX509,
		"io.cncf.notary.signingTime":   COSETime(SigningTime),
	}
}

// RawCOSE signs any protected header and payload with the key of s and returns a
// COSE envelope with the chain of s and further unprotected headers.
func RawCOSE(s *Signer, protected cose.ProtectedHeader, payload []byte, unprotected cose.UnprotectedHeader) []byte {
	msg := cose.NewSign1Message()
	msg.Headers.Protected, msg.Payload = protected, payload
	for k, v := range unprotected {
		msg.Headers.Unprotected[k] = v
	}
	if err := msg.Sign(rand.Reader, nil, must(cose.NewSigner(coseAlgorithm(s), s.Key))); err != nil {
		panic("notarytest: " + err.Error())
	}
	var chain []any
	for _, c := range raw(s) {
		chain = append(chain, c)
	}
	msg.Headers.Unprotected[cose.HeaderLabelX5Chain] = chain
	return must(msg.MarshalCBOR())
}

func raw(s *Signer) (chain [][]byte) {
	for _, c := range s.Chain {
		chain = append(chain, c.Raw)
	}
	return chain
}

// bits is the size of the key of s, and whether it is an RSA key.
func bits(s *Signer) (n int, isRSA bool) {
	switch k := s.Key.Public().(type) {
	case *rsa.PublicKey:
		return k.N.BitLen(), true
	case *ecdsa.PublicKey:
		return k.Curve.Params().BitSize, false
	}
	panic("notarytest: key is neither RSA nor ECDSA")
}

func jwsAlgorithm(s *Signer) string {
	n, isRSA := bits(s)
	if isRSA {
		return map[int]string{2048: "PS256", 3072: "PS384", 4096: "PS512"}[n]
	}
	return map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[n]
}

func coseAlgorithm(s *Signer) cose.Algorithm {
	n, isRSA := bits(s)
	if isRSA {
		return map[int]cose.Algorithm{2048: cose.AlgorithmPS256, 3072: cose.AlgorithmPS384, 4096: cose.AlgorithmPS512}[n]
	}
	return map[int]cose.Algorithm{256: cose.AlgorithmES256, 384: cose.AlgorithmES384, 521: cose.AlgorithmES512}[n]
}

// COSETime is a time as protected headers of COSE envelopes hold it.
func COSETime(t time.Time) cbor.RawMessage {
	mode := must(cbor.EncOptions{Time: cbor.TimeUnix, TimeTag: cbor.EncTagRequired}.EncMode())
	return must(mode.Marshal(t))
}
