// Package node runs a throwaway node: a real containerd with its own
// directories and sockets, registries in this process, a CRI client that asks as
// a kubelet does, and Tidewaiter as a process of its own. Tests and the demo
// stand on it.
//
// A node needs root and Linux, and the go command: [FindTools] builds containerd,
// runc and the rest once, from the Go module proxy. Nothing outside the node's
// directory is changed, but for cgroups under a name of its own (and, with
// containerd before 2.4, sockets under /run/containerd/s), and all of it is gone
// after [Node.Stop] and also when the process dies: see Start.
//
//	n, err := node.Start(ctx, node.Options{ContainerdVersion: node.Containerd24})
//	defer n.Stop()
//	reg, err := node.NewRegistry("registry.example", node.RegistryOptions{})
//	defer reg.Stop()
//	err = n.Use(reg)
//	img, err := reg.Push(ctx, "app:1", node.ImageOptions{Word: "hello"})
//	c, err := n.Run(ctx, img.Name, node.RunOptions{})
//
// Methods may be called from several goroutines at once, except those that start
// and stop things: Stop, StopContainerd, StartContainerd, Restart, DropIn, Require,
// PowerCut, NewDisk, NewDistribution.
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Options say what node to start. The zero value is a node with containerd 2.4
// that asks no plugin.
type Options struct {
	// ContainerdVersion is a 2.x release such as "2.2.9". Empty means Containerd24.
	ContainerdVersion string

	// Dir is where the node's directory is made. It must be short, since paths of
	// unix sockets are. Empty means /tmp.
	Dir string

	// Required makes containerd refuse every container while Tidewaiter is not
	// connected: it installs RequiredDropIn as 99-tidewaiter.toml.
	Required bool

	// RequestTimeout is how long containerd waits for an NRI plugin's answer. Zero
	// means containerd's default, 2 s.
	RequestTimeout time.Duration

	// DropIns are more configuration, merged in the order of their file names:
	// name (ending in .toml) to content.
	DropIns map[string]string

	// Machine gives the node a root file system of its own: containerd, and what
	// Node.Command, StartDaemon and StartGate run, see their files where a host has
	// them. Node.Path leads there.
	Machine bool

	// Log gets a line for each thing that takes long. Nil means nobody reads it.
	// containerd's own log is Node.Log; the error of a Start that failed ends with it.
	Log io.Writer
}

// RequiredDropIn is what an operator installs to make Tidewaiter required.
const RequiredDropIn = `version = 3

[plugins."io.containerd.nri.v1.nri".default_validator]
  enable = true
  required_plugins = ["tidewaiter"]
`

// OtherHandler is a second runtime handler of every node: runc by another name.
const OtherHandler = "other"

// RequiredFile is the name of the drop-in with RequiredDropIn.
const RequiredFile = "99-tidewaiter.toml"

// Inside a node's directory. The shims' sockets have to stay within 42 bytes
// with the directory.
const (
	dirPrefix  = "tw-node-"
	configFile = "config.toml"
	socketFile = "c.sock"
	nriFile    = "nri/nri.sock"
	runcDir    = "runc"

	distributionFile = "distribution.yml"
)

// A Node is a running node. The paths do not change.
type Node struct {
	Dir        string // everything is below; deleted by Stop
	Root       string // of a machine's files, for Path; else empty
	Version    string // of containerd, without v
	Socket     string // containerd's, CRI included
	NRISocket  string
	ConfigPath string // containerd's config.toml; it imports DropInDir/*.toml
	DropInDir  string
	CertsDir   string // certs.d, read by containerd at every pull
	Tools      *Tools

	Runtime runtimeapi.RuntimeServiceClient // CRI
	Images  runtimeapi.ImageServiceClient

	log    io.Writer
	keeper *keeper
	conn   *grpc.ClientConn
	pods   atomic.Int64

	lastLog atomic.Pointer[string] // containerd's, when the node was stopped

	mu         sync.Mutex
	machine    *process  // what holds its namespace; nil if it is none
	containerd *process  // nil while stopped
	gates      []*Gate   // all that were started
	daemons    []*Daemon // the same, since the last PowerCut
	disks      []*Disk   // of NewDisk

	distribution *process // of NewDistribution, or nil

	stopped bool
}

// Start starts a node and returns when its CRI answers.
//
// The caller must Stop it. If the process ends without, by a panic, ctrl-C, a
// timeout or SIGKILL, a second process that Start has started cleans up all the
// same: it is this program again, which sees an environment variable in an init
// function of this package and never reaches main.
//
// When ctx ends before Start returns everything is cleaned up; later it has no
// meaning.
func Start(ctx context.Context, o Options) (_ *Node, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a node needs root")
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.ContainerdVersion == "" {
		o.ContainerdVersion = Containerd24
	}
	if o.Dir == "" {
		o.Dir = "/tmp"
	}
	version := strings.TrimPrefix(o.ContainerdVersion, "v")
	schema, err := configVersion(version)
	if err != nil {
		return nil, err
	}
	tools, err := FindTools(ctx, version, o.Log)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, dirPrefix)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if len(dir) > 40 {
		os.Remove(dir)
		return nil, fmt.Errorf("%s is too long for sockets below it: use a shorter Options.Dir", dir)
	}
	keeper, err := keep(dir)
	if err != nil {
		os.Remove(dir)
		return nil, err
	}
	n := &Node{
		Dir:     dir,
		Version: version,
		Tools:   tools,
		log:     o.Log,
		keeper:  keeper,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop())
		}
	}()
	if o.Machine {
		n.Root = filepath.Join(dir, "m")
		if err := n.boot(ctx); err != nil {
			return nil, err
		}
	}
	at := func(name string) string { return n.Path(n.inside(name)) }
	n.Socket, n.NRISocket, n.ConfigPath = at(socketFile), at(nriFile), at(configFile)
	n.DropInDir, n.CertsDir = at("conf.d"), at("certs.d")
	for _, d := range []string{"conf.d", "certs.d", "nri/plugins", "nri/conf.d", "cni", "cni-bin", "s", "logs"} {
		if err := os.MkdirAll(at(d), 0o700); err != nil {
			return nil, err
		}
	}
	// Container processes reach the shared memory and file systems below by mounts,
	// not by path; with user namespaces the directory must be passable though.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}

	pause, err := pauseImage(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, pause.registry.Stop()) }()
	if err := n.Use(pause.registry); err != nil {
		return nil, err
	}
	if err := os.WriteFile(n.ConfigPath, []byte(n.config(schema, pause.image.Pinned(), o.RequestTimeout)), 0o600); err != nil {
		return nil, err
	}
	const network = `{"cniVersion": "1.0.0", "name": "nowhere", "plugins": [{"type": "nowhere"}]}`
	if err := os.WriteFile(filepath.Join(at("cni"), "10-nowhere.conflist"), []byte(network), 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(at("cni-bin"), "nowhere"), []byte(nowhere), 0o700); err != nil {
		return nil, err
	}
	for name, content := range o.DropIns {
		if err := n.DropIn(name, content); err != nil {
			return nil, err
		}
	}
	if o.Required {
		if err := n.DropIn(RequiredFile, RequiredDropIn); err != nil {
			return nil, err
		}
	}

	n.conn, err = grpc.NewClient("unix://"+n.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		// A client that waits for minutes after a restart is no use in a test.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, err
	}
	n.Runtime = runtimeapi.NewRuntimeServiceClient(n.conn)
	n.Images = runtimeapi.NewImageServiceClient(n.conn)
	if err := n.StartContainerd(ctx); err != nil {
		return nil, err
	}
	// The pause image is on the node before the first pod, as on a prepared one; its
	// registry is not needed again.
	if _, err := n.PullImage(ctx, pause.image.Pinned()); err != nil {
		return nil, fmt.Errorf("pulling the pause image: %w", err)
	}
	return n, nil
}

// nowhere is the CNI plugin of pods that do not use the host's network. They get an
// address on paper (TEST-NET-1, RFC 5737) and no way out.
const nowhere = `#!/bin/sh
cat >/dev/null
case "$CNI_COMMAND" in
ADD) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"address":"192.0.2.1/32","interface":0}]}' ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
esac
`

// NamesImage reports whether the node's containerd says to NRI which image config
// it runs (2.4 and later). On older ones the gate compares the configs when a
// container starts.
func (n *Node) NamesImage() bool {
	schema, err := configVersion(n.Version)
	return err == nil && schema >= 4
}

// configVersion is the version of containerd's configuration for a release.
func configVersion(release string) (int, error) {
	major, rest, _ := strings.Cut(release, ".")
	minor, _, _ := strings.Cut(rest, ".")
	m, err := strconv.Atoi(minor)
	switch {
	case major != "2" || err != nil:
		return 0, fmt.Errorf("containerd %q: want a release 2.x.y", release)
	case m >= 4:
		return 4, nil
	default:
		return 3, nil
	}
}

// config is containerd's configuration.
func (n *Node) config(schema int, pause string, timeout time.Duration) string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	in := n.inside

	p("version = %d", schema)
	p("root = %q", in("root"))
	p("state = %q", in("state"))
	p("imports = [%q]", filepath.Join(in("conf.d"), "*.toml"))
	if schema >= 4 {
		p("[plugins.'io.containerd.server.v1.grpc']\n  address = %q", in(socketFile))
		p("[plugins.'io.containerd.server.v1.ttrpc']\n  address = %q", in(socketFile)+".ttrpc")
		p("[plugins.'io.containerd.shim.v1.manager']\n  socket_dir = %q", in("s"))
	} else {
		p("[grpc]\n  address = %q", in(socketFile))
		p("[ttrpc]\n  address = %q", in(socketFile)+".ttrpc")
	}
	p("[plugins.'io.containerd.internal.v1.opt']\n  path = %q", in("opt"))
	p("[plugins.'io.containerd.image-verifier.v1.bindir']\n  bin_dir = %q", in("verifiers"))

	p("[plugins.'io.containerd.nri.v1.nri']")
	p("  disable = false")
	p("  socket_path = %q", in(nriFile))
	p("  plugin_path = %q", in("nri/plugins"))
	p("  plugin_config_path = %q", in("nri/conf.d"))
	if timeout > 0 {
		p("  plugin_request_timeout = %q", timeout)
	}

	p("[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = %q", pause)
	p("[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = %q", in("certs.d"))

	p("[plugins.'io.containerd.cri.v1.runtime']")
	// Lowering oom_score_adj is not permitted in every place where tests run.
	p("  restrict_oom_score_adj = true")
	p("  disable_apparmor = true")
	p("  netns_mounts_under_state_dir = true")
	p("  cdi_spec_dirs = []")
	p("[plugins.'io.containerd.cri.v1.runtime'.cni]")
	p("  bin_dirs = [%q, %q]", n.Tools.CNIDir, in("cni-bin"))
	p("  conf_dir = %q", in("cni"))
	for _, handler := range []string{"runc", OtherHandler} {
		p("[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]", handler)
		p("  runtime_type = 'io.containerd.runc.v2'")
		p("[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s.options]", handler)
		p("  BinaryName = %q", n.Tools.Runc)
		p("  Root = %q", in(runcDir))
		p("  SystemdCgroup = false")
	}
	return b.String()
}

// Stop ends everything that runs on the node, gates included, unmounts and
// deletes its directory, and removes its cgroups. It is done when Stop returns,
// however many pods there are, and whether or not containerd still answers. A
// second Stop does nothing. Registries are the caller's.
func (n *Node) Stop() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped {
		return nil
	}
	n.stopped = true
	n.lastLog.Store(new(n.Log()))
	if n.conn != nil {
		n.conn.Close()
	}
	err := n.keeper.clean()
	// Dead by now unless the keeper failed; they are our children to wait for.
	for _, p := range []*process{n.containerd, n.machine, n.distribution} {
		if p != nil {
			p.stop(syscall.SIGKILL, 0)
		}
	}
	for _, d := range n.daemons {
		d.Stop(syscall.SIGKILL)
	}
	for _, g := range n.gates {
		g.Kill()
	}
	return err
}

// StartContainerd starts containerd again after StopContainerd and returns when
// CRI answers.
func (n *Node) StartContainerd(ctx context.Context) error {
	n.mu.Lock()
	if n.stopped || n.containerd != nil {
		n.mu.Unlock()
		return errors.New("containerd: the node is stopped or containerd runs already")
	}
	log, err := os.OpenFile(filepath.Join(n.Dir, "containerd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.mu.Unlock()
		return err
	}
	defer log.Close()
	cmd := n.Command(context.Background(), n.Tools.Containerd, "--config", n.inside(configFile))
	cmd.Dir = n.Dir
	cmd.Stdout, cmd.Stderr = log, log
	// containerd finds its shim in PATH.
	cmd.Env = append(cmd.Env, "PATH="+filepath.Dir(n.Tools.Containerd)+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "NOTIFY_SOCKET=")
	// ctrl-C is for the tests, which then clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p, err := startProcess(cmd)
	n.containerd = p
	n.mu.Unlock()
	if err != nil {
		return err
	}
	if err := n.ready(ctx, p); err != nil {
		return fmt.Errorf("containerd %s: %w", n.Version, err)
	}
	return nil
}

// ready waits until CRI answers, and NRI takes connections.
func (n *Node) ready(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var last error
	for {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		status, err := n.Runtime.Status(call, &runtimeapi.StatusRequest{})
		cancel()
		if err == nil {
			for _, c := range status.GetStatus().GetConditions() {
				if !c.Status && (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) {
					err = fmt.Errorf("%s is false: %s: %s", c.Type, c.Reason, c.Message)
				}
			}
		}
		if err == nil {
			_, err = os.Stat(n.NRISocket)
		}
		if err == nil {
			return nil
		}
		last = err
		select {
		case <-p.done:
			return fmt.Errorf("ended: %w\n%s", p.err, n.logTail())
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w: %w\n%s", ctx.Err(), last, n.logTail())
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// StopContainerd ends containerd with a signal, SIGTERM as systemd does or
// SIGKILL as a crash, and waits for its end. Containers go on running.
func (n *Node) StopContainerd(sig syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.containerd == nil {
		return nil
	}
	n.containerd.stop(sig, 20*time.Second)
	n.containerd = nil
	return nil
}

// Restart restarts containerd, which then has read its configuration anew, and
// returns when CRI answers. Containers go on running. Plugins are disconnected.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.StopContainerd(syscall.SIGTERM); err != nil {
		return err
	}
	return n.StartContainerd(ctx)
}

// DropIn writes a file of containerd's configuration, or with empty content
// removes it. It counts from the next Restart.
func (n *Node) DropIn(name, content string) error {
	if filepath.Base(name) != name || filepath.Ext(name) != ".toml" {
		return fmt.Errorf("drop-in %q: want the name of a .toml file", name)
	}
	path := filepath.Join(n.DropInDir, name)
	if content == "" {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	return os.WriteFile(path, []byte(content), 0o600)
}

// Require installs or removes RequiredDropIn and restarts containerd.
func (n *Node) Require(ctx context.Context, required bool) error {
	content := ""
	if required {
		content = RequiredDropIn
	}
	if err := n.DropIn(RequiredFile, content); err != nil {
		return err
	}
	return n.Restart(ctx)
}

// ConfigDump returns containerd's configuration as it reads it now, drop-ins
// merged.
func (n *Node) ConfigDump(ctx context.Context) (string, error) {
	return n.Output(ctx, n.Tools.Containerd, "--config", n.inside(configFile), "config", "dump")
}

// Ctr runs ctr on the node's containerd in the namespace of Kubernetes and
// returns what it printed.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	return n.Output(ctx, n.Tools.Ctr, append([]string{"--address", n.inside(socketFile), "--namespace", "k8s.io"}, args...)...)
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out.Bytes(), nil
}

// Log returns containerd's log so far, all of its runs, also after Stop.
func (n *Node) Log() string {
	if s := n.lastLog.Load(); s != nil {
		return *s
	}
	b, err := os.ReadFile(filepath.Join(n.Dir, "containerd.log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (n *Node) logTail() string {
	s := n.Log()
	if len(s) > 8<<10 {
		s = s[len(s)-8<<10:]
	}
	return s
}

// A process is a child that somebody waits for.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait; read after done
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stop sends sig, SIGKILL when the process is still there after patience, and
// waits for its end.
func (p *process) stop(sig syscall.Signal, patience time.Duration) {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}
