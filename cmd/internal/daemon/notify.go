package daemon

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"
)

// A supervisor is the service manager that started this process, which is told that
// it is up and, as often as it wants to hear, that it still answers: sd_notify(3) of
// systemd. Without one all of this does nothing.
type supervisor struct {
	socket string        // empty: nobody wants to hear
	every  time.Duration // 0: nobody waits for signs of life
}

// supervised takes what the environment says of the supervisor out of it, so that no
// program started by this one speaks for it.
func supervised() supervisor {
	s := supervisor{socket: os.Getenv("NOTIFY_SOCKET")}
	if n, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64); err == nil && n > 0 {
		if pid := os.Getenv("WATCHDOG_PID"); pid == "" || pid == strconv.Itoa(os.Getpid()) {
			s.every = time.Duration(n) * time.Microsecond / 3
		}
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(name)
	}
	return s
}

func (s supervisor) tell(state string) error {
	if s.socket == "" {
		return nil
	}
	// A name that starts with @ is in the abstract namespace, for Go as for systemd.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(state))
	return err
}

// Run says that the gate is up when up is closed, and then that it answers, each time
// that answers has returned. What it calls must take the locks that an answer takes:
// a gate that is stuck is silent, and started again. It returns when ctx ends.
func (s supervisor) Run(ctx context.Context, up <-chan struct{}, answers func() string, log *slog.Logger) {
	if s.socket == "" {
		return
	}
	select {
	case <-up:
	case <-ctx.Done():
		return
	}
	say := func(state string) {
		if err := s.tell(state); err != nil {
			log.Warn("the service manager cannot be told", "error", err.Error())
		}
	}
	say("READY=1\nSTATUS=" + answers())
	if s.every > 0 {
		tick := time.NewTicker(s.every)
		defer tick.Stop()
		for ctx.Err() == nil {
			select {
			case <-tick.C:
				say("WATCHDOG=1\nSTATUS=" + answers())
			case <-ctx.Done():
			}
		}
	}
	<-ctx.Done()
	say("STOPPING=1")
}
