// Package reconcile says of the containers that run whether the gate would let them be
// created now, and whether a gate ever did. It works in the background, outside
// every hook: nothing waits for it, and it lets nothing run.
//
// A node that is told to (runningContainers: stop) has those stopped whose image is revoked.
// That is the one thing that this package does to a container.
package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Containers are those of the node's runtime. [containerd.Containerd] implements it.
type Containers interface {
	// Running hands over what runs, one at a time, until yield returns false.
	Running(ctx context.Context, yield func(containerd.Container) bool) error
	// Container returns one; the error wraps containerd.ErrNotFound where it is gone.
	Container(ctx context.Context, id string) (containerd.Container, error)
	// Stop stops one through CRI.
	Stop(ctx context.Context, id string, grace time.Duration) error
}

// A Binder says which images a container runs. [containerd.Resolver] implements it.
type Binder interface {
	Running(ctx context.Context, c containerd.Container) ([]verify.Image, error)
}

// Rules are what a configuration says about containers that run. The zero Rules
// are those of no configuration: nothing is checked.
type Rules struct {
	Revision verify.Revision
	Mode     verify.Mode
	Stop     bool // stop what is revoked; never in audit
}

// A RunningCheck looks at what runs: when it is woken, and once in a while. All fields are
// required. It is safe for concurrent use; Run is called once.
type RunningCheck struct {
	Containers Containers
	Binder     Binder
	Verifier   verify.Verifier
	Gated      *Gated
	Count      func(context.Context) // corrects the gate's count of what there is, before each check
	Leader     func() bool           // whether this instance is the one that may stop containers
	Log        *slog.Logger
	Node       string               // name of this node in messages
	Now        func() time.Time     // for reports
	Uptime     func() time.Duration // a clock that nobody can set: between two sightings

	rules atomic.Pointer[Rules]
	once  sync.Once
	wake  chan struct{}
	woken atomic.Bool

	// Owned by Run.
	known   map[string]verdict  // of containers that ran in the last check
	pauses  []Pause             // as they were last reported
	unseen  map[string]bool     // containers that were reported as ungated
	sights  map[string]sighting // of what would be stopped
	ripe    []string            // containers to be stopped, one after the other
	stopped time.Duration       // Uptime of the last stop
	lines   int                 // that were logged in this check

	mu     sync.Mutex
	status RunningStatus
}

// A RunningStatus is what the last check found. It is a copy.
type RunningStatus struct {
	At         time.Time // when it ended; zero: there was none
	Error      string    // why it did not see everything; empty: it did
	Revision   verify.Revision
	Containers int                   // that run, without sandboxes
	Reasons    map[verify.Reason]int // what enforce would answer to each of them now, but for the next
	Gone       int                   // of which the node has no image record any more: nothing can be said
	Ungated    int                   // of which no gate was asked when they were created
	Findings   []Finding             // at most 100 of those that would be denied, are gone or ungated
	Pauses     []Pause               // at most 16 images of sandboxes
	Stopped    uint64                // containers since the process began
	Ends       map[string]time.Time  // the first end of an answer about what runs, by what ends then (verify.Finding.Ends)
}

// A Finding is one container.
type Finding struct {
	ID      string
	Image   string // as the pod asks for it
	Pod     verify.Pod
	Reason  verify.Reason // what enforce would answer; empty with Gone
	Detail  string
	Gone    bool
	Ungated bool
}

// A Pause is an image of sandboxes, which start before any hook is asked.
type Pause struct {
	Image  string // as the runtime's configuration names it
	Pinned bool   // by a digest
	Reason verify.Reason
	Detail string
	Gone   bool
}

// A verdict is what was last said of a container.
type verdict struct {
	reason verify.Reason // empty: gone
	detail string
}

// A sighting is when a container was first found to be one to stop, in a row.
type sighting struct {
	revision verify.Revision
	at       time.Duration
}

const (
	checkInterval    = 10 * time.Minute // between two checks, and up to a fifth more
	minCheckInterval = 10 * time.Second // between two checks however often Wake is called
	judgeTimeout     = 2 * time.Minute  // longest that one image may take
	countTimeout     = 30 * time.Second // longest that Count may take
	sightInterval    = 10 * time.Minute // between the two sightings before a container is stopped
	stopInterval     = time.Minute      // between two containers that are stopped
	stopGrace        = 30 * time.Second // until SIGKILL, as a pod has by default
	stopTimeout      = time.Minute      // longest that stopping one may take
	maxKnown         = 4096             // containers that are looked at in one check
	maxFindings      = 100
	maxPauses        = 16

	// pauseNamespace is where the image of sandboxes is judged: it is no pod's own,
	// and one line of a digest allowlist, which counts in a namespace, is to do for all of them.
	pauseNamespace = "kube-system"
	maxLogged      = 100 // lines of one check
)

// stops reports whether a container that runs is to be stopped for that reason.
// What signatures are missing or cannot be found now is none.
func stops(r verify.Reason) bool { return r == verify.Revoked }

// Configure says which configuration is in force. Once Wake was called it wakes.
func (s *RunningCheck) Configure(r Rules) {
	s.rules.Store(&r)
	if s.woken.Load() {
		s.Wake()
	}
}

// Wake asks for a check, soon.
func (s *RunningCheck) Wake() {
	s.once.Do(s.init)
	s.woken.Store(true)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *RunningCheck) init() { s.wake = make(chan struct{}, 1) }

// Status returns what the last check found.
func (s *RunningCheck) Status() RunningStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Reasons, st.Findings, st.Pauses, st.Ends = maps.Clone(st.Reasons), slices.Clone(st.Findings), slices.Clone(st.Pauses), maps.Clone(st.Ends)
	return st
}

// Run checks until ctx ends and returns nil. The first check is the one that is
// asked for with Wake.
func (s *RunningCheck) Run(ctx context.Context) error {
	s.once.Do(s.init)
	s.known, s.unseen, s.sights = map[string]verdict{}, map[string]bool{}, map[string]sighting{}
	s.stopped = -stopInterval
	var due, rest, stop <-chan time.Time
	for {
		wake := s.wake
		if rest != nil {
			wake = nil
		}
		checked := false
		select {
		case <-ctx.Done():
			return nil
		case <-rest:
			rest = nil
		case <-wake:
			checked = true
		case <-due:
			checked = true
		case <-stop:
			s.stopNext(ctx)
		}
		if checked {
			s.check(ctx)
			due, rest = time.After(checkInterval+rand.N(checkInterval/5)), time.After(minCheckInterval)
		}
		if stop = nil; len(s.ripe) > 0 {
			stop = time.After(max(stopInterval-(s.Uptime()-s.stopped), 0))
		}
	}
}

// check looks at everything that runs.
func (s *RunningCheck) check(ctx context.Context) {
	count, cancel := context.WithTimeout(ctx, countTimeout)
	s.Count(count)
	cancel()
	rules := s.rules.Load()
	if rules == nil || rules.Revision == (verify.Revision{}) {
		return // what could be said of a container is that nothing is configured
	}
	s.Gated.settle()
	st := RunningStatus{Revision: rules.Revision, Reasons: map[verify.Reason]int{}, Ends: map[string]time.Time{}}
	known, unseen, sights := map[string]verdict{}, map[string]bool{}, map[string]sighting{}
	alive := map[string]bool{}
	s.lines, s.ripe = 0, nil
	more, stale := false, false
	err := s.Containers.Running(ctx, func(c containerd.Container) bool {
		if more = len(alive) == maxKnown; more {
			return false
		}
		alive[c.ID] = true
		v, img, d := s.judge(ctx, c, st.Ends)
		if stale = d.Revision != rules.Revision && v.reason != ""; stale || ctx.Err() != nil {
			return false
		}
		if c.Kind == containerd.KindSandbox {
			notePause(c, v, &st)
			return true
		}
		st.Containers++
		gated := s.Gated.Has(c.ID)
		known[c.ID] = v
		if v.reason == "" {
			st.Gone++
		} else {
			st.Reasons[v.reason]++
		}
		if !gated {
			st.Ungated++
			unseen[c.ID] = true
		}
		if !fine(v.reason) || !gated {
			if len(st.Findings) < maxFindings {
				st.Findings = append(st.Findings, finding(c, v, !gated))
			}
		}
		s.report(c, v, img, d, gated)
		s.sight(c, v, d, rules, sights)
		return true
	})
	if stale || ctx.Err() != nil {
		return // the configuration is being replaced, and Configure wakes
	}
	if more {
		err = errors.New("more containers run than are looked at")
	}
	if err != nil {
		// What was not seen is not forgotten: it is not news the next time.
		st.Error = text.Clean(err.Error(), verify.MaxMessage)
		s.Log.Warn("not all running containers could be looked at", "error", st.Error)
		merge(known, s.known)
		merge(unseen, s.unseen)
		merge(sights, s.sights)
	} else {
		s.Gated.compact(alive)
	}
	s.reportPauses(st.Pauses)
	if s.lines > maxLogged {
		s.Log.Warn("more was found about running containers than is logged", "lines", s.lines-maxLogged)
	}
	s.known, s.pauses, s.unseen, s.sights = known, st.Pauses, unseen, sights
	st.At = s.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Stopped = s.status.Stopped
	s.status = st
}

// merge adds what old has to now, up to a bound.
func merge[V any](now, old map[string]V) {
	for k, v := range old {
		if _, ok := now[k]; !ok && len(now) < 2*maxKnown {
			now[k] = v
		}
	}
}

// judge says what enforce would answer to c now, to its image and to its volumes.
// Decision and image are those that the verdict comes from. When the first of the
// answers ends is noted in ends.
func (s *RunningCheck) judge(ctx context.Context, c containerd.Container, ends map[string]time.Time) (verdict, verify.Image, verify.Decision) {
	images, err := s.Binder.Running(ctx, c)
	if errors.Is(err, containerd.ErrGone) && len(images) > 0 {
		return verdict{detail: err.Error()}, images[0], verify.Decision{}
	}
	var img verify.Image
	var d verify.Decision
	for _, img = range images {
		if c.Kind == containerd.KindSandbox {
			img.Pod.Namespace = pauseNamespace
		}
		if d = s.verify(ctx, img); !fine(d.EnforceReason()) {
			break
		}
		if first, ok := ends[d.Ends]; d.Ends != "" && !d.Until.IsZero() && (!ok || d.Until.Before(first)) {
			ends[d.Ends] = d.Until
		}
	}
	// A container that the gate would refuse as too long is one that would not come back.
	if c.Long != "" && c.Kind == containerd.KindContainer && len(images) > 0 && fine(d.EnforceReason()) {
		img = images[0]
		img.Fault = &verify.Fault{Reason: verify.PodTooLarge, Detail: c.Long}
		d = s.verify(ctx, img)
	}
	return verdict{d.EnforceReason(), d.Detail}, img, d
}

// verify asks about one image under each of its names, as one that is allowed is
// enough. Nothing starts, and nobody waits.
func (s *RunningCheck) verify(ctx context.Context, img verify.Image) verify.Decision {
	ctx, cancel := context.WithTimeout(ctx, judgeTimeout)
	defer cancel()
	names := img.Names
	img.Use, img.Names = verify.UsePrefetch, nil
	first := s.Verifier.Verify(ctx, img)
	for d, n := first, 0; ; n++ {
		if fine(d.EnforceReason()) {
			return d
		}
		if n == len(names) {
			return first
		}
		img.Name = names[n]
		d = s.Verifier.Verify(ctx, img)
	}
}

// fine reports whether enforce allows with that reason.
func fine(r verify.Reason) bool { return r == verify.Verified || r == verify.AllowedByDigest }

func finding(c containerd.Container, v verdict, ungated bool) Finding {
	const name = 253 // bytes of a name in Kubernetes
	return Finding{
		ID: text.Clean(c.ID, 96), Image: text.Clean(c.Image, 512), Reason: v.reason, Detail: v.detail,
		Pod: verify.Pod{Namespace: text.Clean(c.Pod.Namespace, name), Name: text.Clean(c.Pod.Name, name),
			UID: text.Clean(c.Pod.UID, name), Container: text.Clean(c.Pod.Container, name)},
		Gone: v.reason == "", Ungated: ungated,
	}
}

// report logs what is new about c.
func (s *RunningCheck) report(c containerd.Container, v verdict, img verify.Image, d verify.Decision, gated bool) {
	f := finding(c, v, !gated)
	about := []any{"container", f.ID, "image", f.Image, "namespace", f.Pod.Namespace, "pod", f.Pod.Name, "name", f.Pod.Container}
	if !gated && !s.unseen[c.ID] {
		s.line(slog.LevelWarn, "ungated: this container runs, and no gate was asked when it was created", about...)
	}
	before, again := s.known[c.ID]
	switch {
	case again && before.reason == v.reason, fine(v.reason) && !again:
	case v.reason == "":
		s.line(slog.LevelInfo, "nothing can be said of a running container: the node has its image no more", about...)
	case fine(v.reason):
		s.line(slog.LevelInfo, "a running container would be allowed again", append(about, "reason", v.reason)...)
	default:
		s.line(slog.LevelWarn, "a running container would be refused", "container", f.ID, "decision", d.Report(img, s.Node))
	}
}

// line logs, up to a number of lines a check.
func (s *RunningCheck) line(level slog.Level, msg string, args ...any) {
	if s.lines++; s.lines <= maxLogged {
		s.Log.Log(context.Background(), level, msg, args...)
	}
}

// notePause notes the image of a sandbox, of which there are few: of each what is
// worst counts.
func notePause(c containerd.Container, v verdict, st *RunningStatus) {
	p := Pause{Image: text.Clean(c.Image, 512), Reason: v.reason, Detail: v.detail, Gone: v.reason == ""}
	p.Pinned = strings.Contains(p.Image, "@")
	i := slices.IndexFunc(st.Pauses, func(o Pause) bool { return o.Image == p.Image })
	switch {
	case i < 0 && len(st.Pauses) < maxPauses:
		st.Pauses = append(st.Pauses, p)
	case i >= 0 && fine(st.Pauses[i].Reason):
		st.Pauses[i] = p
	}
}

func (s *RunningCheck) reportPauses(list []Pause) {
	for _, p := range list {
		if slices.ContainsFunc(s.pauses, func(o Pause) bool { return o.Image == p.Image && o.Reason == p.Reason }) {
			continue
		}
		level, msg := slog.LevelWarn, "the pause image is not verified"
		if fine(p.Reason) {
			level, msg = slog.LevelInfo, "the pause image is verified"
		} else if p.Gone {
			msg = "the pause image cannot be verified: the node has what runs no more under that name"
		}
		s.line(level, msg, "image", p.Image, "pinned", p.Pinned, "reason", p.Reason, "detail", p.Detail)
	}
}

// sight notes a container that is to be stopped. The second sighting that is long
// enough after the first, under the same configuration and by a clock that nobody
// can set, puts it on the list.
func (s *RunningCheck) sight(c containerd.Container, v verdict, d verify.Decision, rules *Rules, sights map[string]sighting) {
	if !s.mayStop(c, v, d, rules) {
		return
	}
	first, ok := s.sights[c.ID]
	if now := s.Uptime(); !ok || first.revision != rules.Revision {
		first = sighting{rules.Revision, now}
	} else if now-first.at >= sightInterval {
		s.ripe = append(s.ripe, c.ID)
	}
	sights[c.ID] = first
}

// mayStop reports whether the configuration in force wants c to be stopped.
func (s *RunningCheck) mayStop(c containerd.Container, v verdict, d verify.Decision, rules *Rules) bool {
	return rules.Stop && rules.Mode == verify.Enforce && c.Kind == containerd.KindContainer &&
		stops(v.reason) && !d.Allowed() && d.Revision == rules.Revision
}

// stopNext stops the container that is on the list first, if what is known of it
// still holds.
func (s *RunningCheck) stopNext(ctx context.Context) {
	id := s.ripe[0]
	s.ripe = s.ripe[1:]
	rules := s.rules.Load()
	if !s.Leader() {
		return
	}
	c, err := s.Containers.Container(ctx, id)
	if err != nil {
		return // it is gone, or has its turn after the next check
	}
	v, img, d := s.judge(ctx, c, map[string]time.Time{})
	first, ok := s.sights[id]
	if !ok || first.revision != rules.Revision || s.Uptime()-first.at < sightInterval || !s.mayStop(c, v, d, rules) || s.rules.Load() != rules {
		return
	}
	s.stopped = s.Uptime()
	stop, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := s.Containers.Stop(stop, id, stopGrace); err != nil {
		s.Log.Error("a container that is to be stopped could not be", "container", id, "error", err.Error())
		return
	}
	delete(s.sights, id)
	s.mu.Lock()
	s.status.Stopped++
	s.mu.Unlock()
	s.Log.Warn("stopped a running container", "container", id, "decision", d.Report(img, s.Node))
}
