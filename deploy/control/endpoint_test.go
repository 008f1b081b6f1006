package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestEndpoints asks what takes time, and more of it than is answered at once.
func TestEndpoints(t *testing.T) {
	dir := short(t)
	release := make(chan struct{})
	started := make(chan struct{}, 8)
	type said struct {
		Schema string `json:"schema"`
		Text   string `json:"text"`
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	s := &Socket{Dir: dir, Log: slog.New(slog.DiscardHandler), Handler: Handler(
		func() Status { return healthy("one") },
		func(io.Writer) error { return nil },
		Endpoint{Path: "/v1/echo", Answer: func(_ context.Context, q url.Values) (any, error) {
			if q.Get("text") == "" {
				return nil, errors.New("no text\nis given")
			}
			return said{"echo", q.Get("text")}, nil
		}},
		Endpoint{Path: "/v1/slow", Longest: time.Minute, Answer: func(ctx context.Context, _ url.Values) (any, error) {
			started <- struct{}{}
			select {
			case <-release:
				return said{"slow", "done"}, nil
			case <-ctx.Done():
				return said{"slow", "ended"}, nil
			}
		}},
	)}
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	answers(t, dir, "one")

	var a said
	if err := Get(t.Context(), dir, Question{Path: "/v1/echo", Query: url.Values{"text": {"a&b c"}}, Schema: "echo"}, &a); err != nil || a.Text != "a&b c" {
		t.Errorf("%+v %v", a, err)
	}
	for want, q := range map[string]Question{
		"the gate says: no text is given": {Path: "/v1/echo", Schema: "echo"},
		"does not know GET /v1/none":      {Path: "/v1/none", Schema: "echo"},
		`speaks "echo", not other`:        {Path: "/v1/echo", Query: url.Values{"text": {"x"}}, Schema: "other"},
		"longer than 8 bytes":             {Path: "/v1/echo", Query: url.Values{"text": {"x"}}, Schema: "echo", Bytes: 8},
	} {
		if err := Get(t.Context(), dir, q, &a); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		} else if errors.Is(err, ErrRefused) != strings.HasPrefix(want, "the gate says") {
			t.Errorf("%v is taken for an answer of the gate, or not", err)
		}
	}

	// Two take their time; a third is told so, and who asks whether the gate is ready
	// is answered.
	var wg sync.WaitGroup
	for range slow {
		wg.Go(func() {
			var a said
			if err := Get(t.Context(), dir, Question{Path: "/v1/slow", Schema: "slow", Longest: time.Minute}, &a); err != nil || a.Text != "done" {
				t.Errorf("%+v %v", a, err)
			}
		})
	}
	for range slow {
		<-started
	}
	if err := Get(t.Context(), dir, Question{Path: "/v1/slow", Schema: "slow"}, &a); !errors.Is(err, ErrRefused) {
		t.Errorf("a third question is answered with %v", err)
	}
	if _, err := Ask(t.Context(), dir); err != nil {
		t.Errorf("the status is not told: %v", err)
	}
	// They take longer than a request may take to come in.
	wait(t.Context(), readTime+500*time.Millisecond)
	close(release)
	wg.Wait()
}
