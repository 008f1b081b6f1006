package notary

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// holds fails the test if f says VERIFIED of anything but a signature over image
// by signer. Bytes that nobody signed (the signing agent, white space, unknown
// members) may differ in such an envelope, so equality with the original is not
// asked; that its signed bytes are those of the original is.
func holds(t *testing.T, f verify.Finding, signer *notarytest.Signer, mediaType string, blob, original []byte) {
	t.Helper()
	if f.Reason != verify.Verified {
		if f.Signed != "" {
			t.Errorf("%s with Signed %s", f.Reason, f.Signed)
		}
		return
	}
	if f.Signed != image.Digest || f.Signer.Thumbprint != signer.Thumbprint() || f.Signer.Anchor != "ca:acme/root.crt" {
		t.Errorf("VERIFIED: %+v", f)
	}
	a, b := content(t, mediaType, blob), content(t, mediaType, original)
	if !bytes.Equal(a.Payload.Content, b.Payload.Content) || a.Payload.ContentType != b.Payload.ContentType {
		t.Errorf("VERIFIED with payload %q", a.Payload.Content)
	}
	x, y := a.SignerInfo.SignedAttributes, b.SignerInfo.SignedAttributes
	if !x.Expiry.Equal(y.Expiry) || !x.SigningTime.Equal(y.SigningTime) || x.SigningScheme != y.SigningScheme || len(x.ExtendedAttributes) != len(y.ExtendedAttributes) {
		t.Errorf("VERIFIED with attributes %+v", x)
	}
}

func content(t *testing.T, mediaType string, blob []byte) *signature.EnvelopeContent {
	t.Helper()
	e, err := signature.ParseEnvelope(mediaType, blob)
	if err != nil {
		t.Fatal(err)
	}
	c, err := e.Content()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestFlips changes each byte of a good envelope in turn, to a random other one,
// and has pieces of two good envelopes change places.
func TestFlips(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod"))
	for _, m := range formats {
		o := notarytest.SignOptions{MediaType: m, Expiry: noon.AddDate(1, 0, 0)}
		good := notarytest.MustSign(signer, image, o)
		if f := check(c, m, good, image); f.Reason != verify.Verified {
			t.Fatalf("%s (%s)", f.Reason, f.Detail)
		}
		yes := 0
		for i := range good {
			blob := bytes.Clone(good)
			blob[i] ^= byte(1 + r.IntN(255))
			f := check(c, m, blob, image)
			holds(t, f, signer, m, blob, good)
			if f.Reason == verify.Verified {
				yes++
			}
			if i%20 == 0 && check(c, m, blob, other).Reason == verify.Verified {
				t.Errorf("byte %d changed: VERIFIED for another image", i)
			}
		}
		// Nobody signs the member that names the signing agent (37 bytes) and a
		// padding bit or two of base64.
		if yes > 42 {
			t.Errorf("%s: %d of %d changed envelopes are VERIFIED", m, yes, len(good))
		}
		second := notarytest.MustSign(signer, other, o)
		for range 300 {
			i, n := r.IntN(min(len(good), len(second))), 1+r.IntN(200)
			blob := append(append(bytes.Clone(good[:i]), second[i:min(i+n, len(second))]...), good[min(i+n, len(good)):]...)
			holds(t, check(c, m, blob, image), signer, m, blob, good)
		}
	}
	// Every combination of the four parts of two JWS.
	var a, b map[string]json.RawMessage
	good := notarytest.MustSign(signer, image, notarytest.SignOptions{})
	for into, blob := range map[*map[string]json.RawMessage][]byte{
		&a: good, &b: notarytest.MustSign(acme.Leaf(notarytest.CertOptions{}), other, notarytest.SignOptions{Expiry: noon.AddDate(2, 0, 0)}),
	} {
		if err := json.Unmarshal(blob, into); err != nil {
			t.Fatal(err)
		}
	}
	for mask := range 16 {
		mixed := map[string]json.RawMessage{}
		for i, part := range []string{"header", "payload", "protected", "signature"} {
			mixed[part] = a[part]
			if mask&(1<<i) != 0 {
				mixed[part] = b[part]
			}
		}
		for _, want := range []ocispec.Descriptor{image, other} {
			whole := mask == 0 && want.Digest == image.Digest || mask == 15 && want.Digest == other.Digest
			if f := check(c, MediaTypeJWS, mustJSON(mixed), want); (f.Reason == verify.Verified) != whole {
				t.Errorf("parts %04b for %s: %s (%s)", mask, want.Digest, f.Reason, f.Detail)
			}
		}
	}
}

func FuzzCheckJWS(f *testing.F) {
	fuzzCheck(f, MediaTypeJWS)
}

func FuzzCheckCOSE(f *testing.F) {
	fuzzCheck(f, MediaTypeCOSE)
}

// fuzzCheck: no panic, and VERIFIED only of what one signer signed over one
// image. The seeds include good signatures of others and over others. Keys are
// fixed, since each worker is a process of its own.
func fuzzCheck(f *testing.F, mediaType string) {
	seeded := func(s string) *notarytest.Signer {
		return notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Seed: s}}).Leaf(notarytest.CertOptions{Seed: s + " leaf"})
	}
	signer, mallory := seeded("acme"), seeded("mallory")
	store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": notarytest.PEM(signer.Chain[1])}.FS()))
	good := notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: mediaType})
	f.Add(good)
	for _, o := range []notarytest.SignOptions{
		{Plugin: "x"}, {Expiry: noon}, {Scheme: notarytest.SchemeSigningAuthority},
		{Attributes: []notarytest.Attribute{{Key: "a", Critical: true, Value: map[string]any{"b": []any{1, "c"}}}}},
	} {
		o.MediaType = mediaType
		f.Add(notarytest.MustSign(signer, image, o))
		f.Add(notarytest.MustSign(mallory, image, o))
		f.Add(notarytest.MustSign(signer, other, o))
	}
	f.Add([]byte("null"))
	f.Add([]byte("{}"))
	f.Add([]byte{0xd2, 0x84, 0x40, 0xa0, 0xf6, 0x40})
	c := newChecker(f, store, noon, notarytest.Statement("prod"))
	nobody := ocispec.Descriptor{MediaType: image.MediaType, Digest: digest.FromString("nobody signs this"), Size: 17}
	f.Fuzz(func(t *testing.T, blob []byte) {
		found := check(c, mediaType, blob, image)
		if strings.Contains(found.Detail, "panic") {
			t.Errorf("panic: %s", found.Detail)
		}
		holds(t, found, signer, mediaType, blob, good)
		if f := check(c, mediaType, blob, nobody); f.Reason == verify.Verified {
			t.Error("VERIFIED for what nobody signed")
		}
	})
}
