package node

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestFiles reads the files of a containerd in its order, with a cycle, a link that
// leads nowhere, and every way to write a value.
func TestFiles(t *testing.T) {
	root := nodetest.Tree{
		"/etc/containerd/config.toml":   "version = 3\nimports = ['conf.d/*.toml', '/etc/more.toml']\n[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n",
		"/etc/containerd/conf.d/b.toml": "version = 3\nimports = [\"../config.toml\"]\n\n[plugins]\n\"io.containerd.nri.v1.nri\" = { disable = false, default_validator = { required_plugins = [\n  'a', # b\n  \"tidewaiter\"\n] } }\n",
		"/etc/containerd/conf.d/a.toml": "plugins.'io.containerd.nri.v1.nri'.default_validator.enable = true\n[[x]]\ny = 1\n",
		"/etc/containerd/conf.d/c.conf": "x = 1\n",
		"/etc/containerd/conf.d/z.toml": "x = [\n",
	}.Make(t)
	h := &Host{Root: root, Distro: Distro{Config: "/etc/containerd/config.toml"}}
	files, dirs, err := h.Files()
	if err != nil || !slices.Equal(dirs, []string{"/etc/containerd/conf.d"}) {
		t.Fatalf("%v, %v", dirs, err)
	}
	var got []string
	for _, f := range files {
		name := strings.TrimPrefix(f.Path, "/etc/")
		if f.Err != nil {
			got = append(got, name+" fails")
		} else if time.Since(f.Changed) > time.Hour {
			t.Errorf("%s changed at %v", name, f.Changed)
		}
		for _, s := range f.Settings {
			got = append(got, fmt.Sprintf("%s:%d %s %q", strings.TrimPrefix(s.File, "/etc/"), s.Line, strings.Join(s.Key, "/"), s.Values))
		}
	}
	want := []string{
		`containerd/config.toml:1 version ["3"]`,
		`containerd/config.toml:2 imports ["conf.d/*.toml" "/etc/more.toml"]`,
		`containerd/config.toml:4 plugins/io.containerd.nri.v1.nri/disable ["true"]`,
		`containerd/conf.d/a.toml:1 plugins/io.containerd.nri.v1.nri/default_validator/enable ["true"]`,
		`containerd/conf.d/a.toml:3 x/y ["1"]`,
		`containerd/conf.d/b.toml:1 version ["3"]`,
		`containerd/conf.d/b.toml:2 imports ["../config.toml"]`,
		`containerd/conf.d/b.toml:5 plugins/io.containerd.nri.v1.nri/disable ["false"]`,
		`containerd/conf.d/b.toml:5 plugins/io.containerd.nri.v1.nri/default_validator/required_plugins ["a" "tidewaiter"]`,
		`containerd/conf.d/z.toml fails`,
		`more.toml fails`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	none := &Host{Root: nodetest.Tree{}.Make(t), Distro: h.Distro}
	if files, _, err := none.Files(); err != nil || len(files) > 0 {
		t.Errorf("%v, %v", files, err)
	}
	many := nodetest.Tree{"/etc/containerd/config.toml": "imports = ['conf.d/*']\n"}
	for i := range maxImported {
		many[fmt.Sprintf("/etc/containerd/conf.d/%d", i)] = "x = 1\n"
	}
	if files, _, err := (&Host{Root: many.Make(t), Distro: h.Distro}).Files(); err == nil || len(files) != maxImported {
		t.Errorf("%d files, %v", len(files), err)
	}
}

// TestRunning finds this test as the process behind a socket, and follows it.
func TestRunning(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, "c.sock")
	h := &Host{Root: root, Distro: Distro{Socket: "/c.sock"}}
	if _, err := h.Running(time.Now()); err == nil {
		t.Error("nobody listens")
	}
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := h.Running(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if p.PID != os.Getpid() || p.Program != self || p.Replaced || p.Config != "" || time.Since(p.Started) < 0 || time.Since(p.Started) > time.Hour || time.Since(p.Listens).Abs() > time.Hour {
		t.Errorf("%+v", p)
	}
	h.Adopt(p, Options{})
	if h.Binary != "" {
		t.Errorf("%s is not below %s", h.Binary, root)
	}
	h.Root = "/"
	h.Adopt(&Process{PID: os.Getpid(), Program: self, Config: "/x/c.toml"}, Options{})
	if h.Binary != self || h.Config != "/x/c.toml" || h.DropIns != "/x/conf.d" {
		t.Errorf("%+v", h)
	}
	h = &Host{Root: "/", Distro: Distro{Config: "/said"}, Binary: "/said"}
	h.Adopt(&Process{PID: os.Getpid(), Program: self, Config: "/x/c.toml"}, Options{Config: "/said", Binary: "/said"})
	if h.Binary != "/said" || h.Config != "/said" {
		t.Errorf("%+v", h)
	}
}

func TestProcess(t *testing.T) {
	now := time.Unix(2000, 0)
	root := nodetest.Tree{
		"/7/stat":    "7 (a ) b) S 1 7 7 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 9 0 12345 1 1\n",
		"/7/cmdline": "containerd\x00-c\x00etc/c.toml\x00-a\x00x\x00",
		"/8/stat":    "8 (x) S\n",
		"/8/cmdline": "x",
		"/uptime":    "200.50 300.00\n",
	}.Make(t)
	for link, to := range map[string]string{"/7/exe": "/bin/containerd (deleted)", "/7/cwd": "/var"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	p, err := process(root, 7, now)
	if err != nil || *p != (Process{PID: 7, Program: "/bin/containerd", Replaced: true, Config: "/var/etc/c.toml", Started: now.Add(-77050 * time.Millisecond)}) {
		t.Errorf("%+v, %v", p, err)
	}
	for _, pid := range []int{8, 9} {
		if p, err := process(root, pid, now); err == nil {
			t.Errorf("%+v", p)
		}
	}
	for line, want := range map[string]string{
		"containerd": "", "containerd --config": "", "containerd --config /a": "/a", "containerd --config=/a -c /b": "/a", "containerd -a s -c /b": "/b",
	} {
		if got := configOf(strings.Fields(line)); got != want {
			t.Errorf("%s: %q", line, got)
		}
	}
}
