package cache

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// admit has f wait for its turn in q, starts what can start, and ends what there is no
// room for. c.mu is held.
func (c *Cache) admit(f *flight, q *queue) {
	q.add(f)
	c.start(q)
	v := q.crowded(f)
	if v == nil {
		return
	}
	c.stats.Overloaded++
	if v.begun {
		c.stats.Ended++
	}
	delete(c.flights, v.place)
	v.answer, v.ended = verify.Deny(verify.Overloaded, fmt.Sprintf("%d images are being checked and %d wait, which is the limit; try again later",
		q.running, q.room)), true
	close(v.done)
}

// start starts flights while q has slots. c.mu is held.
func (c *Cache) start(q *queue) {
	for f := q.next(); f != nil; f = q.next() {
		if !f.begun {
			f.begun = true
			c.stats.Started++
		}
		c.wg.Go(func() { c.fly(f, q) })
	}
}

// fly has f checked, by Near or by the Evaluator behind as q says. If that panics, or ends
// its goroutine, d stays a denial.
func (c *Cache) fly(f *flight, q *queue) {
	ctx, cancel := context.WithTimeout(c.ctx, c.o.Deadline)
	defer cancel()
	judge := c.next
	if q == c.near {
		judge = c.o.Near
	}
	var d verify.Decision
	var began time.Time
	defer func() {
		p := recover()
		if p != nil {
			d = verify.Deny(verify.Internal, fmt.Sprintf("panic while verifying: %v", p))
		}
		more := q == c.near && !d.Allowed() && c.beyond(f)
		d, over := c.land(f, q, d, outcome{more, p != nil, ctx.Err() == nil, c.since(began)})
		if over && c.o.Observe != nil {
			defer func() { _ = recover() }() // who watches must not bring down who decides
			c.o.Observe(f.question, d)
		}
	}()
	if c.o.Begin != nil {
		defer c.o.Begin(f.question)()
	}
	began = c.o.Now()
	d = judge.Evaluate(ctx, f.question)
}

// since is how long a step took; a panic of the clock costs only that.
func (c *Cache) since(began time.Time) (took time.Duration) {
	defer func() { _ = recover() }()
	return c.o.Now().Sub(began)
}

// An outcome is what a step came to besides its answer.
type outcome struct {
	more     bool // there is another step
	panicked bool
	inTime   bool
	took     time.Duration
}

// land is told what a step of f came to. It has f wait for its next step, or gives all
// who wait for f its answer, which it returns, and keeps that if it may be kept.
func (c *Cache) land(f *flight, q *queue, d verify.Decision, o outcome) (_ verify.Decision, over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.start(q)
	q.end(f, o.took, !d.Reason.Inconclusive())
	if o.panicked {
		c.stats.Panics++
	}
	if o.more && c.ctx.Err() == nil {
		f.near = d
		question := f.question
		if f.wanted.Rule != nil {
			question, f.ahead = f.wanted, false
		}
		f.question = after(question, d)
		c.admit(f, c.far)
		return f.answer, f.ended
	}
	c.stats.Ended++
	delete(c.flights, f.place)
	switch {
	case c.ctx.Err() != nil:
		d = retired()
	case d.Allowed() && d.Key != f.place.key:
		d = verify.Deny(verify.Internal, "the answer is to another question")
	default:
		if d.Allowed() {
			c.roster.yes(f.place.host, f.question.Image.Config.String(), q == c.far && f.mark.other)
		} else {
			d.Signers = slices.Concat(f.near.Signers, d.Signers)
			d.Signers = d.Signers[:min(len(d.Signers), verify.MaxRelated)]
		}
		d = d.Final()
		c.keep(f, d, o.inTime)
	}
	f.answer, f.ended = d, true
	close(f.done)
	return d, true
}

// beyond reports whether there is more to ask for f. A panic means no.
func (c *Cache) beyond(f *flight) (more bool) {
	defer func() { _ = recover() }()
	return c.o.Beyond(f.question.Image.Name)
}

// after is q for the Evaluator behind, with what Near tried.
func after(q verify.Question, near verify.Decision) verify.Question {
	return q.After(near)
}
