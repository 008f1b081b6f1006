package nri

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// An Instance is this process among the gates that run on this node: a locked
// file in a directory that all of them share. The kernel drops the lock with the
// process, however that ends, so that a file whose lock can be had belongs to
// nobody. Names are not process IDs alone: two containers may both have 1.
//
// It is how a [Session] tells a gate of ours, of which two run during an upgrade,
// from another plugin that registered under our name. It is safe for concurrent
// use.
type Instance struct {
	dir  string
	name string
	file *os.File
}

// maxInstances bounds how many files of the directory are looked at.
const maxInstances = 256

// Join makes dir where there is none, for root alone, and registers this process
// in it. Join before the Session runs and Leave after: a gate must be counted for
// as long as the runtime may list it.
func Join(dir string) (*Instance, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("register this instance: %w", err)
	}
	name := strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(rand.Text())
	path := filepath.Join(dir, name)
	// Locked before it has the name that others count by: they would take it for one
	// that an ended instance left.
	beside := filepath.Join(dir, "."+name)
	f, err := durable.CreateLocked(beside, path, os.O_RDWR, nil)
	if err != nil {
		return nil, fmt.Errorf("register this instance: %w", err)
	}
	return &Instance{dir, name, f}, nil
}

// Live counts the instances that run, this one included, and removes what ended
// ones left. It reads the directory.
func (i *Instance) Live() (int, error) {
	d, err := os.Open(i.dir)
	if err != nil {
		return 0, fmt.Errorf("count instances: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(maxInstances)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("count instances: %w", err)
	}
	live := 1
	for _, name := range names {
		if name == i.name || strings.HasPrefix(name, ".") {
			continue
		}
		held, err := held(filepath.Join(i.dir, name))
		if err != nil {
			return 0, fmt.Errorf("count instances: %w", err)
		}
		if held {
			live++
		}
	}
	return live, nil
}

// held reports whether a process holds the file, and removes it if not.
func held(path string) (bool, error) {
	if s, err := os.Lstat(path); err == nil && !s.Mode().IsRegular() {
		return false, nil // not ours, nor is it to be removed
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	// A shared lock, so that of two that count neither takes the other for an owner.
	switch err := durable.TryShared(f); {
	case errors.Is(err, durable.ErrLocked):
		return true, nil
	case err != nil:
		return false, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return false, nil
}

// Leave ends the registration.
func (i *Instance) Leave() error {
	err := os.Remove(filepath.Join(i.dir, i.name))
	return errors.Join(err, i.file.Close())
}
