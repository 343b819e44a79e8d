import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { inspectConfig } from "../cluster_hosts.ts";
import { type ConfigProblem, validateHostsConfig } from "../mod.ts";
import { ROOT } from "./process.ts";

/** A host with these fields, and two lines that nobody warns about. */
function host(fields: string, name = "a"): string {
  const address = `192.0.2.${name.charCodeAt(0)}`;
  return `  ${name}:\n    ${fields}\n    tailscale_ip: ${address}\n    note: x\n`;
}

const OK = `hosts:\n${host("cpus: 1")}`;

/** Shows `path:line: message`, the line as far as it is known. */
function shown({ path, line, message }: ConfigProblem): string {
  return `${path}${line === undefined ? "" : `:${line}`}: ${message}`;
}

const UNKNOWN_STATUS =
  "unknown status, treated as active; the inactive ones are " +
  "terminated, offline, setup, retired, archived";
const NO_ADDRESS = "has no address: set tailscale_ip or ssh_host";
const PLACEHOLDER = "is a placeholder: replace it with the real value";
const NO_EFFECT = 'has no effect here: move it to the "defaults" section';
const COORDINATOR_UNSET = "is not set: set it to the name of the coordinator";
const meant = (key: string) => `unknown key; did you mean "${key}"?`;

/** What is written, and the warnings about it. */
const WARNED: [name: string, text: string, ...warnings: string[]][] = [
  // Sections.
  ["elo_synch", `${OK}elo_synch: {}\n`, `elo_synch:6: ${meant("elo_sync")}`],
  [
    "distribted",
    `distribted: {}\n${OK}`,
    `distribted:1: ${meant("distributed")}`,
  ],
  ["default", `default: {}\n${OK}`, `default:1: ${meant("defaults")}`],
  [
    "elo_sync.sync_prot",
    `${OK}elo_sync:\n  coordinator: a\n  sync_prot: 9000\n`,
    `elo_sync.sync_prot:8: ${meant("sync_port")}`,
  ],
  [
    "elo_sync.Coordinator",
    `${OK}elo_sync:\n  Coordinator: a\n`,
    `elo_sync.coordinator:6: ${COORDINATOR_UNSET}`,
    `elo_sync.Coordinator:7: ${meant("coordinator")}`,
  ],
  [
    "distributed.data_server_prot",
    `${OK}distributed:\n  data_server_prot: 9000\n`,
    `distributed.data_server_prot:7: ${meant("data_server_port")}`,
  ],
  [
    "fields of hosts under distributed",
    `${OK}distributed:\n  ssh_user: root\n  enabled: true\n  status_path: /x\n`,
    `distributed.ssh_user:7: ${NO_EFFECT}`,
    `distributed.status_path:9: ${NO_EFFECT}`,
  ],
  [
    "defaults.ssh_usr",
    `defaults:\n  ssh_usr: root\n${OK}`,
    `defaults.ssh_usr:2: ${meant("ssh_user")}`,
  ],
  [
    "a key of the user's own in defaults",
    `defaults:\n  rack: 7\n${OK}`,
    "defaults.rack:2: has no effect: defaults may only set known host fields",
  ],
  [
    "a typo in the status of defaults",
    `defaults:\n  status: ofline\n${OK}`,
    'defaults.status:2: unknown status; did you mean "offline"?',
  ],
  [
    "a placeholder in defaults",
    `defaults:\n  ssh_key: <path>\n${OK}`,
    `defaults.ssh_key:2: ${PLACEHOLDER}`,
  ],

  // Keys of hosts.
  [
    "a key with two letters swapped",
    `hosts:\n${host("ssh_prot: 23")}`,
    `hosts.a.ssh_prot:3: ${meant("ssh_port")}`,
  ],
  [
    "a key with a letter too many",
    `hosts:\n${host("sssh_port: 23")}`,
    `hosts.a.sssh_port:3: ${meant("ssh_port")}`,
  ],
  [
    "a key with a letter too few",
    `hosts:\n${host("sh_host: x")}`,
    `hosts.a.sh_host:3: ${meant("ssh_host")}`,
  ],
  [
    "a key in another case",
    `hosts:\n${host("SSH_Host: x")}`,
    `hosts.a.SSH_Host:3: ${meant("ssh_host")}`,
  ],
  [
    "a key with a hyphen",
    `hosts:\n${host("ssh-user: x")}`,
    `hosts.a.ssh-user:3: ${meant("ssh_user")}`,
  ],
  [
    "ssh_option",
    `hosts:\n${host("ssh_option: [Port=1]")}`,
    `hosts.a.ssh_option:3: ${meant("ssh_options")}`,
  ],
  [
    "a key with two letters swapped, and the address that is missing",
    "hosts:\n  a:\n    tailscale_pi: 192.0.2.2\n",
    `hosts.a:2: ${NO_ADDRESS}`,
    `hosts.a.tailscale_pi:3: ${meant("tailscale_ip")}`,
  ],

  // Statuses.
  ...["destroyed", "disabled", "proxy_only", "stopped"].map(
    (status): [string, string, string] => [
      `the status ${status}`,
      `hosts:\n${host(`status: ${status}`)}`,
      `hosts.a.status:3: ${UNKNOWN_STATUS}`,
    ],
  ),
  ...[["ofline", "offline"], ["retierd", "retired"], ["Activw", "active"]].map(
    ([status, known]): [string, string, string] => [
      `the status ${status}`,
      `hosts:\n${host(`status: ${status}`)}`,
      `hosts.a.status:3: unknown status; did you mean "${known}"?`,
    ],
  ),

  // Addresses, the coordinator.
  [
    "a node without an address",
    "hosts:\n  a:\n    gpu: H100\n",
    `hosts.a:2: ${NO_ADDRESS}`,
  ],
  [
    "a coordinator that is not there",
    `elo_sync: { coordinator: gone }\n${OK}`,
    "elo_sync.coordinator:1: names a node that is not in hosts",
  ],
  [
    "a coordinator that is misspelt",
    `elo_sync: { coordinator: heda }\nhosts:\n${host("cpus: 1", "head")}`,
    "elo_sync.coordinator:1: names a node that is not in hosts; " +
    'did you mean "head"?',
  ],
  [
    "the default coordinator, which the owner never wrote",
    `${OK}elo_sync:\n  sync_port: 1\n`,
    `elo_sync.coordinator:6: ${COORDINATOR_UNSET}`,
  ],
  [
    "a coordinator that is not active",
    `hosts:\n${host("status: Offline")}elo_sync:\n  coordinator: a\n`,
    "elo_sync.coordinator:7: names a node that is not active",
  ],

  // Placeholders.
  [
    "100.x.x.x",
    "hosts:\n  a:\n    tailscale_ip: 100.x.x.x\n",
    `hosts.a.tailscale_ip:3: ${PLACEHOLDER}`,
  ],
  [
    "root@203.0.113.x",
    "hosts:\n  a:\n    ssh_host: root@203.0.113.x\n",
    `hosts.a.ssh_host:3: ${PLACEHOLDER}`,
  ],
  [
    "two xxx.xxx.xxx.xxx, which are not one address",
    "hosts:\n  a: { ssh_host: xxx.xxx.xxx.xxx }\n" +
    "  b: { ssh_host: xxx.xxx.xxx.xxx }\n",
    `hosts.a.ssh_host:2: ${PLACEHOLDER}`,
    `hosts.b.ssh_host:3: ${PLACEHOLDER}`,
  ],
  [
    "a placeholder, and the address that is missing",
    "hosts:\n  a:\n    ssh_host: <public-ip>\n",
    `hosts.a:2: ${NO_ADDRESS}`,
    `hosts.a.ssh_host:3: ${PLACEHOLDER}`,
  ],
  [
    "a placeholder after a user",
    `hosts:\n${host("ssh_host: root@<public-ip>")}`,
    `hosts.a.ssh_host:3: ${PLACEHOLDER}`,
  ],
  [
    "a placeholder of a URL",
    `hosts:\n${host("data_server_url: <url>")}`,
    `hosts.a.data_server_url:3: ${PLACEHOLDER}`,
  ],
  [
    "a placeholder of a key's path",
    `hosts:\n${host('ssh_key: "<key>"')}`,
    `hosts.a.ssh_key:3: ${PLACEHOLDER}`,
  ],

  [
    "everything at once, in the order of the file",
    `elo_sync:
  coordinator: b
distribted: {}
hosts:
  b:
    status: retired
    ssh_hots: x
  a: { gpu: H100, status: destroyed, rack: 012 }
elo_snc: {}
defaults: { rack: 7 }
`,
    "elo_sync.coordinator:2: names a node that is not active",
    `distribted:3: ${meant("distributed")}`,
    `hosts.b.ssh_hots:7: ${meant("ssh_host")}`,
    `hosts.a:8: ${NO_ADDRESS}`,
    `hosts.a.status:8: ${UNKNOWN_STATUS}`,
    "hosts.a.rack:8: YAML reads a number with a leading zero as octal: " +
    "put it in quotes, or leave the zero out",
    "defaults.rack:10: has no effect: defaults may only set known host fields",
  ],
];

for (const [name, text, ...warnings] of WARNED) {
  Deno.test(`validateHostsConfig() warns of ${name}`, () => {
    const result = validateHostsConfig(text);

    assertEquals(result.problems, []);
    assertEquals(result.warnings.map(shown), warnings);
    assert(result.config !== undefined);
  });
}

/** What people write and mean. */
const SILENT: [name: string, text: string][] = [
  [
    "statuses that are known, in any case",
    `hosts:\n${host("status: ready")}${host("status: Offline", "b")}`,
  ],
  [
    "any role",
    `hosts:\n${host("role: gpu_primary")}${host("role: seeder", "b")}`,
  ],
  [
    "a node that has a data_server_url alone",
    "hosts:\n  a:\n    data_server_url: http://192.0.2.1/a\n",
  ],
  [
    "an inactive node without an address",
    "hosts:\n  a:\n    status: retired\n",
  ],
  [
    "keys of the user's own",
    `hosts:\n${host("rack: 7\n    gpus: 8\n    selfplay_enabled: true")}`,
  ],
  ["gpus without gpu", `hosts:\n${host("gpus: 8")}`],
  [
    "a key like one that is set",
    `hosts:\n${host("ssh_hosts: [x]\n    ssh_host: x")}`,
  ],
  [
    "sections of the user's own",
    `${OK}training: {}\nsync: {}\nelo: {}\nnodes: {}\n`,
  ],
  [
    "keys of another program in distributed",
    `${OK}distributed:\n  enabled: true\n  port: 9\n`,
  ],
  ["a distributed that is another program's", `${OK}distributed: words\n`],
  ["defaults that are used", `defaults: { ssh_user: root, note: x }\n${OK}`],
  ["an empty elo_sync", `${OK}elo_sync: {}\n`],
  ["no elo_sync", OK],
  ["a coordinator that is there", `${OK}elo_sync: { coordinator: a }\n`],
  [
    "null and blank fields",
    `hosts:\n${host('ssh_key:\n    gpu: ""\n    ssh_user: " "')}`,
  ],
  [
    "an address that only looks like a placeholder",
    "hosts:\n  a: { ssh_host: x.example.com }\n  b: { ssh_host: xx }\n",
  ],
];

for (const [name, text] of SILENT) {
  Deno.test(`validateHostsConfig() does not warn of ${name}`, () => {
    const { problems, warnings } = validateHostsConfig(text);
    assertEquals([...problems, ...warnings].map(shown), []);
  });
}

// --- What is no inventory ---

const ADD_HOSTS = ': no hosts: add them under "hosts"';
const rename = (section: string, line = 1) =>
  `${section}:${line}: no hosts: rename this section to "hosts"`;

/** Files that load as an empty cluster, and are nobody's inventory. */
const NO_HOSTS: [name: string, text: string, problem: string][] = [
  ["an empty file", "", ADD_HOSTS],
  ["a comment", "# nothing\n", ADD_HOSTS],
  ["hosts that are null", "hosts:\nelo_sync:\n", ADD_HOSTS],
  ["hosts that are empty", "hosts: {}\n", ADD_HOSTS],
  ["another program's config", "port: 9\nlog: { level: info }\n", ADD_HOSTS],
  ["host:", `host:\n${host("cpus: 1")}`, rename("host")],
  ["Hosts:", `Hosts:\n${host("cpus: 1")}`, rename("Hosts")],
  ["nodes:", `a: 1\nnodes:\n${host("cpus: 1")}`, rename("nodes", 2)],
  [
    "standard_hosts:",
    `standard_hosts:\n${host("x: 1")}`,
    rename("standard_hosts"),
  ],
  ["machines:", `machines:\n${host("cpus: 1")}`, rename("machines")],
];

for (const [name, text, problem] of NO_HOSTS) {
  Deno.test(`validateHostsConfig() reports that ${name} is no inventory`, () => {
    const { config, problems } = validateHostsConfig(text);

    assertEquals(problems.map(shown), [problem]);
    assertEquals(config, undefined);
  });
}

// --- Shared endpoints ---

const ADVICE = /set tailscale_ip, data_server_port or data_server_url.*--ssh/;

/** Hosts, and which of them share an endpoint, folded, at the first of them. */
const SHARED: [what: string, hosts: string, groups: [string, string][]][] = [
  [
    "a proxy",
    "  n1: { ssh_host: ssh1.rent.example, ssh_port: 19528 }\n" +
    "  n2: { ssh_host: ssh1.rent.example, ssh_port: 38470 }\n",
    [["hosts.n1:2", "n[1-2] "]],
  ],
  [
    "a proxy with users and three names",
    "  gpu-7: { ssh_host: root@p.example }\n  head: { ssh_host: a@p.example }\n" +
    "  gpu-8: { ssh_host: root@p.example }\n",
    [["hosts.gpu-7:2", "gpu-[7-8],head "]],
  ],
  [
    "two proxies",
    "  a: { ssh_host: p }\n  b: { ssh_host: q }\n" +
    "  c: { ssh_host: p }\n  d: { ssh_host: q }\n",
    [["hosts.a:2", "a,c "], ["hosts.b:3", "b,d "]],
  ],
  [
    "one URL",
    "  a: { data_server_url: http://p:8766/ }\n  b: { ssh_host: p }\n",
    [["hosts.a:2", "a,b "]],
  ],
  [
    "the port of defaults",
    "  a: { ssh_host: p, data_server_port: 9 }\n  b: { ssh_host: p }\n" +
    "defaults: { data_server_port: 9 }\n",
    [["hosts.a:2", "a,b "]],
  ],
  // Not shared.
  [
    "two data servers at one address",
    "  a: { ssh_host: p, data_server_port: 1 }\n" +
    "  b: { ssh_host: p, data_server_port: 2 }\n",
    [],
  ],
  [
    "a twin that is not active",
    "  a: { ssh_host: p }\n  b: { ssh_host: p, status: retired }\n",
    [],
  ],
  [
    "masked addresses",
    "  a: { ssh_host: 203.0.113.x }\n  b: { ssh_host: 203.0.113.x }\n",
    [],
  ],
  [
    "placeholders",
    "  a: { ssh_host: <ip> }\n  b: { ssh_host: <ip> }\n",
    [],
  ],
  ["no addresses", "  a: {}\n  b: {}\n", []],
];

for (const [what, hosts, groups] of SHARED) {
  const verb = groups.length > 0 ? "warns once an endpoint" : "does not warn";

  Deno.test(`validateHostsConfig() ${verb} of nodes that share ${what}`, () => {
    const { warnings } = validateHostsConfig(`hosts:\n${hosts}`);
    const shared = warnings.filter(({ message }) =>
      message.includes("data endpoint")
    );

    assertEquals(shared.length, groups.length);
    for (const [index, [place, names]] of groups.entries()) {
      const { path, line, message } = shared[index]!;
      assertEquals(`${path}:${line}`, place);
      assert(message.startsWith(names), message);
      assertMatch(message, ADVICE);
    }
  });
}

// --- Files that people use ---

const STARTS = [
  "config/distributed_hosts.example.yaml",
  "config/demo_hosts.yaml",
];

for (const path of STARTS) {
  Deno.test(`validateHostsConfig() has nothing to say of ${path}`, async () => {
    const text = await Deno.readTextFile(ROOT + path);
    const { problems, warnings } = validateHostsConfig(text);
    assertEquals([...problems, ...warnings].map(shown), []);
  });
}

async function realInventory(): Promise<string> {
  return await Deno.readTextFile(`${ROOT}tests/fixtures/real_inventory.yaml`);
}

Deno.test("validateHostsConfig() warns in a real inventory of its two unknown statuses alone", async () => {
  const text = await realInventory();
  const { problems, warnings } = validateHostsConfig(text);

  assertEquals(problems, []);
  assertEquals(warnings.map(shown), [
    `hosts.macbook.status:123: ${UNKNOWN_STATUS}`,
    `hosts.aws-proxy.status:1288: ${UNKNOWN_STATUS}`,
  ]);

  const lines = text.split("\n");
  for (const { line } of warnings) {
    assertEquals(lines[line! - 1], "    status: proxy_only");
  }
});

Deno.test("validateHostsConfig() warns once of three hosts behind a proxy in a real inventory", async () => {
  const added = [19528, 38470, 30123].map((port, index) =>
    `  vast-${
      index + 1
    }:\n    ssh_host: ssh1.rent.example\n    ssh_port: ${port}\n`
  );
  const text = (await realInventory())
    .replace(/^hosts:$/m, `hosts:\n${added.join("").trimEnd()}`);

  const { problems, warnings } = validateHostsConfig(text);
  assertEquals(problems, []);
  assertEquals(warnings.length, 3);

  const [shared] = warnings.filter(({ message }) => ADVICE.test(message));
  assertEquals(shared?.path, "hosts.vast-1");
  assertMatch(
    shared!.message,
    /^vast-\[1-3\] .*http:\/\/ssh1\.rent\.example:8766/,
  );
});

// --- Beside problems ---

Deno.test("validateHostsConfig() warns beside problems, and quotes no value", () => {
  const text = "hosts:\n  a: { ssh_port: 0, status: hunter2 }\n" +
    "  b: { ssh_prot: hunter2, ssh_host: x }\n";
  const { problems, warnings } = validateHostsConfig(text);

  assertEquals(problems.map(({ path }) => path), ["hosts.a.ssh_port"]);
  assertEquals(warnings.map(({ path }) => path), [
    "hosts.a.status",
    "hosts.b.ssh_prot",
  ]);
  assert(!Deno.inspect([problems, warnings]).includes("hunter2"));
});

// --- ssh_options that run a program here ---

/** Options of ssh, and whether an inventory from a URL may have them. */
const OPTIONS: [option: string, isAllowed: boolean][] = [
  ["ProxyCommand=nc %h %p", false],
  ["proxycommand=nc %h %p", false],
  ["PROXYCOMMAND=none", false],
  ["LocalCommand=id", false],
  ["PermitLocalCommand=yes", false],
  ["KnownHostsCommand=id", false],
  ["PKCS11Provider=/tmp/x.so", false],
  ["SecurityKeyProvider=/tmp/x.so", false],
  ["SmartcardDevice=/tmp/x.so", false],
  ["XAuthLocation=/tmp/x", false],
  ["ProxyJump=head", true],
  ["StrictHostKeyChecking=accept-new", true],
  ["RemoteCommand=id", true],
  ["Compression=yes", true],
];

const REMOTE = "https://inventory.example/hosts.yaml";
const LOCAL = ["inventory", "hosts.yaml", "file:///hosts.yaml", "stdin"];

for (const [option, isAllowed] of OPTIONS) {
  const verb = isAllowed ? "accepts" : "reports";

  Deno.test(`inspectConfig() ${verb} ${option} from a URL`, () => {
    const host = { ssh_host: "x", ssh_options: ["Compression=yes", option] };
    const defaults = { ssh_options: [option] };

    const inHost = JSON.stringify({ hosts: { a: host } });
    const inDefaults = JSON.stringify({ hosts: { a: {}, b: {} }, defaults });
    const pathsOf = (text: string, origin: string) =>
      inspectConfig(text, origin).problems.map(({ path }) => path);

    for (const origin of [REMOTE, REMOTE.replace("https", "HTTP")]) {
      const expected = isAllowed ? [] : ["hosts.a.ssh_options"];
      assertEquals(pathsOf(inHost, origin), expected);

      const once = isAllowed ? [] : ["defaults.ssh_options"];
      assertEquals(pathsOf(inDefaults, origin), once);
    }
    for (const origin of LOCAL) {
      assertEquals(pathsOf(inHost, origin), []);
      assertEquals(pathsOf(inDefaults, origin), []);
    }
  });
}
