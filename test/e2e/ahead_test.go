package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	containerd "github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// verified matches the line that a verification of img ended with VERIFIED.
func verified(img *node.Image) func(node.Line) bool {
	return func(l node.Line) bool {
		return l.Msg == "verification" && decision(l)["target"] == img.Target.Digest.String() && decision(l)["reason"] == "VERIFIED"
	}
}

// about matches a line about a container.
func about(msg string, c *node.Container) func(node.Line) bool {
	return func(l node.Line) bool { return strings.HasPrefix(l.Msg, msg) && l.Fields["container"] == c.ID }
}

// swept matches the last line of a first sweep: the pause image has no statement.
func swept(l node.Line) bool { return l.Msg == "the pause image is not verified" }

// A traffic counts what a registry is asked.
type traffic struct {
	mu          sync.Mutex
	first, last time.Time
	n           int
	now, most   int // at once
}

func (c *traffic) through(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.last = time.Now()
		if c.n++; c.n == 1 {
			c.first = c.last
		}
		c.now++
		c.most = max(c.most, c.now)
		c.mu.Unlock()
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.now--
		}()
		h.ServeHTTP(w, r)
	})
}

// TestAhead pulls images while the gate runs: what the creation of a container
// asks for is known by then.
func TestAhead(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		single := s.signed("app:ahead", "ahead")
		index := s.push(s.reg, "app:ahead-index", node.ImageOptions{Word: "ahead-index", Index: true})
		_, err := s.reg.Sign(s.ctx, index, release)
		s.must(err)
		for _, img := range []*node.Image{single, index} {
			mark := s.gate.Mark()
			s.pull(img.Name)
			s.wait(mark, verified(img))
		}
		s.reg.Forget()
		s.reg.Fault(func(http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
		})
		o := node.ContainerOptions{Image: single.Name}
		s.prepare(&o)
		c, err := s.pod.Create(s.ctx, o) // the first try, no retry
		s.must(err)
		s.must(c.Start(s.ctx))
		s.runs(c, "ahead")
		s.allowed(index.Name, "ahead-index", node.ContainerOptions{})
		if r := s.reg.Requests(); len(r) != 0 {
			s.Errorf("requests after the images were verified ahead: %v", r)
		}
	})
}

// TestAheadOfMany starts the gate on a node with thirty images.
func TestAheadOfMany(t *testing.T) {
	eachOwn(t, func(*testing.T, string) node.Options { return node.Options{} }, func(s *scene) {
		var images []*node.Image
		for n := range 30 {
			word := fmt.Sprintf("many-%02d", n)
			images = append(images, s.signed("app:"+word, word))
			s.pull(images[n].Name)
		}
		var c traffic
		s.reg.Fault(c.through)
		s.configure(s.policy())
		s.start()
		for _, img := range images {
			s.wait(0, verified(img))
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		// A burst of a second, and then twenty a second; slower is no harm.
		if took := c.last.Sub(c.first); c.n < 3*len(images) || c.most > 2 || took < time.Duration(c.n-20)*time.Second/20 {
			s.Errorf("%d requests in %v, %d at once", c.n, took, c.most)
		}
	})
}

// TestAheadAfterCrash kills the gate while it looks at an image: it starts without
// looking at that again, and a container of it is judged all the same.
func TestAheadAfterCrash(t *testing.T) {
	eachOwn(t, func(*testing.T, string) node.Options { return node.Options{} }, func(s *scene) {
		bad, next := s.signed("app:crash-a", "crash-a"), s.signed("app:crash-b", "crash-b")
		s.pull(bad.Name)
		s.pull(next.Name)
		asked, free := make(chan struct{}), make(chan struct{})
		var once sync.Once
		s.reg.Fault(func(http.Handler) http.Handler {
			return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				once.Do(func() { close(asked) })
				select {
				case <-free:
				case <-r.Context().Done():
				}
			})
		})
		s.configure(s.policy())
		s.start()
		select {
		case <-asked:
		case <-s.ctx.Done():
			s.Fatal("nothing is asked ahead")
		}
		s.gate.Kill()
		close(free)
		s.reg.Fault(nil)
		if raw, err := os.ReadFile(filepath.Join(s.RunDir(), "ahead")); err != nil || string(raw) != bad.Target.Digest.String()+"\n" {
			s.Fatalf("the note of what was in hand is %q, %v", raw, err)
		}
		s.reg.Forget()
		s.start()
		s.wait(0, func(l node.Line) bool {
			return strings.HasPrefix(l.Msg, "this image was being looked at ahead of time") && l.Fields["target"] == bad.Target.Digest.String()
		})
		s.wait(0, verified(next))
		for _, r := range s.reg.Requests() {
			if strings.Contains(r.Path, bad.Target.Digest.String()) {
				s.Errorf("%s %s although the gate died of that image", r.Method, r.Path)
			}
		}
		s.allowed(bad.Name, "crash-a", node.ContainerOptions{})
	})
}

// TestSweep has containers run that nobody allowed, that would be refused now, and
// whose images moved or went away.
func TestSweep(t *testing.T) {
	eachOwn(t, func(*testing.T, string) node.Options { return node.Options{} }, func(s *scene) {
		good := s.signed("app:sweep", "sweep")
		other := s.signed("app:sweep-other", "sweep-other")
		s.pull(good.Name)
		s.configure(s.policy())
		s.start()
		c := s.allowed(good.Name, "sweep", node.ContainerOptions{})
		moved := s.allowed(other.Name, "sweep-other", node.ContainerOptions{})

		quiet := func(what string) {
			s.Helper()
			s.wait(0, swept)
			for _, l := range s.gate.Lines() {
				if l.Fields["container"] != nil {
					s.Errorf("%s: %s", what, l.Raw)
				}
			}
		}
		restart := func() {
			s.Helper()
			s.must(s.gate.Stop())
			s.start()
		}
		restart()
		quiet("what an earlier gate allowed")
		s.gate.Kill()
		s.start()
		quiet("what a gate allowed that crashed")

		// The tag moves to an image that nobody signed: what runs is still what it was.
		// The old image's record goes away with that of the other, and then nothing can be
		// said.
		evil := s.push(s.reg, "app:sweep-other", node.ImageOptions{Word: "evil"})
		kept := strings.Replace(other.Name, ":sweep-other", ":sweep-kept", 1)
		if _, err := s.Ctr(s.ctx, "images", "tag", other.Name, kept); err != nil {
			s.Fatal(err)
		}
		s.pull(evil.Name)
		restart()
		quiet("a name that moved on")
		id, err := s.ImageID(s.ctx, kept)
		s.must(err)
		if _, err := s.Ctr(s.ctx, "images", "rm", kept, id, other.Pinned()); err != nil {
			s.Fatal(err)
		}
		restart()
		s.wait(0, about("nothing can be said of a running container", moved))

		// The directory is lost, as with a container's own file system.
		s.must(s.gate.Stop())
		s.must(os.RemoveAll(s.RunDir()))
		s.start()
		l := s.wait(0, about("ungated", c))
		if l.Fields["namespace"] != "default" || l.Fields["pod"] != s.pod.Name || l.Fields["name"] != c.Name || l.Fields["image"] != good.Name {
			s.Errorf("what is said of it: %s", l.Raw)
		}

		// The signer is trusted no more: said, and nothing else.
		policy := s.policy()
		policy.Stores = notarytest.Stores{"ca/acme/root.crt": rival.PEM()}
		policy.More = map[string]any{"runningContainers": "stop"}
		mark := s.gate.Mark()
		s.configure(policy)
		l = s.wait(mark, about("a running container would be refused", c))
		if decision(l)["reason"] != string(verify.SignerUntrusted) || decision(l)["binding"] != "snapshot" {
			s.Errorf("what is said of it: %s", l.Raw)
		}
		s.runs(c, "sweep")

		// How it would be stopped.
		client, err := containerd.Dial(s.Socket)
		s.must(err)
		defer client.Close()
		s.must(client.Stop(s.ctx, c.ID, 5*time.Second))
		if state, err := c.State(s.ctx); err != nil || state != runtimeapi.ContainerState_CONTAINER_EXITED {
			s.Errorf("a container that was stopped is %v, %v", state, err)
		}
	})
}
