import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  type NodeProbe,
  waitForNodes,
  type WaitOptions,
} from "../mod.ts";
import { answerSlowly, startNode } from "./loopback_cluster.ts";
import { byName, FAILING_CALLBACKS, nodesAt, REASON } from "./nodes.ts";
import { ROOT, start } from "./process.ts";
import { at, outcomeOf, SLACK_MS } from "./sweep_process.ts";

/** For waits that must not come to their deadline. */
const LONG_MS = 20_000;

Deno.test("waitForNodes() returns at once when enough are up, beside nodes that hang", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole");
  const nodes = nodesAt({ silent, up, hole });

  const seen: NodeProbe[] = [];
  const onProbe = (probe: NodeProbe) => void seen.push(probe);
  const options = { minUp: 1, timeoutMs: LONG_MS, onProbe };
  const started = performance.now();
  const probes = await waitForNodes(nodes, options);
  assertLess(performance.now() - started, SLACK_MS);

  assertEquals(probes.map(({ node }) => node), nodes);
  assertEquals(outcomeOf(probes[1]!), "up");
  assert(probes[0]!.state !== "up" && probes[2]!.state !== "up");

  // What was cut off is no outcome.
  await delay(50);
  assertEquals(seen.length, 1);
});

Deno.test("waitForNodes() returns when a late node answers, beside one that hangs", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");
  const nodes = nodesAt({ silent, up, late: dead });

  const seen: string[] = [];
  const onProbe = (probe: NodeProbe) => {
    seen.push(`${probe.node.name} ${outcomeOf(probe)}`);
  };
  const waiting = waitForNodes(nodes, {
    minUp: 2,
    timeoutMs: LONG_MS,
    intervalMs: 50,
    onProbe,
  });
  while (!seen.includes("late down refused")) await delay(10);

  await using _late = await startNode("ok", { port: dead.port });
  const started = performance.now();
  const { late, up: first } = byName(await waiting);
  assertLess(performance.now() - started, SLACK_MS);
  assertEquals([late, first, seen.at(-1)], ["up", "up", "late up"]);
});

Deno.test("waitForNodes() counts the last answer of a node, not the check that its deadline cut off", async () => {
  // Slow enough that the deadline falls into a later check.
  await using slow = await startNode(answerSlowly);
  await using dead = await startNode("refuses");
  await using up = await startNode("ok");
  const nodes = nodesAt({ slow, dead, up });

  const options = { deadlineMs: 1000, intervalMs: 100 };
  const started = performance.now();
  const probes = await waitForNodes(nodes, options);
  const ms = performance.now() - started;

  assertEquals(byName(probes), { slow: "up", dead: "down refused", up: "up" });
  assertGreaterOrEqual(ms, 990);
  assertLess(ms, 1000 + SLACK_MS);
});

Deno.test("waitForNodes() does not count a node that went down", async () => {
  const first = await startNode("ok");
  await using dead = await startNode("refuses");

  let isStopped = false;
  const onProbe = async ({ node, state }: NodeProbe) => {
    if (isStopped || node.name !== "first" || state !== "up") return;

    isStopped = true;
    await first[Symbol.asyncDispose]();
  };
  const options = { deadlineMs: 2000, intervalMs: 50, onProbe };
  const probes = await waitForNodes(nodesAt({ first, dead }), options);
  assertEquals(byName(probes), { first: "down refused", dead: "down refused" });
});

Deno.test("waitForNodes() reports at its deadline why each node is missing, one under way too", async () => {
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole");
  await using dead = await startNode("refuses");
  const nodes = nodesAt({ silent, hole, dead });

  const options = { deadlineMs: 500, timeoutMs: LONG_MS, intervalMs: 100 };
  const started = performance.now();
  const probes = await waitForNodes(nodes, options);
  assertLess(performance.now() - started, 500 + SLACK_MS);

  assertEquals(probes.map(({ node }) => node), nodes);
  const codes = probes.map(({ failure }) => failure?.code);
  assertEquals(codes, ["timeout", "timeout", "refused"]);

  // It says how long the check had, not how long it could have had.
  assertMatch(probes[0]!.failure!.message, /\b\d{1,3} ms\b/);
});

Deno.test("waitForNodes() reports a node that never had its turn as unknown", async () => {
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");

  const options = { deadlineMs: 500, timeoutMs: LONG_MS, concurrency: 1 };
  const probes = await waitForNodes(nodesAt({ silent, dead }), options);
  const expected = { silent: "unhealthy timeout", dead: "unknown other" };
  assertEquals(byName(probes), expected);
});

Deno.test("waitForNodes() checks once more before its deadline, however long the interval is", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");

  const seen = Promise.withResolvers<void>();
  const onProbe = ({ node }: NodeProbe) => {
    if (node.name === "late") seen.resolve();
  };
  const options = { deadlineMs: 3000, intervalMs: 60_000, onProbe };
  const waiting = waitForNodes(nodesAt({ up, late: dead }), options);

  await seen.promise;
  await using _late = await startNode(answerSlowly, { port: dead.port });
  assertEquals(byName(await waiting), { up: "up", late: "up" });
});

Deno.test("waitForNodes() returns nothing for no nodes, at once", async () => {
  assertEquals(await waitForNodes([]), []);
  assertEquals(await waitForNodes([], { until: "down" } as WaitOptions), []);
});

Deno.test("waitForNodes() with minUp 0 returns before anything is asked", async () => {
  await using silent = await startNode("silent");

  const probes = await waitForNodes(nodesAt({ silent }), { minUp: 0 });
  assertEquals(byName(probes), { silent: "unknown other" });
  assertEquals(silent.connections, 0);
});

Deno.test("waitForNodes() returns at once for nodes without an address", async () => {
  const nodes = [
    new ClusterNode({ name: "homeless" }),
    new ClusterNode({ name: "lost" }),
  ];

  const started = performance.now();
  const probes = await waitForNodes(nodes, { deadlineMs: LONG_MS });
  assertLess(performance.now() - started, SLACK_MS);

  const outcome = "down no-address";
  assertEquals(byName(probes), { homeless: outcome, lost: outcome });
});

Deno.test("waitForNodes() returns at once if those with an address cannot be enough", async () => {
  await using up = await startNode("ok");
  const nodes = [new ClusterNode({ name: "homeless" }), ...nodesAt({ up })];

  const started = performance.now();
  const probes = await waitForNodes(nodes, { deadlineMs: LONG_MS });
  assertLess(performance.now() - started, SLACK_MS);
  assertEquals(byName(probes).homeless, "down no-address");
});

Deno.test("waitForNodes() waits for the others beside a node without an address, if they can be enough", async () => {
  await using dead = await startNode("refuses");
  const homeless = new ClusterNode({ name: "homeless" });
  const nodes = [homeless, ...nodesAt({ late: dead })];

  const waiting = waitForNodes(nodes, {
    minUp: 1,
    deadlineMs: LONG_MS,
    intervalMs: 50,
  });
  await delay(200);
  await using _late = await startNode("ok", { port: dead.port });
  const expected = { homeless: "down no-address", late: "up" };
  assertEquals(byName(await waiting), expected);
});

/**
 * Waits in a script of its own, which prints its probes and says how it went
 * on.
 */
const WAIT_PROGRAM = `
import { ClusterNode, waitForNodes } from "${ROOT}mod.ts";
const [fields, options] = JSON.parse(Deno.args[0]);
const nodes = fields.map((it) => new ClusterNode(it));
const probes = await waitForNodes(nodes, options);
console.log(probes.map(({ state }) => state).join());
`;

const SCRIPTS: Record<string, [WaitOptions, string]> = {
  "its deadline while nothing is under way": [
    { deadlineMs: 300, intervalMs: 2000 },
    "down",
  ],
  "its deadline after many checks": [
    { deadlineMs: 300, intervalMs: 10 },
    "down",
  ],
  "a node that is down as it should": [
    { until: "down" } as WaitOptions,
    "down",
  ],
};

for (const [what, [options, state]] of Object.entries(SCRIPTS)) {
  Deno.test(`waitForNodes() lets a script end after ${what}`, async () => {
    await using dead = await startNode("refuses");

    const fields = [{ name: "a", ...at(dead) }];
    const argument = JSON.stringify([fields, options]);
    const deno = ["eval", "-q", "--config", `${ROOT}deno.json`];
    const args = [...deno, WAIT_PROGRAM, argument];
    await using script = start("deno", args, { limitMs: 10_000 });
    const { code, stdout, stderr } = await script.end();
    assertEquals({ code, stdout, stderr }, {
      code: 0,
      stdout: [state],
      stderr: [],
    });
  });
}

const CLOSED: Record<string, Record<string, string>> = {
  "that refuse": { a: "down refused", b: "down refused" },
  "that are unhealthy": {
    a: "unhealthy http-status",
    b: "unhealthy http-status",
  },
};

for (const [what, expected] of Object.entries(CLOSED)) {
  Deno.test(`waitForNodes() until "down" returns at once for nodes ${what}`, async () => {
    const behaviour = what === "that refuse" ? "refuses" : "http-500";
    await using a = await startNode(behaviour);
    await using b = await startNode(behaviour);

    const options = { until: "down", deadlineMs: LONG_MS } as const;
    const started = performance.now();
    const probes = await waitForNodes(nodesAt({ a, b }), options);
    assertLess(performance.now() - started, SLACK_MS);
    assertEquals(byName(probes), expected);
  });
}

Deno.test('waitForNodes() until "down" returns when the last node goes down', async () => {
  await using dead = await startNode("refuses");
  const last = await startNode("ok");
  const nodes = nodesAt({ dead, last });

  const seen = Promise.withResolvers<void>();
  const waiting = waitForNodes(nodes, {
    until: "down",
    deadlineMs: LONG_MS,
    intervalMs: 50,
    onProbe: ({ state }) => {
      if (state === "up") seen.resolve();
    },
  });
  await seen.promise;
  await last[Symbol.asyncDispose]();

  const expected = { dead: "down refused", last: "down refused" };
  assertEquals(byName(await waiting), expected);
});

Deno.test('waitForNodes() until "down" returns at once for a node without an address', async () => {
  const nodes = [new ClusterNode({ name: "homeless" })];
  const options = { until: "down", deadlineMs: LONG_MS } as const;

  const started = performance.now();
  const probes = await waitForNodes(nodes, options);
  assertLess(performance.now() - started, SLACK_MS);
  assertEquals(byName(probes), { homeless: "down no-address" });
});

Deno.test('waitForNodes() until "down" reports at its deadline the nodes that are up', async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");

  const options = { until: "down", deadlineMs: 500, intervalMs: 50 } as const;
  const probes = await waitForNodes(nodesAt({ up, dead }), options);
  assertEquals(byName(probes), { up: "up", dead: "down refused" });
});

Deno.test('waitForNodes() until "down" rejects minUp', async () => {
  await using dead = await startNode("refuses");

  const options = { until: "down", minUp: 1, deadlineMs: 500 } as const;
  const wait = () => waitForNodes(nodesAt({ dead }), options);
  await assertRejects(wait, TypeError, "minUp");
});

Deno.test({
  name:
    'waitForNodes() until "down" never counts a node that may not be checked',
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using dead = await startNode("refuses");
    const elsewhere = { hostname: "127.0.0.2", port: dead.port };
    const nodes = nodesAt({ denied: elsewhere, dead });

    const options = { until: "down", deadlineMs: 1000 } as const;
    const flag = `--allow-net=127.0.0.2:${dead.port}`;
    const wait = () => waitForNodes(nodes, options);
    await assertRejects(wait, Deno.errors.NotCapable, flag);
  },
});

Deno.test({
  name: "waitForNodes() counts a node that may not be checked as not up",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using up = await startNode("ok");
    const elsewhere = { hostname: "127.0.0.2", port: up.port };
    const nodes = nodesAt({ denied: elsewhere, up });

    const probes = await waitForNodes(nodes, { minUp: 1 });
    assertEquals(byName(probes), { denied: "unknown denied", up: "up" });
  },
});

Deno.test({
  name:
    "waitForNodes() throws the flag at once if those that may be checked cannot be enough",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using up = await startNode("ok");
    await using dead = await startNode("refuses");
    const denied = { hostname: "127.0.0.2", port: up.port };
    const flag = `--allow-net=127.0.0.2:${up.port}`;
    const { NotCapable } = Deno.errors;

    const started = performance.now();
    const all = () => waitForNodes(nodesAt({ denied, up }));
    await assertRejects(all, NotCapable, flag);
    const two = () => waitForNodes(nodesAt({ denied, dead }), { minUp: 2 });
    await assertRejects(two, NotCapable, flag);
    assertLess(performance.now() - started, SLACK_MS);
  },
});

Deno.test({
  name: "waitForNodes() asks a node again of which one address may be checked",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using dead = await startNode("refuses");
    const partly = new ClusterNode({
      name: "partly",
      tailscaleIp: "127.0.0.2",
      sshHost: "127.0.0.1",
      dataServerPort: dead.port,
    });

    const waiting = waitForNodes([partly], {
      deadlineMs: LONG_MS,
      intervalMs: 50,
    });
    await delay(200);
    await using _late = await startNode("ok", { port: dead.port });
    assertEquals(byName(await waiting), { partly: "up" });
  },
});

for (const [what, onProbe] of Object.entries(FAILING_CALLBACKS)) {
  Deno.test(`waitForNodes() rejects at once if onProbe() ${what}`, async () => {
    await using dead = await startNode("refuses");
    await using silent = await startNode("silent");
    const nodes = nodesAt({ dead, silent });

    const options = { onProbe, timeoutMs: LONG_MS, deadlineMs: LONG_MS };
    const started = performance.now();
    assert(await assertRejects(() => waitForNodes(nodes, options)) === REASON);
    assertLess(performance.now() - started, SLACK_MS);
  });
}

Deno.test("waitForNodes() rejects if the onProbe() of the last node rejects, a moment later", async () => {
  await using up = await startNode("ok");
  const onProbe = async () => {
    await delay(50);
    throw REASON;
  };

  const wait = () => waitForNodes(nodesAt({ up }), { onProbe });
  assert(await assertRejects(wait) === REASON);
});
