// Command flood asks a real containerd for thousands of containers, of images that
// may run and of images that must not, while the mirror that holds the signatures
// fails at random and the gate is stopped and started. What is allowed must be
// exactly what may run: everything else is an escape, and the exit status 1. It
// needs root and Linux and takes some minutes:
//
//	make flood
//
// In turns with the gate, a plugin that allows everything decides on the same
// node, so that the rates can be compared. A run is repeated with -seed: it draws
// the same images and failures, though in which order they meet depends on the
// machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
)

func main() {
	o := options{fails: illnesses}
	versions := flag.String("containerd", node.Containerd24+","+node.Containerd23+","+node.Containerd22, "releases of containerd, one after the other")
	flag.IntVar(&o.creations, "creations", 10000, "creations that the gate decides, of each release")
	flag.IntVar(&o.perKind, "images", 40, "images of each kind")
	flag.IntVar(&o.turns, "turns", 5, "turns, with a new gate each")
	flag.IntVar(&o.callers, "callers", 8, "creations at once")
	flag.Uint64Var(&o.seed, "seed", 0, "what is drawn; 0 draws one")
	flag.StringVar(&o.nodes, "dir", "/tmp", "where containerd's `directory` is made; in /dev/shm it does not wait for the disk")
	flag.StringVar(&o.binary, "binary", "", "the `program` to flood instead of this tree's")
	flag.Parse()
	if flag.NArg() > 0 || min(o.creations, o.perKind, o.turns, o.callers) < 1 {
		fmt.Fprintln(os.Stderr, "flood: wrong arguments; see flood -help")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	o.log = func(format string, a ...any) {
		fmt.Fprintln(os.Stderr, "flood:", strings.TrimSpace(fmt.Sprintf(format, a...)))
	}
	if err := all(ctx, o, strings.Split(*versions, ","), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "flood:", err)
		os.Exit(1)
	}
}

// all floods one release after the other and prints what came out. The error says
// what is not as it should be.
func all(ctx context.Context, o options, versions []string, out io.Writer) (err error) {
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	if o.dir, err = os.MkdirTemp("", "tw-flood-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.dir)
	if o.binary == "" {
		if o.binary, err = node.BuildTidewaiter(ctx); err != nil {
			return err
		}
	}
	o.nothing = filepath.Join(o.dir, "noop")
	build := exec.CommandContext(ctx, "go", "build", "-o", o.nothing, "github.com/tidewaiter/tidewaiter/test/bench/noop")
	if b, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, b)
	}
	for _, version := range versions {
		f := &flood{options: o} // each with the same seed
		from := time.Now()
		if err := f.run(ctx, version); err != nil {
			return fmt.Errorf("containerd %s, seed %d: %w", version, o.seed, err)
		}
		f.print(out, time.Since(from))
		if e := f.verdict(); e != nil {
			err = errors.Join(err, fmt.Errorf("containerd %s, seed %d: %w", version, o.seed, e))
		}
	}
	return err
}

// shown is how many of many things are told.
const shown = 10

// verdict is an error unless all is as it should be.
func (f *flood) verdict() error {
	t := &f.tally
	var err error
	for what, list := range map[string][]string{"escapes": t.escapes, "wrong": t.wrong} {
		if len(list) > 0 {
			err = errors.Join(err, fmt.Errorf("%s: %d\n%s", what, len(list), strings.Join(list[:min(len(list), shown)], "\n")))
		}
	}
	// A short flood may be over before a mirror that hangs has been given up. That good
	// images are allowed is found out after it, too.
	none := len(t.gate.good) == 0 && f.creations >= 1000
	if err == nil && (t.gate.creations < f.creations || none) {
		err = fmt.Errorf("%d creations, %d of good images were allowed", t.gate.creations, len(t.gate.good))
	}
	return err
}

// print prints the tables.
func (f *flood) print(out io.Writer, took time.Duration) {
	t := &f.tally
	p := func(format string, a ...any) { fmt.Fprintf(out, format+"\n", a...) }
	p("\ncontainerd %s, %s, seed %d: %d creations by %d callers, %d images of each kind, %d starts of the gate, %s in all",
		f.node.Version, time.Now().UTC().Format("2006-01-02 15:04 UTC"), f.seed, t.gate.creations, f.callers, f.perKind, f.turns, took.Round(time.Second))
	p("the mirror: %s", f.sick)
	p("\n| images | creations | allowed | refused |\n|---|---|---|---|")
	for _, k := range kinds {
		o := t.outcome(k.name)
		var l []string
		for _, r := range slices.Sorted(maps.Keys(o.refused)) {
			l = append(l, fmt.Sprintf("%s %d", r, o.refused[r]))
		}
		p("| %s | %d | %d | %s |", k.name, o.creations, o.allowed, strings.Join(l, ", "))
	}
	p("\n| | no-op plugin | Tidewaiter | ratio |\n|---|---|---|---|")
	p("| creations | %d | %d | |", t.noop.creations, t.gate.creations)
	p("| a second, of all kinds | %.0f | %.0f | %.2f |", t.noop.rate(), t.gate.rate(), t.gate.rate()/t.noop.rate())
	noop, gate := t.noop.median(), t.gate.median()
	p("| p50 of those of good images that were allowed | %.1f ms | %.1f ms | %.2f |", float64(noop)/1e6, float64(gate)/1e6, float64(gate)/float64(noop))
	p("\n%d of the allowed were started and said their own word; %d were asked for while no plugin was there, and refused.", t.started, t.absent)
	p("escapes: %d", len(t.escapes))
}
