package catalog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// maxReads bounds the files of one reader that are read at once. Each that hangs
// keeps a thread.
const maxReads = 4

// Patience is the longest that a question waits for a disk.
const Patience = 2 * time.Second

// ErrHangs is said of what a disk that does not answer holds.
var (
	ErrHangs = fmt.Errorf("%w: the disk does not answer", verify.ErrUnreachable)
	errLeft  = fmt.Errorf("%w: it was replaced or removed meanwhile", verify.ErrUnreachable)
)

// A Reader is an open layout that questions read from: the store, or an archive.
// Nobody can interrupt a read, and where a disk dies, or the medium was pulled out,
// it may never end. So another goroutine reads, and who asks waits for at most the
// Patience. From then until that read ends after all, the reader is not read from.
type Reader struct {
	Blob  func(ocispec.Descriptor) ([]byte, error) // reads it; like End it is set before the first read
	End   func() error                             // closes it; may be nil
	turns chan struct{}                            // one for each read under way

	mu    sync.Mutex
	users int  // reads under way
	hung  int  // of these, those that nobody waits for any more
	over  bool // nobody else may read
}

// NewReader returns a reader of dir that calls end, which may be nil, when it is closed and
// nobody reads any more.
func NewReader(dir *layout.Dir, end func() error) *Reader {
	return &Reader{
		Blob: func(d ocispec.Descriptor) ([]byte, error) {
			return dir.Blob(d, func(int64) error { return nil })
		},
		End: end, turns: make(chan struct{}, maxReads),
	}
}

// Read returns the file that d describes, after take, told its size, has agreed. It is
// what its digest says. Errors are those of layout.Dir.
func (r *Reader) Read(ctx context.Context, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	if err := take(d.Size); err != nil {
		return nil, err
	}
	if r.Hangs() {
		return nil, ErrHangs
	}
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case r.turns <- struct{}{}:
	case <-timer.C:
		return nil, ErrHangs
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
	}
	if !r.enter() {
		<-r.turns
		return nil, errLeft
	}
	type answer struct {
		raw []byte
		err error
	}
	done := make(chan answer, 1)
	var left bool // guarded by r.mu: nobody waits
	go func() {
		var a answer
		defer func() {
			if e := recover(); e != nil {
				a = answer{nil, fmt.Errorf("%w: panic: %v", verify.ErrUnreachable, e)}
			}
			done <- a
			r.leave(&left)
			<-r.turns
		}()
		a.raw, a.err = r.Blob(d)
	}()
	select {
	case a := <-done:
		return a.raw, a.err
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case a := <-done: // in the last moment
		return a.raw, a.err
	default:
	}
	left = true
	r.hung++
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(ErrHangs, err)
	}
	return nil, ErrHangs
}

// Hangs reports whether a read does not end.
func (r *Reader) Hangs() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hung > 0
}

func (r *Reader) enter() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.users++
	}
	return !r.over
}

// leave ends a read.
func (r *Reader) leave(left *bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.users--; *left {
		r.hung--
	}
	if r.over && r.users == 0 {
		r.shut()
	}
}

// Close has nobody read from p any more, and closes it when those who do have ended.
// r may be nil.
func (r *Reader) Close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return
	}
	if r.over = true; r.users == 0 {
		r.shut()
	}
}

// shut closes it, once. That, too, may never end where the file system answers for it
// (NFS, FUSE), and who calls holds locks: so one goroutine of each reader does it, which
// like a read that hangs nobody waits for. A disk that is silent by then gives no
// further reader that could be closed.
func (r *Reader) shut() {
	if r.End != nil {
		go r.End() // an error says nothing: it was only read
	}
}
