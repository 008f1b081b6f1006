// Package store keeps, on the node, the signatures that verified, so that what
// started before a power cut starts after it without a network.
//
// It is an OCI image layout (image-spec v1.1, image-layout.md) that oras and
// notation can read: signature manifests with their envelopes, and the image
// manifests and indexes that they are over. An index is kept for another reason
// too: it shows that a manifest which runs by itself is part of what was signed.
//
// # What it is not
//
// It is no list of verdicts. What is in it is found as in any other source, and
// checked again under the policy in force each time that somebody asks. Whoever
// can write to the directory can make signatures go away, and can not make one.
//
// # How it is kept
//
// One goroutine (Run) writes, of one process on the node, which holds a lock.
// Nothing is written for a decision: only for evidence that is new, once a day for
// evidence whose image is still there (its time, in the inode), and index.json when
// the rest has been quiet for a while. Files are written beside their name, synced,
// renamed and synced again with their directory; what others refer to goes first.
// So a power cut leaves whole files and, of what was being written, files that
// nothing refers to, which go at the next start. What is in the store, the files
// below blobs say: index.json is written for other programs and never read.
//
// Who asks does not wait for the disk's writes, whatever state it is in.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// Defaults of Options.
const (
	DefaultSize = 64 << 20 // bytes
	DefaultKeep = 30 * 24 * time.Hour
)

// Bounds.
const (
	maxFiles    = 32768            // files looked at in the directory
	maxDocument = 4 << 20          // bytes of one file
	maxManifest = 64 << 10         // bytes of the manifest of a signature that is kept; they have about one thousand
	maxListed   = 1 << 16          // manifests that all indexes list; an index beyond shows nothing
	maxKept     = maxFiles / 4 * 3 // files written to it: all are read at the next start
	maxWaiting  = 4 << 20          // bytes of evidence that waits to be written
	patience    = 2 * time.Second  // longest that a question waits for the store to be read at the start
)

// Options of a Store. Log and Now are required.
type Options struct {
	Log *slog.Logger
	Now func() time.Time

	// Image reads the manifest or index d of an image that is on the node. Nil, or
	// where it fails: the evidence is kept without.
	Image func(ctx context.Context, d ocispec.Descriptor) ([]byte, error)

	// Changed is called when a bundle has come or is another one now: what was not
	// found before may be found. It must not block; nil is allowed.
	Changed func()

	// Size bounds the files of the store itself in bytes; zero means DefaultSize.
	Size int64
}

// A Store is the node's store. It is safe for concurrent use. Until Run has read the
// directory, questions wait a moment and are then not answered; a directory that
// cannot be read holds nothing.
type Store struct {
	dir    string
	o      Options
	wake   chan struct{}
	read   chan struct{} // closed when the directory was read, or could not be
	looked chan struct{} // closed when the bundles were
	glance chan struct{} // has the bundles looked at
	waited atomic.Bool   // somebody has waited for that in vain

	mu      sync.Mutex
	catalog                   // of the store itself
	place   *place            // where that lies; nil: the directory cannot be read
	bundles []*bundle         // by name; the list is made anew for each change
	late    map[string]bool   // of these, by name, those of which it is not known how they are; made anew
	wait    time.Duration     // bundlesWait; another in a test
	asked   time.Time         // since when the directory of bundles has not answered; zero: it has
	touch   func(name string) // called before an entry of the directory of bundles is read, and with "" before that is; for tests
	bounds  bounds            // usual; others in a test
	astray  string            // why not all bundles are read
	most    int               // maxKept; fewer in a test
	waiting []evidence
	size    int64                  // bytes of waiting
	dropped int                    // evidence that waiting had no room for
	suspect []digest.Digest        // signatures that could not be read
	live    map[digest.Digest]bool // of the last listing of the node's images; nil: none yet
	news    bool                   // live was not looked at yet
	keep    time.Duration
	trouble string
}

var _ verify.Keeper = (*Store)(nil)

// evidence waits to be written.
type evidence struct {
	subject  ocispec.Descriptor
	manifest ocispec.Descriptor // that the node selected from subject, where that is an index
	found    verify.Evidence
}

// New returns the store in the directory "store" below dir, which Run makes, and of
// the bundles in "bundles" below it. It does no I/O.
func New(dir string, o Options) *Store {
	if o.Size == 0 {
		o.Size = DefaultSize
	}
	return &Store{
		dir: dir, o: o, most: maxKept, wait: bundlesWait, touch: func(string) {}, bounds: usual, keep: DefaultKeep, catalog: newCatalog(),
		wake: make(chan struct{}, 1), read: make(chan struct{}), looked: make(chan struct{}), glance: make(chan struct{}, 1),
	}
}

// Name implements [verify.Source].
func (s *Store) Name() string { return "store " + filepath.Join(s.dir, "store") }

// Configure sets how long evidence is kept after its image left the node; zero
// means DefaultKeep.
func (s *Store) Configure(keep time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep = keep
	if keep == 0 {
		s.keep = DefaultKeep
	}
}

// Signatures returns how many signatures the store has, without those in bundles, and
// its size in bytes.
func (s *Store) Signatures() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.catalog.signatures(), s.used
}

// Has reports whether the store has the signature with that manifest, or is about to.
func (s *Store) Has(manifest digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.blobs[manifest]; x != nil && x.subject != "" {
		return true
	}
	return slices.ContainsFunc(s.waiting, func(w evidence) bool { return w.found.Manifest.Digest == manifest })
}

// Trouble says in one clause why evidence is not kept, or is empty.
func (s *Store) Trouble() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.read:
	default:
		if s.waited.Load() {
			return errLate.Error()
		}
	}
	if s.place != nil && s.place.hangs() {
		return errHangs.Error()
	}
	return s.trouble
}

// ready waits until done is closed. It waits once for all: who comes later, and finds
// that somebody has waited in vain, does not.
func (s *Store) ready(ctx context.Context, done chan struct{}) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	select {
	case <-done:
		return nil
	default:
	}
	if !s.waited.Load() {
		t := time.NewTimer(patience)
		defer t.Stop()
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
		case <-t.C:
			s.waited.Store(true)
		}
	}
	return fmt.Errorf("%w: it is still being read", verify.ErrUnreachable)
}

// A document is what a catalog has, and where to read it.
type document struct {
	*place
	ocispec.Descriptor
	bundle   string // that it lies in; empty: the store itself
	envelope int64  // bytes of that of a signature; negative: not known
}

// A relation is what a catalog is asked for by digest.
type relation func(*catalog) map[digest.Digest][]*blob

func signed(c *catalog) map[digest.Digest][]*blob { return c.signed }
func named(c *catalog) map[digest.Digest][]*blob  { return c.named }

// own returns the documents in the store itself. The error says that it cannot be
// read now; what is not in it is not known then.
func (s *Store) own(of relation, d digest.Digest) (list []document, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.place == nil {
		return nil, nil
	}
	if s.place.hangs() {
		err = errHangs
	}
	for _, b := range latest(of(&s.catalog)[d]) {
		x := document{place: s.place, Descriptor: b.descriptor(), envelope: -1}
		if e := s.blobs[b.envelope]; e != nil {
			x.envelope = e.size
		}
		list = append(list, x)
	}
	return list, err
}

// documents hands over the documents in the store and then those in bundles, until
// yield returns false. The error says why that was not everything.
func (s *Store) documents(ctx context.Context, of relation, d digest.Digest, yield func(document) bool) error {
	var failed error
	for _, part := range []struct {
		ready chan struct{}
		list  func(relation, digest.Digest) ([]document, error)
	}{{s.read, s.own}, {s.looked, s.bundled}} {
		if err := s.ready(ctx, part.ready); err != nil {
			return err
		}
		list, err := part.list(of, d)
		if failed == nil {
			failed = err
		}
		for _, x := range list {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
			}
			if !yield(x) {
				return nil
			}
		}
	}
	return failed
}

// Find implements [verify.Source]: first what the store has, and then what bundles
// have. A file that is damaged costs only itself: it is handed over with Err set, and
// if it is the store's, once, and then goes, so that it can be written anew.
func (s *Store) Find(ctx context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	var failed error
	whole := map[digest.Digest]bool{} // signatures that were handed over
	err := s.documents(ctx, signed, subject.Digest, func(x document) bool {
		if whole[x.Digest] {
			return true
		}
		if err := b.Signature(); err != nil {
			failed = cmp.Or(failed, err)
			return false
		}
		ev := verify.Evidence{Manifest: x.Descriptor}
		if x.bundle != "" {
			ev.From = "bundle " + verify.Clean(x.bundle, 80)
		}
		err := x.signature(ctx, &ev, subject, b)
		if whole[x.Digest] = err == nil; err != nil {
			if failed == nil && layout.Inconclusive(err) {
				failed = err
			}
			if x.bundle == "" && (errors.Is(err, layout.ErrDamaged) || errors.Is(err, fs.ErrNotExist)) {
				s.suspects(x.Digest)
			}
			ev.Err = fmt.Errorf("signature %s: %w", x.Digest, err)
		}
		if yield(ev) {
			return true
		}
		failed = nil
		return false
	})
	return cmp.Or(err, failed)
}

// signature reads manifest and envelope of the signature x into ev.
func (x document) signature(ctx context.Context, ev *verify.Evidence, subject ocispec.Descriptor, b *verify.Budget) error {
	raw, err := x.get(ctx, x.Descriptor, b.Manifest)
	if err != nil {
		return err
	}
	envelope, err := verify.EnvelopeIn(raw, subject)
	if err != nil {
		return err
	}
	if x.envelope >= 0 && x.envelope != envelope.Size {
		return fmt.Errorf("%w: the envelope has %d bytes, but its descriptor says %d", layout.ErrDamaged, x.envelope, envelope.Size)
	}
	blob, err := x.get(ctx, envelope, b.Envelope)
	if err != nil {
		return err
	}
	ev.Document, ev.MediaType, ev.Blob = raw, envelope.MediaType, blob
	return nil
}

// get reads a file of where x lies.
func (x document) get(ctx context.Context, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	raw, err := x.read(ctx, d, take)
	if err != nil && x.bundle != "" {
		err = fmt.Errorf("bundle %s: %w", verify.Quote(x.bundle, 80), err)
	}
	return raw, err
}

// Parents implements [verify.Keeper]. That something could not be read, Find says.
func (s *Store) Parents(ctx context.Context, d digest.Digest, b *verify.Budget, yield func(digest.Digest, []byte) bool) {
	whole := map[digest.Digest]bool{}
	_ = s.documents(ctx, named, d, func(x document) bool {
		if whole[x.Digest] {
			return true
		}
		if b.Page() != nil {
			return false
		}
		raw, err := x.get(ctx, x.Descriptor, b.Manifest)
		whole[x.Digest] = err == nil
		return err != nil || yield(x.Digest, raw)
	})
}

// Look has the bundles looked at now. It returns at once.
func (s *Store) Look() {
	select {
	case s.glance <- struct{}{}:
	default:
	}
}

// Keep implements [verify.Keeper].
func (s *Store) Keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	if ev.Document == nil || ev.Err != nil || len(ev.Document) > maxManifest {
		return
	}
	n := int64(len(ev.Document) + len(ev.Blob))
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.blobs[ev.Manifest.Digest]; x != nil && x.subject == subject.Digest {
		return
	}
	if slices.ContainsFunc(s.waiting, func(w evidence) bool { return w.found.Manifest.Digest == ev.Manifest.Digest }) {
		return
	}
	if s.size+n > maxWaiting {
		s.dropped++
		return
	}
	e := evidence{subject: subject, found: ev}
	if img.Manifest.Digest != subject.Digest {
		e.manifest = ocispec.Descriptor{MediaType: img.Manifest.MediaType, Digest: img.Manifest.Digest, Size: img.Manifest.Size}
	}
	s.waiting, s.size = append(s.waiting, e), s.size+n
	s.ring()
}

// Retain is told the digests of the manifests and indexes of all images that are on
// the node. Evidence of an image that has been gone for the configured time, and
// that listings of the last day at least did not have, is dropped. An empty listing
// says nothing: a node has images. It returns at once; live must not be changed
// after.
func (s *Store) Retain(live map[digest.Digest]bool) {
	if len(live) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live, s.news = live, true
	s.ring()
}

// suspects has a signature that could not be read looked at.
func (s *Store) suspects(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.suspect) < maxFiles && !slices.Contains(s.suspect, d) {
		s.suspect = append(s.suspect, d)
	}
	s.ring()
}

func (s *Store) ring() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// say logs what keeps evidence from being kept, once, and that it is over.
func (s *Store) say(trouble string) {
	s.mu.Lock()
	was := s.trouble
	s.trouble = trouble
	s.mu.Unlock()
	if trouble != "" && trouble != was {
		s.o.Log.Warn("verified signatures are not kept on disk: after a restart the mirrors are asked again", "store", s.Name(), "error", trouble)
	} else if trouble == "" && was != "" {
		s.o.Log.Info("verified signatures are kept on disk again", "store", s.Name())
	}
}

// open opens the directory, which it makes where there is none.
func (s *Store) open() (state, root *os.Root, err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, nil, err
	}
	if state, err = os.OpenRoot(s.dir); err != nil {
		return nil, nil, err
	}
	// A link that leads out of the state directory is not followed. OpenRoot waits
	// for whoever writes to a pipe, so that it is looked at before.
	info, err := state.Stat("store")
	if errors.Is(err, fs.ErrNotExist) {
		if err = state.Mkdir("store", 0o700); err == nil {
			info, err = state.Stat("store")
		}
	}
	if err == nil && !info.IsDir() {
		err = errors.New("store is not a directory")
	}
	if err == nil {
		root, err = state.OpenRoot("store")
	}
	if err != nil {
		state.Close()
		return nil, nil, err
	}
	return state, root, nil
}
