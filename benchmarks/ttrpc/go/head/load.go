package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// load PATH BYTES OUTSTANDING MS: as many goroutines as calls are to be outstanding, over one connection. Prints calls, ns, and the
// median and 99th percentile of a call's ns.
func load(words []string) {
	numbers := make([]int, 3)
	for at, word := range words[1:4] {
		number, err := strconv.Atoi(word)
		if err != nil {
			panic(err)
		}
		numbers[at] = number
	}
	connection, err := net.Dial("unix", words[0])
	if err != nil {
		panic(err)
	}
	client := ttrpc.NewClient(connection)
	request := &wrapperspb.BytesValue{Value: make([]byte, numbers[0])}
	var group sync.WaitGroup
	taken := make([][]int64, numbers[1])
	began := time.Now()
	until := began.Add(time.Duration(numbers[2]) * time.Millisecond)
	for caller := range taken {
		group.Add(1)
		go func() {
			defer group.Done()
			for before := time.Now(); before.Before(until); before = time.Now() {
				var answer wrapperspb.BytesValue
				if err := client.Call(context.Background(), "bench.Echo", "Echo", request, &answer); err != nil {
					panic(err)
				}
				if len(answer.Value) != numbers[0] {
					panic("an answer of another length")
				}
				taken[caller] = append(taken[caller], time.Since(before).Nanoseconds())
			}
		}()
	}
	group.Wait()
	ns := time.Since(began).Nanoseconds()
	all := slices.Concat(taken...)
	slices.Sort(all)
	fmt.Fprintln(os.Stdout, len(all), ns, all[len(all)/2], all[len(all)*99/100])
}
