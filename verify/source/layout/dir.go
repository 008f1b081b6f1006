package layout

import (
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

// A Dir reads the files of a layout directory, for this package and for the node's
// store. What it returns is what its digest says, or an error. It is safe for
// concurrent use.
type Dir struct{ Root *os.Root }

// BlobPath is where the blob with a valid digest lies.
func BlobPath(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// Read reads a regular file after admit, told its size, has agreed. Links that
// lead out of the directory are refused (os.Root); a FIFO or a device is opened
// without waiting and then refused. A file that is not there is fs.ErrNotExist;
// what else keeps it from being read is verify.ErrUnreachable.
func (r *Dir) Read(name string, admit func(int64) error) ([]byte, error) {
	f, err := r.Root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", verify.ErrUnreachable, name)
	}
	if err := admit(info.Size()); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	raw := make([]byte, info.Size())
	if _, err := io.ReadFull(f, raw); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", verify.ErrUnreachable, name, err)
	}
	return raw, nil
}

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
