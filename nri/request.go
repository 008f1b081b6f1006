package nri

import (
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
	ofSynchronize = fields{
		1: nil, // pods
		2: nil, // containers
	}
)

// fields are fields of a message: nil for one to drop, and else what to drop of
// the message that it holds.
type fields map[protowire.Number]fields

// lean is unmarshal, which decodes a message of the runtime, without what is
// dropped of it.
func lean(unmarshal func(any) error) func(any) error {
	return func(v any) error {
		var drop fields
		switch v.(type) {
		case *api.ValidateContainerAdjustmentRequest, *api.CreateContainerRequest:
			drop = ofCreation
		case *api.SynchronizeRequest:
			drop = ofSynchronize
		default:
			return unmarshal(v)
		}
		var raw api.Empty // every field is unknown to it, and kept as it is
		if err := unmarshal(&raw); err != nil {
			return err
		}
		b, err := drop.from(raw.ProtoReflect().GetUnknown())
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
