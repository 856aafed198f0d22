// The one program of the test images: static, so that a build needs no base image.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// nameEnd follows each name that a witness writes. On a full disk a write may leave only the beginning of a name.
const nameEnd = ";"

// others are the whole names on the lines, each once, but for one's own.
func others(lines []byte, own string) string {
	seen := map[string]bool{own: true}
	var names []string
	for _, line := range strings.Fields(string(lines)) {
		name, whole := strings.CutSuffix(line, nameEnd)
		if whole && !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// connect tells what a step reaches at an address, by the host's name for the network (net.Dial), and optionally
// through one interface alone, which the kernel routes differently.
func connect(network, address, through string) {
	patience := 20 * time.Second
	if network == "udp" {
		patience = 3 * time.Second // nobody answers a datagram
	}
	dialer := net.Dialer{Timeout: patience}
	if through != "" {
		dialer.Control = func(_, _ string, raw syscall.RawConn) (err error) {
			raw.Control(func(fd uintptr) { err = syscall.BindToDevice(int(fd), through) })
			return err
		}
	}
	connection, err := dialer.Dial(network, address)
	if err != nil {
		fmt.Println("blocked", address, err)
		return
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(connection, "GET / HTTP/1.0\r\n\r\n")
	line, err := bufio.NewReader(connection).ReadString('\n')
	if errors.Is(err, syscall.EHOSTUNREACH) { // a datagram is refused only after it was sent
		fmt.Println("blocked", address, err)
		return
	}
	if line == "" {
		fmt.Println("silent", address, err)
		return
	}
	fmt.Println("reached", address, strings.TrimSpace(line))
}

// sniff reads all that crosses the interfaces of its network, and tells the beginnings of the bearer tokens in it.
// After it was told to end, it reads on until there is nothing left.
func sniff(told <-chan os.Signal) {
	const everyProtocol = 0x0300 // ETH_P_ALL of packet(7), in the order of bytes of the network
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, everyProtocol)
	if err != nil {
		fmt.Println("deaf:", err)
		return
	}
	syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Usec: 100000})
	if own, err := net.Dial("udp", "127.0.0.1:9"); err == nil {
		fmt.Fprint(own, "Authorization: Bearer of-this-program")
	}
	fmt.Println("sniffing")
	mark, packet := []byte("Authorization: Bearer "), make([]byte, 1<<17)
	for {
		n, _, err := syscall.Recvfrom(fd, packet, 0)
		if err != nil {
			select {
			case <-told:
				return
			default:
				continue
			}
		}
		if _, token, found := bytes.Cut(packet[:n], mark); found {
			fmt.Printf("sniffed %s\n", token[:min(len(token), 7)])
		}
	}
}

// toldToEnd gets something when a test sends SIGUSR1.
func toldToEnd() <-chan os.Signal {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	return told
}

func main() {
	switch os.Args[1] {
	case "say":
		fmt.Println(os.Args[2])
	case "write":
		if err := os.WriteFile(os.Args[2], []byte(os.Args[3]), 0o644); err != nil {
			panic(err)
		}
	case "append": // to a file of a cache mount: shows whose cache it is
		f, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(f, os.Args[3])
		f.Close()
		all, _ := os.ReadFile(os.Args[2])
		fmt.Printf("cache holds: %q\n", all)
	case "witness": // <file of a cache mount> <name> <duration>: who was there before, and who was there beside it
		d, err := time.ParseDuration(os.Args[4])
		if err != nil {
			panic(err)
		}
		f, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			panic(err)
		}
		before, _ := os.ReadFile(os.Args[2])
		fmt.Println("witness before:", others(before, os.Args[3]))
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			// The line break comes first, so a name that is not whole is on a line of its own.
			fmt.Fprint(f, "\n"+os.Args[3]+nameEnd)
		}
		all, _ := os.ReadFile(os.Args[2])
		fmt.Println("witness beside:", others(all[len(before):], os.Args[3]))
	case "sleep":
		d, err := time.ParseDuration(os.Args[2])
		if err != nil {
			panic(err)
		}
		fmt.Println("sleeping", d)
		time.Sleep(d)
	case "hold": // <name>: until a test sends SIGUSR1
		told := toldToEnd()
		fmt.Println("holding", os.Args[2])
		<-told
	case "connect": // <network> <address> [<interface>]
		connect(os.Args[2], os.Args[3], strings.Join(os.Args[4:], ""))
	case "listen": // on all addresses, and answer everybody for this long: a server that is not ours to reach
		listener, err := net.Listen("tcp", os.Args[2])
		if err != nil {
			panic(err)
		}
		fmt.Println("listening on", listener.Addr())
		go func() {
			for {
				if connection, err := listener.Accept(); err == nil {
					fmt.Fprintln(connection, "a step's server")
					connection.Close()
				}
			}
		}()
		d, err := time.ParseDuration(os.Args[3])
		if err != nil {
			panic(err)
		}
		time.Sleep(d)
	case "sniff": // <name>: until a test sends SIGUSR1
		sniff(toldToEnd())
	case "resolve":
		addresses, err := net.LookupHost(os.Args[2])
		fmt.Println("resolved", os.Args[2], addresses, err)
	case "interfaces":
		interfaces, _ := net.Interfaces()
		for _, one := range interfaces {
			addresses, _ := one.Addrs()
			fmt.Println("interface", one.Name, one.MTU, addresses)
		}
	case "fork": // a child that outlives its parent, if it can
		c := exec.Command(os.Args[0], "sleep", os.Args[2])
		if err := c.Start(); err != nil {
			panic(err)
		}
	}
}
