package config

import (
	"cmp"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/nri/containerd/certsd"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Network says whom the node may ask for signatures. Layouts and what else is on
// the node are always read.
type Network uint8

const (
	NetworkDefault Network = iota // mirrors, and a host without mirrors itself
	NetworkNever                  // nobody: no connection is opened
	NetworkMirrors                // mirrors, and nobody else
	NetworkOrigin                 // mirrors, and then the host itself
)

// networks are the values of sources.network.
var networks = map[string]Network{"never": NetworkNever, "mirrors": NetworkMirrors, "origin": NetworkOrigin}

// hostSources are what containerd's files make of sources for images of a host. The
// maps of mirrors are made once, so that they share clients and connections.
type hostSources struct {
	network    Network
	registries map[string]served
	itself     func(host string) registry.Mirror // the host, of which no file says anything
}

type served struct {
	mirrors []hostMirror
	origin  *hostMirror // nil: never asked
}

type hostMirror struct {
	registry.Mirror // without Host and NS
	proxy           func(host string) bool
	plain           bool // nothing is written of how to connect to it
}

// again reports whether m is o once more: the same registry, asked for the same, and m
// has nothing of its own to be let in by. A hosts.toml names the host itself as its server
// and as a host, too.
func (m *hostMirror) again(o *hostMirror) bool {
	return m.plain && *m.URL == *o.URL && cmp.Or(m.Root, "/v2") == cmp.Or(o.Root, "/v2") && slices.EqualFunc(m.Rewrite, o.Rewrite, func(a, b registry.Rewrite) bool {
		return a.From.String() == b.From.String() && a.To == b.To
	})
}

// hostSources makes clients for what was read; finish adds what all mirrors share.
func (c *Config) hostSources(finish func(m registry.Mirror, named bool) registry.Mirror) hostSources {
	h := hostSources{network: c.Network, registries: map[string]served{}}
	const at = "sources"
	anywhere := registry.NewRedirectPolicy(c.redirects(at), c.Redirects, nil)
	convert := func(m certsd.Mirror) hostMirror {
		to := registry.Mirror{URL: m.URL, Root: m.Root, Header: http.Header(m.Header), RedirectPolicy: anywhere}
		// Its CAs, which are besides the system's, but not that it is not checked at all.
		if m.TLS != nil && m.TLS.RootCAs != nil {
			to.RedirectPolicy = registry.NewRedirectPolicy(c.redirects(at), c.Redirects, m.TLS.RootCAs)
		}
		for _, r := range m.Rewrite {
			to.Rewrite = append(to.Rewrite, registry.Rewrite(r))
		}
		if m.TLS != nil {
			to.Client = &http.Client{Transport: registry.Transport(m.TLS), Timeout: requestTimeout}
		}
		return hostMirror{finish(to, true), m.Proxy, m.TLS == nil && len(m.Header) == 0}
	}
	var found map[string]certsd.Registry
	if c.certs != nil {
		found = c.certs.of
	}
	for host, r := range found {
		var s served
		for _, m := range r.Mirrors {
			s.mirrors = append(s.mirrors, convert(m))
		}
		if r.Origin != nil {
			m := convert(*r.Origin)
			if m.URL == nil {
				m.Client = remote(r.Origin.TLS)
			}
			s.origin = &m
		}
		h.registries[host] = s
	}
	named := c.named()
	h.itself = func(host string) registry.Mirror {
		return finish(registry.Mirror{URL: origin(host), Client: anybody, RedirectPolicy: anywhere}, named[host])
	}
	return h
}

// of returns the mirrors of an image's host after those of config.yaml, in the order
// to ask.
func (h hostSources) of(host string, listed []registry.Mirror) []registry.Mirror {
	if h.network == NetworkNever {
		return nil
	}
	list := listed
	s, known := h.registries[host]
	if !known {
		s, known = h.registries["*"]
	}
	var before []hostMirror
	add := func(m hostMirror) {
		if m.URL == nil {
			at := h.itself(host)
			m.URL, m.Credentials = at.URL, at.Credentials
		}
		if slices.ContainsFunc(before, func(o hostMirror) bool { return m.again(&o) }) {
			return
		}
		before = append(before, m)
		// What config.yaml says of a registry goes before.
		for _, o := range listed {
			if o.URL.Scheme == m.URL.Scheme && o.URL.Host == m.URL.Host {
				return
			}
		}
		m.NS = m.proxy(host)
		list = append(list[:len(list):len(list)], m.Mirror)
	}
	for _, m := range s.mirrors {
		add(m)
	}
	if h.network == NetworkMirrors || h.network == NetworkDefault && len(list) > 0 {
		return list
	}
	switch {
	case !known:
		add(hostMirror{Mirror: h.itself(host), proxy: func(string) bool { return false }, plain: true})
	case s.origin != nil:
		add(*s.origin)
	}
	return list
}

// remote asks hosts that nobody but the author of a pod named: not those that are
// this node's own and know its secrets, as the metadata services of clouds.
func remote(config *tls.Config) *http.Client {
	t := registry.Transport(config)
	t.DialContext = (&net.Dialer{Timeout: dialTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		if a, err := netip.ParseAddrPort(address); err != nil || a.Addr().Unmap().IsLinkLocalUnicast() {
			return errors.New("a link-local address is asked only where sources.mirrors or a hosts.toml names it")
		}
		return nil
	}}).DialContext
	return &http.Client{Transport: t, Timeout: requestTimeout}
}

// anybody is shared by all hosts of which no file says anything.
var anybody = remote(nil)

// network reads sources.network and sources.certsDir, and what contradicts them. It returns
// the directories to read, nil for those of containerd, or [none].
func (r *reader) network(f map[string]*yaml.Node, c *Config) (dirs []string) {
	const at, hostsAt = "sources.network", "sources.certsDir"
	if n := f["network"]; n != nil {
		s := r.text(n, at)
		if c.Network = networks[s]; c.Network == NetworkDefault {
			r.fail(n, at, "%s is not never, mirrors or origin", text.Quote(s, 64))
		}
	}
	if n := f["certsDir"]; n != nil {
		dirs = r.directories(n, hostsAt)
	}
	r.accepted(f["acceptPlainHTTP"], c)
	if c.Network == NetworkNever {
		for _, key := range []string{"mirrors", "credentials", "blobHosts"} {
			if n := f[key]; n != nil {
				r.fail(n, "sources."+key, "has no use with network: never")
			}
		}
		if n := f["certsDir"]; n != nil && !slices.Equal(dirs, none) {
			r.fail(n, hostsAt, "has no use with network: never")
		}
	}
	return dirs
}

// none is the value of sources.certsDir that reads nothing.
var none = []string{"none"}

// maxDirectories bounds those of sources.certsDir.
const maxDirectories = 8

// directories reads sources.certsDir: auto (nil), none, or directories, in a list or with
// colons between them as containerd's config_path has them.
func (r *reader) directories(n *yaml.Node, at string) (dirs []string) {
	var all []string
	if n.Kind == yaml.SequenceNode {
		for i, v := range r.sequence(n, at, maxDirectories) {
			all = append(all, r.text(v, index(at, i)))
		}
	} else {
		switch s := r.text(n, at); s {
		case "auto":
			return nil
		case none[0]:
			return none
		default:
			all = strings.Split(s, ":")
		}
	}
	for _, s := range all {
		switch {
		case !strings.HasPrefix(s, "/") || printable(s) != nil || strings.Contains(s, ":"):
			r.fail(n, at, "must be auto, none or absolute paths of certs.d directories")
		case slices.Contains(dirs, filepath.Clean(s)):
			r.fail(n, at, "names %s twice", text.Quote(s, 80))
		}
		dirs = append(dirs, filepath.Clean(s))
	}
	if len(dirs) > maxDirectories {
		r.fail(n, at, "has more than %d directories", maxDirectories)
	}
	return dirs
}

// maxAccepted bounds the hosts of sources.acceptPlainHTTP.
const maxAccepted = 64

// accepted reads sources.acceptPlainHTTP: registries of which it was decided that anybody
// on the way to them may hide signatures. It silences the warnings and does nothing else.
func (r *reader) accepted(n *yaml.Node, c *Config) {
	const at = "sources.acceptPlainHTTP"
	for i, v := range r.sequence(n, at, maxAccepted) {
		host, err := policy.ParseHost(r.text(v, index(at, i)))
		switch {
		case err != nil:
			r.fail(v, index(at, i), "must be a host, with its port if it has one")
		case slices.Contains(c.AcceptPlainHTTP, host):
			r.fail(v, index(at, i), "is listed twice")
		}
		c.AcceptPlainHTTP = append(c.AcceptPlainHTTP, host)
	}
}

// acceptPlain reports whether config.yaml accepts that a registry is asked over http. One
// whose certificate is not looked at is another matter.
func (c *Config) acceptPlain(u *url.URL) bool {
	host, err := policy.ParseHost(u.Host)
	if err != nil || u.Scheme != "http" || !slices.Contains(c.AcceptPlainHTTP, host) {
		return false
	}
	if c.plain == nil {
		c.plain = map[string]bool{}
	}
	c.plain[host] = true
	return true
}

// rewrites reads the rewrites of a mirror, in the order of the file.
func (r *reader) rewrites(n *yaml.Node, at string) (list []registry.Rewrite) {
	if n == nil {
		return nil
	}
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 || len(n.Content) > 2*maxRewrites {
		r.fail(n, at, "must be a mapping of 1 to %d regular expressions to what replaces them", maxRewrites)
		return nil
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		from, to := r.text(n.Content[i], at), r.text(n.Content[i+1], at)
		e, err := regexp.Compile(from)
		if err != nil || len(from) > maxRewrite || len(to) > maxRewrite {
			r.fail(n.Content[i], at, "%s is no regular expression, or too long", text.Quote(from, 80))
			return nil
		}
		if seen[from] {
			r.fail(n.Content[i], at, "%s is given twice", text.Quote(from, 80))
		}
		seen[from] = true
		list = append(list, registry.Rewrite{From: e, To: to})
	}
	return list
}

// redirects reads hosts that blobs may come from.
func (r *reader) redirects(n *yaml.Node, path string) (list []registry.Pattern) {
	for i, v := range r.sequence(n, path, maxRedirects) {
		at := index(path, i)
		p, err := registry.ParsePattern(r.text(v, at))
		if err != nil {
			r.fail(v, at, "%v", err)
		}
		if slices.Contains(list, p) {
			r.fail(v, at, "is listed twice")
		}
		list = append(list, p)
	}
	return list
}

// aliases reads the names that importers changed.
func (r *reader) aliases(n *yaml.Node, c *Config) {
	for i, v := range r.sequence(n, "aliases", maxAliases) {
		at := index("aliases", i)
		f := r.mapping(v, at, "from", "to")
		for _, must := range []string{"from", "to"} {
			if f[must] == nil {
				r.fail(v, at+"."+must, "is required")
			}
		}
		if r.err != nil {
			return
		}
		a, err := policy.ParseAlias(r.text(f["from"], at+".from"), r.text(f["to"], at+".to"))
		if err != nil {
			r.fail(v, at, "%v", err)
		}
		c.Aliases = append(c.Aliases, a)
	}
}
