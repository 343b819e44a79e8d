/**
 * `deno task demo`: starts the cluster of config/demo_hosts.yaml on this machine's loopback, and checks it with the real
 * command line. It succeeds if `status` found the broken ones, and nothing else.
 *
 * @module
 */
import { startDemoCluster } from "./loopback_cluster.ts";
import { ROOT } from "./process.ts";

async function demo(): Promise<number> {
  await using _cluster = await startDemoCluster();
  const args = [
    "status",
    "--config",
    "config/demo_hosts.yaml",
    "--timeout",
    "1",
  ];
  console.log(`$ cluster-hosts ${args.join(" ")}`);
  const { code } = await new Deno.Command("deno", {
    args: ["run", "-q", "--no-prompt", "-P=cli", "cli.ts", ...args],
    cwd: ROOT,
    stdout: "inherit",
    stderr: "inherit",
  }).output();
  return code === 1 ? 0 : 1;
}

try {
  Deno.exitCode = await demo();
} catch (error) {
  if (!(error instanceof Deno.errors.AddrInUse)) throw error;
  console.error(`The demo cannot start: ${error.message}`);
  Deno.exitCode = 1;
}
