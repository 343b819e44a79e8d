/**
 * Prints how many milliseconds one piece of work takes in this process, which
 * is as new as that of its peer. Arguments: the work, the folder of a checkout
 * and, for `load` and `parse`, the path of an inventory.
 *
 * @module
 */
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

const [work = "", root = "", path = ""] = Deno.args;
const { ClusterNode, getClusterNodes, selectNodes } = await import(
  `${root}/mod.ts`
);

function manyNodes(): { readonly name: string }[] {
  return Array.from(
    { length: 100_000 },
    (_, index) => new ClusterNode({ name: `gpu-${index}`, gpu: "H100" }),
  );
}

/** Prepares a piece of work, and returns what is measured. */
const WORKS: Readonly<Record<string, () => () => unknown>> = {
  load: () => () => getClusterNodes(path),
  parse: () => async () => parse(await Deno.readTextFile(path)),
  select() {
    const nodes = manyNodes();
    const names = ["gpu-[1-50000]", "gpu-?????", "gpu-7*"];
    const selection = { names, exclude: ["gpu-9*"], gpus: ["h100"] };
    return () => selectNodes(nodes, selection);
  },
  pass() {
    const nodes = manyNodes();
    return () => nodes.filter(({ name }) => /^gpu-(\d+)$/.test(name));
  },
};

const measured = WORKS[work]!();
const startedMs = performance.now();
await measured();
console.log(performance.now() - startedMs);
