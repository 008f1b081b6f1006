package config

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/nri/node/hosts"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/mirror"
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

// certsDirectories are where containerds have their certs.d, those that come with
// a Kubernetes first: beside one of them another containerd's is a leftover.
var certsDirectories = []string{
	"/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
	"/var/lib/rancher/rke2/agent/etc/containerd/certs.d",
	"/var/snap/microk8s/current/args/certs.d",
	"/etc/containerd/certs.d",
}

// certs is what a certs.d says, by canonical host or "*". It is kept behind a
// pointer, since headers are secret and a configuration may be printed.
type certs struct{ of map[string]hosts.Registry }

// hosts reads what containerd knows of mirrors: from is a directory, or empty to
// look in the usual places.
func (d *directory) hosts(from string, c *Config) error {
	return d.hostsIn(from, certsDirectories, c)
}

func (d *directory) hostsIn(from string, usual []string, c *Config) error {
	const field = "sources.hosts"
	if from != "" {
		usual = []string{from}
	}
	d.trees = usual
	for i, dir := range usual {
		if _, err := os.Lstat(dir); from == "" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		list, warnings, err := hosts.Read(dir, (*outside)(d))
		if e := (*hosts.Error)(nil); errors.As(err, &e) {
			return &Error{File: e.File, Line: e.Line, Text: e.Text}
		}
		if err != nil {
			return err
		}
		for _, w := range warnings {
			c.Warnings = append(c.Warnings, policy.Warning{Field: field, Text: w.Error()})
		}
		for _, other := range usual[i+1:] {
			if _, err := os.Lstat(other); err == nil {
				c.Warnings = append(c.Warnings, policy.Warning{Field: field, Text: dir + " is read and " + other + " is not: name the one that containerd uses"})
			}
		}
		c.Hosts = dir
		found := map[string]hosts.Registry{}
		c.certs = &certs{found}
		for _, r := range list {
			// In the epoch too, since an empty directory also says something.
			d.read = append(d.read, content{name: r.Dir})
			host := "*"
			if r.Host != "" {
				if host, err = policy.ParseHost(r.Host); err != nil {
					c.Warnings = append(c.Warnings, policy.Warning{Field: field, Text: r.Dir + " is not used: it is not called as a host"})
					continue
				}
			}
			// A name that is not canonical counts where the canonical one is not there.
			if _, twice := found[host]; twice && r.Host != host {
				c.Warnings = append(c.Warnings, policy.Warning{Field: field, Text: r.Dir + " is not used: there is another directory for " + host})
				continue
			}
			found[host] = r
			for _, m := range r.Mirrors {
				if m.Insecure() {
					c.Warnings = append(c.Warnings, policy.Warning{Field: field, Text: fmt.Sprintf("%s:%d: anybody on the way to %s can hide signatures (not make them), and read what it is told", m.File, m.Line, m.URL.Host)})
				}
			}
		}
		return nil
	}
	return nil
}

// outside reads files that are not in the configuration directory, and remembers
// them.
type outside directory

// List implements [hosts.Files].
func (o *outside) List(dir string) ([]string, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, text, err := names(f)
	switch {
	case text == notDirectory:
		return nil, hosts.ErrNotDirectory
	case text != "":
		return nil, errors.New(text)
	}
	return names, err
}

// Read implements [hosts.Files].
func (o *outside) Read(name string, limit int64) ([]byte, error) {
	raw, err := (*directory)(o).named(name, limit)
	if e := (*Error)(nil); errors.As(err, &e) {
		return raw, errors.New(e.Text)
	}
	return raw, err
}

// hostSources are what containerd's files make of sources for images of a host. The
// maps of mirrors are made once, so that they share clients and connections.
type hostSources struct {
	network    Network
	registries map[string]served
	itself     func(host string) mirror.Mirror // the host, of which no file says anything
}

type served struct {
	mirrors []hostMirror
	origin  *hostMirror // nil: never asked
}

type hostMirror struct {
	mirror.Mirror // without Host and NS
	proxy         func(host string) bool
	plain         bool // nothing is written of how to connect to it
}

// again reports whether m is o once more: the same registry, asked for the same, and m
// has nothing of its own to be let in by. A hosts.toml names the host itself as its server
// and as a host, too.
func (m *hostMirror) again(o *hostMirror) bool {
	return m.plain && *m.URL == *o.URL && cmp.Or(m.Root, "/v2") == cmp.Or(o.Root, "/v2") && slices.EqualFunc(m.Rewrite, o.Rewrite, func(a, b mirror.Rewrite) bool {
		return a.From.String() == b.From.String() && a.To == b.To
	})
}

// hostSources makes clients for what was read; finish adds what all mirrors share.
func (c *Config) hostSources(finish func(mirror.Mirror) mirror.Mirror) hostSources {
	h := hostSources{network: c.Network, registries: map[string]served{}}
	const at = "sources"
	anywhere := mirror.NewElsewhere(c.redirects(at), c.Redirects, nil)
	convert := func(m hosts.Mirror) hostMirror {
		to := mirror.Mirror{URL: m.URL, Root: m.Root, Header: http.Header(m.Header), Elsewhere: anywhere}
		// Its CAs, which are besides the system's, but not that it is not checked at all.
		if m.TLS != nil && m.TLS.RootCAs != nil {
			to.Elsewhere = mirror.NewElsewhere(c.redirects(at), c.Redirects, m.TLS.RootCAs)
		}
		for _, r := range m.Rewrite {
			to.Rewrite = append(to.Rewrite, mirror.Rewrite(r))
		}
		if m.TLS != nil {
			to.Client = &http.Client{Transport: mirror.Transport(m.TLS), Timeout: requestTimeout}
		}
		return hostMirror{finish(to), m.Proxy, m.TLS == nil && len(m.Header) == 0}
	}
	var found map[string]hosts.Registry
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
	h.itself = func(host string) mirror.Mirror {
		return finish(mirror.Mirror{URL: origin(host), Client: anybody, Elsewhere: anywhere})
	}
	return h
}

// of returns the mirrors of an image's host after those of config.yaml, in the order
// to ask.
func (h hostSources) of(host string, listed []mirror.Mirror) []mirror.Mirror {
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
	t := mirror.Transport(config)
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

// network reads sources.network and sources.hosts, and what contradicts them. hosts
// is the directory to read, or empty for the usual ones, or "none".
func (r *reader) network(f map[string]*yaml.Node, c *Config) (dir string) {
	const at, hostsAt = "sources.network", "sources.hosts"
	if n := f["network"]; n != nil {
		s := r.text(n, at)
		if c.Network = networks[s]; c.Network == NetworkDefault {
			r.fail(n, at, "%s is not never, mirrors or origin", verify.Quote(s, 64))
		}
	}
	if n := f["hosts"]; n != nil {
		switch s := r.text(n, hostsAt); {
		case s == "auto":
		case s == none:
			dir = none
		case !strings.HasPrefix(s, "/") || printable(s) != nil:
			r.fail(n, hostsAt, "must be auto, none or the absolute path of a certs.d directory")
		default:
			dir = filepath.Clean(s)
		}
	}
	if c.Network == NetworkNever {
		for _, key := range []string{"mirrors", "credentials", "redirects"} {
			if n := f[key]; n != nil {
				r.fail(n, "sources."+key, "has no use with network: never")
			}
		}
		if n := f["hosts"]; n != nil && dir != none {
			r.fail(n, hostsAt, "has no use with network: never")
		}
	}
	return dir
}

// none is the value of sources.hosts that reads nothing.
const none = "none"

// rewrites reads the rewrites of a mirror, in the order of the file.
func (r *reader) rewrites(n *yaml.Node, at string) (list []mirror.Rewrite) {
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
			r.fail(n.Content[i], at, "%s is no regular expression, or too long", verify.Quote(from, 80))
			return nil
		}
		if seen[from] {
			r.fail(n.Content[i], at, "%s is given twice", verify.Quote(from, 80))
		}
		seen[from] = true
		list = append(list, mirror.Rewrite{From: e, To: to})
	}
	return list
}

// redirects reads hosts that blobs may come from.
func (r *reader) redirects(n *yaml.Node, path string) (list []mirror.Pattern) {
	for i, v := range r.sequence(n, path, maxRedirects) {
		at := index(path, i)
		p, err := mirror.ParsePattern(r.text(v, at))
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
