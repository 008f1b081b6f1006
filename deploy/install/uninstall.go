package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// Uninstall opens containerd and takes the gate away. It needs neither the gate nor a
// network.
func (i *Installation) Uninstall(ctx context.Context) (Result, error) {
	if err := i.checkPaths(); err != nil {
		return "", err
	}
	release, err := i.lock(ctx)
	switch {
	case err != nil && (!i.Force || ctx.Err() != nil):
		return "", err
	case err != nil: // nothing keeps a node from being opened
		i.Say("warn", "%v: --force goes on all the same", err)
		release = func() {}
	}
	defer release()
	i.commands()
	r := i.remembered()
	opening, openErr := i.Open(r.DropIns, r.Configs)
	var gateFiles []node.Change
	var files []string
	if f, _, _ := i.Manager.File(); f != "" {
		files = append(files, f, node.Defaults)
	}
	files = append(files, i.Program, i.Program+".previous", i.recordFile())
	for _, f := range files {
		c, err := i.Change(f, 0, nil, "the gate")
		if err != nil {
			return "", err
		}
		if len(c) > 0 && f == node.Defaults && !bytes.Contains(c[0].Old, []byte(header)) {
			continue // the operator's
		}
		gateFiles = append(gateFiles, c...)
	}
	before, after := i.Manager.Stop()
	if f, _, _ := i.Manager.File(); f == "" || !i.Exists(f) {
		before, after = nil, nil
	}

	if i.DryRun {
		for _, c := range append(slices.Clone(opening), gateFiles...) {
			i.Say("would", "%s", c.Show())
		}
		for _, c := range slices.Concat(before, after) {
			i.Say("would", "run %s\n", strings.Join(c, " "))
		}
		ours, err := i.runOn(len(before) > 0)
		if err != nil {
			i.Say("warn", "%v", err)
		}
		for _, g := range ours {
			if len(before) == 0 {
				i.Say("would", "end process %d, which is the gate\n", g.pid)
			}
		}
		if len(opening)+len(gateFiles)+len(ours) == 0 {
			return Nothing, openErr
		}
		return Planned, openErr
	}
	again := i.Restart && (len(opening) > 0 || i.mayRequire(ctx, r))
	// First of all containerd, file by file: what cannot be read must not keep what
	// can from being opened.
	for _, c := range opening {
		if err := i.Put(c); err != nil {
			openErr = errors.Join(openErr, err)
			continue
		}
		i.sayRemoved(c)
	}
	if openErr == nil && !i.Force {
		openErr = i.requiredByOthers(ctx)
	}
	if openErr != nil {
		return "", node.Hintf("remove what is left by hand: docs/lockout.md", "containerd may still require the gate: %w", openErr)
	}
	if len(opening) > 0 {
		i.Log("uninstall: containerd's configuration does not require the gate any more")
		r.Opened = i.Now()
		if err := i.remember(r); err != nil {
			i.Say("warn", "%v", err)
		}
	}
	if i.Restart && !again {
		i.Say("did", "did not restart containerd: nothing makes it require the gate")
	} else if err := i.mayRestart(ctx); err != nil && i.Restart {
		return Opened, node.Hintf(nextOf(err)+"; then tidewaiter uninstall --restart", "containerd's configuration does not require the gate any more, and containerd was not restarted: %w", err)
	} else if err != nil && !i.Force && (len(opening) > 0 || i.stillAsks(ctx, r)) {
		i.Say("warn", "containerd was opened, and must not be restarted yet: %v", err)
		i.Say("next", "%s; then tidewaiter uninstall --restart", nextOf(err))
		return Opened, nil
	} else if i.Restart {
		command := i.Manager.Restart()
		if command == nil {
			return Opened, node.Hintf("restart it and run tidewaiter uninstall, or tidewaiter uninstall --restart --restart-command COMMAND",
				"containerd's configuration does not require the gate any more, but it is not known what restarts containerd, which goes on with the one before")
		}
		if err := i.Manager.Run(ctx, [][]string{command}); err != nil {
			return Opened, err
		}
		i.Say("did", "restarted %s: %s", i.Name, strings.Join(command, " "))
	} else if !i.Force && (len(opening) > 0 || i.stillAsks(ctx, r)) {
		// The containerd that runs has read the old files.
		i.Say("next", "%s", i.restartLine())
		i.Say("next", "tidewaiter uninstall, again: until then the gate goes on, without which containerd would refuse everything")
		return Opened, nil
	}
	// A gate that no service ends would go on refusing. What cannot be told of it is asked
	// before anything of it is removed.
	ours, err := i.runOn(len(before) > 0)
	if err != nil && !i.Force {
		return Opened, err
	}
	if err != nil {
		i.Say("warn", "%v: --force goes on all the same", err)
	}
	if len(gateFiles)+len(opening)+len(ours) == 0 && !i.Purge {
		return Nothing, nil
	}
	var purged []string
	for _, dir := range []string{i.ConfigDir, i.StateDir, i.RunDir} {
		if i.Purge && !i.owns(dir, r) {
			i.Say("warn", "%s stays: it may hold what is not the gate's; remove by hand what is", dir)
		} else if i.Purge {
			purged = append(purged, dir)
		}
	}
	if err := i.Manager.Run(ctx, before); err != nil {
		i.Say("warn", "%v", err)
	}
	for _, c := range gateFiles {
		if err := i.Put(c); err != nil {
			return "", err
		}
		i.sayRemoved(c)
	}
	if err := i.Manager.Run(ctx, after); err != nil {
		i.Say("warn", "%v", err)
	}
	for _, g := range ours { // that no service ended
		if err := i.end(ctx, g); err != nil {
			return Opened, err
		}
	}
	var shared error
	if i.Purge {
		if shared = i.shared(); shared != nil {
			purged = slices.DeleteFunc(purged, func(dir string) bool { return dir != i.ConfigDir })
		}
		for _, dir := range purged {
			if err := os.RemoveAll(i.Path(dir)); err != nil {
				return "", err
			}
			i.Say("did", "removed %s", dir)
		}
		if slices.Contains(purged, i.ConfigDir) { // what an installation left that was interrupted
			if err := os.RemoveAll(i.Path(i.next())); err != nil {
				return "", err
			}
		}
	}
	for _, dir := range slices.Backward(r.Directories) {
		os.Remove(i.Path(filepath.Clean(dir))) // what holds something stays
	}
	if shared != nil {
		return "", shared
	}
	return Removed, nil
}

// owns reports whether a directory can be told to be the gate's, and not one that others
// have things in, too: nothing that install did not make is deleted for its flag alone.
func (i *Installation) owns(dir string, r record) bool {
	if slices.ContainsFunc(strings.Split(dir, "/"), func(name string) bool { return strings.HasPrefix(name, node.GateName) }) {
		return true
	}
	if above := path.Dir(dir); above == "/var" || above == "/usr" { // whatever a gate left there
		return false
	}
	if !i.Exists(dir) || slices.Contains(r.Directories, dir) {
		return true
	}
	return slices.ContainsFunc([]string{"install.json", "config.yaml", "store", control.SocketName}, func(name string) bool { return i.Exists(path.Join(dir, name)) })
}

// shared fails where a gate lives here after the service has ended, such as a pod's: its
// state and its sockets are in the same directories.
func (i *Installation) shared() error {
	if i.Force {
		return nil
	}
	n, err := i.Gates()
	if err == nil && n == 0 {
		return nil
	}
	what := "another gate still runs here"
	if err != nil {
		what = fmt.Sprintf("it cannot be found out whether another gate runs here (%v)", err)
	}
	return node.Hintf("end it, then tidewaiter uninstall --purge again; --force deletes them under it", "%s: %s and %s stay", what, i.StateDir, i.RunDir)
}

// mayRequire reports whether the containerd that runs may require the gate though none of
// our files is in its configuration. It is restarted unless it is known not to.
func (i *Installation) mayRequire(ctx context.Context, r record) bool {
	if r.Pending || !r.Opened.IsZero() || len(r.DropIns)+len(r.Configs) > 0 {
		return true // it did once, and may not have been restarted since
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	e, err := i.Effective(ctx)
	if err != nil || e.RequiresGate() {
		return true
	}
	p, err := i.Running(i.Now())
	if err != nil {
		return false // none runs, or it cannot be seen from here
	}
	files, dirs, err := i.Files()
	if err != nil {
		return true
	}
	for _, f := range files {
		dirs = append(dirs, f.Path)
	}
	return slices.ContainsFunc(dirs, func(name string) bool {
		t, err := i.Changed(name)
		return err == nil && t.After(p.Started) // and it may have read another configuration
	})
}

// requiredByOthers fails where containerd's own program says that the gate is required
// still: it says so somewhere where install did not write it, and without the gate
// nothing would start. What cannot be found out is no reason to leave the gate.
func (i *Installation) requiredByOthers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	e, err := i.Effective(ctx)
	if err != nil || !e.RequiresGate() {
		return nil
	}
	where := i.Config
	files, _, _ := i.Files()
	for _, f := range files {
		for _, s := range f.Settings {
			if s.Key[len(s.Key)-1] == "required_plugins" && (slices.Contains(s.Values, node.GateName) || slices.Contains(s.Values, "99-"+node.GateName)) {
				where = s.At()
			}
		}
	}
	return fmt.Errorf("%s requires it, which install did not write (--force removes the gate all the same)", where)
}

// stillAsks reports whether the containerd that runs was started before its
// configuration was opened, as far as a gate that runs knows.
func (i *Installation) stillAsks(ctx context.Context, r record) bool {
	s, err := i.Ask(ctx)
	return err == nil && !r.Opened.IsZero() && s.Runtime.Registered && s.Runtime.Since != nil && s.Runtime.Since.Before(r.Opened)
}

// sayRemoved says what became of a file.
func (i *Installation) sayRemoved(c node.Change) {
	if c.New == nil {
		i.Say("did", "removed %s", c.Path)
		return
	}
	i.Say("did", "wrote %s", c.Path)
}
