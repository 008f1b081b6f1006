package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/nri/tally"
)

// sandboxes is a runtime with pods and containers of certain lengths.
type sandboxes struct {
	list    []tally.Length
	err     error           // of the list
	stays   map[string]bool // pods that cannot be removed
	tried   []string
	removed []string
}

func (s *sandboxes) Lengths(_ context.Context, yield func(tally.Length)) error {
	for _, l := range s.list {
		if !slices.Contains(s.removed, l.Pod) {
			yield(l)
		}
	}
	return s.err
}

func (s *sandboxes) RemoveSandbox(_ context.Context, id string) error {
	s.tried = append(s.tried, id)
	if s.stays[id] {
		return errors.New("as told")
	}
	s.removed = append(s.removed, id)
	return nil
}

func sandbox(id string, size int) tally.Length {
	return tally.Length{Pod: id, Sandbox: true, Told: true, Size: size, Text: "pod team/" + id}
}

const tooLong = 2 * tally.MaxTold

func longPods(n int) (list []tally.Length) {
	for i := range n {
		list = append(list, sandbox(fmt.Sprint("pod", i), tooLong))
	}
	return list
}

func TestClear(t *testing.T) {
	for name, tt := range map[string]struct {
		list  []tally.Length
		until int // after how many pods none may be taken any more; 0: never
		stays map[string]bool
		cut   error    // of the list
		want  []string // pods that are taken away
		tried int
		err   bool
	}{
		"nothing there":               {},
		"pods that are short":         {list: []tally.Length{sandbox("pod0", 100), sandbox("pod1", tally.MaxSandbox)}},
		"pods that are too long":      {list: longPods(2), want: []string{"pod0", "pod1"}, tried: 2},
		"one with a container":        {list: append(longPods(2), tally.Length{Pod: "pod1", Name: "c", Size: 100}), want: []string{"pod0"}, tried: 1},
		"some at a time":              {list: longPods(20), want: []string{"pod0", "pod1", "pod2", "pod3", "pod4", "pod5", "pod6", "pod7"}, tried: 8},
		"until it may not any more":   {list: longPods(9), until: 2, want: []string{"pod0", "pod1"}, tried: 2},
		"a container that is strange": {list: append(longPods(2), tally.Length{Size: 100}), err: true},
		"a record that is too long":   {list: longPods(2), cut: tally.ErrRecord, err: true},
		"a container that is long":    {list: []tally.Length{sandbox("pod0", 100), {Pod: "pod0", Name: "c", Size: tooLong}}},
		"CRI does not answer":         {list: longPods(2), stays: map[string]bool{"pod0": true, "pod1": true}, tried: 2, err: true},
		"one that cannot be stopped":  {list: longPods(3), stays: map[string]bool{"pod0": true}, want: []string{"pod1", "pod2"}, tried: 3, err: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := &sandboxes{list: tt.list, stays: tt.stays, err: tt.cut}
			may := func() bool { return tt.until == 0 || len(s.removed) < tt.until }
			n, err := (&Clearer{Sandboxes: s, May: may, Log: slog.New(slog.DiscardHandler)}).Clear(t.Context())
			if !slices.Equal(s.removed, tt.want) || n != len(tt.want) || (err != nil) != tt.err || len(s.tried) != tt.tried {
				t.Errorf("took %d, %q, %v, after %q", n, s.removed, err, s.tried)
			}
		})
	}
}

// Pods that cannot be removed go last, are tried five times, and keep no other pod; each
// is logged once when it is given up.
func TestClearTriesOthersFirst(t *testing.T) {
	var log strings.Builder
	s := &sandboxes{list: longPods(20), stays: map[string]bool{}}
	for i := range 9 { // more than fail in one Clear
		s.stays[fmt.Sprint("pod", i)] = true
	}
	c := &Clearer{Sandboxes: s, May: func() bool { return true }, Log: slog.New(slog.NewTextHandler(&log, nil))}
	n, err := c.Clear(t.Context())
	if n != 0 || err == nil || len(s.tried) != maxCleared {
		t.Fatalf("at first took %d, %v, after %q", n, err, s.tried)
	}
	s.tried = nil
	if n, err = c.Clear(t.Context()); n != maxCleared || err == nil || len(s.tried) != maxCleared+1 {
		t.Fatalf("then took %d, %v, after %q", n, err, s.tried)
	}
	for range 3 * maxClearTries {
		_, _ = c.Clear(t.Context())
	}
	tries := map[string]int{}
	for _, id := range s.tried {
		tries[id]++
	}
	if len(s.removed) != 11 || tries["pod8"] != maxClearTries || strings.Count(log.String(), "is not tried again") != 9 {
		t.Errorf("took %q, tried %v:\n%s", s.removed, tries, &log)
	}
	s.tried = nil
	if n, err := c.Clear(t.Context()); n != 0 || err != nil || len(s.tried) != 0 {
		t.Errorf("at last took %d, %v, after %q", n, err, s.tried)
	}
	s.list = nil
	if _, err := c.Clear(t.Context()); err != nil || len(c.tries) != 0 {
		t.Errorf("%v, and %d pods that are gone are remembered", err, len(c.tries))
	}
}
