package containerd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
)

// longList is an image service with one record, whose name is as long as the list of a
// node with very many.
type longList struct {
	imagesapi.UnimplementedImagesServer
	bytes int
}

func (l longList) List(context.Context, *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	return &imagesapi.ListImagesResponse{Images: []*imagesapi.Image{{Name: strings.Repeat("a", l.bytes), Target: &types.Descriptor{}}}}, nil
}

// TestImagesTooMany: a list that does not fit one answer is told from a containerd that
// does not answer.
func TestImagesTooMany(t *testing.T) {
	for bytes, want := range map[int]error{1 << 20: nil, maxAnswer: ErrTooMany} {
		socket := filepath.Join(t.TempDir(), "c.sock")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer()
		imagesapi.RegisterImagesServer(srv, longList{bytes: bytes})
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(srv.Stop)
		c, err := Dial(socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if list, err := c.Images(t.Context()); !errors.Is(err, want) || (err == nil) != (len(list) == 1) {
			t.Errorf("%d bytes: %d records, %v", bytes, len(list), err)
		}
	}
}
