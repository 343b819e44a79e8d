/**
 * `deno task bench`: speed and memory on loopback, each against a peer in the same run, since machines are noisy. Whole
 * processes are timed, start included, ours and the peer's in turn: the median of five.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, selectNodes } from "../../mod.ts";
import { ROOT, startNode } from "../loopback_cluster.ts";
import { type Sshd, sshdMissing, startSshd } from "../sshd.ts";

const RUNS = 5;
const isLinux = Deno.build.os === "linux";

interface Measure {
  readonly ms: number;
  /** The most memory that the process held, in bytes; 0 where GNU time is not there to tell. */
  readonly peak: number;
}

interface Peer {
  readonly name: string;
  readonly run: () => Promise<Measure>;
}

interface Work {
  readonly name: string;
  readonly ours: () => Promise<Measure>;
  /** The fastest of them counts. Those that are not installed are left out. */
  readonly peers?: readonly Peer[];
  /** The peer, where it is no process: what ours cannot be faster than. */
  readonly floorMs?: number;
  readonly target: (ours: Measure, peerMs: number) => { readonly text: string; readonly isMet: boolean };
}

const hasTime = Deno.build.os === "linux" && await isInstalled("/usr/bin/time");
const folder = await Deno.makeTempDir({ dir: "/tmp" });
const server = new Deno.Command("deno", {
  args: ["run", "-q", "--allow-net", `${ROOT}tests/bench/server.ts`],
  stdin: "piped",
  stdout: "piped",
}).spawn();
try {
  const greeting = await server.stdout.getReader().read();
  const serverPort = Number(new TextDecoder().decode(greeting.value));
  await using blackHole = await startNode("black-hole", { hostname: "0.0.0.0" });
  await bench(serverPort, blackHole.port);
} finally {
  server.kill();
  await server.status;
  await Deno.remove(folder, { recursive: true });
}

async function bench(serverPort: number, blackHolePort: number): Promise<void> {
  const inventories = new Map<number, string>();
  for (const count of [500, 1000, 10_000, 50_000]) inventories.set(count, await writeHosts(count, serverPort));
  const holes = await writeHosts(10_000, blackHolePort);
  const holes1000 = await writeHosts(1000, blackHolePort);
  const large = await writeHosts(10_000, serverPort, {
    note: "what the owner of a real inventory writes about a host",
  });
  const { size } = await Deno.stat(large);
  const few = `${ROOT}tests/fixtures/real_inventory.yaml`;
  const addresses = `${folder}/addresses`;
  await Deno.writeTextFile(addresses, Array.from({ length: 10_000 }, (_, index) => `${address(index)}\n`).join(""));
  const urls = `${folder}/urls`;
  await Deno.writeTextFile(
    urls,
    Array.from(
      { length: 10_000 },
      (_, index) => `url = "http://${address(index)}:${serverPort}/status"\noutput = /dev/null\n`,
    ).join(""),
  );
  const atMost = (factor: number) => (ours: Measure, peerMs: number) => ({
    text: `≤ ${factor} ×`,
    isMet: ours.ms <= factor * peerMs,
  });
  const within = (extraMs: number) => (ours: Measure, floorMs: number) => ({
    text: `≤ timeout + ${extraMs / 1000} s`,
    isMet: ours.ms <= floorMs + extraMs,
  });

  const works: Work[] = [
    {
      name: "TCP sweep of 10,000 nodes",
      ours: () => cli("status", "--tcp", "--json", "--config", inventories.get(10_000)!),
      peers: await peer("nmap", ["-sT", "-n", "-Pn", "-T5", "-iL", addresses, "-p", String(serverPort)]),
      target: atMost(2),
    },
    {
      name: "HTTP /status of 10,000 nodes",
      ours: () => cli("status", "--json", "--config", inventories.get(10_000)!),
      peers: await peer("curl", ["-s", "-Z", "--parallel-max", "300", "-K", urls]),
      target: atMost(0.7),
    },
    {
      name: "1,000 black holes, --timeout 1",
      ours: () => cli("status", "--json", "--timeout", "1", "--config", holes1000),
      floorMs: 1000,
      target: within(400),
    },
    {
      name: "10,000 black holes, --timeout 1, all at once",
      ours: () => cli("status", "--json", "--timeout", "1", "--concurrency", "10000", "--config", holes),
      floorMs: 1000,
      target: within(1500),
    },
    {
      name: `nodes --json of 10,000 hosts (${(size / 1e6).toFixed(1)} MB)`,
      ours: () => cli("nodes", "--json", "--config", large),
      peers: [{ name: "parse() alone", run: () => parseAlone(large) }],
      target: atMost(2),
    },
    {
      name: "nodes of 42 hosts",
      ours: () => cli("nodes", "--config", few),
      peers: await peer("deno", ["eval", "1"]),
      target: atMost(2.5),
    },
    selectionWork(),
  ];

  console.log(`${navigator.hardwareConcurrency} cores, ${memory()}, Deno ${Deno.version.deno}, ${Deno.build.os}\n`);
  const rows: string[][] = [["WORK", "OURS", "PEER", "", "RATIO", "TARGET", "", "PEAK MEMORY"]];
  for (const work of works) rows.push(await row(work));
  if (sshdMissing() === undefined) {
    await using sshd = await startSshd();
    rows.push(await row(await sshWork(sshd)));
  }
  rows.push(...await growth(inventories), await fewDescriptors(inventories.get(500)!));
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((cells) => cells[column]?.length ?? 0)));
  console.log(
    rows.map((cells) => cells.map((cell, column) => cell.padEnd(widths[column]!)).join("  ").trimEnd()).join("\n"),
  );
}

/** Distinct loopback addresses on Linux; elsewhere loopback is one address, which the sweep then asks again and again. */
function address(index: number): string {
  return isLinux ? `127.${1 + (index >> 14)}.${(index >> 8) & 63}.${index & 255}` : "127.0.0.1";
}

async function writeHosts(count: number, port: number, own: Readonly<Record<string, string>> = {}): Promise<string> {
  const path = `${folder}/${count}-${port}-${Object.keys(own).length}.yaml`;
  const extra = Object.entries(own).map(([key, value]) => `    ${key}: "${value}"\n`).join("");
  const hosts = Array.from(
    { length: count },
    (_, index) =>
      `  gpu-${index}:\n    tailscale_ip: ${address(index)}\n    ssh_user: ubuntu\n    ssh_key: ~/.ssh/id_cluster\n` +
      `    status: active\n    role: worker\n    memory_gb: 96\n    cpus: 72\n    gpu: H100\n    data_server_port: ${port}\n${extra}`,
  );
  await Deno.writeTextFile(path, `hosts:\n${hosts.join("")}`);
  return path;
}

function cli(...args: string[]): Promise<Measure> {
  return measure("deno", [
    "run",
    "-q",
    "--no-prompt",
    "--config",
    `${ROOT}deno.json`,
    "-P=cli",
    `${ROOT}cli.ts`,
    ...args,
  ]);
}

async function measure(program: string, args: readonly string[]): Promise<Measure> {
  const report = `${folder}/peak`;
  const wrapped = hasTime ? ["/usr/bin/time", "-f", "%M", "-o", report, program, ...args] : [program, ...args];
  const started = performance.now();
  const [command = "", ...rest] = wrapped;
  const { code } = await new Deno.Command(command, { args: rest, stdin: "null", stdout: "null", stderr: "null" })
    .output();
  const ms = performance.now() - started;
  // 1 is an answer: some node is not up.
  if (code > 1) throw new Error(`${program} ${args.join(" ")} ended with ${code}`);
  const peak = hasTime ? 1024 * Number((await Deno.readTextFile(report)).trim().split("\n").at(-1)) : 0;
  return { ms, peak };
}

async function parseAlone(path: string): Promise<Measure> {
  const args = [
    "run",
    "-q",
    "--config",
    `${ROOT}deno.json`,
    `--allow-read=${path}`,
    `${ROOT}tests/bench/parse.ts`,
    path,
  ];
  const { stdout } = await new Deno.Command("deno", { args }).output();
  return { ms: Number(new TextDecoder().decode(stdout)), peak: 0 };
}

function inProcess(work: () => unknown): Promise<Measure> {
  const started = performance.now();
  work();
  return Promise.resolve({ ms: performance.now() - started, peak: 0 });
}

async function peer(program: string, args: readonly string[]): Promise<Peer[]> {
  return await isInstalled(program) ? [{ name: program, run: () => measure(program, args) }] : [];
}

async function isInstalled(program: string): Promise<boolean> {
  try {
    await new Deno.Command(program, { args: ["--version"], stdout: "null", stderr: "null" }).output();
    return true;
  } catch {
    return false;
  }
}

function selectionWork(): Work {
  const nodes = Array.from({ length: 100_000 }, (_, index) => new ClusterNode({ name: `gpu-${index}`, gpu: "H100" }));
  const selection = { names: ["gpu-[1-50000]", "gpu-?????", "gpu-7*"], exclude: ["gpu-9*"], gpus: ["h100"] };
  return {
    name: "selection out of 100,000 nodes, in process",
    ours: () => inProcess(() => selectNodes(nodes, selection)),
    peers: [{ name: "one pass", run: () => inProcess(() => nodes.filter(({ name }) => /^gpu-(\d+)$/.test(name))) }],
    target: ({ ms }) => ({ text: "< 200 ms", isMet: ms < 200 }),
  };
}

async function sshWork(sshd: Sshd): Promise<Work> {
  const names = Array.from({ length: 100 }, (_, index) => `gpu-${index + 1}`);
  const path = `${folder}/ssh.yaml`;
  const host = {
    tailscale_ip: "127.0.0.1",
    ssh_user: sshd.user,
    ssh_key: sshd.keyPath,
    ssh_port: sshd.port,
  };
  await Deno.writeTextFile(path, JSON.stringify({ hosts: Object.fromEntries(names.map((name) => [name, host])) }));
  const list = `${folder}/ssh_hosts`;
  await Deno.writeTextFile(list, names.map((name) => `${name}\n`).join(""));
  // The key exchange is the larger part of the work for all of them: the cheapest leaves most to be compared.
  const options = [...sshd.options, "KexAlgorithms=curve25519-sha256"];
  // The peers tell nodes apart by name alone: here each name is this machine.
  const flags = ["HostName=127.0.0.1", `Port=${sshd.port}`, `IdentityFile=${sshd.keyPath}`, ...options];
  const args = flags.map((option) => `-o ${option}`).join(" ");
  return {
    name: "ssh to 100 nodes, 32 at once",
    ours: () =>
      cli("ssh", "--gather", "--config", path, ...options.flatMap((it) => ["--ssh-option", it]), "--", "true"),
    peers: [
      ...await peer("clush", ["-f", "32", "-b", "-l", sshd.user, "-o", args, "-w", names.join(","), "true"]),
      ...await peer("parallel-ssh", ["-p", "32", "-i", "-l", sshd.user, "-x", args, "-h", list, "true"]),
    ],
    target: (ours, peerMs) => ({ text: "≤ 1.1 ×", isMet: ours.ms <= 1.1 * peerMs }),
  };
}

async function row({ name, ours, peers = [], floorMs, target }: Work): Promise<string[]> {
  const own: Measure[] = [];
  const others = peers.map((): Measure[] => []);
  for (let run = 0; run < RUNS; run++) {
    await settle();
    own.push(await ours());
    for (const [index, peer] of peers.entries()) {
      await settle();
      others[index]!.push(await peer.run());
    }
  }
  const mine = median(own);
  const medians = peers.map((peer, index) => ({ name: peer.name, ms: median(others[index]!).ms }));
  const [best] = floorMs === undefined
    ? medians.toSorted((a, b) => a.ms - b.ms)
    : [{ name: "the timeout", ms: floorMs }];
  if (!best) return [name, ms(mine.ms), "-", "not installed", "-", "-", "", mib(mine.peak)];
  const { text, isMet } = target(mine, best.ms);
  const ratio = `${(mine.ms / best.ms).toFixed(2)} ×`;
  return [name, ms(mine.ms), ms(best.ms), best.name, ratio, text, isMet ? "met" : "MISSED", mib(mine.peak)];
}

/** Lets the server finish with what the run before has left it, so that nobody pays for another's connections. */
async function settle(): Promise<void> {
  await delay(300);
}

/** What a node costs at each size, the start of the process left out, against what it costs among 1,000. */
async function growth(inventories: ReadonlyMap<number, string>): Promise<string[][]> {
  const rows: string[][] = [];
  for (const check of [["--tcp"], []]) {
    const start = median(await times(3, () => cli("--version")));
    let first: number | undefined;
    for (const count of [1000, 10_000, 50_000]) {
      const sweep = () => cli("status", ...check, "--json", "--config", inventories.get(count)!);
      const { ms: total, peak } = median(await times(count > 10_000 ? 1 : 3, sweep));
      const each = 1000 * (total - start.ms) / count;
      first ??= each;
      rows.push([
        `${check.length > 0 ? "TCP" : "HTTP"}, ${count.toLocaleString("en")} nodes`,
        ms(total),
        `${each.toFixed(0)} µs`,
        "a node",
        `${(each / first).toFixed(2)} ×`,
        "≤ 1.5 ×",
        each <= 1.5 * first ? "met" : "MISSED",
        mib(peak),
      ]);
    }
  }
  return rows;
}

async function fewDescriptors(path: string): Promise<string[]> {
  const command = `ulimit -n 64; exec deno run -q --no-prompt -P=cli cli.ts status --json --quiet --config ${path}`;
  const { code, ms: total } = await exitCode("sh", ["-c", command]);
  return ["500 nodes with 64 descriptors", ms(total), "-", "-", "-", "all up", code === 0 ? "met" : "MISSED", "-"];
}

async function exitCode(program: string, args: string[]): Promise<{ code: number; ms: number }> {
  const started = performance.now();
  const { code } = await new Deno.Command(program, { args, cwd: ROOT, stdout: "null", stderr: "null" }).output();
  return { code, ms: performance.now() - started };
}

async function times<T>(count: number, run: () => Promise<T>): Promise<T[]> {
  const results: T[] = [];
  for (let index = 0; index < count; index++) results.push(await run());
  return results;
}

function median(measures: readonly Measure[]): Measure {
  const sorted = measures.toSorted((a, b) => a.ms - b.ms);
  return { ms: sorted[Math.floor(sorted.length / 2)]!.ms, peak: Math.max(...measures.map(({ peak }) => peak)) };
}

function ms(value: number): string {
  return value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

function mib(bytes: number): string {
  return bytes === 0 ? "-" : `${(bytes / 1024 / 1024).toFixed(0)} MiB`;
}

function memory(): string {
  return `${(Deno.systemMemoryInfo().total / 1024 ** 3).toFixed(0)} GiB`;
}
