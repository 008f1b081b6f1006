package store

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

// maxReads bounds the files of one place that are read at once. Each that hangs
// keeps a thread.
const maxReads = 4

var (
	errHangs = fmt.Errorf("%w: the disk does not answer", verify.ErrUnreachable)
	errLeft  = fmt.Errorf("%w: it was replaced or removed meanwhile", verify.ErrUnreachable)
)

// A place is an open layout that questions read from: the store itself, or a bundle.
// Nobody can interrupt a read, and where a disk dies, or the medium was pulled out,
// it may never end. So another goroutine reads, and who asks waits for at most the
// patience. From then until that read ends after all, the place is not read from.
type place struct {
	blob  func(ocispec.Descriptor) ([]byte, error)
	end   func() error  // closes it; may be nil
	turns chan struct{} // one for each read under way

	mu    sync.Mutex
	users int  // reads under way
	hung  int  // of these, those that nobody waits for any more
	over  bool // nobody else may read
}

func newPlace(dir *layout.Dir, end func() error) *place {
	return &place{
		blob: func(d ocispec.Descriptor) ([]byte, error) {
			return dir.Blob(d, func(int64) error { return nil })
		},
		end: end, turns: make(chan struct{}, maxReads),
	}
}

// read returns the file that d describes, after take, told its size, has agreed. It is
// what its digest says. Errors are those of layout.Dir.
func (p *place) read(ctx context.Context, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	if err := take(d.Size); err != nil {
		return nil, err
	}
	if p.hangs() {
		return nil, errHangs
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case p.turns <- struct{}{}:
	case <-timer.C:
		return nil, errHangs
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
	}
	if !p.enter() {
		<-p.turns
		return nil, errLeft
	}
	type result struct {
		raw []byte
		err error
	}
	done := make(chan result, 1)
	var left bool // guarded by p.mu: nobody waits
	go func() {
		var r result
		defer func() {
			if e := recover(); e != nil {
				r = result{nil, fmt.Errorf("%w: panic: %v", verify.ErrUnreachable, e)}
			}
			done <- r
			p.leave(&left)
			<-p.turns
		}()
		r.raw, r.err = p.blob(d)
	}()
	select {
	case r := <-done:
		return r.raw, r.err
	case <-timer.C:
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case r := <-done: // in the last moment
		return r.raw, r.err
	default:
	}
	left = true
	p.hung++
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(errHangs, err)
	}
	return nil, errHangs
}

// hangs reports whether a read does not end.
func (p *place) hangs() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hung > 0
}

func (p *place) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		p.users++
	}
	return !p.over
}

// leave ends a read.
func (p *place) leave(left *bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users--; *left {
		p.hung--
	}
	if p.over && p.users == 0 {
		p.shut()
	}
}

// close has nobody read from p any more, and closes it when those who do have ended.
// p may be nil.
func (p *place) close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	if p.over = true; p.users == 0 {
		p.shut()
	}
}

// shut closes it, once. That, too, may never end where the file system answers for it
// (NFS, FUSE), and who calls holds locks: so one goroutine of each place does it, which
// like a read that hangs nobody waits for. A disk that is silent by then gives no
// further place that could be closed.
func (p *place) shut() {
	if p.end != nil {
		go p.end() // an error says nothing: it was only read
	}
}
