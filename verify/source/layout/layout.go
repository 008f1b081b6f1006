// Package layout finds signatures in an OCI image layout, a directory or an
// uncompressed tar file: an archive on a USB stick, what `oras copy --to-oci-layout`,
// `ctr images export` or `docker save` wrote, a
// directory that configuration management keeps up to date.
//
// Every question looks whether it has changed, so that new signatures count at once, and
// nothing in it is ever written: read-only media work. A catalog, bounded in memory, says
// which documents may be signatures of an image, so that a layout may have many. Nothing in it is trusted.
// Every blob is checked against its digest and size, everything read is counted
// against the budget of the question, and no file outside the directory is opened,
// whatever links lie in it. Of a tar file only where its files lie is remembered,
// for as long as it does not change; what it holds of layers is never read.
//
// The format is that of image-spec v1.1, image-layout.md.
package layout

import (
	"context"
	_ "crypto/sha256" // digests of the subjects and blobs
	_ "crypto/sha512"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// maxDepth is how many indexes deep a signature may lie below index.json.
// Signatures lie at the first level, or at the second below a referrers tag.
const maxDepth = 4

// A Source is one layout. It holds no open file, and is safe for concurrent use.
type Source struct {
	path string
	turn chan struct{} // filled by who opens it, so that one at a time scans a tar file
	tar  *Tar          // that was scanned last; nil: none
	hung atomic.Int32  // reads that nobody waits for any more

	room     *Room
	build    chan struct{}       // filled by who uses the catalog
	catalogs map[string]*catalog // by the kind of evidence

	do func(context.Context, string, *Tar) (*Dir, error)
}

var _ verify.Source = (*Source)(nil)

// New is [Room.New] in a room of its own, without a clock.
func New(path string) *Source { return new(Room).New(path) }

// Name implements [verify.Source].
func (s *Source) Name() string { return "layout " + s.path }

// Find implements [verify.Source]. Signatures that a referrers tag of the
// subject lists (distribution-spec v1.1, "Referrers Tag Schema") come first,
// then those among the other manifests that index.json leads to.
//
// A manifest that is missing, or that is not what its digest says, hides nothing else; it
// is handed over with Err set if a referrers tag says that it is a signature of the
// subject. What could be a signature and was not looked at makes Find end with an error:
// a file could not be read, the budget did not allow it, or it is missing although
// index.json or a referrers tag names it, an entry calls it a signature, or a signature
// needs it. Manifests that only the index of an image lists may be missing: they are of
// other platforms.
//
// Where a read does not end Find ends with ctx, and soon says so at once until
// it ends after all.
func (s *Source) Find(ctx context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	if err := subject.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: subject %q: %w", verify.ErrUnreachable, subject.Digest, err)
	}
	if b.Kind == nil {
		return evidence.ErrKind
	}
	if s.hung.Load() > 0 {
		return errHangs
	}
	ctx, cancel := context.WithCancel(ctx) // ends also where yield panics
	defer cancel()
	budget := *b
	found, more := make(chan verify.Evidence), make(chan bool, 1) // of which nobody may take the last
	done := make(chan any, 1)                                     // an error, nil, or what it panicked with
	go func() {
		var end any
		defer func() {
			if p := recover(); p != nil {
				end = p
			}
			done <- end
		}()
		end = s.find(ctx, subject, &budget, func(ev verify.Evidence) bool {
			select {
			case found <- ev:
			case <-ctx.Done():
				return false
			}
			select {
			case ok := <-more:
				return ok
			case <-ctx.Done():
				return false
			}
		})
	}()
	for {
		select {
		case ev := <-found:
			more <- yield(ev)
		case end := <-done:
			*b = budget
			if err, ok := end.(error); ok || end == nil {
				return err
			}
			panic(end)
		case <-ctx.Done():
			go s.left(done)
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
		}
	}
}

// left waits for the end of a read that nobody else waits for. One that ends soon does
// not hang.
func (s *Source) left(done <-chan any) {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		s.hung.Add(1)
		<-done
		s.hung.Add(-1)
	}
}

const patience = time.Second

// errHangs is what is said of a layout on a disk of which a read does not end.
var errHangs = fmt.Errorf("%w: the disk does not answer", verify.ErrUnreachable)

// find is Find by a goroutine of its own: nobody can interrupt a read, and where a disk
// dies, or the medium was pulled out, it may never end. Whoever asks must not wait for
// that, since few do for the whole node.
func (s *Source) find(ctx context.Context, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	l, err := s.open(ctx, b)
	if err != nil {
		return err
	}
	defer l.dir.Close()
	w := &walk{layout: l, subject: subject, yield: yield, seen: map[verify.Target]bool{}}
	w.run(ctx, func(have int, first bool) (found, error) {
		return s.look(ctx, l.dir, b.Kind, subject.Digest, have, first)
	})
	return w.failed
}

// Manifest returns the image manifest or index of the layout that has digest d,
// with its bytes, at most 4 MiB. The bytes have been checked against d; size and
// media type in the descriptor are theirs. It need not be named in index.json.
//
// The error wraps [oci.ErrAmbiguous] if the document is not plainly one or the other,
// wraps one of the errors that [verify.Source] speaks of if it was not found out
// what the layout holds, and else [fs.ErrNotExist]: the layout does not hold it.
func (s *Source) Manifest(ctx context.Context, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	var none ocispec.Descriptor
	if err := d.Validate(); err != nil {
		return none, nil, fmt.Errorf("digest %q: %w", d, err)
	}
	if err := ctx.Err(); err != nil {
		return none, nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	b := verify.NewBudget(nil, verify.Limits{})
	l, err := s.open(ctx, b)
	if err != nil {
		return none, nil, err
	}
	defer l.dir.Close()
	listed := ""
	err = l.dir.each(func(e oci.Entry) bool {
		if e.Err == nil && e.Digest == d {
			listed = e.MediaType
		}
		return true
	})
	if err != nil {
		return none, nil, err
	}
	raw, err := l.dir.Read(BlobPath(d), func(n int64) error { return b.Manifest(n) })
	if err != nil {
		return none, nil, err
	}
	if d.Algorithm().FromBytes(raw) != d {
		return none, nil, fmt.Errorf("%w: %s is not what its digest says", verify.ErrUnreachable, BlobPath(d))
	}
	mediaType, err := oci.MediaTypeOf(raw, listed)
	if err != nil {
		return none, nil, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}, raw, nil
}

// A layout is one that is open.
type layout struct {
	dir *Dir
	b   *verify.Budget
}

// dir opens the layout.
func (s *Source) dir(ctx context.Context) (*Dir, error) {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
	}
	defer func() { <-s.turn }()
	dir, err := s.do(ctx, s.path, s.tar)
	if err == nil && dir.Tar() != s.tar {
		s.room.give(costFile * int64(s.tar.Files()))
		if s.tar = dir.Tar(); !s.room.take(costFile * int64(s.tar.Files())) {
			s.tar = nil
		}
	}
	return dir, err
}

// open opens the layout.
func (s *Source) open(ctx context.Context, b *verify.Budget) (*layout, error) {
	dir, err := s.dir(ctx)
	if err != nil {
		return nil, err
	}
	if err := dir.version(b.Manifest); err != nil {
		dir.Close()
		return nil, err
	}
	return &layout{dir, b}, nil
}

// unreachable makes err, which kept the whole layout from being read, one of
// those that verify.Source speaks of.
func unreachable(err error) error {
	if Inconclusive(err) {
		return err
	}
	return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
}
