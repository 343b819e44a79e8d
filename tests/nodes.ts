/**
 * Nodes at servers of this machine, and what became of them.
 *
 * @module
 */
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
