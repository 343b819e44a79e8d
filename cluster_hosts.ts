/**
 * Reads the inventory of a cluster, and answers what scripts ask of it: which
 * hosts there are, which of them answer, from which URLs data can be pulled,
 * and what a command says on each of them.
 *
 * What holds for every function:
 *
 * - Importing this module needs no permission. Each permission is used when it
 *   is needed and never prompted for. A missing one throws
 *   `Deno.errors.NotCapable` with the exact flag (`probeNodes` and `watchNodes`
 *   report it as `denied`); an environment variable that may not be read counts
 *   as unset.
 * - An inventory that cannot be used throws {@linkcode HostsConfigError}.
 * - A fault of the caller throws `TypeError` or `RangeError` before anything is
 *   contacted. A fault of one node never rejects a call.
 * - Durations are milliseconds. An option that is `undefined` has its default.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { pooledMap } from "jsr:@std/async@^1.5.0/pool";
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

// --- Constants ---

/** The default port of the Elo ratings database. */
export const ELO_SYNC_PORT = 8766;

/**
 * The default port of a node's data server. It equals
 * {@linkcode ELO_SYNC_PORT} on purpose.
 */
export const DATA_SYNC_PORT = 8766;

/** The default port of the model server. */
export const MODEL_SYNC_PORT = 8765;

/**
 * The inventory that is read if nothing names one, under the working directory.
 */
export const DEFAULT_CONFIG_PATH = "config/distributed_hosts.yaml";

/** An inventory to copy, beside the default one in a checkout. */
const EXAMPLE_CONFIG_PATH = "config/distributed_hosts.example.yaml";

/** Names the inventory to read, where the caller names none. */
const CONFIG_VARIABLE = "RINGRIFT_HOSTS_CONFIG";

/**
 * Names another program's config, which may set the data port of this cluster.
 */
const UNIFIED_CONFIG_VARIABLE = "RINGRIFT_CONFIG_PATH";

/** Gives the coordinator's address where the inventory has none. */
const COORDINATOR_VARIABLE = "RINGRIFT_COORDINATOR_IP";

/** The path that answers a check, unless a node or the caller names another. */
const DEFAULT_STATUS_PATH = "/status";

/** The SSH user, unless the inventory names one. */
const DEFAULT_SSH_USER = "ubuntu";

/**
 * Defaults of options, for the library and for help. Names that end in `Ms` are
 * milliseconds.
 */
export const DEFAULTS = {
  timeoutMs: 5000,
  /** Nodes that are checked at once. */
  concurrency: 10_000,
  watchIntervalMs: 5000,
  waitIntervalMs: 2000,
  waitDeadlineMs: 300_000,
  /** Nodes on which a command runs at once. */
  commandConcurrency: 32,
  connectTimeoutMs: 10_000,
  serverAliveSeconds: 15,
} as const;

/** The ports that a URL may leave out. */
const DEFAULT_PORTS: Readonly<Record<string, number>> = {
  "http:": 80,
  "https:": 443,
  "ssh:": 22,
};

/** The most that a URL may send as an inventory. */
const MAX_CONFIG_BYTES = 16 * 1024 * 1024;

/** The most levels that values may be nested in an inventory. */
const MAX_DEPTH = 100;

/** The most values that aliases may add to an inventory. */
const MAX_ALIASED_VALUES = 1_000_000;

/** Says how to fix a node that cannot be contacted. */
const NO_ADDRESS_HINT = "set tailscale_ip or ssh_host";

const ACTIVE_STATUSES: readonly string[] = ["active", "ready", "unknown"];

const INACTIVE_STATUSES: readonly string[] = [
  "terminated",
  "offline",
  "setup",
  "retired",
  "archived",
];

// --- Errors ---

/**
 * One thing that is wrong with an inventory. It never quotes a value, which may
 * be secret.
 */
export interface ConfigProblem {
  /** The place, such as `hosts.gpu-1.ssh_port`; empty for the file itself. */
  readonly path: string;
  /** What is wrong, and how to fix it. */
  readonly message: string;
  /** The line, from 1, where it could be found. */
  readonly line?: number;
  /** The column, from 1, where it could be found. */
  readonly column?: number;
}

/**
 * Reports an inventory that cannot be used, with all of its problems.
 *
 * @example Print what is wrong with an inventory
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * try {
 *   parseHostsConfig("hosts: { gpu-1: { ssh_port: none } }", "hosts.yaml");
 * } catch (error) {
 *   if (!(error instanceof HostsConfigError)) throw error;
 *
 *   const [problem] = error.problems;
 *   assertEquals(problem?.path, "hosts.gpu-1.ssh_port");
 *   assertEquals(problem?.line, 1);
 * }
 * ```
 */
export class HostsConfigError extends Error {
  /** The file or the URL, as people are shown it. */
  readonly origin: string;
  /** Every problem, in the order of the file. */
  readonly problems: readonly ConfigProblem[];

  /** Creates an error of all `problems` of the file or URL called `origin`. */
  constructor(
    origin: string,
    problems: readonly ConfigProblem[],
    options?: ErrorOptions,
  ) {
    const lines = problems.map((it) => formatConfigProblem(it, origin));
    super(lines.join("\n"), options);
    this.name = "HostsConfigError";
    this.origin = origin;
    this.problems = problems;
  }
}

/** Formats a problem as one line: `hosts.yaml:12: hosts.gpu-1.ssh_port: …`. */
export function formatConfigProblem(
  problem: ConfigProblem,
  origin: string,
): string {
  const { path, message, line, column } = problem;
  const place = [origin];

  if (line !== undefined) place.push(String(line));
  // A path leads to the place better than a column does.
  if (path !== "") return `${place.join(":")}: ${path}: ${message}`;

  if (column !== undefined) place.push(String(column));
  return `${place.join(":")}: ${message}`;
}

/**
 * Finds the known word that was probably meant: one that differs in case or by
 * one edit, else the first that starts with `word`, if that has three letters or
 * more.
 */
export function didYouMean(
  word: string,
  known: Iterable<string>,
): string | undefined {
  const candidates = [...known];
  if (candidates.includes(word)) return undefined;

  const typo = candidates.find((candidate) => isTypo(word, candidate));
  if (typo !== undefined || word.length < 3) return typo;

  const beginning = word.toLowerCase();
  return candidates.find((candidate) =>
    candidate.toLowerCase().startsWith(beginning)
  );
}

/**
 * Reports whether two words differ in case alone, or by one insertion,
 * deletion, replacement or swap of neighbours.
 */
function isTypo(written: string, meant: string): boolean {
  if (written === meant) return false;

  const word = written.toLowerCase();
  const other = meant.toLowerCase();
  const shorter = Math.min(word.length, other.length);

  let start = 0;
  while (start < shorter && word[start] === other[start]) start++;

  let end = 0;
  while (end < shorter - start && word.at(-1 - end) === other.at(-1 - end)) {
    end++;
  }

  const left = word.slice(start, word.length - end);
  const right = other.slice(start, other.length - end);
  const isSwap = left.length === 2 && right === left[1]! + left[0]!;

  return isSwap || (left.length <= 1 && right.length <= 1);
}

/**
 * Says what is wrong with a version of Deno; `undefined` if it will do.
 *
 * Before 2.9, `node:tls` does not close what it opened, and on 2.8.3 a read from
 * a silent node never ends. Before 2.4, ssh would share the terminal.
 */
export function unsupportedDeno(
  version: string = Deno.version.deno,
): string | undefined {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  const isNewEnough = major > 2 || (major === 2 && minor >= 9);
  if (isNewEnough) return undefined;

  return `Deno ${version} cannot check nodes reliably: use Deno 2.9 or later`;
}

/**
 * Says in one line what went wrong. What `fetch` met is in its error's cause.
 */
function errorText(error: unknown): string {
  const hasCause = error instanceof Error && error.cause !== undefined;
  const reason = hasCause ? error.cause : error;

  return reason instanceof Error ? reason.message : String(reason);
}

/** Formats a duration for a sentence: `250 ms`, `1.5 s`, `60 s`. */
export function formatMs(ms: number): string {
  if (Math.round(ms) < 1000) return `${Math.round(ms)} ms`;

  const seconds = Number((ms / 1000).toFixed(2));
  return `${seconds} s`;
}

/**
 * Faults of TLS, by the texts of rustls (fetch) and the codes of `node:tls`.
 */
const TLS_FAULTS: readonly (readonly [pattern: RegExp, words: string])[] = [
  [
    /Expired|CERT_HAS_EXPIRED/,
    "the certificate has expired",
  ],
  [
    /NotValidYet|CERT_NOT_YET_VALID/,
    "the certificate is not valid yet",
  ],
  [
    /NotValidForName|not valid for name|ERR_TLS_CERT_ALTNAME_INVALID/,
    "the certificate is for another name",
  ],
  [
    /CaUsedAsEndEntity/,
    "the certificate is self-signed by a CA: make one with CA:FALSE, " +
    "and name it in DENO_CERT",
  ],
  [
    /DEPTH_ZERO_SELF_SIGNED_CERT/,
    "the certificate is self-signed: name its file in DENO_CERT",
  ],
  [
    /UnknownIssuer|SELF_SIGNED_CERT_IN_CHAIN|UNABLE_TO_GET_ISSUER_CERT|UNABLE_TO_VERIFY_LEAF_SIGNATURE/,
    "the certificate is from an unknown CA: name that CA's file in DENO_CERT",
  ],
  [
    /corrupt message|InvalidContentType|ERR_SSL_WRONG_VERSION_NUMBER|ERR_SSL_PACKET_LENGTH_TOO_LONG/,
    "the server does not speak TLS",
  ],
];

/** Says in words what is wrong with TLS; `undefined` for any other fault. */
function tlsProblem(error: unknown): string | undefined {
  const { code = "" } = Object(error) as { code?: unknown };
  const text = `${code} ${errorText(error)}`;

  const known = TLS_FAULTS.find(([pattern]) => pattern.test(text));
  if (known) return known[1];

  const isTls = /certificate|\bTLS\b|HandshakeFailure|\bCERT_|ERR_(?:SSL|TLS)_/i
    .test(text);
  return isTls ? `TLS: ${text.trim().split(": ").at(-1)}` : undefined;
}

/** Returns the nodes as a list. Throws a `TypeError` on anything but nodes. */
function requireNodes(nodes: Iterable<ClusterNode>): ClusterNode[] {
  const given: unknown = nodes;
  const isIterable = typeof given !== "string" &&
    typeof Object(given)[Symbol.iterator] === "function";

  if (!isIterable || given instanceof Map) {
    throw new TypeError(
      `Expected a list of nodes, got ${givenName(given)}: ${nodesHint(given)}`,
    );
  }

  const list = [...nodes];
  const wrong = list.findIndex((node: unknown) =>
    !(node instanceof ClusterNode)
  );
  if (wrong >= 0) {
    const given = givenName(list[wrong]);
    throw new TypeError(
      `Expected a list of nodes, but item ${wrong + 1} is ${given}: ` +
        nodesHint(list[wrong]),
    );
  }

  return list;
}

/** Says what to pass where nodes are meant. */
function nodesHint(given: unknown): string {
  if (given instanceof Map) return "pass its values()";
  if (isPromise(given)) return "await it";
  if (given instanceof ClusterNode) return "put it in a list";

  return "pass ClusterNodes, such as those of getActiveNodes()";
}

/** Names what a caller gave, as in "got a Map". */
function givenName(value: unknown): string {
  if (isPromise(value)) return "a promise";
  if (value instanceof ClusterNode) return "one node";
  if (value instanceof Map) return "a Map";
  if (value instanceof Set) return "a Set";

  const isNamed = value === undefined || typeof value === "object";
  return isNamed ? typeName(value) : `a ${typeof value}`;
}

function isPromise(value: unknown): boolean {
  return typeof Object(value).then === "function";
}

/** Throws unless `ms` is a duration that a timer can wait for. */
function requireDuration(name: string, ms: number): void {
  // A longer delay overflows the timer, which then fires at once.
  if (typeof ms === "number" && ms > 0 && ms < 2 ** 31) return;

  throw new RangeError(
    `Cannot use ${name} ${ms}: expected milliseconds above 0 and below 2 ** 31`,
  );
}

/** Throws unless `count` is an integer from `least` to `most`. */
function requireCount(
  name: string,
  count: number,
  least: number,
  most: number = 2 ** 31,
): void {
  if (Number.isInteger(count) && count >= least && count <= most) return;

  throw new RangeError(
    `Cannot use ${name} ${count}: expected an integer from ${least} to ${most}`,
  );
}

/** Throws if `parse` refuses a value, or would take it for another one. */
function requireValue<T>(
  name: string,
  value: T,
  parse: (value: unknown) => Parsed<T>,
): void {
  const parsed = parse(value);
  if ("value" in parsed && parsed.value === value) return;

  const problem = "problem" in parsed
    ? parsed.problem
    : `expected ${JSON.stringify(parsed.value)}`;
  const message = `Cannot use ${name} ${JSON.stringify(value)}: ${problem}`;

  if (typeof value === "number") throw new RangeError(message);
  throw new TypeError(message);
}

// --- Host fields ---

/** A value as it is used, or what is wrong with what was written. */
export type Parsed<T> = { readonly value: T } | { readonly problem: string };

/** One field of a mapping. */
interface Field<T> {
  /** The key in the inventory. */
  readonly key: string;
  /** Parses what is written, trimmed; never called with an unset value. */
  readonly parse: (value: unknown) => Parsed<T>;
  /** The value of a field that is unset. */
  readonly fallback?: T;
  /** Whether a host that does not set it can derive it from another field. */
  readonly isDerived?: boolean;
}

type FieldTable = Readonly<Record<string, Field<unknown>>>;

const NO_OPTIONS: readonly string[] = Object.freeze([]);

/**
 * Every field of a host. To add one: a row here, and the documented property of
 * {@linkcode ClusterNode}.
 */
export const HOST_FIELDS = {
  tailscaleIp: { key: "tailscale_ip", parse: parseHost },
  sshHost: { key: "ssh_host", parse: parseSshHost },
  // The user in a host's own ssh_host counts more than that of `defaults`.
  sshUser: { key: "ssh_user", parse: parseUser, isDerived: true },
  sshKey: { key: "ssh_key", parse: parseKeyPath },
  sshPort: { key: "ssh_port", parse: parsePort, fallback: 22 },
  sshOptions: {
    key: "ssh_options",
    parse: parseSshOptions,
    fallback: NO_OPTIONS,
  },
  ringriftPath: {
    key: "ringrift_path",
    parse: parseText,
    fallback: "~/ringrift/ai-service",
  },
  status: { key: "status", parse: parseText, fallback: "unknown" },
  note: { key: "note", parse: parseNote },
  role: { key: "role", parse: parseText, fallback: "unknown" },
  memoryGb: { key: "memory_gb", parse: parseAmount, fallback: 0 },
  cpus: { key: "cpus", parse: parseAmount, fallback: 0 },
  gpu: { key: "gpu", parse: parseModel, fallback: "" },
  dataServerPort: {
    key: "data_server_port",
    parse: parsePort,
    fallback: DATA_SYNC_PORT,
  },
  dataServerUrl: { key: "data_server_url", parse: parseBaseUrl },
  statusPath: {
    key: "status_path",
    parse: parsePath,
    fallback: DEFAULT_STATUS_PATH,
  },
} satisfies {
  [K in Exclude<keyof ClusterNodeFields, "name" | "entry">]-?: Field<
    NonNullable<ClusterNode[K]>
  >;
};

type HostFieldName = keyof typeof HOST_FIELDS;

const HOST_FIELD_NAMES = Object.keys(HOST_FIELDS) as HostFieldName[];

/** The fields that say where one host is: `defaults` cannot give them. */
const ADDRESS_FIELDS: readonly Field<unknown>[] = [
  HOST_FIELDS.tailscaleIp,
  HOST_FIELDS.sshHost,
  HOST_FIELDS.dataServerUrl,
];

const ELO_SYNC_FIELDS = {
  coordinator: {
    key: "coordinator",
    parse: parseText,
    fallback: "mac-studio",
  },
  syncPort: { key: "sync_port", parse: parsePort, fallback: ELO_SYNC_PORT },
  syncInterval: { key: "sync_interval", parse: parseInterval, fallback: 300 },
  divergenceThreshold: {
    key: "divergence_threshold",
    parse: parseAmount,
    fallback: 50,
  },
  transports: {
    key: "transports",
    parse: parseTexts,
    fallback: Object.freeze(["tailscale", "aria2", "http"]),
  },
} satisfies { [K in keyof EloSyncConfig]-?: Field<EloSyncConfig[K]> };

/**
 * The one field that `distributed`, a section of another program, gives to
 * hosts.
 */
const DISTRIBUTED_FIELDS = {
  dataServerPort: { key: "data_server_port", parse: parsePort },
} satisfies FieldTable;

/** A field that is invalid: its name in scripts, its key, and what is wrong. */
interface FieldProblem {
  readonly name: string;
  readonly key: string;
  readonly problem: string;
}

/**
 * Parses the fields of a table. A field that is unset or invalid has its
 * fallback as the value.
 */
function parseFields(
  table: FieldTable,
  valueOf: (name: string, key: string) => unknown,
): { values: Record<string, unknown>; problems: FieldProblem[] } {
  const values: Record<string, unknown> = {};
  const problems: FieldProblem[] = [];

  for (const name in table) {
    const { key, parse, fallback } = table[name]!;
    const written = valueOf(name, key);

    values[name] = fallback;
    if (isUnset(written)) continue;

    const trimmed = typeof written === "string" ? written.trim() : written;
    const parsed = parse(trimmed);

    if ("problem" in parsed) {
      problems.push({ name, key, problem: parsed.problem });
    } else {
      values[name] = parsed.value;
    }
  }

  return { values, problems };
}

/** Returns the keys of a table's fields. */
function keysOf(table: FieldTable): string[] {
  return Object.values(table).map(({ key }) => key);
}

/** Reports whether a value is null, a blank text or a `<placeholder>`. */
function isUnset(value: unknown): boolean {
  if (typeof value !== "string") return value === undefined || value === null;

  const text = value.trim();
  return text === "" || isPlaceholder(text);
}

function isPlaceholder(text: string): boolean {
  return /^(?:[^@]*@)?<[^<>]*>$/.test(text);
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Names the type of a value as people know it from YAML: "a list". */
function typeName(value: unknown): string {
  if (value === null || value === undefined) return "nothing";
  if (Array.isArray(value)) return "a list";
  if (typeof value === "object") return "a mapping";

  return typeof value === "string" ? "text" : `a ${typeof value}`;
}

// deno-lint-ignore no-control-regex
const CONTROL_CHARACTER = /[\x00-\x1f\x7f-\x9f]/;

function hasControlCharacter(text: string): boolean {
  return CONTROL_CHARACTER.test(text);
}

function parseText(value: unknown): Parsed<string> {
  if (typeof value !== "string") return { problem: notTextProblem(value) };
  if (hasControlCharacter(value)) {
    return { problem: "holds a control character" };
  }

  return { value };
}

/** Says how to fix what YAML reads as something other than text. */
function notTextProblem(value: unknown): string {
  const hint = Array.isArray(value)
    ? "write one value, or put it in quotes"
    : "put it in quotes";

  return `expected text, got ${typeName(value)}: ${hint}`;
}

/** Parses a text for people, which may have several lines. */
function parseNote(value: unknown): Parsed<string> {
  if (typeof value !== "string") return parseText(value);

  const onOneLine = parseText(value.replace(/[\n\t]/g, " "));
  return "problem" in onOneLine ? onOneLine : { value };
}

/** Parses the name of a model, of which some are numbers: `gpu: 4090`. */
function parseModel(value: unknown): Parsed<string> {
  return parseText(Number.isFinite(value) ? String(value) : value);
}

function parseTexts(value: unknown): Parsed<readonly string[]> {
  const isList = Array.isArray(value) &&
    value.every((item) => "value" in parseText(item));

  if (!isList) return { problem: "expected a list of texts" };
  return { value: Object.freeze([...value]) };
}

// The characters are spelt out because a class such as \p{Cf} takes longer to
// compile than a small inventory takes to load.
const UNSAFE_CHARACTER =
  // deno-lint-ignore no-control-regex
  /[\s\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff;&|<>()$`\\"'*?[\]{}!#%^]/;

/** Parses a text that neither ssh nor a shell can take for something else. */
function parseWord(value: unknown, what: string = "a word"): Parsed<string> {
  const text = parseText(value);
  if ("problem" in text) return text;

  if (text.value.startsWith("-")) {
    return { problem: `expected ${what}, got one that begins with "-"` };
  }
  if (UNSAFE_CHARACTER.test(text.value)) {
    return {
      problem: `expected ${what}, without spaces or characters that a shell ` +
        "would interpret",
    };
  }

  return text;
}

function parseKeyPath(value: unknown): Parsed<string> {
  return parseWord(value, "the path of a key");
}

/**
 * Parses a host name or an address, without user, port and path.
 *
 * A name that is not ASCII becomes ASCII, as DNS, ssh and Deno's permissions
 * want it. One that is ASCII stays as it is written.
 */
function parseHost(value: unknown): Parsed<string> {
  const text = parseText(value);
  if ("problem" in text) return text;

  const host = withoutBrackets(text.value);
  const colon = host.indexOf(":");
  const isIpv6 = colon >= 0 && colon !== host.lastIndexOf(":");

  if (/^[^:]+:\d+$/.test(host)) {
    return {
      problem: "expected a host without a port: put the port in its own field",
    };
  }
  if (host === "" || /[/@,]/.test(host) || (colon >= 0 && !isIpv6)) {
    return {
      problem:
        "expected a host name or an address alone, without user, port or path",
    };
  }
  if (isIpv6) return parseIpv6(host);

  const word = parseWord(host, "a host name or an address");
  if ("problem" in word) return word;

  if (/^[\d.]+$/.test(host) && !isIpv4(host)) {
    return {
      problem: "expected a host name or an address: not a valid IPv4 address",
    };
  }
  // deno-lint-ignore no-control-regex
  return /^[\x00-\x7f]*$/.test(host) ? word : toAscii(host);
}

function isIpv4(text: string): boolean {
  return /^(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}$/.test(text);
}

/** Parses an IPv6 address. It may have a zone, as in `fe80::1%eth0`. */
function parseIpv6(text: string): Parsed<string> {
  const address = withoutZone(text);
  const hasZone = address !== text;
  const zone = text.slice(address.length + 1);

  const isIpv6 = /^[\da-f:.]+$/i.test(address) &&
    URL.canParse(`http://[${address}]`);
  if (!isIpv6) {
    return {
      problem: "expected a host name or an address: not a valid IPv6 address",
    };
  }
  if (hasZone && !/^\w[\w.-]*$/.test(zone)) {
    return { problem: "expected the name of a network interface after the %" };
  }

  return { value: text };
}

function toAscii(host: string): Parsed<string> {
  const url = `http://${host}`;
  if (!URL.canParse(url)) {
    return {
      problem: "expected a host name or an address: not a valid host name",
    };
  }

  return parseWord(new URL(url).hostname, "a host name or an address");
}

function withoutBrackets(host: string): string {
  return host.startsWith("[") && host.endsWith("]") ? host.slice(1, -1) : host;
}

/** Parses a host, or `user@host`. */
function parseSshHost(value: unknown): Parsed<string> {
  const text = parseText(value);
  if ("problem" in text) return text;

  const { user, host } = splitUser(text.value);
  if (/^[^:/]+:\d+$/.test(host) || /^\[.*\]:\d+$/.test(host)) {
    return {
      problem: "expected a host without a port: put the port in ssh_port",
    };
  }

  const parsedHost = parseHost(host);
  if ("problem" in parsedHost || user === undefined) return parsedHost;

  const parsedUser = parseUser(user);
  if ("problem" in parsedUser) return parsedUser;

  return { value: `${parsedUser.value}@${parsedHost.value}` };
}

/** Splits `user@host`. */
function splitUser(
  sshHost: string,
): { user: string | undefined; host: string } {
  const at = sshHost.lastIndexOf("@");
  if (at < 0) return { user: undefined, host: sshHost };

  return { user: sshHost.slice(0, at), host: sshHost.slice(at + 1) };
}

function parseUser(value: unknown): Parsed<string> {
  const word = parseWord(value, "a user name");
  if ("problem" in word) return word;

  if (word.value === "" || /[@:/]/.test(word.value)) {
    return { problem: "expected a user name alone" };
  }
  return word;
}

const LEADING_ZERO = "has a leading zero: remove it";

const NOT_PLAIN = "write it as a plain number";

function parsePort(value: unknown): Parsed<number> {
  if (typeof value === "string" && /^0\d/.test(value)) {
    return { problem: LEADING_ZERO };
  }

  const isDigits = typeof value === "string" && /^[1-9]\d{0,4}$/.test(value);
  const port = isDigits ? Number(value) : value;

  const isPort = typeof port === "number" && Number.isInteger(port) &&
    port >= 1 && port <= 65535;
  if (isPort) return { value: port };

  return { problem: "expected an integer from 1 to 65535" };
}

function parseAmount(value: unknown): Parsed<number> {
  const amount = typeof value === "string" ? Number(value) : value;

  const isAmount = typeof amount === "number" && Number.isFinite(amount) &&
    amount >= 0;
  if (isAmount) return { value: amount };

  return { problem: "expected a number, 0 or more" };
}

function parseInterval(value: unknown): Parsed<number> {
  const amount = parseAmount(value);
  if ("value" in amount && amount.value > 0) return amount;

  return { problem: "expected a number of seconds, more than 0" };
}

/** Parses a base URL to its one spelling, so that one server is one URL. */
function parseBaseUrl(value: unknown): Parsed<string> {
  const text = parseText(value);
  if ("problem" in text) return text;

  const problem = "expected an http:// or https:// URL, " +
    "without user, query, fragment, spaces or quotes";
  const hasForm = /^https?:\/\/[^\s"'`<>\\?#]*$/i.test(text.value);
  if (!hasForm || !URL.canParse(text.value)) return { problem };

  const { protocol, host, port, pathname, username, password } = new URL(
    text.value,
  );
  if (port === "0" || username !== "" || password !== "") return { problem };

  return { value: `${protocol}//${host}${withoutSlashes(pathname)}` };
}

/** Drops the slashes at the end of a path. */
function withoutSlashes(path: string): string {
  let end = path.length;
  while (path[end - 1] === "/") end--;

  return path.slice(0, end);
}

function parsePath(value: unknown): Parsed<string> {
  const path = parseText(value);
  if ("problem" in path) return path;

  const isPath = /^\/[!"$-~]*$/.test(path.value);
  if (isPath) return path;

  return { problem: 'expected a path that begins with "/", URL-encoded' };
}

function parseSshOptions(value: unknown): Parsed<readonly string[]> {
  if (!Array.isArray(value)) {
    return {
      problem: "expected a list of KEY=VALUE, such as [ProxyJump=head]",
    };
  }

  const options: string[] = [];
  for (const item of value) {
    const option = parseSshOption(item);
    if ("problem" in option) return option;

    options.push(option.value);
  }

  return { value: Object.freeze(options) };
}

/** Words of an ssh config file alone; `Match` could also run a program. */
const SSH_FILE_WORDS = ["host", "match", "include"];

/**
 * Options whose values ssh puts in other programs' command lines, or in paths.
 */
const SSH_WORD_OPTIONS = ["hostname", "hostkeyalias", "user", "identityfile"];

/** Options that run a program on this machine, or load one. */
const SSH_PROGRAM_OPTIONS = [
  "proxycommand",
  "localcommand",
  "permitlocalcommand",
  "knownhostscommand",
  "pkcs11provider",
  "smartcarddevice",
  "securitykeyprovider",
  "xauthlocation",
];

/**
 * Parses one option of ssh_config(5), `KEY=VALUE`. Spaces around the `=` are
 * left out.
 */
function parseSshOption(value: unknown): Parsed<string> {
  const text = parseText(value);
  if ("problem" in text) return text;

  const [, key, written] = /^\s*([a-z][a-z\d]*)\s*=(.*)$/i.exec(text.value) ??
    [];
  const setting = written?.trim();
  if (key === undefined || setting === undefined || setting === "") {
    return { problem: "expected KEY=VALUE, as in ssh_config(5)" };
  }

  const problem = sshSettingProblem(key, setting);
  return problem === undefined ? { value: `${key}=${setting}` } : { problem };
}

/** Says what is wrong with the value of an option of ssh. */
function sshSettingProblem(key: string, setting: string): string | undefined {
  const word = key.toLowerCase();
  if (SSH_FILE_WORDS.includes(word)) {
    return `${key} works only in an ssh config file, not as an option`;
  }

  if (word === "proxyjump") {
    const hops = setting.split(",").map((hop) => parseJumpHost(hop.trim()));
    const wrong = hops.find((hop) => "problem" in hop);
    return wrong && "problem" in wrong ? `${key}: ${wrong.problem}` : undefined;
  }

  const parsed = SSH_WORD_OPTIONS.includes(word)
    ? parseWord(setting)
    : parseText(setting);
  return "problem" in parsed ? `${key}: ${parsed.problem}` : undefined;
}

/**
 * Parses one host of ProxyJump: `[user@]host[:port]`, also as an `ssh://` URL.
 */
function parseJumpHost(text: string): Parsed<string> {
  const hop = text.replace(/^ssh:\/\//i, "");

  // An IPv6 address without brackets cannot carry a port.
  const [suffix = "", digits] = /(?<=^[^:]*|\]):(\d+)$/.exec(hop) ?? [];
  const port = digits === undefined ? undefined : parsePort(digits);
  if (port && "problem" in port) return port;

  return parseSshHost(hop.slice(0, hop.length - suffix.length));
}

/** Reports whether an option of ssh runs or loads a program on this machine. */
function runsProgramHere(option: string): boolean {
  const [key = ""] = option.split("=", 1);
  return SSH_PROGRAM_OPTIONS.includes(key.toLowerCase());
}

// --- ClusterNode, EloSyncConfig ---

/** The user of a node that was given none. */
interface DerivedUser {
  /** The user in `sshHost`, else the fallback. */
  readonly user: string;
  /** That of `defaults`, else {@linkcode DEFAULT_SSH_USER}. */
  readonly fallback: string;
}

/**
 * The derived users, by the nodes' entries: each node has an entry of its own,
 * which `{ ...node }` takes along.
 */
const derivedUsers = new WeakMap<HostEntry, DerivedUser>();

/**
 * One node of the cluster, with the defaults applied. It is frozen.
 *
 * @example Make a node, and another one like it
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const node = new ClusterNode({ name: "gpu-1", sshHost: "root@192.0.2.1" });
 * assertEquals(node.sshUser, "root");
 * assertEquals(node.dataServerBaseUrl, "http://192.0.2.1:8766");
 *
 * const other = new ClusterNode({ ...node, sshHost: "ops@192.0.2.2" });
 * assertEquals(other.sshUser, "ops");
 * ```
 */
export class ClusterNode {
  /** The name in the inventory. */
  readonly name!: string;
  /**
   * The address inside the tailnet, which is tried first.
   *
   * @default {undefined}
   */
  readonly tailscaleIp!: string | undefined;
  /** A host, or `user@host`. @default {undefined} */
  readonly sshHost!: string | undefined;
  /**
   * The SSH user: the one that is set, else the one in `sshHost`.
   *
   * In `{ ...node, sshHost }`, one that was not set is that of the new host. To
   * keep it all the same, write it there: `root@192.0.2.2`.
   *
   * @default {"ubuntu"}
   */
  readonly sshUser!: string;
  /** The path of the SSH private key. @default {undefined} */
  readonly sshKey!: string | undefined;
  /** The SSH port. @default {22} */
  readonly sshPort!: number;
  /** Options of ssh_config(5), each `KEY=VALUE`. @default {[]} */
  readonly sshOptions!: readonly string[];
  /**
   * The folder of the service on the node.
   *
   * @default {"~/ringrift/ai-service"}
   */
  readonly ringriftPath!: string;
  /** A word such as `active`, `ready` or `offline`. @default {"unknown"} */
  readonly status!: string;
  /**
   * A remark for people, such as why the node is out of service.
   *
   * @default {undefined}
   */
  readonly note!: string | undefined;
  /** A word such as `coordinator` or `worker`. @default {"unknown"} */
  readonly role!: string;
  /** Memory in GB; 0 if it is not known. @default {0} */
  readonly memoryGb!: number;
  /** The number of CPU cores; 0 if it is not known. @default {0} */
  readonly cpus!: number;
  /** The GPU model; empty if there is none. @default {""} */
  readonly gpu!: string;
  /** The port of the data server. @default {8766} */
  readonly dataServerPort!: number;
  /**
   * The base URL of the data server, if it is not `http://ADDRESS:PORT`.
   *
   * @default {undefined}
   */
  readonly dataServerUrl!: string | undefined;
  /** The path that answers a check. @default {"/status"} */
  readonly statusPath!: string;
  /**
   * The host's mapping as written, for keys of the user's own.
   *
   * @default {{}}
   */
  readonly entry!: HostEntry;

  /**
   * Creates a node. Null, a blank text and a `<placeholder>` mean unset.
   *
   * @throws {TypeError} if a field is invalid; the message lists every one
   */
  constructor(fields: ClusterNodeFields) {
    const { values, origin } = parseNode(fields);
    completeNode(this, values, origin);
  }

  /**
   * The address to use: the Tailscale one, else the host of `sshHost`;
   * `undefined` if there is neither.
   */
  get bestIp(): string | undefined {
    return this.addresses[0];
  }

  /** Every distinct address, best first. */
  get addresses(): string[] {
    const { tailscaleIp, sshHost } = this;
    const addresses = tailscaleIp === undefined ? [] : [tailscaleIp];
    if (sshHost === undefined) return addresses;

    const { host } = splitUser(sshHost);
    if (host !== tailscaleIp) addresses.push(host);
    return addresses;
  }

  /**
   * `dataServerUrl`, else `http://ADDRESS:PORT`, without a slash at the end;
   * `undefined` if there is neither.
   */
  get dataServerBaseUrl(): string | undefined {
    const [endpoint] = dataEndpoints(this);
    return endpoint && endpointUrl(endpoint);
  }

  /**
   * Whether the status, ignoring case, is none of `terminated`, `offline`,
   * `setup`, `retired` and `archived`.
   */
  get isActive(): boolean {
    return !INACTIVE_STATUSES.includes(this.status.toLowerCase());
  }
}

/** Parses what a script makes a node of. Throws a `TypeError` of all faults. */
function parseNode(
  fields: ClusterNodeFields,
): { values: Record<string, unknown>; origin: NodeOrigin } {
  const { name, entry = {} } = fields;

  const { values, problems } = parseFields(
    HOST_FIELDS,
    (field) => fields[field as HostFieldName],
  );
  const faults = problems.map(({ name, problem }) => `${name}: ${problem}`);

  const nameProblem = findNameProblem(name);
  if (nameProblem !== undefined) faults.unshift(`name: ${nameProblem}`);
  if (!isMapping(entry)) faults.push("entry: expected a mapping");

  if (faults.length > 0) {
    const list = faults.join("; ");
    throw new TypeError(`Cannot make node ${JSON.stringify(name)}: ${list}`);
  }

  // Copied from another node, a derived user is derived anew.
  const derived = derivedUsers.get(entry);
  if (values.sshUser === derived?.user) values.sshUser = undefined;

  const origin = { name, entry, fallbackUser: derived?.fallback };
  return { values, origin };
}

/** Makes a node of values that are parsed already. */
function nodeOf(
  values: Readonly<Record<string, unknown>>,
  origin: NodeOrigin,
): ClusterNode {
  const node: ClusterNode = Object.create(ClusterNode.prototype);
  return completeNode(node, values, origin);
}

/** What a node has besides its fields. */
interface NodeOrigin {
  readonly name: string;
  readonly entry: HostEntry;
  /** @default {DEFAULT_SSH_USER} */
  readonly fallbackUser: string | undefined;
}

/** Sets the properties of a node, its user among them, and freezes it. */
function completeNode(
  node: ClusterNode,
  values: Readonly<Record<string, unknown>>,
  { name, entry: written, fallbackUser = DEFAULT_SSH_USER }: NodeOrigin,
): ClusterNode {
  const isOwn = Object.isFrozen(written) && !derivedUsers.has(written);
  const entry = isOwn ? written : Object.freeze({ ...written });
  Object.assign(node, { name }, values, { entry });

  if (values.sshUser === undefined) {
    const { user = fallbackUser } = splitUser(node.sshHost ?? "");
    Object.assign(node, { sshUser: user });
    derivedUsers.set(entry, { user, fallback: fallbackUser });
  }

  return Object.freeze(node);
}

/** Says what is wrong with a host's name. */
function findNameProblem(name: unknown): string | undefined {
  if (typeof name !== "string" || name.trim() === "") {
    return "a host's name is blank";
  }
  if (hasControlCharacter(name)) return "a host's name has a control character";
  if (!/[,[\]*?]/.test(name) && name.trim() === name) return undefined;

  return "a host's name may hold no comma, bracket, wildcard, or leading or " +
    "trailing space, since it could not be selected by name";
}

/**
 * What a {@linkcode ClusterNode} is made of: its name, and any other fields.
 */
export type ClusterNodeFields =
  & Pick<ClusterNode, "name">
  & {
    readonly [
      K in keyof Omit<
        ClusterNode,
        "name" | "bestIp" | "addresses" | "dataServerBaseUrl" | "isActive"
      >
    ]?: ClusterNode[K] | undefined;
  };

/** How the Elo ratings database is synchronised. It is frozen. */
export interface EloSyncConfig {
  /** The name of the coordinator's node. @default {"mac-studio"} */
  readonly coordinator: string;
  /** The port of the database on each node. @default {8766} */
  readonly syncPort: number;
  /** Seconds between two rounds. @default {300} */
  readonly syncInterval: number;
  /** Elo points by which two databases may differ. @default {50} */
  readonly divergenceThreshold: number;
  /**
   * The transports to try, best first.
   *
   * @default {["tailscale", "aria2", "http"]}
   */
  readonly transports: readonly string[];
}

// --- Reading ---

/**
 * A path, a URL (`file:`, `http:` or `https:`), or a config: one that is loaded
 * already, or `{ hosts }` written in place.
 */
export type ConfigSource = string | URL | HostsConfig;

/**
 * One host as written, with snake_case keys; config/README.md lists the known
 * ones.
 */
export type HostEntry = Readonly<Record<string, unknown>>;

/**
 * An inventory as written, with unknown sections kept: a finite tree, frozen if
 * it was parsed here. To edit one, `structuredClone` it.
 */
export type HostsConfig = {
  readonly hosts: Readonly<Record<string, HostEntry>>;
  readonly defaults?: HostEntry | null;
  readonly elo_sync?: Readonly<Record<string, unknown>> | null;
  readonly [section: string]: unknown;
};

/** The text of an inventory, before it is parsed. */
export interface ConfigText {
  /** The text; empty if there is no file. */
  readonly text: string;
  /** The path or URL for people: without a user and password in the URL. */
  readonly origin: string;
  /** Whether there is a file. Only the default one may be missing. */
  readonly exists: boolean;
}

/** Options of {@linkcode loadHostsConfig}. */
export interface LoadOptions {
  /** Milliseconds within which a URL must have answered. @default {5000} */
  readonly timeoutMs?: number | undefined;
  /**
   * Aborts the loading, which then rejects with the signal's reason.
   *
   * @default {undefined}
   */
  readonly signal?: AbortSignal | undefined;
}

/** What was read, or why it cannot be. */
type Read<T> =
  | { readonly value: T }
  | { readonly problem: string; readonly cause?: unknown };

/**
 * Reads the text that {@linkcode loadHostsConfig} would load.
 *
 * Of a default file that is missing, it returns an empty text that does not
 * exist.
 *
 * @throws {HostsConfigError} if it cannot be read
 */
export async function readHostsConfig(
  source?: string | URL,
  options: LoadOptions = {},
): Promise<ConfigText> {
  const { timeoutMs = DEFAULTS.timeoutMs, signal } = options;
  requireSource(source);
  requireDuration("timeoutMs", timeoutMs);
  signal?.throwIfAborted();

  const named = source ?? readVariable(CONFIG_VARIABLE);
  const address = String(named ?? DEFAULT_CONFIG_PATH);
  const origin = withoutCredentials(address);

  const read = isHttp(address)
    ? await fetchText(address, { timeoutMs, signal })
    : await readTextFile(address);
  if ("value" in read) return { text: read.value, origin, exists: true };

  if (named === undefined && isMissing(read)) {
    return { text: "", origin, exists: false };
  }

  const isNamedByVariable = source === undefined && named !== undefined;
  throw readError(origin, {
    ...read,
    namedBy: isNamedByVariable ? CONFIG_VARIABLE : undefined,
  });
}

/** Why a file or a URL could not be read. */
interface ReadFault {
  readonly problem: string;
  readonly cause?: unknown;
  /** The variable that names it. */
  readonly namedBy?: string | undefined;
}

/** Makes an error of what could not be read. */
function readError(
  origin: string,
  { problem, cause, namedBy }: ReadFault,
): HostsConfigError {
  const hint = namedBy === undefined ? "" : ` (${namedBy} names it)`;

  const problems = [{ path: "", message: problem + hint }];
  return new HostsConfigError(origin, problems, { cause });
}

function isMissing(read: { cause?: unknown }): boolean {
  return read.cause instanceof Deno.errors.NotFound;
}

function isHttp(address: string): boolean {
  return /^https?:/i.test(address);
}

/** Drops user and password from a URL that is shown. */
function withoutCredentials(address: string): string {
  if (!isHttp(address)) return address;

  // If it does not parse, a password may hold anything: up to the last "@".
  const credentials = URL.canParse(address)
    ? /^(https?:\/*)[^/?#]*@/i
    : /^(https?:\/*).*@/is;
  return address.replace(credentials, "$1");
}

async function readTextFile(address: string): Promise<Read<string>> {
  const path = filePath(address);
  if ("problem" in path) return path;

  requirePermission(
    { name: "read", path: path.value },
    `--allow-read=${path.value}`,
  );

  try {
    return decodeText(await Deno.readFile(path.value));
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    return { problem: fileProblem(cause), cause };
  }
}

/** Returns the path of a file: the address itself, or that of a `file:` URL. */
export function filePath(address: string): Parsed<string> {
  const scheme = /^([a-z][a-z\d+.-]+):/i.exec(address)?.[1]?.toLowerCase();
  if (scheme !== "file") {
    const isUrl = address.startsWith("://", scheme?.length);
    if (!scheme || !isUrl) return { value: address };

    return { problem: "expected a path, or a file:, http: or https: URL" };
  }

  if (!URL.canParse(address)) return { problem: "is not a URL" };

  const { hostname, pathname, search, hash } = new URL(address);
  const isAbsolute = address.startsWith("/", "file:".length);
  if (!isAbsolute) {
    return { problem: "is not absolute: write file:/// before the whole path" };
  }
  if (hostname !== "") {
    return { problem: "is on another host: write file:/// before the path" };
  }
  if (search !== "" || hash !== "") {
    return { problem: 'has a "?" or "#": write "%3F" or "%23" in a path' };
  }

  try {
    return { value: decodeURIComponent(pathname) };
  } catch {
    return { problem: 'is not a URL: write "%25" for each "%" of the path' };
  }
}

function fileProblem(error: unknown): string {
  if (error instanceof Deno.errors.NotFound) return "there is no such file";
  if (error instanceof Deno.errors.IsADirectory) {
    return "is a folder, not a file";
  }

  return `cannot be read (${errorText(error)})`;
}

function decodeText(bytes: Uint8Array): Read<string> {
  try {
    return { value: new TextDecoder("utf-8", { fatal: true }).decode(bytes) };
  } catch (cause) {
    const encoding = hasUtf16Bom(bytes) ? "UTF-16" : "not UTF-8";
    return { problem: `is ${encoding}: save it as UTF-8`, cause };
  }
}

function hasUtf16Bom([first, second]: Uint8Array): boolean {
  const isLittleEndian = first === 0xff && second === 0xfe;
  const isBigEndian = first === 0xfe && second === 0xff;

  return isLittleEndian || isBigEndian;
}

/**
 * Fetches a text without following redirects. Proxies of the environment apply.
 */
async function fetchText(
  address: string,
  options: { timeoutMs: number; signal: AbortSignal | undefined },
): Promise<Read<string>> {
  const { timeoutMs, signal } = options;
  if (!URL.canParse(address)) return { problem: "is not a URL" };

  const { hostname, port, protocol } = new URL(address);
  requireNet(
    withoutBrackets(hostname),
    Number(port) || DEFAULT_PORTS[protocol]!,
  );

  const timeout = AbortSignal.timeout(timeoutMs);
  const ended = signal ? AbortSignal.any([timeout, signal]) : timeout;

  try {
    // A redirect could lead to a host that no permission was given for.
    const response = await fetch(address, {
      redirect: "manual",
      signal: ended,
    });
    const bytes = await readResponse(response);
    return "problem" in bytes ? bytes : decodeText(bytes.value);
  } catch (error) {
    signal?.throwIfAborted();

    // The error itself is not kept, as it shows the URL with its password.
    if (timeout.aborted) {
      return { problem: `did not answer within ${formatMs(timeoutMs)}` };
    }
    return { problem: tlsProblem(error) ?? fetchProblem(error) };
  }
}

/** Reads the body of an answer, if it can be an inventory. */
async function readResponse(
  response: Response,
): Promise<Parsed<Uint8Array>> {
  const problem = responseProblem(response);
  if (problem !== undefined) {
    await response.body?.cancel();
    return { problem };
  }

  const chunks: Uint8Array<ArrayBuffer>[] = [];
  let size = 0;

  for await (const chunk of response.body ?? []) {
    size += chunk.length;
    if (size > MAX_CONFIG_BYTES) {
      return { problem: "is larger than 16 MiB: is it an inventory?" };
    }
    chunks.push(chunk);
  }

  return { value: await new Blob(chunks).bytes() };
}

function responseProblem({ status, headers }: Response): string | undefined {
  if (status >= 300 && status < 400) {
    return `answered HTTP ${status}, a redirect: use the URL it leads to`;
  }
  if (status !== 200) return `answered HTTP ${status}`;

  const isHtml = /\bhtml\b/i.test(headers.get("content-type") ?? "");
  return isHtml ? "is HTML, not YAML" : undefined;
}

function fetchProblem(error: unknown): string {
  // What fetch says is a chain in which the URL comes before the reason.
  const reason = errorText(error).split(": ").at(-1);
  return `cannot be fetched (${reason})`;
}

/**
 * Creates the error for a default inventory that is missing: which file, in
 * which folder, and what to do.
 *
 * @param alternative a variable that could stand for an inventory
 */
export function missingInventory(alternative?: string): HostsConfigError {
  const canRead = isGranted({ name: "read", path: "." });
  const folder = canRead ? Deno.cwd() : "the working directory";

  const advice = ["name an inventory (--config)"];
  for (const variable of [CONFIG_VARIABLE, alternative]) {
    if (variable !== undefined) advice.push(settingAdvice(variable));
  }
  if (fileExists(EXAMPLE_CONFIG_PATH)) {
    advice.push(`copy ${EXAMPLE_CONFIG_PATH} to that name`);
  }

  const message = `there is no such file in ${folder}: ${advice.join(", or ")}`;
  return new HostsConfigError(DEFAULT_CONFIG_PATH, [{ path: "", message }]);
}

/** Says how to set a variable, and the flag with which it may be read. */
function settingAdvice(variable: string): string {
  const canRead = isGranted({ name: "env", variable });
  const flag = canRead ? "" : ` (and run with --allow-env=${variable})`;

  return `set ${variable}${flag}`;
}

/** Reports whether there is a file; false if that may not be known. */
function fileExists(path: string): boolean {
  if (!isGranted({ name: "read", path })) return false;

  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

function isGranted(permission: Deno.PermissionDescriptor): boolean {
  return Deno.permissions.querySync(permission).state === "granted";
}

/**
 * Reads an environment variable, trimmed; `undefined` if it is not set, is
 * blank or may not be read.
 */
export function readVariable(name: string): string | undefined {
  if (!isGranted({ name: "env", variable: name })) return undefined;

  const value = Deno.env.get(name)?.trim();
  return value === "" ? undefined : value;
}

// --- Parsing ---

/** An inventory, and what it says. */
interface ParsedConfig {
  readonly config: HostsConfig;
  /** The valid nodes, in the order of the file. */
  readonly nodes: Map<string, ClusterNode>;
  readonly eloSync: EloSyncConfig;
  /**
   * Whether a node takes its data port from {@linkcode
   * UNIFIED_CONFIG_VARIABLE}.
   */
  readonly needsUnifiedPort: boolean;
}

/** What was found in an inventory: it can be used if there is no problem. */
interface Inspection {
  readonly parsed?: ParsedConfig;
  readonly problems: readonly ConfigProblem[];
  /** Warnings about spelling, which nothing but the text shows. */
  readonly warnings: readonly ConfigProblem[];
}

/**
 * What the configs that were parsed here say. They are frozen, so it stays
 * true.
 */
const parsedConfigs = new WeakMap<object, ParsedConfig>();

/**
 * Loads an inventory: the file, URL or object given, else the file named by
 * `RINGRIFT_HOSTS_CONFIG`, else {@linkcode DEFAULT_CONFIG_PATH}.
 *
 * Give the result to every function that takes a source, and the file is read
 * once.
 *
 * @example Load an inventory once, and use it twice
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const config = await loadHostsConfig({
 *   hosts: { head: { tailscale_ip: "100.64.0.1" } },
 *   elo_sync: { coordinator: "head" },
 * });
 *
 * const [node] = await getActiveNodes(config);
 * assertEquals(node?.bestIp, "100.64.0.1");
 * assertEquals((await getEloSyncConfig(config)).coordinator, "head");
 * ```
 *
 * @throws {HostsConfigError} if it is missing, cannot be read, or has problems
 */
export async function loadHostsConfig(
  source?: ConfigSource,
  options: LoadOptions = {},
): Promise<HostsConfig> {
  const { config } = await loadParsed(source, options);
  return config;
}

async function loadParsed(
  source?: ConfigSource,
  options: LoadOptions = {},
): Promise<ParsedConfig> {
  const parsed = await loadIfThere(source, options);
  if (!parsed) throw missingInventory();

  return parsed;
}

/**
 * Loads an inventory; returns `undefined` if it is the default file and missing.
 */
async function loadIfThere(
  source?: ConfigSource,
  options: LoadOptions = {},
): Promise<ParsedConfig | undefined> {
  if (typeof source === "object" && !(source instanceof URL)) {
    return parseConfigObject(source);
  }

  const { text, origin, exists } = await readHostsConfig(source, options);
  if (!exists) return undefined;

  return requireParsed(inspectText(text, origin), origin);
}

/** Throws a `TypeError` if `source` is not a path, a URL or a config. */
function requireSource(source: unknown): void {
  if (isPromise(source)) {
    throw new TypeError("Expected an inventory, got a promise: await it");
  }

  const isText = typeof source === "string" && source.trim() !== "";
  const isConfig = typeof source === "object" && source !== null &&
    !(source instanceof Map);
  if (source !== undefined && !isText && !isConfig) {
    const given = typeof source === "string"
      ? "a blank text"
      : givenName(source);
    throw new TypeError(
      `Expected a path, a URL or a config such as { hosts }, got ${given}`,
    );
  }

  const { hosts } = Object(source) as { hosts?: unknown };
  if (hosts instanceof Map) {
    throw new TypeError(
      "Expected hosts to be an object, got a Map: use Object.fromEntries()",
    );
  }
}

/** Parses a caller's object every time, since it may have changed. */
function parseConfigObject(source: HostsConfig): ParsedConfig {
  requireSource(source);

  const known = parsedConfigs.get(source);
  if (known) return known;

  const origin = "config object";
  if (treeSize(source) === Infinity) {
    const message = "holds itself, or is nested too deeply";
    throw new HostsConfigError(origin, [{ path: "", message }]);
  }

  return requireParsed(inspectDocument(source), origin);
}

/** Returns what was parsed. Throws all the problems, if there are any. */
function requireParsed(inspection: Inspection, origin: string): ParsedConfig {
  const { parsed, problems } = inspection;
  if (parsed && problems.length === 0) return parsed;

  throw new HostsConfigError(origin, problems);
}

/**
 * Parses the text of an inventory; `origin` names it in errors. An empty text is
 * an empty cluster.
 *
 * @throws {HostsConfigError} if it has problems
 */
export function parseHostsConfig(
  text: string,
  origin: string = "inventory",
): HostsConfig {
  return requireParsed(inspectText(text, origin), origin).config;
}

/** What {@linkcode validateHostsConfig} finds, in the order of the file. */
export interface ConfigReport {
  /** The inventory, if it has no problem. */
  config?: HostsConfig;
  /** What is wrong. */
  problems: ConfigProblem[];
  /** What is allowed, and probably not meant. */
  warnings: ConfigProblem[];
}

/**
 * Finds every problem of an inventory, and what is allowed and probably not
 * meant: warnings. Both are in the order of the file.
 *
 * @example Check an inventory before it is used
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const text = "hosts: { gpu-1: { ssh_host: 192.0.2.1, stauts: ready } }";
 * const { problems, warnings } = validateHostsConfig(text);
 *
 * assertEquals(problems, []);
 * assertEquals(warnings[0]?.message, 'unknown key; did you mean "status"?');
 * ```
 */
export function validateHostsConfig(text: string): ConfigReport {
  return inspectConfig(text, "inventory");
}

/**
 * Does what {@linkcode validateHostsConfig} does for a text from `origin`: what
 * came by http(s) may not say which programs run on this machine.
 */
export function inspectConfig(text: string, origin: string): ConfigReport {
  const inspection = inspectText(text, origin);
  const { parsed } = inspection;

  const problems = [...inspection.problems];
  let warnings = inspection.warnings;

  if (parsed) {
    warnings = [...warnings, ...findWarnings(parsed)];

    const isEmpty = Object.keys(parsed.config.hosts).length === 0;
    if (isEmpty && problems.length === 0) {
      problems.push(noHostsProblem(parsed.config));
    }
  }

  const located = {
    problems: locate(problems, text),
    warnings: locate(warnings, text),
  };
  const isUsable = parsed !== undefined && problems.length === 0;
  return isUsable ? { config: parsed.config, ...located } : located;
}

/** Parses and checks a text, and freezes what it says. */
function inspectText(text: string, origin: string): Inspection {
  const yaml = parseYaml(text);
  if ("problem" in yaml) {
    return { problems: [{ path: "", ...yaml.problem }], warnings: [] };
  }

  const document = yaml.value ?? {};
  deepFreeze(document);

  const { parsed, problems, warnings } = inspectDocument(document, {
    text,
    isRemote: isHttp(origin),
  });
  if (!parsed) return { problems, warnings };

  deepFreeze(parsed.config);
  parsedConfigs.set(parsed.config, parsed);
  return { parsed, problems: locate(problems, text), warnings };
}

/**
 * Freezes a finite tree. What is frozen already is taken to be so throughout.
 */
function deepFreeze(value: unknown): void {
  if (typeof value !== "object" || value === null) return;
  if (Object.isFrozen(value)) return;

  Object.freeze(value);
  for (const key in value) deepFreeze((value as Record<string, unknown>)[key]);
}

/** A value of YAML, or the problem with the text and its place. */
type YamlResult =
  | { readonly value: unknown }
  | { readonly problem: Omit<ConfigProblem, "path"> };

/**
 * Parses YAML. In the `failsafe` schema, what is no list or mapping stays the
 * text that was written.
 */
function parseYaml(
  text: string,
  schema: "core" | "failsafe" = "core",
): YamlResult {
  const message = textProblem(text);
  if (message !== undefined) return { problem: { message } };

  const tabLine = findTab(text);
  if (tabLine !== undefined) {
    const message = "is not valid YAML: a tab in the indentation; use spaces";
    return { problem: { message, line: tabLine, column: 1 } };
  }

  try {
    // The core schema leaves dates as they are written, and knows no merge
    // keys, which @std/yaml would expand without a bound.
    const document: unknown = parse(text, { schema });
    return expandDocument(document, text);
  } catch (error) {
    if (error instanceof RangeError) {
      return { problem: { message: "is nested too deeply" } };
    }
    if (error instanceof SyntaxError) {
      return { problem: syntaxProblem(error, text) };
    }
    throw error;
  }
}

/** Says why a text is no YAML at all. */
function textProblem(text: string): string | undefined {
  // A page to log in can be valid YAML, and would be an empty cluster.
  if (/^\s*<[!?a-z]/i.test(text)) return "is HTML or XML, not YAML";
  if (text.includes("\0")) return "holds a NUL character: is it a text file?";

  return undefined;
}

/**
 * Finds the line of a tab in the indentation, outside of text blocks and JSON.
 *
 * With such a tab, `@std/yaml` (seen with 1.2.0) flattens the file without a
 * word.
 */
function findTab(text: string): number | undefined {
  const isJson = /^\s*[{[]/.test(text);
  if (isJson || !/^ *\t/m.test(text)) return undefined;

  let blockIndent = Infinity;
  for (const [index, line] of text.split("\n").entries()) {
    const indent = line.search(/[^ ]/);
    const isInBlock = indent > blockIndent;
    if (line.trim() === "" || isInBlock) continue;

    if (line[indent] === "\t") return index + 1;

    const opensBlock = /(?:^|[\s:-])[|>][-+\d]*\s*(?:#.*)?$/.test(line);
    blockIndent = opensBlock ? indent : Infinity;
  }

  return undefined;
}

/** Expands aliases and merge keys, if that gives a tree of sound size. */
function expandDocument(document: unknown, text: string): YamlResult {
  if (!text.includes("&") && !text.includes("<<")) return { value: document };

  if (treeSize(document) > text.length + MAX_ALIASED_VALUES) {
    const message = "has aliases that make it endless or too deep";
    return { problem: { message } };
  }

  const merge: Merge = { done: new Map(), isBroken: false };
  const value = mergeKeys(document, merge);
  if (merge.isBroken) {
    const message = 'a merge key ("<<") names something that is not a mapping';
    return { problem: { message } };
  }

  return { value };
}

/**
 * Counts the values of a tree, those of an alias wherever it stands. It is
 * infinite if a value holds itself, or is nested too deeply.
 */
function treeSize(
  value: unknown,
  levels: number = MAX_DEPTH,
  sizes: Map<object, number> = new Map(),
): number {
  if (typeof value !== "object" || value === null) return 1;

  const known = sizes.get(value);
  if (known !== undefined) return known;
  if (levels === 0) return Infinity;

  // Meeting a value again before its size is known means a cycle.
  sizes.set(value, Infinity);

  let size = 1;
  for (const child of Object.values(value)) {
    size += treeSize(child, levels - 1, sizes);
  }

  sizes.set(value, size);
  return size;
}

/** The merge of a document: what is done already, and whether it failed. */
interface Merge {
  readonly done: Map<object, unknown>;
  isBroken: boolean;
}

/**
 * Replaces each merge key (`<<`) by what it names. A mapping's own keys win,
 * then those of the first mapping that is merged.
 */
function mergeKeys(value: unknown, merge: Merge): unknown {
  if (typeof value !== "object" || value === null) return value;

  const done = merge.done.get(value);
  if (done !== undefined) return done;

  const merged = Array.isArray(value)
    ? value.map((item) => mergeKeys(item, merge))
    : mergeMapping(value, merge);

  merge.done.set(value, merged);
  return merged;
}

function mergeMapping(mapping: object, merge: Merge): unknown {
  const { "<<": source = [], ...own } = mapping as Record<string, unknown>;
  const merged = new Map<string, unknown>();

  for (const item of [source].flat()) {
    const base = mergeKeys(item, merge);
    if (!isMapping(base)) {
      merge.isBroken = true;
      continue;
    }

    for (const [key, value] of Object.entries(base)) {
      if (!merged.has(key)) merged.set(key, value);
    }
  }

  for (const [key, value] of Object.entries(own)) {
    merged.set(key, mergeKeys(value, merge));
  }

  // Unlike an assignment, this makes an ordinary key of `__proto__`.
  return Object.fromEntries(merged);
}

/**
 * Says what is wrong with the syntax, without the source that the error shows.
 */
function syntaxProblem(
  error: SyntaxError,
  text: string,
): Omit<ConfigProblem, "path"> {
  const place = placeOf(error);

  if (/duplicated key/.test(error.message)) {
    const { repeated } = findKeys(text);
    if (repeated) {
      const { name, line, column } = repeated;
      const message = `duplicate key ${JSON.stringify(name)}`;
      return { message, line, column };
    }

    const message = "duplicate key: YAML reads a name such as 010 as 8, " +
      "so put it in quotes";
    return { message, ...place };
  }

  // After the reason comes the source; at its end, quoted, names out of it.
  const [first = ""] = error.message.split(/ at line \d+, column \d+|\n/, 1);
  const reason = first.replace(/ (?:"|!<).*/s, "");
  const message = "is not valid YAML: " +
    reason.charAt(0).toLowerCase() + reason.slice(1);

  return { message, ...place };
}

/** Returns where an error of `@std/yaml` is, as far as it says. */
function placeOf(error: SyntaxError): { line?: number; column?: number } {
  const { line, column } = error as { line?: number; column?: number };
  if (line === undefined || column === undefined) return {};

  // A duplicate key may be said to be before the line begins.
  return { line, column: Math.max(1, column) };
}

/** What is known of a document besides its values. */
interface DocumentOptions {
  /** The text that it was parsed from. */
  readonly text?: string;
  /** Whether it came by http(s). */
  readonly isRemote?: boolean;
}

/** Parses what the toolkit uses of a document, and collects its problems. */
function inspectDocument(
  document: unknown,
  { text = "", isRemote = false }: DocumentOptions = {},
): Inspection {
  if (!isMapping(document)) {
    const given = typeName(document);
    const message = `expected a mapping with a "hosts" section, got ${given}`;
    return { problems: [{ path: "", message }], warnings: [] };
  }

  const { hosts, elo_sync, distributed } = document;

  const eloSync = parseSection("elo_sync", elo_sync, ELO_SYNC_FIELDS);
  const eloSyncProblems = isUnset(elo_sync) || isMapping(elo_sync)
    ? eloSync.problems
    : [{ path: "elo_sync", message: "expected a mapping" }];

  // That section is another program's: only a mapping can hold what is used.
  const shared = parseSection("distributed", distributed, DISTRIBUTED_FIELDS);
  const defaults = parseDefaults(document.defaults, isRemote);
  const defaultValues = { ...shared.values, ...defaults.values };

  const spelling = checkSpelling(text, document);
  const { nodes, problems: hostProblems } = parseHosts(hosts ?? {}, {
    names: spelling.names,
    defaults: defaultValues,
    isRemote,
  });

  const hasDefaultPort = defaultValues.dataServerPort !== undefined;
  const parsed: ParsedConfig = {
    config: configOf(document),
    nodes,
    eloSync: Object.freeze(eloSync.values) as unknown as EloSyncConfig,
    needsUnifiedPort: !hasDefaultPort && nodes.values().some(takesDefaultPort),
  };

  const problems = [
    ...eloSyncProblems,
    ...shared.problems,
    ...defaults.problems,
    ...spelling.problems,
    ...hostProblems,
  ];
  return { parsed, problems, warnings: spelling.warnings };
}

/** Returns the document as a config, which has hosts even if there are none. */
function configOf(document: Record<string, unknown>): HostsConfig {
  if (isMapping(document.hosts)) return document as HostsConfig;

  return { ...document, hosts: {} };
}

function takesDefaultPort(node: ClusterNode): boolean {
  return isUnset(node.entry[HOST_FIELDS.dataServerPort.key]);
}

/** The values of a section's fields by name, and the problems with them. */
interface Section {
  readonly values: Record<string, unknown>;
  readonly problems: readonly ConfigProblem[];
}

function parseSection(
  path: string,
  section: unknown,
  table: FieldTable,
): Section {
  const mapping = isMapping(section) ? section : {};
  const { values, problems } = parseFields(table, (_, key) => mapping[key]);

  return {
    values,
    problems: problems.map(({ key, problem }) => ({
      path: `${path}.${key}`,
      message: problem,
    })),
  };
}

/** Parses the fields that `defaults` gives to hosts: those that it sets. */
function parseDefaults(section: unknown, isRemote: boolean): Section {
  if (!isUnset(section) && !isMapping(section)) {
    const message = `expected a mapping, got ${typeName(section)}`;
    return { values: {}, problems: [{ path: "defaults", message }] };
  }

  const mapping = isMapping(section) ? section : {};
  const isSet = ({ key }: Field<unknown>) => !isUnset(mapping[key]);

  const fields = Object.entries<Field<unknown>>(HOST_FIELDS).filter(
    ([, field]) => isSet(field) && !ADDRESS_FIELDS.includes(field),
  );
  const table = Object.fromEntries(fields);
  const { values, problems } = parseSection("defaults", mapping, table);

  const allProblems = [...problems];
  for (const { key } of ADDRESS_FIELDS.filter(isSet)) {
    const message = "cannot be a default: set it on each host";
    allProblems.push({ path: `defaults.${key}`, message });
  }

  const options = values.sshOptions as readonly string[] | undefined;
  if (isRemote && options?.some(runsProgramHere)) {
    allProblems.push(remoteProgramProblem("defaults"));
  }

  return { values, problems: allProblems };
}

function remoteProgramProblem(path: string): ConfigProblem {
  return {
    path: `${path}.${HOST_FIELDS.sshOptions.key}`,
    message: "runs a program on this machine, which an inventory from a URL " +
      "may not: use a file",
  };
}

interface HostsOptions {
  /** The names of the hosts, in the order of the file. */
  readonly names: readonly string[];
  /** The values of `defaults`, by field. */
  readonly defaults: Readonly<Record<string, unknown>>;
  readonly isRemote: boolean;
}

function parseHosts(
  hosts: unknown,
  { names, defaults, isRemote }: HostsOptions,
): { nodes: Map<string, ClusterNode>; problems: ConfigProblem[] } {
  const nodes = new Map<string, ClusterNode>();
  if (!isMapping(hosts)) {
    const given = typeName(hosts);
    const message = `expected a mapping from names to hosts, got ${given}`;
    return { nodes, problems: [{ path: "hosts", message }] };
  }

  const table = withFallbacks(HOST_FIELDS, defaults);
  const fallbackUser = defaults.sshUser as string | undefined;
  const problems: ConfigProblem[] = [];

  for (const name of names) {
    const path = pathOf("hosts", name);
    const entry = hosts[name];

    const nameProblem = findNameProblem(name);
    if (nameProblem !== undefined) {
      problems.push({ path, message: nameProblem });
    }
    if (!isMapping(entry)) {
      const message = `expected a mapping, got ${typeName(entry)}`;
      problems.push({ path, message });
      continue;
    }

    const { values, problems: faults } = parseFields(
      table,
      (_, key) => entry[key],
    );
    for (const { key, problem } of faults) {
      problems.push({ path: `${path}.${key}`, message: problem });
    }
    if (isRemote && hasOwnProgram(entry, values)) {
      problems.push(remoteProgramProblem(path));
    }

    if (faults.length === 0 && nameProblem === undefined) {
      const origin = { name, entry, fallbackUser };
      nodes.set(name, nodeOf(values, origin));
    }
  }

  return { nodes, problems };
}

/** Replaces the fallbacks of a table by the values of `defaults`. */
function withFallbacks(
  table: FieldTable,
  defaults: Readonly<Record<string, unknown>>,
): FieldTable {
  const fields = Object.entries(table).map(([name, field]) => {
    const isGiven = defaults[name] !== undefined && !field.isDerived;
    return [name, isGiven ? { ...field, fallback: defaults[name] } : field];
  });

  return Object.fromEntries(fields);
}

/**
 * Reports whether a host itself has an option of ssh that runs a program here.
 */
function hasOwnProgram(
  entry: HostEntry,
  values: Readonly<Record<string, unknown>>,
): boolean {
  const isOwn = !isUnset(entry[HOST_FIELDS.sshOptions.key]);
  const options = values.sshOptions as readonly string[];

  return isOwn && options.some(runsProgramHere);
}

/** Joins the place of a mapping and a key in it. */
function pathOf(parent: string, key: string): string {
  const shown = hasControlCharacter(key) ? JSON.stringify(key) : key;
  return parent === "" ? shown : `${parent}.${shown}`;
}

/** What the text of an inventory says beyond its values. */
interface Spelling {
  /** The names of the hosts, in the order of the file. */
  readonly names: readonly string[];
  readonly problems: readonly ConfigProblem[];
  readonly warnings: readonly ConfigProblem[];
}

/** The sections that mean something here. */
const SECTIONS = ["hosts", "defaults", "elo_sync", "distributed"];

/** The keys of ports in these sections. */
const PORT_KEYS = ["ssh_port", "data_server_port", "sync_port"];

/** A number without quotes that has a leading zero, a base or underscores. */
const ODD_NUMBER = /(?:[\s,[{]|["']:)[-+]?(?:0[\dbx_]|\d+_)/;

/**
 * Compares the names and numbers of a document with how they are written.
 *
 * YAML reads the name `010` as 8, and an object lists integer keys first. Only if
 * a name or a number looks affected is the text parsed again, with every scalar
 * as a string.
 */
function checkSpelling(
  text: string,
  document: Record<string, unknown>,
): Spelling {
  const hosts = isMapping(document.hosts) ? document.hosts : {};
  const names = Object.keys(hosts);

  const hasNamesOfValues = names.some(isNameOfValue);
  if (!hasNamesOfValues && !ODD_NUMBER.test(text)) {
    return { names, problems: [], warnings: [] };
  }

  const yaml = parseYaml(text, "failsafe");
  // A tag such as `!!float` is unknown there: what is written stays unknown too.
  const written = "value" in yaml && isMapping(yaml.value) ? yaml.value : {};
  const numbers = checkNumbers(document, written);

  return {
    names: hasNamesOfValues ? sortAsWritten(names, text) : names,
    problems: [...checkNames(hosts, written.hosts), ...numbers.problems],
    warnings: numbers.warnings,
  };
}

/**
 * Reports whether a name is what a number, a boolean or null becomes as a key.
 */
function isNameOfValue(name: string): boolean {
  return String(Number(name)) === name || /^(?:true|false|null)$/.test(name);
}

/** Sorts names by where they stand. Those that are not found come first. */
function sortAsWritten(
  names: readonly string[],
  text: string,
): readonly string[] {
  const { places } = findKeys(text);
  const located = names.map((name) => ({
    name,
    ...places.get(pathOf("hosts", name)),
  }));

  return located.sort(byPlace).map(({ name }) => name);
}

/** Finds the written names that are none of the hosts'. */
function checkNames(
  hosts: Readonly<Record<string, unknown>>,
  written: unknown,
): ConfigProblem[] {
  if (!isMapping(written)) return [];

  const misread = Object.keys(written).filter((name) =>
    !Object.hasOwn(hosts, name)
  );
  return misread.map((name) => ({
    path: pathOf("hosts", name),
    message: "YAML reads this name as another one: put it in quotes",
  }));
}

/** Finds numbers that are not what most people take them for. */
function checkNumbers(
  document: Record<string, unknown>,
  written: Record<string, unknown>,
): Omit<Spelling, "names"> {
  const { hosts, ...others } = document;
  const hostEntries = isMapping(hosts) ? Object.values(hosts) : [];
  const sections = SECTIONS.map((section) => others[section]);
  const portHolders = new Set([...hostEntries, ...sections]);

  const problems: ConfigProblem[] = [];
  const warnings: ConfigProblem[] = [];

  for (const number of findNumbers(document, written)) {
    const { holder, key, path, value, text } = number;
    const isPort = portHolders.has(holder) && PORT_KEYS.includes(key) &&
      "value" in parsePort(value);

    const message = isPort ? oddPortProblem(text) : undefined;
    if (message !== undefined) {
      problems.push({ path, message });
    } else if (isOctal(text)) {
      const message = "YAML reads a number with a leading zero as octal: " +
        "put it in quotes, or leave the zero out";
      warnings.push({ path, message });
    }
  }

  return { problems, warnings };
}

function oddPortProblem(text: string): string | undefined {
  if (/^[-+]?0\d/.test(text)) return LEADING_ZERO;
  if (/[_bx]/.test(text)) return NOT_PLAIN;

  return undefined;
}

/** Reports whether YAML reads digits as an octal number that is not 0. */
function isOctal(digits: string): boolean {
  return /^[-+]?0[0-7_]*[1-7][0-7_]*$/.test(digits);
}

/** A number of a document, and the text that it was read from. */
interface WrittenNumber {
  /** The mapping that it is in. */
  readonly holder: Readonly<Record<string, unknown>>;
  readonly key: string;
  readonly path: string;
  readonly value: number;
  readonly text: string;
}

/**
 * Finds the numbers in a document's mappings, those of an alias once. Lists,
 * and what is nested too deeply to be worth a path, are left out.
 */
function findNumbers(
  document: Record<string, unknown>,
  written: Record<string, unknown>,
): WrittenNumber[] {
  const numbers: WrittenNumber[] = [];
  const seen = new Set<unknown>();
  const mappings = [{ path: "", holder: document, texts: written }];

  // Those that are found on the way are visited too.
  for (const { path: parent, holder, texts } of mappings) {
    if (parent.length > MAX_PATH_LENGTH || seen.has(holder)) continue;
    seen.add(holder);

    for (const [key, value] of Object.entries(holder)) {
      const text = texts[key];
      const path = pathOf(parent, key);

      if (typeof value === "number" && typeof text === "string") {
        numbers.push({ holder, key, path, value, text });
      } else if (isMapping(value) && isMapping(text)) {
        mappings.push({ path, holder: value, texts: text });
      }
    }
  }

  return numbers;
}

/**
 * Adds to problems where they are, as far as it is known, and sorts them by it.
 */
function locate(
  problems: readonly ConfigProblem[],
  text: string,
): ConfigProblem[] {
  const isLocated = problems.every(({ path, line }) =>
    path === "" || line !== undefined
  );
  if (isLocated) return [...problems];

  const { places } = findKeys(text);
  const located = problems.map((problem) => {
    const place = findPlace(problem.path, places);
    if (!place) return problem;

    const { line, column } = place;
    return { line, column, ...problem };
  });
  return located.sort(byPlace);
}

/** Compares places in a text. What has none comes first. */
function byPlace(a: Partial<Place> = {}, b: Partial<Place> = {}): number {
  const lines = (a.line ?? 0) - (b.line ?? 0);
  return lines !== 0 ? lines : (a.column ?? 0) - (b.column ?? 0);
}

/** Finds the place of a path, or else that of what holds it. */
function findPlace(
  path: string,
  places: ReadonlyMap<string, Place>,
): Place | undefined {
  let known = path.slice(0, MAX_PATH_LENGTH);

  while (!places.has(known) && known.includes(".")) {
    known = known.slice(0, known.lastIndexOf("."));
  }
  return places.get(known);
}

/** Where a key stands, both from 1. */
interface Place {
  readonly line: number;
  readonly column: number;
}

/** The keys of a text. */
interface FoundKeys {
  /** Where the key of each path stands first, in the order of the text. */
  readonly places: ReadonlyMap<string, Place>;
  /** The first key that stands in its mapping a second time. */
  readonly repeated: (Place & { readonly name: string }) | undefined;
}

/** Finds where the keys of an inventory stand. */
function findKeys(text: string): FoundKeys {
  return new KeyFinder(text).find();
}

/** A mapping or a list that is open where the finder stands. */
interface OpenNode {
  /** The column of a key or an item in block style; infinite in brackets. */
  readonly column: number;
  /** The path of the keys in it. */
  readonly path: string;
}

const ROOT: OpenNode = { column: -1, path: "" };

/** The longest path that is told. Longer ones would take too long. */
const MAX_PATH_LENGTH = 500;

/** What may stand before a key or a value: anchors, tags, the `?` of a key. */
const PROPERTIES = /(?:(?:[&!][^\s,[\]{}]*|\?(?=\s|$))[ \t]*)*/y;

/** What ends a scalar without quotes, in block style and in flow style. */
const END_OF_PLAIN = /:(?=\s|$)|[ \t]#|\n/g;
const END_OF_FLOW_PLAIN = /:(?=[\s,[\]{}]|$)|[ \t]#|[\n,[\]{}]/g;

/**
 * Finds keys in valid YAML, in block style, in flow style or as JSON, in time
 * linear in the text.
 *
 * It knows no more of YAML than that takes. It does not find what an alias or a
 * merge key brings, keys that are aliases or collections, and keys in paths
 * longer than {@linkcode MAX_PATH_LENGTH}.
 */
class KeyFinder {
  readonly #text: string;
  readonly #places = new Map<string, Place>();
  readonly #open: OpenNode[] = [];
  #repeated: FoundKeys["repeated"];
  /** The path of the keys in a mapping that begins here. */
  #path = "";
  #at = 0;
  #line = 1;
  #lineStart = 0;
  /** Lines that are indented by more go on with the scalar before them. */
  #scalarColumn = Infinity;

  constructor(text: string) {
    // A byte order mark takes no column.
    this.#text = text.replace(/^\ufeff/, "");
  }

  find(): FoundKeys {
    while (this.#at < this.#text.length) {
      if (this.#isInFlow()) {
        this.#readFlow();
      } else {
        this.#readLine();
      }
    }

    return { places: this.#places, repeated: this.#repeated };
  }

  /** Reads a line of block style: items and keys, then a value. */
  #readLine(): void {
    if (this.#skip(/---(?=\s|$)/y)) {
      this.#open.length = 0;
      this.#path = "";
      this.#scalarColumn = Infinity;
    }
    this.#skip(/ */y);

    const isBlank = this.#sees(/[ \t\r]*(?:#|\n|$)/y);
    if (isBlank || this.#column() > this.#scalarColumn) {
      this.#nextLine();
      return;
    }
    this.#scalarColumn = Infinity;

    let hasKey = true;
    while (hasKey) hasKey = this.#readKey();

    if (this.#sees(/[{[]/y)) {
      this.#openFlow();
    } else {
      this.#nextLine();
    }
  }

  /** Reads an item's dash, a key or a scalar; reports if more may follow. */
  #readKey(): boolean {
    const column = this.#column();
    if (this.#skip(/-(?=\s|$)[ \t]*/y)) {
      this.#closeBlocks(column);
      this.#path = this.#newPath();
      this.#open.push({ column, path: this.#path });
      return true;
    }

    this.#skip(PROPERTIES);
    if (this.#sees(/[\s#{[]|$/y)) return false;

    const place = this.#place();
    const scalar = this.#readScalar(END_OF_PLAIN);
    if (this.#skip(/\s*:(?=\s|$)[ \t]*/y)) {
      this.#closeBlocks(column);
      this.#addKey(scalar, place);
      this.#open.push({ column, path: this.#path });
      return true;
    }

    if (!isQuoted(scalar)) this.#scalarColumn = this.#top().column;
    return false;
  }

  /** Closes the keys and items that end where one stands in a column. */
  #closeBlocks(column: number): void {
    while (this.#top().column >= column) this.#open.pop();
  }

  /** Reads one token of flow style. */
  #readFlow(): void {
    if (this.#skip(/\s+/y) || this.#skip(/#[^\n]*/y)) return;

    if (this.#sees(/[{[]/y)) {
      this.#openFlow();
    } else if (this.#skip(/,/y)) {
      this.#path = this.#newPath();
    } else if (this.#skip(/[}\]]/y)) {
      this.#closeFlow();
    } else {
      this.#readFlowScalar();
    }
  }

  #openFlow(): void {
    this.#open.push({ column: Infinity, path: this.#path });
    this.#at++;
    this.#path = this.#newPath();
  }

  #closeFlow(): void {
    this.#open.pop();

    // In block style, nothing can follow on the line.
    if (!this.#isInFlow()) this.#nextLine();
  }

  #readFlowScalar(): void {
    this.#skip(PROPERTIES);
    const place = this.#place();
    const scalar = this.#readScalar(END_OF_FLOW_PLAIN);

    if (this.#skip(/\s*:/y)) this.#addKey(scalar, place);
  }

  /** Adds a key of what is open, and goes on in its path. */
  #addKey(scalar: string, place: Place): void {
    const name = unquote(scalar);
    const path = pathOf(this.#top().path, name);
    const isTooLong = path.length > MAX_PATH_LENGTH;
    this.#path = isTooLong ? this.#newPath() : path;

    if (this.#places.has(this.#path)) {
      this.#repeated ??= { name, ...place };
    } else {
      this.#places.set(this.#path, place);
    }
  }

  /** Returns a path that nothing else has, for what stands under no key. */
  #newPath(): string {
    return `\n${this.#at}`;
  }

  /**
   * Reads a scalar, which without quotes goes on to `end`, or to the end of the
   * line.
   */
  #readScalar(end: RegExp): string {
    const start = this.#at;
    const stop = this.#sees(/["']/y)
      ? endOfQuoted(this.#text, start)
      : endOfPlain(this.#text, start, end);

    this.#moveTo(stop);
    return this.#text.slice(start, stop).trim();
  }

  #isInFlow(): boolean {
    return this.#top().column === Infinity;
  }

  #top(): OpenNode {
    return this.#open.at(-1) ?? ROOT;
  }

  /** Returns the column where it stands, from 0. */
  #column(): number {
    return this.#at - this.#lineStart;
  }

  #place(): Place {
    return { line: this.#line, column: this.#column() + 1 };
  }

  #nextLine(): void {
    const end = this.#text.indexOf("\n", this.#at);
    this.#moveTo(end < 0 ? this.#text.length : end + 1);
  }

  /** Reports whether a sticky pattern fits here. */
  #sees(pattern: RegExp): boolean {
    pattern.lastIndex = this.#at;
    return pattern.test(this.#text);
  }

  /** Moves over what a sticky pattern finds here, if it finds anything. */
  #skip(pattern: RegExp): boolean {
    const isFound = this.#sees(pattern);
    if (isFound) this.#moveTo(pattern.lastIndex);

    return isFound;
  }

  /** Moves forward, and counts the lines. */
  #moveTo(end: number): void {
    for (let at = this.#at; at < end; at++) {
      if (this.#text[at] !== "\n") continue;

      this.#line++;
      this.#lineStart = at + 1;
    }

    this.#at = end;
  }
}

/** Finds the end of a text in quotes that begins at `start`. */
function endOfQuoted(text: string, start: number): number {
  const quote = text[start];
  const step = quote === '"' ? /"|\\[^]/g : /''|'/g;
  step.lastIndex = start + 1;

  let found = step.exec(text);
  while (found && found[0] !== quote) found = step.exec(text);

  return found ? step.lastIndex : text.length;
}

function endOfPlain(text: string, start: number, end: RegExp): number {
  end.lastIndex = start;
  return end.exec(text)?.index ?? text.length;
}

function isQuoted(scalar: string): boolean {
  return /^["']/.test(scalar);
}

/** Returns the text of a scalar that may be in quotes. */
function unquote(scalar: string): string {
  if (!isQuoted(scalar)) return scalar;

  const inner = scalar.slice(1, -1);
  if (!/[\\'\n]/.test(inner)) return inner;

  try {
    return String(parse(scalar, { schema: "failsafe" }));
  } catch {
    return inner;
  }
}

// --- Warnings ---

/** Finds what is allowed in an inventory, and probably not meant. */
function findWarnings(parsed: ParsedConfig): ConfigProblem[] {
  const { config, nodes } = parsed;
  const hosts = Object.entries<unknown>(config.hosts);

  const warnings = [
    ...findTypos("", config, SECTIONS),
    ...findTypos("elo_sync", config.elo_sync, keysOf(ELO_SYNC_FIELDS)),
    ...findDefaultsWarnings(config.defaults),
    ...findDistributedWarnings(config.distributed),
    ...findSharedEndpoints(nodes.values()),
  ];

  for (const [name, entry] of hosts) {
    if (isMapping(entry)) warnings.push(...findHostWarnings(name, entry));
  }
  for (const node of nodes.values()) {
    if (node.isActive && node.dataServerBaseUrl === undefined) {
      const message = `has no address: ${NO_ADDRESS_HINT}`;
      warnings.push({ path: pathOf("hosts", node.name), message });
    }
  }
  if (hosts.length > 0) warnings.push(...findCoordinatorWarnings(parsed));

  return warnings;
}

/**
 * Finds keys that are like a known one which is not set. A known one with an
 * "s", such as `gpus`, is a key of the user's own.
 */
function findTypos(
  path: string,
  section: unknown,
  known: readonly string[],
): ConfigProblem[] {
  if (!isMapping(section)) return [];

  const warnings: ConfigProblem[] = [];
  for (const key of Object.keys(section)) {
    const isPlural = path !== "" && key.endsWith("s") &&
      known.includes(key.slice(0, -1));
    if (known.includes(key) || isPlural) continue;

    const meant = known.find((it) => isTypo(key, it) && isUnset(section[it]));
    if (meant !== undefined) {
      const message = `unknown key; did you mean "${meant}"?`;
      warnings.push({ path: pathOf(path, key), message });
    }
  }

  return warnings;
}

const HOST_KEYS = keysOf(HOST_FIELDS);

function findDefaultsWarnings(defaults: unknown): ConfigProblem[] {
  if (!isMapping(defaults)) return [];

  const typos = findTypos("defaults", defaults, HOST_KEYS);
  const misspelt = new Set(typos.map(({ path }) => path));

  const warnings = [...typos, ...findPlaceholders("defaults", defaults)];
  for (const key of Object.keys(defaults)) {
    const path = pathOf("defaults", key);
    if (HOST_KEYS.includes(key) || misspelt.has(path)) continue;

    const message = "has no effect: defaults may only set known host fields";
    warnings.push({ path, message });
  }

  return warnings;
}

/** Finds host fields in `distributed`, where they have no effect. */
function findDistributedWarnings(distributed: unknown): ConfigProblem[] {
  if (!isMapping(distributed)) return [];

  const known = keysOf(DISTRIBUTED_FIELDS);
  const warnings = findTypos("distributed", distributed, known);

  for (const key of HOST_KEYS) {
    if (known.includes(key) || isUnset(distributed[key])) continue;

    const message = "has no effect here: move it to the section defaults";
    warnings.push({ path: `distributed.${key}`, message });
  }

  return warnings;
}

function findHostWarnings(name: string, entry: HostEntry): ConfigProblem[] {
  const path = pathOf("hosts", name);
  const warnings = [
    ...findTypos(path, entry, HOST_KEYS),
    ...findPlaceholders(path, entry),
  ];

  const message = statusWarning(entry.status);
  if (message !== undefined) {
    warnings.push({ path: `${path}.status`, message });
  }

  return warnings;
}

function statusWarning(written: unknown): string | undefined {
  if (typeof written !== "string" || isUnset(written)) return undefined;

  const status = written.trim().toLowerCase();
  const known = [...ACTIVE_STATUSES, ...INACTIVE_STATUSES];
  if (known.includes(status)) return undefined;

  const meant = known.find((word) => isTypo(status, word));
  if (meant !== undefined) return `unknown status; did you mean "${meant}"?`;

  return "unknown status, treated as active; the inactive ones are " +
    INACTIVE_STATUSES.join(", ");
}

/** Finds values that were left to be filled in: `<ip>`, `100.x.x.x`. */
function findPlaceholders(path: string, entry: HostEntry): ConfigProblem[] {
  const warnings: ConfigProblem[] = [];

  for (const key of HOST_KEYS) {
    const value = entry[key];
    if (typeof value !== "string" || value.trim() === "") continue;

    if (isUnset(value) || isMaskedAddress(value.trim())) {
      const message = "is a placeholder: put the real value";
      warnings.push({ path: `${path}.${key}`, message });
    }
  }

  return warnings;
}

/**
 * Reports whether an address has parts that were made unreadable:
 * `203.0.113.x`.
 */
function isMaskedAddress(text: string): boolean {
  return /^(?:\S+@)?[\dx]+(?:\.[\dx]+){0,2}\.x+[\dx.]*$/i.test(text);
}

/**
 * Finds active nodes whose every data endpoint is shared with another node: an
 * answer does not say which of them is up.
 */
function findSharedEndpoints(nodes: Iterable<ClusterNode>): ConfigProblem[] {
  const shared = sharedEndpoints([...nodes]);
  const warnings: ConfigProblem[] = [];

  const isHidden = (node: ClusterNode) =>
    dataEndpoints(node).every((endpoint) => shared.has(endpointUrl(endpoint)));

  for (const [url, group] of shared) {
    const first = group.find(isHidden);
    if (first === undefined) continue;

    const names = foldNames(group.map(({ name }) => name));
    const message = `${names} share the data endpoint ${url}, so one answer ` +
      "marks all of them as up: set tailscale_ip, data_server_port or " +
      "data_server_url, or check them by --ssh";
    warnings.push({ path: pathOf("hosts", first.name), message });
  }

  return warnings;
}

function findCoordinatorWarnings(parsed: ParsedConfig): ConfigProblem[] {
  const { config, nodes, eloSync: { coordinator } } = parsed;
  const written = config.elo_sync?.coordinator;

  const isUsed = Object.keys(config.elo_sync ?? {}).length > 0;
  const isValid = isUnset(written) || "value" in parseText(written);
  if (!isUsed || !isValid) return [];

  const path = "elo_sync.coordinator";

  if (!Object.hasOwn(config.hosts, coordinator)) {
    if (isUnset(written)) {
      return [{ path, message: "is not set: name the node that coordinates" }];
    }

    const meant = didYouMean(coordinator, Object.keys(config.hosts));
    const hint = meant === undefined ? "" : `; did you mean "${meant}"?`;
    return [{ path, message: `names a node that is not in hosts${hint}` }];
  }

  const isActive = nodes.get(coordinator)?.isActive ?? true;
  return isActive ? [] : [{ path, message: "names a node that is not active" }];
}

/**
 * Says that an inventory has no hosts, and which section was probably meant.
 */
function noHostsProblem(config: HostsConfig): ConfigProblem {
  const section = Object.keys(config).find((key) => isLikeHosts(key, config));
  if (section === undefined) {
    return { path: "", message: 'no hosts: add them under "hosts"' };
  }

  const path = pathOf("", section);
  return { path, message: 'no hosts: rename this section to "hosts"' };
}

/**
 * Reports whether a section is named like `hosts`, or holds what hosts hold.
 */
function isLikeHosts(key: string, config: HostsConfig): boolean {
  const section = config[key];
  const entries = isMapping(section) ? Object.values(section) : [];
  if (entries.length === 0 || !entries.every(isMapping)) return false;

  const isNamedLikeThem = isTypo(key, "hosts") || /host|node/i.test(key);
  const hasHostField = entries.some((entry) =>
    HOST_KEYS.some((field) => field in entry)
  );
  return isNamedLikeThem || hasHostField;
}

// --- Getters ---

/**
 * Gets all nodes by name, in the order of the inventory.
 *
 * A node without a data port of its own, or of the inventory's, has that of the
 * file named by `RINGRIFT_CONFIG_PATH`, if it sets one.
 *
 * @example Print the nodes of an inventory
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const nodes = await getClusterNodes({
 *   defaults: { ssh_user: "root" },
 *   hosts: { "gpu-1": { ssh_host: "192.0.2.1" } },
 * });
 *
 * assertEquals([...nodes.keys()], ["gpu-1"]);
 * assertEquals(nodes.get("gpu-1")?.sshUser, "root");
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function getClusterNodes(
  source?: ConfigSource,
): Promise<Map<string, ClusterNode>> {
  return await loadNodes(source);
}

/** Loads all nodes by name, with the options of a caller that has some. */
async function loadNodes(
  source?: ConfigSource,
  options: LoadOptions = {},
): Promise<Map<string, ClusterNode>> {
  return await withUnifiedPort(await loadParsed(source, options));
}

/**
 * Returns the nodes; those that need it have the data port of another program's
 * config.
 */
async function withUnifiedPort(
  { nodes, needsUnifiedPort }: ParsedConfig,
): Promise<Map<string, ClusterNode>> {
  const dataServerPort = needsUnifiedPort ? await readUnifiedPort() : undefined;
  if (dataServerPort === undefined) return new Map(nodes);

  const changed = new Map<string, ClusterNode>();
  for (const [name, node] of nodes) {
    const isNeeded = takesDefaultPort(node);
    changed.set(
      name,
      isNeeded ? new ClusterNode({ ...node, dataServerPort }) : node,
    );
  }

  return changed;
}

/** Reads the data port that another program's config sets, if it does. */
async function readUnifiedPort(): Promise<number | undefined> {
  const variable = UNIFIED_CONFIG_VARIABLE;
  const path = readVariable(variable);
  if (path === undefined) return undefined;

  const read = await readTextFile(path);
  if ("problem" in read) {
    if (isMissing(read)) return undefined;
    throw readError(path, { ...read, namedBy: variable });
  }

  const yaml = parseYaml(read.value);
  if ("problem" in yaml) {
    throw new HostsConfigError(path, [{ path: "", ...yaml.problem }]);
  }

  const document = isMapping(yaml.value) ? yaml.value : {};
  const { values, problems } = parseSection(
    "distributed",
    document.distributed,
    DISTRIBUTED_FIELDS,
  );
  if (problems.length > 0) {
    throw new HostsConfigError(path, locate(problems, read.value));
  }

  return values.dataServerPort as number | undefined;
}

/**
 * Reports whether a node takes its data port from the file that
 * `RINGRIFT_CONFIG_PATH` names, so that this file is read.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function readsUnifiedConfig(
  source?: ConfigSource,
): Promise<boolean> {
  const { needsUnifiedPort } = await loadParsed(source);
  return needsUnifiedPort;
}

/**
 * Gets the active nodes, in the order of the inventory; see
 * {@linkcode ClusterNode.isActive}.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function getActiveNodes(
  source?: ConfigSource,
): Promise<ClusterNode[]> {
  const nodes = await getClusterNodes(source);
  return [...nodes.values()].filter((node) => node.isActive);
}

/**
 * Gets the node that `elo_sync.coordinator` names; `undefined` if it is not in
 * `hosts`.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function getCoordinatorNode(
  source?: ConfigSource,
): Promise<ClusterNode | undefined> {
  const parsed = await loadParsed(source);
  const nodes = await withUnifiedPort(parsed);

  return nodes.get(parsed.eloSync.coordinator);
}

/**
 * Gets how the Elo ratings database is synchronised, with the defaults applied.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function getEloSyncConfig(
  source?: ConfigSource,
): Promise<EloSyncConfig> {
  const { eloSync } = await loadParsed(source);
  return eloSync;
}

/** A name or an address, and a port. */
export interface CoordinatorAddress {
  /** A host name, or an address without brackets. */
  readonly hostname: string;
  /** The port of the Elo database. */
  readonly port: number;
}

/**
 * Gets the address of the coordinator's Elo database: the node's, else that in
 * `RINGRIFT_COORDINATOR_IP`; `undefined` if there is neither. The variable also
 * counts if there is no default inventory.
 *
 * @throws {HostsConfigError} if the inventory or the variable cannot be used
 */
export async function getCoordinatorAddress(
  source?: ConfigSource,
): Promise<CoordinatorAddress | undefined> {
  const parsed = await loadIfThere(source);
  if (!parsed) return fallbackAddress();

  const { nodes, eloSync } = parsed;
  const node = nodes.get(eloSync.coordinator);
  const hostname = node?.bestIp ?? readCoordinatorHost();
  if (hostname === undefined) return undefined;

  return { hostname, port: eloSync.syncPort };
}

/** Returns the address that stands for an inventory that is not there. */
function fallbackAddress(): CoordinatorAddress {
  const hostname = readCoordinatorHost();
  if (hostname === undefined) throw missingInventory(COORDINATOR_VARIABLE);

  return { hostname, port: ELO_SYNC_PORT };
}

/** Reads the coordinator's host from the environment. */
function readCoordinatorHost(): string | undefined {
  const value = readVariable(COORDINATOR_VARIABLE);
  if (value === undefined) return undefined;

  const host = parseHost(value);
  if ("value" in host) return host.value;

  const problem = { path: COORDINATOR_VARIABLE, message: host.problem };
  throw new HostsConfigError("environment", [problem]);
}

// --- Names ---

/** How many patterns that match nothing an error lists. */
const MAX_LISTED_PATTERNS = 10;

/** Which nodes {@linkcode selectNodes} keeps. An unset field excludes none. */
export interface NodeSelection {
  /**
   * Exact names, else comma lists of globs (`gpu-*`) and ranges (`gpu-[1-8]`,
   * `gpu-[01-16,20]`, `gpu-[0-14/2]`).
   *
   * @default {undefined} every node
   */
  readonly names?: readonly string[] | undefined;
  /**
   * The nodes to leave out, written like `names`.
   *
   * @default {undefined} none
   */
  readonly exclude?: readonly string[] | undefined;
  /**
   * Roles, ignoring case.
   *
   * @default {undefined} any role
   */
  readonly roles?: readonly string[] | undefined;
  /**
   * Statuses, ignoring case. Naming an inactive one also selects its nodes.
   *
   * @default {undefined} any active status
   */
  readonly statuses?: readonly string[] | undefined;
  /**
   * Parts of GPU names, ignoring case: `h100` finds `GH100` too.
   *
   * @default {undefined} any GPU, and none
   */
  readonly gpus?: readonly string[] | undefined;
  /**
   * Keys of a host, its own or known ones, and the values that they may have.
   *
   * Values are compared as text; every key has to fit.
   *
   * @default {{}}
   */
  readonly where?:
    | Readonly<Record<string, string | readonly string[]>>
    | undefined;
  /**
   * Whether nodes that are not active are kept. One that `names` names exactly
   * always is.
   *
   * @default {false}
   */
  readonly includeInactive?: boolean | undefined;
}

/**
 * Selects nodes by name, role, status, GPU and keys of their own; without a
 * selection, the active ones. The order stays that of the nodes.
 *
 * Zero padding in a range is significant: `[08-12]` matches 08, not 8.
 * Next to a wildcard, a range matches whole numbers only: `*[1-3]` does not
 * match `gpu-11`.
 *
 * @example Select a range of workers
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const nodes = ["gpu-1", "gpu-2", "gpu-3", "head"].map((name) =>
 *   new ClusterNode({ name, role: name === "head" ? "coordinator" : "worker" })
 * );
 *
 * const selected = selectNodes(nodes, {
 *   names: ["gpu-[2-3]", "head"],
 *   roles: ["worker"],
 * });
 *
 * assertEquals(selected.map((node) => node.name), ["gpu-2", "gpu-3"]);
 * ```
 *
 * @throws {RangeError} if a pattern matches no node, or cannot be read
 * @throws {TypeError} if a field has the wrong type, such as a name for a list
 */
export function selectNodes(
  nodes: Iterable<ClusterNode>,
  selection: NodeSelection = {},
): ClusterNode[] {
  const all = requireNodes(nodes);
  requireSelection(selection);

  const { names, exclude, roles, statuses, gpus, where } = selection;
  const { includeInactive = false } = selection;
  const criteria: ((node: ClusterNode) => boolean)[] = [];
  let isNamed = (_node: ClusterNode) => false;

  if (names) {
    const { matched, exact } = matchNames(all, names);
    criteria.push((node) => matched.has(node));
    isNamed = (node) => exact.has(node);
  }
  if (exclude) {
    const { matched } = matchNames(all, exclude);
    criteria.push((node) => !matched.has(node));
  }
  if (roles) {
    const wanted = new Set(roles.map(lowerCase));
    criteria.push((node) => wanted.has(lowerCase(node.role)));
  }
  if (gpus) {
    const parts = gpus.map(lowerCase);
    criteria.push((node) => {
      const gpu = lowerCase(node.gpu);
      return parts.some((part) => gpu.includes(part));
    });
  }
  for (const [key, value] of Object.entries(where ?? {})) {
    const wanted = new Set([value].flat().map(String));
    criteria.push((node) =>
      valuesOf(node, key).some((value) => wanted.has(value))
    );
  }
  if (statuses) {
    const wanted = new Set(statuses.map(lowerCase));
    criteria.push((node) => wanted.has(lowerCase(node.status)));
  } else if (!includeInactive) {
    criteria.push((node) => node.isActive || isNamed(node));
  }

  return all.filter((node) => criteria.every((accepts) => accepts(node)));
}

/**
 * Validates a selection without any nodes, so that a fault of it is reported
 * before an inventory is fetched.
 */
function requireSelection(selection: NodeSelection): void {
  const lists = ["names", "exclude", "roles", "statuses", "gpus"] as const;

  for (const option of lists) {
    const list: unknown = selection[option];
    if (list !== undefined) requireTexts(option, list);
  }

  const where: unknown = selection.where ?? {};
  if (!isMapping(where)) {
    const given = givenName(where);
    throw new TypeError(
      `Cannot use where: expected an object of keys and values, got ${given}`,
    );
  }

  const patterns = [...selection.names ?? [], ...selection.exclude ?? []];
  for (const element of patterns.flatMap(splitNames)) compilePattern(element);
}

function requireTexts(option: string, list: unknown): void {
  if (!Array.isArray(list)) {
    const given = givenName(list);
    const advice = typeof list === "string"
      ? `: write [${JSON.stringify(list)}]`
      : "";
    throw new TypeError(
      `Cannot use ${option}: expected a list of strings, got ${given}${advice}`,
    );
  }

  const wrong = list.findIndex((item) => typeof item !== "string");
  if (wrong >= 0) {
    const given = givenName(list[wrong]);
    throw new TypeError(
      `Cannot use ${option}: expected a list of strings, ` +
        `but item ${wrong + 1} is ${given}`,
    );
  }
}

function lowerCase(text: string): string {
  return text.toLowerCase();
}

/** Returns the values of a node under a key, known or its own, as text. */
function valuesOf(node: ClusterNode, key: string): string[] {
  const field = HOST_FIELD_NAMES.find((it) => HOST_FIELDS[it].key === key);
  const own = Object.hasOwn(node.entry, key) ? node.entry[key] : undefined;
  const value: unknown = field === undefined ? own : node[field];

  return [value].flat().filter((item) => !isUnset(item)).map(String);
}

/** What the patterns of a list take. */
interface NameMatches {
  readonly matched: ReadonlySet<ClusterNode>;
  /** Those of them whose exact names stand in the list. */
  readonly exact: ReadonlySet<ClusterNode>;
}

function matchNames(
  nodes: readonly ClusterNode[],
  patterns: readonly string[],
): NameMatches {
  const byName = Map.groupBy(nodes, (node) => node.name);
  const matched = new Set<ClusterNode>();
  const exact = new Set<ClusterNode>();
  const unmatched: string[] = [];

  for (const element of patterns.flatMap(splitNames)) {
    const named = byName.get(element) ?? [];
    for (const node of named) exact.add(node);

    const found = named.length > 0 ? named : nodesLike(nodes, element);
    for (const node of found) matched.add(node);

    if (found.length === 0) unmatched.push(element);
  }

  if (unmatched.length > 0) throw noMatch(unmatched, [...byName.keys()]);
  return { matched, exact };
}

/** Splits a comma list. A comma in brackets separates ranges, not names. */
function splitNames(list: string): string[] {
  const parts = list.match(/(?:\[[^\]]*\]?|[^,[]+)+/g) ?? [];
  const elements = parts.map((part) => part.trim()).filter(Boolean);

  return elements.length > 0 ? elements : [list];
}

function nodesLike(
  nodes: readonly ClusterNode[],
  pattern: string,
): ClusterNode[] {
  // Anything else is an exact name, which was looked up before.
  const isPattern = /[[*?]/.test(pattern);
  if (!isPattern) return [];

  const matches = compilePattern(pattern);
  return nodes.filter((node) => matches(node.name));
}

function noMatch(
  patterns: readonly string[],
  names: readonly string[],
): RangeError {
  const listed = patterns.slice(0, MAX_LISTED_PATTERNS).map((pattern) => {
    const hint = patternHint(pattern, names);
    const quoted = JSON.stringify(pattern);
    return hint === undefined ? quoted : `${quoted} (${hint})`;
  });

  if (patterns.length > listed.length) {
    listed.push(`and ${patterns.length - listed.length} more`);
  }
  return new RangeError(`No node matches ${listed.join(", ")}`);
}

/** Returns what to write instead of a pattern that matches no name. */
function patternHint(
  pattern: string,
  names: readonly string[],
): string | undefined {
  const operator = operatorHint(pattern);
  if (operator !== undefined) return operator;

  // Of something like `-gpu-2`, a hint could name a node to be left out.
  if (!/^[\p{L}\p{N}_[*?]/u.test(pattern)) return undefined;

  const meant = meantAsDigits(pattern, names) ?? didYouMean(pattern, names);
  return meant && `did you mean ${JSON.stringify(meant)}?`;
}

/** Answers the operators of clush, pdsh, Ansible and the shell. */
function operatorHint(pattern: string): string | undefined {
  const excluded = /(?:[!^]|^-)(.*)$/s.exec(pattern)?.[1];
  if (excluded !== undefined) {
    const what = excluded === "" ? "nodes" : JSON.stringify(excluded);
    return `leave ${what} out with exclude or --exclude`;
  }
  if (pattern.includes("&")) {
    return "to intersect, use roles, gpus or where (--role, --gpu, --where)";
  }
  if (pattern.startsWith("@")) {
    return `select ${JSON.stringify(pattern.slice(1))} with roles or --role`;
  }
  if (/[{}]/.test(pattern)) {
    const meant = pattern.replaceAll(/\{(\d+)\.\.(\d+)\}/g, "[$1-$2]");
    const isRange = !/[{}]/.test(meant);
    const example = isRange ? JSON.stringify(meant) : '"[1-3]" or "[1,3]"';
    return `write numbers in brackets: ${example}`;
  }
}

/** Returns `gpu-[1,2]` for `gpu-[12]`, if that would match. */
function meantAsDigits(
  pattern: string,
  names: readonly string[],
): string | undefined {
  const meant = pattern.replaceAll(
    /\[(\d{2,})\]/g,
    (_, digits: string) => `[${digits.split("").join(",")}]`,
  );
  if (meant === pattern) return undefined;

  return names.some(compilePattern(meant)) ? meant : undefined;
}

/** A part of a pattern that takes any text. */
const ANY_TEXT = Symbol("*");

/**
 * A part of a pattern: any text, or a function that returns the indexes at
 * which the part can end in a name if it starts at `at`.
 */
type PatternPart =
  | typeof ANY_TEXT
  | ((name: string, at: number) => readonly number[]);

/** A part of a pattern as written; a bracket need not be closed. */
const PATTERN_TOKEN = /\[[^\]]*\]?|\*+|\?|[^[*?]+/gs;

/**
 * Compiles a glob with ranges into a predicate of one name.
 *
 * @example Test a name
 * ```ts
 * import { assert } from "jsr:@std/assert@^1.0.19";
 *
 * const matches = compilePattern("gpu-[08-12]*");
 *
 * assert(matches("gpu-09.dc1"));
 * assert(!matches("gpu-9"));
 * ```
 *
 * @throws {RangeError} if the pattern cannot be read
 */
export function compilePattern(pattern: string): (name: string) => boolean {
  const tokens = pattern.match(PATTERN_TOKEN) ?? [];
  const parts: PatternPart[] = [];
  let character = 1;

  for (const [index, token] of tokens.entries()) {
    const part = parsePart(token, {
      before: tokens[index - 1],
      after: tokens[index + 1],
    });
    if ("problem" in part) {
      const place = character + Math.max(0, token.search(/^\[|\]/));
      const quoted = JSON.stringify(pattern);
      throw new RangeError(
        `Cannot read ${quoted}: ${part.problem}, at character ${place}`,
      );
    }

    parts.push(part.value);
    character += token.length;
  }

  return (name) => matchesParts(name, parts);
}

/** Follows every way through the parts at once, so that time is linear. */
function matchesParts(
  name: string,
  parts: readonly PatternPart[],
): boolean {
  let ends: readonly number[] = [0];

  for (const part of parts) {
    if (ends.length === 0) return false;

    ends = part === ANY_TEXT
      ? indexesFrom(ends, name)
      : [...new Set(ends.flatMap((at) => part(name, at)))];
  }

  return ends.includes(name.length);
}

function indexesFrom(ends: readonly number[], name: string): number[] {
  const first = ends.reduce((least, end) => Math.min(least, end));
  return Array.from({ length: name.length - first + 1 }, (_, i) => first + i);
}

interface Neighbours {
  readonly before: string | undefined;
  readonly after: string | undefined;
}

function parsePart(token: string, neighbours: Neighbours): Parsed<PatternPart> {
  if (token.startsWith("*")) return { value: ANY_TEXT };
  if (token === "?") return { value: oneCharacter };

  const opens = token.startsWith("[");
  const closes = token.includes("]");
  if (opens && !closes) return { problem: '"[" without "]"' };
  if (closes && !opens) return { problem: '"]" without "["' };

  return opens
    ? parseNumbers(token.slice(1, -1), neighbours)
    : { value: literally(token) };
}

/** Creates the part of a pattern that takes one text. */
function literally(text: string): PatternPart {
  return (name, at) => name.startsWith(text, at) ? [at + text.length] : [];
}

function oneCharacter(name: string, at: number): readonly number[] {
  const codePoint = name.codePointAt(at);
  if (codePoint === undefined) return [];

  return [at + String.fromCodePoint(codePoint).length];
}

/**
 * Parses what stands in brackets. Next to a wildcard, it matches whole numbers
 * only.
 */
function parseNumbers(
  list: string,
  neighbours: Neighbours,
): Parsed<PatternPart> {
  if (/^\s*[!^]/.test(list)) {
    return { problem: "leave numbers out with exclude or --exclude" };
  }

  const ranges = list.split(",").map(parseRange);
  if (!ranges.every((range) => range !== undefined)) {
    return {
      problem:
        "expected numbers and ranges in the brackets, as in gpu-[1-8,12]",
    };
  }

  const isWildcard = (token = "") => /^[*?]/.test(token);
  const isWholeBefore = isWildcard(neighbours.before);
  const isWholeAfter = isWildcard(neighbours.after);
  const maxDigits = Math.max(...ranges.map((range) => range.maxDigits));

  const numberEnds = (name: string, at: number): number[] => {
    const ends: number[] = [];
    if (isWholeBefore && isDigit(name[at - 1])) return ends;

    for (let end = at + 1; end <= at + maxDigits; end++) {
      if (!isDigit(name[end - 1])) break;

      const digits = name.slice(at, end);
      const isCut = isWholeAfter && isDigit(name[end]);
      if (!isCut && ranges.some((range) => range.has(digits))) ends.push(end);
    }
    return ends;
  };
  return { value: numberEnds };
}

function isDigit(character = ""): boolean {
  return character >= "0" && character <= "9";
}

interface NumberRange {
  readonly maxDigits: number;
  has(digits: string): boolean;
}

/** Parses a range as Slurm does: `08-12` is 08, 09, 10; `8-12` is 8, 9, 10. */
function parseRange(text: string): NumberRange | undefined {
  const match = /^\s*(\d+)(?:\s*-\s*(\d+)(?:\s*\/\s*(\d+))?)?\s*$/.exec(text);
  const [, from, upTo, by = "1"] = match ?? [];
  if (from === undefined) return undefined;

  const to = upTo ?? from;
  const first = Number(from);
  const last = Number(to);
  const step = Number(by);
  if (first > last || step < 1 || !Number.isSafeInteger(last)) return undefined;

  // It is not clear which width [1-044] or [001-44] would have.
  const width = isPadded(from) ? from.length : 1;
  const isMixed = to.length < width || (isPadded(to) && to.length !== width);
  if (isMixed) return undefined;

  return {
    maxDigits: to.length,
    has(digits) {
      const number = Number(digits);
      if (number < first || number > last) return false;
      if ((number - first) % step !== 0) return false;

      const isWider = digits.length > width && !digits.startsWith("0");
      return digits.length === width || isWider;
    },
  };
}

function isPadded(digits: string): boolean {
  return digits.length > 1 && digits.startsWith("0");
}

/**
 * Folds names into one list that `names` of {@linkcode NodeSelection} takes
 * back as exactly the same names: `n[1-3].dc1,head`.
 *
 * One number of each name is folded, wherever it stands. Zero-padded numbers are
 * folded only with numbers of the same width.
 *
 * @example Fold names
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const names = ["gpu-1", "gpu-2", "gpu-5", "head"];
 *
 * assertEquals(foldNames(names), "gpu-[1-2,5],head");
 * ```
 *
 * @throws {RangeError} if no node could have one of the names, such as `a,b`
 * @throws {TypeError} if a single name is given
 */
export function foldNames(names: Iterable<string>): string {
  if (typeof names === "string") {
    throw new TypeError(
      "Expected a list of names, got a string: put it in a list",
    );
  }

  const choices = Array.from(new Set(names), foldsOf);
  const sizes = new Map<string, number>();
  for (const { key } of choices.flat()) {
    sizes.set(key, (sizes.get(key) ?? 0) + 1);
  }

  const groups = Map.groupBy(
    choices.map((folds) => largest(folds, sizes)),
    (fold) => fold.key,
  );
  return Array.from(groups.values(), formatGroup).join(",");
}

/** A name around the number in it that is folded. */
interface Fold {
  /** The same for all names that can stand in one range. */
  readonly key: string;
  readonly before: string;
  readonly digits: string;
  readonly after: string;
}

/** Returns the ways to fold a name, its last number first, unfolded last. */
function foldsOf(name: string): Fold[] {
  const problem = findNameProblem(name);
  if (problem !== undefined) {
    throw new RangeError(`Cannot fold ${JSON.stringify(name)}: ${problem}`);
  }

  const folds: Fold[] = [];
  // Longer numbers are not exact.
  const numbers = [...name.matchAll(/(?<!\d)\d{1,15}(?!\d)/g)];

  for (const { 0: digits, index } of numbers.reverse()) {
    const before = name.slice(0, index);
    const after = name.slice(index + digits.length);
    const around = `${before}*${after}`;

    // 10 can stand among 8 and 9, or among 08 and 09; 08 only among 08 and 09.
    if (!isPadded(digits)) {
      folds.push({ key: `${around}*`, before, digits, after });
    }
    const width = digits.length;
    folds.push({ key: `${around}*${width}`, before, digits, after });
  }

  folds.push({ key: name, before: name, digits: "", after: "" });
  return folds;
}

/** Returns the fold that most names share; among equals, the first. */
function largest(
  folds: readonly Fold[],
  sizes: ReadonlyMap<string, number>,
): Fold {
  const sizeOf = (fold: Fold) => sizes.get(fold.key) ?? 0;
  return folds.reduce((best, fold) =>
    sizeOf(fold) > sizeOf(best) ? fold : best
  );
}

function formatGroup(folds: readonly [Fold, ...Fold[]] | Fold[]): string {
  const { before, digits, after } = folds[0]!;
  if (folds.length === 1) return before + digits + after;

  const numbers = folds.map((fold) => fold.digits);
  return `${before}[${foldNumbers(numbers)}]${after}`;
}

/** Folds the numbers of a group: `1-3,7`. */
function foldNumbers(numbers: readonly string[]): string {
  const runs: { first: string; last: string }[] = [];

  for (const number of numbers.toSorted((a, b) => Number(a) - Number(b))) {
    const run = runs.at(-1);
    if (run && Number(number) === Number(run.last) + 1) {
      run.last = number;
    } else {
      runs.push({ first: number, last: number });
    }
  }

  return runs.map(({ first, last }) =>
    first === last ? first : `${first}-${last}`
  ).join(",");
}

// --- Endpoints ---

/** One place where a node may be reached. */
export interface Endpoint {
  /** The protocol that is spoken there. */
  readonly protocol: "http" | "https" | "ssh";
  /** A name or an address; IPv6 without brackets, perhaps with a zone. */
  readonly host: string;
  /** The port, from 1 to 65535. */
  readonly port: number;
  /** The path under which the server answers, without a slash at its end. */
  readonly path: string;
}

/**
 * Returns the endpoints of a node's data server, best first.
 *
 * With a port, they are each address at that port. Without one,
 * `dataServerUrl` is the data server, if it is set; otherwise each address at
 * `dataServerPort` is.
 */
export function dataEndpoints(node: ClusterNode, port?: number): Endpoint[] {
  if (port === undefined && node.dataServerUrl !== undefined) {
    return [urlEndpoint(node.dataServerUrl)];
  }

  return node.addresses.map((host) => ({
    protocol: "http",
    host,
    port: port ?? node.dataServerPort,
    path: "",
  }));
}

/** Parses the base URL of a server. */
export function urlEndpoint(url: string): Endpoint {
  const { protocol, hostname, port, pathname } = new URL(url);

  return {
    protocol: protocol === "https:" ? "https" : "http",
    host: withoutBrackets(hostname),
    port: port === "" ? DEFAULT_PORTS[protocol]! : Number(port),
    path: withoutSlashes(pathname),
  };
}

/**
 * Returns the endpoints of a node's SSH server, best first.
 *
 * With `sshPort` 22, Tailscale comes first. Any other port is usually a proxy at
 * `sshHost`: `sshHost` comes first, then the Tailscale address at that port and
 * at 22.
 */
export function sshEndpoints(node: ClusterNode): Endpoint[] {
  const { addresses, sshPort } = node;
  const [tailscale, sshHost] = addresses;
  const at = (host: string, port: number): Endpoint => ({
    protocol: "ssh",
    host,
    port,
    path: "",
  });

  // The one address of a node may be either.
  if (tailscale === undefined || sshHost === undefined) {
    return addresses.map((host) => at(host, sshPort));
  }
  if (sshPort === 22) return [at(tailscale, 22), at(sshHost, 22)];

  return [at(sshHost, sshPort), at(tailscale, sshPort), at(tailscale, 22)];
}

/** Returns the endpoints that a check contacts: those of ssh, or of data. */
export function checkedEndpoints(
  node: ClusterNode,
  options: Pick<ProbeOptions, "check" | "port"> = {},
): Endpoint[] {
  const { check, port } = options;
  return check === "ssh" ? sshEndpoints(node) : dataEndpoints(node, port);
}

/**
 * Returns the path that a check asks for: the caller's, else the node's
 * `statusPath` at the port of its data server, else `/status`.
 */
export function statusPath(
  node: ClusterNode,
  options: Pick<ProbeOptions, "port" | "path"> = {},
): string {
  const { port, path } = options;
  if (path !== undefined) return path;

  if (port === undefined) return node.statusPath;

  const dataPort = dataEndpoints(node)[0]?.port ?? node.dataServerPort;
  return port === dataPort ? node.statusPath : DEFAULT_STATUS_PATH;
}

/**
 * Returns the URL of a path at an endpoint: `http://100.64.0.1:8766/status`.
 *
 * The protocol's own port is left out. The `%` before an IPv6 zone is `%25`,
 * as RFC 6874 has it.
 */
export function endpointUrl(endpoint: Endpoint, path: string = ""): string {
  const authority = urlAuthority(endpoint).replace("%", "%25");
  return `${endpoint.protocol}://${authority}${endpoint.path}${path}`;
}

/** Returns the `Host` header of an endpoint: its URL's, without a zone. */
function hostHeader(endpoint: Endpoint): string {
  return urlAuthority({ ...endpoint, host: withoutZone(endpoint.host) });
}

function urlAuthority({ protocol, host, port }: Endpoint): string {
  const isDefault = port === DEFAULT_PORTS[`${protocol}:`];
  return isDefault ? withBrackets(host) : hostPort(host, port);
}

/** Returns `host:port`, an IPv6 address in brackets. */
export function hostPort(host: string, port: number): string {
  return `${withBrackets(host)}:${port}`;
}

function withBrackets(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}

function withoutZone(host: string): string {
  return host.replace(/%.*$/s, "");
}

/** Tells an IP address from a name. */
function isAddress(host: string): boolean {
  return host.includes(":") || isIpv4(host);
}

/**
 * Finds the data endpoints that several active nodes have, where one answer
 * counts for all of them.
 *
 * @returns the URL of each such endpoint, and its nodes, two or more
 */
export function sharedEndpoints(
  nodes: Iterable<ClusterNode>,
  port?: number,
): Map<string, ClusterNode[]> {
  const nodesByUrl = new Map<string, ClusterNode[]>();

  for (const node of nodes) {
    if (!node.isActive) continue;

    for (const endpoint of dataEndpoints(node, port)) {
      if (isMaskedAddress(endpoint.host)) continue;

      const url = endpointUrl(endpoint);
      const sharers = nodesByUrl.get(url);
      if (sharers) {
        sharers.push(node);
      } else {
        nodesByUrl.set(url, [node]);
      }
    }
  }

  const isShared = ([, sharers]: [string, ClusterNode[]]) => sharers.length > 1;
  return new Map([...nodesByUrl].filter(isShared));
}

// --- Permissions ---

/** Linux refuses a single argument of 128 KiB. */
const MAX_FLAG_LENGTH = 100_000;

/** Nobody reads or types a longer list. */
const MAX_LISTED_ENDPOINTS = 64;

/**
 * Returns Deno's flag that permits contact with endpoints:
 * `--allow-net=a:1,b:2`; `--allow-net` alone if the list would be too long.
 */
export function netFlag(endpoints: Iterable<Endpoint>): string {
  const targets = new Set<string>();
  for (const { host, port } of endpoints) targets.add(netTarget(host, port));

  const list = [...targets].join(",");
  return list.length > MAX_FLAG_LENGTH ? "--allow-net" : `--allow-net=${list}`;
}

/** Returns a host and port as Deno's permissions have them: without a zone. */
function netTarget(host: string, port: number): string {
  return hostPort(withoutZone(host), port);
}

/**
 * Returns the flag with which checks that were denied can be made, or
 * `undefined` if none was denied.
 */
export function missingNetFlag(
  probes: Iterable<NodeProbe>,
): string | undefined {
  const denied = [...probes].filter(({ failure }) =>
    failure?.code === "denied"
  );
  if (denied.length === 0) return undefined;

  const missing = denied.flatMap(({ endpoints }) => endpoints);
  const isLong = missing.length > MAX_LISTED_ENDPOINTS;
  return isLong ? "--allow-net" : netFlag(missing);
}

function throwIfDenied(probes: Iterable<NodeProbe>): void {
  const flag = missingNetFlag(probes);
  if (flag !== undefined) throw notCapable("net access", flag);
}

function requireNet(host: string, port: number): void {
  if (isNetGranted(host, port)) return;
  throw notCapable("net access", `--allow-net=${netTarget(host, port)}`);
}

function isNetGranted(host: string, port: number): boolean {
  try {
    const descriptor = { name: "net", host: netTarget(host, port) } as const;
    return Deno.permissions.querySync(descriptor).state === "granted";
  } catch {
    // Deno cannot parse this host. The connection will say so.
    return true;
  }
}

function requirePermission(
  descriptor: Deno.PermissionDescriptor,
  flag: string,
  what = `${descriptor.name} access`,
): void {
  const { state } = Deno.permissions.querySync(descriptor);
  if (state !== "granted") throw notCapable(what, flag);
}

/** Creates the error for a missing permission, which names the flag. */
export function notCapable(what: string, flag: string): Error {
  return new Deno.errors.NotCapable(`Requires ${what}: run again with ${flag}`);
}

// --- The HTTP answer ---

const READ_BUFFER_BYTES = 2048;
/** The most that TLS sends in one piece. */
const TLS_BUFFER_BYTES = 16 * 1024;
const MAX_HEAD_BYTES = 64 * 1024;
const MAX_BODY_BYTES = 1024 * 1024;
const MAX_CHUNK_LINE_BYTES = 1024;
const MAX_LOCATION_LENGTH = 200;
const NEWLINE = 10;

/** What a check reads from and writes to; a `Deno.Conn` is one. */
interface Connection {
  read(buffer: Uint8Array): Promise<number | null>;
  write(data: Uint8Array): Promise<number>;
}

/** A fault of a node's answer, or of this machine, with its code. */
class ProbeFault extends Error {
  constructor(readonly code: FailureCode, message: string) {
    super(message);
  }
}

function badResponse(message: string): ProbeFault {
  return new ProbeFault("bad-response", message);
}

function tooLarge(what: string, maxBytes: number): ProbeFault {
  return new ProbeFault(
    "too-large",
    `${what} is larger than ${maxBytes} bytes`,
  );
}

/**
 * Asks for a path, and gives the JSON object that is answered, if it is one.
 *
 * This is no `fetch`, which would obey the proxies of the environment, and no
 * `node:http`, which takes twice the time.
 */
async function requestStatus(
  connection: Connection,
  endpoint: Endpoint,
  path: string,
): Promise<StatusDocument | undefined> {
  const isStatusPage = path === DEFAULT_STATUS_PATH;
  const request = [
    `GET ${endpoint.path}${path} HTTP/1.1`,
    `Host: ${hostHeader(endpoint)}`,
    `Accept: ${isStatusPage ? "application/json" : "*/*"}`,
    "Accept-Encoding: identity",
    "User-Agent: cluster-hosts",
    "Connection: close",
  ];
  const text = `${request.join("\r\n")}\r\n\r\n`;
  await writeAll(connection, new TextEncoder().encode(text));

  return await readAnswer(new ResponseReader(connection), isStatusPage);
}

async function writeAll(
  connection: Pick<Connection, "write">,
  data: Uint8Array,
): Promise<void> {
  let written = 0;
  while (written < data.length) {
    written += await connection.write(data.subarray(written));
  }
}

/** Reads an answer. At another path than `/status`, any 2xx answer will do. */
async function readAnswer(
  reader: ResponseReader,
  isStatusPage: boolean,
): Promise<StatusDocument | undefined> {
  const { status, headers } = await readHead(reader);
  requireSuccess(status, headers);

  const hasBody = status !== 204 && status !== 205;
  const body = hasBody ? await readBody(reader, headers) : new Uint8Array();
  if (isStatusPage) {
    if (!hasBody) throw badResponse(`HTTP ${status}, without a body`);
    return parseStatusPage(body, headers);
  }

  const document = parseStatus(body);
  return "problem" in document ? undefined : document.value;
}

function requireSuccess(
  status: number,
  headers: ReadonlyMap<string, string>,
): void {
  if (status >= 200 && status < 300) return;

  const isRedirect = status >= 300 && status < 400;
  if (!isRedirect) throw new ProbeFault("http-status", `HTTP ${status}`);

  const location = headers.get("location")?.slice(0, MAX_LOCATION_LENGTH);
  const target = location ? `, to ${location}` : "";
  throw new ProbeFault("redirect", `HTTP ${status}${target}`);
}

function parseStatusPage(
  body: Uint8Array,
  headers: ReadonlyMap<string, string>,
): StatusDocument {
  const encoding = headers.get("content-encoding") || "identity";
  if (encoding.toLowerCase() !== "identity") {
    throw badResponse("the answer is compressed, which was not asked for");
  }

  const document = parseStatus(body);
  if ("problem" in document) throw badResponse(document.problem);

  return document.value;
}

function parseStatus(body: Uint8Array): Parsed<StatusDocument> {
  const document = parseJson(body);
  if ("problem" in document) return document;
  const { value } = document;

  if (!isMapping(value)) {
    return {
      problem: `the answer is JSON, but ${typeName(value)}, not an object`,
    };
  }
  // JSON.parse() reads what is too deep for JSON.stringify().
  if (treeSize(value) === Infinity) {
    return { problem: "the answer is nested too deeply" };
  }
  return { value };
}

/** Parses JSON, and Python's, whose `NaN` and `Infinity` count as null. */
function parseJson(body: Uint8Array): Parsed<unknown> {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(body);
    try {
      return { value: JSON.parse(text) };
    } catch {
      return { value: JSON.parse(nanToNull(text)) };
    }
  } catch {
    return { problem: "the answer is not JSON" };
  }
}

function nanToNull(text: string): string {
  // Strings are matched too, so that a NaN in one is left alone. The quote at
  // the end is optional: without that, a hostile answer takes minutes.
  const tokens = /"(?:[^"\\]|\\[^])*"?|-?\b(?:NaN|Infinity)\b/g;
  return text.replace(
    tokens,
    (token) => token.startsWith('"') ? token : "null",
  );
}

type Bytes = Uint8Array<ArrayBuffer>;

const LATIN1 = new TextDecoder("latin1");

/** Reads an answer piece by piece. Exported for the tests. */
export class ResponseReader {
  readonly #connection: Pick<Connection, "read">;
  #buffer: Bytes = new Uint8Array(READ_BUFFER_BYTES);
  /** What stands between these two was read and is not taken yet. */
  #start = 0;
  #end = 0;

  /** Makes a reader of what `connection` sends. */
  constructor(connection: Pick<Connection, "read">) {
    this.#connection = connection;
  }

  /** How many bytes were read and are not taken yet. */
  get #available(): number {
    return this.#end - this.#start;
  }

  /** What was read and is not taken yet. */
  get pending(): Bytes {
    return this.#buffer.subarray(this.#start, this.#end);
  }

  /** Reads once; `false` at the end of the stream. */
  async fill(): Promise<boolean> {
    if (this.#end === this.#buffer.length) this.#makeRoom();

    const count = await this.#connection.read(this.#buffer.subarray(this.#end));
    this.#end += count ?? 0;

    return count !== null;
  }

  /**
   * Goes on in a new buffer, so that bytes which were taken stay as they are.
   */
  #makeRoom(): void {
    const { pending } = this;
    this.#buffer = new Uint8Array(
      Math.max(READ_BUFFER_BYTES, 2 * pending.length),
    );
    this.#buffer.set(pending);
    this.#start = 0;
    this.#end = pending.length;
  }

  /** Takes exactly `length` bytes. */
  async take(length: number): Promise<Bytes> {
    while (this.#available < length) {
      await this.#fillOrFail();
    }
    return this.#cut(length);
  }

  /**
   * Takes a line, and returns it without its end.
   *
   * @throws {ProbeFault} what `tooLong` returns, if the line has more bytes than
   * `maxBytes`
   */
  async line(maxBytes: number, tooLong: () => ProbeFault): Promise<string> {
    let searched = 0;
    while (true) {
      // What was not read yet is zeros.
      const at = this.#buffer.indexOf(NEWLINE, this.#start + searched);
      const length = at < 0 ? this.#available : at - this.#start;
      if (length > maxBytes) throw tooLong();
      if (at >= 0) return LATIN1.decode(this.#cut(length + 1)).trimEnd();

      searched = length;
      await this.#fillOrFail();
    }
  }

  /** Takes all that comes until the end of the stream. */
  async rest(): Promise<Bytes> {
    while (await this.fill()) {
      if (this.#available > MAX_BODY_BYTES) {
        throw tooLarge("the answer", MAX_BODY_BYTES);
      }
    }
    return this.#cut(this.#available);
  }

  async #fillOrFail(): Promise<void> {
    const hasMore = await this.fill();
    if (!hasMore) throw badResponse("the answer ended before it was complete");
  }

  #cut(length: number): Bytes {
    const taken = this.#buffer.subarray(this.#start, this.#start + length);
    this.#start += length;
    return taken;
  }
}

/** The status code and the headers of an answer, their names in lower case. */
interface ResponseHead {
  readonly status: number;
  readonly headers: Map<string, string>;
}

/**
 * Reads the head of an answer, after any that say 1xx; all of them share one
 * limit. Exported for the tests.
 */
export async function readHead(reader: ResponseReader): Promise<ResponseHead> {
  let room = MAX_HEAD_BYTES;
  while (true) {
    await expectHttp(reader);
    const statusLine = await reader.line(room, headTooLarge);
    room -= statusLine.length + 2;

    const status = /^HTTP\/1\.\d (\d{3})(?:\s|$)/.exec(statusLine)?.[1];
    if (status === undefined) throw badResponse("the answer is not HTTP/1");

    const { headers, size } = await readHeaders(reader, room);
    room -= size;
    if (!status.startsWith("1")) return { status: Number(status), headers };
  }
}

function headTooLarge(): ProbeFault {
  return tooLarge("the head of the answer", MAX_HEAD_BYTES);
}

/** Refuses what is not HTTP at the first byte that differs. */
async function expectHttp(reader: ResponseReader): Promise<void> {
  const start = "HTTP/";
  while (true) {
    const received = LATIN1.decode(reader.pending.subarray(0, start.length));
    if (received === start) return;
    if (!start.startsWith(received)) {
      throw badResponse("the answer is not HTTP");
    }

    const hasMore = await reader.fill();
    if (!hasMore) {
      throw badResponse("the connection was closed without an answer");
    }
  }
}

async function readHeaders(
  reader: ResponseReader,
  maxBytes: number,
): Promise<{ headers: Map<string, string>; size: number }> {
  const headers = new Map<string, string>();
  let size = 0;

  while (true) {
    const line = await reader.line(maxBytes - size, headTooLarge);
    if (line === "") return { headers, size };

    size += line.length + 2;
    addHeader(headers, line);
  }
}

function addHeader(headers: Map<string, string>, line: string): void {
  const colon = line.indexOf(":");
  if (colon <= 0) return;
  const name = line.slice(0, colon).toLowerCase();
  const value = line.slice(colon + 1).trim();

  const previous = headers.get(name) ?? value;
  if (name === "content-length" && previous !== value) {
    throw badResponse("two different Content-Length headers");
  }
  headers.set(name, value);
}

/** Reads the body that the headers announce. Exported for the tests. */
export async function readBody(
  reader: ResponseReader,
  headers: ReadonlyMap<string, string>,
): Promise<Bytes> {
  const transfer = headers.get("transfer-encoding")?.toLowerCase() ??
    "identity";
  if (transfer === "chunked") return await readChunks(reader);
  if (transfer !== "identity") {
    throw badResponse("an unknown transfer encoding");
  }

  const length = headers.get("content-length");
  if (length === undefined) return await reader.rest();
  if (!/^\d+$/.test(length)) throw badResponse("invalid Content-Length");
  if (Number(length) > MAX_BODY_BYTES) {
    throw tooLarge("the answer", MAX_BODY_BYTES);
  }
  return await reader.take(Number(length));
}

/** Reads a body that comes in chunks. */
async function readChunks(reader: ResponseReader): Promise<Bytes> {
  const badChunk = () => badResponse("a chunk size is missing or wrong");
  const chunks: Bytes[] = [];
  let total = 0;

  while (true) {
    const sizeLine = await reader.line(MAX_CHUNK_LINE_BYTES, badChunk);
    const digits = /^([0-9a-f]{1,8})\s*(?:;.*)?$/i.exec(sizeLine)?.[1];
    if (digits === undefined) throw badChunk();

    const size = parseInt(digits, 16);
    total += size;
    if (total > MAX_BODY_BYTES) throw tooLarge("the answer", MAX_BODY_BYTES);
    if (size === 0) return new Uint8Array(await new Blob(chunks).arrayBuffer());

    chunks.push(await reader.take(size));
    const end = await reader.line(2, badChunk);
    if (end !== "") throw badChunk();
  }
}

// --- One probe ---

/**
 * How long an endpoint has until the next one is tried beside it, as in RFC
 * 8305.
 */
const FALLBACK_DELAY_MS = 250;

/**
 * More lookups would fill Deno's pool of blocking threads, on which file reads
 * wait too.
 */
const MAX_LOOKUPS = 16;

/** The error number that `node:dns` gives for a name that does not exist. */
const UNKNOWN_NAME = -3008;
const UNKNOWN_NAME_MESSAGE = "the name does not resolve";

/** How many lines an SSH server may send before its greeting. */
const MAX_GREETING_LINES = 100;

/**
 * A JSON object that a node answered. The keys that RingRift's servers send are
 * typed, but only that it is an object is checked.
 */
export interface StatusDocument {
  /** The version of the server. */
  readonly version?: string;
  /** How many games the node holds. */
  readonly game_count?: number;
  /** Any other key. */
  readonly [key: string]: unknown;
}

/**
 * The state of a node: `up`; `unhealthy`, if it accepted but gave no usable
 * answer; `down`, if no address accepted; `unknown`, if it could not be checked
 * from here.
 */
export type NodeState = "up" | "unhealthy" | "down" | "unknown";

/**
 * Why a node is not up. `denied` and `local-resource` are faults of this side,
 * so that the state of the node is `unknown`.
 */
export type FailureCode =
  | "timeout"
  | "refused"
  | "unreachable"
  | "dns"
  | "no-address"
  | "tls"
  | "http-status"
  | "redirect"
  | "bad-response"
  | "too-large"
  | "denied"
  | "local-resource"
  | "other";

/** Why a node is not up, for programs and for people. */
export interface ProbeFailure {
  /** The kind of fault. */
  readonly code: FailureCode;
  /** The fault in words; it may hold text of the node, unescaped. */
  readonly message: string;
}

/**
 * The outcome of one check of one node. Fields that do not apply are
 * `undefined`.
 */
export interface NodeProbe {
  /** The node that was checked. */
  readonly node: ClusterNode;
  /** The state of the node. */
  readonly state: NodeState;
  /** The host of the endpoint that accepted, as configured. */
  readonly address: string | undefined;
  /** The port that was checked. */
  readonly port: number;
  /** Milliseconds until that endpoint accepted. */
  readonly connectMs: number | undefined;
  /**
   * Milliseconds until the answer was complete; `undefined` if only accepting
   * was checked.
   */
  readonly responseMs: number | undefined;
  /** The JSON object that the node answered. */
  readonly status: StatusDocument | undefined;
  /** Why the node is not up. */
  readonly failure: ProbeFailure | undefined;
  /** The endpoint that this outcome is about. */
  readonly endpoint: Endpoint | undefined;
  /** Every endpoint that the check may contact. */
  readonly endpoints: readonly Endpoint[];
}

/** Options of {@linkcode probeNode}. */
export interface ProbeOptions {
  /**
   * The port to check, at each address. It does not go with `check: "ssh"`.
   *
   * @default {node.dataServerPort}
   */
  readonly port?: number | undefined;
  /**
   * The path to ask for. On another port than that of the node's data server,
   * the default is `/status`.
   *
   * @default {node.statusPath}
   */
  readonly path?: string | undefined;
  /**
   * What a node has to do to be up: answer over HTTP (at `/status` with a 2xx
   * status and a JSON object, at any other path with a 2xx status), accept a
   * TCP connection, or greet as an SSH server at one of its SSH endpoints.
   *
   * @default {"http"}
   */
  readonly check?: "http" | "tcp" | "ssh" | undefined;
  /**
   * The deadline for all that is done for a node, in milliseconds.
   *
   * @default {5000}
   */
  readonly timeoutMs?: number | undefined;
  /** Aborts the whole call, which then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Throws at options that no check could be done with; contacts nothing. */
function requireProbeOptions(options: SweepOptions): void {
  const { check, port, path, timeoutMs, concurrency, onProbe } = options;

  const unsupported = unsupportedDeno();
  if (unsupported) throw new Error(unsupported);

  if (check !== undefined && !Object.hasOwn(CHECKS, check)) {
    const given = JSON.stringify(check);
    throw new TypeError(
      `Cannot use check ${given}: expected "http", "tcp" or "ssh"`,
    );
  }
  if (port !== undefined) requireValue("port", port, parsePort);
  if (port !== undefined && check === "ssh") {
    throw new TypeError(
      'Cannot use port with check "ssh": it checks the SSH port of each node',
    );
  }
  if (path !== undefined) requireValue("path", path, parsePath);
  if (timeoutMs !== undefined) requireDuration("timeoutMs", timeoutMs);
  if (concurrency !== undefined) requireCount("concurrency", concurrency, 1);
  if (onProbe !== undefined && typeof onProbe !== "function") {
    throw new TypeError(
      `Cannot use onProbe: expected a function, got ${givenName(onProbe)}`,
    );
  }
}

/** Options of a check, with their defaults. */
interface ProbeSettings {
  readonly check: keyof typeof CHECKS;
  readonly port: number | undefined;
  readonly path: string | undefined;
  readonly timeoutMs: number;
  readonly concurrency: number;
  readonly signal: AbortSignal | undefined;
  readonly onProbe: SweepOptions["onProbe"];
  /** Whether every host may be contacted, which saves a query for each node. */
  readonly isNetOpen: boolean;
}

function probeSettings(options: SweepOptions): ProbeSettings {
  requireProbeOptions(options);

  const { state } = Deno.permissions.querySync({ name: "net" });
  return {
    check: options.check ?? "http",
    port: options.port,
    path: options.path,
    timeoutMs: options.timeoutMs ?? DEFAULTS.timeoutMs,
    concurrency: options.concurrency ?? DEFAULTS.concurrency,
    signal: options.signal,
    onProbe: options.onProbe,
    isNetOpen: state === "granted",
  };
}

/** What is known of one endpoint when its check is over. */
interface EndpointOutcome
  extends Omit<NodeProbe, "node" | "port" | "endpoints"> {
  readonly endpoint: Endpoint;
}

const NO_OUTCOME = {
  address: undefined,
  connectMs: undefined,
  responseMs: undefined,
  status: undefined,
  failure: undefined,
} as const;

const STATE_RANK: Readonly<Record<NodeState, number>> = {
  up: 3,
  unhealthy: 2,
  unknown: 1,
  down: 0,
};

/**
 * Checks one node until `deadline` aborts, whose reason is a {@linkcode
 * ProbeTimeout}.
 */
async function probeOne(
  node: ClusterNode,
  settings: ProbeSettings,
  deadline: AbortSignal,
): Promise<NodeProbe> {
  const endpoints = checkedEndpoints(node, settings);
  const [first] = endpoints;
  if (!first) return probeWithoutAddress(node, settings);

  const path = statusPath(node, settings);
  const check = (endpoint: Endpoint, signal: AbortSignal) =>
    checkEndpoint(endpoint, path, settings, signal);
  // Most nodes have one endpoint, and need no controllers and timers of a race.
  const outcome = endpoints.length === 1
    ? await check(first, deadline)
    : bestOutcome(await raceEndpoints(endpoints, check, deadline));

  return { node, ...outcome, port: outcome.endpoint.port, endpoints };
}

/** Describes a node that has no address to check. */
function probeWithoutAddress(
  node: ClusterNode,
  { check, port }: ProbeSettings,
): NodeProbe {
  const usualPort = check === "ssh" ? node.sshPort : node.dataServerPort;
  return {
    node,
    ...NO_OUTCOME,
    state: "down",
    failure: { code: "no-address", message: NO_ADDRESS_HINT },
    endpoint: undefined,
    port: port ?? usualPort,
    endpoints: [],
  };
}

/**
 * Races endpoints, best first: starts the next one when one fails, or after 250
 * milliseconds, until one is up.
 */
async function raceEndpoints(
  endpoints: readonly Endpoint[],
  check: (endpoint: Endpoint, signal: AbortSignal) => Promise<EndpointOutcome>,
  deadline: AbortSignal,
): Promise<EndpointOutcome[]> {
  const over = new AbortController();
  const signal = AbortSignal.any([deadline, over.signal]);
  const attempts: Promise<EndpointOutcome>[] = [];

  for (const endpoint of endpoints) {
    if (signal.aborted) break;

    const attempt = check(endpoint, signal).then((outcome) => {
      // If descriptors run out, those of the other attempts are released.
      const isShort = outcome.failure === NO_DESCRIPTORS;
      if (outcome.state === "up" || isShort) over.abort();
      return outcome;
    });
    attempts.push(attempt);
    await settledOrAfter(attempt, FALLBACK_DELAY_MS);
  }

  return await Promise.all(attempts);
}

/** Waits for a promise to settle, but at most `ms` milliseconds. */
async function settledOrAfter(
  promise: Promise<unknown>,
  ms: number,
): Promise<void> {
  const settled = new AbortController();
  const pause = delay(ms, { signal: settled.signal }).catch(() => {});
  const outcome = promise.then(() => {}, () => {});

  await Promise.race([outcome, pause]);
  settled.abort();
}

/** Returns the best outcome, with all reasons if no endpoint accepted. */
function bestOutcome(outcomes: readonly EndpointOutcome[]): EndpointOutcome {
  const best = outcomes.reduce((best, outcome) =>
    STATE_RANK[outcome.state] > STATE_RANK[best.state] ? outcome : best
  );
  if (best.state === "up") return best;

  // Another endpoint may be up, and could not be tried.
  const untried = outcomes.find(({ failure }) => failure === NO_DESCRIPTORS);
  if (untried) return untried;

  const isAccepted = best.connectMs !== undefined;
  const messages = new Set(outcomes.map(({ failure }) => failure!.message));
  if (isAccepted || messages.size === 1) return best;

  const reasons = outcomes.map(({ endpoint: { host, port }, failure }) =>
    `${hostPort(host, port)}: ${failure!.message}`
  );
  const { code } = best.failure!;
  return { ...best, failure: { code, message: reasons.join("; ") } };
}

/**
 * What a check does with a connection that was accepted; it throws if the node
 * is not up.
 */
type Check = (
  tcp: Deno.TcpConn,
  endpoint: Endpoint,
  path: string,
) => Promise<StatusDocument | undefined>;

const CHECKS = {
  http: checkHttp,
  tcp: () => Promise.resolve(undefined),
  ssh: checkGreeting,
} satisfies Record<NonNullable<ProbeOptions["check"]>, Check>;

async function checkHttp(
  tcp: Deno.TcpConn,
  endpoint: Endpoint,
  path: string,
): Promise<StatusDocument | undefined> {
  if (endpoint.protocol !== "https") {
    return await requestStatus(tcp, endpoint, path);
  }
  using tls = await TlsConnection.open(tcp, endpoint.host);
  return await requestStatus(tls, endpoint, path);
}

/**
 * Waits for the greeting of an SSH server, which may send other lines first.
 */
async function checkGreeting(tcp: Deno.TcpConn): Promise<undefined> {
  const reader = new ResponseReader(tcp);
  for (let lines = 0; lines < MAX_GREETING_LINES; lines++) {
    const line = await reader.line(MAX_HEAD_BYTES, notSsh);
    if (line.startsWith("SSH-")) return;
  }
  throw notSsh();
}

function notSsh(): ProbeFault {
  return badResponse("the answer is not that of an SSH server");
}

/** Checks one endpoint: connects, then does what the check asks. */
async function checkEndpoint(
  endpoint: Endpoint,
  path: string,
  settings: ProbeSettings,
  signal: AbortSignal,
): Promise<EndpointOutcome> {
  const startedMs = performance.now();
  const connected = await tryConnect(endpoint, settings, signal);
  if ("failure" in connected) {
    const { failure } = connected;
    const state = isLocalFault(failure) ? "unknown" : "down";
    return { ...NO_OUTCOME, endpoint, state, failure };
  }

  const { tcp } = connected;
  const accepted = {
    ...NO_OUTCOME,
    endpoint,
    address: endpoint.host,
    connectMs: performance.now() - startedMs,
  };

  // Only closing the connection ends a read from a silent node. Unlike
  // `close()`, this may be called again.
  const close = () => tcp[Symbol.dispose]();
  signal.addEventListener("abort", close);
  if (signal.aborted) close();

  try {
    const status = await CHECKS[settings.check](tcp, endpoint, path);
    if (settings.check === "tcp") return { ...accepted, state: "up" };

    const responseMs = performance.now() - startedMs;
    return { ...accepted, state: "up", responseMs, status };
  } catch (error) {
    const fault = signal.aborted ? signal.reason : error;
    const failure = answerFailure(fault, endpoint.path + path);
    return { ...accepted, state: "unhealthy", failure };
  } finally {
    signal.removeEventListener("abort", close);
    close();
  }
}

async function tryConnect(
  { host, port }: Endpoint,
  { isNetOpen }: ProbeSettings,
  signal: AbortSignal,
): Promise<{ tcp: Deno.TcpConn } | { failure: ProbeFailure }> {
  try {
    if (!isNetOpen) requireNet(host, port);
    if (!isAddress(host)) await lookups.requireName(host, port, signal);

    // A name is connected to as such: Deno races its addresses, and the
    // permission is the one for the name.
    return { tcp: await Deno.connect({ hostname: host, port, signal }) };
  } catch (error) {
    // A fault of the lookup is more precise than the deadline's.
    const isPrecise = error instanceof ProbeFault || !signal.aborted;
    const fault = isPrecise ? error : signal.reason;
    return { failure: connectFailure(host, fault) };
  }
}

/**
 * Looks names up, a few at a time.
 *
 * Deno cannot abort a lookup. One that hangs occupies a thread of the runtime,
 * on which file reads depend too, until the system gives it up.
 */
class LookupQueue {
  #running = 0;
  readonly #waiting = new Set<() => void>();

  /**
   * Waits until a name has an address; rejects with a fault if it does not exist,
   * or when the signal aborts. `Deno.connect()` then resolves it again.
   */
  async requireName(
    name: string,
    port: number,
    signal: AbortSignal,
  ): Promise<void> {
    if (this.#running < MAX_LOOKUPS) {
      this.#running++;
    } else {
      await this.#takeTurn(signal);
    }

    const lookup = this.#lookUp(name, port).finally(() => this.#release());
    const fault = new ProbeFault(
      "timeout",
      "the name lookup did not end in time",
    );
    await untilAborted(lookup, { signal, fault });
  }

  async #takeTurn(signal: AbortSignal): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#waiting.add(resolve);
    const message =
      `its lookup never started: ${MAX_LOOKUPS} others are still running`;

    try {
      const fault = new ProbeFault("local-resource", message);
      await untilAborted(promise, { signal, fault });
    } catch (error) {
      const hasTurn = !this.#waiting.delete(resolve);
      if (hasTurn) this.#release();
      throw error;
    }
  }

  /** Hands the turn to the next name that waits. */
  #release(): void {
    const [next] = this.#waiting;
    if (next) {
      this.#waiting.delete(next);
      next();
    } else {
      this.#running--;
    }
  }

  async #lookUp(name: string, port: number): Promise<void> {
    // Loaded for names alone: it doubles the time that a program takes to
    // start.
    const { lookup } = await import("node:dns");
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    // Deno checks the net permission of exactly this port, if it is given.
    const options = { all: true, port } as { all: true };

    lookup(name, options, (error) => {
      const isUnknown = error?.errno === UNKNOWN_NAME;
      // Other errors may mean that descriptors are short: connecting says which.
      if (isUnknown) reject(new ProbeFault("dns", UNKNOWN_NAME_MESSAGE));
      else resolve();
    });
    await promise;
  }
}

const lookups = new LookupQueue();

/** Waits for a promise; rejects with the fault as soon as the signal aborts. */
async function untilAborted(
  promise: Promise<void>,
  { signal, fault }: { signal: AbortSignal; fault: ProbeFault },
): Promise<void> {
  const aborted = Promise.withResolvers<never>();
  const abort = () => aborted.reject(fault);
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();

  try {
    await Promise.race([promise, aborted.promise]);
  } finally {
    signal.removeEventListener("abort", abort);
    // Nobody waits any longer for the one that lost.
    promise.catch(() => {});
    aborted.promise.catch(() => {});
  }
}

type TlsSocket = import("node:tls").TLSSocket;

/**
 * A TLS connection over a TCP one.
 *
 * `Deno.startTls()` leaves the TCP socket open if it is closed amid the
 * handshake; `node:tls` over a stream of our own does not.
 */
class TlsConnection implements Connection, Disposable {
  readonly #socket: TlsSocket;
  readonly #chunks: AsyncIterator<Uint8Array>;
  /** What was received and is not read yet. */
  #received: Uint8Array = new Uint8Array();

  constructor(socket: TlsSocket) {
    this.#socket = socket;
    this.#chunks = socket[Symbol.asyncIterator]();
  }

  /**
   * Does the handshake; rejects if the server does not speak TLS, or its
   * certificate is not trusted.
   */
  static async open(tcp: Deno.TcpConn, host: string): Promise<TlsConnection> {
    // Loaded for https alone: they double the time that a program takes to
    // start.
    const { connect } = await import("node:tls");
    const { Duplex } = await import("node:stream");
    const stream = new Duplex({
      async read() {
        try {
          const buffer = new Uint8Array(TLS_BUFFER_BYTES);
          const count = await tcp.read(buffer);
          this.push(count === null ? null : buffer.subarray(0, count));
        } catch (error) {
          this.destroy(error as Error);
        }
      },
      write(data, _encoding, done) {
        writeAll(tcp, data).then(() => done(), done);
      },
    });
    const socket = connect({ socket: stream, host });
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    socket.once("secureConnect", resolve);
    // The listener stays: an error that nobody listens to ends the process.
    socket.on("error", reject);
    stream.on("error", reject);

    try {
      await promise;
    } catch (error) {
      socket.destroy();
      throw new ProbeFault(
        "tls",
        tlsProblem(error) ?? `TLS: ${errorText(error)}`,
      );
    }
    return new TlsConnection(socket);
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    if (this.#received.length === 0) {
      const { done, value } = await this.#chunks.next();
      if (done) return null;
      this.#received = value;
    }

    const taken = this.#received.subarray(0, buffer.length);
    buffer.set(taken);
    this.#received = this.#received.subarray(taken.length);
    return taken.length;
  }

  async write(data: Uint8Array): Promise<number> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    this.#socket.write(data, (error) => error ? reject(error) : resolve());
    await promise;
    return data.length;
  }

  [Symbol.dispose](): void {
    this.#socket.destroy();
  }
}

/** A check that took longer than it may. */
class ProbeTimeout extends Error {
  constructor(readonly ms: number) {
    super(`timed out after ${formatMs(ms)}`);
  }
}

/** Compared by identity: the pool retries it, and `dns` shortly after it. */
const NO_DESCRIPTORS: ProbeFailure = {
  code: "local-resource",
  message: "this machine ran out of descriptors",
};

const BLOCKED: ProbeFailure = {
  code: "unreachable",
  message: "blocked by a route or a firewall of this machine",
};

const CONNECT_FAILURES: Readonly<Record<string, ProbeFailure>> = {
  ECONNREFUSED: { code: "refused", message: "nothing listens on the port" },
  ENETUNREACH: { code: "unreachable", message: "no route to the host" },
  EHOSTUNREACH: { code: "unreachable", message: "no route to the host" },
  EACCES: BLOCKED,
  EPERM: BLOCKED,
  EINVAL: BLOCKED,
  ETIMEDOUT: { code: "timeout", message: "the system gave up connecting" },
  EMFILE: NO_DESCRIPTORS,
  ENFILE: NO_DESCRIPTORS,
  ENOBUFS: NO_DESCRIPTORS,
  ENOMEM: NO_DESCRIPTORS,
  EADDRNOTAVAIL: {
    code: "local-resource",
    message: "this machine has no local address or port left for it",
  },
};

/** Whether a failure says nothing of the node. */
function isLocalFault({ code }: ProbeFailure): boolean {
  return code === "denied" || code === "local-resource";
}

function connectFailure(host: string, error: unknown): ProbeFailure {
  if (error instanceof ProbeFault) {
    return { code: error.code, message: error.message };
  }
  if (error instanceof ProbeTimeout) {
    const message = `no connection within ${formatMs(error.ms)}`;
    return { code: "timeout", message };
  }
  if (error instanceof Deno.errors.NotCapable) {
    return { code: "denied", message: error.message };
  }

  const { code } = Object(error) as { code?: string };
  if (code === "EINVAL" && /^fe80:[^%]*$/i.test(host)) {
    const message = "a link-local address needs its zone, as in fe80::1%eth0";
    return { code: "unreachable", message };
  }
  const known = code === undefined ? undefined : CONNECT_FAILURES[code];
  if (known) return known;

  // Deno gives a failed lookup no code.
  const message = errorText(error);
  const isLookup = message.startsWith("failed to lookup address");
  return isLookup
    ? { code: "dns", message: UNKNOWN_NAME_MESSAGE }
    : { code: "other", message };
}

/**
 * Says what is wrong with an answer, and at which path if it is not the usual
 * one.
 */
function answerFailure(error: unknown, path: string): ProbeFailure {
  const place = path === DEFAULT_STATUS_PATH ? "" : ` at ${path}`;

  if (error instanceof ProbeTimeout) {
    const message = `accepted, but no answer within ${formatMs(error.ms)}`;
    return { code: "timeout", message: message + place };
  }
  if (error instanceof ProbeFault) {
    return { code: error.code, message: error.message + place };
  }
  const message = `the connection broke (${errorText(error)})`;
  return { code: "bad-response", message: message + place };
}

// --- The pool ---

/** How many probes a sweep starts with, and how many more each tick may add. */
const INITIAL_CONCURRENCY = 64;
const MAX_GROWTH = 1000;
const TICK_MS = 10;

/** A tick that is later than this means that the process is busy. */
const BUSY_MS = 4;

/**
 * A tick that is later than this means that the process was stopped, not busy.
 */
const MAX_LATENESS_MS = 100;

/** How soon a wait asks a node again as its deadline comes near. */
const MIN_RECHECK_MS = 100;

/** How long descriptors count as short after one was missing. */
const SHORTAGE_MS = 100;

/** Options of {@linkcode probeNodes}. */
export interface SweepOptions extends ProbeOptions {
  /**
   * How many nodes may be under way at once. A sweep starts with fewer, and
   * goes on with fewer for as long as descriptors are short.
   *
   * @default {10000}
   */
  readonly concurrency?: number | undefined;
  /**
   * Called with each outcome as soon as it is known. What it throws, or the
   * promise that it returns rejects with, rejects the call.
   */
  readonly onProbe?: ((probe: NodeProbe) => void | Promise<void>) | undefined;
}

/** A probe that is under way. */
interface RunningProbe {
  readonly controller: AbortController;
  /** When it began, as `performance.now()`. */
  startMs: number;
}

/**
 * Takes an outcome; a promise that it returns is awaited before the pool ends.
 */
type OnOutcome = (probe: NodeProbe, index: number) => void | Promise<void>;

/** Options of {@linkcode ProbePool}. */
interface PoolOptions {
  /**
   * When nothing more is started, and what is under way times out, as
   * `performance.now()`.
   */
  readonly endMs?: number;
  /**
   * Whether the pool waits for {@linkcode ProbePool.probeAgain} when nothing is
   * left to do.
   */
  readonly isKeptOpen?: boolean;
}

/**
 * Probes nodes: a few at a time while they answer fast, else as many as
 * descriptors allow.
 *
 * One tick looks after all probes. A timer or a listener for each of them would
 * take longer than to connect.
 */
class ProbePool {
  readonly #nodes: readonly ClusterNode[];
  readonly #settings: ProbeSettings;
  readonly #onOutcome: OnOutcome;
  readonly #isKeptOpen: boolean;
  readonly #done = Promise.withResolvers<void>();
  readonly #failed = Promise.withResolvers<never>();
  /** Resolves when no probe is running any more after {@linkcode stop}. */
  readonly #drained = Promise.withResolvers<void>();
  #isStopped = false;

  /** Indexes of nodes to probe, from `#next` on. */
  readonly #queue: number[];
  #next = 0;
  /** When nodes are due to be probed again, by index. */
  readonly #dueMs = new Map<number, number>();
  /** Running probes, oldest first. */
  readonly #running = new Set<RunningProbe>();
  readonly #callbacks = new Set<Promise<void>>();

  /** How many probes may run now. */
  #limit: number;
  #endedSinceTick = 0;
  /** Until when descriptors count as short. */
  #shortUntilMs = 0;
  /** Since when there is no descriptor for a node, by index. */
  readonly #shortSinceMs = new Map<number, number>();

  #endMs: number;
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** When the next tick is due. */
  #tickMs = Infinity;

  constructor(
    nodes: readonly ClusterNode[],
    settings: ProbeSettings,
    onOutcome: OnOutcome,
    { endMs = Infinity, isKeptOpen = false }: PoolOptions = {},
  ) {
    this.#nodes = nodes;
    this.#settings = settings;
    this.#onOutcome = onOutcome;
    this.#isKeptOpen = isKeptOpen;
    this.#endMs = endMs;
    this.#queue = [...nodes.keys()];
    this.#limit = Math.min(INITIAL_CONCURRENCY, settings.concurrency);
  }

  /** Whether the end has passed: later outcomes were cut short by it. */
  get isOver(): boolean {
    return performance.now() >= this.#endMs;
  }

  /**
   * Probes every node until nothing is left to do, and every callback has
   * returned; rejects when the signal aborts.
   */
  async run(): Promise<void> {
    const { signal } = this.#settings;
    signal?.throwIfAborted();
    const abort = () => this.#failed.reject(signal?.reason);
    signal?.addEventListener("abort", abort);
    openSignalSockets();
    if (this.#nodes.some(hasHttps)) loadCertificates();

    try {
      this.#tickMs = performance.now();
      this.#tick();
      await Promise.race([this.#finish(), this.#failed.promise]);
    } finally {
      this.stop();
      signal?.removeEventListener("abort", abort);
      await this.#abortRunning();
    }
  }

  /** Ends what is still running, and waits until its connections are closed. */
  async #abortRunning(): Promise<void> {
    for (const { controller } of this.#running) {
      controller.abort();
    }
    if (this.#running.size > 0) await this.#drained.promise;
  }

  async #finish(): Promise<void> {
    await this.#done.promise;
    await Promise.all(this.#callbacks);
  }

  /** Probes a node again in `delayMs` milliseconds. */
  probeAgain(index: number, delayMs: number): void {
    if (this.#isStopped) return;
    const dueMs = performance.now() + delayMs;
    this.#dueMs.set(index, dueMs);
    this.#wakeBefore(dueMs);
  }

  /** Ends {@linkcode run}: nothing more is started or reported. */
  stop(): void {
    this.#isStopped = true;
    clearTimeout(this.#timer);
    this.#done.resolve();
  }

  #tick(): void {
    const nowMs = performance.now();

    this.#forgiveLateness(nowMs);
    this.#expireOverdue(nowMs);
    this.#dropWaiting(nowMs);
    this.#requeueDue(nowMs);
    this.#growLimit(nowMs);
    this.#startNext();
    this.#schedule(nowMs);
  }

  /**
   * Moves the deadlines if the process was stopped: answers that arrived
   * meanwhile still count.
   */
  #forgiveLateness(nowMs: number): void {
    const lateMs = nowMs - this.#tickMs;
    if (lateMs < MAX_LATENESS_MS) return;

    this.#endMs += lateMs;
    for (const probe of this.#running) {
      probe.startMs += lateMs;
    }
  }

  #expireOverdue(nowMs: number): void {
    for (const { controller, startMs } of this.#running) {
      const allowedMs = Math.min(
        this.#settings.timeoutMs,
        this.#endMs - startMs,
      );
      if (nowMs - startMs < allowedMs) break;
      controller.abort(new ProbeTimeout(allowedMs));
    }
  }

  /** Starts nothing more once the end has passed. */
  #dropWaiting(nowMs: number): void {
    if (nowMs < this.#endMs) return;

    this.#dueMs.clear();
    this.#next = this.#queue.length;
  }

  #requeueDue(nowMs: number): void {
    for (const [index, dueMs] of this.#dueMs) {
      if (dueMs > nowMs) continue;
      this.#dueMs.delete(index);
      this.#queue.push(index);
    }
  }

  /** Lets more probes run at once if those that run are slow. */
  #growLimit(nowMs: number): void {
    // If this process is busy, or as many as a sweep starts with end in a tick,
    // more at once would be slower.
    const isBusy = nowMs - this.#tickMs > BUSY_MS;
    const isFast = this.#endedSinceTick >= INITIAL_CONCURRENCY;
    const isFull = this.#running.size >= this.#limit;
    this.#endedSinceTick = 0;
    if (isBusy || isFast || !isFull || this.#isShort(nowMs)) return;

    const growth = Math.min(this.#limit, MAX_GROWTH);
    this.#limit = Math.min(this.#settings.concurrency, this.#limit + growth);
  }

  #startNext(): void {
    if (this.#isStopped) return;

    while (
      this.#next < this.#queue.length && this.#running.size < this.#limit
    ) {
      const index = this.#queue[this.#next]!;
      this.#next++;
      this.#probe(index).catch(this.#failed.reject);
    }
    // Forgets what was started, or a watch would fill the queue without end.
    if (this.#next === this.#queue.length) {
      this.#queue.length = 0;
      this.#next = 0;
    }
  }

  /**
   * Arms the timer for what is next, or ends the pool if nothing is left to do.
   */
  #schedule(nowMs: number): void {
    this.#stopIfFinished();
    if (this.#isStopped) return;

    this.#tickMs = Infinity;
    if (!this.#isIdle()) {
      this.#wakeBefore(nowMs + TICK_MS);
      return;
    }
    this.#wakeBefore(this.#endMs);
    for (const dueMs of this.#dueMs.values()) {
      this.#wakeBefore(dueMs);
    }
  }

  #stopIfFinished(): void {
    const hasMore = !this.#isIdle() || this.#dueMs.size > 0;
    if (!hasMore && !this.#isKeptOpen) this.stop();
  }

  #isIdle(): boolean {
    return this.#running.size === 0 && this.#queue.length === 0;
  }

  /** Arms the timer for a moment, unless it is armed for an earlier one. */
  #wakeBefore(ms: number): void {
    if (ms >= this.#tickMs) return;
    this.#tickMs = ms;

    clearTimeout(this.#timer);
    const delayMs = Math.max(0, ms - performance.now());
    this.#timer = setTimeout(() => this.#tick(), delayMs);
  }

  async #probe(index: number): Promise<void> {
    const running = {
      controller: new AbortController(),
      startMs: performance.now(),
    };
    this.#running.add(running);
    const { signal } = running.controller;
    let probe: NodeProbe;
    try {
      probe = await probeOne(this.#nodes[index]!, this.#settings, signal);
    } finally {
      this.#forget(running);
    }
    if (this.#isStopped) return;

    this.#endedSinceTick++;
    if (probe.failure === NO_DESCRIPTORS) this.#slowDown();
    if (this.#shouldRetry(probe, index)) {
      this.#postpone(probe, index);
    } else {
      this.#shortSinceMs.delete(index);
      this.#report(probe, index);
    }
    this.#startNext();
    this.#stopIfFinished();
  }

  #forget(running: RunningProbe): void {
    this.#running.delete(running);
    if (this.#isStopped && this.#running.size === 0) this.#drained.resolve();
  }

  #report(probe: NodeProbe, index: number): void {
    const pending = this.#onOutcome(probe, index);
    if (!pending) return;

    const callback = Promise.resolve(pending).catch(this.#failed.reject);
    this.#callbacks.add(callback);
    callback.finally(() => this.#callbacks.delete(callback));
  }

  /** Runs no more probes at once than there are descriptors for. */
  #slowDown(): void {
    this.#limit = Math.max(1, this.#running.size);
    this.#shortUntilMs = performance.now() + SHORTAGE_MS;
  }

  #isShort(nowMs: number): boolean {
    return nowMs < this.#shortUntilMs;
  }

  /** Whether a probe failed for want of descriptors, and may do better soon. */
  #shouldRetry({ failure }: NodeProbe, index: number): boolean {
    const nowMs = performance.now();
    // A lookup without a descriptor fails as if the name did not exist: what it
    // says counts the second time, and only while descriptors are not short.
    const isFirst = !this.#shortSinceMs.has(index);
    const isSuspect = failure?.code === "dns" &&
      (isFirst || this.#isShort(nowMs));
    const isShortage = failure === NO_DESCRIPTORS || isSuspect;
    if (!isShortage || this.isOver) return false;

    // A running probe will release a descriptor.
    if (this.#running.size > 0) return true;

    const sinceMs = this.#shortSinceMs.get(index) ?? nowMs;
    return nowMs - sinceMs < this.#settings.timeoutMs;
  }

  /**
   * Tries a node again, with all of its time, when there may be a descriptor
   * for it.
   */
  #postpone({ failure }: NodeProbe, index: number): void {
    if (!this.#shortSinceMs.has(index)) {
      this.#shortSinceMs.set(index, performance.now());
    }

    // The next probe that ends gives its descriptor back.
    const isNext = failure === NO_DESCRIPTORS && this.#running.size > 0;
    if (isNext) {
      this.#queue.push(index);
    } else {
      this.probeAgain(index, SHORTAGE_MS);
    }
  }
}

/**
 * Has Deno open the sockets that it uses for signals.
 *
 * It would do so half a second later, and panics if a sweep then has every
 * descriptor of the process.
 */
function openSignalSockets(): void {
  if (Deno.build.os === "windows") return;
  const ignore = () => {};
  Deno.addSignalListener("SIGWINCH", ignore);
  Deno.removeSignalListener("SIGWINCH", ignore);
}

function hasHttps({ dataServerUrl }: ClusterNode): boolean {
  return dataServerUrl?.startsWith("https:") ?? false;
}

/**
 * Has Deno read the certificates that it trusts.
 *
 * It would do so at the first handshake, and if a sweep then has every
 * descriptor of the process, it would trust nobody from then on.
 */
function loadCertificates(): void {
  try {
    Deno.createHttpClient({}).close();
  } catch {
    // The handshake says what is wrong with them.
  }
}

// --- Sweep, watch, wait ---

/**
 * Checks many nodes in parallel, and gives one outcome for each, in their
 * order. It takes as long as the slowest answer.
 *
 * A node's endpoints are raced, best first, within its deadline, so that one
 * that is dead or silent never hides one that is alive. There are no retries:
 * TCP repeats a lost packet itself, three times within the default deadline. An
 * HTTP check goes straight to the node: no proxy, no redirect, no compression,
 * 1 MiB of body at most.
 *
 * @example Check two nodes
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * await using server = Deno.serve(
 *   { hostname: "127.0.0.1", port: 0, onListen() {} },
 *   () => Response.json({ version: "1" }),
 * );
 * const nodes = ["a", "b"].map((name) =>
 *   new ClusterNode({ name, tailscaleIp: "127.0.0.1" })
 * );
 *
 * const probes = await probeNodes(nodes, { port: server.addr.port });
 *
 * assertEquals(probes.map((probe) => probe.state), ["up", "up"]);
 * ```
 */
export async function probeNodes(
  nodes: Iterable<ClusterNode>,
  options: SweepOptions = {},
): Promise<NodeProbe[]> {
  const list = requireNodes(nodes);
  const settings = probeSettings(options);
  const probes = new Array<NodeProbe>(list.length);

  const pool = new ProbePool(list, settings, (probe, index) => {
    probes[index] = probe;
    return options.onProbe?.(probe);
  });
  await pool.run();

  return probes;
}

/** Checks one node; see {@linkcode probeNodes}. */
export async function probeNode(
  node: ClusterNode,
  options: ProbeOptions = {},
): Promise<NodeProbe> {
  const [probe] = await probeNodes([node], options);
  return probe!;
}

/**
 * Resolves to whether a node is up; {@linkcode probeNode} says why not.
 *
 * @throws {Deno.errors.NotCapable} if the node may not be contacted
 */
export async function checkNodeReachable(
  node: ClusterNode,
  options: ProbeOptions = {},
): Promise<boolean> {
  const probes = await upProbes([node], options);
  return probes.length > 0;
}

/**
 * Asks an HTTP server, by default at `/status`, and gives the JSON object that
 * it answers, or `undefined` if there is no such answer.
 *
 * @throws {Deno.errors.NotCapable} if the server may not be contacted
 */
export async function checkHttpEndpoint(
  hostname: string,
  port: number,
  options: ProbeOptions = {},
): Promise<StatusDocument | undefined> {
  requireHost(hostname);
  requireValue("port", port, parsePort);

  const node = new ClusterNode({ name: "server", tailscaleIp: hostname });
  const [probe] = await upProbes([node], { ...options, port, check: "http" });
  return probe?.status;
}

/** Throws unless this is a host as it may stand in an inventory. */
function requireHost(hostname: string): void {
  const host = parseHost(hostname);
  if ("value" in host) return;

  const given = JSON.stringify(hostname);
  throw new TypeError(`Cannot use hostname ${given}: ${host.problem}`);
}

/**
 * Gives the outcomes of the nodes that are up; throws if one may not be
 * contacted.
 */
async function upProbes(
  nodes: readonly ClusterNode[],
  options: SweepOptions,
): Promise<NodeProbe[]> {
  const probes = await probeNodes(nodes, options);
  throwIfDenied(probes);
  return probes.filter(({ state }) => state === "up");
}

/** A node that is up. */
export interface ReachableNode {
  /** The node. */
  readonly node: ClusterNode;
  /** The JSON object that it answered; empty if the answer was none. */
  readonly status: StatusDocument;
  /** The address that answered, as configured. */
  readonly address: string;
  /** Milliseconds until that address accepted. */
  readonly connectMs: number;
}

/** Options of {@linkcode discoverReachableNodes}. */
export interface DiscoverOptions extends SweepOptions {
  /**
   * The inventory.
   *
   * @default {undefined} the file named by `RINGRIFT_HOSTS_CONFIG`, else
   * `config/distributed_hosts.yaml`
   */
  readonly source?: ConfigSource | undefined;
  /** Which nodes to check; by default, all active ones. */
  readonly selection?: NodeSelection | undefined;
}

/**
 * Gives the active nodes of an inventory that are up, in its order.
 *
 * @throws {Deno.errors.NotCapable} if a node may not be contacted
 */
export async function discoverReachableNodes(
  options: DiscoverOptions = {},
): Promise<ReachableNode[]> {
  const { source, selection, signal } = options;
  requireProbeOptions(options);
  if (selection) requireSelection(selection);
  signal?.throwIfAborted();

  const nodes = await loadNodes(source, { signal });
  const selected = selectNodes(nodes.values(), selection);
  const probes = await upProbes(selected, options);

  return probes.map(({ node, status = {}, address, connectMs }) => ({
    node,
    status,
    address: address!,
    connectMs: connectMs!,
  }));
}

/** Options of {@linkcode watchNodes}. */
export interface WatchOptions extends SweepOptions {
  /**
   * Milliseconds from a node's answer to its next check.
   *
   * @default {5000}
   */
  readonly intervalMs?: number | undefined;
}

/**
 * Yields each outcome as it is known, and asks each node again `intervalMs`
 * after its last answer, but not before that was taken. One that hangs holds up
 * nobody.
 *
 * When the signal aborts, or if there are no nodes, the loop ends without an
 * error.
 */
export function watchNodes(
  nodes: Iterable<ClusterNode>,
  options: WatchOptions = {},
): AsyncGenerator<NodeProbe> {
  const { intervalMs = DEFAULTS.watchIntervalMs } = options;
  const list = requireNodes(nodes);
  const settings = probeSettings(options);
  requireDuration("intervalMs", intervalMs);

  return watchPool(list, settings, intervalMs);
}

async function* watchPool(
  nodes: readonly ClusterNode[],
  settings: ProbeSettings,
  intervalMs: number,
): AsyncGenerator<NodeProbe> {
  const { signal } = settings;
  if (nodes.length === 0 || signal?.aborted) return;

  interface Outcome {
    readonly probe: NodeProbe;
    readonly index: number;
    readonly answeredMs: number;
  }
  let pool: ProbePool;
  let running: Promise<void>;
  const outcomes = new ReadableStream<Outcome>({
    start(stream) {
      const note = (probe: NodeProbe, index: number) => {
        stream.enqueue({ probe, index, answeredMs: performance.now() });
        return settings.onProbe?.(probe);
      };
      pool = new ProbePool(nodes, settings, note, { isKeptOpen: true });

      const close = (error: unknown) =>
        signal?.aborted ? stream.close() : stream.error(error);
      // After a `break` in the caller's loop, the stream is closed already.
      running = pool.run().catch(close).catch(() => {});
    },
    async cancel() {
      pool.stop();
      await running;
    },
  });

  for await (const { probe, index, answeredMs } of outcomes) {
    if (signal?.aborted) return;
    yield probe;

    const waitedMs = performance.now() - answeredMs;
    pool!.probeAgain(index, intervalMs - waitedMs);
  }
}

/** Options of {@linkcode waitForNodes}. */
export interface WaitOptions extends SweepOptions {
  /**
   * What to wait for: until enough nodes are up, or until every node is down or
   * unhealthy. A restart that is shorter than `intervalMs` may be missed.
   *
   * @default {"up"}
   */
  readonly until?: "up" | "down" | undefined;
  /**
   * How many nodes have to be up; all of them by default. It does not go with
   * `until: "down"`.
   */
  readonly minUp?: number | undefined;
  /**
   * Milliseconds from a node's answer to its next check.
   *
   * @default {2000}
   */
  readonly intervalMs?: number | undefined;
  /**
   * How long to wait in all, in milliseconds.
   *
   * @default {300000}
   */
  readonly deadlineMs?: number | undefined;
}

/**
 * Waits until enough nodes are up (or every node is down), and gives the last
 * answer of each, in their order: at the moment when that is so, else at the
 * deadline.
 *
 * A check that the deadline cuts off does not replace an earlier answer. If the
 * nodes that can be checked cannot be enough, it does not wait.
 *
 * @throws {Deno.errors.NotCapable} immediately, if net permission is missing
 * for too many nodes
 */
export async function waitForNodes(
  nodes: Iterable<ClusterNode>,
  options: WaitOptions = {},
): Promise<NodeProbe[]> {
  const {
    until = "up",
    minUp,
    intervalMs = DEFAULTS.waitIntervalMs,
    deadlineMs = DEFAULTS.waitDeadlineMs,
  } = options;
  const list = requireNodes(nodes);
  const settings = probeSettings(options);
  requireUntil(until, minUp);
  requireCount("minUp", minUp ?? list.length, 0, list.length);
  requireDuration("intervalMs", intervalMs);
  requireDuration("deadlineMs", deadlineMs);
  settings.signal?.throwIfAborted();

  const isReached = until === "up" ? isUp : isNotServing;
  const needed = minUp ?? list.length;
  const last = list.map((node) => uncheckedProbe(node, settings));
  const canReach = (probe: NodeProbe) =>
    isReached(probe) || isCheckable(probe, settings);
  const possible = last.filter(canReach).length;
  if (possible < needed) {
    throwIfDenied(last);
    return last;
  }

  const endMs = performance.now() + deadlineMs;
  const answered = new Set<number>();
  const reached = new Set<number>();

  const record = (probe: NodeProbe, index: number) => {
    last[index] = probe;
    answered.add(index);
    if (isReached(probe)) {
      reached.add(index);
    } else {
      reached.delete(index);
    }
  };
  // Towards the deadline it asks more often, so that a late change is seen.
  const nextDelayMs = () => {
    const leftMs = endMs - performance.now();
    return Math.min(intervalMs, Math.max(MIN_RECHECK_MS, leftMs / 2));
  };

  const onOutcome = (probe: NodeProbe, index: number) => {
    const isCutOff = pool.isOver && answered.has(index);
    if (isCutOff) return;

    record(probe, index);
    if (reached.size >= needed) {
      pool.stop();
    } else {
      pool.probeAgain(index, nextDelayMs());
    }
    return settings.onProbe?.(probe);
  };
  const pool = new ProbePool(list, settings, onOutcome, { endMs });
  if (needed > 0) await pool.run();

  return last;
}

function requireUntil(until: string, minUp: number | undefined): void {
  if (until !== "up" && until !== "down") {
    const given = JSON.stringify(until);
    throw new TypeError(`Cannot use until ${given}: expected "up" or "down"`);
  }
  if (until === "down" && minUp !== undefined) {
    throw new TypeError(
      'Cannot use minUp with until "down", which waits for all',
    );
  }
}

function isUp({ state }: NodeProbe): boolean {
  return state === "up";
}

function isNotServing({ state }: NodeProbe): boolean {
  return state === "down" || state === "unhealthy";
}

/**
 * Describes a node that was not checked: what keeps it from being checked, if
 * anything does.
 */
function uncheckedProbe(node: ClusterNode, settings: ProbeSettings): NodeProbe {
  const endpoints = checkedEndpoints(node, settings);
  const probe = probeWithoutAddress(node, settings);
  const [endpoint] = endpoints;
  if (!endpoint) return probe;

  const isDenied = !endpoints.some((it) => isAllowed(it, settings));
  const failure: ProbeFailure = isDenied
    ? connectFailure(
      endpoint.host,
      notCapable("net access", netFlag([endpoint])),
    )
    : { code: "other", message: "the wait was over before it was checked" };
  const { port } = endpoint;
  return { ...probe, state: "unknown", port, failure, endpoint, endpoints };
}

function isCheckable(
  { endpoints }: NodeProbe,
  settings: ProbeSettings,
): boolean {
  return endpoints.some((endpoint) => isAllowed(endpoint, settings));
}

function isAllowed(
  { host, port }: Endpoint,
  { isNetOpen }: ProbeSettings,
): boolean {
  return isNetOpen || isNetGranted(host, port);
}
// --- Sync URLs ---

/** Options of {@linkcode getDataSyncUrls}. */
export interface DataSyncUrlOptions
  extends Omit<DiscoverOptions, "port" | "path" | "check"> {
  /**
   * Whether this host itself is left out.
   *
   * @default {true} in `getDataSyncUrls`, `false` in the other functions
   */
  readonly excludeSelf?: boolean | undefined;
  /**
   * Whether nodes that are not up are left out. If not, none is contacted.
   *
   * @default {true}
   */
  readonly reachableOnly?: boolean | undefined;
}

/** Options of {@linkcode getSyncUrls} and {@linkcode getEloSyncUrls}. */
export interface SyncUrlOptions extends DataSyncUrlOptions {
  /**
   * The port of the URLs, which is also the one that is checked.
   *
   * @default {8766} in `getSyncUrls`, `elo_sync.sync_port` in `getEloSyncUrls`
   */
  readonly port?: number | undefined;
  /**
   * The path of the URLs. What is checked is the status path.
   *
   * @default {"/db"}
   */
  readonly path?: string | undefined;
}

/**
 * Lists `http://ADDRESS:PORT/PATH` of each active node that is up on a port.
 *
 * URLs are in the order of the inventory, without duplicates, at the address
 * that answered.
 *
 * @example List the model servers without checking them
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const urls = await getSyncUrls({
 *   source: { hosts: { "gpu-1": { tailscale_ip: "100.64.0.1" } } },
 *   port: MODEL_SYNC_PORT,
 *   path: "/models",
 *   reachableOnly: false,
 * });
 *
 * assertEquals(urls, ["http://100.64.0.1:8765/models"]);
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a node may not be contacted
 */
export async function getSyncUrls(
  options: SyncUrlOptions = {},
): Promise<string[]> {
  const { port = DATA_SYNC_PORT, path = "/db", excludeSelf = false } = options;
  requireUrlOptions(options);

  return await syncUrls({ ...options, port, path, excludeSelf });
}

/**
 * Lists the URLs of the Elo database on the nodes that are up:
 * {@linkcode getSyncUrls} at the port `elo_sync.sync_port`.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a node may not be contacted
 */
export async function getEloSyncUrls(
  options: SyncUrlOptions = {},
): Promise<string[]> {
  const { source, signal } = options;
  requireUrlOptions(options);

  const { config, eloSync } = await loadParsed(source, { signal });
  const port = options.port ?? eloSync.syncPort;

  return await getSyncUrls({ ...options, source: config, port });
}

/**
 * Lists the base URL of the data server of each active node that is up.
 *
 * This host is left out: the node named like `RINGRIFT_NODE_ID`, or else like
 * the hostname, and the nodes at an address of this host.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a node may not be contacted, or if the
 * hostname is needed and may not be read
 */
export async function getDataSyncUrls(
  options: DataSyncUrlOptions = {},
): Promise<string[]> {
  const { excludeSelf = true } = options;
  requireUrlOptions(options);

  return await syncUrls({
    ...options,
    excludeSelf,
    port: undefined,
    path: undefined,
  });
}

/** Throws at a fault of the caller before the inventory is read. */
function requireUrlOptions(options: SyncUrlOptions): void {
  requireProbeOptions(options);
  requireSelection(options.selection ?? {});
  options.signal?.throwIfAborted();
}

async function syncUrls(options: SyncUrlOptions): Promise<string[]> {
  const { source, selection, port, path, signal } = options;
  const { excludeSelf, reachableOnly = true } = options;
  const isThisHost = excludeSelf ? thisHostPredicate() : () => false;

  const all = await loadNodes(source, { signal });
  const nodes = selectNodes(all.values(), selection)
    .filter((node) => !isThisHost(node));

  const endpoints = reachableOnly
    ? await upEndpoints(nodes, options)
    : nodes.map((node) => dataEndpoints(node, port)[0]);

  const urls = new Set<string>();
  for (const endpoint of endpoints) {
    if (endpoint) urls.add(endpointUrl(endpoint, path));
  }
  return [...urls];
}

async function upEndpoints(
  nodes: readonly ClusterNode[],
  options: SyncUrlOptions,
): Promise<(Endpoint | undefined)[]> {
  const { port, timeoutMs, concurrency, onProbe, signal } = options;
  const settings = { port, timeoutMs, concurrency, onProbe, signal };

  const probes = await upProbes(nodes, settings);
  return probes.map((probe) => probe.endpoint);
}

/** Where this host answers in every network. */
const LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "::1", "0.0.0.0", "::"];

/** Returns a predicate that accepts this host, by its name or an address. */
function thisHostPredicate(): (node: ClusterNode) => boolean {
  const nodeId = readVariable("RINGRIFT_NODE_ID")?.toLowerCase();
  if (nodeId === undefined) {
    const purpose = "sys access to leave out this host itself";
    const descriptor = { name: "sys", kind: "hostname" } as const;
    requirePermission(descriptor, "--allow-sys=hostname", purpose);
  }

  const hostnames = ownHostnames();
  const names = new Set(nodeId === undefined ? hostnames : [nodeId]);
  const hosts = new Set(
    [...LOOPBACK_HOSTS, ...hostnames, ...ownAddresses()].map(canonicalHost),
  );

  return (node) => {
    if (names.has(node.name.toLowerCase())) return true;

    const dataHosts = dataEndpoints(node).map(({ host }) => host);
    return [...node.addresses, ...dataHosts]
      .some((host) => hosts.has(canonicalHost(host)));
  };
}

/** Returns the hostname, as it is and to its first dot, if it may be read. */
function ownHostnames(): string[] {
  if (!isGranted({ name: "sys", kind: "hostname" })) return [];

  const hostname = Deno.hostname().toLowerCase();
  const [label = hostname] = hostname.split(".", 1);
  return [hostname, label];
}

function ownAddresses(): string[] {
  if (!isGranted({ name: "sys", kind: "networkInterfaces" })) return [];
  return Deno.networkInterfaces().map(({ address }) => address);
}

/** Returns the one spelling to compare hosts by: 127.0.0.1 for 0x7f.1. */
function canonicalHost(host: string): string {
  const name = withoutZone(host.toLowerCase()).replace(/\.$/, "");
  const hostname = URL.parse(`http://${withBrackets(name)}`)?.hostname ?? name;

  return withoutMapping(withoutBrackets(hostname));
}

/** Returns the IPv4 address of an IPv6 address such as `::ffff:7f00:1`. */
function withoutMapping(address: string): string {
  const match = /^::ffff:([0-9a-f]+):([0-9a-f]+)$/.exec(address);
  if (!match) return address;

  const [high = 0, low = 0] = match.slice(1).map((group) =>
    parseInt(group, 16)
  );
  return [high >> 8, high & 255, low >> 8, low & 255].join(".");
}

// --- ssh ---

/** How long an SSH server may take to greet. */
const GREETING_MS = 2000;

/** How long ssh may take to end after SIGTERM, and its output after that. */
const GRACE_MS = 500;
const DRAIN_STEP_MS = 50;

/** How many characters of each stream a result holds at most. */
const MAX_OUTPUT_LENGTH = 1_048_576;

/** How much of what ssh said last a failure quotes. */
const MAX_REASON_LINES = 3;
const MAX_REASON_LENGTH = 300;
const MAX_TAIL_LENGTH = 4096;

/** The exit code with which ssh says that it failed itself. */
const SSH_FAILED = 255;

/** Options that make ssh connect to something else than a node's endpoint. */
const DETOURS = ["proxyjump", "proxycommand", "hostname", "port"];

/** Options of {@linkcode sshCommand}. */
export interface SshOptions {
  /**
   * The user to log in as.
   *
   * @default {node.sshUser}
   */
  readonly user?: string | undefined;
  /**
   * How long ssh may take to connect, in milliseconds, rounded up to a second.
   *
   * @default {10000}
   */
  readonly connectTimeoutMs?: number | undefined;
  /**
   * Options as `ssh_config(5)` names them, each `KEY=VALUE`. One that is set
   * here replaces the node's own and the default.
   *
   * @default {[]}
   */
  readonly options?: readonly string[] | undefined;
  /**
   * The endpoint to log in at.
   *
   * @default {undefined} the node's first endpoint; in `runOnNodes`, the first
   * that greets
   */
  readonly endpoint?: Endpoint | undefined;
}

/**
 * Builds the argument list, `ssh` first, that runs a command on a node.
 *
 * It never asks for a password, its connect is bounded, and a dead connection
 * ends within about a minute. The words of the command are what ssh itself
 * takes: it joins them by spaces, and a shell on the node reads the result.
 *
 * @example Ask for the load
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const node = new ClusterNode({ name: "gpu-1", tailscaleIp: "100.64.0.1" });
 * const words = sshCommand(node, ["uptime"]);
 *
 * assertEquals(
 *   words.join(" "),
 *   "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 " +
 *     "-p 22 -- ubuntu@100.64.0.1 uptime",
 * );
 * ```
 *
 * @throws {TypeError} if the node has no address, or if ssh could take an
 * option for something else
 */
export function sshCommand(
  node: ClusterNode,
  command: readonly string[],
  options: SshOptions = {},
): [string, ...string[]] {
  const { user = node.sshUser, endpoint = sshEndpoints(node)[0] } = options;
  requireSshOptions(options);
  requireWords(command);
  if (!endpoint) throw noAddress(node);

  // ssh takes the first value of an option, so one that is replaced later is
  // left out. Within a list, an option may stand several times (SendEnv).
  const extra = options.options ?? [];
  const replaced = new Set(extra.map(optionKey));
  if (options.user !== undefined) replaced.add("user");
  if (options.connectTimeoutMs !== undefined) replaced.add("connecttimeout");

  const own = node.sshOptions.filter((it) => !replaced.has(optionKey(it)));
  const set = new Set([...own, ...extra].map(optionKey));
  const defaults = defaultOptions(node, options)
    .filter((option) => !set.has(optionKey(option)));

  const words: string[] = [];
  for (const option of defaults) words.push("-o", option);
  if (!set.has("port")) words.push("-p", String(endpoint.port));
  if (node.sshKey !== undefined && !set.has("identityfile")) {
    words.push("-i", node.sshKey);
  }
  for (const option of [...own, ...extra]) words.push("-o", option);

  return ["ssh", ...words, "--", `${user}@${endpoint.host}`, ...command];
}

function defaultOptions(node: ClusterNode, options: SshOptions): string[] {
  const { connectTimeoutMs = DEFAULTS.connectTimeoutMs } = options;
  const defaults = [
    "BatchMode=yes",
    `ConnectTimeout=${Math.ceil(connectTimeoutMs / 1000)}`,
    `ServerAliveInterval=${DEFAULTS.serverAliveSeconds}`,
  ];

  // Otherwise the keys of an agent come first, and a server refuses the sixth.
  if (node.sshKey !== undefined) defaults.push("IdentitiesOnly=yes");
  return defaults;
}

/** Returns the key of `KEY=VALUE`, whose case means nothing to ssh. */
function optionKey(option: string): string {
  return option.split("=", 1)[0]!.toLowerCase();
}

function requireSshOptions(options: SshOptions): void {
  const { user, connectTimeoutMs, options: extra, endpoint } = options;

  if (user !== undefined) requireValue("user", user, parseUser);
  if (connectTimeoutMs !== undefined) {
    requireDuration("connectTimeoutMs", connectTimeoutMs);
  }
  if (extra !== undefined) {
    requireTexts("options", extra);
    for (const option of extra) {
      requireValue("ssh option", option, parseSshOption);
    }
  }
  if (endpoint !== undefined) {
    requireValue("endpoint.host", endpoint.host, parseHost);
    requireValue("endpoint.port", endpoint.port, parsePort);
  }
}

function requireWords(command: unknown): void {
  requireTexts("command", command);

  const words = command as readonly string[];
  if (words.some((word) => word.includes("\0"))) {
    throw new TypeError("Cannot use command: a word holds a NUL character");
  }
}

function noAddress(node: ClusterNode): TypeError {
  const name = JSON.stringify(node.name);
  return new TypeError(`${name} has no address: ${NO_ADDRESS_HINT}`);
}

/**
 * Returns the endpoints of a node that are raced for a greeting: none if there
 * is nothing to choose, or if an option leads elsewhere.
 */
export function racedSshEndpoints(
  node: ClusterNode,
  options: SshOptions = {},
): Endpoint[] {
  const endpoints = sshEndpoints(node);
  if (options.endpoint !== undefined || endpoints.length < 2) return [];

  const set = [...node.sshOptions, ...options.options ?? []].map(optionKey);
  return set.some((key) => DETOURS.includes(key)) ? [] : endpoints;
}

/**
 * Finds the SSH endpoint of a node that greets first.
 *
 * It is the node's first endpoint if none greets within two seconds, or if
 * they may not be contacted.
 *
 * @throws {TypeError} if the node has no address
 */
export async function findSshEndpoint(
  node: ClusterNode,
  options: RunOptions = {},
): Promise<Endpoint> {
  const { timeoutMs = GREETING_MS, signal } = options;
  signal?.throwIfAborted();

  const first = options.endpoint ?? sshEndpoints(node)[0];
  if (!first) throw noAddress(node);
  if (racedSshEndpoints(node, options).length === 0) return first;

  const probe = await probeNode(node, {
    check: "ssh",
    timeoutMs: Math.min(timeoutMs, GREETING_MS),
    signal,
  });
  const greeted = probe.state === "up" ? probe.endpoint : undefined;
  return greeted ?? first;
}

/** Options of {@linkcode runOnNodes}. */
export interface RunOptions extends SshOptions {
  /**
   * How long each node may take in all, in milliseconds.
   *
   * @default {undefined} as long as the command does
   */
  readonly timeoutMs?: number | undefined;
  /**
   * On how many nodes the command runs at once.
   *
   * @default {32}
   */
  readonly concurrency?: number | undefined;
  /**
   * What every node's command reads.
   *
   * @default {undefined} nothing
   */
  readonly stdin?: Uint8Array<ArrayBuffer> | undefined;
  /**
   * Ends every ssh; the call then rejects with the signal's reason.
   *
   * @default {undefined}
   */
  readonly signal?: AbortSignal | undefined;
  /**
   * Called with all that a node writes, as it comes.
   *
   * A promise that it returns is awaited before more is read. What it throws
   * ends every ssh and rejects the call.
   *
   * @default {undefined}
   */
  readonly onOutput?:
    | ((
      node: ClusterNode,
      stream: "stdout" | "stderr",
      text: string,
    ) => void | Promise<void>)
    | undefined;
  /**
   * Called with each result as soon as it is known.
   *
   * A promise that it returns is awaited before another command is started in
   * its place. What it throws ends every ssh and rejects the call.
   *
   * @default {undefined}
   */
  readonly onResult?:
    | ((result: CommandResult) => void | Promise<void>)
    | undefined;
}

/**
 * Why a command failed.
 *
 * - `ssh`: ssh exited with 255, its own code for a connection or a login that
 *   failed or broke. A command that returns 255 looks the same.
 * - `exit`: the command ended with any other code.
 * - `timeout`: `timeoutMs` was over.
 * - `signal`: ssh was ended by a signal.
 * - `no-address`: the node has none.
 * - `local`: ssh could not be started.
 */
export type CommandFailureCode =
  | "ssh"
  | "exit"
  | "timeout"
  | "signal"
  | "no-address"
  | "local";

/** What went wrong with a command on one node. */
export interface CommandFailure {
  /** The kind of failure. */
  readonly code: CommandFailureCode;
  /** The reason for people, on one line. */
  readonly message: string;
}

/** The outcome of a command on one node. */
export interface CommandResult {
  /** The node that it is about. */
  readonly node: ClusterNode;
  /** The exit code, or `null` if there is none. */
  readonly exitCode: number | null;
  /** The signal that ended ssh, or `null`. */
  readonly signal: string | null;
  /** The first 1,048,576 characters of its standard output. */
  readonly stdout: string;
  /** The first 1,048,576 characters of its standard error and ssh's own. */
  readonly stderr: string;
  /** Whether there was more text than `stdout` or `stderr` hold. */
  readonly truncated: boolean;
  /** How long it took, in milliseconds. */
  readonly durationMs: number;
  /** Why it failed; `undefined` if it returned 0. */
  readonly failure: CommandFailure | undefined;
}

/**
 * Runs a command on many nodes over ssh.
 *
 * The words of the command are joined by spaces, and a shell on the node reads
 * the result: `["echo", "a  b"]` prints `a b`. Quote for that shell.
 *
 * A node with several SSH endpoints is reached at the one that greets first,
 * so that a command never runs twice. Each ssh runs in a session of its own,
 * without a terminal: it cannot ask anything.
 *
 * An ssh that is ended, by `timeoutMs` or `signal`, does not end its command:
 * that may still be running on the node, unless the option `RequestTTY=force`
 * ties it to the connection.
 *
 * @example Report what failed
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const nodes = [new ClusterNode({ name: "not-set-up" })];
 * const results = await runOnNodes(nodes, ["nvidia-smi", "-L"]);
 *
 * const failures = results.map(({ node, failure }) =>
 *   `${node.name}: ${failure?.message ?? "done"}`
 * );
 * assertEquals(failures, ["not-set-up: set tailscale_ip or ssh_host"]);
 * ```
 *
 * @param command the words that ssh takes, or a function that returns those of
 * a node
 * @returns one result for each node, in their order
 * @throws {TypeError} if a command or an option is not safe, or if an endpoint
 * is given for several nodes
 * @throws {Deno.errors.NotCapable} if ssh may not be run
 * @throws {Deno.errors.NotFound} if there is no ssh
 */
export async function runOnNodes(
  nodes: Iterable<ClusterNode>,
  command: readonly string[] | ((node: ClusterNode) => readonly string[]),
  options: RunOptions = {},
): Promise<CommandResult[]> {
  const { concurrency = DEFAULTS.commandConcurrency, signal } = options;
  const list = requireNodes(nodes);
  requireRunOptions(options);

  if (options.endpoint !== undefined && list.length > 1) {
    throw new TypeError(
      `Cannot use endpoint for ${list.length} nodes: expected one node`,
    );
  }

  const runs = list.map((node) => {
    const words = typeof command === "function" ? command(node) : command;
    requireCommand(words);
    return { node, words };
  });

  signal?.throwIfAborted();
  requireRunPermission();

  // A fault on this side ends every ssh: nobody is left to take the output.
  const fault = new AbortController();
  const signals = signal ? [signal, fault.signal] : [fault.signal];
  const ended = AbortSignal.any(signals);

  const runOne = async (run: NodeRun) => {
    try {
      ended.throwIfAborted();
      const result = await runOnNode(run, { ...options, signal: ended });
      await delivered(options.onResult?.(result), ended);
      return result;
    } catch (error) {
      fault.abort(error);
      throw error;
    }
  };

  const results: AsyncIterable<CommandResult> = pooledMap(
    concurrency,
    runs,
    runOne,
  );
  try {
    const all = await Array.fromAsync(results);
    ended.throwIfAborted();
    return all;
  } catch (error) {
    // The pool's own error is a list of what each run threw.
    ended.throwIfAborted();
    throw error;
  }
}

function requireRunOptions(options: RunOptions): void {
  const { timeoutMs, concurrency, stdin } = options;
  requireSshOptions(options);

  if (timeoutMs !== undefined) requireDuration("timeoutMs", timeoutMs);
  if (concurrency !== undefined) requireCount("concurrency", concurrency, 1);
  if (stdin !== undefined && !(stdin instanceof Uint8Array)) {
    throw new TypeError(
      `Cannot use stdin: expected a Uint8Array, got ${givenName(stdin)}`,
    );
  }
}

function requireCommand(words: readonly string[]): void {
  requireWords(words);

  if (words.length === 0) {
    throw new TypeError("Cannot use command: the list of words is empty");
  }
}

/** Waits for what a callback returned, but not after the call was aborted. */
async function delivered(
  returned: void | Promise<void>,
  signal: AbortSignal,
): Promise<void> {
  const aborted = Promise.withResolvers<void>();
  const release = () => aborted.resolve();
  if (signal.aborted) release();

  signal.addEventListener("abort", release);
  try {
    await Promise.race([returned, aborted.promise]);
  } finally {
    signal.removeEventListener("abort", release);
  }
}

/** One node and its command. */
interface NodeRun {
  readonly node: ClusterNode;
  readonly words: readonly string[];
}

/** {@linkcode RunOptions} with the signal that ends every ssh. */
interface NodeRunOptions extends RunOptions {
  readonly signal: AbortSignal;
}

async function runOnNode(
  run: NodeRun,
  options: NodeRunOptions,
): Promise<CommandResult> {
  const startedMs = performance.now();
  const deadline = new AbortController();
  const timer = startDeadline(deadline, options.timeoutMs);

  try {
    const outcome = await sshOutcome(run, {
      ...options,
      deadline: deadline.signal,
    });
    const durationMs = Math.round(performance.now() - startedMs);
    return { node: run.node, ...NO_OUTPUT, ...outcome, durationMs };
  } finally {
    clearTimeout(timer);
  }
}

function startDeadline(
  deadline: AbortController,
  timeoutMs: number | undefined,
): ReturnType<typeof setTimeout> | undefined {
  if (timeoutMs === undefined) return undefined;

  const reason = `timed out after ${formatMs(timeoutMs)}`;
  return setTimeout(() => deadline.abort(reason), timeoutMs);
}

/** What an ssh put out, and how it ended. */
type SshOutput = Omit<CommandResult, "node" | "durationMs" | "failure">;

const NO_OUTPUT: SshOutput = {
  exitCode: null,
  signal: null,
  stdout: "",
  stderr: "",
  truncated: false,
};

interface SshOutcome extends Partial<SshOutput> {
  readonly failure: CommandFailure | undefined;
}

/** {@linkcode NodeRunOptions} with the deadline of one node. */
interface SshRunOptions extends NodeRunOptions {
  /** Aborts with the words for people. */
  readonly deadline: AbortSignal;
}

async function sshOutcome(
  { node, words }: NodeRun,
  options: SshRunOptions,
): Promise<SshOutcome> {
  const { stdin, onOutput, signal, deadline } = options;
  const isPlaced = options.endpoint !== undefined || node.bestIp !== undefined;
  if (!isPlaced) {
    return { failure: { code: "no-address", message: NO_ADDRESS_HINT } };
  }

  const endpoint = await findSshEndpoint(node, options);
  signal.throwIfAborted();
  if (deadline.aborted) {
    return { failure: { code: "timeout", message: deadline.reason } };
  }

  const argv = sshCommand(node, words, { ...options, endpoint });
  const started = startSsh(argv, stdin ? "piped" : "null");
  if ("problem" in started) {
    return { failure: { code: "local", message: started.problem } };
  }

  const ssh = new SshProcess(started.value, async (stream, text) => {
    await delivered(onOutput?.(node, stream, text), signal);
  });
  if (stdin) ssh.feed(stdin);

  const output = await ssh.finish(AbortSignal.any([signal, deadline]));
  if (output.signal !== null) {
    return { ...output, failure: endFailure(output.signal, options) };
  }
  if (output.exitCode === SSH_FAILED) {
    const hint = hostKeyHint(ssh.lastWords) ?? permissionHint(node, options);
    const message = sshReason(ssh.lastWords, hint);
    return { ...output, failure: { code: "ssh", message } };
  }
  if (output.exitCode !== 0) {
    const message = `exit code ${output.exitCode}`;
    return { ...output, failure: { code: "exit", message } };
  }

  return { ...output, failure: undefined };
}

function startSsh(
  argv: readonly [string, ...string[]],
  stdin: "piped" | "null",
): Parsed<Deno.ChildProcess> {
  const streams = { stdin, stdout: "piped", stderr: "piped" } as const;

  try {
    return { value: spawnSsh(argv, streams, { detached: true }) };
  } catch (error) {
    // Without an ssh, no other node can be reached either.
    if (error instanceof Deno.errors.NotFound) throw error;
    return { problem: `ssh cannot be started (${errorText(error)})` };
  }
}

/**
 * Starts an argument list of {@linkcode sshCommand}.
 *
 * Detached, it is in a session of its own: it has no terminal, gets no Ctrl-C
 * and can ask nothing. A login is not detached.
 *
 * @throws {Deno.errors.NotCapable} if ssh may not be run
 * @throws {Deno.errors.NotFound} if there is no ssh
 */
export function spawnSsh(
  argv: readonly [string, ...string[]],
  streams: Pick<Deno.CommandOptions, "stdin" | "stdout" | "stderr">,
  options: Pick<Deno.CommandOptions, "detached"> = {},
): Deno.ChildProcess {
  const [program, ...args] = argv;
  requireRunPermission();

  try {
    return new Deno.Command(program, { args, ...streams, ...options }).spawn();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    throw new Deno.errors.NotFound(
      "There is no ssh on the PATH: install OpenSSH",
    );
  }
}

function requireRunPermission(): void {
  const descriptor = { name: "run", command: "ssh" } as const;
  const what = "run access to ssh (on the PATH)";
  requirePermission(descriptor, "--allow-run=ssh", what);
}

type OutputStream = "stdout" | "stderr";

/** An ssh that runs: what it reads and writes, and how it is ended. */
class SshProcess {
  readonly #child: Deno.ChildProcess;
  readonly #stdout: OutputReader;
  readonly #stderr: OutputReader;
  readonly #exited = new AbortController();
  #endedBy: Deno.Signal | null = null;
  #killTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    child: Deno.ChildProcess,
    deliver: (stream: OutputStream, text: string) => Promise<void>,
  ) {
    this.#child = child;
    this.#stdout = new OutputReader(
      child.stdout,
      (text) => deliver("stdout", text),
    );
    this.#stderr = new OutputReader(
      child.stderr,
      (text) => deliver("stderr", text),
    );
  }

  /** What ssh or the command said last. */
  get lastWords(): string {
    return this.#stderr.tail;
  }

  /** Writes the command's input, which it need not read to the end. */
  feed(input: Uint8Array<ArrayBuffer>): void {
    const { signal } = this.#exited;
    const source = ReadableStream.from([input]);

    source.pipeTo(this.#child.stdin, { signal }).catch(() => {});
  }

  /** Waits until ssh exits, and ends it if the signal aborts. */
  async finish(ended: AbortSignal): Promise<SshOutput> {
    const readers = [this.#stdout, this.#stderr];
    const end = () => this.#end();

    if (ended.aborted) end();
    ended.addEventListener("abort", end);
    // If output cannot be delivered, ssh is ended.
    for (const reader of readers) reader.done.catch(end);

    const status = await this.#child.status;
    this.#exited.abort();
    clearTimeout(this.#killTimer);
    ended.removeEventListener("abort", end);

    const drained = await Promise.allSettled(readers.map((it) => it.drain()));
    for (const outcome of drained) {
      if (outcome.status === "rejected") throw outcome.reason;
    }

    // At SIGTERM, ssh itself exits with 255. Any other code is the command's,
    // which ended just before.
    const isEnded = status.code === SSH_FAILED;
    const signal = status.signal ?? (isEnded ? this.#endedBy : null);
    return {
      exitCode: signal === null ? status.code : null,
      signal,
      stdout: this.#stdout.text,
      stderr: this.#stderr.text,
      truncated: this.#stdout.isTruncated || this.#stderr.isTruncated,
    };
  }

  #end(): void {
    if (this.#endedBy !== null || this.#exited.signal.aborted) return;

    this.#endedBy = "SIGTERM";
    this.#kill("SIGTERM");
    this.#killTimer = setTimeout(() => this.#kill("SIGKILL"), GRACE_MS);
  }

  #kill(signal: Deno.Signal): void {
    try {
      this.#child.kill(signal);
    } catch {
      // It has ended already.
    }
  }
}

/** Reads one stream of ssh as text, no faster than that is delivered. */
class OutputReader {
  /** Settles when all is read; rejects with what delivering it threw. */
  readonly done: Promise<void>;
  /** The first of the text. */
  text = "";
  /** The last of the text. */
  tail = "";
  isTruncated = false;
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  readonly #deliver: (text: string) => Promise<void>;
  #isReading = false;
  #isDone = false;

  constructor(
    stream: ReadableStream<Uint8Array>,
    deliver: (text: string) => Promise<void>,
  ) {
    this.#reader = stream.getReader();
    this.#deliver = deliver;
    this.done = this.#readAll();
  }

  async #readAll(): Promise<void> {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

    try {
      let bytes = await this.#read();
      while (bytes) {
        await this.#take(decoder.decode(bytes, { stream: true }));
        bytes = await this.#read();
      }
      await this.#take(decoder.decode());
    } finally {
      this.#isDone = true;
      await this.#reader.cancel();
    }
  }

  async #read(): Promise<Uint8Array | undefined> {
    this.#isReading = true;
    const { value } = await this.#reader.read();

    this.#isReading = false;
    return value;
  }

  async #take(text: string): Promise<void> {
    if (text === "") return;

    if (!this.isTruncated) this.#keep(text);
    this.tail = (this.tail + text).slice(-MAX_TAIL_LENGTH);

    await this.#deliver(text);
  }

  #keep(text: string): void {
    const kept = beginning(text, MAX_OUTPUT_LENGTH - this.text.length);
    this.text += kept;
    this.isTruncated = kept.length < text.length;
  }

  /**
   * Reads the rest, after ssh has ended.
   *
   * A process that ssh leaves, such as a ControlPersist master, can hold the
   * pipe, and write to it, for ever. What ssh itself wrote is in the pipe
   * already, so this gives up once reading had to wait for half a second in all.
   */
  async drain(): Promise<void> {
    let waitedMs = 0;
    while (!this.#isDone && waitedMs < GRACE_MS) {
      await settledOrAfter(this.done, DRAIN_STEP_MS);
      if (this.#isReading) waitedMs += DRAIN_STEP_MS;
    }

    if (!this.#isDone) await this.#reader.cancel();
    await this.done;
  }
}

/** Returns the beginning of a text, without half of a character at its end. */
function beginning(text: string, length: number): string {
  if (text.length <= length) return text;

  return text.slice(0, length).replace(/[\ud800-\udbff]$/, "");
}

const STILL_RUNNING = "the command may still be running on the node " +
  "(-o RequestTTY=force ends it with the connection)";

/** Says why ssh was ended by a signal. */
function endFailure(
  endedBy: string,
  { signal, deadline }: SshRunOptions,
): CommandFailure {
  const isLate = deadline.aborted && !signal.aborted;
  const reason = isLate ? deadline.reason : `ended by ${endedBy}`;

  return {
    code: isLate ? "timeout" : "signal",
    message: `${reason}; ${STILL_RUNNING}`,
  };
}

/** Quotes the last lines of ssh: the cause is often not in the last one. */
function sshReason(lastWords: string, hint: string | undefined): string {
  const lines = stderrLines(lastWords).slice(-MAX_REASON_LINES).map(shorten);

  while (lines.length > 1 && lines.join("; ").length > MAX_REASON_LENGTH) {
    lines.shift();
  }
  if (lines.length === 0) {
    lines.push(
      "ssh exited with 255 without a message",
      "the command itself may also have returned 255",
    );
  }
  if (hint !== undefined) lines.push(hint);

  return lines.join("; ");
}

/** Whether the failure of a command quotes all of its standard error. */
export function quotesStderr({ failure, stderr }: CommandResult): boolean {
  const lines = stderrLines(stderr);
  const isQuoted = lines.length <= MAX_REASON_LINES &&
    lines.join("; ").length <= MAX_REASON_LENGTH;

  return failure?.code === "ssh" && isQuoted;
}

function stderrLines(text: string): string[] {
  return text.split(/[\r\n]+/)
    .map((line) => line.trim().replace(/^ssh: /, "").replace(/\.$/, ""))
    .filter((line) => line !== "");
}

function shorten(line: string): string {
  const shown = beginning(line, MAX_REASON_LENGTH);
  return shown === line ? line : `${shown}…`;
}

/** Names the option that accepts an unknown host key, but no changed one. */
function hostKeyHint(lastWords: string): string | undefined {
  // ssh does not pass the option on to the ssh of a jump host, which says this
  // before other lines.
  const isRefused = lastWords.trimEnd()
    .endsWith("Host key verification failed.");
  const isChanged = /host key .* has changed/i.test(lastWords);
  if (!isRefused || isChanged) return undefined;

  return "-o StrictHostKeyChecking=accept-new accepts a host key that is new";
}

/** Names the flag with which the other endpoints of a node can be tried. */
function permissionHint(
  node: ClusterNode,
  options: SshOptions,
): string | undefined {
  const raced = racedSshEndpoints(node, options);
  const isRaced = raced.every(({ host, port }) => isNetGranted(host, port));
  if (isRaced) return undefined;

  return `run with ${netFlag(raced)} to try its other address`;
}
