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

// TestTurns plays scripts. A word adds a flight; see flightOf. It is ahead of time if it
// ends in '; ^ and a word has somebody wait for one that was asked ahead; <a ends the
// oldest flight of the words that begin with a, <<a after a long time, and ~a at once if
// it was asked ahead and settled nothing. Wanted is who starts, in order, and with ! who
// gives way.
func TestTurns(t *testing.T) {
	for _, tt := range []struct {
		name        string
		slots, room int
		script      string
		want        string
	}{
		{"oldest first", 1, 9, "a1 a2 a3 <a <a", "a1 a2 a3"},
		{"hosts take turns", 1, 9, "a1 a2 a3 b1 b2 c1 <a <b <c <a <b", "a1 b1 c1 a2 b2 a3"},
		{"all slots if no one else waits", 3, 9, "a1 a2 a3 a4", "a1 a2 a3"},
		{"who was just served goes last", 2, 9, "a1 a2 a3 a4 c1 <a <a", "a1 a2 c1 a3"},
		{"who starts goes last", 2, 9, "x1 x2 a1 a2 b1 <x <x", "x1 x2 a1 b1"},
		{"one at a time gains nothing", 1, 9, "b1 b2 b3 a1 <b a2 <a b4 <b <a", "b1 a1 b2 a2 b3"},
		{"who has taken least time goes first", 1, 9, "a1 b1 a2 a3 a4 b2 <<a <b <b <a <a", "a1 b1 b2 a2 a3 a4"},
		{"who comes has taken as much as the others", 1, 9, "a1 a2 a3 b1 b2 b3 <a <b <a <b c1 c2 c3 <a <b <c", "a1 b1 a2 b2 a3 b3 c1 c2"},
		{"a flood, a hanging host, and another", 2, 9, "b1 <<b b2 b3 b4 a1 a2 a3 a4 c1 <a c2 <c <a <c", "b1 b2 a1 c1 a2 c2 a3"},

		{"owners within a host take turns", 1, 9, "a.x1 a.x2 a.y1 a.y2 <a.x <a.y <a.x", "a.x1 a.y1 a.x2 a.y2"},
		{"repositories do not multiply an owner", 1, 9, "a.xp1 a.xq1 a.xr1 a.xs1 a.y1 a.y2 <a.xp <a.y <a.xq", "a.xp1 a.y1 a.xq1 a.y2"},
		{"repositories of an owner take turns", 1, 9, "a.xp1 a.xp2 a.xp3 a.xq1 <a.xp <a.xq", "a.xp1 a.xq1 a.xp2"},
		{"owners do not multiply a host", 1, 9, "a.x1 a.y1 a.z1 b1 b2 <a.x <b <a.y", "a.x1 b1 a.y1 b2"},
		{"nor the host beside a repository with a name", 1, 9, "a.x1 a.y1 a.z1 a.!1 a.!2 <a.x <a.! <a.y", "a.x1 a.!1 a.y1 a.!2"},
		{"a slow owner leaves a slot to the others of the host", 2, 9, "a.x1 <<a.x a.x2 a.x3 a.y1 a.y2 <a.y", "a.x1 a.x2 a.y1 a.y2"},

		{"all hosts without a name are one line", 1, 9, "u1 v1 w1 a1 a2 <u <a <v", "u1 a1 v1 a2"},
		{"and leave a slot", 2, 9, "u1 v1 w1 a1 a2 <a <u", "u1 a1 a2 v1"},
		{"they take turns", 1, 9, "u1 u2 u3 v1 <u <v <u", "u1 v1 u2 u3"},
		{"hosts that gave a yes have a line", 2, 9, "u1 v1 p1 p2 q1 <p", "u1 p1 q1"},
		{"together", 1, 9, "p1 q1 r1 a1 a2 <p <a <q", "p1 a1 q1 a2"},

		{"a slow host leaves a slot", 2, 9, "s1 <<s s2 s3 s4 a1 a2 a3 <a <a", "s1 s2 a1 a2 a3"},
		{"so do all slow hosts together", 3, 9, "s1 t1 b1 <<s <<t <<b s2 t2 b2 a1 <s", "s1 t1 b1 s2 t2 a1 b2"},
		{"slow hosts take turns", 2, 9, "s1 t1 <<s <<t s2 s3 t2 t3 <<s <<t <<s", "s1 t1 s2 t2 s3 t3"},
		{"with one slot they go last", 1, 9, "s1 s2 s3 a1 a2 <<s <a <a", "s1 a1 a2 s2"},
		{"a host that was quick is slow no more", 2, 9, "s1 <<s s2 s3 s4 <s", "s1 s2 s3 s4"},

		{"ahead waits for all others", 2, 9, "a1 b1 x1' c1 <a <b", "a1 b1 c1 x1'"},
		{"one ahead at a time", 3, 9, "x1' x2' a1 <x", "x1' a1 x2'"},
		{"ahead leaves a slot", 2, 9, "x1' x2' a1 a2 <x <a <a", "x1' a1 a2 x2'"},
		{"ahead needs none that a slow host can take", 2, 9, "s1 <<s s2 s3 x1' <x", "s1 s2 x1'"},
		{"ahead of a slow host shares with slow hosts", 2, 9, "s1 <<s s2' s3 a1 <s", "s1 s2' a1 s3"},
		{"and of a host without a name", 2, 9, "u1' u2 a1 <u", "u1' a1 u2"},
		{"with one slot too", 1, 9, "x1' x2' a1 <x <a", "x1' a1 x2'"},
		{"others go first, but not for ever", 1, 99, "a0 " + words("a%d ", 20) + "x1' x2' " + words("<a ", 8) + "<x",
			"a0 " + words("a%d ", 7) + "x1' a8"},
		{"nor if they are long", 1, 99, "a0 " + words("a%d ", 20) + "x1' x2' x3' <<a <x <x <x", "a0 x1' x2' x3' a1"},
		{"how long ahead took says nothing of the host", 2, 9, "x1' <<x x2 x3", "x1' x2 x3"},
		{"unless it settled nothing", 2, 9, "x1' ~x x2 x3", "x1' x2"},

		{"the youngest of those with most gives way", 1, 4, "t0 a1 a2 a3 b1 c1 b2 b3 c2", "t0 !a3 !b2 !b3 !c2"},
		{"to a slow host too", 2, 3, "s0 <<s a1 a2 a3 a4 a5 s1 a6", "s0 a1 a2 !a5 !a6"},
		{"slow ones give way to the first of a host", 2, 3, "s1 t1 <<s <<t b1 <<b s2 t2 b2 s3 a1 a2 c1 a3", "s1 t1 b1 s2 a1 !b2 !t2 !a3"},
		{"and not the other way round", 2, 3, "s1 t1 <<s <<t b1 <<b t2 b2 a1 a2 c1 s2", "s1 t1 b1 t2 a1 !s2"},
		{"hosts without a name give way first", 2, 4, "a1 a2 a3 a4 a5 u1 v1 a6 u2", "a1 a2 !v1 !u1 !u2"},
		{"the youngest of those with most", 2, 4, "a1 a2 u1 u2 u3 v1 a3 a4", "a1 a2 !u3 !u2"},
		{"then the owner with most", 2, 4, "a.x1 a.x2 a.x3 a.x4 a.x5 a.y1 a.y2", "a.x1 a.x2 !a.x5"},
		{"however many repositories", 2, 4, "a.x1 a.x2 a.xp1 a.xq1 a.xr1 a.xs1 a.y1 a.y2", "a.x1 a.x2 !a.xs1 !a.xr1"},
		{"who has started does not", 2, 0, "a1 b1 a2 c1", "a1 b1 !a2 !c1"},
		{"ahead has room of its own", 2, 2, "a1 a2 a3 a4 x1' x2' x3' a5", "a1 a2 !x3' !a5"},
		{"ahead without room", 2, 0, "x1' x2'", "x1' !x2'"},
		{"what is waited for leaves that lane", 2, 9, "a1 a2 x1' x2' x3' ^x2' <a <a", "a1 a2 x2' x1'"},
		{"and needs room", 2, 1, "a1 a2 a3 x1' ^x1'", "a1 a2 !x1'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRoster(byLetter)
			for _, host := range []string{"p", "q", "r"} {
				r.yes(host, host, true)
			}
			q := newQueue(tt.slots, tt.room, r)
			var all []*flight
			words := map[*flight]string{}
			var got []string
			pick := func(ok func(*flight) bool) *flight {
				i := slices.IndexFunc(all, ok)
				if i < 0 {
					t.Fatalf("the script is wrong after %v", got)
				}
				return all[i]
			}
			for word := range strings.FieldsSeq(tt.script) {
				var f *flight
				switch name := strings.TrimLeft(word, "<^~"); word[0] {
				case '<', '~':
					f := pick(func(f *flight) bool {
						return f.started && !f.ended && strings.TrimRight(words[f], "'0123456789") == name
					})
					f.ended = true
					took := time.Duration(len(word)-len(name)-1) * 10 * time.Second
					if word[0] == '~' {
						took = 10 * time.Second
					}
					q.end(f, took, word[0] != '~')
				case '^':
					f = pick(func(f *flight) bool { return words[f] == name })
					q.remove(f)
					f.ahead = false
				default:
					f = flightOf(name)
					all = append(all, f)
					words[f] = name
				}
				if f != nil {
					q.add(f)
				}
				for n := q.next(); n != nil; n = q.next() {
					got = append(got, words[n])
				}
				if f != nil {
					if v := q.crowded(f); v != nil {
						v.ended = true
						got = append(got, "!"+words[v])
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

// flightOf makes the flight of a word of a script: the letter of its host, a number, and
// between them, after a dot, the letters of the owner and the repository.
func flightOf(word string) *flight {
	host, more, _ := strings.Cut(strings.TrimRight(word, "'0123456789"), ".")
	path := "app"
	if more != "" {
		path = more[:1] + "/app" + more[1:]
	}
	return &flight{place: place{host: host, path: path}, ahead: strings.HasSuffix(word, "'")}
}

// byLetter names all hosts but some, and the repositories of the owner "!".
func byLetter(n verify.Name) (host, repository bool) {
	return !strings.Contains("pqruvw", n.Host), strings.HasPrefix(n.Path, "!")
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
	var lined func(l *line) (n int)
	lined = func(l *line) (n int) {
		for _, in := range l.lines {
			if in.waiting == 0 && in.running == 0 || in.up != l {
				t.Errorf("the line of %s has nothing", in.name)
			}
			n += lined(in)
		}
		if n += len(l.flights); n != l.waiting {
			t.Errorf("%d wait in the line of %q, which counts %d", n, l.name, l.waiting)
		}
		return n
	}
	if w, a := lined(&q.asked), lined(&q.ahead); w != waiting || a != ahead || q.running != running || q.modest != modest || q.early != early {
		t.Errorf("%d and %d waiting, want %d; %d ahead, want %d; %d running, want %d; %d modest, want %d; %d early, want %d",
			q.asked.waiting, w, waiting, a, ahead, q.running, running, q.modest, modest, q.early, early)
	}
	if running > q.slots || modest > max(q.slots-1, 1) || early > 1 || waiting > q.room || ahead > q.room {
		t.Errorf("too many: %d running, %d modest, %d early, %d waiting, %d ahead", running, modest, early, waiting, ahead)
	}
}

// TestWait: however many pods ask, over and over, for images of hosts that refuse at
// once or never answer, a question about another host waits no longer than the row says.
func TestWait(t *testing.T) {
	const quick, hang = 10 * time.Millisecond, 10 * time.Second // verify.DefaultLimits.Wall
	hosts := func(n int, name string) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprint(name, i))
		}
		return list
	}
	for _, tt := range []struct {
		name    string
		hosts   []string // fast... or hang..., 100 images in all
		warm    time.Duration
		named   time.Duration // longest until the flight starts if the good hosts are named
		unnamed time.Duration // and if they are not
	}{
		{"no one", nil, 0, 0, 0},
		{"one that refuses", hosts(1, "fast"), 11 * time.Second, 0, quick},
		{"one that hangs", hosts(1, "hang"), 11 * time.Second, 0, hang},
		{"one that hangs, not known yet", hosts(1, "hang"), 0, 0, hang},
		{"both", []string{"fast0", "hang0"}, time.Minute, 0, hang + quick},
		{"twenty that hang", hosts(20, "hang"), 5 * time.Minute, 0, hang},
		{"five of each", append(hosts(5, "hang"), hosts(5, "fast")...), time.Minute, 0, hang + 6*quick},
	} {
		for _, named := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, named %t", tt.name, named), func(t *testing.T) {
				wait := tt.named
				if !named {
					wait = tt.unnamed
				}
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
					o := Options{Now: time.Now}
					if named {
						o.Named = func(n verify.Name) (bool, bool) { return strings.HasPrefix(n.Host, "good"), false }
					}
					c := open(t, j, o)
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
								c.Evaluate(ended(), q)
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
						expect(t, c.Evaluate(ended(), at(ask(host), host, "app")), verify.Pending)
						time.Sleep(wait + time.Second + time.Duration(i)*time.Millisecond)
						expect(t, c.Evaluate(ended(), at(ask(host), host, "app")), verify.Verified)
						mu.Lock()
						if waited := began[host].Sub(asked); waited > wait {
							t.Errorf("%s waited %v, want at most %v", host, waited, wait)
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
			wg.Go(func() { expect(t, c.Evaluate(bg, aheadOf(on(host))), verify.Verified) })
			synctest.Wait() // in this order
		}
		expect(t, c.Evaluate(bg, aheadOf(on("too many"))), verify.Overloaded)
		// One is under way, and can be joined; the others leave the second slot alone.
		expect(t, c.Evaluate(ended(), on("first")), verify.Pending)
		expect(t, c.Evaluate(ended(), on("container")), verify.Pending)
		expect(t, c.Evaluate(ended(), on("fourth")), verify.Pending)
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
		for host, want := range map[string]verify.Use{"first": verify.UsePrefetch, "fourth": verify.UseContainer, "fifth": verify.UsePrefetch} {
			if uses[host] != want {
				t.Errorf("%s was asked with use %d, want %d", host, uses[host], want)
			}
		}
		for _, host := range order {
			expect(t, c.Evaluate(ended(), on(host)), verify.Verified)
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
			expect(t, c.Evaluate(ctx, q), verify.Pending)
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
		expect(t, c.Evaluate(ended(), aheadOf(ask("a"))), verify.Pending)
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
		expect(t, c.Evaluate(bg, ask("d")), verify.Verified)
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
		c.Evaluate(bg, ask(s))
	}
	for _, s := range []string{"a", "b", "b"} {
		c.Evaluate(bg, at(ask("bad "+s), "registry.local", "unsigned"))
	}
	c.Evaluate(bg, at(ask("p"), "registry.local", "panic"))
	want := Stats{AllowedHits: 2, DeniedHits: 1, Misses: 6, AllowedEvicted: 1, DeniedEvicted: 1, Started: 6, Ended: 6, Panics: 1, Allowed: 2, Denied: 1}
	if s := c.Stats(); s != want {
		t.Errorf("stats %+v, want %+v", s, want)
	}
	if n := testing.AllocsPerRun(100, func() { c.Stats() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	q := ask("c")
	if n := testing.AllocsPerRun(100, func() { c.Evaluate(bg, q) }); n != 0 {
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
		expect(t, c.Evaluate(ended(), ask("under way")), verify.Pending)
		expect(t, c.Evaluate(ended(), at(ask("first"), "much.local", "app")), verify.Pending)
		given := make(chan verify.Decision, 1)
		go func() {
			q := at(ask("second"), "much.local", "app")
			q.Image.Use, q.Image.Binding = verify.UseQuestion, verify.BoundDigest
			given <- c.Evaluate(bg, q)
		}()
		synctest.Wait()
		expect(t, c.Evaluate(ended(), at(ask("third"), "other.local", "app")), verify.Pending)
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
			expect(t, c.Evaluate(ended(), q), verify.Pending)
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
			c.Evaluate(bg, q)
			if got, want := c.roster.isSlow(mark{"registry.local", true}), d > long; got != want {
				t.Errorf("after a verification of %v it is slow: %t", d, got)
			}
		}
		c.Close()
	})
}
