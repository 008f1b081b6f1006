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
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

	// Size bounds the files in bytes; zero means DefaultSize.
	Size int64
}

// A Store is the node's store. It is safe for concurrent use. Until Run has read the
// directory, questions wait a moment and are then not answered; a directory that
// cannot be read holds nothing.
type Store struct {
	dir  string
	o    Options
	wake chan struct{}
	read chan struct{} // closed when the directory was read, or could not be

	mu      sync.Mutex
	files   *layout.Dir // nil: the directory cannot be read
	blobs   map[digest.Digest]*blob
	signed  map[digest.Digest][]*blob // subject to signatures
	listed  map[digest.Digest][]*blob // manifest to indexes
	links   int                       // entries of listed
	used    int64                     // bytes of blobs
	most    int                       // maxKept; fewer in a test
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

// A blob is a file of the store. What is said of it here is what the file seemed
// to be when it was last read, and checked when it is used.
type blob struct {
	digest    digest.Digest
	size      int64
	mediaType string          // of a manifest or index; empty: neither
	subject   digest.Digest   // of a signature
	envelope  digest.Digest   // of a signature
	lists     []digest.Digest // of an index
	old       bool            // a signature in the style from before image-spec 1.1

	seen time.Time // of a signature: when its image was last known to be on the node
	gone time.Time // and since when listings have not had it, in this process; zero: they have
}

// evidence waits to be written.
type evidence struct {
	subject  ocispec.Descriptor
	manifest ocispec.Descriptor // that the node selected from subject, where that is an index
	found    verify.Evidence
}

// New returns the store in the directory "store" below dir, which Run makes. It
// does no I/O.
func New(dir string, o Options) *Store {
	if o.Size == 0 {
		o.Size = DefaultSize
	}
	s := &Store{dir: dir, o: o, most: maxKept, keep: DefaultKeep, wake: make(chan struct{}, 1), read: make(chan struct{})}
	s.reset()
	return s
}

func (s *Store) reset() {
	s.blobs, s.used, s.links = map[digest.Digest]*blob{}, 0, 0
	s.signed, s.listed = map[digest.Digest][]*blob{}, map[digest.Digest][]*blob{}
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

// Signatures returns how many signatures the store has, and its size in bytes.
func (s *Store) Signatures() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, list := range s.signed {
		n += len(list)
	}
	return n, s.used
}

// Trouble says in one clause why evidence is not kept, or is empty.
func (s *Store) Trouble() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

// ready waits until the directory was read, and returns it; nil has nothing.
func (s *Store) ready(ctx context.Context) (*layout.Dir, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	select {
	case <-s.read:
	default:
		t := time.NewTimer(patience)
		defer t.Stop()
		select {
		case <-s.read:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
		case <-t.C:
			return nil, fmt.Errorf("%w: the store is still being read", verify.ErrUnreachable)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files, nil
}

// Find implements [verify.Source]. A file that is damaged costs only itself: it is
// handed over with Err set, once, and then goes, so that it can be written anew.
func (s *Store) Find(ctx context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	dir, err := s.ready(ctx)
	if dir == nil {
		return err
	}
	var failed error
	for _, sig := range s.of(s.signed, subject.Digest) {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		if err := b.Signature(); err != nil {
			return err
		}
		ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: sig.digest, Size: sig.size}}
		raw, err := dir.Blob(ev.Manifest, b.Manifest)
		if err == nil {
			err = dir.Signature(&ev, raw, subject, b)
		}
		if err != nil {
			if failed == nil && layout.Inconclusive(err) {
				failed = err
			}
			if errors.Is(err, layout.ErrDamaged) || errors.Is(err, fs.ErrNotExist) {
				s.suspects(sig.digest)
			}
			ev.Err = fmt.Errorf("signature %s: %w", sig.digest, err)
		}
		if !yield(ev) {
			return nil
		}
	}
	return failed
}

// Parents implements [verify.Keeper].
func (s *Store) Parents(ctx context.Context, d digest.Digest, b *verify.Budget, yield func(digest.Digest, []byte) bool) {
	dir, _ := s.ready(ctx)
	if dir == nil {
		return
	}
	for _, index := range s.of(s.listed, d) {
		if ctx.Err() != nil || b.Page() != nil {
			return
		}
		raw, err := dir.Blob(ocispec.Descriptor{Digest: index.digest, Size: index.size}, b.Manifest)
		if err == nil && !yield(index.digest, raw) {
			return
		}
	}
}

// of returns the blobs in m for d, those whose images were here last first.
func (s *Store) of(m map[digest.Digest][]*blob, d digest.Digest) []blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []blob
	for _, x := range m[d] {
		list = append(list, *x)
	}
	slices.SortFunc(list, func(x, y blob) int {
		if c := y.seen.Compare(x.seen); c != 0 {
			return c
		}
		return strings.Compare(string(x.digest), string(y.digest))
	})
	return list
}

// Keep implements [verify.Keeper].
func (s *Store) Keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	if ev.Document == nil || ev.Err != nil {
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
