// Command bench measures what Tidewaiter costs and prints it in the form of
// docs/performance.md. It needs root and Linux, a quiet machine and about 25
// minutes:
//
//	make bench
//
// Each number that depends on the machine stands beside that of something else
// which did the same in the same run, in turns: a plugin that says yes to
// everything, or notation's own program. The ratios are what to compare between
// machines.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A bench is one call of this program.
type bench struct {
	runs, requests int           // of the warm part
	images         int           // of the memory part, which has as many requests
	idle           time.Duration // of the memory part
	colds          int           // verifications of each kind
	pods           int           // that are refused, of the pressure part
	turns          int           // of each kind
	turn           time.Duration // how long each is
	nodes          string        // where its nodes are made; see node.Options.Dir
	versions       string        // of containerd
	parts          string

	dir             string // below it is all that is written
	binary, nothing string // tidewaiter, and the no-op plugin
}

func main() {
	testing.Init() // for testing.Benchmark
	var b bench
	flag.IntVar(&b.runs, "runs", 7, "runs of the warm part")
	flag.IntVar(&b.requests, "requests", 20000, "requests of each run")
	flag.IntVar(&b.images, "images", 1000, "images of the memory part")
	flag.DurationVar(&b.idle, "idle", 5*time.Minute, "idle time of the memory part")
	flag.IntVar(&b.colds, "colds", 101, "cold verifications of each kind")
	flag.IntVar(&b.pods, "pods", 200, "refused pods of the pressure part")
	flag.IntVar(&b.turns, "turns", 5, "turns without and with them")
	flag.DurationVar(&b.turn, "turn", 20*time.Second, "length of such a turn")
	flag.StringVar(&b.nodes, "dir", "/tmp", "where containerd's `directory` of that part is made; in /dev/shm it does not wait for the disk")
	flag.StringVar(&b.parts, "parts", "warm,cold,memory,own,size,pressure", "what to measure")
	flag.StringVar(&b.versions, "containerd", node.Containerd24+","+node.Containerd23+","+node.Containerd22, "releases of the warm and the pressure part")
	flag.StringVar(&b.binary, "binary", "", "the `program` to measure instead of this tree's; own and size are this tree's all the same")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// say tells whoever waits how far it is.
func (b *bench) say(format string, a ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", a...) }

func (b *bench) run(ctx context.Context) (err error) {
	silence()
	// The adaptation's garbage must not be collected in the middle of a request more
	// often than it has to: containerd's heap is larger than this one.
	debug.SetGCPercent(400)
	if b.dir, err = os.MkdirTemp("", "tw-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.binary == "" {
		if b.binary, err = node.BuildTidewaiter(ctx); err != nil {
			return err
		}
	}
	b.nothing = filepath.Join(b.dir, "noop")
	if err := command(ctx, "", nil, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.nothing, "github.com/tidewaiter/tidewaiter/test/bench/noop"); err != nil {
		return err
	}
	machine(ctx)
	for _, part := range strings.Split(b.parts, ",") {
		b.say("%s", part)
		do := map[string]func(context.Context) error{
			"warm": b.printWarm, "cold": b.printCold, "memory": b.printMemory, "own": b.printOwn, "size": b.printSize, "pressure": b.printPressure,
		}[part]
		if do == nil {
			return fmt.Errorf("no part %q", part)
		}
		if err := do(ctx); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return nil
}

// machine prints what the numbers were measured on.
func machine(ctx context.Context) {
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	model := "unknown processor"
	for line := range strings.Lines(string(cpu)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
			model = strings.TrimSpace(value)
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	version, _ := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty").Output()
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("%s, %d cores, Linux %s, %s, NRI 0.12.5, Tidewaiter %s, %s. Load when it began: %s.\n",
		model, runtime.NumCPU(), strings.TrimSpace(string(kernel)), runtime.Version(), strings.TrimSpace(string(version)),
		time.Now().UTC().Format("2006-01-02 15:04 UTC"), strings.Join(strings.Fields(string(load))[:1], ""))
}

// A world is a containerd, a registry and a key.
type world struct {
	node   *node.Node
	reg    *node.Registry
	signer *notarytest.Signer
	config string
}

// certificates is how many a trust store has.
const certificates = 20

func (b *bench) world(ctx context.Context, version string) (_ *world, err error) {
	w := &world{config: filepath.Join(b.dir, "config-"+version)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.stop())
		}
	}()
	if w.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{}); err != nil {
		return nil, err
	}
	stores := notarytest.Stores{}
	for i := range certificates {
		ca := notarytest.NewCA(notarytest.CAOptions{Intermediates: 1})
		stores[fmt.Sprintf("ca/acme/root%d.crt", i)] = ca.PEM()
		w.signer = ca.Leaf(notarytest.CertOptions{})
	}
	if err := node.WriteConfig(w.config, node.Config{
		Mode: "enforce", Mirrors: []node.Mirror{w.reg.Mirror()}, Stores: stores,
		Statements: []verify.Statement{notarytest.Statement("all")},
	}); err != nil {
		return nil, err
	}
	if w.node, err = node.Start(ctx, node.Options{ContainerdVersion: version, Log: os.Stderr}); err != nil {
		return nil, err
	}
	return w, w.node.Use(w.reg)
}

func (w *world) stop() (err error) {
	if w.node != nil {
		err = w.node.Stop()
	}
	if w.reg != nil {
		err = errors.Join(err, w.reg.Stop())
	}
	return err
}

// image pushes an image that no other name has.
func (w *world) image(ctx context.Context, name string, signed bool) (*node.Image, error) {
	img, err := w.reg.Push(ctx, name, node.ImageOptions{Word: name, Index: true})
	if err == nil && signed {
		_, err = w.reg.Sign(ctx, img, w.signer)
	}
	return img, err
}

// gate starts `tidewaiter run` with the records of the node's containerd.
func (b *bench) gate(w *world) (*side, error) {
	return newSide(b.dir, "v"+w.node.Version, "tidewaiter", b.binary, "run", "--config-dir", w.config,
		"--containerd-socket", w.node.Socket, "--nri-socket", "SOCKET", "--state-dir", filepath.Join(b.dir, "state"), "--node", "bench")
}

func (b *bench) noop(w *world) (*side, error) {
	return newSide(b.dir, "v"+w.node.Version, "noop", b.nothing, "SOCKET")
}

func micros(d time.Duration) string { return fmt.Sprintf("%.3f ms", float64(d)/1e6) }
func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
func mib(n int64) string            { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (b *bench) printWarm(ctx context.Context) error {
	fmt.Printf("\nWarm decisions, medians of %d runs of %d requests, both plugins in turns of %d requests:\n\n", b.runs, b.requests, block)
	fmt.Println("| | no-op plugin | Tidewaiter | ratio |\n|---|---|---|---|")
	for _, version := range strings.Split(b.versions, ",") {
		if err := b.printWarmOf(ctx, version); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) printWarmOf(ctx context.Context, version string) (err error) {
	w, err := b.world(ctx, version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.stop()) }()
	one, flood, escapes, err := b.warm(ctx, w)
	if err != nil {
		return err
	}
	row := func(what string, noop, gate string, ratio float64) {
		fmt.Printf("| containerd %s, %s | %s | %s | %.2f |\n", version, what, noop, gate, ratio)
	}
	row("p50", micros(one.noop.p50), micros(one.gate.p50), one.p50)
	row("p99", micros(one.noop.p99), micros(one.gate.p99), one.p99)
	row("processor time a decision", micros(one.noop.cpu), micros(one.gate.cpu), one.cpu)
	row("a second, 1 caller", fmt.Sprintf("%.0f", one.noop.rate), fmt.Sprintf("%.0f", one.gate.rate), one.rate)
	row("a second, 8 callers, half to be refused", fmt.Sprintf("%.0f", flood.noop.rate), fmt.Sprintf("%.0f", flood.gate.rate), flood.rate)
	fmt.Printf("| containerd %s, escapes of %d | | %d | |\n", version, b.runs*b.requests/2, escapes)
	return nil
}

func (b *bench) printCold(ctx context.Context) error {
	rows, err := b.cold(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("\nCold verifications, medians of %d in turn, three certificates in the chain, registry on loopback:\n\n", b.colds)
	fmt.Println("| key, envelope | in the daemon | `tidewaiter verify` | `notation verify` | daemon / notation | verb / notation |\n|---|---|---|---|---|---|")
	for _, r := range rows {
		cost := func(c coldCost) string { return fmt.Sprintf("%s, %d requests", millis(c.took), c.requests) }
		fmt.Printf("| %s, %s | %s | %s | %s | %.2f | %.2f |\n", r.key, r.format, cost(r.engine), cost(r.tidewaiter), cost(r.notation), r.half, r.cli)
	}
	return nil
}

func (b *bench) printMemory(ctx context.Context) (err error) {
	w, err := b.world(ctx, node.Containerd24)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.stop()) }()
	start, err := b.starts(ctx, w)
	if err != nil {
		return err
	}
	l, err := b.memory(ctx, w)
	if err != nil {
		return err
	}
	fmt.Printf("\nThe process on containerd %s, %d distinct signed images, then %d decisions about them in turn:\n\n", w.node.Version, b.images, b.requests)
	fmt.Println("| | resident | of that anonymous | peak |\n|---|---|---|---|")
	row := func(when string, m node.Memory) {
		fmt.Printf("| %s | %s | %s | %s |\n", when, mib(m.RSS), mib(m.Anon), mib(m.Peak))
	}
	row("started", l.fresh)
	row("after all decisions", l.after)
	row("idle for "+l.over.String()+" after that", l.idle)
	fmt.Println("\n| | |\n|---|---|")
	fmt.Printf("| first decision of an image, p50 (p99) | %s (%s) |\n", millis(l.first), millis(l.firstP99))
	fmt.Printf("| first decisions that were PENDING | %d of %d |\n", l.pending, b.images)
	fmt.Printf("| requests at the registry an image | %.2f |\n", l.registry)
	fmt.Printf("| processor time while idle for %s | %d ms |\n", l.over, l.cpu.Milliseconds())
	fmt.Printf("| start of the program to the first answer, %d certificates | %s |\n", certificates, millis(start))
	return nil
}

func (b *bench) printOwn(context.Context) error {
	fmt.Println("\nA warm decision in the gate itself, without NRI and containerd:\n\n| | time | allocations | bytes |\n|---|---|---|---|")
	for _, c := range []struct {
		name string
		told bool
	}{{"containerd 2.4: the image is told", true}, {"containerd 2.2 and 2.3: the snapshot is looked at", false}} {
		o, err := measureOwn(c.told)
		if err != nil {
			return err
		}
		fmt.Printf("| %s | %.1f µs | %d | %d |\n", c.name, float64(o.took)/1e3, o.allocs, o.bytes)
	}
	return nil
}

func (b *bench) printSize(ctx context.Context) error {
	var root strings.Builder
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tidewaiter/tidewaiter")
	cmd.Stdout = &root
	if err := cmd.Run(); err != nil {
		return err
	}
	fmt.Println("\nThe stripped binary:\n\n| | MB |\n|---|---|")
	for _, arch := range []string{"amd64", "arm64", "arm/v7"} {
		out := filepath.Join(b.dir, "size")
		env := []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + strings.TrimSuffix(arch, "/v7"), "GOARM=7"}
		if err := command(ctx, strings.TrimSpace(root.String()), env, "go", "build", "-trimpath", "-tags", node.Tags, "-ldflags", "-s -w", "-o", out, "./cmd/tidewaiter"); err != nil {
			return err
		}
		info, err := os.Stat(out)
		if err != nil {
			return err
		}
		fmt.Printf("| linux/%s | %.1f |\n", arch, float64(info.Size())/1e6)
	}
	return nil
}

func command(ctx context.Context, dir string, env []string, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
