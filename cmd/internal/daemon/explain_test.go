package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/decisionlog"
	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A importer is a node of which the images and containers are known. What the gate has
// from a real one, test/e2e asks.
type importer struct {
	images  []verify.Image
	running map[string]verify.Image // by container
	long    map[string]string       // why a container is too long
	gone    map[string]bool
	err     error
}

func (s *importer) Listed(_ context.Context, yield func(verify.Image) bool) error {
	for _, i := range s.images {
		if s.err != nil || !yield(i) {
			break
		}
	}
	return s.err
}

// Read binds what Listed could not.
func (s *importer) Read(_ context.Context, img verify.Image) verify.Image {
	img.Fault, img.Manifest, img.Config = nil, img.Target, img.Target.Digest
	return img
}

func (s *importer) Running(_ context.Context, c containerd.Container) ([]verify.Image, error) {
	if s.gone[c.ID] {
		return []verify.Image{{Asked: c.Image}}, containerd.ErrGone
	}
	return []verify.Image{s.running[c.ID]}, nil
}

type containers struct{ *importer }

func (c containers) Running(_ context.Context, yield func(containerd.Container) bool) error {
	for id, img := range c.running {
		if c.err != nil || !yield(containerd.Container{ID: id, Kind: containerd.KindContainer, Image: img.Asked, Pod: img.Pod, Long: c.long[id]}) {
			break
		}
	}
	return c.err
}

// onNode is an image of the world as the gate binds it ahead of time.
func onNode(d *daemon, tag string) verify.Image {
	target := imagetest.World().Images[tag].Target
	img := verify.Image{Name: verify.Name{Host: "registry.test", Path: "team/app", Tag: tag}, Asked: "registry.test/team/app:" + tag,
		Target: target, Manifest: target, Config: target.Digest, Use: verify.UsePrefetch, Binding: verify.BoundRecord}
	if s := d.decider.Snapshot(); s != nil {
		img.Revision = s.Revision
	}
	return img
}

func newExplainer(t *testing.T, mode string) (*inspect.Explainer, *importer, *daemon) {
	t.Helper()
	d, _ := newDaemon(t)
	dir := t.TempDir()
	layout, etc := filepath.Join(dir, "usb"), filepath.Join(dir, "etc")
	serveLayout(t, layout, "signed", "unsigned", "foreign")
	write(t, etc, "version: 1\nmode: "+mode+"\nsources:\n  network: never\n  layouts: ["+layout+"]\n")
	d.ring = decisionlog.Open("", d.log)
	d.apply(config.Load(etc))
	if d.decider.Snapshot() == nil {
		t.Fatal(d.inForce().rejected.Error)
	}
	s := &importer{running: map[string]verify.Image{}, gone: map[string]bool{}}
	for _, tag := range []string{"foreign", "signed", "unsigned"} {
		s.images = append(s.images, onNode(d, tag))
	}
	return &inspect.Explainer{Images: s, Containers: containers{s}, Decider: &d.decider, Active: d.active, Ring: d.ring, Node: "edge-17",
		Now: time.Now, Assurance: func() string { return "atCreate" }}, s, d
}

// Who asks about one image gets an answer, also where the gate has not come to it.
func TestExplainReads(t *testing.T) {
	x, s, _ := newExplainer(t, "enforce")
	for i := range s.images {
		img := &s.images[i]
		img.Fault, img.Manifest, img.Config = &verify.Fault{Reason: verify.Pending, Detail: "not yet"}, verify.Image{}.Manifest, ""
	}
	if a := one(t, x, "registry.test/team/app:signed"); a.Now == nil || a.Now.Reason != verify.Verified {
		t.Errorf("signed: %+v", a.Now)
	}
	if a := one(t, x, "registry.test/team/app:unsigned"); a.Now == nil || a.Now.Reason != verify.SignatureMissing {
		t.Errorf("unsigned: %+v", a.Now)
	}
}

func one(t *testing.T, x *inspect.Explainer, what string) inspect.About {
	t.Helper()
	e, err := x.Explain(t.Context(), what)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if len(e.About) != 1 {
		t.Fatalf("%s: %d are explained", what, len(e.About))
	}
	// It has to come back as it went, and to be printable.
	raw, err := json.Marshal(e)
	var back inspect.Explanation
	if err == nil {
		err = json.Unmarshal(raw, &back)
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if text := back.Text(); strings.ContainsAny(text, "\x1b\x07\r") || !strings.HasSuffix(text, "\n") {
		t.Errorf("%s: %q", what, text)
	}
	return back.About[0]
}

// noted waits until the verification that has that ID is remembered, which is after its
// answer.
func noted(t *testing.T, x *inspect.Explainer, id string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); one(t, x, id).Then == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is not remembered", id)
		}
	}
}

// TestExplain asks about images by all that they are called, in both modes.
func TestExplain(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		t.Run(mode, func(t *testing.T) {
			x, s, d := newExplainer(t, mode)
			signed := imagetest.World().Images["signed"].Target.Digest
			id := ""
			for _, what := range []string{"registry.test/team/app:signed", signed.String(), "registry.test/team/app@" + signed.String()} {
				a := one(t, x, what)
				id = a.Now.ID
				if a.Now.Reason != verify.Verified || !a.Now.Allowed || a.Next != "" || a.Mode != mode || a.Rule.Statement.Name != "prod" || a.Now.Ends != "certificate" {
					t.Errorf("%s: %+v", what, a)
				}
				if len(a.Signatures) != 1 || a.Signatures[0].Reason != "VERIFIED" || len(a.Signatures[0].Chain) < 2 {
					t.Fatalf("%s: signatures %+v", what, a.Signatures)
				}
				chain := a.Signatures[0].Chain
				for i, c := range chain {
					if want := map[bool]string{true: "ca:acme/root.crt"}[i == len(chain)-1]; c.Anchor != want || len(c.Thumbprint) != 64 || c.NotAfter.IsZero() || c.Subject == "" {
						t.Errorf("%s: certificate %d is %+v", what, i, c)
					}
				}
				if a.Fresh != (what == "registry.test/team/app:signed") {
					t.Errorf("%s: fresh is %v", what, a.Fresh)
				}
			}
			// By ID: as it is remembered, and after the node forgot.
			noted(t, x, id)
			if a := one(t, x, id); a.Then == nil || a.Then.Kind != control.VerificationLine || a.Now.ID != id {
				t.Errorf("by ID: %+v", a)
			}
			full := x.Ring
			x.Ring = decisionlog.Open("", d.log)
			if a := one(t, x, id); a.Then != nil || a.Now.ID != id || a.Now.Target != signed.String() {
				t.Errorf("by ID, forgotten: %+v", a)
			}
			x.Ring = full
			a := one(t, x, "registry.test/team/app:foreign")
			if len(a.Signatures) != 1 || a.Signatures[0].Reason != "SIGNER_UNTRUSTED" || a.Signatures[0].Anchor != "" || a.Next != control.Next(verify.SignerUntrusted) {
				t.Errorf("foreign: %+v", a)
			}
			for _, c := range a.Signatures[0].Chain {
				if c.Anchor != "" {
					t.Errorf("a stranger's certificate is trusted: %+v", c)
				}
			}
			a = one(t, x, "registry.test/team/app:unsigned")
			if a.Reason() != verify.SignatureMissing || a.Now.Allowed != (mode == "audit") || len(a.Signatures) != 0 || a.Next == "" {
				t.Errorf("unsigned: %+v", a)
			}
			want := "denied [SIGNATURE_MISSING]"
			if mode == "audit" {
				want = "allowed by audit; enforce denies [SIGNATURE_MISSING]"
			}
			if text := (inspect.Explanation{About: []inspect.About{a}}).Text(); !strings.Contains(text, "  now        "+want+" (") {
				t.Errorf("no %s in\n%s", want, text)
			}
			// A repository is all that is in it.
			if e, err := x.Explain(t.Context(), "registry.test/team/app"); err != nil || len(e.About) != 3 {
				t.Errorf("the repository: %v", err)
			}
			for _, what := range []string{"", "registry.test/team/app:none", "registry.test/team", "ffffffffffff", "abcdef0123", digest.FromString("x").String(), "a b", strings.Repeat("f", 5000)} {
				if e, err := x.Explain(t.Context(), what); err == nil || len(err.Error()) > 1000 {
					t.Errorf("%.20q is explained with %+v, %v", what, e, err)
				}
			}

			// Containers: one that runs, one of which the image is gone, and one that was
			// refused, by a part of their IDs.
			img := s.images[1]
			img.Binding, img.Pod = verify.BoundSnapshot, verify.Pod{Namespace: "shop", Name: "web\x1b[31m", Container: "app"}
			s.running["aaaa11112222"+strings.Repeat("0", 52)] = img
			s.running["bbbb11112222"+strings.Repeat("0", 52)] = img
			s.gone["bbbb11112222"+strings.Repeat("0", 52)] = true
			if a := one(t, x, "aaaa11"); a.Now.Reason != verify.Verified || !a.Container.Running || a.Container.Pod.Namespace != "shop" || a.Now.Binding != "snapshot" {
				t.Errorf("running: %+v", a)
			}
			if a := one(t, x, "bbbb11112222"); a.Now != nil || a.Missing == "" || a.Reason() != verify.ImageUnresolved {
				t.Errorf("gone: %+v", a)
			}
			refused := s.images[2]
			refused.Pod, refused.Use, refused.Binding = verify.Pod{Namespace: "shop", Name: "evil", UID: "u"}, verify.UseContainer, verify.BoundSnapshot
			dec := d.decider.Verify(t.Context(), refused)
			noted(t, x, dec.ID())
			d.ring.Add(decisionlog.Entry{At: time.Now(), Kind: control.AnswerLine, Container: "cccc" + strings.Repeat("1", 60), Mode: mode, Decision: dec.Report(refused, "edge-17")})
			for _, what := range []string{"cccc11", dec.ID()} {
				if a := one(t, x, what); a.Then == nil || a.Now == nil || a.Now.ID != dec.ID() || a.Container.Running || a.Container.Pod.Name != "evil" {
					t.Errorf("%s: %+v", what, a)
				}
			}
			// Without containerd what was answered is known all the same.
			s.err = errors.New("containerd is away")
			if a := one(t, x, "cccc11"); a.Then == nil || a.Now != nil || !strings.Contains(a.Missing, "containerd is away") || a.Next == "" {
				t.Errorf("without containerd: %+v", a)
			}
			if _, err := x.Explain(t.Context(), "registry.test/team/app:signed"); err == nil || !strings.Contains(err.Error(), "containerd is away") {
				t.Errorf("without containerd: %v", err)
			}
		})
	}
}

// TestImages lists what is on the node: each image once, and as many as there is room for.
func TestImages(t *testing.T) {
	x, s, d := newExplainer(t, "audit")
	again := s.images[1]
	again.Name.Tag, again.Name.Digest = "", again.Target.Digest // CRI's second record
	alone := s.images[2]
	alone.Name.Path, alone.Name.Tag, alone.Name.Digest = "team/other", "", alone.Target.Digest
	unread := s.images[0]
	unread.Name.Tag, unread.Fault = "unread", &verify.Fault{Reason: verify.Pending, Detail: "not yet"}
	s.images = append(s.images, again, alone, unread)
	l, err := x.List(t.Context())
	if err != nil || l.Mode != "audit" || l.More {
		t.Fatalf("%+v %v", l, err)
	}
	got := ""
	for _, i := range l.List {
		got += fmt.Sprintln(i.Image[:min(len(i.Image), 34)], i.Reason, i.Allowed, i.Until != nil, i.Ends)
	}
	if want := "registry.test/team/app:foreign SIGNER_UNTRUSTED false false \n" +
		"registry.test/team/app:signed VERIFIED true true certificate\n" +
		"registry.test/team/app:unsigned SIGNATURE_MISSING false false \n" +
		"registry.test/team/other@sha256:" + alone.Target.Digest.Encoded()[:2] + " SIGNATURE_MISSING false false \n" +
		"registry.test/team/app:unread PENDING false false \n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	// An import looks for images whose evidence would go by these, see archive.Replaced.
	if i, is := l.List[1], s.images[1]; i.Manifest != is.Manifest.Digest.String() || i.Config != is.Config.String() || i.Config == "" && i.Manifest == "" {
		t.Errorf("%+v is not of %+v", i, is)
	}
	// Where an image runs is looked up by what runs, and not by a name.
	web := s.images[2]
	web.Name.Tag, web.Pod = "moved", verify.Pod{Namespace: "shop"}
	old := web
	old.Pod.Namespace = "tidewaiter-system"
	s.running["aaaa"], s.running["bbbb"], s.running["cccc"] = web, old, verify.Image{Name: unread.Name, Pod: verify.Pod{Namespace: "late"}}
	s.images[0].Fault = &verify.Fault{Reason: verify.NotAnImage, Detail: "the manifest's config has another media type"}
	s.long = map[string]string{"aaaa": "longer than 300 KiB"}
	if l, err = x.List(t.Context()); err != nil || l.Unseen != "" || !slices.Equal(l.TooLong, []string{"shop/ : longer than 300 KiB"}) {
		t.Fatalf("%+v %v", l, err)
	}
	for k, want := range []string{"[]true", "[]false", "[shop tidewaiter-system]false", "[shop tidewaiter-system]false", "[late]false"} {
		if got := fmt.Sprint(l.List[k].Runs, l.List[k].NotImage); strings.ReplaceAll(got, "] ", "]") != want {
			t.Errorf("%s runs in %s, want %s", l.List[k].Image, got, want)
		}
	}
	for range 5000 {
		s.images = append(s.images, unread)
	}
	if l, err := x.List(t.Context()); err != nil || !l.More || len(l.List) > 4096 {
		t.Errorf("%d are listed, more is %v: %v", len(l.List), l.More, err)
	}
	// A question that is not answered in time is not waited for.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if l, err := x.List(ended); err != nil || l.List[0].Reason != "PENDING" {
		t.Errorf("%v", err)
	}
	d.decider.Swap(nil)
	if _, err := x.List(t.Context()); err == nil {
		t.Error("there is a list without a configuration")
	}
}
