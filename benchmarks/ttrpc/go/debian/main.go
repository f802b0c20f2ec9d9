// The echo server of the benchmark on Debian's Go ttrpc 1.1: PROGRAM serve PATH. Ends when its stdin does.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/containerd/ttrpc"
	"github.com/gogo/protobuf/types"
)

func echo(_ context.Context, unmarshal func(interface{}) error) (interface{}, error) {
	var in types.BytesValue
	if err := unmarshal(&in); err != nil {
		return nil, err
	}
	return &types.BytesValue{Value: in.Value}, nil
}

func main() {
	server, err := ttrpc.NewServer()
	if err != nil {
		panic(err)
	}
	server.Register("bench.Echo", map[string]ttrpc.Method{"Echo": echo})
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
