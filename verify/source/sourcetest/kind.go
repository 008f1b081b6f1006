package sourcetest

import (
	"errors"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// Types of the signatures of Kind.
const (
	ArtifactType = "application/vnd.example.signature"
	MediaTypeA   = "application/jose+json"
	MediaTypeB   = "application/cose"
)

// Kind is the kind of signatures in a Content: one blob, of any bytes.
var Kind verify.Kind = single{}

// Kinds are those that the sources under test are given.
var Kinds = []verify.Kind{Kind, Toy}

type single struct{}

func (single) Name() string          { return "test" }
func (single) ArtifactType() string  { return ArtifactType }
func (single) TagSuffixes() []string { return nil }
func (single) Annotation() string    { return "com.example.chain" }
func (single) Chain([]byte) []string { return nil }
func (s single) Open(raw []byte, subject ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	return evidence.OpenOne(s, raw, subject)
}

// Toy is a kind of two blobs: one that is signed, with a note, and the signature. Its
// manifests refer to an image, or lie at a tag that says what they are of.
var Toy verify.Kind = toy{}

// Types of Toy, and the annotation of its first blob that its checker would look at.
const (
	ToyType   = "application/vnd.example.toy"
	ToySuffix = ".toy"
	ToyNote   = "com.example.note"
)

type toy struct{}

func (toy) Name() string          { return "toy" }
func (toy) ArtifactType() string  { return ToyType }
func (toy) TagSuffixes() []string { return []string{ToySuffix} }
func (toy) Annotation() string    { return "" }
func (toy) Chain([]byte) []string { return nil }
func (k toy) Open(raw []byte, subject ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	m, err := oci.Read(raw, ToyNote)
	switch {
	case err != nil:
		return nil, err
	case !evidence.Is(k, m.Head) || len(m.Layers) != 2:
		return nil, errors.New("not a toy")
	case m.Subject != nil && m.Subject.Digest != subject.Digest:
		return nil, errors.New("a toy of something else")
	}
	for _, l := range m.Layers {
		if err := l.Digest.Validate(); err != nil || l.Size < 0 {
			return nil, errors.New("a toy in pieces")
		}
	}
	return m.Layers, nil
}
