package install

import (
	"context"
	"os"
	"path"
	"regexp"

	"github.com/tidewaiter/tidewaiter/deploy"
	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// configuration are the files that a node starts with which has none, or with Audit the
// line that has it audit. It refuses a configuration that enforces on a node that does
// not, and never lowers one that does.
func (r *facts) configuration(ctx context.Context, next *staged) ([]node.Change, error) {
	if r.From == "" {
		if all, err := r.initial(ctx); err != nil || len(all) > 0 {
			return all, err
		}
	} else if r.DryRun || next != nil { // stage looked at it
		return nil, nil
	}
	c, err := r.load(ctx, r.ConfigDir)
	if err != nil {
		return nil, node.Hintf("correct it, or delete it and start with one that audits", "the configuration is not valid, and the gate would refuse everything with it: %w", err)
	}
	if c.Mode == "enforce" && !r.enforce && !r.enforced {
		return nil, r.audits()
	}
	return nil, nil
}

// initial are the changes of the configuration of a host that has its own. A trust policy
// alone is a whole configuration, which enforces.
func (r *facts) initial(ctx context.Context) ([]node.Change, error) {
	there := func(name string) bool { return r.Exists(path.Join(r.ConfigDir, name)) }
	config := path.Join(r.ConfigDir, "config.yaml")
	policy := there("trustpolicy.json") || there("trustpolicy.oci.json")
	switch {
	case there("config.yaml") || there("config.yml"):
		if c, err := r.load(ctx, r.ConfigDir); !r.Audit || err != nil || c.Mode == "audit" {
			return nil, nil // the next load reports the error
		}
		return r.auditing(config)
	case policy && !r.Audit:
		return nil, nil
	case r.enforce:
		return nil, node.Refusef("tidewaiter install, which audits, and then write a trust policy", "there is no configuration in %s", r.ConfigDir)
	case r.enforced && !r.Audit:
		return nil, node.Refusef("put the configuration back; tidewaiter install --audit writes one that audits",
			"this node enforces, and there is no configuration in %s: install does not write one that audits unless it is told to", r.ConfigDir)
	}
	all, err := r.Change(config, 0o644, []byte(deploy.AuditConfig), "audit: everything starts, and what enforce would refuse is recorded")
	if err != nil || policy {
		return all, err
	}
	c, err := r.Change(path.Join(r.ConfigDir, "trustpolicy.json"), 0o644, []byte(deploy.AuditPolicy), "it trusts nobody yet: write your own")
	return append(all, c...), err
}

// audits is the refusal of a configuration that enforces, by an install that does not.
func (i *Installation) audits() error {
	return node.Refusef("tidewaiter install --audit has the node audit with it, then tidewaiter install --enforce; --enforce --force enforces at once",
		"the configuration enforces (mode: enforce, or a trust policy without config.yaml), and what it would refuse was not checked")
}

// audited changes the mode of a config.yaml that enforces, and nothing else of it.
func (i *Installation) auditing(file string) ([]node.Change, error) {
	raw, err := i.Read(file)
	if err != nil {
		return nil, err
	}
	if n := len(enforces.FindAll(raw, 2)); n != 1 {
		return nil, node.Refusef("write mode: audit into it", "%s: the line mode: enforce is not there in a form that is changed here", file)
	}
	info, err := os.Stat(i.Path(file))
	if err != nil {
		return nil, err
	}
	return i.Change(file, info.Mode().Perm(), enforces.ReplaceAll(raw, []byte("${1}audit${2}")), "everything starts, and what was refused until now is recorded")
}

// mode are the changes that make the gate enforce. A configuration that is brought says
// itself what the mode is: a watcher of one that audits does not enforce, for as long as
// it does.
func (r *facts) mode(ctx context.Context, next *staged) ([]node.Change, error) {
	c := Configured{}
	if next != nil {
		c.Mode = next.mode
	} else {
		if r.From != "" && r.DryRun {
			return nil, nil
		}
		var err error
		if c, err = r.load(ctx, r.ConfigDir); err != nil {
			return nil, err
		}
	}
	switch {
	case c.Mode == "enforce":
		return nil, nil
	case r.From == "":
		return r.enforcing(path.Join(r.ConfigDir, "config.yaml"))
	case !r.Watching:
		return nil, r.saysAudit()
	}
	r.enforce = false
	r.Say("warn", "the configuration in %s says mode: audit, so that this node audits: write mode: enforce there", r.From)
	return nil, nil
}

// saysAudit is the refusal to enforce with a configuration that audits.
func (i *Installation) saysAudit() error {
	return node.Refusef("write mode: enforce there", "the configuration that is copied from %s says mode: audit", i.From)
}

// lowers reports whether the node enforced before a configuration in this mode.
func (r *facts) lowers(mode string) bool { return r.enforced && mode == "audit" }

// tellLowered says and logs that the node enforces no more. Without that it would be seen
// by what starts.
func (r *facts) tellLowered() {
	by := "--audit"
	if r.From != "" && !r.Audit {
		by = "mode: audit in " + r.From
	}
	still := ""
	if r.before != nil && r.before.RequiresGate() {
		still = "; while the gate is away containerd still refuses everything (tidewaiter uninstall --restart ends that)"
	}
	r.Say("warn", "this node enforced, and audits from now on, as %s asks for: everything starts, and what enforce would refuse is recorded%s", by, still)
	r.Log("install: the node enforced, and audits from now on, as " + by + " asks for")
}

// audits is the line that is changed to enforce.
var audits = regexp.MustCompile(`(?m)^(mode:[ \t]+["']?)audit(["']?[ \t]*(?:#.*)?\r?)$`)

// enforces is the line that is changed to audit.
var enforces = regexp.MustCompile(`(?m)^(mode:[ \t]+["']?)enforce(["']?[ \t]*(?:#.*)?\r?)$`)

// enforced changes mode in a config.yaml, and nothing else of it.
func (i *Installation) enforcing(file string) ([]node.Change, error) {
	raw, err := i.Read(file)
	if err != nil {
		return nil, err
	}
	if n := len(audits.FindAll(raw, 2)); n != 1 {
		return nil, node.Refusef("write mode: enforce into it", "%s: the line mode: audit is not there in a form that is changed here", file)
	}
	info, err := os.Stat(i.Path(file))
	if err != nil {
		return nil, err
	}
	return i.Change(file, info.Mode().Perm(), audits.ReplaceAll(raw, []byte("${1}enforce${2}")), "the gate refuses what it only recorded until now")
}
