// deno-lint-ignore-file no-control-regex
import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { startNode } from "./loopback_cluster.ts";
import { type MainOptions, runMain, startMain } from "./run_main.ts";
import { type InventoryFile, ROOT, run, runCli, type RunOptions, writeInventory } from "./process.ts";

type Hosts = Record<string, Record<string, unknown>>;

/** Registers a test of a program that may not be installed. */
function programTest(path: string, name: string, fn: () => Promise<void>): void {
  let isInstalled = true;
  try {
    Deno.statSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    isInstalled = false;
  }
  Deno.test({ name: isInstalled ? name : `${name} (ignored: needs ${path})`, ignore: !isInstalled, fn });
}

function host(port: number, fields: Record<string, unknown> = {}): Record<string, unknown> {
  return { tailscale_ip: "127.0.0.1", data_server_port: port, status: "active", ...fields };
}

/** Runs a command on an inventory of the hosts, which comes on stdin. */
async function withHosts(hosts: Hosts, args: readonly string[], options: MainOptions = {}) {
  return await runMain([...args, "--config", "-"], { ...options, stdin: JSON.stringify({ hosts }) });
}

/** Replaces the inventory at once, as editors do: a half-written file would be a broken edit. */
async function replace(inventory: InventoryFile, text: string): Promise<void> {
  await Deno.writeTextFile(`${inventory.folder}/new`, text);
  await Deno.rename(`${inventory.folder}/new`, inventory.path);
}

Deno.test("main() waits until a node has come up, names each once, and says for whom it waits", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({ a: host(up.port), b: host(dead.port) });
  const args = ["wait", "--config", inventory.path, "--interval", "100ms", "--timeout", "20"];
  const wait = startMain(args, { columns: 80, isErrTerminal: true });
  await wait.until(({ stderr }) => stderr.includes("for b (refused)"));
  assertMatch(wait.stdout, /^a up after \d+\.\d\d s\n$/);
  await using _late = await startNode("ok", { port: dead.port });
  const { code, stdout, stderr } = await wait.ended;
  assertEquals(code, 0);
  assertMatch(stdout, /^a up after \d+\.\d\d s\nb up after \d+\.\d\d s\n$/);
  assert(stderr.endsWith(`, ${inventory.path}\n`), stderr);
  assertMatch(stderr, /\r\x1b\[Kcluster-hosts: 2 of 2 nodes up after \d+\.\d\d s, /);
});

Deno.test("main() tells by the exit code of wait whether enough nodes came up, and names the missing ones", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  const hosts = { a: host(up.port), b: host(dead.port), c: host(silent.port), d: { status: "active" } };
  const up1 = /^a up after .* s\n$/;
  const missing = "\ncluster-hosts: Still missing after .* s: ";
  for (
    const [args, expectedCode, stdout, stderr] of [
      [[], 1, up1, `^cluster-hosts: 1 of 4 .*, stdin${missing}b \\(refused\\), c \\(timeout\\), d \\(no-address\\)\n$`],
      [["--quiet"], 1, /^$/, "^$"],
      [["--min-up", "1"], 0, up1, "^cluster-hosts: 1 of 4 nodes up after .* s, stdin\n$"],
      [["--min-up", "25%"], 0, up1, "^cluster-hosts: 1 of 4 nodes up after .* s, stdin\n$"],
      [["--min-up", "26%"], 1, up1, `${missing}b`],
      [["--min-up", "2"], 1, up1, `${missing}b`],
      [["--tcp", "--min-up", "2"], 0, /^(a|c) up after .* s\n(a|c) up after .* s\n$/, "2 of 4 nodes up"],
      [["--tcp", "--port", String(up.port), "a", "b"], 0, /^(a|b) .* s\n(a|b) up after .* s\n$/, "2 of 2 nodes up"],
      [["--port", String(dead.port), "a"], 1, /^$/, `${missing}a \\(refused\\)\n$`],
      [["--min-up", "5"], 2, /^$/, "^cluster-hosts: --min-up 5, but only 4 nodes are selected\n$"],
    ] as const
  ) {
    const result = await withHosts(hosts, ["wait", "--timeout", "600ms", "--interval", "100ms", ...args]);
    assertEquals(result.code, expectedCode, `${args}: ${result.stderr}`);
    assertMatch(result.stdout, stdout);
    assertMatch(result.stderr, new RegExp(stderr));
  }
  const json = await withHosts(hosts, ["wait", "--json", "--timeout", "500ms", "--interval", "100ms"]);
  const { missing: nodes, ...head } = JSON.parse(json.stdout);
  assertEquals([json.code, json.stderr], [1, ""]);
  assertEquals({ ...head, waitedMs: 0 }, { schemaVersion: 1, config: "-", waitedMs: 0, up: ["a"] });
  assert(head.waitedMs >= 500);
  assertEquals(
    nodes.map((node: { name: string; failure: { code: string } }) => [node.name, node.failure.code]),
    [["b", "refused"], ["c", "timeout"], ["d", "no-address"]],
  );
});

Deno.test("main() waits no longer than for the node that was needed, and folds the others", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  const dozens = Object.fromEntries(Array.from({ length: 2000 }, (_, index) => [`gpu-${index + 1}`, host(dead.port)]));
  const hosts = { a: host(up.port), slow: host(silent.port), ...dozens };
  const started = performance.now();
  assertEquals((await withHosts(hosts, ["wait", "--min-up", "1", "--timeout", "60"])).code, 0);
  assert(performance.now() - started < 5000, "It waited for the node that hangs");
  const { stderr } = await withHosts(hosts, ["wait", "gpu-*", "--timeout", "300ms"]);
  assertMatch(stderr, /: gpu-\[1-2000\] \(refused\)\n$/);
  const interrupted = startMain(["wait", "-c", "-", "a", "gpu-[1-3]"], { stdin: JSON.stringify({ hosts }) });
  await interrupted.until(({ stdout }) => stdout !== "");
  interrupted.kill("SIGINT");
  const result = await interrupted.ended;
  assertEquals(result.code, 130);
  assertMatch(
    result.stderr,
    /: 1 of 4 nodes up after .*\ncluster-hosts: Still missing after .* s: gpu-\[1-3\] \(refused\)\n$/,
  );
});

const TIME = String.raw`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`;

Deno.test("main() watches: only changes to a pipe, and it follows the inventory", async () => {
  await using first = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({ a: host(first.port), b: host(dead.port), c: host(first.port) });
  const watch = startMain(["status", "--watch", "--interval", "100ms", "--config", inventory.path]);
  const expectLine = async (text: string) => {
    const pattern = new RegExp(`^${TIME} ${text}$`, "m");
    await watch.until(({ stdout }) => pattern.test(stdout));
  };
  await expectLine("a: up");
  await expectLine("b: down \\(refused: nothing listens on the port\\)");
  const second = await startNode("ok", { port: dead.port });
  await expectLine("b: down -> up");

  const retired = host(first.port, { status: "retired" });
  await replace(inventory, JSON.stringify({ hosts: { b: host(dead.port), c: retired, d: host(first.port) } }));
  await expectLine("a: up -> removed");
  await expectLine("c: up -> inactive");
  await expectLine("d: up");

  await replace(inventory, "hosts:\n  b:\n    data_server_port: 99999\n");
  await watch.until(({ stderr }) => stderr !== "");
  assertMatch(watch.stderr, /^cluster-hosts: .*hosts\.yaml:3: hosts\.b\.data_server_port: .*\n$/);
  await second[Symbol.asyncDispose]();
  // A check in the middle of the closing finds it unhealthy first.
  await expectLine("b: \\w+ -> down .*");
  await replace(inventory, JSON.stringify({ hosts: { d: host(first.port), e: host(first.port) } }));
  await expectLine("b: down -> removed");
  await expectLine("e: up");
  watch.kill("SIGINT");
  const { code, stdout, stderr } = await watch.ended;
  assertEquals([code, stderr.split("\n").length], [130, 2], stderr);
  assertEquals(stdout.match(/ d: up$/gm)?.length, 1);
});

Deno.test("main() goes on watching when the last node leaves, and when a pattern matches nothing any more", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: host(node.port), b: host(node.port) });
  const watch = startMain(["status", "a", "b", "--watch", "--interval", "50ms", "--config", inventory.path]);
  const lines = (...texts: string[]) =>
    watch.until(({ stdout }) => texts.every((text) => stdout.includes(` ${text}\n`)));
  await lines("a: up", "b: up");
  await replace(inventory, JSON.stringify({ hosts: { b: host(node.port) } }));
  await lines("a: up -> removed");
  await replace(inventory, JSON.stringify({ hosts: { x: host(node.port) } }));
  await lines("b: up -> removed");
  await replace(inventory, JSON.stringify({ hosts: { a: host(node.port), b: host(node.port) } }));
  await watch.until(({ stdout }) => stdout.split(" a: up\n").length === 3 && stdout.split(" b: up\n").length === 3);
  watch.kill("SIGTERM");
  assertEquals((await watch.ended).code, 143);
});

Deno.test("main() watches a node that changes beside one that hangs", async () => {
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  await using inventory = await writeInventory({ a: host(silent.port), b: host(dead.port) });
  const watch = startMain(["status", "--watch", "--interval", "50ms", "-t", "60", "--config", inventory.path]);
  await watch.until(({ stdout }) => / b: down /.test(stdout));
  await using _up = await startNode("ok", { port: dead.port });
  await watch.until(({ stdout }) => / b: down -> up\n/.test(stdout));
  assert(!/ a: /.test(watch.stdout));
  watch.kill("SIGINT");
  assertEquals((await watch.ended).code, 130);
});

Deno.test("main() watches as JSON, one object a change", async () => {
  await using up = await startNode("ok", { games: 7 });
  await using inventory = await writeInventory({ a: host(up.port, { role: "worker" }), b: {} });
  const args = ["status", "--watch", "--interval", "50ms", "--json", "--quiet", "--config", inventory.path];
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    const watch = startMain(args);
    await watch.until(({ stdout }) => stdout.split("\n").length > 2);
    watch.kill(signal);
    const result = await watch.ended;
    assertEquals([result.code, result.stderr], [code, ""]);
    const changes = result.stdout.trimEnd().split("\n").map((line) => JSON.parse(line));
    const { time, connectMs, responseMs, ...change } = changes.find(({ name }) => name === "a");
    assertMatch(time, new RegExp(`^${TIME}$`));
    assert(connectMs > 0 && responseMs > 0);
    assertEquals(change, {
      schemaVersion: 1,
      config: inventory.path,
      previous: null,
      name: "a",
      role: "worker",
      gpu: "",
      state: "up",
      address: "127.0.0.1",
      port: up.port,
      status: { version: "1.4.2", game_count: 7 },
      failure: null,
    });
  }
  const only = startMain([...args, "--only", "down"]);
  await only.until(({ stdout }) => stdout !== "");
  only.kill("SIGINT");
  assertEquals(JSON.parse((await only.ended).stdout).name, "b");
});

Deno.test("main() shows a broken edit on the screen of a watch, and takes it away again", async () => {
  await using up = await startNode("ok");
  await using inventory = await writeInventory({ a: host(up.port) });
  const args = ["status", "--watch", "--interval", "50ms", "--config", inventory.path];
  const watch = startMain(args, { columns: 120, rows: 10 });
  await watch.until(({ stdout }) => / up +1\.4\.2 +12/.test(stdout));
  await replace(inventory, "hosts: 5\n");
  await watch.until(({ stdout }) => /hosts\.yaml:1: hosts: expected/.test(stdout));
  await replace(inventory, JSON.stringify({ hosts: { b: host(up.port) } }));
  await watch.until(({ stdout }) => /\bb +[\s\S]* up/.test(stdout.split("\x1b[H").at(-1)!));
  assert(!watch.stdout.split("\x1b[H").at(-1)!.includes("expected"));
  watch.kill("SIGINT");
  const { code, stdout, stderr } = await watch.ended;
  assertEquals([code, stderr, stdout.at(-1)], [130, "", "\n"]);
});

Deno.test("main() validates: every problem at once, each with its place", async () => {
  await using inventory = await writeInventory({});
  await replace(
    inventory,
    `hosts:
  gpu-1:
    tailscale_ip: "top secret"
    ssh_port: 99999
  gpu-2: { memory_gb: lots }
  gpu-3: 7
elo_sync:
  sync_port: nope
`,
  );
  const places = [
    "3: hosts.gpu-1.tailscale_ip",
    "4: hosts.gpu-1.ssh_port",
    "5: hosts.gpu-2.memory_gb",
    "6: hosts.gpu-3",
    "8: elo_sync.sync_port",
  ];
  const text = await Deno.readTextFile(inventory.path);
  const byVariable = () => runCli(["validate"], { env: { RINGRIFT_HOSTS_CONFIG: inventory.path } });
  for (
    const [origin, { code, stdout, stderr }] of [
      [inventory.path, await runMain(["validate", "--config", inventory.path])],
      [inventory.path, await byVariable()],
      ["stdin", await runMain(["validate", "--config", "-"], { stdin: text })],
    ] as const
  ) {
    const lines = stdout.split("\n");
    assertEquals([code, stderr, lines.slice(-2)], [2, "", [`5 problems, ${origin}`, ""]]);
    assertEquals(
      lines.slice(0, -2).map((line) => line.replace(/: expected .*/, "")),
      places.map((it) => `${origin}:${it}`),
    );
    assert(!stdout.includes("secret"));
  }
  const { code, stdout } = await runMain(["validate", "--json", "--quiet", "--config", inventory.path]);
  const { errors, ...head } = JSON.parse(stdout);
  assertEquals([code, head], [2, { schemaVersion: 1, config: inventory.path, warnings: [] }]);
  assertEquals(errors.map((error: { line: number; path: string }) => `${error.line}: ${error.path}`), places);
});

const WARNINGS: readonly (readonly [yaml: string, warning?: string])[] = [
  ["hosts: { a: { tailscale_ip: 127.0.0.1, status: ready, role: gpu_training_primary, rack: 7 } }"],
  ["hosts: { a: { tailscale_ip: 127.0.0.1, status: Offline } }"],
  [
    "hosts:\n  a: { tailscale_ip: 127.0.0.1, status: offlin }",
    '2: hosts.a.status: warning: .*did you mean "offline"\\?',
  ],
  ["hosts:\n  a: { status: active }", "2: hosts.a: warning: has no address.*"],
  ["hosts:\n  a: { tailscale_ip: 127.0.0.1 }\n  b: { ssh_host: root@127.0.0.1 }", "3: hosts.b: warning: .* as a"],
  ["hosts:\n  a: { tailscale_ip: 127.0.0.1 }\n  b: { ssh_host: 127.0.0.1, data_server_port: 9, ssh_port: 23 }"],
  ["hosts: { a: { tailscale_ip: 127.0.0.1 } }\nelo_sync:\n  coordinator: b", "3: elo_sync.coordinator: warning: .*"],
  ["hosts:\n  a: { tailscale_ip: 100.x.x.x, ssh_host: h }", "2: hosts.a.tailscale_ip: warning: is a placeholder.*"],
  [
    "hosts:\n  a:\n    ssh_host: h\n    tailscale_pi: 127.0.0.1",
    '4: hosts.a.tailscale_pi: warning: .*"tailscale_ip"\\?',
  ],
  [
    "hosts: { a: { ssh_host: h } }\nelo_sync:\n  sync_prot: 1\n  coordinator: a",
    '3: elo_sync.sync_prot: warning: .*"sync_port"\\?',
  ],
];

Deno.test("main() validates: each warning, which is an error to --strict alone", async () => {
  for (const [yaml, warning] of WARNINGS) {
    const { code, stdout } = await runMain(["validate", "--config", "-"], { stdin: yaml });
    assertEquals(code, 0, stdout);
    const lines = stdout.trimEnd().split("\n");
    if (warning === undefined) assertEquals(lines, ["no problems, no warnings, stdin"], yaml);
    else {
      assertMatch(lines[0]!, new RegExp(`^stdin:${warning}$`));
      assertEquals(lines.slice(1), ["no problems, 1 warning, stdin"], yaml);
    }
    const strict = await runMain(["validate", "--strict", "--json", "--config", "-"], { stdin: yaml });
    assertEquals(strict.code, warning === undefined ? 0 : 2, yaml);
    const { schemaVersion, config, errors, warnings } = JSON.parse(strict.stdout);
    assertEquals([schemaVersion, config, errors, warnings.length], [1, "-", [], warning === undefined ? 0 : 1]);
  }
  const quiet = await runMain(["validate", "--quiet", "--config", "-"], { stdin: WARNINGS[0]![0] });
  assertEquals(quiet, { code: 0, stdout: "", stderr: "" });
});

Deno.test("main() validates what is no inventory at all", async () => {
  await using place = await writeInventory({});
  const { folder } = place;
  const noDefault = await runCli(["validate"], { cwd: folder, flags: ["--allow-read"] });
  assertEquals([noDefault.code, noDefault.stderr], [2, ""]);
  assertEquals(noDefault.stdout.split("\n")[0], "config/distributed_hosts.yaml: there is no such file");
  for (
    const [config, stdin, message] of [
      [`${folder}/no.yaml`, "", `${folder}/no.yaml: there is no such file`],
      [folder, "", `${folder}: is a folder, not a file`],
      ["-", "hosts: [1, 2", /^stdin:\d+:\d+: is not valid YAML: /],
      ["-", "hosts:\n  a:\n\ttailscale_ip: 127.0.0.1\n", /^stdin:3.*: a tab in /],
    ] as const
  ) {
    const { code, stdout, stderr } = await runMain(["validate", "--config", config], { stdin });
    const [line, ...rest] = stdout.split("\n");
    assertEquals([code, stderr, rest], [2, "", [`1 problem, ${config === "-" ? "stdin" : config}`, ""]]);
    if (typeof message === "string") assertEquals(line, message);
    else assertMatch(line!, message);
  }
});

const EXPORTED: Hosts = {
  "gpu-1": host(48_761, { ssh_host: "root@127.0.0.2", gpu: "RTX 5090", role: "gpu-worker", rack: [{ row: 7 }] }),
  "gpu-2": host(48_762, {
    tailscale_ip: "::1",
    gpu: 4090,
    ssh_key: "~/.ssh/id_gpu",
    ssh_port: 2222,
    role: "gpu-worker",
  }),
  // A port other than 22 is the one of a proxy in front of ssh_host.
  proxied: host(48_763, { ssh_host: "ops@127.0.0.3", ssh_port: 41_022, role: "gpu-worker", status_path: "/health" }),
  head: { ssh_host: "localhost", status: "ready", role: "coordinator" },
  homeless: { data_server_url: "https://127.0.0.5/x/", status: "active" },
  nowhere: { status: "active" },
  old: { tailscale_ip: "127.0.0.9", status: "retired" },
};

programTest("/usr/bin/ssh", "main() exports an ssh-config that ssh takes", async () => {
  const odd = { "=equal": host(1), "a=b": host(1), "ü": host(1), "n.dc1": host(1) };
  await using inventory = await writeInventory({ ...EXPORTED, ...odd });
  const path = `${inventory.folder}/config`;
  const { code, stdout, stderr } = await runMain(["export", "ssh-config", "--config", inventory.path]);
  assertEquals([code, stderr], [0, ""]);
  assertStringIncludes(stdout, "# homeless: no address\n");
  await Deno.writeTextFile(path, stdout);
  for (
    const [name, expected] of [
      ["gpu-1", { hostname: "127.0.0.1", user: "root", port: "22" }],
      ["gpu-2", { hostname: "::1", user: "ubuntu", port: "2222", identityfile: "~/.ssh/id_gpu" }],
      ["proxied", { hostname: "127.0.0.3", user: "ops", port: "41022" }],
      ["head", { hostname: "localhost", user: "ubuntu", port: "22" }],
      ...Object.keys(odd).map((name) => [name, { hostname: "127.0.0.1" }] as const),
      ["old", { hostname: "old" }],
    ] as const
  ) {
    const { code, stdout, stderr } = await run("ssh", ["-T", "-G", "-F", path, "--", name]);
    assertEquals([code, stderr], [0, ""], name);
    const parsed = Object.fromEntries(stdout.split("\n").map((line) => line.split(" ", 2)));
    for (const [key, value] of Object.entries(expected)) assertEquals(parsed[key], value, `${name}: ${key}`);
  }
});

Deno.test("main() refuses to export to ssh what ssh refuses as a host", async () => {
  const names = ["gpu-*", "gpu?", "!gpu", "#gpu", "a,b", 'a"b', "a b", "it's", "back\\slash", "a;b", "$a", "(a)", "-a"];
  for (const name of names) {
    const { code, stdout, stderr } = await withHosts({ [name]: host(1), ok: host(1) }, ["export", "ssh-config"]);
    assertEquals([code, stdout], [2, ""], name);
    assertStringIncludes(stderr, `${JSON.stringify(name)}; rename them, or leave them out with --exclude`);
  }
});

Deno.test("main() exports to Prometheus the URL that status checks", async () => {
  const { code, stdout, stderr } = await withHosts(EXPORTED, ["export", "prometheus"]);
  assertEquals([code, stderr], [0, "cluster-hosts: nowhere: left out, without an address\n"]);
  const target = (address: string, url: string, node: string, role: string, gpu = "", status = "active") => ({
    targets: [address],
    labels: { node, role, status, gpu, __param_target: url },
  });
  assertEquals(JSON.parse(stdout), [
    target("127.0.0.1:48761", "http://127.0.0.1:48761/status", "gpu-1", "gpu-worker", "RTX 5090"),
    target("[::1]:48762", "http://[::1]:48762/status", "gpu-2", "gpu-worker", "4090"),
    target("127.0.0.1:48763", "http://127.0.0.1:48763/health", "proxied", "gpu-worker"),
    target("localhost:8766", "http://localhost:8766/status", "head", "coordinator", "", "ready"),
    target("127.0.0.5:443", "https://127.0.0.5/x/status", "homeless", "unknown"),
  ]);
  const selected = await withHosts(EXPORTED, ["export", "prometheus", "gpu-[1-2]", "--port", "9100", "--path", "/m"]);
  assertEquals(
    JSON.parse(selected.stdout).map(({ labels }: { labels: Record<string, string> }) => labels.__param_target),
    ["http://127.0.0.1:9100/m", "http://127.0.0.2:9100/m"].map((url, index) => index ? "http://[::1]:9100/m" : url),
  );
});

programTest("/usr/bin/promtool", "main() exports what Prometheus takes", async () => {
  await using inventory = await writeInventory(EXPORTED);
  const { stdout } = await runMain(["export", "prometheus", "--config", inventory.path]);
  await Deno.writeTextFile(
    `${inventory.folder}/prometheus.yml`,
    "scrape_configs: [{ job_name: nodes, file_sd_configs: [{ files: [targets.json] }] }]\n",
  );
  // It does read the targets: broken ones fail.
  for (const [targets, expectedCode] of [[stdout, 0], [stdout.replace('"targets"', '"target"'), 1]] as const) {
    await Deno.writeTextFile(`${inventory.folder}/targets.json`, targets);
    const { code, stderr } = await run("promtool", ["check", "config", `${inventory.folder}/prometheus.yml`]);
    assertEquals(code, expectedCode, stderr);
  }
});

const GPU_1 = {
  ansible_host: "127.0.0.1",
  ansible_user: "root",
  ansible_port: 22,
  ...EXPORTED["gpu-1"],
};

Deno.test("main() exports groups and variables to Ansible", async () => {
  const { code, stdout } = await withHosts(EXPORTED, ["export", "ansible"]);
  assertEquals(code, 0);
  const { _meta: { hostvars }, ...groups } = JSON.parse(stdout);
  assertEquals(Object.keys(hostvars), ["gpu-1", "gpu-2", "proxied", "head", "homeless", "nowhere"]);
  assertEquals(hostvars["gpu-1"], GPU_1);
  assertEquals(hostvars["gpu-2"].ansible_host, "::1");
  assertEquals(hostvars["gpu-2"].ansible_port, 2222);
  assertEquals(hostvars["gpu-2"].ansible_ssh_private_key_file, "~/.ssh/id_gpu");
  const { ansible_host, ansible_port, ansible_user } = hostvars.proxied;
  assertEquals([ansible_host, ansible_port, ansible_user], ["127.0.0.3", 41_022, "ops"]);
  const { all, ...named } = groups;
  assertEquals(all.children.toSorted(), ["ungrouped", ...Object.keys(named)].toSorted());
  assertEquals(named, {
    role_gpu_worker: { hosts: ["gpu-1", "gpu-2", "proxied"] },
    status_active: { hosts: ["gpu-1", "gpu-2", "proxied", "homeless", "nowhere"] },
    gpu_RTX_5090: { hosts: ["gpu-1"] },
    gpu_4090: { hosts: ["gpu-2"] },
    role_coordinator: { hosts: ["head"] },
    status_ready: { hosts: ["head"] },
    role_unknown: { hosts: ["homeless", "nowhere"] },
  });
  assertEquals((await withHosts(EXPORTED, ["export", "ansible", "--list"])).stdout, stdout);

  const twins = { a: host(1, { role: "gpu worker" }), b: host(2, { role: "gpu-worker" }) };
  const collision = await withHosts(twins, ["export", "ansible"]);
  assertEquals([collision.code, collision.stdout], [2, ""]);
  assertMatch(collision.stderr, /^cluster-hosts: .*"gpu worker".*"gpu-worker".*role_gpu_worker\n$/);
});

programTest("/usr/bin/ansible-inventory", "main() exports what Ansible takes, by a script of two lines", async () => {
  await using inventory = await writeInventory(EXPORTED);
  const script = `${inventory.folder}/inventory`;
  const command = `deno run -q -P=cli --config ${ROOT}deno.json ${ROOT}cli.ts export ansible`;
  await Deno.writeTextFile(script, `#!/bin/sh\nexec ${command} --config ${inventory.path} "$@"\n`, { mode: 0o755 });
  const ask = async (...args: string[]) => {
    const env = { LC_ALL: "C.UTF-8", ANSIBLE_LOCAL_TEMP: inventory.folder };
    const { code, stdout, stderr } = await run("ansible-inventory", ["-i", script, ...args], { env });
    assertEquals([code, stderr], [0, ""]);
    return stdout;
  };
  const { _meta: { hostvars }, role_gpu_worker } = JSON.parse(await ask("--list"));
  assertEquals(hostvars["gpu-1"], GPU_1);
  assertEquals(role_gpu_worker, { hosts: ["gpu-1", "gpu-2", "proxied"] });
  assertMatch(await ask("--graph"), /\|--@role_coordinator:\n\s*\|\s+\|--head\n/);
});

Deno.test("main() refuses an inventory that would be a text without end", async () => {
  const yaml = "hosts:\n  a: { tailscale_ip: 127.0.0.1, deep: &deep { again: *deep } }\n";
  const wide = Array.from({ length: 30 }, (_, index) => `  k${index}: &k${index} [*k${index - 1}, *k${index - 1}]`)
    .join("\n").replaceAll("*k-1", "1");
  const bomb = `anchors:\n${wide}\nhosts:\n  a: { tailscale_ip: 127.0.0.1, deep: *k29 }\n`;
  for (const stdin of [yaml, bomb]) {
    for (const args of [["export", "ansible"], ["nodes", "--json"], ["status"]]) {
      const { code, stdout, stderr } = await runMain([...args, "--config", "-"], { stdin });
      assertEquals([code, stdout], [2, ""]);
      assertMatch(stderr, /^cluster-hosts: stdin: .*\n$/);
    }
  }
});

async function permissionsOf(args: readonly string[], options: RunOptions = {}): Promise<string[]> {
  const { code, stdout, stderr } = await runCli(["permissions", ...args], options);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^[^\n]*\n$/);
  return stdout.split(/\s+/).filter((flag) => flag !== "");
}

Deno.test("main() prints the permissions with which each command runs, and not more", async () => {
  await using first = await startNode("ok");
  const { port } = first;
  await using _second = await startNode("ok", { hostname: "127.0.0.2", port });
  await using dead = await startNode("refuses");
  const common = { ssh_port: dead.port, ssh_key: "/dev/null" };
  await using inventory = await writeInventory(
    { a: host(port, common), b: host(port, { tailscale_ip: "127.0.0.2", ...common }) },
    { elo_sync: { coordinator: "a", sync_port: port } },
  );
  const config = ["--config", inventory.path];
  const nets = [`127.0.0.1:${port}`, `127.0.0.2:${port}`];
  const read = `--allow-read=${inventory.path}`;
  const net = `--allow-net=${nets.join(",")}`;
  const self = ["--allow-env=RINGRIFT_NODE_ID", "--allow-sys=hostname,networkInterfaces"];
  for (
    const [args, expected, expectedCode = 0] of [
      [["status"], [read, net]],
      [["status", "--tcp", "b"], [read, `--allow-net=${nets[1]}`]],
      [["status", "--port", String(dead.port), "a"], [read, `--allow-net=127.0.0.1:${dead.port}`], 1],
      [["nodes"], [read]],
      [["coordinator"], [read]],
      [["urls", "elo"], [read, net]],
      [["urls", "data", "b"], [read, `--allow-net=${nets[1]}`, ...self], 1],
      [["urls", "data", "--include-self"], [read, net]],
      [["urls", "models", "--port", String(port)], [read, net]],
      [["urls", "elo", "--unchecked"], [read]],
      [["wait"], [read, net]],
      [["validate"], [read]],
      [["export", "ansible"], [read]],
      [["export", "prometheus"], [read]],
      [["export", "ssh-config"], [read]],
      [["ssh", "*", "--", "true"], [read, "--allow-run=ssh"], 1],
    ] as const
  ) {
    const split = args.indexOf("--" as never);
    const whole = split < 0 ? [...args, ...config] : [...args.slice(0, split), ...config, ...args.slice(split)];
    const flags = await permissionsOf(whole);
    assertEquals(flags, [...expected]);
    const { code, stdout, stderr } = await runCli(
      [...whole.slice(0, 1), "--quiet", ...whole.slice(1)].filter((arg) => arg !== "--quiet" || args[0] !== "export"),
      { flags },
    );
    // Whether the address is this host's is not what is tested here.
    if (args[1] !== "data") assertEquals(code, expectedCode, `${args}: ${stderr}`);
    assert(!stderr.includes("Requires"), stderr);
    if (expectedCode === 0 && !["status", "wait", "validate"].includes(args[0])) assert(stdout !== "");

    for (const [index, flag] of flags.entries()) {
      // A variable or a name that may not be read is one that is not set.
      if (/^--allow-(env|sys)=/.test(flag) || args[1] === "data") continue;
      const less = flag.startsWith("--allow-net=") && flag.includes(",") ? [flag.replace(/,[^,]*$/, "")] : [];
      const { code, stderr } = await runCli(whole, { flags: flags.toSpliced(index, 1, ...less) });
      assertEquals(code, 2, `${args} without ${flag}`);
      assertMatch(stderr, /^cluster-hosts: [^\n]*\n$/);
      const missing = less.length > 0 ? `--allow-net=${nets[1]}` : flag;
      assertStringIncludes(stderr, missing.replace(/,.*/, ""));
    }
  }
});

Deno.test("main() prints the permissions of what the environment names, of races and of URLs", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: { tailscale_ip: "127.0.0.1", status: "active" } });
  const unified = `${inventory.folder}/unified.yaml`;
  await Deno.writeTextFile(unified, `distributed: { data_server_port: ${node.port} }\n`);
  const env = { RINGRIFT_HOSTS_CONFIG: inventory.path, RINGRIFT_CONFIG_PATH: unified };
  const flags = await permissionsOf(["status"], { env });
  assertEquals(flags, [
    `--allow-read=${inventory.path},${unified}`,
    `--allow-net=127.0.0.1:${node.port}`,
    "--allow-env=RINGRIFT_HOSTS_CONFIG,RINGRIFT_CONFIG_PATH",
  ]);
  const { code, stderr } = await runCli(["status"], { env, flags });
  assertEquals([code, stderr], [0, ""]);

  await using empty = await writeInventory({});
  const alone = { env: { RINGRIFT_COORDINATOR_IP: "127.0.0.1" } };
  assertEquals(await permissionsOf(["status", "--config", empty.path], alone), [
    `--allow-read=${empty.path}`,
    "--allow-net=127.0.0.1:8766",
    "--allow-env=RINGRIFT_COORDINATOR_IP",
  ]);

  await using two = await writeInventory({
    both: { tailscale_ip: "127.0.0.1", ssh_host: "127.0.0.2", ssh_port: 41_022, data_server_port: 1 },
    far: { tailscale_ip: "127.0.0.9", data_server_port: 1, status: "active" },
    one: { tailscale_ip: "127.0.0.3", data_server_url: "https://[::1]:9443/x", data_server_port: 1 },
  }, { elo_sync: { coordinator: "gone" } });
  const read = `--allow-read=${two.path}`;
  for (
    const [args, expected] of [
      [["ssh", "both"], [read, "--allow-net=127.0.0.2:41022,127.0.0.1:41022,127.0.0.1:22", "--allow-run=ssh"]],
      [["ssh", "both", "--ssh-option", "ProxyJump=x"], [read, "--allow-run=ssh"]],
      [["ssh", "one"], [read, "--allow-run=ssh"]],
      [["status", "one"], [read, "--allow-net=[::1]:9443"]],
      [["coordinator"], [read, "--allow-env=RINGRIFT_COORDINATOR_IP"]],
      // This host itself is not contacted.
      [["urls", "data"], [
        read,
        "--allow-net=127.0.0.9:1",
        "--allow-env=RINGRIFT_NODE_ID",
        "--allow-sys=hostname,networkInterfaces",
      ]],
    ] as const
  ) {
    assertEquals(await permissionsOf([...args, "--config", two.path]), [...expected], args.join(" "));
  }
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, () => new Response("hosts: {}"));
  const url = `http://127.0.0.1:${server.addr.port}/hosts.yaml`;
  assertEquals(await permissionsOf(["validate", "-c", url]), [`--allow-net=127.0.0.1:${server.addr.port}`]);
  assertEquals(await permissionsOf(["validate", "-c", `file://${two.path}`]), [read]);
  const stdin = await runMain(["permissions", "nodes", "-c", "-"], { stdin: "hosts: { a: { data_server_port: 1 } }" });
  assertEquals(stdin, { code: 0, stdout: "\n", stderr: "" });
});

Deno.test("main() prints no permission that a shell would split", async () => {
  const folder = await Deno.makeTempDir({ dir: "/tmp", prefix: "a b" });
  try {
    await Deno.writeTextFile(`${folder}/hosts.yaml`, "hosts: { a: { tailscale_ip: 127.0.0.1 } }");
    const { code, stdout, stderr } = await runMain(["permissions", "nodes", "--config", `${folder}/hosts.yaml`]);
    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr, /^cluster-hosts: .*a shell would split it\n$/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("main() prints access to every host, with a warning, if a flag would be too long", async () => {
  const hosts = Object.fromEntries(Array.from({ length: 10_000 }, (_, index) => [
    `n${index}`,
    host(80, {
      tailscale_ip: `127.${index >> 8}.${index & 255}.1`,
    }),
  ]));
  const { code, stdout, stderr } = await withHosts(hosts, ["permissions", "status"]);
  assertEquals([code, stdout], [0, "--allow-net\n"]);
  assertMatch(stderr, /^cluster-hosts: 10000 endpoints do not fit into one flag: --allow-net permits every host\n$/);
});
