/**
 * Small clusters on loopback with their inventories, and what the tests of the
 * command line say again and again.
 *
 * @module
 */
import { assertEquals } from "jsr:@std/assert@^1.0.19";
import { type Behaviour, startNode } from "./loopback_cluster.ts";
import { writeInventory } from "./process.ts";
import { type MainOptions, type MainResult, runMain } from "./run_main.ts";

export type Hosts = Record<string, Record<string, unknown>>;

/** Returns the entry of a host at a port of 127.0.0.1. */
export function hostAt(
  { port, hostname = "127.0.0.1" }: { port: number; hostname?: string },
  fields: Record<string, unknown> = {},
): Record<string, unknown> {
  return {
    tailscale_ip: hostname,
    data_server_port: port,
    status: "active",
    ...fields,
  };
}

/** Returns many hosts, `prefix-1` and on, of one entry. */
export function manyHosts(
  count: number,
  entry: Record<string, unknown>,
  prefix = "gpu",
): Hosts {
  const names = Array.from({ length: count }, (_, it) => `${prefix}-${it + 1}`);
  return Object.fromEntries(names.map((name) => [name, entry]));
}

/** Runs a command on an inventory in YAML, which comes on stdin. */
export async function runOnYaml(
  stdin: string,
  args: readonly string[],
  options: MainOptions = {},
): Promise<MainResult> {
  const end = args.indexOf("--");
  const at = end < 0 ? args.length : end;
  return await runMain(args.toSpliced(at, 0, "--config", "-"), {
    ...options,
    stdin,
  });
}

/** Runs a command on an inventory of these hosts, which comes on stdin. */
export async function runOnHosts(
  hosts: Hosts,
  args: readonly string[],
  options: MainOptions = {},
): Promise<MainResult> {
  return await runOnYaml(JSON.stringify({ hosts }), args, options);
}

/** Asserts that a line was refused with one message, and printed nothing else. */
export function assertRefused(
  { code, stdout, stderr }: MainResult,
  message: string,
  what?: string,
): void {
  assertEquals(
    { code, stdout, stderr },
    { code: 2, stdout: "", stderr: `cluster-hosts: ${message}\n` },
    what,
  );
}

/** Leaves out times, and blanks that only align. */
export function stable(text: string): string {
  return text
    .replace(/\d+(\.\d\d)? s\b/g, "N s")
    .replace(/ \d+(\.\d)? ms/g, "  N ms")
    .replace(/ {2,}/g, "  ");
}

/** Starts nodes of several kinds at ports of their own, and writes their inventory. */
export async function startCluster() {
  await using stack = new AsyncDisposableStack();

  const host = async (
    behaviour: Behaviour,
    fields: Record<string, unknown>,
  ) => {
    const options = { hostname: "127.0.0.2" };
    const { hostname, port } = stack.use(await startNode(behaviour, options));
    return {
      tailscale_ip: hostname,
      data_server_port: port,
      status: "active",
      role: "worker",
      ...fields,
    };
  };

  const hosts = {
    "head": await host("ok", { role: "coordinator" }),
    "gpu-1": await host("ok", { gpu: "H100", rack: 7 }),
    "gpu-2": await host("refuses", { gpu: "A100", rack: 8 }),
    "gpu-3": await host("http-500", { gpu: "A100", rack: 8 }),
    "old-1": await host("ok", { gpu: "V100", status: "retired" }),
  };
  const port = hosts.head.data_server_port;
  const elo_sync = { coordinator: "head", sync_port: port };
  const { path } = stack.use(await writeInventory(hosts, { elo_sync }));

  const held = stack.move();
  return {
    hosts,
    path,
    port,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}
