package notary

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/tspclient-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Description is what a signature envelope says of itself. Nothing of it is
// verified: it is for showing, and never for deciding.
type Description struct {
	Subject    string    // of the leaf certificate, RFC 4514, at most 512 bytes
	Thumbprint string    // SHA-256 of the leaf certificate, hex
	NotAfter   time.Time // of the leaf certificate
	Signed     time.Time // zero: it does not say
	Expiry     time.Time // zero: none
	Timestamp  time.Time // that the countersignature of a TSA tells; zero: none can be read

	Target ocispec.Descriptor // media type, digest and size of what was signed; zero: it does not say
}

// Describe reads an envelope. Zero fields of l mean verify.DefaultLimits. Its errors
// are those of [Checker] about bytes that are no envelope.
func Describe(ev verify.Evidence, l verify.Limits) (d Description, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic while reading a signature: %v", p)
		}
	}()
	e, err := open(ev.MediaType, ev.Blob, l.Or(verify.DefaultLimits))
	if err != nil {
		return Description{}, err
	}
	leaf := e.chain[0]
	d = Description{Subject: text.Clean(leaf.Subject.String(), 512), Thumbprint: thumbprint(leaf), NotAfter: leaf.NotAfter}
	var payload struct {
		TargetArtifact ocispec.Descriptor `json:"targetArtifact"`
	}
	if err := json.Unmarshal(e.payload, &payload); err != nil {
		return d, fmt.Errorf("payload: %w", err)
	}
	t := payload.TargetArtifact
	d.Target = ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size}
	parsed, err := signature.ParseEnvelope(ev.MediaType, ev.Blob)
	if err != nil {
		return d, err
	}
	content, err := parsed.Content()
	if err != nil {
		return d, err
	}
	info := content.SignerInfo
	d.Signed, d.Expiry = info.SignedAttributes.SigningTime, info.SignedAttributes.Expiry
	if token, err := tspclient.ParseSignedToken(info.UnsignedAttributes.TimestampSignature); err == nil {
		if tst, err := token.Info(); err == nil {
			d.Timestamp = tst.GenTime
		}
	}
	return d, nil
}
