import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  type ClusterNode,
  type NodeProbe,
  watchNodes,
  type WatchOptions,
} from "../mod.ts";
import { startNode } from "./loopback_cluster.ts";
import { FAILING_CALLBACKS, nodesAt, REASON } from "./nodes.ts";
import { ROOT, start } from "./process.ts";
import { at, outcomeOf, SLACK_MS, tally } from "./sweep_process.ts";

/** For checks that must not come to their deadline. */
const LONG_MS = 20_000;

/** Reads a watch that goes on when the loop over it ends. */
function reading(
  watch: AsyncGenerator<NodeProbe>,
): AsyncIterable<NodeProbe> {
  const iterator = { next: () => watch.next() };
  return { [Symbol.asyncIterator]: () => iterator };
}

/** Starts a server that notes when it was asked. */
function startClock() {
  const askedMs: number[] = [];
  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };
  const server = Deno.serve(options, () => {
    askedMs.push(performance.now());
    return Response.json({});
  });

  return {
    hostname: "127.0.0.1",
    port: server.addr.port,
    askedMs,
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

Deno.test("watchNodes() yields each node on its own schedule, beside one that hangs", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");

  const seen: string[] = [];
  const options = { intervalMs: 20, timeoutMs: LONG_MS };
  for await (const probe of watchNodes(nodesAt({ silent, up }), options)) {
    seen.push(`${probe.node.name} ${outcomeOf(probe)}`);
    if (seen.length === 5) break;
  }
  assertEquals(tally(seen), { "up up": 5 });
  assertEquals([up.connections, silent.connections], [5, 1]);
});

Deno.test("watchNodes() calls onProbe() with each probe that it yields", async () => {
  await using up = await startNode("ok");

  const seen: NodeProbe[] = [];
  const onProbe = (probe: NodeProbe) => void seen.push(probe);
  const watch = watchNodes(nodesAt({ up }), { onProbe });
  const { value } = await watch.next();
  await watch.return(undefined);
  assertEquals(seen, [value]);
});

Deno.test("watchNodes() does not ask a node again before its last answer was taken", async () => {
  await using clock = startClock();

  const watch = watchNodes(nodesAt({ clock }), { intervalMs: 50 });
  await watch.next();
  await delay(200);
  assertEquals(clock.askedMs.length, 1);

  await watch.next();
  assertEquals(clock.askedMs.length, 2);
  await watch.return(undefined);
});

Deno.test("watchNodes() asks a node again `intervalMs` after its last answer, not sooner", async () => {
  await using clock = startClock();

  const seen: NodeProbe[] = [];
  for await (
    const probe of watchNodes(nodesAt({ clock }), { intervalMs: 100 })
  ) {
    seen.push(probe);
    if (seen.length === 3) break;
  }
  const [first, second, third] = clock.askedMs as [number, number, number];
  assertGreater(second - first, 98);
  assertGreater(third - second, 98);
});

Deno.test("watchNodes() asks a node again at once whose answer was taken late", async () => {
  await using clock = startClock();

  const intervalMs = 3000;
  const watch = watchNodes(nodesAt({ clock }), { intervalMs });
  await watch.next();
  await delay(intervalMs + 100);

  const taken = performance.now();
  await watch.next();
  assertLess(performance.now() - taken, SLACK_MS);
  await watch.return(undefined);
});

Deno.test("watchNodes() reports a node that comes up and goes down again", async () => {
  await using dead = await startNode("refuses");
  const watch = watchNodes(nodesAt({ a: dead }), { intervalMs: 20 });
  const until = async (outcome: string) => {
    for await (const probe of reading(watch)) {
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

const ENDINGS: Record<string, WatchOptions> = {
  "the next check is far away": { intervalMs: 60_000 },
  "checks are under way": { intervalMs: 20, timeoutMs: LONG_MS },
};

for (const [what, options] of Object.entries(ENDINGS)) {
  Deno.test(`watchNodes() ends without an error when its signal aborts while ${what}`, async () => {
    await using up = await startNode("ok");
    await using silent = await startNode("silent");
    await using hole = await startNode("black-hole");
    const isUnderWay = options.timeoutMs !== undefined;
    const nodes = nodesAt(isUnderWay ? { silent, hole } : { up });

    const controller = new AbortController();
    const { signal } = controller;
    setTimeout(() => controller.abort(REASON), 200);
    const started = performance.now();
    const seen = await Array.fromAsync(
      watchNodes(nodes, { ...options, signal }),
    );
    assertLess(performance.now() - started, 200 + SLACK_MS);
    assertEquals(seen.length, isUnderWay ? 0 : 1);
  });
}

Deno.test("watchNodes() with a signal that is aborted ends before anything is asked", async () => {
  await using up = await startNode("ok");

  const signal = AbortSignal.abort(REASON);
  const seen = await Array.fromAsync(watchNodes(nodesAt({ up }), { signal }));
  assertEquals([seen, up.connections], [[], 0]);
});

Deno.test("watchNodes() ends when its signal aborts while the loop is busy", async () => {
  await using up = await startNode("ok");

  const controller = new AbortController();
  const { signal } = controller;
  let count = 0;
  for await (const _ of watchNodes(nodesAt({ up }), { signal })) {
    // Nothing is under way by now, and nothing is due: a timer for it would be
    // a leak.
    count++;
    await delay(50);
    controller.abort();
    await delay(1);
  }
  assertEquals(count, 1);
});

Deno.test("watchNodes() yields nothing more after an abort, also what is known", async () => {
  await using up = await startNode("ok");

  const controller = new AbortController();
  const { signal } = controller;
  const seen: NodeProbe[] = [];
  for await (const probe of watchNodes(nodesAt({ a: up, b: up }), { signal })) {
    seen.push(probe);
    // The other one is known by now.
    await delay(200);
    controller.abort();
  }
  assertEquals(seen.length, 1);
});

Deno.test("watchNodes() throws what is thrown into it, after an abort too", async () => {
  await using up = await startNode("ok");

  const controller = new AbortController();
  const { signal } = controller;
  const watch = watchNodes(nodesAt({ up }), { signal });
  await watch.next();
  controller.abort();
  assert(await assertRejects(() => watch.throw(REASON)) === REASON);
});

const EXPORTS = `import { ClusterNode, watchNodes } from "${ROOT}mod.ts";`;

const SCRIPTS: Record<string, [script: string, output: string]> = {
  "a watch of no nodes": [
    `for await (const probe of watchNodes([])) console.log(probe);
    console.log("ended");`,
    "ended",
  ],
  "a watch that is no longer read": [
    `const watch = watchNodes([node], { intervalMs: 10 });
    const { value } = await watch.next();
    console.log(value.state);`,
    "up",
  ],
  "a watch whose loop was left": [
    `for await (const probe of watchNodes([node], { intervalMs: 10 })) {
      console.log(probe.state);
      break;
    }`,
    "up",
  ],
};

for (const [what, [script, output]] of Object.entries(SCRIPTS)) {
  Deno.test(`watchNodes() lets a script end after ${what}`, async () => {
    await using up = await startNode("ok");

    const fields = JSON.stringify({ name: "a", ...at(up) });
    const program = `${EXPORTS}
    const node = new ClusterNode(${fields});
    ${script}`;
    const args = ["eval", "-q", "--config", `${ROOT}deno.json`, program];
    await using running = start("deno", args, { limitMs: 10_000 });
    const { code, stdout, stderr } = await running.end();
    assertEquals({ code, stdout, stderr }, {
      code: 0,
      stdout: [output],
      stderr: [],
    });
  });
}

async function readAll(nodes: ClusterNode[], options: WatchOptions) {
  return await Array.fromAsync(watchNodes(nodes, options));
}

for (const [what, onProbe] of Object.entries(FAILING_CALLBACKS)) {
  Deno.test(`watchNodes() rejects at once if onProbe() ${what}`, async () => {
    await using up = await startNode("ok");
    await using silent = await startNode("silent");
    const nodes = nodesAt({ up, silent });

    const options = { onProbe, timeoutMs: LONG_MS, intervalMs: LONG_MS };
    const started = performance.now();
    assert(await assertRejects(() => readAll(nodes, options)) === REASON);
    assertLess(performance.now() - started, SLACK_MS);
  });
}
