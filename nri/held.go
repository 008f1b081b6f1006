package nri

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errUnsynced says that the runtime has the registration and does not go on with it.
var errUnsynced = errors.New("the runtime did not tell the gate of all pods and containers")

// errRenewed says that the connection was ended to register for another hook.
var errRenewed = errors.New("the mode changed")

// await waits until the runtime has told the plugin of all pods and containers. The
// runtime first lets every container operation end that is under way, which can be the
// stop of a container with a long grace period, and giving up does not shorten that. But
// NRI 0.11 also leaves a connection open after it failed to tell the plugin, and never
// tries again on it: so after syncTimeout the gate registers again. Awaiting stays at the
// time of the first registration that was held up.
func (s *Session) await(ctx context.Context, p *plugin, closed <-chan struct{}) error {
	if s.heldSince.IsZero() {
		s.heldSince = s.Gate.Now()
	}
	since := s.heldSince
	late, most := time.NewTimer(syncLateAfter), time.NewTimer(syncTimeout)
	defer late.Stop()
	defer most.Stop()
	for {
		select {
		case <-p.synced:
			s.heldSince = time.Time{}
			s.note(func(st *State) { st.Awaiting = time.Time{} })
			return nil
		case <-closed:
			return fmt.Errorf("the runtime closed the connection before it was synchronised: its own log says why%s", p.hint())
		case <-most.C:
			return fmt.Errorf("%w within %s of its registration: either container operations under way hold it up, or it failed to; its own log says why%s", errUnsynced, syncTimeout, p.hint())
		case <-late.C:
			s.note(func(st *State) { st.Awaiting = since })
			s.Log.Warn("the runtime took the gate's registration and does not go on with it: it waits for container operations under way to end, such as the stop of a container with a long grace period",
				"since", since.UTC().Format(time.RFC3339))
			late.Reset(logInterval)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// serve returns an error when the connection ended, and nil when it is to be ended:
// because ctx ended, or to register for the other hook.
//
// From enforce to audit that is not needed. The gate is asked in a hook that stays
// closed, and answers as audit says; the next connection is for audit's own hook. From
// audit to enforce it is. Registering is what can fail, and a node that has a gate must
// not lose it to a change of mode: where Large does not say that the gate could register
// again, it stays, says so, and decides in the hook that it has.
func (s *Session) serve(ctx context.Context, p *plugin, closed <-chan struct{}) error {
	wait := time.Duration(0)
	for {
		var again <-chan time.Time
		held := ""
		if p.audit && !s.Audit() {
			if held = s.keeps(ctx); held == "" {
				s.note(func(st *State) { st.Held = "" }) // p.held stays: it decides to the end
				return nil
			}
			wait = min(max(2*wait, minLargeRetry), maxLargeRetry)
			again = time.After(wait)
		} else {
			wait = 0
		}
		p.held.Store(held != "")
		if s.State().Held != held && ctx.Err() == nil {
			s.note(func(st *State) { st.Held = held })
			if held != "" {
				s.Log.Error("the node is to enforce, and the gate stays registered to audit: containers are refused by its answer, and start where it gives none", "error", held)
			}
		}
		select {
		case <-closed:
			return errors.New("the runtime closed the connection")
		case <-ctx.Done():
			return nil
		case <-s.changes():
		case <-again:
		}
	}
}

// keeps returns what would keep the gate from registering again, or is empty. Here what is
// not known counts too. Pods that came while the node audited, and that enforce would have
// refused, are taken away as before a registration: the node enforces by now, and a gate
// that held back for them would hold back until a person deletes them.
func (s *Session) keeps(ctx context.Context) string {
	if s.Large == nil {
		return ""
	}
	why, err := s.clearUp(ctx, largeTimeout)
	if why == "" && err != nil {
		why = "it is not known whether the gate could register again: " + err.Error()
	}
	return why
}

// note changes what is known.
func (s *Session) note(change func(*State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.known)
}
