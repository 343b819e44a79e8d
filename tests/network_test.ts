import { assert, assertEquals, assertGreater, assertLess, assertRejects } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  type ClusterNodeFields,
  discoverReachableNodes,
  type FailureCode,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
  type NodeState,
  probeNode,
  probeNodes,
  type ProbeOptions,
} from "../mod.ts";
import {
  type Behaviour,
  type Conversation,
  jsonOfSize,
  ROOT,
  run,
  send,
  startNode,
  untilClosed,
  writeInventory,
} from "./loopback_cluster.ts";

const TIMEOUT_MS = 1000;
const SLACK_MS = 500;
const MIB = 1024 * 1024;

interface Sweep {
  readonly probes: readonly {
    readonly outcome: string;
    readonly message?: string;
    readonly address?: string;
    readonly atMs: number;
    readonly inOrder: boolean;
  }[];
  readonly ms: number;
  readonly descriptors: readonly [before: number, after: number];
  /** How long an asynchronous file read took, right after the sweep. */
  readonly readMs: number;
}

/** What each script below begins with. Before it counts, it has the runtime open what that keeps. */
const PRELUDE = `
import { ClusterNode, probeNodes } from ${JSON.stringify(`${ROOT}mod.ts`)};

const [fields, options] = JSON.parse(Deno.args[0]);
const nodes = fields.map((field) => new ClusterNode(field));
const descriptors = () => [...Deno.readDirSync("/dev/fd")].length;
await probeNodes([new ClusterNode({ name: "first", tailscaleIp: "127.0.0.1" })], { port: 1 });
const before = descriptors();
const started = performance.now();
const elapsed = () => performance.now() - started;
// A read that was under way when its connection was closed gives the descriptor back a moment later.
const settled = () => new Promise((resolve) => setTimeout(resolve, 50));
`;

const SWEEP = `${PRELUDE}
const known = new Map();
const probes = await probeNodes(nodes, { ...options, onProbe: (probe) => known.set(probe.node, elapsed()) });
const ms = elapsed();
await Deno.readFile("/dev/null");
const readMs = elapsed() - ms;
await settled();
console.log(JSON.stringify({
  ms,
  readMs,
  descriptors: [before, descriptors()],
  probes: probes.map(({ node, state, failure, address }, index) => ({
    outcome: [state, failure?.code].filter(Boolean).join(" "),
    message: failure?.message,
    address,
    atMs: known.get(node),
    inOrder: node === nodes[index],
  })),
  endedAt: Date.now(),
}));
`;

const ABORTED_SWEEP = `${PRELUDE}
const controller = new AbortController();
setTimeout(() => controller.abort("enough"), 100);
const reason = await probeNodes(nodes, { ...options, signal: controller.signal }).catch((error) => error);
const ms = elapsed();
await settled();
console.log(JSON.stringify({ reason, ms, descriptors: [before, descriptors()], endedAt: Date.now() }));
`;

interface ScriptOptions {
  readonly timeoutMs?: number;
  readonly env?: Readonly<Record<string, string>>;
  /** The command that runs the rest. */
  readonly wrap?: readonly string[];
}

/** Runs a script in a process of its own, and says how long that lived on after it. */
async function runScript(script: string, fields: readonly ClusterNodeFields[], options: ScriptOptions = {}) {
  const { timeoutMs = TIMEOUT_MS, env = {}, wrap = [] } = options;
  const deno = ["deno", "run", "-q", "-A", "--config", `${ROOT}deno.json`, "-"];
  const [program, ...args] = [...wrap, ...deno, JSON.stringify([fields, { timeoutMs }])];
  const { code, stdout, stderr } = await run(program!, args, { env, stdin: script });
  const now = Date.now();
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  const result = JSON.parse(stdout);
  return { result, lingerMs: now - result.endedAt };
}

/** Sweeps in a process of its own, and checks what is true of every sweep. */
async function sweepElsewhere(
  fields: readonly ClusterNodeFields[],
  options: ScriptOptions & { readonly mayLinger?: boolean } = {},
): Promise<Sweep> {
  const { timeoutMs = TIMEOUT_MS, mayLinger = false } = options;
  const { result, lingerMs } = await runScript(SWEEP, fields, options);
  const sweep: Sweep = result;
  assertLess(sweep.ms, timeoutMs + SLACK_MS);
  assertLess(sweep.readMs, SLACK_MS, "the runtime's threads are all taken");
  assertEquals(sweep.probes.map(({ inOrder }) => inOrder), fields.map(() => true));
  if (!mayLinger) {
    assertLess(lingerMs, SLACK_MS, "the process lived on");
    assertEquals(sweep.descriptors[1], sweep.descriptors[0], "descriptors are left");
  }
  return sweep;
}

function copies(count: number, fields: Omit<ClusterNodeFields, "name">): ClusterNodeFields[] {
  return Array.from({ length: count }, (_, index) => ({ name: `node-${index}`, ...fields }));
}

function at(server: { hostname: string; port: number }): Omit<ClusterNodeFields, "name"> {
  return { tailscaleIp: server.hostname, dataServerPort: server.port };
}

function tally(words: readonly (string | undefined)[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const word of words) counts[String(word)] = (counts[String(word)] ?? 0) + 1;
  return counts;
}

function outcomes({ probes }: Sweep): Record<string, number> {
  return tally(probes.map(({ outcome }) => outcome));
}

const NO_ANSWER = `unhealthy timeout: accepted, but no answer within ${TIMEOUT_MS} ms`;

const OUTCOMES: Record<Behaviour, "up" | `${NodeState} ${FailureCode}: ${string}`> = {
  ok: "up",
  refuses: "down refused: connection refused",
  "black-hole": `down timeout: no answer within ${TIMEOUT_MS} ms`,
  silent: NO_ANSWER,
  "trickle-head": NO_ANSWER,
  "trickle-body": NO_ANSWER,
  "endless-1xx": "unhealthy too-large: the head of the answer is larger than 65536 bytes",
  "endless-body": "unhealthy too-large: the answer is larger than 1048576 bytes",
  "length-short": "unhealthy bad-response: the answer is not JSON",
  "length-long": NO_ANSWER,
  "too-large": "unhealthy too-large: the answer is larger than 1048576 bytes",
  gzip: "unhealthy bad-response: the answer is compressed, which was not asked for",
  "ssh-banner": "unhealthy bad-response: the answer is not HTTP",
  reset: "unhealthy bad-response: ",
  closes: "unhealthy bad-response: ",
  "not-json": "unhealthy bad-response: the answer is not JSON",
  "json-array": "unhealthy bad-response: the answer is JSON, but a list, not an object",
  "http-500": "unhealthy http-status: HTTP 500",
  redirect: "unhealthy redirect: HTTP 302, a redirect to http://127.0.0.1:",
};

for (const [behaviour, expected] of Object.entries(OUTCOMES) as [Behaviour, string][]) {
  Deno.test(`probeNodes() of 200 nodes at once: ${behaviour} is ${expected.split(":")[0]}`, async () => {
    await using target = await startNode("silent");
    await using server = await startNode(behaviour, { target: `http://127.0.0.1:${target.port}/status` });
    // So much is sent that the servers of all of them, on one thread, need their time.
    const timeoutMs = behaviour.startsWith("endless") ? 10_000 : TIMEOUT_MS;
    const { probes } = await sweepElsewhere(copies(200, at(server)), { timeoutMs });
    assertEquals(probes.length, 200);
    for (const { outcome, message } of probes) {
      assertEquals((message === undefined ? outcome : `${outcome}: ${message}`).slice(0, expected.length), expected);
    }
    assertEquals(target.connections, 0);
    // Nothing is asked twice.
    if (behaviour !== "refuses" && behaviour !== "black-hole") assertEquals(server.connections, 200);
  });
}

Deno.test("the deadline holds against endless answers too", async () => {
  // Slow enough never to be too large, each write an answer of its own.
  const endless = (text: string): Conversation => async (conn, signal) => {
    await send(conn, "HTTP/1.1 ");
    for (;; await delay(20, { signal })) await send(conn, text);
  };
  for (const text of ["102 Processing\r\n\r\nHTTP/1.1 ", "200 OK\r\n\r\n[", "200 OK\r\nX: y\r\n"]) {
    await using server = await startNode(endless(text));
    assertEquals(outcomes(await sweepElsewhere(copies(200, at(server)))), { "unhealthy timeout": 200 });
  }
});

Deno.test("probeNodes() sees no proxy of the environment", async () => {
  await using server = await startNode("ok");
  await using proxy = await startNode("closes");
  const url = `http://127.0.0.1:${proxy.port}`;
  const env = { HTTP_PROXY: url, http_proxy: url, ALL_PROXY: url, all_proxy: url, HTTPS_PROXY: url, https_proxy: url };
  const byUrl = { dataServerUrl: `http://127.0.0.1:${server.port}` };
  const sweep = await sweepElsewhere([...copies(100, at(server)), ...copies(100, byUrl)], { env });
  assertEquals(outcomes(sweep), { up: 200 });
  assertEquals(proxy.connections, 0);

  const fetches = `await fetch("http://127.0.0.1:${server.port}/status").catch(() => {})`;
  await run("deno", ["eval", "--no-config", fetches], { env });
  assertGreater(proxy.connections, 0, "this environment has no proxy: the test could not fail");
});

for (const dead of ["refuses", "silent", "black-hole", "http-500"] as const) {
  Deno.test(`a node with one address that is ${dead} is found by the other`, async () => {
    await using live = await startNode("ok", { hostname: "127.0.0.2" });
    await using other = await startNode(dead, { hostname: "127.0.0.3", port: live.port });
    const dataServerPort = live.port;
    const [liveIp, deadIp] = [live.hostname, other.hostname];

    const second = copies(200, { tailscaleIp: deadIp, sshHost: `root@${liveIp}`, dataServerPort });
    const first = copies(200, { tailscaleIp: liveIp, sshHost: `root@${deadIp}`, dataServerPort });
    for (const fields of [second, first]) {
      const { probes, ms } = await sweepElsewhere(fields);
      assertEquals(tally(probes.map(({ outcome, address }) => `${outcome} ${address}`)), { [`up ${liveIp}`]: 200 });
      // Before the deadline: a dead address has no more than its share of it.
      assertLess(ms, TIMEOUT_MS);
    }
  });
}

Deno.test("a node with two dead addresses has both reasons, within one deadline", async () => {
  await using hole = await startNode("black-hole", { hostname: "127.0.0.2" });
  const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.3", dataServerPort: hole.port };
  const { probes } = await sweepElsewhere(copies(200, fields));
  assertEquals(tally(probes.map(({ outcome, message }) => `${outcome}: ${message}`)), {
    "down timeout: 127.0.0.2: no answer within 1000 ms; 127.0.0.3: connection refused": 200,
  });
});

function hasIpv6(): boolean {
  try {
    Deno.listen({ hostname: "::1", port: 0 }).close();
    return true;
  } catch {
    return false;
  }
}

Deno.test({
  name: "IPv6 addresses are checked, in brackets or not (ignored where the machine has no ::1)",
  ignore: !hasIpv6(),
  async fn() {
    await using server = await startNode("ok", { hostname: "::1" });
    const dataServerPort = server.port;
    const fields = [
      ...copies(100, { tailscaleIp: "::1", dataServerPort }),
      ...copies(50, { tailscaleIp: "[::1]", dataServerPort }),
      ...copies(50, { sshHost: "root@[::1]", dataServerPort }),
      ...copies(50, { dataServerUrl: `http://[::1]:${dataServerPort}` }),
    ];
    const { probes } = await sweepElsewhere(fields);
    assertEquals(tally(probes.map(({ outcome, address }) => `${outcome} ${address}`)), { "up ::1": 250 });
  },
});

Deno.test("probeNodes() of 200 names that do not resolve: down dns", async () => {
  // A label of 64 characters is one too long, so that nothing is asked of any server.
  const tailscaleIp = `${"x".repeat(64)}.invalid`;
  assertEquals(outcomes(await sweepElsewhere(copies(200, { tailscaleIp }))), { "down dns": 200 });
});

const FEW_DESCRIPTORS = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"];

Deno.test("with 64 descriptors, a sweep of 500 nodes that answer finds all of them up", async () => {
  await using server = await startNode("ok");
  const sweep = await sweepElsewhere(copies(500, at(server)), { timeoutMs: 5000, wrap: FEW_DESCRIPTORS });
  assertEquals(outcomes(sweep), { up: 500 });
});

Deno.test("with 64 descriptors, no node of 500 black holes is down that was not tried", async () => {
  await using hole = await startNode("black-hole");
  const counts = outcomes(await sweepElsewhere(copies(500, at(hole)), { wrap: FEW_DESCRIPTORS }));
  const { "down timeout": tried = 0, "unknown local-resource": untried = 0 } = counts;
  assertEquals(tried + untried, 500, JSON.stringify(counts));
  assert(tried > 0 && tried < 64, `${tried} were down`);
});

/** Whether this process may mount, and hold port 53: then a server of names can be put in that never answers. */
function mayReplaceDns(): boolean {
  if (Deno.build.os !== "linux" || Deno.uid() !== 0) return false;
  try {
    const args = ["-m", "sh", "-c", "mount --bind /etc/hosts /etc/resolv.conf"];
    return new Deno.Command("unshare", { args, stdout: "null", stderr: "null" }).outputSync().success;
  } catch {
    return false;
  }
}

Deno.test({
  name:
    "names whose lookup hangs hold up no address, no file and no status command (ignored where unshare -m is not permitted)",
  ignore: !mayReplaceDns(),
  async fn() {
    await using server = await startNode("ok");
    await using _dns = await silentUdp("127.0.53.53", 53);
    const hanging = { tailscaleIp: "node.invalid", dataServerPort: server.port };
    const fields = Array.from({ length: 100 }, () => [...copies(1, hanging), ...copies(1, at(server))]).flat();
    const folder = await Deno.makeTempDir({ dir: "/tmp" });
    try {
      await Deno.writeTextFile(`${folder}/resolv.conf`, "nameserver 127.0.53.53\noptions timeout:4 attempts:1\n");
      await Deno.writeTextFile(`${folder}/nsswitch.conf`, "hosts: files dns\n");
      const mount = 'for it in resolv.conf nsswitch.conf; do mount --bind "$0/$it" "/etc/$it" || exit; done; exec "$@"';
      const wrap = ["unshare", "-m", "sh", "-c", mount, folder];
      // A lookup cannot be cancelled: a process that does not exit by itself stays until the system gives it up.
      const sweep = await sweepElsewhere(fields, { wrap, mayLinger: true });
      assertEquals(outcomes(sweep), { "down timeout": 100, up: 100 });
      for (const { outcome, atMs } of sweep.probes) if (outcome === "up") assertLess(atMs, SLACK_MS);

      await using inventory = await writeInventory({ hanging: { tailscale_ip: "node.invalid" } });
      const status = ["status", "--config", inventory.path, "--timeout", String(TIMEOUT_MS / 1000)];
      const [program, ...args] = [...wrap, "deno", "run", "-q", "-P=cli", "--config", `${ROOT}deno.json`, "cli.ts"];
      const { code, ms } = await run(program!, [...args, ...status]);
      assertEquals(code, 1);
      assertLess(ms, TIMEOUT_MS + 2 * SLACK_MS, "the command line did not end at its deadline");
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
});

async function silentUdp(hostname: string, port: number): Promise<AsyncDisposable> {
  const { createSocket } = await import("node:dgram");
  const socket = createSocket("udp4");
  await new Promise<void>((resolve, reject) => {
    socket.once("error", reject);
    socket.bind(port, hostname, resolve);
  });
  return { [Symbol.asyncDispose]: () => new Promise<void>((resolve) => socket.close(() => resolve())) };
}

for (const behaviour of ["silent", "black-hole", "trickle-head", "trickle-body", "length-long"] as const) {
  Deno.test(`a signal ends a sweep of 200 nodes that are ${behaviour}, and nothing is left running`, async () => {
    await using server = await startNode(behaviour);
    const { result, lingerMs } = await runScript(ABORTED_SWEEP, copies(200, at(server)), { timeoutMs: 10_000 });
    assertEquals(result.reason, "enough");
    assertLess(result.ms, 100 + SLACK_MS);
    assertEquals(result.descriptors[1], result.descriptors[0], "descriptors are left");
    assertLess(lingerMs, SLACK_MS, "the process lived on");
  });
}

Deno.test("a signal ends every call with its reason, and none begins with one that is aborted", async () => {
  const reason = new Error("enough");
  for (const behaviour of ["silent", "black-hole"] as const) {
    await using server = await startNode(behaviour);
    const { port } = server;
    const hosts = Object.fromEntries(copies(200, {}).map(({ name }) => [name, { tailscale_ip: "127.0.0.1" }]));
    const source = { hosts, elo_sync: { sync_port: port }, distributed: { data_server_port: port } };
    const nodes = copies(200, at(server)).map((fields) => new ClusterNode(fields));
    const calls: Record<string, (signal: AbortSignal) => Promise<unknown>> = {
      probeNode: (signal) => probeNode(nodes[0]!, { signal }),
      probeNodes: (signal) => probeNodes(nodes, { signal }),
      "probeNodes, few at a time": (signal) => probeNodes(nodes, { signal, concurrency: 3 }),
      discoverReachableNodes: (signal) => discoverReachableNodes({ source, signal }),
      getSyncUrls: (signal) => getSyncUrls({ source, port, signal }),
      getEloSyncUrls: (signal) => getEloSyncUrls({ source, signal }),
      getDataSyncUrls: (signal) => getDataSyncUrls({ source, signal, excludeSelf: false }),
    };
    for (const [name, call] of Object.entries(calls)) {
      assert(await assertRejects(() => call(AbortSignal.abort(reason))) === reason, name);
    }
    await delay(50);
    assertEquals(server.connections, 0);

    for (const [name, call] of Object.entries(calls)) {
      const controller = new AbortController();
      const started = performance.now();
      const [thrown] = await Promise.all([
        assertRejects(() => call(controller.signal)),
        delay(100).then(() => controller.abort(reason)),
      ]);
      assert(thrown === reason, name);
      assertLess(performance.now() - started, 100 + SLACK_MS, name);
    }
  }
});

Deno.test("a signal that is aborted in onProbe(), or an error thrown there, ends the sweep", async () => {
  await using server = await startNode("ok");
  await using silent = await startNode("silent");
  const nodes = [at(server), ...copies(50, at(silent))].map((fields) => new ClusterNode({ name: "node", ...fields }));
  const reason = new Error("enough");
  const controller = new AbortController();
  const sweeps = [
    () => probeNodes(nodes, { signal: controller.signal, onProbe: () => controller.abort(reason) }),
    () =>
      probeNodes(nodes, {
        onProbe() {
          throw reason;
        },
      }),
  ];
  for (const sweep of sweeps) {
    const started = performance.now();
    assert(await assertRejects(sweep) === reason);
    assertLess(performance.now() - started, SLACK_MS);
  }
});

const OK = "HTTP/1.1 200 OK\r\n";
const GOOD_JSON = '{"version":"1.4.2"}';
const DEEP_JSON = `{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`;
const [FULL, OVER] = [jsonOfSize(MIB), jsonOfSize(MIB + 1)];

function withLength(body: string): string {
  return `${OK}Content-Length: ${new TextEncoder().encode(body).length}\r\n\r\n${body}`;
}

function chunked(body: string, size = 65_536): string {
  const chunks = body.match(new RegExp(`.{1,${size}}`, "gs")) ?? [];
  const sent = chunks.map((chunk) => `${chunk.length.toString(16)};name=value\r\n${chunk}\r\n`).join("");
  return `${OK}Transfer-Encoding: chunked\r\n\r\n${sent}0\r\nTrailer: yes\r\n\r\n`;
}

/** Answers byte for byte, each of which the client may come to read alone. */
function byBytes(answer: string): Conversation {
  return async (conn, signal) => {
    conn.setNoDelay();
    for (const byte of answer) {
      await send(conn, byte);
      await delay(1, { signal });
    }
    await untilClosed(conn);
  };
}

/** Answers, and closes once the request is there, so that nothing unread turns the end into a reset. */
function once(answer: string): Conversation {
  return async (conn) => {
    await conn.read(new Uint8Array(1024));
    await send(conn, answer);
    await conn.closeWrite();
    await untilClosed(conn);
  };
}

/** Answers, and keeps the connection open. */
function open(answer: string): Conversation {
  return async (conn) => {
    await send(conn, answer);
    await untilClosed(conn);
  };
}

const ANSWERS: Record<string, [answer: Conversation, outcome: string]> = {
  "1 MiB with its length": [open(withLength(FULL)), "up"],
  "1 MiB in chunks": [open(chunked(FULL)), "up"],
  "1 MiB until the end": [once(`${OK}\r\n${FULL}`), "up"],
  "one byte more with its length": [open(withLength(OVER)), "too-large"],
  "one byte more in chunks": [open(chunked(OVER)), "too-large"],
  "one byte more until the end": [once(`${OK}\r\n${OVER}`), "too-large"],
  "a chunk that claims too much": [open(`${OK}Transfer-Encoding: chunked\r\n\r\nffffffff\r\n`), "too-large"],
  "chunks of one byte": [open(chunked(GOOD_JSON, 1)), "up"],
  "chunks, split at every byte": [byBytes(chunked(GOOD_JSON, 3)), "up"],
  "a length, split at every byte": [byBytes(withLength(GOOD_JSON)), "up"],
  "HTTP/1.0": [once(`HTTP/1.0 200 OK\n\n${GOOD_JSON}`), "up"],
  "100 first": [open(`HTTP/1.1 100 Continue\r\n\r\n${withLength(GOOD_JSON)}`), "up"],
  "no compression, said aloud": [once(`${OK}Content-Encoding: identity\r\n\r\n${GOOD_JSON}`), "up"],
  "204": [once("HTTP/1.1 204 No Content\r\n\r\n"), "bad-response"],
  "204, and kept open": [open("HTTP/1.1 204 No Content\r\n\r\n"), "bad-response"],
  "nothing": [open(`${OK}Content-Length: 0\r\n\r\n`), "bad-response"],
  "null": [open(withLength("null")), "bad-response"],
  "100,000 levels deep": [open(withLength(DEEP_JSON)), "bad-response"],
  "invalid UTF-8": [(conn) => conn.write(Uint8Array.from(`${OK}\r\n{"a":"\xff"}`, byteOf)), "bad-response"],
  "an unknown transfer encoding": [open(`${OK}Transfer-Encoding: gzip, chunked\r\n\r\n`), "bad-response"],
  "a length that is none": [open(`${OK}Content-Length: -1\r\n\r\n${GOOD_JSON}`), "bad-response"],
  "a chunk size that is none": [open(`${OK}Transfer-Encoding: chunked\r\n\r\nzz\r\n`), "bad-response"],
  "a chunk longer than its size": [
    open(`${OK}Transfer-Encoding: chunked\r\n\r\n2\r\n${GOOD_JSON}\r\n0\r\n\r\n`),
    "bad-response",
  ],
  "chunks without their end": [once(chunked(GOOD_JSON).slice(0, -25)), "bad-response"],
  "half a body, then the end": [once(`${OK}Content-Length: 5000\r\n\r\n${GOOD_JSON}`), "bad-response"],
  "half a head, then the end": [once("HTTP/1.1 200 OK\r\nServer: x"), "bad-response"],
  "HTTP/2": [open("HTTP/2 200\r\n\r\n"), "bad-response"],
  "a head of 64 KiB and more": [open(`${OK}X: ${"x".repeat(70_000)}`), "too-large"],
  "many headers": [open(`${OK}${"X: y\r\n".repeat(20_000)}\r\n`), "too-large"],
};

function byteOf(character: string): number {
  return character.charCodeAt(0);
}

for (const [name, [answer, expected]] of Object.entries(ANSWERS)) {
  Deno.test(`probeNode() on ${name}: ${expected}`, async () => {
    await using server = await startNode(answer);
    const options: ProbeOptions = { timeoutMs: 5000 };
    const { state, failure, status } = await probeNode(new ClusterNode({ name: "node", ...at(server) }), options);
    assertEquals(failure?.code ?? state, expected, failure?.message);
    if (expected === "up") assertEquals(typeof status?.version, "string");
  });
}
