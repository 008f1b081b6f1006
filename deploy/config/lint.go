package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// lint returns what cannot work in a configuration that is valid, or not as its author
// means it: what no one file shows by itself. Certificates are judged at now.
func (c *Config) lint(d *directory, now time.Time) []policy.Warning {
	all := policy.Lint(c.Statements, c.Mode)
	all = append(all, policy.LintAliases(c.Statements, c.Aliases)...)
	for i, s := range c.Statements {
		for j, name := range s.TrustStores {
			if !c.store.Holds(name) {
				all = append(all, policy.Warning{Statement: s.Name, Field: trustStore(i, j),
					Text: fmt.Sprintf("%q does not exist or holds no certificate: no trust store of its type counts", name)})
			}
		}
	}
	for _, doubt := range notary.Lint(c.Statements, c.store, policy.Identifies, now) {
		all = append(all, policy.Warning{Statement: c.Statements[doubt.Statement].Name, Field: trustStore(doubt.Statement, doubt.Store), Text: doubt.Text})
	}
	all = append(all, c.lintHosts()...)
	for i, host := range c.AcceptPlainHTTP {
		if !c.plain[host] {
			all = append(all, policy.Warning{Field: index("sources.acceptPlainHTTP", i),
				Text: "nothing at " + host + " is asked over http: it has no use, or the name or port is another"})
		}
	}
	for _, text := range c.unsent() {
		all = append(all, policy.Warning{Field: "sources.credentials", Text: text})
	}
	if c.Limits.Certificates == 1 && c.issues() {
		all = append(all, policy.Warning{Field: "limits.certificates", Text: "a CA and what it issued are two: only self-signed signing certificates count"})
	}
	return append(all, c.strangers(d)...)
}

// trustStore is the field of trust store j of statement i, or of all for -1.
func trustStore(i, j int) string {
	field := index("trustPolicies", i) + ".trustStores"
	if j >= 0 {
		field = index(field, j)
	}
	return field
}

// issues reports whether the trust store holds a CA.
func (c *Config) issues() bool {
	for _, cert := range c.store.All {
		if cert.IsCA {
			return true
		}
	}
	return false
}

// scopes are the hosts of exact scopes; any says that some statement speaks of all.
func (c *Config) scopes() (hosts map[string]bool, any bool) {
	hosts = map[string]bool{}
	for _, s := range c.Statements {
		for _, scope := range s.Scopes {
			switch canonical, err := policy.ParseScope(scope); {
			case err != nil:
			case canonical == "*":
				any = true
			default:
				host, _, _ := strings.Cut(canonical, "/")
				hosts[host] = true
			}
		}
	}
	return hosts, any
}

// lintHosts finds mirrors of hosts that no statement names, and the other way round.
func (c *Config) lintHosts() (all []policy.Warning) {
	scopes, any := c.scopes()
	mirrored := map[string]bool{}
	for i, m := range c.Mirrors {
		mirrored[m.Host] = true
		if m.Host != "*" && !any && !scopes[m.Host] {
			all = append(all, policy.Warning{Field: index("sources.mirrors", i) + ".host",
				Text: "no statement names an image of " + m.Host + ": this mirror is never asked"})
		}
	}
	if c.certs != nil {
		for host, r := range c.certs.of {
			if len(r.Mirrors) > 0 {
				mirrored[host] = true
			}
		}
	}
	if len(mirrored) == 0 || c.Network != NetworkMirrors || mirrored["*"] || len(c.Layouts) > 0 {
		return all // without any mirror that is said once, see unmirrored
	}
	for _, host := range slices.Sorted(maps.Keys(scopes)) {
		if !mirrored[host] {
			all = append(all, policy.Warning{Field: "sources.network",
				Text: "mirrors, and there is none for " + host + ", which a statement names: only what evidence archives and the node's store have counts"})
		}
	}
	return all
}

// unsent names entries of the credentials that no registry is ever sent.
func (c *Config) unsent() (all []string) {
	if c.credentials == nil {
		return nil
	}
	var urls []*url.URL
	for _, m := range c.Mirrors {
		urls = append(urls, m.URL)
	}
	mirrored := map[string]bool{} // hosts that are not asked themselves
	for _, m := range c.Mirrors {
		mirrored[m.Host] = true
	}
	if c.certs != nil {
		for host, r := range c.certs.of {
			for _, m := range r.Mirrors {
				urls, mirrored[host] = append(urls, m.URL), true
			}
			if r.Origin != nil && r.Origin.URL != nil {
				urls = append(urls, r.Origin.URL)
			}
		}
	}
	scopes, any := c.scopes()
	itself := func(host string) bool { // whether the host is asked, as its own mirror
		return (any || scopes[host]) && (c.Network == NetworkOrigin || c.Network == NetworkDefault && !mirrored[host] && !mirrored["*"])
	}
	sent := func(e endpoint) bool { return reaches(urls, e) || e.scheme != "http" && itself(e.host) }
	// The nearest thing that is asked: the same host at another port or scheme.
	near := func(e endpoint) *url.URL {
		name := (&url.URL{Host: e.host}).Hostname()
		for _, u := range urls {
			if strings.EqualFold(u.Hostname(), name) {
				return u
			}
		}
		return nil
	}
	for _, section := range []struct {
		name    string
		entries map[endpoint]login
	}{{"auths", c.credentials.logins}, {"credHelpers", c.credentials.helper}} {
		list := slices.SortedFunc(maps.Keys(section.entries), func(a, b endpoint) int { return cmp.Or(cmp.Compare(a.host, b.host), cmp.Compare(a.scheme, b.scheme)) })
		for _, e := range list {
			key := printKey(section.entries[e].key)
			switch u := near(e); {
			case sent(e):
			case u != nil:
				all = append(all, fmt.Sprintf("%s: %s is not for %s://%s, where the mirror is: an entry is for its own port, which is 443 if it names none, and scheme", section.name, key, u.Scheme, u.Host))
			default:
				all = append(all, fmt.Sprintf("%s: %s is sent nowhere: nothing at that host and port is asked for signatures", section.name, key))
			}
		}
	}
	const most = 10
	if len(all) > most {
		all = append(all[:most:most], fmt.Sprintf("and %d more entries are not used", len(all)-most))
	}
	return all
}

// reaches reports whether e is for one of urls.
func reaches(urls []*url.URL, e endpoint) bool {
	return slices.ContainsFunc(urls, func(u *url.URL) bool {
		host, err := endpointHost(u.Scheme, u.Host)
		return err == nil && host == e.host && (e.scheme == "" || e.scheme == u.Scheme)
	})
}

// ours are the names that mean something in a configuration directory, and those that
// notation keeps beside its trust policy.
var ours = []string{"config.yaml", "trustpolicy.json", "trustpolicy.oci.json", "truststore", "config.json", "signingkeys.json", "localkeys", "plugins"}

// strangers are files of the directory that nothing reads: a name that is misspelt
// looks as if it counted. Hidden files are passed over.
func (c *Config) strangers(d *directory) (all []policy.Warning) {
	names, err := d.list(".")
	if err != nil {
		return nil
	}
	read := map[string]bool{}
	for _, r := range d.read {
		name := r.name
		if rel, err := filepath.Rel(d.dir, name); filepath.IsAbs(name) && err == nil {
			name = rel
		}
		first, _, _ := strings.Cut(filepath.Clean(name), "/")
		read[first] = true
	}
	const most = 10
	for _, n := range names {
		if strings.HasPrefix(n, ".") || read[n] || slices.Contains(ours, n) {
			continue
		}
		problem := "nothing reads it: files here are config.yaml, trustpolicy.json, truststore/, and those that config.yaml names"
		if n == "crl" {
			problem = "nothing reads it: revocation lists have no effect yet"
		}
		if len(all) == most {
			return append(all, policy.Warning{Field: d.dir, Text: "there are more files that nothing reads"})
		}
		all = append(all, policy.Warning{Field: text.Clean(d.path(n), 256), Text: problem})
	}
	return all
}
