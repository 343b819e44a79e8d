/**
 * `deno task soak`: 200 sweeps of 200 nodes, healthy and broken, in one process. It fails if descriptors or memory grow by
 * more than a fifth between the tenth sweep and the last. The task's flags let it collect garbage, and fix the size of
 * V8's nursery, which would grow by itself.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, probeNodes } from "../mod.ts";
import { type Behaviour, startNode } from "./loopback_cluster.ts";
import { run } from "./process.ts";

const SWEEPS = 200;
const NODES = 200;
const GROWTH = 1.2;

const BEHAVIOURS: readonly Behaviour[] = [
  "ok",
  "ok",
  "ok",
  "refuses",
  "silent",
  "black-hole",
  "http-500",
  "trickle-body",
  "length-long",
  "reset",
];

interface Usage {
  readonly descriptors: number;
  readonly rssMb: number;
  readonly heapMb: number;
}

async function usage(): Promise<Usage> {
  // Neither connections that the nodes have yet to close nor garbage are a leak.
  await delay(300);
  (globalThis as { gc?: () => void }).gc?.();
  const { rss, heapUsed } = Deno.memoryUsage();
  // Deno itself may read /proc/self only with every permission.
  const { stdout } = await run("sh", ["-c", "ls /proc/$PPID/fd | wc -l"]);
  return {
    descriptors: Number(stdout),
    rssMb: rss / 2 ** 20,
    heapMb: heapUsed / 2 ** 20,
  };
}

async function soak(): Promise<number> {
  await using servers = new AsyncDisposableStack();
  const ports: number[] = [];
  for (const behaviour of BEHAVIOURS) ports.push(servers.use(await startNode(behaviour)).port);
  const nodes = Array.from({ length: NODES }, (_, index) =>
    new ClusterNode({
      name: `node-${index}`,
      tailscaleIp: "127.0.0.1",
      dataServerPort: ports[index % ports.length]!,
    }));

  let tenth: Usage | undefined;
  let last: Usage | undefined;
  for (let sweep = 1; sweep <= SWEEPS; sweep++) {
    const probes = await probeNodes(nodes, { timeoutMs: 150 });
    const up = probes.filter(({ state }) => state === "up").length;
    if (up === 0) throw new Error(`No node was up in sweep ${sweep}`);
    if (sweep !== 10 && sweep !== SWEEPS) continue;
    last = await usage();
    tenth ??= last;
    const { descriptors, rssMb, heapMb } = last;
    console.log(
      `sweep ${String(sweep).padStart(3)}: ${up} of ${NODES} up, ${descriptors} descriptors, ` +
        `${rssMb.toFixed(1)} MB RSS, ${heapMb.toFixed(1)} MB heap`,
    );
  }
  const grown = (["descriptors", "rssMb", "heapMb"] as const).filter((key) => last![key] > GROWTH * tenth![key]);
  if (grown.length > 0) console.error(`Grown by more than a fifth: ${grown.join(", ")}`);
  return grown.length > 0 ? 1 : 0;
}

Deno.exitCode = await soak();
