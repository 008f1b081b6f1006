package store

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A catalog says what the documents of one layout are of: signatures, image
// manifests and indexes. It is in memory, and nothing in it is believed: what a
// document says is checked when it is used. It is not safe for concurrent use.
type catalog struct {
	blobs  map[digest.Digest]*blob
	signed map[digest.Digest][]*blob // subject to signatures
	named  map[digest.Digest][]*blob // manifest to indexes that list it, config to manifests
	links  int                       // entries of named
	used   int64                     // bytes of blobs
}

// A blob is a file of the layout. What is said of it here is what the file seemed
// to be when it was last read.
type blob struct {
	digest    digest.Digest
	size      int64
	mediaType string          // of a manifest or index; empty: neither
	subject   digest.Digest   // of a signature
	envelope  digest.Digest   // of a signature
	names     []digest.Digest // what an index lists, or the config of an image manifest

	seen time.Time // of a signature: when its image was last known to be on the node
	gone time.Time // and since when listings have not had it, in this process; zero: they have
}

func (b *blob) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: b.mediaType, Digest: b.digest, Size: b.size}
}

func newCatalog() catalog {
	return catalog{blobs: map[digest.Digest]*blob{}, signed: map[digest.Digest][]*blob{}, named: map[digest.Digest][]*blob{}}
}

// Docker's media types.
const (
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList
}

// see says what raw seems to be.
func see(d digest.Digest, raw []byte) *blob {
	b := &blob{digest: d, size: int64(len(raw))}
	var m struct {
		ArtifactType string `json:"artifactType"`
		Config       struct {
			MediaType string        `json:"mediaType"`
			Digest    digest.Digest `json:"digest"`
		} `json:"config"`
		Subject struct {
			Digest digest.Digest `json:"digest"`
		} `json:"subject"`
		Layers    json.RawMessage `json:"layers"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return b
	}
	mediaType, err := verify.MediaTypeOf(raw, "")
	if err != nil {
		return b
	}
	for _, t := range [...]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerList} {
		if t == mediaType { // there are no others, and so they take no memory
			b.mediaType = t
		}
	}
	kind := m.ArtifactType
	if kind == "" { // before image-spec 1.1, and of images
		kind = m.Config.MediaType
	}
	switch {
	case m.Manifests != nil:
		b.names = digests(m.Manifests)
	case kind == verify.ArtifactTypeNotation && m.Subject.Digest.Validate() == nil:
		b.subject = m.Subject.Digest
		if layers := digests(m.Layers); len(layers) == 1 {
			b.envelope = layers[0]
		}
	case (kind == ocispec.MediaTypeImageConfig || kind == dockerConfig) && m.Config.Digest.Validate() == nil:
		b.names = []digest.Digest{m.Config.Digest}
	}
	return b
}

// digests returns those of a list of descriptors; none of one that is too long.
func digests(raw json.RawMessage) (list []digest.Digest) {
	var descriptors []struct {
		Digest digest.Digest `json:"digest"`
	}
	if verify.Bounded(raw) != nil || json.Unmarshal(raw, &descriptors) != nil {
		return nil
	}
	for _, d := range descriptors {
		if d.Digest.Validate() == nil {
			list = append(list, d.Digest)
		}
	}
	return slices.Clip(list)
}

// add takes b in, whose names count only where there are at most most in all. It
// reports whether they do.
func (c *catalog) add(b *blob, most int) bool {
	if c.blobs[b.digest] != nil {
		return true
	}
	whole := c.links+len(b.names) <= most
	if !whole {
		b.names = nil
	}
	b.subject, b.envelope = c.same(b.subject), c.same(b.envelope)
	for i, d := range b.names {
		b.names[i] = c.same(d)
	}
	c.blobs[b.digest] = b
	c.used += b.size
	c.links += len(b.names)
	if b.subject != "" {
		c.signed[b.subject] = append(c.signed[b.subject], b)
	}
	for _, d := range b.names {
		c.named[d] = append(c.named[d], b)
	}
	return whole
}

// same is d in the memory of a blob that has it, if one has: half of what the
// catalog takes are digests.
func (c *catalog) same(d digest.Digest) digest.Digest {
	if b := c.blobs[d]; b != nil {
		return b.digest
	}
	return d
}

// forget is the opposite of add.
func (c *catalog) forget(b *blob) {
	if c.blobs[b.digest] != b {
		return
	}
	delete(c.blobs, b.digest)
	c.used -= b.size
	c.links -= len(b.names)
	without(c.signed, b.subject, b)
	for _, d := range b.names {
		without(c.named, d, b)
	}
}

func without(m map[digest.Digest][]*blob, d digest.Digest, b *blob) {
	var rest []*blob // anew: who looks at the old list is not disturbed
	for _, x := range m[d] {
		if x != b {
			rest = append(rest, x)
		}
	}
	if m[d] = rest; rest == nil {
		delete(m, d)
	}
}

// signatures returns how many there are.
func (c *catalog) signatures() (n int) {
	for _, list := range c.signed {
		n += len(list)
	}
	return n
}

// latest returns a copy of list, those whose images were here last first.
func latest(list []*blob) []*blob {
	return slices.SortedFunc(slices.Values(list), func(x, y *blob) int {
		if c := y.seen.Compare(x.seen); c != 0 {
			return c
		}
		return strings.Compare(string(x.digest), string(y.digest))
	})
}
