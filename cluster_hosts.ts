/**
 * Reads the inventory of a cluster and answers the questions that scripts ask
 * about it: which hosts exist, which of them respond, which URLs data can be
 * pulled from, and what a command outputs on each host.
 *
 * The following holds for every function:
 *
 * - Importing this module needs no permission. Permissions are checked when
 *   they are needed, and never prompted for. A missing permission throws
 *   `Deno.errors.NotCapable` with the exact flag (`probeNode`, `probeNodes` and
 *   `watchNodes` report it as `denied` instead); an environment variable that
 *   may not be read counts as unset.
 * - An inventory that cannot be used throws {@linkcode HostsConfigError}.
 * - Invalid arguments throw a `TypeError` or `RangeError` before any node is
 *   contacted. The failure of a single node never rejects a call.
 * - Durations are in milliseconds unless noted otherwise. An option set to
 *   `undefined` gets its default.
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
 * The default port of a node's data server. It is intentionally the same as
 * {@linkcode ELO_SYNC_PORT}.
 */
export const DATA_SYNC_PORT = 8766;

/** The default port of the model server. */
export const MODEL_SYNC_PORT = 8765;

/**
 * The inventory that is read if no other is given, relative to the working
 * directory.
 */
export const DEFAULT_CONFIG_PATH = "config/distributed_hosts.yaml";

/** An example inventory, next to the default one in a checkout. */
const EXAMPLE_CONFIG_PATH = "config/distributed_hosts.example.yaml";

/** The variable that names the inventory if the caller does not. */
const CONFIG_VARIABLE = "RINGRIFT_HOSTS_CONFIG";

/**
 * The variable that names another program's config, which may set the data
 * port.
 */
const UNIFIED_CONFIG_VARIABLE = "RINGRIFT_CONFIG_PATH";

/**
 * The variable that gives the coordinator's address if the inventory does not.
 */
const COORDINATOR_VARIABLE = "RINGRIFT_COORDINATOR_IP";

/** The path that a check requests, unless a node or the caller sets another. */
const DEFAULT_STATUS_PATH = "/status";

/** The SSH user, unless the inventory sets one. */
const DEFAULT_SSH_USER = "ubuntu";

/**
 * The defaults of options, for the library and the help text. Names ending in
 * `Ms` are in milliseconds.
 */
export const DEFAULTS = {
  timeoutMs: 5000,
  /** The maximum number of nodes checked at a time. */
  concurrency: 10_000,
  watchIntervalMs: 5000,
  waitIntervalMs: 2000,
  waitDeadlineMs: 300_000,
  /** The maximum number of nodes on which a command runs at a time. */
  commandConcurrency: 32,
  connectTimeoutMs: 10_000,
  serverAliveSeconds: 15,
} as const;

/** The default ports, which a URL may omit. */
const DEFAULT_PORTS: Readonly<Record<string, number>> = {
  "http:": 80,
  "https:": 443,
  "ssh:": 22,
};

/** The maximum size of an inventory from a URL. */
const MAX_CONFIG_BYTES = 16 * 1024 * 1024;

/** The maximum nesting depth of an inventory or an answer. */
const MAX_DEPTH = 100;

/** The maximum number of values that aliases may add to an inventory. */
const MAX_ALIASED_VALUES = 1_000_000;

/** Tells how to fix a node that has no address. */
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
 * One problem with an inventory. It never quotes a value that may be secret.
 */
export interface ConfigProblem {
  /**
   * The path of the key, such as `hosts.gpu-1.ssh_port`; empty for the whole
   * file.
   */
  readonly path: string;
  /** What is wrong, and how to fix it. */
  readonly message: string;
  /** The line, counted from 1, if known. */
  readonly line?: number;
  /** The column, counted from 1, if known. */
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
  /** The file or URL, in the form shown to people. */
  readonly origin: string;
  /** Every problem, in the order of the file. */
  readonly problems: readonly ConfigProblem[];

  /**
   * Creates an error that reports all `problems` of `origin`, a file or URL.
   */
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
  // A path locates the problem better than a column does.
  if (path !== "") return `${place.join(":")}: ${path}: ${message}`;

  if (column !== undefined) place.push(String(column));
  return `${place.join(":")}: ${message}`;
}

/**
 * Finds the known word that was probably meant: one that differs only in case
 * or by one edit, else (if `word` has at least three letters) the first that
 * starts with `word`.
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
 * Reports whether two words differ only in case, or by one insertion, deletion,
 * replacement or swap of adjacent letters.
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
 * Explains why a version of Deno is not supported; returns `undefined` if it
 * is.
 *
 * Before 2.9, `node:tls` does not close the sockets it opened, and on 2.8.3 a
 * read from a silent node never ends. Before 2.4, ssh would share the terminal.
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
 * Describes an error in one line. Errors from `fetch` give the reason in
 * `cause`.
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
 * TLS errors, matched by the messages of rustls (`fetch`) and the codes of
 * `node:tls`, and their explanations.
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

/** Explains a TLS error; returns `undefined` for any other error. */
function tlsProblem(error: unknown): string | undefined {
  const { code = "" } = Object(error) as { code?: unknown };
  const text = `${code} ${errorText(error)}`;

  const known = TLS_FAULTS.find(([pattern]) => pattern.test(text));
  if (known) return known[1];

  const isTls = /certificate|\bTLS\b|HandshakeFailure|\bCERT_|ERR_(?:SSL|TLS)_/i
    .test(text);
  return isTls ? `TLS: ${text.trim().split(": ").at(-1)}` : undefined;
}

/** Returns the nodes as a list; throws a `TypeError` if they are not nodes. */
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

/** Suggests what to pass where nodes are expected. */
function nodesHint(given: unknown): string {
  if (given instanceof Map) return "pass its values()";
  if (isPromise(given)) return "await it";
  if (given instanceof ClusterNode) return "put it in a list";

  return "pass ClusterNodes, such as those of getActiveNodes()";
}

/** Names what a caller passed, as in "got a Map". */
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

/** Throws if `parse` rejects a value or would change it. */
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

/** A parsed value, or what is wrong with the written one. */
export type Parsed<T> = { readonly value: T } | { readonly problem: string };

/** One field of a mapping. */
interface Field<T> {
  /** The key in the inventory. */
  readonly key: string;
  /** Parses the written value, trimmed; never called with an unset value. */
  readonly parse: (value: unknown) => Parsed<T>;
  /** The value if the field is unset. */
  readonly fallback?: T;
  /**
   * Whether a host that does not set the field can derive it from another one.
   */
  readonly isDerived?: boolean;
}

type FieldTable = Readonly<Record<string, Field<unknown>>>;

const NO_OPTIONS: readonly string[] = Object.freeze([]);

/**
 * Every field of a host. To add one, add a row here and a documented property
 * to {@linkcode ClusterNode}.
 */
export const HOST_FIELDS = {
  tailscaleIp: { key: "tailscale_ip", parse: parseHost },
  sshHost: { key: "ssh_host", parse: parseSshHost },
  // The user in a host's own ssh_host takes precedence over `defaults`.
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

/** The fields that locate a single host, which `defaults` cannot set. */
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
 * The only field that hosts inherit from `distributed`, a section that belongs
 * to another program.
 */
const DISTRIBUTED_FIELDS = {
  dataServerPort: { key: "data_server_port", parse: parsePort },
} satisfies FieldTable;

/** An invalid field: its property name, its key, and what is wrong. */
interface FieldProblem {
  readonly name: string;
  readonly key: string;
  readonly problem: string;
}

/**
 * Parses the fields of a table. A field that is unset or invalid gets its
 * fallback.
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

/** Reports whether a value is missing, null, blank or a `<placeholder>`. */
function isUnset(value: unknown): boolean {
  if (typeof value !== "string") return value === undefined || value === null;

  const text = value.trim();
  return text === "" || isPlaceholder(text);
}

function isPlaceholder(text: string): boolean {
  return text.endsWith(">") && /^(?:[^@]*@)?<[^<>]*>$/.test(text);
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Names the type of a value in YAML terms, such as "a list". */
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
    return { problem: "contains a control character" };
  }

  return { value };
}

/** Explains how to fix a value that YAML does not read as text. */
function notTextProblem(value: unknown): string {
  const hint = Array.isArray(value)
    ? "write one value, or put it in quotes"
    : "put it in quotes";

  return `expected text, got ${typeName(value)}: ${hint}`;
}

/** Parses a note for people, which may span several lines. */
function parseNote(value: unknown): Parsed<string> {
  if (typeof value !== "string") return parseText(value);

  const onOneLine = parseText(value.replace(/[\n\t]/g, " "));
  return "problem" in onOneLine ? onOneLine : { value };
}

/** Parses the name of a model, which may be a number: `gpu: 4090`. */
function parseModel(value: unknown): Parsed<string> {
  return parseText(Number.isFinite(value) ? String(value) : value);
}

function parseTexts(value: unknown): Parsed<readonly string[]> {
  const isList = Array.isArray(value) &&
    value.every((item) => "value" in parseText(item));

  if (!isList) return { problem: "expected a list of strings" };
  return { value: Object.freeze([...value]) };
}

// The characters are spelt out because a class such as \p{Cf} takes longer to
// compile than a small inventory takes to load.
const UNSAFE_CHARACTER =
  // deno-lint-ignore no-control-regex
  /[\s\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff;&|<>()$`\\"'*?[\]{}!#%^]/;

/** Parses a word that neither ssh nor a shell can misinterpret. */
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
 * Parses a host name or an address, without a user, port or path.
 *
 * A non-ASCII name is converted to ASCII, as DNS, ssh and Deno's permissions
 * require. An ASCII name is kept as written.
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
        "expected only a host name or an address, without user, port or path",
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

/** Parses an IPv6 address, which may have a zone, as in `fe80::1%eth0`. */
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
    return { problem: "expected only a user name" };
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

/** Parses and normalises a base URL, so that each server has only one URL. */
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

/** Removes the trailing slashes of a path. */
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

  return { problem: 'expected a URL-encoded path that begins with "/"' };
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

/**
 * Keywords valid only in an ssh config file; `Match` could also run a program.
 */
const SSH_FILE_WORDS = ["host", "match", "include"];

/**
 * Options whose values ssh inserts into paths or command lines of other
 * programs.
 */
const SSH_WORD_OPTIONS = ["hostname", "hostkeyalias", "user", "identityfile"];

/** Options that make ssh run a program or load a library on this machine. */
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
 * removed.
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

/**
 * Explains what is wrong with an ssh option; returns `undefined` if it is
 * valid.
 */
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

/** Parses one hop of ProxyJump: `[user@]host[:port]` or an `ssh://` URL. */
function parseJumpHost(text: string): Parsed<string> {
  const hop = text.replace(/^ssh:\/\//i, "");

  // An IPv6 address without brackets cannot have a port.
  const [suffix = "", digits] = /(?<=^[^:]*|\]):(\d+)$/.exec(hop) ?? [];
  const port = digits === undefined ? undefined : parsePort(digits);
  if (port && "problem" in port) return port;

  return parseSshHost(hop.slice(0, hop.length - suffix.length));
}

/** Reports whether an ssh option runs a program or loads a library here. */
function runsProgramHere(option: string): boolean {
  const [key = ""] = option.split("=", 1);
  return SSH_PROGRAM_OPTIONS.includes(key.toLowerCase());
}

// --- ClusterNode, EloSyncConfig ---

/** The SSH user of a node for which none was set. */
interface DerivedUser {
  /** The user in `sshHost`, else the fallback. */
  readonly user: string;
  /** The user from `defaults`, else {@linkcode DEFAULT_SSH_USER}. */
  readonly fallback: string;
}

/**
 * The derived users, keyed by `entry`: each such node has an entry object of
 * its own, which `{ ...node }` carries over.
 */
const derivedUsers = new WeakMap<HostEntry, DerivedUser>();

/**
 * A node of the cluster, with defaults applied. Instances are frozen.
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
   * The address inside the tailnet. It is tried first, except for SSH at a port
   * other than 22.
   *
   * @default {undefined}
   */
  readonly tailscaleIp!: string | undefined;
  /**
   * A host name or address, optionally with a user: `user@host`.
   *
   * @default {undefined}
   */
  readonly sshHost!: string | undefined;
  /**
   * The SSH user: the one that is set, else the one in `sshHost`, else the one
   * in the inventory's `defaults`.
   *
   * In a copy such as `{ ...node, sshHost }`, a user that was not set is
   * derived again from the new `sshHost`. To keep it, write it there:
   * `root@192.0.2.2`.
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
  /** Memory in GB; 0 if unknown. @default {0} */
  readonly memoryGb!: number;
  /** The number of CPU cores; 0 if unknown. @default {0} */
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
  /** The path that a check requests. @default {"/status"} */
  readonly statusPath!: string;
  /**
   * The host's mapping as written, including custom keys.
   *
   * @default {{}}
   */
  readonly entry!: HostEntry;

  /**
   * Creates a node. Null, a blank string and a `<placeholder>` count as unset.
   *
   * @throws {TypeError} if any field is invalid; the message lists all of them
   */
  constructor(fields: ClusterNodeFields) {
    const { values, origin } = parseNode(fields);
    completeNode(this, values, origin);
  }

  /**
   * The preferred address: `tailscaleIp`, else the host in `sshHost`;
   * `undefined` if neither is set.
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
   * `dataServerUrl`, else `http://ADDRESS:PORT`, without a trailing slash;
   * `undefined` if the node has no address either.
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

/**
 * Parses a caller's fields; throws a `TypeError` that lists all invalid ones.
 */
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

  // A derived user that was copied from another node is derived again.
  const derived = derivedUsers.get(entry);
  if (values.sshUser === derived?.user) values.sshUser = undefined;

  const origin = { name, entry, fallbackUser: derived?.fallback };
  return { values, origin };
}

/** Creates a node from values that are already parsed. */
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

/**
 * Sets the properties of a node, derives its user if needed, and freezes it.
 */
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

/**
 * Explains what is wrong with a host's name; returns `undefined` if it is
 * valid.
 */
function findNameProblem(name: unknown): string | undefined {
  if (typeof name !== "string" || name.trim() === "") {
    return "a host's name is blank";
  }
  if (hasControlCharacter(name)) return "a host's name has a control character";
  if (!/[,[\]*?]/.test(name) && name.trim() === name) return undefined;

  return "a host's name must not contain a comma, a bracket, a wildcard, or a " +
    "leading or trailing space: it could not be selected by name";
}

/**
 * The fields that a {@linkcode ClusterNode} is created from: its name and,
 * optionally, any others.
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

/** How the Elo ratings database is synchronised. The object is frozen. */
export interface EloSyncConfig {
  /** The name of the coordinator node. @default {"mac-studio"} */
  readonly coordinator: string;
  /** The port of the database on each node. @default {8766} */
  readonly syncPort: number;
  /** Seconds between two rounds of synchronisation. @default {300} */
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
 * A path, a URL (`file:`, `http:` or `https:`), or a config: one that is
 * already loaded, or an inline object such as `{ hosts }`.
 */
export type ConfigSource = string | URL | HostsConfig;

/**
 * One host as written, with snake_case keys; config/README.md lists the known
 * ones.
 */
export type HostEntry = Readonly<Record<string, unknown>>;

/**
 * An inventory as written, including unknown sections: a finite tree, frozen if
 * this module parsed it. To edit one, copy it with `structuredClone`.
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
  /**
   * The path or URL to show to people, without the user and password of a URL.
   */
  readonly origin: string;
  /** Whether the file exists. Only the default one may be missing. */
  readonly exists: boolean;
}

/** Options of {@linkcode loadHostsConfig}. */
export interface LoadOptions {
  /** How long fetching a URL may take, in milliseconds. @default {5000} */
  readonly timeoutMs?: number | undefined;
  /**
   * Aborts loading, which then rejects with the signal's reason.
   *
   * @default {undefined}
   */
  readonly signal?: AbortSignal | undefined;
}

/** What was read, or why nothing could be read. */
type Read<T> =
  | { readonly value: T }
  | { readonly problem: string; readonly cause?: unknown };

/**
 * Reads the text that {@linkcode loadHostsConfig} would load.
 *
 * If the default file is missing, the result is an empty text with
 * `exists: false`.
 *
 * @throws {HostsConfigError} if the file or URL cannot be read
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
  /** The variable that names the file or URL. */
  readonly namedBy?: string | undefined;
}

/** Creates the error for a file or URL that could not be read. */
function readError(
  origin: string,
  { problem, cause, namedBy }: ReadFault,
): HostsConfigError {
  const hint = namedBy === undefined ? "" : ` (named by ${namedBy})`;

  const problems = [{ path: "", message: problem + hint }];
  return new HostsConfigError(origin, problems, { cause });
}

function isMissing(read: { cause?: unknown }): boolean {
  return read.cause instanceof Deno.errors.NotFound;
}

function isHttp(address: string): boolean {
  return /^https?:/i.test(address);
}

/** Removes the user and password from a URL that will be shown. */
function withoutCredentials(address: string): string {
  if (!isHttp(address)) return address;

  // If the URL does not parse, its password may contain anything, so everything
  // up to the last "@" is removed.
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

/**
 * Returns the path of a file: the address itself, or the path in a `file:` URL.
 */
export function filePath(address: string): Parsed<string> {
  const scheme = /^([a-z][a-z\d+.-]+):/i.exec(address)?.[1]?.toLowerCase();
  if (scheme !== "file") {
    const isUrl = address.startsWith("://", scheme?.length);
    if (!scheme || !isUrl) return { value: address };

    return { problem: "expected a path, or a file:, http: or https: URL" };
  }

  if (!URL.canParse(address)) return { problem: "is not a valid URL" };

  const { hostname, pathname, search, hash } = new URL(address);
  const isAbsolute = address.startsWith("/", "file:".length);
  if (!isAbsolute) {
    return { problem: "is not absolute: write file:/// before the full path" };
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
    return {
      problem: 'is not a valid URL: write each "%" in the path as "%25"',
    };
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
  // A strict decoder takes three times as long.
  const text = new TextDecoder().decode(bytes);
  if (!text.includes("\ufffd")) return { value: text };

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
 * Fetches text without following redirects. Proxies set in the environment
 * apply.
 */
async function fetchText(
  address: string,
  options: { timeoutMs: number; signal: AbortSignal | undefined },
): Promise<Read<string>> {
  const { timeoutMs, signal } = options;
  if (!URL.canParse(address)) return { problem: "is not a valid URL" };

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

/** Reads the body of a response, if it may be an inventory. */
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
  // The message from fetch is a chain that names the URL before the reason.
  const reason = errorText(error).split(": ").at(-1);
  return `cannot be fetched (${reason})`;
}

/**
 * Creates the error for a missing default inventory. It names the file and the
 * folder, and says what to do.
 *
 * @param alternative a variable that can be set instead of having an inventory
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

/**
 * Advises setting a variable, with the flag that allows reading it if needed.
 */
function settingAdvice(variable: string): string {
  const canRead = isGranted({ name: "env", variable });
  const flag = canRead ? "" : ` (and run with --allow-env=${variable})`;

  return `set ${variable}${flag}`;
}

/** Reports whether a file exists; false without permission to look. */
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
 * Reads an environment variable, trimmed; returns `undefined` if it is unset or
 * blank, or may not be read.
 */
export function readVariable(name: string): string | undefined {
  if (!isGranted({ name: "env", variable: name })) return undefined;

  const value = Deno.env.get(name)?.trim();
  return value === "" ? undefined : value;
}

// --- Parsing ---

/** An inventory, and what was parsed from it. */
interface ParsedConfig {
  readonly config: HostsConfig;
  /** The valid nodes, in the order of the file. */
  readonly nodes: Map<string, ClusterNode>;
  readonly eloSync: EloSyncConfig;
  /**
   * Whether any node takes its data port from the file named by
   * {@linkcode UNIFIED_CONFIG_VARIABLE}.
   */
  readonly needsUnifiedPort: boolean;
}

/** What was found in an inventory, which is usable if it has no problems. */
interface Inspection {
  readonly parsed?: ParsedConfig;
  readonly problems: readonly ConfigProblem[];
  /** Warnings about spelling, which only the text reveals. */
  readonly warnings: readonly ConfigProblem[];
}

/**
 * What was parsed from each config. The configs are frozen, so this stays
 * valid.
 */
const parsedConfigs = new WeakMap<object, ParsedConfig>();

/**
 * Loads an inventory: the file, URL or object given, else the file named by
 * `RINGRIFT_HOSTS_CONFIG`, else {@linkcode DEFAULT_CONFIG_PATH}.
 *
 * Pass the result to every function that takes a source, so that the file is
 * read only once.
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
 * Loads an inventory; returns `undefined` if the default file is needed but
 * missing.
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
      ? "a blank string"
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

/**
 * Parses a config object. A caller's own is parsed every time, since it may
 * have changed.
 */
function parseConfigObject(source: HostsConfig): ParsedConfig {
  requireSource(source);

  const known = parsedConfigs.get(source);
  if (known) return known;

  const origin = "config object";
  if (treeSize(source) === Infinity) {
    const message = "contains itself, or is nested too deeply";
    throw new HostsConfigError(origin, [{ path: "", message }]);
  }

  return requireParsed(inspectDocument(source), origin);
}

/**
 * Returns what was parsed; throws an error with all problems if there are any.
 */
function requireParsed(inspection: Inspection, origin: string): ParsedConfig {
  const { parsed, problems } = inspection;
  if (parsed && problems.length === 0) return parsed;

  throw new HostsConfigError(origin, problems);
}

/**
 * Parses the text of an inventory; `origin` names it in errors. Empty text
 * means an empty cluster.
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
  /** The inventory, if it has no problems. */
  config?: HostsConfig;
  /** What is wrong. */
  problems: ConfigProblem[];
  /** What is allowed but probably not intended. */
  warnings: ConfigProblem[];
}

/**
 * Finds every problem in an inventory, and warns about what is allowed but
 * probably not intended. Both lists are in the order of the file.
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
 * Does what {@linkcode validateHostsConfig} does, for text from `origin`: an
 * inventory from an http(s) URL may not choose programs to run on this machine.
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

/** Parses and checks the text of an inventory, and freezes the result. */
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
 * Freezes a finite tree. Values already frozen are assumed to be deeply frozen.
 */
function deepFreeze(value: unknown): void {
  if (typeof value !== "object" || value === null) return;
  if (Object.isFrozen(value)) return;

  Object.freeze(value);
  for (const key in value) deepFreeze((value as Record<string, unknown>)[key]);
}

/** A parsed YAML value, or the problem with the text and where it is. */
type YamlResult =
  | { readonly value: unknown }
  | { readonly problem: Omit<ConfigProblem, "path"> };

/**
 * Parses YAML. With the `failsafe` schema, every scalar stays the string that
 * was written.
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
    // The core schema leaves dates as written, and has no merge keys, which
    // @std/yaml would expand without limit.
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

/** Explains why text cannot be YAML at all; returns `undefined` if it can. */
function textProblem(text: string): string | undefined {
  // A login page can be valid YAML, and would look like an empty cluster.
  if (/^\s*<[!?a-z]/i.test(text)) return "is HTML or XML, not YAML";
  if (text.includes("\0")) {
    return "contains a NUL character: is it a text file?";
  }

  return undefined;
}

/**
 * Finds the first line indented with a tab, outside of block scalars and JSON.
 *
 * On such a tab, `@std/yaml` (seen with 1.2.0) silently flattens the file.
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

/** Expands aliases and merge keys, if the resulting tree is not too large. */
function expandDocument(document: unknown, text: string): YamlResult {
  if (!text.includes("&") && !text.includes("<<")) return { value: document };

  if (treeSize(document) > text.length + MAX_ALIASED_VALUES) {
    const message = "has aliases that make it too large or too deep";
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
 * Counts the values of a tree; aliased values count each time they occur. The
 * count is infinite if a value contains itself or is nested too deeply.
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

/** The state of a merge: what is already done, and whether it failed. */
interface Merge {
  readonly done: Map<object, unknown>;
  isBroken: boolean;
}

/**
 * Replaces each merge key (`<<`) with the keys it names. A mapping's own keys
 * win, then those of the mapping that is merged first.
 */
function mergeKeys(value: unknown, merge: Merge): unknown {
  if (typeof value !== "object" || value === null) return value;

  const done = merge.done.get(value);
  if (done !== undefined) return done;

  const tree = value as Record<string, unknown>;
  const merged = Object.hasOwn(tree, "<<") ? mergeMapping(tree, merge) : tree;
  merge.done.set(tree, merged).set(merged, merged);

  for (const key of Object.keys(merged)) {
    merged[key] = mergeKeys(merged[key], merge);
  }
  return merged;
}

function mergeMapping(
  mapping: Record<string, unknown>,
  merge: Merge,
): Record<string, unknown> {
  const { "<<": source, ...own } = mapping;
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

  return { ...Object.fromEntries(merged), ...own };
}

/** Explains a syntax error, without the source that its message quotes. */
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

  // The reason is followed by the source, and may itself end with a quoted name
  // from the source.
  const [first = ""] = error.message.split(/ at line \d+, column \d+|\n/, 1);
  const reason = first.replace(/ (?:"|!<).*/s, "");
  const message = "is not valid YAML: " +
    reason.charAt(0).toLowerCase() + reason.slice(1);

  return { message, ...place };
}

/** Returns the position that an `@std/yaml` error gives, if any. */
function placeOf(error: SyntaxError): { line?: number; column?: number } {
  const { line, column } = error as { line?: number; column?: number };
  if (line === undefined || column === undefined) return {};

  // The column given for a duplicate key may be before the start of the line.
  return { line, column: Math.max(1, column) };
}

/** What is known about a document besides its values. */
interface DocumentOptions {
  /** The text that it was parsed from. */
  readonly text?: string;
  /** Whether it came from an http(s) URL. */
  readonly isRemote?: boolean;
}

/**
 * Parses the parts of a document that this module uses; collects its problems.
 */
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

  // This section belongs to another program: if it is not a mapping, it is
  // ignored.
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

/** Returns the document as a config, with empty `hosts` if it has none. */
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

/** Parses the fields that `defaults` sets for hosts. */
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
      "must not do: use a file",
  };
}

interface HostsOptions {
  /** The names of the hosts, in the order of the file. */
  readonly names: readonly string[];
  /** The values of `defaults` and `distributed`, by field. */
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
    const message = `expected a mapping of names to hosts, got ${given}`;
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

/** Replaces the fallbacks of a table with the values of `defaults`. */
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
 * Reports whether a host itself sets an ssh option that runs a program here.
 */
function hasOwnProgram(
  entry: HostEntry,
  values: Readonly<Record<string, unknown>>,
): boolean {
  const isOwn = !isUnset(entry[HOST_FIELDS.sshOptions.key]);
  const options = values.sshOptions as readonly string[];

  return isOwn && options.some(runsProgramHere);
}

/** Joins the path of a mapping and one of its keys. */
function pathOf(parent: string, key: string): string {
  const shown = hasControlCharacter(key) ? JSON.stringify(key) : key;
  return parent === "" ? shown : `${parent}.${shown}`;
}

/** What the text of an inventory reveals beyond its values. */
interface Spelling {
  /** The names of the hosts, in the order of the file. */
  readonly names: readonly string[];
  readonly problems: readonly ConfigProblem[];
  readonly warnings: readonly ConfigProblem[];
}

/** The sections that this module uses. */
const SECTIONS = ["hosts", "defaults", "elo_sync", "distributed"];

/** The keys of ports in these sections. */
const PORT_KEYS = ["ssh_port", "data_server_port", "sync_port"];

/** An unquoted number with a leading zero, a base prefix or underscores. */
const ODD_NUMBER = /(?:[\s,[{]|["']:)[-+]?(?:0[\dbx_]|\d+_)/;

/**
 * Compares the names and numbers of a document with how they were written.
 *
 * YAML reads the name `010` as 8, and an object lists integer keys first. The
 * text is parsed again, with every scalar as a string, only if a name or a
 * number looks affected.
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
  // That schema rejects tags such as `!!float`; names and numbers then stay
  // unchecked.
  const written = "value" in yaml && isMapping(yaml.value) ? yaml.value : {};
  const numbers = checkNumbers(document, written);

  return {
    names: hasNamesOfValues ? sortAsWritten(names, text) : names,
    problems: [...checkNames(hosts, written.hosts), ...numbers.problems],
    warnings: numbers.warnings,
  };
}

/** Reports whether a name may have been a number, a boolean or null in YAML. */
function isNameOfValue(name: string): boolean {
  return String(Number(name)) === name || /^(?:true|false|null)$/.test(name);
}

/** Sorts names by their position in the text. Names not found come first. */
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

/** Finds names in the text that no parsed host has. */
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
    message: "YAML reads this name as something else: put it in quotes",
  }));
}

/** Finds numbers whose value most people would not expect. */
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

/** A number in a document, and the text that it was read from. */
interface WrittenNumber {
  /** The mapping that it is in. */
  readonly holder: Readonly<Record<string, unknown>>;
  readonly key: string;
  readonly path: string;
  readonly value: number;
  readonly text: string;
}

/**
 * Finds the numbers in a document's mappings; those in an aliased mapping only
 * once. Lists are skipped, and so are mappings whose path is too long.
 */
function findNumbers(
  document: Record<string, unknown>,
  written: Record<string, unknown>,
): WrittenNumber[] {
  const numbers: WrittenNumber[] = [];
  const seen = new Set<unknown>();
  const mappings = [{ path: "", holder: document, texts: written }];

  // Mappings that are added on the way are visited too.
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
 * Adds to each problem its position, if known, and sorts the problems by it.
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

/** Compares positions in a text. A missing position comes first. */
function byPlace(a: Partial<Place> = {}, b: Partial<Place> = {}): number {
  const lines = (a.line ?? 0) - (b.line ?? 0);
  return lines !== 0 ? lines : (a.column ?? 0) - (b.column ?? 0);
}

/** Finds the position of a path, or else of its closest parent that has one. */
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

/** The position of a key; both numbers count from 1. */
interface Place {
  readonly line: number;
  readonly column: number;
}

/** The keys of a text. */
interface FoundKeys {
  /** The first position of each path's key, in the order of the text. */
  readonly places: ReadonlyMap<string, Place>;
  /** The first key that occurs a second time in its mapping. */
  readonly repeated: (Place & { readonly name: string }) | undefined;
}

/** Finds the positions of the keys in an inventory. */
function findKeys(text: string): FoundKeys {
  return new KeyFinder(text).find();
}

/** A mapping or a list that is open at the finder's position. */
interface OpenNode {
  /** The column of a key or an item in block style; infinite in flow style. */
  readonly column: number;
  /** The path that its keys belong to. */
  readonly path: string;
}

const ROOT: OpenNode = { column: -1, path: "" };

/**
 * The maximum length of a path that is tracked. Longer ones would take too
 * long.
 */
const MAX_PATH_LENGTH = 500;

/** What may precede a key or a value: anchors, tags, the `?` of a key. */
const PROPERTIES = /(?:(?:[&!][^\s,[\]{}]*|\?(?=\s|$))[ \t]*)*/y;

/** What ends an unquoted scalar, in block style and in flow style. */
const END_OF_PLAIN = /:(?=\s|$)|[ \t]#|\n/g;
const END_OF_FLOW_PLAIN = /:(?=[\s,[\]{}]|$)|[ \t]#|[\n,[\]{}]/g;

/**
 * Finds keys in valid YAML (block style, flow style or JSON) in linear time.
 *
 * It understands only as much of YAML as that requires. It does not find keys
 * that come from an alias or a merge key, keys that are aliases or collections,
 * or keys in paths longer than {@linkcode MAX_PATH_LENGTH}.
 */
class KeyFinder {
  readonly #text: string;
  readonly #places = new Map<string, Place>();
  readonly #open: OpenNode[] = [];
  #repeated: FoundKeys["repeated"];
  /** The path of a mapping that begins at this position. */
  #path = "";
  #at = 0;
  #line = 1;
  #lineStart = 0;
  /** Lines indented by more than this continue the scalar before them. */
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

  /**
   * Reads an item's dash, a key or a scalar; reports whether more may follow.
   */
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

  /** Closes the keys and items that end where a new one starts at `column`. */
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

  /** Adds a key to the innermost open node, and continues in its path. */
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

  /** Returns a unique path for what has no key of its own. */
  #newPath(): string {
    return `\n${this.#at}`;
  }

  /** Reads a scalar. An unquoted one extends to the next match of `end`. */
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

  /** Returns the current column, counted from 0. */
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

  /** Reports whether a sticky pattern matches here. */
  #sees(pattern: RegExp): boolean {
    pattern.lastIndex = this.#at;
    return pattern.test(this.#text);
  }

  /** Skips what a sticky pattern matches here; reports whether it does. */
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

/** Finds the end of a quoted string that begins at `start`. */
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

/** Returns the text of a scalar, which may be quoted. */
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

/** Finds what is allowed in an inventory but probably not intended. */
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
 * Finds keys that resemble a known key that is not set. Within a section, a
 * known key plus "s", such as `gpus`, counts as a custom key.
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

  const warnings = [
    ...typos,
    ...findPlaceholders("defaults", defaults),
    ...findUnknownStatus("defaults", defaults.status),
  ];
  for (const key of Object.keys(defaults)) {
    const path = pathOf("defaults", key);
    if (HOST_KEYS.includes(key) || misspelt.has(path)) continue;

    const message = "has no effect: defaults may only set known host fields";
    warnings.push({ path, message });
  }

  return warnings;
}

/** Finds typos in `distributed`, and host fields that have no effect there. */
function findDistributedWarnings(distributed: unknown): ConfigProblem[] {
  if (!isMapping(distributed)) return [];

  const known = keysOf(DISTRIBUTED_FIELDS);
  const warnings = findTypos("distributed", distributed, known);

  for (const key of HOST_KEYS) {
    if (known.includes(key) || isUnset(distributed[key])) continue;

    const message = 'has no effect here: move it to the "defaults" section';
    warnings.push({ path: `distributed.${key}`, message });
  }

  return warnings;
}

function findHostWarnings(name: string, entry: HostEntry): ConfigProblem[] {
  const path = pathOf("hosts", name);
  return [
    ...findTypos(path, entry, HOST_KEYS),
    ...findPlaceholders(path, entry),
    ...findUnknownStatus(path, entry.status),
  ];
}

function findUnknownStatus(parent: string, written: unknown): ConfigProblem[] {
  if (typeof written !== "string" || isUnset(written)) return [];

  const status = written.trim().toLowerCase();
  const known = [...ACTIVE_STATUSES, ...INACTIVE_STATUSES];
  if (known.includes(status)) return [];

  const meant = known.find((word) => isTypo(status, word));
  const inactive = INACTIVE_STATUSES.join(", ");
  const message = meant === undefined
    ? `unknown status, treated as active; the inactive ones are ${inactive}`
    : `unknown status; did you mean "${meant}"?`;
  return [{ path: `${parent}.status`, message }];
}

/** Finds values that still have to be filled in: `<ip>`, `100.x.x.x`. */
function findPlaceholders(path: string, entry: HostEntry): ConfigProblem[] {
  const warnings: ConfigProblem[] = [];

  for (const key of HOST_KEYS) {
    const value = entry[key];
    if (typeof value !== "string" || value.trim() === "") continue;

    if (isUnset(value) || isMaskedAddress(value.trim())) {
      const message = "is a placeholder: replace it with the real value";
      warnings.push({ path: `${path}.${key}`, message });
    }
  }

  return warnings;
}

/** Reports whether an address has masked parts, as in `203.0.113.x`. */
function isMaskedAddress(text: string): boolean {
  return /^(?:\S+@)?[\dx]+(?:\.[\dx]+){0,2}\.x+[\dx.]*$/i.test(text);
}

/**
 * Finds active nodes that share every data endpoint with other nodes, so that
 * an answer does not tell which of them is up.
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
      "data_server_url, or check them with --ssh";
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
      return [{
        path,
        message: "is not set: set it to the name of the coordinator",
      }];
    }

    const meant = didYouMean(coordinator, Object.keys(config.hosts));
    const hint = meant === undefined ? "" : `; did you mean "${meant}"?`;
    return [{ path, message: `names a node that is not in hosts${hint}` }];
  }

  const isActive = nodes.get(coordinator)?.isActive ?? true;
  return isActive ? [] : [{ path, message: "names a node that is not active" }];
}

/**
 * Explains that an inventory has no hosts, and names the section that was
 * probably meant to hold them.
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
 * Reports whether a section has a name like `hosts`, or entries with host
 * fields.
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
 * Gets all nodes, keyed by name, in the order of the inventory.
 *
 * A node whose data port the inventory does not set gets the one from the file
 * named by `RINGRIFT_CONFIG_PATH`, if that file sets one.
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

/** Loads all nodes, keyed by name, with options for loading the inventory. */
async function loadNodes(
  source?: ConfigSource,
  options: LoadOptions = {},
): Promise<Map<string, ClusterNode>> {
  return await withUnifiedPort(await loadParsed(source, options));
}

/**
 * Returns the nodes; those that need it get the data port from another
 * program's config.
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

/** Reads the data port from another program's config, if that sets one. */
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
 * Reports whether any node takes its data port from the file named by
 * `RINGRIFT_CONFIG_PATH`, so that this file is read.
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

/** The host and port of the coordinator's Elo database. */
export interface CoordinatorAddress {
  /** A host name, or an address without brackets. */
  readonly hostname: string;
  /** The port of the Elo database. */
  readonly port: number;
}

/**
 * Gets the address of the coordinator's Elo database: the address of its node,
 * else the one in `RINGRIFT_COORDINATOR_IP`; `undefined` if there is neither.
 * The variable is also used if the default inventory is missing.
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

/** Returns the address to use if the default inventory is missing. */
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

/** The maximum number of unmatched patterns that an error lists. */
const MAX_LISTED_PATTERNS = 10;

/**
 * Which nodes {@linkcode selectNodes} keeps: those that match every field set.
 */
export interface NodeSelection {
  /**
   * Exact names, globs (`gpu-*`) and ranges (`gpu-[1-8]`, `gpu-[01-16,20]`,
   * `gpu-[0-14/2]`). Each string may be a comma-separated list.
   *
   * @default {undefined} every node
   */
  readonly names?: readonly string[] | undefined;
  /**
   * The nodes to leave out, in the same form as `names`.
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
   * Statuses, ignoring case. Inactive statuses may be listed too.
   *
   * @default {undefined} any active status
   */
  readonly statuses?: readonly string[] | undefined;
  /**
   * Parts of GPU names, ignoring case: `h100` also matches `GH100`.
   *
   * @default {undefined} any GPU or none
   */
  readonly gpus?: readonly string[] | undefined;
  /**
   * Keys of a host, known or custom, and the values to accept for each.
   *
   * Values are compared as text; every key has to match.
   *
   * @default {{}}
   */
  readonly where?:
    | Readonly<Record<string, string | readonly string[]>>
    | undefined;
  /**
   * Whether inactive nodes are kept. Those that `names` lists by their exact
   * names are kept anyway. Neither applies if `statuses` is set.
   *
   * @default {false}
   */
  readonly includeInactive?: boolean | undefined;
}

/**
 * Selects nodes by name, role, status, GPU and other keys; without a selection,
 * the active ones. The order of the nodes is kept.
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
 * @throws {RangeError} if a pattern matches no node or is invalid
 * @throws {TypeError} if a field has the wrong type, such as a string instead
 * of a list
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
 * Validates a selection without any nodes, so that a mistake in it is reported
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

/** Returns the values that a node has for a known or custom key, as text. */
function valuesOf(node: ClusterNode, key: string): string[] {
  const field = HOST_FIELD_NAMES.find((it) => HOST_FIELDS[it].key === key);
  const own = Object.hasOwn(node.entry, key) ? node.entry[key] : undefined;
  const value: unknown = field === undefined ? own : node[field];

  return [value].flat().filter((item) => !isUnset(item)).map(String);
}

/** The nodes that a list of patterns matches. */
interface NameMatches {
  readonly matched: ReadonlySet<ClusterNode>;
  /** The matched nodes whose exact names are in the list. */
  readonly exact: ReadonlySet<ClusterNode>;
}

function matchNames(
  nodes: readonly ClusterNode[],
  patterns: readonly string[],
): NameMatches {
  const elements = patterns.flatMap(splitNames);
  const written = new Set(elements);
  const named = nodes.filter(({ name }) => written.has(name));
  const byName = Map.groupBy(named, ({ name }) => name);

  const matched = new Set<ClusterNode>();
  const unmatched: string[] = [];

  for (const element of elements) {
    const found = byName.get(element) ?? nodesLike(nodes, element);
    for (const node of found) matched.add(node);

    if (found.length === 0) unmatched.push(element);
  }

  if (unmatched.length > 0) {
    throw noMatch(unmatched, nodes.map(({ name }) => name));
  }
  return { matched, exact: new Set(named) };
}

/**
 * Splits a comma-separated list. A comma in brackets separates ranges, not
 * names.
 */
function splitNames(list: string): string[] {
  const parts = list.match(/(?:\[[^\]]*\]?|[^,[]+)+/g) ?? [];
  const elements = parts.map((part) => part.trim()).filter(Boolean);

  return elements.length > 0 ? elements : [list];
}

function nodesLike(
  nodes: readonly ClusterNode[],
  pattern: string,
): ClusterNode[] {
  // Anything else is an exact name, which was already looked up.
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

/** Suggests what to write instead of a pattern that matches no name. */
function patternHint(
  pattern: string,
  names: readonly string[],
): string | undefined {
  const operator = operatorHint(pattern);
  if (operator !== undefined) return operator;

  // For something like `-gpu-2`, a hint could name a node meant to be left out.
  if (!/^[\p{L}\p{N}_[*?]/u.test(pattern)) return undefined;

  const meant = meantAsDigits(pattern, names) ?? didYouMean(pattern, names);
  return meant && `did you mean ${JSON.stringify(meant)}?`;
}

/**
 * Suggests what to use instead of operators of clush, pdsh, Ansible or the
 * shell.
 */
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

/** A part of a pattern that matches any text. */
const ANY_TEXT = Symbol("*");

/**
 * Returns the indexes at which a part of a pattern can end in a name if it
 * starts at `at`.
 */
type PartMatcher = (name: string, at: number) => readonly number[];

type PatternPart = typeof ANY_TEXT | PartMatcher;

/** A part of a pattern as written; a bracket need not be closed. */
const PATTERN_TOKEN = /\[[^\]]*\]?|\*+|\?|[^[*?]+/gs;

/**
 * Compiles a glob with ranges into a predicate that tests a name.
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
 * @throws {RangeError} if the pattern is invalid
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

/** Tries all ways to match the parts at once, so that it never backtracks. */
function matchesParts(
  name: string,
  parts: readonly PatternPart[],
): boolean {
  let ends: readonly number[] = [0];

  for (const part of parts) {
    if (ends.length === 0) return false;

    ends = part === ANY_TEXT
      ? indexesFrom(ends, name)
      : endsAfter(part, ends, name);
  }

  return ends.includes(name.length);
}

function endsAfter(
  matcher: PartMatcher,
  starts: readonly number[],
  name: string,
): readonly number[] {
  const [first] = starts;
  if (first !== undefined && starts.length === 1) return matcher(name, first);

  return [...new Set(starts.flatMap((at) => matcher(name, at)))];
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

/** Creates the part of a pattern that matches exactly `text`. */
function literally(text: string): PartMatcher {
  return (name, at) => name.startsWith(text, at) ? [at + text.length] : [];
}

function oneCharacter(name: string, at: number): readonly number[] {
  const codePoint = name.codePointAt(at);
  if (codePoint === undefined) return [];

  return [at + String.fromCodePoint(codePoint).length];
}

/**
 * Parses the contents of brackets. Next to a wildcard, they match whole numbers
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

/** Parses a range as Slurm does: `08-12` starts with 08, `8-12` with 8. */
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
 * Folds names into one string, such as `n[1-3].dc1,head`. Used in `names` of
 * {@linkcode NodeSelection}, the string matches exactly these names.
 *
 * One number in each name is folded, at any position. Zero-padded numbers are
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
 * @throws {RangeError} if one of the names is not valid for a node, such as
 * `a,b`
 * @throws {TypeError} if a string is given instead of a list
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

/** A name, split around the number that is folded. */
interface Fold {
  /** The same for all names that can be folded into one range. */
  readonly key: string;
  readonly before: string;
  readonly digits: string;
  readonly after: string;
}

/** Returns the ways to fold a name: its last number first, no number last. */
function foldsOf(name: string): Fold[] {
  const problem = findNameProblem(name);
  if (problem !== undefined) {
    throw new RangeError(`Cannot fold ${JSON.stringify(name)}: ${problem}`);
  }

  const folds: Fold[] = [];
  // Longer numbers would lose precision.
  const numbers = [...name.matchAll(/(?<!\d)\d{1,15}(?!\d)/g)];

  for (const { 0: digits, index } of numbers.reverse()) {
    const before = name.slice(0, index);
    const after = name.slice(index + digits.length);
    const around = `${before}*${after}`;

    // 10 can be in a range with 8 and 9 or with 08 and 09; 08 only with 09 and
    // 10.
    if (!isPadded(digits)) {
      folds.push({ key: `${around}*`, before, digits, after });
    }
    const width = digits.length;
    folds.push({ key: `${around}*${width}`, before, digits, after });
  }

  folds.push({ key: name, before: name, digits: "", after: "" });
  return folds;
}

/** Returns the fold that most names share; in a tie, the first. */
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

/** One endpoint where a node may be reached. */
export interface Endpoint {
  /** The protocol spoken there. */
  readonly protocol: "http" | "https" | "ssh";
  /** A host name or address; IPv6 without brackets, possibly with a zone. */
  readonly host: string;
  /** The port, from 1 to 65535. */
  readonly port: number;
  /** The base path of the server, without a trailing slash. */
  readonly path: string;
}

/**
 * Returns the endpoints of a node's data server, best first.
 *
 * With `port`, these are all addresses at that port. Without it, they are
 * `dataServerUrl` alone if that is set, else all addresses at `dataServerPort`.
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
 * With `sshPort` 22, the Tailscale address comes first. Any other port usually
 * belongs to a proxy at `sshHost`: `sshHost` comes first, then the Tailscale
 * address at that port and at 22.
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

  // If there is only one address, it does not matter which one it is.
  if (tailscale === undefined || sshHost === undefined) {
    return addresses.map((host) => at(host, sshPort));
  }
  if (sshPort === 22) return [at(tailscale, 22), at(sshHost, 22)];

  return [at(sshHost, sshPort), at(tailscale, sshPort), at(tailscale, 22)];
}

/** Returns the endpoints that a check may contact: SSH or data endpoints. */
export function checkedEndpoints(
  node: ClusterNode,
  options: Pick<ProbeOptions, "check" | "port"> = {},
): Endpoint[] {
  const { check, port } = options;
  return check === "ssh" ? sshEndpoints(node) : dataEndpoints(node, port);
}

/**
 * Returns the path that a check requests: the caller's, else the node's
 * `statusPath` if the port is that of its data server, else `/status`.
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
 * The protocol's default port is omitted. The `%` before an IPv6 zone becomes
 * `%25`, as in RFC 6874.
 */
export function endpointUrl(endpoint: Endpoint, path: string = ""): string {
  const authority = urlAuthority(endpoint).replace("%", "%25");
  return `${endpoint.protocol}://${authority}${endpoint.path}${path}`;
}

/**
 * Returns the `Host` header for an endpoint: as in its URL, but without a zone.
 */
function hostHeader(endpoint: Endpoint): string {
  return urlAuthority({ ...endpoint, host: withoutZone(endpoint.host) });
}

function urlAuthority({ protocol, host, port }: Endpoint): string {
  const isDefault = port === DEFAULT_PORTS[`${protocol}:`];
  return isDefault ? withBrackets(host) : hostPort(host, port);
}

/** Returns `host:port`, with an IPv6 address in brackets. */
export function hostPort(host: string, port: number): string {
  return `${withBrackets(host)}:${port}`;
}

function withBrackets(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}

function withoutZone(host: string): string {
  return host.replace(/%.*$/s, "");
}

/** Reports whether a host is an IP address, not a name. */
function isAddress(host: string): boolean {
  return host.includes(":") || isIpv4(host);
}

/**
 * Finds the data endpoints that several active nodes share, so that one answer
 * counts for all of them.
 *
 * @returns the two or more nodes at each such endpoint, keyed by its URL
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

/** The maximum length of a flag: Linux rejects a single argument of 128 KiB. */
const MAX_FLAG_LENGTH = 100_000;

/** The maximum number of endpoints to list: nobody reads or types more. */
const MAX_LISTED_ENDPOINTS = 64;

/**
 * Returns the Deno flag that allows contacting endpoints:
 * `--allow-net=a:1,b:2`; `--allow-net` alone if the list would be too long.
 */
export function netFlag(endpoints: Iterable<Endpoint>): string {
  const targets = new Set<string>();
  for (const { host, port } of endpoints) targets.add(netTarget(host, port));

  const list = [...targets].join(",");
  return list.length > MAX_FLAG_LENGTH ? "--allow-net" : `--allow-net=${list}`;
}

/**
 * Returns a host and port in the form of Deno's permissions: without a zone.
 */
function netTarget(host: string, port: number): string {
  return hostPort(withoutZone(host), port);
}

/**
 * Returns the flag that allows the checks that were denied, or `undefined` if
 * none was denied.
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
    // Deno cannot parse this host. Connecting to it will report that.
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

/** Creates the error for a missing permission; its message names the flag. */
export function notCapable(what: string, flag: string): Error {
  return new Deno.errors.NotCapable(`Requires ${what}: run again with ${flag}`);
}

// --- The HTTP answer ---

const READ_BUFFER_BYTES = 2048;
/** The maximum size of a TLS record. */
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

/**
 * A failure of a check, caused by the node or by this machine, with its code.
 */
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
 * Requests a path, and returns the answer if it is a JSON object.
 *
 * It does not use `fetch`, which would obey proxies set in the environment, or
 * `node:http`, which takes twice as long.
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

/**
 * Reads an answer. At any path other than `/status`, every 2xx answer is valid.
 */
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
  // JSON.parse() accepts nesting that is too deep for JSON.stringify().
  if (treeSize(value) === Infinity) {
    return { problem: "the answer is nested too deeply" };
  }
  return { value };
}

/** Parses JSON, also with Python's `NaN` and `Infinity`, which become null. */
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
  // Strings are matched too, so that a NaN in one is left alone. The closing
  // quote is optional: otherwise, a hostile answer could take minutes.
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
  /** The bytes between these two were read but not taken yet. */
  #start = 0;
  #end = 0;

  /** Creates a reader of what `connection` sends. */
  constructor(connection: Pick<Connection, "read">) {
    this.#connection = connection;
  }

  /** The number of bytes that were read but not taken yet. */
  get #available(): number {
    return this.#end - this.#start;
  }

  /** The bytes that were read but not taken yet. */
  get pending(): Bytes {
    return this.#buffer.subarray(this.#start, this.#end);
  }

  /** Reads once; returns `false` at the end of the stream. */
  async fill(): Promise<boolean> {
    if (this.#end === this.#buffer.length) this.#makeRoom();

    const count = await this.#connection.read(this.#buffer.subarray(this.#end));
    this.#end += count ?? 0;

    return count !== null;
  }

  /** Continues in a new buffer, so that bytes already taken stay unchanged. */
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
   * Takes a line, and returns it without its line ending.
   *
   * @throws {ProbeFault} the result of `tooLong`, if the line is longer than
   * `maxBytes`
   */
  async line(maxBytes: number, tooLong: () => ProbeFault): Promise<string> {
    let searched = 0;
    while (true) {
      // The part of the buffer that is not filled yet is all zeros.
      const at = this.#buffer.indexOf(NEWLINE, this.#start + searched);
      const length = at < 0 ? this.#available : at - this.#start;
      if (length > maxBytes) throw tooLong();
      if (at >= 0) return LATIN1.decode(this.#cut(length + 1)).trimEnd();

      searched = length;
      await this.#fillOrFail();
    }
  }

  /** Takes everything up to the end of the stream. */
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

/** The status code and the headers of an answer, with names in lower case. */
interface ResponseHead {
  readonly status: number;
  readonly headers: Map<string, string>;
}

/**
 * Reads the head of an answer, skipping any 1xx heads; all of them share one
 * size limit. Exported for the tests.
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

/** Rejects an answer that is not HTTP at the first byte that differs. */
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

/** Reads a body in the chunked transfer encoding. */
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
 * How long to wait for an endpoint before the next one is tried in parallel, as
 * in RFC 8305.
 */
const FALLBACK_DELAY_MS = 250;

/**
 * The maximum number of lookups at a time. More would fill Deno's pool of
 * blocking threads, which file reads need too.
 */
const MAX_LOOKUPS = 16;

/** The error number that `node:dns` gives for a name that does not exist. */
const UNKNOWN_NAME = -3008;
const UNKNOWN_NAME_MESSAGE = "the name does not resolve";

/** How many lines an SSH server may send before its greeting. */
const MAX_GREETING_LINES = 100;

/**
 * The JSON object in a node's answer. The keys that RingRift's servers send are
 * typed but not validated: it may be any object.
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
 * The state of a node: `up`; `unhealthy`, if it accepted a connection but gave
 * no usable answer; `down`, if no address accepted one; `unknown`, if it could
 * not be checked from here.
 */
export type NodeState = "up" | "unhealthy" | "down" | "unknown";

/**
 * Why a node is not up. `denied` and `local-resource` are problems on this
 * side, so the state of the node is `unknown`.
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
  /** The kind of failure. */
  readonly code: FailureCode;
  /** The failure in words; it may contain unescaped text from the node. */
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
  /** The host of the endpoint that accepted the connection, as configured. */
  readonly address: string | undefined;
  /** The port that was checked. */
  readonly port: number;
  /** Milliseconds until that endpoint accepted the connection. */
  readonly connectMs: number | undefined;
  /**
   * Milliseconds until the answer was complete; `undefined` for a TCP check.
   */
  readonly responseMs: number | undefined;
  /** The JSON object that the node answered with. */
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
   * The port to check, at each address. It cannot be used with `check: "ssh"`.
   *
   * @default {undefined} the port of the node's data server
   */
  readonly port?: number | undefined;
  /**
   * The path to request. If `port` is not the port of the node's data server,
   * the default is `/status`.
   *
   * @default {node.statusPath}
   */
  readonly path?: string | undefined;
  /**
   * What a node has to do to count as up: answer over HTTP (at `/status` with a
   * 2xx status and a JSON object, at any other path with a 2xx status), accept
   * a TCP connection, or greet as an SSH server at one of its SSH endpoints.
   *
   * @default {"http"}
   */
  readonly check?: "http" | "tcp" | "ssh" | undefined;
  /**
   * The time limit for the whole check of a node, in milliseconds.
   *
   * @default {5000}
   */
  readonly timeoutMs?: number | undefined;
  /** Aborts the whole call, which then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Throws if no check is possible with these options; contacts nothing. */
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

/** Options of a check, with defaults applied. */
interface ProbeSettings {
  readonly check: keyof typeof CHECKS;
  readonly port: number | undefined;
  readonly path: string | undefined;
  readonly timeoutMs: number;
  readonly concurrency: number;
  readonly signal: AbortSignal | undefined;
  readonly onProbe: SweepOptions["onProbe"];
  /**
   * Whether every host may be contacted, which saves a query for each endpoint.
   */
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

/** The outcome of checking one endpoint. */
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
 * Checks one node until `deadline` aborts. On a timeout, the abort reason is a
 * {@linkcode ProbeTimeout}.
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
  // Most nodes have one endpoint, and need no race with its controllers and
  // timers.
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
      // If descriptors run out, the other attempts end and release theirs.
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

  // An endpoint that could not be tried may be up.
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
 * What a check does with an accepted connection; it throws if the node is not
 * up.
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

/** Checks one endpoint: connects, then runs the check. */
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

  // Only closing the connection ends a read from a silent node. Unlike a second
  // `close()`, a second dispose is allowed.
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

    // Deno gets the name, not its addresses: it races them itself, and checks
    // the permission for the name.
    return { tcp: await Deno.connect({ hostname: host, port, signal }) };
  } catch (error) {
    // An error from the lookup is more precise than the deadline's.
    const isPrecise = error instanceof ProbeFault || !signal.aborted;
    const fault = isPrecise ? error : signal.reason;
    return { failure: connectFailure(host, fault) };
  }
}

/**
 * Looks up names, a few at a time.
 *
 * Deno cannot abort a lookup. One that hangs occupies a runtime thread, which
 * file reads need too, until the system gives up on it.
 */
class LookupQueue {
  #running = 0;
  readonly #waiting = new Set<() => void>();

  /**
   * Looks up a name; rejects with a {@linkcode ProbeFault} if it does not
   * exist, or when the signal aborts. `Deno.connect()` then resolves the name
   * again.
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

  /** Hands the turn to the next waiting name. */
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
    // Loaded only if there are names: it doubles the startup time of a program.
    const { lookup } = await import("node:dns");
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    // If the port is given, Deno checks the net permission for exactly that
    // port.
    const options = { all: true, port } as { all: true };

    lookup(name, options, (error) => {
      const isUnknown = error?.errno === UNKNOWN_NAME;
      // Other errors may mean a lack of descriptors: connecting will show.
      if (isUnknown) reject(new ProbeFault("dns", UNKNOWN_NAME_MESSAGE));
      else resolve();
    });
    await promise;
  }
}

const lookups = new LookupQueue();

/** Waits for a promise; rejects with `fault` as soon as the signal aborts. */
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
    // Nobody waits for the promise that lost the race.
    promise.catch(() => {});
    aborted.promise.catch(() => {});
  }
}

type TlsSocket = import("node:tls").TLSSocket;

/**
 * A TLS connection over a TCP one.
 *
 * `Deno.startTls()` leaves the TCP socket open if it is closed during the
 * handshake; `node:tls` over a custom stream does not.
 */
class TlsConnection implements Connection, Disposable {
  readonly #socket: TlsSocket;
  readonly #chunks: AsyncIterator<Uint8Array>;
  /** The bytes that were received but not read yet. */
  #received: Uint8Array = new Uint8Array();

  constructor(socket: TlsSocket) {
    this.#socket = socket;
    this.#chunks = socket[Symbol.asyncIterator]();
  }

  /**
   * Performs the handshake; rejects if the server does not speak TLS or its
   * certificate is not trusted.
   */
  static async open(tcp: Deno.TcpConn, host: string): Promise<TlsConnection> {
    // Loaded only for https: they double the startup time of a program.
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
    // The listeners stay: an error event without a listener ends the process.
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

/** A check that took longer than allowed. */
class ProbeTimeout extends Error {
  constructor(readonly ms: number) {
    super(`timed out after ${formatMs(ms)}`);
  }
}

/**
 * Compared by identity. The pool retries on it, and on `dns` failures that it
 * may have caused.
 */
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
    message:
      "this machine has no local address or port left for the connection",
  },
};

/** Reports whether a failure says nothing about the node. */
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
 * Explains what is wrong with an answer, and names its path unless it is
 * `/status`.
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

/** A tick that is late by more than this means that the process is busy. */
const BUSY_MS = 4;

/**
 * A tick that is late by this much means that the process was suspended, not
 * busy.
 */
const MAX_LATENESS_MS = 100;

/**
 * The shortest interval at which a wait checks a node as its deadline
 * approaches.
 */
const MIN_RECHECK_MS = 100;

/** How long descriptors count as scarce after they ran out. */
const SHORTAGE_MS = 100;

/** Options of {@linkcode probeNodes}. */
export interface SweepOptions extends ProbeOptions {
  /**
   * The maximum number of nodes checked at a time. A sweep starts with fewer,
   * and continues with fewer while descriptors are scarce.
   *
   * @default {10000}
   */
  readonly concurrency?: number | undefined;
  /**
   * Called with each outcome as soon as it is known. If it throws, or returns a
   * promise that rejects, the call rejects with that error.
   */
  readonly onProbe?: ((probe: NodeProbe) => void | Promise<void>) | undefined;
}

/** A probe that is in progress. */
interface RunningProbe {
  readonly controller: AbortController;
  /** When it began, on the clock of `performance.now()`. */
  startMs: number;
}

/**
 * Receives an outcome; a promise that it returns is awaited before the pool
 * ends.
 */
type OnOutcome = (probe: NodeProbe, index: number) => void | Promise<void>;

/** Options of {@linkcode ProbePool}. */
interface PoolOptions {
  /**
   * When running probes time out and no more are started, on the clock of
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
 * One tick serves all probes. A timer or a listener for each of them would take
 * longer than connecting.
 */
class ProbePool {
  readonly #nodes: readonly ClusterNode[];
  readonly #settings: ProbeSettings;
  readonly #onOutcome: OnOutcome;
  readonly #isKeptOpen: boolean;
  readonly #done = Promise.withResolvers<void>();
  readonly #failed = Promise.withResolvers<never>();
  /** Resolves when no probe is running after {@linkcode stop}. */
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
  /** Until when descriptors count as scarce. */
  #shortUntilMs = 0;
  /** Since when a node has lacked a descriptor, by index. */
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

  /**
   * Whether the end has passed: outcomes from now on may be cut short by it.
   */
  get isOver(): boolean {
    return performance.now() >= this.#endMs;
  }

  /**
   * Probes the nodes until nothing is left to do and every callback has
   * finished; rejects when the signal aborts.
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

  /** Aborts running probes, and waits until their connections are closed. */
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
   * Extends the deadlines if the process was suspended, so that answers that
   * arrived in the meantime still count.
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

  /** Drops everything that waits to be started once the end has passed. */
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

  /** Raises the limit if the running probes are slow. */
  #growLimit(nowMs: number): void {
    // A higher limit would slow the sweep down if the process is busy, or if a
    // whole initial batch of probes ends within a tick.
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
    // Forgets what was started; otherwise, a watch would grow the queue
    // forever.
    if (this.#next === this.#queue.length) {
      this.#queue.length = 0;
      this.#next = 0;
    }
  }

  /**
   * Arms the timer for the next event, or ends the pool if nothing is left to
   * do.
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

  /** Arms the timer for time `ms`, unless it is armed for an earlier one. */
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

  /**
   * Lowers the limit to the number of probes that there are descriptors for.
   */
  #slowDown(): void {
    this.#limit = Math.max(1, this.#running.size);
    this.#shortUntilMs = performance.now() + SHORTAGE_MS;
  }

  #isShort(nowMs: number): boolean {
    return nowMs < this.#shortUntilMs;
  }

  /**
   * Reports whether a probe failed for lack of descriptors and may soon
   * succeed.
   */
  #shouldRetry({ failure }: NodeProbe, index: number): boolean {
    const nowMs = performance.now();
    // A lookup without a descriptor fails as if the name did not exist, so such
    // a failure counts only the second time, and only if descriptors are not
    // scarce.
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
   * Tries a node again, with its full time limit, when there may be a
   * descriptor for it.
   */
  #postpone({ failure }: NodeProbe, index: number): void {
    if (!this.#shortSinceMs.has(index)) {
      this.#shortSinceMs.set(index, performance.now());
    }

    // The next probe that ends releases its descriptor.
    const isNext = failure === NO_DESCRIPTORS && this.#running.size > 0;
    if (isNext) {
      this.#queue.push(index);
    } else {
      this.probeAgain(index, SHORTAGE_MS);
    }
  }
}

/**
 * Makes Deno open the sockets that it uses for signals.
 *
 * Otherwise Deno does so half a second later, and panics if a sweep is using
 * every descriptor of the process by then.
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
 * Makes Deno read the certificates that it trusts.
 *
 * Otherwise Deno does so at the first handshake, and if a sweep is using every
 * descriptor of the process by then, it trusts no server from then on.
 */
function loadCertificates(): void {
  try {
    Deno.createHttpClient({}).close();
  } catch {
    // The handshake will report what is wrong with them.
  }
}

// --- Sweep, watch, wait ---

/**
 * Checks many nodes in parallel, and returns one outcome for each, in the order
 * of the nodes. It takes as long as the slowest answer.
 *
 * A node's endpoints are raced, best first, within the node's time limit, so
 * that a dead or silent one never hides a live one. A failed node is not
 * retried: TCP itself resends a lost packet, three times within the default
 * time limit. An HTTP check goes straight to the node: no proxy, no redirect,
 * no compression, and at most 1 MiB of body.
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
 * Reports whether a node is up; {@linkcode probeNode} also says why not.
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
 * Requests a path, `/status` by default, from an HTTP server. Returns the JSON
 * object that it answers with, or `undefined` if there is none.
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

/** Throws unless this is a host that an inventory may contain. */
function requireHost(hostname: string): void {
  const host = parseHost(hostname);
  if ("value" in host) return;

  const given = JSON.stringify(hostname);
  throw new TypeError(`Cannot use hostname ${given}: ${host.problem}`);
}

/**
 * Returns the outcomes of the nodes that are up; throws if any node may not be
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
  /** The JSON object that it answered with; empty if there was none. */
  readonly status: StatusDocument;
  /** The address that accepted the connection, as configured. */
  readonly address: string;
  /** Milliseconds until that address accepted the connection. */
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
 * Gets the nodes of an inventory that are up, in its order; by default, only
 * active nodes are checked.
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
   * Milliseconds from the outcome of a node's check to its next check.
   *
   * @default {5000}
   */
  readonly intervalMs?: number | undefined;
}

/**
 * Yields each outcome as soon as it is known, and checks each node again
 * `intervalMs` after its last outcome, but not before the loop has handled that
 * outcome. A node that hangs does not delay the others.
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
      // After a `break` in the caller's loop, the stream is already closed.
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
   * How many nodes have to be up; all of them by default. It cannot be used
   * with `until: "down"`.
   */
  readonly minUp?: number | undefined;
  /**
   * Milliseconds from the outcome of a node's check to its next check.
   *
   * @default {2000}
   */
  readonly intervalMs?: number | undefined;
  /**
   * The maximum time to wait, in milliseconds.
   *
   * @default {300000}
   */
  readonly deadlineMs?: number | undefined;
}

/**
 * Waits until enough nodes are up (with `until: "down"`, until every node is
 * down or unhealthy), at most until the deadline. Returns the last outcome of
 * each node, in the order of the nodes.
 *
 * A check that the deadline cuts off does not replace an earlier outcome. If
 * too few nodes can be checked at all, it does not wait.
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
  // Towards the deadline, checks are more frequent, so that a late change is
  // seen.
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
 * Describes a node that was not checked, and what prevents a check, if anything
 * does.
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
   * Whether nodes that are not up are left out. If false, no node is contacted.
   *
   * @default {true}
   */
  readonly reachableOnly?: boolean | undefined;
}

/** Options of {@linkcode getSyncUrls} and {@linkcode getEloSyncUrls}. */
export interface SyncUrlOptions extends DataSyncUrlOptions {
  /**
   * The port in the URLs, which is also the port that is checked.
   *
   * @default {8766} in `getSyncUrls`, `elo_sync.sync_port` in `getEloSyncUrls`
   */
  readonly port?: number | undefined;
  /**
   * The path in the URLs. The check still requests the status path.
   *
   * @default {"/db"}
   */
  readonly path?: string | undefined;
}

/**
 * Lists `http://ADDRESS:PORT/PATH` for each active node that is up at the port.
 *
 * The URLs are in the order of the inventory, without duplicates, each with the
 * address that answered.
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
 * This host is left out: the node named by `RINGRIFT_NODE_ID`, or else by the
 * hostname, as well as nodes at an address of this host.
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a node may not be contacted, or if the
 * hostname is needed but may not be read
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

/** Validates the caller's options before the inventory is read. */
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

/** Names and addresses that mean this host in every network. */
const LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "::1", "0.0.0.0", "::"];

/** Returns a predicate that recognises this host by its name or an address. */
function thisHostPredicate(): (node: ClusterNode) => boolean {
  const nodeId = readVariable("RINGRIFT_NODE_ID")?.toLowerCase();
  if (nodeId === undefined) {
    const purpose = "sys access, to leave this host out";
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

/** Returns the hostname, in full and up to its first dot, if it may be read. */
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

/**
 * Returns the canonical form of a host, for comparison: 127.0.0.1 for 0x7f.1.
 */
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

/**
 * How long ssh may take to end after SIGTERM, and its output to end after that.
 */
const GRACE_MS = 500;
const DRAIN_STEP_MS = 50;

/** The maximum number of characters of each stream in a result. */
const MAX_OUTPUT_LENGTH = 1_048_576;

/** How much of the last output of ssh a failure quotes. */
const MAX_REASON_LINES = 3;
const MAX_REASON_LENGTH = 300;
const MAX_TAIL_LENGTH = 4096;

/** The exit code of ssh for a failure of its own. */
const SSH_FAILED = 255;

/** Options that make ssh connect to something other than a node's endpoint. */
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
   * Options of ssh_config(5), each `KEY=VALUE`. An option that is set here
   * replaces the node's own and the default.
   *
   * @default {[]}
   */
  readonly options?: readonly string[] | undefined;
  /**
   * The endpoint to log in to.
   *
   * @default {undefined} the node's first endpoint; in `runOnNodes`, the first
   * that greets
   */
  readonly endpoint?: Endpoint | undefined;
}

/**
 * Builds the argument list, starting with `ssh`, that runs a command on a node.
 *
 * By default, ssh never asks for a password, its time to connect is limited,
 * and a dead connection ends within about a minute. It joins the words of the
 * command with spaces, and a shell on the node interprets the result.
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
 * @throws {TypeError} if the node has no address, or if ssh could misinterpret
 * an option
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

  // ssh uses the first value of an option, so one that is replaced later is
  // left out. Within a list, an option may occur several times (SendEnv).
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

  // Otherwise ssh tries the keys of an agent first, and servers refuse the
  // sixth.
  if (node.sshKey !== undefined) defaults.push("IdentitiesOnly=yes");
  return defaults;
}

/** Returns the key of `KEY=VALUE` in lower case, since ssh ignores its case. */
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
    throw new TypeError("Cannot use command: a word contains a NUL character");
  }
}

function noAddress(node: ClusterNode): TypeError {
  const name = JSON.stringify(node.name);
  return new TypeError(`${name} has no address: ${NO_ADDRESS_HINT}`);
}

/**
 * Returns the endpoints of a node that are raced for a greeting: none if there
 * is no choice, or if an option makes ssh connect elsewhere.
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
 * Returns the node's first endpoint if none greets within two seconds (or
 * `timeoutMs`, if that is shorter), or if none may be contacted.
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
   * The time limit for each node, in milliseconds.
   *
   * @default {undefined} no limit
   */
  readonly timeoutMs?: number | undefined;
  /**
   * The maximum number of nodes on which the command runs at a time.
   *
   * @default {32}
   */
  readonly concurrency?: number | undefined;
  /**
   * The standard input of the command on every node.
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
   * Called with all output of a node, as it arrives.
   *
   * A promise that it returns is awaited before more is read. If it throws or
   * the promise rejects, every ssh is ended and the call rejects with that
   * error.
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
   * A promise that it returns is awaited before the next command is started. If
   * it throws or the promise rejects, every ssh is ended and the call rejects
   * with that error.
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
 * - `exit`: the command ended with any other non-zero code.
 * - `timeout`: `timeoutMs` elapsed.
 * - `signal`: ssh was ended by a signal.
 * - `no-address`: the node has no address.
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
  /** The node that the command was meant for. */
  readonly node: ClusterNode;
  /** The exit code, or `null` if there is none. */
  readonly exitCode: number | null;
  /** The signal that ended ssh, or `null`. */
  readonly signal: string | null;
  /** The first 1,048,576 characters of standard output. */
  readonly stdout: string;
  /** The first 1,048,576 characters of standard error, including ssh's own. */
  readonly stderr: string;
  /** Whether `stdout` or `stderr` was cut off. */
  readonly truncated: boolean;
  /** How long it took, in milliseconds. */
  readonly durationMs: number;
  /** Why the command failed; `undefined` if it returned 0. */
  readonly failure: CommandFailure | undefined;
}

/**
 * Runs a command on many nodes over ssh.
 *
 * The words of the command are joined with spaces, and a shell on the node
 * interprets the result: `["echo", "a  b"]` prints `a b`. Quote for that shell.
 *
 * A node with several SSH endpoints is reached at the one that greets first, so
 * that a command never runs twice. Each ssh runs in its own session, without a
 * terminal, so it cannot prompt.
 *
 * Ending ssh, by `timeoutMs` or `signal`, does not end its command: the command
 * may still be running on the node, unless the option `RequestTTY=force` ties
 * it to the connection.
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
 * @param command the words of the command, or a function that returns them for
 * a node
 * @returns one result for each node, in the order of the nodes
 * @throws {TypeError} if a command or an option is invalid or unsafe, or if an
 * endpoint is given for several nodes
 * @throws {Deno.errors.NotCapable} if ssh may not be run
 * @throws {Deno.errors.NotFound} if ssh is not on the PATH
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

  // A failure on this side ends every ssh: nobody is left to take the output.
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
    // The pool's own error only wraps the errors that the runs threw.
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

/**
 * Waits for a promise that a callback returned, but stops if the call is
 * aborted.
 */
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

/** The output of one ssh process, and how the process ended. */
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
  /** Aborts with a reason that is shown to people. */
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
    return { ...output, failure: endFailure(output.signal, argv, options) };
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
    // If ssh is missing, no other node can be reached either.
    if (error instanceof Deno.errors.NotFound) throw error;
    return { problem: `ssh cannot be started (${errorText(error)})` };
  }
}

/**
 * Starts ssh with an argument list from {@linkcode sshCommand}.
 *
 * If detached, it runs in its own session: it has no terminal, does not receive
 * Ctrl-C and cannot prompt. A login is not detached.
 *
 * @throws {Deno.errors.NotCapable} if ssh may not be run
 * @throws {Deno.errors.NotFound} if ssh is not on the PATH
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

/** A running ssh process: its input, its output, and how it is ended. */
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

  /** The last text on standard error, from ssh or the command. */
  get lastWords(): string {
    return this.#stderr.tail;
  }

  /** Writes the input of the command, which need not read all of it. */
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

    // On SIGTERM, ssh itself exits with 255. Any other code comes from the
    // command, which ended just before.
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
      // It has already ended.
    }
  }
}

/** Reads one stream of ssh as text, no faster than the text is delivered. */
class OutputReader {
  /**
   * Resolves when all is read; rejects with the error if delivering it fails.
   */
  readonly done: Promise<void>;
  /** The beginning of the text. */
  text = "";
  /** The end of the text. */
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
   * A process that ssh leaves behind, such as a ControlPersist master, can keep
   * the pipe open, and write to it, forever. What ssh itself wrote is already
   * in the pipe, so this gives up after waiting half a second in total for
   * more.
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

/**
 * Returns the beginning of a text, without splitting a character at its end.
 */
function beginning(text: string, length: number): string {
  if (text.length <= length) return text;

  return text.slice(0, length).replace(/[\ud800-\udbff]$/, "");
}

const STILL_RUNNING = "the command may still be running on the node " +
  "(-o RequestTTY=force ends it with the connection)";

/** Explains why ssh was ended by a signal. */
function endFailure(
  endedBy: string,
  argv: readonly string[],
  { signal, deadline }: SshRunOptions,
): CommandFailure {
  const isLate = deadline.aborted && !signal.aborted;
  const reason = isLate ? deadline.reason : `ended by ${endedBy}`;
  const isTied = argv.some((word) => /^requesttty=force$/i.test(word));

  return {
    code: isLate ? "timeout" : "signal",
    message: isTied ? reason : `${reason}; ${STILL_RUNNING}`,
  };
}

/**
 * Quotes the last few lines of ssh: the cause is often not in the very last.
 */
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

/**
 * Reports whether the failure of a command quotes all of its standard error.
 */
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

/** Names the option that accepts unknown host keys, but not changed ones. */
function hostKeyHint(lastWords: string): string | undefined {
  // ssh does not pass the option on to the ssh of a jump host, which prints
  // this message before other lines.
  const isRefused = lastWords.trimEnd()
    .endsWith("Host key verification failed.");
  const isChanged = /host key .* has changed/i.test(lastWords);
  if (!isRefused || isChanged) return undefined;

  return "-o StrictHostKeyChecking=accept-new accepts a host key that is new";
}

/** Names the flag that allows trying the other endpoints of a node. */
function permissionHint(
  node: ClusterNode,
  options: SshOptions,
): string | undefined {
  const raced = racedSshEndpoints(node, options);
  const isRaced = raced.every(({ host, port }) => isNetGranted(host, port));
  if (isRaced) return undefined;

  return `run with ${netFlag(raced)} to try its other address`;
}
