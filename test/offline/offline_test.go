// Package offline takes the network and the power away from real nodes. What was
// verified before starts after, and nothing else does.
//
// The short form cuts the power at six moments, on containerd 2.4. The full one
// (make e2e-offline) does it as often as TIDEWAITER_TEST_CUTS says, on each version of
// containerd that TIDEWAITER_TEST_CONTAINERD names. TIDEWAITER_TEST_SEED repeats a run's
// choice of moments; they are times and places in what runs, so that a second run
// comes near to the first and is not the same.
package offline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

var (
	versions = node.Versions(node.Containerd24)
	cuts     = 6
	seed     = uint64(time.Now().UnixNano())

	program string // tidewaiter
	notRoot string // why nothing can be tested, or empty
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		notRoot = "a node needs root"
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/offline:", notRoot)
		os.Exit(m.Run())
	}
	code, err := func() (int, error) {
		var err error
		if v := os.Getenv("TIDEWAITER_TEST_CUTS"); v != "" {
			if cuts, err = strconv.Atoi(v); err != nil || cuts < 1 {
				return 1, fmt.Errorf("TIDEWAITER_TEST_CUTS: %q is no number of power cuts", v)
			}
		}
		if v := os.Getenv("TIDEWAITER_TEST_SEED"); v != "" {
			if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
				return 1, fmt.Errorf("TIDEWAITER_TEST_SEED: %w", err)
			}
		}
		if program, err = node.BuildTidewaiter(context.Background()); err != nil {
			return 1, err
		}
		return m.Run(), leaktest.Find()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// Who signs.
var (
	acme     = notarytest.NewCA(notarytest.CAOptions{})
	rival    = notarytest.NewCA(notarytest.CAOptions{})
	release  = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	second   = acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	stranger = rival.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
)

// decoy is a platform that no node of these tests has.
var decoy = []node.Decoy{{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}}}

// policy trusts acme's release for every image, and knows these sources.
func policy(sources map[string]any) node.Config {
	return node.Config{
		Mode:       "enforce",
		Stores:     notarytest.Stores{"ca/acme/root.crt": acme.PEM()},
		Statements: []verify.Statement{notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")},
		More:       map[string]any{"sources": sources},
	}
}

// mirrors are sources that are registries, and nothing that containerd knows.
func mirrors(list ...node.Mirror) map[string]any {
	return map[string]any{"certsDir": "none", "network": "mirrors", "mirrors": list}
}

// A site is a node whose gate keeps its state on a disk that loses what was not
// synced.
type site struct {
	*testing.T
	*node.Node
	ctx        context.Context
	disk       *node.Disk
	registries []*node.Registry

	config string // directory
	gate   *node.Gate
	pod    *node.Pod
	images int // numbers images
}

// onEach runs a test on a node of every version.
func onEach(t *testing.T, f func(s *site)) {
	t.Helper()
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			s := &site{T: t, ctx: t.Context(), config: filepath.Join(t.TempDir(), "config")}
			var err error
			s.Node, err = node.Start(s.ctx, node.Options{ContainerdVersion: v, Required: true, Log: t.Output()})
			s.must(err)
			t.Cleanup(func() {
				err := s.Stop()
				for _, r := range s.registries {
					err = errors.Join(err, r.Stop())
				}
				if err != nil {
					t.Error(err)
				}
				if t.Failed() && s.gate != nil {
					t.Log(s.gate.Log())
				}
			})
			s.disk, err = s.NewDisk(s.ctx, 32)
			s.must(err)
			f(s)
		})
	}
}

func (s *site) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// within is the context of something that has to come, with generous patience.
func (s *site) within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.ctx, 3*time.Minute)
}

// registry starts a registry that containerd pulls from.
func (s *site) registry(host string, o node.RegistryOptions) *node.Registry {
	s.Helper()
	r, err := node.NewRegistry(host, o)
	s.must(err)
	s.registries = append(s.registries, r)
	s.must(s.Use(r))
	return r
}

// network takes the mirrors away or brings them back.
func (s *site) network(on bool) {
	s.Helper()
	for _, r := range s.registries {
		if on {
			s.must(r.Start())
		} else {
			s.must(r.Stop())
		}
	}
}

// start starts the gate and a pod for the containers to come.
func (s *site) start(o node.GateOptions) {
	s.Helper()
	if s.pod == nil {
		var err error
		s.pod, err = s.RunPod(s.ctx, node.PodOptions{})
		s.must(err)
	}
	o.ConfigDir, o.StateDir, o.NodeName, o.Binary = s.config, s.disk.Dir, "edge-1", program
	var err error
	s.gate, err = s.StartGate(s.ctx, o)
	s.must(err)
}

// registered starts the gate and waits until it decides.
func (s *site) registered(o node.GateOptions) {
	s.Helper()
	s.start(o)
	ctx, cancel := s.within()
	defer cancel()
	s.must(s.gate.WaitRegistered(ctx))
}

// stop ends the gate as a service manager does.
func (s *site) stop() {
	s.Helper()
	s.must(s.gate.Stop())
}

// cut takes the power away. What is then in the store by its name is whole.
func (s *site) cut() {
	s.Helper()
	s.must(s.PowerCut(s.ctx))
	s.pod = nil
	err := filepath.WalkDir(filepath.Join(s.disk.Dir, "store"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasPrefix(e.Name(), ".unfinished-") {
			return err
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if filepath.Base(filepath.Dir(name)) == "sha256" {
			if got := digest.FromBytes(raw).Encoded(); got != e.Name() {
				s.Errorf("after the power cut %s has %d bytes, which are not its digest's", name, len(raw))
			}
		} else if !json.Valid(raw) {
			s.Errorf("after the power cut %s is %q", name, raw)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.Error(err)
	}
}

// A signing is one signature of an image.
type signing struct {
	by       *notarytest.Signer
	cose     bool
	manifest bool // of the platform's manifest instead of the index
}

// push pushes an image that prints its name, with signatures, and returns the digests
// of those.
func (s *site) push(r *node.Registry, name string, o node.ImageOptions, by ...signing) (*node.Image, []digest.Digest) {
	s.Helper()
	o.Word = r.Host + "/" + name
	img, err := r.Push(s.ctx, name, o)
	s.must(err)
	var list []digest.Digest
	for _, sign := range by {
		list = append(list, s.sign(r, img, sign))
	}
	return img, list
}

// artifact signs an image.
func artifact(img *node.Image, sign signing) notarytest.Artifact {
	subject, mediaType := img.Target, notary.MediaTypeJWS
	if sign.manifest {
		subject = img.Manifest
	}
	if sign.cose {
		mediaType = notary.MediaTypeCOSE
	}
	envelope := notarytest.MustSign(sign.by, subject, notarytest.SignOptions{MediaType: mediaType})
	return notarytest.Manifest(envelope, mediaType, subject, notarytest.ConfigType)
}

func (s *site) sign(r *node.Registry, img *node.Image, sign signing) digest.Digest {
	s.Helper()
	a := artifact(img, sign)
	s.must(r.Attach(s.ctx, img, a, node.AttachOptions{}))
	return a.Manifest.Descriptor.Digest
}

// try runs an image as a kubelet does that tries again, until it runs or the answer
// is final, and removes the container. The node must have the image where pull says
// so.
func (s *site) try(image string, pull node.Pull) error {
	s.Helper()
	s.images++
	ctx, cancel := s.within()
	defer cancel()
	o := node.ContainerOptions{Name: fmt.Sprintf("c%d", s.images), Pull: pull}
	c, err := s.pod.Run(ctx, image, o, node.Retry{Interval: 50 * time.Millisecond, Limit: time.Minute})
	if err != nil {
		return err
	}
	out, err := c.Output(ctx)
	if err != nil || out != image { // push makes them so
		s.Errorf("%s printed %q, %v", image, out, err)
	}
	s.must(c.Remove(ctx))
	return nil
}

func (s *site) allowed(img *node.Image, pull node.Pull) {
	s.Helper()
	if err := s.try(img.Name, pull); err != nil {
		s.Fatalf("%s was refused: %v\n%s", img.Name, err, s.gate.Log())
	}
}

// denied checks that an image is refused by the gate for one of these reasons.
func (s *site) denied(image string, pull node.Pull, codes ...verify.Reason) {
	s.Helper()
	err := s.try(image, pull)
	if err == nil {
		s.Fatalf("%s was started, want %v", image, codes)
	}
	text := node.Text(err)
	if !slices.ContainsFunc(codes, func(r verify.Reason) bool { return strings.Contains(text, "tidewaiter: denied ["+string(r)+"]") }) {
		s.Errorf("%s: want %v: %s", image, codes, text)
	}
}

// kept waits until the store names signatures in index.json, which it writes when
// they are safe.
func (s *site) kept(signatures ...digest.Digest) {
	s.Helper()
	ctx, cancel := s.within()
	defer cancel()
	for {
		raw, _ := os.ReadFile(filepath.Join(s.disk.Dir, "store/index.json"))
		missing := slices.DeleteFunc(slices.Clone(signatures), func(d digest.Digest) bool { return strings.Contains(string(raw), d.String()) })
		if len(missing) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatalf("the store has not got %v:\n%s\n%s", missing, raw, s.gate.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// boot brings the node back, starts the gate, and returns how long it took from
// the start of the process until the first container ran.
func (s *site) boot(first *node.Image, o node.GateOptions) time.Duration {
	s.Helper()
	s.must(s.StartContainerd(s.ctx))
	var err error
	s.pod, err = s.RunPod(s.ctx, node.PodOptions{})
	s.must(err)
	began := time.Now()
	s.start(o)
	s.images++
	ctx, cancel := s.within()
	defer cancel()
	for {
		c, err := s.pod.Create(ctx, node.ContainerOptions{Name: fmt.Sprintf("c%d", s.images), Image: first.Name, Pull: node.PullNever})
		if err == nil {
			s.must(c.Start(ctx))
			took := time.Since(began)
			if out, err := c.Output(ctx); err != nil || out != first.Name {
				s.Errorf("%s printed %q, %v", first.Name, out, err)
			}
			s.must(c.Remove(ctx))
			return took
		}
		// The gate is not there yet, has not read the store yet, or the node was not
		// listed yet; or reading the store took longer than a question waits for that.
		text := node.Text(err)
		if ctx.Err() != nil || !node.Pending(err) && !strings.Contains(text, `required plugin "tidewaiter" not present`) && !strings.Contains(text, "["+string(verify.SourceUnreachable)+"]") {
			s.Fatalf("%s was refused: %s\n%s", first.Name, text, s.gate.Log())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// sound checks that the store found nothing damaged: what was cut off was not there
// yet, and what was there was whole.
func (s *site) sound() {
	s.Helper()
	for _, l := range s.gate.Lines() {
		// What a busy machine does to registering and to the time of answers is no damage.
		busy := strings.HasPrefix(l.Msg, "not registered") || strings.HasPrefix(l.Msg, "a hook exceeded")
		if l.Level == "ERROR" && !busy || strings.Contains(l.Msg, "damaged") || strings.Contains(l.Raw, "do not belong") {
			s.Errorf("after the power cut: %s", l.Raw)
		}
	}
}
