package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/nri/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/notary"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

func refreshCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "refresh [IMAGE...]",
		Short: "Look for new signatures of the node's images now",
		Long: `Refresh has the gate that runs on this node ask its sources for all signatures of
these images, or without any of all images of the node, and keep those that meet the
policy in force and that it did not have. Nothing that is kept goes. It waits for the
end, which takes a while where there are many images: mirrors are asked at a
moderate pace.

An IMAGE is a name as pods say it; the node must have the image. Exit status 0: all
sources answered, whether there was something new or not; 1: a source failed; 2: the
gate could not be asked, or there is no such image.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			list := []control.Refreshed{}
			var printed error
			sum, err := control.AskRefresh(cmd.Context(), dir, args, func(one control.Refreshed) {
				if output == "json" {
					list = append(list, one)
				} else if printed == nil {
					_, printed = io.WriteString(stdout, refreshed(one))
				}
			})
			if err != nil {
				return unknown(err, "is tidewaiter run running, with --run-dir "+dir+"? tidewaiter status says how it is; only root may ask")
			}
			if output == "json" {
				printed = json.NewEncoder(stdout).Encode(struct {
					Schema string              `json:"schema"`
					Images []control.Refreshed `json:"images"`
					New    int                 `json:"new"`
					Failed int                 `json:"failed"`
				}{control.RefreshSchema, list, sum.New, sum.Failed})
			} else if printed == nil {
				_, printed = fmt.Fprintf(stdout, "%s, %s, %d failed\n", several(sum.Images, "image"), several(sum.New, "new signature"), sum.Failed)
			}
			if printed != nil {
				return unknown(printed, "")
			}
			if sum.Failed > 0 {
				return &failure{status: exitNo}
			}
			return nil
		},
	}
	runDir(cmd, &dir)
	outputFlag(cmd, &output)
	return cmd
}

// refreshed is one line for a person.
func refreshed(one control.Refreshed) string {
	var b strings.Builder
	b.WriteString(verify.Clean(one.Image, 512) + ": ")
	switch {
	case one.Skipped != "":
		fmt.Fprintf(&b, "not asked about [%s] %s", verify.Clean(one.Skipped, 32), verify.Clean(one.Detail, 300))
	case one.Failed:
		fmt.Fprintf(&b, "FAILED, %s", several(one.New, "new signature"))
	default:
		b.WriteString(several(one.New, "new signature"))
	}
	for _, a := range one.Tried {
		fmt.Fprintf(&b, "; %s: [%s] of %s", verify.Clean(a.Source, 300), verify.Clean(a.Reason.String(), 32), several(a.Seen, "signature"))
		if a.Reason != verify.Verified && a.Detail != "" {
			b.WriteString(": " + verify.Clean(a.Detail, 300))
		}
	}
	return b.String() + "\n"
}

// several counts things.
func several(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// refresh answers POST /v1/refresh.
func (d *daemon) refresh(ctx context.Context, images []string, yield func(control.Refreshed) error) error {
	if d.refresher == nil {
		return &control.Refusal{Status: http.StatusServiceUnavailable, Err: errors.New("this gate keeps no signatures (--state-dir is empty), so that there is nothing to add to")}
	}
	var names []verify.Name
	for _, s := range images {
		n, err := policy.ParseName(s)
		if err != nil {
			return &control.Refusal{Status: http.StatusBadRequest, Err: fmt.Errorf("%s: %w", verify.Quote(s, 200), err)}
		}
		if n.Tag == "" && n.Digest == "" {
			n.Tag = "latest" // as the runtime reads it
		}
		names = append(names, n)
	}
	err := d.refresher.Refresh(ctx, names, func(r node.Refreshed) error {
		one := control.Refreshed{
			Image: verify.Clean(r.Name.String(), 512), Target: r.Target.String(), New: r.Fresh,
			Failed: r.Failed() != nil, Tried: append([]verify.Attempt{}, r.Tried...),
		}
		if r.Name.Digest == "" {
			one.Image += "@" + one.Target
		}
		if r.Skipped != nil {
			one.Skipped, one.Detail = r.Skipped.Reason.String(), verify.Clean(r.Skipped.Detail, verify.MaxMessage)
		}
		return yield(one)
	})
	switch {
	case errors.Is(err, node.ErrNoImage):
		return &control.Refusal{Status: http.StatusNotFound, Err: err}
	case errors.Is(err, node.ErrRefreshing):
		return &control.Refusal{Status: http.StatusConflict, Err: err}
	}
	return err
}

// plan is what a configuration says about looking for signatures again.
func plan(c *config.Config, setup *verify.Setup, engine *verify.Engine, s *store.Store) *node.RefreshPlan {
	return &node.RefreshPlan{Setup: setup, Sources: engine.Sources, Every: c.Refresh,
		Ask: func(ctx context.Context, q verify.Question) (int, []verify.Attempt) {
			k := &newcomers{Store: s, Checker: engine.Checker, ctx: ctx, in: q.Image.Name, statement: q.Rule.Statement, limits: engine.Limits,
				looked: map[digest.Digest]bool{}, worths: map[digest.Digest]worth{}}
			again := *engine
			again.Store, again.Checker = k, watched{k}
			_, tried := again.Refresh(ctx, q)
			return k.n, tried
		}}
}

// alike is how many signatures of an image are kept that are worth the same.
const alike = 2

// A worth is what a signature that meets the rule is good for. Whoever has one can make
// any number of it that do, with other annotations in the manifest or more spaces in the
// envelope, and a mirror could fill the store with them. But they are by the same
// certificate, reach the same root and end at the same time.
type worth struct {
	subject digest.Digest
	signer  verify.Signer
	until   time.Time // zero: it does not end
}

// newcomers is the store, for one image, and counts the signatures that it had not. It
// takes few of those that are worth the same. It is not safe for concurrent use.
type newcomers struct {
	*store.Store
	verify.Checker
	ctx       context.Context
	in        verify.Name
	statement string
	limits    verify.Limits
	n         int
	looked    map[digest.Digest]bool  // subjects of which worths has what the store has
	worths    map[digest.Digest]worth // by the manifest of the signature
}

// Keep implements verify.Keeper.
func (k *newcomers) Keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	if k.Has(ev.Manifest.Digest) {
		return
	}
	if !k.looked[subject.Digest] {
		k.looked[subject.Digest] = true
		_ = k.Find(k.ctx, k.in, subject, verify.NewBudget(k.limits), func(ev verify.Evidence) bool {
			k.weigh(ev, subject)
			return true
		})
	}
	same := 0
	for manifest, w := range k.worths {
		if w == k.worths[ev.Manifest.Digest] && k.Has(manifest) {
			same++
		}
	}
	if same >= alike {
		return
	}
	k.Store.Keep(img, subject, ev)
	if k.Has(ev.Manifest.Digest) {
		k.n++
	}
}

// weigh notes what a signature that the store has is worth, if it meets the rule. A
// panic in a parser costs only that.
func (k *newcomers) weigh(ev verify.Evidence, subject ocispec.Descriptor) {
	defer func() { _ = recover() }()
	if ev.Err == nil {
		_ = watched{k}.Check(k.ctx, ev, subject, k.statement)
	}
}

// watched is the Checker of newcomers, and notes what signatures are worth.
type watched struct{ *newcomers }

// Check implements verify.Checker.
func (k watched) Check(ctx context.Context, ev verify.Evidence, want ocispec.Descriptor, statement string) verify.Finding {
	f := k.Checker.Check(ctx, ev, want, statement)
	if f.Reason == verify.Verified {
		w := worth{want.Digest, f.Signer, f.Until.UTC()}
		if f.Ends == notary.EndsNothing {
			w.until = time.Time{}
		}
		k.worths[ev.Manifest.Digest] = w
	}
	return f
}
