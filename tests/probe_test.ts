import { assert, assertEquals, assertGreater, assertMatch, assertRejects } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  type ClusterNodeFields,
  endpointUrl,
  type FailureCode,
  type NodeProbe,
  type NodeState,
  probeNode,
  type ProbeOptions,
} from "../mod.ts";
import { type Behaviour, type Conversation, send, startNode, untilClosed } from "./loopback_cluster.ts";
import { programMissing, run, tempFolder, testUnless } from "./process.ts";
import { at, outcomeOf } from "./sweep_process.ts";

/** For nodes that do not answer in time; the others have the default. */
const SHORT_MS = 300;

function node(fields: Omit<ClusterNodeFields, "name">): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** `STATE`, or `STATE CODE: MESSAGE`. */
function told(probe: NodeProbe): string {
  return probe.failure ? `${outcomeOf(probe)}: ${probe.failure.message}` : outcomeOf(probe);
}

const NO_ANSWER = `unhealthy timeout: accepted, but no answer within ${SHORT_MS} ms`;

const OUTCOMES: Record<Behaviour, "up" | `${NodeState} ${FailureCode}: ${string}`> = {
  ok: "up",
  refuses: "down refused: nothing listens on the port",
  "black-hole": `down timeout: no connection within ${SHORT_MS} ms`,
  silent: NO_ANSWER,
  "trickle-head": NO_ANSWER,
  "trickle-body": NO_ANSWER,
  "endless-1xx": "unhealthy too-large: the head of the answer is larger than 65536 bytes",
  "endless-body": "unhealthy too-large: the answer is larger than 1048576 bytes",
  "length-short": "unhealthy bad-response: the answer is not JSON",
  "length-long": NO_ANSWER,
  "too-large": "unhealthy too-large: the answer is larger than 1048576 bytes",
  gzip: "unhealthy bad-response: the answer is compressed",
  "ssh-banner": "unhealthy bad-response: the answer is not HTTP",
  reset: "unhealthy bad-response: ",
  closes: "unhealthy bad-response: ",
  "not-json": "unhealthy bad-response: the answer is not JSON",
  "json-array": "unhealthy bad-response: the answer is JSON, but a list, not an object",
  "http-500": "unhealthy http-status: HTTP 500",
  redirect: "unhealthy redirect: HTTP 302, to http://127.0.0.1:",
};

for (const [behaviour, expected] of Object.entries(OUTCOMES) as [Behaviour, string][]) {
  Deno.test(`probeNode() of a node that is ${behaviour}: ${expected.split(":")[0]}`, async () => {
    await using target = await startNode("silent");
    await using server = await startNode(behaviour, { target: `http://127.0.0.1:${target.port}/status` });
    const timesOut = expected.includes(" timeout");
    const probe = await probeNode(node(at(server)), timesOut ? { timeoutMs: SHORT_MS } : {});
    assertEquals(told(probe).slice(0, expected.length), expected);
    assertEquals(target.connections, 0, "a redirect was followed");
    const wasAccepted = behaviour !== "refuses" && behaviour !== "black-hole";
    if (wasAccepted) assertEquals(server.connections, 1, "it was asked twice");
    assertEquals(probe.address, wasAccepted ? server.hostname : undefined);
    assertEquals(typeof probe.connectMs, wasAccepted ? "number" : "undefined");
    assertEquals(typeof probe.responseMs, expected === "up" ? "number" : "undefined");
    assertEquals([probe.port, probe.endpoint?.host, probe.endpoint?.port], [server.port, "127.0.0.1", server.port]);
    assertEquals(probe.status, behaviour === "ok" ? { version: "1.4.2", game_count: 12 } : undefined);
  });
}

Deno.test("probeNode() keeps its deadline at answers without end", async () => {
  // Slow enough never to be too large, each write an answer or a part of its own.
  const endless = (text: string): Conversation => async (conn, signal) => {
    await send(conn, "HTTP/1.1 ");
    for (;; await delay(20, { signal })) await send(conn, text);
  };
  const texts = ["102 Processing\r\n\r\nHTTP/1.1 ", "200 OK\r\n\r\n[", "200 OK\r\nX: y\r\n"];
  await Promise.all(texts.map(async (text) => {
    await using server = await startNode(endless(text));
    assertEquals(told(await probeNode(node(at(server)), { timeoutMs: SHORT_MS })), NO_ANSWER, text);
  }));
});

Deno.test("probeNode() refuses at once what is not HTTP, on a connection that stays open", async () => {
  await using server = await startNode(async (conn) => {
    await send(conn, "+OK");
    await untilClosed(conn);
  });
  assertEquals(told(await probeNode(node(at(server)))), "unhealthy bad-response: the answer is not HTTP");
});

Deno.test("probeNode() takes connectMs until it is accepted, responseMs until the answer is whole", async () => {
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

Deno.test('probeNode() with check "tcp" takes for up what accepts', async () => {
  for (const behaviour of ["ok", "silent", "closes", "http-500"] as const) {
    await using server = await startNode(behaviour);
    const probe = await probeNode(node(at(server)), { check: "tcp" });
    assertEquals([told(probe), probe.address, probe.status], ["up", "127.0.0.1", undefined], behaviour);
    assertEquals(typeof probe.connectMs, "number");
  }
  await using dead = await startNode("refuses");
  assertEquals(outcomeOf(await probeNode(node(at(dead)), { check: "tcp" })), "down refused");
});

for (const dead of ["refuses", "silent", "black-hole", "http-500"] as const) {
  Deno.test(`probeNode() finds a node by its other address if one is ${dead}, first or second`, async () => {
    await using live = await startNode("ok", { hostname: "127.0.0.2" });
    await using other = await startNode(dead, { hostname: "127.0.0.3", port: live.port });
    const dataServerPort = live.port;
    const [liveIp, deadIp] = [live.hostname, other.hostname];
    for (const check of ["http", "tcp"] as const) {
      const accepts = dead === "silent" || dead === "http-500";
      if (check === "tcp" && accepts) continue;
      const second = await probeNode(node({ tailscaleIp: deadIp, sshHost: `root@${liveIp}`, dataServerPort }), {
        check,
      });
      const first = await probeNode(node({ tailscaleIp: liveIp, sshHost: `root@${deadIp}`, dataServerPort }), {
        check,
      });
      assertEquals([told(second), second.address], ["up", liveIp], `${dead} first, ${check}`);
      assertEquals([told(first), first.address], ["up", liveIp], `${dead} second, ${check}`);
    }
  });
}

Deno.test("probeNode() leaves the second address alone if the first one answers soon", async () => {
  const soon: Conversation = async (conn) => {
    await delay(50);
    await send(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    await untilClosed(conn);
  };
  await using first = await startNode(soon, { hostname: "127.0.0.2" });
  await using second = await startNode("silent", { hostname: "127.0.0.3", port: first.port });
  const fields = { tailscaleIp: first.hostname, sshHost: second.hostname, dataServerPort: first.port };
  const probe = await probeNode(node(fields));
  assertEquals([told(probe), probe.address, second.connections], ["up", first.hostname, 0]);
});

Deno.test("probeNode() tells both reasons of two dead addresses, within one deadline", async () => {
  await using hole = await startNode("black-hole", { hostname: "127.0.0.2" });
  const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.3", dataServerPort: hole.port };
  const probe = await probeNode(node(fields), { timeoutMs: SHORT_MS });
  assertEquals(
    told(probe),
    `down timeout: 127.0.0.2:${hole.port}: no connection within ${SHORT_MS} ms; ` +
      `127.0.0.3:${hole.port}: nothing listens on the port`,
  );
  assertEquals(probe.endpoints.map(({ host }) => host), ["127.0.0.2", "127.0.0.3"]);
});

Deno.test("probeNode() of an address that answers wrongly and a dead one is unhealthy, at the one that answers", async () => {
  await using broken = await startNode("http-500", { hostname: "127.0.0.2" });
  for (const [tailscaleIp, sshHost] of [["127.0.0.2", "127.0.0.3"], ["127.0.0.3", "127.0.0.2"]] as const) {
    const probe = await probeNode(node({ tailscaleIp, sshHost, dataServerPort: broken.port }));
    assertEquals([told(probe), probe.address], ["unhealthy http-status: HTTP 500", "127.0.0.2"]);
  }
});

Deno.test("probeNode() of a node without an address: down no-address", async () => {
  const probe = await probeNode(node({}));
  assertEquals(told(probe), "down no-address: set tailscale_ip or ssh_host");
  assertEquals([probe.address, probe.port, probe.endpoints, probe.endpoint], [undefined, 8766, [], undefined]);
});

Deno.test("probeNode() of a name that does not resolve: down dns", async () => {
  // A label of 64 characters is one too long, so that nothing is asked of any server.
  const probe = await probeNode(node({ tailscaleIp: `${"x".repeat(64)}.invalid` }));
  assertMatch(told(probe), /^down dns: the name does not resolve/);
});

Deno.test("probeNode() reaches a node by its name, beside a name that does not resolve too", async () => {
  await using server = await startNode("ok");
  const dataServerPort = server.port;
  const bad = `${"x".repeat(64)}.invalid`;
  for (const fields of [{ tailscaleIp: "localhost" }, { tailscaleIp: bad, sshHost: "root@localhost" }]) {
    const probe = await probeNode(node({ ...fields, dataServerPort }));
    assertEquals([told(probe), probe.address], ["up", "localhost"]);
  }
});

testUnless(ipv6Missing(), "probeNode() reaches IPv6 addresses, in brackets or not", async () => {
  await using server = await startNode("ok", { hostname: "::1" });
  const dataServerPort = server.port;
  const all: Omit<ClusterNodeFields, "name">[] = [
    { tailscaleIp: "::1", dataServerPort },
    { tailscaleIp: "[::1]", dataServerPort },
    { sshHost: "root@[::1]", dataServerPort },
    { dataServerUrl: `http://[::1]:${dataServerPort}` },
  ];
  for (const fields of all) {
    const probe = await probeNode(node(fields));
    assertEquals([told(probe), probe.address], ["up", "::1"], JSON.stringify(fields));
  }
});

function ipv6Missing(): string | undefined {
  try {
    Deno.listen({ hostname: "::1", port: 0 }).close();
  } catch {
    return "needs ::1";
  }
}

/** A server that answers each path by itself, and notes what was asked for. */
function startPaths(answers: Record<string, () => Response>) {
  const paths: string[] = [];
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
    const { pathname, search } = new URL(url);
    paths.push(pathname + search);
    return answers[pathname]?.() ?? new Response("Not found", { status: 404 });
  });
  return { port: server.addr.port, paths, [Symbol.asyncDispose]: () => server.shutdown() };
}

const gzipped = new Uint8Array(
  await new Response(new Blob(["{}"]).stream().pipeThrough(new CompressionStream("gzip"))).arrayBuffer(),
);
const HEALTH: Record<string, () => Response> = {
  "/json": () => Response.json({ a: 1 }),
  "/list": () => Response.json([1]),
  "/text": () => new Response("fine"),
  "/empty": () => new Response(""),
  "/204": () => new Response(null, { status: 204 }),
  "/gzip": () => new Response(gzipped, { headers: { "content-encoding": "gzip" } }),
  "/500": () => new Response("", { status: 500 }),
  "/302": () => new Response(null, { status: 302, headers: { location: "/json" } }),
};

Deno.test("probeNode() takes any whole 2xx answer at another path than /status, and names the path of a failure", async () => {
  await using server = startPaths(HEALTH);
  const expected: Record<string, string> = {
    "/json": "up",
    "/list": "up",
    "/text": "up",
    "/empty": "up",
    "/204": "up",
    "/gzip": "up",
    "/500": "unhealthy http-status: HTTP 500 at /500",
    "/302": "unhealthy redirect: HTTP 302, to /json at /302",
    "/none?x=y": "unhealthy http-status: HTTP 404 at /none?x=y",
  };
  for (const [path, outcome] of Object.entries(expected)) {
    const fields = { tailscaleIp: "127.0.0.1", dataServerPort: server.port };
    const [byOption, byNode] = await Promise.all([
      probeNode(node(fields), { path }),
      probeNode(node({ ...fields, statusPath: path })),
    ]);
    assertEquals([told(byOption), told(byNode)], [outcome, outcome], path);
    assertEquals(byOption.status, path === "/json" ? { a: 1 } : undefined, path);
  }
});

Deno.test("probeNode() wants a whole answer at another path too", async () => {
  const cases: Partial<Record<Behaviour, string>> = {
    "length-long": `unhealthy timeout: accepted, but no answer within ${SHORT_MS} ms at /health`,
    "too-large": "unhealthy too-large: the answer is larger than 1048576 bytes at /health",
    reset: "unhealthy bad-response: ",
    "ssh-banner": "unhealthy bad-response: the answer is not HTTP at /health",
    refuses: "down refused: nothing listens on the port",
  };
  for (const [behaviour, expected] of Object.entries(cases)) {
    await using server = await startNode(behaviour as Behaviour);
    const timeoutMs = behaviour === "length-long" ? SHORT_MS : 5000;
    const probe = await probeNode(node({ ...at(server), statusPath: "/health" }), { timeoutMs });
    if (behaviour === "reset") {
      assert(told(probe).startsWith(expected) && told(probe).endsWith(" at /health"), told(probe));
    } else assertEquals(told(probe), expected);
  }
});

Deno.test("probeNode() refuses an empty answer and 204 at /status", async () => {
  const cases: [Response, message: string][] = [
    [new Response(""), "the answer is not JSON"],
    [new Response(null, { status: 204 }), "HTTP 204, without a body"],
    [new Response(null, { status: 205 }), "HTTP 205, without a body"],
  ];
  for (const [response, message] of cases) {
    await using server = startPaths({ "/status": () => response });
    const probe = await probeNode(node({ tailscaleIp: "127.0.0.1", dataServerPort: server.port }));
    assertEquals(told(probe), `unhealthy bad-response: ${message}`);
  }
});

Deno.test("probeNode() takes an answer that says it is not compressed", async () => {
  await using server = startPaths({
    "/status": () => new Response("{}", { headers: { "content-encoding": "identity" } }),
  });
  assertEquals(told(await probeNode(node({ tailscaleIp: "127.0.0.1", dataServerPort: server.port }))), "up");
});

Deno.test("probeNode() refuses JSON that is null, too deep, or not UTF-8 at /status", async () => {
  const deep = `{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`;
  for (const body of ["null", "7", '"x"', deep, Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d)]) {
    await using server = startPaths({ "/status": () => new Response(body) });
    const probe = await probeNode(node({ tailscaleIp: "127.0.0.1", dataServerPort: server.port }));
    assertEquals(outcomeOf(probe), "unhealthy bad-response", String(body).slice(0, 20));
  }
});

Deno.test("probeNode() asks for the node's path at the port of its data server, whoever named it, else for /status", async () => {
  await using server = startPaths({ "/status": () => Response.json({}), "/health": () => new Response() });
  await using other = startPaths({ "/status": () => Response.json({}), "/x": () => new Response() });
  const own = { tailscaleIp: "127.0.0.1", dataServerPort: server.port, statusPath: "/health" };
  const cases: [ProbeOptions, typeof server, string][] = [
    [{}, server, "/health"],
    [{ port: server.port }, server, "/health"],
    [{ path: "/status" }, server, "/status"],
    [{ port: other.port }, other, "/status"],
    [{ port: other.port, path: "/x" }, other, "/x"],
  ];
  for (const [options, asked, path] of cases) {
    asked.paths.length = 0;
    assertEquals(told(await probeNode(node(own), options)), "up", JSON.stringify(options));
    assertEquals(asked.paths, [path], JSON.stringify(options));
  }
});

Deno.test("probeNode() asks data_server_url, base path included, and no address; with a port, the addresses", async () => {
  await using behind = startPaths({
    "/data/status": () => Response.json({ at: "url" }),
    "/data/health": () => new Response(),
  });
  await using direct = startPaths({ "/status": () => Response.json({ at: "address" }) });
  const fields = {
    tailscaleIp: "127.0.0.1",
    dataServerPort: direct.port,
    dataServerUrl: `http://127.0.0.1:${behind.port}/data/`,
  };
  const byUrl = await probeNode(node(fields));
  assertEquals([told(byUrl), byUrl.status, byUrl.address, byUrl.port], ["up", { at: "url" }, "127.0.0.1", behind.port]);
  assertEquals(told(await probeNode(node({ ...fields, statusPath: "/health" }))), "up");
  assertEquals(behind.paths, ["/data/status", "/data/health"]);
  assertEquals(direct.paths, []);
  assertEquals((await probeNode(node(fields), { port: direct.port })).status, { at: "address" });
});

testUnless(
  programMissing("openssl"),
  "probeNode() asks an https data_server_url, whose certificate has to be known",
  async () => {
    await using temp = await tempFolder();
    const [keyPath, certPath] = [`${temp.folder}/key.pem`, `${temp.folder}/cert.pem`];
    const { code, stderr } = await run("sh", [
      "-c",
      "exec openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost " +
      "-addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE " +
      `-keyout ${keyPath} -out ${certPath}`,
    ]);
    assertEquals(code, 0, stderr);
    const [key, cert] = [await Deno.readTextFile(keyPath), await Deno.readTextFile(certPath)];
    await using secure = Deno.serve(
      { hostname: "127.0.0.1", port: 0, key, cert, onListen() {} },
      ({ url }) => new URL(url).pathname === "/data/status" ? Response.json({}) : new Response("", { status: 404 }),
    );
    await using plain = await startNode("ok");
    const urls = [`https://localhost:${secure.addr.port}/data/`, `https://localhost:${plain.port}`];
    const { stdout } = await run("deno", ["run", "-q", "-A", "--config", "deno.json", "-"], {
      env: { DENO_CERT: certPath },
      stdin: `import { ClusterNode, probeNodes } from "./mod.ts";
      const nodes = ${JSON.stringify(urls)}.map((dataServerUrl) => new ClusterNode({ name: "x", dataServerUrl }));
      console.log((await probeNodes(nodes)).map(({ state, failure }) => state + " " + failure?.message));`,
    });
    assertMatch(stdout, /^\[ "up undefined", "unhealthy the server does not speak TLS" \]\n$/);
    const unknown = await probeNode(node({ dataServerUrl: urls[0]! }));
    assertMatch(told(unknown), /^unhealthy bad-response: the certificate is .*DENO_CERT/);
  },
);

Deno.test("checkNodeReachable() is probeNode() as a boolean, whatever is checked", async () => {
  await using up = await startNode("ok");
  await using broken = await startNode("http-500");
  await using dead = await startNode("refuses");
  assertEquals(await checkNodeReachable(node(at(up))), true);
  assertEquals(await checkNodeReachable(node(at(broken))), false);
  assertEquals(await checkNodeReachable(node(at(broken)), { check: "tcp" }), true);
  assertEquals(await checkNodeReachable(node(at(dead)), { check: "tcp" }), false);
});

Deno.test("checkHttpEndpoint() gives the JSON object, else undefined", async () => {
  await using server = startPaths({ ...HEALTH, "/status": () => Response.json({ version: "2" }) });
  assertEquals(await checkHttpEndpoint("127.0.0.1", server.port), { version: "2" });
  assertEquals(await checkHttpEndpoint("localhost", server.port, { path: "/json" }), { a: 1 });
  for (const path of ["/none", "/empty", "/list"]) {
    assertEquals(await checkHttpEndpoint("127.0.0.1", server.port, { path }), undefined, path);
  }
  await using dead = await startNode("refuses");
  assertEquals(await checkHttpEndpoint("127.0.0.1", dead.port), undefined);
});

const FAULTS: readonly (readonly [what: string, options: unknown, error: typeof TypeError | typeof RangeError])[] = [
  ["port 0", { port: 0 }, RangeError],
  ["port 65536", { port: 65_536 }, RangeError],
  ["port 1.5", { port: 1.5 }, RangeError],
  ["a port that is a string", { port: "80" }, TypeError],
  ["a timeout of 0", { timeoutMs: 0 }, RangeError],
  ["a timeout of NaN", { timeoutMs: NaN }, RangeError],
  ["a timeout of 25 days", { timeoutMs: 2 ** 31 }, RangeError],
  ["a path without a slash", { path: "status" }, TypeError],
  ["a path with a blank", { path: "/a b" }, TypeError],
  ["a path with a line end", { path: "/a\r\nX: y" }, TypeError],
  ["a path with an umlaut", { path: "/ä" }, TypeError],
  ["another check", { check: "icmp" }, TypeError],
];

Deno.test("probeNode() throws at a fault of the caller, before any connection", async () => {
  await using server = await startNode("ok");
  for (const [what, options, type] of FAULTS) {
    const error = await assertRejects(
      () => probeNode(node(at(server)), options as ProbeOptions),
      type,
      undefined,
      what,
    );
    assert(!/undefined|\[object/.test(error.message), error.message);
  }
  assertEquals(server.connections, 0);
});

Deno.test("checkHttpEndpoint() throws at a host that is a URL, blank, or no host at all", async () => {
  for (const host of ["http://h", "h/status", "a b", "", " ", "user@h", "h:80"]) {
    await assertRejects(() => checkHttpEndpoint(host, 80), TypeError, undefined, JSON.stringify(host));
  }
  await assertRejects(() => checkHttpEndpoint("h", "80" as unknown as number), TypeError);
  await assertRejects(() => checkHttpEndpoint("h", undefined as unknown as number), TypeError);
  await assertRejects(() => checkHttpEndpoint("h", 0), RangeError);
});

Deno.test({
  name: "without net permission a node is unknown, and what wants a plain answer throws with the flag",
  permissions: { net: false },
  async fn() {
    const both = node({ tailscaleIp: "127.0.0.1", sshHost: "127.0.0.2", dataServerPort: 9 });
    const probe = await probeNode(both);
    assertEquals([outcomeOf(probe), probe.address], ["unknown denied", undefined]);
    assertEquals(probe.endpoints.map((endpoint) => endpointUrl(endpoint)), [
      "http://127.0.0.1:9",
      "http://127.0.0.2:9",
    ]);
    // Not in Deno's own words, which come behind a question on a terminal.
    assertMatch(probe.failure!.message, /Requires net access: run again with --allow-net=127\.0\.0\.1:9;/);
    const flag = "--allow-net=127.0.0.1:9,127.0.0.2:9";
    await assertRejects(() => checkNodeReachable(both), Deno.errors.NotCapable, flag);
    await assertRejects(() => checkHttpEndpoint("127.0.0.1", 9), Deno.errors.NotCapable, "--allow-net=127.0.0.1:9");
  },
});

Deno.test({
  name: "with net permission for one of two addresses, a node is up by it, or unknown: never down",
  permissions: { net: ["127.0.0.1"] },
  async fn() {
    await using server = await startNode("ok");
    await using dead = await startNode("refuses");
    const fields = { tailscaleIp: "127.0.0.2", sshHost: "127.0.0.1" };
    const up = await probeNode(node({ ...fields, dataServerPort: server.port }));
    assertEquals([outcomeOf(up), up.address], ["up", "127.0.0.1"]);
    assertEquals(outcomeOf(await probeNode(node({ ...fields, dataServerPort: dead.port }))), "unknown denied");
  },
});
