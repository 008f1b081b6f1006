package containerd

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// related says which targets lead to the same config: an image that was copied
// to another repository, or pushed again with another index around it, is signed
// where it came from. It is safe for concurrent use.
type related struct {
	mu   sync.Mutex
	from map[digest.Digest][]verify.Target
}

// maxRelated bounds the targets that are remembered for one config: any pod author
// can add records, and those that were there first stay.
const maxRelated = verify.MaxRelated + 2

func (k *related) add(config digest.Digest, t verify.Target) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.from == nil {
		k.from = map[digest.Digest][]verify.Target{}
	}
	if list := k.from[config]; len(list) < maxRelated && !slices.Contains(list, t) {
		k.from[config] = append(list, t)
	}
}

func (k *related) remove(config digest.Digest, t verify.Target) {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := slices.DeleteFunc(k.from[config], func(o verify.Target) bool { return o == t })
	if len(list) == 0 {
		delete(k.from, config)
	} else {
		k.from[config] = list
	}
}

// of returns at most verify.MaxRelated targets that lead to config, without those
// of the given digests.
func (k *related) of(config digest.Digest, without ...digest.Digest) []ocispec.Descriptor {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []ocispec.Descriptor
	for _, t := range k.from[config] {
		if !slices.Contains(without, t.Digest) && len(list) < verify.MaxRelated {
			list = append(list, ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size})
		}
	}
	return list
}

// notify says that the images may be others.
func (r *Resolver) notify() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

func plain(d ocispec.Descriptor) verify.Target {
	return verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// follow returns what target leads to.
func (r *Resolver) follow(ctx context.Context, target ocispec.Descriptor) (resolution, error) {
	if c, ok := r.resolutions.Get(plain(target)); ok {
		return c, c.err()
	}
	defer r.notify() // a new image: others may have come with it
	return r.learn(ctx, target, unmarked{})
}

// unread returns what target leads to as follow does, but reads nothing of an image that
// was in hand when an earlier process died: what is known of it comes from a container
// that asked. What it reads it marks, since no one waits for it.
func (r *Resolver) unread(ctx context.Context, target ocispec.Descriptor) (resolution, error) {
	if c, ok := r.resolutions.Get(plain(target)); ok {
		return c, c.err()
	}
	marks := r.marked()
	if marks.Skips(target.Digest) {
		return resolution{}, &verify.Fault{Reason: verify.ImageUnresolved, Detail: "the image was in hand when an earlier process of the gate died; it is not read before a container asks for it"}
	}
	defer r.notify()
	return r.learn(ctx, target, marks)
}

// learn reads what target leads to, unless another question did while this one waited
// for its turn. What follows from the content is remembered; what containerd could not
// answer is not. marks note the image while it is read, and not while
// its turn is awaited: another image may end the process then.
func (r *Resolver) learn(ctx context.Context, target ocispec.Descriptor, marks Marks) (resolution, error) {
	give, err := r.take(ctx)
	if err != nil {
		return resolution{}, err
	}
	defer give()
	if c, ok := r.resolutions.Get(plain(target)); ok {
		return c, c.err()
	}
	defer marks.Hold(target.Digest)()
	c, err := read(ctx, r.records.Blob, target)
	var fault *verify.Fault
	switch {
	case err == nil:
		r.related.add(c.config, plain(target))
	case errors.As(err, &fault) && fault.Reason != verify.ImageMismatch: // the disk may be mended
		// It is kept, and what decoders say may repeat megabytes of the document.
		c = resolution{fault: &verify.Fault{Reason: fault.Reason, Detail: text.Clean(fault.Detail, verify.MaxMessage)}}
	default:
		return c, err
	}
	r.resolutions.Add(plain(target), c)
	return c, c.err()
}

// take waits for the turn to read the documents of an image, which take memory: one
// image has it at a time in the process, in the order in which they came. give ends the
// turn. If ctx ends before, the error is a PENDING fault that must not be remembered.
func (r *Resolver) take(ctx context.Context) (give func(), err error) {
	late := func() error {
		return &verify.Fault{Reason: verify.Pending, Detail: "the documents of another image are being read; the next try answers"}
	}
	if ctx.Err() != nil {
		return nil, late()
	}
	select {
	case r.turn <- struct{}{}:
		return func() { <-r.turn }, nil
	case <-ctx.Done():
		return nil, late()
	}
}
