/**
 * Real servers on this machine, one for each kind of behaviour, for the demo
 * and the tests.
 *
 * As a program (`loopback_cluster.ts ok=127.0.0.1:8766 silent=[::1]:9000 ...`)
 * it runs them until it is killed, for a network namespace that the tests
 * themselves are not in. An `https` server reads its certificate from the files
 * that `TLS_KEY` and `TLS_CERT` name.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { DatabaseSync } from "node:sqlite";
import { gzipSync } from "node:zlib";
import { tempFolder } from "./process.ts";

/**
 * A server that {@linkcode startNode} started. Its disposal closes all its
 * connections.
 */
export interface LoopbackNode extends AsyncDisposable {
  readonly hostname: string;
  readonly port: number;

  /**
   * How many clients came: connections, or requests where the node answers over
   * HTTP.
   */
  readonly connections: number;
}

/** Options of {@linkcode startNode}. */
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

type AllOptions = Required<LoopbackNodeOptions>;

/** Talks on one connection, which is closed when it returns. */
export type Conversation = (
  conn: Deno.TcpConn,
  signal: AbortSignal,
) => Promise<unknown>;

type Answer = (
  request: Request,
  options: AllOptions,
) => Response | Promise<Response>;

const MIB = 1024 * 1024;
const JSON_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
const STATUS_TEXT = '{"version":"1.4.2"}';

const ANSWERS = {
  "ok": async ({ url }, { games }) => {
    switch (new URL(url).pathname) {
      case "/status":
        return Response.json({ version: "1.4.2", game_count: games });
      case "/db":
        return new Response(await database(games), {
          headers: { "content-type": "application/vnd.sqlite3" },
        });
      case "/models":
        return Response.json({
          models: [{ name: "square8_2p.pth", bytes: 4096 }],
        });
      default:
        return new Response("not found", { status: 404 });
    }
  },
  "http-500": () => new Response("out of order", { status: 500 }),
  "not-json": () =>
    new Response("<h1>It works!</h1>", {
      headers: { "content-type": "text/html" },
    }),
  "json-array": () => Response.json([{ version: "1.4.2" }]),
  "redirect": (_request, { target }) =>
    new Response(null, { status: 302, headers: { location: target } }),
  "too-large": () =>
    new Response(jsonOfSize(MIB + 1), {
      headers: { "content-type": "application/json" },
    }),
  "gzip": () => {
    const body = gzipSync(new TextEncoder().encode(STATUS_TEXT));
    return new Response(new Uint8Array(body), {
      headers: { "content-encoding": "gzip" },
    });
  },
} satisfies Record<string, Answer>;

const CONVERSATIONS = {
  "silent": (conn) => untilClosed(conn),
  "closes": () => Promise.resolve(),
  "echo": async (conn) => {
    const head = await readRequest(conn);
    await send(conn, jsonAnswer({ head }));
    await untilClosed(conn);
  },
  "ssh-banner": async (conn) => {
    await send(conn, "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13\r\n");
    await untilClosed(conn);
  },
  "trickle-head": async (conn, signal) => {
    await send(conn, "HTTP/1.1 200 OK\r\nX-Slow: ");
    while (true) {
      await send(conn, "z");
      await delay(50, { signal });
    }
  },
  "trickle-body": async (conn, signal) => {
    await send(conn, `${JSON_HEAD}Content-Length: 100000\r\n\r\n`);
    while (true) {
      await send(conn, " ");
      await delay(50, { signal });
    }
  },
  "endless-1xx": async (conn) => {
    const answers = "HTTP/1.1 102 Processing\r\n\r\n".repeat(4000);
    while (true) await send(conn, answers);
  },
  "endless-body": async (conn) => {
    await send(conn, `${JSON_HEAD}\r\n`);
    const spaces = " ".repeat(64 * 1024);
    while (true) await send(conn, spaces);
  },
  "length-short": async (conn) => {
    await send(conn, `${JSON_HEAD}Content-Length: 5\r\n\r\n${STATUS_TEXT}`);
    await untilClosed(conn);
  },
  "length-long": async (conn) => {
    await send(conn, `${JSON_HEAD}Content-Length: 5000\r\n\r\n${STATUS_TEXT}`);
    await untilClosed(conn);
  },
  "reset": async (conn) => {
    // Closing while there is something unread is what makes the system send a
    // reset.
    await conn.read(new Uint8Array(1));
    await send(conn, `${JSON_HEAD}Content-Length: 5000\r\n\r\n{"version":`);
  },
} satisfies Record<string, Conversation>;

/**
 * How a node behaves. `refuses` has no listener; `black-hole` does not even
 * refuse.
 */
export type Behaviour =
  | keyof typeof ANSWERS
  | keyof typeof CONVERSATIONS
  | "refuses"
  | "black-hole";

/**
 * Starts a node that behaves in one of these ways, or that holds a conversation
 * of the test's own.
 */
export async function startNode(
  behaviour: Behaviour | Conversation,
  options: LoopbackNodeOptions = {},
): Promise<LoopbackNode> {
  const all = {
    hostname: "127.0.0.1",
    port: 0,
    games: 12,
    target: "/elsewhere",
    ...options,
  };

  try {
    return await startBehaviour(behaviour, all);
  } catch (cause) {
    if (!(cause instanceof Deno.errors.AddrInUse)) throw cause;

    const message = `Port ${all.port} of ${all.hostname} is in use`;
    throw new Deno.errors.AddrInUse(message, { cause });
  }
}

async function startBehaviour(
  behaviour: Behaviour | Conversation,
  options: AllOptions,
): Promise<LoopbackNode> {
  if (typeof behaviour === "function") return converse(behaviour, options);
  if (behaviour === "refuses") return refuse(options);
  if (behaviour === "black-hole") return await swallow(options);

  const answer = (ANSWERS as Record<string, Answer>)[behaviour];
  if (answer) return serve(answer, options);

  const conversations: Record<string, Conversation> = CONVERSATIONS;
  return converse(conversations[behaviour]!, options);
}

/** Starts the nodes of config/demo_hosts.yaml. */
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

function serve(answer: Answer, options: AllOptions): LoopbackNode {
  const { hostname, port } = options;
  let connections = 0;

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

function converse(
  conversation: Conversation,
  options: AllOptions,
): LoopbackNode {
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
      if (conns.delete(conn)) closeQuietly(conn);
    }
  };

  const listen = async () => {
    const held = new Set<Promise<void>>();
    for await (const conn of listener) {
      const holding = hold(conn).finally(() => held.delete(holding));
      held.add(holding);
    }
    await Promise.all(held);
  };
  const listening = listen();

  return {
    hostname,
    port: listener.addr.port,
    get connections() {
      return connections;
    },
    async [Symbol.asyncDispose]() {
      ended.abort();
      listener.close();
      for (const conn of conns) closeQuietly(conn);
      conns.clear();
      await listening;
    },
  };
}

/** Closes a connection that its conversation may have closed. */
function closeQuietly(conn: Deno.TcpConn): void {
  try {
    conn.close();
  } catch (error) {
    if (!(error instanceof Deno.errors.BadResource)) throw error;
  }
}

function refuse({ hostname, port: wanted }: AllOptions): LoopbackNode {
  const port = wanted || unusedPort(hostname);
  if (wanted) Deno.listen({ hostname, port }).close();

  return {
    hostname,
    port,
    connections: 0,
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
}

/**
 * Returns a port on which nothing listens.
 *
 * It is none of the system's own range, from which a connection could be given
 * that very port and would reach itself, and none of the demo's.
 */
export function unusedPort(hostname = "127.0.0.1"): number {
  while (true) {
    const port = 20_000 + Math.floor(Math.random() * 10_000);
    try {
      Deno.listen({ hostname, port }).close();
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

async function swallow(options: AllOptions): Promise<LoopbackNode> {
  const { hostname, port: wanted } = options;
  await using stack = new AsyncDisposableStack();

  const listener = Deno.listen({ hostname, port: wanted, tcpBacklog: 1 });
  stack.use(listener);

  const { port } = listener.addr;
  const target = hostname === "0.0.0.0" ? "127.0.0.1" : hostname;

  // Two fill the queue; the others show that it is full.
  const fill = async () => {
    const signal = AbortSignal.timeout(300);
    try {
      stack.use(await Deno.connect({ hostname: target, port, signal }));
      return true;
    } catch (error) {
      const isTimeout = error instanceof DOMException &&
        error.name === "TimeoutError";
      if (!isTimeout) throw error;
      return false;
    }
  };
  const accepted = await Promise.all([fill(), fill(), fill(), fill()]);
  if (accepted.every((isAccepted) => isAccepted)) {
    throw new Error("The black hole accepts: its queue is not full");
  }

  const held = stack.move();
  return {
    hostname,
    port,
    connections: 0,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Sends all of `text`. */
export async function send(conn: Deno.TcpConn, text: string): Promise<void> {
  const bytes = new TextEncoder().encode(text);
  let sent = 0;
  while (sent < bytes.length) sent += await conn.write(bytes.subarray(sent));
}

/** Reads the head of a request, its empty line left out. */
export async function readRequest(conn: Deno.TcpConn): Promise<string> {
  const decoder = new TextDecoder();
  const buffer = new Uint8Array(4096);
  let text = "";

  while (!text.includes("\r\n\r\n")) {
    const count = await conn.read(buffer);
    if (count === null) throw new Deno.errors.ConnectionReset();
    text += decoder.decode(buffer.subarray(0, count), { stream: true });
  }
  return text.slice(0, text.indexOf("\r\n\r\n"));
}

/** Returns an answer with this document as its body. */
export function jsonAnswer(document: unknown): string {
  const body = JSON.stringify(document);
  const length = new TextEncoder().encode(body).length;
  return `${JSON_HEAD}Content-Length: ${length}\r\n\r\n${body}`;
}

/** Returns when the client has closed. */
export async function untilClosed(conn: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(1024);
  while (await conn.read(buffer) !== null);
}

/** Answers `/status`, but so late that much can happen before. */
export async function answerSlowly(conn: Deno.TcpConn): Promise<void> {
  await delay(250);
  await send(conn, jsonAnswer({}));
  await untilClosed(conn);
}

function isDisconnect(error: unknown): boolean {
  const kinds = [
    Deno.errors.BrokenPipe,
    Deno.errors.ConnectionAborted,
    Deno.errors.ConnectionReset,
  ];
  return kinds.some((kind) => error instanceof kind);
}

/** Returns a JSON object of exactly this many bytes. */
export function jsonOfSize(bytes: number): string {
  return `{"version":"${"v".repeat(bytes - 14)}"}`;
}

/** Returns the bytes of a SQLite file with this many games. */
async function database(games: number): Promise<Uint8Array<ArrayBuffer>> {
  await using temp = await tempFolder();
  const path = `${temp.folder}/elo.db`;

  const db = new DatabaseSync(path);
  db.exec(`
    CREATE TABLE match_history (
      game_id TEXT PRIMARY KEY, participant_a TEXT, participant_b TEXT,
      board_type TEXT, num_players INTEGER, winner TEXT, timestamp REAL
    );
    WITH RECURSIVE game(n) AS (
      SELECT 1 WHERE ${games} > 0 UNION ALL
      SELECT n + 1 FROM game WHERE n < ${games}
    )
    INSERT INTO match_history
      SELECT 'game-' || n, 'model-a', 'model-b', 'square8', 2,
        iif(n % 3, 'model-a', 'model-b'), 1.75e9 + n FROM game;
  `);
  db.close();

  return await Deno.readFile(path);
}

function serveHttps(hostname: string, port: number): void {
  const key = Deno.readTextFileSync(Deno.env.get("TLS_KEY")!);
  const cert = Deno.readTextFileSync(Deno.env.get("TLS_CERT")!);
  const options = { hostname, port, key, cert, onListen() {} };

  Deno.serve(options, ({ headers }) => {
    return Response.json({ headers: Object.fromEntries(headers) });
  });
}

if (import.meta.main) {
  for (const argument of Deno.args) {
    const parts = /^([\w-]+)=\[?([^\]]+)\]?:(\d+)$/.exec(argument)!;
    const [, behaviour, hostname, port] = parts;

    if (behaviour === "https") serveHttps(hostname!, Number(port));
    else {
      await startNode(behaviour as Behaviour, {
        hostname: hostname!,
        port: Number(port),
      });
    }
  }
  console.log("started");
}
