package cache

import (
	"cmp"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	// A flight longer than long makes its line a slow one. maxSlow of these are
	// remembered.
	long    = time.Second
	maxSlow = 256

	// Flights that were asked ahead of time get one part in patience of the time of
	// the others, while others wait. A flight counts as a tick at least, and no more
	// than maxCredit of time is saved up or maxDebt owed.
	patience  = 8
	tick      = time.Millisecond
	maxCredit = 2 * time.Second
	maxDebt   = 10 * time.Second

	// behind is how far a line can fall behind its siblings by the time that it took.
	behind = time.Minute
)

// A queue holds the flights that have not started yet and decides which is next. A
// pod's author can choose hosts, repositories and images at will, so turns are taken
// between things that they cannot multiply:
//
//   - Lines are nested; see roster.place. The outermost are the hosts that the
//     configuration names, all hosts together that gave a yes before, and all other
//     hosts together.
//   - Of the lines beside each other the one with the fewest flights under way is next,
//     and of several the one that has taken the least time. Of hosts that no one named
//     those that are slow come last.
//   - Lines whose last flight was long, and hosts that no one named, leave one slot to
//     all others.
//   - When too many wait, the hosts that no one named give way first, then the line with
//     the most, each with its youngest flight.
//
// What is asked ahead of time has lines of its own. One such flight is under way at a
// time, and it gets a part of the slots however much others wait.
//
// Cache.mu guards it.
type queue struct {
	slots  int // flights at once
	room   int // flights that may wait, and as many that were asked ahead of time
	roster *roster

	asked   line // flights that somebody waits for
	ahead   line // flights that were asked ahead of time
	running int
	modest  int // of these, those that leave a slot to all others
	early   int // of these, those that were asked ahead of time

	credit [2]time.Duration // what flights asked ahead of time are owed, by whether they are modest
}

// A line has flights that wait, or lines with such flights in it.
type line struct {
	name    string
	up      *line
	lines   []*line   // with flights that wait or run; the one that was served last comes last
	flights []*flight // that wait, oldest first; only without lines
	waiting int       // flights here and below
	running int
	spent   time.Duration // by flights that ended; a line that comes has spent as much as that beside it with the least
	floor   time.Duration // what that was last
}

// A flight is one verification for all who ask the same. Cache.mu guards all but the
// first two fields, and question until a step has started.
type flight struct {
	place    place
	done     chan struct{} // closed when answer is set
	question verify.Question

	queue   *queue // of the step that it is in
	line    *line  // in which it waits, or waited
	mark    mark   // of the line that is slow if it is long
	ahead   bool   // asked ahead of time, and by no one else before it started
	started bool   // this step
	modest  bool   // see queue

	wanted verify.Question // of who waits for what was started ahead of time; the zero one: no one does
	near   verify.Decision // what the node's own evidence came to
	begun  bool            // some step started
	late   bool            // somebody waited in vain
	ended  bool
	answer verify.Decision
	before verify.Decision // what the last flight of that place ended with, if it settled nothing
}

func newQueue(slots, room int, r *roster) *queue { return &queue{slots: slots, room: room, roster: r} }

func (q *queue) lane(f *flight) *line {
	if f.ahead {
		return &q.ahead
	}
	return &q.asked
}

// add puts f into its line.
func (q *queue) add(f *flight) {
	path, m := q.roster.place(f.place)
	f.queue, f.mark, f.started, f.modest = q, m, false, false
	l := q.lane(f)
	l.waiting++
	for _, name := range path {
		l = l.enter(name)
		l.waiting++
	}
	l.flights = append(l.flights, f)
	f.line = l
}

// enter returns the line of that name in l.
func (l *line) enter(name string) *line {
	if in := l.find(name); in != nil {
		return in
	}
	l.floor = l.least()
	in := &line{name: name, up: l, spent: l.floor}
	l.lines = append(l.lines, in)
	return in
}

// least is how little time a line in l has taken.
func (l *line) least() time.Duration {
	if len(l.lines) == 0 {
		return l.floor
	}
	return slices.MinFunc(l.lines, func(a, b *line) int { return cmp.Compare(a.spent, b.spent) }).spent
}

func (l *line) find(name string) *line {
	if i := slices.IndexFunc(l.lines, func(o *line) bool { return o.name == name }); i >= 0 {
		return l.lines[i]
	}
	return nil
}

// remove takes f, which waits, out of its line.
func (q *queue) remove(f *flight) {
	f.line.flights = slices.DeleteFunc(f.line.flights, func(o *flight) bool { return o == f })
	for l := f.line; l != nil; l = l.up {
		l.waiting--
	}
	f.line.leave()
}

// leave takes lines out that have nothing any more.
func (l *line) leave() {
	for ; l.up != nil && l.waiting == 0 && l.running == 0; l = l.up {
		l.up.lines = slices.DeleteFunc(l.up.lines, func(o *line) bool { return o == l })
	}
}

// pick returns the flight in l whose turn it is, or nil.
func (q *queue) pick(l *line, modest bool) *flight {
	if len(l.flights) > 0 {
		if !modest && q.roster.yields(l.flights[0].mark) {
			return nil // of one line all yield or none
		}
		return l.flights[0]
	}
	for _, in := range slices.SortedStableFunc(slices.Values(l.lines), func(a, b *line) int {
		if l.name == others {
			if c := flag(q.slow(a)) - flag(q.slow(b)); c != 0 {
				return c
			}
		}
		return cmp.Or(cmp.Compare(a.running, b.running), cmp.Compare(a.spent, b.spent))
	}) {
		if f := q.pick(in, modest); f != nil {
			return f
		}
	}
	return nil
}

// next takes the flight out that is to start now, or returns nil.
func (q *queue) next() *flight {
	if q.running >= q.slots {
		return nil
	}
	modest := q.modest < max(q.slots-1, 1)
	f := q.pick(&q.asked, modest)
	if q.early == 0 {
		if a := q.pick(&q.ahead, modest); a != nil && (f == nil || q.credit[q.kind(a)] >= tick || q.kind(f) > q.kind(a)) {
			f = a
		}
	}
	if f == nil {
		return nil
	}
	f.started, f.modest = true, q.roster.yields(f.mark)
	q.running++
	if f.modest {
		q.modest++
	}
	if f.ahead {
		q.early++
	}
	for l := f.line; l != nil; l = l.up {
		l.running++
		if l.up != nil {
			i := slices.Index(l.up.lines, l)
			l.up.lines = append(slices.Delete(l.up.lines, i, i+1), l)
		}
	}
	q.remove(f)
	return f
}

func (q *queue) kind(f *flight) int { return flag(q.roster.yields(f.mark)) }

// end is told that f, which took so long, is over, and whether it settled something.
func (q *queue) end(f *flight, took time.Duration, settled bool) {
	q.running--
	if f.modest {
		q.modest--
	}
	counts := max(took, tick)
	for l := f.line; l != nil; l = l.up {
		l.running--
		l.spent += counts
		if l.up != nil {
			l.spent = min(l.spent, l.up.least()+behind)
		}
	}
	f.line.leave()
	if f.ahead {
		q.early--
		if i := flag(f.modest); q.asked.waiting > 0 { // else it costs no one anything
			q.credit[i] = max(q.credit[i]-counts, -maxDebt)
		}
		if took <= long || settled { // sources take their time for what no one waits for
			return
		}
	} else {
		for i := range q.credit {
			q.credit[i] = min(q.credit[i]+counts/patience, maxCredit)
		}
	}
	q.roster.took(f.mark, took)
}

// crowded takes the flight out that has to give way to f, which has just been
// added, or f itself. It returns nil if there is room.
func (q *queue) crowded(f *flight) *flight {
	l := q.lane(f)
	if f.started || l.waiting <= q.room {
		return nil
	}
	own := map[*line]bool{}
	for o := f.line; o != nil; o = o.up {
		own[o] = true
	}
	if o := l.find(others); o != nil && o.waiting > 0 {
		l = o
	}
	for len(l.lines) > 0 {
		most := l.lines[0]
		for _, in := range l.lines[1:] {
			if cmp.Or(cmp.Compare(in.waiting, most.waiting), flag(q.slow(in))-flag(q.slow(most)), flag(own[in])-flag(own[most])) >= 0 {
				most = in
			}
		}
		l = most
	}
	v := l.flights[len(l.flights)-1]
	q.remove(v)
	return v
}

// slow reports whether the oldest flight that waits in l is of a slow line.
func (q *queue) slow(l *line) bool {
	for len(l.lines) > 0 {
		l = l.lines[0]
	}
	return len(l.flights) > 0 && q.roster.isSlow(l.flights[0].mark)
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

// before is how many others wait for their turn while f does.
func (q *queue) before(f *flight) int {
	if f.started {
		return 0
	}
	return q.asked.waiting - 1
}

// clear forgets what waits.
func (q *queue) clear() { q.asked, q.ahead = line{}, line{} }
