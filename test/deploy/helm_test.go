package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// wanted asks for the tests that build what takes long (make e2e-k8s).
const wanted = "TIDEWAITER_TEST_KUBERNETES"

// objects are those of a YAML stream, by kind and name.
func objects(t *testing.T, raw []byte) map[string]map[string]any {
	t.Helper()
	m := map[string]map[string]any{}
	for d := yaml.NewDecoder(bytes.NewReader(raw)); ; {
		var o map[string]any
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return m
		}
		must(t, err)
		m[o["kind"].(string)+" "+o["metadata"].(map[string]any)["name"].(string)] = o
	}
}

// at is what lies at a path of keys, and of names in lists.
func at(t *testing.T, o any, path ...string) any {
	t.Helper()
	for _, key := range path {
		switch v := o.(type) {
		case map[string]any:
			o = v[key]
		case []any:
			o = nil
			for _, e := range v {
				if e.(map[string]any)["name"] == key {
					o = e
				}
			}
		}
	}
	if o == nil {
		t.Fatalf("there is no %s", strings.Join(path, "."))
	}
	return o
}

// The chart makes what the manifest has, but for where the configuration comes from,
// and says it of each kind of node as its kustomization does.
func TestChart(t *testing.T) {
	if os.Getenv(wanted) == "" {
		t.Skip("NOT RUN: helm takes five minutes to build; make e2e-k8s does")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	helm, err := node.FindHelm(ctx, t.Output())
	must(t, err)
	run := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, helm, args...)
		cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+t.TempDir(), "HELM_CONFIG_HOME="+t.TempDir(), "HELM_DATA_HOME="+t.TempDir())
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Run(); err != nil {
			return nil, errors.New(err.Error() + "\n" + stderr.String() + out.String())
		}
		return out.Bytes(), nil
	}
	template := func(args ...string) map[string]map[string]any {
		t.Helper()
		out, err := run(append([]string{"template", "tidewaiter", "../../deploy/helm", "--namespace", "tidewaiter-system", "--kube-version", "1.36.0"}, args...)...)
		must(t, err)
		return objects(t, out)
	}
	_, err = run("lint", "--strict", "../../deploy/helm")
	must(t, err)

	raw, err := os.ReadFile(manifest)
	must(t, err)
	plain, chart := objects(t, raw), template()
	if got, want := at(t, chart["ConfigMap tidewaiter"], "data"), at(t, plain["ConfigMap tidewaiter-audit"], "data"); !reflect.DeepEqual(got, want) {
		t.Errorf("the configuration is %v, want %v", got, want)
	}
	volumes := []string{"spec", "template", "spec", "volumes"}
	for _, o := range []map[string]map[string]any{plain, chart} {
		at(t, o["DaemonSet tidewaiter"], append(volumes, "config")...).(map[string]any)["projected"] = nil
	}
	for _, name := range []string{"DaemonSet tidewaiter", "ServiceAccount tidewaiter"} {
		if !reflect.DeepEqual(plain[name], chart[name]) {
			a, _ := json.Marshal(plain[name])
			b, _ := json.Marshal(chart[name])
			t.Errorf("%s is\n%s\nin the manifest, and in the chart\n%s", name, a, b)
		}
	}

	for _, kind := range []string{"k3s", "rke2", "microk8s"} {
		raw, err := os.ReadFile(filepath.Join("../../deploy", kind, "kustomization.yaml"))
		must(t, err)
		var k struct{ Patches []struct{ Patch string } }
		must(t, yaml.Unmarshal(raw, &k))
		patch, chart := objects(t, []byte(k.Patches[0].Patch))["DaemonSet tidewaiter"], template("--set", "distribution="+kind)["DaemonSet tidewaiter"]
		for _, path := range [][]string{append(volumes, "containerd", "hostPath", "path"), append(volumes, "mirrors", "hostPath"),
			{"spec", "template", "spec", "containers", "tidewaiter", "volumeMounts", "mirrors"}} {
			if got, want := at(t, chart, path...), at(t, patch, path...); !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %v is %v, want %v", kind, path, got, want)
			}
		}
	}

	// Trust stores have the names that a trust policy gives them.
	pem := filepath.Join(t.TempDir(), "acme.pem")
	must(t, os.WriteFile(pem, []byte("one\ntwo\n"), 0o600))
	chart = template("--set-file", "trustStores.ca.acme="+pem, "--set", "image=registry.site:5000/t:v1")
	if got := at(t, chart["ConfigMap tidewaiter-truststore"], "data", "ca.acme.crt"); got != "one\ntwo\n" {
		t.Errorf("the trust store is %q", got)
	}
	sources := at(t, chart["DaemonSet tidewaiter"], append(volumes, "config", "projected", "sources")...).([]any)
	last, _ := json.Marshal(sources[len(sources)-1])
	if string(last) != `{"configMap":{"items":[{"key":"ca.acme.crt","path":"truststore/x509/ca/acme/acme.crt"}],"name":"tidewaiter-truststore"}}` {
		t.Errorf("it is mounted by %s", last)
	}
	if got := at(t, chart["DaemonSet tidewaiter"], "spec", "template", "spec", "containers", "tidewaiter", "image"); got != "registry.site:5000/t:v1" {
		t.Errorf("image %v", got)
	}
	for _, wrong := range []string{"distribution=talos", "trustStores.cas.acme=x"} {
		if _, err := run("template", "tidewaiter", "../../deploy/helm", "--kube-version", "1.36.0", "--set", wrong); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
}
