package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"

	"github.com/tidewaiter/tidewaiter/verify"
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
	dialTimeout     = 2 * time.Second
	largeTimeout    = 10 * time.Second       // for Large
	largeAgain      = 30 * time.Second       // for Large after a registration that did not get through
	largeWait       = 5 * time.Second        // after Large said something, and twice as long each time
	largeMost       = time.Minute            // up to this: the runtime reads all its records for it
	registerTimeout = 10 * time.Second       // registration, configuration and all of Synchronize
	confirm         = 200 * time.Millisecond // the runtime drops a plugin that it could not synchronise just after the answer
	settled         = 30 * time.Second       // a connection that lived this long starts the backoff anew

	// Waits are drawn evenly between nothing and a bound that doubles, so that the
	// plugins of a node do not come back all at once.
	minBackoff = 500 * time.Millisecond
	maxBackoff = 3 * time.Second

	// A connection is closed once nothing was asked for quiet, or else after farewell,
	// which an answer (budget) fits into.
	quiet    = 50 * time.Millisecond
	farewell = 2 * time.Second
	// patience is for how many times quiet an answer is waited for to leave after.
	patience = 5
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

	// Random returns numbers in [0, 1), for the time between two tries. Nil is that
	// of math/rand/v2.
	Random func() float64

	// Live counts the gates that run on this node, this one included, as
	// [Instance.Live] does. Nil, or where it fails: this one alone. It is asked at
	// most once a second, and only while the runtime lists more than one of our name.
	Live func() (int, error)

	failed   bool                  // the last registration did not get through; owned by Run
	current  atomic.Pointer[trunk] // of the registered connection; nil: none is
	roster   roster
	underWay atomic.Int64
	late     atomic.Uint64
	latest   atomic.Int64 // nanoseconds
	lateSaid pace

	mu    sync.Mutex
	renew context.CancelFunc // ends the connection or the wait for the next; nil where there is none
	known State              // the part of it that does not change by itself
}

// Renew ends the connection, so that Run registers anew at once.
func (s *Session) Renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.renew != nil {
		s.renew()
	}
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
		one, cancel := context.WithCancel(ctx)
		s.mu.Lock()
		s.renew = cancel
		s.mu.Unlock()
		s.try(one, &b)
		if one.Err() != nil && ctx.Err() == nil {
			s.Log.Info("registering anew: the mode changed")
			b.bound = minBackoff
		}
		cancel()
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
	err := s.once(ctx)
	now := s.Gate.Now()
	s.mu.Lock()
	if s.current.Swap(nil) != nil {
		s.known.Since = now
	}
	if ctx.Err() == nil {
		s.known.Error, s.known.ErrorAt = err.Error(), now
	}
	s.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	var unheard *net.OpError
	if now.Sub(start) > settled || errors.As(err, &unheard) {
		b.bound = minBackoff // it was well, or nobody listens, and trying costs the runtime nothing
	}
	wait := time.Duration(b.random() * float64(b.bound))
	if errors.Is(err, errLarge) {
		b.large = min(max(2*b.large, largeWait), largeMost)
		wait = b.large
	} else {
		b.large = 0
	}
	// A runtime that is away for an hour is a line a minute, not thousands.
	level := slog.LevelDebug
	since := now.Sub(b.saidAt)
	if b.saidAt.IsZero() || since >= logEvery || since >= time.Second && err.Error() != b.said {
		b.said, b.saidAt, level = err.Error(), now, slog.LevelError
	}
	s.Log.Log(ctx, level, "not registered with the runtime", "error", err.Error(), "retry", wait.String())
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
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
		limit = largeAgain
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	why, err := s.Large(ctx)
	if why != "" {
		return fmt.Errorf("%w: %s", errLarge, why)
	}
	if err != nil && s.failed {
		return fmt.Errorf("find out why the runtime ended the last registration: %w", err)
	}
	return nil
}

// once connects, registers and serves until the connection ends. It never
// returns nil.
func (s *Session) once(ctx context.Context) error {
	if err := s.large(ctx); err != nil {
		return err
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "unix", s.Socket)
	if err != nil {
		return fmt.Errorf("connect to the runtime: %w", err)
	}
	c := &trunk{Conn: conn, ended: make(chan struct{})}
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
	s.roster.reset()

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
		c.leave(closed, s.roster.others())
		return ctx.Err()
	}
	select {
	case <-p.synced:
	case <-closed:
		return fmt.Errorf("the runtime closed the connection before it was synchronised (where eight containers have more than 4 MiB of environment together, NRI cannot list them, and the runtime's log says so)%s", p.hint())
	case <-timeout.C:
		return errors.New("the runtime did not synchronise the plugin in time")
	case <-ctx.Done():
		return leave()
	}
	s.failed = false
	still := time.NewTimer(confirm)
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
	select {
	case <-closed:
		return errors.New("the runtime closed the connection")
	case <-ctx.Done():
		return leave()
	}
}

// A trunk is the connection to the runtime. It says when that ended: the stub's
// own notice waits for Start, which may be waiting for the runtime. And it knows
// when every request was answered, down to the last byte written, which neither
// the stub nor ttrpc tells.
type trunk struct {
	net.Conn
	once  sync.Once
	ended chan struct{}

	mu      sync.Mutex
	begun   uint64 // requests that were read
	open    int    // of them those whose answer is not written yet
	due     int    // of those the ones whose answer is about to be
	leaving bool   // the next answer after which nothing is open is the last
	cutting bool   // what is asked next ends the connection
}

func (c *trunk) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (c *trunk) Close() error {
	c.once.Do(func() { close(c.ended) })
	return c.Conn.Close()
}

func (c *trunk) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { close(c.ended) })
	}
	return n, err
}

// frameHeader is what NRI's multiplexer writes before each frame, by itself
// (pkg/net/multiplex). A message of ttrpc is longer, and ours fit a frame.
const frameHeader = 8

func (c *trunk) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if len(b) > frameHeader && c.written() {
		c.Close()
	}
	return n, err
}

// asked notes that a request was read, and answered that its handler returned.
func (c *trunk) asked() {
	c.mu.Lock()
	c.begun++
	c.open++
	cut := c.cutting
	c.mu.Unlock()
	if cut {
		c.Close()
	}
}

func (c *trunk) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due++
}

// written notes that an answer was written, and reports whether it was the last.
func (c *trunk) written() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.due == 0 {
		return false // our own request to register
	}
	c.due--
	c.open--
	return c.leaving && c.open == 0
}

// leave returns when the connection may be closed, or is. What is asked meanwhile
// is answered as ever.
//
// NRI knows no goodbye. A request that is on its way when the connection ends is
// refused, or worse: NRI 0.12.5 lets it through if the gate was counted present
// just before and found gone just after. So the connection is ended when nobody
// asks. If another gate is asked too, and will be, it is ended right after an
// answer, since the runtime asks one question at a time. And if neither comes to
// pass, it is ended with a question open, which is refused everywhere.
func (c *trunk) leave(closed <-chan struct{}, others bool) {
	c.mu.Lock()
	c.leaving = others
	begun := c.begun
	c.mu.Unlock()
	limit := time.NewTimer(farewell)
	defer limit.Stop()
	tick := time.NewTicker(quiet)
	defer tick.Stop()
	enough := 1
	if others {
		enough = patience
	}
	for still := 0; ; {
		select {
		case <-closed:
			return
		case <-limit.C:
			c.mu.Lock()
			c.cutting = true
			hangs := c.open > 0
			c.mu.Unlock()
			if hangs {
				return
			}
		case <-tick.C:
			c.mu.Lock()
			if still++; c.open > 0 || c.begun != begun {
				still = 0
			}
			begun = c.begun
			c.mu.Unlock()
			if still == enough {
				return
			}
		}
	}
}

// A plugin is one connection's view of the gate.
type plugin struct {
	session *Session
	gate    *Gate
	conn    *trunk
	audit   bool                 // when it registered
	peer    atomic.Pointer[peer] // nil until the runtime configured the plugin
	waiting atomic.Bool          // the stub registers, and waits for Configure after that
	aborted atomic.Bool
	done    atomic.Bool // Synchronize is through
	synced  chan struct{}
}

// A peer is the runtime that configured the plugin.
type peer struct {
	runtime, version string
	events           api.EventMask
}

// Configure tells the runtime which events the plugin wants. The mask is made
// anew for each connection and never from the version that the stub infers,
// which fails for builds such as "2.2.9+unknown". To enforce it always asks for
// VALIDATE and never for CREATE: a runtime that has no such event refuses the
// registration, and nothing else would stay closed. To audit it asks for CREATE,
// so that nothing depends on the gate.
func (p *plugin) Configure(_ context.Context, _, runtime, version string) (api.EventMask, error) {
	if p.aborted.Load() {
		return 0, errors.New("the connection ended before the plugin was configured")
	}
	if runtime != "containerd" {
		return 0, fmt.Errorf("the runtime %q is not containerd, the only one whose images can be bound", runtime)
	}
	mask := api.EventMask(0)
	if p.audit {
		mask.Set(api.Event_CREATE_CONTAINER)
	} else {
		mask.Set(api.Event_VALIDATE_CONTAINER_ADJUSTMENT, api.Event_RUN_POD_SANDBOX)
	}
	compares := !tellsConfig(version)
	if compares {
		mask.Set(api.Event_START_CONTAINER)
	}
	p.gate.Resolver.Connected(compares)
	p.peer.Store(&peer{runtime, version, mask})
	p.session.configured(p)
	return mask, nil
}

// configured remembers for State what is known of the runtime now.
func (s *Session) configured(p *plugin) {
	r := p.peer.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known.Audit = p.audit
	s.known.Runtime, s.known.Version = verify.Clean(r.runtime, 64), verify.Clean(r.version, 64)
	s.known.Hooks = strings.Split(r.events.PrettyString(), ",")
}

// RunPodSandbox is asked for to enforce. It keeps pods away that would keep the gate
// from registering again, and decides nothing else.
func (p *plugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	defer p.session.answered(ctx, "RunPodSandbox", p.session.asked())
	return p.gate.RunPodSandbox(ctx, pod)
}

// CreateContainer is asked for only in audit. It changes nothing.
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	defer p.session.answered(ctx, "CreateContainer", p.session.asked())
	return nil, nil, p.gate.CreateContainer(ctx, pod, ctr, p.session.Audit())
}

// ValidateContainerAdjustment is asked for to enforce.
func (p *plugin) ValidateContainerAdjustment(ctx context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	defer p.session.answered(ctx, "ValidateContainerAdjustment", p.session.asked())
	p.session.roster.see(p.session, req.GetPlugins())
	return p.gate.ValidateContainerAdjustment(ctx, req)
}

// StartContainer is asked for only where tellsConfig is false.
func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	defer p.session.answered(ctx, "StartContainer", p.session.asked())
	return p.gate.StartContainer(ctx, pod, ctr)
}

// watch counts requests, and sees the last chunk of Synchronize answered. Its payload, which holds the
// environment of every container on the node, is dropped by the stub, since the
// plugin has no handler for it.
func (p *plugin) watch(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	p.conn.asked()
	defer p.conn.answered()
	size := new(int)
	if !strings.HasSuffix(info.FullMethod, "/Synchronize") {
		return method(withSize(ctx, size), lean(unmarshal, size))
	}
	more := false
	r, err := method(ctx, func(v any) error {
		err := lean(unmarshal, size)(v)
		if req, ok := v.(*api.SynchronizeRequest); ok {
			more = req.GetMore()
		}
		return err
	})
	if err == nil && !more && p.done.CompareAndSwap(false, true) {
		close(p.synced)
	}
	return r, err
}

// abort ends a Start that waits for a Configure which will not come, by calling
// that. Before the stub registers there is nothing to end: Start fails by itself
// once the connection is closed. It may be called again and does something once.
func (p *plugin) abort(st stub.Stub) {
	if !p.waiting.Load() || p.peer.Load() != nil || !p.aborted.CompareAndSwap(false, true) {
		return
	}
	if c, ok := st.(interface {
		Configure(context.Context, *api.ConfigureRequest) (*api.ConfigureResponse, error)
	}); ok {
		_, _ = c.Configure(context.Background(), &api.ConfigureRequest{})
	}
}

// hint says what a refused registration most likely means, and what to do.
func (p *plugin) hint() string {
	r := p.peer.Load()
	if r == nil || p.audit {
		return ""
	}
	if major, minor, ok := release(r.version); ok && (major < 2 || major == 2 && minor < 2) {
		return fmt.Sprintf("; containerd %s has no hook that stays closed when the gate fails, so that mode enforce cannot be kept there: upgrade containerd to 2.2 or later, or set mode: audit", verify.Clean(r.version, 64))
	}
	return ""
}

// tellsConfig reports whether a containerd of that version hands the image's
// digests to NRI (2.4 and later). A version that cannot be read might not, and
// then the comparison at StartContainer is asked for too.
func tellsConfig(version string) bool {
	major, minor, ok := release(version)
	return ok && (major > 2 || major == 2 && minor >= 4)
}

// release reads the first two numbers of a version such as "v2.4.2",
// "2.2.9+unknown" or "1.7.24".
func release(version string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &major, &minor)
	return major, minor, n == 2 && err == nil
}

// stubLog passes what the NRI stub says on at debug level. It is also the only
// sign that Start has got as far as registering.
type stubLog struct {
	log    *slog.Logger
	plugin *plugin
}

func (l stubLog) Debugf(ctx context.Context, format string, args ...any) {
	l.log.DebugContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}

func (l stubLog) Infof(ctx context.Context, format string, args ...any) {
	if strings.HasPrefix(format, "Registering plugin") {
		l.plugin.waiting.Store(true)
	}
	l.Debugf(ctx, format, args...)
}

func (l stubLog) Warnf(ctx context.Context, format string, args ...any) {
	l.Debugf(ctx, format, args...)
}

func (l stubLog) Errorf(ctx context.Context, format string, args ...any) {
	l.log.WarnContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}
