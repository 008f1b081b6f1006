package notary

import (
	"fmt"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/tspclient-go"

	"github.com/tidewaiter/tidewaiter/verify"
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
	d = Description{Subject: verify.Clean(leaf.Subject.String(), 512), Thumbprint: thumbprint(leaf), NotAfter: leaf.NotAfter}
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
