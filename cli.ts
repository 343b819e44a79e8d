/**
 * The command line, `cluster-hosts COMMAND [NODE...] [options]`, from a checkout, from a URL and compiled:
 *
 * ```sh
 * deno run --allow-read=config --allow-net cli.ts status
 * ```
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import manifest from "./deno.json" with { type: "json" };
// deno-fmt-ignore: one name a line would be fifty lines.
import {
  ClusterNode, type CommandResult, DATA_SYNC_PORT, dataEndpoints, DEFAULT_CONFIG_PATH, DEFAULTS, didYouMean,
  type Endpoint, endpointUrl, findSshEndpoint, foldNames, formatConfigProblem, getClusterNodes, getCoordinatorAddress,
  getCoordinatorNode, getDataSyncUrls, getEloSyncConfig, getSyncUrls, hostPort, type HostsConfig, HostsConfigError,
  type HostsConfigText, missingNetFlag, MODEL_SYNC_PORT, netFlag, type NodeProbe, type NodeSelection, type NodeState,
  parseHostsConfig, probeNodes, racedSshEndpoints, readHostsConfig, readsUnifiedConfig, readVariable, runOnNodes,
  selectNodes, spawnSsh, sshCommand, sshEndpoints, type SshOptions, statusPath, type SweepOptions, unsupportedDeno,
  validateHostsConfig, waitForNodes, watchNodes,
} from "./mod.ts";

/** What {@linkcode main} reads and writes: by default this process's own streams; a test gives one that records. */
export interface Io {
  /** Writes a result. */
  out(text: string): void;
  /** Writes progress or an error. */
  err(text: string): void;
  /** All of stdin. */
  readStdin(): Promise<Uint8Array<ArrayBuffer>>;
  /** Calls the listener at SIGINT, SIGTERM and SIGHUP; gives the function that ends it. */
  onSignal(listener: (signal: Deno.Signal) => void): () => void;
  /** The size of the terminal at this moment. */
  size(): { readonly columns: number; readonly rows: number };
  /** Whether results go to a terminal. */
  readonly isTerminal: boolean;
  /** Whether progress and errors go to a terminal. */
  readonly isErrTerminal: boolean;
  /** Whether a terminal can move its cursor: not with `TERM=dumb`. */
  readonly hasCursor: boolean;
  /** Whether colours are wanted on a terminal: not with `NO_COLOR`. */
  readonly hasColour: boolean;
}

const SIGNAL_EXIT_CODES: Readonly<Record<string, number>> = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 };

function openTerminal(): Io {
  const hasCursor = readVariable("TERM") !== "dumb";
  return {
    out: (text) => write(Deno.stdout, text),
    err: (text) => write(Deno.stderr, text),
    readStdin: () => new Response(Deno.stdin.readable).bytes(),
    onSignal: listenToSignals,
    // A terminal that was never told its size says 0.
    size: () => ({ columns: Deno.consoleSize().columns || 80, rows: Deno.consoleSize().rows || 24 }),
    isTerminal: Deno.stdout.isTerminal(),
    isErrTerminal: Deno.stderr.isTerminal(),
    hasCursor,
    hasColour: hasCursor && !Deno.noColor,
  };
}

function write(sink: typeof Deno.stdout | typeof Deno.stderr, text: string): void {
  const bytes = new TextEncoder().encode(text);
  try {
    for (let written = 0; written < bytes.length;) written += sink.writeSync(bytes.subarray(written));
  } catch (error) {
    if (error instanceof Deno.errors.BrokenPipe) throw new ClosedOutput();
    throw new Error(`Cannot write the output: ${messageOf(error)}`, { cause: error });
  }
}

function listenToSignals(listener: (signal: Deno.Signal) => void): () => void {
  // Windows knows the first one alone.
  const signals = Object.keys(SIGNAL_EXIT_CODES).slice(0, Deno.build.os === "windows" ? 1 : 3) as Deno.Signal[];
  const listeners = signals.map((signal) => [signal, () => listener(signal)] as const);
  for (const entry of listeners) Deno.addSignalListener(...entry);
  return () => listeners.forEach((entry) => Deno.removeSignalListener(...entry));
}

/** stdout closed early (`head`): exit quietly. */
class ClosedOutput extends Error {}

/** A signal came, which is the message. */
class Interrupt extends Error {}

interface Call {
  readonly io: Io;
  readonly signal: AbortSignal;
  readonly flags: Flags;
  /** Which of the command's kinds is asked for. */
  readonly kind: string;
  readonly words: readonly string[];
  /** What follows "--". */
  readonly remote: readonly string[] | undefined;
  readonly inventory: Inventory;
}

interface Command {
  readonly name: string;
  readonly summary: string;
  readonly usage: string;
  /** The words of which one precedes the NODEs. */
  readonly kinds?: readonly string[];
  readonly options: readonly OptionName[];
  /** Help on an option that means something of its own here. */
  readonly help?: Readonly<Partial<Record<OptionName, string>>>;
  readonly notes: string;
  readonly examples: readonly [string, string];
  run(call: Call): Promise<number>;
  /** What it uses beside what reading the inventory takes. */
  needs?(call: Call): Promise<Needs> | Needs;
}

type Needs = { readonly net?: readonly Endpoint[] } & { readonly [K in "env" | "sys" | "run"]?: readonly string[] };

/**
 * Runs one command line and gives its exit code: 0 all is well; 1 it is not; 2 bad usage, a bad inventory, or something
 * that could not be checked; 130 Ctrl-C; 143 SIGTERM. Results go to stdout, progress and errors to stderr. A permission
 * is used when it is needed, and never asked for; `permissions COMMAND` prints those of a command.
 */
export async function main(args: readonly string[], io: Io = openTerminal()): Promise<number> {
  const controller = new AbortController();
  const stopListening = io.onSignal((signal) => controller.abort(new Interrupt(signal)));
  try {
    const line = parseLine(args);
    const help = args.length === 0 ? generalHelp() : helpOf(line);
    if (help === undefined) return await runLine(line, io, controller.signal);
    io.out(help);
    return args.length === 0 ? 2 : 0;
  } catch (error) {
    if (error instanceof ClosedOutput) return 0;
    if (error instanceof Interrupt) return SIGNAL_EXIT_CODES[error.message]!;
    try {
      warn(io, messageOf(error));
    } catch {
      // stderr is closed or full: the exit code is all that is left to say it.
    }
    return 2;
  } finally {
    stopListening();
  }
}

async function runLine(line: Line, io: Io, signal: AbortSignal): Promise<number> {
  const { flags, remote, words: [name, ...words] } = line;
  const unsupported = unsupportedDeno();
  if (unsupported) throw new Error(unsupported);
  const command = name === undefined ? undefined : findCommand(name, words);
  const refused = refusals({ ...line, words }, command);
  if (!command || refused.length > 0) throw new Error(refused.join("\n"));
  const isRead = command !== VALIDATE;
  const source = isRead ? await readInventory({ flags, io, signal }) : { text: "", origin: "", exists: false };
  const call = { io, signal, flags, kind: "", words, remote, inventory: await parseInventory(source) };
  return await command.run(takeKind(call, command));
}

function helpOf({ flags, words: [name, ...words] }: Line): string | undefined {
  if (flags.version || name === "version") return `cluster-hosts ${manifest.version}\n`;
  const topic = name === "help" ? words[0] : name;
  if (name !== "help" && !flags.help) return undefined;
  return topic === undefined ? generalHelp() : commandHelp(findCommand(topic, words));
}

/** What is wrong with a line. The options of `permissions` are those of the command that it is about. */
function refusals({ words, remote, flags, unknown, faults }: Line, command: Command | undefined): string[] {
  const isInner = command === PERMISSIONS && words[0] !== undefined;
  const [asked, given] = isInner ? [findCommand(words[0]!, words), words.slice(1)] : [command, words];
  const seeHelp = `; see cluster-hosts ${asked ? `${asked.name} ` : ""}--help`;
  const options = [...asked?.options ?? [], ...OPTION_NAMES].map((option) => `--${option}`);
  const misplaced = OPTION_NAMES.filter((name) => name in flags && asked && !asked.options.includes(name));
  const refused = [
    ...unknown.map((option) => `Unknown option ${JSON.stringify(option)}${adviceOn(option, options) ?? seeHelp}`),
    ...misplaced.map((name) => `${asked!.name} does not take --${name}${seeHelp}`),
    ...faults,
  ];
  if (refused.length > 0) return refused;
  if (!asked) return [`There is no command${seeHelp}`];
  const views = (["json", "gather", "names", "watch", "dry-run"] as const).filter((name) => flags[name]);
  if (views.length > 1 && `${views}` !== "json,watch") return [`--${views.join(" and --")} exclude each other`];
  if (remote && asked !== SSH) return [`${asked.name} takes no command behind "--"`];
  if (words.includes("")) return ["A NODE is empty: did a $(...) print nothing?"];
  const isNodeless = asked.usage === "[options]" && given.length > 0;
  return isNodeless ? [`${asked.name} takes no NODE, got ${given.join(" ")}; a file is given as --config FILE`] : [];
}

function takeKind(call: Call, { name, kinds }: Command): Call {
  const { words: [word, ...words], flags } = call;
  if (!kinds) return call;
  if (word !== undefined && kinds.includes(word)) return { ...call, kind: word, words };
  if (name === URLS.name && ("port" in flags || "path" in flags)) return call;
  const head = word === undefined ? `${name} needs one of` : `Unknown kind ${JSON.stringify(word)}`;
  throw new Error(`${head}${adviceOn(word ?? "", kinds) ?? `: ${kinds.join(", ")}`}`);
}

/** What people who come from 0.1 or from another tool type, and what to type instead. */
const HINTS: readonly (readonly [typed: RegExp, hint: string])[] = [
  [/^--fold$/, "it is gone; past 100 KB, permissions prints --allow-net"],
  [/^--host$/, "it is gone; export ansible has the variables of every host under _meta"],
  [/^--(format|output)$|^-[oj]$/, "write --json"],
  [/^--(file|inventory)$|^-[fi]$/, "write --config PATH"],
  [/^--(nodes?|hosts|limit)$|^-[wln]$/, "name the nodes without an option, as in 'gpu-[1-8]'"],
  [/^--(ignore|skip)$|^-x$/, "write --exclude NODE"],
  [/^--(filter|selector|label)$/, "write --where KEY=VALUE"],
  [/^--(sort|order|failed|down)$/, "status lists problems first; --only problems shows them alone"],
  [/^--(retry|retries)$/, "TCP repeats lost packets itself; a longer --timeout gives it time"],
  [/^--(verbose|debug)$|^-v$/, "REASON says why; --json says everything"],
  [/^-p$/, "write --port PORT"],
  [/^-u$/, "write --user NAME"],
  [/^(list|ls|hosts|inventory|show)$/, "write nodes"],
  [/^(check|ping|health|up|top)$/, "write status"],
  [/^(run|exec|shell|login|clush|pdsh)$/, "write ssh"],
];

function adviceOn(word: string, known: readonly string[]): string | undefined {
  const hint = HINTS.find(([typed]) => typed.test(word))?.[1];
  const near = didYouMean(word, known);
  return hint ? `: ${hint}` : near && `; did you mean "${near}"?`;
}

function findCommand(name: string, words: readonly string[]): Command {
  const command = COMMANDS.find((known) => known.name === name);
  if (command) return command;
  const later = COMMANDS.find((known) => words.includes(known.name));
  if (later) throw new Error(`The command comes first: cluster-hosts ${later.name} ${shellQuote(name)}`);
  const advice = adviceOn(name, COMMANDS.map(nameOf)) ?? "; see cluster-hosts --help";
  throw new Error(`Unknown command ${JSON.stringify(name)}${advice}`);
}

function nameOf({ name }: { readonly name: string }): string {
  return name;
}

function generalHelp(): string {
  const options = optionHelp([...SELECTION, ...SWEEP, ...COMMON, "version"]);
  return [
    `cluster-hosts ${manifest.version}: which nodes the cluster has, and which of them answer`,
    "Usage: cluster-hosts COMMAND [NODE...] [options]",
    COMMANDS.map(({ name, summary }) => `  ${name.padEnd(12)} ${summary}`).join("\n"),
    "NODE is a name, a glob (gpu-*), a range (gpu-[1-8], gpu-[01-16,20]) or a comma\nlist of these. Without one: " +
    `the active nodes.\n\n${options}\n\n"cluster-hosts COMMAND --help" lists what a command takes.`,
    "Exit code 0: all is well; 1: it is not; 2: bad usage or config, or not checked.\n",
  ].join("\n\n");
}

function commandHelp({ name, summary, usage, options, help, notes, examples }: Command): string {
  return [
    summary.charAt(0).toUpperCase() + summary.slice(1),
    `Usage: cluster-hosts ${name} ${usage}`,
    optionHelp(options, help),
    notes,
    `Examples:\n${examples.map((example) => `  ${example}\n`).join("")}`,
  ].join("\n\n");
}

function optionHelp(names: readonly OptionName[], own: Command["help"] = {}): string {
  return names.map((name) => {
    const { short, value, help }: Option = OPTIONS[name];
    const label = `${short ? `-${short}, ` : ""}--${name}${value ? ` ${value}` : ""}`;
    return `  ${label.padEnd(23)} ${(own[name] ?? help).replaceAll("\n", `\n${" ".repeat(26)}`)}`;
  }).join("\n");
}

interface Option {
  readonly value?: string;
  readonly expected?: string;
  /** The value; undefined if it is not what is expected. A list is added to, if the option is given again. */
  parse?(text: string): unknown;
  readonly help: string;
  readonly short?: string;
}

const TEXT = { parse: (text: string) => text } as const;
const ITEM = { parse: (text: string) => [text] } as const;
const LIST = { expected: "a comma list", parse: splitList } as const;
const TIME = { value: "TIME", expected: "seconds, or 500ms, 5s, 2m", parse: parseDuration } as const;
const PAIR = { value: "KEY=VALUE", expected: "KEY=VALUE" } as const;
const MIN_UP = { value: "N|N%", expected: "a number from 1, or 1% to 100%" } as const;
const STATE = { value: "STATE", expected: "up, unhealthy, down, unknown or problems" } as const;
const CONFIG_HELP = `the inventory; - is stdin (default:\n$RINGRIFT_HOSTS_CONFIG, else\n${DEFAULT_CONFIG_PATH})`;

function wholeNumber(max: number) {
  const parse = (text: string) => /^[1-9]\d{0,8}$/.test(text) && Number(text) <= max ? Number(text) : undefined;
  return { value: "N", expected: `a whole number from 1 to ${max}`, parse };
}

const OPTIONS = {
  config: { ...TEXT, short: "c", value: "PATH|URL|-", help: CONFIG_HELP },
  role: { ...LIST, value: "ROLE", help: "only nodes of these roles: a,b (default: any)" },
  gpu: { ...LIST, value: "TEXT", help: "only nodes whose GPU contains TEXT (default: any)" },
  status: { ...LIST, value: "STATUS", help: "only nodes of this status (default: active ones)" },
  exclude: { ...ITEM, value: "NODE", help: "not these nodes (default: none)" },
  where: { ...PAIR, parse: parsePair, help: "only nodes whose entry says this (default: any)" },
  all: { help: "inactive nodes too (default: active ones)" },
  timeout: { ...TIME, short: "t", help: `deadline of each node (default: ${showDuration(DEFAULTS.timeoutMs)})` },
  concurrency: { ...wholeNumber(1_000_000), help: `how many nodes at once (default: ${DEFAULTS.concurrency})` },
  port: { ...wholeNumber(65_535), value: "PORT", help: "another port (default: each node's data server)" },
  tcp: { help: "check the TCP connection only (default: HTTP)" },
  path: { ...TEXT, value: "PATH", help: "ask for this path (default: each node's status_path)" },
  "min-up": { ...MIN_UP, parse: parseMinUp, help: "succeed once N nodes are up (default: all)" },
  only: { ...STATE, parse: parseStates, help: "show only down, unhealthy, unknown, up, or problems" },
  gather: { help: "one line per outcome, names folded (default: a table)" },
  names: { help: "names alone, of --only too (default: a table)" },
  watch: { help: "check again and again (default: once)" },
  interval: { ...TIME, help: "between two checks of a node" },
  "include-self": { help: "urls data: this host too (default: left out)" },
  unchecked: { help: "every selected node (default: those that answer)" },
  user: { ...TEXT, value: "NAME", help: "log in as NAME (default: each node's ssh_user)" },
  "connect-timeout": { ...TIME, help: `to connect (default: ${showDuration(DEFAULTS.connectTimeoutMs)})` },
  "ssh-option": { ...PAIR, parse: ITEM.parse, help: "as in ssh_config(5); repeatable (default: none)" },
  cd: { help: "run it in each node's ringrift_path (default: at home)" },
  stdin: { help: "give each node what comes on stdin (default: nothing)" },
  "dry-run": { help: "print the commands (default: run them)" },
  strict: { help: "a warning is an error (default: it is not)" },
  list: { help: "accepted for Ansible; ignored" },
  json: { help: "JSON (default: text)" },
  quiet: { short: "q", help: "only JSON and failures (default: progress, summary)" },
  help: { short: "h", help: "this text" },
  version: { short: "V", help: "the version" },
} satisfies Record<string, Option>;

type OptionName = keyof typeof OPTIONS;
type OptionValue<O> = O extends { parse(text: string): infer T } ? Exclude<T, undefined> : true;
type Flags = { readonly [K in OptionName]?: OptionValue<(typeof OPTIONS)[K]> };

const OPTION_NAMES = Object.keys(OPTIONS) as OptionName[];
const SELECTION = ["config", "role", "gpu", "status", "exclude", "where", "all"] as const;
const SWEEP = ["timeout", "concurrency", "port"] as const;
const COMMON = ["json", "quiet", "help"] as const;

/** A line taken apart. What is wrong with it is told when its command is known. */
type Line = ReturnType<typeof parseLine>;

function parseLine(args: readonly string[]) {
  const end = args.includes("--") ? args.indexOf("--") : args.length;
  const queue = args.slice(0, end);
  const flags: Record<string, unknown> = {};
  const [words, unknown, faults]: [string[], string[], string[]] = [[], [], []];
  for (let arg = queue.shift(); arg !== undefined; arg = queue.shift()) {
    const [, long, inline] = /^--([^=]+)(?:=(.*))?$/s.exec(arg) ?? [];
    const letter = long === undefined ? arg[1] : "";
    const name = OPTION_NAMES.find((name) => name === long || (OPTIONS[name] as Option).short === letter);
    const attached = long === undefined ? arg.slice(2).replace(/^=/, "") || undefined : inline;
    if (!arg.startsWith("-") || arg === "-") words.push(arg);
    else if (name) faults.push(...takeOption(flags, name, attached, queue));
    else unknown.push(long === undefined ? arg : `--${long}`);
  }
  const remote = end < args.length ? args.slice(end + 1) : undefined;
  return { words, remote, flags: flags as Flags, unknown, faults };
}

/** Sets one flag, from its own argument or the next one; gives what is wrong with it. */
function takeOption(flags: Record<string, unknown>, name: OptionName, inline: string | undefined, queue: string[]) {
  const { value, expected, parse }: Option = OPTIONS[name];
  if (!parse) {
    flags[name] = true;
    // 0.1 took the interval there.
    const isInterval = name === "watch" && /^\d+(\.\d+)?$/.test(inline ?? queue[0] ?? "");
    if (isInterval) return [`--watch takes no value: write --watch --interval ${inline ?? queue.shift()}`];
    return inline === undefined ? [] : [`--${name} takes no value: write --${name}, or leave it out`];
  }
  // What begins with "-" is the next option, unless it is "-" or a negative number, of which the answer says more.
  const text = inline ?? (/^-\D/.test(queue[0] ?? "-?") ? "" : queue.shift()!);
  const parsed = parse(text);
  if (text === "") return [`--${name} needs a value: ${value}`];
  if (parsed === undefined) return [`--${name} takes ${expected}, not ${JSON.stringify(text)}`];
  flags[name] = Array.isArray(parsed) ? [...flags[name] as unknown[] ?? [], ...parsed] : parsed;
  return [];
}

function parseDuration(text: string): number | undefined {
  const [, number, unit = "s"] = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text) ?? [];
  const ms = Number(number) * { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[unit]!;
  // What a timer can hold.
  return ms >= 1 && ms < 2 ** 31 ? ms : undefined;
}

function showDuration(ms: number): string {
  if (ms % 1000 !== 0) return `${ms}ms`;
  return ms % 60_000 === 0 ? `${ms / 60_000}m` : `${ms / 1000}s`;
}

/** How many nodes out of a total have to be up. */
function parseMinUp(text: string): ((total: number) => number) | undefined {
  const [, number, percent] = /^(\d{1,7}(?:\.\d+)?)(%?)$/.exec(text) ?? [];
  const count = Number(number);
  if (percent && count > 0 && count <= 100) return (total) => Math.ceil((count * total - 1e-9) / 100);
  return !percent && count >= 1 && Number.isInteger(count) ? () => count : undefined;
}

const STATES: readonly NodeState[] = ["down", "unhealthy", "unknown", "up"];

function parseStates(text: string): NodeState[] | undefined {
  const known = (word: string) => word === "problems" ? STATES.slice(0, -1) : STATES.filter((state) => state === word);
  const states = splitList(text)?.map(known) ?? [[]];
  return states.every(({ length }) => length > 0) ? states.flat() : undefined;
}

function parsePair(text: string): [key: string, value: string][] | undefined {
  const [, key, value] = /^([^=]+)=(.*)$/s.exec(text) ?? [];
  return key === undefined || value === undefined ? undefined : [[key, value]];
}

function splitList(text: string): string[] | undefined {
  const items = text.split(",").map((item) => item.trim()).filter((item) => item !== "");
  return items.length > 0 ? items : undefined;
}

interface Inventory extends HostsConfigText {
  readonly config: HostsConfig;
  readonly nodes: readonly ClusterNode[];
}

async function readInventory(call: Pick<Call, "flags" | "io" | "signal">): Promise<HostsConfigText> {
  const { flags: { config, timeout: timeoutMs }, signal } = call;
  if (config !== "-") return await readHostsConfig(config, { timeoutMs, signal });
  const text = new TextDecoder().decode(await readStdin(call));
  if (text.includes("\ufffd")) throw new HostsConfigError("stdin", [{ path: "", message: "is not UTF-8" }]);
  return { text, origin: "stdin", exists: true };
}

/** Reading stdin has no signal of its own, and must not keep Ctrl-C waiting. */
async function readStdin({ io, signal }: Pick<Call, "io" | "signal">): Promise<Uint8Array<ArrayBuffer>> {
  const aborted = new Promise<never>((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  return await Promise.race([io.readStdin(), aborted]);
}

async function parseInventory(source: HostsConfigText): Promise<Inventory> {
  const config = parseHostsConfig(source.text, source.origin);
  return { ...source, config, nodes: [...(await getClusterNodes(config)).values()] };
}

function selectionOf({ flags, words }: Pick<Call, "flags" | "words">): NodeSelection {
  const { role: roles, gpu: gpus, status: statuses, exclude, all: includeInactive, where } = flags;
  const names = words.length > 0 ? words : undefined;
  return { names, roles, gpus, statuses, exclude, includeInactive, where: where && groupPairs(where) };
}

function groupPairs(pairs: readonly (readonly [key: string, value: string])[]): Record<string, string[]> {
  const groups = Map.groupBy(pairs, ([key]) => key);
  return Object.fromEntries([...groups].map(([key, list]) => [key, list.map(([, value]) => value)]));
}

function select(call: Call): ClusterNode[] {
  const { nodes } = call.inventory;
  if (nodes.length === 0) throw new Error(emptyInventory(call));
  const selected = selectNodes(nodes, selectionOf(call));
  if (selected.length === 0) throw new Error(emptySelection(call));
  return selected;
}

function emptyInventory({ inventory: { origin, exists } }: Call): string {
  return exists
    ? `No hosts in ${origin}: add them under "hosts"`
    : `There is no ${origin} here: create it, name another with --config` + hint("RINGRIFT_HOSTS_CONFIG", " or with");
}

/** Names a variable that would have decided, with the flag if it may not be read. */
function hint(variable: string, words: string): string {
  const { state } = Deno.permissions.querySync({ name: "env", variable });
  return `${words} ${variable}${state === "granted" ? "" : ` (--allow-env=${variable} lets it be read)`}`;
}

/** Which filter left nothing, and what there was to choose from. */
function emptySelection({ flags, words, inventory: { nodes, origin } }: Call): string {
  const head = `No node is selected in ${origin}`;
  let left = selectNodes(nodes, selectionOf({ words, flags: { all: true } }));
  for (const option of ["role", "gpu", "status", "where", "exclude"] as const) {
    const next = selectNodes(left, selectionOf({ words: [], flags: { [option]: flags[option], all: true } }));
    const given = flags[option]?.map((value) => typeof value === "string" ? value : value.join("="));
    const key = option === "where" ? flags.where?.[0]?.[0] ?? option : option;
    if (next.length === 0) return `${head}: --${option} ${given} leaves none of ${left.length}${choices(left, key)}`;
    left = next;
  }
  return `${head}: none of ${left.length} is active${choices(left, "status")}; --all adds them`;
}

function choices(nodes: readonly ClusterNode[], key: string): string {
  const texts = [...new Set(nodes.flatMap(({ entry }) => entry[key] ?? []).map(String))].filter((text) => text !== "");
  if (texts.length === 0) return key === "exclude" ? "" : `; no node sets ${key}`;
  return `; ${key} is ${texts.length > 1 ? "one of " : ""}${texts.slice(0, 12).join(", ")}${texts[12] ? ", …" : ""}`;
}

function sweepOptions({ flags, signal }: Call): SweepOptions {
  const { timeout: timeoutMs, concurrency, port, path, tcp } = flags;
  return { timeoutMs, concurrency, port, path, check: tcp ? "tcp" : "http", signal };
}

function minUpOf({ flags }: Call, nodes: readonly ClusterNode[]): number {
  const minUp = flags["min-up"]?.(nodes.length) ?? nodes.length;
  if (minUp > nodes.length) throw new Error(`--min-up ${minUp}, but only ${nodes.length} nodes are selected`);
  return minUp;
}

const STATUS: Command = {
  name: "status",
  summary: "check the nodes in parallel, problems first",
  usage: "[NODE...] [options]",
  options: [...SELECTION, ...SWEEP, "tcp", "path", "min-up", "only", "gather", "names", "watch", "interval", ...COMMON],
  help: { interval: `with --watch, between checks (default: ${showDuration(DEFAULTS.watchIntervalMs)})` },
  notes: "Exit code 0: every selected node is up, or --min-up of them; 1: they are not;\n2: a node could not be " +
    "checked. --only does not affect that.",
  examples: ["cluster-hosts status 'gpu-[1-8]' --role worker --watch", "cluster-hosts status --only problems --names"],
  needs: async (call) => ({
    net: (await statusNodes(call)).flatMap((node) => dataEndpoints(node, call.flags.port)),
    env: call.inventory.nodes.length === 0 ? ["RINGRIFT_COORDINATOR_IP"] : [],
  }),
  async run(call) {
    const { flags, io, inventory: { origin } } = call;
    if (flags.interval && !flags.watch) throw new Error("--interval goes with --watch");
    const nodes = await statusNodes(call);
    const minUp = minUpOf(call, nodes);
    if (flags.watch) return await new Watch(call, nodes).run();
    const started = performance.now();
    const known = new Map<ClusterNode, NodeProbe>();
    const line = liveLine(call, () => `checked ${known.size}/${nodes.length}, ${elapsed(started)}`);
    const onProbe = (probe: NodeProbe) => void known.set(probe.node, probe);
    const interrupt = await interruptOf(probeNodes(nodes, { ...sweepOptions(call), onProbe }), line);
    const probes = nodes.map((node) => known.get(node)).filter((probe) => probe !== undefined);
    const denied = deniedMessage(probes);
    showProbes(call, probes, nodes.length, ` in ${seconds(started)}, ${origin}`);
    if (denied) warn(io, denied);
    if (interrupt) warn(io, `Interrupted: ${probes.length} of ${nodes.length} nodes were checked`);
    if (interrupt) throw interrupt;
    const { up, unknown } = countStates(probes);
    return up >= minUp ? 0 : unknown > 0 ? 2 : 1;
  },
};

/** The nodes to check. Without an inventory, the one address that the environment names. */
async function statusNodes(call: Call): Promise<ClusterNode[]> {
  const { inventory: { nodes, config }, words } = call;
  if (nodes.length > 0 || words.length > 0) return select(call);
  const address = await getCoordinatorAddress(config);
  if (!address) throw new Error(emptyInventory(call) + hint("RINGRIFT_COORDINATOR_IP", ", or set"));
  const { coordinator: name } = await getEloSyncConfig(config);
  const { hostname: tailscaleIp, port: dataServerPort } = address;
  return [new ClusterNode({ name, role: "coordinator", tailscaleIp, dataServerPort })];
}

/** The signal that ended the work: what is known by then is shown before the command ends. */
async function interruptOf(work: Promise<unknown>, line?: Disposable): Promise<Interrupt | undefined> {
  using _line = line;
  try {
    await work;
  } catch (error) {
    if (error instanceof Interrupt) return error;
    throw error;
  }
}

/** Which flag lets every node be checked. Throws if none of them may be. */
function deniedMessage(probes: readonly NodeProbe[]): string | undefined {
  const flag = missingNetFlag(probes);
  const message = flag && `Requires net access: run again with ${flag}`;
  if (message && probes.every(({ failure }) => failure?.code === "denied")) throw new Error(message);
  return message;
}

function showProbes(call: Call, probes: readonly NodeProbe[], total: number, about: string): void {
  const { flags, io } = call;
  const shown = probes.filter(({ state }) => flags.only?.includes(state) ?? true);
  const summary = summaryOf(probes, total) + about;
  if (flags.json) {
    const counts = { total, checked: probes.length, ...countStates(probes) };
    const head = { checkedAt: new Date().toISOString(), summary: counts };
    io.out(jsonDocument(call, head, "nodes", shown.map(probeJson)));
  } else if (flags.names) {
    io.out(linesOf(shown.map(({ node }) => node.name)));
    if (!flags.quiet) warn(io, summary);
  } else {
    const sorted = problemsFirst(flags.quiet && !flags.gather ? [] : shown);
    if (flags.gather) io.out(table(io, ["NODES", "STATE", "REASON", "NAMES"], [], outcomeRows(sorted)));
    else if (sorted.length > 0) io.out(table(io, STATUS_TITLES, STATUS_DROP, sorted.map(statusRow)));
    if (probes.length > 0 && !flags.quiet) io.out(`${sorted.length > 0 ? "\n" : ""}${paragraph(io, summary)}`);
  }
}

function problemsFirst(probes: readonly NodeProbe[]): NodeProbe[] {
  return STATES.flatMap((state) => probes.filter((probe) => probe.state === state));
}

function countStates(probes: readonly NodeProbe[]): Record<NodeState, number> {
  const counts = { down: 0, unhealthy: 0, unknown: 0, up: 0 };
  for (const { state } of probes) counts[state]++;
  return counts;
}

/** `7 of 9 nodes up, 2 down (1 refused, 1 timeout)` */
function summaryOf(probes: readonly NodeProbe[], total: number): string {
  const problems = STATES.slice(0, -1).map((state) => probes.filter((probe) => probe.state === state));
  return [
    `${countStates(probes).up} of ${total} nodes up`,
    ...problems.flatMap((some) => some[0] ? `${some.length} ${some[0].state} (${countReasons(some)})` : []),
    ...(total > probes.length ? [`${total - probes.length} not checked`] : []),
  ].join(", ");
}

function countReasons(probes: readonly NodeProbe[]): string {
  const groups = Map.groupBy(probes, ({ failure }) => failure?.code ?? "other");
  return [...groups].map(([code, { length }]) => `${length} ${code}`).join(", ");
}

function probeJson(probe: NodeProbe) {
  // What is not known is null, so that every node has the same keys.
  const { node, state, address = null, port, connectMs, responseMs, status = null, failure = null } = probe;
  const { name, role, gpu } = node;
  const ms = (value: number | undefined) => value === undefined ? null : Number(value.toFixed(2));
  const times = { connectMs: ms(connectMs), responseMs: ms(responseMs) };
  return { name, role, gpu, state, address, port, ...times, status, failure };
}

const STATUS_TITLES = ["NAME", "ROLE", "GPU", "ADDRESS", "LATENCY", "STATE", "VERSION", "GAMES", "REASON"];
const STATUS_DROP = ["GAMES", "VERSION", "GPU", "ROLE", "ADDRESS", "LATENCY"];
const STATE_COLOURS: Readonly<Record<NodeState, number>> = { up: 32, unhealthy: 33, down: 31, unknown: 35 };

function statusRow(probe: NodeProbe): Cell[] {
  const { node: { name, role, gpu }, state, address, connectMs, responseMs, status, failure, endpoints } = probe;
  const { host, port } = probe.endpoint ?? endpoints[0] ?? { host: "", port: 0 };
  const ms = responseMs ?? (failure ? undefined : connectMs);
  const latency = ms === undefined ? "-" : `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;
  const scalar = (value: unknown) => /^(string|number)$/.test(typeof value) ? String(value).slice(0, 40) : "-";
  const place: Cell = [host ? hostPort(host, port) : "-", address ? 0 : 2];
  const facts = [scalar(status?.version), scalar(status?.game_count), reasonOf(failure)];
  return [name, role, gpu || "-", place, latency, [state, STATE_COLOURS[state]], ...facts];
}

function reasonOf(failure: { readonly code: string; readonly message: string } | undefined): string {
  return failure ? `${failure.code}: ${failure.message}` : "";
}

function outcomeRows(probes: readonly NodeProbe[]): Cell[][] {
  const groups = Map.groupBy(probes, ({ state, failure }) => `${state} ${reasonOf(failure)}`);
  return [...groups.values()].map((group) => {
    const { state, failure } = group[0]!;
    const names = foldNames(group.map(({ node }) => node.name));
    return [String(group.length), [state, STATE_COLOURS[state]], reasonOf(failure) || "-", names];
  });
}

/** Checks again and again, and follows the inventory as it is edited: a table in place, in a pipe the changes alone. */
class Watch {
  readonly seen = new Map<string, { readonly probe: NodeProbe; readonly sinceMs: number }>();
  trouble: string | undefined;
  /** Changes that are not printed yet: none is before a node is known that may be checked. */
  changes: (() => void)[] = [];
  mayCheck = false;

  constructor(
    readonly call: Call,
    public nodes: readonly ClusterNode[],
    public inventory: Inventory = call.inventory,
    readonly intervalMs: number = call.flags.interval ?? DEFAULTS.watchIntervalMs,
    readonly isLive = call.io.isTerminal && call.io.hasCursor && !call.flags.json && !call.flags.quiet,
  ) {}

  async run(): Promise<never> {
    const { call: { signal, io }, intervalMs } = this;
    const timer = this.isLive ? setInterval(() => this.#draw(), 200) : undefined;
    const over = new AbortController();
    try {
      while (!signal.aborted) {
        const edited = new AbortController();
        const either = AbortSignal.any([signal, edited.signal, over.signal]);
        const reading = this.#readUntilEdited(either).finally(() => edited.abort());
        const options = { ...sweepOptions(this.call), intervalMs, signal: either };
        for await (const probe of watchNodes(this.nodes, options)) this.#note(probe);
        const next = await reading;
        if (next !== this.inventory) this.#follow(next);
      }
    } finally {
      clearInterval(timer);
      over.abort();
      // Below the ^C that the terminal writes.
      if (this.isLive) io.out("\n");
    }
    throw signal.reason;
  }

  /** The inventory when it is another one, and sound; or as it is when the signal aborts. */
  async #readUntilEdited(signal: AbortSignal): Promise<Inventory> {
    for (;;) {
      await delay(this.intervalMs, { signal }).catch(() => {});
      if (signal.aborted) return this.inventory;
      // What stdin gave does not change.
      if (this.call.flags.config === "-") continue;
      try {
        const source = await readInventory({ ...this.call, signal });
        if (source.text !== this.inventory.text) return await parseInventory(source);
        this.trouble = undefined;
      } catch (error) {
        // A broken edit must not end a watch: the last sound inventory stays, and the fault is told once.
        const message = messageOf(error);
        if (!signal.aborted && message !== this.trouble && !this.isLive) warn(this.call.io, message);
        this.trouble = message;
      }
    }
  }

  /** Goes on with the nodes of the edited inventory, and says which have left. */
  #follow(inventory: Inventory): void {
    const { nodes } = this.inventory = inventory;
    const watched = new Set(this.nodes.map(nameOf));
    try {
      this.nodes = selectNodes(nodes, selectionOf(this.call));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      // A pattern matches nothing any more: the nodes that are left stay.
      this.nodes = nodes.filter(({ name }) => watched.has(name));
    }
    for (const name of watched.difference(new Set(this.nodes.map(nameOf)))) {
      const probe = this.seen.get(name)?.probe;
      this.seen.delete(name);
      const state = nodes.some((node) => node.name === name && !node.isActive) ? "inactive" : "removed";
      if (probe) this.#print(probe.state, { ...probe, failure: undefined }, state);
    }
    this.trouble = undefined;
  }

  #note(probe: NodeProbe): void {
    const { node: { name }, state, failure } = probe;
    const seen = this.seen.get(name);
    const hasChanged = seen?.probe.state !== state;
    this.seen.set(name, { probe, sinceMs: hasChanged ? performance.now() : seen!.sinceMs });
    if (hasChanged) this.changes.push(() => this.#print(seen?.probe.state, probe, state));
    this.mayCheck ||= failure?.code !== "denied";
    if (this.mayCheck) this.changes.splice(0).forEach((print) => print());
    else if (this.seen.size >= this.nodes.length) deniedMessage([...this.seen.values()].map(({ probe }) => probe));
  }

  #print(previous: NodeState | undefined, probe: NodeProbe, state: string): void {
    const { io, flags: { only, json, quiet } } = this.call;
    if (this.isLive || (quiet && !json) || (only && !only.some((it) => it === state || it === previous))) return;
    const time = new Date().toISOString();
    const why = probe.failure ? ` (${reasonOf(probe.failure)})` : "";
    const change = `${probe.node.name}: ${previous ? `${previous} -> ` : ""}${state}${why}`;
    const document = { ...jsonHead(this.call), time, previous: previous ?? null, ...probeJson(probe), state };
    io.out(json ? `${toJson(document)}\n` : `${time} ${escapeText(change)}\n`);
  }

  #draw(): void {
    const { io, flags: { only }, inventory: { origin } } = this.call;
    const rows = io.size().rows;
    // The end of a full line would be erased with what stands behind it.
    const columns = io.size().columns - 1;
    const probes = this.nodes.flatMap(({ name }) => this.seen.get(name)?.probe ?? []);
    const summary = `${new Date().toTimeString().slice(0, 8)}  ${summaryOf(probes, this.nodes.length)}`;
    const about = `every ${showDuration(this.intervalMs)}, Ctrl-C ends, ${origin}`;
    const head = [[0, summary], [2, about], [31, this.trouble?.split("\n")[0]]] as const;
    const lines = head.flatMap(([colour, text]) => text ? paint(io, colour, clip(escapeText(text), columns)) : []);
    const shown = problemsFirst(probes).filter(({ state }) => only?.includes(state) ?? true);
    // Less the header of the table, and the line in which the cursor stands.
    const room = Math.max(1, rows - lines.length - 2);
    const [fitting, rest] = [shown.slice(0, room - 1), shown.slice(room - 1)];
    if (rest.length === 1) fitting.push(...rest.splice(0));
    const since = ({ node }: NodeProbe) => elapsed(this.seen.get(node.name)!.sinceMs);
    const drawn = fitting.map((probe): Cell[] => [since(probe), ...statusRow(probe)]);
    const narrow = { ...io, size: () => ({ rows, columns }) };
    lines.push(table(narrow, ["SINCE", ...STATUS_TITLES], [...STATUS_DROP, "SINCE"], drawn).trimEnd());
    const counts = Object.entries(countStates(rest)).filter(([, number]) => number > 0);
    const more = counts.map(([state, number]) => `${number} ${state}`).join(", ");
    if (rest.length > 0) lines.push(clip(`… ${rest.length} more: ${more}`, columns));
    // Line by line over the old picture, since clearing the screen first would flicker.
    io.out(`\x1b[?7l\x1b[H${lines.join("\n").replaceAll("\n", "\x1b[K\n")}\x1b[K\n\x1b[J\x1b[?7h`);
  }
}

const NODES: Command = {
  name: "nodes",
  summary: "list what is configured",
  usage: "[NODE...] [options]",
  options: [...SELECTION, "names", ...COMMON],
  notes: "Exit code 0: listed; 2: no node is selected.",
  examples: ["cluster-hosts nodes --gpu H100 --names", "cluster-hosts nodes --all --json | jq -r '.nodes[].name'"],
  run(call) {
    const { flags, io, inventory } = call;
    const nodes = select(call);
    if (flags.json) io.out(jsonDocument(call, {}, "nodes", nodes.map(nodeJson)));
    else io.out(flags.names ? linesOf(nodes.map(nameOf)) : table(io, NODE_TITLES, NODE_DROP, nodes.map(nodeRow)));
    const inactive = inventory.nodes.filter((node) => !node.isActive && !nodes.includes(node)).length;
    const more = inactive > 0 && !flags.all ? ` (--all: ${inactive} inactive)` : "";
    const summary = `${nodes.length} of ${inventory.nodes.length} nodes${more}, ${inventory.origin}`;
    if (!flags.json && !flags.names && !flags.quiet) io.out(`\n${paragraph(io, summary)}`);
    return Promise.resolve(0);
  },
};

const NODE_TITLES = ["NAME", "ROLE", "STATUS", "GPU", "MEMORY", "CPUS", "ADDRESSES", "DATA", "SSH", "REASON"];
const NODE_DROP = ["CPUS", "MEMORY", "SSH", "DATA", "GPU", "ROLE", "ADDRESSES"];

function nodeRow(node: ClusterNode): Cell[] {
  const { name, role, status, gpu, memoryGb, cpus, addresses, dataServerUrl, dataServerPort, sshUser, sshPort } = node;
  const size = [memoryGb ? `${memoryGb} GB` : "-", cpus ? String(cpus) : "-"];
  const places = [addresses.join(", ") || "-", dataServerUrl ?? String(dataServerPort), `${sshUser}:${sshPort}`];
  return [name, role, [status, node.isActive ? 0 : 2], gpu || "-", ...size, ...places, node.reason ?? ""];
}

/** The fields, null if they are unset, and behind them the user's own keys as written. */
function nodeJson(node: ClusterNode): Record<string, unknown> {
  const { addresses, dataServerBaseUrl, isActive } = node;
  const { entry, ...fields } = node;
  const json: Record<string, unknown> = { ...fields, bestIp: addresses[0], addresses, dataServerBaseUrl, isActive };
  for (const key in json) json[key] ??= null;
  const own = Object.entries(entry).filter(([key]) => !FIELD_KEYS.has(key) && !Object.hasOwn(json, key));
  return { ...json, ...Object.fromEntries(own) };
}

const FIELDS = Object.keys(new ClusterNode({ name: "any" }));
const FIELD_KEYS = new Set(FIELDS.map((field) => field.replace(/[A-Z]/g, "_$&").toLowerCase()));

const COORDINATOR: Command = {
  name: "coordinator",
  summary: "print HOST:PORT of the Elo database",
  usage: "[options]",
  options: ["config", ...COMMON],
  notes: "The node that elo_sync.coordinator names, else $RINGRIFT_COORDINATOR_IP.",
  examples: ["cluster-hosts coordinator", "cluster-hosts coordinator --config https://example.com/hosts.yaml"],
  needs: async ({ inventory }) => ({
    env: (await getCoordinatorNode(inventory.config))?.bestIp === undefined ? ["RINGRIFT_COORDINATOR_IP"] : [],
  }),
  async run(call) {
    const { flags, io, inventory: { config, origin, exists } } = call;
    const address = await getCoordinatorAddress(config);
    const { coordinator } = await getEloSyncConfig(config);
    const fault = `No coordinator: "${coordinator}" has no address in ${origin}: set elo_sync.coordinator`;
    const advice = hint("RINGRIFT_COORDINATOR_IP", ", or set");
    if (!address) throw new Error((exists ? fault : emptyInventory(call)) + advice);
    const text = escapeText(hostPort(address.hostname, address.port));
    io.out(`${flags.json ? toJson({ ...jsonHead(call), ...address }) : text}\n`);
    return 0;
  },
};

const URLS: Command = {
  name: "urls",
  summary: "print the URLs to pull data from, one a line",
  usage: "elo|data|models [NODE...] [options]",
  kinds: ["elo", "data", "models"],
  options: [...SELECTION, ...SWEEP, "path", "include-self", "unchecked", ...COMMON],
  help: {
    path: "of the URLs (default: elo /db, models /models)",
    port: `another port (default: elo sync_port, models ${MODEL_SYNC_PORT})`,
  },
  notes: "With --port or --path, the kind may be left out. What is checked is the status\npath, on the same port. " +
    "Exit code 0: there is a URL; 1: there is none.",
  examples: ["cluster-hosts urls elo | aria2c -i -", "cluster-hosts urls --port 9000 --path /games 'gpu-*'"],
  async needs(call) {
    const { flags, kind, inventory: { config: source } } = call;
    const port = await urlPort(call);
    const endpoints = flags.unchecked ? [] : select(call).map((node) => dataEndpoints(node, port));
    if (kind !== "data" || flags["include-self"]) return { net: endpoints.flat() };
    const others = await getDataSyncUrls({ source, selection: selectionOf(call), reachableOnly: false });
    const net = endpoints.filter(([first]) => first && others.includes(endpointUrl(first))).flat();
    return { net, env: ["RINGRIFT_NODE_ID"], sys: ["hostname", "networkInterfaces"] };
  },
  async run(call) {
    const { flags, io, inventory: { origin } } = call;
    const port = await urlPort(call);
    const nodes = select(call);
    const probes: NodeProbe[] = [];
    const urls = await findUrls(call, port, nodes, probes);
    io.out(flags.json ? jsonDocument(call, {}, "urls", urls) : linesOf(urls));
    const failed = probes.filter(({ state }) => state !== "up");
    const command = `cluster-hosts status${port === undefined ? "" : ` --port ${port}`}`;
    const why = failed.length > 0 ? ` (${countReasons(failed)}; ${command} shows which)` : "";
    const others = nodes.length - probes.length;
    const self = others > 0 ? `, ${others} left out as this host (--include-self)` : "";
    const answered = `${probes.length - failed.length} of ${probes.length} nodes answered${why}${self}`;
    const summary = flags.unchecked ? `${urls.length} URLs, not checked` : answered;
    if (!flags.quiet && !flags.json) warn(io, `${summary}, ${origin}`);
    return urls.length > 0 ? 0 : 1;
  },
};

/** The port that is checked; undefined is that of each data server. */
async function urlPort({ kind, flags: { port, path }, inventory }: Call): Promise<number | undefined> {
  if (kind === "data" && (port !== undefined || path !== undefined)) {
    throw new Error("urls data takes each node's own port and URL: leave out data, or --port and --path");
  }
  if (kind === "data" || port !== undefined) return port;
  if (kind === "elo") return (await getEloSyncConfig(inventory.config)).syncPort;
  return kind === "models" ? MODEL_SYNC_PORT : DATA_SYNC_PORT;
}

async function findUrls(call: Call, port: number | undefined, nodes: readonly ClusterNode[], probes: NodeProbe[]) {
  const { kind, flags, inventory: { config: source } } = call;
  const { check: _, path = kind === "models" ? "/models" : undefined, ...sweep } = sweepOptions(call);
  using _line = liveLine(call, () => `checked ${probes.length}/${nodes.length}`);
  const onProbe = (probe: NodeProbe) => void probes.push(probe);
  const options = { ...sweep, source, selection: selectionOf(call), reachableOnly: !flags.unchecked, onProbe };
  if (kind === "data") return await getDataSyncUrls({ ...options, excludeSelf: !flags["include-self"] });
  return await getSyncUrls({ ...options, port, path });
}

const SSH_OPTIONS = ["user", "connect-timeout", "ssh-option", "gather", "cd", "stdin", "dry-run"] as const;

const SSH: Command = {
  name: "ssh",
  summary: "run a command on many nodes at once, or log in to one",
  usage: "NODE... [options] [-- COMMAND]",
  options: [...SELECTION, "timeout", "concurrency", ...SSH_OPTIONS, ...COMMON],
  help: {
    timeout: `deadline of each command (default: ${showDuration(DEFAULTS.commandTimeoutMs)})`,
    concurrency: `how many nodes at once (default: ${DEFAULTS.commandConcurrency})`,
    gather: "each distinct output once (default: as lines come)",
  },
  notes: "Needs a NODE or --role, --gpu, --status, --where; '*' is every active node.\nWithout a command: a login " +
    "on one NODE. Exit code 0: the command returned 0 on\nevery node; 1: it did not.",
  examples: ["cluster-hosts ssh 'gpu-*' --gather -- nvidia-smi -L", "cluster-hosts ssh gpu-1 --stdin -- sh < setup.sh"],
  needs: (call) => ({ run: ["ssh"], net: select(call).flatMap((node) => racedSshEndpoints(node, sshOptions(call))) }),
  async run(call) {
    const { flags, remote, io, signal, inventory: { origin } } = call;
    const nodes = sshNodes(call);
    if (!remote) return await login(call, nodes);
    const commandOf = (node: ClusterNode) => flags.cd ? inFolder(node, remote) : remote;
    if (flags["dry-run"]) return printCommands(call, nodes, commandOf);
    const stdin = flags.stdin ? await readStdin(call) : undefined;
    const known = new Map<ClusterNode, CommandResult>();
    const print = flags.json || flags.gather ? undefined : linePrinter(io);
    const times = { timeoutMs: flags.timeout, concurrency: flags.concurrency, stdin, signal };
    const onResult = (result: CommandResult) => {
      known.set(result.node, result);
      for (const stream of ["stdout", "stderr"] as const) print?.(result.node, stream);
    };
    const options = { ...sshOptions(call), ...times, onOutput: print, onResult };
    const interrupt = await interruptOf(runOnNodes(nodes, commandOf, options));
    const results = nodes.map((node) => known.get(node)).filter((result) => result !== undefined);
    const items = results.map(({ node: { name }, failure = null, ...result }) => ({ name, ...result, failure }));
    if (flags.json) io.out(jsonDocument(call, {}, "nodes", items));
    else if (flags.gather) io.out(gathered(io, results));
    // The summary stands below the ^C that the terminal writes.
    if (interrupt && io.isErrTerminal) io.err("\n");
    if (!flags.quiet) warn(io, commandSummary(results, nodes.length, origin));
    if (interrupt) throw interrupt;
    return results.every(({ failure }) => !failure) ? 0 : 1;
  },
};

const SSH_USAGE = 'put the command after "--": cluster-hosts ssh gpu-1 -- uptime';

/** A shell without a script: without stdin it ends at once, and says that all is well. */
const BARE_SHELL = /^\s*(sudo\s+)?(\S*\/)?(ba|da|k|z)?sh(\s+(--\S+|-[abd-z]+))*(\s+-[abd-z]*s.*)?\s*$/s;

function sshOptions({ flags }: Call): SshOptions {
  return { user: flags.user, connectTimeoutMs: flags["connect-timeout"], options: flags["ssh-option"] };
}

/** The nodes to run on, after every refusal. */
function sshNodes(call: Call): ClusterNode[] {
  const { words, remote, flags: { role, gpu, status, where, stdin } } = call;
  const command = remote?.join(" ").trim();
  if (command === "") throw new Error(`There is no command; ${SSH_USAGE}`);
  if (!stdin && BARE_SHELL.test(command ?? "")) {
    throw new Error(`"${command}" alone runs nothing: add --stdin, and give it the script on stdin`);
  }
  // So that an empty $(...) never means every node.
  if (words.length === 0 && !role && !gpu && !status && !where) {
    throw new Error("ssh needs a NODE, or --role, --gpu, --status or --where; '*' is every active node");
  }
  // Whoever forgets "--" gives the command as a NODE.
  if (!remote && words.length > 1) throw new Error(`A login takes one NODE, not ${words.length}; ${SSH_USAGE}`);
  return select(call);
}

/** The command in the node's `ringrift_path`, whose tilde is the remote shell's. */
function inFolder({ ringriftPath }: ClusterNode, remote: readonly string[]): string[] {
  const [, home = "", rest = ""] = /^(~[\w.-]*(?:\/|$))?(.*)$/s.exec(ringriftPath) ?? [];
  const folder = home + (rest === "" ? "" : shellQuote(rest));
  // Else what stands behind a ";" would run in the wrong folder if there is no such one.
  const command = /[;&|\n#]/.test(remote.join(" ")) ? ["eval", shellQuote(remote.join(" "))] : remote;
  return ["cd", folder, "&&", ...command];
}

function printCommands(call: Call, nodes: readonly ClusterNode[], commandOf: (node: ClusterNode) => readonly string[]) {
  const [reachable, missing] = [nodes.filter((node) => node.bestIp), nodes.filter((node) => !node.bestIp)];
  const commands = reachable.map((node) => sshCommand(node, commandOf(node), sshOptions(call)));
  call.io.out(commands.map((command) => `${escapeLines(command.map(shellQuote).join(" "))}\n`).join(""));
  if (missing.length > 0) warn(call.io, `${foldNames(missing.map(nameOf))}: no-address: set tailscale_ip or ssh_host`);
  return missing.length > 0 ? 1 : 0;
}

/** ssh itself with the terminal, and nothing of ours in between. */
async function login(call: Call, nodes: readonly ClusterNode[]): Promise<number> {
  const { flags, signal } = call;
  const [node] = nodes;
  if (!node || nodes.length > 1) throw new Error(`A login takes one node, not ${nodes.length}; ${SSH_USAGE}`);
  const extra = ["gather", "json", "cd", "stdin", "dry-run", "timeout", "concurrency"].find((name) => name in flags);
  if (extra) throw new Error(`--${extra} goes with a command; ${SSH_USAGE}`);
  const options = { ...sshOptions(call), options: ["BatchMode=no", ...flags["ssh-option"] ?? []] };
  const endpoint = await findSshEndpoint(node, { ...options, signal });
  const streams = { stdin: "inherit", stdout: "inherit", stderr: "inherit" } as const;
  const child = spawnSsh(sshCommand(node, [], { ...options, endpoint }), streams);
  const onAbort = () => child.kill(messageOf(signal.reason) as Deno.Signal);
  signal.addEventListener("abort", onAbort);
  const { code } = await child.status;
  signal.removeEventListener("abort", onAbort);
  signal.throwIfAborted();
  return code;
}

/** Writes each line as soon as it is whole, under the name of its node; without a text, the last line as it is. */
function linePrinter(io: Io) {
  const rests = new Map<string, string>();
  return ({ name }: ClusterNode, stream: "stdout" | "stderr", text?: string) => {
    const key = `${stream} ${name}`;
    const rest = rests.get(key) ?? "";
    const whole = rest + (text ?? (rest && "\n"));
    // A line without an end must not fill the memory.
    const end = whole.length > 1024 * 1024 ? whole.length : whole.lastIndexOf("\n");
    rests.set(key, whole.slice(end + 1));
    const lines = end < 0 ? [] : escapeLines(whole.slice(0, end)).split("\n");
    (stream === "stdout" ? io.out : io.err)(lines.map((line) => `${escapeText(name)}: ${line}\n`).join(""));
  };
}

function gathered(io: Io, results: readonly CommandResult[]): string {
  const outcome = ({ exitCode, signal, failure, stdout, stderr }: CommandResult) =>
    JSON.stringify([exitCode, signal, failure?.code, stdout, stderr]);
  return [...Map.groupBy(results, outcome).values()].map((group) => {
    const { stdout, stderr, failure, truncated } = group[0]!;
    const names = foldNames(group.map(({ node }) => node.name));
    const head = `${names}${group.length > 1 ? ` (${group.length})` : ""}${failure ? `: ${reasonOf(failure)}` : ""}`;
    const texts = [stdout, stderr, truncated ? "[cut at 1 MiB]" : ""];
    const output = texts.map((text) => text.replace(/[^\n]$/, "$&\n")).join("");
    return `${paint(io, 1, `--- ${escapeText(head)}`)}\n${escapeLines(output)}`;
  }).join("");
}

function commandSummary(results: readonly CommandResult[], total: number, origin: string): string {
  const failed = results.filter(({ failure }) => failure);
  let groups = Map.groupBy(failed, ({ failure }) => reasonOf(failure));
  // Each address has a message of its own: past a few, only what they have in common can be read.
  if (groups.size > 5) groups = Map.groupBy(failed, ({ failure }) => failure!.code);
  return [
    `${results.length - failed.length} of ${total} returned 0, ${origin}`,
    ...[...groups].map(([reason, group]) => `${foldNames(group.map(({ node }) => node.name))}: ${reason}`),
    ...(results.length < total ? [`${total - results.length} not started`] : []),
  ].join("; ");
}

const WAIT: Command = {
  name: "wait",
  summary: "return when the nodes are up, or time runs out",
  usage: "[NODE...] [options]",
  options: [...SELECTION, ...SWEEP, "interval", "min-up", "tcp", "path", ...COMMON],
  help: {
    timeout: `for all of it (default: ${showDuration(DEFAULTS.waitDeadlineMs)})`,
    interval: `between two checks of a node (default: ${showDuration(DEFAULTS.waitIntervalMs)})`,
  },
  notes: "Exit code 0: every selected node is up, or --min-up of them; 1: the time is\nover; 2: at once, if the " +
    "nodes that may be checked cannot be enough.",
  examples: ["cluster-hosts wait --timeout 10m", "cluster-hosts wait 'gpu-*' --min-up 75% --tcp --port 22"],
  needs: (call) => ({ net: select(call).flatMap((node) => dataEndpoints(node, call.flags.port)) }),
  async run(call) {
    const { flags, io, inventory: { origin } } = call;
    const nodes = select(call);
    const minUp = minUpOf(call, nodes);
    const started = performance.now();
    const last = new Map<ClusterNode, NodeProbe>();
    const line = liveLine(call, () => `waiting, ${elapsed(started)}, for ${foldMissing(nodes, last)}`);
    const announced = new Set<ClusterNode>();
    const onProbe = (probe: NodeProbe) => {
      last.set(probe.node, probe);
      if (probe.state !== "up" || announced.has(probe.node) || flags.quiet || flags.json) return;
      announced.add(probe.node);
      line.hide();
      io.out(`${escapeText(probe.node.name)} up after ${seconds(started)}\n`);
    };
    const times = { timeoutMs: undefined, intervalMs: flags.interval, deadlineMs: flags.timeout };
    const interrupt = await interruptOf(waitForNodes(nodes, { ...sweepOptions(call), ...times, minUp, onProbe }), line);
    const up = nodes.filter((node) => last.get(node)?.state === "up").map(nameOf);
    const time = seconds(started);
    if (flags.json) {
      const missing = nodes.filter((node) => last.get(node)?.state !== "up");
      const items = missing.map((node) => ({ name: node.name, failure: last.get(node)?.failure ?? null }));
      io.out(jsonDocument(call, { waitedMs: Math.round(performance.now() - started), up }, "missing", items));
    } else if (!flags.quiet) {
      warn(io, `${up.length} of ${nodes.length} nodes up after ${time}, ${origin}`);
      if (up.length < minUp) warn(io, `Still missing after ${time}: ${foldMissing(nodes, last)}`);
    }
    if (interrupt) throw interrupt;
    return up.length >= minUp ? 0 : 1;
  },
};

/** `gpu-[1-2000] (refused), head (timeout)` */
function foldMissing(nodes: readonly ClusterNode[], last: ReadonlyMap<ClusterNode, NodeProbe>): string {
  const missing = nodes.filter((node) => last.get(node)?.state !== "up");
  const groups = Map.groupBy(missing, (node) => last.get(node)?.failure?.code ?? "no answer yet");
  return [...groups].map(([code, nodes]) => `${foldNames(nodes.map(nameOf))} (${code})`).join(", ");
}

const VALIDATE: Command = {
  name: "validate",
  summary: "list every problem and every warning in the inventory",
  usage: "[options]",
  options: ["config", "strict", ...COMMON],
  notes: "Exit code 0: no problem (--strict: and no warning); 2: there is one.",
  examples: ["cluster-hosts validate", "cluster-hosts validate --strict --config new_hosts.yaml"],
  async run(call) {
    const { flags, io } = call;
    const { origin, errors, warnings } = await findProblems(call);
    const told = warnings.map((warning) => ({ ...warning, message: `warning: ${warning.message}` }));
    const lines = [...errors, ...told].map((problem) => formatConfigProblem(problem, origin));
    const count = (number: number, word: string) => `${number || "no"} ${word}${number === 1 ? "" : "s"}`;
    const found = count(errors.length, "problem") + (errors.length > 0 ? "" : `, ${count(told.length, "warning")}`);
    if (flags.json) io.out(`${toJson({ ...jsonHead(call, origin), errors, warnings })}\n`);
    else io.out(linesOf(flags.quiet ? lines : [...lines, `${found}, ${origin}`]));
    return errors.length > 0 || (flags.strict && warnings.length > 0) ? 2 : 0;
  },
};

async function findProblems(call: Call) {
  try {
    const { text, origin, exists } = await readInventory(call);
    if (!exists) return { origin, errors: [{ path: "", message: "there is no such file" }], warnings: [] };
    const { problems: errors, warnings } = validateHostsConfig(text);
    return { origin, errors, warnings };
  } catch (error) {
    if (!(error instanceof HostsConfigError)) throw error;
    const named = call.flags.config === "-" ? "stdin" : call.flags.config;
    const origin = named ?? readVariable("RINGRIFT_HOSTS_CONFIG") ?? DEFAULT_CONFIG_PATH;
    return { origin, errors: error.problems, warnings: [] };
  }
}

const EXPORT: Command = {
  name: "export",
  summary: "print the inventory for Ansible, Prometheus or ssh",
  usage: "ansible|prometheus|ssh-config [NODE...] [options]",
  kinds: ["ansible", "prometheus", "ssh-config"],
  options: [...SELECTION, "port", "path", "list", "help"],
  help: { path: "prometheus: this path (default: each status_path)" },
  notes: "A Prometheus target is HOST:PORT; its __param_target is the whole URL that is\nchecked. Exit code 0: " +
    "printed; 2: a node cannot be named in that format.",
  examples: ["cluster-hosts export prometheus > targets.json", "cluster-hosts export ssh-config > ~/.ssh/cluster"],
  run(call) {
    const { kind, flags, io } = call;
    if (kind !== "ansible" && flags.list) throw new Error("--list is for export ansible");
    const isTarget = flags.port !== undefined || flags.path !== undefined;
    if (kind !== "prometheus" && isTarget) throw new Error("--port and --path are for export prometheus");
    const formats = { ansible: ansibleInventory, prometheus: prometheusTargets, "ssh-config": sshConfig };
    io.out(formats[kind as keyof typeof formats](select(call), call));
    return Promise.resolve(0);
  },
};

function ansibleInventory(nodes: readonly ClusterNode[]): string {
  const labels = nodes.flatMap((node) =>
    (["role", "status", "gpu"] as const).filter((kind) => node[kind] !== "").map((kind) => ({
      group: `${kind}_${node[kind]}`.replace(/[^A-Za-z0-9_]/g, "_"),
      label: `${kind} "${node[kind]}"`,
      host: node.name,
    }))
  );
  const groups = Map.groupBy(labels, ({ group }) => group);
  for (const [group, members] of groups) {
    const [first, second] = new Set(members.map(({ label }) => label));
    if (second) throw new Error(`Cannot name the Ansible groups: ${first} and ${second} would both be ${group}`);
  }
  const inventory = {
    _meta: { hostvars: Object.fromEntries(nodes.map((node) => [node.name, ansibleVariables(node)])) },
    all: { children: ["ungrouped", ...groups.keys()] },
    ...Object.fromEntries([...groups].map(([name, list]) => [name, { hosts: list.map(({ host }) => host) }])),
  };
  return `${toJson(inventory, 2)}\n`;
}

function ansibleVariables(node: ClusterNode): Record<string, unknown> {
  const { host: ansible_host, port: ansible_port } = sshEndpoints(node)[0] ?? {};
  const { sshUser: ansible_user, sshKey: ansible_ssh_private_key_file, entry } = node;
  return { ansible_host, ansible_user, ansible_port, ansible_ssh_private_key_file, ...entry };
}

function prometheusTargets(nodes: readonly ClusterNode[], { flags: { port, path }, io }: Call): string {
  const missing = nodes.filter((node) => dataEndpoints(node, port).length === 0);
  if (missing.length > 0) warn(io, `${foldNames(missing.map(nameOf))}: left out, without an address`);
  const targets = nodes.flatMap((node) => {
    const { name, role, status, gpu } = node;
    const pathname = statusPath(node, { port, path });
    return dataEndpoints(node, port).slice(0, 1).map((endpoint) => ({
      targets: [hostPort(endpoint.host, endpoint.port)],
      labels: { node: name, role, status, gpu, __param_target: endpointUrl(endpoint, pathname) },
    }));
  });
  return `${toJson(targets, 2)}\n`;
}

function sshConfig(nodes: readonly ClusterNode[]): string {
  // What ssh takes for a pattern or a comment, or refuses as a host name.
  const unusable = nodes.filter(({ name }) => /^-|[\s*?!#,'"`$\\;&<>|(){}]/.test(name) || escapeText(name) !== name);
  if (unusable.length > 0) {
    const names = unusable.map(({ name }) => JSON.stringify(name)).join(", ");
    throw new Error(`Cannot be a Host of ssh_config: ${names}; rename them, or leave them out with --exclude`);
  }
  const quoted = (text: string) => /^[\w.:@~/+-]+$/.test(text) ? text : `"${text.replaceAll("\\", "\\\\")}"`;
  return nodes.map((node) => {
    const [endpoint] = sshEndpoints(node);
    if (!endpoint) return `# ${node.name}: no address\n`;
    const key = node.sshKey ? `  IdentityFile ${quoted(node.sshKey)}\n` : "";
    const target = `  HostName ${endpoint.host}\n  User ${quoted(node.sshUser)}\n  Port ${endpoint.port}\n`;
    return `Host ${quoted(node.name)}\n${target}${key}`;
  }).join("\n");
}

const PERMISSIONS: Command = {
  name: "permissions",
  summary: "print the minimum Deno flags with which a command runs",
  usage: "COMMAND [its arguments]",
  options: ["config", "help"],
  notes: "For this inventory, on one line, as `deno run $(...) URL COMMAND` takes it.",
  examples: ["cluster-hosts permissions status", "cluster-hosts permissions wait 'gpu-*' --port 22"],
  async run(call) {
    const { io, words: [name, ...words] } = call;
    if (name === undefined) throw new Error("permissions needs a command: cluster-hosts permissions status");
    const command = findCommand(name, words);
    const asked = takeKind({ ...call, words }, command);
    const reading = await readingNeeds(asked, command);
    const { net = [], env = [], sys = [], run = [] } = await command.needs?.(asked) ?? {};
    const endpoints = [...reading.net, ...net];
    const lists = [["read", reading.read], ["env", [...reading.env, ...env]], ["sys", sys], ["run", run]] as const;
    const flags = lists.map(([kind, list]) => list.length > 0 ? `--allow-${kind}=${list}` : "");
    flags.splice(1, 0, endpoints.length > 0 ? netFlag(endpoints) : "");
    const isWide = flags.includes("--allow-net");
    if (isWide) warn(io, `${endpoints.length} endpoints do not fit into one flag: --allow-net permits every host`);
    io.out(`${flags.filter((flag) => flag !== "").join(" ")}\n`);
    return 0;
  },
};

/** What reading the inventory takes. */
async function readingNeeds({ flags, inventory: { config, origin } }: Call, command: Command) {
  const isUnified = command !== VALIDATE && await readsUnifiedConfig(config);
  const env = [...(flags.config ? [] : ["RINGRIFT_HOSTS_CONFIG"]), ...(isUnified ? ["RINGRIFT_CONFIG_PATH"] : [])];
  const unified = isUnified ? readVariable("RINGRIFT_CONFIG_PATH") : undefined;
  const isUrl = /^https?:/i.test(origin);
  const net = isUrl ? dataEndpoints(new ClusterNode({ name: "-", dataServerUrl: new URL(origin).origin })) : [];
  const path = /^file:/i.test(origin) ? decodeURIComponent(new URL(origin).pathname) : origin;
  const read = [...(isUrl || flags.config === "-" ? [] : [path]), ...(unified ? [unified] : [])];
  const split = read.find((path) => /[\s,'"$`\\*?[]/.test(path));
  if (split !== undefined) throw new Error(`Cannot print a flag for ${JSON.stringify(split)}: a shell would split it`);
  return { read, net, env };
}

const COMMANDS: readonly Command[] = [STATUS, NODES, COORDINATOR, URLS, SSH, WAIT, VALIDATE, EXPORT, PERMISSIONS];

type Cell = string | readonly [text: string, colour: number];

/** The columns that can be cut, and to what width. One that is cut still counts as readable at 30. */
const CUTTABLE: Readonly<Record<string, number>> = { NAME: 10, STATUS: 9, REASON: 12, NAMES: 8 };
const READABLE_WIDTH = 30;

const RIGHT_ALIGNED = ["SINCE", "LATENCY", "GAMES", "MEMORY", "CPUS", "NODES"];

/** On a terminal, each row is one line of it, if need be without the columns to drop; in a pipe, nothing is cut. */
function table(io: Io, titles: readonly string[], drop: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const lines = [titles.map((title): Cell => [title, 1]), ...rows].map((row) =>
    row.map((cell) => {
      const [text, colour] = typeof cell === "string" ? [cell, 0] : cell;
      const shown = escapeText(text).replaceAll("\t", " ");
      return { text: shown, width: textWidth(shown), colour };
    })
  );
  const natural = titles.map((_, at) => lines.reduce((most, row) => Math.max(most, row[at]!.width), 0));
  const widths = io.isTerminal ? fitWidths(titles, drop, natural, io.size().columns) : natural;
  return lines.map((row) => {
    const cells = row.flatMap(({ text, width, colour }, index) => {
      if (widths[index] === 0) return [];
      const shown = width > widths[index]! ? clip(text, widths[index]!) : text;
      const padding = " ".repeat(widths[index]! - (shown === text ? width : textWidth(shown)));
      const painted = paint(io, colour, shown);
      return RIGHT_ALIGNED.includes(titles[index]!) ? padding + painted : painted + padding;
    });
    return `${cells.join("  ").trimEnd()}\n`;
  }).join("");
}

/** The width of each column, 0 for those that are dropped. */
function fitWidths(titles: readonly string[], drop: readonly string[], natural: readonly number[], room: number) {
  const widths = [...natural];
  const needed = (cut: number) =>
    widths.reduce((sum, width, index) => {
      const shown = titles[index]! in CUTTABLE ? Math.min(width, cut) : width;
      return width === 0 ? sum : sum + 2 + shown;
    }, -2);
  for (const title of drop) if (needed(READABLE_WIDTH) > room) widths[titles.indexOf(title)] = 0;
  // From the right: a reason can be guessed from its beginning, a name cannot.
  for (const [index, title] of [...titles.entries()].reverse()) {
    const least = Math.min(CUTTABLE[title] ?? Infinity, widths[index]!);
    widths[index] = Math.max(least, widths[index]! - Math.max(0, needed(Infinity) - room));
  }
  return widths;
}

const PRINTABLE_ASCII = /^[\x20-\x7e]*$/;
const WIDE = /[\p{Emoji_Presentation}\p{Script=Han}\p{Script=Hangul}\u3000-\u30ff\ufe0f\uff01-\uff60\uffe0-\uffe6]/u;
const INVISIBLE = /^[\p{M}\p{Cf}]*$/u;

function graphemes(text: string): string[] {
  if (PRINTABLE_ASCII.test(text)) return text.split("");
  return Array.from(new Intl.Segmenter().segment(text), ({ segment }) => segment);
}

function textWidth(text: string): number {
  if (PRINTABLE_ASCII.test(text)) return text.length;
  return graphemes(text).reduce((width, it) => width + (WIDE.test(it) ? 2 : INVISIBLE.test(it) ? 0 : 1), 0);
}

function clip(text: string, width: number): string {
  if (textWidth(text) <= width) return text;
  const kept = graphemes(text);
  for (let room = width - 1 - textWidth(text); room < 0 && kept.length > 0;) room += textWidth(kept.pop()!);
  return width > 0 ? `${kept.join("")}…` : "";
}

/** In a colour of SGR; 0 is none. */
function paint(io: Io, colour: number, text: string): string {
  return colour !== 0 && io.isTerminal && io.hasColour ? `\x1b[${colour}m${text}\x1b[0m` : text;
}

/** One line on a terminal's stderr that is drawn again and again, until it is hidden for a result or disposed of. */
function liveLine({ io, flags }: Call, text: () => string): Disposable & { hide(): void } {
  const isShown = !flags.quiet && io.isErrTerminal && io.hasCursor;
  let shown = "";
  const show = (next: string) => {
    if (next !== shown) io.err(`\r${next}\x1b[K`);
    shown = next;
  };
  // It leaves room for ^C.
  const draw = () => show(clip(escapeText(text()), io.size().columns - 3));
  if (isShown) draw();
  const timer = isShown ? setInterval(draw, 250) : undefined;
  const hide = () => show("");
  return { hide, [Symbol.dispose]: () => (clearInterval(timer), hide()) };
}

const UNSAFE = /[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu;

/** Nothing that a node, a file or an error says may inject terminal escape sequences. */
function escapeText(text: string): string {
  if (PRINTABLE_ASCII.test(text)) return text;
  return text.replace(UNSAFE, (it) => it === "\t" ? it : `\\u{${it.codePointAt(0)!.toString(16)}}`);
}

function escapeLines(text: string): string {
  return text.split("\n").map((line) => escapeText(line.replace(/\r$/, ""))).join("\n");
}

function toJson(value: unknown, indent?: number): string {
  // What JSON leaves as it is, a terminal may still obey.
  const unsafe = /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;
  const escape = (it: string) => `\\u${it.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value, null, indent).replace(unsafe, escape);
}

/** One item a line: as good for `grep` and `diff` as for a parser. */
function jsonDocument(call: Call, head: Record<string, unknown>, key: string, items: readonly unknown[]): string {
  const lines = items.map((item) => `\n${toJson(item)}`).join(",");
  return `${toJson({ ...jsonHead(call), ...head }).slice(0, -1)},"${key}":[${lines}${items.length > 0 ? "\n" : ""}]}\n`;
}

function jsonHead({ flags, inventory }: Call, origin = inventory.origin): Record<string, unknown> {
  return { schemaVersion: 1, config: flags.config === "-" ? "-" : origin };
}

function shellQuote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

function seconds(startedMs: number): string {
  const ms = performance.now() - startedMs;
  return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 0)} s`;
}

function elapsed(startedMs: number): string {
  const total = Math.floor((performance.now() - startedMs) / 1000);
  if (total < 60) return `${total}s`;
  return total < 3600 ? `${Math.floor(total / 60)}m` : `${Math.floor(total / 3600)}h`;
}

function paragraph(io: Io, text: string): string {
  const line = linesOf([text]);
  return io.isTerminal
    ? line.replace(new RegExp(`(.{1,${io.size().columns}})(?: +|$)`, "gm"), "$1\n").trimEnd() + "\n"
    : line;
}

function linesOf(texts: readonly string[]): string {
  return texts.map((text) => `${escapeText(text)}\n`).join("");
}

function warn(io: Io, message: string): void {
  io.err(linesOf(message.split("\n").map((line) => `cluster-hosts: ${line}`)));
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

if (import.meta.main) Deno.exit(await main(Deno.args));
