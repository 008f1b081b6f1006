package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// ErrTakenBack is wrapped where something was put in place, did not work, and is gone
// again. It cost the node a restart of the gate or of containerd, or writes to its disk.
var ErrTakenBack = errors.New("taken back")

// ErrFollowed is wrapped where somebody else brings this host its configuration.
var ErrFollowed = errors.New("another process brings this host its configuration and its program")

// How Bring waits.
const (
	bringEvery = 15 * time.Second // between two looks at what is brought

	// After what was taken back, which may cost a minute without containers each time:
	// twice as long each time.
	backFirst, backLongest = 5 * time.Minute, 24 * time.Hour
	// After another failure, as when a container would be refused that runs.
	failedFirst, failedLongest = time.Minute, 15 * time.Minute

	// A pod that is replaced by another one has two minutes to end.
	alonePatience = 5 * time.Minute
)

// A respite is how long something is not tried again.
type respite struct {
	until time.Time
	last  time.Duration
}

func (p *respite) longer(now time.Time, first, longest time.Duration) {
	p.last = min(max(2*p.last, first), longest)
	p.until = now.Add(p.last)
}

// Bring installs whenever there is something new to bring to the host, until ctx ends.
// tell is called after each round that changed something or failed, and after those that
// did nothing, with Nothing. What failed is tried again when the configuration in i.From
// changes, and otherwise after a time that grows; what was taken back only after a time,
// while a configuration that changes still gets to the host.
//
// One process at a time does this on a host: of two, each would undo the configuration of
// the other for ever. The error of a second one wraps ErrFollowed.
func (i *Installation) Bring(ctx context.Context, tell func(Result, error)) error {
	release, err := i.alone(ctx, tell)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	var back, failed respite
	var until time.Time
	for seen := ""; ; i.Sleep(ctx, bringEvery) {
		now, offer := i.Now(), i.offer()
		if ctx.Err() != nil {
			return nil
		}
		if offer == seen && now.Before(until) {
			continue
		}
		i.held = now.Before(back.until)
		result, err := i.Install(ctx)
		now = i.Now()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrBusy): // its turn comes
			continue
		case errors.Is(err, ErrTakenBack):
			back.longer(now, backFirst, backLongest)
			until = back.until
		case err != nil:
			failed.longer(now, failedFirst, failedLongest)
			until = failed.until
		case i.held:
			failed, until = respite{}, back.until
		default:
			back, failed, until = respite{}, respite{}, time.Time{}
		}
		seen = offer
		tell(result, err)
	}
}

// offer names the configuration in i.From, or why it cannot be read.
func (i *Installation) offer() string {
	if i.From == "" {
		return "-"
	}
	all, err := files(i.From)
	if err != nil {
		return "! " + err.Error()
	}
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(h, "%q %d\n", name, len(all[name]))
		h.Write(all[name])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// alone waits until nobody else brings this host its configuration, and keeps others from
// it until release is called or this process ends. The lock is not lock's: others may
// install by hand.
func (i *Installation) alone(ctx context.Context, tell func(Result, error)) (release func(), err error) {
	const next = "let one DaemonSet, or one release of a chart, follow on a node: delete the other, or give them nodeSelectors that do not meet"
	waits := func(time.Duration, string) error {
		return hint(next, "%w; this one waits until it ends, for %s", ErrFollowed, alonePatience)
	}
	if release, err = i.flock(ctx, lockFollow, 0, waits); !errors.Is(err, ErrFollowed) {
		return release, err
	}
	tell("", err)
	return i.flock(ctx, lockFollow, alonePatience, func(after time.Duration, _ string) error {
		return hint(next, "after %s: %w", after, ErrFollowed)
	})
}

// installed reports whether the program on the host is Self.
func (i *Installation) installed() bool {
	there, err := i.program()
	return err == nil && bytes.Equal(there, i.Self)
}
