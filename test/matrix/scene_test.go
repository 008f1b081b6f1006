package matrix

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/protobuf/proto"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// timeout is how long the runtime waits for a plugin: NRI's default. The short form,
// which runs on machines that do something else too, waits longer.
var timeout = 2 * time.Second

// What a request is answered. A refusal of the gate itself is its reason code.
const (
	allowed    = "allowed"
	notPresent = "absent"      // the default validator misses the gate
	timedOut   = "timeout"     // the gate did not answer in time
	closed     = "closed"      // the connection closed while the gate was asked
	tooLarge   = "too large"   // the request cannot be sent to the gate
	letThrough = "LET THROUGH" // allowed, and nobody had verified it

	absentText = `required plugin "tidewaiter" not present`
)

// kind says what an error of the runtime is, "" if it is none that is known.
func kind(text string) string {
	if _, denied, ok := strings.Cut(text, "tidewaiter: denied ["); ok {
		code, _, _ := strings.Cut(denied, "]")
		return code
	}
	for part, kind := range map[string]string{
		absentText:                    notPresent,
		"deadline exceeded":           timedOut,
		"ttrpc: closed":               closed,
		"exceed maximum message size": tooLarge,
	} {
		if strings.Contains(text, part) {
			return kind
		}
	}
	return ""
}

// A scene is one runtime with its neighbour and the gate.
type scene struct {
	*testing.T
	w         *world
	lib       *library
	neighbour neighbour
	dir       string // short: sockets are in it
	config    string
	mirror    *node.Registry
	rt        *runtime
	link      *link
	other     *fake      // the neighbour
	gate      *node.Gate // nil before the first
	answers   []string   // of this failure
	gates     []*node.Gate
}

func newScene(t *testing.T, l *library, n neighbour) *scene {
	s := &scene{T: t, w: shared, lib: l, neighbour: n}
	var err error
	s.dir, err = os.MkdirTemp(s.w.dir, "")
	s.must(err)
	s.mirror, err = node.NewRegistry(s.w.reg.Host, node.RegistryOptions{})
	s.must(err)
	t.Cleanup(func() { s.must(s.mirror.Stop()) })
	for _, name := range names {
		_, err := push(t.Context(), s.mirror, name)
		s.must(err)
	}
	_, err = s.mirror.Sign(t.Context(), s.w.good.Image, s.w.signer)
	s.must(err)
	s.config = filepath.Join(s.dir, "config")
	s.must(s.w.configure(s.config, s.mirror))
	s.rt = startRuntime(t, l, socket(s.dir, "s"))
	s.link = newLink(t, socket(s.dir, "l"), socket(s.dir, "s"))
	s.order()
	t.Cleanup(func() {
		if s.other != nil {
			s.other.Stop()
		}
		for _, g := range s.gates {
			_ = g.Signal(syscall.SIGCONT) // one that has ended gets none
			g.Kill()
			for _, line := range g.Lines() {
				if strings.Contains(line.Raw, `"allowed":true`) && strings.Contains(line.Raw, "/evil") {
					t.Errorf("the gate allowed it: %s", line.Raw)
				}
			}
		}
		if t.Failed() && s.gate != nil {
			t.Logf("the last gate:\n%s", s.gate.Log())
		}
	})
	return s
}

func (s *scene) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// start starts the gate, which reaches the runtime over the link or directly.
func (s *scene) start(linked bool) {
	s.Helper()
	if s.gate != nil {
		s.gate.Kill()
	}
	to := socket(s.dir, "s")
	if linked {
		to = socket(s.dir, "l")
	}
	var err error
	// A run directory of its own: the gates of the other scenes are on other nodes.
	args := []string{"--nri-socket", to, "--run-dir", filepath.Join(s.dir, "run")}
	s.gate, err = s.w.node.StartGate(s.Context(), node.GateOptions{ConfigDir: s.config, Binary: s.w.gate, Args: args})
	s.must(err)
	s.gates = append(s.gates, s.gate)
}

// ready starts the gate and waits until it works, with the neighbour where it
// belongs.
func (s *scene) ready(linked bool) {
	s.Helper()
	s.start(linked)
	s.works()
}

// works waits until the gate allows the good image and refuses the other for what
// it is, and puts the neighbour where it belongs.
func (s *scene) works() {
	s.Helper()
	s.until(s.w.good, allowed)
	s.until(s.w.evil, "SIGNATURE_MISSING")
	s.order()
}

// asked waits until the runtime asks the gate.
func (s *scene) asked() {
	s.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		// The first answer may still be about the gate before.
		if got := s.ask(s.w.evil); got != notPresent && got != closed {
			return
		}
		if time.Now().After(end) {
			s.Fatalf("the gate does not register:\n%s", s.gate.Log())
		}
	}
}

// recovers waits until the gate works again, or starts it where it has ended, and
// returns how long that took.
func (s *scene) recovers() time.Duration {
	s.Helper()
	from := time.Now()
	ended := s.gate == nil
	if !ended {
		select {
		case <-s.gate.Done():
			ended = true
		default:
			s.must(s.gate.Signal(syscall.SIGCONT))
		}
	}
	if ended {
		s.start(false)
	}
	s.until(s.w.good, allowed)
	back := time.Since(from)
	s.until(s.w.evil, "SIGNATURE_MISSING")
	return back
}

// until asks again, as a kubelet does, until the answer is want. What comes before
// may only be that the gate is not there yet, or still verifies.
func (s *scene) until(img *image, want string) {
	s.Helper()
	meanwhile := []string{notPresent, closed, timedOut, "PENDING", "SOURCE_UNREACHABLE", "OVERLOADED", "LIMIT_EXCEEDED"}
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		got := s.ask(img)
		switch {
		case got == want:
			return
		case !slices.Contains(meanwhile, got):
			s.Fatalf("%s: %s, want %s", img.Name, got, want)
		case time.Now().After(end):
			s.Fatalf("%s: still %s, want %s; the gate:\n%s", img.Name, got, want, s.gate.Log())
		}
	}
}

// ask asks for a container of an image, and fails where an image is allowed that
// is not signed.
func (s *scene) ask(img *image) string {
	s.Helper()
	return s.answer(img, s.rt.send(question{Create: s.request(img)}))
}

func (s *scene) answer(img *image, c <-chan answer) string {
	s.Helper()
	got := s.raw(c)
	if got == allowed && img != s.w.good {
		s.Errorf("ESCAPE: %s was let through", img.Name)
		return letThrough
	}
	return got
}

// raw does not judge.
func (s *scene) raw(c <-chan answer) string {
	s.Helper()
	a := s.receive(c, 2*time.Minute)
	if a.Error == "" {
		return allowed
	}
	k := kind(a.Error)
	if k == "" {
		s.Fatalf("an answer that is none: %s", a.Error)
	}
	return k
}

func (s *scene) receive(c <-chan answer, patience time.Duration) answer {
	s.Helper()
	select {
	case a, ok := <-c:
		if !ok {
			s.Fatalf("the runtime ended: %s", s.rt.said())
		}
		return a
	case <-time.After(patience):
		s.Fatal("the runtime does not answer")
		panic("unreachable")
	}
}

// refused asks for a container that must be refused in one of these ways, and
// notes it for the table. The good image is no exception: nobody verifies it now.
func (s *scene) refused(img *image, ways ...string) {
	s.Helper()
	s.noted(img, s.rt.send(question{Create: s.request(img)}), ways...)
}

func (s *scene) noted(img *image, c <-chan answer, ways ...string) {
	s.Helper()
	got := s.raw(c)
	if got == allowed {
		s.Errorf("ESCAPE: %s was let through", img.Name)
		got = letThrough
	} else if !slices.Contains(ways, got) {
		s.Errorf("%s: %s, want one of %v", img.Name, got, ways)
	}
	s.answers = append(s.answers, got)
}

// allows asks for the good image, which must be allowed, and notes it.
func (s *scene) allows() {
	s.Helper()
	if got := s.ask(s.w.good); got != allowed {
		s.Errorf("the good image: %s", got)
	}
	s.answers = append(s.answers, "good "+allowed)
}

// request is what containerd tells of a container: with the image where its
// version does.
func (s *scene) request(img *image) []byte {
	p := s.w.pod
	c := &api.Container{
		Id: img.id, PodSandboxId: p.ID, Name: "main", State: api.ContainerState_CONTAINER_CREATED,
		Annotations: map[string]string{
			"io.kubernetes.cri.container-name": "main", "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.image-name": img.Name,
			"io.kubernetes.cri.sandbox-id": p.ID, "io.kubernetes.cri.sandbox-name": p.Name, "io.kubernetes.cri.sandbox-namespace": p.Namespace,
			"io.kubernetes.cri.sandbox-uid": p.UID,
		},
		Args: []string{node.Program},
	}
	if s.lib.tells {
		c.Image = &api.Image{Name: img.Name, Digest: img.Target.Digest.String(), ConfigDigest: img.Config.Digest.String()}
	}
	b, err := proto.Marshal(&api.CreateContainerRequest{
		Pod:       &api.PodSandbox{Id: p.ID, Name: p.Name, Uid: p.UID, Namespace: p.Namespace},
		Container: c,
	})
	s.must(err)
	return b
}

// order has the neighbour registered, after the gate where it is to be the last.
func (s *scene) order() {
	s.Helper()
	if s.neighbour == alone || s.neighbour == before && s.other != nil {
		return
	}
	index := "10"
	pace := slow
	if s.neighbour == after {
		index = "99"
	}
	if s.other != nil {
		pace = time.Duration(s.other.pace.Load())
		s.other.Stop()
	}
	s.other = s.plug(index, "neighbour", false)
	s.other.pace.Store(int64(pace))
}

// pace is how slow the neighbour is from now on.
func (s *scene) pace(d time.Duration) {
	if s.other != nil {
		s.other.pace.Store(int64(d))
	}
}

// during has f done while the neighbour creates the next container.
func (s *scene) during(f func()) { s.other.next.Store(&f) }

// plug registers a plugin with the runtime.
func (s *scene) plug(index, name string, validates bool) *fake {
	s.Helper()
	f := &fake{synced: make(chan struct{})}
	var p any = struct {
		*fake
		creates
	}{f, creates{f}}
	if validates {
		p = struct {
			*fake
			approves
		}{f, approves{}}
	}
	conn, err := net.Dial("unix", socket(s.dir, "s"))
	s.must(err)
	f.stub, err = stub.New(p, stub.WithPluginName(name), stub.WithPluginIdx(index), stub.WithConnection(conn), stub.WithLogger(quiet{}),
		stub.WithOnClose(func() {})) // without one the stub ends the process
	s.must(err)
	s.must(f.stub.Start(context.Background()))
	select {
	case <-f.synced: // the runtime holds creations back until it has taken it in
	case <-time.After(2 * time.Minute):
		s.Fatalf("%s-%s was not synchronised", index, name)
	}
	return f
}

// A fake is a plugin that is not the gate.
type fake struct {
	stub   stub.Stub
	once   sync.Once
	synced chan struct{}
	pace   atomic.Int64
	next   atomic.Pointer[func()]
}

func (f *fake) Stop() { f.stub.Stop() }

func (f *fake) Synchronize(context.Context, []*api.PodSandbox, []*api.Container) ([]*api.ContainerUpdate, error) {
	f.once.Do(func() { close(f.synced) })
	return nil, nil
}

// creates is a neighbour's part, approves an impostor's.
type (
	creates  struct{ fake *fake }
	approves struct{}
)

func (c creates) CreateContainer(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if f := c.fake.next.Swap(nil); f != nil {
		(*f)()
	}
	time.Sleep(time.Duration(c.fake.pace.Load()))
	return nil, nil, nil
}

func (approves) ValidateContainerAdjustment(context.Context, *api.ValidateContainerAdjustmentRequest) error {
	return nil
}

type quiet struct{}

var _ nrilog.Logger = quiet{}

func (quiet) Debugf(context.Context, string, ...any) {}
func (quiet) Infof(context.Context, string, ...any)  {}
func (quiet) Warnf(context.Context, string, ...any)  {}
func (quiet) Errorf(context.Context, string, ...any) {}

// A runtime is runtime/main.go at work. The types of its lines are those there.
type runtime struct {
	cmd *exec.Cmd
	log *os.File

	mu      sync.Mutex
	in      *json.Encoder
	next    int
	waiting map[int]chan answer // nil when it has ended
}

type question struct {
	ID       int
	Create   []byte
	Expired  bool
	Until    string
	Unlisted bool
	Size     int
}

type answer struct {
	ID      int
	Error   string
	Allowed int
	Refused map[string]int
}

func startRuntime(t *testing.T, l *library, socket string) *runtime {
	t.Helper()
	r := &runtime{waiting: map[int]chan answer{}}
	r.cmd = exec.Command(l.program, "-socket", socket, "-containerd", l.containerd, "-timeout", timeout.String())
	in, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if r.log, err = os.Create(socket + ".log"); err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = r.log
	r.in = json.NewEncoder(in)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	listens := make(chan answer, 1)
	r.waiting[0] = listens
	read := make(chan struct{})
	go func() {
		defer close(read)
		r.read(out)
	}()
	t.Cleanup(func() {
		in.Close()
		<-read
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("the runtime: %v: %s", err, r.said())
		}
		r.log.Close()
	})
	if _, ok := <-listens; !ok {
		t.Fatalf("the runtime ended: %s", r.said())
	}
	return r
}

func (r *runtime) read(out io.Reader) {
	decoder := json.NewDecoder(bufio.NewReader(out))
	for {
		var a answer
		err := decoder.Decode(&a)
		r.mu.Lock()
		if err != nil {
			for _, c := range r.waiting {
				close(c)
			}
			r.waiting = nil
			r.mu.Unlock()
			return
		}
		if c := r.waiting[a.ID]; c != nil {
			c <- a
			delete(r.waiting, a.ID)
		}
		r.mu.Unlock()
	}
}

// send asks and returns where the answer comes; closed if the runtime ended.
func (r *runtime) send(q question) <-chan answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan answer, 1)
	if r.waiting == nil {
		close(c)
		return c
	}
	r.next++
	q.ID = r.next
	r.waiting[q.ID] = c
	if err := r.in.Encode(q); err != nil {
		close(c)
		delete(r.waiting, q.ID)
	}
	return c
}

// said is the end of its log.
func (r *runtime) said() string {
	b, err := os.ReadFile(r.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b[max(0, len(b)-4000):]))
}

// A link passes connections on to the runtime's socket and can be cut.
type link struct {
	listener net.Listener
	to       string
	wg       sync.WaitGroup

	mu    sync.Mutex
	down  bool
	conns []net.Conn
}

func newLink(t *testing.T, socket, to string) *link {
	t.Helper()
	l := &link{to: to}
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
			l.pass(in)
		}
	})
	t.Cleanup(func() {
		l.listener.Close()
		l.cut()
		l.wg.Wait()
	})
	return l
}

func (l *link) pass(in net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out, err := net.Dial("unix", l.to)
	if l.down || err != nil {
		in.Close()
		if err == nil {
			out.Close()
		}
		return
	}
	l.conns = append(l.conns, in, out)
	for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
		l.wg.Go(func() {
			_, _ = io.Copy(p[0], p[1])
			p[0].Close()
			p[1].Close()
		})
	}
}

// cut closes every connection and takes no new one until mend.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

func (l *link) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = false
}

// noDecision checks that the gate was not asked since mark.
func (s *scene) noDecision(mark int) {
	s.Helper()
	for _, l := range s.gate.Lines()[mark:] {
		if l.Msg == "decision" {
			s.Errorf("the gate was asked: %s", l.Raw)
		}
	}
}

// still checks that the gate has not lost its registration since mark.
func (s *scene) still(mark int) {
	s.Helper()
	for _, l := range s.gate.Lines()[mark:] {
		if strings.HasPrefix(l.Msg, "not registered") {
			s.Errorf("the runtime dropped the gate: %s", l.Raw)
		}
	}
}

// hang stops the gate and waits until it stands still: threads on other
// processors go on for a moment.
func (s *scene) hang() error {
	if err := s.gate.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("the gate: %w", err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", s.gate.PID))
		if err != nil {
			return err
		}
		still := len(threads) > 0
		for _, path := range threads {
			stat, err := os.ReadFile(path)
			if err != nil {
				still = false // the thread has just ended
				break
			}
			// PID (name) STATE …
			_, after, _ := strings.Cut(string(stat), ") ")
			still = still && strings.HasPrefix(after, "T")
		}
		if still {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("the gate does not stop")
		}
	}
}

func (s *scene) hangs() {
	s.Helper()
	s.must(s.hang())
}

func (s *scene) goesOn() {
	s.Helper()
	s.must(s.gate.Signal(syscall.SIGCONT))
}
