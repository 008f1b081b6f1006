package hook

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"

	gate "github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/verify"
)

// byName hands over the image that the container is named after.
type byName struct{}

func (byName) Resolve(_ context.Context, _ *api.PodSandbox, ctr *api.Container) []verify.Image {
	return []verify.Image{image(ctr.GetName())}
}
func (byName) Known(*api.PodSandbox, *api.Container) ([]verify.Image, bool) { return nil, false }
func (byName) Decided(string, []verify.Image)                               {}
func (byName) Started(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	return nil
}
func (byName) Connected(bool) {}

// run asks for a container with that name, which byName takes for its image.
func (r *runtime) run(ctx context.Context, name string) error {
	defer r.BlockPluginSync().Unblock()
	_, err := r.CreateContainer(ctx, &api.CreateContainerRequest{
		Pod:       &api.PodSandbox{Id: "pod", Name: "p", Namespace: "ns"},
		Container: &api.Container{Id: "c", Name: name, PodSandboxId: "pod"},
	})
	return err
}

// wait waits for what will come.
func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// What is under way when the gate is told to end is answered by the gate, and
// then the connection is closed.
func TestLeaveAnswersWhatIsUnderWay(t *testing.T) {
	for _, tt := range []struct {
		mode verify.Mode
		name string
		want string
	}{
		{verify.Enforce, "good", ""},
		{verify.Enforce, "evil", "[SIGNER_UNTRUSTED]"},
		{verify.Enforce, "hang", "[PENDING]"},
		{verify.Audit, "evil", ""},
	} {
		t.Run(tt.mode.String()+"/"+tt.name, func(t *testing.T) {
			required := []string{gate.PluginName}
			if tt.mode == verify.Audit {
				required = nil
			}
			rt := startRuntimeWith(t, socketDir(t), "v2.4.2", required, nil)
			defer rt.Stop()
			asked := make(chan struct{})
			release := make(chan struct{})
			r := resolves()
			r.resolve = func(context.Context) []verify.Image {
				close(asked)
				<-release
				return []verify.Image{image(tt.name)}
			}
			g := start(t, rt.socket, r, decider(tt.mode))
			g.waitRegistered(t, true)
			answer := make(chan error, 1)
			go func() { answer <- rt.create(context.Background()) }()
			<-asked
			if tt.name == "hang" {
				time.Sleep(800 * time.Millisecond) // it is answered long before the session gives up waiting
			}
			stopped := make(chan struct{})
			go func() { g.stop(); close(stopped) }()
			if tt.name != "hang" {
				// The signal is there long before the answer.
				time.Sleep(200 * time.Millisecond)
				close(release)
			} else {
				defer close(release)
			}
			err := <-answer
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q; log:\n%s", err, tt.want, g.log.String())
			}
			select {
			case <-stopped:
			case <-time.After(time.Minute):
				t.Error("the session does not end")
			}
			g.answers.mu.Lock()
			defer g.answers.mu.Unlock()
			if len(g.answers.list) != 1 {
				t.Errorf("%d answers were given", len(g.answers.list))
			}
		})
	}
}

// creator creates containers all the time, good and evil ones in turn, until stop.
type creator struct {
	rt      *runtime
	pause   time.Duration // between two: a runtime writes a record, a kubelet does other things
	good    atomic.Int64
	evil    atomic.Int64
	refused atomic.Int64 // of the good ones
	escaped atomic.Int64 // of the evil ones
	last    atomic.Value // error of the last good one that was refused
	stop    func()
}

func create(rt *runtime, creators int, pause time.Duration) *creator {
	c := &creator{rt: rt, pause: pause}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range creators {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := rt.run(context.Background(), "good"); err != nil {
					c.refused.Add(1)
					c.last.Store(err.Error())
				}
				c.good.Add(1)
				time.Sleep(pause)
				if rt.run(context.Background(), "evil") == nil {
					c.escaped.Add(1)
				}
				c.evil.Add(1)
				time.Sleep(pause)
			}
		})
	}
	c.stop = func() { cancel(); wg.Wait() }
	return c
}

// During an upgrade two gates are registered under one name: the runtime asks
// both. One of them ends while containers are created all the time: nothing
// escapes, and at the pace of a node nothing good is refused. In a flood, where
// the next request is there before the runtime knows that a gate has gone, that
// one is refused; the same can happen once to a machine that stood still meanwhile.
func TestUpgrade(t *testing.T) {
	const upgrades = 8
	for label, tt := range map[string]struct {
		creators int
		pause    time.Duration
		refused  int64 // at most, of all upgrades
	}{
		"node":  {1, 25 * time.Millisecond, 1},
		"flood": {2, 0, upgrades},
	} {
		t.Run(label, func(t *testing.T) {
			rt := startRuntime(t, socketDir(t), "v2.4.2")
			defer rt.Stop()
			dir := t.TempDir()
			begin := func() (*running, *gate.Instance) {
				i, err := gate.Join(dir)
				if err != nil {
					t.Fatal(err)
				}
				g := prepare(rt.socket, byName{}, decider(verify.Enforce))
				g.Live = i.Live
				g.begin(t)
				g.waitRegistered(t, true)
				return g, i
			}
			old, oldInstance := begin()
			c := create(rt, tt.creators, tt.pause)
			for range upgrades {
				young, youngInstance := begin()
				wait(t, "both are asked", func() bool { return len(young.State().Plugins) == 3 })
				if s := young.State(); fmt.Sprint(s.Plugins) != "[00-default-validator 99-tidewaiter 99-tidewaiter]" || s.Alarms != 0 {
					t.Errorf("%+v", s)
				}
				old.stop()
				if err := oldInstance.Leave(); err != nil {
					t.Error(err)
				}
				before := c.evil.Load()
				wait(t, "containers are created on", func() bool { return c.evil.Load() > before+10 })
				if s := young.State(); !s.Registered || s.Registrations != 1 || len(s.Plugins) != 2 || s.Alarms != 0 {
					t.Errorf("%+v\n%s", s, young.log.String())
				}
				old, oldInstance = young, youngInstance
			}
			c.stop()
			t.Logf("%d upgrades, %d good containers, of them %d refused, %d evil, of them %d escaped", upgrades, c.good.Load(), c.refused.Load(), c.evil.Load(), c.escaped.Load())
			if c.escaped.Load() > 0 || c.refused.Load() > tt.refused {
				t.Errorf("last: %v", c.last.Load())
			}
			old.stop()
			if err := oldInstance.Leave(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The only gate of a node ends in a flood: nothing escapes. NRI 0.12.5 would let
// through what it is asked about between counting the gate and missing it.
func TestLeaveLetsNothingThrough(t *testing.T) {
	rt := startRuntime(t, socketDir(t), "v2.4.2")
	defer rt.Stop()
	c := create(rt, 2, 0)
	for range 4 {
		g := start(t, rt.socket, byName{}, decider(verify.Enforce))
		g.waitRegistered(t, true)
		g.stop()
	}
	c.stop()
	t.Logf("%d evil containers, of them %d escaped", c.evil.Load(), c.escaped.Load())
	if c.escaped.Load() > 0 {
		t.Error("escaped")
	}
}

// 200 times the runtime restarts as another version or drops the gate. It is
// registered with anew each time, with the mask of that version, and nothing grows.
func TestReconnects200(t *testing.T) {
	dir := socketDir(t)
	versions := []string{"v2.4.2", "2.3.7", "2.4.2+unknown", "v2.2.9"} // with and without the image field
	rt := startRuntime(t, dir, versions[0])
	socket := filepath.Join(dir, "link.sock")
	l := newLink(t, socket, rt.socket)
	r := resolves(image("good"))
	g := prepare(socket, r, decider(verify.Enforce))
	g.Random = func() float64 { return 0.001 } // quick, for the test
	g.begin(t)
	created := func() bool { return rt.create(context.Background()) == nil }
	wait(t, "the gate holds", created)
	var base usage
	for i := range 200 {
		if i == 20 {
			base = measure(t)
		}
		if i%2 == 0 {
			l.cut()
		} else {
			rt.Stop()
			l.close()
			rt = startRuntime(t, dir, versions[(i/2)%len(versions)])
			if created() {
				t.Fatal("let through while the gate was away")
			}
			l = newLink(t, socket, rt.socket)
		}
		wait(t, "the gate holds again", created)
		if i%2 == 1 {
			if want := (i/2)%2 == 1; r.compares.Load() != want {
				t.Fatalf("version %s: compares at StartContainer is %t", versions[(i/2)%len(versions)], !want)
			}
		}
	}
	g.waitRegistered(t, true)
	// What a closed connection leaves behind ends a moment later.
	var now usage
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		now = measure(t)
		if now.goroutines <= base.goroutines && now.files <= base.files && now.heap < base.heap+2<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("grew from %+v to %+v", base, now)
		}
	}
	t.Logf("after 20 reconnects %+v, after 200 %+v", base, now)
	g.stop()
	l.close()
	rt.Stop()
}

type usage struct {
	goroutines, files int
	heap              uint64
}

// measure counts for this process, the runtime's side included.
func measure(t *testing.T) usage {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	goruntime.GC()
	goruntime.GC()
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	return usage{goruntime.NumGoroutine(), len(files), m.HeapAlloc}
}

// Whatever stands where the socket should be: the gate tries on, says so, and is
// registered once a runtime is there.
func TestNoRuntime(t *testing.T) {
	for label, put := range map[string]func(t *testing.T, path string){
		"nothing":  func(*testing.T, string) {},
		"a file":   func(t *testing.T, path string) { os.WriteFile(path, []byte("x"), 0o600) },
		"a folder": func(t *testing.T, path string) { os.Mkdir(path, 0o700) },
		"a dead end": func(t *testing.T, path string) {
			os.Symlink(filepath.Join(filepath.Dir(path), "nowhere"), path)
		},
		"nobody": func(t *testing.T, path string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		},
		"one that hangs up": func(t *testing.T, path string) {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					c.Close()
				}
			})
			t.Cleanup(func() { l.Close(); wg.Wait() })
		},
	} {
		t.Run(label, func(t *testing.T) {
			dir := socketDir(t)
			socket := filepath.Join(dir, "nri.sock")
			put(t, socket)
			g := prepare(socket, resolves(image("good")), decider(verify.Enforce))
			g.Random = func() float64 { return 0.02 }
			g.begin(t)
			wait(t, "the error is known", func() bool { return g.State().Error != "" })
			wait(t, "it is in the log", func() bool { return strings.Contains(g.log.String(), "level=ERROR") })
			if s := g.State(); s.Registered || s.Registrations != 0 || s.ErrorAt.IsZero() {
				t.Errorf("%+v", s)
			}
			os.Remove(socket)
			rt := startRuntime(t, dir, "v2.4.2")
			defer rt.Stop()
			g.waitRegistered(t, true)
			if s := g.State(); s.Registrations != 1 || s.Runtime != "containerd" || s.Version != "v2.4.2" || s.Since.IsZero() || fmt.Sprint(s.Hooks) != "[RunPodSandbox ValidateContainerAdjustment]" || s.Audit {
				t.Errorf("%+v", s)
			}
			g.stop()
			if g.State().Registered {
				t.Error("registered after the end")
			}
		})
	}
}

// Another plugin under our name is alarmed and refuses nothing.
func TestStranger(t *testing.T) {
	rt := startRuntime(t, socketDir(t), "v2.4.2")
	defer rt.Stop()
	i, err := gate.Join(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer i.Leave()
	g := prepare(rt.socket, resolves(image("good")), decider(verify.Enforce))
	g.Live = i.Live
	g.begin(t)
	g.waitRegistered(t, true)
	st, err := stub.New(stranger{}, stub.WithPluginName(gate.PluginName), stub.WithPluginIdx("42"), stub.WithSocketPath(rt.socket))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	wait(t, "the stranger is alarmed", func() bool {
		if err := rt.create(context.Background()); err != nil {
			t.Fatalf("refused: %v", err)
		}
		return g.State().Alarms > 1
	})
	if s := g.State(); s.Strangers != 1 || fmt.Sprint(s.Plugins) != "[00-default-validator 42-tidewaiter 99-tidewaiter]" {
		t.Errorf("%+v", s)
	}
	if n := strings.Count(g.log.String(), "under the name of the gate"); n != 1 {
		t.Errorf("%d lines in the log, want 1:\n%s", n, g.log.String())
	}
	st.Stop()
	wait(t, "the stranger is gone", func() bool {
		_ = rt.create(context.Background())
		return g.State().Strangers == 0
	})
	g.stop()
}

type stranger struct{}

func (stranger) ValidateContainerAdjustment(context.Context, *api.ValidateContainerAdjustmentRequest) error {
	return nil
}

// A process that is stopped in a hook exceeds the runtime's deadline. A runtime
// that knows the failure policy refuses that one container and keeps the gate.
func TestLateHook(t *testing.T) {
	rt := startRuntime(t, socketDir(t), "v2.4.2")
	defer rt.Stop()
	adaptation.SetPluginRequestTimeout(2 * time.Second) // containerd's
	g := prepare(rt.socket, resolves(image("good")), decider(verify.Enforce))
	stopped := make(chan struct{})
	var once sync.Once
	g.Gate.Observe = func(gate.Answer) { once.Do(func() { <-stopped }) }
	g.begin(t)
	g.waitRegistered(t, true)
	if err := rt.create(context.Background()); err == nil || !strings.Contains(err.Error(), "deadline exceeded") {
		t.Fatalf("got %v", err)
	}
	if s := g.State(); s.UnderWay != 1 {
		t.Errorf("%+v", s)
	}
	close(stopped)
	wait(t, "the hook is counted", func() bool { s := g.State(); return s.UnderWay == 0 && s.Stuck == 0 })
	for range 3 {
		if err := rt.create(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if s := g.State(); !s.Registered || s.Registrations != 1 || s.Late != 1 || s.Latest < 1700*time.Millisecond {
		t.Errorf("%+v\n%s", s, g.log.String())
	}
	g.stop()
}

// The kubelet may have given up while its request waited for the runtime's lock.
// The gate answers that one too, at once, and keeps its connection.
func TestExpiredRequest(t *testing.T) {
	rt := startRuntime(t, socketDir(t), "v2.4.2")
	defer rt.Stop()
	r := resolves()
	// Set before any request: one whose caller gave up long ago may still be on
	// its way when the test goes on.
	var answers atomic.Bool
	r.resolve = func(ctx context.Context) []verify.Image {
		if !answers.Load() {
			<-ctx.Done()
		}
		return []verify.Image{image("good")}
	}
	g := start(t, rt.socket, r, decider(verify.Enforce))
	g.waitRegistered(t, true)
	expired, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Minute))
	defer cancel()
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for i := range 40 {
		if err := rt.create([]context.Context{expired, cancelled}[i%2]); err == nil {
			t.Fatal("let through")
		}
	}
	wait(t, "all were answered", func() bool {
		g.answers.mu.Lock()
		defer g.answers.mu.Unlock()
		return len(g.answers.list) >= 40 && g.State().UnderWay == 0 && g.State().Stuck == 0
	})
	answers.Store(true)
	if err := rt.create(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := g.State(); !s.Registered || s.Registrations != 1 {
		t.Errorf("the connection was lost: %+v\n%s", s, g.log.String())
	}
	g.stop()
}

// oldRuntime is how a containerd older than 2.2 treats a plugin (NRI 0.8,
// pkg/adaptation/plugin.go): it refuses events that it does not know.
type oldRuntime struct {
	conn       net.Conn
	mux        multiplex.Mux
	registered chan struct{}
}

func (o oldRuntime) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	close(o.registered)
	return &api.Empty{}, nil
}

func (oldRuntime) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return &api.UpdateContainersResponse{}, nil
}

// serve configures one plugin, asks it whether it may create a container until
// that ends, and returns how often it did.
func (o oldRuntime) serve(version string) (asked int) {
	const known = 1<<13 - 1 // the last is PostUpdatePodSandbox
	o.mux = multiplex.Multiplex(o.conn)
	defer o.mux.Close()
	l, err := o.mux.Listen(multiplex.RuntimeServiceConn)
	if err != nil {
		return 0
	}
	s, err := ttrpc.NewServer()
	if err != nil {
		return 0
	}
	api.RegisterRuntimeService(s, o)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.Close()
	wg.Go(func() { _ = s.Serve(context.Background(), l) })
	conn, err := o.mux.Open(multiplex.PluginServiceConn)
	if err != nil {
		return 0
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	p := api.NewPluginClient(client)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	select {
	case <-o.registered:
	case <-ctx.Done():
		return 0
	}
	rpl, err := p.Configure(ctx, &api.ConfigureRequest{RuntimeName: "containerd", RuntimeVersion: version, RegistrationTimeout: 5000, RequestTimeout: 2000})
	if err != nil || rpl.GetEvents()&^known != 0 {
		return 0
	}
	if _, err := p.Synchronize(ctx, &api.SynchronizeRequest{}); err != nil {
		return 0
	}
	for ; ; asked++ {
		if _, err := p.CreateContainer(ctx, &api.CreateContainerRequest{Pod: &api.PodSandbox{Id: "pod"}, Container: &api.Container{Id: "c"}}); err != nil {
			return asked
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// To enforce on a containerd older than 2.2 is refused, with what to do about it;
// to audit there works.
func TestOldRuntime(t *testing.T) {
	for _, version := range []string{"v2.1.9", "1.7.35", "1.7.24+unknown"} {
		for _, mode := range []verify.Mode{verify.Enforce, verify.Audit} {
			t.Run(version+"/"+mode.String(), func(t *testing.T) {
				socket := filepath.Join(socketDir(t), "nri.sock")
				l, err := net.Listen("unix", socket)
				if err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				var tries, asked atomic.Int64
				wg.Go(func() {
					for {
						conn, err := l.Accept()
						if err != nil {
							return
						}
						tries.Add(1)
						wg.Go(func() {
							asked.Add(int64(oldRuntime{conn: conn, registered: make(chan struct{})}.serve(version)))
						})
					}
				})
				g := prepare(socket, resolves(image("evil")), decider(mode))
				g.Random = func() float64 { return 0.02 }
				g.begin(t)
				if mode == verify.Audit {
					g.waitRegistered(t, true)
					wait(t, "it is asked", func() bool { g.answers.mu.Lock(); defer g.answers.mu.Unlock(); return len(g.answers.list) > 2 })
					if s := g.State(); !s.Audit || s.Version != version || !strings.Contains(fmt.Sprint(s.Hooks), "CreateContainer") {
						t.Errorf("%+v", s)
					}
				} else {
					wait(t, "it is tried again", func() bool { return tries.Load() > 4 })
					// A try whose connection ends before the runtime's version was read says only that.
					wait(t, "it says which version it refuses, and what to do", func() bool {
						s := g.State().Error
						return strings.Contains(s, version) && strings.Contains(s, "upgrade containerd to 2.2 or later, or set mode: audit")
					})
					s := g.State()
					if s.Registered || s.Registrations != 0 || strings.Contains(g.log.String(), "msg=registered") {
						t.Errorf("registered: %+v", s)
					}
					if n := strings.Count(g.log.String(), "level=ERROR msg=\"not registered"); n < 1 || n > 2 {
						t.Errorf("%d lines in the log:\n%s", n, g.log.String())
					}
				}
				g.stop()
				l.Close()
				wg.Wait()
				if (asked.Load() > 2) != (mode == verify.Audit) {
					t.Errorf("asked %d times", asked.Load())
				}
			})
		}
	}
}

// TestSynchronizeCannotBeDelivered: a runtime that cannot tell the gate of what there is
// has none. Everything is refused, the gate says so, and comes back by itself once the
// runtime can.
func TestSynchronizeCannotBeDelivered(t *testing.T) {
	dir := socketDir(t)
	rt := startRuntimeWith(t, dir, "v2.4.2", []string{gate.PluginName}, errors.New("as told"))
	g := start(t, rt.socket, resolves(image("good")), decider(verify.Enforce))
	wait(t, "it says so", func() bool { return strings.Contains(g.State().Error, "before it was synchronised") })
	if err := rt.create(t.Context()); err == nil || !strings.Contains(err.Error(), "not present") {
		t.Errorf("without a gate: %v", err)
	}
	if g.Registered() {
		t.Error("registered although the runtime does not know the gate")
	}
	rt.Stop()
	rt = startRuntime(t, dir, "v2.4.2")
	g.waitRegistered(t, true)
	if err := rt.create(t.Context()); err != nil {
		t.Error(err)
	}
	g.stop()
	rt.Stop()
}
