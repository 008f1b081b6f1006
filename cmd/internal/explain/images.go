package explain

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/verify"
)

// ImagesSchema is that of a List. Fields are added and never change.
const ImagesSchema = "tidewaiter.dev/images/v1"

// A List is every image of the node that a pod can name, in the order of names. One
// that was pulled by a tag is listed under that, and not by its digest once more.
type List struct {
	Schema string  `json:"schema"`
	Node   string  `json:"node"`
	Mode   string  `json:"mode"`
	Epoch  string  `json:"epoch"`
	More   bool    `json:"more"` // the node has more than are listed
	Images []Image `json:"images"`
}

// An Image is one of them with what enforce would answer to it now.
type Image struct {
	Image      string     `json:"image"`
	Target     string     `json:"target"` // digest of what the record points to
	Allowed    bool       `json:"allowed"`
	Reason     string     `json:"reason"`
	ID         string     `json:"id"`
	Rule       string     `json:"rule,omitempty"`
	Detail     string     `json:"detail,omitempty"`
	Signer     string     `json:"signer,omitempty"` // who met the rule
	Source     string     `json:"source,omitempty"`
	Until      *time.Time `json:"until,omitempty"`      // when an allow ends
	Ends       string     `json:"ends,omitempty"`       // what it is that ends: signature, certificate, or nothing, and it is only looked at again
	Resolved   string     `json:"resolved,omitempty"`   // of a list that is judged ahead: the mirror that said which image a tag leads to
	Namespaces []string   `json:"namespaces,omitempty"` // where a floor file lets it run whatever the reason says
}

// judging bounds what a whole list may take, besides what is answered from memory.
const (
	judging = 45 * time.Second
	workers = 2 // as many as verify at once
)

// List says what enforce would answer to each image of the node. What it cannot find
// out in time is PENDING.
func (x *Explainer) List(ctx context.Context) (*List, error) {
	s, f := x.Enforcer.Setup(), x.Force()
	if s == nil || f.Config == nil {
		return nil, errors.New("no configuration is in force, so that every image would be denied: tidewaiter status says why")
	}
	l := &List{Schema: ImagesSchema, Node: x.Node, Mode: s.Mode.String(), Epoch: s.Epoch.String(), Images: []Image{}}
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
	l.Images = make([]Image, len(images))
	ctx, cancel = context.WithTimeout(ctx, judging)
	defer cancel()
	floor := FloorOf(f.Config)
	todo := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range todo {
				l.Images[i] = x.row(ctx, images[i], floor)
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
func (x *Explainer) row(ctx context.Context, img verify.Image, floor Floor) Image {
	var d verify.Decision
	if ctx.Err() == nil {
		d = x.Enforcer.Verify(ctx, img)
	} else {
		d = verify.Deny(verify.Pending, "there was no time for it; ask again")
	}
	return Row(img, d, floor)
}

// Row is img with d, the answer to it, and where floor lets it run.
func Row(img verify.Image, d verify.Decision, floor Floor) Image {
	reason := enforced(d)
	r := d.Report(img, "")
	row := Image{
		Image: r.Image, Target: r.Target, Allowed: Allows(reason), Reason: reason.String(), ID: r.ID, Rule: verify.Clean(r.Rule, 256),
		Detail: verify.Clean(r.Detail, 300), Source: verify.Clean(r.Source, 256), Until: r.Until, Ends: r.Ends,
	}
	if reason == verify.Verified && len(d.Signers) > 0 {
		row.Signer = d.Signers[0].Subject
	}
	row.Namespaces = floor.in(img)
	return row
}

// A Floor is in which namespaces each digest may run without a signature.
type Floor map[string][]string

// FloorOf is that of a configuration.
func FloorOf(c *config.Config) Floor {
	m := Floor{}
	for _, l := range c.Floor {
		m[l.Digest.String()] = append(m[l.Digest.String()], l.Namespaces...)
	}
	return m
}

// in is where img may, or nil.
func (f Floor) in(img verify.Image) []string {
	digests := []string{img.Target.Digest.String(), img.Manifest.Digest.String()}
	if img.Vouched {
		digests = append(digests, img.Config.String())
	}
	var namespaces []string
	for _, at := range digests {
		namespaces = append(namespaces, f[at]...)
	}
	slices.Sort(namespaces)
	return slices.Compact(namespaces)
}

// AskImages asks the gate whose run directory is run for its List.
func AskImages(ctx context.Context, run string) (l List, err error) {
	err = control.Get(ctx, run, control.Question{Path: ImagesPath, Schema: ImagesSchema, Longest: longest + 5*time.Second, Bytes: maxAnswer}, &l)
	return l, err
}
