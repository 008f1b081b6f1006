package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// A logged keeps what was logged. It is safe for concurrent use.
type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

// short is a directory whose name leaves room for a socket's.
func short(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tw")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A gate is a socket that is served.
type gate struct {
	stop func()
	log  *logged
}

// start serves a status that names the gate in dir.
func start(t testing.TB, dir, name string) *gate {
	t.Helper()
	g := &gate{log: &logged{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s := &Socket{Dir: dir, Log: slog.New(slog.NewTextHandler(g.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Handler: Handler(
		func() Status { return healthy(name) },
		func(w io.Writer) error { _, err := io.WriteString(w, "of "+name+"\n"); return err },
		RefreshEndpoint(refresher(name).refresh),
	)}
	go func() { done <- s.Run(ctx) }()
	g.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(g.stop)
	return g
}

func healthy(name string) Status {
	s := Status{Node: name, Mode: "enforce", Configuration: Configuration{Dir: "/etc/tidewaiter", Revision: "0123"},
		Runtime: Runtime{Registered: true, Name: "containerd", Version: "2.4.2", Hooks: []string{"ValidateContainerAdjustment"}, Socket: "/run/nri.sock"}}
	s.Judge()
	return s
}

func answers(t testing.TB, dir, name string) {
	t.Helper()
	eventually(t, name+" answers", func() bool {
		s, err := Ask(context.Background(), dir)
		return err == nil && s.Node == name
	})
}

// roundTrip sends bytes to the socket and returns what comes back until the end.
func roundTrip(t testing.TB, dir, send string) string {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(dir, SocketName))
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	_, _ = io.WriteString(c, send) // it may be closed before all is sent
	b, _ := io.ReadAll(c)
	return string(b)
}

// The socket is this user's alone, gone at the end, and there is nothing else left.
func TestSocket(t *testing.T) {
	dir := filepath.Join(short(t), "run")
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	g := start(t, dir, "one")
	answers(t, dir, "one")
	for name, want := range map[string]os.FileMode{dir: 0o700 | os.ModeDir, filepath.Join(dir, SocketName): 0o600 | os.ModeSocket} {
		i, err := os.Lstat(name)
		must(t, err)
		if i.Mode() != want {
			t.Errorf("%s has mode %v, want %v", name, i.Mode(), want)
		}
	}
	g.stop()
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := Ask(context.Background(), dir); err == nil || !strings.HasPrefix(err.Error(), "no gate answers at "+dir) {
		t.Errorf("after the end: %v", err)
	}
}

// What a crash leaves is replaced: a socket that nobody listens on, and one that
// had not got its name yet.
func TestStale(t *testing.T) {
	dir := short(t)
	for _, name := range []string{SocketName, first} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		must(t, err)
		l.SetUnlinkOnClose(false)
		must(t, l.Close())
	}
	if _, err := Ask(context.Background(), dir); err == nil {
		t.Fatal("a stale socket answers")
	}
	g := start(t, dir, "one")
	answers(t, dir, "one")
	g.stop()
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// During an upgrade the new one has the path from the moment that it is there, and
// the old one leaves it alone: nobody who connects meanwhile finds nothing.
func TestTakeover(t *testing.T) {
	dir := short(t)
	first := start(t, dir, "gate 0")
	answers(t, dir, "gate 0")
	stop, asked := make(chan struct{}), 0
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			// One that was accepted by a gate that ends is not answered; who connects again is.
			_, err := Ask(context.Background(), dir)
			if err != nil && (errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)) {
				failed <- err
				return
			}
			asked++
		}
	}()
	for i := range 20 {
		name := fmt.Sprintf("gate %d", i+1)
		next := start(t, dir, name)
		answers(t, dir, name)
		first.stop()
		answers(t, dir, name)
		first = next
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("between two gates: %v", err)
	}
	if asked == 0 {
		t.Error("nobody asked")
	}
	first.stop()
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Many that start at once: one of them has the path, and when all have ended it is
// gone.
func TestAtOnce(t *testing.T) {
	dir := short(t)
	var gates []*gate
	for i := range 8 {
		gates = append(gates, start(t, dir, fmt.Sprint(i)))
	}
	eventually(t, "all are up", func() bool {
		for _, g := range gates {
			if !strings.Contains(g.log.String(), "control socket") {
				return false
			}
		}
		return true
	})
	if _, err := Ask(context.Background(), dir); err != nil {
		t.Error(err)
	}
	var wg sync.WaitGroup
	for _, g := range gates {
		wg.Go(g.stop)
	}
	wg.Wait()
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A directory that somebody else could put a socket into is not used, and what to
// do is said.
func TestUnusable(t *testing.T) {
	base := short(t)
	makeDir := func(name string, mode os.FileMode) string {
		dir := filepath.Join(base, name)
		must(t, os.Mkdir(dir, 0o700))
		must(t, os.Chmod(dir, mode))
		return dir
	}
	link := filepath.Join(base, "link")
	must(t, os.Symlink(makeDir("target", 0o700), link))
	file := filepath.Join(base, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	occupied := makeDir("occupied", 0o700)
	must(t, os.Mkdir(filepath.Join(occupied, SocketName), 0o700))
	long := makeDir(strings.Repeat("l", 100), 0o700)
	locked := makeDir("locked", 0o700)
	d, err := os.Open(locked)
	must(t, err)
	defer d.Close()
	must(t, syscall.Flock(int(d.Fd()), syscall.LOCK_EX))

	tests := map[string]string{
		link:                                 "is not a directory",
		file:                                 "is not a directory",
		filepath.Join(base, "none", "below"): "no such file or directory",
		makeDir("group", 0o770):              "others can write to",
		makeDir("world", 0o707):              "others can write to",
		occupied:                             "control socket: ",
		long:                                 "is longer than the 107 bytes",
		locked:                               "lock " + locked,
	}
	if os.Geteuid() == 0 {
		foreign := makeDir("foreign", 0o700)
		must(t, os.Chown(foreign, 65534, 65534))
		tests[foreign] = "does not belong to the user of this process (0)"
	} else {
		t.Log("LEFT OUT: a directory of another user needs root")
	}
	for dir, want := range tests {
		t.Run(filepath.Base(dir)[:4], func(t *testing.T) {
			g := start(t, dir, "one")
			eventually(t, "it is said", func() bool { return strings.Contains(g.log.String(), "no control socket") })
			if text := g.log.String(); !strings.Contains(text, want) || !strings.Contains(text, "--run-dir") || !strings.Contains(text, "WARN") {
				t.Errorf("want %q in %s", want, text)
			}
			if _, err := os.Lstat(filepath.Join(dir, SocketName)); err == nil && dir != occupied {
				t.Error("there is a socket")
			}
		})
	}
}

// Only root and the gate's own user are answered.
func TestPeers(t *testing.T) {
	if admit(0) != nil || admit(os.Geteuid()) != nil {
		t.Error("root or this user is kept out")
	}
	if err := admit(65533); err == nil || !strings.Contains(err.Error(), "user 65533") {
		t.Errorf("another user: %v", err)
	}
	dir := short(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	must(t, err)
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	must(t, err)
	defer c.Close()
	s, err := l.Accept()
	must(t, err)
	defer s.Close()
	if uid, _, err := Peer(s.(*net.UnixConn)); err != nil || uid != os.Geteuid() {
		t.Errorf("the peer is %d, %v", uid, err)
	}
	if trust(s) != nil {
		t.Error("this process does not trust itself")
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if trust(a) == nil {
		t.Error("a peer that cannot be known is trusted")
	}
}

func TestAnswers(t *testing.T) {
	dir := short(t)
	start(t, dir, "one")
	answers(t, dir, "one")
	get := func(method, path string) string {
		return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n\r\n", method, path)
	}
	for name, tt := range map[string]struct{ send, want, holds string }{
		"ready":    {get("GET", "/v1/ready"), "200", `{"schema":"tidewaiter.dev/ready/v1","ready":true}`},
		"status":   {get("GET", "/v1/status"), "200", `"schema":"tidewaiter.dev/status/v1"`},
		"metrics":  {get("GET", "/metrics"), "200", "of one"},
		"unknown":  {get("GET", "/v1/allow"), "404", ""},
		"root":     {get("GET", "/"), "404", ""},
		"post":     {get("POST", "/v1/status"), "405", ""},
		"put":      {get("PUT", "/v1/ready"), "405", ""},
		"options":  {get("OPTIONS", "*"), "4", ""},
		"connect":  {get("CONNECT", "/v1/status"), "4", ""},
		"body":     {"GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "413", "no body"},
		"chunks":   {"GET /v1/status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "413", "no body"},
		"refresh":  {get("GET", "/v1/refresh"), "405", ""},
		"headers":  {"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "431", ""},
		"long URL": {get("GET", "/v1/status?"+strings.Repeat("x", 64<<10)), "431", ""},
		"junk":     {"\x16\x03\x01 no HTTP\r\n\r\n", "400", ""},
		"http/2":   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := roundTrip(t, dir, tt.send)
			if tt.want != "" && !strings.HasPrefix(got, "HTTP/1.1 "+tt.want) || !strings.Contains(got, tt.holds) {
				t.Errorf("got %.300s", got)
			}
			if tt.want == "" && strings.Contains(got, " 200 ") {
				t.Errorf("got %.300s", got)
			}
			// One request a connection.
			if tt.want == "200" && !strings.Contains(got, "Connection: close") {
				t.Errorf("got %.300s", got)
			}
		})
	}
	// Two requests in a row get one answer.
	if got := roundTrip(t, dir, get("GET", "/v1/ready")+get("GET", "/v1/ready")); strings.Count(got, "HTTP/1.1 200") != 1 {
		t.Errorf("got %s", got)
	}
}

// Whoever connects and says nothing holds the others up for a while, not for ever,
// and a gate that ends does not wait for them.
func TestSilence(t *testing.T) {
	dir := short(t)
	g := start(t, dir, "one")
	answers(t, dir, "one")
	for i := range 3 * connections {
		c, err := net.Dial("unix", filepath.Join(dir, SocketName))
		must(t, err)
		defer c.Close()
		if i%2 == 0 {
			_, err = io.WriteString(c, "GET /v1/status HT")
			must(t, err)
		}
	}
	answers(t, dir, "one")
	for range connections {
		c, err := net.Dial("unix", filepath.Join(dir, SocketName))
		must(t, err)
		defer c.Close()
	}
	g.stop()
}

// A client believes only a gate of root or of its own user, and reads no end of
// bytes.
func TestAsk(t *testing.T) {
	serve := func(t *testing.T, h http.HandlerFunc) string {
		t.Helper()
		dir := short(t)
		l, err := net.Listen("unix", filepath.Join(dir, SocketName))
		must(t, err)
		srv := &http.Server{Handler: h}
		done := make(chan struct{})
		go func() { defer close(done); srv.Serve(l) }()
		t.Cleanup(func() { srv.Close(); <-done })
		return dir
	}
	for name, tt := range map[string]struct {
		h    http.HandlerFunc
		want string
	}{
		"no JSON":        {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }, "is no gate"},
		"another schema": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"schema":"x/v2","healthy":true}`) }, `speaks "x/v2", not tidewaiter.dev/status/v1`},
		"no end": {func(w http.ResponseWriter, _ *http.Request) {
			for range 40 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, "longer than 1048576 bytes"},
		"an error": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, "500"},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		}, "302"},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := Ask(context.Background(), serve(t, tt.h)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, %v", s, err)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	dir := serve(t, func(_ http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
	if _, err := Ask(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("a gate that hangs: %v", err)
	}
}

// The listener for metrics answers nothing else.
func TestMetricsAlone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, Metrics(func(w io.Writer) error { _, err := io.WriteString(w, "up 1\n"); return err }))
	}()
	for path, want := range map[string]int{"/metrics": 200, "/v1/status": 404, "/v1/ready": 404, "/debug/pprof/": 404, "/": 404} {
		r, err := http.Get("http://" + l.Addr().String() + path)
		must(t, err)
		b, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if r.StatusCode != want || want == 200 && (string(b) != "up 1\n" || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain; version=0.0.4")) {
			t.Errorf("%s: %s: %s", path, r.Status, b)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Error("it listens on")
	}
}

// What counts as ready and healthy, which problem goes first, and how sure a denial
// is.
func TestJudge(t *testing.T) {
	rejected := &Rejected{Error: "config.yaml:3: limits: wrong", Current: true}
	for name, tt := range map[string]struct {
		change    func(*Status)
		codes     string
		ready     bool
		assurance string
	}{
		"healthy":          {func(*Status) {}, "", true, AtCreate},
		"older runtime":    {func(s *Status) { s.Runtime.Hooks = append(s.Runtime.Hooks, "StartContainer") }, "", true, AtStart},
		"audit":            {func(s *Status) { s.Mode, s.Runtime.Audit = "audit", true }, "", true, None},
		"stopping":         {func(s *Status) { s.Stopping = true }, "STOPPING", false, None},
		"not registered":   {func(s *Status) { s.Runtime.Registered, s.Runtime.Error = false, "refused" }, "NOT_REGISTERED", false, None},
		"no configuration": {func(s *Status) { s.Configuration.Revision, s.Mode = "", "" }, "NO_CONFIGURATION", false, None},
		"neither": {func(s *Status) {
			s.Configuration.Revision, s.Mode, s.Configuration.Rejected, s.Runtime.Registered = "", "", rejected, false
		}, "NO_CONFIGURATION NOT_REGISTERED", false, None},
		"awaits one": {func(s *Status) {
			s.Configuration.Revision, s.Mode, s.Configuration.WaitingForConfig, s.Runtime.Registered = "", "", true, false
		}, "NO_CONFIGURATION", false, None},
		"awaited one":                  {func(s *Status) { s.Configuration.WaitingForConfig, s.Runtime.Registered = true, false }, "NOT_REGISTERED", false, None},
		"audit in the hook that holds": {func(s *Status) { s.Mode = "audit" }, "", true, None},
		"registration is held up": {func(s *Status) {
			s.Runtime.Registered, s.Runtime.AwaitingSync = false, new(time.Unix(1_700_000_000, 0))
		}, "RUNTIME_BUSY", false, None},
		"it cannot register again": {func(s *Status) { s.Runtime.Audit, s.Runtime.Held = true, "pod team/p" }, "REGISTERING", false, None},
		"no hook that holds":       {func(s *Status) { s.Runtime.Audit = true }, "REGISTERING", false, None},
		"rejected":                 {func(s *Status) { s.Configuration.Rejected = rejected }, "CONFIGURATION_REJECTED", true, AtCreate},
		"rejected before":          {func(s *Status) { r := *rejected; r.Current = false; s.Configuration.Rejected = &r }, "", true, AtCreate},
		"required":                 {func(s *Status) { s.Runtime.Plugins = []string{"00-default-validator", "99-tidewaiter"} }, "", true, AtCreate},
		"not required":             {func(s *Status) { s.Runtime.Plugins = []string{"99-tidewaiter"} }, "NOT_REQUIRED", true, AtCreate},
		"not required in audit": {func(s *Status) {
			s.Runtime.Plugins, s.Mode, s.Runtime.Audit = []string{"99-tidewaiter"}, "audit", true
		}, "", true, None},
		"a duplicate": {func(s *Status) { s.Runtime.DuplicatePlugins = 1 }, "DUPLICATE_PLUGIN", true, AtCreate},
		"hangs":       {func(s *Status) { s.Runtime.Hung = 3 }, "RUNTIME_HANGS", true, AtCreate},
		"many images": {func(s *Status) { s.Images = "more than one answer of containerd may hold" }, "TOO_MANY_IMAGES", true, AtCreate},
		"zero":        {func(s *Status) { *s = Status{} }, "NO_CONFIGURATION NOT_REGISTERED", false, None},
	} {
		t.Run(name, func(t *testing.T) {
			s := healthy("one")
			tt.change(&s)
			s.Judge()
			var codes []string
			for _, p := range s.Problems {
				codes = append(codes, p.Code)
				if !slices.Contains(Codes, p.Code) {
					t.Errorf("%s is not in Codes", p.Code)
				}
				if p.Text == "" || p.Next == "" {
					t.Errorf("%s has no text or no next step", p.Code)
				}
			}
			if strings.Join(codes, " ") != tt.codes || s.Ready != tt.ready || s.Healthy != (tt.codes == "") || s.Assurance != tt.assurance {
				t.Errorf("problems %v, ready %t, healthy %t, assurance %s", codes, s.Ready, s.Healthy, s.Assurance)
			}
			r := s.Readiness()
			if r.Ready != tt.ready || !tt.ready && (r.Reason != codes[0] || r.Detail == "") || tt.ready && r.Reason != "" {
				t.Errorf("readiness %+v", r)
			}
		})
	}
	// Nothing that a script reads is absent, or null where it is a list.
	raw, err := json.Marshal(Status{Problems: []Problem{}})
	must(t, err)
	for _, key := range []string{`"healthy":false`, `"ready":false`, `"problems":[]`, `"assurance":""`, `"since":null`, `"rejected":null`, `"awaitingSync":null`} {
		if !strings.Contains(string(raw), key) {
			t.Errorf("no %s in %s", key, raw)
		}
	}
}
