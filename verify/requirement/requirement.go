// Package requirement is what a rule asks evidence to show: a tree of authorities ([Require]),
// and the choice, from what was found, of one finding for each of some leaves that meet
// the tree together, all by distinct identities ([Requirement.Choose]).
//
// It knows nothing of signatures, and imports nothing of ours. Functions keep nothing
// between calls and are safe for concurrent use.
package requirement

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// Bounds of a Requirement.
const (
	MaxLeaves = 12
	maxDepth  = 3
)

// A Leaf asks for a piece of evidence by one authority.
type Leaf struct {
	Kind      string   // name of the kind of evidence
	Authority string   // by the name that the kind's checker knows
	Hash      [32]byte // of all that the checker's finding depends on; zero is refused
}

// A Term is a part of a Requirement that is being built. The zero Term is refused.
type Term struct {
	leaf *Leaf
	n    int
	of   []Term
	bit  int // of a leaf: its place among the leaves
}

// SignedBy asks for evidence by the authority that l names.
func SignedBy(l Leaf) Term { return Term{leaf: &l} }

// All asks for every one of the terms, by distinct identities.
func All(of ...Term) Term { return Term{n: len(of), of: of} }

// AtLeast asks for n of the terms, by distinct identities.
func AtLeast(n int, of ...Term) Term { return Term{n: n, of: of} }

// A Requirement is what evidence of an image has to show: a tree of at most three
// levels and MaxLeaves leaves. It does not change. The zero Requirement, and nil, cannot
// be met.
//
// Leaves that are met together are met by distinct identities, wherever in the tree they
// are. Two findings are one identity if they have the same key or the same identity:
// a renewed certificate has another key, and keyless signing a new one each time. That
// is not transitive, and it is not made so: two findings that have nothing in common are
// not one because a third shares something with each. Who controls the third can leave it
// out, so that it could only ever deny, and the answer would depend on what was seen.
// Adding evidence therefore never takes an allow away.
type Requirement struct {
	root   Term
	leaves []Leaf
	hash   [32]byte
}

// Require makes a Requirement. It refuses one that cannot be met, or that is met by
// nothing, and leaves of the same authority: one identity could meet both.
func Require(t Term) (*Requirement, error) {
	r := &Requirement{}
	var err error
	if r.root, r.hash, err = r.build(t, 1); err != nil {
		return nil, fmt.Errorf("requirement: %w", err)
	}
	return r, nil
}

func (r *Requirement) build(t Term, depth int) (built Term, hash [32]byte, err error) {
	if t.leaf != nil {
		l := *t.leaf
		switch {
		case l.Kind == "" || l.Authority == "" || l.Hash == [32]byte{}:
			return t, hash, errors.New("an authority without a name, a kind or a hash")
		case len(r.leaves) == MaxLeaves:
			return t, hash, fmt.Errorf("more than %d authorities", MaxLeaves)
		}
		for _, x := range r.leaves {
			if x.Kind == l.Kind && (x.Authority == l.Authority || x.Hash == l.Hash) {
				return t, hash, fmt.Errorf("one identity could meet both %q and %q", x.Authority, l.Authority)
			}
		}
		r.leaves = append(r.leaves, l)
		return Term{leaf: &l, bit: len(r.leaves) - 1}, l.Hash, nil
	}
	switch {
	case depth > maxDepth-1: // the leaves are the last level
		return t, hash, fmt.Errorf("more than %d levels", maxDepth)
	case len(t.of) == 0:
		return t, hash, errors.New("a list of nothing")
	case t.n < 1 || t.n > len(t.of):
		return t, hash, fmt.Errorf("%d of %d", t.n, len(t.of))
	}
	built = Term{n: t.n}
	h := binary.BigEndian.AppendUint64([]byte("tidewaiter requirement 1"), uint64(t.n))
	for _, child := range t.of {
		c, sum, err := r.build(child, depth+1)
		if err != nil {
			return t, hash, err
		}
		built.of, h = append(built.of, c), append(h, sum[:]...)
	}
	return built, sha256.Sum256(h), nil
}

// Hash names the requirement: those with equal hashes are met by the same evidence. That
// of a single leaf is the leaf's own.
func (r *Requirement) Hash() [32]byte {
	if r == nil {
		return [32]byte{}
	}
	return r.hash
}

// Leaves returns the leaves, of which a [Claim] has the place. The caller must not change
// them.
func (r *Requirement) Leaves() []Leaf {
	if r == nil {
		return nil
	}
	return r.leaves
}

// met reports whether t is met where the leaves of the set are.
func (t Term) met(set uint) bool {
	if t.leaf != nil {
		return set&(1<<t.bit) != 0
	}
	n := 0
	for _, c := range t.of {
		if c.met(set) {
			n++
		}
	}
	return t.n > 0 && n >= t.n
}
