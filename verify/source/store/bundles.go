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
	maxBundles   = 64       // entries looked at; dot files are not counted
	maxEntries   = 4096     // entries read of the directory
	maxDocuments = 32768    // manifests and indexes read of all bundles
	maxInTars    = 1 << 16  // files in all bundles that are tar files
	maxBundle    = 64 << 20 // bytes of manifests and indexes read of one bundle
	maxDepth     = 4        // indexes below index.json
)

const (
	bundlesEvery = 30 * time.Second       // between two looks that nothing asked for
	bundlesRest  = 200 * time.Millisecond // after a change before the look, and ten times that at most
	badFirst     = time.Minute            // before a bundle that could not be read whole is read again
	badLast      = time.Hour              // the same, later
)

// A bundle is an entry of the directory. It does not change.
type bundle struct {
	name    string
	at      [5]stamp // what it was when it was read
	place   *place   // nil: nothing can be read of it
	catalog catalog
	takes   limits // of what all bundles may take
	trouble string // why not all of it can be read

	tries int // in a row that left trouble
	due   time.Time
}

// limits bound what bundles take of memory and time.
type limits struct {
	documents int // manifests and indexes
	links     int // what those name
	inTar     int // files in tar files, each of which is remembered
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
		if b.place != nil && b.place.hangs() {
			one.Trouble = errHangs.Error()
		}
		list = append(list, one)
	}
	return list, s.astray
}

// bundled is own for the bundles. It takes one document of each in turn, so that none
// that has many leaves no budget for the others.
func (s *Store) bundled(of relation, d digest.Digest) (list []document, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var each [][]document
	for _, b := range s.bundles {
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
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, b := range s.bundles {
			b.place.close()
		}
		s.bundles = nil
	}()
	for first := true; ; first = false {
		if notify != nil {
			_ = notify.Add(dir) // it may be another one now; what cannot be watched, the timer finds
		}
		news := s.survey(ctx, dir)
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

// survey brings the bundles up to date with the directory, and reports whether
// something may be found that was not before.
func (s *Store) survey(ctx context.Context, dir string) (news bool) {
	names, astray := entries(dir)
	s.mu.Lock()
	old, was := s.bundles, s.astray
	s.mu.Unlock()
	if astray != "" && astray != was {
		s.o.Log.Warn("not all bundles are read", "directory", dir, "error", astray)
	}
	next := make([]*bundle, 0, len(names))
	for _, name := range names {
		var before *bundle
		after, found := slices.BinarySearchFunc(old, name, func(b *bundle, name string) int { return strings.Compare(b.name, name) })
		if found {
			before = old[after]
			after++
		}
		at := stampsOf(filepath.Join(dir, name))
		if at[0] == (stamp{}) {
			continue // it went meanwhile
		}
		if before != nil && before.at == at && (before.trouble == "" || s.o.Now().Before(before.due)) {
			next = append(next, before)
			continue
		}
		left := limits{maxDocuments, maxListed, maxInTars}
		for _, b := range slices.Concat(next, old[after:]) {
			left.documents -= b.takes.documents
			left.links -= b.takes.links
			left.inTar -= b.takes.inTar
		}
		b := readBundle(ctx, filepath.Join(dir, name), left)
		if ctx.Err() != nil {
			for _, b := range append(next, b) {
				if !slices.Contains(old, b) {
					b.place.close()
				}
			}
			return false
		}
		b.name, b.at = name, at
		s.report(dir, before, b)
		next = append(next, b)
		news = news || b.place != nil && (before == nil || before.at != at || before.trouble != b.trouble)
	}
	s.mu.Lock()
	s.bundles, s.astray = next, astray
	s.mu.Unlock()
	for _, b := range old {
		if slices.Contains(next, b) {
			continue
		}
		b.place.close()
		if !slices.ContainsFunc(next, func(n *bundle) bool { return n.name == b.name }) {
			s.o.Log.Info("a bundle is gone", "bundle", verify.Clean(b.name, 128))
		}
	}
	return news
}

// report logs what was read, and notes when what could not be is read again.
func (s *Store) report(dir string, before, b *bundle) {
	name := verify.Clean(b.name, 128)
	if b.trouble == "" {
		s.o.Log.Info("a bundle was read", "bundle", name, "signatures", b.catalog.signatures())
		return
	}
	if before == nil || before.trouble != b.trouble {
		s.o.Log.Warn("a bundle cannot be read, or not all of it", "bundle", name, "directory", dir, "error", b.trouble, "signatures", b.catalog.signatures())
	}
	if before != nil && before.at == b.at {
		b.tries = before.tries + 1
	}
	b.due = s.o.Now().Add(min(badFirst<<min(b.tries, 10), badLast))
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
func readBundle(ctx context.Context, name string, left limits) (b *bundle) {
	b = &bundle{catalog: newCatalog()}
	var dir *layout.Dir
	defer func() {
		if p := recover(); p != nil {
			if dir != nil {
				dir.Close()
			}
			b = &bundle{catalog: newCatalog(), trouble: verify.Clean(fmt.Sprintf("panic while reading it: %v", p), 256)}
		}
	}()
	dir, err := openBundle(ctx, name)
	r := &reading{ctx: ctx, dir: dir, catalog: &b.catalog, left: left, bytes: maxBundle, seen: map[verify.Target]bool{}}
	if err == nil {
		if err = r.run(); err != nil {
			dir.Close()
		}
	}
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
		return nil, errors.New("it is neither a directory nor a file with a name that ends in .tar")
	}
	return layout.Open(ctx, name, nil)
}

// A reading is how far a bundle was read.
type reading struct {
	ctx      context.Context
	dir      *layout.Dir
	catalog  *catalog
	left     limits // links: in all
	bytes    int64  // left
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
func (r *reading) run() error {
	if n := r.dir.Tar().Files(); n > r.left.inTar {
		return fmt.Errorf("%w: more than %d files in all bundles that are tar files", verify.ErrBudget, maxInTars)
	}
	list, err := r.dir.Entries(r.take)
	if err != nil {
		return err
	}
	r.follow(list, 0)
	return r.ctx.Err()
}

// follow reads the manifests and indexes in list, and what those indexes list.
func (r *reading) follow(list []ocispec.Descriptor, depth int) {
	for _, d := range list {
		t := verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		if !isManifest(d.MediaType) && !isIndex(d.MediaType) || r.seen[t] || r.ctx.Err() != nil {
			continue
		}
		r.seen[t] = true
		if r.left.documents <= 0 {
			r.fail(fmt.Errorf("%w: more than %d manifests and indexes in all bundles", verify.ErrBudget, maxDocuments))
			return
		}
		r.left.documents--
		raw, err := r.dir.Blob(d, r.take)
		if errors.Is(err, fs.ErrNotExist) {
			continue // as of platforms that this node has nothing of
		}
		if err != nil {
			r.fail(err)
			continue
		}
		b := see(d.Digest, raw)
		if (b.subject != "" || len(b.names) > 0) && !r.catalog.add(b, r.left.links) {
			r.fail(fmt.Errorf("%w: indexes that list more than %d manifests in all bundles", verify.ErrBudget, maxListed))
		}
		if !isIndex(b.mediaType) {
			continue
		}
		if depth == maxDepth {
			r.fail(fmt.Errorf("%w: indexes more than %d deep", verify.ErrBudget, maxDepth))
			continue
		}
		inner, err := layout.EntriesOf(raw)
		if err != nil {
			r.fail(fmt.Errorf("%s: %w", d.Digest, err))
			continue
		}
		r.follow(inner, depth+1)
	}
}
