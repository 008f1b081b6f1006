package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestStatus asks the gate how it is while containerd is away, comes, goes on
// without requiring the gate, and goes again.
func TestStatus(t *testing.T) {
	each(t, func(s *scene) {
		good, evil := s.signed("app:status", "status"), s.push(s.reg, "app:status-evil", node.ImageOptions{Word: "evil"})
		s.pull(good.Name)
		s.pull(evil.Name)
		port, err := node.ReservePort()
		s.must(err)
		defer port.Close()
		address := port.Addr
		file := filepath.Join(s.TempDir(), "tidewaiter.prom")
		c := s.policy()
		c.More = map[string]any{"metrics": map[string]any{"listen": address, "file": file}}
		s.configure(c)
		s.status(2, "no gate answers at ")

		// It is not ready before containerd asks it.
		s.must(s.StopContainerd(syscall.SIGTERM))
		s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, NodeName: "edge-1", Binary: program})
		s.must(err)
		s.wait(0, func(l node.Line) bool { return l.Msg == "not registered with the runtime" })
		s.eventually("a control socket", func() bool {
			c, err := net.Dial("unix", filepath.Join(s.RunDir(), "tidewaiter.sock"))
			if err == nil {
				s.must(c.Close())
			}
			return err == nil
		})
		s.ready("NOT_REGISTERED")
		s.status(1, "[NOT_REGISTERED] the runtime does not ask this gate: connect to the runtime: ")
		for name, want := range map[string]float64{"ready": 0, "registered": 0, "enforcing": 0, "registrations_total": 0} {
			if got := s.metrics().value(s, name); got != want {
				s.Errorf("before containerd is there tidewaiter_%s is %v", name, got)
			}
		}
		s.must(s.StartContainerd(s.ctx))
		s.wait(0, node.Registered)
		s.ready("")

		// Creations are counted, each under its reason.
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.allowed(good.Name, "status", node.ContainerOptions{})
		before := s.metrics()
		for range 3 {
			s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
			s.allowed(good.Name, "status", node.ContainerOptions{})
		}
		after := s.metrics()
		for reason, want := range map[verify.Reason]float64{verify.SignatureMissing: 3, verify.Verified: 3, verify.Internal: 0, verify.Revoked: 0} {
			labels := []string{"mode", "enforce", "reason", string(reason)}
			if got := after.value(s, "decisions_total", labels...) - before.value(s, "decisions_total", labels...); got != want {
				s.Errorf("%v more decisions %s, want %v", got, reason, want)
			}
		}
		hook := []string{"hook", "ValidateContainerAdjustment"}
		pending := []string{"mode", "enforce", "reason", string(verify.Pending)} // a no was looked at again
		want := 6 + uint64(after.value(s, "decisions_total", pending...)-before.value(s, "decisions_total", pending...))
		if got := after.count(s, "decision_duration_seconds", hook...) - before.count(s, "decision_duration_seconds", hook...); got != want {
			s.Errorf("%d more answers, want %d", got, want)
		}
		for name, want := range map[string]float64{"ready": 1, "registered": 1, "enforcing": 1, "registrations_total": 1, "config_last_reload_successful": 1, "log_lines_dropped_total": 0} {
			if got := after.value(s, name); got != want {
				s.Errorf("tidewaiter_%s is %v, want %v", name, got, want)
			}
		}
		for _, reason := range []verify.Reason{verify.Verified, verify.SignatureMissing} {
			if got := after.value(s, "sources_asked_total", "source", "mirror", "reason", string(reason)); got < 1 {
				s.Errorf("mirrors said %s %v times", reason, got)
			}
		}
		if full, bound := after.value(s, "assurance", "assurance", "atCreate"), after.value(s, "assurance", "assurance", "atStart"); full+bound != 1 {
			s.Errorf("assurance atCreate %v, atStart %v", full, bound)
		}
		if got := after.value(s, "cache_hits_total", "answer", "allowed"); got < 3 {
			s.Errorf("%v answers from memory", got)
		}
		if got := after.value(s, "cache_entries", "answer", "allowed"); got < 1 {
			s.Errorf("%v answers are kept", got)
		}
		assurance := "atCreate"
		if !s.NamesImage() {
			assurance = "atStart"
		}
		text := s.status(0, "on edge-1: healthy\n")
		for _, want := range []string{"  mode           enforce, assurance " + assurance + "\n", "  runtime        containerd " + s.Version, "SIGNATURE_MISSING 4", s.dir + ", revision "} {
			if !strings.Contains(text, want) {
				s.Errorf("no %q in\n%s", want, text)
			}
		}
		s.noSecrets("the status", text)

		// The same from the listener and the file of the configuration.
		r, err := http.Get("http://" + address + "/metrics")
		s.must(err)
		raw, err := io.ReadAll(r.Body)
		s.must(errors.Join(err, r.Body.Close()))
		http.DefaultClient.CloseIdleConnections()
		if got := s.parse(raw).value(s, "ready"); got != 1 {
			s.Errorf("the listener says %v", got)
		}
		s.eventually("the file says what is so", func() bool {
			raw, err := os.ReadFile(file)
			return err == nil && s.parse(raw).value(s, "ready") == 1
		})

		// A gate that is updated: the new one answers, and goes on when the old one ends.
		old := s.gate
		s.start()
		s.eventually("the new one answers", func() bool { return s.pid() == s.gate.PID })
		s.must(old.Stop())
		if got := s.pid(); got != s.gate.PID {
			s.Errorf("%d answers, not the new gate %d", got, s.gate.PID)
		}
		s.recovers(good.Name, "status") // containerd learns that a gate has left by asking it
		s.status(0, "healthy\n")

		// A configuration that is not put in force.
		mark := s.gate.Mark()
		yaml := filepath.Join(s.dir, "config.yaml")
		whole, err := os.ReadFile(yaml)
		s.must(err)
		s.replace(yaml, "version: 1\nmode: audit\nskip: true\n")
		s.wait(mark, func(l node.Line) bool {
			return l.Msg == "configuration rejected" && strings.Contains(l.Raw, yaml+":3: skip: ")
		})
		s.ready("") // the last good one is in force
		s.status(1, "[CONFIGURATION_REJECTED] the configuration was rejected and the last good one is in force: "+yaml+":3: skip: ")
		if m := s.metrics(); m.value(s, "config_last_reload_successful") != 0 || m.value(s, "config_rejected_total") != 1 {
			s.Error("the metrics know nothing of it")
		}
		mark = s.gate.Mark()
		s.replace(yaml, string(whole))
		s.wait(mark, func(l node.Line) bool { return l.Msg == "configuration in force" })
		s.status(0, "healthy\n")

		// containerd does not require the gate any more: nothing else would tell.
		mark = s.gate.Mark()
		s.must(s.Require(s.ctx, false))
		s.wait(mark, node.Registered)
		s.allowed(good.Name, "status", node.ContainerOptions{})
		s.status(1, "[NOT_REQUIRED] containerd does not require the gate")
		mark = s.gate.Mark()
		s.must(s.Require(s.ctx, true))
		s.wait(mark, node.Registered)
		s.allowed(good.Name, "status", node.ContainerOptions{})
		s.status(0, "healthy\n")

		// It is not ready when containerd is gone, and takes the socket with it.
		s.must(s.StopContainerd(syscall.SIGTERM))
		s.ready("NOT_REGISTERED")
		s.must(s.StartContainerd(s.ctx))
		s.ready("")
		s.must(s.gate.Stop())
		s.status(2, "no gate answers at ")
		left, err := os.ReadFile(file)
		s.must(err)
		if s.parse(left).value(s, "ready") != 0 {
			s.Error("the file of a gate that ended says that it is ready")
		}
	})
}

// status runs tidewaiter status, and checks its exit status and a part of what it
// says.
func (s *scene) status(want int, part string) string {
	s.Helper()
	out, err := exec.CommandContext(s.ctx, program, "status", "--run-dir", s.RunDir()).CombinedOutput()
	var exit *exec.ExitError
	got := 0
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		s.must(err)
	}
	if got != want || !strings.Contains(string(out), part) {
		s.Errorf("status %d, want %d, and %q in\n%s", got, want, part, out)
	}
	return string(out)
}

// ask asks the control socket.
func (s *scene) ask(path string) (int, []byte) {
	s.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(s.RunDir(), "tidewaiter.sock"))
	}}}
	r, err := c.Get("http://gate" + path)
	s.must(err)
	b, err := io.ReadAll(r.Body)
	s.must(errors.Join(err, r.Body.Close()))
	return r.StatusCode, b
}

// ready waits until the gate is ready, or not for a reason.
func (s *scene) ready(reason string) {
	s.Helper()
	last := ""
	s.eventually("ready, or not for "+reason, func() bool {
		code, raw := s.ask("/v1/ready")
		var is struct {
			Schema, Reason, Detail string
			Ready                  bool
		}
		s.must(json.Unmarshal(raw, &is))
		if is.Schema != "tidewaiter.dev/ready/v1" || is.Ready != (code == http.StatusOK) || is.Ready != (is.Reason == "") || !is.Ready && code != http.StatusServiceUnavailable {
			s.Errorf("%d %s", code, raw)
		}
		last = is.Reason
		return last == reason
	})
}

// pid is the process that answers on the control socket.
func (s *scene) pid() int {
	s.Helper()
	_, raw := s.ask("/v1/status")
	var is struct{ PID int }
	s.must(json.Unmarshal(raw, &is))
	return is.PID
}

func (s *scene) eventually(what string, ok func() bool) {
	s.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.Fatal("never: " + what)
		}
	}
}

// A page is the metrics of one moment.
type page map[string]*dto.MetricFamily

func (s *scene) metrics() page {
	s.Helper()
	code, raw := s.ask("/metrics")
	if code != http.StatusOK {
		s.Fatalf("%d %s", code, raw)
	}
	return s.parse(raw)
}

// parse reads metrics as Prometheus does. Each has a help and a type.
func (s *scene) parse(raw []byte) page {
	s.Helper()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(raw))
	if err != nil {
		s.Fatalf("%v in\n%s", err, raw)
	}
	for _, name := range slices.Sorted(maps.Keys(families)) {
		if f := families[name]; f.GetHelp() == "" || f.GetType() == dto.MetricType_UNTYPED || !strings.HasPrefix(name, "tidewaiter_") {
			s.Errorf("%s has no help, no type or not our name", name)
		}
	}
	return families
}

func (p page) metric(s *scene, name string, labels ...string) *dto.Metric {
	s.Helper()
	for _, m := range p["tidewaiter_"+name].GetMetric() {
		var l []string
		for _, p := range m.GetLabel() {
			l = append(l, p.GetName(), p.GetValue())
		}
		if slices.Equal(l, labels) {
			return m
		}
	}
	s.Fatalf("no tidewaiter_%s%q", name, labels)
	return nil
}

func (p page) value(s *scene, name string, labels ...string) float64 {
	s.Helper()
	m := p.metric(s, name, labels...)
	return m.GetCounter().GetValue() + m.GetGauge().GetValue()
}

func (p page) count(s *scene, name string, labels ...string) uint64 {
	s.Helper()
	return p.metric(s, name, labels...).GetHistogram().GetSampleCount()
}
