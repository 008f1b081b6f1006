package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A machine is a root file system of its own for everything that runs on a node:
// what is below / here, with the changes that the node makes on top of it, in a
// mount namespace that ends with the last of its processes. containerd has its
// files there where a host has them, a DaemonSet's host paths are what they say,
// and Changes tells what an installer left behind. Network, processes and cgroups
// are those of the host that the tests run on.
//
// Some directories are this host's disk, since overlays and containers need one,
// and are not in Changes: see disks. /run is empty after each boot.

// nodeVariable is in the environment of everything that a node starts, and with it
// of what that starts, but for containers: the keeper finds processes by it.
const nodeVariable = "TIDEWAITER_TEST_NODE"

// layout says where a machine has what other nodes have below their directory.
var layout = map[string]string{
	configFile:    "/etc/containerd/config.toml",
	"conf.d":      "/etc/containerd/conf.d",
	"certs.d":     "/etc/containerd/certs.d",
	"root":        "/var/lib/containerd",
	"state":       "/run/containerd",
	"s":           "/run/containerd/s",
	socketFile:    "/run/containerd/containerd.sock",
	nriFile:       "/run/nri/nri.sock",
	"nri/plugins": "/opt/nri/plugins",
	"nri/conf.d":  "/etc/nri/conf.d",
	"opt":         "/opt/containerd",
	"verifiers":   "/opt/containerd/image-verifier/bin",
	"cni":         "/etc/cni/net.d",
	"cni-bin":     "/opt/cni/bin",
	runcDir:       "/run/containerd/runc",
	"logs":        "/var/log/pods",
	"run":         "/run/tidewaiter",
}

// disks are directories of a machine that lie on the disk below Node.Dir.
var disks = []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/etcd", "/var/log"}

// strange are what this host may have, and a machine has only if a test puts it
// there.
var strange = []string{
	"/etc/containerd", "/etc/nri", "/etc/cni", "/etc/kubernetes", "/etc/rancher", "/etc/tidewaiter",
	"/opt/nri", "/opt/cni", "/opt/containerd", "/var/lib/rancher", "/var/lib/tidewaiter", "/var/snap",
}

// machineScript makes the namespace's root file system. Its arguments are the node's
// directory, the cache of tools, and disks. The process stays as what holds the
// namespace.
const machineScript = `set -e
dir=$1 cache=$2
shift 2
mount -t overlay machine -o lowerdir=/,upperdir="$dir/machine/upper",workdir="$dir/machine/work" "$dir/machine/root"
cd "$dir/machine/root"
for d in proc sys dev; do mount --rbind "/$d" "$d"; done
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mkdir -p run/lock
for d in "$dir" "$cache"; do mkdir -p ".$d"; mount --bind "$d" ".$d"; done
for d; do mkdir -p "$dir/disk$d" ".$d"; mount --bind "$dir/disk$d" ".$d"; done
mkdir -p run/old
pivot_root . run/old
umount -l /run/old
rmdir /run/old
mount --make-rshared /
echo booted
exec sleep infinity
`

// boot makes the machine's namespace. What the disk and the changes have is as it
// was when the one before ended.
func (n *Node) boot(ctx context.Context) error {
	upper := filepath.Join(n.Dir, "machine", "upper")
	first := false
	if _, err := os.Stat(upper); err != nil {
		first = true
		// A tmpfs, since the host's root can be an overlay, on which none can be stacked.
		top := filepath.Join(n.Dir, "machine")
		if err := os.Mkdir(top, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("machine", top, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		for _, d := range []string{"upper", "work", "root"} {
			if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
				return err
			}
		}
	}
	cache, err := cached("")
	if err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", machineScript, "machine", n.Dir, cache}, disks...)...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), nodeVariable+"="+n.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: syscall.CLONE_NEWNS}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	p, err := startProcess(cmd)
	w.Close()
	if err != nil {
		return fmt.Errorf("machine: %w", err)
	}
	n.machine = p
	var said []string
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if said = append(said, lines.Text()); lines.Text() == "booted" {
			link := n.Root
			_ = os.Remove(link)
			if err := os.Symlink(fmt.Sprintf("/proc/%d/root", cmd.Process.Pid), link); err != nil {
				return err
			}
			if first {
				for _, d := range strange {
					if err := os.RemoveAll(n.Path(d)); err != nil {
						return err
					}
				}
			}
			return nil
		}
	}
	return fmt.Errorf("machine: no root file system: %s", strings.Join(said, "; "))
}

// Path is where the tests find what the node's own processes call path.
func (n *Node) Path(path string) string { return n.Root + path }

// inside is what the node's own processes call a thing of the node's directory.
func (n *Node) inside(name string) string {
	if n.Root == "" {
		return filepath.Join(n.Dir, name)
	}
	if path, ok := layout[name]; ok {
		return path
	}
	panic("a machine has no place for " + name)
}

// PID is the process that holds a machine's mount namespace.
func (n *Node) PID() int { return n.machine.cmd.Process.Pid }

// Command is a command that runs on the node: on its root file system if it has
// one. It ends with the node whoever started it.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if n.Root != "" {
		args = append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", n.PID()), "--", name}, args...)
		name = "nsenter"
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), nodeVariable+"="+n.Dir)
	return cmd
}

// Output runs a command on the node and returns what it printed.
func (n *Node) Output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := output(n.Command(ctx, name, args...))
	return string(out), err
}

// A Daemon is a program that runs on the node until it is stopped or the node is.
type Daemon struct {
	Name string

	log     string
	process *process
}

// StartDaemon starts a program on the node. Its log, which all daemons of a name
// share, is Node.Dir/NAME.log.
func (n *Node) StartDaemon(name string, argv ...string) (*Daemon, error) {
	d := &Daemon{Name: name, log: filepath.Join(n.Dir, name+".log")}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped {
		return nil, errors.New(name + ": the node is stopped")
	}
	cmd := n.Command(context.Background(), argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if d.process, err = startProcess(cmd); err != nil {
		return nil, err
	}
	n.daemons = append(n.daemons, d)
	return d, nil
}

// Stop ends the daemon with a signal, with SIGKILL after 20 s, and waits for its
// end.
func (d *Daemon) Stop(sig syscall.Signal) { d.process.stop(sig, 20*time.Second) }

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.process.done }

// PID is its process.
func (d *Daemon) PID() int { return d.process.cmd.Process.Pid }

// Log returns what the daemon and those before it under its name have printed.
func (d *Daemon) Log() string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Changes returns the files and links that a machine's root file system has more or
// other than this host, sorted; what was removed is there too, and directories only
// where they are new and empty. Disks, /run and /tmp are left out.
func (n *Node) Changes() ([]string, error) {
	top := filepath.Join(n.Dir, "machine", "upper")
	var changed []string
	err := filepath.WalkDir(top, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, top)
		if !e.IsDir() {
			changed = append(changed, rel)
			return nil
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		if _, err := os.Lstat(rel); err != nil && len(entries) == 0 && !slices.ContainsFunc(disks, func(d string) bool { return d == rel }) {
			changed = append(changed, rel+"/")
		}
		return nil
	})
	slices.Sort(changed)
	return changed, err
}

// Cgroup is the cgroup below which the node's containers are: "/tw-node-1234".
func (n *Node) Cgroup() string { return cgroupParent(n.Dir) }

// MakeCgroup makes Cgroup, which otherwise is there from the first container on.
func (n *Node) MakeCgroup() error {
	for _, m := range mounts() {
		if m.kind != "cgroup" && m.kind != "cgroup2" {
			continue
		}
		if err := os.MkdirAll(filepath.Join(m.point, n.Cgroup()), 0o755); err != nil {
			return err
		}
	}
	return nil
}
