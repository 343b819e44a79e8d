/**
 * A cluster with the worst names there are, for the snapshots of tables.
 *
 * @module
 */
import { hostAt, manyHosts } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { writeInventory } from "./process.ts";

/**
 * The names that are not as wide as they are long, with the columns that they
 * take: 漢字 four, 🚀 two, é one, ㄅㄆ four, ꀀ two.
 */
const WIDTHS: Readonly<Record<string, number>> = {
  "漢字-1": 6,
  "🚀gpu-2": 7,
  "cafe\u0301": 4,
  "👩‍💻": 2,
  "ㄅㄆ": 4,
  "ꀀ-yi": 5,
};

/** A name as people give them where nobody reads tables. */
const LONG = "training-worker.rack-07.dc1.example";

/** Counts the columns that a text of these names takes. */
export function widthOf(text: string): number {
  let plain = text;
  for (const [name, width] of Object.entries(WIDTHS)) {
    plain = plain.replaceAll(name, "x".repeat(width));
  }
  return plain.length;
}

/** Starts the nodes, and writes their inventory. */
export async function startMixed() {
  await using stack = new AsyncDisposableStack();

  const up = stack.use(await startNode("ok"));
  const dead = stack.use(await startNode("refuses"));
  const sick = stack.use(await startNode("http-500"));
  const worker = { role: "worker" };

  const inventory = stack.use(
    await writeInventory({
      "漢字-1": hostAt(up, { ...worker, gpu: "RTX 5090" }),
      "🚀gpu-2": hostAt(dead, { ...worker, gpu: "H100" }),
      "cafe\u0301": hostAt(sick, worker),
      "👩‍💻": hostAt(up, worker),
      "ㄅㄆ": hostAt(up, worker),
      "ꀀ-yi": hostAt(dead, worker),
      [LONG]: hostAt(sick, { ...worker, gpu: "GH200" }),
      "plain": {},
      "gone": hostAt(dead, {
        ...worker,
        status: "retired",
        note: "sold in 2024, its disks are in the archive",
      }),
    }),
  );

  const ports = [up, dead, sick].map(({ port }) => port).join("|");
  const held = stack.move();
  return {
    path: inventory.path,
    /** Replaces what differs from run to run by something as wide. */
    stable: (text: string) =>
      text.replaceAll(inventory.path, "hosts.yaml")
        .replace(new RegExp(`\\b(${ports})\\b`, "g"), "18760")
        .replace(/\d+\.\d\d s/g, "N s")
        .replace(/ *(\d+(\.\d)?) ms/g, (it) => "N ms".padStart(it.length)),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Starts nodes whose names cannot be folded into little, of three outcomes. */
export async function startScattered() {
  await using stack = new AsyncDisposableStack();

  const up = stack.use(await startNode("ok"));
  const dead = stack.use(await startNode("refuses"));
  const hosts = {
    "head": hostAt(up),
    ...manyHosts(12, hostAt(up)),
    "gpu-3": hostAt(dead),
    "storage.dc1": hostAt(dead),
    "storage.dc2": hostAt(dead),
    "eval-a100-west": hostAt(dead),
    "gateway-frankfurt": {},
  };
  const { path } = stack.use(await writeInventory(hosts));

  const held = stack.move();
  return { path, [Symbol.asyncDispose]: () => held.disposeAsync() };
}
