// Package matrix has the gate fail in every way that NRI can meet, against the
// adaptation library of each containerd that the gate enforces on, and sees that
// no container is let through. The gate is the process `tidewaiter run`, the
// images and snapshots are those of a real containerd; the runtime that asks is a
// program of its own for each version of the library (runtime/main.go).
//
// `go test` runs a short form; `make matrix` sets TIDEWAITER_MATRIX=full and
// prints the table that docs/fail-closed.md explains.
package matrix

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A library is a version of NRI's adaptation library.
type library struct {
	nri        string
	containerd string // as which it registers plugins: a release that has this library
	tells      bool   // its requests say which image is run

	// skips says that a validator whose connection closes after it was counted
	// present and before it is called is left out, and the container let through.
	skips bool

	program string // runtime/main.go built against it
}

var libraries = []*library{
	{nri: "0.11.0", containerd: "2.2.9"},
	{nri: "0.12.0", containerd: "2.3.7"},
	{nri: "0.12.3", containerd: "v2.4.2", tells: true},
	{nri: "0.12.5", containerd: "v2.5.0", tells: true, skips: true}, // in no release of containerd yet
}

// A neighbour is another plugin of the node, slow in CreateContainer.
type neighbour string

const (
	alone  neighbour = "none"
	before neighbour = "10, slow"       // asked before the gate is counted
	after  neighbour = "99, slow, last" // asked after: plugins of one index come in the order of their registration
)

// slow is how long a neighbour takes: far less than would have it dropped.
const slow = 150 * time.Millisecond

var (
	full       = os.Getenv("TIDEWAITER_MATRIX") == "full"
	neighbours = []neighbour{alone, before, after}
	notRoot    string
	shared     *world
	results    = table{cells: map[string]string{}}
)

//go:embed runtime/main.go
var runtimeSource []byte

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		notRoot = "a node needs root"
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/matrix:", notRoot)
		code := m.Run()
		if full {
			code = 1 // asked for by name
		}
		os.Exit(code)
	}
	code, err := runTests(m)
	results.print()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	ctx := context.Background()
	// Scenes mostly wait: all of them at once, however few processors there are.
	flag.Parse()
	if err := flag.Set("test.parallel", "16"); err != nil {
		return 1, err
	}
	if !full {
		timeout = 5 * time.Second
		libraries = []*library{libraries[0], libraries[2]}
		neighbours = []neighbour{alone, after}
	}
	for _, l := range libraries {
		if l.program, err = node.BuildAgainst(ctx, os.Stderr, runtimeSource, "github.com/containerd/nri", l.nri); err != nil {
			return 1, err
		}
	}
	shared, err = newWorld(ctx)
	defer func() { err = errors.Join(err, shared.stop()) }()
	if err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// A world is a containerd on which containers of the images have been made: the
// gate finds the records and snapshots of those that it is asked about. That
// containerd asks no plugin itself.
type world struct {
	dir     string
	gate    string // program
	node    *node.Node
	reg     *node.Registry // where containerd pulls; it has no signatures
	pod     *node.Pod
	signer  *notarytest.Signer
	stores  notarytest.Stores
	good    *image // signed in the mirror of each scene
	evil    *image // not signed
	unknown *image // signed in the middle of a scene
}

// An image is one with a container that was made from it.
type image struct {
	*node.Image
	id string
}

func newWorld(ctx context.Context) (w *world, err error) {
	w = &world{}
	if w.dir, err = os.MkdirTemp("", "tw-m-"); err != nil {
		return w, err
	}
	if w.gate, err = node.BuildTidewaiter(ctx); err != nil {
		return w, err
	}
	ca := notarytest.NewCA(notarytest.CAOptions{})
	w.signer, w.stores = ca.Leaf(notarytest.CertOptions{}), notarytest.Stores{"ca/acme/root.crt": ca.PEM()}
	if w.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{}); err != nil {
		return w, err
	}
	if w.node, err = node.Start(ctx, node.Options{Log: os.Stderr}); err != nil {
		return w, err
	}
	if err := w.node.Use(w.reg); err != nil {
		return w, err
	}
	if w.pod, err = w.node.RunPod(ctx, node.PodOptions{}); err != nil {
		return w, err
	}
	for i, img := range []**image{&w.good, &w.evil, &w.unknown} {
		name := names[i]
		pushed, err := push(ctx, w.reg, name)
		if err != nil {
			return w, err
		}
		c, err := w.pod.Run(ctx, pushed.Name, node.ContainerOptions{Name: name}, node.Retry{})
		if err != nil {
			return w, err
		}
		*img = &image{pushed, c.ID}
	}
	return w, nil
}

var names = []string{"good", "evil", "unknown"}

// push pushes an image with a root filesystem of its own.
func push(ctx context.Context, r *node.Registry, name string) (*node.Image, error) {
	return r.Push(ctx, name+":1", node.ImageOptions{Word: name, Files: map[string]string{"/name": name}})
}

func (w *world) stop() (err error) {
	if w.node != nil {
		err = w.node.Stop()
	}
	if w.reg != nil {
		err = errors.Join(err, w.reg.Stop())
	}
	return errors.Join(err, os.RemoveAll(w.dir))
}

// TestFailures is the table: every failure, with every neighbour, on every
// version of NRI.
func TestFailures(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, l := range libraries {
		for _, n := range neighbours {
			t.Run("NRI "+l.nri+"/neighbour "+string(n), func(t *testing.T) {
				t.Parallel()
				s := newScene(t, l, n)
				for _, f := range failures {
					if !full && !f.short || n == alone && f.neighbour {
						continue
					}
					t.Run(f.name, func(t *testing.T) {
						s.T, s.answers = t, nil
						f.run(s)
						back := s.recovers()
						results.put(f.name, n, l, s.answers, back)
					})
				}
				s.T = t
			})
		}
	}
}

// TestKilledAtAnyMoment kills the gate while it is asked without a pause, at a
// moment that is never the same. Every container is unsigned.
//
// NRI 0.12.5 lets one through when the connection closes between the gate's being
// counted present and its being called. How often is counted and printed; more
// than the one that was asked at that moment is an error there too.
func TestKilledAtAnyMoment(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, l := range libraries {
		for _, n := range neighbours {
			if !full && n != alone {
				continue
			}
			t.Run("NRI "+l.nri+"/neighbour "+string(n), func(t *testing.T) {
				kills := 40
				switch {
				case !full:
					kills = 5
				case l.skips && n == alone:
					kills = 1000
				case l.skips:
					kills = 100
				}
				s := newScene(t, l, n)
				s.pace(5 * time.Millisecond)
				asked, through := 0, 0
				for range kills {
					s.start(false)
					s.asked()
					s.order()
					flood := s.rt.send(question{Create: s.request(s.w.evil), Until: absentText})
					time.Sleep(rand.N(20 * time.Millisecond))
					s.gate.Kill()
					a := s.receive(flood, 3*time.Minute)
					for text, n := range a.Refused {
						if asked += n; kind(text) == "" {
							t.Errorf("an answer that is none: %s", text)
						}
					}
					asked += a.Allowed
					through += a.Allowed
					if a.Allowed > 1 || a.Allowed == 1 && !l.skips {
						t.Errorf("ESCAPE: %d unsigned containers were let through when the gate was killed", a.Allowed)
					}
				}
				results.putKills(n, l, kills, asked, through)
			})
		}
	}
}

// A table is what all of it answered.
type table struct {
	mu    sync.Mutex
	cells map[string]string // by failure, neighbour and version
	kills []string
	worst time.Duration // until a good image was allowed again
	at    string
}

func (r *table) put(failure string, n neighbour, l *library, answers []string, back time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cells[failure+"|"+string(n)+"|"+l.nri] = strings.Join(slices.Compact(answers), ", ")
	if back > r.worst {
		r.worst, r.at = back, failure+", neighbour "+string(n)+", NRI "+l.nri
	}
}

func (r *table) putKills(n neighbour, l *library, kills, asked, through int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	note := ""
	if through > 0 {
		note = "; a known limit of this version"
	}
	r.kills = append(r.kills, fmt.Sprintf("NRI %s, neighbour %s: %d kills within %d requests, %d let through%s", l.nri, n, kills, asked, through, note))
}

func (r *table) print() {
	if !full || len(r.cells) == 0 {
		return
	}
	fmt.Print("\n| failure | neighbour |")
	for _, l := range libraries {
		fmt.Printf(" %s |", l.nri)
	}
	fmt.Println("\n|---" + strings.Repeat("|---", 1+len(libraries)) + "|")
	for _, f := range failures {
		for _, n := range neighbours {
			var row []string
			for _, l := range libraries {
				row = append(row, r.cells[f.name+"|"+string(n)+"|"+l.nri])
			}
			if strings.Join(row, "") == "" {
				continue
			}
			for i := range row {
				row[i] = cmp.Or(row[i], "FAILED")
			}
			fmt.Printf("| %s | %s | %s |\n", f.name, n, strings.Join(row, " | "))
		}
	}
	fmt.Printf("\nThe longest until a good image was allowed again: %v (%s).\n\nKilled at any moment, each time asked without a pause for an unsigned container:\n\n", r.worst.Round(10*time.Millisecond), r.at)
	for _, k := range r.kills {
		fmt.Println("-", k)
	}
}

// configure writes the gate's configuration with r as the mirror.
func (w *world) configure(dir string, r *node.Registry) error {
	return node.WriteConfig(dir, node.Config{
		Mode: "enforce", Mirrors: []node.Mirror{r.Mirror()}, Stores: w.stores,
		Statements: []verify.Statement{notarytest.Statement("all")},
		More:       map[string]any{"limits": map[string]any{"timeout": "1s"}},
	})
}

func socket(dir, name string) string { return filepath.Join(dir, name) }
