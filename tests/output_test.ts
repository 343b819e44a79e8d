// deno-lint-ignore-file no-control-regex
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { hostAt, manyHosts } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import {
  programMissing,
  ROOT,
  run,
  type RunOptions,
  startCli,
  testUnless,
  writeInventory,
} from "./process.ts";

const CLI = `deno run -q --no-prompt --config ${ROOT}deno.json -P=cli ` +
  `${ROOT}cli.ts`;
const DEMO = `${ROOT}config/demo_hosts.yaml`;

const scriptMissing = programMissing("script");
const pythonMissing = programMissing("python3");

/** Runs a shell command in which `cluster-hosts` is cli.ts. */
function shell(command: string, options: Pick<RunOptions, "env"> = {}) {
  const line = command.replaceAll("cluster-hosts", CLI);
  return run("sh", ["-c", line], options);
}

/** Writes an inventory that is large: `nodes --json` prints more than a pipe takes at once. */
function writeLargeInventory(count = 3000) {
  return writeInventory(manyHosts(count, { tailscale_ip: "127.0.0.1" }));
}

// --- Pipes and files ---

const CLOSED = [
  "nodes",
  "nodes --json",
  "urls elo --unchecked -q",
  "export ansible",
  "ssh '*' --dry-run -- true",
];

for (const line of CLOSED) {
  Deno.test(`cluster-hosts ${line} ends quietly when the reader of its pipe is gone`, async () => {
    await using inventory = await writeLargeInventory();
    const [before, remote = ""] = line.split(/(?= -- )/);
    const command = `cluster-hosts ${before} -c ${inventory.path}${remote}`;

    const piped = `{ ${command}; echo ended $? >&2; } | head -c 1`;
    const { stdout, stderr } = await shell(piped);

    assertEquals([stdout.length, stderr.split("\n").at(-2)], [1, "ended 0"]);
    assert(!stderr.includes("Error"), stderr);
  });
}

const FULL = [
  "status",
  "nodes",
  "nodes --json",
  "coordinator",
  "urls data --include-self",
  "wait",
  "export prometheus",
  "permissions status",
  "validate --json",
];

for (const line of FULL) {
  Deno.test(`cluster-hosts ${line} > /dev/full says that the output cannot be written`, async () => {
    await using node = await startNode("ok");
    const sections = { elo_sync: { coordinator: "head" } };
    const hosts = { head: hostAt(node) };
    await using inventory = await writeInventory(hosts, sections);

    const command = `cluster-hosts ${line} -c ${inventory.path} > /dev/full`;
    const { code, stderr } = await shell(command);

    const reason = "No space left on device (os error 28)";
    const message = `cluster-hosts: Cannot write the output: ${reason}\n`;
    assertEquals([code, stderr], [2, message]);
  });
}

for (
  const line of ["--help > ", "--version > ", "status --help > ", "stauts 2> "]
) {
  Deno.test(`cluster-hosts ${line}/dev/full returns 2`, async () => {
    assertEquals((await shell(`cluster-hosts ${line}/dev/full`)).code, 2);
  });
}

Deno.test("cluster-hosts works with a closed stdin, a closed stdout and another locale", async () => {
  const closed = await shell(`cluster-hosts nodes gpu-1 -c ${DEMO} <&-`);
  assertEquals([closed.code, closed.stdout.split("\n").length], [0, 3]);

  const empty = await shell("cluster-hosts nodes -c - <&-");
  assertEquals([empty.code, empty.stdout], [2, ""]);
  assertMatch(empty.stderr, /^cluster-hosts: [^\n]+\n$/);

  const out = await shell(`cluster-hosts nodes -q -c ${DEMO} >&-`);
  assertEquals(out.stderr, "");

  const name = JSON.stringify({ hosts: { "漢字": {} } });
  const command = `echo '${name}' | cluster-hosts nodes --names -c -`;
  const env = { LANG: "C", LC_ALL: "C" };
  assertEquals((await shell(command, { env })).stdout, "漢字\n");
});

Deno.test("cluster-hosts validate says that stdin is not UTF-8", async () => {
  const yaml = "printf 'hosts: {a: {gpu: h\\351}}'";

  const line = `${yaml} | cluster-hosts validate --config -`;
  const { code, stdout, stderr } = await shell(line);

  assertEquals([code, stdout], [2, "stdin: is not UTF-8\n"]);
  assertEquals(stderr, "cluster-hosts: 1 problem, no warnings, stdin\n");
});

/**
 * Runs a command whose stdout is a pipe that does not block, as an ssh leaves
 * one that it shares, and that is read slowly; prints what was read, and the
 * exit code on stderr.
 */
const NON_BLOCKING = `
import fcntl, os, subprocess, sys, time
reader, writer = os.pipe()
flags = fcntl.fcntl(writer, fcntl.F_GETFL)
fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)
child = subprocess.Popen(sys.argv[1:], stdout=writer)
os.close(writer)
time.sleep(1)
while True:
    part = os.read(reader, 50000)
    if not part:
        break
    sys.stdout.buffer.write(part)
    time.sleep(0.02)
print(child.wait(), file=sys.stderr)
`;

for (const line of ["nodes --json", "nodes", "export ansible"]) {
  testUnless(
    pythonMissing,
    `cluster-hosts ${line} prints all of it, once, to a stdout that does not block`,
    async () => {
      await using inventory = await writeLargeInventory();
      const command = `cluster-hosts ${line} -c ${inventory.path}`;

      const whole = await shell(command);
      const args = `${command}`.replace("cluster-hosts", CLI).split(" ");
      const slow = await run("python3", ["-c", NON_BLOCKING, ...args]);

      assert(whole.stdout.length > 200_000);
      assertEquals(slow.stdout.length, whole.stdout.length);
      assert(slow.stdout === whole.stdout);
      assertEquals(slow.stderr, `${whole.stderr}0\n`);
    },
  );
}

/**
 * Runs a command whose stdout nobody reads, sends it a signal once it blocks,
 * and prints the exit code, and whether it ended within five seconds.
 */
const BLOCKED = `
import os, signal, subprocess, sys, time
reader, writer = os.pipe()
command = sys.argv[2:]
child = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL)
os.close(writer)
# A pipe takes 64 KiB; from then on the command waits for its reader.
import fcntl, array, termios
def held():
    size = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, size)
    return size[0]
while held() < 60000:
    time.sleep(0.05)
time.sleep(0.5)
child.send_signal(getattr(signal, sys.argv[1]))
try:
    print(child.wait(5))
except subprocess.TimeoutExpired:
    child.kill()
    print("still running")
`;

for (
  const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143], [
    "SIGHUP",
    129,
  ]] as const
) {
  testUnless(
    pythonMissing,
    `cluster-hosts nodes --json returns ${code} at ${signal} while its stdout blocks`,
    async () => {
      await using inventory = await writeLargeInventory();
      const command = `${CLI} nodes --json -c ${inventory.path}`.split(" ");

      const args = ["-c", BLOCKED, signal, ...command];
      const { stdout, stderr } = await run("python3", args);

      assertEquals([stdout, stderr], [`${code}\n`, ""]);
    },
  );
}

// --- Signals ---

const SIGNALS: readonly (readonly [
  line: string,
  signal: Deno.Signal,
  code: number,
])[] = [
  ["status", "SIGINT", 130],
  ["status", "SIGTERM", 143],
  ["status", "SIGHUP", 129],
  ["status --json", "SIGTERM", 143],
  ["urls data --include-self", "SIGINT", 130],
  ["wait", "SIGINT", 130],
  ["status --watch", "SIGTERM", 143],
];

for (const [line, signal, code] of SIGNALS) {
  Deno.test(`cluster-hosts ${line} amid 1,000 black holes returns ${code} at ${signal}, with what is known`, async () => {
    await using hole = await startNode("black-hole");
    await using node = await startNode("ok");
    const holes = manyHosts(999, hostAt(hole), "dead");
    await using inventory = await writeInventory({
      live: hostAt(node),
      ...holes,
    });

    const words = [...line.split(" "), "--config", inventory.path];
    await using cli = startCli([...words, "--timeout", "25"]);
    while (node.connections === 0) await delay(10);
    await delay(500);
    const started = performance.now();
    cli.process.kill(signal);
    const result = await cli.end();
    const ms = performance.now() - started;

    assertEquals(result.code, code);
    // Long before its timeout.
    assert(ms < 10_000, `It ended ${ms} ms after ${signal}`);
    const stdout = result.stdout.join("\n");
    const stderr = result.stderr.join("\n");
    if (line === "status") {
      assertMatch(stdout, /^NAME .*\nlive .* up /);
      assertStringIncludes(stderr, "1 of 1000 nodes up, 999 not checked in ");
      assertStringIncludes(stderr, "Interrupted: 1 of 1000 nodes were checked");
    }
    if (line === "status --json") {
      const { total, checked, up } = JSON.parse(stdout).summary;
      assertEquals([total, checked, up], [1000, 1, 1]);
    }
    if (line === "wait") {
      assertMatch(stderr, /Still missing after .*: dead-\[1-999\] /);
    }
  });
}

for (const [signal, code] of [["INT", 130], ["TERM", 143]] as const) {
  Deno.test(`cluster-hosts returns ${code} at SIG${signal} while it reads stdin`, async () => {
    // After a "&", sh gives /dev/null as stdin: the pipe is handed over.
    const line = "sleep 6 | { exec 3<&0; cluster-hosts nodes -c - <&3 & " +
      `sleep 2; kill -${signal} $!; wait $!; echo $?; }`;

    assertEquals((await shell(line)).stdout, `${code}\n`);
  });
}

// --- Terminals ---

/** Runs it on a terminal of this size, of which both streams are one. */
async function onTerminal(
  command: string,
  size: { readonly columns: number; readonly rows: number },
  env: Record<string, string> = {},
) {
  const line = command.replaceAll("cluster-hosts", CLI);
  const inner = `stty rows ${size.rows} cols ${size.columns}; exec ${line}`;
  const outer = `exec timeout 50 script -qec '${inner}' /dev/null`;

  const { code, stdout } = await run("sh", ["-c", outer], {
    env: { TERM: "xterm", ...env },
  });
  return { code, text: stdout.replaceAll("\r\n", "\n") };
}

/** An inventory of a node that is up, one that is silent, and a retired one. */
async function startTwo() {
  await using stack = new AsyncDisposableStack();
  const node = stack.use(await startNode("ok"));
  const silent = stack.use(await startNode("silent"));
  const { path } = stack.use(
    await writeInventory({
      up: hostAt(node),
      late: hostAt(silent),
      gone: { status: "offline" },
    }),
  );

  const held = stack.move();
  return { path, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

testUnless(
  scriptMissing,
  "cluster-hosts status on a terminal fits its width, in colour, below its progress",
  async () => {
    await using two = await startTwo();
    const command = `cluster-hosts status --config ${two.path} --timeout 1s`;

    const { code, text } = await onTerminal(command, { columns: 80, rows: 24 });

    assertEquals(code, 1);
    assertMatch(text, /^\rchecked \d\/2, 0s\x1b\[K/);
    assertStringIncludes(text, "\r\x1b[K\x1b[1mNAME");
    assertStringIncludes(text, "\x1b[33munhealthy\x1b[0m");
    const lines = text.replace(/\r[^\n]*\x1b\[K|\x1b\[\d+m/g, "").split("\n");
    const table = lines.slice(0, lines.indexOf(""));
    assert(table.every((line) => line.length <= 80), text);
    assertMatch(
      table[1]!,
      /^late +127\.0\.0\.1:\d+ .* unhealthy {2}timeout: acc/,
    );
  },
);

testUnless(
  scriptMissing,
  "cluster-hosts status on a wide terminal has every column, and no colour with NO_COLOR",
  async () => {
    await using two = await startTwo();
    const command = `cluster-hosts status --config ${two.path} --timeout 1s`;
    const size = { columns: 200, rows: 24 };

    const { text } = await onTerminal(command, size, { NO_COLOR: "1" });

    assert(!text.includes("\x1b[3"), text);
    assertMatch(text, / VERSION +GAMES +REASON\n/);
  },
);

testUnless(
  scriptMissing,
  "cluster-hosts status --json on a terminal has no colour",
  async () => {
    await using two = await startTwo();
    const line = "cluster-hosts status --json --timeout 1s -c";

    const { text } = await onTerminal(`${line} ${two.path}`, {
      columns: 80,
      rows: 24,
    });

    assert(!text.includes("\x1b[3"), text);
  },
);

testUnless(
  scriptMissing,
  "cluster-hosts status writes no escape where TERM is dumb",
  async () => {
    await using two = await startTwo();
    const granted = CLI.replace("-P=cli", "-P=cli --allow-env=TERM");
    const command = `${granted} status --timeout 1s --config ${two.path}`;
    const size = { columns: 80, rows: 24 };

    const { code, text } = await onTerminal(command, size, { TERM: "dumb" });

    assertEquals([code, text.includes("\x1b")], [1, false], text);
  },
);

testUnless(
  scriptMissing,
  "cluster-hosts status --watch on a terminal returns 130 at Ctrl-C, and leaves it as it was",
  async () => {
    await using node = await startNode("ok");
    await using inventory = await writeInventory({ a: hostAt(node) });
    const line = `${CLI} status --watch --interval 200ms -c ${inventory.path}`;
    const inner = `stty rows 10 cols 70; exec ${line}`;

    const child = new Deno.Command("sh", {
      args: ["-c", 'exec script -qec "$0" /dev/null', inner],
      env: { TERM: "xterm", NO_COLOR: "" },
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
      signal: AbortSignal.timeout(50_000),
    }).spawn();
    const keyboard = child.stdin.getWriter();

    let screen = "";
    let isPressed = false;
    for await (
      const text of child.stdout.pipeThrough(new TextDecoderStream())
    ) {
      screen += text;
      const isDrawn = /\x1b\[H.* 1 of 1 nodes up[\s\S]* up[\s\S]*\x1b\[J/.test(
        screen,
      );
      if (isPressed || !isDrawn) continue;

      isPressed = true;
      // What the keys Ctrl and C write: the terminal makes a SIGINT of it.
      await keyboard.write(new Uint8Array([3]));
    }
    await keyboard.close().catch(() => {});

    assertEquals([isPressed, (await child.status).code], [true, 130], screen);
    const end = screen.replaceAll("\r", "").slice(-10);
    assertMatch(end, /\x1b\[\?7h(\^C)?\n$/);
  },
);

testUnless(
  scriptMissing,
  "cluster-hosts ssh without run permission names its flag, and never asks",
  async () => {
    await using inventory = await writeInventory({
      a: { tailscale_ip: "127.0.0.2" },
    });
    const program = CLI.replace("--no-prompt ", "").replace("-P=cli", "-R");
    const line = `${program} ssh a --config ${inventory.path}`;

    const command = `exec timeout 20 script -qec '${line}' /dev/null`;
    const { code, stdout } = await run("sh", ["-c", command]);

    const message =
      "cluster-hosts: Requires run access to ssh (on the PATH): " +
      "run again with --allow-run=ssh\n";
    assertEquals([code, stdout.replaceAll("\r", "")], [2, message]);
  },
);
