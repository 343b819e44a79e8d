import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { ClusterNode, probeNode, probeNodes, waitForNodes } from "../mod.ts";
import { startNode } from "./loopback_cluster.ts";
import {
  denoRun,
  nextLine,
  start,
  testUnless,
  writeInventory,
} from "./process.ts";
import { runMain } from "./run_main.ts";
import {
  type Sshd,
  SSHD_ADDRESSES,
  sshdMissing,
  sshdTest,
  startSshd,
} from "./sshd.ts";
import { eventually } from "./ssh_process.ts";

/** A node whose sshd is at a port, with a data server that nobody runs. */
function nodeAt(port: number, tailscaleIp = "127.0.0.1"): ClusterNode {
  return new ClusterNode({
    name: "gpu-1",
    tailscaleIp,
    sshPort: port,
    dataServerPort: 1,
  });
}

sshdTest(
  'probeNode() with check "ssh" reports an sshd as up, at its own port',
  async (sshd) => {
    const node = nodeAt(sshd.port);
    const { state, address, port, failure } = await probeNode(node, {
      check: "ssh",
    });
    assertEquals([state, address, port, failure], [
      "up",
      "127.0.0.1",
      sshd.port,
      undefined,
    ]);
  },
);

const NO_SSHD = [
  ["no server", "refuses", "down", /refused/],
  ["a silent server", "silent", "unhealthy", /timeout/],
  ["a server that hangs up", "closes", "unhealthy", /bad-response/],
  ["a web server", "not-json", "unhealthy", /timeout|bad-response/],
] as const;

for (const [what, behaviour, expected, code] of NO_SSHD) {
  Deno.test(`probeNode() with check "ssh" reports ${what} as ${expected}`, async () => {
    await using server = await startNode(behaviour);
    const { state, failure } = await probeNode(nodeAt(server.port), {
      check: "ssh",
      timeoutMs: 700,
    });
    assertEquals(state, expected);
    assertMatch(failure!.code, code);
  });
}

sshdTest(
  'probeNodes() with check "ssh" races the SSH endpoints of each node',
  async (sshd) => {
    await using dead = await startNode("silent", {
      hostname: "127.0.0.3",
      port: sshd.port,
    });
    const node = new ClusterNode({
      name: "gpu-1",
      sshHost: dead.hostname,
      tailscaleIp: SSHD_ADDRESSES[1],
      sshPort: sshd.port,
    });
    const [probe] = await probeNodes([node], { check: "ssh" });
    assertEquals([probe!.state, probe!.address], ["up", SSHD_ADDRESSES[1]]);
  },
);

sshdTest(
  "cluster-hosts status --ssh checks each node's own sshd",
  async (sshd) => {
    await using dead = await startNode("refuses");
    await using web = await startNode("http-500");
    await using inventory = await writeInventory({
      up: sshd.host,
      down: { ...sshd.host, ssh_port: dead.port },
      web: { ...sshd.host, ssh_port: web.port },
    });
    const args = [
      "status",
      "--ssh",
      "--json",
      "--timeout",
      "2s",
      "--config",
      inventory.path,
    ];
    const { code, stdout, stderr } = await runMain(args);
    assertEquals(code, 1, stderr);
    const { nodes } = JSON.parse(stdout);
    const states = nodes.map((node: Record<string, unknown>) => [
      node.name,
      node.state,
      node.state === "down" ? undefined : node.port,
    ]);
    assertEquals(states.toSorted(), [
      ["down", "down", undefined],
      ["up", "up", sshd.port],
      ["web", "unhealthy", web.port],
    ]);
    const single = await runMain([
      "status",
      "--ssh",
      "up",
      "--config",
      inventory.path,
    ]);
    assertEquals(single.code, 0, single.stdout + single.stderr);
  },
);

for (const command of ["status", "wait"]) {
  Deno.test(`cluster-hosts permissions ${command} --ssh prints the address of the sshd alone`, async () => {
    const host = { tailscale_ip: "127.0.0.1", ssh_port: 2222 };
    await using inventory = await writeInventory({ up: host });
    const args = [command, "--ssh", "--config", inventory.path];
    const { stdout } = await runMain(["permissions", ...args]);
    const flags = stdout.trim().split(" ");
    const net = flags.filter((flag) => flag.startsWith("--allow-net"));
    assertEquals(net, ["--allow-net=127.0.0.1:2222"]);
  });
}

sshdTest(
  "waitForNodes() until down returns when the sshd is gone, and not before",
  async (sshd) => {
    const node = nodeAt(sshd.port);
    let isStopped = false;
    const waiting = waitForNodes([node], {
      check: "ssh",
      until: "down",
      intervalMs: 50,
    }).then((probes) => {
      assert(isStopped, "it returned while the sshd was up");
      return probes;
    });
    // Three greetings are not enough for it.
    await eventually(sshd.connections, (count) => count >= 3);
    isStopped = true;
    await sshd.stop();
    const [probe] = await waiting;
    // A connection that is cut in mid-greeting makes it unhealthy.
    assertMatch(probe!.state, /^(?:down|unhealthy)$/);
  },
);

/** What an operator types, line by line, for a reboot that has begun. */
function rebootLine(name: string, config: string): string {
  const wait = [
    "deno",
    ...denoRun(["-P=cli"], "cli.ts"),
    "wait",
    "--config",
    config,
    "--interval",
    "50ms",
    "--quiet",
    "--ssh",
  ].join(" ");
  return `${wait} --down ${name} && echo down && ${wait} ${name} && echo up`;
}

/** Reboots a machine, and returns what was printed at which of its steps. */
async function reboot(
  sshd: Sshd,
  name: string,
  config: string,
): Promise<string[]> {
  const steps: string[] = [];
  await using shell = start("sh", ["-c", rebootLine(name, config)], {
    limitMs: 60_000,
  });
  const lines = (async () => {
    for (const expected of ["down", "up"]) {
      steps.push(`${await nextLine(shell.stdout)} (${expected} is due)`);
    }
  })();

  // It is asked while it still goes down, and that does not count.
  const before = await sshd.connections();
  await eventually(sshd.connections, (count) => count >= before + 2);
  steps.push("stopped");
  await sshd.stop();
  await eventually(() => Promise.resolve(steps.length), (count) => count >= 2);
  steps.push("started");
  await sshd.restart();
  await lines;

  const { code } = await shell.end();
  return [...steps, `exit code ${code}`];
}

testUnless(
  sshdMissing(),
  "cluster-hosts wait follows a rolling reboot of three machines",
  async () => {
    await using one = await startSshd();
    await using two = await startSshd();
    await using three = await startSshd();
    const machines = { "gpu-1": one, "gpu-2": two, "gpu-3": three };
    const hosts = Object.entries(machines).map(([name, { host }]) =>
      [name, host] as const
    );
    await using inventory = await writeInventory(Object.fromEntries(hosts));

    for (const [name, sshd] of Object.entries(machines)) {
      assertEquals(await reboot(sshd, name, inventory.path), [
        "stopped",
        "down (down is due)",
        "started",
        "up (up is due)",
        "exit code 0",
      ]);
    }
  },
);

sshdTest(
  "cluster-hosts wait --down returns 1 at its deadline while a node is up",
  async (sshd) => {
    await using inventory = await writeInventory({ "gpu-1": sshd.host });
    const args = [
      "wait",
      "--ssh",
      "--down",
      "--timeout",
      "500ms",
      "--interval",
      "100ms",
      "--config",
      inventory.path,
    ];
    const { code, stderr } = await runMain(args);
    assertEquals(code, 1);
    assertMatch(stderr, /gpu-1/);
  },
);
