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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
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
	errFull    = errors.New("it is full of signatures of images that are on the node, or were an hour ago")
	errStuffed = errors.New("there are files in it that cannot be read, or too many, and those that can leave no room: remove the directory, and what is signed is looked for again")
)

// A writer is what Run holds.
type writer struct {
	*Store
	state   *os.Root
	dir     *layout.Dir
	lock    *os.File
	loaded  bool                        // the directory was read
	partial bool                        // but not all of it
	full    bool                        // there was no room for what came last
	dirty   bool                        // index.json may not say what there is
	serial  int                         // numbers unfinished files
	moved   map[string]bool             // directories in which names have changed that may not last yet
	lacking map[digest.Digest]time.Time // signatures without a document of their image, and when that is tried again
}

// Run reads the directory and the bundles, looks at those when they change, and
// writes what Keep and Retain ask for, until ctx ends and what waits was written once
// more. It is called once. What fails is logged and tried again; it returns nil.
func (s *Store) Run(ctx context.Context) error {
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(ctx)
	}()
	defer func() {
		select {
		case <-watched:
		case <-time.After(imageWait): // a medium that hangs does not keep the program from its end
		}
	}()
	w := &writer{Store: s, moved: map[string]bool{}, lacking: map[digest.Digest]time.Time{}}
	defer w.close()
	w.try(ctx)
	close(s.read)
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
	w.place.close()
	w.place = nil
	w.mu.Unlock()
	if w.lock != nil {
		w.lock.Close()
	}
	if w.dir != nil {
		w.dir.Root.Close()
		w.state.Close()
	}
	w.lock, w.dir, w.state, w.loaded = nil, nil, nil, false
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
		w.state, w.dir = state, &layout.Dir{Root: root}
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
	if err == nil && syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
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
		if err := w.mkdir(name); err != nil {
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
	w.mend()
	trouble := ""
	for {
		w.retain(ctx)
		w.mu.Lock()
		if n := w.dropped; n > 0 {
			w.dropped = 0
			w.o.Log.Warn("verified signatures came faster than they could be kept on disk", "store", w.Name(), "signatures", n)
		}
		if len(w.waiting) == 0 {
			w.mu.Unlock()
			if trouble == "" && w.full {
				trouble = w.fullness().Error()
			}
			w.say(trouble)
			return true
		}
		e := w.waiting[0]
		w.mu.Unlock()
		listed := w.listed() // before: a listing that comes meanwhile was not looked at
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
		w.waiting, w.size = slices.Delete(w.waiting, 0, 1), w.size-int64(len(e.found.Document)+len(e.found.Blob))
		w.mu.Unlock()
	}
}

// fullness is what is in the way of what has no room.
func (w *writer) fullness() error {
	if w.partial {
		return errStuffed
	}
	return errFull
}

func (w *writer) listed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.live != nil
}

var errUnfit = errors.New("the evidence is not what it seemed to be")

// A file is one to be written.
type file struct {
	*blob
	raw []byte
}

// write keeps one signature with the documents of its image.
func (w *writer) write(ctx context.Context, e evidence) error {
	ev := e.found
	envelope, err := verify.EnvelopeIn(ev.Document, e.subject)
	if err != nil || ev.Manifest.Digest.Validate() != nil || ev.Manifest.Digest.Algorithm().FromBytes(ev.Document) != ev.Manifest.Digest ||
		envelope.Digest.Algorithm().FromBytes(ev.Blob) != envelope.Digest || len(ev.Document) > maxDocument || len(ev.Blob) > maxDocument {
		return fmt.Errorf("%w: signature %s", errUnfit, ev.Manifest.Digest)
	}
	list := []file{{see(envelope.Digest, ev.Blob), ev.Blob}}
	for _, d := range []ocispec.Descriptor{e.subject, e.manifest} {
		if f, ok := w.document(ctx, d); ok {
			list = append(list, f)
		}
	}
	// What notation reads of a signature besides: the empty config.
	if c := configOf(ev.Document); c.Digest == ocispec.DescriptorEmptyJSON.Digest {
		list = append(list, file{see(c.Digest, ocispec.DescriptorEmptyJSON.Data), ocispec.DescriptorEmptyJSON.Data})
	}
	list = append(list, file{see(ev.Manifest.Digest, ev.Document), ev.Document})
	list, ok := w.room(list)
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
			if err := w.sync(); err != nil {
				return err
			}
		}
		if err := w.put(layout.BlobPath(f.digest), f.raw); err != nil {
			return err
		}
	}
	if err := w.sync(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range list {
		f.seen = w.o.Now().Round(0)
		w.add(f.blob, maxListed)
		w.dirty = true
	}
	return nil
}

func configOf(raw []byte) ocispec.Descriptor {
	var m struct {
		Config ocispec.Descriptor `json:"config"`
	}
	_ = json.Unmarshal(raw, &m) // EnvelopeIn has read it
	return m.Config
}

// document reads a manifest or index, of the node's or out of a bundle.
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
		raw, err = w.inBundle(ctx, d.Digest)
	}
	if err != nil || d.Digest.Algorithm().FromBytes(raw) != d.Digest {
		return f, false
	}
	return file{see(d.Digest, raw), raw}, true
}

// put writes a file so that it is there whole or not at all.
func (w *writer) put(name string, raw []byte) error {
	root := w.dir.Root
	if err := w.mkdir(path.Dir(name)); err != nil {
		return err
	}
	w.serial++
	temp := path.Join(path.Dir(name), unfinished+strconv.Itoa(w.serial))
	if err := root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		w.moved[path.Dir(name)] = true
		err = root.Rename(temp, name)
	}
	if err != nil {
		_ = root.Remove(temp)
	}
	return err
}

// mkdir makes a directory whose parent is there, where there is none.
func (w *writer) mkdir(name string) error {
	if name == "." {
		return nil
	}
	err := w.dir.Root.Mkdir(name, 0o700)
	if err == nil {
		w.moved[path.Dir(name)] = true
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// sync makes changes of names last.
func (w *writer) sync() error {
	for name := range w.moved {
		f, err := w.dir.Root.Open(name)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return err
		}
		delete(w.moved, name)
	}
	return nil
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
	if err := w.put(name, raw); err != nil {
		return err
	}
	return w.sync()
}

// index writes index.json for other programs.
func (w *writer) index() {
	if !w.dirty || w.lock == nil {
		return
	}
	w.mu.Lock()
	list := []ocispec.Descriptor{}
	for _, b := range w.blobs {
		if b.mediaType == "" {
			continue
		}
		d := ocispec.Descriptor{MediaType: b.mediaType, Digest: b.digest, Size: b.size}
		if b.subject != "" {
			d.ArtifactType = verify.ArtifactTypeNotation
		}
		list = append(list, d)
	}
	w.mu.Unlock()
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

// room makes room for those of list that are not there yet, and returns them. What is
// on the node, or may be, does not have to go. What goes may take with it what list was to share.
func (w *writer) room(list []file) (missing []file, ok bool) {
	now := w.o.Now()
	for {
		missing = nil
		var need int64
		w.mu.Lock()
		for _, f := range list {
			if w.blobs[f.digest] == nil {
				missing, need = append(missing, f), need+f.size
			}
		}
		fits := need <= w.o.Size-w.used && len(missing) <= w.most-len(w.blobs)
		var oldest *blob
		for _, list := range w.signed {
			for _, b := range list {
				if !fits && w.departed(b, now) && (oldest == nil || b.seen.Before(oldest.seen)) {
					oldest = b
				}
			}
		}
		w.mu.Unlock()
		if fits {
			return missing, true
		}
		if need > w.o.Size || oldest == nil || w.remove(oldest) != nil {
			return nil, false
		}
		w.tidy(oldest)
	}
}

// alive reports whether the last listing had an image that b is a signature for: its
// subject, or what that leads to, down to the config. The lock must be held.
func (s *Store) alive(b *blob) bool { return s.leads(b.subject, 2) }

func (s *Store) leads(to digest.Digest, depth int) bool {
	if s.live[to] {
		return true
	}
	x := s.blobs[to]
	return x != nil && depth > 0 && slices.ContainsFunc(x.names, func(d digest.Digest) bool { return s.leads(d, depth-1) })
}

// departed reports whether the image of b is not on the node: no listing has had it
// for an hour, or this process's have not and for days it was not seen before. The
// lock must be held.
func (s *Store) departed(b *blob, now time.Time) bool {
	return !b.gone.IsZero() && !s.alive(b) && (now.Sub(b.gone) >= roomAfter || now.Round(0).Sub(b.seen) > 2*freshEvery)
}

// remove removes a file, and what is known of it.
func (w *writer) remove(b *blob) error {
	if err := w.dir.Root.Remove(layout.BlobPath(b.digest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forget(b)
	w.dirty = true
	return nil
}

// tidy removes what no signature needs: its envelope, the document that it is over,
// and where that is an index, the manifests that it lists. Where not every file could
// be read nobody knows what those need, and only what belonged to gone is removed.
func (w *writer) tidy(gone ...*blob) {
	w.mu.Lock()
	needed := map[digest.Digest]bool{ocispec.DescriptorEmptyJSON.Digest: true}
	for _, list := range w.signed {
		w.needs(needed, list)
	}
	theirs := map[digest.Digest]bool{}
	w.needs(theirs, gone)
	var useless []*blob
	for d, b := range w.blobs {
		if !needed[d] && (!w.partial || theirs[d]) {
			useless = append(useless, b)
		}
	}
	w.mu.Unlock()
	for _, b := range useless {
		_ = w.remove(b)
	}
}

// needs adds the files of signatures to set. The lock must be held.
func (s *Store) needs(set map[digest.Digest]bool, signatures []*blob) {
	for _, b := range signatures {
		set[b.digest], set[b.envelope], set[b.subject] = true, true, true
		if index := s.blobs[b.subject]; index != nil {
			for _, d := range index.names {
				set[d] = true
			}
		}
	}
}

// mend looks at signatures that could not be read, and removes what is not what its
// digest says, and a signature that has no envelope: then it can be kept anew.
func (w *writer) mend() {
	w.mu.Lock()
	list := w.suspect
	w.suspect = nil
	w.mu.Unlock()
	for _, d := range list {
		w.mu.Lock()
		sig := w.blobs[d]
		w.mu.Unlock()
		if sig == nil {
			continue
		}
		lost := false
		for _, d := range []digest.Digest{sig.digest, sig.envelope} {
			if d == "" {
				continue
			}
			raw, err := w.dir.Read(layout.BlobPath(d), func(n int64) error {
				if n > maxDocument {
					return layout.ErrDamaged
				}
				return nil
			})
			if err == nil && d.Algorithm().FromBytes(raw) == d || layout.Inconclusive(err) {
				continue
			}
			lost = true
			w.mu.Lock()
			b := w.blobs[d]
			w.mu.Unlock()
			if b != nil {
				_ = w.remove(b)
			}
		}
		if lost {
			w.o.Log.Warn("a signature in the store was damaged and is removed; the mirrors are asked for it again", "store", w.Name(), "signature", d.String())
			_ = w.remove(sig)
			w.tidy(sig)
		}
	}
}

// lacks reports whether a document that leads from the signature b to what is on the
// node is not in the store. The lock must be held.
func (w *writer) lacks(b *blob) bool {
	x := w.blobs[b.subject]
	if x == nil {
		return true
	}
	for _, d := range x.names {
		if w.live[d] && w.blobs[d] == nil && isIndex(x.mediaType) {
			return true
		}
	}
	return false
}

// complete gets what the signature b lacks: the runtime was away when it was kept, or
// the image's manifest came later.
func (w *writer) complete(ctx context.Context, b *blob) bool {
	raw, err := w.dir.Blob(b.descriptor(), func(int64) error { return nil })
	var m ocispec.Manifest
	if err != nil || verify.Bounded(raw) != nil || json.Unmarshal(raw, &m) != nil || m.Subject == nil {
		return false // it has its turn when it is asked for
	}
	f, ok := w.document(ctx, *m.Subject)
	if !ok {
		return false
	}
	list := []file{f}
	if isIndex(f.mediaType) {
		entries, _ := layout.EntriesOf(f.raw)
		for _, d := range entries {
			w.mu.Lock()
			here := w.live[d.Digest]
			w.mu.Unlock()
			if !here {
				continue
			}
			g, got := w.document(ctx, d)
			if ok = ok && got; got {
				list = append(list, g)
			}
		}
	}
	missing, room := w.room(list)
	if !room {
		return false
	}
	return w.lay(missing) == nil && ok
}

// retain looks at a listing of the node's images.
func (w *writer) retain(ctx context.Context) {
	now := w.o.Now()
	w.mu.Lock()
	if !w.news {
		w.mu.Unlock()
		return
	}
	w.news = false
	var fresh, over, lacks []*blob
	for _, list := range w.signed {
		for _, b := range list {
			age := now.Round(0).Sub(b.seen)
			ahead := age < -freshEvery && !now.Before(earliest) // the clock was wrong then, and is not known to be now
			switch {
			case w.alive(b):
				b.gone = time.Time{}
				if w.lacks(b) && !now.Before(w.lacking[b.digest]) {
					lacks = append(lacks, b)
				}
				if age > min(freshEvery, w.keep/4) || ahead {
					fresh = append(fresh, b)
				}
			case b.gone.IsZero():
				b.gone = now
			case now.Sub(b.gone) < min(goneFor, w.keep):
			case age > w.keep:
				over = append(over, b)
			case ahead: // keep begins; not before a wrong clock had its day to be set
				fresh = append(fresh, b)
			}
		}
	}
	w.mu.Unlock()
	for _, b := range fresh {
		if w.dir.Root.Chtimes(layout.BlobPath(b.digest), now, now) == nil {
			w.mu.Lock()
			b.seen = now.Round(0)
			w.mu.Unlock()
		}
	}
	for _, b := range lacks {
		if w.complete(ctx, b) {
			delete(w.lacking, b.digest)
		} else {
			w.lacking[b.digest] = now.Add(wholeEvery)
		}
	}
	for _, b := range over {
		_ = w.remove(b)
		delete(w.lacking, b.digest)
	}
	if len(over) > 0 {
		w.o.Log.Info("signatures of images that have left the node are removed from the store", "store", w.Name(), "signatures", len(over))
		w.tidy(over...)
	}
}
