package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A getter is the client that oras-go is given. It answers only with status 200
// and the whole body in memory; everything else is an error that wraps one of
// those that verify.Source speaks of. What oras-go makes of the answer is then
// about its content alone.
type getter struct {
	*exchange
	limit func() (int64, error)        // asked before each request: how many bytes the answer may have
	check func([]byte) error           // told each answer; may be nil
	pages func([]byte) ([]byte, error) // makes of an index what oras-go is to decode; may be nil
	as    string                       // the content type that oras-go is to see; empty: what the answer has
	blob  bool                         // a blob is asked for
	said  digest.Digest                // of the last answer, by its header; may be anything
	asked int                          // requests so far, without those that a challenge makes necessary

	signed []string // queries of the URLs that it was redirected to
}

// Do implements remote.Client.
func (g *getter) Do(req *http.Request) (*http.Response, error) {
	limit, err := g.limit()
	if err != nil {
		return nil, err
	}
	g.asked++
	if err := g.own(req.URL); err != nil {
		return nil, failed(req, err)
	}
	ctx, end := context.WithCancelCause(req.Context())
	defer end(nil)
	req = req.Clone(ctx)
	g.rooted(req.URL)
	for k, values := range g.Source.header {
		if req.Header.Values(k) == nil {
			req.Header[http.CanonicalHeaderKey(k)] = values
		}
	}
	req.Header.Set("Accept-Encoding", "identity") // also keeps a Transport from asking for gzip and unpacking it
	req.Header.Set("User-Agent", "tidewaiter")
	g.namespace(req.URL)
	resp, err := g.authorized(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		drain(resp)
		return nil, refused(req, resp, g.unwelcome(resp.StatusCode))
	}
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, failed(req, g.shown(fmt.Errorf("content encoding %s that was not asked for", text.Quote(e, 32))))
	}
	if resp.ContentLength > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, limit %d", what(req), errTooLong, resp.ContentLength, limit)
	}
	r := &reader{named: g.Source.named, end: end, turn: make(chan struct{})}
	defer largeBodies.give(r)
	var lent *[]byte // body is in it
	defer func() {
		if lent != nil {
			buffers.Put(lent)
		}
	}()
	body, err := readAll(counted{resp.Body, &r.received}, resp.ContentLength, limit+1, func() ([]byte, error) {
		if err := largeBodies.take(ctx, r); err != nil || g.pages == nil {
			return nil, err // without pages the caller keeps the body
		}
		if b, ok := buffers.Get().(*[]byte); ok && int64(cap(*b)) >= limit+1 {
			lent = b
		} else {
			fresh := make([]byte, 0, limit+1)
			lent = &fresh
		}
		return (*lent)[: 0 : limit+1], nil
	})
	switch why := context.Cause(ctx); {
	case err == nil:
	case errors.Is(err, errNoTurn):
		return nil, failed(req, err)
	case errors.Is(why, errYield): // it says nothing of the registry
		return nil, failed(req, why)
	case errors.Is(why, errSlow):
		return nil, lost(req, why, true)
	default:
		return nil, lost(req, g.shown(err), true)
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("%s: %w: limit %d", what(req), errTooLong, limit)
	}
	if g.check != nil {
		if err := g.check(body); err != nil {
			return nil, fmt.Errorf("%s: %w", what(req), err)
		}
	}
	// oras-go compares the type of a list of referrers as it stands, parameters
	// and all.
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil {
		resp.Header.Set("Content-Type", t)
	}
	if g.as != "" {
		resp.Header.Set("Content-Type", g.as)
	}
	g.said = digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if g.pages != nil && (resp.Header.Get("Content-Type") == ocispec.MediaTypeImageIndex || isIndex(body)) {
		resp.Header.Set("Content-Type", ocispec.MediaTypeImageIndex) // some registries call it JSON, or text
		if body, err = g.pages(body); err != nil {
			return nil, fmt.Errorf("%s: %w", what(req), err)
		}
	} else {
		lent = nil // the caller keeps it
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	return resp, nil
}

// isIndex reports whether an answer is an index by what it says itself.
func isIndex(body []byte) bool {
	h, err := oci.ReadHead(body)
	return err == nil && h.HasManifests && !h.HasConfig && !h.HasLayers && (h.MediaType == ocispec.MediaTypeImageIndex || h.MediaType == "")
}

// authorized sends req with what is known to be wanted, and once more with what the
// answer says is wanted. req is of the mirror, and so is an answer that is not a 200.
func (g *getter) authorized(req *http.Request) (*http.Response, error) {
	header, old, err := g.known(req.Context())
	if err != nil {
		return nil, told(req, err)
	}
	resp, err := g.once(req, header)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	list := challenges(resp.Header.Values("WWW-Authenticate"))
	if !old || g.challenged || len(list) == 0 {
		return resp, nil
	}
	g.challenged = true
	drain(resp)
	resp.Body.Close()
	if header, err = g.answer(req.Context(), list); err != nil {
		f := (*failure)(nil)
		if errors.Is(err, errCannot) && errors.As(err, &f) {
			return nil, refused(req, resp, f.text)
		}
		return nil, told(req, err)
	}
	return g.once(req, header)
}

// once sends req with header as its Authorization, and follows redirects, at most two.
// The answer is the mirror's, or has status 200.
func (g *getter) once(req *http.Request, header string) (*http.Response, error) {
	connected := false
	ask := req.Clone(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			connected = true
			g.reached()
		},
	}))
	if header != "" {
		ask.Header.Set("Authorization", header)
	}
	var resp *http.Response
	for hops := 0; ; {
		if err := g.pace(req.Context()); err != nil {
			return nil, failed(req, err)
		}
		var err error
		resp, err = g.client.Do(ask)
		g.connected = g.connected || connected
		if err != nil {
			return nil, lost(req, err, connected)
		}
		g.header = header
		to, err := redirected(resp)
		if err == nil && to == nil {
			break
		}
		drain(resp)
		resp.Body.Close()
		hops++
		switch {
		case err != nil:
			return nil, failed(req, err)
		case g.own(to) != nil:
			return g.away(req, to, hops)
		case hops > maxRedirects:
			return nil, failed(req, errTooOften)
		}
		ask = ask.Clone(ask.Context())
		ask.URL = to
	}
	if resp.StatusCode == http.StatusUnauthorized {
		g.header = ""
		g.tokens.forget(g.origin, g.repository)
	}
	return resp, nil
}

// drain reads a short body, so that the connection can be used again.
func drain(resp *http.Response) {
	if n := resp.ContentLength; n >= 0 && n < 4<<10 {
		io.Copy(io.Discard, resp.Body)
	}
}

// namespace says whose images a mirror of many hosts is asked for, as containerd
// does. What the mirror put into a link of its own stays.
func (s *Source) namespace(u *url.URL) {
	if !s.ns || u.Query().Has("ns") {
		return
	}
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += "ns=" + url.QueryEscape(s.host)
}

// errTooLong says that a body was longer than what was asked for. What that means
// depends on what was asked for.
var errTooLong = errors.New("the answer is too long")

// own returns an error unless u is at the mirror.
func (s *Source) own(u *url.URL) error {
	scheme := "https"
	if s.plain {
		scheme = "http"
	}
	if u.Scheme != scheme || !strings.EqualFold(u.Host, s.base.Registry) || u.User != nil {
		return another(u)
	}
	return nil
}

func another(u *url.URL) error {
	return fmt.Errorf("%s is another host or scheme and is not asked", text.Clean(u.Scheme+"://"+u.Host, 80))
}

// what names a request for a person: no query, and dots for the digest, which the
// line that it ends up in names already.
func what(req *http.Request) string {
	p := req.URL.Path
	return req.Method + " " + text.Clean(p[:strings.LastIndexByte(p, '/')+1], 120) + "..."
}

// failed makes the error for a request that got no answer.
func failed(req *http.Request, err error) error {
	return &failure{class: verify.ErrUnreachable, text: what(req) + ": " + cause(err), cause: err}
}

// lost is failed where the registry did not end its answer, or, unless connected,
// could not even be asked.
func lost(req *http.Request, err error, connected bool) error {
	return &failure{class: verify.ErrUnreachable, text: what(req) + ": " + cause(err), cause: err, lost: true, connected: connected}
}

// cause says in a few words why there was no answer.
func cause(err error) string {
	// What net/http and net add around the cause names the URL again, with its
	// query.
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var errno syscall.Errno
	var n net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return "given up"
	case errors.As(err, &n) && n.Timeout():
		return "no answer in time"
	case errors.As(err, &errno):
		return errno.Error()
	}
	return short(err)
}

// told adds to an error of the token protocol what it was wanted for.
func told(req *http.Request, err error) error {
	f := (*failure)(nil)
	if !errors.As(err, &f) {
		return failed(req, err)
	}
	return &failure{class: f.class, text: what(req) + ": " + f.text, cause: f.cause}
}

// refused makes the error for an answer with another status than 200; why may be
// empty.
func refused(req *http.Request, resp *http.Response, why string) error {
	f := &failure{class: verify.ErrUnreachable, status: resp.StatusCode, busy: busy(resp.StatusCode)}
	f.text = strings.TrimSpace(fmt.Sprintf("%s: %d %s", what(req), resp.StatusCode, http.StatusText(resp.StatusCode)))
	asks := ""
	asks, f.after, f.at = wait(resp)
	f.text += asks
	if f.status == http.StatusUnauthorized || f.status == http.StatusForbidden {
		f.class = verify.ErrUnauthorized
	}
	if why != "" {
		f.text += ": " + why
	}
	return f
}

// wait says how long, or until when, a registry that is busy asks not to be asked.
// One question asks nothing twice; for others see [Breaker].
func wait(resp *http.Response) (text string, after time.Duration, at time.Time) {
	if !busy(resp.StatusCode) {
		return "", 0, at
	}
	header := resp.Header.Get("Retry-After")
	if s, err := strconv.ParseUint(header, 10, 31); err == nil {
		return fmt.Sprintf(", asks to wait %d s", s), time.Duration(s) * time.Second, at
	}
	if at, err := http.ParseTime(header); err == nil {
		return ", asks to wait until " + at.UTC().Format(time.RFC3339), 0, at
	}
	return "", 0, at
}

// busy reports whether a status says to come back later.
func busy(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable
}

// A failure is what kept a request from being answered with status 200.
type failure struct {
	class  error // of verify's
	text   string
	status int // 0: no answer of the registry
	cause  error

	lost, connected bool          // see lost
	busy            bool          // the registry, or where it redirected to, says to come back later
	after           time.Duration // how long a busy registry asks to wait, or 0
	at              time.Time     // or until when
}

// why is the failure without what was asked for.
func (f *failure) why() string {
	if f.cause == nil {
		return strings.ToLower(http.StatusText(f.status))
	}
	return cause(f.cause)
}

// Error implements error. It holds no query and no credentials.
func (f *failure) Error() string { return f.class.Error() + ": " + f.text }

// Unwrap lets errors.Is find the class and the cause.
func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.class}
	}
	return []error{f.class, f.cause}
}

// status is the HTTP status that err is about, or 0.
func status(err error) int {
	var f *failure
	if errors.As(err, &f) {
		return f.status
	}
	return 0
}

// classes are what a source can say that it could not do.
var classes = []error{verify.ErrUnreachable, verify.ErrUnauthorized, verify.ErrNoReferrers, verify.ErrBudget}

// inconclusive reports whether err left open what the registry holds.
func inconclusive(err error) bool {
	for _, class := range classes {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// unanswered makes err, for which there is no answer at all, one of those that
// verify.Source speaks of.
func unanswered(err error) error {
	switch {
	case inconclusive(err):
		return err
	case errors.Is(err, errTooLong):
		return fmt.Errorf("%w: %w", verify.ErrBudget, err)
	}
	return fmt.Errorf("%w: %s", verify.ErrUnreachable, short(err))
}

// Errors of oras-go name URLs, whose queries may hold secrets of the registry.
var (
	quotedURL = regexp.MustCompile(`"[a-zA-Z]+://[^"]*"`)
	query     = regexp.MustCompile(`(?s)\?.*`) // to the end: who knows where a broken one has its own
)

// short is err for a person, without URLs.
func short(err error) string {
	return text.Clean(query.ReplaceAllString(quotedURL.ReplaceAllString(err.Error(), "..."), ""), 200)
}
