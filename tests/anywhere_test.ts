import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { type CheckoutServer, serveCheckout } from "./checkout.ts";
import { startNode } from "./loopback_cluster.ts";
import { denoRun, ROOT, run, tempFolder, testUnless, writeInventory } from "./process.ts";

const DENO_JSON = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));

/** A live node, and a folder with nothing in it but its inventory, at the default path. */
async function startFolder() {
  await using stack = new AsyncDisposableStack();
  const node = stack.use(await startNode("ok"));
  const host = { tailscale_ip: node.hostname, data_server_port: node.port };
  const { folder, path } = stack.use(await writeInventory({ "gpu-1": host }));
  await Deno.mkdir(`${folder}/config`);
  await Deno.rename(path, `${folder}/config/distributed_hosts.yaml`);
  const held = stack.move();
  return { folder, port: node.port, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

function assertStatus(result: { code: number; stdout: string; stderr: string }, port: number) {
  assertEquals([result.code, result.stderr], [0, ""]);
  assertMatch(result.stdout, new RegExp(`^gpu-1 .* 127.0.0.1:${port} .* up +1.4.2 +12$`, "m"));
  assertMatch(result.stdout, /^1 of 1 nodes? up in /m);
}

/** Runs code from the server alone: without a deno.json, and not from a cache, in which a port may have been another's. */
function runByUrl(server: CheckoutServer, cwd: string, args: readonly string[]) {
  return run("deno", ["run", "-q", "--no-prompt", "--no-config", ...server.flags, ...args], { cwd });
}

Deno.test("cli.ts status runs from a URL with the flags that permissions prints", async () => {
  await using server = serveCheckout();
  await using place = await startFolder();
  const cli = `${server.url}/cli.ts`;
  const read = "--allow-read=config/distributed_hosts.yaml";
  const printed = await runByUrl(server, place.folder, [read, cli, "permissions", "status"]);
  assertEquals([printed.code, printed.stderr], [0, ""]);
  const flags = printed.stdout.trimEnd().split(" ");
  assertEquals(flags.slice(0, 2), [read, `--allow-net=127.0.0.1:${place.port}`]);
  assertStatus(await runByUrl(server, place.folder, [...flags, cli, "status"]), place.port);
  // The variables stay unset without the permission.
  assertStatus(await runByUrl(server, place.folder, [...flags.slice(0, 2), cli, "status"]), place.port);
});

Deno.test("cli.ts --help runs from a URL without any permission", async () => {
  await using server = serveCheckout();
  await using place = await startFolder();
  for (const args of [["--help"], ["--version"], ["urls", "--help"]]) {
    const { code, stdout, stderr } = await runByUrl(server, place.folder, [`${server.url}/cli.ts`, ...args]);
    assertEquals([code, stderr], [0, ""]);
    assertStringIncludes(stdout, "cluster-hosts ");
  }
});

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
  const flags = [
    "--allow-import",
    "--allow-read=config/distributed_hosts.yaml",
    `--allow-net=127.0.0.1:${place.port}`,
  ];
  const { code, stdout, stderr } = await runByUrl(server, place.folder, [...flags, "script.ts"]);
  assertEquals({ code, stdout, stderr }, { code: 0, stdout: "gpu-1 127.0.0.1 1.4.2\n", stderr: "" });
});

Deno.test("importing a module needs no permission", async () => {
  await using temp = await tempFolder();
  for (const name of ["mod.ts", "cli.ts", "cluster_hosts.ts"]) {
    const script = `import * as module from "file://${ROOT}${name}";\nconsole.log(Object.keys(module).length > 0);`;
    await Deno.writeTextFile(`${temp.folder}/script.ts`, script);
    const args = ["run", "-q", "--no-prompt", "--config", `${ROOT}deno.json`, `${temp.folder}/script.ts`];
    const { code, stdout, stderr } = await run("deno", args, { cwd: temp.folder });
    assertEquals({ code, stdout, stderr }, { code: 0, stdout: "true\n", stderr: "" }, name);
  }
});

Deno.test("deno task cluster-hosts takes paths from where the user stands", async () => {
  await using place = await startFolder();
  const task = ["task", "-q"];
  const status = ["cluster-hosts", "status"];
  // Inside the checkout, in a subfolder, a relative path is not one of the checkout's root.
  const demo = ["cluster-hosts", "nodes", "--names", "--config"];
  for (
    const [cwd, path] of [[ROOT, "config/demo_hosts.yaml"], [`${ROOT}tests`, "../config/demo_hosts.yaml"]] as const
  ) {
    const { code, stdout, stderr } = await run("deno", [...task, ...demo, path], { cwd });
    assertEquals([code, stderr], [0, ""]);
    assertStringIncludes(stdout, "gpu-1\n");
  }
  // Outside, the default path is that of the user's folder.
  const outside = [...task, "--config", `${ROOT}deno.json`, ...status];
  assertStatus(await run("deno", outside, { cwd: place.folder }), place.port);

  // A checkout may stand in a folder whose name has a blank.
  const copy = `${place.folder}/my tools`;
  await Deno.mkdir(copy);
  for (const name of ["mod.ts", "cli.ts", "cluster_hosts.ts", "deno.json"]) {
    await Deno.copyFile(ROOT + name, `${copy}/${name}`);
  }
  assertStatus(
    await run("deno", [...task, "--config", `${copy}/deno.json`, ...status], { cwd: place.folder }),
    place.port,
  );
});

Deno.test("the tests' helpers run if TMPDIR is a folder that may not be written", async () => {
  await using temp = await tempFolder();
  const script = `import { tempFolder } from ${JSON.stringify(`${ROOT}tests/process.ts`)};
    await using temp = await tempFolder();
    console.log(Deno.statSync(temp.folder).isDirectory);`;
  await Deno.writeTextFile(`${temp.folder}/script.ts`, script);
  const args = [...denoRun(["-P=test"], "").slice(0, -1), `${temp.folder}/script.ts`];
  const { code, stdout, stderr } = await run("deno", args, { env: { TMPDIR: "/usr" } });
  assertEquals({ code, stdout, stderr }, { code: 0, stdout: "true\n", stderr: "" });
});

/** Compiles a script as `deno task compile` does, into a folder that goes with the result. */
async function compile(entry: string, denort: string | undefined) {
  const temp = await tempFolder();
  const path = `${temp.folder}/cluster-hosts`;
  const command: string = DENO_JSON.tasks.compile.command;
  const [program, ...args] = command.replace("dist/cluster-hosts", path).replace("cli.ts", entry).split(" ");
  const { code, stderr } = await run(program!, args, { env: denort ? { DENORT_BIN: denort } : {} });
  return { ...temp, code, stderr, path };
}

/** Why no program can be compiled here, or `undefined` if one can. */
async function whyNotCompiled(): Promise<string | undefined> {
  await using program = await compile("mod.ts", Deno.env.get("DENORT_BIN"));
  // Any other fault is one of the program, which the test shows.
  if (/\bdenort\b/.test(program.stderr)) return "denort is neither in DENORT_BIN nor within reach";
}

const reason = await whyNotCompiled();

testUnless(reason, "a compiled cluster-hosts runs status", async () => {
  await using place = await startFolder();
  await using program = await compile("cli.ts", Deno.env.get("DENORT_BIN"));
  assertEquals([program.code, program.stderr], [0, ""]);
  assertStatus(await run("sh", ["-c", `exec ${program.path} status`], { cwd: place.folder }), place.port);
});

Deno.test("deno task compile puts the permissions of the set cli into the program", async () => {
  // Any file stands in for denort if the program is not run: Deno itself is one.
  const { stdout: deno } = await run("deno", ["eval", "-p", "Deno.execPath()"]);
  await using program = await compile("cli.ts", deno.trim());
  assertEquals([program.code, program.stderr], [0, ""]);
  const found = await run("sh", ["-c", `grep -ao '"permissions":{"allow_[^}]*}' ${program.path}`]);
  const { permissions } = JSON.parse(`{${found.stdout.trim()}}`);
  const { env, sys, run: programs } = DENO_JSON.permissions.cli;
  assertEquals(permissions.allow_env, env);
  assertEquals(permissions.allow_sys, sys);
  assertEquals(permissions.allow_run, programs);
  // An empty list is all of it, none is null.
  for (const [kind, allowed] of [["read", []], ["net", []], ["write", null], ["ffi", null]]) {
    assertEquals(permissions[`allow_${kind}`], allowed, `${kind}`);
  }
  assert(Array.isArray(permissions.allow_import));
});
