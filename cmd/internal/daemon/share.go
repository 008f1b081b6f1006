package daemon

import (
	"os"
	"runtime"
	"runtime/debug"
)

// SmallShare has the daemon take little of a node that is there for its pods. What
// the environment says (GOMAXPROCS, GOGC) goes before.
//
// It uses one processor at a time: a question of the runtime goes from goroutine to
// goroutine until it is answered, and where there are several processors each step
// wakes another one, which costs as much as all that is done there.
//
// It collects garbage twice as often as Go does by itself: of what a decision takes
// little stays, so that this costs next to nothing, and it keeps a fifth of the
// anonymous memory from being garbage (docs/performance.md).
func SmallShare() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}
