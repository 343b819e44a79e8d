// deno-lint-ignore-file no-control-regex
import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { send, startNode } from "./loopback_cluster.ts";
import { type MainOptions, type MainResult, runMain, startMain } from "./run_main.ts";
import { writeInventory } from "./process.ts";

/** Nodes whose names are as wide as they look: 漢字 is four columns, 🚀 two, é one. */
const WIDTHS: Readonly<Record<string, number>> = { "漢字-1": 6, "🚀gpu-2": 7, "cafe\u0301": 4, "👩‍💻": 2, plain: 5 };

async function startMixed() {
  await using stack = new AsyncDisposableStack();
  const [up, dead, sick] = await Promise.all((["ok", "refuses", "http-500"] as const).map((it) => startNode(it)));
  const at = ({ port }: { port: number }, fields = {}) => ({
    tailscale_ip: "127.0.0.1",
    data_server_port: port,
    status: "active",
    role: "worker",
    ...fields,
  });
  for (const node of [up!, dead!, sick!]) stack.use(node);
  const inventory = stack.use(
    await writeInventory({
      "漢字-1": at(up!, { gpu: "RTX 5090" }),
      "🚀gpu-2": at(dead!, { gpu: "H100", reason: "" }),
      "cafe\u0301": at(sick!),
      "👩‍💻": at(up!),
      plain: {},
      gone: at(dead!, { status: "retired", reason: "sold in 2024, its disks are in the archive" }),
    }),
  );
  const held = stack.move();
  const ports = new RegExp(`\\b(${[up!, dead!, sick!].map(({ port }) => port).join("|")})\\b`, "g");
  return {
    path: inventory.path,
    /** What differs from run to run, at its width. */
    stable: (text: string) =>
      text.replaceAll(inventory.path, "hosts.yaml").replace(ports, "18760").replace(/\d+\.\d\d s/g, "N s")
        .replace(/ *(\d+(\.\d)?) ms/g, (it) => "N ms".padStart(it.length)),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

const SNAPSHOTS: readonly (readonly [args: string, columns: number, text: string])[] = [
  [
    "status",
    40,
    `
NAME     STATE      REASON
🚀gpu-2  down       refused: nothing li…
plain    down       no-address: set tai…
café     unhealthy  http-status: HTTP 5…
漢字-1   up
👩‍💻       up

2 of 5 nodes up, 2 down (1 refused, 1
no-address), 1 unhealthy (1 http-status)
in N s,
hosts.yaml
`,
  ],
  [
    "status --gather",
    40,
    `
NODES  STATE      REASON        NAMES
    1  down       refused: no…  🚀gpu-2
    1  down       no-address:…  plain
    1  unhealthy  http-status…  café
    2  up         -             漢字-1,…

2 of 5 nodes up, 2 down (1 refused, 1
no-address), 1 unhealthy (1 http-status)
in N s,
hosts.yaml
`,
  ],
  [
    "nodes --all",
    40,
    `
NAME     STATUS   REASON
漢字-1   active
🚀gpu-2  active
café     active
👩‍💻       active
plain    unknown
gone     retired  sold in 2024, its dis…

6 of 6 nodes,
hosts.yaml
`,
  ],
  [
    "status",
    80,
    `
NAME     ADDRESS          LATENCY  STATE      REASON
🚀gpu-2  127.0.0.1:18760        -  down       refused: nothing listens on the p…
plain    -                      -  down       no-address: set tailscale_ip or s…
café     127.0.0.1:18760        -  unhealthy  http-status: HTTP 500
漢字-1   127.0.0.1:18760     N ms  up
👩‍💻       127.0.0.1:18760     N ms  up

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status)
in N s, hosts.yaml
`,
  ],
  [
    "status --gather",
    80,
    `
NODES  STATE      REASON                                    NAMES
    1  down       refused: nothing listens on the port      🚀gpu-2
    1  down       no-address: set tailscale_ip or ssh_host  plain
    1  unhealthy  http-status: HTTP 500                     café
    2  up         -                                         漢字-1,👩‍💻

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status)
in N s, hosts.yaml
`,
  ],
  [
    "nodes --all",
    80,
    `
NAME     ROLE     STATUS   GPU       ADDRESSES  REASON
漢字-1   worker   active   RTX 5090  127.0.0.1
🚀gpu-2  worker   active   H100      127.0.0.1
café     worker   active   -         127.0.0.1
👩‍💻       worker   active   -         127.0.0.1
plain    unknown  unknown  -         -
gone     worker   retired  -         127.0.0.1  sold in 2024, its disks are in …

6 of 6 nodes, hosts.yaml
`,
  ],
  [
    "status",
    120,
    `
NAME     ROLE     GPU       ADDRESS          LATENCY  STATE      VERSION  GAMES  REASON
🚀gpu-2  worker   H100      127.0.0.1:18760        -  down       -            -  refused: nothing listens on the port
plain    unknown  -         -                      -  down       -            -  no-address: set tailscale_ip or ssh_ho…
café     worker   -         127.0.0.1:18760        -  unhealthy  -            -  http-status: HTTP 500
漢字-1   worker   RTX 5090  127.0.0.1:18760     N ms  up         1.4.2       12
👩‍💻       worker   -         127.0.0.1:18760     N ms  up         1.4.2       12

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status) in N s,
hosts.yaml
`,
  ],
  [
    "status --gather",
    120,
    `
NODES  STATE      REASON                                    NAMES
    1  down       refused: nothing listens on the port      🚀gpu-2
    1  down       no-address: set tailscale_ip or ssh_host  plain
    1  unhealthy  http-status: HTTP 500                     café
    2  up         -                                         漢字-1,👩‍💻

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status) in N s,
hosts.yaml
`,
  ],
  [
    "nodes --all",
    120,
    `
NAME     ROLE     STATUS   GPU       MEMORY  CPUS  ADDRESSES  DATA   SSH        REASON
漢字-1   worker   active   RTX 5090       -     -  127.0.0.1  18760  ubuntu:22
🚀gpu-2  worker   active   H100           -     -  127.0.0.1  18760  ubuntu:22
café     worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
👩‍💻       worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
plain    unknown  unknown  -              -     -  -          8766   ubuntu:22
gone     worker   retired  -              -     -  127.0.0.1  18760  ubuntu:22  sold in 2024, its disks are in the arch…

6 of 6 nodes, hosts.yaml
`,
  ],
  [
    "status",
    0,
    `
NAME     ROLE     GPU       ADDRESS          LATENCY  STATE      VERSION  GAMES  REASON
🚀gpu-2  worker   H100      127.0.0.1:18760        -  down       -            -  refused: nothing listens on the port
plain    unknown  -         -                      -  down       -            -  no-address: set tailscale_ip or ssh_host
café     worker   -         127.0.0.1:18760        -  unhealthy  -            -  http-status: HTTP 500
漢字-1   worker   RTX 5090  127.0.0.1:18760     N ms  up         1.4.2       12
👩‍💻       worker   -         127.0.0.1:18760     N ms  up         1.4.2       12

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status) in N s, hosts.yaml
`,
  ],
  [
    "status --gather",
    0,
    `
NODES  STATE      REASON                                    NAMES
    1  down       refused: nothing listens on the port      🚀gpu-2
    1  down       no-address: set tailscale_ip or ssh_host  plain
    1  unhealthy  http-status: HTTP 500                     café
    2  up         -                                         漢字-1,👩‍💻

2 of 5 nodes up, 2 down (1 refused, 1 no-address), 1 unhealthy (1 http-status) in N s, hosts.yaml
`,
  ],
  [
    "nodes --all",
    0,
    `
NAME     ROLE     STATUS   GPU       MEMORY  CPUS  ADDRESSES  DATA   SSH        REASON
漢字-1   worker   active   RTX 5090       -     -  127.0.0.1  18760  ubuntu:22
🚀gpu-2  worker   active   H100           -     -  127.0.0.1  18760  ubuntu:22
café     worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
👩‍💻       worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
plain    unknown  unknown  -              -     -  -          8766   ubuntu:22
gone     worker   retired  -              -     -  127.0.0.1  18760  ubuntu:22  sold in 2024, its disks are in the archive

6 of 6 nodes, hosts.yaml
`,
  ],
  [
    "validate",
    80,
    `
hosts.yaml:24: hosts.👩‍💻: warning: has the same addresses and ports as 漢字-1
hosts.yaml:30: hosts.plain: warning: has no address: set tailscale_ip or ssh_host
no problems, 2 warnings, hosts.yaml
`,
  ],
];

Deno.test("main() draws its tables as they were looked at, at 40, 80 and 120 columns and in a pipe", async () => {
  await using cluster = await startMixed();
  for (const [args, columns, text] of SNAPSHOTS) {
    const { stdout } = await runMain([...args.split(" "), "-c", cluster.path], columns ? { columns } : {});
    assertEquals(`\n${cluster.stable(stdout)}`, text, `${args} at ${columns}`);
  }
  // What has no columns is the same everywhere.
  for (const options of [{ columns: 40 }, { columns: 80 }, { columns: 120 }, {}]) {
    const args = ["wait", "-c", cluster.path, "--timeout", "300ms", "--interval", "100ms"];
    const { stdout, stderr } = await runMain(args, options);
    assertEquals(cluster.stable(stdout).split("\n").toSorted(), ["", "漢字-1 up after N s", "👩‍💻 up after N s"]);
    assertEquals(cluster.stable(stderr).split("\n"), [
      "cluster-hosts: 2 of 5 nodes up after N s, hosts.yaml",
      "cluster-hosts: Still missing after N s: 🚀gpu-2 (refused), cafe\u0301 (http-status), plain (no-address)",
      "",
    ]);
    const validated = await runMain(["validate", "-c", cluster.path], options);
    assertEquals(validated, await runMain(["validate", "-c", cluster.path], { columns: 80 }));
  }
});

/** The columns that a text takes, by the names alone that are not plain. */
function widthOf(text: string): number {
  const plain = Object.entries(WIDTHS).reduce((all, [name, width]) => all.replaceAll(name, "x".repeat(width)), text);
  return plain.length;
}

Deno.test("main() keeps each row of a table within one line, from 40 columns on, and drops columns in one order", async () => {
  await using cluster = await startMixed();
  const order = ["GAMES", "VERSION", "GPU", "ROLE", "ADDRESS", "LATENCY"];
  let dropped = order.length;
  for (let columns = 40; columns <= 140; columns++) {
    const { stdout } = await runMain(["status", "-c", cluster.path], { columns });
    const [header = "", ...rows] = stdout.split("\n\n")[0]!.split("\n");
    for (const line of [header, ...rows]) assert(widthOf(line) <= columns, `${columns}: ${line}`);
    assertEquals(rows.length, 5);
    for (const title of ["NAME", "STATE", "REASON"]) assertStringIncludes(header, title);
    const missing = order.filter((title) => !header.includes(title));
    assertEquals(missing, order.slice(0, missing.length));
    assert(missing.length <= dropped, `${columns} columns drop more than ${columns - 1}`);
    dropped = missing.length;
    // The states stand one below the other, as a terminal shows them.
    const states = rows.map((row) => widthOf(row.slice(0, row.search(/ (up|down|unhealthy)( |$)/))));
    assertEquals(new Set(states), new Set([header.indexOf("STATE") - 1]), stdout);
  }
  assertEquals(dropped, 0);
});

Deno.test("main() shows the one node of 300 that is down first, and in sight of a watch at 80x24", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const hosts = Object.fromEntries(Array.from({ length: 300 }, (_, index) => [`gpu-${index}`, {
    tailscale_ip: "127.0.0.1",
    data_server_port: index === 281 ? dead.port : up.port,
  }]));
  await using inventory = await writeInventory(hosts);
  const args = ["status", "-c", inventory.path];
  const { code, stdout } = await runMain(args, { columns: 80 });
  assertEquals(code, 1);
  assertMatch(stdout.split("\n")[1]!, /^gpu-281 .* down +refused: /);
  assertMatch(stdout, /\n299 of 300 nodes up, 1 down \(1 refused\) in /);
  const gathered = await runMain([...args, "--gather"], { columns: 80 });
  assertEquals(gathered.stdout.split("\n").slice(1, 3).map((line) => line.replace(/ {2,}/g, "  ")), [
    "  1  down  refused: nothing listens on the port  gpu-281",
    "  299  up  -  gpu-[0-280,282-299]",
  ]);

  for (const [columns, rows] of [[80, 24], [40, 10], [200, 5]] as const) {
    const watch = startMain([...args, "--watch"], { columns, rows });
    await watch.until(({ stdout }) => stdout.includes("299 of 300 nodes up"));
    watch.kill("SIGINT");
    assertEquals((await watch.ended).code, 130);
    const frames = watch.stdout.split("\x1b[?7l\x1b[H");
    for (const frame of frames.slice(1)) {
      assert(!frame.includes("\x1b[2J"), "The screen is cleared, which flickers");
      const lines = frame.split("\x1b[J")[0]!.split("\n");
      // The cursor stands in the last one.
      assert(lines.length <= rows, frame);
      for (const line of lines.slice(0, -1)) {
        assert(line.endsWith("\x1b[K"), frame);
        assert(line.length - 3 < columns, line);
      }
    }
    const lines = frames.at(-1)!.split("\n");
    assertMatch(lines[0]!, /^\d\d:\d\d:\d\d {2}299 of 300 nodes up/);
    assertMatch(lines[1]!, /^every 5s, Ctrl-C ends/);
    assertMatch(lines[3]!, /^( +\ds {2})?gpu-281 .* down +ref|^… 300 more: 1 down, 299 up/);
    assertMatch(frames.at(-1)!, /… \d+ more: (1 down, )?\d+ up\x1b\[K\n\x1b\[J\x1b\[\?7h/);
  }
});

Deno.test("main() gives a terminal colours and progress, a pipe neither", async () => {
  await using cluster = await startMixed();
  const all: MainOptions = { columns: 200, isErrTerminal: true, hasColour: true };
  const run = (args: readonly string[], options: MainOptions = all) => runMain([...args, "-c", cluster.path], options);
  const shown = await run(["status"]);
  // From the start on, and gone at the end.
  assertMatch(shown.stderr, /^\rchecked 0\/5, 0s\x1b\[K(\rchecked \d\/5, 0s\x1b\[K)*\r\x1b\[K$/);
  assertStringIncludes(shown.stdout, "\x1b[1mNAME\x1b[0m");
  for (const [colour, state] of [[32, "up"], [33, "unhealthy"], [31, "down"]]) {
    assertStringIncludes(shown.stdout, `\x1b[${colour}m${state}\x1b[0m`);
  }
  assertStringIncludes((await run(["nodes", "--all"])).stdout, "\x1b[2mretired\x1b[0m");
  const wait = await run(["wait", "-t", "300ms", "--interval", "100ms"]);
  assertMatch(wait.stderr, /^\rwaiting, 0s, for .*\(no answer yet\)\x1b\[K/);
  assertMatch(wait.stderr, /\rwaiting, 0s, for [^\r]*🚀gpu-2 \(refused\)[^\r]*\x1b\[K/);

  for (const options of [{}, { ...all, hasColour: false }, { ...all, isDumb: true }]) {
    assert(!(await run(["status"], options)).stdout.includes("\x1b"), JSON.stringify(options));
  }
  assertEquals((await run(["status"], { ...all, isDumb: true })).stderr, "");
  assertEquals((await run(["status", "--quiet"])).stderr, "");
  assert(!(await run(["status", "--json"])).stdout.includes("\x1b"));
  // A terminal that cannot move its cursor gets the changes, as a pipe does.
  const dumb = startMain(["status", "--watch", "-c", cluster.path], { ...all, isDumb: true });
  await dumb.until(({ stdout }) => stdout.includes(" plain: down (no-address: "));
  dumb.kill("SIGTERM");
  assertEquals((await dumb.ended).code, 143);
  assert(!dumb.stdout.includes("\x1b"));
});

Deno.test("main() keeps the inventory's order within a state, on a screen too", async () => {
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");
  const at = ({ port }: { port: number }) => ({ tailscale_ip: "127.0.0.1", data_server_port: port });
  await using inventory = await writeInventory({ late: at(silent), b: at(dead), a: at(dead), later: at(silent) });
  const args = ["status", "-c", inventory.path, "-t", "300ms"];
  const order = (text: string) => text.match(/\b(a|b|late|later)(?= .*(down|unhealthy))/g)?.join(" ");
  assertEquals(order((await runMain(args, { columns: 80 })).stdout), "b a late later");
  const watch = startMain([...args, "--watch"], { columns: 80 });
  await watch.until(({ stdout }) => stdout.includes("2 down (2 refused), 2 unhealthy"));
  watch.kill("SIGINT");
  assertEquals((await watch.ended).code, 130);
  assertEquals(order(watch.stdout.split("\x1b[H").at(-1)!), "b a late later");
});

/** A colour, a window title, the same from C1, a way back over the line, and bidirectional controls. */
const CONTROLS = "\x1b[31m\x1b]0;owned\x07\x9b2J\x9d0;t\x9c\r\u202e\u2066\u200f\u061c\x00\x7f";
/** What an inventory may hold of it, which refuses the other ones. */
const BIDI = "\u202ereversed\u202c\u2066\u200e";

function assertHarmless({ stdout, stderr }: MainResult, what: string) {
  const text = stdout + stderr;
  const found = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/.exec(text);
  if (found) throw new Error(`${what}: ${JSON.stringify(text.slice(Math.max(0, found.index - 60), found.index + 9))}`);
}

Deno.test("main() escapes what a node answers", async () => {
  await using chatty = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => Response.json({ version: CONTROLS, game_count: CONTROLS, [CONTROLS]: [CONTROLS] }),
  );
  await using redirect = await startNode((conn) => send(conn, `HTTP/1.1 302 Found\r\nLocation: ${CONTROLS}\r\n\r\n`));
  await using banner = await startNode((conn) => send(conn, `SSH-2.0-${CONTROLS}\r\n\r\n`));
  await using statusLine = await startNode((conn) => send(conn, `HTTP/1.1 500 ${CONTROLS}\r\n${CONTROLS}\r\n\r\n`));
  const host = (port: number) => ({ tailscale_ip: "127.0.0.1", data_server_port: port });
  await using inventory = await writeInventory({
    chatty: host(chatty.addr.port),
    redirect: host(redirect.port),
    banner: host(banner.port),
    "status-line": host(statusLine.port),
  });
  for (
    const line of [
      "status",
      "status --json",
      "status --gather",
      "wait --timeout 100ms",
      "wait --timeout 100ms --json",
      "urls data --include-self",
    ]
  ) {
    const args = line.split(" ");
    const result = await runMain([...args, "--config", inventory.path]);
    assertHarmless(result, line);
    assertStringIncludes(result.stdout, args[0] === "urls" ? "http://" : "chatty");
    if (line === "status") assertStringIncludes(result.stdout, String.raw`\u{1b}[31m`);
    if (line !== "status --json") continue;
    assertStringIncludes(result.stdout, String.raw`"version":"\u001b[31m`);
    const { nodes } = JSON.parse(result.stdout);
    assertEquals(nodes[0].status, { version: CONTROLS, game_count: CONTROLS, [CONTROLS]: [CONTROLS] });
    assertEquals(nodes.slice(2).map(({ failure }: { failure: { code: string } }) => failure.code), [
      "bad-response",
      "http-status",
    ]);
  }
});

Deno.test("main() escapes what an inventory holds", async () => {
  await using node = await startNode("ok");
  const name = `gpu-${BIDI}`;
  await using inventory = await writeInventory(
    {
      [name]: {
        tailscale_ip: "127.0.0.1",
        data_server_port: node.port,
        role: BIDI,
        gpu: BIDI,
        status: BIDI,
        reason: BIDI,
        // Keys of the user's own may hold anything.
        note: CONTROLS,
      },
      [`dead-${BIDI}`]: {},
    },
    { elo_sync: { coordinator: BIDI } },
  );
  const lines = [
    "status",
    "status --json",
    "status --names",
    "status --gather",
    "nodes",
    "nodes --names",
    "nodes --json",
    "nodes --role x",
    "urls data --include-self",
    "wait --timeout 100ms",
    "wait --timeout 100ms --json",
    "coordinator",
    "validate",
    "validate --json",
    "export ansible",
    "export prometheus",
    "export ssh-config",
    "status gpu",
    `status gpu-${CONTROLS.replace("\x00", "")}`,
    "permissions status",
    "ssh * --dry-run -- true",
  ];
  for (const line of lines) {
    const [before, behind] = line.split(" -- ");
    const args = [...before!.split(" "), "--config", inventory.path, ...(behind ? ["--", behind] : [])];
    const result = await runMain(args);
    assert(result.stdout + result.stderr !== "", line);
    assertHarmless(result, line);
    if (line.includes("--json") || /ansible|prometheus/.test(line)) JSON.parse(result.stdout);
  }
  const { nodes } = JSON.parse((await runMain(["nodes", "--json", "--config", inventory.path])).stdout);
  assertEquals([nodes[0].name, nodes[0].gpu, nodes[0].role, nodes[0].note], [name, BIDI, BIDI, CONTROLS]);
  const ansible = JSON.parse((await runMain(["export", "ansible", "--config", inventory.path])).stdout);
  assertEquals(ansible._meta.hostvars[name].note, CONTROLS);
});

Deno.test("main() escapes what it says of errors", async () => {
  const text = CONTROLS.replace("\x00", "");
  const yaml = JSON.stringify({
    hosts: {
      [`name${CONTROLS}`]: {},
      a: { ssh_port: CONTROLS, tailscale_ip: CONTROLS, status: CONTROLS, data_server_url: `http://${CONTROLS}` },
    },
  });
  const typo = JSON.stringify({ hosts: { a: { ["tailscale_ip\u202e"]: "x", ["ssh_user\x1b"]: "x" } } });
  const cases: [args: string[], stdin?: string][] = [
    [["nodes", "--config", "-"], yaml],
    [["validate", "--config", "-"], yaml],
    [["validate", "--config", "-", "--json"], yaml],
    [["validate", "--config", "-"], typo],
    [["nodes", "--config", "-"], `hosts: "${text}\n`],
    [["nodes", "--config", "-"], `hosts: !<${text}> x\n`],
    [["nodes", "--config", `/tmp/${text}`]],
    [["nodes", "--config", `http://127.0.0.1:1/${text}`]],
    [[text]],
    [["status", `--${text}`]],
    [["status", `-${text}`]],
    [["status", "--timeout", text]],
    [["export", text]],
    [["urls", text]],
    [["urls", "elo", "--path", text, "-c", "-"], "hosts: { a: { ssh_host: h } }"],
    [["ssh", "a", "-c", "-", "--user", text, "--dry-run", "--", "true"], "hosts: { a: { ssh_host: h } }"],
    [["ssh", "a", "-c", "-", "--dry-run", "--", text], "hosts: { a: { ssh_host: h } }"],
  ];
  for (const [args, stdin] of cases) {
    const result = await runMain(args, stdin === undefined ? {} : { stdin });
    assert(result.stdout + result.stderr !== "", JSON.stringify(args));
    assertHarmless(result, JSON.stringify(args));
  }
});
