package node

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	// A plugin that registers is told of all pods and containers, in messages of at
	// most 4 MiB. Where eleven of them do not fit into one, NRI up to 0.12.5 may not be
	// able to split a message, and then drops the plugin or ends with all of containerd
	// (synchronize in pkg/adaptation/plugin.go). Some of that is left for the messages'
	// own form.
	maxTogether = 11
	maxMessage  = 4<<20 - 256<<10

	// What is shorter counts as it stands, and is not looked into.
	short = 64 << 10
	// rest is what NRI tells of a pod or container besides what its author can make
	// long: some 16 KiB, most of it system calls.
	rest = 24 << 10
	// entry is the form of one entry of a list or map.
	entry = 12

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
// and reads the records of all containers, pause containers for pods, one at a time.
// Those of containers that have ended count too, although NRI tells of none.
func (c *Containerd) Large(ctx context.Context) (string, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream where it is left early
	defer cancel()
	s, err := c.containers.ListStream(inNamespace(ctx), &containersapi.ListContainersRequest{}, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxRecord))
	if err != nil {
		return "", wrap("containers", err)
	}
	var most []large // the longest, longest first
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
		l := sizeOf(r.GetContainer())
		at, _ := slices.BinarySearchFunc(most, l, func(a, b large) int { return cmp.Compare(b.size, a.size) })
		if at < maxTogether {
			most = slices.Insert(most, at, l)
			most = most[:min(len(most), maxTogether)]
		}
	}
	sum := 0
	for _, l := range most {
		sum += l.size
	}
	if sum <= maxMessage {
		return "", nil
	}
	var names []string
	for _, l := range most {
		if len(names) < 4 && l.size > maxMessage/maxTogether {
			names = append(names, fmt.Sprintf("%s (%d KiB)", l.what, l.size>>10))
		}
	}
	return fmt.Sprintf("labels, annotations, arguments and environment of the %d longest have %d KiB together: %s; delete these pods",
		len(most), sum>>10, strings.Join(names, ", ")), nil
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
	l.size = rest + plainly(own) + plainly(member(asked, "annotations")) + plainly(member(asked, "labels"))
	if !pod { // of a pod's own process NRI tells nothing
		l.size += plainly(spec) + bytesOf(c.GetLabels())
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

// bytesOf is what a map takes in a message.
func bytesOf(m map[string]string) (n int) {
	for k, v := range m {
		n += len(k) + len(v) + entry
	}
	return n
}
