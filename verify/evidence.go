package verify

import (
	"context"
	_ "crypto/sha256" // go-digest knows only the algorithms that are linked in,
	_ "crypto/sha512" // and panics when it is to hash with another
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/requirement"
)

// A Source finds signatures. It is safe for concurrent use.
type Source interface {
	// Name is what a Decision says: "layout /media/usb", "mirror https://10.0.0.5:5000".
	// It holds no credentials.
	Name() string

	// Find hands each signature of subject that the source holds to yield, until
	// yield returns false or b is spent. A signature that cannot be read is handed
	// over with Err set: it hides no other. The name in only says where to look.
	//
	// The error says what the source could not do and wraps one of ErrUnreachable,
	// ErrUnauthorized, ErrNoReferrers, ErrBudget. Nil means that it answered, also
	// when it had nothing: only then may anybody say SIGNATURE_MISSING.
	Find(ctx context.Context, in Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error
}

// A WritableSource is a Source that keeps what others found: the node's own store. What it
// holds is evidence and never a verdict. The Engine has it checked like any other,
// and a WritableSource that keeps nothing costs requests and changes no answer.
type WritableSource interface {
	Source

	// Keep is given evidence that verified for subject, which is one of img's. It
	// returns at once and keeps it later, or not at all. Nobody changes ev after.
	Keep(img Image, subject ocispec.Descriptor, ev Evidence)

	// Parents hands over documents that may name d, image indexes which list it and
	// image manifests whose config it is, until yield returns false or b is spent. The
	// caller believes neither digest nor bytes. The error says why there may be more.
	Parents(ctx context.Context, d digest.Digest, b *Budget, yield func(parent digest.Digest, raw []byte) bool) error
}

// A Holder is a Source that holds images too.
type Holder interface {
	Source

	// Holds is asked if Find found no signature. It returns nil if the source has image,
	// or, if listed (it listed referrers), has others of its repository. ErrAbsent says
	// that it has not: then it cannot know of signatures that exist.
	Holds(ctx context.Context, in Name, image ocispec.Descriptor, listed bool, b *Budget) error
}

// What a Source could not do. Anything else that it returns counts as ErrUnreachable.
var (
	ErrUnreachable  = errors.New("source did not answer")
	ErrUnauthorized = errors.New("source refused the credentials")
	ErrNoReferrers  = errors.New("source cannot serve referrers")
	ErrBudget       = evidence.ErrBudget
	ErrAbsent       = errors.New("source does not have the image")
)

// reasonOf translates what a Source returned.
func reasonOf(err error) Reason {
	switch {
	case errors.Is(err, ErrBudget):
		return LimitExceeded
	case errors.Is(err, ErrUnauthorized):
		return SourceUnauthorized
	case errors.Is(err, ErrNoReferrers), errors.Is(err, ErrAbsent):
		return SourceNoReferrers
	}
	return SourceUnreachable
}

// What is found, its kind and what it may cost; and what is asked of it.
type (
	Kind      = evidence.Kind
	Evidence  = evidence.Evidence
	Blob      = evidence.Blob
	Limits    = evidence.Limits
	Budget    = evidence.Budget
	Statement = evidence.Statement

	Requirement = requirement.Requirement
	Leaf        = requirement.Leaf
)

// SignedBy is the requirement of one leaf.
func SignedBy(l Leaf) (*Requirement, error) { return requirement.Require(requirement.SignedBy(l)) }

// DefaultLimits are the limits where a configuration is silent.
var DefaultLimits = evidence.DefaultLimits

// NewBudget returns a full budget for evidence of kind k; zero fields of l mean
// DefaultLimits.
func NewBudget(k Kind, l Limits) *Budget { return evidence.NewBudget(k, l) }

// A Checker checks evidence of one kind under the authorities of one configuration. It
// does not change, keeps nothing between calls and is safe for concurrent use.
type Checker interface {
	Kind() Kind

	// Check judges ev under an authority for exactly the descriptor want. Anything
	// but Finding.Reason == VERIFIED is a no.
	Check(ctx context.Context, ev Evidence, want ocispec.Descriptor, authority string) Finding

	// Anchors returns what Budget.Anchors is for an authority.
	Anchors(authority string) []string
}

// An Identity is who made a signature, as its kind tells them apart. The empty one is not
// known, and so is distinct from none.
type Identity string

// A Finding is what a Checker says of one piece of evidence. The zero Finding
// is INTERNAL. It allows nothing by itself.
type Finding struct {
	Reason   Reason
	Signed   digest.Digest // the descriptor digest that the envelope's payload names
	Signer   Signer
	Identity Identity          // within the kind: the root of the chain and the subject below it
	Key      [32]byte          // SHA-256 of the public key that signed; zero: not known
	Metadata map[string]string // annotations that are signed with it; see Decision.Metadata
	Warnings []Reason          // checks that failed and that the statement only logs
	Until    time.Time         // first end among what the answer rests on; zero: no end known, not kept
	Ends     string            // what it is that ends then: of a small set, "signature" or "certificate"
	Detail   string            // one clause for a person; no image name, no secret
}

// A Signer is an identity as the evidence proves it.
type Signer struct {
	Subject    string `json:"subject"`    // of the leaf certificate, RFC 4514
	Thumbprint string `json:"thumbprint"` // SHA-256 of the leaf certificate, hex
	Anchor     string `json:"anchor"`     // trust store entry that the chain reached, "ca:acme/root.crt"
}
