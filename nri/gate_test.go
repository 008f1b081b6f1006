package nri

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// one is a Resolver that finds one image.
type one struct{}

func (one) Resolve(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	return []verify.Image{{Name: verify.Name{Host: "registry.example", Path: "app"}, Use: verify.UseContainer}}
}
func (one) Known(*api.PodSandbox, *api.Container) ([]verify.Image, bool) { return nil, false }
func (one) Decided(string, []verify.Image)                               {}
func (one) Started(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	return nil
}
func (one) Connected(bool) {}

// slow is a Verifier that waits for what is not known, as a Decider does.
type slow struct {
	wait   time.Duration
	asked  int
	waited time.Duration
}

func (s *slow) Verify(ctx context.Context, _ verify.Image) verify.Decision {
	s.asked++
	from := time.Now()
	ctx, cancel := context.WithTimeout(ctx, s.wait)
	defer cancel()
	<-ctx.Done()
	s.waited += time.Since(from)
	return verify.Deny(verify.Pending, "still being checked")
}

// TestWaitsAreBounded: the runtime asks one question at a time, so that pods
// which can never be verified must not wait for most of the node's time.
func TestWaitsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &slow{wait: 50 * time.Millisecond}
		g := &Gate{Resolver: one{}, Verifier: v, Observe: func(Answer) {}, Now: time.Now}
		ask := func() {
			if g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{}) == nil {
				t.Fatal("allowed")
			}
		}
		// One alone waits as it may.
		if ask(); v.waited != v.wait {
			t.Errorf("the first waited %v, want %v", v.waited, v.wait)
		}
		// 200 pods at the pace of a kubelet, for a minute.
		start := time.Now()
		for time.Since(start) < time.Minute {
			ask()
			time.Sleep(5 * time.Millisecond)
		}
		all := time.Since(start)
		if most := all/waitShare + maxWaits + v.wait; v.waited > most {
			t.Errorf("%d questions waited %v in %v, want at most %v", v.asked, v.waited, all, most)
		}
		if v.waited < all/waitShare/2 {
			t.Errorf("only %v of %v were waited", v.waited, all)
		}
		// After a quiet time there is something to spend again, and no more than that.
		time.Sleep(time.Hour)
		v.waited = 0
		for range 200 {
			ask()
		}
		if most := maxWaits*21/20 + v.wait; v.waited > most || v.waited < maxWaits {
			t.Errorf("after a quiet hour %v were waited at once, want %v to %v", v.waited, maxWaits, most)
		}
	})
}

// known is a Verifier that answers from memory.
type known struct {
	asked int
	ended bool // no wait was granted
}

func (k *known) Verify(ctx context.Context, _ verify.Image) verify.Decision {
	k.asked++
	k.ended = ctx.Err() != nil
	return verify.Deny(verify.PolicyNoMatch, digest.FromString("x").String())
}

// TestKnownAnswersCostNoWait: an empty budget keeps nothing from being answered.
func TestKnownAnswersCostNoWait(t *testing.T) {
	k := &known{}
	var last verify.Decision
	g := &Gate{Resolver: one{}, Verifier: k, Observe: func(a Answer) { last = a.Decision }, Now: time.Now}
	g.waits.at = time.Now()
	g.waits.pay(time.Hour)
	if err := g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{}); err == nil || last.Reason != verify.PolicyNoMatch || k.asked != 1 || !k.ended {
		t.Errorf("%v, %v, asked %d times", err, last.Reason, k.asked)
	}
}

// remembers is a Resolver that knows its one image.
type remembers struct {
	one
	decided int
	panics  bool
}

func (r *remembers) Known(pod *api.PodSandbox, ctr *api.Container) ([]verify.Image, bool) {
	if r.panics {
		panic("as told")
	}
	return r.Resolve(context.Background(), pod, ctr), true
}
func (r *remembers) Decided(string, []verify.Image) { r.decided++ }

// yes is a Verifier that allows; it is PENDING where it may not wait, if so told.
type yes struct {
	decider verify.Decider
	wait    bool
	asked   []bool // whether it might wait, by question
}

func (y *yes) Verify(ctx context.Context, img verify.Image) verify.Decision {
	y.asked = append(y.asked, ctx.Err() == nil)
	if y.wait && ctx.Err() != nil {
		return verify.Deny(verify.Pending, "not known yet")
	}
	return y.decider.Verify(ctx, img)
}

// TestKnownIsAnsweredAtOnce: what is known takes one question and no waiting, and
// whatever is not takes the way on which a deadline holds. Either is told once.
func TestKnownIsAnsweredAtOnce(t *testing.T) {
	for label, tt := range map[string]struct {
		wait, panics bool
		asked        []bool
	}{
		"known":              {false, false, []bool{false}},
		"not verified yet":   {true, false, []bool{false, true}},
		"panic when looking": {false, true, []bool{true}},
	} {
		t.Run(label, func(t *testing.T) {
			y, r, told := &yes{wait: tt.wait}, &remembers{panics: tt.panics}, 0
			y.decider.Swap(&verify.Snapshot{Mode: verify.Audit, Policy: nothing{}}) // audit allows
			g := &Gate{Resolver: r, Verifier: y, Observe: func(Answer) { told++ }, Now: time.Now}
			err := g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{})
			if err != nil || !slices.Equal(y.asked, tt.asked) || told != 1 || r.decided != 1 {
				t.Errorf("%v, asked %v, told %d times, decided %d times", err, y.asked, told, r.decided)
			}
		})
	}
	k, r, told := &known{}, &remembers{}, 0
	g := &Gate{Resolver: r, Verifier: k, Observe: func(Answer) { told++ }, Now: time.Now}
	if err := g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{}); err == nil || k.asked != 1 || !k.ended || told != 1 || r.decided != 0 {
		t.Errorf("a known no: %v, asked %d times, told %d times, decided %d times", err, k.asked, told, r.decided)
	}
}

// nothing is a Policy that matches nothing.
type nothing struct{}

func (nothing) Select(verify.Image) *verify.Rule { return &verify.Rule{Fixed: verify.PolicyNoMatch} }

// mismatched is a Resolver for which every container was created from something else.
type mismatched struct{ one }

func (mismatched) Started(_ context.Context, _ *api.PodSandbox, ctr *api.Container) []verify.Image {
	return []verify.Image{{Asked: ctr.GetAnnotations()[imageName], Fault: &verify.Fault{Reason: verify.ImageMismatch, Detail: "another image ID"}}}
}

// denier answers as a Decider does for an image with a fault.
type denier struct{}

func (denier) Verify(_ context.Context, img verify.Image) verify.Decision {
	return verify.Deny(img.Fault.Reason, img.Fault.Detail)
}

// A denial at the start names the image as one at the creation does.
func TestStartNamesTheImage(t *testing.T) {
	g := &Gate{Resolver: mismatched{}, Verifier: denier{}, Observe: func(Answer) {}, Now: time.Now}
	err := g.StartContainer(t.Context(), &api.PodSandbox{}, &api.Container{Annotations: map[string]string{imageName: "registry.example/app:1"}})
	if want := `tidewaiter: denied [IMAGE_MISMATCH] "registry.example/app:1": another image ID`; err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

// elsewhere is a Resolver whose containers another run of the gate allowed.
type elsewhere struct{ one }

func (elsewhere) Started(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	d := ocispec.Descriptor{Digest: "sha256:d"}
	return []verify.Image{{
		Name: verify.Name{Host: "registry.example", Path: "app"}, Target: d, Manifest: d, Config: "sha256:c",
		Use: verify.UseContainer, Binding: verify.BoundSnapshot,
	}}
}

// lists is a Policy with an allowlist of one digest.
type lists digest.Digest

func (l lists) Select(verify.Image) *verify.Rule {
	return &verify.Rule{Fixed: verify.AllowedByDigest, Digest: digest.Digest(l)}
}

// A container that another run of the gate allowed starts if this one knows its
// image to be allowed. Nobody waits to find out, and the answer is never one that
// may be different a moment later: the start is not tried again.
func TestStartOfWhatAnotherRunAllowed(t *testing.T) {
	for _, tt := range []struct {
		known verify.Decision
		want  verify.Reason
	}{
		{verify.Deny(verify.Pending, "still being checked"), verify.ImageUnresolved},
		{verify.Deny(verify.Overloaded, "full"), verify.ImageUnresolved},
		{verify.Deny(verify.SourceUnreachable, "the mirror hangs"), verify.ImageUnresolved},
		{verify.Decision{Reason: verify.AuditOnly, Would: verify.Pending}, verify.ImageUnresolved},
		{verify.Deny(verify.SignatureMissing, "no signature"), verify.SignatureMissing},
	} {
		v := &atEnd{t: t, known: tt.known}
		var told []Answer
		g := &Gate{Resolver: elsewhere{}, Verifier: v, Observe: func(a Answer) { told = append(told, a) }, Now: time.Now}
		err := g.StartContainer(t.Context(), &api.PodSandbox{}, &api.Container{Id: "id"})
		if err == nil || len(told) != 1 || told[0].Decision.Reason != tt.want || told[0].Hook != "StartContainer" {
			t.Errorf("%s: %v, told %+v", tt.known.Reason, err, told)
		}
	}
}

// A yes lets it start, and a no does not. Where nothing is left to be judged, what
// was created is what was allowed.
func TestStartOfWhatIsAllowed(t *testing.T) {
	agreed := &Gate{Resolver: one{}, Verifier: denier{}, Observe: func(a Answer) { t.Errorf("told %+v", a) }, Now: time.Now}
	if err := agreed.StartContainer(t.Context(), &api.PodSandbox{}, &api.Container{Id: "id"}); err != nil {
		t.Error(err)
	}
	for listed, want := range map[digest.Digest]bool{"sha256:d": true, "sha256:other": false} {
		var e verify.Decider
		e.Swap(&verify.Snapshot{Policy: lists(listed)})
		g := &Gate{Resolver: elsewhere{}, Verifier: &e, Observe: func(Answer) {}, Now: time.Now}
		if err := g.StartContainer(t.Context(), &api.PodSandbox{}, &api.Container{Id: "id"}); (err == nil) != want {
			t.Errorf("%s is listed: %v", listed, err)
		}
	}
}

// atEnd is a Verifier that is asked for what it knows.
type atEnd struct {
	t     *testing.T
	known verify.Decision
}

func (v *atEnd) Verify(ctx context.Context, img verify.Image) verify.Decision {
	if ctx.Err() == nil {
		v.t.Error("the start waits for a verification")
	}
	if f := img.Fault; f != nil {
		return verify.Deny(f.Reason, f.Detail)
	}
	return v.known
}

// belated is a Resolver that answers when it is too late.
type belated struct {
	elsewhere
	decided int
}

func (h *belated) Resolve(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image {
	<-ctx.Done()
	time.Sleep(time.Second)
	return h.Started(ctx, pod, ctr)
}
func (h *belated) Decided(string, []verify.Image) { h.decided++ }

// What is found out after the runtime was told PENDING is no answer: nobody is told
// that the container was allowed, and nothing is remembered of it.
func TestLateAnswersAreNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e verify.Decider
		e.Swap(&verify.Snapshot{Policy: lists("sha256:d")})
		h := &belated{}
		var told []Answer
		g := &Gate{Resolver: h, Verifier: &e, Observe: func(a Answer) { told = append(told, a) }, Now: time.Now}
		if g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{}) == nil {
			t.Error("allowed")
		}
		if g.Stuck() != 1 {
			t.Errorf("%d stuck", g.Stuck())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(told) != 1 || told[0].Decision.Allowed() || h.decided != 0 || g.Stuck() != 0 {
			t.Errorf("told %+v, decided %d, stuck %d", told, h.decided, g.Stuck())
		}
	})
}

// several is a Resolver that says what it is told to.
type several struct {
	one
	images  []verify.Image
	known   bool
	panics  bool
	decided [][]verify.Image
	looked  int
}

func (s *several) Resolve(context.Context, *api.PodSandbox, *api.Container) []verify.Image {
	if s.looked++; s.panics {
		panic("as told")
	}
	return s.images
}
func (s *several) Known(*api.PodSandbox, *api.Container) ([]verify.Image, bool) {
	if s.panics {
		panic("as told")
	}
	return s.images, s.known
}
func (s *several) Decided(_ string, images []verify.Image) { s.decided = append(s.decided, images) }

// is is an image whose target has that digest.
func is(d digest.Digest) verify.Image {
	i := elsewhere{}.Started(context.Background(), nil, nil)[0]
	i.Target.Digest, i.Manifest.Digest = d, d
	return i
}

// TestEveryImageCounts: a container is allowed where each of its images is, whether
// they are known or have to be looked up, and where there is one at all.
func TestEveryImageCounts(t *testing.T) {
	yes, no := is("sha256:d"), is("sha256:other")
	for label, tt := range map[string]struct {
		r    several
		want verify.Reason // of the denial; "": allowed
	}{
		"one":                           {several{images: []verify.Image{yes}}, ""},
		"another":                       {several{images: []verify.Image{no}}, verify.PolicyInvalid},
		"the second is not":             {several{images: []verify.Image{yes, no}}, verify.PolicyInvalid},
		"the first is not":              {several{images: []verify.Image{no, yes}}, verify.PolicyInvalid},
		"both":                          {several{images: []verify.Image{yes, yes}}, ""},
		"known":                         {several{images: []verify.Image{yes}, known: true}, ""},
		"the second of what is known":   {several{images: []verify.Image{yes, no}, known: true}, verify.PolicyInvalid},
		"none":                          {several{}, verify.Internal},
		"none, and known":               {several{known: true}, verify.Internal},
		"an image of which nobody says": {several{images: make([]verify.Image, 1)}, verify.ImageUnresolved},
		"panic":                         {several{images: []verify.Image{yes}, panics: true}, verify.Internal},
	} {
		var e verify.Decider
		e.Swap(&verify.Snapshot{Policy: lists("sha256:d")})
		var last verify.Decision
		g := &Gate{Resolver: &tt.r, Verifier: &e, Observe: func(a Answer) { last = a.Decision }, Now: time.Now}
		err := g.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{})
		if (err == nil) != (tt.want == "") || tt.want != "" && last.Reason != tt.want || (len(tt.r.decided) == 1) != (tt.want == "") {
			t.Errorf("%s: %v, told %s, decided %v", label, err, last.Reason, tt.r.decided)
		}
		if err == nil && len(tt.r.decided[0]) != len(tt.r.images) {
			t.Errorf("%s: decided %v", label, tt.r.decided)
		}
		if looked := tt.r.looked > 0; looked == (tt.r.known && len(tt.r.images) == 1) {
			t.Errorf("%s: looked up %t", label, looked)
		}
	}
}

// TestCreateContainerOfANodeThatEnforces: the hook of audit decides nothing where the
// node enforces, and looks nothing up.
func TestCreateContainerOfANodeThatEnforces(t *testing.T) {
	for _, audits := range []bool{true, false} {
		r := &several{images: []verify.Image{is("sha256:d")}}
		var e verify.Decider
		e.Swap(&verify.Snapshot{Policy: lists("sha256:d")})
		var last Answer
		g := &Gate{Resolver: r, Verifier: &e, Observe: func(a Answer) { last = a }, Now: time.Now}
		err := g.CreateContainer(t.Context(), &api.PodSandbox{}, &api.Container{}, audits)
		if (err == nil) != audits || (r.looked == 1) != audits || last.Hook != "CreateContainer" || !audits && last.Decision.Reason != verify.Pending {
			t.Errorf("audits %t: %v, looked up %d times, told %+v", audits, err, r.looked, last)
		}
	}
}

// TestBudget: an answer comes well before the runtime's deadline, and in any case
// within the gate's own time.
func TestBudget(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for left, want := range map[time.Duration]time.Duration{
		-time.Second: 0, 0: 0, 4 * time.Millisecond: 3 * time.Millisecond, time.Second: 750 * time.Millisecond,
		4 * margin: 3 * margin, 1400 * time.Millisecond: 1100 * time.Millisecond,
		budget + margin: budget, 2 * time.Second: budget, time.Hour: budget,
	} {
		ctx, cancel := context.WithDeadline(t.Context(), now.Add(left))
		if got := (&Gate{}).budget(ctx, now); got != want {
			t.Errorf("with %v left the budget is %v, want %v", left, got, want)
		}
		cancel()
	}
	if got := (&Gate{}).budget(t.Context(), now); got != budget {
		t.Errorf("without a deadline the budget is %v", got)
	}
}

// TestWaitBudget: a clock that goes back neither fills the budget nor empties it.
func TestWaitBudget(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var p waitBudget
	open := func(want bool) {
		t.Helper()
		if ctx := p.open(t.Context(), now); (ctx.Err() == nil) != want {
			t.Errorf("open %t, spent %v", ctx.Err() == nil, p.spent)
		}
	}
	open(true)
	p.pay(maxWaits - 1)
	open(true)
	now = now.Add(-time.Hour)
	open(true) // and is no emptier
	p.pay(-time.Hour)
	p.pay(1)
	open(false)
	now = now.Add(-time.Hour)
	open(false)
	now = now.Add(waitShare) // fills one nanosecond
	open(true)
	p.pay(1)
	open(false)
	now = now.Add(waitShare - 1)
	open(false)
}
