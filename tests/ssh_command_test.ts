import {
  assert,
  assertEquals,
  assertRejects,
  assertThrows,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { findSshEndpoint, racedSshEndpoints } from "../cluster_hosts.ts";
import { ClusterNode, type ClusterNodeFields, sshCommand } from "../mod.ts";
import {
  type Behaviour,
  type Conversation,
  send,
  startNode,
} from "./loopback_cluster.ts";

function node(fields: Partial<ClusterNodeFields> = {}): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** The options of an argument list, `KEY=VALUE` each. */
function optionsOf(command: readonly string[]): string[] {
  const words = command.slice(0, command.indexOf("--"));
  return words.filter((_, index) => words[index - 1] === "-o");
}

Deno.test("sshCommand() returns the whole argument list", () => {
  const full = node({
    sshHost: "root@2001:db8::1",
    sshKey: "~/.ssh/id",
    sshPort: 2222,
  });
  const options = ["Compression=yes"];
  assertEquals(sshCommand(full, ["echo", "a b"], { options }), [
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "IdentitiesOnly=yes",
    "-p",
    "2222",
    "-i",
    "~/.ssh/id",
    "-o",
    "Compression=yes",
    "--",
    "root@2001:db8::1",
    "echo",
    "a b",
  ]);
});

Deno.test("sshCommand() sets IdentitiesOnly only where a key is set", () => {
  const command = sshCommand(node({ sshHost: "gpu.example" }), ["x"]);
  assertEquals(optionsOf(command), [
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=15",
  ]);
});

Deno.test("sshCommand() replaces its own options by those of the node, and these by the caller's", () => {
  const sshOptions = [
    "ProxyJump=head",
    "ServerAliveInterval=60",
    "StrictHostKeyChecking=accept-new",
  ];
  const jumping = node({ sshHost: "gpu.example", sshKey: "/key", sshOptions });

  assertEquals(optionsOf(sshCommand(jumping, ["x"])), [
    "BatchMode=yes",
    "ConnectTimeout=10",
    "IdentitiesOnly=yes",
    ...sshOptions,
  ]);

  const options = [
    "proxyjump=other",
    "BatchMode=no",
    "identitiesonly=no",
    "port=23",
    "IdentityFile=/other",
  ];
  const command = sshCommand(jumping, ["x"], {
    user: "ops",
    connectTimeoutMs: 1500,
    options,
  });
  assertEquals(optionsOf(command), [
    "ConnectTimeout=2",
    "ServerAliveInterval=60",
    "StrictHostKeyChecking=accept-new",
    ...options,
  ]);
  assert(!command.includes("-p") && !command.includes("-i"), command.join(" "));
  assertEquals(command.slice(-2), ["ops@gpu.example", "x"]);
});

Deno.test("sshCommand() returns the command of the endpoint that is given", () => {
  const plain = node({ sshHost: "gpu.example" });
  const endpoint = {
    protocol: "ssh",
    host: "203.0.113.7",
    port: 31_022,
    path: "",
  } as const;
  const command = sshCommand(plain, ["-x"], { endpoint });
  assertEquals(command[command.indexOf("-p") + 1], "31022");
  assertEquals(command.slice(-3), ["--", "ubuntu@203.0.113.7", "-x"]);
  // Its type says that there is a first word.
  const program: string = command[0];
  assertEquals(program, "ssh");
});

Deno.test("sshCommand() takes an option that is undefined for its default", () => {
  const plain = node({ sshHost: "gpu.example" });
  const unset = {
    user: undefined,
    connectTimeoutMs: undefined,
    options: undefined,
    endpoint: undefined,
  };
  assertEquals(sshCommand(plain, ["x"], unset), sshCommand(plain, ["x"]));
});

const UNSAFE = [
  "-oProxyCommand=x",
  "a b",
  "a;b",
  "$(x)",
  "`x`",
  "a\nb",
  "a\0b",
  "a%hb",
  "a|b",
  "a&b",
  "a'b",
  'a"b',
  "a\\b",
  "a<b",
];

for (const text of UNSAFE) {
  Deno.test(`sshCommand() and ClusterNode refuse ${JSON.stringify(text)} as a host, a user and a key`, () => {
    const plain = node({ sshHost: "x" });
    const fields = [
      { sshHost: text },
      { sshHost: `root@${text}` },
      { tailscaleIp: text },
      { sshHost: "x", sshUser: text },
      { sshHost: "x", sshKey: text },
      { sshHost: "x", sshOptions: [`ProxyJump=${text}`] },
    ];
    for (const field of fields) assertThrows(() => node(field), TypeError);

    assertThrows(
      () => sshCommand(plain, ["x"], { user: text }),
      TypeError,
      "user",
    );
    for (const key of ["ProxyJump", "HostName", "User", "IdentityFile"]) {
      const options = [`${key}=${text}`];
      assertThrows(() => sshCommand(plain, ["x"], { options }), TypeError, key);
    }
    const options = [`ProxyJump=ok,${text}`];
    assertThrows(
      () => sshCommand(plain, ["x"], { options }),
      TypeError,
      "ProxyJump",
    );
  });
}

for (const option of ["", "-x", "NoValue", "A B=c", "ProxyCommand=a\nb"]) {
  Deno.test(`sshCommand() and ClusterNode refuse the option ${JSON.stringify(option)}`, () => {
    const options = [option];
    assertThrows(
      () => sshCommand(node({ sshHost: "x" }), ["x"], { options }),
      TypeError,
    );
    assertThrows(() => node({ sshHost: "x", sshOptions: options }), TypeError);
  });
}

Deno.test("sshCommand() takes several jump hosts, with users, ports and IPv6 addresses", () => {
  const options = ["ProxyJump=ops@[2001:db8::1]:22,other"];
  const command = sshCommand(node({ sshHost: "x" }), ["x"], { options });
  assert(command.includes(options[0]!), command.join(" "));
});

Deno.test("sshCommand() throws at a fault of the caller", () => {
  const plain = node({ sshHost: "x" });
  assertThrows(() => sshCommand(node(), ["x"]), TypeError, "address");
  assertThrows(
    () => sshCommand(plain, ["x"], { connectTimeoutMs: 0 }),
    RangeError,
  );
  assertThrows(() => sshCommand(plain, ["a\0b"]), TypeError, "NUL");
});

const LEADS_ELSEWHERE = [
  "ProxyJump=x",
  "proxycommand=x",
  "HostName=x",
  "Port=1",
];

for (const option of LEADS_ELSEWHERE) {
  Deno.test(`racedSshEndpoints() returns none if ${option} leads elsewhere, of the node or of the caller`, () => {
    const fields = { tailscaleIp: "100.64.0.1", sshHost: "root@203.0.113.7" };
    assertEquals(racedSshEndpoints(node(fields)).length, 2);
    assertEquals(
      racedSshEndpoints(node({ ...fields, sshOptions: [option] })),
      [],
    );
    assertEquals(racedSshEndpoints(node(fields), { options: [option] }), []);
  });
}

Deno.test("findSshEndpoint() returns the endpoint that greets", async () => {
  await using greets = await startNode("ssh-banner", { hostname: "127.0.0.2" });
  const { port } = greets;
  await using silent = await startNode("silent", {
    hostname: "127.0.0.3",
    port,
  });
  const nodes = [
    node({
      tailscaleIp: silent.hostname,
      sshHost: `root@${greets.hostname}`,
      sshPort: port,
    }),
    node({
      tailscaleIp: greets.hostname,
      sshHost: `root@${silent.hostname}`,
      sshPort: port,
    }),
  ];
  for (const each of nodes) {
    const endpoint = await findSshEndpoint(each);
    assertEquals([endpoint.host, endpoint.port, endpoint.protocol], [
      greets.hostname,
      port,
      "ssh",
    ]);
  }
});

Deno.test("findSshEndpoint() asks nobody where there is nothing to choose", async () => {
  await using greets = await startNode("ssh-banner", { hostname: "127.0.0.2" });
  const { port } = greets;
  await using silent = await startNode("silent", {
    hostname: "127.0.0.3",
    port,
  });
  const fields = {
    tailscaleIp: greets.hostname,
    sshHost: silent.hostname,
    sshPort: port,
  };

  for (const option of LEADS_ELSEWHERE) {
    const own = await findSshEndpoint(
      node({ ...fields, sshOptions: [option] }),
    );
    const given = await findSshEndpoint(node(fields), { options: [option] });
    assertEquals(
      [own.host, given.host],
      [silent.hostname, silent.hostname],
      option,
    );
  }
  const single = node({ tailscaleIp: silent.hostname, sshPort: port });
  assertEquals((await findSshEndpoint(single)).host, silent.hostname);
  assertEquals([greets.connections, silent.connections], [0, 0]);
});

const trickle: Conversation = async (conn, signal) => {
  for (;; await delay(50, { signal })) await send(conn, "\n");
};

const babble: Conversation = async (conn, signal) => {
  await send(conn, `${"x\r\n".repeat(150)}SSH-2.0-late\r\n`);
  await delay(5000, { signal });
};

const NONE_GREETS: readonly (readonly [
  string,
  Behaviour | Conversation,
  Behaviour | Conversation,
])[] = [
  ["one is silent and one sends empty lines", "silent", trickle],
  ["one is silent and one babbles", "silent", babble],
  ["one closes and one refuses", "closes", "refuses"],
  ["one is a web server and one closes", "http-500", "closes"],
];

for (const [what, first, second] of NONE_GREETS) {
  Deno.test(`findSshEndpoint() returns the first endpoint if ${what}`, async () => {
    await using one = await startNode(first, { hostname: "127.0.1.1" });
    await using two = await startNode(second, {
      hostname: "127.0.1.2",
      port: one.port,
    });
    // With a port of its own, ssh_host comes first.
    const fields = {
      tailscaleIp: two.hostname,
      sshHost: one.hostname,
      sshPort: one.port,
    };
    assertEquals((await findSshEndpoint(node(fields))).host, one.hostname);
  });
}

Deno.test("findSshEndpoint() closes a connection that is made after another one has won", async () => {
  await using greets = await startNode("ssh-banner", { hostname: "127.0.0.2" });
  await using silent = await startNode("silent", {
    hostname: "127.0.0.3",
    port: greets.port,
  });
  const { connect } = Deno;
  const won = Promise.withResolvers<void>();
  Deno.connect =
    (async (options: Deno.ConnectOptions & { signal: AbortSignal }) => {
      // The signal comes too late for this one.
      const { signal, ...others } = options;
      const conn = await connect(others);
      if (options.hostname === silent.hostname) {
        signal.addEventListener("abort", () => won.resolve());
        await won.promise;
      }
      return conn;
    }) as typeof Deno.connect;

  try {
    const two = node({
      tailscaleIp: greets.hostname,
      sshHost: silent.hostname,
      sshPort: greets.port,
    });
    assertEquals((await findSshEndpoint(two)).host, greets.hostname);
  } finally {
    Deno.connect = connect;
  }
  assertEquals(silent.connections, 1);
});

Deno.test("findSshEndpoint() rejects with the reason of its signal", async () => {
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole", {
    hostname: "127.0.0.3",
    port: silent.port,
  });
  const two = node({
    tailscaleIp: silent.hostname,
    sshHost: hole.hostname,
    sshPort: silent.port,
  });
  const reason = new Error("enough");
  const controller = new AbortController();
  setTimeout(() => controller.abort(reason), 100);
  const { signal } = controller;
  assert(
    await assertRejects(() => findSshEndpoint(two, { signal })) === reason,
  );
});

Deno.test({
  name:
    "findSshEndpoint() without net permission returns the first, and connects to none",
  permissions: { net: false },
  async fn() {
    const { connect } = Deno;
    let connects = 0;
    // On a terminal, Deno would ask.
    Deno.connect = () => {
      connects++;
      throw new Error("There is no network");
    };

    try {
      const two = node({
        tailscaleIp: "100.64.0.1",
        sshHost: "root@203.0.113.7",
      });
      const { host, port } = await findSshEndpoint(two);
      assertEquals([host, port, connects], ["100.64.0.1", 22, 0]);
    } finally {
      Deno.connect = connect;
    }
  },
});
