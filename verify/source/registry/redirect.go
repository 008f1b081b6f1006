package registry

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// What follows is about registries that do not keep their blobs themselves: nearly all
// public ones answer the request for one with a redirect to a bucket or a CDN. Its URL
// carries a signature in its query and is as secret as a password.

// A Pattern names hosts that blobs may come from besides the registry. The zero
// Pattern names none.
type Pattern struct {
	host  string // of exactly this name or address, or below this domain; lower case
	below bool   // below the domain host; of every name where that is empty
	port  string
}

// hostName is a DNS name in lower case. The last label is no number: 0x7f.1 and 1.2.3
// are addresses for some resolvers.
var hostName = regexp.MustCompile(`^([a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)

const maxName = 253 // bytes of a DNS name

// ParsePattern reads a host, "cdn.example" or "192.0.2.7", every host below a domain,
// "*.cdn.example", or every host, "*"; behind it may stand a port, ":8443". Without one
// it is 443. The error reads on from the name of a field, and does not repeat s.
func ParsePattern(s string) (Pattern, error) {
	host, port := s, "443"
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		host, port = s[:i], s[i+1:]
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port[0] == '0' {
			return Pattern{}, errors.New("has no port from 1 to 65535 behind the colon")
		}
	}
	p := Pattern{host: strings.ToLower(host), port: port}
	if a, ok := address(p.host); ok {
		p.host = a.String()
		return p, nil
	}
	p.host, p.below = strings.CutPrefix(p.host, "*")
	if p.below && p.host == "" {
		return p, nil
	}
	if p.below {
		domain, dotted := strings.CutPrefix(p.host, ".")
		if p.host = domain; !dotted || !strings.Contains(domain, ".") {
			return Pattern{}, errors.New(`must have a domain behind "*.", with a dot in it`)
		}
	}
	if len(p.host) > maxName || !hostName.MatchString(p.host) {
		return Pattern{}, errors.New(`must be a host, "*." and a domain, or "*", and may end in a colon and a port: no scheme, no path`)
	}
	return p, nil
}

// address reads an IP address as it stands in a URL, [2001:db8::1] or 192.0.2.7.
func address(host string) (netip.Addr, bool) {
	bare, v6 := strings.CutPrefix(host, "[")
	if v6 {
		if bare, v6 = strings.CutSuffix(bare, "]"); !v6 {
			return netip.Addr{}, false
		}
	}
	a, err := netip.ParseAddr(bare)
	return a, err == nil && a.Is6() == v6 && a.Zone() == ""
}

// String is p as [ParsePattern] reads it.
func (p Pattern) String() string {
	s := p.host
	switch {
	case p.below && s == "":
		s = "*"
	case p.below:
		s = "*." + s
	case strings.Contains(s, ":"):
		s = "[" + s + "]"
	}
	if p.port != "443" {
		s += ":" + p.port
	}
	return s
}

// matches reports whether p names the host of u. A pattern of many hosts matches names
// alone, and no addresses.
func (p Pattern) matches(u *url.URL) bool {
	if cmp.Or(u.Port(), "443") != p.port {
		return false
	}
	host := strings.ToLower(u.Hostname())
	if a, err := netip.ParseAddr(host); err == nil {
		return !p.below && a.String() == p.host
	}
	switch {
	case len(host) > maxName || !hostName.MatchString(host):
		return false
	case p.below && p.host != "":
		return strings.HasSuffix(host, "."+p.host)
	}
	return p.below || host == p.host
}

// RedirectPolicy is where blobs of a registry may come from besides the registry, over
// https. Nil is nowhere. It is safe for concurrent use and keeps connections, so that
// it is made once.
//
// Who answers there can withhold a blob and cannot make one: it counts only with the
// digest that was asked for. It is told nothing but the URL that the registry gave: no
// credentials, no client certificate, no header of the registry's.
type RedirectPolicy struct {
	field         string
	patterns      []Pattern
	named, public *http.Client // for the hosts that a pattern is the name of, and for others
}

// NewRedirectPolicy lets blobs come from the hosts of patterns. roots are the CAs whose
// certificates these have, nil meaning those of the system. field is where a person
// adds a pattern, for errors.
//
// A host that is not named itself is connected to only at a public address, whatever
// the DNS says of it.
func NewRedirectPolicy(field string, patterns []Pattern, roots *x509.CertPool) *RedirectPolicy {
	e := &RedirectPolicy{field: field, patterns: patterns}
	client := func(control func(network, address string, c syscall.RawConn) error) *http.Client {
		t := Transport(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})
		t.DialContext = (&net.Dialer{Timeout: 5 * time.Second, Control: control}).DialContext
		return bounded(&http.Client{Transport: t, Timeout: defaultClient.Timeout})
	}
	if len(patterns) > 0 {
		e.named, e.public = client(nil), client(onlyPublic)
	}
	return e
}

// client is what to ask u with, or nil.
func (e *RedirectPolicy) client(u *url.URL) *http.Client {
	if e == nil || u.Scheme != "https" || u.User != nil {
		return nil
	}
	many := false
	for _, p := range e.patterns {
		if !p.matches(u) {
			continue
		}
		if !p.below {
			return e.named
		}
		many = true
	}
	if many {
		return e.public
	}
	return nil
}

// errNotPublic is wrapped where a connection was not made.
var errNotPublic = errors.New("the address is not public")

// onlyPublic is the Control of a [net.Dialer]: it sees what the DNS made of a name.
func onlyPublic(_, at string, _ syscall.RawConn) error {
	if a, err := netip.ParseAddrPort(at); err != nil || !public(a.Addr()) {
		return errNotPublic
	}
	return nil
}

// notPublic are addresses that are not on the internet, or that lead to others which
// need not be, besides those that netip knows (IANA's registries of special-purpose
// addresses).
var notPublic = func() (list []netip.Prefix) {
	for _, p := range []string{
		"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24",
		"203.0.113.0/24", "240.0.0.0/4",
		"168.63.129.16/32", // of every machine at Azure
		"::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10",
	} {
		list = append(list, netip.MustParsePrefix(p))
	}
	return list
}()

// nat64 is where a network without IPv4 has it (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// public reports whether a is an address on the internet.
func public(a netip.Addr) bool {
	if a = a.Unmap().WithZone(""); nat64.Contains(a) {
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	return a.IsGlobalUnicast() && !a.IsPrivate() && !slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(a) })
}

// maxRedirects bounds how often one answer leads on to another.
const maxRedirects = 2

// unfollowed keeps net/http from looking at redirects: it follows them with the headers
// of the first request, tells where it comes from, and repeats in its errors what it
// cannot parse.
type unfollowed struct{ http.RoundTripper }

// leadsTo is the header that unfollowed says in where a redirect leads.
const leadsTo = "Tidewaiter-Leads-To"

// RoundTrip implements [http.RoundTripper].
func (t unfollowed) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	to := resp.Header.Get("Location")
	resp.Header.Del("Location")
	resp.Header.Set(leadsTo, to) // whatever an answer says in it itself
	return resp, nil
}

// redirected is where resp leads to, or nil: it is an answer. The error does not say where.
func redirected(resp *http.Response) (*url.URL, error) {
	to := resp.Header.Get(leadsTo)
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		to = ""
	}
	if to == "" {
		return nil, nil
	}
	u, err := resp.Request.URL.Parse(to)
	if err != nil {
		return nil, errors.New("redirected to what is no URL")
	}
	return u, nil
}

// errRedirected is wrapped where an answer was a redirect to another host that is not
// followed.
var errRedirected = errors.New("redirected")

var errTooOften = errors.New("redirected too often")

// may returns what to ask u with, where req was redirected to, or why it is not asked.
func (g *getter) may(u *url.URL) (*http.Client, error) {
	if g.blob && !g.plain {
		if client := g.redirects.client(u); client != nil {
			return client, nil
		}
	}
	err := fmt.Errorf("%w: %w", errRedirected, another(u))
	p, bad := ParsePattern(u.Host)
	switch {
	case !g.blob:
		return nil, fmt.Errorf("%w: only blobs may come from elsewhere", err)
	case g.plain:
		return nil, fmt.Errorf("%w: that is done for registries with https alone", err)
	case g.redirects == nil || bad != nil || u.Scheme != "https" || u.User != nil:
		return nil, err
	}
	// Short, since it is cut, with what to do at its end.
	return nil, fmt.Errorf("%w: the registry chose another host for the blob: if it is its own, %s", errRedirected, g.redirects.add(p))
}

// add says how to let blobs come from p.
func (e *RedirectPolicy) add(p Pattern) string { return fmt.Sprintf("add %s to %s", p, e.field) }

// away asks u, where req was redirected to in so many hops. The answer has status 200.
func (g *getter) away(req *http.Request, u *url.URL, hops int) (*http.Response, error) {
	for ; ; hops++ {
		if hops > maxRedirects {
			return nil, failed(req, errTooOften)
		}
		client, err := g.may(u)
		if err != nil {
			return nil, failed(req, err)
		}
		if err := g.pace(req.Context()); err != nil {
			return nil, failed(req, err)
		}
		if query, err := url.QueryUnescape(u.RawQuery); err == nil {
			g.signed = append(g.signed, query)
		}
		g.signed = append(g.signed, u.RawQuery)
		f := &failure{class: verify.ErrUnreachable, text: what(req) + ": redirected to " + text.Clean(u.Host, 128) + ": "}
		ask := &http.Request{Method: http.MethodGet, URL: u, Header: http.Header{"Accept-Encoding": {"identity"}, "User-Agent": {"tidewaiter"}}}
		resp, err := client.Do(ask.WithContext(req.Context()))
		if err != nil {
			if p, bad := ParsePattern(u.Host); bad == nil && errors.Is(err, errNotPublic) {
				err = fmt.Errorf("%w, and the registry chose it: if it is its own, %s", errNotPublic, g.redirects.add(p))
			} else {
				// The registry answered, so that it is this question that was lost.
				f.lost, f.connected = true, true
			}
			f.cause = g.shown(err)
			f.text += cause(f.cause)
			return nil, f
		}
		next, err := redirected(resp)
		if err == nil && next == nil && resp.StatusCode == http.StatusOK {
			return resp, nil
		}
		drain(resp)
		resp.Body.Close()
		switch {
		case err != nil:
			return nil, failed(req, err)
		case next != nil:
			u = next
			continue
		}
		// No status of another host is one of the registry's: it does not say that
		// the registry has no such blob, or wants to be told who asks.
		asks := ""
		asks, f.after, f.at = wait(resp)
		f.busy = busy(resp.StatusCode)
		f.cause = fmt.Errorf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
		f.text += f.cause.Error() + asks
		return nil, f
	}
}

// shown is err, unless it repeats what only who holds a signed URL may know.
func (g *getter) shown(err error) error {
	if repeats(cause(err), g.signed) {
		return errors.New("an answer that is not shown")
	}
	return err
}
