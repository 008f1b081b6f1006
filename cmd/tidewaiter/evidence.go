package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify/archive"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func evidenceCommand(stdin io.Reader, stdout, stderr io.Writer) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "evidence",
		Short: "Carry signatures to a node that has no registry",
		Args:  verbs,
		RunE: func(*cobra.Command, []string) error {
			return cli.Inconclusive(errors.New("evidence does nothing by itself"), "run tidewaiter evidence --help")
		},
	}
	cmd.AddCommand(evidenceExport(stdout, stderr), evidenceInspect(stdin, stdout), evidenceImport(stdin, stdout), evidenceList(stdout), evidenceRemove(stdout))
	return cmd
}

// exactly wants one argument.
func exactly(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return cli.Inconclusive(fmt.Errorf("%d arguments, not one %s", len(args), what), "run tidewaiter evidence --help")
		}
		return nil
	}
}

type exportOptions struct {
	sources   verifyOptions // configDir, layouts and mirrors
	to        string
	file      string
	platforms []string
	referrers string
	missing   bool
	trust     bool
}

func evidenceExport(stdout, stderr io.Writer) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use:   "export IMAGE...",
		Short: "Gather the signatures of images into one file or directory",
		Long: `Gather what a node needs to verify images into one OCI image layout: their
manifests and indexes, and the Notary Project signatures of these: all of them, or with
a configuration those that verify under it and 16 others of each. It is for the
workstation of an operator. A tag is resolved at the registry, and the digest that
it names then is printed: look at it.

The images themselves (configs and layers) are not in it; oras cp -r and ctr images
export carry those, and what they write can be imported too. Of other referrers,
such as SBOMs, a node uses nothing today: --referrers all takes them along.

The registries asked are those of the configuration with its credentials; --mirror
and --layout name others instead, and without a configuration it is the image's own.
Where one redirects the request for a signature to another public host, as nearly all
public registries do, it is fetched there: --redirect names the hosts, or none.
The same images give the same bytes. Exit status: 0 written, 2 not.`,
		Example: `  tidewaiter evidence export -o site.tar registry.example/app:1.2 registry.example/db@sha256:...
  tidewaiter evidence export --trust --platform linux/arm64 --from-file images.txt -o /media/usb/site`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return export(cmd.Context(), stdout, stderr, o, args) },
	}
	cli.ConfigDir(cmd, &o.sources.configDir)
	// Everything is checked by its digest, nothing is at stake here but this look, and
	// public registries have their blobs wherever they like.
	sourceFlags(cmd, &o.sources, "*")
	cmd.Flags().StringVarP(&o.to, "to", "o", "", "`PATH` to write: a tar file if it ends in .tar, - for standard output, else a new directory")
	cmd.Flags().StringVar(&o.file, "from-file", "", "`LIST` of further images, one a line, # begins a comment")
	cmd.Flags().StringArrayVar(&o.platforms, "platform", nil, "`OS/ARCH` of the manifests to take from an index, instead of all; may be given several times")
	cmd.Flags().StringVar(&o.referrers, "referrers", "signatures", "`WHICH` referrers to take: signatures or all")
	cmd.Flags().BoolVar(&o.missing, "allow-missing", false, "say what is not there, an image's signature too, and do without it")
	cmd.Flags().BoolVar(&o.trust, "trust", false, "put trust policy and trust store of the configuration into it")
	return cmd
}

func export(ctx context.Context, stdout, stderr io.Writer, o exportOptions, images []string) error {
	if o.to == "" {
		return cli.Inconclusive(errors.New("nothing says where to write it"), "for example -o site.tar")
	}
	if o.referrers != "signatures" && o.referrers != "all" {
		return cli.Inconclusive(fmt.Errorf("--referrers: %q is neither signatures nor all", o.referrers), "")
	}
	if o.file != "" {
		list, err := inspect.ReadList(o.file)
		if err != nil {
			return cli.Inconclusive(fmt.Errorf("--from-file: %w", err), "")
		}
		for _, l := range list {
			images = append(images, l.Text)
		}
	}
	if len(images) == 0 && !o.trust {
		return cli.Inconclusive(errors.New("no image is named"), "for example tidewaiter evidence export -o site.tar registry.example/app:1.2")
	}
	c, err := config.Load(o.sources.configDir)
	if errors.Is(err, config.ErrNone) && !o.trust {
		c, err = &config.Config{}, nil
	}
	if err != nil {
		return cli.Inconclusive(err, "correct it, or name another directory with --config-dir")
	}
	if err := o.sources.listed(c); err != nil {
		return err
	}
	b := archive.Options{Layouts: c.Layouts, Sources: c.Sources(), Aliases: c.Aliases, All: o.referrers == "all", Missing: o.missing}
	if b.Platform, err = inspect.Platforms(o.platforms); err != nil {
		return cli.Inconclusive(err, "")
	}
	if o.trust {
		if b.Trust, err = config.Trust(c.Dir); err != nil {
			return cli.Inconclusive(err, "")
		}
	}
	if c.Dir != "" {
		if b.Evaluator, err = inspect.Evaluator(c); err != nil {
			return cli.Inconclusive(err, "")
		}
	}
	l, gathered, err := archive.Export(ctx, images, b)
	if err != nil {
		return cli.Inconclusive(err, "--allow-missing does without what is not there")
	}
	if o.to == "-" {
		if err := l.Tar(stdout); err != nil {
			return cli.Inconclusive(fmt.Errorf("write the evidence archive: %w", err), "")
		}
		stdout = prefixed{stderr}
	} else if err := l.Write(o.to); err != nil {
		return cli.Inconclusive(err, "")
	}
	for _, g := range gathered {
		fmt.Fprintf(stdout, "%s: manifests %d, signatures %d, other referrers %d\n", text.Clean(g.Name, 400), g.Manifests, g.Signatures, g.Referrers)
		if g.LeftOut > 0 {
			fmt.Fprintf(stdout, "  left out: %d signatures that verify under no statement of %s\n", g.LeftOut, text.Clean(c.Dir, 300))
		}
		for _, m := range g.Missing {
			fmt.Fprintf(stdout, "  missing: %s\n", m)
		}
	}
	if o.trust {
		fmt.Fprintf(stdout, "trust: %d files of %s\n", len(b.Trust), c.Dir)
	}
	return nil
}

// prefixed is standard error for what is said beside an answer.
type prefixed struct{ io.Writer }

func (p prefixed) Write(b []byte) (int, error) {
	if _, err := p.Writer.Write(append([]byte("tidewaiter: "), b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

func evidenceInspect(stdin io.Reader, stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "inspect FILE|DIR|-",
		Short: "Show what is in an evidence archive, or in another OCI image layout",
		Long: `Show the images in an OCI image layout, their signatures and whether they
verify under the configuration, other referrers, and trust policy and trust store
against those of this node. It reads a directory, a tar file, also one packed with
gzip or zstd, or with - a tar file from standard input; it needs no network and
writes nothing but temporary files. The answer to an image is what the gate would
give with what import takes over, and no other source. An index is VERIFIED only if
a manifest of it is, none that is there is refused, and the one for this node's
platform, if it lists one, is not missing.

Exit status: 0 no image that it names would be refused, 1 one would be, or something
in it is damaged, 2 it could not be read.`,
		Args: exactly("FILE or DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			j, trust, err := ofNode(dir)
			if err != nil {
				return err
			}
			c, err := archive.Open(cmd.Context(), args[0], stdin, "")
			if err != nil {
				return cli.Inconclusive(fmt.Errorf("%s: %w", text.Clean(args[0], 300), err), "")
			}
			defer c.Close()
			r, err := c.Inspect(cmd.Context(), args[0], j, trust)
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			return show(stdout, output, r, len(r.Problems) > 0 || r.Refused())
		},
	}
	cli.ConfigDir(cmd, &dir)
	cli.Output(cmd, &output)
	return cmd
}

// show prints a report; the exit status says whether it is bad.
func show(stdout io.Writer, output string, r *archive.Report, bad bool) error {
	write := r.Text
	if output == "json" {
		write = r.JSON
	}
	if err := write(stdout); err != nil {
		return cli.Inconclusive(fmt.Errorf("write the answer: %w", err), "")
	}
	if bad {
		return cli.Exit(cli.ExitNo)
	}
	return nil
}

// ofNode is the policy and the trust of the configuration in dir; nil if there is none.
func ofNode(dir string) (*archive.Evaluator, map[string][]byte, error) {
	c, err := config.Load(dir)
	if errors.Is(err, config.ErrNone) {
		return nil, nil, nil
	}
	var j *archive.Evaluator
	var trust map[string][]byte
	if err == nil {
		j, err = inspect.Evaluator(c)
	}
	if err == nil {
		trust, err = config.Trust(dir)
	}
	if err != nil {
		return nil, nil, cli.Inconclusive(err, "correct it, or name another directory with --config-dir")
	}
	return j, trust, nil
}

func evidenceList(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the evidence archives in the state directory",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			list, err := archive.List(dir)
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			if output == "json" {
				err = json.NewEncoder(stdout).Encode(struct {
					Archives []archive.Entry `json:"archives"`
				}{list})
			} else {
				if len(list) == 0 {
					_, err = fmt.Fprintf(stdout, "no evidence archive in %s\n", text.Clean(filepath.Join(dir, "archives"), 300))
				}
				const row = "%-10s  %12s  %-20s  %s\n"
				for i, b := range list {
					if i == 0 {
						_, err = fmt.Fprintf(stdout, row, "FORM", "BYTES", "SINCE", "NAME")
					}
					if err == nil {
						_, err = fmt.Fprintf(stdout, row, b.Form, fmt.Sprint(b.Size), b.Time.UTC().Format(time.RFC3339), text.Clean(b.Name, 110))
					}
				}
			}
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			return nil
		},
	}
	cli.StateDir(cmd, &dir)
	cli.Output(cmd, &output)
	return cmd
}

func evidenceRemove(stdout io.Writer) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove an evidence archive from the state directory",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			importer, err := archive.OpenImporter(cmd.Context(), dir)
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			defer importer.Close()
			if err := importer.Remove(args[0]); errors.Is(err, fs.ErrNotExist) {
				return cli.Inconclusive(err, "tidewaiter evidence list says what there is")
			} else if err != nil {
				return cli.Inconclusive(err, "")
			}
			_, err = fmt.Fprintf(stdout, "removed %s\n", text.Clean(args[0], 110))
			return err
		},
	}
	cli.StateDir(cmd, &dir)
	return cmd
}
