// Go's ttrpc from 1.2 on, which has streams.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Value is the message of every method.
type Value = wrapperspb.BytesValue

func sum(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	messages, length := 0, 0
	for {
		var in Value
		err := stream.RecvMsg(&in)
		if errors.Is(err, io.EOF) {
			return &Value{Value: fmt.Appendf(nil, "%d %d", messages, length)}, nil
		}
		if err != nil {
			return nil, err
		}
		messages++
		length += len(in.Value)
	}
}

func count(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	var in Value
	if err := stream.RecvMsg(&in); err != nil {
		return nil, err
	}
	upto, err := strconv.Atoi(string(in.Value))
	for number := 0; number < upto && err == nil; number++ {
		err = stream.SendMsg(&Value{Value: []byte(strconv.Itoa(number))})
	}
	return nil, err
}

func chat(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	for {
		var in Value
		err := stream.RecvMsg(&in)
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if string(in.Value) == "fail" {
			return nil, status.Error(codes.FailedPrecondition, "as asked")
		}
		if err := stream.SendMsg(&in); err != nil {
			return nil, err
		}
	}
}

func register(server *ttrpc.Server) {
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: methods, Streams: map[string]ttrpc.Stream{
		"Sum":   {Handler: sum, StreamingClient: true},
		"Count": {Handler: count, StreamingServer: true},
		"Chat":  {Handler: chat, StreamingClient: true, StreamingServer: true},
	}})
}

func clientStreams(ctx context.Context, client *ttrpc.Client, messages int, want string) error {
	stream, err := client.NewStream(ctx, &ttrpc.StreamDesc{StreamingClient: true}, service, "Sum", nil)
	if err != nil {
		return err
	}
	for number := 0; number < messages; number++ {
		if err := stream.SendMsg(&Value{Value: make([]byte, number)}); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	var got Value
	err = stream.RecvMsg(&got)
	return expect(string(got.Value), want, err)
}

func serverStreams(ctx context.Context, client *ttrpc.Client) error {
	desc := &ttrpc.StreamDesc{StreamingServer: true}
	stream, err := client.NewStream(ctx, desc, service, "Count", &Value{Value: []byte("100")})
	if err != nil {
		return err
	}
	for number := 0; number < 100; number++ {
		var got Value
		err := stream.RecvMsg(&got)
		if err := expect(string(got.Value), number, err); err != nil {
			return err
		}
	}
	return expect(stream.RecvMsg(&Value{}), io.EOF, nil)
}

func bothStream(ctx context.Context, client *ttrpc.Client, fails bool) error {
	desc := &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}
	stream, err := client.NewStream(ctx, desc, service, "Chat", nil)
	if err != nil {
		return err
	}
	for number := 0; number < 100; number++ {
		sent := fmt.Sprintf("message %d", number)
		if err := stream.SendMsg(&Value{Value: []byte(sent)}); err != nil {
			return err
		}
		var got Value
		err := stream.RecvMsg(&got)
		if err := expect(string(got.Value), sent, err); err != nil {
			return err
		}
	}
	if fails {
		if err := stream.SendMsg(&Value{Value: []byte("fail")}); err != nil {
			return err
		}
		return expectStatus(stream.RecvMsg(&Value{}), codes.FailedPrecondition, "as asked")
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return expect(stream.RecvMsg(&Value{}), io.EOF, nil)
}

func stream(ctx context.Context, client *ttrpc.Client, check string) error {
	switch check {
	case "client_streams":
		return clientStreams(ctx, client, 100, "100 4950")
	case "client_streams_nothing":
		return clientStreams(ctx, client, 0, "0 0")
	case "server_streams":
		return serverStreams(ctx, client)
	case "both_stream", "stream_fails":
		return bothStream(ctx, client, check == "stream_fails")
	}
	return fmt.Errorf("no such check: %s", check)
}
