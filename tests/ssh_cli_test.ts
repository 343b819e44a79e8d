import { assert, assertEquals, assertLess, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { startNode } from "./loopback_cluster.ts";
import {
  type InventoryFile,
  nextLine,
  programMissing,
  ROOT,
  run,
  runCli,
  type RunOptions,
  startCli,
  testUnless,
  writeInventory,
} from "./process.ts";
import { type Sshd, SSHD_ADDRESSES, sshdMissing, sshdTest, startSshd } from "./sshd.ts";
import { alive, FAKES, fakeSsh } from "./ssh_process.ts";

const MIB = 1024 * 1024;

/** What the command line may take to start and to end, beside the deadlines that it promises. */
const PROCESS_MS = 1500;

/** Prints the address of the server that it runs on. */
const WHERE = "set -- $SSH_CONNECTION; echo $3";

type Hosts = Record<string, Record<string, unknown>>;

async function ssh(hosts: Hosts, args: readonly string[], options: RunOptions = {}) {
  await using inventory = await writeInventory(hosts);
  const { stderr, ...others } = await runCli(["ssh", "--config", inventory.path, ...args], options);
  return { ...others, stderr: stderr.replaceAll(inventory.path, "FILE") };
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

const LOCAL: Readonly<Record<string, unknown>> = { tailscale_ip: "127.0.0.1", status: "active" };

sshdTest("ssh prefixes each line with its node, stdout to stdout and stderr to stderr, tabs kept", async (sshd) => {
  const command = `${WHERE}; printf 'one\\ttwo\\n'; echo oops >&2; printf end`;
  const { code, stdout, stderr } = await ssh(pair(sshd), [...sshd.flags, "*", "--", command]);
  assertEquals(
    stdout.split("\n").toSorted(),
    ["", "a: 127.0.0.1", "a: end", "a: one\ttwo", "b: 127.0.0.2", "b: end", "b: one\ttwo"],
  );
  assertEquals(stderr.split("\n").toSorted(), ["", "a: oops", "b: oops", "cluster-hosts: 2 of 2 returned 0, FILE"]);
  assertEquals(code, 0);
});

sshdTest("ssh shows a line while the command still runs", async (sshd) => {
  await using inventory = await writeInventory({ a: sshd.host });
  const gate = `${inventory.folder}/gate`;
  const command = `echo first; while [ ! -e ${gate} ]; do sleep 0.05; done; echo last`;
  await using cli = startCli(["ssh", "a", "--config", inventory.path, ...sshd.flags, "--", command]);
  assertEquals(await nextLine(cli.stdout), "a: first");
  await Deno.writeTextFile(gate, "");
  const stderr = [`cluster-hosts: 1 of 1 returned 0, ${inventory.path}`];
  assertEquals(await cli.end(), { code: 0, stdout: ["a: last"], stderr });
});

sshdTest("ssh --gather folds equal outputs, and keeps different ones and failures apart", async (sshd) => {
  const hosts = { ...numbered(20, sshd.host), "gpu-21": pair(sshd).b!, head: sshd.host };
  const command = `${WHERE}; echo oops >&2; [ $3 = 127.0.0.1 ]`;
  const { code, stdout } = await ssh(hosts, [...sshd.flags, "--gather", "*", "--", command]);
  assertEquals(
    stdout,
    "--- gpu-[1-20],head (21)\n127.0.0.1\noops\n--- gpu-21: exit: exit code 1\n127.0.0.2\noops\n",
  );
  assertEquals(code, 1);
});

sshdTest("ssh --json tells all about each node", async (sshd) => {
  const args = [...sshd.flags, "*", "--", `${WHERE}; echo oops >&2; [ $3 = 127.0.0.1 ] || kill -9 $$`];
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
      failure: { code: "no-address", message: "set tailscale_ip or ssh_host" },
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
  const command = `${WHERE}; [ $3 = 127.0.0.1 ] || exit 7`;
  const { code, stdout, stderr } = await ssh(hosts, [...sshd.flags, "*", "--", command]);
  assertEquals(stdout.split("\n").filter((line) => line !== "").length, 4);
  const summary = stderr.trimEnd().split("\n").at(-1)!;
  assertMatch(summary, /^cluster-hosts: 1 of 7 returned 0, FILE; /);
  for (
    const part of [
      /; gpu-\[1-3\]: exit: exit code 7(;|$)/,
      /; dead: connect: .*ssh: connect to host 127.0.0.1 port \d+: Connection refused/,
      /; locked: connect: .*Permission denied \(publickey\)/,
      /; homeless: no-address: set tailscale_ip or ssh_host(;|$)/,
    ]
  ) assertMatch(summary, part);
  assertEquals(code, 1);
});

sshdTest("ssh ends a command at --timeout", async (sshd) => {
  const args = [...sshd.flags, "--timeout", "1", "a", "--", "echo before; exec sleep 4"];
  const { code, stdout, stderr, ms } = await ssh({ a: sshd.host }, args);
  assertEquals(stdout, "a: before\n");
  assertMatch(stderr, /^cluster-hosts: 0 of 1 returned 0, FILE; a: timeout: .*1 s\n$/);
  assertEquals(code, 1);
  assertLess(ms, 1000 + PROCESS_MS);
});

sshdTest("ssh says which option accepts a host key that is not known", async (sshd) => {
  const known = `${sshd.keyPath}.known`;
  const flags = ["--ssh-option", `UserKnownHostsFile=${known}`, "--ssh-option", "GlobalKnownHostsFile=/dev/null"];
  const refused = await ssh({ a: sshd.host }, [...flags, "a", "--", "echo ran"]);
  assertEquals([refused.code, refused.stdout], [1, ""]);
  const [option = ""] = /--ssh-option StrictHostKeyChecking=accept-new/.exec(refused.stderr) ?? [];
  assert(option !== "", refused.stderr);
  const accepted = await ssh({ a: sshd.host }, [...flags, ...option.split(" "), "a", "--", "echo ran"]);
  assertEquals([accepted.code, accepted.stdout], [0, "a: ran\n"]);
});

sshdTest("ssh takes the user of --user, and options in place of its own", async (sshd) => {
  await using dead = await startNode("refuses");
  const hosts = { a: { ...sshd.host, ssh_user: "nobody", ssh_port: dead.port } };
  const args = [...sshd.flags, "--user", sshd.user, "--ssh-option", `Port=${sshd.port}`, "a", "--", "id -un"];
  const { code, stdout, stderr } = await ssh(hosts, args);
  assertEquals([code, stdout], [0, `a: ${sshd.user}\n`], stderr);

  await using recording = await fakeSsh(FAKES.recording);
  const options = ["--ssh-option", "connecttimeout=3", "--ssh-option", "BatchMode=no", "--connect-timeout", "9"];
  await ssh({ a: LOCAL }, [...options, "a", "--", "true"], recording);
  assertEquals(await recording.calls(), ["-p 22 -o connecttimeout=3 -o BatchMode=no -- ubuntu@127.0.0.1 true"]);
});

sshdTest("ssh shows all of a long output, and keeps 1 MiB of it for --json and --gather", async (sshd) => {
  const size = 3_000_000;
  const flood = `head -c ${size} /dev/zero | tr '\\0' x | fold -w 1000; echo; echo end`;
  const live = await ssh({ a: sshd.host }, [...sshd.flags, "a", "--", flood]);
  // Not compared by assertEquals(): its difference would be 6 MB long.
  assert(live.stdout === `a: ${"x".repeat(1000)}\n`.repeat(size / 1000) + "a: end\n");
  assertEquals([live.code, live.stderr], [0, "cluster-hosts: 1 of 1 returned 0, FILE\n"]);

  const { code, nodes: [node] } = await sshJson({ a: sshd.host }, [...sshd.flags, "a", "--", flood]);
  assertEquals([code, node.truncated, node.stdout.length], [0, true, MIB]);
  const gathered = await ssh({ a: sshd.host }, [...sshd.flags, "--gather", "a", "--", flood]);
  assert(gathered.stdout.endsWith("[cut at 1 MiB]\n") && gathered.stdout.length < MIB + 100);
});

sshdTest("ssh gives the command an empty stdin, or with --stdin what it reads, to each", async (sshd) => {
  const stdin = "echo from a script\n";
  const empty = await ssh({ a: sshd.host }, [...sshd.flags, "a", "--", "cat; echo done"], { stdin });
  assertEquals([empty.code, empty.stdout], [0, "a: done\n"]);
  const given = await ssh(pair(sshd), [...sshd.flags, "--stdin", "*", "--", "sh", "-s"], { stdin });
  assertEquals(given.stdout.split("\n").toSorted(), ["", "a: from a script", "b: from a script"]);
  for (const command of [["sh", "-s"], ["bash"], ["sudo", "sh"]]) {
    const refused = await ssh({ a: sshd.host }, [...sshd.flags, "a", "--", ...command], { stdin });
    assertEquals([refused.code, refused.stdout], [2, ""], command.join(" "));
    assertStringIncludes(refused.stderr, "--stdin");
  }
});

sshdTest("ssh --cd runs it in each node's ringrift_path, and not at all if there is none", async (sshd) => {
  const home = `${sshd.keyPath}.d`;
  await Deno.mkdir(`${home}/a path`, { recursive: true });
  const hosts = {
    tilde: { ...sshd.host, ringrift_path: "~" },
    blank: { ...sshd.host, ringrift_path: `${home}/a path` },
    none: { ...sshd.host, ringrift_path: `${home}/none` },
  };
  const { code, stdout } = await ssh(hosts, [...sshd.flags, "--cd", "*", "--", "pwd; echo ran"]);
  const tilde = (await run("sh", ["-c", "cd && pwd -P"], { env: { HOME: sshd.keyPath.replace(/\/[^/]*$/, "") } }))
    .stdout.trim();
  assertEquals(stdout.split("\n").toSorted(), [
    "",
    `blank: ${home}/a path`,
    "blank: ran",
    `tilde: ${tilde}`,
    "tilde: ran",
  ]);
  assertEquals(code, 1);
});

sshdTest(
  "ssh runs with the flags of `permissions ssh`; without net it takes the first address, and says so",
  async (sshd) => {
    await using dead = await startNode("refuses", { hostname: "127.0.0.3", port: sshd.port });
    await using inventory = await writeInventory({
      a: { ...sshd.host, ssh_host: dead.hostname, tailscale_ip: SSHD_ADDRESSES[1] },
    });
    const args = ["ssh", "a", "--config", inventory.path, ...sshd.flags, "--", "echo", "hello"];
    const printed = await runCli(["permissions", ...args]);
    const flags = printed.stdout.trim().split(" ").filter((flag) => !flag.startsWith("--allow-env"));
    const net = `--allow-net=127.0.0.3:${sshd.port},127.0.0.2:${sshd.port},127.0.0.2:22`;
    assertEquals(flags, [`--allow-read=${inventory.path}`, net, "--allow-run=ssh"], printed.stderr);
    const allowed = await runCli(args, { flags });
    assertEquals([allowed.code, allowed.stdout], [0, "a: hello\n"], allowed.stderr);

    const first = await runCli(args, { flags: [flags[0]!, flags[2]!] });
    assertEquals([first.code, first.stdout], [1, ""]);
    assertStringIncludes(first.stderr, "127.0.0.2");
    assertStringIncludes(first.stderr, net);
    const denied = await runCli(args, { flags: flags.slice(0, 2) });
    assertEquals([denied.code, denied.stdout], [2, ""]);
    assertMatch(denied.stderr, /^cluster-hosts: .*--allow-run=ssh\n$/);
  },
);

sshdTest("ssh never passes on an escape sequence of a node", async (sshd) => {
  const output = "\x1b]0;title\x07\x1b[31mred\x9b1m \u202eevil\u2066 \0 \x7f one\rtwo\r\n";
  const octal = [...new TextEncoder().encode(output)].map((byte) => `\\0${byte.toString(8).padStart(3, "0")}`).join("");
  const command = `printf %b '${octal}'; printf %b '${octal}' >&2; exit 4`;
  // deno-lint-ignore no-control-regex
  const unsafe = /[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/;
  for (const flags of [[], ["--gather"], ["--json"]]) {
    const { stdout, stderr } = await ssh({ a: sshd.host }, [...sshd.flags, ...flags, "a", "--", command]);
    assert(!unsafe.test(stdout + stderr), JSON.stringify(stdout + stderr));
    if (flags.includes("--json")) {
      const [node] = JSON.parse(stdout).nodes;
      assertEquals([node.stdout, node.stderr], [output, output]);
    } else {
      assertStringIncludes(
        stdout,
        "\\u{1b}]0;title\\u{7}\\u{1b}[31mred\\u{9b}1m \\u{202e}evil\\u{2066} \\u{0} \\u{7f} ",
      );
      assertStringIncludes(flags.length > 0 ? stdout : stderr, "one\\u{d}two");
    }
  }
  const lie = "Connection to 127.0.0.1 \\033[2J closed by remote host.";
  const { stderr } = await ssh({ a: sshd.host }, [...sshd.flags, "a", "--", `printf '${lie}\\n' >&2; exit 255`]);
  assert(!unsafe.test(stderr), JSON.stringify(stderr));
  assertStringIncludes(stderr, "\\u{1b}[2J");
});

Deno.test("ssh leaves no ssh behind at any signal, not even one that ignores it", async () => {
  await using inventory = await writeInventory(numbered(3, LOCAL));
  const args = ["ssh", "*", "--config", inventory.path, "--concurrency", "2", "--", "x"];
  await Promise.all([FAKES.polite, FAKES.stubborn].map(async (script) => {
    for (const [signal, exitCode] of [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const) {
      await using fake = await fakeSsh(script);
      await using cli = startCli(args, fake);
      for (let started = 0; started < 2; started++) assertMatch(await nextLine(cli.stdout), /^gpu-[12]: started$/);
      const signalled = performance.now();
      cli.process.kill(signal);
      const { code, stderr } = await cli.end();
      assertEquals(code, exitCode);
      assertLess(performance.now() - signalled, PROCESS_MS);
      const pids = await fake.pids();
      assertEquals([pids.length, await alive(pids)], [2, []]);
      const summary = /^cluster-hosts: 0 of 3 returned 0, \S+; gpu-\[1-2\]: signal: ended by SIG\w+; 1 not started$/;
      assertMatch(stderr.at(-1)!, summary);
    }
  }));
});

Deno.test("ssh ends every ssh when the reader of its output is gone", async () => {
  await using inventory = await writeInventory(numbered(3, LOCAL));
  await using flooding = await fakeSsh(FAKES.flooding);
  const command = `deno run -q --no-prompt --config deno.json -P=cli cli.ts ssh '*' --config ${inventory.path} ` +
    "--timeout 6 -- x | head -1";
  const { code, stdout, stderr, ms } = await run("sh", ["-c", command], flooding);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^gpu-[123]: y\n$/);
  assertLess(ms, 2 * PROCESS_MS);
  assertEquals(await alive(await flooding.pids()), []);
});

Deno.test("ssh is told what is missing: a node, a command, ssh itself", async () => {
  await using recording = await fakeSsh(FAKES.recording);
  for (
    const [args, message] of [
      [[], /ssh needs a NODE/],
      [["--", "true"], /ssh needs a NODE/],
      [["--all", "--", "true"], /ssh needs a NODE/],
      [["a", "--"], /after "--"/],
      [["a", "--", ""], /after "--"/],
      [["*"], /a login takes one node/i],
      [["b", "--", "true"], /"b"/],
      [["a", "--timeout", "0", "--", "true"], /--timeout/],
      [["a", "--ssh-option", "ConnectTimeout", "--", "true"], /KEY=VALUE/],
    ] as const
  ) {
    const { code, stdout, stderr } = await ssh({ a: LOCAL, c: LOCAL }, args, recording);
    assertEquals([code, stdout], [2, ""], args.join(" "));
    assertMatch(stderr, /^cluster-hosts: .*\n$/);
    assertMatch(stderr, message);
  }
  assertEquals(await recording.calls(), []);

  await using broken = await fakeSsh("");
  await Deno.writeTextFile(`${broken.folder}/ssh`, "#!/nowhere\n");
  const { code, stderr } = await ssh(numbered(3, LOCAL), ["*", "--", "true"], broken);
  assertEquals([code, stderr], [2, "cluster-hosts: There is no ssh on the PATH: install OpenSSH\n"]);
});

const UNSAFE = ["-oProxyCommand=touch", "a b", "a;id", "$(id)", "a\nb", "a%h", "a'b", "a*"];

Deno.test("ssh refuses unsafe hosts, users, keys and jump hosts before any process starts", async () => {
  await using recording = await fakeSsh(FAKES.recording);
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

  const options = ["ProxyJump", "HostName", "User", "IdentityFile"]
    .flatMap((key) => UNSAFE.map((text) => `--ssh-option=${key}=${text}`));
  for (const flags of [["--user=a b"], options]) {
    const { code, stdout, stderr } = await ssh(good, [...flags, "good", "--", "true"], recording);
    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr, flags.length > 1 ? /ssh option ProxyJump: / : /user/);
  }
  assertEquals(await recording.calls(), []);

  // It does record what is safe.
  const jump = ["--ssh-option", "ProxyJump=me@127.0.0.1:22,[::1]:23"];
  assertEquals((await ssh(good, [...jump, "good", "--", "echo", "a;b"], recording)).code, 0);
  assertEquals(await recording.calls(), [
    "-o BatchMode=yes -o ConnectTimeout=10 -p 22 -o ProxyJump=me@127.0.0.1:22,[::1]:23 -- ubuntu@127.0.0.1 echo a;b",
  ]);
});

/** Types on a terminal that the command line runs on, and gives what was shown. */
async function onTerminal(inventory: InventoryFile, args: readonly string[], keys: string): Promise<string> {
  const command = ["deno run -q -P=cli", `${ROOT}cli.ts`, "ssh --config", inventory.path, ...args].join(" ");
  const { stdout } = await run("sh", ["-c", 'exec timeout 20 script -qec "$0" /dev/null', command], { stdin: keys });
  return stdout.replaceAll("\r", "");
}

/** An sshd that is not root's may hand out no terminal. */
const NO_TERMINAL = Deno.uid() === 0 ? undefined : "needs root";

testUnless(
  sshdMissing() ?? programMissing("script") ?? NO_TERMINAL,
  "ssh without a command logs in, with ssh's own terminal",
  async () => {
    await using sshd = await startSshd();
    await using inventory = await writeInventory({ a: sshd.host });
    const shown = await onTerminal(inventory, ["a", ...sshd.flags], "tty; echo $((6 * 7)); exit 3\n");
    assertMatch(shown, /\/dev\/pts\/\d+/);
    assertMatch(shown, /^42$/m);
  },
);
