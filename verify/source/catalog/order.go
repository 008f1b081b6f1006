package catalog

import (
	"cmp"
	"slices"
	"time"
	"unique"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Relation is what a catalog is asked for by digest.
type Relation int

// Relations.
const (
	Signatures Relation = iota // of a subject
	Namers                     // indexes that list a manifest, and manifests with a config
)

func (r Relation) of(c *Catalog) map[digest.Digest][]*Blob {
	if r == Signatures {
		return c.Signed
	}
	return c.Named
}

// A Document is a signature, manifest or index that a catalog has, and where to read it.
type Document struct {
	*Reader
	ocispec.Descriptor
	Kind     string // of a signature
	Archive  string // that it lies in; empty: the store
	Envelope int64  // bytes of that of a signature; negative: not known
	Lost     bool   // it cannot be read
	Rank     Rank

	turn   int
	signer unique.Handle[string]
	seen   time.Time
}

// MayBeBy reports whether the signature x may be by the certificate with that thumbprint:
// it claims to be, or whom it is by is not known.
func (x Document) MayBeBy(leaf string) bool {
	return x.signer == (unique.Handle[string]{}) || x.signer.Value() == leaf
}

// A Rank says how likely a document is to meet a rule that trusts anchors.
type Rank int

// Ranks of documents, those first that go first.
const (
	Fits    Rank = iota // leads to an anchor, or nobody says which count
	Unknown             // nobody knows what it leads to
	Strange             // leads elsewhere
	Bare                // no signature leads to it
	Gone                // lost
)

// chain returns the chain of the signature b. What the manifest claims, which its signer
// made up, is asked only if the envelope was not read, as in archives.
func (c *Catalog) chain(b *Blob) Chain {
	if e := c.Blobs[b.Envelope]; e != nil {
		return e.Chain
	}
	return b.Chain
}

// Rank is that of the signature b.
func (c *Catalog) Rank(b *Blob, anchors []string) Rank {
	chain := c.chain(b)
	switch {
	case b.Lost:
		return Gone
	case len(anchors) == 0 || slices.ContainsFunc(chain, func(h unique.Handle[string]) bool { return slices.Contains(anchors, h.Value()) }):
		return Fits
	case len(chain) == 0:
		return Unknown
	}
	return Strange
}

// A best is the rank of the best signature of a document, and who made it.
type best struct {
	rank   Rank
	signer unique.Handle[string]
}

// bests are those of documents.
type bests map[digest.Digest]best

func (all bests) of(c *Catalog, d digest.Digest, anchors []string) best {
	x, known := all[d]
	if known {
		return x
	}
	x.rank = Bare
	for _, b := range c.Signed[d] {
		if r := c.Rank(b, anchors); r < x.rank {
			x = best{rank: r, signer: c.signer(b)}
		}
		if x.rank == Fits {
			break
		}
	}
	all[d] = x
	return x
}

// leading is that of the document d, or of one that names it.
func (c *Catalog) leading(d digest.Digest, anchors []string, all bests) best {
	x := all.of(c, d, anchors)
	for _, b := range c.Named[d] {
		if x.rank == Fits {
			break
		}
		if s := all.of(c, b.Digest, anchors); s.rank < x.rank {
			x = s
		}
	}
	return x
}

// signer is the leaf of the signature b, or zero.
func (c *Catalog) signer(b *Blob) (leaf unique.Handle[string]) {
	if chain := c.chain(b); len(chain) > 0 {
		return chain[0]
	}
	return leaf
}

// Documents returns the documents that stand in a relation to d, which at reads. They are
// not in [Order]: it is called with a lock held.
func (c *Catalog) Documents(of Relation, d digest.Digest, at *Reader, anchors []string) []Document {
	list := of.of(c)[d]
	all, known := make([]Document, 0, len(list)), bests{}
	for _, b := range list {
		x := Document{Reader: at, Kind: b.Kind, Descriptor: b.Descriptor(), Envelope: -1, seen: b.Seen, Lost: b.Lost}
		if e := c.Blobs[b.Envelope]; e != nil {
			x.Envelope = e.Size
		}
		if b.Subject == "" {
			best := c.leading(b.Digest, anchors, known)
			x.Rank, x.signer = best.rank, best.signer
		} else {
			x.Rank, x.signer = c.Rank(b, anchors), c.signer(b)
		}
		all = append(all, x)
	}
	return all
}

// Order sorts documents of one layout: those first that may meet the rule, of these one
// of each signer in turn, and of a signer those first whose images were here last.
func Order(list []Document) []Document {
	slices.SortFunc(list, func(x, y Document) int {
		return cmp.Or(cmp.Compare(x.Rank, y.Rank), y.seen.Compare(x.seen), cmp.Compare(x.Digest, y.Digest))
	})
	type one struct {
		rank   Rank
		signer unique.Handle[string]
	}
	turns := map[one]int{}
	for i, x := range list {
		turns[one{x.Rank, x.signer}]++
		list[i].turn = turns[one{x.Rank, x.signer}]
	}
	slices.SortStableFunc(list, func(x, y Document) int { return cmp.Or(cmp.Compare(x.Rank, y.Rank), cmp.Compare(x.turn, y.turn)) })
	return list
}
