// Debian's Go ttrpc 1.1, which has no streams and the messages of gogo.
package main

import (
	"context"
	"fmt"

	"github.com/containerd/ttrpc"
	"github.com/gogo/protobuf/types"
)

// Value is the message of every method.
type Value = types.BytesValue

func register(server *ttrpc.Server) {
	server.Register(service, methods)
}

func stream(_ context.Context, _ *ttrpc.Client, check string) error {
	return fmt.Errorf("no such check: %s", check)
}
