package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// bundlesName is the directory beside the store that bundles lie in.
const bundlesName = "bundles"

// Bounds of bundles.
const (
	maxBundles  = 64   // entries looked at; dot files are not counted
	maxEntries  = 4096 // entries read of the directory
	maxDepth    = 4    // indexes below index.json
	maxStuck    = 8    // readings of one entry under way
	maxStuckAll = 128  // and of all
)

// bounds of what is read of bundles.
type bounds struct {
	all   limits // of all of them
	reads int    // manifests and indexes read of one bundle
	bytes int64  // and bytes of these
	ofOne int    // signatures of one image remembered of one bundle
}

// usual bounds. index.json has room for half of the documents that are read of a
// bundle, and no configuration has more signatures of an image looked at.
var usual = bounds{limits{documents: 32768, links: maxListed, inTar: 1 << 16}, 1 << 16, 256 << 20, 1024}

const (
	bundlesEvery = 30 * time.Second       // between two looks that nothing asked for
	bundlesRest  = 200 * time.Millisecond // after a change before the look, and ten times that at most
	badFirst     = time.Minute            // before a bundle that could not be read whole is read again
	badLast      = time.Hour              // the same, later
	bundlesWait  = 5 * time.Second        // longest that a look waits for the disks of bundles, all together
	bundleWait   = 200 * time.Millisecond // and for each at least
)

// errLate is said of a bundle whose reading does not end, or has not yet.
var errLate = fmt.Errorf("%w: it is still being read, or its disk does not answer", verify.ErrUnreachable)

// errSilent is said where the directory itself does not say what is in it.
var errSilent = fmt.Errorf("%w: the disk of the directory of bundles does not answer", verify.ErrUnreachable)

// A bundle is an entry of the directory. It does not change.
type bundle struct {
	name    string
	at      [5]stamp // what it was when it was read
	place   *place   // nil: nothing can be read of it
	catalog catalog
	given   limits // what those before it had left of what all bundles may take
	takes   limits // of that
	cut     bool   // it would take more
	trouble string // why not all of it can be read

	tries int // in a row that left trouble
	due   time.Time
}

// limits bound what bundles take of memory. Who is first by name has it: then it is
// the same whichever came first.
type limits struct {
	documents int // manifests and indexes
	links     int // what those name
	inTar     int // files in tar files, each of which is remembered
}

// less is what x leaves of l. That x is more happens: a bundle that is late keeps what
// it took before another came that goes before it.
func (l limits) less(x limits) limits {
	return limits{max(0, l.documents-x.documents), max(0, l.links-x.links), max(0, l.inTar-x.inTar)}
}

// within reports whether l is no more than x.
func (l limits) within(x limits) bool {
	return l.documents <= x.documents && l.links <= x.links && l.inTar <= x.inTar
}

// suits reports whether b, which was read before, is what would be read of the same
// file with what is left now.
func (b *bundle) suits(left limits) bool {
	return b.takes.within(left) && (!b.cut || b.given == left)
}

// A Bundle is how an entry of the directory of bundles fares.
type Bundle struct {
	Name       string
	Signatures int
	Trouble    string // what is wrong with it; empty: nothing
}

// Bundles says how bundles fare, by name, and in one clause why not all are read.
func (s *Store) Bundles() (list []Bundle, trouble string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.bundles {
		one := Bundle{b.name, b.catalog.signatures(), b.trouble}
		if s.late[b.name] {
			one.Trouble = errLate.Error()
		} else if b.place != nil && b.place.hangs() {
			one.Trouble = errHangs.Error()
		}
		list = append(list, one)
	}
	if !s.asked.IsZero() && s.o.Now().Sub(s.asked) > s.wait {
		return list, errSilent.Error()
	}
	return list, s.astray
}

// asks notes that the directory of bundles is asked something from now on, or has
// answered. Nobody can interrupt that either, and where it lies on a disk that died it
// may never end: no bundle comes or goes any more, and that is said.
func (s *Store) asks(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = now
}

// bundled is own for the bundles. It takes one document of each in turn, so that none
// that has many leaves no budget for the others.
func (s *Store) bundled(of relation, d digest.Digest) (list []document, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var each [][]document
	for _, b := range s.bundles {
		if s.late[b.name] && err == nil {
			err = fmt.Errorf("bundle %s: %w", verify.Quote(b.name, 80), errLate)
		}
		if b.place == nil {
			continue
		}
		if b.place.hangs() && err == nil {
			err = fmt.Errorf("bundle %s: %w", verify.Quote(b.name, 80), errHangs)
		}
		var its []document
		for _, x := range latest(of(&b.catalog)[d]) {
			its = append(its, document{place: b.place, Descriptor: x.descriptor(), bundle: b.name, envelope: -1})
		}
		each = append(each, its)
	}
	for i, more := 0, true; more; i++ {
		more = false
		for _, its := range each {
			if i < len(its) {
				list, more = append(list, its[i]), true
			}
		}
	}
	return list, err
}

// inBundle reads a manifest or index of a bundle.
func (s *Store) inBundle(ctx context.Context, d digest.Digest) ([]byte, error) {
	s.mu.Lock()
	var at *place
	var x ocispec.Descriptor
	for _, b := range s.bundles {
		if have := b.catalog.blobs[d]; have != nil && b.place != nil && at == nil {
			at, x = b.place, have.descriptor()
		}
	}
	s.mu.Unlock()
	if at == nil {
		return nil, fs.ErrNotExist
	}
	return at.read(ctx, x, func(int64) error { return nil })
}

// watch looks at the bundles when they change, and now and then, until ctx ends.
func (s *Store) watch(ctx context.Context) {
	dir := filepath.Join(s.dir, bundlesName)
	s.asks(s.o.Now())
	s.touch("")
	_ = os.MkdirAll(dir, 0o700) // where it cannot be made there is no bundle
	var events chan fsnotify.Event
	var lost chan error
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		s.o.Log.Warn("bundles are noticed late", "error", err.Error(), "within", bundlesEvery.String())
	} else {
		defer notify.Close()
		events, lost = notify.Events, notify.Errors
	}
	h := &shelf{Store: s, dir: dir, entries: map[string]*entry{}}
	defer h.close()
	for first := true; ; first = false {
		s.asks(s.o.Now())
		if notify != nil {
			_ = notify.Add(dir) // it may be another one now; what cannot be watched, the timer finds
		}
		news := h.survey(ctx)
		if first {
			close(s.looked)
		} else if news && s.o.Changed != nil {
			s.o.Changed()
		}
		every, rest := time.NewTimer(bundlesEvery), time.NewTimer(0)
		rest.Stop()
		changes := 0
	wait:
		for {
			select {
			case <-ctx.Done():
				every.Stop()
				rest.Stop()
				return
			case e, open := <-events:
				if !open {
					events = nil
				} else if e.Op&(fsnotify.Create|fsnotify.Rename|fsnotify.Remove) != 0 { // who writes in place renames at the end, or the timer finds it
					if changes++; changes <= 10 {
						rest.Reset(bundlesRest)
					}
				}
			case _, open := <-lost:
				if !open {
					lost = nil
					continue
				}
				break wait
			case <-s.glance:
				break wait
			case <-rest.C:
				break wait
			case <-every.C:
				break wait
			}
		}
		every.Stop()
		rest.Stop()
	}
}

// A shelf is the directory of bundles as watch sees it.
//
// Each entry is read by a goroutine of its own. Nobody can interrupt a read, and that of
// a disk that dies may never end. Then the entry is late: it costs the others one wait,
// counts when the read ends after all, and is tried again from time to time, since it
// may lie on another disk by then.
type shelf struct {
	*Store
	dir string

	lock    sync.Mutex
	over    bool              // nobody takes a result any more
	entries map[string]*entry // that are read, or were
	readers int               // goroutines under way
}

// An entry is a name in the directory. Its fields are guarded by shelf.lock.
type entry struct {
	readers int
	late    bool // nobody waits for them
	tries   int  // in a row that were late
	due     time.Time
	serial  int // of the reader that was started last
	latest  int // of the one that ended last
	result  *result
}

// A result is what a reader found.
type result struct {
	bundle *bundle // nil: the entry has gone
}

func (h *shelf) close() {
	h.lock.Lock()
	h.over = true
	for _, e := range h.entries {
		e.drop()
	}
	h.lock.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, b := range h.bundles {
		b.place.close()
	}
	h.bundles = nil
}

// drop forgets a result that nobody has taken.
func (e *entry) drop() {
	if e.result != nil {
		e.result.bundle.close()
	}
	e.result = nil
}

// close closes b, which may be nil.
func (b *bundle) close() {
	if b != nil {
		b.place.close()
	}
}

// start begins to read an entry, and returns what is closed at the end. before is what
// was read of it last, or nil, and is the result where nothing has changed.
func (h *shelf) start(ctx context.Context, e *entry, name string, before *bundle, left limits) <-chan struct{} {
	h.readers++
	e.readers++
	e.serial++
	serial, now, touch, bounds, done := e.serial, h.o.Now(), h.touch, h.bounds, make(chan struct{})
	go func() {
		defer close(done)
		at := filepath.Join(h.dir, name)
		touch(name)
		stamps := stampsOf(at)
		var b *bundle
		switch {
		case stamps[0] == stamp{}:
		case before != nil && before.at == stamps && before.suits(left) && (before.trouble == "" || now.Before(before.due)):
			b = before
		default:
			b = readBundle(ctx, at, left, bounds)
			b.name, b.at = name, stamps
		}
		h.lock.Lock()
		defer h.lock.Unlock()
		h.readers--
		e.readers--
		if h.over || serial < e.latest {
			if b != before {
				b.close()
			}
			return
		}
		e.drop()
		e.latest, e.result = serial, &result{b}
		if e.late {
			h.Look()
		}
	}()
	return done
}

// read reads the entry name, of which before was read last. It returns nil where the
// entry has gone, and where it is not known in time how it is, before, late.
func (h *shelf) read(ctx context.Context, name string, before *bundle, left limits, up <-chan struct{}) (b *bundle, late bool) {
	h.lock.Lock()
	e := h.entries[name]
	if e == nil {
		e = &entry{}
		h.entries[name] = e
	}
	if e.result != nil { // of one that was late: it may have changed since
		before, e.result = e.result.bundle, nil
	}
	now := h.o.Now()
	var done <-chan struct{}
	if e.readers == 0 || e.readers < maxStuck && h.readers < maxStuckAll && !now.Before(e.due) {
		e.late = false
		done = h.start(ctx, e, name, before, left)
	}
	h.lock.Unlock()
	if done != nil {
		grace := time.NewTimer(bundleWait)
		select {
		case <-done:
		case <-ctx.Done():
		case <-grace.C:
			select {
			case <-done:
			case <-ctx.Done():
			case <-up:
			}
		}
		grace.Stop()
	}
	h.lock.Lock()
	defer h.lock.Unlock()
	if r := e.result; r != nil {
		if e.result = nil; before != r.bundle && !slices.Contains(h.bundles, before) {
			before.close()
		}
		e.tries = 0
		return r.bundle, false
	}
	e.late = true
	if done != nil {
		e.due = now.Add(min(badFirst<<min(e.tries, 10), badLast))
		e.tries++
	}
	return before, true
}

// survey brings the bundles up to date with the directory, and reports whether
// something may be found that was not before.
func (h *shelf) survey(ctx context.Context) (news bool) {
	h.touch("")
	names, astray := entries(h.dir)
	h.asks(time.Time{})
	h.mu.Lock()
	old, wasLate, was, wait := h.bundles, h.late, h.astray, h.wait
	h.mu.Unlock()
	if astray != "" && astray != was {
		h.o.Log.Warn("not all bundles are read", "directory", h.dir, "error", astray)
	}
	up := make(chan struct{})
	timer := time.AfterFunc(wait, func() { close(up) })
	defer timer.Stop()
	next, late, left := make([]*bundle, 0, len(names)), map[string]bool{}, h.bounds.all
	for _, name := range names {
		var before *bundle
		if i, found := slices.BinarySearchFunc(old, name, func(b *bundle, name string) int { return strings.Compare(b.name, name) }); found {
			before = old[i]
		}
		b, isLate := h.read(ctx, name, before, left, up)
		if ctx.Err() != nil {
			for _, b := range append(next, b) {
				if !slices.Contains(old, b) {
					b.close()
				}
			}
			return false
		}
		if isLate {
			late[name] = true
			if b == nil {
				b = &bundle{name: name, catalog: newCatalog(), trouble: errLate.Error()}
			}
			if !wasLate[name] {
				h.o.Log.Warn("a bundle is still being read, or its disk does not answer; others are read meanwhile", "bundle", verify.Clean(name, 128), "directory", h.dir)
			}
		}
		if b == nil {
			continue // it went meanwhile
		}
		left = left.less(b.takes)
		if next = append(next, b); b == before || isLate {
			continue
		}
		h.report(before, b)
		news = news || b.place != nil && (before == nil || before.at != b.at || before.trouble != b.trouble)
	}
	h.mu.Lock()
	h.bundles, h.late, h.astray = next, late, astray
	h.mu.Unlock()
	for _, b := range old {
		if slices.Contains(next, b) {
			continue
		}
		b.close()
		if !slices.ContainsFunc(next, func(n *bundle) bool { return n.name == b.name }) {
			h.o.Log.Info("a bundle is gone", "bundle", verify.Clean(b.name, 128))
		}
	}
	h.lock.Lock()
	defer h.lock.Unlock()
	for name, e := range h.entries {
		if !slices.ContainsFunc(next, func(b *bundle) bool { return b.name == name }) {
			if e.drop(); e.readers == 0 {
				delete(h.entries, name)
			}
		}
	}
	return news
}

// report logs what was read, and notes when what could not be is read again.
func (h *shelf) report(before, b *bundle) {
	name := verify.Clean(b.name, 128)
	if b.trouble == "" {
		h.o.Log.Info("a bundle was read", "bundle", name, "signatures", b.catalog.signatures())
		return
	}
	if before == nil || before.trouble != b.trouble {
		h.o.Log.Warn("a bundle cannot be read, or not all of it", "bundle", name, "directory", h.dir, "error", b.trouble, "signatures", b.catalog.signatures())
	}
	if before != nil && before.at == b.at {
		b.tries = before.tries + 1
	}
	b.due = h.o.Now().Add(min(badFirst<<min(b.tries, 10), badLast))
}

// entries returns the names of what may be bundles, in order, and why that is not all.
func entries(dir string) (names []string, astray string) {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ""
	}
	if err == nil && !info.IsDir() { // opening a pipe would wait for who writes to it
		err = errors.New("it is not a directory")
	}
	var list []fs.DirEntry
	if err == nil {
		var f *os.File
		if f, err = os.Open(dir); err == nil {
			list, err = f.ReadDir(maxEntries)
			f.Close()
		}
	}
	for _, e := range list {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	if n := len(names); n > maxBundles {
		return names[:maxBundles], fmt.Sprintf("%d entries, of which the first %d by name are read", n, maxBundles)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return names, verify.Clean(err.Error(), 256)
	}
	return names, ""
}

// A stamp tells versions of a file apart. The zero stamp is that of none.
type stamp struct {
	mode              fs.FileMode
	size              int64
	modified, changed int64
	dev, inode        uint64
}

// stampsOf returns the stamps of a bundle, and where that is a directory of what
// changes in it when something comes or goes.
func stampsOf(name string) (s [5]stamp) {
	for i, inside := range []string{"", ocispec.ImageLayoutFile, ocispec.ImageIndexFile, "blobs/sha256", "blobs/sha512"} {
		info, err := os.Lstat(filepath.Join(name, inside))
		if err != nil {
			continue
		}
		s[i] = stamp{mode: info.Mode(), size: info.Size(), modified: info.ModTime().UnixNano()}
		s[i].identify(info)
		if i == 0 && !info.IsDir() {
			break
		}
	}
	return s
}

// readBundle reads the documents that index.json of a bundle leads to, as far as what
// is left goes. A panic in a parser costs only the bundle.
func readBundle(ctx context.Context, name string, left limits, most bounds) (b *bundle) {
	b = &bundle{given: left, catalog: newCatalog()}
	var dir *layout.Dir
	defer func() {
		if p := recover(); p != nil {
			if dir != nil {
				dir.Close()
			}
			b = &bundle{given: left, catalog: newCatalog(), trouble: verify.Clean(fmt.Sprintf("panic while reading it: %v", p), 256)}
		}
	}()
	dir, err := openBundle(ctx, name)
	r := &reading{ctx: ctx, dir: dir, catalog: &b.catalog, left: left, most: most, bounds: most, seen: map[verify.Target]bool{}}
	if err == nil {
		if err = r.run(); err != nil {
			dir.Close()
		}
	}
	b.cut = r.cut
	if err != nil {
		b.catalog, b.trouble = newCatalog(), verify.Clean(err.Error(), 256)
		return b
	}
	b.place = newPlace(dir, dir.Close)
	b.takes = limits{left.documents - r.left.documents, b.catalog.links, dir.Tar().Files()}
	if r.failed != nil {
		b.trouble = verify.Clean(r.failed.Error(), 200)
		if r.failures > 1 {
			b.trouble += fmt.Sprintf(" (and %d more)", r.failures-1)
		}
	}
	return b
}

// openBundle opens what may be a bundle. Nothing is followed, and a pipe not waited
// for.
func openBundle(ctx context.Context, name string) (*layout.Dir, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() && (!info.Mode().IsRegular() || filepath.Ext(name) != ".tar") {
		return nil, errors.New("it is neither a directory nor a file with a name that ends in .tar, which tidewaiter bundle import makes of others")
	}
	return layout.Open(ctx, name, nil)
}

// A reading is how far a bundle was read.
type reading struct {
	ctx      context.Context
	dir      *layout.Dir
	catalog  *catalog
	left     limits // links: in all
	cut      bool   // that was not enough
	most     bounds
	bounds   // left of them; of bytes and reads
	seen     map[verify.Target]bool
	failed   error // the first that cost a document
	failures int
}

func (r *reading) fail(err error) {
	r.failures++
	r.failed = cmp.Or(r.failed, err)
}

// take takes the bytes of a document.
func (r *reading) take(n int64) error {
	if n > min(maxDocument, r.bytes) {
		return fmt.Errorf("%w: %d bytes, where %d are left for it", verify.ErrBudget, n, min(maxDocument, r.bytes))
	}
	r.bytes -= n
	return nil
}

// run reads everything. An error is one of the bundle as a whole.
//
// What a bundle holds of one image somebody else wrote than what it holds of the next,
// and must not use up what that needs. So the order is not theirs: what index.json lists
// goes first, and of that, small documents do, as signatures are; what is big, or lies
// deeper, comes after. And of one image no more signatures count than anybody looks at.
func (r *reading) run() error {
	if n := r.dir.Tar().Files(); n > r.left.inTar {
		r.cut = true
		return fmt.Errorf("%w: more than %d files in all bundles that are tar files", verify.ErrBudget, r.most.all.inTar)
	}
	list, err := r.dir.Entries(r.take)
	if err != nil {
		return err
	}
	level := r.fresh(nil, list)
	for depth := 0; len(level) > 0; depth++ {
		slices.SortFunc(level, func(x, y verify.Target) int {
			return cmp.Or(cmp.Compare(x.Size, y.Size), cmp.Compare(x.Digest, y.Digest), cmp.Compare(x.MediaType, y.MediaType))
		})
		var next []verify.Target
		for _, t := range level {
			if err := r.ctx.Err(); err != nil {
				return err
			}
			raw := r.document(t)
			if raw == nil || !isIndex(t.MediaType) {
				continue
			}
			if depth == maxDepth {
				r.fail(fmt.Errorf("%w: indexes more than %d deep", verify.ErrBudget, maxDepth))
				continue
			}
			inner, err := layout.EntriesOf(raw)
			if err != nil {
				r.fail(fmt.Errorf("%s: %w", t.Digest, err))
			}
			next = r.fresh(next, inner)
		}
		level = next
	}
	return nil
}

// fresh adds to list what is to be read of entries.
func (r *reading) fresh(list []verify.Target, entries []ocispec.Descriptor) []verify.Target {
	for _, d := range entries {
		t := verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		if !isManifest(d.MediaType) && !isIndex(d.MediaType) || r.seen[t] {
			continue
		}
		if r.reads == 0 {
			r.fail(fmt.Errorf("%w: more than %d manifests and indexes", verify.ErrBudget, r.most.reads))
			break
		}
		r.reads--
		r.seen[t] = true
		list = append(list, t)
	}
	return list
}

// document reads a manifest or index, and takes it into the catalog if it says anything
// about an image. It returns nil where there is none.
func (r *reading) document(t verify.Target) []byte {
	raw, err := r.dir.Blob(ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size}, r.take)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // as of platforms that this node has nothing of
	}
	if err != nil {
		r.fail(err)
		return nil
	}
	b := see(t.Digest, raw)
	switch {
	case b.subject == "" && len(b.names) == 0 || r.catalog.blobs[b.digest] != nil:
	case b.subject != "" && len(r.catalog.signed[b.subject]) == r.most.ofOne:
		r.fail(fmt.Errorf("%w: more than %d signatures of %s", verify.ErrBudget, r.most.ofOne, b.subject))
	case r.left.documents <= 0:
		r.cut = true
		r.fail(fmt.Errorf("%w: more than %d manifests and indexes in all bundles", verify.ErrBudget, r.most.all.documents))
	default:
		r.left.documents--
		if !r.catalog.add(b, r.left.links) {
			r.cut = true
			r.fail(fmt.Errorf("%w: indexes that list more than %d manifests in all bundles", verify.ErrBudget, r.most.all.links))
		}
	}
	return raw
}
