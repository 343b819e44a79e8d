/**
 * Runs `cluster-hosts COMMAND [NODE...] [options]`: from a checkout, from a URL
 * or compiled.
 *
 * ```sh
 * deno run --allow-read=config --allow-net cli.ts status
 * ```
 *
 * Results go to stdout; progress, summaries and errors go to stderr. The exit
 * code is 0 if all is well, 1 if it is not, 2 for bad usage, a bad inventory or
 * something that could not be checked, and 130, 143 or 129 after SIGINT,
 * SIGTERM or SIGHUP. A login returns the exit code of ssh.
 *
 * It never prompts for a permission: an error names the missing flag, and
 * `permissions COMMAND` prints all flags that a command needs.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { parseArgs } from "jsr:@std/cli@^1.0.32/parse-args";
import {
  checkedEndpoints,
  type ClusterNode,
  type CommandResult,
  type ConfigProblem,
  type ConfigText,
  DATA_SYNC_PORT,
  dataEndpoints,
  DEFAULT_CONFIG_PATH,
  DEFAULTS,
  didYouMean,
  type Endpoint,
  endpointUrl,
  filePath,
  findSshEndpoint,
  foldNames,
  formatConfigProblem,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getDataSyncUrls,
  getEloSyncConfig,
  getSyncUrls,
  HOST_FIELDS,
  hostPort,
  type HostsConfig,
  HostsConfigError,
  inspectConfig,
  missingInventory,
  missingNetFlag,
  MODEL_SYNC_PORT,
  netFlag,
  type NodeProbe,
  type NodeSelection,
  type NodeState,
  notCapable,
  parseHostsConfig,
  probeNodes,
  quotesStderr,
  racedSshEndpoints,
  readHostsConfig,
  readsUnifiedConfig,
  readVariable,
  runOnNodes,
  selectNodes,
  sharedEndpoints,
  spawnSsh,
  sshCommand,
  sshEndpoints,
  type SshOptions,
  statusPath,
  type SweepOptions,
  unsupportedDeno,
  urlEndpoint,
  waitForNodes,
  watchNodes,
} from "./cluster_hosts.ts";
import manifest from "./deno.json" with { type: "json" };

// --- Usage and options ---

/** The streams and terminal that {@linkcode main} uses. Tests pass a fake. */
export interface Io {
  /** Writes a result. Resolves once it is written. */
  out(text: string): void | Promise<void>;
  /** Writes progress, a summary or an error. Resolves once it is written. */
  err(text: string): void | Promise<void>;
  /** Reads all of stdin. */
  readStdin(): Promise<Uint8Array<ArrayBuffer>>;
  /**
   * Calls the listener on SIGINT, SIGTERM or SIGHUP. Returns a function that
   * stops listening.
   */
  onSignal(listener: (signal: Deno.Signal) => void): () => void;
  /** Returns the current size of the terminal. */
  size(): { readonly columns: number; readonly rows: number };
  /** True if results go to a terminal. */
  readonly isTerminal: boolean;
  /** True if progress and errors go to a terminal. */
  readonly isErrTerminal: boolean;
  /** True if the terminal can move its cursor: not with `TERM=dumb`. */
  readonly hasCursor: boolean;
  /** True if a terminal shows colours: not with `NO_COLOR` or `TERM=dumb`. */
  readonly hasColour: boolean;
}

/** A command: its arguments, its help, and what it does. */
type Command = InventoryCommand | ReadingCommand;

interface CommandBase {
  readonly name: string;
  readonly summary: string;
  /** The usage line, without the program and the command's name. */
  readonly usage: string;
  /** The command's subcommands; one of them comes before the NODEs. */
  readonly kinds?: readonly string[];
  /** Options that make the kind optional; without a kind, it is "". */
  readonly kindsReplacedBy?: readonly OptionName[];
  readonly options: readonly OptionName[];
  /** Help that replaces the general help of an option. */
  readonly help?: Readonly<Partial<Record<OptionName, string>>>;
  readonly notes: string;
  readonly examples: readonly string[];
  /** True if its words select nodes. */
  readonly takesNodes: boolean;
  /** True if a command to run on the nodes may follow "--". */
  readonly takesRemote?: boolean;
  /** True if its first word is another command, with arguments of its own. */
  readonly takesCommand?: boolean;
  /** Returns what is wrong with its arguments, before the inventory is read. */
  check?(request: Invocation): string | undefined;
  /** Lists the permissions that it needs beyond reading the inventory. */
  needs?(call: Call): Promise<Needs> | Needs;
}

/** A command that runs only with a valid inventory. */
interface InventoryCommand extends CommandBase {
  /** "fallback" if `RINGRIFT_COORDINATOR_IP` may replace a missing one. */
  readonly inventory: "required" | "fallback";
  /** Runs it, and resolves to the exit code. */
  run(call: Call): Promise<number>;
}

/** A command that reads the inventory itself, whatever is wrong with it. */
interface ReadingCommand extends CommandBase {
  readonly inventory: "own";
  /** Runs it, and resolves to the exit code. */
  run(request: Invocation): Promise<number>;
}

/** Permissions that a command needs. */
interface Needs {
  readonly net?: readonly Endpoint[];
  readonly env?: readonly string[];
  readonly sys?: readonly string[];
  readonly run?: readonly string[];
}

/** What a command is asked to do, before its inventory is read. */
interface Invocation {
  readonly io: Io;
  /** Aborts with an {@linkcode Interrupt} when a signal comes. */
  readonly signal: AbortSignal;
  readonly flags: Flags;
  /** The requested one of the command's `kinds`; "" without one. */
  readonly kind: string;
  /** The words after the command and its kind. */
  readonly words: readonly string[];
  /** The words after "--"; undefined without a "--". */
  readonly remote: readonly string[] | undefined;
  /**
   * The command that `permissions` reports on, to which `kind` and `words` then
   * belong; undefined for every other command.
   */
  readonly about: Command | undefined;
}

/** What a command is asked to do, with its inventory. */
interface Call extends Invocation {
  readonly inventory: Inventory;
}

/** An option of the command line. */
interface Option {
  /** Its one-letter form, without the dash. */
  readonly short?: string;
  /** The placeholder for its value in help. A switch has none. */
  readonly value?: string;
  /** Its valid values, for an error: `--port takes EXPECTED, not "x"`. */
  readonly expected?: string;
  /** Returns the value, or undefined if the text is invalid. */
  parse?(text: string): unknown;
  /** True if it may be repeated: the lists that `parse` returns are joined. */
  readonly isList?: boolean;
  readonly help: string;
}

const TIME = {
  value: "TIME",
  expected: "seconds, or 500ms, 5s, 2m, 1h",
  parse: parseDuration,
} as const;

const OPTIONS = {
  config: {
    short: "c",
    value: "PATH|URL|-",
    parse: parseAny,
    help: "the inventory; - is stdin (default:\n" +
      `$RINGRIFT_HOSTS_CONFIG, else\n${DEFAULT_CONFIG_PATH})`,
  },
  role: {
    value: "ROLE",
    expected: "a comma-separated list",
    parse: parseList,
    isList: true,
    help: "only nodes of these roles: a,b",
  },
  gpu: {
    value: "TEXT",
    expected: "a comma-separated list",
    parse: parseList,
    isList: true,
    help: "only nodes whose GPU contains TEXT",
  },
  status: {
    value: "STATUS",
    expected: "a comma-separated list",
    parse: parseList,
    isList: true,
    help: "only nodes of this status (default: active nodes)",
  },
  exclude: {
    value: "NODE",
    parse: parseItem,
    isList: true,
    help: "leave these nodes out",
  },
  where: {
    value: "KEY=VALUE",
    expected: "KEY=VALUE",
    parse: parsePair,
    isList: true,
    help: "only nodes whose KEY is VALUE; repeatable",
  },
  all: { help: "include inactive nodes" },
  timeout: {
    ...TIME,
    short: "t",
    help: `time limit per node (default: ${typedDuration(DEFAULTS.timeoutMs)})`,
  },
  concurrency: {
    value: "N",
    expected: "a whole number from 1 to 1000000",
    parse: parseConcurrency,
    help: `how many nodes at once (default: ${DEFAULTS.concurrency})`,
  },
  port: {
    value: "PORT",
    expected: "a whole number from 1 to 65535",
    parse: parsePortNumber,
    help: "use this port (default: each node's data server)",
  },
  tcp: { help: "check only that TCP connects" },
  ssh: { help: "check that the ssh server answers" },
  path: {
    value: "PATH",
    expected: 'a path that begins with "/"',
    parse: parseUrlPath,
    help: "request this path (default: each node's status_path)",
  },
  "min-up": {
    value: "N|N%",
    expected: "a number from 1, or 1% to 100%",
    parse: parseMinUp,
    help: "succeed once N nodes are up (default: all)",
  },
  only: {
    value: "STATE",
    expected: "up, unhealthy, down, unknown or problems",
    parse: parseStates,
    isList: true,
    help: "show only up, unhealthy, down, unknown or problems",
  },
  gather: { help: "print one line per outcome, with the names folded" },
  names: { help: "print names only" },
  show: {
    value: "KEY",
    expected: "a comma-separated list of keys, such as matches,db.hash",
    parse: parseList,
    isList: true,
    help:
      "show these keys of each answer: a,b.c\n(default: version,game_count)",
  },
  watch: { help: "keep checking until interrupted" },
  interval: { ...TIME, help: "time between two checks of a node" },
  down: { help: "wait until no node is up" },
  "include-self": { help: "urls data: include this host" },
  unchecked: { help: "do not check; print the URL of every selected node" },
  user: {
    short: "l",
    value: "NAME",
    parse: parseAny,
    help: "log in as NAME (default: each node's ssh_user)",
  },
  "connect-timeout": {
    ...TIME,
    help: `time allowed to connect (default: ${
      typedDuration(DEFAULTS.connectTimeoutMs)
    })`,
  },
  "ssh-option": {
    short: "o",
    value: "KEY=VALUE",
    expected: "KEY=VALUE as in ssh_config(5)",
    parse: parseAssignment,
    isList: true,
    help: "set an option, as in ssh_config(5); repeatable",
  },
  cd: { help: "run the command in each node's ringrift_path" },
  stdin: { help: "send stdin to each node's command" },
  "dry-run": { help: "print the commands without running them" },
  strict: { help: "treat warnings as errors" },
  json: { help: "print JSON" },
  quiet: { short: "q", help: "print nothing if all is well" },
  help: { short: "h", help: "print this text" },
  version: { short: "V", help: "print the version" },
} as const satisfies Record<string, Option>;

type OptionName = keyof typeof OPTIONS;

/** The value of an option: what its `parse` returns, or true for a switch. */
type OptionValue<O> = O extends { parse(text: string): infer T }
  ? Exclude<T, undefined>
  : true;

/** The options that were given, with their values. */
type Flags = {
  readonly [Name in OptionName]?: OptionValue<(typeof OPTIONS)[Name]>;
};

const OPTION_NAMES = Object.keys(OPTIONS) as OptionName[];
const SWITCHES = OPTION_NAMES.filter(isSwitch);
const VALUED = OPTION_NAMES.filter((name) => !isSwitch(name));

function isSwitch(name: OptionName): boolean {
  return !("value" in OPTIONS[name]);
}

/** Options that select the nodes. */
const SELECTION = [
  "config",
  "role",
  "gpu",
  "status",
  "exclude",
  "where",
  "all",
] as const satisfies OptionName[];

/** Options of commands that check many nodes. */
const SWEEP = [
  "timeout",
  "concurrency",
  "port",
] as const satisfies OptionName[];

/** Options of most commands; a few take only `--help` of these. */
const COMMON = ["json", "quiet", "help"] as const satisfies OptionName[];

function generalHelp(): string {
  const commands = COMMANDS.map(({ name, summary }) =>
    `  ${name.padEnd(12)} ${summary}`
  );

  return [
    `cluster-hosts ${manifest.version}: ` +
    "which nodes the cluster has, and which of them answer",
    "Usage: cluster-hosts COMMAND [NODE...] [options]",
    commands.join("\n"),
    "NODE is a name, a glob (gpu-*), a range (gpu-[1-8], gpu-[01-16,20]) or a\n" +
    "comma-separated list of these. By default: the active nodes.",
    optionHelp([...SELECTION, ...SWEEP, ...COMMON, "version"]),
    '"cluster-hosts COMMAND --help" lists the options of a command.',
    "Exit code 0: all is well; 1: it is not; 2: bad usage or config, or\n" +
    "something could not be checked.\n",
  ].join("\n\n");
}

function commandHelp(command: Command): string {
  const { name, summary, usage, options, help, notes, examples } = command;

  return [
    summary.charAt(0).toUpperCase() + summary.slice(1),
    `Usage: cluster-hosts ${name} ${usage}`,
    optionHelp(options, help),
    notes,
    `Examples:\n${examples.map((example) => `  ${example}\n`).join("")}`,
  ].join("\n\n");
}

/** Lists options with their help; `own` overrides the help of some. */
function optionHelp(
  names: readonly OptionName[],
  own: Command["help"] = {},
): string {
  const labelWidth = 23;
  const indent = `\n${" ".repeat(labelWidth + 3)}`;

  const lines = names.map((name) => {
    const { short, value, help }: Option = OPTIONS[name];
    const letter = short ? `-${short}, ` : "";
    const placeholder = value ? ` ${value}` : "";
    const label = `${letter}--${name}${placeholder}`;
    const gap = label.length > labelWidth ? indent : " ";
    const text = (own[name] ?? help).replaceAll("\n", indent);

    return `  ${label.padEnd(labelWidth)}${gap}${text}`;
  });

  return lines.join("\n");
}

// --- Arguments ---

/** A parsed command line. Faults are reported once the command is known. */
interface Line {
  readonly words: readonly string[];
  readonly remote: readonly string[] | undefined;
  readonly flags: Flags;
  readonly unknown: readonly string[];
  readonly faults: readonly OptionFault[];
  /** True if there are no arguments at all. */
  readonly isEmpty: boolean;
}

/** An option whose value is missing, needless or invalid. */
interface OptionFault {
  readonly option: OptionName;
  readonly message: string;
}

function parseLine(args: readonly string[]): Line {
  const end = args.indexOf("--");
  const ours = end < 0 ? args : args.slice(0, end);
  const remote = end < 0 ? undefined : args.slice(end + 1);

  const { joined, unknown, faults } = joinOptions(ours);
  const given: Record<string, unknown> = parseArgs(joined, {
    boolean: SWITCHES,
    // "_" keeps words such as 010 from becoming numbers.
    string: [...VALUED, "_"],
    collect: VALUED,
  });
  const read = readFlags(given);

  return {
    words: given._ as string[],
    remote,
    flags: read.flags,
    unknown: [...unknown],
    faults: [...faults, ...read.faults],
    isEmpty: args.length === 0,
  };
}

/**
 * Rewrites each option with a value as one word, `--name=value`, and each
 * switch as `--name=true`: the form that `parseArgs` of `@std/cli` never
 * misreads.
 *
 * Given the line as it was typed, `parseArgs` would read `-t5s` as three
 * switches and `--config -` as an empty value, lose the key of `-oKEY=VALUE`,
 * and let an unknown option swallow a word.
 */
function joinOptions(
  args: readonly string[],
): { joined: string[]; unknown: Set<string>; faults: OptionFault[] } {
  const joined: string[] = [];
  const unknown = new Set<string>();
  const faults: OptionFault[] = [];
  const queue = [...args];

  while (queue.length > 0) {
    const arg = queue.shift()!;
    const option = splitOption(arg);

    if (!option) {
      const isWord = arg === "-" || !arg.startsWith("-");
      if (isWord) joined.push(arg);
      else unknown.add(withoutValue(arg));
      continue;
    }

    const { name, attached, isLetter } = option;
    if (!isSwitch(name)) {
      const value = attached ?? takeValue(queue);
      if (value) {
        joined.push(`--${name}=${value}`);
      } else {
        faults.push(missingValue(name));
      }
      continue;
    }

    const isValue = !isLetter || attached?.startsWith("=");
    if (attached !== undefined && isValue) {
      faults.push(needlessValue(name));
      continue;
    }

    joined.push(`--${name}=true`);
    // More letters, as in -qt1s.
    if (attached !== undefined) queue.unshift(`-${attached}`);
  }

  return { joined, unknown, faults };
}

/** Returns an unknown option without its value: `--name` of `--name=value`. */
function withoutValue(arg: string): string {
  const [name = arg] = /^--[^=]+/.exec(arg) ?? [];
  return name;
}

/** An option as it was typed, with any text attached to it. */
interface TypedOption {
  readonly name: OptionName;
  readonly attached: string | undefined;
  readonly isLetter: boolean;
}

/** Splits a known option, `--name=value` or `-nvalue`. */
function splitOption(arg: string): TypedOption | undefined {
  const [, word, value] = /^--([^=]+)(?:=(.*))?$/s.exec(arg) ?? [];
  const [, letter, rest] = /^-([^-])(.+)?$/su.exec(arg) ?? [];

  for (const name of OPTION_NAMES) {
    const { short }: Option = OPTIONS[name];

    if (word === name) return { name, attached: value, isLetter: false };
    if (letter === undefined || letter !== short) continue;

    // -c=value means -cvalue.
    const attached = isSwitch(name) ? rest : rest?.replace(/^=/, "");
    return { name, attached, isLetter: true };
  }
  return undefined;
}

function missingValue(name: OptionName): OptionFault {
  const { value }: Option = OPTIONS[name];
  return { option: name, message: `--${name} needs a value: ${value}` };
}

function needlessValue(name: OptionName): OptionFault {
  const message = `--${name} takes no value: write --${name}, or leave it out`;
  return { option: name, message };
}

/** Takes the next argument, unless it is another option; "-" is a value. */
function takeValue(queue: string[]): string | undefined {
  const [next] = queue;
  if (next === undefined) return undefined;

  const isValue = next === "-" || !next.startsWith("-");
  return isValue ? queue.shift() : undefined;
}

/** Reads the flags from the result of `parseArgs`. */
function readFlags(
  given: Readonly<Record<string, unknown>>,
): { flags: Flags; faults: OptionFault[] } {
  const flags: Record<string, unknown> = {};
  const faults: OptionFault[] = [];

  for (const name of SWITCHES) {
    if (given[name] === true) flags[name] = true;
  }

  for (const name of VALUED) {
    const texts = given[name] as string[];
    if (texts.length === 0) continue;

    const parsed = parseValues(name, texts);
    if ("value" in parsed) flags[name] = parsed.value;
    else faults.push({ option: name, message: parsed.message });
  }

  return { flags: flags as Flags, faults };
}

/** Parses the values of one option; those of a list option are joined. */
function parseValues(
  name: OptionName,
  texts: readonly string[],
): { value: unknown } | { message: string } {
  const { expected, isList, parse }: Option = OPTIONS[name];

  if (!isList && texts.length > 1) {
    return { message: `--${name} was given more than once` };
  }

  const values = texts.map((text) => parse?.(text));
  const wrong = values.indexOf(undefined);
  if (wrong >= 0) {
    const text = JSON.stringify(texts[wrong]);
    return { message: `--${name} takes ${expected}, not ${text}` };
  }

  return { value: isList ? values.flat() : values[0] };
}

function parseAny(text: string): string {
  return text;
}

function parseItem(text: string): string[] {
  return [text];
}

function parseList(text: string): string[] | undefined {
  const items = text.split(",").map((item) => item.trim());
  const filled = items.filter((item) => item !== "");
  return filled.length > 0 ? filled : undefined;
}

/** Parses `KEY=VALUE` into a list of one pair, since lists are joined. */
function parsePair(
  text: string,
): (readonly [key: string, value: string])[] | undefined {
  const [, key, value] = /^([^=]+)=(.*)$/s.exec(text) ?? [];
  if (key === undefined || value === undefined) return undefined;
  return [[key, value]];
}

function parseAssignment(text: string): string[] | undefined {
  return parsePair(text) ? [text] : undefined;
}

function parseUrlPath(text: string): string | undefined {
  return text.startsWith("/") ? text : undefined;
}

function parseConcurrency(text: string): number | undefined {
  return parseWhole(text, 1_000_000);
}

function parsePortNumber(text: string): number | undefined {
  return parseWhole(text, 65_535);
}

function parseWhole(text: string, most: number): number | undefined {
  if (!/^[1-9]\d{0,8}$/.test(text)) return undefined;

  const number = Number(text);
  return number <= most ? number : undefined;
}

const UNIT_MS: Readonly<Record<string, number>> = {
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
};

/** The longest delay that a timer can hold. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** Parses a duration into milliseconds; a bare number is in seconds. */
function parseDuration(text: string): number | undefined {
  const [, number, unit = "s"] = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text) ??
    [];
  if (number === undefined) return undefined;

  const ms = Number(number) * UNIT_MS[unit]!;
  // 1.005s would be 1004.9999999999999 ms.
  return ms >= 1 && ms <= MAX_TIMER_MS ? Math.round(ms) : undefined;
}

/** Formats a duration as it would be typed: `500ms`, `5s`, `2m`, `1h`. */
function typedDuration(ms: number): string {
  if (ms % 1000 !== 0) return `${ms}ms`;
  if (ms % 60_000 !== 0) return `${ms / 1000}s`;
  if (ms % 3_600_000 !== 0) return `${ms / 60_000}m`;
  return `${ms / 3_600_000}h`;
}

/** How many of the selected nodes have to be up. */
type MinUp = { readonly count: number } | { readonly percent: number };

function parseMinUp(text: string): MinUp | undefined {
  const [, digits, sign] = /^(\d{1,7}(?:\.\d+)?)(%?)$/.exec(text) ?? [];
  if (digits === undefined) return undefined;

  const number = Number(digits);
  if (sign === "%") {
    return number >= 1 && number <= 100 ? { percent: number } : undefined;
  }
  return number >= 1 && Number.isInteger(number)
    ? { count: number }
    : undefined;
}

/** The states of a node, problems first. */
const STATES = [
  "down",
  "unhealthy",
  "unknown",
  "up",
] as const satisfies NodeState[];

function parseStates(text: string): NodeState[] | undefined {
  const words = parseList(text);
  if (!words) return undefined;

  const states: NodeState[] = [];
  for (const word of words) {
    const meant = STATES.filter((state) =>
      state === word || (word === "problems" && state !== "up")
    );
    if (meant.length === 0) return undefined;
    states.push(...meant);
  }

  return states;
}

/** Returns the help or the version, if a line asks for it. */
function immediateAnswer(line: Line): string | undefined {
  const { flags, words: [name, ...words] } = line;
  if (flags.version || name === "version") {
    return `cluster-hosts ${manifest.version}\n`;
  }

  const isHelp = name === "help";
  if (!isHelp && !flags.help) return undefined;

  const topic = isHelp ? words[0] : name;
  return topic === undefined
    ? generalHelp()
    : commandHelp(findCommand(topic, words));
}

/** Finds the command of a line; throws if its arguments are invalid. */
function readRequest(
  line: Line,
  streams: Pick<Invocation, "io" | "signal">,
): { command: Command; request: Invocation } {
  const [name, ...words] = line.words;
  const command = name === undefined ? undefined : findCommand(name, words);

  const [innerName, ...innerWords] = words;
  const about = command?.takesCommand && innerName !== undefined
    ? findCommand(innerName, innerWords)
    : undefined;
  // The command that the options and arguments belong to.
  const subject = about ?? command;

  const problems = optionProblems(line, subject);
  if (problems.length > 0) throw new Error(problems.join("\n"));
  if (!command || !subject) {
    throw new Error("No command given; see cluster-hosts --help");
  }

  const clash = exclusiveClash(line.flags);
  if (clash) throw new Error(clash);

  const request = takeKind({
    ...streams,
    flags: line.flags,
    kind: "",
    words: about ? innerWords : words,
    remote: line.remote,
    about,
  }, subject);

  const problem = argumentProblem(request, subject) ?? subject.check?.(request);
  if (problem) {
    const hint = subject.takesNodes ? expansionHint(request.words) : "";
    throw new Error(problem + hint);
  }

  return { command, request };
}

/** Lists options that are unknown, of another command, or have a bad value. */
function optionProblems(line: Line, command: Command | undefined): string[] {
  const { flags, unknown, faults } = line;
  const known = command?.options ?? OPTION_NAMES;
  const seeHelp = command
    ? `; see cluster-hosts ${command.name} --help`
    : "; see cluster-hosts --help";
  const problems: string[] = [];

  for (const option of unknown) {
    const near = didYouMean(option, known.map((name) => `--${name}`));
    const meant = near && `; did you mean "${near}"?`;
    const advice = hintOn(option, known) ?? meant ?? seeHelp;
    problems.push(`Unknown option ${JSON.stringify(option)}${advice}`);
  }

  for (const name of OPTION_NAMES) {
    const fault = faults.find(({ option }) => option === name);
    const isGiven = name in flags || fault !== undefined;

    if (isGiven && command && !known.includes(name)) {
      const advice = hintOn(`--${name}`, known) ?? seeHelp;
      problems.push(`${command.name} does not take ${spelled(name)}${advice}`);
    } else if (fault) {
      problems.push(fault.message);
    }
  }

  return problems;
}

/** Groups of mutually exclusive options. */
const EXCLUSIVE: readonly (readonly OptionName[])[] = [
  ["json", "gather", "names", "dry-run"],
  ["watch", "gather", "names"],
  // A watch never ends by itself, so it has no result to decide.
  ["min-up", "watch"],
  ["show", "gather", "names"],
  // --tcp and --ssh request no document, and --ssh uses the ssh port.
  ["tcp", "ssh", "path"],
  ["tcp", "ssh", "show"],
  ["ssh", "port"],
  // --down waits for every node.
  ["down", "min-up"],
];

function exclusiveClash(flags: Flags): string | undefined {
  const given = EXCLUSIVE.map((group) => group.filter((name) => name in flags));
  const clash = given.find((names) => names.length > 1);
  if (!clash) return undefined;

  const options = clash.map((name) => `--${name}`).join(" and ");
  return `${options} cannot be used together`;
}

/** Returns what is wrong with the arguments as a whole. */
function argumentProblem(
  request: Invocation,
  command: Command,
): string | undefined {
  const { words, remote, flags } = request;
  const { name, takesNodes, takesRemote } = command;

  if (flags.stdin && flags.config === "-") {
    return "stdin can be read once: --stdin and --config - cannot be used " +
      "together";
  }
  if (remote && !takesRemote) return `${name} takes no command after "--"`;
  if (takesNodes && words.includes("")) {
    return "A NODE is empty: did a $(...) print nothing?";
  }
  if (!takesNodes && words.length > 0) {
    const got = words.join(" ");
    return `${name} takes no NODE, but got ${got}; ` +
      "a file is given as --config FILE";
  }
  return undefined;
}

/** Names an option in an error, with its letter, which may have been typed. */
function spelled(name: OptionName): string {
  const { short }: Option = OPTIONS[name];
  return short ? `--${name} (-${short})` : `--${name}`;
}

/** Advice on an option of another tool or another command. */
interface Hint {
  readonly typed: string;
  /** The option that a command must take for the advice to apply. */
  readonly takes: OptionName;
  readonly advice: string;
}

const NAME_NODES =
  "name the nodes without an option, as in 'gpu-[1-8]'; '*' is every active node";

/** Advice for users of other tools and commands; the first match counts. */
const HINTS: readonly Hint[] = [
  { typed: "-w", takes: "role", advice: NAME_NODES },
  { typed: "-a", takes: "role", advice: NAME_NODES },
  { typed: "--limit", takes: "role", advice: NAME_NODES },
  { typed: "-g", takes: "role", advice: "write --role ROLE" },
  { typed: "-f", takes: "concurrency", advice: "write --concurrency N" },
  { typed: "--forks", takes: "concurrency", advice: "write --concurrency N" },
  { typed: "--sort", takes: "only", advice: "status lists problems first" },
  { typed: "-n", takes: "watch", advice: "write --watch --interval TIME" },
  { typed: "-n", takes: "interval", advice: "write --interval TIME" },
  { typed: "-x", takes: "exclude", advice: "write --exclude NODE" },
  { typed: "-b", takes: "gather", advice: "write --gather" },
  { typed: "-i", takes: "ssh-option", advice: "write -o IdentityFile=PATH" },
  { typed: "-i", takes: "config", advice: "write --config PATH" },
  { typed: "-p", takes: "ssh-option", advice: "write -o Port=PORT" },
  { typed: "-p", takes: "port", advice: "write --port PORT" },
  { typed: "--down", takes: "only", advice: "write --only down" },
  // -o json, as in kubectl.
  { typed: "--ssh-option", takes: "json", advice: "for JSON, write --json" },
];

function hintOn(
  option: string,
  known: readonly OptionName[],
): string | undefined {
  const hint = HINTS.find(({ typed, takes }) =>
    typed === option && known.includes(takes)
  );
  return hint && `: ${hint.advice}`;
}

/** Commands, keyed by the names that other tools have for them. */
const OTHER_NAMES: ReadonlyMap<string, string> = new Map([
  ["list", "nodes"],
  ["ls", "nodes"],
  ["check", "status"],
  ["ping", "status"],
  ["run", "ssh"],
  ["exec", "ssh"],
]);

/** Finds a command; `words` are the words after its name. */
function findCommand(name: string, words: readonly string[]): Command {
  const command = COMMANDS.find((known) => known.name === name);
  if (command) return command;

  const later = COMMANDS.find((known) => words.includes(known.name));
  if (later) {
    const form = `cluster-hosts ${later.name} ${later.usage}`;
    throw new Error(
      `Unknown command ${JSON.stringify(name)}; put the command first: ${form}`,
    );
  }

  const near = OTHER_NAMES.get(name) ??
    didYouMean(name, COMMANDS.map(nameOf));
  const advice = near ? `did you mean "${near}"?` : "see cluster-hosts --help";
  throw new Error(`Unknown command ${JSON.stringify(name)}; ${advice}`);
}

/** Moves the kind out of the words, if the command has kinds. */
function takeKind(request: Invocation, command: Command): Invocation {
  const { name, kinds, kindsReplacedBy = [] } = command;
  if (!kinds) return request;

  const [word, ...words] = request.words;
  if (word !== undefined && kinds.includes(word)) {
    return { ...request, kind: word, words };
  }
  if (kindsReplacedBy.some((option) => option in request.flags)) {
    return request;
  }
  if (word === undefined) {
    throw new Error(`${name} needs one of: ${kinds.join(", ")}`);
  }

  const near = didYouMean(word, kinds);
  const advice = near
    ? `did you mean "${near}"?`
    : `${name} takes one of: ${kinds.join(", ")}`;
  throw new Error(`Unknown kind ${JSON.stringify(word)}; ${advice}`);
}

function nameOf({ name }: { readonly name: string }): string {
  return name;
}

function nodeOf({ node }: { readonly node: ClusterNode }): ClusterNode {
  return node;
}

function foldNodes(nodes: readonly ClusterNode[]): string {
  return foldNames(nodes.map(nameOf));
}

// --- Inventory and selection ---

/** An inventory and its nodes. */
interface Inventory extends ConfigText {
  readonly config: HostsConfig;
  readonly nodes: readonly ClusterNode[];
  /** True if `RINGRIFT_COORDINATOR_IP` replaces a missing inventory. */
  readonly isFallback: boolean;
}

/** Reads the inventory that a command works on. */
async function loadInventory(
  request: Invocation,
  { mayFallBack }: { readonly mayFallBack: boolean },
): Promise<Inventory> {
  const source = await readInventory(request);

  if (source.exists) return await parseInventory(source);
  if (mayFallBack) return await fallbackInventory(source);
  throw missingInventory();
}

/** Reads the text of the inventory that `--config` names, or the default. */
async function readInventory(
  request: Pick<Invocation, "flags" | "io" | "signal">,
): Promise<ConfigText> {
  const { flags: { config, timeout: timeoutMs }, signal } = request;
  if (config !== "-") {
    return await readHostsConfig(config, { timeoutMs, signal });
  }

  const origin = "stdin";
  const bytes = await readStdin(request);

  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return { text, origin, exists: true };
  } catch (cause) {
    const problem = { path: "", message: "is not UTF-8" };
    throw new HostsConfigError(origin, [problem], { cause });
  }
}

/** Reads stdin. The read cannot be aborted, but it must not delay Ctrl-C. */
async function readStdin(
  { io, signal }: Pick<Invocation, "io" | "signal">,
): Promise<Uint8Array<ArrayBuffer>> {
  signal.throwIfAborted();

  const aborted = new Promise<never>((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  return await Promise.race([io.readStdin(), aborted]);
}

async function parseInventory(source: ConfigText): Promise<Inventory> {
  const config = parseHostsConfig(source.text, source.origin);
  const nodes = await getClusterNodes(config);
  return { ...source, config, nodes: [...nodes.values()], isFallback: false };
}

/** Makes an inventory of one node, at `RINGRIFT_COORDINATOR_IP`. */
async function fallbackInventory(source: ConfigText): Promise<Inventory> {
  const address = await getCoordinatorAddress();
  if (!address) throw missingInventory();

  const name = "coordinator";
  const entry = {
    tailscale_ip: address.hostname,
    data_server_port: address.port,
    role: name,
  };
  const config = { hosts: { [name]: entry }, elo_sync: { coordinator: name } };
  const nodes = await getClusterNodes(config);
  return { ...source, config, nodes: [...nodes.values()], isFallback: true };
}

function selectionOf(
  { flags, words }: Pick<Invocation, "flags" | "words">,
): NodeSelection {
  return {
    names: words.length > 0 ? words : undefined,
    roles: flags.role,
    gpus: flags.gpu,
    statuses: flags.status,
    exclude: flags.exclude,
    where: flags.where && groupPairs(flags.where),
    includeInactive: flags.all,
  };
}

function groupPairs(
  pairs: readonly (readonly [key: string, value: string])[],
): Record<string, string[]> {
  const groups = Map.groupBy(pairs, ([key]) => key);
  const entries = [...groups].map(([key, group]) =>
    [key, group.map(([, value]) => value)] as const
  );
  return Object.fromEntries(entries);
}

/** Options that leave nodes out. */
const FILTERS = ["role", "gpu", "status", "where", "exclude"] as const;

/** Selects the nodes that a command works on; throws if there are none. */
function select(call: Call): ClusterNode[] {
  const { inventory: { nodes, origin, isFallback }, flags, words } = call;

  const isNarrowed = words.length > 0 || FILTERS.some((name) => name in flags);
  // The one fallback node is not what a NODE or a filter asks for.
  if (isFallback && isNarrowed) throw missingInventory();

  if (nodes.length === 0) {
    throw new Error(`No hosts in ${origin}: add them under "hosts"`);
  }

  const selected = selectNamed(call);
  if (selected.length === 0) throw new Error(emptySelection(call));
  return selected;
}

function selectNamed(call: Call): ClusterNode[] {
  try {
    return selectNodes(call.inventory.nodes, selectionOf(call));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const message = error.message + intervalHint(call) +
      expansionHint(call.words);
    throw new Error(message, { cause: error });
  }
}

/** Returns advice to add to an error about `--watch 5`. */
function intervalHint({ flags, words }: Call): string {
  const time = words.find((word) => parseDuration(word) !== undefined);
  if (!flags.watch || time === undefined) return "";
  return `; --watch takes no value: write --watch --interval ${time}`;
}

/**
 * Returns advice to add to an error if the shell may have expanded a pattern.
 */
function expansionHint(words: readonly string[]): string {
  const files = words.filter(existsHere);
  if (files.length === 0) return "";

  const names = files.length > 3 ? [...files.slice(0, 3), "…"] : files;
  const exist = files.length === 1 ? "exists" : "exist";
  return `; ${names.join(", ")} ${exist} in this folder: ` +
    "if the shell expanded a pattern, quote it: '*'";
}

/** True if such a file or folder exists, and may be looked at. */
function existsHere(path: string): boolean {
  if (path === "") return false;
  const { state } = Deno.permissions.querySync({ name: "read", path });
  if (state !== "granted") return false;

  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

/** Says which filter left no node, and which values there are. */
function emptySelection({ flags, words, inventory }: Call): string {
  const { nodes, origin } = inventory;
  const head = `No node is selected in ${origin}`;

  let applied: Flags = { all: true };
  let left = selectNodes(nodes, selectionOf({ words, flags: applied }));

  for (const { option, text, key } of filtersOf(flags)) {
    applied = { ...applied, ...option };
    const next = selectNodes(nodes, selectionOf({ words, flags: applied }));
    if (next.length === 0) {
      const choices = key ? `; ${choicesOf(key, left)}` : "";
      return `${head}: ${text} leaves none of ${left.length}${choices}`;
    }
    left = next;
  }

  const statuses = choicesOf("status", left);
  const count = left.length;
  return `${head}: none of ${count} is active; ${statuses}; --all adds them`;
}

/** One filter, as an error about an empty selection names it. */
interface Filter {
  readonly option: Flags;
  /** The option as it was given: `--role a,b`. */
  readonly text: string;
  /** The key of a node that it tests. */
  readonly key?: string;
}

/** Lists the filters, `--where` key by key, in the order they are tried. */
function filtersOf(flags: Flags): Filter[] {
  const { role, gpu, status, where = [], exclude } = flags;
  const filters: Filter[] = [];

  if (role) {
    filters.push({ option: { role }, text: `--role ${role}`, key: "role" });
  }
  if (gpu) filters.push({ option: { gpu }, text: `--gpu ${gpu}`, key: "gpu" });
  if (status) {
    const text = `--status ${status}`;
    filters.push({ option: { status }, text, key: "status" });
  }

  const pairs: (readonly [string, string])[] = [];
  for (const [key, group] of Map.groupBy(where, ([key]) => key)) {
    pairs.push(...group);
    const values = group.map(([, value]) => value);
    const text = `--where ${key}=${values}`;
    filters.push({ option: { where: [...pairs] }, text, key });
  }

  if (exclude) {
    filters.push({ option: { exclude }, text: `--exclude ${exclude}` });
  }
  return filters;
}

const MAX_CHOICES = 12;

/** Returns `role is one of a, b`: the values that nodes have at a key. */
function choicesOf(key: string, nodes: readonly ClusterNode[]): string {
  const isField = key === "role" || key === "gpu" || key === "status";
  const values = nodes.flatMap((node) =>
    isField ? node[key] : node.entry[key] ?? []
  );
  const texts = new Set(values.map(String).filter((text) => text !== ""));
  if (texts.size === 0) return `no node sets ${key}`;

  const shown = [...texts].slice(0, MAX_CHOICES);
  if (texts.size > MAX_CHOICES) shown.push("…");
  const oneOf = shown.length > 1 ? "one of " : "";
  return `${key} is ${oneOf}${shown.join(", ")}`;
}

function sweepOptions(call: Call): SweepOptions {
  const { timeout: timeoutMs, concurrency, port, path } = call.flags;
  return {
    check: checkOf(call),
    port,
    path,
    timeoutMs,
    concurrency,
    signal: call.signal,
  };
}

function checkOf({ flags }: Pick<Call, "flags">): "http" | "tcp" | "ssh" {
  if (flags.ssh) return "ssh";
  return flags.tcp ? "tcp" : "http";
}

/** Computes how many of the nodes have to be up; a percentage is rounded up. */
function minUpOf({ flags }: Call, nodes: readonly ClusterNode[]): number {
  const minUp = flags["min-up"];
  if (minUp === undefined) return nodes.length;

  // Tolerates rounding: 7.000000000000001 must not become 8.
  const count = "count" in minUp
    ? minUp.count
    : Math.ceil(minUp.percent * nodes.length / 100 - 1e-9);

  if (count > nodes.length) {
    const selected = nodes.length === 1
      ? "1 node is selected"
      : `${nodes.length} nodes are selected`;
    throw new Error(`--min-up ${count}, but only ${selected}`);
  }
  return count;
}

// --- status ---

const STATUS: Command = {
  name: "status",
  summary: "check the nodes in parallel, problems first",
  usage: "[NODE...] [options]",
  options: [
    ...SELECTION,
    ...SWEEP,
    "tcp",
    "ssh",
    "path",
    "min-up",
    "only",
    "show",
    "gather",
    "names",
    "watch",
    "interval",
    ...COMMON,
  ],
  help: {
    interval: "with --watch: time between checks of a node\n" +
      `(default: ${typedDuration(DEFAULTS.watchIntervalMs)})`,
    quiet: "print only problems; does not affect\n" +
      "--json and --names",
  },
  notes:
    "Exit code 0: every selected node, or --min-up of them, is up; 1: too few are;\n" +
    "2: too few are, and some could not be checked. --only does not change this.",
  examples: [
    "cluster-hosts status 'gpu-[1-8]' --role worker --watch",
    "cluster-hosts status --only problems --names",
    "cluster-hosts status --show db_hash,queue.length",
  ],
  takesNodes: true,
  inventory: "fallback",
  check({ flags }) {
    const isLost = flags.interval !== undefined && !flags.watch;
    return isLost ? "--interval requires --watch" : undefined;
  },
  run: runStatus,
  needs: checkNeeds,
};

async function runStatus(call: Call): Promise<number> {
  const { io, flags } = call;
  const nodes = select(call);
  const minUp = minUpOf(call, nodes);
  if (flags.watch) return await new Watch(call, nodes).run();

  const startedMs = performance.now();
  const { probes, interrupt } = await checkOnce(call, nodes);

  const denied = deniedMessage(probes);
  const isEachDenied = probes.every(isDenied);
  if (denied && isEachDenied) throw new Error(denied);

  const isEnough = countStates(probes).up >= minUp;
  const isWell = isEnough && !interrupt;
  const isSilent = flags.quiet === true && isWell;
  await printSweep(call, { probes, total: nodes.length, startedMs, isSilent });
  if (denied && !isSilent) await warn(io, denied);

  if (interrupt) {
    const checked = `${probes.length} of ${nodes.length} nodes`;
    await warn(io, `Interrupted: ${checked} were checked`);
    throw interrupt;
  }
  return exitCodeOf(probes, isEnough);
}

/** Checks the nodes; after an interrupt, returns those checked by then. */
async function checkOnce(
  call: Call,
  nodes: readonly ClusterNode[],
): Promise<{ probes: NodeProbe[]; interrupt: Interrupt | undefined }> {
  const startedMs = performance.now();
  const known = new Map<ClusterNode, NodeProbe>();
  using _line = liveLine(
    call,
    () => `checked ${known.size}/${nodes.length}, ${elapsed(startedMs)}`,
  );

  const onProbe = (probe: NodeProbe) => {
    known.set(probe.node, probe);
  };
  const work = probeNodes(nodes, { ...sweepOptions(call), onProbe });
  const interrupt = await untilInterrupted(work);

  return { probes: nodes.flatMap((node) => known.get(node) ?? []), interrupt };
}

/** Returns the endpoints and variables that `status` and `wait` need. */
function checkNeeds(call: Call): Needs {
  const { check, port } = sweepOptions(call);
  const nodes = select(call);
  const net = nodes.flatMap((node) => checkedEndpoints(node, { check, port }));
  const env = call.inventory.isFallback ? ["RINGRIFT_COORDINATOR_IP"] : [];
  return { net, env };
}

/** Names the flag that would let every node be checked. */
function deniedMessage(probes: readonly NodeProbe[]): string | undefined {
  const flag = missingNetFlag(probes);
  return flag && notCapable("net access", flag).message;
}

function isDenied({ failure }: NodeProbe): boolean {
  return failure?.code === "denied";
}

function isProblem({ state }: NodeProbe): boolean {
  return state !== "up";
}

/** True if `--only` includes the probe's state, or is not given. */
function isShown({ only }: Flags, { state }: NodeProbe): boolean {
  return only === undefined || only.includes(state);
}

function exitCodeOf(probes: readonly NodeProbe[], isEnough: boolean): number {
  if (isEnough) return 0;
  return countStates(probes).unknown > 0 ? 2 : 1;
}

/** What one sweep found out, even if it was interrupted. */
interface Sweep {
  readonly probes: readonly NodeProbe[];
  readonly total: number;
  readonly startedMs: number;
  /** True if all is well, and `--quiet` is given. */
  readonly isSilent: boolean;
}

async function printSweep(call: Call, sweep: Sweep): Promise<void> {
  const { io, flags } = call;
  const { probes, total } = sweep;
  const shown = probes.filter((probe) => isShown(flags, probe));

  if (flags.json) {
    const summary = { total, checked: probes.length, ...countStates(probes) };
    const head = { checkedAt: new Date().toISOString(), summary };
    const items = shown.map(probeJson);
    await io.out(jsonDocument(call, { head, key: "nodes", items }));
    return;
  }

  if (flags.names) {
    await io.out(linesOf(shown.map(({ node }) => node.name)));
  } else if (!sweep.isSilent) {
    await io.out(sweepTable(call, shown));
  }

  if (!flags.quiet && probes.length > 0) {
    await printSummary(io, sweepSummary(call, sweep));
  }
}

/** Draws the table, or nothing if it would have no rows. */
function sweepTable(call: Call, shown: readonly NodeProbe[]): string {
  const { io, flags } = call;
  const asked = flags.quiet ? shown.filter(isProblem) : shown;
  if (asked.length === 0) return "";

  const sorted = problemsFirst(asked);
  if (flags.gather) return outcomeTable(io, sorted);

  const rows = sorted.map((probe) => statusRow(call, probe));
  return table(statusColumns(flags), rows, { io });
}

/** Prints the summary; on a terminal, after a blank line. */
async function printSummary(io: Io, lines: readonly string[]): Promise<void> {
  const isBelow = io.isTerminal && io.isErrTerminal;
  if (isBelow) await io.err("\n");
  await warn(io, lines.join("\n"));
}

function sweepSummary(call: Call, sweep: Sweep): string[] {
  const { origin, isFallback } = call.inventory;
  const counts = summaryOf(sweep.probes, sweep.total);
  const lines = [`${counts} in ${seconds(sweep.startedMs)}, ${origin}`];

  if (isFallback) {
    lines.push(
      "there is no inventory, so this is RINGRIFT_COORDINATOR_IP alone",
    );
  }
  const shared = sharedNote(call, sweep.probes);
  if (shared) lines.push(shared);
  return lines;
}

/** Names the nodes that are up, but whose answer may be another node's. */
function sharedNote(
  call: Call,
  probes: readonly NodeProbe[],
): string | undefined {
  const { check, port } = sweepOptions(call);
  if (check === "ssh") return undefined;

  const shared = sharedEndpoints(call.inventory.nodes, port);
  const names: string[] = [];
  for (const { node, state, endpoint } of probes) {
    const isShared = endpoint && shared.has(endpointUrl(endpoint));
    if (state === "up" && isShared) names.push(node.name);
  }
  if (names.length === 0) return undefined;

  const folded = foldNames(names);
  return `Up, but at an address shared with another node: ${folded} ` +
    "(validate shows which; --ssh checks each node itself)";
}

/** Sorts the probes by state; keeps their order within each state. */
function problemsFirst(probes: readonly NodeProbe[]): NodeProbe[] {
  return STATES.flatMap((state) => probes.filter((it) => it.state === state));
}

function countStates(probes: readonly NodeProbe[]): Record<NodeState, number> {
  const counts = { down: 0, unhealthy: 0, unknown: 0, up: 0 };
  for (const { state } of probes) counts[state]++;
  return counts;
}

/** Returns `7 of 9 nodes up, 2 down (1 refused, 1 timeout)`. */
function summaryOf(probes: readonly NodeProbe[], total: number): string {
  const groups = Map.groupBy(problemsFirst(probes), ({ state }) => state);
  const parts = [`${groups.get("up")?.length ?? 0} of ${total} nodes up`];
  groups.delete("up");

  for (const [state, group] of groups) {
    parts.push(`${group.length} ${state} (${countReasons(group)})`);
  }

  const unchecked = total - probes.length;
  if (unchecked > 0) parts.push(`${unchecked} not checked`);
  return parts.join(", ");
}

/** Returns `1 refused, 2 timeout`. */
function countReasons(probes: readonly NodeProbe[]): string {
  const groups = Map.groupBy(probes, ({ failure }) => failure?.code ?? "other");
  const counts = [...groups].map(([code, { length }]) => `${length} ${code}`);
  return counts.join(", ");
}

/** Returns the same keys for every node; what is not known is null. */
function probeJson(probe: NodeProbe): Record<string, unknown> {
  const { node: { name, role, gpu }, state, port } = probe;
  return {
    name,
    role,
    gpu,
    state,
    address: probe.address ?? null,
    port,
    connectMs: roundMs(probe.connectMs),
    responseMs: roundMs(probe.responseMs),
    status: probe.status ?? null,
    failure: probe.failure ?? null,
  };
}

function roundMs(ms: number | undefined): number | null {
  return ms === undefined ? null : Number(ms.toFixed(2));
}

const STATE_COLOURS: Readonly<Record<NodeState, number>> = {
  up: 32,
  unhealthy: 33,
  down: 31,
  unknown: 35,
};
const FAINT = 2;
const RED = 31;

/** The keys of an answer that are shown unless `--show` names others. */
const SHOWN_KEYS = ["version", "game_count"];

/** How many columns a value may take: one answer must not widen every row. */
const VALUE_WIDTH = { terminal: 20, pipe: 80 };

/** How many characters of a value are looked at: an answer may be long. */
const VALUE_LENGTH = 100;

function statusColumns(flags: Flags): Column[] {
  return [
    { title: "NAME", least: 10 },
    { title: "ROLE", drop: 4 },
    { title: "GPU", drop: 3 },
    { title: "ADDRESS", drop: 5 },
    { title: "LATENCY", drop: 6, align: "right" },
    { title: "STATE" },
    ...answerColumns(flags),
    { title: "REASON", least: 12, dropsIfEmpty: true },
  ];
}

function answerColumns({ show }: Flags): Column[] {
  if (!show) {
    return [
      { title: "VERSION", drop: 2 },
      { title: "GAMES", drop: 1, align: "right" },
    ];
  }

  return show.map((key, index) => ({
    title: key.toUpperCase(),
    least: 8,
    isAsked: true,
    // The last key is dropped first.
    drop: -index,
  }));
}

function statusRow({ io, flags }: Call, probe: NodeProbe): Cell[] {
  const { node, state, status, failure } = probe;
  const keys = flags.show ?? SHOWN_KEYS;
  const width = io.isTerminal ? VALUE_WIDTH.terminal : VALUE_WIDTH.pipe;
  return [
    node.name,
    node.role,
    node.gpu || "-",
    placeCell(probe),
    latencyOf(probe),
    stateCell(state),
    ...keys.map((key) => clip(answerText(status, key), width)),
    reasonOf(failure),
  ];
}

/** Shows the endpoint that answered, else the first that was tried, faintly. */
function placeCell({ endpoint, endpoints, address }: NodeProbe): Cell {
  const place = endpoint ?? endpoints[0];
  if (!place) return "-";

  const text = hostPort(place.host, place.port);
  return address ? text : { text, colour: FAINT };
}

function stateCell(state: NodeState): Cell {
  return { text: state, colour: STATE_COLOURS[state] };
}

function latencyOf({ connectMs, responseMs, failure }: NodeProbe): string {
  // Without an answer, the time to connect says nothing about the node.
  const ms = responseMs ?? (failure ? undefined : connectMs);
  if (ms === undefined) return "-";
  return `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;
}

/** Returns the value at a key of a node's answer, such as `queue.length`. */
function answerText(status: NodeProbe["status"], key: string): string {
  const value = valueAt(status, key.split("."));
  if (value === undefined || value === null || value === "") return "-";

  const text = typeof value === "string" ? value : toJson(value);
  return text.slice(0, VALUE_LENGTH);
}

function valueAt(document: unknown, path: readonly string[]): unknown {
  let value = document;
  for (const key of path) {
    if (typeof value !== "object" || value === null) return undefined;
    if (!Object.hasOwn(value, key)) return undefined;
    value = (value as Record<string, unknown>)[key];
  }
  return value;
}

/** The nodes that have the same state for the same reason. */
interface Outcome {
  readonly cells: readonly Cell[];
  readonly names: string;
}

const OUTCOME_COLUMNS: readonly Column[] = [
  { title: "NODES", align: "right" },
  { title: "STATE" },
  { title: "REASON", least: 14 },
];

/** The width that the columns before NAMES need at least, with the gaps. */
const WIDTH_BEFORE_NAMES = 36;

/**
 * Draws one row per outcome. Names are never cut, so they can be pasted back as
 * NODE arguments.
 */
function outcomeTable(io: Io, probes: readonly NodeProbe[]): string {
  const outcomes = gatherOutcomes(probes);
  const widths = outcomes.map(({ names }) => textWidth(escapeText(names)));
  const needed = WIDTH_BEFORE_NAMES + Math.max(...widths);

  const isNarrow = io.isTerminal && needed > io.size().columns;
  if (isNarrow) return tableWithNamesBelow(io, outcomes);

  const columns = [...OUTCOME_COLUMNS, { title: "NAMES" }];
  const rows = outcomes.map(({ cells, names }) => [...cells, names]);
  return table(columns, rows, { io });
}

function gatherOutcomes(probes: readonly NodeProbe[]): Outcome[] {
  const groups = Map.groupBy(
    probes,
    ({ state, failure }) => `${state} ${reasonOf(failure)}`,
  );

  return [...groups.values()].map((group) => {
    const { state, failure } = group[0]!;
    const count = String(group.length);
    const cells = [count, stateCell(state), reasonOf(failure) || "-"];
    return { cells, names: foldNodes(group.map(nodeOf)) };
  });
}

/** Puts the names below their row, unbroken so that they can be copied. */
function tableWithNamesBelow(io: Io, outcomes: readonly Outcome[]): string {
  const rows = outcomes.map(({ cells }) => cells);
  const [header, ...lines] = table(OUTCOME_COLUMNS, rows, { io }).split("\n");
  const indent = " ".repeat("NODES  ".length);

  let text = `${header}\n`;
  for (const [index, { names }] of outcomes.entries()) {
    text += `${lines[index]}\n${indent}${escapeText(names)}\n`;
  }
  return text;
}

// --- status --watch ---

/** A node whose state has changed, or that is no longer watched. */
interface Change {
  readonly probe: NodeProbe;
  readonly previous: NodeState | undefined;
  readonly state: NodeState | "removed" | "inactive";
}

/** The latest probe of a node, and when the node entered its state. */
interface Seen {
  readonly probe: NodeProbe;
  readonly sinceMs: number;
}

const REDRAW_MS = 200;

/**
 * Checks the nodes until a signal comes, and follows edits of the inventory.
 *
 * A terminal shows one table that is redrawn in place; a pipe gets only the
 * changes.
 */
class Watch {
  readonly #call: Call;
  readonly #intervalMs: number;
  readonly #isLive: boolean;
  readonly #seen = new Map<string, Seen>();
  #nodes: readonly ClusterNode[];
  #inventory: Inventory;
  /** What is wrong with the edited inventory; the last valid one is used. */
  #trouble: string | undefined;
  /**
   * True once a check has been permitted. Until then, no change is printed, so
   * that a missing flag is one error, not one line per node.
   */
  #isPermitted = false;
  #changes: Change[] = [];

  constructor(call: Call, nodes: readonly ClusterNode[]) {
    const { io, flags } = call;
    this.#call = call;
    this.#nodes = nodes;
    this.#inventory = call.inventory;
    this.#intervalMs = flags.interval ?? DEFAULTS.watchIntervalMs;
    this.#isLive = io.isTerminal && io.hasCursor && !flags.json && !flags.quiet;
  }

  /** Watches until the signal aborts, then throws its reason. */
  async run(): Promise<never> {
    const { io, signal } = this.#call;
    const failed = new AbortController();
    const over = AbortSignal.any([signal, failed.signal]);

    try {
      await Promise.all([this.#watch(over), this.#redraw(over)]);
    } finally {
      // If one of the two throws, the other has to end, too.
      failed.abort();
      // Ends the line on which the terminal echoes ^C.
      if (this.#isLive) await io.out("\n");
    }
    throw signal.reason;
  }

  /** Checks the nodes, and starts again whenever the inventory is edited. */
  async #watch(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      // An edit ends the round, and with it the checks of the old nodes.
      const edited = new AbortController();
      const roundOver = AbortSignal.any([signal, edited.signal]);
      const edit = this.#nextInventory(roundOver)
        .finally(() => edited.abort());

      const [next] = await Promise.all([edit, this.#checkNodes(roundOver)]);
      if (next) await this.#follow(next);
    }
  }

  async #checkNodes(signal: AbortSignal): Promise<void> {
    const intervalMs = this.#intervalMs;
    const options = { ...sweepOptions(this.#call), intervalMs, signal };

    for await (const probe of watchNodes(this.#nodes, options)) {
      await this.#note(probe);
    }
  }

  /** Waits until the inventory has changed and is valid. */
  async #nextInventory(signal: AbortSignal): Promise<Inventory | undefined> {
    while (await pause(this.#intervalMs, signal)) {
      const next = await this.#readAgain(signal);
      if (next) return next;
    }
  }

  /** Reads the inventory again; `undefined` if it is unchanged or invalid. */
  async #readAgain(signal: AbortSignal): Promise<Inventory | undefined> {
    const { text, exists, origin } = this.#inventory;
    // stdin can be read only once.
    if (this.#call.flags.config === "-") return undefined;

    try {
      const source = await readInventory({ ...this.#call, signal });
      const isSame = source.text === text && source.exists === exists;
      if (isSame) {
        this.#trouble = undefined;
        return undefined;
      }

      const next = await parseInventory(source);
      if (next.nodes.length > 0) return next;

      const fault = source.exists ? "has no hosts" : "does not exist";
      await this.#reportTrouble(`${origin} ${fault}`);
    } catch (error) {
      if (!signal.aborted) await this.#reportTrouble(messageOf(error));
    }
    return undefined;
  }

  /** Says once that the last valid inventory stays in use, and why. */
  async #reportTrouble(trouble: string): Promise<void> {
    const isNew = trouble !== this.#trouble;
    this.#trouble = trouble;

    if (isNew && !this.#isLive) {
      const kept = "the last valid inventory stays in use";
      await warn(this.#call.io, `${trouble}; ${kept}`);
    }
  }

  /** Continues with the nodes of an edited inventory. */
  async #follow(inventory: Inventory): Promise<void> {
    const before = this.#nodes;
    this.#inventory = inventory;
    this.#trouble = undefined;
    this.#nodes = this.#selectAgain(inventory.nodes);

    const names = new Set(this.#nodes.map(nameOf));
    const gone = before.filter(({ name }) => !names.has(name));
    for (const { name } of gone) this.#forget(name);
    await this.#printChanges();
  }

  #selectAgain(nodes: readonly ClusterNode[]): readonly ClusterNode[] {
    try {
      return selectNodes(nodes, selectionOf(this.#call));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;

      // A pattern no longer matches: keep the watched nodes that still exist.
      const watched = new Set(this.#nodes.map(nameOf));
      return nodes.filter(({ name }) => watched.has(name));
    }
  }

  /** Forgets a node that is no longer watched, and records that change. */
  #forget(name: string): void {
    const seen = this.#seen.get(name);
    if (!seen) return;

    const isInactive = this.#inventory.nodes.some((node) =>
      node.name === name && !node.isActive
    );
    this.#seen.delete(name);
    this.#changes.push({
      probe: { ...seen.probe, failure: undefined },
      previous: seen.probe.state,
      state: isInactive ? "inactive" : "removed",
    });
  }

  /** Records a probe, and prints it if the node's state has changed. */
  async #note(probe: NodeProbe): Promise<void> {
    const { node: { name }, state } = probe;
    const seen = this.#seen.get(name);

    if (seen?.probe.state === state) {
      this.#seen.set(name, { ...seen, probe });
    } else {
      this.#seen.set(name, { probe, sinceMs: performance.now() });
      this.#changes.push({ probe, previous: seen?.probe.state, state });
    }

    this.#isPermitted ||= !isDenied(probe);
    if (!this.#isPermitted) this.#requirePermission();
    await this.#printChanges();
  }

  /** Throws once every node is known, if none of them may be checked. */
  #requirePermission(): void {
    if (this.#seen.size < this.#nodes.length) return;

    const probes = [...this.#seen.values()].map(({ probe }) => probe);
    throw new Error(deniedMessage(probes));
  }

  async #printChanges(): Promise<void> {
    if (!this.#isPermitted) return;

    const changes = this.#changes;
    this.#changes = [];
    if (this.#isLive) return;

    for (const change of changes) {
      if (this.#isAskedFor(change)) await this.#print(change);
    }
  }

  #isAskedFor({ previous, state }: Change): boolean {
    const { only, quiet, json } = this.#call.flags;
    const states: readonly unknown[] = [previous, state];

    if (only && !only.some((it) => states.includes(it))) return false;
    if (!quiet || json) return true;
    return STATES.some((it) => it !== "up" && states.includes(it));
  }

  async #print({ probe, previous, state }: Change): Promise<void> {
    const { io, flags } = this.#call;
    const time = new Date().toISOString();

    if (flags.json) {
      const head = {
        ...jsonHead({ flags, inventory: this.#inventory }),
        time,
        previous: previous ?? null,
      };
      await io.out(`${toJson({ ...head, ...probeJson(probe), state })}\n`);
      return;
    }

    const reason = reasonOf(probe.failure);
    const from = previous ? `${previous} -> ` : "";
    const why = reason ? ` (${reason})` : "";
    const text = `${probe.node.name}: ${from}${state}${why}`;
    await io.out(`${time} ${escapeText(text)}\n`);
  }

  async #redraw(signal: AbortSignal): Promise<void> {
    if (!this.#isLive) return;

    while (await pause(REDRAW_MS, signal)) {
      await this.#call.io.out(this.#frame());
    }
  }

  #frame(): string {
    const { rows, columns } = this.#call.io.size();
    // After a full line, `\x1b[K` would erase the last character.
    const width = columns - 1;
    const probes = this.#nodes.flatMap(({ name }) =>
      this.#seen.get(name)?.probe ?? []
    );

    const head = this.#head(probes, width);
    // Minus the table's titles, and the line that the cursor ends up on.
    const room = Math.max(1, rows - head.length - 2);
    const body = this.#body(probes, { width, room });
    return drawInPlace([...head, ...body].join("\n"));
  }

  /** Returns the lines above the table. */
  #head(probes: readonly NodeProbe[], width: number): string[] {
    const clock = new Date().toTimeString().slice(0, 8);
    const counts = summaryOf(probes, this.#nodes.length);
    const interval = typedDuration(this.#intervalMs);
    const about = `every ${interval}, Ctrl-C ends, ${this.#sourceText()}`;

    const line = (text: string, colour = 0) =>
      paint(this.#call.io, colour, clip(escapeText(text), width));
    const lines = [line(`${clock}  ${counts}`), line(about, FAINT)];

    if (this.#trouble) {
      const [first = ""] = this.#trouble.split("\n");
      lines.push(line(first, RED));
    }
    return lines;
  }

  #sourceText(): string {
    const { origin, isFallback } = this.#inventory;
    if (isFallback) return "RINGRIFT_COORDINATOR_IP";
    return this.#trouble ? `the last valid ${origin}` : origin;
  }

  /** Returns the table, problems first, and a count of what does not fit. */
  #body(
    probes: readonly NodeProbe[],
    { width, room }: { readonly width: number; readonly room: number },
  ): string[] {
    const { io, flags } = this.#call;
    const asked = probes.filter((probe) => isShown(flags, probe));
    const sorted = problemsFirst(asked);
    const isFitting = sorted.length <= room;
    const fitting = isFitting ? sorted : sorted.slice(0, room - 1);
    const rest = sorted.slice(fitting.length);

    const since: Column = { title: "SINCE", align: "right", drop: 7 };
    const columns = [since, ...statusColumns(flags)];
    const rows = fitting.map((probe) => [
      this.#sinceText(probe),
      ...statusRow(this.#call, probe),
    ]);

    const lines = [table(columns, rows, { io, width }).trimEnd()];
    if (rest.length > 0) {
      const more = `… ${rest.length} more: ${listStates(rest)}`;
      lines.push(clip(more, width));
    }
    return lines;
  }

  #sinceText({ node }: NodeProbe): string {
    const { sinceMs } = this.#seen.get(node.name)!;
    return elapsed(sinceMs);
  }
}

/** Waits; returns false if the signal cuts it short. */
async function pause(ms: number, signal: AbortSignal): Promise<boolean> {
  try {
    await delay(ms, { signal });
    return true;
  } catch {
    return false;
  }
}

/** Returns `2 down, 31 up`. */
function listStates(probes: readonly NodeProbe[]): string {
  const counts = Object.entries(countStates(probes));
  const present = counts.filter(([, count]) => count > 0);
  return present.map(([state, count]) => `${count} ${state}`).join(", ");
}

/** Draws over the last frame line by line: clearing it first would flicker. */
function drawInPlace(text: string): string {
  const start = "\x1b[?7l\x1b[H";
  const end = "\x1b[K\n\x1b[J\x1b[?7h";
  return start + text.replaceAll("\n", "\x1b[K\n") + end;
}

// --- nodes ---

const NODES: Command = {
  name: "nodes",
  summary: "list what is configured",
  usage: "[NODE...] [options]",
  options: [...SELECTION, "names", ...COMMON],
  help: { quiet: "print no summary" },
  notes: "Exit code 0: listed; 2: no node is selected.",
  examples: [
    "cluster-hosts nodes --gpu H100 --names",
    "cluster-hosts nodes --all --json | jq -r '.nodes[].name'",
  ],
  takesNodes: true,
  inventory: "required",
  run: runNodes,
};

const NODE_COLUMNS: readonly Column[] = [
  { title: "NAME", least: 10 },
  { title: "ROLE", drop: 6 },
  { title: "STATUS", least: 9 },
  { title: "GPU", drop: 5 },
  { title: "MEMORY", drop: 2, align: "right" },
  { title: "CPUS", drop: 1, align: "right" },
  { title: "ADDRESSES", drop: 7 },
  { title: "DATA", drop: 4 },
  { title: "SSH", drop: 3 },
  { title: "NOTE", least: 12, dropsIfEmpty: true },
];

async function runNodes(call: Call): Promise<number> {
  const { flags, io } = call;
  const nodes = select(call);

  if (flags.json) {
    const items = nodes.map(nodeJson);
    await io.out(jsonDocument(call, { key: "nodes", items }));
    return 0;
  }
  if (flags.names) {
    await io.out(linesOf(nodes.map(nameOf)));
    return 0;
  }

  await io.out(table(NODE_COLUMNS, nodes.map(nodeRow), { io }));
  if (!flags.quiet) await printSummary(io, [nodesSummary(call, nodes)]);
  return 0;
}

/** Returns `3 of 9 nodes (--all: 1 inactive), config/hosts.yaml`. */
function nodesSummary(
  { flags, inventory }: Call,
  shown: readonly ClusterNode[],
): string {
  const { nodes, origin } = inventory;
  const listed = new Set(shown);
  const inactive = nodes.filter((node) => !node.isActive && !listed.has(node));
  const hasMore = inactive.length > 0 && !flags.all;
  const more = hasMore ? ` (--all: ${inactive.length} inactive)` : "";
  return `${shown.length} of ${nodes.length} nodes${more}, ${origin}`;
}

function nodeRow(node: ClusterNode): Cell[] {
  const status = node.isActive
    ? node.status
    : { text: node.status, colour: FAINT };
  return [
    node.name,
    node.role,
    status,
    node.gpu || "-",
    node.memoryGb ? `${node.memoryGb} GB` : "-",
    node.cpus ? String(node.cpus) : "-",
    node.addresses.join(", ") || "-",
    node.dataServerUrl ?? String(node.dataServerPort),
    `${node.sshUser}:${node.sshPort}`,
    // A note may have several lines, but a row has one.
    node.note?.replace(/\s+/g, " ") ?? "",
  ];
}

const FIELD_NAMES = Object.keys(HOST_FIELDS) as (keyof typeof HOST_FIELDS)[];
const FIELD_KEYS = new Set<string>(
  Object.values(HOST_FIELDS).map(({ key }) => key),
);

/** Returns every field, null if it is unset, then the custom keys. */
function nodeJson(node: ClusterNode): Record<string, unknown> {
  const { entry, ...fields } = node;
  const { bestIp = null, addresses, dataServerBaseUrl = null, isActive } = node;
  const known: Record<string, unknown> = {
    ...fields,
    bestIp,
    addresses,
    dataServerBaseUrl,
    isActive,
  };
  for (const field of FIELD_NAMES) known[field] ??= null;

  const own = Object.keys(entry)
    .filter((key) => !FIELD_KEYS.has(key) && !Object.hasOwn(known, key))
    .map((key) => [key, entry[key]]);
  return { ...known, ...Object.fromEntries(own) };
}

// --- coordinator ---

const COORDINATOR: Command = {
  name: "coordinator",
  summary: "print HOST:PORT of the Elo database",
  usage: "[options]",
  options: ["config", ...COMMON],
  help: { quiet: "has no effect here" },
  notes:
    "Uses the node that elo_sync.coordinator names, else $RINGRIFT_COORDINATOR_IP.\n" +
    "Exit code 0: printed; 2: there is none.",
  examples: [
    "cluster-hosts coordinator",
    "cluster-hosts coordinator --config https://example.com/hosts.yaml",
  ],
  takesNodes: false,
  inventory: "fallback",
  run: runCoordinator,
  needs: coordinatorNeeds,
};

async function runCoordinator(call: Call): Promise<number> {
  const { flags, io, inventory } = call;
  const found = await getCoordinatorAddress(inventory.config);
  if (!found) throw new Error(await missingCoordinator(inventory));

  const { hostname: address, port } = found;
  const text = flags.json
    ? toJson({ ...jsonHead(call), address, port })
    : escapeText(hostPort(address, port));
  await io.out(`${text}\n`);
  return 0;
}

async function coordinatorNeeds({ inventory }: Call): Promise<Needs> {
  const node = await getCoordinatorNode(inventory.config);
  const isInFile = node?.bestIp !== undefined && !inventory.isFallback;
  return { env: isInFile ? [] : ["RINGRIFT_COORDINATOR_IP"] };
}

/**
 * Returns the variable's name, with the `--allow-env` flag if that is missing.
 */
function hintVariable(variable: string): string {
  const { state } = Deno.permissions.querySync({ name: "env", variable });
  if (state === "granted") return variable;
  return `${variable} (needs --allow-env=${variable})`;
}

/** Says why the coordinator has no address, and how to fix that. */
async function missingCoordinator(
  { config, nodes, origin }: Inventory,
): Promise<string> {
  const { coordinator } = await getEloSyncConfig(config);
  const configured = config.elo_sync?.coordinator;
  // A blank one counts as unset: the library then uses its default.
  const isSet = configured !== undefined &&
    String(configured).trim() === coordinator;
  const isThere = nodes.some(({ name }) => name === coordinator);

  const or = `or set ${hintVariable("RINGRIFT_COORDINATOR_IP")}`;
  if (isThere) {
    return `No coordinator: "${coordinator}" has no address in ${origin}: ` +
      `set its tailscale_ip or ssh_host, ${or}`;
  }
  if (!isSet) {
    return `No coordinator: elo_sync.coordinator is not set in ${origin}: ` +
      `set it to the name of a node, ${or}`;
  }
  return `No coordinator: elo_sync.coordinator is "${coordinator}", which is ` +
    `not in hosts of ${origin}: name another node, ${or}`;
}

// --- urls ---

const URLS: Command = {
  name: "urls",
  summary: "print the URLs to pull data from, one per line",
  usage: "elo|data|models [NODE...] [options]",
  kinds: ["elo", "data", "models"],
  kindsReplacedBy: ["port", "path"],
  options: [
    ...SELECTION,
    ...SWEEP,
    "path",
    "include-self",
    "unchecked",
    ...COMMON,
  ],
  help: {
    path: "path of the URLs (default: elo /db, models /models)",
    port: `use this port (default: elo sync_port, models ${MODEL_SYNC_PORT})`,
    quiet: "print no summary, unless some did not answer",
  },
  notes:
    "With --port or --path, the kind may be left out. Nodes are checked at their\n" +
    "status path, on the same port. Exit code 0: there is a URL; 1: there is none.",
  examples: [
    "cluster-hosts urls elo | aria2c -i -",
    "cluster-hosts urls --port 9000 --path /games 'gpu-*'",
  ],
  takesNodes: true,
  inventory: "required",
  check({ kind, flags }) {
    const isOther = flags.port !== undefined || flags.path !== undefined;
    if (kind === "data" && isOther) {
      return "urls data takes each node's own port and URL: leave out data, " +
        "or --port and --path";
    }
    if (kind !== "data" && flags["include-self"]) {
      return "--include-self requires urls data: the others include this host";
    }
    return undefined;
  },
  run: runUrls,
  needs: urlsNeeds,
};

async function runUrls(call: Call): Promise<number> {
  const { flags, io } = call;
  // Throws on a bad selection before anything is checked or printed.
  const nodes = select(call);
  const { urls, probes } = await findUrls(call);

  if (flags.json) {
    await io.out(jsonDocument(call, { key: "urls", items: urls }));
  } else {
    await io.out(linesOf(urls));
  }

  const hasGap = probes.some(isProblem);
  const isSummarized = !flags.json && (!flags.quiet || hasGap);
  if (isSummarized) {
    const summary = flags.unchecked
      ? uncheckedSummary(call, urls)
      : await answeredSummary(call, { nodes, probes });
    await warn(io, `${summary}, ${call.inventory.origin}`);
  }
  return urls.length > 0 ? 0 : 1;
}

/** Finds the URLs, and the probes that were made to find them. */
async function findUrls(
  call: Call,
): Promise<{ urls: string[]; probes: NodeProbe[] }> {
  const { kind, flags, inventory } = call;
  const startedMs = performance.now();
  const probes: NodeProbe[] = [];
  using _line = liveLine(
    call,
    () => `checked ${plural(probes.length, "node")}, ${elapsed(startedMs)}`,
  );

  const { timeoutMs, concurrency, signal } = sweepOptions(call);
  const options = {
    source: inventory.config,
    selection: selectionOf(call),
    reachableOnly: !flags.unchecked,
    timeoutMs,
    concurrency,
    signal,
    onProbe(probe: NodeProbe) {
      probes.push(probe);
    },
  };

  if (kind === "data") {
    const excludeSelf = !flags["include-self"];
    return { urls: await getDataSyncUrls({ ...options, excludeSelf }), probes };
  }

  const port = await urlPort(call);
  const usualPath = kind === "models" ? "/models" : undefined;
  const path = flags.path ?? usualPath;
  return { urls: await getSyncUrls({ ...options, port, path }), probes };
}

/** Returns the port of the URLs; `undefined` is each data server's own. */
async function urlPort(
  { kind, flags, inventory }: Call,
): Promise<number | undefined> {
  if (flags.port !== undefined) return flags.port;

  switch (kind) {
    case "elo":
      return (await getEloSyncConfig(inventory.config)).syncPort;
    case "models":
      return MODEL_SYNC_PORT;
    case "data":
      return undefined;
    default:
      return DATA_SYNC_PORT;
  }
}

function uncheckedSummary(
  { kind, flags }: Call,
  urls: readonly string[],
): string {
  const summary = `${plural(urls.length, "URL")}, not checked`;
  const isSelf = kind === "data" && !flags["include-self"] && urls.length === 0;
  return isSelf
    ? `${summary}, all skipped as this host (--include-self)`
    : summary;
}

/** Says how many nodes answered, and which command shows the others. */
async function answeredSummary(
  call: Call,
  { nodes, probes }: {
    readonly nodes: readonly ClusterNode[];
    readonly probes: readonly NodeProbe[];
  },
): Promise<string> {
  const failed = probes.filter(isProblem);
  const answered = probes.length - failed.length;
  // Every node but this host has been checked.
  const ownCount = nodes.length - probes.length;
  let summary = `${answered} of ${probes.length} nodes answered`;

  if (failed.length > 0) {
    const line = await statusLine(call);
    summary += ` (${countReasons(failed)}; ${line} shows which)`;
  }
  if (ownCount > 0) {
    summary += `, ${ownCount} skipped as this host (--include-self)`;
  }
  return summary;
}

/** Returns the command line that repeats the checks of `urls`. */
async function statusLine(call: Call): Promise<string> {
  const { flags, words, inventory } = call;
  const line = ["cluster-hosts", "status", ...words];

  if (flags.config !== undefined) {
    // Not as it was given: a URL may contain a password.
    line.push("-c", flags.config === "-" ? "-" : inventory.origin);
  }
  for (const name of FILTERS) {
    for (const value of flags[name] ?? []) {
      const text = typeof value === "string" ? value : value.join("=");
      line.push(`--${name}=${text}`);
    }
  }
  if (flags.all) line.push("--all");

  const port = await urlPort(call);
  if (port !== undefined) line.push("--port", String(port));
  return line.map(shellQuote).join(" ");
}

async function urlsNeeds(call: Call): Promise<Needs> {
  const { kind, flags, inventory } = call;
  const port = await urlPort(call);
  const nodes = flags.unchecked ? [] : select(call);
  const endpoints = nodes.map((node) => dataEndpoints(node, port));

  const isForSelfToo = kind !== "data" || flags["include-self"];
  if (isForSelfToo) return { net: endpoints.flat() };

  // The library leaves out this host, and returns only the URLs of the others.
  const others = await getDataSyncUrls({
    source: inventory.config,
    selection: selectionOf(call),
    reachableOnly: false,
  });
  const net = endpoints.filter(([first]) =>
    first !== undefined && others.includes(endpointUrl(first))
  );
  return {
    net: net.flat(),
    env: ["RINGRIFT_NODE_ID"],
    sys: ["hostname", "networkInterfaces"],
  };
}

// --- wait ---

const WAIT: Command = {
  name: "wait",
  summary: "wait until the nodes are up, or time runs out",
  usage: "[NODE...] [options]",
  options: [
    ...SELECTION,
    ...SWEEP,
    "interval",
    "min-up",
    "down",
    "tcp",
    "ssh",
    "path",
    ...COMMON,
  ],
  help: {
    timeout: "how long to wait in all " +
      `(default: ${typedDuration(DEFAULTS.waitDeadlineMs)})`,
    interval: "time between checks of a node " +
      `(default: ${typedDuration(DEFAULTS.waitIntervalMs)})`,
    quiet: "print only what is still missing",
  },
  notes:
    "Exit code 0: every selected node is up, or --min-up of them (--down: none is);\n" +
    "1: time ran out, or too many nodes have no address; 2: some could not be\n" +
    "checked (immediately, if net permission is missing for too many nodes).",
  examples: [
    "cluster-hosts wait --timeout 10m",
    "cluster-hosts wait 'gpu-*' --min-up 75% --ssh",
    "cluster-hosts wait --ssh --down gpu-1 && cluster-hosts wait --ssh gpu-1",
  ],
  takesNodes: true,
  inventory: "required",
  run: runWait,
  needs: checkNeeds,
};

/** The progress of a wait. */
interface Waited {
  readonly nodes: readonly ClusterNode[];
  /** How many of the nodes have to reach the wanted state. */
  readonly needed: number;
  /** The last result of each node that has one. */
  readonly last: ReadonlyMap<ClusterNode, NodeProbe>;
  readonly startedMs: number;
}

async function runWait(call: Call): Promise<number> {
  const { flags, io } = call;
  const nodes = select(call);
  const needed = flags.down ? nodes.length : minUpOf(call, nodes);
  const startedMs = performance.now();
  const last = new Map<ClusterNode, NodeProbe>();
  const note = (probe: NodeProbe) => {
    last.set(probe.node, probe);
  };

  const waited = { nodes, needed, last, startedMs };
  const wait = async () => {
    using line = liveLine(call, () => waitingText(call, waited));
    const announce = announcer(call, { line, startedMs });
    const probes = await waitForNodes(nodes, {
      ...sweepOptions(call),
      // --timeout limits the whole wait, not each check.
      timeoutMs: undefined,
      deadlineMs: flags.timeout,
      intervalMs: flags.interval,
      until: flags.down ? "down" : "up",
      minUp: flags.down ? undefined : needed,
      async onProbe(probe) {
        note(probe);
        await announce(probe);
      },
    });
    // Nodes without an address are never probed: they appear only in the final
    // result.
    probes.forEach(note);
  };
  const interrupt = await untilInterrupted(wait());

  await printWaited(call, waited);
  const probes = [...last.values()];
  const isEnough = countReached(call, waited) >= needed;
  const denied = deniedMessage(probes);
  if (denied && !isEnough) await warn(io, denied);

  if (interrupt) throw interrupt;
  if (cannotSucceed(call, waited)) return 1;
  return exitCodeOf(probes, isEnough);
}

/** Makes a function that names nodes as they first reach the wanted state. */
function announcer(
  { io, flags }: Call,
  { line, startedMs }: { line: { hide(): void }; startedMs: number },
): (probe: NodeProbe) => Promise<void> {
  const announced = new Set<ClusterNode>();

  return async (probe) => {
    const { node, state } = probe;
    const isNews = isReached(flags, probe) && !announced.has(node);
    if (!isNews || flags.quiet || flags.json) return;

    announced.add(node);
    line.hide();
    const name = escapeText(node.name);
    await io.out(`${name} ${state} after ${seconds(startedMs)}\n`);
  };
}

async function printWaited(call: Call, waited: Waited): Promise<void> {
  const { flags, io, inventory } = call;
  const { nodes, needed, last, startedMs } = waited;
  if (flags.json) {
    await io.out(waitedJson(call, waited));
    return;
  }
  if (cannotSucceed(call, waited)) {
    await warn(io, notWaitingText(waited));
    return;
  }

  const reached = countReached(call, waited);
  const time = seconds(startedMs);
  if (!flags.quiet) {
    const goal = flags.down ? "down" : "up";
    const counts = `${reached} of ${nodes.length} nodes ${goal} after ${time}`;
    await warn(io, `${counts}, ${inventory.origin}`);

    const shared = sharedNote(call, [...last.values()]);
    if (shared && !flags.down) await warn(io, shared);
  }

  if (reached < needed) {
    const still = flags.down ? "Still not down" : "Still missing";
    await warn(io, `${still} after ${time}: ${missingText(call, waited)}`);
  }
}

function waitedJson(call: Call, { nodes, last, startedMs }: Waited): string {
  const { flags } = call;
  const reached = nodes.filter((node) => isReached(flags, last.get(node)));
  const missing = nodes.filter((node) => !isReached(flags, last.get(node)));
  const items = missing.map((node) => {
    const { state = null, failure = null } = last.get(node) ?? {};
    return { name: node.name, state, failure };
  });

  const goal = flags.down ? "down" : "up";
  const waitedMs = Math.round(performance.now() - startedMs);
  const head = { waitedMs, [goal]: reached.map(nameOf) };
  return jsonDocument(call, { head, key: "missing", items });
}

/** True if the node is in the wanted state. */
function isReached({ down }: Flags, probe: NodeProbe | undefined): boolean {
  const state = probe?.state;
  if (down) return state === "down" || state === "unhealthy";
  return state === "up";
}

function countReached({ flags }: Call, { nodes, last }: Waited): number {
  return nodes.filter((node) => isReached(flags, last.get(node))).length;
}

/** True if the nodes that have an address are too few to succeed. */
function cannotSucceed({ flags }: Call, waited: Waited): boolean {
  const { nodes, needed } = waited;
  return !flags.down &&
    nodes.length - nodesWithoutAddress(waited).length < needed;
}

function notWaitingText(waited: Waited): string {
  const { nodes, needed, last } = waited;
  const without = nodesWithoutAddress(waited);
  const most = nodes.length - without.length;
  const names = foldNodes(without);
  const reason = reasonOf(last.get(without[0]!)?.failure);
  return `Not waiting: at most ${most} of ${nodes.length} nodes can be up, ` +
    `and ${needed} have to be; ${names}: ${reason}`;
}

function nodesWithoutAddress({ nodes, last }: Waited): ClusterNode[] {
  return nodes.filter((node) => last.get(node)?.failure?.code === "no-address");
}

function waitingText(call: Call, waited: Waited): string {
  const missing = missingText(call, waited);
  return `waiting, ${elapsed(waited.startedMs)}, for ${missing}`;
}

/** Returns `gpu-[1-2000] (refused), head (timeout)`. */
function missingText({ flags }: Call, { nodes, last }: Waited): string {
  const missing = nodes.filter((node) => !isReached(flags, last.get(node)));
  const groups = Map.groupBy(missing, (node) => {
    const probe = last.get(node);
    return probe?.failure?.code ?? probe?.state ?? "no answer yet";
  });
  const texts = [...groups].map(([reason, group]) =>
    `${foldNodes(group)} (${reason})`
  );
  return texts.join(", ");
}

// --- ssh ---

const SSH: Command = {
  name: "ssh",
  summary: "run a command on many nodes at once, or log in to one",
  usage: "NODE... [options] [-- COMMAND]",
  options: [
    ...SELECTION,
    "user",
    "ssh-option",
    "connect-timeout",
    "timeout",
    "concurrency",
    "gather",
    "cd",
    "stdin",
    "dry-run",
    ...COMMON,
  ],
  help: {
    timeout: "end each command after this time (default: never)",
    concurrency:
      `how many nodes at once (default: ${DEFAULTS.commandConcurrency})`,
    gather: "print each distinct output once, when all have ended",
    quiet: "print outputs and failures only",
  },
  notes:
    "Needs a NODE, or --role, --gpu, --status or --where; '*' is every active node.\n" +
    "Without a command, it logs in to one NODE, and returns the exit code of ssh.\n" +
    "Ctrl-C and --timeout end the local ssh; the remote command may keep running.\n" +
    "Exit code 0: the command returned 0 on every node; 1: it did not.",
  examples: [
    "cluster-hosts ssh 'gpu-*' --gather -- nvidia-smi -L",
    "cluster-hosts ssh gpu-1 --stdin -- bash < setup.sh",
  ],
  takesNodes: true,
  takesRemote: true,
  inventory: "required",

  check(request) {
    const { remote, flags } = request;

    const target = targetProblem(request);
    if (target) return target;

    return remote ? commandProblem(remote, flags) : loginProblem(request);
  },

  needs(call) {
    const options = sshOptions(call);
    const net = select(call).flatMap((node) =>
      racedSshEndpoints(node, options)
    );

    return { run: ["ssh"], net };
  },

  async run(call) {
    const { flags, remote } = call;
    const nodes = select(call);

    if (!remote) return await login(call, nodes);
    if (flags["dry-run"]) return await printCommands(call, nodes);
    return await runCommand(call, nodes);
  },
};

const COMMAND_HINT =
  'put the command after "--": cluster-hosts ssh gpu-1 -- uptime';

function sshOptions({ flags }: Call): SshOptions {
  return {
    user: flags.user,
    connectTimeoutMs: flags["connect-timeout"],
    options: flags["ssh-option"],
  };
}

/** Requires a NODE or a filter: an empty $(...) must not mean every node. */
function targetProblem({ words, flags }: Invocation): string | undefined {
  const { role, gpu, status, where } = flags;
  const isSelecting = role || gpu || status || where;
  if (words.length > 0 || isSelecting) return undefined;

  return "ssh needs a NODE, or --role, --gpu, --status or --where; " +
    "'*' is every active node";
}

function commandProblem(
  remote: readonly string[],
  { stdin }: Flags,
): string | undefined {
  const command = remote.join(" ").trim();

  if (command === "") return `No command given; ${COMMAND_HINT}`;
  if (stdin || !isBareShell(command)) return undefined;

  return `"${command}" alone runs nothing: ` +
    "add --stdin, and give it the script on stdin";
}

/** Options that a login has no use for. */
const COMMAND_OPTIONS = [
  "gather",
  "json",
  "cd",
  "stdin",
  "dry-run",
  "timeout",
  "concurrency",
] as const satisfies OptionName[];

function loginProblem({ words, flags }: Invocation): string | undefined {
  // Without "--", the words of the command are read as NODEs.
  if (words.length > 1) return manyLogins(words.length);

  const misplaced = COMMAND_OPTIONS.find((name) => name in flags);
  if (!misplaced) return undefined;

  return `--${misplaced} requires a command; ${COMMAND_HINT}`;
}

function manyLogins(count: number): string {
  return `A login takes one NODE, not ${count}; ${COMMAND_HINT}`;
}

const SHELLS = ["sh", "bash", "dash", "ash", "ksh", "zsh"];

/** True if a command is a shell that reads its script from stdin. */
function isBareShell(command: string): boolean {
  const words = command.split(/\s+/);
  if (words[0] === "sudo") words.shift();

  const [path = "", ...args] = words;
  const isShell = SHELLS.includes(path.slice(path.lastIndexOf("/") + 1));
  if (!isShell) return false;

  const firstOperand = args.findIndex((arg) => !arg.startsWith("-"));
  const hasOperand = firstOperand >= 0;
  const options = hasOperand ? args.slice(0, firstOperand) : args;
  const hasLetter = (letter: string) =>
    options.some((option) => /^-\w+$/.test(option) && option.includes(letter));

  if (hasLetter("c")) return false;
  return hasLetter("s") || !hasOperand;
}

/** Returns the command for one node; `--cd` runs it in `ringrift_path`. */
function commandFor(
  { flags, remote = [] }: Call,
  node: ClusterNode,
): readonly string[] {
  return flags.cd ? inFolder(node, remote) : remote;
}

/**
 * Makes a command run in the node's `ringrift_path`. A tilde in that path is
 * left to the remote shell.
 */
function inFolder(
  { ringriftPath }: ClusterNode,
  remote: readonly string[],
): readonly string[] {
  const [home = ""] = /^~[\w.-]*(?:\/|$)/.exec(ringriftPath) ?? [];
  const rest = ringriftPath.slice(home.length);
  const folder = rest === "" ? home : home + shellQuote(rest);

  // Without `eval`, the part after a `;` would run even if `cd` failed.
  const command = remote.join(" ");
  const isCompound = /[;&|\n#]/.test(command);
  const words = isCompound ? ["eval", shellQuote(command)] : remote;

  return ["cd", folder, "&&", ...words];
}

/** Hands the terminal to ssh itself, for a login on one node. */
async function login(
  call: Call,
  nodes: readonly ClusterNode[],
): Promise<number> {
  const { flags, signal } = call;
  const [node] = nodes;
  if (!node || nodes.length > 1) throw new Error(manyLogins(nodes.length));

  // ssh uses the first value of an option, so the user's options come first.
  const own = flags["ssh-option"] ?? [];
  const options = { ...sshOptions(call), options: [...own, "BatchMode=no"] };
  const endpoint = await findSshEndpoint(node, { ...options, signal });

  const child = spawnSsh(
    sshCommand(node, [], { ...options, endpoint }),
    { stdin: "inherit", stdout: "inherit", stderr: "inherit" },
  );
  const passOn = () => {
    try {
      if (signal.reason instanceof Interrupt) child.kill(signal.reason.signal);
    } catch {
      // It has ended already.
    }
  };

  signal.addEventListener("abort", passOn);
  const { code } = await child.status;
  signal.removeEventListener("abort", passOn);

  signal.throwIfAborted();
  return code;
}

/** Prints shell commands that do the same as a run, one per line. */
async function printCommands(
  call: Call,
  nodes: readonly ClusterNode[],
): Promise<number> {
  const { io, flags } = call;
  const { concurrency = DEFAULTS.commandConcurrency } = flags;
  const reachable = nodes.filter((node) => node.bestIp !== undefined);
  const missing = nodes.filter((node) => node.bestIp === undefined);

  for (let start = 0; start < reachable.length; start += concurrency) {
    const batch = reachable.slice(start, start + concurrency);
    const lines = await Promise.all(
      batch.map((node) => printableCommand(call, node)),
    );
    await io.out(lines.join(""));
  }

  if (missing.length > 0) {
    await warn(io, leftOut(missing));
    return 1;
  }
  return 0;
}

async function printableCommand(
  call: Call,
  node: ClusterNode,
): Promise<string> {
  const { flags, signal } = call;
  const options = sshOptions(call);
  const endpoint = await findSshEndpoint(node, { ...options, signal });

  const command = commandFor(call, node);
  const [ssh, ...args] = sshCommand(node, command, { ...options, endpoint });
  // Without -n, the first ssh would read the other lines from its stdin.
  const argv = flags.stdin ? [ssh, ...args] : [ssh, "-n", ...args];
  return `${argv.map(pasteable).join(" ")}\n`;
}

function leftOut(nodes: readonly ClusterNode[]): string {
  return `${foldNodes(nodes)}: left out (no address)`;
}

/** Quotes a word for bash, on one line and without control characters. */
function pasteable(word: string): string {
  const isPlain = escapeText(word) === word && !/[\t\n]/.test(word);
  if (isPlain) return shellQuote(word);

  return `$'${Array.from(word, ansiCharacter).join("")}'`;
}

/** Escapes a character for use between $' and '. */
function ansiCharacter(character: string): string {
  if (character === "\n") return "\\n";
  if (character === "\t") return "\\t";
  if (character === "\\" || character === "'") return `\\${character}`;
  if (escapeText(character) === character) return character;

  const code = character.codePointAt(0)!.toString(16);
  return `\\u${code.padStart(4, "0")}`;
}

async function runCommand(
  call: Call,
  nodes: readonly ClusterNode[],
): Promise<number> {
  const { flags, io, signal } = call;
  const stdin = flags.stdin ? await readStdin(call) : undefined;

  const started = performance.now();
  const known = new Map<ClusterNode, CommandResult>();
  const printer = new LinePrinter(io, () => line.hide());
  const line = liveLine(call, () => {
    if (printer.isMidLine) return "";

    const waiting = nodes.filter((node) => !known.has(node));
    return `${known.size} of ${nodes.length} done, ${elapsed(started)}, ` +
      `waiting for ${foldNodes(waiting)}`;
  });
  using banners = new BannerPrinter(printer);
  const view = viewOf(call, { printer, banners });

  const work = runOnNodes(nodes, (node) => commandFor(call, node), {
    ...sshOptions(call),
    timeoutMs: flags.timeout,
    concurrency: flags.concurrency,
    stdin,
    signal,
    onOutput: (node, stream, text) => view?.print(node, stream, text),
    onResult: async (result) => {
      known.set(result.node, result);
      await view?.end(result.node);
    },
  }).finally(() => line[Symbol.dispose]());
  const interrupt = await untilInterrupted(work);
  const results = nodes.flatMap((node) => known.get(node) ?? []);

  // Starts the results below the ^C that the terminal echoes.
  if (interrupt && io.isErrTerminal) await io.err("\n");
  if (flags.json) await io.out(resultsJson(call, results));
  if (flags.gather) await printGathered(call, results, { banners });
  await printCommandSummary(call, results, { total: nodes.length });

  if (interrupt) throw interrupt;
  return results.every(({ failure }) => !failure) ? 0 : 1;
}

function resultsJson(call: Call, results: readonly CommandResult[]): string {
  const items = results.map(({ node, failure, ...outcome }) => ({
    name: node.name,
    ...outcome,
    failure: failure ?? null,
  }));
  return jsonDocument(call, { key: "nodes", items });
}

type OutputStream = "stdout" | "stderr";

/** Shows what nodes write while their commands run. */
interface OutputView {
  print(
    node: ClusterNode,
    stream: OutputStream,
    text: string,
  ): Promise<void> | void;
  /** Shows the rest of a node's output once its command has ended. */
  end(node: ClusterNode): Promise<void> | void;
}

function viewOf(
  { flags, io }: Call,
  { printer, banners }: { printer: LinePrinter; banners: BannerPrinter },
): OutputView | undefined {
  const isLive = !flags.json && !flags.gather;

  if (isLive) return printer;
  if (io.isErrTerminal) return banners;
  return undefined;
}

/** The longest unfinished line that is buffered, in characters. */
const MAX_LINE_LENGTH = 1024 * 1024;

/** What a stream of a node has written since its last newline. */
interface OpenLine {
  /** The part that has not been printed yet. */
  rest: string;
  /** True if a part has been printed: the next part continues that line. */
  isBegun: boolean;
}

/**
 * Prints each line as soon as it is complete, under the name of its node.
 *
 * A line too long to buffer is printed in parts. Until it ends, the other nodes
 * have to wait, so that no line is torn, and memory does not grow.
 */
class LinePrinter implements OutputView {
  readonly #io: Io;
  readonly #beforeOutput: () => void;
  readonly #lines = new Map<ClusterNode, Record<OutputStream, OpenLine>>();
  #midLine: ClusterNode | undefined;
  #lineEnded = Promise.withResolvers<void>();

  constructor(io: Io, beforeOutput: () => void) {
    this.#io = io;
    this.#beforeOutput = beforeOutput;
  }

  /** True if the last line on the screen is incomplete. */
  get isMidLine(): boolean {
    return this.#midLine !== undefined;
  }

  async print(
    node: ClusterNode,
    stream: OutputStream,
    text: string,
  ): Promise<void> {
    const line = this.#linesOf(node)[stream];
    line.rest += text;

    const isReady = text.includes("\n") || line.rest.length > MAX_LINE_LENGTH;
    if (!isReady) return;

    while (this.#midLine !== undefined && this.#midLine !== node) {
      await this.#lineEnded.promise;
    }
    await this.#write(node, stream);
  }

  async end(node: ClusterNode): Promise<void> {
    const lines = this.#linesOf(node);

    for (const stream of ["stdout", "stderr"] as const) {
      const { rest, isBegun } = lines[stream];
      if (rest !== "" || isBegun) await this.print(node, stream, "\n");
    }
    this.#lines.delete(node);
  }

  async #write(node: ClusterNode, stream: OutputStream): Promise<void> {
    const lines = this.#linesOf(node);
    const line = lines[stream];
    const text = takePrintable(line);
    if (text === "") return;

    const prefix = `${escapeText(node.name)}: `;
    const isComplete = text.endsWith("\n");
    const body = isComplete ? text.slice(0, -1) : text;
    const prefixed = escapeLines(body).split("\n").join(`\n${prefix}`);
    const begin = line.isBegun ? "" : prefix;
    const end = isComplete ? "\n" : "";

    line.isBegun = !isComplete;
    const isMidLine = lines.stdout.isBegun || lines.stderr.isBegun;
    if (isMidLine) {
      this.#midLine = node;
    } else {
      this.#endLine();
    }

    this.#beforeOutput();
    const output = begin + prefixed + end;
    if (stream === "stdout") await this.#io.out(output);
    else await this.#io.err(output);
  }

  #endLine(): void {
    if (this.#midLine === undefined) return;

    this.#midLine = undefined;
    this.#lineEnded.resolve();
    this.#lineEnded = Promise.withResolvers();
  }

  #linesOf(node: ClusterNode): Record<OutputStream, OpenLine> {
    const known = this.#lines.get(node);
    if (known) return known;

    const lines = {
      stdout: { rest: "", isBegun: false },
      stderr: { rest: "", isBegun: false },
    };
    this.#lines.set(node, lines);
    return lines;
  }
}

/**
 * Takes the complete lines, and the unfinished one if it is too long to buffer.
 */
function takePrintable(line: OpenLine): string {
  let end = line.rest.lastIndexOf("\n") + 1;

  if (line.rest.length - end > MAX_LINE_LENGTH) {
    // A carriage return may be the first half of a line ending.
    const isHalf = line.rest.endsWith("\r");
    end = isHalf ? line.rest.length - 1 : line.rest.length;
  }

  const text = line.rest.slice(0, end);
  line.rest = line.rest.slice(end);
  return text;
}

/** How long stderr is held back, in milliseconds: the node may end by then. */
const BANNER_DELAY_MS = 1000;

/**
 * Prints stderr while outputs are collected: it may ask a person to act, as the
 * login URL of Tailscale does.
 *
 * If a node ends within `BANNER_DELAY_MS` of its first text on stderr, that
 * text appears only in the collected output: forty nodes that refuse at once
 * still make one line.
 */
class BannerPrinter implements OutputView, Disposable {
  readonly #printer: LinePrinter;
  readonly #waiting = new Map<ClusterNode, Banner>();
  readonly #shown = new Set<ClusterNode>();

  constructor(printer: LinePrinter) {
    this.#printer = printer;
  }

  /** True if some stderr of a node has already been printed. */
  hasShown(node: ClusterNode): boolean {
    return this.#shown.has(node);
  }

  async print(
    node: ClusterNode,
    stream: OutputStream,
    text: string,
  ): Promise<void> {
    if (stream === "stdout") return;
    if (this.#shown.has(node)) {
      return await this.#printer.print(node, stream, text);
    }

    const banner = this.#bannerOf(node);
    banner.text += text;
    if (banner.text.length > MAX_LINE_LENGTH) await this.#show(node);
  }

  async end(node: ClusterNode): Promise<void> {
    this.#forget(node);
    await this.#printer.end(node);
  }

  [Symbol.dispose](): void {
    for (const node of this.#waiting.keys()) this.#forget(node);
  }

  #bannerOf(node: ClusterNode): Banner {
    const known = this.#waiting.get(node);
    if (known) return known;

    // If stderr is closed, the next write reports it.
    const show = () => this.#show(node).catch(() => {});
    const banner = { text: "", timer: setTimeout(show, BANNER_DELAY_MS) };
    this.#waiting.set(node, banner);
    return banner;
  }

  async #show(node: ClusterNode): Promise<void> {
    const { text } = this.#bannerOf(node);

    this.#forget(node);
    this.#shown.add(node);
    await this.#printer.print(node, "stderr", text);
  }

  #forget(node: ClusterNode): void {
    clearTimeout(this.#waiting.get(node)?.timer);
    this.#waiting.delete(node);
  }
}

interface Banner {
  text: string;
  readonly timer: ReturnType<typeof setTimeout>;
}

/** Prints each distinct outcome once, stdout to stdout and stderr to stderr. */
async function printGathered(
  call: Call,
  results: readonly CommandResult[],
  { banners }: { banners: BannerPrinter },
): Promise<void> {
  const { io, flags } = call;
  const groups = foldEqual(results, (result, mask) => {
    const { exitCode, signal, failure, stdout, stderr } = result;
    const said = mask(stderr);
    return JSON.stringify([exitCode, signal, failure?.code, stdout, said]);
  });

  for (const group of groups) {
    const { stdout, stderr, failure, truncated } = group[0]!;
    const isSilent = stdout === "" && stderr === "" && !failure;
    if (isSilent && flags.quiet) continue;

    const count = group.length > 1 ? ` (${group.length})` : "";
    const names = `--- ${foldNodes(group.map(nodeOf))}${count}`;
    const reason = failure ? `: ${reasonOf(failure)}` : "";
    const head = paint(io, BOLD, escapeText(names + reason));
    const cut = truncated ? "[cut at 1 MiB]\n" : "";
    await io.out(`${head}\n${escapeLines(withNewline(stdout) + cut)}`);

    const isShown = group.every(({ node }) => banners.hasShown(node)) ||
      quotesStderr(group[0]!);
    if (stderr !== "" && !isShown) {
      const lines = escapeLines(withNewline(stderr));
      await io.err(`${escapeText(names)}, stderr\n${lines}`);
    }
  }
}

function withNewline(text: string): string {
  return text === "" || text.endsWith("\n") ? text : `${text}\n`;
}

/** How many reasons a summary spells out at most. */
const MAX_REASONS = 10;

async function printCommandSummary(
  call: Call,
  results: readonly CommandResult[],
  { total }: { total: number },
): Promise<void> {
  const { io, flags, inventory } = call;
  const failed = results.filter(({ failure }) => failure);
  const lines: string[] = [];

  if (!flags.quiet) {
    const passed = results.length - failed.length;
    lines.push(`${passed} of ${total} returned 0, ${inventory.origin}`);
  }
  lines.push(...failureLines(failed));
  if (results.length < total) {
    lines.push(`${plural(total - results.length, "node")} not started`);
  }

  if (lines.length > 0) await warn(io, lines.join("\n"));
}

/** Folds failures by reason or, if there are too many reasons, by code. */
function failureLines(failed: readonly CommandResult[]): string[] {
  const byReason = foldEqual(failed, ({ failure }, mask) => {
    return mask(reasonOf(failure));
  });

  if (byReason.length <= MAX_REASONS) {
    return byReason.map((group) => {
      const names = foldNodes(group.map(nodeOf));
      return `${names}: ${reasonOf(group[0]!.failure)}`;
    });
  }

  const byCode = Map.groupBy(failed, ({ failure }) => failure!.code);
  return Array.from(byCode, ([code, group]) => {
    return `${foldNodes(group.map(nodeOf))}: ${code}`;
  });
}

type Mask = (text: string) => string;

/**
 * Groups results whose keys are equal, or differ only in the node's own name
 * and address, which a mask replaces.
 */
function foldEqual(
  results: readonly CommandResult[],
  keyOf: (result: CommandResult, mask: Mask) => string,
): CommandResult[][] {
  // Compare unmasked first: if all nodes print `gpu-1`, masking would change
  // only gpu-1's output.
  const equal = Map.groupBy(results, (result) => {
    return keyOf(result, (text) => text);
  });
  const alike = Map.groupBy(equal.values(), (group) => {
    const first = group[0]!;
    return keyOf(first, maskOf(first.node));
  });

  return Array.from(alike.values(), (groups) => groups.flat());
}

/**
 * Makes a mask for the forms in which ssh prints a node's name or address, such
 * as `[10.0.0.1]:2201`, `root@10.0.0.1` and `10.0.0.1 port 22`.
 */
function maskOf(node: ClusterNode): Mask {
  // Longest first: one name may begin with another.
  const names = [node.name, ...node.addresses]
    .toSorted((a, b) => b.length - a.length)
    .map(RegExp.escape)
    .join("|");
  const own = new RegExp(
    `(?<![\\w.:-])(?:[\\w.-]+@)?\\[?(?:${names})\\]?` +
      "(?:(?::| port )\\d+)?(?![\\w-])",
    "g",
  );

  return (text) => text.replace(own, "<node>");
}

// --- validate ---

const VALIDATE: Command = {
  name: "validate",
  summary: "list every problem and every warning in the inventory",
  usage: "[options]",
  options: ["config", "strict", ...COMMON],
  help: { quiet: "print problems and warnings only" },
  notes: "Exit code 0: no problems (--strict: and no warnings); 2: otherwise.",
  examples: [
    "cluster-hosts validate",
    "cluster-hosts validate --strict --config new_hosts.yaml",
  ],
  takesNodes: false,
  inventory: "own",

  async run(request) {
    const { flags, io } = request;
    const { origin, problems, warnings } = await inspectInventory(request);
    const faults = flags.strict ? [...problems, ...warnings] : problems;
    const exitCode = faults.length > 0 ? 2 : 0;

    if (flags.json) {
      const document = {
        ...jsonHead({ flags, inventory: { origin, isFallback: false } }),
        errors: problems.map(problemJson),
        warnings: warnings.map(problemJson),
      };
      await io.out(`${toJson(document)}\n`);
      return exitCode;
    }

    const lines = [
      ...problems,
      ...warnings.map((warning) => ({
        ...warning,
        message: `warning: ${warning.message}`,
      })),
    ].map((problem) => formatConfigProblem(problem, origin));
    await io.out(linesOf(lines));

    if (!flags.quiet) {
      const found = [
        countOf(problems, "problem"),
        countOf(warnings, "warning"),
      ];
      await warn(io, `${found.join(", ")}, ${origin}`);
    }
    return exitCode;
  },
};

function countOf(problems: readonly ConfigProblem[], noun: string): string {
  return problems.length > 0 ? plural(problems.length, noun) : `no ${noun}s`;
}

interface Inspection {
  readonly origin: string;
  readonly problems: readonly ConfigProblem[];
  readonly warnings: readonly ConfigProblem[];
}

/**
 * Inspects the inventory. If it cannot be read, that is a problem, too.
 */
async function inspectInventory(request: Invocation): Promise<Inspection> {
  try {
    const { text, origin, exists } = await readInventory(request);
    if (!exists) return unreadable(missingInventory());

    const { problems, warnings } = inspectConfig(text, origin);
    return { origin, problems, warnings };
  } catch (error) {
    if (!(error instanceof HostsConfigError)) throw error;
    return unreadable(error);
  }
}

function unreadable({ origin, problems }: HostsConfigError): Inspection {
  return { origin, problems, warnings: [] };
}

function problemJson(problem: ConfigProblem) {
  const { path, message, line = null, column = null } = problem;
  return { path, message, line, column };
}

// --- export ---

const EXPORT: Command = {
  name: "export",
  summary: "print the inventory for Ansible, Prometheus or ssh",
  usage: "ansible|prometheus|ssh-config [NODE...] [options]",
  kinds: ["ansible", "prometheus", "ssh-config"],
  options: [...SELECTION, "port", "path", "help"],
  help: {
    port: "prometheus: this port (default: each data server)",
    path: "prometheus: this path (default: each status_path)",
  },
  notes:
    "An export has the first address of each node. A Prometheus target is\n" +
    "HOST:PORT; its __param_target is the URL that status checks first.\n" +
    "Exit code 0: printed; 2: a node's name cannot be exported.",
  examples: [
    "cluster-hosts export prometheus > new.json && mv new.json targets.json",
    "cluster-hosts export ssh-config > new && mv new ~/.ssh/cluster",
  ],
  takesNodes: true,
  inventory: "required",

  check({ kind, flags }) {
    const hasTarget = flags.port !== undefined || flags.path !== undefined;
    if (kind === "prometheus" || !hasTarget) return undefined;

    return "--port and --path are for export prometheus";
  },

  async run(call) {
    const { kind, io } = call;
    const nodes = select(call);
    requireExportableNames(nodes);

    if (kind === "ansible") {
      await io.out(ansibleInventory(call, nodes));
    } else if (kind === "ssh-config") {
      await io.out(nodes.map(sshConfigHost).join("\n"));
    } else {
      await exportPrometheus(call, nodes);
    }
    return 0;
  },
};

/** Matches names that ssh, scp or an Ansible pattern would misread. */
const MISREAD = /^[-~]|[\s*?!#,'"`$\\;&<>|(){}[\]@:]/;

/**
 * Refuses names that another tool would misread, whatever the format, so that a
 * node has the same name in all of them.
 */
function requireExportableNames(nodes: readonly ClusterNode[]): void {
  const isMisread = (name: string) =>
    MISREAD.test(name) || escapeText(name) !== name;
  const misread = nodes.map(nameOf).filter(isMisread);

  if (misread.length > 0) {
    const names = misread.map((name) => JSON.stringify(name)).join(", ");
    throw new Error(
      `Cannot export ${names}: ssh or Ansible would read the name as ` +
        "something else; rename them, or leave them out with --exclude",
    );
  }
}

/** True if the node's ssh_options set a key of ssh_config(5). */
function setsOption({ sshOptions }: ClusterNode, key: string): boolean {
  const start = `${key.toLowerCase()}=`;
  return sshOptions.some((option) => option.toLowerCase().startsWith(start));
}

function ansibleInventory(
  { inventory: { config } }: Call,
  nodes: readonly ClusterNode[],
): string {
  const groups = ansibleGroups(nodes);
  const hostvars = nodes.map((node) => {
    const own = { ...config.defaults, ...node.entry };
    return [node.name, inert({ ...ansibleVariables(node), ...own })];
  });
  const members = Array.from(groups, ([group, labels]) => [
    group,
    { hosts: labels.map(({ host }) => host) },
  ]);

  const inventory = {
    _meta: { hostvars: Object.fromEntries(hostvars) },
    all: { children: ["ungrouped", ...groups.keys()] },
    ...Object.fromEntries(members),
  };
  return `${toJson(inventory, 2)}\n`;
}

/** A node's membership in a group: `host` is in it because of its `label`. */
interface GroupLabel {
  readonly group: string;
  readonly label: string;
  readonly host: string;
}

/**
 * Groups the nodes by role, status and GPU, under names that Ansible accepts.
 *
 * @throws {Error} if two values share a group name, or a node is named like one
 */
function ansibleGroups(
  nodes: readonly ClusterNode[],
): Map<string, GroupLabel[]> {
  const labels = nodes.flatMap((node) => {
    const kinds = (["role", "status", "gpu"] as const)
      .filter((kind) => node[kind] !== "");

    return kinds.map((kind) => ({
      group: `${kind}_${node[kind]}`.replace(/[^A-Za-z0-9_]/g, "_"),
      label: `${kind} ${JSON.stringify(node[kind])}`,
      host: node.name,
    }));
  });
  const groups = Map.groupBy(labels, ({ group }) => group);

  const faults: string[] = [];
  for (const [group, members] of groups) {
    const distinct = [...new Set(members.map(({ label }) => label))];
    if (distinct.length > 1) {
      faults.push(`${distinct.join(" and ")} would both be ${group}`);
    }
  }
  for (const { name } of nodes) {
    const isGroup = groups.has(name) || ["all", "ungrouped"].includes(name);
    if (isGroup) faults.push(`the node ${name} has the same name as a group`);
  }

  if (faults.length > 0) {
    throw new Error(`Cannot name the Ansible groups: ${faults.join("; ")}`);
  }
  return groups;
}

function ansibleVariables(node: ClusterNode): Record<string, unknown> {
  const [endpoint] = sshEndpoints(node);
  const options = node.sshOptions.flatMap((option) => ["-o", option]);
  const variables: Record<string, unknown> = {};

  if (endpoint) variables.ansible_host = endpoint.host;
  // Ansible passes these to ssh before ssh_options, and the first value wins.
  if (!setsOption(node, "User")) variables.ansible_user = node.sshUser;
  if (endpoint && !setsOption(node, "Port")) {
    variables.ansible_port = endpoint.port;
  }
  if (node.sshKey !== undefined && !setsOption(node, "IdentityFile")) {
    variables.ansible_ssh_private_key_file = node.sshKey;
  }
  if (node.sshKey !== undefined && !setsOption(node, "IdentitiesOnly")) {
    options.push("-o", "IdentitiesOnly=yes");
  }
  if (options.length > 0) {
    variables.ansible_ssh_common_args = options.map(shellQuote).join(" ");
  }

  return variables;
}

/**
 * Marks strings that Ansible would run as templates, so that they stay strings.
 */
function inert(value: unknown): unknown {
  if (typeof value === "string") {
    const isTemplate = /\{[{%#]/.test(value);
    return isTemplate ? { __ansible_unsafe: value } : value;
  }
  if (Array.isArray(value)) return value.map(inert);
  if (typeof value !== "object" || value === null) return value;

  const entries = Object.entries(value);
  return Object.fromEntries(entries.map(([key, item]) => [key, inert(item)]));
}

async function exportPrometheus(
  call: Call,
  nodes: readonly ClusterNode[],
): Promise<void> {
  const { io, flags: { port, path } } = call;
  const missing: ClusterNode[] = [];
  const targets: unknown[] = [];

  for (const node of nodes) {
    const [endpoint] = dataEndpoints(node, port);
    if (!endpoint) {
      missing.push(node);
      continue;
    }

    const { name, role, status, gpu } = node;
    const url = endpointUrl(endpoint, statusPath(node, { port, path }));
    targets.push({
      targets: [hostPort(endpoint.host, endpoint.port)],
      labels: { node: name, role, status, gpu, __param_target: url },
    });
  }

  if (missing.length > 0) await warn(io, leftOut(missing));
  await io.out(`${toJson(targets, 2)}\n`);
}

function sshConfigHost(node: ClusterNode): string {
  const [endpoint] = sshEndpoints(node);
  if (!endpoint) return `# ${node.name}: no address\n`;

  // ssh expands %h and the like in a HostName; an IPv6 zone begins with "%".
  const settings: [key: string, value: string][] = [
    ["HostName", endpoint.host.replaceAll("%", "%%")],
    ["User", node.sshUser],
    ["Port", String(endpoint.port)],
  ];
  if (node.sshKey !== undefined) {
    settings.push(["IdentityFile", node.sshKey], ["IdentitiesOnly", "yes"]);
  }

  const lines = [`Host ${configQuote(node.name)}`];
  for (const [key, value] of settings) {
    if (!setsOption(node, key)) lines.push(`  ${key} ${configQuote(value)}`);
  }
  for (const option of node.sshOptions) {
    lines.push(`  ${option.replace("=", " ")}`);
  }
  return linesOf(lines);
}

/**
 * Quotes a word for ssh_config(5), where "=" is a separator. No exported name
 * or field contains a quotation mark.
 */
function configQuote(word: string): string {
  return /^[\w.:@%~/+-]+$/.test(word) ? word : `"${word}"`;
}

// --- permissions ---

const PERMISSIONS: Command = {
  name: "permissions",
  summary: "print the minimal Deno flags that a command needs",
  usage: "COMMAND [its arguments]",
  options: ["config", "help"],
  notes:
    "Prints one line for this inventory; use it as `deno run $(...) URL COMMAND`.\n" +
    "Takes the options of COMMAND; display options have no effect.",
  examples: [
    "cluster-hosts permissions status",
    "cluster-hosts permissions wait 'gpu-*' --port 22",
  ],
  takesNodes: false,
  takesCommand: true,
  inventory: "required",

  check({ about }) {
    if (about) return undefined;
    return "permissions needs a command: cluster-hosts permissions status";
  },

  async run(call) {
    const { io } = call;
    const command = call.about!;
    const reading = await readingNeeds(call, command);
    const needs = await command.needs?.(call) ?? {};

    const net = [...reading.net, ...needs.net ?? []];
    const env = [...reading.env, ...needs.env ?? []];
    const netPart = net.length > 0 ? netFlag(net) : undefined;
    const parts = [
      allowFlag("read", reading.read),
      netPart,
      allowFlag("env", env),
      allowFlag("sys", needs.sys ?? []),
      allowFlag("run", needs.run ?? []),
    ].filter((flag) => flag !== undefined);

    const permitsEveryHost = netPart === "--allow-net";
    if (permitsEveryHost) {
      await warn(
        io,
        `${net.length} endpoints do not fit into one flag: ` +
          "--allow-net permits every host",
      );
    }
    await io.out(`${parts.join(" ")}\n`);
    return 0;
  },
};

function allowFlag(
  kind: string,
  values: readonly string[],
): string | undefined {
  return values.length > 0 ? `--allow-${kind}=${values.join(",")}` : undefined;
}

interface ReadingNeeds {
  readonly read: readonly string[];
  readonly net: readonly Endpoint[];
  readonly env: readonly string[];
}

/** Lists the permissions that reading the inventory needs. */
async function readingNeeds(
  { flags, inventory }: Call,
  command: Command,
): Promise<ReadingNeeds> {
  const { config, origin } = inventory;
  const file = filePath(origin);
  const read: string[] = [];
  const net: Endpoint[] = [];
  const env: string[] = [];

  if (flags.config === undefined) env.push("RINGRIFT_HOSTS_CONFIG");

  // The inventory has been read, so an origin that is no path is a valid URL.
  if ("problem" in file) {
    net.push(urlEndpoint(origin));
  } else if (flags.config !== "-") {
    read.push(file.value);
  }

  // The unified config may override every node's data port. `validate` never
  // looks up nodes, so it does not read that config.
  const hasNodes = command.inventory !== "own";
  if (hasNodes && await readsUnifiedConfig(config)) {
    const path = readVariable("RINGRIFT_CONFIG_PATH");
    env.push("RINGRIFT_CONFIG_PATH");
    if (path !== undefined) read.push(path);
  }

  requirePlain(read);
  return { read, net, env };
}

function requirePlain(paths: readonly string[]): void {
  const special = paths.find((path) => /[\s,'"$`\\*?[]/.test(path));

  if (special !== undefined) {
    const quoted = JSON.stringify(special);
    throw new Error(
      `Cannot print a flag for ${quoted}: it holds a character that the ` +
        "shell or Deno would interpret",
    );
  }
}

// --- The commands ---

const COMMANDS: readonly Command[] = [
  STATUS,
  NODES,
  COORDINATOR,
  URLS,
  SSH,
  WAIT,
  VALIDATE,
  EXPORT,
  PERMISSIONS,
];

// --- Tables and text width ---

/** The text of a cell, with an SGR colour code if it has a colour. */
type Cell = string | { readonly text: string; readonly colour: number };

/** A column of a table, and how it adapts to a narrow terminal. */
interface Column {
  readonly title: string;
  readonly align?: "right";
  /** Its turn to be dropped for lack of room, lowest first. Default: never. */
  readonly drop?: number;
  /**
   * True if `--show` asked for it: kept, though cut short, until all other
   * optional columns are gone.
   */
  readonly isAsked?: boolean;
  /** The width that it can be cut to. Default: it is never cut. */
  readonly least?: number;
  /** True if a terminal omits it when all its cells are empty. */
  readonly dropsIfEmpty?: boolean;
}

/** A cell as it is drawn, before it is cut. */
interface DrawnCell {
  readonly text: string;
  readonly width: number;
  readonly colour: number;
}

/** A column as it is drawn. */
interface DrawnColumn {
  readonly column: Column;
  /** True if all its cells are empty or "-". */
  readonly isEmpty: boolean;
  /** The width that it is drawn at; 0 if it is dropped. */
  width: number;
}

const COLUMN_GAP = 2;
const BOLD = 1;

interface TableOptions {
  readonly io: Io;
  /** The width to fit into on a terminal. Default: the full width. */
  readonly width?: number;
}

/**
 * Draws a table. On a terminal, each row fits on one line: columns are dropped
 * or cut until it does. In a pipe, all columns are kept, and none is cut.
 */
function table(
  columns: readonly Column[],
  rows: readonly (readonly Cell[])[],
  { io, width }: TableOptions,
): string {
  const titles = columns.map(({ title }) => ({ text: title, colour: BOLD }));
  const lines = [titles, ...rows].map((row) => row.map(drawnCell));

  const drawn = columns.map((column, index): DrawnColumn => {
    const [title, ...cells] = lines.map((line) => line[index]!);
    const isEmpty = cells.every(({ text }) => text === "" || text === "-");
    const width = cells.reduce(
      (most, cell) => Math.max(most, cell.width),
      title!.width,
    );
    return { column, isEmpty, width };
  });

  if (io.isTerminal) fitColumns(drawn, width ?? io.size().columns);
  return lines.map((line) => drawLine(io, drawn, line)).join("");
}

function drawnCell(cell: Cell): DrawnCell {
  const { text, colour } = typeof cell === "string"
    ? { text: cell, colour: 0 }
    : cell;

  const shown = escapeText(text).replaceAll("\t", " ");
  return { text: shown, width: textWidth(shown), colour };
}

function drawLine(
  io: Io,
  columns: readonly DrawnColumn[],
  cells: readonly DrawnCell[],
): string {
  const texts: string[] = [];

  for (const [index, { column, width }] of columns.entries()) {
    if (width === 0) continue;

    const cell = cutCell(cells[index]!, width);
    const padding = " ".repeat(width - cell.width);
    const painted = paint(io, cell.colour, cell.text);
    texts.push(column.align ? padding + painted : painted + padding);
  }

  const line = texts.join(" ".repeat(COLUMN_GAP));
  return `${line.trimEnd()}\n`;
}

function cutCell(cell: DrawnCell, width: number): DrawnCell {
  if (cell.width <= width) return cell;

  const text = clip(cell.text, width);
  return { ...cell, text, width: textWidth(text) };
}

/** The width at which a column that is cut can still be read. */
const READABLE_WIDTH = 30;

/** Drops and cuts columns until they fit into a line. */
function fitColumns(columns: readonly DrawnColumn[], room: number): void {
  for (const drawn of columns) {
    if (drawn.isEmpty && drawn.column.dropsIfEmpty) drawn.width = 0;
  }

  const isAsked = ({ column }: DrawnColumn) => column.isAsked === true;
  const inOrder = dropOrder(columns);
  for (const drawn of inOrder.filter((it) => !isAsked(it))) {
    if (neededWidth(columns, READABLE_WIDTH) > room) drawn.width = 0;
  }
  for (const drawn of inOrder.filter(isAsked)) {
    if (neededWidth(columns, 0) > room) drawn.width = 0;
  }

  // From the right: a reason can be guessed from its beginning, a name cannot.
  for (const drawn of columns.toReversed()) {
    const excess = Math.max(0, neededWidth(columns) - room);
    const least = drawn.column.least ?? drawn.width;
    const most = Math.max(0, drawn.width - least);
    drawn.width -= Math.min(excess, most);
  }
}

/** Lists the columns that may be dropped: empty ones first. */
function dropOrder(columns: readonly DrawnColumn[]): DrawnColumn[] {
  const turnOf = ({ column }: DrawnColumn) => column.drop ?? Infinity;

  const sorted = columns
    .filter(({ column }) => column.drop !== undefined)
    .toSorted((a, b) => turnOf(a) - turnOf(b));

  const empty = sorted.filter(({ isEmpty }) => isEmpty);
  const filled = sorted.filter(({ isEmpty }) => !isEmpty);
  return [...empty, ...filled];
}

/**
 * Computes the width of a line if columns that can be cut are cut to `most`.
 */
function neededWidth(
  columns: readonly DrawnColumn[],
  most = Infinity,
): number {
  const shown = columns.filter(({ width }) => width > 0);
  const gaps = COLUMN_GAP * Math.max(0, shown.length - 1);

  return shown.reduce((sum, { column, width }) => {
    const least = column.least ?? width;
    return sum + Math.min(width, Math.max(least, most));
  }, gaps);
}

const PRINTABLE_ASCII = /^[\x20-\x7e]*$/;

/**
 * Matches characters that take two columns: emoji, and the ranges that
 * Unicode's EastAsianWidth.txt calls wide or fullwidth.
 *
 * `unicodeWidth` of @std/cli does not load from the npm build of that package,
 * which a checkout uses.
 */
const WIDE = new RegExp(
  "[\\p{Emoji_Presentation}\\ufe0f" +
    // Hangul Jamo, angle brackets.
    "\\u1100-\\u115f\\u2329\\u232a" +
    // CJK radicals, Kana, Bopomofo, CJK ideographs, Yi.
    "\\u2e80-\\u303e\\u3041-\\u3247\\u3250-\\ua4c6" +
    // Hangul, compatibility ideographs, vertical and small forms.
    "\\ua960-\\ua97c\\uac00-\\ud7a3\\uf900-\\ufaff\\ufe10-\\ufe19" +
    "\\ufe30-\\ufe6b" +
    // Fullwidth forms.
    "\\uff01-\\uff60\\uffe0-\\uffe6" +
    // Tangut, Khitan, Kana supplements, enclosed ideographs, more ideographs.
    "\\u{16fe0}-\\u{18dff}\\u{1aff0}-\\u{1b2ff}\\u{1f200}-\\u{1f265}" +
    "\\u{20000}-\\u{3fffd}]",
  "u",
);

/** Matches text of only combining marks and format characters. */
const INVISIBLE = /^[\p{M}\p{Cf}]*$/u;

/** Splits text into what a reader sees as characters. */
function graphemes(text: string): string[] {
  if (PRINTABLE_ASCII.test(text)) return text.split("");

  const segments = new Intl.Segmenter().segment(text);
  return Array.from(segments, ({ segment }) => segment);
}

/** Counts the columns that text takes on a terminal. */
function textWidth(text: string): number {
  if (PRINTABLE_ASCII.test(text)) return text.length;
  return graphemes(text).reduce((sum, it) => sum + graphemeWidth(it), 0);
}

function graphemeWidth(grapheme: string): number {
  if (WIDE.test(grapheme)) return 2;
  return INVISIBLE.test(grapheme) ? 0 : 1;
}

/** Cuts text to a width; "…" in the last column shows that it was cut. */
function clip(text: string, width: number): string {
  if (textWidth(text) <= width) return text;
  if (width <= 0) return "";

  const kept: string[] = [];
  let room = width - 1;

  for (const grapheme of graphemes(text)) {
    room -= graphemeWidth(grapheme);
    if (room < 0) break;
    kept.push(grapheme);
  }

  return `${kept.join("")}…`;
}

/** Colours text where colours are shown; takes an SGR code, or 0 for none. */
function paint(io: Io, colour: number, text: string): string {
  const isPainted = colour !== 0 && io.isTerminal && io.hasColour;
  return isPainted ? `\x1b[${colour}m${text}\x1b[0m` : text;
}

function linesOf(texts: readonly string[]): string {
  return texts.map((text) => `${escapeText(text)}\n`).join("");
}

/** Returns `1 node`, `2 nodes`. */
function plural(count: number, word: string): string {
  return count === 1 ? `1 ${word}` : `${count} ${word}s`;
}

/** Returns `timeout: no connection within 5 s`, or "" without a failure. */
function reasonOf(
  failure: { readonly code: string; readonly message: string } | undefined,
): string {
  return failure ? `${failure.code}: ${failure.message}` : "";
}

/** Returns the time since a moment: `1.25 s`, or `12 s` from ten seconds on. */
function seconds(startedMs: number): string {
  const total = (performance.now() - startedMs) / 1000;
  const digits = total < 10 ? 2 : 0;
  return `${total.toFixed(digits)} s`;
}

/** Returns the time since a moment in its largest unit: `59s`, `3m`, `2h`. */
function elapsed(startedMs: number): string {
  const total = Math.floor((performance.now() - startedMs) / 1000);

  if (total < 60) return `${total}s`;
  if (total < 3600) return `${Math.floor(total / 60)}m`;
  return `${Math.floor(total / 3600)}h`;
}

// --- Live line ---

const REDRAW_LINE_MS = 250;

/** The columns that a live line leaves free: the terminal echoes ^C there. */
const LIVE_LINE_MARGIN = 3;

/**
 * Keeps redrawing one line on a terminal's stderr until it is disposed of.
 * `hide` makes room for a result; the next redraw brings the line back.
 */
function liveLine(
  { io, flags }: Pick<Call, "io" | "flags">,
  text: () => string,
): Disposable & { hide(): void } {
  const isDrawn = !flags.quiet && io.isErrTerminal && io.hasCursor;
  let shown = "";
  let isWriting = false;

  const show = async (next: string) => {
    if (next === shown) return;
    shown = next;
    isWriting = true;

    try {
      await io.err(`\r${next}\x1b[K`);
    } catch {
      // Ignored: the command's next write reports it.
    } finally {
      isWriting = false;
    }
  };

  const draw = () => {
    // Skips a redraw if the terminal is too slow: memory must not grow.
    if (isWriting) return;

    const room = io.size().columns - LIVE_LINE_MARGIN;
    const line = escapeText(text());
    void show(clip(line, room));
  };

  const hide = () => void show("");
  if (!isDrawn) return { hide, [Symbol.dispose]: hide };

  draw();
  const timer = setInterval(draw, REDRAW_LINE_MS);

  return {
    hide,
    [Symbol.dispose]() {
      clearInterval(timer);
      hide();
    },
  };
}

// --- Escaping and JSON ---

/** Matches control and bidirectional characters, which a terminal obeys. */
const UNSAFE = /[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu;

/** Escapes characters that a terminal would obey; keeps tabs. */
function escapeText(text: string): string {
  if (PRINTABLE_ASCII.test(text)) return text;

  return text.replace(UNSAFE, (character) => {
    if (character === "\t") return character;
    return `\\u{${character.codePointAt(0)!.toString(16)}}`;
  });
}

/** Escapes each line of text; drops a carriage return at the end of a line. */
function escapeLines(text: string): string {
  const lines = text.split("\n").map((line) => {
    const content = line.endsWith("\r") ? line.slice(0, -1) : line;
    return escapeText(content);
  });
  return lines.join("\n");
}

/** Matches characters that JSON does not escape, but a terminal obeys. */
const UNSAFE_IN_JSON =
  /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

function toJson(value: unknown, indent?: number): string {
  return JSON.stringify(value, null, indent).replace(
    UNSAFE_IN_JSON,
    (character) => {
      const code = character.charCodeAt(0).toString(16);
      return `\\u${code.padStart(4, "0")}`;
    },
  );
}

/** The options and the inventory that a document reports on. */
interface JsonSource {
  readonly flags: Flags;
  readonly inventory: Pick<Inventory, "origin" | "isFallback">;
}

/** Returns the keys that every document begins with. */
function jsonHead({ flags, inventory }: JsonSource): Record<string, unknown> {
  const config = flags.config === "-" ? "-" : inventory.origin;
  return { schemaVersion: 1, config: inventory.isFallback ? null : config };
}

interface JsonDocument {
  /** Keys before the list. */
  readonly head?: Record<string, unknown>;
  /** The key of the list. */
  readonly key: string;
  readonly items: readonly unknown[];
}

/** Writes a document with one item per line, for `grep` as well as parsers. */
function jsonDocument(
  source: JsonSource,
  { head, key, items }: JsonDocument,
): string {
  const start = toJson({ ...jsonHead(source), ...head }).slice(0, -1);
  const lines = items.map((item) => `\n${toJson(item)}`).join(",");
  const end = items.length > 0 ? "\n]}" : "]}";
  return `${start},${toJson(key)}:[${lines}${end}\n`;
}

/** Quotes a word for a shell, if necessary. */
function shellQuote(text: string): string {
  const isPlain = /^[\w@%+=:,./-]+$/.test(text);
  return isPlain ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

// --- Terminal ---

/** The exit code for each signal that ends a command. */
const EXIT_CODES: Readonly<Partial<Record<Deno.Signal, number>>> = {
  SIGINT: 130,
  SIGTERM: 143,
  SIGHUP: 129,
};

/** A signal that ended the work. */
class Interrupt extends Error {
  readonly signal: Deno.Signal;

  constructor(signal: Deno.Signal) {
    super(`Interrupted by ${signal}`);
    this.signal = signal;
  }
}

/**
 * Thrown if the reader of the output has closed it, as `head` does. The command
 * then ends quietly with 0: its results are incomplete, so they cannot decide
 * the exit code.
 */
class ClosedOutput extends Error {}

/** Awaits work; returns the interrupt that ended it, if one did. */
async function untilInterrupted(
  work: Promise<unknown>,
): Promise<Interrupt | undefined> {
  try {
    await work;
    return undefined;
  } catch (error) {
    if (error instanceof Interrupt) return error;
    throw error;
  }
}

/** Opens the streams of this process. */
function openTerminal(): Io {
  const output = new Output();
  const hasCursor = readVariable("TERM") !== "dumb";

  return {
    out: (text) => output.write(Deno.stdout, text),
    err: (text) => output.writeProgress(text),
    readStdin: () => new Response(Deno.stdin.readable).bytes(),
    onSignal: (listener) => listenToSignals(listener, output),
    size: terminalSize,
    isTerminal: Deno.stdout.isTerminal(),
    isErrTerminal: Deno.stderr.isTerminal(),
    hasCursor,
    hasColour: hasCursor && !Deno.noColor,
  };
}

/** PIPE_BUF on Linux: up to this size, a pipe takes all of a write or none. */
const CHUNK_BYTES = 4096;
const WOULD_BLOCK_DELAY_MS = 5;

/** Writes to stdout and stderr one at a time: both may be the same terminal. */
class Output {
  #last: Promise<void> = Promise.resolve();
  /** When the write of the current chunk began, if there is one. */
  #sinceMs: number | undefined;

  /** How long the write of the current chunk has been blocked. */
  get blockedMs(): number {
    return this.#sinceMs === undefined ? 0 : performance.now() - this.#sinceMs;
  }

  /**
   * Writes text after all earlier writes.
   *
   * @throws {ClosedOutput} If nobody reads the stream any more.
   */
  write(sink: typeof Deno.stdout, text: string): Promise<void> {
    const written = this.#last.then(() => this.#writeAll(sink, text));
    this.#last = written.catch(() => {});
    return written;
  }

  /** Writes to stderr; drops the text if nobody reads stderr any more. */
  async writeProgress(text: string): Promise<void> {
    try {
      await this.write(Deno.stderr, text);
    } catch (error) {
      if (!(error instanceof ClosedOutput)) throw error;
    }
  }

  /**
   * Writes the whole text, even to a pipe that another process has made
   * non-blocking. When such a pipe is full, `write` throws `WouldBlock` without
   * saying how much it has written. A chunk of at most PIPE_BUF is written
   * whole or not at all, so that it can be tried again.
   *
   * Asynchronous: a `writeSync` that blocks would hold up the signal listeners.
   */
  async #writeAll(sink: typeof Deno.stdout, text: string): Promise<void> {
    const encoder = new TextEncoder();
    const chunk = new Uint8Array(CHUNK_BYTES);
    let rest = text;

    while (rest !== "") {
      const { read, written } = encoder.encodeInto(rest, chunk);
      rest = rest.slice(read);
      await this.#writeChunk(sink, chunk.subarray(0, written));
    }
  }

  async #writeChunk(
    sink: typeof Deno.stdout,
    chunk: Uint8Array,
  ): Promise<void> {
    this.#sinceMs = performance.now();

    try {
      let written = 0;
      while (written < chunk.length) {
        written += await writeOnce(sink, chunk.subarray(written));
      }
    } finally {
      this.#sinceMs = undefined;
    }
  }
}

/** Writes what fits, which is nothing if the stream would block. */
async function writeOnce(
  sink: typeof Deno.stdout,
  bytes: Uint8Array,
): Promise<number> {
  try {
    return await sink.write(bytes);
  } catch (error) {
    if (!(error instanceof Deno.errors.WouldBlock)) throw outputError(error);

    await delay(WOULD_BLOCK_DELAY_MS);
    return 0;
  }
}

function outputError(cause: unknown): Error {
  if (cause instanceof Deno.errors.BrokenPipe) return new ClosedOutput();
  return new Error(`Cannot write the output: ${messageOf(cause)}`, { cause });
}

/** Returns the size of the terminal; 80×24 if it reports 0 for unknown. */
function terminalSize(): { columns: number; rows: number } {
  const { columns, rows } = Deno.consoleSize();
  return { columns: columns || 80, rows: rows || 24 };
}

/**
 * How long a command may take after a signal to report its results so far.
 *
 * After a signal, ssh gets 500 ms to exit and its output 500 ms to drain; the
 * rest is slack for a busy machine.
 */
const GRACE_MS = 5000;

/** How long the write of one chunk may be blocked after a signal. */
const BLOCKED_GRACE_MS = 500;

/** How often both limits are checked after a signal. */
const GRACE_CHECK_MS = 100;

/**
 * Calls the listener on the first signal. After that, exits if the command does
 * not end within `GRACE_MS`, if its output is blocked, or on a second signal.
 */
function listenToSignals(
  listener: (signal: Deno.Signal) => void,
  output: Output,
): () => void {
  let timer: ReturnType<typeof setInterval> | undefined;

  const listeners = handledSignals().map((signal) => {
    const exit = () => Deno.exit(EXIT_CODES[signal]);

    const onSignal = () => {
      const isSecond = timer !== undefined;
      if (isSecond) exit();

      const endMs = performance.now() + GRACE_MS;
      timer = setInterval(() => {
        const isBlocked = output.blockedMs > BLOCKED_GRACE_MS;
        if (isBlocked || performance.now() > endMs) exit();
      }, GRACE_CHECK_MS);
      listener(signal);
    };
    return { signal, onSignal };
  });

  for (const { signal, onSignal } of listeners) {
    Deno.addSignalListener(signal, onSignal);
  }

  return () => {
    // Without the check, this would load Deno's timers, which takes a while.
    if (timer !== undefined) clearInterval(timer);
    for (const { signal, onSignal } of listeners) {
      Deno.removeSignalListener(signal, onSignal);
    }
  };
}

function handledSignals(): Deno.Signal[] {
  if (Deno.build.os === "windows") return ["SIGINT"];
  return Object.keys(EXIT_CODES) as Deno.Signal[];
}

/** Prints progress or an error, with the program's name before each line. */
async function warn(io: Io, message: string): Promise<void> {
  const lines = message.split("\n").map((line) => `cluster-hosts: ${line}`);
  await io.err(linesOf(lines));
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

// --- main ---

async function runLine(
  line: Line,
  { io, signal }: Pick<Invocation, "io" | "signal">,
): Promise<number> {
  const answer = immediateAnswer(line);
  if (answer !== undefined) {
    await io.out(answer);
    return 0;
  }
  if (line.isEmpty) {
    await io.err(generalHelp());
    return 2;
  }

  const unsupported = unsupportedDeno();
  if (unsupported) throw new Error(unsupported);

  const { command, request } = readRequest(line, { io, signal });
  if (command.inventory === "own") return await command.run(request);

  const subject = request.about ?? command;
  const mayFallBack = subject.inventory === "fallback";
  const inventory = await loadInventory(request, { mayFallBack });
  return await command.run({ ...request, inventory });
}

/** Reports the error that ended a command, and returns the exit code. */
async function reportError(io: Io, error: unknown): Promise<number> {
  if (error instanceof ClosedOutput) return 0;
  if (error instanceof Interrupt) return EXIT_CODES[error.signal] ?? 1;

  try {
    await warn(io, messageOf(error));
  } catch {
    // stderr cannot be written to: the exit code alone has to report it.
  }
  return 2;
}

/**
 * Runs one command line, and resolves to its exit code: 0 if all is well, 1 if
 * it is not, 2 for bad usage, a bad inventory or something that could not be
 * checked.
 *
 * @param io Streams to use instead of those of this process.
 *
 * @example Print the version
 * ```ts
 * import { main } from "@ringrift/cluster-hosts/cli";
 *
 * Deno.exitCode = await main(["--version"]);
 * ```
 */
export async function main(
  args: readonly string[],
  io: Io = openTerminal(),
): Promise<number> {
  const controller = new AbortController();
  const stopListening = io.onSignal((signal) => {
    controller.abort(new Interrupt(signal));
  });

  try {
    const { signal } = controller;
    const exitCode = await runLine(parseLine(args), { io, signal });
    signal.throwIfAborted();
    return exitCode;
  } catch (error) {
    return await reportError(io, error);
  } finally {
    // An empty write waits for all earlier ones, such as clearing the live
    // line.
    await io.err("");
    stopListening();
  }
}

if (import.meta.main) {
  Deno.exit(await main(Deno.args));
}
