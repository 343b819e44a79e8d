import { assert, assertEquals, assertGreaterOrEqual, assertLess, assertLessOrEqual } from "jsr:@std/assert@^1.0.19";
import type { ClusterNodeFields } from "../mod.ts";
import { dropPackets, type Netns, netnsMissing, type NetnsOptions, startNetns } from "./netns.ts";
import { nextLine, ROOT, start, testUnless, writeInventory } from "./process.ts";
import { copies, SLACK_MS, sweepElsewhere, tally } from "./sweep_process.ts";

const NO_NETNS = netnsMissing();
const PORT = 8766;

/** Makes a network, with servers in it: `BEHAVIOUR=HOST:PORT` each. */
async function startNetwork(servers: readonly string[], options: NetnsOptions): Promise<Netns> {
  await using stack = new AsyncDisposableStack();
  const netns = stack.use(await startNetns(options));
  const args = [...netns.enter.slice(1), "deno", "run", "-q", "-A", "--config", `${ROOT}deno.json`];
  const program = stack.use(start(netns.enter[0]!, [...args, `${ROOT}tests/loopback_cluster.ts`, ...servers]));
  assertEquals(await nextLine(program.stdout), "started");
  const held = stack.move();
  return { ...netns, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

testUnless(
  NO_NETNS,
  "probeNodes() finds 997 of 1,000 nodes at 5 % packet loss, and tells of the others a timeout",
  async () => {
    await using network = await startNetwork([`ok=0.0.0.0:${PORT}`], { setup: dropPackets(0.05) });
    const nodes = Array.from({ length: 1000 }, (_, index) => ({
      name: `gpu-${index}`,
      tailscaleIp: `127.1.${index >> 8}.${index & 255}`,
    }));
    const { outcomes } = await sweepElsewhere({ nodes, options: {} }, { enter: network.enter });
    const { up = 0, "down timeout": unconnected = 0, "unhealthy timeout": unanswered = 0 } = tally(outcomes);
    assertGreaterOrEqual(up, 997, JSON.stringify(tally(outcomes)));
    assertEquals(up + unconnected + unanswered, 1000, JSON.stringify(tally(outcomes)));
  },
);

const [LIVE4, DEAD4, LIVE6, DEAD6] = ["10.7.0.7", "10.7.0.6", "fd07::7", "fd07::6"];
const IPV6 = [
  `ip addr add ${LIVE6}/128 dev lo`,
  `ip addr add ${DEAD6}/128 dev lo`,
  `ip6tables -A INPUT -d ${DEAD6} -j DROP`,
]
  .join(" && ");
const TWO_ADDRESSES: Readonly<Record<string, readonly string[]>> = {
  "dead4-live4": [DEAD4, LIVE4],
  "live4-dead4": [LIVE4, DEAD4],
  "dead6-live6": [DEAD6, LIVE6],
  "live6-dead6": [LIVE6, DEAD6],
  "dead6-live4": [DEAD6, LIVE4],
  "live4-dead6": [LIVE4, DEAD6],
  "dead4-live6": [DEAD4, LIVE6],
  "live6-dead4": [LIVE6, DEAD4],
};

testUnless(
  NO_NETNS ?? netnsMissing(IPV6),
  "probeNodes() reaches a name of which one address is a black hole, in any order and family",
  async () => {
    const setup = [
      `ip addr add ${LIVE4}/32 dev lo`,
      `ip addr add ${DEAD4}/32 dev lo`,
      `iptables -A INPUT -d ${DEAD4} -j DROP`,
      IPV6,
    ];
    const names = Object.keys(TWO_ADDRESSES);
    const hosts = Object.entries(TWO_ADDRESSES).flatMap(([name, addresses]) => addresses.map((it) => `${it} ${name}`));
    await using network = await startNetwork(
      [`ok=${LIVE4}:${PORT}`, `ok=[${LIVE6}]:${PORT}`],
      { setup: setup.join("\n"), files: { "/etc/hosts": `127.0.0.1 localhost\n${hosts.join("\n")}\n` } },
    );
    const nodes = names.map((tailscaleIp) => ({ name: tailscaleIp, tailscaleIp }));
    const byName = `--allow-net=${names.map((name) => `${name}:${PORT}`).join(",")}`;
    for (const flags of [["-A"], [byName, "--allow-read"]]) {
      for (const check of ["http", "tcp"] as const) {
        const plan = { nodes, options: { timeoutMs: 2000, check } };
        const { outcomes, addresses } = await sweepElsewhere(plan, { enter: network.enter, flags });
        const found = Object.fromEntries(
          nodes.map(({ name }, index) => [name, `${outcomes[index]} ${addresses[index]}`]),
        );
        assertEquals(found, Object.fromEntries(names.map((name) => [name, `up ${name}`])), `${check} ${flags[0]}`);
      }
    }
  },
);

const SILENT_RESOLVER: NetnsOptions = {
  setup: "iptables -A INPUT -p udp --dport 53 -j DROP",
  files: {
    "/etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:4 attempts:1\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
    "/etc/hosts": "127.0.0.1 localhost healthy\n",
  },
};

testUnless(
  NO_NETNS,
  "names whose lookup hangs hold up no address and no file, and no name is down that never got its turn",
  async () => {
    await using network = await startNetwork([`ok=0.0.0.0:${PORT}`], SILENT_RESOLVER);
    const hanging = (count: number) =>
      copies(count, {}).map(({ name }): ClusterNodeFields => ({ name, tailscaleIp: `${name}.invalid` }));
    const addresses = copies(10, { tailscaleIp: "127.0.0.2" });
    const timeoutMs = 1000;
    const sweep = async (count: number, healthy: number) => {
      const names = copies(healthy, { tailscaleIp: "healthy" });
      const plan = { nodes: [...hanging(count), ...addresses, ...names], options: { timeoutMs }, exits: true };
      const { outcomes, atMs } = await sweepElsewhere(plan, { enter: network.enter });
      for (const ms of atMs.slice(count, count + 10)) assertLess(ms, SLACK_MS);
      const parts = [outcomes.slice(0, count), outcomes.slice(count, count + 10), outcomes.slice(count + 10)];
      return parts.map(tally);
    };

    const [hung = {}, byAddress, byName = {}] = await sweep(40, 10);
    assertEquals(byAddress, { up: 10 });
    const { up = 0, "unknown local-resource": untried = 0, ...otherwise } = byName;
    assertEquals([up + untried, otherwise], [10, {}]);
    const { "down timeout": tried = 0, "unknown local-resource": waiting = 0, ...others } = hung;
    assertEquals([tried + waiting, others], [40, {}]);
    // The bound leaves the runtime threads for its files.
    assert(tried > 0 && tried < 32, `${tried} lookups at once`);

    // Each lookup that ends gives its turn on.
    assertEquals(await sweep(5, 100), [{ "down timeout": 5 }, { up: 10 }, { up: 100 }]);
  },
);

testUnless(NO_NETNS, "the command line ends at its deadline while a lookup hangs", async () => {
  await using network = await startNetns(SILENT_RESOLVER);
  await using inventory = await writeInventory({ hanging: { tailscale_ip: "node.invalid" } });
  const args = ["run", "-q", "-P=cli", "cli.ts", "status", "--config", inventory.path, "--timeout", "1"];
  const { code, stdout, stderr, ms } = await network.run("deno", args);
  assertEquals(code, 1, stderr);
  assert(/hanging .*down.* timeout/.test(stdout), stdout);
  assertLessOrEqual(ms, 1000 + 2 * SLACK_MS);
});

testUnless(NO_NETNS, "probeNodes() tells of routes and firewalls that lead nowhere: down unreachable", async () => {
  const setup = ["prohibit 192.0.2.1", "blackhole 192.0.2.2", "unreachable 192.0.2.3"]
    .map((route) => `ip route add ${route}`);
  const rejects = [
    "icmp-net-unreachable",
    "icmp-host-unreachable",
    "icmp-port-unreachable",
    "icmp-admin-prohibited",
    "tcp-reset",
  ];
  for (const [index, reject] of rejects.entries()) {
    setup.push(`iptables -A INPUT -p tcp -d 127.0.1.${index} -j REJECT --reject-with ${reject}`);
  }
  await using network = await startNetns({ setup: setup.join("\n") });
  const addresses = [
    "192.0.2.1",
    "192.0.2.2",
    "192.0.2.3",
    "192.0.2.4",
    ...rejects.map((_, index) => `127.0.1.${index}`),
  ];
  const nodes = addresses.map((tailscaleIp) => ({ name: tailscaleIp, tailscaleIp }));
  const { outcomes } = await sweepElsewhere({ nodes, options: { timeoutMs: 2000 } }, { enter: network.enter });
  assertEquals(outcomes, [
    ...Array.from({ length: 4 }, () => "down unreachable"),
    "down unreachable",
    "down unreachable",
    "down refused",
    "down unreachable",
    "down refused",
  ]);
});

testUnless(NO_NETNS, "probeNodes() does not blame a node if this machine has no port left", async () => {
  const setup = "echo 50000 50003 > /proc/sys/net/ipv4/ip_local_port_range";
  await using network = await startNetwork([`silent=127.0.0.1:${PORT}`], { setup });
  const plan = { nodes: copies(20, { tailscaleIp: "127.0.0.1" }), options: { timeoutMs: 500 } };
  const { outcomes } = await sweepElsewhere(plan, { enter: network.enter });
  const { "unhealthy timeout": connected = 0, "unknown local-resource": unknown = 0, ...others } = tally(outcomes);
  assertEquals([connected + unknown, others], [20, {}]);
  assert(connected > 0 && connected <= 4, `${connected} were connected through 4 ports`);
});
