import { assert, assertEquals, assertRejects, assertStringIncludes, assertThrows } from "jsr:@std/assert@^1.0.19";
import * as api from "../mod.ts";
import {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  discoverReachableNodes,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getDataSyncUrls,
  getEloSyncConfig,
  getEloSyncUrls,
  getSyncUrls,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  probeNode,
  selectNodes,
  sshCommand,
} from "../mod.ts";
import { ROOT, run, startNode, writeInventory } from "./loopback_cluster.ts";

const VARIABLES = ["RINGRIFT_HOSTS_CONFIG", "RINGRIFT_CONFIG_PATH", "RINGRIFT_COORDINATOR_IP", "RINGRIFT_NODE_ID"];
for (const name of VARIABLES) Deno.env.delete(name);

function node(
  fields: Omit<ConstructorParameters<typeof ClusterNode>[0], "name"> & { name?: string } = {},
): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

function cluster(hosts: HostsConfig["hosts"], sections: Record<string, unknown> = {}): HostsConfig {
  return { hosts, elo_sync: {}, ...sections };
}

async function withEnv(variables: Record<string, string>, run: () => Promise<void>): Promise<void> {
  for (const [name, value] of Object.entries(variables)) Deno.env.set(name, value);
  try {
    await run();
  } finally {
    for (const name of Object.keys(variables)) Deno.env.delete(name);
  }
}

Deno.test("mod.ts exports the public API", () => {
  assertEquals(Object.keys(api).toSorted(), [
    "ClusterNode",
    "DATA_SYNC_PORT",
    "DEFAULT_CONFIG_PATH",
    "ELO_SYNC_PORT",
    "HostsConfigError",
    "MODEL_SYNC_PORT",
    "checkHttpEndpoint",
    "checkNodeReachable",
    "discoverReachableNodes",
    "getActiveNodes",
    "getClusterNodes",
    "getCoordinatorAddress",
    "getCoordinatorNode",
    "getDataSyncUrls",
    "getEloSyncConfig",
    "getEloSyncUrls",
    "getSyncUrls",
    "inspectHostsConfig",
    "loadHostsConfig",
    "parseHostsConfig",
    "probeNode",
    "probeNodes",
    "readHostsConfig",
    "selectNodes",
    "sshCommand",
  ]);
  assertEquals([api.ELO_SYNC_PORT, api.DATA_SYNC_PORT, api.MODEL_SYNC_PORT], [8766, 8766, 8765]);
  assertEquals(api.DEFAULT_CONFIG_PATH, "config/distributed_hosts.yaml");
});

Deno.test("ClusterNode has the defaults", () => {
  const { entry, ...fields } = node();
  assertEquals(fields, {
    name: "gpu-1",
    tailscaleIp: undefined,
    sshHost: undefined,
    sshUser: "ubuntu",
    sshKey: undefined,
    sshPort: 22,
    ringriftPath: "~/ringrift/ai-service",
    status: "unknown",
    role: "unknown",
    memoryGb: 0,
    cpus: 0,
    gpu: "",
    dataServerPort: 8766,
    dataServerUrl: undefined,
  });
  assertEquals(entry, {});
});

Deno.test("ClusterNode.bestIp, addresses and sshUser", () => {
  const cases = [
    [{}, undefined, [], "ubuntu"],
    [{ tailscaleIp: "100.64.0.1", sshHost: "192.0.2.1" }, "100.64.0.1", ["100.64.0.1", "192.0.2.1"], "ubuntu"],
    [{ tailscaleIp: "  ", sshHost: "192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "ubuntu"],
    [{ tailscaleIp: " 100.64.0.1 " }, "100.64.0.1", ["100.64.0.1"], "ubuntu"],
    [{ sshHost: "root@192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "root"],
    [{ sshHost: "root@192.0.2.1", sshUser: "ops" }, "192.0.2.1", ["192.0.2.1"], "ops"],
    [{ sshHost: "root@192.0.2.1", sshUser: " " }, "192.0.2.1", ["192.0.2.1"], "root"],
    [{ sshHost: "root@" }, undefined, [], "root"],
    [{ tailscaleIp: "192.0.2.1", sshHost: "a@192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "a"],
    [{ tailscaleIp: "[2001:db8::1]" }, "2001:db8::1", ["2001:db8::1"], "ubuntu"],
  ] as const;
  for (const [fields, bestIp, addresses, sshUser] of cases) {
    const { bestIp: best, addresses: all, sshUser: user } = node(fields);
    assertEquals([best, all, user], [bestIp, [...addresses], sshUser], JSON.stringify(fields));
  }
});

Deno.test("ClusterNode.dataServerBaseUrl is the URL as written, else made of address and port", () => {
  const cases = [
    [{}, undefined],
    [{ tailscaleIp: "100.64.0.1" }, "http://100.64.0.1:8766"],
    [{ sshHost: "ubuntu@gpu.example.com", dataServerPort: 9001 }, "http://gpu.example.com:9001"],
    [{ tailscaleIp: "2001:db8::1" }, "http://[2001:db8::1]:8766"],
    [{ tailscaleIp: "100.64.0.1", dataServerUrl: "https://gpu.example.com/data/" }, "https://gpu.example.com/data/"],
  ] as const;
  for (const [fields, url] of cases) assertEquals(node(fields).dataServerBaseUrl, url);
});

Deno.test("ClusterNode.isActive by status", () => {
  for (const status of ["active", "ready", "unknown", "proxy_only", ""]) assert(node({ status }).isActive, status);
  for (const status of ["terminated", "offline", "setup", "retired", "archived"]) {
    assert(!node({ status }).isActive, status);
  }
});

Deno.test("getEloSyncConfig() merges a partial section with the defaults", async () => {
  const defaults = {
    coordinator: "mac-studio",
    syncPort: 8766,
    syncInterval: 300,
    divergenceThreshold: 50,
    transports: ["tailscale", "aria2", "http"],
  };
  assertEquals(await getEloSyncConfig(cluster({})), defaults);
  const partial = { sync_port: "9000", coordinator: null, sync_interval: 60, transports: ["http"] };
  assertEquals(await getEloSyncConfig({ hosts: {}, elo_sync: partial }), {
    ...defaults,
    syncPort: 9000,
    syncInterval: 60,
    transports: ["http"],
  });
});

Deno.test("getCoordinatorAddress() from the config, from ssh_host, from the variable, from nowhere", async () => {
  const elo_sync = { coordinator: "head", sync_port: 9000 };
  const address = (hosts: HostsConfig["hosts"]) => getCoordinatorAddress({ hosts, elo_sync });
  assertEquals(await address({ head: { tailscale_ip: "100.64.0.9", ssh_host: "x" } }), {
    hostname: "100.64.0.9",
    port: 9000,
  });
  assertEquals(await address({ head: { ssh_host: "ops@192.0.2.9" } }), { hostname: "192.0.2.9", port: 9000 });
  assertEquals(await address({ other: { ssh_host: "x" } }), undefined);
  assertEquals(await address({ head: { ssh_host: " " } }), undefined);
  await withEnv({ RINGRIFT_COORDINATOR_IP: " 192.0.2.77 " }, async () => {
    assertEquals(await address({ other: {} }), { hostname: "192.0.2.77", port: 9000 });
    assertEquals(await address({ head: {} }), { hostname: "192.0.2.77", port: 9000 });
    assertEquals(await address({ head: { ssh_host: "x" } }), { hostname: "x", port: 9000 });
  });
  await withEnv({ RINGRIFT_COORDINATOR_IP: "not a host" }, async () => {
    const error = await assertRejects(() => address({}), HostsConfigError);
    assertStringIncludes(error.message, "RINGRIFT_COORDINATOR_IP");
  });
  assertEquals((await getCoordinatorNode({ hosts: { head: {} }, elo_sync }))?.name, "head");
  assertEquals(await getCoordinatorNode({ hosts: {}, elo_sync }), undefined);
});

Deno.test("loadHostsConfig() takes what is named, then the variable, then the default path", async () => {
  await using named = await writeInventory({ named: {} });
  await using variable = await writeInventory({ variable: {} });
  const script = `import { loadHostsConfig } from "${ROOT}mod.ts";
    const [source] = Deno.args;
    console.log(Object.keys((await loadHostsConfig(source)).hosts).join());`;
  const folder = named.folder;
  await Deno.writeTextFile(`${folder}/load.ts`, script);
  const load = async (args: string[], env: Record<string, string> = {}) => {
    const flags = [
      "-q",
      "--no-prompt",
      "--config",
      `${ROOT}deno.json`,
      "--allow-read",
      "--allow-env=RINGRIFT_HOSTS_CONFIG",
    ];
    const { stdout, stderr } = await run("deno", ["run", ...flags, "load.ts", ...args], { cwd: folder, env });
    return stdout.trim() + stderr.split("\n")[0]!;
  };
  const env = { RINGRIFT_HOSTS_CONFIG: variable.path };
  assertEquals(await load([named.path], env), "named");
  assertEquals(await load([`file://${named.path}`], env), "named");
  assertEquals(await load([], env), "variable");
  assertEquals(await load([]), "", "a default file that is missing is an empty cluster");
  await Deno.mkdir(`${folder}/config`);
  await Deno.writeTextFile(`${folder}/config/distributed_hosts.yaml`, "hosts: { default: {} }");
  assertEquals(await load([]), "default");
  assertEquals(await load([], { RINGRIFT_HOSTS_CONFIG: " " }), "default");
  assertStringIncludes(await load([`${folder}/none.yaml`]), "there is no such file");
  assertStringIncludes(await load([], { RINGRIFT_HOSTS_CONFIG: `${folder}/none.yaml` }), "there is no such file");
});

Deno.test("loadHostsConfig() keeps the YAML as written, and takes an object", async () => {
  await using file = await writeInventory({ b: { rack: 7, ssh_port: "22" }, a: {} }, { other: { kept: [1] } });
  const config = await loadHostsConfig(file.path);
  assertEquals(config, { hosts: { b: { rack: 7, ssh_port: "22" }, a: {} }, elo_sync: {}, other: { kept: [1] } });
  assertEquals(await loadHostsConfig(config), config);
  assertEquals([...(await getClusterNodes(config)).keys()], ["b", "a"]);
  assertEquals((await getClusterNodes(config)).get("b")?.sshPort, 22);
  assertEquals((await getClusterNodes(config)).get("b")?.entry.rack, 7);
  await assertRejects(() => loadHostsConfig(cluster({ a: { ssh_port: 0 } })), HostsConfigError, "hosts.a.ssh_port");
});

Deno.test("loadHostsConfig() fetches a URL, and says what is wrong with one", async () => {
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url, signal }) => {
    switch (new URL(url).pathname) {
      case "/hosts.yaml":
        return new Response("hosts: { gpu-1: {} }");
      case "/html":
        return new Response("<!doctype html><html><body>Log in: x</body></html>");
      case "/moved":
        return new Response(null, { status: 302, headers: { location: "/hosts.yaml" } });
      case "/never":
        // Until the client leaves: the server waits for its answers before it ends.
        return new Promise<Response>((resolve) => signal.addEventListener("abort", () => resolve(new Response())));
    }
    return new Response("no", { status: 404 });
  });
  const url = `http://127.0.0.1:${server.addr.port}`;
  assertEquals(Object.keys((await loadHostsConfig(`${url}/hosts.yaml`)).hosts), ["gpu-1"]);
  assertEquals(Object.keys((await loadHostsConfig(new URL(`${url}/hosts.yaml`))).hosts), ["gpu-1"]);
  const cases = [["/none", "HTTP 404"], ["/html", "is HTML"], ["/moved", "redirect"]] as const;
  for (const [path, message] of cases) {
    await assertRejects(() => loadHostsConfig(url + path), HostsConfigError, message);
  }
  await assertRejects(() => loadHostsConfig(`${url}/never`, { timeoutMs: 100 }), HostsConfigError, "within 100 ms");
  await assertRejects(
    () =>
      loadHostsConfig(`${url}/never`, { signal: AbortSignal.abort("enough") }).catch((reason) => {
        throw new Error(reason);
      }),
    Error,
    "enough",
  );
  await assertRejects(() => loadHostsConfig("http://"), HostsConfigError, "is not a URL");
});

Deno.test("the data port is the node's, else distributed's, else the unified config's, else 8766", async () => {
  const hosts = { own: { data_server_port: 1 }, none: {} };
  const ports = async (config: HostsConfig) =>
    [...(await getClusterNodes(config)).values()].map(({ dataServerPort }) => dataServerPort);
  assertEquals(await ports(cluster(hosts)), [1, 8766]);
  assertEquals(await ports(cluster(hosts, { distributed: { data_server_port: "7" } })), [1, 7]);
  assertEquals(await ports(cluster(hosts, { distributed: "another program's" })), [1, 8766]);
  await using unified = await writeInventory({}, { distributed: { data_server_port: 5 } });
  await withEnv({ RINGRIFT_CONFIG_PATH: unified.path }, async () => {
    assertEquals(await ports(cluster(hosts)), [1, 5]);
    assertEquals(await ports(cluster(hosts, { distributed: { data_server_port: 7 } })), [1, 7]);
  });
  await withEnv({ RINGRIFT_CONFIG_PATH: "/tmp/none.yaml" }, async () => {
    await assertRejects(() => ports(cluster(hosts)), HostsConfigError, "/tmp/none.yaml");
    assertEquals(await ports(cluster({ own: hosts.own })), [1], "it is not read where nothing depends on it");
  });
});

Deno.test("selectNodes() by names, globs and ranges, in the order of the nodes", async () => {
  const names = ["gpu-1", "gpu-2", "gpu-10", "gpu-08", "gpu-09", "node.a", "nodeXa", "[odd]", "old-1"];
  const nodes = names.map((name) => node({ name, status: name === "old-1" ? "retired" : "active" }));
  const select = (...patterns: string[]) => selectNodes(nodes, { names: patterns }).map(({ name }) => name);
  const cases = [
    [["gpu-2", "gpu-1"], ["gpu-1", "gpu-2"]],
    [["gpu-?"], ["gpu-1", "gpu-2"]],
    [["gpu-*"], ["gpu-1", "gpu-2", "gpu-10", "gpu-08", "gpu-09"]],
    [["gpu-[1-9]"], ["gpu-1", "gpu-2"]],
    [["gpu-[1-10]"], ["gpu-1", "gpu-2", "gpu-10"]],
    [["gpu-[08-10]"], ["gpu-10", "gpu-08", "gpu-09"]],
    [["gpu-[2,08-09]"], ["gpu-2", "gpu-08", "gpu-09"]],
    [["node.a"], ["node.a"]],
    [["node.*"], ["node.a"]],
    [["[odd]"], ["[odd]"]],
    [["old-1"], ["old-1"]],
    [["old-*", "gpu-1"], ["gpu-1"]],
  ] as const;
  for (const [patterns, expected] of cases) assertEquals(select(...patterns), [...expected], patterns.join());
  assertEquals(selectNodes(nodes).length, names.length - 1);
  assertEquals(selectNodes(nodes, { exclude: ["gpu-*", "node?a"] }).map(({ name }) => name), ["[odd]"]);
  const error = assertThrows(() => select("gpu-3", "tpu-*", "gpu-1"), RangeError);
  assertEquals(error.message, 'No node matches "gpu-3" (is "gpu-1" meant?), "tpu-*"');
  assertThrows(() => selectNodes(nodes, { exclude: ["gone"] }), RangeError, "gone");
  for (const range of ["gpu-[]", "gpu-[a-b]", "gpu-[8-1]", "gpu-[1-]"]) {
    assertThrows(() => select(range), RangeError, "expected numbers");
  }
  assertEquals((await getActiveNodes(cluster({ a: { status: "offline" }, b: {} }))).map(({ name }) => name), ["b"]);
});

Deno.test("selectNodes() by role, status, GPU, and with the inactive", () => {
  const nodes = [
    node({ name: "a", role: "Worker", status: "active", gpu: "NVIDIA GH200" }),
    node({ name: "b", role: "worker", status: "offline", gpu: "H100" }),
    node({ name: "c", role: "coordinator", status: "ready" }),
  ];
  const cases = [
    [{ roles: ["worker"] }, ["a"]],
    [{ roles: ["worker"], includeInactive: true }, ["a", "b"]],
    [{ roles: ["worker", "coordinator"] }, ["a", "c"]],
    [{ gpus: ["gh2", "none"] }, ["a"]],
    [{ gpus: ["h"], includeInactive: true }, ["a", "b"]],
    [{ statuses: ["READY"] }, ["c"]],
    [{ statuses: ["offline"] }, ["b"]],
    [{ names: ["b"], roles: ["worker"] }, ["b"]],
    [{ names: ["*"], exclude: ["a"] }, ["c"]],
    [{ names: [] }, []],
  ] as const;
  for (const [selection, expected] of cases) {
    assertEquals(selectNodes(nodes, selection).map(({ name }) => name), [...expected], JSON.stringify(selection));
  }
});

Deno.test("getSyncUrls() and its kin give URLs in the order of the config, without duplicates", async () => {
  const source = {
    hosts: {
      b: { tailscale_ip: "100.64.0.2", data_server_port: 9001 },
      a: { ssh_host: "root@192.0.2.1" },
      twin: { tailscale_ip: "192.0.2.1" },
      six: { tailscale_ip: "2001:db8::1", data_server_url: "https://six.example.com/data" },
      bare: {},
      off: { tailscale_ip: "100.64.0.3", status: "offline" },
    },
    elo_sync: { sync_port: 9000 },
  };
  const options = { source, reachableOnly: false, excludeSelf: false };
  const urls = (port: number, path: string) =>
    ["100.64.0.2", "192.0.2.1", "[2001:db8::1]"].map((it) => `http://${it}:${port}${path}`);
  assertEquals(await getSyncUrls(options), urls(8766, "/db"));
  assertEquals(await getSyncUrls({ ...options, port: 8765, path: "/models" }), urls(8765, "/models"));
  assertEquals(await getEloSyncUrls(options), urls(9000, "/db"));
  assertEquals(await getEloSyncUrls({ ...options, port: 9002 }), urls(9002, "/db"));
  assertEquals(await getDataSyncUrls(options), [
    "http://100.64.0.2:9001",
    "http://192.0.2.1:8766",
    "https://six.example.com/data",
  ]);
  assertEquals(await getSyncUrls({ ...options, selection: { names: ["off"] } }), ["http://100.64.0.3:8766/db"]);
  await assertRejects(() => getSyncUrls({ ...options, path: "db" }), TypeError, "begins with");
  await assertRejects(() => getSyncUrls({ ...options, port: 0 }), RangeError, "port 0");
});

Deno.test("sync URLs are those of the nodes whose /status answers, at the address that answered", async () => {
  await using up = await startNode("ok");
  await using ill = await startNode("http-500");
  await using dead = await startNode("refuses");
  const paths: string[] = [];
  await using behindPath = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
    paths.push(new URL(url).pathname);
    return Response.json({});
  });
  const url = `http://127.0.0.1:${behindPath.addr.port}/data/`;
  const source = cluster({
    ill: { tailscale_ip: "127.0.0.1", data_server_port: ill.port },
    up: { tailscale_ip: "127.0.0.1", data_server_port: up.port },
    second: { tailscale_ip: "127.0.0.9", ssh_host: "127.0.0.1", data_server_port: up.port },
    url: { tailscale_ip: "127.0.0.1", data_server_port: dead.port, data_server_url: url },
    dead: { tailscale_ip: "127.0.0.1", data_server_port: dead.port },
  });
  assertEquals(await getDataSyncUrls({ source, excludeSelf: false }), [`http://127.0.0.1:${up.port}`, url]);
  assertEquals(paths, ["/data/status"]);
  assertEquals(await getSyncUrls({ source, port: up.port, path: "/x" }), [`http://127.0.0.1:${up.port}/x`]);
  assertEquals(await getEloSyncUrls({ source: { ...source, elo_sync: { sync_port: up.port } } }), [
    `http://127.0.0.1:${up.port}/db`,
  ]);
});

Deno.test("getDataSyncUrls() leaves out this host, by its name, its variable and its addresses", async () => {
  const host = Deno.hostname();
  const urls = (name: string, fields: Record<string, unknown> = { ssh_host: "192.0.2.1" }) =>
    getDataSyncUrls({ source: cluster({ [name]: fields }), reachableOnly: false });
  assertEquals(await urls("another"), ["http://192.0.2.1:8766"]);
  assertEquals(await urls(host.toUpperCase()), []);
  assertEquals(await urls(host.split(".")[0]!), []);
  assertEquals(await urls("another", { ssh_host: "127.0.0.1" }), []);
  await withEnv({ RINGRIFT_NODE_ID: "GPU-7.example.com" }, async () => {
    assertEquals(await urls("gpu-7"), []);
    assertEquals(await urls("gpu-7.example.com"), []);
    assertEquals(await urls(host), ["http://192.0.2.1:8766"]);
  });
  const source = cluster({ [host]: { ssh_host: "192.0.2.1" } });
  assertEquals(await getDataSyncUrls({ source, reachableOnly: false, excludeSelf: false }), ["http://192.0.2.1:8766"]);
});

Deno.test("sshCommand() gives the whole argument list", () => {
  const full = node({ tailscaleIp: "2001:db8::1", sshHost: "root@x", sshKey: "~/.ssh/id", sshPort: 2222 });
  assertEquals(sshCommand(full, ["echo", "a b"], { options: ["ServerAliveInterval=5"] }), [
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-p",
    "2222",
    "-i",
    "~/.ssh/id",
    "-o",
    "ServerAliveInterval=5",
    "--",
    "root@2001:db8::1",
    "echo",
    "a b",
  ]);
  const plain = node({ sshHost: "gpu.example.com" });
  const replaced = { user: "ops", connectTimeoutMs: 1500, options: ["port=23", "BatchMode=no"] };
  assertEquals(
    sshCommand(plain, ["-x"], replaced).join(" "),
    "ssh -o ConnectTimeout=2 -o port=23 -o BatchMode=no -- ops@gpu.example.com -x",
  );
  assertThrows(() => sshCommand(node(), ["x"]), TypeError, "no address");
  assertThrows(() => sshCommand(node({ sshHost: "x", sshPort: 0 }), ["x"]), RangeError, "port 0");
  assertThrows(() => sshCommand(plain, ["x"], { connectTimeoutMs: 0 }), RangeError, "0 ms");
  assertThrows(() => sshCommand(plain, ["a\0b"]), TypeError, "NUL");
});

Deno.test("sshCommand() refuses what ssh or a shell could take for something else", () => {
  const nasty = [
    "-oProxyCommand=x",
    "a b",
    "a;b",
    "$(x)",
    "`x`",
    "a\nb",
    "a\0b",
    "a%hb",
    "a|b",
    "a&b",
    "a'b",
    'a"b',
    "a\\b",
    "a<b",
  ];
  const plain = node({ sshHost: "x" });
  for (const text of nasty) {
    assertThrows(() => sshCommand(node({ sshHost: text }), ["x"]), TypeError, "address", text);
    assertThrows(() => sshCommand(node({ sshHost: `root@${text}` }), ["x"]), TypeError, "address", text);
    assertThrows(() => sshCommand(plain, ["x"], { user: text }), TypeError, "user", text);
    assertThrows(() => sshCommand(node({ sshHost: "x", sshUser: text }), ["x"]), TypeError, "user", text);
    assertThrows(() => sshCommand(node({ sshHost: "x", sshKey: text }), ["x"]), TypeError, "key", text);
    assertThrows(() => sshCommand(plain, ["x"], { options: [`ProxyJump=${text}`] }), TypeError, "ProxyJump", text);
    assertThrows(() => sshCommand(plain, ["x"], { options: [`ProxyJump=ok,${text}`] }), TypeError, "ProxyJump", text);
  }
  for (const option of ["", "-x", "NoValue", "A B=c", "ProxyCommand=a\nb"]) {
    assertThrows(() => sshCommand(plain, ["x"], { options: [option] }), TypeError, "ssh option", option);
  }
  const jump = ["ProxyJump=ops@[2001:db8::1]:22,other"];
  assert(sshCommand(plain, ["x"], { options: jump }).includes(jump[0]!));
});

Deno.test("probing rejects options that are out of range", async () => {
  const bad = [{ port: 0 }, { port: 65536 }, { port: 1.5 }, { timeoutMs: 0 }, { timeoutMs: NaN }, {
    timeoutMs: 2 ** 31,
  }];
  for (const options of bad) await assertRejects(() => probeNode(node(), options), RangeError, "Cannot");
  for (const path of ["status", "/a b", "/a\r\nX: y", "/ä"]) {
    await assertRejects(() => probeNode(node(), { path }), TypeError, "expected a path");
  }
  await assertRejects(() => api.probeNodes([node()], { concurrency: 0 }), RangeError, "at once");
  await assertRejects(() => probeNode(node(), { check: "icmp" as "tcp" }), TypeError, "icmp");
});

Deno.test("importing needs no permission", async () => {
  for (const module of ["mod.ts", "cluster_hosts.ts", "cli.ts"]) {
    await using inventory = await writeInventory({});
    await Deno.writeTextFile(
      `${inventory.folder}/import.ts`,
      `await import("${ROOT}${module}"); console.log("imported");`,
    );
    const args = ["run", "-q", "--no-prompt", "--config", `${ROOT}deno.json`, `${inventory.folder}/import.ts`];
    const { stdout, stderr } = await run("deno", args);
    assertEquals([stdout, stderr], ["imported\n", ""], module);
  }
});

const reachable = { tailscaleIp: "127.0.0.1", dataServerPort: 9 };

Deno.test({
  name: "without net, no node looks down",
  permissions: { net: false },
  async fn() {
    const { state, failure } = await probeNode(node(reachable));
    assertEquals([state, failure?.code], ["unknown", "denied"]);
    assertStringIncludes(failure?.message ?? "", "--allow-net=127.0.0.1:9");
    const source = cluster({ "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: 9 } });
    const calls = [
      () => checkNodeReachable(node(reachable)),
      () => checkHttpEndpoint("127.0.0.1", 9),
      () => discoverReachableNodes({ source }),
      () => getSyncUrls({ source, port: 9 }),
    ];
    for (const call of calls) await assertRejects(call, Deno.errors.NotCapable, "--allow-net=127.0.0.1:9");
    await assertRejects(
      () => loadHostsConfig("https://example.com/a.yaml"),
      Deno.errors.NotCapable,
      "--allow-net=example.com:443",
    );
  },
});

Deno.test({
  name: "without read, the error names the file",
  permissions: { read: false, env: false },
  async fn() {
    await assertRejects(() => loadHostsConfig(), Deno.errors.NotCapable, "--allow-read=config/distributed_hosts.yaml");
    await assertRejects(() => loadHostsConfig("other.yaml"), Deno.errors.NotCapable, "--allow-read=other.yaml");
  },
});

Deno.test({
  name: "without env and sys, variables count as unset, and the hostname is asked for by its flag",
  permissions: { env: false, sys: false, net: false },
  async fn() {
    const source = cluster({ "gpu-1": { ssh_host: "192.0.2.1" } });
    assertEquals(await getCoordinatorAddress(source), undefined);
    await assertRejects(
      () => getDataSyncUrls({ source, reachableOnly: false }),
      Deno.errors.NotCapable,
      "--allow-sys=hostname",
    );
    assertEquals((await getDataSyncUrls({ source, reachableOnly: false, excludeSelf: false })).length, 1);
  },
});
