package stage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// Files are a whole configuration directory: content by path below it.
type Files map[string][]byte

// Bounds of Read. They are lower than those of a copy, since all of it is in memory.
const (
	maxReadBytes = 32 << 20
	maxReadFiles = 2000
	maxDepth     = 6 // directories
)

// Read reads what a configuration directory holds, by path below it. Links are
// followed as far as they stay inside, as in a mounted ConfigMap; names that start
// with ".." are Kubernetes' own.
func Read(dir string) (Files, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	all, left := Files{}, maxReadBytes
	var walk func(at string, depth int) error
	walk = func(at string, depth int) error {
		if depth > maxDepth {
			return fmt.Errorf("%s: deeper than %d directories", at, maxDepth)
		}
		d, err := root.Open(at)
		if err != nil {
			return err
		}
		names, err := d.Readdirnames(maxReadFiles + 1)
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
			if left -= int(min(info.Size(), maxReadBytes)); left < 0 || len(all) == maxReadFiles {
				return fmt.Errorf("there are more than %d files or %d bytes", maxReadFiles, maxReadBytes)
			}
			if all[file], err = root.ReadFile(file); err != nil {
				return err
			}
		}
		return nil
	}
	return all, walk(".", 0)
}

// Fingerprint tells one set of files from another.
func (f Files) Fingerprint() string {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(f)) {
		fmt.Fprintf(h, "%q %d\n", name, len(f[name]))
		h.Write(f[name])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Write writes the files below dir, which it makes, for its owner alone. They are on the
// disk when it returns.
func (f Files) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(f)) {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("%q is no name of a file in a configuration directory", name)
		}
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := durable.Replace(file, durable.Bytes(f[name], 0o600)); err != nil {
			return err
		}
	}
	return durable.SyncTree(dir)
}

// Swap puts the directory next in the place of dir in one step, and dir, if it is there, in
// the place of next: a second time they go back. swapped reports whether they changed places,
// also when that may not outlive a power cut, which is an error.
func Swap(next, dir string, there bool) (swapped bool, err error) {
	if there {
		if err := durable.Exchange(next, dir); err != nil {
			return false, fmt.Errorf("exchange %s and its successor: %w (its own directory on a file system that can, such as ext4, XFS, btrfs or tmpfs, and no mount point)", dir, err)
		}
	} else if err := os.Rename(next, dir); err != nil {
		return false, err
	}
	crossed()
	return true, durable.SyncDir(filepath.Dir(dir))
}
