package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// A load is what a gate holds after many images, and what they cost.
type load struct {
	fresh, after, idle node.Memory   // registered; after all decisions; some minutes later
	first, firstP99    time.Duration // of an image's first decision, verification included where it had not been ahead
	pending            int           // images whose first answer was PENDING
	registry           float64       // requests an image
	cpu, over          time.Duration // processor time while idle, and for how long that was
}

// memory has a gate verify many distinct images and then decide many times.
func (b *bench) memory(ctx context.Context, w *world) (l load, err error) {
	pod, err := w.node.RunPod(ctx, node.PodOptions{})
	if err != nil {
		return l, err
	}
	list := make([]*node.Image, b.images)
	next := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range 4 {
		wg.Go(func() {
			for i := range next {
				img, e := w.image(ctx, fmt.Sprintf("team%d/app%d:1", i%20, i), true)
				if e == nil {
					_, e = w.node.PullImage(ctx, img.Name)
				}
				mu.Lock()
				if list[i] = img; e != nil {
					err = e
				}
				mu.Unlock()
			}
		})
	}
	for i := range list {
		next <- i
		if i%200 == 199 {
			b.say("%d images of %d are on the node", i+1, b.images)
		}
	}
	close(next)
	wg.Wait()
	if err != nil {
		return l, err
	}
	// One container there really is: the gate looks once at what a runtime handler's
	// containers are made of.
	c, err := pod.Run(ctx, list[0].Name, node.ContainerOptions{Name: "real"}, node.Retry{})
	if err != nil {
		return l, err
	}
	asks := []*api.CreateContainerRequest{asked(w.node, c.ID, pod, list[0])}
	for i, img := range list[1:] {
		asks = append(asks, asked(w.node, fmt.Sprintf("container%d", i), pod, img))
	}

	w.reg.Forget() // the gate verifies ahead of time from its start on
	gate, err := b.gate(w)
	if err != nil {
		return l, err
	}
	defer gate.stop()
	unsigned, err := w.image(ctx, "unsigned:1", false)
	if err != nil {
		return l, err
	}
	if _, err := gate.wait(ctx, asked(w.node, "c", pod, unsigned)); err != nil { // no record: refused and nothing is fetched
		return l, err
	}
	if l.fresh, err = gate.plugin.memory(); err != nil {
		return l, err
	}
	var took []time.Duration
	for _, r := range asks {
		from := time.Now()
		err := gate.create(ctx, r)
		took = append(took, time.Since(from))
		if node.Pending(err) {
			l.pending++
		}
		if err := gate.allowed(ctx, r); err != nil {
			return l, err
		}
	}
	l.registry = float64(len(w.reg.Requests())) / float64(b.images)
	slices.Sort(took)
	l.first, l.firstP99 = took[len(took)/2], took[len(took)*99/100]
	for i := range b.requests {
		if err := gate.create(ctx, asks[i%len(asks)]); err != nil {
			return l, fmt.Errorf("decision %d: %w", i, err)
		}
	}
	if l.after, err = gate.plugin.memory(); err != nil {
		return l, err
	}
	// What is verified ahead of time may not be done yet.
	before, err := gate.plugin.cpu()
	for range 60 {
		time.Sleep(2 * time.Second)
		now, e := gate.plugin.cpu()
		if err = errors.Join(err, e); err != nil {
			return l, err
		}
		busy := now - before
		if before = now; busy <= 10*time.Millisecond {
			break
		}
	}
	b.say("idle for %s", b.idle)
	time.Sleep(b.idle)
	after, err := gate.plugin.cpu()
	if err != nil {
		return l, err
	}
	l.cpu, l.over = after-before, b.idle
	l.idle, err = gate.plugin.memory()
	return l, err
}

// cpu is the processor time that the process has used, to 10 ms.
func (p *process) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// proc(5): utime and stime are the 14th and 15th field, the second is in brackets
	// and may hold spaces.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil // USER_HZ is 100
}

// starts returns how long it takes from the start of the program until the
// runtime asks it: the median of several.
func (b *bench) starts(ctx context.Context, w *world) (time.Duration, error) {
	pod, err := w.node.RunPod(ctx, node.PodOptions{})
	if err != nil {
		return 0, err
	}
	unsigned, err := w.image(ctx, "unsigned:1", false)
	if err != nil {
		return 0, err
	}
	var l []time.Duration
	for range b.runs {
		from := time.Now()
		gate, err := b.gate(w)
		if err != nil {
			return 0, err
		}
		_, err = gate.wait(ctx, asked(w.node, "c", pod, unsigned))
		l = append(l, time.Since(from))
		gate.stop()
		if err != nil {
			return 0, err
		}
	}
	return median(l), nil
}
