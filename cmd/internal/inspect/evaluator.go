package inspect

import (
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/archive"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Platforms matches any of the platforms, "linux/arm64"; nil if there are none.
func Platforms(list []string) (func(ocispec.Platform) bool, error) {
	var any []platforms.Matcher
	for _, p := range list {
		m, err := platforms.Parse(p)
		if err != nil {
			return nil, fmt.Errorf("platform %s: %w", text.Quote(p, 64), err)
		}
		any = append(any, platforms.OnlyStrict(m))
	}
	if any == nil {
		return nil, nil
	}
	return func(p ocispec.Platform) bool {
		return slices.ContainsFunc(any, func(m platforms.Matcher) bool { return m.Match(p) })
	}, nil
}

// Evaluator evaluates by c what a node would run.
func Evaluator(c *config.Config) (*archive.Evaluator, error) {
	own := platforms.DefaultSpec()
	if runtime.GOOS != "linux" { // a workstation looks at what a node will run
		own.OS, own.OSVersion, own.OSFeatures = "linux", "", nil
	}
	e := &archive.Evaluator{Name: c.Dir, Now: time.Now, Platform: platforms.Only(own).Match}
	for _, s := range c.Statements {
		if s.Level != "skip" {
			e.Statements = append(e.Statements, s.Name)
		}
	}
	var err error
	e.Setup, err = c.Snapshot(func(engine *verify.Engine) verify.Evaluator {
		e.Engine = engine
		return engine
	}, time.Now)
	return e, err
}
