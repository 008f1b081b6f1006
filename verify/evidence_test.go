package verify

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"
)

func TestReasonOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want Reason
	}{
		{ErrUnreachable, SourceUnreachable},
		{ErrUnauthorized, SourceUnauthorized},
		{ErrNoReferrers, SourceNoReferrers},
		{ErrBudget, LimitExceeded},
		{fmt.Errorf("mirror: %w", ErrUnauthorized), SourceUnauthorized},
		{errors.Join(ErrUnreachable, ErrBudget), LimitExceeded},
		{context.DeadlineExceeded, SourceUnreachable},
		{errors.New("anything else"), SourceUnreachable},
	} {
		if got := reasonOf(tt.err); got != tt.want {
			t.Errorf("%v is %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestLimitsOr(t *testing.T) {
	if got := (Limits{}).Or(DefaultLimits); got != DefaultLimits {
		t.Errorf("zero limits are %+v", got)
	}
	one := Limits{Pages: 1, Referrers: 2, Signatures: 3, Certificates: 4, ManifestBytes: 5, EnvelopeBytes: 6, TotalBytes: 7, Wall: 8}
	if got := one.Or(DefaultLimits); got != one {
		t.Errorf("set limits became %+v", got)
	}
	want := DefaultLimits
	want.Pages, want.Wall = 1, time.Second
	if got := (Limits{Pages: 1, Wall: time.Second}).Or(DefaultLimits); got != want {
		t.Errorf("limits are %+v, want %+v", got, want)
	}
}

func TestBudgetCounts(t *testing.T) {
	b := NewBudget(nil, Limits{Pages: 1, Referrers: 2, Signatures: 3})
	for name, tt := range map[string]struct {
		take func() error
		n    int
	}{
		"pages":      {b.Page, 1},
		"referrers":  {b.Referrer, 2},
		"signatures": {b.Signature, 3},
	} {
		for i := range tt.n {
			if err := tt.take(); err != nil {
				t.Errorf("%s, %d of %d: %v", name, i+1, tt.n, err)
			}
		}
		for range 2 { // and stays spent
			if err := tt.take(); !errors.Is(err, ErrBudget) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s beyond the limit: %v", name, err)
			}
		}
	}
}

func TestBudgetBytes(t *testing.T) {
	const manifest, envelope = "manifest", "envelope"
	type step struct {
		what string
		n    int64
		ok   bool
		max  int64 // MaxManifest afterwards
	}
	for name, steps := range map[string][]step{
		"a manifest at its limit":    {{manifest, 100, true, 100}, {manifest, 101, false, 100}},
		"an envelope at its limit":   {{envelope, 10, true, 100}, {envelope, 11, false, 100}},
		"nothing":                    {{manifest, 0, true, 100}, {envelope, 0, true, 100}},
		"negative gives nothing":     {{manifest, -1, false, 100}, {manifest, math.MinInt64, false, 100}, {manifest, 100, true, 100}},
		"huge":                       {{manifest, math.MaxInt64, false, 100}, {envelope, math.MaxInt64, false, 100}},
		"both come from the total":   {{manifest, 100, true, 100}, {manifest, 100, true, 50}, {envelope, 10, true, 40}, {manifest, 41, false, 40}, {manifest, 40, true, 0}, {envelope, 1, false, 0}},
		"a refusal costs nothing":    {{manifest, 101, false, 100}, {manifest, 100, true, 100}, {manifest, 100, true, 50}},
		"an envelope is no manifest": {{envelope, 100, false, 100}},
	} {
		t.Run(name, func(t *testing.T) {
			b := NewBudget(nil, Limits{ManifestBytes: 100, EnvelopeBytes: 10, TotalBytes: 250})
			for i, s := range steps {
				take := b.Manifest
				if s.what == envelope {
					take = b.Envelope
				}
				err := take(s.n)
				if (err == nil) != s.ok || err != nil && !errors.Is(err, ErrBudget) {
					t.Errorf("step %d: %s of %d: %v", i, s.what, s.n, err)
				}
				if got := b.MaxManifest(); got != s.max {
					t.Errorf("step %d: then a manifest may have %d bytes, want %d", i, got, s.max)
				}
			}
		})
	}
}
