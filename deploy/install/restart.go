package install

import (
	"context"
	"errors"
	"os/exec"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// mayRestart refuses a restart of containerd with its files as they are. What cannot be
// found out is no reason against it.
func (i *Installation) mayRestart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	e, err := i.EffectiveFrom(ctx, i.Config)
	if wrong := i.CheckStart(i.Config, i.named(), e); wrong != nil {
		return wrong
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && ctx.Err() == nil {
		return node.Refusef("correct it, and do not restart before", "containerd would not start: its own program does not take its configuration: %w", err)
	}
	return nil
}

// nextOf is what to do about err; empty: it does not say.
func nextOf(err error) string {
	if h := (*node.Hint)(nil); errors.As(err, &h) {
		return h.Next
	}
	return ""
}

// named reports whether the containerd that runs was told the name of its configuration.
func (i *Installation) named() bool {
	p, err := i.Running(i.Now())
	return err == nil && i.Source == "" && p.Config == i.Config
}
