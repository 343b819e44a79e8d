import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { type CheckoutServer, serveCheckout } from "./checkout.ts";
import { hostAt } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import {
  denoRun,
  ROOT,
  run,
  type RunResult,
  tempFolder,
  testUnless,
  writeInventory,
} from "./process.ts";

const DENO_JSON = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
const READ = "--allow-read=config/distributed_hosts.yaml";

/** A live node, and a folder with nothing in it but its inventory, at the default path. */
async function startFolder() {
  await using stack = new AsyncDisposableStack();

  const node = stack.use(await startNode("ok"));
  const hosts = { "gpu-1": hostAt(node) };
  const { folder, path } = stack.use(await writeInventory(hosts));
  await Deno.mkdir(`${folder}/config`);
  await Deno.rename(path, `${folder}/config/distributed_hosts.yaml`);

  const held = stack.move();
  return {
    folder,
    port: node.port,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Asserts that `status` found the node. */
function assertStatus(result: RunResult, port: number): void {
  const { code, stdout, stderr } = result;

  assertEquals(code, 0, stderr);
  const row = new RegExp(`^gpu-1 .* 127.0.0.1:${port} .* up +1.4.2 +12$`, "m");
  assertMatch(stdout, row);
  const summary =
    /^cluster-hosts: 1 of 1 nodes up in .* s, config\/distributed_hosts.yaml\n$/;
  assertMatch(stderr, summary);
}

// --- From a URL ---

/** Runs code from the server alone: without a deno.json, and not from a cache. */
function runByUrl(
  server: CheckoutServer,
  { cwd, args }: { readonly cwd: string; readonly args: readonly string[] },
): Promise<RunResult> {
  const flags = ["run", "-q", "--no-prompt", "--no-config", ...server.flags];
  return run("deno", [...flags, ...args], { cwd });
}

Deno.test("cli.ts status runs from a URL with the flags that permissions prints", async () => {
  await using server = serveCheckout();
  await using place = await startFolder();
  const cli = `${server.url}/cli.ts`;
  const cwd = place.folder;

  const args = [READ, cli, "permissions", "status"];
  const printed = await runByUrl(server, { cwd, args });
  assertEquals([printed.code, printed.stderr], [0, ""]);
  const flags = printed.stdout.trimEnd().split(" ");
  assertEquals(flags.slice(0, 2), [
    READ,
    `--allow-net=127.0.0.1:${place.port}`,
  ]);

  const status = await runByUrl(server, {
    cwd,
    args: [...flags, cli, "status"],
  });
  assertStatus(status, place.port);
  // The variables stay unset without the permission.
  const bare = [...flags.slice(0, 2), cli, "status"];
  assertStatus(await runByUrl(server, { cwd, args: bare }), place.port);
});

for (const line of ["--help", "--version", "urls --help"]) {
  Deno.test(`cli.ts ${line} runs from a URL without any permission`, async () => {
    await using server = serveCheckout();
    await using temp = await tempFolder();

    const args = [`${server.url}/cli.ts`, ...line.split(" ")];
    const result = await runByUrl(server, { cwd: temp.folder, args });

    assertEquals([result.code, result.stderr], [0, ""]);
    assertStringIncludes(result.stdout, "cluster-hosts ");
  });
}

Deno.test("discoverReachableNodes() runs in a script that imports mod.ts by URL", async () => {
  await using server = serveCheckout();
  await using place = await startFolder();
  await Deno.writeTextFile(
    `${place.folder}/script.ts`,
    `import { discoverReachableNodes } from "${server.url}/mod.ts";

    for (const { node, address, status } of await discoverReachableNodes()) {
      console.log(node.name, address, status.version);
    }`,
  );

  const net = `--allow-net=127.0.0.1:${place.port}`;
  const args = ["--allow-import", READ, net, "script.ts"];
  const result = await runByUrl(server, { cwd: place.folder, args });

  const { code, stdout, stderr } = result;
  assertEquals([code, stdout, stderr], [0, "gpu-1 127.0.0.1 1.4.2\n", ""]);
});

// --- From a checkout ---

for (const name of ["mod.ts", "cli.ts", "cluster_hosts.ts"]) {
  Deno.test(`importing ${name} needs no permission`, async () => {
    await using temp = await tempFolder();
    const path = `${temp.folder}/script.ts`;
    await Deno.writeTextFile(
      path,
      `import * as module from "file://${ROOT}${name}";
      console.log(Object.keys(module).length > 0);`,
    );

    const config = ["--config", `${ROOT}deno.json`];
    const args = ["run", "-q", "--no-prompt", ...config, path];
    const result = await run("deno", args, { cwd: temp.folder });

    const { code, stdout, stderr } = result;
    assertEquals([code, stdout, stderr], [0, "true\n", ""]);
  });
}

/** Folders of the checkout, and the path of the demo's inventory from there. */
const PLACES = [
  [ROOT, "config/demo_hosts.yaml"],
  [`${ROOT}tests`, "../config/demo_hosts.yaml"],
] as const;

for (const [cwd, path] of PLACES) {
  Deno.test(`deno task cluster-hosts reads ${path} from where the user stands`, async () => {
    const words = ["cluster-hosts", "nodes", "--names", "--config", path];

    const result = await run("deno", ["task", "-q", ...words], { cwd });

    assertEquals([result.code, result.stderr], [0, ""]);
    assertStringIncludes(result.stdout, "gpu-1\n");
  });
}

Deno.test("deno task cluster-hosts reads the default inventory of the user's folder outside of the checkout", async () => {
  await using place = await startFolder();

  const args = ["task", "-q", "--config", `${ROOT}deno.json`];
  const words = ["cluster-hosts", "status"];
  const result = await run("deno", [...args, ...words], { cwd: place.folder });

  assertStatus(result, place.port);
});

Deno.test("deno task cluster-hosts runs in a checkout whose folder has a blank in its name", async () => {
  await using place = await startFolder();
  const copy = `${place.folder}/my tools`;
  await Deno.mkdir(copy);
  for (const name of ["mod.ts", "cli.ts", "cluster_hosts.ts", "deno.json"]) {
    await Deno.copyFile(ROOT + name, `${copy}/${name}`);
  }

  const args = ["task", "-q", "--config", `${copy}/deno.json`];
  const words = ["cluster-hosts", "status"];
  const result = await run("deno", [...args, ...words], { cwd: place.folder });

  assertStatus(result, place.port);
});

Deno.test("cluster-hosts without an inventory says to copy the example, where there is one", async () => {
  await using temp = await tempFolder();
  const example = "config/distributed_hosts.example.yaml";
  const args = [...denoRun(["-P=cli"], "cli.ts"), "status"];
  const cwd = temp.folder;

  const without = await run("deno", args, { cwd });
  assertEquals(without.code, 2);
  await Deno.mkdir(`${temp.folder}/config`);
  await Deno.copyFile(ROOT + example, `${temp.folder}/${example}`);
  const beside = await run("deno", args, { cwd });
  assertEquals(beside.code, 2);
  assertStringIncludes(beside.stderr, `copy ${example} to `);

  // Whoever follows it has an inventory.
  const file = `${temp.folder}/config/distributed_hosts.yaml`;
  await Deno.copyFile(`${temp.folder}/${example}`, file);
  const nodes = [...denoRun(["-P=cli"], "cli.ts"), "nodes", "--names"];
  const copied = await run("deno", nodes, { cwd });
  assertEquals([copied.code, copied.stderr], [0, ""]);
});

Deno.test("the tests' helpers run where TMPDIR is a folder that may not be written", async () => {
  await using temp = await tempFolder();
  const path = `${temp.folder}/script.ts`;
  await Deno.writeTextFile(
    path,
    `import { tempFolder } from ${JSON.stringify(`${ROOT}tests/process.ts`)};

    await using temp = await tempFolder();
    console.log(Deno.statSync(temp.folder).isDirectory);`,
  );

  const config = ["--config", `${ROOT}deno.json`];
  const args = ["run", "-q", "--no-prompt", ...config, "-P=test", path];
  const result = await run("deno", args, { env: { TMPDIR: "/usr" } });

  const { code, stdout, stderr } = result;
  assertEquals([code, stdout, stderr], [0, "true\n", ""]);
});

// --- Compiled ---

/** Compiles a script as `deno task compile` does, into a folder that is removed with the result. */
async function compile(entry: string, denort: string | undefined) {
  const temp = await tempFolder();
  const path = `${temp.folder}/cluster-hosts`;
  const command: string = DENO_JSON.tasks.compile.command;
  const line = command.replace("dist/cluster-hosts", path)
    .replace("cli.ts", entry);

  const [program = "", ...args] = line.split(" ");
  const env = denort ? { DENORT_BIN: denort } : undefined;
  const { code, stderr } = await run(program, args, env ? { env } : {});
  return { ...temp, code, stderr, path };
}

/** Says why no program can be compiled here; `undefined` if one can. */
async function whyNotCompiled(): Promise<string | undefined> {
  await using program = await compile("mod.ts", Deno.env.get("DENORT_BIN"));

  // Any other fault is one of the program, which the test shows.
  const isMissing = /\bdenort\b/.test(program.stderr);
  return isMissing
    ? "denort is neither in DENORT_BIN nor within reach"
    : undefined;
}

const reason = await whyNotCompiled();

testUnless(reason, "a compiled cluster-hosts runs status", async () => {
  await using place = await startFolder();
  await using program = await compile("cli.ts", Deno.env.get("DENORT_BIN"));
  assertEquals([program.code, program.stderr], [0, ""]);

  const command = `exec ${program.path} status`;
  const result = await run("sh", ["-c", command], { cwd: place.folder });

  assertStatus(result, place.port);
});

Deno.test("deno task compile puts the permissions of the set cli into the program", async () => {
  // Any file stands in for denort if the program is not run: Deno itself is one.
  const { stdout: deno } = await run("deno", ["eval", "-p", "Deno.execPath()"]);
  await using program = await compile("cli.ts", deno.trim());
  assertEquals([program.code, program.stderr], [0, ""]);

  const pattern = '"permissions":{"allow_[^}]*}';
  const command = `grep -ao '${pattern}' ${program.path}`;
  const found = await run("sh", ["-c", command]);

  const { permissions } = JSON.parse(`{${found.stdout.trim()}}`);
  const { env, sys, run: programs } = DENO_JSON.permissions.cli;
  assertEquals(permissions.allow_env, env);
  assertEquals(permissions.allow_sys, sys);
  assertEquals(permissions.allow_run, programs);
  // An empty list is all of it; none of it is null.
  assertEquals(permissions.allow_read, []);
  assertEquals(permissions.allow_net, []);
  assertEquals(permissions.allow_write, null);
  assertEquals(permissions.allow_ffi, null);
  assert(Array.isArray(permissions.allow_import));
});
