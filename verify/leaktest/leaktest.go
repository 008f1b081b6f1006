// Package leaktest finds the goroutines that tests leave behind, as goleak does, with
// more patience: goleak gives those that are about to end less than half a second,
// which is not enough where the machine is busy with something else.
package leaktest

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// tries of goleak, of which each takes 0.4 s where something is left.
const tries = 75

// Main is all that the TestMain of a package has to do: it runs the tests, and lets
// them fail where they leave goroutines behind. It does not return.
func Main(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if err := Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// Find waits until there are no goroutines but the caller's and those of package
// testing, and after 30 seconds returns an error that names those that there are.
func Find() error { return find(tries) }

func find(tries int) (err error) {
	for range tries {
		if err = goleak.Find(); err == nil {
			return nil
		}
	}
	return err
}
