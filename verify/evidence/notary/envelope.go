package notary

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Bounds of what an envelope may hold besides its length and the length of its
// chain, which verify.Limits bound.
const (
	maxNesting = 32   // of JSON and CBOR, as in the CBOR libraries that notation uses
	maxRSABits = 8192 // of any key in a chain: one check with a key of a million bits takes minutes
)

// An envelope is what can be said of signature bytes before anything in them is
// verified: the claims in it are an attacker's. It exists so that bytes which
// would cost much or could be read in two ways never reach a library.
type envelope struct {
	chain   []*x509.Certificate // leaf first, as claimed
	payload []byte
}

// open reads blob as mediaType says and no other way. An error wraps
// verify.ErrBudget where the limits refused it. It costs time and memory linear
// in the length of blob, and no public-key operation.
func open(mediaType string, blob []byte, limits verify.Limits) (*envelope, error) {
	if n := int64(len(blob)); n > limits.EnvelopeBytes {
		return nil, fmt.Errorf("%w: an envelope of %d bytes, limit %d", verify.ErrBudget, n, limits.EnvelopeBytes)
	}
	var raw [][]byte
	var e envelope
	var err error
	switch mediaType {
	case MediaTypeJWS:
		raw, e.payload, err = openJWS(blob)
	case MediaTypeCOSE:
		raw, e.payload, err = openCOSE(blob)
	default:
		return nil, fmt.Errorf("signature envelope of unknown media type %q", mediaType)
	}
	if err != nil {
		return nil, fmt.Errorf("not a Notary Project envelope of type %s: %w", mediaType, err)
	}
	if err := unambiguous(e.payload); err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	if len(raw) == 0 {
		return nil, errors.New("the envelope has no certificate chain")
	}
	if len(raw) > limits.Certificates {
		return nil, fmt.Errorf("%w: a chain of %d certificates, limit %d", verify.ErrBudget, len(raw), limits.Certificates)
	}
	for i, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() > maxRSABits {
			return nil, fmt.Errorf("certificate %d of the chain has an RSA key of %d bits, more than %d", i, k.N.BitLen(), maxRSABits)
		}
		e.chain = append(e.chain, c)
	}
	return &e, nil
}

// openJWS reads the JSON serialisation that signature-envelope-jws.md describes,
// into the same shape as notation-core-go does.
func openJWS(blob []byte) (chain [][]byte, payload []byte, err error) {
	if err := unambiguous(blob); err != nil {
		return nil, nil, err
	}
	var jws struct {
		Payload   string `json:"payload"`
		Protected string `json:"protected"`
		Header    struct {
			X5C [][]byte `json:"x5c"`
		} `json:"header"`
	}
	if err := json.Unmarshal(blob, &jws); err != nil {
		return nil, nil, err
	}
	protected, err := base64.RawURLEncoding.DecodeString(jws.Protected)
	if err == nil {
		err = unambiguous(protected)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("protected header: %w", err)
	}
	payload, err = base64.RawURLEncoding.DecodeString(jws.Payload)
	if err != nil {
		return nil, nil, fmt.Errorf("payload: %w", err)
	}
	return jws.Header.X5C, payload, nil
}

// unambiguous reports whether b is one JSON object that every reader reads
// alike: no name twice in an object, not even in another case, since encoding/json
// matches names without regard to case and keeps the last. It also bounds nesting.
func unambiguous(b []byte) error {
	if !json.Valid(b) { // also looks at what follows the object
		return errors.New("not JSON")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	type level struct {
		names map[string]bool // nil in an array
		value bool            // in an object: a name was read, its value is next
	}
	var stack []level
	for {
		t, err := d.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if len(stack) == 0 && t != json.Delim('{') {
			return errors.New("not a JSON object")
		}
		var top *level
		if len(stack) > 0 {
			top = &stack[len(stack)-1]
		}
		if t == json.Delim('}') || t == json.Delim(']') {
			stack = stack[:len(stack)-1]
			continue
		}
		if top != nil && top.names != nil {
			if !top.value {
				name := t.(string)
				// Both, since a few characters have a third form (K for kelvin, long s).
				folded := strings.ToLower(strings.ToUpper(name))
				if top.names[folded] {
					return fmt.Errorf("the name %s occurs twice", text.Quote(name, 64))
				}
				top.names[folded], top.value = true, true
				continue
			}
			top.value = false
		}
		if t == json.Delim('{') || t == json.Delim('[') {
			if len(stack) == maxNesting {
				return fmt.Errorf("nested deeper than %d", maxNesting)
			}
			l := level{}
			if t == json.Delim('{') {
				l.names = map[string]bool{}
			}
			stack = append(stack, l)
		}
	}
}

// cborMode reads CBOR as go-cose does.
var cborMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey:       cbor.DupMapKeyEnforcedAPF,
		IndefLength:     cbor.IndefLengthForbidden,
		IntDec:          cbor.IntDecConvertSignedOrFail,
		MaxNestedLevels: maxNesting,
	}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

const (
	tagSign1     = 18        // RFC 9052, table 1
	labelX5Chain = int64(33) // RFC 9360, table 1
)

// openCOSE reads the COSE_Sign1 message that signature-envelope-cose.md describes.
func openCOSE(blob []byte) (chain [][]byte, payload []byte, err error) {
	var tag cbor.RawTag
	if err := cborMode.Unmarshal(blob, &tag); err != nil {
		return nil, nil, err
	}
	var msg struct {
		_           struct{} `cbor:",toarray"`
		Protected   cbor.RawMessage
		Unprotected map[any]cbor.RawMessage
		Payload     []byte
		Signature   cbor.RawMessage
	}
	if tag.Number != tagSign1 {
		return nil, nil, fmt.Errorf("CBOR tag %d, not COSE_Sign1", tag.Number)
	}
	if err := cborMode.Unmarshal(tag.Content, &msg); err != nil {
		return nil, nil, err
	}
	if x5 := msg.Unprotected[labelX5Chain]; x5 != nil {
		if err := cborMode.Unmarshal(x5, &chain); err != nil {
			return nil, nil, fmt.Errorf("certificate chain: %w", err)
		}
	}
	return chain, msg.Payload, nil
}

// Chain returns the certificates that an envelope claims, the leaf first, for people
// to look at: nothing about them has been verified. It opens what Check opens.
func Chain(mediaType string, blob []byte, limits verify.Limits) ([]*x509.Certificate, error) {
	e, err := open(mediaType, blob, limits.Or(verify.DefaultLimits))
	if err != nil {
		return nil, err
	}
	return e.chain, nil
}
