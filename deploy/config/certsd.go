package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/tidewaiter/tidewaiter/nri/containerd/certsd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// A runtime is a containerd that may be on a node: its configuration, and where it has
// its certs.d if that names none.
type runtime struct {
	config string
	dirs   []string
}

// runtimes are those that come with a Kubernetes first: beside one of them another
// containerd's is a leftover.
var runtimes = []runtime{
	{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml", []string{"/var/lib/rancher/k3s/agent/etc/containerd/certs.d"}},
	{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml", []string{"/var/lib/rancher/rke2/agent/etc/containerd/certs.d"}},
	{"/var/snap/microk8s/current/args/containerd.toml", []string{"/var/snap/microk8s/current/args/certs.d"}},
	{"/etc/containerd/config.toml", certsd.Defaults},
}

// certs is what directories of hosts.toml say, by canonical host or "*". It is kept behind
// a pointer, since headers are secret and a configuration may be printed.
type certs struct{ of map[string]certsd.Registry }

// hosts reads what containerd knows of mirrors: from is the directories to read, or empty
// to ask containerd's own configuration, or look in the usual places.
func (d *directory) hosts(from []string, c *Config) error {
	return d.hostsIn(from, runtimes, c)
}

func (d *directory) hostsIn(from []string, known []runtime, c *Config) error {
	if from == nil {
		from = d.look(known, c)
	} else {
		d.trees = append(d.trees, from...)
		if there := slices.DeleteFunc(slices.Clone(from), absent); len(there) > 0 { // one that is named alone must be there
			from = there
		}
	}
	// The order counts too, and which are not there.
	d.read = append(d.read, content{name: hostsField, raw: []byte(strings.Join(from, ":"))})
	c.Hosts = strings.Join(from, ":")
	if len(from) == 0 {
		return nil
	}
	found := map[string]certsd.Registry{}
	c.certs = &certs{found}
	for i, dir := range from {
		list, warnings, err := certsd.Read(dir, (*outside)(d))
		if e := (*certsd.Error)(nil); errors.As(err, &e) {
			return &Error{File: e.File, Line: e.Line, Text: e.Text}
		}
		if err != nil {
			return err
		}
		for _, w := range warnings {
			c.warn("%s", w.Error())
		}
		in, err := d.registries(list, c)
		if err != nil {
			return err
		}
		// As containerd: the first directory that has one of the host, or a _default.
		if _, all := found["*"]; all {
			c.warn("%s is not used: %s has a _default, which speaks of every host", dir, from[i-1])
			break
		}
		for host, r := range in {
			if _, before := found[host]; !before {
				found[host] = r
			}
		}
	}
	c.insecure(found)
	return nil
}

// insecure warns of registries of which it is not looked at who answers, and of secrets
// that they are told in plain text. That somebody on the way may hide signatures can be
// accepted; that they may read a password is said all the same.
func (c *Config) insecure(found map[string]certsd.Registry) {
	said := map[[2]string]bool{}
	for _, host := range slices.Sorted(maps.Keys(found)) {
		r := found[host]
		all := slices.Clone(r.Mirrors)
		// Elsewhere the host itself is not asked if it has a mirror.
		if asked := c.Network == NetworkOrigin || c.Network == NetworkDefault && len(all) == 0; asked && r.Origin != nil {
			all = append(all, *r.Origin)
		}
		for _, m := range all {
			at, file := host, m.File
			if m.URL != nil {
				at = m.URL.Host
			}
			if m.Line > 0 {
				file = fmt.Sprintf("%s:%d", file, m.Line)
			}
			// One of two entries for the same host says it.
			if !m.Insecure() || said[[2]string{m.File, at}] {
				continue
			}
			said[[2]string{m.File, at}] = true
			switch accepted := m.URL != nil && c.acceptPlain(m.URL); {
			case !accepted:
				c.warn("%s: anybody on the way to %s can hide signatures (not make them), and read what it is told", file, at)
			case c.credentials.of(m.URL, true) != nil || len(m.Header) > 0:
				c.warn("%s: over http anybody on the way to %s can read the credentials", file, at)
			}
		}
	}
}

// revision is the directory of one revision of a snap, which is also called current.
var revision = regexp.MustCompile(`^/var/snap/([^/]+)/[^/]+/`)

const hostsField = "sources.certsDir"

func (c *Config) warn(format string, a ...any) {
	c.Warnings = append(c.Warnings, policy.Warning{Field: hostsField, Text: fmt.Sprintf(format, a...)})
}

func absent(name string) bool {
	_, err := os.Lstat(name)
	return errors.Is(err, fs.ErrNotExist)
}

// look finds the directories that containerd itself looks into: of the first of known that
// has one. What is wrong with a containerd's configuration is no error of the gate's.
func (d *directory) look(known []runtime, c *Config) []string {
	for i, r := range known {
		dirs := slices.Clone(r.dirs)
		pulls, err := certsd.Pulls(r.config, (*aside)(d))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			c.warn("what containerd is told of mirrors cannot be read, and %s are looked for: %v", strings.Join(dirs, " and "), err)
		default:
			dirs = pulls.Dirs()
			if len(pulls.Tables) > 0 {
				c.warn("%s has registry.%s, which the gate does not read: write hosts.toml files, or sources.mirrors and sources.credentials", r.config, strings.Join(pulls.Tables, " and registry."))
			}
		}
		for k, dir := range dirs {
			if now := revision.ReplaceAllString(dir, "/var/snap/$1/current/"); absent(dir) {
				dirs[k] = now // in a pod only that is mounted
			}
		}
		d.trees = append(d.trees, dirs...)
		there := slices.DeleteFunc(slices.Clone(dirs), absent)
		// containerd, too, does without a usual one that nobody made.
		unusual := slices.DeleteFunc(slices.Clone(dirs), func(dir string) bool { return slices.Contains(r.dirs, dir) })
		if len(there) == 0 && len(unusual) > 0 && pulls.Path != "" {
			instead := ""
			if there = slices.DeleteFunc(slices.Clone(r.dirs), absent); len(there) > 0 {
				instead = ", and " + strings.Join(there, " and ") + " is read instead"
			}
			d.trees = append(d.trees, r.dirs...)
			c.warn("%s says config_path = %q, and that is not here%s: in a pod, mount it at the same path", pulls.From, pulls.Path, instead)
		}
		if len(there) == 0 {
			continue
		}
		for _, other := range known[i+1:] {
			d.trees = append(d.trees, other.dirs...)
			for _, dir := range other.dirs {
				if !absent(dir) && !slices.Contains(there, dir) {
					c.warn("%s is read and %s is not: name the one that containerd uses", strings.Join(there, " and "), dir)
				}
			}
		}
		return there
	}
	return nil
}

// registries are those of one directory by canonical host.
func (d *directory) registries(list []certsd.Registry, c *Config) (map[string]certsd.Registry, error) {
	found := map[string]certsd.Registry{}
	for _, r := range list {
		// In the revision too, since an empty directory also says something.
		d.read = append(d.read, content{name: r.Dir})
		host := "*"
		if r.Host != "" {
			var err error
			if host, err = policy.ParseHost(r.Host); err != nil {
				c.warn("%s is not used: it is not called as a host", r.Dir)
				continue
			}
		}
		// A name that is not canonical counts where the canonical one is not there.
		if _, twice := found[host]; twice && r.Host != host {
			c.warn("%s is not used: there is another directory for %s", r.Dir, host)
			continue
		}
		found[host] = r
	}
	return found, nil
}

// unmirrored warns of a configuration that can never ask anybody.
func (c *Config) unmirrored() {
	if c.Mode != verify.Enforce || c.Network != NetworkMirrors || len(c.Mirrors) > 0 || c.certs != nil && slices.ContainsFunc(slices.Collect(maps.Values(c.certs.of)), func(r certsd.Registry) bool { return len(r.Mirrors) > 0 }) {
		return
	}
	text := "says mirrors, and there is none: no registry is asked for signatures, and images that the node has none of are refused. Write sources.mirrors or sources.certsDir, or network: never if that is meant"
	if len(c.Layouts) > 0 {
		text = "says mirrors, and there is none: only layouts are asked for signatures. Write network: never if that is meant"
	}
	c.Warnings = append(c.Warnings, policy.Warning{Field: "sources.network", Text: text})
}

// aside reads files of containerd's that belong to the configuration by what they come to,
// and not by what they hold: not each change of them is a new revision.
type aside directory

// List implements [hosts.Files].
func (a *aside) List(dir string) ([]string, error) {
	a.trees = append(a.trees, dir)
	return (*outside)(a).List(dir)
}

// Read implements [hosts.Files].
func (a *aside) Read(name string, limit int64) ([]byte, error) {
	a.outside = append(a.outside, name)
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return take(f, limit)
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
		return nil, certsd.ErrNotDirectory
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

// Proxied adds a warning if an environment ("NAME=VALUE") names a proxy: signatures are
// fetched without one. It repeats no value.
func (c *Config) Proxied(environ []string) {
	if c.Network == NetworkNever {
		return
	}
	var set []string
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		if value != "" && slices.Contains([]string{"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"}, strings.ToUpper(name)) {
			set = append(set, name)
		}
	}
	slices.Sort(set)
	if len(set) > 0 {
		c.Warnings = append(c.Warnings, policy.Warning{Field: "sources", Text: strings.Join(set, ", ") + " in the environment is not used: registries are asked directly"})
	}
}
