package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/nri/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// long returns a record as containerd keeps it of a pod or container with n bytes of
// what its author can make long, and how many NRI needs to tell of that.
func long(t *testing.T, name string, n int, pod bool) (*containersapi.Container, int) {
	t.Helper()
	labels, annotations := map[string]string{}, map[string]string{}
	var env []string
	for i := 0; n > 0; i++ {
		v := strings.Repeat("<xxxxxxx", 125)[:min(n, 1000)] // of which "<" has six bytes in JSON
		n -= len(v)
		switch {
		case pod && i%2 == 0:
			labels[fmt.Sprintf("label-%d", i)] = v
		case !pod && i%2 == 0:
			env = append(env, fmt.Sprintf("ENV_%d=%s", i, v))
		default:
			annotations[fmt.Sprintf("annotation-%d", i)] = v
		}
	}
	c := &containersapi.Container{ID: strings.Repeat("0", 64), Labels: map[string]string{labelKind: string(KindContainer)}, Extensions: map[string]*anypb.Any{}}
	own := map[string]string{annotationNamespace: "team", annotationPod: name, annotationContainer: "app"}
	spec := map[string]any{"process": map[string]any{"args": []string{"/app"}, "env": env}, "annotations": own,
		"mounts": []map[string]any{{"source": "/var/lib/kubelet/x", "destination": "/etc/hosts", "options": []string{"rbind"}}}}
	extension := criMetadata
	if pod {
		c.Labels[labelKind], extension = string(KindSandbox), criSandbox
		for k, v := range labels {
			c.Labels[k] = v
		}
	}
	marshal := func(v any) *anypb.Any {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return &anypb.Any{Value: raw}
	}
	c.Spec = marshal(spec)
	c.Extensions[extension] = marshal(map[string]any{"Version": "v1", "Metadata": map[string]any{"Config": map[string]any{
		"labels": labels, "annotations": annotations, "envs": env, // once more, as containerd has them
	}}})
	for k, v := range own {
		annotations[k] = v
	}
	var told proto.Message = &api.PodSandbox{Id: c.ID, Labels: labels, Annotations: annotations}
	if !pod {
		told = &api.Container{Id: c.ID, Labels: labels, Annotations: annotations, Env: env, Args: []string{"/app"}}
	}
	return c, proto.Size(told)
}

// TestSizeOf: no pod or container counts for less than NRI takes, and none that is
// long for much more, or a few that are allowed would keep the gate away.
func TestSizeOf(t *testing.T) {
	for _, n := range []int{0, 100, 40 << 10, 100 << 10, 1 << 20} {
		for _, pod := range []bool{true, false} {
			c, told := long(t, "p", n, pod)
			got := sizeOf(c)
			if most := max(told+told/8+rest, short); got.size < told || got.size > most {
				t.Errorf("pod %t of %d bytes: %d, want from %d to %d", pod, n, got.size, told, most)
			}
			want := map[bool]string{true: "pod team/p", false: "container app of pod team/p"}[pod]
			if n >= 100<<10 && got.what != want {
				t.Errorf("it is called %q, want %q", got.what, want)
			}
		}
	}
	// What is no JSON counts as it stands.
	c, _ := long(t, "p", 1<<20, true)
	c.Spec.Value, c.Extensions[criSandbox].Value = make([]byte, 1<<20), make([]byte, 1<<20)
	if got := sizeOf(c); got.size < 5<<19 {
		t.Errorf("a broken record counts for %d bytes", got.size)
	}
}

// TestMember: what is cut or damaged anywhere is read as something, or not at all, and
// what is whole as encoding/json does.
func TestMember(t *testing.T) {
	raw := []byte(`{"a":"x\\\"},{","list":[1,{"b":"]"}],"n":-1.5e3,"":null,"in":{"deep":{"k":"\u003c\u2028\\\\"}},"last":true}`)
	for key, want := range map[string]string{
		"a": `"x\\\"},{"`, "list": `[1,{"b":"]"}]`, "n": "-1.5e3", "": "null", "in": `{"deep":{"k":"\u003c\u2028\\\\"}}`, "last": "true", "b": "", "deep": "",
	} {
		if got := string(member(raw, key)); got != want {
			t.Errorf("%q is %s, want %s", key, got, want)
		}
	}
	if got, want := plainly(member(member(raw, "in"), "deep")), len(`{"k":"<`+"\u2028"+`\\"}`); got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
	for i := range raw {
		for _, b := range []byte("{}[]\",:\\u0") {
			broken := bytes.Clone(raw)
			broken[i] = b
			for _, key := range []string{"a", "in", "last", "none"} {
				v := member(broken[:i], key)
				_, _ = plainly(v), plainly(member(broken, key))
				_ = member(broken[i:], key)
			}
		}
	}
}

type listed struct {
	containersapi.UnimplementedContainersServer
	list []*containersapi.Container
}

func (l listed) ListStream(_ *containersapi.ListContainersRequest, to containersapi.Containers_ListStreamServer) error {
	if _, err := find(to.Context(), map[string]string{"": ""}, ""); err != nil {
		return err
	}
	for _, c := range l.list {
		if err := to.Send(&containersapi.ListContainerMessage{Container: c}); err != nil {
			return err
		}
	}
	return nil
}

func TestLarge(t *testing.T) {
	for name, tt := range map[string]struct {
		pods, containers []int  // bytes of each
		want             string // part of what is said
	}{
		"an empty node":                       {},
		"a full node":                         {pods: many(30, 4<<10), containers: many(60, 20<<10)},
		"all as long as they may be":          {pods: many(6, 270<<10), containers: many(6, 270<<10)},
		"one long one among others":           {pods: many(20, 4<<10), containers: append(many(20, 20<<10), 1<<20)},
		"pods of a MiB":                       {pods: many(4, 1<<20), want: "pod team/p"},
		"containers of a MiB":                 {containers: many(4, 1<<20), want: "container app of pod team/c"},
		"one whose record nobody reads":       {containers: []int{9 << 20}, want: "longer than 16 MiB"},
		"a few long ones among others":        {pods: append(many(20, 100), many(4, 1<<20)...)}, // which NRI gets through in most orders
		"the long ones last":                  {pods: append(many(20, 100), many(9, 1<<20)...), want: "pod team/p"},
		"eleven that are a little too long":   {containers: many(11, 400<<10)},
		"many that are a little too long":     {pods: many(12, 4<<10), containers: many(16, 350<<10)},
		"one that no message has room for":    {pods: []int{5 << 20}, want: "pod team/p0 (5"},
		"together no more than fit a message": {containers: many(3, 1<<20)},
	} {
		t.Run(name, func(t *testing.T) {
			var l listed
			for i, n := range tt.pods {
				c, _ := long(t, fmt.Sprintf("p%d", i), n, true)
				l.list = append(l.list, c)
			}
			for i, n := range tt.containers {
				c, _ := long(t, fmt.Sprintf("c%d", i), n, false)
				l.list = append(l.list, c)
			}
			c := serveContainers(t, l)
			why, err := c.Large(t.Context())
			if err != nil || (why == "") != (tt.want == "") || !strings.Contains(why, tt.want) || len(why) > 700 {
				t.Errorf("%q, %v", why, err)
			}
		})
	}
	c := serveContainers(t, containersapi.UnimplementedContainersServer{})
	if why, err := c.Large(t.Context()); err == nil || why != "" {
		t.Errorf("containerd does not answer, and Large says %q, %v", why, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Large(ended); err == nil {
		t.Error("no error, and nobody was asked")
	}
}

// Nothing that the gate lets be ends the runtime, however much there is of it.
func TestAdmittedIsNotTooLarge(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	for range 500 {
		pods, containers := make([]int, random.IntN(120)), make([]int, random.IntN(240))
		for _, list := range [][]int{pods, containers} {
			most := 1 + random.IntN(330<<10) // what 300 KiB count for, with what is beside
			for i := range list {
				list[i] = random.IntN(most)
				if random.IntN(4) == 0 {
					list[i] = most
				}
			}
		}
		if synchronize(pods, containers) == endsRuntime {
			t.Fatalf("%d and %d", pods, containers)
		}
	}
}

func TestSynchronize(t *testing.T) {
	for _, tt := range []struct {
		pods, containers []int
		want             outcome
	}{
		{nil, nil, through},
		{many(1, 5<<20), nil, dropsPlugin},
		{many(4, 1<<20), many(4, 1<<20), dropsPlugin},
		{many(2, 100), many(10, 1<<20), endsRuntime},
		{many(10, 1<<20), nil, endsRuntime},
		{many(10, 1<<20), many(10, 100), dropsPlugin},
		{many(20, 300<<10), many(20, 300<<10), through},
		{many(5, 4<<10), many(80, 290<<10), dropsPlugin},
	} {
		if got := synchronize(tt.pods, tt.containers); got != tt.want {
			t.Errorf("%d pods and %d containers: %d, want %d", len(tt.pods), len(tt.containers), got, tt.want)
		}
	}
}

func many(n, bytes int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = bytes
	}
	return list
}

type processes struct {
	tasksapi.UnimplementedTasksServer
	list []*task.Process
}

func (p processes) List(context.Context, *tasksapi.ListTasksRequest) (*tasksapi.ListTasksResponse, error) {
	return &tasksapi.ListTasksResponse{Tasks: p.list}, nil
}

// NRI is not told of containers that have ended, which can be many, nor of those that
// are not CRI's.
func TestEndedIsNotLarge(t *testing.T) {
	var l listed
	var p processes
	one, _ := long(t, "c", 1<<20, false)
	for i := range 12 {
		c := proto.CloneOf(one)
		c.ID = fmt.Sprintf("%064d", i)
		l.list = append(l.list, c)
		if i < 3 {
			p.list = append(p.list, &task.Process{ID: c.ID, Status: task.Status_RUNNING})
		} else if i < 6 {
			p.list = append(p.list, &task.Process{ID: c.ID, Status: task.Status_STOPPED})
		}
	}
	p.list = append(p.list, &task.Process{ID: one.ID, Status: task.Status_RUNNING})
	foreign := proto.CloneOf(one)
	foreign.Labels = nil
	for range 12 {
		l.list = append(l.list, foreign)
	}
	with := func(s *grpc.Server) { tasksapi.RegisterTasksServer(s, p) }
	if why, err := serveContainers(t, l, with).Large(t.Context()); err != nil || why != "" {
		t.Errorf("three run, and Large says %q, %v", why, err)
	}
	for i := range 6 {
		p.list = append(p.list, &task.Process{ID: l.list[6+i].ID, Status: task.Status_PAUSED})
	}
	if why, err := serveContainers(t, l, with).Large(t.Context()); err != nil || why == "" {
		t.Errorf("nine run, and Large says nothing, %v", err)
	}
}

func serveContainers(t *testing.T, s containersapi.ContainersServer, with ...func(*grpc.Server)) *Containerd {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw") // short: unix socket paths have little room
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "c.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	containersapi.RegisterContainersServer(server, s)
	for _, register := range with {
		register(server)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	c, err := Dial(filepath.Join(dir, "c.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		server.Stop()
		<-served
		os.RemoveAll(dir)
	})
	return c
}
