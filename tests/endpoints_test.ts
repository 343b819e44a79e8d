/**
 * One table of endpoints: what is checked, given as a URL, exported, permitted
 * and logged in at.
 *
 * @module
 */
import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import {
  checkedEndpoints,
  dataEndpoints,
  type Endpoint,
  endpointUrl,
  hostPort,
  netFlag,
  sharedEndpoints,
  sshEndpoints,
  statusPath,
} from "../cluster_hosts.ts";
import {
  ClusterNode,
  type ClusterNodeFields,
  getDataSyncUrls,
  getSyncUrls,
  type HostsConfig,
  probeNode,
  type ProbeOptions,
  sshCommand,
} from "../mod.ts";
import { runMain } from "./run_main.ts";

interface Row {
  readonly what: string;
  readonly fields: Omit<ClusterNodeFields, "name">;
  readonly options?: Pick<ProbeOptions, "port" | "path">;
  /** What a check asks for, best first. */
  readonly checked: readonly string[];
  /** The first unchecked URL: of `getSyncUrls` if the row has a port. */
  readonly url: string | undefined;
  /** The hosts of `--allow-net`. */
  readonly net: string;
  /** What ssh connects to, best first. */
  readonly ssh: readonly string[];
}

const TAILNET = "100.64.0.1";
const PUBLIC = "203.0.113.7";
const BOTH = { tailscaleIp: TAILNET, sshHost: `root@${PUBLIC}` };
const DATA_URL = "http://198.51.100.9:9000/data";

const ROWS: readonly Row[] = [
  {
    what: "one address",
    fields: { tailscaleIp: TAILNET },
    checked: [`http://${TAILNET}:8766/status`],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766`,
    ssh: [`${TAILNET}:22`],
  },
  {
    what: "an ssh_host with a user",
    fields: { sshHost: `root@${PUBLIC}`, dataServerPort: 9001 },
    checked: [`http://${PUBLIC}:9001/status`],
    url: `http://${PUBLIC}:9001`,
    net: `${PUBLIC}:9001`,
    ssh: [`${PUBLIC}:22`],
  },
  {
    what: "one address and a port of ssh",
    fields: { tailscaleIp: TAILNET, sshPort: 2222 },
    checked: [`http://${TAILNET}:8766/status`],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766`,
    ssh: [`${TAILNET}:2222`],
  },
  {
    what: "the same address twice",
    fields: { tailscaleIp: TAILNET, sshHost: TAILNET, sshPort: 2222 },
    checked: [`http://${TAILNET}:8766/status`],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766`,
    ssh: [`${TAILNET}:2222`],
  },
  {
    what: "two addresses",
    fields: BOTH,
    checked: [`http://${TAILNET}:8766/status`, `http://${PUBLIC}:8766/status`],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766,${PUBLIC}:8766`,
    ssh: [`${TAILNET}:22`, `${PUBLIC}:22`],
  },
  {
    what: "two addresses and the port of a proxy in front of one",
    fields: { ...BOTH, sshPort: 31_022, dataServerPort: 9001 },
    checked: [`http://${TAILNET}:9001/status`, `http://${PUBLIC}:9001/status`],
    url: `http://${TAILNET}:9001`,
    net: `${TAILNET}:9001,${PUBLIC}:9001`,
    ssh: [`${PUBLIC}:31022`, `${TAILNET}:31022`, `${TAILNET}:22`],
  },
  {
    what: "a status path",
    fields: { ...BOTH, statusPath: "/health?full=1" },
    checked: [
      `http://${TAILNET}:8766/health?full=1`,
      `http://${PUBLIC}:8766/health?full=1`,
    ],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766,${PUBLIC}:8766`,
    ssh: [`${TAILNET}:22`, `${PUBLIC}:22`],
  },
  {
    what: "a path of the caller's",
    fields: { tailscaleIp: TAILNET, statusPath: "/health" },
    options: { path: "/models" },
    checked: [`http://${TAILNET}:8766/models`],
    url: `http://${TAILNET}:8766`,
    net: `${TAILNET}:8766`,
    ssh: [`${TAILNET}:22`],
  },
  {
    what: "the port of the data server, named by the caller",
    fields: {
      tailscaleIp: TAILNET,
      dataServerPort: 9001,
      statusPath: "/health",
    },
    options: { port: 9001 },
    checked: [`http://${TAILNET}:9001/health`],
    url: `http://${TAILNET}:9001/db`,
    net: `${TAILNET}:9001`,
    ssh: [`${TAILNET}:22`],
  },
  {
    what: "another port",
    fields: { ...BOTH, statusPath: "/health", dataServerUrl: DATA_URL },
    options: { port: 8765 },
    checked: [`http://${TAILNET}:8765/status`, `http://${PUBLIC}:8765/status`],
    url: `http://${TAILNET}:8765/db`,
    net: `${TAILNET}:8765,${PUBLIC}:8765`,
    ssh: [`${TAILNET}:22`, `${PUBLIC}:22`],
  },
  {
    what: "a URL beside two addresses",
    fields: { ...BOTH, dataServerPort: 9001, dataServerUrl: `${DATA_URL}/` },
    checked: [`${DATA_URL}/status`],
    url: DATA_URL,
    net: "198.51.100.9:9000",
    ssh: [`${TAILNET}:22`, `${PUBLIC}:22`],
  },
  {
    what: "a URL and a status path, without an address",
    fields: { dataServerUrl: DATA_URL, statusPath: "/health" },
    checked: [`${DATA_URL}/health`],
    url: DATA_URL,
    net: "198.51.100.9:9000",
    ssh: [],
  },
  {
    what: "an https URL",
    fields: { tailscaleIp: TAILNET, dataServerUrl: "https://198.51.100.9" },
    checked: ["https://198.51.100.9/status"],
    url: "https://198.51.100.9",
    net: "198.51.100.9:443",
    ssh: [`${TAILNET}:22`],
  },
  {
    what: "an https URL with a port and a base path",
    fields: { dataServerUrl: "https://198.51.100.9:8443/a/b/" },
    checked: ["https://198.51.100.9:8443/a/b/status"],
    url: "https://198.51.100.9:8443/a/b",
    net: "198.51.100.9:8443",
    ssh: [],
  },
  {
    what: "a URL with the port that it has anyway",
    fields: { dataServerUrl: "http://198.51.100.9:80/" },
    checked: ["http://198.51.100.9/status"],
    url: "http://198.51.100.9",
    net: "198.51.100.9:80",
    ssh: [],
  },
  {
    what: "IPv6",
    fields: {
      tailscaleIp: "2001:db8::1",
      sshHost: "root@[2001:db8::2]",
      sshPort: 2222,
    },
    checked: [
      "http://[2001:db8::1]:8766/status",
      "http://[2001:db8::2]:8766/status",
    ],
    url: "http://[2001:db8::1]:8766",
    net: "[2001:db8::1]:8766,[2001:db8::2]:8766",
    ssh: ["[2001:db8::2]:2222", "[2001:db8::1]:2222", "[2001:db8::1]:22"],
  },
  {
    what: "an IPv6 URL",
    fields: { dataServerUrl: "http://[2001:db8::9]:9000/data" },
    checked: ["http://[2001:db8::9]:9000/data/status"],
    url: "http://[2001:db8::9]:9000/data",
    net: "[2001:db8::9]:9000",
    ssh: [],
  },
  {
    what: "an IPv6 address with a zone",
    fields: { tailscaleIp: "fe80::1%eth0", sshHost: "root@fe80::2%eth1" },
    checked: [
      "http://[fe80::1%25eth0]:8766/status",
      "http://[fe80::2%25eth1]:8766/status",
    ],
    url: "http://[fe80::1%25eth0]:8766",
    // Deno's permissions know no zones.
    net: "[fe80::1]:8766,[fe80::2]:8766",
    ssh: ["[fe80::1%eth0]:22", "[fe80::2%eth1]:22"],
  },
  {
    what: "a name that is not ASCII",
    fields: { sshHost: "root@münchen.example" },
    checked: ["http://xn--mnchen-3ya.example:8766/status"],
    url: "http://xn--mnchen-3ya.example:8766",
    net: "xn--mnchen-3ya.example:8766",
    ssh: ["xn--mnchen-3ya.example:22"],
  },
  {
    what: "nothing",
    fields: {},
    checked: [],
    url: undefined,
    net: "",
    ssh: [],
  },
];

/** Returns the fields as they stand in an inventory. */
function inFile(fields: Row["fields"]): HostsConfig {
  const host = Object.entries(fields).map(([name, value]) => {
    const key = name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    return [key, value];
  });
  return { hosts: { "gpu-1": Object.fromEntries(host) } };
}

/** Returns what the command line prints about a row's inventory. */
async function cliOutput(
  { fields }: Row,
  [command, ...args]: readonly [string, ...string[]],
): Promise<string> {
  const line = [command, "--config", "-", ...args];
  const stdin = JSON.stringify(inFile(fields));
  const { stdout } = await runMain(line, { stdin });
  return stdout;
}

/** Returns `--port` and `--path` of a row. */
function flagsOf({ options = {} }: Row): string[] {
  return Object.entries(options)
    .flatMap(([name, value]) => [`--${name}`, String(value)]);
}

/** Returns the host and port that a URL leads to. */
function targetOf(url: string): string {
  const { hostname, port, protocol } = new URL(url.replace(/%25\w+/, ""));
  return `${hostname}:${port || (protocol === "https:" ? 443 : 80)}`;
}

/**
 * Sends each connection that is asked for where `connect` says, until it is
 * disposed. The tests themselves may connect to loopback alone.
 */
function network(
  connect: (options: Deno.ConnectOptions) => Promise<Deno.TcpConn>,
): Disposable {
  const real = Deno.connect;
  const { querySync } = Deno.permissions;

  Deno.connect = connect as typeof Deno.connect;
  Deno.permissions.querySync = () =>
    ({ state: "granted" }) as Deno.PermissionStatus;

  return {
    [Symbol.dispose]() {
      Deno.connect = real;
      Deno.permissions.querySync = querySync;
    },
  };
}

type Check = (row: Row, node: ClusterNode) => Promise<void> | void;

/** What agrees with the table. */
const CHECKS: Record<string, Check> = {
  "dataEndpoints() and statusPath()": ({ options = {}, checked }, node) => {
    const endpoints = dataEndpoints(node, options.port);
    const path = statusPath(node, options);

    const urls = endpoints.map((endpoint) => endpointUrl(endpoint, path));
    assertEquals(urls, checked);
    assertEquals(checkedEndpoints(node, options), endpoints);
    assertEquals(
      checkedEndpoints(node, { check: "tcp", ...options }),
      endpoints,
    );
  },

  "sshEndpoints()": ({ ssh }, node) => {
    const endpoints = sshEndpoints(node);

    assertEquals(endpoints.map(({ host, port }) => hostPort(host, port)), ssh);
    assert(endpoints.every(({ protocol }) => protocol === "ssh"));
    assert(endpoints.every(({ path }) => path === ""));
    assertEquals(checkedEndpoints(node, { check: "ssh" }), endpoints);
  },

  "probeNode() contacts": async ({ options, checked }, node) => {
    const contacted: string[] = [];
    using _network = network(({ hostname, port }) => {
      contacted.push(hostPort(hostname!, port).replace(/%\w+/, ""));
      const refused = new Deno.errors.ConnectionRefused();
      return Promise.reject(Object.assign(refused, { code: "ECONNREFUSED" }));
    });

    const { state, failure, endpoints } = await probeNode(node, options);

    assertEquals(contacted, checked.map(targetOf));
    assertEquals(endpoints, dataEndpoints(node, options?.port));
    assertEquals(state, "down");
    assertEquals(failure?.code, checked.length > 0 ? "refused" : "no-address");
  },

  "probeNode() asks for": async ({ options, checked }, node) => {
    const [url] = checked;
    if (url === undefined || url.startsWith("https:")) return;

    const asked: string[] = [];
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      (request) => {
        asked.push(request.url);
        return new Response("no", { status: 404 });
      },
    );
    const real = Deno.connect;
    const { port } = server.addr;
    using _network = network((options) =>
      real({ ...options, hostname: "127.0.0.1", port })
    );

    const { failure } = await probeNode(node, options);

    assertEquals(asked[0], url.replace(/%25\w+/, ""));
    assertEquals(failure?.code, "http-status");
  },

  "getDataSyncUrls() or getSyncUrls()": async (row, node) => {
    const { fields, options, url } = row;
    const given = {
      source: inFile(fields),
      reachableOnly: false,
      excludeSelf: false,
    };
    const urls = options?.port === undefined
      ? await getDataSyncUrls(given)
      : await getSyncUrls({ ...given, port: options.port });

    assertEquals(urls, url === undefined ? [] : [url]);
    if (options?.port === undefined) assertEquals(node.dataServerBaseUrl, url);
  },

  "netFlag()": ({ options, net }, node) => {
    if (net === "") return;
    const flag = netFlag(dataEndpoints(node, options?.port));
    assertEquals(flag, `--allow-net=${net}`);
  },

  "sshCommand()": ({ ssh }, node) => {
    if (ssh.length === 0) {
      assertThrows(() => sshCommand(node, ["true"]), TypeError, "address");
      return;
    }

    const words = sshCommand(node, ["true"]);
    const [, host] = words.at(-2)!.split("@");
    const port = words[words.indexOf("-p") + 1];
    assertEquals(hostPort(host!, Number(port)), ssh[0]);
  },

  "export prometheus": async (row) => {
    const args = ["export", "prometheus", ...flagsOf(row)] as const;
    const [exported] = JSON.parse(await cliOutput(row, args));
    const [url] = row.checked;

    assertEquals(exported?.labels.__param_target, url);
    const target = exported?.targets[0].replace(/%(25)?\w+(?=\])/, "");
    assertEquals(target, url && targetOf(url));
  },

  "permissions status": async (row) => {
    const args = ["permissions", "status", ...flagsOf(row)] as const;
    const flags = (await cliOutput(row, args)).split(/\s/);

    const flag = flags.find((it) => it.startsWith("--allow-net"));
    assertEquals(flag, row.net ? `--allow-net=${row.net}` : undefined);
  },

  "urls data": async (row) => {
    if (row.options) return;
    const output = await cliOutput(row, ["urls", "data", "--unchecked"]);
    assertEquals(output, row.url === undefined ? "" : `${row.url}\n`);
  },

  "export ansible": async (row) => {
    const output = await cliOutput(row, ["export", "ansible"]);
    const { _meta: { hostvars } } = JSON.parse(output);
    const { ansible_host: host, ansible_port: port } = hostvars["gpu-1"];

    assertEquals(host && hostPort(host, port), row.ssh[0]);
  },

  "export ssh-config": async (row) => {
    const output = await cliOutput(row, ["export", "ssh-config"]);
    const [, host, port] = /HostName (\S+)[^]*Port (\d+)/.exec(output) ?? [];

    // ssh_config(5) writes "%%" for "%".
    const address = host?.replace("%%", "%");
    assertEquals(address && hostPort(address, Number(port)), row.ssh[0]);
  },

  "ssh --dry-run": async (row) => {
    const [target] = row.ssh;
    if (target === undefined) return;

    const args = ["ssh", "gpu-1", "--dry-run", "--", "true"] as const;
    const output = await cliOutput(row, args);
    const [, port, host] = / -p (\d+) .*@(\S+) true$/m.exec(output) ?? [];
    assertEquals(hostPort(host!, Number(port)), target);
  },
};

for (const row of ROWS) {
  for (const [what, check] of Object.entries(CHECKS)) {
    Deno.test(`${what} of a node with ${row.what}`, async () => {
      const node = new ClusterNode({ name: "gpu-1", ...row.fields });
      await check(row, node);
    });
  }
}

function endpoint(host: string, port = 1, path = ""): Endpoint {
  return { protocol: "http", host, port, path };
}

Deno.test("netFlag() names each host and port once", () => {
  const endpoints = [
    endpoint("a"),
    endpoint("b"),
    endpoint("a", 1, "/x"),
    endpoint("a", 2),
    endpoint("fe80::1%eth0"),
    endpoint("fe80::1%eth1"),
  ];
  assertEquals(netFlag(endpoints), "--allow-net=a:1,b:1,a:2,[fe80::1]:1");
});

Deno.test("netFlag() returns --allow-net alone past 100 KB", () => {
  const many = Array.from(
    { length: 10_000 },
    (_, index) => endpoint(`gpu-${index}.example.com`, 8766),
  );
  assertEquals(netFlag(many), "--allow-net");

  const flag = netFlag(many.slice(0, 3000));
  assert(flag.length > 50_000 && flag.length < 100 * 1024);
});

/** Nodes, and the endpoints that several of the active ones have. */
const SHARED: [
  what: string,
  nodes: Record<string, Row["fields"]>,
  shared: Record<string, string>,
][] = [
  [
    "behind one proxy",
    {
      a: { sshHost: "root@p.example", sshPort: 19528 },
      b: { sshHost: "p.example", sshPort: 38470 },
      c: { sshHost: "q.example" },
    },
    { "http://p.example:8766": "a b" },
  ],
  [
    "with addresses of their own beside it",
    {
      a: { tailscaleIp: "100.64.0.1", sshHost: "p" },
      b: { tailscaleIp: "100.64.0.2", sshHost: "p" },
    },
    { "http://p:8766": "a b" },
  ],
  [
    "of which one is not active",
    { a: { sshHost: "p" }, b: { sshHost: "p", status: "retired" } },
    {},
  ],
  [
    "with data ports of their own",
    { a: { sshHost: "p", dataServerPort: 1 }, b: { sshHost: "p" } },
    {},
  ],
  [
    "with masked addresses",
    { a: { sshHost: "203.0.113.x" }, b: { sshHost: "203.0.113.x" } },
    {},
  ],
  ["without addresses", { a: {}, b: {} }, {}],
];

for (const [what, nodes, expected] of SHARED) {
  Deno.test(`sharedEndpoints() of nodes ${what}`, () => {
    const list = Object.entries(nodes)
      .map(([name, fields]) => new ClusterNode({ name, ...fields }));

    const shared = sharedEndpoints(list).entries().map(([url, nodes]) => [
      url,
      nodes.map((node) => node.name).join(" "),
    ]);
    assertEquals(Object.fromEntries(shared), expected);
  });
}

Deno.test("sharedEndpoints() at a port of the caller's counts each address at it", () => {
  const nodes = [9001, 9002].map((dataServerPort) =>
    new ClusterNode({
      name: `n${dataServerPort}`,
      sshHost: "p",
      dataServerPort,
    })
  );
  assertEquals([...sharedEndpoints(nodes).keys()], []);
  assertEquals([...sharedEndpoints(nodes, 80).keys()], ["http://p"]);
});
