package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
)

// What the gate registers as. required_plugins names it; index 99 puts no other
// plugin's work between our being counted present and our being asked, for which
// NRI 0.12.5 lets a container through when the connection drops meanwhile.
const (
	PluginName  = "tidewaiter"
	PluginIndex = "99"
)

const (
	dialTimeout     = 2 * time.Second
	registerTimeout = 10 * time.Second // registration, configuration and all of Synchronize
	minBackoff      = 250 * time.Millisecond
	maxBackoff      = 3 * time.Second
	confirm         = 200 * time.Millisecond // the runtime drops a plugin that it could not synchronise just after the answer
	settled         = 30 * time.Second       // a connection that lived this long starts the backoff anew
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

	registered atomic.Bool
	mu         sync.Mutex
	renew      context.CancelFunc // ends the connection; nil where there is none
}

// Renew ends the connection, so that Run registers anew at once.
func (s *Session) Renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.renew != nil {
		s.renew()
	}
}

// Registered reports whether the runtime asks this gate now.
func (s *Session) Registered() bool { return s.registered.Load() }

// Run returns when ctx ends, with nil.
func (s *Session) Run(ctx context.Context) error {
	wait := minBackoff
	last := ""
	for {
		start := s.Gate.Now()
		one, cancel := context.WithCancel(ctx)
		s.mu.Lock()
		s.renew = cancel
		s.mu.Unlock()
		err := s.once(one)
		s.registered.Store(false)
		renewed := one.Err() != nil
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if renewed {
			s.Log.Info("registering anew: the mode changed")
			wait = minBackoff
			continue
		}
		if s.Gate.Now().Sub(start) > settled {
			wait = minBackoff
		}
		// A runtime that is away for an hour is one line, not a thousand.
		level := slog.LevelDebug
		if err.Error() != last {
			last, level = err.Error(), slog.LevelWarn
		}
		s.Log.Log(ctx, level, "not registered with the runtime", "error", err.Error(), "retry", wait.String())
		var refused *net.OpError
		if errors.As(err, &refused) {
			wait = minBackoff // nobody listens: trying costs the runtime nothing
		}
		timer := time.NewTimer(wait/2 + rand.N(wait/2+1))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		wait = min(2*wait, maxBackoff)
	}
}

// once connects, registers and serves until the connection ends. It never
// returns nil.
func (s *Session) once(ctx context.Context) error {
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "unix", s.Socket)
	if err != nil {
		return fmt.Errorf("connect to the runtime: %w", err)
	}
	watched := &watchedConn{Conn: conn, ended: make(chan struct{})}
	p := &plugin{gate: s.Gate, audit: s.Audit(), audits: s.Audit, synced: make(chan struct{})}
	closed := make(chan struct{})
	var once sync.Once
	st, err := stub.New(p,
		stub.WithPluginName(PluginName), stub.WithPluginIdx(PluginIndex),
		stub.WithConnection(watched),
		stub.WithOnClose(func() { once.Do(func() { close(closed) }) }),
		stub.WithLogger(stubLog{s.Log, p}),
		stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: !p.audit, KeepConnected: true}),
		stub.WithTTRPCOptions(nil, []ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(p.watch)}),
	)
	if err != nil {
		conn.Close()
		return fmt.Errorf("make the NRI plugin: %w", err)
	}

	started := make(chan error, 1)
	go func() { started <- st.Start(ctx) }()
	timeout := time.NewTimer(registerTimeout)
	defer timeout.Stop()
	// end closes the connection and waits for the stub: Start waits for Configure
	// without a limit, for ever if the runtime went away in between.
	end := func() {
		conn.Close()
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
			conn.Close()
			return fmt.Errorf("register with the runtime: %w%s", err, p.hint())
		}
	case <-watched.ended:
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
	select {
	case <-p.synced:
	case <-closed:
		return fmt.Errorf("the runtime closed the connection before it was synchronised%s", p.hint())
	case <-timeout.C:
		return errors.New("the runtime did not synchronise the plugin in time")
	case <-ctx.Done():
		return ctx.Err()
	}
	still := time.NewTimer(confirm)
	defer still.Stop()
	select {
	case <-still.C:
	case <-closed:
		return fmt.Errorf("the runtime closed the connection after it was synchronised%s", p.hint())
	case <-ctx.Done():
		return ctx.Err()
	}
	s.registered.Store(true)
	r := p.peer.Load()
	s.Log.Info("registered", "runtime", r.runtime, "version", r.version, "events", r.events.PrettyString())
	select {
	case <-closed:
		return errors.New("the runtime closed the connection")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A watchedConn says when the runtime ended the connection: the stub's own notice
// waits for Start, which may be waiting for the runtime.
type watchedConn struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { close(c.ended) })
	}
	return n, err
}

// A plugin is one connection's view of the gate.
type plugin struct {
	gate    *Gate
	audit   bool                 // when it registered
	audits  func() bool          // now
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
		mask.Set(api.Event_VALIDATE_CONTAINER_ADJUSTMENT)
	}
	compares := !tellsConfig(version)
	if compares {
		mask.Set(api.Event_START_CONTAINER)
	}
	p.gate.Resolver.Connected(compares)
	p.peer.Store(&peer{runtime, version, mask})
	return mask, nil
}

// CreateContainer is asked for only in audit. It changes nothing.
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return nil, nil, p.gate.CreateContainer(ctx, pod, ctr, p.audits())
}

// ValidateContainerAdjustment is asked for to enforce.
func (p *plugin) ValidateContainerAdjustment(ctx context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	return p.gate.ValidateContainerAdjustment(ctx, req)
}

// StartContainer is asked for only where tellsConfig is false.
func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	return p.gate.StartContainer(ctx, pod, ctr)
}

// watch sees the last chunk of Synchronize answered. Its payload, which holds the
// environment of every container on the node, is dropped by the stub, since the
// plugin has no handler for it.
func (p *plugin) watch(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	if !strings.HasSuffix(info.FullMethod, "/Synchronize") {
		return method(ctx, unmarshal)
	}
	more := false
	r, err := method(ctx, func(v any) error {
		err := unmarshal(v)
		if req, ok := v.(*api.SynchronizeRequest); ok {
			more = req.GetMore()
			req.Pods, req.Containers = nil, nil
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

// hint says what a refused registration most likely means.
func (p *plugin) hint() string {
	r := p.peer.Load()
	if r == nil {
		return ""
	}
	if major, minor, ok := release(r.version); ok && (major < 2 || major == 2 && minor < 2) {
		return fmt.Sprintf("; containerd %s has no hook that stays closed when the gate fails, 2.2 and later have", r.version)
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
