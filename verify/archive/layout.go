package archive

import (
	"archive/tar"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/durable"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// A Layout is one to be written. The same content makes the same bytes. The zero
// Layout is empty.
type Layout struct {
	entries []ocispec.Descriptor
	listed  map[string]bool // digests and names of entries
	blobs   map[digest.Digest]func() ([]byte, error)
	sizes   map[digest.Digest]int64
	bytes   int64
}

// add adds a blob.
func (l *Layout) add(mediaType string, raw []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	l.put(d, func() ([]byte, error) { return raw, nil })
	return d
}

// put adds the blob that d describes, which is read when it is written.
func (l *Layout) put(d ocispec.Descriptor, read func() ([]byte, error)) {
	if l.blobs == nil {
		l.blobs, l.sizes = map[digest.Digest]func() ([]byte, error){}, map[digest.Digest]int64{}
	}
	if l.blobs[d.Digest] == nil {
		l.blobs[d.Digest], l.sizes[d.Digest] = read, d.Size
		l.bytes += d.Size
	}
}

// has reports whether there is such a blob.
func (l *Layout) has(d digest.Digest) bool { return l.blobs[d] != nil }

// list lists d in index.json, once under a name.
func (l *Layout) list(d ocispec.Descriptor) {
	d.Data, d.URLs = nil, nil
	if l.listed == nil {
		l.listed = map[string]bool{}
	}
	if key := d.Digest.String() + " " + nameOf(d); !l.listed[key] {
		l.listed[key], l.entries = true, append(l.entries, d)
	}
}

// artifact adds a manifest of layers, and lists it under name.
func (l *Layout) artifact(artifactType, name string, layers []ocispec.Descriptor) error {
	empty := ocispec.DescriptorEmptyJSON
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: ocispec.Descriptor{MediaType: empty.MediaType, Digest: empty.Digest, Size: empty.Size}, Layers: layers,
	})
	if err != nil {
		return err
	}
	l.add(empty.MediaType, empty.Data)
	d := l.add(ocispec.MediaTypeImageManifest, raw)
	d.ArtifactType, d.Annotations = artifactType, map[string]string{annotationName: name}
	l.list(d)
	return nil
}

// each hands every file of the layout to fn, index.json last: who finds that finds the
// rest.
func (l *Layout) each(fn func(name string, raw []byte) error) error {
	slices.SortFunc(l.entries, func(x, y ocispec.Descriptor) int {
		return cmp.Or(cmp.Compare(nameOf(x), nameOf(y)), strings.Compare(string(x.Digest), string(y.Digest)))
	})
	if l.entries == nil {
		l.entries = []ocispec.Descriptor{}
	}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: l.entries})
	if err != nil {
		return err
	}
	if len(index) > maxDocument {
		return fmt.Errorf("%w: index.json would have %d bytes: make several evidence archives", verify.ErrBudget, len(index))
	}
	// What could not be read is not written: of a tar file no more files are.
	if n := len(l.blobs) + 2; n > layout.MaxFiles {
		return fmt.Errorf("%w: the evidence archive would have %d files, and of one at most %d are read: make several evidence archives", verify.ErrBudget, n, layout.MaxFiles)
	}
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := fn(ocispec.ImageLayoutFile, version); err != nil {
		return err
	}
	for _, d := range slices.Sorted(maps.Keys(l.blobs)) {
		raw, err := l.blobs[d]()
		if err != nil {
			return err
		}
		if d.Algorithm().FromBytes(raw) != d {
			return fmt.Errorf("%s is not what its digest says", d)
		}
		if err := fn(layout.BlobPath(d), raw); err != nil {
			return err
		}
	}
	return fn(ocispec.ImageIndexFile, index)
}

// Tar writes the layout as a tar file.
func (l *Layout) Tar(w io.Writer) error {
	t := tar.NewWriter(w)
	err := l.each(func(name string, raw []byte) error {
		err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(raw)), ModTime: time.Unix(0, 0)})
		if err == nil {
			_, err = t.Write(raw)
		}
		return err
	})
	if err != nil {
		return err
	}
	return t.Close()
}

// Write writes the layout to name: a tar file where that ends in .tar, else a directory,
// which must not exist or be empty. What is there under the name of a tar file is
// replaced when the new one is whole.
func (l *Layout) Write(name string) error {
	if strings.HasSuffix(name, ".tar") {
		return durable.Replace(name, func(f *os.File) error { return errors.Join(l.Tar(f), f.Chmod(0o644)) })
	}
	if err := os.MkdirAll(name, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	_, err = f.Readdirnames(1)
	f.Close()
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s is not empty: name a new directory, or a file that ends in .tar", name)
	}
	return l.each(func(file string, raw []byte) error {
		if err := root.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		return root.WriteFile(file, raw, 0o644)
	})
}
