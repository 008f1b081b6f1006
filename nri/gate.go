// Package nri is the gate: it answers containerd, through the Node Resource
// Interface, whether a container may be created.
//
// The gate decides in ValidateContainerAdjustment. Of NRI's hooks that one alone
// stays closed: when a validating plugin hangs, dies or loses its connection,
// the runtime refuses the container, and while the plugin is absent the default
// validator does (required_plugins). In CreateContainer the runtime would go on
// without the plugin (containerd/nri issue 316).
//
// A node that only audits asks in CreateContainer for that very reason: nothing
// depends on the gate there.
//
// On containerd 2.2 and 2.3, which do not say which image config they run,
// StartContainer compares the config of the created container with what was
// allowed, or judges a container that was allowed by another run of the gate. It
// answers from memory only; a hang there is let through by the runtime.
package nri

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A Resolver says which images a container would run. It answers from the
// runtime's own records under ctx and asks no network.
type Resolver interface {
	// Resolve never returns an empty list; all images in it must be allowed.
	Resolve(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image
	// Known is Resolve from memory alone, for the caller's own goroutine: it waits
	// for nothing and nobody. It returns false where that is not enough.
	Known(pod *api.PodSandbox, ctr *api.Container) ([]verify.Image, bool)
	// Decided remembers the images for which a container was allowed.
	Decided(id string, images []verify.Image)
	// Started compares a created container with what was decided, and returns no
	// image where they agree. Of a container of which nothing was decided here it
	// returns the images that it runs; all of them must be allowed.
	Started(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image
	// Connected is called on each connection, before any question of it, and says
	// whether Started will be asked.
	Connected(compares bool)
}

// A Tally keeps those pods and containers away that would together be too long for the
// runtime to tell a gate of when it registers. [node.Tally] implements it. Lengths are
// those of the runtime's request, in bytes. Its methods wait for nothing.
type Tally interface {
	// Refuses says why a container must not be created; nil lets it be.
	Refuses(pod string, podBytes int, container string, bytes int) *verify.Fault
	// Allowed counts a pod that was allowed or, with a name, a container and its pod.
	Allowed(pod string, podBytes int, container string, bytes int)
}

// An Answer is what the gate told the runtime about one image of a container.
type Answer struct {
	ID       string // of the container
	Image    verify.Image
	Decision verify.Decision
	Took     time.Duration // from the request to this decision
	Hook     string        // ValidateContainerAdjustment, CreateContainer, StartContainer or RunPodSandbox
}

// A Gate decides container creations. Its answer to anything unforeseen is a
// denial. All fields but Tally are required. It is safe for concurrent use.
type Gate struct {
	Resolver Resolver
	Verifier verify.Verifier
	Tally    Tally        // nil: nothing is counted
	Observe  func(Answer) // log and metrics; must not block
	Now      func() time.Time
	Node     string // name of this node in messages

	waits waitBudget
	stuck atomic.Int64
}

const (
	// margin is kept free before the runtime's own deadline: an answer on the last
	// millisecond would race with the runtime's timeout, which drops the plugin.
	margin = 300 * time.Millisecond
	// budget bounds an answer where the runtime gives no deadline or a long one.
	budget = 1500 * time.Millisecond
	// maxStuck bounds the questions that are still being looked into although they
	// were answered: containerd may hang for ever, and is asked again all the time.
	maxStuck = 64
)

// Stuck counts the questions that nobody waits for any more and that do not end.
// From 64 on every new one that would have to wait is answered OVERLOADED.
func (g *Gate) Stuck() int { return int(g.stuck.Load()) }

// ValidateContainerAdjustment is the hook. Nil lets the container be created.
func (g *Gate) ValidateContainerAdjustment(ctx context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	return g.create(ctx, req.GetPod(), req.GetContainer(), "ValidateContainerAdjustment")
}

// CreateContainer is the hook in audit, where a runtime goes on without a plugin
// that fails. Nil lets the container be created. Without decides nothing is decided
// here: the node does not audit any more, and the connection is about to be made anew,
// with a hook that stays closed.
func (g *Gate) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container, decides bool) error {
	const hook = "CreateContainer"
	if !decides {
		return g.verify(ctx, about(pod, ctr, hook), g.Now(), fault(about(pod, ctr, hook), verify.Pending, "the node enforces now, and the gate registers anew; the next try answers"))
	}
	return g.create(ctx, pod, ctr, hook)
}

// RunPodSandbox is the hook in which a pod is refused that is too long for the runtime
// to tell a gate of, before it is there. Nil lets it be. A hang, or an absent gate, the
// runtime lets through: [Session.Large] finds what came so.
func (g *Gate) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	n := lengthsOf(ctx)
	if why := n.tooLong(); why != "" {
		ask := about(pod, nil, "RunPodSandbox")
		ask.asked = "(pod)"
		if err := g.verify(ctx, ask, g.Now(), fault(ask, verify.PodTooLarge, why)); err != nil {
			return err
		}
	}
	g.count(pod, nil, n)
	return nil
}

// count counts what was allowed.
func (g *Gate) count(pod *api.PodSandbox, ctr *api.Container, n lengths) {
	if g.Tally != nil {
		g.Tally.Allowed(pod.GetId(), n.pod, ctr.GetName(), n.container)
	}
}

// unfit says why a container must not be created whatever its image is.
func (g *Gate) unfit(pod *api.PodSandbox, ctr *api.Container, n lengths) *verify.Fault {
	if why := n.tooLong(); why != "" {
		return &verify.Fault{Reason: verify.PodTooLarge, Detail: why}
	}
	if g.Tally == nil {
		return nil
	}
	return g.Tally.Refuses(pod.GetId(), n.pod, ctr.GetName(), n.container)
}

func (g *Gate) create(ctx context.Context, pod *api.PodSandbox, ctr *api.Container, hook string) error {
	ask := about(pod, ctr, hook)
	n := lengthsOf(ctx)
	if f := g.unfit(pod, ctr, n); f != nil {
		err := g.verify(ctx, ask, g.Now(), fault(ask, f.Reason, f.Detail))
		if err == nil { // as in audit
			g.count(pod, ctr, n)
		}
		return err
	}
	if known, err := g.known(pod, ctr, ask); known {
		if err == nil {
			g.count(pod, ctr, n)
		}
		return err
	}
	return g.answer(ctx, ask, func(ctx context.Context) []verify.Image {
		return g.Resolver.Resolve(ctx, pod, ctr)
	}, func(images []verify.Image) {
		g.Resolver.Decided(ctr.GetId(), images)
		g.count(pod, ctr, n)
	})
}

// known answers where nothing has to be waited for, neither containerd nor a
// verification. Nearly all questions are such, and the goroutine and the timers
// of answer are most of what they would cost. Whatever is out of the ordinary, a
// panic included, is left to answer, which begins anew.
func (g *Gate) known(pod *api.PodSandbox, ctr *api.Container, ask question) (known bool, err error) {
	defer func() {
		if recover() != nil {
			known, err = false, nil
		}
	}()
	start := g.Now()
	images, ok := g.Resolver.Known(pod, ctr)
	if !ok || len(images) != 1 {
		return false, nil
	}
	d := g.Verifier.Verify(atOnce, images[0])
	if !d.Allowed() && d.Reason.Inconclusive() {
		return false, nil
	}
	if err := g.tell(ask, start, images[0], d); err != nil {
		return true, err
	}
	g.Resolver.Decided(ctr.GetId(), images)
	return true, nil
}

// atOnce has ended: a Verifier answers what it knows and waits for nothing.
var atOnce = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// StartContainer compares what was created with what was allowed, on runtimes
// that say it only now. Nil lets the container start. A refusal here is final for
// a pod that is not restarted, so that it is never PENDING.
//
// Another gate may have allowed the creation, during an upgrade or before a
// restart. Then this one decides anew, from what it knows already.
func (g *Gate) StartContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	ask := about(pod, ctr, "StartContainer")
	ask.late, ask.atOnce = verify.ImageUnresolved, true
	return g.answer(ctx, ask, func(ctx context.Context) []verify.Image {
		return g.Resolver.Started(ctx, pod, ctr) // none: the creation was decided
	}, nil)
}

// A question is one call of the runtime.
type question struct {
	id     string // of the container
	pod    verify.Pod
	asked  string // what the pod wrote as its image, for messages
	hook   string
	late   verify.Reason // what it is called when there is no answer in time
	atOnce bool          // a verification is not waited for: what is not known is late
	over   func() bool   // whether another answer was given meanwhile; nil: none is
}

func (q question) answered() bool { return q.over != nil && q.over() }

// imageName is the annotation in which containerd's CRI plugin says what the pod
// wrote as its image.
const imageName = "io.kubernetes.cri.image-name"

func about(pod *api.PodSandbox, ctr *api.Container, hook string) question {
	return question{
		id:    ctr.GetId(),
		pod:   verify.Pod{Namespace: pod.GetNamespace(), Name: pod.GetName(), UID: pod.GetUid(), Container: ctr.GetName()},
		asked: ctr.GetAnnotations()[imageName],
		hook:  hook,
		late:  verify.Pending,
	}
}

// answer has images found and verified within the gate's own budget. Whatever
// goes wrong on the way, a panic or a hang included, is verified as an image
// with a fault, so that every answer takes the same path, audit included.
func (g *Gate) answer(ctx context.Context, ask question, find func(context.Context) []verify.Image, allowed func([]verify.Image)) error {
	start := g.Now()
	ctx, cancel := context.WithTimeout(ctx, g.budget(ctx, start))
	defer cancel()

	if n := g.stuck.Load(); n >= maxStuck {
		return g.verify(ctx, ask, start, fault(ask, verify.Overloaded, fmt.Sprintf("%d earlier questions have no end: containerd does not answer the gate", n)))
	}
	done := make(chan error, 1)
	var left atomic.Bool // by whoever is first: the one who waits, or the work that is done
	work := ask
	work.over = left.Load
	go func() {
		done <- g.decide(ctx, work, start, find, allowed)
		if left.Swap(true) {
			g.stuck.Add(-1)
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// Both may be ready; an answer that was reached counts.
	select {
	case err := <-done:
		return err
	default:
		if !left.Swap(true) {
			g.stuck.Add(1)
		}
		return g.verify(ctx, ask, start, fault(ask, ask.late, "no answer was found within the gate's own time; the next try may find it"))
	}
}

func (g *Gate) decide(ctx context.Context, ask question, start time.Time, find func(context.Context) []verify.Image, allowed func([]verify.Image)) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = g.verify(ctx, ask, start, fault(ask, verify.Internal, fmt.Sprintf("panic in the gate: %v", p)))
		}
	}()
	images := find(ctx)
	if len(images) == 0 && allowed != nil {
		images = []verify.Image{fault(ask, verify.Internal, "no image was found for the container")}
	}
	for _, img := range images {
		if err := g.verify(ctx, ask, start, img); err != nil {
			return err
		}
	}
	if allowed != nil && !ask.answered() {
		allowed(images)
	}
	return nil
}

// verify asks for one decision and tells it.
func (g *Gate) verify(ctx context.Context, ask question, start time.Time, img verify.Image) error {
	before := g.Now()
	if ask.atOnce {
		d := g.Verifier.Verify(atOnce, img)
		if r := d.EnforceReason(); r.Inconclusive() {
			img = fault(ask, ask.late, "another run of the gate allowed the container, and what this one knows of its image is "+r.String()+"; create it anew")
			d = g.Verifier.Verify(atOnce, img)
		}
		return g.tell(ask, start, img, d)
	}
	d := g.Verifier.Verify(g.waits.open(ctx, before), img)
	g.waits.pay(g.Now().Sub(before))
	return g.tell(ask, start, img, d)
}

// tell has a decision observed, and renders a denial. What is found out after the
// runtime got another answer is not told: it is none.
func (g *Gate) tell(ask question, start time.Time, img verify.Image, d verify.Decision) error {
	if ask.answered() {
		return errors.New("another answer was given")
	}
	g.Observe(Answer{ID: ask.id, Image: img, Decision: d, Took: g.Now().Sub(start), Hook: ask.hook})
	if !d.Allowed() {
		return errors.New(d.Message(img, g.Node))
	}
	return nil
}

func fault(ask question, r verify.Reason, detail string) verify.Image {
	return verify.Image{Asked: ask.asked, Pod: ask.pod, Use: verify.UseContainer, Fault: &verify.Fault{Reason: r, Detail: detail}}
}

// budget is how long an answer may take: well inside the runtime's deadline.
func (g *Gate) budget(ctx context.Context, now time.Time) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return budget
	}
	left := deadline.Sub(now)
	return max(min(budget, left-min(margin, left/4)), 0)
}

// The runtime handles one container event of the node at a time, so that each
// wait for a verification is one of all pods. Without a bound on their sum the
// pods of one author, whose registry never answers, would stop the node.
const (
	waitShare = 20          // waits take one part in so many of wall time
	maxWaits  = time.Second // and at most this much at once, after a quiet time
)

// A waitBudget is the time that answers may spend on waiting. Its zero value is full.
// A rate.Limiter does not fit: it takes a price before, and what a wait costs is known only
// after it, when it may be more than there was.
// It is safe for concurrent use.
type waitBudget struct {
	mu    sync.Mutex
	at    time.Time     // when it was last filled
	spent time.Duration // what is missing; may be more than maxWaits
}

// open returns ctx, or where the budget is empty a context that has ended: what is
// known is answered all the same, and what is not goes on without anybody waiting.
func (p *waitBudget) open(ctx context.Context, now time.Time) context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := now.Sub(p.at); d > 0 {
		p.spent = max(p.spent-d/waitShare, 0)
	}
	p.at = now
	if p.spent < maxWaits {
		return ctx
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

// pay takes d out of the budget.
func (p *waitBudget) pay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spent += max(d, 0)
}
