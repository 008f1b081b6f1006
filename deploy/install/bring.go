package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/tidewaiter/tidewaiter/deploy"
	"github.com/tidewaiter/tidewaiter/deploy/config/stage"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A staged configuration is checked and lies beside the one on the host, in ConfigDir with
// .next at its end; after swap that is where the one before is.
type staged struct {
	mode    string // that it means
	former  string // fingerprint of the one before
	have    stage.Files
	fresh   bool // there is none before
	first   bool // it audits until what runs is judged
	after   bool // the program on the host does not take it: the next one must be ready first
	swapped bool
}

// stage puts the configuration in i.From beside the one on the host; nil: it is that one.
// The program that is to run must take it, and it must be one that may be in force: where
// it enforces and the node did not, what runs is judged first, since the gate reads it
// within a moment. If no gate answers, none can judge, and a gate that is never begun
// never could: for watching, a configuration that enforces first gets to the host with
// mode: audit, and the round does not enforce.
//
// The program that would come back must take it too: a program that is taken back would
// find a configuration with which it denies everything.
func (r *facts) stage(ctx context.Context) (*staged, error) {
	if r.From == "" {
		return nil, nil
	}
	want, err := stage.Read(r.From)
	if err != nil {
		return nil, node.Hintf("mount a configuration there", "read the configuration to copy: %w", err)
	}
	have, err := stage.Read(r.Path(r.ConfigDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	s := &staged{have: have, former: have.Fingerprint(), fresh: err != nil}
	if r.gate == nil && r.enforce && !r.enforced && !r.Force && r.Watching && r.Manager.Start() != nil {
		audits := s.fresh
		if !s.fresh { // a gate that enforced is not made to audit
			c, err := r.load(ctx, r.ConfigDir)
			audits = err == nil && c.Mode != "enforce"
		}
		if s.first = audits && audited(want); s.first {
			r.enforce = false
		}
	}
	if r.Audit {
		audited(want)
	}
	if maps.EqualFunc(want, have, slices.Equal) && !s.fresh {
		return nil, nil
	}
	if r.DryRun { // to check it takes a copy on the host
		return s, nil
	}
	next := r.next()
	if err := os.RemoveAll(r.Path(next)); err != nil {
		return nil, err
	}
	if err := want.Write(r.Path(next)); err != nil {
		return nil, err
	}
	err = r.mayStage(ctx, s, next)
	if err == nil && r.lower && s.mode == "enforce" && !r.enforced {
		r.enforce = false
		return nil, os.RemoveAll(r.Path(next)) // it is what was taken back, and not its turn
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(r.Path(next)))
	}
	return s, nil
}

// next is where a configuration is before it is in force.
func (i *Installation) next() string { return i.ConfigDir + ".next" }

// mayStage refuses a configuration that is not to get to the host, and finds out when it
// may.
func (r *facts) mayStage(ctx context.Context, s *staged, next string) error {
	c, err := r.load(ctx, next)
	if err != nil {
		return node.Hintf("correct it", "the configuration in %s is not valid on the host: %w", r.From, err)
	}
	s.mode = c.Mode
	switch {
	case s.mode == "enforce":
		if err := r.mayBring(ctx); err != nil {
			return err
		}
	case r.enforce && !r.Watching:
		return r.saysAudit()
	case r.Audit && s.mode != "audit":
		return node.Refusef("write mode: audit there", "the line mode: enforce of the config.yaml in %s is not there in a form that is changed here", r.From)
	}
	if r.old == nil || r.keep || slices.Equal(r.old, r.self) || r.LoadOld == nil {
		return nil
	}
	_, newer := r.LoadOld(ctx, next)
	if newer == nil {
		return nil
	}
	if _, err := r.LoadOld(ctx, r.ConfigDir); err != nil {
		return nil // it has none that it could come back to
	}
	if _, older := r.load(ctx, r.ConfigDir); older != nil {
		return node.Refusef("bring a configuration first that both programs take, and the program after it",
			"the program on the host does not take the configuration in %s (%w), nor the one that is to run the one in force (%w): whichever came first, the other could not be taken back", r.From, newer, older)
	}
	s.after = true
	return nil
}

// swap puts the configuration that is beside the one on the host in its place, and that
// one beside it, in one step; a second time it goes back.
func (r *facts) swap(s *staged) error {
	next := r.next()
	if s.fresh && s.swapped {
		s.swapped = false
		return os.RemoveAll(r.Path(r.ConfigDir))
	}
	// The first time it may be an operator's own that goes, with keys that are nowhere
	// else. That stays beside it.
	if rec := r.remembered(); !rec.Brought {
		if !s.fresh {
			if err := s.have.Write(r.Path(r.ConfigDir + ".before")); err != nil {
				return err
			}
			r.Say("did", "kept the configuration that was there in %s", r.ConfigDir+".before")
		}
		rec.Brought = true
		if err := r.remember(rec); err != nil {
			return err
		}
	}
	swapped, err := stage.Swap(r.Path(next), r.Path(r.ConfigDir), !s.fresh)
	if swapped {
		s.swapped = !s.swapped
	}
	return err
}

// unstage removes the configuration before, unless what replaced it is not known to work.
func (r *facts) unstage() {
	if r.From != "" && !r.DryRun && r.remembered().Trial == nil {
		os.RemoveAll(r.Path(r.next()))
	}
}

// audited has the config.yaml of a configuration that enforces audit, where that is one
// line of it, or where there is none.
func audited(files stage.Files) bool {
	const name = "config.yaml"
	if _, there := files[name]; !there {
		if files["trustpolicy.json"] == nil && files["trustpolicy.oci.json"] == nil {
			return false
		}
		files[name] = []byte(deploy.AuditConfig)
		return true
	}
	if len(enforces.FindAll(files[name], 2)) != 1 {
		return false
	}
	files[name] = enforces.ReplaceAll(files[name], []byte("${1}audit${2}"))
	return true
}

// mayBring refuses a configuration that enforces where none was in force that did, and
// what runs would be refused with the one that is in force.
func (r *facts) mayBring(ctx context.Context) error {
	if r.enforced {
		return nil
	}
	if r.gate == nil && r.enforce { // perhaps a gate that this configuration is to bring up again
		if c, err := r.load(ctx, r.ConfigDir); err == nil && c.Mode == "enforce" {
			return nil
		}
	}
	if !r.enforce {
		return r.audits()
	}
	return r.mayEnforce(ctx)
}

// fingerprintOf is that of a directory of the host; empty: it cannot be read.
func (i *Installation) fingerprintOf(dir string) string {
	all, err := stage.Read(i.Path(dir))
	if err != nil {
		return ""
	}
	return all.Fingerprint()
}

// CheckOnHost says what a configuration directory of the host means, as Self sees it
// there: what the configuration names may be on the host alone.
func (i *Installation) CheckOnHost(ctx context.Context, dir string) (Configured, error) {
	check := i.Program
	if !i.installed() { // it is put beside it for as long as it is asked
		check += ".check"
		_, made, err := i.Apply([]node.Change{{Path: check, Mode: 0o700, New: i.Self}})
		defer func() {
			os.Remove(i.Path(check))
			for _, d := range slices.Backward(made) {
				os.Remove(i.Path(d))
			}
		}()
		if err != nil {
			return Configured{}, err
		}
	}
	return i.checkBy(ctx, check, dir)
}

// CheckInstalled says what a configuration directory of the host means to the program
// that is installed.
func (i *Installation) CheckInstalled(ctx context.Context, dir string) (Configured, error) {
	return i.checkBy(ctx, i.Program, dir)
}

func (i *Installation) checkBy(ctx context.Context, program, dir string) (Configured, error) {
	out, err := i.Run(ctx, program, "policy", "check", "--config-dir", dir, "--output", "json")
	if err != nil {
		return Configured{}, err
	}
	var said struct{ Mode, Revision string }
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		return Configured{}, fmt.Errorf("policy check: %w", err)
	}
	if said.Mode != "enforce" && said.Mode != "audit" {
		return Configured{}, fmt.Errorf("policy check: mode %q is not known", said.Mode)
	}
	return Configured(said), nil
}
