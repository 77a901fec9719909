// A small go-libp2p peer that the tests drive over stdin and stdout; see ../README.md for what it says and obeys.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

// Options come as one JSON object, the only argument. What is left out is go-libp2p's default.
type Options struct {
	Listen       []string `json:"listen"`
	RaisedLimits bool     `json:"raised_limits"`
	WindowBytes  uint32   `json:"window_bytes"` // the receive window of a new stream
	FrameBytes   uint32   `json:"frame_bytes"`  // the largest Yamux data frame that it sends
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("usage: peer OPTIONS (a JSON object)")
	}
	var options Options
	if err := json.Unmarshal([]byte(os.Args[1]), &options); err != nil {
		return fmt.Errorf("options: %w", err)
	}
	h, err := newHost(options)
	if err != nil {
		return err
	}
	defer h.Close()
	driver := NewDriver(os.Stdin, os.Stdout)
	held := NewHeld()
	if err := report(h, driver); err != nil {
		return err
	}
	serve(h, driver, held)
	register(h, driver, held)
	driver.Emit("ready", map[string]any{"peer": h.ID(), "addresses": fullAddresses(h)})
	return driver.Run()
}

func newHost(options Options) (host.Host, error) {
	muxer := *yamux.DefaultTransport
	if options.WindowBytes != 0 {
		muxer.InitialStreamWindowSize = options.WindowBytes
	}
	if options.FrameBytes != 0 {
		muxer.MaxMessageSize = options.FrameBytes
	}
	settings := []libp2p.Option{
		libp2p.ListenAddrStrings(options.Listen...),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, &muxer),
		libp2p.UserAgent("go-libp2p interop"),
		libp2p.DisableMetrics(),
	}
	if options.RaisedLimits {
		manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
		if err != nil {
			return nil, err
		}
		settings = append(settings, libp2p.ResourceManager(manager))
	}
	return libp2p.New(settings...)
}

func fullAddresses(h host.Host) []string {
	var full []string
	for _, address := range h.Addrs() {
		full = append(full, fmt.Sprintf("%s/p2p/%s", address, h.ID()))
	}
	return full
}
