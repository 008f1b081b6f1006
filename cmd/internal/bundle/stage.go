package bundle

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
)

// Bounds of a configuration directory that is copied.
const (
	maxConfigFiles = 5000
	maxConfigBytes = 64 << 20
)

// A Staged is a configuration directory as it would be with other trust, complete and
// on the disk, beside the one in force.
type Staged struct {
	dir, next string
	there     bool     // there is one in force
	sum       [32]byte // of that, when it was copied
	inForce   bool     // they have changed places: next is what was before

	Config *config.Config // that was read from it
}

// Stage copies the configuration directory dir, puts the files of trust in the place of
// its trust policy and trust store, and reads the copy as the gate would. Where there
// is no directory yet, the trust alone is the configuration. The caller calls Commit or
// Discard.
func Stage(dir string, trust map[string][]byte) (_ *Staged, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	s := &Staged{dir: dir}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		s.dir, s.there = real, true
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if s.next, err = os.MkdirTemp(filepath.Dir(s.dir), "."+filepath.Base(s.dir)+"-next-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Discard()
		}
	}()
	c := &copying{files: maxConfigFiles, bytes: maxConfigBytes}
	if s.there {
		if s.sum, err = sumOf(s.dir); err != nil {
			return nil, err
		}
		if err := c.tree(s.dir, s.next, true); err != nil {
			return nil, err
		}
	} else if err := os.Chmod(s.next, 0o755); err != nil {
		return nil, err
	}
	for name, raw := range trust {
		if !isTrust(name) {
			return nil, fmt.Errorf("%q is no file of a trust policy or trust store", name)
		}
		at := filepath.Join(s.next, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return nil, err
		}
		if err := write(at, raw, 0o644); err != nil {
			return nil, err
		}
	}
	if err := syncTree(s.next); err != nil {
		return nil, err
	}
	if s.Config, err = config.Load(s.next); err != nil {
		return nil, fmt.Errorf("%w: with its trust the configuration would be invalid: %s", ErrRefused, strings.ReplaceAll(err.Error(), s.next, s.dir))
	}
	s.Config.Dir = s.dir
	return s, nil
}

// Commit puts it in force, and returns where the configuration is now that was before;
// empty if there was none. An error that comes after the change names that place. Both change places in one step, so that a power cut leaves
// the one or the other. It refuses where somebody has changed the configuration since
// it was copied.
func (s *Staged) Commit(now time.Time) (backup string, err error) {
	crossed()
	if !s.there {
		if err := os.Rename(s.next, s.dir); err != nil {
			return "", err
		}
		s.inForce = true
		crossed()
		return "", s.lasts(syncDir(filepath.Dir(s.dir)), "")
	}
	if sum, err := sumOf(s.dir); err != nil || sum != s.sum {
		return "", errors.Join(fmt.Errorf("%s was changed by somebody else meanwhile, and stays as it is: try again", s.dir), err)
	}
	if err := exchange(s.next, s.dir); err != nil {
		return "", fmt.Errorf("exchange %s and its successor: %w (its own directory on a file system that can, such as ext4, XFS, btrfs or tmpfs, and no mount point)", s.dir, err)
	}
	s.inForce = true
	crossed()
	if err := syncDir(filepath.Dir(s.dir)); err != nil {
		return s.next, s.lasts(err, s.next)
	}
	crossed()
	backup = s.dir + ".before-" + now.UTC().Format("20060102T150405Z")
	if _, err := os.Lstat(backup); err == nil {
		backup += "-" + strings.TrimPrefix(filepath.Base(s.next), "."+filepath.Base(s.dir)+"-next-")
	}
	if err := os.Rename(s.next, backup); err != nil {
		return s.next, s.lasts(err, s.next)
	}
	crossed()
	return backup, s.lasts(syncDir(filepath.Dir(s.dir)), backup)
}

// lasts says of an error that came after the change what holds until the power goes, and
// where what was before is.
func (s *Staged) lasts(err error, before string) error {
	if err == nil {
		return nil
	}
	was := ""
	if before != "" {
		was = ", and what was before is in " + before
	}
	return fmt.Errorf("%s has the trust of the bundle now, but perhaps not after a power cut%s: %w", s.dir, was, err)
}

// Discard removes it, unless Commit has put it in force: then nothing is removed.
func (s *Staged) Discard() {
	if !s.inForce {
		_ = os.RemoveAll(s.next)
	}
}

// sumOf is a digest of a configuration directory: of names, modes and bytes.
func sumOf(dir string) (sum [32]byte, err error) {
	h := sha256.New()
	left := copying{files: maxConfigFiles, bytes: maxConfigBytes}
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		var raw []byte
		switch {
		case info.Mode().IsRegular():
			if left.files, left.bytes = left.files-1, left.bytes-info.Size(); left.files < 0 || left.bytes < 0 {
				return fmt.Errorf("%s: more than %d files or %d MiB", dir, maxConfigFiles, maxConfigBytes>>20)
			}
			raw, err = os.ReadFile(name)
		case info.Mode()&fs.ModeSymlink != 0:
			var target string
			target, err = os.Readlink(name)
			raw = []byte(target)
		}
		fmt.Fprintf(h, "%q %o %d\n", name, info.Mode(), len(raw))
		h.Write(raw)
		return err
	})
	return [32]byte(h.Sum(nil)), err
}

// A copying copies a configuration directory.
type copying struct {
	files int
	bytes int64
}

// tree copies a directory that exists to one that exists, at the top without what is
// replaced.
func (c *copying) tree(from, to string, top bool) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if top && (isPolicy(e.Name()) || e.Name() == "truststore") {
			continue
		}
		if c.files--; c.files < 0 {
			return fmt.Errorf("%s: more than %d files", from, maxConfigFiles)
		}
		if err := c.one(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return own(to, info)
}

func (c *copying) one(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch {
	case info.Mode().IsRegular():
		if c.bytes -= info.Size(); c.bytes < 0 {
			return fmt.Errorf("%s: more than %d MiB", from, maxConfigBytes>>20)
		}
		raw, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := write(to, raw, 0o600); err != nil {
			return err
		}
		return own(to, info)
	case info.IsDir():
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		return c.tree(from, to, false)
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}
	return fmt.Errorf("%s is neither a file, a directory nor a link", from)
}

// own gives a copy the mode and the owner of what it is a copy of.
func own(name string, of fs.FileInfo) error {
	if st, ok := of.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		if err := os.Chown(name, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	return os.Chmod(name, of.Mode().Perm())
}

// write writes a new file and has it on the disk.
func write(name string, raw []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	crossed()
	return errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
}

// syncTree has the names in a directory and those below it on the disk.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			err = syncDir(name)
		}
		return err
	})
}
