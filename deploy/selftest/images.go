package selftest

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// known is a repository of an image which the gate allows, and that no statement names:
// its mirror can say that there is no signature.
func (t *test) known(ctx context.Context, s config.Summary, gate error) string {
	if gate != nil {
		return ""
	}
	l, err := control.AskImages(ctx, t.RunDir)
	if err != nil {
		return ""
	}
	named := map[string]bool{}
	for _, st := range s.Statements {
		for _, scope := range st.Scopes {
			if n, err := policy.ParseName(scope); err == nil {
				named[n.Repository()] = true
			}
		}
	}
	for _, i := range l.List {
		n, err := policy.ParseName(i.Image)
		if err == nil && i.Reason == string(verify.Verified) && !named[n.Repository()] {
			return n.Repository()
		}
	}
	return ""
}

// images are those of the node. A gate that just got its configuration is waited for.
func (t *test) images(ctx context.Context) (l control.Images, err error) {
	for end := t.Now().Add(settleTime); ; {
		l, err = control.AskImages(ctx, t.RunDir)
		has := func(is func(control.Image) bool) bool { return slices.ContainsFunc(l.List, is) }
		if err != nil || has(func(i control.Image) bool { return i.Allowed }) ||
			!has(func(i control.Image) bool {
				return i.Reason == string(verify.Pending) && !strings.Contains(i.Image, tag)
			}) ||
			t.Now().After(end) || sleep(ctx, 500*time.Millisecond) != nil {
			return l, err
		}
	}
}
