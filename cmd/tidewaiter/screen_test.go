package main

import (
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// TestRunningCounts: status counts what runs as images counts images, so that what could
// not be found out is not called denied.
func TestRunningCounts(t *testing.T) {
	s := &control.Status{}
	s.Running = control.Running{At: new(time.Unix(1e9, 0)), Containers: 10, Reasons: map[string]int{
		"VERIFIED": 3, "ALLOWED_BY_DIGEST": 1, "SIGNATURE_MISSING": 2, "SOURCE_UNREACHABLE": 3, "PENDING": 1,
	}}
	if text := screen(s); !strings.Contains(text, "10 containers, 2 would be denied, 4 could not be judged, ") {
		t.Error(text)
	}
}
