// deno-lint-ignore-file no-control-regex
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import {
  assertRefused,
  hostAt,
  manyHosts,
  runOnHosts,
  runOnYaml,
} from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { runCli, tempFolder, writeInventory } from "./process.ts";
import { runMain, startMain } from "./run_main.ts";

// --- wait ---

Deno.test("cluster-hosts wait returns 0 when the last node has come up, and names each once", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
  });
  const args = ["wait", "--config", inventory.path, "--interval", "100ms"];
  const terminal = { columns: 80, isErrTerminal: true };

  await using wait = startMain(args, terminal);
  await wait.until(({ stderr }) => stderr.includes("for b (refused)"));
  assertMatch(wait.stdout, /^a up after \d+\.\d\d s\n$/);
  await using _late = await startNode("ok", { port: dead.port });
  const { code, stdout, stderr } = await wait.ended;

  assertEquals(code, 0);
  assertMatch(stdout, /^a up after .* s\nb up after .* s\n$/);
  assertMatch(stderr, /\r\x1b\[Kcluster-hosts: 2 of 2 nodes up after .* s, /);
  assert(stderr.endsWith(`, ${inventory.path}\n`), stderr);
});

const UP = /^a up after .* s\n$/;
const MISSING = "cluster-hosts: Still missing after .* s: ";

/** What `wait` is asked on a (up), b (refuses) and c (silent); UP and DEAD are ports. */
const WAITS: readonly (readonly [
  line: string,
  code: number,
  stdout: RegExp,
  stderr: string,
])[] = [
  ["", 1, UP, `^.*: 1 of 3 .*\n${MISSING}b \\(refused\\), c \\(timeout\\)\n$`],
  ["--min-up 1", 0, UP, "^cluster-hosts: 1 of 3 nodes up after .* s, stdin\n$"],
  ["--min-up 33%", 0, UP, "^cluster-hosts: 1 of 3 nodes up after .* s, "],
  ["--min-up 34%", 1, UP, `${MISSING}b `],
  ["--min-up 2", 1, UP, `${MISSING}b `],
  ["--tcp --min-up 2", 0, /^([ac] up .*\n){2}$/, "2 of 3 nodes up"],
  ["--tcp --port UP a b", 0, /^([ab] up .*\n){2}$/, "2 of 2 nodes up"],
  ["--port DEAD a", 1, /^$/, `${MISSING}a \\(refused\\)\n$`],
  [
    "--down b",
    0,
    /^b down after .* s\n$/,
    "^.*: 1 of 1 nodes down after .*\n$",
  ],
  [
    "--down c",
    0,
    /^c unhealthy after .* s\n$/,
    "^.*: 1 of 1 nodes down after .*\n$",
  ],
  ["--down a", 1, /^$/, "Still not down after .* s: a \\(up\\)\n$"],
];

for (const [line, code, stdout, stderr] of WAITS) {
  Deno.test(`cluster-hosts wait ${line} returns ${code}`, async () => {
    await using up = await startNode("ok");
    await using dead = await startNode("refuses");
    await using silent = await startNode("silent");
    const hosts = { a: hostAt(up), b: hostAt(dead), c: hostAt(silent) };
    const words = line.replace("UP", String(up.port))
      .replace("DEAD", String(dead.port)).split(" ")
      .filter((word) => word !== "");

    const args = ["wait", "-t", "1s", "--interval", "100ms", ...words];
    const result = await runOnHosts(hosts, args);

    assertEquals(result.code, code, result.stderr);
    assertMatch(result.stdout, stdout);
    assertMatch(result.stderr, new RegExp(stderr));
  });
}

Deno.test("cluster-hosts wait rejects more nodes than are selected", async () => {
  const hosts = { a: hostAt({ port: 1 }), b: hostAt({ port: 1 }) };

  const result = await runOnHosts(hosts, ["wait", "--min-up", "3"]);

  assertRefused(result, "--min-up 3, but only 2 nodes are selected");
});

Deno.test("cluster-hosts wait --min-up 1 does not wait for a node that hangs", async () => {
  await using up = await startNode("ok");
  await using silent = await startNode("silent");
  const hosts = { slow: hostAt(silent), a: hostAt(up) };

  const args = ["wait", "--min-up", "1", "--timeout", "10m"];
  const { code, stdout } = await runOnHosts(hosts, args);

  assertEquals(code, 0);
  assertMatch(stdout, UP);
});

Deno.test("cluster-hosts wait folds the names of what is missing", async () => {
  await using dead = await startNode("refuses");
  const hosts = manyHosts(2000, hostAt(dead));

  const args = ["wait", "--timeout", "2s"];
  const { code, stderr } = await runOnHosts(hosts, args);

  assertEquals(code, 1);
  assertMatch(stderr, /: gpu-\[1-2000\] \(refused\)\n$/);
});

Deno.test("cluster-hosts wait at SIGINT returns 130, and says what is missing", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const hosts = { a: hostAt(up), ...manyHosts(3, hostAt(dead)) };
  const stdin = JSON.stringify({ hosts });

  await using wait = startMain(["wait", "--interval", "50ms", "-c", "-"], {
    stdin,
  });
  await wait.until(({ stdout }) => stdout !== "");
  wait.kill("SIGINT");
  const { code, stderr } = await wait.ended;

  assertEquals(code, 130);
  const [counts = "", missing = ""] = stderr.split("\n");
  assertMatch(counts, /^cluster-hosts: 1 of 4 nodes up after .* s, stdin$/);
  assertMatch(missing, /^cluster-hosts: Still missing after .* s: .*gpu-/);
});

Deno.test("cluster-hosts wait names its shared answers, and not with --down", async () => {
  await using node = await startNode("ok");
  const entry = { ssh_host: "127.0.0.1", data_server_port: node.port };

  const result = await runOnHosts({ a: entry, b: entry }, ["wait"]);

  assertEquals(result.code, 0);
  assertStringIncludes(
    result.stderr,
    "Up, but at an address shared with another node: a,b ",
  );
});

/** Waits that can never end well: they return 1 long before ten minutes are over. */
const HOPELESS: readonly (readonly [line: string, message: string])[] = [
  [
    "",
    "Not waiting: at most 1 of 2 nodes can be up, and 2 have to be; " +
    "none: no-address: set tailscale_ip or ssh_host",
  ],
  [
    "none",
    "Not waiting: at most 0 of 1 nodes can be up, and 1 have to be; " +
    "none: no-address: set tailscale_ip or ssh_host",
  ],
  [
    "--min-up 2 --tcp",
    "Not waiting: at most 1 of 2 nodes can be up, and 2 have to be; " +
    "none: no-address: set tailscale_ip or ssh_host",
  ],
];

for (const [line, message] of HOPELESS) {
  Deno.test(`cluster-hosts wait ${line} returns 1 at once on a node without an address`, async () => {
    await using up = await startNode("ok");
    const hosts = { a: hostAt(up), none: {} };
    const words = line.split(" ").filter((word) => word !== "");

    const args = ["wait", "--timeout", "10m", ...words];
    const { code, stderr } = await runOnHosts(hosts, args);

    assertEquals([code, stderr], [1, `cluster-hosts: ${message}\n`]);
  });
}

Deno.test("cluster-hosts wait --min-up waits where the others can be enough", async () => {
  await using up = await startNode("ok");
  const hosts = { none: {}, a: hostAt(up) };

  const args = ["wait", "--min-up", "1", "--timeout", "10m"];
  const { code, stdout } = await runOnHosts(hosts, args);

  assertEquals(code, 0);
  assertMatch(stdout, UP);
});

// --- validate ---

const BROKEN = `hosts:
  gpu-1:
    tailscale_ip: "top secret"
    ssh_port: 99999
  gpu-2: { memory_gb: lots }
  gpu-3: 7
  gpu-4: { ssh_host: h, status: activ }
elo_sync:
  coordinator: gpu-1
  sync_port: nope
`;

const PLACES = [
  "3: hosts.gpu-1.tailscale_ip",
  "4: hosts.gpu-1.ssh_port",
  "5: hosts.gpu-2.memory_gb",
  "6: hosts.gpu-3",
  "10: elo_sync.sync_port",
];

Deno.test("cluster-hosts validate prints every problem with its place, and warnings beside them", async () => {
  await using inventory = await writeInventory({});
  await Deno.writeTextFile(inventory.path, BROKEN);
  const env = { RINGRIFT_HOSTS_CONFIG: inventory.path };

  const results = [
    [inventory.path, await runMain(["validate", "-c", inventory.path])],
    [inventory.path, await runCli(["validate"], { env })],
    ["stdin", await runOnYaml(BROKEN, ["validate"])],
  ] as const;

  for (const [origin, { code, stdout, stderr }] of results) {
    const lines = stdout.trimEnd().split("\n");
    const problems = lines.filter((line) => !line.includes(": warning: "));
    const warnings = lines.filter((line) => line.includes(": warning: "));
    assertEquals(
      problems.map((line) => line.replace(/: expected .*/, "")),
      PLACES.map((place) => `${origin}:${place}`),
    );
    assertEquals(warnings.length, 1, stdout);
    assertStringIncludes(warnings[0]!, `${origin}:7: hosts.gpu-4.status: `);
    assert(!stdout.includes("secret"));
    const summary = `cluster-hosts: 5 problems, 1 warning, ${origin}\n`;
    assertEquals([code, stderr], [2, summary]);
  }
});

/** Sound inventories. */
const SOUND: readonly (readonly [name: string, yaml: string])[] = [
  [
    "keys of the user's own",
    "hosts: { a: { tailscale_ip: 127.0.0.1, status: ready, " +
    "role: gpu_training_primary, rack: 7 } }",
  ],
  [
    "a status in another case",
    "hosts: { a: { tailscale_ip: 127.0.0.1, status: Offline } }",
  ],
  [
    "a note",
    "hosts: { a: { tailscale_ip: 127.0.0.1, note: the fan is broken } }",
  ],
  [
    "other ports of one host",
    "hosts:\n  a: { ssh_host: h }\n" +
    "  b: { ssh_host: h, data_server_port: 9, ssh_port: 23 }",
  ],
];

for (const [name, yaml] of SOUND) {
  Deno.test(`cluster-hosts validate --strict returns 0 for ${name}`, async () => {
    const result = await runOnYaml(yaml, ["validate", "--strict"]);

    const stderr = "cluster-hosts: no problems, no warnings, stdin\n";
    assertEquals(result, { code: 0, stdout: "", stderr });
  });
}

/** Inventories with one warning: its place and its words. */
const WARNINGS: readonly (readonly [
  name: string,
  yaml: string,
  warning: string,
])[] = [
  [
    "a status that is a typo",
    "hosts:\n  a: { tailscale_ip: 127.0.0.1, status: offlin }",
    '2: hosts.a.status: warning: .*did you mean "offline"\\?',
  ],
  [
    "a host without an address",
    "hosts:\n  a: { status: active }",
    "2: hosts.a: warning: has no address.*",
  ],
  [
    "a coordinator that is not in hosts",
    "hosts: { a: { tailscale_ip: 127.0.0.1 } }\nelo_sync:\n  coordinator: b",
    "3: elo_sync.coordinator: warning: .*",
  ],
  [
    "a placeholder",
    "hosts:\n  a: { tailscale_ip: 100.x.x.x, ssh_host: h }",
    "2: hosts.a.tailscale_ip: warning: is a placeholder.*",
  ],
  [
    "a key that is a typo",
    "hosts:\n  a:\n    ssh_host: h\n    tailscale_pi: 127.0.0.1",
    '4: hosts.a.tailscale_pi: warning: .*"tailscale_ip"\\?',
  ],
  [
    "a key of elo_sync that is a typo",
    "hosts: { a: { ssh_host: h } }\nelo_sync:\n  sync_prot: 1\n" +
    "  coordinator: a",
    '3: elo_sync.sync_prot: warning: .*"sync_port"\\?',
  ],
];

for (const [name, yaml, warning] of WARNINGS) {
  Deno.test(`cluster-hosts validate warns of ${name}, and --strict returns 2`, async () => {
    const { code, stdout, stderr } = await runOnYaml(yaml, ["validate"]);

    const summary = "cluster-hosts: no problems, 1 warning, stdin\n";
    assertEquals([code, stderr], [0, summary], stdout);
    assertMatch(stdout, new RegExp(`^stdin:${warning}\n$`));

    const strict = await runOnYaml(yaml, ["validate", "--strict"]);
    assertEquals(strict, { code: 2, stdout, stderr });
  });
}

/** Files that are no inventories, with words of what is said of them. */
const NO_INVENTORY: readonly (readonly [yaml: string, message: RegExp])[] = [
  ["", /^stdin: .*hosts/],
  ["# nothing\n", /^stdin: .*hosts/],
  ["host:\n  a: { ssh_host: h }\n", /^stdin:.*hosts/],
  [
    "nodes:\n  a: { ssh_host: h }\n",
    /^stdin:1: nodes: .*rename this section to "hosts"$/,
  ],
  ["hosts: {}\n", /^stdin:.*no hosts/],
  ["hosts:\n", /^stdin:.*no hosts/],
  ["hello\n", /^stdin:/],
  ["- a\n- b\n", /^stdin:/],
  ["hosts: [1, 2", /^stdin:\d+:\d+: is not valid YAML: /],
  ["hosts:\n  a:\n\ttailscale_ip: 127.0.0.1\n", /^stdin:3.*: a tab in /],
];

for (const [yaml, message] of NO_INVENTORY) {
  Deno.test(`cluster-hosts validate returns 2 for ${JSON.stringify(yaml)}`, async () => {
    const { code, stdout } = await runOnYaml(yaml, ["validate"]);

    assertEquals(code, 2, stdout);
    assertMatch(stdout.split("\n")[0]!, message);
  });
}

Deno.test("cluster-hosts validate says that there is no such file, or that it is a folder", async () => {
  await using temp = await tempFolder();
  const { folder } = temp;

  const missing = await runMain(["validate", "-c", `${folder}/no.yaml`]);
  const expected = `${folder}/no.yaml: there is no such file\n`;
  assertEquals([missing.code, missing.stdout], [2, expected]);

  const isFolder = await runMain(["validate", "-c", folder]);
  assertEquals(isFolder.stdout, `${folder}: is a folder, not a file\n`);

  const none = await runCli(["validate"], { cwd: folder });
  assertEquals(none.code, 2);
  const place = `config/distributed_hosts.yaml: there is no such file in `;
  assertEquals(none.stdout.slice(0, place.length), place);
});

Deno.test("cluster-hosts validate names a duplicate key, and its line", async () => {
  const yaml = "hosts:\n  a: { ssh_host: h }\n  b: { ssh_host: i }\n" +
    "  a: { ssh_host: j }\n";

  const { code, stdout } = await runOnYaml(yaml, ["validate"]);

  assertEquals(code, 2);
  assertMatch(stdout, /^stdin:4(:[1-9]\d*)?: .*"?a"?.*\n$/);
  assertMatch(stdout, /duplicate|twice/i);
  assert(!stdout.includes("-"), stdout);
});

/** Values that are often wrong, with the words that say how to mend them. */
const WORDS: readonly (readonly [fields: string, words: string])[] = [
  ["ssh_host: root@gpu1:2222", "put the port in ssh_port"],
  ["ssh_host: h, role: [a, b]", "put it in quotes"],
];

for (const [fields, words] of WORDS) {
  Deno.test(`cluster-hosts validate says of ${fields}: ${words}`, async () => {
    const yaml = `hosts:\n  a: { ${fields} }\n`;

    const { code, stdout } = await runOnYaml(yaml, ["validate"]);

    assertEquals(code, 2);
    assertStringIncludes(stdout, words);
  });
}

Deno.test("cluster-hosts validate does not call two placeholders the same address", async () => {
  const yaml = "hosts:\n  a: { tailscale_ip: xxx.xxx.xxx.xxx }\n" +
    "  b: { tailscale_ip: xxx.xxx.xxx.xxx }\n";

  const { stdout } = await runOnYaml(yaml, ["validate"]);

  assertEquals(stdout.match(/is a placeholder/g)?.length, 2, stdout);
  assert(!/same|share/.test(stdout), stdout);
});

Deno.test("cluster-hosts validate warns once of an endpoint that several nodes share", async () => {
  const yaml =
    "hosts:\n  gpu-1: { ssh_host: ssh1.example, ssh_port: 19528 }\n" +
    "  gpu-2: { ssh_host: ssh1.example, ssh_port: 38470 }\n";

  const { code, stdout, stderr } = await runOnYaml(yaml, ["validate"]);

  assertEquals([code, stdout.split("\n").length], [0, 2], stdout);
  assertStringIncludes(stdout, "gpu-[1-2]");
  assertStringIncludes(stdout, "data_server_port");
  assertEquals(stderr, "cluster-hosts: no problems, 1 warning, stdin\n");
});
