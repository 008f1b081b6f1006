// Package node knows how the node's own services are laid out: where kubeadm's
// containerd, k3s, RKE2 and MicroK8s keep their runtime, its configuration and its
// sockets, what that configuration is in effect, and how to change it and take the
// change back. install, uninstall and doctor stand on it.
//
// Every path is one of the host's. A [Host] whose root is a directory is a host that
// is mounted there: files are read and written below it, and programs are run in it.
package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// A Distro is where a distribution keeps what the gate has to do with. Paths are
// absolute and hold for every installation that moved nothing.
type Distro struct {
	Name     string
	Binaries []string // of containerd; the first that is there counts
	Config   string   // that containerd is started with
	// Source is what an operator edits where Config is generated from it at each
	// start; empty: Config itself.
	Source string
	// Extends says that Source is a template that need not be there, and into which
	// the generated configuration comes with {{ template "base" . }}.
	Extends  bool
	DropIns  string   // directory of files that Config imports, if it does
	Socket   string   // containerd's, CRI included
	NRI      string   // its socket for plugins
	Services []string // that containerd runs in; the first that is there counts
	CertsD   string   // hosts.toml files, as containerd is told
	Images   string   // archives that are imported at start; empty: none are
}

// The sources of the table:
//
//   - containerd: defaults/defaults_unix.go and cmd/containerd/command/config.go of
//     v2.4.2 (conf.d is imported only by a config.toml that says so, as `containerd
//     config default` does); kubeadm changes none of it.
//   - k3s: pkg/agent/config/config.go, pkg/agent/containerd/config.go and
//     pkg/agent/templates of 2026-08, and its pull request 13680 of February 2026,
//     from which on the generated file imports config-v3.toml.d/*.toml.
//   - RKE2: the same code (go.mod of rancher/rke2 6ce1a8019e9d, August 2026) with
//     its own data directory; pkg/bootstrap/bootstrap.go links its programs to bin;
//     the sockets stay k3s's (Dockerfile).
//   - MicroK8s: microk8s-resources/wrappers/run-containerd-with-args and
//     default-args/containerd{,-template.toml} of canonical/microk8s d099c907d364
//     (June 2026, containerd 2.2.3), as a classic snap.
var distros = []Distro{
	rancher("k3s", []string{"k3s", "k3s-agent"}, "/var/lib/rancher/k3s/data/current/bin/containerd"),
	rancher("rke2", []string{"rke2-server", "rke2-agent"}, "/var/lib/rancher/rke2/bin/containerd"),
	{
		Name:     "microk8s",
		Binaries: []string{"/snap/microk8s/current/bin/containerd"},
		Config:   "/var/snap/microk8s/current/args/containerd.toml",
		Source:   "/var/snap/microk8s/current/args/containerd-template.toml",
		DropIns:  "/var/snap/microk8s/current/args/containerd.d",
		Socket:   "/var/snap/microk8s/common/run/containerd.sock",
		NRI:      "/var/run/nri/nri.sock",
		Services: []string{"snap.microk8s.daemon-containerd"},
		CertsD:   "/var/snap/microk8s/current/args/certs.d",
	},
	{
		Name:     "containerd",
		Binaries: []string{"/usr/local/bin/containerd", "/usr/bin/containerd", "/bin/containerd"},
		Config:   "/etc/containerd/config.toml",
		DropIns:  "/etc/containerd/conf.d",
		Socket:   "/run/containerd/containerd.sock",
		NRI:      "/var/run/nri/nri.sock",
		Services: []string{"containerd"},
		CertsD:   "/etc/containerd/certs.d",
	},
}

func rancher(name string, services []string, binary string) Distro {
	dir := "/var/lib/rancher/" + name + "/agent"
	return Distro{
		Name:     name,
		Binaries: []string{binary},
		Config:   dir + "/etc/containerd/config.toml",
		Source:   dir + "/etc/containerd/config-v3.toml.tmpl",
		Extends:  true,
		DropIns:  dir + "/etc/containerd/config-v3.toml.d",
		Socket:   "/run/k3s/containerd/containerd.sock",
		NRI:      "/var/run/nri/nri.sock",
		Services: services,
		CertsD:   dir + "/etc/containerd/certs.d",
		Images:   dir + "/images",
	}
}

// Distros is the table, each distribution once.
func Distros() []Distro { return slices.Clone(distros) }

// A Host is a node on which a distribution was found. Methods may be called from
// several goroutines at once; those that change files must not be.
type Host struct {
	Distro
	Root    string // "/" or where the host is mounted
	Binary  string // of containerd; empty: none was found
	Service string // that containerd runs in; empty: none was found
	Manager Manager
	Run     Runner // runs programs of the host

	BeforeWrite func(name string) // before a file is written or removed; for tests
}

// Options override what would be found.
type Options struct {
	Root    string // empty: "/"
	Runtime string // name of a Distro, or "kubeadm" for "containerd"; empty: the one that is there
	Config  string // of containerd; without Runtime: a containerd of its own
	Binary  string // of containerd
	Socket  string
	NRI     string
	Service string // "systemd", "openrc" or "none"; empty: the one that is there
	Restart string // command that restarts containerd instead of its service
	Gate    string // command that restarts the gate instead of its service

	// Optional lets Detect return a host with the zero Distro where none is found or
	// one must be chosen: to open a node it need not be known.
	Optional bool
}

// notFound is of a host whose distribution is not clear.
type notFound struct{ Hint }

func (n *notFound) Unwrap() error { return &n.Hint }

func unclear(next, format string, a ...any) error {
	return &notFound{Hint{Err: fmt.Errorf(format, a...), Next: next}}
}

// A Hint is an error with what to do about it.
type Hint struct {
	Err     error
	Next    string
	Refused bool // the answer is no; otherwise it could not be found out
}

func (h *Hint) Error() string { return h.Err.Error() }
func (h *Hint) Unwrap() error { return h.Err }

// Hintf returns an error with what to do about it.
func Hintf(next, format string, a ...any) error {
	return &Hint{Err: fmt.Errorf(format, a...), Next: next}
}

// Refusef is Hintf for an answer that is no.
func Refusef(next, format string, a ...any) error {
	return &Hint{Err: fmt.Errorf(format, a...), Next: next, Refused: true}
}

// Detect finds out what runs on the host. It only looks. The error has a Hint where
// there is none or more than one.
func Detect(o Options) (*Host, error) {
	h := &Host{Root: o.Root}
	if h.Root == "" {
		h.Root = "/"
	}
	h.Run = Exec(h.Root)
	var err error
	if h.Manager, err = manager(h, o); err != nil {
		return nil, err
	}
	h.Distro, err = h.find(o)
	if n := (*notFound)(nil); err != nil && !(o.Optional && errors.As(err, &n)) {
		return nil, err
	}
	if o.Config != "" {
		h.Config, h.Source, h.Extends = o.Config, "", false
		h.DropIns = path.Join(path.Dir(o.Config), "conf.d")
	}
	if o.Socket != "" {
		h.Socket = o.Socket
	}
	if o.NRI != "" {
		h.NRI = o.NRI
	}
	h.Binary = o.Binary
	for _, b := range h.Binaries {
		if h.Binary == "" && h.Exists(b) {
			h.Binary = b
		}
	}
	for _, s := range h.Services {
		if h.Service == "" && h.Manager.has(s) {
			h.Service = s
		}
	}
	return h, nil
}

func (h *Host) find(o Options) (Distro, error) {
	name := o.Runtime
	if name == "kubeadm" { // brings no containerd of its own
		name = "containerd"
	}
	if name == "" && o.Config != "" {
		name = "containerd"
	}
	var names []string
	var there, live []Distro
	for _, l := range distros {
		if l.Name == name {
			return l, nil
		}
		names = append(names, l.Name)
		if !h.Exists(l.Config) && !slices.ContainsFunc(l.Binaries, h.Exists) {
			continue
		}
		there = append(there, l)
		if h.Exists(l.Socket) {
			live = append(live, l)
		}
	}
	switch {
	case name != "":
		return Distro{}, Hintf("one of "+strings.Join(names, ", ")+", kubeadm", "--runtime: %q is not known", name)
	case len(there) == 0:
		return Distro{}, unclear("name the one that there is with --runtime, or its configuration with --containerd-config",
			"neither %s is installed here, where they are usually found", strings.Join(names, " nor "))
	case len(there) == 1:
		return there[0], nil
	case len(live) == 1:
		return live[0], nil // such as the containerd of Docker beside k3s, installed and not running
	}
	var found []string
	for _, l := range there {
		found = append(found, l.Name)
	}
	return Distro{}, unclear("name the one that runs pods with --runtime", "%s are installed here", strings.Join(found, " and "))
}

// Sockets are those of containerd and of its NRI: as e says, where the operator named no
// other. e may be nil.
func (h *Host) Sockets(e *Effective) (containerd, nri string) {
	usual := distros[len(distros)-1]
	containerd, nri = h.Socket, h.NRI
	if e == nil {
		return containerd, nri
	}
	if h.Name == usual.Name && e.Socket != "" && containerd == usual.Socket {
		containerd = e.Socket
	}
	if e.NRISocket != "" && nri == usual.NRI {
		nri = e.NRISocket
	}
	return containerd, nri
}

// Path is where a file of the host is for this process. Links to directories on the
// way lead where they do on the host, also where it is mounted: k3s has its programs
// behind one, and operators its data. A link that is the file itself stays one.
func (h *Host) Path(name string) string {
	if filepath.Clean(h.Root) == "/" {
		return filepath.Join("/", name)
	}
	at, left, hops := "/", strings.Split(path.Clean("/"+name), "/"), 0 // at is of the host
	for len(left) > 0 {
		one := left[0]
		left = left[1:]
		switch one {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, one)
		if len(left) > 0 && hops < maxLinks {
			if to, err := os.Readlink(filepath.Join(h.Root, next)); err == nil {
				if hops++; path.IsAbs(to) {
					at = "/"
				}
				left = append(strings.Split(to, "/"), left...)
				continue
			}
		}
		at = next
	}
	return filepath.Join(h.Root, at)
}

// maxLinks is how many links are followed on the way to a file, as many as Linux does.
const maxLinks = 40

// Exists reports whether there is a file of the name, also behind a link.
func (h *Host) Exists(name string) bool {
	_, err := os.Stat(h.Target(name))
	return err == nil
}

// Target is Path, or what the file that is a link leads to on the host.
func (h *Host) Target(name string) string { return filepath.Dir(h.Path(path.Join(name, "x"))) }

// maxConfig is how much of a file of configuration is read.
const maxConfig = 1 << 20

// Read returns nil where there is no such file. A link or anything else that is no
// file is an error: what it leads to is not ours to write.
func (h *Host) Read(name string) ([]byte, error) {
	info, err := os.Lstat(h.Path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	if info.Size() > maxConfig {
		return nil, fmt.Errorf("%s is longer than %d bytes", name, maxConfig)
	}
	return os.ReadFile(h.Path(name))
}

// head is what counts of a configuration of containerd before it is merged.
type head struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`
}

func parseHead(name string, raw []byte) (head, error) {
	var c head
	if err := toml.Unmarshal(raw, &c); err != nil {
		line := 0
		if e := (*toml.DecodeError)(nil); errors.As(err, &e) {
			line, _ = e.Position()
		}
		return c, fmt.Errorf("%s:%d: %w", name, line, err)
	}
	return c, nil
}

// imported is the directory in which a file of the given name would be imported by
// c, the one that the layout names if there are several; empty: there is none.
func (h *Host) imported(c head, name string) (dir string) {
	for _, pattern := range c.Imports {
		if !path.IsAbs(pattern) {
			pattern = path.Join(path.Dir(h.Config), pattern)
		}
		if ok, err := path.Match(path.Base(pattern), name); err != nil || !ok || strings.ContainsAny(path.Dir(pattern), "*?[") {
			continue
		}
		if dir = path.Dir(pattern); dir == h.DropIns {
			return dir
		}
	}
	return dir
}
