import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { validateHostsConfig } from "../mod.ts";
import {
  codeBlocks,
  fileIn,
  RECIPES,
  type UserFolder,
  userFolder,
  writeProgram,
} from "./documents.ts";
import { startNode, unusedPort } from "./loopback_cluster.ts";
import { programMissing, start, testUnless } from "./process.ts";
import { sshdMissing, startSshd } from "./sshd.ts";

const NO_SSHD = sshdMissing();

/** The user and the inventory of the recipes, put where a test has them. */
function place(recipe: string, { folder }: UserFolder): string {
  return recipe
    .replaceAll(
      "/home/ops/cluster/hosts.yaml",
      `${folder}/config/distributed_hosts.yaml`,
    )
    .replaceAll("/home/ops", folder);
}

/** Starts a node whose data server answers, as a host of an inventory. */
async function startHost() {
  const node = await startNode("ok", { hostname: "127.0.0.2" });
  const host = { tailscale_ip: node.hostname, data_server_port: node.port };
  return { host, [Symbol.asyncDispose]: () => node[Symbol.asyncDispose]() };
}

const DEAD_HOST = { tailscale_ip: "127.0.0.1", data_server_port: unusedPort() };

/** Runs a line of shell with these variables alone, as cron and systemd do. */
function runWith(variables: readonly string[], line: string, user: UserFolder) {
  const words = [...variables, "/bin/sh", "-c", line].map(quote);
  return user.shell(`exec env -i ${words.join(" ")}`);
}

function quote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Runs the command of the crontab. */
function runCron(user: UserFolder) {
  const [crontab] = codeBlocks(RECIPES, "cron");
  const lines = place(crontab!, user).trim().split("\n");
  const variables = lines.filter((line) => /^[A-Z]+=/.test(line));
  const [entry] = lines.filter((line) => line.startsWith("*"));
  const command = entry!.split(" ").slice(5).join(" ");

  const own = [`HOME=${user.folder}`, "LOGNAME=ops", "SHELL=/bin/sh"];
  return runWith([...own, ...variables], command, user);
}

Deno.test("the cron recipe prints nothing while all is well", async () => {
  await using node = await startHost();
  await using user = await userFolder({ "gpu-1": node.host });

  const { code, stdout, stderr } = await runCron(user);

  assertEquals({ code, stdout, stderr }, { code: 0, stdout: "", stderr: "" });
});

Deno.test("the cron recipe prints the nodes that are not up", async () => {
  await using node = await startHost();
  await using user = await userFolder({
    "gpu-1": node.host,
    "gpu-2": DEAD_HOST,
  });

  const { code, stdout } = await runCron(user);

  assertEquals(code, 1);
  assertMatch(stdout, /^gpu-2 .* down .* refused: /m);
  assert(!stdout.includes("gpu-1"), stdout);
});

testUnless(
  programMissing("systemd-analyze"),
  "systemd accepts the unit and the timer",
  async () => {
    await using user = await userFolder({});
    const files = ["cluster-status.service", "cluster-status.timer"];
    for (const name of files) {
      const text = place(fileIn(RECIPES, "ini", name), user);
      await Deno.writeTextFile(`${user.folder}/${name}`, text);
    }

    const { code, stderr } = await user.shell(
      `systemd-analyze verify ./${files.join(" ./")}`,
    );

    assertEquals(code, 0, stderr);
    // It may complain about units of the machine itself.
    assert(!stderr.includes("cluster-status"), stderr);
  },
);

Deno.test("the systemd unit fails while a node is not up", async () => {
  await using node = await startHost();
  await using user = await userFolder({ "gpu-1": node.host });
  const unit = place(fileIn(RECIPES, "ini", "cluster-status.service"), user);
  const [, path] = /^Environment=(.*)$/m.exec(unit)!;
  const [, command] = /^ExecStart=(.*)$/m.exec(unit)!;
  const runUnit = () => runWith([path!], command!, user);

  const healthy = await runUnit();
  await user.write({ "gpu-1": node.host, "gpu-2": DEAD_HOST });
  const broken = await runUnit();

  assertEquals([healthy.code, healthy.stdout, healthy.stderr], [0, "", ""]);
  assertEquals(broken.code, 1);
  assertStringIncludes(broken.stdout, "gpu-2");
});

testUnless(
  programMissing("jq") ?? programMissing("curl"),
  "webhook.sh posts each change of a node, and nothing else",
  async () => {
    const posts: string[] = [];
    const posted = Promise.withResolvers<void>();
    await using hook = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      async (request) => {
        posts.push(await request.text());
        posted.resolve();
        return new Response();
      },
    );
    let checks = 0;
    await using node = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      () =>
        checks++ < 2 ? new Response("no", { status: 500 }) : Response.json({}),
    );
    const port = node.addr.port;
    await using user = await userFolder({
      "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: port },
    });
    await Deno.writeTextFile(
      `${user.folder}/webhook.sh`,
      // Nobody wants to wait five seconds.
      fileIn(RECIPES, "sh", "webhook.sh")
        .replace("--json", "--json --interval 200ms"),
    );
    // The signal that ends timeout(1) ends all of the pipe.
    const line = `cd ${user.folder} && exec timeout 30 sh webhook.sh`;
    const args = ["-c", `${line} http://127.0.0.1:${hook.addr.port}`];
    await using webhook = start("sh", args, { env: user.env });

    await posted.promise;
    webhook.process.kill("SIGTERM");
    await webhook.end();

    assertEquals(posts, ['{"text":"gpu-1: unhealthy -> up"}']);
  },
);

/** A machine of an inventory whose sshd everybody may reach from the tests. */
async function sshMachine() {
  const sshd = await startSshd();
  const host = { ...sshd.host, ssh_options: sshd.options };
  return {
    sshd,
    host,
    [Symbol.asyncDispose]: () => sshd[Symbol.asyncDispose](),
  };
}

testUnless(
  NO_SSHD ?? programMissing("scp") ?? programMissing("rsync"),
  "the scp and rsync recipe copies files by the names of the inventory",
  async () => {
    await using machine = await sshMachine();
    await using user = await userFolder({
      "gpu-1": { ...machine.host, role: "worker" },
    });
    await Deno.mkdir(`${user.folder}/.ssh`, { mode: 0o700 });
    await Deno.writeTextFile(`${user.folder}/model.pth`, "weights");
    const [recipe] = codeBlocks(RECIPES, "sh")
      .filter((text) => text.includes("export ssh-config"));
    // There are no others on that machine.
    const target = `${user.folder}/remote`;
    await Deno.mkdir(target);

    // The sshd of the tests has no sftp, which scp uses without -O.
    const lines = recipe!
      .replaceAll(":/tmp/", `:${target}/`)
      .replaceAll("scp -F", "scp -O -F");

    const { code, stderr } = await user.shell(`set -e\n${lines}`);

    assertEquals(code, 0, stderr);
    for (const path of ["remote/model.pth", "backup/model.pth"]) {
      const copied = await Deno.readTextFile(`${user.folder}/${path}`);
      assertEquals(copied, "weights");
    }
  },
);

for (const kind of ["ssh-config", "prometheus"]) {
  Deno.test(`a failed export ${kind} leaves the file that it replaces`, async () => {
    await using user = await userFolder({ "gpu-1": { ssh_port: "none" } });
    await Deno.mkdir(`${user.folder}/.ssh`);
    const blocks = codeBlocks(RECIPES, "sh").join("").split("\n");
    const line = blocks.find((text) => text.includes(`export ${kind} >`))!;
    const [, file] = / > (\S+)\.new && mv /.exec(line)!;
    const path = file!.replace("~", user.folder);
    await Deno.writeTextFile(path.replace(/^(?!\/)/, `${user.folder}/`), "old");

    const { code } = await user.shell(line);
    const { stdout } = await user.shell(`cat ${file}`);

    assertEquals([code !== 0, stdout], [true, "old"]);
  });
}

/** Passes connections on to an sshd, and can be rebooted. */
class Machine implements AsyncDisposable {
  readonly port: number;
  readonly #listener: Deno.TcpListener;
  readonly #running: Promise<void>;
  #isUp = true;
  #sessions = new AbortController();
  #asked = Promise.withResolvers<void>();

  constructor(target: number) {
    this.#listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    this.port = this.#listener.addr.port;
    this.#running = this.#run(target);
  }

  /** Ends all sessions, and stays down until somebody has asked for it. */
  async reboot(): Promise<void> {
    this.#isUp = false;
    this.#sessions.abort();
    await this.#asked.promise;

    this.#asked = Promise.withResolvers<void>();
    this.#sessions = new AbortController();
    this.#isUp = true;
  }

  async #run(target: number): Promise<void> {
    const sessions: Promise<void>[] = [];
    for await (const client of this.#listener) {
      if (this.#isUp) {
        sessions.push(this.#pass(client, target));
      } else {
        client.close();
        this.#asked.resolve();
      }
    }
    await Promise.all(sessions);
  }

  async #pass(client: Deno.TcpConn, target: number): Promise<void> {
    const { signal } = this.#sessions;
    const server = await Deno.connect({ hostname: "127.0.0.1", port: target });

    // One side closes, or the machine reboots: both are an end.
    await Promise.allSettled([
      client.readable.pipeTo(server.writable, { signal }),
      server.readable.pipeTo(client.writable, { signal }),
    ]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener[Symbol.dispose]();
    this.#sessions.abort();
    this.#asked.resolve();
    await this.#running;
  }
}

testUnless(
  NO_SSHD,
  "reboot.sh reboots one node after the other, and waits for each",
  async () => {
    await using host = await sshMachine();
    await using first = new Machine(host.sshd.port);
    await using second = new Machine(host.sshd.port);
    const fields = { ...host.host, role: "worker" };
    await using user = await userFolder({
      "gpu-1": { ...fields, ssh_port: first.port },
      "gpu-2": { ...fields, ssh_port: second.port },
    });
    // The command says which machine it ran on, and the test reboots that one.
    const log = `${user.folder}/reboots`;
    await Deno.writeTextFile(log, "");
    await Deno.writeTextFile(
      `${user.folder}/reboot.sh`,
      fileIn(RECIPES, "sh", "reboot.sh")
        .replace("sudo reboot", `"echo $node >> ${log}"`),
    );
    const [line] = codeBlocks(RECIPES, "sh")
      .filter((text) => text.startsWith("sh reboot.sh"));

    const events: string[] = [];
    let isOver = false;
    const reboot = async (name: string, machine: Machine) => {
      while (!isOver && !(await Deno.readTextFile(log)).includes(name)) {
        await delay(50);
      }
      events.push(`${name} is down`);
      await machine.reboot();
      events.push(`${name} is up`);
    };
    const reboots = [reboot("gpu-1", first), reboot("gpu-2", second)];

    const { code, stderr } = await user.shell(line!);
    isOver = true;
    await first[Symbol.asyncDispose]();
    await second[Symbol.asyncDispose]();
    await Promise.all(reboots);

    assertEquals(code, 0, stderr);
    assertEquals(events, [
      "gpu-1 is down",
      "gpu-1 is up",
      "gpu-2 is down",
      "gpu-2 is up",
    ]);
  },
);

/** What `tailscale status --json` prints, as far as anybody reads it. */
const TAILNET = {
  Version: "1.76.1",
  BackendState: "Running",
  Self: {
    HostName: "Laptop of Ops",
    DNSName: "laptop.tail1a2b3.ts.net.",
    OS: "macOS",
    TailscaleIPs: ["100.64.0.2", "fd7a:115c:a1e0::2"],
    Online: true,
  },
  Peer: {
    "nodekey:01": {
      HostName: "gpu",
      DNSName: "gpu-1.tail1a2b3.ts.net.",
      OS: "linux",
      TailscaleIPs: ["100.64.0.11", "fd7a:115c:a1e0::11"],
      Tags: ["tag:gpu", "tag:prod"],
      Online: true,
    },
    "nodekey:02": {
      HostName: "gpu",
      DNSName: "gpu-2.tail1a2b3.ts.net.",
      OS: "linux",
      TailscaleIPs: ["100.64.0.12"],
      Tags: ["tag:gpu"],
      Online: false,
    },
    "nodekey:03": {
      HostName: "phone",
      DNSName: "phone.tail1a2b3.ts.net.",
      OS: "iOS",
      TailscaleIPs: ["100.64.0.3"],
    },
  },
};

/** Runs tailscale.sh where `tailscale` prints `output`. */
async function runTailscale(user: UserFolder, output: string) {
  await Deno.writeTextFile(`${user.folder}/status.json`, output);
  await writeProgram(
    `${user.folder}/.deno/bin/tailscale`,
    `#!/bin/sh\ncat ${user.folder}/status.json\n`,
  );
  const script = fileIn(RECIPES, "sh", "tailscale.sh");
  await Deno.writeTextFile(`${user.folder}/tailscale.sh`, script);
  return await user.shell("sh tailscale.sh hosts.yaml");
}

testUnless(
  programMissing("jq"),
  "tailscale.sh writes an inventory of the tagged machines",
  async () => {
    await using user = await userFolder({});

    const { code, stderr } = await runTailscale(user, JSON.stringify(TAILNET));

    assertEquals(code, 0, stderr);
    const text = await Deno.readTextFile(`${user.folder}/hosts.yaml`);
    const { config, problems, warnings } = validateHostsConfig(text);
    assertEquals([problems, warnings], [[], []]);
    assertEquals(config?.hosts, {
      "gpu-1": { tailscale_ip: "100.64.0.11" },
      "gpu-2": { tailscale_ip: "100.64.0.12" },
    });
  },
);

testUnless(
  programMissing("jq"),
  "tailscale.sh leaves the inventory if tailscale prints nothing",
  async () => {
    await using user = await userFolder({});
    await Deno.writeTextFile(`${user.folder}/hosts.yaml`, "hosts: {}");

    const { code } = await runTailscale(user, "");

    assert(code !== 0);
    const text = await Deno.readTextFile(`${user.folder}/hosts.yaml`);
    assertEquals(text, "hosts: {}");
  },
);

testUnless(
  programMissing("promtool"),
  "Prometheus accepts the scrape config and its targets",
  async () => {
    await using user = await userFolder({
      "gpu-1": { tailscale_ip: "127.0.0.2" },
    });
    const [config] = codeBlocks(RECIPES, "yaml")
      .filter((text) => text.startsWith("scrape_configs:"));
    await Deno.writeTextFile(`${user.folder}/prometheus.yml`, config!);
    const [line] = codeBlocks(RECIPES, "sh")
      .filter((text) => text.includes("export prometheus"));

    const exported = await user.shell(line!);
    const checked = await user.shell("promtool check config prometheus.yml");
    const found = await user.shell(
      "promtool check service-discovery --timeout=1s prometheus.yml cluster",
    );

    assertEquals(exported.code, 0, exported.stderr);
    assertEquals(checked.code, 0, checked.stdout + checked.stderr);
    assertEquals(found.code, 0, found.stderr);
    const [{ labels }] = JSON.parse(found.stdout);
    assertEquals(labels.__address__, "127.0.0.1:9115");
    assertEquals(labels.__param_target, "http://127.0.0.2:8766/status");
    assertEquals(labels.instance, "gpu-1");
  },
);

/** Writes inventory.sh, and returns the rest of its example's line. */
async function installInventoryScript(user: UserFolder): Promise<string> {
  const script = fileIn(RECIPES, "sh", "inventory.sh");
  await writeProgram(`${user.folder}/inventory.sh`, script);
  return /ansible (-i .*)$/m.exec(script)![1]!;
}

testUnless(
  programMissing("ansible-inventory"),
  "Ansible finds the groups that the recipe names",
  async () => {
    await using user = await userFolder({
      "gpu-1": { tailscale_ip: "127.0.0.2", gpu: "H100", role: "worker" },
      "gpu-2": { tailscale_ip: "127.0.0.3", gpu: "RTX 5090" },
    });
    const example = await installInventoryScript(user);
    const [group] = /gpu_\w+/.exec(example)!;

    const { code, stdout, stderr } = await user.shell(
      "ansible-inventory -i ./inventory.sh --list",
    );

    assertEquals(code, 0, stderr);
    const inventory = JSON.parse(stdout);
    assertEquals(inventory[group].hosts, ["gpu-1"]);
    assertEquals(inventory.role_worker.hosts, ["gpu-1"]);
    assertEquals(inventory.gpu_RTX_5090.hosts, ["gpu-2"]);
  },
);

testUnless(
  programMissing("ansible"),
  "Ansible does not run a template in a key of the user's own",
  async () => {
    await using user = await userFolder({
      "gpu-1": {
        tailscale_ip: "127.0.0.2",
        owner: "{{ lookup('pipe', 'touch ran') }}",
      },
    });
    await installInventoryScript(user);

    const { code, stdout, stderr } = await user.shell(
      "ansible -i ./inventory.sh gpu-1 -c local -m debug -a var=owner",
    );

    assertEquals(code, 0, stdout + stderr);
    assertStringIncludes(stdout, "lookup('pipe'");
    const { code: isThere } = await user.shell("test ! -e ran");
    assertEquals(isThere, 0);
  },
);
