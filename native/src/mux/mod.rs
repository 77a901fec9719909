//! One connection's Noise records and Yamux frames as one machine. `lattica/net/mux.py` says what it does, and has the
//! reference that the tests hold it against.

mod frame;
mod output;
mod queue;
mod record;
mod stream;
mod window;
mod yamux;

use std::sync::Arc;

use record::{Opener, Sealer, MAX_PLAINTEXT_BYTES};

pub use queue::Source;
pub use window::Budget;
pub use yamux::{Event, Yamux};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The other side broke the protocol or a limit.
    Remote(String),
    /// Our caller did.
    Local(&'static str),
    /// The stream or the connection takes no more.
    Stream(&'static str),
}

/// The machine. What is about streams goes straight to `yamux`.
pub struct Mux {
    pub yamux: Yamux,
    sealer: Sealer,
    opener: Opener,
    started: bool,
    broken: Option<String>,
}

impl Mux {
    pub fn new(initiator: bool, send_key: &[u8], receive_key: &[u8], windows: Arc<Budget>) -> Result<Self, Error> {
        Ok(Mux {
            yamux: Yamux::new(initiator, windows),
            sealer: Sealer::new(send_key)?,
            opener: Opener::new(receive_key)?,
            started: false,
            broken: None,
        })
    }

    /// Records of raw plaintext, before the start.
    pub fn seal(&mut self, data: &[u8]) -> Result<Vec<u8>, Error> {
        self.not_started()?;
        let mut output = Vec::new();
        for piece in data.chunks(MAX_PLAINTEXT_BYTES) {
            self.sealer
                .record(&mut output, |record| record.extend_from_slice(piece))?;
        }
        Ok(output)
    }

    /// The plaintext of whole records, before the start.
    pub fn open(&mut self, data: &[u8]) -> Result<Vec<u8>, Error> {
        self.not_started()?;
        let mut plain = Vec::new();
        self.opener.receive(data, |piece| {
            plain.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(plain)
    }

    pub fn start(&mut self, early: &[u8]) -> Result<Vec<Event>, Error> {
        if self.started {
            return Err(Error::Local("the mux was started already"));
        }
        self.started = true;
        let mut events = Vec::new();
        let done = self.yamux.receive(early, 0.0, &mut events);
        self.remember(done).map(|()| events)
    }

    pub fn receive(&mut self, data: &[u8], now: f64) -> Result<Vec<Event>, Error> {
        if !self.started {
            return Err(Error::Local("the mux was not started"));
        }
        if let Some(why) = &self.broken {
            return Err(Error::Remote(why.clone()));
        }
        let (yamux, mut events) = (&mut self.yamux, Vec::new());
        let done = self
            .opener
            .receive(data, |plain| yamux.receive(plain, now, &mut events));
        self.remember(done).map(|()| events)
    }

    /// Appends records until they are `max_bytes` or more; returns the streams whose senders have room again.
    pub fn take_output(&mut self, max_bytes: usize, output: &mut Vec<u8>) -> Result<Vec<u32>, Error> {
        if !self.started {
            return Err(Error::Local("the mux was not started"));
        }
        while output.len() < max_bytes {
            let yamux = &mut self.yamux;
            if !self
                .sealer
                .record(output, |record| yamux.fill_record(record, MAX_PLAINTEXT_BYTES))?
            {
                break;
            }
        }
        Ok(self.yamux.take_writable())
    }

    fn not_started(&self) -> Result<(), Error> {
        if self.started {
            return Err(Error::Local("plain records are for the time before the mux started"));
        }
        Ok(())
    }

    fn remember(&mut self, done: Result<(), Error>) -> Result<(), Error> {
        if let Err(Error::Remote(why)) = &done {
            self.broken = Some(why.clone());
        }
        done
    }
}

#[cfg(test)]
mod tests;
