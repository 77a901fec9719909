//! Streams that the tests move by hand, by number.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use futures::{
    AsyncReadExt as _, AsyncWriteExt as _,
    io::{ReadHalf, WriteHalf},
};
use libp2p::Stream;
use serde_json::json;

use crate::driver::Outcome;

/// Reading and writing may wait at the same time, each on its half.
struct Halves {
    reader: futures::lock::Mutex<ReadHalf<Stream>>,
    writer: futures::lock::Mutex<WriteHalf<Stream>>,
}

#[derive(Clone, Default)]
pub struct Held(Arc<Mutex<HashMap<u64, Arc<Halves>>>>);

impl Held {
    pub fn add(&self, stream: Stream) -> u64 {
        let (reader, writer) = stream.split();
        let mut streams = self.0.lock().expect("nobody panics with the lock");
        let number = streams.keys().max().map_or(1, |last| last + 1);
        streams.insert(
            number,
            Arc::new(Halves {
                reader: reader.into(),
                writer: writer.into(),
            }),
        );
        number
    }

    fn get(&self, number: u64) -> Result<Arc<Halves>, String> {
        let streams = self.0.lock().expect("nobody panics with the lock");
        streams.get(&number).cloned().ok_or(format!("no stream {number}"))
    }

    pub async fn write(&self, number: u64, text: &str) -> Outcome {
        let halves = self.get(number)?;
        let mut writer = halves.writer.lock().await;
        writer
            .write_all(text.as_bytes())
            .await
            .map_err(|error| error.to_string())?;
        writer.flush().await.map_err(|error| error.to_string())?;
        Ok(json!({}))
    }

    /// Reads until `bytes` have come or the other side has ended.
    pub async fn read(&self, number: u64, bytes: usize) -> Outcome {
        let halves = self.get(number)?;
        let mut data = Vec::new();
        let mut reader = halves.reader.lock().await;
        (&mut *reader)
            .take(bytes as u64)
            .read_to_end(&mut data)
            .await
            .map_err(|error| error.to_string())?;
        Ok(json!({"text": String::from_utf8_lossy(&data), "ended": data.len() < bytes}))
    }

    pub async fn end(&self, number: u64) -> Outcome {
        let halves = self.get(number)?;
        let mut writer = halves.writer.lock().await;
        writer.close().await.map_err(|error| error.to_string())?;
        Ok(json!({}))
    }

    /// Drops the stream, which is how a rust-libp2p stream is reset; a read or write under way keeps it alive.
    pub fn reset(&self, number: u64) -> Outcome {
        let mut streams = self.0.lock().expect("nobody panics with the lock");
        streams
            .remove(&number)
            .map(|_| json!({}))
            .ok_or(format!("no stream {number}"))
    }
}
