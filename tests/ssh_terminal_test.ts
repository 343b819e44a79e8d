import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { denoRun, testUnless, writeInventory } from "./process.ts";
import {
  remoteTerminalMissing,
  type Sshd,
  SSHD_ADDRESSES,
  sshdMissing,
  startSshd,
} from "./sshd.ts";
import {
  configuredSsh,
  eventually,
  FAKES,
  type FakeSsh,
  fakeSsh,
  leftBy,
} from "./ssh_process.ts";
import {
  CTRL_C,
  startTerminal,
  type Terminal,
  terminalMissing,
} from "./terminal.ts";

type Hosts = Readonly<Record<string, Readonly<Record<string, unknown>>>>;

const MISSING = sshdMissing() ?? terminalMissing();

/** How often each Ctrl-C test interrupts a run. */
const ROUNDS = Number(Deno.env.get("CTRL_C_ROUNDS") ?? 2);

const LOCAL = { tailscale_ip: "127.0.0.1", status: "active" };

function numbered(
  count: number,
  fields: Readonly<Record<string, unknown>>,
): Hosts {
  const names = Array.from({ length: count }, (_, index) => `gpu-${index + 1}`);
  return Object.fromEntries(names.map((name) => [name, fields]));
}

/** Starts `cluster-hosts ssh` on a terminal. */
async function startSsh(
  config: string,
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Promise<Terminal> {
  const command = [
    "deno",
    ...denoRun(["-P=cli"], "cli.ts"),
    "ssh",
    "--config",
    config,
    ...args,
  ];
  return await startTerminal(command, env);
}

/** How a run takes its way to the nodes. */
const WAYS: Readonly<Record<string, (fake: FakeSsh) => readonly string[]>> = {
  directly: () => [],
  "over a ProxyCommand": (
    fake,
  ) => [`ProxyCommand=ssh -F ${fake.folder}/ssh.config -W %h:%p jump`],
  "over a ProxyJump": () => ["ProxyJump=jump"],
};

/** The configuration with which every ssh trusts an sshd, as a jump host too. */
function configOf({ port, user, keyPath, options }: Sshd): string[] {
  const common = options.map((option) => option.replace("=", " "));
  return [
    ...common,
    "Host jump",
    `HostName ${SSHD_ADDRESSES[1]}`,
    `Port ${port}`,
    `User ${user}`,
    `IdentityFile ${keyPath}`,
  ];
}

/** Interrupts a run when all are under way, or amid the start of the others. */
async function interrupt(
  config: string,
  args: readonly string[],
  fake: FakeSsh,
  atOnce: number,
  isAmid: boolean,
) {
  const before = (await fake.calls()).length;
  const calls = async () => (await fake.calls()).length - before;
  await using terminal = await startSsh(config, args, fake.env);

  if (isAmid) {
    await eventually(calls, (count) => count > 0);
    await delay(Math.random() * 300);
  } else {
    await eventually(calls, (count) => count === atOnce);
    await terminal.until(/: started/);
  }
  await terminal.type(CTRL_C);
  const { code, shown } = await terminal.ended();

  const atEnd = await calls();
  const left = await leftBy(fake);
  return { code, shown, left, atEnd, later: await calls() };
}

for (const [way, options] of Object.entries(WAYS)) {
  for (const [count, concurrency] of [[6, 32], [6, 1], [40, 32]] as const) {
    const atOnce = Math.min(count, concurrency);
    testUnless(
      MISSING,
      `cluster-hosts ssh ends with 130 at Ctrl-C on a terminal, of ${count} nodes ${way}, ${atOnce} at once`,
      async () => {
        await using sshd = await startSshd();
        await using fake = await configuredSsh(configOf(sshd));
        const host = { ...sshd.host, ssh_options: options(fake) };
        await using inventory = await writeInventory(numbered(count, host));
        const own = options(fake).flatMap((option) => ["--ssh-option", option]);
        const args = [
          ...own,
          "*",
          "--concurrency",
          String(concurrency),
          "--",
          "echo started; exec sleep 30",
        ];

        for (let round = 0; round < ROUNDS; round++) {
          const isAmid = round % 2 === 1;
          const { code, shown, left, atEnd, later } = await interrupt(
            inventory.path,
            args,
            fake,
            atOnce,
            isAmid,
          );

          const what = `round ${round}: ${shown}`;
          assertEquals(code, 130, what);
          assertEquals(left, [], what);
          // None of those that waited for their turn was started after it.
          assertEquals(later, atEnd, what);
          assert(
            isAmid ? atEnd <= atOnce : atEnd === atOnce,
            `${atEnd} started; ${what}`,
          );
          assert(!/exit code 255|: ssh: /.test(shown), what);
          if (!isAmid) {
            assertMatch(
              shown,
              /signal: .*may (still )?(go on|be running)/,
              what,
            );
          }
          await sshd.endCommands();
        }
      },
    );
  }
}

testUnless(
  terminalMissing(),
  "cluster-hosts ssh keeps Ctrl-C of the terminal from every ssh",
  async () => {
    await using fake = await fakeSsh(
      `trap 'echo interrupted >> "$0.calls"' INT\n${FAKES.polite}`,
    );
    await using inventory = await writeInventory(numbered(3, LOCAL));
    await using terminal = await startSsh(
      inventory.path,
      ["*", "--", "x"],
      fake.env,
    );
    await terminal.until(
      /gpu-1: started[^]*gpu-2: started|gpu-2: started[^]*gpu-1: started/,
    );
    await eventually(fake.pids, (pids) => pids.length === 3);
    await terminal.type(CTRL_C);
    assertEquals((await terminal.ended()).code, 130);
    assertEquals(await fake.calls(), [
      "asked to end",
      "asked to end",
      "asked to end",
    ]);
  },
);

testUnless(
  MISSING,
  "cluster-hosts ssh asks nothing on the terminal of a jump host that is not known",
  async () => {
    await using sshd = await startSshd();
    await using fake = await configuredSsh([
      `UserKnownHostsFile ${sshd.folder}/known`,
      "GlobalKnownHostsFile /dev/null",
    ]);
    await using inventory = await writeInventory({ a: sshd.host });
    const jump = `ProxyJump=${sshd.user}@${SSHD_ADDRESSES[1]}:${sshd.port}`;
    await using terminal = await startSsh(inventory.path, [
      "a",
      "--ssh-option",
      jump,
      "--",
      "true",
    ], fake.env);
    await eventually(
      terminal.shown,
      (shown) => /Are you sure|1 returned 0/.test(shown),
    );
    // What is typed now is no answer.
    await terminal.type("yes\n");

    const { code, shown } = await terminal.ended();

    assert(!/Are you sure|fingerprint/.test(shown), shown);
    assertMatch(shown, /Host key verification failed/);
    assertEquals([code, await leftBy(fake)], [1, []]);
  },
);

for (const mode of ["--gather", "--json", "-q"]) {
  testUnless(
    MISSING,
    `cluster-hosts ssh ${mode} shows a banner on a terminal while the login waits`,
    async () => {
      // As that of Tailscale's check mode, it comes before the login is done.
      await using fake = await fakeSsh(
        `echo 'To log in, visit https://login.example/abc' >&2
while [ ! -e "$0.gate" ]; do sleep 0.05; done; echo hello`,
      );
      await using inventory = await writeInventory({ a: LOCAL });
      await using terminal = await startSsh(inventory.path, [
        mode,
        "a",
        "--",
        "x",
      ], fake.env);

      const before = await terminal.until(/https:\/\/login\.example\/abc/);
      await Deno.writeTextFile(`${fake.folder}/ssh.gate`, "");
      const { code, shown } = await terminal.ended();

      assertMatch(before, /https:\/\/login\.example\/abc/);
      assert(!before.includes("hello"), before);
      assertMatch(shown, /hello/);
      assertEquals(code, 0);
    },
  );
}

for (const mode of [[], ["--gather"]]) {
  const how = mode.length > 0 ? " --gather" : "";
  testUnless(
    terminalMissing(),
    `cluster-hosts ssh${how} shows on a terminal for whom it waits`,
    async () => {
      await using fake = await fakeSsh(
        'while [ ! -e "$0.gate" ]; do sleep 0.05; done; echo hello',
      );
      await using inventory = await writeInventory(numbered(6, LOCAL));
      await using terminal = await startSsh(inventory.path, [
        ...mode,
        "*",
        "--",
        "x",
      ], fake.env);
      const waiting = await terminal.until(/gpu-\[1-6\]/);
      assertMatch(waiting, /gpu-\[1-6\]/);
      await Deno.writeTextFile(`${fake.folder}/ssh.gate`, "");
      const { code, shown } = await terminal.ended();
      assertEquals(code, 0);
      assertMatch(shown, /6 of 6 returned 0/);
    },
  );
}

testUnless(
  remoteTerminalMissing() ?? terminalMissing(),
  "cluster-hosts ssh without a command logs in, with the terminal and the exit code of ssh",
  async () => {
    await using sshd = await startSshd();
    await using inventory = await writeInventory({ a: sshd.host });
    await using terminal = await startSsh(inventory.path, ["a", ...sshd.flags]);
    await terminal.type("tty; echo $((6 * 7)); exit 3\n");
    const { code, shown } = await terminal.ended();
    assertMatch(shown, /\/dev\/pts\/\d+/);
    assertMatch(shown, /^42$/m);
    assertEquals(code, 3);
  },
);

testUnless(
  remoteTerminalMissing() ?? terminalMissing(),
  "cluster-hosts ssh leaves Ctrl-C to the program on the other side of a login",
  async () => {
    await using sshd = await startSshd();
    await using inventory = await writeInventory({ a: sshd.host });
    await using terminal = await startSsh(inventory.path, ["a", ...sshd.flags]);
    await terminal.type("echo rea''dy; sleep 30\n");
    await terminal.until(/ready$/m);
    await terminal.type(CTRL_C);
    await terminal.type("echo $?; exit 4\n");
    const { code, shown } = await terminal.ended();
    assertMatch(shown, /130$/m);
    assertEquals(code, 4);
  },
);
