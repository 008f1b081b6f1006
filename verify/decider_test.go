package verify

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type policy func(Image) *Rule

func (p policy) Select(i Image) *Rule { return p(i) }

type judge func(context.Context, Question) Decision

func (j judge) Evaluate(ctx context.Context, q Question) Decision { return j(ctx, q) }

func prod(Image) *Rule { return bound().Rule }

func yes(_ context.Context, q Question) Decision {
	d := allow(q, one(Finding{Reason: Verified, Signed: q.Image.Target.Digest}), start)
	d.Rule, d.Key, d.Binding = "of whoever asked first", q.Key(), BoundDigest
	return d
}

func setup(m Mode) *Snapshot {
	return &Snapshot{Revision: Revision{7}, Mode: m, Policy: policy(prod), Evaluator: judge(yes), Wait: time.Hour}
}

func decider(s *Snapshot) *Decider {
	e := new(Decider)
	e.Swap(s)
	return e
}

func TestVerify(t *testing.T) {
	panics := judge(func(context.Context, Question) Decision { panic("judge") })
	for _, tt := range []struct {
		name   string
		change func(*Snapshot, *Image)
		want   Reason // VERIFIED: allowed
	}{
		{"allowed", func(*Snapshot, *Image) {}, Verified},
		{"denied", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(context.Context, Question) Decision { return Deny(SignerUntrusted, "x") })
		}, SignerUntrusted},
		{"zero answer", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(context.Context, Question) Decision { return Decision{} })
		}, Internal},
		{"an answer that only claims to allow", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(context.Context, Question) Decision { return Deny(Verified, "") })
		}, Internal},
		{"an allow of something else", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(ctx context.Context, q Question) Decision {
				q.Image.Config = of("another config")
				return yes(ctx, q)
			})
		}, Internal},
		{"an allow of nothing", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(ctx context.Context, q Question) Decision {
				d := yes(ctx, q)
				d.Key = Key{}
				return d
			})
		}, Internal},
		{"judge panics", func(s *Snapshot, _ *Image) { s.Evaluator = panics }, Internal},
		{"judge panics with nil", func(s *Snapshot, _ *Image) {
			s.Evaluator = judge(func(context.Context, Question) Decision { panic(nil) })
		}, Internal},
		{"no judge", func(s *Snapshot, _ *Image) { s.Evaluator = nil }, Internal},
		{"policy panics", func(s *Snapshot, _ *Image) { s.Policy = policy(func(Image) *Rule { panic("policy") }) }, Internal},
		{"no policy", func(s *Snapshot, _ *Image) { s.Policy = nil }, Internal},
		{"policy without rule", func(s *Snapshot, _ *Image) { s.Policy = policy(func(Image) *Rule { return nil }) }, PolicyInvalid},
		{"settled", func(s *Snapshot, _ *Image) {
			s.Evaluator, s.Policy = panics, policy(func(Image) *Rule { return &Rule{Fixed: PolicyNoMatch} })
		}, PolicyNoMatch},
		{"settled as an allow", func(s *Snapshot, _ *Image) {
			s.Evaluator, s.Policy = panics, policy(func(Image) *Rule { return &Rule{Fixed: Verified} })
		}, Internal},
		{"settled with a statement", func(s *Snapshot, _ *Image) {
			s.Policy = policy(func(Image) *Rule { r := bound().Rule; r.Fixed = PolicyInvalid; return r })
		}, PolicyInvalid},
		{"zero wait does not forbid what is known", func(s *Snapshot, _ *Image) { s.Wait = 0 }, Verified},
	} {
		for _, m := range []Mode{Enforce, Audit} {
			t.Run(tt.name+" "+m.String(), func(t *testing.T) {
				s, img := setup(m), bound().Image
				tt.change(s, &img)
				check(t, s, img, tt.want)
			})
		}
	}
	for _, tt := range weakened {
		for _, m := range []Mode{Enforce, Audit} {
			t.Run(tt.name+" "+m.String(), func(t *testing.T) {
				q := with(tt.weaken)
				s := setup(m)
				s.Policy = policy(func(Image) *Rule { return q.Rule })
				s.Evaluator = judge(func(_ context.Context, got Question) Decision { return yes(bg, bound()) })
				check(t, s, q.Image, tt.want)
			})
		}
	}
}

// check has img judged under s and looks whether the answer is what enforce says,
// or in audit an allow that keeps it.
func check(t *testing.T, s *Snapshot, img Image, want Reason) {
	t.Helper()
	d := decider(s).Verify(bg, img)
	switch {
	case want == Verified:
		allowed(t, d, Verified)
		if d.Would != "" {
			t.Errorf("enforce would answer %v", d.Would)
		}
	case s.Mode == Audit:
		allowed(t, d, AuditOnly)
		if d.Would != want {
			t.Errorf("enforce would answer %v, want %v", d.Would, want)
		}
	default:
		denied(t, d, want)
		if d.Would != "" {
			t.Errorf("enforce would answer %v", d.Would)
		}
	}
	if d.Revision != s.Revision {
		t.Errorf("revision is %v", d.Revision)
	}
}

// TestAnswerIsAboutThisContainer: rule, key and binding are of the question, and
// not of whoever asked the cache first.
func TestAnswerIsAboutThisContainer(t *testing.T) {
	q := with(func(q *Question) { q.Image.Binding = BoundSnapshot })
	d := decider(setup(Enforce)).Verify(bg, q.Image)
	allowed(t, d, Verified)
	if d.Rule != "prod" || d.Key != q.Key() || d.Binding != BoundSnapshot || d.Revision != (Revision{7}) {
		t.Errorf("decision is %+v", d)
	}
	s := setup(Enforce)
	s.Policy = policy(func(Image) *Rule { return &Rule{Name: "none", Fixed: PolicyNoMatch, Detail: "add a rule"} })
	d = decider(s).Verify(bg, q.Image)
	denied(t, d, PolicyNoMatch)
	if d.Rule != "none" || d.Detail != "add a rule" || d.Key.Target.Digest != q.Image.Target.Digest || d.Binding != BoundSnapshot {
		t.Errorf("decision is %+v", d)
	}
}

// TestAllowlist: a digest that a file lists needs no signature and no judge, once the
// image is bound, and nothing else does.
func TestAllowlist(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Question)
		want   Reason
	}{
		{"target", func(q *Question) { q.Rule.Digest = q.Image.Target.Digest }, AllowedByDigest},
		{"manifest", func(q *Question) { q.Rule.Digest = q.Image.Manifest.Digest }, AllowedByDigest},
		{"config", func(q *Question) { q.Rule.Digest, q.Image.LayersVerified = q.Image.Config, true }, AllowedByDigest},
		{"config, with other layers perhaps", func(q *Question) { q.Rule.Digest = q.Image.Config }, PolicyInvalid},
		{"a volume", func(q *Question) {
			q.Rule.Digest, q.Image.Use, q.Image.Binding, q.Image.LayersVerified = q.Image.Config, UseVolume, BoundSnapshot, true
		}, AllowedByDigest},
		{"other target of the config", func(q *Question) {
			q.Image.Related = []ocispec.Descriptor{desc("other")}
			q.Rule.Digest = of("other")
		}, PolicyInvalid},
		{"another digest, where the layers are known", func(q *Question) { q.Rule.Digest, q.Image.LayersVerified = of("other"), true }, PolicyInvalid},
		{"a rule that settles it as a no", func(q *Question) {
			q.Rule.Digest, q.Rule.Fixed = q.Image.Target.Digest, PolicyNoMatch
		}, PolicyNoMatch},
		{"pinned by the pod, not what runs", func(q *Question) { q.Image.Name.Digest, q.Rule.Digest = of("pinned"), of("pinned") }, PolicyInvalid},
		{"none", func(q *Question) { q.Rule.Digest = "" }, PolicyInvalid},
		{"none, and no config", func(q *Question) {
			q.Rule.Digest, q.Image.Use, q.Image.Binding, q.Image.Config, q.Image.LayersVerified = "", UseQuestion, BoundDigest, "", true
		}, PolicyInvalid},
		{"fault", func(q *Question) {
			q.Rule.Digest, q.Image.Fault = q.Image.Config, &Fault{ImageMismatch, "x"}
		}, ImageMismatch},
		{"not bound", func(q *Question) { q.Rule.Digest, q.Image.Binding = q.Image.Config, 0 }, ImageUnresolved},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := with(func(q *Question) {
				*q.Rule = Rule{Name: "allow/k3s.txt", Fixed: AllowedByDigest, Detail: "listed"}
				tt.change(q)
			})
			s := setup(Enforce)
			s.Policy = policy(func(Image) *Rule { return q.Rule })
			s.Evaluator = judge(func(context.Context, Question) Decision { t.Error("the judge was asked"); return Decision{} })
			d := decider(s).Verify(bg, q.Image)
			if tt.want != AllowedByDigest {
				denied(t, d, tt.want)
				return
			}
			allowed(t, d, AllowedByDigest)
			if d.Rule != "allow/k3s.txt" || d.Signed != q.Rule.Digest || len(d.Signers) != 0 || d.Detail != "listed" {
				t.Errorf("decision is %+v", d)
			}
		})
	}
	// A signature does not stand in for a digest, nor a digest for a signature.
	q := with(func(q *Question) {
		*q.Rule, q.Image.LayersVerified = Rule{Fixed: AllowedByDigest, Digest: q.Image.Config}, true
	})
	denied(t, allow(q, one(good(q)), start), Internal)
	denied(t, allow(q, one(Finding{Reason: Verified, Signed: q.Image.Config}), start), Internal)
	denied(t, allow(q, one(Finding{Reason: AllowedByDigest, Signed: q.Image.Target.Digest}), start), Internal)
	allowed(t, allow(q, one(Finding{Reason: AllowedByDigest, Signed: q.Image.Config}), start), AllowedByDigest)
	denied(t, allow(bound(), one(Finding{Reason: AllowedByDigest, Signed: bound().Image.Config}), start), Internal)
	denied(t, allow(bound(), one(Finding{Reason: AllowedByDigest, Signed: bound().Image.Target.Digest}), start), Internal)
}

// TestVolumeNames: one of the names under which the node keeps the content is
// enough, of a bounded number, and only for a volume.
func TestVolumeNames(t *testing.T) {
	names := func(n int, last string) (list []Name) {
		for i := range n {
			list = append(list, Name{Host: "copy.local", Path: fmt.Sprint("app", i)})
		}
		return append(list, Name{Host: "registry.local", Path: last})
	}
	invalid := func(n int) (list []Name) {
		for i := range n {
			list = append(list, Name{Host: "weak.local", Path: fmt.Sprint("app", i)})
		}
		return list
	}
	for _, tt := range []struct {
		name  string
		use   Use
		names []Name
		want  Reason
	}{
		{"none", UseVolume, nil, PolicyNoMatch},
		{"the last", UseVolume, names(MaxNames-1, "app"), Verified},
		{"beyond the bound", UseVolume, names(MaxNames, "app"), PolicyNoMatch},
		{"another", UseVolume, names(0, "other"), PolicyNoMatch},
		{"before others", UseVolume, append(names(0, "app"), names(3, "other")...), Verified},
		{"behind many that no rule speaks of rightly", UseVolume, append(invalid(MaxRelated+1), names(0, "app")...), Verified},
		{"too long", UseVolume, names(0, strings.Repeat("a", 1000)), PolicyNoMatch},
		{"a container", UseContainer, names(0, "app"), PolicyNoMatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := bound().Image
			img.Use, img.Binding, img.Names = tt.use, BoundSnapshot, tt.names
			img.Name = Name{Host: "aaa.local", Path: "copy"}
			s := setup(Enforce)
			s.Policy = policy(func(i Image) *Rule {
				switch {
				case len(i.Name.Path) > maxName:
					t.Error("the policy was asked about a name that is too long")
				case i.Name.Host == "weak.local":
					return &Rule{Fixed: PolicyInvalid}
				case i.Name.Host == "registry.local" && i.Name.Path != "other":
					return bound().Rule
				}
				return &Rule{Fixed: PolicyNoMatch}
			})
			d := decider(s).Verify(bg, img)
			if tt.want == Verified {
				allowed(t, d, Verified)
			} else {
				denied(t, d, tt.want)
			}
		})
	}
}

// TestVolumeNamesAreBounded: those that are looked into are few, and the answer is
// that about the first.
func TestVolumeNamesAreBounded(t *testing.T) {
	img := bound().Image
	img.Use, img.Binding = UseVolume, BoundSnapshot
	for i := range MaxNames {
		img.Names = append(img.Names, Name{Host: "copy.local", Path: fmt.Sprint("app", i)})
	}
	asked := 0
	s := setup(Enforce)
	s.Evaluator = judge(func(_ context.Context, q Question) Decision {
		if asked++; q.Image.Name.Path == "app" {
			return Deny(SignerUntrusted, "first")
		}
		return Deny(SignatureMissing, "another")
	})
	denied(t, decider(s).Verify(bg, img), SignerUntrusted)
	if asked != 1+MaxRelated {
		t.Errorf("asked %d times", asked)
	}
}

// TestAlias: rules and sources see the name that the configuration gives an image,
// and each name of a volume its own.
func TestAlias(t *testing.T) {
	s := setup(Enforce)
	s.Alias = func(n Name) Name {
		if n.Host == "relocated.local" {
			n.Host = "registry.local"
		}
		return n
	}
	s.Policy = policy(func(i Image) *Rule {
		if i.Name.Host == "registry.local" {
			return bound().Rule
		}
		return &Rule{Fixed: PolicyNoMatch}
	})
	s.Evaluator = judge(func(ctx context.Context, q Question) Decision {
		if q.Image.Name.Host != "registry.local" {
			t.Errorf("the judge was asked about %s", q.Image.Name)
		}
		return yes(ctx, q)
	})
	img := bound().Image
	img.Name.Host = "relocated.local"
	allowed(t, decider(s).Verify(bg, img), Verified)
	img.Name.Host = "other.local"
	denied(t, decider(s).Verify(bg, img), PolicyNoMatch)
	img.Use, img.Binding, img.Names = UseVolume, BoundSnapshot, []Name{{Host: "relocated.local", Path: "app"}}
	allowed(t, decider(s).Verify(bg, img), Verified)
}

// TestFaultIsNotMatched: a policy is not asked about an image that is not bound,
// so that no rule can speak of it.
func TestFaultIsNotMatched(t *testing.T) {
	s := setup(Enforce)
	s.Policy = policy(func(Image) *Rule { t.Error("the policy was asked"); return prod(Image{}) })
	img := bound().Image
	img.Fault = &Fault{ImageAmbiguous, "two records"}
	d := decider(s).Verify(bg, img)
	denied(t, d, ImageAmbiguous)
	if d.Detail != "two records" {
		t.Errorf("detail is %q", d.Detail)
	}
	denied(t, decider(s).Verify(bg, Image{Name: img.Name}), ImageUnresolved)
}

func TestWait(t *testing.T) {
	for _, tt := range []struct {
		name string
		mode Mode
		wait time.Duration
		use  Use
		left func(time.Duration, bool) bool // what is left of ctx, whether it has an end
	}{
		{"enforce waits", Enforce, time.Hour, UseContainer, func(d time.Duration, ends bool) bool { return ends && d > time.Minute && d <= time.Hour }},
		{"enforce without wait", Enforce, 0, UseContainer, func(d time.Duration, ends bool) bool { return ends && d <= 0 }},
		{"audit never waits", Audit, time.Hour, UseContainer, func(d time.Duration, ends bool) bool { return ends && d <= 0 }},
		{"a question waits for its asker", Enforce, time.Nanosecond, UseQuestion, func(_ time.Duration, ends bool) bool { return !ends }},
		{"also in audit", Audit, 0, UseQuestion, func(_ time.Duration, ends bool) bool { return !ends }},
		{"nobody waits ahead of time", Enforce, time.Nanosecond, UsePrefetch, func(_ time.Duration, ends bool) bool { return !ends }},
		{"an image volume is waited for", Enforce, time.Hour, UseVolume, func(d time.Duration, ends bool) bool { return ends && d > time.Minute && d <= time.Hour }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := false
			s := setup(tt.mode)
			s.Wait = tt.wait
			s.Evaluator = judge(func(ctx context.Context, q Question) Decision {
				asked = true
				end, ends := ctx.Deadline()
				if !tt.left(time.Until(end), ends) {
					t.Errorf("ctx ends %v in %v", ends, time.Until(end))
				}
				return Deny(Pending, "")
			})
			img := bound().Image
			img.Use = tt.use
			switch tt.use {
			case UseQuestion:
				img.Binding = BoundDigest
			case UseVolume:
				img.Binding = BoundSnapshot
			}
			decider(s).Verify(bg, img)
			if !asked {
				t.Error("the judge was not asked")
			}
		})
	}
}

// TestSwapDuringAnswer: an answer that was made under a configuration that is not
// in force any more does not count.
func TestSwapDuringAnswer(t *testing.T) {
	strict := setup(Enforce)
	strict.Revision = Revision{8}
	strict.Evaluator = judge(func(context.Context, Question) Decision { return Deny(SignerUntrusted, "") })
	for _, tt := range []struct {
		name     string
		to       *Snapshot
		want     Reason
		revision Revision
	}{
		{"to one that denies", strict, Pending, Revision{8}}, // bound under the old one
		{"to none", nil, PolicyInvalid, Revision{}},
		{"to one that allows", setup(Enforce), Verified, Revision{7}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := new(Decider)
			old := setup(Enforce)
			old.Evaluator = judge(func(ctx context.Context, q Question) Decision {
				if e.Swap(tt.to) != old {
					t.Error("Swap returned another configuration")
				}
				return yes(ctx, q)
			})
			e.Swap(old)
			d := e.Verify(bg, bound().Image)
			if tt.want == Verified {
				allowed(t, d, Verified)
			} else {
				denied(t, d, tt.want)
			}
			if d.Revision != tt.revision || e.Snapshot() != tt.to {
				t.Errorf("revision is %v", d.Revision)
			}
		})
	}
	// Audit that is left while it answers does not let the image run.
	e := new(Decider)
	old := setup(Audit)
	old.Evaluator = judge(func(context.Context, Question) Decision { e.Swap(strict); return Deny(SignatureMissing, "") })
	e.Swap(old)
	denied(t, e.Verify(bg, bound().Image), Pending)
}

// TestSwapAllTheTime: who changes the configuration faster than answers are made
// gets denials, and in audit allows that say why.
func TestSwapAllTheTime(t *testing.T) {
	for _, m := range []Mode{Enforce, Audit} {
		e := new(Decider)
		n := 0
		var fresh func() *Snapshot
		fresh = func() *Snapshot {
			s := setup(m)
			s.Evaluator = judge(func(ctx context.Context, q Question) Decision { n++; e.Swap(fresh()); return yes(ctx, q) })
			return s
		}
		e.Swap(fresh())
		d := e.Verify(bg, bound().Image)
		if n != 2 {
			t.Errorf("%v: judged %d times, want 2", m, n)
		}
		if m == Audit {
			allowed(t, d, AuditOnly)
			if d.Would != Pending {
				t.Errorf("enforce would answer %v", d.Would)
			}
		} else {
			denied(t, d, Pending)
		}
		if d.Detail == "" || d.Revision != (Revision{7}) {
			t.Errorf("%v: decision is %+v", m, d)
		}
	}
}

func TestPanicDetailIsBoundedInMessages(t *testing.T) {
	s := setup(Enforce)
	s.Evaluator = judge(func(context.Context, Question) Decision { panic(strings.Repeat("x\n", 1<<20)) })
	d := decider(s).Verify(bg, bound().Image)
	denied(t, d, Internal)
	if len(d.Detail) > MaxMessage || strings.Contains(d.Detail, "\n") || !strings.HasPrefix(d.Detail, "panic while deciding: x x ") {
		t.Errorf("detail has %d bytes", len(d.Detail))
	}
	checkLine(t, d.Message(bound().Image, "n"))
}

// TestSwapConcurrently is for the race detector: under a configuration that
// denies nothing is allowed once Swap has returned.
func TestSwapConcurrently(t *testing.T) {
	e := decider(setup(Enforce))
	var closed atomic.Bool
	var wg sync.WaitGroup
	var before atomic.Int64
	for range 4 {
		wg.Go(func() {
			for {
				late := closed.Load()
				d := e.Verify(bg, bound().Image)
				if d.Allowed() && late {
					t.Error("allowed after the configuration was taken away")
				}
				if d.Allowed() {
					before.Add(1)
				}
				if late {
					return
				}
			}
		})
	}
	for before.Load() == 0 {
		e.Swap(setup(Enforce))
	}
	e.Swap(nil)
	closed.Store(true)
	wg.Wait()
	denied(t, e.Verify(bg, bound().Image), PolicyInvalid)
}

// What the configuration says about snapshotters and runtimes counts for the
// configuration that says it.
func TestBoundUnderAnotherConfiguration(t *testing.T) {
	img := bound().Image
	img.Revision = Revision{6}
	e := decider(setup(Enforce))
	denied(t, e.Verify(bg, img), Pending)
	img.Use, img.Binding = UseQuestion, BoundDigest // asked about; nothing was bound
	if d := e.Verify(bg, img); d.Reason == Pending {
		t.Errorf("a question: %s", d.Detail)
	}
}

// TestOtherTargetIsNotWhatRuns: an allow that rests on another target of the same
// config is none for an image whose layers nobody checked against that.
func TestOtherTargetIsNotWhatRuns(t *testing.T) {
	q := with(func(q *Question) { q.Image.Related = []ocispec.Descriptor{desc("other")} })
	s := setup(Enforce)
	s.Evaluator = judge(func(_ context.Context, q Question) Decision {
		q.Image.Related = []ocispec.Descriptor{desc("other")} // as when it was asked for a vouched one
		d := allow(q, one(Finding{Reason: Verified, Signed: of("other"), Until: start.Add(time.Hour)}), start)
		d.Key = q.Key()
		return d
	})
	denied(t, decider(s).Verify(bg, q.Image), Internal)
	q.Image.LayersVerified = true
	allowed(t, decider(s).Verify(bg, q.Image), Verified)
	for signed, takes := range map[digest.Digest]bool{
		q.Image.Target.Digest: true, q.Image.Manifest.Digest: true, q.Image.Config: false, of("other"): false, "": false,
	} {
		if got := bound().Accepts(Decision{Signed: signed}); got != takes {
			t.Errorf("an answer that rests on %s is taken: %t", signed, got)
		}
	}
	if (Question{}).Accepts(Decision{}) {
		t.Error("an answer that rests on nothing is taken")
	}
}
