// Package metrics counts what the gate answers, and writes that and how things
// stand as Prometheus metrics. docs/control.md lists them.
//
// The text is made by Prometheus' own encoder from its own data model
// (prometheus/common/expfmt, prometheus/client_model). Its client library would add
// 471 kB to the binary where these add 78 kB, and what it is for, many kinds of
// metrics that come and go, is not needed: everything here is known beforehand and
// counted with one atomic addition.
package metrics

import (
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/tidewaiter/tidewaiter/cache"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
)

// reasons are all that a decision may have under a configuration that enforces.
// Whatever else counts as INTERNAL, so that nothing makes new series.
var reasons = [...]verify.Reason{
	verify.Internal, verify.Verified, verify.AllowedByDigest,
	verify.SignatureMissing, verify.SignatureInvalid, verify.SignerUntrusted, verify.IdentityMismatch,
	verify.SignatureExpired, verify.CertificateExpired, verify.TimestampInvalid, verify.Revoked, verify.RevocationUnknown,
	verify.CriticalAttribute, verify.PluginUnsupported, verify.ThresholdNotMet, verify.NotAnImage,
	verify.SourceUnreachable, verify.SourceUnauthorized, verify.SourceNoReferrers,
	verify.Pending, verify.Overloaded, verify.LimitExceeded,
	verify.PolicyNoMatch, verify.PolicyInvalid,
	verify.ImageUnresolved, verify.ImageMismatch, verify.ImageAmbiguous, verify.ImageVolumeUnverified,
	verify.SnapshotterUnverified, verify.RuntimeUnverified, verify.PodTooLarge,
}

// indexOf is where a reason is in reasons; 0, which is INTERNAL, for others.
var indexOf = func() map[verify.Reason]int {
	m := map[verify.Reason]int{}
	for i, r := range reasons {
		m[r] = i
	}
	return m
}()

// causes are what may end an answer; "nothing" is no end.
var causes = [...]string{notary.EndsSignature, notary.EndsCertificate}

// sources of signatures, by how their names begin (verify.Source.Name).
var sources = [...]string{"mirror", "layout", "store"}

var modes = [...]verify.Mode{verify.Enforce, verify.Audit}

// hooks in which the gate answers.
var hooks = [...]string{"RunPodSandbox", "ValidateContainerAdjustment", "CreateContainer", "StartContainer"}

// bounds of the buckets of answers. Warm answers take less than a millisecond, one
// that waits gate.wait, and nothing may take more than 1.5 s.
var bounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond,
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
	250 * time.Millisecond, 500 * time.Millisecond, time.Second, 1500 * time.Millisecond, 2 * time.Second,
}

// Counters are what the gate counts itself. The zero value is ready to use, and is
// safe for concurrent use.
type Counters struct {
	decisions [len(modes)][len(reasons)]atomic.Uint64
	answers   [len(hooks)]histogram
	asked     [len(sources)][len(reasons)]atomic.Uint64

	Rejected atomic.Uint64 // configurations
	Lowered  atomic.Uint64 // times that one which audits came after one which enforced
	Dropped  atomic.Uint64 // answers that the log was too slow for
}

// A histogram counts durations: each in the first bucket that it fits into, the
// last of which has no bound.
type histogram struct {
	buckets [len(bounds) + 1]atomic.Uint64
	sum     atomic.Int64 // nanoseconds
}

func (h *histogram) add(d time.Duration) {
	d = max(d, 0) // the clock was set back
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(int64(d))
}

// Answered counts an answer of the gate under a mode. It waits for nothing and
// allocates nothing: the hook calls it.
func (c *Counters) Answered(m verify.Mode, a nri.Answer) {
	i := 0
	if m == verify.Audit {
		i = 1
	}
	c.decisions[i][indexOf[a.Decision.EnforceReason()]].Add(1)
	for i, h := range hooks {
		if h == a.Hook {
			c.answers[i].add(a.Took)
		}
	}
}

// Asked counts what each source said in a verification.
func (c *Counters) Asked(tried []verify.Attempt) {
	for _, a := range tried {
		kind, _, _ := strings.Cut(a.Source, " ")
		if i := slices.Index(sources[:], kind); i >= 0 {
			c.asked[i][indexOf[a.Reason]].Add(1)
		}
	}
}

// Decisions returns how many there were, by mode and reason. What never was is not
// in it.
func (c *Counters) Decisions() map[string]map[string]uint64 {
	all := map[string]map[string]uint64{}
	for i, m := range modes {
		for j, r := range reasons {
			if n := c.decisions[i][j].Load(); n > 0 {
				if all[m.String()] == nil {
					all[m.String()] = map[string]uint64{}
				}
				all[m.String()][r.String()] = n
			}
		}
	}
	return all
}

// A State is what others know.
type State struct {
	Ready    bool
	Version  string                   // of the program
	Mode     string                   // in force; empty where there is no configuration
	Revision string                   // in force
	Assured  string                   // how firmly what runs is bound to what was verified (control.Status.Assurance)
	Assure   []string                 // all that it can be (control.Assurances)
	Invalid  bool                     // what the configuration directory holds was rejected
	Codes    []string                 // of all problems that there may be (control.Codes)
	Found    []string                 // of those, the ones that there are
	Session  nri.State                // the connection to the runtime
	Cache    *cache.Stats             // nil where there is none
	Sweep    *reconcile.RunningStatus // nil where there is none

	Refresh *reconcile.RefreshStatus // nil where nothing is kept
	Store   *Store                   // the same
}

// A Store is the evidence that is on the node.
type Store struct {
	Signatures int // without those in archives
	Bytes      uint64
	Failing    bool // nothing is kept
	Archives   int
	Bad        int  // of these, those that cannot be read, or not whole
	Archived   int  // signatures in archives
	Unread     bool // there are more archives than are read, or none can be
}

// Write writes everything in the Prometheus text format, in the same order each
// time.
func (c *Counters) Write(w io.Writer, s State) error {
	p := page{w: w}
	p.gauge("ready", "Whether the runtime asks this gate and a configuration is in force.", one(flag(s.Ready)))
	p.gauge("registered", "Whether the runtime asks this gate.", one(flag(s.Session.Registered)))
	p.gauge("enforcing", "Whether the gate is ready and refuses containers.", one(flag(s.Ready && s.Mode == verify.Enforce.String())))
	var list []sample
	for _, code := range s.Codes {
		list = append(list, one(flag(slices.Contains(s.Found, code)), "code", code)...)
	}
	if len(list) > 0 {
		p.gauge("problem", "What tidewaiter status says is wrong.", list)
	}
	list = nil
	for _, a := range s.Assure {
		list = append(list, one(flag(a == s.Assured), "assurance", a)...)
	}
	if len(list) > 0 {
		p.gauge("assurance", "How firmly what runs is bound to what was verified: 1 for what holds.", list)
	}
	if s.Revision != "" {
		p.gauge("config_info", "The configuration in force; always 1.", one(1, "revision", s.Revision, "mode", s.Mode, "version", s.Version))
	}
	p.gauge("config_last_reload_successful", "Whether what the configuration directory holds is in force, and was not rejected.", one(flag(!s.Invalid)))
	p.counter("config_rejected_total", "Configurations that were rejected.", one(c.Rejected.Load()))
	p.counter("mode_lowered_total", "Times that a configuration which audits came after one which enforced.", one(c.Lowered.Load()))

	list = nil
	for i, m := range modes {
		for j, r := range reasons {
			list = append(list, one(c.decisions[i][j].Load(), "mode", m.String(), "reason", r.String())...)
		}
	}
	p.counter("decisions_total", "Answers to the runtime, one an image, by the mode in force and the reason that enforce has or would have.", list)
	list = nil
	for i, kind := range sources {
		for j, r := range reasons {
			if n := c.asked[i][j].Load(); n > 0 { // most reasons are none of a source
				list = append(list, one(n, "source", kind, "reason", r.String())...)
			}
		}
	}
	if len(list) > 0 {
		p.counter("sources_asked_total", "How often sources were asked in verifications, by kind and by what they said.", list)
	}
	p.histograms("decision_duration_seconds", "Time from the runtime's request to the decision.", c)
	p.counter("log_lines_dropped_total", "Answers that were given and not logged, since the log was too slow.", one(c.Dropped.Load()))

	n := s.Session
	p.counter("registrations_total", "How often the gate registered with the runtime.", one(n.Registrations))
	p.gauge("requests_in_flight", "Requests of the runtime that are being answered.", one(n.UnderWay))
	p.counter("requests_late_total", "Answers that took longer than the gate allows itself.", one(n.Late))
	p.gauge("requests_hung", "Requests that nobody waits for any more and that have no end.", one(n.Stuck))
	p.gauge("duplicate_plugins", "Plugins under the gate's name that are not gates of this node.", one(n.Strangers))
	p.counter("duplicate_plugin_alarms_total", "How often such plugins were found.", one(n.Alarms))

	if s.Cache != nil {
		k := *s.Cache
		p.counter("cache_hits_total", "Questions answered from memory, since the configuration is in force.", one(k.AllowedHits, "answer", "allowed"), one(k.DeniedHits, "answer", "denied"))
		p.counter("cache_misses_total", "Questions that were not.", one(k.Misses))
		p.counter("cache_joined_total", "Of these, those about what was being verified already.", one(k.Joined))
		p.counter("cache_evictions_total", "Answers that were forgotten for want of room.", one(k.AllowedEvicted, "answer", "allowed"), one(k.DeniedEvicted, "answer", "denied"))
		p.gauge("cache_entries", "Answers that are kept.", one(k.Allowed, "answer", "allowed"), one(k.Denied, "answer", "denied"))
		p.counter("verifications_started_total", "Verifications that started.", one(k.Started))
		p.counter("verifications_ended_total", "Verifications that ended.", one(k.Ended))
		p.counter("verifications_panicked_total", "Verifications that ended with a panic.", one(k.Panics))
		p.counter("verifications_refused_total", "Verifications that there was no room for.", one(k.Overloaded))
		p.gauge("verifications_running", "Verifications under way.", one(k.Running))
		p.gauge("verifications_waiting", "Verifications that wait for their turn, by whether somebody waits for them.", one(k.Waiting, "ahead", "false"), one(k.Ahead, "ahead", "true"))
	}
	if s.Sweep != nil && !s.Sweep.At.IsZero() {
		w := s.Sweep
		list = nil
		known := 0
		for _, r := range reasons[1:] {
			known += w.Reasons[r]
			list = append(list, one(w.Reasons[r], "reason", r.String())...)
		}
		all := 0
		for _, n := range w.Reasons {
			all += n
		}
		p.gauge("running", "Containers that ran at the last look, by what enforce would answer to them now.", one(all-known, "reason", reasons[0].String()), list)
		p.gauge("running_gone", "Of these, those that the node has no image of any more, so that nothing can be said.", one(w.Gone))
		p.gauge("running_ungated", "Of these, those about which no gate was asked.", one(w.Ungated))
		p.gauge("running_incomplete", "Whether the last look did not see everything.", one(flag(w.Error != "")))
		list = nil
		for _, cause := range causes {
			if at, ok := w.Ends[cause]; ok {
				list = append(list, one(int(at.Unix()), "cause", cause)...)
			}
		}
		if len(list) > 0 {
			p.gauge("answer_ends_timestamp_seconds", "The first end of an answer about what ran at the last look, by what ends then.", list)
		}
		p.counter("running_stopped_total", "Containers that the gate stopped.", one(w.Stopped))
	}
	if s.Refresh != nil {
		r := s.Refresh
		p.gauge("refresh_images", "Images whose signatures are looked for again.", one(r.Images))
		p.gauge("refresh_failing", "Of these, those for which a source failed at the last try.", one(r.Failing))
		p.counter("refresh_asked_total", "How often sources were asked again about an image.", one(r.Asked))
		p.counter("refresh_failed_total", "Of these, those times that a source failed.", one(r.Failed))
		p.counter("refresh_new_total", "Signatures that came so.", one(r.Fresh))
		if !r.Last.IsZero() {
			p.gauge("refresh_last_timestamp_seconds", "When an image was last asked about.", one(int(r.Last.Unix())))
		}
		if !r.Next.IsZero() {
			p.gauge("refresh_next_timestamp_seconds", "When the next one will be.", one(int(r.Next.Unix())))
		}
	}
	if k := s.Store; k != nil {
		p.gauge("store_signatures", "Signatures that are kept on the node.", one(k.Signatures))
		p.gauge("store_bytes", "Size of the files that are kept.", one(k.Bytes))
		p.gauge("store_failing", "Whether new signatures cannot be kept.", one(flag(k.Failing)))
		p.gauge("archives", "Entries of the directory of evidence archives.", one(k.Archives))
		p.gauge("archives_failing", "Of these, those that cannot be read, or not whole.", one(k.Bad))
		p.gauge("archives_unread", "Whether there are entries that are not read at all.", one(flag(k.Unread)))
		p.gauge("archive_signatures", "Signatures in evidence archives.", one(k.Archived))
	}
	return p.err
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

// A sample is one value with its labels.
type sample struct {
	labels []*dto.LabelPair
	value  float64
}

func one[N int | uint64](value N, labels ...string) []sample {
	s := sample{value: float64(value)}
	for i := 0; i+1 < len(labels); i += 2 {
		s.labels = append(s.labels, &dto.LabelPair{Name: new(labels[i]), Value: new(strings.ToValidUTF8(labels[i+1], "?"))})
	}
	return []sample{s}
}

// A page is what is being written. It keeps the first error.
type page struct {
	w   io.Writer
	err error
}

func (p *page) write(name, help string, kind dto.MetricType, metrics []*dto.Metric) {
	if p.err == nil {
		_, p.err = expfmt.MetricFamilyToText(p.w, &dto.MetricFamily{Name: new("tidewaiter_" + name), Help: &help, Type: &kind, Metric: metrics})
	}
}

func (p *page) gauge(name, help string, samples ...[]sample) {
	var list []*dto.Metric
	for _, some := range samples {
		for _, s := range some {
			list = append(list, &dto.Metric{Label: s.labels, Gauge: &dto.Gauge{Value: new(s.value)}})
		}
	}
	p.write(name, help, dto.MetricType_GAUGE, list)
}

func (p *page) counter(name, help string, samples ...[]sample) {
	var list []*dto.Metric
	for _, some := range samples {
		for _, s := range some {
			list = append(list, &dto.Metric{Label: s.labels, Counter: &dto.Counter{Value: new(s.value)}})
		}
	}
	p.write(name, help, dto.MetricType_COUNTER, list)
}

func (p *page) histograms(name, help string, c *Counters) {
	var list []*dto.Metric
	for i, hook := range hooks {
		h, n := &c.answers[i], uint64(0)
		d := &dto.Histogram{}
		for j, b := range bounds {
			n += h.buckets[j].Load()
			d.Bucket = append(d.Bucket, &dto.Bucket{UpperBound: new(b.Seconds()), CumulativeCount: new(n)})
		}
		n += h.buckets[len(bounds)].Load()
		d.SampleCount, d.SampleSum = &n, new(time.Duration(h.sum.Load()).Seconds())
		list = append(list, &dto.Metric{Label: one(0, "hook", hook)[0].labels, Histogram: d})
	}
	p.write(name, help, dto.MetricType_HISTOGRAM, list)
}
