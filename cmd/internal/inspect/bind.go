package inspect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// A binder completes an image of which somebody named the digest. Signatures
// cover media type and size of what the digest names too, and may be of the
// manifest that this platform would run instead of the index: the sources know.
// What they say needs no trust, since it is either content with that digest or
// counts only together with a signature over it.
type binder struct {
	name    verify.Name
	limits  verify.Limits
	holders []*holder

	// check judges evidence as the rule of the image does.
	check func(context.Context, verify.Evidence, ocispec.Descriptor) verify.Finding
}

// A holder is a source that holds images besides signatures.
type holder struct {
	verify.Source
	manifest func(context.Context, verify.Name, digest.Digest) (ocispec.Descriptor, []byte, error)
	blob     blobOf
	failed   error // why it did not answer; it is not waited for again
}

// A blobOf returns the blob d of the manifest in, after take, told its size, has agreed.
type blobOf func(ctx context.Context, in digest.Digest, d ocispec.Descriptor, take func(int64) error) ([]byte, error)

func newBinder(name verify.Name, sources []verify.Source, limits verify.Limits, check func(context.Context, verify.Evidence, ocispec.Descriptor) verify.Finding) *binder {
	b := &binder{name: name, limits: limits.Or(verify.DefaultLimits), check: check}
	for _, s := range sources {
		switch s := s.(type) {
		case *layout.Source:
			b.holders = append(b.holders, &holder{Source: s, manifest: func(ctx context.Context, _ verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
				return s.Manifest(ctx, d)
			}, blob: func(ctx context.Context, _ digest.Digest, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
				return s.Blob(ctx, d, take)
			}})
		case *store.Reader:
			b.holders = append(b.holders, &holder{Source: s, manifest: func(ctx context.Context, _ verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
				return s.Manifest(ctx, d)
			}, blob: s.Blob})
		case *registry.Source:
			b.holders = append(b.holders, &holder{Source: s, manifest: s.Manifest, blob: func(ctx context.Context, _ digest.Digest, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
				return s.Fetch(ctx, name, d, false, take)
			}})
		}
	}
	return b
}

// bind sets what a decision about img takes: target and manifest, or a fault.
// With a fault it returns what each source said. If partial, it is not known
// which manifest this platform would run, so that only signatures of the index
// are found.
func (b *binder) bind(ctx context.Context, img *verify.Image) (tried []verify.Attempt, partial bool) {
	asked := img.Name.Digest
	target, _, errs := b.fetch(ctx, asked)
	if errs != nil {
		claims, tried := b.claims(ctx, asked, errs)
		if len(claims) == 0 {
			img.Target, img.Fault = ocispec.Descriptor{}, b.fault(tried)
			return tried, false
		}
		img.Target, img.Manifest, img.Related, img.Binding = claims[0], claims[0], claims[1:], verify.BoundDigest
		return nil, false
	}
	img.Target, img.Manifest, img.Binding = target, target, verify.BoundDigest
	var last ocispec.Descriptor // that was asked for
	manifest, m, err := containerd.Select(ctx, func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		if last = d; !images.IsManifestType(d.MediaType) && !images.IsIndexType(d.MediaType) {
			// The config, which says the platform where the index does not.
			return nil, errors.New("only manifests are read")
		}
		_, raw, errs := b.fetch(ctx, d.Digest)
		if errs == nil && int64(len(raw)) != d.Size {
			return nil, &verify.Fault{Reason: verify.ImageMismatch, Detail: fmt.Sprintf("the manifest %s has %d bytes where the index says %d", d.Digest, len(raw), d.Size)}
		}
		if errs == nil {
			return raw, nil
		}
		for _, err := range errs {
			if errors.Is(err, oci.ErrAmbiguous) {
				return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: err.Error()}
			}
		}
		return nil, errs[0]
	}, target)
	var fault *verify.Fault
	switch {
	case err == nil:
		img.Manifest, img.Config = manifest, m.Config.Digest
	case errors.As(err, &fault):
		img.Fault = fault
	case images.IsManifestType(last.MediaType) && last.Platform != nil:
		// The index is here and its manifest is not, as in an archive of signatures:
		// what to look for, the index says.
		img.Manifest = last
	default:
		return nil, true
	}
	return nil, false
}

// fetch returns the manifest or index d from the first source that has it, or
// one error for each source.
func (b *binder) fetch(ctx context.Context, d digest.Digest) (ocispec.Descriptor, []byte, []error) {
	var errs []error
	for _, h := range b.holders {
		err := h.failed
		if err == nil {
			var desc ocispec.Descriptor
			var raw []byte
			desc, raw, err = b.ask(ctx, h, d)
			if err == nil {
				return desc, raw, nil
			}
		}
		errs = append(errs, err)
	}
	if errs == nil {
		errs = []error{errors.New("no source")}
	}
	return ocispec.Descriptor{}, nil, errs
}

// ask asks one source for a manifest, within the limits of the configuration.
func (b *binder) ask(ctx context.Context, h *holder, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, b.limits.Wall)
	defer cancel()
	desc, raw, err := h.manifest(ctx, b.name, d)
	if errors.Is(err, verify.ErrUnreachable) || errors.Is(err, verify.ErrUnauthorized) {
		h.failed = err
	}
	return desc, raw, err
}

// claims returns what the signatures of asked that the sources hold say it is:
// an archive may hold signatures and no image. Each is only a question for the
// verification, which wants a signature over exactly that media type, digest
// and size. Anybody can make manifests that claim anything, and few claims are asked
// about: those come first of which the envelope meets the rule, then those of which it
// signs exactly what the manifest claims. errs are why there is no image, one for each
// source; tried is that and what came of looking for signatures.
func (b *binder) claims(ctx context.Context, asked digest.Digest, errs []error) (list []ocispec.Descriptor, tried []verify.Attempt) {
	var all []claimed
	for i, h := range b.holders {
		a := verify.Attempt{Source: h.Name(), Reason: reasonOf(errs[i]), Detail: errs[i].Error()}
		if a.Reason == verify.ImageUnresolved {
			a.Detail = "it holds neither the image nor a signature of it"
			found, seen, err := b.claimsAt(ctx, h, asked)
			all, a.Seen = append(all, found...), seen
			if seen > 0 {
				a.Detail = "it does not hold the image, and its signatures do not say what they are of"
			}
			// A registry without referrers may just not know of the repository.
			if err != nil && !errors.Is(err, verify.ErrNoReferrers) {
				a.Reason, a.Detail = reasonOf(err), err.Error()
			}
		}
		tried = append(tried, a)
	}
	slices.SortStableFunc(all, func(x, y claimed) int { return x.support - y.support })
	for _, c := range all {
		list = append(list, c.Descriptor)
	}
	list = unique(list)
	return list[:min(len(list), 1+verify.MaxRelated)], tried
}

// A claimed descriptor is what the manifest of a signature says that it is of.
type claimed struct {
	ocispec.Descriptor
	support int
}

// What supports a claim, best first.
const (
	meets  = iota // the envelope signs exactly that, and meets the rule
	signs         // the envelope signs exactly that
	claims        // the manifest says so
)

// claimsAt is claims at one source; seen counts signatures.
func (b *binder) claimsAt(ctx context.Context, h *holder, asked digest.Digest) (list []claimed, seen int, err error) {
	ctx, cancel := context.WithTimeout(ctx, b.limits.Wall)
	defer cancel()
	budget := verify.NewBudget(notary.Kind, b.limits)
	// Asked with the digest alone a source hands over every signature as one of
	// something else, with the digest of its manifest.
	err = h.Find(ctx, b.name, ocispec.Descriptor{Digest: asked}, verify.NewBudget(notary.Kind, b.limits), func(ev verify.Evidence) bool {
		seen++
		_, raw, err := h.manifest(ctx, b.name, ev.Manifest.Digest)
		if err != nil {
			return true
		}
		d, ok := claim(raw, asked)
		if !ok {
			return true
		}
		c := claimed{d, claims}
		whole := verify.Evidence{Manifest: ev.Manifest}
		if whole.Fill(notary.Kind, raw, d, func(part ocispec.Descriptor) ([]byte, error) {
			return h.blob(ctx, ev.Manifest.Digest, part, budget.Envelope)
		}) == nil {
			c.support = b.support(ctx, whole, d)
		}
		list = append(list, c)
		return c.support != meets
	})
	return list, seen, err
}

// support says how an envelope supports the claim that it is over d.
func (b *binder) support(ctx context.Context, ev verify.Evidence, d ocispec.Descriptor) int {
	if f := b.check(ctx, ev, d); f.Reason == verify.Verified && f.Signed == d.Digest {
		return meets
	}
	of, _ := notary.Describe(ev, b.limits)
	if t := of.Target; t.Digest == d.Digest && t.MediaType == d.MediaType && t.Size == d.Size {
		return signs
	}
	return claims
}

// claim reads what the manifest of a signature says that asked is.
func claim(raw []byte, asked digest.Digest) (ocispec.Descriptor, bool) {
	var none ocispec.Descriptor
	m, err := oci.ReadHead(raw)
	if err != nil || m.Subject == nil {
		return none, false
	}
	s := m.Subject
	if s.Digest != asked || s.Size < 0 || !images.IsManifestType(s.MediaType) && !images.IsIndexType(s.MediaType) {
		return none, false
	}
	return ocispec.Descriptor{MediaType: s.MediaType, Digest: s.Digest, Size: s.Size}, true
}

// unique drops from list what is in it before.
func unique(list []ocispec.Descriptor) []ocispec.Descriptor {
	var u []ocispec.Descriptor
	for _, d := range list {
		if !slices.ContainsFunc(u, func(o ocispec.Descriptor) bool {
			return o.MediaType == d.MediaType && o.Digest == d.Digest && o.Size == d.Size
		}) {
			u = append(u, d)
		}
	}
	return u
}

// fault says why there is no descriptor of the image: what kept a source from
// answering, else that none has it.
func (b *binder) fault(tried []verify.Attempt) *verify.Fault {
	if len(tried) == 0 {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: "no layout and no mirror of " + b.name.Host + " is given to look for the image in"}
	}
	var names []string
	for _, a := range tried {
		if a.Reason != verify.ImageUnresolved {
			return &verify.Fault{Reason: a.Reason, Detail: a.Source + ": " + a.Detail}
		}
		names = append(names, a.Source)
	}
	return &verify.Fault{Reason: verify.ImageUnresolved, Detail: fmt.Sprintf("neither the image nor a signature of it is at %s", strings.Join(names, ", "))}
}

// reasonOf translates why a source did not hand over a manifest.
func reasonOf(err error) verify.Reason {
	switch {
	case errors.Is(err, oci.ErrAmbiguous):
		return verify.ImageAmbiguous
	case errors.Is(err, verify.ErrBudget):
		return verify.LimitExceeded
	case errors.Is(err, verify.ErrUnauthorized):
		return verify.SourceUnauthorized
	case errors.Is(err, verify.ErrUnreachable), !errors.Is(err, fs.ErrNotExist):
		return verify.SourceUnreachable
	}
	return verify.ImageUnresolved
}
