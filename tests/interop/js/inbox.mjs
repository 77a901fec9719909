// js-libp2p pushes a stream's bytes as events; this lets them be pulled.
import { StreamResetError } from '@libp2p/interface'

/** The bytes of a stream in order, then its end or the error that broke it. */
export class Inbox {
  #chunks = []
  #ended = false
  #error
  #wake = () => {}

  constructor (stream) {
    stream.addEventListener('message', event => {
      this.#chunks.push(event.data.subarray()) // a list of arrays becomes one
      this.#wake()
    })
    stream.addEventListener('end', () => this.#finish())
    stream.addEventListener('close', event => this.#finish(event.error))
    // What happened before anybody listened. Bytes behind a negotiation are put back after 'end' and come in a microtask.
    if (stream.status === 'reset') this.#finish(new StreamResetError())
    if (stream.readableEnded) queueMicrotask(() => this.#finish())
  }

  #finish (error) {
    this.#ended = true
    this.#error ??= error
    this.#wake()
  }

  /** The next bytes, as many as came together; null at the end. */
  async next () {
    while (this.#chunks.length === 0) {
      if (this.#error != null) throw this.#error
      if (this.#ended) return null
      await new Promise(resolve => { this.#wake = resolve })
    }
    return this.#chunks.shift()
  }

  /** `size` bytes, fewer only at the end. */
  async read (size) {
    const parts = []
    let missing = size
    while (missing > 0) {
      const chunk = await this.next()
      if (chunk == null) break
      if (chunk.length > missing) this.#chunks.unshift(chunk.subarray(missing))
      parts.push(chunk.subarray(0, missing))
      missing -= parts.at(-1).length
    }
    return Buffer.concat(parts)
  }

  async * [Symbol.asyncIterator] () {
    for (let chunk = await this.next(); chunk != null; chunk = await this.next()) yield chunk
  }
}

/** Sends bytes, and waits while the stream has too many. */
export async function send (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}
