package config

import (
	"strings"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

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
