package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/bundle"
	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/verify"
)

func bundleCommand(stdin io.Reader, stdout, stderr io.Writer) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Carry signatures to a node that has no registry",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return unknown(errors.New("bundle does nothing by itself"), "run tidewaiter bundle --help")
		},
	}
	cmd.AddCommand(bundleCreate(stdout, stderr), bundleInspect(stdin, stdout), bundleImport(stdin, stdout), bundleList(stdout), bundleRemove(stdout))
	return cmd
}

// exactly wants one argument.
func exactly(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return unknown(fmt.Errorf("%d arguments, not one %s", len(args), what), "run tidewaiter bundle --help")
		}
		return nil
	}
}

type createOptions struct {
	sources   verifyOptions // configDir, layouts and mirrors
	to        string
	file      string
	platforms []string
	referrers string
	missing   bool
	trust     bool
}

func bundleCreate(stdout, stderr io.Writer) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use:   "create IMAGE...",
		Short: "Gather the signatures of images into one file or directory",
		Long: `Create gathers what a node needs to verify images into one OCI image layout: their
manifests and indexes, and all Notary Project signatures of these. It is for the
workstation of an operator. A tag is resolved at the registry, and the digest that
it names then is printed: look at it.

The images themselves (configs and layers) are not in it; oras cp -r and ctr images
export carry those, and what they write can be imported too. Of other referrers,
such as SBOMs, a node uses nothing today: --referrers all takes them along.

The registries asked are those of the configuration with its credentials; --mirror
and --layout name others instead, and without a configuration it is the image's own.
Where one redirects the request for a signature to another public host, as nearly all
public registries do, it is fetched there: --redirects names the hosts, or none.
The same images give the same bytes. Exit status: 0 written, 2 not.`,
		Example: `  tidewaiter bundle create -o site.tar registry.example/app:1.2 registry.example/db@sha256:...
  tidewaiter bundle create --trust --platform linux/arm64 --file images.txt -o /media/usb/site`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error { return create(cmd.Context(), stdout, stderr, o, args) },
	}
	configDir(cmd, &o.sources.configDir)
	// Everything is checked by its digest, nothing is at stake here but this look, and
	// public registries have their blobs wherever they like.
	sourceFlags(cmd, &o.sources, "*")
	cmd.Flags().StringVarP(&o.to, "to", "o", "", "`PATH` to write: a tar file if it ends in .tar, - for standard output, else a new directory")
	cmd.Flags().StringVar(&o.file, "file", "", "`LIST` of further images, one a line, # begins a comment")
	cmd.Flags().StringArrayVar(&o.platforms, "platform", nil, "`OS/ARCH` of the manifests to take from an index, instead of all; may be given several times")
	cmd.Flags().StringVar(&o.referrers, "referrers", "signatures", "`WHICH` referrers to take: signatures or all")
	cmd.Flags().BoolVar(&o.missing, "allow-missing", false, "say what is not there, an image's signature too, and do without it")
	cmd.Flags().BoolVar(&o.trust, "trust", false, "put trust policy and trust store of the configuration into it")
	return cmd
}

func create(ctx context.Context, stdout, stderr io.Writer, o createOptions, images []string) error {
	if o.to == "" {
		return unknown(errors.New("nothing says where to write it"), "for example -o site.tar")
	}
	if o.referrers != "signatures" && o.referrers != "all" {
		return unknown(fmt.Errorf("--referrers: %q is neither signatures nor all", o.referrers), "")
	}
	if o.file != "" {
		more, err := readList(o.file)
		if err != nil {
			return unknown(fmt.Errorf("--file: %w", err), "")
		}
		images = append(images, more...)
	}
	if len(images) == 0 && !o.trust {
		return unknown(errors.New("no image is named"), "for example tidewaiter bundle create -o site.tar registry.example/app:1.2")
	}
	c, err := config.Load(o.sources.configDir)
	if errors.Is(err, config.ErrNone) && !o.trust {
		c, err = &config.Config{}, nil
	}
	if err != nil {
		return unknown(err, "correct it, or name another directory with --config-dir")
	}
	if err := o.sources.listed(c); err != nil {
		return err
	}
	b := bundle.Options{Config: c, Platforms: o.platforms, All: o.referrers == "all", Missing: o.missing}
	if o.trust {
		if b.Trust, err = config.Trust(c.Dir); err != nil {
			return unknown(err, "")
		}
	}
	l, gathered, err := bundle.Create(ctx, images, b)
	if err != nil {
		return unknown(err, "--allow-missing does without what is not there")
	}
	if o.to == "-" {
		if err := l.Tar(stdout); err != nil {
			return unknown(fmt.Errorf("write the bundle: %w", err), "")
		}
		stdout = prefixed{stderr}
	} else if err := l.Write(o.to); err != nil {
		return unknown(err, "")
	}
	for _, g := range gathered {
		fmt.Fprintf(stdout, "%s: manifests %d, signatures %d, other referrers %d\n", verify.Clean(g.Name, 400), g.Manifests, g.Signatures, g.Referrers)
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

// readList reads a file of images, at most 1 MiB.
func readList(name string) (images []string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if line = strings.TrimSpace(line); line != "" {
			images = append(images, line)
		}
	}
	return images, lines.Err()
}

func bundleInspect(stdin io.Reader, stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "inspect FILE|DIR|-",
		Short: "Show what is in a bundle, or in another OCI image layout",
		Long: `Inspect shows the images in an OCI image layout, their signatures and whether they
verify under the configuration, other referrers, and trust policy and trust store
against those of this node. It reads a directory, a tar file, also one packed with
gzip or zstd, or with - a tar file from standard input; it needs no network and
writes nothing but temporary files.

Exit status: 0 it was read, 1 something in it is damaged, 2 it could not be read.`,
		Args: exactly("FILE or DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			j, trust, err := ofNode(dir)
			if err != nil {
				return err
			}
			c, err := bundle.Open(cmd.Context(), args[0], stdin, "")
			if err != nil {
				return unknown(fmt.Errorf("%s: %w", verify.Clean(args[0], 300), err), "")
			}
			defer c.Close()
			r, err := c.Inspect(cmd.Context(), args[0], j, trust)
			if err != nil {
				return unknown(err, "")
			}
			return show(stdout, output, r, len(r.Problems) > 0)
		},
	}
	configDir(cmd, &dir)
	outputFlag(cmd, &output)
	return cmd
}

// show prints a report; the exit status says whether it is bad.
func show(stdout io.Writer, output string, r *bundle.Report, bad bool) error {
	write := r.Text
	if output == "json" {
		write = r.JSON
	}
	if err := write(stdout); err != nil {
		return unknown(fmt.Errorf("write the answer: %w", err), "")
	}
	if bad {
		return &failure{status: exitNo}
	}
	return nil
}

// ofNode is the policy and the trust of the configuration in dir; nil if there is none.
func ofNode(dir string) (*bundle.Judge, map[string][]byte, error) {
	c, err := config.Load(dir)
	if errors.Is(err, config.ErrNone) {
		return nil, nil, nil
	}
	var j *bundle.Judge
	var trust map[string][]byte
	if err == nil {
		j, err = bundle.NewJudge(c, time.Now)
	}
	if err == nil {
		trust, err = config.Trust(dir)
	}
	if err != nil {
		return nil, nil, unknown(err, "correct it, or name another directory with --config-dir")
	}
	return j, trust, nil
}

type importOptions struct {
	configDir, stateDir, name, output string
	trust, force                      bool
	accept                            string // digest of the trust that was looked at
}

func bundleImport(stdin io.Reader, stdout io.Writer) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import FILE|DIR|-",
		Short: "Take the signatures in a bundle over into the state directory",
		Long: `Import checks a bundle, or another OCI image layout with signatures, and copies its
evidence (manifests, signatures, other referrers, and no layers) to bundles in the
state directory, in the place of the bundle that had its name. A gate that runs
notices. It refuses what is damaged, and with no signature that verifies under the
configuration, unless --force.

With --trust it also puts the bundle's trust policy and trust store in the place of
this node's: it prints them with a digest and what would change, and changes it where
--accept names this digest. What was before is kept beside the configuration directory.

Exit status: 0 imported, 1 refused, or --accept is missing, 2 it could not be done.`,
		Example: `  tidewaiter bundle import site.tar
  tidewaiter bundle import --trust site.tar
  tidewaiter bundle import --trust --accept sha256:... site.tar`,
		Args: exactly("FILE or DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(o.output); err != nil {
				return err
			}
			return importBundle(cmd.Context(), stdin, stdout, o, args[0])
		},
	}
	configDir(cmd, &o.configDir)
	stateDir(cmd, &o.stateDir)
	outputFlag(cmd, &o.output)
	cmd.Flags().StringVar(&o.name, "name", "", "`NAME` of the bundle on this node (default: from the name of the file)")
	cmd.Flags().BoolVar(&o.trust, "trust", false, "put trust policy and trust store of the bundle in force")
	cmd.Flags().StringVar(&o.accept, "accept", "", "with --trust: the `DIGEST` of the trust that was looked at, to put that in force and no other")
	cmd.Flags().BoolVar(&o.force, "force", false, "import a bundle although no signature in it verifies")
	return cmd
}

func importBundle(ctx context.Context, stdin io.Reader, stdout io.Writer, o importOptions, file string) error {
	if o.stateDir == "" {
		return unknown(errors.New("--state-dir is empty: there is nowhere to import to"), "")
	}
	if o.accept != "" && !o.trust {
		return unknown(errors.New("--accept is for --trust"), "")
	}
	name, err := o.name, error(nil)
	if name == "" {
		name, err = bundle.NameOf(file)
	} else {
		err = bundle.CheckName(name)
	}
	if err != nil {
		return unknown(err, "")
	}
	j, trust, err := ofNode(o.configDir)
	if err != nil && !o.trust { // with --trust, the bundle may be what mends it
		return err
	}
	shelf, err := bundle.OpenShelf(ctx, o.stateDir)
	if err != nil {
		return unknown(err, "")
	}
	defer shelf.Close()
	c, err := bundle.Open(ctx, file, stdin, shelf.Dir())
	if err != nil {
		return unknown(fmt.Errorf("%s: %w", verify.Clean(file, 300), err), "")
	}
	defer c.Close()
	var staged *bundle.Staged
	if o.trust {
		files, _, err := c.Trust()
		hint := ""
		if err == nil && files == nil {
			err, hint = errors.New("the bundle has no trust policy"), "bundle create --trust puts one into a bundle"
		}
		if err == nil {
			staged, err = bundle.Stage(o.configDir, files)
		}
		if err == nil {
			defer staged.Discard()
			j, err = bundle.NewJudge(staged.Config, time.Now)
		}
		if err != nil {
			return unknown(fmt.Errorf("%s: %w", verify.Clean(file, 300), err), hint)
		}
	}
	r, err := c.Inspect(ctx, file, j, trust)
	if err != nil {
		return unknown(err, "")
	}
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
	}
	r.Outcome = &bundle.Outcome{Refused: refused}
	if refused != "" {
		return show(stdout, o.output, r, true)
	}
	if !alone {
		if r.Outcome.File, err = shelf.Save(ctx, c, r, name); err != nil {
			return unknown(err, "")
		}
	}
	if staged != nil {
		if r.Outcome.Backup, err = staged.Commit(time.Now()); err != nil {
			if r.Outcome.File != "" {
				err = fmt.Errorf("%w (the signatures are in %s)", err, r.Outcome.File)
			}
			return unknown(err, "")
		}
		r.Outcome.Trust = staged.Config.Dir
	}
	return show(stdout, o.output, r, false)
}

func bundleList(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the bundles in the state directory",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			list, err := bundle.List(dir)
			if err != nil {
				return unknown(err, "")
			}
			if output == "json" {
				err = json.NewEncoder(stdout).Encode(struct {
					Bundles []bundle.Shelved `json:"bundles"`
				}{list})
			} else {
				if len(list) == 0 {
					_, err = fmt.Fprintf(stdout, "no bundle in %s\n", verify.Clean(filepath.Join(dir, "bundles"), 300))
				}
				for _, b := range list {
					_, err = fmt.Fprintf(stdout, "%s %s %d bytes, since %s\n", verify.Clean(b.Name, 110), b.Form, b.Size, b.Time.Format(time.RFC3339))
				}
			}
			if err != nil {
				return unknown(err, "")
			}
			return nil
		},
	}
	stateDir(cmd, &dir)
	outputFlag(cmd, &output)
	return cmd
}

func bundleRemove(stdout io.Writer) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a bundle from the state directory",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			shelf, err := bundle.OpenShelf(cmd.Context(), dir)
			if err != nil {
				return unknown(err, "")
			}
			defer shelf.Close()
			if err := shelf.Remove(args[0]); errors.Is(err, fs.ErrNotExist) {
				return unknown(err, "tidewaiter bundle list says what there is")
			} else if err != nil {
				return unknown(err, "")
			}
			_, err = fmt.Fprintf(stdout, "removed %s\n", verify.Clean(args[0], 110))
			return err
		},
	}
	stateDir(cmd, &dir)
	return cmd
}
