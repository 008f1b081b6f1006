package inspect

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Longest is how long one question may take: the limits of the configuration bound each
// source.
const Longest = 2 * time.Minute

// An Offline judges images by a configuration as the gate in enforce would, with no
// daemon and no containerd. It is not safe for concurrent use.
type Offline struct {
	config   *config.Config
	setup    *verify.Snapshot
	decider  verify.Decider
	engine   *verify.Engine
	store    *store.Reader // nil: none
	archives *archives.Archives
}

// NewOffline returns an Offline that reads what the node keeps in stateDir, unless that
// is empty. It must be closed.
func NewOffline(ctx context.Context, c *config.Config, stateDir string) (*Offline, error) {
	j := &Offline{config: c}
	if stateDir != "" {
		o := store.Options{Now: time.Now, Kinds: []verify.Kind{notary.Kind}}
		if j.archives = archives.Open(ctx, stateDir, time.Now, notary.Kind); j.archives != nil {
			o.Archives = j.archives
		}
		j.store = store.Open(ctx, stateDir, o)
	}
	setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator {
		if j.store != nil {
			e.Store = j.store
		}
		j.engine = e
		return e
	}, time.Now)
	if err != nil {
		j.Close()
		return nil, err
	}
	setup.Mode = verify.Enforce // audit would hide what is asked
	j.setup = setup
	j.decider.Swap(setup)
	return j, nil
}

// Close ends what reads the node's state.
func (j *Offline) Close() {
	j.store.Close()
	j.archives.Close()
}

// sources are where the engine looks for signatures of an image of that name.
func (j *Offline) sources(name verify.Name) []verify.Source {
	list := j.engine.Sources(name)
	if j.store != nil {
		list = append([]verify.Source{j.store}, list...)
	}
	return list
}

// Judge judges the image of that name, which has a digest; ref is what was asked for.
func (j *Offline) Judge(ctx context.Context, name verify.Name, ref, namespace string) (verify.Decision, verify.Image) {
	// The answer is for nodes whose snapshotter checks what it unpacks, as nearly all do.
	img := verify.Image{Name: name, Asked: ref, Use: verify.UseQuestion, LayersVerified: true, Pod: verify.Pod{Namespace: namespace}}
	img.Target = ocispec.Descriptor{Digest: name.Digest}
	var tried []verify.Attempt
	partial := false
	// A rule that denies, or none, is the answer without asking anybody.
	known := img
	known.Name = j.setup.Known(name)
	if rule := j.setup.Policy.Select(known); rule.Fixed != "" {
		img.Manifest, img.Binding = img.Target, verify.BoundDigest
	} else {
		check := func(ctx context.Context, ev verify.Evidence, d ocispec.Descriptor) verify.Finding {
			var f verify.Finding
			for _, l := range rule.Require.Leaves() {
				if f = j.engine.Check(ctx, ev, d, l); f.Reason == verify.Verified {
					break
				}
			}
			return f
		}
		tried, partial = newBinder(known.Name, j.sources(known.Name), j.config.Limits, check).bind(ctx, &img)
	}
	d := j.decider.Verify(ctx, img)
	if img.Fault != nil {
		d.Tried = tried
	}
	if d.Made.IsZero() { // no source was asked
		d.Made = time.Now()
	}
	if partial && d.Reason == verify.SignatureMissing {
		d.Reason = verify.ImageUnresolved
		d.Detail = "the index has no signature, and which of its manifests this platform would run is not known: they are not where the index is"
	}
	return d, img
}

// Row judges one image, of which ref is the name, as a row of a list.
func (j *Offline) Row(ctx context.Context, ref string, allowlist Allowlist) control.Image {
	ctx, cancel := context.WithTimeout(ctx, Longest)
	defer cancel()
	name, err := policy.ParseName(ref)
	if err != nil {
		return control.Image{Image: text.Clean(ref, 300), Reason: verify.ImageUnresolved.String(), Detail: text.Clean(err.Error(), 300)}
	}
	at := ""
	if name.Digest == "" {
		d, source, fault := j.resolve(ctx, name)
		if fault != nil {
			return Row(verify.Image{Name: name, Asked: ref}, verify.Deny(fault.Reason, fault.Detail), allowlist)
		}
		name.Digest, at = d, source
	}
	d, img := j.Judge(ctx, name, ref, "")
	row := Row(img, d, allowlist)
	row.Resolved = at
	return row
}

// resolve asks the mirrors of the image which one a tag leads to, one after the other
// until one knows. Layouts are not asked: what is in them has no name.
func (j *Offline) resolve(ctx context.Context, name verify.Name) (digest.Digest, string, *verify.Fault) {
	known := j.setup.Known(name)
	tag := cmp.Or(name.Tag, "latest")
	fault := &verify.Fault{Reason: verify.ImageUnresolved, Detail: "no mirror of " + known.Host + " is configured that could say what the tag leads to; name a digest"}
	for _, s := range j.sources(known) {
		m, is := s.(*registry.Source)
		if !is {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, j.config.Limits.Or(verify.DefaultLimits).Wall)
		d, err := m.Resolve(ctx, known, tag)
		cancel()
		if err == nil {
			return d, m.Name(), nil
		}
		reason := reasonOf(err)
		if errors.Is(err, fs.ErrNotExist) && fault.Reason != verify.ImageUnresolved {
			continue // another one could not be asked, which says more
		}
		fault = &verify.Fault{Reason: reason, Detail: text.Clean(m.Name()+": "+err.Error(), verify.MaxMessage)}
	}
	return "", "", fault
}
