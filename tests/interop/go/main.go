// The peer of the interop checks on Go's ttrpc: PROGRAM serve PATH, which ends when its stdin does, and PROGRAM call PATH CHECK,
// which prints ok or what was wrong. What differs between the versions is in the one file beside this one.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	service = "interop.Peer"
	callers = 32
	calls   = 50
)

func method(answer func(ctx context.Context, value string) (string, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
		var in Value
		if err := unmarshal(&in); err != nil {
			return nil, err
		}
		out, err := answer(ctx, string(in.Value))
		if err != nil {
			return nil, err
		}
		return &Value{Value: []byte(out)}, nil
	}
}

var methods = map[string]ttrpc.Method{
	"Echo": method(func(_ context.Context, value string) (string, error) { return value, nil }),
	"Fail": method(func(_ context.Context, value string) (string, error) {
		code, text, _ := strings.Cut(value, " ")
		number, err := strconv.Atoi(code)
		if err != nil {
			return "", err
		}
		return "", status.Error(codes.Code(number), text)
	}),
	"Metadata": method(func(ctx context.Context, value string) (string, error) {
		pairs, _ := ttrpc.GetMetadata(ctx)
		values, _ := pairs.Get(value)
		return strings.Join(values, ","), nil
	}),
	"Timeout": method(func(ctx context.Context, _ string) (string, error) {
		deadline, ok := ctx.Deadline()
		if !ok {
			return "none", nil
		}
		return strconv.FormatInt(time.Until(deadline).Milliseconds(), 10), nil
	}),
	"Sleep": method(func(_ context.Context, value string) (string, error) {
		pause, err := strconv.Atoi(value)
		time.Sleep(time.Duration(pause) * time.Millisecond)
		return value, err
	}),
}

func serve(path string) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	register(server)
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("ok")
	return server.Serve(context.Background(), listener)
}

func expect(got, want interface{}, err error) error {
	if err != nil {
		return err
	}
	if text, other := fmt.Sprint(got), fmt.Sprint(want); text != other {
		return fmt.Errorf("got %.200q, not %.200q", text, other)
	}
	return nil
}

func expectStatus(err error, code codes.Code, text string) error {
	if err == nil {
		return fmt.Errorf("an answer came, not the status %d", code)
	}
	got, _ := status.FromError(err)
	return expect(fmt.Sprintf("%d %s", got.Code(), got.Message()), fmt.Sprintf("%d %s", code, text), nil)
}

func ask(ctx context.Context, client *ttrpc.Client, method, value string) (string, error) {
	var out Value
	err := client.Call(ctx, service, method, &Value{Value: []byte(value)}, &out)
	return string(out.Value), err
}

func codesAndTexts(ctx context.Context, client *ttrpc.Client) error {
	for code := codes.Code(1); code <= 16; code++ {
		text := fmt.Sprintf("text é %d", code)
		_, err := ask(ctx, client, "Fail", fmt.Sprintf("%d %s", code, text))
		if err := expectStatus(err, code, text); err != nil {
			return err
		}
	}
	return nil
}

func timeout(ctx context.Context, client *ttrpc.Client) error {
	got, err := ask(ctx, client, "Timeout", "")
	if err := expect(got, "none", err); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if got, err = ask(ctx, client, "Timeout", ""); err != nil {
		return err
	}
	if left, err := strconv.Atoi(got); err != nil || left < 1 || left > 60000 {
		return fmt.Errorf("told %q ms of 60000", got)
	}
	return nil
}

func deadline(ctx context.Context, client *ttrpc.Client) error {
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	// The client's own clock and the server's answer race; both say the same.
	_, err := ask(short, client, "Sleep", "500")
	if got, _ := status.FromError(err); err != context.DeadlineExceeded && got.Code() != codes.DeadlineExceeded {
		return fmt.Errorf("got %v, not a timeout", err)
	}
	got, err := ask(ctx, client, "Echo", "after")
	return expect(got, "after", err)
}

func many(ctx context.Context, client *ttrpc.Client) error {
	outcomes := make(chan error)
	for caller := 0; caller < callers; caller++ {
		go func(caller int) {
			var err error
			for call := 0; call < calls && err == nil; call++ {
				value := strings.Repeat(fmt.Sprintf("%d %d ", caller, call), caller*10+1)
				var got string
				got, err = ask(ctx, client, "Echo", value)
				err = expect(got, value, err)
			}
			outcomes <- err
		}(caller)
	}
	var first error
	for caller := 0; caller < callers; caller++ {
		if err := <-outcomes; err != nil {
			first = err
		}
	}
	return first
}

func call(path, check string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx := context.Background()
	echo := func(value string) error {
		got, err := ask(ctx, client, "Echo", value)
		return expect(got, value, err)
	}
	switch check {
	case "unary":
		return echo("hello")
	case "empty":
		return echo("")
	case "megabyte":
		return echo(string(bytes.Repeat([]byte("0123456789abcdef"), 1<<16)))
	case "codes":
		return codesAndTexts(ctx, client)
	case "unknown_method":
		_, err := ask(ctx, client, "Nothing", "")
		return expectStatus(err, codes.Unimplemented, "method Nothing")
	case "metadata":
		pairs := ttrpc.MD{}
		pairs.Append("one", "a")
		pairs.Append("Two", "b")
		pairs.Append("one", "c")
		got, err := ask(ttrpc.WithMetadata(ctx, pairs), client, "Metadata", "one")
		return expect(got, "a,c", err)
	case "timeout":
		return timeout(ctx, client)
	case "deadline":
		return deadline(ctx, client)
	case "many":
		return many(ctx, client)
	}
	return stream(ctx, client, check)
}

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(os.Args[2])
	case len(os.Args) == 4 && os.Args[1] == "call":
		err = call(os.Args[2], os.Args[3])
	default:
		err = fmt.Errorf("usage: %s serve PATH, or call PATH CHECK", os.Args[0])
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ok")
}
