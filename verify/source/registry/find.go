package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Find implements [verify.Source].
//
// A signature that the registry does not have, or that is not what its descriptor
// says, costs only itself. One that the registry could not or would not send, or
// that the budget did not allow, hides no other either, but makes Find end with an
// error: nobody knows what it was.
//
// ErrNoReferrers means that there is neither an API nor a referrers tag: such a
// registry may not know of signatures that exist.
func (s *Source) Find(ctx context.Context, in verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	if err := subject.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: subject %s: %w", verify.ErrUnreachable, text.Quote(subject.Digest.String(), 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return err
	}
	x.ahead = b.Prefetch
	return x.redact(x.through(ctx, subject.Digest, func() error { return x.find(ctx, subject, b, yield) }))
}

// find is Find, except that its error may hold what must not be repeated.
func (x *exchange) find(ctx context.Context, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	f := &finding{exchange: x, subject: subject, b: b, yield: yield, seen: map[verify.Target]bool{}}
	var passed []error
	if b.Kind == nil {
		return evidence.ErrKind
	}
	err := x.list(ctx, subject, b.Kind.ArtifactType(), b, &passed, func(referrers []ocispec.Descriptor) error { return f.listed(ctx, referrers) })
	if !errors.Is(err, errStop) {
		err = cmp.Or(f.waiting(ctx, len(f.later)), err)
	}
	for _, suffix := range b.Kind.TagSuffixes() {
		if err == nil || errors.Is(err, verify.ErrNoReferrers) {
			err = cmp.Or(f.tagged(ctx, referrersTag(subject.Digest)+suffix), err)
		}
	}
	if err == nil {
		err = f.passed(passed)
	}
	switch {
	case errors.Is(err, errStop):
		return nil
	case err != nil:
		return unanswered(err)
	}
	return f.failed
}

// list hands each page of the referrers of subject to fn, without those that by what the
// registry says of them cannot be of artifactType; an empty one stands for all. A
// page beyond the bounds ends it with an error, after fn was given what is within them.
// Errors of the first entries that are none are added to passed, which may be nil.
func (x *exchange) list(ctx context.Context, subject ocispec.Descriptor, artifactType string, b *verify.Budget, passed *[]error, fn func([]ocispec.Descriptor) error) error {
	var listed []ocispec.Descriptor
	var cut error
	pages := &getter{
		exchange: x,
		limit:    func() (int64, error) { return b.MaxManifest(), b.Page() },
		check:    func(body []byte) error { return b.Manifest(int64(len(body))) },
		// oras-go is told of one referrer, so that it hands over a page, and does not
		// decode what the registry sent.
		pages: func(body []byte) ([]byte, error) {
			var err error
			if listed, err = page(body, artifactType, b, passed); errors.Is(err, verify.ErrBudget) {
				cut, err = cmp.Or(cut, err), nil
			}
			if err != nil {
				return nil, err
			}
			return json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{{ArtifactType: artifactType}}})
		},
	}
	repo, err := pages.at()
	if err != nil {
		return err
	}
	err = repo.Referrers(ctx, subject, artifactType, func([]ocispec.Descriptor) error { return fn(listed) })
	if pages.asked == 1 && unsupported(err) {
		err = byTag(ctx, repo, pages, subject, func() error { return fn(listed) })
	}
	return cmp.Or(err, cut)
}

// maxPage bounds the referrers that are taken of one page.
const maxPage = oci.MaxList

// maxPassed bounds the entries that are named though they are none.
const maxPassed = 3

// page reads a list of referrers. An entry that is none is passed over, and so is one
// that cannot be of artifactType, unless that is empty; b counts signatures of other tools. An error that wraps
// verify.ErrBudget comes with what is within the bounds.
func page(raw []byte, artifactType string, b *verify.Budget, passed *[]error) (list []ocispec.Descriptor, err error) {
	var cut error
	err = oci.Each(raw, nil, func(e oci.Entry) bool {
		if e.Err == nil && e.Digest == "" {
			e.Err = errors.New("an entry of the list has no digest")
		}
		if e.Err != nil {
			if passed != nil && len(*passed) < maxPassed {
				*passed = append(*passed, e.Err)
			}
			return true
		}
		b.Others.AddEntry(e)
		if artifactType != "" && !oci.MayBe(e.ArtifactType, artifactType) {
			return true
		}
		if len(list) == maxPage {
			cut = fmt.Errorf("%w: a list of more than %d referrers", verify.ErrBudget, maxPage)
			return false
		}
		d := e.Descriptor
		if len(b.Anchors) > 0 && b.Kind != nil {
			if d = e.Annotated(b.Kind.Annotation()); !fits(d, b) {
				d.Annotations = nil
			}
		}
		if d.ArtifactType == artifactType {
			d.ArtifactType = artifactType // of thousands, one copy
		}
		list = append(list, d)
		return true
	})
	return list, cmp.Or(cut, err)
}

// unsupported reports whether err says that there is no Referrers API. The
// specification knows 404 alone. 405 and 501 are what gateways make of it, 400 and 406
// what some registries do (go-containerregistry takes them for it too; 406 is
// Artifactory), a redirect to its web pages what GitHub's does, and oras-go says
// ErrUnsupported of an answer that is no index.
func unsupported(err error) bool {
	switch status(err) {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented, http.StatusBadRequest, http.StatusNotAcceptable:
		return true
	}
	return errors.Is(err, errdef.ErrUnsupported) || errors.Is(err, errRedirected)
}

// byTag calls list after pages, which asks for repo, was handed the index with the
// referrers tag of subject. Like a page of the API it is read in its turn and nobody keeps
// it; other than a page, it has a digest.
func byTag(ctx context.Context, repo *remote.Repository, pages *getter, subject ocispec.Descriptor, list func() error) error {
	tag := referrersTag(subject.Digest)
	var whole digest.Digest // of the index; empty: there was none
	read := pages.pages
	pages.pages = func(body []byte) ([]byte, error) {
		whole = digest.FromBytes(body)
		if said := pages.said; said != "" && said.Validate() == nil {
			if whole = said.Algorithm().FromBytes(body); whole != said {
				return nil, errors.New("the index with the referrers tag does not match its Docker-Content-Digest")
			}
		}
		if whole == subject.Digest { // some registries resolve the tag to the subject itself
			return body[:0], nil
		}
		short, err := read(body)
		if err != nil {
			err = fmt.Errorf("tag %s: %w", tag, err)
		}
		return short, err
	}
	_, body, err := repo.Manifests().FetchReference(ctx, tag)
	if status(err) == http.StatusNotFound {
		return fmt.Errorf("%w: no Referrers API and no tag %s", verify.ErrNoReferrers, tag)
	}
	if err != nil {
		return err
	}
	body.Close()
	if whole == "" || whole == subject.Digest {
		return fmt.Errorf("%w: no Referrers API, and tag %s is no index of referrers", verify.ErrNoReferrers, tag)
	}
	return list()
}

// referrersTag is the tag of the index of d's referrers, as distribution-spec
// v1.1 cuts it ("Referrers Tag Schema").
func referrersTag(d digest.Digest) string {
	alg, ref := d.Algorithm().String(), d.Encoded()
	return alg[:min(len(alg), 32)] + "-" + ref[:min(len(ref), 64)]
}

// errStop ends a listing since yield wants no more.
var errStop = errors.New("enough")

// A finding is one Find under way.
type finding struct {
	*exchange
	subject ocispec.Descriptor
	b       *verify.Budget
	yield   func(verify.Evidence) bool
	seen    map[verify.Target]bool // descriptors, not digests, since an entry may lie about the size
	later   []ocispec.Descriptor   // that wait
	claims  int                    // that fit, and were not listed as signatures
	early   int                    // of those that waited, looked at before all are listed
	cut     bool                   // more were listed than may be
	failed  error                  // the first that left open what a signature is
}

// maxEarly bounds the signatures of nobody whom the rule trusts that are looked at before
// all are listed: enough for an image that nobody is at odds with, also if the next page
// does not come.
const maxEarly = 10

// maxClaims bounds the entries that fit, are not listed as signatures, and are looked at
// though more were listed than may be: each costs a request, and need not be a signature.
const maxClaims = 200

// listed looks at those of a page of entries at once that say to be by a certificate that
// the rule trusts, and then at a few others. The rest waits, as many as may be, so that
// many of them hide none.
func (f *finding) listed(ctx context.Context, entries []ocispec.Descriptor) error {
	if len(entries) > 0 {
		f.breaker.served(f.key())
	}
	for _, d := range entries {
		t := verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		if f.seen[t] {
			continue
		}
		fits := fits(d, f.b)
		if err := f.b.Referrer(); err != nil && (!fits || d.ArtifactType != f.b.Kind.ArtifactType() && f.claims >= maxClaims) {
			if f.cut = true; f.failed == nil {
				f.failed = err
			}
			continue
		}
		if fits && d.ArtifactType != f.b.Kind.ArtifactType() {
			f.claims++
		}
		f.seen[t] = true
		d.Annotations = nil
		if !fits {
			f.later = append(f.later, d)
		} else if err := f.look(ctx, d); err != nil {
			return err
		}
	}
	n := min(maxEarly-f.early, len(f.later))
	f.early += n
	return f.waiting(ctx, n)
}

// fits reports whether d says to be signed with a chain that has one of the certificates.
// Anybody can write that: it decides what comes first, and nothing else.
func fits(d ocispec.Descriptor, b *verify.Budget) bool {
	chain := d.Annotations[b.Kind.Annotation()]
	return chain != "" && slices.ContainsFunc(b.Anchors, func(a string) bool { return strings.Contains(chain, a) })
}

// waiting looks at n of the entries that wait: those that are listed as signatures, then
// those that may be, small before big.
func (f *finding) waiting(ctx context.Context, n int) error {
	slices.SortStableFunc(f.later, func(x, y ocispec.Descriptor) int {
		if a, b := x.ArtifactType == f.b.Kind.ArtifactType(), y.ArtifactType == f.b.Kind.ArtifactType(); a != b {
			return map[bool]int{true: -1, false: 1}[a]
		}
		return cmp.Compare(x.Size, y.Size)
	})
	now := f.later[:n]
	f.later = f.later[n:]
	for _, d := range now {
		if err := f.look(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// look reads and hands over the signature d, which a list says to be one, or which may
// be one. If it is none after all it counts as none.
func (f *finding) look(ctx context.Context, d ocispec.Descriptor) error {
	if err := ctx.Err(); err != nil {
		if f.failed != nil && !f.cut {
			return f.failed
		}
		return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
	}
	ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
	var raw []byte
	named := d.ArtifactType == f.b.Kind.ArtifactType()
	if !named {
		if d.MediaType != ocispec.MediaTypeImageManifest || evidence.SignatureSize(d.Size) != nil {
			return nil
		}
		var err error
		raw, err = f.content(ctx, ev.Manifest, f.b.Manifest, true)
		if err != nil {
			if f.failed == nil && inconclusive(err) {
				f.failed = err
			}
			return nil
		}
		if h, err := oci.ReadHead(raw); err != nil || !evidence.Is(f.b.Kind, h) {
			noteOther(f.b, d.Digest, raw) // cosign 2's bundles are listed as their config
			return nil
		}
	}
	if err := f.b.Signature(); err != nil {
		return err
	}
	if ev.Err = f.read(ctx, &ev, raw); ev.Err != nil {
		if f.failed == nil && inconclusive(ev.Err) {
			f.failed = ev.Err
		}
		ev.Err = f.redact(fmt.Errorf("signature %s: %w", text.Clean(d.Digest.String(), 80), ev.Err))
	}
	if !f.yield(ev) {
		return errStop
	}
	return nil
}

// tagged reads and hands over what lies at a tag that says what it is of. There may be
// nothing: whoever may push can remove it, so that this says nothing.
func (f *finding) tagged(ctx context.Context, tag string) error {
	g := &getter{exchange: f.exchange, limit: func() (int64, error) { return min(oci.MaxSignature, f.b.MaxManifest()), f.b.Page() }}
	repo, err := g.at()
	if err != nil {
		return err
	}
	d, body, err := repo.Manifests().FetchReference(ctx, tag)
	if status(err) == http.StatusNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer body.Close()
	if err := f.b.Manifest(d.Size); err != nil {
		return err
	}
	raw, err := content.ReadAll(body, d)
	if err != nil {
		return err
	}
	if err := f.b.Signature(); err != nil {
		return err
	}
	ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
	if ev.Err = f.read(ctx, &ev, raw); ev.Err != nil {
		if f.failed == nil && inconclusive(ev.Err) {
			f.failed = ev.Err
		}
		ev.Err = f.redact(fmt.Errorf("signature %s: %w", tag, ev.Err))
	}
	if !f.yield(ev) {
		return errStop
	}
	return nil
}

// passed hands over, as signatures that are none, what stands in a list and is no
// descriptor: it costs itself, and is named.
func (f *finding) passed(list []error) error {
	for _, err := range list {
		if !f.yield(verify.Evidence{Err: f.redact(errors.New(text.Clean(err.Error(), 200)))}) {
			return errStop
		}
	}
	return nil
}

// read reads the signature with the manifest that ev names, and that is raw unless that
// is nil, into ev.
func (f *finding) read(ctx context.Context, ev *verify.Evidence, raw []byte) (err error) {
	if m := ev.Manifest.MediaType; m != ocispec.MediaTypeImageManifest {
		return fmt.Errorf("media type %s is not that of a manifest", text.Quote(m, 80))
	}
	if err := evidence.SignatureSize(ev.Manifest.Size); err != nil {
		return err
	}
	if raw == nil {
		if raw, err = f.content(ctx, ev.Manifest, f.b.Manifest, true); err != nil {
			return err
		}
	}
	return ev.Fill(f.b.Kind, raw, f.subject, func(d ocispec.Descriptor) ([]byte, error) { return f.content(ctx, d, f.b.Envelope, false) })
}

// content reads the manifest or blob that d describes, from the budget that take is
// of, and checks it.
func (x *exchange) content(ctx context.Context, d ocispec.Descriptor, take func(int64) error, manifest bool) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	if err := take(d.Size); err != nil {
		return nil, err
	}
	g := &getter{exchange: x, blob: !manifest, limit: func() (int64, error) { return d.Size, nil }}
	if manifest {
		g.as = d.MediaType // its digest says that it is what was asked for, whatever the registry calls it
	}
	repo, err := g.at()
	if err != nil {
		return nil, err
	}
	var from content.Fetcher = repo.Blobs()
	if manifest {
		from = repo.Manifests()
	}
	raw, err := content.FetchAll(ctx, from, d)
	switch {
	case status(err) == http.StatusNotFound:
		return nil, fmt.Errorf("the registry does not have %s", d.Digest)
	case err != nil && !inconclusive(err):
		return nil, errors.New(short(err))
	}
	return raw, err
}
