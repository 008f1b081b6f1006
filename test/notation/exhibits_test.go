package notation_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// world is everybody who signs.
var world struct {
	ca, otherCA, tsaCA, otherTSA *notarytest.CA
	signer, stranger             *notarytest.Signer
	authorities                  map[string]*x509.Certificate // roots that every setting trusts
}

// Times around those of notarytest: signatures are made at its SigningTime.
var (
	gone   = notarytest.SigningTime.AddDate(0, 1, 0) // past, and after SigningTime
	future = time.Date(2070, 1, 1, 0, 0, 0, 0, time.UTC)
)

func makeWorld() {
	w := &world
	w.ca = notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Subject: notarytest.Name("acme root")}, Intermediates: 1})
	w.otherCA = notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Subject: notarytest.Name("other root")}})
	w.tsaCA = notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Subject: notarytest.Name("tsa root")}})
	w.otherTSA = notarytest.NewCA(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Subject: notarytest.Name("other tsa root")}})
	w.signer, w.stranger = w.ca.Leaf(notarytest.CertOptions{}), w.otherCA.Leaf(notarytest.CertOptions{})
	w.authorities = map[string]*x509.Certificate{"root": w.ca.Root()}
}

// authority makes a CA that every setting trusts.
func authority(o notarytest.CAOptions) *notarytest.CA {
	n := len(world.authorities)
	o.Subject = notarytest.Name(fmt.Sprint("root ", n))
	ca := notarytest.NewCA(o)
	world.authorities[fmt.Sprint("root", n)] = ca.Root()
	return ca
}

// A form is how an envelope is written.
type form struct{ envelope, scheme string }

var forms = []form{{"jws", "x509"}, {"jws", "authority"}, {"cose", "x509"}, {"cose", "authority"}}

func (f form) mediaType() string {
	if f.envelope == "cose" {
		return notary.MediaTypeCOSE
	}
	return notary.MediaTypeJWS
}

// options are those of a signature in that form.
func (f form) options(o notarytest.SignOptions) notarytest.SignOptions {
	o.MediaType, o.Scheme = f.mediaType(), notarytest.SchemeX509
	if f.scheme == "authority" {
		o.Scheme = notarytest.SchemeSigningAuthority
	}
	return o
}

// life is when the certificate of the signer is valid.
type life int

const (
	lives life = iota
	expired
	young // not yet
)

// An exhibit is an image with what is attached to it.
type exhibit struct {
	name  string
	fails []string // checks that no setting can make good
	life  life
	stamp bool // has a timestamp that proves that the chain was valid
	// loses is true where notation and the specification refuse whatever the level.
	loses bool
	// long is true where there are more pages than are read if each has one referrer.
	long bool
	// other is true where the signer is not one of the trusted identities.
	other bool
	// envelope is the one signature of the image; arrange does all where it is not
	// that simple, and returns what is asked for.
	envelope func(f form, image ocispec.Descriptor) []byte
	arrange  func(b *box, f form) digest.Digest
	few      bool   // in a few settings and forms only
	wide     bool   // in all settings
	registry bool   // in registries only: a layout says nothing of order, or whose signature it is
	only     string // the one envelope in which there is one
}

// A box is where an exhibit is put together.
type box struct {
	*sourcetest.Content
	style notarytest.Style
	name  string
}

func (b *box) image(name string) ocispec.Descriptor { return b.Image(b.name + " " + name) }

// attach lists envelope as a signature of subject.
func (b *box) attach(subject ocispec.Descriptor, f form, envelope []byte) {
	a := b.store(subject, f, envelope)
	b.List(subject, a.Manifest.Descriptor)
}

func (b *box) store(subject ocispec.Descriptor, f form, envelope []byte) notarytest.Artifact {
	a := notarytest.Manifest(envelope, f.mediaType(), subject, b.style)
	for _, blob := range []notarytest.Blob{a.Config, a.Envelope, a.Manifest} {
		b.Add(blob.Descriptor.MediaType, blob.Content)
	}
	return a
}

// index adds an index of one manifest for this platform.
func (b *box) index(m ocispec.Descriptor) ocispec.Descriptor {
	m.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	raw, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m},
	})
	if err != nil {
		panic(err)
	}
	d := b.Add(ocispec.MediaTypeImageIndex, raw)
	b.Images = append(b.Images, d)
	b.List(d)
	return d
}

// by makes an envelope signed by s with the options of o.
func by(s *notarytest.Signer, o notarytest.SignOptions) func(form, ocispec.Descriptor) []byte {
	return func(f form, image ocispec.Descriptor) []byte { return notarytest.MustSign(s, image, f.options(o)) }
}

func leaf(o notarytest.CertOptions) *notarytest.Signer { return world.ca.Leaf(o) }

// stamped adds a timestamp of tsa to what make makes.
func stamped(make func(form, ocispec.Descriptor) []byte, tsa *notarytest.Signer, o notarytest.TokenOptions) func(form, ocispec.Descriptor) []byte {
	return func(f form, image ocispec.Descriptor) []byte {
		return notarytest.Timestamp(make(f, image), f.mediaType(), func(sig []byte) []byte { return notarytest.Token(tsa, sig, o) })
	}
}

// artifactManifest was in release candidates of OCI image-spec 1.1.
const artifactManifest = "application/vnd.oci.artifact.manifest.v1+json"

var (
	unknownExtension = pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4, 5}, Critical: true, Value: []byte{5, 0}}
	// permitted: example.org, where no certificate of the chain has a DNS name.
	nameConstraints = pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 30}, Critical: true,
		Value: append([]byte{0x30, 0x11, 0xa0, 0x0f, 0x30, 0x0d, 0x82, 0x0b}, "example.org"...)}
)

// exhibits makes all; url is where CRLs are served, which it adds to crls.
func exhibits(url string, crls map[string][]byte) []exhibit {
	good := by(world.signer, notarytest.SignOptions{})
	stranger := by(world.stranger, notarytest.SignOptions{})
	tsa, otherTSA := world.tsaCA.TSA(notarytest.CertOptions{}), world.otherTSA.TSA(notarytest.CertOptions{})
	old := by(leaf(notarytest.CertOptions{NotAfter: gone}), notarytest.SignOptions{})
	late := by(leaf(notarytest.CertOptions{NotBefore: future}), notarytest.SignOptions{SigningTime: future.AddDate(1, 0, 0)})
	expiredSignature := by(world.signer, notarytest.SignOptions{Expiry: gone})

	revoked := leaf(notarytest.CertOptions{CRL: []string{url + "/revoked.crl"}})
	crls["/good.crl"] = world.ca.CRL()
	crls["/revoked.crl"] = world.ca.CRL(revoked.Chain[0])
	crls["/tsa.crl"] = world.tsaCA.CRL()

	list := []exhibit{
		{name: "good", wide: true, envelope: good},
		{name: "good-with-expiry-to-come", envelope: by(world.signer, notarytest.SignOptions{Expiry: future}), few: true},
		{name: "good-with-timestamp", wide: true, stamp: true, envelope: stamped(good, tsa, notarytest.TokenOptions{})},
		{name: "good-with-timestamp-of-another-tsa", wide: true, envelope: stamped(good, otherTSA, notarytest.TokenOptions{})},
		{name: "none", loses: true, arrange: func(b *box, _ form) digest.Digest { return b.image("").Digest }, few: true},

		{name: "expired-signature", wide: true, fails: []string{expiry}, envelope: expiredSignature},
		{name: "expired-certificate", wide: true, life: expired, envelope: old},
		{name: "expired-certificate-with-timestamp", wide: true, life: expired, stamp: true, envelope: stamped(old, tsa, notarytest.TokenOptions{})},
		{name: "expired-certificate-with-late-timestamp", life: expired, envelope: stamped(old, tsa, notarytest.TokenOptions{Time: gone.AddDate(0, 1, 0)})},
		{name: "expired-certificate-with-timestamp-of-another-tsa", wide: true, life: expired, envelope: stamped(old, otherTSA, notarytest.TokenOptions{})},
		{name: "expired-certificate-with-broken-timestamp", few: true, life: expired, envelope: func(f form, image ocispec.Descriptor) []byte {
			return notarytest.Timestamp(old(f, image), f.mediaType(), func([]byte) []byte { return []byte("junk") })
		}},
		{name: "expired-certificate-and-signature", wide: true, life: expired, fails: []string{expiry}, envelope: by(leaf(notarytest.CertOptions{NotAfter: gone}), notarytest.SignOptions{Expiry: gone})},
		{name: "expired-root", few: true, life: expired, envelope: by(authority(notarytest.CAOptions{CertOptions: notarytest.CertOptions{NotAfter: gone}}).Leaf(notarytest.CertOptions{}), notarytest.SignOptions{})},
		{name: "young-certificate", wide: true, life: young, envelope: late},
		{name: "young-certificate-with-timestamp", few: true, life: young, envelope: stamped(late, tsa, notarytest.TokenOptions{})},
		{name: "timestamp-of-tsa-with-unreachable-crl", wide: true, envelope: stamped(good, world.tsaCA.TSA(notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}}), notarytest.TokenOptions{})},
		{name: "expired-certificate-with-timestamp-of-tsa-with-unreachable-ocsp", wide: true, life: expired, envelope: stamped(old, world.tsaCA.TSA(notarytest.CertOptions{OCSP: []string{"http://127.0.0.1:1"}}), notarytest.TokenOptions{})},
		{name: "timestamp-of-tsa-with-good-crl", wide: true, stamp: true, envelope: stamped(good, world.tsaCA.TSA(notarytest.CertOptions{CRL: []string{url + "/tsa.crl"}}), notarytest.TokenOptions{})},
		{name: "timestamp-with-two-signatures", envelope: stamped(good, tsa, notarytest.TokenOptions{Signers: 2}), stamp: true, few: true},
		{name: "timestamp-of-tsa-with-critical-extension", envelope: stamped(good, world.tsaCA.TSA(notarytest.CertOptions{Extensions: []pkix.Extension{unknownExtension}}), notarytest.TokenOptions{}), few: true},
		{name: "timestamp-with-critical-extension", envelope: stamped(good, tsa, notarytest.TokenOptions{Extensions: []pkix.Extension{unknownExtension}}), stamp: true, few: true},

		{name: "stranger", wide: true, fails: []string{authenticity}, envelope: stranger},
		{name: "self-signed-stranger", few: true, fails: []string{authenticity}, envelope: by(notarytest.SelfSigned(notarytest.CertOptions{}), notarytest.SignOptions{})},
		{name: "stranger-under-the-signer's-name", fails: []string{authenticity}, envelope: by(world.otherCA.Leaf(notarytest.CertOptions{Subject: world.signer.Chain[0].Subject}), notarytest.SignOptions{}), few: true},
		{name: "other-identity", wide: true, other: true, envelope: by(leaf(notarytest.CertOptions{Subject: pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"umbrella"}}}), notarytest.SignOptions{})},
		{name: "two-units-in-subject", few: true, other: true, envelope: by(leaf(notarytest.CertOptions{Subject: pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"acme"}, OrganizationalUnit: []string{"a", "b"}}}), notarytest.SignOptions{})},
		{name: "two-organizations-in-subject", few: true, other: true, envelope: by(leaf(notarytest.CertOptions{Subject: pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, ExtraNames: []pkix.AttributeTypeAndValue{
			{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: "umbrella"}, {Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: "acme"}}}}), notarytest.SignOptions{})},

		{name: "cut", few: true, fails: []string{integrity}, envelope: func(f form, image ocispec.Descriptor) []byte { e := good(f, image); return e[:len(e)-9] }},
		{name: "junk", fails: []string{integrity}, envelope: func(form, ocispec.Descriptor) []byte { return []byte("junk") }},
		{name: "signature-of-another-key", fails: []string{integrity}, envelope: func(f form, image ocispec.Descriptor) []byte {
			forger, payload := &notarytest.Signer{Key: world.stranger.Key, Chain: world.signer.Chain}, notarytest.Payload(image, nil)
			if f.envelope == "cose" {
				return notarytest.RawCOSE(forger, notarytest.COSEHeader(forger), payload, nil)
			}
			header, err := json.Marshal(notarytest.JWSHeader(forger))
			if err != nil {
				panic(err)
			}
			return notarytest.RawJWS(forger, header, payload)
		}},
		{name: "changed-signature", fails: []string{integrity}, envelope: func(f form, image ocispec.Descriptor) []byte {
			e := good(f, image)
			if f.envelope == "cose" { // the signature is last
				e[len(e)-5] ^= 1
				return e
			}
			var jws map[string]any
			if err := json.Unmarshal(e, &jws); err != nil {
				panic(err)
			}
			sig := []byte(jws["signature"].(string))
			sig[9] ^= 1
			jws["signature"] = string(sig)
			e, _ = json.Marshal(jws)
			return e
		}},
		{name: "wrong-media-type", few: true, fails: []string{integrity}, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			wrong := form{"cose", f.scheme}
			if f.envelope == "cose" {
				wrong.envelope = "jws"
			}
			b.attach(image, wrong, good(f, image))
			return image.Digest
		}},
		{name: "other-payload-type", fails: []string{integrity}, envelope: by(world.signer, notarytest.SignOptions{ContentType: "text/plain"}), few: true},
		{name: "other-digest", loses: true, envelope: func(f form, image ocispec.Descriptor) []byte {
			image.Digest = digest.FromString("another")
			return good(f, image)
		}},
		{name: "other-size", loses: true, envelope: func(f form, image ocispec.Descriptor) []byte { image.Size++; return good(f, image) }},
		{name: "other-media-type", loses: true, envelope: func(f form, image ocispec.Descriptor) []byte {
			image.MediaType = "application/vnd.docker.distribution.manifest.v2+json"
			return good(f, image)
		}},

		{name: "critical-attribute", wide: true, envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "example.org/must", Critical: true, Value: "x"}}})},
		{name: "critical-attribute-with-a-number", only: "cose", envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: int64(-70000), Critical: true, Value: "x"}}}), few: true},
		{name: "critical-plugin-version-alone", envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPluginMinVersion", Critical: true, Value: "1.0.0"}}}), few: true},
		{name: "attribute", envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "example.org/may", Value: "x"}}})},
		{name: "user-metadata", envelope: by(world.signer, notarytest.SignOptions{Annotations: map[string]string{"build": "7"}}), few: true},
		{name: "plugin", loses: true, envelope: by(world.signer, notarytest.SignOptions{Plugin: "nowhere"})},
		{name: "plugin-not-critical", loses: true, envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPlugin", Value: "nowhere"}}}), few: true},
		{name: "plugin-without-a-name", loses: true, envelope: by(world.signer, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "io.cncf.notary.verificationPlugin", Critical: true, Value: " "}}}), few: true},
		{name: "installed-plugin", wide: true, envelope: by(world.signer, notarytest.SignOptions{Plugin: plugin})},
		{name: "critical-extension-of-leaf", envelope: by(leaf(notarytest.CertOptions{Extensions: []pkix.Extension{unknownExtension}}), notarytest.SignOptions{})},
		{name: "critical-extension-of-root", envelope: by(authority(notarytest.CAOptions{CertOptions: notarytest.CertOptions{Extensions: []pkix.Extension{unknownExtension}}}).Leaf(notarytest.CertOptions{}), notarytest.SignOptions{}), few: true},
		{name: "name-constraints", few: true, envelope: by(authority(notarytest.CAOptions{Intermediates: 1, Intermediate: notarytest.CertOptions{Extensions: []pkix.Extension{nameConstraints}}}).Leaf(notarytest.CertOptions{}), notarytest.SignOptions{})},

		{name: "unreachable-crl", wide: true, fails: []string{revocation}, envelope: by(leaf(notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}}), notarytest.SignOptions{})},
		{name: "unreachable-ocsp", wide: true, fails: []string{revocation}, envelope: by(leaf(notarytest.CertOptions{OCSP: []string{"http://127.0.0.1:1"}}), notarytest.SignOptions{})},
		{name: "revoked", wide: true, fails: []string{revocation}, envelope: by(revoked, notarytest.SignOptions{})},
		{name: "good-crl", wide: true, envelope: by(leaf(notarytest.CertOptions{CRL: []string{url + "/good.crl"}}), notarytest.SignOptions{})},
		{name: "unreachable-crl-of-root", envelope: by(authority(notarytest.CAOptions{CertOptions: notarytest.CertOptions{CRL: []string{"http://127.0.0.1:1/crl"}}}).Leaf(notarytest.CertOptions{}), notarytest.SignOptions{}), few: true},

		{name: "long-chain", envelope: by(authority(notarytest.CAOptions{Intermediates: 10}).Leaf(notarytest.CertOptions{}), notarytest.SignOptions{}), few: true},
		{name: "large-envelope", envelope: by(world.signer, notarytest.SignOptions{Annotations: map[string]string{"x": strings.Repeat("x", 300_000)}}), few: true},

		{name: "stranger-and-good", arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attach(image, f, stranger(f, image))
			b.attach(image, f, good(f, image))
			return image.Digest
		}},
		{name: "good-and-expired", arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attach(image, f, good(f, image))
			b.attach(image, f, expiredSignature(f, image))
			return image.Digest
		}, few: true},
		{name: "junk-and-good", arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attach(image, f, []byte("junk"))
			b.attach(image, f, good(f, image))
			return image.Digest
		}, few: true},
		{name: "index-signed", arrange: func(b *box, f form) digest.Digest {
			image := b.index(b.image(""))
			b.attach(image, f, good(f, image))
			return image.Digest
		}, few: true},
		{name: "index-signed-manifest-asked", loses: true, arrange: func(b *box, f form) digest.Digest {
			m := b.image("")
			image := b.index(m)
			b.attach(image, f, good(f, image))
			return m.Digest
		}, few: true},
		{name: "manifest-signed", arrange: func(b *box, f form) digest.Digest {
			m := b.image("")
			b.index(m)
			b.attach(m, f, good(f, m))
			return m.Digest
		}, few: true},
		{name: "manifest-signed-index-asked", arrange: func(b *box, f form) digest.Digest {
			m := b.image("")
			image := b.index(m)
			b.attach(m, f, good(f, m))
			return image.Digest
		}, few: true},
		{name: "signature-of-index-at-manifest", loses: true, arrange: func(b *box, f form) digest.Digest {
			m := b.image("")
			b.attach(m, f, good(f, b.index(m)))
			return m.Digest
		}, few: true},
		{name: "without-image", arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attach(image, f, good(f, image))
			delete(b.Blobs, image.Digest)
			b.Images = nil
			return image.Digest
		}, few: true},
		{name: "broken-referrer-and-good", registry: true, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			a := b.store(image, f, stranger(f, image))
			delete(b.Blobs, a.Envelope.Descriptor.Digest)
			b.List(image, a.Manifest.Descriptor)
			b.attach(image, f, good(f, image))
			return image.Digest
		}, few: true},
		{name: "manifest-of-two-layers-and-good", registry: true, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attachEdited(image, f, good(f, image), func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) })
			b.attach(image, f, good(f, image))
			return image.Digest
		}, few: true},
		{name: "manifest-of-two-layers", loses: true, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attachEdited(image, f, good(f, image), func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) })
			return image.Digest
		}, few: true},
		{name: "manifest-of-another-subject", registry: true, arrange: func(b *box, f form) digest.Digest {
			image, another := b.image(""), b.image("another")
			a := b.store(another, f, good(f, image))
			b.List(image, a.Manifest.Descriptor)
			return image.Digest
		}, few: true},
		{name: "manifest-without-subject", registry: true, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			b.attachEdited(image, f, good(f, image), func(m *ocispec.Manifest) { m.Subject = nil })
			return image.Digest
		}, few: true},
		{name: "artifact-manifest", registry: true, arrange: func(b *box, f form) digest.Digest {
			image := b.image("")
			raw, err := json.Marshal(map[string]any{
				"mediaType": artifactManifest, "artifactType": notary.ArtifactType, "subject": image,
				"blobs": []ocispec.Descriptor{b.Add(f.mediaType(), good(f, image))},
			})
			if err != nil {
				panic(err)
			}
			d := b.Add(artifactManifest, raw)
			d.ArtifactType = notary.ArtifactType
			b.List(image, d)
			return image.Digest
		}, few: true},
		{name: "payload-twice", few: true, only: "jws", envelope: twice(good)},
		{name: "60-strangers-and-good", arrange: crowd(60, stranger, good), few: true},
		{name: "110-strangers-and-good", registry: true, long: true, arrange: crowd(110, stranger, good), few: true},
	}
	for _, k := range []notarytest.KeyType{notarytest.P384, notarytest.RSA2048, notarytest.RSA3072} {
		name := strings.ToLower(string(k))
		s := leaf(notarytest.CertOptions{Key: k})
		e := by(s, notarytest.SignOptions{})
		list = append(list, exhibit{name: name, envelope: e, few: true},
			exhibit{name: name + "-expired-signature", fails: []string{expiry}, envelope: by(s, notarytest.SignOptions{Expiry: gone}), few: true},
			exhibit{name: name + "-changed", fails: []string{integrity}, few: true, envelope: func(f form, image ocispec.Descriptor) []byte {
				blob := bytes.Clone(e(f, image))
				if f.envelope == "cose" {
					blob[len(blob)-5] ^= 1
					return blob
				}
				return bytes.Replace(blob, []byte(`"signature":"`), []byte(`"signature":"AAAA`), 1)
			}})
	}
	return list
}

// crowd attaches n signatures before a good one.
func crowd(n int, other, good func(form, ocispec.Descriptor) []byte) func(*box, form) digest.Digest {
	return func(b *box, f form) digest.Digest {
		image := b.image("")
		for range n {
			b.attach(image, f, other(f, image)) // ECDSA: each is another
		}
		b.attach(image, f, good(f, image))
		return image.Digest
	}
}

// attachEdited is attach with another manifest.
func (b *box) attachEdited(subject ocispec.Descriptor, f form, envelope []byte, edit func(*ocispec.Manifest)) {
	a := b.store(subject, f, envelope)
	delete(b.Blobs, a.Manifest.Descriptor.Digest)
	var m ocispec.Manifest
	if err := json.Unmarshal(a.Manifest.Content, &m); err != nil {
		panic(err)
	}
	edit(&m)
	raw, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	d := b.Add(m.MediaType, raw)
	d.ArtifactType, d.Annotations = a.Manifest.Descriptor.ArtifactType, m.Annotations
	b.List(subject, d)
}

// twice is an envelope of which JSON readers disagree what is signed.
func twice(good func(form, ocispec.Descriptor) []byte) func(form, ocispec.Descriptor) []byte {
	return func(f form, image ocispec.Descriptor) []byte {
		return bytes.Replace(good(f, image), []byte("{"), []byte(`{"payload":"e30",`), 1)
	}
}

// answer is what the specification makes of e in that form under s.
func (e exhibit) answer(f form, s setting) bool {
	if s.level == "skip" {
		return true
	}
	fails := slices.Clone(e.fails)
	if e.other && len(s.identities) > 0 || f.scheme == "authority" && s.ca {
		fails = append(fails, authenticity)
	}
	// Of scheme signingAuthority, the authority says when it was signed.
	needsStamp := s.tsa && (s.when != "afterCertExpiry" || e.life == expired)
	if f.scheme == "x509" && (needsStamp && !e.stamp || !needsStamp && e.life != lives) {
		fails = append(fails, timestamp)
	}
	return !s.refused && !e.loses && !slices.ContainsFunc(fails, s.enforces)
}
