// The load of the benchmark: clients that come over mTLS, and the sink behind the proxy that they reach.
//
// It is run by bench/loads.py. A client says when it is ready, begins at a line on standard input, says what it
// measured, and holds its connections until standard input ends: the driver reads the proxy's CPU time in between.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// job is what one run of the client is asked for.
type job struct {
	load    string
	address string
	pki     string
	leases  int
	streams int
	bytes   int64
	count   int
}

func main() {
	var j job
	unix := flag.String("sink", "", "be the sink: in the clear on this Unix socket, with mTLS on -address")
	flag.StringVar(&j.load, "load", "", "up, down, duplex, records, messages, pingpong, connections or idle")
	flag.StringVar(&j.address, "address", "", "the proxy's host:port, or the sink's own")
	flag.StringVar(&j.pki, "pki", "", "directory with the certificates")
	flag.IntVar(&j.leases, "leases", 1, "leases that the connections are spread over")
	flag.IntVar(&j.streams, "streams", 1, "connections at once")
	flag.Int64Var(&j.bytes, "bytes", 0, "bytes in each direction that the load uses, over all streams")
	flag.IntVar(&j.count, "count", 0, "round trips or connections")
	flag.Parse()
	run := func() error { return client(j) }
	if *unix != "" {
		run = func() error { return sink(*unix, j.address, j.pki) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

// client does one load, step by step as the driver says.
func client(j job) error {
	prepare, known := loads[j.load]
	if !known {
		return fmt.Errorf("there is no load %q", j.load)
	}
	dial, err := newDialler(j)
	if err != nil {
		return err
	}
	first, err := dial.warmUp()
	if err != nil {
		return err
	}
	work, err := prepare(dial, j)
	if err != nil {
		return err
	}
	driver, say := bufio.NewReader(os.Stdin), json.NewEncoder(os.Stdout)
	if err := say.Encode(first); err != nil {
		return err
	}
	if _, err := driver.ReadString('\n'); err != nil {
		return err
	}
	measured, err := work()
	if err != nil {
		return err
	}
	if err := say.Encode(measured); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, driver)
	return err
}

func file(directory, name string) string {
	return filepath.Join(directory, name)
}
