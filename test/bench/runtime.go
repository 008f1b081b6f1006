package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// A side is one plugin as a process of its own, registered with an NRI adaptation
// of its own, the code that containerd runs. The adaptation is in this process
// and stands for containerd, so that creations can be asked about at the rate
// that NRI has and not at that at which containers can be made.
type side struct {
	name string
	*adaptation.Adaptation
	plugin *process
}

// newSide starts the adaptation of a containerd of that version, which refuses
// every container while the plugin is not connected, as on a real node. command
// is the plugin's; SOCKET in it is replaced.
func newSide(dir, version, plugin string, command ...string) (*side, error) {
	dir, err := os.MkdirTemp(dir, "nri-")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "s")
	a, err := adaptation.New("containerd", version,
		func(ctx context.Context, sync adaptation.SyncCB) error { _, err := sync(ctx, nil, nil); return err },
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")),
		adaptation.WithDefaultValidator(&validator.DefaultValidatorConfig{Enable: true, RequiredPlugins: []string{plugin}}),
	)
	if err != nil {
		return nil, err
	}
	if err := a.Start(); err != nil {
		return nil, err
	}
	s := &side{name: plugin, Adaptation: a}
	for i := range command {
		command[i] = strings.ReplaceAll(command[i], "SOCKET", socket)
	}
	if s.plugin, err = start(filepath.Join(dir, "log"), command...); err != nil {
		a.Stop()
		return nil, err
	}
	return s, nil
}

// create asks as containerd does when a container is created.
func (s *side) create(ctx context.Context, req *api.CreateContainerRequest) error {
	defer s.BlockPluginSync().Unblock()
	_, err := s.CreateContainer(ctx, req)
	return err
}

// wait waits until the plugin is asked, and returns how long that took.
func (s *side) wait(ctx context.Context, req *api.CreateContainerRequest) (time.Duration, error) {
	from := time.Now()
	for {
		err := s.create(ctx, req)
		if err == nil || !strings.Contains(err.Error(), "not present") {
			return time.Since(from), nil
		}
		select {
		case <-s.plugin.done:
			return 0, fmt.Errorf("%s ended: %s", s.name, s.plugin.said())
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(time.Millisecond):
		}
		if time.Since(from) > 20*time.Second {
			return 0, fmt.Errorf("%s did not register: %s", s.name, s.plugin.said())
		}
	}
}

// allowed asks until the answer is yes: the first time it may be PENDING.
func (s *side) allowed(ctx context.Context, req *api.CreateContainerRequest) error {
	from := time.Now()
	for {
		err := s.create(ctx, req)
		if err == nil {
			return nil
		}
		if !node.Pending(err) || time.Since(from) > 20*time.Second {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *side) stop() {
	s.plugin.stop()
	s.Stop()
}

// A process is a plugin at work. Its output is in a file: whoever read a pipe
// would take the processor from what is measured.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

func start(log string, command ...string) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{cmd: exec.Command(command[0], command[1:]...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// said is the end of its log.
func (p *process) said() string {
	b, _ := os.ReadFile(p.log)
	return string(b[max(0, len(b)-2000):])
}

func (p *process) memory() (node.Memory, error) {
	return (&node.Gate{PID: p.cmd.Process.Pid}).Memory()
}

// request is what containerd tells of a container that a kubelet asked for. With
// target and config it is that of containerd 2.4, without that of earlier ones.
func request(id string, pod *node.Pod, image, target, config string) *api.CreateContainerRequest {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=" + pod.Name}
	for _, s := range []string{"KUBERNETES", "KUBE_DNS", "FRONTEND", "BACKEND"} { // as kubelets tell of services
		for _, v := range []string{"_SERVICE_HOST=10.43.0.1", "_SERVICE_PORT=443", "_SERVICE_PORT_HTTPS=443", "_PORT=tcp://10.43.0.1:443",
			"_PORT_443_TCP=tcp://10.43.0.1:443", "_PORT_443_TCP_PROTO=tcp", "_PORT_443_TCP_PORT=443", "_PORT_443_TCP_ADDR=10.43.0.1"} {
			env = append(env, s+v)
		}
	}
	var mounts []*api.Mount
	for _, to := range []string{"/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/etc/hosts", "/etc/hostname",
		"/etc/resolv.conf", "/dev/shm", "/dev/termination-log", "/var/run/secrets/kubernetes.io/serviceaccount"} {
		mounts = append(mounts, &api.Mount{Destination: to, Type: "bind", Source: "/var/lib/kubelet/pods/" + pod.UID + "/volumes" + to, Options: []string{"rbind", "rprivate", "rw"}})
	}
	c := &api.Container{
		Id: id, PodSandboxId: pod.ID, Name: "main", State: api.ContainerState_CONTAINER_CREATED,
		Labels: map[string]string{"io.kubernetes.container.name": "main", "io.kubernetes.pod.name": pod.Name, "io.kubernetes.pod.namespace": pod.Namespace, "io.kubernetes.pod.uid": pod.UID},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-name": "main", "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.image-name": image,
			"io.kubernetes.cri.sandbox-id": pod.ID, "io.kubernetes.cri.sandbox-name": pod.Name, "io.kubernetes.cri.sandbox-namespace": pod.Namespace,
			"io.kubernetes.cri.sandbox-uid": pod.UID, "io.kubernetes.container.restartCount": "0", "io.kubernetes.pod.terminationGracePeriod": "30",
		},
		Args: []string{node.Program}, Env: env, Mounts: mounts,
	}
	if target != "" {
		c.Image = &api.Image{Name: image, Digest: target, ConfigDigest: config}
	}
	return &api.CreateContainerRequest{
		Pod: &api.PodSandbox{Id: pod.ID, Name: pod.Name, Uid: pod.UID, Namespace: pod.Namespace,
			Labels: map[string]string{"app": "bench", "io.kubernetes.pod.name": pod.Name, "io.kubernetes.pod.namespace": pod.Namespace, "io.kubernetes.pod.uid": pod.UID}},
		Container: c,
	}
}

// asked is the request for an image of a registry, on a containerd of that node.
func asked(n *node.Node, id string, pod *node.Pod, img *node.Image) *api.CreateContainerRequest {
	if !n.NamesImage() {
		return request(id, pod, img.Name, "", "")
	}
	return request(id, pod, img.Name, img.Target.Digest.String(), img.Config.Digest.String())
}

// quiet drops the adaptation's log.
type quiet struct{}

var silence = sync.OnceFunc(func() { nrilog.Set(quiet{}) })

func (quiet) Debugf(context.Context, string, ...any) {}
func (quiet) Infof(context.Context, string, ...any)  {}
func (quiet) Warnf(context.Context, string, ...any)  {}
func (quiet) Errorf(context.Context, string, ...any) {}
