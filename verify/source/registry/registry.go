// Package registry finds signatures at a registry: the mirror of an image's host, or
// the host itself.
//
// A cold question costs three requests: the list of referrers, the signature
// manifest, the envelope. Where the registry has no Referrers API, as CNCF
// distribution, the index that the referrers tag schema describes is read instead
// (distribution-spec v1.1, "Listing Referrers" and "Referrers Tag Schema").
//
// # What a registry can do to us
//
// It is not trusted: whoever answers can withhold signatures and can not make
// one. It can not cost more than the budget of the question either. Every answer
// is read whole into memory, up to a length that is known before, and only then
// looked at; the bytes on the wire are the bytes that count (no compression).
// Nothing is asked twice. The deadline is that of the context.
//
// Nothing but the scheme, host and port of the URL is ever spoken to: redirects and
// links that lead elsewhere are errors, but for blobs that the configuration says may
// come from there ([RedirectPolicy]). Proxies from the environment are not used.
//
// # Credentials
//
// A registry that asks for a token gets one that its token server issues: at the
// registry's own scheme, host and port, or at the one other origin that the
// configuration names ([Mirror.Realm]). The credentials go to these two and to
// nobody else, and a token goes to the registry that it was fetched for. Nobody's
// credentials are nobody: a public registry gives tokens for that too.
//
// A known token costs no request, and of a registry that was asked before it is
// known what it wants, so that a cold question costs at most 3+1; the first at a
// registry, or one whose token ended before its time, costs the refused request
// too, 3+2.
//
// # Busy registries
//
// Statuses 429 and 503 are answers like every other failure: nothing is asked twice
// within one question, and the error says how long Retry-After wants us to wait. A
// registry that does not answer, or wants to be left alone, is for a short while not
// asked again, see [Breaker].
package registry

import (
	"cmp"
	"context"
	_ "crypto/sha256" // digests of the subjects and blobs
	_ "crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Mirror says where the registry is. Host and URL are required.
type Mirror struct {
	// Host is the canonical host of the image names that it serves, such as
	// "docker.io". Images of another host are not asked for.
	Host string

	// URL is http or https, host and port. A path is put before the repository:
	// with https://harbor.internal/hub the manifests of library/nginx are at
	// https://harbor.internal/v2/hub/library/nginx/manifests/.
	// It has no user, query or fragment.
	URL *url.URL

	// Root is the path of the API, for registries that do not have it at /v2; "/" is
	// none. Empty means /v2.
	Root string

	// Rewrite changes the repository asked for; the first that changes it counts. What
	// it makes is where the signatures are looked for and nothing else.
	Rewrite []Rewrite

	// Header is sent with each request to the mirror, and to nobody else. It is not
	// repeated in errors. What a request needs (Accept) goes before it.
	Header http.Header

	// Client sends the requests; its Transport and Timeout are used, not its Jar or
	// CheckRedirect, and to nobody else. Nil means a client that all such mirrors share, with
	// [Transport] and a minute a request.
	Client *http.Client

	// NS adds the query parameter ns with the image's host to each request, as
	// containerd does for mirrors that serve several (Spegel).
	NS bool

	// Credentials returns what the registry may be told, for exactly the scheme,
	// host and port of URL. It is called whenever a challenge is answered, and
	// keeps what is costly to get. Its error is shown and holds no secret. Nil means
	// nobody's.
	Credentials func(context.Context) (Credential, error)

	// Realm is where tokens may come from besides the scheme, host and port of URL:
	// its own, which have to match exactly. Nil means nowhere, but for Docker Hub
	// (https://registry-1.docker.io) https://auth.docker.io.
	Realm *url.URL

	// RealmClient sends the requests to Realm, so that the client certificate of
	// Client is not shown there. Nil means the client that is shared.
	RealmClient *http.Client

	// Tokens keeps tokens between questions. Nil means that none are kept.
	Tokens *Tokens

	// RedirectPolicy is where blobs may come from besides. Nil means nowhere.
	RedirectPolicy *RedirectPolicy

	// Named is true if the configuration names Host. A registry of a host that it does
	// not name ends a long answer if one of a named host waits to be read.
	Named bool

	// Breaker knows how the registry fares. Nil means that it is asked whatever comes of
	// it, and as often as anybody likes.
	Breaker *Breaker
}

// A Rewrite is a regular expression and what its matches in the path of a repository
// are replaced with, $1 being its first group.
type Rewrite struct {
	From *regexp.Regexp
	To   string
}

// dockerRealm is where Docker Hub's tokens come from, and has been since there are
// tokens.
var dockerRealm = &url.URL{Scheme: "https", Host: "auth.docker.io"}

// Transport returns a transport fit for a Client: HTTP/1.1, 5 seconds each to
// connect, for the TLS handshake and until an answer begins, at most 64 KiB of
// header, no proxy. config may be nil. The caller keeps it, since it keeps
// connections.
func Transport(config *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    5 * time.Second,
		ResponseHeaderTimeout:  5 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    2,
		IdleConnTimeout:        30 * time.Second,
	}
}

var defaultClient = &http.Client{Transport: Transport(nil), Timeout: time.Minute}

// A Source is one mirror. It does not change and is safe for concurrent use.
type Source struct {
	name   string
	host   string
	base   registry.Reference // registry, and what goes before the repository
	plain  bool
	origin string
	client *http.Client
	ns     bool
	named  bool
	api    string // path before the repository, without slash at its end
	header http.Header
	rules  []Rewrite
	err    error // what is wrong with the Mirror

	credentials func(context.Context) (Credential, error)
	realm       *url.URL // may be nil
	realmClient *http.Client
	tokens      *Tokens         // may be nil
	redirects   *RedirectPolicy // may be nil
	breaker     *Breaker        // may be nil
}

var _ verify.Source = (*Source)(nil)

// New returns the source for m. What is wrong with m, Find says.
func New(m Mirror) *Source {
	s := &Source{name: "mirror", host: m.Host, named: m.Named, ns: m.NS, credentials: m.Credentials, realm: m.Realm, tokens: m.Tokens, redirects: m.RedirectPolicy, breaker: m.Breaker,
		api: strings.TrimSuffix(cmp.Or(m.Root, dockerAPI), "/"), header: m.Header, rules: m.Rewrite}
	u := m.URL
	if u == nil {
		s.err = errors.New("mirror has no URL")
		return s
	}
	at := u.Path
	if s.api != dockerAPI {
		at = s.api
	}
	s.name = "mirror " + (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: at}).String()
	s.base = registry.Reference{Registry: u.Host, Repository: strings.Trim(u.Path, "/")}
	s.plain = u.Scheme == "http"
	s.origin = origin(u)
	if s.realm == nil && s.origin == origin(&url.URL{Scheme: "https", Host: "registry-1.docker.io"}) {
		s.realm = dockerRealm
	}
	switch {
	case m.Host == "":
		s.err = errors.New("mirror serves no host")
	case u.Scheme != "http" && u.Scheme != "https":
		s.err = fmt.Errorf("scheme %s is not http or https", text.Quote(u.Scheme, 16))
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		s.err = errors.New("the URL of a mirror has no user, query or fragment")
	case s.api != dockerAPI && u.Path != "":
		s.err = errors.New("the URL of a mirror has no path where the path of its API is given")
	case s.base.ValidateRegistry() != nil:
		s.err = s.base.ValidateRegistry()
	case s.base.Host() != u.Host:
		s.err = fmt.Errorf("the registry of %s is %s", u.Host, s.base.Host())
	}
	s.client, s.realmClient = bounded(m.Client), bounded(m.RealmClient)
	return s
}

// bounded is a client with the transport and timeout of c, which may be nil. It follows
// no redirect.
func bounded(c *http.Client) *http.Client {
	if c == nil {
		c = defaultClient
	}
	transport := c.Transport
	if transport == nil { // http.DefaultTransport would use a proxy from the environment
		transport = defaultClient.Transport
	}
	return &http.Client{Transport: unfollowed{transport}, Timeout: c.Timeout}
}

// Name implements [verify.Source]. It shows scheme, host and path of the URL.
func (s *Source) Name() string { return s.name }

// exchange begins a question about the image's repository at the mirror.
func (s *Source) exchange(in verify.Name) (*exchange, error) {
	ref := s.base
	ref.Repository = s.rewrite(in.Path)
	err := s.err
	if err == nil && in.Host != s.host {
		err = fmt.Errorf("the mirror serves %s, not %s", s.host, text.Clean(in.Host, 80))
	}
	if err == nil {
		err = ref.ValidateRepository()
	}
	if s.base.Repository != "" {
		ref.Repository = s.base.Repository + "/" + ref.Repository
	}
	if err == nil {
		err = ref.ValidateRepository()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s", verify.ErrUnreachable, text.Clean(err.Error(), 200))
	}
	x := &exchange{Source: s, repository: ref.Repository}
	for _, values := range s.header {
		x.keep(values...)
	}
	return x, nil
}

// maxRewritten bounds what a rewrite makes of a path, in bytes.
const maxRewritten = 512

// rewrite returns where the mirror has the repository at path: nowhere, if that would
// be too long.
func (s *Source) rewrite(path string) string {
	for _, r := range s.rules {
		if p := r.From.ReplaceAllString(path, r.To); p != path {
			if len(p) > maxRewritten {
				return ""
			}
			return p
		}
	}
	return path
}

// dockerAPI is where registries have their API.
const dockerAPI = "/v2"

// rooted moves what oras-go asks for below /v2 to where the API is. The mirror's own
// links are there already.
func (x *exchange) rooted(u *url.URL) {
	if rest, found := strings.CutPrefix(u.Path, dockerAPI+"/"+x.repository+"/"); found && !strings.HasPrefix(u.Path, x.api+"/"+x.repository+"/") {
		u.Path, u.RawPath = x.api+"/"+x.repository+"/"+rest, ""
	}
}

// at is the repository whose requests g sends.
func (g *getter) at() (*remote.Repository, error) {
	ref := registry.Reference{Registry: g.base.Registry, Repository: g.repository}
	repo := &remote.Repository{Client: g, Reference: ref, PlainHTTP: g.plain, MaxMetadataBytes: math.MaxInt64} // g has the limit
	// Not to let oras-go fall back to the tag schema by itself: it takes a
	// registry with neither API nor tag for one without referrers, and does not
	// cut the tags of long digests.
	return repo, repo.SetReferrersCapability(true)
}

// manifestTypes are the media types of images and indexes.
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
	oci.DockerList, oci.DockerManifest,
}

// maxManifest bounds what Manifest reads, in bytes.
const maxManifest = 4 << 20

// Manifest returns the image manifest or index with digest d of the repository
// named by in, with its bytes, at most 4 MiB. The bytes have been checked against
// d; the size in the descriptor is theirs, and the media type is what they and the
// registry agree on.
//
// The error wraps [oci.ErrAmbiguous] if the document is not plainly one or the other,
// wraps one of the errors that [verify.Source] speaks of if it was not found out
// what the registry holds, and else [fs.ErrNotExist]: the registry does not hold it.
func (s *Source) Manifest(ctx context.Context, in verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	var none ocispec.Descriptor
	if err := d.Validate(); err != nil {
		return none, nil, fmt.Errorf("digest %s: %w", text.Quote(d.String(), 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return none, nil, err
	}
	var got ocispec.Descriptor
	var raw []byte
	err = x.through(ctx, d, func() (err error) {
		got, raw, err = x.manifest(ctx, d.String(), d)
		return err
	})
	if err != nil && repeats(err.Error(), x.secrets) {
		return none, nil, unanswered(x.redact(err))
	}
	return got, raw, err
}

// Resolve returns the digest of the image that a tag leads to at the mirror now. That
// is a look ahead for people, and nothing to decide by: a tag may be moved. Errors are
// those of Manifest.
func (s *Source) Resolve(ctx context.Context, in verify.Name, tag string) (d digest.Digest, err error) {
	if err := (registry.Reference{Registry: "x", Repository: "x", Reference: tag}).ValidateReferenceAsTag(); err != nil {
		return "", fmt.Errorf("tag %s: %w", text.Quote(tag, 80), err)
	}
	x, err := s.exchange(in)
	if err != nil {
		return "", err
	}
	err = x.through(ctx, "", func() (err error) {
		_, raw, err := x.manifest(ctx, tag, "")
		d = digest.FromBytes(raw)
		return err
	})
	if err != nil && repeats(err.Error(), x.secrets) {
		err = unanswered(x.redact(err))
	}
	if err != nil {
		return "", err
	}
	return d, nil
}

// manifest returns what the registry has under reference, the digest d or, where that
// is empty, a tag. Its error may hold what must not be repeated.
func (x *exchange) manifest(ctx context.Context, reference string, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	var none ocispec.Descriptor
	repo, err := (&getter{exchange: x, limit: func() (int64, error) { return maxManifest, nil }}).at()
	if err != nil {
		return none, nil, err
	}
	repo.ManifestMediaTypes = manifestTypes
	got, body, err := repo.Manifests().FetchReference(ctx, reference)
	if status(err) == http.StatusNotFound {
		return none, nil, fmt.Errorf("the registry does not have %s: %w", reference, fs.ErrNotExist)
	}
	if err != nil {
		return none, nil, unanswered(err)
	}
	defer body.Close()
	if d != "" {
		got.Digest = d
	}
	raw, err := content.ReadAll(body, got)
	if err != nil {
		return none, nil, unanswered(err)
	}
	if !slices.Contains(manifestTypes, got.MediaType) {
		return none, nil, fmt.Errorf("%w: the registry answered with type %s, instead of that of an image's manifest or index", verify.ErrUnreachable, text.Quote(got.MediaType, 80))
	}
	mediaType, err := oci.MediaTypeOf(raw, got.MediaType)
	if err != nil {
		return none, nil, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}, raw, nil
}
