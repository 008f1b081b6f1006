package containerd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func find(ctx context.Context, in map[string]string, id string) (string, error) {
	if md, _ := metadata.FromIncomingContext(ctx); len(md["containerd-namespace"]) != 1 || md["containerd-namespace"][0] != Namespace {
		return "", status.Error(codes.FailedPrecondition, "namespace is required")
	}
	if id == "broken" {
		return "", status.Error(codes.Unavailable, "no answer")
	}
	name, ok := in[id]
	if !ok {
		return "", status.Error(codes.NotFound, "not found")
	}
	return name, nil
}

// sandboxStore and containerStore are containerd's: runtime types by id.
type sandboxStore struct {
	sandboxapi.UnimplementedStoreServer
	runtimes map[string]string
}
type containerStore struct {
	containersapi.UnimplementedContainersServer
	runtimes map[string]string
}

func (s sandboxStore) Get(ctx context.Context, r *sandboxapi.StoreGetRequest) (*sandboxapi.StoreGetResponse, error) {
	name, err := find(ctx, s.runtimes, r.SandboxID)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.StoreGetResponse{Sandbox: &types.Sandbox{SandboxID: r.SandboxID, Runtime: &types.Sandbox_Runtime{Name: name}}}, nil
}

func (s containerStore) Get(ctx context.Context, r *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	name, err := find(ctx, s.runtimes, r.ID)
	if err != nil {
		return nil, err
	}
	return &containersapi.GetContainerResponse{Container: &containersapi.Container{ID: r.ID, Runtime: &containersapi.Container_Runtime{Name: name}}}, nil
}

// TestSandboxRuntime: pods that are older than containerd's sandbox records still
// get containers, and nothing else passes for one.
func TestSandboxRuntime(t *testing.T) {
	dir, err := os.MkdirTemp("", "tw") // short: unix socket paths have little room
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "c.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	sandboxapi.RegisterStoreServer(server, sandboxStore{runtimes: map[string]string{"new": "io.containerd.runc.v2", "both": "io.containerd.kata.v2"}})
	containersapi.RegisterContainersServer(server, containerStore{runtimes: map[string]string{"old": "io.containerd.runc.v2", "both": "io.containerd.runc.v2"}})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() { server.Stop(); <-served }()
	c, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for id, want := range map[string]string{"new": "io.containerd.runc.v2", "old": "io.containerd.runc.v2", "both": "io.containerd.kata.v2"} {
		if got, err := c.SandboxRuntime(ctx, id); got != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", id, got, err, want)
		}
	}
	if got, err := c.SandboxRuntime(ctx, "none"); got != "" || !errors.Is(err, ErrNotFound) {
		t.Errorf("none: %q, %v", got, err)
	}
	if got, err := c.SandboxRuntime(ctx, "broken"); got != "" || err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("broken: %q, %v", got, err)
	}
}
