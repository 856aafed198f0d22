// The one program of the test images: static, so that a build needs no base image.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"time"
)

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
