// Package deploy tests what deploy/ has with the tools that its users have.
package deploy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
)

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "tidewaiter-deploy-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(scratch)
	os.Exit(status)
}

// TestAlerts has Prometheus' own tool read the alert rules and play the stories of
// alerts_test.yaml to them.
func TestAlerts(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	promtool, err := node.FindPromtool(ctx, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rules", "--lint=all", "--lint-fatal", "../../deploy/alerts.yaml"},
		{"test", "rules", "../../deploy/alerts_test.yaml"},
	} {
		out, err := exec.CommandContext(ctx, promtool, args...).CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Errorf("promtool %v: %v", args, err)
		}
	}
}
