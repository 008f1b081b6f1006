package layout

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// Bounds of catalogs.
const (
	maxIndex    = 8 << 20   // bytes of index.json
	maxDocument = 4 << 20   // bytes of one index below it
	maxBuild    = 256 << 20 // bytes that are read for a new catalog
	maxAgain    = 16 << 20  // bytes that a later question reads for what was not readable
	maxStep     = 128       // documents that one question reads before others have their turn

	roomBytes = 32 << 20 // of memory, roughly, of all that a Room remembers
	costOpen  = 192      // bytes for a document while the catalog is not complete
	costKept  = 256      // bytes for an entry that stays
	costFile  = 160      // bytes for a file of a tar file

	settled = 3 * time.Second // file systems do not tell changes in quick succession apart
	pause   = time.Minute     // before a catalog that had too little memory is built again
)

// A Room bounds the memory that layouts remember things in, all of them together. It is
// safe for concurrent use.
type Room struct {
	Now func() time.Time // nil: its layouts are read again for each question

	used atomic.Int64
}

// New returns the source for the layout at path, a directory or an uncompressed tar
// file. It need not exist yet: each question asks whether it does, and which of the two
// it is.
func (r *Room) New(path string) *Source {
	return &Source{path: path, room: r, turn: make(chan struct{}, 1), build: make(chan struct{}, 1), do: Open}
}

func (r *Room) take(n int64) bool {
	if r.used.Add(n) > roomBytes {
		r.used.Add(-n)
		return false
	}
	return true
}

func (r *Room) give(n int64) { r.used.Add(-n) }

// A key stands for a digest or a document: digests as text take most of the memory.
type key [16]byte

func keyOf(what string) key {
	sum := sha256.Sum256([]byte(what))
	return key(sum[:])
}

// A document is one that the catalog has yet to read, or that it found.
type document struct {
	digest digest.Digest
	size   int64
	index  bool
	said   bool // its entry says that it is a signature
	depth  int8 // of the list that has it
	tagged bool // its tag says what it is of
}

func (d document) descriptor() ocispec.Descriptor {
	t := ocispec.MediaTypeImageManifest
	if d.index {
		t = ocispec.MediaTypeImageIndex
	}
	return ocispec.Descriptor{MediaType: t, Digest: d.digest, Size: d.size}
}

// A catalog says which documents of a layout may be signatures of which subject. Nobody
// believes it: who uses a document reads and checks it again. While it is not complete each
// question reads on; nobody may conclude from it that there is no signature until then.
// It is not safe for concurrent use.
type catalog struct {
	room   *Room
	at     []os.FileInfo // of the layout when it began
	kind   verify.Kind   // of the evidence that it is about
	young  bool          // the layout had changed just before: it may change again without a trace
	due    time.Time     // if cut, when it is to be built again
	signed map[key][]document
	tags   map[key][]document // by referrers tag

	seen   map[key]struct{} // documents that were queued; by size, too, since an entry may lie about it
	queue  [3][]document    // said to be signatures, other manifests, indexes
	again  []document       // could not be read, or are damaged: somebody may yet write them
	left   int64            // bytes that may be read
	open   int64            // bytes of room until it is complete
	kept   int64            // bytes of room for as long as it stays
	cut    error            // it lacks something, until the layout changes
	failed error            // the first of again that left something open
	gone   error            // the first that is named and is not there, until the layout changes
}

// drop gives back its memory.
func (c *catalog) drop() {
	if c != nil {
		c.room.give(c.open + c.kept)
	}
}

// lack remembers that the catalog lacks something.
func (c *catalog) lack(err error) {
	if c.cut == nil {
		c.cut = err
	}
}

func (c *catalog) take(n int64, of *int64) bool {
	if !c.room.take(n) {
		c.lack(fmt.Errorf("%w: the layouts have more documents than fit %d MiB of memory", verify.ErrBudget, roomBytes>>20))
		return false
	}
	*of += n
	return true
}

// push queues what may be or lead to a signature.
func (c *catalog) push(e ocispec.Descriptor, depth int8) {
	d := document{digest: e.Digest, size: e.Size, depth: depth}
	kind := 1
	switch e.MediaType {
	case ocispec.MediaTypeImageManifest:
		if !oci.MayBe(e.ArtifactType, c.kind.ArtifactType()) || evidence.SignatureSize(e.Size) != nil {
			return
		}
		if e.ArtifactType == c.kind.ArtifactType() {
			kind, d.said = 0, true
		}
	case ocispec.MediaTypeImageIndex:
		if depth == maxDepth {
			c.lack(fmt.Errorf("%w: indexes more than %d deep", verify.ErrBudget, maxDepth))
			return
		}
		kind, d.index = 2, true
	default:
		return
	}
	k := keyOf(strconv.FormatBool(d.index) + " " + strconv.FormatInt(d.size, 10) + " " + string(d.digest))
	if _, ok := c.seen[k]; ok || !c.take(costOpen, &c.open) {
		return
	}
	c.seen[k] = struct{}{}
	c.queue[kind] = append(c.queue[kind], d)
}

// keep adds d to what m has for k.
func (c *catalog) keep(m map[key][]document, k key, d document) {
	if c.take(costKept, &c.kept) {
		m[k] = append(m[k], d)
	}
}

// begin reads index.json into an empty catalog.
func (c *catalog) begin(dir *Dir) error {
	return dir.each(func(e oci.Entry) bool {
		if e.Err != nil || e.Digest.Validate() != nil {
			return true
		}
		if tag := e.Annotations[ocispec.AnnotationRefName]; e.MediaType == ocispec.MediaTypeImageIndex && isTag(tag) {
			c.keep(c.tags, keyOf(tag), document{digest: e.Digest, size: e.Size, index: true})
		}
		if d := tagged(e.Annotations[ocispec.AnnotationRefName], c.kind.TagSuffixes()); d != "" && e.MediaType == ocispec.MediaTypeImageManifest {
			c.keep(c.signed, keyOf(string(d)), document{digest: e.Digest, size: e.Size, tagged: true})
		}
		c.push(e.Descriptor, 0)
		return true
	})
}

// grow reads on, until there is nothing left to read, it is the turn of others, or the
// signatures of subject are no longer have.
func (c *catalog) grow(ctx context.Context, dir *Dir, subject key, have int) (complete bool) {
	for range maxStep {
		kind := slices.IndexFunc(c.queue[:], func(q []document) bool { return len(q) > 0 })
		if kind < 0 {
			if len(c.again) == 0 {
				c.seen, c.queue = nil, [3][]document{}
				c.room.give(c.open)
				c.open = 0
			}
			return true
		}
		if len(c.signed[subject]) != have || ctx.Err() != nil {
			return false
		}
		d := c.queue[kind][0]
		c.queue[kind] = c.queue[kind][1:]
		c.look(dir, d)
	}
	return false
}

// errSpent says that a question has read enough for the catalog.
var errSpent = fmt.Errorf("%w: the layout has more documents than one question reads; the next one reads on", verify.ErrBudget)

// look reads d.
func (c *catalog) look(dir *Dir, d document) {
	admit := func(n int64) error {
		if n > maxDocument {
			return fmt.Errorf("%w: an index of %d bytes, limit %d", verify.ErrBudget, n, maxDocument)
		}
		if n > c.left {
			return errSpent
		}
		c.left -= n
		return nil
	}
	raw, err := dir.Blob(d.descriptor(), admit)
	var damage *damage
	switch {
	case err == nil:
	case errors.As(err, &damage):
		if damage.sized && !dir.broken(d.digest, admit) {
			return // only the entry is wrong
		}
		if c.failed == nil {
			c.failed = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		c.again = append(c.again, d)
		return
	case errors.Is(err, errSpent):
		c.failed, c.again = err, append(c.again, d)
		for i, q := range c.queue {
			c.again, c.queue[i] = append(c.again, q...), nil
		}
		return
	case errors.Is(err, verify.ErrBudget):
		c.lack(err)
		return
	case errors.Is(err, fs.ErrNotExist) && !dir.dangles(BlobPath(d.digest)):
		// An image of several platforms may lack all but one. What index.json names itself, or
		// an entry calls a signature, was cut off. The directory's time changes when it comes.
		if c.gone == nil && (d.depth == 0 || d.said) {
			c.gone = missing(err)
		}
		return
	default:
		if errors.Is(err, fs.ErrNotExist) && (d.depth == 0 || d.said) { // a link to nothing
			err = missing(err)
		}
		if c.failed == nil && Inconclusive(err) {
			c.failed = err
		}
		c.again = append(c.again, d)
		return
	}
	if d.index {
		entries, err := EntriesOf(raw)
		if Inconclusive(err) {
			c.lack(err)
		}
		for _, e := range entries {
			c.push(e, d.depth+1)
		}
	} else if m, err := oci.ReadHead(raw); err == nil && m.Subject != nil && evidence.Is(c.kind, m) {
		c.keep(c.signed, keyOf(string(m.Subject.Digest)), d)
	}
}

// found is what the catalog knows of one subject.
type found struct {
	tags, signed []document
	complete     bool
	err          error // if complete, why there may be more all the same
}

// look has the catalog know more of subject than have signatures, or all. A question
// calls it until it is complete; first is its first call.
func (s *Source) look(ctx context.Context, dir *Dir, kind verify.Kind, subject digest.Digest, have int, first bool) (found, error) {
	select {
	case s.build <- struct{}{}:
	case <-ctx.Done():
		return found{}, fmt.Errorf("%w: %w", verify.ErrUnreachable, ctx.Err())
	}
	defer func() { <-s.build }()
	at, err := dir.stamps()
	if err != nil {
		return found{}, err
	}
	var now time.Time
	if s.room.Now != nil {
		now = s.room.Now()
	}
	if c := s.catalogs[kind.Name()]; c == nil || !slices.EqualFunc(c.at, at, same) || first && (c.young || c.cut != nil && !now.Before(c.due)) {
		c.drop()
		c = &catalog{room: s.room, kind: kind, at: at, left: maxBuild, due: now.Add(pause),
			young: s.room.Now == nil, signed: map[key][]document{}, tags: map[key][]document{}, seen: map[key]struct{}{}}
		delete(s.catalogs, kind.Name())
		for _, info := range at {
			c.young = c.young || info != nil && now.Sub(info.ModTime()).Abs() < settled
		}
		if err := c.begin(dir); errors.Is(err, oci.ErrLimit) {
			c.lack(err)
		} else if err != nil {
			c.drop()
			return found{}, err
		}
		if s.catalogs == nil {
			s.catalogs = map[string]*catalog{}
		}
		s.catalogs[kind.Name()] = c
	} else if first && len(c.again) > 0 && len(c.queue[0])+len(c.queue[1])+len(c.queue[2]) == 0 {
		for _, d := range c.again {
			kind := 1
			if d.index {
				kind = 2
			}
			c.queue[kind] = append(c.queue[kind], d)
		}
		c.again, c.failed, c.left = nil, nil, maxAgain
	}
	c, k := s.catalogs[kind.Name()], keyOf(string(subject))
	complete := c.grow(ctx, dir, k, have)
	f := found{tags: c.tags[keyOf(referrersTag(subject))], signed: c.signed[k], complete: complete, err: c.cut}
	f.err = cmp.Or(f.err, c.failed, c.gone)
	return f, nil
}
