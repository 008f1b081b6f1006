package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// This file asks CRI in the way of the kubelet
// (k8s.io/kubernetes/pkg/kubelet/kuberuntime): the image is pulled first and
// the container created with the image ID that the pull returned, with what the
// pod says beside it in UserSpecifiedImage. What CRI answers is returned as it
// is; Text gives it as the kubelet puts it into an event.

// Text returns the message of an error of CRI, without gRPC's own words around
// it: after "Error: " it is what the kubelet writes as the event of the pod.
func Text(err error) string {
	if err == nil {
		return ""
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Message()
	}
	return err.Error()
}

// Pending reports whether an error says that the answer is not known yet, so that
// the next try may succeed.
func Pending(err error) bool { return err != nil && strings.Contains(Text(err), "[PENDING]") }

// PullImage pulls an image and returns its ID, as with imagePullPolicy Always.
func (n *Node) PullImage(ctx context.Context, image string) (string, error) {
	return n.pull(ctx, image, "", nil)
}

func (n *Node) pull(ctx context.Context, image, handler string, sandbox *runtimeapi.PodSandboxConfig) (string, error) {
	res, err := n.Images.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image:         &runtimeapi.ImageSpec{Image: image, RuntimeHandler: handler},
		SandboxConfig: sandbox,
	})
	if err != nil {
		return "", err
	}
	return res.ImageRef, nil
}

// ImageID returns the ID of an image that is on the node, or "".
func (n *Node) ImageID(ctx context.Context, image string) (string, error) {
	res, err := n.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		return "", err
	}
	return res.GetImage().GetId(), nil
}

// RemoveImage removes an image from the node.
func (n *Node) RemoveImage(ctx context.Context, image string) error {
	_, err := n.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

// A Pull says when an image is pulled. The zero Pull is PullIfNotPresent.
type Pull int

// The pull policies of Kubernetes.
const (
	PullIfNotPresent Pull = iota
	PullAlways
	PullNever
)

// PodOptions describe a pod. The zero value is a pod of the namespace "default"
// with a name of its own.
type PodOptions struct {
	Name, Namespace string
	Labels          map[string]string
	Annotations     map[string]string
	RuntimeHandler  string // empty: containerd's default, runc; or OtherHandler

	// UserNamespace gives the pod a user namespace of its own, in which the IDs from
	// 0 are 65,536 of the host from here on ("hostUsers: false"), and a network of its
	// own that leads nowhere. Zero is the host's.
	UserNamespace uint32
}

// A Pod is a running sandbox. Unless it has a user namespace it uses the host's
// network.
type Pod struct {
	ID, UID         string
	Name, Namespace string

	node    *Node
	handler string
	config  *runtimeapi.PodSandboxConfig
}

// RunPod runs the sandbox of a pod.
func (n *Node) RunPod(ctx context.Context, o PodOptions) (*Pod, error) {
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	if o.Name == "" {
		o.Name = fmt.Sprintf("pod-%d", n.pods.Add(1))
	}
	uid := newUID()
	logs := filepath.Join(n.inside("logs"), strings.Join([]string{o.Namespace, o.Name, uid}, "_"))
	if err := os.MkdirAll(n.Path(logs), 0o700); err != nil {
		return nil, err
	}
	labels := map[string]string{
		"io.kubernetes.pod.name":      o.Name,
		"io.kubernetes.pod.namespace": o.Namespace,
		"io.kubernetes.pod.uid":       uid,
	}
	for k, v := range o.Labels {
		if _, ours := labels[k]; !ours {
			labels[k] = v
		}
	}
	annotations := map[string]string{
		"kubernetes.io/config.seen":   time.Unix(0, 0).UTC().Format(time.RFC3339),
		"kubernetes.io/config.source": "api",
	}
	for k, v := range o.Annotations {
		annotations[k] = v
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: o.Name, Namespace: o.Namespace, Uid: uid},
		LogDirectory: logs,
		DnsConfig:    &runtimeapi.DNSConfig{},
		Labels:       labels,
		Annotations:  annotations,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: cgroupParent(n.Dir),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: namespaces(o.UserNamespace),
				Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			},
		},
	}
	res, err := n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: o.RuntimeHandler})
	if err != nil {
		return nil, err
	}
	return &Pod{ID: res.PodSandboxId, UID: uid, Name: o.Name, Namespace: o.Namespace, node: n, handler: o.RuntimeHandler, config: config}, nil
}

func namespaces(users uint32) *runtimeapi.NamespaceOption {
	o := &runtimeapi.NamespaceOption{
		Network: runtimeapi.NamespaceMode_NODE,
		Pid:     runtimeapi.NamespaceMode_CONTAINER,
		Ipc:     runtimeapi.NamespaceMode_POD,
	}
	if users != 0 {
		o.Network = runtimeapi.NamespaceMode_POD // containerd before 2.4 has no user namespaces on the host's
		ids := []*runtimeapi.IDMapping{{HostId: users, Length: 65536}}
		o.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	}
	return o
}

// ContainerOptions describe a container of a pod.
type ContainerOptions struct {
	Name  string // empty: "app"
	Image string // what the pod's author wrote: "registry.example/app:1"
	Pull  Pull

	// ImageID is what CRI is asked to run. Empty means what a kubelet would send: the
	// ID that pulling Image returned, or that of the image on the node.
	ImageID string

	Command     []string // replaces the image's entrypoint
	Args        []string // replaces the image's command
	Env         map[string]string
	Volumes     []ImageVolume
	Labels      map[string]string // more than a kubelet sends
	Annotations map[string]string // more than a kubelet sends
	Attempt     uint32            // how often the kubelet started it before
}

// An ImageVolume is an image as a volume.
type ImageVolume struct {
	Image   string // as in the pod; pulled if the node does not have it
	Path    string // where it is mounted
	SubPath string
}

// A Container is one that CRI created.
type Container struct {
	ID      string
	ImageID string
	Name    string
	Pod     *Pod

	log string
}

// Create pulls the image if it has to and creates a container. The error is
// CRI's as it is.
func (p *Pod) Create(ctx context.Context, o ContainerOptions) (*Container, error) {
	if o.Name == "" {
		o.Name = "app"
	}
	id := o.ImageID
	var err error
	if id == "" {
		if id, err = p.ensureImage(ctx, o.Image, o.Pull); err != nil {
			return nil, err
		}
	}
	var mounts []*runtimeapi.Mount
	for _, v := range o.Volumes {
		vid, err := p.ensureImage(ctx, v.Image, PullIfNotPresent)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, &runtimeapi.Mount{
			ContainerPath: v.Path,
			Readonly:      true,
			Image:         &runtimeapi.ImageSpec{Image: vid, UserSpecifiedImage: v.Image, RuntimeHandler: p.handler},
			ImageSubPath:  v.SubPath,
		})
	}
	attempt := strconv.FormatUint(uint64(o.Attempt), 10)
	labels := map[string]string{
		"io.kubernetes.container.name": o.Name,
		"io.kubernetes.pod.name":       p.Name,
		"io.kubernetes.pod.namespace":  p.Namespace,
		"io.kubernetes.pod.uid":        p.UID,
	}
	annotations := map[string]string{
		"io.kubernetes.container.hash":                     "0",
		"io.kubernetes.container.restartCount":             attempt,
		"io.kubernetes.container.terminationMessagePath":   "/dev/termination-log",
		"io.kubernetes.container.terminationMessagePolicy": "File",
		"io.kubernetes.pod.terminationGracePeriod":         "30",
	}
	for k, v := range o.Labels {
		labels[k] = v
	}
	for k, v := range o.Annotations {
		annotations[k] = v
	}
	var envs []*runtimeapi.KeyValue
	for k, v := range o.Env {
		envs = append(envs, &runtimeapi.KeyValue{Key: k, Value: []byte(v)})
	}
	log := filepath.Join(o.Name, attempt+".log")
	if err := os.MkdirAll(p.node.Path(filepath.Join(p.config.LogDirectory, o.Name)), 0o700); err != nil {
		return nil, err
	}
	res, err := p.node.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  p.ID,
		SandboxConfig: p.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata:    &runtimeapi.ContainerMetadata{Name: o.Name, Attempt: o.Attempt},
			Image:       &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: o.Image, RuntimeHandler: p.handler},
			Command:     o.Command,
			Args:        o.Args,
			Envs:        envs,
			Mounts:      mounts,
			Labels:      labels,
			Annotations: annotations,
			LogPath:     log,
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources:       &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuShares: 2, OomScoreAdj: 1000},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions},
			},
		},
	})
	if err != nil {
		return nil, err
	}
	return &Container{ID: res.ContainerId, ImageID: id, Name: o.Name, Pod: p, log: p.node.Path(filepath.Join(p.config.LogDirectory, log))}, nil
}

// ensureImage returns the ID of an image, as the kubelet's image manager finds it.
func (p *Pod) ensureImage(ctx context.Context, image string, pull Pull) (string, error) {
	if pull != PullAlways {
		id, err := p.node.ImageID(ctx, image)
		if err != nil || id != "" {
			return id, err
		}
		if pull == PullNever {
			return "", fmt.Errorf("image %q is not on the node and must not be pulled", image)
		}
	}
	return p.node.pull(ctx, image, p.handler, p.config)
}

// Remove stops and removes the pod with its containers. They are removed before it, as a
// kubelet does: otherwise containerd has hung (sandbox_remove.go, as of 2.4.2).
func (p *Pod) Remove(ctx context.Context) error {
	if _, err := p.node.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return err
	}
	list, err := p.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.ID}})
	if err != nil {
		return err
	}
	for _, c := range list.Containers {
		if _, err := p.node.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.Id}); err != nil {
			return err
		}
	}
	_, err = p.node.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Start starts a created container and waits until it runs, or has run.
func (c *Container) Start(ctx context.Context) error {
	if _, err := c.Pod.node.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID}); err != nil {
		return err
	}
	for {
		state, err := c.State(ctx)
		if err != nil {
			return err
		}
		if state == runtimeapi.ContainerState_CONTAINER_RUNNING || state == runtimeapi.ContainerState_CONTAINER_EXITED {
			return nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// State returns what CRI says of the container.
func (c *Container) State(ctx context.Context) (runtimeapi.ContainerState, error) {
	res, err := c.Pod.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
	return res.GetStatus().GetState(), err
}

// Running reports whether CRI says that the container runs.
func (c *Container) Running(ctx context.Context) (bool, error) {
	s, err := c.State(ctx)
	return s == runtimeapi.ContainerState_CONTAINER_RUNNING && err == nil, err
}

// Output waits until the container has printed a line and returns it: the words
// that its image was made with.
func (c *Container) Output(ctx context.Context) (string, error) {
	for {
		b, err := os.ReadFile(c.log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		// 2026-01-02T15:04:05.999999999Z stdout F text
		if line, _, ok := strings.Cut(string(b), "\n"); ok {
			fields := strings.SplitN(line, " ", 4)
			if len(fields) != 4 {
				return "", fmt.Errorf("%s: not a line of a CRI log: %q", c.log, line)
			}
			return fields[3], nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return "", fmt.Errorf("container %s printed nothing: %w", c.Name, err)
		}
	}
}

// Stop stops the container and gives it no time to end by itself.
func (c *Container) Stop(ctx context.Context) error {
	_, err := c.Pod.node.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID})
	return err
}

// Remove stops and removes the container; the pod stays.
func (c *Container) Remove(ctx context.Context) error {
	if err := c.Stop(ctx); err != nil {
		return err
	}
	_, err := c.Pod.node.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

// RunOptions say how Run runs an image.
type RunOptions struct {
	Pod       PodOptions
	Container ContainerOptions // Image is Run's own
	Retry     Retry
}

// A Retry says how long a refusal with PENDING is answered with another try. A
// kubelet tries again after 10 to 15 s for as long as the pod is there.
type Retry struct {
	Interval time.Duration // zero means 250 ms
	Limit    time.Duration // from the first try; zero means 30 s, less than zero no second try
}

// Run runs an image in a pod of its own and returns the running container. A
// creation that is refused with [PENDING] is tried again as a kubelet does, with
// the same pod and the same attempt. Any other error is returned at once, and
// the pod removed. Text gives CRI's words.
func (n *Node) Run(ctx context.Context, image string, o RunOptions) (*Container, error) {
	pod, err := n.RunPod(ctx, o.Pod)
	if err != nil {
		return nil, err
	}
	c, err := pod.Run(ctx, image, o.Container, o.Retry)
	if err != nil {
		return nil, errors.Join(err, pod.Remove(context.WithoutCancel(ctx)))
	}
	return c, nil
}

// Run creates and starts a container in the pod, with Node.Run's tries. A
// container that was created and not started is removed.
func (p *Pod) Run(ctx context.Context, image string, o ContainerOptions, r Retry) (*Container, error) {
	if r.Interval <= 0 {
		r.Interval = 250 * time.Millisecond
	}
	if r.Limit == 0 {
		r.Limit = 30 * time.Second
	}
	o.Image = image
	end := time.Now().Add(r.Limit)
	for {
		c, err := p.Create(ctx, o)
		if err == nil {
			if err = c.Start(ctx); err == nil {
				return c, nil
			}
			err = errors.Join(err, c.Remove(context.WithoutCancel(ctx)))
		}
		if !Pending(err) || time.Now().Add(r.Interval).After(end) {
			return nil, err
		}
		if pause(ctx, r.Interval) != nil {
			return nil, err
		}
	}
}

// Containers returns the IDs of the containers that CRI knows, in any state.
func (n *Node) Containers(ctx context.Context) ([]string, error) {
	res, err := n.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, c := range res.Containers {
		ids = append(ids, c.Id)
	}
	return ids, nil
}

// RemovePods stops and removes all pods of the node.
func (n *Node) RemovePods(ctx context.Context) error {
	res, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, s := range res.Items {
		if err := (&Pod{ID: s.Id, node: n}).Remove(ctx); err != nil && status.Code(err) != codes.NotFound {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// newUID makes the UID of a pod.
func newUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
