package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Limits of config.yaml besides its length.
const (
	maxMirrors    = 100
	maxLayouts    = 20
	maxAllowlists = 32   // files
	maxRewrites   = 64   // of one mirror
	maxRewrite    = 1024 // bytes of one side of one
	maxRedirects  = 64   // patterns of one mirror
	maxAliases    = 100
	maxNames      = 50  // snapshotters, and runtimes
	maxName       = 128 // bytes of one; not in the expressions, where each repetition would be compiled
	maxWait       = time.Second
	maxKeep       = 10 * 366 * 24 * time.Hour
	minRefresh    = 10 * time.Minute
	maxRefresh    = 366 * 24 * time.Hour

	// A signature with its chain and timestamp has up to so much, and a list that
	// names it, or an index of some platforms.
	minEnvelope = 16 << 10
	minManifest = 16 << 10
)

var (
	snapshotterName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)
	runtimeType     = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)
	mirrorPath      = regexp.MustCompile(`^(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?$`)
	yamlError       = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)
)

// decode reads config.yaml into c. It keeps to a small part of YAML, so that a
// file means one thing: one document, no anchors, aliases or merge keys, no key
// twice, no null, and each value of exactly its type. It returns what sources.certsDir
// names.
func decode(d *directory, raw []byte, c *Config) (hosts []string, err error) {
	r := &reader{dir: d, file: d.path("config.yaml")}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, &Error{File: r.file, Text: "is empty"}
	case err != nil:
		return nil, r.syntax(err)
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		return nil, &Error{File: r.file, Line: more.Line, Text: "has more than one document"}
	case !errors.Is(err, io.EOF):
		return nil, r.syntax(err)
	}
	r.plain(&doc)
	if r.err == nil {
		hosts = r.config(doc.Content[0], c)
	}
	return hosts, r.err
}

// reader walks the nodes of config.yaml. It keeps the first error.
type reader struct {
	dir  *directory
	file string
	err  error
}

// config returns what sources.certsDir names.
func (r *reader) config(n *yaml.Node, c *Config) (hosts []string) {
	top := r.mapping(n, "", "version", "mode", "sources", "limits", "gate", "allowDigests", "metrics", "runningContainers", "aliases")
	if v, there := top["version"]; !there {
		r.fail(n, "version", "is required: version: 1")
	} else if r.integer(v, "version", 0, 1<<31) != 1 {
		r.fail(v, "version", "must be 1")
	}
	if v, there := top["mode"]; !there {
		r.fail(n, "mode", "is required: enforce or audit")
	} else {
		switch s := r.text(v, "mode"); s {
		case verify.Enforce.String():
			c.Mode = verify.Enforce
		case verify.Audit.String():
			c.Mode = verify.Audit
		default:
			r.fail(v, "mode", "%s is not enforce or audit", text.Quote(s, 64))
		}
	}
	if v, there := top["sources"]; there {
		hosts = r.sources(v, c)
	}
	if v, there := top["limits"]; there {
		c.Limits = r.limits(v)
	}
	if v, there := top["gate"]; there {
		r.gate(v, &c.Gate)
	}
	r.allowDigests(top["allowDigests"], c)
	r.aliases(top["aliases"], c)
	if v, there := top["runningContainers"]; there {
		switch s := r.text(v, "runningContainers"); s {
		case "report":
		case "stop":
			c.StopRunning = true
			why := "only what is REVOKED is stopped, and revocation lists are not read yet: nothing is stopped today"
			if c.Mode == verify.Audit {
				why = "nothing is stopped in mode audit"
			}
			c.Warnings = append(c.Warnings, policy.Warning{Field: "runningContainers", Text: why})
		default:
			r.fail(v, "runningContainers", "%s is not report or stop", text.Quote(s, 64))
		}
	}
	if v, there := top["metrics"]; there {
		r.metrics(v, c)
	}
	return hosts
}

// allowDigests reads the files of digests that need no signature.
func (r *reader) allowDigests(n *yaml.Node, c *Config) {
	for i, v := range r.sequence(n, "allowDigests", maxAllowlists) {
		at := index("allowDigests", i)
		name, raw := r.named(v, at)
		if r.err != nil {
			return
		}
		list, err := policy.ParseAllowlist(name, raw)
		if e := (*policy.Error)(nil); errors.As(err, &e) {
			r.err = &Error{File: absolute(r.dir.dir, name), Line: e.Line, Text: e.Text}
			return
		}
		c.AllowDigests = append(c.AllowDigests, list...)
	}
}

// sources returns the directories of containerd's that it names, see network.
func (r *reader) sources(n *yaml.Node, c *Config) (hosts []string) {
	f := r.mapping(n, "sources", "network", "certsDir", "acceptPlainHTTP", "mirrors", "layouts", "blobHosts", "credentials", "helpers", "retention", "refreshInterval")
	hosts = r.network(f, c)
	c.Redirects = r.redirects(f["blobHosts"], "sources.blobHosts")
	c.Keep = r.duration(f["retention"], "sources.retention", time.Hour, maxKeep)
	r.refresh(f["refreshInterval"], c)
	for i, v := range r.sequence(f["mirrors"], "sources.mirrors", maxMirrors) {
		path := index("sources.mirrors", i)
		m := r.mirror(v, path)
		if m.URL == nil {
			return nil
		}
		for _, o := range c.Mirrors {
			if o.Host == m.Host && o.URL.String() == m.URL.String() {
				r.fail(v, path, "host %s is listed with this URL before", m.Host)
			}
		}
		if before, found := strings.CutSuffix(m.URL.Path, "/v2"); found {
			c.Warnings = append(c.Warnings, policy.Warning{Field: path + ".url", Text: fmt.Sprintf("is asked for %s/REPOSITORY: one whose API itself is at %s/v2/ can be named only in a hosts.toml, with override_path", "/v2"+m.URL.Path, before)})
		}
		if m.URL.Scheme == "http" && !c.acceptPlain(m.URL) {
			c.Warnings = append(c.Warnings, policy.Warning{Field: path + ".url", Text: "over http anybody on the way can hide signatures (not make them)"})
		}
		c.Mirrors = append(c.Mirrors, m)
	}
	for i, v := range r.sequence(f["layouts"], "sources.layouts", maxLayouts) {
		path := index("sources.layouts", i)
		s := r.text(v, path)
		if !strings.HasPrefix(s, "/") || printable(s) != nil {
			r.fail(v, path, "must be the absolute path of a directory or tar file")
		}
		s = absolute("/", s)
		if slices.Contains(c.Layouts, s) {
			r.fail(v, path, "is listed twice")
		}
		c.Layouts = append(c.Layouts, s)
	}
	r.credentials(f, c)
	for i, m := range c.Mirrors {
		if m.URL.Scheme == "http" && c.credentials.of(m.URL, true) != nil {
			c.Warnings = append(c.Warnings, policy.Warning{Field: index("sources.mirrors", i) + ".url", Text: "over http anybody on the way can read the credentials"})
		}
	}
	return hosts
}

// refresh reads how often signatures are looked for again.
func (r *reader) refresh(n *yaml.Node, c *Config) {
	const at = "sources.refreshInterval"
	if n == nil {
		return
	}
	if t, err := time.ParseDuration(n.Value); err == nil && t == 0 {
		r.fail(n, at, "must be never, if signatures are not to be looked for again")
		return
	}
	const form = "must be never, or a duration with its unit, for example 24h"
	if n.Kind != yaml.ScalarNode {
		r.fail(n, at, form)
		return
	}
	t, err := time.ParseDuration(n.Value)
	switch {
	case n.Value == "never":
	case err != nil:
		r.fail(n, at, form)
	case t < minRefresh || t > maxRefresh:
		r.fail(n, at, "must be never, or from %v to %v: each image of the node is asked about as often", minRefresh, maxRefresh)
	}
	c.Refresh = t
}

// credentials reads the file with what the registries know this node by.
func (r *reader) credentials(f map[string]*yaml.Node, c *Config) {
	const at, helpersAt = "sources.credentials", "sources.helpers"
	if n := f["helpers"]; n != nil {
		if c.Helpers = r.text(n, helpersAt); !strings.HasPrefix(c.Helpers, "/") || printable(c.Helpers) != nil {
			r.fail(n, helpersAt, "must be the absolute path of a directory")
		}
		if f["credentials"] == nil {
			r.fail(n, helpersAt, "has no use without sources.credentials, which names the helpers")
		}
	}
	n := f["credentials"]
	if n == nil || r.err != nil {
		return
	}
	name, raw := r.named(n, at)
	if r.err != nil {
		return
	}
	var warnings []string
	var err error
	if c.credentials, warnings, err = parseCredentials(raw, c.Helpers); err != nil {
		r.fail(n, at, "%s: %v", text.Quote(name, 256), err)
	}
	for _, w := range warnings {
		c.Warnings = append(c.Warnings, policy.Warning{Field: at, Text: w})
	}
	c.Credentials = absolute(r.dir.dir, name)
}

// named reads the file that n names.
func (r *reader) named(n *yaml.Node, at string) (name string, raw []byte) {
	name = r.text(n, at)
	if name == "" || printable(name) != nil {
		r.fail(n, at, "must be a file")
	}
	if r.err != nil {
		return name, nil
	}
	raw, err := r.dir.named(name, maxFile)
	if err != nil {
		r.fail(n, at, "%s: %v", text.Quote(name, 256), err)
	}
	return name, raw
}

func (r *reader) mirror(n *yaml.Node, path string) (m Mirror) {
	f := r.mapping(n, path, "host", "url", "ca", "cert", "key", "realm", "ns", "rewrite", "blobHosts")
	for _, must := range []string{"host", "url"} {
		if f[must] == nil {
			r.fail(n, path+"."+must, "is required")
		}
	}
	if r.err != nil {
		return m
	}
	var err error
	if m.Host = r.text(f["host"], path+".host"); m.Host != "*" {
		if m.Host, err = policy.ParseHost(m.Host); err != nil {
			r.fail(f["host"], path+".host", "%v", err)
		}
	}
	if m.URL, err = ParseURL(r.text(f["url"], path+".url")); err != nil {
		r.fail(f["url"], path+".url", "%v", err)
	}
	if r.err != nil {
		return m
	}
	for _, key := range []string{"ca", "cert", "key", "blobHosts"} {
		if f[key] != nil && m.URL.Scheme != "https" {
			r.fail(f[key], path+"."+key, "has no use without https")
		}
	}
	if n := f["ca"]; n != nil {
		name, raw := r.named(n, path+".ca")
		if r.err == nil {
			if m.roots, err = pool(raw, x509.NewCertPool()); err != nil {
				r.fail(n, path+".ca", "%s: %v", text.Quote(name, 256), err)
			} else { // also without redirects of its own: the command line may add some
				m.away, _ = pool(raw, systemPool())
			}
		}
		m.CA = absolute(r.dir.dir, name)
	}
	r.clientCertificate(f, path, &m)
	if n := f["realm"]; n != nil {
		m.Realm = r.realm(n, path+".realm", m.URL)
	}
	if n := f["ns"]; n != nil {
		m.NS = r.boolean(n, path+".ns")
	}
	m.Rewrite = r.rewrites(f["rewrite"], path+".rewrite")
	m.Redirects = r.redirects(f["blobHosts"], path+".blobHosts")
	return m
}

// clientCertificate reads what the mirror knows this node by in TLS.
func (r *reader) clientCertificate(f map[string]*yaml.Node, path string, m *Mirror) {
	cert, key := f["cert"], f["key"]
	switch {
	case cert == nil && key == nil:
		return
	case key == nil:
		r.fail(cert, path+".cert", "has no use without key")
	case cert == nil:
		r.fail(key, path+".key", "has no use without cert")
	}
	if r.err != nil {
		return
	}
	certName, certRaw := r.named(cert, path+".cert")
	keyName, keyRaw := r.named(key, path+".key")
	if r.err != nil {
		return
	}
	pair, err := tls.X509KeyPair(certRaw, keyRaw)
	if err != nil {
		// What the errors of these parsers say of a key is not worth the risk.
		r.fail(cert, path+".cert", "%s and %s are not a certificate and its key in PEM", text.Quote(certName, 256), text.Quote(keyName, 256))
	}
	m.Cert, m.Key, m.pair = absolute(r.dir.dir, certName), absolute(r.dir.dir, keyName), &pair
}

// realm reads scheme, host and port of a token server.
func (r *reader) realm(n *yaml.Node, at string, mirror *url.URL) *url.URL {
	u, err := ParseURL(r.text(n, at))
	switch {
	case err != nil:
		r.fail(n, at, "%v", err)
	case u.Path != "":
		r.fail(n, at, "must be scheme, host and port alone: the mirror names the path")
	case u.Scheme == "http" && mirror.Scheme != "http":
		r.fail(n, at, "must start with https://, as the mirror's URL does")
	}
	return u
}

// ParseURL reads the URL of a registry: http or https, without user, query and
// fragment, and without the slash at the end. Errors do not repeat it, since it
// may hold a password, and read on from the name of a field.
func ParseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil || len(s) > 1024 || printable(s) != nil || u.Opaque != "":
		return nil, errors.New("is not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("must start with http:// or https://")
	case u.User != nil:
		return nil, errors.New("must not hold a user or password")
	case strings.ContainsAny(s, "?#"):
		return nil, errors.New("must not have a query or fragment")
	case !mirrorPath.MatchString(u.Path) || u.RawPath != "":
		return nil, errors.New("has a path that no repository can be below")
	}
	if _, err := policy.ParseHost(u.Host); err != nil {
		return nil, err
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	if rest, found := strings.CutPrefix(u.Path, "/v2"); found && (rest == "" || rest[0] == '/') {
		return nil, errors.New("has /v2 in front of its path, which is added to each request: write " + u.Scheme + "://" + u.Host + rest)
	}
	return u, nil
}

// systemPool is a copy of the system's CAs, or empty where it has none.
func systemPool() *x509.CertPool {
	if roots, err := x509.SystemCertPool(); err == nil {
		return roots
	}
	return x509.NewCertPool()
}

// pool adds CA certificates in PEM to roots. Text between the blocks is allowed.
func pool(raw []byte, roots *x509.CertPool) (*x509.CertPool, error) {
	certs, err := notary.ParsePEM(raw)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		roots.AddCert(c)
	}
	return roots, nil
}

func (r *reader) limits(n *yaml.Node) (l verify.Limits) {
	f := r.mapping(n, "limits", "pages", "referrers", "signatures", "certificates",
		"manifestBytes", "envelopeBytes", "totalBytes", "timeout")
	count := func(key string, hi int64) int {
		return int(r.integer(f[key], "limits."+key, 1, hi))
	}
	size := func(key string, lo, hi int64) int64 {
		return r.integer(f[key], "limits."+key, lo, hi)
	}
	l.Pages = count("pages", 100)
	l.Referrers = count("referrers", 10_000)
	l.Signatures = count("signatures", 1000)
	l.Certificates = count("certificates", 50)
	l.ManifestBytes = size("manifestBytes", minManifest, 16<<20)
	l.EnvelopeBytes = size("envelopeBytes", minEnvelope, 4<<20)
	l.TotalBytes = size("totalBytes", minManifest+minEnvelope, 256<<20)
	l.Wall = r.duration(f["timeout"], "limits.timeout", 100*time.Millisecond, requestTimeout)
	// One that another makes pointless was meant otherwise. What is not written gives way.
	all := l.Or(verify.DefaultLimits)
	if n := f["signatures"]; n != nil && all.Signatures > all.Referrers {
		r.fail(n, "limits.signatures", "is %d, and no more than %d referrers are listed (limits.referrers)", all.Signatures, all.Referrers)
	}
	fits := func(key string, size int64) {
		if n := f[key]; n != nil && size > all.TotalBytes {
			r.fail(n, "limits."+key, "is %d, and no more than %d are read of everything (limits.totalBytes)", size, all.TotalBytes)
		}
	}
	fits("manifestBytes", l.ManifestBytes)
	fits("envelopeBytes", l.EnvelopeBytes)
	return l
}

func (r *reader) gate(n *yaml.Node, g *Gate) {
	f := r.mapping(n, "gate", "wait", "snapshotters", "runtimes")
	if v, there := f["wait"]; there {
		g.Wait = r.duration(v, "gate.wait", 0, maxWait)
	}
	g.Snapshotters = r.names(f["snapshotters"], "gate.snapshotters", snapshotterName, "a snapshotter, for example stargz")
	g.Runtimes = r.names(f["runtimes"], "gate.runtimes", runtimeType, "a runtime type, for example io.containerd.kata.v2")
}

// metrics reads where metrics go. Whether that works is not looked at: it must not
// keep a policy from being in force.
func (r *reader) metrics(n *yaml.Node, c *Config) {
	const listenAt, fileAt = "metrics.listen", "metrics.file"
	f := r.mapping(n, "metrics", "listen", "file")
	if v, there := f["listen"]; there {
		s := r.text(v, listenAt)
		a, err := netip.ParseAddrPort(s)
		if err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
			r.fail(v, listenAt, "must be an IP address and a port, for example 127.0.0.1:9464")
		} else if !a.Addr().IsLoopback() {
			c.Warnings = append(c.Warnings, policy.Warning{Field: listenAt, Text: "whoever reaches " + s + " can read the metrics: there is no password"})
		}
		c.Metrics.Listen = s
	}
	if v, there := f["file"]; there {
		s := r.text(v, fileAt)
		switch {
		case !strings.HasPrefix(s, "/") || !strings.HasSuffix(s, ".prom") || printable(s) != nil:
			r.fail(v, fileAt, "must be the absolute path of a file whose name ends in .prom: node_exporter reads no other")
		case strings.HasPrefix(absolute("/", s), r.dir.dir+"/"):
			r.fail(v, fileAt, "must not lie in the configuration directory, which is read again when something in it changes")
		}
		c.Metrics.File = absolute("/", s)
	}
}
