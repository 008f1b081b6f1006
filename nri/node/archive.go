package node

import (
	"context"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// archived reports whether m seems to be a manifest that containerd made, for an image
// of a docker archive: it has Docker's media types, and layers that are not compressed,
// as no registry has them (core/images/archive/importer.go). Nothing but a message
// depends on it.
func archived(manifest ocispec.Descriptor, m ocispec.Manifest) bool {
	return manifest.MediaType == images.MediaTypeDockerSchema2Manifest &&
		slices.ContainsFunc(m.Layers, func(l ocispec.Descriptor) bool { return l.MediaType == images.MediaTypeDockerSchema2Layer })
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
