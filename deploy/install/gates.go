package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// A gateProcess is a gate that runs on this node.
type gateProcess struct {
	pid     int
	program string // that it runs, as it calls it
	ours    bool   // it runs the program of this installation, or did before that was replaced or removed
	pod     bool   // it has a file system of its own, and is not ours
}

// maxInstances bounds how many places of gates are looked at.
const maxInstances = 256

// gates finds the processes of the gates that use the run directory: each keeps a file of
// its own open there (nri.Instance), and nothing else does for longer than a moment. What
// has no process here, such as in a pod with a PID namespace of its own, is not found.
func (i *Installation) gates() ([]gateProcess, error) {
	dir := filepath.Join(i.Path(i.RunDir), "instances")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	places := map[string]fs.FileInfo{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && len(places) < maxInstances {
			places[e.Name()] = info
		}
	}
	if len(places) == 0 {
		return nil, nil
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []gateProcess
	for _, p := range processes {
		if pid, err := strconv.Atoi(p.Name()); err == nil && pid != os.Getpid() && holds(pid, places) {
			all = append(all, i.gateProcess(pid))
		}
	}
	return all, nil
}

// holds reports whether a process has one of the files open.
func holds(pid int, places map[string]fs.FileInfo) bool {
	fds := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	open, err := os.ReadDir(fds)
	if err != nil {
		return false // it ended
	}
	for _, fd := range open {
		name := filepath.Join(fds, fd.Name())
		to, err := os.Readlink(name)
		if err != nil {
			continue
		}
		place, is := places[path.Base(strings.TrimSuffix(to, " (deleted)"))]
		if !is {
			continue
		}
		if info, err := os.Stat(name); err == nil && os.SameFile(info, place) {
			return true
		}
	}
	return false
}

func (i *Installation) gateProcess(pid int) gateProcess {
	at := func(name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }
	g := gateProcess{pid: pid}
	exe, _ := os.Readlink(at("exe"))
	var gone bool
	g.program, gone = strings.CutSuffix(exe, " (deleted)")
	if gone {
		g.ours = g.program == i.Program || g.program == i.Path(i.Program)
	} else if its, err := os.Stat(at("exe")); err == nil {
		ours, err := os.Stat(i.Path(i.Program))
		g.ours = err == nil && os.SameFile(its, ours)
	}
	here, err := os.Readlink("/proc/self/ns/mnt")
	there, failed := os.Readlink(at("ns/mnt"))
	g.pod = !g.ours && err == nil && failed == nil && here != there
	return g
}

// runOn are the gates of this installation that no service ends; it fails where a gate
// runs that may be another's, and that no service ends.
func (i *Installation) runOn(service bool) ([]gateProcess, error) {
	all, err := i.gates()
	if err != nil {
		return nil, fmt.Errorf("find the gates that run here: %w", err)
	}
	var ours []gateProcess
	for _, g := range all {
		switch {
		case g.ours:
			ours = append(ours, g)
		case !service && !g.pod:
			return nil, node.Hintf(fmt.Sprintf("take it from what supervises it, kill %d, then tidewaiter uninstall again", g.pid),
				"the gate runs on, as process %d, and refuses what it refused: it runs %s, which is not %s, so that it is not ended here", g.pid, g.program, i.Program)
		}
	}
	if service || !i.Exists(path.Join(i.RunDir, "instances")) {
		return ours, nil
	}
	if n, err := i.Gates(); err != nil || n > len(all) {
		return nil, node.Hintf("run this on the host and not in a container, or end the gate by what supervises it, then tidewaiter uninstall again",
			"a gate runs on, and refuses what it refused: its process cannot be seen from here")
	}
	return ours, nil
}

// end ends a gate. Its program is gone by then, so that nothing starts it again.
func (i *Installation) end(ctx context.Context, g gateProcess) error {
	still := func() (bool, error) {
		all, err := i.gates()
		for _, other := range all {
			if other.pid == g.pid && other.ours {
				return true, nil
			}
		}
		return false, err
	}
	p, err := os.FindProcess(g.pid) // by a descriptor, so that it stays this process
	if err != nil {
		return nil // it ended
	}
	defer p.Release()
	if there, err := still(); err != nil || !there {
		return err
	}
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return node.Hintf(fmt.Sprintf("kill %d", g.pid), "the gate runs on, as process %d, and cannot be ended: %w", g.pid, err)
	}
	for end := i.Now().Add(i.patience()); ; {
		there, err := still()
		switch {
		case err != nil:
			return err
		case !there:
			i.Say("did", "ended the gate: process %d", g.pid)
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !i.Now().Before(end):
			return node.Hintf(fmt.Sprintf("kill -9 %d", g.pid), "the gate runs on, as process %d, and refuses what it refused: it does not end within %s", g.pid, i.patience())
		}
		i.Sleep(ctx, 250*time.Millisecond)
	}
}
