package offline

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestGuide does what docs/offline.md tells an operator to do to feed a node, as it is
// written there but for the address of the mirror: each chapter on a node that knows
// nothing. At its end the image runs, and again after a power cut with no network.
func TestGuide(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	ctx := t.Context()
	raw, err := os.ReadFile("../../docs/offline.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(raw), "\n## Feeding a node\n")
	text, _, _ = strings.Cut(text, "\n## ")
	chapters := strings.Split(text, "\n### ")[1:]
	if len(chapters) != 5 {
		t.Fatalf("%d chapters", len(chapters))
	}
	n, err := node.Start(ctx, node.Options{Machine: true, Required: true, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	}()
	s := &site{T: t, Node: n, ctx: ctx}
	reg := s.registry("registry.example", node.RegistryOptions{})
	defer reg.Stop()
	img, _ := s.push(reg, "app:1.2", node.ImageOptions{Index: true, Decoys: decoy}, signing{by: release})
	for name, path := range map[string]string{"tidewaiter": program, "ctr": n.Tools.Ctr} {
		s.must(os.MkdirAll(n.Path("/usr/local/bin"), 0o755))
		s.must(os.Symlink(path, n.Path("/usr/local/bin/"+name)))
	}
	const config, state = "/etc/tidewaiter", "/var/lib/tidewaiter"
	for _, chapter := range chapters {
		title, body, _ := strings.Cut(chapter, "\n")
		s.T.Run(title, func(t *testing.T) {
			whole := s.T
			s.T = t
			defer func() { s.T = whole }()
			s.must(reg.Start())
			_, err := s.PullImage(ctx, img.Name)
			s.must(err)
			s.must(node.WriteConfig(n.Path(config), node.Config{
				Mode: "enforce", Stores: notarytest.Stores{"ca/acme/root.crt": acme.PEM()}, Statements: policy(nil).Statements,
			}))
			start := func() {
				s.gate, err = s.StartGate(ctx, node.GateOptions{ConfigDir: config, StateDir: state, NodeName: "edge-17", Binary: program})
				s.must(err)
				wait, cancel := s.within()
				defer cancel()
				s.must(s.gate.WaitRegistered(wait))
			}
			running, asked := false, false
			blocks := strings.Split(body, "\n```")
			for i := 1; i < len(blocks); i += 2 {
				kind, text, _ := strings.Cut(blocks[i], "\n")
				text = strings.ReplaceAll(text, "http://10.0.0.5:5000", reg.URL()) + "\n"
				switch kind {
				case "yaml":
					s.must(os.WriteFile(filepath.Join(n.Path(config), "config.yaml"), []byte(text), 0o644))
					if strings.Contains(text, "network: never") {
						s.must(reg.Stop())
					}
					if strings.Contains(body, "images import") {
						s.must(s.RemoveImage(ctx, img.Name))
					}
					start()
					running = true
				case "sh":
					// What the gate says is what it knows at that moment.
					question := strings.HasPrefix(strings.TrimSpace(text), "tidewaiter images")
					for end := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
						out, err := s.Output(ctx, "sh", "-e", "-c", "cd /root\n"+text)
						if question && !strings.Contains(out, " 0 denied, 0 inconclusive") && time.Now().Before(end) {
							continue
						}
						t.Logf("%s%s", text, out)
						if err != nil || question && (!strings.Contains(out, "VERIFIED") || !strings.Contains(out, " 0 denied, 0 inconclusive")) {
							t.Fatalf("not what docs/offline.md promises: %v\n%s", err, s.gate.Log())
						}
						asked = asked || question
						break
					}
				case "console": // what another program does, of which these tests have none
				default:
					t.Fatalf("a block of kind %q", kind)
				}
			}
			if !running || !asked {
				t.Fatal("no configuration is written, or the node is not asked at the end")
			}
			once := func() {
				s.pod, err = s.RunPod(ctx, node.PodOptions{})
				s.must(err)
				s.allowed(img, node.PullNever)
			}
			once()
			s.must(reg.Stop())
			s.disk = &node.Disk{Dir: n.Path(state)} // which machines do not lose
			s.settled()
			s.must(n.PowerCut(ctx))
			s.must(n.StartContainerd(ctx))
			start()
			once()
			s.gate.Kill()
			s.must(s.RemovePods(ctx))
			s.must(s.RemoveImage(ctx, img.Name))
			for _, dir := range []string{state, config, "/mnt/site", "/root/site.tar", "/root/app.tar"} {
				s.must(os.RemoveAll(n.Path(dir)))
			}
		})
	}
}
