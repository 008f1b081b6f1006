package node

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	dockertar "github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Save writes an image as the tar file of an OCI image layout, with the name that
// containerd gives it when it imports the file, as `ctr images export` does.
func (i *Image) Save(ctx context.Context, path string) error {
	ref, err := i.registry.reference(i.Pinned())
	if err != nil {
		return err
	}
	desc, err := remote.Get(ref, remote.WithContext(ctx), transport)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), "layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := ocilayout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	named := ocilayout.WithAnnotations(map[string]string{"io.containerd.image.name": i.Name})
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err == nil {
			err = l.AppendIndex(index, named)
		}
		if err != nil {
			return fmt.Errorf("saving %s: %w", i.Name, err)
		}
	} else {
		img, err := desc.Image()
		if err == nil {
			err = l.AppendImage(img, named)
		}
		if err != nil {
			return fmt.Errorf("saving %s: %w", i.Name, err)
		}
	}
	return Tar(path, dir)
}

// SaveDocker writes an image as `docker save` does: without its manifest.
func (i *Image) SaveDocker(path string) error {
	tag, err := name.NewTag(i.Name)
	if err != nil {
		return err
	}
	return dockertar.WriteToFile(path, tag, i.image)
}

// Tar writes what is in a directory into a tar file.
func Tar(path, dir string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	err = errors.Join(filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: rel, Mode: 0o644, Size: int64(len(b)), Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}), w.Close(), f.Close())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
