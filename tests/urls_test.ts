import { assertEquals, assertRejects } from "jsr:@std/assert@^1.0.19";
import {
  type DataSyncUrlOptions,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
  type HostEntry,
  parseHostsConfig,
  type SyncUrlOptions,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { startNode, unusedPort } from "./loopback_cluster.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false, net: "inherit", sys: "inherit" } as const;

const UNCHECKED = { reachableOnly: false, excludeSelf: false } as const;

const SOURCE = {
  hosts: {
    b: {
      tailscale_ip: "100.64.0.2",
      ssh_host: "192.0.2.2",
      data_server_port: 9001,
    },
    a: { ssh_host: "root@192.0.2.1" },
    twin: { tailscale_ip: "192.0.2.1" },
    six: {
      tailscale_ip: "2001:db8::1",
      data_server_url: "https://six.example.com/data/",
    },
    zone: { tailscale_ip: "fe80::1%eth0" },
    bare: {},
    off: { tailscale_ip: "100.64.0.3", status: "offline" },
  },
  elo_sync: { sync_port: 9000 },
};

/** Returns the URLs of all active nodes at a port, in order. */
function urlsAt(port: number | "", path: string): string[] {
  const hosts = [
    "100.64.0.2",
    "192.0.2.1",
    "[2001:db8::1]",
    "[fe80::1%25eth0]",
  ];
  const end = port === "" ? path : `:${port}${path}`;
  return hosts.map((host) => `http://${host}${end}`);
}

const OFF = { selection: { names: ["off"] } };

type Call = (options: SyncUrlOptions) => Promise<string[]>;

const LISTS: [call: Call, options: SyncUrlOptions, urls: string[]][] = [
  [getSyncUrls, {}, urlsAt(8766, "/db")],
  [getSyncUrls, { port: 8765, path: "/models" }, urlsAt(8765, "/models")],
  [getSyncUrls, { port: 80 }, urlsAt("", "/db")],
  [getSyncUrls, OFF, ["http://100.64.0.3:8766/db"]],
  [getEloSyncUrls, {}, urlsAt(9000, "/db")],
  [getEloSyncUrls, { port: 9002, path: "/x" }, urlsAt(9002, "/x")],
  [getDataSyncUrls, {}, [
    "http://100.64.0.2:9001",
    "http://192.0.2.1:8766",
    "https://six.example.com/data",
    "http://[fe80::1%25eth0]:8766",
  ]],
  [getDataSyncUrls, OFF, ["http://100.64.0.3:8766"]],
  [getSyncUrls, { source: { hosts: {} } }, []],
];

for (const [call, options, urls] of LISTS) {
  const given = JSON.stringify(options);

  Deno.test({
    name:
      `${call.name}() with ${given} returns URLs in order, without duplicates`,
    permissions,
    async fn() {
      const all = { source: SOURCE, ...UNCHECKED, ...options };
      assertEquals(await call(all), urls);
    },
  });
}

Deno.test({
  name: "getDataSyncUrls() returns one URL for the spellings of one server",
  permissions,
  async fn() {
    const hosts = {
      a: { data_server_url: "http://192.0.2.1:80/data" },
      b: { data_server_url: "HTTP://192.0.2.1/data/" },
      c: { data_server_url: "http://192.0.2.2:8766/" },
      d: { tailscale_ip: "192.0.2.2" },
      e: { ssh_host: "root@192.0.2.2", data_server_port: "8766" },
    };
    assertEquals(await getDataSyncUrls({ source: { hosts }, ...UNCHECKED }), [
      "http://192.0.2.1/data",
      "http://192.0.2.2:8766",
    ]);
  },
});

Deno.test({
  name:
    "getDataSyncUrls() has the order of the file, whatever the hosts are called",
  permissions,
  async fn() {
    const text = "hosts: { head: {ssh_host: a}, 7: {ssh_host: b} }";
    const source = parseHostsConfig(text);

    const urls = await getDataSyncUrls({ source, ...UNCHECKED });
    assertEquals(urls, ["http://a:8766", "http://b:8766"]);
  },
});

// --- Faults of the caller ---

const CALLS: Call[] = [getSyncUrls, getEloSyncUrls, getDataSyncUrls];

type Fault = typeof TypeError | typeof RangeError;

/** What is wrong whatever the inventory is. */
const FAULTS: [options: Record<string, unknown>, fault: Fault][] = [
  ...["db", "", "/a b", "/a\r\nb", "http://x/db"].map(
    (path): [Record<string, unknown>, Fault] => [{ path }, TypeError],
  ),
  ...[0, 65536, 1.5, NaN].map(
    (port): [Record<string, unknown>, Fault] => [{ port }, RangeError],
  ),
  [{ timeoutMs: 0 }, RangeError],
  [{ concurrency: 0 }, RangeError],
  [{ selection: { names: "a" } }, TypeError],
  [{ selection: { names: ["n[1-"] } }, RangeError],
  [{ selection: { exclude: ["n[x]"] } }, RangeError],
];

for (const [options, fault] of FAULTS) {
  const given = JSON.stringify(options);

  Deno.test(`the sync URLs with ${given} are rejected before anything is fetched`, async () => {
    let requests = 0;
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      () => {
        requests++;
        return new Response("hosts: {}");
      },
    );
    const source = `http://127.0.0.1:${server.addr.port}/hosts.yaml`;
    const isOfUrl = "port" in options || "path" in options;

    for (const call of isOfUrl ? CALLS.slice(0, 2) : CALLS) {
      await assertRejects(() => call({ source, ...options }), fault);
    }
    assertEquals(requests, 0);
  });
}

for (const call of CALLS) {
  Deno.test(`${call.name}() rejects a name that is not there`, async () => {
    const selection = { names: ["gone"] };
    await assertRejects(
      () => call({ source: { hosts: {} }, ...UNCHECKED, selection }),
      RangeError,
      "gone",
    );
  });

  for (const reason of ["enough", null, 0]) {
    const shown = JSON.stringify(reason);

    Deno.test(`${call.name}() rejects with the reason of its signal: ${shown}`, async () => {
      const signal = AbortSignal.abort(reason);
      const outcome = await call({ source: { hosts: {} }, signal })
        .then(() => "returned", (reason) => [reason]);
      assertEquals(outcome, [reason]);
    });
  }
}

/** Options, each of which may be `undefined`. */
const OPTIONS = [
  ...["selection", "excludeSelf", "timeoutMs", "concurrency"],
  ...["onProbe", "signal", "port", "path"],
];

for (const option of OPTIONS) {
  for (const call of CALLS) {
    Deno.test({
      name: `${call.name}() with ${option}: undefined has the default`,
      permissions,
      async fn() {
        const hosts = {
          [Deno.hostname()]: { ssh_host: "192.0.2.1" },
          other: { ssh_host: "192.0.2.2" },
        };
        const options = { source: { hosts }, reachableOnly: false };

        const expected = await call(options);
        const urls = await call({ ...options, [option]: undefined });
        assertEquals(urls, expected);
      },
    });
  }
}

for (const call of CALLS) {
  Deno.test({
    name:
      `${call.name}() with reachableOnly: undefined leaves out what is down`,
    permissions,
    async fn() {
      const port = unusedPort();
      const dead = { ssh_host: "127.0.0.1", data_server_port: port };
      const source = { hosts: { dead }, elo_sync: { sync_port: port } };
      const options = { source, excludeSelf: false, reachableOnly: undefined };

      const urls = call === getSyncUrls
        ? await call({ ...options, port })
        : await call(options);
      assertEquals(urls, []);
    },
  });
}

// --- Those that are up ---

Deno.test({
  name:
    "the sync URLs are those of the nodes that are up, at the address that answered",
  permissions,
  async fn() {
    await using up = await startNode("ok");
    await using broken = await startNode("http-500");
    const dead = unusedPort();
    const paths: string[] = [];
    await using behind = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      ({ url }) => {
        paths.push(new URL(url).pathname);
        return Response.json({});
      },
    );

    const url = `http://127.0.0.1:${behind.addr.port}/data/`;
    const host = (data_server_port: number, fields: HostEntry = {}) => ({
      ssh_host: "127.0.0.1",
      data_server_port,
      ...fields,
    });
    const source = {
      hosts: {
        broken: host(broken.port),
        second: host(up.port, { tailscale_ip: "127.0.0.9" }),
        up: host(up.port),
        url: host(dead, { data_server_url: url }),
        dead: host(dead),
        off: host(up.port, { status: "offline" }),
      },
      elo_sync: { sync_port: up.port },
    };

    const outcomes: string[] = [];
    const onProbe: DataSyncUrlOptions["onProbe"] = ({ node, state }) =>
      void outcomes.push(`${node.name} ${state}`);
    const options = { source, excludeSelf: false, onProbe };
    const answered = `http://127.0.0.1:${up.port}`;

    assertEquals(await getDataSyncUrls(options), [answered, url.slice(0, -1)]);
    assertEquals(outcomes.toSorted(), [
      "broken unhealthy",
      "dead down",
      "second up",
      "up up",
      "url up",
    ]);
    assertEquals(paths, ["/data/status"]);

    // What is checked is the status path; `path` is the one of the URLs.
    const other = { source, port: up.port, path: "/x" };
    assertEquals(await getSyncUrls(other), [`${answered}/x`]);
    assertEquals(await getSyncUrls({ source, port: broken.port }), []);
    assertEquals(await getEloSyncUrls({ source }), [`${answered}/db`]);
  },
});

// --- This host ---

const HOSTNAME = Deno.hostname();
const AWAY = { ssh_host: "192.0.2.1" };

/** The addresses of this host, at which it is found in every network of its own. */
const INTERFACES = Deno.networkInterfaces().map(({ address }) => address);

type SelfRow = [what: string, name: string, fields: HostEntry];

/** Nodes that are this host. */
const SELF: SelfRow[] = [
  ["the hostname", HOSTNAME, AWAY],
  ["the hostname in capitals", HOSTNAME.toUpperCase(), AWAY],
  ["the hostname to its first dot", HOSTNAME.split(".", 1)[0]!, AWAY],
  ["the hostname as an address", "a", { tailscale_ip: HOSTNAME }],
  ...[
    ...["localhost", "LOCALHOST", "localhost.", "Localhost."],
    ...["127.0.0.1", "root@127.0.0.1", "0x7f.1", "0x7f000001"],
    ...["::1", "0:0:0:0:0:0:0:1", "::0001", "0::1", "root@[::1]"],
    ...["::ffff:127.0.0.1", "::FFFF:7f00:1", "0:0:0:0:0:ffff:127.0.0.1"],
    ...["0.0.0.0", "::", "::ffff:0.0.0.0"],
  ].map((ssh_host): SelfRow => [ssh_host, "a", { ssh_host }]),
  ...INTERFACES.map((address): SelfRow => [
    `the address ${address} of an interface`,
    "a",
    { tailscale_ip: address },
  ]),
  [
    "a second address",
    "a",
    { tailscale_ip: "192.0.2.9", ssh_host: "127.0.0.1" },
  ],
  ["a URL", "a", { data_server_url: "http://localhost:9000/data" }],
  ["an IPv6 URL", "a", { data_server_url: "http://[::1]:9000" }],
  ["a URL in hex", "a", { data_server_url: "http://0x7f.1:9000" }],
  [
    "an address beside a URL",
    "a",
    { data_server_url: "http://192.0.2.1:9000", ssh_host: "localhost" },
  ],
];

/** Nodes that are not. */
const OTHERS: SelfRow[] = [
  ["another name", "another", AWAY],
  ["the hostname and more", `${HOSTNAME}-2`, AWAY],
  ["the hostname and a domain", `${HOSTNAME}.other.example`, AWAY],
  // A cluster on loopback lives at these.
  ["127.0.0.2", "a", { tailscale_ip: "127.0.0.2" }],
  ["127.1.0.1", "a", { tailscale_ip: "127.1.0.1" }],
  ["::2", "a", { tailscale_ip: "::2" }],
  ["localhost.example", "a", { tailscale_ip: "localhost.example" }],
];

for (const isSelf of [true, false]) {
  const verb = isSelf ? "leaves out" : "returns";

  for (const [what, name, fields] of isSelf ? SELF : OTHERS) {
    Deno.test({
      name: `getDataSyncUrls() ${verb} a node by ${what}`,
      permissions,
      async fn() {
        const other = { ssh_host: "198.51.100.1" };
        const source = { hosts: { [name]: fields, other } };
        const expected = isSelf ? 1 : 2;
        const countOf = async (options: DataSyncUrlOptions) =>
          (await getDataSyncUrls({ source, reachableOnly: false, ...options }))
            .length;

        assertEquals(await countOf({}), expected);
        assertEquals(await countOf({ excludeSelf: undefined }), expected);
        assertEquals(await countOf({ excludeSelf: false }), 2);
      },
    });
  }
}

for (const call of [getSyncUrls, getEloSyncUrls]) {
  Deno.test({
    name: `${call.name}() leaves out this host only if excludeSelf is true`,
    permissions,
    async fn() {
      const hosts = {
        [HOSTNAME]: AWAY,
        local: { ssh_host: "localhost" },
        other: { ssh_host: "198.51.100.1" },
      };
      const options = { source: { hosts }, reachableOnly: false };
      const countOf = async (excludeSelf: boolean | undefined) =>
        (await call({ ...options, excludeSelf })).length;

      assertEquals(await countOf(undefined), 3);
      assertEquals(await countOf(false), 3);
      assertEquals(await countOf(true), 1);
    },
  });
}

Deno.test("getDataSyncUrls() takes the whole of RINGRIFT_NODE_ID for this host's name", async () => {
  const outcomes = await evaluate(`
    const away = ${JSON.stringify(AWAY)};
    const hostname = ${JSON.stringify(HOSTNAME)};
    const countOf = (id, name, fields = away) =>
      withVariable("RINGRIFT_NODE_ID", id, async () => (await api.getDataSyncUrls({
        source: { hosts: { [name]: fields } }, reachableOnly: false })).length);

    console.log(JSON.stringify({
      whole: await countOf("GPU-7.dc1", "gpu-7.dc1"),
      "in capitals": await countOf("gpu-7.dc1", "GPU-7.DC1"),
      "to its first dot": await countOf("GPU-7.dc1", "gpu-7"),
      "without a dot": await countOf("n1", "n1"),
      another: await countOf("n1.dc1", "n1.dc2"),
      "the hostname": await countOf("n1", hostname),
      localhost: await countOf("n1", "another", { ssh_host: "localhost" }),
      "the hostname as an address": await countOf("n1", "another", { ssh_host: hostname }),
      blank: await countOf(" ", hostname),
    }));`);

  assertEquals(outcomes, {
    whole: 0,
    "in capitals": 0,
    "to its first dot": 1,
    "without a dot": 0,
    another: 1,
    "the hostname": 1,
    localhost: 0,
    "the hostname as an address": 0,
    blank: 0,
  });
});

// --- Permissions ---

Deno.test({
  name:
    "getDataSyncUrls() without sys permission names the flag of the hostname",
  permissions: { sys: false, env: false, net: false },
  async fn() {
    const options = { source: { hosts: { a: AWAY } }, reachableOnly: false };
    await assertRejects(
      () => getDataSyncUrls(options),
      Deno.errors.NotCapable,
      "--allow-sys=hostname",
    );

    const urls = await getDataSyncUrls({ ...options, excludeSelf: false });
    assertEquals(urls.length, 1);
  },
});

Deno.test({
  name:
    "getDataSyncUrls() without networkInterfaces knows this host by name and loopback",
  permissions: { sys: ["hostname"], env: false, net: false },
  async fn() {
    const hosts = {
      [HOSTNAME]: AWAY,
      local: { ssh_host: "127.0.0.1" },
      other: { ssh_host: "192.0.2.2" },
    };
    const urls = await getDataSyncUrls({
      source: { hosts },
      reachableOnly: false,
    });
    assertEquals(urls, ["http://192.0.2.2:8766"]);
  },
});

for (const call of [getSyncUrls, getDataSyncUrls]) {
  Deno.test({
    name:
      `${call.name}() without net permission names the flag; nothing looks down`,
    permissions: { net: false, env: false },
    async fn() {
      const host = { tailscale_ip: "192.0.2.1", data_server_port: 8766 };
      const source = { hosts: { "gpu-1": host } };
      await assertRejects(
        () => call({ source, excludeSelf: false }),
        Deno.errors.NotCapable,
        "--allow-net=192.0.2.1:8766",
      );
    },
  });
}
