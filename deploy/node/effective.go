package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// An Effective is what containerd's configuration says in the end, of what matters
// to the gate: its own `config dump`, with every imported file. It is what the files
// say now; a containerd that runs has read them when it started.
type Effective struct {
	Imports []string // of all files
	Socket  string   // unless containerd is started with --address

	NoCRI               bool // no kubelet can use it: that of Docker's packages
	NRIDisabled         bool
	ConnectionsDisabled bool // only plugins that containerd starts itself
	NRISocket           string
	RegistrationTimeout string // "5s"
	RequestTimeout      string

	Knows      bool // this containerd has a default validator: 2.2 and later
	Validates  bool // and it is enabled
	Required   []string
	Toleration string // key of the annotation that lets a pod do without; empty: none does

	Pause        string            // image of pods' sandboxes
	Snapshotter  string            // default
	Snapshotters map[string]string // by runtime handler, where one has its own
	Runtimes     map[string]string // type, by runtime handler
	Handler      string            // of pods that name none

	// Where containerd pulls from: registry of its CRI image plugin.
	CertsD    string   // config_path; several directories have colons between them
	Mirrors   []string // hosts of registry.mirrors
	Configs   []string // hosts of registry.configs and registry.auths
	Headers   bool     // there are registry.headers
	LocalPull string   // the setting that has CRI pull by itself, and not through the transfer service; empty: none

	plugins   []string       // of containerd, that it does not start without
	disabled  []string       // plugins of containerd
	durations []string       // keys of CRI that hold none
	rest      map[string]any // everything that install does not change
}

// Requires reports whether containerd refuses containers while a plugin of this name
// is away.
func (e *Effective) Requires(name string) bool {
	return e.Validates && !e.NRIDisabled && slices.Contains(e.Required, name)
}

// RequiresGate reports whether containerd refuses containers while the gate is away.
func (e *Effective) RequiresGate() bool { return e.Requires(GateName) || e.Requires("99-"+GateName) }

// ErrNoBinary is wrapped where containerd's program was not found.
var ErrNoBinary = errors.New("containerd's program was not found")

// Effective asks containerd's own program. Nothing is changed, and the containerd
// that runs is not asked.
func (h *Host) Effective(ctx context.Context) (*Effective, error) {
	e, err := h.EffectiveFrom(ctx, h.Config)
	if said := (*Hint)(nil); err != nil && !errors.As(err, &said) {
		err = Hintf("correct "+h.Config+" until this shows it: "+h.Binary+" --config "+h.Config+" config dump", "%w", err)
	}
	return e, err
}

// EffectiveFrom is Effective with another main file.
func (h *Host) EffectiveFrom(ctx context.Context, config string) (*Effective, error) {
	if h.Binary == "" {
		return nil, Hintf("name it with --containerd-binary", "%s: %w", h.Name, ErrNoBinary)
	}
	out, err := h.Run(ctx, h.Binary, "--config", config, "config", "dump")
	if err != nil {
		return nil, err
	}
	return parseDump([]byte(out))
}

// Version is that of containerd's program. It need not be that of the one which runs.
func (h *Host) Version(ctx context.Context) (major, minor int, err error) {
	if h.Binary == "" {
		return 0, 0, Hintf("name it with --containerd-binary", "%s: %w", h.Name, ErrNoBinary)
	}
	out, err := h.Run(ctx, h.Binary, "--version")
	if err != nil {
		return 0, 0, err
	}
	// Builds say "v2.4.2", "2.2.9+unknown" or "v2.3.4-k3s1".
	m := regexp.MustCompile(`\sv?(\d{1,4})\.(\d{1,4})[.\s]`).FindStringSubmatch(out + "\n")
	if m == nil {
		return 0, 0, fmt.Errorf("%s --version says %.80q", h.Binary, out)
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor, nil
}

func parseDump(raw []byte) (*Effective, error) {
	var all map[string]any
	if err := toml.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("containerd's config dump: %w", err)
	}
	if v, ok := all["version"].(int64); !ok || v < 3 {
		return nil, Hintf("containerd 2.2 or later is needed to enforce", "containerd's config dump is of version %v: it is older than containerd 2.0", all["version"])
	}
	plugins := table(all, "plugins")
	nri := table(plugins, "io.containerd.nri.v1.nri")
	e := &Effective{
		Imports: list(all, "imports"),
		Socket:  word(table(all, "grpc"), "address"),
		NoCRI: slices.ContainsFunc(list(all, "disabled_plugins"), func(p string) bool {
			return p == "io.containerd.grpc.v1.cri" || p == "io.containerd.cri.v1.runtime" || p == "io.containerd.cri.v1.images"
		}),
		// The dump shows the table of a plugin that is switched off by name, if a file has it.
		NRIDisabled:         nri == nil || flag(nri, "disable") || slices.Contains(list(all, "disabled_plugins"), "io.containerd.nri.v1.nri"),
		ConnectionsDisabled: flag(nri, "disable_connections"),
		NRISocket:           word(nri, "socket_path"),
		RegistrationTimeout: word(nri, "plugin_registration_timeout"),
		RequestTimeout:      word(nri, "plugin_request_timeout"),
		Snapshotters:        map[string]string{},
		Runtimes:            map[string]string{},
	}
	if s := word(table(plugins, "io.containerd.server.v1.grpc"), "address"); s != "" {
		e.Socket = s // version 4
	}
	if v := table(nri, "default_validator"); v != nil {
		e.Knows, e.Validates, e.Required = true, flag(v, "enable"), list(v, "required_plugins")
		e.Toleration = word(v, "tolerate_missing_plugins_annotation")
	}
	images := table(plugins, "io.containerd.cri.v1.images")
	e.Pause = word(table(images, "pinned_images"), "sandbox")
	e.Snapshotter = word(images, "snapshotter")
	e.registry(images)
	e.plugins, e.disabled = list(all, "required_plugins"), list(all, "disabled_plugins")
	for _, d := range []struct{ plugin, key string }{
		{"io.containerd.cri.v1.images", "image_pull_progress_timeout"},
		{"io.containerd.cri.v1.runtime", "drain_exec_sync_io_timeout"},
		{"io.containerd.cri.v1.runtime", "stats_collect_period"},
		{"io.containerd.cri.v1.runtime", "stats_retention_period"},
		{"io.containerd.grpc.v1.cri", "stream_idle_timeout"},
	} {
		if v := word(table(plugins, d.plugin), d.key); v != "" {
			if _, err := time.ParseDuration(v); err != nil {
				e.durations = append(e.durations, d.key)
			}
		}
	}
	handlers := table(table(plugins, "io.containerd.cri.v1.runtime"), "containerd")
	e.Handler = word(handlers, "default_runtime_name")
	for name, r := range table(handlers, "runtimes") {
		if r, ok := r.(map[string]any); ok {
			e.Runtimes[name] = word(r, "runtime_type")
			if s := word(r, "snapshotter"); s != "" {
				e.Snapshotters[name] = s
			}
		}
	}
	delete(all, "imports")
	delete(nri, "disable")
	if v := table(nri, "default_validator"); v != nil {
		delete(v, "enable")
		delete(v, "required_plugins")
	}
	delete(table(images, "pinned_images"), "sandbox")
	e.rest = all
	return e, nil
}

// registry reads where CRI pulls from. What has CRI pull by itself is the list of
// CheckLocalImagePullConfigs (internal/cri/config of 2.2.9 and 2.4.2).
func (e *Effective) registry(images map[string]any) {
	r := table(images, "registry")
	e.CertsD = word(r, "config_path")
	e.Mirrors = slices.Sorted(maps.Keys(table(r, "mirrors")))
	e.Configs = slices.Compact(slices.Sorted(slices.Values(slices.Concat(slices.Collect(maps.Keys(table(r, "configs"))), slices.Collect(maps.Keys(table(r, "auths")))))))
	e.Headers = len(table(r, "headers")) > 0
	annotations, has := images["disable_snapshot_annotations"].(bool)
	downloads, counted := images["max_concurrent_downloads"].(int64)
	switch {
	case flag(images, "use_local_image_pull"):
		e.LocalPull = "use_local_image_pull"
	case has && !annotations:
		e.LocalPull = "disable_snapshot_annotations"
	case flag(images, "discard_unpacked_layers"):
		e.LocalPull = "discard_unpacked_layers"
	case len(e.Mirrors) > 0:
		e.LocalPull = "registry.mirrors"
	case len(e.Configs) > 0:
		e.LocalPull = "registry.configs"
	case counted && downloads != 3:
		e.LocalPull = "max_concurrent_downloads"
	case flag(images, "image_pull_with_sync_fs"):
		e.LocalPull = "image_pull_with_sync_fs"
	}
}

// differs is the key of something in which e and f differ besides what install
// changes; empty: nothing.
func (e *Effective) differs(f *Effective) string { return differing("", e.rest, f.rest) }

func differing(at string, a, b map[string]any) string {
	keys := slices.Sorted(maps.Keys(a))
	for k := range b {
		if _, both := a[k]; !both {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		s, one := a[k].(map[string]any)
		t, two := b[k].(map[string]any)
		if one && two {
			if d := differing(at+k+".", s, t); d != "" {
				return d
			}
		} else if !reflect.DeepEqual(a[k], b[k]) && (len(s) > 0 || len(t) > 0 || !one && !two) {
			return at + k
		}
	}
	return ""
}

// A value that is missing, or of another type, is the zero value.

func table(m map[string]any, key string) map[string]any {
	t, _ := m[key].(map[string]any)
	return t
}

func word(m map[string]any, key string) string {
	s, _ := m[key].(string)
	return s
}

func flag(m map[string]any, key string) bool {
	b, _ := m[key].(bool)
	return b
}

func list(m map[string]any, key string) (all []string) {
	l, _ := m[key].([]any)
	for _, v := range l {
		if s, ok := v.(string); ok {
			all = append(all, s)
		}
	}
	return all
}
