package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
)

// What the gate registers as. required_plugins names it. With index 99 no other
// plugin's work lies between our being counted present and our being asked, unless
// that has index 99 too and registered later: NRI 0.12.5 lets a container through
// when the connection drops meanwhile (docs/fail-closed.md).
const (
	PluginName  = "tidewaiter"
	PluginIndex = "99"
)

const (
	dialTimeout       = 2 * time.Second
	largeTimeout      = 10 * time.Second       // for Large
	largeRetryTimeout = 30 * time.Second       // for Large after a registration that did not get through
	minLargeRetry     = 5 * time.Second        // after Large said something, and twice as long each time
	maxLargeRetry     = time.Minute            // up to this: the runtime reads all its records for it
	clearTimeout      = time.Minute            // for Clear
	clearRounds       = 16                     // of Clear, before Large is waited for
	registerTimeout   = 10 * time.Second       // registration and configuration
	syncLateAfter     = 5 * time.Second        // Synchronize, before that counts as held up
	syncTimeout       = time.Minute            // Synchronize, before the gate registers again
	confirmTime       = 200 * time.Millisecond // the runtime drops a plugin that it could not synchronise just after the answer
	settledAfter      = 30 * time.Second       // a connection that lived this long starts the backoff anew

	// Waits are drawn evenly between nothing and a bound that doubles, so that the
	// plugins of a node do not come back all at once.
	minBackoff = 500 * time.Millisecond
	maxBackoff = 3 * time.Second

	// A connection is closed once nothing was asked for quietTime, or else after leaveTimeout,
	// which an answer (budget) fits into.
	quietTime    = 50 * time.Millisecond
	leaveTimeout = 2 * time.Second
	// answerTicks is for how many times quietTime an answer is waited for to leave after.
	answerTicks = 5
)

// A Session keeps a Gate registered with the runtime for as long as Run runs: it
// connects, registers, and connects again when the runtime restarts or drops it.
type Session struct {
	Gate   *Gate
	Socket string // the runtime's NRI socket
	Log    *slog.Logger

	// Audit reports whether the node only audits. It is asked at each registration:
	// then the gate is asked in CreateContainer, where a runtime goes on without a
	// plugin that fails, instead of ValidateContainerAdjustment, where it refuses the
	// container. Call Renew when the answer changes.
	Audit func() bool

	// Large says which pods and containers keep the runtime from telling a plugin of
	// all that there are, or is empty. While it is not, the gate does not register: that
	// would fail, or bring the runtime down. It is asked before each registration; nil
	// says nothing.
	Large func(context.Context) (string, error)

	// Clear takes away some pods without containers that the gate would have refused, and
	// says how many it took. It is called where Large said something and the node
	// enforces, and never while the gate registers. Nil takes nothing.
	Clear func(context.Context) (int, error)

	// Random returns numbers in [0, 1), for the time between two tries. Nil is that
	// of math/rand/v2.
	Random func() float64

	// Live counts the gates that run on this node, this one included, as
	// [Instance.Live] does. Nil, or where it fails: this one alone. It is asked at
	// most once a second, and only while the runtime lists more than one of our name.
	Live func() (int, error)

	failed    bool                       // the last registration did not get through; owned by Run
	heldSince time.Time                  // since when registrations are not synchronised; owned by Run
	current   atomic.Pointer[connection] // of the registered connection; nil: none is
	plugins   pluginList
	underWay  atomic.Int64
	late      atomic.Uint64
	latest    atomic.Int64 // nanoseconds
	lateSaid  pace

	once    sync.Once
	changed chan struct{} // holds one where Renew was called; see changes

	mu    sync.Mutex
	known State // the part of it that does not change by itself
}

// Renew says that the answer of Audit changed. It ends the wait for the next
// connection. A connection that works is given up only to enforce on it what it was not
// registered for, and only once Large says that the next can be had (see serve).
func (s *Session) Renew() {
	select {
	case s.changes() <- struct{}{}:
	default:
	}
}

func (s *Session) changes() chan struct{} {
	s.once.Do(func() { s.changed = make(chan struct{}, 1) })
	return s.changed
}

// Registered reports whether the runtime asks this gate now. It is false from the
// moment that the connection ends.
func (s *Session) Registered() bool {
	c := s.current.Load()
	return c != nil && !c.hasEnded()
}

// Run returns when ctx ends, with nil. What is under way then is answered first,
// for at most two seconds: what the answer rests on must last until Run returns.
func (s *Session) Run(ctx context.Context) error {
	b := backoff{random: s.Random, bound: minBackoff}
	if b.random == nil {
		b.random = rand.Float64
	}
	for ctx.Err() == nil {
		s.try(ctx, &b)
	}
	return nil
}

// A backoff is how long to wait until the next try, and what was said of the last.
type backoff struct {
	random func() float64
	bound  time.Duration
	large  time.Duration // the last wait after Large said something
	said   string        // the last error in the log
	saidAt time.Time
}

// try keeps one connection for as long as it lasts, and waits where the next must
// not be tried at once. It returns early when ctx ends.
func (s *Session) try(ctx context.Context, b *backoff) {
	start := s.Gate.Now()
	err := s.connect(ctx)
	now := s.Gate.Now()
	s.mu.Lock()
	if s.current.Swap(nil) != nil {
		s.known.Since = now
	}
	if !errors.Is(err, errUnsynced) {
		s.heldSince = time.Time{}
	}
	s.known.Awaiting, s.known.Held = s.heldSince, ""
	if ctx.Err() == nil && !errors.Is(err, errRenewed) {
		s.known.Error, s.known.ErrorAt = err.Error(), now
	}
	s.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	if errors.Is(err, errRenewed) {
		s.Log.Info("registering anew: the mode changed")
		b.bound = minBackoff
		return
	}
	var unheard *net.OpError
	if now.Sub(start) > settledAfter || errors.As(err, &unheard) {
		b.bound = minBackoff // it was well, or nobody listens, and trying costs the runtime nothing
	}
	wait := time.Duration(b.random() * float64(b.bound))
	if errors.Is(err, errLarge) {
		b.large = min(max(2*b.large, minLargeRetry), maxLargeRetry)
		wait = b.large
	} else {
		b.large = 0
	}
	// A runtime that is away for an hour is a line a minute, not thousands.
	level := slog.LevelDebug
	since := now.Sub(b.saidAt)
	if b.saidAt.IsZero() || since >= logInterval || since >= time.Second && err.Error() != b.said {
		b.said, b.saidAt, level = err.Error(), now, slog.LevelError
	}
	s.Log.Log(ctx, level, "not registered with the runtime", "error", err.Error(), "retry", wait.String())
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-s.changes():
		b.bound = minBackoff
		return
	case <-timer.C:
	}
	b.bound = min(2*b.bound, maxBackoff)
}

// errLarge is wrapped where the gate does not even try to register.
var errLarge = errors.New("the gate does not register, since containerd could not tell it of all pods and containers, and would perhaps end over it")

// large is an error where the gate must not register. What could not be found out
// keeps it only where its last registration did not get through, perhaps since the
// runtime ended over it.
func (s *Session) large(ctx context.Context) error {
	if s.Large == nil {
		return nil
	}
	if _, err := os.Stat(s.Socket); err != nil {
		return nil // there is nobody to register with
	}
	limit := largeTimeout
	if s.failed {
		limit = largeRetryTimeout
	}
	why, err := s.clearUp(ctx, limit)
	if why != "" {
		return fmt.Errorf("%w: %s", errLarge, why)
	}
	if err != nil && s.failed {
		return fmt.Errorf("find out why the runtime ended the last registration: %w", err)
	}
	return nil
}

// clearUp returns what keeps the gate from registering once what may be taken away was.
func (s *Session) clearUp(ctx context.Context, limit time.Duration) (string, error) {
	why, err := s.look(ctx, limit)
	for round := 0; why != "" && round < clearRounds && s.clear(ctx); round++ {
		why, err = s.look(ctx, limit) // at once: a kubelet makes the pod again, and then a gate is to refuse it
	}
	return why, err
}

func (s *Session) look(ctx context.Context, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return s.Large(ctx)
}

// clear reports whether something was taken away that keeps the gate from registering.
func (s *Session) clear(ctx context.Context) bool {
	if s.Clear == nil || s.Audit() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, clearTimeout)
	defer cancel()
	n, err := s.Clear(ctx)
	if err != nil && ctx.Err() == nil {
		s.Log.Error("pods that keep the gate from registering could not be taken away", "error", err.Error())
	}
	return n > 0
}

// connect connects, registers and serves until the connection ends. It never
// returns nil.
func (s *Session) connect(ctx context.Context) error {
	select {
	case <-s.changes(): // which is seen below
	default:
	}
	if err := s.large(ctx); err != nil {
		return err
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "unix", s.Socket)
	if err != nil {
		return fmt.Errorf("connect to the runtime: %w", err)
	}
	c := &connection{Conn: conn, ended: make(chan struct{})}
	p := &plugin{session: s, gate: s.Gate, conn: c, audit: s.Audit(), synced: make(chan struct{})}
	closed := make(chan struct{})
	var once sync.Once
	st, err := stub.New(p,
		stub.WithPluginName(PluginName), stub.WithPluginIdx(PluginIndex),
		stub.WithConnection(c),
		stub.WithOnClose(func() { once.Do(func() { close(closed) }) }),
		stub.WithLogger(stubLog{s.Log, p}),
		stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: !p.audit, KeepConnected: true}),
		stub.WithTTRPCOptions(nil, []ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(p.watch)}),
	)
	if err != nil {
		c.Close()
		return fmt.Errorf("make the NRI plugin: %w", err)
	}
	s.plugins.reset()

	// Hooks run under this context: when ctx ends, what is under way is answered.
	serve, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	started := make(chan error, 1)
	s.failed = true // until it is through
	go func() { started <- st.Start(serve) }()
	timeout := time.NewTimer(registerTimeout)
	defer timeout.Stop()
	// end closes the connection and waits for the stub: Start waits for Configure
	// without a limit, for ever if the runtime went away in between.
	end := func() {
		c.Close()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-started:
				st.Stop()
				return
			case <-tick.C:
				p.abort(st)
			}
		}
	}
	select {
	case err := <-started:
		if err != nil {
			c.Close()
			return fmt.Errorf("register with the runtime: %w%s", err, p.hint())
		}
	case <-c.ended:
		end()
		return fmt.Errorf("register with the runtime: it closed the connection%s", p.hint())
	case <-timeout.C:
		end()
		return errors.New("register with the runtime: it did not configure the plugin in time")
	case <-ctx.Done():
		end()
		return ctx.Err()
	}
	defer st.Stop()
	leave := func() error {
		c.leave(closed, s.plugins.others())
		return ctx.Err()
	}
	switch err := s.await(ctx, p, closed); {
	case ctx.Err() != nil:
		return leave()
	case err != nil:
		return err
	}
	s.failed = false
	still := time.NewTimer(confirmTime)
	defer still.Stop()
	select {
	case <-still.C:
	case <-closed:
		return fmt.Errorf("the runtime closed the connection after it was synchronised%s", p.hint())
	case <-ctx.Done():
		return leave()
	}
	r := p.peer.Load()
	s.mu.Lock()
	s.known.Since = s.Gate.Now()
	s.known.Registrations++
	s.current.Store(c)
	s.mu.Unlock()
	s.Log.Info("registered", "runtime", r.runtime, "version", r.version, "events", r.events.PrettyString())
	if err := s.serve(ctx, p, closed); err != nil {
		return err
	}
	if err := leave(); err != nil {
		return err
	}
	return errRenewed
}
