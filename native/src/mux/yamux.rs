//! /yamux/1.0.0 as a state machine. `lattica/net/yamux.py` is the reference: the same events, frames and bounds.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::frame::{Header, Kind, ACK, FIN, HEADER_BYTES, RST, SYN};
use super::output::Output;
use super::stream::Stream;
use super::window::{Budget, EXTRA_WINDOWS, INITIAL_WINDOW, MAX_WINDOW};
use super::Error;

/// As many calls in flight as a peer may have, and its streams.
pub const MAX_INBOUND_STREAMS: usize = 4096 + 1024;
/// Streams that we closed and the other side did not; the oldest is reset.
const MAX_LINGERING: usize = 4096;
/// Of one connection; beyond it the fullest stream is reset.
const MAX_UNREAD_BYTES: usize = 64 * 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Opened(u32),
    /// Bytes came where none waited.
    Readable(u32),
    Ended(u32),
    Reset {
        stream: u32,
        by_us: bool,
    },
    Writable(u32),
    WentAway(u32),
    /// Microseconds.
    Pong(u64),
}

pub struct Yamux {
    /// The other side accepts no new streams.
    pub gone: bool,
    /// Seconds, smoothed.
    pub rtt: Option<f64>,
    pub unread_bytes: usize,
    pub inbound_streams: usize,
    pub(super) streams: HashMap<u32, Stream>,
    pub(super) output: Output,
    windows: Arc<Budget>,
    /// What the windows of this connection have grown by.
    extra: u64,
    now: f64,
    least_rtt: Option<f64>,
    next_id: u64,
    /// By the order in which they were closed.
    lingering: BTreeMap<u64, u32>,
    closed: u64,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// The frame whose payload is coming, and how much of it is still to come.
    payload: Header,
    payload_left: usize,
    ping: u32,
    pinged_at: Option<f64>,
}

impl Drop for Yamux {
    fn drop(&mut self) {
        self.windows.give_back(self.extra);
    }
}

impl Yamux {
    pub fn new(initiator: bool, windows: Arc<Budget>) -> Self {
        Yamux {
            gone: false,
            rtt: None,
            unread_bytes: 0,
            inbound_streams: 0,
            streams: HashMap::new(),
            output: Output::default(),
            windows,
            extra: 0,
            now: 0.0,
            least_rtt: None,
            next_id: if initiator { 1 } else { 2 },
            lingering: BTreeMap::new(),
            closed: 0,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            payload: Header::new(Kind::Data, 0, 0, 0),
            payload_left: 0,
            ping: 0,
            pinged_at: None,
        }
    }

    pub fn output_bytes(&self) -> usize {
        self.output.bytes
    }

    fn is_ours(&self, id: u32) -> bool {
        u64::from(id) % 2 == self.next_id % 2
    }

    // What we do

    pub fn open(&mut self) -> Result<u32, Error> {
        if self.gone {
            return Err(Error::Stream("the peer accepts no new streams on this connection"));
        }
        let Ok(id) = u32::try_from(self.next_id) else {
            return Err(Error::Stream(
                "this connection has used up its stream ids; connect again",
            ));
        };
        self.next_id += 2;
        self.streams.insert(id, Stream::new(self.now));
        self.output.control(Kind::WindowUpdate, SYN, id, 0);
        Ok(id)
    }

    pub fn reset(&mut self, id: u32) {
        if self.forget(id) {
            self.output.control(Kind::WindowUpdate, RST, id, 0);
        }
    }

    pub fn available(&self, id: u32) -> usize {
        self.streams.get(&id).map_or(0, |stream| stream.unread.len())
    }

    /// Hands what has arrived, up to `max_bytes`, to `take`, which must use all of it.
    pub fn read<T>(&mut self, id: u32, max_bytes: usize, take: impl FnOnce(&[u8]) -> T) -> T {
        let Some(stream) = self.streams.get_mut(&id) else {
            return take(&[]);
        };
        let data = stream.unread.front(max_bytes);
        let size = data.len();
        let taken = take(data);
        if size > 0 {
            stream.unread.skip(size);
            self.unread_bytes -= size;
            if stream.ended_there {
                self.linger_or_forget(id);
            } else {
                let credit = stream.window.credit(stream.unread.len() as u64);
                if credit > 0 {
                    self.output.credit(id, stream, credit);
                }
            }
        }
        taken
    }

    /// Nobody will read this stream any more.
    pub fn discard(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.unwanted = true;
            self.unread_bytes -= stream.unread.len();
            stream.unread.skip(usize::MAX);
            self.linger_or_forget(id);
        }
    }

    pub fn ping(&mut self, now: f64) {
        if self.pinged_at.is_none() {
            self.ping = self.ping.wrapping_add(1);
            self.pinged_at = Some(now);
            self.output.control(Kind::Ping, SYN, 0, self.ping);
        }
    }

    pub fn go_away(&mut self, code: u32) {
        self.output.control(Kind::GoAway, 0, 0, code);
    }

    // What the other side does

    /// Takes plaintext that arrived; every whole frame before one that fails has counted.
    pub fn receive(&mut self, mut data: &[u8], now: f64, events: &mut Vec<Event>) -> Result<(), Error> {
        self.now = now;
        while !data.is_empty() {
            if self.payload_left > 0 {
                let (piece, rest) = data.split_at(data.len().min(self.payload_left));
                self.payload_left -= piece.len();
                self.deliver(piece, events)?;
                data = rest;
                continue;
            }
            let missing = HEADER_BYTES - self.header_bytes;
            let (piece, rest) = data.split_at(data.len().min(missing));
            self.header[self.header_bytes..][..piece.len()].copy_from_slice(piece);
            self.header_bytes += piece.len();
            data = rest;
            if self.header_bytes == HEADER_BYTES {
                self.header_bytes = 0;
                self.frame(events)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        let header = Header::decode(&self.header).map_err(|(version, kind, flags)| {
            Error::Remote(format!(
                "not a yamux frame: version {version}, type {kind}, flags {flags}"
            ))
        })?;
        let id = header.stream;
        match header.kind {
            Kind::Ping => return self.pinged(header, events),
            Kind::GoAway => {
                self.gone = true;
                events.push(Event::WentAway(header.length));
                return Ok(());
            }
            _ if id == 0 => {
                return Err(Error::Remote(
                    "a yamux frame for stream 0, which is the connection's own".into(),
                ))
            }
            _ => (),
        }
        if header.flags & SYN != 0 {
            self.opened(id, events)?;
        }
        if header.kind == Kind::Data {
            self.announce(id, header.length)?;
            if header.length > 0 {
                self.payload = header;
                self.payload_left = header.length as usize;
                return Ok(());
            }
        } else if header.length > 0 {
            if let Some(stream) = self.streams.get_mut(&id) {
                let window = stream.send_window + u64::from(header.length);
                if window > u64::from(u32::MAX) {
                    return Err(Error::Remote("a yamux window of more than 2^32 bytes".into()));
                }
                stream.send_window = window;
                if self.output.unblock(stream) {
                    events.push(Event::Writable(id));
                }
            }
        }
        self.finish(header, events);
        Ok(())
    }

    fn pinged(&mut self, header: Header, events: &mut Vec<Event>) -> Result<(), Error> {
        if header.flags & SYN != 0 {
            return self.output.reply(Kind::Ping, ACK, 0, header.length);
        }
        if let Some(at) = self
            .pinged_at
            .filter(|_| header.flags & ACK != 0 && header.length == self.ping)
        {
            let took = (self.now - at).max(0.0);
            self.pinged_at = None;
            // As TCP smooths it.
            self.rtt = Some(self.rtt.map_or(took, |rtt| 0.875 * rtt + 0.125 * took));
            self.least_rtt = Some(self.least_rtt.map_or(took, |least| least.min(took)));
            events.push(Event::Pong((took * 1e6) as u64));
        }
        Ok(())
    }

    fn opened(&mut self, id: u32, events: &mut Vec<Event>) -> Result<(), Error> {
        if self.is_ours(id) {
            return Err(Error::Remote(format!(
                "the peer opened yamux stream {id}, whose parity is ours"
            )));
        }
        if self.streams.contains_key(&id) {
            return Err(Error::Remote(format!("the peer opened yamux stream {id} twice")));
        }
        if self.inbound_streams >= MAX_INBOUND_STREAMS {
            return self.output.reply(Kind::WindowUpdate, RST, id, 0);
        }
        self.output.reply(Kind::WindowUpdate, ACK, id, 0)?;
        self.inbound_streams += 1;
        self.streams.insert(id, Stream::new(self.now));
        events.push(Event::Opened(id));
        Ok(())
    }

    /// A frame of `length` bytes follows.
    fn announce(&mut self, id: u32, length: u32) -> Result<(), Error> {
        let size = u64::from(length);
        let Some(stream) = self.streams.get_mut(&id) else {
            if size > MAX_WINDOW {
                // Of a stream that we have forgotten.
                return Err(Error::Remote(format!(
                    "a yamux frame of {length} bytes, more than any window"
                )));
            }
            return Ok(());
        };
        if size == 0 {
            return Ok(());
        }
        if stream.ended_there {
            return Err(Error::Remote(format!(
                "{length} bytes on a yamux stream that the peer had ended"
            )));
        }
        let window = &mut stream.window;
        if size > window.left {
            return Err(Error::Remote(format!(
                "{length} bytes on a yamux stream whose window has {} left",
                window.left
            )));
        }
        window.left -= size;
        if window.wants_growth(self.now, self.least_rtt) {
            let most = window.size.min(MAX_WINDOW - window.size);
            let growth = self.windows.take(most.min(EXTRA_WINDOWS - self.extra));
            if growth > 0 {
                self.extra += growth;
                window.grow(growth);
                self.output.credit(id, stream, growth);
            }
        }
        Ok(())
    }

    fn deliver(&mut self, data: &[u8], events: &mut Vec<Event>) -> Result<(), Error> {
        let id = self.payload.stream;
        if let Some(stream) = self.streams.get_mut(&id) {
            if !stream.unwanted {
                if stream.unread.is_empty() {
                    events.push(Event::Readable(id));
                }
                stream.unread.push(&data, data.len());
                self.unread_bytes += data.len();
                if self.unread_bytes > MAX_UNREAD_BYTES {
                    self.reset_fullest(events)?;
                }
            } else if stream.window.left == 0 && self.payload_left == 0 {
                self.reset(id); // it waits for credit that never comes
            }
        }
        if self.payload_left == 0 {
            self.finish(self.payload, events);
        }
        Ok(())
    }

    /// The connection lives, and its other streams; whoever wrote to this one sees that it broke.
    fn reset_fullest(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        let fullest = self
            .streams
            .iter()
            .map(|(id, stream)| (stream.unread.len(), std::cmp::Reverse(*id)))
            .max();
        let Some((_, std::cmp::Reverse(id))) = fullest else {
            return Ok(());
        };
        self.forget(id);
        self.output.reply(Kind::WindowUpdate, RST, id, 0)?;
        events.push(Event::Reset {
            stream: id,
            by_us: true,
        });
        Ok(())
    }

    /// FIN and RST count after the frame's own payload.
    fn finish(&mut self, header: Header, events: &mut Vec<Event>) {
        let id = header.stream;
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if header.flags & RST != 0 {
            self.forget(id);
            events.push(Event::Reset {
                stream: id,
                by_us: false,
            });
        } else if header.flags & FIN != 0 && !stream.ended_there {
            stream.ended_there = true;
            events.push(Event::Ended(id));
            self.linger_or_forget(id);
        }
    }

    // The end of streams

    pub(super) fn linger_or_forget(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.ended_here {
            return;
        }
        if stream.ended_there && stream.unread.is_empty() {
            self.forget(id);
        } else if stream.unwanted && stream.lingering.is_none() {
            stream.lingering = Some(self.closed);
            self.lingering.insert(self.closed, id);
            self.closed += 1;
            if self.lingering.len() > MAX_LINGERING {
                if let Some((_, oldest)) = self.lingering.first_key_value() {
                    self.reset(*oldest);
                }
            }
        }
    }

    /// Whether there was such a stream.
    fn forget(&mut self, id: u32) -> bool {
        let Some(stream) = self.streams.remove(&id) else {
            return false;
        };
        if let Some(place) = stream.lingering {
            self.lingering.remove(&place);
        }
        self.unread_bytes -= stream.unread.len();
        let output = &mut self.output;
        output.queued -= stream.queued.len();
        output.senders -= usize::from(stream.waiting);
        let frames = usize::from(stream.ending && !stream.ended_here) + usize::from(stream.credit > 0);
        output.bytes -= stream.queued.len() + HEADER_BYTES * frames;
        let growth = stream.window.size - INITIAL_WINDOW;
        self.extra -= growth;
        self.windows.give_back(growth);
        if !self.is_ours(id) {
            self.inbound_streams -= 1;
        }
        true
    }
}
