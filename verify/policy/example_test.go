package policy_test

import (
	"fmt"

	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// All spellings of a name reach the same statement.
func ExampleParseName() {
	for _, s := range []string{"nginx", "index.docker.io/nginx:latest", "Docker.io:443/library/nginx", "registry.example:5000/team/app@sha256:0"} {
		n, err := policy.ParseName(s)
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		fmt.Println(n.Repository())
	}
	// Output:
	// docker.io/library/nginx
	// docker.io/library/nginx
	// docker.io/library/nginx
	// error: image name "registry.example:5000/team/app@sha256:0": invalid reference format
}

// A digest allowlist names content, the namespaces in which it runs without a signature,
// and why.
func ExampleParseAllowlist() {
	list, err := policy.ParseAllowlist("allow/k3s.txt", []byte(`
# the pause image
sha256:7c38f24774e3cbd906d2d33c38354ccf787635581c122965132c9bd309754d4a
sha256:d3f28f4b0c39f3ddf9aee4b1d7e1a5d5a4bd5a3d2a0e4bb0a6ba1ae36b5f3ad1   kube-system,cni-system
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, l := range list {
		fmt.Println(l.Line, l.Digest.Encoded()[:12], l.Namespaces)
	}
	// Output:
	// 3 7c38f24774e3 [kube-system]
	// 4 d3f28f4b0c39 [kube-system cni-system]
}
