import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { startNode } from "./loopback_cluster.ts";
import {
  programMissing,
  run,
  runCli,
  type RunResult,
  testUnless,
  writeInventory,
} from "./process.ts";
import { runMain } from "./run_main.ts";
import {
  type Sshd,
  SSHD_ADDRESSES,
  sshdMissing,
  sshdTest,
  startAgent,
  startSshd,
} from "./sshd.ts";
import { configuredSsh, type FakeSsh, leftBy } from "./ssh_process.ts";

type Hosts = Readonly<Record<string, Readonly<Record<string, unknown>>>>;

/** Runs `cluster-hosts ssh` with the hosts of an inventory. */
async function ssh(
  hosts: Hosts,
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
  sections: Readonly<Record<string, unknown>> = {},
): Promise<RunResult> {
  await using inventory = await writeInventory(hosts, sections);
  return await runCli(["ssh", "--config", inventory.path, ...args], { env });
}

/** Makes an ssh that logs in at a jump host, which is called `jump`. */
async function sshWithJump(
  { port, user, keyPath, options }: Sshd,
): Promise<FakeSsh> {
  const common = options.map((option) => `  ${option.replace("=", " ")}`);
  const target = [
    `HostName ${SSHD_ADDRESSES[1]}`,
    `Port ${port}`,
    `User ${user}`,
    `IdentityFile ${keyPath}`,
  ];
  return await configuredSsh([
    "Host jump",
    ...target.map((line) => `  ${line}`),
    ...common,
  ]);
}

for (const section of ["the host", "defaults"] as const) {
  sshdTest(
    `cluster-hosts ssh takes the way over the ProxyJump of ${section}`,
    async (sshd) => {
      await using fake = await sshWithJump(sshd);
      // The jump host connects to an address that it alone knows: its own.
      const options = ["ProxyJump=jump", ...sshd.options];
      const host = section === "the host"
        ? { ...sshd.host, ssh_options: options }
        : sshd.host;
      const sections = section === "the host"
        ? {}
        : { defaults: { ssh_options: options } };

      const { code, stdout, stderr } = await ssh(
        { a: host },
        ["a", "--", "echo ran"],
        fake.env,
        sections,
      );

      assertEquals([code, stdout], [0, "a: ran\n"], stderr);
      assertEquals(
        await sshd.connections(),
        2,
        "one of the jump host, one of the node",
      );
      assertEquals(await leftBy(fake), []);
    },
  );
}

sshdTest(
  "cluster-hosts ssh takes the way over a ProxyCommand of the host",
  async (sshd) => {
    await using fake = await sshWithJump(sshd);
    const command =
      `ProxyCommand=ssh -F ${fake.folder}/ssh.config -W %h:%p jump`;
    const host = { ...sshd.host, ssh_options: [command, ...sshd.options] };
    const { code, stdout, stderr } = await ssh({ a: host }, [
      "a",
      "--",
      "echo ran",
    ], fake.env);
    assertEquals([code, stdout], [0, "a: ran\n"], stderr);
    assertEquals(await sshd.connections(), 2);
    assertEquals(await leftBy(fake), []);
  },
);

sshdTest(
  "cluster-hosts ssh accepts a new host key where ssh_options say so",
  async (sshd) => {
    const known = `${sshd.folder}/known_hosts`;
    const options = [
      `UserKnownHostsFile=${known}`,
      "GlobalKnownHostsFile=/dev/null",
    ];
    const host = (more: readonly string[]) => ({
      a: { ...sshd.host, ssh_options: [...options, ...more] },
    });

    const refused = await ssh(host([]), ["a", "--", "echo ran"]);
    assertEquals([refused.code, refused.stdout], [1, ""]);
    assertStringIncludes(refused.stderr, "StrictHostKeyChecking=accept-new");

    const accepted = await ssh(host(["StrictHostKeyChecking=accept-new"]), [
      "a",
      "--",
      "echo ran",
    ]);
    assertEquals(
      [accepted.code, accepted.stdout],
      [0, "a: ran\n"],
      accepted.stderr,
    );
  },
);

sshdTest(
  "cluster-hosts ssh replaces ssh_options of the host by --ssh-option",
  async (sshd) => {
    const host = {
      ...sshd.host,
      ssh_options: ["Port=1", "ProxyJump=nowhere.invalid"],
    };
    const flags = [
      ...sshd.flags,
      "--ssh-option",
      `Port=${sshd.port}`,
      "--ssh-option",
      "ProxyJump=none",
    ];
    const { code, stdout, stderr } = await ssh({ a: host }, [
      ...flags,
      "a",
      "--",
      "echo ran",
    ]);
    assertEquals([code, stdout], [0, "a: ran\n"], stderr);
  },
);

sshdTest("cluster-hosts ssh reports why a jump host is dead", async (sshd) => {
  await using dead = await startNode("refuses", { hostname: "127.0.0.4" });
  const jump = `ProxyJump=127.0.0.4:${dead.port}`;
  const { code, stdout } = await ssh({ a: sshd.host }, [
    ...sshd.flags,
    "--json",
    "--ssh-option",
    jump,
    "a",
    "--",
    "echo ran",
  ]);
  const [{ failure }] = JSON.parse(stdout).nodes;
  assertEquals([code, failure.code], [1, "ssh"]);
  assertMatch(
    failure.message,
    new RegExp(`127\\.0\\.0\\.4 port ${dead.port}: Connection refused`),
  );
});

sshdTest(
  "cluster-hosts ssh names no option that would not help where the key of a jump host is unknown",
  async (sshd) => {
    await using fake = await configuredSsh([
      `UserKnownHostsFile ${sshd.folder}/known`,
      "GlobalKnownHostsFile /dev/null",
    ]);
    const jump = `ProxyJump=${sshd.user}@${SSHD_ADDRESSES[1]}:${sshd.port}`;
    const args = [...sshd.flags, "--ssh-option", jump, "a", "--", "true"];
    const { code, stderr } = await ssh({ a: sshd.host }, args, fake.env);
    assertEquals(code, 1);
    assertStringIncludes(stderr, "Host key verification failed");
    assert(!stderr.includes("accept-new"), stderr);
  },
);

sshdTest(
  "cluster-hosts ssh reports an option that ssh does not know as a failure of ssh",
  async (sshd) => {
    const flags = [...sshd.flags, "--json", "--ssh-option", "NoSuchOpt=1"];
    const { code, stdout } = await ssh({ a: sshd.host }, [
      ...flags,
      "a",
      "--",
      "echo ran",
    ]);
    const [{ failure }] = JSON.parse(stdout).nodes;
    assertEquals([code, failure.code], [1, "ssh"]);
    assertMatch(failure.message, /bad configuration option: nosuchopt/i);
  },
);

testUnless(
  sshdMissing() ?? programMissing("ssh-agent"),
  "cluster-hosts ssh logs in with ssh_key although an agent holds seven other keys",
  async () => {
    await using sshd = await startSshd();
    await using agent = await startAgent(7);
    const trusting = sshd.options.filter((option) =>
      !option.startsWith("Identit")
    );
    const flags = trusting.flatMap((option) => ["--ssh-option", option]);

    // The agent alone is what the server gives up on.
    const { ssh_key: _, ...keyless } = sshd.host;
    const refused = await ssh(
      { a: keyless },
      [...flags, "a", "--", "echo ran"],
      agent.env,
    );
    assertEquals([refused.code, refused.stdout], [1, ""]);
    assertStringIncludes(refused.stderr, "Too many authentication failures");

    const { code, stdout, stderr } = await ssh({ a: sshd.host }, [
      ...flags,
      "a",
      "--",
      "echo ran",
    ], agent.env);
    assertEquals([code, stdout], [0, "a: ran\n"], stderr);
  },
);

/** What `ssh -G` says of hosts in the output of `export ssh-config`. */
async function exported(
  hosts: Hosts,
  sections: Readonly<Record<string, unknown>>,
  name: string,
) {
  await using inventory = await writeInventory(hosts, sections);
  const { code, stdout, stderr } = await runMain([
    "export",
    "ssh-config",
    "--config",
    inventory.path,
  ]);
  assertEquals(code, 0, stderr);
  const path = `${inventory.folder}/ssh_config`;
  await Deno.writeTextFile(path, stdout, { mode: 0o600 });
  const evaluated = await run("ssh", ["-T", "-G", "-F", path, "--", name]);
  assertEquals(evaluated.code, 0, evaluated.stderr);
  return evaluated.stdout.split("\n");
}

testUnless(
  programMissing("ssh"),
  "cluster-hosts export ssh-config has ssh_options, as ssh itself reads them",
  async () => {
    const hosts = {
      own: {
        ssh_host: "203.0.113.7",
        ssh_options: ["ProxyJump=ops@head:2222", "ServerAliveInterval=60"],
      },
      defaulted: { ssh_host: "203.0.113.8" },
      command: {
        ssh_host: "203.0.113.9",
        ssh_options: ["ProxyCommand=sh -c \"exec nc %h %p # 'x'\""],
      },
    };
    const sections = {
      defaults: {
        ssh_options: ["StrictHostKeyChecking=accept-new"],
        ssh_user: "root",
      },
    };

    const own = await exported(hosts, sections, "own");
    for (
      const line of [
        "proxyjump ops@head:2222",
        "serveraliveinterval 60",
        "hostname 203.0.113.7",
      ]
    ) {
      assert(own.includes(line), own.join("\n"));
    }
    const defaulted = await exported(hosts, sections, "defaulted");
    for (const line of ["stricthostkeychecking accept-new", "user root"]) {
      assert(defaulted.includes(line), defaulted.join("\n"));
    }
    const command = await exported(hosts, sections, "command");
    assert(
      command.includes("proxycommand sh -c \"exec nc %h %p # 'x'\""),
      command.join("\n"),
    );
  },
);

sshdTest(
  "cluster-hosts export ssh-config makes a plain ssh take the way over a jump host",
  async (sshd) => {
    const options = [...sshd.options, "ProxyJump=head"];
    await using inventory = await writeInventory({
      head: {
        ...sshd.host,
        tailscale_ip: SSHD_ADDRESSES[1],
        ssh_options: sshd.options,
      },
      "gpu-1": { ...sshd.host, ssh_options: options },
    });
    const { code, stdout, stderr } = await runMain([
      "export",
      "ssh-config",
      "--config",
      inventory.path,
    ]);
    assertEquals(code, 0, stderr);
    const path = `${inventory.folder}/ssh_config`;
    await Deno.writeTextFile(path, stdout, { mode: 0o600 });

    const result = await run("ssh", [
      "-F",
      path,
      "-o",
      "BatchMode=yes",
      "gpu-1",
      "echo ran",
    ]);

    assertEquals(
      [result.code, result.stdout.trim() !== ""],
      [0, true],
      result.stderr,
    );
    assertEquals(await sshd.connections(), 2);
  },
);

Deno.test("cluster-hosts permissions ssh asks for no net where ssh_options lead elsewhere", async () => {
  const two = {
    tailscale_ip: "127.0.0.1",
    ssh_host: "127.0.0.2",
    status: "active",
  };
  await using inventory = await writeInventory({
    raced: two,
    jumping: { ...two, ssh_options: ["ProxyJump=head"] },
  });
  const args = ["permissions", "ssh", "--config", inventory.path];
  const raced = await runMain([...args, "raced", "--", "true"]);
  assertStringIncludes(raced.stdout, "--allow-net=127.0.0.1:22,127.0.0.2:22");
  const jumping = await runMain([...args, "jumping", "--", "true"]);
  assertEquals([jumping.code, jumping.stdout.includes("--allow-net")], [
    0,
    false,
  ], jumping.stdout);
  assertStringIncludes(jumping.stdout, "--allow-run=ssh");
});
