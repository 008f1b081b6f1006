package bundle

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// A Judge knows the policy of a node.
type Judge struct {
	config *config.Config
	engine *verify.Engine
	setup  *verify.Setup
}

// NewJudge makes a Judge of c, with the clock that it is judged by.
func NewJudge(c *config.Config, now func() time.Time) (*Judge, error) {
	j := &Judge{config: c}
	var err error
	j.setup, err = c.Setup(func(e *verify.Engine) verify.Judge {
		j.engine = e
		return e
	}, now)
	return j, err
}

// signature says under which statements of the policy ev is a signature of subject,
// and where it is under none, what is said of it by the statement under which it came
// furthest.
func (j *Judge) signature(ctx context.Context, ev verify.Evidence, subject ocispec.Descriptor) (under []string, reason verify.Reason, detail string) {
	furthest := -1
	for _, s := range j.config.Statements {
		if s.Level == "skip" {
			continue
		}
		f := j.engine.Checker.Check(ctx, ev, subject, s.Name)
		if f.Reason == verify.Verified {
			under = append(under, s.Name)
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
	case verify.SignatureInvalid, verify.BudgetExceeded, verify.Internal, verify.PolicyInvalid:
		return 0
	case verify.SignerUntrusted:
		return 1
	case verify.IdentityMismatch:
		return 2
	}
	return 3
}

// rule is what the policy asks of an image of that name: of whoever signs under a
// statement, or nothing for the reason that is returned.
func (j *Judge) rule(name string) (statement string, settled verify.Reason, ok bool) {
	n, err := policy.ParseName(name)
	if err != nil || n.Host == "" {
		return "", "", false
	}
	r := j.setup.Policy.Select(verify.Image{Name: j.setup.Known(n), Use: verify.UseQuestion})
	return r.Statement, r.Settled, true
}
