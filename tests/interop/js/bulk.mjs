// Many bytes through one stream: the serving ends, and the asking ends, which report SHA-256 sums.
import { createHash } from 'node:crypto'
import { Inbox, send } from './inbox.mjs'

// Repeats in what bulk commands send; its length is a prime, so that a lost or doubled chunk shows.
const PATTERN = Uint8Array.from({ length: 65_521 }, (_, i) => i * 167 + (i >> 8))

export async function serveEcho (stream) {
  for await (const chunk of new Inbox(stream)) await send(stream, chunk)
  await stream.close()
}

/** Answers with the SHA-256 of everything that it has read to the end. */
export async function serveSink (stream) {
  const { sum } = await sumToEnd(new Inbox(stream))
  await send(stream, sum)
  await stream.close()
}

/** Answers a big-endian 64-bit number with as many bytes of the pattern. */
export async function serveSource (stream) {
  const size = await new Inbox(stream).read(8)
  await sendPattern(stream, Number(size.readBigUInt64BE()))
}

export async function echo (stream, size) {
  const start = performance.now()
  const [sent, { sum, bytes }] = await Promise.all([sendPattern(stream, size), sumToEnd(new Inbox(stream))])
  return { sent: hex(sent), received: hex(sum), bytes, seconds: (performance.now() - start) / 1000 }
}

export async function sink (stream, size) {
  const inbox = new Inbox(stream)
  const sent = await sendPattern(stream, size)
  return { sent: hex(sent), received: hex(await inbox.read(32)) }
}

export async function source (stream, size) {
  const inbox = new Inbox(stream)
  const wanted = Buffer.alloc(8)
  wanted.writeBigUInt64BE(BigInt(size))
  await send(stream, wanted)
  const { sum, bytes } = await sumToEnd(inbox)
  return { received: hex(sum), bytes }
}

/** Sends `size` bytes of the pattern and ends the direction; returns their SHA-256. */
async function sendPattern (stream, size) {
  const sum = createHash('sha256')
  for (let left = size; left > 0;) {
    const chunk = PATTERN.subarray(0, left)
    left -= chunk.length
    sum.update(chunk)
    await send(stream, chunk)
  }
  await stream.close()
  return sum.digest()
}

async function sumToEnd (inbox) {
  const sum = createHash('sha256')
  let bytes = 0
  for await (const chunk of inbox) {
    sum.update(chunk)
    bytes += chunk.length
  }
  return { sum: sum.digest(), bytes }
}

const hex = bytes => Buffer.from(bytes).toString('hex')
