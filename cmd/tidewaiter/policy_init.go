package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/config/stage"
)

// maxCertificates bounds a file of certificates, in bytes.
const maxCertificates = 1 << 20

func policyInitCommand(stdout io.Writer) *cobra.Command {
	var o stage.Initial
	var dir, ca, signer string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Write a first configuration from a certificate and a repository",
		Long: `Write a configuration that audits: config.yaml, trustpolicy.json with one
statement, and a trust store with the CA. The identity is the subject of the signing
certificate, or of the CA file if that signs for itself. Nothing that is there is
overwritten.

Exit status: 0 it is written and valid; 2 it is not.`,
		Example: `  tidewaiter policy init --config-dir ./etc --ca root.crt --signer signer.crt --scope registry.example/app`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if ca == "" || len(o.Scopes) == 0 {
				return cli.Inconclusive(errors.New("policy init: expected --ca and at least one --scope"), "tidewaiter policy init --help")
			}
			var err error
			if o.CA, err = readCertificates(ca); err != nil {
				return cli.Inconclusive(err, "")
			}
			if signer != "" {
				if o.Signer, err = readCertificates(signer); err != nil {
					return cli.Inconclusive(err, "")
				}
			}
			files, err := o.Files()
			switch {
			case errors.Is(err, stage.ErrNoIdentity):
				return cli.Inconclusive(err, "name the signing certificate with --signer, or its subject with --identity")
			case err != nil:
				return cli.Inconclusive(err, "")
			}
			for name := range files {
				if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
					return cli.Inconclusive(fmt.Errorf("%s is there already, and nothing was written", filepath.Join(dir, name)), "edit it, or name another --config-dir")
				}
			}
			if err := check(files); err != nil {
				return cli.Inconclusive(err, "nothing was written")
			}
			if err := stage.Files(files).Write(dir); err != nil {
				return cli.Inconclusive(err, "")
			}
			c, err := cli.LoadConfig(dir)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(stdout, "wrote %s: mode %s, %v trusted for %v\n", dir, c.Mode, c.Statements[0].TrustedIdentities, c.Statements[0].Scopes)
			return cli.Written(err)
		},
	}
	cli.ConfigDir(cmd, &dir)
	f := cmd.Flags()
	f.StringVar(&ca, "ca", "", "`FILE` of the CA's certificates, or of a signing certificate that signs itself, in PEM")
	f.StringVar(&signer, "signer", "", "`FILE` of the signing certificate, in PEM")
	f.StringVar(&o.Identity, "identity", "", "`IDENTITY` that is trusted, such as \"x509.subject: C=US, ST=WA, O=acme\"")
	f.StringArrayVar(&o.Scopes, "scope", nil, "`REPOSITORY` that it is trusted for, such as registry.example/app; more than once")
	f.StringVar(&o.Name, "name", "first", "`NAME` of the statement and its trust store")
	cmd.MarkFlagsMutuallyExclusive("signer", "identity")
	return cmd
}

// check reads files as a configuration, in a directory of their own.
func check(files map[string][]byte) error {
	dir, err := os.MkdirTemp("", "tidewaiter-policy-init-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := stage.Files(files).Write(dir); err != nil {
		return err
	}
	_, err = config.Load(dir)
	return err
}

func readCertificates(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxCertificates+1))
	if err == nil && len(raw) > maxCertificates {
		err = fmt.Errorf("%s is longer than %d bytes", name, maxCertificates)
	}
	return raw, err
}
