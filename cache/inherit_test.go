package cache

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// TestInherit: an answer that allows is taken over for the same question, requirement
// included, and for no other.
func TestInherit(t *testing.T) {
	with := func(f func(*verify.Question)) verify.Question {
		q := ask("a")
		f(&q)
		return q
	}
	for _, tt := range []struct {
		name string
		q    verify.Question
		kept bool
	}{
		{"the same", ask("a"), true},
		{"another name of the rule", with(func(q *verify.Question) { q.Rule.Name = "other" }), true},
		{"another path", at(ask("a"), "registry.local", "other"), true},
		{"another statement or trust store", with(func(q *verify.Question) { q.Rule.Require = by("changed") }), false},
		{"no requirement", with(func(q *verify.Question) { q.Rule.Require = nil }), false},
		{"a rule that denies", with(func(q *verify.Question) { q.Rule.Fixed = verify.PolicyNoMatch }), false},
		{"another target", with(func(q *verify.Question) { q.Image.Target.Digest = of("b") }), false},
		{"another config", with(func(q *verify.Question) { q.Image.Config = of("b") }), false},
		{"not bound", with(func(q *verify.Question) { q.Image.Binding = 0 }), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cl := newClock()
			old := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
			was := old.Evaluate(bg, ask("a"))
			cl.add(time.Minute)
			behind := no(verify.SignatureMissing)
			c := open(t, behind, Options{Now: cl.now})
			c.Inherit(old)
			old.Close()
			for range 2 {
				d := c.Evaluate(bg, tt.q)
				if d.Allowed() != tt.kept {
					t.Errorf("the answer is %v", d.Reason)
				}
				if tt.kept && (!d.Until.Equal(was.Until) || !d.Made.Equal(was.Made) || d.Source != was.Source || d.Signed != was.Signed || len(d.Tried) != len(was.Tried) || d.Key != was.Key) {
					t.Errorf("got  %+v\nwant %+v", d, was)
				}
			}
			if tt.kept {
				called(t, behind, 0)
				if s := c.Stats(); s.AllowedHits != 2 || s.Allowed != 1 || s.Misses != 0 {
					t.Errorf("stats %+v", s)
				}
			}
		})
	}
}

// TestInheritEnds: what is taken over ends when it would have, also if the clock was set
// meanwhile.
func TestInheritEnds(t *testing.T) {
	for _, tt := range []struct {
		name  string
		by    time.Duration
		calls int64
	}{
		{"before the end", time.Hour - 1, 0},
		{"at the end", time.Hour, 1},
		{"the clock went back", -time.Hour, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cl := newClock()
			old := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
			old.Evaluate(bg, ask("a"))
			cl.add(tt.by)
			behind := no(verify.SignatureMissing)
			c := open(t, behind, Options{Now: cl.now})
			c.Inherit(old)
			c.Evaluate(bg, ask("a"))
			called(t, behind, tt.calls)
		})
	}
}

// TestInheritAgain: what was not asked for under one configuration is there under the
// next, and back under the first.
func TestInheritAgain(t *testing.T) {
	cl := newClock()
	first := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
	first.Evaluate(bg, ask("a"))
	first.Evaluate(bg, ask("b"))
	behind := no(verify.SignatureMissing)
	second := open(t, behind, Options{Now: cl.now})
	second.Inherit(first)
	expect(t, second.Evaluate(bg, ask("a")), verify.Verified)
	third := open(t, behind, Options{Now: cl.now, Allowed: 2})
	third.Inherit(second)
	for _, s := range []string{"a", "b"} {
		expect(t, third.Evaluate(bg, ask(s)), verify.Verified)
	}
	called(t, behind, 0)
	if s := third.Stats(); s.Allowed != 2 {
		t.Errorf("stats %+v", s)
	}
}

// TestInheritOnlyAnswers: denials, and verifications that end after the next
// configuration is in force, are no one's but the old one's.
func TestInheritOnlyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		slow := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			if q.Image.Target.Digest == of("denied") {
				return verify.Deny(verify.SignatureMissing, "")
			}
			<-release
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		old := open(t, slow, Options{Now: time.Now})
		expect(t, old.Evaluate(bg, ask("denied")), verify.SignatureMissing)
		expect(t, old.Evaluate(ended(), ask("under way")), verify.Pending)
		synctest.Wait()
		behind := no(verify.SignerUntrusted)
		c := open(t, behind, Options{Now: time.Now})
		c.Inherit(old)
		close(release)
		synctest.Wait()
		expect(t, old.Evaluate(ended(), ask("under way")), verify.Verified) // old is not closed yet
		old.Close()
		changed := ask("under way")
		changed.Rule.Require = by("another")
		for _, q := range []verify.Question{ask("denied"), ask("under way"), changed} {
			expect(t, c.Evaluate(bg, q), verify.SignerUntrusted)
		}
		called(t, behind, 3)
		old.Close()
		c.Inherit(old) // which has nothing any more
		c.Close()
	})
}

// TestInheritOtherTarget: an answer that rests on another target of the same config
// holds only for those of whom that is known now.
func TestInheritOtherTarget(t *testing.T) {
	cl := newClock()
	q := ask("a")
	q.Image.LayersVerified = true
	other := q.Image.Target
	other.Digest = of("signed elsewhere")
	q.Image.Related = append(q.Image.Related, other)
	old := open(t, &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		return allowBy(q, cl.now(), signed{sign: other.Digest, until: start.Add(time.Hour)})
	}}, Options{Now: cl.now})
	expect(t, old.Evaluate(bg, q), verify.Verified)
	for _, tt := range []struct {
		name string
		f    func(*verify.Question)
		kept bool
	}{
		{"the same", func(*verify.Question) {}, true},
		{"which the node has no more", func(q *verify.Question) { q.Image.Related = nil }, false},
		{"without checked layers", func(q *verify.Question) { q.Image.LayersVerified = false }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			behind := no(verify.SignatureMissing)
			c := open(t, behind, Options{Now: cl.now})
			c.Inherit(old)
			now := q
			tt.f(&now)
			if d := c.Evaluate(bg, now); d.Allowed() != tt.kept {
				t.Errorf("the answer is %v", d.Reason)
			}
		})
	}
}

// TestInheritHosts: what is known of hosts outlives a change of the configuration.
func TestInheritHosts(t *testing.T) {
	cl := newClock()
	old := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
	old.Evaluate(bg, ask("a"))
	old.roster.took(mark{name: "slow"}, 2*long)
	c := open(t, no(verify.SignatureMissing), Options{Now: cl.now})
	c.Inherit(old)
	if !c.roster.isProved("registry.local") || !c.roster.isSlow(mark{name: "slow"}) {
		t.Error("hosts are forgotten")
	}
}
