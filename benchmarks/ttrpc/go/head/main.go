// The echo server of the benchmark on Go's ttrpc: PROGRAM serve PATH. Ends when its stdin does. PROGRAM load …: its client.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func echo(_ context.Context, unmarshal func(any) error) (any, error) {
	var in wrapperspb.BytesValue
	if err := unmarshal(&in); err != nil {
		return nil, err
	}
	return &wrapperspb.BytesValue{Value: in.Value}, nil
}

func main() {
	if os.Args[1] == "load" {
		load(os.Args[2:])
		return
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		panic(err)
	}
	server.RegisterService("bench.Echo", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{"Echo": echo}})
	listener, err := net.Listen("unix", os.Args[2])
	if err != nil {
		panic(err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("ok")
	panic(server.Serve(context.Background(), listener))
}
