import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import {
  DEFAULTS,
  didYouMean,
  formatConfigProblem,
  formatMs,
  unsupportedDeno,
} from "../cluster_hosts.ts";
import * as api from "../mod.ts";
import { type ConfigProblem, HostsConfigError } from "../mod.ts";
import { ROOT, run, tempFolder } from "./process.ts";

Deno.test("mod.ts exports the 28 values of the public API, and no other", () => {
  assertEquals(Object.keys(api).toSorted(), [
    "ClusterNode",
    "DATA_SYNC_PORT",
    "DEFAULT_CONFIG_PATH",
    "ELO_SYNC_PORT",
    "HostsConfigError",
    "MODEL_SYNC_PORT",
    "checkHttpEndpoint",
    "checkNodeReachable",
    "discoverReachableNodes",
    "foldNames",
    "getActiveNodes",
    "getClusterNodes",
    "getCoordinatorAddress",
    "getCoordinatorNode",
    "getDataSyncUrls",
    "getEloSyncConfig",
    "getEloSyncUrls",
    "getSyncUrls",
    "loadHostsConfig",
    "parseHostsConfig",
    "probeNode",
    "probeNodes",
    "runOnNodes",
    "selectNodes",
    "sshCommand",
    "validateHostsConfig",
    "waitForNodes",
    "watchNodes",
  ]);
});

/** What the functions take and return. It is the type check that holds it. */
export type PublicTypes = [
  api.ClusterNodeFields,
  api.CommandResult,
  api.ConfigProblem,
  api.ConfigSource,
  api.CoordinatorAddress,
  api.DataSyncUrlOptions,
  api.DiscoverOptions,
  api.EloSyncConfig,
  api.Endpoint,
  api.FailureCode,
  api.HostEntry,
  api.HostsConfig,
  api.LoadOptions,
  api.NodeProbe,
  api.NodeSelection,
  api.NodeState,
  api.ProbeFailure,
  api.ProbeOptions,
  api.ReachableNode,
  api.RunOptions,
  api.SshOptions,
  api.StatusDocument,
  api.SweepOptions,
  api.SyncUrlOptions,
  api.WaitOptions,
  api.WatchOptions,
];

Deno.test("the constants are those of the contract", () => {
  assertEquals(api.ELO_SYNC_PORT, 8766);
  assertEquals(api.DATA_SYNC_PORT, 8766);
  assertEquals(api.MODEL_SYNC_PORT, 8765);
  assertEquals(api.DEFAULT_CONFIG_PATH, "config/distributed_hosts.yaml");

  assertEquals(DEFAULTS, {
    timeoutMs: 5000,
    concurrency: 10_000,
    watchIntervalMs: 5000,
    waitIntervalMs: 2000,
    waitDeadlineMs: 300_000,
    commandConcurrency: 32,
    connectTimeoutMs: 10_000,
    serverAliveSeconds: 15,
  });
});

Deno.test("importing any module needs no permission", async () => {
  await using temp = await tempFolder();
  const script = `${temp.folder}/import.ts`;
  const imports = ["mod.ts", "cluster_hosts.ts", "cli.ts"]
    .map((module) => `await import("${ROOT}${module}");`);
  await Deno.writeTextFile(
    script,
    [...imports, 'console.log("imported");'].join("\n"),
  );

  const config = `${ROOT}deno.json`;
  const args = ["run", "-q", "--no-prompt", "--config", config, script];
  const { stdout, stderr } = await run("deno", args);

  assertEquals(stderr, "");
  assertEquals(stdout, "imported\n");
});

/** A word, the known ones, and the one that was probably meant. */
const MEANT: [word: string, known: string[], meant: string | undefined][] = [
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

for (const [word, known, meant] of MEANT) {
  Deno.test(`didYouMean() of "${word}" among "${known}" returns ${meant}`, () => {
    assertEquals(didYouMean(word, known), meant);
    assertEquals(didYouMean(word, new Set(known).values()), meant);
  });
}

/** A problem, and its line, in which editors find the place. */
const FORMATTED: [problem: ConfigProblem, line: string][] = [
  [{ path: "", message: "is HTML" }, "h.yaml: is HTML"],
  [{ path: "", message: "a tab", line: 3, column: 5 }, "h.yaml:3:5: a tab"],
  [{ path: "", message: "a tab", line: 3 }, "h.yaml:3: a tab"],
  [{ path: "hosts.a", message: "is odd" }, "h.yaml: hosts.a: is odd"],
  [
    { path: "hosts.a", message: "is odd", line: 3, column: 5 },
    "h.yaml:3: hosts.a: is odd",
  ],
];

for (const [problem, line] of FORMATTED) {
  Deno.test(`formatConfigProblem() returns "${line}"`, () => {
    assertEquals(formatConfigProblem(problem, "h.yaml"), line);
  });
}

Deno.test("HostsConfigError has every problem, and a line of each in its message", () => {
  const problems = [
    { path: "hosts.a.ssh_port", message: "one", line: 3 },
    { path: "", message: "two" },
  ];
  const cause = new Error("deeper");
  const error = new HostsConfigError("h.yaml", problems, { cause });

  assert(error instanceof Error);
  assertEquals(error.name, "HostsConfigError");
  assertEquals(error.cause, cause);
  assertEquals(error.problems, problems);
  assertEquals(
    error.message,
    "h.yaml:3: hosts.a.ssh_port: one\nh.yaml: two",
  );
});

Deno.test("parseHostsConfig() calls a text without an origin inventory", () => {
  assertThrows(
    () => api.parseHostsConfig("- a"),
    HostsConfigError,
    "inventory: ",
  );
});

/** Milliseconds as they stand in a sentence. */
const DURATIONS: [ms: number, text: string][] = [
  [1, "1 ms"],
  [250, "250 ms"],
  [999.4, "999 ms"],
  [1000, "1 s"],
  [1500, "1.5 s"],
  [60_000, "60 s"],
];

for (const [ms, text] of DURATIONS) {
  Deno.test(`formatMs() of ${ms} returns "${text}"`, () => {
    assertEquals(formatMs(ms), text);
  });
}

/** The versions on which a check would hang or crash, or an ssh would prompt. */
const VERSIONS: [version: string, isSupported: boolean][] = [
  ["1.46.3", false],
  ["2.0.0", false],
  ["2.2.12", false],
  ["2.3.0", false],
  ["2.8.2", false],
  ["2.8.3", false],
  ["2.8.4", false],
  ["2.9.0", true],
  ["2.9.6", true],
  ["2.10.0", true],
  ["3.0.0", true],
];

for (const [version, isSupported] of VERSIONS) {
  const answer = isSupported ? "accepts" : "reports";

  Deno.test(`unsupportedDeno() ${answer} ${version}`, () => {
    const fault = unsupportedDeno(version);
    assertEquals(fault === undefined, isSupported);
    if (fault === undefined) return;

    assert(fault.includes(version), fault);
    assert(/use Deno 2\.9 or later/.test(fault), fault);
    assert(!fault.includes("\n"), fault);
  });
}

Deno.test("unsupportedDeno() accepts the Deno that runs the tests", () => {
  assertEquals(unsupportedDeno(), undefined);
});
