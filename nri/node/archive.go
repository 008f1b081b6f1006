package node

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// archived reports whether m seems to be a manifest that was made for an image of an
// archive, and that nobody can have signed. Nothing but a message depends on it. There
// are those of containerd, for an archive that has none (core/images/archive/importer.go:
// Docker's media types and nothing but what it has to say, and often layers that are not
// compressed), and those that docker save of Docker 25 and later writes, and podman save,
// whose layers are none of them compressed, as few registries have them.
func archived(manifest ocispec.Descriptor, m ocispec.Manifest) bool {
	switch manifest.MediaType {
	case images.MediaTypeDockerSchema2Manifest:
		made, err := json.Marshal(struct {
			SchemaVersion int                  `json:"schemaVersion"`
			MediaType     string               `json:"mediaType"`
			Config        ocispec.Descriptor   `json:"config"`
			Layers        []ocispec.Descriptor `json:"layers"`
		}{2, manifest.MediaType, m.Config, m.Layers})
		return err == nil && manifest.Digest.Algorithm().FromBytes(made) == manifest.Digest || slices.ContainsFunc(m.Layers, of(images.MediaTypeDockerSchema2Layer))
	case ocispec.MediaTypeImageManifest:
		return len(m.Layers) > 0 && !slices.ContainsFunc(m.Layers, func(l ocispec.Descriptor) bool { return l.MediaType != ocispec.MediaTypeImageLayer })
	}
	return false
}

func of(mediaType string) func(ocispec.Descriptor) bool {
	return func(d ocispec.Descriptor) bool { return d.MediaType == mediaType }
}

// Explain returns a Verifier that answers as next does. Where an image from an archive
// is denied, since there is no signature, it says too what to do about that.
func (r *Resolver) Explain(next verify.Verifier) verify.Verifier { return explainer{next, r} }

type explainer struct {
	next  verify.Verifier
	known *Resolver
}

// Verify implements [verify.Verifier].
func (e explainer) Verify(ctx context.Context, img verify.Image) verify.Decision {
	d := e.next.Verify(ctx, img)
	if d.Reason != verify.SignatureMissing && (d.Reason != verify.AuditOnly || d.Would != verify.SignatureMissing) {
		return d
	}
	if l, ok := e.known.leads.Peek(plain(img.Target)); ok && l.archived {
		d.Detail = "imported from an archive without its signed manifest: where it is signed, run tidewaiter bundle create, and here tidewaiter bundle import; " + d.Detail
	}
	return d
}
