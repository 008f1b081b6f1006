package doctor

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// Bounds of what registries are asked.
const (
	maxSources = 16
	maxAsked   = 3 // images, at each
	askTime    = 10 * time.Second
)

// finding says how s fared. A mirror that is away keeps nothing from starting that is
// known, and nodes are made to do without.
func (s Source) finding(x *examination) {
	const check = "sources"
	about := "about images of " + s.Host
	switch {
	case s.Err == nil:
		x.ok(check, "%s answers %s, with the signatures that it has", s.Name, about)
	case errors.Is(s.Err, verify.ErrUnauthorized):
		x.add(Fail, check, control.Next(verify.SourceUnauthorized), "%s refuses the node's credentials: %v", s.Name, s.Err)
	case errors.Is(s.Err, verify.ErrNoReferrers) && s.Asked == 0:
		x.ok(check, "%s answers; whether it serves signatures is not known, since no image of %s is on the node", s.Name, s.Host)
	case errors.Is(s.Err, verify.ErrNoReferrers):
		x.add(Warn, check, control.Next(verify.SourceNoReferrers), "%s answers, and has neither a Referrers API nor a referrers tag for %d images of the node: %v", s.Name, s.Asked, s.Err)
	case errors.Is(s.Err, verify.ErrBudget):
		x.add(Warn, check, control.Next(verify.LimitExceeded), "%s sends more than the limits allow: %v", s.Name, s.Err)
	default:
		x.add(Warn, check, "look at it: images that are not known yet are refused meanwhile", "%s does not answer: %v", s.Name, s.Err)
	}
}

// Probe asks each source for signatures of images of the node, as the gate would, and
// of no image that no rule asks a signature of. Where the node has no image of a
// mirror's host, something is asked for that does not exist.
func Probe(ctx context.Context, c *config.Config, records []containerd.Record, now func() time.Time) ([]Source, error) {
	setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator { return e }, now)
	if err != nil {
		return nil, err
	}
	sources := c.Sources()
	var all []Source
	// question is one image, or none of the host.
	question := func(name verify.Name, subject ocispec.Descriptor, real bool) {
		for _, from := range sources(name) {
			at := slices.IndexFunc(all, func(s Source) bool { return s.Name == from.Name() && s.Host == name.Host })
			if at < 0 {
				if len(all) == maxSources || !real && slices.ContainsFunc(all, func(s Source) bool { return s.Name == from.Name() }) {
					continue
				}
				all = append(all, Source{Name: from.Name(), Host: name.Host, Err: errNotAsked})
				at = len(all) - 1
			}
			s := &all[at]
			if s.Err == nil || s.Asked == maxAsked || errors.Is(s.Err, verify.ErrUnreachable) || errors.Is(s.Err, verify.ErrUnauthorized) {
				continue
			}
			ctx, cancel := context.WithTimeout(ctx, min(askTime, c.Limits.Or(verify.DefaultLimits).Wall))
			s.Err = from.Find(ctx, name, subject, verify.NewBudget(notary.Kind, c.Limits), func(verify.Evidence) bool { return false })
			cancel()
			if real {
				s.Asked++
			}
		}
	}
	seen := map[string]bool{}
	for _, r := range records {
		name, err := policy.ParseName(r.Name)
		if err != nil {
			continue
		}
		name = setup.Known(name)
		if rule := setup.Policy.Select(verify.Image{Name: name, Target: r.Target, Manifest: r.Target}); rule.Fixed != "" {
			continue
		}
		question(name, r.Target, true)
		seen[name.Host] = true
	}
	for _, m := range c.Summary().Mirrors {
		if host := m.Host; !seen[host] {
			seen[host] = true
			if host == "*" {
				host = "tidewaiter-doctor.invalid"
			}
			d := digest.FromString("tidewaiter doctor")
			question(verify.Name{Host: host, Path: "tidewaiter-doctor"}, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: 1}, false)
		}
	}
	for i := range all {
		if strings.HasPrefix(all[i].Name, "layout ") && errors.Is(all[i].Err, fs.ErrNotExist) {
			all[i].Err = errors.Join(verify.ErrUnreachable, all[i].Err)
		}
	}
	return all, nil
}

// errNotAsked is of a source before the first question.
var errNotAsked = errors.New("it was not asked")
