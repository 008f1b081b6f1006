// Package store keeps, on the node, the signatures that verified, so that what
// started before a power cut starts after it without a network.
//
// It is an OCI image layout (image-spec v1.1, image-layout.md) that oras and
// other programs can read: signature manifests with their envelopes, and the image
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
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
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
	maxManifest = oci.MaxSignature // bytes of the manifest of a signature that is kept; they have about one thousand
	maxListed   = 1 << 16          // manifests that all indexes list; an index beyond shows nothing
	maxKept     = maxFiles / 4 * 3 // files written to it: all are read at the next start
	maxWaiting  = 4 << 20          // bytes of evidence that waits to be written, see queue
)

// Options of a Store. Log and Now are required.
type Options struct {
	Log *slog.Logger
	Now func() time.Time

	// Image reads the manifest or index d of an image that is on the node. Nil, or
	// where it fails: the evidence is kept without.
	Image func(ctx context.Context, d ocispec.Descriptor) ([]byte, error)

	// Kinds are those of the evidence that it has.
	Kinds []verify.Kind

	// Archives are handed over after the store's own evidence of the same rank. Nil:
	// there are none.
	Archives Archives

	// Size bounds the files of the store itself in bytes; zero means DefaultSize.
	Size int64
}

// Archives are documents that others put on the node. They are safe for concurrent use.
type Archives interface {
	// Documents returns those that stand in a relation to d, in the order in which they
	// are handed over. The error says why that may not be all.
	Documents(ctx context.Context, of catalog.Relation, d digest.Digest, anchors []string) ([]catalog.Document, error)
	// Locate returns the manifest or index d, if there is one.
	Locate(d digest.Digest) (catalog.Document, bool)
}

// A Store is the node's store. It is safe for concurrent use. Until Run has read the
// directory, questions wait a moment and are then not answered; a directory that
// cannot be read holds nothing.
type Store struct {
	dir   string
	o     Options
	wake  chan struct{}
	start *catalog.Start // over when the directory was read, or could not be

	mu      sync.Mutex
	catalog catalog.Catalog // of the store itself
	reader  *catalog.Reader // of where that lies; nil: the directory cannot be read
	most    int             // maxKept; fewer in a test
	waiting queue
	suspect []digest.Digest                   // signatures and documents that could not be read
	instead map[digest.Digest][]digest.Digest // signatures that go when another is there, by that
	live    map[digest.Digest]bool            // of the last listing of the node's images; nil: none yet
	listed  int                               // listings that came
	done    int                               // listings that were looked at
	keep    time.Duration
	trusts  map[string]string      // names of trust anchors by thumbprint; made anew
	broken  map[digest.Digest]bool // documents that were damaged, which something that is kept names
	losses  map[digest.Digest]bool // files that were damaged, of which nobody knows what they were
	until   time.Time              // when that is over
	judges  func(digest.Digest)    // called before it is found out whether a subject is on the node; for tests
	trouble string
}

var _ verify.WritableSource = (*Store)(nil)

// New returns the store in the directory "store" below dir, which Run makes. It does no
// I/O.
func New(dir string, o Options) *Store {
	if o.Size == 0 {
		o.Size = DefaultSize
	}
	return &Store{
		dir: dir, o: o, most: maxKept, keep: DefaultKeep, catalog: catalog.New(), start: catalog.NewStart(), wake: make(chan struct{}, 1),
		instead: map[digest.Digest][]digest.Digest{}, broken: map[digest.Digest]bool{}, judges: func(digest.Digest) {},
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

// Trust names the certificates that the configuration in force trusts, by their SHA-256
// thumbprint in hex. The room is shared among these. The map must not change after.
func (s *Store) Trust(anchors map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trusts = anchors
}

// Signatures returns how many signatures the store has, without those in archives, and
// its size in bytes.
func (s *Store) Signatures() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.catalog.Signatures(), s.catalog.Used
}

// Has reports whether the store has the signature with that manifest, or is about to.
func (s *Store) Has(manifest digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.catalog.Blobs[manifest]; x != nil && x.Subject != "" && !x.Lost {
		return true
	}
	return s.waiting.has(manifest)
}

// Busy reports whether there is something to write or to remove that Keep, Supersede or
// Retain asked for.
func (s *Store) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting.list)+len(s.instead) > 0 || s.done != s.listed
}

// Trouble says in one clause why evidence is not kept, or is empty.
func (s *Store) Trouble() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.start.Late() {
		return catalog.ErrUnread.Error()
	}
	if s.reader != nil && s.reader.Hangs() {
		return catalog.ErrHangs.Error()
	}
	return s.trouble
}

// own returns the documents in the store itself, in the order in which they are handed
// over. The error says that it cannot be read now; what is not in it is not known then.
func (s *Store) own(of catalog.Relation, d digest.Digest, anchors []string) (list []catalog.Document, err error) {
	s.mu.Lock()
	if s.reader != nil {
		list = s.catalog.Documents(of, d, s.reader, anchors)
		if s.reader.Hangs() {
			err = catalog.ErrHangs
		}
	}
	s.mu.Unlock()
	return catalog.Order(list), err
}

// documents hands over the documents in the store and in archives, until yield returns
// false: first those that lead to one of anchors, and of equal ones those in the store.
// The error says why that was not everything.
func (s *Store) documents(ctx context.Context, of catalog.Relation, d digest.Digest, anchors []string, yield func(catalog.Document) bool) error {
	if err := s.start.Wait(ctx); err != nil {
		return err
	}
	rest, failed := s.own(of, d, anchors)
	stopped := false
	hand := func(list []catalog.Document) error {
		for _, x := range list {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
			}
			if stopped = !yield(x); stopped {
				return nil
			}
		}
		return nil
	}
	n := 0
	for n < len(rest) && rest[n].Rank == catalog.Fits {
		n++
	}
	if err := hand(rest[:n]); err != nil || stopped {
		return err
	}
	rest = rest[n:]
	if s.o.Archives != nil {
		more, err := s.o.Archives.Documents(ctx, of, d, anchors)
		failed = cmp.Or(failed, err)
		rest = append(rest, more...)
		slices.SortStableFunc(rest, func(x, y catalog.Document) int { return cmp.Compare(x.Rank, y.Rank) })
	}
	if err := hand(rest); err != nil || stopped {
		return err
	}
	return failed
}

// inArchive reads a manifest or index of an archive.
func (s *Store) inArchive(ctx context.Context, d digest.Digest) ([]byte, error) {
	if s.o.Archives == nil {
		return nil, fs.ErrNotExist
	}
	x, found := s.o.Archives.Locate(d)
	if !found {
		return nil, fs.ErrNotExist
	}
	return x.Read(ctx, x.Descriptor, func(int64) error { return nil })
}

// Find implements [verify.Source]: what the store and archives have, those first that
// lead to one of b.Anchors. A file that is damaged costs only itself: it is handed over
// with Err set, and the answer is inconclusive.
func (s *Store) Find(ctx context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	stopped, err := catalog.Find(ctx, s.documents, subject, b, s.lost, yield)
	if stopped {
		return nil
	}
	return cmp.Or(err, s.damage())
}

// lost has a document that could not be read looked at, if it is the store's own.
func (s *Store) lost(x catalog.Document) {
	if x.Archive == "" && !x.Lost {
		s.suspects(x.Digest)
	}
}

// damage says that a file was damaged which may have been any signature.
func (s *Store) damage() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.losses) == 0 || !s.o.Now().Before(s.until) {
		return nil
	}
	return fmt.Errorf("%w: damaged files were found in the store, %d, which may have been any signature (until %s)", verify.ErrUnreachable, len(s.losses), s.until.UTC().Format(time.RFC3339))
}

// Parents implements [verify.WritableSource]. Documents that have a signature which leads to one
// of b.Anchors go first, and those without any last.
func (s *Store) Parents(ctx context.Context, d digest.Digest, b *verify.Budget, yield func(digest.Digest, []byte) bool) error {
	stopped, err := catalog.Parents(ctx, s.documents, d, b, s.lost, yield)
	if stopped {
		return nil
	}
	return cmp.Or(err, s.incomplete(d, b.Anchors))
}

// incomplete says that a document is missing that may lead to d, if a signature that
// leads to one of anchors does so through it.
func (s *Store) incomplete(d digest.Digest, anchors []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.catalog.Cut > 0 {
		return fmt.Errorf("%w: indexes in the store list more manifests than the %d that are remembered", verify.ErrBudget, maxListed)
	}
	missing := func(x digest.Digest) error {
		return fmt.Errorf("%w: the store has a signature that may lead to the image, and not the document %s that it is over", verify.ErrUnreachable, x)
	}
	for _, x := range slices.Sorted(maps.Keys(s.catalog.Lacks)) {
		if x != d && slices.ContainsFunc(s.catalog.Signed[x], func(b *catalog.Blob) bool { return s.catalog.Rank(b, anchors) <= catalog.Unknown }) {
			return missing(x)
		}
	}
	for x := range s.broken {
		if x != d && len(s.catalog.Named[x]) > 0 {
			return missing(x)
		}
	}
	return nil
}

// Supersede has the signature old go once the store has the signature by.
func (s *Store) Supersede(old, by digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instead[by] = append(s.instead[by], old)
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
	s.live, s.listed = live, s.listed+1
	s.ring()
}

// suspects has a signature or document that could not be read looked at.
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
