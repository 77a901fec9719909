//! What the tests say and hear: requests, replies and events, one JSON object a line.

use std::io::Write as _;

use libp2p::{Multiaddr, PeerId, StreamProtocol};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

#[derive(Deserialize)]
pub struct Request {
    pub id: u64,
    #[serde(flatten)]
    pub command: Command,
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    Dial {
        address: Multiaddr,
    },
    #[serde(rename = "hang up")]
    HangUp {
        peer: PeerId,
    },
    Ping {
        peer: PeerId,
    },
    Protocols {
        peer: PeerId,
    },
    Serve {
        #[serde(deserialize_with = "protocol")]
        protocol: StreamProtocol,
    },
    Open {
        peer: PeerId,
        #[serde(deserialize_with = "protocol")]
        protocol: StreamProtocol,
    },
    Write {
        stream: u64,
        text: String,
    },
    Read {
        stream: u64,
        bytes: usize,
    },
    End {
        stream: u64,
    },
    Reset {
        stream: u64,
    },
    Echo {
        peer: PeerId,
        bytes: usize,
    },
    Sink {
        peer: PeerId,
        bytes: usize,
    },
    Source {
        peer: PeerId,
        bytes: usize,
    },
}

fn protocol<'de, D: Deserializer<'de>>(input: D) -> Result<StreamProtocol, D::Error> {
    StreamProtocol::try_from_owned(String::deserialize(input)?).map_err(serde::de::Error::custom)
}

/// What a command comes to; an error is for people.
pub type Outcome = Result<Value, String>;

pub fn reply(id: u64, outcome: Outcome) {
    write(match outcome {
        Ok(result) => json!({"id": id, "result": result}),
        Err(error) => json!({"id": id, "error": error}),
    });
}

/// Reports something that nobody asked for.
pub fn emit(event: &str, mut fields: Value) {
    fields["event"] = event.into();
    write(fields);
}

fn write(line: Value) {
    // Whole lines, whoever else writes; stdout is gone when the test is over.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}
