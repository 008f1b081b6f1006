//go:build !linux

package bundle

import "errors"

// exchange has two names change places in one step.
func exchange(_, _ string) error { return errors.ErrUnsupported }
