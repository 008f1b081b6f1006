package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnit has systemd look at the unit. The program that it names is not installed
// where tests run.
func TestUnit(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		if os.Geteuid() != 0 {
			t.Skip("LEFT OUT: systemd-analyze is not installed, and only root can install it")
		}
		_ = exec.Command("apt-get", "update").Run() // a new machine knows no packages; what fails, the next one says
		if out, err := exec.Command("apt-get", "-o", "DPkg::Lock::Timeout=60", "install", "-y", "--no-install-recommends", "systemd").CombinedOutput(); err != nil {
			t.Fatalf("apt-get install systemd: %v\n%s", err, out)
		}
	}
	raw, err := os.ReadFile("../../deploy/systemd/tidewaiter.service")
	if err != nil {
		t.Fatal(err)
	}
	check := func(text string) string {
		t.Helper()
		file := filepath.Join(t.TempDir(), "tidewaiter.service")
		text = strings.Replace(text, "/usr/local/bin/tidewaiter", "/bin/true", 1)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Fatal(err)
		}
		return string(out)
	}
	if out := check(string(raw)); out != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	if out := check(strings.Replace(string(raw), "WatchdogSec=20", "WatchDogSec=20", 1)); !strings.Contains(out, "WatchDogSec") {
		t.Errorf("it finds nothing wrong with a key that there is not:\n%s", out)
	}
}

// TestOpenRC has a shell read the script, as OpenRC does.
func TestOpenRC(t *testing.T) {
	// script runs lines after the script was read, with its log elsewhere.
	script := func(lines string) string {
		t.Helper()
		out, err := exec.Command("sh", "-c", `. ../../deploy/openrc/tidewaiter; `+lines).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v", lines, err)
		}
		return string(out)
	}
	if out, want := script(`need() { echo "need $*"; }; echo "$supervisor $command $command_args $respawn_max $umask $rc_ulimit"; depend`), "supervise-daemon /usr/local/bin/tidewaiter run 0 0077 -n 8192\nneed localmount\n"; out != want {
		t.Errorf("%q", out)
	}

	// The log ends: the supervisor has the file open to append, so that it is emptied in place.
	log := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct {
		size, log, rotated int64 // before, and of both after it; -1: it is not there
	}{{10 << 20, 10 << 20, -1}, {10<<20 + 1, 0, 10<<20 + 1}, {5, 5, 10<<20 + 1}} {
		f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(tt.size); err != nil {
			t.Fatal(err)
		}
		f.Close()
		script(`output_log=` + log + `; healthcheck`)
		for name, want := range map[string]int64{log: tt.log, log + ".1": tt.rotated} {
			got := int64(-1)
			if i, err := os.Stat(name); err == nil {
				got = i.Size()
			}
			if got != want {
				t.Errorf("%d: %s has %d bytes, want %d", tt.size, name, got, want)
			}
		}
	}
	// The copy fails: nothing is lost until the log is twice as long.
	failing := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct{ size, want int64 }{{10<<20 + 1, 10<<20 + 1}, {20 << 20, 20 << 20}, {20<<20 + 1, 0}} {
		if err := os.WriteFile(failing, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(failing, tt.size); err != nil {
			t.Fatal(err)
		}
		script(`cp() { echo half >"$3"; return 1; }; output_log=` + failing + `; healthcheck`)
		if i, err := os.Stat(failing); err != nil || i.Size() != tt.want {
			t.Errorf("copy failed at %d: %v, %v; want %d bytes", tt.size, i, err, tt.want)
		}
		if _, err := os.Stat(failing + ".1"); err == nil {
			t.Error("half a copy is left")
		}
	}
	script(`output_log=` + log + `.none; healthcheck 2>/dev/null`) // the gate is well without a log
	if exec.Command("sh", "-c", "echo -900 >/proc/$$/oom_score_adj").Run() != nil {
		t.Log("LEFT OUT: oom_score_adj, which cannot be lowered here")
	} else if out := script(`start_pre; sh -c 'cat /proc/self/oom_score_adj'`); out != "-900\n" {
		t.Errorf("what the supervisor starts has %q", out)
	}
}
