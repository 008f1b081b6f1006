// Package catalog is what the store and the evidence archives share: what the documents of
// one image layout are of ([Catalog]), a reader that no dead disk holds up ([Reader]), and
// how both together answer a question ([Find], [Parents]).
//
// Nothing here believes a document. The order in which it hands evidence over rests on
// what documents claim; the evidence itself is checked by who gets it.
package catalog

import (
	"cmp"
	"encoding/json"
	"errors"
	"slices"
	"time"
	"unique"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// A Catalog says what the documents of one layout are of: signatures, image
// manifests and indexes. It is in memory, and nothing in it is believed: what a
// document says is checked when it is used. It is not safe for concurrent use.
type Catalog struct {
	Blobs  map[digest.Digest]*Blob
	Signed map[digest.Digest][]*Blob // subject to signatures
	Named  map[digest.Digest][]*Blob // manifest to indexes that list it, config to manifests
	Lacks  map[digest.Digest]bool    // subjects of signatures that are not in Blobs themselves
	Links  int                       // entries of Named
	Cut    int                       // blobs of which names are not remembered
	Used   int64                     // bytes of Blobs
}

// A Blob is a file of the layout. What is said of it here is what the file seemed
// to be when it was last read.
type Blob struct {
	Digest    digest.Digest
	Size      int64
	MediaType string          // of a manifest or index; empty: neither
	Kind      string          // of a signature
	Subject   digest.Digest   // of a signature
	Envelope  digest.Digest   // of a signature of one blob
	Parts     []digest.Digest // of a signature of several
	Names     []digest.Digest // what an index lists, each once, or the config of an image manifest
	Cut       bool            // it names more than is remembered, and Names has none
	Chain     Chain           // of an envelope; of a signature, that which its manifest claims
	Lost      bool            // a signature that is damaged: it is known that there was one, and no more

	Seen time.Time // of a signature: when its image was last known to be on the node
	Gone time.Time // and since when listings have not had it, in this process; zero: they have
}

// Descriptor is what the blob was when it was last read.
func (b *Blob) Descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size}
}

// A Chain is the thumbprints of certificates, the leaf's first. It is a hint for the
// order of signatures and for their shares of the room, and is never believed.
type Chain []unique.Handle[string]

// ChainOf is the chain with those thumbprints.
func ChainOf(thumbprints []string) (c Chain) {
	for _, t := range thumbprints {
		c = append(c, unique.Make(t))
	}
	return slices.Clip(c)
}

// New returns an empty catalog.
func New() Catalog {
	return Catalog{Blobs: map[digest.Digest]*Blob{}, Signed: map[digest.Digest][]*Blob{}, Named: map[digest.Digest][]*Blob{}, Lacks: map[digest.Digest]bool{}}
}

// See says what raw seems to be, a signature if it is of one of kinds. An error wraps verify.ErrBudget: the document goes
// beyond the bounds, and what it is is not known.
func See(d digest.Digest, raw []byte, kinds []verify.Kind) (*Blob, error) {
	b := &Blob{Digest: d, Size: int64(len(raw))}
	m, err := oci.Read(raw)
	if errors.Is(err, verify.ErrBudget) {
		return b, err
	}
	if err != nil {
		return b, nil
	}
	mediaType, err := oci.MediaTypeOf(raw, "")
	if err != nil {
		return b, nil
	}
	for _, t := range [...]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, oci.DockerManifest, oci.DockerList} {
		if t == mediaType { // there are no others, and so they take no memory
			b.MediaType = t
		}
	}
	of := slices.IndexFunc(kinds, func(k verify.Kind) bool { return evidence.Is(k, m.Head) })
	switch {
	case m.HasManifests:
		b.Names = digests(m.Manifests)
		slices.Sort(b.Names)
		b.Names = slices.Clip(slices.Compact(b.Names))
	case of >= 0 && m.Subject != nil && m.Subject.Digest.Validate() == nil:
		b.Kind, b.Subject = kinds[of].Name(), m.Subject.Digest
		if layers := digests(m.Layers); len(layers) == 1 {
			b.Envelope = layers[0]
		} else if len(layers) <= evidence.MaxBlobs {
			b.Parts = layers
		}
		b.Chain = claimed(raw, kinds[of].Annotation())
	case oci.IsConfig(cmp.Or(m.ArtifactType, m.Config.MediaType)) && m.Config.Digest.Validate() == nil:
		b.Names = []digest.Digest{m.Config.Digest}
	}
	return b, nil
}

// claimed reads the annotation of a signature's manifest that lists the thumbprints of its
// chain.
func claimed(raw []byte, thumbprints string) Chain {
	var list []string
	if thumbprints == "" {
		return nil
	}
	head, err := oci.ReadHead(raw, thumbprints)
	if err != nil || len(head.Annotations[thumbprints]) > 4096 || json.Unmarshal([]byte(head.Annotations[thumbprints]), &list) != nil {
		return nil
	}
	return ChainOf(slices.DeleteFunc(list, func(t string) bool { return len(t) != 64 }))
}

// digests returns those of a list of descriptors.
func digests(list []ocispec.Descriptor) (all []digest.Digest) {
	for _, d := range list {
		if d.Digest.Validate() == nil {
			all = append(all, d.Digest)
		}
	}
	return slices.Clip(all)
}

// Add takes b in, whose names count only where there are at most most in all. It
// reports whether they do.
func (c *Catalog) Add(b *Blob, most int) bool {
	if was := c.Blobs[b.Digest]; was != nil && !was.Lost {
		return true
	} else if was != nil {
		c.Forget(was)
	}
	whole := c.Links+len(b.Names) <= most
	if !whole {
		b.Names, b.Cut = nil, true
	}
	if b.Cut {
		c.Cut++
	}
	b.Subject, b.Envelope = c.same(b.Subject), c.same(b.Envelope)
	for i, d := range b.Names {
		b.Names[i] = c.same(d)
	}
	c.Blobs[b.Digest] = b
	c.Used += b.Size
	c.Links += len(b.Names)
	if b.Subject != "" {
		c.Signed[b.Subject] = append(c.Signed[b.Subject], b)
		if c.Blobs[b.Subject] == nil {
			c.Lacks[b.Subject] = true
		}
	}
	delete(c.Lacks, b.Digest)
	for _, d := range b.Names {
		c.Named[d] = append(c.Named[d], b)
	}
	return whole
}

// same is d in the memory of a blob that has it, if one has: half of what the
// catalog takes are digests.
func (c *Catalog) same(d digest.Digest) digest.Digest {
	if b := c.Blobs[d]; b != nil {
		return b.Digest
	}
	return d
}

// Forget is the opposite of Add.
func (c *Catalog) Forget(b *Blob) {
	if c.Blobs[b.Digest] != b {
		return
	}
	delete(c.Blobs, b.Digest)
	c.Used -= b.Size
	c.Links -= len(b.Names)
	if b.Cut {
		c.Cut--
	}
	without(c.Signed, b.Subject, b)
	if len(c.Signed[b.Digest]) > 0 {
		c.Lacks[b.Digest] = true
	}
	if len(c.Signed[b.Subject]) == 0 {
		delete(c.Lacks, b.Subject)
	}
	for _, d := range b.Names {
		without(c.Named, d, b)
	}
}

func without(m map[digest.Digest][]*Blob, d digest.Digest, b *Blob) {
	var rest []*Blob // anew: who looks at the old list is not disturbed
	for _, x := range m[d] {
		if x != b {
			rest = append(rest, x)
		}
	}
	if m[d] = rest; rest == nil {
		delete(m, d)
	}
}

// Signatures returns how many there are.
func (c *Catalog) Signatures() (n int) {
	for _, list := range c.Signed {
		for _, b := range list {
			if !b.Lost {
				n++
			}
		}
	}
	return n
}
