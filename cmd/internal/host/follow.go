package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
)

// Bounds of a configuration that is copied.
const (
	maxCopied = 32 << 20 // bytes
	maxFiles  = 2000
	maxDepth  = 6
)

// files reads what a configuration directory holds, by path below it. Links are
// followed as far as they stay inside, as in a mounted ConfigMap; names that start
// with ".." are Kubernetes' own.
func files(dir string) (map[string][]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	all, left := map[string][]byte{}, maxCopied
	var walk func(at string, depth int) error
	walk = func(at string, depth int) error {
		if depth > maxDepth {
			return fmt.Errorf("%s: deeper than %d directories", at, maxDepth)
		}
		d, err := root.Open(at)
		if err != nil {
			return err
		}
		names, err := d.Readdirnames(maxFiles + 1)
		d.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for _, name := range names {
			if strings.HasPrefix(name, "..") {
				continue
			}
			file := path.Join(at, name)
			info, err := root.Stat(file)
			if err != nil {
				return err
			}
			if info.IsDir() {
				if err := walk(file, depth+1); err != nil {
					return err
				}
				continue
			}
			if !info.Mode().IsRegular() {
				return fmt.Errorf("%s is not a regular file", file)
			}
			if left -= int(min(info.Size(), maxCopied)); left < 0 || len(all) == maxFiles {
				return fmt.Errorf("there are more than %d files or %d bytes", maxFiles, maxCopied)
			}
			if all[file], err = root.ReadFile(file); err != nil {
				return err
			}
		}
		return nil
	}
	return all, walk(".", 0)
}

// follow makes the configuration on the host the one in i.From, in one step, if it is
// valid there, and if it may be in force: where it enforces and the one before did not,
// what runs is judged first, since the gate reads it within a moment. gate is what the
// gate that runs says; nil: none answers. Then nobody can judge, and a gate that is never
// begun never could: for following, a configuration that enforces first gets to the host
// with mode: audit, and i.Enforce is off, for one round. undo goes back to the one before.
func (i *Installation) follow(ctx context.Context, gate *control.Status) (changed bool, undo func() error, err error) {
	undo = func() error { return nil }
	want, err := files(i.From)
	if err != nil {
		return false, nil, hint("mount a configuration there", "read the configuration to copy: %w", err)
	}
	have, err := files(i.Path(i.ConfigDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, nil, err
	}
	fresh := err != nil
	first := false
	if gate == nil && i.Enforce && !i.Force && i.Follow && i.Manager.start() != nil {
		audits := fresh
		if !fresh { // a gate that enforced is not made to audit
			mode, err := i.Load(ctx, i.ConfigDir)
			audits = err == nil && mode != "enforce"
		}
		if first = audits && audited(want); first {
			i.Enforce = false
		}
	}
	if maps.EqualFunc(want, have, slices.Equal) {
		return false, undo, nil
	}
	next := i.ConfigDir + ".next"
	if err := os.RemoveAll(i.Path(next)); err != nil {
		return false, nil, err
	}
	if _, err := i.mkdir(path.Dir(next)); err != nil {
		return false, nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if _, err := i.mkdir(path.Dir(path.Join(next, name))); err != nil {
			return false, nil, err
		}
		if err := i.put(Change{Path: path.Join(next, name), Mode: 0o600, New: slices.Concat([]byte{}, want[name])}); err != nil {
			return false, nil, err
		}
	}
	// A configuration that the gate would not put in force does not get there: after a
	// restart nothing else would be.
	mode, err := i.Load(ctx, next)
	if err != nil {
		err = hint("correct it", "the configuration in %s is not valid on the host: %w", i.From, err)
	} else if mode == "enforce" {
		err = i.mayFollow(ctx, gate)
	}
	if err != nil {
		return false, nil, errors.Join(err, os.RemoveAll(i.Path(next)))
	}
	// The first time it may be an operator's own that goes, with keys that are nowhere
	// else. That stays beside it.
	if r := i.remembered(); !r.Brought {
		if !fresh {
			if err := i.keep(have, i.ConfigDir+".before"); err != nil {
				return false, nil, err
			}
		}
		r.Brought = true
		if err := i.remember(r); err != nil {
			return false, nil, err
		}
	}
	swap := func() error {
		put := exchange
		if fresh {
			put = os.Rename
		}
		if err := put(i.Path(next), i.Path(i.ConfigDir)); err != nil {
			return fmt.Errorf("put %s in the place of %s: %w", next, i.ConfigDir, err)
		}
		return syncDir(filepath.Dir(i.Path(next)))
	}
	if err := swap(); err != nil {
		return false, nil, err
	}
	i.Say("did", "copied the configuration to %s", i.ConfigDir)
	if first {
		i.Say("did", "with mode: audit, until the gate runs and what runs here is judged")
	}
	return true, func() error {
		if fresh {
			return os.RemoveAll(i.Path(i.ConfigDir))
		}
		return swap()
	}, nil
}

// audited has the config.yaml of a configuration that enforces audit, where that is one
// line of it.
func audited(files map[string][]byte) bool {
	const name = "config.yaml"
	if len(enforces.FindAll(files[name], 2)) != 1 {
		return false
	}
	files[name] = enforces.ReplaceAll(files[name], []byte("${1}audit${2}"))
	return true
}

// mayFollow refuses a configuration that enforces where none was in force that did, and
// what runs would be refused with the one that is in force.
func (i *Installation) mayFollow(ctx context.Context, gate *control.Status) error {
	was := ""
	if gate != nil {
		was = gate.Mode
	} else if i.Enforce { // perhaps a gate that this configuration is to bring up again
		was, _ = i.Load(ctx, i.ConfigDir)
	}
	switch {
	case was == "enforce":
		return nil
	case !i.Enforce:
		return i.audits()
	}
	return i.mayEnforce(ctx)
}

// keep writes files below dir, for root alone.
func (i *Installation) keep(files map[string][]byte, dir string) error {
	for name, content := range files {
		if _, err := i.mkdir(path.Dir(path.Join(dir, name))); err != nil {
			return err
		}
		if err := os.Chmod(i.Path(dir), 0o700); err != nil {
			return err
		}
		if err := i.put(Change{Path: path.Join(dir, name), Mode: 0o600, New: slices.Concat([]byte{}, content)}); err != nil {
			return err
		}
	}
	i.Say("did", "kept the configuration that was there in %s", dir)
	return nil
}

// CheckOnHost says what mode a configuration directory of the host means, as the
// program that is installed sees it there: what the configuration names may be on the
// host alone.
func (i *Installation) CheckOnHost(ctx context.Context, dir string) (mode string, err error) {
	check := i.Program
	if !i.installed() { // or it is put beside it for as long as it is asked
		check += ".check"
		_, made, err := i.Apply([]Change{{Path: check, Mode: 0o700, New: i.Self}})
		defer func() {
			os.Remove(i.Path(check))
			for _, d := range slices.Backward(made) {
				os.Remove(i.Path(d))
			}
		}()
		if err != nil {
			return "", err
		}
	}
	out, err := i.Run(ctx, check, "policy", "check", "--config-dir", dir, "--output", "json")
	if err != nil {
		return "", err
	}
	var said struct{ Mode string }
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		return "", fmt.Errorf("policy check: %w", err)
	}
	return said.Mode, nil
}
