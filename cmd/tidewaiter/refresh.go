package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/nri/node"
	"github.com/tidewaiter/tidewaiter/verify"
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
			k := &newcomers{Store: s}
			again := *engine
			again.Store = k
			_, tried := again.Refresh(ctx, q)
			return k.n, tried
		}}
}

// newcomers is the store, for one image, and counts the signatures that it had not.
type newcomers struct {
	*store.Store
	n int
}

// Keep implements verify.Keeper.
func (k *newcomers) Keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	had := k.Has(ev.Manifest.Digest)
	k.Store.Keep(img, subject, ev)
	if !had && k.Has(ev.Manifest.Digest) {
		k.n++
	}
}
