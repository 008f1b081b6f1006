package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	// MaxBlob bounds an index, manifest or config that is read, in bytes: what
	// registries accept as a manifest. It also bounds all that one selection reads:
	// the node waits for it, and the author of an image could make that seconds.
	MaxBlob = 4 << 20
	// maxBlobs bounds how many blobs one selection may read: an index that leads
	// through others ends somewhere.
	maxBlobs = 16
)

// A Reader returns the blob that d names, at most MaxBlob bytes and checked
// against d's size and digest. Its errors that say what is wrong with the
// content itself are *verify.Fault; others count as passing.
type Reader func(ctx context.Context, d ocispec.Descriptor) ([]byte, error)

// Select finds the manifest that containerd runs when an image record points to
// target, with containerd's own code (core/images.Manifest) and its default
// platform. The documents on the way must say unambiguously what they are. An
// error that is a *verify.Fault follows from the content and is the same each time.
func Select(ctx context.Context, read Reader, target ocispec.Descriptor) (ocispec.Descriptor, ocispec.Manifest, error) {
	p := &provider{read: read}
	m, err := images.Manifest(ctx, p, target, platforms.Default())
	if p.err != nil {
		err = p.err
	}
	if err != nil {
		var fault *verify.Fault
		switch {
		case errors.As(err, &fault):
			return ocispec.Descriptor{}, m, fault
		case p.failed:
			return ocispec.Descriptor{}, m, err
		}
		if errdefs.IsNotFound(err) && images.IsIndexType(target.MediaType) {
			return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.ImageUnresolved, Detail: "the index has no manifest for " + platforms.DefaultString()}
		}
		return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "no manifest can be selected: " + err.Error()}
	}
	// What was selected is the last manifest that was read. Descriptors that embed
	// their data are taken without reading; then the digests differ here.
	var check ocispec.Manifest
	if p.last.Digest == "" || json.Unmarshal(p.raw, &check) != nil || check.Config.Digest != m.Config.Digest {
		return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "the index embeds its manifests"}
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.SignedObject,
			Detail: fmt.Sprintf("the manifest's config has media type %s, which no image has", verify.Quote(m.Config.MediaType, 80))}
	}
	return p.last, m, nil
}

// A provider hands blobs to containerd's code and keeps what was read last.
type provider struct {
	read   Reader
	reads  int
	size   int64              // bytes of what was read
	last   ocispec.Descriptor // last manifest read
	raw    []byte             // its bytes
	err    error              // what ended the selection, class kept
	failed bool               // err is not about the content
}

// ReaderAt implements content.Provider.
func (p *provider) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	raw, err := p.get(ctx, d)
	if err != nil {
		if p.err == nil {
			var fault *verify.Fault
			p.err, p.failed = err, !errors.As(err, &fault)
		}
		return nil, err
	}
	return readerAt{bytes.NewReader(raw)}, nil
}

func (p *provider) get(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if p.reads++; p.reads > maxBlobs {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "the index leads through too many others"}
	}
	if d.Size < 0 || d.Size > MaxBlob-p.size {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous,
			Detail: fmt.Sprintf("its index, manifest and config have together more than %d bytes", MaxBlob)}
	}
	p.size += d.Size
	raw, err := p.read(ctx, d)
	if err != nil {
		return nil, err
	}
	if err := bounded(raw); err != nil {
		return nil, err
	}
	if images.IsManifestType(d.MediaType) || images.IsIndexType(d.MediaType) {
		if err := unambiguous(raw, d.MediaType); err != nil {
			return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: err.Error()}
		}
	}
	if images.IsManifestType(d.MediaType) {
		p.last, p.raw = ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, raw
	}
	return raw, nil
}

type readerAt struct{ *bytes.Reader }

func (readerAt) Close() error { return nil }

// unambiguous checks that one JSON document is a manifest or an index and not
// both, and agrees with the media type under which it is referred to
// (GHSA-77vh-xpmg-72qh).
func unambiguous(raw []byte, mediaType string) error {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
		FSLayers  json.RawMessage `json:"fsLayers"`
		Config    json.RawMessage `json:"config"`
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&doc); err != nil {
		return fmt.Errorf("the document is not JSON: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("the document has trailing data")
	}
	if doc.MediaType != "" && doc.MediaType != mediaType {
		return fmt.Errorf("the document says it is %s and is referred to as %s", verify.Quote(doc.MediaType, 80), verify.Quote(mediaType, 80))
	}
	index, manifest := doc.Manifests != nil, doc.Layers != nil || doc.Config != nil || doc.FSLayers != nil
	switch {
	case index && manifest:
		return errors.New("the document is an index and a manifest at once")
	case images.IsIndexType(mediaType) && !index:
		return errors.New("the document is referred to as an index and lists no manifests")
	case images.IsManifestType(mediaType) && !manifest:
		return errors.New("the document is referred to as a manifest and has neither config nor layers")
	}
	return nil
}

// checked verifies that raw is what d names.
func checked(raw []byte, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "a descriptor has no valid digest"}
	}
	if int64(len(raw)) != d.Size {
		return nil, &verify.Fault{Reason: verify.ImageMismatch, Detail: fmt.Sprintf("blob %s has %d bytes where its descriptor says %d", d.Digest, len(raw), d.Size)}
	}
	if got := d.Digest.Algorithm().FromBytes(raw); got != d.Digest {
		return nil, &verify.Fault{Reason: verify.ImageMismatch, Detail: fmt.Sprintf("blob %s in the content store has other bytes (%s): the disk was changed or is failing", d.Digest, got)}
	}
	return raw, nil
}

// bounded refuses a document whose decoding could take a hundred times its
// length in memory: its author can be anybody whose image the node pulled.
func bounded(raw []byte) error {
	if err := verify.Bounded(raw); err != nil {
		return &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "an index, manifest or config of the image is too long to be read: " + err.Error()}
	}
	return nil
}

// rootfs returns the diff IDs of an image config.
func rootfs(raw []byte) ([]digest.Digest, error) {
	if err := bounded(raw); err != nil {
		return nil, err
	}
	var c ocispec.Image
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, &verify.Fault{Reason: verify.SignedObject, Detail: "the image config is not JSON"}
	}
	if c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) == 0 {
		return nil, &verify.Fault{Reason: verify.SignedObject, Detail: "the image config has no root filesystem"}
	}
	for _, d := range c.RootFS.DiffIDs {
		if d.Validate() != nil {
			return nil, &verify.Fault{Reason: verify.SignedObject, Detail: "the image config has a broken diff ID"}
		}
	}
	return c.RootFS.DiffIDs, nil
}
