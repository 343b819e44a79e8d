// deno-lint-ignore-file no-control-regex
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt } from "./cluster.ts";
import { startNode } from "./loopback_cluster.ts";
import { startMixed, startScattered, widthOf } from "./mixed.ts";
import { writeInventory } from "./process.ts";
import { type MainOptions, runMain } from "./run_main.ts";

/** A table as it was looked at. */
interface Snapshot {
  readonly line: string;
  /** The width of the terminal; 0 is a pipe. */
  readonly columns: number;
  readonly text: string;
}

const SNAPSHOTS: readonly Snapshot[] = [
  {
    line: "status",
    columns: 40,
    text: `
NAME             STATE      REASON
🚀gpu-2          down       refused: no…
ꀀ-yi            down       refused: no…
plain            down       no-address:…
café             unhealthy  http-status…
training-worke…  unhealthy  http-status…
漢字-1           up
👩‍💻               up
ㄅㄆ             up
`,
  },
  {
    line: "status --gather",
    columns: 40,
    text: `
NODES  STATE      REASON
    2  down       refused: nothing list…
       🚀gpu-2,ꀀ-yi
    1  down       no-address: set tails…
       plain
    2  unhealthy  http-status: HTTP 500
       café,training-worker.rack-07.dc1.example
    3  up         -
       漢字-1,👩‍💻,ㄅㄆ
`,
  },
  {
    line: "status --show version,nowhere.at.all",
    columns: 40,
    text: `
NAME             STATE      REASON
🚀gpu-2          down       refused: no…
ꀀ-yi            down       refused: no…
plain            down       no-address:…
café             unhealthy  http-status…
training-worke…  unhealthy  http-status…
漢字-1           up
👩‍💻               up
ㄅㄆ             up
`,
  },
  {
    line: "nodes",
    columns: 40,
    text: `
NAME                             STATUS
漢字-1                           active
🚀gpu-2                          active
café                             active
👩‍💻                               active
ㄅㄆ                             active
ꀀ-yi                            active
training-worker.rack-07.dc1.ex…  active
plain                            unknown
`,
  },
  {
    line: "nodes --all",
    columns: 40,
    text: `
NAME               STATUS   NOTE
漢字-1             active
🚀gpu-2            active
café               active
👩‍💻                 active
ㄅㄆ               active
ꀀ-yi              active
training-worker.…  active
plain              unknown
gone               retired  sold in 202…
`,
  },
  {
    line: "status",
    columns: 80,
    text: `
NAME                                 STATE      REASON
🚀gpu-2                              down       refused: nothing listens on the…
ꀀ-yi                                down       refused: nothing listens on the…
plain                                down       no-address: set tailscale_ip or…
café                                 unhealthy  http-status: HTTP 500
training-worker.rack-07.dc1.example  unhealthy  http-status: HTTP 500
漢字-1                               up
👩‍💻                                   up
ㄅㄆ                                 up
`,
  },
  {
    line: "status --gather",
    columns: 80,
    text: `
NODES  STATE      REASON                NAMES
    2  down       refused: nothing li…  🚀gpu-2,ꀀ-yi
    1  down       no-address: set tai…  plain
    2  unhealthy  http-status: HTTP 5…  café,training-worker.rack-07.dc1.example
    3  up         -                     漢字-1,👩‍💻,ㄅㄆ
`,
  },
  {
    line: "status --show version,nowhere.at.all",
    columns: 80,
    text: `
NAME                                 STATE      VERSION  NOWHERE.…  REASON
🚀gpu-2                              down       -        -          refused: no…
ꀀ-yi                                down       -        -          refused: no…
plain                                down       -        -          no-address:…
café                                 unhealthy  -        -          http-status…
training-worker.rack-07.dc1.example  unhealthy  -        -          http-status…
漢字-1                               up         1.4.2    -
👩‍💻                                   up         1.4.2    -
ㄅㄆ                                 up         1.4.2    -
`,
  },
  {
    line: "nodes",
    columns: 80,
    text: `
NAME                                ROLE     STATUS   GPU       ADDRESSES  DATA
漢字-1                              worker   active   RTX 5090  127.0.0.1  18760
🚀gpu-2                             worker   active   H100      127.0.0.1  18760
café                                worker   active   -         127.0.0.1  18760
👩‍💻                                  worker   active   -         127.0.0.1  18760
ㄅㄆ                                worker   active   -         127.0.0.1  18760
ꀀ-yi                               worker   active   -         127.0.0.1  18760
training-worker.rack-07.dc1.examp…  worker   active   GH200     127.0.0.1  18760
plain                               unknown  unknown  -         -          8766
`,
  },
  {
    line: "nodes --all",
    columns: 80,
    text: `
NAME                                 STATUS   NOTE
漢字-1                               active
🚀gpu-2                              active
café                                 active
👩‍💻                                   active
ㄅㄆ                                 active
ꀀ-yi                                active
training-worker.rack-07.dc1.example  active
plain                                unknown
gone                                 retired  sold in 2024, its disks are in th…
`,
  },
  {
    line: "status",
    columns: 120,
    text: `
NAME                                 ROLE     GPU       ADDRESS          LATENCY  STATE      REASON
🚀gpu-2                              worker   H100      127.0.0.1:18760        -  down       refused: nothing listens o…
ꀀ-yi                                worker   -         127.0.0.1:18760        -  down       refused: nothing listens o…
plain                                unknown  -         -                      -  down       no-address: set tailscale_…
café                                 worker   -         127.0.0.1:18760        -  unhealthy  http-status: HTTP 500
training-worker.rack-07.dc1.example  worker   GH200     127.0.0.1:18760        -  unhealthy  http-status: HTTP 500
漢字-1                               worker   RTX 5090  127.0.0.1:18760     N ms  up
👩‍💻                                   worker   -         127.0.0.1:18760     N ms  up
ㄅㄆ                                 worker   -         127.0.0.1:18760     N ms  up
`,
  },
  {
    line: "status --gather",
    columns: 120,
    text: `
NODES  STATE      REASON                                    NAMES
    2  down       refused: nothing listens on the port      🚀gpu-2,ꀀ-yi
    1  down       no-address: set tailscale_ip or ssh_host  plain
    2  unhealthy  http-status: HTTP 500                     café,training-worker.rack-07.dc1.example
    3  up         -                                         漢字-1,👩‍💻,ㄅㄆ
`,
  },
  {
    line: "status --show version,nowhere.at.all",
    columns: 120,
    text: `
NAME                                 LATENCY  STATE      VERSION  NOWHERE.AT.ALL  REASON
🚀gpu-2                                    -  down       -        -               refused: nothing listens on the port
ꀀ-yi                                      -  down       -        -               refused: nothing listens on the port
plain                                      -  down       -        -               no-address: set tailscale_ip or ssh_h…
café                                       -  unhealthy  -        -               http-status: HTTP 500
training-worker.rack-07.dc1.example        -  unhealthy  -        -               http-status: HTTP 500
漢字-1                                  N ms  up         1.4.2    -
👩‍💻                                      N ms  up         1.4.2    -
ㄅㄆ                                    N ms  up         1.4.2    -
`,
  },
  {
    line: "nodes",
    columns: 120,
    text: `
NAME                                 ROLE     STATUS   GPU       MEMORY  CPUS  ADDRESSES  DATA   SSH
漢字-1                               worker   active   RTX 5090       -     -  127.0.0.1  18760  ubuntu:22
🚀gpu-2                              worker   active   H100           -     -  127.0.0.1  18760  ubuntu:22
café                                 worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
👩‍💻                                   worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
ㄅㄆ                                 worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
ꀀ-yi                                worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
training-worker.rack-07.dc1.example  worker   active   GH200          -     -  127.0.0.1  18760  ubuntu:22
plain                                unknown  unknown  -              -     -  -          8766   ubuntu:22
`,
  },
  {
    line: "nodes --all",
    columns: 120,
    text: `
NAME                                 ROLE     STATUS   GPU       ADDRESSES  DATA   SSH        NOTE
漢字-1                               worker   active   RTX 5090  127.0.0.1  18760  ubuntu:22
🚀gpu-2                              worker   active   H100      127.0.0.1  18760  ubuntu:22
café                                 worker   active   -         127.0.0.1  18760  ubuntu:22
👩‍💻                                   worker   active   -         127.0.0.1  18760  ubuntu:22
ㄅㄆ                                 worker   active   -         127.0.0.1  18760  ubuntu:22
ꀀ-yi                                worker   active   -         127.0.0.1  18760  ubuntu:22
training-worker.rack-07.dc1.example  worker   active   GH200     127.0.0.1  18760  ubuntu:22
plain                                unknown  unknown  -         -          8766   ubuntu:22
gone                                 worker   retired  -         127.0.0.1  18760  ubuntu:22  sold in 2024, its disks a…
`,
  },
  {
    line: "status",
    columns: 0,
    text: `
NAME                                 ROLE     GPU       ADDRESS          LATENCY  STATE      VERSION  GAMES  REASON
🚀gpu-2                              worker   H100      127.0.0.1:18760        -  down       -            -  refused: nothing listens on the port
ꀀ-yi                                worker   -         127.0.0.1:18760        -  down       -            -  refused: nothing listens on the port
plain                                unknown  -         -                      -  down       -            -  no-address: set tailscale_ip or ssh_host
café                                 worker   -         127.0.0.1:18760        -  unhealthy  -            -  http-status: HTTP 500
training-worker.rack-07.dc1.example  worker   GH200     127.0.0.1:18760        -  unhealthy  -            -  http-status: HTTP 500
漢字-1                               worker   RTX 5090  127.0.0.1:18760     N ms  up         1.4.2       12
👩‍💻                                   worker   -         127.0.0.1:18760     N ms  up         1.4.2       12
ㄅㄆ                                 worker   -         127.0.0.1:18760     N ms  up         1.4.2       12
`,
  },
  {
    line: "status --gather",
    columns: 0,
    text: `
NODES  STATE      REASON                                    NAMES
    2  down       refused: nothing listens on the port      🚀gpu-2,ꀀ-yi
    1  down       no-address: set tailscale_ip or ssh_host  plain
    2  unhealthy  http-status: HTTP 500                     café,training-worker.rack-07.dc1.example
    3  up         -                                         漢字-1,👩‍💻,ㄅㄆ
`,
  },
  {
    line: "status --show version,nowhere.at.all",
    columns: 0,
    text: `
NAME                                 ROLE     GPU       ADDRESS          LATENCY  STATE      VERSION  NOWHERE.AT.ALL  REASON
🚀gpu-2                              worker   H100      127.0.0.1:18760        -  down       -        -               refused: nothing listens on the port
ꀀ-yi                                worker   -         127.0.0.1:18760        -  down       -        -               refused: nothing listens on the port
plain                                unknown  -         -                      -  down       -        -               no-address: set tailscale_ip or ssh_host
café                                 worker   -         127.0.0.1:18760        -  unhealthy  -        -               http-status: HTTP 500
training-worker.rack-07.dc1.example  worker   GH200     127.0.0.1:18760        -  unhealthy  -        -               http-status: HTTP 500
漢字-1                               worker   RTX 5090  127.0.0.1:18760     N ms  up         1.4.2    -
👩‍💻                                   worker   -         127.0.0.1:18760     N ms  up         1.4.2    -
ㄅㄆ                                 worker   -         127.0.0.1:18760     N ms  up         1.4.2    -
`,
  },
  {
    line: "nodes --all",
    columns: 0,
    text: `
NAME                                 ROLE     STATUS   GPU       MEMORY  CPUS  ADDRESSES  DATA   SSH        NOTE
漢字-1                               worker   active   RTX 5090       -     -  127.0.0.1  18760  ubuntu:22
🚀gpu-2                              worker   active   H100           -     -  127.0.0.1  18760  ubuntu:22
café                                 worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
👩‍💻                                   worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
ㄅㄆ                                 worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
ꀀ-yi                                worker   active   -              -     -  127.0.0.1  18760  ubuntu:22
training-worker.rack-07.dc1.example  worker   active   GH200          -     -  127.0.0.1  18760  ubuntu:22
plain                                unknown  unknown  -              -     -  -          8766   ubuntu:22
gone                                 worker   retired  -              -     -  127.0.0.1  18760  ubuntu:22  sold in 2024, its disks are in the archive
`,
  },
];

for (const { line, columns, text } of SNAPSHOTS) {
  const place = columns > 0 ? `at ${columns} columns` : "to a pipe";

  Deno.test(`cluster-hosts ${line} prints the table that was looked at, ${place}`, async () => {
    await using cluster = await startMixed();
    const options = columns > 0 ? { columns } : {};

    const args = [...line.split(" "), "-c", cluster.path];
    const { stdout } = await runMain(args, options);

    assertEquals(`\n${cluster.stable(stdout)}`, text);
  });
}

const WIDE_LINES = [
  "status",
  "status --show version,game_count,nowhere",
  "nodes",
  "nodes --all",
];

for (const line of WIDE_LINES) {
  Deno.test(`cluster-hosts ${line} prints each row on one line, from 40 to 140 columns`, async () => {
    await using cluster = await startMixed();
    const [command] = line.split(" ");
    const titles = command === "status"
      ? ["NAME", "STATE", "REASON"]
      : ["NAME", "STATUS"];

    for (let columns = 40; columns <= 140; columns += 5) {
      const args = [...line.split(" "), "-c", cluster.path];
      const { stdout } = await runMain(args, { columns });

      const [header = "", ...rows] = stdout.trimEnd().split("\n");
      assertEquals(rows.length, line === "nodes --all" ? 9 : 8);
      for (const row of [header, ...rows]) {
        assert(widthOf(row) <= columns, `${columns}: ${row}`);
      }
      for (const title of titles) assertStringIncludes(header, title);
    }
  });
}

Deno.test("cluster-hosts status aligns its columns as a terminal shows the names", async () => {
  await using cluster = await startMixed();

  const { stdout } = await runMain(["status", "-c", cluster.path]);

  const [header = "", ...rows] = stdout.trimEnd().split("\n");
  const at = header.indexOf("STATE");
  for (const row of rows) {
    const before = row.slice(0, row.search(/ (up|down|unhealthy)( |$)/) + 1);
    assertEquals(widthOf(before), at, row);
  }
});

Deno.test("cluster-hosts status drops more columns the narrower the terminal, in one order", async () => {
  await using node = await startNode("ok");
  await using dead = await startNode("refuses");
  const fields = { role: "worker", gpu: "H100" };
  await using inventory = await writeInventory({
    "gpu-1": hostAt(node, fields),
    "gpu-2": hostAt(dead, fields),
  });
  const order = ["GAMES", "VERSION", "GPU", "ROLE", "ADDRESS", "LATENCY"];
  let dropped = order.length;

  for (let columns = 40; columns <= 160; columns++) {
    const args = ["status", "-c", inventory.path];
    const { stdout } = await runMain(args, { columns });
    const [header = ""] = stdout.split("\n");

    const missing = order.filter((title) => !header.includes(title));
    assertEquals(missing, order.slice(0, missing.length), `${columns}`);
    assert(missing.length <= dropped, `${columns} drops more than before`);
    dropped = missing.length;
  }
  assertEquals(dropped, 0);
});

Deno.test("cluster-hosts nodes on a terminal keeps SSH and DATA before a NOTE that is empty", async () => {
  await using inventory = await writeInventory({
    "gpu-1": hostAt({ port: 8766 }, { role: "worker", gpu: "H100" }),
  });

  const args = ["nodes", "-c", inventory.path];
  const { stdout } = await runMain(args, { columns: 80 });

  const [header = ""] = stdout.split("\n");
  assertEquals(
    header.replace(/ +/g, " "),
    "NAME ROLE STATUS GPU MEMORY CPUS ADDRESSES DATA SSH",
  );
});

for (const columns of [40, 80, 120]) {
  Deno.test(`cluster-hosts status --gather at ${columns} columns prints names that NODE takes back`, async () => {
    await using cluster = await startScattered();
    const args = ["-c", cluster.path];

    const { stdout } = await runMain(["status", "--gather", ...args], {
      columns,
    });
    const { stdout: expected } = await runMain(
      ["status", "--only", "down", "--names", ...args],
    );

    const folded = "gpu-3,storage.dc[1-2],eval-a100-west";
    assertMatch(stdout, /\bgpu-3,storage\.dc\[1-2\],eval-a100-west\n/);
    assertMatch(stdout, /\bgateway-frankfurt\n/);
    assertMatch(stdout, /\bhead,gpu-\[1-2,4-12\]\n/);
    const words = ["nodes", "--names", folded, "gateway-frankfurt", ...args];
    assertEquals((await runMain(words)).stdout, expected);
  });
}

Deno.test("cluster-hosts status prints the one node of 300 that is down first", async () => {
  await using up = await startNode("ok");
  await using dead = await startNode("refuses");
  const hosts = Array.from({ length: 300 }, (_, index) => {
    return [`gpu-${index}`, hostAt(index === 281 ? dead : up)];
  });
  await using inventory = await writeInventory(Object.fromEntries(hosts));
  const args = ["status", "-c", inventory.path];

  const { code, stdout, stderr } = await runMain(args, { columns: 80 });
  assertEquals(code, 1);
  assertMatch(stdout.split("\n")[1]!, /^gpu-281 .* down +refused: /);
  assertMatch(stderr, /: 299 of 300 nodes up, 1 down \(1 refused\) in /);

  const gathered = await runMain([...args, "--gather"], { columns: 80 });
  const rows = gathered.stdout.split("\n").slice(1, 3);
  assertEquals(rows.map((row) => row.replace(/ {2,}/g, "  ")), [
    "  1  down  refused: nothing listens on the port  gpu-281",
    "  299  up  -  gpu-[0-280,282-299]",
  ]);
});

Deno.test("cluster-hosts status keeps the inventory's order within a state", async () => {
  await using silent = await startNode("silent");
  await using dead = await startNode("refuses");
  await using inventory = await writeInventory({
    late: hostAt(silent),
    b: hostAt(dead),
    a: hostAt(dead),
    later: hostAt(silent),
  });

  const args = ["status", "-c", inventory.path, "-t", "300ms"];
  const { stdout } = await runMain(args, { columns: 80 });

  const rows = stdout.match(/^(a|b|late|later)\b/gm);
  assertEquals(rows?.join(" "), "b a late later");
});

// --- Colour and progress ---

const COLOURFUL: MainOptions = {
  columns: 200,
  isErrTerminal: true,
  hasColour: true,
};

Deno.test("cluster-hosts status on a terminal colours the states, and removes its progress", async () => {
  await using cluster = await startMixed();

  const args = ["status", "-c", cluster.path];
  const { stdout, stderr } = await runMain(args, COLOURFUL);

  assertMatch(
    stderr,
    /^\rchecked 0\/8, 0s\x1b\[K(\rchecked \d\/8, \ds\x1b\[K)*\r\x1b\[K/,
  );
  assertStringIncludes(stdout, "\x1b[1mNAME\x1b[0m");
  for (const [colour, state] of [[32, "up"], [33, "unhealthy"], [31, "down"]]) {
    assertStringIncludes(stdout, `\x1b[${colour}m${state}\x1b[0m`);
  }
});

Deno.test("cluster-hosts nodes on a terminal prints an inactive status faintly", async () => {
  await using cluster = await startMixed();

  const args = ["nodes", "--all", "-c", cluster.path];
  const { stdout } = await runMain(args, COLOURFUL);

  assertStringIncludes(stdout, "\x1b[2mretired\x1b[0m");
});

Deno.test({
  name: "cluster-hosts wait on a terminal says for whom it waits",
  // Deno drops a connection that is made at the moment when its signal aborts.
  sanitizeResources: false,
  async fn() {
    await using cluster = await startScattered();
    const args = ["wait", "gpu-*", "-t", "1s", "--interval", "100ms"];

    const { stderr } = await runMain([...args, "-c", cluster.path], COLOURFUL);

    assertMatch(
      stderr,
      /^\rwaiting, 0s, for gpu-\[1-12\] \(no answer yet\)\x1b/,
    );
    assertMatch(stderr, /\rwaiting, \ds, for gpu-3 \(refused\)\x1b\[K/);
  },
});

const COLOURLESS: readonly (readonly [name: string, options: MainOptions])[] = [
  ["to a pipe", {}],
  ["with NO_COLOR", { ...COLOURFUL, hasColour: false }],
  ["with TERM=dumb", { ...COLOURFUL, isDumb: true }],
];

for (const [name, options] of COLOURLESS) {
  Deno.test(`cluster-hosts status prints no colour ${name}`, async () => {
    await using cluster = await startMixed();

    const args = ["status", "-c", cluster.path];
    const { stdout } = await runMain(args, options);

    assert(!stdout.includes("\x1b"), stdout);
  });
}

Deno.test("cluster-hosts status --json prints no colour on a terminal", async () => {
  await using cluster = await startMixed();

  const args = ["status", "--json", "-c", cluster.path];
  const { stdout } = await runMain(args, COLOURFUL);

  assert(!stdout.includes("\x1b"), stdout);
});

Deno.test("cluster-hosts status shows no progress on a terminal without a cursor", async () => {
  await using cluster = await startMixed();

  const args = ["status", "-c", cluster.path];
  const { stderr } = await runMain(args, { ...COLOURFUL, isDumb: true });

  assert(!stderr.includes("\r"), stderr);
});
