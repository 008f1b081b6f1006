package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/durable"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// earliest is before this program was written. A clock that shows less is wrong, as
// that of a board without one is until it is told the time.
var earliest = time.Date(2025, time.January, 1, 0, 0, 0, 0, time.UTC)

const (
	again      = 30 * time.Second // between tries to open, to lock or to write
	quiet      = 5 * time.Second  // without new evidence before index.json is written
	imageWait  = 5 * time.Second  // longest that reading one document of an image may take
	freshEvery = 24 * time.Hour   // how often the time of a signature is written
	goneFor    = 24 * time.Hour   // longest that listings must not have had an image before its evidence goes
	roomAfter  = time.Hour        // the same, where it goes to make room
	wholeEvery = 10 * time.Minute // between tries to get a document that a signature lacks
)

// lockName is the file beside the store of which the process that writes holds the lock.
const lockName = "store.lock"

var (
	errFull    = errors.New("it is full of signatures of images that are on the node, or were an hour ago, and none has a larger share of it")
	errStuffed = errors.New("there are files in it that cannot be read, or too many, and those that can leave no room: remove the directory, and what is signed is looked for again")
)

// A writer is what Run holds.
type writer struct {
	*Store
	state   *os.Root
	dir     *layout.Dir // reads what out writes
	out     *durable.Dir
	lock    *os.File
	loaded  bool                        // the directory was read
	partial bool                        // but not all of it
	full    bool                        // there was no room for what came last
	dirty   bool                        // index.json may not say what there is
	lacking map[digest.Digest]time.Time // subjects without a document, and when that is tried again

	// The last listing that was looked at. The catalog of the store changes nowhere but in
	// this goroutine, which therefore reads it without the lock, and holds that only to
	// change something.
	listing map[digest.Digest]bool // nil: none yet
	lives   map[step]bool          // what is known of it
}

// Run reads the directory and writes what Keep and Retain ask for, until ctx ends and
// what waits was written once more. It is called once. What fails is logged and tried again; it returns nil.
func (s *Store) Run(ctx context.Context) error {
	w := &writer{Store: s, lacking: map[digest.Digest]time.Time{}, lives: map[step]bool{}}
	defer w.close()
	w.try(ctx)
	s.start.Done()
	for {
		pause := again
		if w.work(ctx) && w.dirty {
			pause = quiet
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), imageWait)
			w.work(last)
			w.index()
			cancel()
			return nil
		case <-s.wake:
		case <-timer.C:
			w.index()
		}
		timer.Stop()
	}
}

func (w *writer) close() {
	w.mu.Lock()
	w.reader.Close()
	w.reader = nil
	w.mu.Unlock()
	if w.lock != nil {
		w.lock.Close()
	}
	if w.dir != nil {
		w.dir.Root.Close()
		w.state.Close()
	}
	w.lock, w.dir, w.out, w.state, w.loaded = nil, nil, nil, nil, false
}

// try opens the directory where it is not open, and takes the lock where it is not
// held. It reports whether there may be written.
func (w *writer) try(ctx context.Context) bool {
	if w.lock != nil {
		return true
	}
	if w.dir == nil {
		state, root, err := w.open()
		if err != nil {
			w.say(err.Error())
			return false
		}
		w.state, w.dir, w.out = state, &layout.Dir{Root: root}, durable.NewDir(root)
	}
	lock, err := w.takeLock()
	if err == nil {
		if err = w.prepare(); err != nil {
			lock.Close()
		}
	}
	if err != nil {
		if !w.loaded {
			w.load(ctx, w.dir)
			w.loaded = true
		}
		w.say(err.Error())
		return false
	}
	w.lock, w.dirty, w.loaded = lock, true, true
	// Also where it was read before: who held the lock may have written since.
	l := w.load(ctx, w.dir)
	for _, name := range l.left {
		_ = w.dir.Root.Remove(name)
	}
	for d := range l.damaged {
		if !w.broken[d] && !w.losses[d] { // of others nothing but the file says that they were there
			_ = w.dir.Root.Remove(layout.BlobPath(d))
		}
	}
	w.partial = l.partial
	w.tidy()
	return true
}

func (w *writer) takeLock() (*os.File, error) {
	f, err := w.state.OpenFile(lockName, os.O_CREATE|os.O_RDWR|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", lockName)
	}
	if err == nil && durable.TryLock(f) != nil {
		err = errors.New("another process of this node writes to it")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// prepare makes what every layout has.
func (w *writer) prepare() error {
	for _, name := range []string{ocispec.ImageBlobsDir, path.Join(ocispec.ImageBlobsDir, digest.SHA256.String())} {
		if err := w.out.Mkdir(name); err != nil {
			return err
		}
	}
	want, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return w.replace(ocispec.ImageLayoutFile, want)
}

// work does what is to be done, and reports whether it could.
func (w *writer) work(ctx context.Context) bool {
	if !w.try(ctx) {
		return false
	}
	w.mend(ctx)
	w.writeOff()
	trouble := ""
	for {
		w.retain(ctx)
		w.replaced()
		w.mu.Lock()
		if n := w.waiting.dropped; n > 0 {
			w.waiting.dropped = 0
			w.o.Log.Warn("verified signatures came faster than they could be kept on disk", "store", w.Name(), "signatures", n)
		}
		if len(w.waiting.list) == 0 {
			w.mu.Unlock()
			if trouble == "" && w.full {
				trouble = w.fullness().Error()
			}
			w.say(trouble)
			return true
		}
		e := w.waiting.list[0]
		w.mu.Unlock()
		listed := w.listing != nil
		err := w.write(ctx, e)
		w.full = errors.Is(err, errFull)
		if err != nil {
			if trouble = err.Error(); w.full {
				trouble = w.fullness().Error()
			}
			if w.full && !listed {
				w.say(trouble) // what may go to make room nobody knows yet
				return true
			}
			if !errors.Is(err, errFull) && !errors.Is(err, errUnfit) {
				w.say(trouble)
				if errors.Is(err, fs.ErrNotExist) {
					w.close() // somebody has removed the directory; the next try makes it anew
				}
				return false // it has its turn when the disk is better
			}
		}
		w.mu.Lock()
		w.waiting.next()
		w.mu.Unlock()
	}
}

// replaced removes signatures that go when another is there, and is.
func (w *writer) replaced() {
	w.mu.Lock()
	over, done := []*catalog.Blob(nil), map[digest.Digest]int{}
	for by, olds := range w.instead {
		if x := w.catalog.Blobs[by]; x != nil && !x.Lost {
			for _, d := range olds {
				if b := w.catalog.Blobs[d]; b != nil && b.Subject != "" && d != by {
					over = append(over, b)
				}
			}
		} else if w.waiting.has(by) {
			continue
		}
		done[by] = len(olds) // or by was not kept, and they stay
	}
	w.mu.Unlock()
	for _, b := range over {
		_ = w.remove(b)
	}
	if len(over) > 0 {
		w.tidy(over...)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for by, n := range done {
		if w.instead[by] = w.instead[by][n:]; len(w.instead[by]) == 0 {
			delete(w.instead, by)
		}
	}
}

var errUnfit = errors.New("the evidence is not what it seemed to be")

// A file is one to be written.
type file struct {
	*catalog.Blob
	raw []byte
}

// write keeps one signature with the documents of its image.
func (w *writer) write(ctx context.Context, e evidence) error {
	ev := e.found
	envelope, err := w.envelope(e)
	if err != nil || ev.Manifest.Digest.Validate() != nil || ev.Manifest.Digest.Algorithm().FromBytes(ev.Document) != ev.Manifest.Digest ||
		envelope.Digest.Algorithm().FromBytes(ev.Blob) != envelope.Digest || len(ev.Document) > maxDocument || len(ev.Blob) > maxDocument {
		return fmt.Errorf("%w: signature %s", errUnfit, ev.Manifest.Digest)
	}
	list := []file{{w.see(envelope.Digest, ev.Blob), ev.Blob}}
	if list[0].MediaType != "" { // then it is in nobody's share, and leads where its signer wants
		return fmt.Errorf("%w: the envelope of %s is a manifest or index too", errUnfit, ev.Manifest.Digest)
	}
	key := w.key(list[0].Chain)
	for _, d := range []ocispec.Descriptor{e.subject, e.manifest} {
		if f, ok := w.document(ctx, d); ok {
			list = append(list, f)
		}
	}
	// What other programs read of a signature besides: the empty config.
	if c := configOf(ev.Document); c.Digest == ocispec.DescriptorEmptyJSON.Digest {
		list = append(list, file{w.see(c.Digest, ocispec.DescriptorEmptyJSON.Data), ocispec.DescriptorEmptyJSON.Data})
	}
	list = append(list, file{w.see(ev.Manifest.Digest, ev.Document), ev.Document})
	list, ok := w.room(list, key)
	if !ok {
		return errFull
	}
	return w.lay(list)
}

// lay writes files. The last, without which the others are nothing, comes when those
// last.
func (w *writer) lay(list []file) error {
	for i, f := range list {
		if i == len(list)-1 {
			if err := w.out.Sync(); err != nil {
				return err
			}
		}
		if err := w.out.Put(layout.BlobPath(f.Digest), f.raw); err != nil {
			return err
		}
	}
	if err := w.out.Sync(); err != nil {
		return err
	}
	now := w.o.Now().Round(0)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range list {
		f.Seen = now
		w.catalog.Add(f.Blob, maxListed)
		delete(w.broken, f.Digest)
		delete(w.losses, f.Digest)
		w.dirty = true
	}
	clear(w.lives)
	return nil
}

// envelope returns the descriptor of the one blob of e, which is of the first kind that
// reads its manifest.
func (w *writer) envelope(e evidence) (ocispec.Descriptor, error) {
	for _, k := range w.o.Kinds {
		if parts, err := k.Open(e.found.Document, e.subject); err == nil && len(parts) == 1 {
			return parts[0], nil
		}
	}
	return ocispec.Descriptor{}, errUnfit
}

// artifactType is that of the manifests of a kind.
func (w *writer) artifactType(kind string) string {
	for _, k := range w.o.Kinds {
		if k.Name() == kind {
			return k.ArtifactType()
		}
	}
	return ""
}

func configOf(raw []byte) ocispec.Descriptor {
	m, _ := oci.ReadHead(raw) // its kind has read it
	return m.Config
}

// document reads a manifest or index, of the node's or out of an archive.
func (w *writer) document(ctx context.Context, d ocispec.Descriptor) (f file, ok bool) {
	if d.Digest.Validate() != nil || d.Size > maxDocument {
		return f, false
	}
	ctx, cancel := context.WithTimeout(ctx, imageWait)
	defer cancel()
	raw, err := []byte(nil), fs.ErrNotExist
	if w.o.Image != nil {
		raw, err = w.o.Image(ctx, d)
	}
	if err != nil {
		raw, err = w.inArchive(ctx, d.Digest)
	}
	if err != nil || d.Digest.Algorithm().FromBytes(raw) != d.Digest {
		return f, false
	}
	return file{w.see(d.Digest, raw), raw}, true
}

// replace writes a file where it does not hold raw already.
func (w *writer) replace(name string, raw []byte) error {
	was, err := w.dir.Read(name, func(n int64) error {
		if n != int64(len(raw)) {
			return fs.ErrInvalid
		}
		return nil
	})
	if err == nil && bytes.Equal(was, raw) {
		return nil
	}
	if err := w.out.Put(name, raw); err != nil {
		return err
	}
	return w.out.Sync()
}

// index writes index.json for other programs.
func (w *writer) index() {
	if !w.dirty || w.lock == nil {
		return
	}
	list := []ocispec.Descriptor{}
	for _, b := range w.catalog.Blobs {
		if b.MediaType == "" || b.Lost {
			continue
		}
		d := ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size}
		if b.Subject != "" {
			d.ArtifactType = w.artifactType(b.Kind)
		}
		list = append(list, d)
	}
	slices.SortFunc(list, func(x, y ocispec.Descriptor) int { return strings.Compare(string(x.Digest), string(y.Digest)) })
	raw, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list})
	if err == nil {
		err = w.replace(ocispec.ImageIndexFile, raw)
	}
	if err != nil {
		w.say(err.Error())
		return
	}
	w.dirty = false
}
