package reconcile

import (
	"cmp"
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
)

// scan brings items up to date with the node's image records. The error is containerd's.
func (s *Prefetch) scan(ctx context.Context) error {
	conns, o := s.Images.Connections(), s.Images.Options()
	list, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	records, err := s.Images.Records(list)
	if err != nil {
		return err
	}
	records, overflow := s.nearest(ctx, o, records)
	if many := len(overflow) > 0; many != s.many {
		if s.many = many; many {
			s.Log.Warn("the node has more images than are looked at ahead of time", "looked at", containerd.MaxImages, "others", len(overflow))
		}
	}
	for _, record := range records {
		// Those that are looked at are not to be forgotten for those that are not.
		if _, known := s.Images.Summary(record.Target); known || s.Marks.Skips(record.Target.Digest) {
			continue
		}
		s.learn(ctx, record.Target)
		if !pause(ctx, imagePause) {
			return nil
		}
	}
	if s.Listed != nil && s.summarize(ctx, overflow) {
		live := map[digest.Digest]bool{}
		note := func(target digest.Digest, leads containerd.Summary) {
			live[target] = true
			if leads != (containerd.Summary{}) {
				live[leads.Manifest], live[leads.Config] = true, true
			}
		}
		for target, leads := range s.overflow {
			note(target, leads)
		}
		for _, record := range records {
			leads, _ := s.Images.Summary(record.Target)
			note(record.Target.Digest, leads)
		}
		s.Listed(live)
	}
	afresh := conns != s.conns || o.Revision != s.revision
	var used map[string]bool
	if afresh {
		used = s.used(ctx, o)
	}
	s.turn++
	again := s.again.Swap(false)
	for _, record := range records {
		s.update(o, record, used)
	}
	for name, i := range s.items {
		if i.turn != s.turn {
			delete(s.items, name)
		} else if judged := i.skip && !s.Marks.Skips(i.record.Target.Digest); judged || o.Revision != s.revision || again && i.no {
			if judged {
				s.Log.Info("this image was judged: it is looked at ahead of time again", "target", i.record.Target.Digest.String())
			}
			i.asked, i.tries, i.skip = false, 0, false
		}
	}
	if s.Refresher != nil {
		s.Refresher.has(s.items, s.Marks.Skips)
	}
	s.conns, s.revision = conns, o.Revision
	if afresh && conns > 0 && s.Scanned != nil {
		s.Scanned()
	}
	return nil
}

// How an image stands to the configuration; see [containerd.Options].
const (
	byRepository = iota
	byHost
	byNothing
)

// orderOf returns how the configuration names an image.
func orderOf(o *containerd.Options, name verify.Name) int {
	if o.Named == nil {
		return byNothing
	}
	switch host, repository := o.Named(name); {
	case repository:
		return byRepository
	case host:
		return byHost
	}
	return byNothing
}

// nearest returns the records of the images that are looked at, which are as many as the
// resolver remembers, and the targets of the others. What runs is nearest,
// then what the configuration names, and then what sorts first.
func (s *Prefetch) nearest(ctx context.Context, o *containerd.Options, records []containerd.Record) (near []containerd.Record, overflow []ocispec.Descriptor) {
	slices.SortFunc(records, func(a, b containerd.Record) int { return cmp.Compare(a.Name, b.Name) }) // the same each time
	best := map[verify.Target]int{}
	var targets []ocispec.Descriptor
	for _, r := range records {
		if _, known := best[plain(r.Target)]; !known {
			best[plain(r.Target)] = byNothing
			targets = append(targets, r.Target)
		}
	}
	if len(targets) <= containerd.MaxImages {
		s.orders = nil
		return records, nil
	}
	used := s.used(ctx, o)
	known := s.orders
	s.orders = make(map[string]int, len(records)) // to parse a name is dear
	for _, r := range records {
		order, is := known[r.Name]
		if !is || o.Revision != s.revision {
			order = byNothing
			if name, can := o.Nameable(r.Name); can {
				order = orderOf(o, name)
			}
		}
		s.orders[r.Name] = order
		if used[r.Name] {
			order = -1
		}
		best[plain(r.Target)] = min(best[plain(r.Target)], order)
	}
	slices.SortStableFunc(targets, func(a, b ocispec.Descriptor) int { return cmp.Compare(best[plain(a)], best[plain(b)]) })
	overflow = targets[containerd.MaxImages:]
	for _, t := range overflow {
		delete(best, plain(t))
	}
	return slices.DeleteFunc(records, func(r containerd.Record) bool { _, is := best[plain(r.Target)]; return !is }), overflow
}

// summarize reads what the targets in list lead to, some of them each time, and forgets
// others. It reports whether all are known.
func (s *Prefetch) summarize(ctx context.Context, list []ocispec.Descriptor) bool {
	if len(list) > maxOverflow {
		return false
	}
	known := make(map[digest.Digest]containerd.Summary, len(list))
	left, whole := overflowBatch, true
	for _, target := range list {
		if leads, is := s.overflow[target.Digest]; is {
			known[target.Digest] = leads
			continue
		}
		if left--; left < 0 || ctx.Err() != nil {
			whole = false
			continue
		}
		leads := containerd.Summary{}
		if !s.Marks.Skips(target.Digest) {
			read, cancel := context.WithTimeout(ctx, readTimeout)
			found, is := s.Images.Summarize(read, target)
			cancel()
			if leads = found; !is {
				whole = false // containerd did not answer; the next scan asks again
				continue
			}
			pause(ctx, imagePause)
		}
		known[target.Digest] = leads
	}
	s.overflow = known
	if left < 0 {
		s.Wake()
	}
	return whole
}

func (s *Prefetch) learn(ctx context.Context, target ocispec.Descriptor) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	s.Images.Learn(ctx, target)
}

// used returns the records that containers which run were made from.
func (s *Prefetch) used(ctx context.Context, o *containerd.Options) map[string]bool {
	names := map[string]bool{}
	if s.Node == nil {
		return names
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	// What cannot be listed has its turn later.
	_ = s.Node.Running(ctx, func(c containerd.Container) bool {
		if name, err := o.ParseRecord(c.Image); err == nil {
			names[name] = true
		}
		return len(names) < containerd.MaxImages
	})
	return names
}

// update notes what record points to. One that no pod can name is none to verify.
func (s *Prefetch) update(o *containerd.Options, record containerd.Record, used map[string]bool) {
	i := s.items[record.Name]
	if i != nil && plain(i.record.Target) == plain(record.Target) {
		i.turn = s.turn
	} else {
		name, can := o.Nameable(record.Name)
		if !can {
			return
		}
		i = &item{name: name, record: record, turn: s.turn, rank: rankNew}
		if s.turn == 1 {
			i.rank = rankRest
		}
		s.items[record.Name] = i
	}
	i.order = orderOf(o, i.name)
	if used[record.Name] && i.rank == rankRest {
		i.rank = rankUsed
	}
}

func plain(d ocispec.Descriptor) verify.Target {
	return verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}
