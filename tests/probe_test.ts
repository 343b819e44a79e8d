import {
  assertEquals,
  assertGreater,
  assertMatch,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { endpointUrl } from "../cluster_hosts.ts";
import {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  type ClusterNodeFields,
  type FailureCode,
  type NodeProbe,
  type NodeState,
  probeNode,
} from "../mod.ts";
import {
  type Behaviour,
  type Conversation,
  send,
  startNode,
  untilClosed,
} from "./loopback_cluster.ts";
import { testUnless } from "./process.ts";
import { at, outcomeOf } from "./sweep_process.ts";

/** For nodes that do not answer in time; the others have the default. */
const SHORT_MS = 300;

/**
 * A label of 64 characters is one too long, so that no server is asked for it.
 */
const UNKNOWN_NAME = `${"x".repeat(64)}.invalid`;

function node(fields: Omit<ClusterNodeFields, "name">): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** Returns `STATE`, or `STATE CODE: MESSAGE`. */
function describe(probe: NodeProbe): string {
  const outcome = outcomeOf(probe);
  return probe.failure ? `${outcome}: ${probe.failure.message}` : outcome;
}

const NO_ANSWER =
  `unhealthy timeout: accepted, but no answer within ${SHORT_MS} ms`;

const OUTCOMES: Record<
  Exclude<Behaviour, "echo">,
  "up" | `${NodeState} ${FailureCode}: ${string}`
> = {
  "ok": "up",
  "refuses": "down refused: nothing listens on the port",
  "black-hole": `down timeout: no connection within ${SHORT_MS} ms`,
  "silent": NO_ANSWER,
  "trickle-head": NO_ANSWER,
  "trickle-body": NO_ANSWER,
  "endless-1xx": "unhealthy too-large: the head of the answer is larger than",
  "endless-body": "unhealthy too-large: the answer is larger than",
  "length-short": "unhealthy bad-response: the answer is not JSON",
  "length-long": NO_ANSWER,
  "too-large": "unhealthy too-large: the answer is larger than",
  "gzip": "unhealthy bad-response: the answer is compressed",
  "ssh-banner": "unhealthy bad-response: the answer is not HTTP",
  "reset": "unhealthy bad-response: ",
  "closes": "unhealthy bad-response: ",
  "not-json": "unhealthy bad-response: the answer is not JSON",
  "json-array":
    "unhealthy bad-response: the answer is JSON, but a list, not an object",
  "http-500": "unhealthy http-status: HTTP 500",
  "redirect": "unhealthy redirect: HTTP 302, to http://127.0.0.1:",
};

for (const [behaviour, expected] of Object.entries(OUTCOMES)) {
  const [outcome] = expected.split(":");

  Deno.test(`probeNode() reports a node that is ${behaviour} as ${outcome}`, async () => {
    await using target = await startNode("silent");
    await using server = await startNode(behaviour as Behaviour, {
      target: `http://127.0.0.1:${target.port}/status`,
    });

    const timesOut = expected.includes(" timeout");
    const options = timesOut ? { timeoutMs: SHORT_MS } : {};
    const probe = await probeNode(node(at(server)), options);

    assertEquals(describe(probe).slice(0, expected.length), expected);
    assertEquals(target.connections, 0, "a redirect was followed");

    const isAccepted = probe.state === "up" || probe.state === "unhealthy";
    if (isAccepted) assertEquals(server.connections, 1, "it was asked twice");
    assertEquals(probe.address, isAccepted ? server.hostname : undefined);
    assertEquals(typeof probe.connectMs, isAccepted ? "number" : "undefined");

    const isUp = probe.state === "up";
    assertEquals(typeof probe.responseMs, isUp ? "number" : "undefined");
    const document = { version: "1.4.2", game_count: 12 };
    assertEquals(probe.status, isUp ? document : undefined);

    const { port, endpoint } = probe;
    assertEquals([port, endpoint?.port], [server.port, server.port]);
    assertEquals(endpoint?.host, "127.0.0.1");
  });
}

const ENDLESS = {
  "answers 102": "102 Processing\r\n\r\nHTTP/1.1 ",
  "a body": "200 OK\r\n\r\n[",
  "headers": "200 OK\r\nX: y\r\n",
};

for (const [what, text] of Object.entries(ENDLESS)) {
  Deno.test(`probeNode() reports ${what} without an end as unhealthy timeout at its deadline`, async () => {
    // Slow enough never to be too large; each write is an answer or a part of
    // its own.
    await using server = await startNode(async (conn, signal) => {
      await send(conn, "HTTP/1.1 ");
      while (true) {
        await send(conn, text);
        await delay(20, { signal });
      }
    });

    const probe = await probeNode(node(at(server)), { timeoutMs: SHORT_MS });
    assertEquals(describe(probe), NO_ANSWER);
  });
}

Deno.test("probeNode() reports what is not HTTP at once, on a connection that stays open", async () => {
  await using server = await startNode(async (conn) => {
    await send(conn, "+OK");
    await untilClosed(conn);
  });

  const probe = await probeNode(node(at(server)), { timeoutMs: 60_000 });
  assertEquals(
    describe(probe),
    "unhealthy bad-response: the answer is not HTTP",
  );
});

Deno.test("probeNode() returns in responseMs the time until the answer was whole", async () => {
  await using server = await startNode(async (conn) => {
    await send(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{");
    await delay(150);
    await send(conn, "}");
    await untilClosed(conn);
  });

  const { connectMs, responseMs } = await probeNode(node(at(server)));
  assertGreater(responseMs!, 140);
  assertGreater(responseMs!, connectMs!);
});

for (const behaviour of ["ok", "silent", "closes", "http-500"] as const) {
  Deno.test(`probeNode() with check "tcp" reports a node that is ${behaviour} as up`, async () => {
    await using server = await startNode(behaviour);

    const probe = await probeNode(node(at(server)), { check: "tcp" });
    assertEquals(describe(probe), "up");
    assertEquals([probe.address, probe.status], ["127.0.0.1", undefined]);
    assertEquals(typeof probe.connectMs, "number");
  });
}

Deno.test('probeNode() with check "tcp" reports a node that refuses as down refused', async () => {
  await using server = await startNode("refuses");

  const probe = await probeNode(node(at(server)), { check: "tcp" });
  assertEquals(outcomeOf(probe), "down refused");
});

for (const dead of ["refuses", "silent", "black-hole", "http-500"] as const) {
  const accepts = dead === "silent" || dead === "http-500";
  const checks = accepts ? ["http"] as const : ["http", "tcp"] as const;

  for (const check of checks) {
    for (const place of ["first", "second"]) {
      Deno.test(`probeNode() with check "${check}" reports a node as up whose ${place} address is ${dead}`, async () => {
        await using live = await startNode("ok", { hostname: "127.0.0.2" });
        const { port } = live;
        await using other = await startNode(dead, {
          hostname: "127.0.0.3",
          port,
        });

        const hosts = [live.hostname, other.hostname];
        if (place === "first") hosts.reverse();
        const [tailscaleIp, ssh] = hosts;
        const fields = {
          tailscaleIp: tailscaleIp!,
          sshHost: `root@${ssh}`,
          dataServerPort: port,
        };

        const probe = await probeNode(node(fields), { check });
        assertEquals([describe(probe), probe.address], ["up", "127.0.0.2"]);
      });
    }
  }
}

Deno.test("probeNode() leaves the second address alone if the first one answers soon", async () => {
  await using first = await startNode("ok", { hostname: "127.0.0.2" });
  await using second = await startNode("silent", {
    hostname: "127.0.0.3",
    port: first.port,
  });

  const fields = { sshHost: second.hostname, dataServerPort: first.port };
  const both = node({ tailscaleIp: first.hostname, ...fields });
  const probe = await probeNode(both);
  assertEquals([describe(probe), probe.address], ["up", first.hostname]);
  assertEquals(second.connections, 0);
});

Deno.test("probeNode() reports both reasons of two dead addresses, within one deadline", async () => {
  await using hole = await startNode("black-hole", { hostname: "127.0.0.2" });

  const { port } = hole;
  const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.3" };
  const both = node({ ...fields, dataServerPort: port });
  const probe = await probeNode(both, { timeoutMs: SHORT_MS });
  assertEquals(
    describe(probe),
    `down timeout: 127.0.0.2:${port}: no connection within ${SHORT_MS} ms; ` +
      `127.0.0.3:${port}: nothing listens on the port`,
  );
  const hosts = probe.endpoints.map(({ host }) => host);
  assertEquals(hosts, ["127.0.0.2", "127.0.0.3"]);
});

for (const place of ["first", "second"]) {
  Deno.test(`probeNode() reports the address that answers wrongly, ${place}, beside one that is dead`, async () => {
    await using broken = await startNode("http-500", { hostname: "127.0.0.2" });

    const hosts = ["127.0.0.2", "127.0.0.3"];
    if (place === "second") hosts.reverse();
    const [tailscaleIp, sshHost] = hosts as [string, string];
    const fields = { tailscaleIp, sshHost, dataServerPort: broken.port };

    const probe = await probeNode(node(fields));
    assertEquals(outcomeOf(probe), "unhealthy http-status");
    assertMatch(probe.failure!.message, /HTTP 500/);
    assertEquals(probe.address, "127.0.0.2");
  });
}

for (const check of ["http", "tcp", "ssh"] as const) {
  Deno.test(`probeNode() with check "${check}" reports a node without an address as down no-address`, async () => {
    const probe = await probeNode(node({}), { check });
    assertEquals(
      describe(probe),
      "down no-address: set tailscale_ip or ssh_host",
    );
    assertEquals([probe.address, probe.endpoint], [undefined, undefined]);
    assertEquals(probe.endpoints, []);
  });
}

Deno.test("probeNode() reports a name that does not resolve as down dns", async () => {
  const probe = await probeNode(node({ tailscaleIp: UNKNOWN_NAME }));
  assertMatch(describe(probe), /^down dns: the name does not resolve/);
});

Deno.test("probeNode() reports a node as up by its name", async () => {
  await using server = await startNode("ok");

  const fields = { tailscaleIp: "localhost", dataServerPort: server.port };
  const probe = await probeNode(node(fields));
  assertEquals([describe(probe), probe.address], ["up", "localhost"]);
});

Deno.test("probeNode() reports a node as up by its name, beside one that does not resolve", async () => {
  await using server = await startNode("ok");

  const fields = { tailscaleIp: UNKNOWN_NAME, sshHost: "root@localhost" };
  const both = node({ ...fields, dataServerPort: server.port });
  const probe = await probeNode(both);
  assertEquals([describe(probe), probe.address], ["up", "localhost"]);
});

const IPV6_FIELDS: Record<
  string,
  (port: number) => Omit<ClusterNodeFields, "name">
> = {
  "an IPv6 address": (dataServerPort) => {
    return { tailscaleIp: "::1", dataServerPort };
  },
  "an IPv6 address in brackets": (dataServerPort) => {
    return { tailscaleIp: "[::1]", dataServerPort };
  },
  "an IPv6 address behind a user": (dataServerPort) => {
    return { sshHost: "root@[::1]", dataServerPort };
  },
  "a URL with an IPv6 address": (port) => {
    return { dataServerUrl: `http://[::1]:${port}` };
  },
};

for (const [what, fieldsAt] of Object.entries(IPV6_FIELDS)) {
  testUnless(
    ipv6Missing(),
    `probeNode() reports a node as up by ${what}`,
    async () => {
      await using server = await startNode("ok", { hostname: "::1" });

      const probe = await probeNode(node(fieldsAt(server.port)));
      assertEquals([describe(probe), probe.address], ["up", "::1"]);
    },
  );
}

function ipv6Missing(): string | undefined {
  try {
    Deno.listen({ hostname: "::1", port: 0 }).close();
  } catch {
    return "needs ::1";
  }
}

const GREETINGS: Record<string, readonly string[]> = {
  "whole": ["SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13\r\n"],
  "in pieces": ["S", "SH", "-2.0-x\r\n"],
  "after other lines": ["Be warned.\r\n\r\n", "SSH-2.0-x\r\n"],
};

for (const [what, pieces] of Object.entries(GREETINGS)) {
  Deno.test(`probeNode() with check "ssh" reports a greeting ${what} as up`, async () => {
    await using server = await startNode(async (conn) => {
      for (const piece of pieces) {
        await send(conn, piece);
        await delay(20);
      }
      await untilClosed(conn);
    });

    const fields = { sshHost: "root@127.0.0.1", sshPort: server.port };
    const probe = await probeNode(node(fields), { check: "ssh" });
    assertEquals(describe(probe), "up");
    assertEquals([probe.address, probe.port], ["127.0.0.1", server.port]);
    assertEquals(probe.endpoint?.protocol, "ssh");
    assertEquals(probe.status, undefined);
  });
}

const NO_GREETINGS: Record<string, [Behaviour | Conversation, string]> = {
  "an HTTP server": ["not-json", "unhealthy timeout"],
  "another protocol": [
    async (conn) => {
      await send(conn, "220 ftp.example.test ready\r\n");
      await untilClosed(conn);
    },
    "unhealthy timeout",
  ],
  "another protocol that closes": [
    (conn) => send(conn, "220 ftp.example.test ready\r\n"),
    "unhealthy bad-response",
  ],
  "a connection that closes": ["closes", "unhealthy bad-response"],
  "a silent one": ["silent", "unhealthy timeout"],
  "half a greeting": [
    async (conn) => {
      await send(conn, "SSH");
      await untilClosed(conn);
    },
    "unhealthy timeout",
  ],
  "a port that refuses": ["refuses", "down refused"],
  "a black hole": ["black-hole", "down timeout"],
};

for (const [what, [behaviour, expected]] of Object.entries(NO_GREETINGS)) {
  Deno.test(`probeNode() with check "ssh" reports ${what} as ${expected}`, async () => {
    await using server = await startNode(behaviour);

    const fields = { tailscaleIp: "127.0.0.1", sshPort: server.port };
    const options = { check: "ssh", timeoutMs: SHORT_MS } as const;
    const probe = await probeNode(node(fields), options);
    assertEquals(outcomeOf(probe), expected, describe(probe));
  });
}

Deno.test('probeNode() with check "ssh" reports a node as up by the second of its SSH endpoints', async () => {
  await using greeting = await startNode("ssh-banner", {
    hostname: "127.0.0.3",
  });
  await using silent = await startNode("silent", {
    hostname: "127.0.0.2",
    port: greeting.port,
  });

  const fields = {
    tailscaleIp: greeting.hostname,
    sshHost: silent.hostname,
    sshPort: greeting.port,
  };
  const probe = await probeNode(node(fields), { check: "ssh" });
  assertEquals([describe(probe), probe.address], ["up", "127.0.0.3"]);
  assertEquals(silent.connections, 1);

  const endpoints = probe.endpoints.map((endpoint) => endpointUrl(endpoint));
  assertEquals(endpoints, [
    `ssh://127.0.0.2:${greeting.port}`,
    `ssh://127.0.0.3:${greeting.port}`,
    "ssh://127.0.0.3",
  ]);
});

Deno.test('probeNode() with check "ssh" does not ask the data server', async () => {
  await using ssh = await startNode("ssh-banner");
  await using data = await startNode("ok");

  const fields = {
    sshHost: "127.0.0.1",
    sshPort: ssh.port,
    dataServerUrl: `http://127.0.0.1:${data.port}`,
  };
  const probe = await probeNode(node(fields), { check: "ssh" });
  assertEquals([describe(probe), data.connections], ["up", 0]);
});

Deno.test("checkNodeReachable() returns whether probeNode() says up, whatever is checked", async () => {
  await using up = await startNode("ok");
  await using broken = await startNode("http-500");
  await using dead = await startNode("refuses");
  await using greeting = await startNode("ssh-banner");

  const tcp = { check: "tcp" } as const;
  const ssh = { check: "ssh" } as const;
  const greeted = { tailscaleIp: "127.0.0.1", sshPort: greeting.port };

  assertEquals(await checkNodeReachable(node(at(up))), true);
  assertEquals(await checkNodeReachable(node(at(broken))), false);
  assertEquals(await checkNodeReachable(node(at(broken)), tcp), true);
  assertEquals(await checkNodeReachable(node(at(dead)), tcp), false);
  assertEquals(await checkNodeReachable(node(greeted), ssh), true);
});

Deno.test("checkHttpEndpoint() returns the JSON object of an answer that has one", async () => {
  await using server = await startNode("ok");

  const document = { version: "1.4.2", game_count: 12 };
  const models = { models: [{ name: "square8_2p.pth", bytes: 4096 }] };
  const { port } = server;
  assertEquals(await checkHttpEndpoint("127.0.0.1", port), document);
  assertEquals(
    await checkHttpEndpoint("localhost", port, { path: "/models" }),
    models,
  );
});

for (const behaviour of ["http-500", "json-array", "not-json", "refuses"]) {
  Deno.test(`checkHttpEndpoint() returns undefined of a server that is ${behaviour}`, async () => {
    await using server = await startNode(behaviour as Behaviour);

    const document = await checkHttpEndpoint("127.0.0.1", server.port);
    assertEquals(document, undefined);
  });
}

Deno.test({
  name:
    "probeNode() without net permission reports unknown denied, with the flag",
  permissions: { net: false },
  async fn() {
    const addresses = { tailscaleIp: "127.0.0.1", sshHost: "127.0.0.2" };
    const probe = await probeNode(node({ ...addresses, dataServerPort: 9 }));
    assertEquals(outcomeOf(probe), "unknown denied");
    assertEquals(probe.address, undefined);
    assertEquals(probe.endpoints.map((endpoint) => endpointUrl(endpoint)), [
      "http://127.0.0.1:9",
      "http://127.0.0.2:9",
    ]);

    // Not in Deno's own words, which follow a question on a terminal.
    const { message } = probe.failure!;
    assertMatch(message, /Requires net access/);
    assertMatch(message, /--allow-net=127\.0\.0\.1:9/);
  },
});

Deno.test({
  name: "checkNodeReachable() without net permission throws with the flag",
  permissions: { net: false },
  async fn() {
    const addresses = { tailscaleIp: "127.0.0.1", sshHost: "127.0.0.2" };
    const both = node({ ...addresses, dataServerPort: 9 });
    const flag = "--allow-net=127.0.0.1:9,127.0.0.2:9";
    const { NotCapable } = Deno.errors;
    await assertRejects(() => checkNodeReachable(both), NotCapable, flag);
  },
});

Deno.test({
  name: "checkHttpEndpoint() without net permission throws with the flag",
  permissions: { net: false },
  async fn() {
    const flag = "--allow-net=127.0.0.1:9";
    const check = () => checkHttpEndpoint("127.0.0.1", 9);
    await assertRejects(check, Deno.errors.NotCapable, flag);
  },
});

Deno.test({
  name:
    "probeNode() with net permission for one of two addresses reports up by it",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using server = await startNode("ok");

    const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.1" };
    const both = node({ ...fields, dataServerPort: server.port });
    const probe = await probeNode(both);
    assertEquals([outcomeOf(probe), probe.address], ["up", "127.0.0.1"]);
  },
});

Deno.test({
  name:
    "probeNode() with net permission for one of two addresses, which is dead, reports unknown: never down",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using dead = await startNode("refuses");

    const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.1" };
    const both = node({ ...fields, dataServerPort: dead.port });
    assertEquals(outcomeOf(await probeNode(both)), "unknown denied");
  },
});

Deno.test("probeNode() reports a node as up by a name in data_server_url", async () => {
  await using server = await startNode("ok");

  const dataServerUrl = `http://localhost:${server.port}`;
  const probe = await probeNode(node({ dataServerUrl }));
  assertEquals([describe(probe), probe.address], ["up", "localhost"]);
});
