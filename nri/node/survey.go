package node

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A kinship says which targets lead to the same config: an image that was copied
// to another repository, or pushed again with another index around it, is signed
// where it came from. It is safe for concurrent use.
type kinship struct {
	mu   sync.Mutex
	from map[digest.Digest][]verify.Target
}

// maxKin bounds the targets that are remembered for one config: any pod author
// can add records, and those that were there first stay.
const maxKin = verify.MaxOthers + 2

func (k *kinship) add(config digest.Digest, t verify.Target) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.from == nil {
		k.from = map[digest.Digest][]verify.Target{}
	}
	if list := k.from[config]; len(list) < maxKin && !slices.Contains(list, t) {
		k.from[config] = append(list, t)
	}
}

func (k *kinship) remove(config digest.Digest, t verify.Target) {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := slices.DeleteFunc(k.from[config], func(o verify.Target) bool { return o == t })
	if len(list) == 0 {
		delete(k.from, config)
	} else {
		k.from[config] = list
	}
}

// of returns at most verify.MaxOthers targets that lead to config, without those
// of the given digests.
func (k *kinship) of(config digest.Digest, without ...digest.Digest) []ocispec.Descriptor {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []ocispec.Descriptor
	for _, t := range k.from[config] {
		if !slices.Contains(without, t.Digest) && len(list) < verify.MaxOthers {
			list = append(list, ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size})
		}
	}
	return list
}

// look asks for a survey, now or when the one under way has ended.
func (r *Resolver) look() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func plain(d ocispec.Descriptor) verify.Target {
	return verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// follow returns what target leads to.
func (r *Resolver) follow(ctx context.Context, target ocispec.Descriptor) (lead, error) {
	if c, ok := r.leads.Get(plain(target)); ok {
		return c, c.err()
	}
	defer r.look() // a new image: others may have come with it
	return r.learn(ctx, target)
}

// learn reads what target leads to. What follows from the content is remembered;
// what containerd could not answer is not.
func (r *Resolver) learn(ctx context.Context, target ocispec.Descriptor) (lead, error) {
	c, err := read(ctx, r.records.Blob, target)
	var fault *verify.Fault
	switch {
	case err == nil:
		r.kin.add(c.config, plain(target))
	case errors.As(err, &fault) && fault.Reason != verify.ImageMismatch: // the disk may be mended
		// It is kept, and what decoders say may repeat megabytes of the document.
		c = lead{fault: &verify.Fault{Reason: fault.Reason, Detail: verify.Clean(fault.Detail, verify.MaxMessage)}}
	default:
		return c, err
	}
	r.leads.Add(plain(target), c)
	return c, c.err()
}
