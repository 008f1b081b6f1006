// Package hook tests the gate against NRI's own adaptation library, the code that
// containerd runs: what happens to a container when the gate answers, hangs,
// panics, is absent, or loses its connection.
package hook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	gate "github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// A runtime is NRI's side of containerd.
type runtime struct {
	*adaptation.Adaptation
	socket string
}

// socketDir is short: unix socket paths have little room.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// startRuntime starts a runtime that requires the gate. It waits much longer for an
// answer than containerd does, 2 s, so that a busy machine is no late gate; the gate's
// own time is not longer for that.
func startRuntime(t *testing.T, dir, version string, containers ...*api.Container) *runtime {
	t.Helper()
	return startRuntimeWith(t, dir, version, []string{gate.PluginName}, nil, containers...)
}

// startRuntimeWith starts one that requires these plugins, and that cannot tell a plugin
// of what there is while unlisted is not nil.
func startRuntimeWith(t *testing.T, dir, version string, required []string, unlisted error, containers ...*api.Container) *runtime {
	t.Helper()
	socket := filepath.Join(dir, "nri.sock")
	var started atomic.Bool // what is asked before is about plugins that containerd starts itself
	adaptation.SetPluginRequestTimeout(time.Minute)
	a, err := adaptation.New("containerd", version,
		func(ctx context.Context, sync adaptation.SyncCB) error {
			if started.Load() && unlisted != nil {
				return unlisted
			}
			pods := make([]*api.PodSandbox, 4) // some, as a node has
			for i := range pods {
				pods[i] = &api.PodSandbox{Id: fmt.Sprint("pod", i)}
			}
			_, err := sync(ctx, pods, containers)
			return err
		},
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")),
		adaptation.WithDefaultValidator(&validator.DefaultValidatorConfig{Enable: true, RequiredPlugins: required}),
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	started.Store(true)
	return &runtime{a, socket}
}

// create asks as containerd does when a container is created.
func (r *runtime) create(ctx context.Context) error {
	defer r.BlockPluginSync().Unblock()
	_, err := r.CreateContainer(ctx, &api.CreateContainerRequest{
		Pod:       &api.PodSandbox{Id: "pod", Name: "p", Namespace: "ns"},
		Container: &api.Container{Id: "c", Name: "main", PodSandboxId: "pod"},
	})
	return err
}

// resolver hands over what it is told to.
type resolver struct {
	resolve  func(context.Context) []verify.Image
	started  func() *verify.Fault // nil: the creation was decided
	compares atomic.Bool
	decided  atomic.Int32
}

func (r *resolver) Resolve(ctx context.Context, _ *api.PodSandbox, _ *api.Container) []verify.Image {
	return r.resolve(ctx)
}
func (r *resolver) Known(*api.PodSandbox, *api.Container) ([]verify.Image, bool) { return nil, false }
func (r *resolver) Decided(string, []verify.Image)                               { r.decided.Add(1) }
func (r *resolver) Started(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	if f := r.started(); f != nil {
		return []verify.Image{{Use: verify.UseContainer, Fault: f}}
	}
	return nil
}
func (r *resolver) Connected(compares bool) { r.compares.Store(compares) }

// image is bound; content says which of the two that the judge below knows.
func image(content string) verify.Image {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(content), Size: 7}
	return verify.Image{
		Name: verify.Name{Host: "registry.example", Path: "app", Tag: "1"}, Target: d, Manifest: d, Config: d.Digest,
		Use: verify.UseContainer, Binding: verify.BoundRuntime, Pod: verify.Pod{Namespace: "ns", Name: "p", Container: "main"},
	}
}

// source, checker and policy make the real Engine say yes to "good" alone.
type source struct{}

func (source) Name() string { return "test" }
func (source) Find(_ context.Context, _ verify.Name, s ocispec.Descriptor, _ *verify.Budget, yield func(verify.Evidence) bool) error {
	yield(verify.Evidence{Manifest: s, Blob: []byte("envelope")})
	return nil
}

// kind is that of the evidence here.
type kind struct{ verify.Kind }

func (kind) Name() string          { return "test" }
func (kind) TagSuffixes() []string { return nil }

type checker struct{}

func (checker) Kind() verify.Kind       { return kind{} }
func (checker) Anchors(string) []string { return nil }

func (checker) Check(_ context.Context, _ verify.Evidence, want ocispec.Descriptor, _ string) verify.Finding {
	if want.Digest == digest.FromString("panic") {
		panic("as told")
	}
	if want.Digest != digest.FromString("good") {
		return verify.Finding{Reason: verify.SignerUntrusted, Detail: "somebody else"}
	}
	return verify.Finding{Reason: verify.Verified, Signed: want.Digest, Until: time.Now().Add(time.Hour)}
}

type policy struct{}

func (policy) Select(verify.Image) *verify.Rule {
	r, err := verify.SignedBy(verify.Leaf{Kind: "test", Authority: "all", Hash: [32]byte{1}})
	if err != nil {
		panic(err)
	}
	return &verify.Rule{Name: "all", Require: r}
}

func decider(mode verify.Mode) *verify.Decider {
	e := &verify.Decider{}
	e.Swap(&verify.Snapshot{Mode: mode, Policy: policy{}, Wait: time.Second, Evaluator: &verify.Engine{
		Sources: func(verify.Name) []verify.Source { return []verify.Source{source{}} }, Checkers: []verify.Checker{checker{}}, Now: time.Now,
	}})
	return e
}

// answers collects what the gate said.
type answers struct {
	mu   sync.Mutex
	list []gate.Answer
}

func (a *answers) observe(x gate.Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, x)
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

type running struct {
	*gate.Session
	answers answers
	log     syncBuffer
	stop    func()
}

// prepare makes a gate that does not run yet.
func prepare(socket string, r gate.Resolver, v *verify.Decider) *running {
	g := &running{}
	g.Session = &gate.Session{Socket: socket, Log: slog.New(slog.NewTextHandler(&g.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Audit: func() bool { s := v.Snapshot(); return s != nil && s.Mode == verify.Audit },
		Gate:  &gate.Gate{Resolver: r, Verifier: v, Observe: g.answers.observe, Now: time.Now, Node: "edge-1"}}
	return g
}

func (g *running) begin(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := g.Run(ctx); err != nil {
			t.Errorf("session: %v", err)
		}
	}()
	g.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(g.stop)
}

func start(t *testing.T, socket string, r gate.Resolver, v *verify.Decider) *running {
	t.Helper()
	g := prepare(socket, r, v)
	g.begin(t)
	return g
}

func (g *running) waitRegistered(t *testing.T, want bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); g.Registered() != want; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("registered is not %t; log:\n%s", want, g.log.String())
		}
	}
}

// waitAgain does what makes the gate register anew, and waits until it has.
func (g *running) waitAgain(t *testing.T, do func()) {
	t.Helper()
	before := g.State().Registrations
	do()
	wait(t, "it registers anew", func() bool { s := g.State(); return s.Registered && s.Registrations > before })
}

func resolves(images ...verify.Image) *resolver {
	return &resolver{resolve: func(context.Context) []verify.Image { return images }, started: func() *verify.Fault { return nil }}
}

func TestAnswers(t *testing.T) {
	dir := socketDir(t)
	rt := startRuntime(t, dir, "v2.4.2")
	defer rt.Stop()
	if err := rt.create(context.Background()); err == nil || !strings.Contains(err.Error(), `required plugin "tidewaiter" not present`) {
		t.Fatalf("without the gate: %v", err)
	}

	unbound := image("good")
	unbound.Binding = 0
	fault := image("good")
	fault.Fault = &verify.Fault{Reason: verify.ImageUnresolved, Detail: "as told"}
	hang := func(ctx context.Context) []verify.Image { <-ctx.Done(); return nil }
	tests := map[string]struct {
		resolve func(context.Context) []verify.Image
		want    string // in the denial; "": allowed
	}{
		"good":                 {func(context.Context) []verify.Image { return []verify.Image{image("good")} }, ""},
		"untrusted":            {func(context.Context) []verify.Image { return []verify.Image{image("evil")} }, "tidewaiter: denied [SIGNER_UNTRUSTED] registry.example/app:1@" + digest.FromString("evil").String() + ": test: somebody else; rule \"all\"; on node edge-1: tidewaiter explain "},
		"one of two":           {func(context.Context) []verify.Image { return []verify.Image{image("good"), image("evil")} }, "[SIGNER_UNTRUSTED]"},
		"not bound":            {func(context.Context) []verify.Image { return []verify.Image{unbound} }, "[IMAGE_UNRESOLVED]"},
		"fault":                {func(context.Context) []verify.Image { return []verify.Image{fault} }, "[IMAGE_UNRESOLVED]"},
		"zero image":           {func(context.Context) []verify.Image { return make([]verify.Image, 1) }, "[IMAGE_UNRESOLVED]"},
		"no image":             {func(context.Context) []verify.Image { return nil }, "[INTERNAL]"},
		"panic when resolving": {func(context.Context) []verify.Image { panic("as told") }, "[INTERNAL]"},
		"panic when checking":  {func(context.Context) []verify.Image { return []verify.Image{image("panic")} }, "[SIGNATURE_INVALID]"},
		"hang":                 {hang, "denied ["},
		"hang without a ctx":   {func(context.Context) []verify.Image { time.Sleep(1900 * time.Millisecond); return nil }, "[PENDING]"},
	}
	for label, tt := range tests {
		for _, mode := range []verify.Mode{verify.Enforce, verify.Audit} {
			t.Run(label+"/"+mode.String(), func(t *testing.T) {
				r := &resolver{resolve: tt.resolve, started: func() *verify.Fault { return nil }}
				g := start(t, rt.socket, r, decider(mode))
				g.waitRegistered(t, true)
				err := rt.create(context.Background())
				if mode == verify.Audit && err != nil {
					t.Fatalf("audit refused: %v", err)
				}
				if mode == verify.Enforce {
					switch {
					case tt.want == "" && err != nil:
						t.Fatal(err)
					case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
						t.Fatalf("got %v, want %q", err, tt.want)
					case (tt.want == "") != (r.decided.Load() == 1):
						t.Fatalf("decided %d times", r.decided.Load())
					}
				}
				// The answer came inside the runtime's deadline: the runtime did not drop us.
				if !g.Registered() {
					t.Fatalf("dropped; log:\n%s", g.log.String())
				}
				g.answers.mu.Lock()
				if len(g.answers.list) == 0 {
					t.Error("nothing was observed")
				}
				for _, a := range g.answers.list {
					if mode == verify.Audit && tt.want != "" && a.Decision.Reason == verify.AuditOnly && a.Decision.Would == "" {
						t.Errorf("audit lost the reason: %+v", a.Decision)
					}
				}
				g.answers.mu.Unlock()
				g.stop()
				waitAbsent(t, rt)
			})
		}
	}
}

// waitAbsent waits until the runtime noticed that the gate is gone. The pause
// before the first request is there because NRI 0.12.5 skips a validator whose
// connection closes between its being counted present and its being called: at
// index 99 that is microseconds and still not nothing (about 1 in 130 requests
// made at that very moment). NRI 0.12.3, which containerd 2.4.2 has, calls it and
// refuses.
func waitAbsent(t *testing.T, rt *runtime) {
	t.Helper()
	time.Sleep(20 * time.Millisecond)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if err := rt.create(context.Background()); err != nil && strings.Contains(err.Error(), "not present") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the runtime did not notice that the gate is gone")
		}
	}
}

// With no configuration in force everything is refused, and says so.
func TestNoConfiguration(t *testing.T) {
	rt := startRuntime(t, socketDir(t), "v2.4.2")
	defer rt.Stop()
	g := start(t, rt.socket, resolves(image("good")), &verify.Decider{})
	g.waitRegistered(t, true)
	if err := rt.create(context.Background()); err == nil || !strings.Contains(err.Error(), "[POLICY_INVALID]") {
		t.Fatal(err)
	}
	g.stop()
}

// The mask is made from the version that the runtime gives, whatever its form,
// and asks for VALIDATE in any case.
func TestMask(t *testing.T) {
	for version, compares := range map[string]bool{
		"v2.4.2": false, "2.4.2+unknown": false, "2.5.0-rc.1": false, "3.0.0": false,
		"v2.2.9": true, "2.2.9+unknown": true, "2.3.7": true, "": true, "unknown": true, "main": true,
	} {
		t.Run("version "+version, func(t *testing.T) {
			rt := startRuntime(t, socketDir(t), version)
			defer rt.Stop()
			r := resolves(image("good"))
			asked := atomic.Int32{}
			r.started = func() *verify.Fault {
				asked.Add(1)
				return &verify.Fault{Reason: verify.ImageMismatch, Detail: "another config"}
			}
			g := start(t, rt.socket, r, decider(verify.Enforce))
			g.waitRegistered(t, true)
			if r.compares.Load() != compares {
				t.Errorf("compares is %t", r.compares.Load())
			}
			if err := rt.create(context.Background()); err != nil {
				t.Fatal(err)
			}
			for size, want := range map[int]bool{200 << 10: true, 400 << 10: false} {
				pod := &api.PodSandbox{Id: "pod", Labels: map[string]string{"long": strings.Repeat("x", size)}}
				err := rt.RunPodSandbox(context.Background(), &api.RunPodSandboxRequest{Pod: pod})
				if want != (err == nil) || !want && !strings.Contains(err.Error(), "[POD_TOO_LARGE]") {
					t.Errorf("a pod of %d bytes: %v", size, err)
				}
			}
			err := rt.StartContainer(context.Background(), &api.StartContainerRequest{Pod: &api.PodSandbox{Id: "pod"}, Container: &api.Container{Id: "c"}})
			if compares && (err == nil || !strings.Contains(err.Error(), "[IMAGE_MISMATCH]")) {
				t.Errorf("StartContainer: %v", err)
			}
			if !compares && (err != nil || asked.Load() != 0) {
				t.Errorf("StartContainer was asked %d times: %v", asked.Load(), err)
			}
			g.stop()
		})
	}
}

// A link passes connections on to the runtime's socket and can be cut, as when
// containerd ends: the adaptation's own Stop leaves external plugins connected.
type link struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	wg       sync.WaitGroup
}

func newLink(t *testing.T, socket, to string) *link {
	t.Helper()
	l := &link{}
	var err error
	if l.listener, err = net.Listen("unix", socket); err != nil {
		t.Fatal(err)
	}
	l.wg.Go(func() {
		for {
			in, err := l.listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", to)
			if err != nil {
				in.Close()
				continue
			}
			l.mu.Lock()
			l.conns = append(l.conns, in, out)
			l.mu.Unlock()
			for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
				l.wg.Go(func() {
					_, _ = io.Copy(p[0], p[1])
					p[0].Close()
					p[1].Close()
				})
			}
		}
	})
	return l
}

// cut closes every connection. The link can be used on.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

func (l *link) close() {
	l.listener.Close()
	l.cut()
	l.wg.Wait()
}

// A runtime that restarts or drops the gate is registered with again, each time,
// and nothing is left behind (goleak in TestMain). Synchronize is answered
// however many containers there are, and their environment is not kept.
func TestReconnects(t *testing.T) {
	dir := socketDir(t)
	var containers []*api.Container
	for i := range 24 {
		containers = append(containers, &api.Container{Id: fmt.Sprint(i), Env: []string{"SECRET=" + strings.Repeat("x", 200<<10)}})
	}
	rt := startRuntime(t, dir, "v2.4.2", containers...)
	socket := filepath.Join(dir, "link.sock")
	g := start(t, socket, resolves(image("good")), decider(verify.Enforce)) // before there is a socket
	for range 3 {
		l := newLink(t, socket, rt.socket)
		g.waitRegistered(t, true)
		if err := rt.create(context.Background()); err != nil {
			t.Fatal(err)
		}
		g.waitAgain(t, l.cut) // the runtime drops the gate
		rt.Stop()             // the runtime restarts
		l.close()
		g.waitRegistered(t, false)
		rt = startRuntime(t, dir, "v2.4.2", containers...)
		if err := rt.create(context.Background()); err == nil {
			t.Fatal("let through before the gate was back")
		}
	}
	g.stop()
	rt.Stop()
	if strings.Contains(g.log.String(), "SECRET") {
		t.Error("a container's environment reached the log")
	}
}

// In audit nothing depends on the gate: not when it hangs, not when it dies while
// it is asked, and not afterwards. When the node turns to enforce, the gate
// registers anew and all of that is closed. Back in audit it keeps the connection.
func TestAuditTouchesNothing(t *testing.T) {
	for _, version := range []string{"v2.4.2", "v2.2.9", "v1.7.35"} {
		t.Run(version, func(t *testing.T) {
			dir := socketDir(t)
			rt := startRuntimeWith(t, dir, version, nil, nil)
			l := newLink(t, filepath.Join(dir, "link.sock"), rt.socket)
			var do atomic.Pointer[func()]
			nothing := func() {}
			do.Store(&nothing)
			r := resolves()
			r.resolve = func(context.Context) []verify.Image { (*do.Load())(); return []verify.Image{image("evil")} }
			e := decider(verify.Audit)
			g := start(t, filepath.Join(dir, "link.sock"), r, e)
			hang := func() { time.Sleep(3 * time.Second) }
			cut := func() { l.cut() }
			for label, f := range map[string]*func(){"nothing": &nothing, "hang": &hang, "cut": &cut} {
				g.waitRegistered(t, true)
				do.Store(f)
				creates := func() {
					for range 3 {
						if err := rt.create(context.Background()); err != nil {
							t.Errorf("%s: %v", label, err)
						}
					}
				}
				if label == "cut" {
					g.waitAgain(t, creates)
				} else {
					creates()
				}
				do.Store(&nothing)
			}
			e.Swap(decider(verify.Enforce).Snapshot())
			if err := rt.create(context.Background()); err == nil || !strings.Contains(err.Error(), "[PENDING]") {
				t.Errorf("enforcing, and still asked as in audit: %v", err)
			}
			g.waitAgain(t, g.Renew)
			if err := rt.create(context.Background()); err == nil || !strings.Contains(err.Error(), "[SIGNER_UNTRUSTED]") || !strings.Contains(err.Error(), "rejected container adjustment") {
				t.Errorf("enforcing: %v", err)
			}
			// Back in audit the connection that works stays.
			before := g.State().Registrations
			e.Swap(decider(verify.Audit).Snapshot())
			g.Renew()
			if err := rt.create(context.Background()); err != nil {
				t.Errorf("back in audit: %v", err)
			}
			if st := g.State(); !st.Registered || st.Registrations != before || st.Audit {
				t.Errorf("back in audit: %+v", st)
			}
			g.waitAgain(t, func() { l.cut() })
			if st := g.State(); !st.Audit {
				t.Errorf("after the connection ended: %+v", st)
			}
			g.stop()
			for range 3 {
				if err := rt.create(context.Background()); err != nil {
					t.Errorf("after the gate ended: %v", err)
				}
			}
			l.close()
			rt.Stop()
		})
	}
}

// A connection that ends while the gate is being asked: the container is refused.
func TestConnectionEndsWhileAsked(t *testing.T) {
	dir := socketDir(t)
	rt := startRuntime(t, dir, "v2.4.2")
	l := newLink(t, filepath.Join(dir, "link.sock"), rt.socket)
	r := resolves(image("good"))
	r.resolve = func(context.Context) []verify.Image {
		l.cut()
		return []verify.Image{image("good")}
	}
	g := start(t, filepath.Join(dir, "link.sock"), r, decider(verify.Enforce))
	for range 5 {
		g.waitRegistered(t, true)
		if err := rt.create(context.Background()); err == nil {
			t.Fatal("let through although the answer was lost")
		}
	}
	g.stop()
	l.close()
	rt.Stop()
}

// A runtime that goes away between registration and configuration must not hang
// the gate: the stub waits there without an end.
func TestRuntimeDiesBeforeConfigure(t *testing.T) {
	dir := socketDir(t)
	socket := filepath.Join(dir, "nri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	registered := make(chan struct{}, 100)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				m := multiplex.Multiplex(conn)
				defer m.Close()
				rl, err := m.Listen(multiplex.RuntimeServiceConn)
				if err != nil {
					return
				}
				s, err := ttrpc.NewServer()
				if err != nil {
					return
				}
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				api.RegisterRuntimeService(s, dying{func() {
					registered <- struct{}{}
					time.AfterFunc(20*time.Millisecond, func() { s.Close(); m.Close() })
				}})
				_ = s.Serve(ctx, rl)
			})
		}
	})
	g := start(t, socket, resolves(image("good")), decider(verify.Enforce))
	for range 2 { // the second is proof that the first did not hang
		select {
		case <-registered:
		case <-time.After(time.Minute):
			t.Fatalf("the gate does not try again; log:\n%s", g.log.String())
		}
	}
	l.Close()
	os.Remove(socket)
	rt := startRuntime(t, dir, "v2.4.2")
	g.waitRegistered(t, true)
	if err := rt.create(context.Background()); err != nil {
		t.Fatal(err)
	}
	g.stop()
	rt.Stop()
	wg.Wait()
}

type dying struct{ die func() }

func (d dying) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	d.die()
	return &api.Empty{}, nil
}

func (dying) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return nil, errors.New("not here")
}

// A runtime that is not containerd is refused with a clear error, and one that
// went away is said once.
func TestRuntimeRefused(t *testing.T) {
	dir := socketDir(t)
	socket := filepath.Join(dir, "nri.sock")
	a, err := adaptation.New("cri-o", "1.34.0",
		func(ctx context.Context, sync adaptation.SyncCB) error { _, err := sync(ctx, nil, nil); return err },
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithSocketPath(socket), adaptation.WithPluginPath(dir), adaptation.WithPluginConfigPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	g := start(t, socket, resolves(image("good")), decider(verify.Enforce))
	for deadline := time.Now().Add(time.Minute); !strings.Contains(g.log.String(), "is not containerd"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("log:\n%s", g.log.String())
		}
	}
	if g.Registered() {
		t.Error("registered with a runtime whose images cannot be bound")
	}
	g.stop()
}
