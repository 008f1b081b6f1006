package reconcile

import (
	"context"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// assess finds out what the plan in force asks of images that it was not asked
// about yet, and gives each its time.
func (r *Refresher) assess(ctx context.Context) {
	r.mu.Lock()
	p := r.plan
	todo := map[subject]group{}
	for key, c := range r.images {
		if p != nil && c.plan != p && !c.unsafe {
			todo[key] = *c
		}
	}
	r.mu.Unlock()
	for key, c := range todo {
		q, skip := r.question(ctx, p, c)
		if skip != nil && skip.Reason == verify.ImageUnresolved {
			continue // containerd did not say; Prefetch asks again, and tells
		}
		r.mu.Lock()
		if c := r.images[key]; c != nil && r.plan == p {
			r.schedule(c, p, q)
		}
		r.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p != nil && r.images != nil {
		r.assessed = true
	}
	r.count()
}

// settled returns what is asked of images, without that which is to be asked for
// soon; nil: it is not known.
func (r *Refresher) settled() map[[32]byte]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.assessed {
		return nil
	}
	list := map[[32]byte]bool{}
	for _, c := range r.images {
		list[c.requirement] = true
	}
	for _, c := range r.images {
		if c.soon || c.plan != r.plan {
			delete(list, c.requirement)
		}
	}
	return list
}

// schedule gives an image its time under p, which asks q of it. r.mu is held.
func (r *Refresher) schedule(c *group, p *RefreshPlan, q verify.Question) {
	was, first := c.requirement, c.plan == nil
	c.plan, c.requirement = p, [32]byte{}
	if q.Rule != nil {
		c.requirement = q.Rule.Require.Hash()
	}
	now := r.uptime()
	another := was != c.requirement
	if first { // of images that come later, the mirrors were asked just now
		another = !r.assessed && r.noted.strange(c.requirement)
	}
	switch {
	case c.requirement == [32]byte{} || p.Every == 0:
		c.soon, c.failures, c.due = false, 0, 0
	case another && (!c.soon || c.failures > 0):
		c.soon = true
		c.due = now + time.Duration(c.draw%uint64(min(p.Every/soonShare, maxSoon)+1))
	case c.soon || c.failures > 0: // its time was set, and stays
		c.due = min(c.due, now+p.Every)
	default:
		c.due = c.regular(p, now)
	}
}

// regular is the first time of c's own after now.
func (c *group) regular(p *RefreshPlan, now time.Duration) time.Duration {
	phase := time.Duration(c.draw % uint64(p.Every))
	if now < phase {
		return phase
	}
	return phase + ((now-phase)/p.Every+1)*p.Every
}

// next returns what is to be asked about next and how long that is to wait; nothing
// where nothing is planned.
func (r *Refresher) next() (subject, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key, due := r.first()
	return key, max(due-r.uptime(), 0)
}

// first is what is due first, and when. r.mu is held.
func (r *Refresher) first() (first subject, due time.Duration) {
	for key, c := range r.images {
		if c.plan != nil && c.plan == r.plan && c.due > 0 && (first == subject{} || c.due < due) {
			first, due = key, c.due
		}
	}
	return first, due
}

// count brings figures up to date that follow from the images. r.mu is held.
func (r *Refresher) count() {
	s := &r.status
	s.Images, s.Failing, s.Next = 0, 0, time.Time{}
	for _, c := range r.images {
		if c.requirement != ([32]byte{}) {
			s.Images++
			if c.failures > 0 {
				s.Failing++
			}
		}
	}
	if key, due := r.first(); key != (subject{}) {
		s.Next = r.binder.Options().Now().Add(due - r.uptime()).Round(time.Second)
	}
	if s.Failing == 0 {
		s.Error = ""
	}
}
