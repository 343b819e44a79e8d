import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
} from "jsr:@std/assert@^1.0.19";
import { readsUnifiedConfig, readVariable } from "../cluster_hosts.ts";
import {
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getEloSyncConfig,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  parseHostsConfig,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { tempFolder } from "./process.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false } as const;

Deno.test({
  name: "every getter accepts { hosts } written in place, and a loaded config",
  permissions,
  async fn() {
    // Written out, so that the types are checked: no cast is needed.
    const active = await getActiveNodes({
      hosts: { a: {}, b: { status: "offline" } },
    });
    assertEquals(active.map(({ name }) => name), ["a"]);

    const nodes = await getClusterNodes({ hosts: { a: { rack: 7 } } });
    assertEquals([...nodes.keys()], ["a"]);

    assertEquals(await getCoordinatorNode({ hosts: {} }), undefined);
    assertEquals(
      await getCoordinatorAddress({
        hosts: { "mac-studio": { ssh_host: "x" } },
      }),
      { hostname: "x", port: 8766 },
    );

    const elo = await getEloSyncConfig({
      hosts: {},
      elo_sync: { sync_port: 1 },
    });
    assertEquals(elo.syncPort, 1);

    assertEquals(
      await loadHostsConfig({ hosts: { a: {} }, notes: ["kept"] }),
      { hosts: { a: {} }, notes: ["kept"] },
    );

    const config: HostsConfig = parseHostsConfig("hosts: { a: {} }");
    assertEquals((await getActiveNodes(config)).map(({ name }) => name), ["a"]);
  },
});

Deno.test({
  name:
    "getClusterNodes() returns the nodes by name, in order, with what is written",
  permissions,
  async fn() {
    const hosts = {
      b: { rack: 7, ssh_port: "22", cpus: null },
      a: { status: "offline" },
    };
    const nodes = await getClusterNodes({ hosts });
    assertEquals([...nodes.keys()], ["b", "a"]);

    const b = nodes.get("b")!;
    assertEquals([b.name, b.sshPort, b.cpus], ["b", 22, 0]);
    assertEquals(b.entry, hosts.b);
  },
});

/** Configs, and whether a node takes its port from another program's config. */
const UNIFIED: [config: HostsConfig, reads: boolean][] = [
  [{ hosts: { a: {} } }, true],
  [
    { hosts: { a: { data_server_port: 1 }, b: { data_server_port: "" } } },
    true,
  ],
  [{ hosts: { a: {} }, distributed: { status_path: "/x" } }, true],
  [{ hosts: { a: {} }, defaults: { ssh_port: 1 } }, true],
  [{ hosts: { a: { data_server_port: 1 } } }, false],
  [{ hosts: { a: {} }, distributed: { data_server_port: 1 } }, false],
  [{ hosts: { a: {} }, defaults: { data_server_port: 1 } }, false],
  [{ hosts: {} }, false],
];

for (const [config, reads] of UNIFIED) {
  const given = JSON.stringify(config);

  Deno.test(`readsUnifiedConfig() of ${given} returns ${reads}`, async () => {
    assertEquals(await readsUnifiedConfig(config), reads);
  });
}

const ELO_DEFAULTS = {
  coordinator: "mac-studio",
  syncPort: 8766,
  syncInterval: 300,
  divergenceThreshold: 50,
  transports: ["tailscale", "aria2", "http"],
};

/** Sections that set nothing. */
const UNSET_ELO = [null, {}, { coordinator: " ", transports: null }];

for (const elo_sync of UNSET_ELO) {
  const given = JSON.stringify(elo_sync);

  Deno.test(`getEloSyncConfig() of ${given} returns the defaults`, async () => {
    const elo = await getEloSyncConfig({ hosts: {}, elo_sync });
    assertEquals(elo, ELO_DEFAULTS);
  });
}

Deno.test("getEloSyncConfig() merges a part of the section with the defaults", async () => {
  const elo_sync = {
    sync_port: "9000",
    coordinator: null,
    sync_interval: 60,
    transports: ["http"],
    extra: 1,
  };
  assertEquals(await getEloSyncConfig({ hosts: {}, elo_sync }), {
    ...ELO_DEFAULTS,
    syncPort: 9000,
    syncInterval: 60,
    transports: ["http"],
  });
});

/** What `elo_sync.coordinator` is, and the node that it names. */
const COORDINATORS: [coordinator: string | undefined, name?: string][] = [
  [undefined, "mac-studio"],
  ["head", "head"],
  [" head ", "head"],
  ["7", "7"],
  ["other"],
  ["toString"],
];

for (const [coordinator, name] of COORDINATORS) {
  const given = JSON.stringify(coordinator);

  Deno.test(`getCoordinatorNode() for coordinator ${given} returns ${name}`, async () => {
    const data_server_port = 1;
    const hosts = {
      head: { status: "offline", data_server_port },
      "mac-studio": { data_server_port },
      "7": { data_server_port },
    };
    const elo_sync = coordinator === undefined ? {} : { coordinator };
    const node = await getCoordinatorNode({ hosts, elo_sync });
    assertEquals(node?.name, name);
  });
}

/** The coordinator's fields, and its address. */
const ADDRESSES: [head: Record<string, string>, hostname?: string][] = [
  [{ tailscale_ip: "100.64.0.9", ssh_host: "x" }, "100.64.0.9"],
  [{ ssh_host: "ops@192.0.2.9", status: "offline" }, "192.0.2.9"],
  [{ tailscale_ip: "2001:db8::1", data_server_url: "http://x" }, "2001:db8::1"],
  [{ ssh_host: " " }],
  [{}],
];

for (const [head, hostname] of ADDRESSES) {
  Deno.test({
    name: `getCoordinatorAddress() of ${
      JSON.stringify(head)
    } returns ${hostname}`,
    permissions,
    async fn() {
      const elo_sync = { coordinator: "head", sync_port: 9000 };
      const address = await getCoordinatorAddress({
        hosts: { head },
        elo_sync,
      });

      const expected = hostname && { hostname, port: 9000 };
      assertEquals(address, expected);
    },
  });
}

Deno.test("getCoordinatorAddress() uses the variable if the config has no address", async () => {
  const outcomes = await evaluate(`
    const elo_sync = { coordinator: "head", sync_port: 9000 };
    const addressOf = async (value, hosts) =>
      await withVariable("RINGRIFT_COORDINATOR_IP", value, () =>
        api.getCoordinatorAddress({ hosts, elo_sync })) ?? "none";

    console.log(JSON.stringify({
      "not in hosts": await addressOf(" 192.0.2.77 ", { other: {} }),
      "no address": await addressOf("192.0.2.77", { head: {} }),
      "an address": await addressOf("192.0.2.77", { head: { ssh_host: "x" } }),
      "IPv6": await addressOf("[2001:db8::1]", {}),
      blank: await addressOf(" ", {}),
      "not a host": await addressOf("hunter2 x", {}),
    }));`) as Record<string, unknown>;

  const { "not a host": message, ...addresses } = outcomes;
  const address = (hostname: string) => ({ hostname, port: 9000 });
  assertEquals(addresses, {
    "not in hosts": address("192.0.2.77"),
    "no address": address("192.0.2.77"),
    "an address": address("x"),
    IPv6: address("2001:db8::1"),
    blank: "none",
  });
  assertMatch(String(message), /RINGRIFT_COORDINATOR_IP/);
  assert(!String(message).includes("hunter2"));
});

// --- Without an inventory ---

Deno.test("getCoordinatorAddress() without an inventory returns the variable's address", async () => {
  await using temp = await tempFolder();
  const outcomes = await evaluate(
    `
    const addressOf = (value) => withVariable("RINGRIFT_COORDINATOR_IP", value, () =>
      api.getCoordinatorAddress());
    console.log(JSON.stringify([
      await addressOf("192.0.2.77"), await addressOf("[2001:db8::1]"),
      await addressOf(undefined), await addressOf("a b"),
    ]));`,
    { cwd: temp.folder },
  ) as unknown[];

  const [ipv4, ipv6, unset, wrong] = outcomes;
  assertEquals(ipv4, { hostname: "192.0.2.77", port: 8766 });
  assertEquals(ipv6, { hostname: "2001:db8::1", port: 8766 });

  const missing = "config/distributed_hosts.yaml: there is no such file in " +
    temp.folder;
  assert(String(unset).startsWith(missing), String(unset));
  assertMatch(String(unset), /RINGRIFT_HOSTS_CONFIG/);
  assertMatch(String(unset), /RINGRIFT_COORDINATOR_IP/);
  assertMatch(String(wrong), /^environment: RINGRIFT_COORDINATOR_IP: /);
});

Deno.test("nothing but getCoordinatorAddress() finds a node without an inventory", async () => {
  await using temp = await tempFolder();
  const outcomes = await evaluate(
    `
    const getters = [api.getClusterNodes, api.getActiveNodes,
      api.getCoordinatorNode, api.getEloSyncConfig, api.loadHostsConfig,
      api.discoverReachableNodes, api.getEloSyncUrls];
    const names = await Promise.all(getters.map((get) =>
      get().then(() => "found", (error) => error.name)));
    console.log(JSON.stringify(names));`,
    { cwd: temp.folder, env: { RINGRIFT_COORDINATOR_IP: "127.0.0.1" } },
  );
  assertEquals(outcomes, Array(7).fill("HostsConfigError"));
});

Deno.test("getCoordinatorAddress() rejects another inventory that is missing", async () => {
  const outcome = await evaluate(`
    console.log(JSON.stringify(await withVariable(
      "RINGRIFT_COORDINATOR_IP", "192.0.2.77",
      () => api.getCoordinatorAddress("/nowhere/hosts.yaml"))));`);
  assertEquals(outcome, "/nowhere/hosts.yaml: there is no such file");
});

// --- Variables ---

Deno.test("readVariable() returns a variable without outer blanks, if it is set", async () => {
  const outcomes = await evaluate(`
    Deno.env.set("X", " a b ");
    Deno.env.set("BLANK", " ");
    console.log(JSON.stringify(
      ["X", "BLANK", "NONE"].map((name) => api.readVariable(name) ?? null)));`);
  assertEquals(outcomes, ["a b", null, null]);
});

Deno.test({
  name: "readVariable() of a variable that may not be read returns undefined",
  permissions: { env: ["HOME"] },
  fn: () => assertEquals(readVariable("PATH"), undefined),
});

const GETTERS = {
  getClusterNodes,
  getActiveNodes,
  getCoordinatorNode,
  getCoordinatorAddress,
  getEloSyncConfig,
};

for (const [name, getter] of Object.entries(GETTERS)) {
  const get: (source: HostsConfig) => Promise<unknown> = getter;

  Deno.test(`${name}() rejects a source with problems`, async () => {
    const source = { hosts: { a: { ssh_port: 0 } } };
    const error = await assertRejects(() => get(source), HostsConfigError);
    assertMatch(error.message, /hosts\.a\.ssh_port/);
  });
}
