// Package tally counts how long pods and containers are in the messages in which the
// runtime tells a plugin of all that there are when it registers, and refuses what would
// make that impossible.
package tally

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	// One pod with its containers may have maxPod bytes, and all pods that have more
	// maxHeavy together. However many pods there are, and whichever of them go, NRI then
	// gets through them in most orders (TestTallyKeepsRegistration). A bound on the sum of
	// all would not do: it is the pods that go which make the others too many, and the
	// pods of one author would be held against those of another.
	maxPod   = 1 << 20
	maxHeavy = 3 << 20

	// maxTallied is how many pods and containers are counted.
	maxTallied = 8192
	// young is how long what was allowed counts before containerd has a process of it.
	young = time.Minute
	// old is from when on a pod may be forgotten; see shrink.
	old = time.Hour
	// shrinkInterval is between two tries to make room.
	shrinkInterval = 10 * time.Second
)

// Records are those that the runtime keeps of pods and containers.
type Records interface {
	// Lengths hands over how long each pod and container is. The error wraps ErrRecord if
	// a record is too long to be read; then the rest is not handed over.
	Lengths(ctx context.Context, yield func(Length)) error
}

// ErrRecord says that the record of one container is too long to be read.
var ErrRecord = errors.New("the record of a container is too long to be read")

// A Tally keeps count of the lengths of pods and containers, so that those that were let
// in never keep a gate from registering. It counts what the gate allowed, by its length
// in the runtime's request, and is corrected by what containerd has. It is safe for
// concurrent use.
type Tally struct {
	records Records
	now     func() time.Time
	again   func()        // asks for a correction; must not block
	turn    chan struct{} // filled while Large reads: what was read first must not come last

	mu      sync.Mutex
	pods    map[string]*podTally // by ID
	n       int                  // pods and containers in it
	trouble string

	forgotten int       // bytes of pods that are in pods no more; see shrink
	corrected time.Time // when Large last read all
	failing   time.Time // since when it cannot; zero: it can
	failure   string    // why not
	shrunk    time.Time
}

type podTally struct {
	own        counted
	containers map[string]counted // by name: a kubelet has one of a name at a time
}

// A counted is one pod or container.
type counted struct {
	size int
	at   time.Time // when it was allowed; zero: containerd has it
}

// New makes one. again is called when something was refused or the tally is half
// full, to have Large called soon.
func New(records Records, now func() time.Time, again func()) *Tally {
	return &Tally{records: records, now: now, again: again, turn: make(chan struct{}, 1), pods: map[string]*podTally{}}
}

func (p *podTally) total() int {
	n := p.own.size
	for _, c := range p.containers {
		n += c.size
	}
	return n
}

// What a registration tells of a pod or container is what the request to create it told,
// with its state, process ID and times: 24 bytes more of a small container on containerd
// 2.3.7 (2,496 for 2,472), 16 of its pod (1,137 for 1,121). An eighth and half a KiB are
// for more of these, and for what another plugin may add.
const (
	told = 512
	// shortest is what a container is counted for that has no length, such as in a
	// message that could not be read: a little more than the smallest that was measured.
	shortest = 3 << 10
)

// guess is what the runtime tells of a pod or container of which its request had n bytes,
// or more.
func guess(n int) int { return max(n+n/8+told, shortest) }

// Refuses says why a container must not be created: the pod would have more bytes with it
// than a gate that registers can be told of. Nil lets it be. Lengths are those of the
// runtime's request.
func (t *Tally) Refuses(pod string, podBytes int, container string, bytes int) *verify.Fault {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n >= maxTallied {
		t.shrink()
	}
	p := t.pods[pod]
	if t.n >= maxTallied {
		t.again()
		detail := fmt.Sprintf("more than %d pods and containers were created since the gate last looked at what there is; it looks again now", maxTallied)
		if !t.failing.IsZero() {
			detail = fmt.Sprintf("more than %d pods and containers were created, and since %s the gate cannot find out which of them ended: %s", maxTallied, t.failing.UTC().Format(time.RFC3339), t.failure)
		}
		return &verify.Fault{Reason: verify.Overloaded, Detail: detail}
	}
	total, before := guess(podBytes)+guess(bytes), 0
	if p != nil {
		before = p.total()
		total = before - p.containers[container].size + guess(bytes)
	}
	if total <= maxPod || total <= before {
		return nil
	}
	heavy := total + t.forgotten
	for id, other := range t.pods {
		if n := other.total(); id != pod && n > maxPod {
			heavy += n
		}
	}
	if heavy <= maxHeavy {
		return nil
	}
	t.again()
	return &verify.Fault{Reason: verify.PodTooLarge, Detail: fmt.Sprintf("with this container the pod has some %d KiB of labels, annotations, arguments and environment, more than %d KiB of one pod, and all such pods %d KiB, more than %d KiB: containerd could not tell a gate of them when it starts; put what is long into a file, or set enableServiceLinks: false where it is the addresses of services",
		total>>10, maxPod>>10, heavy>>10, maxHeavy>>10)}
}

// Allowed counts a pod or, with a name, a container that was allowed, and its pod.
func (t *Tally) Allowed(pod string, podBytes int, container string, bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n >= maxTallied {
		t.shrink()
	}
	if t.n >= maxTallied {
		return
	}
	now, before := t.now(), t.n
	p := t.pods[pod]
	if p == nil {
		p = &podTally{own: counted{guess(podBytes), now}, containers: map[string]counted{}}
		t.pods[strings.Clone(pod)] = p
		t.n++
	}
	if container != "" {
		if _, ok := p.containers[container]; !ok {
			t.n++
		}
		p.containers[strings.Clone(container)] = counted{guess(bytes), now}
	}
	if before < maxTallied/2 && t.n >= maxTallied/2 { // a container may have come with its pod
		t.again()
	}
}

// Uncorrected returns since when the runtime does not say what there is, and why; zero:
// it does. Until then what ended counts too.
func (t *Tally) Uncorrected() (since time.Time, why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failing, t.failure
}

// shrink makes room in a count that is full and cannot be corrected, or everything would
// be refused for as long as the runtime's list cannot be read. The lengths stay in the sums,
// but for one case that the last point names:
//
//   - A pod is counted as one, with what its containers have together. A container that is
//     created again counts once more then.
//   - If that is not enough, the pods that are longest without a change are forgotten, but
//     none that is heavy or changed within the last hour. What they have counts as if it
//     was one heavy pod, so that soon no other pod may become heavy.
//
// A pod that is forgotten and still runs begins at nothing if more containers come to it,
// which needs 4,096 pods after it. t.mu is held.
func (t *Tally) shrink() {
	now := t.now()
	if t.failing.IsZero() || now.Sub(t.shrunk) < shrinkInterval {
		return
	}
	t.shrunk = now
	type aged struct {
		id string
		at time.Time
	}
	var list []aged
	for id, p := range t.pods {
		at := p.changed()
		if at.IsZero() {
			at = t.corrected // then it was seen
		}
		if now.Sub(at) <= young {
			continue // what containerd does not have yet is needed by its name
		}
		t.n -= len(p.containers)
		p.own = counted{size: p.total(), at: at}
		clear(p.containers)
		if p.own.size <= maxPod && now.Sub(at) > old {
			list = append(list, aged{id, at})
		}
	}
	slices.SortFunc(list, func(a, b aged) int { return a.at.Compare(b.at) })
	for _, a := range list {
		if t.n < maxTallied/2 {
			return
		}
		t.forgotten += t.pods[a.id].own.size
		delete(t.pods, a.id)
		t.n--
	}
}

// changed returns when something of the pod was allowed last; zero: all was seen.
func (p *podTally) changed() time.Time {
	at := p.own.at
	for _, c := range p.containers {
		if c.at.After(at) {
			at = c.at
		}
	}
	return at
}

// failed notes that the list could not be read. t.mu is held.
func (t *Tally) failed(why string) {
	if t.failing.IsZero() {
		t.failing = t.now()
	}
	t.failure = text.Clean(why, verify.MaxMessage)
}

// Trouble says why a gate could not register now, as Large last found, or is empty.
func (t *Tally) Trouble() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.trouble
}

// Large says which pods and containers keep the runtime from telling a plugin of all
// that there are when it registers, or is empty if none do. It corrects the count by
// what it reads.
func (t *Tally) Large(ctx context.Context) (string, error) {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	began := t.now()
	var all listing
	pods, n := map[string]*podTally{}, 0
	of := func(id string) *podTally {
		p := pods[id]
		if p == nil {
			p = &podTally{containers: map[string]counted{}}
			pods[id] = p
			n++
		}
		return p
	}
	err := t.records.Lengths(ctx, func(l Length) {
		if !l.Told {
			return
		}
		all.add(l)
		if n >= maxTallied || l.Pod == "" {
			return
		}
		p := of(l.Pod)
		if l.Sandbox {
			p.own = counted{size: l.Size}
			return
		}
		if _, ok := p.containers[l.Name]; !ok {
			n++
		}
		// Two of a name are two that a plugin is told of.
		p.containers[l.Name] = counted{size: p.containers[l.Name].size + l.Size}
	})
	if errors.Is(err, ErrRecord) {
		why := err.Error() + "; delete the pod that has a long environment"
		t.mu.Lock()
		defer t.mu.Unlock()
		t.trouble = why // what was counted stays: the rest of the list is not known
		t.failed(why)
		return why, nil
	}
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.failed(err.Error())
		return "", err
	}
	why := all.large()
	t.mu.Lock()
	defer t.mu.Unlock()
	// What was allowed lately may not run yet.
	for id, p := range t.pods {
		for name, c := range p.containers {
			if c.at.IsZero() || began.Sub(c.at) > young || n >= maxTallied {
				continue
			}
			now := of(id)
			if now.own.size == 0 {
				now.own = p.own
			}
			if _, ok := now.containers[name]; !ok {
				now.containers[name] = c
				n++
			}
		}
		if !p.own.at.IsZero() && began.Sub(p.own.at) <= young && pods[id] == nil && n < maxTallied {
			of(id).own = p.own
		}
	}
	t.pods, t.n, t.trouble = pods, n, why
	t.forgotten, t.corrected, t.failing, t.failure = 0, began, time.Time{}, ""
	return why, nil
}
