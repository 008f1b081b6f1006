package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// block is how many requests one side gets before it is the other's turn: short,
// so that whatever else the machine does hits both.
const block = 200

// A run is what one side did in one run.
type run struct {
	p50, p99 time.Duration
	rate     float64       // requests a second
	cpu      time.Duration // processor time that the plugin used for one
}

// A contest is the medians of several runs of two sides, and of the ratios of
// each run.
type contest struct {
	noop, gate          run
	p50, p99, rate, cpu float64 // gate by no-op
}

func median[T int64 | float64 | time.Duration](l []T) T {
	l = slices.Clone(l)
	slices.Sort(l)
	return l[len(l)/2]
}

func medians(noop, gate []run) contest {
	of := func(f func(n, g run) float64) float64 {
		var l []float64
		for i := range noop {
			l = append(l, f(noop[i], gate[i]))
		}
		return median(l)
	}
	mid := func(get func(n, g run) run) run {
		return run{
			p50:  time.Duration(of(func(n, g run) float64 { return float64(get(n, g).p50) })),
			p99:  time.Duration(of(func(n, g run) float64 { return float64(get(n, g).p99) })),
			rate: of(func(n, g run) float64 { return get(n, g).rate }),
			cpu:  time.Duration(of(func(n, g run) float64 { return float64(get(n, g).cpu) })),
		}
	}
	return contest{
		noop: mid(func(n, _ run) run { return n }),
		gate: mid(func(_, g run) run { return g }),
		p50:  of(func(n, g run) float64 { return float64(g.p50) / float64(n.p50) }),
		p99:  of(func(n, g run) float64 { return float64(g.p99) / float64(n.p99) }),
		rate: of(func(n, g run) float64 { return g.rate / n.rate }),
		cpu:  of(func(n, g run) float64 { return float64(g.cpu) / float64(n.cpu) }),
	}
}

// An ask is one request and what its answer must be.
type ask struct {
	req  *api.CreateContainerRequest
	deny bool
}

// race has two sides answer the same requests in turn, each run with so many
// requests from so many callers at once, and counts what should have been refused
// and was not. The no-op plugin refuses nothing.
func race(ctx context.Context, noop, gate *side, runs, requests, callers int, asks []ask) (c contest, escapes int, err error) {
	var results [2][]run
	for r := range runs {
		var took [2][]time.Duration
		var wall, cpu [2]time.Duration
		for i, s := range []*side{noop, gate} {
			if cpu[i], err = s.plugin.cpu(); err != nil {
				return c, escapes, err
			}
		}
		for done := 0; done < requests; done += block {
			for i := range 2 {
				which := (i + done/block + r) % 2 // who is first changes
				s := []*side{noop, gate}[which]
				var mu sync.Mutex
				var wg sync.WaitGroup
				from := time.Now()
				for caller := range callers {
					wg.Go(func() {
						mine := make([]time.Duration, 0, block)
						var bad error
						leaks := 0
						for n := caller; n < block; n += callers {
							a := asks[(done+n)%len(asks)]
							t := time.Now()
							e := s.create(ctx, a.req)
							mine = append(mine, time.Since(t))
							switch {
							case s == noop || !a.deny:
								bad = errors.Join(bad, e)
							case e == nil:
								leaks++
							}
						}
						mu.Lock()
						defer mu.Unlock()
						took[which] = append(took[which], mine...)
						escapes += leaks
						err = errors.Join(err, bad)
					})
				}
				wg.Wait()
				wall[which] += time.Since(from)
				if err != nil {
					return c, escapes, fmt.Errorf("%s: %w", s.name, err)
				}
			}
		}
		for i := range 2 {
			slices.Sort(took[i])
			n := len(took[i])
			used, err := []*side{noop, gate}[i].plugin.cpu()
			if err != nil {
				return c, escapes, err
			}
			results[i] = append(results[i], run{took[i][n/2], took[i][n*99/100], float64(n) / wall[i].Seconds(), (used - cpu[i]) / time.Duration(n)})
		}
	}
	return medians(results[0], results[1]), escapes, nil
}

// warm races the two sides on a node: with one caller, as containerd asks, and as
// a flood of 8 callers where every second container must be refused.
func (b *bench) warm(ctx context.Context, w *world) (one, flood contest, escapes int, err error) {
	pod, err := w.node.RunPod(ctx, node.PodOptions{})
	if err != nil {
		return one, flood, 0, err
	}
	var asks []ask
	for i, signed := range []bool{true, false} {
		img, err := w.image(ctx, fmt.Sprintf("warm%d:1", i), signed)
		if err != nil {
			return one, flood, 0, err
		}
		// The gate of containerd 2.2 looks at the container's own snapshot. No plugin
		// is connected to this containerd, so that the container is made.
		c, err := pod.Run(ctx, img.Name, node.ContainerOptions{Name: fmt.Sprintf("c%d", i)}, node.Retry{})
		if err != nil {
			return one, flood, 0, err
		}
		asks = append(asks, ask{asked(w.node, c.ID, pod, img), !signed})
	}
	noop, err := b.noop(w)
	if err != nil {
		return one, flood, 0, err
	}
	defer noop.stop()
	gate, err := b.gate(w)
	if err != nil {
		return one, flood, 0, err
	}
	defer gate.stop()
	for _, s := range []*side{noop, gate} {
		if _, err := s.wait(ctx, asks[0].req); err != nil {
			return one, flood, 0, err
		}
		if err := s.allowed(ctx, asks[0].req); err != nil {
			return one, flood, 0, err
		}
	}
	// Both have their memory and the processor its clock.
	if _, _, err := race(ctx, noop, gate, 1, 2000, 1, asks[:1]); err != nil {
		return one, flood, 0, err
	}
	if one, _, err = race(ctx, noop, gate, b.runs, b.requests, 1, asks[:1]); err != nil {
		return one, flood, 0, err
	}
	flood, escapes, err = race(ctx, noop, gate, b.runs, b.requests, 8, asks)
	return one, flood, escapes, err
}
