package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"syscall"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A getter is the client that oras-go is given. It answers only with status 200
// and the whole body in memory; everything else is an error that wraps one of
// those that verify.Source speaks of. What oras-go makes of the answer is then
// about its content alone.
type getter struct {
	source *Source
	limit  func() (int64, error) // asked before each request: how many bytes the answer may have
	check  func([]byte) error    // told each answer; may be nil
	asked  int                   // requests so far
}

// Do implements remote.Client.
func (g *getter) Do(req *http.Request) (*http.Response, error) {
	limit, err := g.limit()
	if err != nil {
		return nil, err
	}
	g.asked++
	if err := g.source.own(req.URL); err != nil {
		return nil, failed(req, err)
	}
	req = req.Clone(req.Context())
	req.Header.Set("Accept-Encoding", "identity") // also keeps a Transport from asking for gzip and unpacking it
	req.Header.Set("User-Agent", "tidewaiter")
	resp, err := g.source.client.Do(req)
	if err != nil {
		return nil, failed(req, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		if n := resp.ContentLength; n >= 0 && n < 4<<10 {
			io.Copy(io.Discard, resp.Body) // so that the connection can be used again
		}
		return nil, refused(req, resp)
	}
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, failed(req, fmt.Errorf("content encoding %s that was not asked for", verify.Quote(e, 32)))
	}
	if resp.ContentLength > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, limit %d", what(req), errTooLong, resp.ContentLength, limit)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, failed(req, err)
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
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	return resp, nil
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
		return fmt.Errorf("%s is another host or scheme and is not asked", verify.Clean(u.Scheme+"://"+u.Host, 80))
	}
	return nil
}

// redirect lets the client follow a redirect within the mirror, at most two.
func (s *Source) redirect(req *http.Request, via []*http.Request) error {
	if len(via) > 2 {
		return errors.New("redirected too often")
	}
	if err := s.own(req.URL); err != nil {
		return fmt.Errorf("redirected: %w", err)
	}
	return nil
}

// what names a request for a person: no query, and dots for the digest, which the
// line that it ends up in names already.
func what(req *http.Request) string {
	p := req.URL.Path
	return req.Method + " " + verify.Clean(p[:strings.LastIndexByte(p, '/')+1], 120) + "..."
}

// failed makes the error for a request that got no answer.
func failed(req *http.Request, err error) error {
	// What net/http and net add around the cause names the URL again, with its
	// query.
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var text string
	var errno syscall.Errno
	var n net.Error
	switch {
	case errors.Is(err, context.Canceled):
		text = "given up"
	case errors.As(err, &n) && n.Timeout():
		text = "no answer in time"
	case errors.As(err, &errno):
		text = errno.Error()
	default:
		text = short(err)
	}
	return &failure{verify.ErrUnreachable, what(req) + ": " + text, 0, err}
}

var realm = regexp.MustCompile(`(?i)realm="?([^",]*)`)

// refused makes the error for an answer with another status than 200.
func refused(req *http.Request, resp *http.Response) error {
	f := &failure{class: verify.ErrUnreachable, status: resp.StatusCode}
	f.text = strings.TrimSpace(fmt.Sprintf("%s: %d %s", what(req), resp.StatusCode, http.StatusText(resp.StatusCode)))
	if f.status == http.StatusUnauthorized || f.status == http.StatusForbidden {
		f.class = verify.ErrUnauthorized
		if m := realm.FindStringSubmatch(resp.Header.Get("WWW-Authenticate")); m != nil {
			if u, err := url.Parse(m[1]); err == nil && u.Host != "" && !strings.EqualFold(u.Host, resp.Request.URL.Host) {
				f.text += ": tokens would come from another host, " + verify.Quote(u.Host, 80)
			}
		}
	}
	return f
}

// A failure is what kept a request from being answered with status 200.
type failure struct {
	class  error // of verify's
	text   string
	status int // 0: no answer
	cause  error
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

// inconclusive reports whether err left open what the registry holds.
func inconclusive(err error) bool {
	for _, class := range []error{verify.ErrUnreachable, verify.ErrUnauthorized, verify.ErrNoReferrers, verify.ErrBudget} {
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
	query     = regexp.MustCompile(`\?[^\s"]*`)
)

// short is err for a person, without URLs.
func short(err error) string {
	return verify.Clean(query.ReplaceAllString(quotedURL.ReplaceAllString(err.Error(), "..."), ""), 200)
}
