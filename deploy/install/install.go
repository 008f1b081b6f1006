// Package install puts the gate on a node and takes it away: the program, its service, its
// configuration, and the files that make containerd require it. What it does not see to work
// it takes back. What the node is made of is package node's.
package install

import (
	"context"
	"errors"
	"path"
	"regexp"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A Gate is where the program and its directories are, on the host.
type Gate struct {
	Program   string // empty: GateBinary
	ConfigDir string
	StateDir  string
	RunDir    string
}

// Options are what was asked for.
type Options struct {
	// From is a directory of this process whose configuration the host is to have;
	// empty: the host has its own.
	From string
	Keep bool // the program on the host, whichever it is
	// Watching replaces a program on the host only with a newer one: several pods may
	// watch at once. Release is the version of Self.
	Watching bool
	Release  string

	Enforce bool
	Audit   bool // have the node audit, also one that enforces: without it no node is lowered
	Force   bool
	DryRun  bool // only say what would be done
	Restart bool // of containerd
	Purge   bool // configuration and state too

	// Patience is how long the gate is waited for. Zero: a minute.
	Patience time.Duration
}

// A World is what an installation needs beside files and programs. All fields but LoadOld
// are required.
type World struct {
	Ask   func(context.Context) (*control.Status, error)            // the gate
	Look  func(context.Context) (*control.Status, error)            // the gate, which looks at what runs first
	Gates func() (int, error)                                       // that run on this node
	Load  func(ctx context.Context, dir string) (Configured, error) // reads a configuration directory as Self would
	// LoadOld is Load by the program on the host. nil: it cannot be asked.
	LoadOld func(ctx context.Context, dir string) (Configured, error)
	Pause   func(ctx context.Context, socket, name string) (string, error) // that name of an image on the node which has its digest
	Say     func(kind, format string, args ...any)                         // kind: "did", "would", "warn" or "next"
	Log     func(message string)                                           // to the node's log
	Now     func() time.Time
	Sleep   func(context.Context, time.Duration)
}

// An Installation installs the gate on a host, or takes it away. It is not safe for
// concurrent use; several processes keep out of each other's way by a lock on the host.
type Installation struct {
	*node.Host
	Gate
	Options
	World
	Self []byte // the program that is installed
}

// Configured is what a configuration directory means to a program.
type Configured struct {
	Mode     string // "enforce" or "audit"
	Revision string // digest of what was read
}

// Result says how an installation ended.
type Result string

// Results.
const (
	Planned   Result = "planned"   // what would be done
	Nothing   Result = "nothing"   // was to be done
	Installed Result = "installed" // the gate runs; containerd does not require it, or its restart is outstanding
	Enforces  Result = "enforces"  // and containerd was restarted and requires it
	Opened    Result = "opened"    // containerd's configuration does not require the gate any more; the gate still runs
	Removed   Result = "removed"
)

// An ownPath is a path in full with two names or more. Directories that are removed
// with all that they hold are named so, and names that get into a unit as they are.
var ownPath = regexp.MustCompile(`^(/[A-Za-z0-9._@+-]+){2,}$`)

// checkPaths refuses others.
func (i *Installation) checkPaths() error {
	if i.Program == "" {
		i.Program = node.GateBinary
	}
	for _, p := range []struct {
		flag string
		name *string
	}{{"--config-dir", &i.ConfigDir}, {"--state-dir", &i.StateDir}, {"--run-dir", &i.RunDir}, {"--program", &i.Program}} {
		if *p.name != "" {
			*p.name = path.Clean(*p.name)
		}
		if !ownPath.MatchString(*p.name) {
			return node.Hintf("name one of the gate's own in full, such as /var/lib/tidewaiter", "%s: %q cannot be a place of the gate", p.flag, *p.name)
		}
	}
	return nil
}

// Install installs the gate. An error that is a Hint with Refused means that it was refused,
// or did not work and was taken back, which was looked at.
func (i *Installation) Install(ctx context.Context) (Result, error) { return i.install(ctx, limits{}) }

func (i *Installation) install(ctx context.Context, l limits) (Result, error) {
	if err := i.checkPaths(); err != nil {
		return "", err
	}
	if i.Enforce && i.Audit {
		return "", errors.New("to enforce and to audit exclude each other")
	}
	release, err := i.lock(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	i.commands()
	if err := i.settle(ctx); err != nil {
		return "", err
	}
	f := i.look(ctx, l)
	defer f.unstage()
	p, err := f.plan(ctx)
	switch {
	case err != nil:
		return "", err
	case i.DryRun && p.idle:
		return Nothing, nil
	case i.DryRun:
		i.print(p)
		return Planned, nil
	}
	for _, phase := range p.phases {
		if err := i.apply(ctx, phase); err != nil {
			return "", err
		}
	}
	i.noteCommands()
	switch {
	case p.enforcing != nil:
		return p.enforcing.result, p.enforcing.late
	case p.idle && (f.gate != nil || i.Manager.Start() == nil):
		return Nothing, nil
	}
	return Installed, nil
}

func (i *Installation) restartLine() string {
	if c := i.Manager.Restart(); c != nil {
		return commandLine(c)
	}
	return "restart " + i.Name + ", which is not a service that is known here (--restart-command)"
}
