package archives

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// entries returns the names of what may be archives, in order, and why that is not all.
func entries(dir string) (names []string, unreadable string) {
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
	if n := len(names); n > maxArchives {
		return names[:maxArchives], fmt.Sprintf("%d entries, of which the first %d by name are read", n, maxArchives)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return names, text.Clean(err.Error(), 256)
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

// stampsOf returns the stamps of an archive, and where that is a directory of what
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

// readArchive reads the documents that index.json of an archive leads to, as far as what
// is left goes. A panic in a parser costs only the archive.
func readArchive(ctx context.Context, name string, left limits, most bounds, kinds []verify.Kind) (b *archive) {
	b = &archive{given: left, catalog: catalog.New()}
	var dir *layout.Dir
	defer func() {
		if p := recover(); p != nil {
			if dir != nil {
				dir.Close()
			}
			b = &archive{given: left, catalog: catalog.New(), trouble: text.Clean(fmt.Sprintf("panic while reading it: %v", p), 256)}
		}
	}()
	dir, err := openArchive(ctx, name)
	r := &reading{ctx: ctx, dir: dir, catalog: &b.catalog, kinds: kinds, left: left, most: most, bounds: most, seen: map[verify.Target]bool{}, damaged: map[digest.Digest]error{}}
	if err == nil {
		if err = r.run(); err != nil {
			r.none = errors.Is(err, layout.ErrDocker) || !dir.Has(ocispec.ImageLayoutFile)
			dir.Close()
		}
	}
	for _, d := range slices.Sorted(maps.Keys(r.damaged)) {
		r.lacks = cmp.Or(r.lacks, r.damaged[d])
	}
	b.cut, b.lacks = r.cut, r.lacks
	if err != nil {
		b.catalog, b.trouble = catalog.New(), text.Clean(err.Error(), 256)
		if layout.Inconclusive(err) && !r.none {
			b.lacks = err
		}
		return b
	}
	b.reader = catalog.NewReader(dir, dir.Close)
	b.takes = limits{left.documents - r.left.documents, b.catalog.Links, dir.Tar().Files()}
	if r.failed != nil {
		b.trouble = text.Clean(r.failed.Error(), 200)
		if r.failures > 1 {
			b.trouble += fmt.Sprintf(" (and %d more)", r.failures-1)
		}
	}
	return b
}

// openArchive opens what may be an archive. Nothing is followed, and a pipe not waited
// for.
func openArchive(ctx context.Context, name string) (*layout.Dir, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() && (!info.Mode().IsRegular() || filepath.Ext(name) != ".tar") {
		return nil, errors.New("it is neither a directory nor a file with a name that ends in .tar, which tidewaiter evidence import makes of others")
	}
	return layout.Open(ctx, name, nil)
}

// A reading is how far an archive was read.
type reading struct {
	kinds    []verify.Kind
	ctx      context.Context
	dir      *layout.Dir
	catalog  *catalog.Catalog
	left     limits // links: in all
	cut      bool   // that was not enough
	most     bounds
	bounds   // left of them; of bytes and reads
	seen     map[verify.Target]bool
	none     bool  // it is no archive
	failed   error // the first that cost a document
	failures int
	lacks    error                   // the first that cost documents which may be signatures, or lead to one
	damaged  map[digest.Digest]error // documents that are not what they are listed as
}

// fail notes a document that no source would take.
func (r *reading) fail(err error) {
	r.failures++
	r.failed = cmp.Or(r.failed, err)
}

// lose notes documents of which it is not known what they are.
func (r *reading) lose(err error) {
	r.fail(err)
	r.lacks = cmp.Or(r.lacks, err)
}

// errLong is said of one document.
var errLong = fmt.Errorf("%w: a document of more than %d bytes", verify.ErrBudget, maxDocument)

// take takes the bytes of a document.
func (r *reading) take(n int64) error {
	if n > maxDocument {
		return errLong
	}
	if n > r.bytes {
		return fmt.Errorf("%w: %d bytes, but %d are left for it", verify.ErrBudget, n, r.bytes)
	}
	r.bytes -= n
	return nil
}

// run reads everything. An error is one of the archive as a whole.
//
// What an archive holds of one image somebody else wrote than what it holds of the next,
// and must not use up what that needs. So the order is not theirs: what index.json lists
// goes first, and of that, small documents do, as signatures are; what is big, or lies
// deeper, comes after. And of one image no more signatures count than anybody looks at.
func (r *reading) run() error {
	if n := r.dir.Tar().Files(); n > r.left.inTar {
		r.cut = true
		return fmt.Errorf("%w: %d files, more than its part of the %d of all evidence archives that are tar files", verify.ErrBudget, n, r.most.all.inTar)
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
			raw := r.document(t, depth == 0)
			if raw == nil || !oci.IsIndex(t.MediaType) {
				continue
			}
			if depth == maxDepth {
				r.lose(fmt.Errorf("%w: indexes more than %d deep", verify.ErrBudget, maxDepth))
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
		if !oci.IsManifest(d.MediaType) && !oci.IsIndex(d.MediaType) || r.seen[t] {
			continue
		}
		if r.reads == 0 {
			r.lose(fmt.Errorf("%w: more than %d manifests and indexes", verify.ErrBudget, r.most.reads))
			break
		}
		r.reads--
		r.seen[t] = true
		list = append(list, t)
	}
	return list
}

// document reads a manifest or index, and takes it into the catalog if it says anything
// about an image. It returns nil where there is none. named is true if index.json lists it,
// and then it has to be there; an index may list platforms that this node has nothing of.
func (r *reading) document(t verify.Target, named bool) []byte {
	raw, err := r.dir.Blob(ocispec.Descriptor{MediaType: t.MediaType, Digest: t.Digest, Size: t.Size}, r.take)
	if errors.Is(err, fs.ErrNotExist) {
		if _, whole := r.damaged[t.Digest]; named && !whole {
			err = fmt.Errorf("index.json lists %s, which is not there", t.Digest)
			r.fail(err)
			r.damaged[t.Digest] = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		return nil
	}
	if errors.Is(err, errLong) {
		r.fail(err)
		return nil
	}
	if errors.Is(err, verify.ErrBudget) {
		r.lose(err)
		return nil
	}
	if err != nil {
		r.fail(err)
		if _, whole := r.damaged[t.Digest]; !whole {
			r.damaged[t.Digest] = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		return nil
	}
	r.damaged[t.Digest] = nil // also if it is listed as another one besides
	b, err := catalog.See(t.Digest, raw, r.kinds)
	switch {
	case err != nil:
		r.fail(fmt.Errorf("%s: %w", t.Digest, err))
	case b.Subject == "" && len(b.Names) == 0 || r.catalog.Blobs[b.Digest] != nil:
	case b.Subject != "" && len(r.catalog.Signed[b.Subject]) == r.most.ofOne:
		r.fail(fmt.Errorf("%w: more than %d signatures of %s", verify.ErrBudget, r.most.ofOne, b.Subject))
	case r.left.documents <= 0:
		r.cut = true
		r.lose(fmt.Errorf("%w: more than its part of the %d manifests and indexes of all evidence archives", verify.ErrBudget, r.most.all.documents))
	default:
		r.left.documents--
		if !r.catalog.Add(b, r.left.links) {
			r.cut = true
			r.lose(fmt.Errorf("%w: indexes that list more than its part of the %d manifests of all evidence archives", verify.ErrBudget, r.most.all.links))
		}
	}
	return raw
}
