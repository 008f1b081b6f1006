package reconcile

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// Gated remembers which containers a gate on this node let be created. It keeps
// them in memory and in a file that a reboot takes away, since no container
// outlives one: each instance appends to a file of its own, and reads those of all.
// It is safe for concurrent use.
type Gated struct {
	dir    string // empty: memory alone
	log    *slog.Logger
	uptime func() time.Duration
	more   chan struct{} // there is something to be written

	mu      sync.Mutex
	seen    *simplelru.LRU[id, *trace]
	pending []id // seen and not written

	files sync.Mutex // guards what follows, and is taken before mu
	file  *os.File   // locked while this process lives; nil: not open
	path  string     // of file
	lines int        // in file
	said  bool       // that the file cannot be written
}

// An id is a container's, which containerd's CRI plugin makes of 32 random bytes.
type id [32]byte

// A trace is what is known of a container besides its ID.
type trace struct {
	at  time.Duration // when it was allowed, or read from a file
	ran bool          // it was seen running
}

const (
	maxGated    = 8192         // containers; those that run go last
	maxLines    = 2 * maxGated // of one file
	maxFiles    = 16           // of other instances that are read
	forgetAfter = time.Hour    // a container that was never seen running for so long was not created
	lineLen     = 2*len(id{}) + 1
	gatedDir    = "gated"
	hidden      = "." // begins the name of a file that is being made
)

// NewGated makes one that keeps its files in the directory "gated" of dir, or
// with an empty dir none. uptime is a clock that nobody can set. What cannot be
// read or written is logged once: a container may then be reported as ungated
// that is not.
func NewGated(dir string, log *slog.Logger, uptime func() time.Duration) *Gated {
	w := &Gated{log: log, uptime: uptime, more: make(chan struct{}, 1)}
	w.seen, _ = simplelru.NewLRU[id, *trace](maxGated, nil) // fails only for a size below 1
	if dir != "" {
		w.dir = filepath.Join(dir, gatedDir)
		w.files.Lock()
		defer w.files.Unlock()
		if err := os.MkdirAll(w.dir, 0o700); err != nil {
			w.failed(err)
		}
		w.read()
	}
	return w
}

func parseID(s string) (i id, ok bool) {
	n, err := hex.Decode(i[:], []byte(s[:min(len(s), 2*len(i))]))
	return i, err == nil && n == len(i) && len(s) == 2*len(i)
}

// Saw remembers a container whose creation was allowed. It writes nothing itself
// and waits for nobody: the hook calls it.
func (w *Gated) Saw(container string) {
	i, ok := parseID(container)
	if !ok {
		return
	}
	w.mu.Lock()
	if w.seen.Contains(i) {
		w.mu.Unlock()
		return
	}
	w.seen.Add(i, &trace{at: w.uptime()})
	if w.dir != "" && len(w.pending) < maxGated {
		w.pending = append(w.pending, i)
	}
	w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// Has reports whether an instance of the gate let the container be created.
func (w *Gated) Has(container string) bool {
	i, ok := parseID(container)
	w.mu.Lock()
	defer w.mu.Unlock()
	return ok && w.seen.Contains(i)
}

// Run writes what was seen until ctx ends, and closes the file.
func (w *Gated) Run(ctx context.Context) {
	for open := true; open; {
		select {
		case <-ctx.Done():
			open = false
		case <-w.more:
		}
		w.files.Lock()
		w.flush()
		w.files.Unlock()
	}
	w.files.Lock()
	defer w.files.Unlock()
	if w.file != nil {
		w.file.Close() // it stays for those who come after
		w.file = nil
	}
}

// flush appends what is pending. w.files is held, as by all below.
func (w *Gated) flush() {
	w.mu.Lock()
	list := w.pending
	w.pending = nil
	w.mu.Unlock()
	if w.dir == "" || len(list) == 0 {
		return
	}
	if w.file == nil || w.lines+len(list) > maxLines {
		w.rewrite()
		return
	}
	if _, err := w.file.Write(lines(list)); err != nil {
		w.failed(err)
		w.rewrite()
		return
	}
	w.lines += len(list)
}

func lines(list []id) []byte {
	b := make([]byte, 0, len(list)*lineLen)
	for _, i := range list {
		b = append(hex.AppendEncode(b, i[:]), '\n')
	}
	return b
}

// rewrite replaces the file by one with what is known.
func (w *Gated) rewrite() {
	w.mu.Lock()
	list := w.seen.Keys()
	w.pending = nil
	w.mu.Unlock()
	f, path, err := w.create(lines(list))
	if err != nil {
		w.failed(err)
		return
	}
	if w.file != nil {
		os.Remove(w.path)
		w.file.Close()
	}
	w.file, w.path, w.lines = f, path, len(list)
}

// create makes a file that is ours. It is locked and whole before it has the name that
// others read by: they would take it for an ended one's, and remove it.
func (w *Gated) create(content []byte) (f *os.File, path string, err error) {
	name := strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(rand.Text())
	path = filepath.Join(w.dir, name)
	beside := filepath.Join(w.dir, hidden+name)
	f, err = durable.CreateLocked(beside, path, os.O_WRONLY|os.O_APPEND, content)
	return f, path, err
}

// read takes in the files of other instances. Those of ended ones are removed once
// what they hold is in ours.
func (w *Gated) read() {
	d, err := os.Open(w.dir)
	if err != nil {
		return
	}
	names, err := d.Readdirnames(4 * maxFiles)
	d.Close()
	if err != nil && !errors.Is(err, io.EOF) {
		w.failed(err)
	}
	own := ""
	if w.file != nil {
		own = filepath.Base(w.path)
	}
	var left []string
	n := 0
	for _, name := range names {
		if name == own || n == maxFiles || strings.HasPrefix(name, hidden) {
			continue
		}
		n++
		path := filepath.Join(w.dir, name)
		list, ended, err := readFile(path)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				w.failed(err)
			}
			continue
		}
		if ended {
			left = append(left, path)
		}
		w.mu.Lock()
		for _, i := range list {
			if !w.seen.Contains(i) {
				w.seen.Add(i, &trace{at: w.uptime()})
			}
		}
		w.mu.Unlock()
	}
	if len(left) == 0 {
		return
	}
	if w.rewrite(); w.file != nil {
		for _, path := range left {
			os.Remove(path)
		}
	}
}

// readFile reads the file of another instance. It reports whether that has ended.
func readFile(path string) (list []id, ended bool, err error) {
	if s, err := os.Lstat(path); err != nil || !s.Mode().IsRegular() {
		return nil, false, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	ended = durable.TryShared(f) == nil
	raw, err := io.ReadAll(io.LimitReader(f, int64(maxLines*lineLen)))
	if err != nil {
		return nil, false, err
	}
	for line := range bytes.Lines(raw) {
		if i, ok := parseID(strings.TrimSuffix(string(line), "\n")); ok {
			list = append(list, i)
		}
	}
	return list, ended, nil
}

// settle takes in what other instances saw before a check.
func (w *Gated) settle() {
	if w.dir == "" {
		return
	}
	w.files.Lock()
	defer w.files.Unlock()
	w.read()
}

// compact forgets the containers that do not run any more, and those that were
// never seen running and are old.
func (w *Gated) compact(running map[string]bool) {
	w.files.Lock()
	defer w.files.Unlock()
	w.mu.Lock()
	now := w.uptime()
	live := map[id]bool{}
	for r := range running {
		if i, ok := parseID(r); ok {
			live[i] = true
		}
	}
	for _, i := range w.seen.Keys() {
		t, _ := w.seen.Peek(i)
		switch {
		case live[i]:
			t.ran = true
			w.seen.Get(i) // the last to be forgotten for want of room
		case t.ran || now-t.at > forgetAfter:
			w.seen.Remove(i)
		}
	}
	n := w.seen.Len()
	w.mu.Unlock()
	if w.dir != "" && w.lines > n {
		w.rewrite()
	}
}

// failed says once that the files cannot be kept.
func (w *Gated) failed(err error) {
	level := slog.LevelDebug
	if !w.said {
		w.said, level = true, slog.LevelWarn
	}
	w.log.Log(context.Background(), level, "which containers were allowed cannot be kept: after a restart they may be reported as ungated", "error", err.Error())
}
