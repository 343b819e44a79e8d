/**
 * Real servers on this machine, one per kind of behaviour, for the demo and the tests. As a program
 * (`loopback_cluster.ts ok=127.0.0.1:8766 silent=[::1]:9000 ...`) it runs them until it is killed, for a network namespace
 * that the tests themselves are not in.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { DatabaseSync } from "node:sqlite";
import { gzipSync } from "node:zlib";
import { tempFolder } from "./process.ts";

/** A server that {@linkcode startNode} started. Its disposal ends all that it holds. */
export interface LoopbackNode extends AsyncDisposable {
  readonly hostname: string;
  readonly port: number;
  /** How often a client came: connections, or for a node that answers over HTTP, requests. */
  readonly connections: number;
}

export interface LoopbackNodeOptions {
  /**
   * Any loopback address; all of them with `0.0.0.0`.
   *
   * @default {"127.0.0.1"}
   */
  readonly hostname?: string;
  /**
   * The port, or 0 for any that is free.
   *
   * @default {0}
   */
  readonly port?: number;
  /**
   * The rows of `/db`, and the `game_count` of `/status`.
   *
   * @default {12}
   */
  readonly games?: number;
  /**
   * Where `redirect` leads.
   *
   * @default {"/elsewhere"}
   */
  readonly target?: string;
}

/** What a node says on one connection, which is closed when it returns. */
export type Conversation = (conn: Deno.TcpConn, signal: AbortSignal) => Promise<unknown>;

type Answer = (request: Request, options: Required<LoopbackNodeOptions>) => Response | Promise<Response>;

const JSON_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
const MIB = 1024 * 1024;

const ANSWERS = {
  ok: async ({ url }, { games }) => {
    switch (new URL(url).pathname) {
      case "/status":
        return Response.json({ version: "1.4.2", game_count: games });
      case "/db":
        return new Response(await database(games), { headers: { "content-type": "application/vnd.sqlite3" } });
      case "/models":
        return Response.json({ models: [{ name: "square8_2p.pth", bytes: 4096 }] });
      default:
        return new Response("not found", { status: 404 });
    }
  },
  "http-500": () => new Response("out of order", { status: 500 }),
  "not-json": () => new Response("<h1>It works!</h1>", { headers: { "content-type": "text/html" } }),
  "json-array": () => Response.json([{ version: "1.4.2" }]),
  redirect: (_request, { target }) => new Response(null, { status: 302, headers: { location: target } }),
  "too-large": () => new Response(jsonOfSize(MIB + 1), { headers: { "content-type": "application/json" } }),
  gzip: () => {
    const body = gzipSync(new TextEncoder().encode('{"version":"1.4.2"}'));
    return new Response(new Uint8Array(body), { headers: { "content-encoding": "gzip" } });
  },
} satisfies Record<string, Answer>;

const CONVERSATIONS = {
  silent: (conn) => untilClosed(conn),
  closes: () => Promise.resolve(),
  "ssh-banner": async (conn) => {
    await send(conn, "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13\r\n");
    await untilClosed(conn);
  },
  "trickle-head": async (conn, signal) => {
    await send(conn, "HTTP/1.1 200 OK\r\nX-Slow: ");
    for (;; await delay(50, { signal })) await send(conn, "z");
  },
  "trickle-body": async (conn, signal) => {
    await send(conn, `${JSON_HEAD}Content-Length: 100000\r\n\r\n`);
    for (;; await delay(50, { signal })) await send(conn, " ");
  },
  "endless-1xx": async (conn) => {
    for (const answers = "HTTP/1.1 102 Processing\r\n\r\n".repeat(4000);;) await send(conn, answers);
  },
  "endless-body": async (conn) => {
    await send(conn, `${JSON_HEAD}\r\n`);
    for (const spaces = " ".repeat(64 * 1024);;) await send(conn, spaces);
  },
  "length-short": async (conn) => {
    await send(conn, `${JSON_HEAD}Content-Length: 5\r\n\r\n{"version":"1.4.2"}`);
    await untilClosed(conn);
  },
  "length-long": async (conn) => {
    await send(conn, `${JSON_HEAD}Content-Length: 5000\r\n\r\n{"version":"1.4.2"}`);
    await untilClosed(conn);
  },
  reset: async (conn) => {
    // Closing while there is something unread is what makes the system send a reset.
    await conn.read(new Uint8Array(1));
    await send(conn, `${JSON_HEAD}Content-Length: 5000\r\n\r\n{"version":`);
  },
} satisfies Record<string, Conversation>;

/** How a node behaves. `refuses` has no listener; `black-hole` does not even refuse. */
export type Behaviour = keyof typeof ANSWERS | keyof typeof CONVERSATIONS | "refuses" | "black-hole";

/** Starts a node that behaves as told, or that holds a conversation of the test's own. */
export async function startNode(
  behaviour: Behaviour | Conversation,
  options: LoopbackNodeOptions = {},
): Promise<LoopbackNode> {
  const all = { hostname: "127.0.0.1", port: 0, games: 12, target: "/elsewhere", ...options };
  try {
    if (typeof behaviour === "function") return converse(behaviour, all);
    if (behaviour === "refuses") return refuse(all);
    if (behaviour === "black-hole") return await swallow(all);
    if (Object.hasOwn(ANSWERS, behaviour)) return serve(ANSWERS[behaviour as keyof typeof ANSWERS], all);
    return converse(CONVERSATIONS[behaviour as keyof typeof CONVERSATIONS], all);
  } catch (cause) {
    if (!(cause instanceof Deno.errors.AddrInUse)) throw cause;
    throw new Deno.errors.AddrInUse(`Port ${all.port} of ${all.hostname} is in use`, { cause });
  }
}

/** The nodes of config/demo_hosts.yaml. */
export async function startDemoCluster(): Promise<AsyncDisposable> {
  await using starting = new AsyncDisposableStack();
  const start = async (behaviour: Behaviour, port: number, games = 0) => {
    starting.use(await startNode(behaviour, { port, games }));
  };
  await start("ok", 18760, 12840);
  await start("ok", 18761, 3127);
  await start("ok", 18762, 2984);
  await start("refuses", 18763);
  await start("silent", 18764);
  await start("black-hole", 18765);
  await start("http-500", 18766);
  await start("not-json", 18767);
  return starting.move();
}

function serve(answer: Answer, options: Required<LoopbackNodeOptions>): LoopbackNode {
  let connections = 0;
  const { hostname, port } = options;
  const server = Deno.serve({ hostname, port, onListen() {} }, (request) => {
    connections++;
    return answer(request, options);
  });
  return {
    hostname,
    port: server.addr.port,
    get connections() {
      return connections;
    },
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

function converse(conversation: Conversation, options: Required<LoopbackNodeOptions>): LoopbackNode {
  const { hostname, port } = options;
  const listener = Deno.listen({ hostname, port });
  const ended = new AbortController();
  const conns = new Set<Deno.TcpConn>();
  let connections = 0;

  const hold = async (conn: Deno.TcpConn) => {
    connections++;
    conns.add(conn);
    try {
      await conversation(conn, ended.signal);
    } catch (error) {
      if (!ended.signal.aborted && !isDisconnect(error)) throw error;
    } finally {
      // If it is not in the set, the disposal closed it.
      if (conns.delete(conn)) conn.close();
    }
  };
  const listening = (async () => {
    const held = new Set<Promise<void>>();
    for await (const conn of listener) {
      const holding = hold(conn).finally(() => held.delete(holding));
      held.add(holding);
    }
    await Promise.all(held);
  })();
  return {
    hostname,
    port: listener.addr.port,
    get connections() {
      return connections;
    },
    async [Symbol.asyncDispose]() {
      ended.abort();
      listener.close();
      for (const conn of conns) conn.close();
      conns.clear();
      await listening;
    },
  };
}

function refuse({ hostname, port: wanted }: Required<LoopbackNodeOptions>): LoopbackNode {
  const port = wanted || unusedPort(hostname);
  if (wanted) Deno.listen({ hostname, port }).close();
  return { hostname, port, connections: 0, [Symbol.asyncDispose]: () => Promise.resolve() };
}

/**
 * A port on which nothing listens. From the system's own range a connection could be given that very port, and would
 * reach itself. Nor is it one of the demo's.
 */
export function unusedPort(hostname = "127.0.0.1"): number {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 10_000);
    try {
      Deno.listen({ hostname, port }).close();
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

async function swallow({ hostname, port: wanted }: Required<LoopbackNodeOptions>): Promise<LoopbackNode> {
  await using stack = new AsyncDisposableStack();
  const listener = stack.use(Deno.listen({ hostname, port: wanted, tcpBacklog: 1 }));
  const { port } = listener.addr;
  const target = hostname === "0.0.0.0" ? "127.0.0.1" : hostname;
  // Two fill the queue; the others show that it is full.
  const fillers = await Promise.all(Array.from({ length: 4 }, async () => {
    try {
      return stack.use(await Deno.connect({ hostname: target, port, signal: AbortSignal.timeout(300) }));
    } catch (error) {
      if (!(error instanceof DOMException && error.name === "TimeoutError")) throw error;
    }
  }));
  if (!fillers.includes(undefined)) throw new Error("The black hole accepts: its queue is not full");
  const held = stack.move();
  return { hostname, port, connections: 0, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

/** Sends all of `text`. */
export async function send(conn: Deno.TcpConn, text: string): Promise<void> {
  const bytes = new TextEncoder().encode(text);
  for (let sent = 0; sent < bytes.length;) sent += await conn.write(bytes.subarray(sent));
}

/** Returns when the client has closed. */
export async function untilClosed(conn: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(1024);
  while (await conn.read(buffer) !== null);
}

function isDisconnect(error: unknown): boolean {
  const kinds = [Deno.errors.BrokenPipe, Deno.errors.ConnectionReset, Deno.errors.ConnectionAborted];
  return kinds.some((kind) => error instanceof kind);
}

/** A JSON object of exactly this many bytes. */
export function jsonOfSize(bytes: number): string {
  return `{"version":"${"v".repeat(bytes - 14)}"}`;
}

/** The bytes of a SQLite file with this many games. */
async function database(games: number): Promise<Uint8Array<ArrayBuffer>> {
  await using temp = await tempFolder();
  const path = `${temp.folder}/elo.db`;
  const db = new DatabaseSync(path);
  db.exec(`
    CREATE TABLE match_history (
      game_id TEXT PRIMARY KEY, participant_a TEXT, participant_b TEXT, board_type TEXT, num_players INTEGER,
      winner TEXT, timestamp REAL
    );
    WITH RECURSIVE game(n) AS (SELECT 1 WHERE ${games} > 0 UNION ALL SELECT n + 1 FROM game WHERE n < ${games})
    INSERT INTO match_history
      SELECT 'game-' || n, 'model-a', 'model-b', 'square8', 2, iif(n % 3, 'model-a', 'model-b'), 1.75e9 + n FROM game;
  `);
  db.close();
  return await Deno.readFile(path);
}

if (import.meta.main) {
  for (const argument of Deno.args) {
    const [, behaviour, hostname, port] = /^([\w-]+)=\[?([^\]]+)\]?:(\d+)$/.exec(argument)!;
    await startNode(behaviour as Behaviour, { hostname: hostname!, port: Number(port) });
  }
  console.log("started");
}
