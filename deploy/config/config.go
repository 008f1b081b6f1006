// Package config reads the configuration directory of a node, says what is wrong
// with it by file, line and field, builds what runs from it, and watches it.
//
// Every file is read once, with a bound, and what is parsed is exactly what the
// Revision is the digest of. docs/configuration.md describes the files.
package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
)

// DefaultWait is Gate.Wait where config.yaml is silent. The defaults of limits are
// verify.DefaultLimits.
const DefaultWait = 50 * time.Millisecond

// DefaultRefresh is Config.Refresh where config.yaml is silent.
const DefaultRefresh = 24 * time.Hour

// A Config is a valid configuration. It does not change.
type Config struct {
	Dir         string // that it was read from
	Mode        verify.Mode
	Mirrors     []Mirror
	Layouts     []string           // directories and tar files, absolute
	Keep        time.Duration      // how long the node's store keeps signatures after their image left; 0: store.DefaultKeep
	Refresh     time.Duration      // how often signatures of the node's images are looked for again; 0: only on demand
	Limits      verify.Limits      // zero fields mean verify.DefaultLimits
	Credentials string             // docker config.json with what registries know this node by; empty: none
	Helpers     string             // directory of credential helpers; empty: PATH
	Network     Network            // whom else to ask
	Redirects   []registry.Pattern // where blobs of mirrors from Hosts and of the hosts themselves may come from besides
	Hosts       string             // directories of containerd's hosts.toml that were read, with colons between them; empty: none
	HostsAuto   bool               // they were found, and not named
	// AcceptPlainHTTP are the hosts of registries that may be asked over http without a
	// warning. They allow nothing that would not be done without them.
	AcceptPlainHTTP []string
	plain           map[string]bool // those that something asks over http
	Aliases         []policy.Alias
	Gate            Gate
	StopRunning     bool // stop what runs and is revoked or denied, instead of only reporting it; never in audit
	Metrics         Metrics
	Statements      []verify.Statement
	AllowDigests    []policy.Listed  // digests that run without a signature, in their namespaces
	Warnings        []policy.Warning // what the author may not mean
	Revision        verify.Revision  // digest of every file that was read

	store       *notary.Store
	credentials *credentials // nil: none
	certs       *certs       // of Hosts; nil: none
	trees       []string     // directories elsewhere of which all may be read, be they there or not
	outside     []string     // files that were read elsewhere than in Dir itself and the trust store
	given       bool         // layouts and mirrors are of the command line
}

// A Mirror is a registry that holds the signatures of images of another.
type Mirror struct {
	Host string   // canonical, as images are named; "*": every host without a mirror of its own
	URL  *url.URL // http or https, without user, query and fragment
	CA   string   // file of the only CAs that its certificate may come from; empty: those of the system

	Cert  string   // file of the certificate to show it; empty: none
	Key   string   // file of its key
	Realm *url.URL // where tokens may come from besides the URL's own scheme, host and port; may be nil
	NS    bool     // whether it is told in the query whose images it is asked for

	Rewrite   []registry.Rewrite // of the path asked for
	Redirects []registry.Pattern // where its blobs may come from besides

	roots *x509.CertPool   // of CA
	away  *x509.CertPool   // of CA and the system, for redirects; nil: of the system
	pair  *tls.Certificate // of Cert and Key
}

// Gate is how the gate behaves.
type Gate struct {
	Wait         time.Duration // longest wait of one answer for a verification under way
	Snapshotters []string      // trusted to apply layers as containerd does, besides the built-in list
	Runtimes     []string      // runtime types allowed besides the built-in list
}

// Metrics is where the gate's metrics are offered besides the control socket.
type Metrics struct {
	Listen string // IP address and port; empty: nowhere
	File   string // absolute path that ends in .prom; empty: none
}

// ErrNone is wrapped where a directory holds no configuration at all.
var ErrNone = errors.New("no configuration")

// An Error is what is wrong in one place of a file.
type Error struct {
	File  string
	Line  int    // from 1; 0 where it is about the whole file
	Field string // "sources.mirrors[0].url"; may be empty
	Text  string // one clause
}

// Error implements error: "file:line: field: text".
func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += ":" + strconv.Itoa(e.Line)
	}
	if e.Field != "" {
		s += ": " + e.Field
	}
	return s + ": " + e.Text
}

// Load reads the configuration in dir. What it returns, Snapshot accepts. Errors
// name the file, and line and field where there is one; they wrap ErrNone where
// dir does not exist or holds neither config.yaml nor a trust policy.
func Load(dir string) (*Config, error) {
	d, err := openDirectory(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNone, dir)
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return load(d)
}

func load(d *directory) (*Config, error) {
	own, err := d.optional("config.yaml", maxFile)
	if err != nil {
		return nil, err
	}
	if misnamed, _ := d.exists("config.yml"); misnamed && own == nil {
		// Without it the node would enforce, which its author may not want yet.
		return nil, &Error{File: d.path("config.yml"), Text: "the name of this file must be config.yaml"}
	}
	policyFile, policyRaw, err := d.trustPolicy()
	if err != nil {
		return nil, err
	}
	if policyRaw == nil {
		if own == nil {
			return nil, fmt.Errorf("%w: %s holds neither config.yaml nor trustpolicy.json", ErrNone, d.dir)
		}
		return nil, &Error{File: d.path("trustpolicy.json"), Text: "there must be a trust policy beside config.yaml"}
	}
	trust, err := d.trustStore()
	if err != nil {
		return nil, err
	}

	c := &Config{Dir: d.dir, Refresh: DefaultRefresh, Gate: Gate{Wait: DefaultWait}}
	var from []string // of sources.certsDir
	if own != nil {
		if from, err = decode(d, own, c); err != nil {
			return nil, err
		}
	}
	if !slices.Equal(from, none) && c.Network != NetworkNever {
		c.HostsAuto = from == nil
		if err := d.hosts(from, c); err != nil {
			return nil, err
		}
	}
	c.unmirrored()
	if c.Statements, err = policy.Parse(policyRaw); err != nil {
		bad := &Error{File: d.path(policyFile), Text: err.Error()}
		if e := (*policy.Error)(nil); errors.As(err, &e) {
			bad.Line, bad.Field, bad.Text = e.Line, e.Field, e.Text
		}
		return nil, bad
	}
	if c.store, err = notary.LoadStore(trust); err != nil {
		return nil, fmt.Errorf("%s: %w", d.path("truststore"), err)
	}
	c.Revision, c.outside, c.trees = d.revision(), d.outside, d.trees
	// Once here, so that what Load returns can run.
	if _, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator { return e }, time.Now); err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(policyFile), err)
	}
	c.Warnings = append(c.Warnings, c.lint(d, time.Now())...)
	return c, nil
}

// Snapshot builds what a Decider runs. build puts a cache in front of the engine;
// it is not called where there is an error. now is the clock that signatures are
// judged by.
func (c *Config) Snapshot(build func(*verify.Engine) verify.Evaluator, now func() time.Time) (*verify.Snapshot, error) {
	checker, err := notary.New(c.Statements, c.store, notary.Options{Limits: c.Limits, Now: now})
	if err != nil {
		return nil, err
	}
	rules, _, err := policy.New(c.Statements, c.Mode, checker.Require)
	if err != nil {
		return nil, err
	}
	var alias func(verify.Name) verify.Name
	if len(c.Aliases) > 0 {
		alias = func(n verify.Name) verify.Name { return policy.Unalias(c.Aliases, n) }
	}
	return &verify.Snapshot{
		Alias:     alias,
		Revision:  c.Revision,
		Mode:      c.Mode,
		Policy:    rules.WithAllowlist(c.AllowDigests),
		Evaluator: build(&verify.Engine{Sources: c.Sources(), Closed: c.Network == NetworkNever, Checkers: []verify.Checker{checker}, Limits: c.Limits, Now: now}),
		Wait:      c.Gate.Wait,
	}, nil
}

// Sources returns where signatures of an image may be, in the order to ask: every
// layout; the mirrors of its host in config.yaml, or else those of host "*"; the
// mirrors that containerd has for it; and the host itself, as Network says.
func (c *Config) Sources() func(verify.Name) []verify.Source {
	var layouts []verify.Source
	room := &layout.Room{Now: time.Now}
	for _, dir := range c.Layouts {
		layouts = append(layouts, room.New(dir))
	}
	registries := c.registries()
	return func(n verify.Name) []verify.Source {
		list := append([]verify.Source(nil), layouts...)
		for _, m := range registries(n) {
			list = append(list, registry.New(m))
		}
		return list
	}
}

// registries returns what Sources asks besides layouts.
func (c *Config) registries() func(verify.Name) []registry.Mirror {
	tokens := registry.NewTokens(time.Now) // they end after a while, not at a time
	breaker := registry.NewBreaker(time.Now, rand.Float64)
	finish := func(m registry.Mirror, named bool) registry.Mirror {
		m.Tokens, m.Breaker, m.Credentials = tokens, breaker, c.credentials.of(m.URL, named)
		return m
	}
	mirrors := map[string][]registry.Mirror{}
	for i, m := range c.Mirrors {
		e := finish(registry.Mirror{URL: m.URL, NS: m.NS, Realm: m.Realm, Rewrite: m.Rewrite}, true)
		e.RedirectPolicy = registry.NewRedirectPolicy(c.redirects(index("sources.mirrors", i)), m.Redirects, m.away)
		// The clients are shared by the sources of all hosts, with their connections.
		if m.roots != nil || m.pair != nil {
			e.Client = client(m.roots, m.pair)
		}
		if m.roots != nil && m.Realm != nil {
			e.RealmClient = client(m.roots, nil)
		}
		mirrors[m.Host] = append(mirrors[m.Host], e)
	}
	containerd := c.hostSources(finish)
	named := c.named()
	return func(n verify.Name) (list []registry.Mirror) {
		listed := mirrors[n.Host]
		if listed == nil {
			listed = mirrors["*"]
		}
		for _, m := range containerd.of(n.Host, listed) {
			m.Host, m.Named = n.Host, named[n.Host] // a mirror of all hosts asks as the image's host
			list = append(list, m)
		}
		return list
	}
}

// named are the hosts of images that this node's files name: in sources.mirrors, in an
// exact scope, and in a hosts.toml.
func (c *Config) named() map[string]bool {
	hosts, _ := c.scopes()
	for _, m := range c.Mirrors {
		hosts[m.Host] = true
	}
	if c.certs != nil {
		for host := range c.certs.of {
			hosts[host] = true
		}
	}
	delete(hosts, "*")
	return hosts
}

// Named returns what reports whether the configuration names the host of an image, in a
// scope of a statement, a mirror or a hosts.toml, and whether a scope names its
// repository. "*" names none. It returns nil if the configuration names no host.
func (c *Config) Named() func(verify.Name) (host, repository bool) {
	hosts, repositories := map[string]bool{}, map[string]bool{}
	for _, s := range c.Statements {
		for _, scope := range s.Scopes {
			// Load has parsed it; one that is not canonical names the same.
			if canonical, err := policy.ParseScope(scope); err == nil && canonical != "*" {
				host, _, _ := strings.Cut(canonical, "/")
				hosts[host], repositories[canonical] = true, true
			}
		}
	}
	for _, m := range c.Mirrors {
		hosts[m.Host] = true
	}
	if c.certs != nil {
		for host := range c.certs.of {
			hosts[host] = true
		}
	}
	if delete(hosts, "*"); len(hosts) == 0 {
		return nil
	}
	return func(n verify.Name) (host, repository bool) { return hosts[n.Host], repositories[n.Repository()] }
}

// Only makes these the only layouts and mirrors, and nobody else a source.
func (c *Config) Only(layouts []string, mirrors []Mirror) {
	c.Network, c.Layouts, c.Mirrors, c.certs, c.given = NetworkMirrors, layouts, mirrors, nil, true
}

// Redirect lets blobs of all registries come from these hosts too.
func (c *Config) Redirect(list []registry.Pattern) {
	c.Redirects = append(c.Redirects, list...)
	for i := range c.Mirrors {
		m := &c.Mirrors[i]
		m.Redirects = append(m.Redirects, list...)
	}
}

// redirects is where a person adds to the redirects at a field of config.yaml: the
// command line, where there is none or its mirrors do not count.
func (c *Config) redirects(at string) string {
	if c.Dir == "" || c.given {
		return "--redirect"
	}
	return at + ".blobHosts"
}

// client is one that trusts these CAs alone, if there are any, and shows pair, if
// there is one.
func client(roots *x509.CertPool, pair *tls.Certificate) *http.Client {
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	return &http.Client{Transport: registry.Transport(config), Timeout: requestTimeout}
}

// requestTimeout ends one request, and is the largest limits.timeout: a larger one would
// have no effect. dialTimeout is how long a connection to a host that is its own mirror
// may take.
const (
	requestTimeout = time.Minute
	dialTimeout    = 5 * time.Second
)

// origin is where a registry itself is.
func origin(host string) *url.URL {
	if host == "docker.io" {
		host = "registry-1.docker.io"
	}
	return &url.URL{Scheme: "https", Host: host}
}

// absolute is p, which a file in dir names.
func absolute(dir, p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(dir, p)
}
