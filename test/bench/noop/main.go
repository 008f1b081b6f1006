// Command noop is an NRI plugin that validates containers and says yes to every
// one: what the round trip alone costs. It takes the path of the runtime's NRI
// socket and, if it is not to be "noop", the name to register by, and ends when the
// connection does.
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct{}

func (plugin) ValidateContainerAdjustment(context.Context, *api.ValidateContainerAdjustmentRequest) error {
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
	name := "noop"
	if len(os.Args) > 2 {
		name = os.Args[2]
	}
	s, err := stub.New(plugin{}, stub.WithPluginName(name), stub.WithPluginIdx("99"), stub.WithConnection(conn), stub.WithLogger(quiet{}))
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
