package registry

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestPaceLeavesTime: a question ahead of time about as many signatures as may be, whose
// blobs are redirected, waits less than the time that it has.
func TestPaceLeavesTime(t *testing.T) {
	const wall, requests = 10 * time.Second, 1 + 3*100
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	start := now
	l := NewBreaker(func() time.Time { return now }, rand.Float64)
	for range requests {
		now = now.Add(paced(l.turn("a"), wall-now.Sub(start)))
	}
	if took := now.Sub(start); took > wall*95/100 {
		t.Errorf("%d requests wait for %v of %v", requests, took, wall)
	} else {
		t.Logf("%d requests wait for %v of %v", requests, took, wall)
	}
	// One after the other keeps to the pace.
	now, start = now.Add(time.Hour), now.Add(time.Hour)
	for range 40 {
		now = now.Add(paced(l.turn("a"), wall))
	}
	if took := now.Sub(start); took < 1500*time.Millisecond {
		t.Errorf("40 requests wait for %v", took)
	}
	if paced(time.Second, -time.Second) != 0 {
		t.Error("a wait after the end")
	}
}
