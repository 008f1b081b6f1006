package reconcile

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

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
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
// It decides nothing. A source that does not answer costs one
// attempt, and the next is later. Methods are safe for concurrent use.
type Refresher struct {
	binder RecordBinder
	log    *slog.Logger
	uptime func() time.Duration
	seed   uint64
	noted  *requirements
	wake   chan struct{}
	turn   chan struct{} // holds one: whoever asks

	mu        sync.Mutex
	plan      *RefreshPlan
	retire    func()             // ends what is asked under plan
	retired   context.Context    // ended by it
	images    map[subject]*group // nil: not known yet
	commanded bool               // Refresh is under way
	assessed  bool               // it is known what is asked of the images that were there at the start
	status    RefreshStatus
}

// A RefreshPlan is what a configuration says about refreshing. It does not change.
type RefreshPlan struct {
	Setup   *verify.Snapshot
	Sources func(verify.Name) []verify.Source // an image that has none is not asked about
	Every   time.Duration                     // period; 0: only on demand

	// Ask asks all sources for all signatures of an image, keeps those that meet the
	// rule, and returns how many. Like verify.Engine.Ask it does not panic.
	Ask func(context.Context, verify.Question) (Gain, []verify.Attempt)
}

// A Gain counts signatures that meet the rule and were not kept before.
type Gain struct {
	Fresh  int // are kept now
	Spare  int // are not, since others that are kept count as long
	Unkept int // could not be kept
}

const (
	// After another configuration, images are asked about within this part of the
	// period, and within maxSoon at most.
	soonShare = 144
	maxSoon   = 10 * time.Minute

	// refreshRetry is how long after a failure an image is asked about again; each
	// failure in a row doubles it, up to the period.
	refreshRetry = 10 * time.Minute

	maxGroup = 64 // names remembered of what one repository has
)

// subject is what signatures are asked for: content, and where it came from.
type subject struct {
	repository string
	target     verify.Target
}

// A group is the image records of one repository that point to one target.
type group struct {
	names  []verify.Name
	record containerd.Record // one of them
	draw   uint64            // where in the period it has its time
	unsafe bool              // not to be looked at unless it is asked for by its name

	plan        *RefreshPlan // under which the following was found out; nil: not yet
	requirement [32]byte     // zero: nothing is to be asked
	due         time.Duration
	soon        bool // due since it is asked for something else
	failures    int  // in a row
}

// A Refreshed is what became of one image.
type Refreshed struct {
	Name   verify.Name
	Target digest.Digest
	Gain
	Tried   []verify.Attempt // what each source said
	Skipped *verify.Fault    // why none was asked
}

// Failed returns what the first source said that could not be asked, or nil.
func (r *Refreshed) Failed() *verify.Attempt {
	for i, a := range r.Tried {
		switch a.Reason {
		case verify.SourceUnreachable, verify.SourceUnauthorized, verify.SourceNoReferrers,
			verify.LimitExceeded, verify.Pending, verify.Internal:
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
func NewRefresher(b RecordBinder, log *slog.Logger, uptime func() time.Duration, seed uint64, dir string) *Refresher {
	return &Refresher{binder: b, log: log, uptime: uptime, seed: seed, noted: &requirements{dir: dir}, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1), retire: func() {}}
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

// has says which images the node has, as Prefetch sees them, and which of them
// are not to be looked at: a process may have died of it. Who names one wants that.
func (r *Refresher) has(items map[string]*item, skips func(digest.Digest) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	images := map[subject]*group{}
	for _, i := range items {
		key := subject{i.name.Repository(), plain(i.record.Target)}
		c := images[key]
		if c == nil {
			c = &group{record: i.record, draw: r.draw(key), unsafe: skips(i.record.Target.Digest)}
			if old := r.images[key]; old != nil {
				unsafe := c.unsafe
				*c = *old
				c.names, c.unsafe = nil, unsafe
			}
			images[key] = c
		}
		if len(c.names) < maxGroup {
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

func (r *Refresher) draw(c subject) uint64 {
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
		if key == (subject{}) {
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
	if key, wait := r.next(); key != (subject{}) && wait == 0 {
		r.refresh(ctx, key)
		pause(ctx, imagePause)
	}
}

// question is what p asks of an image, or why nothing is to be asked of sources.
func (r *Refresher) question(ctx context.Context, p *RefreshPlan, c group) (q verify.Question, skip *verify.Fault) {
	defer func() {
		if v := recover(); v != nil {
			q, skip = verify.Question{}, &verify.Fault{Reason: verify.Internal, Detail: text.Clean(fmt.Sprintf("panic while looking at the image: %v", v), verify.MaxMessage)}
		}
	}()
	look, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	img := r.binder.Bind(look, c.names[0], c.record)
	if img.Fault != nil {
		return verify.Question{}, img.Fault
	}
	img.Name = p.Setup.Known(img.Name)
	rule := p.Setup.Policy.Select(img)
	if rule != nil && rule.Fixed != "" {
		return verify.Question{}, &verify.Fault{Reason: rule.Fixed, Detail: rule.Detail}
	}
	q = verify.Question{Image: img, Rule: rule}
	if f := q.Validate(); f != nil {
		return verify.Question{}, f
	}
	if len(p.Sources(img.Name)) == 0 {
		return verify.Question{}, &verify.Fault{Reason: verify.SourceUnreachable, Detail: "no source of signatures is configured for this image"}
	}
	return q, nil
}

// refresh asks about one image. Whoever calls it has the turn.
func (r *Refresher) refresh(ctx context.Context, key subject) Refreshed {
	for {
		r.mu.Lock()
		p, retired := r.plan, r.retired
		var c group
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
			ask, cancel := context.WithTimeout(ctx, verifyTimeout)
			stop := context.AfterFunc(retired, cancel)
			done.Gain, done.Tried = p.Ask(ask, q)
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
func (r *Refresher) note(key subject, p *RefreshPlan, q verify.Question, done *Refreshed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.status
	failed := done.Failed()
	before := s.Failing
	if c := r.images[key]; c != nil && r.plan == p {
		now := r.uptime()
		switch {
		case done.Skipped != nil && done.Skipped.Reason == verify.ImageUnresolved:
			c.plan, c.due = nil, 0 // assessed again when Prefetch has seen it
		case failed != nil && p.Every > 0:
			c.due = now + min(refreshRetry<<min(c.failures, 10), p.Every)
			c.failures++
		default:
			c.soon, c.failures, c.plan = false, 0, nil
			r.schedule(c, p, q)
		}
	}
	if done.Skipped == nil {
		s.Asked++
		s.Fresh += uint64(done.Fresh)
		s.Last = r.binder.Options().Now()
	}
	if failed != nil {
		s.Failed++
		s.Error = text.Clean(failed.Source+": "+failed.Detail, 256)
	}
	r.count()
	if done.Fresh > 0 {
		r.log.Info("signatures were added to those that are kept", "image", done.Name.String(), "target", done.Target.String(), "new", done.Fresh)
	}
	if done.Unkept > 0 {
		r.log.Warn("signatures that meet the policy could not be kept", "image", done.Name.String(), "target", done.Target.String(), "signatures", done.Unkept)
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
func (r *Refresher) command(names []verify.Name) ([]subject, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.commanded:
		return nil, ErrRefreshing
	case r.plan == nil || r.images == nil:
		return nil, ErrNotLooked
	}
	chosen := map[subject]string{}
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
	var keys []subject
	for key := range chosen {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b subject) int {
		return cmp.Or(cmp.Compare(chosen[a], chosen[b]), cmp.Compare(a.target.Digest, b.target.Digest))
	})
	return keys, nil
}

// is reports whether n names c, whose target has that digest. A digest says more
// than a tag beside it.
func (c *group) is(n verify.Name, target digest.Digest) bool {
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
