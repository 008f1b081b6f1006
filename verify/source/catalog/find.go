package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Lister hands documents over in the order in which they count, until yield returns
// false. The error says why that was not everything.
type Lister func(ctx context.Context, of Relation, d digest.Digest, anchors []string, yield func(Document) bool) error

var errLost = fmt.Errorf("%w, and it was not found elsewhere since", layout.ErrDamaged)

// A toll notes what could not be read.
type toll struct {
	whole map[digest.Digest]bool  // documents that were handed over
	bad   map[digest.Digest]error // others, of which nobody knows what they hold
	lost  func(Document)
}

func newToll(lost func(Document)) toll {
	return toll{map[digest.Digest]bool{}, map[digest.Digest]error{}, lost}
}

// damaged reports whether err says that a file is not what its descriptor says, or has
// gone.
func damaged(err error) bool {
	return errors.Is(err, layout.ErrDamaged) || errors.Is(err, fs.ErrNotExist)
}

// note notes that x could not be read.
func (t toll) note(x Document, err error) {
	if damaged(err) {
		t.lost(x)
		err = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	if layout.Inconclusive(err) && t.bad[x.Digest] == nil {
		t.bad[x.Digest] = err
	}
}

// err is the reason why something may be missing, if there is one.
func (t toll) err() error {
	for _, d := range slices.Sorted(maps.Keys(t.bad)) {
		if !t.whole[d] {
			return t.bad[d]
		}
	}
	return nil
}

// Find is [verify.Source]'s for the signatures that list hands over. A file that is
// damaged costs only itself: it is handed over with Err set, the answer is inconclusive,
// and lost is called. stopped: yield wanted no more.
func Find(ctx context.Context, list Lister, subject ocispec.Descriptor, b *verify.Budget, lost func(Document), yield func(verify.Evidence) bool) (stopped bool, err error) {
	var spent error
	toll := newToll(lost)
	if b.Kind == nil {
		return false, evidence.ErrKind
	}
	err = list(ctx, Signatures, subject.Digest, b.Anchors, func(x Document) bool {
		if toll.whole[x.Digest] || x.Kind != b.Kind.Name() {
			return true
		}
		if spent = b.Signature(); spent != nil {
			return false
		}
		ev := verify.Evidence{Manifest: x.Descriptor}
		if x.Archive != "" {
			ev.From = "evidence archive " + text.Clean(x.Archive, 80)
		}
		err := errLost
		if !x.Lost {
			err = x.signature(ctx, &ev, subject, b)
		}
		if err != nil {
			toll.note(x, err)
			ev.Err = fmt.Errorf("signature %s: %w", x.Digest, err)
		}
		toll.whole[x.Digest] = ev.Err == nil
		stopped = !yield(ev)
		return !stopped
	})
	return stopped, cmp.Or(spent, err, toll.err())
}

// signature reads manifest and envelope of the signature x into ev.
func (x Document) signature(ctx context.Context, ev *verify.Evidence, subject ocispec.Descriptor, b *verify.Budget) error {
	raw, err := x.get(ctx, x.Descriptor, b.Manifest)
	if err != nil {
		return err
	}
	return ev.Fill(b.Kind, raw, subject, func(d ocispec.Descriptor) ([]byte, error) {
		if x.Envelope >= 0 && x.Envelope != d.Size {
			return nil, fmt.Errorf("%w: the envelope has %d bytes, but its descriptor says %d", layout.ErrDamaged, x.Envelope, d.Size)
		}
		return x.get(ctx, d, b.Envelope)
	})
}

// get reads a file of where x lies.
func (x Document) get(ctx context.Context, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	raw, err := x.Read(ctx, d, take)
	if err != nil && x.Archive != "" {
		err = fmt.Errorf("evidence archive %s: %w", text.Quote(x.Archive, 80), err)
	}
	return raw, err
}

// Parents is [verify.WritableSource]'s for the documents that list hands over; lost and stopped
// are as those of [Find].
func Parents(ctx context.Context, list Lister, d digest.Digest, b *verify.Budget, lost func(Document), yield func(digest.Digest, []byte) bool) (stopped bool, err error) {
	var spent error
	toll := newToll(lost)
	err = list(ctx, Namers, d, b.Anchors, func(x Document) bool {
		if toll.whole[x.Digest] {
			return true
		}
		if spent = b.Page(); spent != nil {
			return false
		}
		raw, err := x.get(ctx, x.Descriptor, b.Manifest)
		if toll.whole[x.Digest] = err == nil; err != nil {
			toll.note(x, err)
			return true
		}
		stopped = !yield(x.Digest, raw)
		return !stopped
	})
	return stopped, cmp.Or(spent, err, toll.err())
}
