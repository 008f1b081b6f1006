package main

import (
	"os"
	"runtime"
)

// oneProcessor has the daemon use one processor at a time. A question of the
// runtime goes from goroutine to goroutine until it is answered. Where there are
// several processors each step wakes another one, which costs as much as all that
// is done there; and a node's gate is not to take more than one of them from its
// pods. GOMAXPROCS in the environment goes before.
func oneProcessor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
}
