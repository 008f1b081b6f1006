package catalog

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// ErrUnread is said of what was not read yet.
var ErrUnread = fmt.Errorf("%w: it is still being read, or its disk does not answer", verify.ErrUnreachable)

// A Start is closed when something was read for the first time. It is safe for
// concurrent use.
type Start struct {
	done   chan struct{}
	waited atomic.Bool
}

// NewStart returns one that has yet to come.
func NewStart() *Start { return &Start{done: make(chan struct{})} }

// Done is called once, when it was read or could not be.
func (s *Start) Done() { close(s.done) }

// Read is closed then.
func (s *Start) Read() <-chan struct{} { return s.done }

// Wait waits for that. It waits once for all: if a caller has waited in vain, later ones
// do not wait.
func (s *Start) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	select {
	case <-s.done:
		return nil
	default:
	}
	if !s.waited.Load() {
		t := time.NewTimer(Patience)
		defer t.Stop()
		select {
		case <-s.done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
		case <-t.C:
			s.waited.Store(true)
		}
	}
	return fmt.Errorf("%w: it is still being read", verify.ErrUnreachable)
}

// Late reports whether a caller has waited in vain, and it still was not read.
func (s *Start) Late() bool {
	select {
	case <-s.done:
		return false
	default:
		return s.waited.Load()
	}
}
