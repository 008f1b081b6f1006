package layout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A Dir reads the files of a layout, for this package and for the node's store. What
// it returns is what its digest says, or an error. It is safe for concurrent use.
type Dir struct {
	Root *os.Root // of a directory; nil: it is a tar file

	file *os.File // tar file
	tar  *Tar     // what is in it
}

// Open opens the layout at name, a directory or an uncompressed tar file. Of a tar
// file it reads all headers, at most 32,768 of at most 64 MiB, unless seen, which
// Tar returned before and may be nil, is of the same file with the same size and time.
// Errors wrap verify.ErrUnreachable or verify.ErrBudget.
func Open(ctx context.Context, name string, seen *Tar) (*Dir, error) {
	// Without waiting for whoever writes to a pipe.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() {
		if !seen.still(info) {
			seen, err = scan(ctx, f, info)
		}
		if err == nil {
			return &Dir{file: f, tar: seen}, nil
		}
	}
	f.Close()
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is neither a directory nor a regular file", name)
	}
	var root *os.Root
	if err == nil {
		root, err = os.OpenRoot(name)
	}
	if err != nil {
		return nil, unreachable(err)
	}
	return &Dir{Root: root}, nil
}

// Close closes it.
func (r *Dir) Close() error {
	if r.file != nil {
		return r.file.Close()
	}
	return r.Root.Close()
}

// Tar is what was read of a tar file, for the next Open; nil of a directory.
func (r *Dir) Tar() *Tar { return r.tar }

// BlobPath is where the blob with a valid digest lies.
func BlobPath(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// Read reads a regular file after admit, told its size, has agreed. Links that
// lead out of the directory are refused (os.Root), and any link in a tar file; a
// FIFO or a device is opened without waiting and then refused. A file that is not
// there is fs.ErrNotExist; what else keeps it from being read is
// verify.ErrUnreachable.
func (r *Dir) Read(name string, admit func(int64) error) ([]byte, error) {
	f, size, err := r.open(name)
	if err != nil {
		return nil, err
	}
	if c, ok := f.(io.Closer); ok {
		defer c.Close()
	}
	if size < 0 {
		return nil, fmt.Errorf("%w: %s is not a regular file", verify.ErrUnreachable, name)
	}
	if err := admit(size); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	raw := make([]byte, size)
	if _, err := io.ReadFull(f, raw); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", verify.ErrUnreachable, name, err)
	}
	return raw, nil
}

// open opens a file and returns its size, below 0 where it is no regular one.
func (r *Dir) open(name string) (io.Reader, int64, error) {
	missing := fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	if r.tar != nil {
		e, ok := r.tar.files[name]
		if !ok {
			return nil, 0, missing
		}
		return io.NewSectionReader(r.file, e.offset, e.size), e.size, nil
	}
	f, err := r.Root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, missing
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	if !info.Mode().IsRegular() {
		return f, -1, nil
	}
	return f, info.Size(), nil
}

// ErrDocker says that a tar file is what docker save wrote before version 25, and others
// write to this day.
var ErrDocker = errors.New("it is a docker archive, which has neither signatures nor what they are over: tidewaiter bundle create makes a bundle of those, where the image is signed")

// ErrDamaged is wrapped where a file is not what its descriptor says.
var ErrDamaged = errors.New("damaged")

// Blob reads the blob that d describes and checks it. take is asked before
// anything is read.
func (r *Dir) Blob(d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %s: %w", verify.Quote(d.Digest.String(), 80), err)
	}
	name := BlobPath(d.Digest)
	raw, err := r.Read(name, func(n int64) error {
		if n != d.Size {
			return fmt.Errorf("%w: %d bytes, but its descriptor says %d", ErrDamaged, n, d.Size)
		}
		return take(n)
	})
	if err != nil {
		return nil, err
	}
	if d.Digest.Algorithm().FromBytes(raw) != d.Digest {
		return nil, fmt.Errorf("%w: %s is not what its digest says", ErrDamaged, name)
	}
	return raw, nil
}

// Entries returns what index.json lists, where oci-layout says that it is a layout.
// take, told their sizes, is asked before either is read. Errors wrap
// verify.ErrUnreachable or verify.ErrBudget.
func (r *Dir) Entries(take func(int64) error) ([]ocispec.Descriptor, error) {
	raw, err := r.Read(ocispec.ImageLayoutFile, take)
	if errors.Is(err, fs.ErrNotExist) && r.tar != nil && r.tar.docker {
		err = ErrDocker
	}
	if err != nil {
		return nil, unreachable(err)
	}
	var v ocispec.ImageLayout
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", verify.ErrUnreachable, ocispec.ImageLayoutFile, err)
	}
	if v.Version != ocispec.ImageLayoutVersion {
		return nil, fmt.Errorf("%w: %s: version %s, not %s", verify.ErrUnreachable,
			ocispec.ImageLayoutFile, verify.Quote(v.Version, 32), ocispec.ImageLayoutVersion)
	}
	// Bytes, but no page: the limit on those is for lists that others make long,
	// and index.json is read once for each digest of the image.
	if raw, err = r.Read(ocispec.ImageIndexFile, take); err != nil {
		return nil, unreachable(err)
	}
	entries, err := EntriesOf(raw)
	if err != nil {
		return nil, unreachable(fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err))
	}
	return entries, nil
}

// EntriesOf returns what the index raw lists. An entry that is no descriptor costs only
// itself. An index that is too long is verify.ErrBudget.
func EntriesOf(raw []byte) ([]ocispec.Descriptor, error) {
	if err := verify.Bounded(raw); err != nil {
		return nil, err
	}
	var index struct {
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, err
	}
	var list []ocispec.Descriptor
	for _, e := range index.Manifests {
		var d ocispec.Descriptor
		if json.Unmarshal(e, &d) == nil && d.Digest.Validate() == nil {
			list = append(list, d)
		}
	}
	return list, nil
}

// Signature reads the envelope of the signature of subject whose manifest is raw
// into ev, where it takes it from b.
func (r *Dir) Signature(ev *verify.Evidence, raw []byte, subject ocispec.Descriptor, b *verify.Budget) error {
	envelope, err := verify.EnvelopeIn(raw, subject)
	if err != nil {
		return err
	}
	blob, err := r.Blob(envelope, b.Envelope)
	if err != nil {
		return err
	}
	ev.Document, ev.MediaType, ev.Blob = raw, envelope.MediaType, blob
	return nil
}

// Inconclusive reports whether err, of one of Dir's methods, left open what a file
// holds.
func Inconclusive(err error) bool {
	return errors.Is(err, verify.ErrUnreachable) || errors.Is(err, verify.ErrBudget)
}
