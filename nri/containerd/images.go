package containerd

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Marks note the images that are read while no one waits for them, so that one that brings
// the process down does so once and not at every start. It is safe for concurrent use.
type Marks interface {
	// Skips reports whether an earlier process may have died of an image.
	Skips(target digest.Digest) bool
	// Hold notes that an image is read until release is called.
	Hold(target digest.Digest) (release func())
}

type unmarked struct{}

func (unmarked) Skips(digest.Digest) bool            { return false }
func (unmarked) Hold(digest.Digest) (release func()) { return func() {} }

// Mark has images noted in m while they are read and no container waits for them.
func (r *Resolver) Mark(m Marks) { r.marks.Store(&m) }

func (r *Resolver) marked() Marks {
	if m := r.marks.Load(); m != nil {
		return *m
	}
	return unmarked{}
}

// Changed has a value when the images of the node, or the options, may have changed.
func (r *Resolver) Changed() <-chan struct{} { return r.changed }

// Options returns those in force, which must not be changed.
func (r *Resolver) Options() *Options { return r.options.Load() }

// Connections returns how often Connected was called.
func (r *Resolver) Connections() uint64 { return r.connections.Load() }

// Records returns the image records of the node, in no order.
func (r *Resolver) Records(ctx context.Context) ([]Record, error) { return r.records.Images(ctx) }

// A Summary is the manifest and the config that a target leads to. They are empty if it
// cannot be judged.
type Summary struct{ Manifest, Config digest.Digest }

func (c resolution) summary() Summary {
	if c.fault != nil {
		return Summary{}
	}
	return Summary{c.manifest.Digest, c.config}
}

// Summary returns what is remembered of a target, and has it remembered longer than others.
func (r *Resolver) Summary(target ocispec.Descriptor) (s Summary, known bool) {
	c, known := r.resolutions.Get(plain(target))
	return c.summary(), known
}

// Learn reads what a target leads to while no one waits for it, and remembers it.
func (r *Resolver) Learn(ctx context.Context, target ocispec.Descriptor) {
	_, _ = r.learn(ctx, target, r.marked()) // an error comes again when it is bound
}

// Summarize reads what a target leads to while no one waits for it, and does not remember
// it. If containerd did not answer, known is false.
func (r *Resolver) Summarize(ctx context.Context, target ocispec.Descriptor) (s Summary, known bool) {
	give, err := r.take(ctx)
	if err != nil {
		return Summary{}, false
	}
	defer give()
	defer r.marked().Hold(target.Digest)()
	c, err := read(ctx, r.records.Blob, target)
	if f := (*verify.Fault)(nil); err != nil && (!errors.As(err, &f) || f.Reason == verify.Pending) && !errors.Is(err, ErrNotFound) {
		return Summary{}, false
	}
	return Summary{c.manifest.Digest, c.config}, true
}

// Bind binds an image of which there is a record, and no container yet.
func (r *Resolver) Bind(ctx context.Context, name verify.Name, record Record) verify.Image {
	o := r.options.Load()
	img := verify.Image{Name: name, Asked: record.Name, Use: verify.UsePrefetch, Binding: verify.BoundRecord, Revision: o.Revision}
	if err := r.aim(ctx, record.Target, &img); err != nil {
		img.Fault = faultOf(err)
		return img
	}
	// On a snapshotter that is trusted only because the configuration says so none
	// but the target counts. Which one a container will have is not known yet.
	if len(o.Snapshotters) == 0 {
		img.LayersVerified = true
		img.Related = r.related.of(img.Config, img.Target.Digest, img.Manifest.Digest)
	}
	return img
}

// aim sets what target leads to in img. A digest in the image's name must be there.
func (r *Resolver) aim(ctx context.Context, target ocispec.Descriptor, img *verify.Image) error {
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
		f = &verify.Fault{Reason: verify.ImageUnresolved, Detail: text.Clean(err.Error(), verify.MaxMessage)}
	}
	return f
}

// Listed hands over the images of the node that a pod can name, in the order of their
// names and bound as Bind does, until yield returns false. It reads nothing: an image that was
// not read ahead of time yet is PENDING.
func (r *Resolver) Listed(ctx context.Context, yield func(verify.Image) bool) error {
	o := r.options.Load()
	records, err := r.records.Images(ctx)
	if err != nil {
		return err
	}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Name, b.Name) })
	for _, record := range records {
		name, can := o.Nameable(record.Name)
		if !can {
			continue
		}
		img := verify.Image{Name: name, Asked: record.Name, Use: verify.UsePrefetch, Binding: verify.BoundRecord, Revision: o.Revision, Target: record.Target}
		if _, read := r.resolutions.Peek(plain(record.Target)); read {
			img = r.Bind(ctx, name, record)
		} else {
			img.Fault = &verify.Fault{Reason: verify.Pending, Detail: "the gate has not looked at the image yet, or not again since it died while it did; tidewaiter explain has it look"}
		}
		if !yield(img) {
			return nil
		}
	}
	return nil
}

// Read binds an image that Listed handed over and that was not read ahead of time, perhaps
// since an earlier process died over it.
func (r *Resolver) Read(ctx context.Context, img verify.Image) verify.Image {
	return r.Bind(ctx, img.Name, Record{Name: img.Asked, Target: img.Target})
}

// Nameable returns the name of a record, if a pod can name it. The record of an
// image ID is none: CRI looks for the name that ParseRecord returns.
func (o *Options) Nameable(record string) (verify.Name, bool) {
	name, err := o.ParseName(record)
	if err != nil {
		return verify.Name{}, false
	}
	asked, err := o.ParseRecord(record)
	return name, err == nil && asked == record
}
