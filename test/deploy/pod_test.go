package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
)

const manifest = "../../deploy/kubeadm/tidewaiter.yaml"

// A daemonSet is what TestPod needs of the manifest.
type daemonSet struct {
	Kind string
	Data map[string]string // of the ConfigMap
	Spec struct {
		Template struct {
			Spec struct {
				HostNetwork bool
				Containers  []struct {
					Args []string
					Env  []struct{ Name, Value string }

					SecurityContext struct {
						AllowPrivilegeEscalation *bool
						ReadOnlyRootFilesystem   bool
						Capabilities             struct{ Add, Drop []string }
					}
					Resources      struct{ Limits struct{ Memory string } }
					ReadinessProbe struct{ Exec struct{ Command []string } }
					VolumeMounts   []struct {
						Name, MountPath, MountPropagation, SubPath string

						ReadOnly bool
					}
				}
				Volumes []struct {
					Name     string
					HostPath struct{ Path, Type string }
				}
			}
		}
	}
}

// load reads the manifest: its DaemonSet, and the files of its ConfigMap.
func load(t *testing.T) (set daemonSet, files map[string]string) {
	t.Helper()
	f, err := os.Open(manifest)
	must(t, err)
	defer f.Close()
	for d := yaml.NewDecoder(f); ; {
		var any map[string]any
		err := d.Decode(&any)
		if errors.Is(err, io.EOF) {
			return set, files
		}
		must(t, err)
		raw, err := json.Marshal(any)
		must(t, err)
		var one daemonSet
		must(t, json.Unmarshal(raw, &one)) // as Kubernetes reads YAML
		switch one.Kind {
		case "ConfigMap":
			files = one.Data
		case "DaemonSet":
			set = one
		}
	}
}

// publish puts files where the kubelet would: in a directory that links lead to, all
// of which change at once.
func publish(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	data, err := os.MkdirTemp(dir, "..data_")
	must(t, err)
	must(t, os.Chmod(data, 0o755))
	for name, text := range files {
		must(t, os.WriteFile(filepath.Join(data, name), []byte(text), 0o400))
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); !errors.Is(err, os.ErrExist) {
			must(t, err)
		}
	}
	must(t, os.RemoveAll(filepath.Join(dir, "..data_tmp")))
	must(t, os.Symlink(filepath.Base(data), filepath.Join(dir, "..data_tmp")))
	must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
}

// TestPod imports the image into a real containerd and runs its container as the
// manifest describes it: with no capability, on a read-only root, within its memory.
func TestPod(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("LEFT OUT: a node needs root")
	}
	dist, err := built()
	must(t, err)
	for _, v := range node.Versions(node.Containerd24, node.Containerd23) {
		t.Run(v, func(t *testing.T) {
			_, err := node.FindTools(t.Context(), v, t.Output()) // built the first time
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			n, err := node.Start(ctx, node.Options{ContainerdVersion: v, Log: t.Output()})
			must(t, err)
			defer func() {
				if t.Failed() {
					t.Log(n.Log())
				}
				if err := n.Stop(); err != nil {
					t.Error(err)
				}
			}()
			testPod(t, ctx, n, dist)
		})
	}
}

// TestWithoutGate has a real containerd read the drop-in of deploy/enforce: while the
// gate is away, the container with the annotation of its pod starts, and no other.
func TestWithoutGate(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("LEFT OUT: a node needs root")
	}
	dropIn, err := os.ReadFile("../../deploy/enforce/99-tidewaiter.toml")
	must(t, err)
	component, err := os.ReadFile("../../deploy/enforce/kustomization.yaml")
	must(t, err)
	key, value, ok := strings.Cut(regexp.MustCompile(`(?m)^ *without-gate.*$`).FindString(string(component)), ": ")
	key, value = strings.TrimSpace(key), strings.Trim(value, `"`)
	if !ok || value != "true" {
		t.Fatalf("the annotation is %q: %q", key, value)
	}
	for _, v := range node.Versions(node.Containerd24, node.Containerd23) {
		t.Run(v, func(t *testing.T) {
			_, err := node.FindTools(t.Context(), v, t.Output())
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			n, err := node.Start(ctx, node.Options{ContainerdVersion: v, DropIns: map[string]string{"99-tidewaiter.toml": string(dropIn)}, Log: t.Output()})
			must(t, err)
			defer func() {
				if err := n.Stop(); err != nil {
					t.Error(err)
				}
			}()
			r, err := node.NewRegistry("registry.example", node.RegistryOptions{})
			must(t, err)
			defer r.Stop()
			must(t, n.Use(r))
			app, err := r.Push(ctx, "app:1", node.ImageOptions{Word: "runs"})
			must(t, err)
			for _, tt := range []struct {
				annotated bool
				container string
				starts    bool
			}{{true, "tidewaiter", true}, {true, "other", false}, {false, "tidewaiter", false}} {
				pod := node.PodOptions{Namespace: "tidewaiter-system"}
				if tt.annotated {
					pod.Annotations = map[string]string{key: value}
				}
				_, err := n.Run(ctx, app.Name, node.RunOptions{Pod: pod, Container: node.ContainerOptions{Name: tt.container}})
				if tt.starts && err != nil || !tt.starts && (err == nil || !strings.Contains(err.Error(), `required plugin "tidewaiter" not present`)) {
					t.Errorf("annotated %t, container %s: %v", tt.annotated, tt.container, err)
				}
			}
		})
	}
}

func testPod(t *testing.T, ctx context.Context, n *node.Node, dist string) {
	const image = "ghcr.io/tidewaiter/tidewaiter:" + version
	// As on a kubeadm node, and as k3s imports what it finds.
	for _, all := range [][]string{nil, {"--all-platforms"}} {
		_, err := n.Ctr(ctx, append(append([]string{"images", "import"}, all...), filepath.Join(dist, "tidewaiter.tar"))...)
		must(t, err)
	}
	var err error
	id := ""
	for id == "" { // CRI hears of it soon
		id, err = n.ImageID(ctx, image)
		must(t, err)
		time.Sleep(50 * time.Millisecond)
	}
	c, err := n.Run(ctx, image, node.RunOptions{Container: node.ContainerOptions{Args: []string{"version"}, Pull: node.PullNever}})
	must(t, err)
	said, err := c.Output(ctx)
	must(t, err)
	if !strings.HasPrefix(said, "tidewaiter "+version+" linux/") {
		t.Errorf("it says %q", said)
	}
	must(t, c.Pod.Remove(ctx))

	// Containers that run before the gate does: of them nothing must stay.
	r, err := node.NewRegistry("registry.example", node.RegistryOptions{})
	must(t, err)
	defer r.Stop()
	must(t, n.Use(r))
	app, err := r.Push(ctx, "app:1", node.ImageOptions{Word: "runs"})
	must(t, err)
	before, err := n.Run(ctx, app.Name, node.RunOptions{})
	must(t, err)

	set, files := load(t)
	// This containerd's own mirror, which on a node its certs.d names.
	files["config.yaml"] += fmt.Sprintf("sources:\n  mirrors:\n    - {host: registry.example, url: %q}\n", r.URL())
	config := t.TempDir()
	publish(t, config, files)
	host := map[string]string{"/run/containerd": n.Dir, "/var/run/nri": filepath.Dir(n.NRISocket), "/run/tidewaiter": t.TempDir(), "/var/lib/tidewaiter": t.TempDir(), "/etc/containerd": t.TempDir()}
	first := runGate(t, ctx, n, set, id, config, host)
	first.await(ctx, t)

	// In audit a pod starts, and what enforce would have said is recorded.
	_, err = n.Run(ctx, app.Name, node.RunOptions{})
	must(t, err)
	status := first.status(ctx, t)
	if status.Mode != "audit" || !status.Ready || status.Node != "edge-1" || status.Runtime.Hooks[0] != "CreateContainer" {
		t.Errorf("status %+v", status)
	}
	first.eventually(ctx, t, "the answer is recorded", func() bool {
		d := first.status(ctx, t).Decisions["audit"]
		return d["SIGNATURE_MISSING"]+d["PENDING"] > 0
	})

	// The root filesystems of other containers lie in the directory that is mounted for
	// its socket. What ended must not stay mounted there.
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", first.pid(ctx, t)))
	must(t, err)
	if !strings.Contains(string(raw), before.ID) {
		t.Error("nothing of another container was mounted: this test sees nothing")
	}
	must(t, before.Pod.Remove(ctx))
	first.eventually(ctx, t, "nothing of another container is mounted", func() bool {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", first.pid(ctx, t)))
		must(t, err)
		return !strings.Contains(string(raw), before.ID) && !strings.Contains(string(raw), before.Pod.ID)
	})

	// A configuration that changes is read, and one that is broken is not in force.
	revision := status.Configuration.Revision
	files["config.yaml"] += "runningContainers: report\n"
	publish(t, config, files)
	first.eventually(ctx, t, "the new configuration is in force", func() bool {
		s := first.status(ctx, t)
		return s.Configuration.Revision != revision && s.Ready
	})

	// The next one beside it, and then it alone.
	second := runGate(t, ctx, n, set, id, config, host)
	second.eventually(ctx, t, "two are registered", func() bool {
		return strings.Count(first.log(t)+second.log(t), `"msg":"registered"`) == 2
	})
	must(t, stop(ctx, n, first.id))
	second.await(ctx, t)
	_, err = n.Run(ctx, app.Name, node.RunOptions{})
	must(t, err)
	t.Logf("anonymous and peak memory of the gate: %s", memory(t, second.pid(ctx, t)))

	// One that starts with a broken configuration is in nobody's way.
	must(t, stop(ctx, n, second.id))
	broken := t.TempDir()
	publish(t, broken, map[string]string{"config.yaml": "version: 1\nmode: enforced\n"})
	third := runGate(t, ctx, n, set, id, broken, host)
	third.eventually(ctx, t, "it says what is wrong", func() bool {
		text, code := third.probe(ctx, t)
		return code == 1 && strings.Contains(text, "not ready: [NO_CONFIGURATION]")
	})
	_, err = n.Run(ctx, app.Name, node.RunOptions{})
	must(t, err)
	must(t, stop(ctx, n, third.id))
}

func stop(ctx context.Context, n *node.Node, id string) error {
	_, err := n.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 10})
	return err
}

func memory(t *testing.T, pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	var found []string
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, "RssAnon:") || strings.HasPrefix(line, "VmHWM:") {
			found = append(found, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(found, ", ")
}

// A gate is one in a container.
type gate struct {
	n       *node.Node
	id      string
	logs    string
	command []string // of the probe

}

// runGate runs the container of the manifest as a kubelet does.
func runGate(t *testing.T, ctx context.Context, n *node.Node, set daemonSet, image, config string, host map[string]string) *gate {
	t.Helper()
	pod := set.Spec.Template.Spec
	c := pod.Containers[0]
	if !pod.HostNetwork || c.SecurityContext.AllowPrivilegeEscalation == nil || *c.SecurityContext.AllowPrivilegeEscalation || !c.SecurityContext.ReadOnlyRootFilesystem ||
		!slices.Equal(c.SecurityContext.Capabilities.Drop, []string{"ALL"}) || len(c.SecurityContext.Capabilities.Add) > 0 {
		t.Fatalf("the container may do more than it should: %+v", c.SecurityContext)
	}
	paths := map[string]string{"config": config}
	for _, v := range pod.Volumes {
		if v.HostPath.Path != "" {
			if !strings.HasPrefix(v.HostPath.Type, "Directory") || host[v.HostPath.Path] == "" {
				t.Fatalf("volume %+v", v)
			}
			paths[v.Name] = host[v.HostPath.Path]
		}
	}
	var mounts []*runtimeapi.Mount
	for _, m := range c.VolumeMounts {
		if paths[m.Name] == "" || m.SubPath != "" || m.MountPropagation != "" {
			t.Fatalf("mount %+v", m)
		}
		mounts = append(mounts, &runtimeapi.Mount{ContainerPath: m.MountPath, HostPath: paths[m.Name], Readonly: m.ReadOnly})
	}
	env := []*runtimeapi.KeyValue{}
	for _, e := range c.Env {
		if e.Name == "TIDEWAITER_NODE" {
			e.Value = "edge-1"
		}
		env = append(env, &runtimeapi.KeyValue{Key: e.Name, Value: []byte(e.Value)})
	}
	mebibytes, err := strconv.Atoi(strings.TrimSuffix(c.Resources.Limits.Memory, "Mi"))
	must(t, err)

	g := &gate{n: n, logs: t.TempDir(), command: c.ReadinessProbe.Exec.Command}
	namespaces := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD}
	seccomp := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	name := fmt.Sprintf("tidewaiter-%d", time.Now().UnixNano())
	sandbox := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "tidewaiter-system", Uid: name},
		LogDirectory: g.logs,
		Labels:       map[string]string{"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "tidewaiter-system", "io.kubernetes.pod.uid": name},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + filepath.Base(n.Dir),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces, Seccomp: seccomp},
		},
	}
	s, err := n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sandbox})
	must(t, err)
	made, err := n.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: s.PodSandboxId, SandboxConfig: sandbox,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "tidewaiter"},
			Image:    &runtimeapi.ImageSpec{Image: image, UserSpecifiedImage: "ghcr.io/tidewaiter/tidewaiter:" + version},
			Args:     append(slices.Clone(c.Args), "--containerd-socket", "/run/containerd/"+filepath.Base(n.Socket)),
			Envs:     env, Mounts: mounts, LogPath: "log",
			Labels: map[string]string{"io.kubernetes.container.name": "tidewaiter", "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "tidewaiter-system", "io.kubernetes.pod.uid": name},
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: int64(mebibytes) << 20, CpuShares: 10, OomScoreAdj: 1000},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					NamespaceOptions: namespaces, Seccomp: seccomp, NoNewPrivs: true, ReadonlyRootfs: true,
					RunAsUser: &runtimeapi.Int64Value{}, RunAsGroup: &runtimeapi.Int64Value{},
					Capabilities: &runtimeapi.Capability{DropCapabilities: c.SecurityContext.Capabilities.Drop},
				},
			},
		},
	})
	must(t, err)
	g.id = made.ContainerId
	_, err = n.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: g.id})
	must(t, err)
	return g
}

func (g *gate) log(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(g.logs, "log"))
	if !errors.Is(err, os.ErrNotExist) {
		must(t, err)
	}
	return string(raw)
}

func (g *gate) eventually(ctx context.Context, t *testing.T, what string, so func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for !so() {
		select {
		case <-ctx.Done():
			t.Fatalf("not so in three minutes: %s\n%s", what, g.log(t))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// exec runs a program in the container and returns what it prints and its status.
func (g *gate) exec(ctx context.Context, t *testing.T, command ...string) (string, int32) {
	t.Helper()
	r, err := g.n.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: g.id, Cmd: command, Timeout: 120})
	if err != nil {
		t.Fatalf("%v\n%s", err, g.log(t))
	}
	return string(r.Stdout) + string(r.Stderr), r.ExitCode
}

func (g *gate) probe(ctx context.Context, t *testing.T) (string, int32) {
	t.Helper()
	return g.exec(ctx, t, g.command...)
}

// await waits until the probe of the manifest says that the gate is ready.
func (g *gate) await(ctx context.Context, t *testing.T) {
	t.Helper()
	g.eventually(ctx, t, "the pod is ready", func() bool { _, code := g.probe(ctx, t); return code == 0 })
}

type gateStatus struct {
	Ready         bool
	Mode, Node    string
	Configuration struct{ Revision string }
	Runtime       struct{ Hooks []string }
	Decisions     map[string]map[string]int
}

func (g *gate) status(ctx context.Context, t *testing.T) (s gateStatus) {
	t.Helper()
	text, _ := g.exec(ctx, t, "/tidewaiter", "status", "-o", "json")
	must(t, json.Unmarshal([]byte(text), &s))
	return s
}

// pid is that of the gate on the host.
func (g *gate) pid(ctx context.Context, t *testing.T) int {
	t.Helper()
	r, err := g.n.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: g.id, Verbose: true})
	must(t, err)
	var info struct{ Pid int }
	must(t, json.Unmarshal([]byte(r.Info["info"]), &info))
	return info.Pid
}
