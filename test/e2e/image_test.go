package e2e

import (
	"fmt"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// sign attaches a signature of subject to an image.
func (s *scene) sign(r *node.Registry, img *node.Image, subject ocispec.Descriptor, by *notarytest.Signer, style notarytest.Style, o notarytest.SignOptions) {
	s.Helper()
	if o.MediaType == "" {
		o.MediaType = notary.MediaTypeJWS
	}
	a := notarytest.Manifest(notarytest.MustSign(by, subject, o), o.MediaType, subject, style)
	s.must(r.Attach(s.ctx, img, a, node.AttachOptions{}))
}

var decoys = []node.Decoy{
	{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}},
	{Platform: ocispec.Platform{OS: "windows", Architecture: "amd64"}},
}

func TestSigned(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		jws := notarytest.SignOptions{}
		cose := notarytest.SignOptions{MediaType: notary.MediaTypeCOSE}
		for name, tt := range map[string]struct {
			image    node.ImageOptions
			manifest bool // the manifest is signed and not the index
			style    notarytest.Style
			o        notarytest.SignOptions
			platform bool // the pod names the manifest by digest
		}{
			"single":          {},
			"single-cose":     {o: cose},
			"single-old":      {style: notarytest.ConfigType, o: jws},
			"single-old-cose": {style: notarytest.ConfigType, o: cose},
			"docker":          {image: node.ImageOptions{Docker: true}},
			"docker-list":     {image: node.ImageOptions{Docker: true, Index: true, Decoys: decoys}},
			"index":           {image: node.ImageOptions{Index: true, Decoys: decoys}},
			"index-cose":      {image: node.ImageOptions{Index: true, Decoys: decoys}, o: cose},
			"manifest":        {image: node.ImageOptions{Index: true, Decoys: decoys}, manifest: true},
			"platform":        {image: node.ImageOptions{Index: true, Decoys: decoys}, manifest: true, platform: true},
		} {
			for _, r := range []*node.Registry{s.reg, s.tags} {
				tt.image.Word = name + " at " + r.Host
				img := s.push(r, "app:"+name, tt.image)
				subject := img.Target
				if tt.manifest {
					subject = img.Manifest
				}
				s.sign(r, img, subject, release, tt.style, tt.o)
				if tt.platform {
					s.allowed(img.Repository()+"@"+img.Manifest.Digest.String(), tt.image.Word, node.ContainerOptions{})
					continue
				}
				c := s.allowed(img.Name, tt.image.Word, node.ContainerOptions{})
				if c.ImageID != img.Config.Digest.String() {
					s.Errorf("%s runs %s, want %s", name, c.ImageID, img.Config.Digest)
				}
				s.allowed(img.Pinned(), tt.image.Word, node.ContainerOptions{})
				s.allowed(img.Name+"@"+img.Target.Digest.String(), tt.image.Word, node.ContainerOptions{})
			}
		}
	})
}

func TestNotSigned(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		target := func(img *node.Image) ocispec.Descriptor { return img.Target }
		by := func(signer *notarytest.Signer, o notarytest.SignOptions) func(*node.Registry, *node.Image) {
			return func(r *node.Registry, img *node.Image) { s.sign(r, img, img.Target, signer, 0, o) }
		}
		expired := notarytest.SignOptions{SigningTime: notarytest.Begin, Expiry: notarytest.Begin.AddDate(0, 1, 0)}
		other := s.signed("app:other", "other")
		// of attaches a signature of another image as one of this.
		of := func(r *node.Registry, img *node.Image) {
			env := notarytest.MustSign(release, other.Target, notarytest.SignOptions{})
			s.must(r.Attach(s.ctx, img, notarytest.Manifest(env, notary.MediaTypeJWS, img.Target, 0), node.AttachOptions{}))
		}
		junk := func(r *node.Registry, img *node.Image) {
			s.must(r.Attach(s.ctx, img, notarytest.Manifest([]byte("{}"), notary.MediaTypeJWS, img.Target, 0), node.AttachOptions{}))
		}
		none := func(*node.Registry, *node.Image) {}
		for name, tt := range map[string]struct {
			sign func(*node.Registry, *node.Image)
			want verify.Reason
			says string
			tags verify.Reason // at a registry without the Referrers API, where that differs
		}{
			"unsigned":   {none, verify.SignatureMissing, "no notary signature found at mirror http://", verify.SourceNoReferrers},
			"foreign":    {by(stranger, notarytest.SignOptions{}), verify.SignerUntrusted, "", ""},
			"selfsigned": {by(notarytest.SelfSigned(notarytest.CertOptions{Subject: notarytest.Name("release")}), notarytest.SignOptions{}), verify.SignerUntrusted, "", ""},
			"subject":    {by(intern, notarytest.SignOptions{}), verify.IdentityMismatch, "CN=intern", ""},
			"expired":    {by(release, expired), verify.SignatureExpired, "2025-02-01", ""},
			"another":    {of, verify.SignatureInvalid, "", ""},
			"junk":       {junk, verify.SignatureInvalid, "", ""},
			"plugin":     {by(release, notarytest.SignOptions{Plugin: "../../../bin/sh"}), verify.PluginUnsupported, "", ""},
			"critical": {by(release, notarytest.SignOptions{Attributes: []notarytest.Attribute{{Key: "io.example.must", Critical: true, Value: "x"}}}),
				verify.CriticalAttribute, "io.example.must", ""},
		} {
			for _, r := range []*node.Registry{s.reg, s.tags} {
				img := s.push(r, "app:not-"+name, node.ImageOptions{Word: name + " at " + r.Host})
				tt.sign(r, img)
				want, says := tt.want, tt.says
				if r == s.tags && tt.tags != "" {
					want, says = tt.tags, ""
				}
				for _, image := range []string{img.Name, img.Pinned()} {
					line := s.denied(image, want, node.ContainerOptions{})
					if !strings.Contains(line, "/app") || !strings.Contains(line, "@"+target(img).Digest.String()+": ") || !strings.Contains(line, `; rule "prod"`) || !strings.Contains(line, says) {
						s.Errorf("%s: %s", name, line)
					}
				}
			}
		}

		// Several bad ones hide no good one.
		for _, r := range []*node.Registry{s.reg, s.tags} {
			img := s.push(r, "app:at-last", node.ImageOptions{Word: "at last at " + r.Host})
			junk(r, img)
			of(r, img)
			by(stranger, notarytest.SignOptions{})(r, img)
			by(intern, notarytest.SignOptions{})(r, img)
			by(release, expired)(r, img)
			s.denied(img.Name, verify.SignatureExpired, node.ContainerOptions{})
			// A denial is kept for a while, under this configuration: a restart asks anew.
			by(release, notarytest.SignOptions{})(r, img)
			s.must(s.gate.Stop())
			s.start()
			s.allowed(img.Name, "at last at "+r.Host, node.ContainerOptions{})
		}

		// An index that is signed, started by the digest of its manifest, is another
		// object than the one that was signed.
		img := s.push(s.reg, "app:index-only", node.ImageOptions{Word: "index only", Index: true, Decoys: decoys})
		s.sign(s.reg, img, img.Target, release, 0, notarytest.SignOptions{})
		s.denied(img.Repository()+"@"+img.Manifest.Digest.String(), verify.SignatureMissing, node.ContainerOptions{})
		s.allowed(img.Name, "index only", node.ContainerOptions{})

		// The good image as an entry for another machine is a decoy: what runs counts.
		good := s.signed("app:decoy", "decoy")
		evil := s.push(s.reg, "app:decoyed", node.ImageOptions{Word: "evil", Index: true,
			Decoys: []node.Decoy{{Platform: decoys[0].Platform, Image: good}}})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})

		// A layer on top of a signed image makes another image.
		more := s.push(s.reg, "app:more", node.ImageOptions{Word: "decoy", Files: map[string]string{"/etc/more": "evil"}})
		s.denied(more.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.allowed(good.Name, "decoy", node.ContainerOptions{})
	})
}

// TestScopes has statements for three repositories and one for the rest.
func TestScopes(t *testing.T) {
	each(t, func(s *scene) {
		hub, err := node.NewRegistry("docker.io", node.RegistryOptions{})
		s.must(err)
		defer hub.Stop()
		aliases := map[*node.Registry][]string{
			s.reg: {"registry.example", "REGISTRY.example", "Registry.Example", "registry.example:443"},
			hub:   {"docker.io", "registry-1.docker.io"},
		}
		for r, hosts := range aliases {
			for _, h := range hosts {
				s.must(s.Hosts(h, "server = \""+r.URL()+"\"\n[host.\""+r.URL()+"\"]\n  capabilities = [\"pull\", \"resolve\"]\n"))
				defer func() {
					if h != s.reg.Host {
						s.must(s.Hosts(h, ""))
					}
				}()
			}
		}
		team := notarytest.Statement("team")
		team.Scopes, team.TrustStores = []string{"registry.example/team/app"}, []string{"ca:rival"}
		public := notarytest.Statement("public", releaseIdentity)
		public.Scopes = []string{"docker.io/library/public"}
		c := s.policy()
		c.Mirrors = append(c.Mirrors, hub.Mirror())
		c.Stores["ca/rival/root.crt"] = rival.PEM()
		c.Statements = append(c.Statements, team, public)
		s.configure(c)
		s.start()

		ofTeam := s.push(s.reg, "team/app:1", node.ImageOptions{Word: "of the team"})
		s.sign(s.reg, ofTeam, ofTeam.Target, stranger, 0, notarytest.SignOptions{})
		s.allowed(ofTeam.Name, "of the team", node.ContainerOptions{})
		// The same bytes and signatures where another rule speaks.
		copied, err := s.reg.Copy(s.ctx, "app:copied", ofTeam)
		s.must(err)
		s.sign(s.reg, copied, copied.Target, stranger, 0, notarytest.SignOptions{})
		s.denied(copied.Name, verify.SignerUntrusted, node.ContainerOptions{})
		outside := s.push(s.reg, "other:1", node.ImageOptions{Word: "outside"})
		s.sign(s.reg, outside, outside.Target, release, 0, notarytest.SignOptions{})
		s.reg.Forget()
		line := s.denied(outside.Name, verify.PolicyNoMatch, node.ContainerOptions{})
		if !strings.Contains(line, "registry.example/other") || !strings.Contains(line, "registryScopes") {
			s.Error(line)
		}
		for _, r := range s.reg.Requests() {
			if strings.Contains(r.Path, "/other/referrers") { // other images are verified ahead meanwhile
				s.Errorf("asked for an image that no rule matches: %+v", r)
			}
		}

		// Now everything else is lax: no spelling of app leads there.
		lax := notarytest.Statement("lax")
		lax.Scopes, lax.TrustStores = []string{"*"}, []string{"ca:rival"}
		c.Statements = append(c.Statements, lax)
		s.configure(c)
		s.denied(outside.Name, verify.SignerUntrusted, node.ContainerOptions{})
		good := s.signed("app:spelled", "spelled")
		for _, host := range aliases[s.reg] {
			line := s.denied(host+"/app:copied", verify.SignerUntrusted, node.ContainerOptions{})
			if !strings.Contains(line, `; rule "prod"`) {
				s.Errorf("%s: %s", host, line)
			}
			s.allowed(host+"/app:spelled", "spelled", node.ContainerOptions{})
			s.allowed(host+"/app@"+good.Target.Digest.String(), "spelled", node.ContainerOptions{})
		}
		mine := s.push(hub, "library/public:1", node.ImageOptions{Word: "public"})
		s.sign(hub, mine, mine.Target, release, 0, notarytest.SignOptions{})
		bad := s.push(hub, "library/public:bad", node.ImageOptions{Word: "bad"})
		s.sign(hub, bad, bad.Target, stranger, 0, notarytest.SignOptions{})
		for _, name := range []string{"public", "library/public", "docker.io/public", "docker.io/library/public", "index.docker.io/library/public", "registry-1.docker.io/library/public"} {
			s.allowed(name+":1", "public", node.ContainerOptions{})
			line := s.denied(name+":bad", verify.SignerUntrusted, node.ContainerOptions{})
			if !strings.Contains(line, " docker.io/library/public:bad@") || !strings.Contains(line, `; rule "public"`) {
				s.Errorf("%s: %s", name, line)
			}
		}
	})
}

// TestBinding is about containers that are not what they are called.
func TestBinding(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		// One root filesystem, two configurations.
		good := s.signed("app:good", "good")
		evil := s.push(s.reg, "app:evil", node.ImageOptions{Word: "evil"})
		// Another root filesystem.
		big := s.push(s.reg, "app:big", node.ImageOptions{Word: "good", Files: map[string]string{"/etc/evil": "evil"}})
		if good.DiffIDs[0] != evil.DiffIDs[0] || good.Config.Digest == evil.Config.Digest || len(big.DiffIDs) != 2 {
			s.Fatal("the images are not what this test needs")
		}
		for _, img := range []*node.Image{good, evil, big} {
			s.pull(img.Name)
		}
		s.allowed(good.Name, "good", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.denied(big.Name, verify.SignatureMissing, node.ContainerOptions{})

		id := func(img *node.Image) string { return img.Config.Digest.String() }
		compared := !s.NamesImage() // the configs, when the container starts
		for name, tt := range map[string]struct {
			image, id string
			want      verify.Reason
			created   bool
		}{
			"evil config as good":        {good.Name, id(evil), verify.ImageMismatch, compared},
			"evil config as good pinned": {good.Pinned(), id(evil), verify.ImageMismatch, compared},
			"evil name as image":         {good.Name, evil.Name, verify.ImageMismatch, compared},
			"evil digest as image":       {good.Name, evil.Pinned(), verify.ImageMismatch, compared},
			"one more layer as good":     {good.Name, id(big), verify.ImageMismatch, false},
			"one more layer pinned":      {good.Pinned(), id(big), verify.ImageMismatch, false},
			"no record":                  {"registry.example/app:never-pulled", id(evil), verify.ImageUnresolved, false},
			"no record of the good":      {"registry.example/app:never-pulled", id(good), verify.ImageUnresolved, false},
			"no record of the digest":    {"registry.example/other@" + good.Target.Digest.String(), id(good), verify.ImageUnresolved, false},
			"ID":                         {id(good), "", verify.ImageUnresolved, false},
			"bare ID":                    {strings.TrimPrefix(id(good), "sha256:"), "", verify.ImageUnresolved, false},
			"prefix of an ID":            {strings.TrimPrefix(id(good), "sha256:")[:12], "", verify.ImageUnresolved, false},
			"sha256 and a prefix":        {id(good)[:20], "", verify.ImageUnresolved, false},
			"evil ID":                    {id(evil), "", verify.ImageUnresolved, false},
			"not a name":                 {"registry.example/app:good\x1b[31m" + strings.Repeat("x", 5000), id(good), verify.ImageUnresolved, false},
		} {
			_, created := s.refused(tt.image, tt.want, node.ContainerOptions{ImageID: tt.id, Pull: node.PullNever})
			if created != tt.created {
				s.Errorf("%s: created is %t, want %t", name, created, tt.created)
			}
		}
		// In the name of evil the good image is refused too: the name chooses the rule.
		s.denied(evil.Name, reasonOf(compared, verify.SignatureMissing, verify.ImageMismatch), node.ContainerOptions{ImageID: id(good)})

		// A client that says no name leaves it to containerd, which has one.
		c := s.allowed("", "good", node.ContainerOptions{ImageID: good.Name})
		s.must(c.Remove(s.ctx))
		s.allowed("", "good", node.ContainerOptions{ImageID: id(good)})
		s.denied("", verify.SignatureMissing, node.ContainerOptions{ImageID: id(evil)})

		// The tag moves at the registry: what is on the node counts.
		moving := s.signed("app:moving", "first")
		s.pull(moving.Name)
		moved := s.push(s.reg, "app:moving", node.ImageOptions{Word: "second"})
		s.allowed(moving.Name, "first", node.ContainerOptions{})
		// Pulled anew, the name leads elsewhere, although it was verified before.
		s.denied(moving.Name, verify.SignatureMissing, node.ContainerOptions{Pull: node.PullAlways})
		// The kubelet may still hold the ID of the first: that is not what the name says.
		s.denied(moving.Name, reasonOf(compared, verify.SignatureMissing, verify.ImageMismatch), node.ContainerOptions{ImageID: id(moving)})
		s.allowed(moving.Pinned(), "first", node.ContainerOptions{})
		s.denied(moved.Pinned(), verify.SignatureMissing, node.ContainerOptions{})
		// Back again: the good one.
		_, err := s.reg.Copy(s.ctx, "app:moving", moving)
		s.must(err)
		s.allowed(moving.Name, "first", node.ContainerOptions{Pull: node.PullAlways})
		s.refused(moving.Name, verify.ImageMismatch, node.ContainerOptions{ImageID: id(moved)})

		// The same image under a name that sorts before, in an index of its own: the
		// runtime may hand over that target.
		wrapped := s.push(s.reg, "aaa:1", node.ImageOptions{Word: "good", Index: true, Decoys: decoys})
		if wrapped.Config.Digest != good.Config.Digest || wrapped.Target.Digest == good.Target.Digest {
			s.Fatal("the images are not what this test needs")
		}
		s.pull(wrapped.Name)
		s.allowed(good.Name, "good", node.ContainerOptions{})
		s.denied(wrapped.Name, verify.PolicyNoMatch, node.ContainerOptions{})
		s.denied("", verify.PolicyNoMatch, node.ContainerOptions{ImageID: id(good)})
		s.must(s.RemoveImage(s.ctx, wrapped.Name))
	})
}

func reasonOf(first bool, a, b verify.Reason) verify.Reason {
	if first {
		return a
	}
	return b
}

// TestContainers is about the containers of a pod.
func TestContainers(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		good, evil := s.signed("app:main", "main"), s.push(s.reg, "app:side", node.ImageOptions{Word: "side"})

		// An init container that is refused; then one that runs, and the main one.
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{Name: "init"})
		first := s.allowed(good.Name, "main", node.ContainerOptions{Name: "init"})
		s.must(first.Stop(s.ctx))
		main := s.allowed(good.Name, "main", node.ContainerOptions{Name: "main"})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{Name: "sidecar"})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{Name: "debugger", Labels: map[string]string{"io.kubernetes.container.type": "ephemeral"}})

		// Nothing that a pod says of itself helps.
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{
			Labels:      map[string]string{"io.cri-containerd.image": "managed", "tidewaiter.dev/skip": "true"},
			Annotations: map[string]string{"tidewaiter.dev/skip": "true", "tolerate-missing-plugins.noderesource.dev": "true"},
		})

		// The container is restarted: a new attempt of the same.
		s.must(main.Stop(s.ctx))
		s.allowed(good.Name, "main", node.ContainerOptions{Name: "main", Attempt: 1})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{Name: "main", Attempt: 2})

		// Another handler of the same runtime, in another namespace.
		s.pod = s.runPod(node.PodOptions{Namespace: "kube-system", RuntimeHandler: node.OtherHandler,
			Annotations: map[string]string{"tolerate-missing-plugins.noderesource.dev": "true"}})
		s.allowed(good.Name, "main", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
	})
}

// TestVolumes: an image that is mounted as a volume is one more image, which is
// bound by its own snapshot.
func TestVolumes(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		main := s.signed("app:main", "main")
		data := s.push(s.reg, "app:data", node.ImageOptions{Files: map[string]string{"/data/x": "signed"}})
		s.sign(s.reg, data, data.Target, release, 0, notarytest.SignOptions{})
		evil := s.push(s.reg, "app:volume-evil", node.ImageOptions{Files: map[string]string{"/data/x": "evil"}})
		at := func(image, path, sub string) node.ContainerOptions {
			return node.ContainerOptions{Volumes: []node.ImageVolume{{Image: image, Path: path, SubPath: sub}}}
		}
		s.allowed(main.Name, "main", at(data.Name, "/volume", ""))
		s.allowed(main.Name, "main", at(data.Name, "/volume", "data"))
		s.allowed(main.Name, "main", at(main.Name, "/volume", ""))
		s.denied(main.Name, verify.SignatureMissing, at(evil.Name, "/volume", ""))
		s.denied(main.Name, verify.SignatureMissing, at(evil.Name, "/volume", "data"))
		s.denied(evil.Name, verify.SignatureMissing, at(data.Name, "/volume", ""))
		both := at(data.Name, "/volume", "")
		both.Volumes = append(both.Volumes, node.ImageVolume{Image: evil.Name, Path: "/other"})
		s.denied(main.Name, verify.SignatureMissing, both)

		// No statement is for it.
		outside := s.push(s.reg, "elsewhere:1", node.ImageOptions{Files: map[string]string{"/data/x": "outside"}})
		s.denied(main.Name, verify.PolicyNoMatch, at(outside.Name, "/volume", ""))

		// Another pod has a snapshot of its own.
		s.pod = s.runPod(node.PodOptions{})
		s.allowed(main.Name, "main", at(data.Name, "/volume", ""))
		s.denied(main.Name, verify.SignatureMissing, at(evil.Name, "/volume", ""))
	})
}

// TestBurst creates many containers of one image at once.
func TestBurst(t *testing.T) {
	each(t, func(s *scene) {
		s.configure(s.policy())
		s.start()
		img := s.signed("app:burst", "burst")
		s.reg.Forget()
		s.pull(img.Name)
		containers := make([]*node.Container, 30)
		errs := make([]error, len(containers))
		atOnce(len(containers), len(containers), func(i int) {
			containers[i], errs[i] = s.pod.Run(s.ctx, img.Name, node.ContainerOptions{Name: fmt.Sprintf("burst%d", i)}, node.Retry{})
		})
		for i, c := range containers {
			s.must(errs[i])
			s.runs(c, "burst")
		}
		// Other images of the node are verified ahead meanwhile.
		asked := 0
		for _, r := range s.reg.Requests() {
			if strings.HasSuffix(r.Path, "/referrers/"+img.Target.Digest.String()) {
				asked++
			}
		}
		if asked != 1 {
			s.Errorf("asked for signatures %d times, want once", asked)
		}
	})
}
