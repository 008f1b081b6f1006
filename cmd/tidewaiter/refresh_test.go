package main

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// TestRefreshed: signatures that were not kept are said.
func TestRefreshed(t *testing.T) {
	if line := refreshed(control.Refreshed{Image: "app", Spare: 3}); !strings.Contains(line, "0 new signatures, 3 more not kept") {
		t.Errorf("said %q", line)
	}
}
