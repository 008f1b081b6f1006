package node

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A Refresher asks for the signatures of the images that are on the node again, so
// that those which came after an image was verified are kept too: without them a
// root of trust could not be replaced on a node that loses its network.
//
// Each image has its time within the period, drawn at random when the process
// starts: many images, and many nodes that got their power back at the same moment,
// do not ask at once, and a node that is never up for a whole period still comes to
// all of its images in the end. Where another configuration asks something else of
// an image, that image has its turn soon. One image is asked about at a time, and
// what that asks of a mirror is at the pace of all that nobody waits for.
//
// It decides nothing and deletes nothing. A source that does not answer costs one
// attempt, and the next is later. Methods are safe for concurrent use.
type Refresher struct {
	resolver *Resolver
	log      *slog.Logger
	uptime   func() time.Duration
	seed     uint64
	noted    *requirements
	wake     chan struct{}
	turn     chan struct{} // holds one: whoever asks

	mu        sync.Mutex
	plan      *RefreshPlan
	retire    func()             // ends what is asked under plan
	retired   context.Context    // ended by it
	images    map[copied]*copies // nil: not known yet
	commanded bool               // Refresh is under way
	assessed  bool               // it is known what is asked of the images that were there at the start
	status    RefreshStatus
}

// A RefreshPlan is what a configuration says about refreshing. It does not change.
type RefreshPlan struct {
	Setup   *verify.Setup
	Sources func(verify.Name) []verify.Source // an image that has none is not asked about
	Every   time.Duration                     // period; 0: only on demand

	// Ask asks all sources for all signatures of an image, keeps those that meet the
	// rule, and returns how many of these are new. Like verify.Engine.Refresh it does
	// not panic.
	Ask func(context.Context, verify.Question) (fresh int, tried []verify.Attempt)
}

const (
	// After another configuration, images are asked about within this part of the
	// period, and within refreshSoon at most.
	refreshPart = 144
	refreshSoon = 10 * time.Minute

	// refreshAgain is how long after a failure an image is asked about again; each
	// failure in a row doubles it, up to the period.
	refreshAgain = 10 * time.Minute

	maxCopies = 64 // names remembered of what one repository has
)

// copied is what signatures are asked for: content, and where it came from.
type copied struct {
	repository string
	target     verify.Target
}

// copies are the image records of one repository that point to one target.
type copies struct {
	names  []verify.Name
	record Record // one of them
	draw   uint64 // where in the period it has its time
	unsafe bool   // not to be looked at unless it is asked for by its name

	plan        *RefreshPlan // under which the following was found out; nil: not yet
	requirement [32]byte     // zero: nothing is to be asked
	due         time.Duration
	soon        bool // due since it is asked for something else
	failures    int  // in a row
}

// A Refreshed is what became of one image.
type Refreshed struct {
	Name    verify.Name
	Target  digest.Digest
	Fresh   int              // signatures that meet the rule and were not kept before
	Tried   []verify.Attempt // what each source said
	Skipped *verify.Fault    // why none was asked
}

// Failed returns what the first source said that could not be asked, or nil.
func (r *Refreshed) Failed() *verify.Attempt {
	for i, a := range r.Tried {
		switch a.Reason {
		case verify.SourceUnreachable, verify.SourceUnauthorized, verify.SourceNoReferrers,
			verify.BudgetExceeded, verify.Pending, verify.Internal:
			return &r.Tried[i]
		}
	}
	return nil
}

// A RefreshStatus are a Refresher's figures. Those of uint64 only grow.
type RefreshStatus struct {
	Every   time.Duration // 0: only on demand
	Images  int           // that are asked about
	Failing int           // of these, those for which a source failed at the last try
	Asked   uint64        // images, each time that their sources were asked
	Failed  uint64        // of these, those times that a source failed
	Fresh   uint64        // signatures that were new
	Last    time.Time     // when an image was last asked about; zero: not yet
	Next    time.Time     // when the next will be, to the second; zero: not planned
	Error   string        // of the last failure, if there are images that fail
}

// Why Refresh did nothing.
var (
	ErrRefreshing = errors.New("another refresh was asked for and is under way")
	ErrNotLooked  = errors.New("the images of the node are not known yet, or no configuration is in force")
	ErrNoImage    = errors.New("no image of the node has this name")
)

// NewRefresher makes a Refresher, which does nothing until it is configured and runs.
// uptime is a clock that nobody can set, seed what the images' times are drawn from.
// In dir it notes what it asks for, so that a gate that starts again finds out what is
// new in its configuration; it belongs on a file system that a reboot empties, and where
// it is empty nothing is noted.
func NewRefresher(r *Resolver, log *slog.Logger, uptime func() time.Duration, seed uint64, dir string) *Refresher {
	return &Refresher{resolver: r, log: log, uptime: uptime, seed: seed, noted: &requirements{dir: dir}, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1), retire: func() {}}
}

// Configure puts a plan in force. What is being asked under the one before ends.
func (r *Refresher) Configure(p *RefreshPlan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retire()
	r.plan, r.status.Every = p, p.Every
	r.retired, r.retire = context.WithCancel(context.Background())
	r.ring()
}

func (r *Refresher) ring() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// has says which images the node has, as the survey sees them, and which of them
// are not to be looked at: a process may have died of it. Who names one wants that.
func (r *Refresher) has(items map[string]*item, skips func(digest.Digest) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	images := map[copied]*copies{}
	for _, i := range items {
		key := copied{i.name.Repository(), plain(i.record.Target)}
		c := images[key]
		if c == nil {
			c = &copies{record: i.record, draw: r.draw(key), unsafe: skips(i.record.Target.Digest)}
			if old := r.images[key]; old != nil {
				*c = *old
				c.names = nil
			}
			images[key] = c
		}
		if len(c.names) < maxCopies {
			c.names = append(c.names, i.name)
		}
	}
	for _, c := range images {
		slices.SortFunc(c.names, func(a, b verify.Name) int {
			return cmp.Or(cmp.Compare(untagged(a), untagged(b)), cmp.Compare(a.Tag, b.Tag), cmp.Compare(a.Digest, b.Digest))
		})
	}
	r.images = images
	r.ring()
}

// untagged sorts names that a person would say before others.
func untagged(n verify.Name) int {
	if n.Tag == "" {
		return 1
	}
	return 0
}

func (r *Refresher) draw(c copied) uint64 {
	h := sha256.New()
	_ = binary.Write(h, binary.BigEndian, r.seed)
	fmt.Fprintf(h, "%s\n%s", c.target.Digest, c.repository)
	return binary.BigEndian.Uint64(h.Sum(nil))
}

// Run asks about images when their time has come. It returns when ctx ends, with nil.
func (r *Refresher) Run(ctx context.Context) error {
	r.noted.read()
	for {
		r.assess(ctx)
		if err := r.noted.write(r.settled()); err != nil {
			r.log.Debug("what is asked of images cannot be noted", "error", err.Error())
		}
		key, wait := r.next()
		timer := time.NewTimer(wait)
		if key == (copied{}) {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
		case <-r.wake:
		case <-timer.C:
			r.due(ctx)
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// due asks about the image whose time has come, when it is its turn.
func (r *Refresher) due(ctx context.Context) {
	select {
	case r.turn <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-r.turn }()
	// It may have been asked for meanwhile.
	if key, wait := r.next(); key != (copied{}) && wait == 0 {
		r.refresh(ctx, key)
		pause(ctx, surveyPause)
	}
}

// assess finds out what the plan in force asks of images that it was not asked
// about yet, and gives each its time.
func (r *Refresher) assess(ctx context.Context) {
	r.mu.Lock()
	p := r.plan
	todo := map[copied]copies{}
	for key, c := range r.images {
		if p != nil && c.plan != p && !c.unsafe {
			todo[key] = *c
		}
	}
	r.mu.Unlock()
	for key, c := range todo {
		q, skip := r.question(ctx, p, c)
		if skip != nil && skip.Reason == verify.ImageUnresolved {
			continue // containerd did not say; the survey asks again, and tells
		}
		r.mu.Lock()
		if c := r.images[key]; c != nil && r.plan == p {
			r.schedule(c, p, q)
		}
		r.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p != nil && r.images != nil {
		r.assessed = true
	}
	r.count()
}

// settled returns what is asked of images, without that which is to be asked for
// soon; nil: it is not known.
func (r *Refresher) settled() map[[32]byte]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.assessed {
		return nil
	}
	list := map[[32]byte]bool{}
	for _, c := range r.images {
		list[c.requirement] = true
	}
	for _, c := range r.images {
		if c.soon || c.plan != r.plan {
			delete(list, c.requirement)
		}
	}
	return list
}

// schedule gives an image its time under p, which asks q of it. r.mu is held.
func (r *Refresher) schedule(c *copies, p *RefreshPlan, q verify.Question) {
	was, first := c.requirement, c.plan == nil
	c.plan, c.requirement = p, [32]byte{}
	if q.Rule != nil {
		c.requirement = q.Rule.Requirement
	}
	now := r.uptime()
	another := was != c.requirement
	if first { // of images that come later, the mirrors were asked just now
		another = !r.assessed && r.noted.strange(c.requirement)
	}
	switch {
	case c.requirement == [32]byte{} || p.Every == 0:
		c.soon, c.failures, c.due = false, 0, 0
	case another && (!c.soon || c.failures > 0):
		c.soon = true
		c.due = now + time.Duration(c.draw%uint64(min(p.Every/refreshPart, refreshSoon)+1))
	case c.soon || c.failures > 0: // its time was set, and stays
		c.due = min(c.due, now+p.Every)
	default:
		c.due = c.regular(p, now)
	}
}

// regular is the first time of c's own after now.
func (c *copies) regular(p *RefreshPlan, now time.Duration) time.Duration {
	phase := time.Duration(c.draw % uint64(p.Every))
	if now < phase {
		return phase
	}
	return phase + ((now-phase)/p.Every+1)*p.Every
}

// next returns what is to be asked about next and how long that is to wait; nothing
// where nothing is planned.
func (r *Refresher) next() (copied, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key, due := r.first()
	return key, max(due-r.uptime(), 0)
}

// first is what is due first, and when. r.mu is held.
func (r *Refresher) first() (first copied, due time.Duration) {
	for key, c := range r.images {
		if c.plan != nil && c.plan == r.plan && c.due > 0 && (first == copied{} || c.due < due) {
			first, due = key, c.due
		}
	}
	return first, due
}

// count brings figures up to date that follow from the images. r.mu is held.
func (r *Refresher) count() {
	s := &r.status
	s.Images, s.Failing, s.Next = 0, 0, time.Time{}
	for _, c := range r.images {
		if c.requirement != ([32]byte{}) {
			s.Images++
			if c.failures > 0 {
				s.Failing++
			}
		}
	}
	if key, due := r.first(); key != (copied{}) {
		s.Next = r.resolver.options.Load().Now().Add(due - r.uptime()).Round(time.Second)
	}
	if s.Failing == 0 {
		s.Error = ""
	}
}

// question is what p asks of an image, or why nothing is to be asked of sources.
func (r *Refresher) question(ctx context.Context, p *RefreshPlan, c copies) (q verify.Question, skip *verify.Fault) {
	defer func() {
		if v := recover(); v != nil {
			q, skip = verify.Question{}, &verify.Fault{Reason: verify.Internal, Detail: verify.Clean(fmt.Sprintf("panic while looking at the image: %v", v), verify.MaxMessage)}
		}
	}()
	look, cancel := context.WithTimeout(ctx, surveyImage)
	defer cancel()
	img := r.resolver.ahead(look, c.names[0], c.record)
	if img.Fault != nil {
		return verify.Question{}, img.Fault
	}
	img.Name = p.Setup.Known(img.Name)
	rule := p.Setup.Policy.Select(img)
	if rule != nil && rule.Settled != "" {
		return verify.Question{}, &verify.Fault{Reason: rule.Settled, Detail: rule.Detail}
	}
	q = verify.Question{Image: img, Rule: rule}
	if f := q.Unfit(); f != nil {
		return verify.Question{}, f
	}
	if len(p.Sources(img.Name)) == 0 {
		return verify.Question{}, &verify.Fault{Reason: verify.SourceUnreachable, Detail: "no source of signatures is configured for this image"}
	}
	return q, nil
}

// refresh asks about one image. Whoever calls it has the turn.
func (r *Refresher) refresh(ctx context.Context, key copied) Refreshed {
	for {
		r.mu.Lock()
		p, retired := r.plan, r.retired
		var c copies
		if known := r.images[key]; known != nil {
			c = *known
		}
		r.mu.Unlock()
		if p == nil || c.names == nil {
			return Refreshed{Target: key.target.Digest, Skipped: &verify.Fault{Reason: verify.ImageUnresolved, Detail: "the image has gone"}}
		}
		done := Refreshed{Name: c.names[0], Target: key.target.Digest}
		q, skip := r.question(ctx, p, c)
		if skip != nil {
			done.Skipped = skip
		} else {
			ask, cancel := context.WithTimeout(ctx, aheadImage)
			stop := context.AfterFunc(retired, cancel)
			done.Fresh, done.Tried = p.Ask(ask, q)
			stop()
			cancel()
			if ctx.Err() == nil && retired.Err() != nil {
				continue // once more, under the configuration that came meanwhile
			}
		}
		if ctx.Err() == nil {
			r.note(key, p, q, &done)
		}
		return done
	}
}

// note keeps what became of an image, and says in the log what is new: signatures,
// that sources fail, and that none does any more.
func (r *Refresher) note(key copied, p *RefreshPlan, q verify.Question, done *Refreshed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.status
	failed := done.Failed()
	before := s.Failing
	if c := r.images[key]; c != nil && r.plan == p {
		now := r.uptime()
		switch {
		case done.Skipped != nil && done.Skipped.Reason == verify.ImageUnresolved:
			c.plan, c.due = nil, 0 // assessed again when the survey has seen it
		case failed != nil && p.Every > 0:
			c.due = now + min(refreshAgain<<min(c.failures, 10), p.Every)
			c.failures++
		default:
			c.soon, c.failures, c.plan = false, 0, nil
			r.schedule(c, p, q)
		}
	}
	if done.Skipped == nil {
		s.Asked++
		s.Fresh += uint64(done.Fresh)
		s.Last = r.resolver.options.Load().Now()
	}
	if failed != nil {
		s.Failed++
		s.Error = verify.Clean(failed.Source+": "+failed.Detail, 256)
	}
	r.count()
	if done.Fresh > 0 {
		r.log.Info("signatures were added to those that are kept", "image", done.Name.String(), "target", done.Target.String(), "new", done.Fresh)
	}
	switch {
	case before == 0 && s.Failing > 0 && failed != nil:
		r.log.Warn("signatures could not be looked for again; what is kept stays, and it is tried again later", "image", done.Name.String(), "source", failed.Source, "reason", failed.Reason.String(), "error", failed.Detail)
	case before > 0 && s.Failing == 0:
		r.log.Info("signatures can be looked for again")
	}
}

// Refresh asks about the images of these names now, or without names about all, and
// hands over what became of each, in the order of their names, until yield returns an
// error, which it returns. A name without tag and digest is that of the tag that the
// parser of names adds. Nothing is asked where one of the names is of no image.
func (r *Refresher) Refresh(ctx context.Context, names []verify.Name, yield func(Refreshed) error) error {
	keys, err := r.command(names)
	if err != nil {
		return err
	}
	defer func() {
		r.mu.Lock()
		r.commanded = false
		r.mu.Unlock()
	}()
	select {
	case r.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-r.turn; r.ring() }()
	for _, key := range keys {
		done := r.refresh(ctx, key)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := yield(done); err != nil {
			return err
		}
	}
	return nil
}

// command finds the images that names mean, and keeps others from asking for more.
func (r *Refresher) command(names []verify.Name) ([]copied, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.commanded:
		return nil, ErrRefreshing
	case r.plan == nil || r.images == nil:
		return nil, ErrNotLooked
	}
	chosen := map[copied]string{}
	for key, c := range r.images {
		if len(names) == 0 && !c.unsafe {
			chosen[key] = c.names[0].String()
		}
	}
	for _, n := range names {
		found := false
		for key, c := range r.images {
			if c.is(n, key.target.Digest) {
				chosen[key], found = c.names[0].String(), true
			}
		}
		if !found {
			return nil, fmt.Errorf("%w: %s", ErrNoImage, n)
		}
	}
	r.commanded = true
	var keys []copied
	for key := range chosen {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b copied) int {
		return cmp.Or(cmp.Compare(chosen[a], chosen[b]), cmp.Compare(a.target.Digest, b.target.Digest))
	})
	return keys, nil
}

// is reports whether n names c, whose target has that digest. A digest says more
// than a tag beside it.
func (c *copies) is(n verify.Name, target digest.Digest) bool {
	return slices.ContainsFunc(c.names, func(o verify.Name) bool {
		switch {
		case o.Repository() != n.Repository():
			return false
		case n.Digest != "":
			return n.Digest == target || n.Digest == o.Digest
		}
		return n.Tag == o.Tag
	})
}

// Status returns the figures.
func (r *Refresher) Status() RefreshStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}
