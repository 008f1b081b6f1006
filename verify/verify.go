// Package verify decides whether an image may run on this node.
//
// An [Image] is what the runtime says it is about to run, bound to content. A
// [Policy] selects the one [Rule] that speaks of it; that step is pure. A
// [Evaluator] answers the [Question] that the two make: the cache where it knows,
// else the [Engine], from [Evidence] that each [Source] finds and a [Checker]
// checks. An [Decider] puts them together and is what the gate asks.
//
// # Why it stays closed
//
// The zero [Decision] denies. Two functions can let an image run: allow, which
// looks once more at all that it rests on, and audit, which is applied last and
// only where the configuration says so. Errors and panics become denials with a
// [Reason]. Nothing here reads a clock, a file or a network of its own.
//
// The package imports the standard library, go-digest, image-spec, and of its children
// verify/oci and verify/text, which import nothing of this module.
package verify

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Verifier decides whether an image may run. It returns no error and does not
// panic: what it could not establish is a Decision that denies and says why. It
// is safe for concurrent use. When ctx ends first the answer is PENDING and the
// work goes on under a deadline of its own.
type Verifier interface {
	Verify(ctx context.Context, img Image) Decision
}

// An Evaluator answers questions. The cache and the Engine behind it are Evaluators. The
// contract is Verifier's.
type Evaluator interface {
	Evaluate(ctx context.Context, q Question) Decision
}

// A Question is an image together with what the policy in force asks of it.
type Question struct {
	Image Image
	Rule  *Rule
	Tried []Attempt // at sources that another Engine asked already; a denial counts them
	found []proof   // by that; see After
}

// Key names the question: questions with equal keys have the same answer until
// it ends. It holds no tag, pod or namespace, so that a thousand pods share one
// and no pod author can spoil another's.
func (q Question) Key() Key {
	k := Key{Target: plain(q.Image.Target), Manifest: q.Image.Manifest.Digest, Config: q.Image.Config}
	if q.Rule != nil {
		k.Requirement = q.Rule.Require.Hash()
	}
	return k
}

// Validate says why the answer is no whatever signatures there are, or returns nil
// where they decide. Every Evaluator that remembers answers asks this first, since
// Key leaves out what it looks at.
func (q Question) Validate() *Fault {
	if f := q.Image.validate(); f != nil {
		return f
	}
	if r := q.Rule; r == nil || r.Fixed != "" || r.Require.Hash() == [32]byte{} {
		return &Fault{PolicyInvalid, "the rule asks for no signature"}
	}
	return nil
}

// listed reports whether the rule names a digest of the image itself, which
// needs no signature then. Other targets of the same config do not count.
func (q Question) listed() bool {
	r, i := q.Rule, q.Image
	return r != nil && r.Fixed == AllowedByDigest && r.Digest != "" &&
		(r.Digest == i.Target.Digest || r.Digest == i.Manifest.Digest || i.LayersVerified && r.Digest == i.Config)
}

// Accepts reports whether d, an allow that answers a question of the same Key, also
// answers q: Key leaves out whether other targets of the same config count.
func (q Question) Accepts(d Decision) bool {
	i := q.Image
	own := func(s digest.Digest) bool { return s != "" && (s == i.Target.Digest || s == i.Manifest.Digest) }
	return i.LayersVerified || own(d.Signed) && !slices.ContainsFunc(d.proof, func(p proof) bool { return !own(p.finding.Signed) })
}

// name says in d which question it answers.
func (q Question) name(d *Decision) {
	if d.Key, d.Binding = q.Key(), q.Image.Binding; q.Rule != nil {
		d.Rule = q.Rule.Name
	}
}

// Minimal copies what answering q takes and nothing else: no pod, no tag, none of
// what a registry can put into a descriptor besides the three parts that are
// signed. It shares no memory that can be changed with q. Rule must not be nil.
func (q Question) Minimal() Question {
	i, rule := q.Image, *q.Rule
	img := Image{
		Name:   Name{Host: strings.Clone(i.Name.Host), Path: strings.Clone(i.Name.Path)},
		Target: minimal(i.Target), Manifest: minimal(i.Manifest), Config: i.Config,
		Use: i.Use, Binding: i.Binding, LayersVerified: i.LayersVerified,
	}
	for _, o := range i.Related[:min(len(i.Related), MaxRelated)] {
		img.Related = append(img.Related, minimal(o))
	}
	return Question{Image: img, Rule: &rule}
}

func minimal(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// A Key is comparable and can key a map.
type Key struct {
	Target      Target
	Manifest    digest.Digest
	Config      digest.Digest
	Requirement [32]byte // its hash
}

// A Target is the part of a descriptor that a signature covers.
type Target struct {
	MediaType string
	Digest    digest.Digest
	Size      int64
}

func plain(d ocispec.Descriptor) Target { return Target{d.MediaType, d.Digest, d.Size} }

// bytes is an unambiguous form of k, for hashing.
func (k Key) bytes() []byte {
	b := make([]byte, 0, 512) // three digests and a media type
	for _, s := range [...]string{k.Target.MediaType, k.Target.Digest.String(), k.Manifest.String(), k.Config.String()} {
		b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = binary.BigEndian.AppendUint64(b, uint64(k.Target.Size))
	return append(b, k.Requirement[:]...)
}

// A Revision is the digest of every file that can change an answer. The zero
// Revision is that of no configuration.
type Revision [16]byte

// RevisionOf hashes parts that the caller has made unambiguous.
func RevisionOf(b []byte) (e Revision) {
	h := sha256.Sum256(b)
	copy(e[:], h[:])
	return e
}

// String is the revision in hex.
func (e Revision) String() string { return hex.EncodeToString(e[:]) }

// A Mode says what becomes of a denial. The zero Mode enforces.
type Mode uint8

const (
	Enforce Mode = iota
	Audit        // the denial is recorded and the container starts
)

// String is the mode as config.yaml spells it.
func (m Mode) String() string {
	if m == Audit {
		return "audit"
	}
	return "enforce"
}

// A Policy selects rules. It does not change, does no I/O, reads no clock, and
// is asked for every container.
type Policy interface {
	Select(Image) *Rule // never nil: what nothing matches gets a rule that denies
}

// A Rule is what a policy asks of the images that it matches. Exactly one of
// Fixed and Require is set; the zero Rule denies with POLICY_INVALID.
type Rule struct {
	Name    string
	Fixed   Reason        // asks for no evidence: POLICY_NO_MATCH, POLICY_INVALID or ALLOWED_BY_DIGEST
	Detail  string        // with Fixed: one clause that says what to do
	Digest  digest.Digest // with ALLOWED_BY_DIGEST: the target, manifest or config that is listed
	Require *Requirement  // what evidence must show; nil is denied
}
