package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// parse reads metrics as Prometheus does.
func parse(t testing.TB, text []byte) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return families
}

func write(t testing.TB, c *Counters, s State) map[string]*dto.MetricFamily {
	t.Helper()
	var b bytes.Buffer
	must(t, c.Write(&b, s))
	return parse(t, b.Bytes())
}

// value is that of the one sample with these labels.
func value(t testing.TB, families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	t.Helper()
	for _, m := range families["tidewaiter_"+name].GetMetric() {
		var l []string
		for _, p := range m.GetLabel() {
			l = append(l, p.GetName(), p.GetValue())
		}
		if slices.Equal(l, labels) {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	t.Fatalf("no tidewaiter_%s%q", name, labels)
	return 0
}

// Every reason of the core has a series, but AUDIT_ONLY, which is counted as what
// enforce would have said.
func TestReasons(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "../../../verify/reason.go", nil, 0)
	must(t, err)
	var declared []string
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			for _, v := range s.(*ast.ValueSpec).Values {
				code, err := strconv.Unquote(v.(*ast.BasicLit).Value)
				must(t, err)
				declared = append(declared, code)
			}
		}
	}
	if len(declared) < 20 {
		t.Fatalf("%d reasons are seen", len(declared))
	}
	listed := []string{verify.AuditOnly.String()}
	for _, r := range reasons {
		listed = append(listed, r.String())
	}
	slices.Sort(declared)
	slices.Sort(listed)
	if !slices.Equal(declared, listed) {
		t.Errorf("declared are %v\nlisted are %v", declared, listed)
	}
}

func TestCounters(t *testing.T) {
	var c Counters
	say := func(m verify.Mode, hook string, d verify.Decision, took time.Duration) {
		c.Answered(m, nri.Answer{Decision: d, Hook: hook, Took: took})
	}
	const validate, create = "ValidateContainerAdjustment", "CreateContainer"
	say(verify.Enforce, validate, verify.Deny(verify.SignatureMissing, ""), time.Millisecond)
	say(verify.Enforce, validate, verify.Deny(verify.SignatureMissing, ""), 3*time.Second)
	say(verify.Enforce, validate, verify.Decision{Reason: verify.Verified}, 100*time.Microsecond)
	say(verify.Enforce, validate, verify.Decision{}, -time.Hour)
	say(verify.Enforce, validate, verify.Decision{Reason: "MADE_UP"}, 0)
	say(verify.Audit, create, verify.Decision{Reason: verify.AuditOnly, Would: verify.Revoked}, 50*time.Millisecond)
	say(7, "Another", verify.Decision{Reason: verify.AuditOnly}, 0)

	f := write(t, &c, State{})
	for _, tt := range []struct {
		mode   string
		reason verify.Reason
		want   float64
	}{
		{"enforce", verify.SignatureMissing, 2}, {"enforce", verify.Verified, 1}, {"enforce", verify.Internal, 3},
		{"audit", verify.Revoked, 1}, {"audit", verify.Verified, 0}, {"audit", verify.Internal, 0}, {"enforce", verify.Pending, 0},
	} {
		if got := value(t, f, "decisions_total", "mode", tt.mode, "reason", tt.reason.String()); got != tt.want {
			t.Errorf("%s %s: %v, want %v", tt.mode, tt.reason, got, tt.want)
		}
	}
	if n := len(f["tidewaiter_decisions_total"].GetMetric()); n != len(modes)*len(reasons) {
		t.Errorf("%d series of decisions", n)
	}
	if got := c.Decisions(); fmt.Sprint(got) != "map[audit:map[REVOKED:1] enforce:map[INTERNAL:3 SIGNATURE_MISSING:2 VERIFIED:1]]" {
		t.Errorf("decisions %v", got)
	}
	for _, m := range f["tidewaiter_decision_duration_seconds"].GetMetric() {
		h := m.GetHistogram()
		want, sum := map[string]uint64{validate: 5, create: 1}[m.GetLabel()[0].GetValue()], map[string]float64{validate: 3.0011, create: 0.05}[m.GetLabel()[0].GetValue()]
		if h.GetSampleCount() != want || max(h.GetSampleSum()-sum, sum-h.GetSampleSum()) > 1e-9 {
			t.Errorf("%v: %d answers took %v", m.GetLabel(), h.GetSampleCount(), h.GetSampleSum())
		}
		last, at := uint64(0), map[float64]uint64{}
		for _, b := range h.GetBucket() {
			if b.GetCumulativeCount() < last {
				t.Errorf("bucket %v is smaller than the one before", b.GetUpperBound())
			}
			last = b.GetCumulativeCount()
			at[b.GetUpperBound()] = last
		}
		if want == 5 && (at[0.0001] != 3 || at[0.0005] != 3 || at[0.001] != 4 || at[2] != 4 || last != 5) || want == 1 && (at[0.025] != 0 || at[0.05] != 1) {
			t.Errorf("buckets %v", at)
		}
	}
}

// Each hook in which the gate answers has a histogram.
func TestHooks(t *testing.T) {
	var c Counters
	for _, hook := range []string{"RunPodSandbox", "ValidateContainerAdjustment", "CreateContainer", "StartContainer"} {
		c.Answered(verify.Enforce, nri.Answer{Decision: verify.Deny(verify.PodTooLarge, "long"), Hook: hook, Took: time.Millisecond})
	}
	hooks := map[string]uint64{}
	for _, m := range write(t, &c, State{})["tidewaiter_decision_duration_seconds"].GetMetric() {
		hooks[m.GetLabel()[0].GetValue()] = m.GetHistogram().GetSampleCount()
	}
	if len(hooks) != 4 || hooks["RunPodSandbox"] != 1 {
		t.Errorf("answers by hook: %v", hooks)
	}
}

// The hook pays for counting with nothing that waits and nothing that is
// collected.
func TestAnsweredDoesNotAllocate(t *testing.T) {
	var c Counters
	a := nri.Answer{Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Hook: "StartContainer", Took: time.Millisecond}
	if n := testing.AllocsPerRun(100, func() { c.Answered(verify.Enforce, a) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestState(t *testing.T) {
	var c Counters
	c.Rejected.Add(2)
	c.Dropped.Add(3)
	f := write(t, &c, State{
		Ready: true, Version: "v1 \"x\"\n", Mode: "enforce", Revision: "0123", Invalid: true,
		Session: nri.State{Registered: true, Registrations: 4, UnderWay: 1, Late: 5, Stuck: 6, Strangers: 7, Alarms: 8},
		Cache: &cache.Stats{AllowedHits: 9, DeniedHits: 10, Misses: 11, Joined: 12, AllowedEvicted: 13, DeniedEvicted: 14,
			Started: 15, Ended: 16, Panics: 17, Overloaded: 18, Running: 19, Waiting: 20, Ahead: 21, Allowed: 22, Denied: 23},
	})
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"ready", nil, 1}, {"registered", nil, 1}, {"enforcing", nil, 1}, {"config_last_reload_successful", nil, 0},
		{"config_info", []string{"revision", "0123", "mode", "enforce", "version", "v1 \"x\"\n"}, 1},
		{"config_rejected_total", nil, 2}, {"log_lines_dropped_total", nil, 3}, {"registrations_total", nil, 4},
		{"requests_in_flight", nil, 1}, {"requests_late_total", nil, 5}, {"requests_hung", nil, 6}, {"duplicate_plugins", nil, 7}, {"duplicate_plugin_alarms_total", nil, 8},
		{"cache_hits_total", []string{"answer", "allowed"}, 9}, {"cache_hits_total", []string{"answer", "denied"}, 10}, {"cache_misses_total", nil, 11},
		{"cache_joined_total", nil, 12}, {"cache_evictions_total", []string{"answer", "allowed"}, 13}, {"cache_evictions_total", []string{"answer", "denied"}, 14},
		{"verifications_started_total", nil, 15}, {"verifications_ended_total", nil, 16}, {"verifications_panicked_total", nil, 17}, {"verifications_refused_total", nil, 18},
		{"verifications_running", nil, 19}, {"verifications_waiting", []string{"ahead", "false"}, 20}, {"verifications_waiting", []string{"ahead", "true"}, 21},
		{"cache_entries", []string{"answer", "allowed"}, 22}, {"cache_entries", []string{"answer", "denied"}, 23},
	} {
		if got := value(t, f, tt.name, tt.labels...); got != tt.want {
			t.Errorf("%s%q is %v, want %v", tt.name, tt.labels, got, tt.want)
		}
	}
	f = write(t, &c, State{Refresh: &reconcile.RefreshStatus{Images: 1, Failing: 2, Asked: 3, Failed: 4, Fresh: 5, Last: time.Unix(6, 0), Next: time.Unix(7, 0), Error: "secret"}})
	for name, want := range map[string]float64{"images": 1, "failing": 2, "asked_total": 3, "failed_total": 4, "new_total": 5, "last_timestamp_seconds": 6, "next_timestamp_seconds": 7} {
		if got := value(t, f, "refresh_"+name); got != want {
			t.Errorf("refresh_%s is %v, want %v", name, got, want)
		}
	}
	f = write(t, &c, State{Store: &Store{Signatures: 1, Bytes: 2, Failing: true, Archives: 3, Bad: 4, Archived: 5, Unread: true}})
	for name, want := range map[string]float64{"store_signatures": 1, "store_bytes": 2, "store_failing": 1, "archives": 3, "archives_failing": 4, "archive_signatures": 5, "archives_unread": 1} {
		if got := value(t, f, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	f = write(t, &c, State{Sweep: &reconcile.RunningStatus{At: time.Unix(1, 0), Error: "x", Gone: 1, Ungated: 2, Stopped: 3,
		Ends:    map[string]time.Time{"signature": time.Unix(8, 0), "nothing": time.Unix(9, 0), "made up": time.Unix(9, 0)},
		Reasons: map[verify.Reason]int{verify.Verified: 4, verify.Revoked: 5, "": 6, "MADE_UP": 7}}})
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"running", []string{"reason", "VERIFIED"}, 4}, {"running", []string{"reason", "REVOKED"}, 5}, {"running", []string{"reason", "INTERNAL"}, 13}, {"running", []string{"reason", "PENDING"}, 0},
		{"running_gone", nil, 1}, {"running_ungated", nil, 2}, {"running_stopped_total", nil, 3}, {"running_incomplete", nil, 1}, {"answer_ends_timestamp_seconds", []string{"cause", "signature"}, 8},
	} {
		if got := value(t, f, tt.name, tt.labels...); got != tt.want {
			t.Errorf("%s%q is %v, want %v", tt.name, tt.labels, got, tt.want)
		}
	}
	if n := len(f["tidewaiter_running"].GetMetric()); n != len(reasons) {
		t.Errorf("%d series of what runs", n)
	}
	if n := len(f["tidewaiter_answer_ends_timestamp_seconds"].GetMetric()); n != 1 {
		t.Errorf("%d ends of answers", n)
	}
	c.Asked([]verify.Attempt{{Source: "mirror http://a", Reason: verify.SourceUnreachable}, {Source: "mirror http://b", Reason: verify.Verified}, {Source: "store /x", Reason: "MADE_UP"}, {Source: "else", Reason: verify.Verified}})
	c.Asked([]verify.Attempt{{Source: "mirror http://a", Reason: verify.SourceUnreachable}})
	f = write(t, &c, State{})
	for _, tt := range []struct {
		source, reason string
		want           float64
	}{{"mirror", "SOURCE_UNREACHABLE", 2}, {"mirror", "VERIFIED", 1}, {"store", "INTERNAL", 1}} {
		if got := value(t, f, "sources_asked_total", "source", tt.source, "reason", tt.reason); got != tt.want {
			t.Errorf("%v, want %v", got, tt)
		}
	}
	if n := len(f["tidewaiter_sources_asked_total"].GetMetric()); n != 3 {
		t.Errorf("%d series of sources", n)
	}
	f = write(t, &c, State{Assured: "atStart", Assure: []string{"atCreate", "atStart", "none"}})
	for tier, want := range map[string]float64{"atCreate": 0, "atStart": 1, "none": 0} {
		if got := value(t, f, "assurance", "assurance", tier); got != want {
			t.Errorf("assurance %s is %v, want %v", tier, got, want)
		}
	}
	f = write(t, &c, State{Codes: []string{"A", "B"}, Found: []string{"B", "C"}})
	if n := len(f["tidewaiter_problem"].GetMetric()); n != 2 || value(t, f, "problem", "code", "A") != 0 || value(t, f, "problem", "code", "B") != 1 {
		t.Errorf("problems %v", f["tidewaiter_problem"])
	}
	if f = write(t, &c, State{Sweep: &reconcile.RunningStatus{}}); f["tidewaiter_running"] != nil {
		t.Error("what runs is told before anybody looked")
	}
	f = write(t, &c, State{Ready: true, Mode: "audit", Revision: "1"})
	if value(t, f, "enforcing") != 0 || value(t, f, "ready") != 1 || value(t, f, "registered") != 0 || f["tidewaiter_cache_misses_total"] != nil {
		t.Error("audit enforces, or there is a cache")
	}
	if f = write(t, &c, State{}); f["tidewaiter_config_info"] != nil || value(t, f, "ready") != 0 {
		t.Error("there is a configuration")
	}
}

// docs/control.md has a row for each metric, and for no other.
func TestDocumentation(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/control.md")
	must(t, err)
	var c Counters
	c.Asked([]verify.Attempt{{Source: "store", Reason: verify.Verified}})
	f := write(t, &c, State{Revision: "0", Cache: &cache.Stats{}, Codes: []string{"A"}, Assure: []string{"atCreate"}, Sweep: &reconcile.RunningStatus{At: time.Unix(1, 0), Ends: map[string]time.Time{"signature": {}}}, Store: &Store{},
		Refresh: &reconcile.RefreshStatus{Last: time.Unix(1, 0), Next: time.Unix(1, 0)}})
	for name := range f {
		if !strings.Contains(string(doc), "| `"+name) {
			t.Errorf("no row for %s", name)
		}
	}
	for line := range strings.Lines(string(doc)) {
		if rest, is := strings.CutPrefix(line, "| `tidewaiter_"); is {
			name, _, _ := strings.Cut(rest, "`")
			name, _, _ = strings.Cut(name, "{")
			if f["tidewaiter_"+name] == nil {
				t.Errorf("a row for %s, which there is not", name)
			}
		}
	}
}

// A logged keeps what was logged. It is safe for concurrent use.
type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// An export is an Exporter that runs, of a text that a test sets.
type export struct {
	*Exporter
	text atomic.Value
	log  logged
	stop func()
}

func start(t testing.TB, text string) *export {
	t.Helper()
	e := &export{}
	e.text.Store(text)
	e.Exporter = NewExporter(func(w io.Writer) error {
		_, err := io.WriteString(w, e.text.Load().(string))
		return err
	}, serve, slog.New(slog.NewTextHandler(&e.log, nil)), time.Now)
	e.every = 5 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		must(t, <-done)
	})
	t.Cleanup(e.stop)
	return e
}

// serve says hello to whoever connects.
func serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		io.WriteString(c, "hello")
		c.Close()
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func holds(file, text string) func() bool {
	return func() bool { b, err := os.ReadFile(file); return err == nil && string(b) == text }
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "tidewaiter.prom")
	e := start(t, "one\n")
	e.Set(Target{File: file})
	eventually(t, "the file", holds(file, "one\n"))
	first, err := os.Stat(file)
	must(t, err)
	if first.Mode() != 0o644 {
		t.Errorf("its mode is %v", first.Mode())
	}
	// What it says already is not written again.
	other := filepath.Join(dir, "other.prom")
	time.Sleep(10 * e.every)
	if now, err := os.Stat(file); err != nil || !os.SameFile(first, now) {
		t.Error("the same is written again")
	}
	// Only what differs is, also where somebody else wrote.
	must(t, os.WriteFile(file, []byte("two\n"), 0o600))
	eventually(t, "it is put right", holds(file, "one\n"))
	e.text.Store("three\n")
	eventually(t, "it is new", holds(file, "three\n"))
	// What is not a file is replaced, not followed.
	must(t, os.WriteFile(other, []byte("mine"), 0o600))
	link := filepath.Join(dir, "link")
	must(t, os.Symlink(other, link))
	must(t, os.Rename(link, file))
	eventually(t, "the link is replaced", func() bool { i, err := os.Lstat(file); return err == nil && i.Mode().IsRegular() })
	if !holds(other, "mine")() {
		t.Error("what the link leads to was written")
	}
	// An old one is of a gate that died: this one is not.
	old := time.Now().Add(-2 * fresh)
	must(t, os.Chtimes(file, old, old))
	eventually(t, "it is fresh", func() bool { i, err := os.Stat(file); return err == nil && i.ModTime().After(old.Add(fresh)) })

	// Elsewhere: the old one is removed, nobody keeps it up to date.
	must(t, os.Remove(other))
	e.Set(Target{File: other})
	eventually(t, "the other file", holds(other, "three\n"))
	eventually(t, "the old one is gone", func() bool { _, err := os.Lstat(file); return os.IsNotExist(err) })
	// At the end it says what is so then.
	e.text.Store("the end\n")
	e.stop()
	if !holds(other, "the end\n")() {
		t.Error("the last state is not written")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// Of two gates that write the same file, the one that ends leaves it alone.
func TestFileOfAnother(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.prom")
	e := start(t, "old\n")
	e.Set(Target{File: file})
	eventually(t, "the file", holds(file, "old\n"))
	f := textfile{name: file, last: []byte("old\n")}
	must(t, os.WriteFile(file, []byte("new\n"), 0o644))
	if f.ours() {
		t.Error("another's file is ours")
	}
	f.remove()
	if !holds(file, "new\n")() && !holds(file, "old\n")() {
		t.Error("another's file is gone")
	}
}

// What does not work is said once, shown, and tried again.
func TestTrouble(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	dir := filepath.Join(t.TempDir(), "later")
	file := filepath.Join(dir, "x.prom")
	e := start(t, "one\n")
	e.Set(Target{Listen: taken.Addr().String(), File: file})
	eventually(t, "both are said", func() bool { return len(e.Troubles()) == 2 })
	time.Sleep(5 * e.every)
	if text := e.log.String(); strings.Count(text, "level=WARN") != 2 || !strings.Contains(text, "field=metrics.listen") || !strings.Contains(text, "field=metrics.file") {
		t.Errorf("the log says %s", text)
	}
	if l := strings.Join(e.Troubles(), "\n"); !strings.Contains(l, "metrics.file: ") || !strings.Contains(l, "address already in use") {
		t.Errorf("troubles: %s", l)
	}
	must(t, taken.Close())
	must(t, os.Mkdir(dir, 0o755))
	eventually(t, "the file", holds(file, "one\n"))
	eventually(t, "the listener", func() bool { return says(taken.Addr().String(), "hello") })
	eventually(t, "nothing is said", func() bool { return len(e.Troubles()) == 0 })
	e.Set(Target{})
	eventually(t, "it is closed", func() bool { return !says(taken.Addr().String(), "hello") })
	eventually(t, "the file is gone", func() bool { _, err := os.Lstat(file); return os.IsNotExist(err) })
}

func says(address, want string) bool {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return err == nil && string(b) == want
}

// A disk that is full costs the file, and leaves nothing behind.
func TestFileFails(t *testing.T) {
	dir := t.TempDir()
	f := textfile{name: filepath.Join(dir, "x.prom")}
	broken := errors.New("no metrics")
	if err := f.update(func(io.Writer) error { return broken }, time.Now()); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	must(t, os.MkdirAll(filepath.Join(f.name, "below"), 0o755))
	if err := f.update(func(w io.Writer) error { _, err := io.WriteString(w, "one\n"); return err }, time.Now()); err == nil || !strings.Contains(err.Error(), f.name) {
		t.Errorf("a directory was replaced: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
