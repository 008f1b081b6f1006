package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A bringing is a phase that puts the program, its service and its configuration in place,
// together, and has the gate work with them.
type bringing struct {
	*facts
	gate    *control.Status // before this phase; nil: none answers
	changes []node.Change
	next    *staged // configuration; nil: it is not brought
	restart bool    // the gate is restarted; otherwise it reads its configuration again
	later   bool    // an earlier phase started the gate

	dirs    []string // that were made
	touched bool     // the gate was told to restart
}

// bringUp are the phases of the program, its service and its configuration. A configuration
// that the program before does not take comes in a phase of its own, when the gate is ready
// with the new program.
func (f *facts) bringUp(base, start []node.Change, next *staged) (all []*phase) {
	changed := len(start) > 0 || next != nil
	switch manager := f.Manager.Start() != nil; {
	case len(base) > 0 || f.gate == nil && manager:
		first := next
		if next != nil && next.after {
			first = nil
		}
		all = append(all, (&bringing{facts: f, gate: f.gate, changes: append(slices.Clone(base), start...), next: first, restart: true}).phase())
		if first != next {
			all = append(all, (&bringing{facts: f, next: next, later: true}).phase())
		}
	case changed:
		all = append(all, (&bringing{facts: f, gate: f.gate, changes: start, next: next}).phase())
	case f.gate == nil:
		all = append(all, &phase{steps: []step{f.byHandStep()}})
	}
	if changed {
		all = append(all, &phase{steps: []step{{do: func(ctx context.Context) error {
			if c, err := f.load(ctx, f.ConfigDir); err == nil && f.lowers(c.Mode) {
				f.tellLowered()
			}
			return nil
		}}}})
	}
	return all
}

// phase lists the steps.
func (b *bringing) phase() *phase {
	start := b.Manager.Start()
	supervised := b.restart && start != nil
	steps := []step{{do: func(ctx context.Context) (err error) {
		if b.later {
			if b.gate, err = b.Ask(ctx); err != nil { // another one than at first
				return err
			}
		}
		rec := b.remembered()
		if b.gate != nil || supervised { // they can say whether it works
			rec.Trial = b.trialOf(b.changes, b.next)
		}
		return b.remember(rec)
	}}}
	if b.next != nil {
		steps = append(steps, b.swapStep())
	}
	steps = append(steps, b.writes(b.changes, &b.dirs)...)
	if b.restart && !strings.HasPrefix(b.RunDir, "/run/") && !b.Exists(b.RunDir) { // nothing makes it at boot
		steps = append(steps, b.makeRunDir())
	}
	steps = append(steps, b.noteDirectories(&b.dirs))
	if b.restart && start == nil {
		steps = append(steps, b.byHandStep(), step{do: func(context.Context) error { b.noteReplaced(); return nil }})
		if b.next == nil {
			return &phase{steps: append(steps, step{do: func(context.Context) error { return b.tried() }}), restore: b.restore}
		}
	}
	if supervised {
		for _, c := range start {
			steps = append(steps, step{text: "run " + commandLine(c), do: func(ctx context.Context) error {
				b.touched = true
				if err := b.Manager.Run(ctx, [][]string{c}); err != nil {
					return fmt.Errorf("the gate did not come up: %w", err)
				}
				return nil
			}})
		}
	}
	wait := "wait until the gate has taken the configuration"
	if supervised {
		wait = "wait until the gate is ready"
	}
	steps = append(steps, step{text: wait, do: func(ctx context.Context) error { return b.ready(ctx, supervised) }})
	steps = append(steps, step{do: func(context.Context) error {
		if supervised {
			b.Say("did", "started the gate")
			b.noteReplaced()
		}
		return b.tried()
	}})
	if supervised && !registered(b.gate) {
		steps = append(steps, step{do: func(ctx context.Context) error {
			// Status is not to show a problem that is over in a second.
			if err := b.await(ctx, shortWait, func(s *control.Status) bool { return s.Ready }); err != nil && ctx.Err() == nil {
				b.Say("warn", "containerd does not ask it yet, see tidewaiter status: %v", err)
			}
			return nil
		}})
	}
	return &phase{steps: steps, restore: b.restore}
}

func (b *bringing) swapStep() step {
	return step{
		text: "copy the configuration in " + b.From + " to " + b.ConfigDir,
		show: fmt.Sprintf("copy the configuration in %s to %s, if it is valid there\n", b.From, b.ConfigDir),
		do: func(context.Context) error {
			if err := b.swap(b.next); err != nil {
				if b.next.swapped {
					err = errors.Join(err, b.swap(b.next))
				}
				return err
			}
			b.Say("did", "copied the configuration to %s", b.ConfigDir)
			if b.next.first {
				b.Say("did", "with mode: audit, until the gate runs and what runs here is judged")
			}
			return nil
		},
		undo: func(context.Context) error { return b.swap(b.next) },
	}
}

func (b *bringing) makeRunDir() step {
	var made []string
	return step{
		text: "make " + b.RunDir,
		do: func(context.Context) (err error) {
			made, err = b.Mkdir(b.RunDir)
			b.dirs = append(b.dirs, made...)
			return err
		},
		undo: func(context.Context) error {
			for _, dir := range slices.Backward(made) {
				os.Remove(b.Path(dir)) // one that holds something stays
			}
			return nil
		},
	}
}

func (b *bringing) noteReplaced() {
	if err := b.replaced(b.changes); err != nil {
		b.Say("warn", "%v", err)
	}
}

// byHandStep is the step of a host without services.
func (i *Installation) byHandStep() step {
	return step{text: i.byHandLine(), next: true, do: func(context.Context) error { i.byHand(); return nil }}
}

// registered reports whether containerd asks that gate.
func registered(gate *control.Status) bool { return gate != nil && gate.Runtime.Registered }

// ready waits until the gate works with what was put in place.
func (b *bringing) ready(ctx context.Context, restarted bool) error {
	want, err := b.load(ctx, b.ConfigDir)
	if err != nil {
		return fmt.Errorf("the configuration is not valid any more: %w", err)
	}
	if b.gate == nil && !restarted {
		return nil // there is none that could say
	}
	if !restarted {
		err := b.await(ctx, b.patience(), func(s *control.Status) bool {
			c := s.Configuration
			took := c.Revision == want.Revision || c.Revision != b.gate.Configuration.Revision && (c.Rejected == nil || !c.Rejected.Current)
			return c.Revision != "" && took && s.Mode == want.Mode
		})
		if err != nil {
			return fmt.Errorf("the gate did not take the configuration: %w", err)
		}
		return nil
	}
	// A gate that enforced is not followed by one that audits for a reason that is not
	// seen here, such as a variable of its service.
	up := func(s *control.Status) bool {
		return (b.gate == nil || s.PID != b.gate.PID) && s.Configuration.Revision != "" && (!b.enforced || want.Mode != "enforce" || s.Mode == "enforce")
	}
	err = b.await(ctx, b.patience(), func(s *control.Status) bool { return up(s) && (!registered(b.gate) || s.Ready) })
	if err == nil {
		return nil
	}
	// That the runtime holds up the registration is no fault of the program, and would hold
	// up that of the one before, too.
	if s, failed := b.Ask(ctx); failed == nil && ctx.Err() == nil && up(s) && s.Runtime.AwaitingSync != nil {
		b.Say("warn", "the gate runs, and containerd does not ask it yet: %v", err)
		return nil
	}
	return fmt.Errorf("the gate did not come up: %w", err)
}

// restore starts the gate before, if the one that failed was started, and says what it finds.
func (b *bringing) restore(ctx context.Context, why, failed error) error {
	last := 0 // the gate that is not to answer any more
	if s, err := b.Ask(ctx); err == nil && b.touched && (b.gate == nil || s.PID != b.gate.PID) {
		last = s.PID
	}
	hadOne := b.old != nil && (b.gate != nil || b.record || slices.ContainsFunc(b.changes, func(c node.Change) bool { return c.Path == b.Program+".previous" }))
	switch {
	case !b.touched:
	case hadOne || b.gate != nil:
		failed = errors.Join(failed, b.Manager.Run(ctx, b.Manager.Start()))
	default:
		stop, after := b.Manager.Stop()
		_ = b.Manager.Run(ctx, stop) // perhaps it never was there
		failed = errors.Join(failed, b.Manager.Run(ctx, after))
	}
	if failed != nil {
		return fmt.Errorf("%w; and it could not be taken back: %w", why, failed)
	}
	if err := b.tried(); err != nil {
		b.Say("warn", "%v", err)
	}
	b.Log("install: " + why.Error() + ": taken back")
	why = fmt.Errorf("%w: %w", why, ErrTakenBack)
	logs := b.Manager.Logs(b.Program)
	if b.gate == nil && !hadOne {
		return node.Refusef(logs, "%w: no gate runs here, as before", why)
	}
	// The gate before is what the node depends on: it is looked at, not supposed.
	patience := b.patience()
	if b.gate == nil {
		patience = shortWait // none answered before either
	}
	err := b.await(ctx, patience, func(s *control.Status) bool {
		if b.gate == nil {
			return s.PID != last
		}
		g := b.gate
		return s.PID != last && s.Mode == g.Mode && (s.Configuration.Revision != "" || g.Configuration.Revision == "") && (!g.Runtime.Registered || s.Runtime.Registered)
	})
	switch {
	case err == nil:
		return node.Refusef(logs, "%w: the gate before runs again", why)
	case b.gate == nil:
		return node.Refusef(logs, "%w: no gate answers, as before (%w)", why, err)
	}
	b.Log("install: the gate before does not run again: " + err.Error())
	return node.Hintf(logs+"; tidewaiter doctor", "%w: the program and the configuration before are there again, but the gate before does not work again: %w", why, err)
}
