import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { main } from "../cli.ts";
import {
  type Behaviour,
  ROOT,
  run,
  runCli,
  type RunResult,
  startDemoCluster,
  startNode,
  writeInventory,
} from "./loopback_cluster.ts";

const DEMO = `${ROOT}config/demo_hosts.yaml`;
const COMMANDS = ["status", "nodes", "coordinator", "urls", "ssh", "wait", "validate", "export", "permissions"];

/** The outcome without its time, which differs. */
function outcome({ code, stdout, stderr }: RunResult) {
  return { code, stdout, stderr };
}

function assertUsageError(result: RunResult, message: string, args: readonly string[] = []) {
  assertEquals(outcome(result), { code: 2, stdout: "", stderr: `cluster-hosts: ${message}\n` }, args.join(" "));
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
    "gpu-1": await host("ok", { gpu: "H100" }),
    "gpu-2": await host("refuses", { gpu: "A100" }),
    "gpu-3": await host("http-500", { gpu: "A100" }),
    "old-1": await host("ok", { gpu: "V100", status: "retired" }),
  };
  const { path } = stack.use(
    await writeInventory(hosts, { elo_sync: { coordinator: "head", sync_port: hosts.head.data_server_port } }),
  );
  const held = stack.move();
  return { hosts, path, port: hosts.head.data_server_port, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

function deadHosts(count: number, port: number) {
  const host = { tailscale_ip: "127.0.0.1", data_server_port: port };
  return Object.fromEntries(Array.from({ length: count }, (_, index) => [`dead-${index}`, host]));
}

async function emptyFolder() {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  return { folder, [Symbol.asyncDispose]: () => Deno.remove(folder, { recursive: true }) };
}

Deno.test("main() gives the exit code", async () => {
  assertEquals(await main(["--version"]), 0);
  assertEquals(await main(["nodes", "--config", DEMO, "--role", "coordinator", "--quiet"]), 0);
});

Deno.test("--help and --version need no permission", async () => {
  const { version } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
  const runBare = (...args: string[]) => runCli(args, { flags: [] });
  assertEquals(outcome(await runBare("--version")), { code: 0, stdout: `cluster-hosts ${version}\n`, stderr: "" });

  const help = await runBare("--help");
  assertEquals([help.code, help.stderr], [0, ""]);
  assert(help.stdout.split("\n").length <= 40);
  for (const command of COMMANDS) assertMatch(help.stdout, new RegExp(`^  ${command} +\\w`, "m"));
  for (const same of ["-h", "help"]) assertEquals((await runBare(same)).stdout, help.stdout);
  assertEquals(outcome(await runBare()), { ...outcome(help), code: 2 });

  const texts = [help.stdout];
  for (const command of COMMANDS) {
    const { code, stdout, stderr } = await runBare(command, "--help");
    assertEquals([code, stderr], [0, ""], command);
    assertStringIncludes(stdout, `\nUsage: cluster-hosts ${command} `);
    assertEquals(stdout.split("\nExamples:\n")[1]?.trimEnd().split("\n").length, 2, command);
    texts.push(stdout);
  }
  assertEquals(texts.flatMap((text) => text.split("\n")).filter((line) => line.length > 80), []);
});

Deno.test("a wrong command line is one line that names it", async () => {
  const cases: [args: string[], message: string][] = [
    [["stauts"], 'Unknown command "stauts": is "status" meant?; see cluster-hosts --help'],
    [["frobnicate"], 'Unknown command "frobnicate"; see cluster-hosts --help'],
    [["__proto__"], 'Unknown command "__proto__"; see cluster-hosts --help'],
    [["--verbose"], 'Unknown option "--verbose"; see cluster-hosts --help'],
    [["status", "--jsno"], 'Unknown option "--jsno": is "--json" meant?; see cluster-hosts status --help'],
    [["nodes", "--watch"], 'Unknown option "--watch"; see cluster-hosts nodes --help'],
    [["status", "-x"], 'Unknown option "-x"; see cluster-hosts status --help'],
    [["status", "--timeout", "soon"], '--timeout takes a number from 0.001 to 2000000, not "soon"'],
    [["status", "--timeout", "0"], '--timeout takes a number from 0.001 to 2000000, not "0"'],
    [["status", "--timeout=-1"], '--timeout takes a number from 0.001 to 2000000, not "-1"'],
    [["status", "--port", "0"], '--port takes a whole number from 1 to 65535, not "0"'],
    [["status", "--port", "80.5"], '--port takes a whole number from 1 to 65535, not "80.5"'],
    [["status", "--port", "65536"], '--port takes a whole number from 1 to 65535, not "65536"'],
    [["status", "--concurrency", "1e3"], '--concurrency takes a whole number from 1 to 1000000, not "1e3"'],
    [["status", "--min-up", "0"], '--min-up takes a whole number from 1 to 2000000, not "0"'],
    [["status", "--min-up", "9"], "--min-up 9, but only 8 nodes are selected"],
    [["status", "--role"], "--role needs a value: ROLE"],
    [["status", "--", "uptime"], 'status takes no command behind "--"'],
    [["status", "gpu-x"], 'No node matches "gpu-x" (is "gpu-1" meant?)'],
    [["nodes", "tpu-*", "gpu-[8-9]"], 'No node matches "tpu-*", "gpu-[8-9]"'],
    [["nodes", "gpu-[9-8]"], 'Cannot read the range in "gpu-[9-8]": expected numbers, as in gpu-[1-8,12]'],
    [["status", "--exclude", "tpu"], 'No node matches "tpu"'],
    [["status", "--gpu", "TPU"], `No node is selected out of 9 in ${DEMO}; 1 are not active: see --all`],
    [["status", "--gpu", "TPU", "--all"], `No node is selected out of 9 in ${DEMO}`],
    [["coordinator", "gpu-1"], "coordinator takes no node: gpu-1"],
    [
      ["urls", "data", "--port", "80"],
      "urls data takes each node's own port and URL: --port and --path do not go with it",
    ],
    [["urls", "elo", "--path", "db"], 'Cannot ask for "db": expected a path that begins with "/", URL-encoded'],
  ];
  for (const [[command, ...rest], message] of cases) {
    const args = [command!, ...(COMMANDS.includes(command!) ? ["--config", DEMO] : []), ...rest];
    assertUsageError(await runCli(args), message, args);
  }
  assertStringIncludes((await runCli(["urls"])).stderr, "elo, data or models");
  assertStringIncludes((await runCli(["urls", "modles"])).stderr, '"models"');
});

Deno.test("status shows the demo cluster as a table", async () => {
  await using _cluster = await startDemoCluster();
  const { code, stdout, stderr } = await runCli(["status", "--config", DEMO, "--timeout", "1"]);
  assertEquals({ code, stderr }, { code: 1, stderr: "" });
  const shown = stdout.replace(/ \d+\.\d ms/g, "  N ms").replace(/\d+\.\d\d s/, "N s").replace(/ {2,}/g, "  ");
  assertEquals(shown.split("\n"), [
    "NAME  ROLE  GPU  ADDRESS  LATENCY  STATE  VERSION  GAMES  REASON",
    "coordinator  coordinator  -  127.0.0.1:18760  N ms  up  1.4.2  12840",
    "gpu-1  worker  H100  127.0.0.1:18761  N ms  up  1.4.2  3127",
    "gpu-2  worker  GH200  127.0.0.1:18762  N ms  up  1.4.2  2984",
    "gpu-3  worker  A100  127.0.0.1:18763  -  down  -  -  connection refused",
    "gpu-4  worker  A100  127.0.0.1:18764  N ms  unhealthy  -  -  timeout: accepted, but no answer within 1000 ms",
    "gpu-5  worker  A100  127.0.0.1:18765  -  down  -  -  timeout: no answer within 1000 ms",
    "gpu-6  worker  RTX 5090  127.0.0.1:18766  N ms  unhealthy  -  -  http-status: HTTP 500",
    "gpu-7  worker  RTX 5090  127.0.0.1:18767  N ms  unhealthy  -  -  bad-response: the answer is not JSON",
    "",
    "3 of 8 nodes up, 3 unhealthy, 2 down (N s)",
    "",
  ]);
});

Deno.test("status checks what is selected, and its exit code says whether that is up", async () => {
  await using cluster = await startCluster();
  const all = "head:up gpu-1:up gpu-2:down gpu-3:unhealthy";
  const cases: [args: string[], code: number, states: string][] = [
    [[], 1, all],
    [["--min-up", "2"], 0, all],
    [["--min-up", "3"], 1, all],
    [["--tcp"], 1, "head:up gpu-1:up gpu-2:down gpu-3:up"],
    [["--tcp", "--exclude", "gpu-2"], 0, "head:up gpu-1:up gpu-3:up"],
    [["--port", `${cluster.port}`], 0, "head:up gpu-1:up gpu-2:up gpu-3:up"],
    [["--role", "Coordinator"], 0, "head:up"],
    [["--gpu", "h1", "--gpu", "a1"], 1, "gpu-1:up gpu-2:down gpu-3:unhealthy"],
    [["--exclude", "gpu-[2-3]"], 0, "head:up gpu-1:up"],
    [["--exclude", "gpu-2", "--exclude", "gpu-3"], 0, "head:up gpu-1:up"],
    [["--all", "--min-up", "3"], 0, `${all} old-1:up`],
    [["old-1"], 0, "old-1:up"],
    [["gpu-*"], 1, "gpu-1:up gpu-2:down gpu-3:unhealthy"],
    [["gpu-[1,3]"], 1, "gpu-1:up gpu-3:unhealthy"],
    [["gpu-1", "h???"], 0, "head:up gpu-1:up"],
    [["gpu-1", "--concurrency", "1"], 0, "gpu-1:up"],
  ];
  for (const [args, code, states] of cases) {
    const result = await runCli(["status", "--config", cluster.path, "--json", ...args]);
    assertEquals([result.code, result.stderr], [code, ""], args.join(" "));
    const nodes: { name: string; state: string }[] = JSON.parse(result.stdout).nodes;
    assertEquals(nodes.map(({ name, state }) => `${name}:${state}`).join(" "), states, args.join(" "));
    if (args.length > 0) continue;
    const quiet = await runCli(["status", "--config", cluster.path, "--quiet"]);
    assertEquals(outcome(quiet), { code, stdout: "", stderr: "" });
  }
});

Deno.test("status --json gives every node the same keys", async () => {
  await using cluster = await startCluster();
  const { stdout } = await runCli(["status", "--config", cluster.path, "--json"]);
  const { schemaVersion, checkedAt, summary, nodes } = JSON.parse(stdout);
  assertEquals(schemaVersion, 1);
  assert(Math.abs(Date.now() - Date.parse(checkedAt)) < 60_000);
  assertEquals(summary, { total: 4, checked: 4, up: 2, unhealthy: 1, down: 1, unknown: 0 });
  const { connectMs, ...head } = nodes[0];
  assert(connectMs > 0);
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
    status: null,
    failure: { code: "refused", message: "connection refused" },
  });
  for (const node of nodes) assertEquals(Object.keys(node), Object.keys(nodes[0]));
  // One node a line.
  assertEquals(stdout.split("\n").filter((line) => line.startsWith('{"name":')).length, nodes.length);
});

Deno.test("status of 200 nodes of which 150 are black holes costs one timeout", async () => {
  await using hole = await startNode("black-hole");
  await using node = await startNode("ok");
  const live = Array.from({ length: 50 }, (_, index) => [`live-${index}`, {
    tailscale_ip: `127.0.0.${index + 1}`,
    ssh_host: node.hostname,
    data_server_port: node.port,
  }]);
  await using inventory = await writeInventory({ ...deadHosts(150, hole.port), ...Object.fromEntries(live) });
  const { code, stdout, stderr, ms } = await runCli(["status", "--config", inventory.path, "--timeout", "1"]);
  assertEquals([code, stderr], [1, ""]);
  assert(ms < 1500, `${ms} ms`);
  const lines = stdout.split("\n");
  const dead = lines.filter((line) => /^dead-\d+ .* down .* timeout: no answer within 1000 ms$/.test(line));
  const up = lines.filter((line) => /^live-\d+ .* up .* 1\.4\.2 +12$/.test(line));
  assertEquals([dead.length, up.length, lines.length], [150, 50, 200 + 4]);
  assertStringIncludes(stdout, "\n50 of 200 nodes up, 150 down (1.");
});

Deno.test("status of a thousand dead nodes costs one timeout", async () => {
  await using hole = await startNode("black-hole");
  await using inventory = await writeInventory(deadHosts(1000, hole.port));
  const { code, stdout, ms } = await runCli(["status", "--config", inventory.path, "--timeout", "1"]);
  assertEquals(code, 1);
  assert(ms < 2000, `${ms} ms`);
  assertEquals(stdout.match(/no answer within 1000 ms$/gm)?.length, 1000);
});

Deno.test("status without an inventory checks the address that RINGRIFT_COORDINATOR_IP names", async () => {
  await using node = await startNode("ok");
  await using nowhere = await emptyFolder();
  await using empty = await writeInventory({}, { elo_sync: { coordinator: "head", sync_port: node.port } });
  const env = { RINGRIFT_COORDINATOR_IP: node.hostname };
  const { folder: cwd } = nowhere;

  const configured = await runCli(["status", "--config", empty.path], { env });
  assertEquals([configured.code, configured.stderr], [0, ""]);
  assertMatch(configured.stdout, new RegExp(`^head +coordinator +- +127.0.0.1:${node.port} .* up `, "m"));
  const missing = await runCli(["status", "--port", `${node.port}`], { env, cwd });
  assertMatch(missing.stdout, new RegExp(`^mac-studio +coordinator +- +127.0.0.1:${node.port} .* up `, "m"));
  assertEquals((await runCli(["coordinator"], { env, cwd })).stdout, "127.0.0.1:8766\n");
  assertEquals(
    (await runCli(["coordinator"], { env: { RINGRIFT_COORDINATOR_IP: "::1" }, cwd })).stdout,
    "[::1]:8766\n",
  );

  const noFile = "There is no config/distributed_hosts.yaml here: create it, name another with --config or with " +
    "RINGRIFT_HOSTS_CONFIG";
  const noHosts = `No hosts in ${empty.path}: add them under "hosts"`;
  assertUsageError(await runCli(["status"], { cwd }), `${noFile}, or set RINGRIFT_COORDINATOR_IP`);
  assertUsageError(await runCli(["status", "--config", empty.path]), `${noHosts}, or set RINGRIFT_COORDINATOR_IP`);
  for (const args of [["nodes"], ["wait"], ["urls", "elo"], ["export", "ansible"]]) {
    assertUsageError(await runCli(args, { cwd, env }), noFile, args);
    assertUsageError(await runCli([...args, "--config", empty.path]), noHosts, args);
  }
  assertUsageError(
    await runCli(["coordinator", "--config", empty.path]),
    `No coordinator: "head" has no address in ${empty.path}; set elo_sync.coordinator or RINGRIFT_COORDINATOR_IP`,
  );
  assertUsageError(
    await runCli(["status"], { cwd, env: { RINGRIFT_COORDINATOR_IP: "-oProxyCommand=x" } }),
    'environment: RINGRIFT_COORDINATOR_IP: expected a host name or an address, got one that begins with "-"',
  );
});

Deno.test("--config takes a path, stdin or a URL; RINGRIFT_HOSTS_CONFIG stands in for it", async () => {
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
  const names = (result: RunResult) => JSON.parse(result.stdout).nodes.map(({ name }: { name: string }) => name);
  for (
    const [args, options] of [
      [["--config", inventory.path], {}],
      [[`--config=file://${inventory.path}`], {}],
      [["--config", "-"], { stdin: yaml }],
      [["--config=-"], { stdin: yaml }],
      [["--config", url("/hosts.yaml")], {}],
      [[], { env: { RINGRIFT_HOSTS_CONFIG: inventory.path } }],
      [[], { env: { RINGRIFT_HOSTS_CONFIG: url("/hosts.yaml") } }],
      [["--config", inventory.path], { env: { RINGRIFT_HOSTS_CONFIG: "/nowhere.yaml" } }],
    ] as const
  ) {
    assertEquals(names(await runCli(["nodes", "--json", ...args], options)), ["gpu-1"], args.join(" "));
  }

  const faults: [origin: string, message: string][] = [
    [url("/other"), "answered HTTP 404"],
    [url("/login"), "is HTML or XML, not YAML"],
    [url("/moved"), "answered with a redirect (HTTP 302): use the URL that it leads to"],
    ["http://[", "is not a URL"],
    [`${inventory.folder}/other.yaml`, "there is no such file"],
    [inventory.folder, "is a folder, not a file"],
  ];
  for (const [origin, message] of faults) {
    assertUsageError(await runCli(["nodes", "--config", origin]), `${origin}: ${message}`);
    assertUsageError(await runCli(["nodes"], { env: { RINGRIFT_HOSTS_CONFIG: origin } }), `${origin}: ${message}`);
  }
  const broken = await runCli(["nodes", "--config", "-"], { stdin: "hosts:\n  a: { ssh_port: 0 }\n  b: null\n" });
  assertEquals(outcome(broken), {
    code: 2,
    stdout: "",
    stderr: "cluster-hosts: stdin:2: hosts.a.ssh_port: expected an integer from 1 to 65535, got another number\n" +
      "cluster-hosts: stdin:3: hosts.b: expected a mapping, got nothing\n",
  });

  const permissions = await runCli(["permissions", "validate", "--config", url("/hosts.yaml")]);
  assertEquals(permissions.stdout, `--allow-net=127.0.0.1:${server.addr.port}\n`);

  const late = await runCli(["status", "--config", url("/never"), "--timeout", "0.5"]);
  never.resolve(new Response());
  assertUsageError(late, `${url("/never")}: did not answer within 500 ms`);
  assert(late.ms < 1500, `${late.ms} ms`);
});

Deno.test("nodes lists what is configured, inactive nodes too", async () => {
  const { code, stdout, stderr } = await runCli(["nodes", "--config", DEMO, "gpu-[1-2]", "old-1"]);
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  assertEquals(stdout.replace(/ {2,}/g, "  ").split("\n"), [
    "NAME  ROLE  STATUS  GPU  MEMORY  CPUS  ADDRESSES  DATA  SSH",
    "gpu-1  worker  active  H100  96 GB  72  127.0.0.1, localhost  18761  ubuntu:22",
    "gpu-2  worker  ready  GH200  -  -  ::1, 127.0.0.1  18762  root:22",
    "old-1  worker  retired  V100  -  -  127.0.0.1  18768  ubuntu:22",
    "",
    "3 nodes, 2 active",
    "",
  ]);
  const quiet = await runCli(["nodes", "--config", DEMO, "gpu-1", "--quiet"]);
  assertEquals(quiet.stdout.split("\n").length, 3);

  await using inventory = await writeInventory({
    a: { data_server_url: "https://a.example.com/data" },
    b: { tailscale_ip: "fd7a::1", ssh_host: "root@192.0.2.1", rack: 7 },
  });
  const { schemaVersion, nodes } = JSON.parse((await runCli(["nodes", "--config", inventory.path, "--json"])).stdout);
  assertEquals(schemaVersion, 1);
  assertEquals(nodes[0].addresses, []);
  assertEquals(nodes[1], {
    ...nodes[1],
    name: "b",
    tailscaleIp: "fd7a::1",
    sshUser: "root",
    bestIp: "fd7a::1",
    addresses: ["fd7a::1", "192.0.2.1"],
    dataServerBaseUrl: "http://[fd7a::1]:8766",
    isActive: true,
  });
  assertMatch(
    (await runCli(["nodes", "--config", inventory.path])).stdout,
    /^a .* - +https:\/\/a\.example\.com\/data /m,
  );
});

Deno.test("nodes lists a real inventory of 42 hosts within 150 ms, start and end of the process included", async () => {
  const path = `${ROOT}tests/fixtures/real_inventory.yaml`;
  let best = Infinity;
  for (let round = 0; round < 5; round++) {
    const { code, stdout, ms } = await runCli(["nodes", "--config", path]);
    assertEquals(code, 0);
    assertStringIncludes(stdout, "\n42 nodes, ");
    best = Math.min(best, ms);
  }
  assert(best < 150, `${best} ms`);
});

Deno.test("coordinator prints HOST:PORT", async () => {
  await using inventory = await writeInventory(
    { head: { tailscale_ip: "fd7a::9" } },
    { elo_sync: { coordinator: "head", sync_port: 9000 } },
  );
  const args = ["coordinator", "--config", inventory.path];
  assertEquals((await runCli(args)).stdout, "[fd7a::9]:9000\n");
  const { stdout } = await runCli([...args, "--json"]);
  assertEquals(JSON.parse(stdout), { schemaVersion: 1, hostname: "fd7a::9", port: 9000 });
});

Deno.test("urls gives the URLs of what answers, one a line", async () => {
  await using cluster = await startCluster();
  const base = (name: keyof typeof cluster.hosts) => `http://127.0.0.2:${cluster.hosts[name].data_server_port}`;
  const [head, gpu1, gpu2] = [base("head"), base("gpu-1"), base("gpu-2")];
  const cases: [args: string[], urls: string[], env?: Record<string, string>][] = [
    [["data"], [head, gpu1]],
    [["data", "gpu-*"], [gpu1]],
    [["data"], [head], { RINGRIFT_NODE_ID: "GPU-1" }],
    [["data", "--include-self"], [head, gpu1], { RINGRIFT_NODE_ID: "gpu-1" }],
    [["data", "--unchecked", "gpu-[1-2]"], [gpu1, gpu2]],
    // All are at one address, so that they share their one URL.
    [["elo"], [`${head}/db`]],
    [["elo", "--path", "/elo.db", "gpu-2"], [`${head}/elo.db`]],
    [["elo", "--unchecked", "--port", "9000"], ["http://127.0.0.2:9000/db"]],
    [["models", "--port", `${cluster.port}`], [`${head}/models`]],
    [["models", "--unchecked"], ["http://127.0.0.2:8765/models"]],
    [["--port", `${cluster.port}`], [`${head}/db`]],
    [["--port", `${cluster.port}`, "--path", "/games", "gpu-1"], [`${head}/games`]],
    [["--path", "/games", "--unchecked"], ["http://127.0.0.2:8766/games"]],
  ];
  for (const [args, urls, env = {}] of cases) {
    const options = { env };
    const result = await runCli(["urls", ...args, "--config", cluster.path], options);
    assertEquals(outcome(result), { code: 0, stdout: urls.map((url) => `${url}\n`).join(""), stderr: "" }, `${args}`);
  }
  const json = await runCli(["urls", "data", "--config", cluster.path, "--json"]);
  assertEquals(JSON.parse(json.stdout), { schemaVersion: 1, urls: [head, gpu1] });

  const none = ["urls", "data", "gpu-2", "--config", cluster.path];
  const stderr = "cluster-hosts: No node answered: cluster-hosts status tells why\n";
  assertEquals(outcome(await runCli(none)), { code: 1, stdout: "", stderr });
  assertEquals(outcome(await runCli([...none, "--quiet"])), { code: 1, stdout: "", stderr: "" });
  const self = await runCli(none, { env: { RINGRIFT_NODE_ID: "gpu-2" } });
  assertEquals(self.stderr, "cluster-hosts: Only this host itself is selected: see --include-self\n");
});

Deno.test("urls --unchecked without any address does not blame this host", async () => {
  await using inventory = await writeInventory({ "gpu-1": {} });
  const { code, stderr } = await runCli(["urls", "elo", "--unchecked", "--config", inventory.path]);
  assertEquals(code, 1);
  assert(!stderr.includes("this host itself"), stderr);
});

Deno.test("status reaches a node by its name, whatever of its addresses is permitted", async () => {
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

const hasOpenssl = (await run("sh", ["-c", "command -v openssl"])).code === 0;

Deno.test({
  name: `status asks an https data_server_url${hasOpenssl ? "" : " (ignored: needs openssl)"}`,
  ignore: !hasOpenssl,
  async fn() {
    await using place = await emptyFolder();
    const [keyPath, certPath] = [`${place.folder}/key.pem`, `${place.folder}/cert.pem`];
    const { code, stderr } = await run("sh", [
      "-c",
      "exec openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost " +
      "-addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE " +
      `-keyout ${keyPath} -out ${certPath}`,
    ]);
    assertEquals(code, 0, stderr);
    const [key, cert] = [await Deno.readTextFile(keyPath), await Deno.readTextFile(certPath)];
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, key, cert, onListen() {} },
      ({ url }) =>
        new URL(url).pathname === "/data/status"
          ? Response.json({ version: "tls" })
          : new Response("", { status: 404 }),
    );
    await using plain = await startNode("ok");
    await using inventory = await writeInventory({
      secure: { data_server_url: `https://localhost:${server.addr.port}/data/` },
      plain: { data_server_url: `https://localhost:${plain.port}` },
    });
    const args = ["status", "--json", "--config", inventory.path];
    const states = async (env: Record<string, string>) =>
      JSON.parse((await runCli(args, { env })).stdout).nodes.map(
        ({ state, status, failure }: Record<string, Record<string, string>>) => [
          state,
          status?.version ?? failure?.message?.slice(0, 5),
        ],
      );
    assertEquals(await states({ DENO_CERT: certPath }), [["up", "tls"], ["unhealthy", "TLS: "]]);
    // A certificate that nobody vouches for.
    assertEquals(await states({}), [["unhealthy", "TLS: "], ["unhealthy", "TLS: "]]);
  },
});

Deno.test("a terminal gets progress and colours, a pipe neither", async () => {
  await using silent = await startNode("silent");
  await using node = await startNode("ok");
  await using inventory = await writeInventory({
    up: { tailscale_ip: "127.0.0.1", data_server_port: node.port },
    late: { tailscale_ip: "127.0.0.1", data_server_port: silent.port },
    gone: { status: "offline" },
  });
  const args = ["status", "--config", inventory.path, "--timeout", "0.3"];
  const onTerminal = async (env: Record<string, string> = {}, given = args) => {
    const command = `stty cols 200; deno run -q --config ${ROOT}deno.json -P=cli ${ROOT}cli.ts ${given.join(" ")}`;
    return (await run("sh", ["-c", `exec timeout 20 script -qec '${command}' /dev/null`], { env })).stdout;
  };
  const pipe = await runCli(args);
  assertEquals(pipe.stderr, "");
  assert(!pipe.stdout.includes("\x1b"));

  const shown = await onTerminal();
  assertStringIncludes(shown, "\rchecked 2/2\r\x1b[K");
  assertStringIncludes(shown, "\x1b[32mup\x1b[0m");
  assertStringIncludes(shown, "\x1b[33munhealthy\x1b[0m");
  assertStringIncludes(await onTerminal({}, ["nodes", "--config", inventory.path]), "\x1b[2moffline\x1b[0m");
  assert(!(await onTerminal({ NO_COLOR: "1" })).includes("\x1b[3"));
  assert(!(await onTerminal({}, [...args, "--json"])).includes("\x1b[3"));
  assert(!(await onTerminal({}, [...args, "--quiet"])).includes("checked"));
});
