package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/doctor"
	"github.com/tidewaiter/tidewaiter/deploy/install"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/selftest"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
)

// installSchema is of what install and uninstall print as JSON.
const installSchema = "tidewaiter.dev/install/v1"

type hostOptions struct {
	node.Options
	install.Gate
	output                                 string
	patience                               time.Duration
	from                                   string
	watch                                  bool
	enforce, force, dryRun, restart, purge bool
	audit                                  bool
}

func installCommand(stdout io.Writer) *cobra.Command {
	var o hostOptions
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the gate on this host, to audit or to enforce",
		Long: `Copy this program to the host, make it a service of systemd or OpenRC, and start it.
If there is no configuration, write one that audits. Nothing of
containerd is touched. What an operator wrote is never overwritten; a newer program
replaces an older one, which comes back if the new one does not come up.

A node that enforces goes on enforcing. Only --audit, or mode: audit in what
--config-from names, has it audit; that is printed and logged.

With --enforce, a second act, it refuses if a container that runs would be
refused; otherwise it changes the line mode: audit, waits until the gate enforces,
and has containerd refuse containers while the gate is away (a drop-in, checked by
containerd's own program). That counts when containerd is restarted: by you, or with
--restart, and then everything is taken back unless the gate is registered in time.

Exit status: 0 done, or there was nothing to do; 1 it was refused or taken back; 2 it
could not be done.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onHost(cmd, stdout, o, (*install.Installation).Install)
		},
	}
	hostFlags(cmd, &o)
	cmd.Flags().BoolVar(&o.enforce, "enforce", false, "refuse containers, and have containerd require the gate")
	cmd.Flags().BoolVar(&o.audit, "audit", false, "have the node audit, also if it enforces: everything starts")
	cmd.MarkFlagsMutuallyExclusive("audit", "enforce")
	cmd.Flags().BoolVar(&o.force, "force", false, "enforce though something that runs would be refused, or nobody can say")
	cmd.Flags().BoolVar(&o.restart, "restart", false, "restart containerd, so that --enforce counts at once")
	cmd.Flags().StringVar(&o.from, "config-from", "", "`DIR` whose configuration the host gets, if it is valid there")
	cmd.Flags().BoolVar(&o.watch, "watch", false, "go on until SIGTERM: bring what changes to the host")
	cmd.Flags().DurationVar(&o.patience, "wait", time.Minute, "`TIME` that the gate has to come up and to register")
	return cmd
}

// hostFlags adds the flags that install and uninstall have.
func hostFlags(cmd *cobra.Command, o *hostOptions) {
	cli.ConfigDir(cmd, &o.ConfigDir)
	cli.StateDir(cmd, &o.StateDir)
	cli.RunDir(cmd, &o.RunDir)
	cli.Output(cmd, &o.output)
	f := cmd.Flags()
	f.BoolVar(&o.dryRun, "dry-run", false, "print the plan, every file and byte, and do nothing")
	f.StringVar(&o.Program, "program", node.GateBinary, "`FILE` that the program is installed as")
	runtimeFlags(cmd, &o.Options)
	f.StringVar(&o.NRI, "nri-socket", "", "containerd's NRI `SOCKET`")
	f.StringVar(&o.Restart, "restart-command", "", "`COMMAND` that restarts containerd, split at spaces")
	f.StringVar(&o.Options.Gate, "gate-command", "", "`COMMAND` that restarts the gate, split at spaces")
}

// runtimeFlags adds the flags of verbs that find the node's containerd by themselves.
func runtimeFlags(cmd *cobra.Command, o *node.Options) {
	f := cmd.Flags()
	f.StringVar(&o.Root, "root", "/", "`DIR` where the host is mounted; its programs are run with it as their root")
	f.StringVar(&o.Runtime, "runtime", "", "`NAME` of what runs pods here: k3s, rke2, microk8s, kubeadm or containerd")
	f.StringVar(&o.Config, "containerd-config", "", "`FILE` that containerd is started with")
	f.StringVar(&o.Binary, "containerd-binary", "", "containerd's program `FILE`")
	f.StringVar(&o.Socket, "containerd-socket", "", "containerd's `SOCKET`")
	f.StringVar(&o.Service, "service", "", "`KIND` of services here: systemd, openrc or none")
}

// onHost does what is to be done, and prints how it went.
func onHost(cmd *cobra.Command, stdout io.Writer, o hostOptions, do func(*install.Installation, context.Context) (install.Result, error)) error {
	if err := cli.CheckOutput(o.output); err != nil {
		return err
	}
	if !o.dryRun {
		defer outlive()()
	}
	ctx := cmd.Context()
	h, err := node.Detect(o.Options)
	if err != nil {
		return explained(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	r := &hostReport{out: stdout, json: o.output == "json", Schema: installSchema, Runtime: h.Name, Steps: []hostStep{}}
	i := &install.Installation{
		Host: h, Gate: o.Gate, Self: self,
		Options: install.Options{
			From: o.from, Watching: o.watch, Release: version, Patience: o.patience,
			Enforce: o.enforce, Audit: o.audit, Force: o.force, DryRun: o.dryRun, Restart: o.restart, Purge: o.purge,
		},
		World: install.World{
			Ask: func(ctx context.Context) (*control.Status, error) { return control.Ask(ctx, h.Path(o.RunDir)) },
			Look: func(ctx context.Context) (*control.Status, error) {
				var s control.Status
				err := control.Get(ctx, h.Path(o.RunDir), control.Question{Path: control.SweepPath, Schema: control.StatusSchema, Longest: control.SweepTime + 5*time.Second}, &s)
				return &s, err
			},
			Gates: func() (int, error) { return gatesOf(h.Path(o.RunDir)) },
			Pause: byDigest,
			Say:   r.say,
			Log:   toSyslog,
			Now:   time.Now,
			Sleep: func(ctx context.Context, d time.Duration) {
				select {
				case <-ctx.Done():
				case <-time.After(d):
				}
			},
		},
	}
	i.Load = func(_ context.Context, dir string) (install.Configured, error) { return configured(h.Path(dir)) }
	up := h.Manager.Name != "none" // else what is mounted here may be an image of another machine
	if h.Root != "/" && up {
		i.Load = i.CheckOnHost
	}
	if h.Root == "/" || up {
		i.LoadOld = i.CheckInstalled
	}
	if o.watch {
		return watch(ctx, i, func() *hostReport {
			return &hostReport{out: stdout, json: o.output == "json", held: true, Schema: installSchema, Runtime: h.Name, Steps: []hostStep{}}
		})
	}
	result, err := do(i, ctx)
	if err == nil && cmd.Name() == "install" && h.Root == "/" && !o.dryRun {
		mirrors(ctx, h, o, r)
	}
	if err == nil && result == install.Enforces {
		err = prove(ctx, h, o, r)
	}
	refused := (*node.Hint)(nil)
	if errors.As(err, &refused) && refused.Refused {
		r.end("refused", err.Error(), refused.Next)
		return cli.Exit(cli.ExitNo)
	}
	if err != nil {
		return explained(err)
	}
	r.end(string(result), "", "")
	return nil
}

// outlive has this process go on when its terminal is gone (SIGHUP), or the reader of
// what it prints (SIGPIPE), until stop is called: a connection to the node that drops
// must not leave it half changed. The signals are not ignored, since every program
// that is started here would inherit that.
func outlive() (stop func()) {
	c := make(chan os.Signal, 1) // nobody reads it
	signal.Notify(c, syscall.SIGHUP, syscall.SIGPIPE)
	return func() { signal.Stop(c) }
}

// watch brings the host what is new until ctx ends, and prints the rounds that changed
// something, or that say other than the one before.
func watch(ctx context.Context, i *install.Installation, report func() *hostReport) error {
	round, last := report(), ""
	i.Say = func(kind, format string, args ...any) { round.say(kind, format, args...) }
	err := i.Watch(ctx, func(result install.Result, err error) {
		problem, next := "", ""
		if err != nil {
			result, problem = "refused", err.Error()
			if h := (*node.Hint)(nil); errors.As(err, &h) {
				next = h.Next
			}
		}
		said := problem
		for _, s := range round.Steps {
			if s.Kind == "warn" {
				said += "\n" + s.Text
			}
		}
		if said != last || err == nil && result != install.Nothing {
			round.end(string(result), problem, next)
		}
		round, last = report(), said
	})
	if err != nil {
		return explained(err)
	}
	return nil
}

// mirrors says where containerd pulls from other places than those that the gate asks.
func mirrors(ctx context.Context, h *node.Host, o hostOptions, r *hostReport) {
	e, err := h.Effective(ctx)
	if err != nil {
		return // which install has said
	}
	c, err := config.Load(o.ConfigDir)
	if err != nil {
		return
	}
	for _, f := range doctor.Mirrors(h, e, c) {
		if f.Level != doctor.OK {
			r.say("warn", "%s", f.Text)
			r.say("next", "%s", f.Next)
		}
	}
}

// prove tests what was installed. A node on which that cannot be tried stays as it is.
func prove(ctx context.Context, h *node.Host, o hostOptions, r *hostReport) error {
	run := h.Path(o.RunDir)
	found, err := selftest.Run(ctx, selftest.Options{
		Socket: h.Path(h.Socket), RunDir: run, Now: time.Now,
		Policy: func(ctx context.Context) (config.Summary, error) { return inForce(ctx, run, h.Path(o.ConfigDir)) },
	})
	const next = "tidewaiter selftest; tidewaiter doctor"
	if err != nil {
		r.say("warn", "tidewaiter selftest could not try anything: %v", err)
		r.say("next", next)
		return nil
	}
	r.say("did", "tidewaiter selftest:\n%s", strings.TrimSuffix(trials(found), "\n"))
	switch found.Result {
	case selftest.NotEnforced:
		return &node.Hint{Err: errors.New("the gate is installed and registered, and its test failed"), Next: next, Refused: true}
	case selftest.Unknown:
		r.say("next", next)
	}
	return nil
}

func explained(err error) error {
	next := ""
	if h := (*node.Hint)(nil); errors.As(err, &h) {
		next = h.Next
	}
	return cli.Inconclusive(err, next)
}

// gatesOf counts the gates that share a run directory.
func gatesOf(dir string) (int, error) {
	here, err := nri.Join(filepath.Join(dir, "instances"))
	if err != nil {
		return 0, err
	}
	defer here.Leave()
	n, err := here.Live()
	return n - 1, err
}

// configured is what this configuration directory would mean to a gate.
func configured(dir string) (install.Configured, error) {
	c, err := config.Load(dir)
	if err != nil {
		return install.Configured{}, err
	}
	return install.Configured{Mode: c.Mode.String(), Revision: c.Revision.String()}, nil
}

// byDigest is the name with its digest that an image has on the node besides name.
// Under another the runtime would have to pull it.
func byDigest(ctx context.Context, socket, name string) (string, error) {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", err
	}
	records, err := containerd.Dial(socket)
	if err != nil {
		return "", err
	}
	defer records.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d, err := records.Image(ctx, named.String())
	if err != nil {
		return "", err
	}
	pinned := reference.TrimNamed(named).String() + "@" + d.Digest.String()
	if _, err := records.Image(ctx, pinned); err != nil {
		return "", fmt.Errorf("it is not on the node as %s (ctr -n k8s.io images tag %s %s): %w", pinned, named, pinned, err)
	}
	return pinned, nil
}

// toSyslog leaves a line where the node keeps its log: it must be seen later that
// somebody opened the node.
func toSyslog(message string) {
	w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_WARNING, "tidewaiter")
	if err != nil {
		return // no log of the host in a container
	}
	defer w.Close()
	_ = w.Warning(fmt.Sprintf("%s (uid %d)", message, os.Getuid()))
}

// A hostReport is what install and uninstall print: lines as they come, or one
// document at the end.
type hostReport struct {
	out  io.Writer
	json bool
	held bool // until the end, as JSON is

	Schema  string     `json:"schema"`
	Runtime string     `json:"runtime"`
	Result  string     `json:"result"`
	Error   string     `json:"error,omitempty"`
	Next    []string   `json:"next"`
	Steps   []hostStep `json:"steps"`
}

type hostStep struct {
	Kind string `json:"kind"` // did, would, warn
	Text string `json:"text"`
}

func (r *hostReport) say(kind, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if kind == "next" {
		r.Next = append(r.Next, text)
		return
	}
	step := hostStep{kind, text}
	r.Steps = append(r.Steps, step)
	if !r.json && !r.held {
		step.print(r.out)
	}
}

func (s hostStep) print(out io.Writer) {
	switch s.Kind {
	case "warn":
		fmt.Fprintln(out, "warning: "+s.Text)
	case "would":
		fmt.Fprint(out, "would "+s.Text)
	default:
		fmt.Fprintln(out, s.Text)
	}
}

// endings are the last lines.
var endings = map[string]string{
	"planned":   "nothing was changed",
	"nothing":   "nothing to do",
	"installed": "installed",
	"enforces":  "installed: the gate enforces, and containerd refuses containers while it is away",
	"opened":    "containerd's configuration does not require the gate any more",
	"removed":   "removed",
	"refused":   "refused",
}

func (r *hostReport) end(result, problem, next string) {
	r.Result, r.Error = result, problem
	if next != "" {
		r.Next = append(r.Next, next)
	}
	if r.json {
		r.Next = append([]string{}, r.Next...)
		_ = json.NewEncoder(r.out).Encode(r)
		return
	}
	if r.held {
		for _, s := range r.Steps {
			s.print(r.out)
		}
	}
	last := endings[result]
	if problem != "" {
		last += ": " + problem
	}
	fmt.Fprintln(r.out, last)
	for _, n := range r.Next {
		fmt.Fprintln(r.out, "next: "+n)
	}
}
