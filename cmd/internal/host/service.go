package host

import (
	"context"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy"
)

// Where the gate is installed.
const (
	GateBinary = "/usr/local/bin/tidewaiter"
	Defaults   = "/etc/default/tidewaiter" // variables of its environment
)

// gate is the name of its service.
const gate = "tidewaiter"

// A Manager is what runs services on the host: systemd, OpenRC, or something else
// whose commands the operator named.
type Manager struct {
	Name string // "systemd", "openrc" or "none"

	host      *Host
	restart   []string // of containerd; nil: its service
	gateAgain []string // restart of the gate; nil: its service
}

func manager(h *Host, o Options) (Manager, error) {
	m := Manager{Name: o.Service, host: h, restart: words(o.Restart), gateAgain: words(o.Gate)}
	switch m.Name {
	case "systemd", "openrc", "none":
	case "":
		switch {
		case h.exists("/run/systemd/system"):
			m.Name = "systemd"
		case h.exists("/sbin/openrc-run"):
			m.Name = "openrc"
		default:
			m.Name = "none"
		}
	default:
		return m, hint("one of systemd, openrc, none", "--service: %q is not known", m.Name)
	}
	return m, nil
}

func words(s string) []string {
	if f := strings.Fields(s); len(f) > 0 {
		return f
	}
	return nil
}

// has reports whether there is a service of the name.
func (m Manager) has(name string) bool {
	switch m.Name {
	case "systemd":
		for _, dir := range []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"} {
			if m.host.exists(dir + "/" + name + ".service") {
				return true
			}
		}
	case "openrc":
		return m.host.exists("/etc/init.d/" + name)
	}
	return false
}

// file is what makes the gate a service; the path is empty where nothing does.
func (m Manager) file() (path, content string, mode os.FileMode) {
	switch m.Name {
	case "systemd":
		return "/etc/systemd/system/tidewaiter.service", deploy.Unit, 0o644
	case "openrc":
		return "/etc/init.d/tidewaiter", deploy.OpenRC, 0o755
	}
	return "", "", 0
}

// Restart is the command that restarts containerd; nil: it is not known.
func (m Manager) Restart() []string {
	switch {
	case m.restart != nil:
		return m.restart
	case m.host.Service == "":
		return nil
	case m.Name == "systemd":
		return []string{"systemctl", "restart", m.host.Service + ".service"}
	case m.Name == "openrc":
		return []string{"rc-service", m.host.Service, "restart"}
	}
	return nil
}

// Look is the command that says how a service is.
func (m Manager) Look(service string) string {
	switch m.Name {
	case "systemd":
		return "systemctl status " + service
	case "openrc":
		return "rc-service " + service + " status"
	}
	return "ask what supervises " + service + " here how it is"
}

// Begin is what starts the gate where it is installed.
func (m Manager) Begin() string {
	switch {
	case m.Name == "systemd":
		return "systemctl start " + gate
	case m.Name == "openrc":
		return "rc-service " + gate + " start"
	case m.gateAgain != nil:
		return strings.Join(m.gateAgain, " ")
	}
	return "by what supervises it here"
}

// start are the commands that start the gate, or start it anew, now and at boot.
func (m Manager) start() [][]string {
	switch {
	case m.Name == "systemd":
		return [][]string{{"systemctl", "daemon-reload"}, {"systemctl", "enable", gate + ".service"}, {"systemctl", "restart", gate + ".service"}}
	case m.Name == "openrc":
		return [][]string{{"rc-update", "add", gate, "default"}, {"rc-service", gate, "restart"}}
	case m.gateAgain != nil:
		return [][]string{m.gateAgain}
	}
	return nil
}

// stop are the commands that end it for good, before its files go, and after is what
// comes after them.
func (m Manager) stop() (before, after [][]string) {
	switch m.Name {
	case "systemd":
		return [][]string{{"systemctl", "disable", "--now", gate + ".service"}}, [][]string{{"systemctl", "daemon-reload"}}
	case "openrc":
		return [][]string{{"rc-service", gate, "stop"}, {"rc-update", "del", gate, "default"}}, nil
	}
	return nil, nil
}

// logs is where the gate says why it does not come up.
func (m Manager) logs(program string) string {
	switch m.Name {
	case "systemd":
		return "journalctl -u " + gate
	case "openrc":
		return "tail /var/log/tidewaiter.log"
	}
	return "see what the supervisor of the gate logged, or what " + program + " run prints"
}

func (m Manager) run(ctx context.Context, commands [][]string) error {
	for _, c := range commands {
		if _, err := m.host.Run(ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}
