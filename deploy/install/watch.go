package install

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config/stage"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// ErrTakenBack is wrapped where something was put in place, did not work, and is gone
// again. It cost the node a restart of the gate or of containerd, or writes to its disk.
var ErrTakenBack = errors.New("taken back")

// ErrWatched is wrapped where somebody else brings this host its configuration.
var ErrWatched = errors.New("another process brings this host its configuration and its program")

// taken is an error of an enforcement that was taken back.
type undone struct{ error }

func (t undone) Unwrap() error { return t.error }

// How Watch waits.
const (
	watchInterval = 15 * time.Second // between two looks at what is brought

	// After what was taken back, which may cost a minute without containers each time:
	// twice as long each time.
	backFirst, backLongest = 5 * time.Minute, 24 * time.Hour
	// After another failure, as when a container would be refused that runs.
	failedFirst, failedLongest = time.Minute, 15 * time.Minute

	// A pod that is replaced by another one has two minutes to end.
	exclusivePatience = 5 * time.Minute
)

// A backoff is how long something is not tried again.
type backoff struct {
	until time.Time
	last  time.Duration
}

func (p *backoff) grow(now time.Time, first, longest time.Duration) {
	p.last = min(max(2*p.last, first), longest)
	p.until = now.Add(p.last)
}

// Watch installs whenever there is something new to bring to the host, until ctx ends.
// tell is called after each round that changed something or failed, and after those that
// did nothing, with Nothing. What failed is tried again when the configuration in i.From
// changes, and otherwise after a time that grows; what was taken back only after a time,
// while a configuration that changes still gets to the host.
//
// One process at a time does this on a host: of two, each would undo the configuration of
// the other for ever. The error of a second one wraps ErrWatched.
func (i *Installation) Watch(ctx context.Context, tell func(Result, error)) error {
	release, err := i.exclusive(ctx, tell)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	var back, failed backoff
	lower := false // what was taken back was that the node enforces
	var until time.Time
	for seen := ""; ; i.Sleep(ctx, watchInterval) {
		now, offer := i.Now(), i.fingerprint()
		if ctx.Err() != nil {
			return nil
		}
		if offer == seen && now.Before(until) {
			continue
		}
		held := now.Before(back.until)
		lower = lower && held
		result, err := i.install(ctx, limits{held: held, lower: lower})
		now = i.Now()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrBusy): // its turn comes
			continue
		case errors.Is(err, ErrTakenBack):
			back.grow(now, backFirst, backLongest)
			until = back.until
			_, lower = errors.AsType[undone](err)
		case err != nil:
			failed.grow(now, failedFirst, failedLongest)
			until = failed.until
		case held:
			failed, until = backoff{}, back.until
		default:
			back, failed, until = backoff{}, backoff{}, time.Time{}
		}
		seen = offer
		tell(result, err)
	}
}

// fingerprint names the configuration in i.From, or why it cannot be read.
func (i *Installation) fingerprint() string {
	if i.From == "" {
		return "-"
	}
	all, err := stage.Read(i.From)
	if err != nil {
		return "! " + err.Error()
	}
	return all.Fingerprint()
}

// exclusive waits until no other process brings this host its configuration, and keeps others from
// it until release is called or this process ends. The lock is not lock's: others may
// install by hand.
func (i *Installation) exclusive(ctx context.Context, tell func(Result, error)) (release func(), err error) {
	const next = "let one DaemonSet, or one release of a chart, watch on a node: delete the other, or give them nodeSelectors that do not meet"
	waits := func(time.Duration, string) error {
		return node.Hintf(next, "%w; this one waits until it ends, for %s", ErrWatched, exclusivePatience)
	}
	if release, err = i.flock(ctx, lockWatch, 0, waits); !errors.Is(err, ErrWatched) {
		return release, err
	}
	tell("", err)
	return i.flock(ctx, lockWatch, exclusivePatience, func(after time.Duration, _ string) error {
		return node.Hintf(next, "after %s: %w", after, ErrWatched)
	})
}

// installed reports whether the program on the host is Self.
func (i *Installation) installed() bool {
	there, err := i.program()
	return err == nil && bytes.Equal(there, i.Self)
}
