package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Namespace is containerd's namespace of all that the CRI plugin makes.
const Namespace = "k8s.io"

// ErrNotFound says that containerd has no such record.
var ErrNotFound = errors.New("not found in containerd")

// Containerd asks containerd's local services, on its unix socket and never a
// network. It is safe for concurrent use and reconnects by itself.
type Containerd struct {
	conn       *grpc.ClientConn
	images     imagesapi.ImagesClient
	content    contentapi.ContentClient
	snapshots  snapshotsapi.SnapshotsClient
	containers containersapi.ContainersClient
	sandboxes  sandboxapi.StoreClient
	plugins    introspectionapi.IntrospectionClient
}

// maxAnswer bounds one answer of containerd. The list of images is the longest: some
// 45,000 records fit.
const maxAnswer = 16 << 20

// Dial makes a client for the containerd that listens on socket. It does not
// connect yet: an absent containerd is an error of the calls.
func Dial(socket string) (*Containerd, error) {
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithDisableServiceConfig(),
		// Calls are small and local: without a fixed window grpc estimates the capacity
		// of the link, and sends a ping for it with every answer.
		grpc.WithStaticStreamWindowSize(1<<20), grpc.WithStaticConnWindowSize(1<<20),
		grpc.WithDisableRetry(),
	)
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", socket, err)
	}
	return &Containerd{
		conn:       conn,
		images:     imagesapi.NewImagesClient(conn),
		content:    contentapi.NewContentClient(conn),
		snapshots:  snapshotsapi.NewSnapshotsClient(conn),
		containers: containersapi.NewContainersClient(conn),
		sandboxes:  sandboxapi.NewStoreClient(conn),
		plugins:    introspectionapi.NewIntrospectionClient(conn),
	}, nil
}

// Close ends the connection.
func (c *Containerd) Close() error { return c.conn.Close() }

func inNamespace(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", Namespace)
}

// ErrTooMany is wrapped if what was asked for does not fit one answer.
var ErrTooMany = errors.New("more than one answer of containerd may hold")

func wrap(what string, err error) error {
	if status.Code(err) == codes.NotFound {
		return fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	return fmt.Errorf("containerd: %s: %w", what, err)
}

// Image returns what the image record name points to.
func (c *Containerd) Image(ctx context.Context, name string) (ocispec.Descriptor, error) {
	r, err := c.images.Get(inNamespace(ctx), &imagesapi.GetImageRequest{Name: name})
	if err != nil {
		return ocispec.Descriptor{}, wrap("image record "+text.Quote(name, 160), err)
	}
	t := r.GetImage().GetTarget()
	return ocispec.Descriptor{MediaType: t.GetMediaType(), Digest: digest.Digest(t.GetDigest()), Size: t.GetSize()}, nil
}

// Images returns the image records of the node, in no order.
func (c *Containerd) Images(ctx context.Context) ([]Record, error) {
	r, err := c.images.List(inNamespace(ctx), &imagesapi.ListImagesRequest{})
	if status.Code(err) == codes.ResourceExhausted { // by grpc, on either side
		return nil, fmt.Errorf("image records: %w (%d MiB)", ErrTooMany, maxAnswer>>20)
	}
	if err != nil {
		return nil, wrap("image records", err)
	}
	var list []Record
	for _, i := range r.GetImages() {
		t := i.GetTarget()
		list = append(list, Record{i.GetName(), ocispec.Descriptor{MediaType: t.GetMediaType(), Digest: digest.Digest(t.GetDigest()), Size: t.GetSize()}})
	}
	return list, nil
}

// Blob is a Reader of the content store.
func (c *Containerd) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > MaxBlob {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous,
			Detail: fmt.Sprintf("blob %s is said to have %d bytes; no more than %d are read", text.Clean(d.Digest.String(), 96), d.Size, MaxBlob)}
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, &verify.Fault{Reason: verify.ImageAmbiguous, Detail: "a descriptor has no valid digest"}
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream where it is left early
	defer cancel()
	s, err := c.content.Read(inNamespace(ctx), &contentapi.ReadContentRequest{Digest: d.Digest.String()})
	if err != nil {
		return nil, wrap("blob "+d.Digest.String(), err)
	}
	raw := make([]byte, 0, d.Size)
	for {
		r, err := s.Recv()
		if err == io.EOF {
			return checked(raw, d)
		}
		if err != nil {
			return nil, wrap("blob "+d.Digest.String(), err)
		}
		if raw = append(raw, r.GetData()...); int64(len(raw)) > d.Size {
			return checked(raw, d) // longer than it says: a fault
		}
	}
}

// Pulled reports whether containerd has noted a registry that a blob came from. A pull
// through the client or the transfer service notes it on each blob
// (core/remotes/docker/handler.go), an import from an archive does not.
func (c *Containerd) Pulled(ctx context.Context, blob digest.Digest) (bool, error) {
	r, err := c.content.Info(inNamespace(ctx), &contentapi.InfoRequest{Digest: blob.String()})
	if err != nil {
		return false, wrap("blob "+blob.String(), err)
	}
	for label := range r.GetInfo().GetLabels() {
		if strings.HasPrefix(label, "containerd.io/distribution.source.") {
			return true, nil
		}
	}
	return false, nil
}

// Snapshot returns what is known of an active snapshot.
func (c *Containerd) Snapshot(ctx context.Context, snapshotter, key string) (Snapshot, error) {
	r, err := c.snapshots.Stat(inNamespace(ctx), &snapshotsapi.StatSnapshotRequest{Snapshotter: snapshotter, Key: key})
	if err != nil {
		return Snapshot{}, wrap("snapshot "+text.Quote(key, 96)+" of "+snapshotter, err)
	}
	return Snapshot{Parent: r.GetInfo().GetParent(), Labels: r.GetInfo().GetLabels()}, nil
}

// Snapshotters lists the snapshotters that this containerd has loaded.
func (c *Containerd) Snapshotters(ctx context.Context) ([]string, error) {
	r, err := c.plugins.Plugins(inNamespace(ctx), &introspectionapi.PluginsRequest{Filters: []string{"type==io.containerd.snapshotter.v1"}})
	if err != nil {
		return nil, wrap("plugins", err)
	}
	var names []string
	for _, p := range r.GetPlugins() {
		if p.GetInitErr() == nil {
			names = append(names, p.GetID())
		}
	}
	return names, nil
}

// SandboxRuntime returns the runtime type of a pod sandbox, such as
// "io.containerd.runc.v2": the one that its containers are created with. Like the
// CRI plugin (runtimeInfo in container_create.go) it looks for the pause container
// where there is no sandbox: pods that outlived an upgrade from containerd 1.7.
func (c *Containerd) SandboxRuntime(ctx context.Context, id string) (string, error) {
	r, err := c.sandboxes.Get(inNamespace(ctx), &sandboxapi.StoreGetRequest{SandboxID: id})
	if status.Code(err) == codes.NotFound {
		pause, err := c.containers.Get(inNamespace(ctx), &containersapi.GetContainerRequest{ID: id})
		if err != nil {
			return "", wrap("sandbox "+text.Quote(id, 96), err)
		}
		return pause.GetContainer().GetRuntime().GetName(), nil
	}
	if err != nil {
		return "", wrap("sandbox "+text.Quote(id, 96), err)
	}
	return r.GetSandbox().GetRuntime().GetName(), nil
}

// criMetadata is the extension in which the CRI plugin keeps what it knows of a
// container, as JSON (internal/cri/store/container/metadata.go).
const criMetadata = "io.cri-containerd.container.metadata"

// ContainerConfig returns the digest of the image config with which a container
// was created. The record exists once the creation is through.
func (c *Containerd) ContainerConfig(ctx context.Context, id string) (digest.Digest, error) {
	r, err := c.containers.Get(inNamespace(ctx), &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return "", wrap("container "+text.Quote(id, 96), err)
	}
	return imageRef(r.GetContainer().GetExtensions()[criMetadata].GetValue())
}
