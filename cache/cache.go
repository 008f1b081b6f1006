// Package cache remembers decisions and keeps the number of verifications that
// run at once small, so that the hook answers from memory (DESIGN.md, "The hook
// does not wait on the network").
//
// A [Cache] is a [verify.Judge] in front of another, usually the Engine. It hands
// out nothing that the Judge behind it did not answer, except denials of its own:
// PENDING while the work goes on, OVERLOADED where there is no room for it, and
// INTERNAL where the Judge behind it panicked.
//
// A yes is about content and a requirement and holds under every name. A no also
// depends on where signatures were looked for, so it holds only under the host and
// path that were asked about: nobody spoils an image for others by starting it
// from a place that has no signatures.
package cache

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Options bound a Cache. Zero and negative numbers mean the default, except
// where a negative one says "none".
type Options struct {
	Allowed  int           // answers that allow, kept at most; default 4096
	Denied   int           // answers that deny, kept at most; default 1024
	DenyFor  time.Duration // longest that a denial is kept; default 30 s, negative: none is kept
	Flights  int           // verifications at once; default 2
	Queue    int           // verifications that wait for their turn; default 64, negative: none waits
	Deadline time.Duration // of one verification from its start; default 60 s

	Now func() time.Time // required

	// Observe is told the question and the answer when a verification ends. It may
	// be nil. It is called from several goroutines, must not block and must not call
	// Close. The question is the Cache's own copy: it names no pod and no tag.
	Observe func(verify.Question, verify.Decision)
}

// A flight longer than long makes its host a slow one, of which maxSlow are
// remembered. What waits for a slow host lets others go first: the host is often
// chosen by a pod's author, and one that never answers would otherwise keep all
// flights and the queue to itself.
const (
	long    = time.Second
	maxSlow = 256
)

// slack is how far the clock may go back without costing what is kept: NTP steps
// of that size are common and prolong nothing, since time stands still meanwhile.
const slack = time.Second

// A Cache is a Judge that remembers. It is safe for concurrent use. The slices of
// the Decisions that it returns are shared: they are to be read only.
type Cache struct {
	next   verify.Judge
	o      Options
	ctx    context.Context // of all flights; ended by Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // of running flights

	mu      sync.Mutex
	latest  time.Time // the latest time seen; see clock
	allowed *simplelru.LRU[verify.Key, entry]
	denied  *simplelru.LRU[place, entry]
	flights map[place]*flight // running and queued
	queue   []*flight         // not started yet, oldest first
	running int
	slow    *simplelru.LRU[string, struct{}] // hosts of images whose last flight was long
}

var _ verify.Judge = (*Cache)(nil)

// An entry is an answer and when it ends.
type entry struct {
	answer verify.Decision
	until  time.Time
}

// A place is what a denial and a flight are about: a question, where signatures
// are looked for and, since nothing about an image that is merely asked about has
// been proved by the runtime, what for.
type place struct {
	key        verify.Key
	host, path string
	use        verify.Use
}

// A flight is one verification for all who ask the same.
type flight struct {
	place    place
	question verify.Question
	done     chan struct{} // closed when answer is set
	ended    bool          // guarded by Cache.mu, as answer is
	answer   verify.Decision
}

// New puts a Cache in front of next. It panics where next or o.Now is nil. The
// caller closes it.
func New(next verify.Judge, o Options) *Cache {
	if next == nil || o.Now == nil {
		panic("cache: New needs a Judge and a clock")
	}
	o.Allowed = or(o.Allowed, 4096)
	o.Denied = or(o.Denied, 1024)
	o.Flights = or(o.Flights, 2)
	if o.Queue == 0 {
		o.Queue = 64
	}
	if o.DenyFor == 0 {
		o.DenyFor = 30 * time.Second
	}
	if o.Deadline <= 0 {
		o.Deadline = time.Minute
	}
	c := &Cache{next: next, o: o, flights: map[place]*flight{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.allowed, _ = simplelru.NewLRU[verify.Key, entry](o.Allowed, nil) // fails only for a size below 1
	c.denied, _ = simplelru.NewLRU[place, entry](o.Denied, nil)
	c.slow, _ = simplelru.NewLRU[string, struct{}](maxSlow, nil)
	return c
}

func or(n, standard int) int {
	if n <= 0 {
		return standard
	}
	return n
}

// Judge implements [verify.Judge]. What is known is answered at once, also when
// ctx has ended. Else the question is put to the Judge behind, once for all who
// ask it meanwhile and whatever becomes of ctx; when ctx ends first the answer is
// PENDING, and where too many verifications wait already it is OVERLOADED. After
// Close every answer is PENDING: whoever asks has a configuration that is no
// longer in force, and asking again under the new one helps.
func (c *Cache) Judge(ctx context.Context, q verify.Question) verify.Decision {
	if f := q.Unfit(); f != nil {
		return verify.Deny(f.Reason, f.Detail)
	}
	d, f := c.find(q)
	if f == nil {
		return d
	}
	return c.await(ctx, f)
}

// await returns what f answers, or PENDING when ctx ends first.
func (c *Cache) await(ctx context.Context, f *flight) verify.Decision {
	select {
	case <-f.done:
	case <-ctx.Done():
	case <-c.ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ctx.Err() != nil:
		return retired()
	case !f.ended:
		return verify.Deny(verify.Pending, "signatures are still being checked; the next try finds the answer")
	}
	return f.answer
}

func retired() verify.Decision {
	return verify.Deny(verify.Pending, "the configuration that the image was checked under is no longer in force; the next try answers")
}

// find returns what is known, or the flight that will know.
func (c *Cache) find(q verify.Question) (verify.Decision, *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return retired(), nil
	}
	n := q.Image.Name
	p := place{q.Key(), n.Host, n.Path, q.Image.Use}
	now := c.clock()
	if d, ok := get(c.allowed, p.key, now); ok {
		return d, nil
	}
	if d, ok := get(c.denied, p, now); ok {
		return d, nil
	}
	if f := c.flights[p]; f != nil {
		return verify.Decision{}, f
	}
	if c.running >= c.o.Flights && len(c.queue) >= c.o.Queue && !c.yield(p.host) {
		return c.overloaded(), nil
	}
	q = q.Bare() // a flight outlives the request that started it
	p.host, p.path = q.Image.Name.Host, q.Image.Name.Path
	f := &flight{place: p, question: q, done: make(chan struct{})}
	c.flights[p] = f
	c.queue = append(c.queue, f)
	c.start()
	return verify.Decision{}, f
}

func (c *Cache) overloaded() verify.Decision {
	return verify.Deny(verify.Overloaded, fmt.Sprintf("%d images are being checked and %d wait, which is the limit; try again later",
		c.running, len(c.queue)))
}

// yield makes room in the queue for a host that is not slow: the youngest flight
// of one that is gives way. c.mu is held.
func (c *Cache) yield(host string) bool {
	if c.slow.Contains(host) {
		return false
	}
	for i, f := range slices.Backward(c.queue) {
		if c.slow.Contains(f.place.host) {
			f.answer, f.ended = c.overloaded(), true
			close(f.done)
			delete(c.flights, f.place)
			c.queue = slices.Delete(c.queue, i, i+1)
			return true
		}
	}
	return false
}

// get looks an answer up and forgets it once it has ended.
func get[K comparable](l *simplelru.LRU[K, entry], k K, now time.Time) (verify.Decision, bool) {
	e, ok := l.Get(k)
	if ok && !now.Before(e.until) {
		l.Remove(k)
		ok = false
	}
	return e.answer, ok
}

// clock returns the time by which entries end. Ends are points of the wall clock
// (NotAfter, NextUpdate), so the monotonic reading is dropped. Where the clock
// goes back, what was kept would last longer than it was meant to: it is
// forgotten, and made again under the clock that holds now. c.mu is held, which
// keeps readings in order.
func (c *Cache) clock() time.Time {
	now := c.o.Now().Round(0)
	if now.Before(c.latest.Add(-slack)) {
		c.allowed.Purge()
		c.denied.Purge()
	} else if now.Before(c.latest) {
		now = c.latest
	}
	c.latest = now
	return now
}

// start starts flights while there are slots: the oldest of a host that is not
// slow, else the oldest. c.mu is held.
func (c *Cache) start() {
	for c.running < c.o.Flights && len(c.queue) > 0 {
		i := max(0, slices.IndexFunc(c.queue, func(f *flight) bool { return !c.slow.Contains(f.place.host) }))
		f := c.queue[i]
		c.queue = slices.Delete(c.queue, i, i+1)
		c.running++
		c.wg.Go(func() { c.fly(f) })
	}
}

// fly runs f. Where next panics, or ends its goroutine, d stays a denial.
func (c *Cache) fly(f *flight) {
	ctx, cancel := context.WithTimeout(c.ctx, c.o.Deadline)
	defer cancel()
	var d verify.Decision
	var began time.Time
	defer func() {
		if p := recover(); p != nil {
			d = verify.Deny(verify.Internal, fmt.Sprintf("panic while verifying: %v", p))
		}
		d = c.end(f, d, ctx.Err() == nil, c.since(began))
		if c.o.Observe != nil {
			defer func() { _ = recover() }() // who watches must not bring down who decides
			c.o.Observe(f.question, d)
		}
	}()
	began = c.o.Now()
	d = c.next.Judge(ctx, f.question)
}

// since is how long a flight took; a panic of the clock costs only that.
func (c *Cache) since(began time.Time) (took time.Duration) {
	defer func() { _ = recover() }()
	return c.o.Now().Sub(began)
}

// end gives all who wait for f its answer, which it returns, keeps that where it
// may be kept, and starts what waits for the slot.
func (c *Cache) end(f *flight, d verify.Decision, inTime bool, took time.Duration) verify.Decision {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.start()
	c.running--
	if took > long {
		c.slow.Add(f.place.host, struct{}{})
	} else {
		c.slow.Remove(f.place.host)
	}
	delete(c.flights, f.place)
	switch {
	case c.ctx.Err() != nil:
		d = retired()
	case d.Allowed() && d.Key != f.place.key:
		d = verify.Deny(verify.Internal, "the answer is to another question")
	default:
		c.keep(f, d, inTime)
	}
	f.answer, f.ended = d, true
	close(f.done)
	return d
}

// keep remembers d for those who ask later, where that is sound. A panic of the
// clock costs only that.
func (c *Cache) keep(f *flight, d verify.Decision, inTime bool) {
	defer func() { _ = recover() }()
	now := c.clock()
	switch {
	case now.Before(d.Made):
		// The clock went back while f was under way: when d ends is not known.
	case d.Allowed():
		// A yes that rests on another target of the same config is kept only where the
		// runtime's own records said that it is one; see place.
		i := f.question.Image
		if i.Use == verify.UseContainer || d.Signed == i.Target.Digest || d.Signed == i.Manifest.Digest {
			put(c.allowed, f.place.key, d, d.Until, now)
		}
	case inTime && !d.Reason.Transient():
		until := now.Add(c.o.DenyFor)
		if !d.Until.IsZero() && d.Until.Before(until) {
			until = d.Until
		}
		put(c.denied, f.place, d, until, now)
	}
}

// put keeps d, unless until is zero (good for this once) or over.
func put[K comparable](l *simplelru.LRU[K, entry], k K, d verify.Decision, until, now time.Time) {
	if now.Before(until) {
		l.Add(k, entry{d, until.Round(0)})
	}
}

// Close retires c: it ends what is under way and waits for it, as long as the
// Judge behind takes to notice. It may be called more than once and returns nil.
// Neither that Judge nor Observe may call it.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.cancel()
	c.queue = nil
	clear(c.flights)
	c.allowed.Purge()
	c.denied.Purge()
	c.mu.Unlock()
	c.wg.Wait()
	return nil
}
