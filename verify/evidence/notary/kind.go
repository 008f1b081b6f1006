package notary

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence"
)

// Artifact and media types of Notary Project signatures
// (signature-specification.md, "Storage").
const (
	ArtifactType  = "application/vnd.cncf.notary.signature"
	MediaTypeJWS  = "application/jose+json"
	MediaTypeCOSE = "application/cose"
)

// Name is what configurations and messages call the kind.
const Name = "notary"

// Kind is the kind of Notary Project signatures: one envelope, in a manifest that refers
// to the image.
var Kind evidence.Kind = form{}

type form struct{}

func (form) Name() string          { return Name }
func (form) ArtifactType() string  { return ArtifactType }
func (form) TagSuffixes() []string { return nil }

// Annotation is that of signature-specification.md, "Signature Manifest".
func (form) Annotation() string { return "io.cncf.notary.x509chain.thumbprint#S256" }

func (form) Chain(blob []byte) []string { return Thumbprints(blob) }

// Open implements [evidence.Kind].
func (f form) Open(raw []byte, subject ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	return evidence.OpenOne(f, raw, subject)
}
