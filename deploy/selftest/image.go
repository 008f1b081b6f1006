package selftest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// program is what containers of a test would run. It is no program: should one be
// started all the same, that fails.
const program = "/tidewaiter-selftest"

// tag is what the tag of each image of a test begins with.
const tag = "tidewaiter-selftest-"

// A blob is content of an image.
type blob struct {
	ocispec.Descriptor
	raw    []byte
	labels map[string]string // what it leads to, for containerd's garbage collection
}

func newBlob(mediaType string, raw []byte) blob {
	return blob{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw: raw}
}

// build makes an image without a signature: its nonce was never seen before.
// Its manifest is the last blob.
func build(nonce string) ([]blob, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	text := "This image was made by tidewaiter selftest " + nonce + ", which removes it.\n"
	if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(program, "/"), Mode: 0o444, Size: int64(len(text)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}); err != nil {
		return nil, err
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	content := newBlob(ocispec.MediaTypeImageLayer, layer.Bytes())
	raw, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   ocispec.ImageConfig{Entrypoint: []string{program}, Labels: map[string]string{label: nonce}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{content.Digest}},
	})
	if err != nil {
		return nil, err
	}
	config := newBlob(ocispec.MediaTypeImageConfig, raw)
	raw, err = json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config.Descriptor, Layers: []ocispec.Descriptor{content.Descriptor},
	})
	if err != nil {
		return nil, err
	}
	manifest := newBlob(ocispec.MediaTypeImageManifest, raw)
	manifest.labels = map[string]string{
		"containerd.io/gc.ref.content.config": config.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    content.Digest.String(),
	}
	return []blob{content, config, manifest}, nil
}

// expires bounds how long containerd keeps what a test left that was killed.
const expires = 10 * time.Minute

// importImage puts the image on the node, under names, and returns its ID. The lease
// keeps it until the names lead to it.
func (c *client) importImage(ctx context.Context, nonce string, blobs []blob, names []string, now time.Time) (id string, err error) {
	end := now.Add(expires).UTC().Format(time.RFC3339)
	lease := tag + nonce
	if _, err := c.leases.Create(in(ctx, ""), &leasesapi.CreateRequest{ID: lease, Labels: map[string]string{"containerd.io/gc.expire": end}}); err != nil {
		return "", fmt.Errorf("lease: %w", err)
	}
	for _, b := range blobs {
		if err := c.write(in(ctx, lease), lease, b); err != nil {
			return "", fmt.Errorf("content %s: %w", b.Digest, err)
		}
	}
	manifest := blobs[len(blobs)-1]
	for _, name := range names {
		_, err := c.images.Create(in(ctx, lease), &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
			Name:   name,
			Labels: map[string]string{label: nonce, "containerd.io/gc.expire": end},
			Target: &types.Descriptor{MediaType: manifest.MediaType, Digest: manifest.Digest.String(), Size: manifest.Size},
		}})
		if err != nil {
			return "", fmt.Errorf("image %s: %w", name, err)
		}
	}
	// CRI learns of it by an event.
	for _, name := range names {
		for {
			if id, err = c.imageID(ctx, name); err != nil {
				return "", err
			}
			if id != "" {
				break
			}
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return "", fmt.Errorf("CRI does not learn of the image %s: %w", name, err)
			}
		}
	}
	return id, nil
}

func (c *client) write(ctx context.Context, ref string, b blob) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.content.Write(ctx)
	if err != nil {
		return err
	}
	err = s.Send(&contentapi.WriteContentRequest{
		Action: contentapi.WriteAction_COMMIT, Ref: ref + "-" + b.Digest.Encoded()[:12], Total: b.Size, Expected: b.Digest.String(), Data: b.raw, Labels: b.labels,
	})
	if err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		if status.Code(err) == codes.AlreadyExists {
			return nil
		}
		if err != nil {
			return err
		}
		if r.GetAction() == contentapi.WriteAction_COMMIT {
			return s.CloseSend()
		}
	}
}

// forget removes an image with all its names. The last removal waits until the content
// is gone, unless something else has it.
func (c *client) forget(ctx context.Context, nonce, id string, names []string) (failed error) {
	if id != "" {
		failed = c.removeImage(ctx, id)
		names = append(names, id)
	}
	for _, name := range names {
		if _, err := c.images.Delete(in(ctx, ""), &imagesapi.DeleteImageRequest{Name: name}); err != nil && status.Code(err) != codes.NotFound {
			failed = errors.Join(failed, err)
		}
	}
	if _, err := c.leases.Delete(in(ctx, ""), &leasesapi.DeleteRequest{ID: tag + nonce, Sync: true}); err != nil && status.Code(err) != codes.NotFound {
		failed = errors.Join(failed, err)
	}
	return failed
}

// stale removes what a test left that was killed.
func (c *client) stale(ctx context.Context, now time.Time) error {
	before := now.Add(-expires)
	pods, err := c.stalePods(ctx, before)
	if err != nil {
		return err
	}
	for _, id := range pods {
		err = errors.Join(err, c.removePod(ctx, id))
	}
	list, failed := c.images.List(in(ctx, ""), &imagesapi.ListImagesRequest{})
	if failed != nil {
		return errors.Join(err, failed)
	}
	for _, i := range list.GetImages() {
		nonce := i.GetLabels()[label]
		if nonce == "" || !strings.HasSuffix(i.GetName(), ":"+tag+nonce) || i.GetCreatedAt().AsTime().After(before) {
			continue
		}
		id, failed := c.imageID(ctx, i.GetName())
		err = errors.Join(err, failed, c.forget(ctx, nonce, id, []string{i.GetName()}))
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
