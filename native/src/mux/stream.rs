//! One stream's state.

use super::queue::ByteQueue;
use super::window::{ReceiveWindow, INITIAL_WINDOW};

#[derive(Debug)]
pub struct Stream {
    pub window: ReceiveWindow,
    pub send_window: u64,
    pub unread: ByteQueue,
    pub queued: ByteQueue,
    /// Granted, in a window update that waits to be sent.
    pub credit: u64,
    /// For its turn to send.
    pub waiting: bool,
    /// A sender got less than it asked for.
    pub blocked: bool,
    /// Ended by this side, once `queued` has left.
    pub ending: bool,
    pub ended_here: bool,
    pub ended_there: bool,
    /// Nobody reads any more: what arrives is dropped.
    pub unwanted: bool,
    /// Its place among the streams that only the other side keeps.
    pub lingering: Option<u64>,
}

impl Stream {
    pub fn new(now: f64) -> Self {
        Stream {
            window: ReceiveWindow::new(now),
            send_window: INITIAL_WINDOW,
            unread: ByteQueue::default(),
            queued: ByteQueue::default(),
            credit: 0,
            waiting: false,
            blocked: false,
            ending: false,
            ended_here: false,
            ended_there: false,
            unwanted: false,
            lingering: None,
        }
    }
}
