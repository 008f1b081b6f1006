// Command noop is an NRI plugin that validates containers and says yes to every
// one: what the round trip alone costs. It takes the path of the runtime's NRI
// socket, the name to register by if it is not "noop", and the hosts in the names of
// images that it is to refuse after all. It ends when the connection does.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct{ refused []string }

func (p plugin) ValidateContainerAdjustment(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	if len(p.refused) == 0 {
		return nil
	}
	host, _, _ := strings.Cut(req.GetContainer().GetAnnotations()["io.kubernetes.cri.image-name"], "/")
	if slices.Contains(p.refused, host) {
		return errors.New("noop: refused")
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "noop:", err)
		os.Exit(1)
	}
}

func run() error {
	conn, err := net.Dial("unix", os.Args[1])
	if err != nil {
		return err
	}
	name, p := "noop", plugin{}
	if len(os.Args) > 2 {
		name, p.refused = os.Args[2], os.Args[3:]
	}
	s, err := stub.New(p, stub.WithPluginName(name), stub.WithPluginIdx("99"), stub.WithConnection(conn), stub.WithLogger(quiet{}))
	if err != nil {
		return err
	}
	return s.Run(context.Background())
}

// quiet drops the stub's log.
type quiet struct{}

var _ nrilog.Logger = quiet{}

func (quiet) Debugf(context.Context, string, ...any) {}
func (quiet) Infof(context.Context, string, ...any)  {}
func (quiet) Warnf(context.Context, string, ...any)  {}
func (quiet) Errorf(context.Context, string, ...any) {}
