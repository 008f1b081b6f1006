package install

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// soon is how long something is waited for that is usual and not needed.
const shortWait = 5 * time.Second

// patience is how long the gate is waited for.
func (i *Installation) patience() time.Duration {
	if i.Patience == 0 {
		return time.Minute
	}
	return i.Patience
}

// await waits until the gate is as wanted.
func (i *Installation) await(ctx context.Context, patience time.Duration, is func(*control.Status) bool) error {
	var last error
	for end := i.Now().Add(patience); ; {
		s, err := i.Ask(ctx)
		switch {
		case err == nil && is(s):
			return nil
		case err != nil:
			last = err
		case len(s.Problems) > 0:
			last = errors.New(s.Problems[0].Text)
		default:
			last = fmt.Errorf("it is in mode %s, and not the one that was waited for", s.Mode)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !i.Now().Before(end) {
			return fmt.Errorf("after %s: %w", patience, last)
		}
		i.Sleep(ctx, 250*time.Millisecond)
	}
}

func (i *Installation) byHand() { i.Say("next", "%s", i.byHandLine()) }

func (i *Installation) byHandLine() string {
	return fmt.Sprintf("start %s run, and again whenever it ends: there is neither systemd nor OpenRC here", i.Program)
}
