package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A plugin is one connection's view of the gate.
type plugin struct {
	session *Session
	gate    *Gate
	conn    *connection
	audit   bool                 // when it registered
	peer    atomic.Pointer[peer] // nil until the runtime configured the plugin
	waiting atomic.Bool          // the stub registers, and waits for Configure after that
	aborted atomic.Bool
	done    atomic.Bool // Synchronize is through
	held    atomic.Bool // it stays registered to audit, and the node enforces
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
	s.known.Runtime, s.known.Version = text.Clean(r.runtime, 64), text.Clean(r.version, 64)
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
	return nil, nil, p.gate.CreateContainer(ctx, pod, ctr, p.held.Load() || p.session.Audit())
}

// ValidateContainerAdjustment is asked for to enforce.
func (p *plugin) ValidateContainerAdjustment(ctx context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	defer p.session.answered(ctx, "ValidateContainerAdjustment", p.session.asked())
	p.session.plugins.see(p.session, req.GetPlugins())
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
	size := new(lengths)
	if !strings.HasSuffix(info.FullMethod, "/Synchronize") {
		return method(withLengths(ctx, size), lean(unmarshal, size))
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
		return fmt.Sprintf("; containerd %s has no hook that stays closed when the gate fails, so that mode enforce cannot be kept there: upgrade containerd to 2.2 or later, or set mode: audit", text.Clean(r.version, 64))
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
