package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Contents are the documents of a layout: every manifest and index that index.json
// leads to, each of which is what its digest says. It is not safe for concurrent use.
type Contents struct {
	dir     *layout.Dir
	path    string // of a directory or tar file that can be read in place
	scratch string // directory that Close removes; may be empty
	below   string // where temporary files are made; empty: in the system's directory for them

	entries   []ocispec.Descriptor // of index.json that could be read
	documents map[digest.Digest]*document
	referrers map[digest.Digest][]*document // by subject, in order of their digests
	missing   map[digest.Digest]bool        // manifests that an index lists and the layout does not have
	problems  []string                      // what is damaged, or listed by index.json and missing
	others    int                           // entries that are neither manifest nor index

	left, links int64
}

// A document is a manifest or index.
type document struct {
	ocispec.Descriptor // media type, digest and size, and the artifact type

	manifests []ocispec.Descriptor // of an index
	config    ocispec.Descriptor   // of a manifest
	layers    []ocispec.Descriptor // of a manifest
	subject   *ocispec.Descriptor
}

// isIndex reports whether it is an index.
func (d *document) isIndex() bool { return oci.IsIndex(d.MediaType) }

// isSignature reports whether it is the manifest of a Notary Project signature.
func (d *document) isSignature() bool { return d.ArtifactType == kind.ArtifactType() }

func isDocument(mediaType string) bool {
	return oci.IsIndex(mediaType) || oci.IsManifest(mediaType)
}

// Open reads the documents of the layout at name: a directory, a tar file, one that is
// compressed with gzip or zstd, or with "-" any of these files from stdin. What is not
// read in place is unpacked into a directory below scratch, without the layers; an
// empty scratch is the system's directory for temporary files. The caller closes it.
func Open(ctx context.Context, name string, stdin io.Reader, scratch string) (_ *Contents, err error) {
	c := &Contents{path: name, below: scratch, left: maxBytes}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if name == "-" {
		err = c.unpack(ctx, stdin, scratch)
	} else {
		var f *os.File
		if f, err = compressed(name); err == nil && f != nil {
			err = c.unpack(ctx, f, scratch)
			f.Close()
		}
	}
	if err == nil {
		c.dir, err = layout.Open(ctx, c.path, nil)
	}
	if err == nil {
		err = c.load(ctx)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Close closes it, and removes what Open unpacked.
func (c *Contents) Close() {
	if c.dir != nil {
		c.dir.Close()
	}
	if c.scratch != "" {
		_ = os.RemoveAll(c.scratch)
	}
}

// Path is that of the layout, which sources can read until it is closed.
func (c *Contents) Path() string { return c.path }

// take takes n bytes from what may be read.
func (c *Contents) take(n, limit int64) error {
	if n > limit || n > c.left {
		return fmt.Errorf("%w: %d bytes, limit %d, and %d in all are left", verify.ErrBudget, n, limit, c.left)
	}
	c.left -= n
	return nil
}

// blob reads what d describes, at most limit bytes.
func (c *Contents) blob(d ocispec.Descriptor, limit int64) ([]byte, error) {
	return c.dir.Blob(d, func(n int64) error { return c.take(n, limit) })
}

func (c *Contents) load(ctx context.Context) error {
	entries, err := c.dir.Entries(func(n int64) error { return c.take(n, maxDocument) })
	if err != nil {
		return err
	}
	c.documents, c.referrers, c.missing = map[digest.Digest]*document{}, map[digest.Digest][]*document{}, map[digest.Digest]bool{}
	for _, e := range entries {
		if !isDocument(e.MediaType) {
			c.others++
			continue
		}
		err := c.document(ctx, e, 0)
		switch {
		case errors.Is(err, errStop):
			return err
		case err != nil:
			c.problem(err)
		default:
			c.entries = append(c.entries, e)
		}
	}
	for _, d := range c.documents {
		if d.subject != nil {
			c.referrers[d.subject.Digest] = append(c.referrers[d.subject.Digest], d)
		}
	}
	for _, list := range c.referrers {
		slices.SortFunc(list, func(x, y *document) int {
			return cmp.Or(cmp.Compare(x.ArtifactType, y.ArtifactType), strings.Compare(string(x.Digest), string(y.Digest)))
		})
	}
	return nil
}

// errStop is wrapped where no more is read.
var errStop = errors.New("no more of it is read")

// maxProblems bounds how many problems are told.
const maxProblems = 20

func (c *Contents) problem(err error) {
	if len(c.problems) < maxProblems {
		c.problems = append(c.problems, text.Clean(err.Error(), 300))
	}
}

// document reads the document d, and those below it.
func (c *Contents) document(ctx context.Context, d ocispec.Descriptor, depth int) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", errStop, err)
	}
	if c.documents[d.Digest] != nil {
		return nil
	}
	if len(c.documents) == maxDocuments || depth > maxDepth {
		return fmt.Errorf("%w: %w: more than %d manifests, or indexes more than %d deep", errStop, verify.ErrBudget, maxDocuments, maxDepth)
	}
	raw, err := c.blob(d, maxDocument)
	if errors.Is(err, verify.ErrBudget) {
		return fmt.Errorf("%w: %w", errStop, err)
	}
	if err != nil {
		return err
	}
	doc, err := parse(raw, d)
	if err != nil {
		return err
	}
	if c.links += int64(len(doc.manifests) + len(doc.layers)); c.links > maxLinks {
		return fmt.Errorf("%w: %w: manifests and indexes that name more than %d others", errStop, verify.ErrBudget, maxLinks)
	}
	c.documents[d.Digest] = doc
	for _, m := range doc.manifests {
		if !isDocument(m.MediaType) {
			continue
		}
		err := c.document(ctx, m, depth+1)
		switch {
		case errors.Is(err, errStop):
			return err
		case errors.Is(err, fs.ErrNotExist):
			c.missing[m.Digest] = true
		case err != nil:
			c.problem(err)
		}
	}
	return nil
}

// parse reads the manifest or index raw, which listed refers to.
func parse(raw []byte, listed ocispec.Descriptor) (*document, error) {
	mediaType, err := oci.MediaTypeOf(raw, listed.MediaType)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", listed.Digest, err)
	}
	m, err := oci.Read(raw, ocispec.AnnotationTitle, "vnd.docker.reference.type")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", listed.Digest, err)
	}
	doc := &document{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: listed.Digest, Size: int64(len(raw)), ArtifactType: m.ArtifactType}, manifests: m.Manifests}
	if !doc.isIndex() {
		doc.config, doc.layers = m.Config, m.Layers
		// In the style from before image-spec 1.1 the config says the type.
		if doc.ArtifactType == "" && m.Config.MediaType != ocispec.MediaTypeImageConfig && m.Config.MediaType != ocispec.DescriptorEmptyJSON.MediaType && m.Subject != nil {
			doc.ArtifactType = m.Config.MediaType
		}
	}
	if m.Subject != nil {
		if err := m.Subject.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("%s: its subject: %w", listed.Digest, err)
		}
		doc.subject = m.Subject
	}
	return doc, nil
}

// parts are the blobs of a referrer.
func (d *document) parts() []ocispec.Descriptor {
	var list []ocispec.Descriptor
	if d.config.Digest != "" {
		list = append(list, d.config)
	}
	return append(list, d.layers...)
}

// evidence reads the signature d.
func (c *Contents) evidence(d *document, limit int64) (verify.Evidence, error) {
	ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
	raw, err := c.blob(d.Descriptor, maxDocument)
	if err != nil {
		return ev, err
	}
	return ev, ev.Fill(kind, raw, *d.subject, func(d ocispec.Descriptor) ([]byte, error) { return c.blob(d, limit) })
}

// nameOf is what an entry of index.json says that the image is called.
func nameOf(e ocispec.Descriptor) string {
	return cmp.Or(e.Annotations[annotationContainerd], e.Annotations[annotationName])
}

// images are the entries of index.json that are no referrers, no lists of them and no
// trust.
func (c *Contents) images() []ocispec.Descriptor {
	var list []ocispec.Descriptor
	seen := map[string]bool{}
	for _, e := range c.entries {
		d := c.documents[e.Digest]
		key := string(e.Digest) + " " + nameOf(e)
		if d.subject != nil || d.ArtifactType == ArtifactTypeTrust || c.listsReferrers(d, e) || seen[key] {
			continue
		}
		seen[key] = true
		list = append(list, e)
	}
	return list
}

// listsReferrers reports whether e is what a referrers tag points to.
func (c *Contents) listsReferrers(d *document, e ocispec.Descriptor) bool {
	alg, rest, found := strings.Cut(e.Annotations[annotationName], "-")
	if !d.isIndex() || !found || !digest.Algorithm(alg).Available() || len(rest) < 64 {
		return false
	}
	return strings.Trim(rest, "0123456789abcdef") == ""
}
