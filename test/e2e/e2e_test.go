// Package e2e tests the gate on real nodes: the process `tidewaiter run`, a real
// containerd of each version that the gate is made for, images in a registry and
// a client that asks CRI as a kubelet does. What a case asserts is the reason
// code, the text that the client sees, and what really runs.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

var versions = node.Versions(node.Containerd24, node.Containerd23)

var (
	notRoot string            // why nothing can be tested, or empty
	program string            // tidewaiter
	shared  map[string]*world // by version
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		notRoot = "a node needs root"
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/e2e:", notRoot)
		os.Exit(m.Run())
	}
	code, err := runTests(m)
	if err == nil {
		err = leaktest.Find()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	ctx := context.Background()
	if program, err = node.BuildTidewaiter(ctx); err != nil {
		return 1, err
	}
	shared = map[string]*world{}
	defer func() {
		for _, w := range shared {
			err = errors.Join(err, w.stop())
		}
	}()
	for _, v := range versions {
		if _, err := node.FindTools(ctx, v, os.Stderr); err != nil {
			return 1, err
		}
		w, err := newWorld(ctx, node.Options{ContainerdVersion: v, Required: true, RequestTimeout: patience})
		if err != nil {
			return 1, err
		}
		shared[v] = w
	}
	return m.Run(), nil
}

// A world is a node with registries.
type world struct {
	*node.Node
	reg  *node.Registry // registry.example, with a Referrers API
	tags *node.Registry // tags.example, without: signatures are found by tag
}

// patience is how long containerd waits for the gate: more than its 2 s, so that a
// machine that is busy is no gate that hangs. The gate's own time is not longer for that.
const patience = 5 * time.Second

func newWorld(ctx context.Context, o node.Options) (_ *world, err error) {
	w := &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.stop())
		}
	}()
	if w.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{}); err != nil {
		return nil, err
	}
	if w.tags, err = node.NewRegistry("tags.example", node.RegistryOptions{NoReferrers: true}); err != nil {
		return nil, err
	}
	if w.Node, err = node.Start(ctx, o); err != nil {
		return nil, err
	}
	return w, w.Use(w.reg, w.tags)
}

func (w *world) stop() (err error) {
	if w.Node != nil {
		err = w.Node.Stop()
	}
	for _, r := range []*node.Registry{w.reg, w.tags} {
		if r != nil {
			err = errors.Join(err, r.Stop())
		}
	}
	return err
}

// Who signs.
var (
	acme     = notarytest.NewCA(notarytest.CAOptions{})
	rival    = notarytest.NewCA(notarytest.CAOptions{})
	release  = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	intern   = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("intern")})
	stranger = rival.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

const releaseIdentity = "x509.subject: C=US, ST=WA, O=acme, CN=release"

// policy trusts acme's release for the repository app at both registries.
func (w *world) policy() node.Config {
	prod := notarytest.Statement("prod", releaseIdentity)
	prod.Scopes = []string{"registry.example/app", "tags.example/app"}
	return node.Config{
		Mode:       "enforce",
		Mirrors:    []node.Mirror{w.reg.Mirror(), w.tags.Mirror()},
		Stores:     notarytest.Stores{"ca/acme/root.crt": acme.PEM()},
		Statements: []verify.Statement{prod},
	}
}

// A scene is one test on one node.
type scene struct {
	*testing.T
	*world
	ctx  context.Context
	dir  string     // the gate's configuration
	gate *node.Gate // the last one started
	pod  *node.Pod  // where containers run
	next int        // numbers containers
}

// each runs a test on the shared node of every version, the versions side by side.
func each(t *testing.T, f func(s *scene)) {
	t.Helper()
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			f(newScene(t, shared[v]))
		})
	}
}

// eachOwn runs a test on a node of its own of every version.
func eachOwn(t *testing.T, o func(t *testing.T, version string) node.Options, f func(s *scene)) {
	t.Helper()
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			o := o(t, v)
			o.ContainerdVersion, o.Required, o.RequestTimeout, o.Log = v, true, patience, t.Output()
			w, err := newWorld(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := w.stop(); err != nil {
					t.Error(err)
				}
			})
			f(newScene(t, w))
		})
	}
}

func newScene(t *testing.T, w *world) *scene {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	s := &scene{T: t, world: w, ctx: ctx, dir: filepath.Join(t.TempDir(), "config")}
	t.Cleanup(func() {
		defer cancel()
		clean := context.WithoutCancel(ctx)
		if err := w.RemovePods(clean); err != nil {
			t.Error(err)
		}
		if s.gate == nil {
			return
		}
		select {
		case <-s.gate.Done():
		default:
			if err := s.gate.Stop(); err != nil {
				t.Errorf("the gate ended with %v", err)
			}
		}
		s.noSecrets("the gate's log", s.gate.Log())
		if t.Failed() {
			t.Log(s.gate.Log())
		}
	})
	w.reg.Fault(nil)
	w.tags.Fault(nil)
	s.pod = s.runPod(node.PodOptions{})
	return s
}

func (s *scene) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *scene) runPod(o node.PodOptions) *node.Pod {
	s.Helper()
	p, err := s.RunPod(s.ctx, o)
	s.must(err)
	return p
}

// configure writes a configuration; a gate that runs is waited for until it has it.
func (s *scene) configure(c node.Config) {
	s.Helper()
	mark := 0
	if s.gate != nil {
		mark = s.gate.Mark()
	}
	s.must(node.WriteConfig(s.dir, c))
	if s.gate == nil {
		return
	}
	// Not one that was there when some of the files were written.
	out, err := exec.CommandContext(s.ctx, program, "policy", "show", "--config-dir", s.dir).Output()
	s.must(err)
	m := regexp.MustCompile(`, revision ([0-9a-f]{32})`).FindSubmatch(out)
	if m == nil {
		s.Fatalf("no revision in %s", out)
	}
	s.wait(mark, func(l node.Line) bool {
		return l.Msg == "configuration in force" && l.Fields["revision"] == string(m[1])
	})
}

// replace replaces a file at once: nobody reads a half of it.
func (s *scene) replace(file, content string) {
	s.Helper()
	s.must(os.WriteFile(file+".next", []byte(content), 0o644))
	s.must(os.Rename(file+".next", file))
}

// start starts the gate with what is configured and waits until it is registered.
func (s *scene) start() {
	s.Helper()
	var err error
	s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, NodeName: "edge-1", Binary: program})
	s.must(err)
	s.wait(0, node.Registered)
}

// wait returns a line that the gate logs after mark.
func (s *scene) wait(mark int, match func(node.Line) bool) node.Line {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Minute)
	defer cancel()
	l, err := s.gate.Wait(ctx, mark, match)
	s.must(err)
	return l
}

// Secrets are in the environment and the arguments of every container that is
// asked for, and in the configuration of every image.
const (
	secretEnv   = "s3cr3t-in-env"
	secretArg   = "s3cr3t-in-argv"
	secretImage = "s3cr3t-in-image"
)

func (s *scene) noSecrets(where, text string) {
	s.Helper()
	for _, secret := range []string{secretEnv, secretArg, secretImage} {
		if strings.Contains(text, secret) {
			s.Errorf("%s holds %s:\n%s", where, secret, text)
		}
	}
}

// push pushes an image that prints its word.
func (s *scene) push(r *node.Registry, name string, o node.ImageOptions) *node.Image {
	s.Helper()
	o.Env = append(o.Env, "IMAGE_TOKEN="+secretImage)
	img, err := r.Push(s.ctx, name, o)
	s.must(err)
	return img
}

// signed pushes an image that acme released.
func (s *scene) signed(name, word string) *node.Image {
	s.Helper()
	img := s.push(s.reg, name, node.ImageOptions{Word: word})
	_, err := s.reg.Sign(s.ctx, img, release)
	s.must(err)
	return img
}

func (s *scene) pull(image string) (id string) {
	s.Helper()
	id, err := s.PullImage(s.ctx, image)
	s.must(err)
	return id
}

// allowed runs an image in the scene's pod; what it prints is its own word.
func (s *scene) allowed(image, word string, o node.ContainerOptions) *node.Container {
	s.Helper()
	s.prepare(&o)
	c, err := s.pod.Run(s.ctx, image, o, node.Retry{})
	if err != nil {
		s.Fatalf("%s was refused: %v", image, err)
	}
	s.runs(c, word)
	return c
}

// runs checks that a container runs and prints word.
func (s *scene) runs(c *node.Container, word string) {
	s.Helper()
	out, err := c.Output(s.ctx)
	if err != nil || out != word {
		s.Errorf("container %s printed %q (%v), want %q", c.Name, out, err, word)
	}
	if ok, err := c.Running(s.ctx); !ok || err != nil {
		s.Errorf("container %s does not run: %v", c.Name, err)
	}
}

// denied checks that an image does not start in the scene's pod, as a kubelet
// starts it, and returns the line that the user sees.
func (s *scene) denied(image string, code verify.Reason, o node.ContainerOptions) string {
	s.Helper()
	line, _ := s.refused(image, code, o)
	return line
}

// refused also says whether the container was created, and refused to start.
func (s *scene) refused(image string, code verify.Reason, o node.ContainerOptions) (line string, created bool) {
	s.Helper()
	s.prepare(&o)
	o.Image, o.Args = image, []string{"--password=" + secretArg}
	before, err := s.Containers(s.ctx)
	s.must(err)
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		var c *node.Container
		c, err = s.pod.Create(s.ctx, o)
		if created = err == nil; created {
			err = c.Start(s.ctx)
			s.neverRan(c)
			s.must(c.Remove(s.ctx))
		}
		// A mirror that has just come back is left alone for some seconds more.
		settled := !node.Pending(err) && (err == nil || !strings.Contains(node.Text(err), "[SOURCE_UNREACHABLE]") || code == verify.SourceUnreachable)
		if settled || time.Now().After(end) {
			break
		}
	}
	after, cerr := s.Containers(s.ctx)
	slices.Sort(before)
	slices.Sort(after)
	if cerr != nil || !slices.Equal(before, after) {
		s.Errorf("%s: containers before %v, after %v, %v", image, before, after, cerr)
	}
	if err == nil {
		s.Fatalf("%s was started, want %s", image, code)
	}
	return s.line(err, code), created
}

func (s *scene) prepare(o *node.ContainerOptions) {
	s.next++
	if o.Name == "" {
		o.Name = fmt.Sprintf("c%d", s.next)
	}
	o.Env = map[string]string{"TOKEN": secretEnv}
}

// neverRan checks that a container that was refused to start has done nothing.
func (s *scene) neverRan(c *node.Container) {
	s.Helper()
	if state, err := c.State(s.ctx); err != nil || state == runtimeapi.ContainerState_CONTAINER_RUNNING {
		s.Errorf("container %s is %v, %v", c.Name, state, err)
	}
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Millisecond)
	defer cancel()
	if out, err := c.Output(ctx); err == nil {
		s.Errorf("container %s printed %q", c.Name, out)
	}
}

// line checks what the client of CRI sees and returns our part of it.
func (s *scene) line(err error, code verify.Reason) string {
	s.Helper()
	text := node.Text(err)
	s.noSecrets("the error of CRI", text)
	at := strings.Index(text, "tidewaiter: ")
	if at < 0 {
		s.Fatalf("want %s, not an answer of the gate: %s", code, text)
	}
	line := text[at:]
	if !strings.HasPrefix(line, "tidewaiter: denied ["+string(code)+"] ") {
		s.Errorf("want %s: %s", code, text)
	}
	if len(line) > 640 || strings.ContainsAny(line, "\n\r\t") {
		s.Errorf("%d bytes, or more than a line: %q", len(line), line)
	}
	if !strings.Contains(line, "; on node edge-1: tidewaiter explain ") {
		s.Errorf("no node and command: %s", line)
	}
	return line
}

// absent checks that containerd refuses to create containers since the gate is
// not connected, or has just gone: containerd learns that by asking it.
func (s *scene) absent(image string) {
	s.Helper()
	o := node.ContainerOptions{Image: image}
	s.prepare(&o)
	c, err := s.pod.Create(s.ctx, o)
	if err == nil {
		s.Fatalf("container %s was created without the gate", c.ID)
	}
	if text := node.Text(err); !strings.Contains(text, `required plugin "tidewaiter" not present`) && !strings.Contains(text, "validator plugin 99-tidewaiter failed: ttrpc: closed") {
		s.Errorf("without the gate: %s", text)
	}
}

// decision is the report in a line of the gate's log.
func decision(l node.Line) map[string]any {
	d, _ := l.Fields["decision"].(map[string]any)
	return d
}

// atOnce runs f n times, at most w at a time.
func atOnce(n, w int, f func(i int)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, w)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() { f(i); <-slots })
	}
	wg.Wait()
}
