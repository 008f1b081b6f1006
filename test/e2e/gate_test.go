package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestGateGone has the gate absent, killed, hung and coming back, and containerd
// restarted under it.
func TestGateGone(t *testing.T) {
	each(t, func(s *scene) {
		good, evil := s.signed("app:gone", "gone"), s.push(s.reg, "app:gone-evil", node.ImageOptions{Word: "evil"})
		s.pull(good.Name)
		s.pull(evil.Name)
		s.configure(s.policy())
		s.absent(good.Name)
		s.start()
		c := s.allowed(good.Name, "gone", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})

		// It crashes. What runs goes on, nothing new starts, and no pod can say otherwise.
		s.gate.Kill()
		s.absent(good.Name)
		s.absent(evil.Name)
		s.runs(c, "gone")
		s.pod = s.runPod(node.PodOptions{Annotations: map[string]string{"tolerate-missing-plugins.noderesource.dev": "true"}})
		s.absent(good.Name)
		s.start()
		s.allowed(good.Name, "gone", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})

		// It hangs: containerd refuses after its own timeout, drops the gate, and refuses
		// at once.
		mark := s.gate.Mark()
		s.must(s.gate.Signal(syscall.SIGSTOP))
		for _, img := range []*node.Image{good, evil} {
			o := node.ContainerOptions{Image: img.Name}
			s.prepare(&o)
			start := time.Now()
			if c, err := s.pod.Create(s.ctx, o); err == nil {
				s.Fatalf("container %s was created while the gate hangs", c.ID)
			} else if text := node.Text(err); !strings.Contains(text, "deadline exceeded") && !strings.Contains(text, "not present") || time.Since(start) > time.Minute {
				s.Errorf("while the gate hangs, after %v: %s", time.Since(start), text)
			}
		}
		s.must(s.gate.Signal(syscall.SIGCONT))
		s.wait(mark, node.Registered)
		s.allowed(good.Name, "gone", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})

		// It is replaced while it hangs.
		s.must(s.gate.Signal(syscall.SIGSTOP))
		s.gate.Kill()
		s.start()
		s.allowed(good.Name, "gone", node.ContainerOptions{})

		// containerd is restarted, and crashes: the gate comes back by itself.
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			mark = s.gate.Mark()
			s.must(s.StopContainerd(sig))
			s.must(s.StartContainerd(s.ctx))
			s.wait(mark, node.Registered)
			s.runs(c, "gone")
			s.allowed(good.Name, "gone", node.ContainerOptions{})
			s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		}

		// Created while another gate was there, and started with this one: where it
		// compares at the start it judges anew, from what it knows.
		create := func(image string) *node.Container {
			o := node.ContainerOptions{Image: image}
			s.prepare(&o)
			c, err := s.pod.Create(s.ctx, o)
			s.must(err)
			return c
		}
		created := create(good.Name)
		s.must(s.gate.Stop())
		s.start()
		s.allowed(good.Name, "gone", node.ContainerOptions{}) // it is known now
		s.must(created.Start(s.ctx))
		s.runs(created, "gone")
		if s.NamesImage() {
			return
		}
		s.must(s.gate.Stop())
		looking := s.policy()
		looking.Mode = "audit"
		s.must(node.WriteConfig(s.dir, looking))
		s.start()
		created = create(evil.Name)
		s.must(s.gate.Stop())
		s.must(node.WriteConfig(s.dir, s.policy()))
		s.start()
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		if err := created.Start(s.ctx); err == nil {
			s.Error("started although it was only looked at when it was created")
		} else {
			s.line(err, verify.SignatureMissing)
		}
		s.neverRan(created)
	})
}

// but puts h in front of the registry for the gate alone: containerd pulls from it as
// ever. The gate looks at an image as soon as that was pulled, so that what is to become
// of its questions must be said before.
func (s *scene) but(h http.HandlerFunc) {
	s.reg.Fault(func(registry http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.UserAgent(), "containerd/") {
				registry.ServeHTTP(w, r)
				return
			}
			h(w, r)
		})
	})
}

// TestMirror has mirrors that hang, refuse, are slow and want credentials.
func TestMirror(t *testing.T) {
	each(t, func(s *scene) {
		c := s.policy()
		c.More = map[string]any{"limits": map[string]any{"timeout": "3s"}}
		s.configure(c)
		s.start()
		known := s.signed("app:known", "known")
		s.allowed(known.Name, "known", node.ContainerOptions{})
		fresh := func(word string, fault http.HandlerFunc) *node.Image {
			s.reg.Fault(nil)
			img := s.signed("app:"+word, word)
			s.but(fault)
			s.pull(img.Name)
			return img
		}
		answers := func(status int, header ...string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				for i := 0; i+1 < len(header); i += 2 {
					w.Header().Set(header[i], header[i+1])
				}
				w.WriteHeader(status)
			}
		}
		hangs := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

		// It takes connections and never answers: the answer comes at once all the same,
		// and it is no.
		mark := s.gate.Mark()
		img := fresh("hangs", hangs)
		for range 5 {
			o := node.ContainerOptions{Image: img.Name}
			s.prepare(&o)
			c, err := s.pod.Create(s.ctx, o)
			if err == nil {
				s.Fatalf("container %s was created", c.ID)
			}
			if !node.Pending(err) {
				s.line(err, verify.SourceUnreachable)
			} else {
				s.line(err, verify.Pending)
			}
			s.allowed(known.Name, "known", node.ContainerOptions{}) // nobody waits for the mirror
		}
		s.wait(mark, func(l node.Line) bool {
			return l.Msg == "verification" && decision(l)["reason"] == string(verify.SourceUnreachable)
		})
		given, late := 0, 0
		for _, l := range s.gate.Lines()[mark:] {
			if l.Msg != "decision" {
				continue
			}
			given++
			took, err := time.ParseDuration(fmt.Sprint(l.Fields["took"]))
			s.must(err)
			if took > time.Second {
				late++ // also where the machine did something else
			}
		}
		if given < 2 || late > given/2 {
			s.Errorf("%d of %d answers took longer than a second", late, given)
		}
		s.reg.Fault(nil)
		s.recovers(img.Name, "hangs")

		img = s.signed("app:slow", "slow")
		answered := make(chan struct{})
		s.reg.Fault(func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.HasPrefix(r.UserAgent(), "containerd/") {
					select {
					case <-answered:
					case <-r.Context().Done():
					}
				}
				h.ServeHTTP(w, r)
			})
		})
		s.pull(img.Name)
		o := node.ContainerOptions{Image: img.Name}
		s.prepare(&o)
		if _, err := s.pod.Create(s.ctx, o); err == nil || !node.Pending(err) && !strings.Contains(node.Text(err), "["+string(verify.SourceUnreachable)+"]") {
			s.Errorf("the first try at a slow mirror: %v", err)
		}
		close(answered)
		s.recovers(img.Name, "slow")

		for word, tt := range map[string]struct {
			fault http.HandlerFunc
			want  verify.Reason
		}{
			"broken":       {answers(http.StatusInternalServerError), verify.SourceUnreachable},
			"unauthorized": {answers(http.StatusUnauthorized, "WWW-Authenticate", `Bearer realm="http://169.254.169.254/token"`), verify.SourceUnauthorized},
			"forbidden":    {answers(http.StatusForbidden), verify.SourceUnauthorized},
			"elsewhere":    {answers(http.StatusTemporaryRedirect, "Location", "http://127.0.0.1:1/v2/"), verify.SourceUnreachable},
		} {
			img := fresh(word, tt.fault)
			s.denied(img.Name, tt.want, node.ContainerOptions{})
			s.reg.Fault(nil)
			s.recovers(img.Name, word)
		}

		img = fresh("refuses", hangs)
		s.must(s.reg.Stop())
		s.reg.Fault(nil)
		s.denied(img.Name, verify.SourceUnreachable, node.ContainerOptions{})
		s.allowed(known.Name, "known", node.ContainerOptions{})
		s.must(s.reg.Start())
		s.recovers(img.Name, "refuses")

		for _, l := range s.gate.Lines() {
			if strings.HasPrefix(l.Msg, "not registered") {
				s.Errorf("the gate was dropped: %s", l.Raw)
			}
		}
	})
}

// recovers runs an image as a kubelet does, which tries again whatever the reason:
// the first answer may be that of a question that was put to the mirror before.
func (s *scene) recovers(image, word string) {
	s.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		o := node.ContainerOptions{}
		s.prepare(&o)
		c, err := s.pod.Run(s.ctx, image, o, node.Retry{})
		if err == nil {
			s.runs(c, word)
			return
		}
		if time.Now().After(end) {
			s.Fatalf("%s is refused although the mirror answers: %v", image, err)
		}
	}
}

// TestConfiguration changes the configuration under the gate.
func TestConfiguration(t *testing.T) {
	each(t, func(s *scene) {
		good := s.signed("app:configured", "configured")
		s.pull(good.Name)

		// None at all.
		s.start()
		line := s.denied(good.Name, verify.PolicyInvalid, node.ContainerOptions{})
		if !strings.Contains(line, "no valid configuration") {
			s.Error(line)
		}
		// One appears.
		base := s.policy()
		s.configure(base)
		s.allowed(good.Name, "configured", node.ContainerOptions{})

		// It is broken: the last good one stays, and what is new is verified under it.
		mark := s.gate.Mark()
		file := filepath.Join(s.dir, "config.yaml")
		s.replace(file, "version: 1\nmode: audit\nskip: true\n")
		rejected := func(l node.Line) bool { return l.Msg == "configuration rejected" }
		s.wait(mark, func(l node.Line) bool {
			return rejected(l) && strings.Contains(fmt.Sprint(l.Fields["error"]), file+":3: skip: ")
		})
		s.allowed(good.Name, "configured", node.ContainerOptions{})
		other := s.signed("app:configured-other", "other")
		s.allowed(other.Name, "other", node.ContainerOptions{})
		s.denied(s.push(s.reg, "app:configured-evil", node.ImageOptions{Word: "evil"}).Name, verify.SignatureMissing, node.ContainerOptions{})
		// SIGHUP has it read again, and said again.
		mark = s.gate.Mark()
		s.must(s.gate.Signal(syscall.SIGHUP))
		s.wait(mark, rejected)
		s.configure(base)
		mark = s.gate.Mark()
		s.must(s.gate.Signal(syscall.SIGHUP))
		s.allowed(good.Name, "configured", node.ContainerOptions{})
		// What the gate finds on the node ahead of time is said whenever it is found,
		// and is not about this.
		for _, l := range s.gate.Lines()[mark:] {
			if strings.HasPrefix(l.Msg, "configuration") && l.Level != "INFO" {
				s.Errorf("after SIGHUP with a good configuration: %s", l.Raw)
			}
		}

		// The policy is tightened: what was verified before is refused at once.
		tight := s.policy()
		tight.Statements[0].TrustedIdentities = []string{"x509.subject: C=US, ST=WA, O=acme, CN=auditor"}
		s.configure(tight)
		s.denied(good.Name, verify.IdentityMismatch, node.ContainerOptions{})
		s.configure(base)
		s.allowed(good.Name, "configured", node.ContainerOptions{})

		// The scope is taken out.
		tight = s.policy()
		tight.Statements[0].Scopes = []string{"registry.example/elsewhere"}
		s.configure(tight)
		s.denied(good.Name, verify.PolicyNoMatch, node.ContainerOptions{})

		// The root is exchanged, in place.
		s.configure(base)
		s.allowed(good.Name, "configured", node.ContainerOptions{})
		exchanged := s.policy()
		exchanged.Stores = notarytest.Stores{"ca/acme/root.crt": rival.PEM()}
		s.configure(exchanged)
		s.denied(good.Name, verify.SignerUntrusted, node.ContainerOptions{})

		// It is removed: nothing is trusted, and nothing that was verified counts.
		s.configure(base)
		s.allowed(good.Name, "configured", node.ContainerOptions{})
		another := s.policy()
		another.Stores["ca/acme/rival.crt"] = rival.PEM()
		s.configure(another)
		mark = s.gate.Mark()
		s.must(os.Remove(filepath.Join(s.dir, "truststore/x509/ca/acme/root.crt")))
		s.wait(mark, func(l node.Line) bool { return l.Msg == "configuration in force" })
		s.denied(good.Name, verify.SignerUntrusted, node.ContainerOptions{})

		// Everything is removed while the gate runs: the last good one stays. After a
		// restart there is none.
		mark = s.gate.Mark()
		s.must(os.Rename(s.dir, s.dir+".gone")) // at once, not file by file
		s.wait(mark, rejected)
		s.denied(good.Name, verify.SignerUntrusted, node.ContainerOptions{})
		s.must(s.gate.Stop())
		s.start()
		s.denied(good.Name, verify.PolicyInvalid, node.ContainerOptions{})
	})
}

// TestAudit has no gate required, and everything starts.
func TestAudit(t *testing.T) {
	each(t, func(s *scene) {
		s.must(s.Require(s.ctx, false))
		defer func() { s.must(s.Require(s.ctx, true)) }()
		good, evil := s.signed("app:audit", "audit"), s.push(s.reg, "app:audit-evil", node.ImageOptions{Word: "evil"})
		// Before there is a gate.
		s.allowed(evil.Name, "evil", node.ContainerOptions{})

		c := s.policy()
		c.Mode = "audit"
		s.configure(c)
		s.start()
		// would waits until the log says what enforce would have answered.
		would := func(mark int, msg string, code verify.Reason) {
			s.Helper()
			s.wait(mark, func(l node.Line) bool {
				d := decision(l)
				if msg == "verification" { // for everybody who asks, before audit is applied
					return l.Msg == msg && d["reason"] == string(code) && l.Fields["mode"] == "audit"
				}
				return l.Msg == msg && d["allowed"] == true && d["reason"] == string(verify.AuditOnly) && d["enforceReason"] == string(code) &&
					strings.HasPrefix(fmt.Sprint(d["message"]), "tidewaiter: allowed [AUDIT_ONLY], enforce would deny ["+string(code)+"] ")
			})
		}
		mark := s.gate.Mark()
		s.allowed(evil.Name, "evil", node.ContainerOptions{})
		would(0, "verification", verify.SignatureMissing) // the gate may have looked ahead
		s.allowed(evil.Name, "evil", node.ContainerOptions{})
		would(mark, "decision", verify.SignatureMissing)

		outside := s.push(s.reg, "other:audit", node.ImageOptions{Word: "outside"})
		id := good.Config.Digest.String()
		mark = s.gate.Mark()
		s.allowed(outside.Name, "outside", node.ContainerOptions{})
		would(mark, "decision", verify.PolicyNoMatch)
		s.pull(good.Name)
		s.allowed(id, "audit", node.ContainerOptions{ImageID: id})
		would(mark, "decision", verify.ImageUnresolved)
		s.allowed(good.Name, "evil", node.ContainerOptions{ImageID: evil.Config.Digest.String()})
		would(mark, "decision", verify.ImageMismatch)
		s.allowed(good.Name, "audit", node.ContainerOptions{Volumes: []node.ImageVolume{{Image: evil.Name, Path: "/volume"}}})
		would(mark, "decision", verify.SignatureMissing)
		s.allowed(good.Name, "audit", node.ContainerOptions{})
		would(0, "verification", verify.Verified)
		for _, l := range s.gate.Lines() {
			d := decision(l)
			if d["enforceReason"] == string(verify.ImageMismatch) && strings.Contains(fmt.Sprint(d["message"]), "allowed as :") {
				s.Errorf("a mismatch of nothing: %s", l.Raw)
			}
		}

		// A dead mirror.
		dead := s.push(s.reg, "app:audit-dead", node.ImageOptions{Word: "dead"})
		mark = s.gate.Mark()
		s.but(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		s.pull(dead.Name)
		s.must(s.reg.Stop())
		s.reg.Fault(nil)
		s.allowed("registry.example/app:audit-dead", "dead", node.ContainerOptions{})
		would(mark, "verification", verify.SourceUnreachable)
		s.must(s.reg.Start())

		// A gate that dies or hangs costs nothing but, once, the runtime's patience.
		alone := func() { s.Helper(); s.allowed(evil.Name, "evil", node.ContainerOptions{}) }
		s.gate.Kill()
		alone()
		s.start()
		mark = s.gate.Mark()
		s.must(s.gate.Signal(syscall.SIGSTOP))
		alone()
		s.must(s.gate.Signal(syscall.SIGCONT))
		s.wait(mark, node.Registered)
		s.must(s.gate.Stop())
		alone()

		// From audit to enforce by configuration alone.
		s.start()
		s.allowed(evil.Name, "evil", node.ContainerOptions{})
		mark = s.gate.Mark()
		s.configure(s.policy())
		s.wait(mark, node.Registered) // anew, with the hook that stays closed
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.allowed(good.Name, "audit", node.ContainerOptions{})
		mark = s.gate.Mark()
		s.configure(c)
		s.wait(mark, func(l node.Line) bool { return l.Msg == "configuration in force" }) // on the connection that it has
		s.allowed(evil.Name, "evil", node.ContainerOptions{})
	})
}

// TestFigures measures. It holds the gate to generous bounds only; the figures are
// in the log (go test -v).
func TestFigures(t *testing.T) {
	each(t, func(s *scene) {
		img := s.signed("app:figures", "figures")
		s.pull(img.Name)
		s.configure(s.policy())
		began := time.Now()
		s.start()
		first, last := s.gate.Lines()[0], s.wait(0, node.Registered)
		s.Logf("containerd %s: registered %v after the start of the process, %v after the first line of its log",
			s.Version, last.Time.Sub(began), last.Time.Sub(first.Time))
		memory := func(when string) {
			s.Helper()
			m, err := s.gate.Memory()
			s.must(err)
			s.Logf("containerd %s: %s: resident %.1f MiB, anonymous %.1f, peak %.1f", s.Version, when, mib(m.RSS), mib(m.Anon), mib(m.Peak))
			if m.Peak > 64<<20 {
				s.Errorf("%s: more than 64 MiB", when)
			}
		}
		memory("registered, idle")
		s.allowed(img.Name, "figures", node.ContainerOptions{})
		memory("after one image")
		start := time.Now()
		errs := make([]error, 200)
		var pods []*node.Pod // with 25 containers each, as a busy node has them
		for range len(errs) / 25 {
			pods = append(pods, s.runPod(node.PodOptions{}))
		}
		atOnce(len(errs), 4, func(i int) {
			_, errs[i] = pods[i/25].Create(s.ctx, node.ContainerOptions{Name: fmt.Sprintf("f%d", i), Image: img.Name, Env: map[string]string{"TOKEN": secretEnv}})
		})
		for _, err := range errs {
			s.must(err)
		}
		s.Logf("containerd %s: 200 creations took %v", s.Version, time.Since(start))
		memory("after 200 creations")
	})
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
