package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// GateOptions say how Tidewaiter is started.
type GateOptions struct {
	ConfigDir string // required, as the node calls it; WriteConfig makes one

	NodeName string // empty means "test-node"

	// StateDir is what the gate keeps over a restart, as the node calls it. Empty
	// means a new directory of this gate alone, so that it knows nothing of those
	// before.
	StateDir string

	// Binary is what BuildTidewaiter returned, or another program. Empty builds it.
	Binary string

	Args []string // after those that the options above make
	Env  []string // more than the environment of this process

	// Shell is what sh runs in the process before it becomes the gate: "ulimit -n 64",
	// or "exec 2>/full/log" for a log that Lines does not have.
	Shell string

	// Memory limits what the gate may occupy, in bytes, by a cgroup that it shares
	// with other gates of the node that have a limit. The kernel kills what needs
	// more. Zero is no limit.
	Memory int64
}

// A Gate is Tidewaiter as a process of its own, connected to a node.
type Gate struct {
	ConfigDir string
	PID       int

	process *process
	read    chan struct{} // closed when its standard error has ended

	mu    sync.Mutex
	lines []Line
	more  chan struct{} // closed and replaced with each line
}

// A Line is a line that the gate logged. One that is no JSON object has only Raw.
type Line struct {
	Time   time.Time
	Level  string
	Msg    string
	Fields map[string]any // everything else
	Raw    string
}

// Registered reports whether a line says that the runtime has taken the gate in.
func Registered(l Line) bool { return l.Msg == "registered" }

// RunDir is the run directory that all gates of the node share: their control
// socket is there.
func (n *Node) RunDir() string { return n.Path(n.inside("run")) }

// StartGate starts Tidewaiter on the node. It does not wait: see WaitRegistered.
// The node's Stop ends it. ctx is for building the program.
func (n *Node) StartGate(ctx context.Context, o GateOptions) (*Gate, error) {
	if o.ConfigDir == "" {
		return nil, errors.New("gate: no configuration directory")
	}
	if o.Binary == "" {
		bin, err := BuildTidewaiter(ctx)
		if err != nil {
			return nil, err
		}
		o.Binary = bin
	}
	if o.NodeName == "" {
		o.NodeName = "test-node"
	}
	if o.StateDir == "" {
		dir, err := os.MkdirTemp(n.Dir, "state-")
		if err != nil {
			return nil, err
		}
		o.StateDir = dir
	}
	args := append([]string{
		"run",
		"--config-dir", o.ConfigDir,
		"--run-dir", n.inside("run"),
		"--state-dir", o.StateDir,
		"--containerd-socket", n.inside(socketFile),
		"--nri-socket", n.inside(nriFile),
		"--node", o.NodeName,
	}, o.Args...)
	shell := o.Shell
	if o.Memory > 0 {
		procs, err := memoryCgroup(n.Dir, o.Memory)
		if err != nil {
			return nil, err
		}
		shell = fmt.Sprintf("echo $$ >%q\n%s", procs, shell)
	}
	name := o.Binary
	if shell != "" {
		name, args = "/bin/sh", append([]string{"-e", "-c", shell + "\nexec \"$@\"", "sh", o.Binary}, args...)
	}
	cmd := n.Command(context.Background(), name, args...)
	cmd.Env = append(cmd.Env, o.Env...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	g := &Gate{ConfigDir: o.ConfigDir, read: make(chan struct{}), more: make(chan struct{})}
	// A pipe of our own: Wait closes the one of StderrPipe before it is read.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped {
		err = errors.New("gate: the node is stopped")
	} else {
		g.process, err = startProcess(cmd)
	}
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	g.PID = cmd.Process.Pid
	go g.readLog(r)
	n.gates = append(n.gates, g)
	return g, nil
}

func (g *Gate) readLog(r io.ReadCloser) {
	defer close(g.read)
	defer r.Close()
	b := bufio.NewReader(r)
	for {
		raw, err := b.ReadString('\n')
		if raw != "" {
			l := decodeLine(strings.TrimSuffix(raw, "\n"))
			g.mu.Lock()
			g.lines = append(g.lines, l)
			close(g.more)
			g.more = make(chan struct{})
			g.mu.Unlock()
		}
		if err != nil {
			return
		}
	}
}

// decodeLine reads a line of slog's JSON handler.
func decodeLine(raw string) Line {
	l := Line{Raw: raw}
	if json.Unmarshal([]byte(raw), &l.Fields) != nil {
		l.Fields = nil
		return l
	}
	if t, ok := l.Fields["time"].(string); ok {
		l.Time, _ = time.Parse(time.RFC3339Nano, t)
	}
	l.Level, _ = l.Fields["level"].(string)
	l.Msg, _ = l.Fields["msg"].(string)
	delete(l.Fields, "time")
	delete(l.Fields, "level")
	delete(l.Fields, "msg")
	return l
}

// Lines returns what the gate has logged so far.
func (g *Gate) Lines() []Line {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]Line(nil), g.lines...)
}

// Mark returns how many lines the gate has logged, for Wait.
func (g *Gate) Mark() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.lines)
}

// Log returns what the gate has logged so far as text.
func (g *Gate) Log() string {
	var b strings.Builder
	for _, l := range g.Lines() {
		b.WriteString(l.Raw)
		b.WriteByte('\n')
	}
	return b.String()
}

// Wait returns the first line after the first since ones for which match is true,
// and waits for it until ctx or the gate ends; the error then has the whole log.
// What is caused after Mark is awaited with its result.
func (g *Gate) Wait(ctx context.Context, since int, match func(Line) bool) (Line, error) {
	ended := false
	for next := since; ; {
		g.mu.Lock()
		lines, more := g.lines, g.more
		g.mu.Unlock()
		for ; next < len(lines); next++ {
			if match(lines[next]) {
				return lines[next], nil
			}
		}
		if ended {
			return Line{}, fmt.Errorf("gate ended without the line: %v\n%s", g.process.err, g.Log())
		}
		select {
		case <-more:
		case <-g.read:
			<-g.process.done
			ended = true // its last lines have come since lines was read
		case <-ctx.Done():
			return Line{}, fmt.Errorf("gate did not log the line: %w\n%s", ctx.Err(), g.Log())
		}
	}
}

// WaitRegistered waits until the gate says for the first time that it is
// registered with the runtime.
func (g *Gate) WaitRegistered(ctx context.Context) error {
	_, err := g.Wait(ctx, 0, Registered)
	return err
}

// Signal sends a signal, such as SIGSTOP to make the gate hang.
func (g *Gate) Signal(sig syscall.Signal) error { return g.process.cmd.Process.Signal(sig) }

// Kill ends the gate as a crash does and waits for its end.
func (g *Gate) Kill() { g.stop(syscall.SIGKILL) }

// Stop ends the gate with SIGTERM as systemd does, with SIGKILL after 10 s, and
// waits for its end. The error is one if it did not end with status 0.
func (g *Gate) Stop() error {
	g.stop(syscall.SIGTERM)
	return g.process.err
}

func (g *Gate) stop(sig syscall.Signal) {
	g.process.stop(sig, 10*time.Second)
	<-g.read
}

// Done is closed when the gate has ended.
func (g *Gate) Done() <-chan struct{} { return g.process.done }

// Memory is what a process occupies, in bytes, as /proc/PID/status says.
type Memory struct {
	RSS  int64 // resident now
	Anon int64 // of RSS, what is not file pages
	Peak int64 // the most that RSS was
}

// Memory returns what the gate occupies.
func (g *Gate) Memory() (Memory, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.PID))
	if err != nil {
		return Memory{}, err
	}
	var m Memory
	for line := range bytes.Lines(b) {
		key, value, _ := strings.Cut(string(line), ":")
		into := map[string]*int64{"VmRSS": &m.RSS, "RssAnon": &m.Anon, "VmHWM": &m.Peak}[key]
		if into == nil {
			continue
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return Memory{}, fmt.Errorf("/proc/%d/status: %q: %w", g.PID, line, err)
		}
		*into = kb << 10
	}
	if m.RSS == 0 {
		return Memory{}, fmt.Errorf("process %d has ended", g.PID)
	}
	return m, nil
}
