package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	// MaxBlob bounds an index, manifest or config that is read, in bytes: what
	// registries accept as a manifest. It also bounds all that one selection reads:
	// the node waits for it, and the author of an image could make that seconds.
	MaxBlob = 4 << 20
	// maxListed bounds the manifests and layers that all documents of one selection
	// name. No real image comes near: what a snapshotter can stack is some hundred
	// layers, and one index has at most oci.MaxList entries.
	maxListed = 2 * oci.MaxList
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
	// What was selected is the last manifest that was read.
	if p.last.Digest == "" || p.config != m.Config.Digest {
		return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "it is not plain which manifest is selected"}
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return ocispec.Descriptor{}, m, &verify.Fault{Reason: verify.NotAnImage,
			Detail: fmt.Sprintf("the manifest's config has media type %s, which no image has", text.Quote(m.Config.MediaType, 80))}
	}
	return p.last, m, nil
}

// A provider hands documents to containerd's code and keeps what was read last. It hands
// over what counts for a selection and no more: each is read by package oci, which takes
// no more memory than that, and refuses what decoders read differently.
type provider struct {
	read   Reader
	reads  int
	size   int64              // bytes of what was read
	listed int                // manifests and layers that it names
	last   ocispec.Descriptor // last manifest read
	config digest.Digest      // of that
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
	switch {
	case images.IsManifestType(d.MediaType):
		doc, err := p.document(raw, d.MediaType)
		if err != nil {
			return nil, err
		}
		p.last, p.config = ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, doc.Config.Digest
		for i := range doc.Layers {
			doc.Layers[i].ArtifactType, doc.Layers[i].Platform = "", nil
		}
		return json.Marshal(ocispec.Manifest{MediaType: doc.MediaType, Config: doc.Config, Layers: doc.Layers})
	case images.IsIndexType(d.MediaType):
		doc, err := p.document(raw, d.MediaType)
		if err != nil {
			return nil, err
		}
		for i := range doc.Manifests {
			doc.Manifests[i].ArtifactType = ""
		}
		return json.Marshal(ocispec.Index{MediaType: doc.MediaType, Manifests: doc.Manifests})
	}
	c, err := oci.ReadConfig(raw) // of a manifest for which the index names no platform
	if err != nil {
		return nil, unread(err, verify.ImageAmbiguous)
	}
	return json.Marshal(c.Platform)
}

// document reads a manifest or index that is referred to as one of mediaType.
func (p *provider) document(raw []byte, mediaType string) (oci.Document, error) {
	doc, err := oci.Read(raw)
	if err == nil {
		err = unambiguous(doc.Head, mediaType)
	}
	if err == nil {
		if p.listed += len(doc.Manifests) + len(doc.Layers); p.listed > maxListed {
			err = fmt.Errorf("%w: %d manifests and layers in all, limit %d", oci.ErrLimit, p.listed, maxListed)
		}
	}
	if err != nil {
		return doc, unread(err, verify.ImageAmbiguous)
	}
	return doc, nil
}

// unread is the fault of a document that cannot be read, of the class otherwise unless
// it is too long.
func unread(err error, otherwise verify.Reason) *verify.Fault {
	if errors.Is(err, oci.ErrLimit) {
		return &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "an index, manifest or config of the image is too long to be read: " + err.Error()}
	}
	return &verify.Fault{Reason: otherwise, Detail: err.Error()}
}

type readerAt struct{ *bytes.Reader }

func (readerAt) Close() error { return nil }

// unambiguous checks that a document is a manifest or an index and not both, and agrees
// with the media type under which it is referred to (GHSA-77vh-xpmg-72qh).
func unambiguous(doc oci.Head, mediaType string) error {
	if doc.MediaType != "" && doc.MediaType != mediaType {
		return fmt.Errorf("the document says it is %s and is referred to as %s", text.Quote(doc.MediaType, 80), text.Quote(mediaType, 80))
	}
	index, manifest := doc.HasManifests, doc.HasLayers || doc.HasConfig || doc.HasFSLayers
	switch {
	case index && manifest:
		return errors.New("the document is an index and a manifest at once")
	case doc.HasFSLayers:
		return errors.New("the document has the layers of schema 1, which containerd does not take")
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

// rootfs returns the diff IDs of an image config.
func rootfs(raw []byte) ([]digest.Digest, error) {
	c, err := oci.ReadConfig(raw)
	if err != nil {
		return nil, unread(fmt.Errorf("the image config: %w", err), verify.NotAnImage)
	}
	if c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) == 0 {
		return nil, &verify.Fault{Reason: verify.NotAnImage, Detail: "the image config has no root filesystem"}
	}
	for _, d := range c.RootFS.DiffIDs {
		if d.Validate() != nil {
			return nil, &verify.Fault{Reason: verify.NotAnImage, Detail: "the image config has a broken diff ID"}
		}
	}
	return c.RootFS.DiffIDs, nil
}
