package notarytest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A Style is how a manifest says that it is a signature.
type Style int

// Styles of signature manifests.
const (
	ArtifactType Style = iota // artifactType set, config is the empty JSON: OCI 1.1
	ConfigType                // config.mediaType is the type: OCI 1.0, older notation
)

// Thumbprints is the annotation that lists the SHA-256 of each certificate of
// the chain (signature-specification.md, "Signature Manifest").
const Thumbprints = "io.cncf.notary.x509chain.thumbprint#S256"

// Types of Notary Project signatures (signature-specification.md, "Storage"), once more:
// the tests of package notary import this one.
const (
	artifactType  = "application/vnd.cncf.notary.signature"
	mediaTypeJWS  = "application/jose+json"
	mediaTypeCOSE = "application/cose"
)

// A Blob is content with its descriptor.
type Blob struct {
	Descriptor ocispec.Descriptor
	Content    []byte
}

// NewBlob describes content.
func NewBlob(mediaType string, content []byte) Blob {
	return Blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}, content}
}

// An Artifact is a signature as a registry stores it. The descriptor of
// Manifest has artifact type and annotations, as a referrers list shows it.
type Artifact struct {
	Manifest, Config, Envelope Blob
}

// Evidence is the artifact as a source hands it over.
func (a Artifact) Evidence() verify.Evidence {
	return verify.Evidence{Manifest: a.Manifest.Descriptor, Document: a.Manifest.Content, MediaType: a.Envelope.Descriptor.MediaType, Blob: a.Envelope.Content}
}

// Manifest stores envelope as a signature of subject. An envelope that does not
// parse gets no thumbprint annotation.
func Manifest(envelope []byte, mediaType string, subject ocispec.Descriptor, style Style) Artifact {
	a := Artifact{Envelope: NewBlob(mediaType, envelope)}
	m := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Layers:      []ocispec.Descriptor{a.Envelope.Descriptor},
		Subject:     &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations: map[string]string{ocispec.AnnotationCreated: SigningTime.Format(time.RFC3339)},
	}
	if t := thumbprints(envelope, mediaType); t != "" {
		m.Annotations[Thumbprints] = t
	}
	switch style {
	case ArtifactType:
		m.ArtifactType = artifactType
		a.Config = NewBlob(ocispec.MediaTypeEmptyJSON, []byte("{}"))
	case ConfigType:
		a.Config = NewBlob(artifactType, []byte("{}"))
	}
	m.Config = a.Config.Descriptor
	a.Manifest = NewBlob(ocispec.MediaTypeImageManifest, must(json.Marshal(m)))
	a.Manifest.Descriptor.ArtifactType, a.Manifest.Descriptor.Annotations = artifactType, m.Annotations
	return a
}

func thumbprints(envelope []byte, mediaType string) string {
	env, err := signature.ParseEnvelope(mediaType, envelope)
	if err != nil {
		return ""
	}
	content, err := env.Content()
	if err != nil {
		return ""
	}
	var list []string
	for _, c := range content.SignerInfo.CertificateChain {
		h := sha256.Sum256(c.Raw)
		list = append(list, hex.EncodeToString(h[:]))
	}
	return string(must(json.Marshal(list)))
}
