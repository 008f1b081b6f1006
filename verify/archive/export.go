package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Options of Export.
type Options struct {
	Layouts   []string                          // directories and tar files to gather from first
	Sources   func(verify.Name) []verify.Source // of these, the registries are asked
	Aliases   []policy.Alias
	Platform  func(ocispec.Platform) bool // of an index the manifests for these alone; nil: all
	All       bool                        // other referrers besides signatures too
	Missing   bool                        // what cannot be had is said, and is no error
	Trust     map[string][]byte
	Evaluator *Evaluator // of the configuration: of signatures that verify under no statement few are taken; nil: all are
}

// Gathered says what of one image an archive has.
type Gathered struct {
	Name       string   `json:"name"`
	Digest     string   `json:"digest"`
	Manifests  int      `json:"manifests"` // the image's own, an index among them
	Signatures int      `json:"signatures"`
	Referrers  int      `json:"otherReferrers"`
	LeftOut    int      `json:"leftOut,omitempty"` // signatures that verify under no statement
	Missing    []string `json:"missing"`           // what could not be had
}

// requestLimit ends what is asked of one source about one thing.
const requestLimit = time.Minute

// limits are of one question about referrers. They are wider than a node's: what it
// would not read is told apart by who makes the archive.
var limits = verify.Limits{Pages: 100, Referrers: 5000, TotalBytes: 64 << 20}

// Export gathers what a node needs to verify images. A tag is resolved at the first
// registry that knows it: what it names then, Gathered says. The layouts of the
// configuration are read once.
func Export(ctx context.Context, images []string, o Options) (*Layout, []Gathered, error) {
	g := &gathering{Options: o, l: &Layout{}}
	defer func() {
		for _, c := range g.layouts {
			c.Close()
		}
	}()
	for _, dir := range o.Layouts {
		c, err := Open(ctx, dir, nil, "")
		if err != nil {
			return nil, nil, fmt.Errorf("layout %s: %w", dir, err)
		}
		g.layouts = append(g.layouts, c)
	}
	var list []Gathered
	for _, image := range images {
		one, err := g.image(ctx, image)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", text.Clean(image, 300), err)
		}
		list = append(list, *one)
	}
	if o.Trust != nil {
		if err := g.l.packTrust(o.Trust); err != nil {
			return nil, nil, err
		}
	}
	if g.l.bytes > maxBytes {
		return nil, nil, fmt.Errorf("%w: %d bytes, more than %d: make several evidence archives", verify.ErrBudget, g.l.bytes, maxBytes)
	}
	return g.l, list, nil
}

type gathering struct {
	Options
	l       *Layout
	layouts []*Contents
}

// An origin is where evidence is gathered from.
type origin interface {
	Name() string
	manifest(ctx context.Context, in verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error)
	referrers(ctx context.Context, in verify.Name, subject ocispec.Descriptor, artifactType string) ([]ocispec.Descriptor, error)
	fetch(ctx context.Context, in verify.Name, d ocispec.Descriptor, manifest bool) ([]byte, error)
}

type remote struct{ *registry.Source }

func (r remote) manifest(ctx context.Context, in verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	return r.Manifest(ctx, in, d)
}

func (r remote) referrers(ctx context.Context, in verify.Name, subject ocispec.Descriptor, artifactType string) ([]ocispec.Descriptor, error) {
	return r.Referrers(ctx, in, subject, artifactType, verify.NewBudget(kind, limits))
}

func (r remote) fetch(ctx context.Context, in verify.Name, d ocispec.Descriptor, manifest bool) ([]byte, error) {
	return r.Fetch(ctx, in, d, manifest, within)
}

// within refuses what is too long.
func within(n int64) error {
	if n < 0 || n > maxBlob {
		return fmt.Errorf("%w: %d bytes, limit %d", verify.ErrBudget, n, maxBlob)
	}
	return nil
}

// Name, for messages.
func (c *Contents) Name() string { return "layout " + c.path }

func (c *Contents) manifest(_ context.Context, _ verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	doc := c.documents[d]
	if doc == nil {
		return ocispec.Descriptor{}, nil, fs.ErrNotExist
	}
	raw, err := c.dir.Blob(doc.Descriptor, within)
	return doc.Descriptor, raw, err
}

func (c *Contents) referrersOf(subject digest.Digest) (list []ocispec.Descriptor) {
	for _, d := range c.referrers[subject] {
		list = append(list, d.Descriptor)
	}
	return list
}

type held struct{ *Contents }

func (h held) referrers(_ context.Context, _ verify.Name, subject ocispec.Descriptor, _ string) ([]ocispec.Descriptor, error) {
	return h.referrersOf(subject.Digest), nil
}

func (h held) fetch(_ context.Context, _ verify.Name, d ocispec.Descriptor, _ bool) ([]byte, error) {
	return h.dir.Blob(d, within)
}

// image gathers one image.
func (g *gathering) image(ctx context.Context, image string) (*Gathered, error) {
	name, err := policy.ParseName(image)
	if err != nil {
		return nil, err
	}
	x := &imageGathering{gathering: g, in: policy.Unalias(g.Aliases, name), Gathered: Gathered{Missing: []string{}}, seen: map[digest.Digest]bool{}, others: map[digest.Digest]int{}}
	for _, c := range g.layouts {
		x.origins = append(x.origins, held{c})
	}
	for _, s := range g.Sources(x.in) {
		if m, ok := s.(*registry.Source); ok {
			x.origins = append(x.origins, remote{m})
		}
	}
	if len(x.origins) == 0 {
		return nil, fmt.Errorf("%w: no layout and no registry to ask", verify.ErrUnreachable)
	}
	if err := x.resolve(ctx); err != nil {
		return nil, err
	}
	name.Digest = x.in.Digest
	x.Gathered.Name, x.Digest = name.String(), name.Digest.String()
	root, doc, err := x.document(ctx, name.Digest)
	if err != nil {
		return nil, err
	}
	root.Annotations = map[string]string{annotationName: name.String()}
	g.l.list(root)
	subjects := []ocispec.Descriptor{doc.Descriptor}
	for _, m := range doc.manifests {
		if !isDocument(m.MediaType) || !x.wanted(m) {
			continue
		}
		inner, _, err := x.document(ctx, m.Digest)
		if err != nil {
			if err := x.lacks(fmt.Errorf("the manifest for %s: %w (--platform leaves out others)", text.Quote(platformOf(m.Platform), 64), err)); err != nil {
				return nil, err
			}
			continue
		}
		if inner.Size != m.Size || inner.MediaType != m.MediaType {
			return nil, fmt.Errorf("the index says of the manifest %s what it is not", m.Digest)
		}
		subjects = append(subjects, inner)
	}
	for _, s := range subjects {
		if err := x.gather(ctx, s, 0); err != nil {
			return nil, err
		}
	}
	if x.Signatures == 0 {
		err := errors.New("no Notary Project signature of it, or of one of its manifests, is at " + x.places())
		if x.silent != nil {
			err = fmt.Errorf("%w: %w", err, x.silent)
		}
		if err := x.lacks(err); err != nil {
			return nil, err
		}
	}
	return &x.Gathered, nil
}

type imageGathering struct {
	*gathering
	Gathered
	in      verify.Name
	origins []origin
	seen    map[digest.Digest]bool // referrers
	others  map[digest.Digest]int  // by subject, signatures that verify under no statement
	silent  error                  // a registry that cannot serve referrers
}

// lacks notes what could not be had, or returns it where it has to be there.
func (x *imageGathering) lacks(err error) error {
	if !x.Options.Missing {
		return err
	}
	x.Gathered.Missing = append(x.Gathered.Missing, text.Clean(err.Error(), 300))
	return nil
}

func (x *imageGathering) places() string {
	var names []string
	for _, o := range x.origins {
		names = append(names, o.Name())
	}
	return strings.Join(names, ", ")
}

// resolve finds the digest of a tag.
func (x *imageGathering) resolve(ctx context.Context) error {
	if x.in.Digest != "" {
		return nil
	}
	var first error
	for _, o := range x.origins {
		r, ok := o.(remote)
		if !ok {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, requestLimit)
		d, err := r.Resolve(ctx, x.in, x.in.Tag)
		cancel()
		if err == nil {
			x.in.Digest = d
			return nil
		}
		if first == nil {
			first = fmt.Errorf("%s: %w", o.Name(), err)
		}
	}
	if first == nil {
		first = errors.New("a tag is resolved only at a registry: name the image by digest")
	}
	return first
}

// document adds the manifest or index d.
func (x *imageGathering) document(ctx context.Context, d digest.Digest) (ocispec.Descriptor, *document, error) {
	var first error
	for _, o := range x.origins {
		ctx, cancel := context.WithTimeout(ctx, requestLimit)
		desc, raw, err := o.manifest(ctx, x.in, d)
		cancel()
		var doc *document
		if err == nil {
			doc, err = parse(raw, desc)
		}
		if err == nil {
			if !x.l.has(d) {
				x.Manifests++
			}
			x.l.put(desc, func() ([]byte, error) { return raw, nil })
			return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, doc, nil
		}
		// That one does not hold it, says less than that another one cannot be asked.
		if first == nil || errors.Is(first, fs.ErrNotExist) && !errors.Is(err, fs.ErrNotExist) {
			first = fmt.Errorf("%s: %w", o.Name(), err)
		}
	}
	return ocispec.Descriptor{}, nil, first
}

// wanted reports whether m is for one of the platforms that are asked for. What
// BuildKit says of how it built the others (docs.docker.com, "Image attestation
// storage") is an image to the eye, and for none: nothing runs from it, and a public
// registry counts each manifest against a limit.
func (x *imageGathering) wanted(m ocispec.Descriptor) bool {
	if isAttestation(m) && !x.All {
		return false
	}
	return x.Platform == nil || m.Platform != nil && x.Platform(*m.Platform)
}

// gather adds what refers to subject, wherever it is.
func (x *imageGathering) gather(ctx context.Context, subject ocispec.Descriptor, depth int) error {
	artifactType := kind.ArtifactType()
	if x.All {
		artifactType = ""
	}
	for _, o := range x.origins {
		limited, cancel := context.WithTimeout(ctx, requestLimit)
		list, err := o.referrers(limited, x.in, subject, artifactType)
		cancel()
		if errors.Is(err, verify.ErrNoReferrers) {
			x.silent = fmt.Errorf("%s: %w", o.Name(), err)
			continue
		}
		if err != nil {
			if err := x.lacks(fmt.Errorf("referrers of %s at %s: %w", subject.Digest, o.Name(), err)); err != nil {
				return err
			}
			continue
		}
		for _, d := range list {
			signature := d.ArtifactType == kind.ArtifactType()
			if d.Digest.Validate() != nil || !oci.MayBe(d.ArtifactType, kind.ArtifactType()) && !x.All || x.seen[d.Digest] {
				continue
			}
			if err := x.referrer(ctx, o, d, subject, depth); err != nil {
				what := "referrer"
				if signature {
					what = "signature"
				}
				if err := x.lacks(fmt.Errorf("%s %s at %s: %w", what, d.Digest, o.Name(), err)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// referrer adds a referrer with its blobs, and what refers to it.
func (x *imageGathering) referrer(ctx context.Context, o origin, d, subject ocispec.Descriptor, depth int) error {
	within, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	raw, err := o.fetch(within, x.in, d, true)
	if err != nil {
		return err
	}
	doc, err := parse(raw, d)
	if err != nil {
		return err
	}
	if doc.subject == nil || doc.subject.Digest != subject.Digest {
		return nil // whoever lists it is wrong: it is no referrer of this
	}
	if !doc.isSignature() && !x.All {
		return nil
	}
	type part struct {
		ocispec.Descriptor
		raw []byte
	}
	var parts []part
	for _, p := range doc.parts() {
		if p.Digest == ocispec.DescriptorEmptyJSON.Digest {
			parts = append(parts, part{p, ocispec.DescriptorEmptyJSON.Data})
			continue
		}
		blob, err := o.fetch(within, x.in, p, false)
		if err != nil {
			return err
		}
		parts = append(parts, part{p, blob})
	}
	x.seen[d.Digest] = true
	if x.Evaluator != nil && doc.isSignature() {
		ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: doc.MediaType, Digest: doc.Digest, Size: doc.Size}}
		err := ev.Fill(kind, raw, *doc.subject, func(d ocispec.Descriptor) ([]byte, error) {
			for _, p := range parts {
				if p.Digest == d.Digest {
					return p.raw, nil
				}
			}
			return nil, fmt.Errorf("the manifest has no part %s", d.Digest)
		})
		under := []string(nil)
		if err == nil {
			under, _, _ = x.Evaluator.signature(ctx, ev, subject)
		}
		if len(under) == 0 {
			if x.others[subject.Digest] == maxOthers {
				x.LeftOut++
				return nil
			}
			x.others[subject.Digest]++
		}
	}
	for _, p := range parts {
		x.l.put(p.Descriptor, func() ([]byte, error) { return p.raw, nil })
	}
	x.l.put(doc.Descriptor, func() ([]byte, error) { return raw, nil })
	x.l.list(doc.Descriptor)
	if doc.isSignature() {
		x.Signatures++
	} else {
		x.Referrers++
	}
	if x.l.bytes > maxBytes {
		return fmt.Errorf("%w: the evidence archive has more than %d bytes: make several", verify.ErrBudget, maxBytes)
	}
	if x.All && depth < maxDepth {
		return x.gather(ctx, doc.Descriptor, depth+1)
	}
	return nil
}
