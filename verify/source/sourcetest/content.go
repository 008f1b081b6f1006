// Package sourcetest is for the tests of sources of signatures: what every
// [verify.Source] has to do (Run), and a registry and a layout, directory or tar
// file, to do it on, both made from the same Content. Envelopes are any bytes: no source looks
// into one.
package sourcetest

import (
	"archive/tar"
	"crypto/sha256"
	_ "crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Name is the name of every image in a Content.
var Name = verify.Name{Host: "registry.test", Path: "team/app"}

// Content is what a source holds. The zero Content is empty and ready to use.
type Content struct {
	Blobs     map[digest.Digest][]byte               // manifests and blobs; the bytes under a digest need not have it
	Images    []ocispec.Descriptor                   // images without more to say
	Kind      verify.Kind                            // of its signatures; nil: Kind
	Tagged    map[string]ocispec.Descriptor          // manifests that lie at tags
	Referrers map[digest.Digest][]ocispec.Descriptor // what is listed for a subject; need not be true
}

// Add stores raw and returns its descriptor.
func (c *Content) Add(mediaType string, raw []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	c.put(d.Digest, raw)
	return d
}

func (c *Content) put(d digest.Digest, raw []byte) {
	if c.Blobs == nil {
		c.Blobs = map[digest.Digest][]byte{}
	}
	c.Blobs[d] = raw
}

// List lists d as a referrer of subject, and without d just that there is a list.
func (c *Content) List(subject ocispec.Descriptor, d ...ocispec.Descriptor) {
	if c.Referrers == nil {
		c.Referrers = map[digest.Digest][]ocispec.Descriptor{}
	}
	c.Referrers[subject.Digest] = append(c.Referrers[subject.Digest], d...)
}

// Image adds an image that differs from others by name, with an empty list of
// referrers.
func (c *Content) Image(name string) ocispec.Descriptor {
	return c.ImageBy(digest.SHA256, name)
}

// ImageBy is Image with the digest of its manifest made by alg.
func (c *Content) ImageBy(alg digest.Algorithm, name string) ocispec.Descriptor {
	config := c.Add(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","author":%q,"rootfs":{"type":"layers","diff_ids":[]}}`, name))
	raw := encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{},
	})
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: alg.FromBytes(raw), Size: int64(len(raw))}
	c.put(d.Digest, raw)
	c.Images = append(c.Images, d)
	c.List(d)
	return d
}

// Sign adds a signature of subject with the given envelope, lists it, and returns
// what a source should make of it. Edits change the manifest before it is stored.
func (c *Content) Sign(subject ocispec.Descriptor, mediaType, envelope string, edits ...func(*ocispec.Manifest)) verify.Evidence {
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: c.kind().ArtifactType(),
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{c.Add(mediaType, []byte(envelope))},
		Subject:      &subject,
		Annotations:  map[string]string{c.kind().Annotation(): thumbprint(envelope)},
	}
	for _, edit := range edits {
		edit(&m)
	}
	c.put(m.Config.Digest, []byte("{}"))
	d := c.Add(m.MediaType, encode(m))
	listed := d
	listed.ArtifactType, listed.Annotations = m.ArtifactType, m.Annotations
	if listed.ArtifactType == "" {
		listed.ArtifactType = m.Config.MediaType
	}
	c.List(subject, listed)
	return verify.Evidence{Manifest: d, MediaType: mediaType, Blob: []byte(envelope)}
}

// kind is that of the signatures.
func (c *Content) kind() verify.Kind {
	if c.Kind == nil {
		return Kind
	}
	return c.Kind
}

// SignToy adds a signature of kind Toy, as a referrer of subject or at its tag, and returns
// what a source should make of it.
func (c *Content) SignToy(subject ocispec.Descriptor, name string, tagged bool) verify.Evidence {
	note, signature := c.Add("application/vnd.example.note", []byte("note "+name)), c.Add("application/vnd.example.toy", []byte("toy "+name))
	note.Annotations = map[string]string{ToyNote: name, "com.example.other": "is not looked at"}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ToyType,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{note, signature},
	}
	if !tagged {
		m.Subject = &subject
	}
	c.put(m.Config.Digest, []byte("{}"))
	d := c.Add(m.MediaType, encode(m))
	ev := verify.Evidence{Manifest: d, MediaType: note.MediaType, Blob: []byte("note " + name), More: []verify.Blob{{Descriptor: signature, Raw: []byte("toy " + name)}}}
	if tagged {
		if c.Tagged == nil {
			c.Tagged = map[string]ocispec.Descriptor{}
		}
		c.Tagged[tag(subject.Digest)+ToySuffix] = d
		return ev
	}
	d.ArtifactType = ToyType
	c.List(subject, d)
	return ev
}

// OldStyle makes the manifest of a signature as it was done before image-spec 1.1.
func OldStyle(m *ocispec.Manifest) {
	m.ArtifactType, m.Config.MediaType = "", m.ArtifactType
}

func thumbprint(s string) string {
	h := sha256.Sum256([]byte(s))
	return `["` + hex.EncodeToString(h[:]) + `"]`
}

func encode(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // of our own structs
	}
	return raw
}

// index is the index that lists entries.
func index(entries []ocispec.Descriptor) []byte {
	if entries == nil {
		entries = []ocispec.Descriptor{}
	}
	return encode(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: entries,
	})
}

// tag is the referrers tag of d.
func tag(d digest.Digest) string {
	s := d.Encoded()
	return d.Algorithm().String() + "-" + s[:min(len(s), 64)]
}

// Layout writes c as an OCI image layout into dir, which it makes. Referrers are
// entries of index.json, or with tagged, of an index with the referrers tag of
// their subject.
func Layout(t testing.TB, dir string, c Content, tagged bool) {
	t.Helper()
	entries := append([]ocispec.Descriptor{}, c.Images...)
	blobs := map[digest.Digest][]byte{}
	for d, raw := range c.Blobs {
		blobs[d] = raw
	}
	for name, d := range c.Tagged {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: name}
		entries = append(entries, d)
	}
	for subject, list := range c.Referrers {
		if !tagged {
			entries = append(entries, list...)
			continue
		}
		raw := index(list)
		d := ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(raw), Size: int64(len(raw)),
			Annotations: map[string]string{ocispec.AnnotationRefName: tag(subject)},
		}
		entries, blobs[d.Digest] = append(entries, d), raw
	}
	write := func(name string, raw []byte) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for d, raw := range blobs {
		write(filepath.Join("blobs", d.Algorithm().String(), d.Encoded()), raw)
	}
	write(ocispec.ImageIndexFile, index(entries))
	write(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`))
}

// Tar packs the layout directory dir, as Layout writes it, into a tar file.
func Tar(t testing.TB, dir, file string) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	err = w.AddFS(os.DirFS(dir))
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}
