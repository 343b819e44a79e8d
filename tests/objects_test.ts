/**
 * Objects that are ours are frozen; those of a caller are read anew.
 *
 * @module
 */
import { assert, assertEquals, assertRejects } from "jsr:@std/assert@^1.0.19";
import {
  ClusterNode,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getEloSyncConfig,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  parseHostsConfig,
  validateHostsConfig,
} from "../mod.ts";
import { writeInventory } from "./process.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false } as const;

/** Asserts that a value and all that it holds are frozen. */
function assertFrozen(value: unknown, path = "it"): void {
  if (typeof value !== "object" || value === null) return;

  assert(Object.isFrozen(value), `${path} is not frozen`);
  for (const [key, child] of Object.entries(value)) {
    assertFrozen(child, `${path}.${key}`);
  }
}

const TEXT = `
defaults: { ssh_options: [Compression=yes] }
elo_sync: { transports: [http], extra: { deep: [1] } }
hosts:
  a: &a { ssh_options: [ProxyJump=b], labels: [x, { y: [z] }] }
  b: { <<: *a, gpu: H100 }
  c: *a
other: [[1], { deep: { er: [] } }]
`;

/** What comes out of an inventory, by who gives it. */
const FROZEN: Record<string, (path: string) => unknown> = {
  "parseHostsConfig()": () => parseHostsConfig(TEXT),
  "validateHostsConfig()": () => validateHostsConfig(TEXT).config,
  "loadHostsConfig()": (path) => loadHostsConfig(path),
  "parseHostsConfig() of an empty text": () => parseHostsConfig(""),
  "parseHostsConfig() without hosts": () => parseHostsConfig("a: { b: [] }"),
  "getEloSyncConfig()": (path) => getEloSyncConfig(path),
  "getEloSyncConfig() of the defaults": () => getEloSyncConfig({ hosts: {} }),
  "getActiveNodes()": async (path) => Object.freeze(await getActiveNodes(path)),
  "getClusterNodes()": async (path) =>
    Object.freeze([...(await getClusterNodes(path)).values()]),
  "new ClusterNode()": () => new ClusterNode({ name: "a" }),
};

for (const [getter, get] of Object.entries(FROZEN)) {
  Deno.test({
    name: `${getter} returns what is frozen throughout`,
    permissions: { ...permissions, read: "inherit", write: "inherit" },
    async fn() {
      await using file = await writeInventory({});
      await Deno.writeTextFile(file.path, TEXT);

      assertFrozen(await get(file.path));
    },
  });
}

Deno.test("new ClusterNode() freezes its options of ssh, not those of the caller", () => {
  const sshOptions = ["Port=1"];
  const node = new ClusterNode({ name: "a", sshOptions });
  sshOptions.push("Port=2");

  assertEquals(node.sshOptions, ["Port=1"]);
  assertFrozen(node.sshOptions);
});

Deno.test({
  name:
    "a config that is changed on the way is of no effect on the next caller",
  permissions,
  async fn() {
    const config = parseHostsConfig(TEXT);
    const { transports } = await getEloSyncConfig({ hosts: {} });
    const [node] = await getActiveNodes(config);

    const attempts = [
      () => (transports as string[]).push("x"),
      () => Object.assign(node!, { sshUser: "x" }),
      () => Object.assign(config.hosts.a!, { ssh_user: "x" }),
      () => Object.assign(config.hosts, { x: {} }),
    ];
    for (const attempt of attempts) {
      let fault: unknown;
      try {
        attempt();
      } catch (error) {
        fault = error;
      }
      assert(fault instanceof TypeError);
    }

    const defaults = await getEloSyncConfig({ hosts: {} });
    assertEquals(defaults.transports, ["tailscale", "aria2", "http"]);
    const [again] = await getActiveNodes(config);
    assertEquals(again!.sshUser, "ubuntu");
  },
});

Deno.test({
  name: "a caller's own object is read anew at each call",
  permissions,
  async fn() {
    const head: Record<string, unknown> = { ssh_host: "a" };
    const elo_sync: Record<string, unknown> = { coordinator: "head" };
    const hosts: Record<string, Record<string, unknown>> = { head };
    const config: HostsConfig = { hosts, elo_sync };
    const addressOf = () => getCoordinatorAddress(config);

    assertEquals(await addressOf(), { hostname: "a", port: 8766 });

    head.ssh_host = "b";
    assertEquals(await addressOf(), { hostname: "b", port: 8766 });

    elo_sync.sync_port = 9000;
    assertEquals(await addressOf(), { hostname: "b", port: 9000 });

    hosts.other = { status: "offline" };
    assertEquals((await getClusterNodes(config)).size, 2);
    assertEquals((await getActiveNodes(config)).length, 1);

    delete hosts.head;
    assertEquals(await addressOf(), undefined);

    hosts.bad = { ssh_port: 0 };
    await assertRejects(() => getActiveNodes(config), HostsConfigError);
  },
});

Deno.test({
  name: "a caller's own object is neither changed nor frozen",
  permissions,
  async fn() {
    const config = { hosts: { a: { labels: ["x"] } }, elo_sync: { x: [1] } };
    const before = structuredClone(config);

    const loaded = await loadHostsConfig(config);
    await getActiveNodes(config);
    await getEloSyncConfig(config);

    assertEquals(config, before);
    assertEquals(loaded, before);
    for (const value of [config, config.hosts, config.hosts.a.labels]) {
      assert(!Object.isFrozen(value));
    }
  },
});

Deno.test({
  name: "a structuredClone of a loaded config can be changed and used",
  permissions,
  async fn() {
    const copy = structuredClone(parseHostsConfig("hosts: { a: {} }"));
    const hosts = copy.hosts as Record<string, Record<string, unknown>>;
    hosts.b = { gpu: "H100" };

    const nodes = await getClusterNodes(copy);
    assertEquals([...nodes.keys()], ["a", "b"]);
  },
});

Deno.test({
  name: "getClusterNodes() gives each caller a map of its own",
  permissions,
  async fn() {
    const config = parseHostsConfig("hosts: { a: {}, b: {} }");
    (await getClusterNodes(config)).delete("a");

    assertEquals((await getClusterNodes(config)).size, 2);
  },
});
