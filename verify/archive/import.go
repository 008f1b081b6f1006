package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/durable"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	unfinished = durable.Unfinished // begins the names of what is being written
	suffix     = ".tar"             // ends the names of archives that an import writes
	lockName   = ".lock"            // file whose lock an import holds
)

// crossed is called after each step of a change on the disk, for tests.
var crossed = func() {}

// A Importer is the directory of archives below a state directory, with its lock held.
type Importer struct {
	dir  string
	lock *os.File
}

// OpenImporter opens the directory of archives below state, which it makes, waits for its
// lock, and removes what an import left that did not end. The caller closes it.
func OpenImporter(ctx context.Context, state string) (*Importer, error) {
	dir := filepath.Join(state, "archives")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	s := &Importer{dir, f}
	if err := durable.Lock(ctx, f); err != nil {
		f.Close()
		if errors.Is(err, durable.ErrLocked) {
			err = fmt.Errorf("another import has the lock %s: %w", f.Name(), ctx.Err())
		}
		return nil, err
	}
	left, err := os.ReadDir(dir)
	for _, e := range left {
		if strings.HasPrefix(e.Name(), unfinished) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// Close gives up the lock.
func (s *Importer) Close() { s.lock.Close() }

// Dir is the directory.
func (s *Importer) Dir() string { return s.dir }

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`)

// NameOf is how an archive from that file is called where nobody says otherwise.
func NameOf(file string) (string, error) {
	name := filepath.Base(file)
	for _, end := range []string{".gz", ".tgz", ".zst", ".tzst", suffix} {
		name = strings.TrimSuffix(name, end)
	}
	if file == "-" || !namePattern.MatchString(name) {
		return "", fmt.Errorf("%s gives the evidence archive no name: say --name", text.Quote(file, 100))
	}
	return name, CheckName(name)
}

// CheckName refuses what no archive is called.
func CheckName(name string) error {
	if !namePattern.MatchString(name) || strings.HasSuffix(name, suffix) {
		return fmt.Errorf("%s is no name of an evidence archive: letters, digits, dots, underscores and hyphens, at most 100, and not .tar at its end", text.Quote(name, 110))
	}
	return nil
}

// Save puts the evidence of c, about which r is the report, on the node, in the place
// of what had the name. It is one tar file: the old one is there until the new one is,
// whole, and no longer.
func (s *Importer) Save(ctx context.Context, c *Contents, r *Report, name string) (file string, err error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	l := c.evidenceOf(r)
	if l.bytes > maxBytes {
		return "", fmt.Errorf("%w: %d bytes of evidence, more than %d", verify.ErrBudget, l.bytes, maxBytes)
	}
	file = filepath.Join(s.dir, name+suffix)
	if err := durable.Replace(file, func(f *os.File) error { return l.Tar(&patient{f, ctx}) }); err != nil {
		return "", err
	}
	crossed()
	// An archive of that name that somebody put there as a directory.
	if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
		if err := s.drop(name); err != nil {
			return "", err
		}
	}
	return file, nil
}

// patient writes until ctx ends.
type patient struct {
	io.Writer
	ctx context.Context
}

func (p *patient) Write(b []byte) (int, error) {
	crossed()
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.Writer.Write(b)
}

// evidenceOf is what a node uses of c: the manifests and indexes of images, and the
// referrers that are whole.
func (c *Contents) evidenceOf(r *Report) *Layout {
	l := &Layout{}
	add := func(d ocispec.Descriptor, limit int64) {
		l.put(d, func() ([]byte, error) {
			return c.dir.Blob(d, func(n int64) error {
				if n > limit {
					return fmt.Errorf("%w: %d bytes", verify.ErrBudget, n)
				}
				return nil
			})
		})
	}
	for _, d := range c.documents {
		if d.subject == nil && d.ArtifactType != ArtifactTypeTrust {
			add(d.Descriptor, maxDocument)
		}
	}
	for _, d := range r.usable {
		for _, p := range d.parts() {
			add(ocispec.Descriptor{MediaType: p.MediaType, Digest: p.Digest, Size: p.Size}, maxBlob)
		}
		add(d.Descriptor, maxDocument)
		l.list(d.Descriptor)
	}
	for _, e := range c.entries {
		d := c.documents[e.Digest]
		if d.subject != nil || d.ArtifactType == ArtifactTypeTrust {
			continue
		}
		entry := d.Descriptor
		entry.Platform = e.Platform
		for _, key := range []string{annotationContainerd, annotationName} {
			if v := e.Annotations[key]; v != "" && len(v) <= 1024 {
				if entry.Annotations == nil {
					entry.Annotations = map[string]string{}
				}
				entry.Annotations[key] = v
			}
		}
		l.list(entry)
	}
	return l
}

// drop removes what has that name, so that nobody sees a part of it.
func (s *Importer) drop(file string) error {
	gone := filepath.Join(s.dir, unfinished+"gone-"+file)
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := durable.Rename(filepath.Join(s.dir, file), gone); err != nil {
		return err
	}
	crossed()
	return os.RemoveAll(gone)
}

// Remove removes the archive of that name, as List has it or without .tar. The error is
// fs.ErrNotExist if there is none.
func (s *Importer) Remove(name string) error {
	for _, file := range []string{name, name + suffix} {
		if !namePattern.MatchString(file) && !namePattern.MatchString(strings.TrimSuffix(file, suffix)) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(s.dir, file)); err == nil {
			return s.drop(file)
		}
	}
	return fmt.Errorf("evidence archive %s: %w", text.Quote(name, 110), fs.ErrNotExist)
}

// A Entry is an archive on the node.
type Entry struct {
	Name string    `json:"name"`
	Form string    `json:"form"` // tar, directory or other
	Size int64     `json:"size"` // bytes of a tar file
	Time time.Time `json:"time"`
}

// List returns what is in the directory of archives below state, by name: what the gate
// reads there, and what it would not.
func List(state string) ([]Entry, error) {
	entries, err := os.ReadDir(filepath.Join(state, "archives"))
	if errors.Is(err, fs.ErrNotExist) {
		return []Entry{}, nil
	}
	if err != nil {
		return nil, err
	}
	list := []Entry{}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		b := Entry{Name: e.Name(), Form: "other", Time: info.ModTime().UTC()}
		switch {
		case info.IsDir():
			b.Form = "directory"
		case info.Mode().IsRegular():
			b.Form, b.Size = "tar", info.Size()
		}
		list = append(list, b)
	}
	slices.SortFunc(list, func(x, y Entry) int { return strings.Compare(x.Name, y.Name) })
	return list, nil
}
