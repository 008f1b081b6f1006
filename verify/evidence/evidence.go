// Package evidence is what sources know of evidence: which kinds there are, how one lies
// beside an image, and what a look for it may cost. Each kind has a room of its own below.
//
// Nothing here verifies anything. What is not otherwise said is safe for concurrent use.
package evidence

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// ErrBudget says that a source sent more than the limits allow. What oci refuses as too
// much counts too.
var ErrBudget = oci.ErrLimit

// Evidence is one piece of evidence as found. Nothing in it has been verified except
// that blobs and manifest had the digests and sizes that their descriptors claim.
type Evidence struct {
	Manifest  ocispec.Descriptor // of the manifest that refers to the image
	Document  []byte             // the manifest itself, for a WritableSource; nil with Err
	MediaType string             // of Blob
	Blob      []byte             // the first blob, for many kinds the only one
	More      []Blob             // the others, in the order of the kind
	Err       error              // why it could not be read; then there is no blob
	From      string             // what a Decision names in place of the source: "archive site.tar"; empty: that
}

// A Blob is one blob of a piece of evidence with the descriptor that its kind read.
type Blob struct {
	ocispec.Descriptor
	Raw []byte
}

// A Kind knows one form of evidence: how it lies beside images. It verifies nothing, does
// not change, and is safe for concurrent use. A verify.Checker checks what is found.
type Kind interface {
	// Name is what messages and configurations call it.
	Name() string

	// ArtifactType is that of the manifests that refer to an image.
	ArtifactType() string

	// TagSuffixes are of tags "sha256-<hex><suffix>" at which evidence lies that refers to
	// nothing. Such a tag is one mutable document: that it is missing says nothing.
	TagSuffixes() []string

	// Annotation names what a manifest of the kind may say about its signer's
	// certificates: a JSON list of SHA-256 thumbprints, in hex. It serves for order alone.
	Annotation() string

	// Open reads a manifest that was found as evidence of subject, and that the caller has
	// checked against its digest. It returns the blobs to read, at least one and at most
	// MaxBlobs, with those annotations that the Checker looks at.
	Open(raw []byte, subject ocispec.Descriptor) ([]ocispec.Descriptor, error)

	// Chain returns the thumbprints of the certificates that a blob claims to be signed
	// with, the leaf's first, or none. It verifies nothing and serves for order alone.
	Chain(blob []byte) []string
}

// MaxBlobs bounds the blobs of a piece of evidence.
const MaxBlobs = 16

// Fill reads the blobs of the manifest raw, which is of kind k and was found for subject,
// into ev. read takes each from the budget and checks its digest.
func (ev *Evidence) Fill(k Kind, raw []byte, subject ocispec.Descriptor, read func(ocispec.Descriptor) ([]byte, error)) error {
	parts, err := k.Open(raw, subject)
	if err != nil {
		return err
	}
	if len(parts) == 0 || len(parts) > MaxBlobs {
		return fmt.Errorf("%s manifest with %d blobs, limit %d", k.Name(), len(parts), MaxBlobs)
	}
	var blobs []Blob
	for _, d := range parts {
		raw, err := read(d)
		if err != nil {
			return err
		}
		blobs = append(blobs, Blob{d, raw})
	}
	ev.Document, ev.MediaType, ev.Blob, ev.More = raw, blobs[0].MediaType, blobs[0].Raw, blobs[1:]
	return nil
}

// Is reports whether a manifest says that it is evidence of kind k. In the style from
// before image-spec 1.1 the config says the type.
func Is(k Kind, h oci.Head) bool {
	return h.ArtifactType == k.ArtifactType() || h.ArtifactType == "" && h.Config.MediaType == k.ArtifactType()
}

// SignatureSize says why n bytes are too many for the manifest of a signature. Such a
// manifest counts nowhere, so that this is an answer about it and leaves nothing open:
// the error does not wrap ErrBudget.
func SignatureSize(n int64) error {
	if n > oci.MaxSignature {
		return fmt.Errorf("signature manifest of %d bytes, limit %d", n, oci.MaxSignature)
	}
	return nil
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
	return Limits{
		Pages: cmp.Or(l.Pages, d.Pages), Referrers: cmp.Or(l.Referrers, d.Referrers), Signatures: cmp.Or(l.Signatures, d.Signatures),
		Certificates: cmp.Or(l.Certificates, d.Certificates), ManifestBytes: cmp.Or(l.ManifestBytes, d.ManifestBytes),
		EnvelopeBytes: cmp.Or(l.EnvelopeBytes, d.EnvelopeBytes), TotalBytes: cmp.Or(l.TotalBytes, d.TotalBytes), Wall: cmp.Or(l.Wall, d.Wall),
	}
}

// A Budget is what one question about one subject asks a source for, and what is left of
// Limits for it. Its methods
// return an error that wraps ErrBudget once a limit is passed. It is not safe
// for concurrent use. The zero Budget allows nothing.
type Budget struct {
	// Ahead says that nobody waits for the answer. A source that is shared with
	// others takes its time then: the start of a node with many images is no reason
	// to flood its mirror.
	Prefetch bool

	// Kind is the kind of evidence that is asked for; required.
	Kind Kind

	// Anchors are SHA-256 thumbprints, in hex, of certificates that the rule trusts: a hint
	// which signatures to hand over first, and nothing else.
	Anchors []string

	// Others is for the source: what it lists for the image in formats of other tools.
	Others oci.Others

	left  Limits
	spent int64
}

// NewBudget returns a full budget for evidence of kind k; zero fields of l mean
// DefaultLimits.
func NewBudget(k Kind, l Limits) *Budget { return &Budget{Kind: k, left: l.Or(DefaultLimits)} }

// Cap bounds what may be read by n bytes.
func (b *Budget) Cap(n int64) { b.left.TotalBytes = min(b.left.TotalBytes, max(n, 0)) }

// Spent is how many bytes were read.
func (b *Budget) Spent() int64 { return b.spent }

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
	b.left.TotalBytes, b.spent = b.left.TotalBytes-n, b.spent+n
	return nil
}

func take(left *int, what string) error {
	if *left <= 0 {
		return fmt.Errorf("%w: too many %s", ErrBudget, what)
	}
	*left--
	return nil
}

// Bounds of signed metadata. What is longer is left out whole: half a value is another.
const maxMetadata, maxMetadataKey, maxMetadataValue = 32, 128, 512

// Metadata returns what of m is within bounds, in the order of the keys.
func Metadata(m map[string]string) map[string]string {
	var kept map[string]string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if v := m[k]; len(k) <= maxMetadataKey && len(v) <= maxMetadataValue && len(kept) < maxMetadata {
			if kept == nil {
				kept = map[string]string{}
			}
			kept[strings.Clone(k)] = strings.Clone(v)
		}
	}
	return kept
}

// ErrKind says that a source was asked for no kind of evidence.
var ErrKind = fmt.Errorf("%w: no kind of evidence is asked for", ErrBudget)

// OpenOne is [Kind.Open] for kinds with one blob. It wants an OCI image manifest of at most
// 64 KiB whose artifact type (or, in the older style, config media type) is that of the
// kind, whose subject is exactly subject, and which has exactly one layer.
func OpenOne(k Kind, raw []byte, subject ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if err := SignatureSize(int64(len(raw))); err != nil {
		return nil, err
	}
	m, err := oci.Read(raw)
	switch s := m.Subject; {
	case err != nil:
		return nil, fmt.Errorf("signature manifest: %w", err)
	case m.MediaType != ocispec.MediaTypeImageManifest:
		return nil, fmt.Errorf("signature manifest has media type %q", m.MediaType)
	case !Is(k, m.Head):
		return nil, fmt.Errorf("manifest is of type %q, not a %s signature", m.ArtifactType, k.Name())
	case s == nil || s.MediaType != subject.MediaType || s.Digest != subject.Digest || s.Size != subject.Size:
		return nil, errors.New("signature manifest has another subject")
	case len(m.Layers) != 1:
		return nil, fmt.Errorf("signature manifest has %d layers, not one", len(m.Layers))
	}
	l := m.Layers[0]
	if err := l.Digest.Validate(); err != nil || l.Size < 0 {
		return nil, fmt.Errorf("signature envelope of size %d, digest %s", l.Size, text.Quote(l.Digest.String(), 80))
	}
	return []ocispec.Descriptor{{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}}, nil
}

// A Statement is one statement of a trust policy as its author wrote it.
type Statement struct {
	Name              string
	Scopes            []string
	Level             string            // strict, permissive, audit or skip
	Override          map[string]string // check to action: enforce, log or skip
	VerifyTimestamp   string            // "", always or afterCertExpiry
	TrustStores       []string          // "ca:acme"
	TrustedIdentities []string          // "*" or "x509.subject: C=US, ..."
}
