package daemon

import (
	"context"
	"time"
)

// count corrects the tally.
func (d *daemon) count(ctx context.Context) {
	if _, err := d.tally.Large(ctx); err != nil && ctx.Err() == nil {
		d.log.Warn("what there is could not be counted", "error", err.Error())
	}
}

// Bounds of recount.
const (
	countTime  = 30 * time.Second // longest that it may take
	countPause = 10 * time.Second // between two
)

// recount counts when again asks for it, until ctx ends. A sweep counts too, but it may
// wait for verifications for long, and until there is room the tally refuses everything.
func recount(ctx context.Context, again <-chan struct{}, count func(context.Context)) {
	for ctx.Err() == nil {
		select {
		case <-again:
		case <-ctx.Done():
			return
		}
		once, cancel := context.WithTimeout(ctx, countTime)
		count(once)
		cancel()
		select {
		case <-time.After(countPause):
		case <-ctx.Done():
		}
	}
}
