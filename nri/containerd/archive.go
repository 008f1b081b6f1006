package containerd

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// archived reports whether m has the form of a manifest that was made for an image of an
// archive. No one can have signed such a manifest. A registry may hold one of the same
// form, so form alone proves nothing: see [Records.Pulled]. There are two kinds:
// containerd's, for an archive without a manifest (core/images/archive/importer.go:
// Docker's media types, no other field, often uncompressed layers), and those that docker
// save of Docker 25 and later and podman save write, with uncompressed layers only.
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

// Explain returns a Verifier that answers as next does. If an image that was imported
// from an archive is denied because there is no signature, the answer also says what to
// do about that. Only the message depends on it.
func (r *Resolver) Explain(next verify.Verifier) verify.Verifier {
	pulled, _ := lru.New[digest.Digest, bool](maxPulled) // fails only for a size below 1
	return explainer{next, r, pulled}
}

type explainer struct {
	next   verify.Verifier
	known  *Resolver
	pulled *lru.Cache[digest.Digest, bool] // what containerd said last, by manifest
}

// maxPulled bounds the manifests of which it is remembered where they came from.
const maxPulled = 256

// importHint is the next step for an image whose manifest containerd or docker made.
const importHint = "; the image was imported from an archive without its registry's manifest: if that is signed, run tidewaiter evidence export at the registry, and tidewaiter evidence import here"

// Verify implements [verify.Verifier].
func (e explainer) Verify(ctx context.Context, img verify.Image) verify.Decision {
	d := e.next.Verify(ctx, img)
	if d.EnforceReason() != verify.SignatureMissing {
		return d
	}
	l, ok := e.known.resolutions.Peek(plain(img.Target))
	if !ok || !l.archived {
		return d
	}
	if known, pulled := e.isPulled(ctx, l.manifest.Digest); known && !pulled {
		d.Detail += importHint
	}
	return d
}

// isPulled reports whether containerd noted a registry that a manifest came from. A
// question that waits for nothing, as most of the hook's, gets what was said last. If
// containerd does not answer it is not known: the hint would be a guess.
func (e explainer) isPulled(ctx context.Context, manifest digest.Digest) (known, pulled bool) {
	if ctx.Err() != nil {
		pulled, known = e.pulled.Get(manifest)
		return known, pulled
	}
	pulled, err := e.known.records.Pulled(ctx, manifest)
	if err != nil {
		return false, false
	}
	e.pulled.Add(manifest, pulled)
	return true, pulled
}
