package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	// A record that is shorter counts as it stands, and is not looked into.
	maxUnread = 64 << 10
	// entryBytes is the form of one entry of a list or map in a message.
	entryBytes = 12

	// maxRecord bounds what is read of one container, in bytes. A record has the
	// environment twice, and in JSON it may have grown to six times its length.
	maxRecord = 16 << 20
)

// criSandbox is the extension in which the CRI plugin keeps what it knows of a pod, as
// JSON (internal/cri/store/sandbox/metadata.go).
const criSandbox = "io.cri-containerd.sandbox.metadata"

var _ tally.Records = (*Containerd)(nil)

// Lengths implements [tally.Records]. It waits for containerd, and reads the records of
// all containers of CRI, pause containers for pods, one at a time. Pods whose runtime
// keeps no pause container (Kata's own sandboxes) are not seen.
func (c *Containerd) Lengths(ctx context.Context, yield func(tally.Length)) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream if it is left early
	defer cancel()
	live := c.live(ctx)
	s, err := c.containers.ListStream(inNamespace(ctx), &containersapi.ListContainersRequest{}, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxRecord))
	if err != nil {
		return wrap("containers", err)
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if status.Code(err) == codes.ResourceExhausted {
			return fmt.Errorf("%w: it has more than %d MiB", tally.ErrRecord, maxRecord>>20)
		}
		if err != nil {
			return wrap("containers", err)
		}
		ctr := r.GetContainer()
		switch kind := Kind(ctr.GetLabels()[labelKind]); kind {
		case KindSandbox:
			l := lengthOf(ctr)
			l.Pod, l.Told = ctr.GetID(), true
			yield(l)
		case KindContainer:
			l := lengthOf(ctr)
			l.Pod, l.Name = ownerOf(ctr)
			l.Told = live == nil || live[ctr.GetID()]
			yield(l)
		}
	}
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

// lengthOf returns how many bytes NRI needs to tell of a container or, for a pause
// container, of its pod: no fewer, and not many more.
func lengthOf(c *containersapi.Container) tally.Length {
	pod := Kind(c.GetLabels()[labelKind]) == KindSandbox
	l := tally.Length{Sandbox: pod, Text: "container " + text.Clean(c.GetID(), 80)}
	extension := criMetadata
	if pod {
		extension = criSandbox
	}
	spec, known := c.GetSpec().GetValue(), c.GetExtensions()[extension].GetValue()
	l.Size = bytesOf(c.GetLabels()) + len(spec) + len(known)
	if l.Size <= maxUnread {
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
	l.Size = tally.Rest + labels + annotations
	if !pod { // of a pod's own process NRI tells nothing
		process := member(spec, "process")
		l.Size += plainly(spec) - plainly(own) - texts(member(process, "args")) - texts(member(process, "env"))
	}
	var a map[string]string
	if len(own) <= maxUnread && json.Unmarshal(own, &a) == nil && a[annotationPod] != "" {
		l.Text = "pod " + text.Clean(a[annotationNamespace]+"/"+a[annotationPod], 128)
		if !pod {
			l.Text = "container " + text.Clean(a[annotationContainer], 64) + " of " + l.Text
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
		n += len(k) + len(v) + entryBytes
	}
	return n
}

// ownerOf returns the ID of the pod that a container is in, and its name there.
func ownerOf(c *containersapi.Container) (pod, name string) {
	metadata := member(c.GetExtensions()[criMetadata].GetValue(), "Metadata")
	_ = json.Unmarshal(member(metadata, "SandboxID"), &pod)
	_ = json.Unmarshal(member(member(member(metadata, "Config"), "metadata"), "name"), &name)
	return pod, name
}
