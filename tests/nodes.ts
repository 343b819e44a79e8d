/**
 * Nodes at servers of this machine, and what became of them.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, type NodeProbe } from "../mod.ts";
import { at, outcomeOf } from "./sweep_process.ts";

/** Returns the nodes of these names, each at its server. */
export function nodesAt(
  servers: Readonly<Record<string, { hostname: string; port: number }>>,
): ClusterNode[] {
  return Object.entries(servers).map(([name, server]) => {
    return new ClusterNode({ name, ...at(server) });
  });
}

/** Returns the outcome of each node by its name. */
export function byName(probes: Iterable<NodeProbe>): Record<string, string> {
  const outcomes = Array.from(probes, (probe) => {
    return [probe.node.name, outcomeOf(probe)];
  });
  return Object.fromEntries(outcomes);
}

/** What aborts a call, or is thrown by a callback of it. */
export const REASON = new Error("enough");

/** Callbacks that fail with {@linkcode REASON}, in each way. */
export const FAILING_CALLBACKS: Readonly<
  Record<string, () => void | Promise<void>>
> = {
  "throws": () => {
    throw REASON;
  },
  "returns a promise that rejects": () => Promise.reject(REASON),
  "rejects later": async () => {
    await delay(20);
    throw REASON;
  },
};
