package nri

import (
	"bytes"
	"fmt"
	"maps"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
)

// told is a container as containerd tells of it, with everything that NRI knows.
func told() *api.Container {
	c := &api.Container{
		Id: "c1", PodSandboxId: "p1", Name: "main", State: api.ContainerState_CONTAINER_CREATED, Pid: 7,
		Labels: map[string]string{"a": "b"}, Annotations: map[string]string{imageName: "registry.example/app:1"},
		Args: []string{"/bin/app", "--password=hunter2"}, Hooks: &api.Hooks{Prestart: []*api.Hook{{Path: "/hook"}}},
		Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1, Soft: 1}}, CDIDevices: []*api.CDIDevice{{Name: "vendor/gpu=0"}},
		User: &api.User{Uid: 1}, Image: &api.Image{Name: "registry.example/app:1", Digest: "sha256:a", ConfigDigest: "sha256:b"},
		Linux: &api.LinuxContainer{CgroupsPath: "/pods/x", SeccompPolicy: &api.LinuxSeccomp{DefaultAction: "deny"}},
	}
	for i := range 40 {
		c.Env = append(c.Env, fmt.Sprintf("TOKEN_%d=%050d", i, i))
	}
	for i := range 12 {
		c.Mounts = append(c.Mounts, &api.Mount{Destination: fmt.Sprintf("/m%d", i), Source: "/var/lib/kubelet/pods/x", Type: "bind", Options: []string{"rbind", "rprivate", "rw"}})
	}
	for i := range 400 {
		c.Linux.SeccompPolicy.Syscalls = append(c.Linux.SeccompPolicy.Syscalls, &api.LinuxSyscall{Names: []string{fmt.Sprintf("call%d", i)}, Action: "allow"})
	}
	return c
}

func creation() *api.ValidateContainerAdjustmentRequest {
	return &api.ValidateContainerAdjustmentRequest{
		Pod: &api.PodSandbox{Id: "p1", Name: "p", Uid: "u", Namespace: "ns", Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
			RuntimeHandler: "runc", Linux: &api.LinuxPodSandbox{CgroupParent: "/pods"}, Pid: 3, Ips: []string{"10.0.0.1"}},
		Container: told(),
		Adjust:    &api.ContainerAdjustment{Args: []string{"/bin/other"}, Env: []*api.KeyValue{{Key: "a", Value: "b"}}},
		Update:    []*api.ContainerUpdate{{ContainerId: "c2"}},
		Owners:    &api.OwningPlugins{Owners: map[string]*api.FieldOwners{"c1": {Simple: map[int32]string{1: "10-other"}}}},
		Plugins:   []*api.PluginInstance{{Name: "tidewaiter", Index: "99"}},
	}
}

// decoder is what the NRI library decodes raw with.
func decoder(raw []byte) func(any) error {
	return func(v any) error { return proto.Unmarshal(raw, v.(proto.Message)) }
}

// TestLean: what is dropped is gone and everything else is there.
func TestLean(t *testing.T) {
	want := creation()
	raw, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got := &api.ValidateContainerAdjustmentRequest{}
	if err := lean(decoder(raw), new(lengths))(got); err != nil {
		t.Fatal(err)
	}
	p, c := want.Pod, want.Container
	p.Labels, p.Linux = nil, nil
	c.Labels, c.Args, c.Env, c.Hooks, c.Linux, c.Rlimits, c.CDIDevices = nil, nil, nil, nil, nil, nil, nil
	for _, m := range c.Mounts {
		m.Type, m.Options = "", nil
	}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	// The other hook's question is of the same form, and other messages stay whole.
	audited := &api.CreateContainerRequest{}
	if err := lean(decoder(raw), new(lengths))(audited); err != nil || !proto.Equal(audited.Container, want.Container) || !proto.Equal(audited.Pod, want.Pod) {
		t.Errorf("%v, got %v", err, audited)
	}
	whole := &api.Container{}
	raw, _ = proto.Marshal(told())
	if err := lean(decoder(raw), new(lengths))(whole); err != nil || !proto.Equal(whole, told()) {
		t.Errorf("%v, got %v", err, whole)
	}
	raw, _ = proto.Marshal(&api.SynchronizeRequest{Containers: []*api.Container{told()}, Pods: []*api.PodSandbox{{Id: "p1"}}, More: true})
	all := &api.SynchronizeRequest{}
	if err := lean(decoder(raw), new(lengths))(all); err != nil || !proto.Equal(all, &api.SynchronizeRequest{More: true}) {
		t.Errorf("%v, got %v", err, all)
	}
}

// TestLeanOfBrokenMessages: what cannot be decoded whole is an error, and what can
// says the same without what is dropped, wherever a byte is wrong or missing.
func TestLeanOfBrokenMessages(t *testing.T) {
	small := creation()
	small.Container.Linux, small.Container.Env, small.Container.Mounts = nil, small.Container.Env[:1], small.Container.Mounts[:1]
	raw, err := proto.Marshal(small)
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	try := func(raw []byte) {
		t.Helper()
		whole, got := &api.ValidateContainerAdjustmentRequest{}, &api.ValidateContainerAdjustmentRequest{}
		before := bytes.Clone(raw)
		bad, err := proto.Unmarshal(raw, whole), lean(decoder(raw), new(lengths))(got)
		if !bytes.Equal(before, raw) {
			t.Fatal("the message was changed")
		}
		if err != nil {
			failed++
			if bad == nil {
				t.Fatalf("%x: %v", raw, err)
			}
			return
		}
		if bad != nil {
			return // in what is dropped
		}
		if got.GetContainer().GetId() != whole.GetContainer().GetId() || !proto.Equal(got.GetContainer().GetImage(), whole.GetContainer().GetImage()) ||
			!maps.Equal(got.GetContainer().GetAnnotations(), whole.GetContainer().GetAnnotations()) ||
			len(got.GetContainer().GetMounts()) != len(whole.GetContainer().GetMounts()) || got.GetPod().GetId() != whole.GetPod().GetId() ||
			!proto.Equal(got.GetAdjust(), whole.GetAdjust()) || !proto.Equal(got.GetOwners(), whole.GetOwners()) || len(got.GetPlugins()) != len(whole.GetPlugins()) {
			t.Fatalf("%x: got %v, want of %v", raw, got, whole)
		}
	}
	for i := range raw {
		try(raw[:i])
		for _, x := range []byte{0x01, 0x02, 0x80, 0xff} {
			b := bytes.Clone(raw)
			b[i] ^= x
			try(b)
		}
	}
	if failed < len(raw)/2 {
		t.Errorf("%d of %d broken messages were refused", failed, 5*len(raw))
	}
	// Nothing is taken for an empty message: not what was cut off, and not a pod or a
	// container that is none.
	for _, broken := range [][]byte{raw[:len(raw)-1], {0x0a}, {0x0a, 1, 0x07}, {0x12, 2, 0x4a, 5}} {
		if got := (&api.ValidateContainerAdjustmentRequest{}); lean(decoder(broken), new(lengths))(got) == nil {
			t.Errorf("%x is read as %v", broken, got)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	raw, err := proto.Marshal(creation())
	if err != nil {
		b.Fatal(err)
	}
	for name, decode := range map[string]func(any) error{"lean": lean(decoder(raw), new(lengths)), "all": decoder(raw)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := decode(&api.ValidateContainerAdjustmentRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
