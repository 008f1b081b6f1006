package decisions

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/verify"
)

// Schema is that of a Page. Fields are added and never change.
const Schema = "tidewaiter.dev/decisions/v1"

// Path is where the control socket answers with a Page.
const Path = "/v1/decisions"

// maxPage bounds what one Page holds, in bytes of its decisions.
const maxPage = 512 << 10

// A Page is what one question is answered with.
type Page struct {
	Schema    string `json:"schema"`
	Last      uint64 `json:"last"` // what to ask After for what comes next
	More      bool   `json:"more"` // there is more already
	Decisions []Line `json:"decisions"`
}

// A Filter says which lines are wanted. The zero Filter wants all.
type Filter struct {
	After  uint64    // only those with a higher Seq
	Since  time.Time // only those that are not older
	Denied bool      // only those that enforce denies or would deny, without PENDING
	Reason string    // only those of which enforce has that reason
	ID     string    // only those with that ID
}

// takes reports whether f wants l.
func (f Filter) takes(l Line) bool {
	if l.At.Before(f.Since) {
		return false
	}
	if !f.Denied && f.Reason == "" && f.ID == "" {
		return true
	}
	s, err := l.Said()
	return err == nil && (!f.Denied || s.Denied()) && (f.Reason == "" || f.Reason == s.Enforced()) && (f.ID == "" || f.ID == s.ID)
}

func (f Filter) query() url.Values {
	q := url.Values{"after": {strconv.FormatUint(f.After, 10)}}
	if !f.Since.IsZero() {
		q.Set("since", f.Since.UTC().Format(time.RFC3339Nano))
	}
	if f.Denied {
		q.Set("denied", "true")
	}
	if f.Reason != "" {
		q.Set("reason", f.Reason)
	}
	if f.ID != "" {
		q.Set("id", f.ID)
	}
	return q
}

func parse(q url.Values) (f Filter, err error) {
	for k := range q {
		v := q.Get(k)
		switch k {
		case "after":
			f.After, err = strconv.ParseUint(v, 10, 64)
		case "since":
			f.Since, err = time.Parse(time.RFC3339Nano, v)
		case "denied":
			f.Denied, err = strconv.ParseBool(v)
		case "reason":
			f.Reason = v
		case "id":
			f.ID = v
		default:
			err = errors.New("there is after, since, denied, reason and id")
		}
		if err != nil {
			return f, fmt.Errorf("%s: %w", verify.Quote(k, 32), err)
		}
	}
	return f, nil
}

// Page returns the first lines that f wants.
func (r *Ring) Page(f Filter) (Page, error) {
	p := Page{Schema: Schema, Last: f.After, Decisions: []Line{}}
	size := 0
	err := r.Read(f.After, func(l Line) bool {
		if size > maxPage {
			p.More = true
			return false
		}
		p.Last = max(p.Last, l.Seq)
		if f.takes(l) {
			p.Decisions = append(p.Decisions, l)
			size += len(l.Decision)
		}
		return true
	})
	return p, err
}

// Endpoint answers with Pages.
func (r *Ring) Endpoint() control.Endpoint {
	return control.Endpoint{Path: Path, Answer: func(_ context.Context, q url.Values) (any, error) {
		f, err := parse(q)
		if err != nil {
			return nil, err
		}
		return r.Page(f)
	}}
}

// Ask asks the gate whose run directory is run for a Page.
func Ask(ctx context.Context, run string, f Filter) (p Page, err error) {
	err = control.Get(ctx, run, control.Question{Path: Path, Query: f.query(), Schema: Schema, Bytes: 2 * maxPage}, &p)
	return p, err
}
