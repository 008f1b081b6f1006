// Package cache remembers decisions and keeps the number of verifications that
// run at once small, so that the hook answers from memory (DESIGN.md, "The hook
// does not wait on the network").
//
// A [Cache] is a [verify.Evaluator] in front of another, usually the Engine. It hands
// out nothing that the Evaluator behind it did not answer, except denials of its own:
// PENDING while the work goes on, OVERLOADED where there is no room for it, and
// INTERNAL where the Evaluator behind it panicked.
//
// A yes is about content and a requirement and holds under every name. A no also
// depends on where signatures were looked for, so it holds only under the host and
// path that were asked about: nobody spoils an image for others by starting it
// from a place that has no signatures.
package cache

import (
	"context"
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
	Flights  int           // verifications at once, and as many at once by Near; default 2
	Queue    int           // verifications that wait for their turn, as many ahead of time, and as many again for Near; default 64, negative: none waits
	Deadline time.Duration // of one verification from its start, and of one by Near; default 60 s

	Now func() time.Time // required

	// Near answers by what is on the node, without network, and is asked first. It has
	// turns of its own, so that no registry holds up what needs none. Nil: there is
	// nothing on the node. What it does not allow goes on to the Evaluator behind if Beyond,
	// which must be there with Near, says that more can be found for images of that name.
	Near   verify.Evaluator
	Beyond func(verify.Name) bool

	// Named reports whether the configuration names the host of an image, and whether it
	// names that very repository. It says who takes turns with whom; see queue. Nil:
	// it names none.
	Named func(verify.Name) (host, repository bool)

	// Begin is called when the check by Near or by the Evaluator behind begins, and what it
	// returns when that ends, whatever becomes of it. It may be nil, is called from
	// several goroutines and must not call Close.
	Begin func(verify.Question) (end func())

	// Observe is told the question and the answer when a verification ends. It may
	// be nil. It is called from several goroutines, must not block and must not call
	// Close. The question is the Cache's own copy: it names no pod and no tag.
	Observe func(verify.Question, verify.Decision)
}

// slack is how far the clock may go back without costing what is kept: NTP steps
// of that size are common and prolong nothing, since time stands still meanwhile.
const slack = time.Second

// A Cache is an Evaluator that remembers. It is safe for concurrent use. The slices of
// the Decisions that it returns are shared: they are to be read only.
type Cache struct {
	next   verify.Evaluator
	o      Options
	ctx    context.Context // of all flights; ended by Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // of running flights

	mu      sync.Mutex
	latest  time.Time // the latest time seen; see clock
	allowed *simplelru.LRU[verify.Key, entry]
	denied  *simplelru.LRU[place, entry]
	vain    *simplelru.LRU[place, entry]      // denials that settled nothing; see pending
	earlier *simplelru.LRU[verify.Key, entry] // answers that allow, of another Cache; see Inherit
	flights map[place]*flight                 // running and queued
	roster  *roster
	near    *queue // of what Near is asked
	far     *queue // of what next is asked
	stats   Stats  // what is counted; see Stats
}

var _ verify.Evaluator = (*Cache)(nil)

// An entry is an answer and when it ends.
type entry struct {
	answer verify.Decision
	until  time.Time
}

// A place is what a denial and a flight are about: a question, where signatures
// are looked for, and whether the runtime's own records say what the image is, or
// somebody merely asks, and whether other targets of the same config count. What
// was found out ahead of time holds for containers.
type place struct {
	key        verify.Key
	host, path string
	proven     bool
	vouched    bool // what is signed may be another target of the same config
}

// proven reports whether the runtime's own records say what an image of that use is.
func proven(u verify.Use) bool { return starts(u) || u == verify.UsePrefetch }

// starts reports whether a container waits for the answer.
func starts(u verify.Use) bool { return u == verify.UseContainer || u == verify.UseVolume }

// New puts a Cache in front of next. It panics if next or o.Now is nil, or one of
// o.Near and o.Beyond. The caller closes it.
func New(next verify.Evaluator, o Options) *Cache {
	if next == nil || o.Now == nil || (o.Near == nil) != (o.Beyond == nil) {
		panic("cache: New needs an Evaluator and a clock, and both of Near and Beyond or none")
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
	c := &Cache{next: next, o: o, flights: map[place]*flight{}, roster: newRoster(o.Named)}
	c.near, c.far = newQueue(o.Flights, max(o.Queue, 0), c.roster), newQueue(o.Flights, max(o.Queue, 0), c.roster)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.allowed, _ = simplelru.NewLRU[verify.Key, entry](o.Allowed, nil) // fails only for a size below 1
	c.denied, _ = simplelru.NewLRU[place, entry](o.Denied, nil)
	c.vain, _ = simplelru.NewLRU[place, entry](maxVain, nil)
	c.earlier, _ = simplelru.NewLRU[verify.Key, entry](o.Allowed, nil)
	return c
}

func or(n, standard int) int {
	if n <= 0 {
		return standard
	}
	return n
}

// Evaluate implements [verify.Evaluator]. What is known is answered at once, also when
// ctx has ended. Else the question is put to the Evaluator behind, once for all who
// ask it meanwhile and whatever becomes of ctx; when ctx ends first the answer is
// PENDING, or what the last try to answer ended with, and where too many verifications wait already it is OVERLOADED.
//
// Where a container is about to start, and there is little hope of an answer while
// ctx lasts, PENDING comes at once: somebody waited in vain already, or others wait
// for their turn.
//
// After Close every answer is PENDING: whoever asks has a configuration that is no
// longer in force, and asking again under the new one helps.
func (c *Cache) Evaluate(ctx context.Context, q verify.Question) verify.Decision {
	if f := q.Validate(); f != nil {
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
	waits := ctx.Err() == nil
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
		f.late = f.late || waits
		return pending(f)
	}
	return f.answer
}

// A verification that settled nothing, since a source did not answer, is made again
// whenever somebody asks. Who cannot wait for that is told what the last one ended
// with, if it was no longer ago than vainFor: "the mirror hangs" says more than
// "still checking", again and again. maxVain of these are kept.
const (
	maxVain = 256
	vainFor = 5 * time.Minute
)

func pending(f *flight) verify.Decision {
	if d := f.before; d.Reason != "" {
		d.Detail += "; it is being tried again"
		return d
	}
	return verify.Deny(verify.Pending, "signatures are still being checked; the next try finds the answer")
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
	n, use := q.Image.Name, q.Image.Use
	p := place{q.Key(), n.Host, n.Path, proven(use), q.Image.LayersVerified}
	now := c.clock()
	d, ok := get(c.allowed, p.key, now)
	if !ok {
		d, ok = c.renew(q, now)
	}
	if ok && q.Accepts(d) {
		c.stats.AllowedHits++
		return d, nil
	}
	if d, ok := get(c.denied, p, now); ok {
		c.stats.DeniedHits++
		return d, nil
	}
	c.stats.Misses++
	f := c.flights[p]
	switch {
	case f == nil:
		f = &flight{question: q.Minimal(), ahead: use == verify.UsePrefetch, done: make(chan struct{})} // it outlives the request
		b := f.question.Image.Name
		p.host, p.path = b.Host, b.Path
		f.place, c.flights[p] = p, f
		if d, ok := get(c.vain, p, now); ok {
			f.before = d
		}
		if c.o.Near != nil {
			c.admit(f, c.near)
		} else {
			c.admit(f, c.far)
		}
	case f.ahead && use != verify.UsePrefetch: // now somebody waits for it
		c.stats.Joined++
		if f.started {
			f.wanted = q.Minimal() // in its next step, if there is one
			break
		}
		f.queue.remove(f)
		f.question, f.ahead = after(q.Minimal(), f.near), false
		c.admit(f, f.queue)
	default:
		c.stats.Joined++
	}
	switch {
	case f.ended: // there was no room
		return f.answer, nil
	case starts(use) && (f.late || f.queue.before(f) > 0):
		f.late = true
		return pending(f), nil
	}
	return verify.Decision{}, f
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
		c.vain.Purge()
		c.earlier.Purge()
	} else if now.Before(c.latest) {
		now = c.latest
	}
	c.latest = now
	return now
}

// keep remembers d for those who ask later, where that is sound. A panic of the
// clock costs only that.
func (c *Cache) keep(f *flight, d verify.Decision, inTime bool) {
	defer func() { _ = recover() }()
	now := c.clock()
	c.vain.Remove(f.place)
	switch {
	case now.Before(d.Made):
		// The clock went back while f was under way: when d ends is not known.
	case d.Allowed():
		// A yes that rests on another target of the same config is kept only where the
		// runtime's own records said that it is one; see place.
		strict := f.question
		strict.Image.LayersVerified = f.place.proven && f.place.vouched
		if strict.Accepts(d) {
			put(c.allowed, f.place.key, d, d.Until, now, &c.stats.AllowedEvicted)
		}
	case inTime && !d.Reason.Inconclusive():
		until := now.Add(c.o.DenyFor)
		if !d.Until.IsZero() && d.Until.Before(until) {
			until = d.Until
		}
		put(c.denied, f.place, d, until, now, &c.stats.DeniedEvicted)
	case d.Reason != verify.Pending && d.Reason != "":
		c.vain.Add(f.place, entry{d, now.Add(vainFor)})
	}
}

// put keeps d, unless until is zero (good for this once) or over, and counts what
// has to go for it.
func put[K comparable](l *simplelru.LRU[K, entry], k K, d verify.Decision, until, now time.Time, evicted *uint64) {
	if now.Before(until) && l.Add(k, entry{d, until.Round(0)}) {
		*evicted++
	}
}

// Stats are a Cache's figures. Those of uint64 only grow; the others are of now.
type Stats struct {
	AllowedHits, DeniedHits       uint64 // questions answered by what is kept
	Misses                        uint64 // questions that were not
	Joined                        uint64 // of these, those about what waited or was under way
	AllowedEvicted, DeniedEvicted uint64 // answers that went for want of room
	Started, Ended                uint64 // verifications
	Panics                        uint64 // panics of the Evaluator behind; those that the Engine made denials of are not among them
	Overloaded                    uint64 // verifications that there was no room for

	Running         int // verifications, those by Near among them
	Waiting, Ahead  int // verifications that wait for their turn, and those that were asked ahead of time
	Allowed, Denied int // answers that are kept
}

// Stats returns the figures.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	for _, q := range [...]*queue{c.near, c.far} {
		s.Running += q.running
		s.Waiting += q.asked.waiting
		s.Ahead += q.ahead.waiting
	}
	s.Allowed, s.Denied = c.allowed.Len()+c.earlier.Len(), c.denied.Len()
	return s
}

// Forget forgets denials: signatures that were not there may be there now. What is
// being verified meanwhile answers as it will.
func (c *Cache) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.denied.Purge()
	c.vain.Purge()
}

// Close retires c: it ends what is under way and waits for it, as long as the
// Judge behind takes to notice. It may be called more than once and returns nil.
// Neither that Evaluator nor Observe may call it.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.cancel()
	c.near.clear()
	c.far.clear()
	clear(c.flights)
	c.allowed.Purge()
	c.earlier.Purge()
	c.denied.Purge()
	c.vain.Purge()
	c.mu.Unlock()
	c.wg.Wait()
	return nil
}
