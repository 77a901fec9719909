//! A small rust-libp2p peer that the tests drive over stdin and stdout; see ../README.md for what it says and obeys.

mod bulk;
mod driver;
mod held;
mod streams;

use std::{collections::HashMap, error::Error, future::Future, io, time::Duration};

use driver::{Command, Outcome, Request, emit, reply};
use futures::StreamExt as _;
use held::Held;
use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol, Swarm, SwarmBuilder,
    core::{ConnectedPoint, upgrade},
    identify, noise, ping,
    swarm::{ConnectionId, DialError, NetworkBehaviour, SwarmEvent, dial_opts::DialOpts},
    tcp, yamux,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncBufReadExt as _;

const ECHO: StreamProtocol = StreamProtocol::new("/interop/echo/1.0.0");
const SINK: StreamProtocol = StreamProtocol::new("/interop/sink/1.0.0");
const SOURCE: StreamProtocol = StreamProtocol::new("/interop/source/1.0.0");
const HOLD: StreamProtocol = StreamProtocol::new("/interop/hold/1.0.0");

/// rust-libp2p pings by itself and has no way to be asked: often, so that a test need not wait long for the next.
const PING_INTERVAL: Duration = Duration::from_millis(200);

/// rust-libp2p closes a connection without streams after 10 s, which a slow machine may take to get to the next step.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// Come as one JSON object, the only argument. What is left out is rust-libp2p's default.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    listen: Vec<Multiaddr>,
    raised_limits: bool,
    /// Send data with the protocol proposal instead of after its answer.
    lazy: bool,
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    streams: streams::Behaviour,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let argument = std::env::args()
        .nth(1)
        .ok_or("usage: interop-peer OPTIONS (a JSON object)")?;
    let options: Options = serde_json::from_str(&argument)?;
    let mut peer = Peer::new(&options)?;
    for address in options.listen {
        peer.listen(address).await?;
    }
    emit("ready", json!({"peer": peer.id(), "addresses": peer.addresses()}));
    peer.run().await
}

struct Peer {
    swarm: Swarm<Behaviour>,
    held: Held,
    /// Requests that wait for a connection, and for the next ping of a peer.
    dials: HashMap<ConnectionId, u64>,
    pings: Vec<(PeerId, u64)>,
    protocols: HashMap<PeerId, Vec<StreamProtocol>>,
}

impl Peer {
    fn new(options: &Options) -> Result<Self, Box<dyn Error>> {
        let mut swarm = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(tcp::Config::default(), noise::Config::new, || {
                let mut muxer = yamux::Config::default();
                if options.raised_limits {
                    muxer.set_max_num_streams(2048);
                }
                muxer
            })?
            .with_behaviour(|keys| Behaviour {
                identify: identify::Behaviour::new(
                    identify::Config::new("/ipfs/0.1.0".into(), keys.public())
                        .with_agent_version("rust-libp2p interop".into()),
                ),
                ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL)),
                streams: streams::Behaviour::default(),
            })?
            .with_swarm_config(|mut config| {
                if options.raised_limits {
                    config = config.with_max_negotiating_inbound_streams(2048);
                }
                if options.lazy {
                    config = config.with_substream_upgrade_protocol_override(upgrade::Version::V1Lazy);
                }
                config.with_idle_connection_timeout(IDLE_TIMEOUT)
            })
            .build();
        for protocol in [ECHO, SINK, SOURCE, HOLD] {
            swarm.behaviour_mut().streams.serve(protocol);
        }
        Ok(Peer {
            swarm,
            held: Held::default(),
            dials: HashMap::new(),
            pings: Vec::new(),
            protocols: HashMap::new(),
        })
    }

    fn id(&self) -> PeerId {
        *self.swarm.local_peer_id()
    }

    fn addresses(&self) -> Vec<String> {
        self.swarm
            .listeners()
            .map(|address| format!("{address}/p2p/{}", self.id()))
            .collect()
    }

    async fn listen(&mut self, address: Multiaddr) -> Result<(), Box<dyn Error>> {
        let listener = self.swarm.listen_on(address)?;
        loop {
            match self.swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, .. } if listener_id == listener => return Ok(()),
                SwarmEvent::ListenerClosed { reason, .. } => return Err(format!("cannot listen: {reason:?}").into()),
                _ => {}
            }
        }
    }

    /// Obeys until stdin ends.
    async fn run(mut self) -> Result<(), Box<dyn Error>> {
        let mut requests = tokio::io::BufReader::new(tokio::io::stdin()).lines();
        loop {
            tokio::select! {
                line = requests.next_line() => match line? {
                    Some(line) => self.obey(serde_json::from_str(&line)?),
                    None => return Ok(()),
                },
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
    }

    fn obey(&mut self, Request { id, command }: Request) {
        let held = self.held.clone();
        match command {
            Command::Dial { address } => self.dial(id, address),
            Command::HangUp { peer } => reply(
                id,
                self.swarm
                    .disconnect_peer_id(peer)
                    .map(|()| json!({}))
                    .map_err(|()| format!("not connected to {peer}")),
            ),
            Command::Ping { peer } => self.pings.push((peer, id)),
            Command::Protocols { peer } => reply(id, Ok(json!({"protocols": names(self.protocols.get(&peer))}))),
            Command::Serve { protocol } => {
                self.swarm.behaviour_mut().streams.serve(protocol);
                reply(id, Ok(json!({})));
            }
            Command::Open { peer, protocol } => {
                let opened = self.open(peer, protocol);
                answer(id, async move { Ok(json!({"stream": held.add(opened.await?)})) });
            }
            Command::Write { stream, text } => answer(id, async move { held.write(stream, &text).await }),
            Command::Read { stream, bytes } => answer(id, async move { held.read(stream, bytes).await }),
            Command::End { stream } => answer(id, async move { held.end(stream).await }),
            Command::Reset { stream } => reply(id, held.reset(stream)),
            Command::Echo { peer, bytes } => self.bulk(id, peer, ECHO, move |stream| bulk::echo(stream, bytes)),
            Command::Sink { peer, bytes } => self.bulk(id, peer, SINK, move |stream| bulk::sink(stream, bytes)),
            Command::Source { peer, bytes } => self.bulk(id, peer, SOURCE, move |stream| bulk::source(stream, bytes)),
        }
    }

    fn dial(&mut self, id: u64, address: Multiaddr) {
        let dial = DialOpts::from(address);
        self.dials.insert(dial.connection_id(), id);
        let connection = dial.connection_id();
        if let Err(error) = self.swarm.dial(dial) {
            self.dialled(connection, Err(&error));
        }
    }

    fn dialled(&mut self, connection: ConnectionId, outcome: Result<PeerId, &DialError>) {
        if let Some(id) = self.dials.remove(&connection) {
            reply(
                id,
                outcome
                    .map(|peer| json!({"peer": peer}))
                    .map_err(|error| error.to_string()),
            );
        }
    }

    fn open(
        &mut self,
        peer: PeerId,
        protocol: StreamProtocol,
    ) -> impl Future<Output = Result<Stream, String>> + Send + use<> {
        let opened = self.swarm.behaviour_mut().streams.open(peer, protocol);
        async move { opened.await.unwrap_or_else(|_| Err("the connection was closed".into())) }
    }

    fn bulk<F>(
        &mut self,
        id: u64,
        peer: PeerId,
        protocol: StreamProtocol,
        act: impl FnOnce(Stream) -> F + Send + 'static,
    ) where
        F: Future<Output = io::Result<Value>> + Send,
    {
        let opened = self.open(peer, protocol);
        answer(id, async move {
            act(opened.await?).await.map_err(|error| error.to_string())
        });
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                let outbound = matches!(endpoint, ConnectedPoint::Dialer { .. });
                emit(
                    "connected",
                    json!({"peer": peer_id, "address": endpoint.get_remote_address(), "outbound": outbound}),
                );
                self.dialled(connection_id, Ok(peer_id));
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id, error, ..
            } => {
                self.dialled(connection_id, Err(&error));
            }
            SwarmEvent::ConnectionClosed { peer_id, .. } => emit("disconnected", json!({"peer": peer_id})),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(event)) => self.on_identify(event),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => self.on_ping(event),
            SwarmEvent::Behaviour(BehaviourEvent::Streams(inbound)) => self.on_stream(inbound),
            _ => {}
        }
    }

    fn on_identify(&mut self, event: identify::Event) {
        match event {
            identify::Event::Received { peer_id, info, .. } => {
                emit(
                    "identified",
                    json!({
                        "peer": peer_id,
                        "agent": info.agent_version,
                        "protocols": names(Some(&info.protocols)),
                        "addresses": info.listen_addrs,
                        "observed": info.observed_addr,
                    }),
                );
                self.protocols.insert(peer_id, info.protocols);
            }
            identify::Event::Error { peer_id, error, .. } => {
                emit("not identified", json!({"peer": peer_id, "error": error.to_string()}));
            }
            _ => {}
        }
    }

    fn on_ping(&mut self, event: ping::Event) {
        let outcome = event.result.map_err(|error| error.to_string());
        for (_, id) in self.pings.extract_if(.., |(peer, _)| *peer == event.peer) {
            reply(id, outcome.clone().map(|rtt| json!({"seconds": rtt.as_secs_f64()})));
        }
    }

    fn on_stream(&mut self, streams::Inbound { peer, protocol, stream }: streams::Inbound) {
        // A stream whose task ends early is dropped and thereby reset: all that its peer has to know.
        match protocol {
            p if p == SINK => drop(tokio::spawn(bulk::serve_sink(stream))),
            p if p == SOURCE => drop(tokio::spawn(bulk::serve_source(stream))),
            p if p == HOLD => emit("stream", json!({"stream": self.held.add(stream), "peer": peer})),
            _ => drop(tokio::spawn(bulk::serve_echo(stream))),
        }
    }
}

fn names(protocols: Option<&Vec<StreamProtocol>>) -> Vec<&str> {
    protocols.into_iter().flatten().map(AsRef::as_ref).collect()
}

/// Runs a command beside everything else and replies with what it comes to.
fn answer(id: u64, work: impl Future<Output = Outcome> + Send + 'static) {
    tokio::spawn(async move { reply(id, work.await) });
}
