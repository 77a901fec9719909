package main

import (
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// report tells the driver of connections, and of what peers say about themselves, at first and later.
func report(h host.Host, driver *Driver) error {
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			driver.Emit("connected", map[string]any{
				"peer": c.RemotePeer(), "address": c.RemoteMultiaddr(), "outbound": c.Stat().Direction == network.DirOutbound,
			})
		},
		DisconnectedF: func(_ network.Network, c network.Conn) {
			driver.Emit("disconnected", map[string]any{"peer": c.RemotePeer()})
		},
	})
	events, err := h.EventBus().Subscribe([]any{
		new(event.EvtPeerIdentificationCompleted), new(event.EvtPeerIdentificationFailed),
	})
	if err != nil {
		return err
	}
	go func() {
		for e := range events.Out() {
			switch e := e.(type) {
			case event.EvtPeerIdentificationCompleted:
				driver.Emit("identified", map[string]any{
					"peer": e.Peer, "agent": e.AgentVersion, "protocols": e.Protocols,
					"addresses": e.ListenAddrs, "observed": e.ObservedAddr,
				})
			case event.EvtPeerIdentificationFailed:
				driver.Emit("not identified", map[string]any{"peer": e.Peer, "error": e.Reason.Error()})
			}
		}
	}()
	return nil
}

// knownProtocols is what identify has told of a peer so far.
func knownProtocols(h host.Host, id peer.ID) []string {
	protocols, err := h.Peerstore().GetProtocols(id)
	if err != nil {
		return nil
	}
	names := make([]string, len(protocols))
	for i, name := range protocols {
		names[i] = string(name)
	}
	return names
}
