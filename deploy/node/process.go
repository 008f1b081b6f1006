package node

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A Process is the containerd that runs.
type Process struct {
	PID      int
	Program  string    // that it runs, as it calls it; empty: it cannot be seen from here
	Replaced bool      // its program's file is another one by now, or gone
	Config   string    // that it was started with; empty: the usual one
	Started  time.Time // to a hundredth of a second, by the node's clock as it is now
	// Listens is when it made its socket, some seconds after it was started, by the node's
	// clock as it was then: where that is far from Started the clock was set since. Zero:
	// not known.
	Listens time.Time
}

// ErrUnseen is of a process that is not in this one's PID namespace: this is a container.
var ErrUnseen = errors.New("the process behind it cannot be seen from here: run this on the host")

// Running is the process that listens on containerd's socket. now is the time.
func (h *Host) Running(now time.Time) (*Process, error) {
	pid, err := Listener(h.Path(h.Socket))
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, ErrUnseen
	}
	p, err := process("/proc", pid, now)
	if err == nil {
		if info, err := os.Stat(h.Target(h.Socket)); err == nil {
			p.Listens = changed(info)
		}
	}
	return p, err
}

// Listener is the process that listens on a unix socket; 0: one that has no number
// here, since it is not in this process's PID namespace.
func Listener(socket string) (pid int, err error) {
	c, err := net.DialTimeout("unix", socket, dialTime)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return listener(c.(*net.UnixConn))
}

const dialTime = 5 * time.Second

// Adopt makes h the host of the containerd that runs: what was started counts more
// than where it usually is. o is what the caller said and is not changed.
func (h *Host) Adopt(p *Process, o Options) {
	if o.Config == "" && p.Config != "" && p.Config != h.Config {
		h.Config, h.Source, h.Extends = p.Config, "", false
		h.DropIns = path.Join(path.Dir(p.Config), "conf.d")
	}
	if o.Binary != "" || p.Program == "" || p.Replaced {
		return
	}
	// What the process calls so may be another file here: it has a root of its own.
	its, err := os.Stat(filepath.Join("/proc", strconv.Itoa(p.PID), "exe"))
	if err != nil {
		return
	}
	if ours, err := os.Stat(h.Path(p.Program)); err == nil && os.SameFile(its, ours) {
		h.Binary = p.Program
	}
}

// ticks is USER_HZ, which is 100 on every machine of Linux that Go runs on.
const ticks = 100

func process(proc string, pid int, now time.Time) (*Process, error) {
	at := func(name string) string { return filepath.Join(proc, strconv.Itoa(pid), name) }
	p := &Process{PID: pid}
	if exe, err := os.Readlink(at("exe")); err == nil {
		p.Program, p.Replaced = strings.CutSuffix(exe, " (deleted)")
	}
	raw, err := os.ReadFile(at("cmdline"))
	if err != nil {
		return nil, err
	}
	p.Config = configOf(strings.Split(string(bytes.TrimRight(raw, "\x00")), "\x00"))
	if cwd, err := os.Readlink(at("cwd")); err == nil && p.Config != "" && !path.IsAbs(p.Config) {
		p.Config = path.Join(cwd, p.Config)
	}
	stat, err := os.ReadFile(at("stat"))
	if err != nil {
		return nil, err
	}
	uptime, err := os.ReadFile(filepath.Join(proc, "uptime"))
	if err != nil {
		return nil, err
	}
	age, err := ageOf(string(stat), string(uptime))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", at("stat"), err)
	}
	p.Started = now.Add(-age)
	return p, nil
}

// configOf finds containerd's --config.
func configOf(args []string) string {
	for i, a := range args {
		for _, name := range []string{"--config", "-config", "-c", "--c"} {
			if a == name && i+1 < len(args) {
				return args[i+1]
			}
			if v, is := strings.CutPrefix(a, name+"="); is {
				return v
			}
		}
	}
	return ""
}

// ageOf is how long a process runs, from proc(5): field 22 of its stat, behind a name
// that may hold anything, is when it started, in ticks since boot.
func ageOf(stat, uptime string) (time.Duration, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	up := strings.Fields(uptime)
	if len(fields) < 20 || len(up) == 0 {
		return 0, errors.New("not as proc(5) says")
	}
	started, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return 0, err
	}
	seconds, err := strconv.ParseFloat(up[0], 64)
	if err != nil {
		return 0, err
	}
	return time.Duration(seconds*float64(time.Second)) - time.Duration(started)*time.Second/ticks, nil
}
