/**
 * Sweeps in processes of their own: with an environment, a limit or a network
 * of their own, and to see what a sweep leaves behind. The program reads its
 * plan from standard input.
 *
 * @module
 */
import {
  assertEquals,
  assertLess,
  assertLessOrEqual,
} from "jsr:@std/assert@^1.0.19";
import {
  ClusterNode,
  type ClusterNodeFields,
  type NodeProbe,
  probeNodes,
  type SweepOptions,
} from "../mod.ts";
import { denoRun, run } from "./process.ts";

/**
 * What a busy machine may take beside a deadline. What misses its deadline in
 * these tests misses it by far more.
 */
export const SLACK_MS = 2000;

/** What to sweep. */
export interface SweepPlan {
  readonly nodes: readonly ClusterNodeFields[];
  readonly options: Pick<
    SweepOptions,
    "timeoutMs" | "concurrency" | "check" | "path" | "port"
  >;

  /** The sweep is aborted after this time. */
  readonly abortMs?: number;

  /** Before the sweep, all descriptors are taken. */
  readonly takesDescriptors?: boolean;

  /**
   * The process does not wait for what the sweep may have left: a lookup cannot
   * be cancelled.
   */
  readonly exits?: boolean;
}

/** What a sweep found, and what it left. */
export interface SweepReport {
  /** `STATE` or `STATE CODE` of each node, in order. */
  readonly outcomes: readonly string[];

  /** The message of each failure, or null. */
  readonly messages: readonly (string | null)[];
  readonly addresses: readonly (string | undefined)[];

  /** The JSON object of each node that gave one, or null. */
  readonly statuses: readonly (Readonly<Record<string, unknown>> | null)[];

  /** When each node was known. */
  readonly atMs: readonly number[];
  readonly ms: number;

  /** For how long this process was not given a processor. */
  readonly lateMs: number;

  /** Why the sweep was aborted. */
  readonly reason?: string;
  readonly descriptors: readonly [before: number, after: number];

  /** How long an asynchronous file read took, right after the sweep. */
  readonly readMs: number;

  /** How long the process lived on afterwards. */
  readonly lingerMs: number;
}

/** Options of {@linkcode sweepElsewhere}. */
export interface ProcessOptions {
  readonly env?: Readonly<Record<string, string>>;

  /** What the command line begins with that runs the rest. */
  readonly enter?: readonly string[];

  /**
   * The flags of `deno run`. Only with all permissions Deno may count
   * descriptors.
   *
   * @default {["-A"]}
   */
  readonly flags?: readonly string[];
}

/**
 * Returns the beginning of a command line: a shell with a hard limit of
 * descriptors.
 */
export function withDescriptors(limit: number): string[] {
  return ["sh", "-c", `ulimit -n ${limit}; exec "$@"`, "sh"];
}

/** Sweeps in a process of its own, and checks what is true of every sweep. */
export async function sweepElsewhere(
  plan: SweepPlan,
  options: ProcessOptions = {},
): Promise<SweepReport> {
  const { env = {}, enter = [], flags = ["-A"] } = options;
  const command = [
    ...enter,
    "deno",
    ...denoRun(flags, "tests/sweep_process.ts"),
  ];
  const [program, ...args] = command;

  const stdin = JSON.stringify(plan);
  const { code, stdout, stderr } = await run(program!, args, { env, stdin });
  const now = Date.now();
  assertEquals({ code, stderr }, { code: 0, stderr: "" });

  const { endedAt, ...others } = JSON.parse(stdout);
  const report: SweepReport = { ...others, lingerMs: now - endedAt };

  assertLess(report.readMs, SLACK_MS, "the runtime's threads are all taken");
  assertLess(report.lingerMs, 2 * SLACK_MS, "the process lived on");

  // Only what has to be tried again and again while descriptors are short may
  // take longer than one deadline.
  const isLimited = enter[0] === "sh";
  if (!isLimited) {
    const deadlineMs = plan.abortMs ?? plan.options.timeoutMs ?? 5000;
    assertLess(report.ms, deadlineMs + SLACK_MS + report.lateMs);
  }

  if (!plan.exits) {
    const [before, after] = report.descriptors;
    assertLessOrEqual(after, before, "descriptors are left");
  }
  return report;
}

/** Returns the same node so many times. */
export function copies(
  count: number,
  fields: Omit<ClusterNodeFields, "name">,
): ClusterNodeFields[] {
  return Array.from({ length: count }, (_, index) => {
    return { name: `node-${index}`, ...fields };
  });
}

/** Returns the fields of a node whose data server is this one. */
export function at(
  server: { hostname: string; port: number },
): Omit<ClusterNodeFields, "name"> {
  return { tailscaleIp: server.hostname, dataServerPort: server.port };
}

/** Returns `STATE`, or `STATE CODE` if there is a failure. */
export function outcomeOf({ state, failure }: NodeProbe): string {
  return failure ? `${state} ${failure.code}` : state;
}

/** Returns how often each word occurs. */
export function tally(words: Iterable<string>): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const word of words) counts[word] = (counts[word] ?? 0) + 1;
  return counts;
}

async function sweep(
  plan: SweepPlan,
): Promise<Omit<SweepReport, "lingerMs"> & { readonly endedAt: number }> {
  const nodes = plan.nodes.map((fields) => new ClusterNode(fields));

  await warmUp();
  const before = await settledDescriptors();
  if (plan.takesDescriptors) takeDescriptors();

  const started = performance.now();
  const elapsed = () => performance.now() - started;
  using clock = startClock();

  const knownMs = new Map<ClusterNode, number>();
  const onProbe = ({ node }: NodeProbe) => void knownMs.set(node, elapsed());

  const controller = new AbortController();
  const { signal } = controller;
  if (plan.abortMs !== undefined) {
    setTimeout(() => controller.abort("enough"), plan.abortMs);
  }

  let probes: NodeProbe[] = [];
  let reason: string | undefined;
  try {
    probes = await probeNodes(nodes, { ...plan.options, onProbe, signal });
    assertEquals(probes.map(({ node }) => node), nodes);
  } catch (error) {
    if (!signal.aborted) throw error;
    reason = String(error);
  }
  const ms = elapsed();

  if (!plan.takesDescriptors) await Deno.readFile("/dev/null");
  const readMs = elapsed() - ms;

  const after = plan.takesDescriptors ? before : await settledDescriptors();

  return {
    outcomes: probes.map(outcomeOf),
    messages: probes.map(({ failure }) => failure?.message ?? null),
    addresses: probes.map(({ address }) => address),
    statuses: probes.map(({ status }) => status ?? null),
    atMs: nodes.map((node) => knownMs.get(node) ?? NaN),
    ms,
    lateMs: clock.lateMs,
    ...(reason === undefined ? {} : { reason }),
    descriptors: [before, after],
    readMs,
    endedAt: Date.now(),
  };
}

/** Measures how late timers are in all, until its disposal. */
function startClock(): Disposable & { readonly lateMs: number } {
  const everyMs = 50;
  let lateMs = 0;
  let lastMs = performance.now();

  const timer = setInterval(() => {
    const now = performance.now();
    lateMs += Math.max(0, now - lastMs - 2 * everyMs);
    lastMs = now;
  }, everyMs);

  return {
    get lateMs() {
      return lateMs;
    },
    [Symbol.dispose]: () => clearInterval(timer),
  };
}

/** Lets the runtime open, before the first count, what it keeps. */
async function warmUp(): Promise<void> {
  const nowhere = { tailscaleIp: "127.0.0.1" };
  const secure = { dataServerUrl: "https://127.0.0.1:1" };
  const first = new ClusterNode({ name: "first", ...nowhere });
  const second = new ClusterNode({ name: "second", ...secure });

  await probeNodes([first], { port: 1 });
  await probeNodes([second]);
}

/**
 * Counts descriptors once their number has been the same for a while.
 *
 * A read that was under way when its connection was closed gives the descriptor
 * back a moment later.
 */
export async function settledDescriptors(): Promise<number> {
  let count = countDescriptors();
  let unchanged = 0;
  while (unchanged < 4) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    const next = countDescriptors();
    unchanged = next === count ? unchanged + 1 : 0;
    count = next;
  }
  return count;
}

/**
 * Counts the descriptors of this process, or returns 0 where Deno may not look.
 */
export function countDescriptors(): number {
  try {
    return [...Deno.readDirSync("/dev/fd")].length;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return 0;
    throw error;
  }
}

/** Opens files until no descriptor is left. */
export function takeDescriptors(): Deno.FsFile[] {
  const files: Deno.FsFile[] = [];
  try {
    while (true) files.push(Deno.openSync("/dev/null"));
  } catch (error) {
    if (!/os error 24/.test(String(error))) throw error;
  }
  return files;
}

if (import.meta.main) {
  const text = await new Response(Deno.stdin.readable).text();
  const plan: SweepPlan = JSON.parse(text);
  console.log(JSON.stringify(await sweep(plan)));
  if (plan.exits) Deno.exit();
}
