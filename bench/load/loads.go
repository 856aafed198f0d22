package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	warming = 20 // connections before anything is measured; the first of a lease registers it
	atOnce  = 16 // connections that are being made at a time
	window  = 4  // messages under way
)

// measured is what a load says when it is done.
type measured struct {
	Seconds float64 `json:"seconds"`
	Bytes   int64   `json:"bytes"`
	Count   int     `json:"count"`
	Median  float64 `json:"median"` // seconds, of a round trip
	Late    float64 `json:"p99"`
}

// greeting is what TLS came to with this proxy.
type greeting struct {
	Cipher  string `json:"cipher"`
	Curve   string `json:"curve"`
	Tickets int64  `json:"tickets"`
}

// loads are prepared with every connection up, so that the work alone is measured.
var loads = map[string]func(*dialler, job) (func() (measured, error), error){
	"up":          func(d *dialler, j job) (func() (measured, error), error) { return transfers(d, j, 1, 0, buffer) },
	"down":        func(d *dialler, j job) (func() (measured, error), error) { return transfers(d, j, 0, 1, buffer) },
	"duplex":      func(d *dialler, j job) (func() (measured, error), error) { return transfers(d, j, 1, 1, buffer) },
	"records":     func(d *dialler, j job) (func() (measured, error), error) { return transfers(d, j, 1, 0, edges...) },
	"messages":    messages,
	"pingpong":    pingpong,
	"connections": func(d *dialler, j job) (func() (measured, error), error) { return connections(d, j, false) },
	"idle":        func(d *dialler, j job) (func() (measured, error), error) { return connections(d, j, true) },
}

// edges are writes around the largest TLS record (RFC 8446 section 5.1: 2^14 bytes).
var edges = []int{1<<14 - 1, 1 << 14, 1<<14 + 1}

// dialler makes connections, with the leases' certificates in turn.
type dialler struct {
	address string
	configs []*tls.Config
	turn    atomic.Int64
	tickets tickets
}

// tickets counts the sessions that a server offers; none is ever used.
type tickets struct{ seen atomic.Int64 }

func (t *tickets) Get(string) (*tls.ClientSessionState, bool)    { return nil, false }
func (t *tickets) Put(_ string, session *tls.ClientSessionState) { t.seen.Add(1) }

func newDialler(j job) (*dialler, error) {
	ca, err := roots(file(j.pki, "ca.crt"))
	if err != nil {
		return nil, err
	}
	d := &dialler{address: j.address}
	for number := range j.leases {
		name := fmt.Sprintf("client-%d", number)
		certificate, err := tls.LoadX509KeyPair(file(j.pki, name+".crt"), file(j.pki, name+".key"))
		if err != nil {
			return nil, err
		}
		if certificate.Leaf, err = x509.ParseCertificate(certificate.Certificate[0]); err != nil {
			return nil, err
		}
		config := settings(certificate)
		config.RootCAs, config.ServerName = ca, "localhost"
		d.configs = append(d.configs, config)
	}
	return d, nil
}

// open makes a connection to the sink for this use; the way is up when it returns.
func (d *dialler) open(kind byte, up, down int64) (stream, error) {
	config := d.configs[int(d.turn.Add(1)-1)%len(d.configs)]
	return d.openWith(config, kind, up, down)
}

func (d *dialler) openWith(config *tls.Config, kind byte, up, down int64) (stream, error) {
	plain, err := (&net.Dialer{Timeout: 30 * time.Second}).DialContext(context.Background(), "tcp", d.address)
	if err != nil {
		return stream{}, err
	}
	w := &wire{Conn: plain}
	s := stream{ReadWriteCloser: tls.Client(w, config), wire: w}
	if err := s.ask(kind, up, down); err != nil {
		plain.Close()
		return stream{}, err
	}
	return s, nil
}

// warmUp makes the first connections of every lease, and says what TLS came to.
func (d *dialler) warmUp() (greeting, error) {
	var said greeting
	for number := range max(warming, len(d.configs)) {
		config := d.configs[number%len(d.configs)]
		if number == 0 {
			config = config.Clone()
			config.SessionTicketsDisabled = false
			config.ClientSessionCache = &d.tickets
		}
		s, err := d.openWith(config, echo, 0, 0)
		if err != nil {
			return said, err
		}
		state := s.ReadWriteCloser.(*tls.Conn).ConnectionState()
		said = greeting{tls.CipherSuiteName(state.CipherSuite), state.CurveID.String(), d.tickets.seen.Load()}
		if err := s.Close(); err != nil {
			return said, err
		}
	}
	return said, nil
}

// transfers moves `bytes` up or down or both ways at once, over all streams, in writes of these sizes.
func transfers(d *dialler, j job, up, down int64, sizes ...int) (func() (measured, error), error) {
	share := j.bytes / int64(j.streams)
	streams := make([]stream, j.streams)
	for number := range streams {
		var err error
		if streams[number], err = d.open(transfer, up*share, down*share); err != nil {
			return nil, err
		}
	}
	one := func(s stream) error {
		if err := s.send([]byte{'.'}); err != nil {
			return err
		}
		if len(sizes) == 1 {
			s.batch()
		}
		sent := make(chan error, 1)
		go func() { sent <- s.sendAll(up*share, sizes...) }()
		if err := s.take(down*share + 1); err != nil {
			return err
		}
		return <-sent
	}
	return func() (measured, error) {
		begin := time.Now()
		err := each(len(streams), len(streams), func(number int) error { return one(streams[number]) })
		return measured{Seconds: time.Since(begin).Seconds(), Bytes: (up + down) * share * int64(j.streams)}, err
	}, nil
}

// messages sends what a build sends: chunks of its context with a small answer to each, a few under way at a time.
func messages(d *dialler, j job) (func() (measured, error), error) {
	count := int(j.bytes / messageSize)
	s, err := d.open(answer, int64(count)*messageSize, 0)
	if err != nil {
		return nil, err
	}
	return func() (measured, error) {
		begin := time.Now()
		slots, sent := make(chan struct{}, window), make(chan error, 1)
		go func() {
			data := make([]byte, messageSize)
			for range count {
				slots <- struct{}{}
				if err := s.send(data); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		for range count {
			if err := s.take(answerSize); err != nil {
				return measured{}, err
			}
			<-slots
		}
		took := time.Since(begin).Seconds()
		return measured{Seconds: took, Bytes: int64(count) * messageSize, Count: count}, <-sent
	}, nil
}

// pingpong sends one byte and waits for it, again and again.
func pingpong(d *dialler, j job) (func() (measured, error), error) {
	s, err := d.open(echo, 0, 0)
	if err != nil {
		return nil, err
	}
	return func() (measured, error) {
		trips := make([]time.Duration, j.count)
		begin := time.Now()
		for number := range trips {
			sent := time.Now()
			if err := s.send([]byte{'.'}); err != nil {
				return measured{}, err
			}
			if err := s.take(1); err != nil {
				return measured{}, err
			}
			trips[number] = time.Since(sent)
		}
		took := time.Since(begin)
		slices.Sort(trips)
		return measured{
			Seconds: took.Seconds(),
			Count:   j.count,
			Median:  trips[len(trips)/2].Seconds(),
			Late:    trips[len(trips)*99/100].Seconds(),
		}, nil
	}, nil
}

// connections makes full mTLS connections with a byte echoed on each, and holds them or not.
func connections(d *dialler, j job, hold bool) (func() (measured, error), error) {
	return func() (measured, error) {
		begin := time.Now()
		err := each(j.count, atOnce, func(int) error {
			s, err := d.open(echo, 0, 0)
			if err != nil {
				return err
			}
			if err := s.send([]byte{'.'}); err != nil {
				return err
			}
			if err := s.take(1); err != nil {
				return err
			}
			if hold {
				held.add(s)
				return nil
			}
			return s.Close()
		})
		return measured{Seconds: time.Since(begin).Seconds(), Count: j.count}, err
	}, nil
}

// held keeps connections from being collected, and so closed, before the process ends.
var held holder

type holder struct {
	lock    sync.Mutex
	streams []stream
}

func (h *holder) add(s stream) {
	h.lock.Lock()
	defer h.lock.Unlock()
	h.streams = append(h.streams, s)
}

// each does count pieces of work, at most parallel of them at a time; the first error ends it.
func each(count, parallel int, work func(number int) error) error {
	var next atomic.Int64
	failed := make(chan error, parallel)
	for range parallel {
		go func() {
			for {
				number := int(next.Add(1) - 1)
				if number >= count {
					failed <- nil
					return
				}
				if err := work(number); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	for range parallel {
		if err := <-failed; err != nil {
			return err
		}
	}
	return nil
}
