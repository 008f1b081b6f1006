//go:build linux

// Command demo tells what Tidewaiter does, on a real containerd of its own: what
// starts, what does not and why, and what happens when the mirror or Tidewaiter
// itself is gone. Each step is checked, and a wrong outcome is an error. Nothing
// outside a directory below /tmp is changed, and that is gone at the end.
//
//	cd test && go run ./demo -containerd 2.4.2
//
// Exit status: 0 all as expected; 1 something was not, or it was interrupted; 2
// it cannot be run here.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
)

func main() {
	version := flag.String("containerd", node.Containerd24, "version of containerd to run, 2.x.y")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	if !strings.HasPrefix(strings.TrimPrefix(*version, "v"), "2.") {
		fmt.Fprintf(os.Stderr, "demo: -containerd %s: want a release 2.x.y, such as %s or %s\n", *version, node.Containerd24, node.Containerd23)
		os.Exit(2)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: containerd and its containers need root: run this as root, with go in root's PATH")
		os.Exit(2)
	}
	if _, err := exec.LookPath("go"); err != nil {
		fmt.Fprintln(os.Stderr, "demo: the go command builds what is run here, and it is not in PATH")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *version, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run builds what is missing, tells the story and cleans up, also after an error
// and when ctx ends.
func run(ctx context.Context, version string, out io.Writer) error {
	// A build of a tool says so itself; this one is silent and takes a minute on a
	// machine that never built it.
	if _, err := node.FindTools(ctx, version, out); err != nil {
		return interrupted(ctx, err, "no node was started")
	}
	fmt.Fprintln(out, "building tidewaiter from this tree (about a minute the first time)")
	binary, err := node.BuildTidewaiter(ctx)
	if err != nil {
		return interrupted(ctx, err, "no node was started")
	}

	begin := time.Now()
	// Far more than a slow machine needs: this is for what hangs.
	limited, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	n, err := node.Start(limited, node.Options{ContainerdVersion: version, Required: true, Log: out})
	if err != nil {
		return interrupted(ctx, fmt.Errorf("starting containerd: %w", err), "what was started is stopped")
	}
	t := &teller{out: out, node: n, binary: binary, running: map[string]string{}}
	told := t.tell(limited)
	if told != nil {
		told = fmt.Errorf("step %d: %w", t.step, told) // 0 is what comes before the first
	}
	if told != nil && ctx.Err() == nil && t.gate != nil {
		told = fmt.Errorf("%w\nTidewaiter's log ended with:\n%s", told, tail(t.gate.Log(), 12))
	}

	err = n.Stop()
	if t.mirror != nil {
		err = errors.Join(err, t.mirror.Stop())
	}
	left, look := leftovers(n.Dir)
	if err = errors.Join(err, look); err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	if err != nil {
		return errors.Join(told, fmt.Errorf("cleaning up: %w", err))
	}
	if told != nil {
		return interrupted(ctx, told, "nothing is left running")
	}
	fmt.Fprintf(out, "\n%d steps, all as expected, %d s; nothing is left running.\n",
		t.step, int(time.Since(begin).Round(time.Second).Seconds()))
	return nil
}

// interrupted says what became of things, and that it was the user who ended
// them rather than what the end of ctx did to the call that was under way.
func interrupted(ctx context.Context, err error, what string) error {
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted; %s", what)
	}
	return fmt.Errorf("%w\n%s", err, what)
}

// tail returns the last lines of s.
func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
