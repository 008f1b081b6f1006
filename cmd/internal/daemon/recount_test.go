package daemon

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// What a tally asks for is counted soon, whatever else is under way, and not more often
// than every few seconds.
func TestRecount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		again, done := make(chan struct{}, 1), make(chan struct{})
		var at []time.Duration
		began := time.Now()
		go func() {
			defer close(done)
			recount(ctx, again, func(ctx context.Context) {
				at = append(at, time.Since(began))
				if end, ok := ctx.Deadline(); !ok || time.Until(end) > countTime {
					t.Errorf("it may last until %s", end)
				}
			})
		}()
		synctest.Wait()
		if len(at) != 0 {
			t.Errorf("counted at %v, and nobody asked", at)
		}
		for range 295 { // for almost half a minute: at its end a fourth would be due
			select {
			case again <- struct{}{}:
			default:
			}
			time.Sleep(100 * time.Millisecond)
		}
		cancel()
		<-done
		if len(at) != 3 || at[0] != 0 || at[1] != countPause || at[2] != 2*countPause {
			t.Errorf("counted at %v", at)
		}
	})
}
