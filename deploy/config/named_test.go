package config

import (
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
)

func TestNamed(t *testing.T) {
	t.Parallel()
	named := func(scopes string, sources ...string) *Config {
		return load1(t, write(t, with(notation(), "trustpolicy.json", trustPolicy(scopes), "config.yaml", sourcesOf(append(sources, "certsDir: none")...))))
	}
	for _, tt := range []struct {
		name             string
		config           *Config
		none             bool     // it names no host
		host, repository []string // those that it names
	}{
		{name: "nothing but *", none: true, config: named("*", "mirrors: [{host: \"*\", url: \"http://127.0.0.1:1\"}]")},
		{name: "scopes", config: named(`registry.acme.internal/team/app", "docker.io/acme/app`),
			host:       []string{"registry.acme.internal/team/app", "registry.acme.internal/team/other", "docker.io/acme/app", "docker.io/evil/app"},
			repository: []string{"registry.acme.internal/team/app", "docker.io/acme/app"}},
		{name: "mirrors", config: named("*", "mirrors: [{host: docker.io, url: \"http://127.0.0.1:1\"}, {host: \"*\", url: \"http://127.0.0.1:2\"}]"),
			host: []string{"docker.io/acme/app", "docker.io/evil/app"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			named := tt.config.Named()
			if (named == nil) != tt.none {
				t.Fatalf("it names none: %t", named == nil)
			}
			if tt.none {
				return
			}
			for _, s := range []string{"registry.acme.internal/team/app", "registry.acme.internal/team/other", "docker.io/acme/app", "docker.io/evil/app", "evil.example/team/app", "*/app", "/app"} {
				host, path, _ := strings.Cut(s, "/")
				h, r := named(verify.Name{Host: host, Path: path})
				if h != slices.Contains(tt.host, s) || r != slices.Contains(tt.repository, s) {
					t.Errorf("%s: %t, %t", s, h, r)
				}
			}
		})
	}
}

func TestNamedByHosts(t *testing.T) {
	t.Parallel()
	dir := certsD(t, "docker.io/hosts.toml", "server = 'https://registry-1.docker.io'\n", "_default/hosts.toml", "[host.'https://any.site']\n")
	named := load1(t, write(t, with(notation(), "trustpolicy.json", trustPolicy("*"), "config.yaml", sourcesOf("certsDir: "+dir)))).Named()
	for host, want := range map[string]bool{"docker.io": true, "quay.io": false, "*": false} {
		if h, r := named(verify.Name{Host: host, Path: "a/b"}); h != want || r {
			t.Errorf("%s: %t, %t", host, h, r)
		}
	}
}

// TestNamedSources: what the configuration names is told to each source, and so who gives
// way to whom; a mirror of all hosts asks for hosts that it names and for others.
func TestNamedSources(t *testing.T) {
	t.Parallel()
	c := load1(t, write(t, with(notation(), "trustpolicy.json", trustPolicy("registry.acme.internal/team/app"), "config.yaml",
		sourcesOf(`network: mirrors`, `certsDir: none`, `mirrors: [{host: docker.io, url: "http://127.0.0.1:1"}, {host: "*", url: "http://127.0.0.1:2"}]`))))
	registries := c.registries()
	for host, want := range map[string]bool{"docker.io": true, "registry.acme.internal": true, "quay.io": false, "evil.example": false} {
		list := registries(verify.Name{Host: host, Path: "a/b"})
		if len(list) != 1 {
			t.Fatalf("%s: %d registries", host, len(list))
		}
		if got := list[0].Named; got != want {
			t.Errorf("%s: named %t, want %t", host, got, want)
		}
	}
}
