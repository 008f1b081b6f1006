package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// restarted reports whether the containerd that runs was started after everything was
// written that has it require the gate: without that, a process that is ended by the restart
// that it asked for would ask for one more each time. It is for a gate that is registered.
// It returns false if unsure.
func (i *Installation) restarted() bool {
	r := i.remembered()
	p, err := i.Running(i.Now())
	if err != nil || p.Listens.IsZero() {
		return false
	}
	files := slices.Clone(r.Configs)
	for _, dir := range r.DropIns {
		files = append(files, path.Join(dir, node.DropInFile), path.Join(dir, node.PauseFile))
	}
	seen := false
	for _, name := range files {
		t, err := i.Changed(name)
		if errors.Is(err, fs.ErrNotExist) && path.Base(name) == node.PauseFile {
			continue
		}
		// By both clocks: one of them is wrong where the node's was set since.
		if err != nil || !t.Before(p.Started) || !t.Before(p.Listens) {
			return false
		}
		seen = true
	}
	return seen
}

// noteRestarted remembers that no restart of containerd is outstanding.
func (i *Installation) noteRestarted() error {
	r := i.remembered()
	r.Pending = false
	if err := i.remember(r); err != nil {
		return err
	}
	i.Say("did", "did not restart %s: it was started after its configuration was written", i.Name)
	return nil
}

func (i *Installation) requirement(ctx context.Context, before *node.Effective) (*node.Requirement, error) {
	pinned := ""
	if before.Pause != "" && !strings.Contains(before.Pause, "@") {
		socket, _ := i.Sockets(before)
		var err error
		if pinned, err = i.Pause(ctx, i.Path(socket), before.Pause); err != nil {
			i.Say("warn", "the pause image %s stays named by its tag: %v", before.Pause, err)
		}
	}
	need, err := i.Require(before, pinned, i.remembered().Required)
	if err != nil {
		return nil, err
	}
	i.sayOthers(need.Others)
	if pinned != "" && !need.Pinned {
		i.Say("warn", "the pause image stays named by its tag: write pause-image: %s into /etc/rancher/%s/config.yaml", pinned, i.Name)
	}
	if before.Toleration != "" {
		i.Say("warn", "containerd lets every pod with the annotation %s do without the gate (tolerate_missing_plugins_annotation)", before.Toleration)
	}
	return need, nil
}

// An enforcing is the phase that has the gate enforce, and then containerd require it: never
// the other way round, so that what containerd requires is what enforces.
type enforcing struct {
	*facts
	next *staged // the configuration that an earlier phase brought; nil: none
	mode []node.Change
	need *node.Requirement

	was       *control.Status // the gate as this phase finds it
	wasErr    error
	dirs      []string // that were made
	begun     bool     // something besides the configuration is to be taken back
	attempted bool     // containerd was told to restart
	result    Result
	late      error // that containerd is not restarted, and the rest is done
}

func (e *enforcing) phase() *phase {
	var steps []step
	if e.next != nil {
		steps = append(steps, step{ // the configuration stays if the node enforces with it
			undo: func(context.Context) error { return e.swap(e.next) },
			do:   func(context.Context) error { return nil },
		}, step{text: "ask the gate what runs here and would be refused", do: e.mayEnforce})
	}
	steps = append(steps, step{do: func(ctx context.Context) error {
		e.begun, e.result = true, Installed
		e.was, e.wasErr = e.Ask(ctx)
		return nil
	}})
	steps = append(steps, e.writes(e.mode, &e.dirs)...)
	steps = append(steps,
		step{text: "wait until the gate enforces", do: func(ctx context.Context) error {
			if err := e.await(ctx, e.patience(), func(s *control.Status) bool { return s.Ready && s.Mode == "enforce" }); err != nil {
				return fmt.Errorf("the gate is not registered to enforce: %w", err)
			}
			return e.alone()
		}},
		step{do: e.noteRequirement})
	steps = append(steps, e.writes(e.need.Changes, &e.dirs)...)
	steps = append(steps, e.noteDirectories(&e.dirs),
		step{text: "run " + commandLine([]string{e.Binary, "--config", e.Config, "config", "dump"}), do: func(ctx context.Context) error { return e.CheckRequirement(ctx, e.need) }})
	switch restart := e.Manager.Restart(); {
	case e.Restart && restart != nil:
		steps = append(steps, step{text: "run " + commandLine(restart), do: e.restart})
	case e.Restart:
		steps = append(steps, step{text: e.restartLine(), next: true, do: e.restart})
	case len(e.need.Changes) > 0:
		steps = append(steps, step{text: e.restartLine(), next: true, do: func(context.Context) error { e.Say("next", "%s", e.restartLine()); return nil }})
	}
	return &phase{steps: steps, restore: e.restore}
}

// alone fails where another gate runs here: what connects under the gate's name is present
// for containerd, also a second one that only audits.
func (e *enforcing) alone() error {
	n, err := e.Gates()
	if err == nil && n > 1 {
		err = node.Refusef("take the DaemonSet's gate off this node: kubectl label node NAME tidewaiter.dev/gate=host",
			"%d gates run on this node, and containerd would take any of them for the one that it requires", n)
	}
	return err
}

// noteRequirement writes down where the files go, before they are there: after a power cut
// uninstall must find them.
func (e *enforcing) noteRequirement(context.Context) error {
	r := e.remembered()
	for _, dir := range e.dirs {
		r.Directories = add(r.Directories, dir)
	}
	r.Opened = time.Time{}
	r.Pending = r.Pending || len(e.need.Changes) > 0
	r.Required = r.with(e.need.Others.Owners)
	for _, c := range e.need.Changes {
		if path.Base(c.Path) == node.DropInFile || path.Base(c.Path) == node.PauseFile {
			r.DropIns = add(r.DropIns, path.Dir(c.Path))
		} else {
			r.Configs = add(r.Configs, c.Path)
		}
	}
	return e.remember(r)
}

// restart restarts containerd, and waits for the gate to register with it.
func (e *enforcing) restart(ctx context.Context) error {
	if len(e.need.Changes) == 0 && e.restarted() {
		e.result = Enforces
		if err := e.noteRestarted(); err != nil {
			e.Say("warn", "%v", err)
		}
		return nil
	}
	command := e.Manager.Restart()
	if command == nil {
		e.late = node.Hintf("name the command with --restart-command", "it is not known what restarts %s", e.Name)
		return nil
	}
	s, err := e.Ask(ctx)
	if err != nil {
		return err
	}
	e.attempted = true
	if err := e.Manager.Run(ctx, [][]string{command}); err != nil {
		return err
	}
	e.Say("did", "restarted %s: %s", e.Name, commandLine(command))
	if err := e.await(ctx, e.patience(), func(n *control.Status) bool {
		return n.Ready && n.Mode == "enforce" && (n.PID != s.PID || n.Runtime.Registrations > s.Runtime.Registrations)
	}); err != nil {
		return fmt.Errorf("the gate is not registered after the restart of %s: %w", e.Name, err)
	}
	e.result = Enforces
	r := e.remembered()
	r.Pending = false
	if err := e.remember(r); err != nil {
		e.Say("warn", "%v", err)
	}
	return nil
}

// restore has containerd do without the gate again, and says what it finds.
func (e *enforcing) restore(ctx context.Context, why, failed error) error {
	brought := e.next != nil && !e.next.fresh && e.gate != nil // by a configuration that is gone again
	if !e.begun {
		if failed != nil {
			return fmt.Errorf("%w; and the configuration could not be taken back: %w", why, failed)
		}
		if !brought {
			return why
		}
		if err := e.await(ctx, e.patience(), func(s *control.Status) bool { return s.Mode == e.gate.Mode }); err != nil {
			return fmt.Errorf("%w; the configuration before is there again, and the gate did not take it: %w", why, err)
		}
		return why
	}
	if e.attempted { // also where the command failed: it may have restarted containerd, or ended it
		err := e.mayRestart(ctx)
		if err != nil {
			err = fmt.Errorf("%s was not restarted once more: %w", e.Name, err)
		} else {
			err = e.Manager.Run(ctx, [][]string{e.Manager.Restart()})
		}
		failed = errors.Join(failed, err)
	}
	if failed != nil {
		return fmt.Errorf("%w; and it could not be taken back: %w", why, failed)
	}
	next := nextOf(why)
	e.Log("install --enforce: " + why.Error() + ": taken back")
	why = undone{fmt.Errorf("%w: %w", why, ErrTakenBack)}
	if e.wasErr != nil {
		return node.Refusef(next, "%w", why)
	}
	if err := e.await(ctx, e.patience(), func(s *control.Status) bool {
		return (!e.was.Runtime.Registered || s.Runtime.Registered) && (len(e.mode) == 0 || s.Mode == "audit") && (!brought || s.Mode == e.gate.Mode)
	}); err != nil {
		return node.Hintf("tidewaiter status; tidewaiter doctor", "%w: the files are as they were, but the gate is not: %w", why, err)
	}
	return node.Refusef(next, "%w", why)
}
