package verify

import (
	"bytes"
	"cmp"
	"context"
	_ "crypto/sha256" // go-digest knows only the algorithms that are linked in,
	_ "crypto/sha512" // and panics when it is to hash with another
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Source finds signatures. It is safe for concurrent use.
type Source interface {
	// Name is what a Decision says: "layout /media/usb", "mirror https://10.0.0.5:5000".
	// It holds no credentials.
	Name() string

	// Find hands each signature of subject that the source holds to yield, until
	// yield returns false or b is spent. A signature that cannot be read is handed
	// over with Err set: it hides no other. The name in only says where to look.
	//
	// The error says what the source could not do and wraps one of ErrUnreachable,
	// ErrUnauthorized, ErrNoReferrers, ErrBudget. Nil means that it answered, also
	// when it had nothing: only then may anybody say SIGNATURE_MISSING.
	Find(ctx context.Context, in Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error
}

// A Keeper is a Source that keeps what others found: the node's own store. What it
// holds is evidence and never a verdict. The Engine has it checked like any other,
// and a Keeper that keeps nothing costs requests and changes no answer.
type Keeper interface {
	Source

	// Keep is given evidence that verified for subject, which is one of img's. It
	// returns at once and keeps it later, or not at all. Nobody changes ev after.
	Keep(img Image, subject ocispec.Descriptor, ev Evidence)

	// Parents hands over documents that may name d, image indexes which list it and
	// image manifests whose config it is, until yield returns false or b is spent. The
	// caller believes neither the digest nor the bytes.
	Parents(ctx context.Context, d digest.Digest, b *Budget, yield func(parent digest.Digest, raw []byte) bool)
}

// What a Source could not do. Anything else that it returns counts as ErrUnreachable.
var (
	ErrUnreachable  = errors.New("source did not answer")
	ErrUnauthorized = errors.New("source refused the credentials")
	ErrNoReferrers  = errors.New("source cannot serve referrers")
	ErrBudget       = errors.New("source sent more than the limits allow")
)

// reasonOf translates what a Source returned.
func reasonOf(err error) Reason {
	switch {
	case errors.Is(err, ErrBudget):
		return BudgetExceeded
	case errors.Is(err, ErrUnauthorized):
		return SourceUnauthorized
	case errors.Is(err, ErrNoReferrers):
		return SourceNoReferrers
	}
	return SourceUnreachable
}

// Evidence is one signature as found. Nothing in it has been verified except
// that Blob and the manifest had the digests and sizes that their descriptors claim.
type Evidence struct {
	Manifest  ocispec.Descriptor // of the signature manifest
	Document  []byte             // the signature manifest itself, for a Keeper; nil with Err
	MediaType string             // of Blob
	Blob      []byte             // the signature envelope
	Err       error              // why it could not be read; then Blob is nil
	From      string             // what a Decision names in place of the source: "bundle site.tar"; empty: that
}

// Artifact and media types of Notary Project signatures
// (signature-specification.md, "Storage").
const (
	ArtifactTypeNotation = "application/vnd.cncf.notary.signature"
	MediaTypeJWS         = "application/jose+json"
	MediaTypeCOSE        = "application/cose"
)

// EnvelopeIn reads the manifest of a Notary Project signature and returns the
// descriptor of the one envelope in it. It wants an OCI image manifest whose
// artifact type (or, in the older style, config media type) is that of a
// signature, whose subject is exactly subject, and which has exactly one layer.
// The caller has checked raw against its digest.
func EnvelopeIn(raw []byte, subject ocispec.Descriptor) (ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	var m ocispec.Manifest
	if err := Bounded(raw); err != nil {
		return none, fmt.Errorf("signature manifest: %w", err)
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return none, fmt.Errorf("signature manifest: %w", err)
	}
	if m.MediaType != ocispec.MediaTypeImageManifest {
		return none, fmt.Errorf("signature manifest has media type %q", m.MediaType)
	}
	if m.ArtifactType != ArtifactTypeNotation && (m.ArtifactType != "" || m.Config.MediaType != ArtifactTypeNotation) {
		return none, fmt.Errorf("manifest is of type %q, not a Notary Project signature", m.ArtifactType)
	}
	if m.Subject == nil || m.Subject.Digest != subject.Digest ||
		m.Subject.Size != subject.Size || m.Subject.MediaType != subject.MediaType {
		return none, errors.New("signature manifest has another subject")
	}
	if len(m.Layers) != 1 {
		return none, fmt.Errorf("signature manifest has %d layers, not one", len(m.Layers))
	}
	l := m.Layers[0]
	if err := l.Digest.Validate(); err != nil {
		return none, fmt.Errorf("signature envelope: %w", err)
	}
	if l.Size < 0 {
		return none, fmt.Errorf("signature envelope has size %d", l.Size)
	}
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}, nil
}

// naming returns the descriptor of raw where that is what its digest says and names
// child: an image index that lists it with its size and media type, or, for a child of
// which only the digest is known, an image manifest whose config it is. Then whoever
// signed the document signed child too.
func naming(d digest.Digest, raw []byte, child ocispec.Descriptor) (parent ocispec.Descriptor, ok bool) {
	if d.Validate() != nil || d.Algorithm().FromBytes(raw) != d || Bounded(raw) != nil {
		return parent, false
	}
	mediaType, err := MediaTypeOf(raw, "")
	var doc struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    ocispec.Descriptor   `json:"config"`
	}
	if err != nil || child.Digest == "" || json.Unmarshal(raw, &doc) != nil {
		return parent, false
	}
	if child.MediaType == "" {
		t := doc.Config.MediaType
		ok = doc.Config.Digest == child.Digest && (t == ocispec.MediaTypeImageConfig || t == dockerConfig)
	} else {
		ok = slices.ContainsFunc(doc.Manifests, func(m ocispec.Descriptor) bool { return plain(m) == plain(child) })
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}, ok
}

// maxElements bounds the elements of a JSON document. An index of 13,000
// manifests has fewer.
const maxElements = 1 << 16

// Bounded returns an error that wraps ErrBudget if raw, a JSON document that
// somebody else wrote, could have more than 65,536 elements. It belongs before
// every decoding into a struct with slices: of the three bytes "{}," a decoder
// makes a descriptor of 120, and so of a manifest of 4 MiB more than 500 MiB.
// Commas inside strings count too.
func Bounded(raw []byte) error {
	if n := bytes.Count(raw, []byte{','}); n > maxElements {
		return fmt.Errorf("%w: JSON of %d elements, limit %d", ErrBudget, n, maxElements)
	}
	return nil
}

// Media types of Docker's images. Its signatures have OCI types.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// MediaTypeOf returns the media type of an image manifest or index: what the
// document says itself, else listed, which whoever pointed to it said, else what
// its shape says. If these do not agree, or the document is both or neither,
// there is more than one way to read it (GHSA-77vh-xpmg-72qh) and the error is a
// *Fault with IMAGE_AMBIGUOUS.
func MediaTypeOf(raw []byte, listed string) (string, error) {
	ambiguous := func(detail string) (string, error) {
		return "", &Fault{Reason: ImageAmbiguous, Detail: detail}
	}
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return ambiguous("the document is not an image manifest or index: " + err.Error())
	}
	index := doc.Manifests != nil
	if manifest := doc.Config != nil || doc.Layers != nil; index == manifest {
		return ambiguous("the document is not plainly an image manifest or an index")
	}
	mediaType := doc.MediaType
	if mediaType == "" {
		mediaType = listed
	}
	if mediaType == "" && index {
		mediaType = ocispec.MediaTypeImageIndex
	} else if mediaType == "" {
		mediaType = ocispec.MediaTypeImageManifest
	}
	fits := mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
	if index {
		fits = mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList
	}
	if !fits || listed != "" && listed != mediaType {
		return ambiguous("media type " + Quote(mediaType, 80) + " does not fit the document, referred to as " + Quote(listed, 80))
	}
	return mediaType, nil
}

// Limits bound what one source may cost for one question. A zero field means
// the default that Or documents.
type Limits struct {
	Pages         int           // pages or indexes of referrers read
	Referrers     int           // referrers listed
	Signatures    int           // signature manifests read
	Certificates  int           // certificates in a chain
	ManifestBytes int64         // one manifest, index or page of referrers, in bytes
	EnvelopeBytes int64         // one signature envelope, in bytes
	TotalBytes    int64         // everything read, in bytes
	Wall          time.Duration // from the first request to the last
}

// DefaultLimits are the limits where a configuration is silent.
var DefaultLimits = Limits{
	Pages: 24, Referrers: 200, Signatures: 100, Certificates: 10,
	ManifestBytes: 4 << 20, EnvelopeBytes: 256 << 10, TotalBytes: 16 << 20,
	Wall: 10 * time.Second,
}

// Or fills the zero fields of l from d.
func (l Limits) Or(d Limits) Limits {
	or(&l.Pages, d.Pages)
	or(&l.Referrers, d.Referrers)
	or(&l.Signatures, d.Signatures)
	or(&l.Certificates, d.Certificates)
	or(&l.ManifestBytes, d.ManifestBytes)
	or(&l.EnvelopeBytes, d.EnvelopeBytes)
	or(&l.TotalBytes, d.TotalBytes)
	or(&l.Wall, d.Wall)
	return l
}

func or[T comparable](p *T, d T) { *p = cmp.Or(*p, d) }

// A Budget is what is left of Limits for one question at one source. Its methods
// return an error that wraps ErrBudget once a limit is passed. It is not safe
// for concurrent use. The zero Budget allows nothing.
type Budget struct {
	// Ahead says that nobody waits for the answer. A source that is shared with
	// others takes its time then: the start of a node with many images is no reason
	// to flood its mirror.
	Ahead bool

	left Limits
}

// NewBudget returns a full budget; zero fields of l mean DefaultLimits.
func NewBudget(l Limits) *Budget { return &Budget{left: l.Or(DefaultLimits)} }

// Page takes one page of referrers (or one index) from the budget.
func (b *Budget) Page() error { return take(&b.left.Pages, "pages of referrers") }

// Referrer takes one listed referrer.
func (b *Budget) Referrer() error { return take(&b.left.Referrers, "referrers") }

// Signature takes one signature manifest that is about to be read.
func (b *Budget) Signature() error { return take(&b.left.Signatures, "signatures") }

// Manifest takes the bytes of a manifest, index or page that is n bytes long.
func (b *Budget) Manifest(n int64) error { return b.bytes(n, b.left.ManifestBytes, "a manifest") }

// Envelope takes the bytes of a signature envelope that is n bytes long.
func (b *Budget) Envelope(n int64) error { return b.bytes(n, b.left.EnvelopeBytes, "an envelope") }

// MaxManifest is how many bytes of one manifest or page may be read now.
func (b *Budget) MaxManifest() int64 { return min(b.left.ManifestBytes, b.left.TotalBytes) }

func (b *Budget) bytes(n, limit int64, what string) error {
	if n < 0 || n > limit {
		return fmt.Errorf("%w: %s of %d bytes, limit %d", ErrBudget, what, n, limit)
	}
	if n > b.left.TotalBytes {
		return fmt.Errorf("%w: no bytes left for %s of %d bytes", ErrBudget, what, n)
	}
	b.left.TotalBytes -= n
	return nil
}

func take(left *int, what string) error {
	if *left <= 0 {
		return fmt.Errorf("%w: too many %s", ErrBudget, what)
	}
	*left--
	return nil
}

// A Checker checks evidence under the statements of one trust policy. It does
// not change, keeps nothing between calls and is safe for concurrent use.
type Checker interface {
	// Check judges ev under a statement for exactly the descriptor want. Anything
	// but Finding.Reason == VERIFIED is a no.
	Check(ctx context.Context, ev Evidence, want ocispec.Descriptor, statement string) Finding
}

// A Finding is what a Checker says of one piece of evidence. The zero Finding
// is INTERNAL. It allows nothing by itself.
type Finding struct {
	Reason   Reason
	Signed   digest.Digest // the descriptor digest that the envelope's payload names
	Signer   Signer
	Metadata map[string]string // annotations that are signed with it; see Decision.Metadata
	Warnings []Reason          // checks that failed and that the statement only logs
	Until    time.Time         // first end among what the answer rests on; zero: no end known, not kept
	Ends     string            // what it is that ends then: of a small set, "signature" or "certificate"
	Detail   string            // one clause for a person; no image name, no secret
}

// A Signer is an identity as the evidence proves it.
type Signer struct {
	Subject    string `json:"subject"`    // of the leaf certificate, RFC 4514
	Thumbprint string `json:"thumbprint"` // SHA-256 of the leaf certificate, hex
	Anchor     string `json:"anchor"`     // trust store entry that the chain reached, "ca:acme/root.crt"
}
