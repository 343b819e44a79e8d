// deno-lint-ignore-file no-control-regex
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt, runOnHosts, runOnYaml } from "./cluster.ts";
import { type LoopbackNode, startNode } from "./loopback_cluster.ts";
import {
  type InventoryFile,
  nextLine,
  programMissing,
  ROOT,
  run,
  runCli,
  type RunOptions,
  startCli,
  tempFolder,
  writeInventory,
} from "./process.ts";
import { runMain } from "./run_main.ts";

const hasScript = programMissing("script") === undefined;

/** Returns the flags that `permissions` prints, all on one line. */
async function permissionsOf(
  args: readonly string[],
  options: RunOptions = {},
): Promise<string[]> {
  const { code, stdout, stderr } = await runCli(
    ["permissions", ...args],
    options,
  );
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^[^\n]*\n$/);
  return stdout.split(/\s+/).filter((flag) => flag !== "");
}

/** Puts `--config` before the remote command. */
function withConfig(args: readonly string[], path: string): string[] {
  const end = args.indexOf("--");
  const at = end < 0 ? args.length : end;
  return args.toSpliced(at, 0, "--config", path);
}

/** Two nodes that are up, at one port of two addresses; nothing listens for ssh. */
interface Pair extends AsyncDisposable {
  readonly inventory: InventoryFile;
  readonly node: LoopbackNode;
  readonly deadPort: number;
}

async function startPair(): Promise<Pair> {
  await using stack = new AsyncDisposableStack();

  const node = stack.use(await startNode("ok", { hostname: "127.0.0.3" }));
  const { port } = node;
  const second = await startNode("ok", { hostname: "127.0.0.2", port });
  stack.use(second);
  const dead = stack.use(await startNode("refuses"));

  const common = { ssh_port: dead.port, ssh_key: "/dev/null" };
  const inventory = stack.use(
    await writeInventory(
      { a: hostAt(node, common), b: hostAt(second, common) },
      { elo_sync: { coordinator: "a", sync_port: port } },
    ),
  );

  const held = stack.move();
  return {
    inventory,
    node,
    deadPort: dead.port,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/**
 * Commands, the flags that `permissions` prints, and the exit code with them.
 * READ, A, B, DEAD stand for flags and endpoints of the pair.
 */
const COMMANDS: readonly (readonly [
  line: string,
  flags: string,
  code: number,
])[] = [
  ["status", "READ --allow-net=A,B", 0],
  ["status --tcp b", "READ --allow-net=B", 0],
  ["status --port DEADPORT a", "READ --allow-net=DEAD", 1],
  ["status --ssh a", "READ --allow-net=DEAD", 1],
  ["status --gather --only up", "READ --allow-net=A,B", 0],
  ["nodes", "READ", 0],
  ["coordinator", "READ", 0],
  ["urls elo", "READ --allow-net=A,B", 0],
  ["urls data --include-self", "READ --allow-net=A,B", 0],
  ["urls models --port PORT", "READ --allow-net=A,B", 0],
  ["urls elo --unchecked", "READ", 0],
  ["wait", "READ --allow-net=A,B", 0],
  ["wait --ssh -t 1s --interval 100ms a", "READ --allow-net=DEAD", 1],
  ["validate", "READ", 0],
  ["export ansible", "READ", 0],
  ["export prometheus", "READ", 0],
  ["export ssh-config", "READ", 0],
  ["ssh * --dry-run -- true", "READ --allow-run=ssh", 0],
  ["ssh * -- true", "READ --allow-run=ssh", 1],
];

for (const [line, printed, code] of COMMANDS) {
  Deno.test(`cluster-hosts ${line} runs with what permissions prints, and not with less`, async () => {
    await using pair = await startPair();
    const { inventory, node: { port }, deadPort } = pair;
    const fill = (text: string) =>
      text.replace("READ", `--allow-read=${inventory.path}`)
        .replace("A,B", `127.0.0.3:${port},127.0.0.2:${port}`)
        .replace("=B", `=127.0.0.2:${port}`)
        .replace("DEADPORT", String(deadPort))
        .replace("DEAD", `127.0.0.3:${deadPort}`)
        .replace("PORT", String(port));
    const args = withConfig(fill(line).split(" "), inventory.path);

    const flags = await permissionsOf(args);
    assertEquals(flags, fill(printed).split(" "));
    const allowed = await runCli(args, { flags });
    assertEquals(allowed.code, code, allowed.stderr);
    assert(!allowed.stderr.includes("Requires"), allowed.stderr);

    // A dry run runs nothing.
    const isDryRun = args.includes("--dry-run");
    const needed = flags.filter((flag) => !isDryRun || !/-run/.test(flag));
    await Promise.all(needed.map(async (missing) => {
      const others = flags.filter((flag) => flag !== missing);
      const refused = await runCli(args, { flags: others });

      assertEquals(refused.code, 2, `without ${missing}`);
      const said = refused.stdout + refused.stderr;
      assertMatch(said, /Requires .*: run again with /);
      assertStringIncludes(said, missing.split(",")[0]!);
    }));
  });
}

Deno.test("cluster-hosts status, wait and urls name the one endpoint that is missing", async () => {
  await using pair = await startPair();
  const { inventory, node: { port } } = pair;
  const read = `--allow-read=${inventory.path}`;
  const flags = [read, `--allow-net=127.0.0.3:${port}`];

  for (const line of ["status", "wait", "urls elo"]) {
    const args = withConfig(line.split(" "), inventory.path);
    const { code, stderr } = await runCli(args, { flags });

    assertEquals(code, 2, line);
    assertStringIncludes(stderr, ` --allow-net=127.0.0.2:${port}\n`);
  }
});

Deno.test("cluster-hosts permissions prints the flags of urls data, which looks for this host", async () => {
  await using pair = await startPair();
  const { inventory, node: { port } } = pair;

  const args = ["urls", "data", "b", "--config", inventory.path];
  const flags = await permissionsOf(args);

  assertEquals(flags, [
    `--allow-read=${inventory.path}`,
    `--allow-net=127.0.0.2:${port}`,
    "--allow-env=RINGRIFT_NODE_ID",
    "--allow-sys=hostname,networkInterfaces",
  ]);
  const { stdout, stderr } = await runCli(args, { flags });
  assertEquals(stdout, `http://127.0.0.2:${port}\n`, stderr);
});

Deno.test("cluster-hosts permissions prints what the environment names", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    a: { tailscale_ip: "127.0.0.1", status: "active" },
  });
  const unified = `${inventory.folder}/unified.yaml`;
  const text = `distributed: { data_server_port: ${node.port} }\n`;
  await Deno.writeTextFile(unified, text);
  const env = {
    RINGRIFT_HOSTS_CONFIG: inventory.path,
    RINGRIFT_CONFIG_PATH: unified,
  };

  const flags = await permissionsOf(["status"], { env });

  assertEquals(flags, [
    `--allow-read=${inventory.path},${unified}`,
    `--allow-net=127.0.0.1:${node.port}`,
    "--allow-env=RINGRIFT_HOSTS_CONFIG,RINGRIFT_CONFIG_PATH",
  ]);
  const { code, stderr } = await runCli(["status"], { env, flags });
  assertEquals(code, 0, stderr);
});

Deno.test("cluster-hosts permissions prints what status needs where RINGRIFT_COORDINATOR_IP stands for an inventory", async () => {
  await using node = await startNode("ok");
  await using temp = await tempFolder();
  const options = {
    cwd: temp.folder,
    env: { RINGRIFT_COORDINATOR_IP: "127.0.0.1" },
  };
  const args = ["status", "--port", String(node.port)];

  const flags = await permissionsOf(args, options);

  assertStringIncludes(flags.join(" "), `--allow-net=127.0.0.1:${node.port}`);
  assertStringIncludes(flags.join(" "), "RINGRIFT_COORDINATOR_IP");
  const { code, stderr } = await runCli(args, { ...options, flags });
  assertEquals(code, 0, stderr);
});

/** What other commands need on these nodes; READ is the flag of the inventory. */
const NEEDS: readonly (readonly [line: string, flags: string])[] = [
  [
    "ssh both -- true",
    "READ --allow-net=127.0.0.2:41022,127.0.0.1:41022,127.0.0.1:22 " +
    "--allow-run=ssh",
  ],
  ["ssh both -o ProxyJump=x -- true", "READ --allow-run=ssh"],
  ["ssh one -- true", "READ --allow-run=ssh"],
  ["status one", "READ --allow-net=[::1]:9443"],
  ["coordinator", "READ --allow-env=RINGRIFT_COORDINATOR_IP"],
  // This host itself is not contacted.
  [
    "urls data",
    "READ --allow-net=127.0.0.9:1 --allow-env=RINGRIFT_NODE_ID " +
    "--allow-sys=hostname,networkInterfaces",
  ],
];

for (const [line, printed] of NEEDS) {
  Deno.test(`cluster-hosts permissions ${line} prints what it needs, and no more`, async () => {
    await using inventory = await writeInventory({
      both: {
        tailscale_ip: "127.0.0.1",
        ssh_host: "127.0.0.2",
        ssh_port: 41_022,
        data_server_port: 1,
      },
      far: hostAt({ port: 1, hostname: "127.0.0.9" }),
      one: {
        tailscale_ip: "127.0.0.3",
        data_server_url: "https://[::1]:9443/x",
        data_server_port: 1,
        status: "retired",
      },
    }, { elo_sync: { coordinator: "gone" } });

    const flags = await permissionsOf(
      withConfig(line.split(" "), inventory.path),
    );

    const read = `--allow-read=${inventory.path}`;
    assertEquals(flags.join(" "), printed.replace("READ", read));
  });
}

Deno.test("cluster-hosts permissions prints the endpoint of an inventory's URL, and nothing for stdin", async () => {
  await using inventory = await writeInventory({ a: hostAt({ port: 1 }) });
  const text = await Deno.readTextFile(inventory.path);
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => new Response(text),
  );
  const host = `127.0.0.1:${server.addr.port}`;

  const url = await permissionsOf(["validate", "-c", `http://${host}/h.yaml`]);
  assertEquals(url, [`--allow-net=${host}`]);
  const file = await permissionsOf(["nodes", "-c", `file://${inventory.path}`]);
  assertEquals(file, [`--allow-read=${inventory.path}`]);
  const stdin = await runOnYaml(text, ["permissions", "nodes"]);
  assertEquals(stdin, { code: 0, stdout: "\n", stderr: "" });
});

Deno.test("cluster-hosts permissions prints the zone of an IPv6 address as Deno takes it", async () => {
  const hosts = { a: { tailscale_ip: "fe80::1%lo", data_server_port: 1 } };

  const { stdout } = await runOnHosts(hosts, ["permissions", "status"]);

  assertEquals(stdout, "--allow-net=[fe80::1]:1\n");
});

Deno.test("cluster-hosts permissions rejects a path that a shell or Deno would interpret", async () => {
  await using temp = await tempFolder("a b");
  const path = `${temp.folder}/hosts.yaml`;
  await Deno.writeTextFile(path, "hosts: { a: { tailscale_ip: 127.0.0.1 } }");

  const args = ["permissions", "nodes", "--config", path];
  const { code, stdout, stderr } = await runMain(args);

  assertEquals([code, stdout], [2, ""]);
  assertMatch(stderr, /^cluster-hosts: .*the shell or Deno would interpret\n$/);
});

Deno.test("cluster-hosts permissions prints --allow-net, with a warning, where a flag would be too long", async () => {
  const names = Array.from({ length: 10_000 }, (_, index) => index);
  const hosts = Object.fromEntries(names.map((index) => {
    const hostname = `127.${index >> 8}.${index & 255}.1`;
    return [`n${index}`, hostAt({ port: 80, hostname })];
  }));

  const result = await runOnHosts(hosts, ["permissions", "status"]);

  assertEquals([result.code, result.stdout], [0, "--allow-net\n"]);
  assertEquals(
    result.stderr,
    "cluster-hosts: 10000 endpoints do not fit into one flag: " +
      "--allow-net permits every host\n",
  );
});

// --- A permission that is missing ---

/** Commands with all that they need; HOST is 127.0.0.2:PORT. */
const NEEDED: readonly (readonly [line: string, flags: string])[] = [
  ["status", "READ NET"],
  ["status --watch", "READ NET"],
  ["nodes --config http://HOST/config", "NET"],
  ["urls data", "READ NET --allow-sys=hostname"],
  ["ssh a -- true", "READ --allow-run=ssh"],
];

for (const [line, needed] of NEEDED) {
  Deno.test(`cluster-hosts ${line} names each missing permission in one line, and never asks`, async () => {
    await using node = await startNode("ok", { hostname: "127.0.0.2" });
    const { port } = node;
    await using inventory = await writeInventory({
      a: hostAt(node, { ssh_port: port }),
    });
    const words = line.replace("HOST", `127.0.0.2:${port}`).split(" ");
    const hasConfig = words.includes("--config");
    const args = hasConfig ? words : withConfig(words, inventory.path);
    const all = needed.replace("READ", `--allow-read=${inventory.path}`)
      .replace("NET", `--allow-net=127.0.0.2:${port}`).split(" ");

    await Promise.all(all.map(async (missing) => {
      const flags = all.filter((flag) => flag !== missing);
      const { code, stdout, stderr } = await runCli(args, { flags });

      assertEquals([code, stdout], [2, ""], missing);
      const said =
        /^cluster-hosts: Requires \w+ access.*: run again with \S+\n$/;
      assertMatch(stderr, said);
      assert(stderr.endsWith(` ${missing}\n`), stderr);
      if (hasScript) await assertNeverAsks(args, { flags, stderr });
    }));
    assertEquals(node.connections, 0);
  });
}

/** Runs it where all three streams are a terminal, and Deno is free to ask. */
async function assertNeverAsks(
  args: readonly string[],
  { flags, stderr }: { flags: readonly string[]; stderr: string },
): Promise<void> {
  const program = ["deno run -q", `--config ${ROOT}deno.json`, ...flags];
  const line = [...program, `${ROOT}cli.ts`, ...args].join(" ");
  const command = `exec timeout 20 script -qec '${line}' /dev/null`;

  const { code, stdout } = await run("sh", ["-c", command]);

  // Progress was there, and is gone.
  const text = stdout.replaceAll("\r\n", "\n")
    .replace(/\r[^\n]*\x1b\[K|\x1b\[[^m]*[A-Za-z]|^\n/g, "");
  assertEquals(code, 2, stdout);
  assertStringIncludes(text, stderr);
}

Deno.test(
  "Deno itself asks for a permission on a terminal, where nobody keeps it from doing so",
  {
    ignore: !hasScript,
  },
  async () => {
    await using temp = await tempFolder();
    const path = `${temp.folder}/asks.ts`;
    await Deno.writeTextFile(path, 'Deno.readTextFileSync("/etc/hosts");');

    const line = `deno run -q --no-config ${path}`;
    const command = `exec timeout 3 script -qec '${line}' /dev/null`;
    const { stdout } = await run("sh", ["-c", command]);

    assertStringIncludes(stdout, "read access to");
  },
);

Deno.test("cluster-hosts validate without read permission says which flag is missing", async () => {
  await using inventory = await writeInventory({ a: hostAt({ port: 1 }) });
  const args = ["validate", "--config", inventory.path];

  const { code, stdout, stderr } = await runCli(args, { flags: [] });

  assertEquals(code, 2);
  const flag = `--allow-read=${inventory.path}`;
  assertStringIncludes(stdout + stderr, `run again with ${flag}\n`);
});

Deno.test("cluster-hosts status shows the nodes that may be checked, and the flag for the others", async () => {
  await using node = await startNode("ok");
  const { port } = node;
  await using inventory = await writeInventory({
    a: hostAt(node),
    b: hostAt({ port, hostname: "127.0.0.2" }),
  });
  const flags = ["--allow-read", `--allow-net=127.0.0.1:${port}`];
  const message = "cluster-hosts: Requires net access: " +
    `run again with --allow-net=127.0.0.2:${port}\n`;

  const args = ["status", "-c", inventory.path];
  const both = await runCli(args, { flags });
  assertEquals(both.code, 2);
  assertStringIncludes(both.stderr, message);
  assertMatch(both.stdout, /^b .* unknown .* denied: /m);

  const one = await runCli([...args, "--min-up", "1"], { flags });
  assertEquals(one.code, 0);
  assertStringIncludes(one.stderr, message);
});

Deno.test("cluster-hosts wait returns 2 at once where too many nodes may not be checked", async () => {
  await using node = await startNode("ok");
  const { port } = node;
  await using inventory = await writeInventory({
    a: hostAt(node),
    b: hostAt({ port, hostname: "127.0.0.2" }),
  });
  const flags = ["--allow-read", `--allow-net=127.0.0.1:${port}`];
  const args = ["wait", "-c", inventory.path, "--timeout", "10m"];

  const both = await runCli(args, { flags });
  assertEquals(both.code, 2);
  assertStringIncludes(both.stderr, `--allow-net=127.0.0.2:${port}\n`);

  const one = await runCli([...args, "--min-up", "1"], { flags });
  assertEquals(one.code, 0, one.stderr);
});

Deno.test("cluster-hosts status --watch prints a node that may not be checked as unknown", async () => {
  await using node = await startNode("ok");
  const { port } = node;
  await using inventory = await writeInventory({
    a: hostAt(node),
    b: hostAt({ port, hostname: "127.0.0.2" }),
  });
  const flags = ["--allow-read", `--allow-net=127.0.0.1:${port}`];
  const args = ["status", "--watch", "-c", inventory.path];

  await using watch = startCli(args, { flags });
  const lines = [await nextLine(watch.stdout), await nextLine(watch.stdout)];
  watch.process.kill("SIGTERM");

  assertEquals((await watch.end()).code, 143);
  const changes = lines.map((line) =>
    line.replace(/^\S+ /, "").replace(/denied.*/, "denied")
  );
  assertEquals(changes.toSorted(), ["a: up", "b: unknown (denied"]);
});

Deno.test("cluster-hosts takes a variable that may not be read as unset", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: hostAt(node) });
  const env = {
    RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml",
    RINGRIFT_CONFIG_PATH: "/nowhere.yaml",
    RINGRIFT_COORDINATOR_IP: "127.0.0.1",
    RINGRIFT_NODE_ID: "a",
  };

  const args = ["status", "--config", inventory.path];
  const flags = ["--allow-read", "--allow-net"];
  const { code, stderr } = await runCli(args, { flags, env });

  assertEquals(code, 0, stderr);
});

/** Commands for which a variable would have decided, with the variables that are named. */
const DECIDING: readonly (readonly [line: string, variables: string[]])[] = [
  ["coordinator -c PATH", ["RINGRIFT_COORDINATOR_IP"]],
  ["status", ["RINGRIFT_HOSTS_CONFIG", "RINGRIFT_COORDINATOR_IP"]],
  ["nodes", ["RINGRIFT_HOSTS_CONFIG"]],
];

for (const [line, variables] of DECIDING) {
  Deno.test(`cluster-hosts ${line} names the flag that lets ${variables.join(" and ")} be read`, async () => {
    await using inventory = await writeInventory({ a: {} });
    const args = line.replace("PATH", inventory.path).split(" ");
    const options = { flags: ["--allow-read"], cwd: inventory.folder };

    const { code, stdout, stderr } = await runCli(args, options);

    assertEquals([code, stdout], [2, ""]);
    for (const variable of variables) {
      assertStringIncludes(stderr, `--allow-env=${variable}`);
    }
  });
}
