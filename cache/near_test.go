package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

func always(verify.Name) bool { return true }

// TestNear: what is on the node is asked first, and what it does not allow goes on to the
// Judge behind if that can find more.
func TestNear(t *testing.T) {
	for _, tt := range []struct {
		name      string
		near, far verify.Reason // INTERNAL: it panics
		beyond    bool
		want      verify.Reason
		nears     int64
		fars      int64
		kept      bool // and the next question is answered by what is kept
	}{
		{"a yes is enough", verify.Verified, verify.SourceUnreachable, true, verify.Verified, 1, 0, true},
		{"a no goes on", verify.SignatureMissing, verify.Verified, true, verify.Verified, 1, 1, true},
		{"to a no", verify.SignatureMissing, verify.SignerUntrusted, true, verify.SignerUntrusted, 1, 1, true},
		{"that settles nothing", verify.SignatureMissing, verify.SourceUnreachable, true, verify.SourceUnreachable, 1, 1, false},
		{"a no is enough if there is no more to ask", verify.SignatureMissing, verify.Verified, false, verify.SignatureMissing, 1, 0, true},
		{"a panic goes on", verify.Internal, verify.Verified, true, verify.Verified, 1, 1, true},
		{"a panic with no more to ask", verify.Internal, verify.Verified, false, verify.Internal, 1, 0, false},
		{"a panic behind", verify.SignatureMissing, verify.Internal, true, verify.Internal, 1, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cl := newClock()
			answers := func(r verify.Reason) *judge {
				return &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
					switch r {
					case verify.Internal:
						panic("a parser")
					case verify.Verified:
						return allow(q, cl.now(), start.Add(time.Hour))
					}
					return verify.Deny(r, "")
				}}
			}
			near, far := answers(tt.near), answers(tt.far)
			observed := 0
			c := open(t, far, Options{Now: cl.now, Near: near, Beyond: func(verify.Name) bool { return tt.beyond },
				Observe: func(verify.Question, verify.Decision) { observed++ }})
			expect(t, c.Evaluate(bg, ask("a")), tt.want)
			called(t, near, tt.nears)
			called(t, far, tt.fars)
			expect(t, c.Evaluate(bg, ask("a")), tt.want)
			if kept := near.calls.Load() == tt.nears; kept != tt.kept {
				t.Errorf("kept %t", kept)
			}
			c.Close()
			if s := c.Stats(); s.Started != s.Ended || s.Started != uint64(observed) {
				t.Errorf("%d observed, stats %+v", observed, s)
			}
		})
	}
}

// TestNearNeedsNoTurn: what is on the node is found however many wait for registries,
// and what they wait for goes on when its turn comes.
func TestNearNeedsNoTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stored := func(q verify.Question) bool { return q.Image.Name.Path == "stored" }
		near := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			time.Sleep(time.Millisecond)
			if stored(q) {
				return allow(q, time.Now(), time.Now().Add(time.Hour))
			}
			return verify.Deny(verify.SignatureMissing, "")
		}}
		far := &judge{f: func(context.Context, verify.Question) verify.Decision {
			time.Sleep(10 * time.Second)
			return verify.Deny(verify.SourceUnreachable, "")
		}}
		c := open(t, far, Options{Now: time.Now, Near: near, Beyond: always})
		for i := range 200 {
			c.Evaluate(ended(), at(ask(fmt.Sprint("bad", i)), fmt.Sprintf("evil%d.example", i), "app"))
			time.Sleep(2 * time.Millisecond)
		}
		if s := c.Stats(); s.Running != 2 || s.Waiting != 64 {
			t.Errorf("stats %+v", s)
		}
		for i := range 30 {
			// Nothing is known of the host.
			expect(t, c.Evaluate(ended(), at(ask(fmt.Sprint("good", i)), "unknown.example", "stored")), verify.Pending)
			time.Sleep(2 * time.Millisecond)
			expect(t, c.Evaluate(ended(), at(ask(fmt.Sprint("good", i)), "unknown.example", "stored")), verify.Verified)
		}
		if far.calls.Load() != 2 {
			t.Errorf("%d verifications behind", far.calls.Load())
		}
		c.Close()
	})
}

// TestNearIsBounded: no more than so many are checked at once, and wait.
func TestNearIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near := &judge{f: func(ctx context.Context, _ verify.Question) verify.Decision {
			<-ctx.Done() // a disk that hangs
			return verify.Deny(verify.SourceUnreachable, "")
		}}
		c := open(t, no(verify.SignatureMissing), Options{Now: time.Now, Near: near, Beyond: always, Flights: 2, Queue: 3})
		for i := range 5 {
			expect(t, c.Evaluate(ended(), at(ask(fmt.Sprint(i)), fmt.Sprint("h", i), "app")), verify.Pending)
		}
		expect(t, c.Evaluate(ended(), at(ask("more"), "h0", "app")), verify.Overloaded)
		synctest.Wait()
		called(t, near, 2)
		if s := c.Stats(); s.Running != 2 || s.Waiting != 3 || s.Overloaded != 1 {
			t.Errorf("stats %+v", s)
		}
		time.Sleep(time.Minute) // Options.Deadline
		synctest.Wait()
		called(t, near, 4)
		c.Close()
	})
}

// TestJoinNear: a container that waits for what is being checked ahead of time does not
// wait ahead of time any more if there is a next step.
func TestJoinNear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		near := &judge{f: func(context.Context, verify.Question) verify.Decision {
			<-release
			return verify.Deny(verify.SignatureMissing, "")
		}}
		var use verify.Use
		far := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			use = q.Image.Use
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, far, Options{Now: time.Now, Near: near, Beyond: always})
		expect(t, c.Evaluate(ended(), aheadOf(ask("a"))), verify.Pending)
		synctest.Wait()
		expect(t, c.Evaluate(ended(), ask("a")), verify.Pending)
		expect(t, c.Evaluate(ended(), ask("a")), verify.Pending)
		release <- struct{}{}
		synctest.Wait()
		expect(t, c.Evaluate(ended(), ask("a")), verify.Verified)
		if use != verify.UseContainer {
			t.Errorf("it was asked with use %d", use)
		}
		called(t, near, 1)
		called(t, far, 1)
		c.Close()
	})
}

// A broken source has no signature and cannot be asked.
type broken struct {
	signed
	name string
	err  error
}

func (b broken) Name() string { return b.name }

func (b broken) Find(context.Context, verify.Name, ocispec.Descriptor, *verify.Budget, func(verify.Evidence) bool) error {
	return b.err
}

// TestNearIsTold: a denial names the sources of both steps and the reason that says most,
// as if one Engine had asked them all.
func TestNearIsTold(t *testing.T) {
	engine := func(list ...verify.Source) *verify.Engine {
		return &verify.Engine{Sources: func(verify.Name) []verify.Source { return list }, Checkers: []verify.Checker{signed{}}, Now: newClock().now}
	}
	silent := fmt.Errorf("a disk that hangs: %w", verify.ErrUnreachable)
	for _, tt := range []struct {
		name      string
		near, far error
	}{
		{"both have none", nil, nil},
		{"near did not answer", silent, nil},
		{"far did not answer", nil, silent},
		{"neither answered", silent, errors.Join(silent, verify.ErrBudget)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := broken{name: "layout /a", err: tt.near}, broken{name: "mirror b", err: tt.far}
			want := engine(a, b).Evaluate(bg, ask("x"))
			c := open(t, engine(b), Options{Near: engine(a), Beyond: always})
			got := c.Evaluate(bg, ask("x"))
			if got.Reason != want.Reason || got.Detail != want.Detail || got.Source != want.Source || !slices.Equal(got.Tried, want.Tried) {
				t.Errorf("\ngot  %v %q %q %v\nwant %v %q %q %v", got.Reason, got.Detail, got.Source, got.Tried, want.Reason, want.Detail, want.Source, want.Tried)
			}
		})
	}
}

// TestBegin: each step is announced, with its end whatever becomes of it.
func TestBegin(t *testing.T) {
	var begun, over int
	c := open(t, &judge{f: func(context.Context, verify.Question) verify.Decision { panic("a parser") }}, Options{
		Near: no(verify.SignatureMissing), Beyond: always,
		Begin: func(q verify.Question) func() {
			if begun++; q.Image.Target.Digest != of("a") {
				t.Errorf("begin with %v", q.Image.Target)
			}
			return func() { over++ }
		},
	})
	expect(t, c.Evaluate(bg, ask("a")), verify.Internal)
	c.Close()
	if begun != 2 || over != 2 {
		t.Errorf("%d begun, %d over", begun, over)
	}
}
