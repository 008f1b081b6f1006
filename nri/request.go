package nri

import (
	"context"
	"fmt"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/tidewaiter/tidewaiter/nri/tally"
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
// dropped of it. In size it notes how many bytes the pod and the container in it took.
func lean(unmarshal func(any) error, size *lengths) func(any) error {
	return func(v any) error {
		var drop fields
		pod, container := protowire.Number(1), protowire.Number(2)
		switch v.(type) {
		case *api.ValidateContainerAdjustmentRequest, *api.CreateContainerRequest, *api.StartContainerRequest:
			drop = ofCreation
		case *api.RunPodSandboxRequest:
			drop = ofSandbox
		case *api.StateChangeEvent:
			drop, pod, container = ofChange, 2, 3
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
		*size = lengths{longest(b, pod), longest(b, container)}
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

// longest returns how many bytes the longest message has that field f of b holds. What
// is broken counts for nothing: it is refused later.
func longest(b []byte, f protowire.Number) (n int) {
	for len(b) > 0 {
		number, kind, size := protowire.ConsumeField(b)
		if size < 0 {
			return n
		}
		if number == f && kind == protowire.BytesType {
			n = max(n, size)
		}
		b = b[size:]
	}
	return n
}

// A gate that registers is told of all pods and containers. So none is let in that is
// longer than [tally.MaxTold], and none with which its pod would be longer than a [Tally]
// allows.

// lengths are how many bytes of the runtime's message the pod and the container took.
type lengths struct{ pod, container int }

type lengthsKey struct{}

// withLengths has l, which lean writes, go to the hook.
func withLengths(ctx context.Context, l *lengths) context.Context {
	return context.WithValue(ctx, lengthsKey{}, l)
}

// lengthsOf are those in the runtime's message of this hook.
func lengthsOf(ctx context.Context) lengths {
	if l, ok := ctx.Value(lengthsKey{}).(*lengths); ok {
		return *l
	}
	return lengths{}
}

// tooLong says that the pod or the container is longer than any may be, or is empty.
func (l lengths) tooLong() string {
	if n := max(l.pod, l.container); n > tally.MaxTold {
		return tally.TooLong(n)
	}
	return ""
}
