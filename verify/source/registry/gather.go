package registry

import (
	"context"
	"errors"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// What follows is for who carries evidence from a registry to a node, and for no
// gate.

// Referrers lists what the registry says refers to subject. Where artifactType is not
// empty, others may be left out. The error is one of those that [verify.Source]
// speaks of.
func (s *Source) Referrers(ctx context.Context, in verify.Name, subject ocispec.Descriptor, artifactType string, b *verify.Budget) ([]ocispec.Descriptor, error) {
	if err := subject.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: subject %s: %w", verify.ErrUnreachable, text.Quote(subject.Digest.String(), 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return nil, err
	}
	var all []ocispec.Descriptor
	err = x.through(ctx, subject.Digest, func() error {
		return x.list(ctx, subject, artifactType, b, nil, func(page []ocispec.Descriptor) error {
			for range page {
				if err := b.Referrer(); err != nil {
					return err
				}
			}
			all = append(all, page...)
			return nil
		})
	})
	if err != nil {
		return nil, x.redact(unanswered(err))
	}
	return all, nil
}

// Fetch reads the blob that d describes, or with manifest the manifest, and checks it
// against d. take is asked before.
func (s *Source) Fetch(ctx context.Context, in verify.Name, d ocispec.Descriptor, manifest bool, take func(int64) error) ([]byte, error) {
	x, err := s.exchange(in)
	if err != nil {
		return nil, err
	}
	var raw []byte
	err = x.through(ctx, d.Digest, func() (err error) {
		raw, err = x.content(ctx, d, take, manifest)
		return err
	})
	if err != nil && !errors.Is(err, verify.ErrBudget) {
		return nil, x.redact(err)
	}
	return raw, err
}
