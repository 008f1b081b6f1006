package config

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing/fstest"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Limits of what is read.
const (
	maxFile       = 1 << 20  // bytes of one file
	maxTrust      = 16 << 20 // bytes of all files of the trust store
	maxTrustFiles = 1000
	maxEntries    = 2000 // in one directory
	trustDepth    = 4    // truststore/x509/TYPE/NAME
)

// A directory is a configuration directory that is being read. Links are followed
// as long as they stay inside, since Kubernetes mounts ConfigMaps as links. It
// remembers every byte that it hands out.
type directory struct {
	dir     string
	root    *os.Root
	read    []content
	outside []string // absolute names of files read elsewhere, or in a directory below
	trees   []string // absolute names of directories elsewhere of which all may be read
}

type content struct {
	name string
	raw  []byte
}

func openDirectory(dir string) (*directory, error) {
	if dir == "" {
		return nil, errors.New("the configuration directory has no name")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	d := &directory{dir: dir, root: root}
	if _, err := d.list("."); err != nil {
		root.Close()
		return nil, err
	}
	return d, nil
}

func (d *directory) Close() error { return d.root.Close() }

// path is the name of a file in the directory as messages show it.
func (d *directory) path(name string) string { return filepath.Join(d.dir, name) }

// exists reports whether there is anything of that name, be it a dangling link.
func (d *directory) exists(name string) (bool, error) {
	_, err := d.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, d.failed(name, err)
	}
	return true, nil
}

// optional reads a file that need not exist; then the bytes are nil.
func (d *directory) optional(name string, limit int64) ([]byte, error) {
	if there, err := d.exists(name); err != nil || !there {
		return nil, err
	}
	return d.file(name, limit)
}

// file reads a file of at most limit bytes.
func (d *directory) file(name string, limit int64) ([]byte, error) {
	// Not to hang on a pipe, which is refused below.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, d.failed(name, err)
	}
	raw, err := take(f, limit)
	if err != nil {
		return nil, &Error{File: d.path(name), Text: err.Error()}
	}
	d.read = append(d.read, content{name, raw})
	return raw, nil
}

// named reads a file that another file names: relative to the directory, or
// anywhere.
func (d *directory) named(name string, limit int64) ([]byte, error) {
	if filepath.IsLocal(name) {
		if filepath.Dir(name) != "." {
			d.outside = append(d.outside, d.path(name))
		}
		return d.file(name, limit)
	}
	name = absolute(d.dir, name)
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw, err := take(f, limit)
	if err != nil {
		return nil, &Error{File: name, Text: err.Error()}
	}
	d.read = append(d.read, content{name, raw})
	d.outside = append(d.outside, name)
	return raw, nil
}

// take reads all of f, which must be a regular file that not everybody can write,
// and closes it. It never returns nil without an error.
func take(f *os.File, limit int64) ([]byte, error) {
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if info.Mode().Perm()&0o002 != 0 {
		return nil, errors.New("everybody can write this file: chmod o-w")
	}
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > limit {
		return nil, fmt.Errorf("larger than %d bytes", limit)
	}
	return Text(raw)
}

// Text is raw without the byte-order mark that Windows' editors put before UTF-8. The
// UTF-16 that PowerShell writes is an error. What is no text, such as a certificate in
// DER, stays as it is.
func Text(raw []byte) ([]byte, error) {
	if plain, marked := bytes.CutPrefix(raw, []byte("\xef\xbb\xbf")); marked {
		return plain, nil
	}
	if len(raw) >= 2 {
		switch a, b := raw[0], raw[1]; {
		case a == 0xff && b == 0xfe, a == 0xfe && b == 0xff, a == 0 && b != 0, a != 0 && a < 0x80 && a != derSequence && b == 0:
			return nil, errors.New("is UTF-16: save it as UTF-8 (PowerShell: Out-File -Encoding ascii)")
		}
	}
	return raw, nil
}

// derSequence begins each certificate in DER.
const derSequence = 0x30

// list returns the names in a directory, without those that start with two dots:
// these are Kubernetes' own in a mounted ConfigMap.
func (d *directory) list(name string) ([]string, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, d.failed(name, err)
	}
	defer f.Close()
	list, text, err := names(f)
	if text != "" {
		err = &Error{File: d.path(name), Text: text}
	}
	return list, err
}

const notDirectory = "not a directory"

// names is list for a directory that is open. It says in text what is wrong with it.
func names(f *os.File) (list []string, text string, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, "", err
	}
	if !info.IsDir() {
		return nil, notDirectory, nil
	}
	if info.Mode().Perm()&0o002 != 0 && !readOnly(f) {
		return nil, "everybody can write this directory: chmod o-w", nil
	}
	list, err = f.Readdirnames(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	if len(list) > maxEntries {
		return nil, fmt.Sprintf("more than %d entries", maxEntries), nil
	}
	list = slices.DeleteFunc(list, func(s string) bool { return strings.HasPrefix(s, "..") })
	slices.Sort(list)
	return list, "", nil
}

// readOnly reports whether f is on a file system that is mounted read-only. A
// mounted ConfigMap is, and its directory has mode 0777.
func readOnly(f *os.File) bool {
	const flag = 1 // ST_RDONLY
	var s syscall.Statfs_t
	return syscall.Fstatfs(int(f.Fd()), &s) == nil && s.Flags&flag != 0
}

// failed explains why a file could not be opened.
func (d *directory) failed(name string, err error) error {
	text := err.Error()
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		text = p.Err.Error()
	}
	if info, e := d.root.Lstat(name); e == nil && info.Mode()&fs.ModeSymlink != 0 {
		text = "a link that leads nowhere or out of " + d.dir + " (" + text + ")"
	}
	return &Error{File: d.path(name), Text: text}
}

// trustPolicy reads the one trust policy; without one, raw is nil.
func (d *directory) trustPolicy() (name string, raw []byte, err error) {
	const plain, oci = "trustpolicy.json", "trustpolicy.oci.json"
	one, err := d.optional(plain, maxFile)
	if err != nil {
		return "", nil, err
	}
	other, err := d.optional(oci, maxFile)
	switch {
	case err != nil:
		return "", nil, err
	case one != nil && other != nil:
		return "", nil, &Error{File: d.path(oci), Text: "there is " + plain + " too: keep one of them"}
	case other != nil:
		return oci, other, nil
	}
	return plain, one, nil
}

// trustStore reads everything below truststore into memory, with links resolved.
// What belongs there, the reader of the trust store knows.
func (d *directory) trustStore() (fs.FS, error) {
	store := fstest.MapFS{}
	if there, err := d.exists("truststore"); err != nil || !there {
		return store, err
	}
	left := int64(maxTrust)
	files := 0
	var walk func(name string, depth int) error
	walk = func(name string, depth int) error {
		if depth > trustDepth {
			return &Error{File: d.path(name), Text: "a directory this deep is no part of a trust store"}
		}
		names, err := d.list(name)
		if err != nil {
			return err
		}
		for _, n := range names {
			n = path.Join(name, n)
			inStore := strings.TrimPrefix(n, "truststore/")
			if !fs.ValidPath(inStore) {
				return &Error{File: d.path(name), Text: "holds a name that is not UTF-8"}
			}
			info, err := d.root.Stat(n)
			if err != nil {
				return d.failed(n, err)
			}
			if info.IsDir() {
				store[inStore] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
				if err := walk(n, depth+1); err != nil {
					return err
				}
				continue
			}
			if files++; files > maxTrustFiles {
				return &Error{File: d.path("truststore"), Text: fmt.Sprintf("more than %d files", maxTrustFiles)}
			}
			raw, err := d.file(n, min(maxFile, left))
			if err != nil {
				return err
			}
			left -= int64(len(raw))
			store[inStore] = &fstest.MapFile{Data: raw, Mode: 0o644}
		}
		return nil
	}
	if err := walk("truststore", 1); err != nil {
		return nil, err
	}
	return store, nil
}

// revision is the digest of everything that was read: sorted by name, and each name
// and content with its length before it.
func (d *directory) revision() verify.Revision {
	all := slices.Clone(d.read)
	slices.SortFunc(all, func(a, b content) int { return cmp.Compare(a.name, b.name) })
	all = slices.CompactFunc(all, func(a, b content) bool { return a.name == b.name && string(a.raw) == string(b.raw) })
	var b []byte
	for _, c := range all {
		b = binary.BigEndian.AppendUint64(b, uint64(len(c.name)))
		b = append(b, c.name...)
		b = binary.BigEndian.AppendUint64(b, uint64(len(c.raw)))
		b = append(b, c.raw...)
	}
	return verify.RevisionOf(b)
}

// Trust returns the files of the trust policy and the trust store in dir with their
// bytes, by their names in dir. They need not be valid.
func Trust(dir string) (map[string][]byte, error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if _, _, err := d.trustPolicy(); err != nil {
		return nil, err
	}
	if _, err := d.trustStore(); err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, c := range d.read {
		files[c.name] = c.raw
	}
	return files, nil
}
