package daemon

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNotify is what a service manager hears of the gate.
func TestNotify(t *testing.T) {
	dir, err := os.MkdirTemp("", "tw") // short, as sockets' paths are
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hear := func() string {
		t.Helper()
		b := make([]byte, 4096)
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", "1") // another process'
	if s := supervised(); s.every != 0 || s.socket != name {
		t.Errorf("%+v", s)
	}
	if os.Getenv("NOTIFY_SOCKET")+os.Getenv("WATCHDOG_USEC")+os.Getenv("WATCHDOG_PID") != "" {
		t.Error("what this process starts could speak for it")
	}
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "30000")
	s := supervised()
	if s.every != 10*time.Millisecond {
		t.Errorf("every %s", s.every)
	}
	ctx, cancel := context.WithCancel(t.Context())
	up, stuck, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	answered := make(chan struct{}, 1000)
	go func() {
		defer close(done)
		s.Run(ctx, up, func() string {
			answered <- struct{}{}
			if len(answered) > 3 {
				<-stuck
			}
			return "audit"
		}, slog.Default())
	}()
	close(up)
	if got := hear(); got != "READY=1\nSTATUS=audit" {
		t.Errorf("%q", got)
	}
	for range 2 {
		if got := hear(); got != "WATCHDOG=1\nSTATUS=audit" {
			t.Errorf("%q", got)
		}
	}
	// A gate that is stuck is silent.
	for len(answered) < 4 {
		time.Sleep(time.Millisecond)
	}
	if err := l.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := l.Read(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes of a gate that is stuck", n)
	}
	cancel()
	close(stuck)
	last := ""
	for !strings.HasPrefix(last, "STOPPING=1") {
		last = hear()
	}
	<-done
}
