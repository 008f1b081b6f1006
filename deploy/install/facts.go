package install

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// facts are what an installation found, before it changes anything.
type facts struct {
	*Installation
	self    []byte // the program that the host is to have
	old     []byte // the one that it has; nil: none
	record  bool   // there is one of an earlier installation
	keep    bool   // the one that it has is the one that it is to have
	enforce bool   // what was asked for, unless what is brought puts it off
	limits

	gate      *control.Status // that answers; nil: none
	before    *node.Effective // nil: it is not known
	beforeErr error           // why
	enforced  bool            // the node enforces, as it is
}

// look finds out how things are.
func (i *Installation) look(ctx context.Context, l limits) *facts {
	r := &facts{Installation: i, limits: l, self: i.Self, keep: i.Keep, enforce: i.Enforce, record: i.Exists(i.recordFile())}
	old, err := i.program()
	switch {
	case err != nil:
		r.keep = false // there is none to keep
	case i.Keep || l.held || i.Watching && !bytes.Equal(old, i.Self) && !i.newer(ctx, old):
		r.self, r.keep = old, true
	}
	if err == nil {
		r.old = old
	}
	if gate, err := i.Ask(ctx); err == nil {
		r.gate = gate
	}
	if r.before, r.beforeErr = i.Effective(ctx); r.beforeErr != nil {
		r.before = nil
	}
	r.enforced = r.stands(ctx)
	return r
}

// load is what a configuration means to the program that the host is to have.
func (r *facts) load(ctx context.Context, dir string) (Configured, error) {
	if r.keep && r.LoadOld != nil {
		return r.LoadOld(ctx, dir)
	}
	return r.Load(ctx, dir)
}

// stands reports whether the node refuses containers as it is, by the gate that answers;
// where none does by what it was installed with, or since containerd requires one.
func (r *facts) stands(ctx context.Context) bool {
	switch {
	case r.gate != nil && r.gate.Configuration.Revision == "":
		return !r.gate.Configuration.WaitingForConfig // it denies everything
	case r.gate != nil:
		return r.gate.Mode == "enforce"
	case r.old != nil && r.record:
		if c, err := r.load(ctx, r.ConfigDir); err == nil {
			return c.Mode == "enforce"
		}
	}
	return r.before != nil && r.before.RequiresGate()
}

// program is that on the host.
func (i *Installation) program() ([]byte, error) { return os.ReadFile(i.Path(i.Program)) }

// canRestart fails where containerd is to be restarted and nothing is known that does.
func (i *Installation) canRestart(need *node.Requirement, outstanding bool) error {
	if !i.Restart || i.Manager.Restart() != nil || len(need.Changes) == 0 && !outstanding {
		return nil
	}
	return node.Hintf("name the command with --restart-command, or leave --restart out and restart it yourself",
		"it is not known what restarts %s: nothing was changed", i.Name)
}

// canEnforce refuses where containerd cannot be made to refuse.
func (i *Installation) canEnforce(ctx context.Context, before *node.Effective) error {
	if before.NoCRI {
		return node.Refusef("remove cri from disabled_plugins in "+i.Config+", or name the containerd that runs pods: --runtime, --containerd-config",
			"CRI is switched off in containerd's configuration, as in that of Docker's packages: no kubelet uses this containerd, and what Docker starts no plugin is asked about")
	}
	if before.NRIDisabled {
		return node.Refusef("remove disable = true of the plugin io.containerd.nri.v1.nri, or its name from disabled_plugins, restart containerd, and look at tidewaiter status",
			"NRI is switched off in containerd's configuration, so that no gate can be asked")
	}
	major, minor, err := i.Version(ctx)
	if err != nil {
		return err
	}
	if major < 2 || major == 2 && minor < 2 {
		return node.Refusef("containerd 2.2 or later is needed to enforce", "this is containerd %d.%d, which goes on without a plugin that fails", major, minor)
	}
	return nil
}

// mayEnforce refuses if something that runs would be refused, or if no gate can tell.
func (i *Installation) mayEnforce(ctx context.Context) error {
	if i.Force {
		return nil
	}
	where := i.ConfigDir
	if i.From != "" {
		where = i.From
	}
	first := "with mode: audit in " + path.Join(where, "config.yaml") + ": tidewaiter install, then tidewaiter status; --force enforces all the same"
	asked := i.Now()
	s, err := i.Look(ctx)
	if err != nil {
		return node.Refusef(first, "no gate runs here that could say what would be refused: %w", err)
	}
	c, r := s.Configuration, s.Running
	switch {
	case c.Revision == "":
		return node.Refusef(first, "the gate has no configuration and would refuse everything")
	case c.Rejected != nil && c.Rejected.Current:
		return node.Refusef("correct it; --force enforces with the one before", "the gate rejected its configuration: %s", c.Rejected.Error)
	case r.At == nil || r.At.Before(asked):
		return node.Refusef("try again in a minute, or see tidewaiter status; --force does not wait", "the gate has not looked at everything that runs yet")
	case r.Error != "":
		return node.Refusef("tidewaiter status; --force enforces all the same", "the gate could not look at everything that runs: %s", r.Error)
	}
	var bad []string
	for _, f := range r.Found {
		if f.ImageMissing || !verify.Reason(f.Reason).Allows() {
			bad = append(bad, fmt.Sprintf("%s/%s %s %s: %s", f.Namespace, f.Pod, f.Container, f.Image, gone(f.ImageMissing, f.Reason)))
		}
	}
	n := r.ImageMissing
	for reason, m := range r.Reasons {
		if !verify.Reason(reason).Allows() {
			n += m
		}
	}
	for _, p := range r.Pauses {
		if p.ImageMissing || !verify.Reason(p.Reason).Allows() {
			n++
			bad = append(bad, fmt.Sprintf("the pause image %s: %s", p.Image, gone(p.ImageMissing, p.Reason)))
		}
	}
	if n == 0 {
		return nil
	}
	for k, b := range bad {
		if k == 10 {
			i.Say("warn", "and %d more: tidewaiter status", len(bad)-k)
			break
		}
		i.Say("warn", "would be refused: %s", b)
	}
	next := "sign them, or list their digests in a digest allowlist"
	if m := r.Reasons["POD_TOO_LARGE"]; m > 0 {
		next += "; shorten the pods that are POD_TOO_LARGE (environment, labels, annotations; enableServiceLinks: false leaves out most of a long environment)"
	}
	return node.Refusef(next+"; --force enforces all the same", "%d of what runs here would be refused", n)
}

func gone(is bool, reason string) string {
	if is {
		return "its image is not on the node any more"
	}
	return reason
}

// notHeldUp refuses to restart a gate whose registration the runtime holds up: the next one
// would wait as well, and containers with it.
func (r *facts) notHeldUp() error {
	if r.Force || r.gate == nil || r.gate.Runtime.AwaitingSync == nil {
		return nil
	}
	return node.Hintf("tidewaiter status says what it waits for, docs/lockout.md how to end that; --force goes on",
		"containerd holds up the gate's registration since %s, and would hold up the next one: nothing was changed", r.gate.Runtime.AwaitingSync.UTC().Format(time.RFC3339))
}

// limits are left alone for a while after something was taken back.
type limits struct {
	held  bool // leave the program and containerd as they are
	lower bool // and bring no configuration that has the node enforce
}
