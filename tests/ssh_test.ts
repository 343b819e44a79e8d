import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { run, runCli, type RunOptions, send, startNode, untilClosed, writeInventory } from "./loopback_cluster.ts";
import { type Sshd, SSHD_ADDRESSES, sshdMissing, startCli, startSshd } from "./sshd.ts";
import { delay } from "jsr:@std/async@^1.5.0/delay";

const MIB = 1024 * 1024;
const NO_SSHD = sshdMissing();

/** What the command line may take to start and to end, beside the deadlines that it promises. */
const PROCESS_MS = 1000;

/** Prints the address of the server that it runs on. */
const WHERE = "set -- $SSH_CONNECTION; echo $3";

type Hosts = Record<string, Record<string, unknown>>;

function sshdTest(name: string, test: (sshd: Sshd) => Promise<void>): void {
  Deno.test({
    name: NO_SSHD ? `${name} (ignored: ${NO_SSHD})` : name,
    ignore: NO_SSHD !== undefined,
    fn: async () => {
      await using sshd = await startSshd();
      await test(sshd);
    },
  });
}

async function ssh(hosts: Hosts, args: readonly string[], options: RunOptions = {}) {
  await using inventory = await writeInventory(hosts);
  return await runCli(["ssh", "--config", inventory.path, ...args], options);
}

async function sshJson(hosts: Hosts, args: readonly string[], options?: RunOptions) {
  const { code, stdout, stderr } = await ssh(hosts, ["--json", ...args], options);
  const { schemaVersion, nodes } = JSON.parse(stdout);
  assertEquals(schemaVersion, 1);
  return { code, stderr, nodes };
}

function numbered(count: number, fields: Record<string, unknown>): Hosts {
  return Object.fromEntries(Array.from({ length: count }, (_, index) => [`gpu-${index + 1}`, fields]));
}

/** Two nodes, one on each address of the server. */
function pair({ host }: Sshd): Hosts {
  return { a: { ...host, tailscale_ip: SSHD_ADDRESSES[0] }, b: { ...host, tailscale_ip: SSHD_ADDRESSES[1] } };
}

/** An `ssh` for the PATH that is a shell script; `$0.pids` is where it writes the processes that it is. */
async function standIn(script: string) {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  const path = `${folder}/ssh`;
  await Deno.writeTextFile(path, `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  const recorded = async (suffix: string) => {
    const text = await Deno.readTextFile(path + suffix).catch((error) => {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      return "";
    });
    return text.split("\n").filter((line) => line !== "");
  };
  return {
    folder,
    env: { PATH: `${folder}:${Deno.env.get("PATH")}` },
    calls: () => recorded(".calls"),
    pids: () => recorded(".pids"),
    async [Symbol.asyncDispose]() {
      const left = await alive([...await recorded(".pids"), ...await recorded(".others")]);
      if (left.length > 0) await run("sh", ["-c", `kill -9 ${left.join(" ")}`]);
      await Deno.remove(folder, { recursive: true });
    },
  };
}

const RECORDING = 'echo "$*" >> "$0.calls"';
const POLITE = 'echo $$ >> "$0.pids"; echo started; exec sleep 20';
const STUBBORN = `trap '' TERM INT HUP
sleep 20 &
echo $! >> "$0.others"
echo $$ >> "$0.pids"
echo started
for tick in $(seq 100); do sleep 0.2; done`;

/** Those of the processes that have not ended. Deno itself reads /proc under `--allow-all` alone. */
async function alive(pids: readonly string[]): Promise<string[]> {
  const script = 'for pid; do grep -qs "^State:.*[^Z] (" "/proc/$pid/status" && echo "$pid"; done; true';
  const { stdout } = await run("sh", ["-c", script, "sh", ...pids]);
  return stdout.split("\n").filter((line) => line !== "");
}

const LOCAL: Readonly<Record<string, unknown>> = { tailscale_ip: "127.0.0.1", status: "active" };

sshdTest("ssh prefixes each line with its node, stdout to stdout and stderr to stderr", async (sshd) => {
  const { code, stdout, stderr } = await ssh(pair(sshd), [...sshd.flags, "--", `${WHERE}; echo oops >&2; printf end`]);
  assertEquals(stdout.split("\n").toSorted(), ["", "a: 127.0.0.1", "a: end", "b: 127.0.0.2", "b: end"]);
  assertEquals(stderr.split("\n").toSorted(), ["", "a: oops", "b: oops", "cluster-hosts: 2 of 2 returned 0"]);
  assertEquals(code, 0);
});

sshdTest("ssh shows a line while the command still runs", async (sshd) => {
  await using inventory = await writeInventory({ a: sshd.host });
  const gate = `${inventory.folder}/gate`;
  const command = `echo first; while [ ! -e ${gate} ]; do sleep 0.05; done; echo last`;
  await using cli = startCli(["ssh", "--config", inventory.path, ...sshd.flags, "--", command]);
  assertEquals((await cli.stdout.next()).value, "a: first");
  await Deno.writeTextFile(gate, "");
  assertEquals(await cli.end(), { code: 0, stdout: ["a: last"], stderr: ["cluster-hosts: 1 of 1 returned 0"] });
});

sshdTest("ssh --gather folds the same output of 100 nodes to one block", async (sshd) => {
  const { code, stdout, stderr } = await ssh(numbered(100, sshd.host), [
    ...sshd.flags,
    "--gather",
    "--",
    "echo hello; echo oops >&2",
  ]);
  assertEquals(stdout, "--- gpu-[1-100] (100)\nhello\noops\n");
  assertEquals(stderr, "cluster-hosts: 100 of 100 returned 0\n");
  assertEquals(code, 0);
});

sshdTest("ssh --gather keeps outputs and failures apart", async (sshd) => {
  const hosts = { ...numbered(3, sshd.host), "gpu-4": pair(sshd).b!, head: sshd.host };
  const args = [...sshd.flags, "--gather", "--", `${WHERE}; [ $3 = 127.0.0.1 ]`];
  const { code, stdout } = await ssh(hosts, args);
  assertEquals(stdout, "--- gpu-[1-3],head (4)\n127.0.0.1\n--- gpu-4: exit code 1\n127.0.0.2\n");
  assertEquals(code, 1);
});

sshdTest("ssh --json tells all about each node", async (sshd) => {
  const args = [...sshd.flags, "--", `${WHERE}; echo oops >&2; [ $3 = 127.0.0.1 ] || kill -9 $$`];
  const { code, nodes } = await sshJson({ ...pair(sshd), c: { status: "active" } }, args);
  const seen = nodes.map(({ durationMs, ...others }: Record<string, unknown>) => {
    assert(Number.isInteger(durationMs));
    return others;
  });
  const common = { signal: null, stderr: "oops\n", truncated: false };
  assertEquals(seen, [
    { name: "a", ...common, exitCode: 0, stdout: "127.0.0.1\n", failure: null },
    // What ended by a signal there is, to ssh, 255 without a word.
    { name: "b", ...common, exitCode: 255, stdout: "127.0.0.2\n", failure: { code: "exit", message: "exit code 255" } },
    {
      name: "c",
      ...common,
      exitCode: null,
      stdout: "",
      stderr: "",
      failure: { code: "no-address", message: "no address" },
    },
  ]);
  assertEquals(code, 1);
});

sshdTest("ssh sums up who did not return 0, and why", async (sshd) => {
  await using dead = await startNode("refuses");
  const { host } = sshd;
  const hosts = {
    ...numbered(3, { ...host, tailscale_ip: SSHD_ADDRESSES[1] }),
    good: host,
    dead: { ...host, ssh_port: dead.port },
    locked: { ...host, ssh_key: sshd.otherKeyPath },
    homeless: { status: "active" },
  };
  const { code, stdout, stderr } = await ssh(hosts, [...sshd.flags, "--", `${WHERE}; [ $3 = 127.0.0.1 ] || exit 7`]);
  assertEquals(stdout.split("\n").filter((line) => line !== "").length, 4);
  const summary = stderr.trimEnd().split("\n").at(-1)!;
  assertMatch(summary, /^cluster-hosts: 1 of 7 returned 0; /);
  for (
    const part of [
      /; gpu-\[1-3\]: exit code 7/,
      /; dead: could not connect \(ssh: connect to host 127.0.0.1 port \d+: Connection refused\)/,
      /; locked: could not connect \(root@127.0.0.1: Permission denied \(publickey\)\.\)/,
      /; homeless: no address/,
    ]
  ) assertMatch(summary, part);
  assertEquals(code, 1);
});

sshdTest("ssh ends a command at --timeout", async (sshd) => {
  const args = [...sshd.flags, "--timeout", "1", "--", "echo before; exec sleep 4"];
  const { code, stdout, stderr, ms } = await ssh({ a: sshd.host }, args);
  assertEquals(stdout, "a: before\n");
  assertEquals(stderr, "cluster-hosts: 0 of 1 returned 0; a: timed out after 1.00 s\n");
  assertEquals(code, 1);
  assert(ms < 1000 + PROCESS_MS, `took ${ms} ms`);
});

Deno.test("ssh gives up a server that accepts and does not go on", async () => {
  await using silent = await startNode("silent");
  // Each byte could begin anew the wait of ssh itself, and after the banner it waits without end.
  await using trickling = await startNode(async (conn, signal) => {
    for (;; await delay(50, { signal })) await send(conn, "S");
  });
  await using banner = await startNode(async (conn) => {
    await send(conn, "SSH-2.0-OpenSSH_9.2\r\n");
    await untilClosed(conn);
  });
  for (
    const [{ port }, flags, codes] of [
      [silent, ["--connect-timeout", "1"], ["connect"]],
      [banner, ["--connect-timeout", "1", "--timeout", "2"], ["connect", "timeout"]],
      [trickling, ["--connect-timeout", "1", "--timeout", "2"], ["connect", "timeout"]],
      [silent, ["--timeout", "1"], ["timeout"]],
    ] as const
  ) {
    const started = performance.now();
    const { code, nodes } = await sshJson({ a: { ...LOCAL, ssh_port: port } }, [...flags, "--", "true"]);
    assertEquals(code, 1);
    assert(codes.includes(nodes[0].failure.code as never), JSON.stringify(nodes[0]));
    assert(performance.now() - started < 2000 + PROCESS_MS);
  }
});

sshdTest("ssh takes the user of --user, and options in place of its own", async (sshd) => {
  await using dead = await startNode("refuses");
  const hosts = { a: { ...sshd.host, ssh_user: "nobody", ssh_port: dead.port } };
  const args = [...sshd.flags, "--user", sshd.user, "--ssh-option", `Port=${sshd.port}`, "--", "id -un"];
  const { code, stdout, stderr } = await ssh(hosts, args);
  assertEquals([code, stdout], [0, `a: ${sshd.user}\n`], stderr);

  await using recording = await standIn(RECORDING);
  const options = ["--ssh-option", "connecttimeout=3", "--ssh-option", "BatchMode=no", "--connect-timeout", "9"];
  await ssh({ a: LOCAL }, [...options, "--", "true"], recording);
  assertEquals(await recording.calls(), ["-p 22 -o connecttimeout=3 -o BatchMode=no -- ubuntu@127.0.0.1 true"]);
});

sshdTest("ssh keeps 1 MiB of each stream, and says so", async (sshd) => {
  const flood = (streams: string) => `head -c 3000000 /dev/zero | tr '\\0' x ${streams}; echo short`;
  const { code, nodes, stderr } = await sshJson({ a: sshd.host }, [...sshd.flags, "--", flood(">&2")]);
  assertEquals([code, nodes[0].truncated, nodes[0].stdout], [0, true, "short\n"]);
  assert(nodes[0].stderr.startsWith("x".repeat(MIB)));
  assert(nodes[0].stderr.length < MIB + 100);
  assertStringIncludes(stderr, "a: output cut at 1 MiB");

  const live = await ssh({ a: sshd.host, b: sshd.host }, [...sshd.flags, "b", "--", flood("")]);
  assertMatch(live.stdout, /^b: x{1048576}\nb: \[cut at 1 MiB\]\n$/);
  assertStringIncludes(live.stderr, "1 of 1 returned 0; b: output cut at 1 MiB");

  const exact = await sshJson({ a: sshd.host }, [...sshd.flags, "--", `head -c ${MIB} /dev/zero | tr '\\0' x`]);
  assertEquals([exact.nodes[0].truncated, exact.nodes[0].stdout.length], [false, MIB]);
});

sshdTest("ssh gives the command an empty stdin", async (sshd) => {
  const { code, stdout } = await ssh({ a: sshd.host }, [...sshd.flags, "--", "cat; echo done"], { stdin: "secret\n" });
  assertEquals([code, stdout], [0, "a: done\n"]);
});

sshdTest("ssh runs under --allow-run=ssh alone, and names it where it is missing", async (sshd) => {
  await using inventory = await writeInventory({ a: sshd.host });
  const args = ["ssh", "--config", inventory.path, ...sshd.flags, "--", "echo hello; exec sleep 4"];
  const read = `--allow-read=${inventory.path}`;
  // The kill at the timeout needs nothing more.
  const allowed = await runCli(["ssh", "--timeout", "1", ...args.slice(1)], { flags: [read, "--allow-run=ssh"] });
  assertEquals([allowed.code, allowed.stdout], [1, "a: hello\n"]);
  assertEquals(allowed.stderr, "cluster-hosts: 0 of 1 returned 0; a: timed out after 1.00 s\n");

  const denied = await runCli(args, { flags: [read] });
  assertEquals([denied.code, denied.stdout], [2, ""]);
  assertMatch(denied.stderr, /^cluster-hosts: .*--allow-run=ssh\n$/);
});

sshdTest("ssh never passes on an escape sequence of a node", async (sshd) => {
  const output = "\x1b]0;title\x07\x1b[31mred\x9b1m \u202eevil\u2066 \0 \x7f one\rtwo\r\n";
  const octal = [...new TextEncoder().encode(output)].map((byte) => `\\0${byte.toString(8).padStart(3, "0")}`).join("");
  const command = `printf %b '${octal}'; printf %b '${octal}' >&2; exit 4`;
  // deno-lint-ignore no-control-regex
  const unsafe = /[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/;
  for (const flags of [[], ["--gather"], ["--json"]]) {
    const { stdout, stderr } = await ssh({ a: sshd.host }, [...sshd.flags, ...flags, "--", command]);
    assert(!unsafe.test(stdout + stderr), JSON.stringify(stdout + stderr));
    if (flags.includes("--json")) {
      const [node] = JSON.parse(stdout).nodes;
      assertEquals([node.stdout, node.stderr], [output, output]);
    } else {
      assertStringIncludes(
        stdout,
        "\\u{1b}]0;title\\u{7}\\u{1b}[31mred\\u{9b}1m \\u{202e}evil\\u{2066} \\u{0} \\u{7f} ",
      );
      assertStringIncludes(flags.length > 0 ? stdout : stderr, "one\\u{d}two\n");
    }
  }
  const lying = `${LYING_FAULT.replace("\x1b", "\\033")}`;
  const { stderr } = await ssh({ a: sshd.host }, [...sshd.flags, "--", `printf '${lying}\\n' >&2; exit 255`]);
  assert(!unsafe.test(stderr), JSON.stringify(stderr));
  assertStringIncludes(stderr, "Connection \\u{1b}[2J");
});

const LYING_FAULT = "Connection \x1b[2J";

sshdTest("ssh leaves no ssh behind when it is ended", async (sshd) => {
  await using inventory = await writeInventory(numbered(3, sshd.host));
  const args = ["ssh", "--config", inventory.path, ...sshd.flags, "--", "echo started; exec sleep 4"];
  await using cli = startCli(args);
  for (let started = 0; started < 3; started++) await cli.stdout.next();
  assertEquals((await sshProcesses(sshd.port)).length, 3);
  cli.process.kill("SIGTERM");
  assertEquals((await cli.end()).code, 143);
  assertEquals(await sshProcesses(sshd.port), []);
});

/** The command lines of the ssh processes that go to a port. */
async function sshProcesses(port: number): Promise<string[]> {
  const script = 'for file in /proc/[0-9]*/cmdline; do tr "\\0" " " < "$file"; echo; done 2> /dev/null';
  const { stdout } = await run("sh", ["-c", script]);
  return stdout.split("\n").filter((line) => /^(\S*\/)?ssh /.test(line) && line.includes(` -p ${port} `));
}

Deno.test("ssh leaves no ssh behind at any signal, not even one that ignores it", async () => {
  await using inventory = await writeInventory(numbered(3, LOCAL));
  const args = ["ssh", "--config", inventory.path, "--concurrency", "2", "--", "x"];
  for (const script of [POLITE, STUBBORN]) {
    for (const [signal, exitCode] of [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const) {
      await using ill = await standIn(script);
      await using cli = startCli(args, ill);
      for (let started = 0; started < 2; started++) assertMatch((await cli.stdout.next()).value, /^gpu-[12]: started$/);
      const signalled = performance.now();
      cli.process.kill(signal);
      const { code, stderr } = await cli.end();
      assertEquals(code, exitCode);
      assert(performance.now() - signalled < 1500, `took ${performance.now() - signalled} ms`);
      const pids = await ill.pids();
      assertEquals(pids.length, 2);
      assertEquals(await alive(pids), []);
      assertMatch(stderr.at(-1)!, /^cluster-hosts: 0 of 3 returned 0; gpu-\[1-2\]: ended by SIG\w+; 1 not started$/);
    }
  }
});

Deno.test("ssh ends at --timeout what ignores SIGTERM and leaves a process that holds the pipe", async () => {
  await using stubborn = await standIn(STUBBORN);
  const { code, stdout, stderr, ms } = await ssh({ a: LOCAL }, ["--timeout", "1", "--", "x"], stubborn);
  assertEquals([code, stdout], [1, "a: started\n"]);
  assertEquals(stderr, "cluster-hosts: 0 of 1 returned 0; a: timed out after 1.00 s\n");
  assert(ms < 1000 + 1500 + PROCESS_MS, `took ${ms} ms`);
  assertEquals(await alive(await stubborn.pids()), []);
});

Deno.test("ssh caps an endless output, and ends it at --timeout", async () => {
  await using flooding = await standIn('echo $$ >> "$0.pids"; exec yes');
  const { code, stdout, stderr, ms } = await ssh({ a: LOCAL }, ["--timeout", "1", "--", "x"], flooding);
  assertEquals(code, 1);
  assert(stdout.endsWith("a: y\na: [cut at 1 MiB]\n") && stdout.length < 4 * MIB);
  assertEquals(
    stderr,
    "cluster-hosts: 0 of 1 returned 0; a: timed out after 1.00 s; a: output cut at 1 MiB\n",
  );
  assert(ms < 1000 + 1500 + PROCESS_MS, `took ${ms} ms`);
  assertEquals(await alive(await flooding.pids()), []);
});

Deno.test("ssh ends every ssh when the reader of its output is gone", async () => {
  await using inventory = await writeInventory(numbered(3, LOCAL));
  await using flooding = await standIn('echo $$ >> "$0.pids"; exec yes');
  const command =
    `deno run -q --no-prompt --config deno.json -P=cli cli.ts ssh --config ${inventory.path} --timeout 6 -- x | head -1`;
  const { code, stdout, stderr, ms } = await run("sh", ["-c", command], flooding);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^gpu-[123]: y\n$/);
  assert(ms < 1500 + PROCESS_MS, `took ${ms} ms`);
  assertEquals(await alive(await flooding.pids()), []);
});

Deno.test("ssh is told what is missing: a command, a node, ssh itself", async () => {
  await using recording = await standIn(RECORDING);
  for (
    const [args, message] of [
      [[], /ssh needs a command behind "--"/],
      [["a"], /ssh needs a command behind "--"/],
      [["a", "--"], /ssh needs a command behind "--"/],
      [["b", "--", "true"], /"b"/],
      [["--timeout", "0", "--", "true"], /--timeout/],
      [["--ssh-option", "ConnectTimeout", "--", "true"], /KEY=VALUE/],
    ] as const
  ) {
    const { code, stdout, stderr } = await ssh({ a: LOCAL }, args, recording);
    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr, /^cluster-hosts: .*\n$/);
    assertMatch(stderr, message);
  }
  assertEquals(await recording.calls(), []);

  await using broken = await standIn("");
  await Deno.writeTextFile(`${broken.folder}/ssh`, "#!/nowhere\n");
  const { code, stderr } = await ssh(numbered(3, LOCAL), ["--", "true"], broken);
  assertEquals([code, stderr], [2, "cluster-hosts: There is no ssh on the PATH: install OpenSSH\n"]);
});

const UNSAFE = [
  "-oProxyCommand=touch",
  "a b",
  "a;id",
  "$(id)",
  "`id`",
  "a\nb",
  "a%h",
  "a|id",
  "a&id",
  "a'b",
  'a"b',
  "a>b",
  "a\\b",
  "a*",
];

Deno.test("ssh refuses unsafe hosts, users, keys and jump hosts before any process starts", async () => {
  await using recording = await standIn(RECORDING);
  const good = { good: LOCAL };
  const hosts: Hosts = { ...good };
  for (const [index, text] of [...UNSAFE, "a\0b"].entries()) {
    hosts[`host${index}`] = { tailscale_ip: text };
    hosts[`target${index}`] = { ssh_host: text };
    hosts[`account${index}`] = { ssh_host: `${text}@127.0.0.1` };
    hosts[`user${index}`] = { ...LOCAL, ssh_user: text };
    hosts[`key${index}`] = { ...LOCAL, ssh_key: text };
  }
  const { code, stdout, stderr } = await ssh(hosts, ["good", "--", "true"], recording);
  assertEquals([code, stdout], [2, ""]);
  for (const name of Object.keys(hosts).slice(1)) assertStringIncludes(stderr, `hosts.${name}.`);

  for (const user of UNSAFE) {
    const { code, stdout, stderr } = await ssh(good, [`--user=${user}`, "--", "true"], recording);
    assertEquals([code, stdout], [2, ""], user);
    assertMatch(stderr, /^cluster-hosts: .*user: .*\n$/);
  }
  for (const key of ["ProxyJump", "HostName", "User", "IdentityFile"]) {
    const options = UNSAFE.map((text) => `--ssh-option=${key}=${text}`);
    const { code, stdout, stderr } = await ssh(good, [...options, "--", "true"], recording);
    assertEquals([code, stdout], [2, ""]);
    assertEquals(stderr.split(`ssh option: ${key}: `).length - 1, UNSAFE.length, stderr);
  }
  assertEquals(await recording.calls(), []);

  // It does record what is safe.
  const jump = ["--ssh-option", "ProxyJump=me@127.0.0.1:22,[::1]:23"];
  assertEquals((await ssh(good, [...jump, "--", "echo", "a;b"], recording)).code, 0);
  assertEquals(await recording.calls(), [
    "-o BatchMode=yes -o ConnectTimeout=10 -p 22 -o ProxyJump=me@127.0.0.1:22,[::1]:23 -- ubuntu@127.0.0.1 echo a;b",
  ]);
});
