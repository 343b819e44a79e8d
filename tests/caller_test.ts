import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  discoverReachableNodes,
  probeNode,
  probeNodes,
  waitForNodes,
  watchNodes,
} from "../mod.ts";
import { type LoopbackNode, startNode } from "./loopback_cluster.ts";
import { at } from "./sweep_process.ts";

type Fault = typeof TypeError | typeof RangeError;
type Options = Readonly<Record<string, unknown>>;

/** Calls as a script without types makes them. */
type Call = (nodes: unknown, options: unknown) => Promise<unknown>;

const SWEEPS: Record<string, Call> = {
  "probeNodes()": (nodes, options) => {
    return probeNodes(nodes as ClusterNode[], options as Options);
  },
  "waitForNodes()": (nodes, options) => {
    return waitForNodes(nodes as ClusterNode[], options as Options);
  },
  "watchNodes()": async (nodes, options) => {
    const watch = watchNodes(nodes as ClusterNode[], options as Options);
    const { value } = await watch.next();
    await watch.return(undefined);
    return value;
  },
};

const CALLS: Record<string, Call> = {
  ...SWEEPS,
  "probeNode()": (nodes, options) => {
    const [node] = nodes as [ClusterNode];
    return probeNode(node, options as Options);
  },
  "checkNodeReachable()": (nodes, options) => {
    const [node] = nodes as [ClusterNode];
    return checkNodeReachable(node, options as Options);
  },
};

/** Asserts that a call throws a sentence, before the server is contacted. */
async function assertFault(
  call: () => Promise<unknown>,
  fault: Fault,
  server: LoopbackNode,
): Promise<void> {
  const error = await assertRejects(call, fault);
  assert(error.constructor === fault, `it is a ${error.name}`);
  assertMatch(error.message, /\w+ \w+ \w+/);
  assert(!/undefined (?:is|\()|\[object/.test(error.message), error.message);
  assertEquals(server.connections, 0);
}

type OptionRow = readonly [what: string, options: Options, fault: Fault];

const OPTIONS: readonly OptionRow[] = [
  ["port 0", { port: 0 }, RangeError],
  ["port 65536", { port: 65_536 }, RangeError],
  ["port 1.5", { port: 1.5 }, RangeError],
  ['port "80"', { port: "80" }, TypeError],
  ["port null", { port: null }, TypeError],
  ["timeoutMs 0", { timeoutMs: 0 }, RangeError],
  ["timeoutMs -1", { timeoutMs: -1 }, RangeError],
  ["timeoutMs NaN", { timeoutMs: NaN }, RangeError],
  ["timeoutMs Infinity", { timeoutMs: Infinity }, RangeError],
  ["timeoutMs of 25 days", { timeoutMs: 2 ** 31 }, RangeError],
  ['timeoutMs "5s"', { timeoutMs: "5s" }, RangeError],
  ["a path without a slash", { path: "status" }, TypeError],
  ["a path with a blank", { path: "/a b" }, TypeError],
  ["a path with a line end", { path: "/a\r\nX: y" }, TypeError],
  ["a path with an umlaut", { path: "/ä" }, TypeError],
  ['check "icmp"', { check: "icmp" }, TypeError],
  ["check true", { check: true }, TypeError],
  ['a port with check "ssh"', { port: 22, check: "ssh" }, TypeError],
  ["a signal that is none", { signal: "SIGINT" }, TypeError],
];

for (const [name, call] of Object.entries(CALLS)) {
  for (const [what, options, fault] of OPTIONS) {
    Deno.test(`${name} rejects ${what}`, async () => {
      await using server = await startNode("ok");
      const nodes = [new ClusterNode({ name: "a", ...at(server) })];
      await assertFault(() => call(nodes, options), fault, server);
    });
  }
}

const SWEEP_OPTIONS: readonly OptionRow[] = [
  ["concurrency 0", { concurrency: 0 }, RangeError],
  ["concurrency 1.5", { concurrency: 1.5 }, RangeError],
  ["concurrency NaN", { concurrency: NaN }, RangeError],
  ['concurrency "10"', { concurrency: "10" }, RangeError],
  ["onProbe that is no function", { onProbe: "log" }, TypeError],
];

for (const [name, call] of Object.entries(SWEEPS)) {
  for (const [what, options, fault] of SWEEP_OPTIONS) {
    Deno.test(`${name} rejects ${what}, with no nodes too`, async () => {
      await using server = await startNode("ok");
      const nodes = [new ClusterNode({ name: "a", ...at(server) })];
      await assertFault(() => call(nodes, options), fault, server);
      await assertFault(() => call([], options), fault, server);
    });
  }
}

const WAIT_OPTIONS: readonly OptionRow[] = [
  ["minUp -1", { minUp: -1 }, RangeError],
  ["minUp 1.5", { minUp: 1.5 }, RangeError],
  ["minUp of more than there are", { minUp: 2 }, RangeError],
  ['minUp "1"', { minUp: "1" }, RangeError],
  ["intervalMs -1", { intervalMs: -1 }, RangeError],
  ["intervalMs NaN", { intervalMs: NaN }, RangeError],
  ["deadlineMs -1", { deadlineMs: -1 }, RangeError],
  ["deadlineMs NaN", { deadlineMs: NaN }, RangeError],
  ['until "gone"', { until: "gone" }, TypeError],
];

for (const [what, options, fault] of WAIT_OPTIONS) {
  Deno.test(`waitForNodes() rejects ${what}`, async () => {
    await using server = await startNode("ok");
    const nodes = [new ClusterNode({ name: "a", ...at(server) })];
    const wait = SWEEPS["waitForNodes()"]!;
    await assertFault(() => wait(nodes, options), fault, server);
  });
}

Deno.test("watchNodes() rejects intervalMs NaN", async () => {
  await using server = await startNode("ok");
  const nodes = [new ClusterNode({ name: "a", ...at(server) })];
  const watch = SWEEPS["watchNodes()"]!;
  const options = { intervalMs: NaN };
  await assertFault(() => watch(nodes, options), RangeError, server);
});

const NO_NODES: Record<string, (node: ClusterNode) => unknown> = {
  "a Map of nodes": (node) => new Map([["a", node]]),
  "names": () => ["a"],
  "a name": () => "a",
  "a promise of nodes": (node) => Promise.resolve([node]),
  "a node": (node) => node,
  "fields": () => [{ name: "a", tailscaleIp: "127.0.0.1" }],
  "a node and undefined": (node) => [node, undefined],
  "undefined": () => undefined,
  "null": () => null,
};

for (const [name, call] of Object.entries(SWEEPS)) {
  for (const [what, nodesOf] of Object.entries(NO_NODES)) {
    Deno.test(`${name} rejects ${what} instead of nodes`, async () => {
      await using server = await startNode("ok");
      const node = new ClusterNode({ name: "a", ...at(server) });
      const nodes = nodesOf(node);
      await assertFault(() => call(nodes, {}), TypeError, server);
    });
  }
}

const NO_NODE: Record<string, unknown> = {
  "a name": "a",
  "fields": { name: "a", tailscaleIp: "127.0.0.1" },
  "undefined": undefined,
};

for (const [what, value] of Object.entries(NO_NODE)) {
  Deno.test(`probeNode() rejects ${what} instead of a node`, async () => {
    await using server = await startNode("ok");
    const probe = () => probeNode(value as ClusterNode);
    await assertFault(probe, TypeError, server);
  });
}

const HOSTS = ["http://h", "h/status", "a b", "", " ", "user@h", "h:80"];

for (const host of HOSTS) {
  Deno.test(`checkHttpEndpoint() rejects the host ${JSON.stringify(host)}`, async () => {
    await assertRejects(() => checkHttpEndpoint(host, 80), TypeError);
  });
}

const PORTS: readonly (readonly [port: unknown, fault: Fault])[] = [
  ["80", TypeError],
  [undefined, TypeError],
  [0, RangeError],
  [65_536, RangeError],
];

for (const [port, fault] of PORTS) {
  Deno.test(`checkHttpEndpoint() rejects the port ${JSON.stringify(port)}`, async () => {
    const check = () => checkHttpEndpoint("localhost", port as number);
    await assertRejects(check, fault);
  });
}

const PROBE_OPTIONS = ["port", "path", "check", "timeoutMs", "signal"];
const ALL_SWEEP_OPTIONS = [...PROBE_OPTIONS, "concurrency", "onProbe"];
const WAIT_ONLY_OPTIONS = ["minUp", "until", "intervalMs", "deadlineMs"];

const DEFAULTS: Record<string, readonly string[]> = {
  "probeNode()": PROBE_OPTIONS,
  "checkNodeReachable()": PROBE_OPTIONS,
  "probeNodes()": ALL_SWEEP_OPTIONS,
  "watchNodes()": [...ALL_SWEEP_OPTIONS, "intervalMs"],
  "waitForNodes()": [...ALL_SWEEP_OPTIONS, ...WAIT_ONLY_OPTIONS],
};

for (const [name, options] of Object.entries(DEFAULTS)) {
  for (const option of options) {
    Deno.test(`${name} uses the default for ${option}: undefined`, async () => {
      await using server = await startNode("ok");
      const nodes = [new ClusterNode({ name: "a", ...at(server) })];

      const call = CALLS[name]!;
      const result = await call(nodes, { [option]: undefined });
      assertEquals(isUp(result), true);
    });
  }
}

/** Returns whether what a call gave says that its node is up. */
function isUp(result: unknown): boolean {
  const value = Array.isArray(result) ? result[0] : result;
  return value === true || value.state === "up";
}

/** Every option of every call, none of them set. */
const UNSET = Object.fromEntries(
  [...ALL_SWEEP_OPTIONS, ...WAIT_ONLY_OPTIONS, "selection"].map((option) => {
    return [option, undefined];
  }),
);

Deno.test("discoverReachableNodes() uses the defaults for options that are undefined", async () => {
  await using server = await startNode("ok");
  const hosts = {
    a: { tailscale_ip: server.hostname, data_server_port: server.port },
  };

  const options = { ...UNSET, source: { hosts } };
  const found = await discoverReachableNodes(options as object);
  assertEquals(found.map(({ node }) => node.name), ["a"]);
});

Deno.test("checkHttpEndpoint() uses the defaults for options that are undefined", async () => {
  await using server = await startNode("ok");

  const options = UNSET as object;
  const status = await checkHttpEndpoint("127.0.0.1", server.port, options);
  assertEquals(status?.version, "1.4.2");
});
