package inspect

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/archive"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// ChangesTime is how long Changes may take.
const ChangesTime = 5 * time.Minute

// Changes judges the images of a list, which a gate has answered, by another configuration
// with the layout at path, and with what the node keeps in stateDir. It returns those to
// which the answer is another there. Those that are allowed now come first. What no
// signature decides, such as a digest that is listed, is passed over. unknown says why
// some were not judged; empty: all were.
func Changes(ctx context.Context, l control.Images, next *config.Config, path, stateDir string) (changed []archive.Change, unknown string) {
	at, err := filepath.Abs(path)
	var j *Offline
	if err == nil {
		with := *next
		with.Layouts = append([]string{at}, next.Layouts...)
		j, err = NewOffline(ctx, &with, stateDir)
	}
	if err != nil {
		return nil, text.Clean(err.Error(), 300)
	}
	defer j.Close()
	ctx, cancel := context.WithTimeout(ctx, ChangesTime)
	defer cancel()
	left := 0
	for _, allowed := range []bool{true, false} {
		for _, i := range l.List {
			now := verify.Reason(i.Reason)
			if (now == verify.Verified) != allowed || i.NotImage || now == verify.AllowedByDigest {
				continue
			}
			name, err := policy.ParseName(i.Image)
			if err != nil || i.Target == "" {
				left++
				continue
			}
			if ctx.Err() != nil {
				left++
				continue
			}
			name.Digest = digest.Digest(i.Target)
			one, end := context.WithTimeout(ctx, Longest)
			d, _ := j.Judge(one, name, i.Image, "")
			end()
			switch {
			case d.Reason == now:
			case ctx.Err() != nil && d.Reason.Inconclusive():
				left++
			case allowed || d.Reason == verify.Verified:
				changed = append(changed, archive.Change{Image: text.Clean(i.Image, 300), Target: i.Target, Now: now, Then: d.Reason, Detail: text.Clean(d.Detail, 300)})
			}
		}
	}
	switch {
	case left > 0:
		unknown = fmt.Sprintf("%d of the images could not be judged", left)
	case l.More:
		unknown = "the gate has more images than it lists"
	}
	return changed, unknown
}
