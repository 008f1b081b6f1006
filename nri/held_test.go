package nri

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// session makes a Session that never connects, for what it does with a connection.
func session(t *testing.T, audit func() bool, large func(context.Context) (string, error)) (*Session, *retries) {
	r := &retries{}
	return &Session{
		Gate: &Gate{Resolver: one{}, Verifier: denier{}, Observe: func(Answer) {}, Now: time.Now}, Socket: filepath.Join(t.TempDir(), "none.sock"),
		Log: slog.New(r), Audit: audit, Large: large, Random: func() float64 { return 0.5 },
	}, r
}

// A registration that the runtime holds up is waited for a minute if the connection lasts
// as long, and the session says since when.
func TestRegistrationIsHeldUp(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(p *plugin, closed chan struct{}, cancel func())
		want string // the error; empty: none
	}{
		"the runtime goes on":    {end: func(p *plugin, _ chan struct{}, _ func()) { close(p.synced) }},
		"the connection ends":    {end: func(_ *plugin, closed chan struct{}, _ func()) { close(closed) }, want: "before it was synchronised"},
		"the runtime forgets it": {end: func(_ *plugin, _ chan struct{}, _ func()) {}, want: "within 1m0s"},
		"the gate is to leave":   {end: func(_ *plugin, _ chan struct{}, cancel func()) { cancel() }, want: "context canceled"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, log := session(t, func() bool { return false }, nil)
				p, closed := &plugin{session: s, synced: make(chan struct{})}, make(chan struct{})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				began := time.Now()
				done := make(chan error, 1)
				go func() { done <- s.await(ctx, p, closed) }()
				time.Sleep(syncLateAfter - time.Millisecond)
				if at := s.State().Awaiting; !at.IsZero() {
					t.Errorf("held up since %v, before it was late", at)
				}
				time.Sleep(syncTimeout / 2)
				synctest.Wait()
				if at := s.State().Awaiting; !at.Equal(began) {
					t.Errorf("held up since %v, want %v", at, began)
				}
				if log.loud != 1 {
					t.Errorf("%d lines in half a minute, want 1", log.loud)
				}
				tt.end(p, closed, cancel)
				err := <-done
				if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
				if at := s.State().Awaiting; err == nil && !at.IsZero() {
					t.Errorf("held up since %v, after it went on", at)
				}
			})
		})
	}
}

// A change of mode gives up the connection only to enforce, and only when the gate could
// register again.
func TestModeChanges(t *testing.T) {
	for name, tt := range map[string]struct {
		registered string // the hook of the connection: "audit" or "enforce"
		mode       string // the mode that it changes to
		why        string // what Large says
		err        error
		leaves     bool
		held       string // part of State.Held
	}{
		"enforce to audit":                        {registered: "enforce", mode: "audit"},
		"enforce to audit, and it could not":      {registered: "enforce", mode: "audit", why: "pod team/p"},
		"nothing changed":                         {registered: "audit", mode: "audit"},
		"audit to enforce":                        {registered: "audit", mode: "enforce", leaves: true},
		"audit to enforce, and it could not":      {registered: "audit", mode: "enforce", why: "pod team/p", held: "pod team/p"},
		"audit to enforce, and that is not known": {registered: "audit", mode: "enforce", err: errors.New("no answer"), held: "no answer"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var audits, could atomic.Bool
				audits.Store(tt.registered == "audit")
				var asked atomic.Int64
				s, _ := session(t, audits.Load, func(ctx context.Context) (string, error) {
					if _, ok := ctx.Deadline(); !ok {
						t.Error("it may take for ever")
					}
					if asked.Add(1); could.Load() {
						return "", nil
					}
					return tt.why, tt.err
				})
				p, closed := &plugin{session: s, audit: audits.Load()}, make(chan struct{})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				done := make(chan error, 1)
				go func() { done <- s.serve(ctx, p, closed) }()
				synctest.Wait()
				audits.Store(tt.mode == "audit")
				s.Renew()
				time.Sleep(time.Hour)
				synctest.Wait()
				left := false
				select {
				case err := <-done:
					if left = true; err != nil {
						t.Error(err)
					}
				default:
				}
				st := s.State()
				if left != tt.leaves || (st.Held == "") != (tt.held == "") || !strings.Contains(st.Held, tt.held) || p.held.Load() != (tt.held != "") {
					t.Fatalf("leaves %t, state %+v", left, st)
				}
				if n := asked.Load(); tt.registered == "enforce" && n != 0 || tt.held != "" && (n < 30 || n > 90) {
					t.Errorf("asked %d times in an hour", n)
				}
				switch {
				case left:
				case tt.held == "":
					cancel()
					if err := <-done; err != nil {
						t.Error(err)
					}
				default: // it goes as soon as it can come back
					could.Store(true)
					time.Sleep(maxLargeRetry)
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// TestHeldBackIsCleared: pods that keep a gate from leaving audit's hook are taken away
// once the node enforces, and none while it audits. Then the gate goes on.
func TestHeldBackIsCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var audits, may atomic.Bool
		var there atomic.Int64
		audits.Store(true)
		there.Store(3)
		s, _ := session(t, audits.Load, func(context.Context) (string, error) {
			if there.Load() > 0 {
				return "pod team/p", nil
			}
			return "", nil
		})
		s.Clear = func(context.Context) (int, error) {
			if audits.Load() {
				t.Error("taken away while the node audits")
			}
			if !may.Load() {
				return 0, errors.New("no answer")
			}
			there.Add(-1)
			return 1, nil
		}
		p := &plugin{session: s, audit: true}
		done := make(chan error, 1)
		go func() { done <- s.serve(t.Context(), p, make(chan struct{})) }()
		time.Sleep(time.Hour)
		audits.Store(false)
		s.Renew()
		time.Sleep(time.Hour)
		synctest.Wait()
		if s.State().Held == "" || !p.held.Load() || there.Load() != 3 {
			t.Fatalf("held back by %q, with %d pods", s.State().Held, there.Load())
		}
		may.Store(true)
		time.Sleep(maxLargeRetry)
		synctest.Wait()
		select {
		case err := <-done:
			if err != nil || there.Load() != 0 || s.State().Held != "" || !p.held.Load() {
				t.Errorf("%v, %d pods left, held by %q", err, there.Load(), s.State().Held)
			}
		default:
			t.Fatal("it does not go on")
		}
	})
}
