/**
 * The command line: `cluster-hosts COMMAND [NODE...] [options]`. It runs from a checkout, from a URL and compiled; each
 * command uses only the permissions that {@linkcode main} names for it.
 *
 * ```sh
 * deno run --allow-read=config --allow-net cli.ts status
 * ```
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { pooledMap } from "jsr:@std/async@^1.5.0/pool";
import { parseArgs } from "jsr:@std/cli@^1.0.32/parse-args";
import {
  ClusterNode,
  type ConfigProblem,
  getClusterNodes,
  getCoordinatorAddress,
  getDataSyncUrls,
  getEloSyncConfig,
  getEloSyncUrls,
  getSyncUrls,
  type HostsConfig,
  HostsConfigError,
  type HostsConfigText,
  inspectHostsConfig,
  MODEL_SYNC_PORT,
  type NodeProbe,
  type NodeState,
  parseHostsConfig,
  type ProbeFailure,
  probeNodes,
  readHostsConfig,
  selectNodes,
  sshCommand,
} from "./mod.ts";
import manifest from "./deno.json" with { type: "json" };
import { formatConfigProblem, hostPort, isTypo, missingNetFlag, netHosts } from "./cluster_hosts.ts";

/** Output of one stream of one node that is kept. */
const MAX_OUTPUT_BYTES = 1024 * 1024;

/** How long an ssh may take to end after SIGTERM, and its pipes after its end. */
const GRACE_MS = 500;

/** Linux refuses a longer single argument at 128 KiB. */
const MAX_FLAG_LENGTH = 100_000;

interface Option {
  readonly value?: string;
  readonly help: string;
  readonly repeats?: boolean;
}

const OPTIONS = {
  config: {
    value: "PATH|URL|-",
    help: "the inventory; else $RINGRIFT_HOSTS_CONFIG, config/…",
  },
  role: { value: "ROLE", help: "only nodes of this role; repeatable", repeats: true },
  gpu: { value: "TEXT", help: "only nodes whose GPU name contains TEXT; repeatable", repeats: true },
  exclude: { value: "NODE", help: "leave out these nodes; repeatable", repeats: true },
  all: { help: "inactive nodes too" },
  timeout: { value: "SECONDS", help: "deadline of a node: 5 (ssh: 60), of all of wait: 300" },
  concurrency: { value: "N", help: "how many nodes at once: 1024 (ssh: 32)" },
  port: { value: "PORT", help: "instead of each node's own data server port" },
  tcp: { help: "a node that accepts a TCP connection is up" },
  "min-up": { value: "N", help: "all is well when N nodes are up" },
  watch: { value: "[SECONDS]", help: "check again and again (default: every 5)" },
  interval: { value: "SECONDS", help: "between two checks (default: 2)" },
  path: { value: "PATH", help: "of the URLs (default: /db; models: /models)" },
  "include-self": { help: "this host too (data; the others never leave it out)" },
  unchecked: { help: "do not check, give every selected node" },
  user: { value: "NAME", help: "log in as NAME" },
  "connect-timeout": { value: "SECONDS", help: "for the connection alone (default: 10)" },
  "ssh-option": { value: "KEY=VALUE", help: "as in ssh_config(5), in place of a default; repeatable", repeats: true },
  gather: { help: "each distinct output once, under the nodes that gave it" },
  strict: { help: "a doubt is an error" },
  list: { help: "ansible: the whole inventory, as without it" },
  host: { value: "NAME", help: "ansible: the variables of one host" },
  fold: { help: "addresses as networks, where that is shorter" },
  json: { help: "JSON" },
  quiet: { help: "no progress, no summary; status and wait print nothing" },
  help: { help: "this text" },
  version: { help: "the version" },
} satisfies Record<string, Option>;

type OptionName = keyof typeof OPTIONS;

interface Flags {
  readonly nodes: readonly string[];
  readonly command: readonly string[] | undefined;
  has(name: OptionName): boolean;
  text(name: OptionName): string | undefined;
  texts(name: OptionName): string[] | undefined;
  number(name: OptionName, range: NumberRange): number | undefined;
}

interface NumberRange {
  readonly min: number;
  readonly max?: number;
  readonly isWhole?: boolean;
}

interface Command {
  readonly summary: string;
  readonly usage: string;
  readonly options: readonly OptionName[];
  readonly notes?: string;
  readonly examples: readonly [string, string];
  run(flags: Flags): Promise<number>;
}

const SELECTION: readonly OptionName[] = ["config", "role", "gpu", "exclude", "all"];
const COMMON: readonly OptionName[] = ["json", "quiet", "help"];

const COMMANDS: Readonly<Record<string, Command>> = {
  status: {
    summary: "check the nodes, in parallel",
    usage: "status [NODE...] [options]",
    options: [...SELECTION, "timeout", "concurrency", "port", "tcp", "min-up", "watch", ...COMMON],
    notes: "Exit code 0: every node is up, or --min-up of them; 1: not so; 2: not checked.",
    examples: ["cluster-hosts status --timeout 2", "cluster-hosts status 'gpu-[1-8]' --role worker --watch"],
    run: status,
  },
  nodes: {
    summary: "list what is configured",
    usage: "nodes [NODE...] [options]",
    options: [...SELECTION, ...COMMON],
    examples: ["cluster-hosts nodes --gpu H100", "cluster-hosts nodes --json | jq -r '.nodes[].name'"],
    run: listNodes,
  },
  coordinator: {
    summary: "print HOST:PORT of the coordinator",
    usage: "coordinator [options]",
    options: ["config", ...COMMON],
    examples: ["cluster-hosts coordinator", "cluster-hosts coordinator --config https://example.com/hosts.yaml"],
    run: coordinator,
  },
  urls: {
    summary: "the URLs to pull data from, one a line",
    usage: "urls elo|data|models [NODE...] [options]",
    options: [
      ...SELECTION,
      "timeout",
      "concurrency",
      "port",
      "path",
      "include-self",
      "unchecked",
      ...COMMON,
    ],
    notes: "With --port or --path, the kind may be left out. What is checked is /status.",
    examples: ["cluster-hosts urls data | aria2c -i -", "cluster-hosts urls --port 9000 --path /games"],
    run: urls,
  },
  ssh: {
    summary: "run a command on many nodes at once",
    usage: "ssh [NODE...] [options] -- COMMAND",
    options: [
      ...SELECTION,
      "timeout",
      "concurrency",
      "user",
      "connect-timeout",
      "ssh-option",
      "gather",
      ...COMMON,
    ],
    notes: "Exit code 0: the command returned 0 on every node; 1: not so.",
    examples: ["cluster-hosts ssh -- uptime", "cluster-hosts ssh 'gpu-*' --gather -- nvidia-smi -L"],
    run: ssh,
  },
  wait: {
    summary: "return when the nodes are up, or the time is over",
    usage: "wait [NODE...] [options]",
    options: [...SELECTION, "timeout", "interval", "min-up", "concurrency", "port", "tcp", ...COMMON],
    notes: "Exit code 0: every node is up, or --min-up of them; 1: the time (300 s) is over.",
    examples: ["cluster-hosts wait --timeout 600", "cluster-hosts wait 'gpu-*' --min-up 6 --tcp --port 22"],
    run: wait,
  },
  validate: {
    summary: "every problem and every doubt in the inventory",
    usage: "validate [options]",
    options: ["config", "strict", ...COMMON],
    notes: "Exit code 0: no problem (--strict: and no doubt); 2: not so.",
    examples: ["cluster-hosts validate", "cluster-hosts validate --strict --config new_hosts.yaml"],
    run: validate,
  },
  export: {
    summary: "the inventory for Ansible, Prometheus, ssh",
    usage: "export ansible|prometheus|ssh-config [NODE...] [options]",
    options: [...SELECTION, "port", "list", "host", "help"],
    examples: [
      "cluster-hosts export prometheus > targets.json",
      "cluster-hosts export ssh-config > ~/.ssh/config.d/cluster",
    ],
    run: exportInventory,
  },
  permissions: {
    summary: "the least Deno flags with which a command runs",
    usage: "permissions [--fold] COMMAND [its arguments]",
    options: ["fold", "help"],
    notes: "For this inventory, on one line, as `deno run $(...) URL COMMAND` takes it.",
    examples: ["cluster-hosts permissions status", "cluster-hosts permissions --fold wait 'gpu-*' --port 22"],
    run: permissions,
  },
};

const HELP = `cluster-hosts ${manifest.version}: which nodes of the cluster there are, and which answer

Usage: cluster-hosts COMMAND [NODE...] [options]

${Object.entries(COMMANDS).map(([name, { summary }]) => `  ${name.padEnd(12)} ${summary}`).join("\n")}

NODE is a name, a glob (gpu-*) or a range (gpu-[1-8], gpu-[01-16,20]).
Without one: all active nodes.

${optionHelp([...SELECTION, "timeout", "concurrency", "port", ...COMMON, "version"])}

"cluster-hosts COMMAND --help" tells what each command takes.
Exit code 0: all is well; 1: it is not; 2: bad usage or config, or not checked.
`;

function optionHelp(names: readonly OptionName[]): string {
  return names.map((name) => {
    const { value, help }: Option = OPTIONS[name];
    return `  ${`--${name}${value ? ` ${value}` : ""}`.padEnd(22)} ${help}`;
  }).join("\n");
}

function commandHelp({ summary, usage, options, notes, examples }: Command): string {
  return `${summary.charAt(0).toUpperCase()}${summary.slice(1)}

Usage: cluster-hosts ${usage}

${optionHelp(options)}
${notes ? `\n${notes}\n` : ""}
Examples:
${examples.map((example) => `  ${example}`).join("\n")}
`;
}

/** Bad usage: shown in one line, exit code 2. */
class UsageError extends Error {}

/** The reader of stdout is gone; nobody wants to hear of it. */
class ClosedOutput extends Error {}

/** SIGINT or SIGTERM, with the exit code that stands for it. */
class Interrupt extends Error {
  constructor(readonly exitCode: number) {
    super("interrupted");
  }
}

/**
 * Runs one command and gives its exit code. Results go to stdout, progress and errors to stderr.
 *
 * Permissions, each at the moment it is needed: read of the config, net to the nodes (and to the host of a config URL),
 * env of `RINGRIFT_HOSTS_CONFIG`, `RINGRIFT_CONFIG_PATH`, `RINGRIFT_COORDINATOR_IP` and `RINGRIFT_NODE_ID`, sys of
 * `hostname` and `networkInterfaces` for `urls data`, run of `ssh` for `ssh`. One that is missing ends the command
 * with one line that names the flag.
 *
 * @example The version
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * assertEquals(await main(["--version"]), 0);
 * ```
 */
export async function main(args: readonly string[]): Promise<number> {
  try {
    return await runCommand(args);
  } catch (error) {
    if (error instanceof ClosedOutput) return 0;
    if (error instanceof Interrupt) return error.exitCode;
    try {
      warn(error instanceof Error ? error.message : String(error));
    } catch {
      // stderr is closed or full: the exit code is all that is left to say it.
    }
    return 2;
  }
}

async function runCommand(args: readonly string[]): Promise<number> {
  const [name, ...rest] = args;
  if (name === "--version") {
    print(`cluster-hosts ${manifest.version}\n`);
    return 0;
  }
  if (name === undefined || name === "--help" || name === "-h" || name === "help") {
    print(HELP);
    return name === undefined ? 2 : 0;
  }
  const command = findCommand(name);
  if (name === "permissions") return await permissions(permissionFlags(rest));
  const flags = parseFlags(name, command, rest);
  if (flags.has("help")) {
    print(commandHelp(command));
    return 0;
  }
  if (flags.command && name !== "ssh") throw new UsageError(`${name} takes no command behind "--"`);
  return await command.run(flags);
}

function findCommand(name: string): Command {
  if (Object.hasOwn(COMMANDS, name)) return COMMANDS[name]!;
  const kind = name.startsWith("-") ? "option" : "command";
  throw new UsageError(`Unknown ${kind} "${name}"${suggestion(name, Object.keys(COMMANDS))}; see cluster-hosts --help`);
}

function suggestion(word: string, known: readonly string[]): string {
  const near = known.find((candidate) => isTypo(word, candidate));
  return near ? `: is "${near}" meant?` : "";
}

function parseFlags(name: string, command: Command, args: readonly string[]): Flags {
  const options = new Map<string, Option>(command.options.map((option) => [option, OPTIONS[option]]));
  const unknown: string[] = [];
  const namesWhere = (test: (option: Option) => boolean) =>
    [...options].filter(([, option]) => test(option)).map(([option]) => option);
  const parsed: Record<string, unknown> & { _: string[]; "--"?: string[] } = parseArgs(joinValues(args), {
    string: ["_", ...namesWhere(({ value }) => value !== undefined)],
    boolean: namesWhere(({ value }) => value === undefined),
    collect: namesWhere(({ repeats }) => repeats === true),
    alias: { h: "help" },
    "--": true,
    unknown: (arg: string, key?: string) => {
      if (key === undefined) return true;
      unknown.push(arg.replace(/=.*/s, ""));
      return false;
    },
  });
  if (unknown.length > 0) {
    const known = [...options.keys()].map((option) => `--${option}`);
    const named = unknown.map((option) => `"${option}"${suggestion(option, known)}`).join(", ");
    throw new UsageError(`Unknown option ${named}; see cluster-hosts ${name} --help`);
  }
  const texts = (option: OptionName) => {
    const value = parsed[option];
    if (value === undefined || (Array.isArray(value) && value.length === 0)) return undefined;
    return Array.isArray(value) ? value.map(String) : [String(value)];
  };
  for (const [option, { value }] of options) {
    if (value && texts(option as OptionName)?.includes("")) throw new UsageError(`--${option} needs a value: ${value}`);
  }
  const text = (option: OptionName) => texts(option)?.at(-1);
  return {
    nodes: parsed._,
    command: args.includes("--") ? parsed["--"] ?? [] : undefined,
    has: (option) => parsed[option] !== undefined && parsed[option] !== false,
    text,
    texts,
    number: (option, { min, max = 2_000_000, isWhole = false }) => {
      const value = text(option);
      if (value === undefined) return undefined;
      const number = /^\d+(?:\.\d+)?$/.test(value) ? Number(value) : NaN;
      if (number >= min && number <= max && (!isWhole || Number.isInteger(number))) return number;
      const kind = isWhole ? "a whole number" : "a number";
      throw new UsageError(`--${option} takes ${kind} from ${min} to ${max}, not ${JSON.stringify(value)}`);
    },
  };
}

/** What parseArgs cannot know: that "-" is a value, and that the one of --watch may be missing. */
function joinValues(args: readonly string[]): string[] {
  const end = args.indexOf("--");
  const options = end < 0 ? args : args.slice(0, end);
  const joined: string[] = [];
  for (let index = 0; index < options.length; index++) {
    const [arg, next] = [options[index]!, options[index + 1]];
    if (arg === "--config" && next === "-") {
      joined.push("--config=-");
      index++;
    } else if (arg === "--watch" && !/^\d/.test(next ?? "")) joined.push("--watch=5");
    else joined.push(arg);
  }
  return [...joined, ...args.slice(options.length)];
}

interface Inventory {
  readonly config: HostsConfig;
  readonly nodes: readonly ClusterNode[];
  readonly origin: string;
  /** Whether there is an inventory at all: the default file may be missing. */
  readonly exists: boolean;
}

let stdinText: string | undefined;

async function readConfig(flags: Flags, signal?: AbortSignal): Promise<HostsConfigText> {
  const source = flags.text("config");
  if (source === "-") {
    stdinText ??= await new Response(Deno.stdin.readable).text();
    return { text: stdinText, origin: "stdin", exists: true };
  }
  const { timeoutMs } = sweepFlags(flags);
  return await readHostsConfig(source, { timeoutMs, signal });
}

async function loadInventory(flags: Flags, signal?: AbortSignal): Promise<Inventory> {
  const { text, origin, exists } = await readConfig(flags, signal);
  const config = parseHostsConfig(text, origin);
  return { config, nodes: [...(await getClusterNodes(config)).values()], origin, exists };
}

function selectionOf(flags: Flags, names = flags.nodes): Parameters<typeof selectNodes>[1] & object {
  const [roles, gpus, exclude] = [flags.texts("role"), flags.texts("gpu"), flags.texts("exclude")];
  return {
    ...(names.length > 0 ? { names } : {}),
    ...(roles ? { roles } : {}),
    ...(gpus ? { gpus } : {}),
    ...(exclude ? { exclude } : {}),
    includeInactive: flags.has("all"),
  };
}

function select(flags: Flags, inventory: Inventory, names = flags.nodes): ClusterNode[] {
  if (inventory.nodes.length === 0) throw new UsageError(emptyInventory(inventory));
  const selected = selectNodes(inventory.nodes, selectionOf(flags, names));
  if (selected.length > 0) return selected;
  const inactive = inventory.nodes.filter((node) => !node.isActive).length;
  throw new UsageError(
    `No node is selected out of ${inventory.nodes.length} in ${inventory.origin}` +
      (inactive > 0 && !flags.has("all") ? `; ${inactive} are not active: see --all` : ""),
  );
}

function emptyInventory({ origin, exists }: Inventory): string {
  return exists
    ? `No hosts in ${origin}: add them under "hosts"`
    : `There is no ${origin} here: create it, name another with --config` + hint("RINGRIFT_HOSTS_CONFIG", " or with");
}

/** Names a variable that would have decided, with the flag where it may not be read. */
function hint(variable: string, words: string): string {
  const { state } = Deno.permissions.querySync({ name: "env", variable });
  return `${words} ${variable}${state === "granted" ? "" : ` (--allow-env=${variable} lets it be read)`}`;
}

function sweepFlags(flags: Flags): { timeoutMs: number; concurrency: number; port: number | undefined } {
  const seconds = flags.number("timeout", { min: 0.001 }) ?? 5;
  return {
    timeoutMs: seconds * 1000,
    concurrency: flags.number("concurrency", { min: 1, max: 1_000_000, isWhole: true }) ?? 1024,
    port: flags.number("port", { min: 1, max: 65535, isWhole: true }),
  };
}

function minUpOf(flags: Flags, nodes: readonly ClusterNode[]): number {
  const minUp = flags.number("min-up", { min: 1, isWhole: true }) ?? nodes.length;
  if (minUp > nodes.length) throw new UsageError(`--min-up ${minUp}, but only ${nodes.length} nodes are selected`);
  return minUp;
}

/** Ends what runs inside at SIGINT, SIGTERM and SIGHUP, and stops listening afterwards. */
async function interruptible<T>(run: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const listeners = ([["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const).map(([signal, exitCode]) => {
    const listener = () => controller.abort(new Interrupt(exitCode));
    try {
      Deno.addSignalListener(signal, listener);
    } catch {
      // Windows knows SIGINT alone.
    }
    return [signal, listener] as const;
  });
  try {
    return await run(controller.signal);
  } finally {
    for (const [signal, listener] of listeners) {
      try {
        Deno.removeSignalListener(signal, listener);
      } catch {
        // As above.
      }
    }
  }
}

interface Round {
  readonly nodes: readonly ClusterNode[];
  /** In the order of the nodes. Fewer than them where the round was interrupted. */
  readonly probes: readonly NodeProbe[];
  readonly exitCode: number;
}

async function status(flags: Flags): Promise<number> {
  const watchSeconds = flags.number("watch", { min: 0.1 });
  if (watchSeconds !== undefined) return await interruptible((signal) => watch(flags, watchSeconds * 1000, signal));
  return await interruptible(async (signal) => {
    const started = performance.now();
    const inventory = await loadInventory(flags, signal);
    const round = await checkRound(flags, await statusNodes(flags, inventory), signal);
    if (flags.has("quiet")) return round.exitCode;
    const { probes } = round;
    const flag = missingNetFlag(probes, sweepFlags(flags).port);
    if (flag && probes.every(({ failure }) => failure?.code === "denied")) throw new Error(netDenied(flag));
    print(flags.has("json") ? statusJson(round) : statusTable(probes, round.nodes.length, performance.now() - started));
    if (flag) warn(netDenied(flag));
    if (signal.aborted) warn(`Interrupted: ${probes.length} of ${round.nodes.length} nodes were checked`);
    return round.exitCode;
  });
}

function netDenied(flag: string): string {
  return `Requires net access: run again with ${flag}`;
}

/** The nodes to check. Without an inventory, the one address that the environment names. */
async function statusNodes(flags: Flags, inventory: Inventory): Promise<ClusterNode[]> {
  if (inventory.nodes.length > 0) return select(flags, inventory);
  const address = await getCoordinatorAddress(inventory.config);
  if (!address) {
    throw new UsageError(emptyInventory(inventory) + hint("RINGRIFT_COORDINATOR_IP", ", or set"));
  }
  const { coordinator: name } = await getEloSyncConfig(inventory.config);
  const { hostname: tailscaleIp, port: dataServerPort } = address;
  return [new ClusterNode({ name, role: "coordinator", tailscaleIp, dataServerPort })];
}

async function checkRound(flags: Flags, nodes: readonly ClusterNode[], signal: AbortSignal): Promise<Round> {
  const minUp = minUpOf(flags, nodes);
  const known = new Map<ClusterNode, NodeProbe>();
  const progress = new Progress(nodes.length, flags);
  let exitCode: number | undefined;
  try {
    await probeNodes(nodes, {
      ...sweepFlags(flags),
      check: flags.has("tcp") ? "tcp" : "http",
      signal,
      onProbe: (probe) => {
        known.set(probe.node, probe);
        progress.show(known.size);
      },
    });
  } catch (error) {
    if (!(error instanceof Interrupt)) throw error;
    exitCode = error.exitCode;
  } finally {
    progress.clear();
  }
  const probes = nodes.map((node) => known.get(node)).filter((probe) => probe !== undefined);
  return { nodes, probes, exitCode: exitCode ?? roundExitCode(probes, minUp) };
}

function roundExitCode(probes: readonly NodeProbe[], minUp: number): number {
  const { up, unknown } = countStates(probes);
  if (up >= minUp) return 0;
  return unknown > 0 ? 2 : 1;
}

function countStates(probes: readonly NodeProbe[]): Record<NodeState, number> {
  const counts = { up: 0, unhealthy: 0, down: 0, unknown: 0 };
  for (const { state } of probes) counts[state]++;
  return counts;
}

/** `checked 120/1000` on a terminal's stderr, and nothing anywhere else. */
class Progress {
  readonly #total: number;
  readonly #isShown: boolean;
  #lastMs = performance.now();
  #isDirty = false;

  constructor(total: number, flags: Flags) {
    this.#total = total;
    this.#isShown = !flags.has("quiet") && !flags.has("watch") && Deno.stderr.isTerminal();
  }

  show(done: number): void {
    if (!this.#isShown || performance.now() - this.#lastMs < 100) return;
    this.#lastMs = performance.now();
    this.#isDirty = true;
    write(Deno.stderr, `\rchecked ${done}/${this.#total}`);
  }

  clear(): void {
    if (this.#isDirty) write(Deno.stderr, "\r\x1b[K");
    this.#isDirty = false;
  }
}

function statusJson({ nodes, probes }: Round): string {
  const summary = { total: nodes.length, checked: probes.length, ...countStates(probes) };
  return jsonDocument({ checkedAt: new Date().toISOString(), summary }, "nodes", probes.map(probeJson));
}

function probeJson({ node, state, address, port, connectMs, status, failure }: NodeProbe): Record<string, unknown> {
  const { name, role, gpu } = node;
  const latency = connectMs === undefined ? null : Number(connectMs.toFixed(2));
  // What is not known is null, so that every node has the same keys.
  return {
    name,
    role,
    gpu,
    state,
    address: address ?? null,
    port,
    connectMs: latency,
    status: status ?? null,
    failure: failure ?? null,
  };
}

const STATE_COLOURS: Readonly<Record<NodeState, number>> = { up: 32, unhealthy: 33, down: 31, unknown: 35 };
const STATUS_HEADER = ["NAME", "ROLE", "GPU", "ADDRESS", "LATENCY", "STATE", "VERSION", "GAMES", "REASON"];

function statusTable(probes: readonly NodeProbe[], total: number, elapsedMs: number): string {
  return table(STATUS_HEADER, probes.map(statusRow)) + `\n${summaryLine(probes, total)} (${seconds(elapsedMs)})\n`;
}

function statusRow({ node, state, address, port, connectMs, status, failure }: NodeProbe): Cell[] {
  const shown = address ?? node.bestIp;
  return [
    node.name,
    node.role,
    node.gpu || "-",
    { text: shown ? hostPort(shown, port) : "-", ...(address ? {} : { colour: 2 }) },
    { text: connectMs === undefined ? "-" : `${connectMs.toFixed(1)} ms`, isRight: true },
    { text: state, colour: STATE_COLOURS[state] },
    scalar(status?.version),
    { text: scalar(status?.game_count), isRight: true },
    reason(failure),
  ];
}

function reason(failure: ProbeFailure | undefined): string {
  if (!failure) return "";
  const { code, message } = failure;
  return message.includes(code) ? message : `${code}: ${message}`;
}

function scalar(value: unknown): string {
  return typeof value === "string" || typeof value === "number" ? String(value).slice(0, 40) : "-";
}

function summaryLine(probes: readonly NodeProbe[], total: number): string {
  const { up, ...others } = countStates(probes);
  const rest = Object.entries({ ...others, "not checked": total - probes.length }).filter(([, count]) => count > 0);
  return [`${up} of ${total} nodes up`, ...rest.map(([state, count]) => `${count} ${state}`)].join(", ");
}

function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 0)} s`;
}

async function watch(flags: Flags, intervalMs: number, signal: AbortSignal): Promise<number> {
  const isLive = Deno.stdout.isTerminal() && !flags.has("json") && !flags.has("quiet");
  const since = new Map<string, { state: NodeState; atMs: number }>();
  let nodes: ClusterNode[] | undefined;
  let exitCode: number | undefined;
  let trouble: string | undefined;
  for (;;) {
    try {
      nodes = await statusNodes(flags, await loadInventory(flags, signal));
      minUpOf(flags, nodes);
      trouble = undefined;
    } catch (error) {
      // A broken edit must not end a watch: the last good inventory stays, and the fault is told once.
      const message = error instanceof Error ? error.message : String(error);
      if (!nodes || signal.aborted) throw error;
      if (message !== trouble && !isLive) warn(message);
      trouble = message;
    }
    const round = await checkRound(flags, nodes, signal);
    if (signal.aborted) break;
    exitCode = round.exitCode;
    const flag = missingNetFlag(round.probes, sweepFlags(flags).port);
    if (flag) throw new Error(netDenied(flag));
    const changes = noteChanges(since, round.probes);
    if (isLive) drawRound(round, since, intervalMs, trouble);
    else if (!flags.has("quiet")) print(changes.map((change) => changeLine(change, flags.has("json"))).join(""));
    await delay(intervalMs, { signal }).catch(() => {});
    if (signal.aborted) break;
  }
  // Below the ^C that the terminal writes.
  if (isLive) print("\n");
  return exitCode ?? (signal.reason as Interrupt).exitCode;
}

interface Change {
  readonly probe: NodeProbe;
  readonly previous: NodeState | undefined;
}

function noteChanges(since: Map<string, { state: NodeState; atMs: number }>, probes: readonly NodeProbe[]): Change[] {
  const names = new Set(probes.map(({ node }) => node.name));
  for (const name of since.keys()) if (!names.has(name)) since.delete(name);
  const changes: Change[] = [];
  for (const probe of probes) {
    const { name } = probe.node;
    const previous = since.get(name)?.state;
    if (previous === probe.state) continue;
    since.set(name, { state: probe.state, atMs: performance.now() });
    changes.push({ probe, previous });
  }
  return changes;
}

function changeLine({ probe, previous }: Change, isJson: boolean): string {
  const time = new Date().toISOString();
  if (isJson) return `${toJson({ schemaVersion: 1, time, previous: previous ?? null, ...probeJson(probe) })}\n`;
  const why = probe.failure ? ` (${reason(probe.failure)})` : "";
  return `${time} ${escapeText(`${probe.node.name}: ${previous ? `${previous} -> ` : ""}${probe.state}${why}`)}\n`;
}

function drawRound(
  { nodes, probes }: Round,
  since: ReadonlyMap<string, { atMs: number }>,
  intervalMs: number,
  trouble: string | undefined,
): void {
  const { rows } = Deno.consoleSize();
  const nowMs = performance.now();
  const lines = table(
    ["SINCE", ...STATUS_HEADER],
    probes.map((probe) => [
      { text: duration(nowMs - since.get(probe.node.name)!.atMs), isRight: true },
      ...statusRow(probe),
    ]),
  ).trimEnd().split("\n");
  const room = Math.max(2, rows - (trouble ? 4 : 3));
  const shown = lines.length > room
    ? [...lines.slice(0, room - 1), `… ${lines.length - room + 1} more: make the window higher`]
    : lines;
  const time = new Date().toTimeString().slice(0, 8);
  const head = `${time}  ${summaryLine(probes, nodes.length)}  (every ${intervalMs / 1000} s, Ctrl-C ends)`;
  const faults = trouble === undefined ? [] : [paint(31, escapeText(trouble.split("\n", 1)[0]!))];
  // Line by line over the old picture: clearing the screen first would flicker. What is too wide is cut, not wrapped.
  print(`\x1b[?7l\x1b[H${[head, ...faults, "", ...shown].map((line) => `${line}\x1b[K`).join("\n")}\n\x1b[J\x1b[?7h`);
}

function duration(ms: number): string {
  const total = Math.floor(ms / 1000);
  const [hours, minutes, rest] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, total % 60];
  if (hours > 0) return `${hours}h${String(minutes).padStart(2, "0")}m`;
  return minutes > 0 ? `${minutes}m${String(rest).padStart(2, "0")}s` : `${rest}s`;
}

async function listNodes(flags: Flags): Promise<number> {
  const inventory = await loadInventory(flags);
  if (inventory.nodes.length === 0) throw new UsageError(emptyInventory(inventory));
  const nodes = selectNodes(inventory.nodes, { ...selectionOf(flags), includeInactive: true });
  if (flags.has("json")) {
    print(jsonDocument({}, "nodes", nodes.map(nodeJson)));
    return 0;
  }
  const rows = nodes.map((node): Cell[] => [
    node.name,
    node.role,
    { text: node.status, ...(node.isActive ? {} : { colour: 2 }) },
    node.gpu || "-",
    { text: node.memoryGb ? `${node.memoryGb} GB` : "-", isRight: true },
    { text: node.cpus ? String(node.cpus) : "-", isRight: true },
    node.addresses.join(", ") || "-",
    node.dataServerUrl ?? String(node.dataServerPort),
    `${node.sshUser}:${node.sshPort}`,
  ]);
  print(table(["NAME", "ROLE", "STATUS", "GPU", "MEMORY", "CPUS", "ADDRESSES", "DATA", "SSH"], rows));
  if (!flags.has("quiet")) {
    const active = nodes.filter((node) => node.isActive).length;
    print(`\n${nodes.length} ${nodes.length === 1 ? "node" : "nodes"}, ${active} active\n`);
  }
  return 0;
}

function nodeJson(node: ClusterNode): Record<string, unknown> {
  const { entry: _, ...fields } = node;
  const { bestIp, addresses, dataServerBaseUrl, isActive } = node;
  return {
    ...fields,
    tailscaleIp: node.tailscaleIp ?? null,
    sshHost: node.sshHost ?? null,
    sshKey: node.sshKey ?? null,
    dataServerUrl: node.dataServerUrl ?? null,
    bestIp: bestIp ?? null,
    addresses,
    dataServerBaseUrl: dataServerBaseUrl ?? null,
    isActive,
  };
}

async function coordinator(flags: Flags): Promise<number> {
  rejectNodes(flags, "coordinator");
  const { config, origin } = await loadInventory(flags);
  const address = await getCoordinatorAddress(config);
  if (!address) {
    const { coordinator: name } = await getEloSyncConfig(config);
    throw new Error(
      `No coordinator: "${name}" has no address in ${origin}; set elo_sync.coordinator` +
        hint("RINGRIFT_COORDINATOR_IP", " or"),
    );
  }
  const { hostname, port } = address;
  print(flags.has("json") ? `${toJson({ schemaVersion: 1, hostname, port })}\n` : `${hostPort(hostname, port)}\n`);
  return 0;
}

function rejectNodes(flags: Flags, name: string): void {
  if (flags.nodes.length > 0) throw new UsageError(`${name} takes no node: ${flags.nodes.join(" ")}`);
}

const URL_KINDS = ["elo", "data", "models"] as const;

function urlKind(flags: Flags): { kind: typeof URL_KINDS[number] | "other"; names: readonly string[] } {
  const [first, ...rest] = flags.nodes;
  const kind = URL_KINDS.find((known) => known === first);
  if (kind === "data" && (flags.has("port") || flags.has("path"))) {
    throw new UsageError("urls data takes each node's own port and URL: --port and --path do not go with it");
  }
  if (kind) return { kind, names: rest };
  if (flags.has("port") || flags.has("path")) return { kind: "other", names: flags.nodes };
  const given = first === undefined
    ? "urls needs a kind"
    : `Unknown kind of URL "${first}"${suggestion(first, URL_KINDS)}`;
  throw new UsageError(`${given}; expected elo, data or models, or --port and --path`);
}

async function urls(flags: Flags): Promise<number> {
  const { kind, names } = urlKind(flags);
  let checked = 0;
  let hasAddress = false;
  const found = await interruptible(async (signal) => {
    const inventory = await loadInventory(flags, signal);
    const selected = select(flags, inventory, names);
    hasAddress = selected.some((node) => node.dataServerBaseUrl !== undefined);
    const progress = new Progress(selected.length, flags);
    const { timeoutMs, concurrency, port } = sweepFlags(flags);
    const path = flags.text("path");
    const options = {
      source: inventory.config,
      selection: selectionOf(flags, names),
      timeoutMs,
      concurrency,
      signal,
      reachableOnly: !flags.has("unchecked"),
      onProbe: () => progress.show(++checked),
    };
    const target = { ...(port === undefined ? {} : { port }), ...(path === undefined ? {} : { path }) };
    try {
      if (kind === "data") return await getDataSyncUrls({ ...options, excludeSelf: !flags.has("include-self") });
      if (kind === "elo") return await getEloSyncUrls({ ...options, ...target });
      if (kind === "models") {
        return await getSyncUrls({ ...options, port: MODEL_SYNC_PORT, path: "/models", ...target });
      }
      return await getSyncUrls({ ...options, ...target });
    } finally {
      progress.clear();
    }
  });
  if (flags.has("json")) print(jsonDocument({}, "urls", found));
  else print(found.map((url) => `${escapeText(url)}\n`).join(""));
  if (found.length === 0 && !flags.has("quiet")) {
    warn(
      !hasAddress
        ? "No selected node has an address"
        : checked > 0
        ? "No node answered: cluster-hosts status tells why"
        : "Only this host itself is selected: see --include-self",
    );
  }
  return found.length > 0 ? 0 : 1;
}

async function wait(flags: Flags): Promise<number> {
  return await interruptible(async (signal) => {
    const started = performance.now();
    const totalMs = (flags.number("timeout", { min: 0.001 }) ?? 300) * 1000;
    const intervalMs = (flags.number("interval", { min: 0.05 }) ?? 2) * 1000;
    const { concurrency, port } = sweepFlags(flags);
    const nodes = select(flags, await loadInventory(flags, signal));
    const minUp = minUpOf(flags, nodes);
    const isQuiet = flags.has("quiet") || flags.has("json");
    const announced = new Set<ClusterNode>();
    const waitedMs = () => performance.now() - started;
    const lastMs = totalMs - Math.min(1000, totalMs / 4);
    let last = new Map<ClusterNode, NodeProbe>();
    let isLast = false;
    for (;;) {
      const current = new Map<ClusterNode, NodeProbe>();
      try {
        await probeNodes(nodes, {
          // A node that hangs is asked anew before the whole time is over.
          timeoutMs: Math.max(1, Math.min(5000, totalMs - waitedMs())),
          concurrency,
          port,
          check: flags.has("tcp") ? "tcp" : "http",
          signal,
          onProbe: (probe) => {
            current.set(probe.node, probe);
            if (probe.state !== "up" || announced.has(probe.node)) return;
            announced.add(probe.node);
            if (!isQuiet) print(`${escapeText(probe.node.name)} up after ${seconds(waitedMs())}\n`);
          },
        });
      } catch (error) {
        if (error instanceof Interrupt) warnMissing(flags, nodes, new Map([...last, ...current]), waitedMs());
        throw error;
      }
      last = current;
      const probes = [...last.values()];
      const flag = missingNetFlag(probes, port);
      if (flag) throw new Error(netDenied(flag));
      const exitCode = countStates(probes).up >= minUp ? 0 : 1;
      if (exitCode === 0 || isLast || waitedMs() >= totalMs) {
        if (flags.has("json")) {
          const isUp = (node: ClusterNode) => last.get(node)?.state === "up";
          print(jsonDocument(
            { waitedMs: Math.round(waitedMs()), up: nodes.filter(isUp).map((node) => node.name) },
            "missing",
            nodes.filter((node) => !isUp(node)).map((node) => ({ name: node.name, failure: last.get(node)?.failure })),
          ));
        }
        if (exitCode !== 0) warnMissing(flags, nodes, last, waitedMs());
        return exitCode;
      }
      // The last check is early enough for its answers to count.
      isLast = waitedMs() + intervalMs >= lastMs;
      await delay(isLast ? lastMs - waitedMs() : intervalMs, { signal });
    }
  });
}

function warnMissing(
  flags: Flags,
  nodes: readonly ClusterNode[],
  probes: ReadonlyMap<ClusterNode, NodeProbe>,
  waitedMs: number,
): void {
  if (flags.has("quiet")) return;
  const missing = nodes.filter((node) => probes.get(node)?.state !== "up")
    .map((node) => `${node.name} (${probes.get(node)?.failure?.code ?? "not checked"})`);
  warn(`Still missing after ${seconds(waitedMs)}: ${missing.join(", ")}`);
}

const SSH_FAULT =
  /^ssh: |Permission denied|Host key verification failed|^Connection |^kex_|^Received disconnect|^Unable to negotiate/;

type SshFailureCode = "connect" | "timeout" | "exit" | "signal" | "no-address" | "local";

interface SshResult {
  readonly node: ClusterNode;
  readonly exitCode: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly truncated: boolean;
  readonly durationMs: number;
  readonly failure: { readonly code: SshFailureCode; readonly message: string } | undefined;
}

async function ssh(flags: Flags): Promise<number> {
  const words = flags.command ?? [];
  if (words.length === 0) throw new UsageError('ssh needs a command behind "--": cluster-hosts ssh gpu-1 -- uptime');
  const timeoutMs = (flags.number("timeout", { min: 0.001 }) ?? 60) * 1000;
  const concurrency = flags.number("concurrency", { min: 1, max: 10_000, isWhole: true }) ?? 32;
  const connectTimeoutMs = (flags.number("connect-timeout", { min: 0.001 }) ?? 10) * 1000;
  const nodes = select(flags, await loadInventory(flags));
  const options = { user: flags.text("user"), connectTimeoutMs, options: flags.texts("ssh-option") ?? [] };
  const commands = sshCommands(nodes, words, options);
  if (Deno.permissions.querySync({ name: "run", command: "ssh" }).state !== "granted") {
    throw new Error("Requires run access to ssh (on the PATH): run again with --allow-run=ssh");
  }

  const isLive = !flags.has("gather") && !flags.has("json");
  return await interruptible(async (signal) => {
    const results: SshResult[] = [];
    // What ends one run by a fault of this side ends them all: no ssh, or nobody left to read.
    const fault = new AbortController();
    const either = AbortSignal.any([signal, fault.signal]);
    const runs = pooledMap(concurrency, nodes, async (node: ClusterNode): Promise<void> => {
      if (either.aborted) return;
      try {
        results.push(await runSsh(node, commands.get(node), { timeoutMs, signal: either, isLive }));
      } catch (error) {
        fault.abort(error);
      }
    });
    for await (const _ of runs);
    fault.signal.throwIfAborted();
    results.sort((a, b) => nodes.indexOf(a.node) - nodes.indexOf(b.node));
    if (flags.has("json")) print(jsonDocument({}, "nodes", results.map(sshJson)));
    else if (flags.has("gather")) print(gathered(results));
    if (!flags.has("quiet")) warnSshSummary(results, nodes.length);
    signal.throwIfAborted();
    return results.every(({ failure }) => !failure) ? 0 : 1;
  });
}

/** All argument lists, before the first process starts: what is unsafe in one of them stops the whole run. */
function sshCommands(
  nodes: readonly ClusterNode[],
  words: readonly string[],
  options: Parameters<typeof sshCommand>[2],
): Map<ClusterNode, string[]> {
  const commands = new Map<ClusterNode, string[]>();
  const problems: string[] = [];
  for (const node of nodes) {
    if (node.bestIp === undefined) continue;
    try {
      commands.set(node, sshCommand(node, words, options));
    } catch (error) {
      problems.push((error as Error).message);
    }
  }
  if (problems.length > 0) throw new UsageError(problems.join("\n"));
  return commands;
}

async function runSsh(
  node: ClusterNode,
  argv: readonly string[] | undefined,
  options: { readonly timeoutMs: number; readonly signal: AbortSignal; readonly isLive: boolean },
): Promise<SshResult> {
  const { timeoutMs, signal, isLive } = options;
  const started = performance.now();
  const result = (fields: Partial<SshResult>): SshResult => ({
    node,
    exitCode: null,
    signal: null,
    stdout: "",
    stderr: "",
    truncated: false,
    durationMs: Math.round(performance.now() - started),
    failure: undefined,
    ...fields,
  });
  if (!argv) return result({ failure: { code: "no-address", message: "no address" } });

  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(argv[0]!, { args: argv.slice(1), stdin: "null", stdout: "piped", stderr: "piped" })
      .spawn();
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) throw new UsageError("There is no ssh on the PATH: install OpenSSH");
    return result({ failure: { code: "local", message: `ssh cannot be started (${(error as Error).message})` } });
  }
  const prefix = isLive ? `${escapeText(node.name)}: ` : undefined;
  let isTimedOut = false;
  let killTimer: ReturnType<typeof setTimeout> | undefined;
  const end = () => {
    killQuietly(child, "SIGTERM");
    killTimer ??= setTimeout(() => killQuietly(child, "SIGKILL"), GRACE_MS);
  };
  const stdout = new OutputReader(child.stdout, Deno.stdout, prefix, end);
  const stderr = new OutputReader(child.stderr, Deno.stderr, prefix, end);
  const timeout = setTimeout(() => {
    isTimedOut = true;
    end();
  }, timeoutMs);
  signal.addEventListener("abort", end);
  const { code, signal: endSignal } = await child.status;
  clearTimeout(timeout);
  clearTimeout(killTimer);
  signal.removeEventListener("abort", end);
  // A grandchild may hold the pipes for ever; what ssh itself wrote is in them already.
  await Promise.all([stdout.finish(), stderr.finish()]);

  const lastLine = stderr.text.trimEnd().split("\n").at(-1) ?? "";
  return result({
    exitCode: endSignal ? null : code,
    signal: endSignal,
    stdout: stdout.text,
    stderr: stderr.text,
    truncated: stdout.isTruncated || stderr.isTruncated,
    failure: isTimedOut
      ? { code: "timeout", message: `timed out after ${seconds(timeoutMs)}` }
      : endSignal
      ? { code: "signal", message: `ended by ${endSignal}` }
      // 255 is ssh's own, but a command may return it too: then ssh has said nothing of this kind.
      : code === 255 && SSH_FAULT.test(lastLine)
      ? { code: "connect", message: `could not connect (${lastLine})` }
      : code !== 0
      ? { code: "exit", message: `exit code ${code}` }
      : undefined,
  });
}

function killQuietly(child: Deno.ChildProcess, signal: Deno.Signal): void {
  try {
    child.kill(signal);
  } catch {
    // It has ended already.
  }
}

/** Reads a pipe to its end, keeps what the cap allows, and shows each line as it comes. */
class OutputReader {
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  readonly #sink: typeof Deno.stdout | typeof Deno.stderr;
  readonly #prefix: string | undefined;
  readonly #decoder = new TextDecoder();
  readonly #ended: Promise<void>;
  readonly #parts: string[] = [];
  #size = 0;
  #line = "";
  #lastReadMs = performance.now();
  isTruncated = false;

  constructor(
    stream: ReadableStream<Uint8Array>,
    sink: typeof Deno.stdout | typeof Deno.stderr,
    prefix: string | undefined,
    onFault: () => void,
  ) {
    this.#reader = stream.getReader();
    this.#sink = sink;
    this.#prefix = prefix;
    this.#ended = this.#read();
    // It is awaited only when the process has ended, which a full pipe would never let it.
    this.#ended.catch(onFault);
  }

  get text(): string {
    return this.#parts.join("");
  }

  async #read(): Promise<void> {
    for (;;) {
      const { done, value } = await this.#reader.read();
      if (done) break;
      this.#lastReadMs = performance.now();
      const kept = value.subarray(0, MAX_OUTPUT_BYTES - this.#size);
      this.#size += kept.length;
      if (kept.length > 0) this.#add(this.#decoder.decode(kept, { stream: true }));
      if (kept.length < value.length && !this.isTruncated) {
        this.isTruncated = true;
        this.#add(`${this.#line ? "\n" : ""}[cut at 1 MiB]\n`);
      }
    }
  }

  #add(text: string): void {
    this.#parts.push(text);
    if (this.#prefix === undefined) return;
    const lines = (this.#line + text).split("\n");
    this.#line = lines.pop()!;
    this.#show(lines);
  }

  #show(lines: readonly string[]): void {
    const text = lines.map((line) => `${this.#prefix}${escapeText(line.replace(/\r$/, ""))}\n`).join("");
    if (text !== "") write(this.#sink, text);
  }

  /** Ends at the end of the pipe, or when somebody else holds it open and nothing comes any more. */
  async finish(): Promise<void> {
    this.#lastReadMs = performance.now();
    const settled = new AbortController();
    const idle = async () => {
      while (performance.now() - this.#lastReadMs < GRACE_MS && !settled.signal.aborted) {
        await delay(GRACE_MS / 5, { signal: settled.signal }).catch(() => {});
      }
    };
    try {
      await Promise.race([this.#ended, idle()]);
    } finally {
      settled.abort();
      await this.#reader.cancel().catch(() => {});
    }
    if (this.#line !== "") this.#show([this.#line]);
  }
}

function sshJson({ node, ...result }: SshResult): Record<string, unknown> {
  return { name: node.name, ...result, failure: result.failure ?? null };
}

function gathered(results: readonly SshResult[]): string {
  const groups = new Map<string, SshResult[]>();
  for (const result of results) {
    const key = JSON.stringify([result.exitCode, result.signal, result.failure?.code, result.stdout, result.stderr]);
    groups.set(key, [...groups.get(key) ?? [], result]);
  }
  return [...groups.values()].map((group) => {
    const { stdout, stderr, failure } = group[0]!;
    const names = foldNames(group.map(({ node }) => node.name));
    const count = group.length > 1 ? ` (${group.length})` : "";
    const output = [stdout, stderr].filter((text) => text !== "").map((text) => text.replace(/\n?$/, "\n")).join("");
    const lines = output.split("\n").map((line) => escapeText(line.replace(/\r$/, ""))).join("\n");
    const head = `${escapeText(names)}${count}${failure ? `: ${escapeText(failure.message)}` : ""}`;
    return `${paint(1, `--- ${head}`)}\n${lines}`;
  }).join("");
}

/** `gpu-1 gpu-2 gpu-3 head` as `gpu-[1-3],head`, which `NODE` takes back piece by piece. */
function foldNames(names: readonly string[]): string {
  const groups = new Map<string, { prefix: string; suffix: string; numbers: string[] }>();
  for (const name of names) {
    const [, prefix = "", digits, suffix = ""] = /^(.*?)(\d+)(\D*)$/s.exec(name) ?? [];
    if (digits === undefined) {
      groups.set(JSON.stringify([name]), { prefix: name, suffix: "", numbers: [] });
      continue;
    }
    // Numbers of one width only fold together where a zero leads: 09 and 10, but not 9 and 010.
    const width = digits.startsWith("0") ? digits.length : 0;
    const twin = [...groups.values()].find((group) =>
      group.prefix === prefix && group.suffix === suffix && group.numbers.length > 0 &&
      (width > 0 || group.numbers[0]!.startsWith("0")
        ? group.numbers[0]!.length === digits.length
        : !group.numbers[0]!.startsWith("0"))
    );
    if (twin) twin.numbers.push(digits);
    else groups.set(JSON.stringify([prefix, suffix, digits]), { prefix, suffix, numbers: [digits] });
  }
  return [...groups.values()].map(({ prefix, suffix, numbers }) => {
    if (numbers.length < 2) return `${prefix}${numbers[0] ?? ""}${suffix}`;
    return `${prefix}[${foldNumbers(numbers)}]${suffix}`;
  }).join(",");
}

function foldNumbers(numbers: readonly string[]): string {
  const runs: [string, string][] = [];
  for (const number of numbers.toSorted((a, b) => Number(a) - Number(b))) {
    const run = runs.at(-1);
    if (run && Number(number) === Number(run[1]) + 1) run[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([first, last]) => first === last ? first : `${first}-${last}`).join(",");
}

function warnSshSummary(results: readonly SshResult[], total: number): void {
  let failed = groupByReason(results, (message) => message);
  // Each address has a message of its own: past a few, only what they have in common can be read.
  if (failed.size > 5) failed = groupByReason(results, (message) => message.replace(/ \(.*\)$/s, ""));
  const truncated = results.filter((result) => result.truncated).map(({ node }) => node.name);
  const missing = total - results.length;
  const returned = results.filter(({ failure }) => !failure).length;
  const parts = [
    `${returned} of ${total} returned 0`,
    ...[...failed].map(([message, names]) => `${foldNames(names)}: ${message}`),
    ...(truncated.length > 0 ? [`${foldNames(truncated)}: output cut at 1 MiB`] : []),
    ...(missing > 0 ? [`${missing} not started`] : []),
  ];
  warn(parts.join("; "));
}

function groupByReason(results: readonly SshResult[], reasonOf: (message: string) => string): Map<string, string[]> {
  const groups = new Map<string, string[]>();
  for (const { node, failure } of results) {
    if (!failure) continue;
    const reason = reasonOf(failure.message);
    const names = groups.get(reason) ?? [];
    names.push(node.name);
    groups.set(reason, names);
  }
  return groups;
}

async function validate(flags: Flags): Promise<number> {
  rejectNodes(flags, "validate");
  let origin = flags.text("config") ?? "inventory";
  let errors: readonly ConfigProblem[];
  let doubts: readonly ConfigProblem[] = [];
  try {
    const source = await readConfig(flags);
    origin = source.origin;
    const report = inspectHostsConfig(source.text);
    errors = source.exists ? report.problems : [{ path: "", message: "there is no such file" }];
    doubts = report.doubts;
  } catch (error) {
    if (!(error instanceof HostsConfigError)) throw error;
    errors = error.problems;
  }
  if (flags.has("json")) print(`${toJson({ schemaVersion: 1, origin, errors, doubts })}\n`);
  else {
    const lines = [
      ...errors.map((problem) => formatConfigProblem(problem, origin)),
      ...doubts.map((doubt) => formatConfigProblem({ ...doubt, message: `doubt: ${doubt.message}` }, origin)),
    ];
    const count = (number: number, word: string) => `${number || "no"} ${word}${number === 1 ? "" : "s"}`;
    print(lines.map((line) => `${escapeText(line)}\n`).join(""));
    if (!flags.has("quiet")) print(`${count(errors.length, "error")}, ${count(doubts.length, "doubt")}\n`);
  }
  return errors.length > 0 || (flags.has("strict") && doubts.length > 0) ? 2 : 0;
}

async function exportInventory(flags: Flags): Promise<number> {
  const [format, ...names] = flags.nodes;
  const formats: Readonly<Record<string, (flags: Flags, nodes: readonly ClusterNode[]) => string>> = {
    ansible: ansibleInventory,
    prometheus: prometheusTargets,
    "ssh-config": sshConfig,
  };
  const known = Object.keys(formats);
  if (format === undefined || !Object.hasOwn(formats, format)) {
    const given = format === undefined
      ? "export needs a format"
      : `Unknown format "${format}"${suggestion(format, known)}`;
    throw new UsageError(`${given}; expected ${known.join(", ")}`);
  }
  if (format !== "ansible" && (flags.has("list") || flags.has("host"))) {
    throw new UsageError("--list and --host are for export ansible");
  }
  const inventory = await loadInventory(flags);
  print(formats[format]!(flags, select(flags, inventory, names)));
  return 0;
}

function ansibleInventory(flags: Flags, nodes: readonly ClusterNode[]): string {
  const host = flags.text("host");
  if (host !== undefined) {
    const node = nodes.find(({ name }) => name === host);
    return `${toJson(node ? ansibleVariables(node) : {}, 2)}\n`;
  }
  const groups = new Map<string, { label: string; hosts: string[] }>();
  const collisions = new Set<string>();
  for (const node of nodes) {
    for (const [kind, value] of [["role", node.role], ["status", node.status], ["gpu", node.gpu]] as const) {
      if (value === "") continue;
      const name = `${kind}_${value}`.replace(/[^A-Za-z0-9_]/g, "_");
      const label = `${kind} "${value}"`;
      const group = groups.get(name) ?? { label, hosts: [] };
      if (group.label !== label) collisions.add(`${group.label} and ${label} would both be the group ${name}`);
      group.hosts.push(node.name);
      groups.set(name, group);
    }
  }
  if (collisions.size > 0) throw new Error(`Cannot name the Ansible groups: ${[...collisions].join("; ")}`);
  return `${
    toJson({
      _meta: { hostvars: Object.fromEntries(nodes.map((node) => [node.name, ansibleVariables(node)])) },
      all: { children: ["ungrouped", ...groups.keys()] },
      ...Object.fromEntries([...groups].map(([name, { hosts }]) => [name, { hosts }])),
    }, 2)
  }\n`;
}

function ansibleVariables(node: ClusterNode): Record<string, unknown> {
  return {
    ansible_host: node.bestIp,
    ansible_user: node.sshUser,
    ansible_port: node.sshPort,
    ansible_ssh_private_key_file: node.sshKey,
    ...plainValue(node.entry, { nodes: 10_000 }) as Record<string, unknown>,
  };
}

/** A copy of what can be written as JSON: YAML may share and nest without end, which an endless text would be. */
function plainValue(value: unknown, budget: { nodes: number }, depth = 0): unknown {
  if (--budget.nodes < 0 || depth > 50) throw new Error("Cannot export a host whose keys are nested without end");
  if (Array.isArray(value)) return value.map((item) => plainValue(item, budget, depth + 1));
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plainValue(item, budget, depth + 1)]));
}

function prometheusTargets(flags: Flags, nodes: readonly ClusterNode[]): string {
  const { port } = sweepFlags(flags);
  const targets = nodes.flatMap(({ name, role, status, gpu, bestIp, dataServerPort }) =>
    bestIp === undefined
      ? []
      : [{ targets: [hostPort(bestIp, port ?? dataServerPort)], labels: { node: name, role, status, gpu } }]
  );
  return `${toJson(targets, 2)}\n`;
}

function sshConfig(_flags: Flags, nodes: readonly ClusterNode[]): string {
  const unusable = nodes.filter(({ name }) => /[*?!"#,]/.test(name) || escapeText(name) !== name).map(({ name }) =>
    JSON.stringify(name)
  );
  if (unusable.length > 0) {
    throw new Error(`Cannot be named in ssh_config, as patterns, comments or hidden text: ${unusable.join(", ")}`);
  }
  const quoted = (text: string) => /^[\w.:@~/+-]+$/.test(text) ? text : `"${text.replaceAll("\\", "\\\\")}"`;
  return nodes.map((node) => {
    if (node.bestIp === undefined) return `# ${node.name}: no address\n`;
    return [
      `Host ${quoted(node.name)}`,
      `  HostName ${node.bestIp}`,
      `  User ${quoted(node.sshUser)}`,
      `  Port ${node.sshPort}`,
      ...(node.sshKey ? [`  IdentityFile ${quoted(node.sshKey)}`] : []),
      "",
    ].join("\n");
  }).join("\n");
}

function permissionFlags(args: readonly string[]): Flags {
  const ownOptions = args.findIndex((arg) => !arg.startsWith("-"));
  const own = ownOptions < 0 ? args : args.slice(0, ownOptions);
  const flags = parseFlags("permissions", COMMANDS.permissions!, own);
  return { ...flags, nodes: ownOptions < 0 ? [] : args.slice(ownOptions) };
}

async function permissions(flags: Flags): Promise<number> {
  const [name, ...rest] = flags.nodes;
  if (flags.has("help")) {
    print(commandHelp(COMMANDS.permissions!));
    return 0;
  }
  if (name === undefined) throw new UsageError("permissions needs a command: cluster-hosts permissions status");
  const command = findCommand(name);
  const isFolded = flags.has("fold") || rest.includes("--fold");
  const args = parseFlags(name, command, rest.filter((arg) => arg !== "--fold"));
  if (args.has("help") || name === "permissions") {
    print("\n");
    return 0;
  }
  const needs = await neededPermissions(name, args);
  const allowed = [
    ["read", needs.read],
    ["net", foldHosts(needs.net, isFolded)],
    ["env", needs.env],
    ["sys", needs.sys],
    ["run", needs.run],
  ] as const;
  for (const path of needs.read) {
    if (/[\s,'"$`\\*?[]/.test(path)) {
      throw new Error(`Cannot print a flag for ${JSON.stringify(path)}: a shell would split it`);
    }
  }
  const printed = allowed.filter(([, values]) => values.length > 0).map(([kind, values]) =>
    values[0] === "" ? `--allow-${kind}` : `--allow-${kind}=${values.join(",")}`
  );
  print(`${printed.join(" ")}\n`);
  return 0;
}

interface NeededPermissions {
  readonly read: string[];
  readonly net: string[];
  readonly env: string[];
  readonly sys: string[];
  readonly run: string[];
}

async function neededPermissions(name: string, flags: Flags): Promise<NeededPermissions> {
  const inventory = await loadInventory(flags);
  const { origin } = inventory;
  const isUrl = /^https?:/i.test(origin);
  const needs: NeededPermissions = {
    read: isUrl || origin === "stdin" ? [] : [origin.replace(/^file:\/\//i, "")],
    net: isUrl ? [urlHost(origin)] : [],
    env: flags.has("config") ? [] : ["RINGRIFT_HOSTS_CONFIG"],
    sys: [],
    run: name === "ssh" ? ["ssh"] : [],
  };
  if (name !== "validate") {
    needs.env.push("RINGRIFT_CONFIG_PATH");
    // As in the library, the unified config is read only where a node depends on it.
    const { data_server_port: sharedPort } = Object(inventory.config.distributed) as { data_server_port?: unknown };
    const unified = envIfGranted("RINGRIFT_CONFIG_PATH");
    const isRead = inventory.nodes.some(({ entry }) => (entry.data_server_port ?? sharedPort ?? "") === "");
    if (unified !== undefined && isRead) needs.read.push(unified);
  }
  if (name === "coordinator" || (name === "status" && inventory.nodes.length === 0)) {
    needs.env.push("RINGRIFT_COORDINATOR_IP");
  }
  const { port } = sweepFlags(flags);
  if (name === "status") {
    needs.net.push(...(await statusNodes(flags, inventory)).flatMap((node) => netHosts(node, port)));
  }
  if (name === "wait") needs.net.push(...select(flags, inventory).flatMap((node) => netHosts(node, port)));
  if (name === "urls") {
    const { kind, names } = urlKind(flags);
    const { syncPort } = await getEloSyncConfig(inventory.config);
    const checked = kind === "data" ? undefined : port ?? { elo: syncPort, models: MODEL_SYNC_PORT, other: 8766 }[kind];
    if (kind === "data" && !flags.has("include-self")) {
      needs.env.push("RINGRIFT_NODE_ID");
      needs.sys.push("hostname", "networkInterfaces");
    }
    if (!flags.has("unchecked")) {
      needs.net.push(...select(flags, inventory, names).flatMap((node) => netHosts(node, checked)));
    }
  }
  return needs;
}

function envIfGranted(variable: string): string | undefined {
  if (Deno.permissions.querySync({ name: "env", variable }).state !== "granted") return undefined;
  return Deno.env.get(variable)?.trim() || undefined;
}

function urlHost(url: string): string {
  const { hostname, port, protocol } = new URL(url);
  return `${hostname}:${port || (protocol === "https:" ? 443 : 80)}`;
}

/** The hosts as they are, or, where asked for or too many, their IPv4 addresses as the smallest networks that fit. */
function foldHosts(hosts: readonly string[], isFolded: boolean): string[] {
  const distinct = [...new Set(hosts)];
  const fits = (list: readonly string[]) => list.join(",").length <= MAX_FLAG_LENGTH;
  if (!isFolded && fits(distinct)) return distinct;
  const others: string[] = [];
  const byPort = new Map<string, number[]>();
  for (const host of distinct) {
    const [, address, port] = /^(\d+\.\d+\.\d+\.\d+):(\d+)$/.exec(host) ?? [];
    if (address === undefined || port === undefined) others.push(host);
    else byPort.set(port, [...byPort.get(port) ?? [], ipv4Number(address)]);
  }
  for (let prefix = 32; prefix >= 8; prefix--) {
    const networks = [...byPort].flatMap(([port, addresses]) =>
      mergedNetworks(addresses, prefix).map((network) => `${network}:${port}`)
    );
    const list = [...networks, ...others];
    if (!fits(list)) continue;
    if (!isFolded || prefix < 32) {
      warn(
        `The ${distinct.length} hosts are too many for one flag: printed as ${list.length} networks, which may admit more`,
      );
    }
    return list;
  }
  warn(`The ${distinct.length} hosts are too many for one flag: printed as access to every host`);
  return [""];
}

function ipv4Number(address: string): number {
  return address.split(".").reduce((number, part) => number * 256 + Number(part), 0);
}

/** The fewest networks that hold exactly the networks of length `prefix` around the addresses. */
function mergedNetworks(addresses: readonly number[], prefix: number): string[] {
  const merged: string[] = [];
  let current = new Set(addresses.map((address) => Math.floor(address / 2 ** (32 - prefix))));
  for (let length = prefix; length >= 0 && current.size > 0; length--) {
    const parents = new Set<number>();
    for (const network of current) {
      const sibling = network % 2 === 0 ? network + 1 : network - 1;
      if (length > 0 && current.has(sibling)) parents.add(Math.floor(network / 2));
      else {
        const base = network * 2 ** (32 - length);
        const text = [24, 16, 8, 0].map((shift) => Math.floor(base / 2 ** shift) % 256).join(".");
        merged.push(length === 32 ? text : `${text}/${length}`);
      }
    }
    current = parents;
  }
  return merged;
}

type Cell = string | { readonly text: string; readonly colour?: number; readonly isRight?: boolean };

function table(header: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const cells = rows.map((row) => row.map((cell) => typeof cell === "string" ? { text: cell } : cell));
  const texts = cells.map((row) => row.map(({ text }) => escapeText(text)));
  const widths = header.map((title, column) =>
    texts.reduce((width, row) => Math.max(width, row[column]!.length), title.length)
  );
  const line = (row: readonly string[], styles: readonly { colour?: number; isRight?: boolean }[]) =>
    row.map((text, column) => {
      const { colour, isRight } = styles[column] ?? {};
      const padding = " ".repeat(widths[column]! - text.length);
      const painted = colour === undefined ? text : paint(colour, text);
      return isRight ? padding + painted : painted + padding;
    }).join("  ").trimEnd();
  const titleStyles = header.map((_, column) => ({ ...cells[0]?.[column], colour: 1 }));
  return [line(header, titleStyles), ...texts.map((row, index) => line(row, cells[index]!))].join("\n") + "\n";
}

function paint(code: number, text: string): string {
  return Deno.stdout.isTerminal() && !Deno.noColor ? `\x1b[${code}m${text}\x1b[0m` : text;
}

/** Nothing that a node, a file or an error says may steer the terminal. */
function escapeText(text: string): string {
  return text.replace(
    /[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu,
    (character) => character === "\t" ? " " : `\\u{${character.codePointAt(0)!.toString(16)}}`,
  );
}

function toJson(value: unknown, indent?: number): string {
  // What JSON leaves as it is, a terminal may still obey.
  return JSON.stringify(value, null, indent).replace(
    /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** One item a line: as good for `grep` and `diff` as for a parser. */
function jsonDocument(head: Record<string, unknown>, key: string, items: readonly unknown[]): string {
  const lines = items.map((item) => `\n${toJson(item)}`).join(",");
  return `${toJson({ schemaVersion: 1, ...head }).slice(0, -1)},"${key}":[${lines}${items.length > 0 ? "\n" : ""}]}\n`;
}

function print(text: string): void {
  write(Deno.stdout, text);
}

function warn(message: string): void {
  write(Deno.stderr, message.split("\n").map((line) => `cluster-hosts: ${escapeText(line)}\n`).join(""));
}

function write(sink: typeof Deno.stdout | typeof Deno.stderr, text: string): void {
  const bytes = new TextEncoder().encode(text);
  try {
    for (let written = 0; written < bytes.length;) written += sink.writeSync(bytes.subarray(written));
  } catch (error) {
    if (error instanceof Deno.errors.BrokenPipe) throw new ClosedOutput();
    throw new Error(`Cannot write the output: ${(error as Error).message}`, { cause: error });
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
