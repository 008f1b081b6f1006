package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A Change is a file that is to be written, or with nil New removed.
type Change struct {
	Path string // of the host
	Mode fs.FileMode
	New  []byte
	Old  []byte // nil: it is not there
	Why  string

	info fs.FileInfo // of the old one; nil: it is not there
}

// change returns what makes name have the content now; none where it has it.
func (h *Host) change(name string, mode fs.FileMode, now []byte, why string) ([]Change, error) {
	c := Change{Path: name, Mode: mode, New: now, Why: why}
	info, err := os.Lstat(h.Path(name))
	switch {
	case errors.Is(err, fs.ErrNotExist) && now == nil:
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return []Change{c}, nil
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file: what it leads to is not touched", name)
	}
	if c.Old, err = os.ReadFile(h.Path(name)); err != nil {
		return nil, err
	}
	if c.Old == nil {
		c.Old = []byte{}
	}
	c.info = info
	if now != nil && bytes.Equal(c.Old, now) {
		return nil, nil
	}
	return []Change{c}, nil
}

// own is change for a file that runs as root: nobody else may own it or write to it,
// also where the content is what it should be, such as a program that was copied to its
// place by a user.
func (h *Host) own(name string, mode fs.FileMode, now []byte, why string) ([]Change, error) {
	all, err := h.change(name, mode, now, why)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		info, err := os.Lstat(h.Path(name))
		if err != nil {
			return nil, err
		}
		s, ok := info.Sys().(*syscall.Stat_t)
		if ok && int(s.Uid) == os.Geteuid() && info.Mode().Perm()&^mode == 0 {
			return nil, nil
		}
		all = []Change{{Path: name, Mode: mode, New: now, Old: now, Why: why + ", which root alone may change"}}
	}
	for k := range all {
		all[k].info = nil // whose it was does not matter, nor when it is taken back
	}
	return all, nil
}

// Apply makes changes in their order. Those that were made when one fails are undone.
// The function that it returns undoes all of them, the last first. made are the
// directories that it made, outer ones first.
func (h *Host) Apply(changes []Change) (undo func() error, made []string, err error) {
	var done []Change
	undo = func() error {
		var all error
		for _, c := range slices.Backward(done) {
			back := c
			back.New = c.Old
			if c.info != nil {
				back.Mode = c.info.Mode().Perm()
			}
			all = errors.Join(all, h.put(back))
		}
		for _, dir := range slices.Backward(made) {
			os.Remove(h.Path(dir)) // what holds something else stays
		}
		return all
	}
	for _, c := range changes {
		if c.New != nil {
			dirs, err := h.mkdir(path.Dir(c.Path))
			made = append(made, dirs...)
			if err != nil {
				return nil, nil, errors.Join(err, undo())
			}
		}
		if err := h.put(c); err != nil {
			return nil, nil, errors.Join(err, undo())
		}
		done = append(done, c)
	}
	return undo, made, nil
}

// mkdir makes a directory of the host and those that lead to it.
func (h *Host) mkdir(dir string) (made []string, err error) {
	if h.exists(dir) {
		return nil, nil
	}
	if made, err = h.mkdir(path.Dir(dir)); err != nil {
		return made, err
	}
	mode := fs.FileMode(0o755)
	if dir == "/var/lib/tidewaiter" { // as the gate makes it
		mode = 0o700
	}
	if err := os.Mkdir(h.Path(dir), mode); err != nil {
		return made, err
	}
	return append(made, dir), nil
}

// put writes or removes a file, so that a power cut leaves the old one or the new one.
// A file that was there keeps its owner.
func (h *Host) put(c Change) (err error) {
	name := h.Path(c.Path)
	dir := filepath.Dir(name)
	if c.New == nil {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(dir)
	}
	f, err := os.CreateTemp(dir, ".tidewaiter-*") // with mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(c.New); err != nil {
		return err
	}
	if c.info != nil {
		if s, ok := c.info.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(s.Uid), int(s.Gid)); err != nil {
				return err
			}
		}
	}
	if err := f.Chmod(c.Mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Show is c for a person: every byte, or for a file that is changed the lines that
// differ, or for a program its size.
func (c Change) Show() string {
	var b strings.Builder
	lines := func(mark string, raw []byte) {
		for l := range strings.Lines(string(raw)) {
			fmt.Fprintf(&b, "  %s%s\n", mark, strings.TrimSuffix(l, "\n"))
		}
	}
	switch {
	case c.New == nil:
		fmt.Fprintf(&b, "remove %s (%d bytes): %s\n", c.Path, len(c.Old), c.Why)
	case bytes.IndexByte(c.New, 0) >= 0:
		fmt.Fprintf(&b, "write %s (%04o, %d bytes): %s\n", c.Path, c.Mode.Perm(), len(c.New), c.Why)
	case c.Old == nil:
		fmt.Fprintf(&b, "write %s (%04o, %d bytes): %s\n", c.Path, c.Mode.Perm(), len(c.New), c.Why)
		lines("| ", c.New)
	default:
		fmt.Fprintf(&b, "change %s (%d to %d bytes): %s\n", c.Path, len(c.Old), len(c.New), c.Why)
		was, is := slices.Collect(strings.Lines(string(c.Old))), slices.Collect(strings.Lines(string(c.New)))
		for len(was) > 0 && len(is) > 0 && was[0] == is[0] {
			was, is = was[1:], is[1:]
		}
		for len(was) > 0 && len(is) > 0 && was[len(was)-1] == is[len(is)-1] {
			was, is = was[:len(was)-1], is[:len(is)-1]
		}
		lines("- ", []byte(strings.Join(was, "")))
		lines("+ ", []byte(strings.Join(is, "")))
	}
	return b.String()
}

// marker stands in each line that is ours in a file that is not.
const marker = "added by tidewaiter install"

// strip is raw without the lines that are ours.
func strip(raw []byte) []byte {
	var out []byte
	for l := range bytes.Lines(raw) {
		if !bytes.Contains(l, []byte(marker)) {
			out = append(out, l...)
		}
	}
	return out
}
