package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/tidewaiter/tidewaiter/verify"
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
		return fmt.Errorf("%w: subject %s: %w", verify.ErrUnreachable, verify.Quote(subject.Digest.String(), 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return err
	}
	x.ahead = b.Ahead
	return x.conceal(x.through(ctx, subject.Digest, func() error { return x.find(ctx, subject, b, yield) }))
}

// find is Find, except that its error may hold what must not be repeated.
func (x *exchange) find(ctx context.Context, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	f := &finding{exchange: x, subject: subject, b: b, yield: yield, seen: map[verify.Target]bool{}}
	err := x.list(ctx, subject, verify.ArtifactTypeNotation, b, func(referrers []ocispec.Descriptor) error { return f.referrers(ctx, referrers) })
	switch {
	case errors.Is(err, errStop):
		return nil
	case err != nil:
		return unanswered(err)
	}
	return f.failed
}

// list hands each page of the referrers of subject to fn. A registry may leave out
// those of other types than artifactType, unless that is empty.
func (x *exchange) list(ctx context.Context, subject ocispec.Descriptor, artifactType string, b *verify.Budget, fn func([]ocispec.Descriptor) error) error {
	pages := &getter{
		exchange: x,
		limit:    func() (int64, error) { return b.MaxManifest(), b.Page() },
		check: func(body []byte) error {
			if err := b.Manifest(int64(len(body))); err != nil {
				return err
			}
			return verify.Bounded(body)
		},
	}
	repo, err := pages.at()
	if err != nil {
		return err
	}
	err = repo.Referrers(ctx, subject, artifactType, fn)
	if pages.asked == 1 && unsupported(err) {
		err = byTag(ctx, repo, subject, fn)
	}
	return err
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
	return errors.Is(err, errdef.ErrUnsupported) || errors.Is(err, errElsewhere)
}

// byTag lists what the index with the referrers tag of subject lists.
func byTag(ctx context.Context, repo *remote.Repository, subject ocispec.Descriptor, list func([]ocispec.Descriptor) error) error {
	tag := referrersTag(subject.Digest)
	index, body, err := repo.Manifests().FetchReference(ctx, tag)
	if status(err) == http.StatusNotFound {
		return fmt.Errorf("%w: no Referrers API and no tag %s", verify.ErrNoReferrers, tag)
	}
	if err != nil {
		return err
	}
	defer body.Close()
	// Some registries resolve the tag to the subject itself.
	if index.MediaType != ocispec.MediaTypeImageIndex || index.Digest == subject.Digest {
		return fmt.Errorf("%w: no Referrers API, and tag %s is no index of referrers", verify.ErrNoReferrers, tag)
	}
	raw, err := content.ReadAll(body, index)
	if err != nil {
		return err
	}
	var referrers ocispec.Index
	if err := json.Unmarshal(raw, &referrers); err != nil {
		return fmt.Errorf("tag %s: %w", tag, err)
	}
	return list(referrers.Manifests)
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
	failed  error                  // the first that left open what a signature is
}

// referrers reads and hands over the signatures among entries, which a registry
// may have filtered or not.
func (f *finding) referrers(ctx context.Context, entries []ocispec.Descriptor) error {
	for _, d := range entries {
		if err := ctx.Err(); err != nil {
			if f.failed != nil {
				return f.failed
			}
			return fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
		}
		if d.ArtifactType != "" && d.ArtifactType != verify.ArtifactTypeNotation {
			continue
		}
		if err := f.b.Referrer(); err != nil {
			return err
		}
		t := verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		if f.seen[t] {
			continue
		}
		f.seen[t] = true
		if err := f.b.Signature(); err != nil {
			return err
		}
		ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
		ev.Err = f.read(ctx, &ev)
		if ev.Err != nil {
			if f.failed == nil && inconclusive(ev.Err) {
				f.failed = ev.Err
			}
			ev.Err = f.conceal(fmt.Errorf("signature %s: %w", verify.Clean(d.Digest.String(), 80), ev.Err))
		}
		if !f.yield(ev) {
			return errStop
		}
	}
	return nil
}

// read reads the signature with the manifest that ev names into ev.
func (f *finding) read(ctx context.Context, ev *verify.Evidence) error {
	if m := ev.Manifest.MediaType; m != ocispec.MediaTypeImageManifest {
		return fmt.Errorf("media type %s is not that of a manifest", verify.Quote(m, 80))
	}
	raw, err := f.content(ctx, ev.Manifest, f.b.Manifest, true)
	if err != nil {
		return err
	}
	envelope, err := verify.EnvelopeIn(raw, f.subject)
	if err != nil {
		return err
	}
	blob, err := f.content(ctx, envelope, f.b.Envelope, false)
	if err != nil {
		return err
	}
	ev.Document, ev.MediaType, ev.Blob = raw, envelope.MediaType, blob
	return nil
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
	repo, err := (&getter{exchange: x, blob: !manifest, limit: func() (int64, error) { return d.Size, nil }}).at()
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
