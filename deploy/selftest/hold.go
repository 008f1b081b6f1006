package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

// To see what containerd does without the gate, the gate must be away. Of what there
// is, it is stopped (SIGSTOP) and continued: it loses nothing that it knows, its
// service is not asked for anything, and nothing needs to be started again. While it
// is stopped every creation on the node is refused. That it goes on does not depend on
// this process: a second one, of a process group of its own, continues it as soon as
// this one ends, however it ends, and at the latest after guardTime.

// guardTime is the longest that a gate is stopped.
const guardTime = 45 * time.Second

// hold stops the process pid. The function that it returns continues it; it may be
// called twice.
func hold(ctx context.Context, pid int, guard func(ctx context.Context, pid int) *exec.Cmd) (release func() error, err error) {
	cmd := guard(context.WithoutCancel(ctx), pid)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	alive, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	end := func() error {
		alive.Close()
		return cmd.Wait() // which has continued the gate
	}
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		return nil, errors.Join(fmt.Errorf("the process that would continue the gate does not start: %w", err), end())
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return nil, errors.Join(err, end())
	}
	if err := stopped(ctx, pid); err != nil {
		return nil, errors.Join(err, syscall.Kill(pid, syscall.SIGCONT), end())
	}
	return func() error {
		err := syscall.Kill(pid, syscall.SIGCONT)
		if cmd.ProcessState == nil {
			err = errors.Join(err, end())
		}
		return err
	}, nil
}

// stopped waits until a process is stopped. The kernel ignores SIGSTOP for
// the first process of a PID namespace if the sender is in the same namespace
// (signal(7), pid_namespaces(7)), as kubectl exec in the gate's pod is.
func stopped(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	for {
		state, err := stateOf(pid)
		if err != nil {
			return err
		}
		if state == 'T' {
			return nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("process %d does not stop (state %c): if this is the gate's own pod, run selftest --absent on the host, with the same program", pid, state)
		}
	}
}

// stopTime is how long a process may take to stop.
const stopTime = time.Second

// stateOf reads the state of a process from its stat file (proc_pid_stat(5)): the field
// after the name, which is in parentheses and may contain any character.
func stateOf(pid int) (byte, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 || i+2 >= len(raw) {
		return 0, fmt.Errorf("/proc/%d/stat has no state", pid)
	}
	return raw[i+2], nil
}

// Guard continues a process as soon as alive ends, and after 45 seconds. It says on
// ready that it is there.
func Guard(pid int, alive io.Reader, ready io.Writer) error {
	if _, err := ready.Write([]byte{'\n'}); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { // ends with the process, at the latest
		_, _ = io.Copy(io.Discard, alive)
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(guardTime):
	}
	return syscall.Kill(pid, syscall.SIGCONT)
}

// Self is the command of a guard: this program again.
func Self(ctx context.Context, pid int) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "selftest", "--guard", strconv.Itoa(pid))
	cmd.Stderr = os.Stderr
	return cmd
}
