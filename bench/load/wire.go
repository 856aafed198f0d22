package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

const buffer = 256 << 10 // bytes moved by one system call, where a load is about bytes

// What a client asks of the sink, in the first bytes of a connection.
const (
	transfer = 'T' // take `up` bytes and send `down` bytes, both at once; one byte when both are done
	answer   = 'A' // answer every message of messageSize bytes, until `up` bytes have come
	echo     = 'E' // send back whatever comes
)

const (
	messageSize = 48 << 10 // how buildx sends a build's context, measured: docs/benchmarks.md
	answerSize  = 64
	headerSize  = 17
)

// wire is a TCP connection below TLS. Plain until batch is called; then it reads ahead, and keeps what TLS writes
// until flush: crypto/tls makes a system call for every record of 16 KiB, which would make the client the bottleneck.
type wire struct {
	net.Conn
	ahead  *bufio.Reader
	behind *bufio.Writer
}

func (w *wire) batch() {
	w.ahead = bufio.NewReaderSize(w.Conn, buffer)
	w.behind = bufio.NewWriterSize(w.Conn, buffer+buffer/8) // a whole buffer with the overhead of its records
}

func (w *wire) Read(b []byte) (int, error) {
	if w.ahead != nil {
		return w.ahead.Read(b)
	}
	return w.Conn.Read(b)
}

func (w *wire) Write(b []byte) (int, error) {
	if w.behind != nil {
		return w.behind.Write(b)
	}
	return w.Conn.Write(b)
}

func (w *wire) flush() error {
	if w.behind != nil {
		return w.behind.Flush()
	}
	return nil
}

// stream is one connection as the loads use it: in the clear or over TLS.
type stream struct {
	io.ReadWriteCloser
	wire *wire // nil in the clear
}

func (s stream) batch() {
	if s.wire != nil {
		s.wire.batch()
	}
}

// send writes all of it now.
func (s stream) send(b []byte) error {
	if _, err := s.Write(b); err != nil {
		return err
	}
	if s.wire != nil {
		return s.wire.flush()
	}
	return nil
}

// sendAll writes this many bytes in writes of these sizes, in turn.
func (s stream) sendAll(count int64, sizes ...int) error {
	data := make([]byte, buffer)
	for turn := 0; count > 0; turn++ {
		size := min(int64(sizes[turn%len(sizes)]), count)
		if err := s.send(data[:size]); err != nil {
			return err
		}
		count -= size
	}
	return nil
}

// take reads this many bytes.
func (s stream) take(count int64) error {
	data := make([]byte, min(buffer, count))
	for count > 0 {
		n, err := s.Read(data[:min(int64(len(data)), count)])
		count -= int64(n)
		if err != nil && count > 0 {
			return fmt.Errorf("%d bytes short: %w", count, err)
		}
	}
	return nil
}

// ask tells the sink what the connection is for, and waits until it knows: the whole way is up then.
func (s stream) ask(kind byte, up, down int64) error {
	header := make([]byte, headerSize)
	header[0] = kind
	binary.BigEndian.PutUint64(header[1:], uint64(up))
	binary.BigEndian.PutUint64(header[9:], uint64(down))
	if err := s.send(header); err != nil {
		return err
	}
	return s.take(1)
}

func roots(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in " + path)
	}
	return pool, nil
}

// settings are what both ends share: every peer is to do the same key exchange, and never to resume.
func settings(certificates ...tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		CurvePreferences:            []tls.CurveID{tls.X25519},
		NextProtos:                  []string{"h2"},
		Certificates:                certificates,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}
