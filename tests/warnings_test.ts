import { assert, assertEquals } from "jsr:@std/assert@^1.0.19";
import { type ConfigProblem, validateHostsConfig } from "../mod.ts";
import { ROOT } from "./process.ts";

/** A host with these fields, and two lines that nobody warns about. */
function host(fields: string, name = "a"): string {
  return `  ${name}:\n    ${fields}\n    tailscale_ip: 192.0.2.${name.charCodeAt(0)}\n    note: x\n`;
}

const OK = `hosts:\n${host("cpus: 1")}`;

/** `path:line: message` of each, the last two as far as they are known. */
function shown({ path, line, message }: ConfigProblem): string {
  return `${path}${line === undefined ? "" : `:${line}`}: ${message}`;
}

const UNKNOWN_STATUS =
  "unknown status; it counts as active; inactive are terminated, offline, setup, retired, archived";
const NO_ADDRESS = "has no address: set tailscale_ip or ssh_host";
const PLACEHOLDER = "is a placeholder: put the real value";
const NO_HOSTS = ': no hosts: add them under "hosts"';
const meant = (key: string) => `unknown key; did you mean "${key}"?`;

/** What is written, and the warnings about it. */
const WARNED: [name: string, text: string, ...warnings: string[]][] = [
  ["an empty file", "", NO_HOSTS],
  ["a file without hosts", "hosts:\nelo_sync:\n", NO_HOSTS],
  ["an empty mapping of hosts", "hosts: {}\n", NO_HOSTS],
  ["host: at top level", `host:\n${host("cpus: 1")}`, NO_HOSTS, `host:1: ${meant("hosts")}`],
  ["Hosts: at top level", `Hosts:\n${host("cpus: 1")}`, NO_HOSTS, `Hosts:1: ${meant("hosts")}`],
  ["elo_synch: at top level", `${OK}elo_synch: {}\n`, `elo_synch:6: ${meant("elo_sync")}`],
  ["distribted: at top level", `distribted: {}\n${OK}`, `distribted:1: ${meant("distributed")}`],
  [
    "elo_sync.sync_prot",
    `${OK}elo_sync:\n  coordinator: a\n  sync_prot: 9000\n`,
    `elo_sync.sync_prot:8: ${meant("sync_port")}`,
  ],
  ["elo_sync.Coordinator", `${OK}elo_sync:\n  Coordinator: a\n`, [
    `elo_sync.coordinator:6: is not set, and the default, "mac-studio", is not in hosts`,
    `elo_sync.Coordinator:7: ${meant("coordinator")}`,
  ]],
  [
    "distributed.data_server_prot",
    `${OK}distributed:\n  data_server_prot: 9000\n`,
    `distributed.data_server_prot:7: ${meant("data_server_port")}`,
  ],
  [
    "distributed.status_pth",
    `${OK}distributed:\n  status_pth: /health\n`,
    `distributed.status_pth:7: ${meant("status_path")}`,
  ],

  ["a key with two letters swapped", `hosts:\n${host("ssh_prot: 23")}`, `hosts.a.ssh_prot:3: ${meant("ssh_port")}`],
  ["a key with a letter too many", `hosts:\n${host("sssh_port: 23")}`, `hosts.a.sssh_port:3: ${meant("ssh_port")}`],
  ["a key with a letter too few", `hosts:\n${host("sh_host: x")}`, `hosts.a.sh_host:3: ${meant("ssh_host")}`],
  ["a key in another case", `hosts:\n${host("SSH_Host: x")}`, `hosts.a.SSH_Host:3: ${meant("ssh_host")}`],
  ["a key with a hyphen", `hosts:\n${host("ssh-user: x")}`, `hosts.a.ssh-user:3: ${meant("ssh_user")}`],
  [
    "a key with two letters swapped, and the address that is missing",
    "hosts:\n  a:\n    tailscale_pi: 192.0.2.2\n",
    `hosts.a:2: ${NO_ADDRESS}`,
    `hosts.a.tailscale_pi:3: ${meant("tailscale_ip")}`,
  ],

  ...["destroyed", "disabled", "proxy_only", "pending_setup", "stopped"].map((status): [string, string, string] => [
    `the status ${status}`,
    `hosts:\n${host(`status: ${status}`)}`,
    `hosts.a.status:3: ${UNKNOWN_STATUS}`,
  ]),
  ["a status with a letter too few", `hosts:\n${host("status: ofline")}`, [
    'hosts.a.status:3: unknown status; did you mean "offline"?',
  ]],
  ["a status with two letters swapped", `hosts:\n${host("status: retierd")}`, [
    'hosts.a.status:3: unknown status; did you mean "retired"?',
  ]],
  ["a status with a letter replaced", `hosts:\n${host("status: Activw")}`, [
    'hosts.a.status:3: unknown status; did you mean "active"?',
  ]],

  ["a node without an address", "hosts:\n  a:\n    gpu: H100\n", `hosts.a:2: ${NO_ADDRESS}`],
  [
    "two nodes that share every endpoint",
    `${OK}  b: { ssh_host: ops@192.0.2.97 }\n`,
    "hosts.b:6: has the same addresses and ports as a",
  ],
  [
    "a coordinator that is not there",
    `elo_sync: { coordinator: b }\n${OK}`,
    "elo_sync.coordinator:1: names a node that is not in hosts",
  ],
  [
    "the default coordinator, if it is not there",
    `${OK}elo_sync:\n  sync_port: 1\n`,
    'elo_sync.coordinator:6: is not set, and the default, "mac-studio", is not in hosts',
  ],
  [
    "a coordinator that is not active",
    `hosts:\n${host("status: Offline")}elo_sync:\n  coordinator: a\n`,
    "elo_sync.coordinator:7: names a node that is not active",
  ],

  ["100.x.x.x", "hosts:\n  a:\n    tailscale_ip: 100.x.x.x\n", `hosts.a.tailscale_ip:3: ${PLACEHOLDER}`],
  ["root@203.0.113.x", "hosts:\n  a:\n    ssh_host: root@203.0.113.x\n", `hosts.a.ssh_host:3: ${PLACEHOLDER}`],
  ["a placeholder, and the address that is missing", "hosts:\n  a:\n    ssh_host: <public-ip>\n", [
    `hosts.a:2: ${NO_ADDRESS}`,
    `hosts.a.ssh_host:3: ${PLACEHOLDER}`,
  ]],
  [
    "a placeholder behind a user",
    `hosts:\n${host("ssh_host: root@<public-ip>")}`,
    `hosts.a.ssh_host:3: ${PLACEHOLDER}`,
  ],
  [
    "a placeholder of a URL",
    `hosts:\n${host("data_server_url: <url>")}`,
    `hosts.a.data_server_url:3: ${PLACEHOLDER}`,
  ],
  ["a placeholder of a key's path", `hosts:\n${host('ssh_key: "<key>"')}`, `hosts.a.ssh_key:3: ${PLACEHOLDER}`],
  [
    "everything at once, in the order of the file",
    `elo_sync:
  coordinator: b
distribted: {}
hosts:
  b:
    status: retired
    ssh_hots: x
  a: { gpu: H100, status: destroyed }
  c:
    tailscale_ip: 192.0.2.1
  d:
    tailscale_ip: 192.0.2.1
elo_snc: {}
`,
    "elo_sync.coordinator:2: names a node that is not active",
    `distribted:3: ${meant("distributed")}`,
    `hosts.b:5: ${NO_ADDRESS}`,
    `hosts.b.ssh_hots:7: ${meant("ssh_host")}`,
    `hosts.a.status:8: ${UNKNOWN_STATUS}`,
    `hosts.a:8: ${NO_ADDRESS}`,
    "hosts.d:11: has the same addresses and ports as c",
  ],
].map(([name, text, ...warnings]) => [name, text, ...warnings.flat()] as [string, string, ...string[]]);

for (const [name, text, ...warnings] of WARNED) {
  Deno.test(`validateHostsConfig() warns of ${name}`, () => {
    const result = validateHostsConfig(text);
    assertEquals({ problems: result.problems, warnings: result.warnings.map(shown) }, { problems: [], warnings });
    assert(result.config !== undefined);
  });
}

/** What people write and mean. */
const SILENT: [name: string, text: string][] = [
  ["statuses that are known, in any case", `hosts:\n${host("status: ready")}${host("status: Offline", "b")}`],
  ["any role", `hosts:\n${host("role: gpu_training_primary")}${host("role: seeder", "b")}`],
  ["a node that has a data_server_url alone", "hosts:\n  a:\n    data_server_url: http://192.0.2.1/a\n"],
  ["keys of the user's own", `hosts:\n${host("rack: 7\n    gpus: 8\n    gpu: H100\n    selfplay_enabled: true")}`],
  ["gpus without gpu", `hosts:\n${host("gpus: 8")}`],
  ["a key like one that is set", `hosts:\n${host("ssh_hosts: [x]\n    ssh_host: x")}`],
  ["sections of the user's own", `${OK}training: {}\nsync: {}\nelo: {}\n`],
  ["keys of another program in distributed", `${OK}distributed:\n  enabled: true\n  port: 9\n`],
  ["a distributed that is another program's", `${OK}distributed: words\n`],
  [
    "one machine behind several ports of a proxy",
    `hosts:\n${
      [22001, 22002].map((port) => `  n${port}: { ssh_host: ssh5.example.com, ssh_port: ${port} }\n`).join("")
    }`,
  ],
  [
    "two data servers at one address",
    `hosts:\n${
      [9001, 9002].map((port) => `  n${port}: { ssh_host: x.example.com, data_server_port: ${port} }\n`).join("")
    }`,
  ],
  ["twins of which one is retired", `${OK}  b: { ssh_host: 192.0.2.97, status: retired }\n`],
  ["an empty elo_sync without mac-studio", `${OK}elo_sync: {}\n`],
  ["no elo_sync", OK],
  ["a coordinator that is there", `${OK}elo_sync: { coordinator: a }\n`],
  ["null and blank fields", `hosts:\n${host('ssh_key:\n    gpu: ""\n    ssh_user: " "')}`],
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

Deno.test("validateHostsConfig() does not warn of the inventories that people start from", async () => {
  for (const path of ["config/distributed_hosts.example.yaml", "config/demo_hosts.yaml"]) {
    const { problems, warnings } = validateHostsConfig(await Deno.readTextFile(ROOT + path));
    assertEquals([...problems, ...warnings].map(shown), [], path);
  }
});

Deno.test("validateHostsConfig() warns in a real inventory of its two unknown statuses alone", async () => {
  const text = await Deno.readTextFile(`${ROOT}tests/fixtures/real_inventory.yaml`);
  const { problems, warnings } = validateHostsConfig(text);
  assertEquals(problems, []);
  assertEquals(warnings.map(shown), [
    `hosts.macbook.status:123: ${UNKNOWN_STATUS}`,
    `hosts.aws-proxy.status:1288: ${UNKNOWN_STATUS}`,
  ]);
  assert(warnings.every(({ line }) => text.split("\n")[line! - 1] === "    status: proxy_only"));
});

Deno.test("validateHostsConfig() gives no warnings if there are problems, and quotes no value", () => {
  const text = "hosts:\n  a: { ssh_port: 0, status: hunter2 }\n";
  assertEquals(validateHostsConfig(text).warnings, []);
  const { warnings } = validateHostsConfig(text.replace("0", "1"));
  assert(warnings.length > 0 && !Deno.inspect(warnings).includes("hunter2"));
});
