package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/tidewaiter/tidewaiter/verify"
)

// records is containerd's state as a test sets it up.
type records struct {
	images       map[string]ocispec.Descriptor
	blobs        map[digest.Digest][]byte
	snapshots    map[string]map[string]Snapshot // snapshotter, key
	snapshotters []string
	runtimes     map[string]string
	configs      map[string]digest.Digest
	pulled       map[digest.Digest]bool // blobs that a registry is noted for
	pulledErr    error                  // Pulled fails with it
	err          error                  // every call fails with it
	mu           sync.Mutex
	calls        int
}

func newRecords() *records {
	return &records{
		images:       map[string]ocispec.Descriptor{},
		blobs:        map[digest.Digest][]byte{},
		snapshots:    map[string]map[string]Snapshot{"overlayfs": {}, "native": {}},
		snapshotters: []string{"native", "overlayfs"},
		runtimes:     map[string]string{"pod": "io.containerd.runc.v2"},
		configs:      map[string]digest.Digest{},
	}
}

// called counts a call, unless it fails before anybody is asked.
func (r *records) called(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	return nil
}

func (r *records) Image(ctx context.Context, name string) (ocispec.Descriptor, error) {
	if err := r.called(ctx); err != nil {
		return ocispec.Descriptor{}, err
	}
	d, ok := r.images[name]
	if !ok {
		return d, errors.Join(r.err, fmt.Errorf("image %s: %w", name, ErrNotFound))
	}
	return d, r.err
}

func (r *records) Images(ctx context.Context) ([]Record, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	var list []Record
	for name, d := range r.images {
		list = append(list, Record{name, d})
	}
	return list, r.err
}

func (r *records) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	if d.Size > MaxBlob {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "too large"}
	}
	raw, ok := r.blobs[d.Digest]
	if !ok {
		return nil, fmt.Errorf("blob: %w", ErrNotFound)
	}
	if r.err != nil {
		return nil, r.err
	}
	return checked(raw, d)
}

func (r *records) Snapshot(ctx context.Context, snapshotter, key string) (Snapshot, error) {
	if err := r.called(ctx); err != nil {
		return Snapshot{}, err
	}
	s, ok := r.snapshots[snapshotter][key]
	if !ok {
		return s, fmt.Errorf("snapshot: %w", ErrNotFound)
	}
	return s, r.err
}

func (r *records) Snapshotters(ctx context.Context) ([]string, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	return r.snapshotters, r.err
}

func (r *records) SandboxRuntime(ctx context.Context, id string) (string, error) {
	if err := r.called(ctx); err != nil {
		return "", err
	}
	return r.runtimes[id], r.err
}

func (r *records) ContainerConfig(ctx context.Context, id string) (digest.Digest, error) {
	if err := r.called(ctx); err != nil {
		return "", err
	}
	d, ok := r.configs[id]
	if !ok {
		return "", ErrNotFound
	}
	return d, r.err
}

// put stores v as JSON (or bytes as they are) under its digest.
func (r *records) Pulled(ctx context.Context, d digest.Digest) (bool, error) {
	if err := r.called(ctx); err != nil {
		return false, err
	}
	return r.pulled[d], cmp.Or(r.pulledErr, r.err)
}

func (r *records) put(mediaType string, v any) ocispec.Descriptor {
	raw, ok := v.([]byte)
	if !ok {
		raw, _ = json.Marshal(v)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	r.blobs[d.Digest] = raw
	return d
}

// image is one made up image.
type image struct {
	config, manifest ocispec.Descriptor
	chain            string
}

// image stores an image with the given layers; entry makes its config its own.
func (r *records) image(entry string, layers ...string) image {
	var diffs []digest.Digest
	for _, l := range layers {
		diffs = append(diffs, digest.FromString(l))
	}
	p := platforms.DefaultSpec()
	c := ocispec.Image{Platform: p, Config: ocispec.ImageConfig{Entrypoint: []string{entry}}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}}
	config := r.put(ocispec.MediaTypeImageConfig, c)
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("gz" + entry), Size: 3}}}
	m.SchemaVersion = 2
	return image{config, r.put(ocispec.MediaTypeImageManifest, m), identity.ChainID(diffs).String()}
}

func (r *records) index(list ...ocispec.Descriptor) ocispec.Descriptor {
	i := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: list}
	i.SchemaVersion = 2
	return r.put(ocispec.MediaTypeImageIndex, i)
}

// on says for which platform an index lists a manifest.
func on(d ocispec.Descriptor, p ocispec.Platform) ocispec.Descriptor {
	d.Platform = &p
	return d
}

var (
	here      = platforms.DefaultSpec()
	elsewhere = ocispec.Platform{OS: "linux", Architecture: "s390x"}
)

// names parse as in the program, but for aliases; verify/policy tests those.
func testOptions() Options {
	return Options{
		ParseName: func(s string) (verify.Name, error) {
			if s == "" || strings.HasPrefix(s, "sha256:") {
				return verify.Name{}, errors.New("is an image ID")
			}
			name, d, _ := strings.Cut(s, "@")
			host, path, _ := strings.Cut(name, "/")
			return verify.Name{Host: host, Path: path, Digest: digest.Digest(d)}, nil
		},
		ParseRecord: func(s string) (string, error) { return s, nil },
		Now:         func() time.Time { return time.Unix(1e9, 0) },
	}
}

const ctrID = "c1"

// container is what NRI sends; config and target are empty before containerd 2.4.
func container(name string, target, config digest.Digest) *api.Container {
	c := &api.Container{Id: ctrID, PodSandboxId: "pod", Name: "main", Annotations: map[string]string{annotationImage: name}}
	if config != "" {
		c.Image = &api.Image{Name: name, Digest: target.String(), ConfigDigest: config.String()}
	}
	return c
}
