// What the tests say and hear: requests, replies and events, one JSON object a line.
import readline from 'node:readline'

/** Reports something that nobody asked for. */
export function emit (event, fields) {
  write({ event, ...fields })
}

/** Obeys requests, many at once, until stdin ends. */
export async function obey (commands) {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    answer(commands, JSON.parse(line))
  }
}

async function answer (commands, { id, do: name, ...argument }) {
  try {
    if (!Object.hasOwn(commands, name)) throw new Error(`unknown command "${name}"`)
    write({ id, result: (await commands[name](argument)) ?? {} })
  } catch (error) {
    const cause = error instanceof Error ? error : error.error ?? new Error(error.type) // p-event throws events
    write({ id, error: `${cause.name}: ${cause.message}` })
  }
}

function write (line) {
  process.stdout.write(JSON.stringify(line) + '\n')
}
