package reconcile

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// Marks are a file with the digests of the images that are being read or checked while
// no one waits for them. What is found there at start was in hand when a process died,
// perhaps because of it: it is skipped, and stays in the file, until it was judged after
// all, or the directory is emptied. Two processes that share the directory during an
// upgrade may skip each other's image, or lose each other's note: either costs the hook
// one wait. Nil, and the zero value, keep nothing. Methods are safe for concurrent use.
type Marks struct {
	path string
	log  *slog.Logger

	skips   atomic.Int32 // how many there are to skip
	mu      sync.Mutex
	skip    []digest.Digest
	hand    []digest.Digest // one for each who holds it, oldest first
	writing sync.Mutex      // of the file; taken before mu
}

const (
	marksFile     = "ahead"
	maxSkip       = 16
	maxMarksBytes = 4 << 10 // bytes
)

// OpenMarks reads what an earlier process left in dir, which belongs on a file system
// that a reboot empties. Empty: nothing is kept. What cannot be read, or is broken,
// counts as empty and is replaced.
func OpenMarks(dir string, log *slog.Logger) *Marks {
	m := &Marks{log: log}
	if dir == "" {
		return m
	}
	m.path = filepath.Join(dir, marksFile)
	m.skip = leftIn(m.path)
	m.skips.Store(int32(len(m.skip)))
	for _, d := range m.skip {
		log.Warn("this image was being looked at ahead of time when an earlier process died; it is not looked at again until a container asks for it", "target", d.String())
	}
	return m
}

// leftIn returns the digests in a file.
func leftIn(path string) (list []digest.Digest) {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxMarksBytes+1))
	if err != nil || len(raw) > maxMarksBytes {
		return nil
	}
	for line := range bytes.Lines(raw) {
		d, err := digest.Parse(strings.TrimSuffix(string(line), "\n"))
		if err != nil || !bytes.HasSuffix(line, []byte("\n")) {
			return nil
		}
		if !slices.Contains(list, d) {
			list = append(list, d)
		}
	}
	return list[max(len(list)-maxSkip, 0):]
}

// Skips reports whether an earlier process may have died of d.
func (m *Marks) Skips(d digest.Digest) bool {
	if m == nil || m.skips.Load() == 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.skip, d)
}

// Hold notes that d is in hand until release is called, which is to be called once.
// Several may hold the same. It writes the file: a hook does not call it.
func (m *Marks) Hold(d digest.Digest) (release func()) {
	if m == nil || m.path == "" {
		return func() {}
	}
	m.change(func() { m.hand = append(m.hand, d) })
	return func() {
		m.change(func() {
			if i := slices.Index(m.hand, d); i >= 0 {
				m.hand = slices.Delete(m.hand, i, i+1)
			}
		})
	}
}

// Judged is told that d was judged and nothing died of it, and reports whether it was to
// be skipped. It is skipped no more; the file says so when it is written next.
func (m *Marks) Judged(d digest.Digest) bool {
	if !m.Skips(d) {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(m.skip)
	m.skip = slices.DeleteFunc(slices.Clone(m.skip), func(o digest.Digest) bool { return o == d })
	m.skips.Store(int32(len(m.skip)))
	return len(m.skip) < n
}

// change makes a change and writes the file. It is replaced whole: who is killed
// meanwhile leaves one or the other.
func (m *Marks) change(f func()) {
	m.writing.Lock()
	defer m.writing.Unlock()
	m.mu.Lock()
	f()
	list := slices.Concat(m.skip, m.hand)
	m.mu.Unlock()
	var b bytes.Buffer
	for i, d := range list {
		if d.Validate() == nil && !slices.Contains(list[:i], d) {
			b.WriteString(d.String() + "\n")
		}
	}
	if err := durable.ReplaceVolatile(m.path, durable.Bytes(b.Bytes(), 0o600)); err != nil {
		m.log.Debug("the images in hand cannot be noted", "error", err.Error())
	}
}
