package cache

import (
	"context"
	"crypto/sha256"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// A clock is set by tests.
type clock struct{ at atomic.Int64 }

func newClock() *clock                { c := &clock{}; c.at.Store(start.UnixNano()); return c }
func (c *clock) now() time.Time       { return time.Unix(0, c.at.Load()) }
func (c *clock) add(by time.Duration) { c.at.Add(int64(by)) }

// judge is an Evaluator made of a function, which counts.
type judge struct {
	calls atomic.Int64
	f     func(context.Context, verify.Question) verify.Decision
}

func (j *judge) Evaluate(ctx context.Context, q verify.Question) verify.Decision {
	j.calls.Add(1)
	return j.f(ctx, q)
}

// kind is that of the evidence here.
type kind struct{ verify.Kind }

func (kind) Name() string          { return "test" }
func (kind) TagSuffixes() []string { return nil }

// by is the requirement of one authority.
func by(authority string) *verify.Requirement {
	r, err := verify.SignedBy(verify.Leaf{Kind: "test", Authority: authority, Hash: sha256.Sum256([]byte(authority))})
	if err != nil {
		panic(err)
	}
	return r
}

// signed is a Source with one signature and a Checker that accepts it as one
// over sign, or over what it is asked about.
type signed struct {
	sign  digest.Digest
	until time.Time
}

func (signed) Name() string { return "test" }

func (signed) Find(_ context.Context, _ verify.Name, _ ocispec.Descriptor, _ *verify.Budget, yield func(verify.Evidence) bool) error {
	yield(verify.Evidence{})
	return nil
}

func (signed) Kind() verify.Kind       { return kind{} }
func (signed) Anchors(string) []string { return nil }

func (s signed) Check(_ context.Context, _ verify.Evidence, want ocispec.Descriptor, _ string) verify.Finding {
	if s.sign != "" && s.sign != want.Digest {
		return verify.Finding{Reason: verify.SignatureInvalid}
	}
	return verify.Finding{Reason: verify.Verified, Signed: want.Digest, Until: s.until}
}

// allow has the real Engine, which alone can, allow q until a time.
func allow(q verify.Question, now, until time.Time) verify.Decision {
	return allowBy(q, now, signed{until: until})
}

func allowBy(q verify.Question, now time.Time, s signed) verify.Decision {
	e := &verify.Engine{
		Sources:  func(verify.Name) []verify.Source { return []verify.Source{s} },
		Checkers: []verify.Checker{s},
		Now:      func() time.Time { return now },
	}
	return e.Evaluate(context.Background(), q)
}

func yes(c *clock, until time.Time) *judge {
	return &judge{f: func(_ context.Context, q verify.Question) verify.Decision { return allow(q, c.now(), until) }}
}

func no(r verify.Reason) *judge {
	return &judge{f: func(context.Context, verify.Question) verify.Decision { return verify.Deny(r, "as told") }}
}

func of(s string) digest.Digest { return digest.FromString(s) }

// ask is a question about content named by s.
func ask(s string) verify.Question {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: of(s), Size: 7}
	return verify.Question{
		Image: verify.Image{
			Name:   verify.Name{Host: "registry.local", Path: "app", Tag: "1"},
			Target: d, Manifest: d, Config: of("config of " + s),
			Use: verify.UseContainer, Binding: verify.BoundRuntime,
		},
		Rule: &verify.Rule{Name: "prod", Require: by("prod")},
	}
}

func at(q verify.Question, host, path string) verify.Question {
	q.Image.Name.Host, q.Image.Name.Path = host, path
	return q
}

// aheadOf is q asked ahead of time.
func aheadOf(q verify.Question) verify.Question {
	q.Image.Use, q.Image.Binding = verify.UsePrefetch, verify.BoundRecord
	return q
}

func open(t *testing.T, next verify.Evaluator, o Options) *Cache {
	t.Helper()
	if o.Now == nil {
		o.Now = newClock().now
	}
	c := New(next, o)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

func expect(t *testing.T, d verify.Decision, r verify.Reason) {
	t.Helper()
	if d.Reason != r || d.Allowed() != (r == verify.Verified) {
		t.Errorf("answer is allowed=%t %v (%s), want %v", d.Allowed(), d.Reason, d.Detail, r)
	}
}

func called(t *testing.T, j *judge, want int64) {
	t.Helper()
	if n := j.calls.Load(); n != want {
		t.Errorf("%d verifications, want %d", n, want)
	}
}

var bg = context.Background()

func ended() context.Context {
	ctx, cancel := context.WithCancel(bg)
	cancel()
	return ctx
}

func TestAllowedIsKeptUntilItEnds(t *testing.T) {
	for _, tt := range []struct {
		name  string
		until time.Duration // after start; negative: zero time
		after time.Duration
		calls int64
	}{
		{"before the end", time.Hour, time.Hour - 1, 1},
		{"at the end", time.Hour, time.Hour, 2},
		{"after the end", time.Hour, 2 * time.Hour, 2},
		{"good for this once", -1, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cl := newClock()
			until := time.Time{}
			if tt.until >= 0 {
				until = start.Add(tt.until)
			}
			j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
				if cl.now().After(start) {
					return allow(q, cl.now(), cl.now().Add(time.Hour))
				}
				return allow(q, cl.now(), until)
			}}
			c := open(t, j, Options{Now: cl.now})
			expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
			if kept := c.allowed.Len() == 1; kept != (tt.until > 0) {
				t.Errorf("kept %t", kept)
			}
			cl.add(tt.after)
			expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
			called(t, j, tt.calls)
		})
	}
}

func TestDenialIsKept(t *testing.T) {
	for _, tt := range []struct {
		name   string
		d      verify.Decision
		deny   time.Duration
		within time.Duration // kept just before
		never  bool
	}{
		{"settled", verify.Deny(verify.SignatureMissing, ""), 0, 30 * time.Second, false},
		{"for as long as told", verify.Deny(verify.SignerUntrusted, ""), time.Minute, time.Minute, false},
		{"no longer than it holds", verify.Decision{Reason: verify.SignatureInvalid, Until: start.Add(time.Second)}, 0, time.Second, false},
		{"Until does not prolong", verify.Decision{Reason: verify.SignatureInvalid, Until: start.Add(time.Hour)}, 0, 30 * time.Second, false},
		{"none are kept", verify.Deny(verify.SignatureMissing, ""), -1, 0, true},
		{"zero", verify.Decision{}, 0, 0, true},
		{"source", verify.Deny(verify.SourceUnreachable, ""), 0, 0, true},
		{"credentials", verify.Deny(verify.SourceUnauthorized, ""), 0, 0, true},
		{"referrers", verify.Deny(verify.SourceNoReferrers, ""), 0, 0, true},
		{"budget", verify.Deny(verify.LimitExceeded, ""), 0, 0, true},
		{"pending", verify.Deny(verify.Pending, ""), 0, 0, true},
		{"overloaded", verify.Deny(verify.Overloaded, ""), 0, 0, true},
		{"internal", verify.Deny(verify.Internal, ""), 0, 0, true},
		{"revocation unknown", verify.Deny(verify.RevocationUnknown, ""), 0, 0, true},
		{"made in the future", verify.Decision{Reason: verify.SignatureMissing, Made: start.Add(1)}, 0, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cl := newClock()
			j := &judge{f: func(context.Context, verify.Question) verify.Decision { return tt.d }}
			c := open(t, j, Options{Now: cl.now, DenyFor: tt.deny})
			want := verify.Reason(tt.d.Reason)
			expect(t, c.Evaluate(bg, ask("a")), want)
			if tt.never {
				expect(t, c.Evaluate(bg, ask("a")), want)
				called(t, j, 2)
				return
			}
			cl.add(tt.within - 1)
			expect(t, c.Evaluate(bg, ask("a")), want)
			called(t, j, 1)
			cl.add(1)
			expect(t, c.Evaluate(bg, ask("a")), want)
			called(t, j, 2)
		})
	}
}

// TestForget: denials are made anew, and answers that allow stay.
func TestForget(t *testing.T) {
	cl := newClock()
	deny := no(verify.SignatureMissing)
	j := &judge{f: func(ctx context.Context, q verify.Question) verify.Decision {
		if q.Key() == ask("good").Key() {
			return allow(q, cl.now(), start.Add(time.Hour))
		}
		return deny.f(ctx, q)
	}}
	c := open(t, j, Options{Now: cl.now})
	for range 2 {
		expect(t, c.Evaluate(bg, ask("good")), verify.Verified)
		expect(t, c.Evaluate(bg, ask("bad")), verify.SignatureMissing)
	}
	called(t, j, 2)
	c.Forget()
	for range 2 {
		expect(t, c.Evaluate(bg, ask("good")), verify.Verified)
		expect(t, c.Evaluate(bg, ask("bad")), verify.SignatureMissing)
	}
	called(t, j, 3)
	deny = no(verify.SourceUnreachable)
	expect(t, c.Evaluate(bg, ask("ugly")), verify.SourceUnreachable)
	if c.vain.Len() != 1 {
		t.Errorf("%d denials that settled nothing are kept", c.vain.Len())
	}
	c.Forget()
	if c.vain.Len() != 0 {
		t.Error("what a source that did not answer ended with is not forgotten")
	}
}

// TestClockGoesBack: what was kept under a later clock does not last for as long
// again.
func TestClockGoesBack(t *testing.T) {
	cl := newClock()
	until := start.Add(time.Hour)
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		if q.Image.Target.Digest == of("bad") {
			return verify.Deny(verify.SignatureMissing, "")
		}
		return allow(q, cl.now(), until)
	}}
	c := open(t, j, Options{Now: cl.now})
	both := func(calls int64) {
		t.Helper()
		expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
		expect(t, c.Evaluate(bg, ask("bad")), verify.SignatureMissing)
		called(t, j, calls)
	}
	both(2)
	cl.add(-slack) // a step of NTP
	both(2)
	cl.add(slack)
	both(2)
	cl.add(-10 * 365 * 24 * time.Hour)
	both(4)
	both(4) // and is kept again under the new clock
	cl.add(20 * 365 * 24 * time.Hour)
	expect(t, c.Evaluate(bg, ask("a")), verify.SignatureExpired)
}

// TestSmallStepsBackDoNotAddUp: time stands still while the clock is within the
// slack, so that steps cannot prolong an entry one after the other.
func TestSmallStepsBackDoNotAddUp(t *testing.T) {
	cl := newClock()
	j := yes(cl, start.Add(time.Hour))
	c := open(t, j, Options{Now: cl.now})
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	cl.add(-slack * 3 / 4)
	c.Evaluate(bg, ask("a"))
	called(t, j, 1)
	cl.add(-slack * 3 / 4)
	c.Evaluate(bg, ask("a"))
	called(t, j, 2)
}

// TestClockGoesBackDuringFlight: what an answer made under another clock is worth
// is not known, so it is good for those who waited and no longer.
func TestClockGoesBackDuringFlight(t *testing.T) {
	cl := newClock()
	j := &judge{}
	j.f = func(_ context.Context, q verify.Question) verify.Decision {
		d := allow(q, cl.now(), start.Add(time.Hour))
		if j.calls.Load() == 1 {
			cl.add(-time.Minute)
		}
		return d
	}
	c := open(t, j, Options{Now: cl.now})
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	called(t, j, 2)
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	called(t, j, 2)
}

// TestMonotonicReadingIsDropped: ends of entries are times of the wall clock, and
// a comparison by the monotonic clock would not see that it was set.
func TestMonotonicReadingIsDropped(t *testing.T) {
	now := time.Now()
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision { return allow(q, now, now.Add(time.Hour)) }}
	c := open(t, j, Options{Now: time.Now})
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	e, _ := c.allowed.Peek(ask("a").Key())
	for what, at := range map[string]time.Time{"the latest time seen": c.latest, "the end of an entry": e.until} {
		if at.IsZero() || strings.Contains(at.String(), " m=") {
			t.Errorf("%s is %v", what, at)
		}
	}
}

func TestWhatIsShared(t *testing.T) {
	base := ask("a")
	with := func(f func(*verify.Question)) verify.Question {
		q := ask("a")
		f(&q)
		return q
	}
	for _, tt := range []struct {
		name       string
		q          verify.Question
		allow, dny bool // shared with base
	}{
		{"the same", base, true, true},
		{"another pod and tag", with(func(q *verify.Question) {
			q.Image.Name.Tag, q.Image.Name.Digest, q.Image.Asked = "2", of("a"), "app:2"
			q.Image.Pod = verify.Pod{Namespace: "n", Name: "p", UID: "u", Container: "c"}
		}), true, true},
		{"another binding", with(func(q *verify.Question) { q.Image.Binding = verify.BoundSnapshot }), true, true},
		{"another rule, same requirement", with(func(q *verify.Question) { q.Rule.Name = "other" }), true, true},
		{"another path", at(base, "registry.local", "other"), true, false},
		{"another host", at(base, "other.local", "app"), true, false},
		{"another split of the same name", at(base, "", "registry.local/app"), true, false},
		{"only asked", with(func(q *verify.Question) { q.Image.Use, q.Image.Binding = verify.UseQuestion, verify.BoundDigest }), true, false},
		{"an image volume", with(func(q *verify.Question) { q.Image.Use, q.Image.Binding = verify.UseVolume, verify.BoundSnapshot }), true, true},
		{"ahead of time", aheadOf(base), true, true},
		{"another requirement", with(func(q *verify.Question) { q.Rule.Require = by("another") }), false, false},
		{"another target", with(func(q *verify.Question) { q.Image.Target.Digest = of("b") }), false, false},
		{"another size", with(func(q *verify.Question) { q.Image.Target.Size++ }), false, false},
		{"another media type", with(func(q *verify.Question) { q.Image.Target.MediaType += "x" }), false, false},
		{"another manifest", with(func(q *verify.Question) { q.Image.Manifest.Digest = of("b") }), false, false},
		{"another config", with(func(q *verify.Question) { q.Image.Config = of("b") }), false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, allowed := range []bool{true, false} {
				cl := newClock()
				j, shared := no(verify.SignatureMissing), tt.dny
				if allowed {
					j, shared = yes(cl, start.Add(time.Hour)), tt.allow
				}
				for _, order := range [][2]verify.Question{{base, tt.q}, {tt.q, base}} {
					j.calls.Store(0)
					c := open(t, j, Options{Now: cl.now})
					c.Evaluate(bg, order[0])
					d := c.Evaluate(bg, order[1])
					if d.Allowed() != allowed {
						t.Errorf("answer is %v, want allowed %t", d.Reason, allowed)
					}
					if got := j.calls.Load() == 1; got != shared {
						t.Errorf("allowed %t: shared %t, want %t", allowed, got, shared)
					}
				}
			}
		})
	}
}

// TestDenialElsewhereDoesNotSpoil: a pod that starts the content under a name
// without signatures costs those who use the right name nothing.
func TestDenialElsewhereDoesNotSpoil(t *testing.T) {
	cl := newClock()
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		if q.Image.Name.Path == "evil" {
			return verify.Deny(verify.SignatureMissing, "")
		}
		return allow(q, cl.now(), start.Add(time.Hour))
	}}
	c := open(t, j, Options{Now: cl.now})
	evil := at(ask("a"), "registry.local", "evil")
	expect(t, c.Evaluate(bg, evil), verify.SignatureMissing)
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	// The content is signed, and now everybody knows.
	expect(t, c.Evaluate(bg, evil), verify.Verified)
	called(t, j, 2)
}

// TestOtherTargetOnlyWhereProven: an allow that rests on another target of the
// same config is not kept where nobody proved that it is one.
func TestOtherTargetOnlyWhereProven(t *testing.T) {
	other := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: of("other"), Size: 9}
	for _, tt := range []struct {
		use     verify.Use
		binding verify.Binding
		sign    digest.Digest
		kept    bool
	}{
		{verify.UseContainer, verify.BoundRuntime, of("other"), true},
		{verify.UseVolume, verify.BoundSnapshot, of("other"), true},
		{verify.UsePrefetch, verify.BoundRecord, of("other"), true},
		{verify.UseQuestion, verify.BoundDigest, of("other"), false},
		{verify.UseQuestion, verify.BoundDigest, of("a"), true},
		{verify.UseQuestion, verify.BoundDigest, of("manifest"), true},
	} {
		cl := newClock()
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			return allowBy(q, cl.now(), signed{sign: tt.sign, until: start.Add(time.Hour)})
		}}
		c := open(t, j, Options{Now: cl.now})
		q := ask("a")
		q.Image.Manifest.Digest = of("manifest")
		q.Image.Related, q.Image.LayersVerified = []ocispec.Descriptor{other}, true
		q.Image.Use, q.Image.Binding = tt.use, tt.binding
		expect(t, c.Evaluate(bg, q), verify.Verified)
		expect(t, c.Evaluate(bg, q), verify.Verified)
		if kept := j.calls.Load() == 1; kept != tt.kept {
			t.Errorf("%+v: kept %t", tt, kept)
		}
	}
}

// TestOtherTargetOnlyWhereVouched: an allow that rests on another target of the same
// config is none where nobody checks that what runs has the config's layers, kept
// or under way. One that rests on the target itself is, and a denial there is none
// for the others.
func TestOtherTargetOnlyWhereVouched(t *testing.T) {
	other := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: of("other"), Size: 9}
	vouched, strange := ask("a"), ask("a")
	vouched.Image.Related, vouched.Image.LayersVerified = []ocispec.Descriptor{other}, true
	cl := newClock()
	release := make(chan struct{})
	sign := of("other")
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		<-release
		return allowBy(q, cl.now(), signed{sign: sign, until: start.Add(time.Hour)})
	}}
	c := open(t, j, Options{Now: cl.now})
	expect(t, c.Evaluate(ended(), vouched), verify.Pending) // under way
	expect(t, c.Evaluate(ended(), strange), verify.Pending)
	close(release)
	expect(t, c.Evaluate(bg, strange), verify.SignatureInvalid)
	expect(t, c.Evaluate(bg, vouched), verify.Verified)
	expect(t, c.Evaluate(bg, strange), verify.SignatureInvalid)
	called(t, j, 2)

	// What was signed is the target itself: then one answer is everybody's.
	sign = of("b")
	strange.Image.Target.Digest, vouched.Image.Target.Digest = of("b"), of("b")
	expect(t, c.Evaluate(bg, strange), verify.Verified)
	expect(t, c.Evaluate(bg, vouched), verify.Verified)
	called(t, j, 3)

	// An answer that rests on another target, to a question of which nobody vouches
	// for the layers, is not kept for those of which somebody does.
	sign = of("other")
	odd := ask("c")
	odd.Image.Related = []ocispec.Descriptor{other}
	kept := c.Stats().Allowed
	expect(t, c.Evaluate(bg, odd), verify.Verified) // the Decider does not take it
	if n := c.Stats().Allowed; n != kept {
		t.Errorf("%d answers are kept, want %d", n, kept)
	}
}

// TestWhoDoesNotWait: one who asks for what is known, and has no time, does not
// take the wait from the next one, as the gate asks twice.
func TestWhoDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			time.Sleep(20 * time.Millisecond)
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, j, Options{Now: time.Now})
		expect(t, c.Evaluate(ended(), ask("a")), verify.Pending)
		ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
		defer cancel()
		expect(t, c.Evaluate(ctx, ask("a")), verify.Pending)
		expect(t, c.Evaluate(bg, ask("a")), verify.Pending) // at once: the last one waited in vain
		time.Sleep(time.Second)
		expect(t, c.Evaluate(ended(), ask("b")), verify.Pending)
		expect(t, c.Evaluate(bg, ask("b")), verify.Verified)
	})
}

// TestUnfitIsNotAnswered: a question that no signature can answer gets a denial
// although its key is that of content which is allowed.
func TestUnfitIsNotAnswered(t *testing.T) {
	cl := newClock()
	j := yes(cl, start.Add(time.Hour))
	c := open(t, j, Options{Now: cl.now})
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	for name, tt := range map[string]struct {
		weaken func(*verify.Question)
		want   verify.Reason
	}{
		"fault":          {func(q *verify.Question) { q.Image.Fault = &verify.Fault{Reason: verify.ImageMismatch} }, verify.ImageMismatch},
		"no use":         {func(q *verify.Question) { q.Image.Use = 0 }, verify.ImageUnresolved},
		"no binding":     {func(q *verify.Question) { q.Image.Binding = 0 }, verify.ImageUnresolved},
		"weak binding":   {func(q *verify.Question) { q.Image.Binding = verify.BoundDigest }, verify.ImageUnresolved},
		"no rule":        {func(q *verify.Question) { q.Rule = nil }, verify.PolicyInvalid},
		"settled":        {func(q *verify.Question) { q.Rule.Fixed = verify.PolicyNoMatch }, verify.PolicyInvalid},
		"no requirement": {func(q *verify.Question) { q.Rule.Require = nil }, verify.PolicyInvalid},
		"zero question":  {func(q *verify.Question) { *q = verify.Question{} }, verify.ImageUnresolved},
	} {
		q := ask("a")
		tt.weaken(&q)
		t.Run(name, func(t *testing.T) { expect(t, c.Evaluate(bg, q), tt.want) })
	}
	called(t, j, 1)
}

// TestAnswerToAnotherQuestion: an allow that the Evaluator behind made for something
// else is not handed out.
func TestAnswerToAnotherQuestion(t *testing.T) {
	cl := newClock()
	j := &judge{f: func(context.Context, verify.Question) verify.Decision {
		return allow(ask("b"), cl.now(), start.Add(time.Hour))
	}}
	c := open(t, j, Options{Now: cl.now})
	expect(t, c.Evaluate(bg, ask("a")), verify.Internal)
	expect(t, c.Evaluate(bg, ask("a")), verify.Internal)
	called(t, j, 2)
}

func TestOneFlightForAll(t *testing.T) {
	for _, tt := range []struct {
		name string
		want verify.Reason
		kept bool
	}{
		{"allowed", verify.Verified, true},
		{"not kept", verify.SourceUnreachable, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newClock()
				release := make(chan struct{})
				j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
					<-release
					if tt.want == verify.Verified {
						return allow(q, cl.now(), start.Add(time.Hour))
					}
					return verify.Deny(tt.want, "")
				}}
				c := open(t, j, Options{Now: cl.now})
				var wg sync.WaitGroup
				for i := range 200 {
					wg.Go(func() {
						q := ask("a")
						q.Image.Pod.Name = fmt.Sprint(i)
						expect(t, c.Evaluate(bg, q), tt.want)
					})
				}
				synctest.Wait() // all wait
				called(t, j, 1)
				close(release)
				wg.Wait()
				called(t, j, 1)
				expect(t, c.Evaluate(bg, ask("a")), tt.want)
				if kept := j.calls.Load() == 1; kept != tt.kept {
					t.Errorf("kept %t, want %t", kept, tt.kept)
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newClock()
		release := make(chan struct{})
		type key struct{}
		j := &judge{f: func(ctx context.Context, q verify.Question) verify.Decision {
			if ctx.Value(key{}) != nil {
				t.Error("the flight has the asker's context")
			}
			<-release
			if ctx.Err() != nil {
				t.Error("the flight ended with the asker's context")
			}
			return allow(q, cl.now(), start.Add(time.Hour))
		}}
		c := open(t, j, Options{Now: cl.now})
		short, cancel := context.WithTimeout(context.WithValue(bg, key{}, 1), 50*time.Millisecond)
		defer cancel()
		d := c.Evaluate(short, ask("a"))
		expect(t, d, verify.Pending)
		if d.Detail == "" {
			t.Error("PENDING without a detail")
		}
		expect(t, c.Evaluate(ended(), ask("a")), verify.Pending)
		expect(t, c.Evaluate(ended(), ask("b")), verify.Pending) // starts all the same
		synctest.Wait()
		called(t, j, 2)
		close(release)
		synctest.Wait()
		expect(t, c.Evaluate(ended(), ask("a")), verify.Verified)
		expect(t, c.Evaluate(ended(), ask("b")), verify.Verified)
		called(t, j, 2)
		c.Close()
	})
}

// TestVainAnswerIsSaid: who cannot wait is told what the last try ended with, and
// not for ever that signatures are still being checked.
func TestVainAnswerIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newClock()
		release := make(chan verify.Decision)
		j := &judge{f: func(context.Context, verify.Question) verify.Decision { return <-release }}
		c := open(t, j, Options{Now: cl.now})
		end := func(d verify.Decision) {
			release <- d
			synctest.Wait()
		}
		said := func(what string, want verify.Reason) {
			t.Helper()
			d := c.Evaluate(ended(), ask("a"))
			synctest.Wait()
			expect(t, d, want)
			if again := strings.HasSuffix(d.Detail, "; it is being tried again"); again != (want == verify.SourceUnreachable) {
				t.Errorf("%s: %s", what, d.Detail)
			}
		}
		unreachable := verify.Deny(verify.SourceUnreachable, "the mirror hangs")
		said("first", verify.Pending)
		end(unreachable)
		said("second", verify.SourceUnreachable)
		said("joins it", verify.SourceUnreachable)
		expect(t, c.Evaluate(ended(), at(ask("a"), "other.local", "app")), verify.Pending) // another place
		synctest.Wait()
		called(t, j, 3)
		end(unreachable)
		end(unreachable)
		cl.add(vainFor)
		said("long ago", verify.Pending)
		end(unreachable)
		said("again", verify.SourceUnreachable)
		end(verify.Deny(verify.Pending, "cut short"))
		said("nothing new", verify.Pending)
		end(unreachable)
		said("again", verify.SourceUnreachable)
		q := ask("a")
		end(allow(q, cl.now(), cl.now().Add(time.Minute)))
		expect(t, c.Evaluate(ended(), q), verify.Verified)
		cl.add(time.Minute)
		said("after a yes that ended", verify.Pending)
		end(unreachable)
		said("again", verify.SourceUnreachable)
		end(unreachable)
		cl.add(-time.Hour)
		said("before it was said", verify.Pending)
		end(unreachable)
		for i := range 2 * maxVain {
			c.Evaluate(ended(), ask(fmt.Sprint(i)))
			synctest.Wait()
			end(unreachable)
		}
		if n := c.vain.Len(); n != maxVain {
			t.Errorf("%d are kept", n)
		}
		c.Close()
	})
}

func TestFlightHasItsOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took time.Duration
		j := &judge{f: func(ctx context.Context, _ verify.Question) verify.Decision {
			began := time.Now()
			<-ctx.Done()
			took = time.Since(began)
			return verify.Deny(verify.SignatureMissing, "cut short, and says so wrongly")
		}}
		for deadline, want := range map[time.Duration]time.Duration{0: time.Minute, time.Second: time.Second} {
			j.calls.Store(0)
			c := open(t, j, Options{Now: time.Now, Deadline: deadline})
			expect(t, c.Evaluate(bg, ask("a")), verify.SignatureMissing)
			if took != want {
				t.Errorf("deadline %v: the flight took %v, want %v", deadline, took, want)
			}
			// What came after the deadline is not believed for longer.
			expect(t, c.Evaluate(bg, ask("a")), verify.SignatureMissing)
			called(t, j, 2)
			c.Close()
		}
	})
}

func TestOverload(t *testing.T) {
	for _, tt := range []struct{ flights, queue, running, waiting int }{
		{0, 0, 2, 64},
		{3, 5, 3, 5},
		{1, -1, 1, 0},
	} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newClock()
				release := make(chan struct{})
				var running, peak atomic.Int64
				j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
					n := running.Add(1)
					defer running.Add(-1)
					for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
					}
					<-release
					return allow(q, cl.now(), start.Add(time.Hour))
				}}
				c := open(t, j, Options{Now: cl.now, Flights: tt.flights, Queue: tt.queue})
				room := tt.running + tt.waiting
				for i := range room {
					expect(t, c.Evaluate(ended(), ask(fmt.Sprint(i))), verify.Pending)
				}
				synctest.Wait()
				called(t, j, int64(tt.running))
				for i := range 100 {
					d := c.Evaluate(bg, ask(fmt.Sprint("more", i))) // answers although nothing is released
					expect(t, d, verify.Overloaded)
					if d.Detail == "" {
						t.Error("OVERLOADED without a detail")
					}
				}
				// Who asks for what is under way or waits already still may.
				expect(t, c.Evaluate(ended(), ask("0")), verify.Pending)
				expect(t, c.Evaluate(ended(), ask(fmt.Sprint(room-1))), verify.Pending)
				if n := len(c.flights); n != room {
					t.Errorf("%d flights are held, want %d", n, room)
				}
				close(release)
				synctest.Wait()
				for i := range room {
					expect(t, c.Evaluate(ended(), ask(fmt.Sprint(i))), verify.Verified)
				}
				called(t, j, int64(room))
				if peak.Load() > int64(tt.running) {
					t.Errorf("%d verifications at once, want at most %d", peak.Load(), tt.running)
				}
				if left := c.Stats(); len(c.flights) != 0 || left.Waiting+left.Ahead+left.Running != 0 {
					t.Errorf("left over: %d flights, %+v", len(c.flights), left)
				}
				expect(t, c.Evaluate(bg, ask("after")), verify.Verified)
				c.Close()
			})
		})
	}
}

func TestQueueIsFirstInFirstOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var order []digest.Digest
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			order = append(order, q.Image.Target.Digest)
			<-release
			return verify.Deny(verify.SignatureMissing, "")
		}}
		c := open(t, j, Options{Flights: 1, Queue: 8})
		for i := range 8 {
			expect(t, c.Evaluate(ended(), ask(fmt.Sprint(i))), verify.Pending)
		}
		close(release)
		synctest.Wait()
		if len(order) != 8 {
			t.Fatalf("%d verifications, want 8", len(order))
		}
		for i, d := range order {
			if d != of(fmt.Sprint(i)) {
				t.Errorf("verification %d is not the oldest", i)
			}
		}
		c.Close()
	})
}

func TestPanicIsADenial(t *testing.T) {
	for name, end := range map[string]func(){
		"panic":     func() { panic("a parser") },
		"nil panic": func() { panic(nil) },
		"goexit":    runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := newClock()
				release := make(chan struct{})
				j := &judge{}
				j.f = func(_ context.Context, q verify.Question) verify.Decision {
					if j.calls.Load() == 1 {
						<-release
						end()
					}
					return allow(q, cl.now(), start.Add(time.Hour))
				}
				c := open(t, j, Options{Now: cl.now, Flights: 1})
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() {
						d := c.Evaluate(bg, ask("a"))
						if d.Allowed() || d.Reason.String() != "INTERNAL" {
							t.Errorf("answer is allowed=%t %v", d.Allowed(), d.Reason)
						}
						if strings.Contains(name, "panic") && !strings.HasPrefix(d.Detail, "panic while verifying: ") {
							t.Errorf("detail is %q", d.Detail)
						}
					})
				}
				synctest.Wait()
				close(release)
				wg.Wait()
				// The flight is forgotten and its slot is free.
				expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
				called(t, j, 2)
				c.Close()
			})
		})
	}
}

func TestObserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newClock()
		type seen struct {
			q verify.Question
			d verify.Decision
		}
		told := make(chan seen, 10)
		j := yes(cl, start.Add(time.Hour))
		c := open(t, j, Options{Now: cl.now, Observe: func(q verify.Question, d verify.Decision) {
			told <- seen{q, d}
			panic("who watches must not bring down who decides")
		}})
		q := ask("a")
		q.Image.Asked = "app"
		q.Image.Name.Digest = of("a")
		q.Image.Pod = verify.Pod{Namespace: "n", Name: "p", UID: "u", Container: "c"}
		q.Image.Target.Annotations = map[string]string{"huge": "text"}
		q.Image.Target.Data = []byte("data")
		q.Image.Related = make([]ocispec.Descriptor, 3*verify.MaxRelated)
		expect(t, c.Evaluate(bg, q), verify.Verified)
		expect(t, c.Evaluate(bg, q), verify.Verified) // a hit is not told
		synctest.Wait()
		if len(told) != 1 {
			t.Fatalf("told %d times, want once", len(told))
		}
		s := <-told
		expect(t, s.d, verify.Verified)
		i := s.q.Image
		if i.Pod != (verify.Pod{}) || i.Asked != "" || i.Name.Tag != "" || i.Name.Digest != "" ||
			i.Target.Annotations != nil || i.Target.Data != nil || len(i.Related) != verify.MaxRelated {
			t.Errorf("the flight retained more than it needs: %+v", i)
		}
		if i.Name.Repository() != "registry.local/app" || s.q.Key() != q.Key() {
			t.Errorf("the flight is about %v", i.Name)
		}
		if s.q.Rule == q.Rule {
			t.Error("the flight shares the asker's rule")
		}
		expect(t, c.Evaluate(bg, ask("b")), verify.Verified) // the panic cost nothing
		c.Close()
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := newClock()
		stuck := make(chan struct{})
		j := &judge{f: func(ctx context.Context, q verify.Question) verify.Decision {
			if q.Image.Target.Digest != of("hit") {
				<-ctx.Done()
				<-stuck // it takes a while to notice
			}
			return allow(q, cl.now(), start.Add(time.Hour)) // and answers all the same
		}}
		var told atomic.Int64
		c := open(t, j, Options{Now: cl.now, Flights: 1, Observe: func(_ verify.Question, d verify.Decision) {
			if told.Add(1) > 1 {
				expect(t, d, verify.Pending)
			}
		}})
		expect(t, c.Evaluate(bg, ask("hit")), verify.Verified)
		var waiters, closers sync.WaitGroup
		for _, s := range []string{"running", "queued", "running"} {
			waiters.Go(func() { expect(t, c.Evaluate(bg, ask(s)), verify.Pending) })
		}
		synctest.Wait()
		called(t, j, 2)
		closed, began := make(chan struct{}), time.Now()
		for range 2 {
			closers.Go(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		go func() { closers.Wait(); close(closed) }()
		waiters.Wait() // they do not wait for the flight that is stuck
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close did not wait for the flight")
		default:
		}
		for _, s := range []string{"hit", "running", "queued", "new"} {
			expect(t, c.Evaluate(bg, ask(s)), verify.Pending)
		}
		close(stuck)
		<-closed
		for _, s := range []string{"hit", "running", "queued", "new"} {
			expect(t, c.Evaluate(bg, ask(s)), verify.Pending)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the flight was not ended, but by its deadline after %v", took)
		}
		called(t, j, 2)
		if told.Load() != 2 {
			t.Errorf("told %d times, want 2", told.Load())
		}
	})
}

// TestCloseBetween: an allow that was on its way when Close was called is not
// handed out after it.
func TestCloseBetween(t *testing.T) {
	cl := newClock()
	c := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
	_, f := c.find(ask("a"))
	<-f.done
	expect(t, c.await(bg, f), verify.Verified)
	c.Close()
	expect(t, c.await(bg, f), verify.Pending)
}

func TestFlood(t *testing.T) {
	cl := newClock()
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		if q.Image.Name.Path == "unsigned" {
			return verify.Deny(verify.SignatureMissing, "")
		}
		return allow(q, cl.now(), start.Add(time.Hour))
	}}
	const size, hot = 64, 16
	c := open(t, j, Options{Now: cl.now, Allowed: size, Denied: size})
	heat := func(want int64) {
		t.Helper()
		for i := range hot {
			expect(t, c.Evaluate(bg, ask(fmt.Sprint("hot", i))), verify.Verified)
		}
		called(t, j, want)
	}
	heat(hot)
	n := int64(hot)
	for i := range 1000 {
		// Any number of denials pushes no allow out.
		for range 5 {
			n++
			expect(t, c.Evaluate(bg, at(ask(fmt.Sprint("junk", n)), "registry.local", "unsigned")), verify.SignatureMissing)
		}
		// Others that are allowed do, but not those in use.
		n++
		expect(t, c.Evaluate(bg, ask(fmt.Sprint("cold", i))), verify.Verified)
		if i%(size-hot) == 0 {
			heat(n)
		}
	}
	heat(n)
	if a, d := c.allowed.Len(), c.denied.Len(); a != size || d != size {
		t.Errorf("%d allowed and %d denied are kept, want %d each", a, d, size)
	}
	if left := c.Stats(); len(c.flights) != 0 || left.Waiting != 0 {
		t.Errorf("left over: %d flights, %+v", len(c.flights), left)
	}
}

func TestDefaultSizes(t *testing.T) {
	cl := newClock()
	c := open(t, yes(cl, start.Add(time.Hour)), Options{Now: cl.now, Allowed: -1})
	for i := range 5000 {
		put(c.allowed, verify.Key{Config: of(fmt.Sprint(i))}, verify.Decision{}, start.Add(time.Hour), start, new(uint64))
		put(c.denied, place{path: fmt.Sprint(i)}, verify.Decision{}, start.Add(time.Hour), start, new(uint64))
	}
	if a, d := c.allowed.Len(), c.denied.Len(); a != 4096 || d != 1024 {
		t.Errorf("%d allowed and %d denied are kept, want 4096 and 1024", a, d)
	}
}

// TestManyAtOnce mixes everything, for the race detector. Nothing that is not
// signed may come out allowed, and nothing may after Close.
func TestManyAtOnce(t *testing.T) {
	cl := newClock()
	j := &judge{f: func(ctx context.Context, q verify.Question) verify.Decision {
		switch q.Image.Name.Path {
		case "signed":
			return allow(q, cl.now(), cl.now().Add(time.Second))
		case "panic":
			panic("a parser")
		case "slow":
			<-ctx.Done()
		}
		return verify.Deny(verify.SignatureMissing, "")
	}}
	c := open(t, j, Options{Now: cl.now, Allowed: 8, Denied: 8, Flights: 4, Queue: 4, Deadline: time.Millisecond,
		Observe: func(verify.Question, verify.Decision) { cl.add(time.Millisecond) }})
	var wg, closer sync.WaitGroup
	var closed atomic.Bool
	paths := []string{"signed", "unsigned", "panic", "slow", "signed"}
	for g := range 8 {
		wg.Go(func() {
			for i := range 300 {
				if i == 200 && g == 0 {
					closer.Go(func() { c.Close(); closed.Store(true) })
				}
				path := paths[(i+g)%len(paths)]
				ctx := bg
				if i%3 == 0 {
					ctx = ended()
				}
				late := closed.Load()
				d := c.Evaluate(ctx, at(ask(fmt.Sprint(path, i%20)), "registry.local", path))
				if d.Allowed() && path != "signed" {
					t.Errorf("%s is allowed", path)
				}
				if d.Allowed() && late {
					t.Error("a retired cache allows")
				}
			}
		})
	}
	wg.Wait()
	closer.Wait()
	if j.calls.Load() == 0 {
		t.Error("nothing was verified")
	}
}

func TestNewPanics(t *testing.T) {
	for name, f := range map[string]func(){
		"no judge": func() { New(nil, Options{Now: time.Now}) },
		"no clock": func() { New(&judge{}, Options{}) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("New did not panic")
				}
			}()
			f()
		})
	}
}

// TestClockPanicsAfterFlight: the answer is handed out, is not kept, and nothing
// hangs.
func TestClockPanicsAfterFlight(t *testing.T) {
	cl := newClock()
	var broken atomic.Int64 // readings that panic: how long it took, and whether it is kept
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		broken.Store(2)
		return allow(q, cl.now(), start.Add(time.Hour))
	}}
	c := open(t, j, Options{Now: func() time.Time {
		if broken.Add(-1) >= 0 {
			panic("no clock")
		}
		return cl.now()
	}})
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	expect(t, c.Evaluate(bg, ask("a")), verify.Verified)
	called(t, j, 2)
}

func BenchmarkHit(b *testing.B) {
	cl := newClock()
	c := New(yes(cl, start.Add(time.Hour)), Options{Now: cl.now})
	defer c.Close()
	q := ask("a")
	c.Evaluate(bg, q)
	b.ReportAllocs()
	for b.Loop() {
		if !c.Evaluate(bg, q).Allowed() {
			b.Fatal("denied")
		}
	}
}
