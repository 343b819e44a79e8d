import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import {
  ClusterNode,
  type ClusterNodeFields,
  type NodeProbe,
  probeNode,
  type ProbeOptions,
} from "../mod.ts";
import {
  type Behaviour,
  jsonAnswer,
  readRequest,
  send,
  startNode,
  untilClosed,
} from "./loopback_cluster.ts";
import { at, outcomeOf, SLACK_MS } from "./sweep_process.ts";

const SHORT_MS = 300;

function node(fields: Omit<ClusterNodeFields, "name">): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** Returns `STATE`, or `STATE CODE: MESSAGE`. */
function describe(probe: NodeProbe): string {
  const outcome = outcomeOf(probe);
  return probe.failure ? `${outcome}: ${probe.failure.message}` : outcome;
}

/**
 * Starts a server that answers each path by itself, and notes what was asked
 * for.
 */
function startPaths(answers: Record<string, () => Response>) {
  const paths: string[] = [];

  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };
  const server = Deno.serve(options, ({ url }) => {
    const { pathname, search } = new URL(url);
    paths.push(pathname + search);
    const answer = answers[pathname];
    return answer ? answer() : new Response("not found", { status: 404 });
  });

  return {
    hostname: "127.0.0.1",
    port: server.addr.port,
    paths,
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

/** Probes a node whose server answers everything with these bytes. */
async function probeAnswer(
  answer: string,
  options: ProbeOptions = {},
): Promise<NodeProbe> {
  await using server = await startNode(async (conn) => {
    await readRequest(conn);
    await send(conn, answer);
    await untilClosed(conn);
  });
  return await probeNode(node(at(server)), options);
}

/** Returns an answer with this text as its body. */
function answerOf(body: string, headers = ""): string {
  const { length } = new TextEncoder().encode(body);
  return `HTTP/1.1 200 OK\r\n${headers}Content-Length: ${length}\r\n\r\n${body}`;
}

/**
 * Returns the head of the request that a probe sends, as the server read it.
 */
async function requestHead(
  fieldsAt: (port: number) => Omit<ClusterNodeFields, "name">,
  options: ProbeOptions = {},
): Promise<string> {
  const head = Promise.withResolvers<string>();
  await using server = await startNode(async (conn) => {
    head.resolve(await readRequest(conn));
    await send(conn, jsonAnswer({}));
    await untilClosed(conn);
  });

  const probe = await probeNode(node(fieldsAt(server.port)), options);
  assertEquals(describe(probe), "up");
  return (await head.promise).replaceAll(String(server.port), "PORT");
}

type Fields = Omit<ClusterNodeFields, "name">;

const HOSTS: Record<string, [(dataServerPort: number) => Fields, string]> = {
  "an address": [
    (dataServerPort) => ({ tailscaleIp: "127.0.0.1", dataServerPort }),
    "127.0.0.1:PORT",
  ],
  "a name": [
    (dataServerPort) => ({ tailscaleIp: "localhost", dataServerPort }),
    "localhost:PORT",
  ],
  "a host behind a user": [
    (dataServerPort) => ({ sshHost: "root@127.0.0.1", dataServerPort }),
    "127.0.0.1:PORT",
  ],
  "a URL": [
    (port) => ({ dataServerUrl: `http://localhost:${port}/data/` }),
    "localhost:PORT",
  ],
};

for (const [what, [fieldsAt, host]] of Object.entries(HOSTS)) {
  Deno.test(`probeNode() sends Host: ${host} to ${what}`, async () => {
    const head = await requestHead(fieldsAt);
    assertMatch(head, new RegExp(`^Host: ${host}$`, "mi"));
    assertEquals(head.match(/^host:/gim)?.length, 1);
  });
}

const ACCEPTS: Record<string, [ProbeOptions, string]> = {
  "/status": [{}, "application/json"],
  "/status as the caller's path": [{ path: "/status" }, "application/json"],
  "/health": [{ path: "/health" }, "*/*"],
  "/": [{ path: "/" }, "*/*"],
};

for (const [what, [options, accept]] of Object.entries(ACCEPTS)) {
  Deno.test(`probeNode() sends Accept: ${accept} to ${what}`, async () => {
    const head = await requestHead((dataServerPort) => {
      return { tailscaleIp: "127.0.0.1", dataServerPort };
    }, options);
    const accepts = head.match(/^accept:.*$/gim);
    assertEquals(accepts?.map((line) => line.slice(8)), [accept]);
  });
}

Deno.test("probeNode() asks for no compression, and for the connection to be closed", async () => {
  const head = await requestHead((dataServerPort) => {
    return { tailscaleIp: "127.0.0.1", dataServerPort };
  });
  assertMatch(head, /^GET \/status HTTP\/1\.1\r\n/);
  assertMatch(head, /^connection: close$/im);
  const encoding = /^accept-encoding: (.*)$/im.exec(head)?.[1];
  assert(encoding === undefined || encoding === "identity", encoding);
});

const gzip = new CompressionStream("gzip");
const gzipped = await new Response(
  new Blob(["{}"]).stream().pipeThrough(gzip),
).arrayBuffer();

const HEALTH: Record<string, () => Response> = {
  "/json": () => Response.json({ a: 1 }),
  "/list": () => Response.json([1]),
  "/text": () => new Response("fine"),
  "/empty": () => new Response(""),
  "/204": () => new Response(null, { status: 204 }),
  "/gzip": () => {
    const headers = { "content-encoding": "gzip" };
    return new Response(gzipped, { headers });
  },
  "/500": () => new Response("", { status: 500 }),
  "/302": () => {
    const headers = { location: "/json" };
    return new Response(null, { status: 302, headers });
  },
};

const AT_OTHER_PATHS: Record<string, string> = {
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

for (const [path, expected] of Object.entries(AT_OTHER_PATHS)) {
  Deno.test(`probeNode() reports at ${path} ${expected}`, async () => {
    await using server = startPaths(HEALTH);

    const byOption = await probeNode(node(at(server)), { path });
    assertEquals(describe(byOption), expected);
    const document = path === "/json" ? { a: 1 } : undefined;
    assertEquals(byOption.status, document);

    const withPath = node({ ...at(server), statusPath: path });
    assertEquals(describe(await probeNode(withPath)), expected);
  });
}

const BROKEN_AT_HEALTH: Partial<Record<Behaviour, RegExp>> = {
  "length-long": /^unhealthy timeout: .* at \/health$/,
  "too-large": /^unhealthy too-large: .* at \/health$/,
  "reset": /^unhealthy bad-response: .* at \/health$/,
  "ssh-banner": /^unhealthy bad-response: the answer is not HTTP at \/health$/,
  "refuses": /^down refused: nothing listens on the port$/,
};

for (const [behaviour, expected] of Object.entries(BROKEN_AT_HEALTH)) {
  Deno.test(`probeNode() rejects at another path an answer that is ${behaviour}`, async () => {
    await using server = await startNode(behaviour as Behaviour);

    const timeoutMs = behaviour === "length-long" ? SHORT_MS : 5000;
    const withPath = node({ ...at(server), statusPath: "/health" });
    const probe = await probeNode(withPath, { timeoutMs });
    assertMatch(describe(probe), expected);
  });
}

const deep = `{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`;
const notUtf8 = Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d);

const NO_STATUS: Record<string, [() => Response, RegExp]> = {
  "an empty answer": [() => new Response(""), /not JSON/],
  "HTTP 204": [() => new Response(null, { status: 204 }), /HTTP 204/],
  "HTTP 205": [() => new Response(null, { status: 205 }), /HTTP 205/],
  "null": [() => new Response("null"), /JSON/],
  "a number": [() => new Response("7"), /JSON/],
  "a text": [() => new Response('"x"'), /JSON/],
  "NaN alone": [() => new Response("NaN"), /JSON/],
  "100,000 levels": [() => new Response(deep), /./],
  "bytes that are not UTF-8": [() => new Response(notUtf8), /./],
};

for (const [what, [answer, words]] of Object.entries(NO_STATUS)) {
  Deno.test(`probeNode() rejects ${what} at /status`, async () => {
    await using server = startPaths({ "/status": answer });

    const probe = await probeNode(node(at(server)));
    assertEquals(outcomeOf(probe), "unhealthy bad-response");
    assertMatch(probe.failure!.message, words);
  });
}

const ENCODINGS: Record<string, string> = {
  "an empty Content-Encoding": "Content-Encoding: \r\n",
  "a Content-Encoding without a blank": "Content-Encoding:\r\n",
  "Content-Encoding: identity": "Content-Encoding: identity\r\n",
};

for (const [what, header] of Object.entries(ENCODINGS)) {
  Deno.test(`probeNode() reports an answer with ${what} as up`, async () => {
    const probe = await probeAnswer(answerOf("{}", header));
    assertEquals(describe(probe), "up");
  });
}

type Document = Record<string, unknown>;

const PYTHON: Record<string, [body: string, document: Document]> = {
  "NaN": ['{"loss": NaN}', { loss: null }],
  "Infinity": ['{"best": Infinity}', { best: null }],
  "-Infinity": ['{"worst":-Infinity}', { worst: null }],
  "NaN in a list": ['{"a":[NaN,1,-Infinity,NaN]}', {
    a: [null, 1, null, null],
  }],
  "NaN inside a string": [
    '{"a":"NaN, Infinity: -Infinity","b":NaN}',
    { a: "NaN, Infinity: -Infinity", b: null },
  ],
  "NaN after an escaped quote": [
    String.raw`{"a":"\"NaN\\","b":NaN,"NaN":"\\\"NaN"}`,
    { a: '"NaN\\', b: null, NaN: '\\"NaN' },
  ],
};

for (const [what, [body, document]] of Object.entries(PYTHON)) {
  Deno.test(`probeNode() returns null for Python's ${what}`, async () => {
    const probe = await probeAnswer(answerOf(body));
    assertEquals(describe(probe), "up");
    assertEquals(probe.status, document);
  });
}

for (
  const body of ['{"a":NaNs}', '{"a":1NaN}', "{NaN:1}", '{"a":--Infinity}']
) {
  Deno.test(`probeNode() rejects ${body}`, async () => {
    const probe = await probeAnswer(answerOf(body));
    assertMatch(describe(probe), /^unhealthy bad-response: .*not JSON/);
  });
}

const MIB = 1024 * 1024;
const HOSTILE: Record<string, string> = {
  [String.raw`"\ without end`]: String.raw`"\ `.trim().repeat(MIB / 2),
  "quotes": '"'.repeat(MIB),
  "backslashes in a string": `"${"\\".repeat(MIB - 1)}`,
  "minus signs": "-".repeat(MIB),
  "NaN without end": `[${"NaN,".repeat(MIB / 4 - 1)}`,
};

for (const [what, body] of Object.entries(HOSTILE)) {
  Deno.test(`probeNode() rejects 1 MiB of ${what} at once`, async () => {
    const started = performance.now();
    const probe = await probeAnswer(answerOf(body), { timeoutMs: 60_000 });

    assertEquals(outcomeOf(probe), "unhealthy bad-response");
    assert(performance.now() - started < SLACK_MS, "it took too long");
  });
}

const PATH_ROWS: [string, ProbeOptions | "own" | "other", string][] = [
  ["its own path at its own port", {}, "/health"],
  ["its own path at its own port, named by the caller", "own", "/health"],
  ["the caller's path", { path: "/status" }, "/status"],
  ["/status at another port", "other", "/status"],
];

for (const [what, given, path] of PATH_ROWS) {
  Deno.test(`probeNode() asks a node for ${what}`, async () => {
    const answers = {
      "/status": () => Response.json({}),
      "/health": () => new Response(),
    };
    await using server = startPaths(answers);
    await using other = startPaths(answers);

    const ports = { own: server.port, other: other.port };
    const options = typeof given === "string" ? { port: ports[given] } : given;
    const own = node({ ...at(server), statusPath: "/health" });

    assertEquals(describe(await probeNode(own, options)), "up");
    const asked = given === "other" ? other : server;
    assertEquals(asked.paths, [path]);
  });
}

Deno.test("probeNode() asks data_server_url, base path included, and none of the addresses", async () => {
  await using proxied = startPaths({
    "/data/status": () => Response.json({ at: "url" }),
    "/data/health": () => new Response(),
  });
  await using direct = startPaths({});

  const fields = {
    ...at(direct),
    dataServerUrl: `http://127.0.0.1:${proxied.port}/data/`,
  };
  const byUrl = await probeNode(node(fields));
  assertEquals([describe(byUrl), byUrl.status], ["up", { at: "url" }]);
  assertEquals([byUrl.address, byUrl.port], ["127.0.0.1", proxied.port]);

  const withPath = node({ ...fields, statusPath: "/health" });
  assertEquals(describe(await probeNode(withPath)), "up");
  assertEquals(proxied.paths, ["/data/status", "/data/health"]);
  assertEquals(direct.paths, []);
});

Deno.test("probeNode() with a port asks the addresses, not data_server_url", async () => {
  await using proxied = startPaths({});
  await using direct = startPaths({
    "/status": () => Response.json({ at: "address" }),
  });

  const dataServerUrl = `http://127.0.0.1:${proxied.port}/data/`;
  const both = node({ ...at(direct), dataServerUrl });
  const probe = await probeNode(both, { port: direct.port });
  assertEquals([probe.status, proxied.paths], [{ at: "address" }, []]);
});
