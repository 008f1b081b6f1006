// Package imagetest makes images, signed in the ways that tests of the program need: on
// their own, as what a source holds, and as an OCI layout on disk. It is for tests alone.
package imagetest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// An Image is one that tests use, with everything that belongs to it.
type Image struct {
	Target  ocispec.Descriptor
	Content map[digest.Digest][]byte // manifests and configs, by digest
	Inner   []ocispec.Descriptor     // manifests below target
	Signed  []Signature
}

// A Signature is an artifact with its subject.
type Signature struct {
	Subject ocispec.Descriptor
	notarytest.Artifact
}

// Put adds content and returns its descriptor.
func (i *Image) Put(mediaType string, raw []byte, alg digest.Algorithm) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: alg.FromBytes(raw), Size: int64(len(raw))}
	if i.Content == nil {
		i.Content = map[digest.Digest][]byte{}
	}
	i.Content[d.Digest] = raw
	return d
}

// Encode is v as JSON. It panics where v has none.
func Encode(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // of our own structs
	}
	return raw
}

// Manifest adds an image manifest that differs from others by name.
func (i *Image) Manifest(name string, alg digest.Algorithm) ocispec.Descriptor {
	config := i.Put(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"architecture":%q,"os":%q,"author":%q,"rootfs":{"type":"layers","diff_ids":[]}}`, runtime.GOARCH, runtime.GOOS, name), digest.SHA256)
	return i.Put(ocispec.MediaTypeImageManifest, Encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{},
	}), alg)
}

// Index adds an index of manifests.
func (i *Image) Index(manifests ...ocispec.Descriptor) ocispec.Descriptor {
	for _, m := range manifests {
		m.Platform = nil
		i.Inner = append(i.Inner, m)
	}
	return i.Put(ocispec.MediaTypeImageIndex, Encode(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	}), digest.SHA256)
}

// Sign attaches a signature by s over payload to subject.
func (i *Image) Sign(s *notarytest.Signer, subject, payload ocispec.Descriptor, o notarytest.SignOptions) {
	i.Signed = append(i.Signed, Signature{subject, notarytest.Manifest(notarytest.MustSign(s, payload, o), notary.MediaTypeJWS, subject, notarytest.ArtifactType)})
}

// Attach attaches an artifact of one layer to subject.
func (i *Image) Attach(subject ocispec.Descriptor, artifactType, content string) {
	blob := func(mediaType, s string) notarytest.Blob {
		return notarytest.Blob{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(s), Size: int64(len(s))}, Content: []byte(s)}
	}
	config, layer := blob(ocispec.MediaTypeEmptyJSON, "{}"), blob(artifactType, content)
	manifest := blob(ocispec.MediaTypeImageManifest, string(Encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: config.Descriptor, Layers: []ocispec.Descriptor{layer.Descriptor}, Subject: &subject,
	})))
	manifest.Descriptor.ArtifactType = artifactType
	i.Signed = append(i.Signed, Signature{subject, notarytest.Artifact{Manifest: manifest, Config: config, Envelope: layer}})
}

// Fixtures are the images and who signed them.
type Fixtures struct {
	Root   []byte             // of the CA that configurations trust
	Signer *notarytest.Signer // whom they trust
	Images map[string]*Image
}

// Identity is whom the configurations of scripts trust, at the CA acme.
const Identity = "x509.subject: C=US, ST=WA, O=acme"

// World is made once. The images are
//
//	signed      signed by a trusted signer
//	unsigned    has no signature
//	foreign     signed by somebody of an unknown authority
//	misnamed    signed by somebody else of the trusted authority
//	swapped     has the signature of another image attached
//	expired     its signature has expired
//	index       for two platforms, the index is signed
//	inner       for two platforms, the manifest of this platform is signed
//	elsewhere   a signed index without a manifest for this platform
//	missized    a signed index that is wrong about the size of its manifest
//	unlabelled  a signed index that does not say the platforms of its manifests
//	twofold     signed, and both a manifest and an index
//	long        signed, with a sha512 digest
//	attested    signed, and with an SBOM
//	lied        signed; in front is a signature manifest that lies about its size
var World = sync.OnceValue(func() Fixtures {
	acme, stranger := notarytest.NewCA(notarytest.CAOptions{}), notarytest.NewCA(notarytest.CAOptions{})
	ours, theirs := acme.Leaf(notarytest.CertOptions{}), stranger.Leaf(notarytest.CertOptions{})
	other := notarytest.Name("intern")
	other.Organization = []string{"acme interns"}
	intern := acme.Leaf(notarytest.CertOptions{Subject: other})

	w := Fixtures{Root: acme.PEM(), Signer: ours, Images: map[string]*Image{}}
	single := func(name string) (*Image, ocispec.Descriptor) {
		i := &Image{}
		i.Target = i.Manifest(name, digest.SHA256)
		w.Images[name] = i
		return i, i.Target
	}
	plain := notarytest.SignOptions{}
	signed, t := single("signed")
	signed.Sign(ours, t, t, plain)
	single("unsigned")
	foreign, t := single("foreign")
	foreign.Sign(theirs, t, t, plain)
	misnamed, t := single("misnamed")
	misnamed.Sign(intern, t, t, plain)
	swapped, t := single("swapped")
	swapped.Sign(ours, t, signed.Target, plain)
	expired, t := single("expired")
	expired.Sign(ours, t, t, notarytest.SignOptions{Expiry: notarytest.SigningTime.Add(time.Hour)})
	lied, t := single("lied")
	lie := t
	lie.Size++
	lied.Sign(theirs, lie, lie, plain)
	lied.Sign(ours, t, t, plain)

	attested, t := single("attested")
	attested.Sign(ours, t, t, plain)
	attested.Attach(t, "application/spdx+json", `{"spdxVersion":"SPDX-2.3"}`)

	here := &ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	there := &ocispec.Platform{OS: "plan9", Architecture: "mips"}
	multi := func(name string, platforms ...*ocispec.Platform) *Image {
		i := &Image{}
		var list []ocispec.Descriptor
		for k, p := range platforms {
			m := i.Manifest(fmt.Sprint(name, k), digest.SHA256)
			m.Platform = p
			list = append(list, m)
		}
		i.Target = i.Index(list...)
		w.Images[name] = i
		return i
	}
	index := multi("index", here, there)
	index.Sign(ours, index.Target, index.Target, plain)
	inner := multi("inner", here, there)
	inner.Sign(ours, inner.Inner[0], inner.Inner[0], plain)
	elsewhere := multi("elsewhere", there)
	elsewhere.Sign(ours, elsewhere.Target, elsewhere.Target, plain)
	missized := &Image{}
	wrong := missized.Manifest("missized", digest.SHA256)
	wrong.Size, wrong.Platform = wrong.Size+1, here
	missized.Target = missized.Index(wrong)
	missized.Sign(ours, missized.Target, missized.Target, plain)
	w.Images["missized"] = missized
	unlabelled := multi("unlabelled", nil)
	unlabelled.Sign(ours, unlabelled.Target, unlabelled.Target, plain)
	multi("unlabelledUnsigned", nil)

	built := &Image{} // with BuildKit
	mine, said := built.Manifest("built", digest.SHA256), built.Manifest("provenance", digest.SHA256)
	mine.Platform, said.Platform = here, &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	said.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": mine.Digest.String()}
	built.Target = built.Index(mine, said)
	built.Sign(ours, built.Target, built.Target, plain)
	w.Images["built"] = built

	twofold := &Image{}
	m := twofold.Manifest("twofold", digest.SHA256)
	twofold.Target = twofold.Put(ocispec.MediaTypeImageManifest, Encode(map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest, "config": m, "layers": []any{}, "manifests": []any{m},
	}), digest.SHA256)
	twofold.Sign(ours, twofold.Target, twofold.Target, plain)
	w.Images["twofold"] = twofold

	long := &Image{}
	long.Target = long.Manifest("long", digest.SHA512)
	long.Sign(ours, long.Target, long.Target, plain)
	w.Images["long"] = long
	return w
})

// Content is the images as a source holds them, without the images themselves,
// without their signatures, or without the manifests below an index.
func Content(names []string, without string) (c sourcetest.Content, err error) {
	c.Blobs = map[digest.Digest][]byte{}
	for _, name := range names {
		img := World().Images[name]
		if img == nil {
			return c, fmt.Errorf("no image %s", name)
		}
		if without != "images" {
			c.Images = append(c.Images, img.Target)
			c.List(img.Target)
			for d, raw := range img.Content {
				inner := slices.ContainsFunc(img.Inner, func(m ocispec.Descriptor) bool { return m.Digest == d })
				if !inner || without != "manifests" {
					c.Blobs[d] = raw
				}
			}
		}
		if without != "signatures" {
			for _, s := range img.Signed {
				c.List(s.Subject, s.Manifest.Descriptor)
				for _, b := range []notarytest.Blob{s.Manifest, s.Config, s.Envelope} {
					c.Blobs[b.Descriptor.Digest] = b.Content
				}
			}
		}
	}
	return c, nil
}

// WriteLayout is sourcetest.Layout for a script.
func WriteLayout(dir string, c sourcetest.Content) error {
	entries := append([]ocispec.Descriptor{}, c.Images...)
	for _, list := range c.Referrers {
		entries = append(entries, list...)
	}
	files := map[string][]byte{
		ocispec.ImageIndexFile:  Encode(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: entries}),
		ocispec.ImageLayoutFile: []byte(`{"imageLayoutVersion":"1.0.0"}`),
	}
	for d, raw := range c.Blobs {
		files[filepath.Join("blobs", d.Algorithm().String(), d.Encoded())] = raw
	}
	for name, raw := range files {
		name = filepath.Join(dir, name)
		if err := os.RemoveAll(name); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// WriteConfig makes a configuration directory that trusts Identity for every image, with
// that config.yaml.
func WriteConfig(dir, yaml string) error {
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": World().Root}, notarytest.Statement("prod", Identity)); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(yaml), 0o644)
}
