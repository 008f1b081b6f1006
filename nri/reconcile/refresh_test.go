package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// rules is a Policy by repository path: the statement's requirement, or none.
type rules map[string]byte

func (p rules) Select(i verify.Image) *verify.Rule {
	n := p[i.Name.Path]
	if n == 0 {
		return &verify.Rule{Fixed: verify.PolicyNoMatch, Detail: "no statement"}
	}
	r, err := verify.SignedBy(verify.Leaf{Kind: "test", Authority: "prod", Hash: [32]byte{n}})
	if err != nil {
		panic(err)
	}
	return &verify.Rule{Name: "prod", Require: r}
}

// A mirrored is a Refresher with a mirror that a test makes answer.
type mirrored struct {
	*fetched
	*Refresher
	mu       sync.Mutex
	asked    []string
	at       []time.Duration
	answer   func(path string) (int, verify.Reason)
	during   func(ctx context.Context)
	now, at1 int // at once, and the most of that
	log      bytes.Buffer
	end      func()
}

func mirror(t *testing.T, seed uint64) *mirrored {
	s := prefetch(t)
	m := &mirrored{fetched: s, answer: func(string) (int, verify.Reason) { return 0, verify.Verified }}
	began := time.Now()
	m.Refresher = NewRefresher(s.resolver, slog.New(slog.NewTextHandler(&m.log, nil)), func() time.Duration { return time.Since(began) }, seed, "")
	s.Prefetch.Refresher = m.Refresher
	return m
}

// plan is of a configuration with those rules.
func (m *mirrored) plan(every time.Duration, r rules) *RefreshPlan {
	return &RefreshPlan{
		Setup: &verify.Snapshot{Policy: r}, Every: every,
		Sources: func(n verify.Name) []verify.Source {
			if n.Path == "sourceless" {
				return nil
			}
			return make([]verify.Source, 1)
		},
		Ask: func(ctx context.Context, q verify.Question) (Gain, []verify.Attempt) {
			m.mu.Lock()
			m.asked, m.at = append(m.asked, q.Image.Name.Path), append(m.at, m.uptime())
			m.now++
			m.at1 = max(m.at1, m.now)
			during := m.during
			m.mu.Unlock()
			if during != nil {
				during(ctx)
			} else {
				time.Sleep(time.Second)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			m.now--
			n, r := m.answer(q.Image.Name.Path)
			return Gain{Fresh: n}, []verify.Attempt{{Source: "mirror", Reason: r, Detail: "said so"}}
		},
	}
}

func (m *mirrored) configure(every time.Duration, r rules) { m.Configure(m.plan(every, r)) }

func (m *mirrored) start() {
	m.fetched.start()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Refresher.Run(ctx) })
	m.end = func() { cancel(); wg.Wait(); m.fetched.end() }
	synctest.Wait()
}

// take returns what was asked about since the last call, and when.
func (m *mirrored) take() ([]string, []time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	asked, at := m.asked, m.at
	m.asked, m.at = nil, nil
	return asked, at
}

func wants(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%s: asked about %q, want %q", what, got, want)
	}
}

// Each image is asked about once in a period, at a time of its own.
func TestRefreshSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		const n, day = 200, 24 * time.Hour
		r := rules{}
		for i := range n {
			name := fmt.Sprintf("app%03d", i)
			m.image(name)
			r[name] = 1
		}
		m.image("unmatched")
		m.image("sourceless")
		r["sourceless"] = 1
		m.configure(day, r)
		m.start()
		defer m.end()
		time.Sleep(day - m.uptime())
		synctest.Wait()
		asked, at := m.take()
		if slices.Sort(asked); len(asked) != n || len(slices.Compact(asked)) != n {
			t.Fatalf("asked %d times in a day", len(asked))
		}
		var hours [24]int
		for _, d := range at {
			hours[int(d/time.Hour)]++
		}
		// 200 balls in 24 boxes: 8.3 in each, and more than 24 in none but once in 10^5.
		if h := slices.Max(hours[:]); h > 24 {
			t.Errorf("asked so often in each hour: %v", hours)
		}
		time.Sleep(day)
		synctest.Wait()
		if again, later := m.take(); len(again) != n || later[0]-at[0] < day-time.Minute || later[0]-at[0] > day+time.Minute {
			t.Errorf("on the next day %d times, the first after %v", len(again), later[0]-at[0])
		}
		if m.at1 != 1 {
			t.Errorf("%d images at once", m.at1)
		}
		s := m.Status()
		if s.Images != n || s.Asked != 2*n || s.Failed != 0 || s.Failing != 0 || s.Every != day || s.Next.Before(time.Now()) || s.Next.After(time.Now().Add(day)) || time.Since(s.Last) > day {
			t.Errorf("status %+v", s)
		}
		// Another start draws others.
		other := NewRefresher(m.resolver, m.Prefetch.Log, m.uptime, 2, "")
		same := 0
		for key, c := range m.images {
			if other.draw(key)%uint64(day) == c.draw%uint64(day) {
				same++
			}
		}
		if same > 0 {
			t.Errorf("%d images have the same time after another start", same)
		}
	})
}

// What another configuration asks something else of has its turn soon, and only that.
func TestRefreshConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		r := rules{}
		for i := range 30 {
			for _, kind := range []string{"old", "new"} {
				name := fmt.Sprintf("%s%02d", kind, i)
				m.image(name)
				r[name] = 1
			}
		}
		const year = 365 * 24 * time.Hour // so that nothing is due by itself
		m.configure(year, r)
		m.start()
		defer m.end()
		time.Sleep(time.Minute)
		m.take()
		next := rules{"came": 1}
		for name := range r {
			next[name] = 1
			if strings.HasPrefix(name, "new") {
				next[name] = 2
			}
		}
		m.configure(year, next)
		time.Sleep(5 * time.Minute)
		// One more on the way costs none of them its turn.
		m.image("came")
		m.inv.event()
		m.configure(year, next)
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		asked, at := m.take()
		if slices.Sort(asked); len(asked) != 30 || asked[0] != "new00" || asked[29] != "new29" {
			t.Fatalf("asked about %q", asked)
		}
		if at[29]-at[0] < 5*time.Minute {
			t.Errorf("all within %v", at[29]-at[0])
		}
		// A mirror that was away a while ago keeps none from its turn.
		m.mu.Lock()
		m.answer = func(string) (int, verify.Reason) { return 0, verify.SourceUnreachable }
		m.mu.Unlock()
		for i := range byte(8) {
			m.configure(year, rules{"old00": 10 + i})
			time.Sleep(10*time.Minute + time.Second)
			synctest.Wait()
			if asked, _ := m.take(); len(asked) < 1 || len(asked) > 2 {
				t.Errorf("after failure %d asked about %q", i, asked)
			}
		}
		m.configure(0, rules{"old00": 3})
		time.Sleep(year)
		synctest.Wait()
		asked, _ = m.take()
		if wants(t, "never", asked); !m.Status().Next.IsZero() {
			t.Errorf("planned for %v", m.Status().Next)
		}
	})
}

// A mirror that is away costs few tries and two lines of the log, and nothing else.
func TestRefreshFailing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		const day = 24 * time.Hour
		m.image("a")
		m.image("b")
		m.answer = func(string) (int, verify.Reason) { return 0, verify.SourceUnreachable }
		m.configure(day, rules{"a": 1, "b": 1})
		m.start()
		defer m.end()
		time.Sleep(4 * day)
		synctest.Wait()
		asked, _ := m.take()
		// Each after 10, 20, 40 … minutes: 8 doublings make a day.
		if len(asked) < 14 || len(asked) > 24 {
			t.Errorf("asked %d times in four days", len(asked))
		}
		if s := m.Status(); s.Failing != 2 || s.Failed != uint64(len(asked)) || s.Error != "mirror: said so" {
			t.Errorf("status %+v", s)
		}
		if n := strings.Count(m.log.String(), "\n"); n != 1 || !strings.Contains(m.log.String(), "level=WARN") || !strings.Contains(m.log.String(), "SOURCE_UNREACHABLE") {
			t.Errorf("the log says %s", m.log.String())
		}
		m.log.Reset()
		m.mu.Lock()
		m.answer = func(string) (int, verify.Reason) { return 2, verify.Verified }
		m.mu.Unlock()
		time.Sleep(day + time.Hour)
		synctest.Wait()
		if s := m.Status(); s.Failing != 0 || s.Error != "" || s.Fresh < 4 {
			t.Errorf("status %+v", s)
		}
		if n := strings.Count(m.log.String(), "signatures can be looked for again"); n != 1 {
			t.Errorf("the log says %s", m.log.String())
		}
	})
}

// On demand: those that are named or all, one command at a time, in order, and what
// is not asked about says why.
func TestRefreshCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		a := m.image("a")
		m.image("b")
		m.image("unmatched")
		m.image("sourceless")
		m.rec.mu.Lock()
		m.rec.images["r.example/a@"+a.manifest.Digest.String()] = a.manifest
		m.rec.mu.Unlock()
		all := func(names ...verify.Name) (list []Refreshed, err error) {
			err = m.Refresh(t.Context(), names, func(r Refreshed) error { list = append(list, r); return nil })
			return list, err
		}
		if _, err := all(); !errors.Is(err, ErrNotLooked) {
			t.Errorf("before anything: %v", err)
		}
		m.configure(0, rules{"a": 1, "b": 1, "sourceless": 1})
		m.start()
		defer m.end()
		m.mu.Lock()
		m.answer = func(path string) (int, verify.Reason) {
			if path == "b" {
				return 0, verify.SourceUnauthorized
			}
			return 3, verify.Verified
		}
		m.mu.Unlock()
		list, err := all()
		if err != nil || len(list) != 4 {
			t.Fatalf("got %+v, %v", list, err)
		}
		for i, want := range []struct {
			path   string
			fresh  int
			failed bool
			skip   verify.Reason
		}{{"a", 3, false, ""}, {"b", 0, true, ""}, {"sourceless", 0, false, verify.SourceUnreachable}, {"unmatched", 0, false, verify.PolicyNoMatch}} {
			got := list[i]
			if got.Name.Path != want.path || got.Fresh != want.fresh || (got.Failed() != nil) != want.failed || (got.Skipped != nil) != (want.skip != "") ||
				got.Skipped != nil && got.Skipped.Reason != want.skip {
				t.Errorf("got %+v, want %+v", got, want)
			}
		}
		asked, _ := m.take()
		wants(t, "all", asked, "a", "b")
		byDigest := verify.Name{Host: "r.example", Path: "a", Digest: a.manifest.Digest}
		if list, err := all(verify.Name{Host: "r.example", Path: "a"}, byDigest); err != nil || len(list) != 1 || list[0].Target != a.manifest.Digest {
			t.Errorf("by name and by digest: %+v, %v", list, err)
		}
		for _, n := range []verify.Name{{Host: "r.example", Path: "c"}, {Host: "r.example", Path: "a", Tag: "2"}, {Host: "r.example", Path: "b", Digest: a.manifest.Digest}} {
			if list, err := all(byDigest, n); !errors.Is(err, ErrNoImage) || list != nil || !strings.Contains(err.Error(), n.String()) {
				t.Errorf("%s: %+v, %v", n, list, err)
			}
		}
		// Who goes away ends it, and another command waits for nothing.
		ctx, cancel := context.WithCancel(t.Context())
		m.mu.Lock()
		m.during = func(ctx context.Context) { <-ctx.Done() }
		m.mu.Unlock()
		done := make(chan error, 1)
		go func() { done <- m.Refresh(ctx, nil, func(Refreshed) error { return nil }) }()
		synctest.Wait()
		if _, err := all(); !errors.Is(err, ErrRefreshing) {
			t.Errorf("a second command: %v", err)
		}
		before := m.Status()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || m.Status() != before {
			t.Errorf("%v, status %+v, before %+v", err, m.Status(), before)
		}
		// A configuration that comes meanwhile ends what is asked under the old one, and
		// the image is asked about again.
		m.mu.Lock()
		once := sync.OnceFunc(func() { m.configure(0, rules{"b": 2}) })
		m.asked, m.answer = nil, func(string) (int, verify.Reason) { return 1, verify.Verified }
		m.during = func(ctx context.Context) { once(); _ = ctx }
		m.mu.Unlock()
		list, err = all()
		if err != nil || len(list) != 4 || list[0].Skipped == nil || list[1].Fresh != 1 {
			t.Errorf("got %+v, %v", list, err)
		}
		asked, _ = m.take()
		wants(t, "under two configurations", asked, "a", "b")
		fails := errors.New("nobody reads")
		if err := m.Refresh(t.Context(), nil, func(Refreshed) error { return fails }); err != fails {
			t.Errorf("got %v", err)
		}
	})
}

// Images that come and go, and a containerd that does not answer, cost no turn.
func TestRefreshImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		const day = 24 * time.Hour
		m.image("a")
		m.configure(day, rules{"a": 1, "b": 1})
		m.start()
		defer m.end()
		m.image("b")
		m.inv.event()
		time.Sleep(day)
		synctest.Wait()
		asked, _ := m.take()
		wants(t, "in a day", asked, "a", "b")
		m.rec.mu.Lock()
		delete(m.rec.images, "r.example/a")
		m.rec.mu.Unlock()
		m.inv.event()
		m.settle()
		m.take()
		time.Sleep(day)
		synctest.Wait()
		asked, _ = m.take()
		if wants(t, "after one has gone", asked, "b"); m.Status().Images != 1 {
			t.Errorf("status %+v", m.Status())
		}
	})
}

// An image that a process perhaps died of is asked about for who names it alone.
func TestRefreshInHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := mirror(t, 1)
		dir := t.TempDir()
		bad := m.image("bad")
		m.image("c")
		if err := os.WriteFile(filepath.Join(dir, marksFile), []byte(bad.manifest.Digest.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m.Marks = OpenMarks(dir, m.Log)
		m.configure(time.Hour, rules{"bad": 1, "c": 1})
		m.start()
		defer m.end()
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		asked, _ := m.take()
		slices.Sort(asked)
		wants(t, "in some hours", slices.Compact(asked), "c")
		refresh := func(names ...verify.Name) {
			t.Helper()
			if err := m.Refresh(t.Context(), names, func(Refreshed) error { return nil }); err != nil {
				t.Error(err)
			}
		}
		refresh()
		asked, _ = m.take()
		wants(t, "for all", asked, "c")
		refresh(verify.Name{Host: "r.example", Path: "bad"})
		asked, _ = m.take()
		wants(t, "by its name", asked, "bad")
	})
}

// A gate that is started again with another configuration finds out what is new in
// it; with the same one, or after the node started, nothing is.
func TestRefreshRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		const year = 365 * 24 * time.Hour
		run := func(r rules, awhile time.Duration, reason verify.Reason) []string {
			m := mirror(t, 1)
			m.noted.dir = dir
			m.answer = func(string) (int, verify.Reason) { return 0, reason }
			for _, name := range []string{"a", "b", "c"} {
				m.image(name)
			}
			m.configure(year, r)
			m.start()
			defer m.end()
			time.Sleep(time.Minute)
			m.image("later")
			m.inv.event()
			time.Sleep(awhile)
			synctest.Wait()
			asked, _ := m.take()
			slices.Sort(asked)
			return slices.Compact(asked)
		}
		const whole = 11 * time.Minute
		wants(t, "the first", run(rules{"a": 1, "b": 1, "c": 2, "later": 1}, whole, verify.Verified))
		wants(t, "the same", run(rules{"a": 1, "b": 1, "c": 2, "later": 1}, whole, verify.Verified))
		wants(t, "another root", run(rules{"a": 3, "b": 3, "c": 2, "later": 4}, whole, verify.SourceUnreachable), "a", "b")
		wants(t, "still to be done", run(rules{"a": 3, "b": 3, "c": 2, "later": 4}, whole, verify.Verified), "a", "b")
		wants(t, "done", run(rules{"a": 3, "b": 3, "c": 2, "later": 4}, whole, verify.Verified))
		raw, err := os.ReadFile(filepath.Join(dir, "refreshed"))
		if want := "02" + strings.Repeat("0", 62) + "\n03" + strings.Repeat("0", 62) + "\n04" + strings.Repeat("0", 62) + "\n"; err != nil || string(raw) != want {
			t.Errorf("noted %q, %v", raw, err)
		}
		for name, content := range map[string]string{"gone": "", "cut": string(raw[:70]), "long": strings.Repeat("0", maxRequirements+1), "another": "x\n"} {
			if name == "gone" {
				err = os.Remove(filepath.Join(dir, "refreshed"))
			} else {
				err = os.WriteFile(filepath.Join(dir, "refreshed"), []byte(content), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			wants(t, name, run(rules{"a": 5, "b": 6, "c": 7}, whole, verify.Verified))
		}
	})
}
