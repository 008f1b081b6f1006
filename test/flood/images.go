package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A kind of images. All of a kind get the same answer once the mirror is well.
type kind struct {
	name   string
	host   string        // of the registry that holds them
	weight int           // how often they are asked for, against the others
	reason verify.Reason // Verified for those that may run
	attach func(context.Context, *fixture, *node.Image) error

	outside bool // the trust policy does not name them
}

// The hosts in the names of images. All images are on the node before the flood
// begins.
const (
	mirrored  = "registry.example"  // the gate asks the mirror that fails, which holds all of it
	elsewhere = "elsewhere.example" // the gate asks the same mirror, which holds nothing of it
	gone      = "gone.example"      // the gate's mirror does not listen
)

var kinds = []kind{
	{name: "good", host: mirrored, weight: 6, reason: verify.Verified, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		_, err := f.mirror.Sign(ctx, i, f.release)
		return err
	}},
	{name: "good, a stranger's signature beside", host: mirrored, weight: 2, reason: verify.Verified, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		_, err := f.mirror.Sign(ctx, i, f.stranger)
		if err == nil {
			_, err = f.mirror.Sign(ctx, i, f.release)
		}
		return err
	}},
	{name: "unsigned", host: mirrored, weight: 4, reason: verify.SignatureMissing},
	{name: "unknown: not in the mirror", host: elsewhere, weight: 2, reason: verify.SourceNoReferrers},
	{name: "unknown: no mirror there", host: gone, weight: 2, reason: verify.SourceUnreachable},
	{name: "unknown: not in the trust policy", host: mirrored, weight: 2, reason: verify.PolicyNoMatch, outside: true, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		_, err := f.mirror.Sign(ctx, i, f.release)
		return err
	}},
	{name: "signed by another authority", host: mirrored, weight: 2, reason: verify.SignerUntrusted, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		_, err := f.mirror.Sign(ctx, i, f.stranger)
		return err
	}},
	{name: "signed by another identity", host: mirrored, weight: 2, reason: verify.IdentityMismatch, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		_, err := f.mirror.Sign(ctx, i, f.intern)
		return err
	}},
	{name: "good signature of another image", host: mirrored, weight: 2, reason: verify.SignatureInvalid, attach: func(ctx context.Context, f *fixture, i *node.Image) error {
		a := notarytest.Manifest(f.borrowed.Envelope.Content, notary.MediaTypeJWS, i.Target, notarytest.ConfigType)
		return f.mirror.Attach(ctx, i, a, node.AttachOptions{})
	}},
}

func (k *kind) good() bool { return k.reason == verify.Verified }

// An image is one that is on the node.
type image struct {
	*node.Image
	kind       *kind
	id         string // what a kubelet sends
	word       string // what its container prints
	repository string // without the host
}

// A fixture is a node whose images are pulled, and what the gate trusts.
type fixture struct {
	node   *node.Node
	mirror *node.Registry
	others []*node.Registry
	config string // the gate's configuration directory
	images []image

	release, intern, stranger *notarytest.Signer
	borrowed                  notarytest.Artifact
}

// newFixture starts a node below nodes with so many images of each kind. dir is
// where the gate's configuration is written.
func newFixture(ctx context.Context, version, nodes, dir string, images int, patience time.Duration, log func(string, ...any)) (_ *fixture, err error) {
	acme, rival := notarytest.NewCA(notarytest.CAOptions{Intermediates: 1}), notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
	leaf := func(ca *notarytest.CA, name string) *notarytest.Signer {
		return ca.Leaf(notarytest.CertOptions{Subject: notarytest.Name(name)})
	}
	f := &fixture{config: dir, release: leaf(acme, "release"), intern: leaf(acme, "intern"), stranger: leaf(rival, "release")}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.stop())
		}
	}()
	registries := map[string]*node.Registry{}
	for _, host := range []string{mirrored, elsewhere, gone} {
		r, err := node.NewRegistry(host, node.RegistryOptions{})
		if err != nil {
			return nil, err
		}
		registries[host] = r
		f.others = append(f.others, r)
	}
	f.mirror = registries[mirrored]
	// The node requires the gate from the beginning; the pause image needs no answer.
	f.node, err = node.Start(ctx, node.Options{ContainerdVersion: version, Dir: nodes, Required: true, RequestTimeout: patience, Log: writer(log)})
	if err != nil {
		return nil, err
	}
	if err := f.node.Use(f.others...); err != nil {
		return nil, err
	}
	lender, err := f.mirror.Push(ctx, "lender:1", node.ImageOptions{Word: "lender"})
	if err != nil {
		return nil, err
	}
	if f.borrowed, err = f.mirror.Sign(ctx, lender, f.release); err != nil {
		return nil, err
	}

	f.images = make([]image, len(kinds)*images)
	statement := notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")
	statement.Scopes = nil
	for i := range f.images {
		k := &kinds[i%len(kinds)]
		f.images[i] = image{kind: k, word: fmt.Sprintf("image %d", i), repository: fmt.Sprintf("team%d/app%d", i%len(kinds), i)}
		if !k.outside {
			statement.Scopes = append(statement.Scopes, k.host+"/"+f.images[i].repository)
		}
	}
	if err := f.fill(ctx, registries, log); err != nil {
		return nil, err
	}

	// Nobody listens on the port of a registry that was stopped: it keeps it.
	if err := registries[gone].Stop(); err != nil {
		return nil, err
	}
	return f, node.WriteConfig(dir, node.Config{
		Mode: "enforce",
		Mirrors: []node.Mirror{
			f.mirror.Mirror(), {Host: elsewhere, URL: f.mirror.URL()}, registries[gone].Mirror(),
		},
		Stores:     notarytest.Stores{"ca/acme/root.crt": acme.PEM()},
		Statements: []verify.Statement{statement},
		// A mirror that hangs is given up sooner than by default, so that more of the
		// flood meets verifications at work than a queue of them.
		More: map[string]any{"limits": map[string]any{"timeout": "1s"}},
	})
}

// fill makes, signs and pulls the images.
func (f *fixture) fill(ctx context.Context, registries map[string]*node.Registry, log func(string, ...any)) error {
	var wg sync.WaitGroup
	errs := make([]error, len(f.images))
	slots := make(chan struct{}, 4)
	for i := range f.images {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			m := &f.images[i]
			// Every form in which images come, and pairs with one root filesystem.
			o := node.ImageOptions{Word: m.word, Index: i/len(kinds)%2 == 0, Docker: i/len(kinds)%3 == 2}
			if i/len(kinds)%4 == 3 {
				o.Files = map[string]string{"/own": m.word}
			}
			img, err := registries[m.kind.host].Push(ctx, m.repository+":1", o)
			if err == nil && m.kind.attach != nil {
				err = m.kind.attach(ctx, f, img)
			}
			if err == nil {
				m.Image = img
				m.id, err = f.node.PullImage(ctx, img.Name)
			}
			errs[i] = err
		})
		if i%100 == 99 {
			log("%d images of %d are on the node", i+1, len(f.images))
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (f *fixture) stop() (err error) {
	if f.node != nil {
		err = f.node.Stop()
	}
	for _, r := range f.others {
		err = errors.Join(err, r.Stop())
	}
	return err
}

// A writer hands lines to a log.
type writer func(string, ...any)

func (w writer) Write(b []byte) (int, error) {
	w("%s", b)
	return len(b), nil
}
