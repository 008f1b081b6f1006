// Package control is the door that a running gate has for the tools of its node: a
// unix socket in the run directory, for root alone, that answers how things stand.
// It only answers: nothing that comes in through it changes a decision.
// docs/control.md describes it.
//
// The gate does not depend on it. What goes wrong here is logged and tried again.
package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// SocketName is the name of the socket in the run directory.
const SocketName = "tidewaiter.sock"

const (
	again    = 15 * time.Second // between two tries to open the socket
	patience = 2 * time.Second  // with another instance that holds the lock
	first    = ".new.sock"      // the name that a socket has at first
	maxPath  = 107              // bytes of a socket's path, by the kernel
)

// A Socket keeps the control socket in a run directory. Two instances may share the
// directory: the one that started last has the path.
type Socket struct {
	Dir     string
	Handler http.Handler
	Log     *slog.Logger
}

// Run serves until ctx ends, with nil. Where the socket cannot be opened it says so,
// once for each reason, and tries again every 15 seconds.
func (s *Socket) Run(ctx context.Context) error {
	said := ""
	for ctx.Err() == nil {
		err := s.serve(ctx)
		if err == nil {
			return nil
		}
		if err.Error() != said {
			said = err.Error()
			s.Log.Warn("no control socket: tidewaiter status cannot ask this gate, which decides all the same",
				"error", said, "next", "make "+s.Dir+" a directory of the gate's own user with mode 0700, or name another with --run-dir")
		}
		wait(ctx, again)
	}
	return nil
}

// wait waits for d, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// serve returns nil when ctx ended, and an error where it cannot serve.
func (s *Socket) serve(ctx context.Context) error {
	if err := MakeDir(s.Dir); err != nil {
		return err
	}
	l, err := s.take(ctx)
	if err != nil {
		return err
	}
	defer s.leave(l)
	s.Log.Debug("control socket", "path", l.path)
	// Whoever may ask at all is known before a byte is read.
	return Serve(ctx, &trusted{Listener: l, log: s.Log}, s.Handler)
}

// MakeDir makes dir for this user alone where there is none, and refuses one that
// somebody else could put a socket into.
func MakeDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("run directory: %w", err)
	}
	i, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	owner, known := i.Sys().(*syscall.Stat_t)
	switch {
	case !i.IsDir():
		return fmt.Errorf("run directory: %s is not a directory", dir)
	case !known || int(owner.Uid) != os.Geteuid():
		return fmt.Errorf("run directory: %s does not belong to the user of this process (%d)", dir, os.Geteuid())
	case i.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("run directory: others can write to %s, whose mode is %04o", dir, i.Mode().Perm())
	}
	return nil
}

// A listener is one whose socket has a path.
type listener struct {
	*net.UnixListener
	path string
	file fs.FileInfo
	held *os.File // keeps the socket, so that no other file gets its inode number
}

// take makes a socket that is whole before it has its path: for whoever connects
// there is always the old one or the new one, also where a crash left one.
func (s *Socket) take(ctx context.Context) (_ *listener, err error) {
	unlock, err := lock(ctx, s.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l := &listener{path: filepath.Join(s.Dir, SocketName)}
	if len(l.path) > maxPath {
		return nil, fmt.Errorf("control socket: %s is longer than the %d bytes that a socket's path may have", l.path, maxPath)
	}
	first := filepath.Join(s.Dir, first)
	os.Remove(first) // what a crash left; nobody is at it, since the lock is held
	l.UnixListener, err = net.ListenUnix("unix", &net.UnixAddr{Name: first, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer func() {
		if err != nil {
			l.Close()
			os.Remove(first)
		}
	}()
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(first, 0o600); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if l.file, err = os.Lstat(first); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err = os.Rename(first, l.path); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if l.held, err = l.File(); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// leave removes the path if it is still that of l.
func (s *Socket) leave(l *listener) {
	defer l.held.Close()
	defer l.Close()
	unlock, err := lock(context.Background(), s.Dir)
	if err != nil {
		return // what is left behind, the next start replaces
	}
	defer unlock()
	if i, err := os.Lstat(l.path); err == nil && os.SameFile(i, l.file) {
		os.Remove(l.path)
	}
}

// lock takes the lock of dir, which instances that come and go hold for as long as
// they look at the path and change it. It waits for two seconds at most.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := durable.Lock(ctx, d); err != nil {
		d.Close()
		return nil, fmt.Errorf("run directory: lock %s: %w", dir, err)
	}
	return func() { d.Close() }, nil
}

// trusted hands over connections of root and of this user. The file's mode and the
// directory's keep all others out already.
type trusted struct {
	net.Listener
	log *slog.Logger
}

func (t *trusted) Accept() (net.Conn, error) {
	for {
		c, err := t.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if err := trust(c); err != nil {
			t.log.Warn("control socket: a connection was closed", "error", err.Error())
			c.Close()
			continue
		}
		return c, nil
	}
}

// trust fails unless the process at the other end of c is root's or this user's.
func trust(c net.Conn) error {
	u, is := c.(*net.UnixConn)
	if !is {
		return errors.New("not a unix socket")
	}
	uid, _, err := Peer(u)
	if err != nil {
		return fmt.Errorf("whose process is at the other end is not known: %w", err)
	}
	return admit(uid)
}

func admit(uid int) error {
	if uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("the process at the other end is that of user %d", uid)
	}
	return nil
}
