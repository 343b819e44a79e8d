import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ROOT, run, runCli, type RunOptions, send, startNode, writeInventory } from "./loopback_cluster.ts";
import { startCli } from "./sshd.ts";

/** A colour, a window title, the same from C1, a way back over the line, and bidirectional controls. */
const CONTROLS = "\x1b[31m\x1b]0;owned\x07\x9b2J\x9d0;t\x9c\r\u202e\u2066\u200f\u061c\x00\x7f";
/** What an inventory may hold of it, which refuses the other ones. */
const BIDI = "\u202ereversed\u202c\u2066\u200e";

function assertHarmless(text: string, what: string) {
  // deno-lint-ignore no-control-regex
  const found = /[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/.exec(text);
  if (found) throw new Error(`${what}: ${JSON.stringify(text.slice(Math.max(0, found.index - 60), found.index + 9))}`);
}

/** Runs a shell command in which `cluster-hosts` is cli.ts. */
function shell(command: string, options: Pick<RunOptions, "env"> = {}) {
  const cli = `deno run -q --no-prompt --config ${ROOT}deno.json -P=cli ${ROOT}cli.ts`;
  return run("sh", ["-c", command.replaceAll("cluster-hosts", cli)], options);
}

Deno.test("what a node answers never steers the terminal", async () => {
  await using chatty = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => Response.json({ version: CONTROLS, game_count: CONTROLS, [CONTROLS]: [CONTROLS] }),
  );
  await using redirect = await startNode((conn) => send(conn, `HTTP/1.1 302 Found\r\nLocation: ${CONTROLS}\r\n\r\n`));
  await using banner = await startNode((conn) => send(conn, `SSH-2.0-${CONTROLS}\r\n\r\n`));
  await using statusLine = await startNode((conn) => send(conn, `HTTP/1.1 500 ${CONTROLS}\r\n${CONTROLS}\r\n\r\n`));
  const host = (port: number) => ({ tailscale_ip: "127.0.0.1", data_server_port: port });
  await using inventory = await writeInventory({
    chatty: host(chatty.addr.port),
    redirect: host(redirect.port),
    banner: host(banner.port),
    "status-line": host(statusLine.port),
  });
  for (
    const args of [
      ["status"],
      ["status", "--json"],
      ["wait", "--timeout", "0.1"],
      ["wait", "--timeout", "0.1", "--json"],
      ["urls", "data", "--include-self"],
    ]
  ) {
    const { stdout, stderr } = await runCli([...args, "--config", inventory.path]);
    assertHarmless(stdout + stderr, args.join(" "));
    assertStringIncludes(stdout, args[0] === "urls" ? "http://" : "chatty");
    if (args[0] !== "status") continue;
    assertStringIncludes(stdout, args[1] ? String.raw`"version":"\u001b[31m` : String.raw`\u{1b}[31m`);
    assertStringIncludes(stdout, "redirect");
    if (args[1]) {
      const { nodes } = JSON.parse(stdout);
      assertEquals(nodes[0].status, { version: CONTROLS, game_count: CONTROLS, [CONTROLS]: [CONTROLS] });
      assertEquals(nodes[2].failure.code, "bad-response");
      assertEquals(nodes[3].failure.code, "http-status");
    }
  }
});

Deno.test("what an inventory holds never steers the terminal", async () => {
  await using node = await startNode("ok");
  const name = `gpu-${BIDI}`;
  await using inventory = await writeInventory(
    {
      [name]: {
        tailscale_ip: "127.0.0.1",
        data_server_port: node.port,
        role: BIDI,
        gpu: BIDI,
        status: BIDI,
        // Keys of the user's own may hold anything.
        note: CONTROLS,
      },
      [`dead-${BIDI}`]: {},
    },
    { elo_sync: { coordinator: BIDI } },
  );
  const commands = [
    ["status"],
    ["status", "--json"],
    ["nodes"],
    ["nodes", "--json"],
    ["urls", "data", "--include-self"],
    ["wait", "--timeout", "0.1"],
    ["wait", "--timeout", "0.1", "--json"],
    ["coordinator"],
    ["validate"],
    ["validate", "--json"],
    ["export", "ansible"],
    ["export", "prometheus"],
    ["export", "ssh-config"],
    ["status", "gpu"],
    ["status", `gpu-${CONTROLS.replace("\x00", "")}`],
    ["permissions", "status"],
  ];
  const faults: string[] = [];
  for (const args of commands) {
    const { stdout, stderr } = await runCli([...args, "--config", inventory.path]);
    assert(stdout + stderr !== "", args.join(" "));
    try {
      assertHarmless(stdout + stderr, args.join(" "));
    } catch (error) {
      faults.push((error as Error).message);
    }
    if (args.includes("--json") || args[1] === "ansible" || args[1] === "prometheus") JSON.parse(stdout);
  }
  assertEquals(faults, []);

  const { nodes } = JSON.parse((await runCli(["nodes", "--json", "--config", inventory.path])).stdout);
  assertEquals([nodes[0].name, nodes[0].gpu, nodes[0].role], [name, BIDI, BIDI]);
  const ansible = JSON.parse((await runCli(["export", "ansible", "--config", inventory.path])).stdout);
  assertEquals(ansible._meta.hostvars[name].note, CONTROLS);
});

Deno.test("error texts never steer the terminal", async () => {
  const text = CONTROLS.replace("\x00", "");
  const yaml = JSON.stringify({
    hosts: {
      [`name${CONTROLS}`]: {},
      a: { ssh_port: CONTROLS, tailscale_ip: CONTROLS, status: CONTROLS, data_server_url: `http://${CONTROLS}` },
    },
  });
  const typo = JSON.stringify({ hosts: { a: { ["tailscale_ip\u202e"]: "x", ["ssh_user\x1b"]: "x" } } });
  const cases: [args: string[], options?: RunOptions][] = [
    [["nodes", "--config", "-"], { stdin: yaml }],
    [["validate", "--config", "-"], { stdin: yaml }],
    [["validate", "--config", "-", "--json"], { stdin: yaml }],
    [["validate", "--config", "-"], { stdin: typo }],
    [["nodes", "--config", "-"], { stdin: `hosts: "${text}\n` }],
    [["nodes", "--config", "-"], { stdin: `hosts: !<${text}> x\n` }],
    [["nodes", "--config", `/tmp/${text}`]],
    [["nodes", "--config", `http://127.0.0.1:1/${text}`]],
    [["nodes"], { env: { RINGRIFT_HOSTS_CONFIG: `/tmp/x${text}x` } }],
    [["coordinator"], { env: { RINGRIFT_COORDINATOR_IP: `x${text}x` }, cwd: "/tmp" }],
    [[text]],
    [["status", `--${text}`]],
    [["status", "--timeout", text]],
    [["export", text]],
    [["urls", text]],
    [["urls", "elo", "--path", text]],
  ];
  for (const [args, options] of cases) {
    const { stdout, stderr } = await runCli(args, options);
    assert(stdout + stderr !== "", JSON.stringify(args));
    assertHarmless(stdout + stderr, JSON.stringify([args, options]));
  }
});

Deno.test("a reader that closes the pipe early ends it silently", async () => {
  const hosts = Array.from({ length: 3000 }, (_, index) => [`gpu-${index}`, { tailscale_ip: "127.0.0.1" }]);
  await using inventory = await writeInventory(Object.fromEntries(hosts));
  for (const command of ["nodes", "nodes --json", "urls data --unchecked --include-self", "export ansible"]) {
    const line = `{ cluster-hosts ${command} --config ${inventory.path}; echo ended $? >&2; } | head -c 1`;
    const { stdout, stderr } = await shell(line);
    assertEquals([stdout.length, stderr], [1, "ended 0\n"], command);
  }
});

Deno.test("a full stdout is an error", async () => {
  await using node = await startNode("ok");
  const hosts = { head: { tailscale_ip: "127.0.0.1", data_server_port: node.port } };
  await using inventory = await writeInventory(hosts, { elo_sync: { coordinator: "head" } });
  const commands = ["status", "nodes", "nodes --json", "coordinator", "urls data --include-self", "wait", "validate"];
  for (const command of [...commands, "export prometheus", "permissions status"]) {
    const { code, stderr } = await shell(`cluster-hosts ${command} --config ${inventory.path} > /dev/full`);
    const message = "cluster-hosts: Cannot write the output: No space left on device (os error 28)\n";
    assertEquals([code, stderr], [2, message], command);
  }
  for (const command of ["--help", "--version", "status --help"]) {
    assertEquals((await shell(`cluster-hosts ${command} > /dev/full`)).code, 2, command);
  }
  // Not even the error can be written.
  assertEquals((await shell("cluster-hosts stauts 2> /dev/full")).code, 2);
});

Deno.test("a signal in the middle of a sweep of 1,000 black holes ends it within 0.5 s, with what is known", async () => {
  await using hole = await startNode("black-hole");
  await using node = await startNode("ok");
  const dead = Array.from({ length: 999 }, (_, index) => [`dead-${index}`, {
    tailscale_ip: "127.0.0.1",
    data_server_port: hole.port,
  }]);
  const live = { tailscale_ip: "127.0.0.1", data_server_port: node.port };
  await using inventory = await writeInventory({ live, ...Object.fromEntries(dead) });
  const args = ["--config", inventory.path, "--timeout", "30"];
  const interrupted = async (signal: Deno.Signal, command: string[]) => {
    await using cli = startCli([...command, ...args]);
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
    assertMatch(table.stdout, /^NAME .*\nlive .* up .*\n\n1 of 1000 nodes up, 999 not checked \(\d+\.\d\d s\)$/);
    assertEquals(table.stderr, "cluster-hosts: Interrupted: 1 of 1000 nodes were checked");
  }
  const json = await interrupted("SIGTERM", ["status", "--json"]);
  assertEquals(json.code, 143);
  assertEquals(JSON.parse(json.stdout).summary, { total: 1000, checked: 1, up: 1, unhealthy: 0, down: 0, unknown: 0 });
  assertEquals((await interrupted("SIGINT", ["urls", "data", "--include-self"])).code, 130);
});

Deno.test("each permission that is taken away is one line with its flag, and never a prompt", async () => {
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
    ["ssh -- true", [read, "--allow-run=ssh"]],
    ["status", [`--allow-read=${plain}`, `--allow-read=${unified}`, net], {
      config: plain,
      env: { RINGRIFT_CONFIG_PATH: unified },
    }],
    ["status --watch", [read, net]],
  ];
  for (const [command, all, { config = inventory.path, env = {} } = {}] of cases) {
    const given = env.RINGRIFT_CONFIG_PATH ? ["--allow-env=RINGRIFT_CONFIG_PATH"] : [];
    const [name, ...rest] = command.split(" ");
    const args = [name!, ...(name === "permissions" ? [...rest, "--config", config] : ["--config", config, ...rest])];
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
      const line = ["deno run -q", `--config ${ROOT}deno.json`, ...flags, `${ROOT}cli.ts`, ...args].join(" ");
      const asked = await run("sh", ["-c", `exec timeout 10 script -qec '${line}' /dev/null`], { env });
      assertEquals([asked.code, asked.stdout.replaceAll("\r", "")], [2, piped.stderr], what);
      assertEquals(node.connections, before, what);
    }
  }

  // Deno itself would ask there.
  const script = `${inventory.folder}/asks.ts`;
  await Deno.writeTextFile(script, 'Deno.readTextFileSync("/etc/hosts");');
  const asking = `exec timeout 2 script -qec 'deno run -q --no-config ${script}' /dev/null`;
  assertStringIncludes((await run("sh", ["-c", asking])).stdout, "read access to");
});

Deno.test("a variable that may not be read is unset, and is named where it would have decided", async () => {
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
        `No coordinator: "mac-studio" has no address in ${inventory.path}; set elo_sync.coordinator or ` +
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
