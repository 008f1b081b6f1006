package offline

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A moment is what goes on when the power goes. run ends when it is time for that.
type moment struct {
	name string
	run  func(p *plant)
}

var moments = []moment{
	{"while the gate starts", func(p *plant) {
		p.start(node.GateOptions{})
		p.sleep(250 * time.Millisecond)
	}},
	{"while images are pulled", func(p *plant) {
		p.registered(node.GateOptions{})
		p.latency.Store(int64(15 * time.Millisecond))
		for range 2 {
			p.fresh(true)
		}
		p.sleep(300 * time.Millisecond)
	}},
	{"while signatures are fetched and verified", func(p *plant) {
		p.registered(node.GateOptions{})
		var list []*node.Image
		for range 3 {
			img := p.fresh(false)
			list = append(list, img)
			_, err := p.PullImage(p.ctx, img.Name)
			p.must(err)
		}
		p.latency.Store(int64(20 * time.Millisecond))
		for _, img := range list {
			p.background(func(ctx context.Context) {
				// The kubelet does not wait for the gate either.
				_, _ = p.Node.Run(ctx, img.Name, node.RunOptions{Container: node.ContainerOptions{Pull: node.PullNever}})
			})
		}
		p.sleep(400 * time.Millisecond)
	}},
	{"while signatures are written", func(p *plant) {
		p.registered(node.GateOptions{})
		w, err := node.NewWatch(filepath.Join(p.disk.Dir, "store/blobs/sha256"))
		p.must(err)
		defer w.Close()
		for range 3 {
			p.fresh(true)
		}
		ctx, cancel := p.within()
		defer cancel()
		// Each signature is four or five files, with two names each.
		for range 1 + p.rnd.IntN(10) {
			p.must(w.Next(ctx, ""))
		}
		p.sleep(2 * time.Millisecond)
	}},
	{"while index.json is written", func(p *plant) {
		p.registered(node.GateOptions{})
		w, err := node.NewWatch(filepath.Join(p.disk.Dir, "store"))
		p.must(err)
		defer w.Close()
		// It is written some seconds after the signatures, which are safe by then.
		p.sure = append(p.sure, p.fresh(true))
		ctx, cancel := p.within()
		defer cancel()
		p.must(w.Next(ctx, []string{"unfinished", "index.json"}[p.rnd.IntN(2)]))
		p.sleep(time.Millisecond)
	}},
	{"while nothing goes on", func(p *plant) {
		p.registered(node.GateOptions{})
		p.sleep(time.Second)
	}},
}

// A plant is a site with work to do.
type plant struct {
	*site
	rnd     *rand.Rand
	reg     *node.Registry
	latency atomic.Int64 // of each answer of the registry, in nanoseconds

	work   sync.WaitGroup // what goes on when the power goes
	cancel context.CancelFunc
	cutCtx context.Context
	unsure []*node.Image // signed, and nobody knows whether they were verified in time
	sure   []*node.Image // those of them that were
}

// sleep sleeps for a random time of at most d.
func (p *plant) sleep(d time.Duration) { time.Sleep(time.Duration(p.rnd.Int64N(int64(d)))) }

// background does something that the power cut ends.
func (p *plant) background(f func(ctx context.Context)) {
	ctx := p.cutCtx
	p.work.Go(func() { f(ctx) })
}

// fresh pushes an image that nobody has seen, and may have it pulled.
func (p *plant) fresh(pull bool) *node.Image {
	p.Helper()
	p.images++
	img, _ := p.push(p.reg, fmt.Sprintf("app:fresh-%d", p.images), node.ImageOptions{Index: p.rnd.IntN(2) == 0, Decoys: decoy}, signing{by: release, cose: p.rnd.IntN(2) == 0})
	p.unsure = append(p.unsure, img)
	if pull {
		p.background(func(ctx context.Context) { _, _ = p.PullImage(ctx, img.Name) })
	}
	return img
}

// TestPowerCut verifies images, and takes the network and the power away at random
// moments. The disk loses what was not synced. What was verified and kept before
// starts after, time and again; what is unsigned, a stranger's, or was never
// verified does not.
func TestPowerCut(t *testing.T) {
	onEach(t, func(s *site) {
		s.Logf("TIDEWAITER_TEST_SEED=%d", seed)
		p := &plant{site: s, rnd: rand.New(rand.NewPCG(seed, 0))}
		p.reg = s.registry("registry.example", node.RegistryOptions{})
		tags := s.registry("tags.example", node.RegistryOptions{NoReferrers: true})

		var good []*node.Image
		var signatures []digest.Digest
		add := func(r *node.Registry, name string, o node.ImageOptions, by ...signing) {
			s.Helper()
			img, list := s.push(r, name, o, by...)
			good, signatures = append(good, img), append(signatures, list[len(list)-1])
		}
		index := node.ImageOptions{Index: true, Decoys: decoy}
		add(p.reg, "app:manifest", node.ImageOptions{}, signing{by: release})
		add(p.reg, "app:index", index, signing{by: release})
		add(p.reg, "app:index-cose", index, signing{by: release, cose: true})
		add(p.reg, "app:only-the-manifest-in-the-index", index, signing{by: release, cose: true, manifest: true})
		add(p.reg, "app:several", index, signing{by: stranger}, signing{by: stranger, cose: true}, signing{by: release, cose: true})
		add(tags, "app:tag-schema", node.ImageOptions{Docker: true}, signing{by: release})
		add(tags, "app:tag-schema-several", node.ImageOptions{}, signing{by: stranger, cose: true}, signing{by: second})

		bare, _ := s.push(p.reg, "app:bare", node.ImageOptions{})
		foreign, _ := s.push(p.reg, "app:foreign", index, signing{by: stranger})
		hidden, _ := s.push(p.reg, "hidden:1", node.ImageOptions{}, signing{by: release})
		// The mirror never shows the signature of one image: good, and never verified. It
		// has a repository of its own, since one that fails is left alone for a while.
		p.reg.Fault(func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(time.Duration(p.latency.Load()))
				if strings.Contains(r.URL.Path, "/referrers/"+hidden.Target.Digest.String()) {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				h.ServeHTTP(w, r)
			})
		})

		s.must(node.WriteConfig(s.config, policy(mirrors(p.reg.Mirror(), tags.Mirror()))))
		s.registered(node.GateOptions{})
		for _, img := range good {
			s.allowed(img, node.PullIfNotPresent)
		}
		s.denied(bare.Name, node.PullIfNotPresent, verify.SignatureMissing)
		s.denied(foreign.Name, node.PullIfNotPresent, verify.SignerUntrusted)
		s.denied(hidden.Name, node.PullIfNotPresent, verify.SourceUnreachable)
		s.kept(signatures...)
		s.stop()

		order := p.rnd.Perm(len(moments))
		for i := range cuts {
			m := moments[order[i%len(order)]]
			p.cutCtx, p.cancel = context.WithCancel(s.ctx)
			m.run(p)
			s.cut()
			p.cancel()
			p.work.Wait()
			p.latency.Store(0)
			s.network(false)

			took := s.boot(good[p.rnd.IntN(len(good))], node.GateOptions{})
			s.Logf("power cut %d, %s: the first container ran %v after the gate's start", i+1, m.name, took.Round(time.Millisecond))
			for _, img := range good {
				s.allowed(img, node.PullNever)
			}
			for _, img := range []*node.Image{bare, foreign, hidden} {
				s.denied(img.Name, node.PullNever, verify.SourceUnreachable)
			}
			for _, img := range p.unsure {
				id, err := s.ImageID(s.ctx, img.Name)
				s.must(err)
				if id == "" {
					continue // it was not pulled in time
				}
				if err := s.try(img.Name, node.PullNever); err != nil && (slices.Contains(p.sure, img) || !strings.Contains(node.Text(err), "denied [SOURCE_UNREACHABLE]")) {
					s.Errorf("%s: %v", img.Name, err)
				}
				s.must(s.RemoveImage(s.ctx, img.Name))
			}
			s.sound()
			if s.Failed() {
				s.FailNow()
			}
			s.stop()
			s.must(s.RemovePods(s.ctx))
			s.pod, p.unsure, p.sure = nil, nil, nil
			s.network(true)
		}
	})
}
