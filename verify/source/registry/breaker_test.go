package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A bench is a registry on loopback with a way to break it, and its mirror.
type bench struct {
	t       *testing.T
	now     time.Time
	url     *url.URL
	breaker *registry.Breaker
	serve   atomic.Pointer[handler]
	late    atomic.Pointer[deadline] // of the question under way
	asked   atomic.Int64
	http    *http.Client
}

type handler func(*bench, http.ResponseWriter, *http.Request)

// A deadline comes when the test says so.
type deadline struct {
	context.Context
	done chan struct{}
}

func (d *deadline) Done() <-chan struct{} { return d.done }

func (d *deadline) Err() error {
	select {
	case <-d.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), http: client(t, nil)}
	b.breaker = registry.NewBreaker(func() time.Time { return b.now }, func() float64 { return 0.5 })
	b.url = start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.asked.Add(1)
		(*b.serve.Load())(b, w, r)
	}))
	b.answers(status(404))
	return b
}

func (b *bench) answers(f handler) { b.serve.Store(&f) }

func status(code int, header ...string) handler {
	return func(_ *bench, w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// hang has the question's deadline come while it waits.
func hang(b *bench, _ http.ResponseWriter, r *http.Request) {
	close(b.late.Load().done)
	<-r.Context().Done()
}

func (b *bench) source() *registry.Source {
	return registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: b.url, Client: b.http, Breaker: b.breaker})
}

// find asks about a repository and returns how many requests that cost.
func (b *bench) find(path string) (int64, error) { b.t.Helper(); return b.about(path, "app") }

// about asks about one of its images.
func (b *bench) about(path, word string) (int64, error) {
	b.t.Helper()
	var c sourcetest.Content
	before := b.asked.Load()
	name := verify.Name{Host: sourcetest.Name.Host, Path: path}
	ctx := &deadline{b.t.Context(), make(chan struct{})}
	b.late.Store(ctx)
	err := b.source().Find(ctx, name, c.Image(word), verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
	return b.asked.Load() - before, err
}

// open asserts whether a repository's question is kept from the registry.
func (b *bench) open(path string, want bool) {
	b.t.Helper()
	n, err := b.find(path)
	if want && (n != 0 || !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), "not asked, since ")) {
		b.t.Errorf("%s: %d requests, error %v; want none", path, n, err)
	} else if !want && (err != nil && strings.Contains(err.Error(), "not asked, since ")) {
		b.t.Errorf("%s: error %v", path, err)
	}
}

// What opens a circuit, and whose.
func TestCircuit(t *testing.T) {
	t.Parallel()
	cut := func(_ *bench, w http.ResponseWriter, _ *http.Request) {
		c, _, _ := w.(http.Hijacker).Hijack()
		c.Close()
	}
	trickle := func(b *bench, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
		w.Write([]byte("{"))
		w.(http.Flusher).Flush()
		hang(b, w, r)
	}
	for name, tt := range map[string]struct {
		answer handler
		opens  int // failures that it takes; 0: never
	}{
		"hangs":                 {hang, 2},
		"a byte, then nothing":  {trickle, 2},
		"closes the connection": {cut, 2},
		"429":                   {status(429), 2},
		"503":                   {status(503), 2},
		"429 for a while":       {status(429, "Retry-After", "1"), 1},
		"503 until then":        {status(503, "Retry-After", "Sun, 01 Mar 2026 12:00:01 GMT"), 1},
		"503 until before":      {status(503, "Retry-After", "Sun, 01 Mar 2026 11:00:00 GMT"), 2},
		"503 for no time":       {status(503, "Retry-After", "0"), 2},
		"404":                   {status(404), 0},
		"401":                   {status(401), 0},
		"403":                   {status(403), 0},
		"500":                   {status(500), 0},
		"502":                   {status(502), 0},
		"not JSON":              {status(200, "Content-Type", "application/vnd.oci.image.index.v1+json"), 0},
		"redirects elsewhere":   {status(302, "Location", "http://127.0.0.1:1/x"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			b.answers(tt.answer)
			for i := range 4 {
				b.open("evil/app", tt.opens > 0 && i >= tt.opens)
			}
			// Whoever owns some repositories closes the mirror for nobody else.
			for i := range 20 {
				b.find(fmt.Sprint("evil/app", i%10))
			}
			b.answers(status(404))
			if n, err := b.find("team/app"); n == 0 || !errors.Is(err, verify.ErrNoReferrers) {
				t.Errorf("another repository: %d requests, error %v", n, err)
			}
			// An answer of whatever kind closes it.
			if tt.opens > 0 {
				b.now = b.now.Add(time.Second)
				b.open("evil/app", false)
				b.answers(tt.answer)
				b.open("evil/app", false)
				b.open("evil/app", tt.opens == 1 && name != "503 until then") // that is over
			}
		})
	}
}

// A registry that no connection can be made to is closed for all its repositories,
// of whatever host, for longer each time, and one question finds out.
func TestCircuitOfRegistry(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	real := b.url
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	b.url = &url.URL{Scheme: "http", Host: addr}
	dials := func(path string) bool {
		t.Helper()
		_, err := b.find(path)
		if !errors.Is(err, verify.ErrUnreachable) {
			t.Errorf("error %v", err)
		}
		return strings.HasSuffix(fmt.Sprint(err), "connection refused")
	}
	if !dials("team/a") || !dials("team/b") {
		t.Error("not asked at first")
	}
	for _, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 4 * time.Second} {
		want -= want / 8 // the random part
		if dials("team/c") {
			t.Errorf("open for %v: asked at once", want)
		}
		_, err := b.find("team/a")
		if s := fmt.Sprint(err); s != "source did not answer: not asked, since the registry has failed since 2026-03-01T12:00:00Z (connection refused); tried again in "+want.Round(100*time.Millisecond).String() {
			t.Errorf("error %s", s)
		}
		b.now = b.now.Add(want - time.Millisecond)
		if dials("team/c") {
			t.Errorf("open for %v: asked too early", want)
		}
		b.now = b.now.Add(time.Millisecond)
		if !dials("team/c") {
			t.Errorf("open for %v: nobody finds out", want)
		}
	}
	// A clock that is set back does not keep it open.
	b.now = b.now.Add(-10 * 365 * 24 * time.Hour)
	if !dials("team/a") {
		t.Error("not asked after the clock was set back")
	}

	// Another port of the host is another registry.
	b.url = real
	if n, _ := b.find("team/a"); n == 0 {
		t.Error("another registry is not asked")
	}
	// The same one, back again, is closed by one answer.
	back, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatalf("the port was taken meanwhile: %v", err)
	}
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Listener.Close()
	srv.Listener = back
	srv.Start()
	defer srv.Close()
	b.url = &url.URL{Scheme: "http", Host: addr}
	b.now = b.now.Add(5 * time.Second)
	for range 3 {
		if _, err := b.find("team/a"); !errors.Is(err, verify.ErrNoReferrers) {
			t.Errorf("error %v", err)
		}
	}
}

// One question finds out, others do not wait for it; one that panics or is given up
// leaves that to the next.
func TestProbe(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.answers(hang)
	b.find("team/app")
	b.find("team/app")
	b.now = b.now.Add(time.Second)
	under, release := make(chan struct{}), make(chan struct{})
	var first sync.Once
	b.answers(func(_ *bench, w http.ResponseWriter, _ *http.Request) {
		first.Do(func() { close(under) })
		<-release
		w.WriteHeader(404)
	})
	done := make(chan error)
	go func() { _, err := b.find("team/app"); done <- err }()
	<-under
	for range 3 {
		n, err := b.find("team/app")
		if n != 0 || !strings.HasSuffix(fmt.Sprint(err), "; it is being tried now") {
			t.Errorf("%d requests, error %v", n, err)
		}
	}
	close(release)
	if err := <-done; !errors.Is(err, verify.ErrNoReferrers) {
		t.Errorf("error %v", err)
	}
	b.answers(status(404))
	b.open("team/app", false)

	c, subject, _ := signed(1)
	g := serve(c)
	b.answers(status(429, "Retry-After", "1"))
	b.find(sourcetest.Name.Path)
	b.now = b.now.Add(time.Second)
	b.answers(func(_ *bench, w http.ResponseWriter, r *http.Request) { g.ServeHTTP(w, r) })
	func() {
		defer func() { _ = recover() }()
		b.source().Find(t.Context(), sourcetest.Name, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { panic("a parser") })
	}()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b.source().Find(ctx, sourcetest.Name, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
	b.answers(status(404))
	b.open(sourcetest.Name.Path, false)
}

// An image that fails whenever it is asked for, and is asked for without end, does not
// keep the others of its repository from being asked for.
func TestBlame(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	bad := func(code int, header ...string) {
		t.Helper()
		b.answers(status(code, header...))
		for range 5 {
			if n, err := b.find("team/app"); !errors.Is(err, verify.ErrUnreachable) {
				t.Fatalf("%d requests, error %v", n, err)
			}
		}
	}
	bad(503)
	if n, err := b.find("team/app"); n != 0 {
		t.Errorf("the image that fails: %d requests, error %v", n, err)
	}
	b.answers(status(404))
	if n, err := b.about("team/app", "fresh"); n == 0 || !errors.Is(err, verify.ErrNoReferrers) {
		t.Errorf("a fresh image: %d requests, error %v", n, err)
	}
	if n, _ := b.find("team/app"); n == 0 {
		t.Error("an answer about another image did not close the circuit")
	}

	// Whoever has many that fail is remembered by a few of them.
	bad(503)
	asked := 0
	for i := range 100 {
		n, _ := b.about("team/app", fmt.Sprint("many", i))
		asked += int(n)
	}
	if asked == 0 || asked > 2*8 {
		t.Errorf("%d requests for 100 images that fail", asked)
	}

	// A registry that asks for silence has it.
	b.now = b.now.Add(time.Hour)
	b.answers(status(404))
	b.open("team/app", false)
	bad(429, "Retry-After", "10")
	if n, _ := b.about("team/app", "fresh"); n != 0 {
		t.Errorf("%d requests to a registry that wants none", n)
	}
	// So does one that is away.
	b.breaker = registry.NewBreaker(func() time.Time { return b.now }, func() float64 { return 0.5 })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.url = &url.URL{Scheme: "http", Host: l.Addr().String()}
	l.Close()
	b.find("team/app")
	b.find("team/app")
	if _, err := b.about("team/app", "fresh"); !strings.Contains(fmt.Sprint(err), "not asked, since the registry") {
		t.Errorf("a registry that is away: error %v", err)
	}
}

// While a circuit is open nobody says that there is no signature, and the answer is
// there at once.
func TestOpenCircuitIsNoAnswer(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.answers(status(503, "Retry-After", "3600"))
	var c sourcetest.Content
	subject := c.Image("app")
	by, err := verify.SignedBy(verify.Leaf{Kind: sourcetest.Kind.Name(), Authority: "prod", Hash: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	e := &verify.Engine{
		Sources:  func(verify.Name) []verify.Source { return []verify.Source{b.source()} },
		Checkers: []verify.Checker{noChecker{}}, Now: func() time.Time { return b.now },
	}
	q := verify.Question{
		Image: verify.Image{Name: sourcetest.Name, Target: subject, Manifest: subject, Config: subject.Digest, Use: verify.UseContainer, Binding: verify.BoundRuntime},
		Rule:  &verify.Rule{Name: "prod", Require: by},
	}
	for i := range 4 {
		before := b.asked.Load()
		d := e.Evaluate(t.Context(), q)
		if d.Allowed() || d.Reason != verify.SourceUnreachable || b.asked.Load()-before != int64(max(1-i, 0)) {
			t.Errorf("try %d: %v, %s, %d requests", i, d.Reason, d.Detail, b.asked.Load()-before)
		}
	}
	// An hour is more than a registry may ask for.
	b.now = b.now.Add(30 * time.Second)
	b.open(sourcetest.Name.Path, false)
}

type noChecker struct{}

func (noChecker) Kind() verify.Kind       { return sourcetest.Kind }
func (noChecker) Anchors(string) []string { return nil }

func (noChecker) Check(context.Context, verify.Evidence, ocispec.Descriptor, string) verify.Finding {
	return verify.Finding{}
}

// What is asked ahead of time keeps to 20 requests a second; hooks do not wait for
// that.
func TestPace(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var times []time.Time
	b.answers(func(_ *bench, w http.ResponseWriter, _ *http.Request) {
		times = append(times, time.Now())
		w.WriteHeader(404)
	})
	b.breaker = registry.NewBreaker(time.Now, func() float64 { return 0 })
	var c sourcetest.Content
	subject := c.Image("app")
	ask := func(ctx context.Context, ahead bool) error {
		budget := verify.NewBudget(sourcetest.Kind, verify.Limits{})
		budget.Prefetch = ahead
		return b.source().Find(ctx, sourcetest.Name, subject, budget, func(verify.Evidence) bool { return true })
	}
	for range 12 { // two requests each
		if err := ask(t.Context(), true); !errors.Is(err, verify.ErrNoReferrers) {
			t.Fatal(err)
		}
	}
	// All but a burst of 4 wait for 50 ms each; a clock never runs fast.
	if took := times[len(times)-1].Sub(times[0]); len(times) != 24 || took < 19*50*time.Millisecond {
		t.Errorf("%d requests in %v", len(times), took)
	}
	// The limiter is empty, and its turn never comes with a clock that stands still.
	b.breaker = registry.NewBreaker(func() time.Time { return b.now }, func() float64 { return 0 })
	for range 2 {
		ask(t.Context(), true)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 {
		if err := ask(ctx, true); !errors.Is(err, verify.ErrUnreachable) {
			t.Errorf("error %v", err)
		}
	}
	n := len(times)
	if err := ask(t.Context(), false); !errors.Is(err, verify.ErrNoReferrers) || len(times) != n+2 {
		t.Errorf("a hook's question: %v, %d requests", err, len(times)-n)
	}
}
