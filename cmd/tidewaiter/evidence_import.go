package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/config/stage"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify/archive"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

type importOptions struct {
	configDir, stateDir, runDir, name, output string
	trust, force, replace                     bool
	accept                                    string // digest of the trust that was looked at
}

func evidenceImport(stdin io.Reader, stdout io.Writer) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import FILE|DIR|-",
		Short: "Copy the signatures in an evidence archive to the state directory",
		Long: `Check an evidence archive, or another OCI image layout with signatures, and
copy its evidence (manifests, signatures, other referrers, and no layers) to archives
in the state directory, in the place of the archive that had its name. A gate that runs
notices. It refuses what is damaged, and unless --force what holds no signature that
verifies under the configuration, or of which the gate would not read all. Of
signatures that verify under no statement it takes 16 of each image.

It compares with the archive that had its name, and refuses if a signature would go
that an image on this node may need, or if the gate does not answer, unless --replace.

With --trust it also puts the archive's trust policy and trust store in the place of
this node's: it prints them with a digest, what would change, and which images of this
node the gate would answer otherwise, and changes it where --accept names this digest.
It refuses if an image that is allowed now would not be, or if the gate does not answer,
unless --replace. What was before is kept beside the configuration directory.

Exit status: 0 imported, 1 refused, or --accept is missing, 2 it could not be done.`,
		Example: `  tidewaiter evidence import site.tar
  tidewaiter evidence import --trust site.tar
  tidewaiter evidence import --trust --accept sha256:... site.tar`,
		Args: exactly("FILE or DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cli.CheckOutput(o.output); err != nil {
				return err
			}
			return importArchive(cmd.Context(), stdin, stdout, o, args[0])
		},
	}
	cli.ConfigDir(cmd, &o.configDir)
	cli.StateDir(cmd, &o.stateDir)
	cli.RunDir(cmd, &o.runDir)
	cli.Output(cmd, &o.output)
	cmd.Flags().BoolVar(&o.replace, "replace", false, "replace an evidence archive, or with --trust what is trusted, though an image on this node may need it")
	cmd.Flags().StringVar(&o.name, "name", "", "`NAME` of the evidence archive on this node (default: from the name of the file)")
	cmd.Flags().BoolVar(&o.trust, "trust", false, "put trust policy and trust store of the evidence archive in force")
	cmd.Flags().StringVar(&o.accept, "accept", "", "with --trust: the `DIGEST` of the trust that was looked at, to put that in force and no other")
	cmd.Flags().BoolVar(&o.force, "force", false, "import an evidence archive although no signature in it verifies, or the gate would not read all of it")
	return cmd
}

func importArchive(ctx context.Context, stdin io.Reader, stdout io.Writer, o importOptions, file string) error {
	if o.stateDir == "" {
		return cli.Inconclusive(errors.New("--state-dir is empty: there is nowhere to import to"), "")
	}
	if o.accept != "" && !o.trust {
		return cli.Inconclusive(errors.New("--accept is for --trust"), "")
	}
	name, err := o.name, error(nil)
	if name == "" {
		name, err = archive.NameOf(file)
	} else {
		err = archive.CheckName(name)
	}
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	j, trust, err := ofNode(o.configDir)
	if err != nil && !o.trust { // with --trust, the archive may be what mends it
		return err
	}
	importer, err := archive.OpenImporter(ctx, o.stateDir)
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	defer importer.Close()
	c, err := archive.Open(ctx, file, stdin, importer.Dir())
	if err != nil {
		return cli.Inconclusive(fmt.Errorf("%s: %w", text.Clean(file, 300), err), "")
	}
	defer c.Close()
	var staged *stage.Stage
	var next *config.Config // with the trust of the archive
	if o.trust {
		files, _, err := c.Trust()
		hint := ""
		if err == nil && files == nil {
			err, hint = errors.New("the evidence archive has no trust policy"), "evidence export --trust puts one into an evidence archive"
		}
		if err == nil {
			staged, err = stage.Trust(o.configDir, files)
		}
		if err == nil {
			defer staged.Discard()
			if next, err = staged.Load(); err != nil {
				err = fmt.Errorf("%w: with its trust the configuration would be invalid: %w", archive.ErrRefused, err)
			}
		}
		if err == nil {
			j, err = inspect.Evaluator(next)
		}
		if err != nil {
			return cli.Inconclusive(fmt.Errorf("%s: %w", text.Clean(file, 300), err), hint)
		}
	}
	r, err := c.Inspect(ctx, file, j, trust)
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	if staged != nil && r.Trust != nil {
		now, err := config.Load(o.configDir)
		if err != nil {
			now = &config.Config{} // all that the new one warns of is new
		}
		r.Trust.Warn(warnings(next), warnings(now))
		if trust != nil && r.Trust.Changed {
			ask(ctx, c, r, o, next)
		}
	}
	outcome := &archive.Outcome{}
	r.Outcome = outcome
	refused := ""
	alone := staged != nil && r.Signatures == 0 // trust and nothing else
	switch {
	case len(r.Problems) > 0:
		refused = "it is damaged"
	case j == nil && !o.force:
		refused = "there is no configuration in " + o.configDir + " under which a signature could verify (--force imports it all the same)"
	case r.Verified == 0 && !o.force && !alone:
		refused = "no signature in it verifies under " + r.Policy + " (--force imports it all the same)"
	case staged != nil && o.accept == "":
		refused = "--trust changes what this node trusts: look at what is above, and add --accept " + r.Trust.Digest
	case staged != nil && o.accept != r.Trust.Digest:
		refused = "its trust is " + r.Trust.Digest + ", and not the one that --accept names"
	case staged != nil && !o.replace && r.Trust.Costs() != "":
		refused = r.Trust.Costs() + " (--replace puts it in force all the same)"
	}
	if refused == "" && !alone {
		if refused, err = fits(ctx, importer, c, r, o, name); err != nil {
			return cli.Inconclusive(err, "")
		}
	}
	outcome.Refused = refused
	if refused != "" {
		return show(stdout, o.output, r, true)
	}
	if !alone {
		if r.Outcome.File, err = importer.Save(ctx, c, r, name); err != nil {
			return cli.Inconclusive(err, "")
		}
	}
	if staged != nil {
		if r.Outcome.Backup, err = staged.Swap(time.Now()); err != nil {
			if r.Outcome.File != "" {
				err = fmt.Errorf("%w (the signatures are in %s)", err, r.Outcome.File)
			}
			return cli.Inconclusive(err, "")
		}
		r.Outcome.Trust = next.Dir
	}
	return show(stdout, o.output, r, false)
}

// ask notes which of the images that the gate has it would answer otherwise with next, the
// configuration with the trust of c, and with the evidence in c.
func ask(ctx context.Context, c *archive.Contents, r *archive.Report, o importOptions, next *config.Config) {
	l, err := control.AskImages(ctx, o.runDir)
	if err != nil {
		r.Trust.Unknown = text.Clean(err.Error(), 300)
		return
	}
	r.Trust.Answers, r.Trust.Unknown = inspect.Changes(ctx, l, next, c.Path(), o.stateDir)
}

// warnings are those of a configuration.
func warnings(c *config.Config) (list []string) {
	for _, w := range c.Warnings {
		list = append(list, w.String())
	}
	return list
}

// fits returns why an import would cost evidence, of this or another archive, and is not
// done unasked.
func fits(ctx context.Context, importer *archive.Importer, c *archive.Contents, r *archive.Report, o importOptions, name string) (refused string, err error) {
	p, err := importer.Replaces(ctx, c, r, name)
	if err != nil {
		return "", err
	}
	if r.Outcome.Replaces = p; p != nil && p.Gone > 0 {
		if l, err := control.AskImages(ctx, o.runDir); err != nil {
			p.Unknown = text.Clean(err.Error(), 300)
		} else if i := slices.IndexFunc(l.List, func(i control.Image) bool { return p.Concerns(i.Target, i.Manifest, i.Config) }); i >= 0 {
			p.Needed = text.Clean(l.List[i].Image, 300)
		}
	}
	if p != nil && !o.replace {
		if why := p.Refused(); why != "" {
			return why + " (--replace replaces it all the same)", nil
		}
	}
	if o.force {
		return "", nil
	}
	trouble, err := importer.Fits(ctx, c, r, name, time.Now)
	if err != nil {
		return fmt.Sprintf("it could not be found out whether the gate would read all evidence archives with it: %s (--force imports it all the same)", text.Clean(err.Error(), 300)), nil
	}
	if len(trouble) > 0 {
		return fmt.Sprintf("the gate would not read all evidence archives with it: %s (--force imports it all the same)", strings.Join(trouble, "; ")), nil
	}
	return "", nil
}
