package verify

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

// A Snapshot is one configuration in force. It does not change once a Decider has
// it. The zero Snapshot denies everything.
type Snapshot struct {
	Revision  Revision
	Mode      Mode
	Policy    Policy
	Evaluator Evaluator       // the cache with the Engine behind it
	Alias     func(Name) Name // what rules and sources call an image of that name; nil: the same
	Wait      time.Duration   // longest that one answer waits for work under way; audit never waits
}

// Known returns what rules and sources call an image of that name.
func (s *Snapshot) Known(n Name) Name {
	if s.Alias == nil {
		return n
	}
	return s.Alias(n)
}

// A Decider is the Verifier that the gate asks. Its zero value has no
// configuration and denies everything. It is safe for concurrent use.
type Decider struct {
	snapshot atomic.Pointer[Snapshot]
}

var _ Verifier = (*Decider)(nil)

// Swap puts s in force, or with nil nothing, and returns what was in force
// before. Answers that are being made under the old configuration do not count
// any more.
func (e *Decider) Swap(s *Snapshot) *Snapshot { return e.snapshot.Swap(s) }

// Snapshot returns the configuration in force, or nil.
func (e *Decider) Snapshot() *Snapshot { return e.snapshot.Load() }

// Verify implements [Verifier]. An answer counts only if the configuration that
// it was made under is still in force when it is given.
func (e *Decider) Verify(ctx context.Context, img Image) Decision {
	for range 2 {
		s := e.snapshot.Load()
		d := decide(ctx, s, img)
		if e.snapshot.Load() == s {
			return seal(d, s)
		}
	}
	return seal(Deny(Pending, "the configuration changed while the image was checked; the next try answers"), e.snapshot.Load())
}

// seal applies the mode of the configuration in force.
func seal(d Decision, s *Snapshot) Decision {
	if s == nil {
		return Deny(PolicyInvalid, "this node has no valid configuration in force; see the log of tidewaiter")
	}
	d.Revision = s.Revision
	return audit(d, s.Mode)
}

// decide answers as enforce would. A panic becomes a denial.
func decide(ctx context.Context, s *Snapshot, img Image) (d Decision) {
	defer func() {
		if p := recover(); p != nil {
			d = Deny(Internal, fmt.Sprintf("panic while deciding: %v", p))
		}
	}()
	if s == nil {
		return Decision{}
	}
	if f := img.validate(); f != nil {
		return Deny(f.Reason, f.Detail)
	}
	// The configuration also says which snapshotters and runtimes are believed.
	if img.Use != UseQuestion && img.Revision != s.Revision {
		return Deny(Pending, "the configuration changed while the image was looked at; the next try answers")
	}
	if img.Use.runs() {
		wait := s.Wait
		if s.Mode == Audit {
			wait = 0
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	d = ask(ctx, s, img)
	if img.Use != UseVolume {
		return d
	}
	// Names that no rule speaks of cost nothing, so that nobody pushes the one that
	// counts out of sight by adding others. Those that are looked into are few.
	first := d
	for asked, names := 0, img.Names[:min(len(img.Names), MaxNames)]; !d.allowed && asked < MaxRelated && len(names) > 0; names = names[1:] {
		img.Name = names[0]
		if d = ask(ctx, s, img); d.Reason != PolicyNoMatch && d.Reason != PolicyInvalid {
			asked++
		}
	}
	if !d.allowed {
		return first
	}
	return d
}

// ask answers for the one name that img has. Its context ends with the wait.
func ask(ctx context.Context, s *Snapshot, img Image) (d Decision) {
	img.Name = s.Known(img.Name)
	if f := img.validate(); f != nil { // of an image volume each name comes here
		return Deny(f.Reason, f.Detail)
	}
	rule := s.Policy.Select(img)
	q := Question{Image: img, Rule: rule}
	if q.listed() {
		d = allow(q, []proof{{finding: Finding{Reason: AllowedByDigest, Signed: rule.Digest, Detail: rule.Detail}}}, time.Time{})
	} else if rule != nil && rule.Fixed != "" && rule.Fixed != AllowedByDigest {
		d = Deny(rule.Fixed, rule.Detail)
	} else if f := q.Validate(); f != nil {
		return Deny(f.Reason, f.Detail)
	} else {
		d = s.Evaluator.Evaluate(ctx, q)
		if d.allowed && (d.Key != q.Key() || !q.Accepts(d)) {
			d = Deny(Internal, "the answer is to another question")
		}
	}
	// A cached answer was made for the same content under the same rule; how this
	// container was bound to that content is its own.
	d.Rule, d.Key, d.Binding = rule.Name, q.Key(), img.Binding
	return d
}
