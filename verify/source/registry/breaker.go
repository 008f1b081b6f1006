package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Limits of a circuit and of the pace.
const (
	openAfter   = 2                // failures that open a circuit
	openFor     = time.Second      // at first, and twice as long each time, at most
	maxOpen     = 4 * time.Second  // so that what is right again is found so within 5 s
	maxAfter    = 30 * time.Second // longest that Retry-After is honoured
	maxCircuits = 256              // circuits that are not closed, and paces, remembered
	maxBlame    = 8                // subjects that failed, remembered of each circuit

	prefetchRate  = 20 // requests a second and registry for what is asked ahead of time
	prefetchBurst = 4  // as one question takes
)

// Breaker knows how the links to registries fare, so that one that does not answer is
// not waited for by everybody who asks, and that none is overrun by what is asked
// ahead of time. All mirrors of a program can share one. It is safe for concurrent
// use, is in memory only, and bounded.
//
// Two circuits stand before each request of a question, and a failure opens the one
// that whoever caused it could have broken anyway:
//
//   - that of the registry (scheme, host and port), which no connection could be
//     made to. That depends on nothing that a pod's author chooses.
//   - that of one repository there, whose requests got no answer in time, or 429 or
//     503. A mirror that fetches from elsewhere hangs and fails as elsewhere does,
//     and whoever owns some repositories can have as many of them hang as they like.
//     Were that to open the circuit of the mirror, nobody else's images could be
//     verified.
//
// Answers that say no (404, 401, 403), that lie or are too long, and other 5xx open
// nothing: they cost no time, and what a registry cannot say of one image it may say
// of the next. They close the circuit, as every answer does.
//
// Two failures in a row open a circuit for a second, and each more for twice as long,
// up to 4 seconds, less up to a quarter at random so that nodes do not ask in step;
// a Retry-After opens it at once, for up to 30 seconds. After that one question is let
// through to find out, and what it gets decides. A repository that fails for one image
// need not fail for the next: one question at a time is let through early where it is
// about a subject that did not fail, up to 8 of which are remembered, unless the
// registry asked for silence. Else an image that always fails, and is asked for again
// and again, would be the one that finds out for all. While a circuit is open the
// source was not asked, and says so: that is ErrUnreachable and never an answer.
type Breaker struct {
	now    func() time.Time
	random func() float64

	mu       sync.Mutex
	circuits *simplelru.LRU[string, circuit] // those that are not closed
	paces    *simplelru.LRU[string, *rate.Limiter]
	known    *simplelru.LRU[string, struct{}] // repositories that a registry has served something of, see Holds
}

// A circuit is one that failed. The zero circuit is closed.
type circuit struct {
	failures int // in a row
	since    time.Time
	until    time.Time // open until then; zero: not yet
	probed   bool      // somebody is finding out
	silent   bool      // the registry said for how long
	blame    []digest.Digest
	why      string
}

// NewBreaker returns an empty store. now is the clock by which circuits open, random
// returns numbers from 0 to 1, as of [math/rand/v2.Float64].
func NewBreaker(now func() time.Time, random func() float64) *Breaker {
	l := &Breaker{now: now, random: random}
	l.circuits, _ = simplelru.NewLRU[string, circuit](maxCircuits, nil) // it fails only without a size
	l.paces, _ = simplelru.NewLRU[string, *rate.Limiter](maxCircuits, nil)
	l.known, _ = simplelru.NewLRU[string, struct{}](maxServed, nil)
	return l
}

// A result is what a question taught about a link. The zero result is nothing.
type result struct {
	what  outcome
	why   string        // with fails
	after time.Duration // with fails: how long the registry wants not to be asked, or 0
	blame digest.Digest // with fails: what was asked about; empty: it says nothing of that
}

type outcome int

const (
	_ outcome = iota
	works
	fails
)

// enter asks whether the link may be used for a question about subject, which is empty
// where failures are not about one, and returns why not. If probe, the caller finds
// out for all, and must call leave.
func (l *Breaker) enter(key, what string, subject digest.Digest) (probe bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.circuits.Get(key)
	if !ok || c.until.IsZero() {
		return false, nil
	}
	next := "it is being tried now"
	// A clock that was set back does not keep it open.
	early := subject != "" && !c.silent && !c.probed && len(c.blame) < maxBlame && !slices.Contains(c.blame, subject)
	if wait := c.until.Sub(l.now()); wait > 0 && wait <= maxAfter && !early {
		next = "tried again in " + max(wait.Round(100*time.Millisecond), 100*time.Millisecond).String()
	} else if !c.probed {
		c.probed = true
		l.circuits.Add(key, c)
		return true, nil
	}
	return false, fmt.Errorf("%w: not asked, since %s has failed since %s (%s); %s",
		verify.ErrUnreachable, what, c.since.UTC().Format(time.RFC3339), c.why, next)
}

// leave is told what came of a question that enter let through.
func (l *Breaker) leave(key string, probe bool, r result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.circuits.Get(key)
	if r.what == works {
		l.circuits.Remove(key)
		return
	}
	if probe {
		c.probed = false
	}
	if r.what == fails {
		now := l.now()
		if c.failures++; c.failures == 1 {
			c.since = now
		}
		c.why, c.silent = r.why, r.after > 0
		if r.blame != "" && len(c.blame) < maxBlame && !slices.Contains(c.blame, r.blame) {
			c.blame = append(slices.Clone(c.blame), r.blame)
		}
		if r.after > 0 {
			c.until = now.Add(min(r.after, maxAfter))
		} else if more := c.failures - openAfter; more >= 0 {
			d := min(openFor<<min(more, 8), maxOpen)
			c.until = now.Add(d - time.Duration(l.random()*float64(d)/4))
		}
	}
	if ok || r.what == fails {
		l.circuits.Add(key, c)
	}
}

// turn is how long a request for what is asked ahead of time has to wait.
func (l *Breaker) turn(origin string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.paces.Get(origin)
	if !ok {
		p = rate.NewLimiter(prefetchRate, prefetchBurst)
		l.paces.Add(origin, p)
	}
	now := l.now()
	return p.ReserveN(now, 1).DelayFrom(now)
}

// pace waits until the next request may be sent, or returns ctx's error.
func (e *exchange) pace(ctx context.Context) error {
	if e.breaker == nil || !e.ahead {
		return nil
	}
	wait := e.breaker.turn(e.origin)
	if end, ok := ctx.Deadline(); ok {
		wait = paced(wait, end.Sub(e.breaker.now()))
	}
	turn := time.NewTimer(wait)
	defer turn.Stop()
	select {
	case <-turn.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("what is asked ahead of time keeps to %d requests a second, and its turn had not come: %w", prefetchRate, ctx.Err())
	}
}

// paced is how long a request waits for its turn if the question has left to live. The
// pace is ours, and must not take the time that the registry has: the less is left, the
// shorter is the wait, so that hundreds of requests fit.
func paced(turn, left time.Duration) time.Duration { return max(0, min(turn, left/pacePart)) }

// pacePart is the part of the time left that one request may wait.
const pacePart = 100

// reached closes the registry's circuit as soon as there is a connection: the
// question itself may be one that hangs.
func (e *exchange) reached() {
	if e.breaker != nil {
		e.breaker.leave(e.origin, false, result{what: works})
	}
}

// through puts the circuits before a question that ask puts to the registry.
func (e *exchange) through(ctx context.Context, subject digest.Digest, ask func() error) error {
	if e.breaker == nil {
		return ask()
	}
	registry, repository := e.origin, e.origin+" "+e.host+" "+e.repository
	var all, own result // of the registry, and of this repository
	probe, err := e.breaker.enter(registry, "the registry", "")
	if err != nil {
		return err
	}
	defer func() { e.breaker.leave(registry, probe, all) }() // also where ask panics
	probes, err := e.breaker.enter(repository, "this repository", subject)
	if err != nil {
		return err
	}
	defer func() { e.breaker.leave(repository, probes, own) }()

	err = ask()
	f := (*failure)(nil)
	if !errors.As(err, &f) {
		f = &failure{}
	}
	if e.connected {
		all.what = works
	}
	failed := result{what: fails, why: f.why(), after: f.after}
	if !f.at.IsZero() {
		failed.after = f.at.Sub(e.breaker.now())
	}
	if repeats(failed.why, e.secrets) {
		failed.why = "an answer that is not shown"
	}
	switch {
	case errors.Is(ctx.Err(), context.Canceled): // who asked has gone
	case f.busy || f.lost && f.connected:
		own = failed
		own.blame = subject
	case f.lost && ctx.Err() == nil:
		all = failed
	case !f.lost: // where the question's time ended before there was a connection, nothing is known
		own.what = all.what
	}
	return err
}
