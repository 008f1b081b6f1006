package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A supervisor as docs/host.md has it for hosts without systemd: `sv restart`, and a
// loop that starts the gate whenever it has ended. test/host has systemd's part.
const (
	superviseScript = `
while :; do
	if [ -x /usr/local/bin/tidewaiter ] && [ ! -e /run/sv-down ]; then
		case $(tail -c 7 /usr/local/bin/tidewaiter | tr -d '\0') in
		crashes) sleep 0.2 & ;;
		*) /usr/local/bin/tidewaiter run --node ` + cluster.NodeName + ` & ;;
		esac
		echo $! >/run/sv-gate
		wait
	fi
	sleep 0.2
done`
	svScript = `#!/bin/sh
case $2 in
tidewaiter) kill "$(cat /run/sv-gate)" 2>/dev/null; sleep 0.5; exit 0 ;;
containerd) touch /run/sv-restart; while [ -e /run/sv-restart ]; do sleep 0.1; done ;;
*) exit 1 ;;
esac
`
	operators = "/root/tidewaiter" // where the operator has the program
)

// supervise starts the supervisor.
func (s *scene) supervise() {
	s.Helper()
	s.must(s.WriteFile("/usr/local/sbin/sv", svScript))
	s.must(os.Chmod(s.Path("/usr/local/sbin/sv"), 0o755))
	s.must(os.Symlink(s.Tools.Containerd, s.Path("/usr/local/bin/containerd")))
	_, err := s.StartDaemon("supervisor", "sh", "-c", superviseScript)
	s.must(err)
	ctx, end := context.WithCancel(s.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		asked := s.Path("/run/sv-restart")
		for ctx.Err() == nil {
			time.Sleep(50 * time.Millisecond)
			if _, err := os.Stat(asked); err != nil {
				continue
			}
			if err := s.Restart(ctx); err != nil {
				s.Error(err)
			}
			os.Remove(asked)
		}
	}()
	s.ends = append(s.ends, func() { end(); <-done })
}

// carry puts a version of the program where the operator has it. What more is at its
// end the kernel does not look at.
func (s *scene) carry(version string, more ...byte) {
	s.Helper()
	dir, err := os.MkdirTemp(s.Dir, "program-")
	s.must(err)
	s.build(dir, version)
	b, err := os.ReadFile(filepath.Join(dir, "tidewaiter"))
	s.must(err)
	s.must(s.WriteFile(operators, string(b)+string(more)))
	s.must(os.Chmod(s.Path(operators), 0o755))
}

// crashes is the end of a program that the supervisor has end at once.
var crashes = []byte("crashes")

// tidewaiter runs the operator's program, which must end with a status, and returns
// what it said.
func (s *scene) tidewaiter(status int, args ...string) string {
	s.Helper()
	if verb := args[0]; verb == "install" || verb == "uninstall" {
		args = append(args, "--gate-command", "sv restart tidewaiter", "--restart-command", "sv restart containerd")
	}
	cmd := s.Command(s.ctx, operators, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
		s.Fatalf("tidewaiter %s: %v, want status %d\n%s", strings.Join(args, " "), err, status, out)
	}
	return string(out)
}

// TestHost is the second act on a node of a cluster: from the DaemonSet that audits to
// the host's own gate that enforces, an upgrade, a release that crashes, each way out of
// docs/lockout.md, and the end.
func TestHost(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		good, bare := s.push("good", release), s.push("bare", nil)
		pause, err := s.reg.Push(s.ctx, "app:pause", node.ImageOptions{Word: "pause"})
		s.must(err)
		_, err = s.reg.Sign(s.ctx, pause, release)
		s.must(err)
		s.must(s.DropIn("10-pause.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '"+pause.Name+"'\n"))
		s.must(s.Restart(s.ctx))
		_, err = s.PullImage(s.ctx, pause.Name)
		s.must(err)
		s.watch()
		s.supervise()
		s.carry("v1")
		before := s.leftovers()

		// It audits; what it would refuse runs.
		s.tidewaiter(0, "install")
		s.must(node.WriteConfig(s.Path(configDir), s.policy("audit")))
		s.apply(pod("good", good))
		s.apply(pod("bare", bare))
		s.runs("good", 0)
		s.runs("bare", 0)
		if out := s.tidewaiter(1, "install", "--enforce"); !strings.Contains(out, bare.Name+": SIGNATURE_MISSING") {
			s.Errorf("install --enforce does not say what it would refuse: %s", out)
		}
		s.kubectl("delete", "pod", "bare", "--wait")
		s.tidewaiter(0, "install", "--enforce", "--restart")
		s.watch()
		mark := s.created(bare)
		s.apply(pod("bare", bare))
		s.refused(named("bare"), verify.SignatureMissing)

		// The operator tries it. The kubelet takes away pods that it does not know, the
		// test's too, before containerd has dropped the gate that was stopped.
		if out := s.tidewaiter(0, "selftest", "--absent"); !strings.Contains(out, "ok    absent") {
			s.Errorf("selftest beside a kubelet: %s", out)
		}

		// An upgrade, and one that crashes and is taken back, while containers are created.
		load := s.load(good, bare)
		load.more(20)
		s.carry("v2")
		s.tidewaiter(0, "install")
		load.more(20)
		s.carry("v3", crashes...)
		if out := s.tidewaiter(1, "install", "--wait", "10s"); !strings.Contains(out, "the gate did not come up") {
			s.Errorf("install of a release that crashes: %s", out)
		}
		if out, err := s.Node.Output(s.ctx, "/usr/local/bin/tidewaiter", "version"); err != nil || !strings.Contains(out, "v2") {
			s.Errorf("the program after the upgrade: %s, %v", out, err)
		}
		s.carry("v2")
		load.more(20)
		s.down(true)
		load.more(50)
		s.down(false)
		load.more(50)
		load.stop()

		// The API server is away: it enforces, and what ends starts again.
		s.StopControlPlane()
		s.end("good")
		s.runs("good", 1)
		s.static("late", bare)
		s.refused(named("late"), verify.SignatureMissing)
		if now := s.created(bare); now != mark {
			s.Errorf("%d containers of %s were created while the gate enforced", now-mark, bare.Name)
		}

		// Locked out, and back to audit by the file.
		s.mode("audit")
		s.runs("late", 0)
		s.must(os.Remove(s.Path(cluster.ManifestDir + "/late.json")))
		s.mode("enforce")
		s.static("later", bare)
		s.refused(named("later"), verify.SignatureMissing)

		// Locked out with the gate dead: no program at all.
		s.down(true)
		s.away("good")
		s.must(os.Remove(s.Path("/etc/containerd/conf.d/99-tidewaiter.toml")))
		s.must(s.Restart(s.ctx))
		s.runs("good", 2)
		s.runs("later", 0)
		s.must(os.Remove(s.Path(cluster.ManifestDir + "/later.json")))
		s.must(s.StartControlPlane(s.ctx))
		s.kubectl("delete", "pod", "bare", "--wait")

		// Again, and one command at the console.
		s.down(false)
		s.eventually(func() error {
			out, err := s.Command(s.ctx, operators, "install", "--enforce", "--restart", "--gate-command", "sv restart tidewaiter", "--restart-command", "sv restart containerd").CombinedOutput()
			if err != nil {
				err = fmt.Errorf("install --enforce: %w: %s", err, out)
			}
			return err
		})
		s.StopControlPlane()
		s.must(s.reg.Stop())
		s.down(true)
		s.away("good")
		s.tidewaiter(0, "uninstall", "--restart")
		s.runs("good", 3)

		// And without a trace.
		s.tidewaiter(0, "uninstall", "--purge")
		if left := slices.DeleteFunc(s.leftovers(), func(p string) bool {
			return slices.Contains(before, p) || strings.HasPrefix(p, "/run/sv-") || strings.HasPrefix(p, cluster.ManifestDir)
		}); len(left) > 0 {
			s.Errorf("left after uninstall --purge: %v", left)
		}
	})
}

// down has the supervisor keep the gate down, which dies, or not any more.
func (s *scene) down(is bool) {
	s.Helper()
	if !is {
		s.must(os.Remove(s.Path("/run/sv-down")))
		return
	}
	s.must(os.WriteFile(s.Path("/run/sv-down"), nil, 0o600))
	_, err := s.Node.Output(s.ctx, "sh", "-c", `kill -9 "$(cat /run/sv-gate)"`)
	s.must(err)
}

// mode writes the configuration and waits until the gate says that it is in force.
func (s *scene) mode(mode string) {
	s.Helper()
	s.must(node.WriteConfig(s.Path(configDir), s.policy(mode)))
	s.eventually(func() error {
		out, _ := s.Command(s.ctx, operators, "status").CombinedOutput() // with its own status
		if !strings.Contains(string(out), "mode           "+mode) {
			return fmt.Errorf("want mode %s: %s", mode, out)
		}
		return nil
	})
}

// away ends the container of a pod and waits until the kubelet's log says that
// containerd refused it another, since the gate is away.
func (s *scene) away(name string) {
	s.Helper()
	since := len(s.KubeletLog())
	s.end(name)
	s.eventually(func() error {
		for line := range strings.Lines(s.KubeletLog()[since:]) {
			if strings.Contains(line, `required plugin \"tidewaiter\" not present`) && strings.Contains(line, name) {
				return nil
			}
		}
		return fmt.Errorf("no word of a gate that is away from %s", name)
	})
}
