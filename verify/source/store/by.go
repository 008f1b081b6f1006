package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
)

// FindBy hands to yield each signature of subject that the store itself has and that may
// be by the certificate with the SHA-256 thumbprint leaf, in hex. Unlike [Store.Find] it
// does not end with one budget: budget is called for each signature, which is read from
// what that returns. If there are more than most, it hands over none and returns an error
// that wraps [verify.ErrBudget]. The error says that what the store has is not known; a
// signature that is damaged or beyond its budget is handed over with Err set, and is none.
// It is safe for concurrent use.
func (s *Store) FindBy(ctx context.Context, subject ocispec.Descriptor, leaf string, most int, budget func() *verify.Budget, yield func(verify.Evidence)) error {
	if err := s.start.Wait(ctx); err != nil {
		return err
	}
	list, err := s.own(catalog.Signatures, subject.Digest, nil)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(x catalog.Document) bool { return x.Lost || !x.MayBeBy(leaf) })
	if len(list) > most {
		return fmt.Errorf("%w: %d signatures of %s in the store may be by one certificate, limit %d", verify.ErrBudget, len(list), subject.Digest, most)
	}
	for _, x := range list {
		one := func(_ context.Context, _ catalog.Relation, _ digest.Digest, _ []string, yield func(catalog.Document) bool) error {
			yield(x)
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		_, _ = catalog.Find(ctx, one, subject, budget(), s.lost, func(ev verify.Evidence) bool {
			yield(ev)
			return true
		})
	}
	return nil
}
