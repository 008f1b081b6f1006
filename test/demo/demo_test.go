//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// needRoot skips what starts a node. TestMain has said so loudly.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a node needs root")
	}
}

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: the tests of test/demo that start a node: a node needs root")
	}
	os.Exit(m.Run())
}

func TestRun(t *testing.T) {
	needRoot(t)
	for _, version := range node.Versions(node.Containerd24, node.Containerd23) {
		t.Run(version, func(t *testing.T) {
			var out bytes.Buffer
			if err := run(t.Context(), version, &out); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			if !strings.Contains(out.String(), "\n8 steps, all as expected, ") {
				t.Errorf("no summary:\n%s", out.String())
			}
		})
	}
}

// TestRunInterrupted ends the story at a few points of it.
func TestRunInterrupted(t *testing.T) {
	needRoot(t)
	for _, at := range []string{"building tidewaiter", "\n1.", "\n3.", "\n7.", "kill -KILL"} {
		t.Run(strings.TrimSpace(at), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			err := run(ctx, node.Containerd24, &trigger{at: at, do: cancel})
			if err == nil || !strings.HasPrefix(err.Error(), "interrupted; no") {
				t.Errorf("got %v, want it interrupted", err)
			}
		})
	}
}

// A trigger does something when a text is written.
type trigger struct {
	at   string
	do   func()
	text strings.Builder
}

func (w *trigger) Write(b []byte) (int, error) {
	if n, err := w.text.Write(b); err != nil {
		return n, err
	}
	if strings.Contains(w.text.String(), w.at) {
		w.do()
	}
	return len(b), nil
}

// TestWrongOutcome expects after the story what is not so.
func TestWrongOutcome(t *testing.T) {
	needRoot(t)
	if _, err := node.FindTools(t.Context(), node.Containerd24, t.Output()); err != nil {
		t.Fatal(err)
	}
	binary, err := node.BuildTidewaiter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	n, err := node.Start(ctx, node.Options{Required: true, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Stop()
	d := &teller{out: t.Output(), node: n, binary: binary, running: map[string]string{}}
	if err := d.tell(ctx); err != nil {
		t.Fatal(err)
	}
	defer d.mirror.Stop()
	if left, err := leftovers(n.Dir); err != nil || len(left) < 10 {
		t.Errorf("a running node leaves traces to look for, found %q, %v", left, err)
	}

	const good, bad = host + "/shop:1", host + "/unsigned:1"
	for _, tt := range []struct {
		err  error
		want string
	}{
		{d.starts(ctx, bad, "who am I?"), "was expected to start, and was refused: "},
		{d.starts(ctx, good, "something else"), `was expected to say "something else", and said "welcome to the shop"`},
		{d.refused(ctx, bad, once, verify.SignerUntrusted), "was expected to be refused with SIGNER_UNTRUSTED, and the answer was: "},
		{d.refusedByContainerd(ctx, bad), "was expected to be refused with required plugin "},
		{d.refused(ctx, good, once, verify.SignatureMissing), "was expected to be refused, and its container "},
		{d.checkState(ctx), "containers were expected to be "},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("got %v, want %q", tt.err, tt.want)
		}
	}
}

func TestLeftovers(t *testing.T) {
	dir, err := os.MkdirTemp("", "tw-left-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	cmd := exec.Command("sh", "-c", "read line; :", dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	left, err := leftovers(dir)
	if err != nil || len(left) != 3 {
		t.Errorf("found %q, %v; want the directory, the process and the socket", left, err)
	}
	stdin.Close()
	_ = cmd.Wait()
	socket.Close()
	os.RemoveAll(dir)
	if left, err := leftovers(dir); err != nil || len(left) > 0 {
		t.Errorf("found %q, %v; want nothing", left, err)
	}
}

func TestWrap(t *testing.T) {
	got := wrap("aa bb  cccccccc\ndd e", 5)
	if strings.Join(got, "|") != "aa bb|cccccccc|dd e" {
		t.Errorf("got %q", got)
	}
}
