package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A refresher refreshes as the names say that it is asked for.
type refresher string

func (r refresher) refresh(ctx context.Context, images []string, yield func(Refreshed) error) error {
	if len(images) == 0 {
		images = []string{"all of " + string(r)}
	}
	for i, name := range images {
		switch name {
		case "none":
			return &Refusal{http.StatusNotFound, errors.New("no image of the node has this name: none")}
		case "broken":
			return errors.New("broken")
		case "hang":
			<-ctx.Done()
			return ctx.Err()
		case "late": // than a question may take otherwise, see readTime
			time.Sleep(readTime + 500*time.Millisecond)
		}
		one := Refreshed{Image: name, New: i, Failed: name == "bad", Tried: []verify.Attempt{{Source: "m", Reason: verify.Verified, Seen: 1}}}
		if err := yield(one); err != nil {
			return err
		}
	}
	return nil
}

func TestRefresh(t *testing.T) {
	dir := short(t)
	g := start(t, dir, "one")
	answers(t, dir, "one")
	ask := func(images ...string) (string, *Summary, error) {
		var got []string
		s, err := AskRefresh(t.Context(), dir, images, func(r Refreshed) { got = append(got, fmt.Sprintf("%s %d %t", r.Image, r.New, r.Failed)) })
		return strings.Join(got, ", "), s, err
	}
	if got, s, err := ask(); err != nil || got != "all of one 0 false" || *s != (Summary{Schema: RefreshSchema, Images: 1}) {
		t.Errorf("all: %q, %+v, %v", got, s, err)
	}
	if got, s, err := ask("late", "bad", "a b&c=d@e", "late"); err != nil || got != "late 0 false, bad 1 true, a b&c=d@e 2 false, late 3 false" || *s != (Summary{Schema: RefreshSchema, Images: 4, New: 6, Failed: 1}) {
		t.Errorf("several: %q, %+v, %v", got, s, err)
	}
	if got, s, err := ask("none"); s != nil || got != "" || err == nil || !strings.HasSuffix(err.Error(), " says: no image of the node has this name: none") {
		t.Errorf("an image that is not there: %q, %+v, %v", got, s, err)
	}
	// What ends in the middle is not taken for a whole answer.
	if got, _, err := ask("a", "broken"); got != "a 0 false" || err == nil || err.Error() != "not all images were asked about: broken" {
		t.Errorf("an error after the first: %q, %v", got, err)
	}
	if _, _, err := ask(strings.Repeat("x", maxNames)); err == nil || !strings.Contains(err.Error(), "too many images") {
		t.Errorf("too much: %v", err)
	}
	if got := roundTrip(t, dir, "POST /v1/refresh HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"); !strings.HasPrefix(got, "HTTP/1.1 413") {
		t.Errorf("with a body: %s", got)
	}
	// Who goes away ends it: there is room for others, and the gate can end.
	for range 3 * connections {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := AskRefresh(ctx, dir, []string{"hang"}, func(Refreshed) {}); err == nil {
			t.Error("what hangs has answered")
		}
		cancel()
	}
	answers(t, dir, "one")
	begun, done := make(chan bool), make(chan error, 1)
	go func() {
		_, err := AskRefresh(context.Background(), dir, []string{"a", "hang"}, func(Refreshed) { close(begun) })
		done <- err
	}()
	<-begun
	g.stop()
	if err := <-done; err == nil {
		t.Error("a gate that has ended has answered to the end")
	}
}
