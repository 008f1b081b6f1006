// Package verify decides whether an image may run on this node.
//
// An [Image] is what the runtime says it is about to run, bound to content. A
// [Policy] selects the one [Rule] that speaks of it; that step is pure. A
// [Judge] answers the [Question] that the two make: the cache where it knows,
// else the [Engine], from [Evidence] that each [Source] finds and a [Checker]
// checks. An [Enforcer] puts them together and is what the gate asks.
//
// # Why it stays closed
//
// The zero [Decision] denies. Two functions can let an image run: allow, which
// looks once more at all that it rests on, and audit, which is applied last and
// only where the configuration says so. Errors and panics become denials with a
// [Reason]. Nothing here reads a clock, a file or a network of its own.
//
// The package imports the standard library, go-digest and image-spec, and
// nothing else; its children import it and it imports none of them.
package verify

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
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

// A Judge answers questions. The cache and the Engine behind it are Judges. The
// contract is Verifier's.
type Judge interface {
	Judge(ctx context.Context, q Question) Decision
}

// A Question is an image together with what the policy in force asks of it.
type Question struct {
	Image Image
	Rule  *Rule
}

// Key names the question: questions with equal keys have the same answer until
// it ends. It holds no tag, pod or namespace, so that a thousand pods share one
// and no pod author can spoil another's.
func (q Question) Key() Key {
	k := Key{Target: plain(q.Image.Target), Manifest: q.Image.Manifest.Digest, Config: q.Image.Config}
	if q.Rule != nil {
		k.Requirement = q.Rule.Requirement
	}
	return k
}

// Unfit says why the answer is no whatever signatures there are, or returns nil
// where they decide. Every Judge that remembers answers asks this first, since
// Key leaves out what it looks at.
func (q Question) Unfit() *Fault {
	if f := q.Image.unfit(); f != nil {
		return f
	}
	if r := q.Rule; r == nil || r.Settled != "" || r.Statement == "" || r.Requirement == [32]byte{} {
		return &Fault{PolicyInvalid, "the rule asks for no signature"}
	}
	return nil
}

// listed reports whether the rule names a digest of the image itself, which
// needs no signature then. Other targets of the same config do not count.
func (q Question) listed() bool {
	r, i := q.Rule, q.Image
	return r != nil && r.Settled == AllowedByDigest && r.Digest != "" &&
		(r.Digest == i.Target.Digest || r.Digest == i.Manifest.Digest || i.Vouched && r.Digest == i.Config)
}

// Takes reports whether d, an allow that answers a question of the same Key, also
// answers q: Key leaves out whether other targets of the same config count.
func (q Question) Takes(d Decision) bool {
	i := q.Image
	return i.Vouched || d.Signed != "" && (d.Signed == i.Target.Digest || d.Signed == i.Manifest.Digest)
}

// Bare copies what answering q takes and nothing else: no pod, no tag, none of
// what a registry can put into a descriptor besides the three parts that are
// signed. It shares no memory that can be changed with q. Rule must not be nil.
func (q Question) Bare() Question {
	i, rule := q.Image, *q.Rule
	img := Image{
		Name:   Name{Host: strings.Clone(i.Name.Host), Path: strings.Clone(i.Name.Path)},
		Target: bare(i.Target), Manifest: bare(i.Manifest), Config: i.Config,
		Use: i.Use, Binding: i.Binding, Vouched: i.Vouched,
	}
	for _, o := range i.Others[:min(len(i.Others), MaxOthers)] {
		img.Others = append(img.Others, bare(o))
	}
	return Question{img, &rule}
}

func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// A Key is comparable and can key a map.
type Key struct {
	Target      Target
	Manifest    digest.Digest
	Config      digest.Digest
	Requirement [32]byte // Rule.Requirement
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

// An Epoch is the digest of every file that can change an answer. The zero
// Epoch is that of no configuration.
type Epoch [16]byte

// EpochOf hashes parts that the caller has made unambiguous.
func EpochOf(b []byte) (e Epoch) {
	h := sha256.Sum256(b)
	copy(e[:], h[:])
	return e
}

// String is the epoch in hex.
func (e Epoch) String() string { return hex.EncodeToString(e[:]) }

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
// Settled and Statement is set; the zero Rule denies with POLICY_INVALID.
type Rule struct {
	Name        string
	Settled     Reason        // asks for no evidence: POLICY_NO_MATCH, POLICY_INVALID or ALLOWED_BY_DIGEST
	Detail      string        // with Settled: one clause that says what to do
	Digest      digest.Digest // with ALLOWED_BY_DIGEST: the target, manifest or config that is listed
	Statement   string        // name of the trust policy statement that a signature must meet
	Requirement [32]byte      // hash of that statement with its trust stores; zero is denied
}

// A Statement is one statement of a Notary Project trust policy as its author
// wrote it (trust-store-trust-policy.md, "OCI Trust Policy").
type Statement struct {
	Name              string
	Scopes            []string
	Level             string            // strict, permissive, audit or skip
	Override          map[string]string // check to action: enforce, log or skip
	VerifyTimestamp   string            // "", always or afterCertExpiry
	TrustStores       []string          // "ca:acme"
	TrustedIdentities []string          // "*" or "x509.subject: C=US, ..."
}
