package notary

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestOpen: what is not one envelope is refused here, whatever the library behind
// would say of it.
func TestOpen(t *testing.T) {
	limits := verify.DefaultLimits
	jws := notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: MediaTypeJWS})
	message := notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: MediaTypeCOSE})
	for m, blob := range map[string][]byte{MediaTypeJWS: jws, MediaTypeCOSE: message} {
		limits.EnvelopeBytes = int64(len(blob))
		e, err := open(m, blob, limits)
		if err != nil || len(e.chain) != len(signer.Chain) || !e.chain[0].Equal(signer.Chain[0]) || mismatch(e.payload, image) != "" {
			t.Errorf("%s: %+v, %v", m, e, err)
		}
		limits.EnvelopeBytes--
		if _, err := open(m, blob, limits); !errors.Is(err, verify.ErrBudget) {
			t.Errorf("%s, a byte more than the limit: %v", m, err)
		}
	}
	limits = verify.DefaultLimits
	limits.Certificates = len(signer.Chain)
	if _, err := open(MediaTypeJWS, jws, limits); err != nil {
		t.Errorf("as many certificates as the limit: %v", err)
	}
	limits.Certificates--
	if _, err := open(MediaTypeJWS, jws, limits); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("a certificate more than the limit: %v", err)
	}
	limits = verify.DefaultLimits

	var whole map[string]any
	if err := json.Unmarshal(jws, &whole); err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString
	with := func(key string, v any) []byte {
		c := maps.Clone(whole)
		c[key] = v
		return mustJSON(c)
	}
	for name, blob := range map[string][]byte{
		"no JSON":                            []byte("x"),
		"a list":                             append(append([]byte("["), jws...), ']'),
		"text":                               []byte(`"x"`),
		"something behind it":                append(bytes.Clone(jws), "{}"...),
		"cut off":                            jws[:len(jws)-1],
		"a name twice":                       []byte(strings.Replace(string(jws), "{", `{"payload":"",`, 1)),
		"a name twice, in another case":      []byte(strings.Replace(string(jws), "{", `{"PAYLOAD":"",`, 1)),
		"payload of another type":            with("payload", 7),
		"payload not base64":                 with("payload", "!"),
		"payload in another base64":          with("payload", whole["payload"].(string)+"="),
		"payload no JSON":                    with("payload", text([]byte("x"))),
		"payload a list":                     with("payload", text([]byte("[]"))),
		"payload with a name twice":          with("payload", text([]byte(`{"a":1,"a":2}`))),
		"payload with a name twice, deep":    with("payload", text([]byte(`{"a":[{"b":1,"B":2}]}`))),
		"payload nested too deep":            with("payload", text([]byte(strings.Repeat(`{"a":`, maxNesting+1)+"1"+strings.Repeat("}", maxNesting+1)))),
		"protected header not base64":        with("protected", "!"),
		"protected header no JSON":           with("protected", text([]byte("x"))),
		"protected header with a name twice": with("protected", text([]byte(`{"alg":"PS256","Alg":"none"}`))),
		"no chain":                           with("header", map[string]any{}),
		"an empty chain":                     with("header", map[string]any{"x5c": []string{}}),
		"a chain of text":                    with("header", map[string]any{"x5c": "x"}),
		"a certificate that is none":         with("header", map[string]any{"x5c": [][]byte{signer.Chain[0].Raw, []byte("x")}}),
		"a certificate and more":             with("header", map[string]any{"x5c": [][]byte{append(bytes.Clone(signer.Chain[0].Raw), 0)}}),
	} {
		if e, err := open(MediaTypeJWS, blob, limits); err == nil || e != nil || errors.Is(err, verify.ErrBudget) {
			t.Errorf("JWS, %s: %v", name, err)
		}
	}

	var tag cbor.Tag
	if err := cbor.Unmarshal(message, &tag); err != nil {
		t.Fatal(err)
	}
	parts := tag.Content.([]any)
	retag := func(number uint64, change func([]any)) []byte {
		c := append([]any{}, parts...)
		change(c)
		return must(cbor.Marshal(cbor.Tag{Number: number, Content: c}))
	}
	same := func([]any) {}
	unprotected := func(v any) func([]any) {
		return func(c []any) { c[1] = map[any]any{labelX5Chain: v} }
	}
	if _, err := open(MediaTypeCOSE, retag(tagSign1, same), limits); err != nil {
		t.Errorf("COSE, written again: %v", err)
	}
	for name, blob := range map[string][]byte{
		"no CBOR":                    {0xff},
		"no tag":                     must(cbor.Marshal(parts)),
		"another tag":                retag(98, same), // COSE_Sign
		"something behind it":        append(bytes.Clone(message), 0),
		"cut off":                    message[:len(message)-1],
		"a part less":                must(cbor.Marshal(cbor.Tag{Number: tagSign1, Content: parts[:3]})),
		"payload of another type":    retag(tagSign1, func(c []any) { c[2] = 7 }),
		"payload no JSON":            retag(tagSign1, func(c []any) { c[2] = []byte("x") }),
		"payload with a name twice":  retag(tagSign1, func(c []any) { c[2] = []byte(`{"a":1,"A":2}`) }),
		"no payload":                 retag(tagSign1, func(c []any) { c[2] = nil }),
		"no chain":                   retag(tagSign1, func(c []any) { c[1] = map[any]any{} }),
		"a chain of one":             retag(tagSign1, unprotected(signer.Chain[0].Raw)), // RFC 9360 allows it, Notary Project does not
		"a chain of numbers":         retag(tagSign1, unprotected([]any{1, 2})),
		"a certificate that is none": retag(tagSign1, unprotected([]any{signer.Chain[0].Raw, []byte("x")})),
	} {
		if e, err := open(MediaTypeCOSE, blob, limits); err == nil || e != nil || errors.Is(err, verify.ErrBudget) {
			t.Errorf("COSE, %s: %v", name, err)
		}
	}
	for _, m := range []string{"", "application/json", MediaTypeJWS + ";v=1", strings.ToUpper(MediaTypeCOSE)} {
		if _, err := open(m, jws, limits); err == nil {
			t.Errorf("media type %q is read", m)
		}
	}
}
