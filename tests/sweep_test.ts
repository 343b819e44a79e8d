import { assert, assertEquals, assertGreater, assertLess, assertMatch, assertRejects } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  discoverReachableNodes,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
  missingNetFlag,
  type NodeProbe,
  probeNode,
  probeNodes,
  type SweepOptions,
  waitForNodes,
  watchNodes,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { type Behaviour, type LoopbackNode, startNode, untilClosed } from "./loopback_cluster.ts";
import { run } from "./process.ts";
import { at, copies, outcomeOf, SLACK_MS, sweepElsewhere, tally, withDescriptors } from "./sweep_process.ts";

/** The nodes `names`, each at its server. */
function nodesAt(servers: Readonly<Record<string, { hostname: string; port: number }>>): ClusterNode[] {
  return Object.entries(servers).map(([name, server]) => new ClusterNode({ name, ...at(server) }));
}

function manyAt(count: number, server: { hostname: string; port: number }): ClusterNode[] {
  return copies(count, at(server)).map((fields) => new ClusterNode(fields));
}

/** The outcome of each node by its name. */
function byName(probes: Iterable<NodeProbe>): Record<string, string> {
  return Object.fromEntries(Array.from(probes, (probe) => [probe.node.name, outcomeOf(probe)]));
}

const EACH = 50;

const QUICK: Partial<Record<Behaviour, string>> = {
  ok: "up",
  refuses: "down refused",
  "length-short": "unhealthy bad-response",
  gzip: "unhealthy bad-response",
  "ssh-banner": "unhealthy bad-response",
  reset: "unhealthy bad-response",
  closes: "unhealthy bad-response",
  "not-json": "unhealthy bad-response",
  "json-array": "unhealthy bad-response",
  "http-500": "unhealthy http-status",
  redirect: "unhealthy redirect",
  "endless-1xx": "unhealthy too-large",
  "endless-body": "unhealthy too-large",
  "too-large": "unhealthy too-large",
};

const HANGING: Partial<Record<Behaviour, string>> = {
  "black-hole": "down timeout",
  silent: "unhealthy timeout",
  "trickle-head": "unhealthy timeout",
  "trickle-body": "unhealthy timeout",
  "length-long": "unhealthy timeout",
};

for (const [what, behaviours, timeoutMs] of [["answer", QUICK, 15_000], ["hang", HANGING, 500]] as const) {
  Deno.test(`probeNodes() of ${EACH} nodes of each kind at once that ${what} asks each once, and keeps the order`, async () => {
    await using servers = new AsyncDisposableStack();
    const started: { behaviour: string; outcome: string; server: LoopbackNode }[] = [];
    for (const [behaviour, outcome] of Object.entries(behaviours)) {
      started.push({ behaviour, outcome, server: servers.use(await startNode(behaviour as Behaviour)) });
    }
    const mixed = Array.from({ length: EACH }, () => started).flat();
    const nodes = mixed.map(({ behaviour, server }) => new ClusterNode({ name: behaviour, ...at(server) }));
    const known: NodeProbe[] = [];
    const probes = await probeNodes(nodes, { timeoutMs, onProbe: (probe) => void known.push(probe) });
    assertEquals(probes.map(({ node }) => node), nodes);
    assertEquals(known.length, nodes.length);
    assertEquals(new Set(known), new Set(probes));
    assertEquals(
      tally(probes.map((probe) => `${probe.node.name}: ${outcomeOf(probe)}`)),
      Object.fromEntries(started.map(({ behaviour, outcome }) => [`${behaviour}: ${outcome}`, EACH])),
    );
    for (const { behaviour, server } of started) {
      if (behaviour !== "refuses" && behaviour !== "black-hole") assertEquals(server.connections, EACH, behaviour);
    }
  });
}

Deno.test("probeNodes() leaves no descriptor behind, and the process can end at once", async () => {
  await using servers = new AsyncDisposableStack();
  const nodes = [];
  for (const behaviour of Object.keys({ ...QUICK, ...HANGING }) as Behaviour[]) {
    if (/endless|too-large/.test(behaviour)) continue;
    nodes.push(...copies(20, at(servers.use(await startNode(behaviour)))));
  }
  const { outcomes } = await sweepElsewhere({ nodes, options: { timeoutMs: 1500 } });
  assertEquals(tally(outcomes).up, 20);
});

Deno.test("probeNodes() ends at a signal, and leaves nothing running", async () => {
  await using servers = new AsyncDisposableStack();
  const nodes = [];
  for (const behaviour of Object.keys(HANGING) as Behaviour[]) {
    nodes.push(...copies(40, at(servers.use(await startNode(behaviour)))));
  }
  const { reason } = await sweepElsewhere({ nodes, options: { timeoutMs: 10_000 }, abortMs: 100 });
  assertEquals(reason, "enough");
});

Deno.test("probeNodes() sees no proxy of the environment", async () => {
  await using server = await startNode("ok");
  await using proxy = await startNode("closes");
  const url = `http://127.0.0.1:${proxy.port}`;
  const env = { HTTP_PROXY: url, http_proxy: url, ALL_PROXY: url, all_proxy: url, HTTPS_PROXY: url, https_proxy: url };
  const byUrl = { dataServerUrl: `http://127.0.0.1:${server.port}` };
  const nodes = [...copies(5, at(server)), ...copies(5, byUrl)];
  const { outcomes } = await sweepElsewhere({ nodes, options: {} }, { env });
  assertEquals(tally(outcomes), { up: 10 });
  assertEquals(proxy.connections, 0);

  const fetches = `await fetch("http://127.0.0.1:${server.port}/status").catch(() => {})`;
  await run("deno", ["eval", "--no-config", fetches], { env });
  assertGreater(proxy.connections, 0, "this environment has no proxy: the test could not fail");
});

Deno.test("probeNodes() finds all of 500 nodes up with 64 descriptors", async () => {
  await using server = await startNode("ok");
  const plan = { nodes: copies(500, at(server)), options: {} };
  const { outcomes } = await sweepElsewhere(plan, { enter: withDescriptors(64) });
  assertEquals(tally(outcomes), { up: 500 });
});

Deno.test("probeNodes() finds all nodes up with 100 descriptors, half of them by name, since lookups need some too", async () => {
  await using server = await startNode(answerSlowly);
  const named = copies(200, { ...at(server), tailscaleIp: "localhost" });
  const plan = { nodes: copies(200, at(server)).flatMap((node, index) => [node, named[index]!]), options: {} };
  const { outcomes } = await sweepElsewhere(plan, { enter: withDescriptors(100) });
  assertEquals(tally(outcomes), { up: 400 });
});

Deno.test("probeNodes() tells of all of 600 black holes that they are down, with 256 descriptors", async () => {
  await using hole = await startNode("black-hole");
  const plan = { nodes: copies(600, at(hole)), options: { timeoutMs: 400 } };
  const { outcomes } = await sweepElsewhere(plan, { enter: withDescriptors(256) });
  assertEquals(tally(outcomes), { "down timeout": 600 });
});

Deno.test("probeNodes() does not blame a node if there is no descriptor at all", async () => {
  await using server = await startNode("ok");
  const plan = { nodes: copies(3, at(server)), options: { timeoutMs: 300 }, takesDescriptors: true };
  const { outcomes } = await sweepElsewhere(plan, { enter: withDescriptors(64) });
  assertEquals(tally(outcomes), { "unknown local-resource": 3 });
});

Deno.test("probeNodes() starts at most 1,000 new nodes in 10 ms, and has 10,000 under way by default", async () => {
  const { connect } = Deno;
  const startsMs: number[] = [];
  const bursts: number[] = [];
  let isNew = true;
  Deno.connect = (({ signal }: { signal: AbortSignal }) => {
    startsMs.push(performance.now());
    if (isNew) queueMicrotask(() => isNew = true);
    bursts.push(isNew ? 1 : bursts.pop()! + 1);
    isNew = false;
    return new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason), { once: true }));
  }) as unknown as typeof Deno.connect;
  try {
    const controller = new AbortController();
    const nodes = manyAt(12_000, { hostname: "127.0.0.1", port: 9 });
    const sweep = assertRejects(() => probeNodes(nodes, { timeoutMs: 60_000, signal: controller.signal }));
    for (let waitedMs = 0; waitedMs < 10_000 && startsMs.length < 10_000; waitedMs += 20) await delay(20);
    await delay(200);
    controller.abort();
    await sweep;
  } finally {
    Deno.connect = connect;
  }
  assertEquals(startsMs.length, 10_000);
  assertEquals(bursts.slice(0, 8), [64, 64, 128, 256, 512, 1000, 1000, 1000]);
  for (const [index, startMs] of startsMs.entries()) {
    // Timers count whole milliseconds.
    const steps = Math.floor((startMs - startsMs[0]! + 2) / 10);
    assertLess(index, 1000 * (steps + 1), `node ${index} was started after ${startMs - startsMs[0]!} ms`);
  }
});

Deno.test("probeNodes() has at most `concurrency` nodes under way", async () => {
  let open = 0;
  let most = 0;
  await using server = await startNode(async (conn) => {
    most = Math.max(most, ++open);
    await delay(20);
    open--;
    const body = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    await conn.write(new TextEncoder().encode(body));
    await untilClosed(conn);
  });
  const probes = await probeNodes(manyAt(20, server), { concurrency: 3 });
  assertEquals(tally(probes.map(outcomeOf)), { up: 20 });
  assertEquals(most, 3);
});

const HANGING_KINDS = ["silent", "black-hole"] as const;

for (const behaviour of HANGING_KINDS) {
  Deno.test(`a signal ends every call with its reason (${behaviour}), and none begins with one that is aborted`, async () => {
    const reason = new Error("enough");
    await using server = await startNode(behaviour);
    const { port } = server;
    const hosts = Object.fromEntries(copies(50, {}).map(({ name }) => [name, { tailscale_ip: "127.0.0.1" }]));
    const source = { hosts, elo_sync: { sync_port: port }, distributed: { data_server_port: port } };
    const nodes = manyAt(50, server);
    const calls: Record<string, (signal: AbortSignal) => Promise<unknown>> = {
      probeNode: (signal) => probeNode(nodes[0]!, { signal }),
      probeNodes: (signal) => probeNodes(nodes, { signal }),
      "probeNodes, few at a time": (signal) => probeNodes(nodes, { signal, concurrency: 3 }),
      waitForNodes: (signal) => waitForNodes(nodes, { signal }),
      discoverReachableNodes: (signal) => discoverReachableNodes({ source, signal }),
      getSyncUrls: (signal) => getSyncUrls({ source, port, signal }),
      getEloSyncUrls: (signal) => getEloSyncUrls({ source, signal }),
      getDataSyncUrls: (signal) => getDataSyncUrls({ source, signal, excludeSelf: false }),
    };
    for (const [name, call] of Object.entries(calls)) {
      assert(await assertRejects(() => call(AbortSignal.abort(reason))) === reason, name);
    }
    await delay(20);
    assertEquals(server.connections, 0);

    await Promise.all(
      Object.entries(calls).map(async ([name, call]) => {
        const controller = new AbortController();
        const started = performance.now();
        const [thrown] = await Promise.all([
          assertRejects(() => call(controller.signal)),
          delay(100).then(() => controller.abort(reason)),
        ]);
        assert(thrown === reason, name);
        assertLess(performance.now() - started, 100 + SLACK_MS, name);
      }),
    );
  });
}

Deno.test("a signal ends the loading of an inventory by URL too", async () => {
  await using silent = await startNode("silent");
  const source = `http://127.0.0.1:${silent.port}/hosts.yaml`;
  const reason = new Error("enough");
  for (const call of [discoverReachableNodes, getDataSyncUrls, getEloSyncUrls, getSyncUrls]) {
    const controller = new AbortController();
    const timer = setTimeout(() => controller.abort(reason), 50);
    const thrown = await assertRejects(() => call({ source, signal: controller.signal, excludeSelf: false } as object));
    clearTimeout(timer);
    assert(thrown === reason, call.name);
  }
});

Deno.test("probeNodes() ends at an error thrown in onProbe(), and at a signal aborted there", async () => {
  await using server = await startNode("ok");
  await using silent = await startNode("silent");
  const nodes = [...manyAt(1, server), ...manyAt(50, silent)];
  const reason = new Error("enough");
  const controller = new AbortController();
  const all: SweepOptions[] = [
    { signal: controller.signal, onProbe: () => controller.abort(reason) },
    {
      onProbe() {
        throw reason;
      },
    },
  ];
  for (const options of all) {
    const started = performance.now();
    assert(await assertRejects(() => probeNodes(nodes, options)) === reason);
    assertLess(performance.now() - started, SLACK_MS);
  }
});

Deno.test("probeNodes(), waitForNodes() and watchNodes() throw at a fault of the caller, with no node too", async () => {
  const faults: object[] = [
    { concurrency: 0 },
    { concurrency: 1.5 },
    { timeoutMs: 0 },
    { timeoutMs: 2 ** 31 },
    { port: 0 },
  ];
  const waits: object[] = [{ minUp: -1 }, { minUp: 1.5 }, { intervalMs: -1 }, { deadlineMs: -1 }, { deadlineMs: NaN }];
  await using server = await startNode("ok");
  for (const nodes of [manyAt(1, server), []]) {
    for (const options of faults) {
      const what = JSON.stringify(options);
      await assertRejects(() => probeNodes(nodes, options), RangeError, undefined, what);
      await assertRejects(() => waitForNodes(nodes, options), RangeError, undefined, what);
      await assertRejects(async () => void await watchNodes(nodes, options).next(), RangeError, undefined, what);
    }
    for (const options of waits) {
      await assertRejects(() => waitForNodes(nodes, options), RangeError, undefined, JSON.stringify(options));
    }
    await assertRejects(async () => void await watchNodes(nodes, { intervalMs: NaN }).next(), RangeError);
  }
  await assertRejects(() => waitForNodes(manyAt(2, server), { minUp: 3 }), RangeError);
  assertEquals(server.connections, 0);
});

Deno.test({
  name: "probeNodes() without net permission: unknown, and missingNetFlag() names the flag for all of them",
  permissions: { net: false },
  async fn() {
    const nodes = [
      new ClusterNode({ name: "a", tailscaleIp: "127.0.0.1", sshHost: "b.example.com" }),
      new ClusterNode({ name: "b", tailscaleIp: "127.0.0.1" }),
      new ClusterNode({ name: "c", dataServerUrl: "https://c.example.com/data" }),
      new ClusterNode({ name: "d" }),
    ];
    const probes = await probeNodes(nodes);
    assertEquals(probes.map(outcomeOf), ["unknown denied", "unknown denied", "unknown denied", "down no-address"]);
    assertEquals(
      missingNetFlag(probes),
      "--allow-net=127.0.0.1:8766,b.example.com:8766,c.example.com:443",
    );
    assertEquals(missingNetFlag(probes.slice(3)), undefined);
    const source = { hosts: { a: { tailscale_ip: "127.0.0.1" } } };
    const calls: (() => Promise<unknown>)[] = [
      () => discoverReachableNodes({ source }),
      () => getSyncUrls({ source }),
      () => waitForNodes(nodes),
    ];
    for (const call of calls) await assertRejects(call, Deno.errors.NotCapable, "--allow-net=127.0.0.1:8766");
  },
});

Deno.test("discoverReachableNodes() gives the active nodes that are up, in the order of the config", async () => {
  await using up = await startNode("ok", { hostname: "127.0.0.2" });
  await using broken = await startNode("http-500");
  await using dead = await startNode("refuses");
  const host = (server: { hostname: string; port: number }, fields = {}) => ({
    tailscale_ip: server.hostname,
    data_server_port: server.port,
    ...fields,
  });
  const hosts = {
    late: host(up, { tailscale_ip: "127.0.0.3", ssh_host: "root@127.0.0.2" }),
    broken: host(broken),
    dead: host(dead),
    off: host(up, { status: "offline" }),
    up: host(up),
    bare: {},
  };
  const found = await discoverReachableNodes({ source: { hosts } });
  assertEquals(found.map(({ node, address, status }) => [node.name, address, status?.version]), [
    ["late", "127.0.0.2", "1.4.2"],
    ["up", "127.0.0.2", "1.4.2"],
  ]);
  for (const { connectMs } of found) assertEquals(typeof connectMs, "number");
  const off = await discoverReachableNodes({ source: { hosts }, selection: { names: ["off"] } });
  assertEquals(off.map(({ node }) => node.name), ["off"]);
});

Deno.test("waitForNodes() returns at once when enough are up, beside nodes that hang", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole");
  const nodes = nodesAt({ silent, up, hole });
  const started = performance.now();
  let told = 0;
  const probes = await waitForNodes(nodes, { minUp: 1, timeoutMs: 20_000, onProbe: () => void told++ });
  assertLess(performance.now() - started, SLACK_MS);
  assertEquals(probes.map(({ node }) => node), nodes);
  // What is cut off then is told to nobody.
  await delay(50);
  assertEquals(told, 1);
  assertEquals(outcomeOf(probes[1]!), "up");
  for (const probe of [probes[0]!, probes[2]!]) assert(probe.state !== "up");
});

Deno.test("waitForNodes() finds a node that comes up late at its next answer, not at the slowest one's", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");
  const nodes = nodesAt({ silent, up, late: dead });
  const seen: string[] = [];
  const onProbe = (probe: NodeProbe) => void seen.push(`${probe.node.name} ${outcomeOf(probe)}`);
  const waiting = waitForNodes(nodes, { minUp: 2, timeoutMs: 20_000, intervalMs: 50, onProbe });
  while (!seen.includes("late down refused")) await delay(10);
  await using _late = await startNode("ok", { port: dead.port });
  const started = performance.now();
  const { late, up: first } = byName(await waiting);
  assertLess(performance.now() - started, SLACK_MS);
  assertEquals([late, first, seen.at(-1)], ["up", "up", "late up"]);
});

async function answerSlowly(conn: Deno.TcpConn): Promise<void> {
  await delay(250);
  await conn.write(new TextEncoder().encode("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"));
  await untilClosed(conn);
}

Deno.test("waitForNodes() counts a node that was up in its last answer, and uses the whole of its time", async () => {
  // Slow enough that the deadline falls into a later check.
  await using slow = await startNode(answerSlowly);
  await using dead = await startNode("refuses");
  await using up = await startNode("ok");
  const nodes = nodesAt({ slow, dead, up });
  const started = performance.now();
  const probes = await waitForNodes(nodes, { deadlineMs: 600, intervalMs: 100 });
  const ms = performance.now() - started;
  assertEquals(byName(probes), { slow: "up", dead: "down refused", up: "up" });
  assertGreater(ms, 595);
  assertLess(ms, 600 + SLACK_MS);
});

Deno.test("waitForNodes() no longer counts a node that went down", async () => {
  const first = await startNode("ok");
  await using dead = await startNode("refuses");
  let answers = 0;
  const onProbe = ({ node, state }: NodeProbe) => {
    if (node.name === "first" && state === "up" && ++answers === 1) first[Symbol.asyncDispose]();
  };
  const options = { deadlineMs: 600, intervalMs: 50, onProbe };
  const probes = await waitForNodes(nodesAt({ first, dead }), options);
  assertEquals(byName(probes), { first: "down refused", dead: "down refused" });
});

Deno.test("waitForNodes() tells at its deadline why each node is missing, one under way too", async () => {
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole");
  await using dead = await startNode("refuses");
  const nodes = [...nodesAt({ silent, hole, dead }), new ClusterNode({ name: "homeless" })];
  const started = performance.now();
  const probes = await waitForNodes(nodes, { deadlineMs: 300, timeoutMs: 20_000, intervalMs: 100 });
  assertLess(performance.now() - started, 300 + SLACK_MS);
  assertEquals(probes.map(({ node }) => node), nodes);
  const codes = probes.map(({ state, failure }) => state === "up" ? "up" : failure?.code);
  assertEquals(codes, ["timeout", "timeout", "refused", "no-address"]);
  const waiting = { deadlineMs: 200, timeoutMs: 20_000, concurrency: 1 };
  const queued = await waitForNodes(nodesAt({ silent, dead }), waiting);
  assertEquals(byName(queued), { silent: "unhealthy timeout", dead: "unknown other" });
  // What the end cut off says how long it had.
  assertMatch(probes[0]!.failure!.message, /within (?:2\d\d|300) ms/);
});

Deno.test("waitForNodes() checks again in time for an answer, however long the interval and slow the answer are", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const seen = Promise.withResolvers<void>();
  const onProbe = ({ node }: NodeProbe) => node.name === "late" && seen.resolve();
  const options = { deadlineMs: 1500, intervalMs: 60_000, onProbe };
  const waiting = waitForNodes(nodesAt({ up, late: dead }), options);
  await seen.promise;
  await using _late = await startNode(answerSlowly, { port: dead.port });
  assertEquals(byName(await waiting), { up: "up", late: "up" });
});

Deno.test("waitForNodes() of no node is done, and so is one for none, before anything is asked", async () => {
  assertEquals(await waitForNodes([]), []);
  await using silent = await startNode("silent");
  const probes = await waitForNodes(nodesAt({ silent }), { minUp: 0 });
  assertEquals([byName(probes), silent.connections], [{ silent: "unknown other" }, 0]);
});

Deno.test({
  name:
    "waitForNodes() counts a node that may not be checked as not up, and throws at once if the others cannot be enough",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using up = await startNode("ok");
    await using dead = await startNode("refuses");
    const denied = new ClusterNode({ name: "denied", tailscaleIp: "127.0.0.2", dataServerPort: up.port });
    const nodes = [denied, ...nodesAt({ up })];
    assertEquals(byName(await waitForNodes(nodes, { minUp: 1 })), { denied: "unknown denied", up: "up" });
    const flag = `--allow-net=127.0.0.2:${up.port}`;
    const started = performance.now();
    await assertRejects(() => waitForNodes(nodes), Deno.errors.NotCapable, flag);
    await assertRejects(() => waitForNodes([denied, ...nodesAt({ dead })], { minUp: 2 }), Deno.errors.NotCapable, flag);
    assertLess(performance.now() - started, SLACK_MS);
    // A node of which one address may be checked is asked again.
    const partly = new ClusterNode({
      name: "partly",
      tailscaleIp: "127.0.0.2",
      sshHost: "127.0.0.1",
      dataServerPort: dead.port,
    });
    assertEquals(byName(await waitForNodes([partly], { deadlineMs: 200 })), { partly: "unknown denied" });
    const missing = await waitForNodes([denied, ...nodesAt({ dead })], { minUp: 1, deadlineMs: 200 });
    assertEquals(byName(missing), { denied: "unknown denied", dead: "down refused" });
  },
});

Deno.test("watchNodes() asks each node on its own schedule, beside one that hangs", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  const seen: string[] = [];
  for await (const probe of watchNodes(nodesAt({ silent, up }), { intervalMs: 20, timeoutMs: 20_000 })) {
    seen.push(`${probe.node.name} ${outcomeOf(probe)}`);
    if (seen.length === 5) break;
  }
  assertEquals(tally(seen), { "up up": 5 });
  assertEquals([up.connections, silent.connections], [5, 1]);
});

Deno.test("watchNodes() asks a node again `intervalMs` after its last answer, and not before that was taken", async () => {
  const asked: number[] = [];
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, () => {
    asked.push(performance.now());
    return Response.json({});
  });
  const controller = new AbortController();
  const nodes = nodesAt({ a: { hostname: "127.0.0.1", port: server.addr.port } });
  const told: NodeProbe[] = [];
  const onProbe = (probe: NodeProbe) => void told.push(probe);
  const watch = watchNodes(nodes, { intervalMs: 50, signal: controller.signal, onProbe });
  const { value: first } = await watch.next();
  assertEquals(told, [first]);
  await delay(200);
  assertEquals(asked.length, 1, "it was asked again before the outcome was taken");
  const { value } = await watch.next();
  assertEquals(outcomeOf(value!), "up");
  await delay(100);
  assertEquals(asked.length, 2);
  await watch.next();
  assertGreater(asked[2]! - asked[1]!, 48);
  await watch.return(undefined);
  // What was taken late is asked again at once.
  const late = watchNodes(nodes, { intervalMs: 700 });
  await late.next();
  await delay(750);
  const taken = performance.now();
  await late.next();
  assertLess(performance.now() - taken, SLACK_MS);
  await late.return(undefined);
});

Deno.test("watchNodes() tells of a node that comes up and goes down again", async () => {
  await using dead = await startNode("refuses");
  const watch = watchNodes(nodesAt({ a: dead }), { intervalMs: 20 });
  const until = async (outcome: string) => {
    for await (const probe of { [Symbol.asyncIterator]: () => ({ next: () => watch.next() }) }) {
      if (outcomeOf(probe) === outcome) return;
    }
  };
  await until("down refused");
  {
    await using _live = await startNode("ok", { port: dead.port });
    await until("up");
  }
  await until("down refused");
  await watch.return(undefined);
});

Deno.test("watchNodes() ends without an error when its signal aborts, whatever it waits for", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole");
  const cases: [ClusterNode[], intervalMs: number][] = [
    [nodesAt({ up }), 60_000],
    [nodesAt({ silent, hole }), 20],
    [nodesAt({ up, silent }), 20],
  ];
  for (const [nodes, intervalMs] of cases) {
    const controller = new AbortController();
    setTimeout(() => controller.abort(new Error("enough")), 100);
    const started = performance.now();
    for await (const _ of watchNodes(nodes, { intervalMs, timeoutMs: 20_000, signal: controller.signal }));
    assertLess(performance.now() - started, 100 + SLACK_MS);
  }
  const before = up.connections;
  for await (const _ of watchNodes(nodesAt({ up }), { signal: AbortSignal.abort() })) throw new Error("It began");
  assertEquals(up.connections, before);
  // Nothing is asked again that the loop itself ended: a timer for it would be a leak.
  const controller = new AbortController();
  for await (const _ of watchNodes(nodesAt({ up }), { signal: controller.signal })) {
    // By now nothing is under way, and nothing is due.
    await delay(50);
    controller.abort();
    await delay(1);
  }
});

Deno.test("watchNodes() gives nothing more once it was aborted, and throws what is thrown into it", async () => {
  await using up = await startNode("ok");
  const seen: NodeProbe[] = [];
  const controller = new AbortController();
  const watch = watchNodes(nodesAt({ a: up, b: up, c: up }), { signal: controller.signal });
  for await (const probe of { [Symbol.asyncIterator]: () => ({ next: () => watch.next() }) }) {
    seen.push(probe);
    // The others are known by now.
    await delay(100);
    controller.abort();
  }
  assertEquals(seen.length, 1);
  const reason = new Error("enough");
  const ending = new AbortController();
  const other = watchNodes(nodesAt({ up }), { signal: ending.signal });
  await other.next();
  ending.abort();
  assert(await assertRejects(() => other.throw(reason)) === reason);
});

Deno.test("watchNodes() keeps no process alive that no longer reads", async () => {
  await using up = await startNode("ok");
  const node = JSON.stringify({ name: "a", ...at(up) });
  assertEquals(
    await evaluate(`
    const watch = api.watchNodes([new api.ClusterNode(${node})], { intervalMs: 10 });
    const { value } = await watch.next();
    console.log(JSON.stringify(value.state));`),
    "up",
  );
});
