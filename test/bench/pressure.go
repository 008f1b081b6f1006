package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// This file measures what pods that cannot be verified cost those that can: a
// container is started and stopped on a real node again and again, in turns
// without and with many pods whose containers are refused and asked for again.

// The hosts in the names of the images that are refused.
const (
	unsigned = "unsigned.example" // signed by nobody
	hanging  = "hanging.example"  // the mirror never answers
	unknown  = "unknown.example"  // the mirror does not know them
)

// A burden is what a container costs without and with the refused pods.
type burden struct {
	start, stop   [2]time.Duration // medians of the medians of the turns; idle, loaded
	starts, stops float64          // loaded by idle, medians of the ratios of the turns
	p99           [2]time.Duration // of all starts
	cycles        [2]int
	refused       int           // creations in the loaded turns
	took          time.Duration // of those turns
	reasons       map[string]int
	dropped       []string // lines of the logs that say that the plugin was dropped
}

// A crowd is the node with the pods.
type crowd struct {
	node       *node.Node
	registries []*node.Registry
	config     string
	good       *node.Image
	goodID     string
	pod        *node.Pod
	pods       []refusedPod
	tries      atomic.Uint32
}

type refusedPod struct {
	*node.Pod
	image, id string
}

func (c *crowd) stop() (err error) {
	if c.node != nil {
		err = c.node.Stop()
	}
	for _, r := range c.registries {
		err = errors.Join(err, r.Stop())
	}
	return err
}

// crowd starts the node and all pods on it, with a plugin that lets no container
// wait for it.
func (b *bench) crowd(ctx context.Context, version string) (_ *crowd, err error) {
	c := &crowd{config: filepath.Join(b.dir, "pressure-"+version)}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.stop())
		}
	}()
	by := map[string]*node.Registry{}
	var mirrors []node.Mirror
	for _, host := range []string{"registry.example", unsigned, hanging, unknown} {
		r, err := node.NewRegistry(host, node.RegistryOptions{})
		if err != nil {
			return nil, err
		}
		c.registries, by[host] = append(c.registries, r), r
		mirrors = append(mirrors, r.Mirror())
	}
	mirrors[3].URL = mirrors[0].URL
	ca := notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
	if err := node.WriteConfig(c.config, node.Config{
		Mode: "enforce", Mirrors: mirrors, Stores: notarytest.Stores{"ca/acme/root.crt": ca.PEM()},
		Statements: []verify.Statement{notarytest.Statement("all")},
	}); err != nil {
		return nil, err
	}
	if c.node, err = node.Start(ctx, node.Options{ContainerdVersion: version, Dir: b.nodes, Required: true, Log: os.Stderr}); err != nil {
		return nil, err
	}
	if err := c.node.Use(c.registries...); err != nil {
		return nil, err
	}
	if c.good, err = by["registry.example"].Push(ctx, "app:1", node.ImageOptions{Word: "good", Index: true}); err != nil {
		return nil, err
	}
	if _, err := by["registry.example"].Sign(ctx, c.good, ca.Leaf(notarytest.CertOptions{})); err != nil {
		return nil, err
	}
	if c.goodID, err = c.node.PullImage(ctx, c.good.Name); err != nil {
		return nil, err
	}
	if c.pod, err = c.node.RunPod(ctx, node.PodOptions{}); err != nil {
		return nil, err
	}
	for i := range b.pods {
		r := by[[]string{unsigned, hanging, unknown}[i%3]]
		img, err := r.Push(ctx, fmt.Sprintf("team%d/app%d:1", i%20, i), node.ImageOptions{Word: fmt.Sprint("refused ", i), Index: true})
		if err != nil {
			return nil, err
		}
		id, err := c.node.PullImage(ctx, img.Name)
		if err != nil {
			return nil, err
		}
		pod, err := c.node.RunPod(ctx, node.PodOptions{Namespace: fmt.Sprint("team", i%20)})
		if err != nil {
			return nil, err
		}
		c.pods = append(c.pods, refusedPod{pod, img.Name, id})
		if i%50 == 49 {
			b.say("%d pods of %d are there", i+1, b.pods)
		}
	}
	by[hanging].Fault(func(http.Handler) http.Handler {
		return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	})
	return c, nil
}

// once starts and stops the verified container, and says how long each took.
func (c *crowd) once(ctx context.Context) (start, stop time.Duration, err error) {
	o := node.ContainerOptions{Name: "app", Image: c.good.Name, ImageID: c.goodID, Attempt: c.tries.Add(1)}
	from := time.Now()
	ctr, err := c.pod.Create(ctx, o)
	if err == nil {
		err = ctr.Start(ctx)
	}
	start = time.Since(from)
	if err != nil {
		return 0, 0, err
	}
	from = time.Now()
	err = ctr.Remove(ctx)
	return start, time.Since(from), err
}

// retry asks for each pod's container every 10 to 15 s, as a kubelet does, until
// ctx ends. The error is one if a container was created.
func (c *crowd) retry(ctx context.Context, answered func(error)) error {
	var wg sync.WaitGroup
	errs := make([]error, len(c.pods))
	for i, p := range c.pods {
		wg.Go(func() {
			for wait := rand.N(12500 * time.Millisecond); ; wait = 10*time.Second + rand.N(5*time.Second) {
				select {
				case <-ctx.Done():
					return
				case <-time.After(wait):
				}
				o := node.ContainerOptions{Name: "app", Image: p.image, ImageID: p.id, Attempt: c.tries.Add(1)}
				if _, err := p.Create(context.WithoutCancel(ctx), o); err == nil {
					errs[i] = fmt.Errorf("%s was created", p.image)
					return
				} else {
					answered(err)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// carry measures turns without and with the refused pods.
func (b *bench) carry(ctx context.Context, c *crowd) (r burden, err error) {
	r.reasons = map[string]int{}
	for range 3 {
		if _, _, err := c.once(ctx); err != nil && !node.Pending(err) {
			return r, err
		}
		time.Sleep(time.Second) // the first answer may be PENDING
	}
	var start, stop [2][]time.Duration // by turn
	var starts [2][]time.Duration
	for turn := range 2 * b.turns {
		loaded := (turn + turn/2) % 2 // idle, loaded, loaded, idle, ...: what drifts hits both
		var began, ended []time.Duration
		limited, cancel := context.WithTimeout(ctx, b.turn)
		done := make(chan error, 1)
		go func() {
			if loaded == 0 {
				done <- nil
				return
			}
			var mu sync.Mutex
			done <- c.retry(limited, func(err error) {
				mu.Lock()
				defer mu.Unlock()
				r.refused++
				r.reasons[reason(err)]++
			})
		}()
		from := time.Now()
		for limited.Err() == nil {
			s, e, err := c.once(ctx)
			if err != nil {
				cancel()
				return r, errors.Join(err, <-done)
			}
			began, ended = append(began, s), append(ended, e)
			time.Sleep(50 * time.Millisecond)
		}
		cancel()
		if loaded == 1 {
			r.took += time.Since(from)
		}
		if err := <-done; err != nil {
			return r, err
		}
		r.cycles[loaded] += len(began)
		starts[loaded] = append(starts[loaded], began...)
		start[loaded], stop[loaded] = append(start[loaded], median(began)), append(stop[loaded], median(ended))
		b.say("turn %d of %d, loaded %d: start %s, stop %s, %d times", turn+1, 2*b.turns, loaded, millis(median(began)), millis(median(ended)), len(began))
	}
	ratio := func(l [2][]time.Duration) float64 {
		var ratios []float64
		for i := range l[0] {
			ratios = append(ratios, float64(l[1][i])/float64(l[0][i]))
		}
		return median(ratios)
	}
	for i := range 2 {
		slices.Sort(starts[i])
		r.p99[i] = starts[i][len(starts[i])*99/100]
		r.start[i], r.stop[i] = median(start[i]), median(stop[i])
	}
	r.starts, r.stops = ratio(start), ratio(stop)
	return r, nil
}

// reason is the code of a refusal, or what else it says.
func reason(err error) string {
	text := node.Text(err)
	if _, code, ok := strings.Cut(text, "tidewaiter: denied ["); ok {
		code, _, _ = strings.Cut(code, "]")
		return code
	}
	if strings.Contains(text, "noop: refused") {
		return "refused"
	}
	return text
}

// pressure measures both plugins on one node: one that refuses the same pods at
// once, and Tidewaiter.
func (b *bench) pressure(ctx context.Context, c *crowd) (refuser, gate burden, err error) {
	refusing := exec.Command(b.nothing, c.node.NRISocket, "tidewaiter", unsigned, hanging, unknown)
	if err := refusing.Start(); err != nil {
		return refuser, gate, err
	}
	if err = c.wait(ctx); err == nil {
		refuser, err = b.carry(ctx, c)
	}
	_ = refusing.Process.Kill()
	_ = refusing.Wait()
	if err != nil {
		return refuser, gate, err
	}
	if _, _, err := c.once(ctx); err == nil {
		return refuser, gate, errors.New("a container started without a plugin")
	}

	before := len(c.node.Log())
	g, err := c.node.StartGate(ctx, node.GateOptions{ConfigDir: c.config, Binary: b.binary})
	if err != nil {
		return refuser, gate, err
	}
	defer g.Kill()
	if err := g.WaitRegistered(ctx); err != nil {
		return refuser, gate, err
	}
	if gate, err = b.carry(ctx, c); err != nil {
		return refuser, gate, err
	}
	for _, l := range g.Lines() {
		if strings.HasPrefix(l.Msg, "not registered") {
			gate.dropped = append(gate.dropped, l.Raw)
		}
	}
	for line := range strings.Lines(c.node.Log()[before:]) {
		if strings.Contains(line, "tidewaiter") && (strings.Contains(line, "closing plugin") || strings.Contains(line, "closed")) {
			gate.dropped = append(gate.dropped, line)
		}
	}
	return refuser, gate, nil
}

// wait waits until a plugin allows the verified container.
func (c *crowd) wait(ctx context.Context) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, _, err := c.once(ctx); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (b *bench) printPressure(ctx context.Context) error {
	fmt.Printf("\nStart and stop of a verified container, medians of %d turns of %s each without and with %d pods that are refused and tried again every 10 to 15 s:\n\n", b.turns, b.turn, b.pods)
	fmt.Println("| | idle | beside them | ratio |\n|---|---|---|---|")
	for _, version := range strings.Split(b.versions, ",") {
		if err := b.printPressureOf(ctx, version); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) printPressureOf(ctx context.Context, version string) (err error) {
	c, err := b.crowd(ctx, version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	refuser, gate, err := b.pressure(ctx, c)
	if err != nil {
		return err
	}
	for _, r := range []struct {
		name string
		burden
	}{{"a plugin that refuses them at once", refuser}, {"Tidewaiter", gate}} {
		fmt.Printf("| containerd %s, %s, start | %s | %s | %.2f |\n", version, r.name, millis(r.start[0]), millis(r.start[1]), r.starts)
		fmt.Printf("| containerd %s, %s, start, p99 | %s | %s | |\n", version, r.name, millis(r.p99[0]), millis(r.p99[1]))
		fmt.Printf("| containerd %s, %s, stop | %s | %s | %.2f |\n", version, r.name, millis(r.stop[0]), millis(r.stop[1]), r.stops)
		fmt.Printf("| containerd %s, %s, refused a second | | %.1f | |\n", version, r.name, float64(r.refused)/r.took.Seconds())
	}
	fmt.Printf("| containerd %s, Tidewaiter, times it was dropped | | %d | |\n", version, len(gate.dropped))
	b.say("containerd %s: refused with %v; %d starts idle, %d loaded", version, gate.reasons, gate.cycles[0], gate.cycles[1])
	if len(gate.dropped) > 0 {
		return fmt.Errorf("the gate was dropped:\n%s", strings.Join(gate.dropped, "\n"))
	}
	return nil
}
