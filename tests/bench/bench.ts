/**
 * `deno task bench [FOLDER]` prints a Markdown table of speed, memory and truth.
 *
 * Machines are noisy, so each row compares with a peer in the same run: whole
 * processes, start included, ours and the peers' in turn, the median of five.
 * With the FOLDER of another checkout, that is measured too.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { startNode } from "../loopback_cluster.ts";
import { dropPackets, type Netns, netnsMissing, startNetns } from "../netns.ts";
import {
  nextLine,
  programMissing,
  ROOT,
  type RunningProcess,
  start,
  tempFolder,
} from "../process.ts";
import { type Sshd, sshdMissing, startSshd } from "../sshd.ts";

const RUNS = 5;
const MIB = 1024 * 1024;
const isLinux = Deno.build.os === "linux";
const hasTime = isLinux && programMissing("/usr/bin/time") === undefined;
const before = Deno.args.map(absolutePath).at(0);

/** What one run came to. */
interface Measure {
  /** Milliseconds; for the loss of packets, nodes that are falsely not up. */
  readonly value: number;
  /** The process's peak memory in bytes; 0 if GNU time is not installed. */
  readonly peak: number;
}

interface Peer {
  readonly name: string;
  run(): Promise<Measure>;
}

interface Work {
  readonly name: string;
  /** Runs what is measured, of the checkout in a folder. */
  ours(root: string): Promise<Measure>;
  /** Peers, of which the best counts. Those not installed are left out. */
  readonly peers?: readonly (Peer | undefined)[];
  /** Instead of peers: what ours cannot be faster than, in milliseconds. */
  readonly floorMs?: number;
  readonly target: string;
  isMet(ours: Measure, best: number): boolean;
  /** @default {ms} */
  format?(value: number): string;
}

/** A row of the table; a cell that is not set stays empty. */
interface Row {
  readonly work: string;
  readonly ours: string;
  readonly before?: string;
  readonly peer?: string;
  /** What the peer is. */
  readonly peerName?: string;
  readonly ratio?: string;
  readonly target: string;
  readonly isMet?: boolean;
  readonly memory?: string;
}

await using temp = await tempFolder();
const { folder } = temp;
await bench();

async function bench(): Promise<void> {
  await using server = startServer();
  const port = Number(await nextLine(server.stdout));
  await using hole = await startNode("black-hole", { hostname: "0.0.0.0" });
  const works = [
    ...await sweeps(port),
    ...await holes(hole.port),
    ...await inventories(port),
    selection(),
  ];

  console.log(
    `${navigator.hardwareConcurrency} cores, ${memory()}, Deno ${Deno.version.deno}, ${Deno.build.os}\n`,
  );
  const rows: Row[] = [];
  for (const work of works) rows.push(await row(work));

  if (sshdMissing() === undefined) {
    await using sshd = await startSshd();
    rows.push(await row(await commands(sshd)));
  }

  if (netnsMissing() === undefined) {
    await using netns = await startNetns({ setup: dropPackets(0.05) });
    await using lossy = startServer(netns.enter);
    rows.push(
      await row(
        await lossyNetwork(netns, Number(await nextLine(lossy.stdout))),
      ),
    );
  }

  for (const flags of [["--tcp"], []]) rows.push(...await growth(port, flags));
  rows.push(await fewDescriptors(port));
  printTable(rows);
}

/** Starts what is swept. */
function startServer(enter: readonly string[] = []): RunningProcess {
  const [program, ...args] = [
    ...enter,
    "deno",
    "run",
    "-q",
    "--allow-net",
    `${ROOT}tests/bench/server.ts`,
  ];
  return start(program!, args, { limitMs: 3_600_000 });
}

/** Prints a Markdown table that can be read as it is, without empty columns. */
function printTable(rows: readonly Row[]): void {
  const head = [
    "Work",
    "ours",
    "before",
    "peer",
    "which is",
    "ratio",
    "target",
    "result",
    "peak memory",
  ];
  const cells = rows.map((row) => [
    row.work,
    row.ours,
    row.before ?? "",
    row.peer ?? "",
    row.peerName ?? "",
    row.ratio ?? "",
    row.target,
    row.isMet === undefined ? "" : row.isMet ? "met" : "MISSED",
    row.memory ?? "",
  ]);

  const columns = [...head.keys()]
    .filter((column) => cells.some((line) => line[column] !== ""));
  const widths = columns.map((column) => {
    const lengths = [head, ...cells].map((line) => line[column]!.length);
    return Math.max(...lengths);
  });

  // The first column is aligned to the left, all others to the right.
  const padded = (line: readonly string[]) =>
    columns.map((column, index) => {
      const cell = line[column]!;
      return index === 0
        ? cell.padEnd(widths[index]!)
        : cell.padStart(widths[index]!);
    });
  const rule = widths.map((width, index) =>
    index === 0 ? ":".padEnd(width, "-") : ":".padStart(width, "-")
  );

  for (const line of [padded(head), rule, ...cells.map(padded)]) {
    console.log(`| ${line.join(" | ")} |`);
  }
}

async function sweeps(port: number): Promise<Work[]> {
  const inventory = await writeHosts(10_000, port);
  const addresses = await writeLines("addresses", 10_000, address);
  const urls = await writeLines(
    "urls",
    10_000,
    (index) =>
      `url = "http://${address(index)}:${port}/status"\noutput = /dev/null`,
  );
  const bare = denoRun(
    ROOT,
    ["--allow-read", "--allow-net"],
    "tests/bench/connects.ts",
    inventory,
  );
  return [
    {
      name: "TCP sweep of 10,000 nodes",
      ours: (root) => status(root, inventory, "--tcp"),
      peers: [
        peer("nmap", [
          "-sT",
          "-n",
          "-Pn",
          "-T5",
          "-iL",
          addresses,
          "-p",
          String(port),
        ]),
      ],
      ...atMost(2),
    },
    {
      name: "TCP sweep of 10,000 nodes",
      ours: (root) => status(root, inventory, "--tcp"),
      peers: [{
        name: "start, parse() and bare connects",
        run: () => measure("deno", bare),
      }],
      ...atMost(1.25),
    },
    {
      name: "HTTP /status of 10,000 nodes",
      ours: (root) => status(root, inventory),
      peers: [peer("curl", ["-s", "-Z", "--parallel-max", "300", "-K", urls])],
      ...atMost(0.7),
    },
  ];
}

async function holes(port: number): Promise<Work[]> {
  const works: Work[] = [];
  for (
    const [count, extraMs, most] of [[1000, 400, Infinity], [
      10_000,
      1200,
      250 * MIB,
    ]] as const
  ) {
    const inventory = await writeHosts(count, port);
    const memory = most === Infinity ? "" : `, ≤ ${most / MIB} MiB`;
    works.push({
      name: `${count.toLocaleString("en")} black holes, --timeout 1`,
      ours: (root) => status(root, inventory, "--timeout", "1"),
      floorMs: 1000,
      target: `≤ timeout + ${extraMs / 1000} s${memory}`,
      isMet: ({ value, peak }, floorMs) =>
        value <= floorMs + extraMs && peak <= most,
    });
  }
  return works;
}

async function inventories(port: number): Promise<Work[]> {
  const large = await writeHosts(10_000, port, {
    note: "what the owner of a real inventory writes about a host",
  });
  const size = `${((await Deno.stat(large)).size / 1e6).toFixed(1)} MB`;
  const parse: Peer = {
    name: "parse() alone",
    run: () => inProcess(ROOT, "parse", large),
  };
  return [
    {
      name: `load of 10,000 hosts (${size}), in process`,
      ours: (root) => inProcess(root, "load", large),
      peers: [parse],
      ...atMost(1.3),
    },
    {
      name: `nodes --json of 10,000 hosts (${size})`,
      ours: (root) => cli(root, "nodes", "--json", "--config", large),
      peers: [parse],
      ...atMost(2),
    },
    {
      name: "nodes of 42 hosts",
      ours: (root) =>
        cli(
          root,
          "nodes",
          "--config",
          `${ROOT}tests/fixtures/real_inventory.yaml`,
        ),
      peers: [peer("deno", ["eval", "1"])],
      ...atMost(2.5),
    },
  ];
}

function selection(): Work {
  return {
    name: "selection out of 100,000 nodes, in process",
    ours: (root) => inProcess(root, "select"),
    peers: [{ name: "one pass", run: () => inProcess(ROOT, "pass") }],
    target: "< 200 ms",
    isMet: ({ value }) => value < 200,
  };
}

async function commands(sshd: Sshd): Promise<Work> {
  const names = Array.from({ length: 100 }, (_, index) => `gpu-${index + 1}`);
  const { user, keyPath, options } = sshd;
  const inventory = `${folder}/ssh.yaml`;
  await Deno.writeTextFile(
    inventory,
    JSON.stringify({
      hosts: Object.fromEntries(names.map((name) => [name, sshd.host])),
    }),
  );
  const list = await writeLines(
    "ssh_hosts",
    names.length,
    (index) => names[index]!,
  );
  // The peers tell nodes apart by name alone: here each name is this machine.
  const flags = [
    "HostName=127.0.0.1",
    `Port=${sshd.port}`,
    `IdentityFile=${keyPath}`,
    ...options,
  ];
  const args = flags.map((option) => `-o ${option}`).join(" ");
  return {
    name: "ssh to 100 nodes, 32 at once",
    ours: (root) =>
      cli(
        root,
        "ssh",
        "gpu-*",
        "--gather",
        "--config",
        inventory,
        ...sshd.flags,
        "--",
        "true",
      ),
    peers: [
      peer("clush", [
        "-f",
        "32",
        "-b",
        "-l",
        user,
        "-o",
        args,
        "-w",
        names.join(","),
        "true",
      ]),
      peer("parallel-ssh", [
        "-p",
        "32",
        "-i",
        "-l",
        user,
        "-x",
        args,
        "-h",
        list,
        "true",
      ]),
    ],
    ...atMost(1.1),
  };
}

/**
 * Counts the nodes that are not found out of 1,000 that are all up, behind a
 * network that loses one packet in twenty.
 */
async function lossyNetwork(netns: Netns, port: number): Promise<Work> {
  const count = 1000;
  const inventory = await writeHosts(count, port);
  const addresses = await writeLines("lossy_addresses", count, address);
  const urls = await writeLines(
    "lossy_urls",
    count,
    (index) =>
      `url = "http://${address(index)}:${port}/status"\noutput = /dev/null`,
  );
  const missing = async (
    found: RegExp,
    command: string,
    args: readonly string[],
  ): Promise<Measure> => {
    const { stdout } = await netns.run(command, args);
    return { value: count - (stdout.match(found)?.length ?? 0), peak: 0 };
  };
  const peerOf = (
    name: string,
    found: RegExp,
    args: readonly string[],
  ): Peer | undefined =>
    programMissing(name) === undefined
      ? { name, run: () => missing(found, name, args) }
      : undefined;
  return {
    name: "nodes not found, of 1,000 at 5 % packet loss",
    ours: (root) =>
      missing(
        /"state": ?"up"/g,
        "deno",
        cliArgs(root, ["status", "--json", "--config", inventory]),
      ),
    peers: [
      peerOf("nmap", / open /g, [
        "-sT",
        "-n",
        "-Pn",
        "-T4",
        "-iL",
        addresses,
        "-p",
        String(port),
      ]),
      peerOf("fping", /^127\./gm, ["-a", "-q", "-i", "1", "-f", addresses]),
      peerOf("curl", /200/g, [
        "-s",
        "-Z",
        "--parallel-max",
        "300",
        "-m",
        "5",
        "-w",
        "%{http_code}\n",
        "-K",
        urls,
      ]),
    ],
    target: "≤ the best",
    isMet: ({ value }, best) => value <= best,
    format: (value) => String(value),
  };
}

function atMost(factor: number): Pick<Work, "target" | "isMet"> {
  return {
    target: `≤ ${factor} ×`,
    isMet: ({ value }, best) => value <= factor * best,
  };
}

async function row(work: Work): Promise<Row> {
  const { name, ours, floorMs, target, isMet, format = ms } = work;
  const peers = (work.peers ?? []).filter((peer) => peer !== undefined);

  const contenders = [
    () => ours(ROOT),
    ...peers.map((peer) => () => peer.run()),
  ];
  if (before !== undefined) contenders.push(() => ours(before));

  const measures = contenders.map((): Measure[] => []);
  for (let run = 0; run < RUNS; run++) {
    for (const [index, contend] of contenders.entries()) {
      await settle();
      measures[index]!.push(await contend());
    }
  }

  const [mine, ...others] = measures.map(median);
  const common = {
    work: name,
    ours: format(mine!.value),
    before: before === undefined ? "" : format(others.at(-1)!.value),
    target,
    memory: mib(mine!.peak),
  };

  const [best] = floorMs === undefined
    ? peers.map(({ name }, index) => ({ name, value: others[index]!.value }))
      .toSorted((a, b) => a.value - b.value)
    : [{ name: "the timeout", value: floorMs }];
  if (!best) return { ...common, peerName: "no peer is installed" };

  const hasRatio = best.value > 0 && format === ms;
  return {
    ...common,
    peer: format(best.value),
    peerName: best.name,
    ratio: hasRatio ? times(mine!.value / best.value) : "",
    isMet: isMet(mine!, best.value),
  };
}

/**
 * Lets the server finish with the connections of the run before, so that they
 * slow nobody down.
 */
async function settle(): Promise<void> {
  await delay(300);
}

/**
 * Measures what one node costs in sweeps of each size, without the start of the
 * process, and compares it with what it costs among 1,000.
 */
async function growth(port: number, flags: readonly string[]): Promise<Row[]> {
  const check = flags.includes("--tcp") ? "TCP" : "HTTP";
  const startMs = await medianOf(3, () => cli(ROOT, "--version"));
  const rows: Row[] = [];
  let firstUs: number | undefined;

  for (const count of [1000, 10_000, 50_000]) {
    const inventory = await writeHosts(count, port);
    const runs = count > 10_000 ? 1 : 3;
    const sweep = await medianOf(
      runs,
      () => status(ROOT, inventory, ...flags),
    );

    const eachUs = 1000 * (sweep.value - startMs.value) / count;
    firstUs ??= eachUs;
    rows.push({
      work: `${check}, ${count.toLocaleString("en")} nodes`,
      ours: ms(sweep.value),
      peer: `${eachUs.toFixed(0)} µs`,
      peerName: "ours, a node",
      ratio: times(eachUs / firstUs),
      target: "≤ 1.5 ×",
      isMet: eachUs <= 1.5 * firstUs,
      memory: mib(sweep.peak),
    });
  }

  return rows;
}

async function fewDescriptors(port: number): Promise<Row> {
  const inventory = await writeHosts(500, port);
  const args = ["status", "--json", "--quiet", "--config", inventory];
  const script = 'ulimit -n 64; exec "$@"';

  const startedMs = performance.now();
  const { code } = await new Deno.Command("sh", {
    args: ["-c", script, "sh", "deno", ...cliArgs(ROOT, args)],
    stdout: "null",
    stderr: "null",
  }).output();

  return {
    work: "500 nodes with 64 descriptors",
    ours: ms(performance.now() - startedMs),
    target: "all up",
    isMet: code === 0,
  };
}

/**
 * Returns a loopback address of its own for each index on Linux. Elsewhere,
 * loopback is one address, which is asked again and again.
 */
function address(index: number): string {
  return isLinux
    ? `127.${1 + (index >> 14)}.${(index >> 8) & 63}.${index & 255}`
    : "127.0.0.1";
}

async function writeHosts(
  count: number,
  port: number,
  own: Readonly<Record<string, string>> = {},
): Promise<string> {
  const path = `${folder}/${count}-${port}-${Object.keys(own).length}.yaml`;
  const fields = {
    ssh_user: "ubuntu",
    ssh_key: "~/.ssh/id_cluster",
    status: "active",
    role: "worker",
    memory_gb: 96,
    cpus: 72,
    gpu: "H100",
    data_server_port: port,
    ...own,
  };
  const lines = Object.entries(fields)
    .map(([key, value]) => `    ${key}: ${value}\n`)
    .join("");

  const hosts = Array.from({ length: count }, (_, index) => {
    const ip = `    tailscale_ip: ${address(index)}\n`;
    return `  gpu-${index}:\n${ip}${lines}`;
  });
  await Deno.writeTextFile(path, `hosts:\n${hosts.join("")}`);
  return path;
}

async function writeLines(
  name: string,
  count: number,
  line: (index: number) => string,
): Promise<string> {
  const path = `${folder}/${name}`;
  await Deno.writeTextFile(
    path,
    Array.from({ length: count }, (_, index) => `${line(index)}\n`).join(""),
  );
  return path;
}

function denoRun(
  root: string,
  flags: readonly string[],
  file: string,
  ...args: string[]
): string[] {
  return [
    "run",
    "-q",
    "--no-prompt",
    "--config",
    `${root}/deno.json`,
    ...flags,
    `${root}/${file}`,
    ...args,
  ];
}

function cliArgs(root: string, args: readonly string[]): string[] {
  return denoRun(root, ["-P=cli"], "cli.ts", ...args);
}

function cli(root: string, ...args: string[]): Promise<Measure> {
  return measure("deno", cliArgs(root, args));
}

function status(
  root: string,
  inventory: string,
  ...flags: string[]
): Promise<Measure> {
  return cli(root, "status", ...flags, "--json", "--config", inventory);
}

function peer(program: string, args: readonly string[]): Peer | undefined {
  return programMissing(program) === undefined
    ? { name: program, run: () => measure(program, args) }
    : undefined;
}

/** Runs a program; an exit code of 1 is an answer: some node is not up. */
async function measure(
  program: string,
  args: readonly string[],
): Promise<Measure> {
  const report = `${folder}/peak`;
  const timed = ["/usr/bin/time", "-f", "%M", "-o", report, program, ...args];
  const [command = "", ...rest] = hasTime ? timed : [program, ...args];

  const startedMs = performance.now();
  const { code } = await new Deno.Command(command, {
    args: rest,
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).output();
  const value = performance.now() - startedMs;

  if (code > 1) {
    throw new Error(`${program} ${args.join(" ")} ended with ${code}`);
  }
  return { value, peak: hasTime ? await readPeak(report) : 0 };
}

/** Reads what GNU time reports, in bytes. */
async function readPeak(report: string): Promise<number> {
  const text = await Deno.readTextFile(report);
  return 1024 * Number(text.trim().split("\n").at(-1));
}

/** Measures work in a new process, without the start of that. */
async function inProcess(
  root: string,
  work: "load" | "parse" | "select" | "pass",
  ...paths: string[]
): Promise<Measure> {
  const { stdout } = await new Deno.Command("deno", {
    args: [
      "run",
      "-q",
      "--no-prompt",
      "--config",
      `${root}/deno.json`,
      `--allow-read=${[root, ...paths].join(",")}`,
      `${ROOT}tests/bench/in_process.ts`,
      work,
      root,
      ...paths,
    ],
  }).output();

  return { value: Number(new TextDecoder().decode(stdout)), peak: 0 };
}

function absolutePath(folder: string): string {
  return new URL(folder, `file://${Deno.cwd()}/`).pathname;
}

async function medianOf(
  count: number,
  run: () => Promise<Measure>,
): Promise<Measure> {
  const measures: Measure[] = [];
  for (let index = 0; index < count; index++) measures.push(await run());
  return median(measures);
}

function median(measures: readonly Measure[]): Measure {
  const sorted = measures.toSorted((a, b) => a.value - b.value);
  return {
    value: sorted[Math.floor(sorted.length / 2)]!.value,
    peak: Math.max(...measures.map(({ peak }) => peak)),
  };
}

function times(ratio: number): string {
  return `${ratio.toFixed(2)} ×`;
}

function ms(value: number): string {
  return value < 1000
    ? `${value.toFixed(0)} ms`
    : `${(value / 1000).toFixed(2)} s`;
}

function mib(bytes: number): string {
  return bytes === 0 ? "" : `${(bytes / MIB).toFixed(0)} MiB`;
}

function memory(): string {
  return `${(Deno.systemMemoryInfo().total / 1024 ** 3).toFixed(0)} GiB`;
}
