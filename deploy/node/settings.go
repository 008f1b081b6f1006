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
	"time"

	"github.com/pelletier/go-toml/v2/unstable"
)

// maxImported bounds the files of one configuration of containerd.
const maxImported = 256

// A File is one that containerd's configuration consists of.
type File struct {
	Path     string    // of the host
	By       string    // the file that imports it; empty: it is the main one
	Plain    bool      // it is imported by its name, and not by a pattern: without it containerd does not start
	Changed  time.Time // its content, its name or its mode
	Settings []Setting // in their order
	Err      error     // it could not be read, and containerd starts with no such file
}

// A Setting is a value in a file of containerd's configuration.
type Setting struct {
	File   string
	Line   int
	Ours   bool     // install wrote it
	Key    []string // "plugins", "io.containerd.nri.v1.nri", "disable"
	Values []string // one, or those of an array; of numbers and the like as they are written
}

// At is where it stands, for people.
func (s Setting) At() string { return fmt.Sprintf("%s:%d", s.File, s.Line) }

// Files are those that containerd reads, in its order: what a later one says of a
// value counts, in any table (LoadConfig in cmd/containerd/server/config of 2.2.9 and
// 2.4.2). Where nothing but defaults is in force there is none. dirs are the
// directories that imports look into.
//
// What is in force is not concluded from them, but asked of containerd (Effective):
// they show which file sets it.
func (h *Host) Files() (files []File, dirs []string, err error) { return h.filesOf(h.Config) }

// filesOf is Files with another main file.
func (h *Host) filesOf(config string) (files []File, dirs []string, err error) {
	seen := map[string]bool{}
	for pending := []File{{Path: config}}; len(pending) > 0; {
		f := pending[0]
		name := f.Path
		pending = pending[1:]
		if seen[name] {
			continue
		}
		if seen[name] = true; len(files) == maxImported {
			return files, dirs, fmt.Errorf("%s imports more than %d files", config, maxImported)
		}
		info, err := os.Stat(h.Target(name))
		if errors.Is(err, fs.ErrNotExist) && name == config {
			return nil, nil, nil // containerd runs with what it has built in
		}
		f.Err = err
		if err == nil {
			f.Changed, _ = h.Changed(name)
			var imports []string
			if f.Settings, imports, f.Err = h.settings(name, info); f.Err == nil {
				more, in := h.resolve(name, imports)
				pending, dirs = append(pending, more...), append(dirs, in...)
			}
		}
		files = append(files, f)
	}
	slices.Sort(dirs)
	return files, slices.Compact(dirs), nil
}

// Changed is when a file or directory became what it is: its content or its name, and
// where it is a link, what it leads to.
func (h *Host) Changed(name string) (time.Time, error) {
	link, err := os.Lstat(h.Path(name))
	if err != nil {
		return time.Time{}, err
	}
	info, err := os.Stat(h.Target(name))
	if err != nil {
		return time.Time{}, err
	}
	if t := changed(link); t.After(changed(info)) {
		return t, nil
	}
	return changed(info), nil
}

// settings reads one file. It may be a link, unlike the files that install writes.
func (h *Host) settings(name string, info fs.FileInfo) (all []Setting, imports []string, err error) {
	if null(info) {
		return nil, nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, nil, errors.New("it is not a regular file")
	}
	if info.Size() > maxConfig {
		return nil, nil, fmt.Errorf("%w: %d bytes", errTooLong, maxConfig)
	}
	raw, err := os.ReadFile(h.Target(name))
	if err != nil {
		return nil, nil, err
	}
	if _, err := parseHead(name, raw); err != nil {
		return nil, nil, err
	}
	all = settingsOf(name, raw)
	lines := bytes.Split(raw, []byte{'\n'})
	for i, s := range all {
		all[i].Ours = isOurs(name) || s.Line <= len(lines) && bytes.Contains(lines[s.Line-1], []byte(Marker))
		if len(s.Key) == 1 && s.Key[0] == "imports" {
			imports = s.Values
		}
	}
	return all, imports, nil
}

// resolve is what the imports of a file lead to, as containerd's resolveImports.
func (h *Host) resolve(from string, imports []string) (files []File, dirs []string) {
	for _, p := range imports {
		if !path.IsAbs(p) {
			p = path.Join(path.Dir(from), p)
		}
		p = path.Clean(p)
		if !strings.Contains(p, "*") {
			files = append(files, File{Path: p, By: from, Plain: true})
			continue
		}
		dirs = append(dirs, path.Dir(p))
		matches, _ := filepath.Glob(h.Path(p))
		for _, m := range matches {
			if rel, err := filepath.Rel(h.Root, m); err == nil {
				files = append(files, File{Path: path.Join("/", rel), By: from})
			}
		}
	}
	return files, dirs
}

// settingsOf lists the values of raw, which is valid TOML.
func settingsOf(file string, raw []byte) (all []Setting) {
	var p unstable.Parser
	p.Reset(raw)
	var table []string
	line, counted := 1, 0 // of raw, so far
	var add func(at []string, kv *unstable.Node)
	add = func(at []string, kv *unstable.Node) {
		key, v := slices.Clone(at), kv.Value()
		for k := kv.Key(); k.Next(); {
			key = append(key, string(k.Node().Data))
			at := int(k.Node().Raw.Offset)
			line += bytes.Count(raw[counted:at], []byte{'\n'})
			counted = at
		}
		switch v.Kind {
		case unstable.InlineTable:
			for c := v.Children(); c.Next(); {
				add(key, c.Node())
			}
			return
		case unstable.Array:
			s := Setting{File: file, Line: line, Key: key, Values: []string{}}
			for c := v.Children(); c.Next(); {
				s.Values = append(s.Values, string(c.Node().Data))
			}
			all = append(all, s)
		default:
			all = append(all, Setting{File: file, Line: line, Key: key, Values: []string{string(v.Data)}})
		}
	}
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = nil
			for k := e.Key(); k.Next(); {
				table = append(table, string(k.Node().Data))
			}
		case unstable.KeyValue:
			add(table, e)
		}
	}
	return all
}
