import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "jsr:@std/assert@^1.0.19";
import type { ClusterNodeFields } from "../mod.ts";
import {
  dropPackets,
  type Netns,
  netnsMissing,
  type NetnsOptions,
  startNetns,
} from "./netns.ts";
import {
  denoRun,
  nextLine,
  programMissing,
  start,
  testUnless,
  writeInventory,
} from "./process.ts";
import { copies, SLACK_MS, sweepElsewhere, tally } from "./sweep_process.ts";
import { makeCertificates } from "./tls.ts";

const NO_NETNS = netnsMissing();
const NO_OPENSSL = programMissing("openssl");
const PORT = 8766;

interface NetworkOptions extends NetnsOptions {
  /** Variables of the servers. */
  readonly env?: Readonly<Record<string, string>>;
}

/** Makes a network with servers in it: `BEHAVIOUR=HOST:PORT` each. */
async function startNetwork(
  servers: readonly string[],
  { env = {}, ...options }: NetworkOptions,
): Promise<Netns> {
  await using stack = new AsyncDisposableStack();
  const netns = stack.use(await startNetns(options));

  const [program, ...args] = [
    ...netns.enter,
    "deno",
    ...denoRun(["-A"], "tests/loopback_cluster.ts"),
    ...servers,
  ];
  const running = stack.use(start(program!, args, { env }));
  assertEquals(await nextLine(running.stdout), "started");

  const held = stack.move();
  return { ...netns, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

testUnless(
  NO_NETNS,
  "probeNodes() at 5 % packet loss reports 997 of 1,000 nodes as up, and the others as timeout",
  async () => {
    await using network = await startNetwork([`ok=0.0.0.0:${PORT}`], {
      setup: dropPackets(0.05),
    });
    const nodes = Array.from({ length: 1000 }, (_, index) => ({
      name: `gpu-${index}`,
      tailscaleIp: `127.1.${index >> 8}.${index & 255}`,
    }));

    const { enter } = network;
    const { outcomes } = await sweepElsewhere({ nodes, options: {} }, {
      enter,
    });
    const counts = tally(outcomes);
    const { up = 0, ...failures } = counts;
    const what = JSON.stringify(counts);
    assertGreaterOrEqual(up, 997, what);
    for (const outcome of Object.keys(failures)) {
      assertMatch(outcome, / timeout$/);
    }
  },
);

const LIVE4 = "10.7.0.7";
const DEAD4 = "10.7.0.6";
const LIVE6 = "fd07::7";
const DEAD6 = "fd07::6";

const IPV4 = [
  `ip addr add ${LIVE4}/32 dev lo`,
  `ip addr add ${DEAD4}/32 dev lo`,
  `iptables -A INPUT -d ${DEAD4} -j DROP`,
];
const IPV6 = [
  `ip addr add ${LIVE6}/128 dev lo`,
  `ip addr add ${DEAD6}/128 dev lo`,
  `ip6tables -A INPUT -d ${DEAD6} -j DROP`,
];

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
const NAMES = Object.keys(TWO_ADDRESSES);

function twoAddresses(): NetnsOptions {
  const lines = NAMES.flatMap((name) => {
    return TWO_ADDRESSES[name]!.map((address) => `${address} ${name}`);
  });
  const hosts = ["127.0.0.1 localhost", ...lines, ""];

  return {
    setup: [...IPV4, ...IPV6].join("\n"),
    files: { "/etc/hosts": hosts.join("\n") },
  };
}

const BY_NAME = NAMES.map((name) => `${name}:${PORT}`).join();

const NAME_FLAGS: Record<string, readonly string[]> = {
  "with all permissions": ["-A"],
  "under --allow-net=NAME:PORT": [`--allow-net=${BY_NAME}`, "--allow-read"],
};

for (const [permission, flags] of Object.entries(NAME_FLAGS)) {
  for (const check of ["http", "tcp"] as const) {
    testUnless(
      NO_NETNS ?? netnsMissing(IPV6.join(" && ")),
      `probeNodes() with check "${check}" ${permission} reports names with one black hole as up`,
      async () => {
        const servers = [`ok=${LIVE4}:${PORT}`, `ok=[${LIVE6}]:${PORT}`];
        await using network = await startNetwork(servers, twoAddresses());

        const nodes = NAMES.map((name) => ({ name, tailscaleIp: name }));
        const { outcomes, addresses } = await sweepElsewhere(
          { nodes, options: { timeoutMs: 4000, check } },
          { enter: network.enter, flags },
        );
        assertEquals(outcomes, NAMES.map(() => "up"));
        assertEquals(addresses, NAMES);
      },
    );
  }
}

testUnless(
  NO_OPENSSL ?? NO_NETNS ?? netnsMissing(IPV6.join(" && ")),
  "probeNodes() reports names with one black hole as up over https too",
  async () => {
    const names = NAMES.map((name) => `DNS:${name}`).join();
    await using certificates = await makeCertificates(names);
    const { keyPath, certPath } = await certificates.of("good");
    const servers = [`https=${LIVE4}:${PORT}`, `https=[${LIVE6}]:${PORT}`];
    await using network = await startNetwork(servers, {
      ...twoAddresses(),
      env: { TLS_KEY: keyPath, TLS_CERT: certPath },
    });

    const nodes = NAMES.map((name) => {
      return { name, dataServerUrl: `https://${name}:${PORT}` };
    });
    const { outcomes, addresses } = await sweepElsewhere(
      { nodes, options: { timeoutMs: 4000 } },
      { enter: network.enter, env: certificates.env },
    );
    assertEquals(outcomes, NAMES.map(() => "up"));
    assertEquals(addresses, NAMES);
  },
);

const LINK_LOCAL = "ip -6 addr add fe80::1/64 dev lo nodad";

const ZONES: Record<string, Omit<ClusterNodeFields, "name">> = {
  "tailscale_ip": { tailscaleIp: "fe80::1%lo", dataServerPort: PORT },
  "ssh_host": { sshHost: "root@fe80::1%lo", dataServerPort: PORT },
  "brackets": { sshHost: "[fe80::1%lo]", dataServerPort: PORT },
};

const ZONE_FLAGS: Record<string, readonly string[]> = {
  "with all permissions": ["-A"],
  "with --allow-net=[fe80::1]": [
    `--allow-net=[fe80::1]:${PORT}`,
    "--allow-read",
  ],
};

for (const [where, fields] of Object.entries(ZONES)) {
  for (const [permission, flags] of Object.entries(ZONE_FLAGS)) {
    testUnless(
      NO_NETNS ?? netnsMissing(LINK_LOCAL),
      `probeNodes() ${permission} reports a link-local address with a zone in ${where} as up`,
      async () => {
        // A listener takes the zone only where it stands for an interface.
        const servers = [`echo=[::]:${PORT}`];
        await using network = await startNetwork(servers, {
          setup: LINK_LOCAL,
        });

        const plan = { nodes: [{ name: "a", ...fields }], options: {} };
        const { outcomes, addresses, statuses } = await sweepElsewhere(plan, {
          enter: network.enter,
          flags,
        });
        assertEquals(outcomes, ["up"]);
        assertEquals(addresses, ["fe80::1%lo"]);

        const head = String(statuses[0]?.head);
        assertMatch(head, /^Host: \[fe80::1\]:8766$/mi);
      },
    );
  }
}

testUnless(
  NO_NETNS ?? netnsMissing(LINK_LOCAL),
  "probeNodes() reports a link-local address without a zone as what it is",
  async () => {
    const servers = [`ok=[::]:${PORT}`];
    await using network = await startNetwork(servers, { setup: LINK_LOCAL });

    const nodes = [{ name: "a", tailscaleIp: "fe80::1" }];
    const { outcomes, messages } = await sweepElsewhere(
      { nodes, options: {} },
      { enter: network.enter },
    );
    assertEquals(outcomes, ["down unreachable"]);
    assertMatch(messages[0]!, /zone/);
  },
);

const DEFAULT_PORTS: Record<string, [Omit<ClusterNodeFields, "name">, string]> =
  {
    "a URL without a port": [
      { dataServerUrl: "http://gpu.example.test" },
      "gpu.example.test",
    ],
    "a URL with its default port": [
      { dataServerUrl: "http://gpu.example.test:80/" },
      "gpu.example.test",
    ],
    "a URL with another port": [
      { dataServerUrl: `http://gpu.example.test:${PORT}` },
      `gpu.example.test:${PORT}`,
    ],
    "an IPv6 address in a URL without a port": [
      { dataServerUrl: "http://[::1]" },
      "[::1]",
    ],
    "an IPv6 address in a URL with a port": [
      { dataServerUrl: `http://[::1]:${PORT}` },
      `[::1]:${PORT}`,
    ],
    "an https URL without a port": [
      { dataServerUrl: "https://gpu.example.test" },
      "gpu.example.test",
    ],
    "an https URL with its default port": [
      { dataServerUrl: "https://gpu.example.test:443" },
      "gpu.example.test",
    ],
  };

const EXAMPLE_HOST: NetnsOptions = {
  files: { "/etc/hosts": "127.0.0.1 localhost gpu.example.test\n" },
};

testUnless(
  NO_OPENSSL ?? NO_NETNS ?? netnsMissing(IPV6.join(" && ")),
  "probeNodes() sends the authority of the URL as Host, without a default port",
  async () => {
    await using certificates = await makeCertificates("DNS:gpu.example.test");
    const { keyPath, certPath } = await certificates.of("good");
    const servers = [
      "echo=127.0.0.1:80",
      `echo=127.0.0.1:${PORT}`,
      "echo=[::1]:80",
      `echo=[::1]:${PORT}`,
      "https=127.0.0.1:443",
    ];
    await using network = await startNetwork(servers, {
      ...EXAMPLE_HOST,
      env: { TLS_KEY: keyPath, TLS_CERT: certPath },
    });

    const rows = Object.entries(DEFAULT_PORTS);
    const nodes = rows.map(([name, [fields]]) => ({ name, ...fields }));
    const { statuses } = await sweepElsewhere({ nodes, options: {} }, {
      enter: network.enter,
      env: certificates.env,
    });

    const sent = rows.map(([name], index) => [name, hostOf(statuses[index])]);
    const expected = rows.map(([name, [, host]]) => [name, host]);
    assertEquals(Object.fromEntries(sent), Object.fromEntries(expected));
  },
);

/** Returns the Host that a server was sent, as its answer says. */
function hostOf(
  status: Readonly<Record<string, unknown>> | null | undefined,
): string | undefined {
  if (typeof status?.head === "string") {
    return /^host: (.*)$/im.exec(status.head)?.[1]?.trim();
  }
  const headers = status?.headers as Record<string, string> | undefined;
  return headers?.host;
}

const SILENT_RESOLVER: NetnsOptions = {
  setup: "iptables -A INPUT -p udp --dport 53 -j DROP",
  files: {
    "/etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:8 attempts:1\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
    "/etc/hosts": "127.0.0.1 localhost healthy\n",
  },
};

/**
 * Sweeps names whose lookup hangs beside ten addresses and names that resolve.
 */
async function sweepHanging(network: Netns, hanging: number, healthy: number) {
  const names = copies(hanging, {}).map(({ name }) => {
    return { name, tailscaleIp: `${name}.invalid` };
  });
  const addresses = copies(10, { tailscaleIp: "127.0.0.2" });
  const resolved = copies(healthy, { tailscaleIp: "healthy" });
  const nodes = [...names, ...addresses, ...resolved];

  const plan = { nodes, options: { timeoutMs: 3000 }, exits: true };
  const { enter } = network;
  const { outcomes, atMs } = await sweepElsewhere(plan, { enter });
  const end = hanging + 10;
  return {
    hung: tally(outcomes.slice(0, hanging)),
    byAddress: tally(outcomes.slice(hanging, end)),
    byName: tally(outcomes.slice(end)),
    addressesMs: atMs.slice(hanging, end),
  };
}

testUnless(
  NO_NETNS,
  "probeNodes() reports addresses at once beside 40 names whose lookup hangs",
  async () => {
    const servers = [`ok=0.0.0.0:${PORT}`];
    await using network = await startNetwork(servers, SILENT_RESOLVER);

    const { byAddress, addressesMs } = await sweepHanging(network, 40, 0);
    assertEquals(byAddress, { up: 10 });
    for (const ms of addressesMs) assertLess(ms, SLACK_MS);
  },
);

testUnless(
  NO_NETNS,
  "probeNodes() reports a name whose lookup never had its turn as unknown, never as down",
  async () => {
    const servers = [`ok=0.0.0.0:${PORT}`];
    await using network = await startNetwork(servers, SILENT_RESOLVER);

    const { hung, byName } = await sweepHanging(network, 40, 10);
    const waiting = "unknown local-resource";
    const { up = 0, [waiting]: untried = 0, ...otherwise } = byName;
    assertEquals([up + untried, otherwise], [10, {}]);

    const { "down timeout": tried = 0, [waiting]: late = 0, ...others } = hung;
    assertEquals([tried + late, others], [40, {}]);
    // The bound leaves the runtime threads for its files.
    assert(tried > 0 && tried < 32, `${tried} lookups at once`);
  },
);

testUnless(
  NO_NETNS,
  "probeNodes() reports 100 names as up beside five whose lookup hangs",
  async () => {
    const servers = [`ok=0.0.0.0:${PORT}`];
    await using network = await startNetwork(servers, SILENT_RESOLVER);

    const { hung, byAddress, byName } = await sweepHanging(network, 5, 100);
    assertEquals(hung, { "down timeout": 5 });
    assertEquals([byAddress, byName], [{ up: 10 }, { up: 100 }]);
  },
);

testUnless(
  NO_NETNS,
  "the command line ends at its deadline while a lookup hangs",
  async () => {
    await using network = await startNetns(SILENT_RESOLVER);
    const hosts = { hanging: { tailscale_ip: "node.invalid" } };
    await using inventory = await writeInventory(hosts);

    const program = ["run", "-q", "-P=cli", "cli.ts"];
    const command = ["status", "--config", inventory.path, "--timeout", "1"];
    const args = [...program, ...command];
    const { code, stdout, stderr, ms } = await network.run("deno", args);
    assertEquals(code, 1, stderr);
    assertMatch(stdout, /hanging .*down.* timeout/);
    // The lookup itself would take eight seconds.
    assertLess(ms, 1000 + 2 * SLACK_MS);
  },
);

/** What each route and firewall is to a check. */
const BLOCKED: Record<string, [setup: string, outcome: string]> = {
  "192.0.2.1": ["ip route add prohibit 192.0.2.1", "down unreachable"],
  "192.0.2.2": ["ip route add blackhole 192.0.2.2", "down unreachable"],
  "192.0.2.3": ["ip route add unreachable 192.0.2.3", "down unreachable"],
  "192.0.2.4": ["true", "down unreachable"],
  "127.0.1.0": [rejecting(0, "icmp-net-unreachable"), "down unreachable"],
  "127.0.1.1": [rejecting(1, "icmp-host-unreachable"), "down unreachable"],
  "127.0.1.2": [rejecting(2, "icmp-port-unreachable"), "down refused"],
  "127.0.1.3": [rejecting(3, "icmp-admin-prohibited"), "down unreachable"],
  "127.0.1.4": [rejecting(4, "tcp-reset"), "down refused"],
};

function rejecting(index: number, how: string): string {
  const rule = `-p tcp -d 127.0.1.${index} -j REJECT --reject-with ${how}`;
  return `iptables -A INPUT ${rule}`;
}

testUnless(
  NO_NETNS,
  "probeNodes() reports routes and firewalls that lead nowhere as down unreachable",
  async () => {
    const setup = Object.values(BLOCKED).map(([command]) => command);
    await using network = await startNetns({ setup: setup.join("\n") });

    const nodes = Object.keys(BLOCKED).map((tailscaleIp) => {
      return { name: tailscaleIp, tailscaleIp };
    });
    const options = { timeoutMs: 2000 };
    const { enter } = network;
    const { outcomes } = await sweepElsewhere({ nodes, options }, { enter });
    assertEquals(
      outcomes,
      Object.values(BLOCKED).map(([, outcome]) => outcome),
    );
  },
);

testUnless(
  NO_NETNS,
  "probeNodes() reports nodes as unknown while this machine has no port left",
  async () => {
    const range = "/proc/sys/net/ipv4/ip_local_port_range";
    const setup = `echo 50000 50003 > ${range}`;
    const servers = [`silent=127.0.0.1:${PORT}`];
    await using network = await startNetwork(servers, { setup });

    const nodes = copies(20, { tailscaleIp: "127.0.0.1" });
    const options = { timeoutMs: 1000 };
    const { enter } = network;
    const { outcomes } = await sweepElsewhere({ nodes, options }, { enter });
    const counts = tally(outcomes);
    const connected = counts["unhealthy timeout"] ?? 0;
    const unknown = counts["unknown local-resource"] ?? 0;
    assertEquals(connected + unknown, 20, JSON.stringify(counts));
    assertGreater(connected, 0);
    assertLess(connected, 5);
  },
);
