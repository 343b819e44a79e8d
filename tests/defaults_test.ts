/**
 * What `defaults` gives to hosts, and forty nodes that live on it.
 *
 * @module
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertThrows,
} from "jsr:@std/assert@^1.0.19";
import { sshEndpoints } from "../cluster_hosts.ts";
import {
  ClusterNode,
  type ClusterNodeFields,
  getClusterNodes,
  getCoordinatorAddress,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  parseHostsConfig,
  validateHostsConfig,
} from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import {
  programMissing,
  ROOT,
  run,
  tempFolder,
  testUnless,
  writeInventory,
} from "./process.ts";
import { runMain } from "./run_main.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false } as const;

type FieldName = Exclude<keyof ClusterNodeFields, "name" | "entry">;

interface Row {
  readonly key: string;
  readonly name: FieldName;
  /** What `defaults` gives, and what a host sets itself. */
  readonly given: unknown;
  readonly own: unknown;
}

/** Every field that `defaults` may give. */
const ROWS: Row[] = [
  { key: "ssh_user", name: "sshUser", given: "ops", own: "root" },
  { key: "ssh_key", name: "sshKey", given: "~/a", own: "~/b" },
  { key: "ssh_port", name: "sshPort", given: 2222, own: 22 },
  { key: "ssh_options", name: "sshOptions", given: ["Port=1"], own: [] },
  { key: "ringrift_path", name: "ringriftPath", given: "/a", own: "/b" },
  { key: "status", name: "status", given: "ready", own: "offline" },
  { key: "note", name: "note", given: "a", own: "b" },
  { key: "role", name: "role", given: "worker", own: "head" },
  { key: "memory_gb", name: "memoryGb", given: 96, own: 0 },
  { key: "cpus", name: "cpus", given: 72, own: 0.5 },
  { key: "gpu", name: "gpu", given: "H100", own: "none" },
  { key: "data_server_port", name: "dataServerPort", given: 9001, own: 8766 },
  { key: "status_path", name: "statusPath", given: "/health", own: "/status" },
];

async function nodesOf(config: HostsConfig): Promise<ClusterNode[]> {
  const nodes = await getClusterNodes(config);
  return [...nodes.values()];
}

for (const { key, name, given, own } of ROWS) {
  Deno.test({
    name: `defaults.${key} is given to every host that does not set it`,
    permissions,
    async fn() {
      const text = JSON.stringify({
        defaults: { [key]: given },
        hosts: {
          none: {},
          null: { [key]: null },
          blank: { [key]: " " },
          placeholder: { [key]: "<value>" },
          own: { [key]: own },
        },
      });

      for (const config of [parseHostsConfig(text), JSON.parse(text)]) {
        const nodes = await nodesOf(config);
        const values = nodes.map((node) => node[name]);
        assertEquals(values, [given, given, given, given, own]);
      }
    },
  });

  Deno.test({
    name: `defaults.${key} that is blank gives nothing`,
    permissions,
    async fn() {
      const unset = new ClusterNode({ name: "a" })[name];

      for (const blank of [null, "", "<value>"]) {
        const hosts = { a: {} };
        const [node] = await nodesOf({ hosts, defaults: { [key]: blank } });
        assertEquals(node![name], unset);
      }
    },
  });
}

Deno.test("defaults_test.ts has a row for every field of a node", () => {
  const addresses = ["tailscaleIp", "sshHost", "dataServerUrl"];
  const { name: _, entry: __, ...fields } = new ClusterNode({ name: "a" });
  const given = ROWS.map(({ name }) => name);

  assertEquals(
    Object.keys(fields).filter((name) => !addresses.includes(name)).toSorted(),
    given.toSorted(),
  );
});

/** What is a host's own. */
const OWN: [key: string, value: string][] = [
  ["tailscale_ip", "100.64.0.1"],
  ["ssh_host", "root@192.0.2.1"],
  ["data_server_url", "http://192.0.2.1"],
];

for (const [key, value] of OWN) {
  Deno.test(`parseHostsConfig() rejects defaults.${key}`, () => {
    const text = `hosts: { a: {} }\ndefaults:\n  ${key}: ${value}\n`;
    const { problems }: HostsConfigError = assertThrows(
      () => parseHostsConfig(text),
      HostsConfigError,
    );

    assertEquals(problems.length, 1);
    assertEquals(problems[0]?.path, `defaults.${key}`);
    assertEquals(problems[0]?.line, 3);
    assertMatch(problems[0]!.message, /set it on each host/);
    assert(!problems[0]!.message.includes(value), "the value is shown");
  });
}

/** Values that a host may not have either. */
const BAD: [key: string, yaml: string][] = [
  ["ssh_user", "a b"],
  ["ssh_key", "-oX"],
  ["ssh_port", "0"],
  ["ssh_options", "ProxyJump=head"],
  ["role", "[a, b]"],
  ["cpus", "many"],
  ["data_server_port", "65536"],
  ["status_path", "health"],
];

for (const [key, yaml] of BAD) {
  Deno.test(`parseHostsConfig() rejects defaults.${key}: ${yaml}, once`, () => {
    const text = `defaults:\n  ${key}: ${yaml}\nhosts:\n  a: {}\n  b: {}\n`;
    const { problems }: HostsConfigError = assertThrows(
      () => parseHostsConfig(text),
      HostsConfigError,
    );
    assertEquals(problems.map(({ path, line }) => `${path}:${line}`), [
      `defaults.${key}:2`,
    ]);
  });
}

Deno.test({
  name: "a user in a host's ssh_host counts more than defaults.ssh_user",
  permissions,
  async fn() {
    const nodes = await nodesOf({
      defaults: { ssh_user: "ops" },
      hosts: {
        none: { ssh_host: "192.0.2.1" },
        inHost: { ssh_host: "root@192.0.2.1" },
        both: { ssh_host: "root@192.0.2.1", ssh_user: "me" },
      },
    });
    assertEquals(nodes.map((node) => node.sshUser), ["ops", "root", "me"]);
  },
});

Deno.test({
  name: "a node made of one of defaults keeps what defaults gave",
  permissions,
  async fn() {
    const [node] = await nodesOf({
      defaults: { ssh_user: "ops", ssh_port: 2222 },
      hosts: { a: { ssh_host: "root@192.0.2.1" } },
    });

    const other = new ClusterNode({ ...node!, sshHost: "192.0.2.2" });
    assertEquals(other.sshUser, "ops");
    assertEquals(other.sshPort, 2222);
  },
});

Deno.test({
  name:
    "the data port is the host's, else that of defaults, else of distributed",
  permissions,
  async fn() {
    const hosts = { own: { data_server_port: 1 }, none: {} };
    const portsOf = async (sections: Partial<HostsConfig>) =>
      (await nodesOf({ hosts, ...sections }))
        .map((node) => node.dataServerPort);

    const defaults = { data_server_port: 2 };
    const distributed = { data_server_port: "3" };
    assertEquals(await portsOf({}), [1, 8766]);
    assertEquals(await portsOf({ distributed }), [1, 3]);
    assertEquals(await portsOf({ defaults }), [1, 2]);
    assertEquals(await portsOf({ defaults, distributed }), [1, 2]);
    assertEquals(await portsOf({ distributed: "another's" }), [1, 8766]);
    assertEquals(await portsOf({ distributed: { port: 9 } }), [1, 8766]);
  },
});

Deno.test("the data port of another program's config counts last, and may be missing", async () => {
  const distributed = { data_server_port: 5, status_path: "none" };
  await using unified = await writeInventory({}, { distributed });
  await using broken = await writeInventory({}, {
    distributed: { data_server_port: "hunter2" },
  });
  await using empty = await writeInventory({}, { other: {} });
  const paths = {
    unified: unified.path,
    broken: broken.path,
    empty: empty.path,
    missing: `${empty.folder}/none.yaml`,
    folder: empty.folder,
  };

  const outcomes = await evaluate(`
    const paths = ${JSON.stringify(paths)};
    const hosts = { own: { data_server_port: 1, cpus: 3 }, none: { cpus: 4, rack: 7 } };
    const ports = (path, config) =>
      withVariable("RINGRIFT_CONFIG_PATH", path, async () =>
        [...(await api.getClusterNodes(config)).values()]
          .map(({ dataServerPort, cpus, entry }) => [dataServerPort, cpus, entry.rack]));

    console.log(JSON.stringify({
      unified: await ports(paths.unified, { hosts }),
      distributed: await ports(paths.unified, { hosts, distributed: { data_server_port: 7 } }),
      defaults: await ports(paths.unified, { hosts, defaults: { data_server_port: 6 } }),
      empty: await ports(paths.empty, { hosts }),
      missing: await ports(paths.missing, { hosts }),
      "in another folder": await ports("config/unified_loop.yaml", { hosts }),
      broken: await ports(paths.broken, { hosts }),
      folder: await ports(paths.folder, { hosts }),
      "nothing depends on it": await ports(paths.broken, { hosts: { own: hosts.own } }),
    }));`);

  const row = (none: number) => [[1, 3, null], [none, 4, 7]];
  assertEquals(outcomes, {
    unified: row(5),
    distributed: row(7),
    defaults: row(6),
    empty: row(8766),
    missing: row(8766),
    "in another folder": row(8766),
    broken: `${broken.path}:4: distributed.data_server_port: ` +
      "expected an integer from 1 to 65535",
    folder:
      `${empty.folder}: is a folder, not a file (named by RINGRIFT_CONFIG_PATH)`,
    "nothing depends on it": [[1, 3, null]],
  });
});

Deno.test("another program's config that may not be read rejects with the flag", async () => {
  const program = `import { getClusterNodes } from "${ROOT}mod.ts";
    const error = await getClusterNodes({ hosts: { a: {} } }).catch((it) => it);
    console.log(error.name, error.message);`;
  const config = `${ROOT}deno.json`;
  await using temp = await tempFolder();
  const script = `${temp.folder}/script.ts`;
  await Deno.writeTextFile(script, program);

  const flags = ["-q", "--no-prompt", "--allow-env=RINGRIFT_CONFIG_PATH"];
  const args = ["run", ...flags, "--config", config, script];
  const env = { RINGRIFT_CONFIG_PATH: "/srv/unified.yaml" };
  const { stdout, stderr } = await run("deno", args, { env });

  assertEquals(stderr, "");
  assertMatch(stdout, /^NotCapable .*--allow-read=\/srv\/unified\.yaml\n$/);
});

// --- Forty nodes in fifty lines ---

const FORTY = `${ROOT}tests/fixtures/forty_nodes.yaml`;

/** What every node inherits. */
const INHERITED = {
  sshUser: "ops",
  sshKey: "~/.ssh/id_cluster",
  sshPort: 2222,
  sshOptions: ["ProxyJump=bastion.example.com"],
  ringriftPath: "~/ringrift/ai-service",
  status: "ready",
  role: "worker",
  gpu: "GH200",
  dataServerPort: 9001,
  statusPath: "/status",
};

/** What the others set themselves. */
const EXCEPTIONS: Record<string, Partial<typeof INHERITED>> = {
  "mac-studio": { role: "coordinator", gpu: "none" },
  "rented-1": { sshUser: "root", sshPort: 40022, sshOptions: [] },
  "rented-2": { sshUser: "root", sshPort: 40023 },
  both: { sshUser: "root" },
  six: { sshKey: "~/.ssh/id_six" },
  old: { status: "retired" },
  setup: { status: "setup", gpu: "H100" },
  web: { dataServerPort: 80, statusPath: "/health" },
};

Deno.test("forty nodes in 50 lines have neither problems nor warnings that are not theirs", async () => {
  const text = await Deno.readTextFile(FORTY);
  const { config, problems, warnings } = validateHostsConfig(text);

  assertEquals(text.trimEnd().split("\n").length, 50);
  assertEquals(Object.keys(config!.hosts).length, 40);
  assertEquals(problems, []);
  assertEquals(warnings.map(({ path }) => path), ["hosts.blank.gpu"]);
});

Deno.test({
  name: "getClusterNodes() gives each of forty nodes what it inherits",
  permissions: { ...permissions, read: "inherit" },
  async fn() {
    const nodes = await getClusterNodes(await loadHostsConfig(FORTY));

    for (const [name, node] of nodes) {
      const expected = { ...INHERITED, ...EXCEPTIONS[name] };
      const keys = Object.keys(INHERITED) as (keyof typeof INHERITED)[];
      const fields = Object.fromEntries(keys.map((key) => [key, node[key]]));
      assertEquals(fields, expected, name);
    }

    assertEquals(nodes.get("old")?.note, "its disk is full");
    assertEquals(await getCoordinatorAddress(FORTY), {
      hostname: "100.64.0.1",
      port: 8766,
    });
  },
});

/** Exports the forty nodes, the inactive ones too. */
async function exportForty(kind: string): Promise<string> {
  const args = ["export", kind, "--all", "--config", FORTY];
  const { code, stdout } = await runMain(args);

  assertEquals(code, 0);
  return stdout;
}

interface AnsibleHost {
  readonly ansible_host?: string;
  readonly ansible_port?: number;
  readonly ansible_user?: string;
  readonly ansible_ssh_private_key_file?: string;
}

testUnless(
  programMissing("ansible-inventory"),
  "export ansible of forty nodes is an inventory of Ansible",
  async () => {
    await using temp = await tempFolder();
    const script = `${temp.folder}/inventory`;
    const json = `${temp.folder}/inventory.json`;
    await Deno.writeTextFile(json, await exportForty("ansible"));
    await Deno.writeTextFile(script, `#!/bin/sh\nexec cat ${json}\n`, {
      mode: 0o755,
    });

    const args = ["-i", script, "--list"];
    const env = { LC_ALL: "C.UTF-8", ANSIBLE_LOCAL_TEMP: temp.folder };
    const { code, stdout, stderr } = await run("ansible-inventory", args, {
      env,
    });
    assertEquals(code, 0, stderr);

    const { _meta: { hostvars } } = JSON.parse(stdout);
    const nodes = await getClusterNodes(FORTY);
    assertEquals(Object.keys(hostvars).length, 40);

    for (const [name, node] of nodes) {
      const host: AnsibleHost = hostvars[name];
      const [endpoint] = sshEndpoints(node);
      assertEquals(host.ansible_host, endpoint?.host, name);
      if (!endpoint) continue;

      assertEquals(host.ansible_port, endpoint.port, name);
      assertEquals(host.ansible_user, node.sshUser, name);
      assertEquals(host.ansible_ssh_private_key_file, node.sshKey, name);
    }
  },
);

testUnless(
  programMissing("ssh"),
  "export ssh-config of forty nodes is what ssh -G reads",
  async () => {
    await using temp = await tempFolder();
    const path = `${temp.folder}/config`;
    await Deno.writeTextFile(path, await exportForty("ssh-config"));

    for (const [name, node] of await getClusterNodes(FORTY)) {
      const args = ["-T", "-G", "-F", path, "--", name];
      const { code, stdout, stderr } = await run("ssh", args);
      assertEquals([code, stderr], [0, ""], name);
      const [endpoint] = sshEndpoints(node);
      if (!endpoint) continue;

      const lines = stdout.split("\n");
      const expected = [
        `hostname ${endpoint.host}`,
        `port ${endpoint.port}`,
        `user ${node.sshUser}`,
        `identityfile ${node.sshKey}`,
        ...node.sshOptions.map((it) => it.replace("ProxyJump=", "proxyjump ")),
      ];
      for (const line of expected) {
        assert(lines.includes(line), `${name}: ${line} in ${stdout}`);
      }
    }
  },
);

testUnless(
  programMissing("promtool"),
  "export prometheus of forty nodes is what promtool discovers",
  async () => {
    await using temp = await tempFolder();
    const { folder } = temp;
    const config = "scrape_configs: [{ job_name: nodes, " +
      "file_sd_configs: [{ files: [targets.json] }] }]\n";
    await Deno.writeTextFile(`${folder}/prometheus.yml`, config);
    await Deno.writeTextFile(
      `${folder}/targets.json`,
      await exportForty("prometheus"),
    );

    const { code, stdout, stderr } = await run("promtool", [
      "check",
      "service-discovery",
      "--timeout=1s",
      "prometheus.yml",
      "nodes",
    ], { cwd: folder });
    assertEquals(code, 0, stderr);

    const discovered: { discoveredLabels: Record<string, string> }[] = JSON
      .parse(stdout);
    const urls = discovered.map(({ discoveredLabels }) =>
      discoveredLabels.__param_target
    );
    const nodes = await getClusterNodes(FORTY);
    const expected = nodes.values().map((node) =>
      node.dataServerBaseUrl + node.statusPath
    );
    assertEquals(urls.toSorted(), [...expected].toSorted());
  },
);
