package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// A cold row is what the verification of one signature costs who knows nothing
// yet of the image: the engine as it works in the daemon, the verb and notation's.
type coldRow struct {
	key                          notarytest.KeyType
	format                       string
	engine, tidewaiter, notation coldCost
	half                         float64 // engine by notation
	cli                          float64 // verb by notation
}

type coldCost struct {
	took     time.Duration
	requests int
}

// cold measures all kinds of keys and envelopes.
func (b *bench) cold(ctx context.Context) ([]coldRow, error) {
	notation, err := node.FindNotation(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	var rows []coldRow
	for _, key := range []notarytest.KeyType{notarytest.P256, notarytest.RSA3072} {
		for _, format := range []struct{ name, mediaType string }{{"JWS", notary.MediaTypeJWS}, {"COSE", notary.MediaTypeCOSE}} {
			r, err := b.coldRow(ctx, notation, key, format.mediaType)
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", key, format.name, err)
			}
			r.key, r.format = key, format.name
			rows = append(rows, r)
		}
	}
	return rows, nil
}

func (b *bench) coldRow(ctx context.Context, notation string, key notarytest.KeyType, mediaType string) (r coldRow, err error) {
	reg, err := node.NewRegistry("registry.example", node.RegistryOptions{})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, reg.Stop()) }()
	img, err := reg.Push(ctx, "app:1", node.ImageOptions{Word: "cold"})
	if err != nil {
		return r, err
	}
	o := notarytest.CertOptions{Key: key}
	ca := notarytest.NewCA(notarytest.CAOptions{CertOptions: o, Intermediates: 1, Intermediate: o})
	envelope, err := notarytest.Sign(ca.Leaf(o), img.Target, notarytest.SignOptions{MediaType: mediaType})
	if err != nil {
		return r, err
	}
	if err := reg.Attach(ctx, img, notarytest.Manifest(envelope, mediaType, img.Target, notarytest.ConfigType), node.AttachOptions{}); err != nil {
		return r, err
	}

	// All three read the same trust policy and trust store.
	stores := notarytest.Stores{"ca/acme/root.crt": ca.PEM()}
	home, err := os.MkdirTemp(b.dir, "cold-")
	if err != nil {
		return r, err
	}
	config := filepath.Join(home, "notation")
	if err := notarytest.WriteConfig(config, stores, notarytest.Statement("all")); err != nil {
		return r, err
	}
	sources, err := mirrors(reg)
	if err != nil {
		return r, err
	}
	e, rules, err := engine(stores, sources)
	if err != nil {
		return r, err
	}
	name, err := policy.ParseName(img.Name)
	if err != nil {
		return r, err
	}
	q := verify.Question{Image: verify.Image{
		Name: name, Target: img.Target, Manifest: img.Manifest, Config: img.Config.Digest,
		Use: verify.UseContainer, Binding: verify.BoundRuntime,
	}}
	q.Rule = rules.Select(q.Image)

	contestants := []struct {
		cost *coldCost
		do   func() error
	}{
		{&r.engine, func() error {
			if d := e.Evaluate(ctx, q); !d.Allowed() {
				return errors.New(d.Message(q.Image, ""))
			}
			return nil
		}},
		{&r.tidewaiter, func() error {
			return program(ctx, home, b.binary, "verify", "--config-dir", config, "--mirror", reg.Host+"="+reg.URL(), img.Pinned())
		}},
		{&r.notation, func() error {
			return program(ctx, home, notation, "verify", "--insecure-registry", reg.Addr+"/app@"+img.Target.Digest.String())
		}},
	}
	took := make([][]time.Duration, len(contestants))
	for i := range b.colds + 1 {
		for j, c := range contestants {
			reg.Forget()
			from := time.Now()
			if err := c.do(); err != nil {
				return r, err
			}
			if i == 0 {
				c.cost.requests = len(reg.Requests())
				continue // it warmed the disk's cache
			}
			took[j] = append(took[j], time.Since(from))
		}
	}
	for j, c := range contestants {
		c.cost.took = median(took[j])
	}
	ratio := func(j int) float64 {
		var l []float64
		for i := range took[j] {
			l = append(l, float64(took[j][i])/float64(took[2][i]))
		}
		return median(l)
	}
	r.half, r.cli = ratio(0), ratio(1)
	return r, nil
}

// program runs a program that must say yes.
func program(ctx context.Context, home string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+home)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(args[0]), err, out.Bytes())
	}
	return nil
}
