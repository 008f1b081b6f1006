package reconcile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// A runtime is the node's containers as a test sets them up, with what is to be
// found about each. It is Containers, Binder and Verifier at once, and safe for
// concurrent use.
type runtime struct {
	mu       sync.Mutex
	list     []containerd.Container
	reasons  map[string]verify.Reason // by what the pod asks for; ErrGone where there is none
	revision verify.Revision
	mode     verify.Mode
	err      error // of Running, after the list
	stopErr  error
	stopped  []string
	at       []time.Time
	checks   int
	counts   int // how often what there is was counted
	asked    []verify.Image
}

func (r *runtime) Running(ctx context.Context, yield func(containerd.Container) bool) error {
	r.mu.Lock()
	list, err := slices.Clone(r.list), r.err
	r.checks++
	r.mu.Unlock()
	for _, c := range list {
		if !yield(c) {
			return nil
		}
	}
	return err
}

func (r *runtime) Container(_ context.Context, id string) (containerd.Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.list {
		if c.ID == id {
			return c, nil
		}
	}
	return containerd.Container{}, containerd.ErrNotFound
}

func (r *runtime) Stop(_ context.Context, id string, _ time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopErr != nil {
		return r.stopErr
	}
	r.stopped, r.at = append(r.stopped, id), append(r.at, time.Now())
	r.list = slices.DeleteFunc(slices.Clone(r.list), func(c containerd.Container) bool { return c.ID == id })
	return nil
}

// binder is separate since its method has the name of another.
type binder struct{ *runtime }

func (b binder) Running(_ context.Context, c containerd.Container) ([]verify.Image, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	img := verify.Image{Asked: c.Image, Name: verify.Name{Host: "r.example", Path: c.Image}, Use: verify.UsePrefetch, Pod: c.Pod, Revision: b.revision}
	if _, ok := b.reasons[c.Image]; !ok {
		return []verify.Image{img}, containerd.ErrGone
	}
	list := []verify.Image{img}
	for _, m := range c.Mounts {
		first, more, _ := strings.Cut(m, ",")
		v := verify.Image{Name: verify.Name{Path: first}, Use: verify.UseVolume, Revision: b.revision}
		if more != "" {
			v.Names = []verify.Name{{Path: more}}
		}
		list = append(list, v)
	}
	return list, nil
}

// decider makes decisions as the program does, from the reasons.
func (r *runtime) decider() verify.Verifier {
	return verifier(func(ctx context.Context, img verify.Image) verify.Decision {
		r.mu.Lock()
		reason, revision, mode := r.reasons[img.Name.Path], r.revision, r.mode
		r.asked = append(r.asked, img)
		r.mu.Unlock()
		img.Target.Digest, img.Manifest.Digest, img.Config, img.Binding = "sha256:t", "sha256:t", "sha256:c", verify.BoundSnapshot
		rule := &verify.Rule{Name: "r", Fixed: reason}
		if reason == verify.AllowedByDigest {
			rule.Digest = "sha256:t"
		}
		if reason == verify.Verified {
			rule = &verify.Rule{Name: "r", Fixed: verify.AllowedByDigest, Digest: "sha256:t"}
		}
		var e verify.Decider
		e.Swap(&verify.Snapshot{Revision: revision, Mode: mode, Policy: one{rule}, Evaluator: nil})
		return e.Verify(ctx, img)
	})
}

type one struct{ rule *verify.Rule }

func (o one) Select(verify.Image) *verify.Rule { return o.rule }

type verifier func(context.Context, verify.Image) verify.Decision

func (v verifier) Verify(ctx context.Context, img verify.Image) verify.Decision { return v(ctx, img) }

func cid(n int) string { return fmt.Sprintf("%064x", n) }

func (r *runtime) run(n int, image string) containerd.Container {
	c := containerd.Container{ID: cid(n), Kind: containerd.KindContainer, Image: image, Pod: verify.Pod{Namespace: "shop", Name: fmt.Sprint("pod", n), Container: "app"}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(slices.Clone(r.list), c)
	return c
}

func (r *runtime) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// A swept is a Sweep that runs in a bubble.
type swept struct {
	*RunningCheck
	t      *testing.T
	r      *runtime
	log    *bytes.Buffer // guarded by logMu
	logMu  sync.Mutex
	leader bool
	wall   time.Duration // by which the clock on the wall was set forth
}

func (s *swept) Write(p []byte) (int, error) {
	s.logMu.Lock()
	defer s.logMu.Unlock()
	return s.log.Write(p)
}

// start makes one whose containers are gated up to n.
func start(t *testing.T, rules Rules, n int) (*swept, func()) {
	s := &swept{t: t, r: &runtime{reasons: map[string]verify.Reason{}, revision: rules.Revision, mode: rules.Mode}, log: &bytes.Buffer{}, leader: true}
	began := time.Now()
	uptime := func() time.Duration { return time.Since(began) }
	log := slog.New(slog.NewJSONHandler(s, nil))
	w := NewGated("", log, uptime)
	for i := range n {
		w.Saw(cid(i))
	}
	s.RunningCheck = &RunningCheck{Containers: s.r, Binder: binder{s.r}, Verifier: s.r.decider(), Gated: w, Count: func(context.Context) { s.r.set(func() { s.r.counts++ }) },
		Leader: func() (leads bool) { s.r.set(func() { leads = s.leader }); return leads }, Log: log, Node: "edge-1",
		Now: func() (now time.Time) { s.r.set(func() { now = time.Now().Add(s.wall) }); return now }, Uptime: uptime}
	s.Configure(rules)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	return s, func() { cancel(); wg.Wait() }
}

// pass lets time pass. What the test read before was before what happens then.
func (s *swept) pass(d time.Duration) {
	s.r.set(func() {})
	time.Sleep(d)
	synctest.Wait()
}

// checkNow has a check made.
func (s *swept) checkNow() { s.Wake(); s.pass(2 * minCheckInterval) }

// lines returns "message: container or image" of what was logged since the last call.
func (s *swept) lines() (list []string) {
	s.t.Helper()
	s.logMu.Lock()
	defer s.logMu.Unlock()
	for line := range bytes.Lines(s.log.Bytes()) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			s.t.Fatal(err)
		}
		about, _ := m["container"].(string)
		if about = strings.TrimLeft(about, "0"); about == "" {
			about, _ = m["image"].(string)
		}
		list = append(list, m["msg"].(string)+": "+about)
	}
	s.log.Reset()
	return list
}

func (s *swept) want(what string, lines ...string) {
	s.t.Helper()
	if got := s.lines(); !slices.Equal(got, lines) {
		s.t.Errorf("%s: logged %q, want %q", what, got, lines)
	}
}

var enforcing = Rules{Revision: verify.Revision{1}}

const (
	refused = "a running container would be refused: "
	ungated = "ungated: this container runs, and no gate was asked when it was created: "
	gone    = "nothing can be said of a running container: the node has its image no more: "
)

// Each container is reported once, and again when what is said of it changes.
func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 6)
		defer end()
		s.r.run(1, "good")
		s.r.run(2, "bad")
		s.r.run(3, "pruned")
		s.r.run(4, "listed")
		s.r.run(9, "good")
		s.r.set(func() {
			s.r.list = append(s.r.list, containerd.Container{ID: "ctr-run", Image: "good"})
			s.r.reasons = map[string]verify.Reason{"good": verify.Verified, "bad": verify.PolicyNoMatch, "listed": verify.AllowedByDigest}
		})
		s.pass(time.Hour)
		if s.r.checks != 0 {
			t.Errorf("%d checks before one was asked for", s.r.checks)
		}
		s.checkNow()
		s.want("at first", refused+"2", gone+"3", ungated+"9", ungated+"ctr-run")
		st := s.Status()
		if st.Containers != 6 || st.Ungated != 2 || st.Gone != 1 || st.Reasons[verify.AllowedByDigest] != 4 || st.Reasons[verify.PolicyNoMatch] != 1 ||
			len(st.Findings) != 4 || st.Revision != enforcing.Revision || st.At.IsZero() || st.Error != "" {
			t.Errorf("status %+v", st)
		}
		if f := st.Findings[0]; f.ID != cid(2) || f.Image != "bad" || f.Pod.Namespace != "shop" || f.Pod.Name != "pod2" || f.Reason != verify.PolicyNoMatch || f.Ungated || f.Gone {
			t.Errorf("finding %+v", f)
		}
		for _, img := range s.r.asked {
			if img.Use != verify.UsePrefetch {
				t.Errorf("asked with use %v", img.Use)
			}
		}
		before := s.r.checks
		s.pass(24 * time.Hour)
		if n := s.r.checks - before; n < 24*5-1 || n > 24*6 {
			t.Errorf("%d checks in a day", n)
		}
		s.want("a day later")
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"good": verify.PolicyNoMatch, "bad": verify.Verified, "pruned": verify.Verified, "listed": verify.Verified}
		})
		s.checkNow()
		const fine = "a running container would be allowed again: "
		s.want("when it changed", refused+"1", fine+"2", fine+"3", refused+"9", refused+"ctr-run")
		// One that ended is forgotten.
		s.r.set(func() { s.r.list = nil })
		s.checkNow()
		if s.want("when all ended"); len(s.known)+len(s.unseen)+s.Gated.seen.Len() != 0 {
			t.Errorf("remembers %d, %d and %d", len(s.known), len(s.unseen), s.Gated.seen.Len())
		}
	})
}

// An image volume that would be refused is as bad as an image, and one of its names
// is enough.
func TestVolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 9)
		defer end()
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"good": verify.Verified, "bad": verify.PolicyNoMatch}
			for n, m := range []string{"good", "bad", "bad,good", "good,bad"} {
				s.r.list = append(s.r.list, containerd.Container{ID: cid(n), Kind: containerd.KindContainer, Image: "good", Mounts: []string{m}})
			}
		})
		s.checkNow()
		s.want("volumes", refused+"1")
	})
}

// The first end of all answers about what runs is kept, for each cause.
func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 9)
		defer end()
		day := time.Now().Add(24 * time.Hour)
		ends := map[string]verify.Decision{
			"late":  {Reason: verify.Verified, Until: day.Add(time.Hour), Ends: "signature"},
			"early": {Reason: verify.Verified, Until: day, Ends: "signature"},
			"other": {Reason: verify.Verified, Until: day.Add(time.Minute), Ends: "certificate"},
			"never": {Reason: verify.Verified},
			"bad":   {Reason: verify.Revoked, Until: day.Add(-time.Hour), Ends: "signature"},
		}
		s.Verifier = verifier(func(_ context.Context, img verify.Image) verify.Decision {
			d := ends[img.Name.Path]
			d.Revision = enforcing.Revision
			return d
		})
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"late": "", "never": ""}
			for n, m := range []string{"early", "other", "bad"} {
				s.r.list = append(s.r.list, containerd.Container{ID: cid(n), Kind: containerd.KindContainer, Image: "late", Mounts: []string{m}})
			}
			s.r.list = append(s.r.list, containerd.Container{ID: cid(5), Kind: containerd.KindContainer, Image: "never"})
		})
		s.checkNow()
		got := s.Status().Ends
		if len(got) != 2 || !got["signature"].Equal(day) || !got["certificate"].Equal(day.Add(time.Minute)) {
			t.Errorf("ends %v", got)
		}
		s.r.set(func() { s.r.list = nil })
		s.checkNow()
		if got := s.Status().Ends; len(got) != 0 {
			t.Errorf("of what runs no more: %v", got)
		}
	})
}

// A container that is too long would not come back, whatever its image is. That does not
// hide what else is wrong with it, nor does it get it stopped.
func TestTooLongRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, Rules{Revision: verify.Revision{1}, Stop: true}, 9)
		defer end()
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"good": verify.AllowedByDigest, "bad": verify.PolicyNoMatch}
			for n, image := range []string{"good", "good", "bad", "pruned"} {
				c := containerd.Container{ID: cid(n), Kind: containerd.KindContainer, Image: image}
				if n > 0 {
					c.Long = "longer than 300 KiB"
				}
				s.r.list = append(s.r.list, c)
			}
			s.r.list = append(s.r.list, containerd.Container{ID: cid(5), Kind: containerd.KindSandbox, Image: "good", Long: "longer than 300 KiB"})
		})
		s.checkNow()
		st := s.Status()
		if st.Reasons[verify.AllowedByDigest] != 1 || st.Reasons[verify.PodTooLarge] != 1 || st.Reasons[verify.PolicyNoMatch] != 1 || st.Gone != 1 {
			t.Errorf("%v, and %d gone", st.Reasons, st.Gone)
		}
		for _, f := range st.Findings {
			if f.ID == cid(1) && (f.Reason != verify.PodTooLarge || f.Detail != "longer than 300 KiB") {
				t.Errorf("%+v", f)
			}
		}
		for range 5 {
			s.pass(checkInterval)
		}
		if s.r.counts < 2 || len(s.r.stopped) != 0 {
			t.Errorf("counted %d times, stopped %q", s.r.counts, s.r.stopped)
		}
	})
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 0)
		defer end()
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"pause@sha256:1": verify.Verified, "pause:1": verify.PolicyNoMatch}
			for n, image := range []string{"pause@sha256:1", "pause:1", "pause:1", "pause:0"} {
				s.r.list = append(s.r.list, containerd.Container{ID: cid(n), Kind: containerd.KindSandbox, Image: image})
			}
		})
		s.checkNow()
		s.want("at first", "the pause image is verified: pause@sha256:1", "the pause image is not verified: pause:1",
			"the pause image cannot be verified: the node has what runs no more under that name: pause:0")
		st := s.Status()
		if st.Containers != 0 || st.Ungated != 0 || len(st.Pauses) != 3 || !st.Pauses[0].Pinned || st.Pauses[1].Pinned || !st.Pauses[2].Gone {
			t.Errorf("status %+v", st)
		}
		s.checkNow()
		s.want("again")
		s.r.set(func() { s.r.reasons["pause:1"] = verify.Verified })
		s.checkNow()
		s.want("when it changed", "the pause image is verified: pause:1")
	})
}

// A line of a digest allowlist is for a namespace, and sandboxes are in all of them.
func TestPauseNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 0)
		defer end()
		s.r.set(func() {
			s.r.reasons = map[string]verify.Reason{"pause@sha256:1": verify.AllowedByDigest, "app": verify.Verified}
			for n, kind := range []containerd.Kind{containerd.KindSandbox, containerd.KindContainer} {
				image := []string{"pause@sha256:1", "app"}[n]
				s.r.list = append(s.r.list, containerd.Container{ID: cid(n), Kind: kind, Image: image, Pod: verify.Pod{Namespace: "shop"}})
			}
		})
		s.checkNow()
		s.r.mu.Lock()
		defer s.r.mu.Unlock()
		in := map[string]string{}
		for _, img := range s.r.asked {
			in[img.Name.Path] = img.Pod.Namespace
		}
		if want := map[string]string{"pause@sha256:1": "kube-system", "app": "shop"}; !maps.Equal(in, want) {
			t.Errorf("asked in %v, want %v", in, want)
		}
	})
}

// What cannot be listed is said, and what was known is not news afterwards.
func TestListBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 9)
		defer end()
		s.r.run(1, "bad")
		s.r.set(func() { s.r.reasons["bad"] = verify.PolicyNoMatch })
		s.checkNow()
		s.want("at first", refused+"1")
		list := s.r.list
		s.r.set(func() { s.r.list, s.r.err = nil, errors.New("no answer") })
		s.checkNow()
		s.want("broken", "not all running containers could be looked at: ")
		if st := s.Status(); st.Error != "no answer" {
			t.Errorf("status %+v", st)
		}
		s.r.set(func() { s.r.list, s.r.err = list, nil })
		s.checkNow()
		s.want("mended")
	})
}

// Many containers are looked at and few lines are logged.
func TestManyContainers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, enforcing, 0)
		defer end()
		for n := range maxKnown + 10 {
			s.r.run(n, "bad")
		}
		s.r.set(func() { s.r.reasons["bad"] = verify.PolicyNoMatch })
		s.checkNow()
		if n := len(s.lines()); n != maxLogged+2 {
			t.Errorf("%d lines", n)
		}
		if st := s.Status(); st.Containers != maxKnown || len(st.Findings) != maxFindings || st.Error == "" {
			t.Errorf("%d containers, %d findings, %q", st.Containers, len(st.Findings), st.Error)
		}
	})
}

// Nothing is said of a node without a configuration, nor while one is replaced.
func TestConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, Rules{}, 9)
		defer end()
		s.r.run(1, "bad")
		s.r.set(func() { s.r.reasons["bad"] = verify.PolicyNoMatch })
		s.checkNow()
		s.want("without a configuration")
		s.r.set(func() { s.r.revision = verify.Revision{2} })
		s.Configure(enforcing) // the Verifier is ahead
		s.pass(time.Minute)
		if s.want("between two"); !s.Status().At.IsZero() {
			t.Error("a check counts that was made while the configuration changed")
		}
		s.Configure(Rules{Revision: verify.Revision{2}})
		s.pass(time.Minute)
		s.want("configured", refused+"1")
	})
}

// What is stopped, and what is not.
func TestStop(t *testing.T) {
	stop := Rules{Revision: verify.Revision{1}, Stop: true}
	for name, tt := range map[string]struct {
		rules  Rules
		reason verify.Reason
		change func(*swept) // half way between the two sightings
		want   bool
	}{
		"revoked":               {stop, verify.Revoked, nil, true},
		"report":                {enforcing, verify.Revoked, nil, false},
		"audit":                 {Rules{Revision: verify.Revision{1}, Mode: verify.Audit, Stop: true}, verify.Revoked, nil, false},
		"unsigned":              {stop, verify.SignatureMissing, nil, false},
		"no rule":               {stop, verify.PolicyNoMatch, nil, false},
		"listed by digest":      {stop, verify.AllowedByDigest, nil, false},
		"not the leader":        {stop, verify.Revoked, func(s *swept) { s.leader = false }, false},
		"another configuration": {stop, verify.Revoked, func(s *swept) { s.reconfigure(Rules{Revision: verify.Revision{2}, Stop: true}) }, false},
		"not wanted any more":   {stop, verify.Revoked, func(s *swept) { s.reconfigure(Rules{Revision: verify.Revision{1}}) }, false},
		"audit meanwhile": {stop, verify.Revoked, func(s *swept) {
			s.reconfigure(Rules{Revision: verify.Revision{1}, Mode: verify.Audit, Stop: true})
		}, false},
		"fine in between": {stop, verify.Revoked, func(s *swept) {
			s.r.set(func() { s.r.reasons["app"] = verify.Verified })
			s.checkNow()
			s.r.set(func() { s.r.reasons["app"] = verify.Revoked })
		}, false},
		"the clock jumps": {stop, verify.Revoked, func(s *swept) { s.wall = 1000 * time.Hour; s.checkNow() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, end := start(t, tt.rules, 9)
				defer end()
				s.r.run(1, "app")
				s.r.run(2, "other")
				s.r.set(func() {
					s.r.reasons = map[string]verify.Reason{"app": tt.reason, "other": verify.Verified, "pause": tt.reason}
					s.r.list = append(s.r.list, containerd.Container{ID: cid(3), Kind: containerd.KindSandbox, Image: "pause"}, containerd.Container{ID: cid(4), Image: "app"})
				})
				s.checkNow()
				for range 10 { // often is not long sightInterval
					s.checkNow()
				}
				if len(s.r.stopped) != 0 {
					t.Fatalf("stopped %q at the first sighting", s.r.stopped)
				}
				if tt.change != nil {
					tt.change(s)
				}
				if s.pass(4 * time.Minute); len(s.r.stopped) != 0 {
					t.Fatalf("stopped %q before ten minutes", s.r.stopped)
				}
				s.pass(5 * time.Minute)
				s.checkNow()
				if got := slices.Equal(s.r.stopped, []string{cid(1)}); got != tt.want || !got && len(s.r.stopped) != 0 {
					t.Errorf("stopped %q", s.r.stopped)
				}
				if n := s.Status().Stopped; n != uint64(len(s.r.stopped)) {
					t.Errorf("status says %d", n)
				}
			})
		})
	}
}

func (s *swept) reconfigure(r Rules) {
	s.r.set(func() { s.r.revision, s.r.mode = r.Revision, r.Mode })
	s.Configure(r)
}

// One container a minute is stopped, each is looked at once more before, and what
// CRI does not stop has its turn after the next check.
func TestStopOneAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := start(t, Rules{Revision: verify.Revision{1}, Stop: true}, 9)
		defer end()
		for n := range 6 {
			s.r.run(n, fmt.Sprint("app", n))
			s.r.set(func() { s.r.reasons[fmt.Sprint("app", n)] = verify.Revoked })
		}
		s.checkNow()
		for len(s.r.stopped) < 2 {
			s.pass(time.Second)
		}
		s.r.set(func() {
			s.r.reasons["app2"] = verify.Verified // mended
			s.r.list = slices.Delete(slices.Clone(s.r.list), 1, 2)
			s.r.stopErr = errors.New("cri does not answer")
		})
		s.pass(2 * time.Minute)
		s.r.set(func() { s.r.stopErr = nil })
		s.pass(time.Hour)
		if want := []string{cid(0), cid(1)}; !slices.Equal(s.r.stopped[:2], want) || slices.Contains(s.r.stopped, cid(2)) || len(s.r.stopped) != 4 {
			t.Errorf("stopped %q", s.r.stopped)
		}
		for n := 1; n < len(s.r.at); n++ {
			if d := s.r.at[n].Sub(s.r.at[n-1]); d < stopInterval {
				t.Errorf("%v between two stops", d)
			}
		}
	})
}
