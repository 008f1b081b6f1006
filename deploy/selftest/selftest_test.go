package selftest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tidewaiter/tidewaiter/deploy/config"
)

func TestRules(t *testing.T) {
	s := config.Summary{
		Statements: []config.Statement{
			{Name: "a", Scopes: []string{"Registry.Example/app", "docker.io/library/x"}},
			{Name: "b", Scopes: []string{"*"}},
		},
		Mirrors: []config.Listed{{Host: "*"}, {Host: "m.example:5000"}},
	}
	rules, more := rulesOf(s, "t", "")
	want := []rule{{"a", "registry.example/app:t"}, {"a", "docker.io/library/x:t"}, {"b", "m.example:5000/tidewaiter-selftest:t"}}
	if more != 0 || !reflect.DeepEqual(rules, want) {
		t.Errorf("%v, %d", rules, more)
	}
	s.Mirrors = nil
	if rules, _ = rulesOf(s, "t", ""); rules[2].image != "tidewaiter-selftest.invalid/tidewaiter-selftest:t" {
		t.Errorf("%v", rules[2])
	}
	if rules, _ = rulesOf(s, "t", "r.example/on-the-node"); rules[2].image != "r.example/on-the-node:t" || rules[0] != want[0] {
		t.Errorf("%v", rules)
	}
	s.Statements[0].Scopes = nil
	for i := range maxRules + 3 {
		s.Statements[0].Scopes = append(s.Statements[0].Scopes, fmt.Sprintf("r.example/%d", i))
	}
	if rules, more = rulesOf(s, "t", ""); len(rules) != maxRules || more != 4 {
		t.Errorf("%d and %d more", len(rules), more)
	}
}

// TestBuild wants an image that is whole, and another one for each nonce.
func TestBuild(t *testing.T) {
	a, err := build("1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := build("2")
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	var c ocispec.Image
	if err := json.Unmarshal(a[2].raw, &m); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(a[1].raw, &c); err != nil {
		t.Fatal(err)
	}
	if m.Config.Digest != a[1].Digest || len(m.Layers) != 1 || m.Layers[0].Digest != a[0].Digest || m.Layers[0].Size != int64(len(a[0].raw)) ||
		len(c.RootFS.DiffIDs) != 1 || c.RootFS.DiffIDs[0] != a[0].Digest || c.Config.Labels[label] != "1" {
		t.Errorf("%s\n%s", a[2].raw, a[1].raw)
	}
	for i := range a {
		if a[i].Digest == b[i].Digest {
			t.Errorf("blob %d is the same for two nonces", i)
		}
	}
}

// TestMessage reads what somebody else could have written, whole and cut at each byte.
func TestMessage(t *testing.T) {
	m := message(nil).text(1, "id").number(4, 1<<40).entry(5, label, "x").text(3, "")
	if !strings.HasPrefix(string(m), "\n\x02id \x80\x80\x80\x80\x80 *") || m.get(1) == nil || string(m.get(5).get(1)) != label || m.get(3) != nil {
		t.Errorf("%q", m)
	}
	whole := 0
	for n := range len(m) + 1 {
		if m[:n].fields(func(protowire.Number, message, uint64) {}) == nil {
			whole++
		}
	}
	if whole != 4 { // nothing, and after each field
		t.Errorf("%d of its beginnings are messages", whole)
	}
}

func TestLines(t *testing.T) {
	const by = `failed to create containerd container: validator "00-default-validator" rejected container adjustment, reason: validation error: required plugin "%s" not present`
	for name, want := range map[string]bool{"tidewaiter": true, "99-tidewaiter": true, "other": false, "my-tidewaiter": false} {
		line := fmt.Sprintf(by, name)
		if absentLine.MatchString(line) != want || !otherLine.MatchString(line) {
			t.Error(line)
		}
	}
	if m := denial.FindStringSubmatch("rpc error: tidewaiter: denied [SIGNATURE_MISSING] x: y"); m == nil || m[1] != "SIGNATURE_MISSING" {
		t.Errorf("%q", m)
	}
}

// TestGuard stops a process and lets the one that would continue it end.
func TestGuard(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	stopped := func(want bool) {
		t.Helper()
		for range 6000 {
			raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(raw), ") T ") == want {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("it is not stopped: %t", want)
	}
	alive, hand := io.Pipe()
	var ready bytes.Buffer
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped(true)
	ended := make(chan error)
	go func() { ended <- Guard(cmd.Process.Pid, alive, &ready) }()
	hand.Close()
	if err := <-ended; err != nil || ready.Len() != 1 {
		t.Errorf("%v, %q", err, &ready)
	}
	stopped(false)
}

// TestStopped wants hold to see whether SIGSTOP had an effect: the first process of a PID
// namespace ignores it.
func TestStopped(t *testing.T) {
	sleeper := exec.Command("sleep", "60")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = sleeper.Process.Kill()
		_ = sleeper.Wait()
	}()
	pid := sleeper.Process.Pid
	if err := stopped(t.Context(), pid); err == nil || !strings.Contains(err.Error(), "on the host") {
		t.Errorf("a process that runs on: %v", err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := stopped(t.Context(), pid); err != nil {
		t.Errorf("a process that was stopped: %v", err)
	}
	for _, gone := range []string{
		`rpc error: code = Unknown desc = sandbox container "7fd8ab" is not running`,
		`failed to find sandbox id "7fd8ab": not found`,
	} {
		if !podGone.MatchString(gone) {
			t.Errorf("not taken for a pod that is gone: %s", gone)
		}
	}
	if podGone.MatchString(`container "7fd8ab" is not running`) {
		t.Error("a container was taken for a pod")
	}
}
