package reconcile

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Prefetch looks at the images of the node in the background: so that the resolver
// knows which of them are the same, and so that each is verified before a
// container is made from it. It looks at the list when containerd connects, when
// an image comes and under a new configuration, and then at one image after the
// other: those that came last first, then those of containers that run. Between
// that it sleeps until an answer ends or may be different. It holds no lock while
// it asks, and it decides nothing: the hook asks for itself.
type Prefetch struct {
	Images   Images          // required
	Node     Node            // nil: no image is awaited, and none goes before others
	Verifier verify.Verifier // nil: nothing is verified
	Log      *slog.Logger    // required

	// Marks note the images in hand, so that one that brings the process down does so
	// once and not at every start. Nil: nothing is noted.
	Marks *Marks

	// Refresher is told which images there are; nil is allowed.
	Refresher *Refresher

	// Scanned is called when all images were looked at (not verified) after a
	// connection or under a new configuration. It must not block; nil is allowed.
	Scanned func()

	// Listed is called with the digests of the manifests, indexes and configs of all
	// images of the node, each time that the list is looked at and is whole. It must not block,
	// and the map is its own; nil is allowed.
	Listed func(map[digest.Digest]bool)

	wakeOnce sync.Once
	wake     chan struct{} // asks for a scan
	again    atomic.Bool   // images that were denied are to be asked about again

	// Owned by Run.
	many     bool                                 // there are more images than are looked at
	overflow map[digest.Digest]containerd.Summary // of those, by target
	orders   map[string]int                       // how the configuration names records, if there are more; by name
	items    map[string]*item                     // by record name
	turn     int                                  // numbers the scans
	conns    uint64                               // Images.Connections when Scanned was last called
	revision verify.Revision                      // of the configuration that items are asked under
	slow     map[string]bool                      // owners of images whose verification took long and settled nothing

	trouble atomic.Pointer[string] // why the images are not known; see Trouble
}

// Images are those of the node, as far as they can be told from its records.
// [containerd.Resolver] implements it.
type Images interface {
	RecordBinder
	// Changed has a value when the images, or the options, may have changed.
	Changed() <-chan struct{}
	// Connections counts how often the gate connected to the runtime.
	Connections() uint64
	// Records returns the image records of the node. An error that wraps
	// [containerd.ErrTooMany] says that there are too many for one answer.
	Records(ctx context.Context) ([]containerd.Record, error)
	// Mark has images noted while they are read and no container waits for them.
	Mark(containerd.Marks)
	// Summary returns what is remembered of a target; Learn has it remembered.
	Summary(target ocispec.Descriptor) (s containerd.Summary, known bool)
	Learn(ctx context.Context, target ocispec.Descriptor)
	// Summarize reads what a target leads to without remembering it. It is not known if
	// the runtime did not answer.
	Summarize(ctx context.Context, target ocispec.Descriptor) (s containerd.Summary, known bool)
}

// A RecordBinder binds an image of which there is a record and no container yet.
type RecordBinder interface {
	Bind(ctx context.Context, name verify.Name, record containerd.Record) verify.Image
	// Options are those in force.
	Options() *containerd.Options
}

// A Node is the runtime whose images are prefetched. [containerd.Containerd] implements it.
type Node interface {
	// Watch calls changed when image records may have come or moved, and at once. It
	// returns when that is not known any more, with an error.
	Watch(ctx context.Context, changed func()) error
	// Running hands over the containers that run, pods' sandboxes included, one at a
	// time, until yield returns false.
	Running(ctx context.Context, yield func(containerd.Container) bool) error
}

// An item is an image record that a pod can name.
type item struct {
	name   verify.Name
	record containerd.Record
	turn   int       // of the look that saw it last
	rank   int       // which goes first
	order  int       // how the configuration names it
	asked  bool      // there is nothing to be done before due
	due    time.Time // when to ask again; zero: only under another configuration
	tries  int       // answers in a row that settled nothing
	no     bool      // the last answer was one
	skip   bool      // it was not asked about, since a process may have died of it
}

// In which order images are verified.
const (
	rankNew  = iota // it has just come: a container is likely to follow
	rankUsed        // a container runs from it
	rankRest
)

const (
	scanInterval  = time.Second           // shortest time between two scans
	scanRetry     = 15 * time.Second      // before the next scan if containerd did not answer
	scanRetryMany = 5 * time.Minute       // and if there are more images than it can answer with
	listTimeout   = 30 * time.Second      // longest that the list may take
	imagePause    = 10 * time.Millisecond // between two images: no hurry
	readTimeout   = 5 * time.Second       // longest that reading one image may take
	verifyTimeout = 2 * time.Minute       // longest that verifying one image may take
	slowAfter     = time.Second           // after which others go first if that settled nothing
	overflowBatch = 128                   // images beyond containerd.MaxImages that are read in one scan
	maxOverflow   = 16384                 // such images at most; a list of more is not whole

	// An answer that settled nothing is asked for again after a pause that grows from
	// minRetry to maxRetry, give or take a quarter.
	minRetry = time.Minute
	maxRetry = time.Hour

	minWatchRetry = 500 * time.Millisecond // before the first try to be told of images again
	maxWatchRetry = 30 * time.Second
)

// Run returns when ctx ends, with nil. It is called once.
func (s *Prefetch) Run(ctx context.Context) error {
	s.items, s.slow = map[string]*item{}, map[string]bool{}
	if s.Marks != nil {
		s.Images.Mark(s.Marks)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if s.Node != nil {
		wg.Go(func() { s.watch(ctx) })
	}
	var rest <-chan time.Time // until the list may be looked at again
	for {
		changed, wake := s.Images.Changed(), (<-chan struct{})(s.wakes())
		if rest != nil {
			changed, wake = nil, nil
		}
		scan := false
		next, due := s.next()
		timer := time.NewTimer(due)
		if next == nil {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-rest:
			rest = nil
		case <-changed:
			scan = true
		case <-wake:
			scan = true
		case <-timer.C:
			s.ask(ctx, next)
			if !pause(ctx, imagePause) {
				return nil
			}
		}
		timer.Stop()
		if scan {
			rest = time.After(s.rescan(ctx))
		}
	}
}

// rescan scans once for all that asked for it, and returns how long the next scan waits.
func (s *Prefetch) rescan(ctx context.Context) time.Duration {
	for _, asked := range []<-chan struct{}{s.Images.Changed(), s.wakes()} {
		select {
		case <-asked:
		default:
		}
	}
	err := s.scan(ctx)
	s.troubled(err)
	switch {
	case err == nil:
		return scanInterval
	case errors.Is(err, containerd.ErrTooMany):
		s.Wake()
		return scanRetryMany
	}
	s.Wake()
	return scanRetry
}

// Wake asks for a scan, now or when the one under way has ended.
func (s *Prefetch) Wake() {
	select {
	case s.wakes() <- struct{}{}:
	default:
	}
}

func (s *Prefetch) wakes() chan struct{} {
	s.wakeOnce.Do(func() { s.wake = make(chan struct{}, 1) })
	return s.wake
}

// Again has images that were denied verified again: there are signatures that were
// not there before. It may be called at any time.
func (s *Prefetch) Again() {
	s.again.Store(true)
	s.Wake()
}

// Judged is told that an image of that target was judged, be it for a container or for
// what runs. One that was skipped, since a process may have died of it, is looked at
// ahead of time again, and the next look logs that. It may be called at any time, by the
// hook too, and does not block.
func (s *Prefetch) Judged(target digest.Digest) {
	if s.Marks.Judged(target) {
		s.Wake()
	}
}

// Trouble returns why the images of the node are not known, or an empty text.
func (s *Prefetch) Trouble() string {
	if t := s.trouble.Load(); t != nil {
		return *t
	}
	return ""
}

// troubled notes that the list could not be had because it is too long, and logs it once.
// That containerd does not answer is seen elsewhere.
func (s *Prefetch) troubled(err error) {
	was := s.Trouble()
	switch {
	case err == nil:
		s.trouble.Store(nil)
	case errors.Is(err, containerd.ErrTooMany):
		text := text.Clean(err.Error(), verify.MaxMessage)
		if s.trouble.Store(&text); was == "" {
			s.Log.Error("the images of the node cannot be listed: none is verified ahead of time, and image volumes are refused", "error", text)
		}
	}
}

// watch has images that come looked at.
func (s *Prefetch) watch(ctx context.Context) {
	for wait := minWatchRetry; ; wait = min(2*wait, maxWatchRetry) {
		began := s.now()
		err := s.Node.Watch(ctx, s.Wake)
		if ctx.Err() != nil {
			return
		}
		if s.now().Sub(began) > maxWatchRetry {
			wait = minWatchRetry
		}
		s.Log.Debug("images that come are not told of", "error", err.Error(), "retry", wait.String())
		if !pause(ctx, wait/2+rand.N(wait/2)) {
			return
		}
	}
}

func (s *Prefetch) now() time.Time { return s.Images.Options().Now() }

// next returns the item to ask about next and how long that is to wait; nil where
// there is none.
func (s *Prefetch) next() (*item, time.Duration) {
	o := s.Images.Options()
	if s.Verifier == nil || o.Revision == (verify.Revision{}) {
		return nil, 0
	}
	now := o.Now()
	var best *item
	var wait time.Duration
	for _, i := range s.items {
		w := time.Duration(0)
		if i.asked {
			if i.due.IsZero() {
				continue
			}
			w = max(i.due.Sub(now), 0)
		}
		if best == nil || cmp.Or(cmp.Compare(w, wait), s.compare(i, best)) < 0 {
			best, wait = i, w
		}
	}
	return best, wait
}

// compare says which of two images goes first. A pod's author can bring any number of
// images, so those of hosts that the configuration names go before others, and an owner's
// that settle nothing wait for all else.
func (s *Prefetch) compare(a, b *item) int {
	last := func(i *item) (n int) {
		if i.order == byNothing {
			n++
		}
		if s.slow[owner(i.name)] {
			n += 2
		}
		return n
	}
	return cmp.Or(cmp.Compare(last(a), last(b)), cmp.Compare(a.rank, b.rank), cmp.Compare(a.order, b.order), cmp.Compare(a.record.Name, b.record.Name))
}

// owner is the host and the first part of the path.
func owner(n verify.Name) string {
	first, _, _ := strings.Cut(n.Path, "/")
	return n.Host + "/" + first
}

// ask has one image verified. Nothing is done with the answer here: who asks next
// finds it in the Verifier's memory.
func (s *Prefetch) ask(ctx context.Context, i *item) {
	if s.Marks.Skips(i.record.Target.Digest) {
		i.asked, i.due, i.skip = true, time.Time{}, true
		return
	}
	began := s.now()
	d, revision := s.verify(ctx, i)
	now := s.now()
	reason := d.EnforceReason()
	i.asked, i.due, i.no = true, time.Time{}, !reason.Allows()
	switch {
	case d.Revision != revision:
		// A configuration is being put in force.
		i.due = now.Add(scanInterval)
	case passing(reason):
		wait := min(minRetry<<min(i.tries, 10), maxRetry)
		i.due = now.Add(wait*3/4 + rand.N(wait/2))
		i.tries++
	case d.Allowed() && !d.Until.IsZero():
		i.tries = 0
		i.due = now.Add(max(d.Until.Sub(now.Round(0)), minRetry))
	}
	i.rank = rankRest
	if now.Sub(began) <= slowAfter {
		delete(s.slow, owner(i.name))
	} else if passing(reason) && len(s.slow) < containerd.MaxImages {
		s.slow[owner(i.name)] = true
	}
}

// verify asks about one image, and says under which configuration.
func (s *Prefetch) verify(ctx context.Context, i *item) (verify.Decision, verify.Revision) {
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	if _, known := s.Images.Summary(i.record.Target); !known {
		s.Images.Learn(ctx, i.record.Target)
	}
	img := s.Images.Bind(ctx, i.name, i.record)
	return s.Verifier.Verify(ctx, img), img.Revision // which marks it while it checks
}

// passing reports whether an answer with that reason may be different later although
// neither the image nor the configuration is.
func passing(r verify.Reason) bool {
	switch r {
	case verify.PolicyInvalid, verify.LimitExceeded:
		return false // what they need is another configuration
	}
	return r.Inconclusive()
}

// pause reports whether d went by before ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
