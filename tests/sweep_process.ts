/**
 * Sweeps in processes of their own: with an environment, a limit or a network of their own, and to see what a sweep
 * leaves behind. The program reads its plan from standard input.
 *
 * @module
 */
import { assertEquals, assertLess } from "jsr:@std/assert@^1.0.19";
import { ClusterNode, type ClusterNodeFields, type NodeProbe, probeNodes, type SweepOptions } from "../mod.ts";
import { denoRun, run } from "./process.ts";

/** What a process may take beside the deadline that it promises. */
export const SLACK_MS = 500;

export interface SweepPlan {
  readonly nodes: readonly ClusterNodeFields[];
  readonly options: Pick<SweepOptions, "timeoutMs" | "concurrency" | "check" | "path">;
  /** The sweep is aborted after this time. */
  readonly abortMs?: number;
  /** Before the sweep, all descriptors are taken. */
  readonly takesDescriptors?: boolean;
  /** The process does not wait for what the sweep may have left: a lookup cannot be cancelled. */
  readonly exits?: boolean;
}

export interface SweepReport {
  /** `STATE` or `STATE CODE` of each node, in order. */
  readonly outcomes: readonly string[];
  readonly addresses: readonly (string | undefined)[];
  /** When each node was known. */
  readonly atMs: readonly number[];
  readonly ms: number;
  /** Why the sweep was aborted. */
  readonly reason?: string;
  readonly descriptors: readonly [before: number, after: number];
  /** How long an asynchronous file read took, right after the sweep. */
  readonly readMs: number;
  /** How long the process lived on afterwards. */
  readonly lingerMs: number;
}

export interface ProcessOptions {
  readonly env?: Readonly<Record<string, string>>;
  /** What the command line begins with that runs the rest. */
  readonly enter?: readonly string[];
  /**
   * The flags of `deno run`. Only with all permissions Deno may count descriptors.
   *
   * @default {["-A"]}
   */
  readonly flags?: readonly string[];
}

/** A shell with a limit of descriptors, as the beginning of a command line. */
export function withDescriptors(limit: number): string[] {
  return ["sh", "-c", `ulimit -n ${limit}; exec "$@"`, "sh"];
}

/** Sweeps in a process of its own, and checks what is true of every sweep. */
export async function sweepElsewhere(
  plan: SweepPlan,
  options: ProcessOptions = {},
): Promise<SweepReport> {
  const { env = {}, enter = [], flags = ["-A"] } = options;
  const [program, ...args] = [...enter, "deno", ...denoRun(flags, "tests/sweep_process.ts")];
  const { code, stdout, stderr } = await run(program!, args, { env, stdin: JSON.stringify(plan) });
  const now = Date.now();
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  const { endedAt, ...others } = JSON.parse(stdout);
  const report: SweepReport = { ...others, lingerMs: now - endedAt };
  assertLess(report.readMs, SLACK_MS, "the runtime's threads are all taken");
  // Only what has to be tried again and again while descriptors are short may take longer than one deadline.
  if (enter[0] !== "sh") assertLess(report.ms, (plan.abortMs ?? plan.options.timeoutMs ?? 5000) + SLACK_MS);
  assertLess(report.lingerMs, SLACK_MS, "the process lived on");
  if (!plan.exits) assertEquals(report.descriptors[1], report.descriptors[0], "descriptors are left");
  return report;
}

/** The same node so many times. */
export function copies(count: number, fields: Omit<ClusterNodeFields, "name">): ClusterNodeFields[] {
  return Array.from({ length: count }, (_, index) => ({ name: `node-${index}`, ...fields }));
}

/** The fields of a node whose data server is this one. */
export function at(server: { hostname: string; port: number }): Omit<ClusterNodeFields, "name"> {
  return { tailscaleIp: server.hostname, dataServerPort: server.port };
}

/** `STATE`, or `STATE CODE` if there is a failure. */
export function outcomeOf({ state, failure }: NodeProbe): string {
  return failure ? `${state} ${failure.code}` : state;
}

/** How often each word occurs. */
export function tally(words: Iterable<string>): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const word of words) counts[word] = (counts[word] ?? 0) + 1;
  return counts;
}

async function sweep(plan: SweepPlan): Promise<Omit<SweepReport, "lingerMs"> & { readonly endedAt: number }> {
  const nodes = plan.nodes.map((fields) => new ClusterNode(fields));
  // Before the first count, the runtime opens what it keeps.
  await probeNodes([new ClusterNode({ name: "first", tailscaleIp: "127.0.0.1" })], { port: 1 });
  await new Promise<void>((resolve) => setTimeout(resolve));
  if (plan.takesDescriptors) takeDescriptors();
  const before = plan.takesDescriptors ? 0 : countDescriptors();
  const started = performance.now();
  const elapsed = () => performance.now() - started;
  const known = new Map<ClusterNode, number>();
  const onProbe = ({ node }: NodeProbe) => void known.set(node, elapsed());
  const controller = new AbortController();
  if (plan.abortMs !== undefined) setTimeout(() => controller.abort("enough"), plan.abortMs);
  let reason: string | undefined;
  const probes = await probeNodes(nodes, { ...plan.options, onProbe, signal: controller.signal }).catch((error) => {
    if (!controller.signal.aborted) throw error;
    reason = error;
    return [];
  });
  const ms = elapsed();
  assertEquals(probes.map(({ node }) => node), reason === undefined ? nodes : []);
  if (!plan.takesDescriptors) await Deno.readFile("/dev/null");
  const readMs = elapsed() - ms;
  // A read that was under way when its connection was closed gives the descriptor back a moment later.
  await new Promise((resolve) => setTimeout(resolve, 50));
  return {
    outcomes: probes.map(outcomeOf),
    addresses: probes.map(({ address }) => address),
    atMs: nodes.map((node) => known.get(node) ?? NaN),
    ms,
    ...(reason === undefined ? {} : { reason }),
    descriptors: [before, plan.takesDescriptors ? 0 : countDescriptors()],
    readMs,
    endedAt: Date.now(),
  };
}

function countDescriptors(): number {
  try {
    return [...Deno.readDirSync("/dev/fd")].length;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return 0;
    throw error;
  }
}

function takeDescriptors(): void {
  try {
    for (;;) Deno.openSync("/dev/null");
  } catch (error) {
    if (!/os error 24/.test(String(error))) throw error;
  }
}

if (import.meta.main) {
  const plan = JSON.parse(await new Response(Deno.stdin.readable).text());
  console.log(JSON.stringify(await sweep(plan)));
  if (plan.exits) Deno.exit();
}
