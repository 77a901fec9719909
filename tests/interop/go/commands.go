package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-yamux/v5"
)

const (
	Echo   protocol.ID = "/interop/echo/1.0.0"
	Sink   protocol.ID = "/interop/sink/1.0.0"
	Source protocol.ID = "/interop/source/1.0.0"
	Hold   protocol.ID = "/interop/hold/1.0.0"
)

// Held keeps the streams that the driver moves by hand, by number.
type Held struct {
	mu      sync.Mutex
	streams map[int]network.Stream
}

func NewHeld() *Held { return &Held{streams: map[int]network.Stream{}} }

func (h *Held) add(stream network.Stream) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	number := len(h.streams) + 1
	h.streams[number] = stream
	return number
}

func (h *Held) get(number int) (network.Stream, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	stream, known := h.streams[number]
	if !known {
		return nil, fmt.Errorf("no stream %d", number)
	}
	return stream, nil
}

func serve(h host.Host, driver *Driver, held *Held) {
	h.SetStreamHandler(Echo, echo)
	h.SetStreamHandler(Sink, sink)
	h.SetStreamHandler(Source, source)
	h.SetStreamHandler(Hold, func(stream network.Stream) {
		driver.Emit("stream", map[string]any{"stream": held.add(stream), "peer": stream.Conn().RemotePeer()})
	})
}

type toAddress struct {
	Address string `json:"address"`
}

type toPeer struct {
	Peer     peer.ID     `json:"peer"`
	Protocol protocol.ID `json:"protocol"`
	Bytes    int64       `json:"bytes"`
}

type onStream struct {
	Stream int    `json:"stream"`
	Text   string `json:"text"`
	Bytes  int64  `json:"bytes"`
}

type nothing struct{}

func register(h host.Host, driver *Driver, held *Held) {
	ctx := context.Background()

	Handle(driver, "dial", func(to toAddress) (any, error) {
		info, err := peer.AddrInfoFromString(to.Address)
		if err != nil {
			return nil, err
		}
		return map[string]any{"peer": info.ID}, h.Connect(ctx, *info)
	})
	Handle(driver, "hang up", func(to toPeer) (any, error) {
		return nothing{}, h.Network().ClosePeer(to.Peer)
	})
	Handle(driver, "ping", func(to toPeer) (any, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		result := <-ping.Ping(ctx, h, to.Peer)
		return map[string]any{"seconds": result.RTT.Seconds()}, result.Error
	})
	Handle(driver, "protocols", func(to toPeer) (any, error) {
		return map[string]any{"protocols": knownProtocols(h, to.Peer)}, nil
	})
	Handle(driver, "ping muxer", func(to toPeer) (any, error) {
		for _, connection := range h.Network().ConnsToPeer(to.Peer) {
			var session *yamux.Session
			if connection.As(&session) {
				rtt, err := session.Ping()
				return map[string]any{"seconds": rtt.Seconds()}, err
			}
		}
		return nil, fmt.Errorf("no Yamux connection to %s", to.Peer)
	})
	Handle(driver, "serve", func(what toPeer) (any, error) {
		h.SetStreamHandler(what.Protocol, echo)
		return nothing{}, nil
	})

	Handle(driver, "open", func(to toPeer) (any, error) {
		stream, err := h.NewStream(ctx, to.Peer, to.Protocol)
		if err != nil {
			return nil, err
		}
		return map[string]any{"stream": held.add(stream)}, nil
	})
	onHeld := func(name string, act func(network.Stream, onStream) (any, error)) {
		Handle(driver, name, func(on onStream) (any, error) {
			stream, err := held.get(on.Stream)
			if err != nil {
				return nil, err
			}
			return act(stream, on)
		})
	}
	onHeld("write", func(stream network.Stream, on onStream) (any, error) {
		_, err := io.WriteString(stream, on.Text)
		return nothing{}, err
	})
	onHeld("read", func(stream network.Stream, on onStream) (any, error) {
		data := make([]byte, on.Bytes)
		n, err := io.ReadFull(stream, data)
		ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if ended {
			err = nil
		}
		return map[string]any{"text": string(data[:n]), "ended": ended}, err
	})
	onHeld("end", func(stream network.Stream, _ onStream) (any, error) { return nothing{}, stream.CloseWrite() })
	onHeld("reset", func(stream network.Stream, _ onStream) (any, error) { return nothing{}, stream.Reset() })

	bulk := func(name string, to protocol.ID, act func(network.Stream, int64) (any, error)) {
		Handle(driver, name, func(arguments toPeer) (any, error) {
			stream, err := h.NewStream(ctx, arguments.Peer, to)
			if err != nil {
				return nil, err
			}
			defer stream.Close()
			return act(stream, arguments.Bytes)
		})
	}
	bulk("echo", Echo, echoed)
	bulk("sink", Sink, sunk)
	bulk("source", Source, sourced)
}
