package daemon

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// lanes returns a cache in front of what e does, which asks what is on the node first: e
// with the store and layouts alone, and then e with all other sources.
func lanes(c *config.Config, e *verify.Engine, o cache.Options) *cache.Cache {
	o.Named = c.Named()
	// One source may take all of limits.timeout, and the next some time too.
	o.Deadline = max(time.Minute, 2*c.Limits.Or(verify.DefaultLimits).Wall)
	if e.Store == nil && len(c.Layouts) == 0 {
		return cache.New(e, o)
	}
	near, far := *e, *e
	near.Sources, far.Sources = here(e.Sources, true), here(e.Sources, false)
	if e.Store != nil {
		far.Store = asked{e.Store}
	}
	o.Near, o.Beyond = &near, func(n verify.Name) bool { return len(far.Sources(n)) > 0 }
	return cache.New(&far, o)
}

// here returns those of the sources that are on the node, or the others.
func here(all func(verify.Name) []verify.Source, yes bool) func(verify.Name) []verify.Source {
	return func(n verify.Name) (list []verify.Source) {
		for _, s := range all(n) {
			if _, is := s.(*layout.Source); is == yes {
				list = append(list, s)
			}
		}
		return list
	}
}

// asked is a WritableSource of which it is known already that it has no signature that counts.
type asked struct{ verify.WritableSource }

// Find implements verify.Source.
func (asked) Find(context.Context, verify.Name, ocispec.Descriptor, *verify.Budget, func(verify.Evidence) bool) error {
	return nil
}
