import { assert, assertEquals, assertMatch, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { DatabaseSync } from "node:sqlite";
import { validateHostsConfig } from "../mod.ts";
import { serveCheckout } from "./checkout.ts";
import { startNode } from "./loopback_cluster.ts";
import { programMissing, ROOT, run, type RunResult, tempFolder, testUnless } from "./process.ts";
import { sshdMissing, startSshd } from "./sshd.ts";

const README = await Deno.readTextFile(`${ROOT}README.md`);
const RECIPES = await Deno.readTextFile(`${ROOT}config/README.md`);
const PLACEHOLDER = "https://example.com/cluster-hosts";
const SCRIPTS = ["status.ts", "elo_sync.ts", "collect.ts", "uptime.ts", "monitor.ts"];

type Hosts = Record<string, Record<string, unknown>>;

/** The text of a script of the README. */
function scriptOf(name: string): string {
  const [, script] = new RegExp(`\`\`\`(?:ts ignore|sh)\\n(?://|#) ${name}\\n(.*?)\`\`\``, "s").exec(README) ?? [];
  if (!script) throw new Error(`The README has no script ${name}`);
  return script;
}

/** The flags with which the README runs a script. */
function flagsOf(name: string): string[] {
  const [, flags] = new RegExp(`\`deno run (.*) ${name}\``).exec(README) ?? [];
  if (!flags) throw new Error(`The README has no command line for ${name}`);
  return flags.split(" ");
}

/** A folder of a user who has an inventory at the default path, and nothing else. */
async function userFolder(hosts: Hosts, sections: Record<string, unknown> = {}) {
  const temp = await tempFolder();
  await Deno.mkdir(`${temp.folder}/config`);
  const write = (hosts: Hosts, sections: Record<string, unknown>) =>
    Deno.writeTextFile(`${temp.folder}/config/distributed_hosts.yaml`, JSON.stringify({ hosts, ...sections }));
  await write(hosts, sections);
  return { ...temp, write };
}

/** Runs a script of the README as it stands there, from a URL, with the flags that the README names. */
async function runScript(name: string, folder: string, edit = (script: string) => script): Promise<RunResult> {
  await using server = serveCheckout();
  await Deno.writeTextFile(`${folder}/${name}`, edit(scriptOf(name).replaceAll(PLACEHOLDER, server.url)));
  const args = ["run", "-q", "--no-prompt", "--no-config", ...server.flags, ...flagsOf(name), name];
  return await run("deno", args, { cwd: folder });
}

Deno.test("README scripts have at most 30 lines, and type-check", async () => {
  await using server = serveCheckout();
  await using temp = await tempFolder();
  for (const name of SCRIPTS) {
    const script = scriptOf(name);
    assert(script.trimEnd().split("\n").length <= 30, `${name} is too long`);
    await Deno.writeTextFile(`${temp.folder}/${name}`, script.replaceAll(PLACEHOLDER, server.url));
  }
  const args = ["check", "-q", "--no-config", "--allow-import", ...server.flags, ...SCRIPTS];
  const { code, stderr } = await run("deno", args, { cwd: temp.folder, env: { NO_COLOR: "1" } });
  assertEquals([code, stderr], [0, ""]);
});

Deno.test("README status.ts shows what is configured and what answers", async () => {
  await using node = await startNode("ok", { games: 7 });
  await using user = await userFolder({
    "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: node.port },
    "gpu-2": {},
  });
  const { code, stdout, stderr } = await runScript("status.ts", user.folder);
  assertEquals([code, stderr], [0, ""]);
  assertEquals(stdout, "1 of 2 nodes are reachable\ngpu-1 at 127.0.0.1: 7 games, version 1.4.2\n");
});

const GAMES_TABLE = `CREATE TABLE match_history (id INTEGER PRIMARY KEY, game_id TEXT, participant_a TEXT,
  participant_b TEXT, board_type TEXT, num_players INTEGER, winner TEXT, timestamp REAL)`;
const GAMES_COLUMNS = "game_id, participant_a, participant_b, board_type, num_players, winner, timestamp";

/** The bytes of a database that a node would serve. */
async function eloDatabase(rows: readonly string[]): Promise<Uint8Array<ArrayBuffer>> {
  await using temp = await tempFolder();
  const path = `${temp.folder}/elo.db`;
  const db = new DatabaseSync(path);
  db.exec(GAMES_TABLE);
  for (const row of rows) db.exec(`INSERT INTO match_history (${GAMES_COLUMNS}) VALUES (${row})`);
  db.close();
  return await Deno.readFile(path);
}

/** A node that serves `/status`, and whatever `/db` gives. */
function serveElo(db: () => BodyInit) {
  return Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    ({ url }) => url.endsWith("/db") ? new Response(db()) : Response.json({}),
  );
}

Deno.test("README elo_sync.ts merges each game once, with and without an id, however often it runs", async () => {
  const shared = "'game-1', 'a', 'b', 'square8', 2, 'a', 1.5";
  // The same game as another node wrote it down.
  const later = "'game-1', 'a', 'b', 'square8', 2, 'a', 1.75";
  const nameless = ["NULL, 'a', 'b', 'square8', 2, 'a', 2.5", "NULL, 'a', 'b', 'square8', 2, NULL, 3.5"];
  let rows = [shared, ...nameless];
  let damaged = false;
  const databases = [
    async () => await eloDatabase(rows),
    async () => await eloDatabase([later, nameless[0]!, "'game-2', 'c', 'd', 'hex8', 3, 'd', 4.5"]),
  ];
  const bodies = await Promise.all(databases.map((database) => database()));
  await using first = serveElo(() => damaged ? bodies[0]!.with(0, 0) : bodies[0]!);
  await using second = Deno.serve(
    { hostname: "127.0.0.2", port: first.addr.port, onListen() {} },
    ({ url }) => url.endsWith("/db") ? new Response(bodies[1]!) : Response.json({}),
  );
  const hosts = { "gpu-1": { tailscale_ip: "127.0.0.1" }, "gpu-2": { tailscale_ip: second.addr.hostname } };
  await using user = await userFolder(hosts, { elo_sync: { sync_port: first.addr.port } });
  const games = () => {
    using local = new DatabaseSync(`${user.folder}/elo.db`, { readOnly: true });
    return local.prepare("SELECT COUNT(*) AS count FROM match_history").get()?.count;
  };
  const sync = async () => {
    const { code, stdout, stderr } = await runScript("elo_sync.ts", user.folder);
    assertEquals(code, 0, stderr);
    const added = [...stdout.matchAll(/\/db: (\d+) of (\d+) games are new$/gm)].map(([, added, all]) => [added, all]);
    return { added, stderr };
  };
  assertEquals(await sync(), { added: [["3", "3"], ["1", "3"]], stderr: "" });
  assertEquals(await sync(), { added: [["0", "3"], ["0", "3"]], stderr: "" });
  assertEquals(games(), 4);

  rows = [...rows, "NULL, 'e', 'f', 'square8', 2, 'e', 5.5"];
  bodies[0] = await databases[0]!();
  assertEquals(await sync(), { added: [["1", "4"], ["0", "3"]], stderr: "" });
  assertEquals(games(), 5);

  // A database that is broken does no harm, and does not keep the next one from being merged.
  damaged = true;
  bodies[1] = await eloDatabase(["'game-3', 'c', 'd', 'hex8', 3, 'd', 6.5"]);
  const { added, stderr } = await sync();
  assertEquals(added, [["1", "1"]]);
  assertMatch(stderr, /^http:\/\/127\.0\.0\.1:\d+\/db: Error: file is not a database\n$/);
  assertEquals(games(), 6);
});

Deno.test("README elo_sync.ts adds to a database that is there already", async () => {
  await using node = await startNode("ok", { games: 5 });
  const hosts = { "gpu-1": { tailscale_ip: "127.0.0.1" } };
  await using user = await userFolder(hosts, { elo_sync: { sync_port: node.port } });
  await Deno.writeFile(`${user.folder}/elo.db`, await eloDatabase(["'game-1', 'a', 'b', 'square8', 2, 'a', 1.5"]));
  const { code, stdout, stderr } = await runScript("elo_sync.ts", user.folder);
  assertEquals([code, stderr], [0, ""]);
  assertStringIncludes(stdout, "4 of 5 games are new");
});

Deno.test("README collect.ts adds up the games, and leaves out a node that fails", async () => {
  await using good = await startNode("ok", { games: 40, hostname: "127.0.0.2" });
  let asked = 0;
  await using failing = Deno.serve(
    { hostname: "127.0.0.3", port: 0, onListen() {} },
    () => asked++ === 0 ? Response.json({ game_count: 1000 }) : new Response("no", { status: 500 }),
  );
  await using user = await userFolder({
    "gpu-1": { tailscale_ip: good.hostname, data_server_port: good.port },
    "gpu-2": { data_server_url: `http://127.0.0.3:${failing.addr.port}` },
  });
  const { code, stdout, stderr } = await runScript("collect.ts", user.folder);
  assertEquals([code, stdout], [0, "40 games in the cluster\n"]);
  assertEquals(stderr, `http://127.0.0.3:${failing.addr.port} is left out: Error: HTTP 500\n`);
});

const NO_SSHD = sshdMissing();

/** The README's scripts know nothing of this sshd's key: a config of ssh does, as a user's would. */
async function sshUser(sshd: Awaited<ReturnType<typeof startSshd>>, hosts: Hosts) {
  const user = await userFolder(hosts);
  const options = JSON.stringify(sshd.options);
  return {
    ...user,
    edit: (script: string) =>
      script.replace(/(runOnNodes\(.*?\["uptime"\])/, `$1, { options: ${options} }`)
        .replace("{ stdin:", `{ options: ${options}, stdin:`),
  };
}

testUnless(NO_SSHD, "README uptime.ts runs a command on all active nodes", async () => {
  await using sshd = await startSshd();
  await using user = await sshUser(sshd, {
    "gpu-1": sshd.host,
    "gpu-2": { ...sshd.host, status: "offline" },
    "gpu-3": {},
  });
  const { code, stdout, stderr } = await runScript("uptime.ts", user.folder, user.edit);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^gpu-1: .*load average.*\ngpu-3: .*(tailscale_ip|address).*\n$/);
});

testUnless(NO_SSHD, "README monitor.ts shows state, disk, load and what differs from the inventory", async () => {
  await using sshd = await startSshd();
  await using node = await startNode("ok");
  const cpus = navigator.hardwareConcurrency;
  const memory_gb = Math.floor(Deno.systemMemoryInfo().total / 2 ** 30);
  const host = { ...sshd.host, data_server_port: node.port };
  await using user = await sshUser(sshd, {
    "gpu-1": { ...host, cpus, memory_gb: memory_gb + 1 },
    "gpu-2": { ...host, cpus: cpus + 1, memory_gb: 100 * (memory_gb + 1), gpu: "H100" },
    "gpu-3": { data_server_url: `http://127.0.0.1:${node.port}` },
  });
  await Deno.writeTextFile(`${user.folder}/facts.sh`, scriptOf("facts.sh"));
  const { code, stdout, stderr } = await runScript("monitor.ts", user.folder, user.edit);
  assertEquals([code, stderr], [0, ""]);
  const [same, differs, unreached] = stdout.trimEnd().split("\n");
  assertMatch(same!, /^gpu-1: up; disk \d+%, load [\d.]+$/);
  assertMatch(
    differs!,
    new RegExp(
      `^gpu-2: up; disk \\d+%, load [\\d.]+; cpus ${cpus}, not ${cpus + 1}; memory_gb \\d+, not ` +
        `${100 * (memory_gb + 1)}; gpu none, not H100$`,
    ),
  );
  assertMatch(unreached!, /^gpu-3: up; ssh no-address: .+$/);
});

Deno.test("README's inventory has 15 lines, no problem and no warning", () => {
  const [, text] = /```yaml\n(hosts:.*?)```/s.exec(README) ?? [];
  assertEquals(text!.trimEnd().split("\n").length, 15);
  const { config, problems, warnings } = validateHostsConfig(text!);
  assertEquals([problems, warnings], [[], []]);
  assertEquals(Object.keys(config!.hosts), ["head", "gpu-1", "gpu-2"]);
});

/** The lines that a reader could type. */
function shellLines(markdown: string): string[] {
  const blocks = [...markdown.matchAll(/```sh\n(.*?)```/gs)].map(([, block]) => block!);
  return blocks.filter((block) => !block.startsWith("#")).join("").split("\n")
    .map((line) => line.replace(/\s+#.*/, "")).filter((line) => line !== "");
}

const ABSENT = ["curl", "aria2c"].filter((program) => programMissing(program) !== undefined);
const SKIPPED = ABSENT.length > 0 ? ` (${ABSENT.join(" and ")} missing: those lines are not looked at)` : "";

Deno.test(`README command lines run as written, one after the other${SKIPPED}`, async () => {
  await using server = serveCheckout();
  await using node = await startNode("ok", { games: 3, hostname: "127.0.0.2" });
  await using user = await userFolder({});
  await Deno.remove(`${user.folder}/config`, { recursive: true });
  const env = { DENO_INSTALL_ROOT: `${user.folder}/deno`, PATH: `${user.folder}/deno/bin:${Deno.env.get("PATH")}` };
  const type = (line: string) => {
    // The lines of the section on JSR bring the import map themselves, which every other one needs here.
    const flags = server.flags.filter((flag) => !line.includes("--import-map") || !flag.startsWith("--import-map"));
    const command = line.replaceAll(PLACEHOLDER, server.url)
      .replace(/^deno (run|install) /, `deno $1 -q --no-config ${flags.join(" ")} `);
    return run("sh", ["-c", command], { cwd: user.folder, env });
  };
  const inventory = () =>
    user.write({ "gpu-1": { tailscale_ip: node.hostname } }, {
      elo_sync: { sync_port: node.port },
      distributed: { data_server_port: node.port },
    });
  const isUp = ({ code, stdout, stderr }: RunResult) => {
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, /^gpu-1 .* up /m);
  };

  const hasCurl = !ABSENT.includes("curl");

  const checks: [line: RegExp, check: (result: RunResult) => unknown][] = [
    [/^curl /, async ({ code, stderr }) => {
      if (hasCurl) {
        assertEquals([code, stderr], [0, ""]);
        const fetched = await Deno.readTextFile(`${user.folder}/config/distributed_hosts.yaml`);
        assertEquals(fetched, await Deno.readTextFile(`${ROOT}config/distributed_hosts.example.yaml`));
      } else {
        await Deno.mkdir(`${user.folder}/config`);
      }
      // Its addresses are examples: nothing but loopback is asked.
      await inventory();
    }],
    [/^deno run .* nodes$/, ({ code, stdout, stderr }) => {
      assertEquals([code, stderr], [0, ""]);
      assertMatch(stdout, /^gpu-1 /m);
    }],
    [/^deno install /, ({ code, stderr }) => assertEquals(code, 0, stderr)],
    [/^cluster-hosts status$|^deno run .* status$/, isUp],
    [/ urls elo /, ({ code, stdout, stderr }) => {
      if (ABSENT.includes("aria2c")) return;
      assertEquals(code, 0, stdout + stderr);
      using db = new DatabaseSync(`${user.folder}/db`, { readOnly: true });
      assertEquals(db.prepare("SELECT COUNT(*) AS count FROM match_history").get()?.count, 3);
    }],
    [/ urls data /, ({ code, stdout }) => {
      if (!hasCurl) return;
      assertEquals([code, JSON.parse(stdout).game_count], [0, 3]);
    }],
  ];
  for (const line of shellLines(README)) {
    // The demo has a test of its own, and the suite is what runs this.
    if (line.startsWith("npx -y deno@2.9.6 task ")) continue;
    const [, check] = checks.find(([pattern]) => pattern.test(line)) ?? [];
    if (!check) throw new Error(`No test knows the line ${line}`);
    await check(await type(line));
  }
});

Deno.test("README deno task demo finds the broken nodes, and only them", async () => {
  // Its ports are fixed, and a test beside this one may have the same cluster up.
  let demo = await run("deno", ["task", "-q", "demo"]);
  for (let tries = 0; demo.stderr.includes("The demo cannot start") && tries < 20; tries++) {
    await delay(500);
    demo = await run("deno", ["task", "-q", "demo"]);
  }
  const { code, stdout, stderr } = demo;
  assertEquals(code, 0, stdout + stderr);
  assertStringIncludes(stdout, "3 of 8 nodes up");
});

Deno.test("README.md has at most 12 KB, and tests/README.md names tests that are there", async () => {
  assert(new TextEncoder().encode(README).length <= 12 * 1024);
  const guarantees = await Deno.readTextFile(`${ROOT}tests/README.md`);
  const missing: string[] = [];
  for (const [, file, words] of guarantees.matchAll(/\| `(\w+_test\.ts)`: (.+?) +\|$/gm)) {
    if (!(await Deno.readTextFile(`${ROOT}tests/${file}`)).includes(words!)) missing.push(`${file}: ${words}`);
  }
  assertEquals(missing, []);
});

testUnless(NO_SSHD, "README facts.sh is what `ssh --stdin` runs, with a file that a shell opens", async () => {
  await using sshd = await startSshd();
  const [, line] = /`(cluster-hosts ssh .* < facts\.sh)`/.exec(README) ?? [];
  await using user = await userFolder({ "gpu-1": sshd.host, "gpu-2": sshd.host });
  await Deno.writeTextFile(`${user.folder}/facts.sh`, scriptOf("facts.sh"));
  const cli = `deno run -q --no-prompt -P=cli --config ${ROOT}deno.json ${ROOT}cli.ts`;
  const command = line!.replace("cluster-hosts ssh", `${cli} ssh ${sshd.flags.join(" ")}`);
  const { code, stdout, stderr } = await run("sh", ["-c", command], { cwd: user.folder });
  assertEquals(code, 0, stderr);
  assertMatch(stdout, /"cpus": \d+, "memory_gb": \d+, "gpu": "", "disk": "\d+%", "load": [\d.]+}/);
});

testUnless(programMissing("promtool"), "config/README.md's Prometheus recipe is a config of Prometheus", async () => {
  await using user = await userFolder({ "gpu-1": { tailscale_ip: "127.0.0.2" } });
  const [, recipe] = /```yaml\n(scrape_configs:.*?)```/s.exec(RECIPES) ?? [];
  await Deno.writeTextFile(`${user.folder}/prometheus.yml`, recipe!);
  const exported = await run(
    "deno",
    ["run", "-q", "-P=cli", "--config", `${ROOT}deno.json`, `${ROOT}cli.ts`, "export", "prometheus"],
    { cwd: user.folder },
  );
  assertEquals(exported.code, 0, exported.stderr);
  await Deno.writeTextFile(`${user.folder}/cluster.json`, exported.stdout);
  const { code, stdout, stderr } = await run("promtool", ["check", "config", "prometheus.yml"], { cwd: user.folder });
  assertEquals(code, 0, stdout + stderr);
  const found = await run("promtool", ["check", "service-discovery", "--timeout=1s", "prometheus.yml", "cluster"], {
    cwd: user.folder,
  });
  assertEquals(found.code, 0, found.stderr);
  const [{ labels }] = JSON.parse(found.stdout);
  assertEquals([labels.__address__, labels.__param_target, labels.instance], [
    "127.0.0.1:9115",
    "http://127.0.0.2:8766/status",
    "gpu-1",
  ]);
});

testUnless(programMissing("ansible-inventory"), "config/README.md's script is an inventory of Ansible", async () => {
  await using user = await userFolder({ "gpu-1": { tailscale_ip: "127.0.0.2", gpu: "H100" } });
  const [, script] = /```sh\n(#!\/bin\/sh\n.*?)```/s.exec(RECIPES) ?? [];
  const cli = `deno run -q -P=cli --config ${ROOT}deno.json ${ROOT}cli.ts`;
  await Deno.writeTextFile(`${user.folder}/inventory.sh`, script!.replace("exec cluster-hosts", `exec ${cli}`), {
    mode: 0o755,
  });
  const { code, stdout, stderr } = await run("ansible-inventory", ["-i", "./inventory.sh", "--list"], {
    cwd: user.folder,
  });
  assertEquals(code, 0, stderr);
  assertEquals(JSON.parse(stdout).gpu_H100.hosts, ["gpu-1"]);
});
