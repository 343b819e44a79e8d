/**
 * Commands over ssh in processes of their own: with an `ssh` of the test's own first on the PATH, and with the least of
 * permissions. The program reads its plan from standard input.
 *
 * @module
 */
import { assertEquals } from "jsr:@std/assert@^1.0.19";
import { ClusterNode, type ClusterNodeFields, type CommandResult, runOnNodes, type RunOptions } from "../mod.ts";
import { denoRun, run, type RunResult, tempFolder } from "./process.ts";

export interface SshPlan {
  readonly nodes: readonly ClusterNodeFields[];
  readonly command: readonly string[];
  readonly options?: Pick<RunOptions, "timeoutMs" | "connectTimeoutMs" | "concurrency" | "options" | "user">;
  /** It is aborted once this many nodes have put something out. */
  readonly abortAfter?: number;
}

export interface SshReport {
  readonly results: readonly (Omit<CommandResult, "node"> & { readonly name: string })[];
  /** What `onResult` and `onOutput` were told. */
  readonly told: readonly string[];
  readonly outputs: readonly string[];
  /** What the call rejected with. */
  readonly reason?: string;
  readonly ms: number;
}

export interface SshProcessOptions {
  readonly env?: Readonly<Record<string, string>>;
  /** @default {["--allow-run=ssh"]} */
  readonly flags?: readonly string[];
}

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
  /** The processes that it is, and that it left behind: those of `$0.pids` and `$0.others`. */
  pids(): Promise<string[]>;
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
  return {
    folder: temp.folder,
    env: { PATH: `${temp.folder}:${Deno.env.get("PATH")}` },
    calls: () => recorded(".calls"),
    pids: () => recorded(".pids"),
    async [Symbol.asyncDispose]() {
      const left = await alive([...await recorded(".pids"), ...await recorded(".others")]);
      if (left.length > 0) await run("sh", ["-c", `kill -9 ${left.join(" ")}`]);
      await temp[Symbol.asyncDispose]();
    },
  };
}

/** Fake ssh clients: one that notes its arguments, and some that do not end by themselves. */
export const FAKES = {
  recording: 'echo "$*" >> "$0.calls"',
  polite: `trap 'echo asked to end >> "$0.calls"; exit 1' TERM
echo $$ >> "$0.pids"
echo started
for tick in $(seq 100); do sleep 0.1; done`,
  /** It ignores every signal that it can, and leaves a process that holds the pipe. */
  stubborn: `trap '' TERM INT HUP
sleep 20 &
echo $! >> "$0.others"
echo $$ >> "$0.pids"
echo started
for tick in $(seq 100); do sleep 0.2; done`,
  /** It ends by itself, but a process of its own holds the pipe. */
  forking: 'sleep 20 & echo $! >> "$0.others"; echo $$ >> "$0.pids"; echo done',
  flooding: 'echo $$ >> "$0.pids"; exec yes',
};

/** Those of the processes that have not ended. Deno itself reads /proc under `--allow-all` alone. */
export async function alive(pids: readonly string[]): Promise<string[]> {
  const script = 'for pid; do grep -qs "^State:.*[^Z] (" "/proc/$pid/status" && echo "$pid"; done; true';
  const { stdout } = await run("sh", ["-c", script, "sh", ...pids]);
  return stdout.split("\n").filter((line) => line !== "");
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
      onResult: (result) => void results.push(result),
    });
  } catch (error) {
    reason = String(error);
  }
  const ms = performance.now() - started;
  const told = results.map(({ node }) => node.name);
  const inOrder = results.toSorted((a, b) => nodes.indexOf(a.node) - nodes.indexOf(b.node));
  return {
    results: inOrder.map(({ node, stdout, ...others }) => ({
      name: node.name,
      ...others,
      stdout: stdout.length > 100_000 ? `${stdout.length} characters` : stdout,
    })),
    told,
    outputs: [...outputs],
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
