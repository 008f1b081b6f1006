package node

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

// GateName is the name of its service.
const GateName = "tidewaiter"

// A Manager is what runs services on the host: systemd, OpenRC, or something else
// whose commands the operator named.
type Manager struct {
	Name string // "systemd", "openrc" or "none"

	host              *Host
	ContainerdCommand []string // of containerd; nil: its service
	GateCommand       []string // restart of the gate; nil: its service
}

func manager(h *Host, o Options) (Manager, error) {
	m := Manager{Name: o.Service, host: h, ContainerdCommand: words(o.Restart), GateCommand: words(o.Gate)}
	switch m.Name {
	case "systemd", "openrc", "none":
	case "":
		switch {
		case h.Exists("/run/systemd/system"):
			m.Name = "systemd"
		case h.Exists("/sbin/openrc-run"):
			m.Name = "openrc"
		default:
			m.Name = "none"
		}
	default:
		return m, Hintf("one of systemd, openrc, none", "--service: %q is not known", m.Name)
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
			if m.host.Exists(dir + "/" + name + ".service") {
				return true
			}
		}
	case "openrc":
		return m.host.Exists("/etc/init.d/" + name)
	}
	return false
}

// File is what makes the gate a service; the path is empty where nothing does.
func (m Manager) File() (path, content string, mode os.FileMode) {
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
	case m.ContainerdCommand != nil:
		return m.ContainerdCommand
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

// Begin is the command that starts the gate if it is installed.
func (m Manager) Begin() string {
	switch {
	case m.Name == "systemd":
		return "systemctl start " + GateName
	case m.Name == "openrc":
		return "rc-service " + GateName + " start"
	case m.GateCommand != nil:
		return strings.Join(m.GateCommand, " ")
	}
	return "by what supervises it here"
}

// Start are the commands that start or restart the gate, now and at boot.
func (m Manager) Start() [][]string {
	switch {
	case m.Name == "systemd":
		return [][]string{{"systemctl", "daemon-reload"}, {"systemctl", "enable", GateName + ".service"}, {"systemctl", "restart", GateName + ".service"}}
	case m.Name == "openrc":
		return [][]string{{"rc-update", "add", GateName, "default"}, {"rc-service", GateName, "restart"}}
	case m.GateCommand != nil:
		return [][]string{m.GateCommand}
	}
	return nil
}

// Stop are the commands that end it for good, before its files go, and after is what
// comes after them.
func (m Manager) Stop() (before, after [][]string) {
	switch m.Name {
	case "systemd":
		return [][]string{{"systemctl", "disable", "--now", GateName + ".service"}}, [][]string{{"systemctl", "daemon-reload"}}
	case "openrc":
		return [][]string{{"rc-service", GateName, "stop"}, {"rc-update", "del", GateName, "default"}}, nil
	}
	return nil, nil
}

// Logs is where the gate says why it does not come up.
func (m Manager) Logs(program string) string {
	switch m.Name {
	case "systemd":
		return "journalctl -u " + GateName
	case "openrc":
		return "tail /var/log/tidewaiter.log"
	}
	return "see what the supervisor of the gate logged, or what " + program + " run prints"
}

// Run runs commands in their order, up to one that fails.
func (m Manager) Run(ctx context.Context, commands [][]string) error {
	for _, c := range commands {
		if _, err := m.host.Run(ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}
