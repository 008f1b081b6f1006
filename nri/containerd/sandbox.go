package containerd

import (
	"context"
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

// RemoveSandbox has the CRI plugin stop and remove a pod that has no containers.
func (c *Containerd) RemoveSandbox(ctx context.Context, id string) error {
	// Messages of CRI are written by hand, as in Stop. The ID is field 1 of both requests.
	pod := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	if _, err := c.cri(ctx, "StopPodSandbox", pod); err != nil {
		return err
	}
	// CRI knows of containers before there is a record of them. In ListContainersRequest
	// the filter is field 1, and pod_sandbox_id field 3 of that.
	filter := protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), id)
	list, err := c.cri(ctx, "ListContainers", protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), filter))
	if err != nil {
		return err
	}
	if len(list) > 0 {
		return errors.New("a container came meanwhile")
	}
	_, err = c.cri(ctx, "RemovePodSandbox", pod)
	return err
}

// cri calls a method of CRI's runtime service.
func (c *Containerd) cri(ctx context.Context, method string, request []byte) ([]byte, error) {
	var in, out emptypb.Empty
	in.ProtoReflect().SetUnknown(request)
	if err := c.conn.Invoke(ctx, "/runtime.v1.RuntimeService/"+method, &in, &out); err != nil {
		return nil, wrap(method, err)
	}
	return out.ProtoReflect().GetUnknown(), nil
}
