package node

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A Survey looks at the images of the node in the background: so that Resolve
// knows which of them are the same, and so that each is verified before a
// container is made from it. It looks at the list when containerd connects, when
// an image comes and under a new configuration, and then at one image after the
// other: those that came last first, then those of containers that run. Between
// that it sleeps until an answer ends or may be different. It holds no lock while
// it asks, and it decides nothing: the hook asks for itself.
type Survey struct {
	Resolver *Resolver       // required
	Node     Inventory       // nil: no image is awaited, and none goes before others
	Verifier verify.Verifier // nil: nothing is verified
	Log      *slog.Logger    // required

	// Dir is where the image in hand is noted, so that one that brings the process
	// down does so once and not at every start. It belongs on a file system that a
	// reboot empties. Empty: nothing is noted.
	Dir string

	// Refresher is told which images there are; nil is allowed.
	Refresher *Refresher

	// Looked is called when all images were looked at (not verified) after a
	// connection or under a new configuration. It must not block; nil is allowed.
	Looked func()

	// Listed is called with the digests of the manifests, indexes and configs of all
	// images of the node, each time that the list is looked at and is whole. It must not block,
	// and the map is its own; nil is allowed.
	Listed func(map[digest.Digest]bool)

	again atomic.Bool             // images that were denied are to be asked about again
	many  bool                    // there are more images than are looked at
	far   map[digest.Digest]trail // of those, by target
	items map[string]*item        // by record name
	turn  int                     // numbers the looks
	conns uint64                  // Resolver.connections when Looked was last called
	epoch verify.Epoch            // of the configuration that items are asked under
	mark  *inflight
}

// An Inventory is what a Survey asks of containerd besides Records.
type Inventory interface {
	// Watch calls changed when image records may have come or moved, and at once. It
	// returns when that is not known any more, with an error.
	Watch(ctx context.Context, changed func()) error
	// Running hands over the containers that run, pods' sandboxes included, one at a
	// time, until yield returns false.
	Running(ctx context.Context, yield func(Container) bool) error
}

// An item is an image record that a pod can name.
type item struct {
	name   verify.Name
	record Record
	turn   int       // of the look that saw it last
	rank   int       // which goes first
	asked  bool      // there is nothing to be done before due
	due    time.Time // when to ask again; zero: only under another configuration
	tries  int       // answers in a row that settled nothing
	no     bool      // the last answer was one
}

// A trail is what a Survey keeps of an image that it does not look at: the digests of
// the manifest and the config that the target leads to. Empty: it cannot be judged.
type trail struct{ manifest, config digest.Digest }

// In which order images are verified.
const (
	rankNew  = iota // it has just come: a container is likely to follow
	rankUsed        // a container runs from it
	rankRest
)

const (
	surveyEvery = time.Second           // shortest time between two looks at the list
	surveyAgain = 15 * time.Second      // before the next look where containerd did not answer
	surveyList  = 30 * time.Second      // longest that the list may take
	surveyPause = 10 * time.Millisecond // between two images: no hurry
	surveyImage = 5 * time.Second       // longest that reading one image may take
	surveyFar   = 128                   // images beyond maxLeads that are read in one look
	maxFar      = 16384                 // such images at most; a list of more is not whole
	aheadImage  = 2 * time.Minute       // longest that verifying one image may take

	// An answer that settled nothing is asked for again after a pause that grows from
	// retryFirst to retryLast, give or take a quarter.
	retryFirst = time.Minute
	retryLast  = time.Hour

	watchFirst = 500 * time.Millisecond // before the first try to be told of images again
	watchLast  = 30 * time.Second
)

// Run returns when ctx ends, with nil. It is called once.
func (s *Survey) Run(ctx context.Context) error {
	s.items = map[string]*item{}
	s.mark = openInflight(s.Dir, s.Log)
	var wg sync.WaitGroup
	defer wg.Wait()
	if s.Node != nil {
		wg.Go(func() { s.watch(ctx) })
	}
	var rest <-chan time.Time // until the list may be looked at again
	for {
		wake := s.Resolver.wake
		if rest != nil {
			wake = nil
		}
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
		case <-wake:
			if s.look(ctx) {
				rest = time.After(surveyEvery)
			} else {
				s.Resolver.look()
				rest = time.After(surveyAgain)
			}
		case <-timer.C:
			s.ask(ctx, next)
			if !pause(ctx, surveyPause) {
				return nil
			}
		}
		timer.Stop()
	}
}

// Again has images that were denied verified again: there are signatures that were
// not there before. It may be called at any time.
func (s *Survey) Again() {
	s.again.Store(true)
	s.Resolver.look()
}

// watch has images that come looked at.
func (s *Survey) watch(ctx context.Context) {
	for wait := watchFirst; ; wait = min(2*wait, watchLast) {
		began := s.now()
		err := s.Node.Watch(ctx, s.Resolver.look)
		if ctx.Err() != nil {
			return
		}
		if s.now().Sub(began) > watchLast {
			wait = watchFirst
		}
		s.Log.Debug("images that come are not told of", "error", err.Error(), "retry", wait.String())
		if !pause(ctx, wait/2+rand.N(wait/2)) {
			return
		}
	}
}

func (s *Survey) now() time.Time { return s.Resolver.options.Load().Now() }

// look brings items up to date with the node's image records. It reports whether
// containerd said what they are.
func (s *Survey) look(ctx context.Context) bool {
	r := s.Resolver
	conns, o := r.connections.Load(), r.options.Load()
	list, cancel := context.WithTimeout(ctx, surveyList)
	defer cancel()
	records, err := r.records.Images(list)
	if err != nil {
		return false
	}
	records, far := nearest(records)
	if many := len(far) > 0; many != s.many {
		if s.many = many; many {
			s.Log.Warn("the node has more images than are looked at ahead of time", "looked at", maxLeads, "others", len(far))
		}
	}
	for _, record := range records {
		// Those that are looked at are not to be forgotten for those that are not.
		if _, known := r.leads.Get(plain(record.Target)); known || s.mark.skips(record.Target.Digest) {
			continue
		}
		s.learn(ctx, record.Target)
		if !pause(ctx, surveyPause) {
			return true
		}
	}
	if s.Listed != nil && s.trails(ctx, far) {
		live := map[digest.Digest]bool{}
		for target, t := range s.far {
			live[target] = true
			if t != (trail{}) {
				live[t.manifest], live[t.config] = true, true
			}
		}
		for _, record := range records {
			live[record.Target.Digest] = true
			if l, known := r.leads.Peek(plain(record.Target)); known && l.fault == nil {
				live[l.manifest.Digest], live[l.config] = true, true
			}
		}
		s.Listed(live)
	}
	afresh := conns != s.conns || o.Epoch != s.epoch
	var used map[string]bool
	if afresh {
		used = s.used(ctx, o)
	}
	s.turn++
	again := s.again.Swap(false)
	for _, record := range records {
		s.update(o, record, used)
	}
	for name, i := range s.items {
		if i.turn != s.turn {
			delete(s.items, name)
		} else if o.Epoch != s.epoch || again && i.no {
			i.asked, i.tries = false, 0
		}
	}
	if s.Refresher != nil {
		s.Refresher.has(s.items, s.mark.skips)
	}
	s.conns, s.epoch = conns, o.Epoch
	if afresh && conns > 0 && s.Looked != nil {
		s.Looked()
	}
	return true
}

// nearest returns the records of the images that are looked at, which are as many as a
// Resolver remembers the leads of, and the targets of the others.
func nearest(records []Record) (near []Record, far []ocispec.Descriptor) {
	first, others := map[verify.Target]bool{}, map[verify.Target]bool{}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Name, b.Name) }) // the same each time
	for _, r := range records {
		t := plain(r.Target)
		if !first[t] && len(first) == maxLeads {
			if !others[t] {
				others[t], far = true, append(far, r.Target)
			}
			continue
		}
		first[t] = true
		near = append(near, r)
	}
	return near, far
}

// trails reads where the targets in far lead to, some of them each time, and forgets
// others. It reports whether all are known.
func (s *Survey) trails(ctx context.Context, far []ocispec.Descriptor) bool {
	if len(far) > maxFar {
		return false
	}
	known := make(map[digest.Digest]trail, len(far))
	left, whole := surveyFar, true
	for _, target := range far {
		if t, is := s.far[target.Digest]; is {
			known[target.Digest] = t
			continue
		}
		if left--; left < 0 || ctx.Err() != nil {
			whole = false
			continue
		}
		t := trail{}
		if !s.mark.skips(target.Digest) {
			image, cancel := context.WithTimeout(ctx, surveyImage)
			s.mark.begin(target.Digest)
			l, err := read(image, s.Resolver.records.Blob, target)
			s.mark.end()
			cancel()
			t = trail{l.manifest.Digest, l.config}
			if f := (*verify.Fault)(nil); err != nil && !errors.As(err, &f) && !errors.Is(err, ErrNotFound) {
				whole = false // containerd did not say; the next look asks again
				continue
			}
			pause(ctx, surveyPause)
		}
		known[target.Digest] = t
	}
	s.far = known
	if left < 0 {
		s.Resolver.look()
	}
	return whole
}

func (s *Survey) learn(ctx context.Context, target ocispec.Descriptor) {
	ctx, cancel := context.WithTimeout(ctx, surveyImage)
	defer cancel()
	s.mark.begin(target.Digest)
	_, _ = s.Resolver.learn(ctx, target)
	s.mark.end()
}

// used returns the records that containers which run were made from.
func (s *Survey) used(ctx context.Context, o *Options) map[string]bool {
	names := map[string]bool{}
	if s.Node == nil {
		return names
	}
	ctx, cancel := context.WithTimeout(ctx, surveyList)
	defer cancel()
	// What cannot be listed has its turn later.
	_ = s.Node.Running(ctx, func(c Container) bool {
		if name, err := o.ParseRecord(c.Image); err == nil {
			names[name] = true
		}
		return len(names) < maxLeads
	})
	return names
}

// update notes what record points to. One that no pod can name is none to verify.
func (s *Survey) update(o *Options, record Record, used map[string]bool) {
	i := s.items[record.Name]
	if i != nil && plain(i.record.Target) == plain(record.Target) {
		i.turn = s.turn
	} else {
		name, can := o.nameable(record.Name)
		if !can {
			return
		}
		i = &item{name: name, record: record, turn: s.turn, rank: rankNew}
		if s.turn == 1 {
			i.rank = rankRest
		}
		s.items[record.Name] = i
	}
	if used[record.Name] && i.rank == rankRest {
		i.rank = rankUsed
	}
}

// next returns the item to ask about next and how long that is to wait; nil where
// there is none.
func (s *Survey) next() (*item, time.Duration) {
	o := s.Resolver.options.Load()
	if s.Verifier == nil || o.Epoch == (verify.Epoch{}) {
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
		if best == nil || cmp.Or(cmp.Compare(w, wait), cmp.Compare(i.rank, best.rank), cmp.Compare(i.record.Name, best.record.Name)) < 0 {
			best, wait = i, w
		}
	}
	return best, wait
}

// ask has one image verified. Nothing is done with the answer here: who asks next
// finds it in the Verifier's memory.
func (s *Survey) ask(ctx context.Context, i *item) {
	if s.mark.skips(i.record.Target.Digest) {
		i.asked, i.due = true, time.Time{}
		return
	}
	s.mark.begin(i.record.Target.Digest)
	d, epoch := s.verify(ctx, i)
	s.mark.end()
	now := s.now()
	reason := d.Reason
	if reason == verify.AuditOnly {
		reason = d.Would
	}
	i.asked, i.due, i.no = true, time.Time{}, reason != verify.Verified && reason != verify.AllowedByDigest
	switch {
	case d.Epoch != epoch:
		// A configuration is being put in force.
		i.due = now.Add(surveyEvery)
	case passing(reason):
		wait := min(retryFirst<<min(i.tries, 10), retryLast)
		i.due = now.Add(wait*3/4 + rand.N(wait/2))
		i.tries++
	case d.Allowed() && !d.Until.IsZero():
		i.tries = 0
		i.due = now.Add(max(d.Until.Sub(now.Round(0)), retryFirst))
	}
	i.rank = rankRest
}

// verify asks about one image, and says under which configuration.
func (s *Survey) verify(ctx context.Context, i *item) (verify.Decision, verify.Epoch) {
	ctx, cancel := context.WithTimeout(ctx, aheadImage)
	defer cancel()
	img := s.Resolver.ahead(ctx, i.name, i.record)
	return s.Verifier.Verify(ctx, img), img.Epoch
}

// passing reports whether an answer with that reason may be different later although
// neither the image nor the configuration is.
func passing(r verify.Reason) bool {
	switch r {
	case verify.PolicyInvalid, verify.BudgetExceeded:
		return false // what they need is another configuration
	}
	return r.Transient()
}

// ahead binds an image of which there is a record, and no container yet.
func (r *Resolver) ahead(ctx context.Context, name verify.Name, record Record) verify.Image {
	o := r.options.Load()
	img := verify.Image{Name: name, Asked: record.Name, Use: verify.UseAhead, Binding: verify.BoundRecord, Epoch: o.Epoch}
	if err := r.lead(ctx, record.Target, &img); err != nil {
		img.Fault = faultOf(err)
		return img
	}
	// On a snapshotter that is trusted only because the configuration says so none
	// but the target counts. Which one a container will have is not known yet.
	if len(o.Snapshotters) == 0 {
		img.Vouched = true
		img.Others = r.kin.of(img.Config, img.Target.Digest, img.Manifest.Digest)
	}
	return img
}

// lead sets what target leads to. A digest in the image's name must be there.
func (r *Resolver) lead(ctx context.Context, target ocispec.Descriptor, img *verify.Image) error {
	c, err := r.follow(ctx, target)
	if err != nil {
		return err
	}
	img.Target, img.Manifest, img.Config = target, c.manifest, c.config
	if d := img.Name.Digest; d != "" && d != target.Digest && d != c.manifest.Digest {
		return &verify.Fault{Reason: verify.ImageMismatch, Detail: "the record points to " + target.Digest.String() + ", another image than the digest in its name"}
	}
	return nil
}

// faultOf is err as a Fault: what containerd could not say leaves an image
// unresolved.
func faultOf(err error) *verify.Fault {
	var f *verify.Fault
	if !errors.As(err, &f) {
		f = &verify.Fault{Reason: verify.ImageUnresolved, Detail: verify.Clean(err.Error(), verify.MaxMessage)}
	}
	return f
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

// Listed hands over the images of the node that a pod can name, in the order of their
// names and bound as a Survey asks about them, until yield returns false. It reads
// nothing that the Survey has not read: what that has not come to yet is PENDING.
func (r *Resolver) Listed(ctx context.Context, yield func(verify.Image) bool) error {
	o := r.options.Load()
	records, err := r.records.Images(ctx)
	if err != nil {
		return err
	}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Name, b.Name) })
	for _, record := range records {
		name, can := o.nameable(record.Name)
		if !can {
			continue
		}
		img := verify.Image{Name: name, Asked: record.Name, Use: verify.UseAhead, Binding: verify.BoundRecord, Epoch: o.Epoch, Target: record.Target}
		if _, read := r.leads.Peek(plain(record.Target)); read {
			img = r.ahead(ctx, name, record)
		} else {
			img.Fault = &verify.Fault{Reason: verify.Pending, Detail: "the gate has not looked at the image yet, or not again since it died while it did; tidewaiter explain has it look"}
		}
		if !yield(img) {
			return nil
		}
	}
	return nil
}

// Read binds an image that Listed handed over and the Survey has not come to, or does
// not come to since an earlier process died over it.
func (r *Resolver) Read(ctx context.Context, img verify.Image) verify.Image {
	return r.ahead(ctx, img.Name, Record{Name: img.Asked, Target: img.Target})
}

// nameable returns the name of a record, where a pod can name it. The record of an
// image ID is none: CRI looks for the name that ParseRecord returns.
func (o *Options) nameable(record string) (verify.Name, bool) {
	name, err := o.ParseName(record)
	if err != nil {
		return verify.Name{}, false
	}
	asked, err := o.ParseRecord(record)
	return name, err == nil && asked == record
}
