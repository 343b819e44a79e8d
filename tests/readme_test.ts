import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { DatabaseSync } from "node:sqlite";
import { validateHostsConfig } from "../mod.ts";
import { registryMissing, serveCheckout } from "./checkout.ts";
import {
  codeBlocks,
  fileIn,
  type Hosts,
  README,
  type UserFolder,
  userFolder,
  writeProgram,
} from "./documents.ts";
import { startNode } from "./loopback_cluster.ts";
import {
  nextLine,
  programMissing,
  ROOT,
  run,
  type RunResult,
  start,
  tempFolder,
  testUnless,
} from "./process.ts";
import { type Sshd, sshdMissing, startSshd } from "./sshd.ts";

const PLACEHOLDER = "https://example.com/cluster-hosts";
const NO_SSHD = sshdMissing();

// --- Scripts ---

const SCRIPTS = [
  "status.ts",
  "uptime.ts",
  "collect.ts",
  "monitor.ts",
  "elo_sync.ts",
];

function scriptOf(name: string): string {
  return fileIn(README, name.endsWith(".sh") ? "sh" : "ts ignore", name);
}

/** Returns the flags with which README runs a script. */
function flagsOf(name: string): string[] {
  const line = new RegExp(`\`deno run ([^\`]*)\\s${name}\``).exec(README);
  if (!line) throw new Error(`README does not run ${name}`);
  return line[1]!.split(/\s+/);
}

/** Runs a script as it stands in README, from a URL, with README's flags. */
async function runScript(name: string, user: UserFolder): Promise<RunResult> {
  await using server = serveCheckout();
  const script = scriptOf(name).replaceAll(PLACEHOLDER, server.url);
  await Deno.writeTextFile(`${user.folder}/${name}`, script);

  const own = ["-q", "--no-prompt", "--no-config", ...server.flags];
  return await run("deno", ["run", ...own, ...flagsOf(name), name], {
    cwd: user.folder,
    env: { NO_COLOR: "1" },
  });
}

Deno.test("README's scripts type-check", async () => {
  await using server = serveCheckout();
  await using temp = await tempFolder();
  for (const name of SCRIPTS) {
    const script = scriptOf(name).replaceAll(PLACEHOLDER, server.url);
    await Deno.writeTextFile(`${temp.folder}/${name}`, script);
  }

  const flags = ["-q", "--no-config", "--allow-import", ...server.flags];
  const { code, stderr } = await run("deno", ["check", ...flags, ...SCRIPTS], {
    cwd: temp.folder,
    env: { NO_COLOR: "1" },
  });

  assertEquals({ code, stderr }, { code: 0, stderr: "" });
});

testUnless(
  await registryMissing(),
  "README's reference is printed from a URL",
  async () => {
    await using server = serveCheckout();
    const [, line] = /`deno (doc \S+)`/.exec(README)!;
    const args = line!.replace(PLACEHOLDER, server.url).split(" ");

    const { code, stdout, stderr } = await run("deno", [
      ...args,
      "-q",
      "--no-config",
      ...server.flags,
    ], { env: { NO_COLOR: "1" } });

    assertEquals(code, 0, stderr);
    assertStringIncludes(stdout, "function discoverReachableNodes(");
  },
);

Deno.test("README's status.ts prints the nodes that answer", async () => {
  await using node = await startNode("ok", { games: 7 });
  await using user = await userFolder({
    "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: node.port },
    "gpu-2": {},
  });

  const { code, stdout, stderr } = await runScript("status.ts", user);

  assertEquals([code, stderr], [0, ""]);
  assertEquals(
    stdout,
    "1 of 2 nodes are reachable\n" +
      "gpu-1 at 127.0.0.1: 7 games, version 1.4.2\n",
  );
});

Deno.test("README's status.ts fails without an inventory", async () => {
  await using user = await userFolder({});
  await Deno.remove(`${user.folder}/config`, { recursive: true });

  const { code, stdout, stderr } = await runScript("status.ts", user);

  assertEquals([code, stdout], [1, ""]);
  assertStringIncludes(stderr, "config/distributed_hosts.yaml");
});

Deno.test("README's collect.ts adds up the games, and names a node that fails", async () => {
  await using good = await startNode("ok", {
    games: 40,
    hostname: "127.0.0.2",
  });
  // The check is answered, and what is asked for after it is not.
  let requests = 0;
  await using failing = Deno.serve(
    { hostname: "127.0.0.3", port: 0, onListen() {} },
    () => {
      requests++;
      if (requests === 1) return Response.json({ game_count: 1000 });
      return new Response("no", { status: 500 });
    },
  );
  const url = `http://127.0.0.3:${failing.addr.port}`;
  await using user = await userFolder({
    "gpu-1": { tailscale_ip: good.hostname, data_server_port: good.port },
    "gpu-2": { data_server_url: url },
  });

  const { code, stdout, stderr } = await runScript("collect.ts", user);

  assertEquals([code, stdout], [0, "40 games in the cluster\n"]);
  assertEquals(stderr, `${url} is left out: Error: HTTP 500\n`);
});

// --- Scripts over ssh ---

/** The fields of a host behind this sshd, with what ssh needs to trust it. */
function hostOf(sshd: Sshd): Hosts[string] {
  return { ...sshd.host, ssh_options: sshd.options };
}

testUnless(
  NO_SSHD,
  "README's uptime.ts prints what the command says on each active node",
  async () => {
    await using sshd = await startSshd();
    await using user = await userFolder({
      "gpu-1": hostOf(sshd),
      "gpu-2": { ...hostOf(sshd), status: "offline" },
      "gpu-3": {},
    });

    const { code, stdout, stderr } = await runScript("uptime.ts", user);

    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, /^gpu-1: .*load average.*\ngpu-3: .*tailscale_ip.*\n$/);
  },
);

/** Runs monitor.ts and returns the lines of each node, by name. */
async function runMonitor(user: UserFolder): Promise<Record<string, string[]>> {
  await Deno.writeTextFile(`${user.folder}/facts.sh`, scriptOf("facts.sh"));

  const { code, stdout, stderr } = await runScript("monitor.ts", user);

  assertEquals(code, 0, stderr);
  const reports = stdout.trimEnd().split(/\n(?! )/);
  return Object.fromEntries(reports.map((report) => {
    const lines = report.split("\n").map((line) => line.trim());
    return [lines[0]!.split(":")[0]!, lines];
  }));
}

testUnless(
  NO_SSHD,
  "README's monitor.ts prints the state, the load and what a node lacks",
  async () => {
    await using sshd = await startSshd();
    await using node = await startNode("ok");
    const host = { ...hostOf(sshd), data_server_port: node.port };
    const cpus = navigator.hardwareConcurrency;
    const memory_gb = Math.floor(Deno.systemMemoryInfo().total / 2 ** 30);
    await using user = await userFolder({
      same: { ...host, cpus, memory_gb, ringrift_path: "/" },
      more: { ...host, cpus: cpus + 1, memory_gb: 2 * memory_gb + 2 },
      unreached: { data_server_url: `http://127.0.0.1:${node.port}` },
    });

    const { same, more, unreached } = await runMonitor(user);

    const busy = `load [\\d.]+ on ${cpus} CPUs, \\d+ of \\d+ GB free, disk`;
    assertEquals(same!.length, 2);
    assertEquals(same![0], "same: up");
    assertMatch(same![1]!, new RegExp(`^${busy} \\d+% full$`));
    // Its ringrift_path is not there.
    assertMatch(more![1]!, new RegExp(`^${busy} \\? full$`));
    assertEquals(more!.slice(2), [
      `! not ${cpus + 1} CPUs`,
      `! not ${2 * memory_gb + 2} GB of RAM`,
    ]);
    assertEquals(unreached![0], "unreached: up");
    assertMatch(unreached![1]!, /^! .*tailscale_ip/);
  },
);

/** Why what a test writes to ~/.bashrc would not be read by its sshd's shell. */
function bashMissing(): string | undefined {
  const script = 'getent passwd "$(id -un)" | grep -q "/bash$"';
  const { success } = new Deno.Command("sh", { args: ["-c", script] })
    .outputSync();
  return success ? undefined : "needs bash as the login shell";
}

/** Lets every login find an nvidia-smi that lists these GPUs. */
async function installNvidiaSmi(sshd: Sshd, output: string): Promise<void> {
  // The home of a login: see sshd.ts.
  const home = sshd.keyPath.replace(/\/[^/]*$/, "");
  await Deno.mkdir(`${home}/bin`);
  await Deno.writeTextFile(`${home}/gpus.csv`, output);
  await writeProgram(
    `${home}/bin/nvidia-smi`,
    `#!/bin/sh
[ "$*" = "--query-gpu=name,utilization.gpu,memory.used,memory.total --format=csv,noheader" ] || exit 2
cat ${home}/gpus.csv
`,
  );
  await Deno.writeTextFile(`${home}/.bashrc`, `PATH=${home}/bin:$PATH\n`);
}

const FAILED_SMI =
  "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.";

/** What nvidia-smi calls a GPU, how many there are, and names that it has or lacks. */
const GPUS: [name: string, count: number, has: string[], lacks: string[]][] = [
  [
    "NVIDIA H100 80GB HBM3",
    1,
    ["none", "", "H100", "H100 SXM", "NVIDIA H100 (80GB)", "SXM5 H100"],
    ["A100", "2x H100"],
  ],
  [
    "NVIDIA GeForce RTX 4090",
    8,
    ["8x RTX 4090", "8xRTX4090", "RTX 4090", "4x 4090"],
    ["9x RTX 4090", "8x RTX 3090"],
  ],
  ["NVIDIA GH200 480GB", 1, ["GH200 (96 GB)", "NVIDIA GH200 (96GB)"], ["V100"]],
  ["NVIDIA A100-SXM4-80GB", 2, ["A100 PCIe", "2x A100"], ["A40"]],
];

for (const [name, count, has, lacks] of GPUS) {
  testUnless(
    NO_SSHD ?? bashMissing(),
    `README's monitor.ts accepts other names of ${count}x ${name}`,
    async () => {
      await using sshd = await startSshd();
      const row = `${name}, 98 %, 71234 MiB, 81559 MiB`;
      await installNvidiaSmi(sshd, `${row}\n`.repeat(count));
      const gpus = [...has, ...lacks];
      await using user = await userFolder(Object.fromEntries(
        gpus.map((gpu, index) => [`n${index}`, { ...hostOf(sshd), gpu }]),
      ));

      const reports = await runMonitor(user);

      for (const [index, gpu] of gpus.entries()) {
        const rows = Array<string>(count).fill(row);
        const alarms = lacks.includes(gpu) ? [`! not ${gpu}`] : [];
        assertEquals(reports[`n${index}`]!.slice(2), [...rows, ...alarms], gpu);
      }
    },
  );
}

testUnless(
  NO_SSHD ?? bashMissing(),
  "README's monitor.ts prints what nvidia-smi says when it fails",
  async () => {
    await using sshd = await startSshd();
    await installNvidiaSmi(sshd, `${FAILED_SMI}\n`);
    await using user = await userFolder({
      "gpu-1": { ...hostOf(sshd), gpu: "H100" },
    });

    const reports = await runMonitor(user);

    assertEquals(reports["gpu-1"]!.slice(2), [FAILED_SMI, "! not H100"]);
  },
);

testUnless(
  NO_SSHD,
  "README's facts.sh runs by `ssh --stdin`",
  async () => {
    await using sshd = await startSshd();
    await using user = await userFolder({
      "gpu-1": { ...hostOf(sshd), ringrift_path: "/" },
    });
    await Deno.writeTextFile(`${user.folder}/facts.sh`, scriptOf("facts.sh"));
    const [, line] = /`(cluster-hosts ssh [^`]* < facts\.sh)`/.exec(README)!;

    const { code, stdout, stderr } = await user.shell(line!);

    assertEquals(code, 0, stderr);
    assertMatch(stdout, /"cpus": \d+, "load": "[\d.]+", "ram": \d+/);
    assertMatch(stdout, /"disk": "\d+%", "gpus": /);
  },
);

// --- elo_sync.ts ---

type Game = Record<string, string | number | null>;

/** The schemas of match_history that RingRift's databases have. */
const BY_IDS = `CREATE TABLE match_history (
  id INTEGER PRIMARY KEY AUTOINCREMENT, participant_ids TEXT NOT NULL,
  winner_id TEXT, game_type TEXT, board_type TEXT, num_players INTEGER,
  timestamp REAL NOT NULL)`;
const BY_GAME = `CREATE TABLE match_history (
  id INTEGER PRIMARY KEY AUTOINCREMENT, game_id TEXT, participant_a TEXT,
  participant_b TEXT, participant_ids TEXT, rankings TEXT, winner TEXT,
  board_type TEXT NOT NULL, num_players INTEGER NOT NULL,
  timestamp REAL NOT NULL);
  CREATE UNIQUE INDEX game ON match_history (game_id)
  WHERE game_id IS NOT NULL`;
const BY_TEXT = `CREATE TABLE match_history (
  id TEXT PRIMARY KEY, participant_ids TEXT NOT NULL, winner_id TEXT,
  timestamp TEXT)`;
const BY_PAIR = `CREATE TABLE match_history (
  game_id TEXT, participant_a TEXT, participant_b TEXT, winner TEXT,
  timestamp REAL)`;

/** A game of the first schema. */
function gameByIds(players: string[], timestamp: number): Game {
  return {
    participant_ids: JSON.stringify(players),
    winner_id: players[0]!,
    game_type: "selfplay",
    board_type: "hex8",
    num_players: players.length,
    timestamp,
  };
}

/** A game of the second schema. */
function gameById(
  game_id: string | null,
  players: string[],
  timestamp: number,
): Game {
  return {
    game_id,
    participant_a: players[0]!,
    participant_b: players[1]!,
    participant_ids: JSON.stringify(players),
    rankings: JSON.stringify(players.map((_, index) => index)),
    winner: players[0]!,
    board_type: "hex8",
    num_players: players.length,
    timestamp,
  };
}

function writeDatabase(path: string, schema: string, games: Game[]): void {
  using database = new DatabaseSync(path);
  // As RingRift's services do.
  database.exec("PRAGMA journal_mode = WAL");
  database.exec(schema);
  for (const game of games) {
    const values = Object.keys(game).map(() => "?").join();
    const columns = Object.keys(game).join();
    database.prepare(
      `INSERT INTO match_history (${columns}) VALUES (${values})`,
    )
      .run(...Object.values(game));
  }
}

/** Returns the bytes of a database that a node would serve. */
async function databaseOf(schema: string, games: Game[]) {
  await using temp = await tempFolder();
  const path = `${temp.folder}/elo.db`;
  writeDatabase(path, schema, games);
  return await Deno.readFile(path);
}

/** Nodes that serve databases, and a user who merges them. */
async function startEloCluster(bodies: BodyInit[]) {
  await using stack = new AsyncDisposableStack();
  const hosts: Record<string, { tailscale_ip: string }> = {};
  let port = 0;
  for (const [index, body] of bodies.entries()) {
    const hostname = `127.0.0.${2 + index}`;
    const server = stack.use(Deno.serve(
      { hostname, port, onListen() {} },
      ({ url }) => url.endsWith("/db") ? new Response(body) : Response.json({}),
    ));
    port = server.addr.port;
    hosts[`gpu-${index}`] = { tailscale_ip: hostname };
  }
  const elo_sync = { sync_port: port };
  const user = stack.use(await userFolder(hosts, { elo_sync }));

  const path = `${user.folder}/elo.db`;
  const held = stack.move();
  return {
    path,
    run: () => runScript("elo_sync.ts", user),
    /** Runs elo_sync.ts, and returns what it says of each node. */
    async sync(): Promise<string[]> {
      const { code, stdout, stderr } = await runScript("elo_sync.ts", user);
      assertEquals(code, 0, stderr);
      const lines = (stdout + stderr).trimEnd().split("\n");
      return lines.map((line) => line.replace(/^http:\S+\/db: /, ""));
    },
    /** Returns some columns of the games of elo.db. */
    games(columns: string): unknown[][] {
      using database = new DatabaseSync(path);
      const rows = database.prepare(`SELECT ${columns} FROM match_history`);
      return rows.all().map((row) => Object.values(row));
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

Deno.test("README's elo_sync.ts merges games that no node has numbered alike", async () => {
  const shared = gameByIds(["a", "b"], 1);
  await using cluster = await startEloCluster([
    await databaseOf(BY_IDS, [shared, gameByIds(["a", "c"], 2)]),
    await databaseOf(BY_IDS, [gameByIds(["x", "y", "z"], 3), shared]),
  ]);

  const first = await cluster.sync();
  const second = await cluster.sync();

  assertEquals(first, [
    "this copy is now elo.db",
    "1 of 2 games are new, 0 left out",
  ]);
  assertEquals(second, [
    "0 of 2 games are new, 0 left out",
    "0 of 2 games are new, 0 left out",
  ]);
  assertEquals(cluster.games("participant_ids, winner_id, game_type"), [
    ['["a","b"]', "a", "selfplay"],
    ['["a","c"]', "a", "selfplay"],
    ['["x","y","z"]', "x", "selfplay"],
  ]);
});

Deno.test("README's elo_sync.ts merges a game with an id once, whoever wrote it down", async () => {
  await using cluster = await startEloCluster([
    await databaseOf(BY_GAME, [
      gameById("g1", ["a", "b"], 1),
      gameById(null, ["a", "b"], 2),
    ]),
    await databaseOf(BY_GAME, [
      // Another node's clock is another.
      gameById("g1", ["a", "b"], 1.5),
      gameById(null, ["a", "b"], 2),
      gameById("g2", ["c", "d", "e"], 3),
    ]),
  ]);

  const first = await cluster.sync();
  const second = await cluster.sync();

  assertEquals(first[1], "1 of 3 games are new, 0 left out");
  assertEquals(second[1], "0 of 3 games are new, 0 left out");
  assertEquals(cluster.games("game_id, timestamp, rankings").at(-1), [
    "g2",
    3,
    "[0,1,2]",
  ]);
  assertEquals(cluster.games("game_id").length, 3);
});

Deno.test("README's elo_sync.ts merges games whose id is a text", async () => {
  const game = (id: string, timestamp: string) => ({
    id,
    participant_ids: '["a","b"]',
    winner_id: "a",
    timestamp,
  });
  await using cluster = await startEloCluster([
    await databaseOf(BY_TEXT, [game("u1", "2026-01-01")]),
    await databaseOf(BY_TEXT, [
      game("u1", "2026-01-02"),
      game("u2", "2026-01-03"),
    ]),
  ]);

  const [, merged] = await cluster.sync();

  assertEquals(merged, "1 of 2 games are new, 0 left out");
  assertEquals(cluster.games("id, timestamp"), [
    ["u1", "2026-01-01"],
    ["u2", "2026-01-03"],
  ]);
});

Deno.test("README's elo_sync.ts merges databases of two schemas without losing a player", async () => {
  const paired = { ...gameById("g2", ["a", "b"], 2), participant_ids: null };
  await using cluster = await startEloCluster([
    await databaseOf(BY_IDS, [gameByIds(["a", "b"], 1)]),
    await databaseOf(BY_GAME, [gameById("g1", ["x", "y", "z"], 3), paired]),
    await databaseOf(BY_PAIR, [{
      game_id: "g3",
      participant_a: "a",
      participant_b: "b",
      winner: "a",
      timestamp: 4,
    }]),
  ]);

  const [, byGame, byPair] = await cluster.sync();

  assertEquals(byGame, "1 of 2 games are new, 1 left out");
  // They have only the time in common.
  assertEquals(byPair, "0 of 1 games are new, 1 left out");
  assertEquals(cluster.games("participant_ids, num_players"), [
    ['["a","b"]', 2],
    ['["x","y","z"]', 3],
  ]);
});

const SOUND = await databaseOf(
  BY_IDS,
  Array.from({ length: 2000 }, (_, index) => gameByIds(["a", "b"], index)),
);
const DAMAGED: [what: string, bytes: Uint8Array<ArrayBuffer>][] = [
  ["is cut off", SOUND.slice(0, SOUND.length / 2)],
  ["has other bytes in the middle", overwrite(SOUND, SOUND.length / 2, 8192)],
  ["is no database", new TextEncoder().encode("<h1>Not found</h1>")],
  ["is empty", new Uint8Array()],
  ["has no games", await databaseOf("CREATE TABLE other (a)", [])],
];

function overwrite(bytes: typeof SOUND, start: number, length: number) {
  const copy = bytes.slice();
  copy.fill(0xff, start, start + length);
  return copy;
}

for (const [what, bytes] of DAMAGED) {
  Deno.test(`README's elo_sync.ts changes nothing for a copy that ${what}`, async () => {
    const games = [gameByIds(["a", "b"], -1)];
    await using cluster = await startEloCluster([bytes]);
    writeDatabase(cluster.path, BY_IDS, games);
    const before = await Deno.readFile(cluster.path);

    const [line] = await cluster.sync();

    assertMatch(line!, /^Error: /);
    assertEquals(await Deno.readFile(cluster.path), before);
  });
}

for (const [what, bytes] of DAMAGED.slice(0, 3)) {
  Deno.test(`README's elo_sync.ts asks no node if elo.db ${what}`, async () => {
    await using cluster = await startEloCluster([SOUND]);
    await Deno.writeFile(cluster.path, bytes);

    const { code, stdout } = await cluster.run();

    assertEquals([code, stdout], [1, ""]);
    assertEquals(await Deno.readFile(cluster.path), bytes);
  });
}

Deno.test("README's elo_sync.ts makes no elo.db of a damaged copy", async () => {
  await using cluster = await startEloCluster([DAMAGED[0]![1], SOUND]);

  const lines = await cluster.sync();

  assertEquals(lines[0], "this copy is now elo.db");
  assertMatch(lines[1]!, /^Error: /);
  assertEquals(cluster.games("id").length, 2000);
});

// --- Command lines ---

Deno.test("README's inventory has no problem and no warning", () => {
  const [text] = codeBlocks(README, "yaml");

  const { config, problems, warnings } = validateHostsConfig(text!);

  assertEquals([problems, warnings], [[], []]);
  assertEquals(Object.keys(config!.hosts), ["head", "gpu-1", "gpu-2"]);
});

/** Returns the lines of shell that a reader can type, without comments. */
function shellLines(markdown: string): string[] {
  const blocks = codeBlocks(markdown, "sh");
  const typed = blocks.filter((block) => !block.startsWith("#"));
  const lines = typed.join("").split("\n");
  return lines.map((line) => line.replace(/\s+#.*/, "")).filter(Boolean);
}

/** Copies what a user of a checkout has. */
async function copyCheckout(folder: string): Promise<void> {
  await Deno.mkdir(`${folder}/config`, { recursive: true });
  const names = [
    "mod.ts",
    "cluster_hosts.ts",
    "cli.ts",
    "deno.json",
    "config/distributed_hosts.example.yaml",
  ];
  for (const name of names) {
    await Deno.copyFile(ROOT + name, `${folder}/${name}`);
  }
}

function assertSuccess({ code, stdout, stderr }: RunResult): void {
  assertEquals(code, 0, stdout + stderr);
}

function assertGpuIsUp(result: RunResult): void {
  assertSuccess(result);
  assertMatch(result.stdout, /^gpu-1 .* up /m);
}

const TOOLS_MISSING = programMissing("curl") ?? programMissing("aria2c");

testUnless(
  NO_SSHD ?? TOOLS_MISSING,
  "README's command lines run as written, one after the other",
  async () => {
    await using server = serveCheckout();
    await using sshd = await startSshd();
    const address = "127.0.0.2";
    await using node = await startNode("ok", { games: 3, hostname: address });
    await using user = await userFolder({});
    await Deno.remove(`${user.folder}/config`, { recursive: true });
    await Deno.remove(`${user.folder}/.deno`, { recursive: true });
    const checkout = `${user.folder}/checkout`;
    await copyCheckout(checkout);

    const writeInventory = () => {
      const host = { ...hostOf(sshd), tailscale_ip: address };
      return user.write({ "gpu-1": host }, {
        elo_sync: { coordinator: "gpu-1", sync_port: node.port },
        distributed: { data_server_port: node.port },
      });
    };
    const commandOf = (line: string) => {
      // The line on JSR brings an import map itself; here every one needs it.
      const flags = server.flags.filter((flag) =>
        !flag.startsWith("--import-map") || !line.includes("--import-map")
      );
      return line.replaceAll(PLACEHOLDER, server.url).replace(
        /^deno (run|install) /,
        `deno $1 -q --no-config ${flags.join(" ")} `,
      );
    };
    const env = {
      DENO_INSTALL_ROOT: `${user.folder}/deno`,
      PATH: `${user.folder}/deno/bin:${Deno.env.get("PATH")}`,
    };
    const type = (line: string, cwd = user.folder) =>
      run("sh", ["-c", commandOf(line)], { cwd, env });

    const assertWatches = async (line: string) => {
      const command = `cd ${user.folder} && exec ${commandOf(line)}`;
      await using watch = start("sh", ["-c", command], { env });
      assertMatch(await nextLine(watch.stdout), / gpu-1: up$/);
      watch.process.kill("SIGINT");
      assertEquals((await watch.end()).code, 130);
    };

    const checks: [line: RegExp, check: (line: string) => Promise<unknown>][] =
      [
        // The demo has a test of its own, and the suite is what runs this one.
        [/^npx -y deno@2\.9\.6 task (demo|test)$/, () => Promise.resolve()],
        [/^curl /, async (line) => {
          assertSuccess(await type(line));
          const name = "config/distributed_hosts.example.yaml";
          const fetched = await Deno.readTextFile(
            `${user.folder}/config/distributed_hosts.yaml`,
          );
          assertEquals(fetched, await Deno.readTextFile(ROOT + name));
          // Its addresses are examples: nothing but loopback is asked.
          await writeInventory();
        }],
        [/^deno run .* nodes$/, async (line) => {
          const result = await type(line);
          assertSuccess(result);
          assertMatch(result.stdout, /^gpu-1 /m);
        }],
        [/^deno install /, async (line) => assertSuccess(await type(line))],
        [/^cp /, async (line) => assertSuccess(await type(line, checkout))],
        [/^deno task -q cluster-hosts nodes$/, async (line) => {
          const result = await type(line, checkout);
          assertSuccess(result);
          assertMatch(result.stdout, /^gpu-node-1 /m);
        }],
        [/ status .*--watch$/, assertWatches],
        [/ status .*--names$/, async (line) => {
          const { code, stdout } = await type(line);
          assertEquals([code, stdout], [0, ""]);
        }],
        [/ status( --ssh)?$/, async (line) => assertGpuIsUp(await type(line))],
        [/ ssh 'gpu-\*' -- uptime$/, async (line) => {
          const result = await type(line);
          assertSuccess(result);
          assertMatch(result.stdout, /^gpu-1: .*load average/);
        }],
        [/ ssh '\*' --gather -- uname -r$/, async (line) => {
          const result = await type(line);
          assertSuccess(result);
          assertStringIncludes(result.stdout, "gpu-1");
        }],
        [/ ssh gpu-1$/, async (line) => assertSuccess(await type(line))],
        [/ wait /, async (line) => assertSuccess(await type(line))],
        [/ urls data /, async (line) => {
          const result = await type(line);
          assertSuccess(result);
          assertEquals(JSON.parse(result.stdout).game_count, 3);
        }],
        [/ urls elo /, async (line) => {
          assertSuccess(await type(line));
          using database = new DatabaseSync(`${user.folder}/db`);
          const games = database.prepare("SELECT * FROM match_history").all();
          assertEquals(games.length, 3);
        }],
        [/ validate$/, async (line) => assertSuccess(await type(line))],
      ];

    for (const line of shellLines(README)) {
      const check = checks.find(([pattern]) => pattern.test(line));
      if (!check) throw new Error(`No test knows the line ${line}`);
      await check[1](line);
    }
  },
);

Deno.test("deno task demo finds the broken nodes, and only them", async () => {
  // Its ports are fixed, and a test beside this one may use them.
  let demo = await run("deno", ["task", "-q", "demo"]);
  for (let tries = 0; tries < 20; tries++) {
    if (!demo.stderr.includes("The demo cannot start")) break;
    await delay(500);
    demo = await run("deno", ["task", "-q", "demo"]);
  }

  assertSuccess(demo);
  assertStringIncludes(demo.stdout + demo.stderr, "3 of 8 nodes up");
});

Deno.test("README's commands are the ones that --help lists", async () => {
  const [table] = codeBlocks(README, "text")
    .filter((text) => text.startsWith("status "));
  const names = [...table!.matchAll(/^(\w+)/gm)].map(([, name]) => name);

  const { stdout } = await run("deno", [
    "run",
    "-q",
    "--config",
    `${ROOT}deno.json`,
    `${ROOT}cli.ts`,
    "--help",
  ]);

  const [commands] = stdout.split("NODE is");
  const listed = [...commands!.matchAll(/^ {2}(\w+)/gm)].map(([, name]) =>
    name
  );
  assertEquals(new Set(names), new Set(listed));
});

Deno.test("tests/README.md names tests that are there", async () => {
  const guarantees = await Deno.readTextFile(`${ROOT}tests/README.md`);
  const rows = guarantees.matchAll(/\| `(\w+_test\.ts)`: (.+?) +\|$/gm);
  const missing: string[] = [];
  for (const [, file, words] of rows) {
    const text = await Deno.readTextFile(`${ROOT}tests/${file}`);
    for (const part of words!.split("; ")) {
      if (!text.includes(part)) missing.push(`${file}: ${part}`);
    }
  }
  assertEquals(missing, []);
  assert(guarantees.includes("_test.ts"));
});
