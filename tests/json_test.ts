import {
  assert,
  assertEquals,
  assertMatch,
  assertNotMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt, runOnYaml, startCluster } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { runCli, writeInventory } from "./process.ts";
import { runMain, startMain } from "./run_main.ts";

// --- Documents ---

Deno.test("cluster-hosts status --json gives every node the same keys, one node a line", async () => {
  await using cluster = await startCluster();

  const args = ["status", "--config", cluster.path, "--json"];
  const { stdout } = await runMain(args);

  const { schemaVersion, config, checkedAt, summary, nodes } = JSON.parse(
    stdout,
  );
  assertEquals([schemaVersion, config], [1, cluster.path]);
  assert(Math.abs(Date.now() - Date.parse(checkedAt)) < 60_000);
  assertEquals(summary, {
    total: 4,
    checked: 4,
    up: 2,
    unhealthy: 1,
    down: 1,
    unknown: 0,
  });

  const { connectMs, responseMs, ...head } = nodes[0];
  const { tailscale_ip: address, data_server_port: port } = cluster.hosts.head;
  assert(connectMs > 0 && responseMs >= connectMs);
  assertMatch(String(responseMs), /^\d+(\.\d{1,2})?$/);
  assertEquals(head, {
    name: "head",
    role: "coordinator",
    gpu: "",
    state: "up",
    address,
    port,
    status: { version: "1.4.2", game_count: 12 },
    failure: null,
  });
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

  for (const node of nodes) {
    assertEquals(Object.keys(node), Object.keys(nodes[0]));
  }
  assertEquals(stdout.match(/^\{"name":/gm)?.length, nodes.length);
});

Deno.test("cluster-hosts nodes --json names fields as the library does, null if unset, and keeps the user's own keys", async () => {
  await using inventory = await writeInventory({
    a: { data_server_url: "https://a.example.com/data" },
    b: {
      tailscale_ip: "fd7a::1",
      ssh_host: "root@192.0.2.1",
      ssh_options: ["ProxyJump=head"],
      rack: [7, "b"],
      is_spare: true,
      ssh_user: "ops",
    },
  });

  const args = ["nodes", "--config", inventory.path, "--json"];
  const { stdout } = await runMain(args);

  const { schemaVersion, config, nodes } = JSON.parse(stdout);
  assertEquals([schemaVersion, config], [1, inventory.path]);
  assertEquals([nodes[0].bestIp, nodes[0].addresses], [null, []]);
  assertEquals(nodes[1], {
    name: "b",
    tailscaleIp: "fd7a::1",
    sshHost: "root@192.0.2.1",
    sshUser: "ops",
    sshKey: null,
    sshPort: 22,
    sshOptions: ["ProxyJump=head"],
    ringriftPath: "~/ringrift/ai-service",
    status: "unknown",
    note: null,
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

Deno.test("cluster-hosts coordinator --json calls an address what status calls it", async () => {
  await using inventory = await writeInventory(
    { head: { tailscale_ip: "fd7a::9" } },
    { elo_sync: { coordinator: "head", sync_port: 9000 } },
  );

  const args = ["coordinator", "--config", inventory.path, "--json"];
  const { stdout } = await runMain(args);

  assertEquals(JSON.parse(stdout), {
    schemaVersion: 1,
    config: inventory.path,
    address: "fd7a::9",
    port: 9000,
  });
});

Deno.test("cluster-hosts urls --json prints the URLs in one document", async () => {
  await using cluster = await startCluster();
  const { path, port } = cluster;

  const args = ["urls", "elo", "--config", path, "--json"];
  const result = await runMain(args);

  assertEquals([result.code, result.stderr], [0, ""]);
  const urls = [`http://127.0.0.2:${port}/db`];
  const document = { schemaVersion: 1, config: path, urls };
  assertEquals(JSON.parse(result.stdout), document);
});

Deno.test("cluster-hosts wait --json prints what is up and what is missing", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
    c: hostAt(silent),
  });

  const args = ["wait", "--json", "--timeout", "500ms", "--interval", "100ms"];
  const result = await runMain([...args, "-c", inventory.path]);

  const { missing, waitedMs, ...head } = JSON.parse(result.stdout);
  assertEquals([result.code, result.stderr], [1, ""]);
  assertEquals(head, { schemaVersion: 1, config: inventory.path, up: ["a"] });
  assert(waitedMs >= 500);
  const seen = missing.map(
    (it: { name: string; state: string; failure: { code: string } }) =>
      `${it.name} ${it.state} ${it.failure.code}`,
  );
  assertEquals(seen, ["b down refused", "c unhealthy timeout"]);
});

Deno.test("cluster-hosts wait --down --json prints what is down and what is still up", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
  });

  const args = ["wait", "--down", "--json", "-t", "300ms", "--interval"];
  const result = await runMain([...args, "100ms", "-c", inventory.path]);

  const { missing, down } = JSON.parse(result.stdout);
  assertEquals([result.code, result.stderr], [1, ""]);
  assertEquals(down, ["b"]);
  assertEquals(missing, [{ name: "a", state: "up", failure: null }]);
});

Deno.test("cluster-hosts validate --json says null where a line or a column is not known", async () => {
  const yaml = "hosts:\n  a: { ssh_port: 0, ssh_host: h }\n  b: {}\n";

  const { code, stdout } = await runOnYaml(yaml, ["validate", "--json"]);

  const { schemaVersion, config, errors, warnings } = JSON.parse(stdout);
  assertEquals([code, schemaVersion, config], [2, 1, "-"]);
  const keys = ["column", "line", "message", "path"];
  for (const problem of [...errors, ...warnings]) {
    assertEquals(Object.keys(problem).sort(), keys);
  }
  assertEquals(errors.length, 1);
  assertEquals([errors[0].path, errors[0].line], ["hosts.a.ssh_port", 2]);

  const missing = await runMain([
    "validate",
    "--json",
    "-c",
    "/tmp/no-such-folder/hosts.yaml",
  ]);
  assertEquals(JSON.parse(missing.stdout), {
    schemaVersion: 1,
    config: "/tmp/no-such-folder/hosts.yaml",
    errors: [{
      path: "",
      message: "there is no such file",
      line: null,
      column: null,
    }],
    warnings: [],
  });
});

Deno.test("cluster-hosts status --watch --json prints one object a change, with the keys of status --json", async () => {
  await using up = await startNode("ok", { games: 7 });
  await using inventory = await writeInventory({
    a: hostAt(up, { role: "worker" }),
    b: {},
  });
  const args = ["status", "--watch", "--interval", "50ms", "--json"];

  await using watch = startMain([...args, "--config", inventory.path]);
  await watch.until(({ stdout }) => stdout.split("\n").length > 2);
  watch.kill("SIGTERM");

  const { code, stdout, stderr } = await watch.ended;
  assertEquals([code, stderr], [143, ""]);
  const changes = stdout.trimEnd().split("\n").map((line) => JSON.parse(line));
  const change = changes.find(({ name }) => name === "a");
  const { time, connectMs, responseMs, ...rest } = change;
  assertMatch(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
  assert(connectMs > 0 && responseMs > 0);
  assertEquals(rest, {
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
});

// --- Streams ---

/** Commands that print something: what is on stdout, and the summary on stderr. */
const STREAMS: readonly (readonly [
  line: string,
  stdout: RegExp,
  stderr: RegExp,
])[] = [
  ["status", /^NAME .*\n(.+\n){4}$/, /^.*: 2 of 4 nodes up, .* s, PATH\n$/],
  ["status --gather", /^NODES .*\n(.+\n){3}$/, /^.*: 2 of 4 nodes up, .*\n$/],
  ["status --names", /^head\ngpu-1\ngpu-2\ngpu-3\n$/, /^.*: 2 of 4 nodes up/],
  ["status --only up", /^NAME .*\n(.+\n){2}$/, /^.*: 2 of 4 nodes up, .*\n$/],
  ["status --only unknown", /^$/, /^.*: 2 of 4 nodes up, .*\n$/],
  ["status --json", /^\{.*\n/, /^$/],
  ["nodes", /^NAME .*\n(.+\n){4}$/, /^.*: 4 of 5 nodes .*, PATH\n$/],
  ["nodes --names", /^head\ngpu-1\ngpu-2\ngpu-3\n$/, /^$/],
  ["nodes --json", /^\{.*\n/, /^$/],
  ["coordinator", /^127\.0\.0\.2:\d+\n$/, /^$/],
  ["urls data --include-self", /^(http.*\n){2}$/, /^.*: 2 of 4 .*, PATH\n$/],
  ["wait --min-up 2", /^(.* up after .* s\n){2}$/, /^.*: 2 of 4 .*, PATH\n$/],
  ["validate", /^$/, /^.*: no problems, no warnings, PATH\n$/],
  ["export prometheus", /^\[\n/, /^$/],
  ["permissions status", /^--allow-read=PATH .*\n$/, /^$/],
];

for (const [line, stdout, stderr] of STREAMS) {
  Deno.test(`cluster-hosts ${line} prints results on stdout, its summary on stderr`, async () => {
    await using cluster = await startCluster();

    const args = [...line.split(" "), "--config", cluster.path];
    const result = await runMain(args);

    assertMatch(result.stdout.replaceAll(cluster.path, "PATH"), stdout);
    assertMatch(result.stderr.replaceAll(cluster.path, "PATH"), stderr);
  });
}

// --- Passwords ---

const SECRET = "geheim%21";

/** Serves an inventory to who knows the password, and a broken one. */
async function startGuarded() {
  await using stack = new AsyncDisposableStack();
  const node = stack.use(await startNode("ok"));
  const hosts = { a: hostAt(node) };
  const elo_sync = { coordinator: "a", sync_port: node.port };

  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };
  const server = stack.use(Deno.serve(options, ({ headers, url }) => {
    const expected = `Basic ${btoa("me:geheim!")}`;
    if (headers.get("authorization") !== expected) {
      return new Response("", { status: 401 });
    }
    if (url.endsWith("/broken")) return new Response("hosts: 5");
    if (url.endsWith("/missing")) return new Response("", { status: 404 });
    return Response.json({ hosts, elo_sync });
  }));

  const held = stack.move();
  const host = `127.0.0.1:${server.addr.port}`;
  return {
    url: (path: string) => `http://me:${SECRET}@${host}${path}`,
    shown: `@${host}`,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

const GUARDED = [
  "status",
  "status --json",
  "status --only problems",
  "nodes",
  "nodes --json",
  "coordinator",
  "coordinator --json",
  "urls data",
  "urls models",
  "urls data --json",
  "wait",
  "wait --json",
  "validate",
  "validate --json",
  "export ansible",
  "permissions status",
  "nodes gpu-x",
  "nodes --role x",
  "ssh a --dry-run -- true",
];

for (const line of GUARDED) {
  Deno.test(`cluster-hosts ${line} shows no password of an inventory's URL`, async () => {
    await using guarded = await startGuarded();
    const [before = "", after] = line.split(" -- ");
    const remote = after === undefined ? [] : ["--", after];
    const url = guarded.url("/hosts.yaml");

    const args = [...before.split(" "), "-c", url, ...remote];
    const { stdout, stderr } = await runMain(args);

    assert(!`${stdout}${stderr}`.includes("geheim"), stdout + stderr);
    assertNotMatch(stderr, /\b401\b/);
  });
}

for (const path of ["/broken", "/missing"]) {
  for (const command of ["nodes", "validate", "validate --json"]) {
    Deno.test(`cluster-hosts ${command} of ${path} shows no password in its error`, async () => {
      await using guarded = await startGuarded();

      const args = [...command.split(" "), "-c", guarded.url(path)];
      const { code, stdout, stderr } = await runMain(args);

      assertEquals(code, 2);
      assert(!`${stdout}${stderr}`.includes("geheim"), stdout + stderr);
      assertStringIncludes(stdout + stderr, `127.0.0.1:`);
    });
  }
}

Deno.test("cluster-hosts shows no password of a URL that RINGRIFT_HOSTS_CONFIG names, or that a permission is missing for", async () => {
  await using guarded = await startGuarded();
  const url = guarded.url("/hosts.yaml");

  const env = { RINGRIFT_HOSTS_CONFIG: url };
  const named = await runCli(["nodes"], { env });
  assertEquals(named.code, 0, named.stderr);
  const refused = await runCli(["nodes", "-c", url], { flags: [] });
  assertEquals(refused.code, 2);

  for (const { stdout, stderr } of [named, refused]) {
    assert(!`${stdout}${stderr}`.includes("geheim"), stdout + stderr);
  }
});
