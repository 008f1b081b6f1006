package nri

import (
	"context"
	"fmt"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A message of the runtime holds most of what it knows of a container, down to
// each system call of its seccomp profile, and its arguments and environment, in
// which there are secrets. What the gate never reads is dropped before it is
// decoded; the numbers are those of NRI's api.proto.
var (
	ofCreation = fields{
		1: { // pod
			5: nil, // labels
			8: nil, // linux
		},
		2: { // container
			5: nil, // labels
			7: nil, // args
			8: nil, // env
			9: { // mounts
				2: nil, // type
				4: nil, // options
			},
			10: nil, // hooks
			11: nil, // linux
			13: nil, // rlimits
			20: nil, // CDI devices
		},
	}
	ofSandbox = fields{1: ofCreation[1]}
	ofChange  = fields{2: ofCreation[1], 3: ofCreation[2]}

	ofSynchronize = fields{
		1: nil, // pods
		2: nil, // containers
	}
)

// fields are fields of a message: nil for one to drop, and else what to drop of
// the message that it holds.
type fields map[protowire.Number]fields

// lean is unmarshal, which decodes a message of the runtime, without what is
// dropped of it. In size it notes how many bytes the pod or the container in it
// took, whichever took more.
func lean(unmarshal func(any) error, size *int) func(any) error {
	return func(v any) error {
		var drop fields
		switch v.(type) {
		case *api.ValidateContainerAdjustmentRequest, *api.CreateContainerRequest, *api.StartContainerRequest:
			drop = ofCreation
		case *api.RunPodSandboxRequest:
			drop = ofSandbox
		case *api.StateChangeEvent:
			drop = ofChange
		case *api.SynchronizeRequest:
			drop = ofSynchronize
		default:
			return unmarshal(v)
		}
		var raw api.Empty // every field is unknown to it, and kept as it is
		if err := unmarshal(&raw); err != nil {
			return err
		}
		b := raw.ProtoReflect().GetUnknown()
		*size = drop.longest(b)
		b, err := drop.from(b)
		if err != nil {
			return fmt.Errorf("a message of the runtime: %w", err)
		}
		return proto.Unmarshal(b, v.(proto.Message))
	}
}

// from takes f out of the message b, in place: what is left is never longer.
func (f fields) from(b []byte) ([]byte, error) {
	left := b[:0]
	for len(b) > 0 {
		number, kind, tag := protowire.ConsumeTag(b)
		if tag < 0 {
			return nil, protowire.ParseError(tag)
		}
		size := protowire.ConsumeFieldValue(number, kind, b[tag:])
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		inner, listed := f[number]
		switch {
		case !listed || inner != nil && kind != protowire.BytesType:
			left = append(left, b[:tag+size]...)
		case inner != nil:
			v, _ := protowire.ConsumeBytes(b[tag:])
			v, err := inner.from(v)
			if err != nil {
				return nil, err
			}
			left = protowire.AppendBytes(protowire.AppendTag(left, number, kind), v)
		}
		b = b[tag+size:]
	}
	return left, nil
}

// longest returns how many bytes the longest of those messages in b has of which
// something is dropped. What is broken counts for nothing: it is refused later.
func (f fields) longest(b []byte) (n int) {
	for len(b) > 0 {
		number, kind, size := protowire.ConsumeField(b)
		if size < 0 {
			return n
		}
		if f[number] != nil && kind == protowire.BytesType {
			n = max(n, size)
		}
		b = b[size:]
	}
	return n
}

// A gate that registers is told of all pods and containers, in messages of at most
// 4 MiB each. NRI up to 0.12.5 brings down all of the runtime where it would have to
// put fewer than eight of them into one (synchronize and recalcObjsPerSyncMsg in
// pkg/adaptation/plugin.go). It never has to where none is longer than maxTold, with
// room for what plugins add. Where a few pods have very many such containers, or the
// other way about, it does not get through them ([Session.Large]).
const maxTold = 300 << 10 // bytes

type sizeKey struct{}

// withSize has size, which lean writes, go to the hook.
func withSize(ctx context.Context, size *int) context.Context {
	return context.WithValue(ctx, sizeKey{}, size)
}

// tooLong says that the runtime's message of this hook is of a pod or container that
// is longer than maxTold, or is empty.
func tooLong(ctx context.Context) string {
	if size, ok := ctx.Value(sizeKey{}).(*int); ok && *size > maxTold {
		return fmt.Sprintf("labels, annotations, arguments and environment have some %d KiB, more than %d KiB of one pod or container: containerd could not tell a gate of them when it starts; put what is long into a file, or set enableServiceLinks: false where it is the addresses of services", *size>>10, maxTold>>10)
	}
	return ""
}
