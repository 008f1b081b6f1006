package install

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config/stage"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A trial was put in place and is not known to work: it is in the record from
// before the first change until the gate is ready with all of them. The next installation
// finishes it or takes it back.
type trial struct {
	At         time.Time   `json:"at"`
	Program    string      `json:"program,omitempty"` // digest of the one before, which is .previous then; empty: it is not changed
	Files      []savedFile `json:"files,omitempty"`   // the others, as they were
	Config     string      `json:"config,omitempty"`  // fingerprint of the configuration before; empty: it is not changed, or there was none
	Registered bool        `json:"registered"`        // the gate before was
}

// saved is a file as it was.
type savedFile struct {
	Path string      `json:"path"`
	Mode os.FileMode `json:"mode"`
	Old  []byte      `json:"old"` // null: it was not there
}

// trialOf returns the record of changes that are not known to work yet.
func (r *facts) trialOf(changes []node.Change, next *staged) *trial {
	t := &trial{At: r.Now(), Registered: registered(r.gate)}
	for _, c := range changes {
		switch {
		case c.Path == r.Program && r.old != nil:
			t.Program = sum(r.old)
		case c.Path == r.Program+".previous":
		default:
			t.Files = append(t.Files, savedFile{Path: c.Path, Mode: c.OldMode(), Old: c.Old})
		}
	}
	if next != nil && !next.fresh {
		t.Config = next.former
	}
	return t
}

// tried notes that the trial is over.
func (i *Installation) tried() error {
	r := i.remembered()
	if r.Trial == nil {
		return nil
	}
	r.Trial = nil
	return i.remember(r)
}

// interrupted is the phase that ends the trial of an installation that was interrupted, as by
// a power cut; nil: there is none. If the gate is ready with what is there, it was a success;
// otherwise all of it is taken back, and this installation begins from there.
func (i *Installation) interrupted(ctx context.Context) *phase {
	t := i.remembered().Trial
	if t == nil {
		return nil
	}
	end := step{do: func(context.Context) error { return i.tried() }}
	now, _ := i.program()
	swapped := t.Config == "" || i.fingerprintOf(i.ConfigDir) != t.Config
	replaced := t.Program == "" || sum(now) != t.Program
	if swapped && replaced && i.works(ctx, t) {
		return &phase{steps: []step{end}}
	}
	var steps []step
	next := i.ConfigDir + ".next"
	switch {
	case t.Config == "" || !swapped:
	case i.fingerprintOf(next) == t.Config:
		steps = append(steps, step{text: "put back the configuration before, in " + i.ConfigDir, do: func(context.Context) error {
			_, err := stage.Swap(i.Path(next), i.Path(i.ConfigDir), true)
			return err
		}})
	default:
		steps = append(steps, step{do: func(context.Context) error {
			i.Say("warn", "the configuration before an installation that was interrupted is not there any more: that in %s stays", i.ConfigDir)
			return nil
		}})
	}
	if t.Program != "" && replaced {
		steps = append(steps, step{text: "put back the program before, in " + i.Program, do: func(context.Context) error {
			old, err := os.ReadFile(i.Path(i.Program + ".previous"))
			switch {
			case err != nil:
				return err
			case sum(old) != t.Program:
				return fmt.Errorf("%s.previous is not the program before", i.Program)
			}
			return i.Put(node.Change{Path: i.Program, Mode: 0o755, New: old})
		}})
	}
	for _, f := range slices.Backward(t.Files) {
		steps = append(steps, step{text: "put back " + f.Path, do: func(context.Context) error {
			return i.Put(node.Change{Path: f.Path, Mode: f.Mode, New: f.Old})
		}})
	}
	steps = append(steps, step{do: func(context.Context) error {
		i.Say("did", "took back an installation that was interrupted")
		i.Log("install: an installation that was interrupted was taken back")
		return nil
	}})
	for _, c := range i.Manager.Start() {
		steps = append(steps, step{text: "run " + commandLine(c), do: func(ctx context.Context) error {
			if !i.Exists(i.Program) {
				return nil
			}
			if err := i.Manager.Run(ctx, [][]string{c}); err != nil {
				i.Say("warn", "%v", err)
			}
			return nil
		}})
	}
	return &phase{steps: append(steps, end)}
}

// works reports whether the gate works with what an installation put in place that was
// interrupted.
func (i *Installation) works(ctx context.Context, t *trial) bool {
	s, err := i.Ask(ctx)
	if err != nil {
		return false
	}
	c := s.Configuration
	works := c.Revision != "" && (c.Rejected == nil || !c.Rejected.Current) && (!t.Registered || s.Ready)
	started := t.Program == "" && len(t.Files) == 0 || s.Started.After(t.At)
	return works && started
}

// settle ends an installation that was interrupted.
func (i *Installation) settle(ctx context.Context) error {
	p := i.interrupted(ctx)
	switch {
	case p == nil:
		return nil
	case i.DryRun:
		i.Say("warn", "an installation was interrupted, and would be ended first")
		i.print(&plan{phases: []*phase{p}})
		return nil
	}
	if err := i.apply(ctx, p); err != nil {
		return fmt.Errorf("an installation was interrupted, and cannot be taken back: %w", err)
	}
	return nil
}

// Unfinished reports whether the record in a state directory has an installation that is not
// known to work, and since when. One that is under way is such, too.
func Unfinished(stateDir string) (since time.Time, is bool) {
	f, err := os.Open(filepath.Join(stateDir, recordName))
	if err != nil {
		return time.Time{}, false
	}
	defer f.Close()
	var r struct {
		Trial *struct {
			At time.Time `json:"at"`
		} `json:"trial"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxRecord)).Decode(&r); err != nil || r.Trial == nil {
		return time.Time{}, false
	}
	return r.Trial.At, true
}

// UnfinishedText describes one.
func UnfinishedText(since time.Time) string {
	return "an installation that began at " + since.UTC().Format(time.RFC3339) + " is under way or was interrupted: the next tidewaiter install finishes it or takes it back"
}

// maxRecord bounds how much of the record of an installation is read.
const maxRecord = 4 << 20
