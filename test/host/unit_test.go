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
	out, err := exec.Command("sh", "-c", `. ../../deploy/openrc/tidewaiter; need() { echo "need $*"; }; echo "$supervisor $command $command_args $respawn_max"; depend`).CombinedOutput()
	if want := "supervise-daemon /usr/local/bin/tidewaiter run 0\nneed localmount\n"; err != nil || string(out) != want {
		t.Errorf("%q, %v", out, err)
	}
}
