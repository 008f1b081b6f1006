package selftest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// podGone is how containerd 2.2 to 2.4 refuses a container whose sandbox was stopped or
// removed (internal/cri/server/container_create.go).
var podGone = regexp.MustCompile(`sandbox container "?[0-9a-f]{1,64}"? is not running|failed to find sandbox id`)

// renewPod runs a new pod in place of one that was taken away: a kubelet looks every two
// seconds for pods that it does not know. Run removes all of them.
func (t *test) renewPod(ctx context.Context) error {
	if len(t.gone) == maxPods {
		return fmt.Errorf("a kubelet took %d pods away", maxPods)
	}
	raw := make([]byte, 8)
	rand.Read(raw)
	p, err := t.runPod(ctx, t.nonce, uid(raw))
	if err != nil {
		return fmt.Errorf("a kubelet took the pod away, and containerd does not run another: %w", err)
	}
	t.gone, t.pod = append(t.gone, t.pod), p
	return nil
}

// absent creates a container while the gate is away.
func (t *test) absent(ctx context.Context, r rule, before *control.Status) {
	one := Trial{Kind: Absent, Rule: r.statement, Image: r.image, Outcome: Failed}
	defer func() { t.add(one) }()
	if before != nil { // otherwise it is away
		pid, err := node.Listener(filepath.Join(t.RunDir, control.SocketName))
		if err == nil && pid == 0 {
			err = errors.New("it cannot be seen from here: run this on the host")
		}
		if err != nil {
			one.Text = "the process of the gate: " + err.Error()
			return
		}
		guard := t.Guard
		if guard == nil {
			guard = Self
		}
		release, err := hold(ctx, pid, guard)
		if err != nil {
			one.Text = "the gate was not stopped: " + err.Error()
			return
		}
		defer func() {
			if err := release(); err != nil {
				one.Text += "; the gate was to be continued: " + err.Error()
			}
			if err := t.back(ctx); err != nil {
				one.Expected = false
				one.Text += "; the gate did not come back: " + err.Error()
			}
		}()
	}
	// containerd drops a gate that hangs once it was asked, and refuses that one
	// creation all the same; then the gate is absent.
	var err error
	held, cancel := context.WithTimeout(ctx, heldTime)
	defer cancel()
	for range 5 {
		err = t.try(held, r.image)
		if created(err) || absentLine.MatchString(err.Error()) || held.Err() != nil {
			break
		}
	}
	switch {
	case created(err):
		one.Outcome, one.Text = Created, "LET THROUGH: without the gate containerd creates containers unasked"
	case absentLine.MatchString(err.Error()):
		one.Outcome, one.Expected, one.Text = Refused, true, "refused without the gate: "+absentLine.FindString(err.Error())
	case otherLine.MatchString(err.Error()):
		one.Outcome, one.Text = Refused, "refused for want of another plugin than the gate: "+otherLine.FindString(err.Error())
	case denial.MatchString(err.Error()):
		one.Outcome, one.Text = Refused, "refused by another gate of this node; that containerd requires one was not seen"
	default:
		one.Text = "refused while the gate hangs; that containerd requires it was not seen: " + err.Error()
	}
}

// back waits until the gate is asked again.
func (t *test) back(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	for {
		s, err := control.Ask(ctx, t.RunDir)
		if err == nil && s.Ready {
			// It may not have noticed yet that containerd dropped it.
			if err = sleep(ctx, 300*time.Millisecond); err == nil {
				s, err = control.Ask(ctx, t.RunDir)
			}
			if err == nil && s.Ready {
				return nil
			}
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return errors.Join(ctx.Err(), err)
		}
	}
}
