package node

import (
	"errors"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

func TestDetect(t *testing.T) {
	both := nodetest.K3s.With(nodetest.Kubeadm).With(nodetest.Tree{"/run/containerd/containerd.sock": "-"})
	for name, tt := range map[string]struct {
		files                         nodetest.Tree
		o                             Options
		want, service, manager, fails string
	}{
		"kubeadm":           {files: nodetest.Kubeadm, want: "containerd", service: "containerd", manager: "systemd"},
		"no config.toml":    {files: nodetest.None, want: "containerd", service: "containerd", manager: "systemd"},
		"k3s":               {files: nodetest.K3s, want: "k3s", service: "k3s-agent", manager: "systemd"},
		"k3s on Alpine":     {files: nodetest.Tree{"/sbin/openrc-run": "#", "/etc/init.d/k3s": "#", nodetest.K3sDir + "config.toml": "#"}, want: "k3s", service: "k3s", manager: "openrc"},
		"RKE2":              {files: nodetest.Rke2, want: "rke2", service: "rke2-server", manager: "systemd"},
		"MicroK8s":          {files: nodetest.Microk8s, want: "microk8s", service: "snap.microk8s.daemon-containerd", manager: "systemd"},
		"idle Docker":       {files: both, want: "k3s", service: "k3s-agent", manager: "systemd"},
		"Docker runs":       {files: nodetest.K3s.With(nodetest.Kubeadm).With(nodetest.Tree{"/run/containerd/containerd.sock": "x"}), fails: "k3s and containerd are installed here"},
		"kubeadm, by name":  {files: nodetest.K3s.With(nodetest.Kubeadm), o: Options{Runtime: "kubeadm"}, want: "containerd", service: "containerd", manager: "systemd"},
		"chosen":            {files: nodetest.K3s.With(nodetest.Kubeadm), o: Options{Runtime: "containerd"}, want: "containerd", service: "containerd", manager: "systemd"},
		"nothing":           {files: nodetest.Tree{"/etc/hosts": "x"}, fails: "neither k3s nor rke2 nor microk8s nor containerd is installed"},
		"nothing, to open":  {files: nodetest.Tree{"/etc/hosts": "x"}, o: Options{Optional: true}, manager: "none"},
		"named":             {files: nodetest.Tree{"/etc/hosts": "x"}, o: Options{Runtime: "k3s"}, want: "k3s", manager: "none"},
		"unknown":           {files: nodetest.Kubeadm, o: Options{Runtime: "docker"}, fails: `--runtime: "docker" is not known`},
		"unknown, to open":  {files: nodetest.Kubeadm, o: Options{Runtime: "docker", Optional: true}, fails: `--runtime: "docker" is not known`},
		"unknown service":   {files: nodetest.Kubeadm, o: Options{Service: "runit"}, fails: `--service: "runit" is not known`},
		"own configuration": {files: nodetest.K3s, o: Options{Config: "/opt/c/config.toml"}, want: "containerd", manager: "systemd"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.o.Root = tt.files.Make(t)
			h, err := Detect(tt.o)
			if tt.fails != "" {
				hint := (*Hint)(nil)
				if err == nil || !strings.Contains(err.Error(), tt.fails) || !errors.As(err, &hint) || hint.Next == "" {
					t.Fatalf("want %q with a hint, got %v", tt.fails, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Name != tt.want || h.Service != tt.service || h.Manager.Name != tt.manager {
				t.Errorf("got %s, service %q, %s", h.Name, h.Service, h.Manager.Name)
			}
		})
	}
}
