package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// confirmed is when a subscription certainly counts: containerd does not say.
const confirmed = 2 * time.Second

// Watch calls changed when image records may have come or moved, and at once. It returns
// when that is not known any more, with an error. containerd sends only what matches, and
// what it sends says no more than that the list is to be looked at: however many events
// there are, nothing grows here.
func (c *Containerd) Watch(ctx context.Context, changed func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	const in = "namespace==" + Namespace + ",topic=="
	s, err := eventsapi.NewEventsClient(c.conn).Subscribe(ctx, &eventsapi.SubscribeRequest{
		Filters: []string{in + `"/images/create"`, in + `"/images/update"`},
	})
	if err != nil {
		return wrap("events of images", err)
	}
	changed()
	defer time.AfterFunc(confirmed, changed).Stop()
	for {
		if _, err := s.Recv(); err != nil {
			return wrap("events of images", err)
		}
		changed()
	}
}

// A Kind says what containerd's CRI plugin made a container for.
type Kind string

// Kinds of containers.
const (
	KindContainer Kind = "container"
	KindSandbox   Kind = "sandbox" // a pod's pause container
	KindForeign   Kind = ""        // not made through CRI
)

// A Container is one that runs, as containerd's own record has it.
type Container struct {
	ID          string
	Kind        Kind
	Image       string // what the pod wrote; of a sandbox, what the runtime's configuration says
	Pod         verify.Pod
	Config      digest.Digest // of the image that it was created from; only of KindContainer
	Runtime     string        // runtime type
	Snapshotter string
	Mounts      []string // where its mounts come from, those of image volumes alone
	Long        string   // why the gate would refuse it as too long (POD_TOO_LARGE); empty: it would not

	Err error // the record could not be read; ID is all that is known
}

// Labels and annotations of containerd's CRI plugin
// (internal/cri/labels/labels.go, internal/cri/annotations/annotations.go).
const (
	labelKind           = "io.cri-containerd.kind"
	annotationPause     = "io.kubernetes.cri.podsandbox.image-name"
	annotationNamespace = "io.kubernetes.cri.sandbox-namespace"
	annotationPod       = "io.kubernetes.cri.sandbox-name"
	annotationUID       = "io.kubernetes.cri.sandbox-uid"
	annotationContainer = "io.kubernetes.cri.container-name"
)

// Running hands over the containers that run, pods' sandboxes included, one at a time,
// until yield returns false. The list holds no more than IDs; the records,
// each of which has the environment of its container twice, are read one by one.
func (c *Containerd) Running(ctx context.Context, yield func(Container) bool) error {
	list, err := tasksapi.NewTasksClient(c.conn).List(inNamespace(ctx), &tasksapi.ListTasksRequest{})
	if err != nil {
		return wrap("tasks", err)
	}
	for _, t := range list.GetTasks() {
		switch t.GetStatus() {
		case task.Status_RUNNING, task.Status_PAUSED, task.Status_PAUSING:
		default:
			continue
		}
		found, err := c.Container(ctx, t.GetID())
		if errors.Is(err, ErrNotFound) {
			continue // it ended meanwhile
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if found.Err = err; !yield(found) {
			return nil
		}
	}
	return nil
}

// Container returns the record of one container. With an error its ID is all that
// is sure.
func (c *Containerd) Container(ctx context.Context, id string) (Container, error) {
	r, err := c.containers.Get(inNamespace(ctx), &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return Container{ID: id}, wrap("container "+text.Quote(id, 96), err)
	}
	return running(r.GetContainer())
}

// running reads a record.
func running(c *containersapi.Container) (Container, error) {
	r := Container{
		ID: c.GetID(), Kind: KindForeign, Image: c.GetImage(),
		Runtime: c.GetRuntime().GetName(), Snapshotter: c.GetSnapshotter(),
	}
	var spec struct {
		Annotations map[string]string
		Mounts      []struct{ Source string }
	}
	if err := json.Unmarshal(c.GetSpec().GetValue(), &spec); err != nil {
		return r, errors.New("the spec of the container cannot be read")
	}
	// No less than NRI would tell, so that none is missed.
	if n := lengthOf(c).Size - tally.Rest; c.GetLabels()[labelKind] != "" && n > tally.MaxTold {
		r.Long = tally.TooLong(n)
	}
	a := spec.Annotations
	r.Pod = verify.Pod{Namespace: a[annotationNamespace], Name: a[annotationPod], UID: a[annotationUID], Container: a[annotationContainer]}
	for _, m := range spec.Mounts {
		if like.MatchString(m.Source) {
			r.Mounts = append(r.Mounts, m.Source)
		}
	}
	switch Kind(c.GetLabels()[labelKind]) {
	case KindSandbox:
		r.Kind, r.Image = KindSandbox, a[annotationPause]
		if r.Image == "" {
			r.Image = c.GetImage()
		}
	case KindContainer:
		r.Kind, r.Image = KindContainer, a[annotationImage]
		var err error
		if r.Config, err = imageRef(c.GetExtensions()[criMetadata].GetValue()); err != nil {
			return r, err
		}
	}
	return r, nil
}

// ErrGone says that the node has no image record any more of what a container runs.
var ErrGone = errors.New("no image record on this node leads to what the container runs")

// Running binds what runs to images, with the container's own snapshot as Resolve
// does. The name may have moved on to another image since the container was made:
// then the record that leads to what runs is looked for, and judged under the name
// that was asked for. The first image is the container's own, further ones are its
// volumes; all are UseAhead. The error is ErrGone where the records that lead to
// it are not there any more, and then nothing can be said.
func (r *Resolver) Running(ctx context.Context, c Container) ([]verify.Image, error) {
	o := r.options.Load()
	img := verify.Image{Asked: c.Image, Use: verify.UsePrefetch, Pod: c.Pod, Revision: o.Revision}
	err := r.running(ctx, o, c, &img)
	if errors.Is(err, ErrGone) {
		return []verify.Image{img}, err
	}
	if err != nil {
		img.Fault = faultOf(err)
	}
	images := []verify.Image{img}
	if len(c.Mounts) > 0 {
		ctr := &api.Container{}
		for _, m := range c.Mounts {
			ctr.Mounts = append(ctr.Mounts, &api.Mount{Source: m, Destination: m})
		}
		images = append(images, r.volumes(ctx, c.Pod, ctr)...)
	}
	return images, nil
}

func (r *Resolver) running(ctx context.Context, o *Options, c Container, img *verify.Image) error {
	if c.Err != nil {
		return c.Err
	}
	var err error
	if img.Name, err = o.ParseName(c.Image); err != nil {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error()}
	}
	if !slices.Contains(Runtimes, c.Runtime) && !slices.Contains(o.Runtimes, c.Runtime) {
		return &verify.Fault{Reason: verify.RuntimeUnverified, Detail: "the pod's runtime type " + text.Quote(c.Runtime, 96) + " is not known to start what containerd prepared"}
	}
	if o.strange(c.Snapshotter) {
		return &verify.Fault{Reason: verify.SnapshotterUnverified, Detail: "the snapshotter " + text.Quote(c.Snapshotter, 64) + " is not known to check what it mounts"}
	}
	// What was allowed, where the runtime said only afterwards what it created, and
	// let it start when the comparison did not answer.
	if allowed, ok := r.decided.Peek(c.ID); ok && c.Kind == KindContainer && len(allowed) > 0 && !slices.Contains(allowed, c.Config) {
		return &verify.Fault{Reason: verify.ImageMismatch, Detail: "the container was created from image ID " + c.Config.String() + " and allowed as " + allowed[0].String() + ": the name moved while it was created"}
	}
	snapshot, err := r.records.Snapshot(ctx, c.Snapshotter, c.ID)
	if err != nil {
		return err
	}
	chain, err := r.find(ctx, o, c, snapshot, img)
	if err != nil {
		return err
	}
	if p := snapshot.Parent; p == "" || p != chain && p != remapped(chain, snapshot.Labels) {
		return &verify.Fault{Reason: verify.ImageMismatch, Detail: "the container's root filesystem is " + text.Clean(p, 96) + ", not that of the image that it was created from (" + chain + ")"}
	}
	img.Binding = verify.BoundSnapshot
	if slices.Contains(Snapshotters, c.Snapshotter) {
		img.LayersVerified = true
		img.Related = r.related.of(img.Config, img.Target.Digest, img.Manifest.Digest)
	}
	return nil
}

// find finds the record that leads to what c runs, and returns its chain ID.
func (r *Resolver) find(ctx context.Context, o *Options, c Container, s Snapshot, img *verify.Image) (chain string, err error) {
	name, err := o.ParseRecord(c.Image)
	if err != nil {
		return "", &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error()}
	}
	target, err := r.records.Image(ctx, name)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return "", err
	}
	var moved *verify.Fault // what the name leads to now cannot be read
	if err == nil {
		l, err := r.unread(ctx, target)
		// A sandbox's record does not say the config.
		if err == nil && (l.config == c.Config || c.Config == "" && l.runs(s)) {
			return l.chain, r.aim(ctx, target, img)
		}
		if err != nil && !errors.As(err, &moved) {
			return "", err
		}
	}
	if c.Config == "" {
		return "", ErrGone
	}
	for _, other := range r.related.of(c.Config) {
		l, err := r.unread(ctx, other)
		if err == nil && l.config == c.Config && r.aim(ctx, other, img) == nil {
			return l.chain, nil
		}
	}
	*img = verify.Image{Name: img.Name, Asked: img.Asked, Use: img.Use, Pod: img.Pod, Revision: img.Revision}
	return "", ErrGone
}

// runs reports whether s was prepared from what l leads to.
func (l resolution) runs(s Snapshot) bool {
	return s.Parent != "" && (s.Parent == l.chain || s.Parent == remapped(l.chain, s.Labels))
}

// Stop has the CRI plugin stop a container, so that the kubelet learns of it: with
// SIGTERM, or the signal that the image names, and with SIGKILL after grace.
func (c *Containerd) Stop(ctx context.Context, id string, grace time.Duration) error {
	// runtime.v1.StopContainerRequest: container_id is field 1 and timeout, in seconds,
	// 2. CRI's own Go package would add its whole API, 0.6 MB of it in memory at start,
	// for these two. A message keeps fields that it does not know, and sends them.
	b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), uint64(max(grace, 0)/time.Second))
	if _, err := c.cri(ctx, "StopContainer", b); err != nil {
		return fmt.Errorf("container %s: %w", text.Quote(id, 96), err)
	}
	return nil
}
