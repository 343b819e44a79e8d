/**
 * An hour's worth of events in a minute (`deno task soak`).
 *
 * In a process that may have 128 descriptors: 200 sweeps each over nodes that
 * refuse, that are black holes, that stall amid TLS and amid HTTP, and at last
 * sweeps of more nodes than there are descriptors. It fails unless every state
 * was right, and descriptors, memory and the rate at the end are as at the
 * start.
 *
 * @module
 */
import { ClusterNode, probeNodes } from "../mod.ts";
import { type Behaviour, startNode } from "./loopback_cluster.ts";
import { denoRun, start } from "./process.ts";
import {
  at,
  outcomeOf,
  settledDescriptors,
  tally,
  withDescriptors,
} from "./sweep_process.ts";

const DESCRIPTORS = 128;
const LIMIT_MS = 300_000;

/** The last sweeps of a kind may take this much longer than the first. */
const SLOWER = 1.5;
const SLOWER_MS = 30;

/** The last memory may be this much more than that after the warm-up. */
const GROWTH = 1.2;

/**
 * Lets it collect garbage, and fixes the size of V8's nursery, which would grow
 * by itself.
 */
const V8_FLAGS =
  "--v8-flags=--expose-gc,--min-semi-space-size=16,--max-semi-space-size=16";

/** The servers of the soak: the port of each. */
type Ports = Readonly<
  Record<"ok" | "refuses" | "black-hole" | "silent", number>
>;

/** One kind of sweep. */
interface Kind {
  readonly name: string;
  readonly sweeps: number;
  readonly timeoutMs: number;
  readonly nodes: readonly ClusterNode[];

  /** How many nodes have each outcome. */
  readonly outcomes: Readonly<Record<string, number>>;
}

const NODES = 40;

function kindsOf(ports: Ports): Kind[] {
  const refused = nodesAt(ports.refuses, NODES);
  const holes = nodesAt(ports["black-hole"], NODES);
  const stalledHttp = nodesAt(ports.silent, NODES);
  const stalledTls = nodesBehindTls(ports.silent, NODES);
  const up = nodesAt(ports.ok, 5 * NODES);

  return [
    {
      name: "refused",
      sweeps: 200,
      timeoutMs: 5000,
      nodes: refused,
      outcomes: { "down refused": NODES },
    },
    {
      name: "black holes",
      sweeps: 200,
      timeoutMs: 60,
      nodes: holes,
      outcomes: { "down timeout": NODES },
    },
    {
      name: "stalled TLS",
      sweeps: 200,
      timeoutMs: 60,
      nodes: stalledTls,
      outcomes: { "unhealthy timeout": NODES },
    },
    {
      name: "stalled HTTP",
      sweeps: 200,
      timeoutMs: 60,
      nodes: stalledHttp,
      outcomes: { "unhealthy timeout": NODES },
    },
    {
      name: "all at once, with too few descriptors",
      sweeps: 20,
      timeoutMs: 1000,
      nodes: [...refused, ...holes, ...stalledTls, ...stalledHttp, ...up],
      outcomes: {
        "down refused": NODES,
        "down timeout": NODES,
        "unhealthy timeout": 2 * NODES,
        "up": 5 * NODES,
      },
    },
  ];
}

function nodesAt(port: number, count: number): ClusterNode[] {
  const server = at({ hostname: "127.0.0.1", port });
  return Array.from({ length: count }, (_, index) => {
    return new ClusterNode({ name: `${port}-${index}`, ...server });
  });
}

function nodesBehindTls(port: number, count: number): ClusterNode[] {
  const dataServerUrl = `https://127.0.0.1:${port}`;
  return Array.from({ length: count }, (_, index) => {
    return new ClusterNode({ name: `tls-${index}`, dataServerUrl });
  });
}

/** Sweeps a kind once; returns how long it took, and what was wrong. */
async function sweep(
  { nodes, timeoutMs, outcomes }: Kind,
): Promise<{ ms: number; problem: string | undefined }> {
  const started = performance.now();
  const probes = await probeNodes(nodes, { timeoutMs });
  const ms = performance.now() - started;

  const counts = tally(probes.map(outcomeOf));
  const isRight = Object.entries(outcomes).every(([outcome, count]) => {
    return counts[outcome] === count;
  });
  return { ms, problem: isRight ? undefined : JSON.stringify(counts) };
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)]!;
}

function heapMb(): number {
  (globalThis as { gc?: () => void }).gc?.();
  return Deno.memoryUsage().heapUsed / 2 ** 20;
}

/** Sweeps a kind as often as it wants; returns the problems that it found. */
async function soakKind(kind: Kind): Promise<string[]> {
  const problems: string[] = [];
  // What the runtime opens once is no leak.
  await sweep(kind);
  const before = { descriptors: await settledDescriptors(), heap: heapMb() };

  const times: number[] = [];
  for (let index = 0; index < kind.sweeps; index++) {
    const { ms, problem } = await sweep(kind);
    times.push(ms);
    if (problem) problems.push(`sweep ${index}: ${problem}`);
  }

  const descriptors = await settledDescriptors();
  const heap = heapMb();
  const tenth = Math.ceil(kind.sweeps / 10);
  const first = median(times.slice(0, tenth));
  const last = median(times.slice(-tenth));
  console.log(
    `${kind.name}: ${kind.sweeps} sweeps of ${kind.nodes.length} nodes, ` +
      `${before.descriptors} to ${descriptors} descriptors, ` +
      `${before.heap.toFixed(1)} to ${heap.toFixed(1)} MB, ` +
      `${first.toFixed()} to ${last.toFixed()} ms a sweep`,
  );

  if (descriptors > before.descriptors) problems.push("descriptors are left");
  if (heap > GROWTH * before.heap) problems.push("the heap grew");
  if (last > SLOWER * first + SLOWER_MS) problems.push("it became slower");
  return problems.map((problem) => `${kind.name}: ${problem}`);
}

/** Runs all sweeps in this process. */
async function soak(ports: Ports): Promise<number> {
  const kinds = kindsOf(ports);
  // The first https check loads modules, and keeps what they open.
  for (const kind of kinds) await sweep(kind);

  const problems: string[] = [];
  for (const kind of kinds) problems.push(...await soakKind(kind));

  for (const problem of problems) console.log(problem);
  console.log(problems.length === 0 ? "soak: all is well" : "soak: FAILED");
  return problems.length === 0 ? 0 : 1;
}

/**
 * Starts the servers, and the process with few descriptors that sweeps them.
 */
async function soakElsewhere(): Promise<number> {
  await using servers = new AsyncDisposableStack();
  const portOf = async (behaviour: Behaviour) => {
    return servers.use(await startNode(behaviour)).port;
  };
  const ports: Ports = {
    "ok": await portOf("ok"),
    "refuses": await portOf("refuses"),
    "black-hole": await portOf("black-hole"),
    "silent": await portOf("silent"),
  };

  const [program, ...args] = [
    ...withDescriptors(DESCRIPTORS),
    "deno",
    ...denoRun(["-A", V8_FLAGS], "tests/soak.ts"),
    JSON.stringify(ports),
  ];
  await using running = start(program!, args, { limitMs: LIMIT_MS });
  for await (const line of running.stdout) console.log(line);
  const { code, stderr } = await running.end();
  for (const line of stderr) console.error(line);
  return code;
}

if (import.meta.main) {
  const [ports] = Deno.args;
  Deno.exitCode = ports ? await soak(JSON.parse(ports)) : await soakElsewhere();
}
