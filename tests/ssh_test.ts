import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  type ClusterNodeFields,
  type CommandResult,
  findSshEndpoint,
  hostPort,
  runOnNodes,
  sshCommand,
} from "../mod.ts";
import { type Behaviour, type Conversation, type LoopbackNode, send, startNode } from "./loopback_cluster.ts";
import { run } from "./process.ts";
import { type Sshd, SSHD_ADDRESSES, sshdTest } from "./sshd.ts";
import { alive, FAKES, fakeSsh, runElsewhere } from "./ssh_process.ts";

const MIB = 1024 * 1024;

/** What may be added to a deadline that is promised: the start and the end of processes. */
const SLACK_MS = 1500;

function node(fields: Partial<ClusterNodeFields> = {}): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** A node on an sshd. */
function on(sshd: Sshd, fields: Partial<ClusterNodeFields> = {}): ClusterNode {
  const { port, user, keyPath } = sshd;
  return node({ tailscaleIp: SSHD_ADDRESSES[0], sshPort: port, sshUser: user, sshKey: keyPath, ...fields });
}

/** Two nodes, one on each address of an sshd. */
function pair(sshd: Sshd): ClusterNode[] {
  return SSHD_ADDRESSES.map((tailscaleIp, index) => on(sshd, { name: "ab"[index]!, tailscaleIp }));
}

/** Prints the address of the server that it runs on. */
const WHERE = "set -- $SSH_CONNECTION; echo $3";

function told({ failure, exitCode }: CommandResult): string {
  return failure ? `${failure.code}: ${failure.message}` : String(exitCode);
}

sshdTest("runOnNodes() gives one result a node, in order, with all about it", async (sshd) => {
  const nodes = [...pair(sshd), node({ name: "c" })];
  const { options } = sshd;
  const results = await runOnNodes(nodes, [`${WHERE}; echo oops >&2; [ $3 = 127.0.0.1 ] || exit 7`], { options });
  assertEquals(results.map((result) => result.node), nodes);
  const seen = results.map(({ node, durationMs, ...others }) => {
    assert(durationMs >= 0);
    return { name: node.name, ...others };
  });
  const common = { signal: null, stderr: "oops\n", truncated: false };
  assertEquals(seen, [
    { name: "a", ...common, exitCode: 0, stdout: "127.0.0.1\n", failure: undefined },
    { name: "b", ...common, exitCode: 7, stdout: "127.0.0.2\n", failure: { code: "exit", message: "exit code 7" } },
    {
      name: "c",
      ...common,
      exitCode: null,
      stdout: "",
      stderr: "",
      failure: { code: "no-address", message: "set tailscale_ip or ssh_host" },
    },
  ]);
});

sshdTest("runOnNodes() runs what a function gives for each node", async (sshd) => {
  const nodes = pair(sshd);
  const command = ({ name }: ClusterNode) => ["echo", `this is ${name};`, "echo 'a  b'"];
  const results = await runOnNodes(nodes, command, { options: sshd.options });
  assertEquals(results.map(({ stdout }) => stdout), ["this is a\na  b\n", "this is b\na  b\n"]);
});

sshdTest("runOnNodes() gives every node the bytes of stdin, and none by default", async (sshd) => {
  const nodes = pair(sshd);
  const { options } = sshd;
  const stdin = new Uint8Array(300_000).map((_, index) => index % 251);
  const sums = await runOnNodes(nodes, ["cksum"], { options, stdin });
  assertEquals(new Set(sums.map(({ stdout }) => stdout)).size, 1);
  assertMatch(sums[0]!.stdout, / 300000$/m);
  const script = new TextEncoder().encode("echo from a script\n");
  for (const { stdout } of await runOnNodes(nodes, ["sh -s"], { options, stdin: script })) {
    assertEquals(stdout, "from a script\n");
  }
  for (const { stdout } of await runOnNodes(nodes, ["cat; echo done"], { options })) assertEquals(stdout, "done\n");
  // What does not read its stdin to the end is no error.
  for (const result of await runOnNodes(nodes, ["true"], { options, stdin })) assertEquals(told(result), "0");
});

sshdTest("runOnNodes() tells of output while the command runs, and of each result at its end", async (sshd) => {
  const [a, b] = pair(sshd) as [ClusterNode, ClusterNode];
  const events: string[] = [];
  const gate = Promise.withResolvers<void>();
  await using server = await startNode(async (conn) => {
    await gate.promise;
    await send(conn, "open\n");
  });
  const command = ({ name }: ClusterNode) =>
    name === "a" ? ["bash", "-c", `'echo first; read line < /dev/tcp/127.0.0.1/${server.port}; echo $line'`] : ["true"];
  const results = await runOnNodes([a, b], command, {
    options: sshd.options,
    onOutput(node, stream, text) {
      events.push(`${node.name} ${stream} ${JSON.stringify(text)}`);
      if (events.includes("b 0")) gate.resolve();
    },
    onResult(result) {
      events.push(`${result.node.name} ${told(result)}`);
      if (events.some((event) => event.startsWith("a stdout"))) gate.resolve();
    },
  });
  assertEquals(results.map(told), ["0", "0"]);
  assertEquals(events.toSorted(), ["a 0", 'a stdout "first\\n"', 'a stdout "open\\n"', "b 0"]);
  assertEquals(events.at(-1), "a 0");
});

for (const dead of ["refuses", "silent", "black-hole", "ssh"] as const) {
  sshdTest(
    `runOnNodes() connects within a second if one of two addresses is ${dead}, first or second`,
    async (sshd) => {
      // Both are named at the same port.
      const [, sshHost] = SSHD_ADDRESSES;
      await using other = dead === "ssh"
        ? undefined
        : await startNode(dead, { hostname: "127.0.0.3", port: sshd.port });
      const deadIp = other?.hostname ?? SSHD_ADDRESSES[0];
      for (const [tailscaleIp, second] of [[deadIp, sshHost], [sshHost, deadIp]] as const) {
        const nodes = [on(sshd, { tailscaleIp, sshHost: second })];
        const started = performance.now();
        const endpoint = await findSshEndpoint(nodes[0]!, { options: sshd.options });
        assertLess(performance.now() - started, 1000);
        if (other) assertEquals(hostPort(endpoint.host, endpoint.port), hostPort(sshHost, sshd.port));
        const [result] = await runOnNodes(nodes, [WHERE], { options: sshd.options });
        assertEquals(told(result!), "0", result!.stderr);
        assertEquals(result!.stdout, `${endpoint.host}\n`);
      }
    },
  );
}

sshdTest("runOnNodes() finds the machine of a tailnet behind the port of a proxy that is dead", async (sshd) => {
  // Port 22 of the tailnet's address is not ours to listen at: that endpoint stays dead.
  await using silent = await startNode("silent", { hostname: "127.0.0.3", port: sshd.port });
  const nodes = [on(sshd, { tailscaleIp: SSHD_ADDRESSES[1], sshHost: silent.hostname })];
  const [result] = await runOnNodes(nodes, [WHERE], { options: sshd.options });
  assertEquals([told(result!), result!.stdout], ["0", `${SSHD_ADDRESSES[1]}\n`]);
});

/** A proxy in front of a port, which can cut all of its connections. */
async function startProxy(port: number): Promise<LoopbackNode & { cut(): void }> {
  const cuts = Promise.withResolvers<void>();
  const proxy = await startNode(async (conn) => {
    using upstream = await Deno.connect({ hostname: "127.0.0.1", port });
    const both = Promise.all([copy(conn, upstream), copy(upstream, conn)]).catch(() => {});
    await Promise.race([both, cuts.promise]);
  });
  return Object.assign(proxy, { cut: () => cuts.resolve() });
}

async function copy(from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(65_536);
  for (;;) {
    const count = await from.read(buffer);
    if (count === null) break;
    for (let sent = 0; sent < count;) sent += await to.write(buffer.subarray(sent, count));
  }
  await to.closeWrite();
}

for (const quiet of [true, false]) {
  sshdTest(
    `runOnNodes() tells of a connection that is cut while the command runs: lost, and ran once (${
      quiet ? "quiet" : "talkative"
    } ssh)`,
    async (sshd) => {
      const options = quiet ? sshd.options : sshd.options.filter((option) => !option.startsWith("LogLevel"));
      await using proxy = await startProxy(sshd.port);
      const ran = `${sshd.keyPath}.ran`;
      const through = on(sshd, { name: "cut", sshPort: proxy.port });
      const killed = on(sshd, { name: "killed" });
      const command = ({ name }: ClusterNode) => [
        // What ssh says then is no line of its own, but goes on where the command was.
        `echo x >> ${ran}.${name}; printf 50%% >&2; echo started; ${
          name === "killed" ? "sleep 0.3; kill -9 $PPID;" : ""
        } exec sleep 5`,
      ];
      const results = await runOnNodes([through, killed], command, {
        options,
        onOutput: ({ name }, stream) => {
          if (name === "cut" && stream === "stdout") proxy.cut();
        },
      });
      for (const result of results) {
        const { name } = result.node;
        assertEquals([result.failure?.code, result.stdout], ["lost", "started\n"], `${name}: ${told(result)}`);
        assertEquals(await Deno.readTextFile(`${ran}.${name}`), "x\n");
      }
    },
  );
}

/** What an ssh inside the command says of a host that is not this node; the port may be the same. */
const LIES = [
  "",
  "ssh: connect to host other port PORT: Connection refused",
  "ssh: connect to host 192.0.2.1 port PORT: Connection timed out",
  "ssh: Could not resolve hostname other: Name or service not known",
  "Connection to other closed by remote host.",
  "Connection closed by 192.0.2.1 port PORT",
  "Connection reset by 192.0.2.1 port PORT",
  "root@other: Permission denied (publickey).",
  "Timeout, server other not responding.",
];

sshdTest("runOnNodes() takes exit code 255 of the command for its own, whatever an ssh inside said", async (sshd) => {
  // ssh ends its lines with a carriage return; what else writes to stderr does not.
  const lies = LIES.map((lie) => lie.replace("PORT", String(sshd.port)))
    .flatMap((lie) => [`${lie}\\r\\n`, `${lie}\\n`])
    .concat("bash: line 1: /root/job: Permission denied\\n");
  const nodes = lies.map((lie, index) => on(sshd, { name: `n${index}`, entry: { lie } }));
  const command = ({ entry }: ClusterNode) => [`printf '${entry.lie}' >&2; exit 255`];
  const results = await runOnNodes(nodes, command, { options: sshd.options });
  const wrong = results.filter((result) => told(result) !== "exit: exit code 255" || result.exitCode !== 255);
  assertEquals(wrong.map((result) => `${told(result)} of ${JSON.stringify(result.stderr)}`), []);
});

sshdTest("runOnNodes() starts no ssh after onResult() has thrown", async (sshd) => {
  const nodes = [node({ name: "homeless" }), node({ name: "homeless too" }), on(sshd)];
  const onResult = (result: CommandResult) => {
    if (result.node === nodes[0]) throw new Error("enough");
  };
  const started = performance.now();
  const run = () => runOnNodes(nodes, ["exec sleep 5"], { options: sshd.options, concurrency: 2, onResult });
  await assertRejects(run, Error, "enough");
  assertLess(performance.now() - started, SLACK_MS);
});

for (const callback of ["onOutput", "onResult"] as const) {
  sshdTest(`runOnNodes() ends every ssh and throws what ${callback}() throws`, async (sshd) => {
    const reason = new Error("enough");
    const fail = () => {
      throw reason;
    };
    // The one that is told of would go on, too, unless it has to end for that.
    const command = ({ name }: ClusterNode) => [
      name === "b" ? "exec sleep 5" : callback === "onOutput" ? "echo started; exec sleep 5" : "true",
    ];
    const started = performance.now();
    const options = { options: sshd.options, [callback]: fail };
    assert(await assertRejects(() => runOnNodes(pair(sshd), command, options)) === reason);
    assertLess(performance.now() - started, SLACK_MS);
    assertEquals(await sshProcesses(sshd.port), []);
  });
}

sshdTest("runOnNodes() tells of a host that an option or a name leads to, where nothing listens", async (sshd) => {
  await using refuses = await startNode("refuses");
  const options = [...sshd.options, "HostName=127.0.0.8"];
  const [elsewhere] = await runOnNodes([on(sshd, { sshPort: refuses.port })], ["true"], { options });
  assertEquals(elsewhere!.failure?.code, "connect", told(elsewhere!));
  assert(!elsewhere!.failure!.message.includes("other address"), told(elsewhere!));
});

sshdTest("runOnNodes() tells why it could not connect, and that the command was not started", async (sshd) => {
  await using refuses = await startNode("refuses");
  await using closes = await startNode("closes");
  await using web = await startNode("http-500");
  const known = `${sshd.keyPath}.known_hosts`;
  const otherKey = (await Deno.readTextFile(`${sshd.otherKeyPath}.pub`)).split(" ").slice(0, 2).join(" ");
  await Deno.writeTextFile(known, `[127.0.0.1]:${sshd.port} ${otherKey}\n`);
  const strict = (file: string) =>
    sshd.options.filter((option) => !/^(StrictHostKeyChecking|UserKnownHostsFile|LogLevel)=/.test(option))
      .concat(`UserKnownHostsFile=${file}`, "GlobalKnownHostsFile=/dev/null");
  const cases: [what: string, node: ClusterNode, options: readonly string[], message: RegExp][] = [
    ["refused", on(sshd, { sshPort: refuses.port }), sshd.options, /refused/],
    ["closed", on(sshd, { sshPort: closes.port }), sshd.options, /./],
    ["another server", on(sshd, { sshPort: web.port }), sshd.options, /./],
    ["another key", on(sshd, { sshKey: sshd.otherKeyPath }), sshd.options, /Permission denied/],
    ["no such key", on(sshd, { sshKey: "/nowhere/key" }), sshd.options, /Permission denied|No such file/],
    ["a name", on(sshd, { tailscaleIp: `${"x".repeat(64)}.invalid` }), sshd.options, /resolve/],
    ["unknown host key", on(sshd), strict("/dev/null"), /StrictHostKeyChecking=accept-new/],
    ["changed host key", on(sshd), strict(known), /host key|HOST IDENTIFICATION|identification/i],
  ];
  for (const [what, node, options, message] of cases) {
    const [result] = await runOnNodes([node], ["echo ran"], { options });
    assertEquals([result!.failure?.code, result!.stdout], ["connect", ""], `${what}: ${told(result!)}`);
    assertMatch(result!.failure!.message, message, what);
    // An option that would not help is not named.
    if (what !== "unknown host key") assert(!result!.failure!.message.includes("accept-new"), told(result!));
  }
  const options = [...strict(`${known}.new`), "StrictHostKeyChecking=accept-new"];
  const [accepted] = await runOnNodes([on(sshd)], ["echo ran"], { options });
  assertEquals([told(accepted!), accepted!.stdout], ["0", "ran\n"]);
});

Deno.test("runOnNodes() gives up a server that accepts and does not go on", async () => {
  await using silent = await startNode("silent");
  // Each byte could begin anew the wait of ssh itself, and after the greeting it waits without end.
  await using trickling = await startNode(async (conn, signal) => {
    for (;; await delay(50, { signal })) await send(conn, "S");
  });
  await using greeting = await startNode("ssh-banner");
  const cases = [
    [silent, { connectTimeoutMs: 1000 }, ["connect"]],
    [silent, { timeoutMs: 1000 }, ["timeout"]],
    [greeting, { connectTimeoutMs: 1000, timeoutMs: 1500 }, ["connect", "timeout"]],
    [trickling, { connectTimeoutMs: 1000, timeoutMs: 1500 }, ["connect", "timeout"]],
  ] as const;
  await Promise.all(cases.map(async ([{ port }, options, codes]) => {
    const started = performance.now();
    const [result] = await runOnNodes([node({ tailscaleIp: "127.0.0.1", sshPort: port })], ["true"], options);
    assert(codes.includes(result!.failure?.code as never), told(result!));
    assertLess(performance.now() - started, 1500 + SLACK_MS);
  }));
});

sshdTest("runOnNodes() ends a command at its deadline, and keeps what it said until then", async (sshd) => {
  const started = performance.now();
  const [result] = await runOnNodes([on(sshd)], ["echo before; exec sleep 5"], {
    options: sshd.options,
    timeoutMs: 1000,
  });
  assertLess(performance.now() - started, 1000 + SLACK_MS);
  assertEquals([result!.failure?.code, result!.stdout, result!.exitCode], ["timeout", "before\n", null]);
});

sshdTest("runOnNodes() keeps 1 MiB of each stream, and onOutput() is told all of it", async (sshd) => {
  const size = 3_000_000;
  const flood = `head -c ${size} /dev/zero | tr '\\0' x`;
  const heard = { stdout: 0, stderr: 0 };
  const [flooded] = await runOnNodes([on(sshd)], [`${flood} >&2; echo short`], {
    options: sshd.options,
    onOutput: (_node, stream, text) => void (heard[stream] += text.length),
  });
  assertEquals([told(flooded!), flooded!.truncated, flooded!.stdout], ["0", true, "short\n"]);
  assertEquals(heard, { stdout: 6, stderr: size });
  assert(flooded!.stderr === "x".repeat(MIB));
  const exactly = `head -c ${MIB} /dev/zero | tr '\\0' x`;
  const [exact] = await runOnNodes([on(sshd)], [exactly], { options: sshd.options });
  assertEquals([exact!.truncated, exact!.stdout.length], [false, MIB]);
});

sshdTest("runOnNodes() gives onOutput() whole characters, however they are cut", async (sshd) => {
  const text = "ä€😀".repeat(20_000);
  let heard = "";
  const [result] = await runOnNodes([on(sshd)], ["cat"], {
    options: sshd.options,
    stdin: new TextEncoder().encode(text),
    onOutput: (_node, _stream, piece) => void (heard += piece),
  });
  assertEquals([heard === text, result!.stdout === text], [true, true]);
});

sshdTest("runOnNodes() runs on 100 nodes, at most `concurrency` at once", async (sshd) => {
  const nodes = Array.from({ length: 100 }, (_, index) => on(sshd, { name: `gpu-${index}` }));
  let ended = 0;
  const results = await runOnNodes(nodes, ["echo hello"], { options: sshd.options, onResult: () => void ended++ });
  assertEquals([results.map(told), ended], [nodes.map(() => "0"), 100]);
  assertEquals(results.map(({ stdout }) => stdout), nodes.map(() => "hello\n"));
});

const LOCAL = { tailscaleIp: "127.0.0.1" };

function numbered(count: number): ClusterNodeFields[] {
  return Array.from({ length: count }, (_, index) => ({ name: `gpu-${index + 1}`, ...LOCAL }));
}

Deno.test("runOnNodes() has at most `concurrency` commands under way", async () => {
  const script = `echo $$ >> "$0.pids"; ls "$0".run.* 2>/dev/null | wc -l >> "$0.calls"
touch "$0.run.$$"; sleep 0.1; rm "$0.run.$$"`;
  await using fake = await fakeSsh(script);
  const plan = { nodes: numbered(9), command: ["x"], options: { concurrency: 3 } };
  const { results } = await runElsewhere(plan, fake);
  assertEquals(results.map(({ exitCode }) => exitCode), plan.nodes.map(() => 0));
  const others = (await fake.calls()).map(Number);
  assert(Math.max(...others) <= 2, others.join());
});

for (const [name, script] of Object.entries({ polite: FAKES.polite, stubborn: FAKES.stubborn })) {
  Deno.test(`runOnNodes() ends every ssh at its signal, a ${name} one too, then rejects with the reason`, async () => {
    await using fake = await fakeSsh(script);
    const plan = { nodes: numbered(3), command: ["x"], options: { concurrency: 2 }, abortAfter: 2 };
    const { reason, ms, told, results } = await runElsewhere(plan, fake);
    assertEquals(reason, "enough");
    assertLess(ms, SLACK_MS);
    const pids = await fake.pids();
    assertEquals([pids.length, await alive(pids)], [2, []]);
    for (const name of ["gpu-1", "gpu-2"]) assert(told.includes(name), told.join());
    for (const { failure } of results.slice(0, 2)) assertEquals(failure?.code, "signal");
  });

  Deno.test(`runOnNodes() ends at its deadline an ssh that is ${name}, and leaves nothing`, async () => {
    await using fake = await fakeSsh(script);
    const plan = { nodes: numbered(1), command: ["x"], options: { timeoutMs: 500 } };
    const { results: [result], ms } = await runElsewhere(plan, fake);
    assertEquals([result!.failure?.code, result!.stdout], ["timeout", "started\n"]);
    assertLess(ms, 500 + SLACK_MS);
    assertEquals(await alive(await fake.pids()), []);
    // It is asked to end before it is made to.
    assertEquals(await fake.calls(), name === "polite" ? ["asked to end"] : []);
  });
}

Deno.test("runOnNodes() does not wait past its deadline for a process that holds the pipe", async () => {
  await using fake = await fakeSsh(FAKES.forking);
  const plan = { nodes: numbered(1), command: ["x"], options: { timeoutMs: 1000 } };
  const { results: [result], ms } = await runElsewhere(plan, fake);
  assertEquals(result!.stdout, "done\n");
  assertLess(ms, 1000 + SLACK_MS);
});

Deno.test("runOnNodes() keeps 1 MiB of an endless output, and ends it at its deadline", async () => {
  await using fake = await fakeSsh(FAKES.flooding);
  const plan = { nodes: numbered(1), command: ["x"], options: { timeoutMs: 500 } };
  const { results: [result], ms } = await runElsewhere(plan, fake);
  assertEquals([result!.failure?.code, result!.truncated, result!.stdout], ["timeout", true, `${MIB} characters`]);
  assertLess(ms, 500 + SLACK_MS);
  assertEquals(await alive(await fake.pids()), []);
});

Deno.test("runOnNodes() needs no permission but --allow-run=ssh, and names it", async () => {
  await using fake = await fakeSsh("echo hello");
  const plan = { nodes: numbered(1), command: ["x"] };
  const { results } = await runElsewhere(plan, fake);
  assertEquals(results.map(({ exitCode, stdout }) => [exitCode, stdout]), [[0, "hello\n"]]);
  const denied = await runElsewhere(plan, { ...fake, flags: [] });
  assertStringIncludes(denied.reason!, "NotCapable");
  assertStringIncludes(denied.reason!, "--allow-run=ssh");
});

Deno.test("runOnNodes() without run permission contacts no node first, and has no result", async () => {
  await using silent = await startNode("silent", { hostname: "127.0.0.2" });
  const fields = { name: "two", tailscaleIp: silent.hostname, sshHost: "127.0.0.3", sshPort: silent.port };
  const plan = { nodes: [{ name: "homeless" }, fields], command: ["x"], options: { timeoutMs: 1000 } };
  const { reason, told } = await runElsewhere(plan, { flags: ["--allow-net"] });
  assertStringIncludes(reason!, "--allow-run=ssh");
  assertEquals([told, silent.connections], [[], 0]);
});

/** What an ssh says last that ends with 255, of a node at a host and PORT, and what that means. */
const LAST_WORDS: readonly (readonly [host: string, says: string, code: string, options?: string])[] = [
  [
    "10.0.0.1",
    "kex_exchange_identification: Connection closed by remote host\r\nConnection closed by UNKNOWN port 65535",
    "connect",
  ],
  ["10.0.0.1", "Connection closed by 10.0.0.1 port PORT", "connect"],
  ["10.0.0.1", "Connection closed by 10.0.0.1 port 1", "exit"],
  ["10.0.0.1", "Unable to connect to 10.0.0.1:6379", "exit"],
  ["10.0.0.1", "Unable to negotiate with 10.0.0.1 port PORT: no matching cipher found.", "connect"],
  ["10.0.0.1", "Received data from 10.0.0.1", "exit"],
  ["10.0.0.1", "Received disconnect from 10.0.0.1 port PORT:2: Too many authentication failures", "connect"],
  ["10.0.0.1", "Connection to 10.0.0.1 closed by remote host.", "lost"],
  ["10.0.0.1", "Connection to 10.0.0.12 closed by remote host.", "exit"],
  ["10.0.0.1", "Connection to 10.0.0.1 port PORT: Broken pipe", "lost"],
  ["10.0.0.1", "Connection to 10.0.0.1 port 1: Broken pipe", "exit"],
  ["10.0.0.1", "Timeout, server 10.0.0.1 not responding.", "lost"],
  ["10.0.0.1", "Read from remote host 10.0.0.1: Connection reset by peer", "lost"],
  ["10.0.0.1", "client_loop: send disconnect: Broken pipe", "lost"],
  ["10.0.0.1", "ssh: connect to host jump port 22: Connection refused", "exit"],
  ["10.0.0.1", "ssh: connect to host jump port 22: Connection refused", "connect", "ProxyJump=jump"],
  ["10.0.0.1", "Connection reset by db.example port 5432", "exit", "ProxyJump=jump"],
  ["gpu.example", "Connection closed by 10.9.9.9 port PORT", "connect"],
  ["gpu.example", "Connection closed by 10.9.9.9 port 1", "exit"],
  ["gpu.example", "ssh: Could not resolve hostname gpu.example: Name or service not known", "connect"],
  ["2001:db8::1", "Connection closed by 2001:db8::1 port PORT", "connect"],
];

Deno.test("runOnNodes() tells by what ssh says last whether a command was started, and whose the exit code 255 is", async () => {
  // It says what is in the file that is called like its port, and after it.
  await using fake = await fakeSsh('while [ "$1" != -p ]; do shift; done; cat "$0.$2" >&2; exit 255');
  for (const isElsewhere of [false, true]) {
    const cases = LAST_WORDS.filter(([, , , option]) => (option !== undefined) === isElsewhere);
    const nodes = cases.map(([tailscaleIp], index) => ({ name: `n${index}`, tailscaleIp, sshPort: 1000 + index }));
    for (const [index, [, says]] of cases.entries()) {
      await Deno.writeTextFile(
        `${fake.folder}/ssh.${1000 + index}`,
        `${says.replace("PORT", String(1000 + index))}\r\n`,
      );
    }
    const options = isElsewhere ? { options: ["ProxyJump=jump"] } : {};
    const { results } = await runElsewhere({ nodes, command: ["x"], options }, fake);
    const codes = results.map(({ failure }, index) => [cases[index]![1], failure?.code]);
    assertEquals(codes, cases.map(([, says, code]) => [says, code]));
  }
});

Deno.test("runOnNodes() throws if there is no ssh, and tells of an ssh that cannot be started: local", async () => {
  await using fake = await fakeSsh("echo hello");
  const [node] = numbered(1);
  // Linux takes no argument of 128 KiB.
  const { results: [result] } = await runElsewhere({ nodes: [node!], command: ["x".repeat(200_000)] }, fake);
  assertEquals([result!.failure?.code, result!.exitCode], ["local", null]);
  await Deno.writeTextFile(`${fake.folder}/ssh`, "#!/nowhere\n");
  const { results, reason } = await runElsewhere({ nodes: numbered(2), command: ["x"] }, fake);
  assertEquals([results, reason], [[], "NotFound: There is no ssh on the PATH: install OpenSSH"]);
});

Deno.test("runOnNodes() lets the process end when it has returned, long before its deadline", async () => {
  await using fake = await fakeSsh("exit 0");
  const nodes = [{ name: "a", tailscaleIp: "127.0.1.1", sshHost: "127.0.2.1" }];
  const started = performance.now();
  const { results: [result] } = await runElsewhere({ nodes, command: ["x"] }, {
    ...fake,
    flags: ["--allow-run=ssh", "--allow-net=127.0.1.1:22,127.0.2.1:22"],
  });
  assertEquals([result!.exitCode, result!.failure], [0, undefined]);
  assertLess(performance.now() - started, 30_000);
});

Deno.test("runOnNodes() without net permission takes the first endpoint, and names the other and the flag if that fails", async () => {
  await using refusing = await fakeSsh(
    'echo "ssh: connect to host 127.0.0.8 port 22: Connection refused" >&2; exit 255',
  );
  const nodes = [{ name: "a", tailscaleIp: "127.0.0.8", sshHost: "root@127.0.0.9" }];
  const { results: [result] } = await runElsewhere({ nodes, command: ["x"] }, refusing);
  assertEquals(result!.failure?.code, "connect");
  assertStringIncludes(result!.failure!.message, "127.0.0.9");
  assertStringIncludes(result!.failure!.message, "--allow-net=127.0.0.8:22,127.0.0.9:22");
  // Another address would not mend this.
  await using closed = await fakeSsh('printf "ubuntu@127.0.0.8: Permission denied (publickey).\\r\\n" >&2; exit 255');
  const { results: [denied] } = await runElsewhere({ nodes, command: ["x"] }, closed);
  assertEquals(denied!.failure, { code: "connect", message: "ubuntu@127.0.0.8: Permission denied (publickey)." });
});

Deno.test("findSshEndpoint() takes what greets, and does not ask where there is nothing to choose", async () => {
  await using greets = await startNode("ssh-banner", { hostname: "127.0.0.2" });
  const { port } = greets;
  await using silent = await startNode("silent", { hostname: "127.0.0.3", port });
  const two = node({ tailscaleIp: silent.hostname, sshHost: `root@${greets.hostname}`, sshPort: port });
  const three = node({ tailscaleIp: greets.hostname, sshHost: `root@${silent.hostname}`, sshPort: port });
  for (const each of [two, three]) {
    const { host, protocol, port: found } = await findSshEndpoint(each);
    assertEquals([host, found, protocol], [greets.hostname, port, "ssh"]);
  }
  const before = [greets.connections, silent.connections];
  for (const option of ["ProxyJump=x", "proxycommand=x", "HostName=x", "Port=1"]) {
    assertEquals((await findSshEndpoint(two, { options: [option] })).host, greets.hostname, option);
  }
  const one = node({ tailscaleIp: silent.hostname, sshPort: port });
  assertEquals((await findSshEndpoint(one)).host, silent.hostname);
  assertEquals([greets.connections, silent.connections], before);
});

Deno.test("findSshEndpoint() takes the first if none greets within two seconds, or as soon as none can", async () => {
  const trickle: Conversation = async (conn, signal) => {
    for (;; await delay(50, { signal })) await send(conn, "\n");
  };
  const babble: Conversation = async (conn, signal) => {
    await send(conn, `${"x\r\n".repeat(150)}SSH-2.0-late\r\n`);
    await delay(5000, { signal });
  };
  const kinds: [Behaviour | Conversation, Behaviour | Conversation, atMostMs: number][] = [
    ["silent", trickle, 2000 + SLACK_MS],
    ["silent", babble, 2000 + SLACK_MS],
    ["closes", "refuses", SLACK_MS],
    ["http-500", "closes", 2000 + SLACK_MS],
  ];
  await Promise.all(kinds.map(async ([first, second, atMostMs], index) => {
    const [hostname, other] = [`127.0.1.${2 * index}`, `127.0.1.${2 * index + 1}`];
    await using one = await startNode(first, { hostname });
    await using _two = await startNode(second, { hostname: other, port: one.port });
    // With a port of its own, ssh_host comes first.
    const fields = { tailscaleIp: other, sshHost: hostname, sshPort: one.port };
    const started = performance.now();
    assertEquals((await findSshEndpoint(node(fields))).host, hostname);
    assertLess(performance.now() - started, atMostMs);
  }));
});

Deno.test("findSshEndpoint() closes a connection that is made when another one has won already", async () => {
  await using greets = await startNode("ssh-banner", { hostname: "127.0.0.2" });
  await using silent = await startNode("silent", { hostname: "127.0.0.3", port: greets.port });
  const { connect } = Deno;
  const won = Promise.withResolvers<void>();
  Deno.connect = (async (options: Deno.ConnectOptions & { signal: AbortSignal }) => {
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
    const two = node({ tailscaleIp: greets.hostname, sshHost: silent.hostname, sshPort: greets.port });
    assertEquals((await findSshEndpoint(two)).host, greets.hostname);
  } finally {
    Deno.connect = connect;
  }
  assertEquals(silent.connections, 1);
});

Deno.test("findSshEndpoint() ends at its signal with the reason", async () => {
  await using silent = await startNode("silent");
  await using hole = await startNode("black-hole", { hostname: "127.0.0.3", port: silent.port });
  const two = node({ tailscaleIp: silent.hostname, sshHost: hole.hostname, sshPort: silent.port });
  const reason = new Error("enough");
  const controller = new AbortController();
  setTimeout(() => controller.abort(reason), 100);
  const started = performance.now();
  assert(await assertRejects(() => findSshEndpoint(two, { signal: controller.signal })) === reason);
  assertLess(performance.now() - started, 1000);
});

Deno.test({
  name: "findSshEndpoint() without net permission takes the first",
  permissions: { net: false },
  async fn() {
    const { connect } = Deno;
    // On a terminal, Deno would ask.
    let connects = 0;
    Deno.connect = () => {
      connects++;
      throw new Error("There is no network");
    };
    try {
      const { host, port } = await findSshEndpoint(node({ tailscaleIp: "100.64.0.1", sshHost: "root@203.0.113.7" }));
      assertEquals([host, port, connects], ["100.64.0.1", 22, 0]);
    } finally {
      Deno.connect = connect;
    }
  },
});

Deno.test("sshCommand() gives the whole argument list", () => {
  const full = node({ sshHost: "root@2001:db8::1", sshKey: "~/.ssh/id", sshPort: 2222 });
  assertEquals(sshCommand(full, ["echo", "a b"], { options: ["ServerAliveInterval=5"] }), [
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-p",
    "2222",
    "-i",
    "~/.ssh/id",
    "-o",
    "ServerAliveInterval=5",
    "--",
    "root@2001:db8::1",
    "echo",
    "a b",
  ]);
  const plain = node({ sshHost: "gpu.example.com" });
  const replaced = { user: "ops", connectTimeoutMs: 1500, options: ["port=23", "BatchMode=no"] };
  assertEquals(
    sshCommand(plain, ["-x"], replaced).join(" "),
    "ssh -o ConnectTimeout=2 -o port=23 -o BatchMode=no -- ops@gpu.example.com -x",
  );
  // Its type says that there is one.
  const program: string = sshCommand(plain, ["x"])[0];
  assertEquals(program, "ssh");
  const endpoint = { protocol: "ssh", host: "203.0.113.7", port: 31_022, path: "" } as const;
  const elsewhere = sshCommand(plain, ["x"], { endpoint });
  assertEquals(elsewhere.slice(5, 7), ["-p", "31022"]);
  assertEquals(elsewhere.at(-2), "ubuntu@203.0.113.7");
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

Deno.test("sshCommand() and ClusterNode refuse what ssh or a shell could take for something else", () => {
  const plain = node({ sshHost: "x" });
  for (const text of UNSAFE) {
    for (const fields of [{ sshHost: text }, { sshHost: `root@${text}` }, { tailscaleIp: text }]) {
      assertThrows(() => node(fields), TypeError, undefined, text);
    }
    assertThrows(() => node({ sshHost: "x", sshUser: text }), TypeError, undefined, text);
    assertThrows(() => node({ sshHost: "x", sshKey: text }), TypeError, undefined, text);
    assertThrows(() => sshCommand(plain, ["x"], { user: text }), TypeError, "user", text);
    for (const option of ["ProxyJump", "HostName", "User", "IdentityFile"]) {
      assertThrows(() => sshCommand(plain, ["x"], { options: [`${option}=${text}`] }), TypeError, option, text);
    }
    assertThrows(() => sshCommand(plain, ["x"], { options: [`ProxyJump=ok,${text}`] }), TypeError, "ProxyJump", text);
  }
  for (const option of ["", "-x", "NoValue", "A B=c", "ProxyCommand=a\nb"]) {
    assertThrows(() => sshCommand(plain, ["x"], { options: [option] }), TypeError, "ssh option", option);
  }
  const jump = ["ProxyJump=ops@[2001:db8::1]:22,other"];
  assert(sshCommand(plain, ["x"], { options: jump }).includes(jump[0]!));
});

Deno.test("sshCommand() and runOnNodes() throw at a fault of the caller, before any ssh is started", async () => {
  const plain = node({ sshHost: "x" });
  assertThrows(() => sshCommand(node(), ["x"]), TypeError, "address");
  assertThrows(() => sshCommand(plain, ["x"], { connectTimeoutMs: 0 }), RangeError);
  assertThrows(() => sshCommand(plain, ["a\0b"]), TypeError, "NUL");
  await using fake = await fakeSsh(FAKES.recording);
  for (
    const options of [{ timeoutMs: 0 }, { concurrency: 0 }, { connectTimeoutMs: -1 }, { user: "a b" }, {
      options: ["x"],
    }]
  ) {
    const { reason } = await runElsewhere({ nodes: numbered(1), command: ["x"], options }, fake);
    assertMatch(reason!, /^(RangeError|TypeError): /, JSON.stringify(options));
  }
  assertEquals(await fake.calls(), []);
  await using server = await startNode("closes");
  const nodes = ["a", "b"].map((name) => node({ name, ...LOCAL, sshPort: server.port }));
  // One that is unsafe stops them all.
  const command = ({ name }: ClusterNode) => [name === "b" ? "a\0b" : "true"];
  await assertRejects(() => runOnNodes(nodes, command, { concurrency: 1 }), TypeError, "NUL");
  for (const none of [[], "uptime" as never, ({ name }: ClusterNode) => name === "b" ? [] : ["true"]]) {
    await assertRejects(() => runOnNodes(nodes, none), TypeError, "empty");
  }
  assertEquals(server.connections, 0);
});

/** The command lines of the ssh processes that go to a port. */
async function sshProcesses(port: number): Promise<string[]> {
  const script = 'for file in /proc/[0-9]*/cmdline; do tr "\\0" " " < "$file"; echo; done 2> /dev/null';
  const { stdout } = await run("sh", ["-c", script]);
  return stdout.split("\n").filter((line) => /^(\S*\/)?ssh /.test(line) && line.includes(` -p ${port} `));
}

sshdTest("runOnNodes() leaves no ssh behind at its signal or deadline", async (sshd) => {
  const nodes = Array.from({ length: 3 }, (_, index) => on(sshd, { name: `gpu-${index}` }));
  const controller = new AbortController();
  const results: CommandResult[] = [];
  const reason = new Error("enough");
  let started = 0;
  const running = runOnNodes(nodes, ["echo started; exec sleep 5"], {
    options: sshd.options,
    signal: controller.signal,
    onOutput: () => void (++started === 3 && controller.abort(reason)),
    onResult: (result) => void results.push(result),
  });
  assert(await assertRejects(() => running) === reason);
  assertEquals(await sshProcesses(sshd.port), []);
  assertEquals(results.map(({ failure }) => failure?.code), ["signal", "signal", "signal"]);
  await runOnNodes(nodes, ["exec sleep 5"], { options: sshd.options, timeoutMs: 500 });
  assertEquals(await sshProcesses(sshd.port), []);
  await assertRejects(() => runOnNodes(nodes, ["true"], { signal: AbortSignal.abort(reason) }), Error, "enough");
});
