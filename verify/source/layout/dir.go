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
	"slices"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Dir reads the files of a layout, for this package and for the node's store. What
// it returns is what its digest says, or an error. It is safe for concurrent use.
type Dir struct {
	Root *os.Root // of a directory; nil: it is a tar file

	file *os.File // tar file
	tar  *Tar     // what is in it

	opened func(name string) // for tests; nil: none
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

// Has reports whether there is something of that name, or may be.
func (r *Dir) Has(name string) bool {
	f, _, err := r.open(name)
	if c, ok := f.(io.Closer); ok && err == nil {
		defer c.Close()
	}
	return !errors.Is(err, fs.ErrNotExist)
}

// open opens a file and returns its size, below 0 where it is no regular one.
func (r *Dir) open(name string) (io.Reader, int64, error) {
	if r.opened != nil {
		r.opened(name)
	}
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
var ErrDocker = errors.New("it is a docker archive, which has neither signatures nor what they are over: tidewaiter evidence export makes an evidence archive of those, where the image is signed")

// ErrDamaged is wrapped where a file is not what its descriptor says.
var ErrDamaged = errors.New("damaged")

// A damage is an ErrDamaged.
type damage struct {
	digest digest.Digest
	sized  bool // only its size is known to be another one
	text   string
}

func (e *damage) Error() string { return ErrDamaged.Error() + ": " + e.text }
func (*damage) Unwrap() error   { return ErrDamaged }

// broken reports whether the file of d, with a valid digest, is not what that says, or
// may not be.
func (r *Dir) broken(d digest.Digest, take func(int64) error) bool {
	raw, err := r.Read(BlobPath(d), take)
	return err != nil || d.Algorithm().FromBytes(raw) != d
}

// Blob reads the blob that d describes and checks it. take is asked before
// anything is read.
func (r *Dir) Blob(d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %s: %w", text.Quote(d.Digest.String(), 80), err)
	}
	name := BlobPath(d.Digest)
	raw, err := r.Read(name, func(n int64) error {
		if n != d.Size {
			return &damage{d.Digest, true, fmt.Sprintf("%d bytes, but its descriptor says %d", n, d.Size)}
		}
		return take(n)
	})
	if err != nil {
		return nil, err
	}
	if d.Digest.Algorithm().FromBytes(raw) != d.Digest {
		return nil, &damage{d.Digest, false, name + " is not what its digest says"}
	}
	return raw, nil
}

// elsewhere says that there is no layout here, and where one is, if it is not far.
func (r *Dir) elsewhere() error {
	below := ""
	if r.tar != nil {
		below = r.tar.below
	} else if f, err := r.Root.Open("."); err == nil {
		names, _ := f.Readdirnames(maxNames)
		f.Close()
		slices.Sort(names)
		for _, name := range names {
			if _, err := r.Root.Stat(path.Join(name, ocispec.ImageLayoutFile)); err == nil {
				below = name
				break
			}
		}
	}
	err := fmt.Errorf("it is no OCI image layout: no %s at its top", ocispec.ImageLayoutFile)
	if below != "" {
		err = fmt.Errorf("%w; one is in %s/ there", err, text.Clean(below, 80))
	}
	return err
}

// maxNames bounds the names of a directory among which a layout is looked for.
const maxNames = 64

// Entries returns what index.json lists, where oci-layout says that it is a layout.
// take, told their sizes, is asked before either is read. Errors wrap
// verify.ErrUnreachable or verify.ErrBudget.
func (r *Dir) Entries(take func(int64) error) ([]ocispec.Descriptor, error) {
	if err := r.version(take); err != nil {
		return nil, err
	}
	raw, err := r.Read(ocispec.ImageIndexFile, take)
	if err != nil {
		return nil, unreachable(err)
	}
	entries, err := EntriesOf(raw)
	if err != nil {
		return nil, unreachable(fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err))
	}
	return entries, nil
}

// each hands over the entries of index.json, at most 8 MiB. The error is one of Entries;
// of a list that is too long it wraps oci.ErrLimit, after what is within the bound.
func (r *Dir) each(yield func(oci.Entry) bool) error {
	raw, err := r.Read(ocispec.ImageIndexFile, func(n int64) error {
		if n > maxIndex {
			return fmt.Errorf("%w: %d bytes, limit %d", verify.ErrBudget, n, maxIndex)
		}
		return nil
	})
	if err != nil {
		return unreachable(err)
	}
	if err := oci.Each(raw, annotations, yield); err != nil {
		return unreachable(fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err))
	}
	return nil
}

// stamps tell whether the layout has changed: they are of the tar file, or of index.json
// and the directories of blobs, nil for one that is not there.
func (r *Dir) stamps() ([]os.FileInfo, error) {
	if r.tar != nil {
		return []os.FileInfo{r.tar.of}, nil
	}
	var all []os.FileInfo
	for _, name := range []string{ocispec.ImageIndexFile, "blobs/sha256", "blobs/sha384", "blobs/sha512"} {
		info, err := r.Root.Stat(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, unreachable(err)
		}
		if err != nil {
			info = nil
		}
		all = append(all, info)
	}
	return all, nil
}

// same reports whether two stamps are of the same version of a file.
func same(x, y os.FileInfo) bool {
	if x == nil || y == nil {
		return x == nil && y == nil
	}
	return os.SameFile(x, y) && x.Size() == y.Size() && x.ModTime().Equal(y.ModTime())
}

// dangles reports whether name is there, and is a link to nothing.
func (r *Dir) dangles(name string) bool {
	if r.Root == nil {
		return false
	}
	_, err := r.Root.Lstat(name)
	return err == nil
}

// version says why oci-layout does not say that this is a layout, if it does not.
func (r *Dir) version(take func(int64) error) error {
	raw, err := r.Read(ocispec.ImageLayoutFile, take)
	if errors.Is(err, fs.ErrNotExist) && r.tar != nil && r.tar.docker {
		err = ErrDocker
	} else if errors.Is(err, fs.ErrNotExist) {
		err = r.elsewhere()
	}
	if err != nil {
		return unreachable(err)
	}
	var v ocispec.ImageLayout
	if err := json.Unmarshal(raw, &v); err != nil {
		return fmt.Errorf("%w: %s: %w", verify.ErrUnreachable, ocispec.ImageLayoutFile, err)
	}
	if v.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%w: %s: version %s, not %s", verify.ErrUnreachable,
			ocispec.ImageLayoutFile, text.Quote(v.Version, 32), ocispec.ImageLayoutVersion)
	}
	return nil
}

// annotations of entries that readers of layouts ask for: what an image is called.
var annotations = []string{ocispec.AnnotationRefName, "io.containerd.image.name"}

// EntriesOf returns what the index raw lists, with the annotations that name images. An
// entry that is no descriptor costs only itself. Of an index that is too long it returns
// what is within the bounds, and verify.ErrBudget.
func EntriesOf(raw []byte) ([]ocispec.Descriptor, error) {
	var list []ocispec.Descriptor
	err := oci.Each(raw, annotations, func(e oci.Entry) bool {
		if e.Err == nil && e.Digest.Validate() == nil {
			list = append(list, e.Descriptor)
		}
		return true
	})
	return list, err
}

// Signature reads the envelope of the signature of subject whose manifest is raw
// into ev, where it takes it from b.
func (r *Dir) Signature(ev *verify.Evidence, raw []byte, subject ocispec.Descriptor, b *verify.Budget) error {
	return ev.Fill(b.Kind, raw, subject, func(d ocispec.Descriptor) ([]byte, error) { return r.Blob(d, b.Envelope) })
}

// Inconclusive reports whether err, of one of Dir's methods, left open what a file
// holds.
func Inconclusive(err error) bool {
	return errors.Is(err, verify.ErrUnreachable) || errors.Is(err, verify.ErrBudget)
}
