package tally

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// What a tally lets in keeps no gate from registering, whatever of it goes away later.
// Each pod and container is within what is allowed of one.
func TestTallyKeepsRegistration(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 5))
	refused := 0
	for range 400 {
		tally := New(nil, time.Now, func() {})
		pods := random.IntN(40) + 1
		most := 1 + random.IntN(MaxTold)
		containers := 1 + random.IntN(120)
		if random.IntN(3) == 0 { // many that are small, some beside others that are not
			most, containers = 1+random.IntN(12<<10), 1+random.IntN(600)
		}
		own := random.IntN(2) * most // of a pod
		for p := range pods {
			id := fmt.Sprint(p)
			tally.Allowed(id, own, "", 0)
			if random.IntN(3) == 0 {
				continue // it stays alone
			}
			for c := range containers {
				n := most
				if random.IntN(2) == 0 {
					n = random.IntN(most + 1)
				}
				if c == 0 && random.IntN(10) == 0 {
					n = MaxTold
				}
				name := fmt.Sprint("c", c)
				if tally.Refuses(id, own, name, n) != nil {
					refused++
					continue
				}
				tally.Allowed(id, own, name, n)
			}
		}
		// All of them, and then ever fewer.
		for len(tally.pods) > 0 {
			var l listing
			for _, p := range tally.pods {
				l.add(Length{Size: p.own.size, Sandbox: true})
				for _, c := range p.containers {
					l.add(Length{Size: c.size})
				}
			}
			if why := l.large(); why != "" {
				t.Fatalf("of %d pods with up to %d containers of %d bytes: %s", len(tally.pods), containers, most, why)
			}
			for id := range tally.pods {
				if random.IntN(3) == 0 {
					delete(tally.pods, id)
				}
			}
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

func TestTally(t *testing.T) {
	const third = maxPod / 4 // of a pod that is full with three of them, with what is beside
	type step struct {
		pod, name string
		bytes     int
		want      verify.Reason // empty: it may be
	}
	for name, steps := range map[string][]step{
		"a pod's containers together": {
			{"p", "a", third, ""}, {"p", "b", third, ""}, {"p", "c", third, ""}, {"q", "a", 8 * third, ""}, // which is most of what is above it
			{"p", "d", third, verify.PodTooLarge}, {"p", "e", 100, ""}, {"r", "a", third, ""},
		},
		"what is restarted counts once": {
			{"q", "a", 8 * third, ""}, {"p", "a", third, ""}, {"p", "b", third, ""}, {"p", "c", third, ""}, {"p", "c", third, ""}, {"p", "a", third, ""}, {"p", "d", third, verify.PodTooLarge},
		},
		"a few that are heavy": {
			{"p", "a", 5 * third, ""}, {"q", "a", 4 * third, ""}, {"r", "a", 4 * third, verify.PodTooLarge}, {"r", "b", 2 * third, ""}, {"p", "a", 5 * third, ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			again := 0
			tally := New(nil, time.Now, func() { again++ })
			refused := 0
			for i, s := range steps {
				f := tally.Refuses(s.pod, 1000, s.name, s.bytes)
				if (f == nil) != (s.want == "") || f != nil && f.Reason != s.want {
					t.Fatalf("step %d: %v, want %q", i, f, s.want)
				}
				if f == nil {
					tally.Allowed(s.pod, 1000, s.name, s.bytes)
				} else {
					refused++
				}
			}
			if again != refused {
				t.Errorf("a correction was asked for %d times, want %d", again, refused)
			}
		})
	}
}

// The count has a bound, and asks to be corrected before it is reached.
func TestTallyIsBounded(t *testing.T) {
	again := 0
	tally := New(nil, time.Now, func() { again++ })
	for i := range 3 * maxTallied {
		id := fmt.Sprint(i)
		if tally.Refuses(id, 1, "c", 1) == nil {
			tally.Allowed(id, 1, "c", 1)
		}
		if tally.n == maxTallied/2+1 && again != 1 {
			t.Fatalf("a correction was asked for %d times", again)
		}
	}
	if tally.n > maxTallied || len(tally.pods) > maxTallied {
		t.Errorf("%d are counted", tally.n)
	}
	if f := tally.Refuses("p", 1, "c", 1); f == nil || f.Reason != verify.Overloaded {
		t.Errorf("and one more: %v", f)
	}
}

// lengths are the runtime's records of what has certain lengths.
type lengths struct {
	list []Length
	err  error
}

func (l *lengths) Lengths(ctx context.Context, yield func(Length)) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	for _, one := range l.list {
		yield(one)
	}
	return l.err
}

// The count is corrected by what containerd has: what ended is not counted, what came
// without a gate is, and what was allowed a moment ago stays.
func TestTallyIsCorrected(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	l := &lengths{list: []Length{
		{Pod: "old", Sandbox: true, Told: true, Size: 100},
		{Pod: "old", Name: "runs", Told: true, Size: 200 << 10},
		{Pod: "old", Name: "ended", Size: 200 << 10},
		{Pod: "came", Sandbox: true, Told: true, Size: 110 << 10},
	}}
	tally := New(l, func() time.Time { return now }, func() {})
	tally.Allowed("old", 100, "ended", 200<<10)
	tally.Allowed("gone", 100, "c", 100)
	now = now.Add(2 * young)
	tally.Allowed("old", 100, "new", 100<<10)
	tally.Allowed("young", 100, "", 0)
	if why, err := tally.Large(t.Context()); why != "" || err != nil || tally.Trouble() != "" {
		t.Fatal(why, err)
	}
	var got []string
	for _, id := range []string{"old", "came", "gone", "young"} {
		for _, name := range []string{"runs", "ended", "new", "c"} {
			if pod := tally.pods[id]; pod != nil && pod.containers[name].size > 0 {
				got = append(got, id+" "+name)
			}
		}
		if tally.pods[id] != nil {
			got = append(got, id)
		}
	}
	if want := "old runs,old new,old,came,young"; strings.Join(got, ",") != want || tally.n != 5 {
		t.Errorf("counted %d: %q, want %q", tally.n, strings.Join(got, ","), want)
	}
	if n := tally.pods["came"].total(); n != 110<<10 {
		t.Errorf("what came without a gate counts for %d", n)
	}
	// What cannot be read changes nothing.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tally.Large(ended); err == nil || tally.n != 5 {
		t.Errorf("%v, and %d are counted", err, tally.n)
	}
}

// If the runtime's list cannot be read, the count fills up with what ended. It makes room
// without letting anything in that its length keeps out, and says since when.
func TestTallyThatCannotBeCorrected(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	l := &lengths{err: errors.New("no answer")}
	tally := New(l, func() time.Time { return now }, func() {})
	if _, err := tally.Large(t.Context()); err == nil {
		t.Fatal("no error")
	}
	began := now
	if since, why := tally.Uncorrected(); !since.Equal(began) || why != "no answer" {
		t.Errorf("uncorrected since %v: %q", since, why)
	}
	create := func(pod, name string, n int) *verify.Fault {
		f := tally.Refuses(pod, 100, name, n)
		if f == nil {
			tally.Allowed(pod, 100, name, n)
		}
		return f
	}
	for i := range 10 { // most of what heavy pods may have
		if f := create("heavy", fmt.Sprint(i), 270<<10); f != nil {
			t.Fatal(i, f)
		}
	}
	// A node with 30 pods at a time, each for ten minutes, for a month.
	refused := 0
	for i := range 30 * 6 * 24 * 30 {
		now = now.Add(20 * time.Second)
		for _, name := range []string{"a", "b", "c"} {
			if f := create(fmt.Sprint("pod", i), name, 3000); f != nil {
				refused++
			}
		}
		if tally.n > maxTallied {
			t.Fatalf("%d are counted", tally.n)
		}
	}
	if refused > 0 {
		t.Errorf("%d small containers were refused", refused)
	}
	for range 4 { // in three the heavy pods are more than may be, forgotten ones included
		_ = create("other", fmt.Sprint("x", refused), 290<<10)
		refused++
	}
	if f := create("other", "last", 290<<10); f == nil || f.Reason != verify.PodTooLarge {
		t.Errorf("another heavy pod: %v", f)
	}
	if f := create("heavy", "more", 270<<10); f == nil || f.Reason != verify.PodTooLarge {
		t.Errorf("more of a heavy pod: %v", f)
	}
	// Too many at once are refused, and the refusal says why.
	var last *verify.Fault
	for i := range 2 * maxTallied {
		last = create(fmt.Sprint("burst", i), "", 0)
	}
	if last == nil || last.Reason != verify.Overloaded || !strings.Contains(last.Detail, "no answer") || !strings.Contains(last.Detail, began.UTC().Format(time.RFC3339)) {
		t.Errorf("a burst: %v", last)
	}
	l.err = nil
	if _, err := tally.Large(t.Context()); err != nil {
		t.Fatal(err)
	}
	if since, _ := tally.Uncorrected(); !since.IsZero() || tally.forgotten != 0 {
		t.Errorf("corrected, and uncorrected since %v, %d bytes forgotten", since, tally.forgotten)
	}
}
