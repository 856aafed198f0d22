// The one program of the test images: static, so that a build needs no base image.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// others are the names on the lines, each once, but for one's own.
func others(lines []byte, own string) string {
	seen := map[string]bool{own: true}
	var names []string
	for _, name := range strings.Fields(string(lines)) {
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
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
			fmt.Fprintln(f, os.Args[3])
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
	case "fork": // a child that outlives its parent, if it can
		c := exec.Command(os.Args[0], "sleep", os.Args[2])
		if err := c.Start(); err != nil {
			panic(err)
		}
	}
}
