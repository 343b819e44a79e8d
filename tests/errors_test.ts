import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import * as api from "../mod.ts";
import { type ConfigProblem, didYouMean, formatConfigProblem, HostsConfigError, unsupportedDeno } from "../mod.ts";
import { ROOT, run, tempFolder } from "./process.ts";

Deno.test("mod.ts exports the public API", () => {
  assertEquals(Object.keys(api).toSorted(), [
    "ClusterNode",
    "DATA_SYNC_PORT",
    "DEFAULTS",
    "DEFAULT_CONFIG_PATH",
    "ELO_SYNC_PORT",
    "HostsConfigError",
    "MODEL_SYNC_PORT",
    "checkHttpEndpoint",
    "checkNodeReachable",
    "dataEndpoints",
    "didYouMean",
    "discoverReachableNodes",
    "endpointUrl",
    "findSshEndpoint",
    "foldNames",
    "formatConfigProblem",
    "getActiveNodes",
    "getClusterNodes",
    "getCoordinatorAddress",
    "getCoordinatorNode",
    "getDataSyncUrls",
    "getEloSyncConfig",
    "getEloSyncUrls",
    "getSyncUrls",
    "hostPort",
    "loadHostsConfig",
    "missingNetFlag",
    "netFlag",
    "parseHostsConfig",
    "probeNode",
    "probeNodes",
    "racedSshEndpoints",
    "readHostsConfig",
    "readVariable",
    "readsUnifiedConfig",
    "runOnNodes",
    "selectNodes",
    "spawnSsh",
    "sshCommand",
    "sshEndpoints",
    "statusPath",
    "unsupportedDeno",
    "validateHostsConfig",
    "waitForNodes",
    "watchNodes",
  ]);
});

Deno.test("mod.ts exports the types that its functions take and give", async () => {
  const source = await Deno.readTextFile(`${ROOT}mod.ts`);
  const types = /^export type \{([^}]+)\}/m.exec(source)![1]!.split(",").map((name) => name.trim()).filter(Boolean);
  const promised = "ClusterNodeFields CommandResult ConfigProblem ConfigSource CoordinatorAddress DataSyncUrlOptions " +
    "DiscoverOptions EloSyncConfig Endpoint FailureCode HostEntry HostsConfig HostsConfigText LoadOptions NodeProbe " +
    "NodeSelection NodeState ProbeFailure ProbeOptions ReachableNode RunOptions SshOptions StatusDocument " +
    "SweepOptions SyncUrlOptions WaitOptions WatchOptions";
  assertEquals(promised.split(" ").filter((name) => !types.includes(name)), []);
});

Deno.test("the constants are what the contract says", () => {
  assertEquals([api.ELO_SYNC_PORT, api.DATA_SYNC_PORT, api.MODEL_SYNC_PORT], [8766, 8766, 8765]);
  assertEquals(api.DEFAULT_CONFIG_PATH, "config/distributed_hosts.yaml");
  assertEquals(api.DEFAULTS, {
    timeoutMs: 5000,
    concurrency: 10_000,
    watchIntervalMs: 5000,
    waitIntervalMs: 2000,
    waitDeadlineMs: 300_000,
    commandTimeoutMs: 60_000,
    commandConcurrency: 32,
    connectTimeoutMs: 10_000,
  });
});

Deno.test("importing any module needs no permission", async () => {
  await using temp = await tempFolder();
  const script = `${temp.folder}/import.ts`;
  const modules = ["mod.ts", "cluster_hosts.ts", "cli.ts"].map((module) => `await import("${ROOT}${module}");`);
  await Deno.writeTextFile(script, `${modules.join("\n")}\nconsole.log("imported");`);
  const { stdout, stderr } = await run("deno", ["run", "-q", "--no-prompt", "--config", `${ROOT}deno.json`, script]);
  assertEquals([stdout, stderr], ["imported\n", ""]);
});

Deno.test("didYouMean() gives the word in another case, one edit away, or begun by three letters or more", () => {
  const cases: [word: string, known: string[], meant: string | undefined][] = [
    ["GPU-1", ["gpu-1"], "gpu-1"],
    ["sttaus", ["nodes", "status"], "status"],
    ["statu", ["status"], "status"],
    ["statuss", ["status"], "status"],
    ["stotus", ["status"], "status"],
    ["Stauts", ["status"], "status"],
    ["coord", ["status", "coordinator"], "coordinator"],
    ["VAL", ["validate"], "validate"],
    // One edit counts for more than a beginning.
    ["node", ["node-list", "nodes"], "nodes"],
    ["va", ["validate"], undefined],
    ["sstattus", ["status"], undefined],
    ["help", ["status", "nodes"], undefined],
    ["status", ["stats", "status"], undefined],
    ["", ["status"], undefined],
    ["x", [], undefined],
  ];
  for (const [word, known, meant] of cases) assertEquals(didYouMean(word, known), meant, `${word} in ${known}`);
  assertEquals(didYouMean("gpu1", new Set(["head", "gpu-1"]).values()), "gpu-1");
});

Deno.test("formatConfigProblem() gives one line with the place as editors know it", () => {
  const cases: [problem: ConfigProblem, text: string][] = [
    [{ path: "", message: "is HTML" }, "h.yaml: is HTML"],
    [{ path: "", message: "a tab", line: 3, column: 5 }, "h.yaml:3:5: a tab"],
    [{ path: "", message: "a tab", line: 3 }, "h.yaml:3: a tab"],
    [{ path: "hosts.a", message: "has no address" }, "h.yaml: hosts.a: has no address"],
    [{ path: "hosts.a", message: "has no address", line: 3, column: 5 }, "h.yaml:3: hosts.a: has no address"],
  ];
  for (const [problem, text] of cases) assertEquals(formatConfigProblem(problem, "h.yaml"), text);
});

Deno.test("HostsConfigError holds every problem, and has a line for each", () => {
  const problems = [{ path: "hosts.a.ssh_port", message: "one", line: 3 }, { path: "", message: "two" }];
  const cause = new Error("deeper");
  const error = new HostsConfigError("h.yaml", problems, { cause });
  assert(error instanceof Error);
  assertEquals([error.name, error.cause, error.problems], ["HostsConfigError", cause, problems]);
  assertEquals(error.message, "h.yaml:3: hosts.a.ssh_port: one\nh.yaml: two");
  assertThrows(() => api.parseHostsConfig("- a"), HostsConfigError, "inventory: ");
});

Deno.test("unsupportedDeno() knows on which versions a check would hang or crash", () => {
  const cases: [version: string, isSupported: boolean][] = [
    ["1.46.3", false],
    ["2.0.0", false],
    ["2.2.12", false],
    ["2.3.0", true],
    ["2.8.2", true],
    ["2.8.3", false],
    ["2.8.4", true],
    ["2.9.6", true],
    ["2.10.0", true],
    ["3.0.0", true],
  ];
  for (const [version, isSupported] of cases) {
    const fault = unsupportedDeno(version);
    assertEquals(fault === undefined, isSupported, version);
    if (fault !== undefined) assert(fault.includes(version) && fault.includes("2.3") && !fault.includes("\n"), fault);
  }
  assertEquals(unsupportedDeno(), undefined, "this very Deno");
});
