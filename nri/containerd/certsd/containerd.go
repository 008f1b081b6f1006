package certsd

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Limits of what is read of containerd's own configuration.
const (
	maxConfig  = 1 << 20 // bytes of one file
	maxConfigs = 64      // files
)

// A Pulling is what containerd's own configuration says of where it pulls images from.
type Pulling struct {
	Config string   // the main file
	Path   string   // registry.config_path: directories with colons between them; empty: its default
	From   string   // the file that says Path; empty: none does
	Tables []string // keys of registry that the gate does not read: "mirrors", "configs", "auths", "headers"
}

// Defaults are the directories that containerd looks into if nothing names others
// (plugins/cri/images of 2.2.9 and 2.4.2).
var Defaults = []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}

// Dirs are the directories that containerd looks into, in its order. It has none if
// registry.mirrors are there and no config_path.
func (p *Pulling) Dirs() []string {
	switch {
	case p.Path != "":
		return filepath.SplitList(p.Path)
	case slices.Contains(p.Tables, "mirrors"):
		return nil
	}
	return slices.Clone(Defaults)
}

// Pulls reads containerd's configuration and what it imports, in containerd's order: what
// a later file says counts. The error wraps [fs.ErrNotExist] if config is not there.
//
// It reads what the files say now. The containerd that runs read them when it started.
func Pulls(config string, files Files) (*Pulling, error) {
	p := &Pulling{Config: config}
	seen := map[string]bool{}
	for pending := []string{config}; len(pending) > 0; {
		name := pending[0]
		if pending = pending[1:]; seen[name] {
			continue
		}
		if seen[name] = true; len(seen) > maxConfigs {
			return nil, &Error{File: config, Text: fmt.Sprintf("imports more than %d files", maxConfigs)}
		}
		raw, err := files.Read(name, maxConfig)
		if errors.Is(err, fs.ErrNotExist) && name == config {
			return nil, err
		}
		if err != nil {
			return nil, &Error{File: name, Text: reason(err)}
		}
		imports, err := p.file(name, raw)
		if err != nil {
			return nil, err
		}
		for _, pattern := range imports {
			more, err := imported(name, pattern, files)
			if err != nil {
				return nil, err
			}
			pending = append(pending, more...)
		}
	}
	return p, nil
}

// file adds what one file says.
func (p *Pulling) file(name string, raw []byte) (imports []string, err error) {
	type images struct {
		Registry map[string]any `toml:"registry"`
	}
	var f struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
		Plugins struct {
			New images `toml:"io.containerd.cri.v1.images"` // from version 3 on
			Old images `toml:"io.containerd.grpc.v1.cri"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(raw, &f); err != nil {
		return nil, &Error{File: name, Text: "is not a configuration of containerd"} // the parser's error may repeat a password
	}
	registry := f.Plugins.New.Registry
	if f.Version < 3 {
		registry = f.Plugins.Old.Registry
	}
	if v, ok := registry["config_path"].(string); ok {
		p.Path, p.From = v, name
	}
	for _, key := range []string{"mirrors", "configs", "auths", "headers"} {
		if t, _ := registry[key].(map[string]any); len(t) > 0 && !slices.Contains(p.Tables, key) {
			p.Tables = append(p.Tables, key)
		}
	}
	return f.Imports, nil
}

// imported is what one import leads to. A name without * is one file, whatever else is in it.
func imported(from, pattern string, files Files) ([]string, error) {
	if !path.IsAbs(pattern) {
		pattern = path.Join(path.Dir(from), pattern)
	}
	pattern = path.Clean(pattern)
	if !strings.Contains(pattern, "*") {
		return []string{pattern}, nil
	}
	dir, base := path.Split(pattern)
	if dir = path.Clean(dir); strings.ContainsAny(dir, "*?[") {
		return nil, &Error{File: from, Text: "imports a pattern of directories"}
	}
	names, err := files.List(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNotDirectory) {
		return nil, nil
	}
	if err != nil {
		return nil, &Error{File: dir, Text: reason(err)}
	}
	var all []string
	for _, name := range names {
		if ok, err := path.Match(base, name); err != nil {
			return nil, &Error{File: from, Text: "imports what is no pattern"}
		} else if ok {
			all = append(all, path.Join(dir, name))
		}
	}
	return all, nil
}
