// Command program is what the images of the tests run, the pause image
// included. It prints its arguments in one line and sleeps until it is told to
// stop. An argument "@path" stands for the content of that file.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	var words []string
	for _, w := range os.Args[1:] {
		if path, ok := strings.CutPrefix(w, "@"); ok {
			b, err := os.ReadFile(path)
			if err != nil {
				b = []byte(err.Error())
			}
			w = strings.TrimSpace(string(b))
		}
		words = append(words, w)
	}
	fmt.Println(strings.Join(words, " "))
	<-stop
}
