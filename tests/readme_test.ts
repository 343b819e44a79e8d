import { assert, assertEquals, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { DatabaseSync } from "node:sqlite";
import { serveCheckout } from "./checkout.ts";
import { ROOT, run, runCli, startNode, writeInventory } from "./loopback_cluster.ts";
import { sshdMissing, startSshd } from "./sshd.ts";

const README = await Deno.readTextFile(`${ROOT}README.md`);

/** Runs one of the README's scripts as it stands there, with the flags that it names, in a folder of its own. */
async function runScript(
  name: string,
  hosts: Record<string, Record<string, unknown>>,
  options: { readonly folder?: string; readonly edit?: (script: string) => string } = {},
) {
  const script = new RegExp(`\`\`\`ts ignore\\n// ${name}\\n(.*?)\`\`\``, "s").exec(README)?.[1];
  const flags = new RegExp(`\`deno run (.*) ${name}\``).exec(README)?.[1]?.split(" ");
  if (!script || !flags) throw new Error(`The README has no script ${name}, or no command line for it`);
  assert(script.trimEnd().split("\n").length < 30, `${name} is too long`);

  await using server = serveCheckout();
  await using inventory = await writeInventory(hosts, {
    elo_sync: { sync_port: Object.values(hosts)[0]?.data_server_port },
  });
  const folder = options.folder ?? inventory.folder;
  await Deno.mkdir(`${folder}/config`, { recursive: true });
  await Deno.copyFile(inventory.path, `${folder}/config/distributed_hosts.yaml`);
  const edited = (options.edit ?? ((text) => text))(script.replace("https://example.com/cluster-hosts", server.url));
  await Deno.writeTextFile(`${folder}/${name}`, edited);
  return await run("deno", ["run", "-q", "--no-prompt", "--no-config", ...server.flags, ...flags, name], {
    cwd: folder,
  });
}

Deno.test("README status.ts shows what is configured and what answers", async () => {
  await using node = await startNode("ok", { games: 7 });
  const { code, stdout, stderr } = await runScript("status.ts", {
    "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: node.port },
    "gpu-2": {},
  });
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  assertEquals(stdout, "1 of 2 nodes are reachable\ngpu-1 at 127.0.0.1: 7 games, version 1.4.2\n");
});

Deno.test("README elo_sync.ts merges each game once, and nothing of a database that is not sound", async () => {
  await using sound = await startNode("ok", { games: 5 });
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  const hosts = { "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: sound.port } };
  const games = () => {
    using local = new DatabaseSync(`${folder}/elo.db`, { readOnly: true });
    return local.prepare("SELECT COUNT(*) AS count FROM match_history").get()?.count;
  };
  try {
    const first = await runScript("elo_sync.ts", hosts, { folder });
    assertEquals([first.code, first.stderr], [0, ""]);
    assertStringIncludes(first.stdout, "5 of 5 games are new");
    assertEquals(games(), 5);

    const second = await runScript("elo_sync.ts", hosts, { folder });
    assertStringIncludes(second.stdout, "0 of 5 games are new");
    assertEquals(games(), 5);

    await using broken = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      ({ url }) => url.endsWith("/status") ? Response.json({}) : new Response("x".repeat(10_000)),
    );
    const third = await runScript("elo_sync.ts", {
      "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: broken.addr.port },
    }, { folder });
    assertEquals(third.code, 0);
    assertStringIncludes(third.stderr, "not a database");
    assertEquals(games(), 5);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("README collect.ts adds up the games, and leaves out a node that fails", async () => {
  await using good = await startNode("ok", { games: 40 });
  let asked = 0;
  await using failing = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => asked++ === 0 ? Response.json({ game_count: 1000 }) : new Response("no", { status: 500 }),
  );
  // By URL alone: a node with an address of this host would be left out.
  const { code, stdout, stderr } = await runScript("collect.ts", {
    "gpu-1": { data_server_url: `http://127.0.0.1:${good.port}` },
    "gpu-2": { data_server_url: `http://127.0.0.1:${failing.addr.port}` },
  });
  assertEquals({ code, stdout }, { code: 0, stdout: "40 games in the cluster\n" });
  assertStringIncludes(stderr, `http://127.0.0.1:${failing.addr.port} is left out: Error: HTTP 500`);
});

const whyNoSshd = sshdMissing();

Deno.test({
  name: `README uptime.ts runs a command on all active nodes${whyNoSshd ? ` (ignored: ${whyNoSshd})` : ""}`,
  ignore: whyNoSshd !== undefined,
  async fn() {
    await using sshd = await startSshd();
    const host = { tailscale_ip: "127.0.0.1", ssh_port: sshd.port, ssh_user: sshd.user, ssh_key: sshd.keyPath };
    const { code, stdout } = await runScript(
      "uptime.ts",
      { "gpu-1": host, "gpu-2": { ...host, status: "offline" } },
      // The host key is new: without this, the developer's own known_hosts would have to know it.
      { edit: (script) => script.replace('["uptime"]', `["uptime"], { options: ${JSON.stringify(sshd.options)} }`) },
    );
    assertEquals(code, 0);
    assert(/^gpu-1: .*load average.*\n$/.test(stdout), stdout);
  },
});

Deno.test("README names only command lines that are tried", async () => {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  await using server = serveCheckout();
  await using node = await startNode("ok");
  await Deno.mkdir(`${folder}/config`);
  await Deno.writeTextFile(
    `${folder}/config/distributed_hosts.yaml`,
    `hosts:\n  gpu-1:\n    tailscale_ip: 127.0.0.1\n    data_server_port: ${node.port}\n`,
  );
  const fromUrl = async (line: string) => {
    const [program = "", subcommand = "", ...args] = line.replaceAll("https://example.com/cluster-hosts", server.url)
      .split(" ");
    // Where JSR can be reached, the second of these lines differs from the first in nothing that counts.
    const { code, stdout } = await run(program, [subcommand, "-q", "--no-config", ...server.flags, ...args], {
      cwd: folder,
    });
    assertEquals(code, 0, stdout);
    assertStringIncludes(stdout, "1 of 1 nodes up");
  };
  const example = ["--config", "config/distributed_hosts.example.yaml"];
  const tried: Record<string, (line: string) => Promise<void>> = {
    "npx -y deno@2.9.6 task demo": async () => {
      const { code, stdout } = await run("deno", ["task", "-q", "demo"]);
      assertEquals(code, 0, stdout);
      assertStringIncludes(stdout, "3 of 8 nodes up");
    },
    // It is what runs this.
    "npx -y deno@2.9.6 task test": () => Promise.resolve(),
    "cp config/distributed_hosts.example.yaml config/distributed_hosts.yaml": () => Promise.resolve(),
    "deno task cluster-hosts validate": async () => {
      const { code } = await run("deno", ["task", "-q", "cluster-hosts", "validate", ...example]);
      assertEquals(code, 0);
    },
    "deno task cluster-hosts status": async () => {
      const { code } = await run("deno", [
        "task",
        "-q",
        "cluster-hosts",
        "status",
        "--config",
        `${folder}/config/distributed_hosts.yaml`,
      ]);
      assertEquals(code, 0);
    },
    "deno run --allow-read=config --allow-net https://example.com/cluster-hosts/cli.ts status": fromUrl,
    "deno run --import-map=https://example.com/cluster-hosts/deno.json --allow-read=config --allow-net https://example.com/cluster-hosts/cli.ts status":
      fromUrl,
    'exec cluster-hosts export ansible "$@"': async () => {
      const { code, stdout } = await runCli(["export", "ansible", ...example, "--list"]);
      assertEquals(code, 0);
      assert("_meta" in JSON.parse(stdout));
    },
  };
  try {
    const blocks = [...README.matchAll(/```sh\n(.*?)```/gs)].map(([, block]) => block!);
    const lines = blocks.join("").split("\n").map((line) => line.replace(/\s+#.*|^#.*/, "")).filter((line) =>
      line !== ""
    );
    assertEquals(lines.toSorted(), Object.keys(tried).toSorted());
    for (const line of lines) await tried[line]!(line);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
