package node

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

	"github.com/tidewaiter/tidewaiter/verify/durable"
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

// OldMode is the mode of the file that is there, or of the new one where none is.
func (c Change) OldMode() fs.FileMode {
	if c.info == nil {
		return c.Mode
	}
	return c.info.Mode().Perm()
}

// Change returns the change that gives name the content now; none if it has it.
func (h *Host) Change(name string, mode fs.FileMode, now []byte, why string) ([]Change, error) {
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

// Own is Change for a file that runs as root: no other user may own it or write to it,
// also where the content is what it should be, such as a program that was copied to its
// place by a user.
func (h *Host) Own(name string, mode fs.FileMode, now []byte, why string) ([]Change, error) {
	all, err := h.Change(name, mode, now, why)
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
			back.Mode = c.OldMode()
			all = errors.Join(all, h.Put(back))
		}
		for _, dir := range slices.Backward(made) {
			os.Remove(h.Path(dir)) // what holds something else stays
		}
		return all
	}
	for _, c := range changes {
		if c.New != nil {
			dirs, err := h.Mkdir(path.Dir(c.Path))
			made = append(made, dirs...)
			if err != nil {
				return nil, nil, errors.Join(err, undo())
			}
		}
		if err := h.Put(c); err != nil {
			return nil, nil, errors.Join(err, undo())
		}
		done = append(done, c)
	}
	return undo, made, nil
}

// Mkdir makes a directory of the host and those that lead to it.
func (h *Host) Mkdir(dir string) (made []string, err error) {
	if h.Exists(dir) {
		return nil, nil
	}
	if made, err = h.Mkdir(path.Dir(dir)); err != nil {
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

// Put writes or removes a file, so that a power cut leaves the old one or the new one.
// A file that was there keeps its owner.
func (h *Host) Put(c Change) (err error) {
	if h.BeforeWrite != nil {
		h.BeforeWrite(c.Path)
	}
	name := h.Path(c.Path)
	if c.New == nil {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := durable.SyncDir(filepath.Dir(name)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	return durable.Replace(name, func(f *os.File) error {
		if c.info != nil {
			if s, ok := c.info.Sys().(*syscall.Stat_t); ok {
				if err := f.Chown(int(s.Uid), int(s.Gid)); err != nil {
					return err
				}
			}
		}
		return durable.Bytes(c.New, c.Mode)(f)
	})
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

// Marker stands in each line that is ours in a file that is not.
const Marker = "added by tidewaiter install"

// strip is raw without the lines that are ours.
func strip(raw []byte) []byte {
	var out []byte
	for l := range bytes.Lines(raw) {
		if !bytes.Contains(l, []byte(Marker)) {
			out = append(out, l...)
		}
	}
	return out
}
