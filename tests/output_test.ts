// deno-lint-ignore-file no-control-regex
import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { startNode } from "./loopback_cluster.ts";
import { ROOT, run, runCli, type RunOptions, startCli, writeInventory } from "./process.ts";

const CLI = `deno run -q --no-prompt --config ${ROOT}deno.json -P=cli ${ROOT}cli.ts`;

/** Runs a shell command in which `cluster-hosts` is cli.ts. */
function shell(command: string, options: Pick<RunOptions, "env"> = {}) {
  return run("sh", ["-c", command.replaceAll("cluster-hosts", CLI)], options);
}

const hasScript = (await run("sh", ["-c", "command -v script"])).code === 0;

/** Registers a test that needs a terminal. */
function terminalTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: hasScript ? name : `${name} (ignored: needs script)`, ignore: !hasScript, fn });
}

/** Runs it on a terminal of this size, of which both streams are one. */
async function onTerminal(command: string, size: { columns: number; rows: number }, env: Record<string, string> = {}) {
  const inner = `stty rows ${size.rows} cols ${size.columns}; exec ${command.replaceAll("cluster-hosts", CLI)}`;
  const { code, stdout } = await run("sh", ["-c", `exec timeout 30 script -qec '${inner}' /dev/null`], {
    env: { TERM: "xterm", ...env },
  });
  return { code, text: stdout.replaceAll("\r\n", "\n") };
}

Deno.test("main() ends quietly when the reader of a pipe is gone", async () => {
  const hosts = Array.from({ length: 3000 }, (_, index) => [`gpu-${index}`, { tailscale_ip: "127.0.0.1" }]);
  await using inventory = await writeInventory(Object.fromEntries(hosts));
  for (
    const command of ["nodes", "nodes --json", "urls elo --unchecked -q", "export ansible", "ssh \\* --dry-run -- true"]
  ) {
    const [before, behind = ""] = command.split(/(?= -- )/);
    const line = `{ cluster-hosts ${before} --config ${inventory.path}${behind}; echo ended $? >&2; } | head -c 1`;
    const { stdout, stderr } = await shell(line);
    assertEquals([stdout.length, stderr], [1, "ended 0\n"], command);
  }
});

Deno.test("main() says that a full stdout cannot be written", async () => {
  await using node = await startNode("ok");
  const hosts = { head: { tailscale_ip: "127.0.0.1", data_server_port: node.port } };
  await using inventory = await writeInventory(hosts, { elo_sync: { coordinator: "head" } });
  const commands = ["status", "nodes", "nodes --json", "coordinator", "urls data --include-self", "wait", "validate"];
  const message = "cluster-hosts: Cannot write the output: No space left on device (os error 28)\n";
  await Promise.all([...commands, "export prometheus", "permissions status"].map(async (command) => {
    const { code, stderr } = await shell(`cluster-hosts ${command} --config ${inventory.path} > /dev/full`);
    assertEquals([code, stderr], [2, message], command);
  }));
  for (const command of ["--help", "--version", "status --help"]) {
    assertEquals((await shell(`cluster-hosts ${command} > /dev/full`)).code, 2, command);
  }
  // Not even the error can be written.
  assertEquals((await shell("cluster-hosts stauts 2> /dev/full")).code, 2);
});

Deno.test("main() works with a closed stdin, a closed stdout and another locale", async () => {
  const config = `--config ${ROOT}config/demo_hosts.yaml`;
  const closed = await shell(`cluster-hosts nodes gpu-1 ${config} <&-`);
  assertEquals([closed.code, closed.stderr, closed.stdout.split("\n").length], [0, "", 5]);
  const empty = await shell("cluster-hosts nodes -c - <&-");
  assertEquals([empty.code, empty.stdout], [2, ""]);
  assertMatch(empty.stderr, /^cluster-hosts: [^\n]+\n$/);
  assertEquals((await shell(`cluster-hosts nodes ${config} >&-`)).stderr, "");
  const name = JSON.stringify({ hosts: { "漢字": {} } });
  const { stdout } = await shell(`echo '${name}' | cluster-hosts nodes --names -c -`, {
    env: { LANG: "C", LC_ALL: "C" },
  });
  assertEquals(stdout, "漢字\n");
});

Deno.test("main() ends within 0.5 s of a signal amid 1,000 black holes, with what is known", async () => {
  await using hole = await startNode("black-hole");
  await using node = await startNode("ok");
  const dead = Array.from({ length: 999 }, (_, index) => [`dead-${index}`, {
    tailscale_ip: "127.0.0.1",
    data_server_port: hole.port,
  }]);
  const live = { tailscale_ip: "127.0.0.1", data_server_port: node.port };
  await using inventory = await writeInventory({ live, ...Object.fromEntries(dead) });
  const interrupted = async (signal: Deno.Signal, command: string[]) => {
    await using cli = startCli([...command, "--config", inventory.path, "--timeout", "30"]);
    const before = node.connections;
    while (node.connections === before) await delay(10);
    await delay(200);
    const started = performance.now();
    cli.process.kill(signal);
    const { code, stdout, stderr } = await cli.end();
    const ms = performance.now() - started;
    assert(ms < 500, `${command} ended ${ms} ms after ${signal}`);
    return { code, stdout: stdout.join("\n"), stderr: stderr.join("\n") };
  };
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const) {
    const table = await interrupted(signal, ["status"]);
    assertEquals(table.code, code, signal);
    assertMatch(table.stdout, /^NAME .*\nlive .* up .*\n\n1 of 1000 nodes up, 999 not checked in \d\.\d\d s, \/tmp\//);
    assertEquals(table.stderr, "cluster-hosts: Interrupted: 1 of 1000 nodes were checked");
  }
  const json = await interrupted("SIGTERM", ["status", "--json"]);
  assertEquals(json.code, 143);
  assertEquals(JSON.parse(json.stdout).summary, { total: 1000, checked: 1, up: 1, unhealthy: 0, down: 0, unknown: 0 });
  assertEquals((await interrupted("SIGINT", ["urls", "data", "--include-self"])).code, 130);
  assertEquals((await interrupted("SIGTERM", ["status", "--watch"])).code, 143);
  assertMatch(
    (await interrupted("SIGINT", ["wait"])).stderr,
    /\ncluster-hosts: Still missing after .*: dead-\[0-998\] /,
  );
});

Deno.test("main() ends at a signal while it reads stdin", async () => {
  for (const [signal, code] of [["INT", 130], ["TERM", 143]] as const) {
    const line = `sleep 1.5 | { cluster-hosts nodes -c - & sleep 0.5; kill -${signal} $!; wait $!; echo $?; }`;
    // Behind a "&", sh gives /dev/null as stdin: the pipe is handed over.
    const { stdout } = await shell(line.replace("{ ", "{ exec 3<&0; ").replace(" & ", " <&3 & "));
    assertEquals(stdout, `${code}\n`);
  }
});

Deno.test("main() needs each permission, says which in one line with its flag, and never asks", async () => {
  await using node = await startNode("ok", { hostname: "127.0.0.2" });
  const host = { tailscale_ip: "127.0.0.2", data_server_port: node.port, ssh_port: node.port };
  await using inventory = await writeInventory({ a: host }, { elo_sync: { coordinator: "a", sync_port: node.port } });
  // Without a port of its own, a node has the one of the unified config.
  const [plain, unified] = [`${inventory.folder}/plain.yaml`, `${inventory.folder}/unified.yaml`];
  await Deno.writeTextFile(plain, "hosts: { a: { tailscale_ip: 127.0.0.2 } }");
  await Deno.writeTextFile(unified, `distributed: { data_server_port: ${node.port} }`);
  const url = `http://127.0.0.2:${node.port}/config`;

  const read = `--allow-read=${inventory.path}`;
  const net = `--allow-net=127.0.0.2:${node.port}`;
  const cases: [command: string, flags: string[], options?: { config?: string; env?: Record<string, string> }][] = [
    ["status", [read, net]],
    ["status --json", [read, net]],
    ["status --quiet", [read, net]],
    ["nodes", [read]],
    ["nodes", [net], { config: url }],
    ["coordinator", [read]],
    ["urls elo", [read, net]],
    ["urls models --port " + node.port, [read, net]],
    ["urls --path /games --port " + node.port, [read, net]],
    ["urls data", [read, net, "--allow-sys=hostname"]],
    ["wait", [read, net]],
    ["validate", [read]],
    ["export ansible", [read]],
    ["export prometheus", [read]],
    ["export ssh-config", [read]],
    ["permissions status", [read]],
    ["ssh a -- true", [read, "--allow-run=ssh"]],
    ["status", [`--allow-read=${plain}`, `--allow-read=${unified}`, net], {
      config: plain,
      env: { RINGRIFT_CONFIG_PATH: unified },
    }],
    ["status --watch", [read, net]],
  ];
  for (const [command, all, { config = inventory.path, env = {} } = {}] of cases) {
    const given = env.RINGRIFT_CONFIG_PATH ? ["--allow-env=RINGRIFT_CONFIG_PATH"] : [];
    const args = ["--config", config, ...command.split(" ")];
    if (!command.includes("--watch")) {
      const allowed = await runCli(args, { flags: [...given, ...all], env });
      assert(!allowed.stderr.includes("Requires"), `${command}: ${allowed.stderr}`);
    }
    for (const missing of all) {
      const flags = [...given, ...all.filter((flag) => flag !== missing)];
      const before = node.connections;
      const piped = await runCli(args, { flags, env });
      const what = `${command} without ${missing}`;
      assertEquals([piped.code, piped.stdout], [2, ""], what);
      assertMatch(piped.stderr, /^cluster-hosts: Requires (read|net|sys|run) access.*: run again with \S+\n$/, what);
      assert(piped.stderr.endsWith(` ${missing}\n`), `${what}: ${piped.stderr}`);

      // A terminal on all three streams, and Deno free to ask.
      if (!hasScript) continue;
      const line = ["deno run -q", `--config ${ROOT}deno.json`, ...flags, `${ROOT}cli.ts`, ...args].join(" ");
      const asked = await run("sh", ["-c", `exec timeout 10 script -qec '${line}' /dev/null`], { env });
      // Progress was there, and is gone.
      const text = asked.stdout.replaceAll("\r\n", "\n").replace(/\r[^\n]*\x1b\[K|\x1b\[[^m]*[A-Za-z]|^\n/g, "");
      assertEquals(asked.code, 2, what);
      assertStringIncludes(text, piped.stderr, what);
      assertEquals(node.connections, before, what);
    }
  }
});

Deno.test("main() shows the nodes that may be checked, and says which flag lets the others be", async () => {
  await using node = await startNode("ok");
  const at = (address: string) => ({ tailscale_ip: address, data_server_port: node.port });
  await using inventory = await writeInventory({ a: at("127.0.0.1"), b: at("127.0.0.2") });
  const flags = ["--allow-read", `--allow-net=127.0.0.1:${node.port}`];
  const message = `Requires net access: run again with --allow-net=127.0.0.2:${node.port}`;
  const one = await runCli(["status", "-c", inventory.path, "--min-up", "1"], { flags });
  assertEquals([one.code, one.stderr], [0, `cluster-hosts: ${message}\n`]);
  assertMatch(one.stdout, /\nb .* unknown .* denied: /);
  assertEquals((await runCli(["status", "-c", inventory.path], { flags })).code, 2);
  // A wait says the same: the one that may not be checked is not up.
  assertEquals((await runCli(["wait", "-c", inventory.path, "--min-up", "1"], { flags })).code, 0);
  const both = await runCli(["wait", "-c", inventory.path], { flags });
  assertEquals([both.code, both.stderr], [2, `cluster-hosts: ${message}\n`]);

  await using watch = startCli(["status", "--watch", "-c", inventory.path], { flags });
  const lines = [(await watch.stdout.next()).value, (await watch.stdout.next()).value].map((line) => line.slice(25));
  assertEquals(lines.map((line) => line.replace(/denied.*/, "denied")).toSorted(), ["a: up", "b: unknown (denied"]);
  watch.process.kill("SIGTERM");
  assertEquals((await watch.end()).code, 143);
});

Deno.test("main() takes a variable that may not be read as unset, and names it where it would have decided", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: { tailscale_ip: "127.0.0.1", data_server_port: node.port } });
  const read = ["--allow-read"];
  const env = {
    RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml",
    RINGRIFT_CONFIG_PATH: "/nowhere.yaml",
    RINGRIFT_COORDINATOR_IP: "127.0.0.1",
    RINGRIFT_NODE_ID: "a",
  };
  const status = await runCli(["status", "--config", inventory.path], { flags: [...read, "--allow-net"], env });
  assertEquals([status.code, status.stderr], [0, ""]);
  const lets = (name: string) => `${name} (--allow-env=${name} lets it be read)`;
  const noFile = "There is no config/distributed_hosts.yaml here: create it, name another with --config or with " +
    lets("RINGRIFT_HOSTS_CONFIG");
  for (
    const [args, message] of [
      [
        ["coordinator", "--config", inventory.path],
        `No coordinator: "mac-studio" has no address in ${inventory.path}: set elo_sync.coordinator, or set ` +
        lets("RINGRIFT_COORDINATOR_IP"),
      ],
      [["status"], `${noFile}, or set ${lets("RINGRIFT_COORDINATOR_IP")}`],
      [["nodes"], noFile],
    ] as const
  ) {
    const { code, stdout, stderr } = await runCli(args, { flags: read, env, cwd: inventory.folder });
    assertEquals({ code, stdout, stderr }, { code: 2, stdout: "", stderr: `cluster-hosts: ${message}\n` });
  }
});

terminalTest("main() knows a terminal: its width, its colours, its progress", async () => {
  await using silent = await startNode("silent");
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    up: { tailscale_ip: "127.0.0.1", data_server_port: node.port },
    late: { tailscale_ip: "127.0.0.1", data_server_port: silent.port },
    gone: { status: "offline" },
  });
  const command = `cluster-hosts status --config ${inventory.path} --timeout 300ms`;
  const { code, text } = await onTerminal(command, { columns: 80, rows: 24 });
  assertEquals(code, 1);
  assertMatch(text, /^\rchecked \d\/2, 0s\x1b\[K/);
  assertStringIncludes(text, "\r\x1b[K\x1b[1mNAME");
  assertStringIncludes(text, "\x1b[33munhealthy\x1b[0m");
  const lines = text.replace(/\r[^\n]*\x1b\[K|\x1b\[\d+m/g, "").split("\n");
  assert(lines.every((line) => line.length <= 80), text);
  assertMatch(lines[1]!, /^late +127\.0\.0\.1:\d+ +- {2}unhealthy {2}timeout: accepted, but no/);
  const plain = await onTerminal(command, { columns: 200, rows: 24 }, { NO_COLOR: "1" });
  assert(!plain.text.includes("\x1b[3"), plain.text);
  assertMatch(plain.text, / VERSION +GAMES +REASON\n/);
  assert(!(await onTerminal(`${command} --json`, { columns: 80, rows: 24 })).text.includes("\x1b[3"));
  const granted = command.replace("cluster-hosts", CLI.replace("-P=cli", "-P=cli --allow-env=TERM"));
  const dumb = await onTerminal(granted, { columns: 80, rows: 24 }, { TERM: "dumb" });
  assertEquals([dumb.code, dumb.text.includes("\x1b")], [1, false], dumb.text);
});

terminalTest("main() ends a watch on a terminal at Ctrl-C", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: { tailscale_ip: "127.0.0.1", data_server_port: node.port } });
  const inner = `stty rows 10 cols 70; exec ${CLI} status --watch --interval 200ms --config ${inventory.path}`;
  const child = new Deno.Command("sh", {
    args: ["-c", 'exec script -qec "$0" /dev/null', inner],
    env: { TERM: "xterm", NO_COLOR: "" },
    stdin: "piped",
    stdout: "piped",
    stderr: "null",
    signal: AbortSignal.timeout(30_000),
  }).spawn();
  const keyboard = child.stdin.getWriter();
  let screen = "";
  let isPressed = false;
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    screen += text;
    if (isPressed || !/\x1b\[H.* 1 of 1 nodes up[\s\S]* up[\s\S]*\x1b\[J/.test(screen)) continue;
    isPressed = true;
    // What the keys Ctrl and C write: the terminal makes a SIGINT of it.
    await keyboard.write(new Uint8Array([3]));
  }
  await keyboard.close().catch(() => {});
  assertEquals([isPressed, (await child.status).code], [true, 130], screen);
  assert(
    screen.replaceAll("\r", "").endsWith("\x1b[?7h^C\n") || screen.endsWith("\x1b[?7h\r\n"),
    JSON.stringify(screen.slice(-40)),
  );
});

Deno.test("Deno itself would ask for a permission on a terminal", { ignore: !hasScript }, async () => {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  await Deno.writeTextFile(`${folder}/asks.ts`, 'Deno.readTextFileSync("/etc/hosts");');
  const asking = `exec timeout 1 script -qec 'deno run -q --no-config ${folder}/asks.ts' /dev/null`;
  assertStringIncludes((await run("sh", ["-c", asking])).stdout, "read access to");
  await Deno.remove(folder, { recursive: true });
});

Deno.test("validate refuses what is not UTF-8 on stdin", async () => {
  const { code, stdout } = await shell("printf 'hosts: {a: {gpu: h\\351}}' | cluster-hosts validate --config -");
  assertEquals([code, stdout], [2, "stdin: is not UTF-8\n1 problem, stdin\n"]);
});

terminalTest("a login without run permission is one line with its flag, and never a prompt", async () => {
  await using inventory = await writeInventory({ a: { tailscale_ip: "127.0.0.2" } });
  const line = `deno run -q --config ${ROOT}deno.json --allow-read ${ROOT}cli.ts ssh a --config ${inventory.path}`;
  const { code, stdout } = await run("sh", ["-c", `exec timeout 10 script -qec '${line}' /dev/null`]);
  const expected = "cluster-hosts: Requires run access to ssh (on the PATH): run again with --allow-run=ssh\n";
  assertEquals([code, stdout.replaceAll("\r", "")], [2, expected]);
});
