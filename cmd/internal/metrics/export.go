package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

const (
	// interval is between two looks at the file, and two tries at what failed.
	interval = 15 * time.Second
	// fresh is how old a file may get that still says what is so: one that is older
	// is that of a gate that died.
	fresh = 5 * time.Minute
)

// A Target is where metrics are wanted, as the configuration says it.
type Target struct {
	Listen string // address and port; empty: nowhere
	File   string // absolute; empty: none
}

// An Exporter offers the metrics on a listener of their own, and in a file for
// node_exporter's textfile collector. Nothing depends on either: what fails is
// logged, once for each reason, and tried again every 15 seconds.
type Exporter struct {
	text  func(io.Writer) error
	serve func(context.Context, net.Listener) error
	log   *slog.Logger
	now   func() time.Time

	every   time.Duration
	changed chan struct{} // holds one

	mu      sync.Mutex
	want    Target
	trouble map[string]string // by field of the configuration
}

// NewExporter makes one that has nothing to do until Set. text writes the metrics and
// is safe for concurrent use; serve serves them on a listener, which it closes, until
// its context ends.
func NewExporter(text func(io.Writer) error, serve func(context.Context, net.Listener) error, log *slog.Logger, now func() time.Time) *Exporter {
	return &Exporter{text: text, serve: serve, log: log, now: now, every: interval, changed: make(chan struct{}, 1), trouble: map[string]string{}}
}

// Set says where metrics are wanted from now on. It does not wait for Run.
func (e *Exporter) Set(t Target) {
	e.mu.Lock()
	e.want = t
	e.mu.Unlock()
	select {
	case e.changed <- struct{}{}:
	default: // Run looks soon anyway
	}
}

// Troubles are what is wanted and does not work, one a line.
func (e *Exporter) Troubles() (list []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, field := range slices.Sorted(maps.Keys(e.trouble)) {
		list = append(list, field+": "+e.trouble[field])
	}
	return list
}

// note keeps what goes wrong with a field, and logs it where it is new.
func (e *Exporter) note(field string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		delete(e.trouble, field)
		return
	}
	if e.trouble[field] != err.Error() {
		e.trouble[field] = err.Error()
		e.log.Warn("metrics are not offered", "field", field, "error", err.Error(), "retry", e.every.String())
	}
}

// Run works until ctx ends, and returns nil. It leaves a file that says what is so at
// the end, unless another gate writes it.
func (e *Exporter) Run(ctx context.Context) error {
	var door *door
	var file textfile
	defer func() { door.close() }()
	for {
		e.mu.Lock()
		want := e.want
		e.mu.Unlock()

		if door != nil && (door.address != want.Listen || door.ended()) {
			door.close()
			door = nil
		}
		var err error
		if want.Listen != "" && door == nil {
			door, err = e.open(ctx, want.Listen)
		}
		e.note("metrics.listen", err)

		if file.name != want.File {
			file.remove()
			file = textfile{name: want.File}
		}
		if err = nil; file.name != "" {
			err = file.update(e.text, e.now())
		}
		e.note("metrics.file", err)

		var again <-chan time.Time
		if file.name != "" || want.Listen != "" {
			again = time.After(e.every)
		}
		select {
		case <-e.changed:
		case <-again:
		case <-ctx.Done():
			if file.ours() {
				e.note("metrics.file", file.update(e.text, e.now()))
			}
			return nil
		}
	}
}

// A door is the listener.
type door struct {
	address string
	cancel  context.CancelFunc
	done    chan struct{}
}

func (e *Exporter) open(ctx context.Context, address string) (*door, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &door{address: address, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		defer l.Close()
		_ = e.serve(ctx, l) // it is opened again
	}()
	return d, nil
}

func (d *door) ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// close closes the listener and waits for its end. d may be nil.
func (d *door) close() {
	if d != nil {
		d.cancel()
		<-d.done
	}
}

// A textfile is the file with the metrics.
type textfile struct {
	name string
	last []byte // what was written there
}

// update writes the file where it says something else or is old. Readers see the
// old file or the new one, whole.
func (f *textfile) update(text func(io.Writer) error, now time.Time) error {
	var b bytes.Buffer
	if err := text(&b); err != nil {
		return err
	}
	// The name that the file has at first is another each time, and errors are to be
	// told apart.
	err := f.put(b.Bytes(), now)
	var path *fs.PathError
	var link *os.LinkError
	if errors.As(err, &path) {
		err = fmt.Errorf("%s: %w", path.Op, path.Err)
	} else if errors.As(err, &link) {
		err = fmt.Errorf("%s: %w", link.Op, link.Err)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", f.name, err)
	}
	return nil
}

// put writes text, unless that is there.

func (f *textfile) put(text []byte, now time.Time) error {
	there, at, err := f.read(len(text))
	if err != nil {
		return err
	}
	if bytes.Equal(there, text) && now.Sub(at) < fresh {
		f.last = text
		return nil
	}
	// The collector reads what ends in .prom, which this does not.
	if err := durable.ReplaceVolatile(f.name, durable.Bytes(text, 0o644)); err != nil { // the collector is not root
		return err
	}
	f.last = text
	return nil
}

// read returns what is there now and since when, or nothing where it cannot be what
// was written: it has another size, or is no file.
func (f *textfile) read(size int) ([]byte, time.Time, error) {
	i, err := os.Lstat(f.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	if !i.Mode().IsRegular() || i.Size() != int64(size) {
		return nil, time.Time{}, nil
	}
	raw, err := os.ReadFile(f.name)
	return raw, i.ModTime(), err
}

// ours reports whether the file is what this gate wrote last: during an upgrade two
// of them write it.
func (f *textfile) ours() bool {
	there, _, err := f.read(len(f.last))
	return err == nil && f.name != "" && f.last != nil && bytes.Equal(there, f.last)
}

// remove removes the file where it is ours: nobody keeps it up to date any more.
func (f *textfile) remove() {
	if f.ours() {
		os.Remove(f.name)
	}
}
