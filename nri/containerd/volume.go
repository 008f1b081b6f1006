package containerd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// maxVolumes bounds the images that are mounted into one container.
const maxVolumes = 16

// imageVolume is where containerd's CRI plugin mounts an image for a pod, and what
// may follow where a part of it is asked for (internal/cri/server/helpers.go,
// getImageVolumeHostPath). The second group is the digest of the target that it
// was resolved to, which proves nothing.
var imageVolume = regexp.MustCompile(`^(.*?/image-volumes/[0-9a-f]{64}/([0-9a-f]{64,128}))(/|$)`)

// like is the least that such a path has: what looks like one and is none is
// refused, not ignored.
var like = regexp.MustCompile(`/image-volumes/[0-9a-f]{64}(/|$)`)

// volumes returns the images that are mounted into the container as volumes: they
// run, or are read by what runs. Those that could not be bound have their Fault set.
func (r *Resolver) volumes(ctx context.Context, pod verify.Pod, ctr *api.Container) []verify.Image {
	var list []verify.Image
	var seen []string
	records := sync.OnceValues(func() ([]Record, error) { return r.records.Images(ctx) })
	for _, m := range ctr.GetMounts() {
		source := m.GetSource()
		if !strings.Contains(source, "/image-volumes/") || !like.MatchString(source) {
			continue
		}
		path := imageVolume.FindStringSubmatch(source)
		if path != nil && slices.Contains(seen, path[1]) {
			continue // the same image at another place
		}
		img := verify.Image{
			Asked: "image volume at " + m.GetDestination(),
			Use:   verify.UseVolume, Binding: verify.BoundSnapshot, Pod: pod,
		}
		var err error
		switch {
		case len(list) == maxVolumes:
			err = unverified("more than %d images are mounted as volumes", maxVolumes)
		case path == nil:
			err = unverified("what is mounted at %s is in the place of image volumes and none", text.Quote(m.GetDestination(), 120))
		default:
			seen = append(seen, path[1])
			err = r.volume(ctx, path[1], path[2], records, &img)
		}
		if err != nil && !errors.As(err, &img.Fault) {
			img.Fault = unverified("%s", err.Error())
		}
		if list = append(list, img); len(list) > maxVolumes {
			break
		}
	}
	return list
}

func unverified(format string, args ...any) *verify.Fault {
	return &verify.Fault{Reason: verify.ImageVolumeUnverified, Detail: fmt.Sprintf(format, args...)}
}

// volume binds what is mounted at dir, which is also the key of its snapshot: the
// snapshot's parent is the chain ID of the root filesystem that is seen there. The
// runtime tells no name. Those that the node knows the content by are the ones
// that a pod's author could have written, and one that is allowed is enough.
func (r *Resolver) volume(ctx context.Context, dir, encoded string, list func() ([]Record, error), img *verify.Image) error {
	o := r.options.Load()
	img.Revision = o.Revision
	snapshotter, snapshot, err := r.mounted(ctx, o, dir)
	if err != nil {
		return err
	}
	if o.strange(snapshotter) {
		return &verify.Fault{Reason: verify.SnapshotterUnverified, Detail: "the snapshotter " + text.Quote(snapshotter, 64) + " of an image volume is not known to check what it mounts; list it under gate.snapshotters to trust it"}
	}
	records, err := list()
	if err != nil {
		return err
	}
	// The target that the path names goes first. Of others only what was looked at
	// before counts: there may be hundreds, and the node waits.
	slices.SortStableFunc(records, func(a, b Record) int {
		return cmp.Or(first(a, encoded)-first(b, encoded), cmp.Compare(a.Name, b.Name))
	})
	var found resolution
	var names []verify.Name
	for _, rec := range records {
		l, ok := r.resolutions.Peek(plain(rec.Target))
		if !ok && first(rec, encoded) == 0 {
			if l, err = r.follow(ctx, rec.Target); err != nil {
				return err
			}
			ok = true
		}
		p := snapshot.Parent
		if !ok || l.fault != nil || p == "" || p != l.chain && p != remapped(l.chain, snapshot.Labels) {
			continue
		}
		name, err := o.ParseName(rec.Name)
		if err != nil || name.Digest != "" && name.Digest != rec.Target.Digest && name.Digest != l.manifest.Digest {
			continue // an image ID, or a record that says other than it leads to
		}
		if img.Target.Digest == "" {
			found = l
			img.Target, img.Manifest, img.Config = rec.Target, l.manifest, l.config
		}
		// A name of other content with the same layers is one of the volume as well, but
		// not of the config that the key of the answer has.
		if len(names) <= verify.MaxNames && l.config == found.config && !slices.ContainsFunc(names, func(n verify.Name) bool { return n.Repository() == name.Repository() }) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return unverified("no named image on this node leads to the root filesystem that is mounted as a volume (%s)", text.Clean(snapshot.Parent, 96))
	}
	img.Name, img.Names = names[0], names[1:]
	if slices.Contains(Snapshotters, snapshotter) {
		img.LayersVerified = true
		img.Related = r.related.of(img.Config, img.Target.Digest, img.Manifest.Digest)
	}
	return nil
}

// first sorts records of the target that a path names before others.
func first(r Record, encoded string) int {
	if _, e, ok := strings.Cut(r.Target.Digest.String(), ":"); ok && e == encoded {
		return 0
	}
	return 1
}

// mounted returns the snapshot of that key and who has it.
func (r *Resolver) mounted(ctx context.Context, o *Options, key string) (string, Snapshot, error) {
	loaded, err := r.snapshotters(ctx, o)
	if err != nil {
		return "", Snapshot{}, err
	}
	for _, name := range loaded {
		s, err := r.records.Snapshot(ctx, name, key)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		return name, s, err
	}
	return "", Snapshot{}, unverified("no snapshotter has what is mounted at %s", text.Quote(key, 200))
}
