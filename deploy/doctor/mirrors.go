package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/nri/containerd/certsd"
)

// Mirrors compares where containerd pulls from with where the gate asks for signatures:
// warnings alone.
func Mirrors(h *node.Host, e *node.Effective, c *config.Config) []Finding {
	x := &examination{Facts: &Facts{Host: h, Restart: "restart containerd", Effective: e, Config: c}, enforce: true}
	if command := h.Manager.Restart(); command != nil {
		x.Restart = strings.Join(command, " ")
	}
	x.files()
	x.mirrors()
	return x.found
}

// registryKey is the table of containerd's configuration that says where images are from.
var registryKey = []string{"plugins", "io.containerd.cri.v1.images", "registry"}

func (x *examination) mirrors() {
	const check = "mirrors"
	e, c := x.Effective, x.Config
	if e == nil || e.NoCRI || c == nil || c.Network == config.NetworkNever {
		return
	}
	path, at := e.CertsD, ""
	if s := x.last(registryKey, "config_path"); s != nil && path != "" {
		at = " (config_path, " + s.At() + ")"
	}
	if path == "" && len(e.Mirrors) == 0 {
		path, at = strings.Join(certsd.Defaults, ":"), " (its default)"
	}
	its := x.there(filepath.SplitList(path))
	if read := filepath.SplitList(c.Hosts); c.HostsAuto && !slices.EqualFunc(its, read, x.sameDir) {
		where, gate := "nowhere", "nowhere"
		if len(its) > 0 {
			where = "in " + strings.Join(its, " and ") + at
		} else if path != "" {
			where += " that is there" + at
		}
		if len(read) > 0 {
			gate = "in " + strings.Join(read, " and ")
		}
		line := "none"
		if len(its) > 0 {
			line = "[" + strings.Join(its, ", ") + "]"
		}
		x.add(Warn, check, "write into config.yaml: sources: {certsDir: "+line+"}", "containerd looks for hosts.toml files %s, and the gate %s", where, gate)
	}
	if len(its) > 0 && len(filepath.SplitList(path)) > 1 && e.LocalPull == "" {
		x.add(Warn, check, fmt.Sprintf("write one directory: config_path = %q below [plugins.%q.registry], then %s", its[0], registryKey[1], x.Restart),
			"containerd reads no hosts.toml in %s%s: it pulls through its transfer service, which takes the two as the name of one", strings.Join(its, " or "), at)
	}
	where := certsd.Defaults[0]
	if len(its) > 0 {
		where = its[0]
	}
	place := func(key string) string {
		for _, s := range x.settings() {
			if len(s.Key) > 3 && s.Key[0] == "plugins" && s.Key[2] == "registry" && s.Key[3] == key {
				return " (" + s.At() + ")"
			}
		}
		return ""
	}
	if len(e.Mirrors) > 0 {
		x.add(Warn, check, "write them as "+where+"/HOST/hosts.toml, or as sources.mirrors in config.yaml", "containerd has mirrors of %s in registry.mirrors%s, which the gate does not read", some(e.Mirrors), place("mirrors"))
	}
	if len(e.Configs) > 0 {
		x.add(Warn, check, "write CAs and client certificates into hosts.toml files, and logins into sources.credentials", "containerd has certificates or logins for %s in registry.configs%s, which the gate does not read", some(e.Configs), place("configs"))
	}
	if e.Headers {
		x.add(Warn, check, "write them into hosts.toml files if mirrors need them", "containerd sends the headers of registry.headers%s, and the gate does not", place("headers"))
	}
	if len(x.found) == 0 || x.found[len(x.found)-1].Check != check {
		x.ok(check, "containerd and the gate know the same mirrors")
	}
}

// some is a list that a person reads.
func some(names []string) string {
	if n := len(names) - shown; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), n)
	}
	return strings.Join(names, ", ")
}

// there are those of dirs that exist.
func (x *examination) there(dirs []string) (all []string) {
	for _, dir := range dirs {
		if _, err := os.Stat(x.Host.Path(dir)); err == nil {
			all = append(all, dir)
		}
	}
	return all
}

// sameDir reports whether two names are of one directory: a snap's has two.
func (x *examination) sameDir(a, b string) bool {
	one, err := os.Stat(x.Host.Path(a))
	two, err2 := os.Stat(x.Host.Path(b))
	return a == b || err == nil && err2 == nil && os.SameFile(one, two)
}

// proxies are what names a proxy for containerd or the gate, neither of which the gate uses.
func (x *examination) proxies() {
	if x.Config != nil && x.Config.Network == config.NetworkNever {
		return
	}
	const next = "name a registry that the node reaches by itself in sources.mirrors, or bring signatures as evidence archives: docs/configuration.md, Proxies"
	for _, p := range x.Proxies {
		x.add(Warn, "proxy", next, "%s is set for %s: the gate uses no proxy, and asks registries directly", strings.Join(p.Variables, ", "), p.Of)
	}
}
