package archive

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
)

// kind is the evidence that archives are made of.
var kind = notary.Kind

// An Evaluator knows the policy of a node.
type Evaluator struct {
	Name       string   // of the policy, for people
	Statements []string // those that have signatures verified, by name
	Engine     *verify.Engine
	Setup      *verify.Snapshot
	Now        func() time.Time
	Platform   func(ocispec.Platform) bool // whether the node runs images for that
}

// signature says under which statements of the policy ev is a signature of subject,
// and where it is under none, what is said of it by the statement under which it came
// furthest.
func (e *Evaluator) signature(ctx context.Context, ev verify.Evidence, subject ocispec.Descriptor) (under []string, reason verify.Reason, detail string) {
	furthest := -1
	for _, s := range e.Statements {
		f := e.Engine.Check(ctx, ev, subject, verify.Leaf{Kind: kind.Name(), Authority: s})
		if f.Reason == verify.Verified {
			under = append(under, s)
		} else if n := progress(f.Reason); n > furthest {
			furthest, reason, detail = n, f.Reason, f.Detail
		}
	}
	if len(under) > 0 {
		return under, verify.Verified, ""
	}
	return nil, reason, detail
}

// progress orders what a check says by how far the signature came.
func progress(r verify.Reason) int {
	switch r {
	case verify.SignatureInvalid, verify.LimitExceeded, verify.Internal, verify.PolicyInvalid:
		return 0
	case verify.SignerUntrusted:
		return 1
	case verify.IdentityMismatch:
		return 2
	}
	return 3
}
