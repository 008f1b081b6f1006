// Package doctor tests `tidewaiter doctor` and `tidewaiter selftest` on real nodes:
// one on which all is well, and the ways in which a node goes wrong that look well
// from afar.
package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/doctor: a node needs root")
		os.Exit(m.Run())
	}
	leaktest.Main(m)
}

var (
	acme    = notarytest.NewCA(notarytest.CAOptions{})
	release = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

// A scene is a node with a gate.
type scene struct {
	*testing.T
	*node.Node
	ctx     context.Context
	program string
	reg     *node.Registry
	dir     string // the gate's configuration
	state   string
	gate    *node.Gate
	before  map[string]int // lines of what containerd has
}

func (s *scene) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func newScene(t *testing.T, version string) *scene {
	if os.Geteuid() != 0 {
		t.Skip("a node needs root")
	}
	// What is built the first time has the time that it takes.
	_, err := node.FindTools(t.Context(), version, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	program, err := node.BuildTidewaiter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	s := &scene{T: t, ctx: ctx, program: program, dir: filepath.Join(t.TempDir(), "config"), state: t.TempDir()}
	s.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{})
	s.must(err)
	t.Cleanup(func() { s.must(s.reg.Stop()) })
	s.Node, err = node.Start(ctx, node.Options{ContainerdVersion: version, Required: true, Log: t.Output()})
	s.must(err)
	t.Cleanup(func() {
		// The node's end ends processes in cgroups of its own alone, and not those of a
		// test that failed half-way.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		if err := s.RemovePods(clean); err != nil {
			t.Log(err)
		}
		s.must(s.Stop())
	})
	s.must(s.Use(s.reg))
	for _, name := range []string{"app:good", "other:1"} {
		img, err := s.reg.Push(ctx, name, node.ImageOptions{Word: name})
		s.must(err)
		_, err = s.reg.Sign(ctx, img, release)
		s.must(err)
		_, err = s.PullImage(ctx, img.Name)
		s.must(err)
	}
	s.configure("enforce")
	s.start()
	return s
}

// configure writes a policy of two rules: one of a repository and one of all others.
func (s *scene) configure(mode string) {
	s.Helper()
	app := notarytest.Statement("app", "x509.subject: C=US, ST=WA, O=acme, CN=release")
	app.Scopes = []string{"registry.example/app"}
	rest := app
	rest.Name, rest.Scopes = "rest", []string{"*"}
	s.must(node.WriteConfig(s.dir, node.Config{
		Mode: mode, Mirrors: []node.Mirror{s.reg.Mirror()},
		Stores: notarytest.Stores{"ca/acme/root.crt": acme.PEM()}, Statements: []verify.Statement{app, rest},
	}))
}

func (s *scene) start() {
	s.Helper()
	var err error
	s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, StateDir: s.state, NodeName: "edge-1", Binary: s.program})
	s.must(err)
	s.must(s.gate.WaitRegistered(s.ctx))
}

// run runs a verb and returns what it says. status is what it must end with.
func (s *scene) run(status int, args ...string) string {
	s.Helper()
	args = append(args, "--config-dir", s.dir, "--run-dir", s.RunDir(), "--containerd-socket", s.Socket)
	if args[0] == "doctor" {
		args = append(args, "--state-dir", s.state)
	}
	cmd := exec.CommandContext(s.ctx, s.program, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if cmd.ProcessState == nil {
		s.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != status {
		s.Errorf("tidewaiter %s: exit status %d, want %d\n%s", args[0], got, status, &out)
	}
	return out.String()
}

func (s *scene) says(out string, lines ...string) {
	s.Helper()
	for _, l := range lines {
		if !regexp.MustCompile("(?m)" + l).MatchString(out) {
			s.Errorf("no %s in\n%s", l, out)
		}
	}
}

// failing are the checks that fail, by doctor's JSON.
func (s *scene) failing() (list []string) {
	s.Helper()
	var r struct {
		Schema   string
		Findings []struct{ Check, Level, Text, Next string }
	}
	cmd := exec.CommandContext(s.ctx, s.program, "doctor", "-o", "json", "--config-dir", s.dir, "--run-dir", s.RunDir(), "--state-dir", s.state, "--containerd-socket", s.Socket)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		s.Fatal(err)
	}
	s.must(json.Unmarshal(out, &r))
	if r.Schema != "tidewaiter.dev/doctor/v1" || len(r.Findings) == 0 {
		s.Errorf("%s", out)
	}
	for _, f := range r.Findings {
		if f.Level == "fail" && !slices.Contains(list, f.Check) {
			list = append(list, f.Check)
		}
		if f.Level != "ok" && f.Level != "warn" && f.Level != "fail" || f.Text == "" || f.Level == "fail" && f.Next == "" {
			s.Errorf("%+v", f)
		}
	}
	return list
}

func (s *scene) fails(want ...string) {
	s.Helper()
	if got := s.failing(); !slices.Equal(got, want) {
		s.Errorf("%q fail, want %q", got, want)
	}
}

// file writes a drop-in of containerd, or with no content removes it, and restarts
// containerd.
func (s *scene) file(name, content string) {
	s.Helper()
	if content == "" {
		s.must(os.Remove(filepath.Join(s.DropInDir, name)))
	} else {
		s.must(s.DropIn(name, content))
	}
	s.restart()
}

func (s *scene) restart() {
	s.Helper()
	mark := s.gate.Mark()
	s.must(s.Restart(s.ctx))
	_, err := s.gate.Wait(s.ctx, mark, node.Registered)
	s.must(err)
}

// enforces is what selftest says where the gate refuses.
func (s *scene) enforces() {
	s.Helper()
	out := s.run(0, "selftest")
	s.says(out, `^ok    unsigned  rule "app", registry.example/app:tidewaiter-selftest-[0-9a-f]{16}: refused: (SIGNATURE_MISSING|SOURCE_NO_REFERRERS), and the gate's own decisions have it$`,
		`^ok    unsigned  rule "rest", (registry.example/other:tidewaiter-selftest-[0-9a-f]{16}: refused: (SIGNATURE_MISSING|SOURCE_NO_REFERRERS)|registry.example/tidewaiter-selftest:.*: SOURCE_NO_REFERRERS), `,
		`^ok    signed    registry.example/(app|other)[:@].*: created, and removed without being started$`, `^-     absent    not tried: --absent`, `^enforced: `)
}

// absent is what selftest says where the gate refuses, and something else is wrong.
func (s *scene) absent(status int, line string) {
	s.Helper()
	s.says(s.run(status, "selftest", "--absent"), `^ok    unsigned  rule "app"`, `^FAIL  absent    .*(`+line+`)`)
	s.ready()
	s.clean()
}

// opens is where containerd creates containers without the gate.
func (s *scene) opens() {
	s.Helper()
	s.absent(1, "LET THROUGH: without the gate containerd creates containers unasked")
}

// ready waits until the gate is asked again.
func (s *scene) ready() {
	s.Helper()
	for range 1000 {
		if exec.CommandContext(s.ctx, s.program, "status", "--ready", "--run-dir", s.RunDir()).Run() == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	s.Error("the gate is not ready again")
}

// clean wants nothing left of a test.
func (s *scene) clean() {
	s.Helper()
	for _, what := range []string{"images", "leases", "containers", "snapshots", "content"} {
		out, err := s.Ctr(s.ctx, what, "ls")
		s.must(err)
		if strings.Contains(out, "selftest") {
			s.Errorf("left:\n%s", out)
		}
		if s.before == nil {
			s.before = map[string]int{}
		}
		n := strings.Count(out, "\n")
		if was, seen := s.before[what]; seen && n > was {
			s.Errorf("%d lines more of %s:\n%s", n-was, what, out)
		}
		s.before[what] = n
	}
	if _, err := os.Stat("/sys/fs/cgroup/tidewaiter-selftest"); err == nil {
		s.Error("a cgroup is left")
	}
}

// pause is the pause image, by its digest.
func (s *scene) pause() string {
	s.Helper()
	out, err := s.Ctr(s.ctx, "images", "ls", "-q")
	s.must(err)
	for l := range strings.Lines(out) {
		if strings.HasPrefix(l, "pause.example/pause@") {
			return strings.TrimSpace(l)
		}
	}
	s.Fatal("no pause image")
	return ""
}

// state is how the kernel calls what the gate's process does: T is stopped.
func (s *scene) stopped() bool {
	s.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.gate.PID))
	s.must(err)
	return strings.Contains(string(raw), ") T ")
}

// TestKilled kills a test while it has stopped the gate, and interrupts one.
func TestKilled(t *testing.T) {
	s := newScene(t, node.Containerd24)
	var r struct {
		Schema, Result, Mode, Nonce string
		Trials                      []struct {
			Kind, Outcome, Reason string
			Expected, Logged      bool
		}
	}
	s.must(json.Unmarshal([]byte(s.run(0, "selftest", "-o", "json")), &r))
	if r.Schema != "tidewaiter.dev/selftest/v1" || r.Result != "enforced" || r.Mode != "enforce" || len(r.Trials) != 4 || r.Trials[0].Reason != "SIGNATURE_MISSING" || !r.Trials[0].Logged {
		s.Errorf("%+v", r)
	}
	s.clean()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cmd := exec.CommandContext(s.ctx, s.program, "selftest", "--absent", "--config-dir", s.dir, "--run-dir", s.RunDir(), "--containerd-socket", s.Socket)
		s.must(cmd.Start())
		for range 6000 {
			if s.stopped() {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if !s.stopped() {
			s.Fatal("the gate was not stopped")
		}
		s.must(cmd.Process.Signal(sig))
		_ = cmd.Wait()
		for range 1200 {
			if !s.stopped() {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if s.stopped() {
			s.Errorf("after %v the gate is still stopped", sig)
		}
		s.ready()
		if sig == syscall.SIGINT {
			if got := cmd.ProcessState.ExitCode(); got != 2 {
				s.Errorf("exit status %d", got)
			}
			s.clean()
		}
	}
	// What was left by the one that was killed is no obstacle.
	s.enforces()
	// The node's end ends processes in cgroups of its own alone.
	s.must(s.RemovePods(s.ctx))
	s.enforces()
	for _, pattern := range []string{"/sys/fs/cgroup/tidewaiter-selftest/*/cgroup.procs", "/sys/fs/cgroup/*/tidewaiter-selftest/*/cgroup.procs"} {
		left, err := filepath.Glob(pattern)
		s.must(err)
		if len(left) > 0 {
			s.Errorf("left: %q", left)
		}
	}
}

// TestNode goes from a good node to each that is not, and back.
func TestNode(t *testing.T) {
	for _, version := range node.Versions(node.Containerd24, node.Containerd23) {
		t.Run(version, func(t *testing.T) {
			s := newScene(t, version)
			good := func() {
				s.Helper()
				out := s.run(0, "doctor")
				s.says(out, `^ok    runtime +containerd runs since 20`, `^ok    nri +NRI is on`, `^ok    required +.*`+regexp.QuoteMeta(filepath.Join(s.DropInDir, node.RequiredFile))+`:5$`,
					`^ok    restart `, `^ok    toleration `, `^ok    timeouts `, `^ok    snapshotter +snapshotter: overlayfs$`, `^ok    shim +runtime type: io.containerd.runc.v2$`,
					`^ok    gate `, `^ok    registered +containerd `+regexp.QuoteMeta(s.Version), `^ok    mode +enforce, assurance at(Create|Start)$`,
					`^ok    configuration +.* is valid and in force: mode enforce`, `^ok    sources +mirror http.* answers about images of registry.example`, `^ok    state `, `^ok    archives `, ` 0 fail$`)
				s.fails()
				s.enforces()
				s.clean()
			}
			good()
			s.says(s.run(0, "selftest", "--absent"), `^ok    absent    rule "app", registry.example/app:tidewaiter-selftest-[0-9a-f]{16}: refused without the gate: required plugin "tidewaiter" not present$`)
			s.ready()
			required := filepath.Join(s.DropInDir, node.RequiredFile)

			t.Log("the drop-in is missing")
			s.file(node.RequiredFile, "")
			out := s.run(1, "doctor")
			s.says(out, `^fail  required +containerd does not require the gate: no file of its configuration says so`, `^      next +tidewaiter install --enforce$`)
			s.fails("required")
			s.opens()

			t.Log("it is there, and containerd has not read it")
			s.must(s.DropIn(node.RequiredFile, node.RequiredDropIn))
			out = s.run(1, "doctor")
			s.says(out, `^fail  restart +containerd runs since .* and has not read .*conf.d.*, which changed at 20`, `^ok    required `)
			s.fails("restart")
			s.opens()
			s.restart()
			good()

			t.Log("mis-nested")
			s.file(node.RequiredFile, "version = 3\n\n[plugins.\"io.containerd.nri.v1.nri.default_validator\"]\n  enable = true\n  required_plugins = [\"tidewaiter\"]\n")
			out = s.run(1, "doctor")
			s.says(out, `^fail  required +containerd does not require the gate: `+regexp.QuoteMeta(required)+`:4 sets enable in the table \[plugins."io.containerd.nri.v1.nri.default_validator"\]`,
				`^      next +move it to \[plugins."io.containerd.nri.v1.nri".default_validator\]`)
			s.fails("required")
			s.opens()
			s.file(node.RequiredFile, node.RequiredDropIn)

			t.Log("overridden by a later file")
			s.file("zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  required_plugins = ['other']\n")
			out = s.run(1, "doctor")
			s.says(out, `^fail  required +containerd does not require the gate: `+regexp.QuoteMeta(required)+`:5 does, and .*/zz.toml:3, which is read later, says \["other"\] instead`, `^      next +correct .*/zz.toml`)
			s.fails("required")
			s.says(s.run(1, "selftest", "--absent"), `^FAIL  unsigned  rule "app", .*: refused by containerd, and not by the gate: required plugin "other" not present$`, `^FAIL  absent    .*refused for want of another plugin`, `^NOT as`)
			s.clean()
			s.file("zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = false\n")
			out = s.run(1, "doctor")
			s.says(out, `^fail  required +.*/zz.toml:3, which is read later, switches the validator off`)
			s.fails("required")
			s.opens()

			t.Log("a pod may do without")
			s.file("zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  tolerate_missing_plugins_annotation = 'skip.example/gate'\n")
			s.says(s.run(1, "doctor"), `^fail  toleration +every pod with the annotation skip.example/gate does without the gate while it is away \(tolerate_missing_plugins_annotation: .*/zz.toml:3\)$`)
			s.fails("toleration")

			t.Log("the pause image is named by a tag")
			_, err := s.Ctr(s.ctx, "images", "tag", s.pause(), "pause.example/pause:1")
			s.must(err)
			s.file("zz.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = 'pause.example/pause:1'\n")
			s.says(s.run(1, "doctor"), `^fail  pause +the pause image pause.example/pause:1 \(.*/zz.toml:3\) is named by a tag`, `^      next +name it by digest in .*/zz.toml`)
			s.fails("pause")
			s.enforces()
			_, err = s.Ctr(s.ctx, "images", "rm", "pause.example/pause:1")
			s.must(err)
			s.file("zz.toml", "")
			good()

			t.Log("the policy is broken")
			policy := filepath.Join(s.dir, "trustpolicy.json")
			whole, err := os.ReadFile(policy)
			s.must(err)
			mark := s.gate.Mark()
			s.must(os.WriteFile(policy, bytes.Replace(whole, []byte(`"strict"`), []byte(`"stric"`), 1), 0o644))
			_, err = s.gate.Wait(s.ctx, mark, func(l node.Line) bool { return l.Msg == "configuration rejected" })
			s.must(err)
			s.says(s.run(1, "doctor"), `^fail  configuration +the configuration is not valid: .*/trustpolicy.json:\d+: .*; the last good one stays in force$`, `^      next +tidewaiter policy check`)
			s.fails("configuration")
			s.enforces()
			mark = s.gate.Mark()
			s.must(os.WriteFile(policy, whole, 0o644))
			_, err = s.gate.Wait(s.ctx, mark, func(l node.Line) bool { return l.Msg == "configuration in force" })
			s.must(err)
			good()

			t.Log("the gate is stopped")
			s.must(s.gate.Stop())
			s.says(s.run(1, "doctor"), `^fail  gate +no gate runs here, or it cannot be asked: .*; containerd refuses every container until one does$`, `^ok    required `)
			s.fails("gate")
			s.says(s.run(1, "selftest", "--absent"), `^FAIL  unsigned  rule "app", .*: refused by containerd, since no gate is connected`, `^-     signed    not tried: `,
				`^ok    absent    .* not present$`, `^NOT as it must be: tidewaiter doctor`)
			s.clean()

			t.Log("and comes back with a policy that is broken")
			s.must(os.WriteFile(policy, []byte("{}"), 0o644))
			s.start()
			s.says(s.run(1, "doctor"), `^fail  configuration +the configuration is not valid: .*; none is in force: every container is refused$`)
			s.says(s.run(2, "selftest"), `^tidewaiter: there is nothing in force \(.*\), and what the directory holds is not valid: .*trustpolicy.json`, `^hint: tidewaiter doctor$`)
			mark = s.gate.Mark()
			s.must(os.WriteFile(policy, whole, 0o644))
			_, err = s.gate.Wait(s.ctx, mark, func(l node.Line) bool { return l.Msg == "configuration in force" })
			s.must(err)
			good()

			t.Log("NRI is switched off")
			s.must(s.StopContainerd(15))
			s.must(s.DropIn("zz.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n"))
			s.must(s.StartContainerd(s.ctx)) // the file of the socket before is still there
			s.says(s.run(1, "doctor"), `^fail  nri +NRI is switched off, by .*/zz.toml:3: containerd asks no plugin$`, `^fail  required .*and NRI is switched off$`, `^fail  registered +the runtime does not ask this gate`)
			s.fails("nri", "required", "registered", "mode")
			s.says(s.run(1, "selftest"), `^FAIL  unsigned  rule "app", registry.example/app:tidewaiter-selftest-[0-9a-f]{16}: LET THROUGH: containerd created it, and the gate was not asked$`, `^NOT as it must be`)
			s.clean()
			s.file("zz.toml", "")
			good()

			t.Log("audit")
			s.file(node.RequiredFile, "")
			mark = s.gate.Mark()
			s.configure("audit")
			_, err = s.gate.Wait(s.ctx, mark, func(l node.Line) bool { return l.Msg == "configuration in force" })
			s.must(err) // on the connection that it has
			s.says(s.run(0, "doctor"), `^ok    required .* \(not required in audit\)$`, `^ok    mode +audit: nothing is refused$`)
			s.fails()
			if out := s.run(0, "doctor", "-o", "json"); !strings.HasPrefix(out, `{"schema":"tidewaiter.dev/doctor/v1","result":"ok","mode":"audit","findings":[{"check":"runtime","level":"ok","text":"`) {
				s.Errorf("%s", out)
			}

			s.says(s.run(1, "selftest", "--absent"), `^ok    unsigned  rule "app", .*: created, which the gate recorded: AUDIT_ONLY, and enforce would say [A-Z_]+$`, `^-     absent    not tried: in audit`, `^audit: nothing is enforced on this node$`)
			s.clean()

			t.Log("containerd is stopped")
			s.must(s.StopContainerd(15))
			s.says(s.run(2, "selftest"), `^tidewaiter: containerd at `)
			s.says(s.run(1, "doctor"), `^fail  runtime +containerd does not answer at `)
			s.must(s.StartContainerd(s.ctx))
		})
	}
}
