package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestMirrors: the gate's idea of mirrors is containerd's, or it is said.
func TestMirrors(t *testing.T) {
	dir := func() string {
		t.Helper()
		d := filepath.Join(t.TempDir(), "certs.d")
		must(t, os.Mkdir(d, 0o755))
		return d
	}
	one, two := dir(), dir()
	alias := filepath.Join(t.TempDir(), "current")
	must(t, os.Symlink(one, alias))
	const registry = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n"
	for name, tt := range map[string]struct {
		containerd node.Effective
		file       string // below conf.d
		gate       config.Config
		want, next string // of the first warning; empty: there is none
	}{
		"the same":              {containerd: node.Effective{CertsD: one}, gate: config.Config{HostsAuto: true, Hosts: one}},
		"the same by a link":    {containerd: node.Effective{CertsD: one}, gate: config.Config{HostsAuto: true, Hosts: alias}},
		"elsewhere":             {containerd: node.Effective{CertsD: one}, file: registry + "config_path = '" + one + "'\n", gate: config.Config{HostsAuto: true, Hosts: two}, want: "containerd looks for hosts.toml files in " + one + " (config_path, /etc/containerd/conf.d/50.toml:3), and the gate in " + two, next: "write into config.yaml: sources: {certsDir: [" + one + "]}"},
		"the gate nowhere":      {containerd: node.Effective{CertsD: one}, gate: config.Config{HostsAuto: true}, want: "and the gate nowhere", next: "certsDir: [" + one + "]"},
		"containerd nowhere":    {containerd: node.Effective{CertsD: "/nowhere/certs.d"}, gate: config.Config{HostsAuto: true, Hosts: two}, want: "containerd looks for hosts.toml files nowhere that is there", next: "{certsDir: none}"},
		"named":                 {containerd: node.Effective{CertsD: one}, gate: config.Config{Hosts: two}},
		"never":                 {containerd: node.Effective{CertsD: one}, gate: config.Config{Network: config.NetworkNever}},
		"two, local pulls":      {containerd: node.Effective{CertsD: one + ":" + two, LocalPull: "use_local_image_pull"}, gate: config.Config{HostsAuto: true, Hosts: one + ":" + two}},
		"two, through transfer": {containerd: node.Effective{CertsD: one + ":" + two}, gate: config.Config{HostsAuto: true, Hosts: one + ":" + two}, want: "containerd reads no hosts.toml in " + one + " or " + two, next: "config_path = \"" + one + "\""},
		"mirrors":               {containerd: node.Effective{Mirrors: []string{"docker.io"}, LocalPull: "registry.mirrors"}, file: registry + "mirrors.'docker.io'.endpoint = ['https://m.site']\n", gate: config.Config{HostsAuto: true}, want: "mirrors of docker.io in registry.mirrors (/etc/containerd/conf.d/50.toml:3), which the gate does not read", next: "HOST/hosts.toml"},
		"configs":               {containerd: node.Effective{CertsD: one, Configs: []string{"a.site"}}, gate: config.Config{HostsAuto: true, Hosts: one}, want: "certificates or logins for a.site in registry.configs, which", next: "sources.credentials"},
		"headers":               {containerd: node.Effective{CertsD: one, Headers: true}, gate: config.Config{HostsAuto: true, Hosts: one}, want: "the headers of registry.headers, and the gate does not", next: "hosts.toml"},
		"no CRI":                {containerd: node.Effective{CertsD: one, NoCRI: true}, gate: config.Config{HostsAuto: true, Hosts: two}},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy(t)
			if tt.file != "" {
				must(t, os.WriteFile(f.Host.Path("/etc/containerd/conf.d/50.toml"), []byte(tt.file), 0o644))
			}
			h := *f.Host
			// Directories of this test are the host's, too.
			f.Host, f.Effective, f.Config = &h, &tt.containerd, &tt.gate
			f.files()
			h.Root = "/"
			x := &examination{Facts: f}
			x.mirrors()
			var bad []Finding
			for _, one := range x.found {
				if one.Level != OK {
					bad = append(bad, one)
				}
			}
			switch {
			case tt.want == "" && len(bad) > 0, tt.want != "" && len(bad) == 0:
				t.Errorf("%+v", x.found)
			case tt.want != "" && (bad[0].Level != Warn || !strings.Contains(bad[0].Text, tt.want) || !strings.Contains(bad[0].Next, tt.next)):
				t.Errorf("%+v", bad)
			}
		})
	}
}

// TestNobodyIsAsked: enforce with network: mirrors and no mirror is no ok.
func TestNobodyIsAsked(t *testing.T) {
	for name, tt := range map[string]struct {
		config config.Config
		want   Level
	}{
		"mirrors": {config.Config{Network: config.NetworkMirrors}, Warn},
		"audit":   {config.Config{Network: config.NetworkMirrors, Mode: verify.Audit}, OK},
		"never":   {config.Config{Network: config.NetworkNever}, OK},
	} {
		x := &examination{Facts: &Facts{Config: &tt.config}}
		x.sources()
		if len(x.found) != 1 || x.found[0].Level != tt.want {
			t.Errorf("%s: %+v", name, x.found)
		}
	}
}

// TestProxies: a proxy in containerd's unit or in an environment is not used, and is said.
func TestProxies(t *testing.T) {
	f := healthy(t)
	write := func(name, text string) {
		name = f.Host.Path(name)
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, os.WriteFile(name, []byte(text), 0o644))
	}
	write("/etc/systemd/system/containerd.service.d/proxy.conf", "[Service]\n# Environment=ALL_PROXY=x\nEnvironment=\"HTTPS_PROXY=http://user:secret@proxy:3128\" NO_PROXY=10.0.0.0/8 \"http_proxy=http://proxy\"\n")
	write("/etc/default/containerd", "HTTP_PROXY=\n")
	f.Proxies = f.Host.Proxies(0, 0)
	found := examined(f, "proxy")
	if len(found) != 1 || found[0].Level != Warn || !strings.HasPrefix(found[0].Text, "HTTPS_PROXY, http_proxy is set for containerd by /etc/systemd/system/containerd.service.d/proxy.conf: the gate uses no proxy") || strings.Contains(found[0].Text, "secret") {
		t.Errorf("%+v", found)
	}
	f.Config = &config.Config{Network: config.NetworkNever}
	x := &examination{Facts: f}
	if x.proxies(); len(x.found) > 0 {
		t.Errorf("%+v", x.found)
	}
}
