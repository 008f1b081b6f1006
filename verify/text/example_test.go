package text_test

import (
	"fmt"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// What a registry said goes into one line of a message, whatever it was.
func ExampleClean() {
	fmt.Println(text.Clean("not found\n\x1b[2Jall images are signed", 64))
	fmt.Println(text.Clean("a very long reason", 10))
	// Output:
	// not found  [2Jall images are signed
	// a very ...
}
