package cli

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/deploy/config"
)

// Env is the environment variable's value, or otherwise.
func Env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// ConfigDir adds the flag of every verb that reads the configuration.
func ConfigDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "config-dir", Env("TIDEWAITER_CONFIG_DIR", "/etc/tidewaiter"),
		"`DIR` of config.yaml, trustpolicy.json and truststore (TIDEWAITER_CONFIG_DIR)")
}

// RunDir adds the flag of every verb that asks a running gate.
func RunDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "run-dir", Env("TIDEWAITER_RUN_DIR", "/run/tidewaiter"), "`DIR` of the control socket (TIDEWAITER_RUN_DIR)")
}

// StateDir adds the flag of every verb that reads or writes what the gate keeps.
func StateDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "state-dir", Env("TIDEWAITER_STATE_DIR", "/var/lib/tidewaiter"), "`DIR` of what is kept over a restart; empty: nothing is (TIDEWAITER_STATE_DIR)")
}

// Output adds the flag of every verb that prints.
func Output(cmd *cobra.Command, o *string) {
	cmd.Flags().StringVarP(o, "output", "o", "text", "`FORMAT` of the answer: text or json")
}

// CheckOutput refuses an unknown form before any work is done.
func CheckOutput(o string) error {
	if o != "text" && o != "json" {
		return Inconclusive(fmt.Errorf("--output: %q is neither text nor json", o), "")
	}
	return nil
}

// GateHint is what to do if no gate answers.
func GateHint(dir string) string {
	return "is tidewaiter run running, with --run-dir " + dir + "? Its log says why it cannot be asked; only root may ask"
}

// LoadConfig is config.Load for a verb.
func LoadConfig(dir string) (*config.Config, error) {
	c, err := config.Load(dir)
	if errors.Is(err, config.ErrNone) {
		return nil, Inconclusive(err, "write trustpolicy.json and truststore there, or name their directory with --config-dir")
	}
	if err != nil {
		return nil, Inconclusive(err, "correct it, or name another directory with --config-dir")
	}
	return c, nil
}
