import { assert, assertEquals } from "jsr:@std/assert@^1.0.19";
import { assertRefused } from "./cluster.ts";
import { ROOT, runCli, tempFolder } from "./process.ts";
import { runMain } from "./run_main.ts";

const DEMO = `${ROOT}config/demo_hosts.yaml`;

/** A line that a hurried person types, with its answer. */
interface Hurried {
  readonly line: string;
  readonly answer: string;
  /** What whoever follows the answer types next: it must not be refused. */
  readonly then?: string;
}

const SSH_USAGE =
  'put the command after "--": cluster-hosts ssh gpu-1 -- uptime';
const NEEDS_NODE = "ssh needs a NODE, or --role, --gpu, --status or --where; " +
  "'*' is every active node";
const DURATION = "takes seconds, or 500ms, 5s, 2m, 1h";
const NAME_NODES = "name the nodes without an option, as in 'gpu-[1-8]'; " +
  "'*' is every active node";
const DRY = "--dry-run -- uptime";

const HURRIED: readonly Hurried[] = [
  // Commands.
  {
    line: "stauts",
    answer: 'Unknown command "stauts"; did you mean "status"?',
    then: "status",
  },
  {
    line: "Status",
    answer: 'Unknown command "Status"; did you mean "status"?',
    then: "status",
  },
  {
    line: "frobnicate",
    answer: 'Unknown command "frobnicate"; see cluster-hosts --help',
    then: "--help",
  },
  {
    line: "__proto__",
    answer: 'Unknown command "__proto__"; see cluster-hosts --help',
  },
  {
    line: "constructor",
    answer: 'Unknown command "constructor"; see cluster-hosts --help',
  },
  {
    line: "list",
    answer: 'Unknown command "list"; did you mean "nodes"?',
    then: "nodes",
  },
  {
    line: "ls",
    answer: 'Unknown command "ls"; did you mean "nodes"?',
    then: "nodes",
  },
  {
    line: "ping gpu-1",
    answer: 'Unknown command "ping"; did you mean "status"?',
    then: "status gpu-1",
  },
  {
    line: "exec gpu-1 -- uptime",
    answer: 'Unknown command "exec"; did you mean "ssh"?',
    then: `ssh gpu-1 ${DRY}`,
  },
  {
    line: "run gpu-1 uptime",
    answer: 'Unknown command "run"; did you mean "ssh"?',
  },
  {
    line: "gpu-1 status",
    answer: 'Unknown command "gpu-1"; put the command first: ' +
      "cluster-hosts status [NODE...] [options]",
    then: "status gpu-1",
  },
  {
    line: "help stauts",
    answer: 'Unknown command "stauts"; did you mean "status"?',
    then: "help status",
  },
  {
    line: "--json",
    answer: "No command given; see cluster-hosts --help",
    then: "--help",
  },

  // Options that are mistyped, or in the wrong place.
  {
    line: "status --jsno",
    answer: 'Unknown option "--jsno"; did you mean "--json"?',
    then: "status --json",
  },
  {
    line: "status --JSON",
    answer: 'Unknown option "--JSON"; did you mean "--json"?',
    then: "status --json",
  },
  {
    line: "status --frob",
    answer: 'Unknown option "--frob"; see cluster-hosts status --help',
    then: "status --help",
  },
  {
    line: "nodes --watch",
    answer: "nodes does not take --watch; see cluster-hosts nodes --help",
    then: "nodes --help",
  },
  {
    line: "permissions nodes --watch",
    answer: "nodes does not take --watch; see cluster-hosts nodes --help",
  },
  {
    line: "status --down",
    answer: "status does not take --down: write --only down",
    then: "status --only down",
  },
  {
    line: "status --interval 5",
    answer: "--interval requires --watch",
  },
  {
    line: "status --json --gather",
    answer: "--json and --gather cannot be used together",
  },
  {
    line: "status --watch --names",
    answer: "--watch and --names cannot be used together",
  },
  {
    line: "status --watch --min-up 2",
    answer: "--min-up and --watch cannot be used together",
  },
  {
    line: "status --ssh --port 22",
    answer: "--ssh and --port cannot be used together",
    then: "status --ssh",
  },
  {
    line: "status --tcp --path /x",
    answer: "--tcp and --path cannot be used together",
  },
  {
    line: "status --ssh --show version",
    answer: "--ssh and --show cannot be used together",
  },
  {
    line: "wait --down --min-up 2",
    answer: "--down and --min-up cannot be used together",
  },

  // Values.
  {
    line: "status -t0",
    answer: `--timeout ${DURATION}, not "0"`,
    then: "status -t 1h",
  },
  {
    line: "status --timeout soon",
    answer: `--timeout ${DURATION}, not "soon"`,
    then: "status --timeout 500ms",
  },
  {
    line: "status --timeout 99d",
    answer: `--timeout ${DURATION}, not "99d"`,
    then: "status --timeout 2m",
  },
  { line: "status --timeout", answer: "--timeout needs a value: TIME" },
  { line: "status --role --json", answer: "--role needs a value: ROLE" },
  { line: "status --timeout=", answer: "--timeout needs a value: TIME" },
  {
    line: "status --port 0",
    answer: '--port takes a whole number from 1 to 65535, not "0"',
  },
  {
    line: "status --port 80.5",
    answer: '--port takes a whole number from 1 to 65535, not "80.5"',
  },
  {
    line: "status --port 65536",
    answer: '--port takes a whole number from 1 to 65535, not "65536"',
    then: "status --port 65535",
  },
  {
    line: "status --concurrency 1e3",
    answer: '--concurrency takes a whole number from 1 to 1000000, not "1e3"',
  },
  {
    line: "status --min-up 0",
    answer: '--min-up takes a number from 1, or 1% to 100%, not "0"',
    then: "status --min-up 100%",
  },
  {
    line: "status --min-up 101%",
    answer: '--min-up takes a number from 1, or 1% to 100%, not "101%"',
  },
  {
    line: "status --min-up 9",
    answer: "--min-up 9, but only 8 nodes are selected",
  },
  {
    line: "status --only donw",
    answer: '--only takes up, unhealthy, down, unknown or problems, not "donw"',
    then: "status --only problems",
  },
  {
    line: "status --where rack",
    answer: '--where takes KEY=VALUE, not "rack"',
  },
  {
    line: "status --path x",
    answer: '--path takes a path that begins with "/", not "x"',
    then: "status --path /x",
  },

  // Nodes.
  {
    line: "status gpu-x",
    answer: 'No node matches "gpu-x" (did you mean "gpu-1"?)',
    then: "status gpu-1",
  },
  {
    line: "status GPU-1",
    answer: 'No node matches "GPU-1" (did you mean "gpu-1"?)',
    then: "status gpu-1",
  },
  {
    line: "nodes gpu-[12]",
    answer: 'No node matches "gpu-[12]" (did you mean "gpu-[1,2]"?)',
    then: "nodes gpu-[1,2]",
  },
  {
    line: "nodes tpu-* gpu-[8-9]",
    answer: 'No node matches "tpu-*", "gpu-[8-9]"',
  },
  { line: "status --exclude tpu", answer: 'No node matches "tpu"' },
  {
    line: "coordinator gpu-1",
    answer: "coordinator takes no NODE, but got gpu-1; " +
      "a file is given as --config FILE",
  },
  {
    line: "validate new.yaml",
    answer: "validate takes no NODE, but got new.yaml; " +
      "a file is given as --config FILE",
  },

  // Kinds.
  { line: "urls", answer: "urls needs one of: elo, data, models" },
  {
    line: "urls modles",
    answer: 'Unknown kind "modles"; did you mean "models"?',
    then: "urls models --unchecked",
  },
  {
    line: "urls data --port 80",
    answer: "urls data takes each node's own port and URL: " +
      "leave out data, or --port and --path",
    then: "urls --port 80 --unchecked",
  },
  {
    line: "export",
    answer: "export needs one of: ansible, prometheus, ssh-config",
    then: "export ansible",
  },
  {
    line: "export promtheus",
    answer: 'Unknown kind "promtheus"; did you mean "prometheus"?',
    then: "export prometheus",
  },
  {
    line: "export hosts",
    answer: 'Unknown kind "hosts"; ' +
      "export takes one of: ansible, prometheus, ssh-config",
    then: "export ssh-config",
  },
  {
    line: "export ssh-config --port 22",
    answer: "--port and --path are for export prometheus",
    then: "export prometheus --port 22",
  },
  {
    line: "permissions",
    answer: "permissions needs a command: cluster-hosts permissions status",
    then: "permissions status",
  },
  {
    line: "permissions statsu",
    answer: 'Unknown command "statsu"; did you mean "status"?',
    then: "permissions status",
  },
  {
    line: "status -- uptime",
    answer: 'status takes no command after "--"',
  },

  // Those who come from ssh.
  {
    line: "ssh gpu-1 uptime",
    answer: `A login takes one NODE, not 2; ${SSH_USAGE}`,
    then: `ssh gpu-1 ${DRY}`,
  },
  { line: "ssh -- uptime", answer: NEEDS_NODE, then: `ssh * ${DRY}` },
  {
    line: "ssh --exclude gpu-1 -- uptime",
    answer: NEEDS_NODE,
    then: `ssh --role worker ${DRY}`,
  },
  { line: "ssh gpu-1 --", answer: `No command given; ${SSH_USAGE}` },
  {
    line: "ssh gpu-[1-2]",
    answer: `A login takes one NODE, not 2; ${SSH_USAGE}`,
  },
  {
    line: "ssh gpu-1 --gather",
    answer: `--gather requires a command; ${SSH_USAGE}`,
    then: `ssh gpu-1 ${DRY}`,
  },
  {
    line: "ssh gpu-1 -- bash",
    answer: '"bash" alone runs nothing: ' +
      "add --stdin, and give it the script on stdin",
    then: "ssh gpu-1 --stdin --dry-run -- bash",
  },
  {
    line: "ssh gpu-1 -- sudo sh -s",
    answer: '"sudo sh -s" alone runs nothing: ' +
      "add --stdin, and give it the script on stdin",
  },
  {
    line: "ssh gpu-1 -- /bin/sh -es x",
    answer: '"/bin/sh -es x" alone runs nothing: ' +
      "add --stdin, and give it the script on stdin",
  },
  {
    line: "ssh gpu-1 -p 2222 -- uptime",
    answer: 'Unknown option "-p": write -o Port=PORT',
    then: `ssh gpu-1 -o Port=2222 ${DRY}`,
  },
  {
    line: "ssh gpu-1 -i ~/.ssh/id -- uptime",
    answer: 'Unknown option "-i": write -o IdentityFile=PATH',
    then: `ssh gpu-1 -o IdentityFile=~/.ssh/id ${DRY}`,
  },
  {
    line: "ssh gpu-1 -o json -- uptime",
    answer: '--ssh-option takes KEY=VALUE as in ssh_config(5), not "json"',
    then: `ssh gpu-1 -o Port=22 ${DRY}`,
  },
  {
    line: "ssh gpu-1 --json --dry-run -- ls",
    answer: "--json and --dry-run cannot be used together",
  },

  // Those who come from clush and pdsh.
  {
    line: "ssh gpu-1 -b -- uptime",
    answer: 'Unknown option "-b": write --gather',
    then: `ssh gpu-1 ${DRY}`,
  },
  {
    line: "status -x gpu-1",
    answer: 'Unknown option "-x": write --exclude NODE',
    then: "status --exclude gpu-1",
  },
  {
    line: "nodes gpu-[1-5],!gpu-2",
    answer: 'No node matches "!gpu-2" ' +
      '(leave "gpu-2" out with exclude or --exclude)',
    then: "nodes gpu-[1-5] --exclude gpu-2",
  },
  {
    line: "nodes ^gpu-1",
    answer: 'No node matches "^gpu-1" ' +
      '(leave "gpu-1" out with exclude or --exclude)',
    then: "nodes --exclude gpu-1",
  },
  {
    line: "nodes @worker",
    answer: 'No node matches "@worker" ' +
      '(select "worker" with roles or --role)',
    then: "nodes --role worker",
  },
  {
    line: "nodes gpu-*&gpu-1",
    answer: 'No node matches "gpu-*&gpu-1" ' +
      "(to intersect, use roles, gpus or where (--role, --gpu, --where))",
    then: "nodes gpu-* --gpu H100",
  },
  {
    line: "nodes gpu-{1..3}",
    answer: 'No node matches "gpu-{1..3}" ' +
      '(write numbers in brackets: "gpu-[1-3]")',
    then: "nodes gpu-[1-3]",
  },

  {
    line: "nodes -w gpu-[1-2]",
    answer: `Unknown option "-w": ${NAME_NODES}`,
    then: "nodes gpu-[1-2]",
  },
  {
    line: "ssh -a -- uptime",
    answer: `Unknown option "-a": ${NAME_NODES}`,
    then: `ssh * ${DRY}`,
  },
  {
    line: "ssh -g worker -- uptime",
    answer: 'Unknown option "-g": write --role ROLE',
    then: `ssh --role worker ${DRY}`,
  },
  {
    line: "ssh -f 4 gpu-1 -- uptime",
    answer: 'Unknown option "-f": write --concurrency N',
    then: `ssh gpu-1 --concurrency 4 ${DRY}`,
  },

  // Those who come from ansible.
  {
    line: "status --limit gpu-1",
    answer: `Unknown option "--limit": ${NAME_NODES}`,
    then: "status gpu-1",
  },
  {
    line: "status --forks 5",
    answer: 'Unknown option "--forks": write --concurrency N',
    then: "status --concurrency 5",
  },
  {
    line: "status -i hosts.yaml",
    answer: 'Unknown option "-i": write --config PATH',
  },
  {
    line: "nodes gpu-*:!gpu-2",
    answer: 'No node matches "gpu-*:!gpu-2" ' +
      '(leave "gpu-2" out with exclude or --exclude)',
    then: "nodes gpu-* --exclude gpu-2",
  },
  {
    line: "export ansible --list",
    answer: 'Unknown option "--list"; see cluster-hosts export --help',
    then: "export ansible",
  },

  // Those who come from kubectl, and from watch(1).
  {
    line: "nodes -o json",
    answer: "nodes does not take --ssh-option (-o): for JSON, write --json",
    then: "nodes --json",
  },
  {
    line: "status -p 80",
    answer: 'Unknown option "-p": write --port PORT',
    then: "status --port 80",
  },
  {
    line: "wait -n 5",
    answer: 'Unknown option "-n": write --interval TIME',
  },
  {
    line: "status --watch -n 2",
    answer: 'Unknown option "-n": write --watch --interval TIME',
  },
  {
    line: "status --watch 5",
    answer: 'No node matches "5"; ' +
      "--watch takes no value: write --watch --interval 5",
  },
  {
    line: "get nodes",
    answer: 'Unknown command "get"; put the command first: ' +
      "cluster-hosts nodes [NODE...] [options]",
    then: "nodes",
  },
  {
    line: "status --sort name",
    answer: 'Unknown option "--sort": status lists problems first',
    then: "status",
  },
  {
    line: "nodes -l role=worker",
    answer: "nodes does not take --user (-l); see cluster-hosts nodes --help",
    then: "nodes --help",
  },
  {
    line: "get pods",
    answer: 'Unknown command "get"; see cluster-hosts --help',
  },
];

for (const { line, answer, then } of HURRIED) {
  Deno.test(`cluster-hosts answers: ${line}`, async () => {
    const result = await runMain(["-c", DEMO, ...line.split(" ")]);

    assertRefused(result, answer);
    if (then === undefined) return;

    const next = await runMain(["-c", DEMO, ...then.split(" ")]);
    assert(next.code < 2, `${then}: ${next.stderr}`);
  });
}

Deno.test("cluster-hosts ssh rejects an empty NODE, as an empty $(...) gives", async () => {
  const result = await runMain(["ssh", "", "-c", DEMO, "--", "uptime"]);

  assertRefused(result, "A NODE is empty: did a $(...) print nothing?");
});

const SCRIPTS = [
  "sh -c uptime",
  "bash -lc uptime",
  "sh x.sh",
  "shutdown",
  "bash -x script.sh -s",
];

for (const command of SCRIPTS) {
  Deno.test(`cluster-hosts ssh runs a shell that has a script: ${command}`, async () => {
    const args = ["ssh", "gpu-1", "-c", DEMO, "--dry-run", "--"];

    const result = await runMain([...args, ...command.split(" ")]);

    assertEquals([result.code, result.stderr], [0, ""]);
  });
}

const EXPANDED = [
  ["status", "notes.txt", "setup.sh"],
  ["ssh", "notes.txt", "setup.sh", "--", "uptime"],
];

for (const args of EXPANDED) {
  Deno.test(`cluster-hosts ${args[0]} says that a shell expanded a pattern to the files that are here`, async () => {
    await using temp = await tempFolder();
    const { folder: cwd } = temp;
    await Deno.writeTextFile(`${cwd}/notes.txt`, "");
    await Deno.writeTextFile(`${cwd}/setup.sh`, "");

    const result = await runCli(["-c", DEMO, ...args], { cwd });

    assertRefused(
      result,
      'No node matches "notes.txt", "setup.sh"; ' +
        "notes.txt, setup.sh exist in this folder: " +
        "if the shell expanded a pattern, quote it: '*'",
    );
  });
}

const NOTHING_LEFT: readonly (readonly [line: string, message: string])[] = [
  [
    "--gpu B200",
    "--gpu B200 leaves none of 9; " +
    "gpu is one of H100, GH200, A100, RTX 5090, V100",
  ],
  [
    "gpu-* --role coordinator",
    "--role coordinator leaves none of 7; role is worker",
  ],
  [
    "--status broken",
    "--status broken leaves none of 9; " +
    "status is one of active, ready, retired",
  ],
  ["--where rack=7", "--where rack=7 leaves none of 9; no node sets rack"],
  [
    "--role worker --where cpus=1",
    "--where cpus=1 leaves none of 8; cpus is 72",
  ],
  ["gpu-1 --exclude gpu-1", "--exclude gpu-1 leaves none of 1"],
  [
    "--gpu V100",
    "none of 1 is active; status is retired; --all adds them",
  ],
];

for (const [line, message] of NOTHING_LEFT) {
  for (const command of ["status", "nodes", "wait", "urls data --quiet"]) {
    Deno.test(`cluster-hosts ${command} says why ${line} leaves no node`, async () => {
      const words = `${command} ${line}`.split(" ");
      const result = await runMain([...words, "-c", DEMO]);

      assertRefused(result, `No node is selected in ${DEMO}: ${message}`);
    });
  }
}

Deno.test("cluster-hosts nodes lists at most twelve values to choose from", async () => {
  const names = Array.from({ length: 20 }, (_, index) => `n${index}`);
  const hosts = Object.fromEntries(
    names.map((name, index) => [name, { gpu: `G${index}` }]),
  );

  const result = await runMain(["nodes", "--gpu", "X", "-c", "-"], {
    stdin: JSON.stringify({ hosts }),
  });

  const shown = Array.from({ length: 12 }, (_, index) => `G${index}`);
  assertRefused(
    result,
    "No node is selected in stdin: --gpu X leaves none of 20; " +
      `gpu is one of ${shown.join(", ")}, …`,
  );
});
