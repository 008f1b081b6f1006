package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/nri/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/tidewaiter/tidewaiter/nri/tally"
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

// record is what containerd keeps of a container of a pod, or with an empty name of the
// pod, of n bytes.
func record(t *testing.T, pod, name string, n int) *containersapi.Container {
	t.Helper()
	c, _ := long(t, pod, n, name == "")
	c.ID = pod
	if name == "" {
		return c
	}
	c.ID += "-" + name
	raw, err := json.Marshal(map[string]any{"Version": "v1", "Metadata": map[string]any{
		"ID": c.ID, "SandboxID": pod, "Config": map[string]any{"metadata": map[string]any{"name": name}, "labels": map[string]string{}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	c.Extensions[criMetadata] = &anypb.Any{Value: raw}
	return c
}

// TestLengthOf: no pod or container counts for less than NRI takes, and none that is
// long for much more, or a few that are allowed would keep the gate away.
func TestLengthOf(t *testing.T) {
	for _, n := range []int{0, 100, 40 << 10, 100 << 10, 1 << 20} {
		for _, pod := range []bool{true, false} {
			c, told := long(t, "p", n, pod)
			got := lengthOf(c)
			if most := max(told+told/8+tally.Rest, maxUnread); got.Size < told || got.Size > most {
				t.Errorf("pod %t of %d bytes: %d, want from %d to %d", pod, n, got.Size, told, most)
			}
			want := map[bool]string{true: "pod team/p", false: "container app of pod team/p"}[pod]
			if n >= 100<<10 && got.Text != want {
				t.Errorf("it is called %q, want %q", got.Text, want)
			}
		}
	}
	// What is no JSON counts as it stands.
	c, _ := long(t, "p", 1<<20, true)
	c.Spec.Value, c.Extensions[criSandbox].Value = make([]byte, 1<<20), make([]byte, 1<<20)
	if got := lengthOf(c); got.Size < 5<<19 {
		t.Errorf("a broken record counts for %d bytes", got.Size)
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

// messageBytes is more than a message of NRI holds.
const messageBytes = 4 << 20

func large(ctx context.Context, c *Containerd) (string, error) {
	return tally.New(c, time.Now, func() {}).Large(ctx)
}

func TestLarge(t *testing.T) {
	for name, tt := range map[string]struct {
		pods, containers []int  // bytes of each
		want             string // part of what is said
	}{
		"an empty node":                      {},
		"a full node":                        {pods: many(30, 4<<10), containers: many(60, 20<<10)},
		"all as long as they may be":         {pods: many(6, 270<<10), containers: many(6, 270<<10)},
		"a pod that no message has room for": {pods: append(many(20, 100), messageBytes), want: "pod team/p20 (4"},
		"such a container":                   {pods: many(4, 100), containers: []int{messageBytes}, want: "container app of pod team/c0 (4"},
		"one whose record nobody reads":      {containers: []int{9 << 20}, want: "more than 16 MiB"},
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
			why, err := large(t.Context(), c)
			if err != nil || (why == "") != (tt.want == "") || !strings.Contains(why, tt.want) || len(why) > 700 {
				t.Errorf("%q, %v", why, err)
			}
		})
	}
	c := serveContainers(t, containersapi.UnimplementedContainersServer{})
	if why, err := large(t.Context(), c); err == nil || why != "" {
		t.Errorf("containerd does not answer, and Large says %q, %v", why, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := large(ended, c); err == nil {
		t.Error("no error, and nobody was asked")
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
	one, _ := long(t, "c", messageBytes, false)
	one.ID = "one"
	foreign := proto.CloneOf(one)
	foreign.ID, foreign.Labels = "foreign", nil
	l.list = append(l.list, one, foreign)
	p.list = append(p.list, &task.Process{ID: one.ID, Status: task.Status_STOPPED}, &task.Process{ID: foreign.ID, Status: task.Status_RUNNING})
	with := func(s *grpc.Server) { tasksapi.RegisterTasksServer(s, p) }
	if why, err := large(t.Context(), serveContainers(t, l, with)); err != nil || why != "" {
		t.Errorf("it has ended, and Large says %q, %v", why, err)
	}
	p.list[0].Status = task.Status_PAUSED
	if why, err := large(t.Context(), serveContainers(t, l, with)); err != nil || why == "" {
		t.Errorf("it runs, and Large says nothing, %v", err)
	}
}

// TestLengths: each record is handed over with the pod that it belongs to.
func TestLengths(t *testing.T) {
	l := listed{list: []*containersapi.Container{record(t, "a", "", 100), record(t, "a", "runs", 100), record(t, "a", "ended", 100)}}
	strange := record(t, "b", "c", 100)
	strange.Extensions = nil
	l.list = append(l.list, strange)
	p := processes{list: []*task.Process{{ID: "a-runs", Status: task.Status_RUNNING}, {ID: "a-ended", Status: task.Status_STOPPED}}}
	var got []string
	err := serveContainers(t, l, func(s *grpc.Server) { tasksapi.RegisterTasksServer(s, p) }).Lengths(t.Context(), func(l tally.Length) {
		got = append(got, fmt.Sprintf("%s/%s %t %t", l.Pod, l.Name, l.Sandbox, l.Told))
		if l.Size < 100 {
			t.Errorf("%+v", l)
		}
	})
	if want := []string{"a/ true true", "a/runs false true", "a/ended false false", "/ false false"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

func serveContainers(t *testing.T, s containersapi.ContainersServer, with ...func(*grpc.Server)) *Containerd {
	t.Helper()
	return serveWith(t, s, nil, with...)
}

func serveWith(t *testing.T, s containersapi.ContainersServer, options []grpc.ServerOption, with ...func(*grpc.Server)) *Containerd {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw") // short: unix socket paths have little room
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "c.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
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
