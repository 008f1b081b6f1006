package matrix

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// A failure is a row of the table. run has the gate fail and checks every answer;
// after it the gate must come back, see scene.recovers.
type failure struct {
	name      string
	short     bool // is in the short form
	neighbour bool // needs one
	run       func(s *scene)
}

// unnoticed is how long after a connection closed the runtime knows it for sure. A
// request in between is one during which it closes: see whileNeighbour.
const unnoticed = 50 * time.Millisecond

// unanswered is what the gate says while it has no answer of its mirror.
var unanswered = []string{"PENDING", "SOURCE_UNREACHABLE", "OVERLOADED", "LIMIT_EXCEEDED"}

var failures = []failure{
	// The first one finds a runtime that no gate was ever connected to.
	{"absent from the start", true, false, func(s *scene) {
		s.refused(s.w.evil, notPresent)
		s.refused(s.w.good, notPresent)
	}},
	{"says no", true, false, func(s *scene) {
		s.ready(false)
		mark := s.gate.Mark()
		for range 3 {
			s.refused(s.w.evil, "SIGNATURE_MISSING")
		}
		s.allows()
		s.still(mark)
	}},
	{"its mirror hangs", false, false, func(s *scene) {
		hang := func(http.Handler) http.Handler {
			return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		}
		s.mirror.Fault(hang)
		defer s.mirror.Fault(nil)
		s.start(false)
		s.asked()
		s.order()
		mark := s.gate.Mark()
		for range 3 {
			for _, img := range []*image{s.w.evil, s.w.good, s.w.unknown} {
				s.refused(img, unanswered...)
			}
		}
		s.still(mark)
		s.mirror.Fault(nil)
		_, err := s.mirror.Sign(s.Context(), s.w.unknown.Image, s.w.signer)
		s.must(err)
		s.becomesAllowed(s.w.unknown)
	}},
	{"answers late, in time", false, false, func(s *scene) {
		s.ready(false)
		mark := s.gate.Mark()
		for _, img := range []*image{s.w.evil, s.w.good} {
			s.hangs()
			c := s.rt.send(question{Create: s.request(img)})
			time.Sleep(timeout / 4)
			s.goesOn()
			if img == s.w.evil {
				s.noted(img, c, "SIGNATURE_MISSING")
			} else if got := s.raw(c); got != allowed {
				s.Errorf("the good image: %s", got)
			} else {
				s.answers = append(s.answers, "good "+allowed)
			}
		}
		s.still(mark)
	}},
	{"answers when time is up", false, false, func(s *scene) {
		for _, by := range []time.Duration{-20 * time.Millisecond, 0, 20 * time.Millisecond} {
			s.ready(false)
			wait := timeout + by
			if s.neighbour != alone {
				wait += slow
			}
			s.hangs()
			c := s.rt.send(question{Create: s.request(s.w.evil)})
			time.Sleep(wait)
			s.goesOn()
			s.noted(s.w.evil, c, timedOut, "SIGNATURE_MISSING")
		}
		// Either answer is right; which one comes is chance.
		slices.Sort(s.answers)
	}},
	{"hangs before the request", true, false, func(s *scene) {
		s.ready(false)
		s.hangs()
		s.refused(s.w.evil, timedOut)
		s.refused(s.w.good, timedOut, notPresent)
		s.refused(s.w.evil, timedOut, notPresent)
	}},
	{"hangs during the neighbour's CREATE", true, true, func(s *scene) {
		s.ready(false)
		s.during(func() {
			if err := s.hang(); err != nil {
				s.Error(err)
			}
		})
		s.refused(s.w.evil, timedOut)
		s.refused(s.w.good, timedOut, notPresent)
	}},
	{"connection closed before the request", false, false, func(s *scene) {
		s.ready(true)
		s.link.cut()
		defer s.link.mend()
		time.Sleep(unnoticed)
		s.refused(s.w.evil, closed, notPresent)
		s.refused(s.w.good, closed, notPresent)
	}},
	{"connection closed while it is asked", false, false, func(s *scene) {
		s.ready(true)
		defer s.link.mend()
		s.whileAsked(s.link.cut)
		s.refused(s.w.good, notPresent)
	}},
	{"connection closed during the neighbour's CREATE", true, true, func(s *scene) {
		s.ready(true)
		defer s.link.mend()
		s.whileNeighbour(s.link.cut)
		s.refused(s.w.good, notPresent)
	}},
	{"SIGKILL before the request", true, false, func(s *scene) {
		s.ready(false)
		s.gate.Kill()
		time.Sleep(unnoticed)
		s.refused(s.w.evil, closed, notPresent)
		s.refused(s.w.good, closed, notPresent)
	}},
	{"SIGKILL while it is asked", true, false, func(s *scene) {
		s.ready(false)
		s.whileAsked(s.gate.Kill)
		s.refused(s.w.good, notPresent)
	}},
	{"SIGKILL during the neighbour's CREATE", true, true, func(s *scene) {
		s.ready(false)
		s.whileNeighbour(s.gate.Kill)
		s.refused(s.w.good, notPresent)
	}},
	{"request of 250 KiB", false, false, func(s *scene) {
		s.ready(false)
		mark := s.gate.Mark()
		const size = 250 << 10
		s.noted(s.w.evil, s.rt.send(question{Create: s.request(s.w.evil), Size: size}), "SIGNATURE_MISSING")
		if got := s.raw(s.rt.send(question{Create: s.request(s.w.good), Size: size})); got != allowed {
			s.Errorf("the good image: %s", got)
		}
		s.answers = append(s.answers, "good "+allowed)
		s.still(mark)
	}},
	{"request of 3.9 MiB", true, false, func(s *scene) {
		s.ready(false)
		mark := s.gate.Mark()
		for _, img := range []*image{s.w.evil, s.w.good} {
			s.noted(img, s.rt.send(question{Create: s.request(img), Size: 39 << 20 / 10}), "POD_TOO_LARGE")
		}
		s.still(mark)
	}},
	{"request of 5 MiB", true, false, func(s *scene) {
		s.ready(false)
		mark := s.gate.Mark()
		for _, img := range []*image{s.w.evil, s.w.good} {
			s.noted(img, s.rt.send(question{Create: s.request(img), Size: 5 << 20}), tooLarge)
		}
		s.still(mark)
	}},
	{"Synchronize cannot be delivered", true, false, func(s *scene) {
		s.gone()
		s.receive(s.rt.send(question{Unlisted: true}), 2*time.Minute)
		s.start(false)
		_, err := s.gate.Wait(s.Context(), 0, func(l node.Line) bool {
			return strings.HasPrefix(l.Msg, "not registered") || strings.HasPrefix(l.Msg, "the runtime took the gate's registration")
		})
		s.must(err)
		s.refused(s.w.evil, notPresent)
		s.refused(s.w.good, notPresent)
		s.receive(s.rt.send(question{}), 2*time.Minute)
	}},
	{"the caller gave up before", false, false, func(s *scene) {
		s.ready(false)
		for _, img := range []*image{s.w.evil, s.w.good} {
			s.noted(img, s.rt.send(question{Create: s.request(img), Expired: true}), timedOut, notPresent)
		}
	}},
	{"impostor 99-tidewaiter beside the gate", true, false, func(s *scene) { s.impostorBeside("99") }},
	{"impostor 50-tidewaiter beside the gate", false, false, func(s *scene) { s.impostorBeside("50") }},
	{"impostor 99-tidewaiter, no gate", true, false, func(s *scene) { s.impostorAlone("99") }},
	{"impostor 50-tidewaiter, no gate", false, false, func(s *scene) { s.impostorAlone("50") }},
}

// whileAsked has f end the gate or its connection while the gate has the request
// and has not answered it.
func (s *scene) whileAsked(f func()) {
	s.Helper()
	s.hangs()
	c := s.rt.send(question{Create: s.request(s.w.evil)})
	time.Sleep(slow + timeout/3)
	f()
	s.noted(s.w.evil, c, closed)
}

// whileNeighbour has f end the gate or its connection while the neighbour creates
// the container, 50 ms or more before it is done. With a neighbour that is asked
// after the gate, a library that skips closed validators lets the container
// through: the gate was counted and then never asked.
func (s *scene) whileNeighbour(f func()) {
	s.Helper()
	mark := s.gate.Mark()
	s.during(f)
	c := s.rt.send(question{Create: s.request(s.w.evil)})
	if !s.lib.skips || s.neighbour != after {
		s.noted(s.w.evil, c, closed, notPresent)
		return
	}
	got := s.raw(c)
	switch got {
	case allowed:
		got = letThrough
		s.noDecision(mark)
	case closed, notPresent:
	default:
		s.Errorf("%s: %s", s.w.evil.Name, got)
	}
	s.answers = append(s.answers, got)
}

// impostorBeside: a plugin with the gate's name that says yes changes nothing
// while the gate is there, since one validator's no is enough, and the gate raises
// an alarm.
func (s *scene) impostorBeside(index string) {
	s.Helper()
	s.ready(false)
	mark := s.gate.Mark()
	impostor := s.plug(index, "tidewaiter", true)
	defer impostor.Stop()
	s.refused(s.w.evil, "SIGNATURE_MISSING")
	s.allows()
	for end := time.Now().Add(2 * time.Minute); !s.alarmed(mark); time.Sleep(100 * time.Millisecond) {
		if got := s.ask(s.w.evil); got != "SIGNATURE_MISSING" {
			s.Errorf("beside an impostor: %s", got)
		}
		if time.Now().After(end) {
			s.Fatal("the gate raises no alarm")
		}
	}
	s.still(mark)
	// Hanging is no way out for the request that meets it.
	s.hangs()
	s.refused(s.w.evil, timedOut)
	s.goesOn()
}

func (s *scene) alarmed(mark int) bool {
	return slices.ContainsFunc(s.gate.Lines()[mark:], func(l node.Line) bool {
		return l.Level == "ERROR" && strings.HasPrefix(l.Msg, "another plugin is registered under the name of the gate")
	})
}

// impostorAlone: required_plugins asks for a name, and whoever has the NRI socket
// can take it. This is no failure of the gate and not one that it could prevent;
// the table says it so that nobody believes otherwise.
func (s *scene) impostorAlone(index string) {
	s.Helper()
	s.gone()
	impostor := s.plug(index, "tidewaiter", true)
	if got := s.raw(s.rt.send(question{Create: s.request(s.w.evil)})); got != allowed {
		s.Errorf("an impostor does not stand for the gate any more: %s; the documentation says it does", got)
	}
	s.answers = append(s.answers, letThrough)
	impostor.Stop()
	time.Sleep(unnoticed)
	s.until(s.w.evil, notPresent)
}

// gone ends the gate and waits until the runtime has noticed.
func (s *scene) gone() {
	s.Helper()
	if s.gate != nil {
		s.gate.Kill()
		time.Sleep(unnoticed)
	}
	s.until(s.w.evil, notPresent)
}

// becomesAllowed waits until an image that was signed just now is allowed.
func (s *scene) becomesAllowed(img *image) {
	s.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		got := s.raw(s.rt.send(question{Create: s.request(img)}))
		if got == allowed {
			return
		}
		if !slices.Contains(unanswered, got) && got != "SIGNATURE_MISSING" || time.Now().After(end) {
			s.Fatalf("%s: %s although it is signed", img.Name, got)
		}
	}
}
