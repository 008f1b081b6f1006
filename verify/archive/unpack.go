package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// compressed opens the file of that name if it is compressed; else it is nil.
func compressed(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, err
	}
	var head [4]byte
	n, _ := f.ReadAt(head[:], 0) // what cannot be read, the next reader says
	if bytes.HasPrefix(head[:n], magicGzip) || bytes.HasPrefix(head[:n], magicZstd) {
		return f, nil
	}
	f.Close()
	return nil, nil
}

// unpack unpacks the tar file in, compressed or not, into a directory below scratch,
// which c removes. Only files of a layout are written, and of those none that is
// longer than any evidence or that looks like a layer.
func (c *Contents) unpack(ctx context.Context, in io.Reader, scratch string) (err error) {
	if c.scratch, err = os.MkdirTemp(scratch, unfinished+"in-"); err != nil {
		return err
	}
	c.path = c.scratch
	buffered := bufio.NewReaderSize(in, 64<<10)
	in = buffered
	head, _ := buffered.Peek(6) // a shorter one is no tar file, and the reader says so
	switch {
	case bytes.HasPrefix(head, magicGzip):
		z, err := gzip.NewReader(in)
		if err != nil {
			return fmt.Errorf("gzip: %w", err)
		}
		in = z
	case bytes.HasPrefix(head, magicZstd):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		in = z
	default:
		if kind := layout.Compression(head); kind != "" {
			return fmt.Errorf("it is compressed with %s, which is not read: unpack it, or pack it with gzip or zstd", kind)
		}
	}
	root, err := os.OpenRoot(c.scratch)
	if err != nil {
		return err
	}
	defer root.Close()
	r := &metered{in, ctx, maxStream}
	t := tar.NewReader(r)
	left := int64(maxBytes)
	isLayout, isDocker, below := false, false, ""
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			// To the end, so that a checksum of the compression counts.
			if _, err = io.Copy(io.Discard, r); err == nil && isDocker && !isLayout {
				err = layout.ErrDocker
			} else if err == nil && below != "" && !isLayout {
				err = fmt.Errorf("it is no OCI image layout: no %s at its top; one is in %s/ there", ocispec.ImageLayoutFile, text.Clean(below, 80))
			}
			return err
		}
		if err != nil {
			return fmt.Errorf("tar file: %w", err)
		}
		if n == 4*maxDocuments {
			return fmt.Errorf("%w: more than %d files in the tar file", verify.ErrBudget, n)
		}
		name := path.Clean(h.Name)
		isLayout, isDocker = isLayout || name == ocispec.ImageLayoutFile, isDocker || name == "manifest.json"
		if below == "" && path.Base(name) == ocispec.ImageLayoutFile && path.Dir(name) != "." {
			below = path.Dir(name)
		}
		if h.Typeflag != tar.TypeReg || !ofLayout(name) || h.Size > maxBlob {
			continue
		}
		body := bufio.NewReaderSize(t, 512)
		if strings.HasPrefix(name, ocispec.ImageBlobsDir+"/") && h.Size > 1<<20 && layer(body) {
			continue
		}
		if left -= h.Size; left < 0 {
			return fmt.Errorf("%w: more than %d MiB that may be evidence: unpack the file, and name the directory", verify.ErrBudget, maxBytes>>20)
		}
		if err := spool(root, name, body); err != nil {
			return err
		}
	}
}

// ofLayout reports whether name is that of a file of a layout.
func ofLayout(name string) bool {
	if name == ocispec.ImageLayoutFile || name == ocispec.ImageIndexFile {
		return true
	}
	rest, ok := strings.CutPrefix(name, ocispec.ImageBlobsDir+"/")
	alg, encoded, _ := strings.Cut(rest, "/")
	return ok && digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded).Validate() == nil
}

// layer reports whether r begins as layers do: compressed, or as a tar file.
func layer(r *bufio.Reader) bool {
	head, _ := r.Peek(512)
	return bytes.HasPrefix(head, magicGzip) || bytes.HasPrefix(head, magicZstd) || len(head) > 262 && string(head[257:262]) == "ustar"
}

// spool writes a file that is not there yet.
func spool(root *os.Root, name string, r io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s is in the tar file twice", name)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// metered ends a stream that has no end.
type metered struct {
	r    io.Reader
	ctx  context.Context
	left int64
}

func (m *metered) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	if m.left <= 0 {
		return 0, fmt.Errorf("%w: more than %d GiB", verify.ErrBudget, maxStream>>30)
	}
	n, err := m.r.Read(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	return n, err
}
