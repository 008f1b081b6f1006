package hook

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"

	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify"
)

// kept is what a runtime has of containers that were created.
type kept struct{ list []*api.Container }

func (k *kept) Lengths(_ context.Context, yield func(tally.Length)) error {
	for _, c := range k.list {
		yield(tally.Length{Pod: c.PodSandboxId, Name: c.Name, Told: true, Size: proto.Size(c), Text: c.Name})
	}
	return nil
}

// TestManySmallContainers: one pod may have 300 containers as small as the smallest that
// a kubelet makes, before and after the gate has looked at what there is, and the gate
// can then register again.
func TestManySmallContainers(t *testing.T) {
	const most = 300
	dir := socketDir(t)
	// What the runtime tells a plugin that registers: the first time of none.
	told := make([]*api.Container, most)
	for i := range told {
		told[i] = &api.Container{}
	}
	rt := startRuntime(t, dir, "v2.4.2", told...)
	socket := filepath.Join(dir, "link.sock")
	l := newLink(t, socket, rt.socket)
	g := prepare(socket, resolves(image("good")), decider(verify.Enforce))
	have := &kept{}
	count := tally.New(have, time.Now, func() {})
	g.Gate.Tally, g.Large = count, count.Large
	g.begin(t)
	g.waitRegistered(t, true)
	for i := range most {
		c := &api.Container{
			Id: fmt.Sprint("c", i), Name: fmt.Sprint("main-", i), PodSandboxId: "pod",
			Env: []string{"TEXT=" + strings.Repeat("x", 2472)}, // as was measured with containerd 2.3.7
		}
		unblock := rt.BlockPluginSync()
		_, err := rt.CreateContainer(t.Context(), &api.CreateContainerRequest{Pod: &api.PodSandbox{Id: "pod", Name: "p", Namespace: "ns"}, Container: c})
		unblock.Unblock()
		if err != nil {
			t.Fatalf("container %d: %v", i, err)
		}
		told[i] = c
		if have.list = append(have.list, c); i == most/2 {
			if why, err := count.Large(t.Context()); why != "" || err != nil {
				t.Fatal(why, err)
			}
		}
	}
	g.waitAgain(t, l.cut)
	l.close()
	g.stop()
	rt.Stop()
}
