//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A teller tells the story.
type teller struct {
	out    io.Writer
	node   *node.Node
	binary string // Tidewaiter
	mirror *node.Registry
	gate   *node.Gate

	step    int
	whole   bool              // a whole error of CRI was shown
	running map[string]string // what must run now, and nothing else: ID to image
}

const host = "registry.example"

func (t *teller) tell(ctx context.Context) error {
	var err error
	if t.mirror, err = node.NewRegistry(host, node.RegistryOptions{}); err != nil {
		return err
	}
	if err := t.node.Use(t.mirror); err != nil {
		return err
	}
	acme := notarytest.NewCA(notarytest.CAOptions{})
	release := acme.Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	stranger := notarytest.NewCA(notarytest.CAOptions{}).Leaf(notarytest.CertOptions{Subject: notarytest.Name("release")})
	err = node.WriteConfig(t.configDir(), node.Config{
		Mode:       "enforce",
		Mirrors:    []node.Mirror{t.mirror.Mirror()},
		Stores:     notarytest.Stores{"ca/acme/root.crt": acme.PEM()},
		Statements: []verify.Statement{notarytest.Statement("prod", "x509.subject: C=US, ST=WA, O=acme, CN=release")},
	})
	if err != nil {
		return err
	}
	if err := t.startGate(ctx); err != nil {
		return err
	}
	t.print("")
	t.print("Tidewaiter on containerd %s: a throwaway node in %s with one mirror,", t.node.Version, t.node.Dir)
	t.print("%s. Its rule \"prod\": an image needs a signature by CN=release of acme. Its", t.mirror.URL())
	t.print("containerd has required_plugins = [\"tidewaiter\"]: no container without Tidewaiter's yes.")
	t.print("Answers are quoted as they came; only in the first one are digests not cut short.")

	t.title("A signed image starts")
	t.did("push %s/shop:1, signed with acme's release key", host)
	shop, signature, err := t.pushSigned(ctx, "shop:1", "welcome to the shop", release)
	if err != nil {
		return err
	}
	if err := t.starts(ctx, shop.Name, "welcome to the shop"); err != nil {
		return err
	}

	t.title("One that nobody signed does not")
	t.did("push %s/unsigned:1", host)
	unsigned, err := t.push(ctx, "unsigned:1", "who am I?")
	if err != nil {
		return err
	}
	if err := t.refused(ctx, unsigned.Name, once, verify.SignatureMissing); err != nil {
		return err
	}

	t.title("Nor does one that somebody else signed, under the same name CN=release")
	t.did("push %s/foreign:1, signed with another authority's release key", host)
	foreign, _, err := t.pushSigned(ctx, "foreign:1", "trust me", stranger)
	if err != nil {
		return err
	}
	if err := t.refused(ctx, foreign.Name, once, verify.SignerUntrusted); err != nil {
		return err
	}

	t.title("Nor one that carries a good signature of another image")
	t.did("push %s/borrowed:1, and attach the signature of shop:1 to it", host)
	borrowed, err := t.push(ctx, "borrowed:1", "I have papers")
	if err != nil {
		return err
	}
	a := notarytest.Manifest(signature.Envelope.Content, notary.MediaTypeJWS, borrowed.Target, notarytest.ConfigType)
	if err := t.mirror.Attach(ctx, borrowed, a, node.AttachOptions{}); err != nil {
		return err
	}
	if err := t.refused(ctx, borrowed.Name, once, verify.SignatureInvalid); err != nil {
		return err
	}

	t.title("The tag of a verified image is moved to another image: that one does not start")
	t.did("push the image of shop:1 as %s/shop:latest too", host)
	latest, err := t.push(ctx, "shop:latest", "welcome to the shop")
	if err != nil {
		return err
	}
	if latest.Target.Digest != shop.Target.Digest {
		return fmt.Errorf("%s is not the image of %s", latest.Name, shop.Name)
	}
	if err := t.starts(ctx, latest.Name, "welcome to the shop"); err != nil {
		return err
	}
	t.did("push another image as %s/shop:latest", host)
	if _, err := t.push(ctx, "shop:latest", "welcome to the other shop"); err != nil {
		return err
	}
	if err := t.refused(ctx, latest.Name, node.ContainerOptions{Pull: node.PullAlways}, verify.SignatureMissing); err != nil {
		return err
	}

	t.title("A pod that names the verified image by its ID does not start: rules speak of names")
	if err := t.refused(ctx, shop.Config.Digest.String(), once, verify.ImageUnresolved); err != nil {
		return err
	}

	t.title("The mirror fails: what was verified starts, what was not does not")
	t.did("push %s/late:1, signed with acme's release key, and pull it", host)
	late, _, err := t.pushSigned(ctx, "late:1", "on board before the storm", release)
	if err != nil {
		return err
	}
	if _, err := t.node.PullImage(ctx, late.Name); err != nil {
		return err
	}
	t.did("stop the mirror")
	if err := t.mirror.Stop(); err != nil {
		return err
	}
	if err := t.starts(ctx, shop.Name, "welcome to the shop"); err != nil {
		return err
	}
	if err := t.refused(ctx, late.Name, once, verify.SourceUnreachable); err != nil {
		return err
	}

	t.title("Tidewaiter is killed while the mirror is away: what was verified starts when it is back")
	t.did("kill -KILL %d (tidewaiter)", t.gate.PID)
	t.gate.Kill()
	if err := t.refusedByContainerd(ctx, shop.Name); err != nil {
		return err
	}
	t.did("start tidewaiter again; the mirror is still away")
	if err := t.startGate(ctx); err != nil {
		return err
	}
	if err := t.starts(ctx, shop.Name, "welcome to the shop"); err != nil {
		return err
	}
	if err := t.refused(ctx, late.Name, once, verify.SourceUnreachable); err != nil {
		return err
	}
	t.print("   (The signature was kept on the node, and was verified again. No verdict was kept.)")
	return nil
}

// once is a container whose image is pulled if the node does not have it.
var once = node.ContainerOptions{}

func (t *teller) configDir() string { return filepath.Join(t.node.Dir, "etc") }

func (t *teller) startGate(ctx context.Context) error {
	g, err := t.node.StartGate(ctx, node.GateOptions{ConfigDir: t.configDir(), StateDir: filepath.Join(t.node.Dir, "state"), NodeName: "edge-1", Binary: t.binary})
	if err != nil {
		return err
	}
	t.gate = g
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return g.WaitRegistered(ctx)
}

// push pushes an image that says words. Each has a file of its own in its root
// file system, as different images do.
func (t *teller) push(ctx context.Context, name, words string) (*node.Image, error) {
	return t.mirror.Push(ctx, name, node.ImageOptions{Word: "@/words", Files: map[string]string{"/words": words}})
}

func (t *teller) pushSigned(ctx context.Context, name, words string, s *notarytest.Signer) (*node.Image, notarytest.Artifact, error) {
	img, err := t.push(ctx, name, words)
	if err != nil {
		return nil, notarytest.Artifact{}, err
	}
	a, err := t.mirror.Sign(ctx, img, s)
	return img, a, err
}

// starts runs an image and checks that its container runs and says words.
func (t *teller) starts(ctx context.Context, image, words string) error {
	t.did("start %s", image)
	c, err := t.try(ctx, image, once)
	if err != nil {
		return fmt.Errorf("%s was expected to start, and was refused: %s", image, node.Text(err))
	}
	t.running[c.ID] = image
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	said, err := c.Output(ctx)
	if err != nil {
		return err
	}
	if said != words {
		return fmt.Errorf("%s was expected to say %q, and said %q", image, words, said)
	}
	if err := t.checkState(ctx); err != nil {
		return err
	}
	t.print("   running, and says %q", said)
	return nil
}

// refused tries to run an image and checks that Tidewaiter refuses it for that
// reason, and that nothing of it runs.
func (t *teller) refused(ctx context.Context, image string, o node.ContainerOptions, reason verify.Reason) error {
	if o.Pull == node.PullAlways {
		t.did("start %s, pulling it anew (imagePullPolicy: Always)", image)
	} else {
		t.did("start %s", image)
	}
	text, err := t.refusal(ctx, image, o)
	if err != nil {
		return fmt.Errorf("%w, expected %s", err, reason)
	}
	at := strings.Index(text, "tidewaiter: ")
	if at < 0 || !strings.HasPrefix(text[at:], fmt.Sprintf("tidewaiter: denied [%s] ", reason)) {
		return fmt.Errorf("%s was expected to be refused with %s, and the answer was: %s", image, reason, text)
	}
	if !t.whole {
		t.whole = true
		t.print("   refused; the whole error, as the kubelet gets it and shows it in the pod's events:")
		t.quote(text)
		return nil
	}
	t.quote("refused: " + digests.ReplaceAllString(text[at:], "$1..."))
	return nil
}

// refusedByContainerd tries to run an image while Tidewaiter is not there.
func (t *teller) refusedByContainerd(ctx context.Context, image string) error {
	const want = `required plugin "tidewaiter" not present`
	t.did("start %s", image)
	text, err := t.refusal(ctx, image, once)
	if err != nil {
		return fmt.Errorf("%w, expected %s", err, want)
	}
	if !strings.Contains(text, want) {
		return fmt.Errorf("%s was expected to be refused with %s, and the answer was: %s", image, want, text)
	}
	t.quote("refused by containerd: " + text)
	t.print("   (The %d containers from before go on running.)", len(t.running))
	return nil
}

// refusal tries to run an image and returns what CRI answers. An error means that
// it was not refused, or that something runs that should not.
func (t *teller) refusal(ctx context.Context, image string, o node.ContainerOptions) (string, error) {
	c, err := t.try(ctx, image, o)
	if err == nil {
		return "", fmt.Errorf("%s was expected to be refused, and its container %s started", image, c.ID)
	}
	if ctx.Err() != nil {
		return "", err
	}
	return node.Text(err), t.checkState(ctx)
}

// try runs an image in a pod of its own. PENDING is tried again as a kubelet
// does. The pod stays, so that it can be seen what is in it.
func (t *teller) try(ctx context.Context, image string, o node.ContainerOptions) (*node.Container, error) {
	if strings.HasPrefix(image, "sha256:") {
		o.ImageID = image
	}
	pod, err := t.node.RunPod(ctx, node.PodOptions{})
	if err != nil {
		return nil, fmt.Errorf("running a pod: %w", err)
	}
	return pod.Run(ctx, image, o, node.Retry{})
}

// checkState compares what runs with what must run: what CRI says that there is,
// in whatever state, and the tasks that containerd has.
func (t *teller) checkState(ctx context.Context) error {
	want := slices.Sorted(maps.Keys(t.running))
	known, err := t.node.Containers(ctx)
	if err != nil {
		return err
	}
	slices.Sort(known)
	if !slices.Equal(known, want) {
		return fmt.Errorf("containers were expected to be %q, and CRI says %q", want, known)
	}
	pods, err := t.node.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		want = append(want, p.Id) // each has a task for the pause image
	}
	slices.Sort(want)
	table, err := t.node.Ctr(ctx, "task", "ls")
	if err != nil {
		return err
	}
	var tasks []string
	for i, line := range strings.Split(strings.TrimSpace(table), "\n") {
		fields := strings.Fields(line) // TASK PID STATUS
		if len(fields) != 3 {
			return fmt.Errorf("ctr task ls: not a line with three fields: %q", line)
		}
		if i == 0 {
			continue
		}
		if fields[2] != "RUNNING" {
			return errors.New("a task does not run: " + line)
		}
		tasks = append(tasks, fields[0])
	}
	slices.Sort(tasks)
	if !slices.Equal(tasks, want) {
		return fmt.Errorf("tasks were expected to be %q, and containerd has %q", want, tasks)
	}
	return nil
}

func (t *teller) title(title string) {
	t.step++
	t.print("\n%d. %s.", t.step, title)
}

// did prints an action that is about to be done.
func (t *teller) did(format string, a ...any) { t.print("   > "+format, a...) }

// digests finds digests and what is left of them where they are cut short.
var digests = regexp.MustCompile(`(sha256:[0-9a-f]{12})[0-9a-f]{52}`)

// quote prints an answer as it came, but for line breaks.
func (t *teller) quote(answer string) {
	for _, line := range wrap(answer, 96) {
		t.print("   %s", line)
	}
}

func (t *teller) print(format string, a ...any) {
	// Whoever reads this may have gone; the story is checked to its end all the same.
	_, _ = fmt.Fprintf(t.out, format+"\n", a...)
}

// wrap breaks text at spaces into lines of at most width bytes, where it has
// spaces.
func wrap(text string, width int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		last := len(lines) - 1
		if last < 0 || len(lines[last])+1+len(word) > width {
			lines = append(lines, word)
			continue
		}
		lines[last] += " " + word
	}
	return lines
}
