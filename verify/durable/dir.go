package durable

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strconv"
)

// A Dir changes files below a root, and syncs the directories of many changes at once.
// Names are those of [os.Root], with slashes. It is not safe for concurrent use, and the
// only writer: it takes the names of unfinished files of another for its own.
type Dir struct {
	Root *os.Root

	serial  int             // numbers unfinished files
	renamed map[string]bool // directories in which names have changed that may not last yet
}

// NewDir returns a Dir below root, which the caller closes.
func NewDir(root *os.Root) *Dir { return &Dir{Root: root, renamed: map[string]bool{}} }

// Put replaces the file of that name, with mode 0600. It makes the directory of name if
// that has a parent. The bytes last when Put returns, the name after [Dir.Sync].
func (d *Dir) Put(name string, raw []byte) error {
	parent := path.Dir(name)
	if err := d.Mkdir(parent); err != nil {
		return err
	}
	d.serial++
	temp := path.Join(parent, Unfinished+strconv.Itoa(d.serial))
	if err := d.Root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := d.Root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = fill(f, Bytes(raw, 0o600), true); err == nil {
		crossed()
		d.renamed[parent] = true
		err = d.Root.Rename(temp, name)
	}
	if err != nil {
		_ = d.Root.Remove(temp)
	}
	crossed()
	return err
}

// Mkdir makes a directory of mode 0700 whose parent is there, unless there is one. Its
// name lasts after [Dir.Sync].
func (d *Dir) Mkdir(name string) error {
	if name == "." {
		return nil
	}
	err := d.Root.Mkdir(name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		d.renamed[path.Dir(name)] = true
	}
	return err
}

// Sync makes the changes of names last. What fails is tried again by the next call.
func (d *Dir) Sync() error {
	for name := range d.renamed {
		f, err := d.Root.Open(name)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return err
		}
		delete(d.renamed, name)
	}
	return nil
}
