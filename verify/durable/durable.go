// Package durable changes files so that a crash or a power cut leaves either the state
// before or the state after, and holds the locks that keep two processes apart.
//
// A change lasts when the call returns: the bytes are synced before they get their name,
// and the directory after. What a crash leaves besides begins with [Unfinished].
//
// It imports nothing else of this module. The functions are safe for concurrent use; two
// writers of one name need a lock, and the later one wins without. [Exchange] works on
// Linux alone. On macOS, Sync asks the drive to write its cache (F_FULLFSYNC), and flock
// and rename behave as on Linux; on no system does a drive that lies about its cache
// keep the promise.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Unfinished begins the names of files that are being written. The owner of a directory
// may remove them while no one writes.
const Unfinished = ".unfinished-"

// crossed is called after each step of a change, for tests.
var crossed = func() {}

// Replace has write fill a new file beside name, with mode 0600 unless write changes it,
// and gives it the name. A link at name is replaced, not followed. If it fails, name is
// as before; only if the last sync fails, name is new and may be old after a power cut.
func Replace(name string, write func(*os.File) error) error {
	dir := filepath.Dir(name)
	if err := replace(dir, name, write, true); err != nil {
		return err
	}
	return SyncDir(dir)
}

// ReplaceVolatile is [Replace] without syncing: for files that are of no use after a
// reboot, or that are written too often for flash. Readers see the old file or the new
// one, and a crash of the process leaves one of them; a power cut may leave neither.
func ReplaceVolatile(name string, write func(*os.File) error) error {
	return replace(filepath.Dir(name), name, write, false)
}

func replace(dir, name string, write func(*os.File) error, lasts bool) error {
	f, err := os.CreateTemp(dir, Unfinished+"*")
	if err != nil {
		return err
	}
	if err = fill(f, write, lasts); err == nil {
		crossed()
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return err
	}
	crossed()
	return nil
}

// fill has write fill f, and closes it.
func fill(f *os.File, write func(*os.File) error, lasts bool) error {
	err := write(f)
	crossed()
	if err == nil && lasts {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Create has write fill a new file of that name. It fails with fs.ErrExist if there is
// one. A crash may leave a part of it, and its name lasts only after [SyncDir] or
// [SyncTree]: it is for files in a directory that gets its own name later.
func Create(name string, mode fs.FileMode, write func(*os.File) error) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	err = fill(f, write, true)
	crossed()
	return err
}

// Bytes writes raw, and sets the mode whatever the umask is.
func Bytes(raw []byte, mode fs.FileMode) func(*os.File) error {
	return func(f *os.File) error {
		if _, err := f.Write(raw); err != nil {
			return err
		}
		return f.Chmod(mode)
	}
}

// Rename gives what is at old the name new, in the same directory or another one on the
// same file system. It lasts when Rename returns.
func Rename(old, new string) error {
	if err := os.Rename(old, new); err != nil {
		return err
	}
	crossed()
	return syncBoth(old, new)
}

// Exchange has what is at a and at b change places in one step, on Linux and where the
// file system can (ext4, XFS, btrfs, tmpfs do; a mount point cannot move). Elsewhere the
// error is errors.ErrUnsupported, and nothing has changed. The new places last only after
// [SyncDir] of both directories, so that the caller can tell a failed exchange from a
// failed sync.
func Exchange(a, b string) error {
	err := exchange(a, b)
	crossed()
	return err
}

// syncBoth syncs the directories of two names, once if it is one.
func syncBoth(a, b string) error {
	if err := SyncDir(filepath.Dir(a)); err != nil || filepath.Dir(a) == filepath.Dir(b) {
		return err
	}
	return SyncDir(filepath.Dir(b))
}

// SyncDir makes the names in a directory last.
func SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// SyncTree makes the names in a directory and in those below it last.
func SyncTree(dir string) error {
	return filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			err = SyncDir(name)
		}
		return err
	})
}
