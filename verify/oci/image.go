package oci

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Media types of Docker's images. Signatures of such images have OCI types.
const (
	DockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	DockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// IsManifest reports whether mediaType is that of an image manifest.
func IsManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == DockerManifest
}

// IsIndex reports whether mediaType is that of an image index.
func IsIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == DockerList
}

// IsConfig reports whether mediaType is that of an image config.
func IsConfig(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageConfig || mediaType == DockerConfig
}

// ErrAmbiguous is wrapped if there is more than one way to read a document as an image
// manifest or index, or none.
var ErrAmbiguous = errors.New("the document is not plainly an image manifest or an index")

// MediaTypeOf returns the media type of an image manifest or index: the one that the
// document has itself, else listed, which the document that refers to it has, else the
// one that its shape has. If these do not agree, or the document is both or neither,
// readers differ about it (GHSA-77vh-xpmg-72qh) and the error wraps ErrAmbiguous.
func MediaTypeOf(raw []byte, listed string) (string, error) {
	doc, err := ReadHead(raw)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrAmbiguous, err)
	}
	index := doc.HasManifests
	if manifest := doc.HasConfig || doc.HasLayers; index == manifest {
		return "", ErrAmbiguous
	}
	mediaType := cmp.Or(doc.MediaType, listed)
	if mediaType == "" && index {
		mediaType = ocispec.MediaTypeImageIndex
	} else if mediaType == "" {
		mediaType = ocispec.MediaTypeImageManifest
	}
	fits := IsManifest(mediaType)
	if index {
		fits = IsIndex(mediaType)
	}
	if !fits || listed != "" && listed != mediaType {
		return "", fmt.Errorf("%w: media type %s does not fit it, referred to as %s", ErrAmbiguous, text.Quote(mediaType, 80), text.Quote(listed, 80))
	}
	return mediaType, nil
}

// Parent returns the descriptor of raw, and true, if raw has the digest d and names
// child: an image index that lists it with its size and media type, or, if child has no
// media type, an image manifest whose config has its digest. The signer of such a
// document signed child too. It checks the digest itself, since callers do not
// believe the source of raw.
func Parent(d digest.Digest, raw []byte, child ocispec.Descriptor) (ocispec.Descriptor, bool) {
	if d.Validate() != nil || d.Algorithm().FromBytes(raw) != d || child.Digest == "" {
		return ocispec.Descriptor{}, false
	}
	mediaType, err := MediaTypeOf(raw, "")
	if err != nil {
		return ocispec.Descriptor{}, false
	}
	doc, err := Read(raw)
	if err != nil {
		return ocispec.Descriptor{}, false
	}
	names := doc.Config.Digest == child.Digest && IsConfig(doc.Config.MediaType)
	if child.MediaType != "" {
		names = slices.ContainsFunc(doc.Manifests, func(m ocispec.Descriptor) bool {
			return m.MediaType == child.MediaType && m.Digest == child.Digest && m.Size == child.Size
		})
	}
	if !names {
		return ocispec.Descriptor{}, false
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}, true
}
