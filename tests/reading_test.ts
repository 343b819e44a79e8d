import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "jsr:@std/assert@^1.0.19";
import { readHostsConfig } from "../cluster_hosts.ts";
import {
  type ConfigSource,
  getActiveNodes,
  getClusterNodes,
  getEloSyncConfig,
  HostsConfigError,
  loadHostsConfig,
  type LoadOptions,
  parseHostsConfig,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { unusedPort } from "./loopback_cluster.ts";
import {
  programMissing,
  ROOT,
  run,
  tempFolder,
  testUnless,
  writeInventory,
} from "./process.ts";

const INVENTORY = "hosts: { gpu-1: {} }\n";

/** Returns what the error says after the place, with which it begins. */
async function faultOf(
  source: ConfigSource,
  options: LoadOptions = {},
): Promise<string> {
  const error: HostsConfigError = await assertRejects(
    () => loadHostsConfig(source, options),
    HostsConfigError,
  );

  const [problem, ...more] = error.problems;
  assertEquals(more, []);
  assertEquals(problem?.path, "");
  assertEquals(error.message, `${source}: ${problem?.message}`);
  return problem!.message;
}

// --- Which inventory ---

Deno.test("loadHostsConfig() loads what is named, else the variable's file, else the default", async () => {
  await using named = await writeInventory({ named: {} });
  await using variable = await writeInventory({ variable: {} });
  const none = `${named.folder}/none.yaml`;

  const outcomes = await evaluate(
    `
    const [named, variable, none] = ${
      JSON.stringify([named.path, variable.path, none])
    };
    const load = (source, value) =>
      withVariable("RINGRIFT_HOSTS_CONFIG", value, async () =>
        Object.keys((await api.loadHostsConfig(source)).hosts).join());

    Deno.mkdirSync("config");
    Deno.writeTextFileSync("config/distributed_hosts.yaml", "hosts: { default: {} }");
    console.log(JSON.stringify({
      named: await load(named, variable),
      url: await load("file://" + named, variable),
      variable: await load(undefined, variable),
      "variable, with blanks": await load(undefined, " " + variable + " "),
      default: await load(undefined),
      "blank variable": await load(undefined, " "),
      "missing file": await load(none),
      "missing file of the variable": await load(undefined, none),
    }));
  `,
    { cwd: named.folder },
  );

  assertEquals(outcomes, {
    named: "named",
    url: "named",
    variable: "variable",
    "variable, with blanks": "variable",
    default: "default",
    "blank variable": "default",
    "missing file": `${none}: there is no such file`,
    "missing file of the variable":
      `${none}: there is no such file (named by RINGRIFT_HOSTS_CONFIG)`,
  });
});

Deno.test("every getter rejects a missing default file, naming it and the folder", async () => {
  await using temp = await tempFolder();

  const outcomes = await evaluate(
    `
    const getters = {
      loadHostsConfig: api.loadHostsConfig,
      getClusterNodes: api.getClusterNodes,
      getActiveNodes: api.getActiveNodes,
      getCoordinatorNode: api.getCoordinatorNode,
      getCoordinatorAddress: api.getCoordinatorAddress,
      getEloSyncConfig: api.getEloSyncConfig,
      discoverReachableNodes: api.discoverReachableNodes,
      getSyncUrls: api.getSyncUrls,
      getEloSyncUrls: api.getEloSyncUrls,
      getDataSyncUrls: api.getDataSyncUrls,
    };
    const outcomes = {};
    for (const [name, get] of Object.entries(getters)) {
      const error = await get().catch((error) => error);
      outcomes[name] = [error?.name, error?.problems?.[0].path, error?.message];
    }
    console.log(JSON.stringify(outcomes));
  `,
    { cwd: temp.folder },
  ) as Record<string, [string, string, string]>;

  for (const [getter, [name, path, message]] of Object.entries(outcomes)) {
    assertEquals([name, path], ["HostsConfigError", ""], getter);
    const where =
      `config/distributed_hosts.yaml: there is no such file in ${temp.folder}: `;
    assert(message.startsWith(where), message);
    assert(message.includes("RINGRIFT_HOSTS_CONFIG"), message);
    assert(!message.includes("\n"), message);
  }
  assertEquals(Object.keys(outcomes).length, 10);
});

Deno.test("loadHostsConfig() advises to copy the example where there is one", async () => {
  await using temp = await tempFolder();
  const example = "config/distributed_hosts.example.yaml";
  await Deno.mkdir(`${temp.folder}/config`);
  await Deno.writeTextFile(`${temp.folder}/${example}`, INVENTORY);

  const message = await evaluate(
    `
    const error = await api.loadHostsConfig().catch((error) => error);
    console.log(JSON.stringify(error.message));
  `,
    { cwd: temp.folder },
  );
  assertMatch(String(message), /copy config\/distributed_hosts\.example\.yaml/);
});

Deno.test({
  name:
    "loadHostsConfig() names --allow-env where the variable may not be read",
  permissions: { read: ["/tmp", ROOT], env: false },
  async fn() {
    const error: HostsConfigError = await assertRejects(
      () => loadHostsConfig(),
      HostsConfigError,
    );
    assertMatch(error.message, /--allow-env=RINGRIFT_HOSTS_CONFIG/);
  },
});

Deno.test("readHostsConfig() reports that the default file does not exist", async () => {
  await using temp = await tempFolder();
  const read = await evaluate(
    "console.log(JSON.stringify(await api.readHostsConfig()));",
    { cwd: temp.folder },
  );
  const origin = "config/distributed_hosts.yaml";
  assertEquals(read, { text: "", origin, exists: false });
});

// --- Files ---

Deno.test("loadHostsConfig() accepts a path, a file: URL as text or as a URL, and a config", async () => {
  await using file = await writeInventory({ "gpu-1": {} });
  const config = await loadHostsConfig(file.path);
  const url = `file://${file.path}`;

  for (const source of [file.path, url, new URL(url), config, { ...config }]) {
    const { hosts } = await loadHostsConfig(source);
    assertEquals(hosts, { "gpu-1": {} }, String(source));
  }
});

Deno.test("loadHostsConfig() returns an empty cluster for an empty file", async () => {
  await using file = await writeInventory({});
  await Deno.writeTextFile(file.path, "");

  assertEquals((await loadHostsConfig(file.path)).hosts, {});
});

Deno.test("loadHostsConfig() accepts a file: URL with %20 and %25 in its path", async () => {
  await using temp = await tempFolder();
  const path = `${temp.folder}/100% of it.yaml`;
  await Deno.writeTextFile(path, INVENTORY);

  const url = new URL(`file://${temp.folder}/100%25%20of%20it.yaml`);
  assertEquals((await loadHostsConfig(url)).hosts, { "gpu-1": {} });
  assertEquals((await loadHostsConfig(url.href)).hosts, { "gpu-1": {} });
  assertEquals((await loadHostsConfig(path)).hosts, { "gpu-1": {} });
});

/** Sources that are no files. */
const BROKEN_SOURCES: [source: string, reason: RegExp][] = [
  ["file:///tmp/100%.yaml", /^is not a valid URL: .*%25/],
  ["file:///tmp/%zz.yaml", /^is not a valid URL: .*%25/],
  ["file:///tmp/%ff.yaml", /^is not a valid URL: /],
  ["file://[bad", /^is not a valid URL$/],
  ["file://server/share/hosts.yaml", /another host/],
  ["http://", /^is not a valid URL$/],
  ["https://[bad/hosts.yaml", /^is not a valid URL$/],
  ["ftp://example.com/hosts.yaml", /file:, http: or https: URL/],
  ["s3://bucket/hosts.yaml", /file:, http: or https: URL/],
];

for (const [source, reason] of BROKEN_SOURCES) {
  Deno.test(`loadHostsConfig() rejects ${source}`, async () => {
    assertMatch(await faultOf(source), reason);
  });
}

/** What only a mistake can have given. */
const WRONG_SOURCES: [what: string, source: unknown, hint: RegExp][] = [
  ["a promise", Promise.resolve({ hosts: {} }), /await/],
  ["a Map", new Map(), /Map/],
  ["hosts that are a Map", { hosts: new Map() }, /Object\.fromEntries/],
  ["null", null, /path, a URL or a config/],
  ["a number", 7, /path, a URL or a config/],
  ["a blank text", " ", /path, a URL or a config/],
];

for (const [what, source, hint] of WRONG_SOURCES) {
  Deno.test(`loadHostsConfig() rejects ${what} with a TypeError`, async () => {
    const given = source as ConfigSource;
    const error = await assertRejects(() => loadHostsConfig(given), TypeError);
    assertMatch(error.message, hint);

    for (const get of [getClusterNodes, getActiveNodes, getEloSyncConfig]) {
      await assertRejects(() => get(given) as Promise<unknown>, TypeError);
    }
  });
}

Deno.test("readHostsConfig() returns the text and its origin", async () => {
  await using file = await writeInventory({});
  await Deno.writeTextFile(file.path, "# nothing\n");

  const text = "# nothing\n";
  const read = await readHostsConfig(file.path);
  assertEquals(read, { text, origin: file.path, exists: true });

  const url = new URL(`file://${file.path}`);
  assertEquals((await readHostsConfig(url)).origin, url.href);
});

Deno.test("loadHostsConfig() rejects a folder, and a file that is not there", async () => {
  await using temp = await tempFolder();
  const none = `${temp.folder}/none.yaml`;

  assertEquals(await faultOf(temp.folder), "is a folder, not a file");
  assertEquals(await faultOf(none), "there is no such file");
  assertEquals(await faultOf(`file://${none}`), "there is no such file");

  await Deno.writeTextFile(`${temp.folder}/file`, "");
  assertMatch(
    await faultOf(`${temp.folder}/file/hosts.yaml`),
    /^(cannot be read \(.+\)|there is no such file)$/,
  );
});

const UTF8 = [...new TextEncoder().encode(INVENTORY)];

const ENCODINGS: [what: string, bytes: number[], message: string][] = [
  ["not UTF-8", [...UTF8, 0x23, 0xe4], "is not UTF-8: save it as UTF-8"],
  ["UTF-16", [0xff, 0xfe, 104, 0], "is UTF-16: save it as UTF-8"],
  [
    "UTF-16, big end first",
    [0xfe, 0xff, 0, 104],
    "is UTF-16: save it as UTF-8",
  ],
];

for (const [what, bytes, message] of ENCODINGS) {
  Deno.test(`loadHostsConfig() rejects a file that is ${what}`, async () => {
    await using file = await writeInventory({});
    await Deno.writeFile(file.path, Uint8Array.from(bytes));

    assertEquals(await faultOf(file.path), message);
  });
}

Deno.test("loadHostsConfig() accepts a file with a byte order mark", async () => {
  await using file = await writeInventory({});
  await Deno.writeFile(file.path, Uint8Array.of(0xef, 0xbb, 0xbf, ...UTF8));

  assertEquals((await loadHostsConfig(file.path)).hosts, { "gpu-1": {} });
});

// --- URLs ---

/** Serves on loopback what `answer` gives for a path. */
function serve(
  answer: (path: string, request: Request) => Response | Promise<Response>,
): AsyncDisposable & { readonly base: string } {
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    (request) => answer(new URL(request.url).pathname, request),
  );

  return {
    base: `http://127.0.0.1:${server.addr.port}`,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

/** Answers when the client has left: the server waits for its answers. */
function never({ signal }: Request): Promise<Response> {
  return new Promise((resolve) => {
    signal.addEventListener("abort", () => resolve(new Response()));
  });
}

Deno.test("loadHostsConfig() accepts a URL as text, in any case, and as a URL", async () => {
  await using server = serve(() => new Response(INVENTORY));
  const url = `${server.base}/hosts.yaml`;

  for (const source of [url, new URL(url), url.replace("http", "HTTP")]) {
    const { hosts } = await loadHostsConfig(source);
    assertEquals(hosts, { "gpu-1": {} });
  }

  const read = await readHostsConfig(url);
  assertEquals(read, { text: INVENTORY, origin: url, exists: true });
});

const HTML = "<!doctype html><html><body>Log in: x</body></html>";

/** Answers that are no inventory. */
const ANSWERS: [what: string, answer: () => Response, message: string][] = [
  ["404", () => new Response("no", { status: 404 }), "answered HTTP 404"],
  ["204", () => new Response(null, { status: 204 }), "answered HTTP 204"],
  ["206", () => new Response("h", { status: 206 }), "answered HTTP 206"],
  [
    "a redirect",
    () => new Response(null, { status: 302, headers: { location: "/a" } }),
    "answered HTTP 302, a redirect: use the URL it leads to",
  ],
  ["a page to log in", () => new Response(HTML), "is HTML or XML, not YAML"],
  [
    "text/html",
    () => new Response(INVENTORY, { headers: { "content-type": "text/html" } }),
    "is HTML, not YAML",
  ],
  [
    "latin1",
    () => new Response(Uint8Array.of(0x23, 0xe4)),
    "is not UTF-8: save it as UTF-8",
  ],
];

for (const [what, answer, message] of ANSWERS) {
  Deno.test(`loadHostsConfig() rejects a URL that answers ${what}`, async () => {
    await using server = serve(answer);
    assertEquals(await faultOf(`${server.base}/hosts.yaml`), message);
  });
}

Deno.test("loadHostsConfig() rejects a URL that does not answer in time, or refuses", async () => {
  await using server = serve((_, request) => never(request));

  assertEquals(
    await faultOf(`${server.base}/`, { timeoutMs: 100 }),
    "did not answer within 100 ms",
  );
  assertMatch(await faultOf(`http://127.0.0.1:${unusedPort()}/`), /refused/);
});

Deno.test("loadHostsConfig() rejects a wrong timeoutMs before it fetches", async () => {
  let requests = 0;
  await using server = serve(() => {
    requests++;
    return new Response(INVENTORY);
  });

  for (const timeoutMs of [0, -1, NaN, Infinity, 2 ** 31]) {
    await assertRejects(
      () => loadHostsConfig(server.base, { timeoutMs }),
      RangeError,
      "timeoutMs",
    );
  }
  assertEquals(requests, 0);
});

/** A comment that is as long as it is said to be, and an inventory. */
function padded(bytes: number): string {
  return `#${" ".repeat(bytes - INVENTORY.length - 2)}\n${INVENTORY}`;
}

const MIB = 1024 * 1024;

Deno.test("loadHostsConfig() accepts 16 MiB from a URL, and rejects a byte more", async () => {
  await using server = serve((path) =>
    new Response(padded(16 * MIB + (path === "/more" ? 1 : 0)))
  );

  const { hosts } = await loadHostsConfig(`${server.base}/hosts.yaml`);
  assertEquals(hosts, { "gpu-1": {} });
  assertMatch(await faultOf(`${server.base}/more`), /^is larger than 16 MiB/);
});

Deno.test("loadHostsConfig() stops reading a URL that never ends", async () => {
  let sent = 0;
  await using server = serve(() => {
    const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
      pull(controller) {
        controller.enqueue(new Uint8Array(MIB).fill(0x23));
        sent++;
      },
    });
    return new Response(body);
  });

  const fault = await faultOf(`${server.base}/`, { timeoutMs: 30_000 });
  assertMatch(fault, /^is larger than 16 MiB/);
  // Some of it is on its way when it stops.
  assert(sent < 64, `${sent} MiB were sent`);
});

/** What a signal may be aborted with. */
const REASONS: unknown[] = ["enough", null, 0, "", new Error("x"), { a: 1 }];

for (const reason of REASONS) {
  const shown = reason instanceof Error ? "an error" : JSON.stringify(reason);

  Deno.test(`loadHostsConfig() of a URL rejects with the reason of its signal: ${shown}`, async () => {
    await using server = serve((_, request) => never(request));
    const later = new AbortController();
    const timer = setTimeout(() => later.abort(reason), 50);

    for (const signal of [AbortSignal.abort(reason), later.signal]) {
      const outcome = await loadHostsConfig(server.base, { signal })
        .then(() => "loaded", (reason) => [reason]);
      assertEquals(outcome, [reason]);
    }
    clearTimeout(timer);
  });
}

// --- Passwords ---

/** URLs with a password, each with what is shown of it. */
const PASSWORDS: [path: string, options: LoadOptions][] = [
  ["/none", {}],
  ["/broken", {}],
  ["/never", { timeoutMs: 50 }],
  ["/moved", {}],
];

for (const [path, options] of PASSWORDS) {
  Deno.test(`loadHostsConfig() does not show the password of a URL: ${path}`, async () => {
    await using server = serve((path, request) => {
      if (path === "/broken") return new Response("hosts: [");
      if (path === "/never") return never(request);
      if (path === "/moved") return Response.redirect(`${request.url}/a`);
      return new Response("no", { status: 404 });
    });
    const url = server.base.replace("//", "//me:hunter2@") + path;

    for (const source of [url, new URL(url)]) {
      const error: HostsConfigError = await assertRejects(
        () => loadHostsConfig(source, options),
        HostsConfigError,
      );
      const shown = Deno.inspect(error, { depth: 9 });
      assert(!shown.includes("hunter2"), shown);
      assert(!shown.includes("me:"), shown);
      assert(error.message.startsWith(server.base + path), error.message);
    }
  });
}

const BROKEN_PASSWORDS = [
  "http://me:hunter2@",
  "http://me:hunter2@[bad/hosts.yaml",
  "http://me:hunter2/2@127.0.0.1:99999/a",
  `http://me:hunter2@127.0.0.1:${unusedPort()}/hosts.yaml`,
  "HTTPS://me:hunter2@127.0.0.1:1/hosts.yaml",
];

for (const url of BROKEN_PASSWORDS) {
  Deno.test(`loadHostsConfig() does not show the password of ${url}`, async () => {
    const error: HostsConfigError = await assertRejects(
      () => loadHostsConfig(url),
      HostsConfigError,
    );
    const shown = Deno.inspect(error, { depth: 9 });
    assert(!shown.includes("hunter2"), shown);
  });
}

Deno.test("readHostsConfig() sends the password of a URL, and leaves it out of the origin", async () => {
  await using server = serve((_, { headers }) =>
    new Response(`# ${headers.get("authorization")}`)
  );
  const url = server.base.replace("//", "//me:hunter2@");

  const { text, origin } = await readHostsConfig(`${url}/a?b=c@d`);
  assertEquals(text, `# Basic ${btoa("me:hunter2")}`);
  assertEquals(origin, `${server.base}/a?b=c@d`);
});

// --- What came by http may not say which programs run here ---

const PROGRAMS = ["ProxyCommand=nc %h %p", "proxycommand=nc %h %p"];

for (const option of PROGRAMS) {
  const host = { ssh_host: "gpu.example", ssh_options: [option] };
  const text = JSON.stringify({ hosts: { "gpu-1": host } });

  Deno.test(`loadHostsConfig() rejects ${option} from a URL alone`, async () => {
    await using server = serve(() => new Response(text));
    const error: HostsConfigError = await assertRejects(
      () => loadHostsConfig(server.base),
      HostsConfigError,
    );
    const [problem] = error.problems;
    assertEquals(problem?.path, "hosts.gpu-1.ssh_options");
    assertMatch(problem!.message, /runs a program on this machine/);
    assert(!error.message.includes("nc %h"), "the value is shown");

    await using file = await writeInventory({ "gpu-1": host });
    const nodes = await getClusterNodes(file.path);
    assertEquals(nodes.get("gpu-1")?.sshOptions, [option]);
    parseHostsConfig(text);
    parseHostsConfig(text, "file:///hosts.yaml");
    assertThrows(() => parseHostsConfig(text, "https://x/h"), HostsConfigError);
  });
}

// --- TLS ---

/** Makes a CA, and a certificate for each name, the last one expired. */
const MAKE_CERTIFICATES = `
  cd "$0" && new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  openssl req -x509 $new -keyout ca.key -out ca.pem -subj /CN=ca -days 2
  here=DNS:localhost,IP:127.0.0.1
  openssl req -x509 $new -keyout self.key -out self.pem -subj /CN=self -addext subjectAltName=$here -days 2
  leaf() {
    openssl req $new -keyout $1.key -out $1.csr -subj /CN=$1
    echo "subjectAltName=$2" > $1.ext
    openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -out $1.pem -extfile $1.ext -days $3
  }
  leaf good $here 2; leaf other DNS:other.example.com 2; leaf expired $here -1`;

/** Serves the inventory over TLS with a certificate of a folder. */
function serveTls(
  folder: string,
  name: string,
): AsyncDisposable & { readonly url: string } {
  const server = Deno.serve({
    hostname: "127.0.0.1",
    port: 0,
    cert: Deno.readTextFileSync(`${folder}/${name}.pem`),
    key: Deno.readTextFileSync(`${folder}/${name}.key`),
    onListen() {},
  }, () => new Response(INVENTORY));

  return {
    url: `https://localhost:${server.addr.port}/hosts.yaml`,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

testUnless(
  programMissing("openssl"),
  "loadHostsConfig() reports in words what is wrong with https",
  async () => {
    await using temp = await tempFolder();
    const { folder } = temp;
    const made = await run("sh", ["-c", MAKE_CERTIFICATES, folder]);
    assertEquals(made.code, 0, made.stderr);

    await using good = serveTls(folder, "good");
    await using self = serveTls(folder, "self");
    await using other = serveTls(folder, "other");
    await using expired = serveTls(folder, "expired");
    await using plain = serve(() => new Response(INVENTORY));

    assertEquals(
      await faultOf(good.url),
      "the certificate is from an unknown CA: name that CA's file in DENO_CERT",
    );
    // One that says of itself that it is a CA's is refused in DENO_CERT too.
    assertMatch(
      await faultOf(self.url),
      /^the certificate is self-signed(?:.*CA:FALSE|(?!.*DENO_CERT))/,
    );
    assertEquals(
      await faultOf(plain.base.replace("http", "https")),
      "the server does not speak TLS",
    );

    const urls = JSON.stringify([good.url, other.url, expired.url]);
    const outcomes = await evaluate(
      `
      const load = async (url) =>
        Object.keys((await api.loadHostsConfig(url)).hosts).join();
      console.log(JSON.stringify(await Promise.all(
        ${urls}.map((url) => load(url).catch((error) => error.message)))));
    `,
      { env: { DENO_CERT: `${folder}/ca.pem` } },
    );
    assertEquals(outcomes, [
      "gpu-1",
      `${other.url}: the certificate is for another name`,
      `${expired.url}: the certificate has expired`,
    ]);
  },
);

// --- Permissions ---

const READ_FLAGS: [source: string | undefined, flag: string][] = [
  [undefined, "--allow-read=config/distributed_hosts.yaml"],
  ["other.yaml", "--allow-read=other.yaml"],
  ["file:///srv/hosts.yaml", "--allow-read=/srv/hosts.yaml"],
];

for (const [source, flag] of READ_FLAGS) {
  Deno.test({
    name: `loadHostsConfig() names ${flag}`,
    permissions: { read: false, env: false },
    async fn() {
      const { message }: Error = await assertRejects(
        () => loadHostsConfig(source),
        Deno.errors.NotCapable,
        flag,
      );
      assert(!message.includes("\n"), message);
    },
  });
}

const NET_FLAGS: [source: string, flag: string][] = [
  ["https://example.com/a.yaml", "--allow-net=example.com:443"],
  ["http://example.com/a.yaml", "--allow-net=example.com:80"],
  ["http://[::1]:8000/a.yaml", "--allow-net=[::1]:8000"],
  ["http://me:hunter2@example.com/a.yaml", "--allow-net=example.com:80"],
];

for (const [source, flag] of NET_FLAGS) {
  Deno.test({
    name: `loadHostsConfig() of ${source} names ${flag}`,
    permissions: { net: false },
    async fn() {
      const { message }: Error = await assertRejects(
        () => loadHostsConfig(source),
        Deno.errors.NotCapable,
      );
      assertEquals(message, `Requires net access: run again with ${flag}`);
    },
  });
}

Deno.test({
  name: "readHostsConfig() counts a variable that may not be read as unset",
  permissions: { read: ["/tmp", ROOT], env: false },
  async fn() {
    const { origin } = await readHostsConfig();
    assertEquals(origin, "config/distributed_hosts.yaml");
  },
});
