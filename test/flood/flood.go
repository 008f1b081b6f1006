package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// Options are what is the same for all releases of containerd.
type options struct {
	creations int // that a gate is asked about
	perKind   int // images
	turns     int // into which the creations are divided
	callers   int // that ask at once
	seed      uint64
	fails     []illness     // of the mirror
	patience  time.Duration // of containerd with a plugin; 0: its own, 2 s
	nodes     string        // where nodes are made; see node.Options.Dir
	dir       string        // below it is what else is written
	binary    string        // tidewaiter
	nothing   string        // the no-op plugin
	log       func(string, ...any)
}

// A flood is one run on one release.
type flood struct {
	options
	*fixture
	sick  *sick
	rand  *rand.Rand // draws images
	pod   *node.Pod
	tries atomic.Uint32 // numbers creations
	made  int           // containers that a gate allowed
	tally tally
}

const (
	block = 100 // creations that are timed together; what they made is removed after each
	start = 40  // the first of so many allowed containers is started too

	// recovery is how long after the mirror is well an image may be refused for another
	// reason than its own. Denials that say no are kept for 30 s.
	recovery = 5 * time.Minute
)

// A side is what was measured of one plugin.
type side struct {
	creations int
	took      time.Duration   // of all blocks
	good      []time.Duration // of creations of good images that were allowed
}

func (s *side) rate() float64 { return float64(s.creations) / s.took.Seconds() }

func (s *side) median() time.Duration {
	slices.Sort(s.good)
	if len(s.good) == 0 {
		return 0
	}
	return s.good[len(s.good)/2]
}

// A tally is what came out.
type tally struct {
	mu         sync.Mutex
	kinds      map[string]*outcome
	noop, gate side
	started    int      // allowed containers that were started, and printed their own word
	absent     int      // creations while no plugin was there
	escapes    []string // what ran, or was created, and should not have
	wrong      []string // whatever else is not as it should be
}

// An outcome is that of all creations of one kind, but for those of the no-op plugin.
type outcome struct {
	creations, allowed int
	refused            map[string]int // by reason
}

func (t *tally) outcome(k string) *outcome {
	if t.kinds == nil {
		t.kinds = map[string]*outcome{}
	}
	if t.kinds[k] == nil {
		t.kinds[k] = &outcome{refused: map[string]int{}}
	}
	return t.kinds[k]
}

func (t *tally) escape(format string, a ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.escapes = append(t.escapes, fmt.Sprintf(format, a...))
}

func (t *tally) mistake(format string, a ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wrong = append(t.wrong, fmt.Sprintf(format, a...))
}

// run floods. The error says what kept it from doing so; what came out is in tally.
func (f *flood) run(ctx context.Context, version string) (err error) {
	f.rand = rand.New(rand.NewPCG(f.seed, 0))
	if f.fixture, err = newFixture(ctx, version, f.nodes, filepath.Join(f.dir, "config-"+version), f.perKind, f.patience, f.log); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.stop()) }()
	if f.pod, err = f.node.RunPod(ctx, node.PodOptions{}); err != nil {
		return err
	}
	f.sick = newSick(f.seed, f.fails)
	f.mirror.Fault(f.sick.wrap)
	each := (f.creations + f.turns - 1) / f.turns
	for turn := range f.turns {
		if err := f.noopTurn(ctx, each/4); err != nil {
			return fmt.Errorf("the no-op plugin's turn %d: %w", turn, err)
		}
		if err := f.gateTurn(ctx, each, turn == f.turns-1); err != nil {
			return fmt.Errorf("turn %d: %w", turn, err)
		}
		f.log("%d creations of %d, %d escapes", f.tally.gate.creations, f.creations, len(f.tally.escapes))
	}
	return nil
}

// noopTurn has creations allowed by a plugin that does nothing, which goes by the
// gate's name so that containerd asks neither more nor less.
func (f *flood) noopTurn(ctx context.Context, creations int) error {
	if err := f.absent(ctx); err != nil {
		return err
	}
	cmd := exec.Command(f.nothing, f.node.NRISocket, "tidewaiter")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		c, err := f.create(ctx, f.images[0])
		if err == nil {
			if err := c.Remove(ctx); err != nil {
				return err
			}
			break
		}
		if time.Now().After(end) {
			return err
		}
	}
	return f.blocks(ctx, creations, &f.tally.noop, func(_ image, err error) {
		if err != nil {
			f.tally.mistake("the no-op plugin: %v", err)
		}
	}, nil)
}

// gateTurn has them decided by a gate that was just started. In the last turn the
// mirror gets well in the end.
func (f *flood) gateTurn(ctx context.Context, creations int, last bool) error {
	if err := f.absent(ctx); err != nil {
		return err
	}
	gate, err := f.node.StartGate(ctx, node.GateOptions{ConfigDir: f.config, Binary: f.binary})
	if err != nil {
		return err
	}
	defer gate.Kill()
	registered, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := gate.WaitRegistered(registered); err != nil {
		return err
	}
	mark := gate.Mark()
	if err := f.blocks(ctx, creations, &f.tally.gate, f.judge, f.begin); err != nil {
		return err
	}
	if last {
		f.sick.cure()
		if err := f.recovered(ctx); err != nil {
			return err
		}
	}
	for _, l := range gate.Lines()[mark:] {
		// Whoever is dropped is not asked: containerd refused meanwhile.
		if strings.HasPrefix(l.Msg, "not registered") || l.Level == "ERROR" {
			f.tally.mistake("the gate: %s", l.Raw)
		}
	}
	if err := gate.Stop(); err != nil {
		f.tally.mistake("the gate ended with %v", err)
	}
	return nil
}

// create asks for a container as a kubelet does.
func (f *flood) create(ctx context.Context, m image) (*node.Container, error) {
	return f.pod.Create(ctx, node.ContainerOptions{Name: "flood", Image: m.Name, ImageID: m.id, Attempt: f.tries.Add(1)})
}

// absent checks that without a plugin nothing is created, and that the one before
// is gone.
func (f *flood) absent(ctx context.Context) error {
	for range 10 {
		m := f.draw()
		c, err := f.create(ctx, m)
		f.tally.absent++
		if err == nil {
			f.tally.escape("%s was created while no plugin was there", m.Name)
			if err := c.Remove(ctx); err != nil {
				return err
			}
			continue
		}
		if strings.Contains(node.Text(err), `required plugin "tidewaiter" not present`) {
			return nil
		}
	}
	return errors.New("containerd does not notice that no plugin is there")
}

// draw draws an image.
func (f *flood) draw() image {
	all := 0
	for _, k := range kinds {
		all += k.weight
	}
	n, k := f.rand.IntN(all), 0
	for ; n >= kinds[k].weight; k++ {
		n -= kinds[k].weight
	}
	return f.images[f.rand.IntN(f.perKind)*len(kinds)+k]
}

// blocks asks for containers of images drawn at random, several at once. told gets
// each answer, and made, which may be nil, one in some containers before they are
// removed.
func (f *flood) blocks(ctx context.Context, creations int, s *side, told func(image, error), made func(context.Context, image, *node.Container)) error {
	for done := 0; done < creations; done += block {
		list := make([]image, min(block, creations-done))
		for i := range list {
			list[i] = f.draw()
		}
		containers := make([]*node.Container, len(list))
		errs, took := make([]error, len(list)), make([]time.Duration, len(list))
		from := time.Now()
		f.atOnce(len(list), func(i int) {
			from := time.Now()
			containers[i], errs[i] = f.create(ctx, list[i])
			took[i] = time.Since(from)
		})
		s.took += time.Since(from)
		s.creations += len(list)
		for i, m := range list {
			told(m, errs[i])
			if errs[i] == nil && m.kind.good() {
				s.good = append(s.good, took[i])
			}
		}
		begin := make([]bool, len(list))
		for i := range list {
			if errs[i] == nil && made != nil {
				begin[i] = f.made%start == 0
				f.made++
			}
		}
		removed := make([]error, len(list))
		f.atOnce(len(list), func(i int) {
			c := containers[i]
			if c == nil {
				return
			}
			if begin[i] {
				made(ctx, list[i], c)
			}
			removed[i] = c.Remove(ctx)
		})
		if err := errors.Join(removed...); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// atOnce runs do n times, as many at once as there are callers.
func (f *flood) atOnce(n int, do func(int)) {
	var wg sync.WaitGroup
	for caller := range f.callers {
		wg.Go(func() {
			for i := caller; i < n; i += f.callers {
				do(i)
			}
		})
	}
	wg.Wait()
}

var denied = regexp.MustCompile(`tidewaiter: denied \[([A-Z_]+)\]`)

// judge records the gate's answer about an image.
func (f *flood) judge(m image, err error) {
	t := &f.tally
	o := t.outcome(m.kind.name)
	o.creations++
	if err == nil {
		o.allowed++
		if !m.kind.good() {
			t.escape("%s (%s) was created", m.Name, m.kind.name)
		}
		return
	}
	code := denied.FindStringSubmatch(node.Text(err))
	if code == nil {
		o.refused["another error"]++
		t.mistake("%s (%s): %s", m.Name, m.kind.name, node.Text(err))
		return
	}
	o.refused[code[1]]++
	if !f.fits(m, verify.Reason(code[1])) {
		t.mistake("%s (%s): %s", m.Name, m.kind.name, node.Text(err))
	}
}

// fits reports whether an image may be refused for a reason while the mirror fails:
// for the one that is true, for not having found out, and for what the mirror says
// where it has said what is not so.
func (f *flood) fits(m image, r verify.Reason) bool {
	switch r {
	case m.kind.reason, verify.Pending:
		return true
	case verify.Overloaded, verify.SourceUnreachable, verify.SourceUnauthorized, verify.SourceNoReferrers, verify.LimitExceeded:
		return !m.kind.outside
	case verify.SignatureMissing, verify.SignatureInvalid, verify.SignerUntrusted, verify.IdentityMismatch:
		return !m.kind.outside && f.sick.lies(m.repository)
	}
	return false
}

// begin starts an allowed container, whose image must be what runs.
func (f *flood) begin(ctx context.Context, m image, c *node.Container) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := c.Start(ctx); err != nil {
		f.tally.mistake("%s was created and does not start: %v", m.Name, err)
		return
	}
	word, err := c.Output(ctx)
	if err != nil {
		f.tally.mistake("%s: %v", m.Name, err)
		return
	}
	if word != m.word {
		f.tally.escape("%s runs %q", m.Name, word)
	}
	f.tally.mu.Lock()
	defer f.tally.mu.Unlock()
	f.tally.started++
}

// recovered checks that with a mirror that is well every good image is allowed, and
// every other one refused for what is true of it.
func (f *flood) recovered(ctx context.Context) error {
	f.log("the mirror is well")
	ctx, cancel := context.WithTimeout(ctx, recovery)
	defer cancel()
	missing := f.images
	answers := map[string]string{}
	for len(missing) > 0 {
		var mu sync.Mutex
		var again []image
		var failed error
		f.atOnce(len(missing), func(i int) {
			m := missing[i]
			c, err := f.create(ctx, m)
			if err == nil {
				err = c.Remove(context.WithoutCancel(ctx))
				mu.Lock()
				defer mu.Unlock()
				failed = errors.Join(failed, err)
				if !m.kind.good() {
					f.tally.escape("%s (%s) was created", m.Name, m.kind.name)
				}
				return
			}
			if code := denied.FindStringSubmatch(node.Text(err)); code != nil && code[1] == string(m.kind.reason) {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			again = append(again, m)
			if ctx.Err() == nil {
				answers[m.Name] = node.Text(err)
			}
		})
		if failed != nil {
			return failed
		}
		if missing = again; len(missing) > 0 {
			select {
			case <-ctx.Done():
				for _, m := range missing {
					f.tally.mistake("%s (%s), %s after the mirror is well: %s", m.Name, m.kind.name, recovery, answers[m.Name])
				}
				return nil
			case <-time.After(250 * time.Millisecond):
			}
		}
	}
	return nil
}
