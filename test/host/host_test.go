// Package host tests `tidewaiter install` and `uninstall` where they are made for:
// on a node whose files, containerd and services are a host's, with this package in
// the place of systemd. The steps of docs/lockout.md are among what it does.
package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/host: a node needs root")
		os.Exit(m.Run())
	}
	leaktest.Main(m)
}

// systemctl asks the test to do what systemd would.
const systemctl = `#!/bin/sh
echo "$@" > /run/systemd/requests/$$.new
mv /run/systemd/requests/$$.new /run/systemd/requests/$$.request
while [ ! -e /run/systemd/requests/$$.reply ]; do sleep 0.05; done
exit "$(cat /run/systemd/requests/$$.reply)"
`

// A machine is a host.
type machine struct {
	*testing.T
	*node.Node
	ctx     context.Context
	reg     *node.Registry
	program string // the release that is installed, outside the machine
	served  chan struct{}
	good    *node.Image
	evil    *node.Image

	mu      sync.Mutex
	notify  *net.UnixConn
	gate    *node.Daemon // nil: its service is stopped
	crashes string       // a program that ends with these bytes ends at once instead of running
}

func newMachine(t *testing.T, version string) *machine {
	if os.Geteuid() != 0 {
		t.Skip("a node needs root")
	}
	// What is built the first time has the time that it takes.
	_, err := node.FindTools(t.Context(), version, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	program, err := node.BuildTidewaiter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	m := &machine{T: t, ctx: ctx, program: program, served: make(chan struct{})}
	m.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{})
	m.must(err)
	t.Cleanup(func() { m.must(m.reg.Stop()) })
	pause, err := m.reg.Push(ctx, "pause:1", node.ImageOptions{Word: "pause"})
	m.must(err)
	m.Node, err = node.Start(ctx, node.Options{ContainerdVersion: version, Machine: true, Log: t.Output(), DropIns: map[string]string{
		"10-pause.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '" + pause.Name + "'\n",
	}})
	m.must(err)
	t.Cleanup(func() { m.must(m.Stop()) })
	m.must(m.Use(m.reg))
	_, err = m.PullImage(ctx, pause.Name)
	m.must(err)

	m.good, err = m.reg.Push(ctx, "app:good", node.ImageOptions{Word: "good"})
	m.must(err)
	m.evil, err = m.reg.Push(ctx, "app:evil", node.ImageOptions{Word: "evil"})
	m.must(err)
	for _, img := range []*node.Image{m.good, pause} {
		_, err = m.reg.Sign(ctx, img, release)
		m.must(err)
	}

	// What a host has that systemd has started.
	m.put("/usr/local/sbin/systemctl", systemctl, 0o755)
	m.put("/etc/systemd/system/containerd.service", "[Service]\nExecStart=/usr/local/bin/containerd\n", 0o644)
	m.must(os.MkdirAll(m.Path("/run/systemd/system"), 0o755))
	m.must(os.MkdirAll(m.Path("/run/systemd/requests"), 0o755))
	m.must(os.Symlink(m.Tools.Containerd, m.Path("/usr/local/bin/containerd")))
	m.put("/root/tidewaiter", "", 0o755)
	m.release(m.program, "")
	serve, end := context.WithCancel(ctx)
	go m.serve(serve)
	t.Cleanup(func() {
		end()
		<-m.served
		if m.notify != nil {
			m.notify.Close()
		}
	})
	return m
}

var (
	acme    = notarytest.NewCA(notarytest.CAOptions{})
	release = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

func (m *machine) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

func (m *machine) put(name, content string, mode os.FileMode) {
	m.Helper()
	m.must(os.MkdirAll(filepath.Dir(m.Path(name)), 0o755))
	m.must(os.WriteFile(m.Path(name), []byte(content), mode))
}

// release puts a release of the program where an operator has it: program and more
// bytes, which the kernel does not look at.
func (m *machine) release(program, more string) {
	m.Helper()
	raw, err := os.ReadFile(program)
	m.must(err)
	m.put("/root/tidewaiter", string(raw)+more, 0o755)
}

// serve is systemd: it restarts what it is asked to restart, and the gate whenever it
// ends.
func (m *machine) serve(ctx context.Context) {
	defer close(m.served)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(30 * time.Millisecond):
		}
		m.mu.Lock()
		if m.gate != nil {
			select {
			case <-m.gate.Done():
				if err := m.startGate(); err != nil {
					m.T.Log(err) // Restart=always: again
				}
			default:
			}
		}
		m.mu.Unlock()
		requests, _ := filepath.Glob(m.Path("/run/systemd/requests/*.request"))
		for _, r := range requests {
			raw, err := os.ReadFile(r)
			if err == nil {
				err = os.Remove(r)
			}
			if err == nil {
				err = m.systemd(ctx, strings.TrimSpace(string(raw)))
			}
			status := "0"
			if err != nil {
				m.Logf("systemctl %s: %v", raw, err)
				status = "1"
			}
			reply := strings.TrimSuffix(r, ".request") + ".reply"
			if err := os.WriteFile(reply+".new", []byte(status+"\n"), 0o644); err == nil {
				err = os.Rename(reply+".new", reply)
				if err != nil {
					m.Error(err)
				}
			}
		}
	}
}

func (m *machine) systemd(ctx context.Context, line string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	stop := func() {
		if m.gate != nil {
			m.gate.Stop(syscall.SIGTERM)
			m.gate = nil
		}
	}
	switch line {
	case "daemon-reload", "enable tidewaiter.service":
		return nil
	case "disable --now tidewaiter.service":
		stop()
		return nil
	case "restart tidewaiter.service":
		stop()
		return m.startGate()
	case "restart containerd.service":
		return m.Node.Restart(ctx)
	}
	return errors.New("what is that?")
}

func (m *machine) startGate() error {
	unit, err := os.ReadFile(m.Path("/etc/systemd/system/tidewaiter.service"))
	if err != nil {
		return err
	}
	if !strings.Contains(string(unit), "\nExecStart=/usr/local/bin/tidewaiter run\n") {
		return fmt.Errorf("the unit is\n%s", unit)
	}
	program, err := os.ReadFile(m.Path("/usr/local/bin/tidewaiter"))
	if err != nil {
		return err
	}
	run := []string{"/usr/local/bin/tidewaiter", "run", "--node", "edge-1"}
	if m.crashes != "" && strings.HasSuffix(string(program), m.crashes) {
		run = []string{"sleep", "0.2"}
	}
	ready := m.Path("/run/systemd/notify")
	_ = os.Remove(ready)
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: ready, Net: "unixgram"})
	if err != nil {
		return err
	}
	m.gate, err = m.StartDaemon("tidewaiter", append([]string{"sh", "-ec", confined, "sh"}, run...)...)
	if err != nil {
		l.Close()
		return err
	}
	if m.notify != nil {
		m.notify.Close()
	}
	m.notify = l
	// Type=notify: it has started when it says so, or has ended.
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
		select {
		case <-m.gate.Done():
			return errors.New("it ended before it was ready")
		default:
		}
		_ = l.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		b := make([]byte, 1000)
		if n, _ := l.Read(b); strings.HasPrefix(string(b[:n]), "READY=1\n") {
			return nil
		}
	}
	return errors.New("it did not say that it is ready")
}

// confined does to the gate what its unit has systemd do, as far as it goes without:
// a file system that it cannot write to but for its two directories, no capability,
// and no new privileges.
const confined = `mkdir -p -m 0700 /run/tidewaiter /var/lib/tidewaiter
exec unshare --mount --propagation private sh -ec '
for d in /run/tidewaiter /var/lib/tidewaiter; do mount --bind $d $d; done
for d in / /run; do mount -o remount,bind,ro $d; done
if touch /etc/x /run/x 2>/dev/null; then exit 9; fi
NOTIFY_SOCKET=/run/systemd/notify exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"' sh "$@"
`

// tidewaiter runs the operator's program and returns what it printed. status is what
// it must end with.
func (m *machine) tidewaiter(status int, args ...string) string {
	m.Helper()
	cmd := m.Command(m.ctx, "/root/tidewaiter", args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		m.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != status {
		m.Fatalf("tidewaiter %s: exit status %d, want %d\n%s", strings.Join(args, " "), got, status, out)
	}
	return string(out)
}

func (m *machine) says(text, want string) {
	m.Helper()
	if !strings.Contains(text, want) {
		m.Errorf("%q is not in\n%s", want, text)
	}
}

// starts runs an image in a pod of its own, and ends it.
func (m *machine) starts(img *node.Image) error {
	p, err := m.RunPod(m.ctx, node.PodOptions{})
	m.must(err)
	defer func() { m.must(p.Remove(m.ctx)) }()
	_, err = p.Run(m.ctx, img.Name, node.ContainerOptions{}, node.Retry{})
	return err
}

func (m *machine) allowed(img *node.Image) {
	m.Helper()
	// A gate that was just registered may not know the image yet.
	var err error
	for range 200 {
		if err = m.starts(img); err == nil || !node.Pending(err) {
			break
		}
		time.Sleep(250 * time.Millisecond)
	}
	if err != nil {
		m.Errorf("%s was refused: %v", img.Name, err)
	}
}

func (m *machine) denied(img *node.Image, why string) {
	m.Helper()
	var err error
	for range 200 {
		if err = m.starts(img); err == nil || !node.Pending(err) || why == "PENDING" {
			break
		}
		time.Sleep(250 * time.Millisecond)
	}
	if err == nil || !strings.Contains(node.Text(err), why) {
		m.Errorf("%s: %v, want %s", img.Name, err, why)
	}
}

// absent is what containerd says while it requires a gate that is away.
const absent = "not present"

func (m *machine) changes() []string {
	m.Helper()
	c, err := m.Changes()
	m.must(err)
	// containerd makes that itself, and another one may on the machine of the tests.
	return slices.DeleteFunc(c, func(p string) bool { return strings.HasPrefix(p, "/opt/containerd/") })
}

// bytes are what containerd is configured with.
func (m *machine) configured() string {
	m.Helper()
	out, err := m.Output(m.ctx, "sh", "-c", "cd /etc/containerd && find . -type f -exec sha256sum {} + | sort")
	m.must(err)
	return out
}

const (
	dropIn      = "/etc/containerd/conf.d/99-tidewaiter.toml"
	dropInPause = "/etc/containerd/conf.d/99-tidewaiter-pause.toml"
)

// TestHost is the life of a gate on a host: audit, enforce, upgrades, what goes wrong,
// the ways back in, and the end.
func TestHost(t *testing.T) {
	for _, version := range node.Versions(node.Containerd24, node.Containerd23) {
		t.Run(version, func(t *testing.T) {
			m := newMachine(t, version)
			clean, configured := m.changes(), m.configured()

			// --dry-run changes nothing; install audits, and touches nothing of containerd.
			m.says(m.tidewaiter(0, "install", "--dry-run"), "would write /etc/systemd/system/tidewaiter.service")
			if c := m.changes(); !slices.Equal(c, clean) {
				t.Errorf("--dry-run changed %v", c)
			}
			m.says(m.tidewaiter(0, "install"), "started the gate\ninstalled\n")
			m.says(m.tidewaiter(0, "install"), "nothing to do\n")
			if m.configured() != configured {
				t.Errorf("install changed\n%s", m.configured())
			}

			// The operator says whom to trust, and looks at what enforce would refuse.
			m.must(node.WriteConfig(m.Path("/etc/tidewaiter"), m.policy("audit")))
			pod, err := m.RunPod(m.ctx, node.PodOptions{})
			m.must(err)
			_, err = pod.Run(m.ctx, m.evil.Name, node.ContainerOptions{}, node.Retry{})
			m.must(err)
			out := m.tidewaiter(1, "install", "--enforce")
			m.says(out, m.evil.Name+": SIGNATURE_MISSING")
			m.says(out, "refused: 1 of what runs here would be refused")
			m.must(pod.Remove(m.ctx))
			if m.configured() != configured {
				t.Errorf("a refusal changed\n%s", m.configured())
			}

			// A drop-in of somebody else that overrides ours: found by containerd's own
			// program, and taken back.
			m.put("/etc/containerd/conf.d/zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = false\n", 0o644)
			out = m.tidewaiter(1, "install", "--enforce")
			m.says(out, "another file overrides ours: taken back")
			m.put("/etc/containerd/conf.d/zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'\n", 0o644)
			m.says(m.tidewaiter(1, "install", "--enforce"), "containerd would not start: ")
			m.must(os.Remove(m.Path("/etc/containerd/conf.d/zz.toml")))
			if m.configured() != configured {
				t.Errorf("it was not taken back:\n%s", m.configured())
			}
			m.until("audit again", func() bool { return m.starts(m.evil) == nil })

			// Enforce. The pause image is named by digest, and pods still start.
			out = m.tidewaiter(0, "install", "--enforce")
			m.says(out, "next: systemctl restart containerd.service\n")
			m.denied(m.evil, "SIGNATURE_MISSING") // by the gate; not required yet
			out = m.tidewaiter(0, "install", "--enforce", "--restart")
			m.says(out, "installed: the gate enforces, and containerd refuses containers while it is away")
			m.says(out, `ok    unsigned  rule "prod", `)
			m.says(out, "enforced: everything was as it must be\n")
			raw, err := os.ReadFile(m.Path(dropInPause))
			if err != nil || !strings.Contains(string(raw), "registry.example/pause@sha256:") {
				t.Errorf("%s, %v", raw, err)
			}
			m.allowed(m.good)
			m.denied(m.evil, "SIGNATURE_MISSING")
			m.says(m.tidewaiter(0, "install", "--enforce"), "nothing to do\n")

			// An upgrade keeps the program before it; one that crashes is taken back.
			m.release(m.program, "two")
			m.says(m.tidewaiter(0, "install"), "wrote /usr/local/bin/tidewaiter.previous\n")
			m.allowed(m.good)
			m.crash("three")
			m.release(m.program, "three")
			m.says(m.tidewaiter(1, "install", "--wait", "8s"), "the gate did not come up")
			raw, err = os.ReadFile(m.Path("/usr/local/bin/tidewaiter"))
			if err != nil || !strings.HasSuffix(string(raw), "two") {
				t.Errorf("the program before is not back: %v", err)
			}
			m.allowed(m.good)
			m.denied(m.evil, "SIGNATURE_MISSING")

			// Locked out: the gate ends again and again. The program before it, by hand.
			_, err = m.Output(m.ctx, "sh", "-ec", "mv /usr/local/bin/tidewaiter.previous /usr/local/bin/tidewaiter; systemctl restart tidewaiter.service")
			m.must(err)
			m.allowed(m.good)
			m.denied(m.evil, "SIGNATURE_MISSING")

			// Locked out: back to audit by a file.
			m.edit("/etc/tidewaiter/config.yaml", "mode: enforce", "mode: audit")
			m.until("audit", func() bool { return m.starts(m.evil) == nil })
			m.edit("/etc/tidewaiter/config.yaml", "mode: audit", "mode: enforce")
			m.until("enforce", func() bool { return m.starts(m.evil) != nil })

			// Locked out: no program at all. One rm and one restart.
			m.stopService()
			m.denied(m.good, absent)
			_, err = m.Output(m.ctx, "rm", dropIn)
			m.must(err)
			m.must(m.Node.Restart(m.ctx))
			m.allowed(m.evil)

			// The gate does not register after the restart: everything is taken back.
			m.edit("/etc/tidewaiter/config.yaml", "mode: enforce", "mode: audit")
			m.crash("")
			m.says(m.tidewaiter(0, "install"), "started the gate")
			before := m.configured()
			m.put("/usr/local/bin/restart-and-break", "#!/bin/sh\nrm -f /run/nri/nri.sock.away\nsystemctl restart containerd.service\nif [ -e /run/once ]; then exit 0; fi\ntouch /run/once\nkill -STOP $(cat /run/gate.pid)\n", 0o755)
			m.put("/run/gate.pid", fmt.Sprint(m.pid()), 0o644)
			out = m.tidewaiter(2, "install", "--enforce", "--restart", "--wait", "8s", "--restart-command", "/usr/local/bin/restart-and-break")
			m.says(out, "not registered after the restart of containerd")
			m.says(out, "taken back: the files are as they were, but the gate is not: ") // it hangs
			if m.configured() != before {
				t.Errorf("not taken back:\n%s", m.configured())
			}
			m.must(syscall.Kill(m.pid(), syscall.SIGCONT))
			m.must(os.Remove(m.Path("/usr/local/bin/restart-and-break")))
			m.until("audit again", func() bool { return m.starts(m.evil) == nil })

			// Locked out: the daemon is dead, the mirror is gone. One command.
			m.says(m.tidewaiter(0, "install", "--enforce", "--restart"), "installed: the gate enforces")
			m.stopService()
			m.denied(m.good, absent)
			m.reg.Fault(func(http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
			})
			out = m.tidewaiter(0, "uninstall", "--restart")
			m.says(out, "removed "+dropIn+"\n")
			m.says(out, "restarted containerd")
			m.allowed(m.good)
			m.allowed(m.evil)
			if _, err := os.Stat(m.Path("/etc/tidewaiter/config.yaml")); err != nil {
				t.Errorf("the configuration is gone: %v", err)
			}

			// And nothing is left.
			m.says(m.tidewaiter(0, "uninstall", "--purge"), "removed /etc/tidewaiter\n")
			if c := m.changes(); !slices.Equal(c, clean) {
				t.Errorf("left or lost: %v, was %v", c, clean)
			}
			if m.configured() != configured {
				t.Errorf("containerd's configuration is\n%s", m.configured())
			}
			m.says(m.tidewaiter(0, "uninstall"), "nothing to do\n")
		})
	}
}

// TestFromOutside has the program bring a configuration and itself to a host whose
// root file system it sees in a directory, as in a pod.
func TestFromOutside(t *testing.T) {
	m := newMachine(t, node.Containerd24)
	clean := m.changes()
	from := t.TempDir()
	outside := func(status int, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(m.ctx, m.program, append(args, "--root", m.Root)...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != status {
			t.Fatalf("tidewaiter %s: exit status %d, want %d\n%s", strings.Join(args, " "), got, status, out)
		}
		return string(out)
	}
	m.must(node.WriteConfig(from, m.policy("audit")))
	out := outside(0, "install", "--config-from", from)
	m.says(out, "copied the configuration to /etc/tidewaiter\n")
	m.says(out, "started the gate\ninstalled\n")
	m.says(outside(0, "install", "--config-from", from), "nothing to do\n")
	m.allowed(m.evil)
	m.says(outside(1, "install", "--config-from", from, "--enforce", "--restart"), "says mode: audit")
	m.must(node.WriteConfig(from, m.policy("enforce")))

	// It follows: the configuration changes, and goes back.
	cmd := exec.CommandContext(m.ctx, m.program, "install", "--root", m.Root, "--config-from", from, "--enforce", "--restart", "--watch")
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	m.must(err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	m.must(cmd.Start())
	end := sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("it ended with %v", err)
		}
		if raw, err := os.ReadFile(log.Name()); err == nil {
			t.Logf("%s", raw)
		}
	})
	defer end()
	m.until("required", func() bool {
		raw, err := os.ReadFile(log.Name())
		return err == nil && strings.Contains(string(raw), "and containerd refuses containers while it is away")
	})
	m.denied(m.evil, "SIGNATURE_MISSING")
	m.allowed(m.good)
	m.must(node.WriteConfig(from, m.policy("audit")))
	m.until("audit by ConfigMap", func() bool { return m.starts(m.evil) == nil })
	end()

	m.says(outside(0, "uninstall", "--restart", "--purge"), "removed /etc/tidewaiter\n")
	if c := m.changes(); !slices.Equal(c, clean) {
		t.Errorf("left or lost: %v, was %v", c, clean)
	}
}

// policy trusts acme for everything at the registry.
func (m *machine) policy(mode string) node.Config {
	prod := notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")
	prod.Scopes = []string{"*"}
	return node.Config{
		Mode: mode, Mirrors: []node.Mirror{m.reg.Mirror()},
		Stores: notarytest.Stores{"ca/acme/root.crt": acme.PEM()}, Statements: []verify.Statement{prod},
	}
}

func (m *machine) edit(name, old, now string) {
	m.Helper()
	raw, err := os.ReadFile(m.Path(name))
	m.must(err)
	if !strings.Contains(string(raw), old) {
		m.Fatalf("%s has no %q:\n%s", name, old, raw)
	}
	m.must(os.WriteFile(m.Path(name)+".new", []byte(strings.Replace(string(raw), old, now, 1)), 0o644))
	m.must(os.Rename(m.Path(name)+".new", m.Path(name)))
}

func (m *machine) until(what string, is func() bool) {
	m.Helper()
	for range 900 {
		if is() {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	m.Errorf("not %s", what)
}

func (m *machine) crash(release string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.crashes = release
}

// pid is that of the gate.
func (m *machine) pid() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gate.PID()
}

// stopService is systemctl stop tidewaiter: its service is not started again.
func (m *machine) stopService() {
	m.Helper()
	_, err := m.Output(m.ctx, "systemctl", "disable", "--now", "tidewaiter.service")
	m.must(err)
}
