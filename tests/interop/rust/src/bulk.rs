//! Many bytes through one stream: the serving ends, and the asking ends, which report SHA-256 sums.
//!
//! A stream that is dropped before it has ended is reset.

use std::{io, time::Instant};

use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use libp2p::Stream;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const CHUNK_BYTES: usize = 64 << 10;

/// Repeats in what bulk commands send; a prime, so that a lost or doubled chunk shows.
const PATTERN_BYTES: usize = 65_521;

fn pattern() -> Vec<u8> {
    (0..PATTERN_BYTES).map(|i| (i * 167 + (i >> 8)) as u8).collect()
}

pub async fn serve_echo(stream: Stream) -> io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match reader.read(&mut chunk).await? {
            0 => return writer.close().await,
            n => {
                writer.write_all(&chunk[..n]).await?;
                writer.flush().await?;
            }
        }
    }
}

/// Answers with the SHA-256 of everything that it has read to the end.
pub async fn serve_sink(mut stream: Stream) -> io::Result<()> {
    let (sum, _) = sum_to_end(&mut stream).await?;
    stream.write_all(&sum).await?;
    stream.close().await
}

/// Answers a big-endian 64-bit number with as many bytes of the pattern.
pub async fn serve_source(mut stream: Stream) -> io::Result<()> {
    let mut size = [0; 8];
    stream.read_exact(&mut size).await?;
    send_pattern(&mut stream, u64::from_be_bytes(size) as usize).await?;
    Ok(())
}

pub async fn echo(stream: Stream, size: usize) -> io::Result<Value> {
    let start = Instant::now();
    let (mut reader, mut writer) = stream.split();
    let (sent, (received, bytes)) = futures::try_join!(send_pattern(&mut writer, size), sum_to_end(&mut reader))?;
    Ok(json!({
        "sent": hex::encode(sent),
        "received": hex::encode(received),
        "bytes": bytes,
        "seconds": start.elapsed().as_secs_f64(),
    }))
}

pub async fn sink(mut stream: Stream, size: usize) -> io::Result<Value> {
    let sent = send_pattern(&mut stream, size).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(json!({"sent": hex::encode(sent), "received": hex::encode(answer)}))
}

pub async fn source(mut stream: Stream, size: usize) -> io::Result<Value> {
    stream.write_all(&(size as u64).to_be_bytes()).await?;
    stream.flush().await?;
    let (received, bytes) = sum_to_end(&mut stream).await?;
    Ok(json!({"received": hex::encode(received), "bytes": bytes}))
}

/// Sends `size` bytes of the pattern and ends the direction; returns their SHA-256.
async fn send_pattern(to: &mut (impl AsyncWrite + Unpin), size: usize) -> io::Result<Vec<u8>> {
    let pattern = pattern();
    let mut sum = Sha256::new();
    let mut left = size;
    while left > 0 {
        let chunk = &pattern[..left.min(pattern.len())];
        sum.update(chunk);
        to.write_all(chunk).await?;
        left -= chunk.len();
    }
    to.close().await?;
    Ok(sum.finalize().to_vec())
}

/// The SHA-256 and the number of the bytes until the other side's end.
async fn sum_to_end(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(Vec<u8>, usize)> {
    let mut sum = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        match from.read(&mut chunk).await? {
            0 => return Ok((sum.finalize().to_vec(), bytes)),
            n => {
                sum.update(&chunk[..n]);
                bytes += n;
            }
        }
    }
}
