package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Reader is the store of a node, and its archives, as a program sees them that is not
// the gate, read once by Open. It takes no lock, makes no file and no directory, and
// what it is given to keep it forgets. It is safe for concurrent use.
type Reader struct {
	store *Store
	err   error // why the directory cannot be read
}

var _ verify.WritableSource = (*Reader)(nil)

// Open reads the store in dir. It returns nil if there is neither that nor archives. What
// is there and cannot be read, Find says. Of the options Log and Image are not used, and
// the caller closes the archives after the Reader.
func Open(ctx context.Context, dir string, o Options) *Reader {
	o.Log, o.Image = slog.New(slog.DiscardHandler), nil
	r := &Reader{store: New(dir, o)}
	root, err := openOf(dir, "store")
	switch {
	case err == nil:
		r.store.load(ctx, &layout.Dir{Root: root})
		r.store.reader.End = root.Close
	case !errors.Is(err, fs.ErrNotExist):
		r.err = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	case o.Archives == nil:
		return nil
	}
	r.store.start.Done()
	return r
}

// openOf opens the directory name in dir, without following a link out of it.
func openOf(dir, name string) (*os.Root, error) {
	state, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	// OpenRoot waits for whoever writes to a pipe, so that it is looked at before.
	info, err := state.Stat(name)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a directory", name)
	}
	if err != nil {
		return nil, err
	}
	return state.OpenRoot(name)
}

// Close ends the reading. r may be nil.
func (r *Reader) Close() {
	if r == nil {
		return
	}
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.reader.Close()
	r.store.reader = nil
}

// Name implements [verify.Source].
func (r *Reader) Name() string { return r.store.Name() }

// Find implements [verify.Source], as [Store.Find] does.
func (r *Reader) Find(ctx context.Context, in verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	if err := r.store.Find(ctx, in, subject, b, yield); err != nil {
		return err
	}
	return r.err
}

// Parents implements [verify.WritableSource], as [Store.Parents] does.
func (r *Reader) Parents(ctx context.Context, d digest.Digest, b *verify.Budget, yield func(digest.Digest, []byte) bool) error {
	return cmp.Or(r.store.Parents(ctx, d, b, yield), r.err)
}

// Keep implements [verify.WritableSource] and keeps nothing.
func (*Reader) Keep(verify.Image, ocispec.Descriptor, verify.Evidence) {}

// Manifest returns the image manifest or index with digest d, of the store itself or of
// an archive, with its bytes. They have been checked against d; size and media type in the
// descriptor are theirs. The error is as that of [layout.Source.Manifest].
func (r *Reader) Manifest(ctx context.Context, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	x, found := r.locate(d)
	if !found {
		if r.err != nil {
			return ocispec.Descriptor{}, nil, r.err
		}
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", text.Quote(d.String(), 80), fs.ErrNotExist)
	}
	raw, err := x.Read(ctx, x.Descriptor, func(n int64) error { return verify.NewBudget(nil, verify.Limits{}).Manifest(n) })
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	mediaType, err := oci.MediaTypeOf(raw, "")
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}, raw, nil
}

// Blob returns the blob that d describes of what has the manifest in, the store itself or
// an archive, after take, told its size, has agreed.
func (r *Reader) Blob(ctx context.Context, in digest.Digest, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	x, found := r.locate(in)
	if !found {
		return nil, fmt.Errorf("%s: %w", text.Quote(in.String(), 80), fs.ErrNotExist)
	}
	return x.Read(ctx, d, take)
}

// locate returns the manifest d, if there is one.
func (r *Reader) locate(d digest.Digest) (catalog.Document, bool) {
	r.store.mu.Lock()
	have, at := r.store.catalog.Blobs[d], r.store.reader
	r.store.mu.Unlock()
	switch {
	case at != nil && have != nil:
		return catalog.Document{Reader: at, Descriptor: have.Descriptor()}, true
	case r.store.o.Archives != nil:
		return r.store.o.Archives.Locate(d)
	}
	return catalog.Document{}, false
}
