// Package containerd says which image a container really runs.
//
// NRI tells the name that the pod asked for and, on containerd 2.4 and later,
// the digests of what was resolved. Neither is believed as it stands: the name
// must be that of an image record that leads to the config that runs, and the
// config must be that of the manifest that containerd's own selection takes, or
// belong to the root filesystem that was prepared for the container. Everything
// is asked of containerd on this node; nothing is resolved at a registry.
//
// docs/security.md says what follows for each runtime.
package containerd

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Snapshotters that containerd applies layers for and checks diff IDs of. Any
// other may commit a snapshot under a chain ID without that check
// (core/unpack/unpacker.go), so that the chain ID proves nothing.
var Snapshotters = []string{"overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile"}

// Runtimes are the runtime types that start what containerd prepared. Others may
// resolve the image again by name when the task is made.
var Runtimes = []string{"io.containerd.runc.v2"}

// Records is what a Resolver asks of containerd. Errors wrap ErrNotFound where
// there is no such record. Where ctx has ended they fail without asking.
type Records interface {
	Image(ctx context.Context, name string) (ocispec.Descriptor, error)
	Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	Pulled(ctx context.Context, blob digest.Digest) (bool, error) // from a registry, as far as it was noted
	Snapshot(ctx context.Context, snapshotter, key string) (Snapshot, error)
	Snapshotters(ctx context.Context) ([]string, error)
	Images(ctx context.Context) ([]Record, error) // all image records, in no order
	SandboxRuntime(ctx context.Context, id string) (string, error)
	ContainerConfig(ctx context.Context, id string) (digest.Digest, error)
}

var _ Records = (*Containerd)(nil)

// A Record is an image record: a name and what it points to.
type Record struct {
	Name   string
	Target ocispec.Descriptor
}

// A Snapshot is what containerd knows of the root filesystem of a container.
type Snapshot struct {
	Parent string            // the chain ID that it was prepared from, or a remapped copy's name
	Labels map[string]string // those of user namespaces, where the pod has one
}

// Options are what a Resolver needs besides containerd.
type Options struct {
	ParseName    func(string) (verify.Name, error) // canonical name, for policy; the same for the same string
	ParseRecord  func(string) (string, error)      // the name under which the CRI plugin keeps the same string
	Snapshotters []string                          // trusted besides Snapshotters
	Runtimes     []string                          // allowed besides Runtimes
	Now          func() time.Time
	Revision     verify.Revision // of the configuration that says the above

	// Named reports whether the configuration names the host of an image, and whether it
	// names that very repository. Nil: it names none.
	Named func(verify.Name) (host, repository bool)
}

// A Resolver binds containers to images. It is safe for concurrent use.
type Resolver struct {
	records     Records
	options     atomic.Pointer[Options]
	compares    atomic.Bool                           // Started is asked
	loaded      atomic.Pointer[[]string]              // snapshotters of the connected containerd, trusted first
	resolutions *lru.Cache[verify.Target, resolution] // what a target leads to: follows from its digest
	parsed      *lru.Cache[string, parsed]            // what pods ask for, as it was parsed
	related     related                               // which of those lead to the same config
	changed     chan struct{}                         // holds one if the images may be others; see Changed
	turn        chan struct{}                         // filled while the documents of an image are read
	connections atomic.Uint64                         // how often Connected was called
	names       *lru.Cache[string, proof]             // what image records pointed to a moment ago
	used        *lru.Cache[string, string]            // runtime handler to the snapshotter of its containers
	runtime     *lru.Cache[string, string]            // sandbox to runtime type
	decided     *lru.Cache[string, []digest.Digest]   // container to the configs that were allowed for it

	marks atomic.Pointer[Marks] // nil: nothing is marked
}

// A resolution is what a target leads to on this platform.
type resolution struct {
	manifest ocispec.Descriptor
	config   digest.Digest
	chain    string        // chain ID of the root filesystem
	fault    *verify.Fault // set: the content cannot be judged
	archived bool          // the manifest has the form that runtimes make for archives
}

// A parsed is an image string of pods. Parsing is a matter of regular expressions
// and was half of what a repeated decision cost.
type parsed struct {
	name   verify.Name
	record string
}

// A proof is what a record pointed to, and when containerd said so.
type proof struct {
	target ocispec.Descriptor
	at     time.Time
}

// proofFor is how long a proof holds on runtimes that tell what they resolved: a
// burst of containers asks for a record once. The runtime's word for what runs is
// new each time; a record that moves away meanwhile makes its name no less that
// of the image that runs.
const proofFor = 30 * time.Second

// MaxImages bounds the images of which a Resolver remembers what they lead to, for those
// who have it read images ahead of time.
const MaxImages = 2048

// Bounds of what else a Resolver remembers: entries.
const (
	maxParsed  = 2048
	maxNames   = 2048
	moreImages = 256 // beyond MaxImages: others that containers are made from
	maxUsed    = 64
	maxRuntime = 1024
	maxDecided = 4096
)

// NewResolver makes a Resolver.
func NewResolver(r Records, o Options) *Resolver {
	n := &Resolver{records: r, changed: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	// Errors only for a size below one.
	c, _ := lru.NewWithEvict(MaxImages+moreImages, func(t verify.Target, l resolution) { n.related.remove(l.config, t) })
	s, _ := lru.New[string, parsed](maxParsed)
	p, _ := lru.New[string, proof](maxNames)
	u, _ := lru.New[string, string](maxUsed)
	rt, _ := lru.New[string, string](maxRuntime)
	d, _ := lru.New[string, []digest.Digest](maxDecided)
	n.resolutions, n.parsed, n.names, n.used, n.runtime, n.decided = c, s, p, u, rt, d
	n.options.Store(&o)
	return n
}

// Configure puts other options in force.
func (r *Resolver) Configure(o Options) {
	r.options.Store(&o)
	r.notify()
}

// Connected drops what belongs to an earlier run of containerd. The gate calls it
// each time it connects, since the runtime may have been replaced, and says
// whether Started will be asked before a container starts.
func (r *Resolver) Connected(compares bool) {
	r.connections.Add(1)
	r.compares.Store(compares)
	r.loaded.Store(nil)
	r.names.Purge()
	r.resolutions.Purge() // the disk may have been changed meanwhile
	r.used.Purge()
	r.notify()
}

// What containerd's CRI plugin writes into a container's annotations
// (internal/cri/annotations/annotations.go; container_checkpoint_linux.go).
const (
	annotationImage     = "io.kubernetes.cri.image-name"
	annotationRestored  = "restored"
	annotationUntrusted = "io.kubernetes.cri.untrusted-workload"
)

// Resolve returns the images that a container to be created would run; all of
// them must be allowed. An image that could not be bound has its Fault set. It
// never returns an empty list. It answers from containerd's records under ctx.
func (r *Resolver) Resolve(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image {
	img := imageOf(pod, ctr)
	if err := r.resolve(ctx, pod, ctr, &img); err != nil {
		if !errors.As(err, &img.Fault) {
			img.Fault = &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error()}
		}
	}
	return append([]verify.Image{img}, r.volumes(ctx, img.Pod, ctr)...)
}

// imageOf is what is known of a container's image before it is bound.
func imageOf(pod *api.PodSandbox, ctr *api.Container) verify.Image {
	return verify.Image{
		Asked: ctr.GetAnnotations()[annotationImage],
		Use:   verify.UseContainer,
		Pod: verify.Pod{
			Namespace: pod.GetNamespace(), Name: pod.GetName(), UID: pod.GetUid(), Container: ctr.GetName(),
		},
	}
}

// Known is Resolve where the runtime told the image and all else that it takes is
// remembered: containerd is not asked, and nothing is waited for. It returns
// false where that is not enough, or where the image cannot be bound.
func (r *Resolver) Known(pod *api.PodSandbox, ctr *api.Container) ([]verify.Image, bool) {
	if ctr.GetImage().GetDigest() == "" {
		return nil, false // the snapshot is looked at each time
	}
	images := r.Resolve(unasked, pod, ctr)
	for _, i := range images {
		if i.Fault != nil {
			return nil, false
		}
	}
	return images, true
}

// unasked has ended: Records fail under it at once.
var unasked = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

func (r *Resolver) resolve(ctx context.Context, pod *api.PodSandbox, ctr *api.Container, img *verify.Image) error {
	o := r.options.Load()
	img.Revision = o.Revision
	known, ok := r.parsed.Get(img.Asked)
	if img.Name = known.name; !ok {
		var err error
		if img.Name, err = o.ParseName(img.Asked); err != nil {
			return &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error() + "; name it as repository:tag or repository@digest"}
		}
	}
	if _, ok := ctr.GetAnnotations()[annotationRestored]; ok {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: "the container is restored from a checkpoint, which no signature covers"}
	}
	if err := r.shim(ctx, o, pod.GetId()); err != nil {
		return err
	}
	if !ok {
		record, err := o.ParseRecord(img.Asked)
		if err != nil {
			return &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error()}
		}
		known = parsed{img.Name, record}
		r.parsed.Add(img.Asked, known) // both took it, so that it is as short as references are
	}
	record := known.record
	var early prepared
	var snapshot sync.WaitGroup
	if s, ok := r.used.Get(handler(pod)); ok && ctr.GetImage().GetDigest() == "" {
		snapshot.Go(func() { early = r.prepared(ctx, s, ctr.GetId()) })
	}
	target, err := r.record(ctx, o, record, ctr.GetImage().GetDigest())
	snapshot.Wait()
	if errors.Is(err, ErrNotFound) {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: "no image record on this node has the name " + text.Quote(record, 200) + ", so it does not prove which policy applies; pull the image by that name"}
	}
	if err != nil {
		return err
	}
	c, err := r.follow(ctx, target)
	if err != nil {
		return err
	}
	img.Target, img.Manifest, img.Config = target, c.manifest, c.config
	if d := img.Name.Digest; d != "" && d != target.Digest && d != c.manifest.Digest {
		return &verify.Fault{Reason: verify.ImageMismatch, Detail: "the record " + text.Quote(record, 200) + " points to " + target.Digest.String() + ", another image than the digest that the pod names"}
	}
	var snapshotter string
	img.Binding, snapshotter, err = r.bind(ctx, o, handler(pod), ctr, target, c, early)
	// Where a snapshotter is only trusted because the configuration says so, what it
	// mounts may be the target's layers whatever the config says: only what was
	// resolved counts.
	if err == nil && slices.Contains(Snapshotters, snapshotter) {
		img.LayersVerified = true
		img.Related = r.related.of(c.config, target.Digest, c.manifest.Digest)
	}
	return err
}

// handler is the runtime handler of a pod's containers. A pod without one gets
// that of untrusted workloads by an annotation of its own, which the handler that
// the runtime tells does not show (GetSandboxRuntime in internal/cri/config).
func handler(pod *api.PodSandbox) string {
	if pod.GetAnnotations()[annotationUntrusted] == "true" {
		return "untrusted"
	}
	return pod.GetRuntimeHandler()
}

// record returns what the image record name points to. Where the runtime told the
// target's digest, a fresh proof of the same is enough.
func (r *Resolver) record(ctx context.Context, o *Options, name, told string) (ocispec.Descriptor, error) {
	now := o.Now()
	if p, ok := r.names.Get(name); ok && told != "" && p.target.Digest.String() == told {
		if age := now.Sub(p.at); 0 <= age && age < proofFor {
			return p.target, nil
		}
	}
	target, err := r.records.Image(ctx, name)
	if err == nil {
		r.names.Add(name, proof{target, now})
	}
	return target, err
}

// shim checks the runtime type of the pod.
func (r *Resolver) shim(ctx context.Context, o *Options, sandbox string) error {
	name, ok := r.runtime.Get(sandbox)
	if !ok {
		var err error
		if name, err = r.records.SandboxRuntime(ctx, sandbox); err != nil {
			return err
		}
		r.runtime.Add(sandbox, name)
	}
	if !slices.Contains(Runtimes, name) && !slices.Contains(o.Runtimes, name) {
		return &verify.Fault{Reason: verify.RuntimeUnverified, Detail: "the pod's runtime type " + text.Quote(name, 96) + " is not known to start what containerd prepared; list it under gate.runtimes if it does"}
	}
	return nil
}

func (c resolution) err() error {
	if c.fault != nil {
		return c.fault
	}
	return nil
}

func read(ctx context.Context, blob Reader, target ocispec.Descriptor) (resolution, error) {
	manifest, m, err := Select(ctx, blob, target)
	if err != nil {
		return resolution{}, err
	}
	raw, err := blob(ctx, m.Config)
	if err != nil {
		return resolution{}, err
	}
	diffs, err := rootfs(raw)
	if err != nil {
		return resolution{}, err
	}
	return resolution{manifest: manifest, config: m.Config.Digest, chain: identity.ChainID(diffs).String(), archived: archived(manifest, m)}, nil
}

// bind ties what the record leads to to the container that is being created, in a
// pod of that runtime handler. It returns the snapshotter too.
func (r *Resolver) bind(ctx context.Context, o *Options, handler string, ctr *api.Container, target ocispec.Descriptor, c resolution, early prepared) (verify.Binding, string, error) {
	image := ctr.GetImage()
	config, told := digest.Digest(image.GetConfigDigest()), image.GetConfigDigest() != "" && image.GetDigest() != ""
	if told && config != c.config {
		return 0, "", &verify.Fault{Reason: verify.ImageMismatch, Detail: "the container runs image ID " + text.Clean(config.String(), 96) + ", and the name that the pod gave leads to " + c.config.String()}
	}
	// The runtime resolved the very target that the record points to, and target
	// leads to the config: where the snapshotter checks what it unpacks, that is all
	// that there is to know. Which one it is follows from the runtime handler and the
	// runtime's configuration, and was seen once since it started.
	if told && digest.Digest(image.GetDigest()) == target.Digest {
		if s, ok := r.used.Get(handler); ok && !o.strange(s) {
			return verify.BoundRuntime, s, nil
		}
	}
	loaded, err := r.snapshotters(ctx, o)
	if err != nil {
		return 0, "", err
	}
	s, err := r.snapshot(ctx, o, loaded, ctr.GetId(), c.chain, early)
	if err != nil {
		return 0, "", err
	}
	r.used.Add(handler, s)
	if told {
		return verify.BoundRuntime, s, nil
	}
	// The chain ID binds the root filesystem. Images with equal layers can differ
	// in their config, which Started compares.
	if !r.compares.Load() {
		return 0, "", &verify.Fault{Reason: verify.ImageUnresolved, Detail: "the runtime does not say which image config it runs"}
	}
	return verify.BoundSnapshot, s, nil
}
