package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/nri/tally"
)

const (
	maxCleared    = 8                // pods that one Clear takes away, and that it fails to
	clearTimeout  = 20 * time.Second // longest that one of them may take
	maxClearTries = 5                // for one pod, before it is left to a person
	maxClearable  = 1024             // pods that are looked at in one Clear
)

// Sandboxes are the pods of the node's runtime. [containerd.Containerd] implements it.
type Sandboxes interface {
	tally.Records
	// RemoveSandbox stops and removes a pod that has no containers.
	RemoveSandbox(ctx context.Context, id string) error
}

// A Clearer takes away pods without containers that are longer than a gate allows: they
// came while there was none, and keep the next one from registering. All fields are
// required. It is safe for concurrent use.
type Clearer struct {
	Sandboxes Sandboxes
	May       func() bool // asked before each pod whether pods may be taken away
	Log       *slog.Logger

	mu    sync.Mutex     // held by Clear
	tries map[string]int // that failed, by ID of a pod that is still there
}

// Clear takes away at most eight pods, through CRI, logs each, and returns how many. A pod
// that has a container, also one that ended, is left alone, and so is every pod if a record
// cannot be read. One that cannot be taken away does not keep the others: it goes last the
// next time, and after five times it is left to a person. The error names such pods.
//
// It must not run while the gate registers: containerd has hung over pods that were
// removed meanwhile and had a container after all.
func (c *Clearer) Clear(ctx context.Context) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	found, err := c.find(ctx)
	if err != nil {
		return 0, err
	}
	var failed []error
	for _, p := range found {
		if n == maxCleared || len(failed) == maxCleared || ctx.Err() != nil || !c.May() {
			break
		}
		remove, cancel := context.WithTimeout(ctx, clearTimeout)
		err := c.Sandboxes.RemoveSandbox(remove, p.Pod)
		cancel()
		if err == nil {
			n++
			delete(c.tries, p.Pod)
			c.Log.Warn("took away a pod without containers: it is longer than a pod may be, came while there was no gate, and kept the gate from registering",
				"pod", p.Text, "sandbox", p.Pod, "KiB", p.Size>>10)
			continue
		}
		failed = append(failed, fmt.Errorf("%s (%s): %w", p.Text, p.Pod, err))
		if ctx.Err() != nil {
			break // the next try may have more time
		}
		if c.tries[p.Pod]++; c.tries[p.Pod] == maxClearTries {
			c.Log.Error("a pod that keeps the gate from registering cannot be taken away, and is not tried again: delete it",
				"pod", p.Text, "sandbox", p.Pod, "tries", maxClearTries, "error", err.Error())
		}
	}
	return n, errors.Join(failed...)
}

// find returns the pods that are to be taken away, those that were tried least often first.
func (c *Clearer) find(ctx context.Context) (found []tally.Length, err error) {
	full := map[string]bool{} // pods that have a container
	there := map[string]int{} // c.tries of those that are there
	unread := false
	err = c.Sandboxes.Lengths(ctx, func(l tally.Length) {
		if !l.Sandbox {
			full[l.Pod] = true
			unread = unread || l.Pod == ""
			return
		}
		// A pod that the gate would have let in counts for no more.
		if l.Size <= tally.MaxSandbox {
			return
		}
		tries := c.tries[l.Pod]
		if tries > 0 {
			there[l.Pod] = tries
		}
		if tries < maxClearTries && len(found) < maxClearable {
			found = append(found, l)
		}
	})
	if unread || errors.Is(err, tally.ErrRecord) {
		return nil, errors.New("not all containers can be read, so that no pod is known to have none")
	}
	if err != nil {
		return nil, err
	}
	c.tries = there
	found = slices.DeleteFunc(found, func(l tally.Length) bool { return full[l.Pod] })
	slices.SortStableFunc(found, func(a, b tally.Length) int { return cmp.Compare(c.tries[a.Pod], c.tries[b.Pod]) })
	return found, nil
}
