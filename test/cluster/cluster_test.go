package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

// The tests need root, 10 minutes to build Kubernetes the first time and a gigabyte:
// `make e2e-k8s` asks for them with this variable.
const wanted = "TIDEWAITER_TEST_KUBERNETES"

var (
	versions = node.Versions(node.Containerd24, node.Containerd23)
	leftOut  string // why nothing is tested, or empty
	program  string // tidewaiter
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(wanted) == "":
		leftOut = "make e2e-k8s runs them"
	case os.Geteuid() != 0:
		leftOut = "a node needs root"
	}
	if leftOut != "" {
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/cluster:", leftOut)
		os.Exit(m.Run())
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	leaktest.Main(m)
}

// prepare builds what takes long, before any test has a deadline.
func prepare() (err error) {
	ctx := context.Background()
	if _, err = cluster.FindPrograms(ctx, os.Stderr); err != nil {
		return err
	}
	for _, v := range versions {
		if _, err = node.FindTools(ctx, v, os.Stderr); err != nil {
			return err
		}
	}
	program, err = node.BuildTidewaiter(ctx)
	return err
}

// Who signs.
var (
	acme     = notarytest.NewCA(notarytest.CAOptions{})
	rival    = notarytest.NewCA(notarytest.CAOptions{})
	release  = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	stranger = rival.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

// A scene is one test on one cluster.
type scene struct {
	*testing.T
	*cluster.Cluster
	ctx  context.Context
	reg  *node.Registry // registry.example
	gate *node.Gate     // the last one started

	pause  string       // an image that is on the node
	events *node.Daemon // of containerd, see watch
	ends   []func()     // called before the node is stopped
}

// Where a gate has its files.
const (
	configDir = "/etc/tidewaiter"
	stateDir  = "/var/lib/tidewaiter"
)

// each runs a test on every version of containerd, one after the other.
func each(t *testing.T, start func(context.Context, node.Options) (*cluster.Cluster, error), o node.Options, f func(s *scene)) {
	t.Helper()
	if leftOut != "" {
		t.Skip(leftOut)
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
			defer cancel()
			s := &scene{T: t, ctx: ctx}
			var err error
			if s.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{}); err != nil {
				t.Fatal(err)
			}
			defer s.reg.Stop()
			o := o
			o.ContainerdVersion, o.Log = v, t.Output()
			began := time.Now()
			if s.Cluster, err = start(ctx, o); err != nil {
				t.Fatal(err)
			}
			t.Logf("the node was ready after %v", time.Since(began).Round(time.Second))
			defer func() {
				for _, end := range s.ends {
					end()
				}
				if t.Failed() {
					ctx := context.WithoutCancel(ctx)
					for _, args := range [][]string{{"get", "events", "-A"}, {"describe", "pods", "-n", namespace}, {"logs", "-n", namespace, "daemonset/tidewaiter"}} {
						if out, err := s.Kubectl(ctx, "", args...); err == nil {
							t.Log(tail(out))
						}
					}
					t.Log("kubelet:\n" + tail(bad(s.KubeletLog())))
					t.Log("containerd:\n" + tail(bad(s.Node.Log())))
					if s.gate != nil {
						t.Log("gate:\n" + tail(s.gate.Log()))
					}
				}
				tasks, err := s.Ctr(context.WithoutCancel(ctx), "tasks", "list")
				if err != nil {
					t.Error(err)
				}
				if err := s.Stop(); err != nil {
					t.Error(err)
				}
				gone(t, tasks)
			}()
			s.must(s.Use(s.reg))
			out, err := s.Ctr(ctx, "images", "list", "--quiet")
			s.must(err)
			s.pause = strings.Fields(out)[0]
			f(s)
		})
	}
}

// gone checks that the processes in a list of ctr have ended.
func gone(t *testing.T, tasks string) {
	for line := range strings.Lines(tasks) {
		f := strings.Fields(line) // TASK PID STATUS
		if len(f) < 3 || f[2] != "RUNNING" {
			continue
		}
		if _, err := os.Stat("/proc/" + f[1] + "/exe"); err == nil {
			t.Errorf("process %s of container %s is left", f[1], f[0])
		}
	}
}

// bad leaves what a log says to be wrong.
func bad(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		if strings.HasPrefix(line, "E") || strings.HasPrefix(line, "W") || strings.Contains(line, "level=warn") || strings.Contains(line, "level=error") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func tail(s string) string { return s[max(0, len(s)-8<<10):] }

func (s *scene) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// policy trusts acme's release for registry.example/app.
func (s *scene) policy(mode string) node.Config {
	prod := notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")
	prod.Scopes = []string{"registry.example/app"}
	return node.Config{
		Mode:       mode,
		Mirrors:    []node.Mirror{s.reg.Mirror()},
		Stores:     notarytest.Stores{"ca/acme/root.crt": acme.PEM()},
		Statements: []verify.Statement{prod},
	}
}

// startGate starts the gate as a process of the machine and waits until it is
// registered. What it keeps is kept over PowerCut too.
func (s *scene) startGate() {
	s.Helper()
	var err error
	s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: configDir, StateDir: stateDir, NodeName: cluster.NodeName, Binary: program})
	s.must(err)
	s.must(s.gate.WaitRegistered(s.ctx))
}

// push pushes an image that prints word, and has who sign it unless it is nil.
func (s *scene) push(word string, who *notarytest.Signer) *node.Image {
	s.Helper()
	img, err := s.reg.Push(s.ctx, "app:"+word, node.ImageOptions{Word: word})
	s.must(err)
	if who != nil {
		_, err = s.reg.Sign(s.ctx, img, who)
		s.must(err)
	}
	return img
}

// pod is a pod with one container.
func pod(name string, img *node.Image) string {
	return object("v1", "Pod", name, map[string]any{"spec": spec(img)})
}

// deployment is one with two pods, "web".
func deployment(img *node.Image) string {
	labels := map[string]any{"app": "web"}
	s := spec(img)
	delete(s, "hostNetwork") // they are the network of nobody
	return object("apps/v1", "Deployment", "web", map[string]any{"spec": map[string]any{
		"replicas": 2,
		"selector": map[string]any{"matchLabels": labels},
		"template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": s},
	}})
}

func object(version, kind, name string, o map[string]any) string {
	o["apiVersion"], o["kind"], o["metadata"] = version, kind, map[string]any{"name": name, "namespace": "default"}
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func spec(img *node.Image) map[string]any {
	return map[string]any{
		"hostNetwork": true, "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
		"containers": []any{map[string]any{"name": "app", "image": img.Name, "imagePullPolicy": "IfNotPresent"}},
	}
}

// static makes a static pod.
func (s *scene) static(name string, img *node.Image) {
	s.Helper()
	s.must(s.WriteFile(cluster.ManifestDir+"/"+name+".json", pod(name, img)))
}

// eventually waits until what says nil, for as long as a kubelet that is asked
// again after 10 to 15 seconds may need on a machine with much else to do.
func (s *scene) eventually(what func() error) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Minute)
	defer cancel()
	for {
		err := what()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatal(err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// A which chooses pods of the kubelet.
type which func(cluster.Pod) bool

// named chooses a pod by its name, a static one too.
func named(name string) which {
	return func(p cluster.Pod) bool {
		return p.Metadata.Name == name || p.Metadata.Name == name+"-"+cluster.NodeName
	}
}

// of chooses the pods that run an image.
func of(img *node.Image) which {
	return func(p cluster.Pod) bool { return p.Spec.Containers[0].Image == img.Name }
}

// status is what the kubelet says of the container of the first pod that is chosen.
func (s *scene) status(w which) (cluster.ContainerStatus, error) {
	pods, err := s.Pods(s.ctx)
	if err != nil {
		return cluster.ContainerStatus{}, err
	}
	for _, p := range pods {
		if !w(p) {
			continue
		}
		for _, st := range p.Status.ContainerStatuses {
			return st, nil
		}
		return cluster.ContainerStatus{}, fmt.Errorf("%s: no container yet, %s", p.Metadata.Name, p.Status.Phase)
	}
	return cluster.ContainerStatus{}, fmt.Errorf("the kubelet has no such pod among %d", len(pods))
}

// runs waits until CRI says that the container of a pod runs, restarted at least so
// often, and returns its ID. The name of a static pod is without the node's; one that
// ends in "-" is the start of that of a pod which a controller made.
func (s *scene) runs(name string, restarts uint32) (id string) {
	s.Helper()
	s.eventually(func() error {
		res, err := s.Runtime.ListContainers(s.ctx, &runtimeapi.ListContainersRequest{})
		if err != nil {
			return err
		}
		var found []string
		for _, c := range res.Containers {
			p := c.Labels["io.kubernetes.pod.name"]
			if p != name && p != name+"-"+cluster.NodeName && !(strings.HasSuffix(name, "-") && strings.HasPrefix(p, name)) {
				continue
			}
			if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && c.Metadata.Attempt >= restarts {
				id = c.Id
				return nil
			}
			found = append(found, fmt.Sprintf("%s attempt %d", c.State, c.Metadata.Attempt))
		}
		st, err := s.status(named(name))
		return fmt.Errorf("%s does not run, or has not been restarted %d times: %v; %s %v", name, restarts, found, show(st), err)
	})
	return id
}

// refused waits until the kubelet says of a pod that the gate refused it for the
// reason. It fails if the pod ran before. It returns our line. Of a pod that is not
// static the kubelet says what the API server has taken in.
func (s *scene) refused(w which, code verify.Reason) string {
	s.Helper()
	var line string
	s.eventually(func() error {
		st, err := s.status(w)
		if err != nil {
			return err
		}
		wait := st.State.Waiting
		if wait == nil || st.RestartCount != 0 || st.ContainerID != "" {
			s.Fatalf("want it refused: %s", show(st))
		}
		_, line, _ = strings.Cut(wait.Message, "tidewaiter: ")
		if wait.Reason != "CreateContainerError" || !strings.HasPrefix(line, "denied ["+string(code)+"] ") {
			return fmt.Errorf("want %s: %s", code, show(st))
		}
		return nil
	})
	return "tidewaiter: " + line
}

func show(st cluster.ContainerStatus) string {
	b, err := json.Marshal(st)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// end kills the container of a pod, as a program that crashes.
func (s *scene) end(name string) {
	s.Helper()
	_, err := s.Ctr(s.ctx, "task", "kill", "--signal", "SIGKILL", s.runs(name, 0))
	s.must(err)
}

// watch has containerd say of every container that it creates, for created. It ends
// with containerd.
func (s *scene) watch() {
	s.Helper()
	d, err := s.StartDaemon("events", s.Tools.Ctr, "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io", "events")
	s.must(err)
	s.events = d
	// It says nothing when it is ready: something happens until it has heard it.
	s.eventually(func() error {
		mark := fmt.Sprintf("registry.example/mark:%d", time.Now().UnixNano())
		if _, err := s.Ctr(s.ctx, "images", "tag", s.pause, mark); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
		if _, err := s.Ctr(s.ctx, "images", "remove", mark); err != nil {
			return err
		}
		if !strings.Contains(d.Log(), mark) {
			return errors.New("no event of an image that was tagged")
		}
		return nil
	})
}

// created returns how many containers of an image containerd has created since
// the first watch.
func (s *scene) created(img *node.Image) (n int) {
	for line := range strings.Lines(s.events.Log()) {
		if strings.Contains(line, "/containers/create") && strings.Contains(line, `"`+img.Name+`"`) {
			n++
		}
	}
	return n
}

// noEscape checks that containerd created containers of good, which must run, and
// none of the others.
func (s *scene) noEscape(good *node.Image, others ...*node.Image) {
	s.Helper()
	if s.created(good) == 0 {
		s.Errorf("no container of %s was created, as far as events say:\n%s", good.Name, tail(s.events.Log()))
	}
	for _, img := range others {
		if n := s.created(img); n > 0 {
			s.Errorf("%d containers of %s were created", n, img.Name)
		}
	}
}
