package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// An illness is one way in which a mirror fails.
type illness string

const (
	well      illness = "well"
	hangs     illness = "hang"
	broken    illness = "500"
	busy      illness = "429"
	reset     illness = "connection reset"
	truncated illness = "truncated body"
	slow      illness = "slow bytes"
	forgets   illness = "404"
	falsifies illness = "falsified body"
)

// What a mirror fails by. The last two are lies, from which a no may follow that the
// gate keeps for a while.
var illnesses = []illness{hangs, broken, busy, reset, truncated, slow, forgets, falsifies}

// A sick mirror fails at random: for a while it is nearly well, then it is not.
// The same seed draws the same failures, though who meets them depends on when
// requests come.
type sick struct {
	mu    sync.Mutex
	rand  *rand.Rand
	fails []illness // what is drawn from
	until time.Time // when the share changes
	share float64   // of requests that fail
	cured bool
	count map[illness]int
	lied  map[string]bool // repositories about which it said what is not so
}

func newSick(seed uint64, fails []illness) *sick {
	return &sick{fails: fails, rand: rand.New(rand.NewPCG(seed, 1)), count: map[illness]int{}, lied: map[string]bool{}}
}

// cure ends all failures.
func (s *sick) cure() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cured = true
}

// meet draws what happens to a request.
func (s *sick) meet(repository string) (illness, float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.After(s.until) {
		s.until = now.Add(time.Duration((0.2 + 1.8*s.rand.Float64()) * float64(time.Second)))
		s.share = []float64{0.05, 0.35, 0.9}[s.rand.IntN(3)]
	}
	ill, where := well, s.rand.Float64()
	if s.rand.Float64() < s.share && !s.cured {
		ill = s.fails[s.rand.IntN(len(s.fails))]
	}
	s.count[ill]++
	if ill == forgets || ill == falsifies {
		s.lied[repository] = true
	}
	return ill, where
}

// lies reports whether the mirror has said of a repository what is not so.
func (s *sick) lies(repository string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lied[repository]
}

// String says how often the mirror failed, and how.
func (s *sick) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := 0
	for n := range maps.Values(s.count) {
		all += n
	}
	var l []string
	for _, i := range slices.Concat([]illness{well}, illnesses) {
		l = append(l, fmt.Sprintf("%s %d", i, s.count[i]))
	}
	return fmt.Sprintf("%d requests: %s", all, strings.Join(l, ", "))
}

// repository is what a path of the registry's API is about.
func repository(path string) string {
	if m := about.FindStringSubmatch(path); m != nil {
		return m[1]
	}
	return path
}

var about = regexp.MustCompile(`^/v2/(.+)/(?:manifests|blobs|referrers)/`)

// wrap is for node.Registry.Fault.
func (s *sick) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch ill, where := s.meet(repository(r.URL.Path)); ill {
		case well:
			h.ServeHTTP(w, r)
		case hangs:
			<-r.Context().Done()
		case broken:
			http.Error(w, "out of order", http.StatusInternalServerError)
		case busy:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "later", http.StatusTooManyRequests)
		case reset:
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
			conn.Close()
		case forgets:
			http.NotFound(w, r)
		case truncated, slow, falsifies:
			spoil(w, r, h, ill, where)
		}
	})
}

// spoil answers with a body of h that is not as it should be; where says at which
// part of it.
func spoil(w http.ResponseWriter, r *http.Request, h http.Handler, ill illness, where float64) {
	whole := httptest.NewRecorder()
	h.ServeHTTP(whole, r)
	body := whole.Body.Bytes()
	at := int(where * float64(len(body)))
	maps.Copy(w.Header(), whole.Header())
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(whole.Code)
	switch ill {
	case falsifies:
		if len(body) > 0 {
			body[at] ^= 1
		}
		_, _ = w.Write(body)
	case truncated:
		_, _ = w.Write(body[:at])
		panic(http.ErrAbortHandler) // cuts the connection
	case slow:
		out := http.NewResponseController(w)
		for i := range body {
			if _, err := w.Write(body[i : i+1]); err != nil {
				return
			}
			_ = out.Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}
