package tally

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

const (
	// A plugin that registers is told of all pods and containers, in messages of at
	// most 4 MiB (ttrpc's bound). Some of that is left for the messages' own form.
	maxMessage = 4<<20 - 64<<10

	// MaxTold is the length of one pod or container in NRI's messages from which on a
	// gate that enforces refuses it, in bytes: none that is shorter can end the runtime.
	MaxTold = 300 << 10

	// MaxSandbox is the length that the record of a pod has at most if the gate let it in.
	MaxSandbox = MaxTold + MaxTold/8 + Rest

	// Rest is what NRI tells of a pod or container besides what its author can make
	// long, in bytes: some 16 KiB, most of it system calls.
	Rest = 24 << 10

	maxNamed = 4 // pods and containers that are named, the longest
)

// A Length is how long one pod or container is in NRI's messages.
type Length struct {
	Pod     string // ID of the pod; empty: it is not known
	Name    string // of the container, in its pod
	Sandbox bool   // it is the pod itself
	Told    bool   // NRI tells a plugin of it, as it does not of containers that ended
	Size    int    // in bytes
	Text    string // what a message calls it
}

// A listing is what NRI would tell a plugin of that registers.
type listing struct {
	pods, containers []int    // bytes of each
	sum              int      // of all
	most             []Length // the longest of them, longest first
}

func (t *listing) add(l Length) {
	if l.Sandbox {
		t.pods = append(t.pods, l.Size)
	} else {
		t.containers = append(t.containers, l.Size)
	}
	t.sum += l.Size
	at, _ := slices.BinarySearchFunc(t.most, l, func(a, b Length) int { return cmp.Compare(b.Size, a.Size) })
	if at < maxNamed {
		t.most = slices.Insert(t.most, at, l)
		t.most = t.most[:min(len(t.most), maxNamed)]
	}
}

// large says why a plugin could not be told of it, or is empty.
func (t *listing) large() string {
	if !tooLarge(t.pods, t.containers) {
		return ""
	}
	var names []string
	for _, l := range t.most {
		names = append(names, fmt.Sprintf("%s (%d KiB)", l.Text, l.Size>>10))
	}
	return fmt.Sprintf("labels, annotations, arguments and environment of %d pods and %d containers have %d KiB together, most of it %s; delete these pods",
		len(t.pods), len(t.containers), t.sum>>10, strings.Join(names, ", "))
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
		switch synchronize(pods, containers, maxMessage) {
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
	endsRuntime         // the runtime may end
)

// synchronize does to lengths what NRI 0.11 to 0.12.5 does to pods and containers
// (synchronize and recalcObjsPerSyncMsg in pkg/adaptation/plugin.go), with messages of at
// most so many bytes.
func synchronize(pods, containers []int, most int) outcome {
	const fewest = 8
	p, c := len(pods), len(containers)
	for {
		size := 0
		for _, list := range [][]int{pods[:p], containers[:c]} {
			for _, n := range list {
				size += n
			}
		}
		if size <= most {
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
		factor := min(0.9, float64(most)/float64(size))
		p, c = int(float64(p)*factor), int(float64(c)*factor)
		if p+c < fewest {
			p, c = fewest/2, fewest/2
		}
		if p > len(pods) || c > len(containers) {
			return endsRuntime
		}
	}
}

// TooLong says why a pod or container of n bytes is refused.
func TooLong(n int) string {
	return fmt.Sprintf("labels, annotations, arguments and environment have some %d KiB, more than %d KiB of one pod or container: containerd could not tell a gate of them when it starts; put what is long into a file, or set enableServiceLinks: false where it is the addresses of services", n>>10, MaxTold>>10)
}
