package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// modest is the length up to which bodies are read side by side, in bytes. Almost all
// lists of referrers are shorter. Longer bodies are read one at a time in the process,
// since two at once would take memory that the daemon does not have.
const modest = 512 << 10

// The rate below which a body loses its turn to another that waits.
const (
	rateBytes    = modest
	rateInterval = time.Second
)

// Why a long body was not read to its end.
var (
	errYield  = errors.New("a long answer of a host that the configuration does not name made way for one of a host that it names")
	errSlow   = fmt.Errorf("a long answer came with less than %d KiB a second while another waited", rateBytes>>10)
	errNoTurn = errors.New("other long answers were read until the time of the question ended")
)

// A lane has one long body read at a time. A registry can send as slowly as it likes,
// and the author of a pod chooses which registries are asked. So the lane bounds the
// time for which one body can hold up another:
//
//   - A body of a named host takes the turn from one of another host at once, and is
//     read before all others that wait.
//   - Among equals, and if a named host has the turn and another named host waits, a body
//     loses the turn when fewer than rateBytes arrive in rateInterval. A body that no one
//     waits for may be slow.
//
// The question that loses the turn is inconclusive. The zero lane is ready. It is safe
// for concurrent use.
type lane struct {
	mu      sync.Mutex
	reads   *reader   // has the turn; nil: no one
	waiting []*reader // named ones first
}

// largeBodies is the lane of this process: its memory is what the lane bounds.
var largeBodies lane

// A reader is a body that may turn out to be long.
type reader struct {
	named    bool
	end      context.CancelCauseFunc // ends the request
	turn     chan struct{}           // is closed when it is this reader's turn
	received atomic.Int64            // bytes
}

// take waits until r has the turn, or ctx ends. In any case r is given back afterwards.
func (l *lane) take(ctx context.Context, r *reader) error {
	l.mu.Lock()
	if l.reads == nil {
		l.reads = r
		l.mu.Unlock()
		return nil
	}
	at := len(l.waiting)
	if r.named {
		if i := slices.IndexFunc(l.waiting, func(w *reader) bool { return !w.named }); i >= 0 {
			at = i
		}
		if !l.reads.named {
			l.reads.end(errYield)
		}
	}
	l.waiting = slices.Insert(l.waiting, at, r)
	holder := l.reads
	had := holder.received.Load()
	l.mu.Unlock()

	tick := time.NewTicker(rateInterval)
	defer tick.Stop()
	for {
		select {
		case <-r.turn:
			return nil
		case <-ctx.Done():
			return errNoTurn
		case <-tick.C:
			holder, had = l.watch(r, holder, had)
		}
	}
}

// watch ends the body that has the turn if that is holder, has had received since r
// looked last, is too slow, and is not one that r gives way to. It returns the holder now
// and how many bytes that has received.
func (l *lane) watch(r, holder *reader, had int64) (*reader, int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.reads
	n := now.received.Load() // it is not nil while r waits: give hands the turn over
	if now == holder && n-had < rateBytes && (r.named || !now.named) {
		now.end(errSlow)
	}
	return now, n
}

// give takes the turn or the place in the line back from r, if it has one.
func (l *lane) give(r *reader) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reads != r {
		l.waiting = slices.DeleteFunc(l.waiting, func(w *reader) bool { return w == r })
		return
	}
	if l.reads = nil; len(l.waiting) > 0 {
		l.reads = l.waiting[0]
		l.waiting = slices.Delete(l.waiting, 0, 1)
		close(l.reads.turn)
	}
}

// counted counts the bytes that are read.
type counted struct {
	io.Reader
	n *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// buffers holds the memory that a list was read into, for the next page: pages of 4 MiB
// that were left to the garbage collector took more memory than all else.
var buffers sync.Pool

// readAll reads at most most bytes, of which there are said to be length, or -1, and
// takes little more memory than that. Before it takes more than modest it calls large,
// which may return a buffer for most bytes to go on in.
func readAll(r io.Reader, length, most int64, large func() ([]byte, error)) ([]byte, error) {
	want := min(max(length, 32<<10)+1, most)
	if want > modest {
		want = modest
	}
	b := make([]byte, 0, want)
	for {
		if n := int64(cap(b)); int64(len(b)) == n && n < most {
			switch {
			case 2*n <= modest:
				n *= 2
			case n < modest:
				n = modest
			default:
				if n == modest {
					buffer, err := large()
					if err != nil {
						return nil, err
					}
					if int64(cap(buffer)) >= most {
						b = append(buffer[:0], b...)
						continue
					}
				}
				n = max(min(2*n, most), min(length+1, most))
			}
			b = append(make([]byte, 0, min(n, most)), b...)
		}
		if len(b) == cap(b) {
			return b, nil
		}
		n, err := r.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err == io.EOF {
			return b, nil
		} else if err != nil {
			return b, err
		}
	}
}
