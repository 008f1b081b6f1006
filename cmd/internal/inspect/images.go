package inspect

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// judging bounds what a whole list may take, besides what is answered from memory.
const (
	judging       = 45 * time.Second
	workers       = 2    // as many as verify at once
	maxContainers = 4096 // whose images are looked for
	maxTooLong    = 100
)

// List says what enforce would answer to each image of the node. What it cannot find
// out in time is PENDING.
func (x *Explainer) List(ctx context.Context) (*control.Images, error) {
	s, f := x.Decider.Snapshot(), x.Active()
	if s == nil || f.Config == nil {
		return nil, errors.New("no configuration is in force, so that every image would be denied: tidewaiter status says why")
	}
	l := &control.Images{Schema: control.ImagesSchema, Node: x.Node, Mode: s.Mode.String(), Revision: s.Revision.String(), List: []control.Image{}}
	var images []verify.Image
	list, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	err := x.Images.Listed(list, func(img verify.Image) bool {
		if l.More = len(images) == maxImages; !l.More {
			images = append(images, img)
		}
		return !l.More
	})
	if err != nil {
		return nil, runtimeError(err)
	}
	images = once(images)
	l.List = make([]control.Image, len(images))
	ctx, cancel = context.WithTimeout(ctx, judging)
	defer cancel()
	allowlist := AllowlistOf(f.Config)
	runs, err := x.runs(list, func(c containerd.Container) {
		if len(l.TooLong) < maxTooLong {
			l.TooLong = append(l.TooLong, text.Clean(c.Pod.Namespace+"/"+c.Pod.Name+" "+c.Pod.Container+": "+c.Long, maxQuoted))
		}
	})
	if err != nil {
		l.Unseen = text.Clean(err.Error(), maxQuoted)
	}
	todo := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range todo {
				l.List[i] = x.row(ctx, images[i], allowlist)
				l.List[i].Runs = runs.of(images[i])
			}
		})
	}
	for i := range images {
		todo <- i
	}
	close(todo)
	wg.Wait()
	return l, nil
}

// once leaves out the second name that the runtime gives to an image which was pulled
// by a tag: the same repository with the digest. No rule looks at a tag, so that the
// answer is the same.
func once(images []verify.Image) []verify.Image {
	type content struct {
		repository string
		target     digest.Digest
	}
	tagged := map[content]bool{}
	for _, i := range images {
		if i.Name.Tag != "" {
			tagged[content{i.Name.Repository(), i.Target.Digest}] = true
		}
	}
	return slices.DeleteFunc(images, func(i verify.Image) bool {
		return i.Name.Tag == "" && tagged[content{i.Name.Repository(), i.Target.Digest}]
	})
}

// row is what enforce would answer to img.
func (x *Explainer) row(ctx context.Context, img verify.Image, allowlist Allowlist) control.Image {
	var d verify.Decision
	if ctx.Err() == nil {
		d = x.Decider.Verify(ctx, img)
	} else {
		d = verify.Deny(verify.Pending, "there was no time for it; ask again")
	}
	return Row(img, d, allowlist)
}

// Row is img with d, the answer to it, and where allowlist lets it run.
func Row(img verify.Image, d verify.Decision, allowlist Allowlist) control.Image {
	reason := d.EnforceReason()
	r := d.Report(img, "")
	row := control.Image{
		Image: r.Image, Target: r.Target, Manifest: r.Manifest, Config: r.Config, Allowed: reason.Allows(), Reason: reason.String(), ID: r.ID, Rule: text.Clean(r.Rule, 256),
		Detail: text.Clean(r.Detail, 300), Source: text.Clean(r.Source, 256), Until: r.Until, Ends: r.Ends,
	}
	if reason == verify.Verified && len(d.Signers) > 0 {
		row.Signer = d.Signers[0].Subject
	}
	row.Namespaces = allowlist.in(img)
	row.NotImage = img.Fault != nil && img.Fault.Reason == verify.NotAnImage
	return row
}

// runs has the namespaces in which a digest runs, or a name of which no more is known.
type runs map[string][]string

// runs looks at all containers as the sweep does, image volumes included. With an
// error there may be more than it returns. Those that are too long go to long.
func (x *Explainer) runs(ctx context.Context, long func(containerd.Container)) (runs, error) {
	r, seen, all := runs{}, 0, true
	err := x.Containers.Running(ctx, func(c containerd.Container) bool {
		if seen++; seen > maxContainers || ctx.Err() != nil {
			all = false
			return false
		}
		if c.Long != "" && c.Kind == containerd.KindContainer {
			long(c)
		}
		images, err := x.Images.Running(ctx, c)
		if c.Err != nil || err != nil && !errors.Is(err, containerd.ErrGone) {
			all = false
			return true
		}
		namespace := c.Pod.Namespace
		if c.Kind == containerd.KindSandbox {
			namespace = policy.DefaultNamespace // one line is to do for the pause image, which no pod names
		}
		for _, img := range images {
			r.add(img.Target.Digest.String(), namespace)
			r.add(img.Manifest.Digest.String(), namespace)
			if img.Target.Digest == "" { // not bound, as under a runtime that is not known
				r.add(img.Name.String(), namespace)
			}
		}
		return true
	})
	if err == nil && !all {
		err = errors.New("not every container could be looked at")
	}
	return r, err
}

func (r runs) add(key, namespace string) {
	if namespace = text.Clean(namespace, 63); key != "" && !slices.Contains(r[key], namespace) {
		r[key] = append(r[key], namespace)
	}
}

// of returns where img runs, under whatever name, in order.
func (r runs) of(img verify.Image) []string {
	list := slices.Concat(r[img.Target.Digest.String()], r[img.Manifest.Digest.String()], r[img.Name.String()])
	slices.Sort(list)
	return slices.Compact(list)
}

// A Allowlist is in which namespaces each digest may run without a signature.
type Allowlist map[string][]string

// AllowlistOf is that of a configuration.
func AllowlistOf(c *config.Config) Allowlist {
	m := Allowlist{}
	for _, l := range c.AllowDigests {
		m[l.Digest.String()] = append(m[l.Digest.String()], l.Namespaces...)
	}
	return m
}

// in is where img may, or nil.
func (f Allowlist) in(img verify.Image) []string {
	digests := []string{img.Target.Digest.String(), img.Manifest.Digest.String()}
	if img.LayersVerified {
		digests = append(digests, img.Config.String())
	}
	var namespaces []string
	for _, at := range digests {
		namespaces = append(namespaces, f[at]...)
	}
	slices.Sort(namespaces)
	return slices.Compact(namespaces)
}
