//! Streams under protocols of our choice, as a [`NetworkBehaviour`].
//!
//! libp2p-stream would be the ready one, but it drops inbound streams that come faster than they are taken from a queue
//! of one, and the tests open many at once.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use futures::channel::oneshot;
use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::{Endpoint, InboundUpgrade, UpgradeInfo, transport::PortUse, upgrade::ReadyUpgrade},
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
        NotifyHandler, StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound},
    },
};

type Opened = oneshot::Sender<Result<Stream, String>>;

/// A stream that a peer opened.
#[derive(Debug)]
pub struct Inbound {
    pub peer: PeerId,
    pub protocol: StreamProtocol,
    pub stream: Stream,
}

/// Needs no waker: who calls its methods has the swarm in hand and polls it next.
#[derive(Default)]
pub struct Behaviour {
    served: Vec<StreamProtocol>,
    connections: HashMap<PeerId, Vec<ConnectionId>>,
    queued: VecDeque<ToSwarm<Inbound, Ask>>,
}

impl Behaviour {
    /// Accepts streams under `protocol`, on connections that exist too.
    pub fn serve(&mut self, protocol: StreamProtocol) {
        for (peer, connections) in &self.connections {
            for connection in connections {
                self.queued.push_back(ToSwarm::NotifyHandler {
                    peer_id: *peer,
                    handler: NotifyHandler::One(*connection),
                    event: Ask::Serve(protocol.clone()),
                });
            }
        }
        self.served.push(protocol);
    }

    /// Opens a stream on the newest connection to `peer`.
    pub fn open(&mut self, peer: PeerId, protocol: StreamProtocol) -> oneshot::Receiver<Result<Stream, String>> {
        let (opened, receiver) = oneshot::channel();
        match self.connections.get(&peer).and_then(|all| all.last()) {
            Some(connection) => self.queued.push_back(ToSwarm::NotifyHandler {
                peer_id: peer,
                handler: NotifyHandler::One(*connection),
                event: Ask::Open(protocol, opened),
            }),
            None => {
                let _ = opened.send(Err(format!("not connected to {peer}")));
            }
        }
        receiver
    }

    fn handler(&mut self, connection: ConnectionId, peer: PeerId) -> Handler {
        self.connections.entry(peer).or_default().push(connection);
        Handler {
            served: self.served.clone(),
            queued: VecDeque::new(),
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Inbound;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(connection, peer))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(connection, peer))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(closed) = event
            && let Some(connections) = self.connections.get_mut(&closed.peer_id)
        {
            connections.retain(|connection| *connection != closed.connection_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        _: ConnectionId,
        (stream, protocol): THandlerOutEvent<Self>,
    ) {
        self.queued
            .push_back(ToSwarm::GenerateEvent(Inbound { peer, protocol, stream }));
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.queued.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}

/// What the behaviour asks of one connection.
#[derive(Debug)]
pub enum Ask {
    Serve(StreamProtocol),
    Open(StreamProtocol, Opened),
}

pub struct Handler {
    served: Vec<StreamProtocol>,
    queued: VecDeque<ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, Opened, (Stream, StreamProtocol)>>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Ask;
    type ToBehaviour = (Stream, StreamProtocol);
    type InboundProtocol = AnyOf;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Opened;

    fn listen_protocol(&self) -> SubstreamProtocol<AnyOf> {
        SubstreamProtocol::new(AnyOf(self.served.clone()), ())
    }

    fn on_behaviour_event(&mut self, ask: Ask) {
        match ask {
            Ask::Serve(protocol) => self.served.push(protocol),
            Ask::Open(protocol, opened) => {
                self.queued.push_back(ConnectionHandlerEvent::OutboundSubstreamRequest {
                    protocol: SubstreamProtocol::new(ReadyUpgrade::new(protocol), opened),
                });
            }
        }
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol, (), Opened>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: inbound, .. }) => {
                self.queued.push_back(ConnectionHandlerEvent::NotifyBehaviour(inbound));
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info: opened,
            }) => {
                let _ = opened.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, info: opened }) => {
                let _ = opened.send(Err(match error {
                    StreamUpgradeError::NegotiationFailed => "the peer does not speak this protocol".into(),
                    other => other.to_string(),
                }));
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        self.queued.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}

/// Accepts each of several protocols, and tells which it was.
pub struct AnyOf(Vec<StreamProtocol>);

impl UpgradeInfo for AnyOf {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl InboundUpgrade<Stream> for AnyOf {
    type Output = (Stream, StreamProtocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, protocol: StreamProtocol) -> Self::Future {
        ready(Ok((stream, protocol)))
    }
}
