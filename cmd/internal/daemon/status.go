package daemon

import (
	"context"
	"errors"
	"io"
	"net/url"
	"os"
	"time"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/cmd/internal/metrics"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/install"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A state is what the daemon shows of the configuration in force, and of the one
// that is not.
type state struct {
	config   *config.Config // nil: none is in force
	since    time.Time
	cache    *cache.Cache
	engine   *verify.Engine    // behind cache
	rejected *control.Rejected // the last one; nil: none
	lowered  time.Time         // when a configuration that enforced was followed by this one, which audits; zero: it was not
}

// stand notes that c is in force.
func (d *daemon) stand(c *config.Config, k *cache.Cache, e *verify.Engine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.config, d.state.cache, d.state.engine, d.state.since = c, k, e, time.Now()
	if r := d.state.rejected; r != nil {
		past := *r
		past.Current = false
		d.state.rejected = &past
	}
}

// reject notes that what the directory holds is not put in force.
func (d *daemon) reject(err error) {
	n := d.counters.Rejected.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.rejected = &control.Rejected{At: time.Now().UTC(), Error: err.Error(), Current: true, Count: n}
}

func (d *daemon) inForce() state {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// active is the configuration in force, for explanations.
func (d *daemon) active() inspect.Active {
	s := d.inForce()
	return inspect.Active{Config: s.config, Engine: s.engine}
}

// policy answers with what the configuration in force says.
func (d *daemon) policy(context.Context, url.Values) (any, error) {
	if c := d.inForce().config; c != nil {
		return c.Summary(), nil
	}
	return nil, errors.New("no configuration is in force: tidewaiter status says why")
}

// target is where the configuration in force wants metrics.
func (d *daemon) target() metrics.Target {
	if c := d.inForce().config; c != nil {
		return metrics.Target(c.Metrics)
	}
	return metrics.Target{}
}

// uncountedAfter is how long the count of pods and containers may stay uncorrected before
// status says so.
const uncountedAfter = 15 * time.Minute

// status says how things stand; troubles are what does not work and does not matter
// to the gate.
func (d *daemon) status(n nri.State, stopping bool, troubles []string) control.Status {
	b, at := d.options.Build, d.inForce()
	s := control.Status{
		Warnings: append([]string{}, troubles...),
		Node:     d.options.Node, Version: b.Version, Commit: b.Commit, PID: os.Getpid(), Started: d.started.UTC(),
		Configuration: control.Configuration{Dir: d.options.ConfigDir, Warnings: []string{}, Rejected: at.rejected, WaitingForConfig: d.options.AwaitConfig},
		Runtime: control.Runtime{
			Registered: n.Registered, Since: known(n.Since), Name: n.Runtime, Version: n.Version, Hooks: append([]string{}, n.Hooks...),
			Registrations: n.Registrations, Error: n.Error, ErrorAt: known(n.ErrorAt),
			Plugins: append([]string{}, n.Plugins...), DuplicatePlugins: n.Strangers, Slow: n.Late, Hung: n.Stuck, Socket: d.options.NRI, Audit: n.Audit,
			AwaitingSync: known(n.Awaiting), Held: text.Clean(n.Held, verify.MaxMessage),
		},
		Decisions: d.counters.Decisions(),
		Log:       control.Log{Dropped: d.counters.Dropped.Load()},
		Stopping:  stopping,
	}
	if c := at.config; c != nil {
		s.Mode = c.Mode.String()
		s.Configuration.Dir, s.Configuration.Revision, s.Configuration.Since = c.Dir, c.Revision.String(), known(at.since)
		if s.Configuration.Lowered = known(at.lowered); s.Configuration.Lowered != nil {
			s.Warnings = append(s.Warnings, loweredText(at.lowered))
		}
		for _, w := range c.Warnings {
			s.Configuration.Warnings = append(s.Configuration.Warnings, w.String())
		}
	}
	if since, is := install.Unfinished(d.options.StateDir); is && d.options.StateDir != "" {
		s.Warnings = append(s.Warnings, install.UnfinishedText(since))
	}
	if n.Registered && !n.Audit && s.Mode == verify.Audit.String() {
		s.Warnings = append(s.Warnings, "the gate audits on the connection on which it enforced, so that containers are still refused if it hangs; when the connection ends it registers to audit")
	}
	if d.tally != nil && n.Registered {
		if why := d.tally.Trouble(); why != "" {
			s.Warnings = append(s.Warnings, "if the gate had to register again now it could not: "+text.Clean(why, verify.MaxMessage))
		}
	}
	if d.tally != nil {
		// One failure is made good by the next check of what runs, minutes later.
		if since, why := d.tally.Uncorrected(); !since.IsZero() && time.Since(since) > uncountedAfter {
			s.Runtime.Uncounted = known(since)
			s.Warnings = append(s.Warnings, "the gate cannot find out which pods and containers there are, since "+since.UTC().Format(time.RFC3339)+", so that those that ended count too: "+why)
		}
	}
	if at.cache != nil {
		k := at.cache.Stats()
		s.Cache = control.Cache{
			Allowed: k.Allowed, Denied: k.Denied, Hits: k.AllowedHits + k.DeniedHits, Misses: k.Misses,
			Running: k.Running, Waiting: k.Waiting, Prefetching: k.Ahead, Overloaded: k.Overloaded,
		}
	}
	if d.prefetch != nil {
		s.Images = d.prefetch.Trouble()
	}
	if d.sweep != nil {
		s.Running = running(d.sweep.Status())
	}
	if d.refresher != nil {
		r := d.refresher.Status()
		s.Refresh = control.Refreshing{
			Every: r.Every.String(), Images: r.Images, Failing: r.Failing, Last: known(r.Last), Next: known(r.Next),
			Asked: r.Asked, Failed: r.Failed, New: r.Fresh, Error: r.Error,
		}
	}
	if d.store != nil {
		s.Store = stored(d.store, d.archives, d.options.StateDir)
	}
	s.Judge()
	return s
}

// stored is how the store and archives fare, for JSON.
func stored(s *store.Store, a *archives.Archives, dir string) *control.Store {
	out := &control.Store{Dir: dir, Error: s.Trouble(), Archives: []control.Archive{}}
	out.Signatures, out.Bytes = s.Signatures()
	archives, unread := a.Status()
	for _, b := range archives {
		out.Archives = append(out.Archives, control.Archive{Name: text.Clean(b.Name, 256), Signatures: b.Signatures, Error: b.Trouble})
	}
	out.Unread = unread
	return out
}

// looks answers with the status after what runs was looked at anew. Where that takes
// longer than anybody waits, it is the one before: running.at says which.
func (d *daemon) looks(status func() control.Status) control.Endpoint {
	return control.Endpoint{Path: control.SweepPath, Longest: control.SweepTime, Answer: func(ctx context.Context, _ url.Values) (any, error) {
		asked := time.Now()
		d.sweep.Wake()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil && d.sweep.Status().At.Before(asked) {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		return status(), nil
	}}
}

// running is what the last sweep found, for JSON.
func running(found reconcile.RunningStatus) control.Running {
	r := control.Running{
		At: known(found.At), Error: found.Error, Containers: found.Containers, Reasons: map[string]int{},
		ImageMissing: found.Gone, Ungated: found.Ungated, Stopped: found.Stopped, Found: []control.Found{}, Pauses: []control.Pause{},
	}
	for reason, n := range found.Reasons {
		r.Reasons[reason.String()] = n
	}
	for _, f := range found.Findings {
		one := control.Found{
			ID: f.ID, Image: text.Clean(f.Image, 256), Namespace: text.Clean(f.Pod.Namespace, 64), Pod: text.Clean(f.Pod.Name, 256),
			Container: text.Clean(f.Pod.Container, 64), Detail: text.Clean(f.Detail, 256), ImageMissing: f.Gone, Ungated: f.Ungated,
		}
		if !f.Gone {
			one.Reason = f.Reason.String()
		}
		r.Found = append(r.Found, one)
	}
	for _, p := range found.Pauses {
		one := control.Pause{Image: text.Clean(p.Image, 256), Pinned: p.Pinned, Detail: text.Clean(p.Detail, 256), ImageMissing: p.Gone}
		if !p.Gone {
			one.Reason = p.Reason.String()
		}
		r.Pauses = append(r.Pauses, one)
	}
	return r
}

// metrics writes the metrics.
func (d *daemon) metrics(w io.Writer, n nri.State, stopping bool) error {
	s, at := d.status(n, stopping, nil), d.inForce()
	m := metrics.State{Ready: s.Ready, Version: s.Version, Mode: s.Mode, Revision: s.Configuration.Revision, Session: n, Codes: control.Codes,
		Assured: s.Assurance, Assure: control.Assurances}
	for _, p := range s.Problems {
		m.Found = append(m.Found, p.Code)
	}
	m.Invalid = at.rejected != nil && at.rejected.Current
	if at.cache != nil {
		m.Cache = new(at.cache.Stats())
	}
	if d.sweep != nil {
		m.Sweep = new(d.sweep.Status())
	}
	if d.refresher != nil {
		m.Refresh = new(d.refresher.Status())
	}
	if k := s.Store; k != nil {
		m.Store = &metrics.Store{Signatures: k.Signatures, Bytes: uint64(k.Bytes), Failing: k.Error != "", Archives: len(k.Archives), Unread: k.Unread != ""}
		for _, b := range k.Archives {
			m.Store.Archived += b.Signatures
			if b.Error != "" {
				m.Store.Bad++
			}
		}
	}
	return d.counters.Write(w, m)
}

// known is t for JSON: null where it is not known.
func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return new(t.UTC())
}
