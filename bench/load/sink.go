package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"os"
)

// sink is the worker behind the proxy, in the clear and over mTLS. It ends when standard input does.
func sink(unix, address, pki string) error {
	config, err := sinkConfig(pki)
	if err != nil {
		return err
	}
	listen := net.ListenConfig{}
	for _, way := range []struct {
		network, address string
		config           *tls.Config
	}{{"unix", unix, nil}, {"tcp", address, config}} {
		listener, err := listen.Listen(context.Background(), way.network, way.address)
		if err != nil {
			return err
		}
		go accept(listener, way.config)
	}
	if _, err := os.Stdout.WriteString("{}\n"); err != nil { // it listens
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// sinkConfig shows the certificate that the dialler checks: by name for the peers, by the worker's uid for bkpool.
func sinkConfig(pki string) (*tls.Config, error) {
	named, err := tls.LoadX509KeyPair(file(pki, "sink.crt"), file(pki, "sink.key"))
	if err != nil {
		return nil, err
	}
	worker, err := tls.LoadX509KeyPair(file(pki, "worker.crt"), file(pki, "worker.key"))
	if err != nil {
		return nil, err
	}
	config := settings()
	config.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if hello.ServerName == "" {
			return &worker, nil
		}
		return &named, nil
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.ClientCAs, err = roots(file(pki, "backend-ca.crt"))
	return config, err
}

func accept(listener net.Listener, config *tls.Config) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		s := stream{ReadWriteCloser: connection}
		if config != nil {
			s.wire = &wire{Conn: connection}
			s.ReadWriteCloser = tls.Server(s.wire, config)
		}
		go func() {
			defer s.Close()
			_ = serve(s) // a client that goes away is its own affair: it says what it missed
		}()
	}
}

// serve does what the first bytes of a connection ask for.
func serve(s stream) error {
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(s, header); err != nil {
		return err
	}
	up, down := int64(binary.BigEndian.Uint64(header[1:])), int64(binary.BigEndian.Uint64(header[9:]))
	if err := s.send([]byte{'.'}); err != nil {
		return err
	}
	switch header[0] {
	case transfer:
		return both(s, up, down)
	case answer:
		return answers(s, up)
	default:
		return echoes(s)
	}
}

func both(s stream, up, down int64) error {
	if err := s.take(1); err != nil { // the word to begin
		return err
	}
	s.batch()
	sent := make(chan error, 1)
	go func() { sent <- s.sendAll(down, buffer) }()
	if err := s.take(up); err != nil {
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	return s.send([]byte{'.'})
}

func answers(s stream, up int64) error {
	message, reply := make([]byte, messageSize), make([]byte, answerSize)
	for ; up > 0; up -= messageSize {
		if _, err := io.ReadFull(s, message); err != nil {
			return err
		}
		if err := s.send(reply); err != nil {
			return err
		}
	}
	return nil
}

func echoes(s stream) error {
	data := make([]byte, 512)
	for {
		n, err := s.Read(data)
		if err != nil {
			return err
		}
		if err := s.send(data[:n]); err != nil {
			return err
		}
	}
}
