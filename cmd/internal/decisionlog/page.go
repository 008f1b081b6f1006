package decisionlog

import (
	"context"
	"net/url"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// Page returns the first lines that f wants.
func (r *Ring) Page(f control.Filter) (control.Decisions, error) {
	p := control.Decisions{Schema: control.DecisionsSchema, Last: f.After, Lines: []control.Line{}}
	size := 0
	err := r.Read(f.After, func(l control.Line) bool {
		if size > control.MaxDecisions {
			p.More = true
			return false
		}
		p.Last = max(p.Last, l.Seq)
		if f.Wants(l) {
			p.Lines = append(p.Lines, l)
			size += len(l.Decision)
		}
		return true
	})
	return p, err
}

// Endpoint answers with Pages.
func (r *Ring) Endpoint() control.Endpoint {
	return control.Endpoint{Path: control.DecisionsPath, Answer: func(_ context.Context, q url.Values) (any, error) {
		f, err := control.ParseFilter(q)
		if err != nil {
			return nil, err
		}
		return r.Page(f)
	}}
}
