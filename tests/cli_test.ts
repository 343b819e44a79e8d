import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { main } from "../cli.ts";
import {
  assertRefused,
  hostAt,
  manyHosts,
  runOnYaml,
  stable,
  startCluster,
} from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { ROOT, runCli, startCli, writeInventory } from "./process.ts";
import { runMain } from "./run_main.ts";

const DEMO = `${ROOT}config/demo_hosts.yaml`;
const COMMANDS = [
  "status",
  "nodes",
  "coordinator",
  "urls",
  "ssh",
  "wait",
  "validate",
  "export",
  "permissions",
];

// --- Help ---

Deno.test("main() returns the exit code", async () => {
  const args = ["nodes", "--config", DEMO, "--role", "coordinator", "-q"];

  assertEquals(await main(["--version"]), 0);
  assertEquals((await runMain(args)).code, 0);
});

for (const line of ["--version", "-V", "version"]) {
  Deno.test(`cluster-hosts ${line} prints the version of deno.json without a permission`, async () => {
    const manifest = await Deno.readTextFile(`${ROOT}deno.json`);
    const { version } = JSON.parse(manifest);

    const { code, stdout, stderr } = await runCli([line], { flags: [] });

    const expected = `cluster-hosts ${version}\n`;
    assertEquals([code, stdout, stderr], [0, expected, ""]);
  });
}

Deno.test("cluster-hosts --help prints every command without a permission", async () => {
  const { code, stdout, stderr } = await runCli(["--help"], { flags: [] });

  assertEquals([code, stderr], [0, ""]);
  for (const command of COMMANDS) {
    assertMatch(stdout, new RegExp(`^  ${command} +\\w`, "m"));
  }
});

Deno.test("cluster-hosts without arguments prints the help to stderr, and returns 2", async () => {
  const { stdout: help } = await runMain(["--help"]);

  assertEquals(await runMain([]), { code: 2, stdout: "", stderr: help });
});

for (const command of COMMANDS) {
  Deno.test(`cluster-hosts ${command} --help prints its usage within 80 columns`, async () => {
    const { code, stdout, stderr } = await runMain([command, "--help"]);

    assertEquals([code, stderr], [0, ""]);
    assertStringIncludes(stdout, `\nUsage: cluster-hosts ${command} `);
    assertStringIncludes(stdout, `\nExamples:\n  cluster-hosts ${command}`);
    const long = stdout.split("\n").filter((line) => line.length > 80);
    assertEquals(long, []);
  });
}

const SAME_HELP = [
  "help ssh",
  "ssh -h",
  "-h ssh",
  "ssh --help --bogus",
  "ssh -qh",
  "ssh --help -- uptime",
];

for (const line of SAME_HELP) {
  Deno.test(`cluster-hosts ${line} prints the help of ssh`, async () => {
    const help = await runMain(["ssh", "--help"]);

    assertEquals(await runMain(line.split(" ")), help);
  });
}

// --- status ---

const MIXED = "head:up gpu-1:up gpu-2:down gpu-3:unhealthy";

/** What `status` is asked, its exit code, and the nodes that it shows. PORT is that of head. */
const CHECKS: readonly (readonly [line: string, code: number, all: string])[] =
  [
    ["", 1, MIXED],
    ["--min-up 2", 0, MIXED],
    ["--min-up 3", 1, MIXED],
    ["--min-up 50%", 0, MIXED],
    // Rounded up: 51% of 4 is 3.
    ["--min-up 51%", 1, MIXED],
    ["--tcp", 1, "head:up gpu-1:up gpu-2:down gpu-3:up"],
    ["--tcp --exclude gpu-2", 0, "head:up gpu-1:up gpu-3:up"],
    ["--port PORT", 0, "head:up gpu-1:up gpu-2:up gpu-3:up"],
    ["--path /models head", 0, "head:up"],
    ["--path /nothing head", 1, "head:unhealthy"],
    ["--role Coordinator", 0, "head:up"],
    ["--exclude gpu-[2-3]", 0, "head:up gpu-1:up"],
    ["--all --min-up 3", 0, `${MIXED} old-1:up`],
    ["old-1", 0, "old-1:up"],
    ["gpu-*", 1, "gpu-1:up gpu-2:down gpu-3:unhealthy"],
    ["gpu-1 h???", 0, "head:up gpu-1:up"],
    ["gpu-1 --concurrency 1", 0, "gpu-1:up"],
    // What is shown changes nothing of it.
    ["--only up", 1, "head:up gpu-1:up"],
    ["--only problems", 1, "gpu-2:down gpu-3:unhealthy"],
    ["--only unknown --min-up 1", 0, ""],
    ["--quiet", 1, MIXED],
  ];

for (const [line, code, all] of CHECKS) {
  Deno.test(`cluster-hosts status --json ${line} returns ${code}`, async () => {
    await using cluster = await startCluster();
    const options = line.replace("PORT", String(cluster.port)).split(" ")
      .filter((word) => word !== "");

    const args = ["status", "--config", cluster.path, "--json", ...options];
    const result = await runMain(args);

    assertEquals([result.code, result.stderr], [code, ""]);
    const { nodes, summary } = JSON.parse(result.stdout);
    const states = nodes.map(
      (node: Record<string, string>) => `${node.name}:${node.state}`,
    );
    assertEquals(states.join(" "), all);
    const { total, up, down, unhealthy, unknown } = summary;
    assertEquals(total, up + down + unhealthy + unknown);
  });
}

Deno.test("cluster-hosts status --ssh is up where ssh greets, whatever the data port says", async () => {
  await using greets = await startNode("ssh-banner");
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  await using inventory = await writeInventory({
    greets: hostAt(dead, { ssh_port: greets.port }),
    refuses: hostAt(greets, { ssh_port: dead.port }),
    silent: hostAt(greets, { ssh_port: silent.port }),
  });

  const args = ["status", "--ssh", "-c", inventory.path, "-t", "500ms"];
  const { code, stdout } = await runMain([...args, "--json"]);

  assertEquals(code, 1);
  const { nodes } = JSON.parse(stdout);
  const seen = nodes.map((node: Record<string, unknown>) => [
    node.name,
    node.state,
    node.port,
  ]);
  assertEquals(seen, [
    ["greets", "up", greets.port],
    ["refuses", "down", dead.port],
    ["silent", "unhealthy", silent.port],
  ]);
});

Deno.test("cluster-hosts status --only problems --names prints names alone on stdout", async () => {
  await using cluster = await startCluster();
  const args = ["status", "--config", cluster.path, "--only", "problems"];

  const { code, stdout, stderr } = await runMain([...args, "--names"]);

  assertEquals([code, stdout], [1, "gpu-2\ngpu-3\n"]);
  assertEquals(
    stable(stderr),
    "cluster-hosts: 2 of 4 nodes up, 1 down (1 refused), " +
      `1 unhealthy (1 http-status) in N s, ${cluster.path}\n`,
  );
});

Deno.test("cluster-hosts status --gather folds the nodes of one outcome into one line", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    head: hostAt(up),
    ...manyHosts(12, hostAt(dead)),
    none: {},
  });

  const args = ["status", "--config", inventory.path, "--gather"];
  const { code, stdout, stderr } = await runMain(args);

  assertEquals(code, 1);
  assertEquals(stdout.replace(/ {2,}/g, "  ").split("\n"), [
    "NODES  STATE  REASON  NAMES",
    "  12  down  refused: nothing listens on the port  gpu-[1-12]",
    "  1  down  no-address: set tailscale_ip or ssh_host  none",
    "  1  up  -  head",
    "",
  ]);
  assertEquals(
    stable(stderr),
    "cluster-hosts: 1 of 14 nodes up, 13 down (12 refused, 1 no-address) " +
      `in N s, ${inventory.path}\n`,
  );
});

Deno.test("cluster-hosts status checks 150 black holes and 50 live nodes in one timeout", async () => {
  await using hole = await startNode("black-hole");
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    ...manyHosts(150, hostAt(hole), "dead"),
    ...manyHosts(50, hostAt(node), "live"),
  });

  const args = ["status", "--config", inventory.path, "--timeout", "1"];
  const started = performance.now();
  const { code, stdout } = await runMain(args);
  const ms = performance.now() - started;

  assertEquals(code, 1);
  const lines = stdout.split("\n");
  const dead = lines.filter((line) =>
    /^dead-\d+ .* down .* timeout: no connection within 1 s$/.test(line)
  );
  const live = lines.filter((line) => /^live-\d+ .* up .* 1\.4\.2 /.test(line));
  assertEquals([dead.length, live.length], [150, 50]);
  // One after the other, they would take 150 s.
  assert(ms < 20_000, `It took ${ms} ms`);
});

/** `--show` in a pipe: the keys, the titles, and what is shown of the answer. */
const SHOWN:
  readonly (readonly [keys: string, titles: string, cells: string])[] = [
    [
      "matches,db_hash,queue.length",
      "MATCHES DB_HASH QUEUE.LENGTH",
      "5017 9f2c 3",
    ],
    ["queue", "QUEUE", '{"length":3,"jobs":[7,8]}'],
    ["queue.jobs", "QUEUE.JOBS", "[7,8]"],
    ["queue.jobs.1", "QUEUE.JOBS.1", "8"],
    ["version", "VERSION", "1.4.2"],
    ["ok", "OK", "false"],
    ["none", "NONE", "-"],
    ["nowhere.at.all", "NOWHERE.AT.ALL", "-"],
    ["matches.length", "MATCHES.LENGTH", "-"],
    ["constructor", "CONSTRUCTOR", "-"],
    ["__proto__", "__PROTO__", "-"],
  ];

const SHOW_ANSWER = {
  version: "1.4.2",
  matches: 5017,
  db_hash: "9f2c",
  ok: false,
  none: null,
  queue: { length: 3, jobs: [7, 8] },
};

for (const [keys, titles, cells] of SHOWN) {
  Deno.test(`cluster-hosts status --show ${keys} prints ${cells}`, async () => {
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      () => Response.json(SHOW_ANSWER),
    );
    await using inventory = await writeInventory({ a: hostAt(server.addr) });

    const args = ["status", "-c", inventory.path, "--show", keys];
    const { code, stdout } = await runMain(args);

    assertEquals(code, 0);
    const [head = "", row = ""] = stdout.replace(/ +/g, " ").split("\n");
    assertStringIncludes(`${head} `, ` STATE ${titles} REASON `);
    assert(!head.includes(" GAMES "), head);
    assertStringIncludes(`${row} `, ` up ${cells} `);
  });
}

Deno.test("cluster-hosts status --show may be repeated, and does not change JSON", async () => {
  await using cluster = await startCluster();
  const args = ["status", "head", "-c", cluster.path];

  const twice = await runMain([...args, "--show", "a", "--show", "version"]);
  const json = await runMain([...args, "--show", "a", "--json"]);

  assertMatch(twice.stdout, / STATE +A +VERSION +REASON\n/);
  const { nodes } = JSON.parse(json.stdout);
  assertEquals(nodes[0].status, { version: "1.4.2", game_count: 12 });
});

Deno.test("cluster-hosts status and wait name the nodes that are up by a shared answer", async () => {
  await using node = await startNode("ok");
  await using other = await startNode("ok", { hostname: "127.0.0.3" });
  await using inventory = await writeInventory({
    "gpu-1": { ssh_host: "127.0.0.1", data_server_port: node.port },
    "gpu-2": { ssh_host: "127.0.0.1", data_server_port: node.port },
    "alone": hostAt(other),
  });
  const note =
    "cluster-hosts: Up, but at an address shared with another node: gpu-[1-2] ";

  for (const command of ["status", "wait"]) {
    const result = await runMain([command, "-c", inventory.path]);
    assertEquals(result.code, 0);
    assertStringIncludes(result.stderr, note);

    const own = await runMain([command, "alone", "-c", inventory.path]);
    assert(!own.stderr.includes("shared"), own.stderr);
  }
});

Deno.test("cluster-hosts reaches a node by its name, whatever of its addresses is permitted", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    "gpu-1": { ssh_host: "ubuntu@localhost", data_server_port: node.port },
  });
  const read = `--allow-read=${inventory.path}`;

  for (const net of ["--allow-net", `--allow-net=localhost:${node.port}`]) {
    const args = ["status", "--config", inventory.path];
    const { code, stdout } = await runCli(args, { flags: [read, net] });

    assertEquals(code, 0, net);
    const row = new RegExp(`^gpu-1 .* localhost:${node.port} .* up `, "m");
    assertMatch(stdout, row);
  }
});

// --- The inventory ---

/** What runs without an inventory, and what does not. */
const WITHOUT_INVENTORY = [
  ["nodes"],
  ["wait"],
  ["urls", "elo"],
  ["export", "ansible"],
  ["permissions", "nodes"],
  ["ssh", "*", "--", "true"],
  // A NODE that is asked for is not the coordinator.
  ["status", "gpu-9"],
  ["status", "--role", "worker"],
];

for (const args of WITHOUT_INVENTORY) {
  Deno.test(`cluster-hosts ${args.join(" ")} without an inventory says which file is missing, and where`, async () => {
    await using empty = await writeInventory({});
    const { folder: cwd } = empty;
    const env = { RINGRIFT_COORDINATOR_IP: "127.0.0.1" };

    const { code, stdout, stderr } = await runCli(args, { env, cwd });

    assertEquals([code, stdout], [2, ""], stderr);
    assertStringIncludes(stderr, "config/distributed_hosts.yaml");
    assertStringIncludes(stderr, await Deno.realPath(cwd));
    assertStringIncludes(stderr, "RINGRIFT_HOSTS_CONFIG");
  });
}

for (const command of ["status", "coordinator"]) {
  Deno.test(`cluster-hosts ${command} without an inventory names RINGRIFT_COORDINATOR_IP`, async () => {
    await using empty = await writeInventory({});

    const result = await runCli([command], { cwd: empty.folder });

    assertEquals([result.code, result.stdout], [2, ""]);
    assertStringIncludes(result.stderr, "config/distributed_hosts.yaml");
    assertStringIncludes(result.stderr, "RINGRIFT_COORDINATOR_IP");
  });
}

Deno.test("cluster-hosts status checks RINGRIFT_COORDINATOR_IP where there is no inventory, and says so", async () => {
  await using node = await startNode("ok");
  await using empty = await writeInventory({});
  const env = { RINGRIFT_COORDINATOR_IP: node.hostname };
  const { folder: cwd } = empty;

  const args = ["status", "--port", String(node.port)];
  const { code, stdout, stderr } = await runCli(args, { env, cwd });

  assertEquals(code, 0, stderr);
  const row = new RegExp(`^\\S+ +coordinator .* 127.0.0.1:${node.port} .* up `);
  assertMatch(stdout.split("\n")[1]!, row);
  assertStringIncludes(
    stderr,
    "there is no inventory, so this is RINGRIFT_COORDINATOR_IP alone",
  );

  const json = await runCli([...args, "--json"], { env, cwd });
  assertEquals(JSON.parse(json.stdout).config, null);
});

Deno.test("cluster-hosts status --watch watches RINGRIFT_COORDINATOR_IP where there is no inventory", async () => {
  await using node = await startNode("ok");
  await using empty = await writeInventory({});
  const env = { RINGRIFT_COORDINATOR_IP: node.hostname };
  const args = ["status", "--watch", "--port", String(node.port)];

  await using watch = startCli(args, { env, cwd: empty.folder });

  const { value } = await watch.stdout.next();
  assertMatch(value, / \S+: up$/);
  watch.process.kill("SIGINT");
  assertEquals((await watch.end()).code, 130);
});

Deno.test("cluster-hosts status --watch --json names the inventory as soon as there is one", async () => {
  await using node = await startNode("ok");
  await using empty = await writeInventory({ a: hostAt(node) });
  const env = { RINGRIFT_COORDINATOR_IP: node.hostname };
  const words = ["--watch", "--json", "--interval", "100ms"];
  const args = ["status", ...words, "--port", String(node.port)];

  await using watch = startCli(args, { env, cwd: empty.folder });
  const before = JSON.parse((await watch.stdout.next()).value);
  await Deno.mkdir(`${empty.folder}/config`);
  await Deno.rename(
    empty.path,
    `${empty.folder}/config/distributed_hosts.yaml`,
  );
  const after = JSON.parse((await watch.stdout.next()).value);

  assertEquals(before.config, null);
  assertEquals(after.config, "config/distributed_hosts.yaml");
});

for (
  const [address, printed] of [["127.0.0.1", "127.0.0.1:8766"], [
    "::1",
    "[::1]:8766",
  ]] as const
) {
  Deno.test(`cluster-hosts coordinator without an inventory prints ${printed}`, async () => {
    await using empty = await writeInventory({});
    const env = { RINGRIFT_COORDINATOR_IP: address };

    const result = await runCli(["coordinator"], { env, cwd: empty.folder });

    assertEquals([result.code, result.stdout], [0, `${printed}\n`]);
  });
}

Deno.test("cluster-hosts status rejects a RINGRIFT_COORDINATOR_IP that is an option of ssh", async () => {
  await using empty = await writeInventory({});
  const env = { RINGRIFT_COORDINATOR_IP: "-oProxyCommand=x" };

  const { code, stderr } = await runCli(["status"], { env, cwd: empty.folder });

  assertEquals(code, 2);
  assertMatch(stderr, /RINGRIFT_COORDINATOR_IP: expected a host name .*"-"\n$/);
});

const EMPTY_LINES = [
  "status",
  "nodes",
  "wait",
  "urls elo",
  "export ansible",
  "ssh * -- true",
];

for (const line of EMPTY_LINES) {
  Deno.test(`cluster-hosts ${line} rejects an inventory without hosts`, async () => {
    const result = await runOnYaml("elo_sync: {}", line.split(" "));

    assertRefused(result, 'No hosts in stdin: add them under "hosts"');
  });
}

const YAML = "hosts:\n  gpu-1: { tailscale_ip: 127.0.0.1 }\n";

/** Serves an inventory, and what may be in its place. */
function serveInventory() {
  const never = Promise.withResolvers<Response>();
  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };

  const server = Deno.serve(options, ({ url }) => {
    switch (new URL(url).pathname) {
      case "/hosts.yaml":
        return new Response(YAML);
      case "/login":
        return new Response("<!DOCTYPE html><title>Log in</title>", {
          headers: { "content-type": "text/html" },
        });
      case "/moved":
        return Response.redirect(new URL("/hosts.yaml", url));
      case "/never":
        return never.promise;
      default:
        return new Response("not found", { status: 404 });
    }
  });

  return {
    host: `127.0.0.1:${server.addr.port}`,
    [Symbol.asyncDispose]: async () => {
      never.resolve(new Response());
      await server.shutdown();
    },
  };
}

Deno.test("cluster-hosts nodes --json names the inventory: a path, a file URL, stdin, a URL", async () => {
  await using server = serveInventory();
  await using inventory = await writeInventory({});
  await Deno.writeTextFile(inventory.path, YAML);
  const url = `http://${server.host}/hosts.yaml`;

  const sources = [
    [inventory.path, inventory.path],
    [`file://${inventory.path}`, `file://${inventory.path}`],
    ["-", "-"],
    [url, url],
  ] as const;
  for (const [source, config] of sources) {
    const args = ["nodes", "--json", "--config", source];
    const { stdout } = await runMain(args, { stdin: YAML });
    const document = JSON.parse(stdout);

    assertEquals([document.config, document.nodes[0].name], [config, "gpu-1"]);
  }
});

Deno.test("cluster-hosts reads the inventory that RINGRIFT_HOSTS_CONFIG names, and --config before it", async () => {
  await using server = serveInventory();
  await using inventory = await writeInventory({});
  await Deno.writeTextFile(inventory.path, YAML);

  for (const named of [inventory.path, `http://${server.host}/hosts.yaml`]) {
    const env = { RINGRIFT_HOSTS_CONFIG: named };
    const { stdout } = await runCli(["nodes", "--json"], { env });
    assertEquals(JSON.parse(stdout).config, named);
  }

  const env = { RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml" };
  const own = await runCli(["nodes", "-c", inventory.path], { env });
  assertEquals(own.code, 0);

  const missing = await runCli(["nodes"], { env });
  assertEquals([missing.code, missing.stdout], [2, ""]);
  assertStringIncludes(missing.stderr, "/nowhere.yaml: there is no such file");
  assertStringIncludes(missing.stderr, "RINGRIFT_HOSTS_CONFIG");
});

/** Inventories that cannot be read; HOST is that of the server, FOLDER a folder. */
const UNREADABLE: readonly (readonly [origin: string, message: RegExp])[] = [
  ["http://HOST/other", /^answered HTTP 404$/],
  ["http://HOST/login", /^is HTML, not YAML$/],
  ["http://HOST/moved", /redirect.*: use the URL/],
  ["http://[", /^is not a valid URL/],
  ["FOLDER/other.yaml", /^there is no such file$/],
  ["FOLDER", /^is a folder, not a file$/],
];

for (const [origin, message] of UNREADABLE) {
  Deno.test(`cluster-hosts nodes says why it cannot read ${origin}`, async () => {
    await using server = serveInventory();
    await using inventory = await writeInventory({});
    const config = origin.replace("HOST", server.host)
      .replace("FOLDER", inventory.folder);

    const { code, stdout, stderr } = await runMain(["nodes", "-c", config]);

    const start = `cluster-hosts: ${config}: `;
    assertEquals([code, stdout], [2, ""]);
    assertEquals(stderr.slice(0, start.length), start);
    assertMatch(stderr.slice(start.length, -1), message);
  });
}

Deno.test("cluster-hosts status --timeout is the deadline of an inventory's URL, too", async () => {
  await using server = serveInventory();
  const url = `http://${server.host}/never`;

  const args = ["status", "--config", url, "--timeout", "300ms"];
  assertRefused(await runMain(args), `${url}: did not answer within 300 ms`);
});

Deno.test("cluster-hosts nodes prints every problem of an inventory with its line", async () => {
  const yaml = "hosts:\n  a: { ssh_port: 0 }\n  b: 7\n";

  const { code, stdout, stderr } = await runOnYaml(yaml, ["nodes"]);

  assertEquals([code, stdout], [2, ""]);
  const [first = "", second = ""] = stderr.split("\n");
  assertMatch(first, /^cluster-hosts: stdin:2: hosts\.a\.ssh_port: ./);
  assertMatch(second, /^cluster-hosts: stdin:3: hosts\.b: ./);
});

Deno.test("cluster-hosts rejects an inventory that would be a text without end", async () => {
  const loop = "hosts:\n" +
    "  a: { tailscale_ip: 127.0.0.1, deep: &deep { again: *deep } }\n";
  const anchors = Array.from({ length: 30 }, (_, index) => {
    const item = index > 0 ? `*k${index - 1}` : "1";
    return `  k${index}: &k${index} [${item}, ${item}]`;
  });
  const bomb = `anchors:\n${anchors.join("\n")}\n` +
    "hosts:\n  a: { tailscale_ip: 127.0.0.1, deep: *k29 }\n";

  for (const yaml of [loop, bomb]) {
    for (const line of ["export ansible", "nodes --json", "status"]) {
      const result = await runOnYaml(yaml, line.split(" "));

      assertEquals([result.code, result.stdout], [2, ""]);
      assertMatch(result.stderr, /^cluster-hosts: stdin: .*\n$/);
    }
  }
});

// --- nodes, coordinator ---

Deno.test("cluster-hosts nodes lists the active nodes, and says how many others there are", async () => {
  const args = ["nodes", "--config", DEMO, "gpu-[1-2]", "coordinator"];

  const { code, stdout, stderr } = await runMain(args);

  assertEquals(code, 0);
  assertEquals(stable(stdout).split("\n"), [
    "NAME  ROLE  STATUS  GPU  MEMORY  CPUS  ADDRESSES  DATA  SSH  NOTE",
    "coordinator  coordinator  active  -  64 GB  12  127.0.0.1  18760  ubuntu:22",
    "gpu-1  worker  active  H100  96 GB  72  127.0.0.1, localhost  18761  ubuntu:22",
    "gpu-2  worker  ready  GH200  -  -  ::1, 127.0.0.1  18762  root:22",
    "",
  ]);
  const summary = `3 of 9 nodes (--all: 1 inactive), ${DEMO}`;
  assertEquals(stderr, `cluster-hosts: ${summary}\n`);
});

Deno.test("cluster-hosts nodes --all prints the others, and the first line of their notes", async () => {
  const yaml = "hosts:\n  a: { ssh_host: h }\n" +
    "  b: { ssh_host: h, status: offline, note: the fan is broken }\n";

  const { stdout, stderr } = await runOnYaml(yaml, ["nodes", "--all"]);

  assertEquals(stable(stdout).split("\n").slice(1), [
    "a  unknown  unknown  -  -  -  h  8766  ubuntu:22",
    "b  unknown  offline  -  -  -  h  8766  ubuntu:22  the fan is broken",
    "",
  ]);
  assertEquals(stderr, "cluster-hosts: 2 of 2 nodes, stdin\n");
});

Deno.test("cluster-hosts nodes lists every host of a real inventory in its order", async () => {
  const path = `${ROOT}tests/fixtures/real_inventory.yaml`;

  const result = await runMain(["nodes", "--all", "-c", path]);

  const last = `cluster-hosts: 42 of 42 nodes, ${path}\n`;
  assertEquals([result.code, result.stderr], [0, last]);
  assertEquals(result.stdout.trimEnd().split("\n").length, 43);
});

Deno.test("cluster-hosts coordinator prints HOST:PORT, an IPv6 address in brackets", async () => {
  await using inventory = await writeInventory(
    { head: { tailscale_ip: "fd7a::9" } },
    { elo_sync: { coordinator: "head", sync_port: 9000 } },
  );

  const args = ["coordinator", "--config", inventory.path];

  const stdout = "[fd7a::9]:9000\n";
  assertEquals(await runMain(args), { code: 0, stdout, stderr: "" });
});

/** Inventories without a coordinator, with what is said of it. */
const NO_COORDINATOR: readonly (readonly [
  name: string,
  yaml: string,
  message: RegExp,
])[] = [
  [
    "elo_sync is missing",
    "hosts: { a: { ssh_host: h } }",
    /^No coordinator: elo_sync\.coordinator is not set in stdin: set it to /,
  ],
  [
    "elo_sync.coordinator is missing",
    "hosts: { a: { ssh_host: h } }\nelo_sync: { sync_port: 9000 }",
    /^No coordinator: elo_sync\.coordinator is not set in stdin: set it to /,
  ],
  [
    "the coordinator is not in hosts",
    "hosts: { a: { ssh_host: h } }\nelo_sync: { coordinator: gone }",
    /^No coordinator: elo_sync\.coordinator is "gone", which is not in hosts /,
  ],
  [
    "the coordinator has no address",
    "hosts: { head: {} }\nelo_sync: { coordinator: head }",
    /^No coordinator: "head" has no address in stdin: set its tailscale_ip /,
  ],
];

for (const [name, yaml, message] of NO_COORDINATOR) {
  Deno.test(`cluster-hosts coordinator says that ${name}, and how to mend it`, async () => {
    const { code, stdout, stderr } = await runOnYaml(yaml, ["coordinator"]);

    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr.replace("cluster-hosts: ", ""), message);
    assertStringIncludes(stderr, "RINGRIFT_COORDINATOR_IP");
    assert(!stderr.includes("mac-studio"), stderr);
  });
}

// --- urls ---

/** What `urls` is asked, the URLs (HEAD and on stand for their bases), and the summary. */
const URLS:
  readonly (readonly [line: string, urls: string, summary: string])[] = [
    [
      "data --include-self",
      "HEAD GPU1",
      "2 of 4 nodes answered (1 refused, 1 http-status; STATUS shows which)",
    ],
    ["data --include-self gpu-1", "GPU1", "1 of 1 nodes answered"],
    [
      "data --include-self --unchecked gpu-[1-2]",
      "GPU1 GPU2",
      "2 URLs, not checked",
    ],
    // All are at one address, so that they share their one URL.
    ["elo", "HEAD/db", "4 of 4 nodes answered"],
    ["elo --path /elo.db gpu-2", "HEAD/elo.db", "1 of 1 nodes answered"],
    [
      "elo --unchecked --port 9000",
      "http://127.0.0.2:9000/db",
      "1 URL, not checked",
    ],
    ["models --port PORT", "HEAD/models", "4 of 4 nodes answered"],
    [
      "models --unchecked",
      "http://127.0.0.2:8765/models",
      "1 URL, not checked",
    ],
    ["--port PORT", "HEAD/db", "4 of 4 nodes answered"],
    ["--port PORT --path /games gpu-1", "HEAD/games", "1 of 1 nodes answered"],
    [
      "--path /games --unchecked",
      "http://127.0.0.2:8766/games",
      "1 URL, not checked",
    ],
  ];

for (const [line, urls, summary] of URLS) {
  Deno.test(`cluster-hosts urls ${line} prints ${urls}`, async () => {
    await using cluster = await startCluster();
    const { hosts, path, port } = cluster;
    const base = (name: keyof typeof hosts) =>
      `http://127.0.0.2:${hosts[name].data_server_port}`;

    const words = line.replace("PORT", String(port)).split(" ");
    const result = await runMain(["urls", ...words, "--config", path]);

    const stdout = urls.replace("HEAD", base("head"))
      .replace("GPU1", base("gpu-1")).replace("GPU2", base("gpu-2"))
      .replaceAll(" ", "\n");
    const said = summary.replace("STATUS", `cluster-hosts status -c ${path}`);
    const stderr = `cluster-hosts: ${said}, ${path}\n`;
    assertEquals(result, { code: 0, stdout: `${stdout}\n`, stderr });
  });
}

Deno.test("cluster-hosts urls returns 1 without a URL, and names the line that shows why", async () => {
  await using cluster = await startCluster();
  const args = ["urls", "models", "gpu-1", "--config", cluster.path];

  const none = await runMain(args);

  const line = `cluster-hosts status gpu-1 -c ${cluster.path} --port 8765`;
  const stderr = "cluster-hosts: 0 of 1 nodes answered " +
    `(1 refused; ${line} shows which), ${cluster.path}\n`;
  assertEquals(none, { code: 1, stdout: "", stderr });

  const [, ...advised] = line.split(" ");
  assertEquals((await runMain(advised)).code, 1);
});

Deno.test("cluster-hosts urls counts one URL, and none", async () => {
  const homeless = "hosts: { gpu-1: {} }";
  const args = ["urls", "elo", "--unchecked"];

  const stderr = "cluster-hosts: 0 URLs, not checked, stdin\n";
  assertEquals(await runOnYaml(homeless, args), {
    code: 1,
    stdout: "",
    stderr,
  });
});

Deno.test("cluster-hosts urls data leaves this host out, and says so", async () => {
  await using node = await startNode("ok");
  const { port } = node;
  await using there = await startNode("ok", { hostname: "127.0.0.3", port });
  await using inventory = await writeInventory({
    here: hostAt(node),
    there: hostAt(there),
  });
  const args = ["urls", "data", "-c", inventory.path];

  const { code, stdout, stderr } = await runMain(args);
  assertEquals([code, stdout], [0, `http://127.0.0.3:${port}\n`]);
  assertEquals(
    stderr,
    "cluster-hosts: 1 of 1 nodes answered, " +
      `1 skipped as this host (--include-self), ${inventory.path}\n`,
  );

  const env = { RINGRIFT_NODE_ID: "There" };
  const named = await runCli(args, { env });
  assertEquals([named.code, named.stdout], [1, ""]);
  assertStringIncludes(named.stderr, "2 skipped as this host");
});
