// Package decisionlog keeps what the gate answered lately, for whoever asks what
// happened (tidewaiter decisions, tidewaiter explain).
//
// It is a record and nothing else: nobody decides by it. It lies in the run
// directory, which a restart of the gate leaves and a restart of the node empties,
// as JSON lines in two files of at most 1 MiB: the older one goes when the newer one
// is full. Where there is no such directory it is kept in memory, and is shorter.
//
// # What is kept
//
// What is new. Of a container that is refused again and again, as the kubelet tries
// again and again, one line a minute says how often; of an image that is verified
// anew, one line an hour. What was allowed from memory is not kept at all: that is
// the normal course, it would push everything else out, and it would be done for
// every container that starts. Lines hold what the log holds: no argv, no
// environment, no secret.
package decisionlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// An Entry is one line.
type Entry struct {
	Seq       uint64        `json:"seq"` // grows from line to line; microseconds since 1970 where the clock goes on
	At        time.Time     `json:"at"`
	Kind      string        `json:"kind"`                // AnswerLine or VerificationLine
	Hook      string        `json:"hook,omitempty"`      // that the runtime asked in; of an Answer
	Container string        `json:"container,omitempty"` // its ID; of an Answer
	Mode      string        `json:"mode"`
	Took      string        `json:"took,omitempty"`
	Repeats   uint64        `json:"repeats,omitempty"` // how often the same was answered since the last line, without one
	Decision  verify.Report `json:"decision"`
}

// Dir is the directory in the run directory.
const Dir = "decisions"

const (
	newer, older = "new.jsonl", "old.jsonl"

	maxFile   = 1 << 20   // bytes of one of the two files
	maxMemory = 128 << 10 // of one of the two where there is no directory
	maxLine   = 16 << 10
	maxSeen   = 1024 // answers of which repeats are counted

	lockWait          = 5 * time.Second // longest that a write waits while another gate turns the files
	answerEvery       = time.Minute     // between two lines of the same answer
	verificationEvery = time.Hour       // of the same verification
)

// A Ring keeps lines. It is safe for concurrent use. Two gates may share one
// directory.
type Ring struct {
	log *slog.Logger

	mu     sync.Mutex
	dir    string   // empty: in memory
	file   *os.File // nil: in memory
	size   int64
	memory [2][]byte // the newer one first
	seq    uint64
	seen   *simplelru.LRU[same, *repeat]
	failed string // what was last logged
}

// same is what makes two entries the same.
type same struct{ kind, hook, id, revision, image, pod, container string }

type repeat struct {
	at time.Time // of the last line
	n  uint64    // repeats since
}

// Open returns the Ring of a run directory, with what is in there. An empty name
// means that it is kept in memory, and so does a directory that cannot be written,
// which is logged.
func Open(run string, log *slog.Logger) *Ring {
	r := &Ring{log: log}
	r.seen, _ = simplelru.NewLRU[same, *repeat](maxSeen, nil) // fails only for a size below 1
	if run == "" {
		return r
	}
	r.dir = filepath.Join(run, Dir)
	if err := os.Mkdir(r.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		r.forget(err)
		return r
	}
	if err := r.open(); err != nil {
		r.forget(err)
		return r
	}
	// What was told before a restart is no news after it.
	_ = r.Read(0, func(l control.Line) bool {
		r.seq = max(r.seq, l.Seq)
		if s, err := l.Said(); err == nil {
			r.seen.Add(sameAs(l, s), &repeat{at: l.At})
		}
		return true
	})
	return r
}

// Close closes what is open. Entries that come later are kept in memory.
func (r *Ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
}

// forget goes on in memory.
func (r *Ring) forget(err error) {
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
	if s := err.Error(); s != r.failed {
		r.failed = s
		r.log.Warn("answers are remembered in memory only, and fewer of them", "error", s)
	}
}

func sameAs(l control.Line, s control.Said) same {
	k := same{kind: l.Kind, hook: l.Hook, id: s.ID, revision: s.Revision, image: s.Image}
	if s.Pod != nil {
		k.pod, k.container = s.Pod.UID, s.Pod.Container
	}
	return k
}

// Add keeps e, whose Seq and Repeats it sets, or counts it as a repeat.
func (r *Ring) Add(e Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := same{kind: e.Kind, hook: e.Hook, id: e.Decision.ID, revision: e.Decision.Revision, image: e.Decision.Image}
	every := verificationEvery
	if e.Kind == control.AnswerLine {
		every = answerEvery
	}
	if p := e.Decision.Pod; p != nil {
		k.pod, k.container = p.UID, p.Container
	}
	last, again := r.seen.Get(k)
	if again {
		if d := e.At.Sub(last.at); d >= 0 && d < every {
			last.n++
			return
		}
		e.Repeats = last.n
	}
	r.seen.Add(k, &repeat{at: e.At})
	r.seq = max(r.seq+1, uint64(max(e.At.UnixMicro(), 0)))
	e.Seq = r.seq
	raw, err := e.line()
	if err != nil {
		return // nothing that a runtime sends is that long
	}
	if r.file != nil {
		if err := r.write(raw); err == nil {
			return
		} else {
			r.forget(err)
		}
	}
	if len(r.memory[0])+len(raw) > maxMemory {
		r.memory[1], r.memory[0] = r.memory[0], nil
	}
	r.memory[0] = append(r.memory[0], raw...)
}

// line is e as one line. Where registries made it long, what they made long goes.
func (e *Entry) line() ([]byte, error) {
	raw, err := json.Marshal(e)
	if err == nil && len(raw) >= maxLine {
		d := &e.Decision
		d.Metadata, d.Tried, d.Signers = nil, d.Tried[:min(len(d.Tried), 2)], d.Signers[:min(len(d.Signers), 2)]
		raw, err = json.Marshal(e)
	}
	if err == nil && len(raw) >= maxLine {
		e.Decision.Tried, e.Decision.Signers, e.Decision.Pod = nil, nil, nil
		raw, err = json.Marshal(e)
	}
	if err == nil && len(raw) >= maxLine {
		err = errors.New("the line is too long")
	}
	return append(raw, '\n'), err
}

// open opens the newer file, at the end of a line.
func (r *Ring) open() error {
	f, err := os.OpenFile(filepath.Join(r.dir, newer), os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", f.Name())
	}
	if err != nil {
		f.Close()
		return err
	}
	if n := info.Size(); n > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, n-1); err != nil || last[0] != '\n' {
			// A crash cuts one line and no more. The other gate's write may be seen while it
			// grows the file: its line stays whole, since appends exclude each other, and an
			// empty line follows, which readers pass over.
			_, _ = f.Write([]byte{'\n'})
		}
	}
	r.file, r.size = f, info.Size()
	return nil
}

func (r *Ring) write(raw []byte) error {
	if r.size+int64(len(raw)) > maxFile {
		if err := r.turn(); err != nil {
			return err
		}
	}
	n, err := r.file.Write(raw) // at the end, also where another gate writes there
	r.size += int64(n)
	return err
}

// turn makes the newer file the older one, unless another gate has done so.
func (r *Ring) turn() error {
	d, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	defer d.Close() // and with it goes the lock
	ctx, cancel := context.WithTimeout(context.Background(), lockWait)
	defer cancel()
	if err := durable.Lock(ctx, d); err != nil {
		return err
	}
	path := filepath.Join(r.dir, newer)
	mine, err := r.file.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Lstat(path); err == nil && os.SameFile(there, mine) {
		if err := os.Rename(path, filepath.Join(r.dir, older)); err != nil {
			return err
		}
	}
	r.file.Close()
	r.file = nil
	return r.open()
}

// Read hands over lines with a higher Seq than after, the oldest first, until yield
// returns false. What is no line is left out.
func (r *Ring) Read(after uint64, yield func(control.Line) bool) error {
	readers, err := r.readers()
	if err != nil {
		return err
	}
	more := true
	for _, f := range readers {
		if more {
			more = scan(f, after, yield)
		}
		if c, is := f.(io.Closer); is {
			c.Close()
		}
	}
	return nil
}

// readers are what there is to read, the older first.
func (r *Ring) readers() (list []io.Reader, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		for _, name := range []string{older, newer} {
			f, err := os.OpenFile(filepath.Join(r.dir, name), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
			if err == nil {
				list = append(list, f)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return list, err
			}
		}
	}
	for _, raw := range [][]byte{r.memory[1], r.memory[0]} {
		if len(raw) > 0 {
			list = append(list, bytes.NewReader(bytes.Clone(raw)))
		}
	}
	return list, nil
}
