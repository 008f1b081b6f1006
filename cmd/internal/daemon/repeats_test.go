package daemon

import (
	"fmt"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestRepeats: what a kubelet tries for days is in the log, but not each time.
func TestRepeats(t *testing.T) {
	said := func(pod, id string) verify.Report {
		return verify.Report{ID: id, Pod: &verify.Pod{UID: pod, Container: "c"}}
	}
	var r repeats
	now, lines, unsaid := time.Unix(1e9, 0), 0, 0
	day := func() {
		lines, unsaid = 0, 0
		for range 24 * 60 * 60 / 10 {
			now = now.Add(10 * time.Second)
			if write, n := r.news("answer", "h", said("a", "1"), now); write {
				lines, unsaid = lines+1, unsaid+n
			}
		}
	}
	day()
	if lines < inFull+100 || lines > inFull+144 || unsaid+lines > 8640 || unsaid+lines < 8500 {
		t.Errorf("%d lines a day, of %d more", lines, unsaid)
	}
	day()
	if lines > 144 {
		t.Errorf("%d lines the day after", lines)
	}
	for what, one := range map[string]verify.Report{
		"another reason": said("a", "2"), "another pod": said("b", "1"), "no pod": {ID: "1"},
		"another configuration": {ID: "1", Revision: "2", Pod: &verify.Pod{UID: "a", Container: "c"}},
		"another namespace":     {ID: "1", Pod: &verify.Pod{UID: "a", Namespace: "n", Container: "c"}},
	} {
		if write, n := r.news("answer", "h", one, now); !write || n != 0 {
			t.Errorf("%s: %v %d", what, write, n)
		}
	}
	if write, _ := r.news("verification", "", said("a", "1"), now); !write {
		t.Error("another kind is old news")
	}
	// After a while it is new, and so it is where the clock was set.
	for _, later := range []time.Duration{2 * time.Hour, -48 * time.Hour} {
		if write, _ := r.news("answer", "h", said("a", "1"), now.Add(later)); !write {
			t.Errorf("after %s it is old news", later)
		}
	}
	for i := range 3 * maxRepeated {
		r.news("answer", "h", said(fmt.Sprint(i), "1"), now)
	}
	if n := r.seen.Len(); n != maxRepeated {
		t.Errorf("%d answers are remembered", n)
	}
}

// TestObserveRepeats: old news are at debug level, and counted.
func TestObserveRepeats(t *testing.T) {
	d, log := newDaemon(t)
	log.take(t)
	img := verify.Image{Name: verify.Name{Host: "registry.test", Path: "team/app", Tag: "v1"}, Pod: verify.Pod{Namespace: "shop", Name: "web-1", Container: "web"}}
	for range inFull + 3 {
		d.print(&nri.Answer{Image: img, Decision: verify.Deny(verify.PolicyNoMatch, "no rule"), Hook: "ValidateContainerAdjustment"})
	}
	levels := map[string]int{}
	for _, e := range log.take(t) {
		levels[fmt.Sprint(e["level"])]++
	}
	if levels["INFO"] != inFull || levels["DEBUG"] != 3 {
		t.Errorf("%v", levels)
	}
}
