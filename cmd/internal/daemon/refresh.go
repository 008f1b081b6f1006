package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// refresh answers POST /v1/refresh.
func (d *daemon) refresh(ctx context.Context, images []string, yield func(control.Refreshed) error) error {
	if d.refresher == nil {
		return &control.Refusal{Status: http.StatusServiceUnavailable, Err: errors.New("this gate keeps no signatures (--state-dir is empty), so that there is nothing to add to")}
	}
	var names []verify.Name
	for _, s := range images {
		n, err := policy.ParseName(s)
		if err != nil {
			return &control.Refusal{Status: http.StatusBadRequest, Err: fmt.Errorf("%s: %w", text.Quote(s, 200), err)}
		}
		if n.Tag == "" && n.Digest == "" {
			n.Tag = "latest" // as the runtime reads it
		}
		names = append(names, n)
	}
	err := d.refresher.Refresh(ctx, names, func(r reconcile.Refreshed) error {
		one := control.Refreshed{
			Image: text.Clean(r.Name.String(), 512), Target: r.Target.String(), New: r.Fresh, Spare: r.Spare, Unkept: r.Unkept,
			Failed: r.Failed() != nil, Tried: append([]verify.Attempt{}, r.Tried...),
		}
		if r.Name.Digest == "" {
			one.Image += "@" + one.Target
		}
		if r.Skipped != nil {
			one.Skipped, one.Detail = r.Skipped.Reason.String(), text.Clean(r.Skipped.Detail, verify.MaxMessage)
		}
		return yield(one)
	})
	switch {
	case errors.Is(err, reconcile.ErrNoImage):
		return &control.Refusal{Status: http.StatusNotFound, Err: err}
	case errors.Is(err, reconcile.ErrRefreshing):
		return &control.Refusal{Status: http.StatusConflict, Err: err}
	}
	return err
}

// plan is what a configuration says about looking for signatures again.
func plan(c *config.Config, setup *verify.Snapshot, engine *verify.Engine, s *store.Store) *reconcile.RefreshPlan {
	return &reconcile.RefreshPlan{Setup: setup, Sources: engine.Sources, Every: c.Refresh,
		Ask: func(ctx context.Context, q verify.Question) (reconcile.Gain, []verify.Attempt) {
			k := &newcomers{Store: s, engine: engine, ctx: ctx, question: q, room: maxWeighed, listed: map[hand]error{}, worths: map[verdict]worth{},
				gone: map[digest.Digest]bool{}, spare: map[digest.Digest]bool{}, unkept: map[digest.Digest]bool{}}
			tried := k.ask()
			return reconcile.Gain{Fresh: k.fresh(), Spare: len(k.spare), Unkept: len(k.unkept)}, tried
		}}
}

// alike is how many signatures of one class are kept: the one that can count longest,
// and the newest.
const alike = 2

// A class are signatures of which each counts whenever another one does, except for
// their time. Anyone who has a signature can make any number that meet the rule, with
// other annotations in the manifest or more spaces in the envelope, and a mirror could
// fill the store with them. The signer can make any number that differ in their expiry.
type class struct {
	subject digest.Digest
	signer  verify.Signer
	leaf    string // whose authority it has
	kind    [32]byte
}

// A worth is what a signature that meets the rule is good for.
type worth struct {
	class
	notary.Worth
}

// A weigher says how long signatures can count. *notary.Checker is one.
type weigher interface {
	verify.Checker
	Worth(ev verify.Evidence, statement string) (notary.Worth, error)
}

// maxWeighed bounds the signatures in the store that are weighed for one image, each of
// which costs about a millisecond. Only a signer whom the rule trusts can make as many
// that the store keeps, and only what is by the same certificate is then not kept.
const maxWeighed = 1024

// A hand is whose signatures of what were looked for in the store.
type hand struct {
	subject digest.Digest
	kind    string
	leaf    string // thumbprint of the certificate
}

// A verdict names a signature, by its manifest, under an authority.
type verdict struct {
	manifest  digest.Digest
	authority string
}

// newcomers is the store, for one image, and counts the signatures that it had not. Of
// each class it keeps the one that can count longest, the newest, and no others. It is
// not safe for concurrent use.
type newcomers struct {
	*store.Store
	engine   *verify.Engine
	ctx      context.Context
	question verify.Question
	room     int                    // signatures in the store that may still be weighed
	listed   map[hand]error         // worths has what the store has of these, or why not
	worths   map[verdict]worth      // of those that meet the rule, or a part of it
	kept     []digest.Digest        // manifests that were not in the store before
	gone     map[digest.Digest]bool // manifests that gave way to others
	spare    map[digest.Digest]bool // manifests that were not kept, since others count longer
	unkept   map[digest.Digest]bool // manifests that the store did not take
}

// fresh is how many signatures are kept that were not before.
func (k *newcomers) fresh() (n int) {
	for _, d := range k.kept {
		if !k.gone[d] {
			n++
		}
	}
	return n
}

// ask asks every source but the store for all signatures of the image.
func (k *newcomers) ask() (tried []verify.Attempt) {
	defer func() { _ = recover() }() // the engine has its own: this is for Sources
	for _, src := range k.engine.Sources(k.question.Image.Name) {
		tried = append(tried, k.engine.Ask(k.ctx, src, k.question, func(s verify.Step) {
			defer func() { _ = recover() }() // whatever becomes of it, the source has answered
			if k.weigh(s) {
				k.keep(s)
			}
		})...)
	}
	return tried
}

// keep gives the store a signature that meets the rule, unless others make it spare.
func (k *newcomers) keep(s verify.Step) {
	me := s.Evidence.Manifest.Digest
	if k.Has(me) || k.gone[me] || k.spare[me] {
		return
	}
	if k.list(s) != nil {
		k.unkept[me] = true // nobody knows whether others count longer
		return
	}
	k.weighAll(s.Subject, s.Leaf.Kind, s.Evidence)
	wanted, rivals := false, map[digest.Digest]bool{}
	for v, w := range k.worths {
		if v.manifest != me {
			continue
		}
		surplus := k.surplus(v.authority, w.class, me)
		wanted = wanted || !surplus[me]
		for d := range surplus {
			rivals[d] = true
		}
	}
	if !wanted {
		k.spare[me] = true
		return
	}
	k.Store.Keep(k.question.Image, s.Subject, s.Evidence)
	if !k.Has(me) {
		k.unkept[me] = true
		return
	}
	k.kept = append(k.kept, me)
	var over []digest.Digest // looked for before any of them is gone
	for d := range rivals {
		if d != me && k.over(d, me) {
			over = append(over, d)
		}
	}
	for _, d := range over {
		k.Store.Supersede(d, me)
		k.gone[d] = true
	}
}

// over reports whether d is one too many under each authority under which it counts,
// with me there.
func (k *newcomers) over(d, me digest.Digest) bool {
	for v, w := range k.worths {
		if v.manifest == d && !k.surplus(v.authority, w.class, me)[d] {
			return false
		}
	}
	return true
}

// surplus is what is too many of a class under an authority, with me there: of what is
// neither the longest nor the newest, me and then those that count least. Of equal ones
// those stay that are there.
func (k *newcomers) surplus(authority string, c class, me digest.Digest) map[digest.Digest]bool {
	at := func(d digest.Digest) worth { return k.worths[verdict{d, authority}] }
	var list []digest.Digest // me, and others, those that count least first
	for v, w := range k.worths {
		if v.authority == authority && w.class == c && !k.gone[v.manifest] && (v.manifest == me || k.Has(v.manifest)) {
			list = append(list, v.manifest)
		}
	}
	longer := func(a, b digest.Digest) bool { return at(a).Longer(at(b).Worth) }
	newer := func(a, b digest.Digest) bool {
		x, y := at(a).Signed, at(b).Signed
		return x.After(y) || x.Equal(y) && longer(a, b)
	}
	slices.SortFunc(list, func(a, b digest.Digest) int {
		switch {
		case a == me || b == me:
			return map[bool]int{true: -1, false: 1}[a == me]
		case longer(b, a) || !longer(a, b) && newer(b, a):
			return -1
		case longer(a, b) || newer(a, b):
			return 1
		}
		return cmp.Compare(a, b)
	})
	longest, newest := me, me
	for i, d := range list {
		if i == 0 || !longer(longest, d) {
			longest = d
		}
		if i == 0 || !newer(newest, d) {
			newest = d
		}
	}
	surplus, left := map[digest.Digest]bool{}, len(list)
	for _, d := range list {
		if left > alike && d != longest && d != newest {
			surplus[d] = true
			left--
		}
	}
	return surplus
}

// list weighs what the store has by the certificate that made s, over its subject. What
// archives have goes with the archive, and makes nothing spare.
func (k *newcomers) list(s verify.Step) error {
	of := hand{s.Subject.Digest, s.Leaf.Kind, s.Finding.Signer.Thumbprint}
	err, known := k.listed[of]
	for _, c := range k.engine.Checkers {
		if known || c.Kind().Name() != of.kind {
			continue
		}
		err = k.FindBy(k.ctx, s.Subject, of.leaf, k.room, func() *verify.Budget { return verify.NewBudget(c.Kind(), k.engine.Limits) }, func(ev verify.Evidence) {
			k.room--
			k.weighAll(s.Subject, of.kind, ev)
		})
		k.listed[of] = err
	}
	return err
}

// weighAll weighs a signature under each authority that the rule names for its kind.
func (k *newcomers) weighAll(subject ocispec.Descriptor, kind string, ev verify.Evidence) {
	for _, l := range k.question.Rule.Require.Leaves() {
		if _, known := k.worths[verdict{ev.Manifest.Digest, l.Authority}]; !known && l.Kind == kind {
			k.weigh(verify.Step{Subject: subject, Leaf: l, Evidence: ev, Finding: k.engine.Check(k.ctx, ev, subject, l)})
		}
	}
}

// weigh notes what a signature is worth, and reports whether it meets the rule.
func (k *newcomers) weigh(s verify.Step) bool {
	if s.Finding.Reason != verify.Verified {
		return false
	}
	w := worth{class: class{subject: s.Subject.Digest, signer: s.Finding.Signer, leaf: s.Leaf.Authority}, Worth: notary.Worth{Lasts: s.Finding.Until}}
	for _, c := range k.engine.Checkers {
		if c, ok := c.(weigher); ok && c.Kind().Name() == s.Leaf.Kind {
			if known, err := c.Worth(s.Evidence, s.Leaf.Authority); err == nil {
				w.Worth, w.kind = known, known.Kind
			}
		}
	}
	k.worths[verdict{s.Evidence.Manifest.Digest, s.Leaf.Authority}] = w
	return true
}
