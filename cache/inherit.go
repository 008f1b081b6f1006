package cache

import (
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Inherit takes over the answers of old that allow, and what it knows of hosts. It is
// called before c is asked anything; old goes on as it is. An answer is used for
// questions of the same Key alone, which holds the hash of the statement and its trust
// stores, and only after everything that an allow rests on was looked at again under the
// rule and the clock that hold then. Denials stay behind, since a configuration can
// change where signatures are looked for, and so do verifications under way.
func (c *Cache) Inherit(old *Cache) {
	type kept struct {
		key verify.Key
		entry
	}
	var list []kept
	roster := newRoster(nil)
	old.mu.Lock()
	latest := old.latest
	for _, l := range [...]interface {
		Keys() []verify.Key
		Peek(verify.Key) (entry, bool)
	}{old.earlier, old.allowed} {
		for _, k := range l.Keys() { // oldest first
			e, _ := l.Peek(k)
			list = append(list, kept{k, e})
		}
	}
	roster.inherit(old.roster)
	old.mu.Unlock()

	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range list {
		c.earlier.Add(k.key, k.entry)
	}
	c.latest = latest
	c.roster.inherit(roster)
}

// renew returns the answer to q that another Cache had, if it still holds. c.mu is held.
func (c *Cache) renew(q verify.Question, now time.Time) (verify.Decision, bool) {
	was, ok := get(c.earlier, q.Key(), now)
	if !ok || !q.Accepts(was) || now.Before(was.Made) {
		return verify.Decision{}, false
	}
	d := verify.Renew(q, was, now)
	if !d.Allowed() || d.Key != was.Key {
		return verify.Decision{}, false
	}
	c.earlier.Remove(d.Key)
	put(c.allowed, d.Key, d, d.Until, now, &c.stats.AllowedEvicted)
	return d, true
}
