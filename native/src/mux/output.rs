//! What waits to be sent, and whose turn it is: control frames first, then streams that have little to send, then one
//! frame of each other stream after the other.

use std::collections::VecDeque;

use super::frame::{Header, Kind, FIN, HEADER_BYTES};
use super::queue::Source;
use super::record::MAX_PLAINTEXT_BYTES;
use super::stream::Stream;
use super::yamux::Yamux;
use super::Error;

const KIB: usize = 1024;
/// Header and payload fill one record.
const MAX_DATA_BYTES: usize = MAX_PLAINTEXT_BYTES - HEADER_BYTES;
/// A stream that has no more than this to send goes before those that have: a small call does not wait for bulk.
const SHORT_BYTES: usize = 16 * KIB;
/// What such streams may send in a row while others wait.
const OVERTAKING_BYTES: usize = 64 * KIB;
/// A frame is not cut smaller than this to fill up a record.
const MIN_CUT_BYTES: usize = 4 * KIB;
/// Of one stream, waiting to be sent; while more than CROWDED_BYTES wait on the connection its share of them, and
/// CROWDED_QUEUE_BYTES at least.
const QUEUE_BYTES: usize = 256 * KIB;
const CROWDED_BYTES: usize = 4096 * KIB;
const CROWDED_QUEUE_BYTES: usize = 16 * KIB;
/// Pongs and resets that a peer makes us queue without reading them.
const MAX_REPLY_BYTES: usize = 1024 * KIB;

pub enum Control {
    Frame {
        header: Header,
        is_reply: bool,
    },
    /// A window update of what the stream then has to its credit.
    Credit(u32),
}

#[derive(Default)]
pub struct Output {
    control: VecDeque<Control>,
    /// Of the control frames.
    replies: usize,
    /// Streams that wait to send; those that were forgotten are skipped.
    turns: VecDeque<u32>,
    /// Those of them that had little to send when they came.
    short: VecDeque<u32>,
    /// What they sent since one of the others did.
    overtook: usize,
    pub senders: usize,
    pub queued: usize,
    /// Streams that sent since the last `take_writable`.
    served: Vec<u32>,
    /// Payloads and frames that wait, without the headers of data frames.
    pub bytes: usize,
}

impl Output {
    pub fn control(&mut self, kind: Kind, flags: u16, stream: u32, length: u32) {
        self.put(Header::new(kind, flags, stream, length), false);
    }

    fn put(&mut self, header: Header, is_reply: bool) {
        self.control.push_back(Control::Frame { header, is_reply });
        self.bytes += HEADER_BYTES;
    }

    /// Queues a frame that the other side made us send.
    pub fn reply(&mut self, kind: Kind, flags: u16, stream: u32, length: u32) -> Result<(), Error> {
        if self.replies * HEADER_BYTES >= MAX_REPLY_BYTES {
            return Err(Error::Remote("the peer sends without reading the replies".into()));
        }
        self.replies += 1;
        self.put(Header::new(kind, flags, stream, length), true);
        Ok(())
    }

    /// One update at a time waits for each stream, so a peer that doesn't read can't pile them up. A peer that uses
    /// credit which it was not told yet could let it add up beyond what a frame says.
    pub fn credit(&mut self, id: u32, stream: &mut Stream, credit: u64) {
        if stream.credit == 0 {
            self.control.push_back(Control::Credit(id));
            self.bytes += HEADER_BYTES;
        }
        stream.credit = (stream.credit + credit).min(u64::from(u32::MAX));
    }

    pub fn wait_for_turn(&mut self, id: u32, stream: &mut Stream) {
        if !stream.waiting {
            stream.waiting = true;
            self.senders += 1;
            if stream.queued.len() <= SHORT_BYTES {
                self.short.push_back(id);
            } else {
                self.turns.push_back(id);
            }
        }
    }

    fn favours_short(&self) -> bool {
        !self.short.is_empty() && (self.turns.is_empty() || self.overtook < OVERTAKING_BYTES)
    }

    fn queue_limit(&self) -> usize {
        if self.queued <= CROWDED_BYTES {
            return QUEUE_BYTES;
        }
        (CROWDED_BYTES / self.senders.max(1)).clamp(CROWDED_QUEUE_BYTES, QUEUE_BYTES)
    }

    fn room(&self, stream: &Stream) -> usize {
        let room = self.queue_limit().saturating_sub(stream.queued.len());
        usize::try_from(stream.send_window).map_or(room, |window| room.min(window))
    }

    /// Whether a refused sender should try again: when it pays, and the link never waits for it. Alone that is when half
    /// its queue is free; while others have plenty to send, when all of it is.
    pub fn unblock(&self, stream: &mut Stream) -> bool {
        let enough = if self.queued > CROWDED_BYTES {
            0
        } else {
            QUEUE_BYTES / 2
        };
        let again = stream.blocked && stream.send_window > 0 && stream.queued.len() <= enough;
        stream.blocked &= !again;
        again
    }

    fn queue(&mut self, id: u32, stream: &mut Stream, source: &impl Source, size: usize) {
        stream.queued.push(source, size);
        stream.send_window -= size as u64;
        self.queued += size;
        self.bytes += size;
        self.wait_for_turn(id, stream);
    }
}

impl Yamux {
    /// Queues as much as window and queue take now.
    pub fn send(&mut self, id: u32, data: &impl Source) -> Result<usize, Error> {
        let (stream, output) = self.writable(id)?;
        let size = data.len().min(output.room(stream));
        if size > 0 {
            output.queue(id, stream, data, size);
        }
        stream.blocked = size < data.len();
        Ok(size)
    }

    pub fn send_all_or_nothing<S: Source>(&mut self, id: u32, parts: &[S]) -> Result<bool, Error> {
        let (stream, output) = self.writable(id)?;
        let size = parts
            .iter()
            .fold(0, |size: usize, part| size.saturating_add(part.len()));
        if size > output.room(stream) {
            return Ok(false);
        }
        for part in parts.iter().filter(|part| !part.is_empty()) {
            output.queue(id, stream, part, part.len());
        }
        Ok(true)
    }

    pub fn end(&mut self, id: u32) -> Result<(), Error> {
        let (stream, output) = self.writable(id)?;
        stream.ending = true;
        stream.blocked = false;
        output.bytes += HEADER_BYTES;
        output.wait_for_turn(id, stream);
        Ok(())
    }

    fn writable(&mut self, id: u32) -> Result<(&mut Stream, &mut Output), Error> {
        match self.streams.get_mut(&id) {
            None => Err(Error::Stream("the stream is closed")),
            Some(stream) if stream.ending => Err(Error::Local(
                "the stream was ended by this side: nothing can be sent any more",
            )),
            Some(stream) => Ok((stream, &mut self.output)),
        }
    }

    /// Appends whole frames of at most `room` bytes together, taken from the queues; none when nothing waits.
    pub fn fill_record(&mut self, record: &mut Vec<u8>, mut room: usize) {
        while room >= HEADER_BYTES {
            let header = match self.output.control.pop_front() {
                None => break,
                Some(Control::Frame { header, is_reply }) => {
                    self.output.replies -= usize::from(is_reply);
                    header
                }
                Some(Control::Credit(id)) => match self.streams.get_mut(&id) {
                    Some(stream) if stream.credit > 0 => {
                        Header::new(Kind::WindowUpdate, 0, id, std::mem::take(&mut stream.credit) as u32)
                    }
                    _ => continue,
                },
            };
            record.extend_from_slice(&header.encode());
            room -= HEADER_BYTES;
            self.output.bytes -= HEADER_BYTES;
        }
        while room >= HEADER_BYTES {
            let output = &mut self.output;
            let is_short = output.favours_short();
            let turns = if is_short { &mut output.short } else { &mut output.turns };
            let Some(&id) = turns.front() else { break };
            let stream = match self.streams.get_mut(&id) {
                Some(stream) if stream.waiting => stream,
                _ => {
                    turns.pop_front();
                    continue;
                }
            };
            if is_short && stream.queued.len() > SHORT_BYTES {
                turns.pop_front();
                output.turns.push_back(id); // it has more to send by now
                continue;
            }
            let mut size = stream.queued.len().min(MAX_DATA_BYTES);
            if size > 0 {
                let fits = room - HEADER_BYTES;
                if fits < size.min(MIN_CUT_BYTES) {
                    break;
                }
                size = size.min(fits);
                room = fits - size;
                record.extend_from_slice(&Header::new(Kind::Data, 0, id, size as u32).encode());
                record.extend_from_slice(stream.queued.front(size));
                stream.queued.skip(size);
                output.queued -= size;
                output.bytes -= size;
                output.served.push(id);
            }
            if !is_short {
                output.turns.pop_front();
                output.overtook = 0;
            } else {
                output.short.pop_front();
                if !output.turns.is_empty() {
                    output.overtook += HEADER_BYTES + size;
                }
            }
            output.senders -= 1;
            stream.waiting = false;
            if stream.ending && stream.queued.is_empty() && room >= HEADER_BYTES {
                record.extend_from_slice(&Header::new(Kind::WindowUpdate, FIN, id, 0).encode());
                room -= HEADER_BYTES;
                output.bytes -= HEADER_BYTES;
                stream.ended_here = true;
                self.linger_or_forget(id);
            } else if stream.ending || !stream.queued.is_empty() {
                output.wait_for_turn(id, stream);
            }
        }
    }

    /// Streams whose senders have room again since the last call, in the order of their ids.
    pub fn take_writable(&mut self) -> Vec<u32> {
        let mut served = std::mem::take(&mut self.output.served);
        served.sort_unstable();
        served.dedup();
        let (streams, output) = (&mut self.streams, &self.output);
        served.retain(|id| streams.get_mut(id).is_some_and(|stream| output.unblock(stream)));
        served
    }
}
