package oci

import (
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// How cosign marks what it attaches to images.
const (
	sigstoreBundle  = "application/vnd.dev.sigstore.bundle" // and a version
	cosignSignature = "application/vnd.dev.cosign.artifact.sig.v1+json"
	bundleContent   = "dev.sigstore.bundle.content" // annotation of a bundle, also if the list gives it the type of its config
)

// maxOthers bounds the signatures of other tools that are counted.
const maxOthers = 100

// Others counts the signatures of an image that other tools than those of the Notary
// Project made, by what a source lists: for a hint to people, and for no decision. It is
// bounded, and repeats nothing that the source wrote. The zero Others has counted none.
// It is not safe for concurrent use.
type Others struct {
	bundles, signatures, tags map[digest.Digest]struct{}
}

// Add counts d, if its artifact type or annotation is that of a signature of another tool.
func (o *Others) Add(d ocispec.Descriptor) {
	_, bundle := d.Annotations[bundleContent]
	switch {
	case strings.HasPrefix(d.ArtifactType, sigstoreBundle), bundle && d.ArtifactType == ocispec.MediaTypeEmptyJSON:
		note(&o.bundles, d.Digest)
	case d.ArtifactType == cosignSignature:
		note(&o.signatures, d.Digest)
	}
}

// AddEntry is Add for an entry of a list, for use in yield.
func (o *Others) AddEntry(e Entry) {
	d := e.Descriptor
	if d.ArtifactType == ocispec.MediaTypeEmptyJSON {
		d.Annotations = e.Annotated(bundleContent).Annotations
	}
	o.Add(d)
}

// AddTag counts the tag that cosign gives signatures of subject.
func (o *Others) AddTag(subject digest.Digest) { note(&o.tags, subject) }

// CosignTag returns that tag.
func CosignTag(subject digest.Digest) string {
	return subject.Algorithm().String() + "-" + subject.Encoded() + ".sig"
}

func note(set *map[digest.Digest]struct{}, d digest.Digest) {
	if *set == nil {
		*set = map[digest.Digest]struct{}{}
	}
	if len(*set) < maxOthers {
		(*set)[d] = struct{}{}
	}
}

// String returns a clause such as "3 sigstore bundles and a cosign tag are there"; empty:
// none was counted.
func (o *Others) String() string {
	var have []string
	n := 0
	for _, x := range []struct {
		set map[digest.Digest]struct{}
		one string
	}{{o.bundles, "sigstore bundle"}, {o.signatures, "cosign signature"}, {o.tags, "cosign tag"}} {
		n += len(x.set)
		switch len(x.set) {
		case 0:
		case 1:
			have = append(have, "a "+x.one)
		case maxOthers:
			have = append(have, fmt.Sprintf("at least %d %ss", maxOthers, x.one))
		default:
			have = append(have, fmt.Sprintf("%d %ss", len(x.set), x.one))
		}
	}
	switch {
	case n == 0:
		return ""
	case n == 1:
		return have[0] + " is there"
	}
	text := strings.Join(have[:len(have)-1], ", ")
	if text != "" {
		text += " and "
	}
	return text + have[len(have)-1] + " are there"
}
