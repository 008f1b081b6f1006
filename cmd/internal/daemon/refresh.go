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
			k := &newcomers{Store: s, engine: engine, ctx: ctx, question: q, worths: map[digest.Digest]worth{},
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

// newcomers is the store, for one image, and counts the signatures that it had not. Of
// each class it keeps the one that can count longest, the newest, and no others. It is
// not safe for concurrent use.
type newcomers struct {
	*store.Store
	engine   *verify.Engine
	ctx      context.Context
	question verify.Question
	looked   bool                    // worths has what the store has
	worths   map[digest.Digest]worth // by the manifest of the signature
	kept     []digest.Digest         // manifests that were not in the store before
	gone     map[digest.Digest]bool  // manifests that gave way to others
	spare    map[digest.Digest]bool  // manifests that were not kept, since others count longer
	unkept   map[digest.Digest]bool  // manifests that the store did not take
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
				k.keep(k.question.Image, s.Subject, s.Evidence)
			}
		})...)
	}
	return tried
}

// keep gives the store a signature that meets the rule, unless others make it spare.
func (k *newcomers) keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	me := ev.Manifest.Digest
	if k.Has(me) || k.gone[me] {
		return
	}
	if !k.looked {
		k.looked = true
		k.engine.Ask(k.ctx, k.Store, k.question, func(s verify.Step) {
			if s.Evidence.From == "" { // what an archive has goes with the archive
				k.weigh(s)
			}
		})
	}
	var rivals []digest.Digest // those that count least first
	mine := k.worths[me]
	for d, w := range k.worths {
		if w.class == mine.class && d != me && !k.gone[d] && k.Has(d) {
			rivals = append(rivals, d)
		}
	}
	longer := func(a, b digest.Digest) bool { return k.worths[a].Longer(k.worths[b].Worth) }
	newer := func(a, b digest.Digest) bool {
		x, y := k.worths[a].Signed, k.worths[b].Signed
		return x.After(y) || x.Equal(y) && longer(a, b)
	}
	slices.SortFunc(rivals, func(a, b digest.Digest) int {
		switch {
		case longer(b, a) || !longer(a, b) && newer(b, a):
			return -1
		case longer(a, b) || newer(a, b):
			return 1
		}
		return cmp.Compare(a, b)
	})
	longest, newest := me, me
	for _, d := range rivals {
		if !longer(longest, d) {
			longest = d
		}
		if !newer(newest, d) {
			newest = d
		}
	}
	if len(rivals) >= alike && longest != me && newest != me {
		k.spare[me] = true
		return
	}
	k.Store.Keep(img, subject, ev)
	if !k.Has(me) {
		k.unkept[me] = true
		return
	}
	k.kept = append(k.kept, me)
	left := len(rivals) + 1
	for _, d := range rivals {
		if left > alike && d != longest && d != newest {
			k.Store.Supersede(d, me)
			k.gone[d] = true
			left--
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
	k.worths[s.Evidence.Manifest.Digest] = w
	return true
}
