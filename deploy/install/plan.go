package install

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A plan is what an installation does, in this order. It is computed from what was read:
// until it is applied nothing of the node has changed, but for a copy of the configuration
// that is brought, which lies beside the one in force for the programs of the host to read.
type plan struct {
	phases    []*phase
	enforcing *enforcing // the last phase, if the node is to enforce
	idle      bool       // there is nothing to do
	warnings  []error    // why a part of it would not be done
}

// A phase is undone as a whole. Once it is over, what it did is known to work, and stays.
type phase struct {
	steps []step
	// restore has the node work as before after the steps of the phase were undone, looks at
	// it, and returns how the installation ends. failed is why some were not; nil: all were.
	restore func(ctx context.Context, why, failed error) error
}

// A step is one act of a phase.
type step struct {
	text string // what it does; empty: it only notes something
	show string // the same for --dry-run, to the last byte; empty: text
	next bool   // the operator does it
	do   func(ctx context.Context) error
	undo func(ctx context.Context) error // nil: there is nothing to undo
}

// apply does the steps of a phase. When one fails, those before it are undone, the last one
// first, and the result of each is reported.
func (i *Installation) apply(ctx context.Context, p *phase) error {
	for n, s := range p.steps {
		why := s.do(ctx)
		if why == nil {
			continue
		}
		if n == 0 || p.restore == nil {
			return why
		}
		ctx = context.WithoutCancel(ctx) // if somebody ends this they want the node as it was
		var failed error
		for _, done := range slices.Backward(p.steps[:n]) {
			if done.undo == nil {
				continue
			}
			if err := done.undo(ctx); err != nil {
				i.Say("warn", "not taken back: %s: %v", done.text, err)
				failed = errors.Join(failed, err)
			} else if done.text != "" {
				i.Say("did", "took back: %s", done.text)
			}
		}
		return p.restore(ctx, why, failed)
	}
	return nil
}

// lines are the texts of a plan.
func (p *plan) lines() (all []string) {
	for _, ph := range p.phases {
		for _, s := range ph.steps {
			if s.text != "" {
				all = append(all, s.text)
			}
		}
	}
	return all
}

// print says what would be done, to the last byte.
func (i *Installation) print(p *plan) {
	for _, err := range p.warnings {
		i.Say("warn", "%v", err)
	}
	for _, ph := range p.phases {
		for _, s := range ph.steps {
			switch {
			case s.text == "":
			case s.next:
				i.Say("next", "%s", s.text)
			default:
				i.Say("would", "%s", cmp.Or(s.show, s.text+"\n"))
			}
		}
	}
}

// writes are the steps of changes. dirs takes the directories that they make.
func (i *Installation) writes(changes []node.Change, dirs *[]string) (steps []step) {
	for _, c := range changes {
		verb, did := "write ", "wrote "
		switch {
		case c.New == nil:
			verb, did = "remove ", "removed "
		case c.Old != nil:
			verb = "change "
		}
		var undo func() error
		steps = append(steps, step{
			text: verb + c.Path, show: c.Show(),
			do: func(context.Context) error {
				back, made, err := i.Apply([]node.Change{c})
				if err != nil {
					return err
				}
				undo, *dirs = back, append(*dirs, made...)
				i.Say("did", "%s", did+c.Path)
				return nil
			},
			undo: func(context.Context) error { return undo() },
		})
	}
	return steps
}

// noteDirectories is the step that writes down which directories were made.
func (i *Installation) noteDirectories(dirs *[]string) step {
	return step{do: func(context.Context) error {
		r := i.remembered()
		for _, dir := range *dirs {
			r.Directories = add(r.Directories, dir)
		}
		return i.remember(r)
	}}
}

// plan computes the steps. It returns a refusal before anything is done.
func (f *facts) plan(ctx context.Context) (*plan, error) {
	i := f.Installation
	if f.enforce {
		if f.beforeErr != nil {
			return nil, cmp.Or(i.CheckStart(i.Config, i.named(), nil), f.beforeErr)
		}
		if err := i.canEnforce(ctx, f.before); err != nil {
			return nil, err
		}
	}
	base, err := f.service()
	if err != nil {
		return nil, err
	}
	next, err := f.stage(ctx)
	if err != nil {
		return nil, err
	}
	start, err := f.configuration(ctx, next)
	if err != nil {
		return nil, err
	}
	stops := i.CheckStart(i.Config, i.named(), f.before)
	switch {
	case !i.Enforce && stops != nil:
		i.Say("warn", "do not restart %s: %v", i.Name, stops)
	case f.beforeErr != nil:
		i.Say("warn", "it is not known whether this containerd can ask a gate: %v", f.beforeErr)
	case f.before.NoCRI || f.before.NRIDisabled:
		i.Say("warn", "this containerd asks no gate about anything: CRI or NRI is switched off in its configuration, see tidewaiter doctor")
	}
	var mode []node.Change
	var need *node.Requirement
	if f.enforce {
		if mode, err = f.mode(ctx, next); err != nil {
			return nil, err
		}
	}
	if f.enforce { // mode may have put it off
		if at := i.remembered().Opened; i.Watching && !at.IsZero() {
			i.Say("warn", "uninstall opened containerd at %s, and it stays so: tidewaiter install --enforce on the host has it require the gate again", at.UTC().Format(time.RFC3339))
		} else if need, err = i.requirement(ctx, f.before); err != nil {
			return nil, err
		}
	}
	outstanding := i.Restart && i.remembered().Pending
	restarted := outstanding && need != nil && len(need.Changes) == 0 && f.gate != nil && f.gate.Ready && i.restarted()
	outstanding = outstanding && !restarted
	due := need != nil && !f.held && (len(mode)+len(need.Changes) > 0 || outstanding)
	p := &plan{idle: len(base)+len(start) == 0 && next == nil && !due}
	if due {
		err := cmp.Or(stops, i.canRestart(need, outstanding))
		if err == nil && (next == nil || i.DryRun) { // otherwise the gate is asked when it knows the new policy
			err = i.mayEnforce(ctx)
		}
		if err != nil && !i.DryRun {
			return nil, err
		}
		if err != nil {
			p.warnings = append(p.warnings, fmt.Errorf("it would not be done: %w", err))
		}
	}
	if len(base) > 0 || due {
		if err := f.notHeldUp(); err != nil && !i.DryRun {
			return nil, err
		} else if err != nil {
			p.warnings = append(p.warnings, fmt.Errorf("it would not be done now: %w", err))
		}
	}
	if i.DryRun && len(start) > 0 && f.lowers("audit") {
		p.warnings = append(p.warnings, errors.New("this node enforces, and would audit: everything starts"))
	}
	if need != nil {
		p.phases = append(p.phases, &phase{steps: []step{{do: func(context.Context) error { i.noteOwners(need.Others); return nil }}}})
	}
	if restarted {
		p.phases = append(p.phases, &phase{steps: []step{{do: func(context.Context) error { return i.noteRestarted() }}}})
	}
	p.phases = append(p.phases, f.bringUp(base, start, next)...)
	if due {
		p.enforcing = &enforcing{facts: f, next: next, mode: mode, need: need}
		p.phases = append(p.phases, p.enforcing.phase())
	}
	return p, nil
}

func commandLine(command []string) string { return strings.Join(command, " ") }
