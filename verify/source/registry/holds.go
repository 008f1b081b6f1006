package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

var _ verify.Holder = (*Source)(nil)

// Holds implements [verify.Holder]: one request for the manifest of image, of which only
// the status counts. If listed and the registry once served something of the repository,
// it is not asked: it knows the repository, and that nothing refers to image. A 404 is
// the only no. A registry that sends us elsewhere for the manifest does not say no. If it
// does not say no, a few requests more are for [verify.Budget.Others].
func (s *Source) Holds(ctx context.Context, in verify.Name, image ocispec.Descriptor, listed bool, b *verify.Budget) error {
	if err := image.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: image %s: %w", verify.ErrUnreachable, text.Quote(image.Digest.String(), 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return err
	}
	x.ahead = b.Prefetch
	return x.redact(x.through(ctx, image.Digest, func() error {
		var err error
		if !listed || !s.breaker.serves(x.key()) {
			err = x.holds(ctx, image, b)
		}
		if err == nil {
			x.others(ctx, image, b)
		}
		return err
	}))
}

// maxUnclear bounds the manifests that others reads since the list does not say what they
// are.
const maxUnclear = 3

// others notes in b what the registry has for image that other tools signed. Find asked
// for referrers of one type, and many registries send no others then. So this takes one
// page of all referrers, and the tag that cosign uses. It is for a hint only: if the
// registry does not answer, there is none.
func (x *exchange) others(ctx context.Context, image ocispec.Descriptor, b *verify.Budget) {
	_ = x.list(ctx, image, "", b, nil, func(page []ocispec.Descriptor) error {
		n := 0
		for _, d := range page {
			if d.ArtifactType != ocispec.MediaTypeEmptyJSON || d.MediaType != ocispec.MediaTypeImageManifest || evidence.SignatureSize(d.Size) != nil {
				continue // the list says what it is, or it is no signature of anyone
			}
			if n++; n > maxUnclear {
				break
			}
			if raw, err := x.content(ctx, d, b.Manifest, true); err == nil {
				noteOther(b, d.Digest, raw)
			}
		}
		return errStop
	})
	g := &getter{exchange: x, limit: func() (int64, error) { return maxManifest, nil }}
	if resp, err := x.request(ctx, http.MethodHead, oci.CosignTag(image.Digest), g); err == nil {
		resp.Body.Close()
		b.Others.AddTag(image.Digest)
	}
}

// noteOther notes the referrer with the manifest raw if another tool signed with it.
func noteOther(b *verify.Budget, d digest.Digest, raw []byte) {
	if h, err := oci.ReadHead(raw); err == nil {
		b.Others.Add(ocispec.Descriptor{ArtifactType: h.ArtifactType, Digest: d})
	}
}

// request asks for the manifest that has reference.
func (x *exchange) request(ctx context.Context, method, reference string, g *getter) (*http.Response, error) {
	at := &url.URL{Scheme: "https", Host: x.base.Registry, Path: dockerAPI + "/" + x.repository + "/manifests/" + reference}
	if x.plain {
		at.Scheme = "http"
	}
	req, err := http.NewRequestWithContext(ctx, method, at.String(), nil)
	if err != nil {
		return nil, unanswered(err)
	}
	req.Header.Set("Accept", strings.Join(manifestTypes, ", "))
	return g.Do(req)
}

// holds is Holds, except that its error may hold what must not be repeated.
func (x *exchange) holds(ctx context.Context, image ocispec.Descriptor, b *verify.Budget) error {
	g := &getter{exchange: x, limit: func() (int64, error) { return b.MaxManifest(), nil }, check: func(body []byte) error { return b.Manifest(int64(len(body))) }}
	resp, err := x.request(ctx, http.MethodGet, image.Digest.String(), g)
	switch {
	case status(err) == http.StatusNotFound:
		return fmt.Errorf("%w: 404 for its manifest", verify.ErrAbsent)
	case errors.Is(err, errTooLong), errors.Is(err, verify.ErrBudget), errors.Is(err, errRedirected):
		return nil
	case err != nil:
		return unanswered(err)
	}
	resp.Body.Close() // it is in memory
	x.breaker.served(x.key())
	return nil
}

// maxServed bounds of how many repositories is remembered that a registry has them.
const maxServed = 1024

// served notes that a registry has served something of a repository.
func (l *Breaker) served(key string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known.Add(key, struct{}{})
}

// serves reports whether served was told of that repository.
func (l *Breaker) serves(key string) bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.known.Get(key)
	return ok
}
