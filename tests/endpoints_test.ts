import { assert, assertEquals, assertRejects, assertThrows } from "jsr:@std/assert@^1.0.19";
import {
  ClusterNode,
  type ClusterNodeFields,
  dataEndpoints,
  type Endpoint,
  endpointUrl,
  getDataSyncUrls,
  getEloSyncUrls,
  getSyncUrls,
  hostPort,
  type HostsConfig,
  netFlag,
  probeNode,
  type ProbeOptions,
  sshCommand,
  sshEndpoints,
  statusPath,
} from "../mod.ts";
import { startNode } from "./loopback_cluster.ts";
import { runMain } from "./run_main.ts";

interface Row {
  readonly what: string;
  readonly fields: Omit<ClusterNodeFields, "name">;
  readonly options?: Pick<ProbeOptions, "port" | "path">;
  /** What a check asks for, best first. */
  readonly checked: readonly string[];
  /** What `getDataSyncUrls` gives unchecked, or `getSyncUrls` if the row has a port; the check's own text without a row. */
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
    checked: [`http://${TAILNET}:8766/health?full=1`, `http://${PUBLIC}:8766/health?full=1`],
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
    fields: { tailscaleIp: TAILNET, dataServerPort: 9001, statusPath: "/health" },
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
    fields: { tailscaleIp: "2001:db8::1", sshHost: "root@[2001:db8::2]", sshPort: 2222 },
    checked: ["http://[2001:db8::1]:8766/status", "http://[2001:db8::2]:8766/status"],
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
  { what: "nothing", fields: {}, checked: [], url: undefined, net: "", ssh: [] },
];

/** The fields as they stand in an inventory. */
function inFile(fields: Omit<ClusterNodeFields, "name">): HostsConfig {
  const host = Object.entries(fields).map(([key, value]) => [
    key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`),
    value,
  ]);
  return { hosts: { "gpu-1": Object.fromEntries(host) } };
}

/** Runs with a network of the test's own: each connection that is asked for gets what `answer` gives. */
async function withNetwork(
  answer: (host: string, port: number) => Deno.TcpConn,
  run: () => Promise<void>,
): Promise<void> {
  const { connect, startTls } = Deno;
  const { querySync } = Deno.permissions;
  Deno.connect = ((options: { hostname: string; port: number }) =>
    // What `answer` throws is a rejection.
    Promise.resolve().then(() => answer(options.hostname, options.port))) as typeof Deno.connect;
  Deno.startTls = ((conn: Deno.TcpConn) => Promise.resolve(conn)) as unknown as typeof Deno.startTls;
  // The tests themselves may connect to loopback alone.
  Deno.permissions.querySync = () => ({ state: "granted" }) as Deno.PermissionStatus;
  try {
    await run();
  } finally {
    Object.assign(Deno, { connect, startTls });
    Deno.permissions.querySync = querySync;
  }
}

/** A connection that answers 404, and tells what was asked for. */
function notFound(ask: (request: string) => void): Deno.TcpConn {
  const pieces: (string | null)[] = ["HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", null];
  return {
    write(bytes: Uint8Array) {
      ask(new TextDecoder().decode(bytes));
      return Promise.resolve(bytes.length);
    },
    read(buffer: Uint8Array) {
      const piece = pieces.shift();
      return Promise.resolve(piece ? new TextEncoder().encodeInto(piece, buffer).written : null);
    },
    close() {},
    [Symbol.dispose]() {},
    closeWrite: () => Promise.resolve(),
  } as unknown as Deno.TcpConn;
}

/** What the command line prints about an inventory. */
async function cliOutput([command, ...args]: readonly [string, ...string[]], inventory: string): Promise<string> {
  return (await runMain([command, "--config", "-", ...args], { stdin: inventory })).stdout;
}

/** `HOST:PORT` that a URL leads to. */
function targetOf(url: string): string {
  const { hostname, port, protocol } = new URL(url);
  return `${hostname}:${port || (protocol === "https:" ? 443 : 80)}`;
}

for (const { what, fields, options = {}, checked, url, net, ssh } of ROWS) {
  Deno.test(`a node with ${what}: check, message, URL, exports, permission and ssh agree`, async () => {
    const node = new ClusterNode({ name: "gpu-1", ...fields });
    const { port, path } = options;
    const endpoints = dataEndpoints(node, port);
    const asked = endpoints.map((endpoint) => endpointUrl(endpoint, statusPath(node, options)));
    assertEquals(asked, checked);
    const targets = checked.map(targetOf);

    const contacted: string[] = [];
    await withNetwork((host, port) => {
      contacted.push(hostPort(host, port));
      throw Object.assign(new Deno.errors.ConnectionRefused(), { code: "ECONNREFUSED" });
    }, async () => {
      const probe = await probeNode(node, options);
      assertEquals(probe.endpoints, endpoints);
      assertEquals(contacted, targets);
      const reason = "nothing listens on the port";
      assertEquals(probe.failure?.message, targets.length > 0 ? reason : "set tailscale_ip or ssh_host");
    });

    const requests: string[] = [];
    await withNetwork(() => notFound((request) => requests.push(request)), async () => {
      const { failure, address } = await probeNode(node, options);
      const hosts = endpoints.map(({ host }) => host);
      assert(address === undefined ? checked.length === 0 : hosts.includes(address), address);
      const [path] = checked.map((url) => new URL(url).pathname + new URL(url).search);
      const message = path === undefined ? "set tailscale_ip or ssh_host" : `HTTP 404 at ${path}`;
      assertEquals(failure?.message, message.replace(/ at \/status$/, ""));
    });
    for (const [index, request] of requests.entries()) {
      const { pathname, search, host } = new URL(checked[index]!);
      const [line, ...headers] = request.split("\r\n");
      assertEquals(line, `GET ${pathname}${search} HTTP/1.1`);
      const named = headers.find((header) => header.startsWith("Host: "))?.slice("Host: ".length);
      assert(named === host || named === targets[index], named);
    }
    assertEquals(requests.length, checked.length);

    const unchecked = { source: inFile(fields), reachableOnly: false, excludeSelf: false };
    const urls = port === undefined ? await getDataSyncUrls(unchecked) : await getSyncUrls({ ...unchecked, port });
    assertEquals(urls, url === undefined ? [] : [url]);
    if (port === undefined) assertEquals(node.dataServerBaseUrl, url);

    if (net) assertEquals(netFlag(endpoints), `--allow-net=${net}`);
    assertEquals([...new Set(targets)].join(), net);

    assertEquals(sshEndpoints(node).map(({ host, port }) => hostPort(host, port)), ssh);
    if (ssh.length === 0) assertThrows(() => sshCommand(node, ["true"]), TypeError, "address");
    else {
      const command = sshCommand(node, ["true"]);
      const host = command.at(-2)!.split("@")[1]!;
      assertEquals(hostPort(host, Number(command[command.indexOf("-p") + 1])), ssh[0]);
    }
    assert(sshEndpoints(node).every(({ protocol, path }) => protocol === "ssh" && path === ""), path);

    const inventory = JSON.stringify(inFile(fields));
    const given = Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const [exported] = JSON.parse(await cliOutput(["export", "prometheus", ...given], inventory));
    assertEquals(exported?.targets, targets.length > 0 ? targets.slice(0, 1) : undefined);
    assertEquals(exported?.labels.__param_target, checked[0]);
    const flags = (await cliOutput(["permissions", "status", ...given], inventory)).split(/\s/);
    assertEquals(flags.find((flag) => flag.startsWith("--allow-net")), net ? `--allow-net=${net}` : undefined);
    if (port === undefined && path === undefined) {
      assertEquals(await cliOutput(["urls", "data", "--unchecked"], inventory), url === undefined ? "" : `${url}\n`);
    }
    const { _meta: { hostvars } } = JSON.parse(await cliOutput(["export", "ansible"], inventory));
    const { ansible_host, ansible_port } = hostvars["gpu-1"];
    assertEquals(ansible_host === undefined ? undefined : hostPort(ansible_host, ansible_port), ssh[0]);
    if (ssh.length === 0) return;
    const config = await cliOutput(["export", "ssh-config"], inventory);
    const [, hostName, sshPort] = /HostName (\S+)[^]*Port (\d+)/.exec(config) ?? [];
    assertEquals(hostPort(hostName!, Number(sshPort)), ssh[0]);
    const dry = await cliOutput(["ssh", "gpu-1", "--dry-run", "--", "true"], inventory);
    assertEquals(dry, `${sshCommand(node, ["true"]).join(" ")}\n`);
  });
}

Deno.test("netFlag() names each host once, and nothing but --allow-net past 100 KB", () => {
  const endpoint = (host: string, port = 1): Endpoint => ({ protocol: "http", host, port, path: "" });
  assertEquals(
    netFlag([endpoint("a"), endpoint("b"), { ...endpoint("a"), path: "/x" }, endpoint("a", 2)]),
    "--allow-net=a:1,b:1,a:2",
  );
  const many = Array.from({ length: 10_000 }, (_, index) => endpoint(`gpu-${index}.example.com`, 8766));
  assertEquals(netFlag(many), "--allow-net");
  assert(netFlag(many.slice(0, 3000)).length < 100 * 1024);
});

Deno.test("getDataSyncUrls() gives one URL for two spellings of one server, in the order of the config", async () => {
  const hosts = {
    b: { tailscale_ip: "100.64.0.2", data_server_port: 9001 },
    a: { data_server_url: "http://100.64.0.2:9001/" },
    c: { ssh_host: "root@100.64.0.2", data_server_port: "9001" },
    d: { data_server_url: "HTTP://100.64.0.2:09001" },
    first: { data_server_url: "http://100.64.0.1:80/data/" },
    second: { data_server_url: "http://100.64.0.1/data" },
    bare: {},
    off: { tailscale_ip: "100.64.0.3", status: "offline" },
  };
  const options = { source: { hosts }, reachableOnly: false, excludeSelf: false };
  assertEquals(await getDataSyncUrls(options), ["http://100.64.0.2:9001", "http://100.64.0.1/data"]);
  const selected = { ...options, selection: { names: ["off"] } };
  assertEquals(await getDataSyncUrls(selected), ["http://100.64.0.3:8766"]);
});

Deno.test("getSyncUrls() and getEloSyncUrls() have their ports and paths", async () => {
  const source = { hosts: { a: { tailscale_ip: TAILNET } }, elo_sync: { sync_port: 9000 } };
  const options = { source, reachableOnly: false };
  const cases = [
    [await getSyncUrls(options), 8766, "/db"],
    [await getSyncUrls({ ...options, port: 8765, path: "/models" }), 8765, "/models"],
    [await getEloSyncUrls(options), 9000, "/db"],
    [await getEloSyncUrls({ ...options, port: 9002, path: "/x" }), 9002, "/x"],
  ] as const;
  for (const [urls, port, path] of cases) assertEquals(urls, [`http://${TAILNET}:${port}${path}`]);
  await assertRejects(() => getSyncUrls({ ...options, path: "db" }), TypeError);
  await assertRejects(() => getSyncUrls({ ...options, port: 0 }), RangeError);
});

Deno.test("the URLs are those of the nodes that are up, at the address that answered", async () => {
  await using up = await startNode("ok");
  await using broken = await startNode("http-500");
  await using dead = await startNode("refuses");
  const paths: string[] = [];
  await using behind = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
    paths.push(new URL(url).pathname);
    return Response.json({});
  });
  const url = `http://127.0.0.1:${behind.addr.port}/data`;
  const host = (port: number, fields = {}) => ({ tailscale_ip: "127.0.0.1", data_server_port: port, ...fields });
  const hosts = {
    broken: host(broken.port),
    second: host(up.port, { tailscale_ip: "127.0.0.9", ssh_host: "127.0.0.1" }),
    up: host(up.port),
    url: host(dead.port, { data_server_url: `${url}/` }),
    dead: host(dead.port),
  };
  const source = { hosts };
  assertEquals(await getDataSyncUrls({ source, excludeSelf: false }), [`http://127.0.0.1:${up.port}`, url]);
  assertEquals(paths, ["/data/status"]);
  assertEquals(await getSyncUrls({ source, port: up.port, path: "/x" }), [`http://127.0.0.1:${up.port}/x`]);
  const elo = { ...source, elo_sync: { sync_port: up.port } };
  assertEquals(await getEloSyncUrls({ source: elo }), [`http://127.0.0.1:${up.port}/db`]);
});

Deno.test("getDataSyncUrls() leaves out this host, by name, variable and address", async () => {
  const urls = (name: string, fields: Record<string, unknown> = { ssh_host: PUBLIC }, excludeSelf = true) =>
    getDataSyncUrls({ source: { hosts: { [name]: fields } }, reachableOnly: false, excludeSelf });
  const own = Deno.hostname();
  const given = [`http://${PUBLIC}:8766`];
  assertEquals(await urls("another"), given);
  assertEquals(await urls(own.toUpperCase()), []);
  assertEquals(await urls(own.split(".")[0]!), []);
  assertEquals(await urls(own, { ssh_host: PUBLIC }, false), given);
  for (const address of ["localhost", "127.0.0.1", "::1", own]) {
    assertEquals(await urls("another", { tailscale_ip: address }), [], address);
  }
  // A cluster on loopback is not this host.
  assertEquals(await urls("another", { tailscale_ip: "127.0.0.2" }), ["http://127.0.0.2:8766"]);
  for (const { address, family } of Deno.networkInterfaces()) {
    if (family === "IPv4") assertEquals(await urls("another", { tailscale_ip: address }), [], address);
  }
  Deno.env.set("RINGRIFT_NODE_ID", "GPU-7.example.com");
  try {
    assertEquals(await urls("gpu-7"), []);
    assertEquals(await urls("gpu-7.example.com"), []);
    assertEquals(await urls(own), given);
  } finally {
    Deno.env.delete("RINGRIFT_NODE_ID");
  }
});
