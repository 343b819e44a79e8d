import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import {
  type InventoryFile,
  ROOT,
  run,
  runCli,
  type RunOptions,
  startNode,
  writeInventory,
} from "./loopback_cluster.ts";
import { type RunningCli, startCli } from "./sshd.ts";

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

/** Runs a command on an inventory of the hosts. */
async function withHosts(hosts: Hosts, args: readonly string[], options?: RunOptions) {
  await using inventory = await writeInventory(hosts);
  return await runCli([...args, "--config", inventory.path], options);
}

/** Replaces the inventory at once, as editors do: a half-written file would be a broken edit. */
async function replace(inventory: InventoryFile, text: string): Promise<void> {
  await Deno.writeTextFile(`${inventory.folder}/new`, text);
  await Deno.rename(`${inventory.folder}/new`, inventory.path);
}

async function nextLine(lines: RunningCli["stdout"]): Promise<string> {
  const { value, done } = await lines.next();
  if (done) throw new Error("There is no further line");
  return value;
}

Deno.test("wait returns when a node has come up, and names each once", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({ a: host(up.port), b: host(dead.port) });
  await using cli = startCli(["wait", "--config", inventory.path, "--interval", "0.1", "--timeout", "20"]);
  assertMatch(await nextLine(cli.stdout), /^a up after \d+\.\d\d s$/);
  await using _late = await startNode("ok", { port: dead.port });
  const { code, stdout, stderr } = await cli.end();
  assertEquals([code, stderr], [0, []]);
  assertMatch(stdout.join("\n"), /^b up after \d+\.\d\d s$/);
});

Deno.test("wait tells by its exit code whether enough nodes came up, and names the missing ones", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  const hosts = { a: host(up.port), b: host(dead.port), c: host(silent.port), d: { status: "active" } };
  const up1 = /^a up after .* s\n$/;
  for (
    const [args, expectedCode, stdout, stderr] of [
      [[], 1, up1, /^cluster-hosts: Still missing after .* s: b \(refused\), c \(timeout\), d \(no-address\)\n$/],
      [["--quiet"], 1, /^$/, /^$/],
      [["--min-up", "1"], 0, up1, /^$/],
      [["--min-up", "2"], 1, up1, /: b \(refused\), c \(timeout\), d /],
      [["--tcp", "--min-up", "2"], 0, /^(a|c) up after .* s\n(a|c) up after .* s\n$/, /^$/],
      [["--tcp", "--port", String(up.port), "a", "b"], 0, /^(a|b) up after .* s\n(a|b) up after .* s\n$/, /^$/],
      [["--port", String(dead.port), "a"], 1, /^$/, /: a \(refused\)\n$/],
      [["--min-up", "5"], 2, /^$/, /^cluster-hosts: --min-up 5, but only 4 nodes are selected\n$/],
    ] as const
  ) {
    const result = await withHosts(hosts, ["wait", "--timeout", "0.6", "--interval", "0.1", ...args]);
    assertEquals(result.code, expectedCode, `${args}: ${result.stderr}`);
    assertMatch(result.stdout, stdout);
    assertMatch(result.stderr, stderr);
    assert(result.ms < 600 + 1000, `took ${result.ms} ms`);
  }

  const { code, stdout } = await withHosts(hosts, ["wait", "--json", "--timeout", "0.5", "--interval", "0.1"]);
  const { schemaVersion, up: names, missing, waitedMs } = JSON.parse(stdout);
  assertEquals([code, schemaVersion, names, typeof waitedMs], [1, 1, ["a"], "number"]);
  assertEquals(
    missing.map((node: { name: string; failure: { code: string } }) => [node.name, node.failure.code]),
    [["b", "refused"], ["c", "timeout"], ["d", "no-address"]],
  );
});

Deno.test("wait checks once more before its time is over", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({ a: host(dead.port), b: host(up.port) });
  const args = ["--interval", "60", "--timeout", "2", "--concurrency", "1"];
  await using cli = startCli(["wait", "--config", inventory.path, ...args]);
  assertMatch(await nextLine(cli.stdout), /^b up after /);
  await using _late = await startNode("ok", { port: dead.port });
  assertEquals((await cli.end()).code, 0);
});

const TIME = String.raw`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`;

Deno.test("status --watch writes only changes to a pipe, and follows the config", async () => {
  await using first = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({ a: host(first.port), b: host(dead.port) });
  await using cli = startCli(["status", "--watch", "0.1", "--config", inventory.path]);
  const expectLine = async (text: string) => {
    assertMatch(await nextLine(cli.stdout), new RegExp(`^${TIME} ${text}$`));
  };
  await expectLine("a: up");
  await expectLine("b: down \\(.*refused.*\\)");
  const second = await startNode("ok", { port: dead.port });
  await expectLine("b: down -> up");

  await replace(inventory, JSON.stringify({ hosts: { b: host(dead.port), c: host(first.port) } }));
  await expectLine("c: up");

  await replace(inventory, "hosts:\n  b:\n    data_server_port: 99999\n");
  assertMatch(await nextLine(cli.stderr), /^cluster-hosts: .*hosts\.yaml:3: hosts\.b\.data_server_port: /);
  await second[Symbol.asyncDispose]();
  // A check in the middle of the closing finds it ill first.
  for (let line = ""; !/ b: \w+ -> down /.test(line);) line = await nextLine(cli.stdout);

  cli.process.kill("SIGINT");
  assertEquals(await cli.end(), { code: 1, stdout: [], stderr: [] });
});

Deno.test("status --watch --json writes one object a change, and ends with the exit code of the last round", async () => {
  await using up = await startNode("ok", { games: 7 });
  await using inventory = await writeInventory({ a: host(up.port, { role: "worker" }) });
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await using cli = startCli(["status", "--watch", "0.1", "--json", "--config", inventory.path]);
    const { time, connectMs, ...change } = JSON.parse(await nextLine(cli.stdout));
    assertMatch(time, new RegExp(`^${TIME}$`));
    assert(connectMs > 0);
    assertEquals(change, {
      schemaVersion: 1,
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
    cli.process.kill(signal);
    assertEquals(await cli.end(), { code: 0, stdout: [], stderr: [] });
  }
});

programTest("/usr/bin/script", "status --watch draws the table in place on a terminal", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const hosts = Object.fromEntries(Array.from({ length: 9 }, (_, index) => [`b${index}`, host(dead.port)]));
  await using inventory = await writeInventory({ a: host(up.port), ...hosts });
  const command = `stty rows 10 cols 70; cd ${ROOT}; exec deno run -q -P=cli cli.ts status --watch 0.2 ` +
    `--min-up 1 --config ${inventory.path}`;
  const child = new Deno.Command("sh", {
    args: ["-c", 'exec script -qec "$0" /dev/null', command],
    env: { TERM: "xterm", NO_COLOR: "" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
    signal: AbortSignal.timeout(20_000),
  }).spawn();
  const keyboard = child.stdin.getWriter();
  let screen = "";
  let step = 0;
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    screen += text.replaceAll("\x1b", "ESC");
    if (step === 0 && screen.split("ESC[H").length > 2) {
      step++;
      await replace(inventory, "hosts: 5\n");
    }
    if (step === 1 && screen.includes("hosts.yaml:1: hosts: expected")) {
      step++;
      // What the keys Ctrl and C write: the terminal makes a SIGINT of it.
      await keyboard.write(new Uint8Array([3]));
    }
  }
  await keyboard.close().catch(() => {});
  await child.stderr.cancel();
  assertEquals([step, (await child.status).code], [2, 0], screen);

  assert(!screen.includes("ESC[2J"), "The screen is cleared, which flickers");
  // The terminal shows the keys wherever the cursor is at that moment.
  const [before, ...frames] = screen.replace("^C", "").split("ESC[H");
  assertEquals(before, "ESC[?7l");
  for (const frame of frames) {
    const lines = frame.split("\r\n");
    const drawn = lines.findIndex((line) => line.startsWith("ESC[J"));
    assert(drawn > 0 && drawn < 10, frame);
    assert(lines.slice(0, drawn).every((line) => line.endsWith("ESC[K")), frame);
    assertMatch(lines[0]!, /^\d\d:\d\d:\d\d {2}1 of 10 nodes up, 9 down {2}\(every 0\.2 s, Ctrl-C ends\)/);
    assertMatch(frame, /\ds {2}a +unknown.*ESC\[32mupESC\[0m +1\.4\.2 +12/);
    assertMatch(frame, /… \d more: make the window higherESC\[K\r\nESC\[JESC\[\?7h/);
  }
});

Deno.test("validate tells every problem at once, each with its place", async () => {
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
  for (
    const [origin, args, options] of [
      [inventory.path, ["--config", inventory.path], {}],
      [inventory.path, [], { env: { RINGRIFT_HOSTS_CONFIG: inventory.path } }],
      ["stdin", ["--config", "-"], { stdin: text }],
    ] as const
  ) {
    const { code, stdout, stderr } = await runCli(["validate", ...args], options);
    const lines = stdout.split("\n");
    assertEquals([code, stderr, lines.slice(-2)], [2, "", ["5 errors, no doubts", ""]]);
    assertEquals(
      lines.slice(0, -2).map((line) => line.replace(/: expected .*/, "")),
      places.map((it) => `${origin}:${it}`),
    );
    assert(!stdout.includes("secret"));
  }
  const { code, stdout } = await runCli(["validate", "--json", "--config", inventory.path]);
  const { errors, ...head } = JSON.parse(stdout);
  assertEquals([code, head], [2, { schemaVersion: 1, origin: inventory.path, doubts: [] }]);
  assertEquals(errors.map((error: { line: number; path: string }) => `${error.line}: ${error.path}`), places);
});

const DOUBTS: readonly (readonly [yaml: string, doubt?: string])[] = [
  ["hosts: { a: { tailscale_ip: 127.0.0.1, status: ready, role: gpu_training_primary, rack: 7 } }"],
  ["hosts: { a: { tailscale_ip: 127.0.0.1, status: proxy_only } }"],
  ["hosts:\n  a: { tailscale_ip: 127.0.0.1, status: offlin }", '2: hosts.a.status: doubt: .*"offline"'],
  ["hosts:\n  a: { status: active }", "2: hosts.a: doubt: has no address"],
  [
    "hosts:\n  a: { tailscale_ip: 127.0.0.1 }\n  b: { ssh_host: root@127.0.0.1 }",
    "3: hosts.b: doubt: has the same address and data server port as a",
  ],
  ["hosts:\n  a: { tailscale_ip: 127.0.0.1 }\n  b: { ssh_host: 127.0.0.1, data_server_port: 9 }"],
  [
    "hosts: { a: { tailscale_ip: 127.0.0.1 } }\nelo_sync:\n  coordinator: b",
    "3: elo_sync.coordinator: doubt: .*not in hosts",
  ],
  [
    "hosts: { a: { tailscale_ip: 127.0.0.1, status: offline } }\nelo_sync:\n  coordinator: a",
    "3: elo_sync.coordinator: doubt: .*not active",
  ],
  ["hosts:\n  a: { tailscale_ip: 100.x.x.x, ssh_host: h }", "2: hosts.a.tailscale_ip: doubt: is a placeholder.*"],
  [
    "hosts:\n  a: { tailscale_ip: 127.0.0.1, ssh_host: <public-ip> }",
    "2: hosts.a.ssh_host: doubt: is a placeholder.*",
  ],
  ["hosts:\n  a:\n    ssh_host: h\n    tailscale_pi: 127.0.0.1", '4: hosts.a.tailscale_pi: doubt: .*"tailscale_ip"'],
  ["hosts:\n  a:\n    ssh_host: h\n    tags: [x,\n\ty]", "5: doubt: a tab in the indentation"],
];

Deno.test("validate tells each doubt, which is an error to --strict alone", async () => {
  for (const [yaml, doubt] of DOUBTS) {
    const { code, stdout } = await runCli(["validate", "--config", "-"], { stdin: yaml });
    assertEquals(code, 0, stdout);
    const lines = stdout.trimEnd().split("\n");
    if (doubt === undefined) assertEquals(lines, ["no errors, no doubts"], yaml);
    else {
      assertMatch(lines[0]!, new RegExp(`^stdin:${doubt}`));
      assertEquals(lines.slice(1), ["no errors, 1 doubt"], yaml);
    }
    const strict = await runCli(["validate", "--strict", "--json", "--config", "-"], { stdin: yaml });
    assertEquals(strict.code, doubt === undefined ? 0 : 2, yaml);
    assertEquals(JSON.parse(strict.stdout).doubts.length, doubt === undefined ? 0 : 1);
  }
});

Deno.test("validate tells what is no inventory at all", async () => {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  try {
    for (
      const [args, stdin, message] of [
        [["--config", `${folder}/no.yaml`], "", `${folder}/no.yaml: there is no such file`],
        [["--config", folder], "", `${folder}: is a folder, not a file`],
        [[], "", "config/distributed_hosts.yaml: there is no such file"],
        [["--config", "-"], "hosts: [1, 2", /^stdin:\d+:\d+: is not valid YAML: /],
        [["--config", "-"], "hosts:\n  a:\n\ttailscale_ip: 127.0.0.1\n", /^stdin:3:1: is not valid YAML: a tab in /],
      ] as const
    ) {
      const { code, stdout, stderr } = await runCli(["validate", ...args], { stdin, cwd: folder, flags: ALL_READ });
      const [line, ...rest] = stdout.split("\n");
      assertEquals([code, stderr, rest], [2, "", ["1 error, no doubts", ""]]);
      if (typeof message === "string") assertEquals(line, message);
      else assertMatch(line!, message);
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

/** `-P` is of the folder of deno.json; this is of any. */
const ALL_READ = ["--allow-read"];

const EXPORTED: Hosts = {
  "gpu-1": host(48_761, { ssh_host: "root@127.0.0.2", gpu: "RTX 5090", role: "gpu-worker", rack: [{ row: 7 }] }),
  "gpu-2": host(48_762, {
    tailscale_ip: "::1",
    gpu: 4090,
    ssh_key: "~/.ssh/id_gpu",
    ssh_port: 2222,
    role: "gpu-worker",
  }),
  head: { ssh_host: "localhost", status: "ready", role: "coordinator" },
  homeless: { data_server_url: "http://127.0.0.5:9000/x", status: "active" },
  old: { tailscale_ip: "127.0.0.9", status: "retired" },
};

Deno.test("export ssh-config is what ssh takes", async () => {
  await using inventory = await writeInventory({
    ...EXPORTED,
    "it's": host(1, { ssh_port: 77 }),
    "=equal": host(1),
    "back\\slash": host(1),
    "a b": host(1),
  });
  const path = `${inventory.folder}/config`;
  const { code, stdout, stderr } = await runCli(["export", "ssh-config", "--config", inventory.path]);
  assertEquals([code, stderr], [0, ""]);
  assertStringIncludes(stdout, "# homeless: no address\n");
  assertStringIncludes(stdout, 'Host "a b"\n');
  await Deno.writeTextFile(path, stdout);
  for (
    const [name, expected] of [
      ["gpu-1", { hostname: "127.0.0.1", user: "root", port: "22" }],
      ["gpu-2", { hostname: "::1", user: "ubuntu", port: "2222", identityfile: "~/.ssh/id_gpu" }],
      ["head", { hostname: "localhost", user: "ubuntu", port: "22" }],
      ["old", { hostname: "old" }],
    ] as const
  ) {
    const { code, stdout, stderr } = await run("ssh", ["-T", "-G", "-F", path, "--", name]);
    assertEquals([code, stderr], [0, ""]);
    const parsed = Object.fromEntries(stdout.split("\n").map((line) => line.split(" ", 2)));
    for (const [key, value] of Object.entries(expected)) assertEquals(parsed[key], value, `${name}: ${key}`);
  }

  for (const name of ["gpu-*", "gpu?", "!gpu", "#gpu", "a,b", 'a"b']) {
    const { code, stdout, stderr } = await withHosts({ [name]: host(1) }, ["export", "ssh-config"]);
    assertEquals([code, stdout], [2, ""]);
    assertStringIncludes(stderr, JSON.stringify(name));
  }
});

Deno.test("export prometheus gives targets and labels", async () => {
  const { code, stdout } = await withHosts(EXPORTED, ["export", "prometheus"]);
  assertEquals(code, 0);
  assertEquals(JSON.parse(stdout), [
    {
      targets: ["127.0.0.1:48761"],
      labels: { node: "gpu-1", role: "gpu-worker", status: "active", gpu: "RTX 5090" },
    },
    { targets: ["[::1]:48762"], labels: { node: "gpu-2", role: "gpu-worker", status: "active", gpu: "4090" } },
    { targets: ["localhost:8766"], labels: { node: "head", role: "coordinator", status: "ready", gpu: "" } },
  ]);
  const selected = await withHosts(EXPORTED, ["export", "prometheus", "gpu-[1-2]", "--port", "9100"]);
  assertEquals(
    JSON.parse(selected.stdout).map(({ targets }: { targets: string[] }) => targets[0]),
    ["127.0.0.1:9100", "[::1]:9100"],
  );
});

programTest("/usr/bin/promtool", "export prometheus is what Prometheus takes", async () => {
  await using inventory = await writeInventory(EXPORTED);
  const { stdout } = await runCli(["export", "prometheus", "--config", inventory.path]);
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

Deno.test("export ansible gives groups and variables", async () => {
  const { code, stdout } = await withHosts(EXPORTED, ["export", "ansible"]);
  assertEquals(code, 0);
  const { _meta: { hostvars }, ...groups } = JSON.parse(stdout);
  assertEquals(Object.keys(hostvars), ["gpu-1", "gpu-2", "head", "homeless"]);
  assertEquals(hostvars["gpu-1"], GPU_1);
  assertEquals(hostvars["gpu-2"].ansible_host, "::1");
  assertEquals(hostvars["gpu-2"].ansible_port, 2222);
  assertEquals(hostvars["gpu-2"].ansible_ssh_private_key_file, "~/.ssh/id_gpu");
  const { all, ...named } = groups;
  assertEquals(all.children.toSorted(), ["ungrouped", ...Object.keys(named)].toSorted());
  assertEquals(named, {
    role_gpu_worker: { hosts: ["gpu-1", "gpu-2"] },
    status_active: { hosts: ["gpu-1", "gpu-2", "homeless"] },
    gpu_RTX_5090: { hosts: ["gpu-1"] },
    gpu_4090: { hosts: ["gpu-2"] },
    role_coordinator: { hosts: ["head"] },
    status_ready: { hosts: ["head"] },
    role_unknown: { hosts: ["homeless"] },
  });

  const listed = await withHosts(EXPORTED, ["export", "ansible", "--list"]);
  assertEquals(listed.stdout, stdout);
  const one = await withHosts(EXPORTED, ["export", "ansible", "--host", "gpu-1"]);
  assertEquals(JSON.parse(one.stdout), GPU_1);

  const twins = { a: host(1, { role: "gpu worker" }), b: host(2, { role: "gpu-worker" }) };
  const collision = await withHosts(twins, ["export", "ansible"]);
  assertEquals([collision.code, collision.stdout], [2, ""]);
  assertMatch(collision.stderr, /^cluster-hosts: .*"gpu worker".*"gpu-worker".*role_gpu_worker\n$/);
});

programTest(
  "/usr/bin/ansible-inventory",
  "export ansible is what Ansible takes, by a script of two lines",
  async () => {
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
    assertEquals(role_gpu_worker, { hosts: ["gpu-1", "gpu-2"] });
    assertMatch(await ask("--graph"), /\|--@role_coordinator:\n\s*\|\s+\|--head\n/);
  },
);

Deno.test("export refuses what would be a text without end", async () => {
  const yaml = "hosts:\n  a: { tailscale_ip: 127.0.0.1, deep: &deep { again: *deep } }\n";
  const wide = Array.from({ length: 30 }, (_, index) => `  k${index}: &k${index} [*k${index - 1}, *k${index - 1}]`)
    .join("\n").replaceAll("*k-1", "1");
  const bomb = `anchors:\n${wide}\nhosts:\n  a: { tailscale_ip: 127.0.0.1, deep: *k29 }\n`;
  for (const stdin of [yaml, bomb]) {
    for (const args of [[], ["--host", "a"]]) {
      const { code, stdout, stderr, ms } = await runCli(["export", "ansible", ...args, "--config", "-"], { stdin });
      assertEquals([code, stdout], [2, ""]);
      assertMatch(stderr, /^cluster-hosts: .*nested without end.*\n$/);
      assert(ms < 2000, `took ${ms} ms`);
    }
    const { code } = await runCli(["export", "ssh-config", "--config", "-"], { stdin });
    assertEquals(code, 0);
  }
});

Deno.test("export takes three formats, and --list and --host for Ansible alone", async () => {
  for (
    const [args, message] of [
      [[], /expected ansible, prometheus, ssh-config/],
      [["promtheus"], /"promtheus": is "prometheus" meant\?/],
      [["prometheus", "--list"], /for export ansible/],
      [["ssh-config", "--host", "gpu-1"], /for export ansible/],
      [["ansible", "gpu-9"], /"gpu-9"/],
    ] as const
  ) {
    const { code, stdout, stderr } = await withHosts(EXPORTED, ["export", ...args]);
    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr, message);
  }
});

async function permissionsOf(args: readonly string[], options: RunOptions = {}): Promise<string[]> {
  const { code, stdout, stderr } = await runCli(["permissions", ...args], options);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^[^\n]*\n$/);
  return stdout.split(/\s+/).filter((flag) => flag !== "");
}

Deno.test("permissions prints what each command runs with, and not more", async () => {
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
  const env = "--allow-env=RINGRIFT_CONFIG_PATH";
  const net = `--allow-net=${nets.join(",")}`;
  const coordinatorEnv = `${env},RINGRIFT_COORDINATOR_IP`;
  const dataFlags = [`${env},RINGRIFT_NODE_ID`, "--allow-sys=hostname,networkInterfaces"];
  for (
    const [args, expected, expectedCode = 0] of [
      [["status"], [read, net, env]],
      [["status", "--tcp", "b"], [read, `--allow-net=${nets[1]}`, env]],
      [["status", "--port", String(dead.port), "a"], [read, `--allow-net=127.0.0.1:${dead.port}`, env], 1],
      [["nodes"], [read, env]],
      [["coordinator"], [read, coordinatorEnv]],
      [["urls", "elo"], [read, net, env]],
      [["urls", "data"], [read, net, ...dataFlags]],
      [["urls", "data", "--include-self"], [read, net, env]],
      [["urls", "models", "--port", String(port)], [read, net, env]],
      [["urls", "elo", "--unchecked"], [read, env]],
      [["wait"], [read, net, env]],
      [["validate"], [read]],
      [["export", "ansible"], [read, env]],
      [["export", "prometheus"], [read, env]],
      [["export", "ssh-config"], [read, env]],
      [["ssh", "--", "true"], [read, env, "--allow-run=ssh"], 1],
    ] as const
  ) {
    const split = args.indexOf("--" as never);
    const whole = split < 0 ? [...args, ...config] : [...args.slice(0, split), ...config, ...args.slice(split)];
    const flags = await permissionsOf(whole);
    assertEquals(flags, [...expected]);
    const { code, stdout, stderr } = await runCli(whole, { flags });
    assertEquals(code, expectedCode, `${args}: ${stderr}`);
    if (args[0] === "ssh") assertStringIncludes(stderr, "cluster-hosts: 0 of 2 returned 0; a: could not connect");
    else {
      assertEquals(stderr, "");
      assert(stdout !== "");
    }

    for (const [index, flag] of flags.entries()) {
      // A variable or a name that may not be read is one that is not set.
      if (/^--allow-(env|sys)=/.test(flag)) continue;
      const less = flag.startsWith("--allow-net=") && flag.includes(",") ? [flag.replace(/,[^,]*$/, "")] : [];
      const { code, stderr } = await runCli(whole, { flags: flags.toSpliced(index, 1, ...less) });
      assertEquals(code, 2, `${args} without ${flag}`);
      assertMatch(stderr, /^cluster-hosts: [^\n]*\n$/);
      const missing = less.length > 0 ? `--allow-net=${nets[1]}` : flag;
      assertStringIncludes(stderr, missing.replace(/,.*/, ""));
    }
  }
});

Deno.test("permissions knows the inventory and the port that the environment names", async () => {
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
  const args = ["status", "--config", empty.path];
  const alone = { env: { RINGRIFT_COORDINATOR_IP: "127.0.0.1", RINGRIFT_CONFIG_PATH: unified } };
  const coordinatorFlags = await permissionsOf(args, alone);
  assertStringIncludes(coordinatorFlags.join(" "), "--allow-net=127.0.0.1:8766 ");
  const result = await runCli([...args, "--timeout", "1"], { ...alone, flags: coordinatorFlags });
  assert([0, 1].includes(result.code), result.stderr);
});

Deno.test("permissions refuses what a shell would split, and what is no command", async () => {
  const folder = await Deno.makeTempDir({ dir: "/tmp", prefix: "a b" });
  try {
    await Deno.writeTextFile(`${folder}/hosts.yaml`, "hosts: { a: { tailscale_ip: 127.0.0.1 } }");
    for (
      const [args, message] of [
        [["nodes", "--config", `${folder}/hosts.yaml`], /a shell would split it/],
        [[], /permissions needs a command/],
        [["statsu"], /"statsu": is "status" meant\?/],
        [["--json", "status"], /"--json"/],
      ] as const
    ) {
      const { code, stdout, stderr } = await runCli(["permissions", ...args]);
      assertEquals([code, stdout], [2, ""]);
      assertMatch(stderr, /^cluster-hosts: .*\n$/);
      assertMatch(stderr, message);
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

/** Which of the hosts the flags admit. */
async function admitted(flags: readonly string[], hosts: readonly string[]): Promise<string[]> {
  const script = `console.log(JSON.stringify(${JSON.stringify(hosts)}.filter((host) =>
    Deno.permissions.querySync({ name: "net", host }).state === "granted")))`;
  const { stdout, stderr } = await run("deno", ["run", "-q", "--no-prompt", ...flags, "-"], { stdin: script });
  assertEquals(stderr, "");
  return JSON.parse(stdout);
}

Deno.test("permissions --fold merges what is contiguous, and admits no more", async () => {
  const addresses = [
    ...Array.from({ length: 256 }, (_, last) => `127.3.7.${last}`),
    "127.9.9.8",
    "127.9.9.11",
    "localhost",
    "::1",
  ];
  const hosts = Object.fromEntries(
    addresses.map((address, index) => [`n${index}`, host(80, { tailscale_ip: address })]),
  );
  const { code, stdout, stderr } = await withHosts(hosts, ["permissions", "--fold", "status"]);
  assertEquals([code, stderr], [0, ""]);
  const flag = stdout.split(" ").find((flag) => flag.startsWith("--allow-net="))!;
  assertEquals(
    flag.replace("--allow-net=", "").split(",").toSorted(),
    ["127.3.7.0/24:80", "127.9.9.11:80", "127.9.9.8:80", "[::1]:80", "localhost:80"],
  );
  const asked = addresses.map((address) => address.includes(":") ? `[${address}]:80` : `${address}:80`);
  const others = ["127.3.6.255:80", "127.3.8.0:80", "127.9.9.9:80", "127.9.9.10:80", "127.3.7.1:81"];
  assertEquals(await admitted([flag], [...others, ...asked]), asked);
});

Deno.test("permissions folds by itself, with a word, what no command line holds", async () => {
  // Every 1601st address: as good as no two of them are neighbours.
  const addresses = Array.from({ length: 10_000 }, (_, index) => {
    const number = index * 1601 + 7;
    return `127.${number >> 16 & 255}.${number >> 8 & 255}.${number & 255}`;
  });
  const hosts = Object.fromEntries(
    addresses.map((address, index) => [`n${index}`, host(80, { tailscale_ip: address })]),
  );
  const { code, stdout, stderr } = await withHosts(hosts, ["permissions", "status"]);
  assertEquals(code, 0);
  assertMatch(stderr, /^cluster-hosts: The 10000 hosts are too many for one flag: printed as \d+ networks, .*\n$/);
  assert(stdout.length <= 100 * 1024, `${stdout.length} characters`);
  const flag = stdout.split(" ").find((flag) => flag.startsWith("--allow-net="))!;
  const asked = addresses.map((address) => `${address}:80`);
  assertEquals(await admitted([flag], [...asked, "127.0.0.7:81", "128.0.0.1:80"]), asked);
});
