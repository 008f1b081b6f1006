package layout

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Bounds of a tar file. A store of 64 MiB has fewer files.
// MaxFiles is for who writes one.
const (
	MaxFiles   = 1 << 15  // of any kind
	maxHeaders = 64 << 20 // bytes of all headers
)

// A Tar is where the files of a layout lie in an uncompressed tar file. It does not
// change, and says nothing about a file that has changed since.
type Tar struct {
	of     os.FileInfo
	files  map[string]extent // by their names in a layout
	docker bool              // it has what docker save wrote before it wrote layouts
	below  string            // the first directory in it that a layout lies in; empty: none
}

// Files is how many files of a layout there are; a nil Tar has none.
func (t *Tar) Files() int {
	if t == nil {
		return 0
	}
	return len(t.files)
}

// An extent is where a file lies.
type extent struct{ offset, size int64 } // size below 0: it is no regular file

// still reports whether info is of the version of the file that was scanned.
func (t *Tar) still(info os.FileInfo) bool {
	return t != nil && same(t.of, info)
}

// scan reads the headers in f, and never what the files hold. What is no file of a
// layout is passed over. Sparse files, a file of a layout that is there twice and an
// archive without an end are refused: what they hold depends on who reads them.
func scan(ctx context.Context, f *os.File, of os.FileInfo) (*Tar, error) {
	r := &headers{SectionReader: io.NewSectionReader(f, 0, of.Size()), ctx: ctx, left: maxHeaders}
	switch kind := compression(r); kind {
	case "":
	case "xz", "bzip2", "lz4":
		return nil, fmt.Errorf("%w: it is compressed with %s, which is not read: unpack it, or pack it with gzip or zstd for tidewaiter evidence import", verify.ErrUnreachable, kind)
	default:
		return nil, fmt.Errorf("%w: it is compressed with %s, and is read in place only uncompressed: tidewaiter evidence import unpacks what gzip and zstd have compressed", verify.ErrUnreachable, kind)
	}
	t := &Tar{of: of, files: map[string]extent{}}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if !r.ended() {
				return nil, fmt.Errorf("%w: the tar file has no end: it is cut off, or not yet whole", verify.ErrUnreachable)
			}
			return t, nil
		}
		if errors.Is(err, verify.ErrBudget) || errors.Is(err, verify.ErrUnreachable) {
			return nil, err
		}
		if err != nil && n == 0 {
			return nil, fmt.Errorf("%w: it is neither a directory nor a tar file: %w", verify.ErrUnreachable, err)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: tar file, header %d: %w", verify.ErrUnreachable, n+1, err)
		}
		if n == MaxFiles {
			return nil, fmt.Errorf("%w: more than %d files in the tar file", verify.ErrBudget, MaxFiles)
		}
		t.docker = t.docker || path.Clean(h.Name) == "manifest.json"
		if at := path.Clean(h.Name); t.below == "" && path.Base(at) == ocispec.ImageLayoutFile && path.Dir(at) != "." {
			t.below = path.Dir(at)
		}
		name, ok := fileOf(h.Name)
		if !ok || h.Typeflag == tar.TypeDir {
			continue
		}
		if _, twice := t.files[name]; twice {
			return nil, fmt.Errorf("%w: %s is in the tar file twice", verify.ErrUnreachable, name)
		}
		if sparse(h) {
			return nil, fmt.Errorf("%w: %s is a sparse file in the tar file", verify.ErrUnreachable, name)
		}
		at, err := r.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		if h.Typeflag != tar.TypeReg {
			h.Size = -1
		} else if h.Size > of.Size()-at {
			return nil, fmt.Errorf("%w: %s goes beyond the end of the tar file", verify.ErrUnreachable, name)
		}
		t.files[name] = extent{at, h.Size}
	}
}

// fileOf returns what a layout calls the file that is named so in a tar file, if it
// is one of a layout.
func fileOf(name string) (string, bool) {
	if name = path.Clean(name); name == ocispec.ImageLayoutFile || name == ocispec.ImageIndexFile {
		return name, true
	}
	rest, ok := strings.CutPrefix(name, ocispec.ImageBlobsDir+"/")
	alg, encoded, _ := strings.Cut(rest, "/")
	if !ok || digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded).Validate() != nil {
		return "", false
	}
	return strings.Clone(name), true // without the rest of the header
}

// sparse reports whether the data of the file are not what lies in the archive.
func sparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// headers is the part of a tar file that a scan reads: everything that it does not
// seek past.
type headers struct {
	*io.SectionReader
	ctx  context.Context
	left int64
}

func (r *headers) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	if r.left <= 0 {
		return 0, fmt.Errorf("%w: more than %d MiB of headers in the tar file", verify.ErrBudget, maxHeaders>>20)
	}
	n, err := r.SectionReader.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, err
}

// ended reports whether two blocks of zeros, which end an archive, were read last.
func (r *headers) ended() bool {
	var end [1024]byte
	at, err := r.Seek(0, io.SeekCurrent)
	if err != nil || at < int64(len(end)) {
		return false
	}
	_, err = r.ReadAt(end[:], at-int64(len(end)))
	return err == nil && end == [1024]byte{}
}

// compression names what r is compressed with, if it is.
func compression(r io.ReaderAt) string {
	var head [6]byte
	_, _ = r.ReadAt(head[:], 0) // a shorter one is no tar file either, and the scan says so
	return Compression(head[:])
}

// Compression names what a file that begins with head is compressed with, if it is: gzip,
// zstd, xz, bzip2 or lz4.
func Compression(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return "xz"
	case bytes.HasPrefix(head, []byte("BZh")):
		return "bzip2"
	case bytes.HasPrefix(head, []byte{0x04, 0x22, 0x4d, 0x18}), bytes.HasPrefix(head, []byte{0x02, 0x21, 0x4c, 0x18}):
		return "lz4"
	}
	return ""
}
