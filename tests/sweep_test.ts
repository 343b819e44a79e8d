import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { missingNetFlag } from "../cluster_hosts.ts";
import {
  ClusterNode,
  discoverReachableNodes,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
  type NodeProbe,
  probeNode,
  probeNodes,
  waitForNodes,
} from "../mod.ts";
import {
  type Behaviour,
  jsonAnswer,
  type LoopbackNode,
  readRequest,
  send,
  startNode,
  untilClosed,
} from "./loopback_cluster.ts";
import { FAILING_CALLBACKS, REASON } from "./nodes.ts";
import { denoRun, nextLine, ROOT, run, start } from "./process.ts";
import {
  at,
  copies,
  outcomeOf,
  SLACK_MS,
  sweepElsewhere,
  tally,
} from "./sweep_process.ts";

type Server = { readonly hostname: string; readonly port: number };

function manyAt(count: number, server: Server): ClusterNode[] {
  return copies(count, at(server)).map((fields) => new ClusterNode(fields));
}

const EACH = 50;

/** What each behaviour is at once. */
const QUICK: Partial<Record<Behaviour, string>> = {
  "ok": "up",
  "refuses": "down refused",
  "length-short": "unhealthy bad-response",
  "gzip": "unhealthy bad-response",
  "ssh-banner": "unhealthy bad-response",
  "reset": "unhealthy bad-response",
  "closes": "unhealthy bad-response",
  "not-json": "unhealthy bad-response",
  "json-array": "unhealthy bad-response",
  "http-500": "unhealthy http-status",
  "redirect": "unhealthy redirect",
  "endless-1xx": "unhealthy too-large",
  "endless-body": "unhealthy too-large",
  "too-large": "unhealthy too-large",
};

/** What each behaviour is at its deadline. */
const HANGING: Partial<Record<Behaviour, string>> = {
  "black-hole": "down timeout",
  "silent": "unhealthy timeout",
  "trickle-head": "unhealthy timeout",
  "trickle-body": "unhealthy timeout",
  "length-long": "unhealthy timeout",
};

const KINDS = [
  ["that answer", QUICK, 20_000],
  ["that hang", HANGING, 1000],
] as const;

for (const [what, behaviours, timeoutMs] of KINDS) {
  Deno.test(`probeNodes() of ${EACH} nodes of each kind ${what} asks each once, and keeps the order`, async () => {
    await using servers = new AsyncDisposableStack();
    const started: Record<string, LoopbackNode> = {};
    for (const behaviour of Object.keys(behaviours)) {
      const server = await startNode(behaviour as Behaviour);
      started[behaviour] = servers.use(server);
    }

    const each = Object.entries(started).map(([name, server]) => {
      return { name, ...at(server) };
    });
    const mixed = Array.from({ length: EACH }, () => each).flat();
    const nodes = mixed.map((fields) => new ClusterNode(fields));

    const known: NodeProbe[] = [];
    const onProbe = (probe: NodeProbe) => void known.push(probe);
    const probes = await probeNodes(nodes, { timeoutMs, onProbe });

    assertEquals(probes.map(({ node }) => node), nodes);
    assertEquals(known.length, nodes.length);
    assertEquals(new Set(known), new Set(probes));

    const outcomes = probes.map((probe) => {
      return `${probe.node.name}: ${outcomeOf(probe)}`;
    });
    const expected = Object.entries(behaviours).map(([name, outcome]) => {
      return [`${name}: ${outcome}`, EACH];
    });
    assertEquals(tally(outcomes), Object.fromEntries(expected));

    for (const [behaviour, server] of Object.entries(started)) {
      const accepts = behaviour !== "refuses" && behaviour !== "black-hole";
      if (accepts) assertEquals(server.connections, EACH, behaviour);
    }
  });
}

Deno.test("probeNodes() leaves no descriptor, and the process can end at once", async () => {
  await using servers = new AsyncDisposableStack();
  const nodes = [];
  for (const behaviour of Object.keys({ ...QUICK, ...HANGING })) {
    if (/endless|too-large/.test(behaviour)) continue;

    const server = servers.use(await startNode(behaviour as Behaviour));
    nodes.push(...copies(20, at(server)));
  }

  const options = { timeoutMs: 1500 };
  const { outcomes } = await sweepElsewhere({ nodes, options });
  assertEquals(tally(outcomes).up, 20);
});

Deno.test("probeNodes() that is aborted leaves no descriptor, and the process can end at once", async () => {
  await using servers = new AsyncDisposableStack();
  const nodes = [];
  for (const behaviour of Object.keys(HANGING)) {
    const server = servers.use(await startNode(behaviour as Behaviour));
    nodes.push(...copies(40, at(server)));
  }

  const options = { timeoutMs: 20_000 };
  const { reason } = await sweepElsewhere({ nodes, options, abortMs: 200 });
  assertEquals(reason, "enough");
});

Deno.test("probeNodes() has 1,000 silent nodes under way at once", async () => {
  await using silent = await startNode("silent");

  const nodes = copies(1000, at(silent));
  const options = { timeoutMs: 2000 };
  const { outcomes } = await sweepElsewhere({ nodes, options });
  assertEquals(tally(outcomes), { "unhealthy timeout": 1000 });
});

Deno.test("probeNodes() uses no proxy of the environment", async () => {
  await using server = await startNode("ok");
  await using proxy = await startNode("closes");
  const url = `http://127.0.0.1:${proxy.port}`;
  const names = ["http_proxy", "https_proxy", "all_proxy"];
  const proxies = names.flatMap((name) => {
    return [[name, url], [name.toUpperCase(), url]];
  });
  // Deno asks its own server for updates now and then, by the proxy.
  const env = {
    ...Object.fromEntries(proxies),
    DENO_NO_UPDATE_CHECK: "1",
  };

  const byUrl = { dataServerUrl: `http://127.0.0.1:${server.port}` };
  const nodes = [...copies(5, at(server)), ...copies(5, byUrl)];
  const { outcomes } = await sweepElsewhere({ nodes, options: {} }, { env });
  assertEquals(tally(outcomes), { up: 10 });
  assertEquals(proxy.connections, 0);

  const address = `http://127.0.0.1:${server.port}/status`;
  const fetches = `await fetch("${address}").catch(() => {})`;
  await run("deno", ["eval", "--no-config", fetches], { env });
  assertGreater(proxy.connections, 0, "no proxy: the test could not fail");
});

Deno.test("probeNodes() has at most `concurrency` nodes under way", async () => {
  let open = 0;
  let most = 0;
  await using server = await startNode(async (conn) => {
    open++;
    most = Math.max(most, open);
    await delay(20);
    open--;
    await send(conn, jsonAnswer({}));
    await untilClosed(conn);
  });

  const probes = await probeNodes(manyAt(20, server), { concurrency: 3 });
  assertEquals(tally(probes.map(outcomeOf)), { up: 20 });
  assertEquals(most, 3);
});

/** Probes the node of its first argument. */
const PROBE_PROGRAM = `
import { ClusterNode, probeNode } from "${ROOT}mod.ts";
const [fields, timeoutMs] = JSON.parse(Deno.args[0]);
const node = new ClusterNode(fields);
const { state, failure } = await probeNode(node, { timeoutMs });
console.log(state, failure?.message ?? "");
`;

Deno.test("probeNode() reports up although this process was stopped while the answer arrived", async () => {
  const asked = Promise.withResolvers<void>();
  await using server = await startNode(async (conn) => {
    await readRequest(conn);
    asked.resolve();
    await delay(200);
    await send(conn, jsonAnswer({}));
    await untilClosed(conn);
  });

  const argument = JSON.stringify([{ name: "a", ...at(server) }, 2000]);
  const deno = ["eval", "-q", "--config", `${ROOT}deno.json`];
  await using program = start("deno", [...deno, PROBE_PROGRAM, argument]);

  await asked.promise;
  program.process.kill("SIGSTOP");
  await delay(4000);
  program.process.kill("SIGCONT");
  assertEquals((await nextLine(program.stdout)).trim(), "up");
});

type Call = (signal: AbortSignal) => Promise<unknown>;

/** Returns every call that takes a signal, on 50 nodes of a server. */
function callsOn(server: Server): Record<string, Call> {
  const { port } = server;
  const hosts = Object.fromEntries(
    copies(50, {}).map(({ name }) => [name, { tailscale_ip: "127.0.0.1" }]),
  );
  const source = {
    hosts,
    elo_sync: { sync_port: port },
    distributed: { data_server_port: port },
  };
  const nodes = manyAt(50, server);

  return {
    "probeNode()": (signal) => probeNode(nodes[0]!, { signal }),
    "probeNodes()": (signal) => probeNodes(nodes, { signal }),
    "probeNodes() of few at a time": (signal) => {
      return probeNodes(nodes, { signal, concurrency: 3 });
    },
    "waitForNodes()": (signal) => waitForNodes(nodes, { signal }),
    "discoverReachableNodes()": (signal) => {
      return discoverReachableNodes({ source, signal });
    },
    "getSyncUrls()": (signal) => getSyncUrls({ source, port, signal }),
    "getEloSyncUrls()": (signal) => getEloSyncUrls({ source, signal }),
    "getDataSyncUrls()": (signal) => {
      return getDataSyncUrls({ source, signal, excludeSelf: false });
    },
  };
}

for (const name of Object.keys(callsOn({ hostname: "127.0.0.1", port: 9 }))) {
  Deno.test(`${name} rejects with the reason of a signal that is aborted, and asks nobody`, async () => {
    await using server = await startNode("silent");
    const call = callsOn(server)[name]!;

    const thrown = await assertRejects(() => call(AbortSignal.abort(REASON)));
    assert(thrown === REASON);
    await delay(20);
    assertEquals(server.connections, 0);
  });

  for (const behaviour of ["silent", "black-hole"] as const) {
    Deno.test(`${name} rejects at once with the reason of its signal, beside nodes that are ${behaviour}`, async () => {
      await using server = await startNode(behaviour);
      const call = callsOn(server)[name]!;

      const controller = new AbortController();
      const pending = assertRejects(() => call(controller.signal));
      await delay(100);
      const aborted = performance.now();
      controller.abort(REASON);
      assert(await pending === REASON);
      assertLess(performance.now() - aborted, SLACK_MS);
    });
  }
}

for (const reason of [null, undefined, 0, "", "enough", { a: 1 }]) {
  Deno.test(`probeNodes() rejects with the reason ${JSON.stringify(reason)}`, async () => {
    await using silent = await startNode("silent");
    const controller = new AbortController();
    const { signal } = controller;

    const call = async (): Promise<unknown> => {
      try {
        return await probeNodes(manyAt(3, silent), { signal });
      } catch (error) {
        return { error };
      }
    };
    const pending = call();
    controller.abort(reason);
    assertEquals(await pending, { error: signal.reason });
  });
}

const URL_CALLS = {
  discoverReachableNodes,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
};

for (const [name, call] of Object.entries(URL_CALLS)) {
  Deno.test(`${name}() rejects with the reason of its signal while the inventory is fetched`, async () => {
    await using silent = await startNode("silent");
    const source = `http://127.0.0.1:${silent.port}/hosts.yaml`;
    const controller = new AbortController();
    const options = { source, signal: controller.signal };

    const pending = assertRejects(() => call(options));
    await delay(50);
    controller.abort(REASON);
    assert(await pending === REASON);
  });
}

for (const [what, onProbe] of Object.entries(FAILING_CALLBACKS)) {
  Deno.test(`probeNodes() rejects at once if onProbe() ${what}`, async () => {
    await using server = await startNode("ok");
    await using silent = await startNode("silent");
    const nodes = [...manyAt(1, server), ...manyAt(50, silent)];

    const started = performance.now();
    const options = { onProbe, timeoutMs: 20_000 };
    assert(await assertRejects(() => probeNodes(nodes, options)) === REASON);
    assertLess(performance.now() - started, SLACK_MS);
  });
}

Deno.test("probeNodes() rejects if the last onProbe() rejects after all nodes are known", async () => {
  await using server = await startNode("ok");
  const onProbe = async () => {
    await delay(50);
    throw REASON;
  };

  const sweep = () => probeNodes(manyAt(1, server), { onProbe });
  assert(await assertRejects(sweep) === REASON);
});

Deno.test("probeNodes() rejects with the reason of a signal that is aborted in onProbe()", async () => {
  await using server = await startNode("ok");
  await using silent = await startNode("silent");
  const nodes = [...manyAt(1, server), ...manyAt(50, silent)];

  const controller = new AbortController();
  const options = {
    timeoutMs: 20_000,
    signal: controller.signal,
    onProbe: () => controller.abort(REASON),
  };
  assert(await assertRejects(() => probeNodes(nodes, options)) === REASON);
});

const DENIED = [
  { name: "a", tailscaleIp: "127.0.0.1", sshHost: "b.example.com" },
  { name: "b", tailscaleIp: "127.0.0.1" },
  { name: "c", dataServerUrl: "https://c.example.com/data" },
  { name: "d" },
];

Deno.test({
  name:
    "probeNodes() without net permission reports unknown denied, and never down",
  permissions: { net: false },
  async fn() {
    const nodes = DENIED.map((fields) => new ClusterNode(fields));
    const probes = await probeNodes(nodes);
    assertEquals(probes.map(outcomeOf), [
      "unknown denied",
      "unknown denied",
      "unknown denied",
      "down no-address",
    ]);
    assertEquals(
      missingNetFlag(probes),
      "--allow-net=127.0.0.1:8766,b.example.com:8766,c.example.com:443",
    );
    assertEquals(missingNetFlag(probes.slice(3)), undefined);
  },
});

const DENIED_CALLS: Record<string, () => Promise<unknown>> = {
  "discoverReachableNodes()": () => discoverReachableNodes({ source: SOURCE }),
  "getSyncUrls()": () => getSyncUrls({ source: SOURCE }),
  "waitForNodes()": () => {
    return waitForNodes(DENIED.map((fields) => new ClusterNode(fields)));
  },
};
const SOURCE = { hosts: { a: { tailscale_ip: "127.0.0.1" } } };

for (const [name, call] of Object.entries(DENIED_CALLS)) {
  Deno.test({
    name: `${name} without net permission throws with the flag`,
    permissions: { net: false },
    async fn() {
      const flag = "--allow-net=127.0.0.1:8766";
      await assertRejects(call, Deno.errors.NotCapable, flag);
    },
  });
}

Deno.test("probeNodes() under a net permission of one port checks that one alone", async () => {
  await using server = await startNode("ok");
  const flags = [`--allow-net=127.0.0.1:${server.port}`, "--allow-read=."];
  const program = `
    import { ClusterNode, probeNodes } from "${ROOT}mod.ts";
    const fields = ${JSON.stringify(at(server))};
    const nodes = [
      new ClusterNode({ name: "a", ...fields }),
      new ClusterNode({ name: "b", ...fields, dataServerPort: 9 }),
    ];
    const probes = await probeNodes(nodes);
    console.log(probes.map(({ state }) => state).join());
  `;
  const args = denoRun(flags, "").slice(0, -1);
  const result = await run("deno", [...args, "-"], { stdin: program });
  assertEquals(result.stdout, "up,unknown\n", result.stderr);
});

Deno.test("discoverReachableNodes() returns the active nodes that are up, in the order of the config", async () => {
  await using up = await startNode("ok", { hostname: "127.0.0.2" });
  await using broken = await startNode("http-500");
  await using dead = await startNode("refuses");

  const host = (server: Server, fields = {}) => ({
    tailscale_ip: server.hostname,
    data_server_port: server.port,
    ...fields,
  });
  const late = { tailscale_ip: "127.0.0.3", ssh_host: "root@127.0.0.2" };
  const hosts = {
    late: host(up, late),
    broken: host(broken),
    dead: host(dead),
    off: host(up, { status: "offline" }),
    up: host(up),
    bare: {},
  };
  const source = { hosts };

  const found = await discoverReachableNodes({ source });
  const rows = found.map(({ node, address, status, connectMs }) => {
    return [node.name, address, status.version, typeof connectMs];
  });
  assertEquals(rows, [
    ["late", "127.0.0.2", "1.4.2", "number"],
    ["up", "127.0.0.2", "1.4.2", "number"],
  ]);

  const selection = { names: ["off"] };
  const off = await discoverReachableNodes({ source, selection });
  assertEquals(off.map(({ node }) => node.name), ["off"]);
});
