package node_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

// notRoot says why the tests that start a node are left out, or is empty.
var notRoot string

func TestMain(m *testing.M) {
	switch os.Getenv("TIDEWAITER_TEST_AS") {
	case "gate":
		beGate()
	case "victim":
		beVictim()
	}
	if os.Geteuid() != 0 {
		notRoot = "a node needs root"
		fmt.Fprintln(os.Stderr, "LEFT OUT: the tests of test/node that start a node:", notRoot)
		os.Exit(m.Run())
	}
	for _, v := range versions {
		if _, err := node.FindTools(context.Background(), v, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	leaktest.Main(m)
}

var versions = node.Versions(node.Containerd24, node.Containerd23)

// each runs a test on every version, the versions side by side.
func each(t *testing.T, f func(t *testing.T, ctx context.Context, version string)) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
			defer cancel()
			f(t, ctx, v)
		})
	}
}

func start(t *testing.T, ctx context.Context, o node.Options) *node.Node {
	t.Helper()
	o.Log = t.Output()
	n, err := node.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.Log())
		}
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func newRegistry(t *testing.T, host string, o node.RegistryOptions) *node.Registry {
	t.Helper()
	r, err := node.NewRegistry(host, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func push(t *testing.T, ctx context.Context, r *node.Registry, name string, o node.ImageOptions) *node.Image {
	t.Helper()
	img, err := r.Push(ctx, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// run runs an image and returns what its container prints.
func run(t *testing.T, ctx context.Context, n *node.Node, image string, o node.RunOptions) (*node.Container, string) {
	t.Helper()
	c, err := n.Run(ctx, image, o)
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Output(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c, out
}

func TestRun(t *testing.T) {
	each(t, func(t *testing.T, ctx context.Context, version string) {
		n := start(t, ctx, node.Options{ContainerdVersion: version})
		reg := newRegistry(t, "registry.example", node.RegistryOptions{})
		if err := n.Use(reg); err != nil {
			t.Fatal(err)
		}
		plain := push(t, ctx, reg, "app:1", node.ImageOptions{Word: "hello"})
		files := push(t, ctx, reg, "team/data:1", node.ImageOptions{Word: "@/data/word", Files: map[string]string{"/data/word": "from a file"}})
		index := push(t, ctx, reg, "app:multi", node.ImageOptions{
			Word: "this machine", Index: true,
			Decoys: []node.Decoy{{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}}, {Platform: ocispec.Platform{OS: "windows", Architecture: "amd64"}, Image: plain}},
		})
		docker := push(t, ctx, reg, "app:docker", node.ImageOptions{Word: "docker", Docker: true})

		for _, tt := range []struct {
			image string
			of    *node.Image
			want  string
		}{
			{plain.Name, plain, "hello"},
			{plain.Pinned(), plain, "hello"},
			{files.Name, files, "from a file"},
			{index.Name, index, "this machine"},
			{docker.Name, docker, "docker"},
		} {
			c, out := run(t, ctx, n, tt.image, node.RunOptions{})
			if out != tt.want {
				t.Errorf("%s printed %q, want %q", tt.image, out, tt.want)
			}
			if c.ImageID != tt.of.Config.Digest.String() {
				t.Errorf("%s has the image ID %s, want %s", tt.image, c.ImageID, tt.of.Config.Digest)
			}
		}
		if plain.DiffIDs[0] != docker.DiffIDs[0] || plain.Config.Digest == docker.Config.Digest {
			t.Error("images that differ in their word should have one root file system and two configurations")
		}

		// What a pod's author wrote reaches the runtime beside the image ID.
		c, _ := run(t, ctx, n, plain.Name, node.RunOptions{Pod: node.PodOptions{Namespace: "team-a", RuntimeHandler: node.OtherHandler}})
		info, err := n.Ctr(ctx, "container", "info", c.ID)
		if err != nil || !strings.Contains(info, `"io.kubernetes.cri.image-name": "registry.example/app:1"`) || !strings.Contains(info, `"team-a"`) {
			t.Errorf("container info: %v\n%s", err, info)
		}

		if _, err := n.RunPod(ctx, node.PodOptions{RuntimeHandler: "unheard-of"}); err == nil || !strings.Contains(node.Text(err), "unheard-of") {
			t.Errorf("a runtime handler that does not exist: %v", err)
		}

		// An image volume.
		v := []node.ImageVolume{{Image: files.Name, Path: "/volume"}}
		_, out := run(t, ctx, n, plain.Name, node.RunOptions{Container: node.ContainerOptions{Volumes: v, Args: []string{"volume", "@/volume/data/word"}}})
		if out != "volume from a file" {
			t.Errorf("with an image volume: printed %q", out)
		}

		// The mirror goes away: what is on the node runs, what is not cannot be pulled.
		reg.Forget()
		if err := reg.Stop(); err != nil {
			t.Fatal(err)
		}
		run(t, ctx, n, plain.Name, node.RunOptions{})
		if _, err := n.PullImage(ctx, "registry.example/app:other"); err == nil {
			t.Error("pulled from a registry that is down")
		}
		if err := reg.Start(); err != nil {
			t.Fatal(err)
		}
		push(t, ctx, reg, "app:other", node.ImageOptions{Word: "other"})
		reg.Forget()
		if _, err := n.PullImage(ctx, "registry.example/app:other"); err != nil {
			t.Error(err)
		}
		if !slices.ContainsFunc(reg.Requests(), func(r node.Request) bool {
			return r.Method == "HEAD" && r.Path == "/v2/app/manifests/other" && r.Query == "ns=registry.example" && r.Status == 200
		}) {
			t.Errorf("requests: %+v", reg.Requests())
		}

		// A restart, and a crash, of containerd leave containers alone.
		if err := n.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		if ok, err := c.Running(ctx); !ok || err != nil {
			t.Errorf("after a restart of containerd: running %v, %v", ok, err)
		}
		if err := n.StopContainerd(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := n.StartContainerd(ctx); err != nil {
			t.Fatal(err)
		}
		if err := c.Remove(ctx); err != nil {
			t.Error(err)
		}
		if err := c.Pod.Remove(ctx); err != nil {
			t.Error(err)
		}

		dir := n.Dir
		before := traces(t, dir)
		if len(before) < 10 {
			t.Errorf("a running node should leave traces to look for, found %v", before)
		}
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
		if left := traces(t, dir); len(left) > 0 {
			t.Errorf("left after Stop: %v", left)
		}
	})
}

// traces returns every process, mount, socket, cgroup and file of the node in
// dir, looked for by other means than the node's own. A dead process that init
// has not waited for yet is none.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	if _, err := os.Stat(dir); err == nil {
		found = append(found, dir)
	}
	base := filepath.Base(dir)
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if state, _ := os.ReadFile(filepath.Join(p, "stat")); strings.Contains(string(state), ") Z ") {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cgroup, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		environ, _ := os.ReadFile(filepath.Join(p, "environ"))
		if strings.Contains(string(cmdline), base) || strings.Contains(string(cgroup), base) || strings.Contains(string(environ), "="+dir+"\x00") {
			found = append(found, p+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	for _, table := range []string{"/proc/self/mountinfo", "/proc/net/unix"} {
		f, err := os.Open(table)
		if err != nil {
			t.Fatal(err)
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			if strings.Contains(s.Text(), base) {
				found = append(found, s.Text())
			}
		}
		f.Close()
	}
	for _, pattern := range []string{"/sys/fs/cgroup/" + base, "/sys/fs/cgroup/*/" + base} {
		dirs, _ := filepath.Glob(pattern)
		found = append(found, dirs...)
	}
	return found
}

// TestRequired has no plugin first, then one that answers PENDING twice.
func TestRequired(t *testing.T) {
	each(t, func(t *testing.T, ctx context.Context, version string) {
		n := start(t, ctx, node.Options{ContainerdVersion: version, Required: true, RequestTimeout: 15500 * time.Millisecond})
		reg := newRegistry(t, "registry.example", node.RegistryOptions{})
		if err := n.Use(reg); err != nil {
			t.Fatal(err)
		}
		img := push(t, ctx, reg, "app:1", node.ImageOptions{Word: "hello"})

		dump, err := n.ConfigDump(ctx)
		if err != nil || !strings.Contains(dump, `required_plugins = ['tidewaiter']`) || !strings.Contains(dump, `plugin_request_timeout = '15.5s'`) {
			t.Errorf("configuration: %v\n%s", err, dump)
		}
		_, err = n.Run(ctx, img.Name, node.RunOptions{})
		const want = `failed to create containerd container: failed to get NRI adjustment for container: validator "00-default-validator" rejected container adjustment, reason: validation error: required plugin "tidewaiter" not present`
		if got := node.Text(err); got != want {
			t.Errorf("without the plugin:\n got %s\nwant %s", got, want)
		}

		p := &plugin{}
		p.pending.Store(2)
		s, err := stub.New(p, stub.WithSocketPath(n.NRISocket), stub.WithPluginName("tidewaiter"), stub.WithPluginIdx("99"))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			t.Fatal(err)
		}
		defer s.Stop()
		_, err = n.Run(ctx, img.Name, node.RunOptions{Retry: node.Retry{Limit: -1}})
		if !node.Pending(err) || !strings.HasSuffix(node.Text(err), "tidewaiter: denied [PENDING] try again") {
			t.Errorf("one try: %v", err)
		}
		c, out := run(t, ctx, n, img.Name, node.RunOptions{})
		if out != "hello" || p.asked.Load() != 3 {
			t.Errorf("printed %q after %d tries", out, p.asked.Load())
		}
		s.Stop()
		s.Wait()

		if err := n.Require(ctx, false); err != nil {
			t.Fatal(err)
		}
		if ok, err := c.Running(ctx); !ok || err != nil {
			t.Errorf("after Require: running %v, %v", ok, err)
		}
		run(t, ctx, n, img.Name, node.RunOptions{})
	})
}

// TestRemoveWhileRegistering removes pods with containers, in the order of a kubelet,
// while plugins register.
func TestRemoveWhileRegistering(t *testing.T) {
	each(t, func(t *testing.T, ctx context.Context, version string) {
		n := start(t, ctx, node.Options{ContainerdVersion: version})
		reg := newRegistry(t, "registry.example", node.RegistryOptions{})
		if err := n.Use(reg); err != nil {
			t.Fatal(err)
		}
		img := push(t, ctx, reg, "app:1", node.ImageOptions{Word: "hello"})
		for range 3 {
			p, err := n.RunPod(ctx, node.PodOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 5 {
				if _, err := p.Run(ctx, img.Name, node.ContainerOptions{Name: fmt.Sprint("c", i)}, node.Retry{}); err != nil {
					t.Fatal(err)
				}
			}
			quit, done := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(done)
				for {
					select {
					case <-quit:
						return
					default:
					}
					s, err := stub.New(&plugin{}, stub.WithSocketPath(n.NRISocket), stub.WithPluginName("comes-and-goes"), stub.WithPluginIdx("50"),
						stub.WithOnClose(func() {})) // without one the stub ends the process
					if err == nil && s.Start(ctx) == nil {
						s.Stop()
						s.Wait()
					}
				}
			}()
			err = p.Remove(ctx)
			close(quit)
			<-done
			if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A plugin answers PENDING a few times and then allows.
type plugin struct{ pending, asked atomic.Int64 }

func (p *plugin) ValidateContainerAdjustment(context.Context, *api.ValidateContainerAdjustmentRequest) error {
	p.asked.Add(1)
	if p.pending.Add(-1) >= 0 {
		return errors.New("tidewaiter: denied [PENDING] try again")
	}
	return nil
}

// TestKilled kills a process that has started a node with a container, in a way
// that lets it do nothing more.
func TestKilled(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "TIDEWAITER_TEST_AS=victim")
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir, err := bufio.NewReader(out).ReadString('\n')
	dir = strings.TrimSpace(dir)
	if err != nil || len(traces(t, dir)) < 5 {
		t.Errorf("node in %q: %v", dir, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	var left []string
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if left = traces(t, dir); len(left) == 0 {
			return
		}
	}
	t.Errorf("left after the death of the process that started the node: %v", left)
}

func beVictim() {
	err := func() error {
		ctx := context.Background()
		n, err := node.Start(ctx, node.Options{ContainerdVersion: node.Containerd23, Log: os.Stderr})
		if err != nil {
			return err
		}
		reg, err := node.NewRegistry("registry.example", node.RegistryOptions{})
		if err != nil {
			return err
		}
		if err := n.Use(reg); err != nil {
			return err
		}
		img, err := reg.Push(ctx, "app:1", node.ImageOptions{Word: "hello"})
		if err != nil {
			return err
		}
		if _, err := n.Run(ctx, img.Name, node.RunOptions{}); err != nil {
			return err
		}
		fmt.Println(n.Dir)
		return nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	select {}
}

// TestGate starts this program as a gate, to see what is done with the process.
func TestGate(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	n := start(t, ctx, node.Options{})
	o := node.GateOptions{ConfigDir: t.TempDir(), Binary: "/proc/self/exe", Env: []string{"TIDEWAITER_TEST_AS=gate"}}
	g, err := n.StartGate(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.WaitRegistered(ctx); err != nil {
		t.Fatal(err)
	}
	first := g.Lines()[0]
	args, _ := first.Fields["args"].([]any)
	if first.Msg != "starting" || first.Level != "INFO" || first.Time.IsZero() ||
		!slices.Contains(args, any(n.Socket)) || !slices.Contains(args, any(n.NRISocket)) || !slices.Contains(args, any(o.ConfigDir)) {
		t.Errorf("first line: %+v", first)
	}
	if m, err := g.Memory(); err != nil || m.RSS < 1<<20 || m.Anon > m.RSS || m.Peak < m.RSS {
		t.Errorf("memory: %+v, %v", m, err)
	}
	mark := g.Mark()
	if err := g.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if l, err := g.Wait(ctx, mark, func(l node.Line) bool { return strings.HasPrefix(l.Raw, "not JSON") }); err != nil || l.Msg != "" {
		t.Errorf("line after a signal: %+v, %v", l, err)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if _, err := g.Wait(ctx, 0, func(l node.Line) bool { return l.Msg == "never" }); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("waiting for a gate that has ended: %v", err)
	}

	// The node ends a gate that does not end by itself.
	o.Args = []string{"--deaf"}
	if g, err = n.StartGate(ctx, o); err != nil {
		t.Fatal(err)
	}
	if err := g.WaitRegistered(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
	default:
		t.Error("a gate lives on after Stop")
	}
	if left := traces(t, n.Dir); len(left) > 0 {
		t.Errorf("left after Stop: %v", left)
	}
}

func beGate() {
	say := func(msg string, args any) {
		_ = json.NewEncoder(os.Stderr).Encode(map[string]any{"time": time.Now(), "level": "INFO", "msg": msg, "args": args})
	}
	term, hup := make(chan os.Signal, 1), make(chan os.Signal, 1)
	if !slices.Contains(os.Args, "--deaf") {
		signal.Notify(term, syscall.SIGTERM)
	}
	signal.Notify(hup, syscall.SIGHUP)
	say("starting", os.Args)
	say("registered", nil)
	for {
		select {
		case <-hup:
			fmt.Fprintln(os.Stderr, "not JSON")
		case <-term:
			say("stopped", nil)
			os.Exit(0)
		}
	}
}

func TestRefusesWhatCannotBe(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	ctx := t.Context()
	for name, tt := range map[string]struct {
		o    node.Options
		want string
	}{
		"containerd 1.7": {node.Options{ContainerdVersion: "1.7.35"}, "want a release 2.x.y"},
		"long directory": {node.Options{Dir: t.TempDir() + "/"}, "too long"},
		"drop-in":        {node.Options{DropIns: map[string]string{"../x.toml": "a"}}, "want the name of a .toml file"},
		"bad drop-in":    {node.Options{DropIns: map[string]string{"x.toml": "not toml"}}, "toml"},
	} {
		n, err := node.Start(ctx, tt.o)
		if err == nil {
			n.Stop()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if left, _ := filepath.Glob("/tmp/tw-node-*"); len(left) > 0 {
		for _, dir := range left {
			// Other packages' nodes may be at work; ours would have no process.
			if len(traces(t, dir)) == 1 {
				t.Errorf("%s is left of a node that did not start", dir)
			}
		}
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}
