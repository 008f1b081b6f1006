// Package archives reads the evidence archives that an operator has put into the state
// directory of a node: image layouts, each a directory or a tar file, with signatures and
// the manifests that they are over.
//
// A dead disk or a pulled medium costs its own archive alone: each is read by a goroutine
// of its own. All together take a bounded part of the memory, and each an equal part of
// that first. Nothing in an archive is believed: who asks checks what is handed over.
package archives

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
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Dir is the directory below a state directory that archives lie in.
const Dir = "archives"

// Options of Archives. Log and Now are required.
type Options struct {
	Log *slog.Logger
	Now func() time.Time

	// Kinds are those of the evidence that they have.
	Kinds []verify.Kind

	// Changed is called when an archive has come or is another one now: what was not
	// found before may be found. It must not block; nil is allowed.
	Changed func()
}

// Archives are the evidence archives of a node. They are safe for concurrent use. Until
// Run has read them, questions wait a moment and are then not answered.
type Archives struct {
	dir    string
	o      Options
	start  *catalog.Start
	rescan chan struct{}
	once   *watcher // of Open
	failed error    // of Open: why the directory cannot be read

	mu         sync.Mutex
	list       []*archive        // by name; made anew for each change
	stalled    map[string]bool   // of these, by name, those of which it is not known how they are; made anew
	asked      time.Time         // since when the directory has not answered; zero: it has
	unreadable string            // why not all are read
	wait       time.Duration     // totalWait; another in a test
	touch      func(name string) // called before an entry is read, and with "" before the directory is; for tests
	bounds     bounds            // usual; others in a test
}

var _ verify.WritableSource = (*Archives)(nil)

// New returns the archives below the state directory. It does no I/O.
func New(state string, o Options) *Archives {
	return &Archives{
		dir: filepath.Join(state, Dir), o: o, start: catalog.NewStart(), rescan: make(chan struct{}, 1),
		wait: totalWait, touch: func(string) {}, bounds: usual,
	}
}

// Open reads the archives below the state directory once, for a program that is not the
// gate. It makes no file and no directory, and returns nil if there is no directory of
// archives. What is there and cannot be read, Documents says. The caller closes them.
func Open(ctx context.Context, state string, now func() time.Time, kinds ...verify.Kind) *Archives {
	a := New(state, Options{Log: slog.New(slog.DiscardHandler), Now: now, Kinds: kinds})
	_, err := os.Lstat(a.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		a.failed = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	} else {
		a.once = a.watcher()
		a.once.scan(ctx)
		select {
		case <-a.rescan: // an archive may have more room than it was given
			a.once.scan(ctx)
		default:
		}
	}
	a.start.Done()
	return a
}

// Close ends what Open began. a may be nil.
func (a *Archives) Close() {
	if a != nil && a.once != nil {
		a.once.close()
	}
}

// Name implements [verify.Source].
func (a *Archives) Name() string { return "archives " + a.dir }

// A Status is how an entry of the directory fares.
type Status struct {
	Name       string
	Signatures int
	Trouble    string // what is wrong with it; empty: nothing
}

// Status says how the archives fare, by name, and in one clause why not all are read.
func (a *Archives) Status() (list []Status, trouble string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, b := range a.list {
		one := Status{b.name, b.catalog.Signatures(), b.trouble}
		if a.stalled[b.name] {
			one.Trouble = catalog.ErrUnread.Error()
		} else if b.reader != nil && b.reader.Hangs() {
			one.Trouble = catalog.ErrHangs.Error()
		}
		list = append(list, one)
	}
	if !a.asked.IsZero() && a.o.Now().Sub(a.asked) > a.wait {
		return list, errSilent.Error()
	}
	return list, a.unreadable
}

// Rescan has the directory looked at now. It returns at once.
func (a *Archives) Rescan() {
	select {
	case a.rescan <- struct{}{}:
	default:
	}
}

// Documents returns the documents that stand in a relation to d. It takes one of each
// archive in turn, so that none that has many leaves no budget for the others. The error
// names an archive of which not everything is known.
func (a *Archives) Documents(ctx context.Context, of catalog.Relation, d digest.Digest, anchors []string) (list []catalog.Document, err error) {
	if err := a.start.Wait(ctx); err != nil {
		return nil, err
	}
	if a.failed != nil {
		return nil, a.failed
	}
	var each [][]catalog.Document
	fail := func(b *archive, why error) {
		if err == nil && why != nil {
			err = fmt.Errorf("evidence archive %s: %w", text.Quote(b.name, 80), why)
		}
	}
	a.mu.Lock()
	for _, b := range a.list {
		if a.stalled[b.name] {
			fail(b, catalog.ErrUnread)
		}
		fail(b, b.lacks)
		if b.reader == nil {
			continue
		}
		if b.reader.Hangs() {
			fail(b, catalog.ErrHangs)
		}
		its := b.catalog.Documents(of, d, b.reader, anchors)
		for i := range its {
			its[i].Archive = b.name
		}
		each = append(each, its)
	}
	a.mu.Unlock()
	for _, its := range each {
		catalog.Order(its)
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

// Locate returns the manifest or index d of an archive, if one has it.
func (a *Archives) Locate(d digest.Digest) (x catalog.Document, found bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, b := range a.list {
		if have := b.catalog.Blobs[d]; have != nil && b.reader != nil {
			return catalog.Document{Reader: b.reader, Descriptor: have.Descriptor(), Archive: b.name}, true
		}
	}
	return x, false
}

// each hands the documents over by rank.
func (a *Archives) each(ctx context.Context, of catalog.Relation, d digest.Digest, anchors []string, yield func(catalog.Document) bool) error {
	list, failed := a.Documents(ctx, of, d, anchors)
	slices.SortStableFunc(list, func(x, y catalog.Document) int { return cmp.Compare(x.Rank, y.Rank) })
	for _, x := range list {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		if !yield(x) {
			return nil
		}
	}
	return failed
}

// Find implements [verify.Source]: signatures that lead to one of b.Anchors go first. A
// file that is damaged costs only itself: it is handed over with Err set, and the answer
// is inconclusive.
func (a *Archives) Find(ctx context.Context, _ verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	stopped, err := catalog.Find(ctx, a.each, subject, b, func(catalog.Document) {}, yield)
	if stopped {
		return nil
	}
	return err
}

// Parents implements [verify.WritableSource]. Documents that have a signature which leads to one
// of b.Anchors go first, and those without any last.
func (a *Archives) Parents(ctx context.Context, d digest.Digest, b *verify.Budget, yield func(digest.Digest, []byte) bool) error {
	stopped, err := catalog.Parents(ctx, a.each, d, b, func(catalog.Document) {}, yield)
	if stopped {
		return nil
	}
	return err
}

// Keep implements [verify.WritableSource] and keeps nothing: archives are the operator's.
func (*Archives) Keep(verify.Image, ocispec.Descriptor, verify.Evidence) {}

// errSilent is said where the directory itself does not say what is in it.
var errSilent = fmt.Errorf("%w: the disk of the directory of evidence archives does not answer", verify.ErrUnreachable)

// An archive is an entry of the directory. It does not change.
type archive struct {
	name    string
	at      [5]stamp        // what it was when it was read
	reader  *catalog.Reader // nil: nothing can be read of it
	catalog catalog.Catalog
	given   limits // what it might take of what all archives may take
	takes   limits // of that
	cut     bool   // it would take more
	lacks   error  // why it may have more of what is looked for than was read; nil: it has not
	trouble string // why not all of it can be read

	tries int // in a row that left trouble
	due   time.Time
}
