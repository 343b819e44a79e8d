/**
 * `deno task bench [FOLDER]`: speed, memory and truth, each against a peer in the same run, since machines are noisy.
 * Whole processes are measured, start included, ours and the peers' in turn: the median of five. With the FOLDER of
 * another checkout, its command line is measured too. The table is Markdown.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, selectNodes } from "../../mod.ts";
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
const [before] = Deno.args;

/** What one run came to. */
interface Measure {
  /** Milliseconds; for the loss of packets, nodes that are falsely not up. */
  readonly value: number;
  /** The most memory that the process held, in bytes; 0 if GNU time is not there to tell. */
  readonly peak: number;
}

interface Peer {
  readonly name: string;
  run(): Promise<Measure>;
}

interface Work {
  readonly name: string;
  /** Runs the command line, or the module, of the checkout in a folder. */
  ours(root: string): Promise<Measure>;
  /** The best of them counts. Those that are not installed are left out. */
  readonly peers?: readonly (Peer | undefined)[];
  /** Instead of peers: what ours cannot be faster than, in milliseconds. */
  readonly floorMs?: number;
  readonly target: string;
  isMet(ours: Measure, best: number): boolean;
  /** @default {ms} */
  format?(value: number): string;
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
  const rows: string[][] = [];
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
  printTable([
    "Work",
    "ours",
    before ? "before" : "",
    "peer",
    "",
    "ratio",
    "target",
    "",
    "peak memory",
  ], rows);
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

/** Prints Markdown that can be read as it is; columns that are empty everywhere are left out. */
function printTable(
  head: readonly string[],
  rows: readonly (readonly string[])[],
): void {
  const columns = [...head.keys()].filter((column) =>
    rows.some((cells) => cells[column])
  );
  const table = [head, columns.map(() => ""), ...rows].map((cells, line) =>
    columns.map((column, index) =>
      line === 1 ? (index === 0 ? ":-" : "-:") : cells[column] ?? ""
    )
  );
  const widths = columns.map((_, index) =>
    Math.max(...table.map((cells) => cells[index]!.length))
  );
  for (const cells of table) {
    const padded = cells.map((cell, index) => {
      if (cell === ":-") return ":".padEnd(widths[index]!, "-");
      if (cell === "-:") return ":".padStart(widths[index]!, "-");
      return index === 0
        ? cell.padEnd(widths[index]!)
        : cell.padStart(widths[index]!);
    });
    console.log(`| ${padded.join(" | ")} |`);
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
    run: () => loadMs(ROOT, "parse", large),
  };
  return [
    {
      name: `load of 10,000 hosts (${size}), in process`,
      ours: () => loadMs(ROOT, "load", large),
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
  const nodes = Array.from(
    { length: 100_000 },
    (_, index) => new ClusterNode({ name: `gpu-${index}`, gpu: "H100" }),
  );
  const wanted = {
    names: ["gpu-[1-50000]", "gpu-?????", "gpu-7*"],
    exclude: ["gpu-9*"],
    gpus: ["h100"],
  };
  const onePass: Peer = {
    name: "one pass",
    run: () =>
      inProcess(() => nodes.filter(({ name }) => /^gpu-(\d+)$/.test(name))),
  };
  return {
    name: "selection out of 100,000 nodes, in process",
    ours: () => inProcess(() => selectNodes(nodes, wanted)),
    peers: [onePass],
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

/** 1,000 nodes that are all up, behind a network that loses one packet in twenty: how many are not found. */
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
    name: "1,000 nodes at 5 % packet loss, not found",
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

async function row(work: Work): Promise<string[]> {
  const { name, ours, floorMs, target, isMet, format = ms } = work;
  const peers = (work.peers ?? []).filter((peer) => peer !== undefined);
  const contenders = [
    () => ours(ROOT),
    ...peers.map((peer) => () => peer.run()),
  ];
  // What does not depend on the checkout is the same there.
  const isCompared = before !== undefined && ours.length > 0;
  if (isCompared) contenders.push(() => ours(before));
  const measures = contenders.map((): Measure[] => []);
  for (let run = 0; run < RUNS; run++) {
    for (const [index, contend] of contenders.entries()) {
      await settle();
      measures[index]!.push(await contend());
    }
  }
  const [mine, ...others] = measures.map(median);
  const earlier = isCompared ? format(others.at(-1)!.value) : "";
  const [best] = floorMs === undefined
    ? peers.map(({ name }, index) => ({ name, value: others[index]!.value }))
      .toSorted((a, b) => a.value - b.value)
    : [{ name: "the timeout", value: floorMs }];
  const memory = mib(mine!.peak);
  if (!best) {
    return [
      name,
      format(mine!.value),
      earlier,
      "",
      "no peer is installed",
      "",
      target,
      "",
      memory,
    ];
  }
  const ratio = best.value > 0 && format === ms
    ? `${(mine!.value / best.value).toFixed(2)} ×`
    : "";
  const verdict = isMet(mine!, best.value) ? "met" : "MISSED";
  return [
    name,
    format(mine!.value),
    earlier,
    format(best.value),
    best.name,
    ratio,
    target,
    verdict,
    memory,
  ];
}

/** Lets the server finish with what the run before has left it, so that nobody pays for another's connections. */
async function settle(): Promise<void> {
  await delay(300);
}

/** What a node costs at each size, the start of the process left out, against what it costs among 1,000. */
async function growth(
  port: number,
  flags: readonly string[],
): Promise<string[][]> {
  const rows: string[][] = [];
  const startMs = median(await times(3, () => cli(ROOT, "--version"))).value;
  let first: number | undefined;
  for (const count of [1000, 10_000, 50_000]) {
    const inventory = await writeHosts(count, port);
    const { value, peak } = median(
      await times(
        count > 10_000 ? 1 : 3,
        () => status(ROOT, inventory, ...flags),
      ),
    );
    const each = 1000 * (value - startMs) / count;
    first ??= each;
    const name = `${flags.length > 0 ? "TCP" : "HTTP"}, ${
      count.toLocaleString("en")
    } nodes`;
    const ratio = `${(each / first).toFixed(2)} ×`;
    const verdict = each <= 1.5 * first ? "met" : "MISSED";
    rows.push([
      name,
      ms(value),
      "",
      `${each.toFixed(0)} µs`,
      "a node",
      ratio,
      "≤ 1.5 ×",
      verdict,
      mib(peak),
    ]);
  }
  return rows;
}

async function fewDescriptors(port: number): Promise<string[]> {
  const args = cliArgs(ROOT, [
    "status",
    "--json",
    "--quiet",
    "--config",
    await writeHosts(500, port),
  ]);
  const started = performance.now();
  const { code } = await new Deno.Command("sh", {
    args: ["-c", 'ulimit -n 64; exec "$@"', "sh", "deno", ...args],
    stdout: "null",
    stderr: "null",
  }).output();
  const total = ms(performance.now() - started);
  return [
    "500 nodes with 64 descriptors",
    total,
    "",
    "",
    "",
    "",
    "all up",
    code === 0 ? "met" : "MISSED",
    "",
  ];
}

/** Distinct loopback addresses on Linux; elsewhere loopback is one address, which is then asked again and again. */
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
  const extra = Object.entries(own).map(([key, value]) =>
    `    ${key}: "${value}"\n`
  ).join("");
  const hosts = Array.from(
    { length: count },
    (_, index) =>
      `  gpu-${index}:\n    tailscale_ip: ${
        address(index)
      }\n    ssh_user: ubuntu\n    ssh_key: ~/.ssh/id_cluster\n` +
      `    status: active\n    role: worker\n    memory_gb: 96\n    cpus: 72\n    gpu: H100\n    data_server_port: ${port}\n${extra}`,
  );
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

async function measure(
  program: string,
  args: readonly string[],
): Promise<Measure> {
  const report = `${folder}/peak`;
  const [command = "", ...rest] = hasTime
    ? ["/usr/bin/time", "-f", "%M", "-o", report, program, ...args]
    : [program, ...args];
  const started = performance.now();
  const { code } = await new Deno.Command(command, {
    args: rest,
    stdin: "null",
    stdout: "null",
    stderr: "null",
  })
    .output();
  const value = performance.now() - started;
  // 1 is an answer: some node is not up.
  if (code > 1) {
    throw new Error(`${program} ${args.join(" ")} ended with ${code}`);
  }
  const peak = hasTime
    ? 1024 * Number((await Deno.readTextFile(report)).trim().split("\n").at(-1))
    : 0;
  return { value, peak };
}

async function loadMs(
  root: string,
  work: "load" | "parse",
  path: string,
): Promise<Measure> {
  const args = denoRun(
    root,
    [`--allow-read=${path}`],
    "tests/bench/load.ts",
    work,
    path,
  );
  const { stdout } = await new Deno.Command("deno", { args }).output();
  return { value: Number(new TextDecoder().decode(stdout)), peak: 0 };
}

function inProcess(work: () => unknown): Promise<Measure> {
  const started = performance.now();
  work();
  return Promise.resolve({ value: performance.now() - started, peak: 0 });
}

async function times<T>(count: number, run: () => Promise<T>): Promise<T[]> {
  const results: T[] = [];
  for (let index = 0; index < count; index++) results.push(await run());
  return results;
}

function median(measures: readonly Measure[]): Measure {
  const sorted = measures.toSorted((a, b) => a.value - b.value);
  return {
    value: sorted[Math.floor(sorted.length / 2)]!.value,
    peak: Math.max(...measures.map(({ peak }) => peak)),
  };
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
