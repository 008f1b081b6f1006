// Command up runs a throwaway Kubernetes of one node until ctrl-C, to try on it what
// the documents say. Needs root on Linux.
//
//	cd test && go run ./cluster/up
//
// It says how to get onto the node's own root file system, where kubectl, ctr and the
// program under test (/root/tidewaiter) are, deploy/ is in /root/deploy, and
// restart-containerd does what systemctl would.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

func main() {
	version := flag.String("containerd", node.Containerd24, "`VERSION` of containerd")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *version); err != nil {
		fmt.Fprintln(os.Stderr, "up:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, version string) (err error) {
	reg, err := node.NewRegistry("registry.example", node.RegistryOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Stop()) }()
	c, err := cluster.Start(ctx, node.Options{ContainerdVersion: version, Log: os.Stderr})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	acme := notarytest.NewCA(notarytest.CAOptions{})
	if err := furnish(ctx, c, reg, acme); err != nil {
		return err
	}
	fmt.Printf(`
The node runs containerd %s and Kubernetes %s until ctrl-C. To get onto it:

    nsenter --mount=/proc/%d/ns/mnt -- env HOME=/root bash -l

There: kubectl, ctr, restart-containerd, /root/tidewaiter, /root/deploy. Images:
registry.example/app:signed (by x509.subject: C=US, ST=WA, O=acme, CN=release, whose
root is in /root/ca.crt) and registry.example/app:unsigned. Pods need hostNetwork: true
if they are to have a network. The mirror is %s.
`, version, cluster.Version, c.PID(), reg.URL())
	asked := c.Path("/run/restart-containerd")
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
		if _, err := os.Stat(asked); err == nil {
			if err := c.Restart(ctx); err != nil {
				fmt.Fprintln(os.Stderr, "containerd:", err)
			}
			os.Remove(asked)
		}
	}
}

// furnish puts onto the node what somebody who tries it needs.
func furnish(ctx context.Context, c *cluster.Cluster, reg *node.Registry, acme *notarytest.CA) error {
	if err := c.Use(reg); err != nil {
		return err
	}
	signed, err := reg.Push(ctx, "app:signed", node.ImageOptions{Word: "signed"})
	if err != nil {
		return err
	}
	if _, err := reg.Sign(ctx, signed, acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})); err != nil {
		return err
	}
	if _, err := reg.Push(ctx, "app:unsigned", node.ImageOptions{Word: "unsigned"}); err != nil {
		return err
	}
	program, err := node.BuildTidewaiter(ctx)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tidewaiter/tidewaiter").Output()
	if err != nil {
		return err
	}
	if err := os.CopyFS(c.Path("/root/deploy"), os.DirFS(filepath.Join(strings.TrimSpace(string(out)), "deploy"))); err != nil {
		return err
	}
	if err := os.Symlink(c.Tools.Containerd, c.Path("/usr/local/bin/containerd")); err != nil {
		return err
	}
	for path, content := range map[string]string{
		"/root/tidewaiter":                  string(raw),
		"/root/ca.crt":                      string(acme.PEM()),
		"/usr/local/bin/kubectl":            "#!/bin/sh\nexec " + c.Program("kubectl") + " --kubeconfig " + cluster.AdminConfig + " --cache-dir /tmp/kubectl \"$@\"\n",
		"/usr/local/bin/ctr":                "#!/bin/sh\nexec " + c.Tools.Ctr + " \"$@\"\n",
		"/usr/local/bin/restart-containerd": "#!/bin/sh\ntouch /run/restart-containerd\nwhile [ -e /run/restart-containerd ]; do sleep 0.1; done\n",
	} {
		if err := c.WriteFile(path, content); err != nil {
			return err
		}
		if err := os.Chmod(c.Path(path), 0o755); err != nil {
			return err
		}
	}
	return nil
}
