package notary

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/notaryproject/notation-core-go/signature"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Worth says when a signature may count while another one of the same signer does
// not. It serves to choose which signatures are kept, and decides nothing.
type Worth struct {
	Kind   [32]byte  // equal for signatures with the same scheme, timestamp authority and signed metadata
	Signed time.Time // when it was made, as the signer says
	Lasts  time.Time // the last moment at which it can count; zero: no end is known
}

// Longer reports whether w can count longer than o.
func (w Worth) Longer(o Worth) bool {
	return !o.Lasts.IsZero() && (w.Lasts.IsZero() || w.Lasts.After(o.Lasts))
}

// Worth returns the worth of ev, which Check found to be VERIFIED under the statement
// of that name. It verifies a timestamp also if the statement does not need it yet. An
// expiry and the end of a certificate count also if the statement only logs them.
func (c *Checker) Worth(ev verify.Evidence, name string) (w Worth, err error) {
	defer func() {
		if p := recover(); p != nil {
			w, err = Worth{}, fmt.Errorf("panic while weighing a signature: %v", p)
		}
	}()
	st := c.statements[name]
	if st == nil {
		return Worth{}, fmt.Errorf("the trust policy has no statement %s", text.Quote(name, 64))
	}
	e, err := open(ev.MediaType, ev.Blob, c.limits)
	if err != nil {
		return Worth{}, err
	}
	parsed, err := signature.ParseEnvelope(ev.MediaType, ev.Blob)
	if err != nil {
		return Worth{}, err
	}
	content, err := parsed.Content()
	if err != nil {
		return Worth{}, err
	}
	info := &content.SignerInfo
	w.Signed, w.Lasts = info.SignedAttributes.SigningTime.UTC(), info.SignedAttributes.Expiry.UTC()
	authority := []byte{}
	if st.tsa != nil {
		if chain, err := timestamped(info, st.tsa, c.limits.Certificates); err == nil && answerable(chain) == nil {
			authority = chain[len(chain)-1].Raw
		}
	}
	if scheme := info.SignedAttributes.SigningScheme; scheme == signature.SigningSchemeX509 && len(authority) == 0 {
		for _, cert := range e.chain {
			if w.Lasts.IsZero() || cert.NotAfter.Before(w.Lasts) {
				w.Lasts = cert.NotAfter.UTC()
			}
		}
	}
	h := sha256.New()
	write := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	write([]byte(info.SignedAttributes.SigningScheme))
	write(authority)
	signed := metadata(e.payload)
	for _, k := range slices.Sorted(maps.Keys(signed)) {
		write([]byte(k))
		write([]byte(signed[k]))
	}
	w.Kind = [32]byte(h.Sum(nil))
	return w, nil
}

// Anchors returns the SHA-256 thumbprints, in hex, of the certificates that a statement
// trusts as anchors of signers. They are a hint for the order in which signatures are
// looked at.
func (c *Checker) Anchors(name string) (list []string) {
	if st := c.statements[name]; st != nil {
		return st.thumbprints
	}
	return nil
}

// Thumbprints returns the SHA-256 thumbprints, in hex, of the chain that a signature
// envelope claims, the leaf first; nil if blob is no envelope. It verifies nothing. A
// verified envelope holds a whole chain, so that no certificate in it is another
// signer's.
func Thumbprints(blob []byte) (list []string) {
	defer func() {
		if recover() != nil {
			list = nil
		}
	}()
	if int64(len(blob)) > verify.DefaultLimits.EnvelopeBytes*4 || len(blob) == 0 {
		return nil
	}
	open := openCOSE
	if bytes.HasPrefix(bytes.TrimLeft(blob, " \t\r\n"), []byte("{")) {
		open = openJWS
	}
	chain, _, err := open(blob)
	if err != nil || len(chain) > maxThumbprints {
		return nil
	}
	for _, der := range chain {
		list = append(list, thumbprintOf(der))
	}
	return list
}

// maxThumbprints bounds the certificates of a chain whose thumbprints are told.
const maxThumbprints = 32
