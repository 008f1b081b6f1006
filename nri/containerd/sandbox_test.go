package containerd

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A cri answers the methods of CRI that RemoveSandbox calls. It is safe for concurrent use.
type cri struct {
	mu     sync.Mutex
	calls  []string        // method and pod
	inside map[string]bool // pods that have a container by now
	fails  bool
}

func (c *cri) serve(_ any, s grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(s)
	method, is := strings.CutPrefix(full, "/runtime.v1.RuntimeService/")
	if !is {
		return status.Error(codes.Unimplemented, full)
	}
	var in, out emptypb.Empty
	if err := s.RecvMsg(&in); err != nil {
		return err
	}
	b := in.ProtoReflect().GetUnknown()
	field := func(b []byte, want protowire.Number) []byte {
		number, _, n := protowire.ConsumeTag(b)
		v, _ := protowire.ConsumeBytes(b[n:])
		if number != want {
			return nil
		}
		return v
	}
	id := field(b, 1)
	if method == "ListContainers" {
		id = field(id, 3)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, method+" "+string(id))
	if c.fails {
		return errors.New("as told")
	}
	if method == "ListContainers" && c.inside[string(id)] {
		out.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a container"))
	}
	return s.SendMsg(&out)
}

// TestRemoveSandbox: a pod is stopped, and removed if it has no container even then.
func TestRemoveSandbox(t *testing.T) {
	for name, tt := range map[string]struct {
		inside string // a pod that has a container which there is no record of yet
		fails  bool
		calls  []string
		err    bool
	}{
		"an empty pod":           {calls: []string{"StopPodSandbox p", "ListContainers p", "RemovePodSandbox p"}},
		"one with a container":   {inside: "p", calls: []string{"StopPodSandbox p", "ListContainers p"}, err: true},
		"CRI does not take part": {fails: true, calls: []string{"StopPodSandbox p"}, err: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := &cri{inside: map[string]bool{tt.inside: true}, fails: tt.fails}
			c := serveWith(t, listed{}, []grpc.ServerOption{grpc.UnknownServiceHandler(r.serve)})
			if err := c.RemoveSandbox(t.Context(), "p"); (err != nil) != tt.err || !slices.Equal(r.calls, tt.calls) {
				t.Errorf("%v, with calls %q, want %q", err, r.calls, tt.calls)
			}
		})
	}
}
