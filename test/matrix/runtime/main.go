// Command runtime is the runtime's side of NRI in a process of its own: the
// adaptation library as containerd runs it, with the default validator and
// Tidewaiter required. It does on standard input what it is asked, one JSON
// object a line, and answers on standard output, in any order. It ends with its
// input.
//
// The matrix builds this one file against each version of the library, so that it
// uses only what all of them have.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"
	"google.golang.org/protobuf/proto"
)

// A question is one line of the input.
type question struct {
	ID int

	// Create is an api.CreateContainerRequest in protobuf's own form. It is asked as
	// containerd asks when a container is created.
	Create []byte

	// Expired has it asked as one whose caller has given up already.
	Expired bool

	// Until has it asked again and again, until an answer has this in it.
	Until string

	// Unlisted, where there is no Create, says that the runtime fails from now on to tell
	// a plugin that registers of what there is.
	Unlisted bool

	// Size is how many bytes of environment the container has.
	Size int
}

// An answer is one line of the output.
type answer struct {
	ID      int
	Error   string         // of the last request; empty: allowed
	Allowed int            // how many requests were
	Refused map[string]int // the others, by error
}

type runtime struct {
	*adaptation.Adaptation

	mu       sync.Mutex
	unlisted bool
}

func main() {
	socket := flag.String("socket", "", "`path` of the NRI socket")
	version := flag.String("containerd", "", "`version` that plugins are told")
	timeout := flag.Duration("timeout", 2*time.Second, "how long a plugin may take to answer")
	flag.Parse()
	if err := run(*socket, *version, *timeout); err != nil {
		fmt.Fprintln(os.Stderr, "runtime:", err)
		os.Exit(1)
	}
}

func run(socket, version string, timeout time.Duration) (err error) {
	adaptation.SetPluginRequestTimeout(timeout)
	r := &runtime{}
	r.Adaptation, err = adaptation.New("containerd", version,
		func(ctx context.Context, sync adaptation.SyncCB) error {
			r.mu.Lock()
			unlisted := r.unlisted
			r.mu.Unlock()
			if unlisted {
				return errors.New("as told")
			}
			_, err := sync(ctx, nil, nil)
			return err
		},
		func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
			return nil, nil
		},
		adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(filepath.Join(filepath.Dir(socket), "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(filepath.Dir(socket), "conf.d")),
		adaptation.WithDefaultValidator(&validator.DefaultValidatorConfig{Enable: true, RequiredPlugins: []string{"tidewaiter"}}),
	)
	if err != nil {
		return err
	}
	if err := r.Start(); err != nil {
		return err
	}
	defer r.Stop()

	var out sync.Mutex
	encoder := json.NewEncoder(os.Stdout)
	say := func(a answer) {
		out.Lock()
		defer out.Unlock()
		if err := encoder.Encode(a); err != nil {
			fmt.Fprintln(os.Stderr, "runtime:", err)
		}
	}
	say(answer{}) // it listens
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return nil
		}
		var q question
		if err := json.Unmarshal(line, &q); err != nil {
			return err
		}
		go func() { say(r.do(q)) }()
	}
}

func (r *runtime) do(q question) answer {
	a := answer{ID: q.ID, Refused: map[string]int{}}
	env := []string{"E=" + strings.Repeat("x", q.Size)}
	if q.Create == nil {
		r.mu.Lock()
		r.unlisted = q.Unlisted
		r.mu.Unlock()
		return a
	}
	for {
		// What this version does not know it does not pass on.
		req := &api.CreateContainerRequest{}
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(q.Create, req); err != nil {
			a.Error = "runtime: " + err.Error()
			return a
		}
		req.Container.Env = env
		err := r.create(req, q.Expired)
		if err == nil {
			a.Allowed++
			a.Error = ""
		} else {
			a.Error = err.Error()
			a.Refused[a.Error]++
		}
		if q.Until == "" || strings.Contains(a.Error, q.Until) {
			return a
		}
	}
}

func (r *runtime) create(req *api.CreateContainerRequest, expired bool) error {
	ctx := context.Background()
	if expired {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, time.Now().Add(-time.Second))
		defer cancel()
	}
	defer r.BlockPluginSync().Unblock()
	_, err := r.CreateContainer(ctx, req)
	return err
}
