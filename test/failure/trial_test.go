package failure

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// Who signs.
var (
	acme     = notarytest.NewCA(notarytest.CAOptions{})
	release  = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	stranger = notarytest.NewCA(notarytest.CAOptions{}).Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

const (
	workers = 4               // creations at once
	patient = 3 * time.Minute // for what has to happen
)

// limit is the time in which good images start again. The full form holds the gate to
// five seconds; the short one runs on any machine, whatever else that does.
var limit = time.Minute

// A world is a node with a registry that is its mirror too.
type world struct {
	*node.Node
	reg *node.Registry
}

// A trial is one failure on one node: a gate, and workers that create containers
// from good and bad images all the time.
type trial struct {
	*testing.T
	*world
	ctx     context.Context
	dir     string // below the node's
	options node.GateOptions
	pod     *node.Pod
	known   []subject // asked about in every round
	good    subject   // of known
	next    atomic.Int64

	subjects atomic.Pointer[[]subject] // what the workers create now
	nobody   atomic.Bool               // no image whatever may start now
	quit     atomic.Bool               // the workers end
	working  sync.WaitGroup
	watching sync.WaitGroup // gates

	mu       sync.Mutex
	gate     *node.Gate // nil: none is to run
	restarts int        // of gates that ended by themselves
	row      row
	reasons  map[string]int // why containers were refused, or not answered
	shows    string         // what this round's refusals have to say, once
	shown    bool
}

// A row is the result of a trial.
type row struct {
	version, failure string
	creations        int // that were answered
	during           int // of creations, while the failure lasted
	allowed          int // of good images
	refused          int
	escapes          int
	unanswered       int // containerd was not there
	rounds           int
	slowest          time.Duration // from the end of a round's failure to a good image's start
	note             string
}

// A subject is something to create a container from.
type subject struct {
	kind  string
	good  bool
	image string // what the pod says
	id    string // what the kubelet says
}

// try runs one failure on a node that is there, and returns the row.
func try(t *testing.T, w *world, f failure) row {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	s := &trial{T: t, world: w, ctx: ctx, dir: filepath.Join(w.Dir, strings.ReplaceAll(f.name, " ", "-")), reasons: map[string]int{}}
	s.row = row{version: w.Version, failure: f.name}
	s.must(os.Mkdir(s.dir, 0o755))
	s.place(s.dir)
	w.reg.Fault(nil)
	w.reg.Forget()
	var err error
	s.pod, err = w.RunPod(ctx, node.PodOptions{})
	s.must(err)

	name := "app:" + filepath.Base(s.dir)
	unsigned := s.push("unsigned", false, name+"-unsigned", nil)
	s.good = s.push("good", true, name, release)
	s.known = []subject{
		s.good, unsigned,
		s.push("signed by a stranger", false, name+"-stranger", stranger),
		s.push("unknown", false, "other:"+filepath.Base(s.dir), nil),
		{"bad content by a good name", false, s.good.image, unsigned.id},
	}
	s.subjects.Store(&s.known)
	defer func() {
		s.quit.Store(true)
		s.working.Wait()
		s.stop()
		s.escaped()
		if err := w.RemovePods(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		w.reg.Fault(nil)
	}()
	f.run(s)
	s.quit.Store(true)
	s.working.Wait()
	s.escaped()

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.restarts > 0 && !f.mayEnd {
		s.Errorf("the gate ended by itself %d times", s.restarts)
	}
	if s.restarts > 0 {
		s.row.note += fmt.Sprintf("; restarted %d times", s.restarts)
	}
	for _, why := range slices.Sorted(maps.Keys(s.reasons)) {
		s.Logf("%6d %s", s.reasons[why], why)
	}
	return s.row
}

func (s *trial) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// place puts all directories of the gate below dir, and the configuration there.
func (s *trial) place(dir string) {
	s.Helper()
	prod := notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")
	prod.Scopes = nil
	for _, repository := range []string{"app", "flood-envelopes-0", "flood-envelopes-1", "flood-envelopes-2", "flood-manifests-0", "flood-manifests-1", "flood-manifests-2"} {
		prod.Scopes = append(prod.Scopes, s.reg.Host+"/"+repository)
	}
	s.options = node.GateOptions{
		ConfigDir: filepath.Join(dir, "config"), NodeName: "edge-1", Binary: program,
		Args: []string{"--run-dir", filepath.Join(dir, "run")},
	}
	s.must(node.WriteConfig(s.options.ConfigDir, node.Config{
		Mode: "enforce", Mirrors: []node.Mirror{s.reg.Mirror()},
		Stores: notarytest.Stores{"ca/acme/root.crt": acme.PEM()}, Statements: []verify.Statement{prod},
	}))
}

// push makes an image with a root filesystem of its own and pulls it.
func (s *trial) push(kind string, good bool, name string, by *notarytest.Signer) subject {
	s.Helper()
	img, err := s.reg.Push(s.ctx, name, node.ImageOptions{Word: name, Files: map[string]string{"/etc/name": name}})
	s.must(err)
	if by != nil {
		_, err = s.reg.Sign(s.ctx, img, by)
		s.must(err)
	}
	return s.pull(kind, good, img)
}

func (s *trial) pull(kind string, good bool, img *node.Image) subject {
	s.Helper()
	id, err := s.PullImage(s.ctx, img.Name)
	s.must(err)
	return subject{kind, good, img.Name, id}
}

// fresh are images that the gate has not seen; the first is good.
func (s *trial) fresh(round int) []subject {
	s.Helper()
	name := fmt.Sprintf("app:%s-%d", filepath.Base(s.dir), round)
	good := s.push("new and good", true, name, release)
	forged, err := s.reg.Push(s.ctx, name+"-forged", node.ImageOptions{Word: name, Files: map[string]string{"/etc/name": name + "-forged"}})
	s.must(err)
	other := forged.Target
	other.Digest = digest.FromString(name)
	envelope := notarytest.MustSign(release, other, notarytest.SignOptions{})
	s.must(s.reg.Attach(s.ctx, forged, notarytest.Manifest(envelope, notary.MediaTypeJWS, forged.Target, 0), node.AttachOptions{}))
	return []subject{
		good,
		s.push("new and unsigned", false, name+"-unsigned", nil),
		s.push("new and signed by a stranger", false, name+"-stranger", stranger),
		s.pull("new with the signature of another image", false, forged),
	}
}

// start starts the gate, and again whenever it ends by itself, as systemd does.
func (s *trial) start() {
	s.Helper()
	s.must(s.run(nil))
}

// run starts a gate if the last one is still the one that was to run.
func (s *trial) run(last *node.Gate) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gate != last {
		return nil
	}
	g, err := s.StartGate(s.ctx, s.options)
	if err != nil {
		return err
	}
	s.gate = g
	if last != nil {
		s.restarts++
	}
	s.watching.Go(func() {
		<-g.Done()
		time.Sleep(100 * time.Millisecond)
		if err := s.run(g); err != nil {
			s.Error(err)
		}
	})
	return nil
}

// take makes the gate one that nobody starts again, and returns it.
func (s *trial) take() *node.Gate {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.gate
	s.gate = nil
	return g
}

// kill ends the gate as a crash does.
func (s *trial) kill() {
	if g := s.take(); g != nil {
		g.Kill()
	}
}

// stop ends the gate as systemd does.
func (s *trial) stop() {
	g := s.take()
	defer s.watching.Wait()
	if g == nil {
		return
	}
	if err := g.Stop(); err != nil {
		s.Errorf("the gate ended with %v", err)
	}
	if !s.Failed() {
		return
	}
	for _, l := range g.Lines() {
		if l.Msg != "decision" && l.Msg != "verification" {
			s.T.Log(l.Raw)
		}
	}
}

// current is the gate that runs.
func (s *trial) current() *node.Gate {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gate
}

// rounds has the failure begin and end n times, less often where few creations are
// asked for, while the workers create containers, at least as many as are asked
// for while it lasts. What begin returns must be in the answer to some creation
// before the failure ends; empty is nothing. extra are more images to ask for
// while it lasts.
func (s *trial) rounds(n int, begin func(round int) (shows string, extra []subject), end func()) {
	s.Helper()
	if s.current() == nil {
		s.start()
	}
	s.recovers(time.Now(), s.good)
	s.row.slowest = 0
	for range workers {
		s.working.Go(func() {
			for !s.quit.Load() {
				s.create()
			}
		})
	}
	n = min(n, max(1, n*creations/150))
	for round := range n {
		fresh := s.fresh(round)
		shows, extra := begin(round)
		s.subjects.Store(new(slices.Concat(s.known, fresh, extra)))
		s.await((creations+n-1)/n, shows)
		s.nobody.Store(false)
		s.subjects.Store(new(slices.Concat(s.known, fresh)))
		end()
		ended := time.Now()
		s.recovers(ended, fresh[0])
		s.recovers(ended, s.good)
		s.row.rounds++
		s.subjects.Store(&s.known)
		for _, f := range fresh {
			s.must(s.RemoveImage(s.ctx, f.image))
		}
	}
}

// await waits until the workers have had n more answers, and one with that text.
func (s *trial) await(n int, shows string) {
	s.Helper()
	s.mu.Lock()
	from := s.row.creations
	s.shows, s.shown = shows, shows == ""
	s.mu.Unlock()
	for end := time.Now().Add(patient); ; time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		got, shown := s.row.creations-from, s.shown
		s.mu.Unlock()
		switch {
		case got >= n && shown:
			s.mu.Lock()
			s.row.during += got
			s.mu.Unlock()
			return
		case time.Now().After(end):
			s.Fatalf("%d answers of %d, one with %q: %t; so far %v", got, n, shows, shown, s.reasons)
		}
	}
}

// recovers waits until an image starts, and remembers how long that took.
func (s *trial) recovers(since time.Time, img subject) {
	s.Helper()
	for end := time.Now().Add(patient); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithDeadline(s.ctx, end)
		c, err := s.pod.Run(ctx, img.image, node.ContainerOptions{Name: s.name("good"), ImageID: img.id}, node.Retry{Limit: -1})
		cancel()
		if err == nil {
			took := time.Since(since)
			s.row.slowest = max(s.row.slowest, took)
			if took > limit {
				s.Errorf("a good image started only %v after the failure had ended", took.Round(time.Millisecond))
			}
			s.must(c.Remove(s.ctx))
			return
		}
		s.wrong(img, err)
		if time.Now().After(end) {
			s.Fatalf("%s does not start after the failure has ended: %v", img.image, err)
		}
	}
}

// name is one for a container; it says whether one of that name may exist.
func (s *trial) name(prefix string) string {
	return fmt.Sprintf("%s-%d", prefix, s.next.Add(1))
}

// create tries the next subject.
func (s *trial) create() {
	all := *s.subjects.Load()
	i := s.next.Add(1)
	img := all[int(i)%len(all)]
	name := fmt.Sprintf("bad-%d", i)
	if img.good {
		name = fmt.Sprintf("good-%d", i)
	}
	nobody := s.nobody.Load()
	ctx, cancel := context.WithTimeout(s.ctx, patient)
	defer cancel()
	c, err := s.pod.Create(ctx, node.ContainerOptions{Name: name, Image: img.image, ImageID: img.id})
	escaped := err == nil && (!img.good || nobody && s.nobody.Load())
	s.count(img, err, escaped)
	if err == nil && !escaped { // one that escaped stays, to be found
		_ = c.Remove(s.ctx) // fails while containerd is away; the pod takes it along
	} else if err != nil && !answered(err) {
		time.Sleep(10 * time.Millisecond) // containerd is away
	}
	s.wrong(img, err)
}

func (s *trial) count(img subject, err error, escaped bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case escaped:
		s.row.creations++
		s.row.escapes++
		s.Errorf("ESCAPE: a container was created from an image that is %s: %s", img.kind, img.image)
	case err == nil:
		s.row.creations++
		s.row.allowed++
	case answered(err):
		s.row.creations++
		s.row.refused++
		s.reasons[why(err)]++
		s.shown = s.shown || strings.Contains(node.Text(err), s.shows)
	default:
		s.row.unanswered++
		s.reasons[why(err)]++
	}
}

// answered reports whether it is by the gate, or for want of its answer, that a
// container was not created.
func answered(err error) bool {
	text := node.Text(err)
	for _, s := range []string{"tidewaiter: denied [", absent, hangs} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}

const (
	absent = `required plugin "tidewaiter" not present`
	hangs  = "validator plugin 99-tidewaiter failed"
)

var code = regexp.MustCompile(`denied \[([A-Z_]+)\]`)

// why is an error of CRI without what is different each time.
func why(err error) string {
	text := node.Text(err)
	if m := code.FindStringSubmatch(text); m != nil {
		return m[1]
	}
	for _, s := range []string{absent, hangs} {
		if at := strings.Index(text, s); at >= 0 {
			return text[at:]
		}
	}
	return "no answer: " + regexp.MustCompile(`[0-9a-f]{12,}|[0-9]+`).ReplaceAllString(text, "#")
}

// wrong checks that nobody says of a good image that its signature is missing or
// bad: whoever could not find out has to say that.
func (s *trial) wrong(img subject, err error) {
	if err == nil || !img.good {
		return
	}
	switch r := why(err); verify.Reason(r) {
	case verify.SignatureMissing, verify.SignatureInvalid, verify.SignerUntrusted, verify.IdentityMismatch, verify.PolicyNoMatch, verify.ImageMismatch, verify.Internal:
		s.Errorf("of a good image it was said: %s", node.Text(err))
	}
}

// escaped looks for containers of bad images that exist, whatever their creation
// was answered.
func (s *trial) escaped() {
	res, err := s.Runtime.ListContainers(context.WithoutCancel(s.ctx), &runtimeapi.ListContainersRequest{})
	if err != nil {
		s.Error(errors.Join(errors.New("what exists is not known"), err))
		return
	}
	found := 0
	for _, c := range res.Containers {
		if strings.HasPrefix(c.GetMetadata().GetName(), "bad-") {
			found++
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if found > 0 {
		s.Errorf("ESCAPE: %d containers of bad images exist, %d were known", found, s.row.escapes)
		s.row.escapes = max(s.row.escapes, found)
	}
}
