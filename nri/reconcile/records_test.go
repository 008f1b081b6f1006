package reconcile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
)

// records are containerd's images as a test sets them up. They are asked for nothing else.
type records struct {
	containerd.Records
	mu     sync.Mutex
	images map[string]ocispec.Descriptor
	blobs  map[digest.Digest][]byte
	calls  int

	reads func(digest.Digest) // called while a blob is read; nil is allowed
	fails atomic.Bool         // the list cannot be had
	full  atomic.Bool         // it does not fit one answer
	lists atomic.Int64        // how often it was asked for
}

func newRecords() *records {
	return &records{images: map[string]ocispec.Descriptor{}, blobs: map[digest.Digest][]byte{}}
}

func (r *records) Images(context.Context) ([]containerd.Record, error) {
	r.lists.Add(1)
	switch {
	case r.fails.Load():
		return nil, errors.New("no answer")
	case r.full.Load():
		return nil, fmt.Errorf("image records: %w", containerd.ErrTooMany)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	var list []containerd.Record
	for name, d := range r.images {
		list = append(list, containerd.Record{Name: name, Target: d})
	}
	return list, nil
}

func (r *records) Blob(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if r.reads != nil {
		r.reads(d.Digest)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	if d.Size > containerd.MaxBlob {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "too large"}
	}
	if raw, ok := r.blobs[d.Digest]; ok {
		return raw, nil
	}
	return nil, fmt.Errorf("blob: %w", containerd.ErrNotFound)
}

// put stores v as JSON under its digest.
func (r *records) put(mediaType string, v any) ocispec.Descriptor {
	raw, _ := json.Marshal(v)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	r.blobs[d.Digest] = raw
	return d
}

// image is one made up image.
type image struct{ config, manifest ocispec.Descriptor }

// image stores an image with one layer; entry makes its config its own.
func (r *records) image(entry, layer string) image {
	config := r.put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platforms.DefaultSpec(),
		Config:   ocispec.ImageConfig{Entrypoint: []string{entry}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString(layer)}},
	})
	return image{config, r.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("gz" + entry), Size: 3}},
	})}
}

// index stores an index of manifests for this platform.
func (r *records) index(list ...ocispec.Descriptor) ocispec.Descriptor {
	p := platforms.DefaultSpec()
	for i := range list {
		list[i].Platform = &p
	}
	return r.put(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list,
	})
}

// options parse names as the program does, but for aliases; verify/policy tests those.
func options(revision byte) containerd.Options {
	return containerd.Options{
		ParseName: func(s string) (verify.Name, error) {
			if s == "" || strings.HasPrefix(s, "sha256:") {
				return verify.Name{}, errors.New("is an image ID")
			}
			name, d, _ := strings.Cut(s, "@")
			host, path, _ := strings.Cut(name, "/")
			return verify.Name{Host: host, Path: path, Digest: digest.Digest(d)}, nil
		},
		ParseRecord: func(s string) (string, error) { return s, nil },
		Now:         time.Now,
		Revision:    verify.Revision{revision},
	}
}
