package config

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Summary is what a configuration says, for people and scripts. It holds no secret:
// no credentials, no header, no key.
type Summary struct {
	Schema       string         `json:"schema"`
	Dir          string         `json:"dir"`
	Revision     string         `json:"revision"`
	Mode         string         `json:"mode"`
	Statements   []Statement    `json:"statements"`
	Stores       []Anchor       `json:"trustStores"` // every certificate of every store
	Layouts      []string       `json:"layouts"`
	Mirrors      []Listed       `json:"mirrors"` // those of config.yaml and of hosts.toml, in the order of hosts
	Network      string         `json:"network"`
	Redirects    []string       `json:"blobHosts"` // where blobs may come from besides registries that config.yaml does not list
	Hosts        string         `json:"certsDir"`  // directories of hosts.toml that were read, with colons between them; empty: none
	Aliases      []string       `json:"aliases"`
	AllowDigests []AllowDigests `json:"allowDigests"`
	Warnings     []string       `json:"warnings"`
}

// SummaryPath is where the control socket answers with the Summary of what is in force.
const SummaryPath = "/v1/policy"

// SummarySchema is that of a Summary. Fields are added and never change.
const SummarySchema = "tidewaiter.dev/policy/v1"

// A Statement is one of the trust policy.
type Statement struct {
	Name              string            `json:"name"`
	Scopes            []string          `json:"registryScopes"`
	Level             string            `json:"level"`
	Override          map[string]string `json:"override,omitempty"`
	VerifyTimestamp   string            `json:"verifyTimestamp,omitempty"`
	TrustStores       []string          `json:"trustStores"`
	TrustedIdentities []string          `json:"trustedIdentities"`
}

// An Anchor is one certificate of a trust store.
type Anchor struct {
	File       string    `json:"file"` // "ca:acme/root.crt"
	Subject    string    `json:"subject"`
	Thumbprint string    `json:"thumbprint"` // SHA-256, hex
	NotBefore  time.Time `json:"notBefore"`
	NotAfter   time.Time `json:"notAfter"`
}

// A Listed is a mirror of a host.
type Listed struct {
	Host string `json:"host"` // "*": every host without a mirror of its own
	URL  string `json:"url"`
	File string `json:"file"` // that says so

	Redirects []string `json:"blobHosts"` // where its blobs may come from besides
}

// A AllowDigests is a digest that runs without a signature.
type AllowDigests struct {
	Digest     string   `json:"digest"`
	Namespaces []string `json:"namespaces"`
	File       string   `json:"file"`
	Line       int      `json:"line"`
}

// Certificate is c for a Summary.
func Certificate(file string, c *x509.Certificate) Anchor {
	sum := sha256.Sum256(c.Raw)
	return Anchor{file, text.Clean(c.Subject.String(), 512), hex.EncodeToString(sum[:]), c.NotBefore.UTC(), c.NotAfter.UTC()}
}

// Anchors are the certificates of all trust stores, in the order of their files.
func (c *Config) Anchors() []Anchor {
	list := []Anchor{}
	if c.store == nil {
		return list
	}
	for file, cert := range c.store.All {
		list = append(list, Certificate(file, cert))
	}
	slices.SortStableFunc(list, func(a, b Anchor) int { return cmp.Compare(a.File, b.File) })
	return list
}

// Trusts returns the files of the certificates of all trust stores by their SHA-256
// thumbprints, in hex.
func (c *Config) Trusts() map[string]string {
	m := map[string]string{}
	for _, a := range c.Anchors() {
		if m[a.Thumbprint] == "" {
			m[a.Thumbprint] = a.File
		}
	}
	return m
}

// Describe is s for a Summary.
func Describe(s verify.Statement) Statement {
	return Statement{s.Name, orNone(s.Scopes), s.Level, s.Override, s.VerifyTimestamp, orNone(s.TrustStores), orNone(s.TrustedIdentities)}
}

// orNone is list as JSON shows it: never null.
func orNone[T any](list []T) []T { return append([]T{}, list...) }

func spelled(list []registry.Pattern) []string {
	all := []string{}
	for _, p := range list {
		all = append(all, p.String())
	}
	return all
}

// String is the network as config.yaml spells it.
func (n Network) String() string {
	for name, is := range networks {
		if is == n {
			return name
		}
	}
	return "default"
}

// Summary says what c says.
func (c *Config) Summary() Summary {
	s := Summary{
		Schema: SummarySchema, Dir: c.Dir, Revision: c.Revision.String(), Mode: c.Mode.String(), Statements: []Statement{}, Stores: c.Anchors(),
		Layouts: orNone(c.Layouts), Mirrors: []Listed{}, Network: c.Network.String(), Redirects: spelled(c.Redirects), Hosts: c.Hosts, Aliases: []string{}, AllowDigests: []AllowDigests{}, Warnings: []string{},
	}
	for _, st := range c.Statements {
		s.Statements = append(s.Statements, Describe(st))
	}
	for _, m := range c.Mirrors {
		s.Mirrors = append(s.Mirrors, Listed{m.Host, m.URL.Redacted(), "config.yaml", spelled(m.Redirects)})
	}
	if c.certs != nil {
		for _, host := range slices.Sorted(maps.Keys(c.certs.of)) {
			for _, m := range c.certs.of[host].Mirrors {
				one := Listed{host, m.URL.Redacted(), m.File, spelled(c.Redirects)}
				if !slices.ContainsFunc(s.Mirrors, func(o Listed) bool { return o.Host == one.Host && o.URL == one.URL && o.File == one.File }) { // as host and as server
					s.Mirrors = append(s.Mirrors, one)
				}
			}
		}
	}
	slices.SortStableFunc(s.Mirrors, func(a, b Listed) int { return cmp.Compare(a.Host, b.Host) })
	for _, a := range c.Aliases {
		s.Aliases = append(s.Aliases, a.String())
	}
	for _, l := range c.AllowDigests {
		s.AllowDigests = append(s.AllowDigests, AllowDigests{l.Digest.String(), l.Namespaces, l.File, l.Line})
	}
	for _, w := range c.Warnings {
		s.Warnings = append(s.Warnings, w.String())
	}
	return s
}
