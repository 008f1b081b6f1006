// Package archive carries what a node needs to verify images to a node that has no
// registry: it gathers signatures and the manifests that they are over into one OCI
// image layout, shows what is in a layout, and takes one over into the state
// directory of the node.
//
// An archive holds evidence and no verdict. Who imports one learns whether its
// signatures verify under the node's policy, and the gate verifies them again each
// time. The one thing in an archive that can change an answer is a trust policy with
// its trust store, and it is put in force only by who asks for that ([Stage]).
//
// An archive holds no layers and no image configs: those are the image, and the
// node's runtime has them.
package archive

import (
	"errors"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Types of the artifact that trust policy and trust store are in an archive. Each of
// its layers is a file, with its path in the configuration directory in the
// annotation org.opencontainers.image.title.
const (
	ArtifactTypeTrust = "application/vnd.tidewaiter.trust.v1"
	MediaTypePolicy   = "application/vnd.tidewaiter.trust.policy.v1+json"
	MediaTypeAnchors  = "application/vnd.tidewaiter.trust.certificates.v1"
)

// TrustName is the reference name of that artifact in an archive's index.json.
const TrustName = "tidewaiter-trust"

// Bounds of an archive. What is longer is no evidence that a node can use.
const (
	maxDocuments = 1 << 15   // manifests and indexes
	maxDocument  = 4 << 20   // bytes of one
	maxLinks     = 1 << 17   // descriptors in all of them
	maxDepth     = 6         // indexes below index.json, and referrers of referrers
	maxBlob      = 16 << 20  // bytes of one blob of a referrer
	maxBytes     = 256 << 20 // bytes of all
	maxStream    = 64 << 30  // bytes of a stream once it is unpacked
	maxWindow    = 64 << 20  // bytes of memory to unpack a stream; k3s packs with 32 MiB
)

// ErrRefused is wrapped where an archive was read and is not fit to be used.
var ErrRefused = errors.New("the evidence archive is refused")

// annotations of entries in index.json that say what an image is called: those of
// containerd and of everybody.
const (
	annotationContainerd = "io.containerd.image.name"
	annotationName       = ocispec.AnnotationRefName
)
