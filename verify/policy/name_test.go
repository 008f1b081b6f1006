package policy_test

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

const (
	hex64 = "9f2c1e5d7a6b4c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9d"
	sum   = "sha256:" + hex64
)

// Every spelling of one repository must reach the same statement (a strict one is
// otherwise passed by with a spelling that only "*" matches).
func TestParseNameAliases(t *testing.T) {
	for want, spellings := range map[string][]string{
		"docker.io/library/nginx": {
			"nginx", "library/nginx", "docker.io/nginx", "docker.io/library/nginx",
			"Docker.io/library/nginx", "DOCKER.IO/nginx", "docker.io:443/library/nginx",
			"docker.io:443/nginx", "docker.io:00443/nginx", "index.docker.io/nginx",
			"index.docker.io/library/nginx", "INDEX.docker.io/nginx", "index.docker.io:443/nginx",
			"registry-1.docker.io/library/nginx", "registry-1.docker.io/nginx", "docker.io./nginx",
			"docker.io.:443/library/nginx", "Index.Docker.io.:0443/nginx",
		},
		"docker.io/acme/app": {"acme/app", "docker.io/acme/app", "registry-1.docker.io:443/acme/app"},
		"registry.acme.internal:5000/team/app": {
			"registry.acme.internal:5000/team/app", "Registry.ACME.internal:5000/team/app",
			"registry.acme.internal:05000/team/app", "registry.acme.internal.:5000/team/app",
		},
		"registry.acme.internal/app":    {"registry.acme.internal/app", "registry.acme.internal:443/app"},
		"registry.acme.internal:80/app": {"registry.acme.internal:80/app"},
		"[2001:db8::1]:5000/app": {
			"[2001:db8::1]:5000/app", "[2001:DB8:0:0:0:0:0:1]:5000/app", "[2001:0db8::0001]:5000/app",
		},
		"[2001:db8::1]/app":  {"[2001:db8::1]/app", "[2001:db8:0::1]:443/app"},
		"10.0.0.5:5000/app":  {"10.0.0.5:5000/app", "[::ffff:a00:5]:5000/app", "[::FFFF:0A00:0005]:5000/app"},
		"localhost/app":      {"localhost/app", "LOCALHOST/app", "localhost:443/app", "localhost./app"},
		"localhost:5000/app": {"localhost:5000/app", "Localhost:5000/app"},
		"builder:443/app":    {"builder:443/app", "BUILDER/app", "Builder:0443/app"},
		"builder:5000/app":   {"builder:5000/app"},
		// A record may have such a name; it is no ID, since it has a host.
		"docker.io/library/sha256": {"docker.io/library/sha256:" + hex64, "library/sha256", "docker.io/sha256:latest"},
	} {
		for _, s := range spellings {
			for _, suffix := range []string{"", ":1.2", "@" + sum, ":1.2@" + sum} {
				if suffix != "" && strings.Contains(s, "sha256") {
					continue
				}
				n, err := policy.ParseName(s + suffix)
				if err != nil {
					t.Errorf("ParseName(%q): %v", s+suffix, err)
				} else if n.Repository() != want {
					t.Errorf("ParseName(%q) is of repository %q, want %q", s+suffix, n.Repository(), want)
				}
			}
		}
	}
}

func TestParseNameKeepsTagAndDigest(t *testing.T) {
	for s, want := range map[string]verify.Name{
		"nginx":                {Host: "docker.io", Path: "library/nginx", Tag: "latest"},
		"nginx:1.27":           {Host: "docker.io", Path: "library/nginx", Tag: "1.27"},
		"nginx@" + sum:         {Host: "docker.io", Path: "library/nginx", Digest: sum},
		"nginx:1.27@" + sum:    {Host: "docker.io", Path: "library/nginx", Tag: "1.27", Digest: sum},
		"r.io:5000/a/b/c:V_1.": {Host: "r.io:5000", Path: "a/b/c", Tag: "V_1."},
	} {
		if n, err := policy.ParseName(s); err != nil || n != want {
			t.Errorf("ParseName(%q) = %#v, %v; want %#v", s, n, err, want)
		}
	}
}

func TestParseNameRefuses(t *testing.T) {
	sha512 := digest.SHA512.FromString("x").String()
	for _, s := range []string{
		"", " ", "/", "a/", "/a", ":", "@", "nginx:", "nginx@", "nginx@sha256:", "nginx@" + sum[:70], "nginx@md5:" + hex64,
		// What containerd takes for an image ID.
		sum, hex64, sha512, "sha256:" + hex64[:12], "sha256:latest", "sha256:" + hex64 + "@" + sum,
		// Not names.
		"http://r.io/a", "r.io/a?b", "r.io//a", "r.io/a b", "r.io/A", "r.io/a/../b", "user@r.io/a", "r.io/%61",
		"nginx\n", "nginx\x00", "\tnginx", "r.io/a\u200b", "dоcker.io/nginx" /* Cyrillic o */, "r.io/ä", "r。io/a", "r.io/a:ü", "\xff/a",
		// Hosts.
		"r.io:0/a", "r.io:65536/a", "r.io:99999999999999999999/a", "r.io:/a", "r.io:x/a", "r.io../a", "./a", ".r.io/a", "-r.io/a", "foo./a",
		"10.0.0.05/a", "10.5/a", "0x0a.0.0.0x5/a", "10.0.0.5.6:5000/a", "10.0.0.256/a", "1:5000/a",
		"[::1/a", "[1:2:3]/a", "[:::]/a", "[g::1]/a", "[fe80::1%eth0]/a", "[::1]x/a", "[10.0.0.5]/a",
		// Lengths; the second and third only pass the limit when the name is canonical.
		"r.io/" + strings.Repeat("a", 256), strings.Repeat("a", 250), "docker.io:443/" + strings.Repeat("a", 250),
		strings.Repeat("a.", 130) + "io/a", "nginx:" + strings.Repeat("t", 129), strings.Repeat("a", 1<<20),
	} {
		n, err := policy.ParseName(s)
		if err == nil {
			t.Errorf("ParseName(%.80q) = %q, want an error", s, n)
			continue
		}
		if len(err.Error()) > 512 || strings.ContainsAny(err.Error(), "\n\x00\t") {
			t.Errorf("ParseName(%.80q): unfit error %.600q", s, err)
		}
	}
}

func TestRecord(t *testing.T) {
	for s, want := range map[string]string{
		"nginx":             "docker.io/library/nginx:latest",
		"nginx:1.27":        "docker.io/library/nginx:1.27",
		"nginx:1.27@" + sum: "docker.io/library/nginx@" + sum,
		// Not canonicalised further: containerd looks for just this.
		"Docker.io:443/nginx": "Docker.io:443/nginx:latest",
		"[2001:DB8::0:1]/a:1": "[2001:DB8::0:1]/a:1",
		"index.docker.io/a/b": "docker.io/a/b:latest",
	} {
		if got, err := policy.Record(s); err != nil || got != want {
			t.Errorf("Record(%q) = %q, %v; want %q", s, got, err, want)
		}
	}
	for _, s := range []string{"", sum, hex64, "sha256:abcd", "docker.io./nginx", "r.io/A", "a\nb", strings.Repeat("a/", 600) + "a"} {
		if got, err := policy.Record(s); err == nil {
			t.Errorf("Record(%.80q) = %q, want an error", s, got)
		}
	}
}

func TestParseScope(t *testing.T) {
	for s, want := range map[string]string{
		"*":                          "*",
		"docker.io/library/nginx":    "docker.io/library/nginx",
		"docker.io/nginx":            "docker.io/library/nginx",
		"Index.Docker.io:443/nginx":  "docker.io/library/nginx",
		"registry-1.docker.io/a/b":   "docker.io/a/b",
		"docker.io./a/b":             "docker.io/a/b",
		"R.acme.io:05000/a/b":        "r.acme.io:5000/a/b",
		"[2001:DB8::0:1]:5000/a":     "[2001:db8::1]:5000/a",
		"[::ffff:a00:5]/a":           "10.0.0.5/a",
		"localhost/a":                "localhost/a",
		"library/nginx":              "library:443/nginx", // no expansion: not Docker Hub's
		"local/layout":               "local:443/layout",
		"LOCAL/layout":               "local:443/layout",
		"registry.k8s.io/a__b/c-d.e": "registry.k8s.io/a__b/c-d.e",
	} {
		got, err := policy.ParseScope(s)
		if err != nil || got != want {
			t.Errorf("ParseScope(%q) = %q, %v; want %q", s, got, err, want)
			continue
		}
		if again, err := policy.ParseScope(got); err != nil || again != got {
			t.Errorf("ParseScope(%q) = %q, %v; want itself", got, again, err)
		}
	}
	for s, want := range map[string]string{
		"":                                       "fully qualified",
		"nginx":                                  "fully qualified",
		"**":                                     "fully qualified",
		"docker.io/*":                            "wildcard",
		"docker.io/library/nginx:1.27":           "tag",
		"docker.io/nginx@" + sum:                 "tag",
		"https://docker.io/nginx":                "scheme",
		"docker.io/Nginx":                        "lower-case",
		"docker.io/":                             "invalid",
		"docker.io//a":                           "invalid",
		"docker.io/a/../b":                       "invalid",
		"a__b/c":                                 "host",
		"/a":                                     "host",
		"10.5/a":                                 "IPv4",
		"[1:2]/a":                                "IPv6",
		"r.io:0/a":                               "port",
		"docker.io/a b":                          "ASCII",
		"docker.io/" + strings.Repeat("a", 2000): "longer",
		"docker.io/" + strings.Repeat("a", 250):  "more than 255",
	} {
		if got, err := policy.ParseScope(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseScope(%.80q) = %q, %v; want an error about %q", s, got, err, want)
		}
	}
}

// Whatever a pod writes: no panic, and what comes out is canonical. A name that
// containerd reads is of the same repository as the record that it finds.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{
		"nginx", "Docker.io:443/nginx:1@" + sum, "index.docker.io./a/b", "[2001:DB8::0:1]:05000/a", "[::ffff:a00:5]/a",
		"LOCAL/a:b", "library:443/nginx", sum, hex64, "docker.io/library/sha256:" + hex64, "a.b.:443/c", "x:1/y:2",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		record, errRecord := policy.Record(s)
		n, err := policy.ParseName(s)
		if err != nil {
			if n != (verify.Name{}) {
				t.Fatalf("ParseName(%q) has an error and %#v", s, n)
			}
			return
		}
		again, err := policy.ParseName(n.String())
		if err != nil || again != n {
			t.Fatalf("ParseName(%q) = %#v, whose name parses as %#v, %v", s, n, again, err)
		}
		if scope, err := policy.ParseScope(n.Repository()); err != nil || scope != n.Repository() {
			t.Fatalf("ParseScope(%q) = %q, %v", n.Repository(), scope, err)
		}
		if host, err := policy.ParseHost(n.Host); err != nil || host != n.Host {
			t.Fatalf("ParseHost(%q) = %q, %v", n.Host, host, err)
		}
		if errRecord != nil {
			return
		}
		r, err := policy.ParseName(record)
		if err != nil || r.Repository() != n.Repository() || r.Digest != n.Digest {
			t.Fatalf("%q is %#v, its record %q is %#v, %v", s, n, record, r, err)
		}
	})
}
