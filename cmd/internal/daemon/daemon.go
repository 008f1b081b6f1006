// Package daemon puts together what runs on a node: the gate and its session, the caches,
// the store, the checks in the background and what they tell. tidewaiter run starts it.
package daemon

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/decisionlog"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/cmd/internal/metrics"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Options are where the daemon finds what it works with.
type Options struct {
	ConfigDir  string
	RunDir     string
	StateDir   string // empty: nothing is kept
	Containerd string // socket
	NRI        string // socket
	Node       string // in messages

	AwaitConfig bool // without a configuration the gate does not register
	Build       cli.Build
}

// Run is the daemon: it registers the gate with containerd and answers until ctx ends. It
// fails only if it cannot begin.
func Run(ctx context.Context, o Options, log *slog.Logger) error {
	records, err := containerd.Dial(o.Containerd)
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	defer records.Close()
	d := &daemon{
		options:  o,
		log:      log,
		resolver: containerd.NewResolver(records, resolverOptions(nil)),
		answers:  make(chan *nri.Answer, unwritten),
		started:  time.Now(),
	}
	defer d.close()

	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	log.Info("starting", "build", o.Build, "config", o.ConfigDir)
	judge := d.resolver.Explain(&d.decider)
	again := make(chan struct{}, 1) // to count
	d.tally = tally.New(records, time.Now, func() {
		select {
		case again <- struct{}{}:
		default:
		}
	})
	gate := &nri.Gate{Resolver: d.resolver, Verifier: judge, Tally: d.tally, Observe: d.observe, Now: time.Now, Node: o.Node}
	clearer := &reconcile.Clearer{Sandboxes: records, May: d.enforces, Log: log}
	session := &nri.Session{Gate: gate, Socket: o.NRI, Log: log, Audit: d.audits, Large: d.tally.Large, Clear: clearer.Clear}
	prefetch := &reconcile.Prefetch{Images: d.resolver, Node: records, Verifier: judge, Log: log}
	if o.StateDir != "" {
		d.archives = archives.New(o.StateDir, archives.Options{Log: log, Now: time.Now, Kinds: []verify.Kind{notary.Kind}, Changed: func() {
			if c := d.inForce().cache; c != nil {
				c.Forget()
			}
			prefetch.Again()
		}})
		d.store = store.New(o.StateDir, store.Options{Log: log, Now: time.Now, Image: records.Blob, Kinds: []verify.Kind{notary.Kind}, Archives: d.archives})
		prefetch.Listed = d.store.Retain
	}
	// The gate needs none of what is in the run directory. Why it cannot be used, the
	// control socket says.
	kept := ""
	if control.MakeDir(o.RunDir) == nil {
		kept, d.kept = o.RunDir, o.RunDir
		here, err := nri.Join(filepath.Join(o.RunDir, "instances"))
		if err != nil {
			log.Warn("other gates of this node are not told from plugins that use the gate's name", "error", err.Error())
		} else {
			session.Live = here.Live
			defer here.Leave()
		}
	}
	d.marks = reconcile.OpenMarks(kept, log)
	d.prefetch, prefetch.Marks = prefetch, d.marks
	d.ring = decisionlog.Open(kept, log)
	defer d.ring.Close()
	if d.store != nil {
		d.refresher = reconcile.NewRefresher(d.resolver, log, d.uptime, rand.Uint64(), kept)
		prefetch.Refresher = d.refresher
	}
	d.gated = reconcile.NewGated(kept, log, d.uptime)
	lock := reconcile.NewLock(o.RunDir)
	defer lock.Release()
	d.sweep = &reconcile.RunningCheck{
		Containers: records, Binder: d.resolver, Verifier: judge, Gated: d.gated, Count: d.count, Leader: lock.Held,
		Log: log, Node: o.Node, Now: time.Now, Uptime: d.uptime,
	}
	prefetch.Scanned = d.sweep.Wake // which knows by then what leads where

	g, ctx := errgroup.WithContext(ctx)
	// What tells of the gate outlives it: from the moment that ctx ends it is not
	// ready, then the session answers what is under way, and then the rest ends.
	after, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	text := func(w io.Writer) error { return d.metrics(w, session.State(), ctx.Err() != nil) }
	exporter := metrics.NewExporter(text, func(ctx context.Context, l net.Listener) error {
		return control.Serve(ctx, l, control.Metrics(text))
	}, log, time.Now)
	explainer := &inspect.Explainer{
		Images: d.resolver, Containers: records, Decider: &d.decider, Active: d.active, Ring: d.ring, Node: o.Node, Now: time.Now,
		Assurance: func() string { return d.status(session.State(), ctx.Err() != nil, nil).Assurance },
	}
	endpoints := append(explainer.Endpoints(), d.ring.Endpoint(), control.RefreshEndpoint(d.refresh), control.Endpoint{Path: config.SummaryPath, Answer: d.policy})
	status := func() control.Status { return d.status(session.State(), ctx.Err() != nil, exporter.Troubles()) }
	socket := &control.Socket{Dir: o.RunDir, Log: log, Handler: control.Handler(status, text, append(endpoints, d.looks(status))...)}
	g.Go(func() error { d.write(after); return nil })
	g.Go(func() error { return socket.Run(after) })
	g.Go(func() error { return exporter.Run(after) })
	g.Go(func() error { return prefetch.Run(ctx) })
	g.Go(func() error { return d.sweep.Run(ctx) })
	g.Go(func() error { recount(ctx, again, d.count); return nil })
	g.Go(func() error { d.gated.Run(after); return nil })
	if d.store != nil {
		g.Go(func() error { return d.store.Run(after) })
		g.Go(func() error { return d.archives.Run(after) })
		g.Go(func() error { return d.refresher.Run(ctx) })
	}
	loaded := make(chan struct{}) // closed when the directory was read once, or with awaitConfig was valid once
	var once sync.Once
	manager := supervised()
	g.Go(func() error {
		manager.Run(ctx, loaded, func() string {
			s := d.status(session.State(), ctx.Err() != nil, nil)
			if len(s.Problems) > 0 {
				return s.Problems[0].Code
			}
			return s.Mode
		}, log)
		return nil
	})
	g.Go(func() error {
		return config.Watch(ctx, o.ConfigDir, nil, hup, func(c *config.Config, err error) {
			before := d.audits()
			d.apply(c, err)
			exporter.Set(d.target())
			if d.audits() != before {
				session.Renew() // the hook in which the gate is asked is another
			}
			if err == nil || !o.AwaitConfig {
				once.Do(func() { close(loaded) })
			}
		})
	})
	g.Go(func() error {
		defer end()
		select {
		case <-loaded:
			return session.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	err = g.Wait()
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	log.Info("stopped")
	return nil
}

// A daemon is what run holds together.
type daemon struct {
	options  Options
	log      *slog.Logger
	resolver *containerd.Resolver
	decider  verify.Decider
	answers  chan *nri.Answer // to be written to the log
	dropped  atomic.Int64     // answers that the log was too slow for, until that is said
	repeats  repeats          // what the log has said already
	counters metrics.Counters
	started  time.Time
	ring     *decisionlog.Ring       // nil in tests
	tally    *tally.Tally            // nil where sweep is
	sweep    *reconcile.RunningCheck // nil in tests that have no containers
	gated    *reconcile.Gated        // nil where sweep is
	store    *store.Store            // nil: nothing is kept
	archives *archives.Archives      // nil where store is

	refresher *reconcile.Refresher // nil where store is
	prefetch  *reconcile.Prefetch  // nil in tests that have no containers
	marks     *reconcile.Marks     // nil where prefetch is

	kept string // directory for what the next gate is to know; empty: there is none
	mode string // that was put in force last; owned by apply

	cache   *cache.Cache   // of the configuration in force; owned by apply
	retired sync.WaitGroup // caches of earlier configurations that are closing

	mu    sync.Mutex
	state state
}

// apply puts a configuration in force, or with an error keeps the last good one.
// It is called by one goroutine at a time.
func (d *daemon) apply(c *config.Config, err error) {
	var setup *verify.Snapshot
	var engine *verify.Engine
	var next *cache.Cache
	if err == nil {
		setup, err = c.Snapshot(func(e *verify.Engine) verify.Evaluator {
			if d.store != nil {
				e.Store = d.store
			}
			engine = e
			next = lanes(c, e, cache.Options{Now: time.Now, Begin: d.begin, Observe: d.judged(c)})
			return next
		}, time.Now)
	}
	if err != nil {
		if next != nil {
			next.Close()
		}
		force := "the last good configuration stays in force"
		if d.decider.Snapshot() == nil {
			force = "no configuration is in force: every container is denied"
			if d.options.AwaitConfig {
				force = "no configuration is in force: the gate does not register with the runtime"
			}
		}
		d.reject(err)
		d.log.Error("configuration rejected", "error", err.Error(), "consequence", force)
		return
	}
	c.Proxied(os.Environ())
	for _, w := range c.Warnings {
		d.log.Warn("configuration", "warning", w.String())
	}
	if d.cache != nil {
		next.Inherit(d.cache)
	}
	// A container that is bound between the two gets PENDING: the revisions differ.
	d.resolver.Configure(resolverOptions(c))
	d.decider.Swap(setup)
	if d.store != nil {
		d.store.Configure(c.Keep)
		d.store.Trust(c.Trusts())
		d.archives.Rescan()
	}
	if d.refresher != nil {
		d.refresher.Configure(plan(c, setup, engine, d.store))
	}
	if d.sweep != nil {
		d.sweep.Configure(reconcile.Rules{Revision: setup.Revision, Mode: setup.Mode, Stop: c.StopRunning})
	}
	d.stand(c, next, engine)
	d.turned(setup.Mode)
	d.log.Info("configuration in force", "revision", setup.Revision.String(), "mode", c.Mode.String())
	old := d.cache
	d.cache = next
	if old != nil {
		d.retired.Go(func() { old.Close() })
	}
}

// audits reports whether the configuration in force only audits. None enforces.
func (d *daemon) audits() bool {
	s := d.decider.Snapshot()
	return s != nil && s.Mode == verify.Audit
}

// enforces reports whether a configuration is in force that enforces.
func (d *daemon) enforces() bool {
	s := d.decider.Snapshot()
	return s != nil && s.Mode == verify.Enforce
}

// uptime is a clock that nobody can set.
func (d *daemon) uptime() time.Duration { return time.Since(d.started) }

// close ends what apply started.
func (d *daemon) close() {
	d.decider.Swap(nil)
	if d.cache != nil {
		d.cache.Close()
	}
	d.retired.Wait()
}

// unwritten is how many answers may wait for the log. The hook does not: a log
// that nobody reads must not stop the node.
const unwritten = 1024

// observe takes one answer to the log and to what is remembered. Allowed repeats of
// a verified image are the normal course: they stay at debug level, and nowhere else.
func (d *daemon) observe(a nri.Answer) {
	mode := verify.Enforce
	if d.audits() {
		mode = verify.Audit
	}
	d.counters.Answered(mode, a)
	d.survived(a.Image, a.Decision)
	if d.gated != nil && a.Decision.Allowed() && a.Hook != "StartContainer" {
		d.gated.Saw(a.ID)
	}
	if levelOf(&a) == slog.LevelDebug && !d.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	said := a
	if said.Decision.Made.IsZero() { // no source was asked
		said.Decision.Made = time.Now()
	}
	select {
	case d.answers <- &said:
	default:
		d.dropped.Add(1)
		d.counters.Dropped.Add(1)
	}
}

func levelOf(a *nri.Answer) slog.Level {
	if a.Decision.Reason == verify.Verified {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// write writes answers to the log until ctx ends, and then those that wait.
func (d *daemon) write(ctx context.Context) {
	for {
		select {
		case a := <-d.answers:
			d.print(a)
		case <-ctx.Done():
			for {
				select {
				case a := <-d.answers:
					d.print(a)
				default:
					return
				}
			}
		}
	}
}

func (d *daemon) print(a *nri.Answer) {
	if n := d.dropped.Swap(0); n > 0 {
		d.log.Warn("the log is too slow: answers were given and not written", "answers", n)
	}
	r := a.Decision.Report(a.Image, d.options.Node)
	level := levelOf(a)
	refused := level > slog.LevelDebug
	attrs := []any{"hook", a.Hook, "took", a.Took.String(), "decision", r}
	if refused {
		level, attrs = d.news(level, control.AnswerLine, a.Hook, r, attrs)
	}
	d.log.Log(context.Background(), level, "decision", attrs...)
	if refused && d.ring != nil {
		mode := verify.Enforce
		if d.audits() {
			mode = verify.Audit
		}
		d.ring.Add(decisionlog.Entry{At: time.Now().UTC(), Kind: control.AnswerLine, Hook: a.Hook, Container: text.Clean(a.ID, 96), Mode: mode.String(), Took: a.Took.String(), Decision: r})
	}
}

// news is how a line is written: old news at debug level, and with how often they were
// not written.
func (d *daemon) news(level slog.Level, kind, hook string, r verify.Report, attrs []any) (slog.Level, []any) {
	write, unsaid := d.repeats.news(kind, hook, r, time.Now())
	switch {
	case !write:
		return slog.LevelDebug, attrs
	case unsaid > 0:
		attrs = append(attrs, "repeats", unsaid)
	}
	return level, attrs
}

// begin marks what is checked while no one waits for it.
func (d *daemon) begin(q verify.Question) (end func()) {
	if q.Image.Use != verify.UsePrefetch {
		return func() {}
	}
	return d.marks.Hold(q.Image.Target.Digest)
}

// survived says that nothing died of an image, if it was judged.
func (d *daemon) survived(img verify.Image, dec verify.Decision) {
	r := dec.EnforceReason()
	if d.prefetch != nil && img.Target.Digest != "" && r != verify.Pending && r != verify.Overloaded {
		d.prefetch.Judged(img.Target.Digest)
	}
}

// judged logs the end of a verification. In audit the hook does not wait for it,
// so that this line is where the real answer stands.
func (d *daemon) judged(c *config.Config) func(verify.Question, verify.Decision) {
	return func(q verify.Question, dec verify.Decision) {
		d.survived(q.Image, dec)
		dec.Revision = c.Revision
		d.counters.Asked(dec.Tried)
		r := dec.Report(q.Image, d.options.Node)
		level, attrs := d.news(slog.LevelInfo, control.VerificationLine, "", r, []any{"mode", c.Mode.String(), "decision", r})
		d.log.Log(context.Background(), level, "verification", attrs...)
		if d.ring != nil {
			d.ring.Add(decisionlog.Entry{At: time.Now().UTC(), Kind: control.VerificationLine, Mode: c.Mode.String(), Decision: r})
		}
	}
}

// resolverOptions are what a configuration says about binding; nil is none.
func resolverOptions(c *config.Config) containerd.Options {
	o := containerd.Options{ParseName: policy.ParseName, ParseRecord: policy.Record, Now: time.Now}
	if c != nil {
		o.Snapshotters, o.Runtimes, o.Revision = c.Gate.Snapshotters, c.Gate.Runtimes, c.Revision
		if named := c.Named(); named != nil {
			o.Named = func(n verify.Name) (host, repository bool) { return named(policy.Unalias(c.Aliases, n)) }
		}
	}
	return o
}
