package node

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	// A plugin that registers is told of all pods and containers, in messages of at
	// most 4 MiB (ttrpc's bound). Some of that is left for the messages' own form.
	maxMessage = 4<<20 - 64<<10

	// What is shorter counts as it stands, and is not looked into.
	short = 64 << 10
	// rest is what NRI tells of a pod or container besides what its author can make
	// long: some 16 KiB, most of it system calls.
	rest = 24 << 10
	// entry is the form of one entry of a list or map.
	entry = 12

	maxNamed = 4 // pods and containers that are named, the longest

	// maxRecord bounds what is read of one container, in bytes. A record has the
	// environment twice, and in JSON it may have grown to six times its length.
	maxRecord = 16 << 20
)

// criSandbox is the extension in which the CRI plugin keeps what it knows of a pod, as
// JSON (internal/cri/store/sandbox/metadata.go).
const criSandbox = "io.cri-containerd.sandbox.metadata"

// A large is a pod or container that NRI needs many bytes to tell of.
type large struct {
	what string
	size int
}

// Large says which pods and containers keep the runtime from telling a plugin of all
// that there are when it registers, or is empty where none do. It waits for containerd
// and reads the records of all containers of CRI, pause containers for pods, one at a
// time. Pods whose runtime keeps no pause container (Kata's own sandboxes) are not seen.
func (c *Containerd) Large(ctx context.Context) (string, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream where it is left early
	defer cancel()
	live := c.live(ctx)
	s, err := c.containers.ListStream(inNamespace(ctx), &containersapi.ListContainersRequest{}, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxRecord))
	if err != nil {
		return "", wrap("containers", err)
	}
	var pods, containers []int // bytes of each
	sum := 0                   // of all
	var most []large           // the longest of them, longest first
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if status.Code(err) == codes.ResourceExhausted {
			return fmt.Sprintf("the record of a container is longer than %d MiB; delete the pod that has a long environment", maxRecord>>20), nil
		}
		if err != nil {
			return "", wrap("containers", err)
		}
		ctr := r.GetContainer()
		list := &containers
		switch kind := Kind(ctr.GetLabels()[labelKind]); {
		case kind == KindSandbox:
			list = &pods
		case kind != KindContainer, live != nil && !live[ctr.GetID()]:
			continue // NRI is not told of it: it is not CRI's, or has ended
		}
		l := sizeOf(ctr)
		*list = append(*list, l.size)
		sum += l.size
		at, _ := slices.BinarySearchFunc(most, l, func(a, b large) int { return cmp.Compare(b.size, a.size) })
		if at < maxNamed {
			most = slices.Insert(most, at, l)
			most = most[:min(len(most), maxNamed)]
		}
	}
	if !tooLarge(pods, containers) {
		return "", nil
	}
	var names []string
	for _, l := range most {
		names = append(names, fmt.Sprintf("%s (%d KiB)", l.what, l.size>>10))
	}
	return fmt.Sprintf("labels, annotations, arguments and environment of %d pods and %d containers have %d KiB together, most of it %s; delete these pods",
		len(pods), len(containers), sum>>10, strings.Join(names, ", ")), nil
}

// live are the containers that have a process, or nil where that is not known.
func (c *Containerd) live(ctx context.Context) map[string]bool {
	list, err := tasksapi.NewTasksClient(c.conn).List(inNamespace(ctx), &tasksapi.ListTasksRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return nil
	}
	ids := map[string]bool{}
	for _, t := range list.GetTasks() {
		if t.GetStatus() != task.Status_STOPPED {
			ids[t.GetID()] = true
		}
	}
	return ids
}

// orders is in how many orders tooLarge looks at the same pods and containers: the
// runtime's own changes each time.
const orders = 10

// tooLarge reports whether NRI would not get through the pods and containers of these
// lengths in any order, or might end the runtime in one. It sorts both.
func tooLarge(pods, containers []int) bool {
	random := rand.New(rand.NewPCG(1, 2)) // the same each time, so that the answer is
	dropped := 0
	for i := range orders {
		for _, list := range [][]int{pods, containers} {
			switch i {
			case 0:
				slices.SortFunc(list, func(a, b int) int { return cmp.Compare(b, a) })
			case 1:
				slices.Sort(list)
			default:
				random.Shuffle(len(list), func(a, b int) { list[a], list[b] = list[b], list[a] })
			}
		}
		switch synchronize(pods, containers) {
		case through:
		case dropsPlugin:
			dropped++
		case endsRuntime:
			return true
		}
	}
	return dropped == orders
}

// An outcome is what becomes of a plugin that registers.
type outcome int

const (
	through     outcome = iota
	dropsPlugin         // it is not told of all, and dropped
	endsRuntime         // the runtime panics
)

// synchronize does to lengths what NRI 0.11 to 0.12.5 does to pods and containers
// (synchronize and recalcObjsPerSyncMsg in pkg/adaptation/plugin.go): what does not fit
// into a message is tried again with fewer of both, but with no fewer than four of each,
// whether there are as many or not.
func synchronize(pods, containers []int) outcome {
	const fewest = 8
	p, c := len(pods), len(containers)
	for {
		size := 0
		for _, list := range [][]int{pods[:p], containers[:c]} {
			for _, n := range list {
				size += n
			}
		}
		if size <= maxMessage {
			switch {
			case p == len(pods) && c == len(containers):
				return through
			case p == 0 && c == 0:
				return dropsPlugin // it sends empty messages until its time is over
			}
			pods, containers = pods[p:], containers[c:]
			p, c = min(p, len(pods)), min(c, len(containers))
			continue
		}
		if p+c <= fewest {
			return dropsPlugin
		}
		factor := min(0.9, float64(maxMessage)/float64(size))
		p, c = int(float64(p)*factor), int(float64(c)*factor)
		if p+c < fewest {
			p, c = fewest/2, fewest/2
		}
		if p > len(pods) || c > len(containers) {
			return endsRuntime
		}
	}
}

// sizeOf says how many bytes NRI needs to tell of a container or, for a pause
// container, of its pod: no fewer, and not many more.
func sizeOf(c *containersapi.Container) large {
	l := large{what: "container " + verify.Clean(c.GetID(), 80)}
	extension, pod := criMetadata, Kind(c.GetLabels()[labelKind]) == KindSandbox
	if pod {
		extension = criSandbox
	}
	spec, known := c.GetSpec().GetValue(), c.GetExtensions()[extension].GetValue()
	l.size = bytesOf(c.GetLabels()) + len(spec) + len(known)
	if l.size <= short {
		return l
	}
	own := member(spec, "annotations")
	asked := member(member(known, "Metadata"), "Config")
	if asked == nil {
		return l // it is not what it should be, and counts as it stands
	}
	// What the pod's author has asked for and what containerd made of it have most in
	// common, and NRI tells of both as one.
	labels := max(bytesOf(c.GetLabels()), plainly(member(asked, "labels")))
	annotations := max(plainly(own), plainly(member(asked, "annotations")))
	l.size = rest + labels + annotations
	if !pod { // of a pod's own process NRI tells nothing
		process := member(spec, "process")
		l.size += plainly(spec) - plainly(own) - texts(member(process, "args")) - texts(member(process, "env"))
	}
	var a map[string]string
	if len(own) <= short && json.Unmarshal(own, &a) == nil && a[annotationPod] != "" {
		l.what = "pod " + verify.Clean(a[annotationNamespace]+"/"+a[annotationPod], 128)
		if !pod {
			l.what = "container " + verify.Clean(a[annotationContainer], 64) + " of " + l.what
		}
	}
	return l
}

// What follows finds out how long a text is without decoding all of it: a node can
// have hundreds of MiB of records, each with the same things three times. The JSON is
// containerd's own.

// member is the value of the object raw under key, or nil.
func member(raw []byte, key string) []byte {
	if len(raw) == 0 || raw[0] != '{' {
		return nil
	}
	for at := 1; at < len(raw) && raw[at] == '"'; {
		end := skip(raw, at)
		name := raw[at:end]
		if at = end + 1; at >= len(raw) || raw[end] != ':' {
			return nil
		}
		end = skip(raw, at)
		if len(name) == len(key)+2 && string(name[1:len(name)-1]) == key {
			return raw[at:end]
		}
		at = end + 1 // after the comma
	}
	return nil
}

// skip returns where the value ends that begins at raw[at].
func skip(raw []byte, at int) int {
	for depth := 0; at < len(raw); at++ {
		switch raw[at] {
		case '"':
			for at++; at < len(raw) && raw[at] != '"'; at++ {
				if raw[at] == '\\' {
					at++
				}
			}
			if depth == 0 {
				return min(at+1, len(raw))
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return at + 1
			} else if depth < 0 {
				return at
			}
		case ',', ':':
			if depth == 0 {
				return at
			}
		}
	}
	return len(raw)
}

// plainly is how long raw is at most without the escapes of JSON, with what there is
// between its strings.
func plainly(raw []byte) int {
	n := len(raw)
	for at := 0; ; at += 2 {
		next := bytes.IndexByte(raw[min(at, len(raw)):], '\\')
		if next < 0 {
			return n
		}
		if at += next; at+1 < len(raw) && raw[at+1] == 'u' {
			n -= 3 // of six bytes three are left at most
			if bytes.HasPrefix(raw[at:], []byte(`\u00`)) {
				n -= 2
			}
		} else {
			n--
		}
	}
}

// texts counts the strings of the list raw: each takes a byte less in a message.
func texts(raw []byte) (n int) {
	for at := 1; at < len(raw) && raw[at] == '"'; n++ {
		at = skip(raw, at) + 1
	}
	return n
}

// bytesOf is what a map takes in a message.
func bytesOf(m map[string]string) (n int) {
	for k, v := range m {
		n += len(k) + len(v) + entry
	}
	return n
}
