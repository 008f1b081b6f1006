package daemon

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Bounds of repeats. A kubelet tries a container that was refused every 10 to 15 seconds,
// for days if nobody looks: a line each time would be 10 MB a day for each.
const (
	inFull      = 20               // lines of the same answer until it is old news
	seldom      = 10 * time.Minute // between two of old news
	forgotten   = time.Hour        // after which old news are new
	maxRepeated = 1024             // answers that are told apart
)

// repeats says of answers whether they are old news. The zero value is ready. It is safe
// for concurrent use.
type repeats struct {
	mu   sync.Mutex
	seen *simplelru.LRU[repeatKey, *repeated]
}

type repeatKey struct {
	kind     string
	hook     string
	revision string // a new configuration makes all of it news
	id       string // same for the same image, rule and reason
	image    string
	space    string // namespace
	pod      string
	uid      string // empty where it is not Kubernetes' pod
	name     string // container
}

type repeated struct {
	said   int // lines
	unsaid int // since the last line
	line   time.Time
	last   time.Time
}

// news reports whether an answer is to be written, and how often the same was not since it
// was written last.
func (r *repeats) news(kind, hook string, d verify.Report, now time.Time) (write bool, unsaid int) {
	k := repeatKey{kind: kind, hook: hook, revision: d.Revision, id: d.ID, image: d.Image}
	if d.Pod != nil {
		k.space, k.pod, k.uid, k.name = d.Pod.Namespace, d.Pod.Name, d.Pod.UID, d.Pod.Container
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen, _ = simplelru.NewLRU[repeatKey, *repeated](maxRepeated, nil) // fails for no size
	}
	s, there := r.seen.Get(k)
	if !there || now.Sub(s.last).Abs() > forgotten {
		s = &repeated{}
		r.seen.Add(k, s)
	}
	s.last = now
	if s.said >= inFull && now.Sub(s.line).Abs() < seldom {
		s.unsaid++
		return false, 0
	}
	unsaid = s.unsaid
	s.said, s.unsaid, s.line = s.said+1, 0, now
	return true, unsaid
}
