package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
)

// TestOutlives: an installation whose terminal or reader goes away is taken back as any
// other whose gate does not come up. Without that it would end where it is, with the
// program written and nothing that knows of it.
func TestOutlives(t *testing.T) {
	for name, sent := range map[string]string{"hangup": "kill -HUP $PPID", "broken pipe": "true"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			script, did := filepath.Join(dir, "again.sh"), filepath.Join(dir, "did")
			if err := os.WriteFile(script, []byte(sent+"\necho > "+did+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			program := filepath.Join(dir, "bin", "gate")
			cmd := exec.CommandContext(ctx, "tidewaiter", "install", "--program", program,
				"--config-dir", filepath.Join(dir, "etc"), "--state-dir", filepath.Join(dir, "state"), "--run-dir", filepath.Join(dir, "run"),
				"--containerd-config", filepath.Join(dir, "none.toml"), "--service", "none", "--gate-command", "sh "+script, "--wait", "1s")
			if name == "broken pipe" {
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				r.Close()
				defer w.Close()
				cmd.Stdout, cmd.Stderr = w, w
			}
			err := cmd.Run()
			if _, ran := os.Stat(did); ran != nil || cmd.ProcessState.ExitCode() != cli.ExitNo {
				t.Errorf("it ended with %v; the gate was started: %v", err, ran)
			}
			for _, left := range []string{program, filepath.Join(dir, "etc", "config.yaml")} {
				if _, err := os.Stat(left); err == nil {
					t.Errorf("%s is left", left)
				}
			}
		})
	}
}
