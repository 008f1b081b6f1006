package nri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"

	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify"
)

// retries collects how long a Session said it would wait, and what it said aloud.
type retries struct {
	slog.Handler
	waits []time.Duration
	loud  int
}

func (r *retries) Enabled(context.Context, slog.Level) bool { return true }

func (r *retries) Handle(_ context.Context, rec slog.Record) error {
	if rec.Level > slog.LevelInfo {
		r.loud++
	}
	rec.Attrs(func(a slog.Attr) bool {
		if a.Key == "retry" {
			d, _ := time.ParseDuration(a.Value.String())
			r.waits = append(r.waits, d)
		}
		return true
	})
	return nil
}

// While nobody listens the gate tries again at least twice a second, at times
// that are drawn, and says so once a minute.
func TestRetriesAreDrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &retries{}
		draws := []float64{0, 0.25, 0.5, 0.99}
		s := &Session{
			Gate: &Gate{Resolver: one{}, Verifier: denier{}, Observe: func(Answer) {}, Now: time.Now}, Socket: filepath.Join(t.TempDir(), "none.sock"),
			Log: slog.New(r), Audit: func() bool { return false },
			Random: func() float64 { d := draws[0]; draws = append(draws[1:], d); return d },
		}
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Second)
		defer cancel()
		if err := s.Run(ctx); err != nil {
			t.Fatal(err)
		}
		for i, w := range r.waits {
			if want := []time.Duration{0, minBackoff / 4, minBackoff / 2, minBackoff * 99 / 100}[i%4]; w != want {
				t.Fatalf("wait %d is %v, want %v", i, w, want)
			}
		}
		if len(r.waits) < 300 || r.loud != 3 {
			t.Errorf("%d tries, %d of them said aloud, in 150 s", len(r.waits), r.loud)
		}
		if st := s.State(); st.Registered || !st.Since.IsZero() || !strings.Contains(st.Error, "connect to the runtime") {
			t.Errorf("%+v", st)
		}
	})
}

// A change of mode does not wait for the next try.
func TestRenewEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &retries{}
		s := &Session{
			Gate: &Gate{Resolver: one{}, Verifier: denier{}, Observe: func(Answer) {}, Now: time.Now}, Socket: filepath.Join(t.TempDir(), "none.sock"),
			Log: slog.New(r), Audit: func() bool { return false }, Random: func() float64 { return 0.9 },
		}
		s.Renew() // nothing runs yet
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		for range 5 {
			time.Sleep(time.Millisecond)
			s.Renew()
		}
		synctest.Wait()
		if len(r.waits) != 6 {
			t.Errorf("%d tries, want 6", len(r.waits))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// hung is a Resolver that containerd does not answer.
type hung struct {
	one
	end   chan struct{}
	asked atomic.Int64
}

func (h *hung) Resolve(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	h.asked.Add(1)
	<-h.end
	return nil
}
func (*hung) Known(*api.PodSandbox, *api.Container) ([]verify.Image, bool) { return nil, false }

// Questions that never end are bounded: the next is refused without being asked.
func TestStuckQuestionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hung{end: make(chan struct{})}
		var last atomic.Value // the reason of the last answer
		g := &Gate{Resolver: h, Verifier: denier{}, Observe: func(a Answer) { last.Store(a.Decision.Reason) }, Now: time.Now}
		ask := func() error {
			return g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{})
		}
		for i := range maxStuck {
			if err := ask(); err == nil || last.Load() != verify.Pending || g.Stuck() != i+1 {
				t.Fatalf("%d: %v, %d stuck", i, err, g.Stuck())
			}
		}
		before := time.Now()
		for range 1000 {
			if err := ask(); err == nil || last.Load() != verify.Overloaded {
				t.Fatalf("%v", err)
			}
		}
		if h.asked.Load() != maxStuck || g.Stuck() != maxStuck || time.Since(before) != 0 {
			t.Errorf("asked %d times, %d stuck, %v", h.asked.Load(), g.Stuck(), time.Since(before))
		}
		close(h.end)
		synctest.Wait()
		if g.Stuck() != 0 {
			t.Errorf("%d stuck after the end", g.Stuck())
		}
		// Asked again, and nothing is left of it.
		if err := ask(); err == nil || last.Load() != verify.Internal || g.Stuck() != 0 {
			t.Errorf("%v, %d stuck", err, g.Stuck())
		}
	})
}

func plugins(names ...string) (l []*api.PluginInstance) {
	for _, n := range names {
		index, name, _ := strings.Cut(n, "-")
		l = append(l, &api.PluginInstance{Index: index, Name: name})
	}
	return l
}

func TestPluginList(t *testing.T) {
	const builtin, ours = "00-default-validator", "99-tidewaiter"
	now := time.Unix(1_700_000_000, 0)
	live, asked := 1, 0
	var failed error
	var log bytes.Buffer
	s := &Session{Gate: &Gate{Now: func() time.Time { return now }}, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Live: func() (int, error) { asked++; return live, failed }}
	see := func(after time.Duration, names ...string) {
		now = now.Add(after)
		s.plugins.see(s, plugins(names...))
	}
	expect := func(step string, strangers int, alarms uint64) {
		t.Helper()
		if st := s.State(); st.Strangers != strangers || st.Alarms != alarms {
			t.Errorf("%s: %d strangers, %d alarms; want %d and %d", step, st.Strangers, st.Alarms, strangers, alarms)
		}
	}
	for range 10 {
		see(time.Second, builtin, ours)
	}
	expect("alone", 0, 0)
	if asked != 0 {
		t.Errorf("instances were counted %d times for one plugin", asked)
	}
	if n := testing.AllocsPerRun(100, func() { s.plugins.see(s, nil) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
	l := plugins(builtin, ours)
	if n := testing.AllocsPerRun(100, func() { s.plugins.see(s, l) }); n != 0 {
		t.Errorf("a list that is known takes %v allocations", n)
	}

	live = 2
	for range 5 {
		see(time.Second, builtin, ours, ours)
	}
	expect("an upgrade", 0, 0)
	asked = 0
	for range 1000 {
		see(time.Millisecond, builtin, ours, ours)
	}
	if asked > 2 {
		t.Errorf("instances were counted %d times in a second", asked)
	}

	// The other ended; the runtime still lists it once.
	live = 1
	see(time.Second, builtin, ours, ours)
	see(time.Second, builtin, ours)
	expect("the end of an upgrade", 0, 0)

	// Whatever its index is.
	for _, name := range []string{ours, "10-tidewaiter"} {
		see(time.Second, builtin, ours)
		alarms := s.State().Alarms
		see(time.Second, builtin, ours, name)
		expect("seen once", 0, alarms)
		see(time.Second, builtin, ours, name)
		expect("seen twice", 1, alarms+1)
		see(time.Second, builtin, ours, name)
		expect("seen again", 1, alarms+2)
	}
	see(time.Second, builtin, ours)
	expect("gone", 0, 4)
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d lines in a minute:\n%s", n, log.String())
	}

	// Who cannot count expects to be alone.
	live, failed = 9, errors.New("no directory")
	see(time.Minute, ours, ours)
	see(time.Second, ours, ours)
	expect("not counted", 1, 5)
	if n := strings.Count(log.String(), "level=ERROR"); n != 2 {
		t.Errorf("%d lines, want 2:\n%s", n, log.String())
	}

	// A list without end is not kept.
	var many []string
	for i := range 10_000 {
		many = append(many, fmt.Sprintf("%02d-%s", i%100, strings.Repeat("x", 1000)))
	}
	see(time.Second, many...)
	got := s.State().Plugins
	if len(got) != maxPlugins || slices.ContainsFunc(got, func(s string) bool { return len(s) > 80 }) {
		t.Errorf("%d names", len(got))
	}
}

// A hook that exceeds its own time is counted, with how long it took, and logged
// once a minute.
func TestLateHooks(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var log bytes.Buffer
	s := &Session{Gate: &Gate{Now: func() time.Time { return now }}, Log: slog.New(slog.NewTextHandler(&log, nil))}
	hook := func(took time.Duration) {
		start := s.asked()
		now = now.Add(took)
		s.answered(t.Context(), "ValidateContainerAdjustment", start)
	}
	hook(time.Millisecond)
	hook(budget)
	hook(budget + lateTolerance)
	if st := s.State(); st.Late != 0 {
		t.Errorf("%+v", st)
	}
	for _, took := range []time.Duration{2 * time.Second, 7 * time.Second, 3 * time.Second} {
		hook(took)
	}
	if st := s.State(); st.Late != 3 || st.Latest != 7*time.Second || st.UnderWay != 0 {
		t.Errorf("%+v", st)
	}
	if n := strings.Count(log.String(), "exceeded"); n != 1 || !strings.Contains(log.String(), "took=2s") {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

// Where the runtime could not tell the gate of all pods, it is not asked to, and
// nobody connects: that is looked at again until it can.
func TestLargeIsNotRegistered(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	if err := os.WriteFile(socket, nil, 0o600); err != nil { // whoever connects is refused
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, why string
		err       error
		want      string // in State.Error
		wait      time.Duration
	}{
		{"too large", "pod team/p (1024 KiB)", nil, "does not register", 2 * minLargeRetry},
		{"too large, and an error besides", "pod team/p (1024 KiB)", errors.New("cut"), "does not register", 2 * minLargeRetry},
		{"not too large", "", nil, "connect to the runtime", minBackoff / 2},
		{"not known", "", errors.New("no answer"), "connect to the runtime", minBackoff / 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &retries{}
				asked := 0
				s := &Session{
					Gate: &Gate{Resolver: one{}, Verifier: denier{}, Observe: func(Answer) {}, Now: time.Now}, Socket: socket,
					Log: slog.New(r), Audit: func() bool { return false }, Random: func() float64 { return 0.5 },
					Large: func(ctx context.Context) (string, error) {
						if _, ok := ctx.Deadline(); !ok {
							t.Error("it may take for ever")
						}
						asked++
						return tt.why, tt.err
					},
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := s.Run(ctx); err != nil {
					t.Fatal(err)
				}
				st := s.State()
				if st.Registered || !strings.Contains(st.Error, tt.want) || tt.why != "" && !strings.Contains(st.Error, tt.why) {
					t.Errorf("%+v", st)
				}
				if len(r.waits) < 2 || asked < len(r.waits) || r.waits[1] != tt.wait {
					t.Errorf("asked %d times, waits are %v", asked, r.waits)
				}
			})
		})
	}
}

// To enforce, pods that the gate would have refused are taken away, and it is looked
// again at once. In audit, and where nothing can be taken, it waits.
func TestClear(t *testing.T) {
	for name, tt := range map[string]struct {
		audit  bool
		there  int // pods that keep the gate from registering
		taken  int // of these, those that can be taken away
		round  int // how many a round
		err    error
		rounds int // in which Clear is called
		large  bool
	}{
		"all in one round":    {there: 5, taken: 5, round: 8, rounds: 1},
		"in three":            {there: 20, taken: 20, round: 8, rounds: 3},
		"one has a container": {there: 5, taken: 4, round: 8, rounds: 2, large: true},
		"in audit":            {audit: true, there: 5, taken: 5, round: 8, large: true},
		"CRI does not answer": {there: 5, round: 8, err: errors.New("no answer"), rounds: 1, large: true},
		"they come back":      {there: 1000, taken: 1000, round: 1, rounds: clearRounds, large: true},
	} {
		t.Run(name, func(t *testing.T) {
			there, rounds := tt.there, 0
			s, _ := session(t, func() bool { return tt.audit }, func(context.Context) (string, error) {
				if there > 0 {
					return "pod team/p", nil
				}
				return "", nil
			})
			s.Socket = t.TempDir()
			s.Clear = func(ctx context.Context) (int, error) {
				if _, ok := ctx.Deadline(); !ok {
					t.Error("it may take for ever")
				}
				rounds++
				n := min(tt.round, there-(tt.there-tt.taken))
				there -= n
				return n, tt.err
			}
			if err := s.large(t.Context()); errors.Is(err, errLarge) != tt.large || rounds != tt.rounds {
				t.Errorf("%v after %d rounds, want %d", err, rounds, tt.rounds)
			}
		})
	}
}

// What cannot be found out keeps the gate away only after a registration that did not
// get through.
func TestLargeIsNotKnown(t *testing.T) {
	s := &Session{Socket: t.TempDir(), Large: func(context.Context) (string, error) { return "", errors.New("no answer") }}
	if err := s.large(t.Context()); err != nil {
		t.Error(err)
	}
	s.failed = true
	if err := s.large(t.Context()); err == nil || errors.Is(err, errLarge) {
		t.Error(err)
	}
	s.Socket += "/none"
	if err := s.large(t.Context()); err != nil {
		t.Errorf("nobody is there: %v", err)
	}
}

// there is a Resolver that finds an image.
type there struct{ elsewhere }

func (r there) Resolve(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image {
	return r.Started(ctx, pod, ctr)
}

// counts is a Tally that refuses a pod's third container.
type counts map[string][]string

func (c counts) Refuses(pod string, podBytes int, container string, bytes int) *verify.Fault {
	if len(c[pod]) < 3 { // the pod and two
		return nil
	}
	return &verify.Fault{Reason: verify.PodTooLarge, Detail: "as told"}
}

func (c counts) Allowed(pod string, podBytes int, container string, bytes int) {
	c[pod] = append(c[pod], container)
}

// A pod or container that is too long is refused under every configuration that
// enforces, before it is looked at, and so is one of which a pod has too many. What is
// let in is counted, and what is refused is not.
func TestTooLong(t *testing.T) {
	pod, ctr := &api.PodSandbox{Id: "p", Name: "p", Namespace: "team"}, &api.Container{Id: "c", Name: "main"}
	request := &api.ValidateContainerAdjustmentRequest{Pod: pod, Container: ctr}
	for name, tt := range map[string]struct {
		bytes   lengths
		before  int // containers of the pod that are there
		audit   bool
		refused bool // as POD_TOO_LARGE
	}{
		"short":                  {bytes: lengths{100, 100}},
		"of unknown length":      {},
		"just short enough":      {bytes: lengths{tally.MaxTold, tally.MaxTold}},
		"a pod":                  {bytes: lengths{tally.MaxTold + 1, 100}, refused: true},
		"a container":            {bytes: lengths{100, tally.MaxTold + 1}, refused: true},
		"one too many":           {bytes: lengths{100, 100}, before: 2, refused: true},
		"one too many, to audit": {bytes: lengths{100, 100}, before: 2, refused: true, audit: true},
		"a container, to audit":  {bytes: lengths{100, tally.MaxTold + 1}, refused: true, audit: true},
		"a pod, to audit":        {bytes: lengths{tally.MaxTold + 1, 0}, refused: true, audit: true},
	} {
		for hook, ask := range map[string]func(*Gate, context.Context) error{
			"RunPodSandbox":               func(g *Gate, ctx context.Context) error { return g.RunPodSandbox(ctx, pod) },
			"ValidateContainerAdjustment": func(g *Gate, ctx context.Context) error { return g.ValidateContainerAdjustment(ctx, request) },
			"CreateContainer":             func(g *Gate, ctx context.Context) error { return g.CreateContainer(ctx, pod, ctr, true) },
		} {
			t.Run(name+" "+hook, func(t *testing.T) {
				counted := counts{"p": {""}}
				for range tt.before {
					counted.Allowed("p", 0, "other", 0)
				}
				before := len(counted["p"])
				said := verify.Reason("")
				var e verify.Decider
				e.Swap(&verify.Snapshot{Policy: lists("sha256:d")})
				if tt.audit {
					e.Swap(&verify.Snapshot{Mode: verify.Audit, Policy: nothing{}})
				}
				g := &Gate{Resolver: there{}, Verifier: &e, Tally: counted, Now: time.Now, Node: "n", Observe: func(a Answer) {
					if a.Image.Fault != nil {
						said = a.Image.Fault.Reason
					}
				}}
				refused, bytes := tt.refused, tt.bytes
				if hook == "RunPodSandbox" {
					bytes.container = 0
					refused = bytes.pod > tally.MaxTold
				}
				err := ask(g, withLengths(t.Context(), &bytes))
				if refused != (said == verify.PodTooLarge) || tt.audit && err != nil {
					t.Fatalf("%v: said %q", err, said)
				}
				if grew := len(counted["p"]) > before; grew != (err == nil) {
					t.Errorf("counted %t, and the answer is %v", grew, err)
				}
			})
		}
	}
}

// What lean notes is how long the pod or the container is, before anything of it is
// dropped.
func TestLeanMeasures(t *testing.T) {
	pod, ctr := creation().Pod, told()
	for _, m := range []proto.Message{
		creation(), &api.CreateContainerRequest{Pod: pod, Container: ctr}, &api.StartContainerRequest{Pod: pod, Container: ctr},
		&api.StateChangeEvent{Event: api.Event_START_CONTAINER, Pod: pod, Container: ctr},
		&api.RunPodSandboxRequest{Pod: pod}, &api.StateChangeEvent{Event: api.Event_RUN_POD_SANDBOX, Pod: pod},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		want := lengths{pod: proto.Size(pod)}
		if m.ProtoReflect().Descriptor().Name() != "RunPodSandboxRequest" && len(raw) > proto.Size(ctr) {
			want.container = proto.Size(ctr)
		}
		var size lengths
		got := m.ProtoReflect().New().Interface()
		if err := lean(decoder(raw), &size)(got); err != nil || size.pod < want.pod || size.pod > want.pod+8 || size.container < want.container || size.container > want.container+8 {
			t.Errorf("%T: %d bytes, want %d (%v)", m, size, want, err)
		}
		again, _ := proto.Marshal(got)
		if len(again) >= len(raw) || bytes.Contains(again, []byte("hunter2")) {
			t.Errorf("%T: nothing is dropped: %v", m, got)
		}
	}
}
