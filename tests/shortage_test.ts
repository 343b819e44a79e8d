import {
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, watchNodes } from "../mod.ts";
import { answerSlowly, startNode } from "./loopback_cluster.ts";
import { denoRun, programMissing, run, testUnless } from "./process.ts";
import {
  at,
  copies,
  sweepElsewhere,
  takeDescriptors,
  tally,
  withDescriptors,
} from "./sweep_process.ts";
import { makeCertificates } from "./tls.ts";

Deno.test("probeNodes() reports all of 500 nodes as up with 64 descriptors", async () => {
  await using server = await startNode("ok");

  const plan = { nodes: copies(500, at(server)), options: {} };
  const enter = withDescriptors(64);
  const { outcomes } = await sweepElsewhere(plan, { enter });
  assertEquals(tally(outcomes), { up: 500 });
});

for (const limit of [40, 48, 64]) {
  Deno.test(`probeNodes() reports all of 300 nodes at a name as up with ${limit} descriptors, each time`, async () => {
    await using server = await startNode(answerSlowly);

    const fields = { ...at(server), tailscaleIp: "localhost" };
    const plan = { nodes: copies(300, fields), options: {} };
    const enter = withDescriptors(limit);
    for (let run = 1; run <= 3; run++) {
      const { outcomes } = await sweepElsewhere(plan, { enter });
      assertEquals(tally(outcomes), { up: 300 }, `run ${run}`);
    }
  });
}

Deno.test("probeNodes() reports all of 200 nodes that answer slowly, half by name, as up with 64 descriptors", async () => {
  await using server = await startNode(answerSlowly);

  const fields = at(server);
  const nodes = copies(200, fields).map((node, index) => {
    return index % 2 === 0 ? node : { ...node, tailscaleIp: "localhost" };
  });
  const enter = withDescriptors(64);
  const { outcomes } = await sweepElsewhere({ nodes, options: {} }, { enter });
  assertEquals(tally(outcomes), { up: 200 });
});

Deno.test("probeNodes() does not let a node pay for a shortage with its deadline", async () => {
  await using server = await startNode(answerSlowly);

  // All rounds together take much longer than one deadline.
  const options = { timeoutMs: 1500 };
  const plan = { nodes: copies(600, at(server)), options };
  const enter = withDescriptors(64);
  const { outcomes, ms } = await sweepElsewhere(plan, { enter });
  assertEquals(tally(outcomes), { up: 600 });
  assertGreater(ms, 1500, "the test could not fail");
});

Deno.test("probeNodes() reports all of 600 black holes as down with 256 descriptors", async () => {
  await using hole = await startNode("black-hole");

  const options = { timeoutMs: 400 };
  const plan = { nodes: copies(600, at(hole)), options };
  const enter = withDescriptors(256);
  const { outcomes } = await sweepElsewhere(plan, { enter });
  assertEquals(tally(outcomes), { "down timeout": 600 });
});

Deno.test("probeNodes() reports a name that does not exist as down dns, with 64 descriptors too", async () => {
  const tailscaleIp = `${"x".repeat(64)}.invalid`;
  const plan = { nodes: copies(300, { tailscaleIp }), options: {} };
  const enter = withDescriptors(64);
  const { outcomes } = await sweepElsewhere(plan, { enter });
  assertEquals(tally(outcomes), { "down dns": 300 });
});

for (const tailscaleIp of ["127.0.0.1", "::1"]) {
  Deno.test(`probeNodes() reports nodes at ${tailscaleIp} as unknown while there is no descriptor at all`, async () => {
    await using server = await startNode("ok");

    const plan = {
      nodes: copies(3, { ...at(server), tailscaleIp }),
      options: { timeoutMs: 300 },
      takesDescriptors: true,
      exits: true,
    };
    const enter = withDescriptors(64);
    const { outcomes } = await sweepElsewhere(plan, { enter });
    assertEquals(tally(outcomes), { "unknown local-resource": 3 });
  });
}

for (const host of ["127.0.0.1", "[::1]"]) {
  Deno.test(`probeNodes() reports nodes at https://${host} as unknown while there is no descriptor at all`, async () => {
    await using server = await startNode("silent");

    const dataServerUrl = `https://${host}:${server.port}`;
    const plan = {
      nodes: copies(3, { dataServerUrl }),
      options: { timeoutMs: 300 },
      takesDescriptors: true,
      exits: true,
    };
    const enter = withDescriptors(64);
    const { outcomes } = await sweepElsewhere(plan, { enter });
    assertEquals(tally(outcomes), { "unknown local-resource": 3 });
  });
}

for (const dead of ["black-hole", "silent", "refuses"] as const) {
  Deno.test(`probeNodes() reports 60 nodes as up whose first address is ${dead}, with 64 descriptors`, async () => {
    await using live = await startNode("ok", { hostname: "127.0.0.2" });
    await using other = await startNode(dead, {
      hostname: "127.0.0.3",
      port: live.port,
    });

    const fields = { ...at(other), sshHost: live.hostname };
    const options = { timeoutMs: 1000 };
    const plan = { nodes: copies(60, fields), options };
    const enter = withDescriptors(64);
    const { outcomes } = await sweepElsewhere(plan, { enter });
    assertEquals(tally(outcomes), { up: 60 });
  });
}

for (const host of ["127.0.0.1", "localhost"]) {
  Deno.test(`probeNodes() with check "ssh" reports 300 nodes at ${host} as up with 64 descriptors`, async () => {
    await using server = await startNode("ssh-banner");

    const fields = { sshHost: host, sshPort: server.port };
    const options = { check: "ssh" } as const;
    const plan = { nodes: copies(300, fields), options };
    const enter = withDescriptors(64);
    const { outcomes } = await sweepElsewhere(plan, { enter });
    assertEquals(tally(outcomes), { up: 300 });
  });

  testUnless(
    programMissing("openssl"),
    `probeNodes() reports 300 nodes at https://${host} as up with 64 descriptors`,
    async () => {
      await using certificates = await makeCertificates();
      const { key, cert } = await certificates.of("good");
      const options = { hostname: "127.0.0.1", port: 0, key, cert };
      await using server = Deno.serve({ ...options, onListen() {} }, () => {
        return Response.json({});
      });

      const dataServerUrl = `https://${host}:${server.addr.port}`;
      const plan = { nodes: copies(300, { dataServerUrl }), options: {} };
      const enter = withDescriptors(64);
      const { env } = certificates;
      const { outcomes } = await sweepElsewhere(plan, { enter, env });
      assertEquals(tally(outcomes), { up: 300 });
    },
  );
}

interface Rates {
  /** Probes in a second before, and at last after the shortage. */
  readonly before: number;
  readonly after: number;

  /** States during the shortage and after it. */
  readonly states: Readonly<Record<string, number>>;
}

Deno.test("watchNodes() has its rate again after a moment without descriptors", async () => {
  await using server = await startNode(answerSlowly);

  const [program, ...args] = [
    ...withDescriptors(96),
    "deno",
    ...denoRun(["-A"], "tests/shortage_test.ts"),
    String(server.port),
  ];
  const { code, stdout, stderr } = await run(program!, args);
  assertEquals({ code, stderr }, { code: 0, stderr: "" });

  const rates: Rates = JSON.parse(stdout);
  assertGreaterOrEqual(rates.after, rates.before / 2, stdout);

  const { up, unknown = 0, ...others } = rates.states;
  assertGreater(up!, 0);
  assertEquals([others, unknown], [{}, unknown]);
});

/**
 * Watches 40 nodes while, for a moment, this process has no descriptor left.
 */
async function watchThroughShortage(dataServerPort: number): Promise<Rates> {
  const fields = { tailscaleIp: "127.0.0.1", dataServerPort };
  const nodes = copies(40, fields).map((it) => new ClusterNode(it));
  const controller = new AbortController();
  const { signal } = controller;
  const states: string[] = [];

  const watch = async () => {
    const options = { intervalMs: 50, timeoutMs: 2000, signal };
    for await (const { state } of watchNodes(nodes, options)) {
      states.push(state);
    }
  };
  const rate = async () => {
    const count = states.length;
    await delay(1000);
    return states.length - count;
  };

  const watching = watch();
  await delay(500);
  const before = await rate();

  // What a check gives back is taken too.
  const taken: Deno.FsFile[] = [];
  for (let waitedMs = 0; waitedMs < 1000; waitedMs += 20) {
    taken.push(...takeDescriptors());
    await delay(20);
  }
  for (const file of taken) file.close();

  let after = 0;
  for (let tries = 0; tries < 10 && after < before / 2; tries++) {
    after = await rate();
  }
  controller.abort();
  await watching;
  return { before, after, states: tally(states) };
}

if (import.meta.main) {
  const [port] = Deno.args;
  if (port) {
    const rates = await watchThroughShortage(Number(port));
    console.log(JSON.stringify(rates));
  }
}
