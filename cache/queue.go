package cache

import (
	"slices"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A flight longer than long makes its host a slow one, of which maxSlow are
// remembered.
const (
	long    = time.Second
	maxSlow = 256
)

// patience is how many flights of slow hosts what is asked ahead of time lets go
// first. Without an end to that, a pod whose registry never answers would keep the
// node from ever looking at what runs on it.
const patience = 8

// A queue holds the flights that have not started yet and says whose turn it is.
// The host of an image is often chosen by a pod's author, so that no host may get
// in the way of another:
//
//   - Hosts take turns. One that has just been served goes last.
//   - Hosts whose last flight was long, and what is asked ahead of time, leave one
//     slot to all others, and go after them. So a registry that never answers, or
//     a hundred of them, delay what is not like them by no flight at all, once they
//     are known, and before that by one.
//   - When too many wait, the host with the most gives way with its youngest.
//
// What is asked ahead of time waits in a lane of its own. It flies alone of its
// kind, and when nobody else waits.
//
// It is guarded by Cache.mu.
type queue struct {
	slots int // flights at once
	room  int // flights that may wait, in each lane

	lines   []*line   // whose turn is next comes first; none is empty
	ahead   []*flight // asked ahead of time, oldest first
	waiting int       // flights in lines
	running int       // flights that have started
	modest  int       // of these, those that leave a slot to all others
	early   int       // of these, those that were asked ahead of time
	passed  int       // flights of slow hosts that ahead let go first
	slow    *simplelru.LRU[string, struct{}]
}

// A line is what waits for one host, oldest first.
type line struct {
	host    string
	flights []*flight
}

// A flight is one verification for all who ask the same. All but the first two
// fields is guarded by Cache.mu, and so is question until the flight has started.
type flight struct {
	place    place
	done     chan struct{} // closed when answer is set
	question verify.Question
	ahead    bool // asked ahead of time, and by nobody else before it started
	started  bool
	modest   bool // see queue
	late     bool // somebody waited in vain
	ended    bool
	answer   verify.Decision
	before   verify.Decision // what the last flight of that place ended with, if it settled nothing
}

func newQueue(slots, room int) *queue {
	q := &queue{slots: slots, room: room}
	q.slow, _ = simplelru.NewLRU[string, struct{}](maxSlow, nil) // fails only for a size below 1
	return q
}

// add puts f into its lane.
func (q *queue) add(f *flight) {
	if f.ahead {
		q.ahead = append(q.ahead, f)
		return
	}
	q.waiting++
	if i := q.find(f.place.host); i >= 0 {
		q.lines[i].flights = append(q.lines[i].flights, f)
		return
	}
	q.lines = append(q.lines, &line{f.place.host, []*flight{f}})
}

// remove takes f, which waits, out of its lane.
func (q *queue) remove(f *flight) {
	same := func(o *flight) bool { return o == f }
	if f.ahead {
		q.ahead = slices.DeleteFunc(q.ahead, same)
		return
	}
	q.waiting--
	i := q.find(f.place.host)
	l := q.lines[i]
	if l.flights = slices.DeleteFunc(l.flights, same); len(l.flights) == 0 {
		q.lines = slices.Delete(q.lines, i, i+1)
	}
}

func (q *queue) find(host string) int {
	return slices.IndexFunc(q.lines, func(l *line) bool { return l.host == host })
}

// last makes host the last whose turn it is.
func (q *queue) last(host string) {
	if i := q.find(host); i >= 0 {
		l := q.lines[i]
		q.lines = append(slices.Delete(q.lines, i, i+1), l)
	}
}

// next takes the flight out that is to start now, or returns nil.
func (q *queue) next() *flight {
	if q.running >= q.slots {
		return nil
	}
	var f *flight
	quick := slices.IndexFunc(q.lines, func(l *line) bool { return !q.slow.Contains(l.host) })
	ready := len(q.ahead) > 0 && q.early == 0
	switch {
	case quick >= 0:
		f = q.lines[quick].flights[0]
	case q.modest >= max(q.slots-1, 1):
		return nil
	case ready && (len(q.lines) == 0 || q.passed >= patience):
		f = q.ahead[0]
		f.modest, q.passed = true, 0
		q.early++
	case len(q.lines) > 0:
		f = q.lines[0].flights[0]
		f.modest = true
		if ready {
			q.passed++
		}
	default:
		return nil
	}
	q.remove(f)
	q.last(f.place.host)
	f.started = true
	q.running++
	if f.modest {
		q.modest++
	}
	return f
}

// end is told that f, which took so long, is over.
func (q *queue) end(f *flight, took time.Duration) {
	q.running--
	if f.modest {
		q.modest--
	}
	if f.ahead { // how long it took says little: sources take their time for it
		q.early--
		return
	}
	if took > long {
		q.slow.Add(f.place.host, struct{}{})
	} else {
		q.slow.Remove(f.place.host)
	}
	q.last(f.place.host)
}

// crowded takes the flight out that has to give way to f, which has just been
// added, or f itself. It returns nil where there is room.
func (q *queue) crowded(f *flight) *flight {
	v := f
	switch {
	case f.started:
		return nil
	case f.ahead:
		if len(q.ahead) <= q.room {
			return nil
		}
	case q.waiting <= q.room:
		return nil
	default:
		most := q.lines[q.find(f.place.host)]
		for _, l := range q.lines {
			if len(l.flights) > len(most.flights) {
				most = l
			}
		}
		if len(most.flights) == 1 && !q.slow.Contains(f.place.host) { // no host has more than another
			for _, l := range q.lines {
				if q.slow.Contains(l.host) {
					most = l
				}
			}
		}
		v = most.flights[len(most.flights)-1]
	}
	q.remove(v)
	return v
}

// before is how many others wait for their turn while f does.
func (q *queue) before(f *flight) int {
	if f.started {
		return 0
	}
	return q.waiting - 1
}
