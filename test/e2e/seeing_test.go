package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// run runs a verb against the gate of the scene, and checks its exit status. The
// configuration directory is the scene's.
func (s *scene) run(want int, args ...string) string {
	s.Helper()
	cmd := exec.CommandContext(s.ctx, program, args...)
	cmd.Env = append(os.Environ(), "TIDEWAITER_RUN_DIR="+s.RunDir(), "TIDEWAITER_CONFIG_DIR="+s.dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	got := 0
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		s.must(err)
	}
	if got != want {
		s.Errorf("tidewaiter %q ends with %d, want %d:\n%s", args, got, want, &out)
	}
	s.noSecrets("tidewaiter "+args[0], out.String())
	return out.String()
}

func (s *scene) says(out string, parts ...string) {
	s.Helper()
	for _, p := range parts {
		if !regexp.MustCompile("(?m)" + p).MatchString(out) {
			s.Errorf("no %s in\n%s", p, out)
		}
	}
}

// TestSeeing follows a refusal to its explanation, by the command that the refusal
// ends in, over a restart of the gate; and lists what the node has.
func TestSeeing(t *testing.T) {
	each(t, func(s *scene) {
		good, evil := s.signed("app:see", "see"), s.push(s.reg, "app:see-evil", node.ImageOptions{Word: "see-evil"})
		strange := s.push(s.reg, "app:see-strange", node.ImageOptions{Word: "see-strange"})
		_, err := s.reg.Sign(s.ctx, strange, stranger)
		s.must(err)
		for _, i := range []*node.Image{good, evil, strange} {
			s.pull(i.Name)
		}
		c := s.policy()
		s.configure(c)
		s.start()

		line := s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		at := strings.LastIndex(line, "tidewaiter explain ")
		if at < 0 {
			s.Fatalf("no command in %s", line)
		}
		command := strings.Fields(line[at:])[1:]
		for range 3 { // the kubelet tries again, and that is one line
			s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{Name: "again"})
		}
		s.denied(strange.Name, verify.SignerUntrusted, node.ContainerOptions{})
		ctr := s.allowed(good.Name, "see", node.ContainerOptions{})

		for range 2 {
			out := s.run(1, command...)
			s.says(out, `^registry.example/app:see-evil@`+evil.Target.Digest.String()+`$`,
				`^  container  [0-9a-f]{64}, .*/`+s.pod.Name+` .*is not there`,
				`^  answered   denied \[SIGNATURE_MISSING\], at 20`,
				`^  now        denied \[SIGNATURE_MISSING\] `,
				`^  decision   `+command[1]+`, mode enforce, assurance at(Create|Start), bound by an image record of this node$`,
				`^  rule       statement "prod": level strict, trust stores ca:acme, identities `+regexp.QuoteMeta(releaseIdentity)+`$`,
				`^  source     mirror http.*: SIGNATURE_MISSING, signatures seen: 0`,
				`^  next       sign the image, or copy its signatures`)

			out = s.run(0, "explain", ctr.ID[:13])
			s.says(out, `^  container  `+ctr.ID+`, .*, runs$`, `^  now        allowed \[VERIFIED\]`,
				`bound by the container's own snapshot$`, `^  signer     .*CN=release.*, trusted through ca:acme/root.crt$`,
				`^  signed     `+good.Target.Digest.String(), `^  ends       20.*, when a certificate of the signer ends`,
				`^  signature  sha256:[0-9a-f]{64} at .*: VERIFIED$`, `^             └─ .*`, `└─ .*, trusted: ca:acme/root.crt$`, `SHA-256 [0-9a-f]{64}$`)
			s.run(0, "explain", good.Name)
			s.run(0, "explain", good.Target.Digest.String())
			s.run(0, "explain", good.Pinned())
			out = s.run(1, "explain", strange.Name)
			s.says(out, `^  now        denied \[SIGNER_UNTRUSTED\]`, `: SIGNER_UNTRUSTED$`, `^  next       have the image signed by a signer`)
			if strings.Contains(out, "trusted: ") {
				s.Errorf("a stranger is trusted in\n%s", out)
			}
			s.says(s.run(2, "explain", "registry.example/app:none"), `nothing on this node is called "registry.example/app:none"`)

			out = s.run(0, "decisions", "--denied")
			s.says(out, `create  denied   SIGNATURE_MISSING        `+command[1]+`  registry.example/app:see-evil  .*/`+s.pod.Name)
			if n := strings.Count(out, " again\n"); n != 1 {
				s.Errorf("%d lines of one container that is tried again and again:\n%s", n, out)
			}
			var l struct {
				Container string
				Decision  struct{ ID, Reason, Schema string }
			}
			out = s.run(0, "decisions", "--reason", "SIGNER_UNTRUSTED", "--since", "1h", "-o", "json")
			s.must(json.NewDecoder(strings.NewReader(out)).Decode(&l))
			if l.Decision.Reason != "SIGNER_UNTRUSTED" || l.Decision.Schema != verify.Schema {
				s.Errorf("%+v", l)
			}

			// What was answered outlives the gate that answered.
			s.must(s.gate.Stop())
			s.run(2, command...)
			s.start()
		}
		s.recovers(good.Name, "see")

		// What is on the node, and until when.
		var out string
		s.eventually("the images are looked at", func() bool {
			out = s.run(0, "images", "registry.example/app") // those of other tests, too
			return !regexp.MustCompile(`PENDING .*app:see`).MatchString(out)
		})
		s.says(out, `^allowed       VERIFIED +20[0-9-]+ certificate +registry.example/app:see$`, `^denied        SIGNATURE_MISSING +- +registry.example/app:see-evil$`,
			`^denied        SIGNER_UNTRUSTED +- +registry.example/app:see-strange$`)
		s.says(s.run(1, "images", "--expires-within", "1000000h", good.Name), `^1 images that are allowed now will not be`)
		s.says(s.run(0, "images", "--expires-within", "1h", good.Name), `^0 images`)
		var list struct {
			Schema string
			Images []struct{ Image, Target, Reason, Ends, ID string }
		}
		s.must(json.Unmarshal([]byte(s.run(0, "images", "-o", "json", evil.Name)), &list))
		if len(list.Images) != 1 || list.Images[0].Target != evil.Target.Digest.String() || list.Images[0].ID != command[1] {
			s.Errorf("%+v", list)
		}
		s.says(s.run(0, "policy", "show"), `^  statement     "prod": level strict$`, `^  mirror        of registry.example: http://`, `^  certificate   ca:acme/root.crt: `)
		s.says(s.run(0, "policy", "check"), ` is valid: mode enforce, `)

		// A list is judged before anything of it is pulled, with tags.
		release := filepath.Join(s.TempDir(), "images.txt")
		s.must(os.WriteFile(release, []byte(good.Name+"\n"+evil.Name+"\n"), 0o600))
		s.says(s.run(1, "images", "--from-file", release), `^allowed       VERIFIED .*@`+good.Target.Digest.String()+`  by mirror http`, `^denied        SIGNATURE_MISSING .*@`+evil.Target.Digest.String())

		// What must run without a signature is listed by its digest, for its namespace.
		lines := s.run(0, "images", "--allowlist", "--namespace", s.pod.Namespace, evil.Name)
		s.must(os.WriteFile(filepath.Join(s.dir, "allow"), []byte(lines), 0o600))
		c.More = map[string]any{"allowDigests": []string{"allow"}}
		s.configure(c)
		s.eventually("the listed image is known", func() bool {
			return strings.Contains(s.run(0, "images", evil.Name), "listed in "+s.pod.Namespace)
		})
		listed := s.allowed(evil.Name, "see-evil", node.ContainerOptions{})
		s.says(s.run(0, "explain", listed.ID), `^  now        allowed \[ALLOWED_BY_DIGEST\]`, `^  because    line 1 of .*allow lists `+evil.Target.Digest.String())

		s.says(s.run(1, "explain", "registry.example/app@"+evil.Target.Digest.String()), `^  now        denied \[SIGNATURE_MISSING\]`, `^  listed     in `+s.pod.Namespace+`: `)

		// An image that is gone is explained by what was answered.
		s.must(s.RemoveImage(s.ctx, strange.Name))
		s.eventually("the image is gone", func() bool {
			return strings.Contains(s.run(0, "decisions", "--reason", "SIGNER_UNTRUSTED"), "create")
		})
		var gone string
		for l := range strings.Lines(s.run(0, "decisions", "--reason", "SIGNER_UNTRUSTED")) {
			if f := strings.Fields(l); f[1] == "create" {
				gone = f[4]
			}
		}
		s.says(s.run(1, "explain", gone), `^  now        the node has no image record of that name any more`, `^  answered   denied \[SIGNER_UNTRUSTED\]`, `^  next `)
	})
}
