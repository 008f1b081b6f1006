package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A prepared is what a snapshotter said of the root filesystem of a container. The
// zero prepared is of none.
type prepared struct {
	snapshotter string
	snapshot    Snapshot
	err         error
}

// prepared asks one snapshotter. A panic is an error: it may run on a goroutine of
// its own.
func (r *Resolver) prepared(ctx context.Context, snapshotter, id string) (p prepared) {
	p.snapshotter = snapshotter
	defer func() {
		if v := recover(); v != nil {
			p.err = fmt.Errorf("panic while asking for a snapshot: %v", v)
		}
	}()
	p.snapshot, p.err = r.records.Snapshot(ctx, snapshotter, id)
	return p
}

// snapshot checks that the root filesystem prepared for the container has the
// chain ID, and that its snapshotter, which it returns, can be believed about that.
// What early says is not asked again.
func (r *Resolver) snapshot(ctx context.Context, o *Options, loaded []string, id, chain string, early prepared) (string, error) {
	for _, s := range loaded {
		p := early
		if p.snapshotter != s {
			p = r.prepared(ctx, s, id)
		}
		snapshot, err := p.snapshot, p.err
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		if o.strange(s) {
			return "", &verify.Fault{Reason: verify.SnapshotterUnverified, Detail: "the snapshotter " + text.Quote(s, 64) + " is not known to check what it mounts; list it under gate.snapshotters to trust it"}
		}
		// A snapshot of nothing has no parent, and one without ID maps no remapped name.
		if p := snapshot.Parent; p != "" && (p == chain || p == remapped(chain, snapshot.Labels)) {
			return s, nil
		}
		return "", &verify.Fault{Reason: verify.ImageMismatch, Detail: "the container's root filesystem is " + text.Clean(snapshot.Parent, 96) + ", not that of the image that the pod names (" + chain + ")"}
	}
	return "", &verify.Fault{Reason: verify.ImageUnresolved, Detail: "no snapshotter has the container's root filesystem"}
}

// remapped returns the name of the copy that containerd makes of a chain for a
// user namespace, on snapshotters that cannot remap IDs themselves
// (client/snapshotter_opts_unix.go, remappedSnapshot.ID), or "" where the
// snapshot has no user namespace. That the copy's own parent is the chain would
// prove nothing: so it is for any image with one more layer.
func remapped(chain string, labels map[string]string) string {
	uids, err := idMap(labels["containerd.io/snapshot/uidmapping"])
	if err != nil {
		return ""
	}
	gids, err := idMap(labels["containerd.io/snapshot/gidmapping"])
	if err != nil {
		return ""
	}
	type maps struct{ UidMap, GidMap []mapping }
	raw, err := json.Marshal(struct {
		Parent string
		IDMap  maps
	}{chain, maps{uids, gids}})
	if err != nil {
		return ""
	}
	return digest.FromBytes(raw).String()
}

// A mapping is one line of a user namespace's ID map, in the JSON form of the
// OCI runtime specification.
type mapping struct {
	ContainerID uint32 `json:"containerID"`
	HostID      uint32 `json:"hostID"`
	Size        uint32 `json:"size"`
}

// maxMappings is what the kernel takes in a user namespace.
const maxMappings = 340

func idMap(label string) ([]mapping, error) {
	if label == "" {
		return nil, errors.New("no ID map")
	}
	parts := strings.Split(label, ",")
	if len(parts) > maxMappings {
		return nil, errors.New("too many ID maps")
	}
	list := make([]mapping, len(parts))
	for i, p := range parts {
		if _, err := fmt.Sscanf(p, "%d:%d:%d", &list[i].ContainerID, &list[i].HostID, &list[i].Size); err != nil {
			return nil, fmt.Errorf("ID map %s: %w", text.Quote(p, 40), err)
		}
	}
	slices.SortStableFunc(list, func(a, b mapping) int { return cmp.Compare(a.ContainerID, b.ContainerID) })
	return list, nil
}

// strange reports whether nothing vouches for a snapshotter.
func (o *Options) strange(s string) bool {
	return !slices.Contains(Snapshotters, s) && !slices.Contains(o.Snapshotters, s)
}

// snapshotters lists the snapshotters of the connected containerd, those that
// containerd itself vouches for first.
func (r *Resolver) snapshotters(ctx context.Context, o *Options) ([]string, error) {
	if l := r.loaded.Load(); l != nil {
		return *l, nil
	}
	l, err := r.records.Snapshotters(ctx)
	if err != nil {
		return nil, err
	}
	rank := func(s string) int {
		if i := slices.Index(Snapshotters, s); i >= 0 {
			return i
		}
		return len(Snapshotters)
	}
	slices.SortStableFunc(l, func(a, b string) int { return rank(a) - rank(b) })
	r.loaded.Store(&l)
	return l, nil
}
