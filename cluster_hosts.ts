/**
 * What a script needs to know about the hosts of a cluster: one YAML inventory is read and validated, its nodes are
 * selected, checked in parallel over TCP or HTTP, and turned into URLs and into commands over ssh.
 *
 * Importing this module needs no permission. Each one is used at the moment that it is needed and never prompted for: a
 * missing one throws `Deno.errors.NotCapable` with the exact flag, and a variable that may not be read counts as unset.
 * An inventory that cannot be used throws {@linkcode HostsConfigError}; an option out of its range throws `RangeError`
 * or `TypeError` before anything is contacted. A fault of one node never rejects a call. Durations are milliseconds.
 *
 * @module
 */
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

// --- Constants ---

/** The default port of the Elo ratings database. */
export const ELO_SYNC_PORT = 8766;
/** The default port of a node's data server. */
export const DATA_SYNC_PORT = 8766;
/** The default port of the model server. */
export const MODEL_SYNC_PORT = 8765;
/** The inventory, under the working directory, if nothing else names one. */
export const DEFAULT_CONFIG_PATH = "config/distributed_hosts.yaml";

/** The defaults of timeouts, intervals and bounds, which the command line's help names too. */
export const DEFAULTS = {
  timeoutMs: 5000,
  concurrency: 10_000,
  watchIntervalMs: 5000,
  waitIntervalMs: 2000,
  waitDeadlineMs: 300_000,
  commandTimeoutMs: 60_000,
  commandConcurrency: 32,
  connectTimeoutMs: 10_000,
} as const;

/** The next endpoint of a node is tried if the one before has not answered by then, as in RFC 8305. */
const FALLBACK_DELAY_MS = 250;
/** How many nodes a sweep starts with, and how many more may be under way after each tick. */
const INITIAL_CONCURRENCY = 64;
const MAX_GROWTH = 1000;
const TICK_MS = 10;
/** More lookups than this would fill Deno's pool of blocking threads, on which file reads wait too. */
const MAX_LOOKUPS = 16;
const MAX_HEAD_BYTES = 64 * 1024;
const MAX_BODY_BYTES = 1024 * 1024;
const MAX_DEPTH = 100;
const MAX_OUTPUT_LENGTH = 1024 * 1024;
/** How many values an inventory may hold beyond its own characters, each alias counted at each of its places. */
const MAX_ALIASED_VALUES = 1_000_000;
/** How long an ssh server may take to greet, and an ssh to end after SIGTERM. */
const GREETING_MS = 2000;
const GRACE_MS = 500;

const ACTIVE_STATUSES: readonly string[] = ["active", "ready", "unknown"];
const INACTIVE_STATUSES: readonly string[] = ["terminated", "offline", "setup", "retired", "archived"];

// --- Errors ---

/** One thing that is wrong with an inventory. It never quotes the file, which may hold secrets. */
export interface ConfigProblem {
  /** The place: `hosts.gpu-node-1.ssh_port`; empty for the file as a whole. */
  readonly path: string;
  /** What is wrong, and what is expected. */
  readonly message: string;
  /** The line, from 1, if it can be found. */
  readonly line?: number;
  /** The column, from 1, if it can be found. */
  readonly column?: number;
}

/** An inventory that cannot be used. It lists all problems, not the first alone. */
export class HostsConfigError extends Error {
  /** Every problem, in the order of the file. */
  readonly problems: readonly ConfigProblem[];

  /** Makes an error of all `problems` of the file or URL named `origin`. */
  constructor(origin: string, problems: readonly ConfigProblem[], options?: ErrorOptions) {
    super(problems.map((problem) => formatConfigProblem(problem, origin)).join("\n"), options);
    this.name = "HostsConfigError";
    this.problems = problems;
  }
}

/** A problem as people are shown it, on one line: `hosts.yaml:12: hosts.gpu-1.ssh_port: expected …`. */
export function formatConfigProblem({ path, message, line, column }: ConfigProblem, origin: string): string {
  const place = [origin, line, path === "" ? column : undefined].filter((part) => part !== undefined).join(":");
  return path === "" ? `${place}: ${message}` : `${place}: ${path}: ${message}`;
}

/** The known word that was probably meant: in another case, one edit away, or begun by three letters or more. */
export function didYouMean(word: string, known: Iterable<string>): string | undefined {
  const candidates = [...known];
  if (candidates.includes(word)) return undefined;
  const begins = (candidate: string) => word.length > 2 && candidate.toLowerCase().startsWith(word.toLowerCase());
  return candidates.find((candidate) => isTypo(word, candidate)) ?? candidates.find(begins);
}

/** Whether two words differ in case, or by one insertion, deletion, replacement or swap of neighbours. */
function isTypo(written: string, meant: string): boolean {
  const [word, other] = [written.toLowerCase(), meant.toLowerCase()];
  const shorter = Math.min(word.length, other.length);
  let start = 0;
  while (start < shorter && word[start] === other[start]) start++;
  let end = 0;
  while (end < shorter - start && word.at(-1 - end) === other.at(-1 - end)) end++;
  const [a, b] = [word.slice(start, word.length - end), other.slice(start, other.length - end)];
  return written !== meant && ((a.length === 2 && a === b[1]! + b[0]) || (a.length <= 1 && b.length <= 1));
}

/** What is wrong with a version of Deno, or `undefined` if this module works on it. */
export function unsupportedDeno(version: string = Deno.version.deno): string | undefined {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  // On 2.8.3, a read from a silent node never ends.
  if (version !== "2.8.3" && (major > 2 || (major === 2 && minor >= 3))) return undefined;
  return `Deno ${version} cannot check nodes reliably: use Deno 2.3 or later, but not 2.8.3`;
}

function denied(what: string, flag: string): Error {
  return new Deno.errors.NotCapable(`Requires ${what}: run again with ${flag}`);
}

function requirePermission(permission: Deno.PermissionDescriptor, flag: string, what = `${permission.name} access`) {
  if (Deno.permissions.querySync(permission).state !== "granted") throw denied(what, flag);
}

/** What went wrong, in one line; what `fetch` says of it is in its cause. */
function errorText(error: unknown): string {
  const { cause = error } = Object(error) as { cause?: unknown };
  return cause instanceof Error ? cause.message : String(cause);
}

const TLS_FAULTS: readonly (readonly [RegExp, string])[] = [
  [/Expired/, "the certificate has expired"],
  [/NotValidYet/, "the certificate is not valid yet"],
  [/NotValidForName|not valid for name/, "the certificate is for another name"],
  [/CaUsedAsEndEntity/, "the certificate is self-signed by a CA: make one with CA:FALSE, and name it in DENO_CERT"],
  [/UnknownIssuer/, "the certificate is from an unknown CA: name that CA's file in DENO_CERT"],
  [/corrupt message/, "the server does not speak TLS"],
];

/** A failed TLS handshake in words; `undefined` for any other fault. */
function tlsFault(error: unknown): string | undefined {
  const text = errorText(error);
  const known = TLS_FAULTS.find(([pattern]) => pattern.test(text))?.[1];
  return known ?? (/certificate|\bTLS\b|HandshakeFailure/i.test(text) ? `TLS: ${text.split(": ").at(-1)}` : undefined);
}

// --- Host fields ---

/** One field: its key, its parser, which is given no blank and throws {@linkcode InvalidValue}, and its default. */
type Field<T> = { readonly key: string; readonly parse: (value: unknown) => T; readonly fallback?: T };

/** Every field of a host. To add one: a row here, and the property of {@linkcode ClusterNode} that documents it. */
const HOST_FIELDS = {
  tailscaleIp: { key: "tailscale_ip", parse: parseHost },
  sshHost: { key: "ssh_host", parse: parseSshHost },
  sshUser: { key: "ssh_user", parse: parseUser },
  sshKey: { key: "ssh_key", parse: (value) => parseWord(value, "the path of a key") },
  sshPort: { key: "ssh_port", parse: parsePort, fallback: 22 },
  ringriftPath: { key: "ringrift_path", parse: parseText, fallback: "~/ringrift/ai-service" },
  status: { key: "status", parse: parseText, fallback: "unknown" },
  reason: { key: "reason", parse: parseText },
  role: { key: "role", parse: parseText, fallback: "unknown" },
  memoryGb: { key: "memory_gb", parse: parseAmount, fallback: 0 },
  cpus: { key: "cpus", parse: parseAmount, fallback: 0 },
  gpu: { key: "gpu", parse: (value) => parseText(Number.isFinite(value) ? String(value) : value), fallback: "" },
  dataServerPort: { key: "data_server_port", parse: parsePort, fallback: DATA_SYNC_PORT },
  dataServerUrl: { key: "data_server_url", parse: parseBaseUrl },
  statusPath: { key: "status_path", parse: parsePath, fallback: "/status" },
} satisfies { [K in keyof Omit<ClusterNodeFields, "name" | "entry">]-?: Field<NonNullable<ClusterNode[K]>> };

const ELO_SYNC_FIELDS = {
  coordinator: { key: "coordinator", parse: parseText, fallback: "mac-studio" },
  syncPort: { key: "sync_port", parse: parsePort, fallback: ELO_SYNC_PORT },
  syncInterval: {
    key: "sync_interval",
    parse: (it) => parseAmount(it) || invalid("expected more than 0"),
    fallback: 300,
  },
  divergenceThreshold: { key: "divergence_threshold", parse: parseAmount, fallback: 50 },
  transports: { key: "transports", parse: parseTexts, fallback: ["tailscale", "aria2", "http"] },
} satisfies { [K in keyof EloSyncConfig]: Field<EloSyncConfig[K]> };

/** The fields of `distributed`: the defaults of the hosts that set none. */
const DISTRIBUTED_FIELDS = {
  dataServerPort: { key: "data_server_port", parse: parsePort },
  statusPath: { key: "status_path", parse: parsePath },
} satisfies FieldTable;

type FieldTable = Readonly<Record<string, Field<unknown>>>;

type FieldProblem = { readonly name: string; readonly key: string; readonly message: string };

/** Sets a table's fields in `target`, what is unset to its fallback; gives the problems of those that are invalid. */
function parseFields(table: FieldTable, target: object, valueOf: (name: string, key: string) => unknown) {
  const problems: FieldProblem[] = [];
  for (const name in table) {
    const { key, parse, fallback } = table[name]!;
    const value = valueOf(name, key);
    try {
      const parsed = isUnset(value) ? fallback : parse(typeof value === "string" ? value.trim() : value);
      (target as Record<string, unknown>)[name] = parsed;
    } catch (error) {
      problems.push({ name, key, message: invalidText(error) });
    }
  }
  return problems;
}

/** What is wrong with one value, or with a file as a whole. It names what is expected, never the value. */
class InvalidValue extends Error {
  constructor(message: string, cause?: unknown, readonly place: Pick<ConfigProblem, "line" | "column"> = {}) {
    super(message, { cause });
  }
}

function invalid(...details: ConstructorParameters<typeof InvalidValue>): never {
  throw new InvalidValue(...details);
}

function invalidText(error: unknown): string {
  if (error instanceof InvalidValue) return error.message;
  throw error;
}

/** Nothing, a blank, and a placeholder such as `<tailscale-ip>`. */
function isUnset(value: unknown): boolean {
  if (typeof value !== "string") return value === undefined || value === null;
  const text = value.trim();
  return text === "" || (text.endsWith(">") && /^(?:[^@]*@)?<[^<>]*>$/.test(text));
}

// deno-lint-ignore no-control-regex
const CONTROL_TEXT = /[\x00-\x1f\x7f-\x9f]/;

function parseText(value: unknown): string {
  if (typeof value !== "string") return invalid(`expected a string, got ${typeName(value)}: put it in quotes`);
  return CONTROL_TEXT.test(value) ? invalid("holds a control character") : value;
}

function parseTexts(value: unknown): readonly string[] {
  const isList = Array.isArray(value) && value.every((item) => typeof item === "string");
  return isList ? value : invalid("expected a list of strings");
}

// Spelt out, since a class such as \p{Cf} takes longer to compile than a small inventory takes to load.
// deno-lint-ignore no-control-regex
const UNSAFE_TEXT = /[\s\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f;&|<>()$`\\"'*?[\]{}!#%^]/;

/** Text that neither ssh nor a shell can take for anything else. */
function parseWord(value: unknown, what: string): string {
  const text = parseText(value);
  if (text.startsWith("-")) return invalid(`expected ${what}, got one that begins with "-"`);
  if (!UNSAFE_TEXT.test(text)) return text;
  return invalid(`expected ${what}, without spaces or characters that a shell would interpret`);
}

function parseHost(value: unknown): string {
  const what = "a host name or an address";
  const host = withoutBrackets(parseText(value));
  const colons = host.split(":").length - 1;
  if (host === "" || /[/@,]/.test(host) || colons === 1) invalid(`expected ${what} alone, without user, port or path`);
  const isIpv4 = /^(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!$)|$)){4}$/.test(host);
  if (/^[\d.]+$/.test(host) && !isIpv4) invalid(`expected ${what}: not a valid IPv4 address`);
  if (colons > 1 && !URL.canParse(`http://[${host}]`)) invalid(`expected ${what}: not a valid IPv6 address`);
  return parseWord(host, what);
}

function withoutBrackets(host: string): string {
  return host.startsWith("[") && host.endsWith("]") ? host.slice(1, -1) : host;
}

function parseSshHost(value: unknown): string {
  const { user, host } = splitUser(parseText(value));
  return user === undefined ? parseHost(host) : `${parseUser(user)}@${parseHost(host)}`;
}

function splitUser(sshHost: string): { user: string | undefined; host: string } {
  const at = sshHost.lastIndexOf("@");
  return { user: at < 0 ? undefined : sshHost.slice(0, at), host: sshHost.slice(at + 1) };
}

function parseUser(value: unknown): string {
  const user = parseWord(value, "a user name");
  return user === "" || /[@:/]/.test(user) ? invalid("expected a user name alone") : user;
}

function parsePort(value: unknown): number {
  const port = typeof value === "string" && /^\d{1,5}$/.test(value) ? Number(value) : value;
  if (typeof port === "number" && Number.isInteger(port) && port >= 1 && port <= 65535) return port;
  return invalid("expected an integer from 1 to 65535");
}

function parseAmount(value: unknown): number {
  const amount = typeof value === "string" ? Number(value) : value;
  if (typeof amount === "number" && Number.isFinite(amount) && amount >= 0) return amount;
  return invalid("expected a number, 0 or more");
}

/** A base URL in one spelling, so that one server is one URL. */
function parseBaseUrl(value: unknown): string {
  const text = parseText(value);
  const url = /^https?:\/\/[^\s"'`<>\\?#]*$/i.test(text) && URL.canParse(text) ? new URL(text) : undefined;
  if (url && url.port !== "0" && !url.username && !url.password) {
    return `${url.protocol}//${url.host}${url.pathname.replace(/\/+$/, "")}`;
  }
  return invalid("expected an http:// or https:// URL, without user, query, fragment, spaces or quotes");
}

function parsePath(value: unknown): string {
  const path = parseText(value);
  return /^\/[!"$-~]*$/.test(path) ? path : invalid('expected a path that begins with "/", URL-encoded');
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function typeName(value: unknown): string {
  if (value === null || value === undefined) return "nothing";
  if (Array.isArray(value)) return "a list";
  return typeof value === "object" ? "a mapping" : `a ${typeof value}`;
}

// --- ClusterNode, EloSyncConfig ---

/** One node of the cluster, with the defaults applied. */
export class ClusterNode {
  /** The name in the inventory. */
  readonly name: string;
  /** The address inside the tailnet, which is tried first. */
  readonly tailscaleIp!: string | undefined;
  /** A host, or `user@host`. */
  readonly sshHost!: string | undefined;
  /** The SSH user: the one that is set, else the one in `sshHost`, else `ubuntu`. */
  readonly sshUser!: string;
  /** The path of the SSH private key. */
  readonly sshKey!: string | undefined;
  /** The SSH port; 22 by default. */
  readonly sshPort!: number;
  /** The folder of the service on the node; `~/ringrift/ai-service` by default. */
  readonly ringriftPath!: string;
  /** A word such as `active`, `ready` or `offline`; `unknown` by default. */
  readonly status!: string;
  /** Why it is out of service, for people. */
  readonly reason!: string | undefined;
  /** A word such as `coordinator` or `worker`; `unknown` by default. */
  readonly role!: string;
  /** Memory in GB; 0 if not known. */
  readonly memoryGb!: number;
  /** The number of CPU cores; 0 if not known. */
  readonly cpus!: number;
  /** The GPU model; empty if there is none. */
  readonly gpu!: string;
  /** The port of the data server; 8766 by default. */
  readonly dataServerPort!: number;
  /** The base URL of the data server, if it is not `http://ADDRESS:PORT`. */
  readonly dataServerUrl!: string | undefined;
  /** The path that answers a check; `/status` by default. */
  readonly statusPath!: string;
  /** The host's mapping as written, for keys of the user's own. */
  readonly entry: HostEntry;

  /** Makes a node; `null` and a blank string mean unset. Throws one `TypeError` that lists every invalid field. */
  constructor(fields: ClusterNodeFields) {
    const { name, entry = {} } = fields;
    const problems = parseFields(HOST_FIELDS, this, (key) => fields[key as keyof ClusterNodeFields]);
    if (typeof name !== "string" || name.trim() === "" || CONTROL_TEXT.test(name)) {
      problems.unshift({ name: "name", key: "", message: "a host's name is blank or has control characters" });
    }
    if (problems.length > 0) {
      const list = problems.map(({ name, message }) => `${name}: ${message}`).join("; ");
      throw new TypeError(`Cannot make node ${JSON.stringify(name)}: ${list}`, { cause: problems });
    }
    this.name = name;
    this.sshUser ??= splitUser(this.sshHost ?? "").user ?? "ubuntu";
    this.entry = entry;
  }

  /** The address to use: the Tailscale one, else the host of `sshHost`; `undefined` if there is none. */
  get bestIp(): string | undefined {
    return this.addresses[0];
  }

  /** Every distinct address, best first. */
  get addresses(): string[] {
    const all = [this.tailscaleIp, this.sshHost && splitUser(this.sshHost).host];
    return all.filter((address, at): address is string => address !== undefined && all.indexOf(address) === at);
  }

  /** `dataServerUrl`, else `http://ADDRESS:PORT`, without a slash at the end; `undefined` if there is neither. */
  get dataServerBaseUrl(): string | undefined {
    const [endpoint] = dataEndpoints(this);
    return endpoint && endpointUrl(endpoint);
  }

  /** Whether the status, in any case, is none of `terminated`, `offline`, `setup`, `retired`, `archived`. */
  get isActive(): boolean {
    return !INACTIVE_STATUSES.includes(this.status.toLowerCase());
  }
}

/** What a {@linkcode ClusterNode} is made of: its name, and any of its other fields. */
export type ClusterNodeFields =
  & Pick<ClusterNode, "name">
  & {
    readonly [K in keyof Omit<ClusterNode, "name" | "bestIp" | "addresses" | "dataServerBaseUrl" | "isActive">]?:
      | ClusterNode[K]
      | undefined;
  };

/** How the Elo ratings database is synchronised. */
export interface EloSyncConfig {
  /** The name of the coordinator's node; `mac-studio` by default. */
  readonly coordinator: string;
  /** The port of the database on each node; 8766 by default. */
  readonly syncPort: number;
  /** Seconds between two rounds; 300 by default. */
  readonly syncInterval: number;
  /** Elo points by which two databases may differ; 50 by default. */
  readonly divergenceThreshold: number;
  /** The transports to try, best first; `tailscale`, `aria2`, `http` by default. */
  readonly transports: readonly string[];
}

// --- Reading ---

/** A path, a URL (`file:`, `http:` or `https:`), or a config: one already loaded, or `{ hosts }` written in place. */
export type ConfigSource = string | URL | HostsConfig;

/** One host as written: snake_case keys, those of the user's own kept. config/README.md explains the known ones. */
export type HostEntry = Readonly<Record<string, unknown>>;

/** The inventory as written: a finite tree, unknown sections kept; in `distributed` are defaults of the hosts. */
export type HostsConfig = {
  readonly hosts: Readonly<Record<string, HostEntry>>;
  readonly elo_sync?: Readonly<Record<string, unknown>> | null;
  readonly [section: string]: unknown;
};

/** The text of an inventory, and the path or the URL that it is from. It is empty if the default file is missing. */
export type HostsConfigText = { readonly text: string; readonly origin: string; readonly exists: boolean };

/** Options of {@linkcode loadHostsConfig}: how long a URL may take, by default 5000 ms, and what aborts its loading. */
export type LoadOptions = Pick<ProbeOptions, "timeoutMs" | "signal">;

/** Reads the text that {@linkcode loadHostsConfig} would load; the default file alone may be missing. */
export async function readHostsConfig(source?: string | URL, options: LoadOptions = {}): Promise<HostsConfigText> {
  return await readText(source, source === undefined ? "RINGRIFT_HOSTS_CONFIG" : undefined, options);
}

async function readText(source: string | URL | undefined, variable: string | undefined, options: LoadOptions) {
  const named = variable ? readVariable(variable) : source;
  const origin = String(named ?? DEFAULT_CONFIG_PATH);
  try {
    const bytes = /^https?:/i.test(origin) ? await fetchConfig(origin, options) : await readFile(origin);
    return { text: decodeConfig(bytes), origin, exists: true };
  } catch (error) {
    const { cause } = error as Error;
    if (named === undefined && cause instanceof Deno.errors.NotFound) return { text: "", origin, exists: false };
    const message = invalidText(error) + (variable && named ? ` (${variable} names it)` : "");
    throw new HostsConfigError(origin, [{ path: "", message }], { cause });
  }
}

async function readFile(origin: string): Promise<Uint8Array> {
  const path = /^file:/i.test(origin) ? decodeURIComponent(new URL(origin).pathname) : origin;
  requirePermission({ name: "read", path }, `--allow-read=${path}`);
  try {
    return await Deno.readFile(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return invalid("there is no such file", error);
    const isFolder = error instanceof Deno.errors.IsADirectory || /os error 21\b/.test(String(error));
    return invalid(isFolder ? "is a folder, not a file" : `cannot be read (${errorText(error)})`, error);
  }
}

async function fetchConfig(url: string, options: LoadOptions): Promise<Uint8Array> {
  const { timeoutMs = DEFAULTS.timeoutMs, signal } = options;
  requireDuration("timeoutMs", timeoutMs);
  if (!URL.canParse(url)) invalid("is not a URL");
  const { hostname, port, protocol } = new URL(url);
  requireNet(withoutBrackets(hostname), Number(port) || DEFAULT_PORTS[protocol]!);
  const deadline = AbortSignal.timeout(timeoutMs);
  const ended = signal ? AbortSignal.any([deadline, signal]) : deadline;
  try {
    // A redirect could lead to a host for which no permission was given, and then Deno would ask.
    const response = await fetch(url, { redirect: "manual", signal: ended });
    if (response.status === 200) return await response.bytes();
    await response.body?.cancel();
    const hint = response.status >= 300 && response.status < 400 ? ", a redirect: use the URL it leads to" : "";
    return invalid(`answered HTTP ${response.status}${hint}`);
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof InvalidValue) throw error;
    if (deadline.aborted) return invalid(`did not answer within ${formatMs(timeoutMs)}`, error);
    // What is behind the last colon is the reason; before it stands the URL again.
    return invalid(tlsFault(error) ?? `cannot be fetched (${errorText(error).split(": ").at(-1)})`, error);
  }
}

function decodeConfig(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    return invalid(`is ${bytes[0]! + bytes[1]! === 0xff + 0xfe ? "UTF-16" : "not UTF-8"}: save it as UTF-8`, error);
  }
}

/** The port that a URL leaves out. */
const DEFAULT_PORTS: Readonly<Record<string, number>> = { "http:": 80, "https:": 443, "ssh:": 22 };

/** An environment variable, trimmed; `undefined` if it is not set, is blank or may not be read. */
export function readVariable(name: string): string | undefined {
  const { state } = Deno.permissions.querySync({ name: "env", variable: name });
  return state === "granted" ? Deno.env.get(name)?.trim() || undefined : undefined;
}

// --- Parsing ---

/** A config whose fields are all valid, and what they say. */
type ParsedConfig = ReturnType<typeof parseDocument>;

/** A config is parsed once, however many functions it is given to. */
const parsedConfigs = new WeakMap<HostsConfig, ParsedConfig>();

/**
 * Loads an inventory: the file, URL or object given, else the file named by `RINGRIFT_HOSTS_CONFIG`, else
 * {@linkcode DEFAULT_CONFIG_PATH}; if that is missing, the cluster is empty. The result can be given to every function
 * that takes a source, so that nothing is read twice.
 */
export async function loadHostsConfig(source?: ConfigSource, options: LoadOptions = {}): Promise<HostsConfig> {
  return (await loadParsed(source, options)).config;
}

async function loadParsed(source?: ConfigSource, options: LoadOptions = {}): Promise<ParsedConfig> {
  if (typeof source !== "object" || source instanceof URL) {
    const { text, origin } = await readHostsConfig(source, options);
    return parseConfigText(text, origin);
  }
  const parse = (problems: ConfigProblem[]) =>
    treeSize(source) === Infinity ? invalid("holds itself, or is nested too deeply") : parseDocument(source, problems);
  const parsed = parsedConfigs.get(source) ?? withoutProblems("config object", "", parse);
  for (const config of [source, parsed.config]) parsedConfigs.set(config, parsed);
  return parsed;
}

/** Parses and validates the text of an inventory, which errors call `origin`. An empty text is an empty cluster. */
export function parseHostsConfig(text: string, origin = "inventory"): HostsConfig {
  return parseConfigText(text, origin).config;
}

function parseConfigText(text: string, origin: string): ParsedConfig {
  const parsed = withoutProblems(origin, text, (problems) => parseDocument(parseYaml(text) ?? {}, problems));
  parsedConfigs.set(parsed.config, parsed);
  return parsed;
}

/** What `parse` makes of a text; throws all the problems that it finds, collected or thrown. */
function withoutProblems<T>(origin: string, text: string, parse: (problems: ConfigProblem[]) => T): T {
  const problems: ConfigProblem[] = [];
  try {
    const parsed = parse(problems);
    if (problems.length === 0) return parsed;
  } catch (error) {
    problems.push({ path: "", message: invalidText(error), ...(error as InvalidValue).place });
  }
  throw new HostsConfigError(origin, locate(problems, text));
}

/** Every problem of an inventory, in its order; if there is none, what is allowed and probably not meant: warnings. */
export function validateHostsConfig(
  text: string,
): { config?: HostsConfig; problems: ConfigProblem[]; warnings: ConfigProblem[] } {
  try {
    const parsed = parseConfigText(text, "inventory");
    return { config: parsed.config, problems: [], warnings: locate([...findWarnings(parsed)], text) };
  } catch (error) {
    if (error instanceof HostsConfigError) return { problems: [...error.problems], warnings: [] };
    throw error;
  }
}

function parseYaml(text: string): unknown {
  // A log-in page can be valid YAML, and would be an empty cluster.
  if (/^\s*<[!?a-z]/i.test(text)) invalid("is HTML or XML, not YAML");
  if (text.includes("\0")) invalid("holds a NUL character: is it a text file?");
  const line = findTab(text);
  if (line) invalid("is not valid YAML: a tab in the indentation; use spaces", undefined, { line, column: 1 });
  try {
    // The core schema has no merge keys, which @std/yaml expands without a bound, and leaves dates as written.
    const document: unknown = parse(text, { schema: "core" });
    if (!text.includes("&") && !text.includes("<<")) return document;
    if (treeSize(document) > text.length + MAX_ALIASED_VALUES) invalid("has aliases that make it endless or too deep");
    return mergeKeys(document);
  } catch (error) {
    if (error instanceof RangeError) return invalid("is nested too deeply");
    throw error instanceof SyntaxError ? syntaxFault(error) : error;
  }
}

/** The line of a tab that indents, outside of block scalars and of JSON: @std/yaml would silently flatten the file. */
function findTab(text: string): number | undefined {
  if (!/^ *\t/m.test(text) || /^\s*[{[]/.test(text)) return undefined;
  let scalarIndent = Infinity;
  for (const [index, line] of text.split("\n").entries()) {
    const indent = line.search(/[^ ]/);
    if (line.trim() === "" || indent > scalarIndent) continue;
    scalarIndent = /(?:^|[\s:-])[|>][-+\d]*\s*(?:#.*)?$/.test(line) ? indent : Infinity;
    if (line[indent] === "\t") return index + 1;
  }
}

/** How many values a tree holds, an alias counted wherever it stands; infinite if one holds itself, or is too deep. */
function treeSize(value: unknown, levels = MAX_DEPTH, sizes = new Map<object, number>()): number {
  if (typeof value !== "object" || value === null) return 1;
  const known = sizes.get(value);
  if (known !== undefined || levels === 0) return known ?? Infinity;
  sizes.set(value, Infinity);
  let size = 1;
  for (const child of Object.values(value)) size += treeSize(child, levels - 1, sizes);
  sizes.set(value, size);
  return size;
}

/** Replaces each merge key (`<<`) by what it names: a mapping's own keys win, then those of the first one merged. */
function mergeKeys(value: unknown, done = new Map<unknown, unknown>()): unknown {
  if (typeof value !== "object" || value === null || done.has(value)) return done.get(value) ?? value;
  const isList = Array.isArray(value);
  const { "<<": source = [], ...own } = isList ? {} : value as Record<string, unknown>;
  const merged = new Map<string, unknown>();
  for (const mapping of [source].flat().map((item) => mergeKeys(item, done))) {
    if (!isMapping(mapping)) return invalid('a merge key ("<<") names something that is not a mapping');
    for (const [key, item] of Object.entries(mapping)) if (!merged.has(key)) merged.set(key, item);
  }
  for (const [key, item] of Object.entries(own)) merged.set(key, mergeKeys(item, done));
  const result = isList ? value.map((item) => mergeKeys(item, done)) : Object.fromEntries(merged);
  done.set(value, result);
  return result;
}

function syntaxFault(error: SyntaxError): InvalidValue {
  const { line, column } = error as { line?: number; column?: number };
  // After the reason, the message shows the source; at its end, quoted, come names out of the source.
  const reason = error.message.split(/ at line \d+, column \d+|\n/, 1)[0]!.replace(/ (?:"|!<).*/s, "");
  const place = line === undefined || column === undefined ? {} : { line, column };
  return new InvalidValue(`is not valid YAML: ${reason.charAt(0).toLowerCase()}${reason.slice(1)}`, undefined, place);
}

/** Parses what the toolkit uses of a document, and adds everything that is wrong with that to `problems`. */
function parseDocument(document: unknown, problems: ConfigProblem[]) {
  if (!isMapping(document)) return invalid(`expected a mapping with a "hosts" section, got ${typeName(document)}`);
  const { hosts, elo_sync, distributed } = document;
  if (!isMapping(elo_sync ?? {})) problems.push({ path: "elo_sync", message: "expected a mapping" });
  const eloSync = parseSection<EloSyncConfig>("elo_sync", elo_sync, ELO_SYNC_FIELDS, problems);
  // That section is another program's too: only a mapping can hold what is used here.
  const defaults = parseSection<NodeDefaults>("distributed", distributed, DISTRIBUTED_FIELDS, problems);
  const nodes = parseHosts(hosts ?? {}, defaults, problems);
  const config = (isMapping(hosts) ? document : { ...document, hosts: {} }) as HostsConfig;
  const isSet = defaults.dataServerPort !== undefined;
  const needsUnifiedPort = !isSet && nodes.values().some(({ entry }) => isUnset(entry.data_server_port));
  return { config, nodes, eloSync, needsUnifiedPort };
}

function parseSection<T>(path: string, section: unknown, table: FieldTable, problems: ConfigProblem[]): T {
  const mapping = isMapping(section) ? section : {};
  const values = {};
  for (const { key, message } of parseFields(table, values, (_, key) => mapping[key])) {
    problems.push({ path: `${path}.${key}`, message });
  }
  return values as T;
}

type NodeDefaults = {
  readonly dataServerPort?: number;
  readonly statusPath?: string;
  readonly [name: string]: unknown;
};

const HOST_ROWS = Object.entries(HOST_FIELDS).map(([name, { key }]) => ({ name, key }));

function parseHosts(hosts: unknown, defaults: NodeDefaults, problems: ConfigProblem[]): Map<string, ClusterNode> {
  const nodes = new Map<string, ClusterNode>();
  if (!isMapping(hosts)) problems.push({ path: "hosts", message: "expected a mapping from names to hosts" });
  for (const [name, entry] of Object.entries(isMapping(hosts) ? hosts : {})) {
    const path = `hosts.${CONTROL_TEXT.test(name) ? JSON.stringify(name) : name}`;
    try {
      if (!isMapping(entry)) return invalid(`expected a mapping, got ${typeName(entry)}`);
      const fields: Record<string, unknown> = { name, entry };
      for (const row of HOST_ROWS) fields[row.name] = isUnset(entry[row.key]) ? defaults[row.name] : entry[row.key];
      nodes.set(name, new ClusterNode(fields as unknown as ClusterNodeFields));
    } catch (error) {
      const { cause = [{ key: "", message: invalidText(error) }] } = error as { cause?: FieldProblem[] };
      for (const { key, message } of cause) problems.push({ path: key ? `${path}.${key}` : path, message });
    }
  }
  return nodes;
}

/** Adds the lines, and sorts by them. What is in flow style gets the line of its parent. */
function locate(problems: readonly ConfigProblem[], text: string): ConfigProblem[] {
  if (problems.length === 0) return [];
  const places = findKeys(text);
  const placeOf = (path: string): object | undefined =>
    places.get(path) ?? (path.includes(".") ? placeOf(path.slice(0, path.lastIndexOf("."))) : undefined);
  const located = problems.map((problem): ConfigProblem => ({ ...placeOf(problem.path), ...problem }));
  return located.sort((a, b) => (a.line ?? 0) - (b.line ?? 0));
}

/** The place of each key that is written in block style, as people write inventories. */
function findKeys(text: string): Map<string, { line: number; column: number }> {
  const places = new Map<string, { line: number; column: number }>();
  const parents: { indent: number; path: string }[] = [];
  const key = /^( *)(?:"((?:[^"\\]|\\.)*)"\s*|'((?:[^']|'')*)'\s*|([^\s#"'\-[{&*!|>%@`][^#]*?|-[^\s#][^#]*?)):(?:\s|$)/;
  for (const [index, source] of text.split("\n").entries()) {
    const [, { length: indent } = "", double, single, plain] = key.exec(source) ?? [];
    const name = double ?? single?.replaceAll("''", "'") ?? plain?.trimEnd();
    if (name === undefined) continue;
    while (parents.length > 0 && parents.at(-1)!.indent >= indent) parents.pop();
    const path = parents.length > 0 ? `${parents.at(-1)!.path}.${name}` : name;
    parents.push({ indent, path });
    if (!places.has(path)) places.set(path, { line: index + 1, column: indent + 1 });
  }
  return places;
}

// --- Warnings ---

function* findWarnings({ config, nodes, eloSync }: ParsedConfig): Generator<ConfigProblem> {
  yield* findTypos("", nodes.size > 0 ? config : { ...config, hosts: null }, ["hosts", "elo_sync", "distributed"]);
  yield* findTypos("elo_sync.", config.elo_sync, keysOf(ELO_SYNC_FIELDS));
  yield* findTypos("distributed.", config.distributed, keysOf(DISTRIBUTED_FIELDS));
  if (nodes.size === 0) yield { path: "", message: 'no hosts: add them under "hosts"' };
  yield* findTwins(nodes.values());
  const known = [...ACTIVE_STATUSES, ...INACTIVE_STATUSES];
  for (const node of nodes.values()) {
    const path = `hosts.${node.name}`;
    yield* findTypos(`${path}.`, node.entry, keysOf(HOST_FIELDS));
    yield* findPlaceholders(path, node.entry);
    const status = node.status.toLowerCase();
    if (!known.includes(status)) {
      const meant = known.find((word) => isTypo(status, word));
      const hint = meant
        ? `did you mean "${meant}"?`
        : `it counts as active; inactive are ${INACTIVE_STATUSES.join(", ")}`;
      yield { path: `${path}.status`, message: `unknown status; ${hint}` };
    }
    if (node.dataServerBaseUrl === undefined) yield { path, message: "has no address: set tailscale_ip or ssh_host" };
  }
  if (Object.keys(config.elo_sync ?? {}).length === 0) return;
  const coordinator = nodes.get(eloSync.coordinator);
  const isDefault = isUnset(config.elo_sync?.coordinator);
  const what = isDefault ? `is not set, and the default, ${JSON.stringify(eloSync.coordinator)},` : "names a node that";
  if (!coordinator) yield { path: "elo_sync.coordinator", message: `${what} is not in hosts` };
  else if (!coordinator.isActive) yield { path: "elo_sync.coordinator", message: "names a node that is not active" };
}

function keysOf(table: FieldTable): string[] {
  return Object.values(table).map(({ key }) => key);
}

/** Keys that are like a known one which is not set; not a known one with an "s", such as `gpus`: people have those. */
function* findTypos(path: string, section: unknown, known: readonly string[]): Generator<ConfigProblem> {
  if (!isMapping(section)) return;
  for (const key of Object.keys(section)) {
    if (known.includes(key) || (path !== "" && known.some((it) => key === `${it}s`))) continue;
    const meant = known.find((it) => isTypo(key, it) && isUnset(section[it]));
    if (meant) yield { path: path + key, message: `unknown key; did you mean "${meant}"?` };
  }
}

function* findPlaceholders(path: string, entry: HostEntry): Generator<ConfigProblem> {
  for (const { key } of HOST_ROWS) {
    const value = entry[key];
    if (typeof value !== "string" || value.trim() === "") continue;
    const isMasked = /^(?:\S+@)?[\dx]+(?:\.[\dx]+){0,2}(?:\.x+)[\dx.]*$/i.test(value.trim());
    if (isMasked || isUnset(value)) yield { path: `${path}.${key}`, message: "is a placeholder: put the real value" };
  }
}

/** Active nodes that share every endpoint. One machine behind several ports of a proxy is several nodes, and meant. */
function* findTwins(nodes: Iterable<ClusterNode>): Generator<ConfigProblem> {
  const firsts = new Map<string, string>();
  for (const node of nodes) {
    const key = [...dataEndpoints(node), ...sshEndpoints(node)].map((it) => endpointUrl(it)).sort().join(" ");
    if (key === "" || !node.isActive) continue;
    const first = firsts.get(key);
    if (first) yield { path: `hosts.${node.name}`, message: `has the same addresses and ports as ${first}` };
    else firsts.set(key, node.name);
  }
}

// --- Getters ---

/** All nodes by name, in the order of the inventory, with the data port of `RINGRIFT_CONFIG_PATH` if they set none. */
export async function getClusterNodes(source?: ConfigSource): Promise<Map<string, ClusterNode>> {
  const { nodes, needsUnifiedPort } = await loadParsed(source);
  const dataServerPort = needsUnifiedPort ? await unifiedPort() : undefined;
  if (dataServerPort === undefined) return new Map(nodes);
  const withPort = (node: ClusterNode) =>
    isUnset(node.entry.data_server_port) ? new ClusterNode({ ...node, dataServerPort }) : node;
  return new Map(Array.from(nodes, ([name, node]) => [name, withPort(node)]));
}

async function unifiedPort(): Promise<number | undefined> {
  const variable = "RINGRIFT_CONFIG_PATH";
  if (readVariable(variable) === undefined) return undefined;
  const { text, origin } = await readText(undefined, variable, {});
  return withoutProblems(origin, text, (problems) => {
    const { distributed } = Object(parseYaml(text)) as Record<string, unknown>;
    const { dataServerPort } = DISTRIBUTED_FIELDS;
    return parseSection<NodeDefaults>("distributed", distributed, { dataServerPort }, problems).dataServerPort;
  });
}

/** Whether a node's port is that of the unified config, so that the file which `RINGRIFT_CONFIG_PATH` names is read. */
export async function readsUnifiedConfig(source?: ConfigSource): Promise<boolean> {
  return (await loadParsed(source)).needsUnifiedPort;
}

/** The active nodes, in the order of the inventory; see {@linkcode ClusterNode.isActive}. */
export async function getActiveNodes(source?: ConfigSource): Promise<ClusterNode[]> {
  return selectNodes((await getClusterNodes(source)).values());
}

/** The node that `elo_sync.coordinator` names, or `undefined` if it is not in `hosts`. */
export async function getCoordinatorNode(source?: ConfigSource): Promise<ClusterNode | undefined> {
  const { config, eloSync } = await loadParsed(source);
  return (await getClusterNodes(config)).get(eloSync.coordinator);
}

/** How the Elo ratings database is synchronised, with the defaults applied. */
export async function getEloSyncConfig(source?: ConfigSource): Promise<EloSyncConfig> {
  return (await loadParsed(source)).eloSync;
}

/** A name or an address, and a port. */
export type CoordinatorAddress = { readonly hostname: string; readonly port: number };

/** The address of the coordinator's Elo database: the node's, else `RINGRIFT_COORDINATOR_IP`, if that is set. */
export async function getCoordinatorAddress(source?: ConfigSource): Promise<CoordinatorAddress | undefined> {
  const { nodes, eloSync: { coordinator, syncPort: port } } = await loadParsed(source);
  const variable = "RINGRIFT_COORDINATOR_IP";
  try {
    const hostname = nodes.get(coordinator)?.bestIp ?? readVariable(variable);
    return hostname === undefined ? undefined : { hostname: parseHost(hostname), port };
  } catch (error) {
    throw new HostsConfigError("environment", [{ path: variable, message: invalidText(error) }]);
  }
}

// --- Selection and folding of names ---

/** Which nodes {@linkcode selectNodes} keeps. What is unset does not restrict. */
export interface NodeSelection {
  /** Exact names, else comma lists of globs (`gpu-*`) and ranges (`gpu-[1-8]`, `gpu-[01-16,20]`, `n[0-14/2]`). */
  readonly names?: readonly string[] | undefined;
  /** The same, for the nodes to leave out. */
  readonly exclude?: readonly string[] | undefined;
  /** Roles, whole, in any case. */
  readonly roles?: readonly string[] | undefined;
  /** Statuses, whole, in any case. An inactive one that is named here is included. */
  readonly statuses?: readonly string[] | undefined;
  /** Parts of GPU names, in any case: `h100` finds `GH100` too. */
  readonly gpus?: readonly string[] | undefined;
  /** Keys of the host and the values that they may have, compared as text; every key has to fit. */
  readonly where?: Readonly<Record<string, string | readonly string[]>> | undefined;
  /** Whether nodes that are not active are kept. One that `names` names exactly always is. @default {false} */
  readonly includeInactive?: boolean | undefined;
}

/**
 * The nodes that a selection keeps, in their own order; without one, the active ones. In a range, zero padding is
 * significant: `[08-12]` is 08, 09, 10. A bracket beside a wildcard is a whole number: `*[1-3]` does not take `gpu-11`.
 * @example A range, a role
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 * const nodes = [1, 2, 3].map((number) => new ClusterNode({ name: `gpu-${number}`, role: "worker" }));
 * const selected = selectNodes(nodes, { names: ["gpu-[2-3]"], roles: ["worker"] });
 * assertEquals(selected.map((node) => node.name), ["gpu-2", "gpu-3"]);
 * ```
 * @throws {RangeError} if a pattern matches no node, or cannot be read
 */
export function selectNodes(nodes: Iterable<ClusterNode>, selection: NodeSelection = {}): ClusterNode[] {
  const { names, exclude, roles, statuses, gpus, where = {}, includeInactive = false } = selection;
  const all = [...nodes];
  const named = names && matchNames(all, names);
  const excluded = exclude && matchNames(all, exclude).matched;
  const has = (words: readonly string[], text: string) => words.some((it) => it.toLowerCase() === text.toLowerCase());
  const wanted = Object.entries(where).map(([key, value]) => ({ key, values: [value].flat().map(String) }));
  return all.filter((node) =>
    (!named || named.matched.has(node)) && !excluded?.has(node) &&
    (!roles || has(roles, node.role)) && (!statuses || has(statuses, node.status)) &&
    (!gpus || gpus.some((part) => node.gpu.toLowerCase().includes(part.toLowerCase()))) &&
    wanted.every(({ key, values }) => valuesOf(node, key).some((value) => values.includes(String(value)))) &&
    (includeInactive || node.isActive || named?.exact.has(node) || statuses !== undefined)
  );
}

/** What a host has under a key, its own or a known one: several values, if it is a list. */
function valuesOf(node: ClusterNode, key: string): unknown[] {
  const own = Object.hasOwn(node.entry, key) ? node.entry[key] : undefined;
  const field = HOST_ROWS.find((row) => row.key === key)?.name as keyof ClusterNode | undefined;
  return [isUnset(own) && field ? node[field] : own].flat().filter((value) => !isUnset(value));
}

function matchNames(nodes: readonly ClusterNode[], patterns: readonly string[]) {
  const byName = new Map(nodes.map((node) => [node.name, node]));
  const [matched, exact] = [new Set<ClusterNode>(), new Set<ClusterNode>()];
  const unmatched: string[] = [];
  for (const element of patterns.flatMap((pattern) => byName.has(pattern) ? pattern : splitList(pattern))) {
    const node = byName.get(element);
    if (node) exact.add(node);
    const matches = compilePattern(node ? "*" : element);
    const found = node ? [node] : nodes.filter(({ name }) => matches(name));
    if (found.length === 0) unmatched.push(element);
    for (const each of found) matched.add(each);
  }
  if (unmatched.length === 0) return { matched, exact };
  const list = unmatched.map((element) => {
    const meant = didYouMean(element, byName.keys());
    return JSON.stringify(element) + (meant ? ` (did you mean ${JSON.stringify(meant)}?)` : "");
  });
  throw new RangeError(`No node matches ${list.join(", ")}`);
}

/** The elements of a comma list. A comma in brackets separates ranges, not names. */
function splitList(list: string): string[] {
  const elements = list.split(/,(?![^[\]]*\])/).map((element) => element.trim()).filter((element) => element !== "");
  return elements.length > 0 ? elements : [list];
}

/** Where the text ends that a part of a pattern fits from `at` on: nowhere, or at one place or more. */
type PatternPart = (name: string, at: number) => readonly number[];

/** Whether a name fits a glob with ranges. Exported for the tests. */
export function compilePattern(pattern: string): (name: string) => boolean {
  const tokens = pattern.match(/\[[^\]]*\]?|\*+|\?|[^[*?]+/gs) ?? [];
  const isWildcard = (token = "") => /^[*?]/.test(token);
  const parts = tokens.map((token, index): PatternPart => {
    try {
      const isBracket = token.startsWith("[");
      if (isBracket !== token.includes("]")) invalid(isBracket ? '"[" without "]"' : '"]" without "["');
      if (!isBracket) return textPart(token);
      return numberPart(token.slice(1, -1), isWildcard(tokens[index - 1]), isWildcard(tokens[index + 1]));
    } catch (error) {
      const at = tokens.slice(0, index).join("").length + Math.max(0, token.search(/^\[|\]/)) + 1;
      const reason = `${invalidText(error)} at character ${at}, as in gpu-[1-8,12]`;
      throw new RangeError(`Cannot read ${JSON.stringify(pattern)}: ${reason}`);
    }
  });
  return (name) => {
    let ends: readonly number[] = [0];
    for (const part of parts) {
      ends = ends.length === 1 ? part(name, ends[0]!) : [...new Set(ends.flatMap((at) => part(name, at)))];
    }
    return ends.includes(name.length);
  };
}

function textPart(text: string): PatternPart {
  if (text === "?") return (name, at) => at < name.length ? [at + (name.codePointAt(at)! > 0xffff ? 2 : 1)] : [];
  if (!text.startsWith("*")) return (name, at) => name.startsWith(text, at) ? [at + text.length] : [];
  return (name, at) => Array.from({ length: name.length - at + 1 }, (_, length) => at + length);
}

/** Numbers, which must be whole if a wildcard is beside them. */
function numberPart(list: string, isWholeBefore: boolean, isWholeBehind: boolean): PatternPart {
  const ranges = list.split(",").map(parseRange);
  const isDigit = (name: string, at: number) => name[at]! >= "0" && name[at]! <= "9";
  return (name, at) => {
    const ends: number[] = [];
    if (isWholeBefore && isDigit(name, at - 1)) return ends;
    for (let end = at + 1; isDigit(name, end - 1); end++) {
      const digits = name.slice(at, end);
      if (!(isWholeBehind && isDigit(name, end)) && ranges.some((has) => has(digits))) ends.push(end);
    }
    return ends;
  };
}

/** The test whether a number is in a range, as in Slurm: [08-12] is 08, 09, 10 …, [8-12] is 8, 9, 10 …. */
function parseRange(text: string): (digits: string) => boolean {
  const [, from = "", to = from, by = "1"] = /^\s*(\d+)(?:\s*-\s*(\d+)(?:\s*\/\s*(\d+))?)?\s*$/.exec(text) ?? [];
  const [first, last, step] = [Number(from), Number(to), Number(by)];
  const width = /^0\d/.test(from) ? from.length : 1;
  // [1-044] is neither.
  const isMixed = to.length < width || (/^0\d/.test(to) && to.length !== width);
  if (from === "" || isMixed || first > last || step < 1) invalid("expected numbers and ranges in the brackets");
  return (digits) => {
    const number = Number(digits);
    const isInRange = number >= first && number <= last && (number - first) % step === 0;
    return isInRange && (digits.length === width || (digits.length > width && digits[0] !== "0"));
  };
}

/** Names as one list, which a name pattern takes back whole: `n[1-3].dc1,head`. Widths are never mixed. */
export function foldNames(names: Iterable<string>): string {
  const candidates = Array.from(new Set(names), foldCandidates);
  const rivals = Map.groupBy(candidates.flat(), ({ key }) => key);
  // The largest group; among equals the first candidate.
  const larger = (a: FoldCandidate, b: FoldCandidate) => rivals.get(b.key)!.length > rivals.get(a.key)!.length ? b : a;
  const groups = Map.groupBy(candidates.map((each) => each.reduce(larger)), ({ key }) => key);
  return Array.from(groups.values(), (group) => {
    const { before, digits, behind } = group[0]!;
    const numbers = group.length < 2 ? digits : `[${foldNumbers(group.map(({ digits }) => digits))}]`;
    return before + numbers + behind;
  }).join(",");
}

type FoldCandidate = ReturnType<typeof foldCandidates>[number];

/** A name around each number that could be the one that varies, last number first, then the whole name. */
function foldCandidates(name: string) {
  // In a range, these characters would mean something else.
  const numbers = /[[\],*?]/.test(name) ? [] : [...name.matchAll(/(?<!\d)\d{1,15}(?!\d)/g)];
  const candidates = numbers.reverse().flatMap(({ 0: digits, index }) => {
    const [before, behind] = [name.slice(0, index), name.slice(index + digits.length)];
    // 10 may stand among 8 and 9, or among 08 and 09; 08 among the latter alone.
    const widths = /^0\d/.test(digits) ? [digits.length] : [0, digits.length];
    return widths.map((width) => ({ key: JSON.stringify([before, behind, width]), before, digits, behind }));
  });
  return [...candidates, { key: JSON.stringify(name), before: name, digits: "", behind: "" }];
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

// --- Endpoints ---

/** One place where a node may be reached: a host without brackets, and the base path of its server. */
export type Endpoint = {
  readonly protocol: "http" | "https" | "ssh";
  readonly host: string;
  readonly port: number;
  readonly path: string;
};

/** A node's data endpoints: each address at `port`, if given, else `dataServerUrl`, else `dataServerPort`. */
export function dataEndpoints(node: ClusterNode, port?: number): Endpoint[] {
  const { addresses, dataServerPort, dataServerUrl } = node;
  if (port !== undefined || dataServerUrl === undefined) {
    return addresses.map((host) => ({ protocol: "http", host, port: port ?? dataServerPort, path: "" }));
  }
  const { protocol, hostname, port: written, pathname } = new URL(dataServerUrl);
  return [{
    protocol: protocol === "https:" ? "https" : "http",
    host: withoutBrackets(hostname),
    port: Number(written) || DEFAULT_PORTS[protocol]!,
    path: pathname.replace(/\/$/, ""),
  }];
}

/** The endpoints of a node's sshd, best first. Another port than 22 is mostly that of a proxy before `sshHost`. */
export function sshEndpoints({ addresses, sshPort }: ClusterNode): Endpoint[] {
  const [first, second] = addresses;
  const at = (host: string, port: number): Endpoint => ({ protocol: "ssh", host, port, path: "" });
  if (first === undefined || second === undefined) return addresses.map((host) => at(host, sshPort));
  return sshPort === 22 ? [at(first, 22), at(second, 22)] : [at(second, sshPort), at(first, sshPort), at(first, 22)];
}

/** The URL of a path at an endpoint, without the protocol's own port: `http://100.64.0.1:8766/status`. */
export function endpointUrl({ protocol, host, port, path: base }: Endpoint, path = ""): string {
  const authority = hostPort(host, port);
  const isDefault = DEFAULT_PORTS[`${protocol}:`] === port;
  return `${protocol}://${isDefault ? authority.replace(/:\d+$/, "") : authority}${base}${path}`;
}

/** `host:port`, an IPv6 address in brackets. */
export function hostPort(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** The path that a check asks for: the one given, else `statusPath` at the port of the data server, else `/status`. */
export function statusPath(node: ClusterNode, { port, path }: Pick<ProbeOptions, "port" | "path"> = {}): string {
  const isDataServer = port === undefined || port === (dataEndpoints(node)[0]?.port ?? node.dataServerPort);
  return path ?? (isDataServer ? node.statusPath : "/status");
}

// --- Permissions ---

/** Deno's flag that lets endpoints be contacted: `--allow-net=a:1,b:2`; without a list, if that would not fit. */
export function netFlag(endpoints: Iterable<Endpoint>): string {
  const list = [...new Set(Array.from(endpoints, ({ host, port }) => hostPort(host, port)))].join(",");
  // Linux refuses a single argument of 128 KiB.
  return list.length > 100_000 ? "--allow-net" : `--allow-net=${list}`;
}

/** The flag with which the checks that were denied can be done, or `undefined` if none was. */
export function missingNetFlag(probes: Iterable<NodeProbe>): string | undefined {
  const missing = [...probes].filter(({ failure }) => failure?.code === "denied").flatMap(({ endpoints }) => endpoints);
  // Past this, nobody reads or types the list; the command line's `permissions` prints it.
  return missing.length === 0 ? undefined : missing.length > 64 ? "--allow-net" : netFlag(missing);
}

function throwIfDenied(probes: Iterable<NodeProbe>): void {
  const flag = missingNetFlag(probes);
  if (flag) throw denied("net access", flag);
}

function requireNet(host: string, port: number): void {
  if (!isNetGranted(host, port)) throw denied("net access", `--allow-net=${hostPort(host, port)}`);
}

function isNetGranted(host: string, port: number): boolean {
  try {
    return Deno.permissions.querySync({ name: "net", host: hostPort(host, port) }).state === "granted";
  } catch {
    // Not a host that Deno can parse: let the connection say so.
    return true;
  }
}

// --- One probe ---

/** A JSON object that a node answered. What RingRift's servers send is typed; only that it is an object is checked. */
export type StatusDocument = {
  readonly version?: string;
  readonly game_count?: number;
  readonly [key: string]: unknown;
};

/** `up`; `unhealthy`: accepted, but gave no usable answer; `down`: none accepted; `unknown`: could not be checked. */
export type NodeState = "up" | "unhealthy" | "down" | "unknown";

/** Why a node is not up. `denied` and `local-resource` are faults of this side: the node's state is `unknown`. */
// deno-fmt-ignore: one code a line would be twelve lines.
export type FailureCode =
  | "timeout" | "refused" | "unreachable" | "dns" | "no-address" | "http-status" | "redirect" | "bad-response"
  | "too-large" | "denied" | "local-resource" | "other";

/** Why a node is not up, for programs, and for people; escape the message, which may hold text from the node. */
export type ProbeFailure = { readonly code: FailureCode; readonly message: string };

/** The outcome of one check of one node. What there was not is `undefined`. */
export type NodeProbe = {
  readonly node: ClusterNode;
  readonly state: NodeState;
  /** The host of the endpoint that accepted, as configured. */
  readonly address: string | undefined;
  /** The port that was checked. */
  readonly port: number;
  /** Milliseconds until that endpoint accepted. */
  readonly connectMs: number | undefined;
  /** Milliseconds until the answer was whole; none with `check: "tcp"`. */
  readonly responseMs: number | undefined;
  /** The JSON object that the node answered. */
  readonly status: StatusDocument | undefined;
  readonly failure: ProbeFailure | undefined;
  /** The endpoint that the outcome is about, and every one that the check may contact. */
  readonly endpoint: Endpoint | undefined;
  readonly endpoints: readonly Endpoint[];
};

/** Options of {@linkcode probeNode}. */
export interface ProbeOptions {
  /** The port to check, at each address. @default {node.dataServerPort} */
  readonly port?: number | undefined;
  /** The path to ask for; see {@linkcode statusPath}. @default {node.statusPath} */
  readonly path?: string | undefined;
  /** Whether a node has to answer over HTTP, or to accept a TCP connection alone. @default {"http"} */
  readonly check?: "http" | "tcp" | undefined;
  /** One deadline for all that is done for a node, in milliseconds. @default {5000} */
  readonly timeoutMs?: number | undefined;
  /** Aborts the whole call, which then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

type ProbeSettings = ReturnType<typeof probeSettings>;

/** What only this module asks of a pool: ssh servers to greet, an end at a `performance.now()`, to go on for ever. */
type PoolMode = { readonly isSsh?: boolean; readonly endMs?: number; readonly isEndless?: boolean };

function probeSettings({ port, path, check, signal, ...options }: SweepOptions, mode: PoolMode) {
  const { timeoutMs = DEFAULTS.timeoutMs, concurrency = DEFAULTS.concurrency } = options;
  const fault = unsupportedDeno();
  if (fault) throw new Error(fault);
  if (port !== undefined) requireValid("port", port, parsePort);
  if (path !== undefined) requireValid("path", path, parsePath);
  if (![undefined, "http", "tcp"].includes(check)) {
    throw new TypeError(`Cannot use check "${check}": expected "http" or "tcp"`);
  }
  requireDuration("timeoutMs", timeoutMs);
  requireCount("concurrency", concurrency, 1);
  // If every host may be connected to, thousands need no query of their own.
  const isNetOpen = Deno.permissions.querySync({ name: "net" }).state === "granted";
  return { port, path, check, timeoutMs, concurrency, signal, isNetOpen, endMs: Infinity, ...mode };
}

function requireValid<T>(name: string, value: T, parseValue: (value: unknown) => T): void {
  try {
    const parsed = parseValue(value);
    if (parsed !== value) invalid(`expected a ${typeof parsed} without blanks or brackets`);
  } catch (error) {
    const message = `Cannot use ${name} ${JSON.stringify(value)}: ${invalidText(error).replace(/, got .*/, "")}`;
    throw typeof value === "number" ? new RangeError(message) : new TypeError(message);
  }
}

function requireDuration(name: string, ms: number): void {
  // A longer delay overflows the timer, which then fires at once.
  if (ms > 0 && ms < 2 ** 31) return;
  throw new RangeError(`Cannot use ${name} ${ms}: expected milliseconds above 0 and below 2 ** 31`);
}

function requireCount(name: string, count: number, least: number, most = 2 ** 31): void {
  if (Number.isInteger(count) && count >= least && count <= most) return;
  throw new RangeError(`Cannot use ${name} ${count}: expected an integer from ${least} to ${most}`);
}

const STATE_RANK: Readonly<Record<NodeState, number>> = { up: 3, unhealthy: 2, unknown: 1, down: 0 };

/** Checks one node, until `controller` is aborted: at its deadline, with a `TimeoutError`. */
async function probeOne(node: ClusterNode, settings: ProbeSettings, controller: AbortController): Promise<NodeProbe> {
  const unchecked = uncheckedProbe(node, settings.port, settings.isSsh);
  const check = (endpoint: Endpoint) => probeEndpoint(unchecked, endpoint, settings, controller);
  if (unchecked.endpoints.length === 1) return await check(unchecked.endpoints[0]!);
  const outcomes = await raceEndpoints(unchecked.endpoints, check, controller.signal);
  const [best = unchecked] = outcomes.toSorted((a, b) => STATE_RANK[b.state] - STATE_RANK[a.state]);
  const isOneReason = outcomes.every(({ failure }) => failure?.message === best.failure?.message);
  if (best.connectMs !== undefined || isOneReason) return best;
  const messages = outcomes.map((it) => `${hostPort(it.endpoint!.host, it.port)}: ${it.failure!.message}`);
  return { ...best, failure: { code: best.failure!.code, message: messages.join("; ") } };
}

/** What there is to say of a node that was not checked, for want of an address. */
function uncheckedProbe(node: ClusterNode, wanted: number | undefined, isSsh = false): NodeProbe {
  const endpoints = isSsh ? sshEndpoints(node) : dataEndpoints(node, wanted);
  const port = endpoints[0]?.port ?? wanted ?? node.dataServerPort;
  const failure = { code: "no-address", message: "set tailscale_ip or ssh_host" } as const;
  const nothing = { address: undefined, connectMs: undefined, responseMs: undefined, status: undefined };
  return { node, state: "down", ...nothing, port, failure, endpoint: endpoints[0], endpoints };
}

/** `250 ms`, `1.5 s`, `60 s`. */
function formatMs(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${Number((ms / 1000).toFixed(2))} s`;
}

/** Tries endpoints best first, the next one at a failure or after a moment, until the signal aborts. */
async function raceEndpoints<T>(endpoints: readonly Endpoint[], check: (it: Endpoint) => Promise<T>, end: AbortSignal) {
  const checks: Promise<T>[] = [];
  for (const endpoint of endpoints) {
    if (end.aborted) break;
    checks.push(check(endpoint));
    await settledOrAfter(checks.at(-1)!, FALLBACK_DELAY_MS);
  }
  return await Promise.all(checks);
}

async function settledOrAfter(promise: Promise<unknown>, ms: number): Promise<void> {
  const { promise: late, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  await Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

async function probeEndpoint(unchecked: NodeProbe, endpoint: Endpoint, settings: ProbeSettings, race: AbortController) {
  const { signal } = race;
  const { host, port } = endpoint;
  const path = statusPath(unchecked.node, settings);
  const started = performance.now();
  type Writable<T> = { -readonly [K in keyof T]: T[K] };
  const probe: Writable<NodeProbe> = unchecked.endpoints.length > 1 ? { ...unchecked, endpoint, port } : unchecked;
  try {
    if (!settings.isNetOpen) requireNet(host, port);
    // A name is connected to as such: Deno races its addresses, and the permission is the one for the name.
    if (!isAddress(host)) await lookUp(host, port, signal);
    const conn = await Deno.connect({ hostname: host, port, signal });
    probe.address = host;
    probe.connectMs = performance.now() - started;
    if (settings.check === "tcp") conn.close();
    else {
      probe.status = await requestStatus(conn, endpoint, path, signal);
      probe.responseMs = performance.now() - started;
    }
    probe.state = "up";
    probe.failure = undefined;
    if (unchecked.endpoints.length > 1) race.abort();
  } catch (error) {
    const fault = signal.aborted && !(error instanceof ProbeFault) ? signal.reason : error;
    probe.failure = probeFailure(fault, probe.address && endpoint.path + path);
    const isLocal = probe.failure.code === "denied" || probe.failure.code === "local-resource";
    probe.state = probe.address ? "unhealthy" : isLocal ? "unknown" : "down";
  }
  return probe;
}

function isAddress(host: string): boolean {
  return host.includes(":") || /^\d+\.\d+\.\d+\.\d+$/.test(host);
}

let lookupsRunning = 0;
const lookupsWaiting = new Set<() => void>();

/** Waits for a name's lookup, which occupies a thread, and so its slot, until it ends, even after the deadline. */
async function lookUp(name: string, port: number, signal: AbortSignal): Promise<void> {
  // Loaded for names alone: it doubles the time that a program takes to start.
  const { lookup } = await import("node:dns");
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const start = () => {
    lookupsRunning++;
    // Deno checks the net permission of exactly this port, if it is given.
    lookup(name, { all: true, port } as { all: true }, (error) => {
      lookupsRunning--;
      const [next] = lookupsWaiting;
      lookupsWaiting.delete(next!);
      next?.();
      if (error) reject(new ProbeFault("dns", "the name does not resolve"));
      else resolve();
    });
  };
  const abort = () => {
    const isLate = !lookupsWaiting.delete(start);
    if (isLate) reject(new ProbeFault("timeout", "the name lookup did not end in time"));
    else reject(new ProbeFault("local-resource", `its lookup had no turn: ${MAX_LOOKUPS} other names hang`));
  };
  if (lookupsRunning < MAX_LOOKUPS) start();
  else lookupsWaiting.add(start);
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();
  await promise;
}

class ProbeFault extends Error {
  constructor(readonly code: FailureCode, message: string) {
    super(message);
  }
}

const NO_DESCRIPTORS = "this machine ran out of descriptors";

const CONNECT_FAILURES: readonly (readonly [FailureCode, string, ...string[]])[] = [
  ["refused", "nothing listens on the port", "ECONNREFUSED"],
  ["unreachable", "no route to the host", "ENETUNREACH", "EHOSTUNREACH"],
  ["unreachable", "blocked by a route or a firewall of this machine", "EACCES", "EPERM", "EINVAL"],
  ["timeout", "the system gave up connecting", "ETIMEDOUT"],
  ["local-resource", NO_DESCRIPTORS, "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"],
  ["local-resource", "this machine has no local address or port left for it", "EADDRNOTAVAIL"],
];

/** What a fault means: of the connection, or of the answer, if there is a path; the usual path is not named. */
function probeFailure(error: unknown, path?: string): ProbeFailure {
  const text = errorText(error);
  const at = path === undefined || path === "/status" ? "" : ` at ${path}`;
  if (error instanceof ProbeFault) return { code: error.code, message: text + at };
  if (error instanceof DOMException && error.name === "TimeoutError") {
    const what = path === undefined ? "no connection" : "accepted, but no answer";
    return { code: "timeout", message: `${what} within ${text}${at}` };
  }
  const answer = tlsFault(error) ?? `the connection broke (${text})`;
  if (path !== undefined) return { code: "bad-response", message: answer + at };
  if (error instanceof Deno.errors.NotCapable) return { code: "denied", message: text };
  const known = CONNECT_FAILURES.find(([, , ...codes]) => codes.includes((error as { code: string }).code));
  if (known) return { code: known[0], message: known[1] };
  const isLookup = /failed to lookup address/.test(text);
  return isLookup ? { code: "dns", message: "the name does not resolve" } : { code: "other", message: text };
}

// --- The HTTP answer ---

/** One GET, or a greeting. `fetch` would obey the environment's proxies; `node:http` takes twice the time. */
async function requestStatus(tcp: Deno.TcpConn, endpoint: Endpoint, path: string, signal: AbortSignal) {
  const { protocol, host, port, path: base } = endpoint;
  let conn: Deno.Conn = tcp;
  // What is closed already, or was taken over by a TLS handshake, may be disposed of again.
  const close = () => conn[Symbol.dispose]();
  // Closing the connection is what ends a read that never returns.
  signal.addEventListener("abort", close);
  try {
    if (protocol === "https") conn = await Deno.startTls(tcp, { hostname: host });
    signal.throwIfAborted();
    const request = new TextEncoder().encode(
      `GET ${base}${path} HTTP/1.1\r\nHost: ${hostPort(host, port)}\r\nAccept: application/json\r\n` +
        "Accept-Encoding: identity\r\nUser-Agent: cluster-hosts\r\nConnection: close\r\n\r\n",
    );
    const reader = new ResponseReader(conn);
    for (let lines = 0; protocol === "ssh"; lines++) {
      // An ssh server greets first, perhaps after other lines.
      if (lines === 100) throw badResponse("the answer is not that of an ssh server");
      if ((await reader.line(MAX_HEAD_BYTES)).startsWith("SSH-")) return undefined;
    }
    for (let sent = 0; sent < request.length;) sent += await conn.write(request.subarray(sent));
    return await readAnswer(reader, path === "/status");
  } finally {
    close();
  }
}

/** Reads an answer. A status page has to be a JSON object; at any other path, a whole answer is enough. */
async function readAnswer(reader: ResponseReader, isStatusPage: boolean): Promise<StatusDocument | undefined> {
  const { status, headers } = await readHead(reader);
  if (status >= 300 && status < 400) {
    const location = headers.get("location");
    throw new ProbeFault("redirect", `HTTP ${status}${location ? `, to ${location.slice(0, 200)}` : ""}`);
  }
  if (status < 200 || status >= 300) throw new ProbeFault("http-status", `HTTP ${status}`);
  const isEmpty = status === 204 || status === 205;
  if (isStatusPage && isEmpty) throw badResponse(`HTTP ${status}, without a body`);
  const encoding = headers.get("content-encoding")?.toLowerCase() ?? "identity";
  if (isStatusPage && encoding !== "identity") throw badResponse("the answer is compressed, which was not asked for");
  const body = isEmpty ? new Uint8Array() : await readBody(reader, headers);
  try {
    return parseStatus(body);
  } catch (error) {
    if (isStatusPage) throw error;
  }
}

function badResponse(message: string): ProbeFault {
  return new ProbeFault("bad-response", message);
}

function tooLarge(what: string, maxBytes: number): ProbeFault {
  return new ProbeFault("too-large", `${what} is larger than ${maxBytes} bytes`);
}

type Bytes = Uint8Array<ArrayBuffer>;

const LATIN1 = new TextDecoder("latin1");

/** Reads an answer piece by piece, never more than it may have. Exported for the tests. */
export class ResponseReader {
  /** What was read and not taken yet. The rest of its buffer is free. */
  pending: Bytes = new Uint8Array(2048).subarray(0, 0);

  constructor(readonly conn: Pick<Deno.Conn, "read">) {}

  /** Reads once; `false` at the end of the stream. */
  async fill(): Promise<boolean> {
    const { pending } = this;
    if (pending.byteOffset + pending.length === pending.buffer.byteLength) {
      const larger = new Uint8Array(Math.max(pending.buffer.byteLength, 2 * pending.length));
      larger.set(pending);
      this.pending = larger.subarray(0, pending.length);
    }
    const { buffer, byteOffset, length } = this.pending;
    const count = await this.conn.read(new Uint8Array(buffer, byteOffset + length));
    this.pending = new Uint8Array(buffer, byteOffset, length + (count ?? 0));
    return count !== null;
  }

  /** Takes `length` bytes, which are valid until the next read. */
  async take(length: number): Promise<Bytes> {
    while (this.pending.length < length) await this.#fillOrFail();
    return this.#cut(length);
  }

  #cut(length: number): Bytes {
    const taken = this.pending.subarray(0, length);
    this.pending = this.pending.subarray(length);
    return taken;
  }

  async #fillOrFail(): Promise<void> {
    if (!await this.fill()) throw badResponse("the answer ended before it was complete");
  }

  /** Takes a line of at most `maxBytes`, without its end. */
  async line(maxBytes: number, tooLong = () => tooLarge("the head of the answer", MAX_HEAD_BYTES)): Promise<string> {
    for (let searched = 0;; await this.#fillOrFail()) {
      const at = this.pending.indexOf(10, searched);
      searched = this.pending.length;
      if (at > maxBytes || (at < 0 && searched > maxBytes)) throw tooLong();
      if (at >= 0) return LATIN1.decode(this.#cut(at + 1)).trimEnd();
    }
  }

  async rest(): Promise<Bytes> {
    while (await this.fill()) if (this.pending.length > MAX_BODY_BYTES) throw tooLarge("the answer", MAX_BODY_BYTES);
    return await this.take(this.pending.length);
  }
}

/** Reads the head that counts: answers 1xx may come before it, and share its limit. Exported for the tests. */
export async function readHead(reader: ResponseReader): Promise<{ status: number; headers: Map<string, string> }> {
  for (let budget = MAX_HEAD_BYTES;;) {
    for (let start; (start = LATIN1.decode(reader.pending.subarray(0, 5))) !== "HTTP/";) {
      // What is not HTTP is refused at its first byte that differs, however few come.
      if (!"HTTP/".startsWith(start)) throw badResponse("the answer is not HTTP");
      if (!await reader.fill()) throw badResponse("the connection was closed without an answer");
    }
    const start = await reader.line(budget);
    budget -= start.length;
    const status = Number(/^HTTP\/1\.\d (\d{3})(?:\s|$)/.exec(start)?.[1]);
    if (!status) throw badResponse("the answer is not HTTP/1");
    const headers = new Map<string, string>();
    for (let line; (line = await reader.line(budget)) !== ""; budget -= line.length + 2) {
      const colon = line.indexOf(":");
      if (colon <= 0) continue;
      const [name, value] = [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()];
      const isOther = name === "content-length" && (headers.get(name) ?? value) !== value;
      if (isOther) throw badResponse("two Content-Length that differ");
      headers.set(name, value);
    }
    if (status >= 200) return { status, headers };
  }
}

/** Reads a body whose end its headers tell, or else the end of the stream. Exported for the tests. */
export async function readBody(reader: ResponseReader, headers: ReadonlyMap<string, string>): Promise<Bytes> {
  const transfer = headers.get("transfer-encoding")?.toLowerCase() ?? "identity";
  if (transfer === "chunked") return await readChunks(reader);
  if (transfer !== "identity") throw badResponse("an unknown transfer encoding");
  const length = headers.get("content-length");
  if (length === undefined) return await reader.rest();
  if (!/^\d+$/.test(length)) throw badResponse("invalid Content-Length");
  if (Number(length) > MAX_BODY_BYTES) throw tooLarge("the answer", MAX_BODY_BYTES);
  return await reader.take(Number(length));
}

/** Reads a body that comes in chunks. Exported for the tests. */
export async function readChunks(reader: ResponseReader): Promise<Bytes> {
  const chunks: Bytes[] = [];
  const noSize = () => badResponse("a chunk without a size, or longer than it");
  for (let total = 0;;) {
    const [, digits = ""] = /^([0-9a-f]{1,8})\s*(?:;.*)?$/i.exec(await reader.line(1024, noSize)) ?? [];
    const size = parseInt(digits, 16);
    if (Number.isNaN(size)) throw noSize();
    total += size;
    if (total > MAX_BODY_BYTES) throw tooLarge("the answer", MAX_BODY_BYTES);
    if (size === 0) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(await reader.take(size));
    if (await reader.line(2, noSize) !== "") throw noSize();
  }
}

function parseStatus(body: Bytes): StatusDocument {
  let document: unknown;
  try {
    document = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(body));
  } catch {
    throw badResponse("the answer is not JSON");
  }
  if (!isMapping(document)) throw badResponse(`the answer is JSON, but ${typeName(document)}, not an object`);
  // What JSON.parse takes can be too deep to be written again.
  if (treeSize(document) === Infinity) throw badResponse("the answer is nested too deeply");
  return document;
}

// --- Many probes ---

/** Options of {@linkcode probeNodes}. */
export interface SweepOptions extends ProbeOptions {
  /** How many nodes may be under way at once; started in a ramp, fewer if descriptors run out. @default {10000} */
  readonly concurrency?: number | undefined;
  /** Called with each outcome as soon as it is known. What it throws rejects the call. */
  readonly onProbe?: ((probe: NodeProbe) => void) | undefined;
}

type OnOutcome = (probe: NodeProbe, index: number) => void;

/** Probes nodes: a few at a time while answers are fast, else as many as descriptors allow. */
class ProbePool {
  isOver = false;
  onOutcome: OnOutcome;
  readonly #settings: ProbeSettings;
  readonly #done = Promise.withResolvers<void>();
  /** What is under way, the oldest first, and when it began. */
  readonly #running = new Map<AbortController, number>();
  /** When nodes are probed again, by index. */
  readonly #dueMs = new Map<number, number>();
  /** The indexes of the nodes; those from `#next` on have yet to be probed. */
  readonly #queue: number[];
  #next = 0;
  /** How many nodes may be under way now. */
  #limit: number;
  readonly #lookedUp = new Set<number>();
  #endedLately = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(readonly nodes: readonly ClusterNode[], options: SweepOptions, mode: PoolMode, onOutcome: OnOutcome) {
    this.onOutcome = onOutcome;
    this.#settings = probeSettings(options, mode);
    this.#limit = Math.min(INITIAL_CONCURRENCY, this.#settings.concurrency);
    this.#queue = [...nodes.keys()];
  }

  /** Probes each node once, and again what is due, until nothing is left; rejects when the signal aborts. */
  async run(): Promise<void> {
    const { signal } = this.#settings;
    signal?.throwIfAborted();
    // One listener and one timer for the whole call: one of each for a node would take longer than to connect.
    const abort = () => this.#done.reject(signal?.reason);
    signal?.addEventListener("abort", abort);
    // Has Deno open its sockets for signals: it would half a second later, and panic if a sweep has every descriptor.
    const changes = Deno.build.os === "windows" ? [] : [Deno.addSignalListener, Deno.removeSignalListener];
    for (const change of changes) change("SIGWINCH", abort);
    this.#tick();
    await this.#done.promise.finally(() => {
      clearTimeout(this.#timer);
      signal?.removeEventListener("abort", abort);
      this.finish();
      for (const controller of this.#running.keys()) controller.abort();
    });
  }

  /** Probes a node again, at a time of `performance.now()`. */
  add(index: number, dueMs: number): void {
    this.#dueMs.set(index, dueMs);
    if (!this.isOver) this.#timer ??= setTimeout(() => this.#tick(), TICK_MS);
  }

  /** Ends {@linkcode run}: nothing more is started or reported. */
  finish(): void {
    this.isOver = true;
    this.onOutcome = () => {};
    this.#done.resolve();
  }

  #tick(): void {
    const { timeoutMs, concurrency, endMs } = this.#settings;
    const nowMs = performance.now();
    for (const [controller, startMs] of this.#running) {
      const mostMs = Math.min(timeoutMs, endMs - startMs);
      if (nowMs - startMs < mostMs) break;
      controller.abort(new DOMException(formatMs(mostMs), "TimeoutError"));
    }
    let nextMs = endMs;
    for (const [index, dueMs] of this.#dueMs) {
      if (dueMs > nowMs) nextMs = Math.min(nextMs, dueMs);
      else if (this.#dueMs.delete(index)) this.#queue.push(index);
    }
    // If as many have ended as a sweep starts with, more of them at once would only be slower.
    const isSlow = this.#endedLately < INITIAL_CONCURRENCY && this.#running.size >= this.#limit;
    if (isSlow) this.#limit = Math.min(concurrency, this.#limit + Math.min(this.#limit, MAX_GROWTH));
    this.#endedLately = 0;
    // What the end cuts off is reported yet.
    if (nowMs >= endMs) this.isOver = true;
    this.#pump();
    // Between its rounds, a watch is idle.
    const delayMs = this.#running.size > 0 ? TICK_MS : nextMs - nowMs;
    this.#timer = delayMs < Infinity ? setTimeout(() => this.#tick(), delayMs) : undefined;
  }

  #pump(): void {
    while (!this.isOver && this.#next < this.#queue.length && this.#running.size < this.#limit) {
      this.#probe(this.#queue[this.#next++]!).catch(this.#done.reject);
    }
    // What was started is forgotten, or a watch would fill the queue without end.
    if (this.#next === this.#queue.length) this.#next = this.#queue.length = 0;
    const isDone = this.#dueMs.size === 0 && !this.#settings.isEndless;
    if (this.#running.size === 0 && (isDone || this.isOver)) this.finish();
  }

  async #probe(index: number): Promise<void> {
    const controller = new AbortController();
    this.#running.set(controller, performance.now());
    const probe = await probeOne(this.nodes[index]!, this.#settings, controller);
    this.#running.delete(controller);
    this.#endedLately++;
    // The system does not say that a lookup failed for want of a descriptor: it gets a second one.
    const isSecond = this.#lookedUp.has(index) || probe.failure?.code !== "dns";
    const isShort = !isSecond || probe.failure?.message.includes(NO_DESCRIPTORS);
    if (isShort && this.#running.size > 0 && !this.isOver) {
      // Another node will give its descriptor back; then this one begins anew, with the whole of its time.
      if (isSecond) this.#limit = this.#settings.concurrency = this.#running.size;
      this.#lookedUp.add(index);
      this.#queue.push(index);
      return;
    }
    this.onOutcome(probe, index);
    this.#pump();
  }
}

/**
 * Checks many nodes in parallel and gives one outcome for each, in their order: it takes as long as the slowest answer.
 * A node's endpoints are raced best first within its deadline, so that one that is dead never hides one that is alive.
 *
 * There are no retries: TCP repeats a lost packet itself, after 1 and 3 seconds, for which the default deadline leaves
 * time. If descriptors run out, fewer nodes are under way, and each still has the whole of its time. A request goes
 * straight to the node: no proxy, no redirect, no compression, 1 MiB of body at most.
 * @example Sweep
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 * const answer = () => Response.json({ version: "1" });
 * await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, answer);
 * const nodes = ["a", "b"].map((name) => new ClusterNode({ name, tailscaleIp: "127.0.0.1" }));
 * const probes = await probeNodes(nodes, { port: server.addr.port });
 * assertEquals(probes.map((probe) => probe.state), ["up", "up"]);
 * ```
 */
export async function probeNodes(nodes: Iterable<ClusterNode>, options: SweepOptions = {}): Promise<NodeProbe[]> {
  const list = [...nodes];
  const probes = new Array<NodeProbe>(list.length);
  await new ProbePool(list, options, {}, (probe, index) => {
    probes[index] = probe;
    options.onProbe?.(probe);
  }).run();
  return probes;
}

/** Checks one node. A permission that is missing makes the state `unknown` and the failure `denied`. */
export async function probeNode(node: ClusterNode, options: ProbeOptions = {}): Promise<NodeProbe> {
  return (await probeNodes([node], options))[0]!;
}

/** Whether a node is up; {@linkcode probeNode} tells why not. */
export async function checkNodeReachable(node: ClusterNode, options: ProbeOptions = {}): Promise<boolean> {
  return (await upProbes([node], options)).length > 0;
}

/** The JSON object at `http://hostname:port/status`, or `undefined` if there is no such answer. */
export async function checkHttpEndpoint(
  hostname: string,
  port: number,
  options: ProbeOptions = {},
): Promise<StatusDocument | undefined> {
  requireValid("hostname", hostname, parseHost);
  requireValid("port", port, parsePort);
  const [probe] = await upProbes([new ClusterNode({ name: hostname, tailscaleIp: hostname })], { ...options, port });
  return probe?.status;
}

async function upProbes(nodes: readonly ClusterNode[], options: SweepOptions): Promise<NodeProbe[]> {
  const probes = await probeNodes(nodes, options);
  throwIfDenied(probes);
  return probes.filter(({ state }) => state === "up");
}

/** A node that is up, as {@linkcode discoverReachableNodes} gives it; without a JSON object, `status` is empty. */
export type ReachableNode = { readonly [K in "node" | "status" | "address" | "connectMs"]: NonNullable<NodeProbe[K]> };

/** Options of {@linkcode discoverReachableNodes}. */
export interface DiscoverOptions extends SweepOptions {
  /** The inventory. @default {DEFAULT_CONFIG_PATH} */
  readonly source?: ConfigSource | undefined;
  /** Which nodes to check. All active ones by default. */
  readonly selection?: NodeSelection | undefined;
}

/** The active nodes of an inventory that are up, in its order. */
export async function discoverReachableNodes(options: DiscoverOptions = {}): Promise<ReachableNode[]> {
  options.signal?.throwIfAborted();
  const config = await loadHostsConfig(options.source, { signal: options.signal });
  const nodes = selectNodes((await getClusterNodes(config)).values(), options.selection);
  const probes = await upProbes(nodes, options);
  return probes.map(({ node, status = {}, address = "", connectMs = 0 }) => ({ node, status, address, connectMs }));
}

/** Options of {@linkcode watchNodes}. */
export interface WatchOptions extends SweepOptions {
  /** Milliseconds from a node's answer to its next check: by default 5000, for {@linkcode waitForNodes} 2000. */
  readonly intervalMs?: number | undefined;
}

/**
 * Gives each outcome as it is known, and asks each node again `intervalMs` after its last answer, but not before that
 * was taken; one that hangs holds up nobody. When the signal aborts, the loop ends without an error.
 */
export async function* watchNodes(nodes: Iterable<ClusterNode>, options: WatchOptions = {}): AsyncGenerator<NodeProbe> {
  const { intervalMs = DEFAULTS.watchIntervalMs, signal } = options;
  requireDuration("intervalMs", intervalMs);
  let pool: ProbePool;
  const outcomes = new ReadableStream<{ probe: NodeProbe; index: number; dueMs: number }>({
    start(stream) {
      pool = new ProbePool([...nodes], options, { isEndless: true }, (probe, index) => {
        stream.enqueue({ probe, index, dueMs: performance.now() + intervalMs });
        options.onProbe?.(probe);
      });
      // After a break, the stream is closed already.
      pool.run().catch((error) => signal?.aborted ? stream.close() : stream.error(error)).catch(() => {});
    },
    cancel: () => pool.finish(),
  });
  for await (const { probe, index, dueMs } of outcomes) {
    if (signal?.aborted) return;
    yield probe;
    pool!.add(index, dueMs);
  }
}

/** Options of {@linkcode waitForNodes}. */
export interface WaitOptions extends WatchOptions {
  /** How many nodes have to be up. All of them by default. */
  readonly minUp?: number | undefined;
  /** How long to wait in all, in milliseconds. @default {300000} */
  readonly deadlineMs?: number | undefined;
}

/**
 * Waits until enough nodes are up, each asked again on its own schedule, and gives the last answer of each, in their
 * order: at the moment when the last one that was needed is up, else at the deadline.
 * @throws {Deno.errors.NotCapable} at once, with the flag, if the nodes that may be checked cannot be enough
 */
export async function waitForNodes(nodes: Iterable<ClusterNode>, options: WaitOptions = {}): Promise<NodeProbe[]> {
  const list = [...nodes];
  const { minUp = list.length, intervalMs = DEFAULTS.waitIntervalMs, deadlineMs = DEFAULTS.waitDeadlineMs } = options;
  requireCount("minUp", minUp, 0, list.length);
  requireDuration("intervalMs", intervalMs);
  requireDuration("deadlineMs", deadlineMs);
  const endMs = performance.now() + deadlineMs;
  const last: NodeProbe[] = [];
  const denied: NodeProbe[] = [];
  let up = 0;
  const pool = new ProbePool(list, options, { endMs }, (probe, index) => {
    // What the deadline cuts off takes nothing from an answer that there was.
    if (pool.isOver && last[index]) return;
    up += Number(probe.state === "up") - Number(last[index]?.state === "up");
    last[index] = probe;
    options.onProbe?.(probe);
    const isAllowed = probe.failure?.code !== "denied" || probe.endpoints.some((it) => isNetGranted(it.host, it.port));
    // The closer to the end, the sooner again, so that none is missed that comes up before it.
    const nowMs = performance.now();
    if (isAllowed) pool.add(index, nowMs + Math.min(intervalMs, Math.max(100, endMs - nowMs) / 2));
    else if (denied.push(probe) > list.length - minUp) throwIfDenied(denied);
    if (up >= minUp) pool.finish();
  });
  if (minUp === 0) pool.finish();
  await pool.run();
  const failure = { code: "other", message: "the wait was over before it was checked" } as const;
  return list.map((node, index) => last[index] ?? { ...uncheckedProbe(node, options.port), state: "unknown", failure });
}

// --- URLs ---

/** Options of {@linkcode getDataSyncUrls}. */
export interface DataSyncUrlOptions extends Omit<DiscoverOptions, "port" | "path" | "check"> {
  /** Whether this host itself is left out. @default {true} */
  readonly excludeSelf?: boolean | undefined;
  /** Whether nodes that are not up are left out; if not, nothing is checked. @default {true} */
  readonly reachableOnly?: boolean | undefined;
}

/** Options of {@linkcode getSyncUrls} and {@linkcode getEloSyncUrls}, which do not leave out this host by default. */
export interface SyncUrlOptions extends DataSyncUrlOptions {
  /** The port of the URLs, which is also the one that is checked. @default {8766} */
  readonly port?: number | undefined;
  /** The path of the URLs. What is checked is the status path. @default {"/db"} */
  readonly path?: string | undefined;
}

/**
 * `http://ADDRESS:PORT/PATH` of each active node that is up on that port, in the order of the inventory, without
 * duplicates, at the address that answered.
 * @example The model servers
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 * const source = { hosts: { "gpu-1": { tailscale_ip: "100.64.0.1" } } };
 * const urls = await getSyncUrls({ source, port: MODEL_SYNC_PORT, path: "/models", reachableOnly: false });
 * assertEquals(urls, ["http://100.64.0.1:8765/models"]);
 * ```
 */
export async function getSyncUrls(options: SyncUrlOptions = {}): Promise<string[]> {
  const { port = DATA_SYNC_PORT, path = "/db", excludeSelf = false } = options;
  requireValid("path", path, parsePath);
  requireValid("port", port, parsePort);
  return await syncUrls({ ...options, excludeSelf }, port, path);
}

/** The URLs of the Elo database on the nodes that are up: {@linkcode getSyncUrls} at `elo_sync.sync_port`. */
export async function getEloSyncUrls(options: SyncUrlOptions = {}): Promise<string[]> {
  options.signal?.throwIfAborted();
  const { config: source, eloSync } = await loadParsed(options.source, { signal: options.signal });
  return await getSyncUrls({ ...options, source, port: options.port ?? eloSync.syncPort });
}

/**
 * The base URL of the data server of each active node that is up, this host left out: the node named like it
 * (`RINGRIFT_NODE_ID`, else the hostname), and those with an address of its own.
 */
export async function getDataSyncUrls(options: DataSyncUrlOptions = {}): Promise<string[]> {
  return await syncUrls({ excludeSelf: true, ...options }, undefined, "");
}

async function syncUrls(options: DataSyncUrlOptions, port: number | undefined, path: string): Promise<string[]> {
  const { source, selection, excludeSelf, reachableOnly = true, signal, timeoutMs, concurrency, onProbe } = options;
  signal?.throwIfAborted();
  const isSelf = excludeSelf ? selfTest() : () => false;
  const config = await loadHostsConfig(source, { signal });
  const nodes = selectNodes((await getClusterNodes(config)).values(), selection).filter((node) => !isSelf(node));
  const endpoints = reachableOnly
    ? (await upProbes(nodes, { signal, timeoutMs, concurrency, onProbe, port })).map(({ endpoint }) => endpoint)
    : nodes.map((node) => dataEndpoints(node, port)[0]);
  return [...new Set(endpoints.filter((endpoint) => endpoint !== undefined).map((it) => endpointUrl(it, path)))];
}

function selfTest(): (node: ClusterNode) => boolean {
  const nodeId = readVariable("RINGRIFT_NODE_ID");
  const purpose = "sys access to leave out this host itself";
  if (!nodeId) requirePermission({ name: "sys", kind: "hostname" }, "--allow-sys=hostname", purpose);
  const isGranted = (kind: "hostname" | "networkInterfaces") =>
    Deno.permissions.querySync({ name: "sys", kind }).state === "granted";
  const hostname = isGranted("hostname") ? Deno.hostname().toLowerCase() : "localhost";
  const name = nodeId?.toLowerCase() ?? hostname;
  const names = [name, name.split(".", 1)[0]!];
  const interfaces = isGranted("networkInterfaces") ? Deno.networkInterfaces() : [];
  const addresses = ["localhost", "127.0.0.1", "::1", ...interfaces.map(({ address }) => address.toLowerCase())];
  const hosts = new Set([...names, hostname, ...addresses]);
  const hostsOf = (node: ClusterNode) => [...node.addresses, ...dataEndpoints(node).map(({ host }) => host)];
  return (node) => names.includes(node.name.toLowerCase()) || hostsOf(node).some((it) => hosts.has(it.toLowerCase()));
}

// --- Commands over ssh ---

/** Options of {@linkcode sshCommand}. */
export interface SshOptions {
  /** The user to log in as. @default {node.sshUser} */
  readonly user?: string | undefined;
  /** How long ssh may take to connect, in milliseconds, rounded up to a second. @default {10000} */
  readonly connectTimeoutMs?: number | undefined;
  /** Further options as `ssh_config(5)` names them, `KEY=VALUE` each. One that is set here replaces the default. */
  readonly options?: readonly string[] | undefined;
  /** The endpoint to log in at. @default {sshEndpoints(node)[0]} */
  readonly endpoint?: Endpoint | undefined;
}

/**
 * The argument list, `ssh` first, that runs a command on a node, without a password prompt and with a bounded connect.
 * The command is what ssh itself takes: its words are joined by spaces and read by the remote shell.
 * @example Ask for the load
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 * const node = new ClusterNode({ name: "gpu-1", tailscaleIp: "100.64.0.1" });
 * const words = sshCommand(node, ["uptime"]);
 * assertEquals(words.join(" "), "ssh -o BatchMode=yes -o ConnectTimeout=10 -p 22 -- ubuntu@100.64.0.1 uptime");
 * ```
 * @throws {TypeError} if the node has no address, or if ssh or a shell could take an option for something else
 */
export function sshCommand(
  node: ClusterNode,
  command: readonly string[],
  options: SshOptions = {},
): [string, ...string[]] {
  const { connectTimeoutMs = DEFAULTS.connectTimeoutMs, options: extra = [] } = options;
  const { user = node.sshUser, endpoint = sshEndpoints(node)[0] } = options;
  requireDuration("connectTimeoutMs", connectTimeoutMs);
  requireValid("user", user, parseUser);
  const problems = extra.map(sshOptionFault).filter((fault) => fault !== undefined);
  if (!endpoint) problems.push("it has no address: set tailscale_ip or ssh_host");
  if (command.some((word) => word.includes("\0"))) problems.push("the command holds a NUL character");
  if (!endpoint || problems.length > 0) {
    throw new TypeError(`Cannot build the ssh command of ${JSON.stringify(node.name)}: ${problems.join("; ")}`);
  }
  // The first value that ssh is given wins, so that a default is left out if the caller sets it.
  const isSet = (key: string) => extra.some((option) => option.toLowerCase().startsWith(`${key.toLowerCase()}=`));
  const orDefault = (key: string, ...words: string[]) => isSet(key) ? [] : words;
  return [
    "ssh",
    ...orDefault("BatchMode", "-o", "BatchMode=yes"),
    ...orDefault("ConnectTimeout", "-o", `ConnectTimeout=${Math.ceil(connectTimeoutMs / 1000)}`),
    ...orDefault("Port", "-p", String(endpoint.port)),
    ...(node.sshKey === undefined ? [] : orDefault("IdentityFile", "-i", node.sshKey)),
    ...extra.flatMap((option) => ["-o", option]),
    "--",
    `${user}@${endpoint.host}`,
    ...command,
  ];
}

/** Whether options have ssh connect to something else than an endpoint of the node. */
function goesElsewhere({ options = [] }: SshOptions): boolean {
  return options.some((option) => /^(?:ProxyJump|ProxyCommand|HostName|Port)=/i.test(option));
}

function sshOptionFault(option: string): string | undefined {
  const [, key, value = ""] = /^([A-Za-z][A-Za-z0-9]*)=(.*)$/s.exec(option) ?? [];
  if (key === undefined) return "ssh option: expected KEY=VALUE, as in ServerAliveInterval=15";
  if (CONTROL_TEXT.test(value)) return `ssh option ${key}: holds a control character`;
  // These name hosts and users to a process; a command is what ProxyCommand is for.
  const words = /^(ProxyJump|HostName|User|IdentityFile)$/i.test(key) ? value.replace(/[[\]]/g, "").split(",") : [];
  const fault = faultOf(() => words.forEach((word) => parseWord(word, "hosts and users")));
  return fault && `ssh option ${key}: ${fault}`;
}

function faultOf(run: () => unknown): string | undefined {
  try {
    run();
  } catch (error) {
    return errorText(error);
  }
}

/** The endpoints that are raced for a greeting: none if there is one alone, or if an option leads elsewhere. */
export function racedSshEndpoints(node: ClusterNode, options: SshOptions = {}): Endpoint[] {
  const endpoints = sshEndpoints(node);
  return options.endpoint || endpoints.length < 2 || goesElsewhere(options) ? [] : endpoints;
}

/**
 * The SSH endpoint of a node that greets first, out of several; the first one if none does, as behind a jump host.
 * @throws {TypeError} if the node has no address
 */
export async function findSshEndpoint(node: ClusterNode, options: RunOptions = {}): Promise<Endpoint> {
  const { signal, endpoint } = options;
  signal?.throwIfAborted();
  const first = endpoint ?? sshEndpoints(node)[0];
  if (!first) throw new TypeError(`${JSON.stringify(node.name)} has no address: set tailscale_ip or ssh_host`);
  if (racedSshEndpoints(node, options).length === 0) return first;
  let greeted: Endpoint | undefined;
  await new ProbePool([node], { timeoutMs: GREETING_MS, signal }, { isSsh: true }, ({ state, endpoint }) => {
    if (state === "up") greeted = endpoint;
  }).run();
  return greeted ?? first;
}

/** Options of {@linkcode runOnNodes}. */
export interface RunOptions extends SshOptions {
  /** How long each node may take, in milliseconds. @default {60000} */
  readonly timeoutMs?: number | undefined;
  /** How many nodes at once. @default {32} */
  readonly concurrency?: number | undefined;
  /** What every node's command reads. Nothing by default. */
  readonly stdin?: Uint8Array<ArrayBuffer> | undefined;
  /** Ends every ssh; the call then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
  /** Called with what a node writes, all of it, as it comes. What it throws ends every ssh and rejects the call. */
  readonly onOutput?: ((node: ClusterNode, stream: "stdout" | "stderr", text: string) => void) | undefined;
  /** Called with each result as soon as it is known. What it throws ends every ssh and rejects the call. */
  readonly onResult?: ((result: CommandResult) => void) | undefined;
}

/**
 * Why a command failed: `connect` (it was not started), `lost` (the connection broke while it ran), `timeout`, `exit`
 * (its own exit code), `signal` (ssh was ended by one), `no-address`, `local` (ssh could not be started).
 */
export type CommandFailureCode = "connect" | "lost" | "timeout" | "exit" | "signal" | "no-address" | "local";

/** The outcome of a command on one node. */
export type CommandResult = {
  readonly node: ClusterNode;
  /** `null` if there was none; `signal` then is the one that ended ssh. */
  readonly exitCode: number | null;
  readonly signal: string | null;
  /** The first 1 MiB of text of each stream, what ssh itself says included; `truncated` if there was more. */
  readonly stdout: string;
  readonly stderr: string;
  readonly truncated: boolean;
  /** Milliseconds. */
  readonly durationMs: number;
  /** `undefined` if it returned 0. */
  readonly failure: { readonly code: CommandFailureCode; readonly message: string } | undefined;
};

/**
 * Runs a command on many nodes over ssh, and gives one result for each, in their order. A node with several SSH
 * endpoints is reached at the one that greets first, so that a command never runs twice.
 * @param command The words that ssh takes, or a function that gives each node its own.
 * @throws {TypeError} that lists what is unsafe, before the first ssh starts
 */
export async function runOnNodes(
  nodes: Iterable<ClusterNode>,
  command: readonly string[] | ((node: ClusterNode) => readonly string[]),
  options: RunOptions = {},
): Promise<CommandResult[]> {
  const { concurrency = DEFAULTS.commandConcurrency, timeoutMs = DEFAULTS.commandTimeoutMs, signal } = options;
  requireCount("concurrency", concurrency, 1);
  requireDuration("timeoutMs", timeoutMs);
  signal?.throwIfAborted();
  const runs = Array.from(nodes, (node) => ({ node, words: typeof command === "function" ? command(node) : command }));
  const isNone = ({ words }: { words: readonly string[] }) => !Array.isArray(words) || words.length === 0;
  if (runs.some(isNone)) throw new TypeError("Cannot run a command that is empty: expected a list of words");
  // What is unsafe in one argument list stops the whole run, before the first ssh starts.
  const faults = runs.map(({ node, words }) => node.bestIp && faultOf(() => sshCommand(node, words, options)));
  const problems = new Set(faults.filter((fault) => fault !== undefined));
  if (problems.size > 0) throw new TypeError([...problems].join("\n"));
  requirePermission({ name: "run", command: "ssh" }, "--allow-run=ssh", "run access to ssh (on the PATH)");
  // A fault of this side ends them all: there is no ssh, or nobody is left to take the output.
  const fault = new AbortController();
  const ended = AbortSignal.any([fault.signal, ...(signal ? [signal] : [])]);
  const results: CommandResult[] = [];
  const queue = runs.entries();
  const runNext = async () => {
    for (const [index, { node, words }] of queue) {
      ended.throwIfAborted();
      const result = await runOnNode(node, words, options, ended);
      results[index] = result;
      options.onResult?.(result);
    }
  };
  const atOnce = { length: Math.min(concurrency, runs.length) };
  await Promise.all(Array.from(atOnce, () => runNext().catch((error) => fault.abort(error))));
  ended.throwIfAborted();
  return results;
}

type SshOutput = Omit<CommandResult, "node" | "durationMs" | "failure">;
type SshFailure = [code?: CommandFailureCode, message?: string];

async function runOnNode(node: ClusterNode, words: readonly string[], options: RunOptions, signal: AbortSignal) {
  const started = performance.now();
  const { timeoutMs = DEFAULTS.commandTimeoutMs } = options;
  let output: SshOutput = { exitCode: null, signal: null, stdout: "", stderr: "", truncated: false };
  const result = (code?: CommandFailureCode, message = ""): CommandResult => {
    const durationMs = Math.round(performance.now() - started);
    return { node, ...output, durationMs, failure: code && { code, message } };
  };
  if (node.bestIp === undefined) return result("no-address", "set tailscale_ip or ssh_host");
  const deadline = new AbortController();
  const timer = setTimeout(() => deadline.abort(), timeoutMs);
  const ended = AbortSignal.any([signal, deadline.signal]);
  try {
    const endpoint = await findSshEndpoint(node, { ...options, signal: ended });
    ended.throwIfAborted();
    const argv = sshCommand(node, words, { ...options, endpoint });
    const child = spawnSsh(argv, { stdin: options.stdin ? "piped" : "null", stdout: "piped", stderr: "piped" });
    output = await finishSsh(child, node, options, ended);
    if (!deadline.signal.aborted || output.signal === null) {
      return result(...commandFailure(output, node, endpoint, options));
    }
  } catch (error) {
    if (error instanceof ProbeFault) return result("local", error.message);
    if (signal.aborted || !deadline.signal.aborted) throw error;
  } finally {
    clearTimeout(timer);
  }
  return result("timeout", `timed out after ${formatMs(timeoutMs)}`);
}

/** Starts an argument list of {@linkcode sshCommand} with the streams that are given; needs run permission of ssh. */
export function spawnSsh(
  [program, ...args]: readonly [string, ...string[]],
  streams: Pick<Deno.CommandOptions, "stdin" | "stdout" | "stderr">,
): Deno.ChildProcess {
  requirePermission({ name: "run", command: "ssh" }, "--allow-run=ssh", "run access to ssh (on the PATH)");
  try {
    return new Deno.Command(program, { args, ...streams }).spawn();
  } catch (error) {
    const isMissing = error instanceof Deno.errors.NotFound;
    if (isMissing) throw new Deno.errors.NotFound("There is no ssh on the PATH: install OpenSSH");
    throw new ProbeFault("local-resource", `ssh cannot be started (${errorText(error)})`);
  }
}

async function finishSsh(child: Deno.ChildProcess, node: ClusterNode, options: RunOptions, ended: AbortSignal) {
  const released = new AbortController();
  let killTimer: ReturnType<typeof setTimeout> | undefined;
  let endedBy: Deno.Signal | null = null;
  // It may have ended already.
  const kill = (signal: Deno.Signal) => Promise.try(() => child.kill(signal)).catch(() => {});
  const end = () => {
    if (released.signal.aborted) return;
    endedBy = "SIGTERM";
    kill("SIGTERM");
    killTimer ??= setTimeout(kill, GRACE_MS, "SIGKILL");
  };
  ended.addEventListener("abort", end);
  // The command may end without having read all.
  if (options.stdin) ReadableStream.from([options.stdin]).pipeTo(child.stdin).catch(() => {});
  const texts = { stdout: "", stderr: "", truncated: false };
  const read = async (stream: "stdout" | "stderr") => {
    const write = (text: string) => {
      texts.truncated ||= texts[stream].length + text.length > MAX_OUTPUT_LENGTH;
      texts[stream] += text.slice(0, MAX_OUTPUT_LENGTH - texts[stream].length);
      options.onOutput?.(node, stream, text);
    };
    const decoded = child[stream].pipeThrough(new TextDecoderStream("utf-8", { ignoreBOM: true }));
    await decoded.pipeTo(new WritableStream({ write }), { signal: released.signal });
  };
  const outputs = Promise.all([read("stdout"), read("stderr")]);
  // To await them before the process has ended could be a deadlock.
  outputs.catch(end);
  const { code, ...status } = await child.status;
  // At a signal, ssh itself exits with 255.
  const signal = status.signal ?? endedBy;
  clearTimeout(killTimer);
  ended.removeEventListener("abort", end);
  // A grandchild may hold the pipes for ever; what ssh itself wrote is in them already.
  await settledOrAfter(outputs, GRACE_MS).finally(() => released.abort());
  return { exitCode: signal ? null : code, signal, ...texts };
}

/** What ssh says last if it could not start a command. */
const NOT_STARTED =
  /^(?:ssh: |Host key |Connection |kex_|Received dis|Unable to nego|No user exists)|Permission denied/;
/** What it says if it lost the connection while a command ran, perhaps on a line that this began. */
const LOST = /(?:Connection to \S+ (?:closed by|port \d+:)|Timeout, server |Read from remote host |client_loop: ).*/;
const NAMES_HOST = /@|\b(?:port|host|hostname|server) |Connection to /;
const NEW_KEY = "the host key is unknown: --ssh-option StrictHostKeyChecking=accept-new accepts it (scripts: options)";

function commandFailure(output: SshOutput, node: ClusterNode, endpoint: Endpoint, options: SshOptions): SshFailure {
  const { exitCode, signal, stdout, stderr } = output;
  if (signal) return ["signal", `ended by ${signal}`];
  if (exitCode === 0) return [];
  const line = stderr.trimEnd().split(/\r?\n/).at(-1)!;
  const [isElsewhere, isName] = [goesElsewhere(options), !isAddress(endpoint.host)];
  const words = line.split(/[\s@]+/).map((word) => word.replace(/[:.,]+$/, ""));
  const [, by = "", port = ""] = /(?: by (\S+))? port (\d+)/.exec(line) ?? [];
  const isPort = isElsewhere || by === "UNKNOWN" || port === "" || Number(port) === endpoint.port;
  const isAlias = (isName || isElsewhere) && line.startsWith("ssh: connect to host ");
  const isNamed = words.includes(endpoint.host) || isAlias || by === "UNKNOWN" || (isName && isAddress(by));
  // 255 is ssh's own, but a command may return it too. What ssh says names this very endpoint, or has its line end.
  const isOurs = exitCode === 255 && isPort && (isNamed || (!NAMES_HOST.test(line) && stderr.endsWith("\r\n")));
  const [lost] = LOST.exec(line) ?? [];
  if (isOurs && lost) return ["lost", lost];
  if (!isOurs || stdout !== "" || !NOT_STARTED.test(line)) return ["exit", `exit code ${exitCode}`];
  if (/REMOTE HOST IDENTIFICATION HAS CHANGED/.test(stderr)) return ["connect", "the host key has changed"];
  if (line.startsWith("Host key")) return ["connect", NEW_KEY];
  const raced = racedSshEndpoints(node, options);
  const isRaced = raced.every(({ host, port }) => isNetGranted(host, port)) || !/^(?:ssh: |Connection )/.test(line);
  return ["connect", isRaced ? line : `${line}; ${netFlag(raced)} lets its other address be tried`];
}
