package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/cmd/internal/decisions"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A log keeps what was logged. It is safe for concurrent use.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take returns the entries since the last call.
func (l *logged) take(t *testing.T) (list []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.b.Bytes()) {
		if bytes.Contains(line, []byte("hunter2")) {
			t.Errorf("the log holds a secret: %s", line)
		}
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(err)
		}
		list = append(list, m)
	}
	l.b.Reset()
	return list
}

// entries wants those messages, in that order, and returns the entries. It waits
// for them, since a verification is logged after those who wait have the answer.
func (l *logged) entries(t *testing.T, messages ...string) []map[string]any {
	t.Helper()
	var list []map[string]any
	for end := time.Now().Add(time.Minute); len(list) < len(messages) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		list = append(list, l.take(t)...)
	}
	var got []string
	for _, m := range list {
		got = append(got, m["msg"].(string))
	}
	if strings.Join(got, "; ") != strings.Join(messages, "; ") {
		t.Fatalf("the log says %q, want %q", got, messages)
	}
	return list
}

func newDaemon(t *testing.T) (*daemon, *logged) {
	t.Helper()
	t.Cleanup(func() {
		if err := leaktest.Find(); err != nil {
			t.Error(err)
		}
	})
	log := &logged{}
	records, err := node.Dial(filepath.Join(t.TempDir(), "none.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	d := &daemon{
		options:  runOptions{node: "edge-17"},
		log:      slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		resolver: node.NewResolver(records, resolverOptions(nil)),
		answers:  make(chan *nri.Answer, unwritten),
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { d.write(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	t.Cleanup(d.close)
	return d, log
}

// write makes a configuration directory that trusts the world's signers for every
// image, with that config.yaml.
func write(t *testing.T, dir, yaml string) {
	t.Helper()
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": world().root}, notarytest.Statement("prod", identity)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ask asks the daemon about an image as the gate does, and gives it some time.
func ask(t *testing.T, d *daemon, name string) verify.Decision {
	t.Helper()
	target := world().images[name].target
	n, err := policy.ParseName("registry.test/team/app@" + target.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	img := verify.Image{
		Name: n, Target: target, Manifest: target, Config: target.Digest,
		Use: verify.UseContainer, Binding: verify.BoundSnapshot,
	}
	if s := d.enforcer.Setup(); s != nil {
		img.Epoch = s.Epoch
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		answer := d.enforcer.Verify(t.Context(), img)
		if answer.Reason != verify.Pending || time.Now().After(end) {
			return answer
		}
	}
}

// The life of a daemon: nothing, something broken, a configuration, another, and
// a broken one after that.
func TestApply(t *testing.T) {
	d, log := newDaemon(t)
	dir := t.TempDir()
	layout := filepath.Join(dir, "usb")
	serveLayout(t, layout, "signed", "unsigned")
	etc := filepath.Join(dir, "etc")
	load := func() { d.apply(config.Load(etc)) }

	if got := ask(t, d, "signed"); got.Allowed() || got.Reason != verify.PolicyInvalid {
		t.Errorf("without a configuration: %s", got.Reason)
	}
	load()
	e := log.entries(t, "configuration rejected")[0]
	if e["level"] != "ERROR" || e["consequence"] != "no configuration is in force: every container is denied" || !strings.Contains(e["error"].(string), "no configuration") {
		t.Errorf("the log says %v", e)
	}
	if got := ask(t, d, "signed"); got.Allowed() || got.Reason != verify.PolicyInvalid {
		t.Errorf("after a broken configuration: %s", got.Reason)
	}

	none := httptest.NewTLSServer(&sourcetest.Registry{Repository: "team/app"})
	t.Cleanup(none.Close)
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, notarytest.PEM(none.Certificate()), 0o644); err != nil {
		t.Fatal(err)
	}
	yaml := "version: 1\nmode: enforce\nsources:\n  layouts: [" + layout + "]\n  mirrors:\n    - {host: registry.test, url: " + none.URL + ", ca: " + ca + "}\n"
	write(t, etc, yaml)
	load()
	e = log.entries(t, "configuration in force")[0]
	first := d.enforcer.Setup()
	if e["mode"] != "enforce" || e["epoch"] != first.Epoch.String() {
		t.Errorf("the log says %v", e)
	}
	if got := ask(t, d, "signed"); !got.Allowed() || got.Reason != verify.Verified || got.Epoch != first.Epoch {
		t.Errorf("signed: %s: %s", got.Reason, got.Detail)
	}
	if got := ask(t, d, "unsigned"); got.Allowed() || got.Reason != verify.SignatureMissing {
		t.Errorf("unsigned: %s: %s", got.Reason, got.Detail)
	}
	report := log.entries(t, "verification", "verification")[0]["decision"].(map[string]any)
	if report["reason"] != "VERIFIED" || !strings.Contains(report["message"].(string), "on node edge-17") {
		t.Errorf("the log says %v", report)
	}

	// Another one, with something doubtful: earlier answers do not count any more.
	old := d.cache
	write(t, etc, yaml+"    - {host: registry.test, url: http://127.0.0.1:1}\n")
	load()
	warned := log.entries(t, "configuration", "configuration in force")[0]
	if warned["level"] != "WARN" || !strings.Contains(warned["warning"].(string), "sources.mirrors[1].url") {
		t.Errorf("the log says %v", warned)
	}
	second := d.enforcer.Setup()
	if second.Epoch == first.Epoch {
		t.Error("the epoch is the same")
	}
	if got := ask(t, d, "signed"); !got.Allowed() || got.Epoch != second.Epoch {
		t.Errorf("after the reload: %s", got.Reason)
	}
	log.entries(t, "verification")
	d.retired.Wait()
	img := verify.Image{Target: world().images["signed"].target, Manifest: world().images["signed"].target, Config: "sha256:x", Use: verify.UseContainer, Binding: verify.BoundSnapshot}
	if got := old.Judge(t.Context(), verify.Question{Image: img, Rule: &verify.Rule{Statement: "prod", Requirement: [32]byte{1}}}); got.Reason != verify.Pending {
		t.Errorf("a retired cache answers %s", got.Reason)
	}

	// A broken one changes nothing, and what is wrong in it is not repeated.
	write(t, etc, "version: 1\nmode: audit\nsources:\n  mirrors:\n    - host: registry.test\n      url: http://me:hunter2@127.0.0.1:1\n")
	load()
	e = log.entries(t, "configuration rejected")[0]
	if e["consequence"] != "the last good configuration stays in force" || !strings.Contains(e["error"].(string), "config.yaml:6: sources.mirrors[0].url: must not hold a user or password") {
		t.Errorf("the log says %v", e)
	}
	if d.enforcer.Setup() != second {
		t.Error("the last good configuration is not in force any more")
	}
	if got := ask(t, d, "unsigned"); got.Allowed() {
		t.Error("a broken configuration lets an unsigned image run")
	}

	// Audit is a mode of the whole node.
	write(t, etc, strings.Replace(yaml, "enforce", "audit", 1))
	load()
	if got := ask(t, d, "unsigned"); !got.Allowed() || got.Reason != verify.AuditOnly {
		t.Errorf("in audit: %s", got.Reason)
	}
	log.take(t)

	d.close()
	if got := ask(t, d, "signed"); got.Allowed() {
		t.Error("a daemon that ended lets an image run")
	}
}

// A verification that hangs under an old configuration is given up with it.
func TestApplyEndsFlights(t *testing.T) {
	d, log := newDaemon(t)
	asked := make(chan struct{}, 100)
	ended := make(chan struct{}, 100)
	stop := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-r.Context().Done():
			ended <- struct{}{}
		case <-stop:
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(stop) })
	etc := t.TempDir()
	write(t, etc, "version: 1\nmode: audit\nlimits:\n  wall: 60s\nsources:\n  mirrors:\n    - host: registry.test\n      url: "+srv.URL+"\n")
	d.apply(config.Load(etc))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	target := world().images["signed"].target
	img := verify.Image{
		Name: verify.Name{Host: "registry.test", Path: "team/app"}, Target: target, Manifest: target, Config: target.Digest,
		Use: verify.UseContainer, Binding: verify.BoundSnapshot,
	}
	img.Epoch = d.enforcer.Setup().Epoch
	if got := d.enforcer.Verify(ctx, img); got.Would != verify.Pending {
		t.Fatalf("would be %s: %s", got.Would, got.Detail)
	}
	wait := func(c <-chan struct{}, what string) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(time.Minute):
			t.Fatal(what)
		}
	}
	wait(asked, "the mirror was not asked")
	write(t, etc, "version: 1\nmode: audit\n")
	d.apply(config.Load(etc))
	wait(ended, "the request goes on under a configuration that is not in force")
	d.retired.Wait()
	log.take(t)
}

// What the hook says is logged once, with everything that a script needs and
// nothing that the pod's author should not have written down.
func TestObserve(t *testing.T) {
	d, log := newDaemon(t)
	img := verify.Image{Name: verify.Name{Host: "registry.test", Path: "team/app", Tag: "v1"}, Pod: verify.Pod{Namespace: "shop", Name: "web-1", Container: "web"}}
	d.observe(nri.Answer{Image: img, Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Took: time.Millisecond, Hook: "ValidateContainerAdjustment"})
	e := log.entries(t, "decision")[0]
	report := e["decision"].(map[string]any)
	pod, _ := report["pod"].(map[string]any)
	if e["level"] != "INFO" || e["hook"] != "ValidateContainerAdjustment" || e["took"] != "1ms" || report["reason"] != "POLICY_NO_MATCH" ||
		report["allowed"] != false || report["schema"] != verify.Schema || pod["name"] != "web-1" || strings.HasPrefix(report["made"].(string), "0001") {
		t.Errorf("the log says %v", e)
	}
	d.observe(nri.Answer{Image: img, Decision: verify.Decision{Reason: verify.Verified}})
	if e := log.entries(t, "decision")[0]; e["level"] != "DEBUG" {
		t.Errorf("an allowed repeat is logged as %v", e["level"])
	}
}

// What is not the normal course is remembered, whatever is logged.
func TestRemembers(t *testing.T) {
	log := &logged{}
	d := &daemon{log: slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelError})), answers: make(chan *nri.Answer, 8)}
	d.ring = decisions.Open("", d.log)
	d.observe(nri.Answer{ID: "c1", Decision: verify.Decision{Reason: verify.Verified}, Hook: "CreateContainer"})
	d.observe(nri.Answer{ID: "c2", Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Hook: "CreateContainer"})
	d.judged(&config.Config{})(verify.Question{}, verify.Deny(verify.SignatureMissing, "none"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d.write(ctx)
	p, err := d.ring.Page(decisions.Filter{Denied: true})
	if err != nil || len(p.Decisions) != 2 || p.More {
		t.Fatalf("%+v %v", p, err)
	}
	v, a := p.Decisions[0], p.Decisions[1]
	if v.Kind != decisions.Verification || a.Kind != decisions.Answer || a.Container != "c2" || a.Mode != "enforce" || time.Since(a.At) > time.Minute {
		t.Errorf("%+v", p.Decisions)
	}
	if all, err := d.ring.Page(decisions.Filter{}); err != nil || len(all.Decisions) != 2 {
		t.Errorf("%+v %v", all, err)
	}
}

// A log that nobody reads does not stop the hook; what was lost is said.
func TestObserveDoesNotBlock(t *testing.T) {
	log := &logged{}
	d := &daemon{log: slog.New(slog.NewJSONHandler(log, nil)), answers: make(chan *nri.Answer, 2)}
	for range 5 {
		d.observe(nri.Answer{Decision: verify.Deny(verify.PolicyNoMatch, "no rule")})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d.write(ctx)
	if e := log.entries(t, "the log is too slow: answers were given and not written", "decision", "decision")[0]; e["answers"] != 3.0 {
		t.Errorf("the log says %v", e)
	}
}

func serveLayout(t *testing.T, dir string, names ...string) {
	t.Helper()
	c, err := content(names, "")
	if err == nil {
		err = writeLayout(dir, c)
	}
	if err != nil {
		t.Fatal(err)
	}
}
