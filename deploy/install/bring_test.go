package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestBring has a mounted ConfigMap be the configuration of the host.
func TestBring(t *testing.T) {
	s := newScene(t, nodetest.K3s)
	s.away = true
	from := t.TempDir()
	write := func(version, config string) {
		t.Helper()
		dir := filepath.Join(from, ".."+version)
		if err := os.MkdirAll(filepath.Join(dir, "truststore"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"config.yaml": config, "trustpolicy.json": "{}", "truststore/ca.crt": version} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		os.Remove(filepath.Join(from, "..data"))
		if err := os.Symlink(".."+version, filepath.Join(from, "..data")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"config.yaml", "trustpolicy.json", "truststore"} {
			_ = os.Symlink("..data/"+name, filepath.Join(from, name))
		}
	}
	write("one", "mode: audit\n")
	s.From = from
	// What an operator wrote stays beside it.
	s.write(t, "/etc/tidewaiter/config.yaml", "mode: audit # mine\n")
	s.write(t, "/etc/tidewaiter/node.key", "secret")
	must(t, "install", Installed)(s.Install(t.Context()))
	if s.Exists("/etc/tidewaiter/node.key") || s.text(t, "/etc/tidewaiter.before/node.key") != "secret" || s.text(t, "/etc/tidewaiter.before/config.yaml") != "mode: audit # mine\n" {
		t.Error("the operator's configuration is gone, or not replaced")
	}
	if info, err := os.Stat(s.Path("/etc/tidewaiter.before")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	if got := s.text(t, "/etc/tidewaiter/truststore/ca.crt"); got != "one" {
		t.Errorf("%q", got)
	}
	must(t, "again", Nothing)(s.Install(t.Context()))
	write("two", "mode: audit\n")
	must(t, "a change", Installed)(s.Install(t.Context()))
	if s.Exists("/etc/tidewaiter.before/truststore") {
		t.Error("a copy was kept as if it were the operator's")
	}
	if got := s.text(t, "/etc/tidewaiter/truststore/ca.crt"); got != "two" {
		t.Errorf("%q", got)
	}
	was := snapshot(t, s.root)
	write("three", "broken\n")
	if _, err := s.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "is not valid on the host") {
		t.Errorf("%v", err)
	}
	same(t, "a broken one", was, snapshot(t, s.root))
	write("four", "mode: audit\n")
	s.Enforce, s.Restart = true, true
	refused(t, "enforce", "says mode: audit")(s.Install(t.Context()))
	write("five", "mode: enforce\n")
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Restart = false
	// A program that does not come up is tried once.
	s.Self, s.broken = []byte("\x00two"), true
	refused(t, "a broken program", "did not come up")(s.Install(t.Context()))
	s.Keep = true
	must(t, "after that", Nothing)(s.Install(t.Context()))
	// The way back by ConfigMap.
	write("six", "mode: audit\n")
	s.Enforce = false
	must(t, "back to audit", Installed)(s.Install(t.Context()))
	if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != "mode: audit\n" {
		t.Errorf("%q", got)
	}
}

// TestWatchesForward: of several pods that watch, the one with the newest program wins,
// and each is quiet after that. What cannot be compared is put there once.
func TestWatchesForward(t *testing.T) {
	for name, tt := range map[string]struct{ pods, hosts []string }{
		"a newer one":        {[]string{"v1.2.0", "v1.2.1"}, []string{"v1.2.0", "v1.2.1"}},
		"an older one":       {[]string{"v1.10.0", "v1.9.3"}, []string{"v1.10.0", "v1.10.0"}},
		"commits after it":   {[]string{"v1.2.0", "v1.2.0-4-gdeadbee", "v1.2.0"}, []string{"v1.2.0", "v1.2.0-4-gdeadbee", "v1.2.0-4-gdeadbee"}},
		"a candidate":        {[]string{"v1.2.0-rc.9", "v1.2.0-rc.10", "v1.2.0", "v1.2.0-rc.10"}, []string{"v1.2.0-rc.9", "v1.2.0-rc.10", "v1.2.0", "v1.2.0"}},
		"beside each other":  {[]string{"v1.0.0", "v1.1.0", "v1.0.0", "v1.1.0"}, []string{"v1.0.0", "v1.1.0", "v1.1.0", "v1.1.0"}},
		"not to be compared": {[]string{"one", "two", "one", "two", "three", "one"}, []string{"one", "two", "two", "two", "three", "three"}},
		"with local changes": {[]string{"v1.1.0-dirty", "v1.0.0", "v1.1.0-dirty"}, []string{"v1.1.0-dirty", "v1.0.0", "v1.0.0"}},
		"a hash of git":      {[]string{"v0", "v1.0.0", "v0"}, []string{"v0", "v1.0.0", "v1.0.0"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, nodetest.Kubeadm)
			s.away, s.Watching = true, true
			for k, v := range tt.pods {
				s.Self, s.Release = []byte("\x00"+v), v
				was := ""
				if k > 0 {
					was = tt.hosts[k-1]
				}
				want := Installed
				if tt.hosts[k] == was {
					want = Nothing
				}
				must(t, "pod of "+v, want)(s.Install(t.Context()))
				if got := s.text(t, node.GateBinary)[1:]; got != tt.hosts[k] {
					t.Fatalf("after the pod of %s the host has %s, want %s", v, got, tt.hosts[k])
				}
				if string(s.Self[1:]) != v || s.Keep {
					t.Errorf("the pod of %s forgot its program", v)
				}
				n := len(s.commands)
				must(t, "again", Nothing)(s.Install(t.Context()))
				if len(s.commands) != n {
					t.Errorf("ran %v", s.commands[n:])
				}
			}
			// By hand any program is put there, and stays where it cannot be compared.
			s.Watching = false
			s.Self = []byte("\x00" + tt.pods[0])
			if _, err := s.Install(t.Context()); err != nil || s.text(t, node.GateBinary)[1:] != tt.pods[0] {
				t.Errorf("by hand: %v", err)
			}
		})
	}
}
