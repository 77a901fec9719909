// A small js-libp2p peer that the tests drive over stdin and stdout; see ../README.md for what it says and obeys.
import './node20.mjs'
import { noise } from '@libp2p/noise'
import { identify, identifyPush } from '@libp2p/identify'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import * as bulk from './bulk.mjs'
import { emit, obey } from './driver.mjs'
import { Inbox, send } from './inbox.mjs'

const ECHO = '/interop/echo/1.0.0'
const SINK = '/interop/sink/1.0.0'
const SOURCE = '/interop/source/1.0.0'
const HOLD = '/interop/hold/1.0.0'

// Come as one JSON object, the only argument. What is left out is js-libp2p's default.
const options = JSON.parse(process.argv[2])
const RAISED = { maxInboundStreams: 2048, maxOutboundStreams: 2048 }
const limits = options.raised_limits ? RAISED : {}

const node = await createLibp2p({
  addresses: { listen: options.listen },
  nodeInfo: { userAgent: 'js-libp2p interop' },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux(limits)],
  services: { identify: identify(), identifyPush: identifyPush(), ping: ping() }
})

// Streams that the tests move by hand, by number.
const held = new Map()

function hold (stream) {
  const number = held.size + 1
  held.set(number, { stream, inbox: new Inbox(stream) })
  return number
}

function get (number) {
  const found = held.get(number)
  if (found == null) throw new Error(`no stream ${number}`)
  return found
}

const take = (stream, connection) => {
  emit('stream', { stream: hold(stream), peer: connection.remotePeer })
}

/** A handler whose failure resets its stream: all that the other side has to know. */
const resetting = act => async stream => {
  try {
    await act(stream)
  } catch (error) {
    stream.abort(error)
  }
}

await node.handle(ECHO, resetting(bulk.serveEcho), limits)
await node.handle(SINK, resetting(bulk.serveSink), limits)
await node.handle(SOURCE, resetting(bulk.serveSource), limits)
await node.handle(HOLD, take, limits)

const open = (peer, protocol) => node.dialProtocol(peerIdFromString(peer), protocol, limits)

const commands = {
  async dial ({ address }) {
    return { peer: (await node.dial(multiaddr(address))).remotePeer }
  },
  'hang up': ({ peer }) => node.hangUp(peerIdFromString(peer)),
  async ping ({ peer }) {
    return { seconds: (await node.services.ping.ping(peerIdFromString(peer))) / 1000 }
  },
  async protocols ({ peer }) {
    return { protocols: (await node.peerStore.get(peerIdFromString(peer))).protocols }
  },
  async 'ping muxer' ({ peer }) {
    const [connection] = node.getConnections(peerIdFromString(peer))
    return { seconds: (await connection.muxer.ping()) / 1000 }
  },
  serve: ({ protocol }) => node.handle(protocol, resetting(bulk.serveEcho), limits),

  open: async ({ peer, protocol }) => ({ stream: hold(await open(peer, protocol)) }),
  write: ({ stream, text }) => send(get(stream).stream, Buffer.from(text)),
  async read ({ stream, bytes }) {
    const data = await get(stream).inbox.read(bytes)
    return { text: data.toString(), ended: data.length < bytes }
  },
  end: ({ stream }) => get(stream).stream.close(),
  reset ({ stream }) {
    get(stream).stream.abort(new Error('the test asked for it'))
  },

  echo: async ({ peer, bytes }) => bulk.echo(await open(peer, ECHO), bytes),
  sink: async ({ peer, bytes }) => bulk.sink(await open(peer, SINK), bytes),
  source: async ({ peer, bytes }) => bulk.source(await open(peer, SOURCE), bytes)
}

node.addEventListener('connection:open', ({ detail: connection }) => {
  emit('connected', {
    peer: connection.remotePeer,
    address: connection.remoteAddr,
    outbound: connection.direction === 'outbound'
  })
})
node.addEventListener('connection:close', ({ detail: connection }) => {
  emit('disconnected', { peer: connection.remotePeer })
})
node.addEventListener('peer:identify', ({ detail }) => {
  emit('identified', {
    peer: detail.peerId,
    agent: detail.agentVersion,
    protocols: detail.protocols,
    addresses: detail.listenAddrs,
    observed: detail.observedAddr
  })
})

emit('ready', { peer: node.peerId, addresses: node.getMultiaddrs() })
await obey(commands)
process.exit() // node.stop() would wait a second for nothing
