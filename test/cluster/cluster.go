// Package cluster runs a throwaway Kubernetes of one node on a machine of test/node:
// the real kubelet, and with Start the real control plane, each built once from the
// module in ./kubernetes. Everything listens on loopback, on ports that are free,
// has its files on the machine's own root file system, where a host has them, and
// ends with the node.
//
// Pods run below the node's cgroup, and those that do not use the host's network
// have none.
package cluster

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// Version is that of Kubernetes.
const Version = "1.36.3"

// NodeName is what the node is called.
const NodeName = "edge-1"

// Where things are on the machine.
const (
	ManifestDir = "/etc/kubernetes/manifests" // static pods
	AdminConfig = "/etc/kubernetes/admin.conf"

	kubeletConfig = "/var/lib/kubelet/config.yaml"
	pkiDir        = "/etc/kubernetes/pki"
)

// A Cluster is a node with a kubelet, and one that Start made has a control plane.
// Its methods are not for several goroutines at once, except Kubectl and Pods.
type Cluster struct {
	*node.Node

	bin     string
	ports   struct{ kubelet, readOnly, api, etcd, peer int }
	control bool

	kubelet *node.Daemon
	plane   []*node.Daemon // in the order of starting; empty while stopped
}

// Standalone starts a node whose kubelet runs static pods and knows no API server.
// The options are for the node; Machine is always set.
func Standalone(ctx context.Context, o node.Options) (*Cluster, error) {
	return start(ctx, o, false)
}

// Start starts a node with a control plane and returns when the node is ready.
func Start(ctx context.Context, o node.Options) (*Cluster, error) {
	return start(ctx, o, true)
}

func start(ctx context.Context, o node.Options, control bool) (_ *Cluster, err error) {
	progress := o.Log
	if progress == nil {
		progress = new(bytes.Buffer)
	}
	c := &Cluster{control: control}
	if c.bin, err = FindPrograms(ctx, progress); err != nil {
		return nil, err
	}
	if err := freePorts(&c.ports.kubelet, &c.ports.readOnly, &c.ports.api, &c.ports.etcd, &c.ports.peer); err != nil {
		return nil, err
	}
	o.Machine = true
	if c.Node, err = node.Start(ctx, o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if err := c.files(); err != nil {
		return nil, err
	}
	if err := c.MakeCgroup(); err != nil {
		return nil, err
	}
	if control {
		if err := c.StartControlPlane(ctx); err != nil {
			return nil, err
		}
	}
	return c, c.StartKubelet(ctx)
}

// FindPrograms returns the directory with kubelet, kube-apiserver,
// kube-controller-manager, kube-scheduler, kubectl and etcd, which is called
// server, and builds them if the cache does not hold them. The working directory
// must be inside the module of the tests.
func FindPrograms(ctx context.Context, progress interface{ Write([]byte) (int, error) }) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tidewaiter/tidewaiter/test").Output()
	if err != nil {
		return "", fmt.Errorf("finding the module of the tests: %w", err)
	}
	major, minor, _ := strings.Cut(Version, ".")
	minor, _, _ = strings.Cut(minor, ".")
	const v = "-X k8s.io/component-base/version."
	const cmd = "k8s.io/kubernetes/cmd/"
	return node.FindPrograms(ctx, progress, node.Programs{
		Name: "kubernetes-" + Version,
		Dir:  filepath.Join(strings.TrimSpace(string(out)), "cluster", "kubernetes"),
		Packages: []string{
			cmd + "kubelet", cmd + "kube-apiserver", cmd + "kube-controller-manager", cmd + "kube-scheduler", cmd + "kubectl",
			"go.etcd.io/etcd/server/v3",
		},
		LDFlags: fmt.Sprintf("-s -w %sgitVersion=v%s %sgitMajor=%s %sgitMinor=%s", v, Version, v, major, v, minor),
		Takes:   "10 minutes",
	})
}

// freePorts finds ports of loopback on which nobody listens.
func freePorts(ports ...*int) error {
	for _, p := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close() // after all are found, so that they differ
		*p = l.Addr().(*net.TCPAddr).Port
	}
	return nil
}

// files writes what the kubelet and the control plane read.
func (c *Cluster) files() error {
	anonymous := map[string]any{
		"anonymous": map[string]any{"enabled": true},
		"webhook":   map[string]any{"enabled": false},
	}
	kubelet := map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"address":                  "127.0.0.1",
		"port":                     c.ports.kubelet,
		"readOnlyPort":             c.ports.readOnly,
		"healthzPort":              0,
		"authentication":           anonymous,
		"authorization":            map[string]any{"mode": "AlwaysAllow"},
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"staticPodPath":            ManifestDir,
		"fileCheckFrequency":       "1s",
		"syncFrequency":            "10s",
		"cgroupDriver":             "cgroupfs",
		"cgroupRoot":               c.Cgroup(),
		"cgroupsPerQOS":            true,
		"enforceNodeAllocatable":   []string{},
		"failCgroupV1":             false,
		"failSwapOn":               false,
		"oomScoreAdj":              0,
		// Nothing here is about this host's disk, memory or packet filter.
		"localStorageCapacityIsolation": false,
		"evictionHard":                  map[string]string{"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%"},
		"imageGCHighThresholdPercent":   100,
		"makeIPTablesUtilChains":        false,
	}
	for path, content := range map[string]any{
		kubeletConfig:                  kubelet,
		AdminConfig:                    c.kubeconfig("admin"),
		"/etc/kubernetes/kubelet.conf": c.kubeconfig("kubelet"),
		"/etc/kubernetes/controller-manager.conf": c.kubeconfig("controller-manager"),
		"/etc/kubernetes/scheduler.conf":          c.kubeconfig("scheduler"),
	} {
		b, err := json.MarshalIndent(content, "", "  ")
		if err != nil {
			return err
		}
		if err := c.WriteFile(path, string(b)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.Path(ManifestDir), 0o755); err != nil {
		return err
	}
	var tokens strings.Builder
	for _, id := range []struct{ who, user, group string }{
		{"admin", "admin", "system:masters"},
		{"kubelet", "system:node:" + NodeName, "system:nodes"},
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
	} {
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", token(id.who), id.user, id.who, id.group)
	}
	if err := c.WriteFile("/etc/kubernetes/tokens.csv", tokens.String()); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := c.WriteFile(pkiDir+"/sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))); err != nil {
		return err
	}
	// The API server finds the kubelet by the node's name.
	return c.WriteFile("/etc/hosts", "127.0.0.1 localhost "+NodeName+"\n")
}

// token is what a user of this cluster shows, which only loopback reaches.
func token(who string) string { return "token-of-" + who }

// kubeconfig is JSON, which YAML is a superset of.
func (c *Cluster) kubeconfig(who string) any {
	return map[string]any{
		"apiVersion":      "v1",
		"kind":            "Config",
		"current-context": "default",
		"clusters": []any{map[string]any{"name": "default", "cluster": map[string]any{
			"server": c.url(c.ports.api), "certificate-authority": pkiDir + "/apiserver.crt",
		}}},
		"users":    []any{map[string]any{"name": "default", "user": map[string]any{"token": token(who)}}},
		"contexts": []any{map[string]any{"name": "default", "context": map[string]any{"cluster": "default", "user": "default"}}},
	}
}

func (c *Cluster) url(port int) string { return "https://127.0.0.1:" + strconv.Itoa(port) }

// WriteFile writes a file of the machine, in one step, and the directories above it.
func (c *Cluster) WriteFile(path, content string) error {
	at := c.Path(path)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	// The kubelet leaves files out whose name starts with a dot.
	next := filepath.Join(filepath.Dir(at), ".next-"+filepath.Base(at))
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(next, at)
}

// StartKubelet starts the kubelet and returns when it serves and, with a control
// plane that runs, the node is ready.
func (c *Cluster) StartKubelet(ctx context.Context) error {
	args := []string{filepath.Join(c.bin, "kubelet"), "--config", kubeletConfig, "--hostname-override", NodeName, "--v", "3"}
	if c.control {
		args = append(args, "--kubeconfig", "/etc/kubernetes/kubelet.conf")
	}
	var err error
	if c.kubelet, err = c.StartDaemon("kubelet", args...); err != nil {
		return err
	}
	err = c.await(ctx, c.kubelet, func(ctx context.Context) error {
		if _, err := c.get(ctx, fmt.Sprintf("http://127.0.0.1:%d/pods", c.ports.readOnly)); err != nil {
			return err
		}
		if len(c.plane) == 0 {
			return nil
		}
		out, err := c.Kubectl(ctx, "", "get", "node", NodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("the node is not ready: %s", out)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	return nil
}

// StopKubelet ends the kubelet; its pods go on running.
func (c *Cluster) StopKubelet(sig syscall.Signal) { c.kubelet.Stop(sig) }

// KubeletLog is the log of the kubelet, all of its runs.
func (c *Cluster) KubeletLog() string { return c.kubelet.Log() }

// StartControlPlane starts etcd, the API server, the controller manager and the
// scheduler, with what etcd has kept.
func (c *Cluster) StartControlPlane(ctx context.Context) error {
	etcd := fmt.Sprintf("http://127.0.0.1:%d", c.ports.etcd)
	peer := fmt.Sprintf("http://127.0.0.1:%d", c.ports.peer)
	run := func(name, program string, ready func(context.Context) error, args ...string) error {
		d, err := c.StartDaemon(name, append([]string{filepath.Join(c.bin, program)}, args...)...)
		if err != nil {
			return err
		}
		c.plane = append(c.plane, d)
		if ready == nil {
			return nil
		}
		if err := c.await(ctx, d, ready); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	if err := run("etcd", "server", func(ctx context.Context) error {
		_, err := c.get(ctx, etcd+"/health")
		return err
	},
		"--data-dir", "/var/lib/etcd/data",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--unsafe-no-fsync",
	); err != nil {
		return err
	}
	if err := run("kube-apiserver", "kube-apiserver", func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, "", "get", "--raw", "/readyz")
		return err
	},
		"--etcd-servers", etcd,
		"--bind-address", "127.0.0.1", "--secure-port", strconv.Itoa(c.ports.api),
		"--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
		"--cert-dir", pkiDir,
		"--token-auth-file", "/etc/kubernetes/tokens.csv", "--authorization-mode", "Node,RBAC",
		"--enable-admission-plugins", "NodeRestriction",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", pkiDir+"/sa.key", "--service-account-signing-key-file", pkiDir+"/sa.key",
		"--service-cluster-ip-range", "198.51.100.0/24",
		"--kubelet-preferred-address-types", "Hostname",
		"--allow-privileged", "--profiling=false",
	); err != nil {
		return err
	}
	if err := run("kube-controller-manager", "kube-controller-manager", nil,
		"--kubeconfig", "/etc/kubernetes/controller-manager.conf", "--leader-elect=false", "--secure-port", "0",
		"--use-service-account-credentials", "--service-account-private-key-file", pkiDir+"/sa.key",
		"--root-ca-file", pkiDir+"/apiserver.crt",
	); err != nil {
		return err
	}
	return run("kube-scheduler", "kube-scheduler", func(ctx context.Context) error {
		// Without it the API server takes no pods in: the controller manager is at work.
		_, err := c.Kubectl(ctx, "", "get", "serviceaccount", "default")
		return err
	},
		"--kubeconfig", "/etc/kubernetes/scheduler.conf", "--leader-elect=false", "--secure-port", "0")
}

// StopControlPlane ends the control plane; the kubelet goes on without.
func (c *Cluster) StopControlPlane() {
	for i := len(c.plane) - 1; i >= 0; i-- {
		c.plane[i].Stop(syscall.SIGKILL)
	}
	c.plane = nil
}

// PowerCut is that of the node: afterwards nothing runs.
func (c *Cluster) PowerCut(ctx context.Context) error {
	c.plane, c.kubelet = nil, nil
	if err := c.Node.PowerCut(ctx); err != nil {
		return err
	}
	return c.MakeCgroup()
}

// Kubectl runs kubectl as an administrator with stdin and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := c.Command(ctx, filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig", AdminConfig, "--cache-dir", "/tmp/kubectl"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out.String(), nil
}

// Program is the path of a program of Kubernetes on the machine.
func (c *Cluster) Program(name string) string { return filepath.Join(c.bin, name) }

// A Pod is what the kubelet and the API server say of one.
type Pod struct {
	Metadata struct {
		Name, Namespace, UID string
		Labels               map[string]string
	}
	Spec struct {
		Containers []struct{ Name, Image string }
	}
	Status struct {
		Phase             string
		ContainerStatuses []ContainerStatus
	}
}

// A ContainerStatus is that of a container of a pod.
type ContainerStatus struct {
	Name, Image, ImageID, ContainerID string
	Ready                             bool
	RestartCount                      int
	State                             struct {
		Waiting    *struct{ Reason, Message string }
		Running    *struct{ StartedAt time.Time }
		Terminated *struct {
			ExitCode        int
			Reason, Message string
		}
	}
}

// Pods returns the pods that the kubelet has, from itself.
func (c *Cluster) Pods(ctx context.Context) ([]Pod, error) {
	b, err := c.get(ctx, fmt.Sprintf("http://127.0.0.1:%d/pods", c.ports.readOnly))
	if err != nil {
		return nil, err
	}
	var list struct{ Items []Pod }
	return list.Items, json.Unmarshal(b, &list)
}

func (c *Cluster) get(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(res.Body); err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: status %d: %s", url, res.StatusCode, b.Bytes())
	}
	return b.Bytes(), nil
}

var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// await asks ready again and again until it says nil, d ends, or two minutes are
// over.
func (c *Cluster) await(ctx context.Context, d *node.Daemon, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-d.Done():
			return fmt.Errorf("ended: %s", tail(d.Log()))
		case <-ctx.Done():
			return fmt.Errorf("%w: %w: %s", ctx.Err(), err, tail(d.Log()))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func tail(s string) string {
	if len(s) > 6<<10 {
		s = s[len(s)-6<<10:]
	}
	return s
}
