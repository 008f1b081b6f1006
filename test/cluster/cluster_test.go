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

	"go.uber.org/goleak"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/notary/notarytest"
)

// The tests need root, 10 minutes to build Kubernetes the first time and a gigabyte:
// `make e2e-k8s` asks for them with this variable.
const wanted = "TIDEWAITER_TEST_KUBERNETES"

var (
	versions = node.Versions(node.Containerd24, node.Containerd22)
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
	goleak.VerifyTestMain(m)
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
				if t.Failed() {
					t.Log("kubelet:\n" + tail(s.KubeletLog()))
					t.Log("containerd:\n" + tail(s.Node.Log()))
					if s.gate != nil {
						t.Log("gate:\n" + tail(s.gate.Log()))
					}
				}
				if err := s.Stop(); err != nil {
					t.Error(err)
				}
			}()
			s.must(s.Use(s.reg))
			f(s)
		})
	}
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

// pod is a pod with one container, and a name that is its image's tag.
func pod(img *node.Image) string {
	name := img.Name[strings.LastIndex(img.Name, ":")+1:]
	b, err := json.Marshal(map[string]any{
		"apiVersion": "v1",
		"kind":       "Pod",
		"metadata":   map[string]any{"name": name, "namespace": "default", "labels": map[string]any{"app": name}},
		"spec":       spec(img),
	})
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

// static is the file of a static pod.
func static(img *node.Image) string {
	return cluster.ManifestDir + "/" + img.Name[strings.LastIndex(img.Name, ":")+1:] + ".json"
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

// status is what the kubelet says of the container of a pod whose name starts with
// the tag of img.
func (s *scene) status(img *node.Image) (cluster.ContainerStatus, error) {
	name := img.Name[strings.LastIndex(img.Name, ":")+1:]
	pods, err := s.Pods(s.ctx)
	if err != nil {
		return cluster.ContainerStatus{}, err
	}
	for _, p := range pods {
		if strings.HasPrefix(p.Metadata.Name, name+"-") || p.Metadata.Name == name {
			for _, st := range p.Status.ContainerStatuses {
				return st, nil
			}
			return cluster.ContainerStatus{}, fmt.Errorf("%s: no container yet, %s", p.Metadata.Name, p.Status.Phase)
		}
	}
	return cluster.ContainerStatus{}, fmt.Errorf("the kubelet has no pod %s: %+v", name, pods)
}

// runs waits until the pod of an image runs, restarted at least so often.
func (s *scene) runs(img *node.Image, restarts int) cluster.ContainerStatus {
	s.Helper()
	var st cluster.ContainerStatus
	s.eventually(func() (err error) {
		if st, err = s.status(img); err == nil && (st.State.Running == nil || st.RestartCount < restarts) {
			err = fmt.Errorf("%s does not run: %+v", img.Name, st)
			if w := st.State.Waiting; w != nil {
				err = errors.Join(err, fmt.Errorf("%s: %s", w.Reason, w.Message))
			}
		}
		return err
	})
	return st
}

// refused waits until the kubelet says of the pod of an image that the gate
// refused it for the reason, and checks that it never ran. It returns our line.
func (s *scene) refused(img *node.Image, code verify.Reason) string {
	s.Helper()
	var line string
	s.eventually(func() error {
		st, err := s.status(img)
		if err != nil {
			return err
		}
		w := st.State.Waiting
		if w == nil || st.RestartCount != 0 || st.ContainerID != "" {
			s.Fatalf("%s: %+v, want it refused", img.Name, st)
		}
		_, line, _ = strings.Cut(w.Message, "tidewaiter: ")
		if w.Reason != "CreateContainerError" || !strings.HasPrefix(line, "denied ["+string(code)+"] ") {
			return fmt.Errorf("%s: %s: %s, want %s", img.Name, w.Reason, w.Message, code)
		}
		return nil
	})
	s.neverRan(img)
	return "tidewaiter: " + line
}

// neverRan checks that containerd has no container of an image.
func (s *scene) neverRan(img *node.Image) {
	s.Helper()
	out, err := s.Ctr(s.ctx, "containers", "list")
	s.must(err)
	if strings.Contains(out, img.Name) {
		s.Errorf("%s has a container:\n%s", img.Name, out)
	}
}

// end kills the container of an image, as a program that crashes.
func (s *scene) end(img *node.Image) {
	s.Helper()
	st, err := s.status(img)
	s.must(err)
	_, id, _ := strings.Cut(st.ContainerID, "://")
	_, err = s.Ctr(s.ctx, "task", "kill", "--signal", "SIGKILL", id)
	s.must(err)
}
