package nri

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A State is what a Session knows of its connection and of what it was asked. It
// is a copy, for status, readiness and metrics.
//
// A gate is ready while Registered is true, a configuration is in force
// (verify.Decider.Snapshot is not nil), and Audit is false where that configuration
// enforces: after a change to enforce the gate is asked in the wrong hook until it
// registered anew. To audit it may be asked in the hook that enforces.
type State struct {
	Registered bool      // the runtime asks this gate now; false from the moment that the connection ends
	Since      time.Time // when Registered became what it is; zero: never was it true
	Audit      bool      // the gate is asked in CreateContainer, where nothing depends on it
	Runtime    string    // name of the runtime that configured the gate last; empty: none did
	Version    string    // of that runtime, as it says
	Hooks      []string  // in which the gate asked to be asked

	Registrations uint64    // since the process began: reconnects are one less
	Awaiting      time.Time // since when the runtime has the registration and holds it up; zero: it does not
	Held          string    // why the gate stays registered to audit although the node enforces; empty: it does not
	Error         string    // why the gate is not registered, or was not before
	ErrorAt       time.Time // zero: there was no error

	// Plugins are those that the runtime listed in its last request to enforce, as
	// INDEX-NAME in its order, ours and its builtin validator (00-default-validator)
	// among them: without that one there is no required_plugins. At most 64.
	Plugins   []string
	Strangers int    // how many more of our name there were than gates run on this node
	Alarms    uint64 // how often that was found; at most once a second

	// UnderWay counts hooks being answered. The runtime asks one at a time and gives
	// up after its own timeout (2 s unless configured): more than one hang.
	UnderWay int
	Late     uint64        // hooks that exceeded their own time
	Latest   time.Duration // the longest that such a hook took
	Stuck    int           // questions that nobody waits for any more and that do not end; see [Gate.Stuck]
}

// State returns how things stand. It is cheap enough for a probe.
func (s *Session) State() State {
	s.mu.Lock()
	st := s.known
	s.mu.Unlock()
	st.Registered = s.Registered()
	st.Plugins, st.Strangers, st.Alarms = s.plugins.state()
	st.UnderWay, st.Stuck = int(s.underWay.Load()), s.Gate.Stuck()
	st.Late, st.Latest = s.late.Load(), time.Duration(s.latest.Load())
	return st
}

// A pace lets one of many through: what repeats is said once in a while. Its zero
// value lets the first through. It is safe for concurrent use.
type pace struct {
	mu   sync.Mutex
	last time.Time
}

func (p *pace) due(now time.Time, every time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.last.IsZero() && now.Sub(p.last) < every {
		return false
	}
	p.last = now
	return true
}

const (
	// lateTolerance is how much longer than its own time a hook may take before that counts:
	// it has then all but missed the runtime's deadline (margin).
	lateTolerance = 200 * time.Millisecond
	// logInterval bounds how often the same trouble is logged.
	logInterval = time.Minute
)

// asked notes that a hook begins, and when.
func (s *Session) asked() time.Time {
	now := s.Gate.Now()
	s.underWay.Add(1)
	return now
}

// answered is the watchdog: the gate answers by itself when its time is over, so
// that a hook which takes longer means that the process was stopped or got no
// CPU, or that there is a bug. ctx is that of the hook, which began at start.
func (s *Session) answered(ctx context.Context, hook string, start time.Time) {
	s.underWay.Add(-1)
	now := s.Gate.Now()
	took, budget := now.Sub(start), s.Gate.budget(ctx, start)
	if took <= budget+lateTolerance {
		return
	}
	s.late.Add(1)
	for old := s.latest.Load(); int64(took) > old && !s.latest.CompareAndSwap(old, int64(took)); {
		old = s.latest.Load()
	}
	if s.lateSaid.due(now, logInterval) {
		s.Log.Error("a hook exceeded the gate's own time: the process was stopped, or gets no CPU",
			"hook", hook, "took", took.String(), "budget", budget.String())
	}
}

// A pluginList holds the plugins that the runtime lists in a request. Anyone who can open
// its socket can register under any name, and the runtime's required_plugins then
// takes that plugin for the gate. The gate cannot keep it from that, and must not
// refuse because of it: an upgrade is two of the same name too. It raises an
// alarm. It is safe for concurrent use.
type pluginList struct {
	last atomic.Pointer[pluginNames]

	mu      sync.Mutex
	checked time.Time
	odd     bool // more of our name than gates, when last checked
	surplus int
	alarms  uint64
	said    pace
}

// A pluginNames is the plugins of one request.
type pluginNames struct {
	plugins []member
	ours    int // of our name
}

type member struct{ index, name string }

const (
	maxPlugins    = 64          // of a request that are remembered
	countInterval = time.Second // between two looks at how many gates run
)

// see looks at the list of one request. Where it is that of the last request and
// has one plugin of our name, that is a comparison.
func (r *pluginList) see(s *Session, plugins []*api.PluginInstance) {
	l := r.last.Load()
	if l == nil || !l.same(plugins) {
		l = read(plugins)
		r.last.Store(l)
	} else if l.ours <= 1 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.ours <= 1 {
		r.odd, r.surplus = false, 0
		return
	}
	now := s.Gate.Now()
	if now.Sub(r.checked) < countInterval {
		return
	}
	r.checked = now
	live := 1
	if s.Live != nil {
		if n, err := s.Live(); err == nil {
			live = max(n, 1)
		}
	}
	was := r.odd
	r.odd = l.ours > live
	// Once may be a gate that just ended: the runtime drops it after the next request.
	if !r.odd || !was {
		r.surplus = 0
		return
	}
	r.surplus = l.ours - live
	r.alarms++
	if r.said.due(now, logInterval) {
		s.Log.Error("another plugin is registered under the name of the gate: the runtime takes it for the gate when this one is away",
			"plugins", l.names(), "gates", live)
	}
}

// others reports whether another plugin of our name was listed last.
func (r *pluginList) others() bool {
	l := r.last.Load()
	return l != nil && l.ours > 1
}

func (r *pluginList) state() (plugins []string, surplus int, alarms uint64) {
	if l := r.last.Load(); l != nil {
		plugins = l.names()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return plugins, r.surplus, r.alarms
}

func read(plugins []*api.PluginInstance) *pluginNames {
	l := &pluginNames{}
	for _, p := range plugins {
		if p.GetName() == PluginName {
			l.ours++
		}
		if len(l.plugins) < maxPlugins {
			l.plugins = append(l.plugins, member{p.GetIndex(), p.GetName()})
		}
	}
	return l
}

func (l *pluginNames) same(plugins []*api.PluginInstance) bool {
	return slices.EqualFunc(l.plugins, plugins, func(m member, p *api.PluginInstance) bool {
		return m.index == p.GetIndex() && m.name == p.GetName()
	})
}

func (l *pluginNames) names() []string {
	names := make([]string, len(l.plugins))
	for i, m := range l.plugins {
		names[i] = text.Clean(m.index+"-"+m.name, 80)
	}
	return names
}

// reset forgets: what the requests of an ended connection listed is not known.
func (r *pluginList) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last.Store(nil)
	r.odd, r.surplus = false, 0
}
