import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { startNode } from "./loopback_cluster.ts";
import {
  nextLine,
  programMissing,
  run,
  runCli,
  type RunOptions,
  startCli,
  testUnless,
  writeInventory,
} from "./process.ts";
import { type MainResult, runMain } from "./run_main.ts";
import {
  PRINT_ADDRESS,
  type Sshd,
  SSHD_ADDRESSES,
  sshdMissing,
  sshdTest,
  startSshd,
} from "./sshd.ts";
import { alive, FAKES, fakeSsh, HASTENED, leftBy } from "./ssh_process.ts";

const MIB = 1024 * 1024;

/** What may be added to a deadline that is promised, on a busy machine. */
const SLACK_MS = 8000;

type Hosts = Record<string, Record<string, unknown>>;

const LOCAL = { tailscale_ip: "127.0.0.1", status: "active" };

/** Runs `cluster-hosts ssh` in this process. */
async function ssh(
  hosts: Hosts,
  args: readonly string[],
  stdin = "",
): Promise<MainResult> {
  await using inventory = await writeInventory(hosts);
  const { code, stdout, stderr } = await runMain([
    "ssh",
    "--config",
    inventory.path,
    ...args,
  ], { stdin });
  return { code, stdout, stderr: stderr.replaceAll(inventory.path, "FILE") };
}

/** Runs `cluster-hosts ssh` in a process of its own, perhaps with a fake ssh. */
async function sshElsewhere(
  hosts: Hosts,
  args: readonly string[],
  options: RunOptions = {},
): Promise<MainResult> {
  await using inventory = await writeInventory(hosts);
  const { code, stdout, stderr } = await runCli([
    "ssh",
    "--config",
    inventory.path,
    ...args,
  ], options);
  return { code, stdout, stderr: stderr.replaceAll(inventory.path, "FILE") };
}

async function sshJson(hosts: Hosts, args: readonly string[]) {
  const { code, stdout, stderr } = await ssh(hosts, ["--json", ...args]);
  const { schemaVersion, nodes } = JSON.parse(stdout);
  assertEquals(schemaVersion, 1);
  return { code, stderr, nodes };
}

function numbered(count: number, fields: Record<string, unknown>): Hosts {
  const names = Array.from({ length: count }, (_, index) => `gpu-${index + 1}`);
  return Object.fromEntries(names.map((name) => [name, fields]));
}

/** Nodes called a, b and so on, one on each address of the server. */
function onEach({ host }: Sshd, count: number = SSHD_ADDRESSES.length): Hosts {
  const addresses = SSHD_ADDRESSES.slice(0, count);
  return Object.fromEntries(
    addresses.map((
      address,
      index,
    ) => ["abc"[index]!, { ...host, tailscale_ip: address }]),
  );
}

function sortedLines(text: string): string[] {
  return text.split("\n").filter((line) => line !== "").sort();
}

sshdTest(
  "cluster-hosts ssh prefixes each line with its node, stdout to stdout and stderr to stderr",
  async (sshd) => {
    const command =
      `${PRINT_ADDRESS}; printf 'one\\ttwo\\n'; echo oops >&2; printf end`;
    const { code, stdout, stderr } = await ssh(onEach(sshd, 2), [
      ...sshd.flags,
      "*",
      "--",
      command,
    ]);
    assertEquals(sortedLines(stdout), [
      "a: 127.0.0.1",
      "a: end",
      "a: one\ttwo",
      "b: 127.0.0.2",
      "b: end",
      "b: one\ttwo",
    ]);
    assertEquals(sortedLines(stderr), [
      "a: oops",
      "b: oops",
      "cluster-hosts: 2 of 2 returned 0, FILE",
    ]);
    assertEquals(code, 0);
  },
);

sshdTest(
  "cluster-hosts ssh prints a line while the command still runs",
  async (sshd) => {
    await using inventory = await writeInventory({ a: sshd.host });
    const gate = `${inventory.folder}/gate`;
    const command =
      `echo first; while [ ! -e ${gate} ]; do sleep 0.05; done; echo last`;
    await using cli = startCli([
      "ssh",
      "a",
      "--config",
      inventory.path,
      ...sshd.flags,
      "--",
      command,
    ]);
    assertEquals(await nextLine(cli.stdout), "a: first");
    await Deno.writeTextFile(gate, "");
    const stderr = [`cluster-hosts: 1 of 1 returned 0, ${inventory.path}`];
    assertEquals(await cli.end(), { code: 0, stdout: ["a: last"], stderr });
  },
);

sshdTest(
  "cluster-hosts ssh prints whole lines of a node while another one is amid a line",
  async (sshd) => {
    const gate = `${sshd.folder}/gate`;
    const hold =
      `printf 50%%; while [ ! -e ${gate} ]; do sleep 0.05; done; echo ' done'`;
    const command =
      `${PRINT_ADDRESS} > /dev/null; if [ $3 = 127.0.0.1 ]; then ${hold}; else echo hello; fi`;
    await using inventory = await writeInventory(onEach(sshd, 2));
    await using cli = startCli([
      "ssh",
      "*",
      "--config",
      inventory.path,
      ...sshd.flags,
      "--",
      command,
    ]);
    assertEquals(await nextLine(cli.stdout), "b: hello");
    await Deno.writeTextFile(gate, "");
    assertEquals((await cli.end()).stdout, ["a: 50% done"]);
  },
);

sshdTest(
  "cluster-hosts ssh prints a line of 3 MiB once, under one prefix, of each node",
  async (sshd) => {
    const size = 3 * MIB;
    // Not compared by assertEquals(): its difference would be 6 MiB long.
    const isWhole = (line: string, name: string) =>
      line === `${name}: ${"x".repeat(size)}`;
    const command = `head -c ${size} /dev/zero | tr '\\0' x; echo; echo end`;

    const { code, stdout } = await ssh(onEach(sshd, 2), [
      ...sshd.flags,
      "*",
      "--",
      command,
    ]);

    const lines = sortedLines(stdout);
    assertEquals(lines.map((line) => line.slice(0, 6)), [
      "a: end",
      "a: xxx",
      "b: end",
      "b: xxx",
    ]);
    assert(isWhole(lines[1]!, "a") && isWhole(lines[3]!, "b"));
    assertEquals(code, 0);
  },
);

sshdTest(
  "cluster-hosts ssh prints all of a long output, and keeps 1 MiB of it for --json and --gather",
  async (sshd) => {
    const size = 3_000_000;
    const hosts = { a: sshd.host };
    const flood =
      `head -c ${size} /dev/zero | tr '\\0' x | fold -w 1000; echo; echo end`;

    const live = await ssh(hosts, [...sshd.flags, "a", "--", flood]);
    assert(
      live.stdout ===
        `a: ${"x".repeat(1000)}\n`.repeat(size / 1000) + "a: end\n",
    );
    assertEquals([live.code, live.stderr], [
      0,
      "cluster-hosts: 1 of 1 returned 0, FILE\n",
    ]);

    const { code, nodes: [node] } = await sshJson(hosts, [
      ...sshd.flags,
      "a",
      "--",
      flood,
    ]);
    assertEquals([code, node.truncated, node.stdout.length], [0, true, MIB]);

    const gathered = await ssh(hosts, [
      ...sshd.flags,
      "--gather",
      "a",
      "--",
      flood,
    ]);
    assert(
      gathered.stdout.endsWith("[cut at 1 MiB]\n") &&
        gathered.stdout.length < MIB + 100,
    );
  },
);

sshdTest(
  "cluster-hosts ssh --gather folds equal outputs, and keeps stderr on stderr",
  async (sshd) => {
    const hosts = {
      ...numbered(20, sshd.host),
      "gpu-21": onEach(sshd).b!,
      head: sshd.host,
    };
    const command = `${PRINT_ADDRESS}; echo oops >&2; [ $3 = 127.0.0.1 ]`;
    const { code, stdout, stderr } = await ssh(hosts, [
      ...sshd.flags,
      "--gather",
      "*",
      "--",
      command,
    ]);
    assertEquals(
      stdout,
      "--- gpu-[1-20],head (21)\n127.0.0.1\n--- gpu-21: exit: exit code 1\n127.0.0.2\n",
    );
    assertEquals(stderr.match(/^oops$/gm)?.length, 2, stderr);
    assertEquals(code, 1);
  },
);

sshdTest(
  "cluster-hosts ssh --gather folds equal outputs of nodes that ssh has not seen before",
  async (sshd) => {
    const addresses = Object.values(onEach(sshd));
    const hosts = Object.fromEntries(
      addresses.map((host, index) => [`gpu-${index + 1}`, host]),
    );
    const options = [
      ...sshd.options.filter((option) =>
        !/^(LogLevel|StrictHost|UserKnown)/.test(option)
      ),
      "StrictHostKeyChecking=accept-new",
      `UserKnownHostsFile=${sshd.folder}/known_hosts`,
    ];
    const flags = options.flatMap((option) => ["--ssh-option", option]);

    const { code, stdout, stderr } = await ssh(hosts, [
      ...flags,
      "--gather",
      "*",
      "--",
      "echo same",
    ]);

    assertEquals([code, stdout], [0, "--- gpu-[1-3] (3)\nsame\n"], stderr);
    // Whatever is said of it names one for all.
    assertLess(stderr.split("Permanently added").length, 3, stderr);
  },
);

sshdTest(
  "cluster-hosts ssh --gather folds nodes that refuse the connection, each at its own address",
  async (sshd) => {
    await using dead = await startNode("refuses", { hostname: "127.0.0.3" });
    const addresses = ["127.0.0.3", "127.0.0.4", "127.0.0.5"];
    const host = (address: string) => ({
      ...sshd.host,
      tailscale_ip: address,
      ssh_port: dead.port,
    });
    const hosts = Object.fromEntries(
      addresses.map((address, index) => [`gpu-${index + 1}`, host(address)]),
    );

    const { code, stdout, stderr } = await ssh(hosts, [
      ...sshd.flags,
      "--gather",
      "*",
      "--",
      "true",
    ]);

    const all = stdout + stderr;
    assertEquals(code, 1);
    assertMatch(stdout, /^--- gpu-\[1-3\] \(3\).*\n$/);
    assertMatch(all, /gpu-\[1-3\].*Connection refused/);
    assert(!/gpu-[123]\b/.test(all), all);
  },
);

sshdTest(
  "cluster-hosts ssh --json reports all about each node",
  async (sshd) => {
    const command =
      `${PRINT_ADDRESS}; echo oops >&2; [ $3 = 127.0.0.1 ] || exit 5`;
    const hosts = { ...onEach(sshd, 2), c: { status: "active" } };
    const { code, nodes } = await sshJson(hosts, [
      ...sshd.flags,
      "*",
      "--",
      command,
    ]);
    const seen = nodes.map(
      ({ durationMs, ...others }: Record<string, unknown>) => {
        assert(Number.isInteger(durationMs));
        return others;
      },
    );
    const common = { signal: null, stderr: "oops\n", truncated: false };
    assertEquals(seen, [
      {
        name: "a",
        ...common,
        exitCode: 0,
        stdout: "127.0.0.1\n",
        failure: null,
      },
      {
        name: "b",
        ...common,
        exitCode: 5,
        stdout: "127.0.0.2\n",
        failure: { code: "exit", message: "exit code 5" },
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
    assertEquals(code, 1);
  },
);

sshdTest(
  "cluster-hosts ssh sums up who did not return 0, and why",
  async (sshd) => {
    await using dead = await startNode("refuses");
    const { host } = sshd;
    const hosts = {
      ...numbered(3, { ...host, tailscale_ip: SSHD_ADDRESSES[1] }),
      good: host,
      dead: { ...host, ssh_port: dead.port },
      locked: { ...host, ssh_key: sshd.otherKeyPath },
      homeless: { status: "active" },
    };
    const command =
      `${PRINT_ADDRESS} > /dev/null; [ $3 = 127.0.0.1 ] || exit 7`;
    const { code, stdout, stderr } = await ssh(hosts, [
      ...sshd.flags,
      "*",
      "--",
      command,
    ]);
    assertEquals(stdout, "");
    const parts = [
      /1 of 7 returned 0, FILE/,
      /gpu-\[1-3\]: exit: exit code 7$/m,
      /dead: ssh: .*connect to host 127.0.0.1 port \d+: Connection refused/,
      /locked: ssh: .*Permission denied \(publickey\)/,
      /homeless: no-address: set tailscale_ip or ssh_host$/m,
    ];
    for (const part of parts) assertMatch(stderr, part);
    assertEquals(code, 1);
  },
);

sshdTest(
  "cluster-hosts ssh ends a command at --timeout, and says that it may go on over there",
  async (sshd) => {
    const args = [
      ...sshd.flags,
      "--timeout",
      "5",
      "a",
      "--",
      "echo before; exec sleep 30",
    ];
    const started = performance.now();
    const { code, stdout, stderr } = await ssh({ a: sshd.host }, args);
    assertLess(performance.now() - started, 5000 + SLACK_MS);
    assertEquals([code, stdout], [1, "a: before\n"]);
    assertMatch(stderr, /a: timeout: .*5 s.*may (still )?(go on|be running)/);
    assertStringIncludes(stderr, "RequestTTY=force");
  },
);

Deno.test("cluster-hosts ssh has no deadline by default", async () => {
  await using fake = await fakeSsh("sleep 5; echo done");
  // For the process, five seconds are more than eight minutes.
  const flags = [...HASTENED, "-P=cli"];
  const { code, stdout } = await sshElsewhere({ a: LOCAL }, [
    "a",
    "--",
    "apt",
    "upgrade",
  ], { ...fake, flags });
  assertEquals([code, stdout], [0, "a: done\n"]);
});

sshdTest(
  "cluster-hosts ssh says which option accepts a host key that is not known",
  async (sshd) => {
    const options = [
      `UserKnownHostsFile=${sshd.folder}/known`,
      "GlobalKnownHostsFile=/dev/null",
    ];
    const flags = options.flatMap((option) => ["-o", option]);
    const refused = await ssh({ a: sshd.host }, [
      ...flags,
      "a",
      "--",
      "echo ran",
    ]);
    assertEquals([refused.code, refused.stdout], [1, ""]);
    const [advice = ""] =
      /(?:-o|--ssh-option) StrictHostKeyChecking=accept-new/.exec(
        refused.stderr,
      ) ?? [];
    assert(advice !== "", refused.stderr);

    const accepted = await ssh({ a: sshd.host }, [
      ...flags,
      ...advice.split(" "),
      "a",
      "--",
      "echo ran",
    ]);
    assertEquals([accepted.code, accepted.stdout], [0, "a: ran\n"]);
  },
);

sshdTest(
  "cluster-hosts ssh logs in as the user of --user, with options in place of its own",
  async (sshd) => {
    await using dead = await startNode("refuses");
    const hosts = {
      a: { ...sshd.host, ssh_user: "nobody", ssh_port: dead.port },
    };
    const args = [
      ...sshd.flags,
      "--user",
      sshd.user,
      "--ssh-option",
      `Port=${sshd.port}`,
      "a",
      "--",
      "id -un",
    ];
    const { code, stdout, stderr } = await ssh(hosts, args);
    assertEquals([code, stdout], [0, `a: ${sshd.user}\n`], stderr);
  },
);

const TYPED: readonly (readonly [string, string])[] = [
  ["-o Compression=yes", "-o Compression=yes -- ubuntu@127.0.0.1"],
  ["-oCompression=yes", "-o Compression=yes -- ubuntu@127.0.0.1"],
  ["--ssh-option=Compression=yes", "-o Compression=yes -- ubuntu@127.0.0.1"],
  ["-oA=1 -o B=2 --ssh-option C=3", "-o A=1 -o B=2 -o C=3 -- ubuntu@127.0.0.1"],
  ["-l root", "-- root@127.0.0.1"],
  ["-lroot", "-- root@127.0.0.1"],
  ["--user=root", "-- root@127.0.0.1"],
  ["-ql root -oA=1", "-o A=1 -- root@127.0.0.1"],
];

for (const [typed, expected] of TYPED) {
  Deno.test(`cluster-hosts ssh takes ${typed} as ssh does`, async () => {
    const args = ["a", ...typed.split(" "), "--dry-run", "--", "uptime"];
    const { code, stdout, stderr } = await ssh({ a: LOCAL }, args);
    assertEquals([code, stderr], [0, ""]);
    assert(stdout.endsWith(` ${expected} uptime\n`), stdout);
  });
}

sshdTest(
  "cluster-hosts ssh gives the command an empty stdin, or with --stdin what it reads, to each",
  async (sshd) => {
    const script = "echo from a script\n";
    const empty = await ssh({ a: sshd.host }, [
      ...sshd.flags,
      "a",
      "--",
      "cat; echo done",
    ], script);
    assertEquals([empty.code, empty.stdout], [0, "a: done\n"]);
    const given = await ssh(onEach(sshd, 2), [
      ...sshd.flags,
      "--stdin",
      "*",
      "--",
      "sh",
      "-s",
    ], script);
    assertEquals(sortedLines(given.stdout), [
      "a: from a script",
      "b: from a script",
    ]);
  },
);

for (
  const command of [
    "sh -s",
    "sh",
    "bash",
    "sudo sh",
    "/bin/bash -e",
    "bash -s -- x",
  ]
) {
  Deno.test(`cluster-hosts ssh refuses "${command}" without --stdin`, async () => {
    const { code, stdout, stderr } = await ssh({ a: LOCAL }, [
      "a",
      "--dry-run",
      "--",
      ...command.split(" "),
    ]);
    assertEquals([code, stdout], [2, ""]);
    assertStringIncludes(stderr, "--stdin");
  });
}

sshdTest(
  "cluster-hosts ssh --cd runs it in each node's ringrift_path, and not at all if there is none",
  async (sshd) => {
    const home = sshd.folder;
    await Deno.mkdir(`${home}/a path`);
    const hosts = {
      tilde: { ...sshd.host, ringrift_path: "~" },
      blank: { ...sshd.host, ringrift_path: `${home}/a path` },
      none: { ...sshd.host, ringrift_path: `${home}/none` },
    };
    const { code, stdout } = await ssh(hosts, [
      ...sshd.flags,
      "--cd",
      "*",
      "--",
      "pwd; echo ran",
    ]);
    assertEquals(sortedLines(stdout), [
      `blank: ${home}/a path`,
      "blank: ran",
      `tilde: ${await Deno.realPath(home)}`,
      "tilde: ran",
    ]);
    assertEquals(code, 1);
  },
);

const QUIET: readonly (readonly [string, number, string, RegExp])[] = [
  ["true", 0, "", /^$/],
  ["echo hello", 0, "a: hello\n", /^$/],
  ["exit 3", 1, "", /^[^\n]*a: exit: exit code 3\n$/],
  ["echo hello; exit 3", 1, "a: hello\n", /^[^\n]*a: exit: exit code 3\n$/],
];

for (const [command, expectedCode, expectedStdout, expectedStderr] of QUIET) {
  sshdTest(
    `cluster-hosts ssh --quiet prints outputs and failures alone, of "${command}"`,
    async (sshd) => {
      const { code, stdout, stderr } = await ssh({ a: sshd.host }, [
        ...sshd.flags,
        "-q",
        "a",
        "--",
        command,
      ]);
      assertEquals([code, stdout], [expectedCode, expectedStdout]);
      assertMatch(stderr, expectedStderr);

      const gathered = await ssh({ a: sshd.host }, [
        ...sshd.flags,
        "-q",
        "--gather",
        "a",
        "--",
        command,
      ]);
      const all = gathered.stdout + gathered.stderr;
      assertEquals(gathered.code, expectedCode);
      assertEquals(all === "", command === "true", all);
      if (expectedCode === 1) assertMatch(all, /a: exit: exit code 3/);
    },
  );
}

sshdTest(
  "cluster-hosts ssh runs with the flags of `permissions ssh`, and names the one that is missing",
  async (sshd) => {
    await using dead = await startNode("refuses", {
      hostname: "127.0.0.3",
      port: sshd.port,
    });
    await using inventory = await writeInventory({
      a: {
        ...sshd.host,
        ssh_host: dead.hostname,
        tailscale_ip: SSHD_ADDRESSES[1],
      },
    });
    const args = [
      "ssh",
      "a",
      "--config",
      inventory.path,
      ...sshd.flags,
      "--",
      "echo",
      "hello",
    ];

    const printed = await runMain(["permissions", ...args]);
    const flags = printed.stdout.trim().split(" ").filter((flag) =>
      !flag.startsWith("--allow-env")
    );
    const net =
      `--allow-net=127.0.0.3:${sshd.port},127.0.0.2:${sshd.port},127.0.0.2:22`;
    assertEquals(flags, [
      `--allow-read=${inventory.path}`,
      net,
      "--allow-run=ssh",
    ], printed.stderr);
    const allowed = await runCli(args, { flags });
    assertEquals(
      [allowed.code, allowed.stdout],
      [0, "a: hello\n"],
      allowed.stderr,
    );

    const first = await runCli(args, { flags: [flags[0]!, flags[2]!] });
    assertEquals([first.code, first.stdout], [1, ""]);
    assertStringIncludes(first.stderr, net);
    const denied = await runCli(args, { flags: flags.slice(0, 2) });
    assertEquals([denied.code, denied.stdout], [2, ""]);
    assertMatch(denied.stderr, /^cluster-hosts: .*--allow-run=ssh\n$/);
  },
);

for (
  const [mode, flags] of [["", []], [" --gather", ["--gather"]], [" --json", [
    "--json",
  ]]] as const
) {
  sshdTest(
    `cluster-hosts ssh${mode} never passes on an escape sequence of a node`,
    async (sshd) => {
      const output =
        "\x1b]0;title\x07\x1b[31mred\x9b1m \u202eevil\u2066 \0 \x7f one\rtwo\r\n";
      const bytes = [...new TextEncoder().encode(output)];
      const octal = bytes.map((byte) =>
        `\\0${byte.toString(8).padStart(3, "0")}`
      ).join("");
      const command = `printf %b '${octal}'; printf %b '${octal}' >&2; exit 4`;
      const unsafe =
        /(?!\n)[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/u;

      const { stdout, stderr } = await ssh({ a: sshd.host }, [
        ...sshd.flags,
        ...flags,
        "a",
        "--",
        command,
      ]);

      assert(!unsafe.test(stdout + stderr), JSON.stringify(stdout + stderr));
      if (mode === " --json") {
        const [node] = JSON.parse(stdout).nodes;
        assertEquals([node.stdout, node.stderr], [output, output]);
      } else {
        const escaped =
          "\\u{1b}]0;title\\u{7}\\u{1b}[31mred\\u{9b}1m \\u{202e}evil\\u{2066} \\u{0} \\u{7f} one\\u{d}two";
        assertStringIncludes(stdout, escaped);
        assertStringIncludes(stderr, escaped);
      }
    },
  );
}

sshdTest(
  "cluster-hosts ssh never passes on an escape sequence in the words of ssh",
  async (sshd) => {
    const command =
      "printf 'Connection to 127.0.0.1 \\033[2J closed by remote host.\\n' >&2; exit 255";
    const { stderr } = await ssh({ a: sshd.host }, [
      ...sshd.flags,
      "a",
      "--",
      command,
    ]);
    assert(!stderr.includes("\x1b"), JSON.stringify(stderr));
    assertStringIncludes(stderr, "\\u{1b}[2J");
  },
);

testUnless(
  sshdMissing() ?? programMissing("bash"),
  "cluster-hosts ssh --dry-run prints lines that bash runs once each, none reading the others",
  async () => {
    await using sshd = await startSshd();
    const command = `cat; ${PRINT_ADDRESS}`;
    const { code, stdout } = await ssh(onEach(sshd), [
      ...sshd.flags,
      "--dry-run",
      "*",
      "--",
      command,
    ]);
    assertEquals([code, sortedLines(stdout).length], [0, 3]);

    const pasted = await run("sh", ["-c", "exec bash"], { stdin: stdout });

    assertEquals(
      sortedLines(pasted.stdout),
      SSHD_ADDRESSES.toSorted(),
      pasted.stderr,
    );
  },
);

sshdTest(
  "cluster-hosts ssh --dry-run prints the address that is alive",
  async (sshd) => {
    await using dead = await startNode("refuses", {
      hostname: "127.0.0.3",
      port: sshd.port,
    });
    // With a port of its own, ssh_host comes first.
    const host = {
      ...sshd.host,
      ssh_host: dead.hostname,
      tailscale_ip: SSHD_ADDRESSES[1],
    };
    const { code, stdout } = await ssh({ a: host }, [
      "--dry-run",
      "a",
      "--",
      "true",
    ]);
    assertEquals(code, 0);
    assertStringIncludes(stdout, `@${SSHD_ADDRESSES[1]} true`);
  },
);

sshdTest(
  "cluster-hosts ssh --dry-run prints words that a shell reads as they are run",
  async (sshd) => {
    const hosts = { a: { ...sshd.host, ringrift_path: "~/a path" } };
    await Deno.mkdir(`${sshd.folder}/a path`);
    const args = [
      ...sshd.flags,
      "--cd",
      "a",
      "--",
      "pwd; printf '%s\\n' \"it's\" '$HOME' a\\\\b",
    ];
    const ran = await ssh(hosts, args);
    const printed = await ssh(hosts, ["--dry-run", ...args]);
    const pasted = await run("sh", ["-c", printed.stdout]);
    assertEquals(
      pasted.stdout.replace(/^/gm, "a: ").slice(0, -3),
      ran.stdout,
      printed.stdout,
    );
    assertEquals([ran.code, pasted.code], [0, 0]);
  },
);

Deno.test("cluster-hosts ssh --dry-run leaves stdin to the command with --stdin alone", async () => {
  const lines = await Promise.all([[], ["--stdin"]].map(async (flags) => {
    const { stdout } = await ssh({ a: LOCAL }, [
      "--dry-run",
      ...flags,
      "a",
      "--",
      "cat",
    ]);
    return stdout;
  }));
  assertEquals(lines.map((line) => line.split(" ").includes("-n")), [
    true,
    false,
  ]);
});

for (const kind of ["polite", "stubborn"] as const) {
  for (
    const [signal, exitCode] of [["SIGINT", 130], ["SIGTERM", 143], [
      "SIGHUP",
      129,
    ]] as const
  ) {
    Deno.test(`cluster-hosts ssh ends with ${exitCode} at ${signal}, and ends a ${kind} ssh`, async () => {
      await using inventory = await writeInventory(numbered(3, LOCAL));
      await using fake = await fakeSsh(FAKES[kind]);
      const args = [
        "ssh",
        "*",
        "--config",
        inventory.path,
        "--concurrency",
        "2",
        "--",
        "x",
      ];
      await using cli = startCli(args, fake);
      for (let started = 0; started < 2; started++) {
        assertMatch(await nextLine(cli.stdout), /^gpu-[12]: started$/);
      }

      const signalled = performance.now();
      cli.process.kill(signal);
      const { code, stderr } = await cli.end();

      assertEquals(code, exitCode);
      assertLess(performance.now() - signalled, SLACK_MS);
      const pids = await fake.pids();
      assertEquals([pids.length, await alive(pids)], [2, []]);
      const said = stderr.join("\n");
      assertMatch(said, /0 of 3 returned 0/);
      assertMatch(
        said,
        /gpu-\[1-2\]: signal: .*may (still )?(go on|be running)/,
      );
      assertMatch(said, /1 (node )?not started/);
    });
  }
}

Deno.test("cluster-hosts ssh ends every ssh when the reader of its output is gone", async () => {
  await using inventory = await writeInventory(numbered(3, LOCAL));
  await using flooding = await fakeSsh(FAKES.flooding);
  const command =
    "deno run -q --no-prompt --config deno.json -P=cli cli.ts ssh '*' " +
    `--config ${inventory.path} -- x | head -1`;
  const { code, stdout, stderr } = await run("sh", ["-c", command], flooding);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^gpu-[123]: y\n$/);
  assertEquals(await leftBy(flooding), []);
});

Deno.test("cluster-hosts ssh keeps little of an endless output that nobody reads, and ends at SIGINT", async () => {
  await using inventory = await writeInventory({ a: LOCAL });
  await using flooding = await fakeSsh(FAKES.flooding);
  await using cli = startCli([
    "ssh",
    "a",
    "--config",
    inventory.path,
    "--",
    "x",
  ], flooding);
  assertEquals(await nextLine(cli.stdout), "a: y");
  await delay(3000);

  const { stdout } = await run("sh", [
    "-c",
    `sed -n 's/^VmHWM://p' /proc/${cli.process.pid}/status`,
  ]);
  assertLess(parseInt(stdout), 250 * 1024, "kilobytes at most");

  cli.process.kill("SIGINT");
  const { code } = await cli.process.status;
  assertEquals(code, 130);
  assertEquals(await leftBy(flooding), []);
});

const USAGE: readonly (readonly [string, readonly string[], RegExp])[] = [
  ["no node", [], /ssh needs a NODE/],
  ["no node before the command", ["--", "true"], /ssh needs a NODE/],
  ["--all instead of a node", ["--all", "--", "true"], /ssh needs a NODE/],
  ["no command", ["a", "--"], /after "--"/],
  ["an empty command", ["a", "--", ""], /after "--"/],
  ["a login on several nodes", ["*"], /a login takes one node/i],
  ["a command without --", ["a", "uptime"], /a login takes one node/i],
  ["an unknown node", ["b", "--", "true"], /"b"/],
  ["a deadline of 0", ["a", "--timeout", "0", "--", "true"], /--timeout/],
  ["an option without a value", [
    "a",
    "--ssh-option",
    "ConnectTimeout",
    "--",
    "true",
  ], /KEY=VALUE/],
  ["an unsafe user", ["a", "--user=a b", "--", "true"], /user/],
  [
    "an unsafe jump host",
    ["a", "--ssh-option=ProxyJump=a;id", "--", "true"],
    /ProxyJump/,
  ],
  ["-p as of ssh", ["a", "-p", "2222", "--", "true"], /^(?!.*(--port|--path))/],
  ["-i as of ssh", ["a", "-i", "key", "--", "true"], /^(?!.*--config)/],
];

for (const [what, args, message] of USAGE) {
  Deno.test(`cluster-hosts ssh refuses ${what} in one line`, async () => {
    await using recording = await fakeSsh(FAKES.recording);
    const { code, stdout, stderr } = await sshElsewhere(
      { a: LOCAL, c: LOCAL },
      args,
      recording,
    );
    assertEquals([code, stdout], [2, ""], stderr);
    assertMatch(stderr, /^cluster-hosts: .*\n$/);
    assertMatch(stderr, message);
    assertEquals(await recording.calls(), []);
  });
}

Deno.test("cluster-hosts ssh says that there is no ssh", async () => {
  await using broken = await fakeSsh("");
  await Deno.writeTextFile(`${broken.folder}/ssh`, "#!/nowhere\n");
  const { code, stderr } = await sshElsewhere(numbered(3, LOCAL), [
    "*",
    "--",
    "true",
  ], broken);
  assertEquals([code, stderr], [
    2,
    "cluster-hosts: There is no ssh on the PATH: install OpenSSH\n",
  ]);
});

const UNSAFE = [
  "-oProxyCommand=touch",
  "a b",
  "a;id",
  "$(id)",
  "a\nb",
  "a%h",
  "a'b",
  "a*",
  "a\0b",
];

Deno.test("cluster-hosts ssh refuses an inventory with unsafe fields before any process starts", async () => {
  await using recording = await fakeSsh(FAKES.recording);
  const unsafe = UNSAFE.flatMap((text) => [
    { tailscale_ip: text },
    { ssh_host: text },
    { ssh_host: `${text}@127.0.0.1` },
    { ...LOCAL, ssh_user: text },
    { ...LOCAL, ssh_key: text },
    { ...LOCAL, ssh_options: [`ProxyJump=${text}`] },
  ]);
  const hosts = Object.fromEntries(
    unsafe.map((fields, index) => [`n${index}`, fields]),
  );
  const { code, stdout, stderr } = await sshElsewhere(
    { good: LOCAL, ...hosts },
    ["good", "--", "true"],
    recording,
  );
  assertEquals([code, stdout], [2, ""]);
  for (const name of Object.keys(hosts)) {
    assertStringIncludes(stderr, `hosts.${name}.`);
  }
  assertEquals(await recording.calls(), []);
});

Deno.test("cluster-hosts ssh gives ssh each word as it was typed", async () => {
  await using recording = await fakeSsh(FAKES.recording);
  const args = [
    "-o",
    "ProxyJump=me@127.0.0.1:22,[::1]:23",
    "--connect-timeout",
    "9",
    "a",
    "--",
    "echo",
    "a;b",
  ];
  const { code } = await sshElsewhere({ a: LOCAL }, args, recording);
  assertEquals(code, 0);
  const [call] = await recording.calls();
  assertMatch(call!, /-o ConnectTimeout=9 /);
  assertMatch(
    call!,
    /-o ProxyJump=me@127.0.0.1:22,\[::1\]:23 -- ubuntu@127.0.0.1 echo a;b$/,
  );
});
