package cache

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// TestTurns plays scripts. A word adds a flight of the host that it begins with,
// ahead of time where it ends in '; ^ and a word has somebody wait for one that was
// asked ahead; <a ends the oldest flight of a, <<a after a long time. Wanted is who
// starts, in order, and with ! who gives way.
func TestTurns(t *testing.T) {
	for _, tt := range []struct {
		name        string
		slots, room int
		script      string
		want        string
	}{
		{"oldest first", 1, 9, "a1 a2 a3 <a <a", "a1 a2 a3"},
		{"hosts take turns", 1, 9, "a1 a2 a3 b1 b2 c1 <a <b <c <a <b", "a1 b1 c1 a2 b2 a3"},
		{"all slots where nobody else waits", 3, 9, "a1 a2 a3 a4", "a1 a2 a3"},
		{"who was just served goes last", 2, 9, "a1 a2 a3 a4 c1 <a <a", "a1 a2 c1 a3"},
		{"who starts goes last", 2, 9, "x1 x2 a1 a2 b1 <x <x", "x1 x2 a1 b1"},
		{"one at a time gains nothing", 1, 9, "b1 b2 b3 a1 <b a2 <a <b <a", "b1 a1 b2 a2 b3"},
		{"a flood, a hanging host, and another", 2, 9, "b1 <<b b2 b3 b4 a1 a2 a3 a4 c1 <a c2 <c <a <c", "b1 b2 a1 c1 a2 c2 a3"},

		{"a slow host leaves a slot", 2, 9, "s1 <<s s2 s3 s4 a1 a2 a3 <a <a", "s1 s2 a1 a2 a3"},
		{"so do all slow hosts together", 3, 9, "s1 r1 q1 <<s <<r <<q s2 r2 q2 a1 <s", "s1 r1 q1 s2 r2 a1 q2"},
		{"slow hosts take turns", 2, 9, "s1 r1 <<s <<r s2 s3 r2 r3 <<s <<r <<s", "s1 r1 s2 r2 s3 r3"},
		{"with one slot they go last", 1, 9, "s1 <<s s2 s3 a1 <<s a2 <a <a", "s1 s2 a1 a2 s3"},
		{"a host that was quick is slow no more", 2, 9, "s1 <<s s2 s3 s4 <s", "s1 s2 s3 s4"},

		{"ahead waits for all others", 2, 9, "a1 b1 x1' c1 <a <b", "a1 b1 c1 x1'"},
		{"one ahead at a time", 3, 9, "x1' x2' a1 <x", "x1' a1 x2'"},
		{"ahead leaves a slot", 2, 9, "x1' x2' a1 a2 <x <a <a", "x1' a1 a2 x2'"},
		{"ahead and slow hosts share", 2, 9, "s1 <<s x1' s2 a1 <x", "s1 x1' a1 s2"},
		{"with one slot too", 1, 9, "x1' x2' a1 <x <a", "x1' a1 x2'"},
		{"slow hosts go first, but not for ever", 2, 99, "s0 <<s " + words("s%d ", 20) + "x1' x2' " + words("<<s ", 9) + "<x",
			"s0 " + words("s%d ", 9) + "x1' s10"},
		{"how long ahead took says nothing of the host", 2, 9, "x1' <<x x2 x3", "x1' x2 x3"},

		{"the youngest of those with most gives way", 1, 4, "r0 a1 a2 a3 b1 c1 b2 b3 c2", "r0 !a3 !b2 !b3 !c2"},
		{"to a slow host too", 2, 3, "s0 <<s a1 a2 a3 a4 a5 s1 a6", "s0 a1 a2 !a5 !a6"},
		{"slow ones give way to the first of a host", 2, 3, "s1 r1 <<s <<r q1 <<q s2 r2 q2 s3 a1 a2 b1 a3", "s1 r1 q1 s2 a1 !s3 !q2 !a3"},
		{"and not the other way round", 2, 3, "s1 r1 <<s <<r q1 <<q r2 q2 a1 a2 b1 s2", "s1 r1 q1 r2 a1 !s2"},
		{"who has started does not", 2, 0, "a1 b1 a2 c1", "a1 b1 !a2 !c1"},
		{"ahead has room of its own", 2, 2, "a1 a2 a3 a4 x1' x2' x3' a5", "a1 a2 !x3' !a5"},
		{"ahead without room", 2, 0, "x1' x2'", "x1' !x2'"},
		{"what is waited for leaves that lane", 2, 9, "a1 a2 x1' x2' x3' ^x2' <a <a", "a1 a2 x2' x1'"},
		{"and needs room", 2, 1, "a1 a2 a3 x1' ^x1'", "a1 a2 !x1'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := newQueue(tt.slots, tt.room)
			var all []*flight
			var got []string
			host := func(word string) string { return strings.TrimRight(word, "'0123456789") }
			pick := func(ok func(*flight) bool) *flight {
				i := slices.IndexFunc(all, ok)
				if i < 0 {
					t.Fatalf("the script is wrong after %v", got)
				}
				return all[i]
			}
			for word := range strings.FieldsSeq(tt.script) {
				var f *flight
				switch name := strings.TrimLeft(word, "<^"); word[0] {
				case '<':
					f := pick(func(f *flight) bool { return f.started && !f.ended && f.place.host == name })
					f.ended = true
					q.end(f, time.Duration(len(word)-len(name)-1)*10*time.Second)
				case '^':
					f = pick(func(f *flight) bool { return f.place.path == name })
					q.remove(f)
					f.ahead = false
				default:
					f = &flight{place: place{host: host(name), path: name}, ahead: strings.HasSuffix(name, "'")}
					all = append(all, f)
				}
				if f != nil {
					q.add(f)
				}
				for n := q.next(); n != nil; n = q.next() {
					got = append(got, n.place.path)
				}
				if f != nil {
					if v := q.crowded(f); v != nil {
						v.ended = true
						got = append(got, "!"+v.place.path)
					}
				}
				consistent(t, q, all)
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("\ngot  %s\nwant %s", s, tt.want)
			}
		})
	}
}

// words repeats a word, with numbers from 1 where it has a place for them.
func words(word string, n int) (s string) {
	for i := range n {
		s += strings.ReplaceAll(word, "%d", fmt.Sprint(i+1))
	}
	return s
}

// consistent checks what holds of every queue.
func consistent(t *testing.T, q *queue, all []*flight) {
	t.Helper()
	var waiting, ahead, running, modest, early int
	for _, f := range all {
		switch {
		case f.ended:
		case f.started:
			running++
			if f.modest {
				modest++
			}
			if f.ahead {
				early++
			}
		case f.ahead:
			ahead++
		default:
			waiting++
		}
	}
	lined := 0
	for _, l := range q.lines {
		if lined += len(l.flights); len(l.flights) == 0 {
			t.Errorf("the line of %s is empty", l.host)
		}
	}
	if q.waiting != waiting || lined != waiting || len(q.ahead) != ahead || q.running != running || q.modest != modest || q.early != early {
		t.Errorf("%d and %d waiting, want %d; %d ahead, want %d; %d running, want %d; %d modest, want %d; %d early, want %d",
			q.waiting, lined, waiting, len(q.ahead), ahead, q.running, running, q.modest, modest, q.early, early)
	}
	if running > q.slots || modest > max(q.slots-1, 1) || early > 1 || waiting > q.room || ahead > q.room {
		t.Errorf("too many: %d running, %d modest, %d early, %d waiting, %d ahead", running, modest, early, waiting, ahead)
	}
}

// TestFairness: however many pods ask, over and over, for images of hosts that
// refuse at once or never answer, a question about another host waits no longer
// than the row says.
func TestFairness(t *testing.T) {
	const quick, hang = 10 * time.Millisecond, 10 * time.Second // verify.DefaultLimits.Wall
	hosts := func(n int, name string) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprint(name, i))
		}
		return list
	}
	for _, tt := range []struct {
		name  string
		hosts []string // fast... or hang..., 100 images in all
		warm  time.Duration
		wait  time.Duration // at most, until the flight starts
	}{
		{"nobody", nil, 0, 0},
		{"one that refuses", hosts(1, "fast"), 11 * time.Second, quick},
		{"one that hangs", hosts(1, "hang"), 11 * time.Second, 0},
		{"one that hangs, not known yet", hosts(1, "hang"), 0, hang},
		{"both", []string{"fast0", "hang0"}, time.Minute, quick},
		{"twenty that hang", hosts(20, "hang"), 5 * time.Minute, 0},
		{"five of each", append(hosts(5, "hang"), hosts(5, "fast")...), time.Minute, 6 * quick},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				began := map[string]time.Time{} // flights of good hosts
				j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
					switch host := q.Image.Name.Host; {
					case strings.HasPrefix(host, "hang"):
						time.Sleep(hang)
						return verify.Deny(verify.SourceUnreachable, "")
					case strings.HasPrefix(host, "fast"):
						time.Sleep(quick)
						return verify.Deny(verify.SourceUnreachable, "")
					default:
						mu.Lock()
						began[host] = time.Now()
						mu.Unlock()
						time.Sleep(quick)
						return allow(q, time.Now(), time.Now().Add(time.Hour))
					}
				}}
				c := open(t, j, Options{Now: time.Now})
				var bad []verify.Question
				for i := range 100 * min(len(tt.hosts), 1) {
					bad = append(bad, at(ask(fmt.Sprint("bad", i)), tt.hosts[i%len(tt.hosts)], "app"))
				}
				again := time.Second
				if slices.Contains(tt.hosts, "fast0") {
					again = 20 * quick
				}
				stop := make(chan struct{})
				var flood sync.WaitGroup
				flood.Go(func() {
					for {
						for _, q := range bad {
							c.Judge(ended(), q)
						}
						select {
						case <-stop:
							return
						case <-time.After(again): // the queue lasts longer
						}
					}
				})
				time.Sleep(tt.warm + time.Millisecond)
				for i := range 5 {
					host := fmt.Sprint("good", i)
					asked := time.Now()
					expect(t, c.Judge(ended(), at(ask(host), host, "app")), verify.Pending)
					time.Sleep(tt.wait + time.Second + time.Duration(i)*time.Millisecond)
					expect(t, c.Judge(ended(), at(ask(host), host, "app")), verify.Verified)
					mu.Lock()
					if waited := began[host].Sub(asked); waited > tt.wait {
						t.Errorf("%s waited %v, want at most %v", host, waited, tt.wait)
					}
					mu.Unlock()
				}
				close(stop)
				flood.Wait()
				c.Close()
				if s := c.Stats(); s.Started != s.Ended || s.Running != 0 || s.Waiting != 0 {
					t.Errorf("stats %+v", s)
				}
			})
		})
	}
}

// TestAhead: what is asked ahead of time waits in a lane of its own, until somebody
// waits for it; its answer is the container's.
func TestAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var mu sync.Mutex
		var order []string
		uses := map[string]verify.Use{}
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			mu.Lock()
			order = append(order, q.Image.Name.Host)
			uses[q.Image.Name.Host] = q.Image.Use
			mu.Unlock()
			<-release
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, j, Options{Now: time.Now, Queue: 4})
		on := func(host string) verify.Question { return at(ask(host), host, "app") }
		var wg sync.WaitGroup
		for _, host := range []string{"first", "second", "third", "fourth", "fifth"} {
			wg.Go(func() { expect(t, c.Judge(bg, aheadOf(on(host))), verify.Verified) })
			synctest.Wait() // in this order
		}
		expect(t, c.Judge(bg, aheadOf(on("too many"))), verify.Overloaded)
		// One is under way, and can be joined; the others leave the second slot alone.
		expect(t, c.Judge(ended(), on("first")), verify.Pending)
		expect(t, c.Judge(ended(), on("container")), verify.Pending)
		expect(t, c.Judge(ended(), on("fourth")), verify.Pending)
		synctest.Wait()
		want := Stats{Misses: 9, Joined: 2, Started: 2, Overloaded: 1, Running: 2, Waiting: 1, Ahead: 3}
		if s := c.Stats(); s != want {
			t.Errorf("stats %+v, want %+v", s, want)
		}
		for n := range 6 { // one ends, and the next starts
			release <- struct{}{}
			synctest.Wait()
			if mu.Lock(); n == 0 && (len(order) != 3 || order[2] != "fourth") {
				t.Errorf("order %s", order)
			}
			mu.Unlock()
		}
		wg.Wait()
		if len(order) != 6 {
			t.Errorf("order %s", order)
		}
		for host, want := range map[string]verify.Use{"first": verify.UseAhead, "fourth": verify.UseContainer, "fifth": verify.UseAhead} {
			if uses[host] != want {
				t.Errorf("%s was asked with use %d, want %d", host, uses[host], want)
			}
		}
		for _, host := range order {
			expect(t, c.Judge(ended(), on(host)), verify.Verified)
		}
		called(t, j, 6)
		c.Close()
	})
}

// TestNoVainWait: a container waits for an answer only where there is hope of one.
func TestNoVainWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			<-release
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, j, Options{Now: time.Now, Flights: 2})
		const wait = 50 * time.Millisecond
		asked := func(q verify.Question, want time.Duration) {
			t.Helper()
			ctx, cancel := context.WithTimeout(bg, wait)
			defer cancel()
			began := time.Now()
			expect(t, c.Judge(ctx, q), verify.Pending)
			if took := time.Since(began); took != want {
				t.Errorf("waited %v, want %v", took, want)
			}
		}
		asked(ask("a"), wait)
		asked(ask("a"), 0) // it was told so already
		volume := ask("a")
		volume.Image.Use, volume.Image.Binding = verify.UseVolume, verify.BoundSnapshot
		asked(volume, 0)
		asked(aheadOf(ask("a")), wait) // holds up nobody
		expect(t, c.Judge(ended(), aheadOf(ask("a"))), verify.Pending)
		asked(ask("a"), 0) // that somebody did not wait does not say that there is hope
		asked(ask("b"), wait)
		asked(ask("c"), wait) // the next to start
		asked(ask("d"), 0)    // another waits before it
		release <- struct{}{}
		synctest.Wait()
		asked(ask("d"), 0) // none does any more, and it was told so already
		question := ask("d")
		question.Image.Use, question.Image.Binding = verify.UseQuestion, verify.BoundDigest
		asked(question, wait)
		close(release)
		synctest.Wait()
		expect(t, c.Judge(bg, ask("d")), verify.Verified)
		c.Close()
	})
}

func TestStats(t *testing.T) {
	cl := newClock()
	j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
		switch q.Image.Name.Path {
		case "panic":
			panic("a parser")
		case "unsigned":
			return verify.Deny(verify.SignatureMissing, "")
		}
		return allow(q, cl.now(), start.Add(time.Hour))
	}}
	c := open(t, j, Options{Now: cl.now, Allowed: 2, Denied: 1})
	for _, s := range []string{"a", "b", "c", "c", "c"} {
		c.Judge(bg, ask(s))
	}
	for _, s := range []string{"a", "b", "b"} {
		c.Judge(bg, at(ask("bad "+s), "registry.local", "unsigned"))
	}
	c.Judge(bg, at(ask("p"), "registry.local", "panic"))
	want := Stats{AllowedHits: 2, DeniedHits: 1, Misses: 6, AllowedEvicted: 1, DeniedEvicted: 1, Started: 6, Ended: 6, Panics: 1, Allowed: 2, Denied: 1}
	if s := c.Stats(); s != want {
		t.Errorf("stats %+v, want %+v", s, want)
	}
	if n := testing.AllocsPerRun(100, func() { c.Stats() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	q := ask("c")
	if n := testing.AllocsPerRun(100, func() { c.Judge(bg, q) }); n != 0 {
		t.Errorf("%v allocations a hit", n)
	}
}

// TestCrowdedOut: who waits for a verification that has to give way to another is
// told so, and does not wait on.
func TestCrowdedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			<-release
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, j, Options{Now: time.Now, Flights: 1, Queue: 2})
		expect(t, c.Judge(ended(), ask("under way")), verify.Pending)
		expect(t, c.Judge(ended(), at(ask("first"), "much.local", "app")), verify.Pending)
		given := make(chan verify.Decision, 1)
		go func() {
			q := at(ask("second"), "much.local", "app")
			q.Image.Use, q.Image.Binding = verify.UseQuestion, verify.BoundDigest
			given <- c.Judge(bg, q)
		}()
		synctest.Wait()
		expect(t, c.Judge(ended(), at(ask("third"), "other.local", "app")), verify.Pending)
		synctest.Wait()
		select {
		case d := <-given:
			expect(t, d, verify.Overloaded)
		default:
			t.Error("who waits is not told")
		}
		close(release)
		synctest.Wait()
		called(t, j, 3)
		c.Close()
	})
}

// TestJoinKeepsTheTurn: who asks for what waits already does not change whose turn
// it is, unless a container asks for what was asked ahead of time.
func TestJoinKeepsTheTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var mu sync.Mutex
		var order []string
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			mu.Lock()
			order = append(order, q.Image.Name.Path)
			mu.Unlock()
			<-release
			return allow(q, time.Now(), time.Now().Add(time.Hour))
		}}
		c := open(t, j, Options{Now: time.Now, Flights: 1})
		on := func(path string) verify.Question { return at(ask(path), "registry.local", path) }
		for _, q := range []verify.Question{on("a"), on("b"), on("c"), on("b"), aheadOf(on("d")), aheadOf(on("e")), aheadOf(on("d"))} {
			expect(t, c.Judge(ended(), q), verify.Pending)
			synctest.Wait()
		}
		if s := c.Stats(); s.Waiting != 2 || s.Ahead != 2 || s.Joined != 2 {
			t.Errorf("stats %+v", s)
		}
		for range 5 {
			release <- struct{}{}
			synctest.Wait()
		}
		if got := fmt.Sprint(order); got != "[a b c d e]" {
			t.Errorf("order %s", got)
		}
		c.Close()
	})
}

// TestSlowHosts: a host is slow whose last verification was long, whatever the ones
// before it were.
func TestSlowHosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took time.Duration
		j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
			time.Sleep(took)
			return verify.Deny(verify.SourceUnreachable, "")
		}}
		c := open(t, j, Options{Now: time.Now})
		for _, d := range []time.Duration{time.Millisecond, long, long + 1, time.Hour, long, 0} {
			took = d
			q := ask("a")
			q.Image.Use, q.Image.Binding = verify.UseQuestion, verify.BoundDigest
			c.Judge(bg, q)
			if got, want := c.queue.slow.Contains("registry.local"), d > long; got != want {
				t.Errorf("after a verification of %v it is slow: %t", d, got)
			}
		}
		c.Close()
	})
}
