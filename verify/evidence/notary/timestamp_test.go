package notary

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/tspclient-go"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// The first day of the leaf that the tests stamp, a day in its life, and the end.
var (
	begins  = time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)
	stamped = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	ends    = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	tsaCA   = notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
	tsa     = tsaCA.TSA(notarytest.CertOptions{Subject: notarytest.Name("tsa")})
)

func stampedStatement(when string) verify.Statement {
	s := notarytest.Statement("prod", acmeIdentity)
	s.TrustStores = append(s.TrustStores, "tsa:t")
	s.VerifyTimestamp = when
	return s
}

func stampStore(t testing.TB) *Store {
	t.Helper()
	return must(LoadStore(notarytest.Stores{"ca/acme/root.crt": acme.PEM(), "tsa/t/root.crt": tsaCA.PEM()}.FS()))
}

// stamp signs image with a leaf of that life, countersigned by s.
func stamp(mediaType string, s *notarytest.Signer, o notarytest.TokenOptions) []byte {
	blob := notarytest.MustSign(acme.Leaf(notarytest.CertOptions{NotBefore: begins, NotAfter: ends}), image, notarytest.SignOptions{MediaType: mediaType})
	if s == nil {
		return blob
	}
	if o.Time.IsZero() {
		o.Time = stamped
	}
	return notarytest.Timestamp(blob, mediaType, func(sig []byte) []byte { return notarytest.Token(s, sig, o) })
}

func TestTimestamp(t *testing.T) {
	other := notarytest.NewCA(notarytest.CAOptions{})
	forged := other.TSA(notarytest.CertOptions{Subject: notarytest.Name("tsa")})
	expired := tsaCA.TSA(notarytest.CertOptions{NotAfter: stamped.AddDate(0, 0, -1)})
	soon := tsaCA.TSA(notarytest.CertOptions{NotAfter: stamped.AddDate(0, 0, 1)})
	bag := func(front ...*x509.Certificate) notarytest.TokenOptions {
		return notarytest.TokenOptions{Certificates: append(front, tsa.Chain[:2]...)}
	}
	for _, test := range []struct {
		name   string
		tsa    *notarytest.Signer
		o      notarytest.TokenOptions
		ok     bool
		detail string
	}{
		{"good", tsa, notarytest.TokenOptions{}, true, ""},
		{"with the root", tsa, notarytest.TokenOptions{Certificates: tsa.Chain}, true, ""},
		{"accuracy", tsa, notarytest.TokenOptions{Accuracy: 5}, true, ""},
		{"TSA expired since", soon, notarytest.TokenOptions{}, true, ""},
		{"forged certificate in front", tsa, bag(forged.Chain[0]), true, ""},
		{"extension", tsa, notarytest.TokenOptions{Extensions: []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}}, true, ""},

		{"none", nil, notarytest.TokenOptions{}, false, "no timestamp"},
		{"other TSA", forged, notarytest.TokenOptions{}, false, "unknown authority"},
		{"other TSA, good certificates with it", forged, notarytest.TokenOptions{Certificates: append(forged.Chain[:1:1], tsa.Chain...)}, false, "unknown authority"},
		{"other key under the name of the TSA", &notarytest.Signer{Key: forged.Key, Chain: tsa.Chain}, notarytest.TokenOptions{}, false, ""},
		{"intermediate missing", tsa, notarytest.TokenOptions{Certificates: tsa.Chain[:1]}, false, "unknown authority"},
		{"no certificates", tsa, notarytest.TokenOptions{Certificates: []*x509.Certificate{}}, false, ""},
		{"TSA was expired", expired, notarytest.TokenOptions{}, false, "expired"},
		{"not a TSA", tsaCA.Leaf(notarytest.CertOptions{}), notarytest.TokenOptions{}, false, ""},
		{"usage not critical", tsaCA.Leaf(notarytest.CertOptions{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping}}), notarytest.TokenOptions{}, false, "critical"},
		{"signer's own CA", acme.TSA(notarytest.CertOptions{}), notarytest.TokenOptions{}, false, "unknown authority"},
		{"before the chain", tsa, notarytest.TokenOptions{Time: begins.Add(-time.Second)}, false, "not valid when the timestamp was made"},
		{"perhaps before the chain", tsa, notarytest.TokenOptions{Time: begins.Add(time.Second), Accuracy: 2}, false, "not valid when the timestamp was made"},
		{"before the TSA", tsa, notarytest.TokenOptions{Time: notarytest.Begin.Add(-time.Second)}, false, ""},
		{"after the chain", tsa, notarytest.TokenOptions{Time: ends.Add(time.Second)}, false, "not valid when the timestamp was made"},
		{"perhaps after the chain", tsa, notarytest.TokenOptions{Time: ends.Add(-time.Second), Accuracy: 2}, false, "not valid when the timestamp was made"},
		{"accuracy below zero", tsa, notarytest.TokenOptions{Time: ends.Add(time.Second), Accuracy: -2}, false, "below zero"},
		{"critical extension of the token", tsa, notarytest.TokenOptions{Extensions: []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}}, false, "critical extension 1.2.3"},
		{"critical extension of the TSA", tsaCA.TSA(notarytest.CertOptions{Extensions: []pkix.Extension{{Id: []int{2, 5, 29, 17}, Critical: true, Value: []byte{0x30, 3, 0x82, 1, 'a'}}}}), notarytest.TokenOptions{}, false, "2.5.29.17"},
		{"two signatures", tsa, notarytest.TokenOptions{Signers: 2}, false, "2 signatures"},
		{"bag of certificates", tsa, bag(slices.Repeat(forged.Chain[:1], 9)...), false, "11 certificates, limit 10"},
	} {
		for _, m := range formats {
			blob := stamp(m, test.tsa, test.o)
			for _, when := range []string{"", "always", "afterCertExpiry"} {
				for _, now := range []time.Time{time.Unix(0, 0), noon, ends, year(2100)} {
					if when == "" && test.o.Certificates != nil {
						continue // that "" means always need not be shown with every token
					}
					s := stampedStatement(when)
					want, detail := verify.Verified, ""
					switch {
					case when == "afterCertExpiry" && now.Before(notarytest.Begin):
						want, detail = verify.CertificateExpired, "not now"
					case when == "afterCertExpiry" && now.Before(ends): // the timestamp does not count
					case when == "afterCertExpiry" && test.tsa == nil:
						want, detail = verify.CertificateExpired, test.detail
					case !test.ok:
						want, detail = verify.TimestampInvalid, test.detail
					}
					f := check(newChecker(t, stampStore(t), now, s), m, blob, image)
					if f.Reason != want || !strings.Contains(f.Detail, detail) || len(f.Warnings) > 0 {
						t.Errorf("%s, %s %q at %s: %s (%s), want %s (%s)", test.name, m, when, date(now), f.Reason, f.Detail, want, detail)
					}
					// Only a finding that rests on now ends by itself; any is kept.
					until := time.Time{}
					if when == "afterCertExpiry" && now.Equal(noon) {
						until = ends
					} else if want == verify.Verified {
						until = now.Add(again)
					}
					if !f.Until.Equal(until) {
						t.Errorf("%s, %s %q at %s: until %v", test.name, m, when, date(now), f.Until)
					}
					// Where it is logged, it warns.
					if !now.Equal(ends) {
						continue
					}
					s.Level = "permissive"
					f = check(newChecker(t, stampStore(t), now, s), m, blob, image)
					if want == verify.Verified && len(f.Warnings) > 0 || want != verify.Verified && !slices.Equal(f.Warnings, []verify.Reason{want}) || f.Reason != verify.Verified {
						t.Errorf("%s, %s %q at %s, permissive: %s %v", test.name, m, when, date(now), f.Reason, f.Warnings)
					}
				}
			}
		}
	}
}

// TestTimestampOfAnother moves a good timestamp to another signature.
func TestTimestampOfAnother(t *testing.T) {
	for _, m := range formats {
		var token []byte
		stampAs := func(make func(sig []byte) []byte) []byte {
			return notarytest.Timestamp(notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: m}), m, make)
		}
		stampAs(func(sig []byte) []byte {
			token = notarytest.Token(tsa, sig, notarytest.TokenOptions{})
			return token
		})
		c := newChecker(t, stampStore(t), noon, stampedStatement("always"))
		for name, other := range map[string][]byte{"moved": token, "cut": token[:len(token)-1], "longer": append(bytes.Clone(token), 0), "junk": []byte("junk"), "nested": bytes.Repeat([]byte{0x30, 0x80}, 50_000)} {
			if f := check(c, m, stampAs(func([]byte) []byte { return other }), image); f.Reason != verify.TimestampInvalid {
				t.Errorf("%s: %s (%s)", name, f.Reason, f.Detail)
			}
		}
	}
}

// TestTimestampFlips changes every third byte of a good token: it may go on saying when
// the signature was made, and nothing else.
func TestTimestampFlips(t *testing.T) {
	c := newChecker(t, stampStore(t), year(2100), stampedStatement("always"))
	base := notarytest.MustSign(signer, image, notarytest.SignOptions{})
	var token []byte
	notarytest.Timestamp(base, MediaTypeJWS, func(sig []byte) []byte {
		token = notarytest.Token(tsa, sig, notarytest.TokenOptions{})
		return token
	})
	yes := 0
	for i := 0; i < len(token); i += 3 {
		changed := bytes.Clone(token)
		changed[i] ^= 0x55
		f := check(c, MediaTypeJWS, notarytest.Timestamp(base, MediaTypeJWS, func([]byte) []byte { return changed }), image)
		if f.Reason == verify.Verified {
			yes++
		} else if f.Reason != verify.TimestampInvalid {
			t.Errorf("byte %d: %s (%s)", i, f.Reason, f.Detail)
		}
	}
	// Nobody signs the algorithm of the digest in the head of the token, or the
	// serial number and issuer by which it names the certificate.
	if yes > 20 {
		t.Errorf("%d of %d changed tokens count", yes, len(token)/3)
	}
}

func TestTimestampRevocation(t *testing.T) {
	ask := notarytest.CertOptions{OCSP: []string{"http://127.0.0.1:1"}}
	for name, test := range map[string]struct {
		ca   notarytest.CAOptions
		leaf notarytest.CertOptions
		asks bool
	}{
		"TSA":          {notarytest.CAOptions{}, ask, true},
		"intermediate": {notarytest.CAOptions{Intermediates: 1, Intermediate: ask}, notarytest.CertOptions{}, true},
		"root":         {notarytest.CAOptions{CertOptions: ask}, notarytest.CertOptions{}, false},
	} {
		ca := notarytest.NewCA(test.ca)
		store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": acme.PEM(), "tsa/t/root.crt": ca.PEM()}.FS()))
		blob := stamp(MediaTypeJWS, ca.TSA(test.leaf), notarytest.TokenOptions{})
		// What the statement says of revocation is about the signer: the library has
		// no timestamp of a TSA that it cannot ask about.
		for _, revocation := range []string{"enforce", "log", "skip"} {
			for _, timestamp := range []string{"enforce", "log"} {
				want, warnings := verify.Verified, 0
				if test.asks && timestamp == "enforce" {
					want = verify.RevocationUnknown
				} else if test.asks {
					warnings = 1
				}
				st := stampedStatement("always")
				st.Override = map[string]string{"revocation": revocation, "authenticTimestamp": timestamp}
				f := check(newChecker(t, store, noon, st), MediaTypeJWS, blob, image)
				if want == verify.RevocationUnknown && (!strings.HasPrefix(f.Detail, "the timestamp's certificate \"CN=") || !strings.Contains(f.Detail, ask.OCSP[0]) || !strings.Contains(f.Detail, "no override of revocation excuses")) {
					t.Errorf("%s: %s", name, f.Detail)
				}
				if f.Reason != want || len(f.Warnings) != warnings {
					t.Errorf("%s, revocation %s, timestamp %s: %s %v (%s)", name, revocation, timestamp, f.Reason, f.Warnings, f.Detail)
				}
			}
		}
	}
}

// TestTimestampHugeKey: see TestHugeKey. Anybody can change the token of a good
// envelope.
func TestTimestampHugeKey(t *testing.T) {
	huge := must(x509.ParseCertificate(hugeKey(t, tsa.Chain[1].Raw)))
	blob := stamp(MediaTypeJWS, tsa, notarytest.TokenOptions{Certificates: []*x509.Certificate{huge, tsa.Chain[0]}})
	start := time.Now()
	f := check(newChecker(t, stampStore(t), noon, stampedStatement("always")), MediaTypeJWS, blob, image)
	if f.Reason != verify.TimestampInvalid || !strings.Contains(f.Detail, "200000 bits") {
		t.Errorf("%s (%s)", f.Reason, f.Detail)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %v", d)
	}
}

// FuzzTimestamp: no panic, and no other time than the one that the TSA signed.
func FuzzTimestamp(f *testing.F) {
	root := notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Seed: "acme"}})
	stamps := notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Seed: "tsa root"}})
	tsa, forger := stamps.TSA(notarytest.CertOptions{Seed: "tsa"}), root.TSA(notarytest.CertOptions{Seed: "forger"})
	store := must(LoadStore(notarytest.Stores{"ca/acme/root.crt": root.PEM(), "tsa/t/root.crt": stamps.PEM()}.FS()))
	const signed = "the signature" // stands for it: the library verified it before
	f.Add(notarytest.Token(tsa, []byte(signed), notarytest.TokenOptions{Time: stamped}))
	f.Add(notarytest.Token(tsa, []byte(signed), notarytest.TokenOptions{Time: stamped, Accuracy: 1, Certificates: tsa.Chain, Extensions: []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}}))
	f.Add(notarytest.Token(tsa, []byte("another signature"), notarytest.TokenOptions{}))
	f.Add(notarytest.Token(forger, []byte(signed), notarytest.TokenOptions{}))
	st := newChecker(f, store, noon, stampedStatement("always")).statements["prod"]
	chain := root.Leaf(notarytest.CertOptions{Seed: "leaf", NotBefore: stamped.Add(-time.Hour), NotAfter: stamped.Add(time.Hour)}).Chain
	f.Fuzz(func(t *testing.T, token []byte) {
		info := &signature.SignerInfo{CertificateChain: chain, Signature: []byte(signed)}
		info.UnsignedAttributes.TimestampSignature = token
		got, err := timestamped(info, st.tsa, 10)
		if err != nil {
			return
		}
		if !got[0].Equal(tsa.Chain[0]) || !got[len(got)-1].Equal(stamps.Root()) {
			t.Errorf("a timestamp of %s", got[0].Subject)
		}
		if i, err := must(tspclient.ParseSignedToken(token)).Info(); err != nil || !i.GenTime.Equal(stamped) {
			t.Errorf("a timestamp of another time: %+v, %v", i, err)
		}
	})
}

// TestSigningAuthority: a chain from a signingAuthority trust store must have
// been valid when the envelope says that it was signed, and stays good.
func TestSigningAuthority(t *testing.T) {
	store := must(LoadStore(notarytest.Stores{"ca/acme/m.crt": notarytest.PEM(mallory.Chain[2]), "signingAuthority/sa/root.crt": acme.PEM()}.FS()))
	statement := notarytest.Statement("prod", acmeIdentity)
	statement.TrustStores = append(statement.TrustStores, "signingAuthority:sa")
	leaf := acme.Leaf(notarytest.CertOptions{NotAfter: ends})
	young := acme.Leaf(notarytest.CertOptions{NotBefore: noon})
	for _, m := range formats {
		sign := func(s *notarytest.Signer, scheme string, o notarytest.SignOptions) []byte {
			o.MediaType, o.Scheme = m, scheme
			return notarytest.MustSign(s, image, o)
		}
		for name, test := range map[string]struct {
			blob   []byte
			reason verify.Reason
			anchor string
		}{
			"good":                      {sign(leaf, notarytest.SchemeSigningAuthority, notarytest.SignOptions{}), verify.Verified, "signingAuthority:sa/root.crt"},
			"notary.x509 under its CA":  {sign(leaf, notarytest.SchemeX509, notarytest.SignOptions{}), verify.SignerUntrusted, ""},
			"authority under the other": {sign(mallory, notarytest.SchemeSigningAuthority, notarytest.SignOptions{}), verify.SignerUntrusted, ""},
			"expired":                   {sign(leaf, notarytest.SchemeSigningAuthority, notarytest.SignOptions{Expiry: noon}), verify.SignatureExpired, "signingAuthority:sa/root.crt"},
			"critical attribute":        {sign(leaf, notarytest.SchemeSigningAuthority, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "a", Critical: true, Value: 1}}}), verify.CriticalAttribute, "signingAuthority:sa/root.crt"},
			"CRL":                       {sign(acme.Leaf(notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1"}}), notarytest.SchemeSigningAuthority, notarytest.SignOptions{}), verify.RevocationUnknown, "signingAuthority:sa/root.crt"},
			"signed at the end":         {retime(m, leaf, ends), verify.CertificateExpired, "signingAuthority:sa/root.crt"},
			"signed before the leaf":    {retime(m, young, noon.Add(-time.Second)), verify.CertificateExpired, "signingAuthority:sa/root.crt"},
		} {
			for _, now := range []time.Time{noon, year(2100)} {
				f := check(newChecker(t, store, now, statement), m, test.blob, image)
				until := time.Time{}
				if test.reason == verify.Verified {
					until = now.Add(again) // kept, although it does not end by itself
				}
				if f.Reason != test.reason || f.Signer.Anchor != test.anchor || !f.Until.Equal(until) {
					t.Errorf("%s %s: %s %+v until %v (%s)", name, m, f.Reason, f.Signer, f.Until, f.Detail)
				}
			}
		}
	}
	// Timestamps have no part in it: the authority tells the time.
	statement.TrustStores = append(statement.TrustStores, "tsa:t")
	store.anchors["tsa:t"] = stampStore(t).anchors["tsa:t"]
	blob := notarytest.MustSign(leaf, image, notarytest.SignOptions{Scheme: notarytest.SchemeSigningAuthority})
	if f := check(newChecker(t, store, year(2100), statement), MediaTypeJWS, blob, image); f.Reason != verify.Verified {
		t.Errorf("with a tsa store: %s (%s)", f.Reason, f.Detail)
	}
}

// retime signs image under scheme signingAuthority at a time when the library
// would not.
func retime(mediaType string, s *notarytest.Signer, at time.Time) []byte {
	const scheme, signed, authentic = "io.cncf.notary.signingScheme", "io.cncf.notary.signingTime", "io.cncf.notary.authenticSigningTime"
	if mediaType == MediaTypeJWS {
		h := notarytest.JWSHeader(s)
		delete(h, signed)
		h[scheme], h[authentic], h["crit"] = notarytest.SchemeSigningAuthority, at.Format(time.RFC3339), []string{scheme, authentic}
		return notarytest.RawJWS(s, mustJSON(h), notarytest.Payload(image, nil))
	}
	h := notarytest.COSEHeader(s)
	delete(h, signed)
	h[scheme], h[authentic], h[int64(2)] = notarytest.SchemeSigningAuthority, notarytest.COSETime(at), []any{scheme, authentic}
	return notarytest.RawCOSE(s, h, notarytest.Payload(image, nil), nil)
}
