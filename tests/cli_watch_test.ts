import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { hostAt, type Hosts } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import {
  denoRun,
  type InventoryFile,
  nextLine,
  start,
  writeInventory,
} from "./process.ts";
import { type MainOptions, type RunningMain, startMain } from "./run_main.ts";

const TIME = String.raw`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`;

/** Replaces the inventory at once, as editors do: half of a file would be a broken edit. */
async function replace(
  inventory: InventoryFile,
  text: string,
): Promise<void> {
  await Deno.writeTextFile(`${inventory.folder}/new`, text);
  await Deno.rename(`${inventory.folder}/new`, inventory.path);
}

function inventoryText(hosts: Hosts): string {
  return JSON.stringify({ hosts });
}

function startWatch(
  inventory: InventoryFile,
  words: readonly string[] = [],
  options: MainOptions = {},
): RunningMain {
  const args = ["status", "--watch", "--interval", "50ms", ...words];
  return startMain([...args, "--config", inventory.path], options);
}

/** Resolves when the watch has printed these changes. */
function untilPrinted(
  watch: RunningMain,
  ...changes: readonly string[]
): Promise<void> {
  return watch.until(({ stdout }) =>
    changes.every((change) => stdout.includes(` ${change}\n`))
  );
}

async function endWatch(watch: RunningMain) {
  watch.kill("SIGINT");
  const result = await watch.ended;
  assertEquals(result.code, 130);
  return result;
}

const REFUSED = "(refused: nothing listens on the port)";

Deno.test("cluster-hosts status --watch prints changes alone to a pipe", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
  });

  await using watch = startWatch(inventory);
  await untilPrinted(watch, "a: up", `b: down ${REFUSED}`);
  await using _late = await startNode("ok", { port: dead.port });
  await untilPrinted(watch, "b: down -> up");
  const { stdout, stderr } = await endWatch(watch);

  const lines = stdout.trimEnd().split("\n");
  assertEquals([lines.length, stderr], [3, ""], stdout);
  for (const line of lines) assertMatch(line, new RegExp(`^${TIME} [ab]: `));
});

Deno.test("cluster-hosts status --watch follows the inventory: new, removed, and inactive nodes", async () => {
  await using node = await startNode("ok");
  const up = hostAt(node);
  await using inventory = await writeInventory({ a: up, b: up, c: up });

  await using watch = startWatch(inventory);
  await untilPrinted(watch, "a: up", "b: up", "c: up");
  const retired = { ...up, status: "retired" };
  await replace(inventory, inventoryText({ b: up, c: retired, d: up }));
  await untilPrinted(watch, "a: up -> removed", "c: up -> inactive", "d: up");

  const { stdout, stderr } = await endWatch(watch);
  assertEquals(stderr, "");
  assertEquals(stdout.match(/ b: /g)?.length, 1);
});

Deno.test("cluster-hosts status --watch follows the order of edits: a node that comes back is new", async () => {
  await using node = await startNode("ok");
  const up = hostAt(node);
  await using inventory = await writeInventory({ a: up, b: up });

  await using watch = startWatch(inventory, ["a", "b"]);
  await untilPrinted(watch, "a: up", "b: up");
  await replace(inventory, inventoryText({ b: up }));
  await untilPrinted(watch, "a: up -> removed");
  // No pattern matches any more.
  await replace(inventory, inventoryText({ x: up }));
  await untilPrinted(watch, "b: up -> removed");
  await replace(inventory, inventoryText({ a: up, b: up }));
  await watch.until(({ stdout }) =>
    stdout.split(" a: up\n").length === 3 &&
    stdout.split(" b: up\n").length === 3
  );

  await endWatch(watch);
});

/** What an inventory may be for a moment, and what is said of it. */
const UNSOUND: readonly (readonly [
  name: string,
  text: string | undefined,
  message: RegExp,
])[] = [
  ["empty", "", /hosts\.yaml has no hosts; the last valid inventory stays/],
  ["blank", "\n\n", /hosts\.yaml has no hosts; the last valid inventory stays/],
  [
    "without hosts",
    "hosts: {}\n",
    /hosts\.yaml has no hosts; the last valid inventory stays/,
  ],
  [
    "broken",
    "hosts:\n  a:\n    ssh_port: 99999\n",
    /hosts\.yaml:3: hosts\.a\.ssh_port: .*; the last valid inventory stays/,
  ],
  [
    "half written",
    '{"hosts": {"a": {"tail',
    /hosts\.yaml:\d+:\d+: is not valid YAML: .*; the last valid /,
  ],
  [
    "gone",
    undefined,
    /hosts\.yaml: there is no such file; the last valid inventory stays/,
  ],
];

for (const [name, text, message] of UNSOUND) {
  Deno.test(`cluster-hosts status --watch keeps its nodes while the inventory is ${name}, and says so once`, async () => {
    await using node = await startNode("ok");
    await using dead = await startNode("refuses");
    const hosts = { a: hostAt(node), b: hostAt(dead) };
    await using inventory = await writeInventory(hosts);

    await using watch = startWatch(inventory);
    await untilPrinted(watch, "a: up", `b: down ${REFUSED}`);
    if (text === undefined) await Deno.remove(inventory.path);
    else await replace(inventory, text);
    await watch.until(({ stderr }) => stderr !== "");
    assertMatch(watch.stderr, message);

    // It still watches them.
    await using _late = await startNode("ok", { port: dead.port });
    await untilPrinted(watch, "b: down -> up");
    const next = { ...hosts, c: hostAt(node) };
    await replace(inventory, inventoryText(next));
    await untilPrinted(watch, "c: up");

    const { stdout, stderr } = await endWatch(watch);
    assert(!stdout.includes("removed"), stdout);
    assertEquals(stderr.split("\n").length, 2, stderr);
  });
}

Deno.test("cluster-hosts status --watch -c - watches what was read once", async () => {
  await using node = await startNode("ok");
  const stdin = inventoryText({ a: hostAt(node) });
  const args = ["status", "--watch", "--interval", "50ms", "-c", "-"];

  await using watch = startMain(args, { stdin });
  await untilPrinted(watch, "a: up");
  const before = node.connections;
  while (node.connections < before + 3) await delay(20);

  const { stdout, stderr } = await endWatch(watch);
  assertEquals([stdout.split("\n").length, stderr], [2, ""]);
});

Deno.test("cluster-hosts status --watch keeps its nodes where a second reading gives nothing, as with <(cat file)", async () => {
  await using node = await startNode("ok");
  const text = inventoryText({ a: hostAt(node) });
  const cli = ["exec deno", ...denoRun(["-P=cli"], "cli.ts")].join(" ");
  const line = `${cli} status --watch --interval 100ms -c /dev/fd/3`;

  // A here-document of this size is a pipe.
  const script = `${line} 3<<'END'\n${text}\nEND\n`;
  await using watch = start("sh", ["-c", script]);
  assertMatch(await nextLine(watch.stdout), / a: up$/);
  const said = await nextLine(watch.stderr);
  assertMatch(
    said,
    /\/dev\/fd\/3 has no hosts; the last valid inventory stays/,
  );
  const before = node.connections;
  while (node.connections < before + 3) await delay(20);
  watch.process.kill("SIGINT");

  const { code, stdout, stderr } = await watch.end();
  assertEquals([code, stdout, stderr], [130, [], []]);
});

Deno.test("cluster-hosts status --watch reports a node that changes beside one that hangs", async () => {
  await using dead = await startNode("refuses");
  await using silent = await startNode("silent");
  await using inventory = await writeInventory({
    a: hostAt(silent),
    b: hostAt(dead),
  });

  await using watch = startWatch(inventory, ["-t", "60"]);
  await untilPrinted(watch, `b: down ${REFUSED}`);
  await using _up = await startNode("ok", { port: dead.port });
  await untilPrinted(watch, "b: down -> up");

  const { stdout } = await endWatch(watch);
  assert(!stdout.includes(" a: "), stdout);
});

Deno.test("cluster-hosts status --watch --only prints the changes to and from these states", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    a: hostAt(up),
    b: hostAt(dead),
  });

  await using watch = startWatch(inventory, ["--only", "down"]);
  await untilPrinted(watch, `b: down ${REFUSED}`);
  await using _late = await startNode("ok", { port: dead.port });
  await untilPrinted(watch, "b: down -> up");

  const { stdout } = await endWatch(watch);
  assert(!stdout.includes(" a: "), stdout);
});

for (
  const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143], [
    "SIGHUP",
    129,
  ]] as const
) {
  Deno.test(`cluster-hosts status --watch returns ${code} at ${signal}`, async () => {
    await using node = await startNode("ok");
    await using inventory = await writeInventory({ a: hostAt(node) });

    await using watch = startWatch(inventory);
    await untilPrinted(watch, "a: up");
    watch.kill(signal);

    assertEquals((await watch.ended).code, code);
  });
}

// --- On a terminal ---

/** Returns the last picture that the watch has drawn. */
function lastFrame(stdout: string): string {
  return stdout.split("\x1b[H").at(-1)!;
}

const EDITS: readonly (readonly [text: string, said: RegExp])[] = [
  ["hosts: 5\n", /hosts\.yaml:1: hosts: expected/],
  ["", /hosts\.yaml has no hosts/],
];

for (const [text, said] of EDITS) {
  Deno.test(`cluster-hosts status --watch on a terminal shows an edit to ${JSON.stringify(text)}, and removes it again`, async () => {
    await using up = await startNode("ok");
    await using inventory = await writeInventory({ a: hostAt(up) });
    const terminal = { columns: 120, rows: 10 };

    await using watch = startWatch(inventory, [], terminal);
    await watch.until(({ stdout }) => / up +1\.4\.2 +12/.test(stdout));
    await replace(inventory, text);
    await watch.until(({ stdout }) => said.test(lastFrame(stdout)));
    assertMatch(lastFrame(watch.stdout), /\ba +.* up /);

    await replace(inventory, inventoryText({ b: hostAt(up) }));
    await watch.until(({ stdout }) => {
      const frame = lastFrame(stdout);
      return !said.test(frame) && /\bb +.* up /.test(frame);
    });

    const { stdout, stderr } = await endWatch(watch);
    assertEquals([stderr, stdout.at(-1)], ["", "\n"]);
  });
}

Deno.test("cluster-hosts status --watch --show on a terminal has these keys as columns", async () => {
  let matches = 5;
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => Response.json({ matches, queue: { length: 3 } }),
  );
  await using inventory = await writeInventory({ a: hostAt(server.addr) });
  const terminal = { columns: 120, rows: 10 };

  const words = ["--show", "matches,queue.length"];
  await using watch = startWatch(inventory, words, terminal);
  await watch.until(({ stdout }) => / up +5 +3\b/.test(lastFrame(stdout)));
  matches = 6;
  await watch.until(({ stdout }) => / up +6 +3\b/.test(lastFrame(stdout)));

  const { stdout } = await endWatch(watch);
  assertMatch(lastFrame(stdout), / STATE +MATCHES +QUEUE\.LENGTH\b/);
});

const SIZES = [[80, 24], [40, 10], [200, 5]] as const;

for (const [columns, rows] of SIZES) {
  Deno.test(`cluster-hosts status --watch draws within a terminal of ${columns}x${rows}, problems in sight`, async () => {
    await using up = await startNode("ok");
    await using dead = await startNode("refuses");
    const hosts = Array.from({ length: 300 }, (_, index) => {
      return [`gpu-${index}`, hostAt(index === 281 ? dead : up)];
    });
    await using inventory = await writeInventory(Object.fromEntries(hosts));
    const args = ["status", "--watch", "-c", inventory.path];

    await using watch = startMain(args, { columns, rows });
    await watch.until(({ stdout }) => stdout.includes("299 of 300 nodes up"));
    const { stdout } = await endWatch(watch);

    const frames = stdout.split("\x1b[?7l\x1b[H").slice(1);
    for (const frame of frames) {
      assert(!frame.includes("\x1b[2J"), "The screen is cleared: it flickers");
      const lines = frame.split("\x1b[J")[0]!.split("\n");
      // The cursor stands in the last one.
      assert(lines.length <= rows, frame);
      for (const line of lines.slice(0, -1)) {
        assert(line.endsWith("\x1b[K"), frame);
        assert(line.length - "\x1b[K".length < columns, line);
      }
    }

    const last = frames.at(-1)!.split("\n");
    assertMatch(last[0]!, /^\d\d:\d\d:\d\d {2}299 of 300 nodes up/);
    assertMatch(last[1]!, /^every 5s, Ctrl-C ends/);
    assertMatch(
      last[3]!,
      /^( +\ds {2})?gpu-281 .* down +ref|^… 300 more: 1 down/,
    );
  });
}

Deno.test("cluster-hosts status --watch keeps the inventory's order within a state", async () => {
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    late: hostAt(silent),
    b: hostAt(dead),
    a: hostAt(dead),
    later: hostAt(silent),
  });

  await using watch = startWatch(inventory, ["-t", "300ms"], { columns: 80 });
  await watch.until(({ stdout }) =>
    stdout.includes("2 down (2 refused), 2 unhealthy")
  );

  const { stdout } = await endWatch(watch);
  const rows = lastFrame(stdout).match(
    /\b(a|b|late|later)(?= .*(down|unhea))/g,
  );
  assertEquals(rows?.join(" "), "b a late later");
});

Deno.test("cluster-hosts status --watch on a terminal without a cursor prints changes, as to a pipe", async () => {
  await using node = await startNode("ok");
  await using inventory = await writeInventory({ a: hostAt(node) });
  const terminal = { columns: 80, isErrTerminal: true, isDumb: true };

  await using watch = startWatch(inventory, [], terminal);
  await untilPrinted(watch, "a: up");

  const { stdout } = await endWatch(watch);
  assert(!stdout.includes("\x1b"), stdout);
});
