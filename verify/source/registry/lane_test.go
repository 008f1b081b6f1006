package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A trickle is a registry, as a transport, that has one list of referrers without a
// signature. It sends the first bytes at once and the rest at a rate.
type trickle struct {
	size  int // bytes of the list
	first int // bytes that come at once
	rate  int // bytes a second of the rest; 0: they come at once, too
}

func (s trickle) RoundTrip(req *http.Request) (*http.Response, error) {
	const head, tail = `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[],"annotations":{"x":"`, `"}}`
	list := head + strings.Repeat("x", s.size-len(head)-len(tail)) + tail
	body := &trickled{ctx: req.Context(), s: s, rest: bytes.NewReader([]byte(list)), left: s.first}
	return &http.Response{Status: "200 OK", StatusCode: 200, ContentLength: int64(s.size), Request: req, Body: io.NopCloser(body),
		Header: http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}}, nil
}

type trickled struct {
	ctx  context.Context
	s    trickle
	rest *bytes.Reader
	left int // bytes that may be read before the next second
}

func (b *trickled) Read(p []byte) (int, error) {
	if b.s.rate == 0 {
		return b.rest.Read(p)
	}
	if b.left == 0 {
		select {
		case <-time.After(time.Second):
			b.left = b.s.rate
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		}
	}
	n, err := b.rest.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// TestLane: questions whose lists are long, asked a tenth of a second after each other.
// Each ends in bounded time whatever the others send.
func TestLane(t *testing.T) {
	const large = 3 << 20
	quick := trickle{size: large}
	hanging := trickle{size: large, first: 600 << 10, rate: 1}
	modest := trickle{size: 300 << 10, first: 100 << 10, rate: 100 << 10}
	slow := trickle{size: large, first: 600 << 10, rate: 300 << 10}   // done in 9 s
	steady := trickle{size: large, first: 600 << 10, rate: 600 << 10} // done in 5 s
	type question struct {
		from  trickle
		named bool
		ends  time.Duration // at most, after it began
		says  string        // part of the error; empty: it is answered
	}
	const yields, rate, late = "made way for one of a host that it names", "less than 512 KiB a second", "no answer in time"
	for _, tt := range []struct {
		name      string
		questions []question
	}{
		{name: "a slow list that no one waits for", questions: []question{{from: slow, ends: 9 * time.Second}}},
		{name: "a hanging stranger and a named host", questions: []question{
			{from: hanging, ends: 100 * time.Millisecond, says: yields},
			{from: quick, named: true},
		}},
		{name: "a steady stranger and a named host", questions: []question{
			{from: steady, ends: 100 * time.Millisecond, says: yields},
			{from: quick, named: true},
		}},
		{name: "many strangers and a named host", questions: []question{
			{from: hanging, ends: 400 * time.Millisecond, says: yields},
			{from: hanging, ends: 10 * time.Second, says: ""},
			{from: hanging, ends: 10 * time.Second, says: ""},
			{from: quick, ends: 10 * time.Second, says: ""},
			{from: quick, named: true},
		}},
		{name: "two strangers that hang", questions: []question{
			{from: hanging, ends: 1100 * time.Millisecond, says: rate},
			{from: hanging, ends: 10 * time.Second, says: late},
		}},
		{name: "a hanging stranger and a stranger", questions: []question{
			{from: hanging, ends: 1100 * time.Millisecond, says: rate},
			{from: quick, ends: time.Second},
		}},
		{name: "a hanging named host and a named host", questions: []question{
			{from: hanging, named: true, ends: 1100 * time.Millisecond, says: rate},
			{from: quick, named: true, ends: time.Second},
		}},
		{name: "a steady named host and a named host", questions: []question{
			{from: steady, named: true, ends: 5 * time.Second},
			{from: quick, named: true, ends: 5 * time.Second},
		}},
		{name: "a slow named host is not displaced by strangers", questions: []question{
			{from: slow, named: true, ends: 9 * time.Second},
			{from: quick, ends: 9 * time.Second},
			{from: quick, ends: 9 * time.Second},
		}},
		{name: "lists of ordinary length take no turn", questions: []question{
			{from: hanging, named: true, ends: 10 * time.Second, says: late},
			{from: modest, ends: 3 * time.Second},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for i, q := range tt.questions {
					time.Sleep(100 * time.Millisecond)
					go func() {
						host := fmt.Sprintf("%d.example", i)
						s := registry.New(registry.Mirror{Host: host, Named: q.named, URL: &url.URL{Scheme: "http", Host: host}, Client: &http.Client{Transport: q.from}})
						ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
						defer cancel()
						began := time.Now()
						err := s.Find(ctx, verify.Name{Host: host, Path: "app"}, subject(), verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
						took := time.Since(began)
						if took > q.ends {
							t.Errorf("question %d took %v, want at most %v (%v)", i, took, q.ends, err)
						}
						if q.says == "" && err != nil && q.from != hanging || q.says != "" && (!errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), q.says)) {
							t.Errorf("question %d: error %v, want one about %q", i, err, q.says)
						}
					}()
				}
				synctest.Wait()
				time.Sleep(time.Minute)
			})
		})
	}
}

func subject() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: 5}
}
