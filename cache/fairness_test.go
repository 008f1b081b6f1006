package cache

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A load is images that pods ask about all the time and that get no answer.
type load struct {
	name   string
	images []verify.Question
}

// spread returns images of n different names, each as host and path say. A name may have
// a place for a number.
func spread(name string, n int, host, path string) load {
	l := load{name: name}
	for i := range n {
		number := func(s string) string { return strings.ReplaceAll(s, "%d", fmt.Sprint(i)) }
		l.images = append(l.images, at(ask("bad "+number("%d")), number(host), number(path)))
	}
	return l
}

// TestFairness: thirty good images of one host are all allowed within a minute whatever
// other images are asked about, be it that containers ask for them, every twelve seconds
// as a kubelet does, or that they are verified ahead of time, one after the other. How
// long that takes is simulated.
func TestFairness(t *testing.T) {
	const good = "registry.local"
	hosts := func(n int) load { return spread(fmt.Sprintf("%d hosts", n), n, "evil%d.example", "app") }
	for _, tt := range []struct {
		load
		proved bool // the good host is not named and gave a yes before
		exact  bool // its repository is named
		shown  int  // hosts of the load that gave a yes before
		names  int  // the load is of that many hosts, which are named
	}{
		{load: load{name: "nothing else"}},
		{load: hosts(20)},
		{load: hosts(64)},
		{load: hosts(80)},
		{load: hosts(150)},
		{load: hosts(300)},
		{load: hosts(300), proved: true},
		{load: hosts(300), shown: 10},
		{load: spread("100 images of another tenant of the registry", 100, good, "tenant/app")},
		{load: spread("100 repositories of another tenant", 100, good, "tenant/app%d")},
		{load: spread("100 repositories of another tenant", 100, good, "tenant/app%d"), proved: true},
		{load: spread("100 repositories several parts deep", 100, good, "tenant/%d/app")},
		{load: spread("100 images of another repository without an owner", 100, good, "app")},
		{load: spread("100 images of another repository of the same owner", 100, good, "good/other"), exact: true},
		{load: spread("100 images of another named host", 100, "mirrored.local", "app")},
		{load: spread("100 images of five named hosts", 100, "mirrored.local:%d", "app"), names: 5},
	} {
		for _, took := range []time.Duration{900 * time.Millisecond, 10 * time.Second} {
			for _, ahead := range []bool{false, true} {
				if ahead && tt.shown > 0 && took > long {
					continue // each of these holds the last slot once
				}
				t.Run(fmt.Sprintf("%s, proved %t, exact %t, %d shown/%v each/ahead %t", tt.name, tt.proved, tt.exact, tt.shown, took, ahead), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						var teach atomic.Bool
						j := &judge{f: func(_ context.Context, q verify.Question) verify.Decision {
							if n := q.Image.Name; n.Path == "good/app" || teach.Load() {
								time.Sleep(20 * time.Millisecond)
								return allow(q, time.Now(), time.Now().Add(24*time.Hour))
							}
							time.Sleep(took)
							return verify.Deny(verify.SourceUnreachable, "")
						}}
						o := Options{Now: time.Now}
						if !tt.proved {
							o.Named = func(n verify.Name) (host, repository bool) {
								return n.Host == good || strings.HasPrefix(n.Host, "mirrored.local"), tt.exact && n.Path == "good/app"
							}
						}
						for i, q := range tt.images {
							if tt.names > 0 {
								tt.images[i] = at(q, fmt.Sprintf("mirrored.local:%d", i%tt.names), "app")
							}
						}
						c := open(t, j, o)
						teach.Store(true)
						if tt.proved {
							c.Evaluate(bg, at(ask("earlier"), good, "good/app"))
						}
						for i := range tt.shown {
							c.Evaluate(bg, at(ask("earlier"+fmt.Sprint(i)), fmt.Sprintf("evil%d.example", i), "app"))
						}
						teach.Store(false)
						ctx, stop := context.WithCancel(bg)
						var flood sync.WaitGroup
						flood.Go(func() {
							for ctx.Err() == nil {
								for _, q := range tt.images {
									c.Evaluate(ended(), q)
								}
								sleep(ctx, time.Second)
							}
						})
						time.Sleep(100 * time.Millisecond)
						var allowed atomic.Int64
						var pods sync.WaitGroup
						asks := func(i int) verify.Question { return at(ask(fmt.Sprint("good", i)), good, "good/app") }
						if ahead {
							pods.Go(func() {
								for i := range 30 {
									for ctx.Err() == nil {
										survey, cancel := context.WithTimeout(ctx, 2*time.Minute)
										d := c.Evaluate(survey, aheadOf(asks(i)))
										cancel()
										sleep(ctx, 10*time.Millisecond)
										if d.Allowed() {
											allowed.Add(1)
											break
										}
									}
								}
							})
						} else {
							for i := range 30 {
								pods.Go(func() {
									for ctx.Err() == nil {
										if d := c.Evaluate(ended(), asks(i)); d.Allowed() {
											allowed.Add(1)
											return
										}
										sleep(ctx, 12*time.Second)
									}
								})
							}
						}
						time.Sleep(time.Minute)
						if n := allowed.Load(); n != 30 {
							t.Errorf("%d of 30 good images are allowed", n)
						}
						stop()
						pods.Wait()
						flood.Wait()
						c.Close()
						if s := c.Stats(); s.Started != s.Ended || s.Running != 0 || s.Waiting != 0 || s.Ahead != 0 {
							t.Errorf("stats %+v", s)
						}
					})
				})
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
