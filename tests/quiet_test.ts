import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { denoRun, run, writeInventory } from "./process.ts";
import { runMain, startMain } from "./run_main.ts";

const ALL_UP = { isWell: true };
const ONE_DOWN = { isWell: false };

/** Writes an inventory of a node that is up, and of one that is up or not. */
async function startPair({ isWell }: { readonly isWell: boolean }) {
  await using stack = new AsyncDisposableStack();

  const head = stack.use(await startNode("ok"));
  const other = stack.use(await startNode(isWell ? "ok" : "refuses"));
  const hosts = {
    head: hostAt(head, { role: "coordinator" }),
    // Where all is well, validate has nothing to warn of.
    gpu: hostAt(other, isWell ? {} : { status: "activ" }),
  };
  const elo_sync = { coordinator: "head", sync_port: head.port };
  const { path } = stack.use(await writeInventory(hosts, { elo_sync }));

  const held = stack.move();
  return { path, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

/** A command with `--quiet`, and the patterns of what it prints. */
interface Quiet {
  readonly line: string;
  readonly code: number;
  readonly stdout: RegExp;
  readonly stderr: RegExp;
}

const NOTHING = /^$/;
const WAITING = "--timeout 300ms --interval 100ms";

const WELL: readonly Quiet[] = [
  { line: "status", code: 0, stdout: NOTHING, stderr: NOTHING },
  { line: "status --gather", code: 0, stdout: NOTHING, stderr: NOTHING },
  { line: "status --only problems", code: 0, stdout: NOTHING, stderr: NOTHING },
  {
    line: "status --only problems --names",
    code: 0,
    stdout: NOTHING,
    stderr: NOTHING,
  },
  { line: "wait", code: 0, stdout: NOTHING, stderr: NOTHING },
  { line: "validate", code: 0, stdout: NOTHING, stderr: NOTHING },
  // What they are asked for, they print all the same.
  {
    line: "status --names",
    code: 0,
    stdout: /^head\ngpu\n$/,
    stderr: NOTHING,
  },
  { line: "status --json", code: 0, stdout: /^\{"schema/, stderr: NOTHING },
  { line: "wait --json", code: 0, stdout: /^\{"schema/, stderr: NOTHING },
  { line: "validate --json", code: 0, stdout: /^\{"schema/, stderr: NOTHING },
  {
    line: "nodes",
    code: 0,
    stdout: /^NAME .*\nhead .*\ngpu /,
    stderr: NOTHING,
  },
  { line: "nodes --names", code: 0, stdout: /^head\ngpu\n$/, stderr: NOTHING },
  { line: "coordinator", code: 0, stdout: /^127.*\n$/, stderr: NOTHING },
  {
    line: "urls data --include-self",
    code: 0,
    stdout: /^http.*\nhttp.*\n$/,
    stderr: NOTHING,
  },
  {
    line: "urls elo --unchecked",
    code: 0,
    stdout: /^http.*\n$/,
    stderr: NOTHING,
  },
];

const NOT_WELL: readonly Quiet[] = [
  {
    line: "status",
    code: 1,
    stdout: /^NAME .*\ngpu .* down .* refused: nothing listens on the port\n$/,
    stderr: NOTHING,
  },
  {
    line: "status --gather",
    code: 1,
    stdout: /^NODES .*\n +1 +down +refused: .* gpu\n$/,
    stderr: NOTHING,
  },
  {
    line: "status --only problems",
    code: 1,
    stdout: /^NAME .*\ngpu .* down .*\n$/,
    stderr: NOTHING,
  },
  {
    line: "status --only problems --names",
    code: 1,
    stdout: /^gpu\n$/,
    stderr: NOTHING,
  },
  // Enough are up: that is well.
  { line: "status --min-up 1", code: 0, stdout: NOTHING, stderr: NOTHING },
  {
    line: `wait ${WAITING}`,
    code: 1,
    stdout: NOTHING,
    stderr: /^cluster-hosts: Still missing after .* s: gpu \(refused\)\n$/,
  },
  {
    line: `wait ${WAITING} --min-up 1`,
    code: 0,
    stdout: NOTHING,
    stderr: NOTHING,
  },
  {
    line: "validate",
    code: 0,
    stdout: /^\S+: hosts\.gpu\.status: warning: .*\n$/,
    stderr: NOTHING,
  },
  {
    line: "nodes",
    code: 0,
    stdout: /^NAME .*\nhead .*\ngpu .*\n$/,
    stderr: NOTHING,
  },
  {
    line: "urls data --include-self",
    code: 0,
    stdout: /^http.*\n$/,
    stderr: /^cluster-hosts: 1 of 2 nodes answered \(1 refused; .*\n$/,
  },
  {
    line: "urls data --include-self --unchecked",
    code: 0,
    stdout: /^http.*\nhttp.*\n$/,
    stderr: NOTHING,
  },
];

const QUIET = [
  ...WELL.map((row) => ({ ...row, cluster: ALL_UP })),
  ...NOT_WELL.map((row) => ({ ...row, cluster: ONE_DOWN })),
];

for (const { line, code, stdout, stderr, cluster } of QUIET) {
  const state = cluster.isWell ? "all is well" : "a node is down";

  for (const quiet of ["-q", "--quiet"]) {
    Deno.test(`cluster-hosts ${line} ${quiet}, ${state}: returns ${code}`, async () => {
      await using pair = await startPair(cluster);

      const args = [...line.split(" "), quiet, "--config", pair.path];
      const result = await runMain(args);

      assertEquals(result.code, code, result.stderr);
      assertMatch(result.stdout, stdout);
      assertMatch(result.stderr, stderr);
    });
  }
}

Deno.test("cluster-hosts status -q on a terminal shows no progress", async () => {
  await using pair = await startPair(ALL_UP);
  const terminal = { columns: 80, isErrTerminal: true, hasColour: true };

  const result = await runMain(["status", "-q", "-c", pair.path], terminal);

  assertEquals(result, { code: 0, stdout: "", stderr: "" });
});

Deno.test("cluster-hosts status --watch -q prints the changes to and from a problem alone", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
  });
  const args = ["status", "--watch", "--interval", "50ms"];

  await using watch = startMain([...args, "-q", "--config", inventory.path]);
  await watch.until(({ stdout }) => stdout.includes(" b: down (refused"));
  await using _late = await startNode("ok", { port: dead.port });
  await watch.until(({ stdout }) => stdout.includes(" b: down -> up\n"));
  watch.kill("SIGINT");

  const { code, stdout, stderr } = await watch.ended;
  assertEquals([code, stderr], [130, ""]);
  assert(!stdout.includes(" a: "), stdout);
});

Deno.test("cluster-hosts -q still prints what is wrong with the line", async () => {
  const result = await runMain(["status", "-q", "--jsno"]);

  assertEquals([result.code, result.stdout], [2, ""]);
  assertStringIncludes(result.stderr, 'Unknown option "--jsno"');
});

// --- cron ---

/** Runs a line as cron does: without a terminal, a stdin, or an environment but PATH and HOME. */
async function runCron(line: string) {
  const cli = denoRun(["-P=cli"], "cli.ts").join(" ");
  const env = `PATH=${Deno.env.get("PATH")} HOME=${Deno.env.get("HOME")}`;
  const cached = ["DENO_DIR", "NPM_CONFIG_REGISTRY"]
    .filter((name) => Deno.env.has(name))
    .map((name) => `${name}=${Deno.env.get(name)}`);

  const command = line.replace("cluster-hosts", `deno ${cli}`);
  const whole = `cd / && env -i ${env} ${cached.join(" ")} ${command}`;
  const { code, stdout, stderr } = await run("sh", ["-c", whole]);
  return { code, stdout, stderr };
}

Deno.test("cron line: cluster-hosts status --only problems -q prints nothing and returns 0 while all is well", async () => {
  await using pair = await startPair(ALL_UP);
  const line = `cluster-hosts status --only problems -q -c ${pair.path}`;

  assertEquals(await runCron(line), { code: 0, stdout: "", stderr: "" });
});

Deno.test("cron line: cluster-hosts status --only problems -q prints the rows and returns 1 when a node is down", async () => {
  await using pair = await startPair(ONE_DOWN);
  const line = `cluster-hosts status --only problems -q -c ${pair.path}`;

  const { code, stdout, stderr } = await runCron(line);

  assertEquals([code, stderr], [1, ""]);
  const [head = "", row = "", ...rest] = stdout.split("\n");
  assertMatch(head, /^NAME +ROLE .* STATE .* REASON$/);
  assertMatch(row, /^gpu .* down .* refused: nothing listens on the port$/);
  assertEquals(rest, [""]);
});

Deno.test("cron line: cluster-hosts status -q says that the inventory is missing, and returns 2", async () => {
  const line = "cluster-hosts status --only problems -q -c /nowhere/hosts.yaml";

  const { code, stdout, stderr } = await runCron(line);

  const message = "/nowhere/hosts.yaml: there is no such file";
  assertEquals([code, stdout, stderr], [2, "", `cluster-hosts: ${message}\n`]);
});
