import { assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import {
  assertRefused,
  hostAt,
  type Hosts,
  runOnHosts,
  startCluster,
} from "./cluster.ts";
import { ROOT } from "./process.ts";
import { runMain } from "./run_main.ts";

const DEMO = `${ROOT}config/demo_hosts.yaml`;

/** Hosts whose names look like something else. */
const ODD: Hosts = Object.fromEntries(
  ["head", "gpu-1", "10", "010", "1.10", "a.b", "true", "__proto__"].map(
    (name) => [name, { tailscale_ip: "127.0.0.2", rack: name, gpu: "-x" }],
  ),
);

/** Forms of arguments, and the names that `nodes --names` prints for them. */
const FORMS: readonly (readonly [line: string, names: string])[] = [
  ["--role worker", "gpu-1 gpu-2 gpu-3"],
  ["--role=worker", "gpu-1 gpu-2 gpu-3"],
  ["--role Coordinator,nobody", "head"],
  ["--role worker --role coordinator", "head gpu-1 gpu-2 gpu-3"],
  ["--role worker,", "gpu-1 gpu-2 gpu-3"],
  ["gpu-1,head", "head gpu-1"],
  ["gpu-1 head gpu-1", "head gpu-1"],
  ["gpu-[1-8/2]", "gpu-1 gpu-3"],
  ["--exclude gpu-[1,3],head", "gpu-2"],
  ["--exclude gpu-1 --exclude head", "gpu-2 gpu-3"],
  ["--gpu h1,a1", "gpu-1 gpu-2 gpu-3"],
  ["--where rack=8", "gpu-2 gpu-3"],
  ["--where rack=7 --where rack=8 --where gpu=A100", "gpu-2 gpu-3"],
  ["--all", "head gpu-1 gpu-2 gpu-3 old-1"],
  ["--status retired --all", "old-1"],
  ["--status retired", "old-1"],
  ["old-1", "old-1"],
  ["-q head", "head"],
  ["-q -q head", "head"],
];

for (const [line, names] of FORMS) {
  Deno.test(`cluster-hosts nodes selects ${names} by ${line}`, async () => {
    await using cluster = await startCluster();
    const args = ["nodes", "--names", "-c", cluster.path];

    const result = await runMain([...args, ...line.split(" ")]);

    const stdout = names.replaceAll(" ", "\n") + "\n";
    assertEquals(result, { code: 0, stdout, stderr: "" });
  });
}

/** Forms in which the inventory is given; PATH stands for its path. */
const CONFIG_FORMS: readonly string[] = [
  "nodes --names -c PATH",
  "nodes --names -cPATH",
  "nodes --names -c=PATH",
  "nodes --names --config PATH",
  "nodes --names --config=PATH",
  "--config PATH nodes --names",
  "-c PATH --names nodes",
  "--names nodes -qc PATH",
  "nodes --names -qcPATH",
];

for (const form of CONFIG_FORMS) {
  Deno.test(`cluster-hosts reads the inventory of: ${form}`, async () => {
    await using cluster = await startCluster();

    const line = form.replace("PATH", cluster.path);
    const result = await runMain(line.split(" "));

    const stdout = "head\ngpu-1\ngpu-2\ngpu-3\n";
    assertEquals(result, { code: 0, stdout, stderr: "" });
  });
}

/** Lines of `status` on a node that is up, and one that is down. */
const DURATIONS = [
  "-t5s",
  "-t 2m",
  "-t 1500ms",
  "-t 1h",
  "-t 0.5",
  "-qt 1s",
  "-qt1s",
  "--timeout=1h",
];

for (const line of DURATIONS) {
  Deno.test(`cluster-hosts status takes the duration of ${line}`, async () => {
    await using cluster = await startCluster();
    const args = ["status", "head", "--names", "-c", cluster.path];

    const result = await runMain([...args, ...line.split(" ")]);

    assertEquals([result.code, result.stdout], [0, "head\n"], result.stderr);
  });
}

/** Words and values that parse-args alone would change: the line, and the name that it selects. */
const KEPT: readonly (readonly [line: string, name: string])[] = [
  ["10", "10"],
  ["010", "010"],
  ["1.10", "1.10"],
  ["a.b", "a.b"],
  ["true", "true"],
  ["__proto__", "__proto__"],
  ["--where rack=010", "010"],
  ["--where rack=__proto__", "__proto__"],
  ["--gpu=-x head", "head"],
];

for (const [line, name] of KEPT) {
  Deno.test(`cluster-hosts nodes keeps as it is written: ${line}`, async () => {
    const args = ["nodes", "--names", ...line.split(" ")];

    const result = await runOnHosts(ODD, args);

    assertEquals(result, { code: 0, stdout: `${name}\n`, stderr: "" });
  });
}

/** Values that an option does not take, with the answers. */
const REFUSED: readonly (readonly [line: string, answer: string])[] = [
  ["--json=true", "--json takes no value: write --json, or leave it out"],
  ["--quiet=no", "--quiet takes no value: write --quiet, or leave it out"],
  ["--quiet=", "--quiet takes no value: write --quiet, or leave it out"],
  ["-q=1", "--quiet takes no value: write --quiet, or leave it out"],
  ["--json false", 'No node matches "false"'],
  ["--gpu -q", "--gpu needs a value: TEXT"],
  ["--gpu", "--gpu needs a value: TEXT"],
  ["--gpu=", "--gpu needs a value: TEXT"],
  ["--gpu ,", '--gpu takes a comma-separated list, not ","'],
  ["-c a", "--config was given more than once"],
  ["--config=a", "--config was given more than once"],
  ["-qca", "--config was given more than once"],
];

for (const [line, answer] of REFUSED) {
  Deno.test(`cluster-hosts nodes rejects ${line}`, async () => {
    const result = await runOnHosts(ODD, ["nodes", ...line.split(" ")]);

    assertRefused(result, answer);
  });
}

/** Options that there are not; none of them may eat a word or set a property. */
const UNKNOWN = [
  "--a.b",
  "--a.b=1",
  "--__proto__",
  "--__proto__=1",
  "--constructor",
  "--toString=1",
  "--no-json",
  "--no-json=1",
  "---",
  "--=x",
  "-=",
  "-zq",
  "-5",
];

for (const option of UNKNOWN) {
  Deno.test(`cluster-hosts nodes rejects the option ${option}`, async () => {
    const { code, stdout, stderr } = await runMain(["nodes", option]);

    assertEquals([code, stdout], [2, ""]);
    assertMatch(stderr, /^cluster-hosts: Unknown option "[^\n]*\n$/);
  });
}

Deno.test("cluster-hosts names every fault of a line, not the first alone", async () => {
  const args = ["status", "--jsno", "--timeout", "x", "--port", "0"];

  const result = await runMain([...args, "-c", DEMO]);

  assertRefused(
    result,
    [
      'Unknown option "--jsno"; did you mean "--json"?',
      'cluster-hosts: --timeout takes seconds, or 500ms, 5s, 2m, 1h, not "x"',
      'cluster-hosts: --port takes a whole number from 1 to 65535, not "0"',
    ].join("\n"),
  );
});

const SSH_LINE = "ssh -n -o BatchMode=yes -o ConnectTimeout=10 " +
  "-o ServerAliveInterval=15 -p 22";

/** Words after "--" are the command; options of ssh keep their key. */
const REMOTE: readonly (readonly [line: string, printed: string])[] = [
  ["-- ls --json -q", "-- ubuntu@127.0.0.2 ls --json -q"],
  ["-- -x", "-- ubuntu@127.0.0.2 -x"],
  ["-- a -- b", "-- ubuntu@127.0.0.2 a -- b"],
  ["-oA=b -- ls", "-o A=b -- ubuntu@127.0.0.2 ls"],
  ["-o A=b -oC=d=e -- ls", "-o A=b -o C=d=e -- ubuntu@127.0.0.2 ls"],
  ["--ssh-option=A=b -- ls", "-o A=b -- ubuntu@127.0.0.2 ls"],
  ["-lroot -- ls", "-- root@127.0.0.2 ls"],
  ["-l root -- ls", "-- root@127.0.0.2 ls"],
];

for (const [line, printed] of REMOTE) {
  Deno.test(`cluster-hosts ssh --dry-run prints the command of: ${line}`, async () => {
    const hosts = { a: { tailscale_ip: "127.0.0.2" } };
    const args = ["ssh", "a", "--dry-run", ...line.split(" ")];

    const { code, stdout, stderr } = await runOnHosts(hosts, args);

    assertEquals([code, stdout, stderr], [0, `${SSH_LINE} ${printed}\n`, ""]);
  });
}

Deno.test("cluster-hosts finds a bad option before it fetches a URL inventory", async () => {
  let requests = 0;
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => {
      requests++;
      return new Response(
        JSON.stringify({ hosts: { a: hostAt({ port: 1 }) } }),
      );
    },
  );
  const url = `http://127.0.0.1:${server.addr.port}/hosts.yaml`;
  const lines = [
    "status --jsno",
    "status --timeout soon",
    "status --json --gather",
    "status --interval 5",
    "status -- uptime",
    "urls",
    "urls data --port 80",
    "export hosts",
    "export ssh-config --port 22",
    "ssh -- uptime",
    "ssh a -- bash",
    "ssh a --gather",
    "ssh a b",
    "coordinator a",
    "validate --watch",
    "permissions",
    "permissions stauts",
  ];

  for (const line of lines) {
    const [before = "", ...after] = line.split(/(?= -- )/);
    const remote = after.join("").split(" ").filter((word) => word !== "");
    const args = [...before.split(" "), "-c", url, ...remote];

    assertEquals((await runMain(args)).code, 2, line);
    assertEquals(requests, 0, line);
  }

  assertEquals((await runMain(["nodes", "-c", url])).code, 0);
  assertEquals(requests, 1);
});
