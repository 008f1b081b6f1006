// Package failure has things fail on a real node, while containers are created
// from good images and bad ones: unsigned, signed by a stranger, with the
// signature of another image, unknown to the policy, and bad content by a good
// name. No container of a bad image may ever be created; and when the failure is
// over good images start again within five seconds.
//
// The short form runs on containerd 2.4. The full one asks for as many creations a
// failure, while it lasts, as TIDEWAITER_TEST_CREATIONS says, on each version of
// containerd that TIDEWAITER_TEST_CONTAINERD names.
package failure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

var (
	versions  = node.Versions(node.Containerd24, node.Containerd23)
	creations = 30 // of each failure, while it lasts
	short     = true

	program string // tidewaiter
	notRoot string // why nothing can be tested, or empty
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		notRoot = "a node needs root"
		fmt.Fprintln(os.Stderr, "LEFT OUT: all of test/failure:", notRoot)
		os.Exit(m.Run())
	}
	code, err := func() (int, error) {
		if v := os.Getenv("TIDEWAITER_TEST_CREATIONS"); v != "" {
			var err error
			short, limit = false, 5*time.Second
			if creations, err = strconv.Atoi(v); err != nil || creations < 1 {
				return 1, fmt.Errorf("TIDEWAITER_TEST_CREATIONS: %q is no number of creations", v)
			}
		}
		var err error
		if program, err = node.BuildTidewaiter(context.Background()); err != nil {
			return 1, err
		}
		return m.Run(), leaktest.Find()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// A failure is one kind of thing that goes wrong.
type failure struct {
	name   string
	run    func(s *trial)
	mayEnd bool // the gate may end by it, and is then started again
	slow   bool // only in the full form
}

var failures = []failure{
	{name: "gate killed", run: killed},
	{name: "gate stopped", run: stopped},
	{name: "containerd restarted", run: restarted},
	{name: "mirror hung", run: hung},
	{name: "mirror refusing", run: refusing},
	{name: "mirror one byte a second", run: slow},
	{name: "disk full", run: full},
	{name: "directories read-only", run: readOnly},
	{name: "log not read", run: unread},
	{name: "64 MiB and envelope flood", run: flood, mayEnd: true},
	{name: "descriptors exhausted", run: descriptors},
	{name: "clock jumping", run: jumping, slow: true},
}

func TestFailures(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	var rows []row
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			w := &world{}
			var err error
			if w.reg, err = node.NewRegistry("registry.example", node.RegistryOptions{}); err != nil {
				t.Fatal(err)
			}
			defer w.reg.Stop()
			if w.Node, err = node.Start(t.Context(), node.Options{ContainerdVersion: v, Required: true, Log: t.Output()}); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := w.Stop(); err != nil {
					t.Error(err)
				}
			}()
			if err := w.Use(w.reg); err != nil {
				t.Fatal(err)
			}
			for _, f := range failures {
				if f.slow && short {
					continue
				}
				t.Run(f.name, func(t *testing.T) {
					r := try(t, w, f)
					rows = append(rows, r)
					t.Logf("%+v", r)
					if r.during < creations || r.allowed == 0 && f.name != "clock jumping" || r.refused == 0 || r.rounds == 0 {
						t.Errorf("not a test of anything: %+v", r)
					}
				})
			}
		})
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\ncontainerd\tfailure\ttimes\tcreations\twhile it lasted\tgood allowed\trefused\tescapes\tgood again after\t")
	for _, r := range rows {
		fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%v\t%s\n", r.version, r.failure, r.rounds, r.creations, r.during, r.allowed, r.refused, r.escapes,
			r.slowest.Round(time.Millisecond), strings.TrimPrefix(r.note, "; "))
	}
	table.Flush()
}

// begins is a failure without more images.
func begins(shows string, f func(round int)) func(int) (string, []subject) {
	return func(round int) (string, []subject) {
		f(round)
		return shows, nil
	}
}

// killed has the gate crash, and started again.
func killed(s *trial) {
	s.rounds(20, begins(absent, func(int) { s.kill() }), s.start)
}

// stopped has the gate hang: every other time first so shortly that containerd
// waits for it, and then for longer than containerd waits.
func stopped(s *trial) {
	signal := func(sig syscall.Signal) {
		if err := s.current().Signal(sig); err != nil {
			s.Error(err)
		}
	}
	s.rounds(10, begins(absent, func(round int) {
		for range 5 * (round % 2) {
			signal(syscall.SIGSTOP)
			time.Sleep(300 * time.Millisecond)
			signal(syscall.SIGCONT)
			time.Sleep(50 * time.Millisecond)
		}
		signal(syscall.SIGSTOP)
	}), func() { signal(syscall.SIGCONT) })
}

// restarted has containerd restarted as an upgrade does, and crash. The failure
// ends when CRI answers again; what is asked for until the gate is back is refused.
func restarted(s *trial) {
	n := 0
	s.rounds(10, begins("", func(int) {}), func() {
		n++
		sig := syscall.SIGTERM
		if n%2 == 0 {
			sig = syscall.SIGKILL
		}
		s.must(s.StopContainerd(sig))
		s.must(s.StartContainerd(s.ctx))
	})
}

// A spell changes how the registry answers for as long as it lasts. What has been
// asked meanwhile is then answered as ever: where it ends by the mirror's restart
// instead, the connections are cut.
type spell struct{ over chan struct{} }

func (s *trial) cast(answer func(over <-chan struct{}, h http.Handler, w http.ResponseWriter, r *http.Request)) *spell {
	sp := &spell{make(chan struct{})}
	s.reg.Fault(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// The node pulls from the same registry, which is not what fails.
			if strings.HasPrefix(r.UserAgent(), "containerd/") {
				h.ServeHTTP(w, r)
				return
			}
			answer(sp.over, h, w, r)
		})
	})
	return sp
}

func (s *trial) lift(sp *spell) {
	s.reg.Fault(nil)
	close(sp.over)
}

// hung has a mirror that takes requests and does not answer.
func hung(s *trial) {
	var sp *spell
	var mark int
	s.rounds(4, begins("", func(int) {
		mark = s.current().Mark()
		sp = s.cast(func(over <-chan struct{}, h http.Handler, w http.ResponseWriter, r *http.Request) {
			select {
			case <-over:
				h.ServeHTTP(w, r)
			case <-r.Context().Done():
			}
		})
	}), func() {
		s.unreachable(mark)
		s.lift(sp)
	})
}

// unreachable waits until a verification since mark has ended without an answer of
// the mirror. Whoever asked was told PENDING long before.
func (s *trial) unreachable(mark int) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patient)
	defer cancel()
	_, err := s.current().Wait(ctx, mark, func(l node.Line) bool {
		d, _ := l.Fields["decision"].(map[string]any)
		return l.Msg == "verification" && d["reason"] == string(verify.SourceUnreachable)
	})
	s.must(err)
}

// refusing has a mirror that is not there.
func refusing(s *trial) {
	s.rounds(4, begins("["+string(verify.SourceUnreachable)+"]", func(int) { s.must(s.reg.Stop()) }), func() { s.must(s.reg.Start()) })
}

// slow has a mirror that answers right, one byte a second.
func slow(s *trial) {
	var sp *spell
	var mark int
	s.rounds(4, begins("", func(int) {
		mark = s.current().Mark()
		sp = s.cast(func(over <-chan struct{}, h http.Handler, w http.ResponseWriter, r *http.Request) {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			body := rec.Body.Bytes()
			for len(body) > 0 {
				n := 1
				select {
				case <-over:
					n = len(body)
				case <-r.Context().Done():
					return
				case <-time.After(time.Second):
				}
				_, _ = w.Write(body[:n])
				_ = http.NewResponseController(w).Flush()
				body = body[n:]
			}
		})
	}), func() {
		s.unreachable(mark)
		s.lift(sp)
	})
}

// mount makes a file system of the gate's own and puts its directories there.
func (s *trial) mount(size string) (dir string) {
	s.Helper()
	dir = filepath.Join(s.dir, "mount")
	s.must(os.Mkdir(dir, 0o755))
	s.must(unix.Mount("tidewaiter-test", dir, "tmpfs", 0, "mode=755,size="+size))
	s.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			s.Error(err)
		}
	})
	s.place(dir)
	return dir
}

// full has no room where the gate writes, its log included. Every other time the
// gate is started like that.
func full(s *trial) {
	dir := s.mount("2m")
	s.options.Shell = fmt.Sprintf("exec 2>>%q", filepath.Join(dir, "log"))
	fill := filepath.Join(dir, "fill")
	s.rounds(10, begins("", func(round int) {
		f, err := os.Create(fill)
		s.must(err)
		_, err = io.Copy(f, zeros{})
		if !errors.Is(err, syscall.ENOSPC) {
			s.Errorf("filling the disk: %v", err)
		}
		s.must(f.Close())
		if round%2 == 1 {
			s.kill()
			s.start()
		}
	}), func() {
		if err := os.WriteFile(filepath.Join(dir, "another"), make([]byte, 4096), 0o600); !errors.Is(err, syscall.ENOSPC) {
			s.Errorf("the disk is not full any more: %v", err)
		}
		s.must(os.Remove(filepath.Join(dir, "another")))
		s.must(os.Remove(fill))
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// readOnly has everything read-only where the gate has its directories. It is
// started like that.
func readOnly(s *trial) {
	dir := s.mount("16m")
	again := func(flags uintptr) { s.must(unix.Mount("", dir, "", unix.MS_REMOUNT|flags, "")) }
	s.rounds(5, begins("", func(int) {
		s.kill() // what it has open would keep the file system from being changed
		again(unix.MS_RDONLY)
		s.start()
	}), func() {
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
			s.Errorf("the file system is not read-only any more: %v", err)
		}
		again(0)
	})
	s.stop()
}

// unread has nobody read what the gate logs, until the pipe is full. It is also
// started like that, and containerd is.
func unread(s *trial) {
	path := filepath.Join(s.dir, "log")
	s.must(unix.Mkfifo(path, 0o600))
	pipe, err := os.OpenFile(path, os.O_RDWR, 0)
	s.must(err)
	conn, err := pipe.SyscallConn()
	s.must(err)
	s.must(conn.Control(func(fd uintptr) { _, err = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 4096) }))
	s.must(err)
	var reading sync.Mutex // held by who does not want it read
	drained := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			n, err := pipe.Read(b)
			if err != nil {
				return
			}
			reading.Lock()
			drained += n
			reading.Unlock()
		}
	})
	s.Cleanup(func() {
		pipe.Close()
		wg.Wait()
		if drained < 4096 {
			s.Errorf("the gate logged %d bytes: the pipe was never full", drained)
		}
	})
	s.options.Shell = fmt.Sprintf("exec 2>%q", path)
	s.rounds(6, begins("", func(round int) {
		reading.Lock()
		switch round % 3 {
		case 1:
			s.kill()
			s.start()
		case 2:
			s.must(s.Restart(s.ctx))
		}
	}), reading.Unlock)
	s.stop()
}

// flood has a mirror that has as many and as large documents for some images as
// it can think of, and a gate that may not occupy more than a small board has to
// spare. The kernel kills a gate that does.
func flood(s *trial) {
	s.options.Memory = 64 << 20
	s.options.Env = append(s.options.Env, "GOMEMLIMIT=48MiB") // without it Go's heap grows past 64 MiB before it is collected
	var over atomic.Bool
	images := s.flood(&over)
	defer func() {
		if m, err := s.current().Memory(); err == nil {
			s.row.note += fmt.Sprintf("; resident at the end %d MiB, at most %d", m.RSS>>20, m.Peak>>20)
		}
	}()
	s.rounds(5, func(int) (string, []subject) {
		over.Store(false)
		return "", images
	}, func() { over.Store(true) })
}

// flood makes images with floods of signatures that count for nothing: one with as
// many envelopes as are looked at, each as long as may be; and one with signature
// manifests as long as may be. Lists of referrers are padded to what may be. Once it is over
// the mirror has none of it any more.
func (s *trial) flood(over *atomic.Bool) []subject {
	const (
		floods    = 3 // of each kind
		referrers = 200
		envelope  = 256 << 10
		manifest  = 4 << 20
		list      = 4 << 20
	)
	var images []subject
	var paths []string // of lists of referrers
	push := func(repository string, k int) *node.Image {
		name := fmt.Sprintf("%s-%d:1", repository, k)
		img, err := s.reg.Push(s.ctx, name, node.ImageOptions{Word: name, Files: map[string]string{"/etc/name": name}})
		s.must(err)
		images = append(images, s.pull("flooded", false, img))
		paths = append(paths, fmt.Sprintf("/v2/%s-%d/referrers/%s", repository, k, img.Target.Digest))
		return img
	}
	for k := range floods {
		img := push("flood-envelopes", k)
		var parsed map[string]any
		s.must(json.Unmarshal(notarytest.MustSign(stranger, img.Target, notarytest.SignOptions{}), &parsed))
		for i := range referrers {
			// Eight envelopes under many manifests: what counts is what the gate reads.
			parsed["header"].(map[string]any)["io.cncf.notary.signingAgent"] = strings.Repeat(string(rune('a'+i%8)), envelope-8<<10)
			b, err := json.Marshal(parsed)
			s.must(err)
			a := notarytest.Manifest(b, notary.MediaTypeJWS, img.Target, notarytest.Style(0))
			s.must(s.reg.Attach(s.ctx, img, annotated(s, a, i, 0), node.AttachOptions{}))
		}
	}
	for k := range floods {
		img := push("flood-manifests", k)
		b := notarytest.MustSign(stranger, img.Target, notarytest.SignOptions{})
		for i := range 4 {
			a := notarytest.Manifest(b, notary.MediaTypeJWS, img.Target, notarytest.Style(0))
			s.must(s.reg.Attach(s.ctx, img, annotated(s, a, i, manifest-64<<10), node.AttachOptions{}))
		}
	}
	// A list is made once: it is the gate that is to have work, not the mirror.
	var mu sync.Mutex
	lists := map[string][]byte{}
	s.cast(func(_ <-chan struct{}, h http.Handler, w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v2/flood-") && over.Load() {
			http.NotFound(w, r)
			return
		}
		if !strings.HasPrefix(r.URL.Path, "/v2/flood-") || !strings.Contains(r.URL.Path, "/referrers/") {
			h.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		body := lists[r.URL.Path]
		if body == nil {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			var index ocispec.Index
			if json.Unmarshal(rec.Body.Bytes(), &index) != nil {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			for i := range index.Manifests {
				index.Manifests[i].Annotations = map[string]string{"padding": strings.Repeat("x", (list-64<<10)/len(index.Manifests)-512)}
			}
			body, _ = json.Marshal(index)
			lists[r.URL.Path] = body
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		_, _ = w.Write(body)
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, path := range paths {
		res, err := client.Get(s.reg.URL() + path)
		s.must(err)
		n, err := io.Copy(io.Discard, res.Body)
		s.must(errors.Join(err, res.Body.Close()))
		if res.StatusCode != http.StatusOK || n < list/2 {
			s.Fatalf("%s: status %d, %d bytes", path, res.StatusCode, n)
		}
	}
	return images
}

// annotated is a with annotations in its manifest that make it the only one of its
// kind, and of about that size.
func annotated(s *trial, a notarytest.Artifact, i, size int) notarytest.Artifact {
	var m ocispec.Manifest
	s.must(json.Unmarshal(a.Manifest.Content, &m))
	m.Annotations = map[string]string{"number": strconv.Itoa(i), "padding": strings.Repeat("x", size)}
	b, err := json.Marshal(m)
	s.must(err)
	a.Manifest = notarytest.NewBlob(ocispec.MediaTypeImageManifest, b)
	return a
}

// descriptors has no file descriptor left for the gate, every other time also none
// for a connection to a containerd that was restarted.
func descriptors(s *trial) {
	var was unix.Rlimit
	pid := 0
	exhaust := func() {
		s.Helper()
		pid = s.current().PID
		s.must(unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was))
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		s.must(err)
		lowest := 0 // that is not open: the limit is on the number that is given out
		for slices.ContainsFunc(open, func(e os.DirEntry) bool { return e.Name() == strconv.Itoa(lowest) }) {
			lowest++
		}
		s.must(unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(lowest), Max: was.Max}, nil))
	}
	// The mirror keeps no connection open, so that each question needs a descriptor.
	sp := s.cast(func(_ <-chan struct{}, h http.Handler, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		h.ServeHTTP(w, r)
	})
	defer s.lift(sp)
	s.rounds(9, func(round int) (string, []subject) {
		if round%2 == 0 {
			exhaust()
			return "too many open files", nil
		}
		s.must(s.StopContainerd(syscall.SIGTERM))
		exhaust()
		s.must(s.StartContainerd(s.ctx))
		return absent, nil
	}, func() { s.must(unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil)) })
}

// jumping has the node's clock set to when no certificate is valid any more, or
// yet, where not even a good image may start, and to and fro by an hour, which
// changes nothing.
func jumping(s *trial) {
	program, err := node.BuildJumping(s.ctx)
	s.must(err)
	clock, err := node.NewClock(filepath.Join(s.dir, "clock"))
	s.must(err)
	s.Cleanup(func() { clock.Close() })
	s.options.Binary = program
	s.options.Env = append(s.options.Env, clock.Env())
	const year = 365 * 24 * time.Hour
	jumps := []time.Duration{60 * year, -20 * year, time.Hour, -time.Hour}
	s.rounds(12, func(round int) (string, []subject) {
		by := jumps[round%len(jumps)]
		s.must(clock.Jump(by))
		if by.Abs() < year {
			return "", nil
		}
		s.nobody.Store(true)
		return "[" + string(verify.CertificateExpired) + "]", nil
	}, func() { s.must(clock.Jump(0)) })
}
