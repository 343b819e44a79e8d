import { assert, assertEquals, assertRejects, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import {
  type ClusterNode,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getEloSyncConfig,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  parseHostsConfig,
  readsUnifiedConfig,
  readVariable,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { writeInventory } from "./process.ts";

/** Whatever the variables of whoever runs the tests are: they count as unset. */
const permissions = { env: false } as const;

async function nodesOf(config: HostsConfig): Promise<ClusterNode[]> {
  return [...(await getClusterNodes(config)).values()];
}

Deno.test({
  name: "every getter takes { hosts } written in place, and a config that was loaded",
  permissions,
  async fn() {
    // Written out, so that the types are checked: neither elo_sync nor a cast is needed.
    assertEquals((await getActiveNodes({ hosts: { a: {}, b: { status: "offline" } } })).map(({ name }) => name), ["a"]);
    assertEquals([...(await getClusterNodes({ hosts: { a: { rack: 7 } } })).keys()], ["a"]);
    assertEquals(await getCoordinatorNode({ hosts: {} }), undefined);
    assertEquals(await getCoordinatorAddress({ hosts: { "mac-studio": { ssh_host: "x" } } }), {
      hostname: "x",
      port: 8766,
    });
    assertEquals((await getEloSyncConfig({ hosts: {}, elo_sync: { sync_port: 1 } })).syncPort, 1);
    assertEquals(await loadHostsConfig({ hosts: { a: {} }, notes: ["kept"] }), { hosts: { a: {} }, notes: ["kept"] });

    const config: HostsConfig = parseHostsConfig("hosts: { a: {}, b: { status: offline } }");
    assertEquals((await getActiveNodes(config)).map(({ name }) => name), ["a"]);
  },
});

Deno.test({
  name: "getClusterNodes() gives the nodes by name, in the order of the config, with what is written",
  permissions,
  async fn() {
    const hosts = { b: { rack: 7, ssh_port: "22", cpus: null }, a: { status: "offline" } };
    const nodes = await getClusterNodes({ hosts });
    assertEquals([...nodes.keys()], ["b", "a"]);
    const b = nodes.get("b")!;
    assertEquals([b.name, b.sshPort, b.cpus, b.entry], ["b", 22, 0, hosts.b]);
  },
});

Deno.test({
  name: "getClusterNodes() gives a node to keep: a change of the map changes no other",
  permissions,
  async fn() {
    const config = parseHostsConfig("hosts: { a: {}, b: {} }");
    (await getClusterNodes(config)).delete("a");
    assertEquals((await getClusterNodes(config)).size, 2);
  },
});

Deno.test({
  name: "the data port and the status path are the node's, else those of distributed, else the defaults",
  permissions,
  async fn() {
    const hosts = { own: { data_server_port: 1, status_path: "/own" }, none: {}, blank: { data_server_port: " " } };
    const fields = async (distributed?: unknown) =>
      (await nodesOf({ hosts, distributed })).map((node) => `${node.dataServerPort}${node.statusPath}`);
    assertEquals(await fields(), ["1/own", "8766/status", "8766/status"]);
    assertEquals(await fields({ data_server_port: "7" }), ["1/own", "7/status", "7/status"]);
    assertEquals(await fields({ status_path: "/health" }), ["1/own", "8766/health", "8766/health"]);
    assertEquals(await fields("another program's"), ["1/own", "8766/status", "8766/status"]);
    assertEquals(await fields({ enabled: true, data_server_port: null }), ["1/own", "8766/status", "8766/status"]);
  },
});

Deno.test("the data port of a node that has none is that of the unified config", async () => {
  await using unified = await writeInventory({}, { distributed: { data_server_port: 5, status_path: "none" } });
  await using broken = await writeInventory({}, { distributed: { data_server_port: "hunter2" } });
  await using empty = await writeInventory({}, { other: {} });
  const none = `${empty.folder}/none.yaml`;
  const hosts = { own: { data_server_port: 1, cpus: 3 }, none: { cpus: 4, rack: 7 } };
  const outcomes = await evaluate(`
    const hosts = ${JSON.stringify(hosts)};
    const ports = async (path, config) => withVariable("RINGRIFT_CONFIG_PATH", path, async () =>
      [...(await api.getClusterNodes(config)).values()].map((node) => [node.dataServerPort, node.cpus, node.entry.rack]));
    console.log(JSON.stringify({
      unified: await ports(${JSON.stringify(unified.path)}, { hosts }),
      distributed: await ports(${JSON.stringify(unified.path)}, { hosts, distributed: { data_server_port: 7 } }),
      empty: await ports(${JSON.stringify(empty.path)}, { hosts }),
      broken: await ports(${JSON.stringify(broken.path)}, { hosts }),
      missing: await ports(${JSON.stringify(none)}, { hosts }),
      "nothing depends on it": await ports(${JSON.stringify(none)}, { hosts: { own: hosts.own } }),
    }));`);
  const row = (own: number, none: number) => [[own, 3, null], [none, 4, 7]];
  assertEquals(outcomes, {
    unified: row(1, 5),
    distributed: row(1, 7),
    empty: row(1, 8766),
    broken: `${broken.path}:4: distributed.data_server_port: expected an integer from 1 to 65535`,
    missing: `${none}: there is no such file (RINGRIFT_CONFIG_PATH names it)`,
    "nothing depends on it": [[1, 3, null]],
  });
});

Deno.test({
  name: "readsUnifiedConfig() says whether a node takes its port from it",
  permissions,
  async fn() {
    const cases: [config: HostsConfig, reads: boolean][] = [
      [{ hosts: { a: {} } }, true],
      [{ hosts: { a: { data_server_port: 1 }, b: { data_server_port: "" } } }, true],
      [{ hosts: { a: { data_server_port: 1 } } }, false],
      [{ hosts: { a: {} }, distributed: { data_server_port: 1 } }, false],
      [{ hosts: { a: {} }, distributed: { status_path: "/x" } }, true],
      [{ hosts: {} }, false],
    ];
    for (const [config, reads] of cases) assertEquals(await readsUnifiedConfig(config), reads, JSON.stringify(config));
  },
});

Deno.test("getEloSyncConfig() merges a partial section with the defaults", async () => {
  const defaults = {
    coordinator: "mac-studio",
    syncPort: 8766,
    syncInterval: 300,
    divergenceThreshold: 50,
    transports: ["tailscale", "aria2", "http"],
  };
  for (const elo_sync of [undefined, null, {}, { coordinator: " ", transports: null }]) {
    assertEquals(await getEloSyncConfig({ hosts: {}, ...(elo_sync === undefined ? {} : { elo_sync }) }), defaults);
  }
  const partial = { sync_port: "9000", coordinator: null, sync_interval: 60, transports: ["http"], extra: 1 };
  assertEquals(await getEloSyncConfig({ hosts: {}, elo_sync: partial }), {
    ...defaults,
    syncPort: 9000,
    syncInterval: 60,
    transports: ["http"],
  });
});

Deno.test("getCoordinatorNode() gives the node that elo_sync names, active or not", async () => {
  const hosts = { head: { status: "offline", data_server_port: 1 }, "mac-studio": { data_server_port: 1 } };
  assertEquals((await getCoordinatorNode({ hosts }))?.name, "mac-studio");
  assertEquals((await getCoordinatorNode({ hosts, elo_sync: { coordinator: " head " } }))?.name, "head");
  assertEquals(await getCoordinatorNode({ hosts, elo_sync: { coordinator: "other" } }), undefined);
  assertEquals(await getCoordinatorNode({ hosts, elo_sync: { coordinator: "toString" } }), undefined);
});

Deno.test({
  name: "getCoordinatorAddress() from the config: the best address and the port of elo_sync",
  permissions,
  async fn() {
    const cases = [
      [{ tailscale_ip: "100.64.0.9", ssh_host: "x" }, "100.64.0.9"],
      [{ ssh_host: "ops@192.0.2.9", status: "offline" }, "192.0.2.9"],
      [{ tailscale_ip: "2001:db8::1", data_server_url: "http://192.0.2.1/a" }, "2001:db8::1"],
      [{ ssh_host: " " }, undefined],
      [{}, undefined],
    ] as const;
    for (const [head, hostname] of cases) {
      const source = { hosts: { head }, elo_sync: { coordinator: "head", sync_port: 9000 } };
      const expected = hostname === undefined ? undefined : { hostname, port: 9000 };
      assertEquals(await getCoordinatorAddress(source), expected, JSON.stringify(head));
    }
    assertEquals(await getCoordinatorAddress({ hosts: { other: { ssh_host: "x" } } }), undefined);
  },
});

Deno.test("getCoordinatorAddress() takes the variable if the config has no address", async () => {
  const outcomes = await evaluate(`
    const elo_sync = { coordinator: "head", sync_port: 9000 };
    const address = async (value, hosts) => await withVariable("RINGRIFT_COORDINATOR_IP", value, () =>
      api.getCoordinatorAddress({ hosts, elo_sync })) ?? "none";
    console.log(JSON.stringify({
      "not in hosts": await address(" 192.0.2.77 ", { other: {} }),
      "no address": await address("192.0.2.77", { head: {} }),
      "an address": await address("192.0.2.77", { head: { ssh_host: "x" } }),
      "IPv6": await address("[2001:db8::1]", {}),
      blank: await address(" ", {}),
      "not a host": await address("hunter2 x", {}),
    }));`) as Record<string, unknown>;
  const address = (hostname: string) => ({ hostname, port: 9000 });
  const { "not a host": message, ...addresses } = outcomes;
  assertEquals(addresses, {
    "not in hosts": address("192.0.2.77"),
    "no address": address("192.0.2.77"),
    "an address": address("x"),
    IPv6: address("2001:db8::1"),
    blank: "none",
  });
  assertStringIncludes(String(message), "RINGRIFT_COORDINATOR_IP");
  assert(!String(message).includes("hunter2"));
});

Deno.test("readVariable() gives a variable trimmed, or nothing", async () => {
  const outcomes = await evaluate(`
    Deno.env.set("X", " a b "); Deno.env.set("BLANK", " ");
    console.log(JSON.stringify(["X", "BLANK", "NONE"].map((name) => api.readVariable(name) ?? null)));`);
  assertEquals(outcomes, ["a b", null, null]);
});

Deno.test({
  name: "readVariable() of a variable that may not be read is nothing",
  permissions: { env: ["HOME"] },
  fn: () => assertEquals(readVariable("PATH"), undefined),
});

Deno.test("every getter refuses a source with problems", async () => {
  const source: HostsConfig = { hosts: { a: { ssh_port: 0 } } };
  for (const get of [getClusterNodes, getActiveNodes, getCoordinatorNode, getCoordinatorAddress, getEloSyncConfig]) {
    const call: (source: HostsConfig) => Promise<unknown> = get;
    await assertRejects(() => call(source), HostsConfigError, "hosts.a.ssh_port");
  }
});
