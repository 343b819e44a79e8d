import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { main } from "../cli.ts";
import { type Behaviour, startNode } from "./loopback_cluster.ts";
import { type MainOptions, type MainResult, runMain } from "./run_main.ts";
import { ROOT, runCli, startCli, writeInventory } from "./process.ts";

const DEMO = `${ROOT}config/demo_hosts.yaml`;
const COMMANDS = ["status", "nodes", "coordinator", "urls", "ssh", "wait", "validate", "export", "permissions"];

function assertRefused({ code, stdout, stderr }: MainResult, message: string, args: readonly string[] = []): void {
  assertEquals(
    { code, stdout, stderr },
    { code: 2, stdout: "", stderr: `cluster-hosts: ${message}\n` },
    args.join(" "),
  );
}

/** Nodes of several kinds at ports of their own, and their inventory. */
async function startCluster() {
  await using stack = new AsyncDisposableStack();
  const host = async (behaviour: Behaviour, fields: Record<string, unknown>) => {
    const { hostname, port } = stack.use(await startNode(behaviour, { hostname: "127.0.0.2" }));
    return { tailscale_ip: hostname, data_server_port: port, status: "active", role: "worker", ...fields };
  };
  const hosts = {
    head: await host("ok", { role: "coordinator" }),
    "gpu-1": await host("ok", { gpu: "H100", rack: 7 }),
    "gpu-2": await host("refuses", { gpu: "A100", rack: 8 }),
    "gpu-3": await host("http-500", { gpu: "A100", rack: 8 }),
    "old-1": await host("ok", { gpu: "V100", status: "retired" }),
  };
  const { path } = stack.use(
    await writeInventory(hosts, { elo_sync: { coordinator: "head", sync_port: hosts.head.data_server_port } }),
  );
  const held = stack.move();
  return { hosts, path, port: hosts.head.data_server_port, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

/** What it writes of an inventory on stdin. */
async function ofYaml(yaml: string, args: readonly string[], options: MainOptions = {}) {
  return await runMain([...args, "--config", "-"], { ...options, stdin: yaml });
}

/** Leaves out times, and blanks that only align. */
function stable(text: string): string {
  return text.replace(/\d+\.\d\d s/g, "N s").replace(/ \d+\.\d ms/g, "  N ms").replace(/ {2,}/g, "  ");
}

Deno.test("main() gives the exit code", async () => {
  assertEquals(await main(["--version"]), 0);
  assertEquals((await runMain(["nodes", "--config", DEMO, "--role", "coordinator", "--quiet"])).code, 0);
});

Deno.test("main() shows help and version without any permission", async () => {
  const { version } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
  const bare = async (...args: string[]) => {
    const { code, stdout, stderr } = await runCli(args, { flags: [] });
    return { code, stdout, stderr };
  };
  assertEquals(await bare("--version"), { code: 0, stdout: `cluster-hosts ${version}\n`, stderr: "" });
  assertEquals(await bare("--help"), await runMain(["--help"]));
  assertEquals(await bare("ssh", "-h"), await runMain(["help", "ssh"]));
});

Deno.test("main() has a help of 40 lines and 80 columns, and one for each command", async () => {
  const help = await runMain(["--help"]);
  assertEquals([help.code, help.stderr], [0, ""]);
  assert(help.stdout.split("\n").length <= 40, help.stdout);
  for (const command of COMMANDS) assertMatch(help.stdout, new RegExp(`^  ${command} +\\w`, "m"));
  for (const same of ["-h", "help"]) assertEquals(await runMain([same]), help);
  assertEquals(await runMain([]), { ...help, code: 2 });
  for (const same of ["-V", "--version", "version"]) {
    assertMatch((await runMain([same])).stdout, /^cluster-hosts [\d.]+\n$/);
  }

  const texts = [help.stdout];
  for (const command of COMMANDS) {
    const { code, stdout, stderr } = await runMain([command, "--help"]);
    assertEquals([code, stderr], [0, ""], command);
    assertStringIncludes(stdout, `\nUsage: cluster-hosts ${command} `);
    assertEquals(stdout.split("\nExamples:\n")[1]?.trimEnd().split("\n").length, 2, command);
    for (const same of [["help", command], ["-h", command], [command, "-h", "--bogus"]]) {
      assertEquals((await runMain(same)).stdout, stdout, same.join(" "));
    }
    texts.push(stdout);
  }
  assertEquals(texts.flatMap((text) => text.split("\n")).filter((line) => line.length > 80), []);
});

Deno.test("main() says the default of each option", async () => {
  const texts = await Promise.all(COMMANDS.map(async (command) => (await runMain([command, "--help"])).stdout));
  const options = texts.flatMap((text) => text.match(/^ {2}(-\w, )?--[\s\S]*?(?=\n {2}-|\n\n)/gm) ?? []);
  const without = options.filter((option) => !option.includes("(default:")).map((option) =>
    /--[\w-]+/.exec(option)![0]
  );
  // These speak of no value that could be another one.
  assertEquals(new Set(without), new Set(["--help", "--list", "--only"]));
  assertStringIncludes(texts[0]!, "--timeout TIME      deadline of each node (default: 5s)");
  assertStringIncludes(texts[0]!, "--interval TIME         with --watch, between checks (default: 5s)");
  assertStringIncludes(texts[4]!, "--timeout TIME      deadline of each command (default: 1m)");
  assertStringIncludes(texts[5]!, "--timeout TIME      for all of it (default: 5m)");
});

Deno.test("main() reads options in any order and form", async () => {
  await using cluster = await startCluster();
  const { path } = cluster;
  const names = async (...args: string[]) => {
    const { code, stdout, stderr } = await runMain(args);
    assert(code < 2, `${args}: ${stderr}`);
    return stdout.trimEnd().split("\n").join(" ");
  };
  for (
    const [args, expected] of [
      [["--config", path, "nodes", "--names"], "head gpu-1 gpu-2 gpu-3"],
      [["-c", path, "--role", "coordinator", "nodes", "--names"], "head"],
      [["nodes", `-c${path}`, "--names", "--role=worker"], "gpu-1 gpu-2 gpu-3"],
      [["nodes", `-c=${path}`, "--names", "gpu-1,head"], "head gpu-1"],
      [["nodes", `--config=${path}`, "--names", "gpu-[1-8/2]"], "gpu-1 gpu-3"],
      [["nodes", "-c", path, "--names", "--exclude", "gpu-[1,3],head"], "gpu-2"],
      [["nodes", "-c", path, "--names", "--exclude", "gpu-1", "--exclude", "head"], "gpu-2 gpu-3"],
      [["nodes", "-c", path, "--names", "--role", "Coordinator,nobody"], "head"],
      [["nodes", "-c", path, "--names", "--gpu", "h1,a1"], "gpu-1 gpu-2 gpu-3"],
      [["nodes", "-c", path, "--names", "--where", "rack=8"], "gpu-2 gpu-3"],
      [
        ["nodes", "-c", path, "--names", "--where", "rack=7", "--where", "rack=8", "--where", "gpu=A100"],
        "gpu-2 gpu-3",
      ],
      [["nodes", "-c", path, "--names", "--all"], "head gpu-1 gpu-2 gpu-3 old-1"],
      [["nodes", "-c", path, "--names", "--status", "retired", "--all"], "old-1"],
      [["nodes", "-c", path, "--names", "old-1"], "old-1"],
      [["status", "-c", path, "--names", "-t5s", "-q", "--only", "problems"], "gpu-2 gpu-3"],
      [["status", "-c", path, "--names", "-q", "-t", "2m", "--only", "down,up"], "head gpu-1 gpu-2"],
      [["status", "-c", path, "--names", "-q", "-t", "1500ms", "--only", "unhealthy"], "gpu-3"],
    ] as const
  ) {
    assertEquals(await names(...args), expected, args.join(" "));
  }
  // What stands behind "--" is the command, whatever it looks like.
  const dry = await runMain(["ssh", "-c", path, "gpu-1", "--dry-run", "--", "ls", "--json", "-q"]);
  assertMatch(dry.stdout, / -- ubuntu@127\.0\.0\.2 ls --json -q\n$/);
});

/** Lines that a hurried person types, each with the answer. */
const HURRIED: readonly (readonly [line: string, answer: string])[] = [
  ["stauts", 'Unknown command "stauts"; did you mean "status"?'],
  ["Status", 'Unknown command "Status"; did you mean "status"?'],
  ["frobnicate", 'Unknown command "frobnicate"; see cluster-hosts --help'],
  ["__proto__", 'Unknown command "__proto__"; see cluster-hosts --help'],
  ["list", 'Unknown command "list": write nodes'],
  ["ping gpu-1", 'Unknown command "ping": write status'],
  ["run gpu-1 uptime", 'Unknown command "run": write ssh'],
  ["gpu-1 status", "The command comes first: cluster-hosts status gpu-1"],
  ["help stauts", 'Unknown command "stauts"; did you mean "status"?'],
  ["--json", "There is no command; see cluster-hosts --help"],
  ["--verbose status", 'Unknown option "--verbose": REASON says why; --json says everything'],
  ["status --jsno", 'Unknown option "--jsno"; did you mean "--json"?'],
  ["status --JSON", 'Unknown option "--JSON"; did you mean "--json"?'],
  ["status --frob", 'Unknown option "--frob"; see cluster-hosts status --help'],
  ["nodes --watch", "nodes does not take --watch; see cluster-hosts nodes --help"],
  ["status -o json", 'Unknown option "-o": write --json'],
  ["status -x gpu-1", 'Unknown option "-x": write --exclude NODE'],
  ["status -w gpu-1", `Unknown option "-w": name the nodes without an option, as in 'gpu-[1-8]'`],
  ["status -p 80", 'Unknown option "-p": write --port PORT'],
  ["status -i hosts.yaml", 'Unknown option "-i": write --config PATH'],
  ["status --filter rack=7", 'Unknown option "--filter": write --where KEY=VALUE'],
  ["status --sort name", 'Unknown option "--sort": status lists problems first; --only problems shows them alone'],
  [
    "status --retries 3",
    'Unknown option "--retries": TCP repeats lost packets itself; a longer --timeout gives it time',
  ],
  ["status --watch 5", "--watch takes no value: write --watch --interval 5"],
  ["permissions --fold status", 'Unknown option "--fold": it is gone; past 100 KB, permissions prints --allow-net'],
  [
    "export ansible --host gpu-1",
    'Unknown option "--host": it is gone; export ansible has the variables of every host under _meta',
  ],
  ["status --quiet=no", "--quiet takes no value: write --quiet, or leave it out"],
  ["status --json=0", "--json takes no value: write --json, or leave it out"],
  ["status --timeout -1", '--timeout takes seconds, or 500ms, 5s, 2m, not "-1"'],
  ["status -t0", '--timeout takes seconds, or 500ms, 5s, 2m, not "0"'],
  ["status --timeout soon", '--timeout takes seconds, or 500ms, 5s, 2m, not "soon"'],
  ["status --timeout 99d", '--timeout takes seconds, or 500ms, 5s, 2m, not "99d"'],
  ["status --timeout", "--timeout needs a value: TIME"],
  ["status --role --json", "--role needs a value: ROLE"],
  ["status --config=", "--config needs a value: PATH|URL|-"],
  ["status --port 0", '--port takes a whole number from 1 to 65535, not "0"'],
  ["status --port 80.5", '--port takes a whole number from 1 to 65535, not "80.5"'],
  ["status --port 65536", '--port takes a whole number from 1 to 65535, not "65536"'],
  ["status --concurrency 1e3", '--concurrency takes a whole number from 1 to 1000000, not "1e3"'],
  ["status --min-up 0", '--min-up takes a number from 1, or 1% to 100%, not "0"'],
  ["status --min-up 101%", '--min-up takes a number from 1, or 1% to 100%, not "101%"'],
  ["status --min-up 9", "--min-up 9, but only 8 nodes are selected"],
  ["status --only donw", '--only takes up, unhealthy, down, unknown or problems, not "donw"'],
  ["status --where rack", '--where takes KEY=VALUE, not "rack"'],
  ["status --interval 5", "--interval goes with --watch"],
  ["status --json --gather", "--json and --gather exclude each other"],
  ["status --watch --names", "--names and --watch exclude each other"],
  ["status -- uptime", 'status takes no command behind "--"'],
  ["status gpu-x", 'No node matches "gpu-x" (did you mean "gpu-1"?)'],
  ["status GPU-1", 'No node matches "GPU-1" (did you mean "gpu-1"?)'],
  ["nodes tpu-* gpu-[8-9]", 'No node matches "tpu-*", "gpu-[8-9]"'],
  ["status --exclude tpu", 'No node matches "tpu"'],
  ["coordinator gpu-1", "coordinator takes no NODE, got gpu-1; a file is given as --config FILE"],
  ["validate new.yaml", "validate takes no NODE, got new.yaml; a file is given as --config FILE"],
  ["urls", "urls needs one of: elo, data, models"],
  ["urls modles", 'Unknown kind "modles"; did you mean "models"?'],
  [
    "urls data --port 80",
    "urls data takes each node's own port and URL: leave out data, or --port and --path",
  ],
  ["export", "export needs one of: ansible, prometheus, ssh-config"],
  ["export promtheus", 'Unknown kind "promtheus"; did you mean "prometheus"?'],
  ["export prometheus --list", "--list is for export ansible"],
  ["export ssh-config --port 22", "--port and --path are for export prometheus"],
  ["permissions", "permissions needs a command: cluster-hosts permissions status"],
  ["permissions statsu", 'Unknown command "statsu"; did you mean "status"?'],
  ["permissions nodes --watch", "nodes does not take --watch; see cluster-hosts nodes --help"],
  [
    "ssh gpu-1 uptime",
    'A login takes one NODE, not 2; put the command after "--": cluster-hosts ssh gpu-1 -- uptime',
  ],
  ["ssh -- uptime", "ssh needs a NODE, or --role, --gpu, --status or --where; '*' is every active node"],
  [
    "ssh --exclude gpu-1 -- uptime",
    "ssh needs a NODE, or --role, --gpu, --status or --where; '*' is every active node",
  ],
  ["ssh gpu-1 --", 'There is no command; put the command after "--": cluster-hosts ssh gpu-1 -- uptime'],
  ["ssh gpu-1 -- bash", '"bash" alone runs nothing: add --stdin, and give it the script on stdin'],
  ["ssh gpu-1 -- sudo sh -s", '"sudo sh -s" alone runs nothing: add --stdin, and give it the script on stdin'],
  ["ssh gpu-1 -- /bin/sh -es x", '"/bin/sh -es x" alone runs nothing: add --stdin, and give it the script on stdin'],
  ["ssh gpu-[1-2]", 'A login takes one node, not 2; put the command after "--": cluster-hosts ssh gpu-1 -- uptime'],
  [
    "ssh gpu-1 --gather",
    '--gather goes with a command; put the command after "--": cluster-hosts ssh gpu-1 -- uptime',
  ],
  ["ssh gpu-1 --json --dry-run -- ls", "--json and --dry-run exclude each other"],
];

Deno.test("main() answers each line that a hurried person types with what to type", async () => {
  for (const [line, answer] of HURRIED) {
    assertRefused(await runMain(["-c", DEMO, ...line.split(" ")]), answer, [line]);
  }
  assertRefused(await runMain(["ssh", "", "-c", DEMO, "--", "uptime"]), "A NODE is empty: did a $(...) print nothing?");
  assertRefused(
    await runMain(["status", "--jsno", "--timeout", "x", "-c", DEMO]),
    [
      'Unknown option "--jsno"; did you mean "--json"?',
      'cluster-hosts: --timeout takes seconds, or 500ms, 5s, 2m, not "x"',
    ].join("\n"),
  );
});

Deno.test("main() runs a shell that has a script", async () => {
  for (const command of [["sh", "-c", "uptime"], ["bash", "-lc", "uptime"], ["sh", "x.sh"], ["ash"], ["shutdown"]]) {
    const { code, stderr } = await runMain(["ssh", "gpu-1", "-c", DEMO, "--dry-run", "--", ...command]);
    assertEquals([code, stderr], [0, ""], command.join(" "));
  }
});

Deno.test("main() says which filter left no node, and what there is to choose from", async () => {
  const head = `No node is selected in ${DEMO}`;
  for (
    const [args, message] of [
      [["--gpu", "B200"], "--gpu B200 leaves none of 9; gpu is one of H100, GH200, A100, RTX 5090, V100"],
      [["gpu-*", "--role", "coordinator"], "--role coordinator leaves none of 7; role is worker"],
      [["--status", "broken"], "--status broken leaves none of 9; status is one of active, ready, retired"],
      [["--where", "rack=7"], "--where rack=7 leaves none of 9; no node sets rack"],
      [["--role", "worker", "--where", "cpus=1"], "--where cpus=1 leaves none of 8; cpus is 72"],
      [["gpu-1", "--exclude", "gpu-1"], "--exclude gpu-1 leaves none of 1"],
      [["--gpu", "V100"], "none of 1 is active; status is retired; --all adds them"],
    ] as const
  ) {
    for (const command of ["status", "nodes", "wait"]) {
      assertRefused(await runMain([command, "-c", DEMO, ...args]), `${head}: ${message}`, args);
    }
  }
  const many = Object.fromEntries(Array.from({ length: 20 }, (_, index) => [`n${index}`, { gpu: `G${index}` }]));
  const { stderr } = await ofYaml(JSON.stringify({ hosts: many }), ["nodes", "--gpu", "X"]);
  assertMatch(stderr, /; gpu is one of G0, .*, G11, …\n$/);
});

Deno.test("main() checks what is selected, and its exit code says whether that is up", async () => {
  await using cluster = await startCluster();
  const all = "head:up gpu-1:up gpu-2:down gpu-3:unhealthy";
  const cases: [args: string[], code: number, states: string][] = [
    [[], 1, all],
    [["--min-up", "2"], 0, all],
    [["--min-up", "3"], 1, all],
    [["--min-up", "50%"], 0, all],
    // Rounded up: 51 % of 4 is 3.
    [["--min-up", "51%"], 1, all],
    [["--tcp"], 1, "head:up gpu-1:up gpu-2:down gpu-3:up"],
    [["--tcp", "--exclude", "gpu-2"], 0, "head:up gpu-1:up gpu-3:up"],
    [["--port", `${cluster.port}`], 0, "head:up gpu-1:up gpu-2:up gpu-3:up"],
    [["--path", "/models", "head"], 0, "head:up"],
    [["--path", "/nothing", "head"], 1, "head:unhealthy"],
    [["--role", "Coordinator"], 0, "head:up"],
    [["--exclude", "gpu-[2-3]"], 0, "head:up gpu-1:up"],
    [["--all", "--min-up", "3"], 0, `${all} old-1:up`],
    [["old-1"], 0, "old-1:up"],
    [["gpu-*"], 1, "gpu-1:up gpu-2:down gpu-3:unhealthy"],
    [["gpu-1", "h???"], 0, "head:up gpu-1:up"],
    [["gpu-1", "--concurrency", "1"], 0, "gpu-1:up"],
    // What is shown changes nothing of it.
    [["--only", "up"], 1, "head:up gpu-1:up"],
    [["--only", "problems"], 1, "gpu-2:down gpu-3:unhealthy"],
    [["--only", "unknown", "--min-up", "1"], 0, ""],
    [["--quiet"], 1, all],
  ];
  for (const [args, code, states] of cases) {
    const result = await runMain(["status", "--config", cluster.path, "--json", ...args]);
    assertEquals([result.code, result.stderr], [code, ""], args.join(" "));
    const { nodes, summary } = JSON.parse(result.stdout);
    assertEquals(
      nodes.map((node: Record<string, string>) => `${node.name}:${node.state}`).join(" "),
      states,
      `${args}`,
    );
    assertEquals(summary.total, summary.up + summary.down + summary.unhealthy + summary.unknown);
  }
  const quiet = await runMain(["status", "--config", cluster.path, "--quiet"]);
  assertEquals(quiet, { code: 1, stdout: "", stderr: "" });
  const names = await runMain(["status", "--config", cluster.path, "--only", "problems", "--names"]);
  assertEquals([names.code, names.stdout], [1, "gpu-2\ngpu-3\n"]);
  assertEquals(
    stable(names.stderr),
    `cluster-hosts: 2 of 4 nodes up, 1 down (1 refused), 1 unhealthy (1 http-status) in N s, ${cluster.path}\n`,
  );
});

Deno.test("main() gives JSON with the same keys for every node, one a line", async () => {
  await using cluster = await startCluster();
  const { stdout } = await runMain(["status", "--config", cluster.path, "--json"]);
  const { schemaVersion, config, checkedAt, summary, nodes } = JSON.parse(stdout);
  assertEquals([schemaVersion, config], [1, cluster.path]);
  assert(Math.abs(Date.now() - Date.parse(checkedAt)) < 60_000);
  assertEquals(summary, { total: 4, checked: 4, up: 2, unhealthy: 1, down: 1, unknown: 0 });
  const { connectMs, responseMs, ...head } = nodes[0];
  assert(connectMs > 0 && responseMs >= connectMs);
  assertMatch(String(responseMs), /^\d+(\.\d{1,2})?$/);
  const { tailscale_ip: address, data_server_port: port } = cluster.hosts.head;
  const status = { version: "1.4.2", game_count: 12 };
  assertEquals(head, { name: "head", role: "coordinator", gpu: "", state: "up", address, port, status, failure: null });
  assertEquals(nodes[2], {
    name: "gpu-2",
    role: "worker",
    gpu: "A100",
    state: "down",
    address: null,
    port: cluster.hosts["gpu-2"].data_server_port,
    connectMs: null,
    responseMs: null,
    status: null,
    failure: { code: "refused", message: "nothing listens on the port" },
  });
  for (const node of nodes) assertEquals(Object.keys(node), Object.keys(nodes[0]));
  assertEquals(stdout.split("\n").filter((line) => line.startsWith('{"name":')).length, nodes.length);
});

Deno.test("main() folds the nodes of one outcome into one line", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const at = ({ port }: { port: number }) => ({ tailscale_ip: "127.0.0.1", data_server_port: port });
  const dozen = Object.fromEntries(Array.from({ length: 12 }, (_, index) => [`gpu-${index}`, at(dead)]));
  await using inventory = await writeInventory({ head: at(up), ...dozen, none: {} });
  const { code, stdout } = await runMain(["status", "--config", inventory.path, "--gather"]);
  assertEquals(code, 1);
  assertEquals(
    stable(stdout).split("\n"),
    [
      "NODES  STATE  REASON  NAMES",
      "  12  down  refused: nothing listens on the port  gpu-[0-11]".trim().replace(/^/, "  "),
      "  1  down  no-address: set tailscale_ip or ssh_host  none",
      "  1  up  -  head",
      "",
      `1 of 14 nodes up, 13 down (12 refused, 1 no-address) in N s, ${inventory.path}`,
      "",
    ].map((line) => line.replace(/^ {3}/, "  ")),
  );
});

Deno.test("main() checks 200 nodes of which 150 are black holes in one timeout", async () => {
  await using hole = await startNode("black-hole");
  await using node = await startNode("ok");
  const dead = Array.from({ length: 150 }, (_, index) => [`dead-${index}`, {
    tailscale_ip: "127.0.0.1",
    data_server_port: hole.port,
  }]);
  const live = Array.from({ length: 50 }, (_, index) => [`live-${index}`, {
    tailscale_ip: `127.0.0.${index + 1}`,
    ssh_host: node.hostname,
    data_server_port: node.port,
  }]);
  await using inventory = await writeInventory(Object.fromEntries([...dead, ...live]));
  const { code, stdout, stderr } = await runMain(["status", "--config", inventory.path, "--timeout", "1"]);
  assertEquals([code, stderr], [1, ""]);
  const lines = stdout.split("\n");
  assertEquals(
    lines.filter((line) => /^dead-\d+ .* down .* timeout: no connection within 1 s$/.test(line)).length,
    150,
  );
  assertEquals(lines.filter((line) => /^live-\d+ .* up .* 1\.4\.2 +12$/.test(line)).length, 50);
  const [, seconds] = /^50 of 200 nodes up, 150 down \(150 timeout\) in (\d\.\d\d) s, /.exec(lines.at(-2)!) ?? [];
  assert(Number(seconds) >= 1 && Number(seconds) < 1.9, lines.at(-2));
});

Deno.test("main() checks the address that RINGRIFT_COORDINATOR_IP names if there is no inventory", async () => {
  await using node = await startNode("ok");
  await using empty = await writeInventory({}, { elo_sync: { coordinator: "head", sync_port: node.port } });
  const env = { RINGRIFT_COORDINATOR_IP: node.hostname };
  const { folder: cwd } = empty;
  const configured = await runCli(["status", "--config", empty.path], { env });
  assertEquals([configured.code, configured.stderr], [0, ""]);
  assertMatch(configured.stdout, new RegExp(`^head +coordinator +- +127.0.0.1:${node.port} .* up `, "m"));
  const missing = await runCli(["status", "--port", `${node.port}`], { env, cwd });
  assertMatch(missing.stdout, new RegExp(`^mac-studio +coordinator +- +127.0.0.1:${node.port} .* up `, "m"));
  assertStringIncludes(missing.stdout, ", config/distributed_hosts.yaml\n");
  await using watch = startCli(["status", "--watch", "--config", empty.path], { env });
  assertMatch((await watch.stdout.next()).value, / head: up$/);
  watch.process.kill("SIGINT");
  assertEquals(await watch.end(), { code: 130, stdout: [], stderr: [] });
  assertEquals((await runCli(["coordinator"], { env, cwd })).stdout, "127.0.0.1:8766\n");
  const v6 = await runCli(["coordinator"], { env: { RINGRIFT_COORDINATOR_IP: "::1" }, cwd });
  assertEquals(v6.stdout, "[::1]:8766\n");

  const noFile = "There is no config/distributed_hosts.yaml here: create it, name another with --config or with " +
    "RINGRIFT_HOSTS_CONFIG";
  const noHosts = `No hosts in ${empty.path}: add them under "hosts"`;
  for (const args of [["status"], ["coordinator"]]) {
    assertRefused(await runCli(args, { cwd }), `${noFile}, or set RINGRIFT_COORDINATOR_IP`);
  }
  assertRefused(await runCli(["status", "--config", empty.path]), `${noHosts}, or set RINGRIFT_COORDINATOR_IP`);
  // A NODE that is asked for is not the coordinator.
  assertRefused(await runCli(["status", "gpu-9"], { env, cwd }), noFile);
  for (const args of [["nodes"], ["wait"], ["urls", "elo"], ["export", "ansible"], ["ssh", "a", "--", "true"]]) {
    const separator = args.indexOf("--");
    const at = separator < 0 ? args.length : separator;
    assertRefused(await runCli(args, { cwd, env }), noFile, args);
    assertRefused(await runCli(args.toSpliced(at, 0, "--config", empty.path)), noHosts, args);
  }
  assertRefused(
    await runCli(["coordinator", "--config", empty.path]),
    `No coordinator: "head" has no address in ${empty.path}: set elo_sync.coordinator, or set RINGRIFT_COORDINATOR_IP`,
  );
  assertRefused(
    await runCli(["status"], { cwd, env: { RINGRIFT_COORDINATOR_IP: "-oProxyCommand=x" } }),
    'environment: RINGRIFT_COORDINATOR_IP: expected a host name or an address, got one that begins with "-"',
  );
});

Deno.test("main() takes a path, stdin or a URL as --config, and says which it was", async () => {
  const yaml = "hosts:\n  gpu-1: { tailscale_ip: 127.0.0.1 }\n";
  await using inventory = await writeInventory({});
  await Deno.writeTextFile(inventory.path, yaml);
  const never = Promise.withResolvers<Response>();
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
    switch (new URL(url).pathname) {
      case "/hosts.yaml":
        return new Response(yaml);
      case "/login":
        return new Response("<!DOCTYPE html><title>Log in</title>", { headers: { "content-type": "text/html" } });
      case "/moved":
        return Response.redirect(new URL("/hosts.yaml", url));
      case "/never":
        return never.promise;
      default:
        return new Response("not found", { status: 404 });
    }
  });
  const url = (path: string) => `http://127.0.0.1:${server.addr.port}${path}`;
  for (
    const [args, config] of [
      [["--config", inventory.path], inventory.path],
      [[`--config=file://${inventory.path}`], `file://${inventory.path}`],
      [["--config", "-"], "-"],
      [["-c-"], "-"],
      [["-c", url("/hosts.yaml")], url("/hosts.yaml")],
    ] as const
  ) {
    const json = JSON.parse((await runMain(["nodes", "--json", ...args], { stdin: yaml })).stdout);
    assertEquals([json.config, json.nodes[0].name], [config, "gpu-1"], args.join(" "));
  }
  assertStringIncludes((await runMain(["nodes", "-c", "-"], { stdin: yaml })).stdout, "\n1 of 1 nodes, stdin\n");
  for (const variable of [inventory.path, url("/hosts.yaml")]) {
    const { stdout } = await runCli(["nodes", "--json"], { env: { RINGRIFT_HOSTS_CONFIG: variable } });
    assertEquals(JSON.parse(stdout).config, variable);
  }
  const own = await runCli(["nodes", "-c", inventory.path], { env: { RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml" } });
  assertEquals(own.code, 0);

  const faults: [origin: string, message: RegExp][] = [
    [url("/other"), /^answered HTTP 404$/],
    [url("/login"), /^is HTML or XML, not YAML$/],
    [url("/moved"), /redirect.*: use the URL/],
    ["http://[", /^is not a URL$/],
    [`${inventory.folder}/other.yaml`, /^there is no such file$/],
    [inventory.folder, /^is a folder, not a file$/],
  ];
  for (const [origin, message] of faults) {
    const { code, stdout, stderr } = await runMain(["nodes", "--config", origin]);
    assertEquals([code, stdout, stderr.slice(0, origin.length + 17)], [2, "", `cluster-hosts: ${origin}: `]);
    assertMatch(stderr.slice(origin.length + 17, -1), message);
  }
  const named = await runCli(["nodes"], { env: { RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml" } });
  assertRefused(named, "/nowhere.yaml: there is no such file (RINGRIFT_HOSTS_CONFIG names it)");
  const broken = await ofYaml("hosts:\n  a: { ssh_port: 0 }\n  b: null\n", ["nodes"]);
  assertEquals([broken.code, broken.stdout], [2, ""]);
  assertMatch(
    broken.stderr,
    /^cluster-hosts: stdin:2: hosts\.a\.ssh_port: .*\ncluster-hosts: stdin:3: hosts\.b: .*\n$/,
  );

  const late = await runMain(["status", "--config", url("/never"), "--timeout", "300ms"]);
  never.resolve(new Response());
  assertRefused(late, `${url("/never")}: did not answer within 300 ms`);
});

Deno.test("main() lists what is configured: the active nodes, with --all the others and why", async () => {
  const { code, stdout, stderr } = await runMain(["nodes", "--config", DEMO, "gpu-[1-2]", "coordinator"]);
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  assertEquals(stable(stdout).split("\n"), [
    "NAME  ROLE  STATUS  GPU  MEMORY  CPUS  ADDRESSES  DATA  SSH  REASON",
    "coordinator  coordinator  active  -  64 GB  12  127.0.0.1  18760  ubuntu:22",
    "gpu-1  worker  active  H100  96 GB  72  127.0.0.1, localhost  18761  ubuntu:22",
    "gpu-2  worker  ready  GH200  -  -  ::1, 127.0.0.1  18762  root:22",
    "",
    `3 of 9 nodes (--all: 1 inactive), ${DEMO}`,
    "",
  ]);
  assertEquals((await runMain(["nodes", "--config", DEMO, "gpu-1", "--quiet"])).stdout.split("\n").length, 3);
  const yaml = "hosts:\n  a: { ssh_host: h }\n  b: { ssh_host: h, status: offline, reason: the fan is broken }\n";
  assertEquals(stable((await ofYaml(yaml, ["nodes", "--all"])).stdout).split("\n").slice(1), [
    "a  unknown  unknown  -  -  -  h  8766  ubuntu:22",
    "b  unknown  offline  -  -  -  h  8766  ubuntu:22  the fan is broken",
    "",
    "2 of 2 nodes, stdin",
    "",
  ]);
  const real = await runMain(["nodes", "--all", "--config", `${ROOT}tests/fixtures/real_inventory.yaml`]);
  assertStringIncludes(real.stdout, "\n42 of 42 nodes, ");
});

Deno.test("main() keeps the user's own keys in JSON, and names the known ones as the library does", async () => {
  await using inventory = await writeInventory({
    a: { data_server_url: "https://a.example.com/data" },
    b: { tailscale_ip: "fd7a::1", ssh_host: "root@192.0.2.1", rack: [7, "b"], is_spare: true, ssh_user: "ops" },
  });
  const { stdout } = await runMain(["nodes", "--config", inventory.path, "--json"]);
  const { schemaVersion, config, nodes } = JSON.parse(stdout);
  assertEquals([schemaVersion, config, nodes[0].addresses], [1, inventory.path, []]);
  assertEquals(nodes[1], {
    name: "b",
    tailscaleIp: "fd7a::1",
    sshHost: "root@192.0.2.1",
    sshUser: "ops",
    sshKey: null,
    sshPort: 22,
    ringriftPath: "~/ringrift/ai-service",
    status: "unknown",
    reason: null,
    role: "unknown",
    memoryGb: 0,
    cpus: 0,
    gpu: "",
    dataServerPort: 8766,
    dataServerUrl: null,
    statusPath: "/status",
    bestIp: "fd7a::1",
    addresses: ["fd7a::1", "192.0.2.1"],
    dataServerBaseUrl: "http://[fd7a::1]:8766",
    isActive: true,
    rack: [7, "b"],
    is_spare: true,
  });
});

Deno.test("main() prints HOST:PORT of the coordinator", async () => {
  await using inventory = await writeInventory(
    { head: { tailscale_ip: "fd7a::9" } },
    { elo_sync: { coordinator: "head", sync_port: 9000 } },
  );
  const args = ["coordinator", "--config", inventory.path];
  assertEquals((await runMain(args)).stdout, "[fd7a::9]:9000\n");
  const { stdout } = await runMain([...args, "--json"]);
  assertEquals(JSON.parse(stdout), { schemaVersion: 1, config: inventory.path, hostname: "fd7a::9", port: 9000 });
});

Deno.test("main() gives the URLs of what answers, and says how many that is", async () => {
  await using cluster = await startCluster();
  const base = (name: keyof typeof cluster.hosts) => `http://127.0.0.2:${cluster.hosts[name].data_server_port}`;
  const [head, gpu1, gpu2] = [base("head"), base("gpu-1"), base("gpu-2")];
  const { path, port } = cluster;
  const all = ["data", "--include-self"];
  const reasons = "(1 refused, 1 http-status; cluster-hosts status shows which)";
  const cases: [args: string[], urls: string[], summary: string][] = [
    [all, [head, gpu1], `2 of 4 nodes answered ${reasons}`],
    [[...all, "gpu-1"], [gpu1], "1 of 1 nodes answered"],
    [[...all, "--unchecked", "gpu-[1-2]"], [gpu1, gpu2], "2 URLs, not checked"],
    // All are at one address, so that they share their one URL.
    [["elo"], [`${head}/db`], "4 of 4 nodes answered"],
    [["elo", "--path", "/elo.db", "gpu-2"], [`${head}/elo.db`], "1 of 1 nodes answered"],
    [["elo", "--unchecked", "--port", "9000"], ["http://127.0.0.2:9000/db"], "1 URLs, not checked"],
    [["models", "--port", `${port}`], [`${head}/models`], "4 of 4 nodes answered"],
    [["models", "--unchecked"], ["http://127.0.0.2:8765/models"], "1 URLs, not checked"],
    [["--port", `${port}`], [`${head}/db`], "4 of 4 nodes answered"],
    [["--port", `${port}`, "--path", "/games", "gpu-1"], [`${head}/games`], "1 of 1 nodes answered"],
    [["--path", "/games", "--unchecked"], ["http://127.0.0.2:8766/games"], "1 URLs, not checked"],
  ];
  for (const [args, urls, summary] of cases) {
    const result = await runMain(["urls", ...args, "--config", path]);
    assertEquals(result, {
      code: 0,
      stdout: urls.map((url) => `${url}\n`).join(""),
      stderr: `cluster-hosts: ${summary}, ${path}\n`,
    }, args.join(" "));
    assertEquals((await runMain(["urls", ...args, "--config", path, "--quiet"])).stderr, "");
  }
  const json = await runMain(["urls", ...all, "--config", path, "--json"]);
  assertEquals(json.stderr, "");
  assertEquals(JSON.parse(json.stdout), { schemaVersion: 1, config: path, urls: [head, gpu1] });

  const homeless = await ofYaml("hosts: { gpu-1: {} }", ["urls", "elo", "--unchecked"]);
  assertEquals(homeless, { code: 1, stdout: "", stderr: "cluster-hosts: 0 URLs, not checked, stdin\n" });
  const none = await runMain(["urls", "models", "gpu-1", "--config", path]);
  const why = "(1 refused; cluster-hosts status --port 8765 shows which)";
  assertEquals(none, { code: 1, stdout: "", stderr: `cluster-hosts: 0 of 1 nodes answered ${why}, ${path}\n` });
  assertRefused(
    await runMain(["urls", "elo", "--path", "db", "-c", path]),
    'Cannot use path "db": expected a path that begins with "/", URL-encoded',
  );
});

Deno.test("main() leaves this host out of urls data, and says so", async () => {
  await using node = await startNode("ok");
  const at = (address: string) => ({ tailscale_ip: address, data_server_port: node.port });
  await using inventory = await writeInventory({ here: at("127.0.0.1"), there: at("127.0.0.3") });
  await using _there = await startNode("ok", { hostname: "127.0.0.3", port: node.port });
  const { code, stdout, stderr } = await runMain(["urls", "data", "-c", inventory.path]);
  assertEquals([code, stdout], [0, `http://127.0.0.3:${node.port}\n`]);
  assertEquals(
    stderr,
    `cluster-hosts: 1 of 1 nodes answered, 1 left out as this host (--include-self), ${inventory.path}\n`,
  );
  const named = await runCli(["urls", "data", "-c", inventory.path], { env: { RINGRIFT_NODE_ID: "There" } });
  assertEquals([named.code, named.stdout], [1, ""]);
  assertStringIncludes(named.stderr, "2 left out as this host");
});

Deno.test("main() reaches a node by its name, whatever of its addresses is permitted", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    "gpu-1": { ssh_host: "ubuntu@localhost", data_server_port: node.port },
  });
  const read = `--allow-read=${inventory.path}`;
  for (const net of ["--allow-net", `--allow-net=localhost:${node.port}`]) {
    const result = await runCli(["status", "--config", inventory.path], { flags: [read, net] });
    assertEquals([result.code, result.stderr], [0, ""], net);
    assertMatch(result.stdout, new RegExp(`^gpu-1 .* localhost:${node.port} .* up `, "m"));
  }
});
