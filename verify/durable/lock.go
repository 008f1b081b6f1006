package durable

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ErrLocked reports that another open file has the lock.
var ErrLocked = errors.New("another process holds the lock")

// lockInterval is the time between two tries to get a lock.
const lockInterval = 20 * time.Millisecond

// TryLock takes the exclusive lock of f, a file or a directory. It lasts until the last
// descriptor of this opening is closed, at the latest when the process ends. It is
// advisory, and of no use on a network file system. The error is ErrLocked if another
// opening has it, in this process or another one.
func TryLock(f *os.File) error { return flock(f, syscall.LOCK_EX) }

// TryShared takes the shared lock of f, which fails with ErrLocked as long as somebody
// has the exclusive one. It serves to find out whether the owner of f still runs: two
// that ask at the same time do not take each other for the owner.
func TryShared(f *os.File) error { return flock(f, syscall.LOCK_SH) }

// Lock is TryLock, tried again until ctx ends. The error then wraps ErrLocked and that of
// ctx.
func Lock(ctx context.Context, f *os.File) error {
	var tick *time.Ticker
	for {
		err := TryLock(f)
		if !errors.Is(err, ErrLocked) {
			return err
		}
		if tick == nil {
			tick = time.NewTicker(lockInterval)
			defer tick.Stop()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w: %w", f.Name(), ErrLocked, ctx.Err())
		case <-tick.C:
		}
	}
}

func flock(f *os.File, how int) error {
	for {
		switch err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); {
		case err == nil:
			return nil
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EWOULDBLOCK):
			return ErrLocked
		default:
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// CreateLocked makes the file at beside, locks it, writes raw to it, and gives it the
// name path. So no one finds it under path without its lock. It is not synced: the lock
// ends with the process. The caller closes the file.
func CreateLocked(beside, path string, flags int, raw []byte) (*os.File, error) {
	f, err := os.OpenFile(beside, os.O_CREATE|os.O_EXCL|flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err = TryLock(f); err == nil {
		if _, err = f.Write(raw); err == nil {
			err = os.Rename(beside, path)
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(beside))
	}
	return f, nil
}
