package selftest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
)

// A client asks containerd: its own services, and CRI as a kubelet does.
type client struct {
	conn    *grpc.ClientConn
	images  imagesapi.ImagesClient
	content contentapi.ContentClient
	leases  leasesapi.LeasesClient
}

func dial(socket string) (*client, error) {
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}),
		grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, err
	}
	return &client{conn, imagesapi.NewImagesClient(conn), contentapi.NewContentClient(conn), leasesapi.NewLeasesClient(conn)}, nil
}

// in is ctx for containerd's own services, under a lease where one is named.
func in(ctx context.Context, lease string) context.Context {
	ctx = metadata.AppendToOutgoingContext(ctx, "containerd-namespace", containerd.Namespace)
	if lease != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "containerd-lease", lease)
	}
	return ctx
}

// CRI's messages are written by hand, with the numbers of its api.proto: its Go package
// would add its whole API to the daemon, which is the same program. A message keeps
// fields that it does not know, and sends them.

type message []byte

func (m message) text(field protowire.Number, s string) message {
	if s == "" {
		return m
	}
	return protowire.AppendString(protowire.AppendTag(m, field, protowire.BytesType), s)
}

func (m message) number(field protowire.Number, n uint64) message {
	return protowire.AppendVarint(protowire.AppendTag(m, field, protowire.VarintType), n)
}

func (m message) sub(field protowire.Number, s message) message {
	return protowire.AppendBytes(protowire.AppendTag(m, field, protowire.BytesType), s)
}

// entry is one of a map.
func (m message) entry(field protowire.Number, key, value string) message {
	return m.sub(field, message(nil).text(1, key).text(2, value))
}

// fields hands over the fields of m that are bytes or numbers.
func (m message) fields(yield func(field protowire.Number, b message, n uint64)) error {
	for len(m) > 0 {
		field, kind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return protowire.ParseError(n)
		}
		rest := m[n:]
		var b []byte
		var v uint64
		switch kind {
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(rest)
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(rest)
		default:
			n = protowire.ConsumeFieldValue(field, kind, rest)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		yield(field, b, v)
		m = rest[n:]
	}
	return nil
}

// get is a field of m that holds bytes.
func (m message) get(field protowire.Number) (found message) {
	_ = m.fields(func(f protowire.Number, b message, _ uint64) {
		if f == field {
			found = b
		}
	})
	return found
}

func (c *client) cri(ctx context.Context, method string, request message) (message, error) {
	var ask, answer emptypb.Empty
	ask.ProtoReflect().SetUnknown([]byte(request))
	if err := c.conn.Invoke(ctx, "/runtime.v1."+method, &ask, &answer); err != nil {
		if s, ok := status.FromError(err); ok {
			return nil, &refusal{s.Message()}
		}
		return nil, err
	}
	return message(answer.ProtoReflect().GetUnknown()), nil
}

// A refusal is what containerd answers, in its words.
type refusal struct{ text string }

func (r *refusal) Error() string { return r.text }

// Names of what a test makes.
const (
	label     = "dev.tidewaiter.selftest"
	namespace = "tidewaiter-selftest" // of pods, and their cgroup
)

// A pod is a sandbox in the host's network, so that it needs none.
type pod struct {
	id     string
	config message
}

const hostNetwork = 2 // NamespaceMode NODE

func sandboxConfig(nonce, uid, cgroup string) message {
	options := message(nil).sub(1, message(nil).number(1, hostNetwork).number(2, 1)) // pid: of the container
	return message(nil).
		sub(1, message(nil).text(1, "selftest-"+nonce).text(2, uid).text(3, namespace)).
		entry(6, "io.kubernetes.pod.name", "selftest-"+nonce).
		entry(6, "io.kubernetes.pod.namespace", namespace).
		entry(6, "io.kubernetes.pod.uid", uid).
		entry(6, label, nonce).
		sub(8, message(nil).text(1, cgroup).sub(2, options))
}

// runPod runs a sandbox. Where runc has systemd make cgroups its parent must be one of
// systemd's.
func (c *client) runPod(ctx context.Context, nonce, uid string) (*pod, error) {
	var failed error
	for _, cgroup := range []string{"/" + namespace, "/system.slice"} {
		p := &pod{config: sandboxConfig(nonce, uid, cgroup)}
		answer, err := c.cri(ctx, "RuntimeService/RunPodSandbox", message(nil).sub(1, p.config))
		if err == nil {
			p.id = string(answer.get(1))
			return p, nil
		}
		if failed == nil {
			failed = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

// create creates a container, which is not started, with an image by its name.
func (c *client) create(ctx context.Context, p *pod, name, image string) (id string, err error) {
	options := message(nil).sub(2, message(nil).sub(3, message(nil).number(1, hostNetwork).number(2, 1)))
	config := message(nil).
		sub(1, message(nil).text(1, name)).
		sub(2, message(nil).text(1, image).text(18, image)).
		text(3, program).
		sub(15, options)
	answer, err := c.cri(ctx, "RuntimeService/CreateContainer", message(nil).text(1, p.id).sub(2, config).sub(3, p.config))
	if err != nil {
		return "", err
	}
	return string(answer.get(1)), nil
}

func (c *client) removeContainer(ctx context.Context, id string) error {
	_, err := c.cri(ctx, "RuntimeService/RemoveContainer", message(nil).text(1, id))
	return err
}

// removePod removes a sandbox, and the containers in it first, as a kubelet does: in
// another order containerd has hung (internal/cri/server/sandbox_remove.go, as of 2.4.2).
func (c *client) removePod(ctx context.Context, id string) error {
	list, err := c.cri(ctx, "RuntimeService/ListContainers", message(nil).sub(1, message(nil).text(3, id)))
	failed := err
	if err == nil {
		err = list.fields(func(f protowire.Number, item message, _ uint64) {
			if f == 1 {
				failed = errors.Join(failed, c.removeContainer(ctx, string(item.get(1))))
			}
		})
		failed = errors.Join(failed, err)
	}
	_, err = c.cri(ctx, "RuntimeService/StopPodSandbox", message(nil).text(1, id))
	failed = errors.Join(failed, err)
	_, err = c.cri(ctx, "RuntimeService/RemovePodSandbox", message(nil).text(1, id))
	return errors.Join(failed, err)
}

// imageID is the ID that CRI knows an image by; empty: it does not know it.
func (c *client) imageID(ctx context.Context, name string) (string, error) {
	answer, err := c.cri(ctx, "ImageService/ImageStatus", message(nil).sub(1, message(nil).text(1, name)))
	if err != nil {
		return "", err
	}
	return string(answer.get(1).get(1)), nil
}

func (c *client) removeImage(ctx context.Context, id string) error {
	_, err := c.cri(ctx, "ImageService/RemoveImage", message(nil).sub(1, message(nil).text(1, id)))
	return err
}

// stalePods are those that a test left which was killed: none that is younger than age.
func (c *client) stalePods(ctx context.Context, before time.Time) (ids []string, err error) {
	answer, err := c.cri(ctx, "RuntimeService/ListPodSandbox", nil)
	if err != nil {
		return nil, err
	}
	err = answer.fields(func(f protowire.Number, item message, _ uint64) {
		if f != 1 {
			return
		}
		id, ours, made := "", false, int64(0)
		_ = item.fields(func(f protowire.Number, b message, n uint64) {
			switch f {
			case 1:
				id = string(b)
			case 4:
				made = int64(n)
			case 5:
				ours = ours || string(b.get(1)) == label
			}
		})
		if ours && time.Unix(0, made).Before(before) {
			ids = append(ids, id)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list of sandboxes: %w", err)
	}
	return ids, nil
}
