// Package stage puts another configuration directory in the place of the one in force: it
// lies complete beside that, is checked there, and both change places in one step, so that
// a power cut leaves the one or the other. What was before is kept.
package stage

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

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// Bounds of a configuration directory that is copied.
const (
	maxConfigFiles = 5000
	maxConfigBytes = 64 << 20
)

// crossed is called after each step of a change on the disk, for tests.
var crossed = func() {}

// A Stage is a configuration directory as it would be, complete and on the disk, beside
// the one in force. It is not safe for concurrent use.
type Stage struct {
	dir, next string
	there     bool     // there is one in force
	sum       [32]byte // of that, when it was copied
	swapped   bool     // they have changed places: next is what was before
}

// New copies the configuration directory dir, but for what replaced names at its top, and
// writes files, by their names in it. If there is no directory yet, the files alone are
// the configuration. The caller calls Swap or Discard.
func New(dir string, replaced func(name string) bool, files map[string][]byte) (_ *Stage, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	s := &Stage{dir: dir}
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
	c := &copying{replaced: replaced, files: maxConfigFiles, bytes: maxConfigBytes}
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
	for name, raw := range files {
		if !filepath.IsLocal(name) {
			return nil, fmt.Errorf("%q is no name of a file in a configuration directory", name)
		}
		at := filepath.Join(s.next, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return nil, err
		}
		if err := create(at, raw, 0o644); err != nil {
			return nil, err
		}
	}
	return s, durable.SyncTree(s.next)
}

// Trust is New with files in the place of the trust policy and the trust store.
func Trust(dir string, files map[string][]byte) (*Stage, error) {
	for name := range files {
		if top, _, _ := strings.Cut(name, "/"); !isTrust(top) {
			return nil, fmt.Errorf("%q is no file of a trust policy or trust store", name)
		}
	}
	return New(dir, isTrust, files)
}

// isTrust reports whether name, at the top of a configuration directory, is of the trust
// policy or trust store.
func isTrust(name string) bool {
	return name == "trustpolicy.json" || name == "trustpolicy.oci.json" || name == "truststore"
}

// Check has look read the copy. In its error the copy is named as the directory in force.
func (s *Stage) Check(look func(dir string) error) error {
	if err := look(s.next); err != nil {
		return errors.New(s.named(err.Error()))
	}
	return nil
}

func (s *Stage) named(text string) string { return strings.ReplaceAll(text, s.next, s.dir) }

// Load reads the copy as the gate would. Before Swap and after it says that it is the
// configuration of the directory in force.
func (s *Stage) Load() (c *config.Config, err error) {
	err = s.Check(func(dir string) error {
		c, err = config.Load(dir)
		return err
	})
	if err != nil {
		return nil, err
	}
	c.Dir = s.dir
	for i := range c.Warnings {
		w := &c.Warnings[i]
		w.Field, w.Text = s.named(w.Field), s.named(w.Text)
	}
	return c, nil
}

// Swap puts it in force, and returns where the configuration is now that was before;
// empty if there was none. An error that comes after the change names that place. It
// refuses where somebody has changed the configuration since
// it was copied.
func (s *Stage) Swap(now time.Time) (backup string, err error) {
	crossed()
	if s.there {
		if sum, err := sumOf(s.dir); err != nil || sum != s.sum {
			return "", errors.Join(fmt.Errorf("%s was changed by somebody else meanwhile, and stays as it is: try again", s.dir), err)
		}
	}
	s.swapped, err = Swap(s.next, s.dir, s.there)
	switch {
	case !s.swapped:
		return "", err
	case !s.there:
		return "", s.lasts(err, "")
	case err != nil:
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
	s.next = backup
	crossed()
	return backup, s.lasts(durable.SyncDir(filepath.Dir(s.dir)), backup)
}

// Undo puts back what was before Swap, and removes what that put in force.
func (s *Stage) Undo() error {
	if !s.swapped {
		return nil
	}
	if s.there {
		if err := durable.Exchange(s.next, s.dir); err != nil {
			return fmt.Errorf("exchange %s and %s: %w", s.next, s.dir, err)
		}
	} else if err := os.Rename(s.dir, s.next); err != nil {
		return err
	}
	s.swapped = false
	crossed()
	return errors.Join(durable.SyncDir(filepath.Dir(s.dir)), os.RemoveAll(s.next))
}

// lasts says of an error that came after the change what holds until the power goes, and
// where what was before is.
func (s *Stage) lasts(err error, before string) error {
	if err == nil {
		return nil
	}
	was := ""
	if before != "" {
		was = ", and what was before is in " + before
	}
	return fmt.Errorf("%s is the new one now, but perhaps not after a power cut%s: %w", s.dir, was, err)
}

// Discard removes it, unless Swap has put it in force: then nothing is removed.
func (s *Stage) Discard() {
	if !s.swapped {
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
	replaced func(name string) bool // at the top
	files    int
	bytes    int64
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
		if top && c.replaced(e.Name()) {
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
		if err := create(to, raw, 0o600); err != nil {
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

// create makes a file of the copy.
func create(name string, raw []byte, mode fs.FileMode) error {
	crossed()
	return durable.Create(name, mode, durable.Bytes(raw, mode))
}
