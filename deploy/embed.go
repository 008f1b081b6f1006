// Package deploy holds the files that an installed node is made of, so that what
// `tidewaiter install` writes and what lies here for packagers are the same bytes.
// What Kubernetes is given lies beside them and is not part of the binary.
package deploy

import _ "embed"

// Unit is the systemd unit of the gate. It depends on no file beside it but the
// binary; /etc/default/tidewaiter may set variables.
//
//go:embed systemd/tidewaiter.service
var Unit string

// OpenRC is the same for OpenRC, as on k3s on Alpine.
//
//go:embed openrc/tidewaiter
var OpenRC string

// DropIn is the configuration of containerd that makes it refuse containers while
// the gate is away.
//
//go:embed containerd/99-tidewaiter.toml
var DropIn string

// Pause is the configuration of containerd that names the pause image by digest:
// $PAUSE is replaced.
//
//go:embed containerd/99-tidewaiter-pause.toml
var Pause string

// AuditConfig and AuditPolicy are what a node starts with that has no configuration:
// it audits, and trusts nobody yet.
//
//go:embed audit/config.yaml
var AuditConfig string

//go:embed audit/trustpolicy.json
var AuditPolicy string
