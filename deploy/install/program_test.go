package install

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestUpgrade keeps the previous program, and goes back to it.
func TestUpgrade(t *testing.T) {
	s := auditing(t, nodetest.K3s)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Enforce, s.Restart = false, false
	s.Self = []byte("\x00two")
	must(t, "upgrade", Installed)(s.Install(t.Context()))
	if s.text(t, node.GateBinary) != "\x00two" || s.text(t, node.GateBinary+".previous") != "\x00one" {
		t.Error("not the new program, or not the old one beside it")
	}
	was := snapshot(t, s.root)
	s.Self, s.broken = []byte("\x00three"), true
	refused(t, "a broken one", "the gate did not come up: after 1m0s")(s.Install(t.Context()))
	same(t, "taken back", was, snapshot(t, s.root))
	if s.away {
		t.Error("the previous program was not started")
	}
	s.heard(t, "log: install: the gate did not come up")
}

// TestFirstStartFails leaves nothing of a program that never ran here.
func TestFirstStartFails(t *testing.T) {
	s := newScene(t, nodetest.Kubeadm)
	clean := snapshot(t, s.root)
	s.away, s.broken = true, true
	refused(t, "install", "did not come up")(s.Install(t.Context()))
	is := snapshot(t, s.root)
	for _, left := range []string{"/var/lib/tidewaiter/install.json", "/var/lib/tidewaiter", "/var/lib", "/var"} {
		delete(is, left) // what it needs to take away what it could not
	}
	same(t, "taken back", clean, is)
	if last := s.commands[len(s.commands)-1]; last != "systemctl daemon-reload" {
		t.Errorf("last was %s", last)
	}
}

// TestKeptService: an older pod leaves the service to the newer program, too.
func TestKeptService(t *testing.T) {
	s := newScene(t, nodetest.Kubeadm)
	s.away, s.Watching = true, true
	s.Self, s.Release = []byte("\x00v2.0.0"), "v2.0.0"
	must(t, "install", Installed)(s.Install(t.Context()))
	const unit = "/etc/systemd/system/tidewaiter.service"
	s.write(t, unit, s.text(t, unit)+"# newer\n")
	s.Self, s.Release = []byte("\x00v1.0.0"), "v1.0.0"
	must(t, "an older pod", Nothing)(s.Install(t.Context()))
	s.Self, s.Release = []byte("\x00v3.0.0"), "v3.0.0"
	must(t, "a newer pod", Installed)(s.Install(t.Context()))
	if strings.Contains(s.text(t, unit), "# newer") {
		t.Error("a newer program left the service of an older one")
	}
}
