/**
 * Commands over ssh in processes of their own: with an `ssh` of the test's own
 * first on the PATH, and with the least of permissions. As a program it reads
 * its plan from standard input.
 *
 * @module
 */
import { assertEquals } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  type ClusterNodeFields,
  type CommandResult,
  runOnNodes,
  type RunOptions,
} from "../mod.ts";
import { denoRun, run, type RunResult, tempFolder } from "./process.ts";

/** What {@linkcode runElsewhere} runs. */
export interface SshPlan {
  readonly nodes: readonly ClusterNodeFields[];
  readonly command: readonly string[];
  readonly options?: Pick<
    RunOptions,
    "timeoutMs" | "connectTimeoutMs" | "concurrency" | "options" | "user"
  >;
  /** It is aborted once this many nodes have put something out. */
  readonly abortAfter?: number;
}

/** What became of a plan. */
export interface SshReport {
  /** The results that `onResult` was given, in the order of the nodes. */
  readonly results:
    readonly (Omit<CommandResult, "node"> & { readonly name: string })[];
  /** The names of the nodes, in the order in which `onResult` was called. */
  readonly order: readonly string[];
  /** What the call rejected with. */
  readonly reason?: string;
  readonly ms: number;
}

export interface SshProcessOptions {
  readonly env?: Readonly<Record<string, string>>;
  /** @default {["--allow-run=ssh"]} */
  readonly flags?: readonly string[];
}

/** Flags of `deno run` under which every timer ends a hundred times as fast. */
export const HASTENED = [
  "--preload",
  new URL("hasten.ts", import.meta.url).pathname,
];

/** Runs a command on nodes in a process of its own. */
export async function runElsewhere(
  plan: SshPlan,
  options: SshProcessOptions = {},
): Promise<SshReport & { readonly process: RunResult }> {
  const { flags = ["--allow-run=ssh"], env = {} } = options;
  const args = denoRun(flags, "tests/ssh_process.ts");
  const process = await run("deno", args, { env, stdin: JSON.stringify(plan) });
  assertEquals([process.code, process.stderr], [0, ""]);
  return { ...JSON.parse(process.stdout), process };
}

/** An `ssh` that is a shell script. */
export interface FakeSsh extends AsyncDisposable {
  readonly folder: string;
  /** Variables with which it is the first on the PATH. */
  readonly env: Readonly<Record<string, string>>;
  /** What it wrote to `$0.calls`. */
  calls(): Promise<string[]>;
  /** The processes that it is: what it wrote to `$0.pids`. */
  pids(): Promise<string[]>;
  /** Every process that was started with {@linkcode env}, at any depth. */
  processes(): Promise<string[]>;
}

/** Makes an `ssh` out of a shell script. */
export async function fakeSsh(script: string): Promise<FakeSsh> {
  const temp = await tempFolder();
  const path = `${temp.folder}/ssh`;
  await Deno.writeTextFile(path, `#!/bin/sh\n${script}\n`, { mode: 0o755 });

  const recorded = async (suffix: string) => {
    const text = await Deno.readTextFile(path + suffix).catch((error) => {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      return "";
    });
    return text.split("\n").filter((line) => line !== "");
  };
  const processes = () => processesWith(`FAKE_SSH=${path}`);

  return {
    folder: temp.folder,
    env: { PATH: `${temp.folder}:${Deno.env.get("PATH")}`, FAKE_SSH: path },
    calls: () => recorded(".calls"),
    pids: () => recorded(".pids"),
    processes,
    async [Symbol.asyncDispose]() {
      await kill(await processes());
      await temp[Symbol.asyncDispose]();
    },
  };
}

/**
 * Makes an `ssh` that notes its arguments and is then the real one, with an
 * ssh_config(5) of the test's own, which a jump host's ssh reads too. One that
 * a ProxyCommand starts with `-F` is not noted.
 */
export async function configuredSsh(
  config: readonly string[] = [],
): Promise<FakeSsh> {
  const { stdout } = await run("sh", ["-c", "command -v ssh"]);
  const fake = await fakeSsh(`[ "$1" = -F ] || echo "$*" >> "$0.calls"
exec ${stdout.trim()} -F "$0.config" "$@"`);
  await Deno.writeTextFile(
    `${fake.folder}/ssh.config`,
    `${config.join("\n")}\n`,
    { mode: 0o600 },
  );
  return fake;
}

/** Fake ssh clients: one notes its arguments, the others do not simply end. */
export const FAKES = {
  recording: 'echo "$*" >> "$0.calls"',
  polite: `trap 'echo asked to end >> "$0.calls"; exit 255' TERM
echo $$ >> "$0.pids"
echo started
for tick in $(seq 100); do sleep 0.1; done`,
  /** It ignores signals, and leaves a process that holds the pipe. */
  stubborn: `trap '' TERM INT HUP
sleep 20 &
echo $$ >> "$0.pids"
echo started
for tick in $(seq 100); do sleep 0.2; done`,
  /** It ends by itself, but a process of its own holds the pipe. */
  forking: 'sleep 20 & echo $$ >> "$0.pids"; echo done',
  /** It leaves a process that writes on, as a ProxyCommand may. */
  noisy: `(while :; do echo noise >&2; sleep 0.1; done) &
echo started
exec sleep 30`,
  flooding: 'echo $$ >> "$0.pids"; exec yes',
};

/** Those of the processes that have not ended. */
export async function alive(pids: readonly string[]): Promise<string[]> {
  const isAlive = 'grep -qs "^State:.*[^Z] (" "/proc/$pid/status"';
  return await pidsOf(
    `for pid; do ${isAlive} && echo "$pid"; done; true`,
    pids,
  );
}

/** The processes that were started with a variable, `NAME=VALUE`. */
export async function processesWith(variable: string): Promise<string[]> {
  const script =
    'grep -lzxF -e "$1" /proc/[0-9]*/environ 2> /dev/null | cut -d / -f 3';
  return await pidsOf(script, [variable]);
}

/** The processes that one has started itself. */
export async function childrenOf(pid: number): Promise<string[]> {
  const script =
    'grep -lx "PPid:.$1" /proc/[0-9]*/status 2> /dev/null | cut -d / -f 3';
  return await pidsOf(script, [String(pid)]);
}

/** Kills processes that may have ended already. */
export async function kill(pids: readonly string[]): Promise<void> {
  if (pids.length > 0) {
    await run("sh", ["-c", 'kill -9 "$@" 2> /dev/null', "sh", ...pids]);
  }
}

/** Deno itself reads /proc under `--allow-all` alone, so that a shell does. */
async function pidsOf(
  script: string,
  args: readonly string[],
): Promise<string[]> {
  const { stdout } = await run("sh", ["-c", script, "sh", ...args]);
  return stdout.split("\n").filter((line) => line !== "");
}

/** Looks until something is as expected, or for twenty seconds. */
export async function eventually<T>(
  look: () => Promise<T>,
  isExpected: (value: T) => boolean,
): Promise<T> {
  const deadline = performance.now() + 20_000;

  while (true) {
    const value = await look();
    if (isExpected(value) || performance.now() > deadline) return value;
    await delay(50);
  }
}

/** The processes of an ssh that are left when they have had time to end. */
export async function leftBy(ssh: FakeSsh): Promise<string[]> {
  return await eventually(ssh.processes, (pids) => pids.length === 0);
}

async function report(plan: SshPlan): Promise<SshReport> {
  const nodes = plan.nodes.map((fields) => new ClusterNode(fields));
  const controller = new AbortController();
  const results: CommandResult[] = [];
  const outputs = new Set<string>();
  let reason: string | undefined;

  const started = performance.now();
  try {
    await runOnNodes(nodes, plan.command, {
      ...plan.options,
      signal: controller.signal,
      onOutput({ name }) {
        outputs.add(name);
        if (outputs.size === plan.abortAfter) controller.abort("enough");
      },
      onResult(result) {
        results.push(result);
      },
    });
  } catch (error) {
    reason = String(error);
  }
  const ms = performance.now() - started;

  const order = results.map(({ node }) => node.name);
  const sorted = results.toSorted((a, b) =>
    nodes.indexOf(a.node) - nodes.indexOf(b.node)
  );
  return {
    results: sorted.map(({ node, stdout, ...others }) => ({
      name: node.name,
      ...others,
      stdout: stdout.length > 100_000 ? `${stdout.length} characters` : stdout,
    })),
    order,
    ...(reason === undefined ? {} : { reason }),
    ms,
  };
}

if (import.meta.main) {
  const plan = JSON.parse(await new Response(Deno.stdin.readable).text());
  console.log(JSON.stringify(await report(plan)));
  // A process that a fake ssh left behind may hold a pipe.
  Deno.exit();
}
