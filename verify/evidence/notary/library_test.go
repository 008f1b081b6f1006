package notary

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// altered is the library with another outcome.
type altered struct {
	notation.Verifier
	change func(*notation.VerificationOutcome, *error) *notation.VerificationOutcome
}

func (a altered) Verify(ctx context.Context, desc ocispec.Descriptor, blob []byte, o notation.VerifierVerifyOptions) (*notation.VerificationOutcome, error) {
	out, err := a.Verifier.Verify(ctx, desc, blob, o)
	out = a.change(out, &err)
	return out, err
}

// TestLibraryThatIsLax: a nil error of the library is not enough. Each check that a
// yes rests on must be among its results once, enforced and passed, and what it
// verified must be what was opened.
func TestLibraryThatIsLax(t *testing.T) {
	type outcome = notation.VerificationOutcome
	without := func(check trustpolicy.ValidationType) func(*outcome, *error) *outcome {
		return func(o *outcome, _ *error) *outcome {
			var kept []*notation.ValidationResult
			for _, r := range o.VerificationResults {
				if r.Type != check {
					kept = append(kept, r)
				}
			}
			o.VerificationResults = kept
			return o
		}
	}
	each := func(check trustpolicy.ValidationType, change func(*notation.ValidationResult)) func(*outcome, *error) *outcome {
		return func(o *outcome, _ *error) *outcome {
			for _, r := range o.VerificationResults {
				if r.Type == check {
					change(r)
				}
			}
			return o
		}
	}
	twice := func(check trustpolicy.ValidationType) func(*outcome, *error) *outcome {
		return func(o *outcome, _ *error) *outcome {
			for _, r := range o.VerificationResults {
				if r.Type == check {
					o.VerificationResults = append(o.VerificationResults, r)
					break
				}
			}
			return o
		}
	}
	logged := func(r *notation.ValidationResult) { r.Action = trustpolicy.ActionLog }
	skipped := func(r *notation.ValidationResult) { r.Action = trustpolicy.ActionSkip }
	failed := func(r *notation.ValidationResult) { r.Error = errors.New("as told") }
	const integrity, authenticity = trustpolicy.TypeIntegrity, trustpolicy.TypeAuthenticity
	for name, tt := range map[string]struct {
		change func(*outcome, *error) *outcome
		want   verify.Reason
	}{
		"as it is":                 {func(o *outcome, _ *error) *outcome { return o }, verify.Verified},
		"no result":                {func(*outcome, *error) *outcome { return nil }, verify.Internal},
		"an empty result":          {func(*outcome, *error) *outcome { return &outcome{} }, verify.Internal},
		"no integrity":             {without(integrity), verify.Internal},
		"integrity only logged":    {each(integrity, logged), verify.Internal},
		"integrity skipped":        {each(integrity, skipped), verify.Internal},
		"integrity twice":          {twice(integrity), verify.Internal},
		"integrity failed":         {each(integrity, failed), verify.SignatureInvalid},
		"no authenticity":          {without(authenticity), verify.Internal},
		"authenticity only logged": {each(authenticity, logged), verify.Internal},
		"authenticity skipped":     {each(authenticity, skipped), verify.Internal},
		"authenticity twice":       {twice(authenticity), verify.Internal},
		"identity failed":          {each(authenticity, failed), verify.IdentityMismatch},
		"authenticity failed": {each(authenticity, func(r *notation.ValidationResult) {
			r.Error = &signature.SignatureAuthenticityError{}
		}), verify.SignerUntrusted},
		"no content": {func(o *outcome, _ *error) *outcome { o.EnvelopeContent = nil; return o }, verify.Internal},
		"another payload": {func(o *outcome, _ *error) *outcome {
			o.EnvelopeContent.Payload.Content = append(bytes.Clone(o.EnvelopeContent.Payload.Content), ' ')
			return o
		}, verify.SignatureInvalid},
		"another chain": {func(o *outcome, _ *error) *outcome {
			o.EnvelopeContent.SignerInfo.CertificateChain = mallory.Chain
			return o
		}, verify.SignatureInvalid},
		"a shorter chain": {func(o *outcome, _ *error) *outcome {
			o.EnvelopeContent.SignerInfo.CertificateChain = signer.Chain[:2]
			return o
		}, verify.SignatureInvalid},
		"an error beside":         {func(o *outcome, err *error) *outcome { *err = errors.New("as told"); return o }, verify.SignatureInvalid},
		"an error in the outcome": {func(o *outcome, _ *error) *outcome { o.Error = errors.New("as told"); return o }, verify.SignatureInvalid},
		"panic":                   {func(*outcome, *error) *outcome { panic("as told") }, verify.SignatureInvalid},
	} {
		for _, m := range formats {
			c := newChecker(t, acmeStore(t), noon, notarytest.Statement("prod", acmeIdentity))
			c.statements["prod"].library = altered{c.statements["prod"].library, tt.change}
			f := check(c, m, notarytest.MustSign(signer, image, notarytest.SignOptions{MediaType: m}), image)
			if f.Reason != tt.want || (f.Signed != "") != (tt.want == verify.Verified) {
				t.Errorf("%s, %s: %s (%s), want %s", name, m, f.Reason, f.Detail, tt.want)
			}
		}
	}
}
