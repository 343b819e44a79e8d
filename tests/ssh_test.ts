import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertRejects,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import {
  ClusterNode,
  type ClusterNodeFields,
  type CommandResult,
  runOnNodes,
} from "../mod.ts";
import { type LoopbackNode, send, startNode } from "./loopback_cluster.ts";
import { run, testUnless } from "./process.ts";
import {
  PRINT_ADDRESS,
  remoteTerminalMissing,
  type Sshd,
  SSHD_ADDRESSES,
  sshdTest,
  startSshd,
} from "./sshd.ts";
import {
  alive,
  eventually,
  FAKES,
  fakeSsh,
  HASTENED,
  leftBy,
  runElsewhere,
} from "./ssh_process.ts";

const MIB = 1024 * 1024;

/** What may be added to a deadline that is promised, on a busy machine. */
const SLACK_MS = 8000;

function node(fields: Partial<ClusterNodeFields> = {}): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** A node on an sshd. */
function on(sshd: Sshd, fields: Partial<ClusterNodeFields> = {}): ClusterNode {
  return node({
    tailscaleIp: SSHD_ADDRESSES[0],
    sshPort: sshd.port,
    sshUser: sshd.user,
    sshKey: sshd.keyPath,
    ...fields,
  });
}

/** Two nodes, each on an address of its own of an sshd. */
function pair(sshd: Sshd): [ClusterNode, ClusterNode] {
  return [
    on(sshd, { name: "a", tailscaleIp: SSHD_ADDRESSES[0] }),
    on(sshd, { name: "b", tailscaleIp: SSHD_ADDRESSES[1] }),
  ];
}

function numbered(count: number): ClusterNodeFields[] {
  return Array.from({ length: count }, (_, index) => ({
    name: `gpu-${index + 1}`,
    tailscaleIp: "127.0.0.1",
  }));
}

function outcome({ failure, exitCode }: CommandResult): string {
  return failure ? `${failure.code}: ${failure.message}` : String(exitCode);
}

sshdTest(
  "runOnNodes() returns one result a node, in order, with all about it",
  async (sshd) => {
    const nodes = [...pair(sshd), node({ name: "c" })];
    const command =
      `${PRINT_ADDRESS}; echo oops >&2; [ $3 = 127.0.0.1 ] || exit 7`;

    const results = await runOnNodes(nodes, [command], {
      options: sshd.options,
    });

    assertEquals(results.map((result) => result.node), nodes);
    const seen = results.map(({ node, durationMs, ...others }) => {
      assert(durationMs >= 0);
      return { name: node.name, ...others };
    });
    const common = { signal: null, stderr: "oops\n", truncated: false };
    assertEquals(seen, [
      {
        name: "a",
        ...common,
        exitCode: 0,
        stdout: "127.0.0.1\n",
        failure: undefined,
      },
      {
        name: "b",
        ...common,
        exitCode: 7,
        stdout: "127.0.0.2\n",
        failure: { code: "exit", message: "exit code 7" },
      },
      {
        name: "c",
        ...common,
        exitCode: null,
        stdout: "",
        stderr: "",
        failure: {
          code: "no-address",
          message: "set tailscale_ip or ssh_host",
        },
      },
    ]);
  },
);

sshdTest(
  "runOnNodes() runs what a function returns for each node",
  async (sshd) => {
    const command = (
      { name }: ClusterNode,
    ) => ["echo", `this is ${name};`, "echo 'a  b'"];
    const results = await runOnNodes(pair(sshd), command, {
      options: sshd.options,
    });
    const outputs = results.map(({ stdout }) => stdout);
    assertEquals(outputs, ["this is a\na  b\n", "this is b\na  b\n"]);
  },
);

sshdTest(
  "runOnNodes() gives every node the bytes of stdin, and none by default",
  async (sshd) => {
    const nodes = pair(sshd);
    const { options } = sshd;
    const stdin = new Uint8Array(300_000).map((_, index) => index % 251);

    const sums = await runOnNodes(nodes, ["cksum"], { options, stdin });
    assertEquals(new Set(sums.map(({ stdout }) => stdout)).size, 1);
    assertMatch(sums[0]!.stdout, / 300000$/m);

    const script = new TextEncoder().encode("echo from a script\n");
    for (
      const { stdout } of await runOnNodes(nodes, ["sh -s"], {
        options,
        stdin: script,
      })
    ) {
      assertEquals(stdout, "from a script\n");
    }

    for (
      const { stdout } of await runOnNodes(nodes, ["cat; echo done"], {
        options,
      })
    ) {
      assertEquals(stdout, "done\n");
    }

    // What does not read its stdin to the end is no error.
    for (
      const result of await runOnNodes(nodes, ["true"], { options, stdin })
    ) {
      assertEquals(outcome(result), "0");
    }
  },
);

sshdTest(
  "runOnNodes() reports output as it comes, and each result at its end",
  async (sshd) => {
    const events: string[] = [];
    const gate = Promise.withResolvers<void>();
    await using server = await startNode(async (conn) => {
      await gate.promise;
      await send(conn, "open\n");
    });
    const read = `read line < /dev/tcp/127.0.0.1/${server.port}; echo $line`;
    const command = ({ name }: ClusterNode) =>
      name === "a" ? ["bash", "-c", `'echo first; ${read}'`] : ["true"];

    const results = await runOnNodes(pair(sshd), command, {
      options: sshd.options,
      onOutput(node, stream, text) {
        events.push(`${node.name} ${stream} ${JSON.stringify(text)}`);
        if (events.includes("b 0")) gate.resolve();
      },
      onResult(result) {
        events.push(`${result.node.name} ${outcome(result)}`);
        if (events.some((event) => event.startsWith("a stdout"))) {
          gate.resolve();
        }
      },
    });

    assertEquals(results.map(outcome), ["0", "0"]);
    assertEquals(events.toSorted(), [
      "a 0",
      'a stdout "first\\n"',
      'a stdout "open\\n"',
      "b 0",
    ]);
    assertEquals(events.at(-1), "a 0");
  },
);

sshdTest(
  "runOnNodes() reads no more while a promise of onOutput() is pending",
  async (sshd) => {
    const size = 20 * MIB;
    const sent = `${sshd.folder}/sent`;
    const command = [`head -c ${size} /dev/zero | tr '\\0' x; touch ${sent}`];
    const gate = Promise.withResolvers<void>();
    let heard = 0;

    const running = runOnNodes([on(sshd)], command, {
      options: sshd.options,
      async onOutput(_node, _stream, text) {
        heard += text.length;
        await gate.promise;
      },
    });
    await eventually(() => Promise.resolve(heard), (length) => length > 0);
    // Far longer than it takes to send all of it.
    await delay(1500);
    const isSent = await Deno.stat(sent).then(() => true, () => false);
    gate.resolve();
    const [result] = await running;

    assertEquals([isSent, outcome(result!), heard], [false, "0", size]);
  },
);

for (const dead of ["refuses", "silent", "black-hole"] as const) {
  for (const isFirst of [true, false]) {
    const place = isFirst ? "first" : "second";
    sshdTest(
      `runOnNodes() connects to the address that is alive if the ${place} one is ${dead}`,
      async (sshd) => {
        const living = SSHD_ADDRESSES[1];
        const { port } = sshd;
        await using other = await startNode(dead, {
          hostname: "127.0.0.3",
          port,
        });
        // With a port of its own, ssh_host comes first.
        const addresses = isFirst
          ? { sshHost: other.hostname, tailscaleIp: living }
          : { sshHost: living, tailscaleIp: other.hostname };

        const [result] = await runOnNodes([on(sshd, addresses)], [
          PRINT_ADDRESS,
        ], { options: sshd.options });

        assertEquals(outcome(result!), "0", result!.stderr);
        assertEquals(result!.stdout, `${living}\n`);
      },
    );
  }
}

sshdTest(
  "runOnNodes() runs a command once on a node whose two addresses are both alive",
  async (sshd) => {
    const both = on(sshd, {
      tailscaleIp: SSHD_ADDRESSES[0],
      sshHost: SSHD_ADDRESSES[1],
    });
    const command = [`echo x >> ${sshd.folder}/ran`];
    const results = await runOnNodes([both], command, {
      options: sshd.options,
    });
    assertEquals(results.map(outcome), ["0"]);
    assertEquals(await Deno.readTextFile(`${sshd.folder}/ran`), "x\n");
  },
);

/** A proxy in front of a port, which can cut all of its connections. */
async function startProxy(
  port: number,
): Promise<LoopbackNode & { cut(): void }> {
  const cuts = Promise.withResolvers<void>();
  const proxy = await startNode(async (conn) => {
    using upstream = await Deno.connect({ hostname: "127.0.0.1", port });
    const both = Promise.all([copy(conn, upstream), copy(upstream, conn)])
      .catch(() => {});
    await Promise.race([both, cuts.promise]);
  });
  return Object.assign(proxy, { cut: () => cuts.resolve() });
}

async function copy(from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(65_536);
  while (true) {
    const count = await from.read(buffer);
    if (count === null) break;
    for (let sent = 0; sent < count;) {
      sent += await to.write(buffer.subarray(sent, count));
    }
  }
  await to.closeWrite();
}

for (const isQuiet of [true, false]) {
  const kind = isQuiet ? "quiet" : "talkative";
  sshdTest(
    `runOnNodes() reports a cut connection of a ${kind} ssh as "ssh", and ran it once`,
    async (sshd) => {
      const options = sshd.options.filter((option) =>
        isQuiet || !option.startsWith("LogLevel")
      );
      await using proxy = await startProxy(sshd.port);
      const through = on(sshd, { sshPort: proxy.port });
      const ran = `${sshd.folder}/ran`;
      const command = [`echo x >> ${ran}; echo started; exec sleep 5`];

      const [result] = await runOnNodes([through], command, {
        options,
        onOutput(_node, stream) {
          if (stream === "stdout") proxy.cut();
        },
      });

      assertEquals(
        [result!.failure?.code, result!.exitCode],
        ["ssh", 255],
        outcome(result!),
      );
      assertMatch(result!.failure!.message, /closed|reset|broken/i);
      assertEquals(result!.stdout, "started\n");
      assertEquals(await Deno.readTextFile(ran), "x\n");
    },
  );
}

const EXIT_CODES = [
  [1, "exit"],
  [126, "exit"],
  [254, "exit"],
  [255, "ssh"],
] as const;

for (const [exitCode, code] of EXIT_CODES) {
  sshdTest(
    `runOnNodes() reports the exit code ${exitCode} as "${code}", whatever was said`,
    async (sshd) => {
      const words = "ssh: connect to host other port 22: Connection refused";
      const command = [`echo '${words}' >&2; exit ${exitCode}`];
      const [result] = await runOnNodes([on(sshd)], command, {
        options: sshd.options,
      });
      assertEquals([result!.failure?.code, result!.exitCode], [code, exitCode]);
    },
  );
}

Deno.test("runOnNodes() reports several of the last lines that ssh said", async () => {
  await using fake = await fakeSsh(
    'printf "channel 0: open failed: connect failed: Connection refused\\r\\n' +
      'stdio forwarding failed\\r\\nConnection closed by UNKNOWN port 65535\\r\\n" >&2; exit 255',
  );
  const plan = { nodes: numbered(1), command: ["x"] };
  const { results: [result] } = await runElsewhere(plan, fake);
  assertEquals(result!.failure?.code, "ssh");
  assertStringIncludes(result!.failure!.message, "Connection refused");
  assertStringIncludes(
    result!.failure!.message,
    "Connection closed by UNKNOWN port 65535",
  );
});

Deno.test("runOnNodes() reports an ssh that fails in silence as such", async () => {
  await using fake = await fakeSsh("exit 255");
  const { results: [result] } = await runElsewhere({
    nodes: numbered(1),
    command: ["x"],
  }, fake);
  assertEquals([result!.failure?.code, result!.exitCode], ["ssh", 255]);
  assert(result!.failure!.message.trim() !== "");
});

sshdTest(
  "runOnNodes() starts no ssh after onResult() has thrown",
  async (sshd) => {
    const nodes = [
      node({ name: "homeless" }),
      node({ name: "homeless too" }),
      on(sshd),
    ];
    const onResult = (result: CommandResult) => {
      if (result.node === nodes[0]) throw new Error("enough");
    };
    const options = { options: sshd.options, concurrency: 1, onResult };
    await assertRejects(
      () => runOnNodes(nodes, ["exec sleep 5"], options),
      Error,
      "enough",
    );
    assertEquals(await sshd.connections(), 0);
  },
);

for (const callback of ["onOutput", "onResult"] as const) {
  for (const isAsync of [false, true]) {
    const how = isAsync ? "rejects with" : "throws";
    sshdTest(
      `runOnNodes() ends every ssh and rejects with what ${callback}() ${how}`,
      async (sshd) => {
        const reason = new Error("enough");
        const fail = () => {
          if (isAsync) return Promise.reject(reason);
          throw reason;
        };
        const failing = callback === "onOutput"
          ? "echo started; exec sleep 5"
          : "true";
        const command = (
          { name }: ClusterNode,
        ) => [name === "a" ? failing : "exec sleep 5"];
        const options = { options: sshd.options, [callback]: fail };
        assert(
          await assertRejects(() =>
            runOnNodes(pair(sshd), command, options)
          ) === reason,
        );
        assertEquals(await sshProcesses(sshd.port), []);
      },
    );
  }
}

sshdTest(
  "runOnNodes() reports why ssh failed, and that nothing ran",
  async (sshd) => {
    await using refuses = await startNode("refuses");
    await using closes = await startNode("closes");
    await using web = await startNode("http-500");
    const known = `${sshd.folder}/known_hosts`;
    const otherKey = await Deno.readTextFile(`${sshd.otherKeyPath}.pub`);
    await Deno.writeTextFile(known, `[127.0.0.1]:${sshd.port} ${otherKey}`);
    const strict = (file: string) => [
      ...sshd.options.filter((option) =>
        !/^(StrictHostKeyChecking|UserKnownHostsFile|LogLevel)=/.test(option)
      ),
      `UserKnownHostsFile=${file}`,
      "GlobalKnownHostsFile=/dev/null",
    ];
    const { options } = sshd;
    const cases: [string, ClusterNode, readonly string[], RegExp][] = [
      ["refused", on(sshd, { sshPort: refuses.port }), options, /refused/],
      ["closed", on(sshd, { sshPort: closes.port }), options, /./],
      ["another server", on(sshd, { sshPort: web.port }), options, /./],
      [
        "another key",
        on(sshd, { sshKey: sshd.otherKeyPath }),
        options,
        /Permission denied/,
      ],
      [
        "no such key",
        on(sshd, { sshKey: "/nowhere/key" }),
        options,
        /Permission denied|No such file/,
      ],
      [
        "a name",
        on(sshd, { tailscaleIp: `${"x".repeat(64)}.invalid` }),
        options,
        /resolve/,
      ],
      ["another host by an option", on(sshd), [
        ...options,
        "HostName=127.0.0.8",
      ], /127\.0\.0\.8.*refused/],
      [
        "a bad option",
        on(sshd),
        [...options, "NoSuchOpt=1"],
        /NoSuchOpt|nosuchopt/,
      ],
      [
        "unknown host key",
        on(sshd),
        strict("/dev/null"),
        /StrictHostKeyChecking=accept-new/,
      ],
      [
        "changed host key",
        on(sshd),
        strict(known),
        /host key|host identification/i,
      ],
    ];

    for (const [what, node, options, message] of cases) {
      const [result] = await runOnNodes([node], ["echo ran"], { options });
      assertEquals(
        [result!.failure?.code, result!.stdout],
        ["ssh", ""],
        `${what}: ${outcome(result!)}`,
      );
      assertMatch(result!.failure!.message, message, what);
      // An option that would not help is not named.
      const isNamed = result!.failure!.message.includes("accept-new");
      assertEquals(isNamed, what === "unknown host key", outcome(result!));
    }

    const accepting = [
      ...strict(`${known}.new`),
      "StrictHostKeyChecking=accept-new",
    ];
    const [accepted] = await runOnNodes([on(sshd)], ["echo ran"], {
      options: accepting,
    });
    assertEquals([outcome(accepted!), accepted!.stdout], ["0", "ran\n"]);
  },
);

Deno.test("runOnNodes() ends a login at a server that accepts and does not go on", async () => {
  await using silent = await startNode("silent");
  // Each byte could begin anew the wait of ssh itself, and after the greeting
  // it waits without end.
  await using trickling = await startNode(async (conn, signal) => {
    for (;; await delay(50, { signal })) await send(conn, "S");
  });
  await using greeting = await startNode("ssh-banner");
  const cases = [
    [silent, { connectTimeoutMs: 1000 }, ["ssh"]],
    [silent, { timeoutMs: 1000 }, ["timeout"]],
    [greeting, { connectTimeoutMs: 1000, timeoutMs: 1500 }, ["ssh", "timeout"]],
    [trickling, { connectTimeoutMs: 1000, timeoutMs: 1500 }, [
      "ssh",
      "timeout",
    ]],
  ] as const;

  await Promise.all(cases.map(async ([{ port }, options, codes]) => {
    const started = performance.now();
    const nodes = [node({ tailscaleIp: "127.0.0.1", sshPort: port })];
    const [result] = await runOnNodes(nodes, ["true"], options);
    assert(codes.includes(result!.failure?.code as never), outcome(result!));
    assertLess(performance.now() - started, 1500 + SLACK_MS);
  }));
});

Deno.test("runOnNodes() has no deadline by default", async () => {
  await using fake = await fakeSsh("sleep 5; echo done");
  const plan = { nodes: numbered(1), command: ["apt", "upgrade"] };
  // For the process, five seconds are more than eight minutes.
  const flags = [...HASTENED, "--allow-run=ssh"];
  const { results } = await runElsewhere(plan, { ...fake, flags });
  assertEquals(results.map(({ failure, stdout }) => [failure, stdout]), [[
    undefined,
    "done\n",
  ]]);
});

sshdTest(
  "runOnNodes() ends ssh at its deadline, and says that the command may go on",
  async (sshd) => {
    const started = performance.now();
    const [result] = await runOnNodes(
      [on(sshd)],
      ["echo before; exec sleep 30"],
      {
        options: sshd.options,
        timeoutMs: 4500,
      },
    );
    assertLess(performance.now() - started, 4500 + SLACK_MS);
    assertEquals([result!.failure?.code, result!.stdout, result!.exitCode], [
      "timeout",
      "before\n",
      null,
    ]);
    assertMatch(
      result!.failure!.message,
      /4\.5 s.*may (still )?(go on|be running)/,
    );
    assertStringIncludes(result!.failure!.message, "RequestTTY=force");
  },
);

testUnless(
  remoteTerminalMissing(),
  "runOnNodes() with RequestTTY=force ends the command over there with the connection",
  async () => {
    await using sshd = await startSshd();
    for (const isForced of [false, true]) {
      const file = `${sshd.folder}/pid-${isForced}`;
      const options = [
        ...sshd.options,
        ...(isForced ? ["RequestTTY=force"] : []),
      ];
      const command = [`echo $$ > ${file}; exec sleep 60`];

      const [result] = await runOnNodes([on(sshd)], command, {
        options,
        timeoutMs: 5000,
      });

      assertEquals(result!.failure?.code, "timeout");
      const mayStillRun = /still be running/.test(result!.failure!.message);
      assertEquals(mayStillRun, !isForced);
      const pid = (await Deno.readTextFile(file)).trim();
      const expected = isForced ? 0 : 1;
      const left = await eventually(
        () => alive([pid]),
        ({ length }) => length === expected,
      );
      assertEquals(left.length, expected);
    }
  },
);

sshdTest(
  "runOnNodes() keeps 1 MiB of each stream, and gives onOutput() all of it",
  async (sshd) => {
    const size = 3_000_000;
    const heard = { stdout: 0, stderr: 0 };
    const flood = `head -c ${size} /dev/zero | tr '\\0' x >&2; echo short`;
    const [flooded] = await runOnNodes([on(sshd)], [flood], {
      options: sshd.options,
      onOutput(_node, stream, text) {
        heard[stream] += text.length;
      },
    });
    assertEquals([outcome(flooded!), flooded!.truncated, flooded!.stdout], [
      "0",
      true,
      "short\n",
    ]);
    assertEquals(heard, { stdout: 6, stderr: size });
    assert(flooded!.stderr === "x".repeat(MIB));

    const exactly = `head -c ${MIB} /dev/zero | tr '\\0' x`;
    const [exact] = await runOnNodes([on(sshd)], [exactly], {
      options: sshd.options,
    });
    assertEquals([exact!.truncated, exact!.stdout.length], [false, MIB]);
  },
);

sshdTest(
  "runOnNodes() gives onOutput() whole characters, however they are cut",
  async (sshd) => {
    const text = "ä€😀".repeat(20_000);
    let heard = "";
    const [result] = await runOnNodes([on(sshd)], ["cat"], {
      options: sshd.options,
      stdin: new TextEncoder().encode(text),
      onOutput(_node, _stream, piece) {
        heard += piece;
      },
    });
    assertEquals([heard === text, result!.stdout === text], [true, true]);
  },
);

sshdTest("runOnNodes() runs on 100 nodes", async (sshd) => {
  const nodes = Array.from(
    { length: 100 },
    (_, index) => on(sshd, { name: `gpu-${index}` }),
  );
  let ended = 0;
  const onResult = () => {
    ended++;
  };
  const results = await runOnNodes(nodes, ["echo hello"], {
    options: sshd.options,
    onResult,
  });
  assertEquals(results.map(({ node }) => node), nodes);
  assertEquals(new Set(results.map(outcome)), new Set(["0"]));
  assertEquals(
    new Set(results.map(({ stdout }) => stdout)),
    new Set(["hello\n"]),
  );
  assertEquals(ended, 100);
});

Deno.test("runOnNodes() has at most `concurrency` commands under way", async () => {
  await using fake = await fakeSsh(
    `ls "$0".run.* 2> /dev/null | wc -l >> "$0.calls"
touch "$0.run.$$"; sleep 0.1; rm "$0.run.$$"`,
  );
  const plan = {
    nodes: numbered(9),
    command: ["x"],
    options: { concurrency: 3 },
  };
  const { results } = await runElsewhere(plan, fake);
  assertEquals(
    results.map(({ exitCode }) => exitCode),
    plan.nodes.map(() => 0),
  );
  const others = (await fake.calls()).map(Number);
  assert(Math.max(...others) <= 2, others.join());
});

Deno.test("runOnNodes() starts each ssh in a session of its own, without a terminal", async () => {
  // What follows the name: state, parent, group, session, terminal.
  await using fake = await fakeSsh(
    'sed "s/.*) //" /proc/$$/stat | cut -d " " -f 1-5; echo $$',
  );
  const { results } = await runElsewhere(
    { nodes: numbered(2), command: ["x"] },
    fake,
  );
  for (const { stdout } of results) {
    const [stat = "", pid] = stdout.split("\n");
    const [, , group, session, terminal] = stat.split(" ");
    assertEquals([group, session, terminal], [pid, pid, "0"], stdout);
  }
});

for (const kind of ["polite", "stubborn"] as const) {
  Deno.test(`runOnNodes() ends every ssh at its signal, a ${kind} one too, and rejects with the reason`, async () => {
    await using fake = await fakeSsh(FAKES[kind]);
    const plan = {
      nodes: numbered(3),
      command: ["x"],
      options: { concurrency: 2 },
      abortAfter: 2,
    };
    const { reason, ms, results } = await runElsewhere(plan, fake);

    assertEquals(reason, "enough");
    assertLess(ms, SLACK_MS);
    const pids = await fake.pids();
    assertEquals([pids.length, await alive(pids)], [2, []]);
    assertEquals(results.map(({ name }) => name), ["gpu-1", "gpu-2"]);
    for (const { failure } of results) {
      assertEquals(failure?.code, "signal");
      assertMatch(failure!.message, /may (still )?(go on|be running)/);
    }
  });

  Deno.test(`runOnNodes() ends a ${kind} ssh at its deadline`, async () => {
    await using fake = await fakeSsh(FAKES[kind]);
    const plan = {
      nodes: numbered(1),
      command: ["x"],
      options: { timeoutMs: 2500 },
    };
    const { results: [result], ms } = await runElsewhere(plan, fake);

    assertEquals([result!.failure?.code, result!.stdout], [
      "timeout",
      "started\n",
    ]);
    assertLess(ms, 2500 + SLACK_MS);
    assertEquals(await alive(await fake.pids()), []);
    // It is asked to end before it is made to.
    assertEquals(await fake.calls(), kind === "polite" ? ["asked to end"] : []);
  });
}

Deno.test("runOnNodes() does not wait for a process that holds the pipe of an ssh that has ended", async () => {
  await using fake = await fakeSsh(FAKES.forking);
  const { results: [result] } = await runElsewhere({
    nodes: numbered(1),
    command: ["x"],
  }, fake);
  assertEquals([result!.stdout, result!.failure], ["done\n", undefined]);
  assertEquals(
    (await fake.processes()).length,
    1,
    "it has ended: the test shows nothing",
  );
});

Deno.test("runOnNodes() does not wait for a process that writes on after ssh was ended at its deadline", async () => {
  await using fake = await fakeSsh(FAKES.noisy);
  const plan = {
    nodes: numbered(1),
    command: ["x"],
    options: { timeoutMs: 2500 },
  };
  const { results: [result], ms } = await runElsewhere(plan, fake);
  assertEquals([result!.failure?.code, result!.stdout], [
    "timeout",
    "started\n",
  ]);
  assertLess(ms, 2500 + SLACK_MS);
});

Deno.test("runOnNodes() keeps 1 MiB of an endless output, and ends it at its deadline", async () => {
  await using fake = await fakeSsh(FAKES.flooding);
  const plan = {
    nodes: numbered(1),
    command: ["x"],
    options: { timeoutMs: 2500 },
  };
  const { results: [result], ms } = await runElsewhere(plan, fake);
  assertEquals(
    [result!.failure?.code, result!.truncated, result!.stdout],
    ["timeout", true, `${MIB} characters`],
  );
  assertLess(ms, 2500 + SLACK_MS);
  assertEquals(await leftBy(fake), []);
});

Deno.test("runOnNodes() needs no permission but --allow-run=ssh, and names it", async () => {
  await using fake = await fakeSsh("echo hello");
  const plan = { nodes: numbered(1), command: ["x"] };
  const { results } = await runElsewhere(plan, fake);
  assertEquals(results.map(({ exitCode, stdout }) => [exitCode, stdout]), [[
    0,
    "hello\n",
  ]]);

  const denied = await runElsewhere(plan, { ...fake, flags: [] });
  assertStringIncludes(denied.reason!, "NotCapable");
  assertStringIncludes(denied.reason!, "--allow-run=ssh");
});

Deno.test("runOnNodes() without run permission contacts no node, and has no result", async () => {
  await using silent = await startNode("silent", { hostname: "127.0.0.2" });
  const two = {
    name: "two",
    tailscaleIp: silent.hostname,
    sshHost: "127.0.0.3",
    sshPort: silent.port,
  };
  const plan = {
    nodes: [{ name: "homeless" }, two],
    command: ["x"],
    options: { timeoutMs: 2500 },
  };
  const { reason, order } = await runElsewhere(plan, {
    flags: ["--allow-net"],
  });
  assertStringIncludes(reason!, "--allow-run=ssh");
  assertEquals([order, silent.connections], [[], 0]);
});

Deno.test("runOnNodes() without net permission tries the first endpoint, and names the flag if that fails", async () => {
  await using fake = await fakeSsh(
    'echo "ssh: connect to host 127.0.0.8 port 22: Connection refused" >&2; exit 255',
  );
  const nodes = [{
    name: "a",
    tailscaleIp: "127.0.0.8",
    sshHost: "root@127.0.0.9",
  }];
  const { results: [result] } = await runElsewhere(
    { nodes, command: ["x"] },
    fake,
  );
  assertEquals(result!.failure?.code, "ssh");
  assertStringIncludes(
    result!.failure!.message,
    "--allow-net=127.0.0.8:22,127.0.0.9:22",
  );
});

Deno.test("runOnNodes() rejects if there is no ssh", async () => {
  await using fake = await fakeSsh("");
  await Deno.writeTextFile(`${fake.folder}/ssh`, "#!/nowhere\n");
  const { results, reason } = await runElsewhere({
    nodes: numbered(2),
    command: ["x"],
  }, fake);
  assertEquals([results, reason], [
    [],
    "NotFound: There is no ssh on the PATH: install OpenSSH",
  ]);
});

Deno.test('runOnNodes() reports an ssh that cannot be started as "local"', async () => {
  await using fake = await fakeSsh("echo hello");
  // Linux takes no argument of 128 KiB.
  const plan = { nodes: numbered(1), command: ["x".repeat(200_000)] };
  const { results: [result] } = await runElsewhere(plan, fake);
  assertEquals([result!.failure?.code, result!.exitCode], ["local", null]);
});

Deno.test("runOnNodes() lets the process end when it has returned, long before its deadline", async () => {
  await using fake = await fakeSsh("exit 0");
  const nodes = [{ name: "a", tailscaleIp: "127.0.1.1", sshHost: "127.0.2.1" }];
  const plan = { nodes, command: ["x"], options: { timeoutMs: 100_000 } };
  const flags = ["--allow-run=ssh", "--allow-net=127.0.1.1:22,127.0.2.1:22"];
  const { results: [result] } = await runElsewhere(plan, { ...fake, flags });
  assertEquals([result!.exitCode, result!.failure], [0, undefined]);
});

const FAULTS: readonly (readonly [string, Record<string, unknown>, RegExp])[] =
  [
    ["a deadline of 0", { timeoutMs: 0 }, /timeoutMs/],
    ["no concurrency", { concurrency: 0 }, /concurrency/],
    [
      "a negative connect timeout",
      { connectTimeoutMs: -1 },
      /connectTimeoutMs/,
    ],
    ["a user with a blank", { user: "a b" }, /user/],
    ["an option without a value", { options: ["x"] }, /KEY=VALUE/],
    ["a NUL in the command", { command: ["a\0b"] }, /NUL/],
    ["no command", { command: [] }, /command/],
  ];

for (const [what, { command = ["x"], ...options }, message] of FAULTS) {
  Deno.test(`runOnNodes() rejects ${what} before any ssh is started`, async () => {
    await using fake = await fakeSsh(FAKES.recording);
    const plan = { nodes: numbered(1), command: command as string[], options };
    const { reason } = await runElsewhere(plan, fake);
    assertMatch(reason!, /^(RangeError|TypeError): /);
    assertMatch(reason!, message);
    assertEquals(await fake.calls(), []);
  });
}

Deno.test("runOnNodes() rejects a command of one node that is wrong before any node is contacted", async () => {
  await using server = await startNode("closes");
  const nodes = ["a", "b"].map((name) =>
    node({ name, tailscaleIp: "127.0.0.1", sshPort: server.port })
  );
  const unsafe = ({ name }: ClusterNode) => [name === "b" ? "a\0b" : "true"];
  const empty = ({ name }: ClusterNode) => name === "b" ? [] : ["true"];
  await assertRejects(
    () => runOnNodes(nodes, unsafe, { concurrency: 1 }),
    TypeError,
    "NUL",
  );
  await assertRejects(
    () => runOnNodes(nodes, empty, { concurrency: 1 }),
    TypeError,
  );
  await assertRejects(() => runOnNodes(nodes, "uptime" as never), TypeError);
  assertEquals(server.connections, 0);
});

/** The command lines of the ssh processes that go to a port. */
async function sshProcesses(port: number): Promise<string[]> {
  const script =
    'for file in /proc/[0-9]*/cmdline; do tr "\\0" " " < "$file"; echo; done 2> /dev/null';
  const { stdout } = await run("sh", ["-c", script]);
  const lines = stdout.split("\n");
  return lines.filter((line) =>
    /^(\S*\/)?ssh /.test(line) && line.includes(` -p ${port} `)
  );
}

sshdTest(
  "runOnNodes() leaves no ssh behind at its signal or deadline",
  async (sshd) => {
    const nodes = Array.from(
      { length: 3 },
      (_, index) => on(sshd, { name: `gpu-${index}` }),
    );
    const controller = new AbortController();
    const results: CommandResult[] = [];
    const reason = new Error("enough");
    let started = 0;

    const running = runOnNodes(nodes, ["echo started; exec sleep 5"], {
      options: sshd.options,
      signal: controller.signal,
      onOutput() {
        started++;
        if (started === 3) {
          controller.abort(reason);
        }
      },
      onResult(result) {
        results.push(result);
      },
    });
    assert(await assertRejects(() => running) === reason);
    assertEquals(await sshProcesses(sshd.port), []);
    assertEquals(results.map(({ failure }) => failure?.code), [
      "signal",
      "signal",
      "signal",
    ]);

    await runOnNodes(nodes, ["exec sleep 5"], {
      options: sshd.options,
      timeoutMs: 500,
    });
    assertEquals(await sshProcesses(sshd.port), []);

    const signal = AbortSignal.abort(reason);
    await assertRejects(
      () => runOnNodes(nodes, ["true"], { signal }),
      Error,
      "enough",
    );
  },
);
