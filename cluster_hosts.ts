/**
 * Everything that a script needs to know about the hosts of a cluster, and whether they answer: one YAML inventory is
 * loaded and validated, its nodes are selected, swept in parallel over TCP or HTTP, and turned into URLs and ssh
 * commands.
 *
 * Importing this module needs no permission. Each function names the ones that it uses; a permission that is missing
 * throws `Deno.errors.NotCapable` with the exact flag and never asks.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

/** The default port of the Elo ratings database. */
export const ELO_SYNC_PORT = 8766;

/** The default port of a node's data server. */
export const DATA_SYNC_PORT = 8766;

/** The default port of the model server. */
export const MODEL_SYNC_PORT = 8765;

/** Where the inventory is, under the working directory, when nothing else names one. */
export const DEFAULT_CONFIG_PATH = "config/distributed_hosts.yaml";

const DEFAULT_TIMEOUT_MS = 5000;
const DEFAULT_CONCURRENCY = 1024;

/** A node with a dead first address is found by its second one after this long; see {@linkcode probeNode}. */
const NEXT_ADDRESS_MS = 1000;

/** A sweep starts with so many checks at once, and doubles them at this interval until `concurrency`. */
const FIRST_CONCURRENCY = 64;
const MORE_CONCURRENCY_MS = 10;

const MAX_CONFIG_BYTES = 256 * 1024 * 1024;
const MAX_HEAD_BYTES = 64 * 1024;
const MAX_BODY_BYTES = 1024 * 1024;
const MAX_STATUS_DEPTH = 100;

/** More name lookups than this would fill Deno's pool of blocking threads, on which file reads wait too. */
const MAX_LOOKUPS = 16;

const INACTIVE_STATUSES: ReadonlySet<string> = new Set(["terminated", "offline", "setup", "retired", "archived"]);

/** A path, a URL (`file:`, `http:` or `https:`), or a config already loaded. */
export type ConfigSource = string | URL | HostsConfig;

/** One host of the inventory, as written. Keys beyond these are kept. */
export interface HostEntry {
  /** The address inside the tailnet; tried first. */
  readonly tailscale_ip?: string | null;
  /** A host, or `user@host`; tried after the Tailscale address. */
  readonly ssh_host?: string | null;
  /** The SSH user. */
  readonly ssh_user?: string | null;
  /** The path of the SSH private key. */
  readonly ssh_key?: string | null;
  /** The SSH port. */
  readonly ssh_port?: number | string | null;
  /** Where the service is installed on the node. */
  readonly ringrift_path?: string | null;
  /** A word such as `active`, `ready`, `offline`, `setup`, `retired`. */
  readonly status?: string | null;
  /** A word such as `coordinator` or `worker`. */
  readonly role?: string | null;
  /** Memory in GB. */
  readonly memory_gb?: number | string | null;
  /** The number of CPU cores. */
  readonly cpus?: number | string | null;
  /** The GPU model, such as `H100`. */
  readonly gpu?: string | number | null;
  /** The port of the node's data server. */
  readonly data_server_port?: number | string | null;
  /** The base URL of the node's data server, where it is not `http://ADDRESS:PORT`. */
  readonly data_server_url?: string | null;
  /** Keys of the user's own. */
  readonly [key: string]: unknown;
}

/** The inventory as written: snake_case keys, unknown sections kept. */
export interface HostsConfig {
  /** The hosts by name, in the order of the file. */
  readonly hosts: Readonly<Record<string, HostEntry>>;
  /** How the Elo ratings database is synchronised; see {@linkcode EloSyncConfig}. */
  readonly elo_sync: Readonly<Record<string, unknown>>;
  /** Sections of the user's own. */
  readonly [section: string]: unknown;
}

/** One thing that is wrong with an inventory. It never quotes the file, which may hold secrets. */
export interface ConfigProblem {
  /** Where it is: `hosts.gpu-node-1.ssh_port`; empty for the file as a whole. */
  readonly path: string;
  /** What is wrong, and what is expected. */
  readonly message: string;
  /** The line, from 1, where it can be found. */
  readonly line?: number;
  /** The column, from 1, where it can be found. */
  readonly column?: number;
}

/**
 * An inventory that cannot be used. All its problems are listed, not the first alone.
 *
 * @example Show every problem
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * try {
 *   parseHostsConfig("hosts:\n  gpu-1: { ssh_port: 0 }\n  gpu-2: null\n");
 * } catch (error) {
 *   if (!(error instanceof HostsConfigError)) throw error;
 *   assertEquals(error.problems.map((problem) => problem.path), ["hosts.gpu-1.ssh_port", "hosts.gpu-2"]);
 * }
 * ```
 */
export class HostsConfigError extends Error {
  /** Every problem found, in the order of the file. */
  readonly problems: readonly ConfigProblem[];

  /** Makes an error of all `problems` of the file or URL named `origin`. */
  constructor(origin: string, problems: readonly ConfigProblem[], options?: ErrorOptions) {
    super(problems.map((problem) => formatConfigProblem(problem, origin)).join("\n"), options);
    this.name = "HostsConfigError";
    this.problems = problems;
  }
}

/** What {@linkcode inspectHostsConfig} found. */
export interface HostsConfigReport {
  /** What keeps the inventory from being used. */
  readonly problems: readonly ConfigProblem[];
  /** What is allowed, but probably not meant. Empty while there are problems that hide the hosts. */
  readonly doubts: readonly ConfigProblem[];
}

/** The text of an inventory, and where it came from. */
export interface HostsConfigText {
  /** The YAML; empty where there is no file. */
  readonly text: string;
  /** The path or the URL. */
  readonly origin: string;
  /** Whether the file is there: only the default one may be missing. */
  readonly exists: boolean;
}

/** Options of {@linkcode loadHostsConfig} and {@linkcode readHostsConfig}. */
export interface LoadOptions {
  /**
   * How long a config URL may take, in milliseconds.
   *
   * @default {5000}
   */
  readonly timeoutMs?: number;
  /** Aborts the loading of a URL. */
  readonly signal?: AbortSignal | undefined;
}

/** How the Elo ratings database is synchronised. */
export interface EloSyncConfig {
  /**
   * The name of the coordinator's node.
   *
   * @default {"mac-studio"}
   */
  readonly coordinator: string;
  /**
   * The port of the database on each node.
   *
   * @default {8766}
   */
  readonly syncPort: number;
  /**
   * Seconds between two rounds.
   *
   * @default {300}
   */
  readonly syncInterval: number;
  /**
   * Elo points by which two databases may differ.
   *
   * @default {50}
   */
  readonly divergenceThreshold: number;
  /**
   * The transports to try, best first.
   *
   * @default {["tailscale", "aria2", "http"]}
   */
  readonly transports: readonly string[];
}

/** Where the coordinator listens. */
export interface CoordinatorAddress {
  /** A name or an address. */
  readonly hostname: string;
  /** The port of the Elo database. */
  readonly port: number;
}

/** What {@linkcode ClusterNode} is made of. */
export interface ClusterNodeFields {
  /** The name in the inventory. */
  readonly name: string;
  /** The address inside the tailnet. */
  readonly tailscaleIp?: string | undefined;
  /** A host, or `user@host`. */
  readonly sshHost?: string | undefined;
  /**
   * The SSH user. A user in `sshHost` counts unless this is set.
   *
   * @default {"ubuntu"}
   */
  readonly sshUser?: string | undefined;
  /** The path of the SSH private key. */
  readonly sshKey?: string | undefined;
  /**
   * The SSH port.
   *
   * @default {22}
   */
  readonly sshPort?: number | undefined;
  /**
   * Where the service is installed on the node.
   *
   * @default {"~/ringrift/ai-service"}
   */
  readonly ringriftPath?: string | undefined;
  /**
   * A word such as `active`, `ready`, `offline`.
   *
   * @default {"unknown"}
   */
  readonly status?: string | undefined;
  /**
   * A word such as `coordinator` or `worker`.
   *
   * @default {"unknown"}
   */
  readonly role?: string | undefined;
  /**
   * Memory in GB.
   *
   * @default {0}
   */
  readonly memoryGb?: number | undefined;
  /**
   * The number of CPU cores.
   *
   * @default {0}
   */
  readonly cpus?: number | undefined;
  /**
   * The GPU model.
   *
   * @default {""}
   */
  readonly gpu?: string | undefined;
  /**
   * The port of the data server.
   *
   * @default {8766}
   */
  readonly dataServerPort?: number | undefined;
  /** The base URL of the data server, where it is not `http://ADDRESS:PORT`. */
  readonly dataServerUrl?: string | undefined;
  /**
   * The host's mapping as written.
   *
   * @default {{}}
   */
  readonly entry?: HostEntry | undefined;
}

/** Which nodes {@linkcode selectNodes} keeps. What is unset does not restrict. */
export interface NodeSelection {
  /** Exact names, globs (`gpu-*`, `gpu-?`) and ranges (`gpu-[1-8]`, `gpu-[01-16,20]`; zero padding is significant). */
  readonly names?: readonly string[];
  /** The same, for the nodes to leave out. */
  readonly exclude?: readonly string[];
  /** Roles, whole, in any case. */
  readonly roles?: readonly string[];
  /** Statuses, whole, in any case. An inactive one that is named here is included. */
  readonly statuses?: readonly string[];
  /** Parts of GPU names, in any case: `h100` finds `GH100` too. */
  readonly gpus?: readonly string[];
  /**
   * Whether nodes that are not active are kept. One that `names` names exactly always is.
   *
   * @default {false}
   */
  readonly includeInactive?: boolean;
}

/** A JSON object that a node answered. */
export type StatusDocument = Readonly<Record<string, unknown>>;

/**
 * What a check came to: `up` (answered with a JSON object; with `check: "tcp"`, accepted), `unhealthy` (accepted, but
 * gave no usable answer), `down` (no address accepted), `unknown` (could not be checked from here).
 */
export type NodeState = "up" | "unhealthy" | "down" | "unknown";

/** Why a node is not up. `denied` and `local-resource` are faults of this side: the node's state is `unknown`. */
export type FailureCode =
  | "timeout"
  | "refused"
  | "unreachable"
  | "dns"
  | "no-address"
  | "http-status"
  | "redirect"
  | "bad-response"
  | "too-large"
  | "denied"
  | "local-resource"
  | "other";

/** Why a node is not up. */
export interface ProbeFailure {
  /** The reason, for programs. */
  readonly code: FailureCode;
  /** The reason, for people. It may hold text from the node: escape it before a terminal sees it. */
  readonly message: string;
}

/** The outcome of one check of one node. */
export interface NodeProbe {
  /** The node that was checked. */
  readonly node: ClusterNode;
  /** What the check came to. */
  readonly state: NodeState;
  /** The address that accepted, as configured; `undefined` where none did. */
  readonly address: string | undefined;
  /** The port that was checked. */
  readonly port: number;
  /** Milliseconds until that address accepted; `undefined` where none did. */
  readonly connectMs: number | undefined;
  /** The JSON object that the node answered, where it is up and was asked over HTTP. */
  readonly status: StatusDocument | undefined;
  /** Why the node is not up. */
  readonly failure: ProbeFailure | undefined;
}

/** A node that is up, as {@linkcode discoverReachableNodes} gives it. */
export interface ReachableNode {
  /** The node. */
  readonly node: ClusterNode;
  /** The JSON object that it answered; empty with `check: "tcp"`. */
  readonly status: StatusDocument;
  /** The address that answered. */
  readonly address: string;
  /** Milliseconds until it accepted. */
  readonly connectMs: number;
}

/** Options of {@linkcode checkHttpEndpoint}. */
export interface HttpCheckOptions {
  /**
   * The path to ask for.
   *
   * @default {"/status"}
   */
  readonly path?: string;
  /**
   * One deadline for all that is done for a node, in milliseconds.
   *
   * @default {5000}
   */
  readonly timeoutMs?: number;
  /** Aborts the whole call, which then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Options of {@linkcode probeNode} and {@linkcode checkNodeReachable}. */
export interface ProbeOptions extends HttpCheckOptions {
  /**
   * The port to check.
   *
   * @default {node.dataServerPort}
   */
  readonly port?: number | undefined;
  /**
   * Whether a node has to answer a JSON object over HTTP, or only to accept a TCP connection.
   *
   * @default {"http"}
   */
  readonly check?: "http" | "tcp";
}

/** Options of {@linkcode probeNodes}. */
export interface SweepOptions extends ProbeOptions {
  /**
   * How many nodes are checked at once.
   *
   * @default {1024}
   */
  readonly concurrency?: number;
  /** Called with each outcome as soon as it is known. What it throws rejects the call. */
  readonly onProbe?: ((probe: NodeProbe) => void) | undefined;
}

/** Options of {@linkcode discoverReachableNodes}. */
export interface DiscoverOptions extends SweepOptions {
  /**
   * The inventory.
   *
   * @default {DEFAULT_CONFIG_PATH}
   */
  readonly source?: ConfigSource | undefined;
  /** Which nodes to check. All active ones where unset. */
  readonly selection?: NodeSelection | undefined;
}

/** Options of {@linkcode getDataSyncUrls}. */
export interface DataSyncUrlOptions extends Omit<DiscoverOptions, "port" | "path" | "check"> {
  /**
   * Whether this host itself is left out.
   *
   * @default {true}
   */
  readonly excludeSelf?: boolean;
  /**
   * Whether only nodes that are up are given. Otherwise nothing is checked, and each node is given at its best address.
   *
   * @default {true}
   */
  readonly reachableOnly?: boolean;
}

/** Options of {@linkcode getSyncUrls} and {@linkcode getEloSyncUrls}. */
export interface SyncUrlOptions extends Omit<DataSyncUrlOptions, "excludeSelf"> {
  /**
   * The port of the URLs, which is also the one that is checked.
   *
   * @default {8766}
   */
  readonly port?: number | undefined;
  /**
   * The path of the URLs. What is checked is always `/status`.
   *
   * @default {"/db"}
   */
  readonly path?: string;
  /**
   * Whether this host itself is left out.
   *
   * @default {false}
   */
  readonly excludeSelf?: boolean;
}

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
  readonly connectTimeoutMs?: number;
  /** Further options as `ssh_config(5)` names them, `KEY=VALUE` each. One that is set here replaces the default. */
  readonly options?: readonly string[];
}

/**
 * Reads the text of an inventory: the file or URL given, else the file named by `RINGRIFT_HOSTS_CONFIG`, else
 * {@linkcode DEFAULT_CONFIG_PATH}. Where the default file does not exist, the text is empty.
 *
 * Permissions: read of the file, net for a URL, env of `RINGRIFT_HOSTS_CONFIG` (unset where it may not be read).
 *
 * @example Where does the inventory come from?
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const { origin } = await readHostsConfig("config/demo_hosts.yaml");
 * assertEquals(origin, "config/demo_hosts.yaml");
 * ```
 *
 * @throws {HostsConfigError} if a named file or URL cannot be read, or is not UTF-8
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 */
export async function readHostsConfig(source?: string | URL, options: LoadOptions = {}): Promise<HostsConfigText> {
  const named = source ?? readEnv("RINGRIFT_HOSTS_CONFIG");
  const origin = String(named ?? DEFAULT_CONFIG_PATH);
  if (/^https?:/i.test(origin)) {
    return { text: decodeConfig(await fetchConfig(origin, options), origin), origin, exists: true };
  }

  const path = /^file:/i.test(origin) ? new URL(origin) : origin;
  requirePermission({ name: "read", path }, `--allow-read=${origin}`);
  try {
    return { text: decodeConfig(await Deno.readFile(path), origin), origin, exists: true };
  } catch (error) {
    if (error instanceof HostsConfigError) throw error;
    const missing = error instanceof Deno.errors.NotFound;
    if (missing && named === undefined) return { text: "", origin, exists: false };
    const message = missing
      ? "there is no such file"
      : error instanceof Deno.errors.IsADirectory || /os error 21\b/.test(String(error))
      ? "is a folder, not a file"
      : `cannot be read (${errorText(error)})`;
    throw new HostsConfigError(origin, [{ path: "", message }], { cause: error });
  }
}

async function fetchConfig(url: string, options: LoadOptions): Promise<Uint8Array<ArrayBuffer>> {
  const { timeoutMs = DEFAULT_TIMEOUT_MS, signal } = options;
  const fault = (message: string, cause?: unknown) => new HostsConfigError(url, [{ path: "", message }], { cause });
  if (!URL.canParse(url)) throw fault("is not a URL");
  const { hostname, host, port, protocol } = new URL(url);
  requireNet(port ? host : `${hostname}:${protocol === "https:" ? 443 : 80}`);

  const deadline = AbortSignal.timeout(timeoutMs);
  try {
    const response = await fetch(url, {
      // A redirect could lead to a host for which no permission was given, and then Deno would ask.
      redirect: "manual",
      signal: signal ? AbortSignal.any([deadline, signal]) : deadline,
    });
    if (response.status !== 200 || !response.body) {
      await response.body?.cancel();
      throw fault(
        response.status >= 300 && response.status < 400
          ? `answered with a redirect (HTTP ${response.status}): use the URL that it leads to`
          : `answered HTTP ${response.status}`,
      );
    }
    const chunks: Uint8Array<ArrayBuffer>[] = [];
    let size = 0;
    for await (const chunk of response.body) {
      size += chunk.length;
      if (size > MAX_CONFIG_BYTES) throw fault(`is larger than ${MAX_CONFIG_BYTES} bytes`);
      chunks.push(chunk);
    }
    return new Uint8Array(await new Blob(chunks).arrayBuffer());
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof HostsConfigError) throw error;
    throw fault(deadline.aborted ? `did not answer within ${timeoutMs} ms` : "cannot be fetched", error);
  }
}

function decodeConfig(bytes: Uint8Array<ArrayBuffer>, origin: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    const isUtf16 = (bytes[0] === 0xff && bytes[1] === 0xfe) || (bytes[0] === 0xfe && bytes[1] === 0xff);
    const problem = isUtf16
      ? { path: "", message: "is UTF-16: save it as UTF-8" }
      : { path: "", message: "is not UTF-8 here: save it as UTF-8", line: firstInvalidLine(bytes) };
    throw new HostsConfigError(origin, [problem], { cause });
  }
}

function firstInvalidLine(bytes: Uint8Array<ArrayBuffer>): number {
  // The fatal decoder does not say where it stopped; the lenient one marks the place.
  return new TextDecoder().decode(bytes).split("\uFFFD", 1)[0]!.split("\n").length;
}

/**
 * Parses and validates an inventory. An empty text is an empty cluster.
 *
 * Permissions: none.
 *
 * @example Parse an inventory
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const config = parseHostsConfig("hosts:\n  gpu-1: { tailscale_ip: 100.64.0.1, rack: 7 }\n");
 * assertEquals(config.hosts["gpu-1"]?.rack, 7);
 * ```
 *
 * @param text The YAML.
 * @param origin What errors call it: a path or a URL.
 * @throws {HostsConfigError} with every problem, its path and its line
 */
export function parseHostsConfig(text: string, origin = "inventory"): HostsConfig {
  const { config, problems } = parseDocument(text);
  if (problems.length > 0) throw new HostsConfigError(origin, problems);
  validConfigs.add(config);
  return config;
}

/** What was validated when it was parsed, and need not be again in each function that it is given to. */
const validConfigs = new WeakSet<HostsConfig>();

/**
 * Loads an inventory: the file, URL or object given, else the file named by `RINGRIFT_HOSTS_CONFIG`, else
 * {@linkcode DEFAULT_CONFIG_PATH}. The default file may be missing: that is an empty cluster. A config that was loaded
 * before can be given to every function that takes a source, so that nothing is read twice.
 *
 * Permissions: read of the file, net for a URL, env of `RINGRIFT_HOSTS_CONFIG` (unset where it may not be read).
 *
 * @example Load once, ask often
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const config = await loadHostsConfig("config/demo_hosts.yaml");
 * const nodes = await getClusterNodes(config);
 * const coordinator = await getCoordinatorNode(config);
 * assertEquals(coordinator, nodes.get("coordinator"));
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be read or used
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 */
export async function loadHostsConfig(source?: ConfigSource, options: LoadOptions = {}): Promise<HostsConfig> {
  if (typeof source === "object" && !(source instanceof URL)) {
    if (validConfigs.has(source)) return source;
    const problems = findProblems(source);
    if (problems.length > 0) throw new HostsConfigError("config object", problems);
    return source;
  }
  const { text, origin } = await readHostsConfig(source, options);
  return parseHostsConfig(text, origin);
}

/**
 * Finds every problem of an inventory, and every doubt: a status or a key one slip away from a known one, a node
 * without an address, two active nodes at one address and port, a coordinator that is not there or not active, a
 * placeholder left in, a tab in the indentation.
 *
 * Permissions: none.
 *
 * @example Find a typo
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const { doubts } = inspectHostsConfig("hosts:\n  gpu-1:\n    tailscale_pi: 100.64.0.1\n    ssh_host: 192.0.2.1\n");
 * assertEquals(doubts.map(({ path, line }) => ({ path, line })), [{ path: "hosts.gpu-1.tailscale_pi", line: 3 }]);
 * ```
 */
export function inspectHostsConfig(text: string): HostsConfigReport {
  const { config, problems } = parseDocument(text);
  if (problems.length > 0) return { problems, doubts: [] };
  return { problems, doubts: withLines([...findDoubts(config), ...findHarmlessTabs(text)], text) };
}

function parseDocument(text: string): { config: HostsConfig; problems: ConfigProblem[] } {
  const empty = { hosts: {}, elo_sync: {} };
  const fault = (problem: ConfigProblem) => ({ config: empty, problems: [problem] });
  // A log-in page can be valid YAML, and would be an empty cluster.
  if (/^\s*<[!?a-z]/i.test(text)) return fault({ path: "", message: "is HTML or XML, not YAML" });
  let document: unknown;
  try {
    // The core schema has no merge keys, which @std/yaml expands without a bound, and leaves dates as written.
    document = parse(text, { schema: "core" });
    if (text.includes("<<")) expandMergeKeys(document, 50_000 + text.length);
  } catch (error) {
    if (error instanceof MergeError) return fault({ path: "", message: error.message });
    if (error instanceof RangeError) return fault({ path: "", message: "is nested too deeply" });
    if (error instanceof SyntaxError) return fault(syntaxProblem(error, text));
    throw error;
  }
  if (document === null || document === undefined) return { config: empty, problems: [] };
  if (!isMapping(document)) {
    return fault({ path: "", message: `expected a mapping with a "hosts" section, got ${typeName(document)}` });
  }
  const tab = structuralTab(text);
  if (tab) return fault(tab);
  const problems = findProblems(document);
  // Own properties, so that a section named __proto__ stays one.
  const config = { ...document, hosts: document.hosts ?? {}, elo_sync: document.elo_sync ?? {} } as HostsConfig;
  return { config, problems: withLines(problems, text) };
}

function syntaxProblem(error: SyntaxError, text: string): ConfigProblem {
  const { line, column } = error as { line?: number; column?: number };
  // After the reason, the message shows the source; at its end, quoted, come names out of the source.
  const reason = error.message.split(/ at line \d+, column \d+|\n/, 1)[0]!.replace(/ (?:"|!<).*/s, "");
  const message = `is not valid YAML: ${reason.charAt(0).toLowerCase()}${reason.slice(1)}`;
  if (text.includes("\0")) return { path: "", message: "holds a NUL character: is it a text file?" };
  if (line === undefined || column === undefined) return { path: "", message };
  return { path: "", message, line, column };
}

class MergeError extends Error {}

/**
 * Replaces each merge key (`<<`) by what it names, once per mapping, so that shared aliases cost nothing. `budget` is
 * the number of keys that may be copied: without it a file of 100 KB can ask for minutes.
 */
function expandMergeKeys(root: unknown, budget: number): void {
  const seen = new Set<unknown>();
  const pending = [root];
  while (pending.length > 0) {
    const value = pending.pop();
    if (typeof value !== "object" || value === null || seen.has(value)) continue;
    seen.add(value);
    if (Object.hasOwn(value, "<<")) merge(value as Record<string, unknown>);
    for (const child of Object.values(value)) if (typeof child === "object") pending.push(child);
  }

  function merge(target: Record<string, unknown>): void {
    const source = target["<<"];
    const own = Object.entries(target).filter(([key]) => key !== "<<");
    for (const key of Object.keys(target)) delete target[key];
    const merged = new Map<string, unknown>();
    for (const mapping of new Set(Array.isArray(source) ? source : [source])) {
      if (!isMapping(mapping)) throw new MergeError('a merge key ("<<") names something that is not a mapping');
      if (Object.hasOwn(mapping, "<<")) merge(mapping);
      for (const [key, value] of Object.entries(mapping)) {
        if (--budget < 0) throw new MergeError('holds too many merges ("<<")');
        if (!merged.has(key)) merged.set(key, value);
      }
    }
    for (const [key, value] of own) merged.set(key, value);
    for (const [key, value] of merged) {
      Object.defineProperty(target, key, { value, writable: true, enumerable: true, configurable: true });
    }
  }
}

type Check = (value: unknown) => string | undefined;

const PLACEHOLDER = /^(?:[^@]*@)?<[^<>]*>$/;
// Spelt out, since a class such as \p{Cf} takes longer to compile than a small inventory takes to load.
// deno-lint-ignore no-control-regex
const UNSAFE_TEXT = /[\s\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f;&|<>()$`\\"'*?[\]{}!#%^]/;
// deno-lint-ignore no-control-regex
const CONTROL_TEXT = /[\x00-\x1f\x7f-\x9f]/;

const HOST_CHECKS: Readonly<Record<string, Check>> = {
  tailscale_ip: ifSet(checkHost),
  ssh_host: ifSet(checkSshHost),
  ssh_user: ifSet(checkUser),
  ssh_key: ifSet(checkKeyPath),
  ssh_port: ifSet(checkPort),
  ringrift_path: ifSet(checkText),
  status: ifSet(checkText),
  role: ifSet(checkText),
  memory_gb: ifSet(checkAmount),
  cpus: ifSet(checkAmount),
  gpu: ifSet((value) => typeof value === "number" && Number.isFinite(value) ? undefined : checkText(value)),
  data_server_port: ifSet(checkPort),
  data_server_url: ifSet(checkUrl),
};

const ELO_SYNC_CHECKS: Readonly<Record<string, Check>> = {
  coordinator: ifSet(checkText),
  sync_port: ifSet(checkPort),
  sync_interval: ifSet((value) =>
    checkAmount(value) ?? (Number(value) > 0 ? undefined : "expected a number of seconds above 0")
  ),
  divergence_threshold: ifSet(checkAmount),
  transports: ifSet((value) =>
    Array.isArray(value) && value.every((item) => typeof item === "string")
      ? undefined
      : `expected a list of strings, got ${Array.isArray(value) ? "a list of something else" : typeName(value)}`
  ),
};

const DISTRIBUTED_CHECKS: Readonly<Record<string, Check>> = { data_server_port: ifSet(checkPort) };

function ifSet(check: Check): Check {
  return (value) => isUnset(value) ? undefined : check(value);
}

/** Only the keys that are used are looked at: with shared aliases a small file can be an endless document. */
function findProblems(document: Readonly<Record<string, unknown>>): ConfigProblem[] {
  const problems: ConfigProblem[] = [];
  const checkSection = (path: string, section: unknown, checks: Readonly<Record<string, Check>>) => {
    if (!isMapping(section)) {
      problems.push({ path, message: `expected a mapping, got ${typeName(section)}` });
      return;
    }
    for (const key in checks) {
      const message = Object.hasOwn(section, key) ? checks[key]!(section[key]) : undefined;
      if (message) problems.push({ path: `${path}.${key}`, message });
    }
  };

  const { hosts, elo_sync, distributed } = document;
  if (hosts !== null && hosts !== undefined && !isMapping(hosts)) {
    problems.push({ path: "hosts", message: `expected a mapping from names to hosts, got ${typeName(hosts)}` });
  } else if (hosts) {
    for (const [name, entry] of Object.entries(hosts)) {
      if (name.trim() === "") {
        problems.push({ path: "hosts.", message: "a host has an empty name" });
      } else if (CONTROL_TEXT.test(name)) {
        problems.push({ path: `hosts.${JSON.stringify(name)}`, message: "a host's name holds a control character" });
      } else checkSection(`hosts.${name}`, entry, HOST_CHECKS);
    }
  }
  if (elo_sync !== null && elo_sync !== undefined) checkSection("elo_sync", elo_sync, ELO_SYNC_CHECKS);
  // The section is another program's too: only a mapping can hold what is used here.
  if (isMapping(distributed)) checkSection("distributed", distributed, DISTRIBUTED_CHECKS);
  return problems;
}

function checkText(value: unknown): string | undefined {
  if (typeof value !== "string") return `expected a string, got ${typeName(value)}: put it in quotes`;
  if (CONTROL_TEXT.test(value)) return "holds a control character";
}

function checkWord(value: unknown, what: string): string | undefined {
  const text = typeof value === "string" ? value.trim() : value;
  const message = checkText(text);
  if (message || typeof text !== "string") return message;
  if (text.startsWith("-")) return `expected ${what}, got one that begins with "-"`;
  if (UNSAFE_TEXT.test(text)) return `expected ${what}, without spaces or characters that a shell would interpret`;
}

function checkHost(value: unknown): string | undefined {
  const what = "a host name or an address";
  if (typeof value !== "string") return checkWord(value, what);
  if (PLACEHOLDER.test(value.trim())) return;
  const host = withoutBrackets(value.trim());
  const colons = host.split(":").length - 1;
  if (host === "" || /[/@,]/.test(host) || colons === 1) return `expected ${what} alone, without user, port or path`;
  if (/^[\d.]+$/.test(host) && !/^(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!$)|$)){4}$/.test(host)) {
    return `expected ${what}: this is no IPv4 address`;
  }
  if (colons > 1 && !URL.canParse(`http://[${host}]`)) return `expected ${what}: this is no IPv6 address`;
  return checkWord(host, what);
}

function checkUser(value: unknown): string | undefined {
  return checkWord(value, "a user name") ?? (/[@:/]/.test(String(value)) ? "expected a user name alone" : undefined);
}

function checkSshHost(value: unknown): string | undefined {
  if (typeof value !== "string") return checkHost(value);
  const { user, host } = splitUser(value);
  return (user === undefined ? undefined : checkUser(user)) ?? checkHost(host);
}

function checkKeyPath(value: unknown): string | undefined {
  return checkWord(value, "the path of a key");
}

function checkPort(value: unknown): string | undefined {
  const expected = "expected an integer from 1 to 65535";
  if (typeof value !== "number" && typeof value !== "string") return `${expected}, got ${typeName(value)}`;
  if (typeof value === "string" && !/^\d{1,5}$/.test(value.trim())) return `${expected}, got another string`;
  return isPort(Number(value)) ? undefined : `${expected}, got another number`;
}

function checkAmount(value: unknown): string | undefined {
  const expected = "expected a number, 0 or more";
  if (typeof value !== "number" && typeof value !== "string") return `${expected}, got ${typeName(value)}`;
  const amount = Number(value);
  return Number.isFinite(amount) && amount >= 0 ? undefined : `${expected}, got another ${typeof value}`;
}

function checkUrl(value: unknown): string | undefined {
  const expected = "expected a URL that begins with http:// or https://";
  if (typeof value !== "string") return `${expected}, got ${typeName(value)}`;
  const text = value.trim();
  if (PLACEHOLDER.test(text)) return;
  if (!/^https?:\/\//i.test(text) || !URL.canParse(text)) return expected;
  if (CONTROL_TEXT.test(text) || /[\s"'`<>\\]/.test(text)) return `${expected}, without spaces or quotes`;
  if (new URL(text).port === "0") return "expected a port from 1 to 65535";
}

function* findDoubts(config: HostsConfig): Generator<ConfigProblem> {
  const knownStatuses = ["active", "ready", "unknown", ...INACTIVE_STATUSES];
  const fields = Object.keys(HOST_CHECKS);
  const takenBy = new Map<string, string>();
  for (const [name, entry] of Object.entries(config.hosts)) {
    const path = `hosts.${name}`;
    const node = nodeFromEntry(name, entry, DATA_SYNC_PORT);
    const known = knownStatuses.includes(node.status) ? undefined : knownStatuses.find((it) => isTypo(node.status, it));
    if (known) yield { path: `${path}.status`, message: `is one slip away from "${known}"` };
    for (const key of Object.keys(entry)) {
      const isOwn = Object.hasOwn(HOST_CHECKS, key) || fields.some((it) => isPlural(key, it));
      const field = isOwn ? undefined : fields.find((it) => isTypo(key, it) && isUnset(entry[it]));
      if (field) yield { path: `${path}.${key}`, message: `is not used: is "${field}" meant?` };
    }
    for (const key of ["tailscale_ip", "ssh_host", "data_server_url"]) {
      const text = String(entry[key] ?? "");
      if (/<[^<>]*>/.test(text) || /^(?:\S+@)?[\dx]+(?:\.[\dx]+){0,2}(?:\.x+)[\dx.]*$/i.test(text.trim())) {
        yield { path: `${path}.${key}`, message: "is a placeholder: put the real address" };
      }
    }
    if (node.addresses.length === 0 && !node.dataServerUrl) {
      yield { path, message: "has no address: set tailscale_ip or ssh_host" };
    }
    if (node.isActive && node.bestIp !== undefined) {
      const endpoint = hostPort(node.bestIp, node.dataServerPort);
      const other = takenBy.get(endpoint);
      if (other) yield { path, message: `has the same address and data server port as ${other}` };
      else takenBy.set(endpoint, name);
    }
  }
  if (Object.keys(config.elo_sync).length > 0) {
    const { coordinator } = eloSyncConfig(config);
    const entry = Object.hasOwn(config.hosts, coordinator) ? config.hosts[coordinator] : undefined;
    const path = "elo_sync.coordinator";
    if (!entry) yield { path, message: "names a node that is not in hosts" };
    else if (!nodeFromEntry(coordinator, entry, DATA_SYNC_PORT).isActive) {
      yield { path, message: "names a node that is not active" };
    }
  }
}

/** `gpus: 8` beside `gpu` is a key that people have, not a slip. */
function isPlural(key: string, other: string): boolean {
  return key === `${other}s` || other === `${key}s`;
}

/** Whether one insertion, deletion, replacement or swap of neighbours turns `word` into `other`. */
export function isTypo(word: string, other: string): boolean {
  const shorter = Math.min(word.length, other.length);
  let start = 0;
  while (start < shorter && word[start] === other[start]) start++;
  let end = 0;
  while (end < shorter - start && word.at(-1 - end) === other.at(-1 - end)) end++;
  const [a, b] = [word.slice(start, word.length - end), other.slice(start, other.length - end)];
  return word !== other && ((a.length <= 1 && b.length <= 1) || (a.length === 2 && a[0] === b[1] && a[1] === b[0]));
}

/** A tab before a key: @std/yaml takes the key for one of the outermost mapping, and the hosts are gone. */
function structuralTab(text: string): ConfigProblem | undefined {
  const line = indentationTabs(text).find(({ isKey }) => isKey)?.line;
  return line === undefined
    ? undefined
    : { path: "", message: "is not valid YAML: a tab in the indentation; use spaces", line, column: 1 };
}

function findHarmlessTabs(text: string): ConfigProblem[] {
  return indentationTabs(text).map(({ line }) => ({ path: "", message: "a tab in the indentation; use spaces", line }));
}

/** Lines indented with a tab, outside of block scalars and of JSON, where tabs are fine. */
function indentationTabs(text: string): { line: number; isKey: boolean }[] {
  if (!/^ *\t/m.test(text) || /^\s*[{[]/.test(text)) return [];
  const tabs: { line: number; isKey: boolean }[] = [];
  let scalarIndent: number | undefined;
  for (const [index, line] of text.split("\n").entries()) {
    if (line.trim() === "") continue;
    const indent = line.search(/[^ ]/);
    if (scalarIndent !== undefined && indent > scalarIndent) continue;
    scalarIndent = /(?:^|[\s:-])[|>][-+\d]*\s*(?:#.*)?$/.test(line) ? indent : undefined;
    if (!/^ *\t/.test(line)) continue;
    tabs.push({ line: index + 1, isKey: /^(?:- |[^#"'{[][^#]*?:(?:\s|$))/.test(line.trimStart()) });
  }
  return tabs;
}

/** Adds the line to each problem whose key stands in block style, which is how people write inventories. */
function withLines(problems: readonly ConfigProblem[], text: string): ConfigProblem[] {
  if (!problems.some(({ path, line }) => path !== "" && line === undefined)) return [...problems];
  const lines = new Map<string, { line: number; column: number }>();
  const parents: { indent: number; path: string }[] = [];
  for (const [index, source] of text.split("\n").entries()) {
    const match =
      /^( *)(?:"((?:[^"\\]|\\.)*)"\s*|'((?:[^']|'')*)'\s*|([^\s#"'\-[{&*!|>%@`][^#]*?|-[^\s#][^#]*?)):(?:\s|$)/
        .exec(source);
    if (!match) continue;
    const indent = match[1]!.length;
    while (parents.length > 0 && parents.at(-1)!.indent >= indent) parents.pop();
    const key = match[2] ?? match[3]?.replaceAll("''", "'") ?? match[4]!.trimEnd();
    const path = parents.length > 0 ? `${parents.at(-1)!.path}.${key}` : key;
    parents.push({ indent, path });
    const position = { line: index + 1, column: indent + 1 };
    if (!lines.has(path)) lines.set(path, position);
    // A host in flow style stands on one line, with all its fields.
    const flow = /:\s+(?:[&!]\S+\s+)*\{(.*)/.exec(source)?.[1];
    for (const [, field] of flow?.matchAll(/(?:^|,)\s*["']?([\w.-]+)["']?\s*:/g) ?? []) {
      if (!lines.has(`${path}.${field}`)) lines.set(`${path}.${field}`, position);
    }
  }
  return problems.map((problem) => ({ ...lines.get(problem.path), ...problem }));
}

/** How a problem is shown, on one line: `hosts.yaml:12: hosts.gpu-1.ssh_port: expected …`. */
export function formatConfigProblem(problem: ConfigProblem, origin: string): string {
  const { path, message, line, column } = problem;
  const place = [origin, line, path === "" ? column : undefined].filter((part) => part !== undefined).join(":");
  return path === "" ? `${place}: ${message}` : `${place}: ${path}: ${message}`;
}

/**
 * One node of the cluster, with the defaults applied.
 *
 * @example The address to use
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const node = new ClusterNode({ name: "gpu-1", tailscaleIp: "100.64.0.1", sshHost: "root@192.0.2.1" });
 * assertEquals(node.bestIp, "100.64.0.1");
 * assertEquals(node.addresses, ["100.64.0.1", "192.0.2.1"]);
 * assertEquals(node.dataServerBaseUrl, "http://100.64.0.1:8766");
 * assertEquals(node.sshUser, "root");
 * ```
 */
export class ClusterNode {
  /** The name in the inventory. */
  readonly name: string;
  /** The address inside the tailnet. */
  readonly tailscaleIp: string | undefined;
  /** A host, or `user@host`. */
  readonly sshHost: string | undefined;
  /** The SSH user: the one set, else the one in `sshHost`, else `ubuntu`. */
  readonly sshUser: string;
  /** The path of the SSH private key. */
  readonly sshKey: string | undefined;
  /** The SSH port. */
  readonly sshPort: number;
  /** Where the service is installed on the node. */
  readonly ringriftPath: string;
  /** A word such as `active`, `ready`, `offline`. */
  readonly status: string;
  /** A word such as `coordinator` or `worker`. */
  readonly role: string;
  /** Memory in GB; 0 where unknown. */
  readonly memoryGb: number;
  /** The number of CPU cores; 0 where unknown. */
  readonly cpus: number;
  /** The GPU model; empty where there is none. */
  readonly gpu: string;
  /** The port of the data server. */
  readonly dataServerPort: number;
  /** The base URL of the data server, where it is not `http://ADDRESS:PORT`. */
  readonly dataServerUrl: string | undefined;
  /** The host's mapping as written, for keys of the user's own. */
  readonly entry: HostEntry;

  /** Makes a node. Blank strings count as unset. */
  constructor(fields: ClusterNodeFields) {
    this.name = fields.name;
    this.tailscaleIp = nonBlank(fields.tailscaleIp);
    this.sshHost = nonBlank(fields.sshHost);
    this.sshUser = nonBlank(fields.sshUser) ?? nonBlank(splitUser(this.sshHost ?? "").user) ?? "ubuntu";
    this.sshKey = nonBlank(fields.sshKey);
    this.sshPort = fields.sshPort ?? 22;
    this.ringriftPath = nonBlank(fields.ringriftPath) ?? "~/ringrift/ai-service";
    this.status = nonBlank(fields.status) ?? "unknown";
    this.role = nonBlank(fields.role) ?? "unknown";
    this.memoryGb = fields.memoryGb ?? 0;
    this.cpus = fields.cpus ?? 0;
    this.gpu = nonBlank(fields.gpu) ?? "";
    this.dataServerPort = fields.dataServerPort ?? DATA_SYNC_PORT;
    this.dataServerUrl = nonBlank(fields.dataServerUrl);
    this.entry = fields.entry ?? {};
  }

  /** The address to use: the Tailscale one, else the host of `sshHost`; `undefined` where there is none. */
  get bestIp(): string | undefined {
    const address = this.tailscaleIp ?? hostOf(this.sshHost);
    return address && withoutBrackets(address);
  }

  /** Every distinct address, best first. */
  get addresses(): string[] {
    const best = this.bestIp;
    const host = hostOf(this.sshHost);
    if (best === undefined) return [];
    return host === undefined || withoutBrackets(host) === best ? [best] : [best, withoutBrackets(host)];
  }

  /** `dataServerUrl` as written, else `http://ADDRESS:PORT`; `undefined` where there is neither. */
  get dataServerBaseUrl(): string | undefined {
    return this.dataServerUrl ?? (this.bestIp && `http://${hostPort(this.bestIp, this.dataServerPort)}`);
  }

  /** Whether the status is none of `terminated`, `offline`, `setup`, `retired`, `archived`. */
  get isActive(): boolean {
    return !INACTIVE_STATUSES.has(this.status.toLowerCase());
  }
}

/**
 * All nodes by name, in the order of the inventory.
 *
 * A node's data port is its own `data_server_port`, else the inventory's `distributed.data_server_port`, else the same
 * key of the unified config, the YAML file that `RINGRIFT_CONFIG_PATH` names, else 8766.
 *
 * Permissions: those of {@linkcode loadHostsConfig}; env of `RINGRIFT_CONFIG_PATH` (unset where it may not be read) and
 * read of the file it names, where a node depends on it.
 *
 * @example List the nodes
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const nodes = await getClusterNodes({ hosts: { "gpu-1": { gpu: "H100" } }, elo_sync: {} });
 * assertEquals([...nodes.values()].map((node) => `${node.name}: ${node.gpu}`), ["gpu-1: H100"]);
 * ```
 *
 * @throws {HostsConfigError} if the inventory or the unified config cannot be read or used
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 */
export async function getClusterNodes(source?: ConfigSource): Promise<Map<string, ClusterNode>> {
  return await clusterNodes(await loadHostsConfig(source));
}

async function clusterNodes(config: HostsConfig): Promise<Map<string, ClusterNode>> {
  const entries = Object.entries(config.hosts ?? {});
  const needsDefault = entries.some(([, entry]) => isUnset(entry.data_server_port));
  const defaultPort = needsDefault ? await defaultDataPort(config) : DATA_SYNC_PORT;
  return new Map(entries.map(([name, entry]) => [name, nodeFromEntry(name, entry, defaultPort)]));
}

function nodeFromEntry(name: string, entry: HostEntry, defaultPort: number): ClusterNode {
  const text = (value: unknown) => {
    if (value === undefined || value === null) return undefined;
    const text = String(value);
    return text.includes("<") && PLACEHOLDER.test(text.trim()) ? undefined : text;
  };
  const number = (value: unknown) => isUnset(value) ? undefined : Number(value);
  return new ClusterNode({
    name,
    tailscaleIp: text(entry.tailscale_ip),
    sshHost: text(entry.ssh_host),
    sshUser: text(entry.ssh_user),
    sshKey: text(entry.ssh_key),
    sshPort: number(entry.ssh_port),
    ringriftPath: text(entry.ringrift_path),
    status: text(entry.status),
    role: text(entry.role),
    memoryGb: number(entry.memory_gb),
    cpus: number(entry.cpus),
    gpu: text(entry.gpu),
    dataServerPort: number(entry.data_server_port) ?? defaultPort,
    dataServerUrl: text(entry.data_server_url),
    entry,
  });
}

async function defaultDataPort(config: HostsConfig): Promise<number> {
  const own = dataPortOf(config);
  if (own !== undefined) return own;
  const unifiedPath = readEnv("RINGRIFT_CONFIG_PATH");
  if (unifiedPath === undefined) return DATA_SYNC_PORT;
  // Its other sections are another program's: they are not checked here.
  const { text, origin } = await readHostsConfig(unifiedPath);
  const { distributed } = parseHostsConfig(text, origin);
  return dataPortOf({ distributed }) ?? DATA_SYNC_PORT;
}

function dataPortOf(document: Readonly<Record<string, unknown>>): number | undefined {
  const section = document.distributed;
  const port = isMapping(section) ? section.data_server_port : undefined;
  return isUnset(port) ? undefined : Number(port);
}

/**
 * The active nodes, in the order of the inventory; see {@linkcode ClusterNode.isActive}.
 *
 * Permissions and errors: those of {@linkcode getClusterNodes}.
 *
 * @example Leave out what is offline
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const hosts = { "gpu-1": { status: "active" }, "gpu-2": { status: "offline" } };
 * const active = await getActiveNodes({ hosts, elo_sync: {} });
 * assertEquals(active.map((node) => node.name), ["gpu-1"]);
 * ```
 */
export async function getActiveNodes(source?: ConfigSource): Promise<ClusterNode[]> {
  return selectNodes((await getClusterNodes(source)).values());
}

/**
 * The node that `elo_sync.coordinator` names (`mac-studio` where it is unset), or `undefined` where
 * it is not in `hosts`.
 *
 * Permissions and errors: those of {@linkcode getClusterNodes}.
 *
 * @example Find the coordinator
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const config = { hosts: { head: { tailscale_ip: "100.64.0.9" } }, elo_sync: { coordinator: "head" } };
 * const coordinator = await getCoordinatorNode(config);
 * assertEquals(coordinator?.bestIp, "100.64.0.9");
 * ```
 */
export async function getCoordinatorNode(source?: ConfigSource): Promise<ClusterNode | undefined> {
  const config = await loadHostsConfig(source);
  return (await clusterNodes(config)).get(eloSyncConfig(config).coordinator);
}

/**
 * Where the coordinator's Elo database listens. Where the coordinator is not in `hosts`, or has no address,
 * `RINGRIFT_COORDINATOR_IP` gives the hostname; with neither, the result is `undefined`.
 *
 * Permissions: those of {@linkcode getClusterNodes}, and env of `RINGRIFT_COORDINATOR_IP` (unset where it may not be
 * read).
 *
 * @example Print the address
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const config = { hosts: { head: { ssh_host: "ops@192.0.2.9" } }, elo_sync: { coordinator: "head", sync_port: 9000 } };
 * assertEquals(await getCoordinatorAddress(config), { hostname: "192.0.2.9", port: 9000 });
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be used, or the variable holds no host
 */
export async function getCoordinatorAddress(source?: ConfigSource): Promise<CoordinatorAddress | undefined> {
  const config = await loadHostsConfig(source);
  const { coordinator, syncPort: port } = eloSyncConfig(config);
  const configured = (await clusterNodes(config)).get(coordinator)?.bestIp;
  if (configured) return { hostname: configured, port };
  const hostname = readEnv("RINGRIFT_COORDINATOR_IP");
  if (hostname === undefined) return undefined;
  const message = checkHost(hostname);
  if (message) throw new HostsConfigError("environment", [{ path: "RINGRIFT_COORDINATOR_IP", message }]);
  return { hostname: withoutBrackets(hostname), port };
}

/**
 * How the Elo ratings database is synchronised, with the defaults applied.
 *
 * Permissions and errors: those of {@linkcode loadHostsConfig}.
 *
 * @example A partial section
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const elo = await getEloSyncConfig({ hosts: {}, elo_sync: { sync_port: 9000 } });
 * assertEquals([elo.syncPort, elo.syncInterval, elo.transports], [9000, 300, ["tailscale", "aria2", "http"]]);
 * ```
 */
export async function getEloSyncConfig(source?: ConfigSource): Promise<EloSyncConfig> {
  return eloSyncConfig(await loadHostsConfig(source));
}

function eloSyncConfig(config: HostsConfig): EloSyncConfig {
  const { coordinator, sync_port, sync_interval, divergence_threshold, transports } = config.elo_sync ?? {};
  return {
    coordinator: isUnset(coordinator) ? "mac-studio" : String(coordinator).trim(),
    syncPort: isUnset(sync_port) ? ELO_SYNC_PORT : Number(sync_port),
    syncInterval: isUnset(sync_interval) ? 300 : Number(sync_interval),
    divergenceThreshold: isUnset(divergence_threshold) ? 50 : Number(divergence_threshold),
    transports: isUnset(transports) ? ["tailscale", "aria2", "http"] : transports as string[],
  };
}

/**
 * The nodes that a selection keeps, in their own order. Without a selection: the active ones.
 *
 * Permissions: none.
 *
 * @example A range, a role
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const nodes = [1, 2, 3].map((number) => new ClusterNode({ name: `gpu-${number}`, role: "worker" }));
 * const selected = selectNodes(nodes, { names: ["gpu-[2-3]"], roles: ["worker"] });
 * assertEquals(selected.map((node) => node.name), ["gpu-2", "gpu-3"]);
 * ```
 *
 * @throws {RangeError} if a pattern matches no node, or is none
 */
export function selectNodes(nodes: Iterable<ClusterNode>, selection: NodeSelection = {}): ClusterNode[] {
  const { names, exclude, roles, statuses, gpus, includeInactive = false } = selection;
  const all = [...nodes];
  const isNamed = names && matchNames(all, names);
  const isExcluded = exclude && matchNames(all, exclude);
  const lower = (words: readonly string[] | undefined) => words && new Set(words.map((word) => word.toLowerCase()));
  const [wantedRoles, wantedStatuses, wantedGpus] = [lower(roles), lower(statuses), lower(gpus)];
  const exactNames = new Set(names);

  return all.filter((node) =>
    (!isNamed || isNamed.has(node)) && !isExcluded?.has(node) &&
    (!wantedRoles || wantedRoles.has(node.role.toLowerCase())) &&
    (!wantedStatuses || wantedStatuses.has(node.status.toLowerCase())) &&
    (!wantedGpus || [...wantedGpus].some((gpu) => node.gpu.toLowerCase().includes(gpu))) &&
    (includeInactive || node.isActive || exactNames.has(node.name) || wantedStatuses !== undefined)
  );
}

function matchNames(nodes: readonly ClusterNode[], patterns: readonly string[]): Set<ClusterNode> {
  const byName = new Map(nodes.map((node) => [node.name, node]));
  const matched = new Set<ClusterNode>();
  const unmatched: string[] = [];
  for (const pattern of patterns) {
    const exact = byName.get(pattern);
    if (exact) {
      matched.add(exact);
      continue;
    }
    const matches = /[*?[]/.test(pattern) ? compilePattern(pattern) : undefined;
    const found = matches ? nodes.filter((node) => matches(node.name)) : [];
    if (found.length === 0) unmatched.push(pattern);
    for (const node of found) matched.add(node);
  }
  if (unmatched.length > 0) {
    const hints = unmatched.map((pattern) => {
      const near = nodes.find((node) => isTypo(pattern, node.name));
      return JSON.stringify(pattern) + (near ? ` (is ${JSON.stringify(near.name)} meant?)` : "");
    });
    throw new RangeError(`No node matches ${hints.join(", ")}`);
  }
  return matched;
}

function compilePattern(pattern: string): (name: string) => boolean {
  const ranges: { first: number; last: number; width: number }[][] = [];
  const source = pattern.replace(/\[([^\]]*)\]|[*?]|[\\^$.|+(){}[\]]/g, (token, list: string | undefined) => {
    if (token === "*") return ".*";
    if (token === "?") return ".";
    if (list === undefined) return `\\${token}`;
    ranges.push(
      list.split(",").map((part) => {
        const match = /^(\d+)(?:-(\d+))?$/.exec(part);
        const [first, last] = [Number(match?.[1]), Number(match?.[2] ?? match?.[1])];
        if (!match || first > last) {
          throw new RangeError(
            `Cannot read the range in ${JSON.stringify(pattern)}: expected numbers, as in gpu-[1-8,12]`,
          );
        }
        // As in the shell: [08-12] is 08, 09, 10 …, while [8-12] is 8, 9, 10 …
        return { first, last, width: /^0\d/.test(match[1]!) ? match[1]!.length : 0 };
      }),
    );
    return "(\\d+)";
  });
  const expression = new RegExp(`^${source}$`, "su");
  return (name) => {
    const match = expression.exec(name);
    return match !== null && ranges.every((parts, index) => {
      const digits = match[index + 1]!;
      const number = Number(digits);
      return parts.some(({ first, last, width }) =>
        number >= first && number <= last && digits === String(number).padStart(width, "0")
      );
    });
  };
}

/** Where and how one check is done. */
interface Endpoint {
  readonly address: string;
  readonly port: number;
  readonly path: string;
  readonly isTls: boolean;
}

interface Outcome {
  readonly endpoint: Endpoint;
  readonly state: NodeState;
  readonly connectMs?: number;
  readonly status?: StatusDocument;
  readonly failure?: ProbeFailure;
}

interface ProbeSettings {
  readonly port: number | undefined;
  readonly path: string;
  readonly check: "http" | "tcp";
  readonly timeoutMs: number;
  /** Whether every host may be connected to, so that thousands need no query of their own. */
  readonly isNetOpen: boolean;
  /** The nodes that are being checked. */
  readonly running: Deadlines;
}

function probeSettings(options: ProbeOptions): ProbeSettings {
  const { port, path = "/status", check = "http", timeoutMs = DEFAULT_TIMEOUT_MS } = options;
  if (port !== undefined && !isPort(port)) throw new RangeError(`Cannot check port ${port}: expected 1 to 65535`);
  if (!/^\/[!-~]*$/.test(path)) {
    throw new TypeError(`Cannot ask for ${JSON.stringify(path)}: expected a path that begins with "/", URL-encoded`);
  }
  if (check !== "http" && check !== "tcp") throw new TypeError(`Cannot check "${check}": expected "http" or "tcp"`);
  // A longer delay overflows the timer, which then fires at once.
  if (!(timeoutMs > 0 && timeoutMs < 2 ** 31)) {
    throw new RangeError(`Cannot wait for ${timeoutMs} ms: expected a number above 0 and below 2 ** 31`);
  }
  const isNetOpen = Deno.permissions.querySync({ name: "net" }).state === "granted";
  return { port, path, check, timeoutMs, isNetOpen, running: new Deadlines(timeoutMs) };
}

/**
 * The deadlines of all nodes that are being checked. Each has the same time, so that they end in the order of their
 * start, and one timer serves them all.
 */
class Deadlines {
  readonly #timeoutMs: number;
  readonly #endsMs = new Map<AbortController, number>();
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs;
  }

  start(): AbortController {
    const controller = new AbortController();
    this.#endsMs.set(controller, performance.now() + this.#timeoutMs);
    this.#timer ??= setTimeout(() => this.#expire(), this.#timeoutMs);
    return controller;
  }

  end(controller: AbortController): void {
    this.#endsMs.delete(controller);
    if (this.#endsMs.size > 0) return;
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  abortAll(): void {
    for (const controller of this.#endsMs.keys()) controller.abort();
  }

  #expire(): void {
    this.#timer = undefined;
    for (const [controller, endMs] of this.#endsMs) {
      const restMs = endMs - performance.now();
      if (restMs > 0) {
        this.#timer = setTimeout(() => this.#expire(), restMs);
        return;
      }
      this.#endsMs.delete(controller);
      controller.abort(new DOMException(`no answer within ${this.#timeoutMs} ms`, "TimeoutError"));
    }
  }
}

/**
 * Whether a node accepts a TCP connection, at any of its addresses, within the deadline.
 *
 * Permissions: net to each `address:port` of the node.
 *
 * @example Is the data server listening?
 * ```ts
 * import { assert } from "jsr:@std/assert@^1.0.19";
 *
 * using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const node = new ClusterNode({ name: "gpu-1", tailscaleIp: "127.0.0.1", dataServerPort: listener.addr.port });
 * assert(await checkNodeReachable(node, { timeoutMs: 1000 }));
 * ```
 *
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 * @throws {RangeError} if the port or the timeout is out of range
 */
export async function checkNodeReachable(node: ClusterNode, options: ProbeOptions = {}): Promise<boolean> {
  const probe = await probeNode(node, { ...options, check: "tcp" });
  throwIfDenied([probe], options.port);
  return probe.state === "up";
}

/**
 * The JSON object at `http://hostname:port/status`, or `undefined` where there is no such answer. The request goes
 * straight to the host: no proxy, no redirect, no compression, 1 MiB of body at most.
 *
 * Permissions: net to `hostname:port`.
 *
 * @example How many games?
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const answer = () => Response.json({ game_count: 7 });
 * await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, answer);
 * const status = await checkHttpEndpoint("127.0.0.1", server.addr.port, { timeoutMs: 1000 });
 * assertEquals(status?.game_count, 7);
 * ```
 *
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 * @throws {RangeError} if the port or the timeout is out of range
 * @throws {TypeError} if the path is none
 */
export async function checkHttpEndpoint(
  hostname: string,
  port: number,
  options: HttpCheckOptions = {},
): Promise<StatusDocument | undefined> {
  const probe = await probeNode(new ClusterNode({ name: hostname, tailscaleIp: hostname }), { ...options, port });
  throwIfDenied([probe], port);
  return probe.status;
}

/**
 * Checks one node. Its addresses are tried best first, each with its `data_server_url` last where no port was asked
 * for: the next one starts when the one before has failed, or after a second (a share of the deadline, where that is
 * shorter), and the first that is up ends the rest. No fault of the node rejects the call.
 *
 * Permissions: net to each `address:port` of the node. Where it is missing, the state is `unknown` and the failure
 * `denied`.
 *
 * @example One answer, with the reason
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const probe = await probeNode(new ClusterNode({ name: "gpu-1" }));
 * assertEquals([probe.state, probe.failure?.code], ["down", "no-address"]);
 * ```
 *
 * @throws {RangeError} if the port or the timeout is out of range
 * @throws {TypeError} if the path or the check is none
 */
export async function probeNode(node: ClusterNode, options: ProbeOptions = {}): Promise<NodeProbe> {
  const [probe] = await sweep([node], nodeEndpoints, options);
  return probe!;
}

/**
 * Checks many nodes in parallel, and gives one outcome for each, in their order: it takes as long as the slowest
 * answer, not as their sum. A local shortage of descriptors is waited out within each node's deadline.
 *
 * Permissions: net to each `address:port` of the nodes.
 *
 * @example Sweep, and watch it go
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const answer = () => Response.json({ version: "1" });
 * await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, answer);
 * const nodes = ["a", "b"].map((name) => new ClusterNode({ name, tailscaleIp: "127.0.0.1" }));
 * let checked = 0;
 * const probes = await probeNodes(nodes, { port: server.addr.port, onProbe: () => checked++ });
 * assertEquals(probes.map((probe) => probe.state), ["up", "up"]);
 * assertEquals(checked, 2);
 * ```
 *
 * @throws {RangeError} if the port, the timeout or the concurrency is out of range
 * @throws {TypeError} if the path or the check is none
 */
export async function probeNodes(nodes: Iterable<ClusterNode>, options: SweepOptions = {}): Promise<NodeProbe[]> {
  return await sweep([...nodes], nodeEndpoints, options);
}

async function sweep(
  nodes: readonly ClusterNode[],
  endpointsOf: (node: ClusterNode, settings: ProbeSettings) => Endpoint[],
  options: SweepOptions,
): Promise<NodeProbe[]> {
  const { concurrency = DEFAULT_CONCURRENCY, onProbe, signal } = options;
  if (!(Number.isInteger(concurrency) && concurrency > 0)) {
    throw new RangeError(`Cannot check ${concurrency} nodes at once: expected an integer above 0`);
  }
  const settings = probeSettings(options);
  signal?.throwIfAborted();
  openSignalSockets();

  const probes = new Array<NodeProbe>(nodes.length);
  const ended = new AbortController();
  let next = 0;
  const work = async () => {
    while (next < nodes.length) {
      const index = next++;
      const probe = await probeAt(nodes[index]!, endpointsOf, settings);
      if (ended.signal.aborted) return;
      probes[index] = probe;
      onProbe?.(probe);
    }
  };
  // Where nodes answer at once, few checks at a time are the fastest; where they do not, all are under way in no time.
  const workAll = async () => {
    const workers: Promise<void>[] = [];
    while (workers.length < concurrency && next < nodes.length && !ended.signal.aborted) {
      const more = Math.min(workers.length || FIRST_CONCURRENCY, concurrency - workers.length, nodes.length - next);
      for (let started = 0; started < more; started++) workers.push(work());
      if (next < nodes.length) await settledOrAfter(Promise.all(workers), MORE_CONCURRENCY_MS, ended.signal);
    }
    await Promise.all(workers);
  };
  // One listener for the whole call: with one for each node, to remove them would take longer than to connect.
  const abortion = Promise.withResolvers<never>();
  const abort = () => abortion.reject(signal?.reason);
  signal?.addEventListener("abort", abort);
  try {
    await Promise.race([workAll(), abortion.promise]);
    return probes;
  } finally {
    signal?.removeEventListener("abort", abort);
    ended.abort();
    settings.running.abortAll();
  }
}

/**
 * Half a second after its start, Deno opens two sockets of its own for signals, and panics if a sweep has taken the last
 * descriptor by then. This has it open them now.
 */
function openSignalSockets(): void {
  const ignore = () => {};
  try {
    Deno.addSignalListener("SIGWINCH", ignore);
    Deno.removeSignalListener("SIGWINCH", ignore);
  } catch {
    // Where there are no such signals, there are no such sockets.
  }
}

function nodeEndpoints(node: ClusterNode, settings: ProbeSettings): Endpoint[] {
  const { port = node.dataServerPort, path } = settings;
  const endpoints = node.addresses.map((address): Endpoint => ({ address, port, path, isTls: false }));
  if (settings.port === undefined && node.dataServerUrl) endpoints.push(...urlEndpoint(node, settings));
  return endpoints;
}

/** The check at `data_server_url`, which may have a path of its own. */
function urlEndpoint(node: ClusterNode, settings: ProbeSettings): Endpoint[] {
  if (!node.dataServerUrl || !URL.canParse(node.dataServerUrl)) return [];
  const { hostname, port, pathname, protocol } = new URL(node.dataServerUrl);
  const isTls = protocol === "https:";
  return [{
    address: withoutBrackets(hostname),
    port: Number(port) || (isTls ? 443 : 80),
    path: pathname.replace(/\/+$/, "") + settings.path,
    isTls,
  }];
}

function dataServerEndpoints(node: ClusterNode, settings: ProbeSettings): Endpoint[] {
  return node.dataServerUrl ? urlEndpoint(node, settings) : nodeEndpoints(node, settings);
}

const STATE_RANK: Readonly<Record<NodeState, number>> = { up: 3, unhealthy: 2, unknown: 1, down: 0 };

async function probeAt(
  node: ClusterNode,
  endpointsOf: (node: ClusterNode, settings: ProbeSettings) => Endpoint[],
  settings: ProbeSettings,
): Promise<NodeProbe> {
  const outcomes = await tryEndpoints(endpointsOf(node, settings), settings);
  const best = outcomes.toSorted((a, b) => STATE_RANK[b.state] - STATE_RANK[a.state])[0];
  if (!best) {
    return {
      node,
      state: "down",
      address: undefined,
      port: settings.port ?? node.dataServerPort,
      connectMs: undefined,
      status: undefined,
      failure: { code: "no-address", message: "no address: set tailscale_ip or ssh_host" },
    };
  }
  const { state, endpoint, connectMs, status, failure } = best;
  return {
    node,
    state,
    address: connectMs === undefined ? undefined : endpoint.address,
    port: endpoint.port,
    connectMs,
    status,
    failure: failure && connectMs === undefined && outcomes.length > 1
      ? {
        code: failure.code,
        message: outcomes.map((it) => `${it.endpoint.address}: ${it.failure?.message}`).join("; "),
      }
      : failure,
  };
}

/** The outcome at each endpoint that was tried, in their order; the last started one that is up ends the others. */
async function tryEndpoints(endpoints: readonly Endpoint[], settings: ProbeSettings): Promise<Outcome[]> {
  const { timeoutMs, running } = settings;
  const controller = running.start();
  try {
    const [only] = endpoints;
    if (only && endpoints.length === 1) return [await tryEndpoint(only, settings, controller.signal)];
    const nextMs = Math.min(NEXT_ADDRESS_MS, timeoutMs / endpoints.length);
    const attempts: Promise<Outcome>[] = [];
    for (const endpoint of endpoints) {
      if (controller.signal.aborted) break;
      const attempt = tryEndpoint(endpoint, settings, controller.signal).then((outcome) => {
        if (outcome.state === "up") controller.abort();
        return outcome;
      });
      attempts.push(attempt);
      await settledOrAfter(attempt, nextMs, controller.signal);
    }
    return await Promise.all(attempts);
  } finally {
    running.end(controller);
  }
}

async function settledOrAfter(promise: Promise<unknown>, ms: number, signal: AbortSignal): Promise<void> {
  const settled = new AbortController();
  const pause = delay(ms, { signal: AbortSignal.any([signal, settled.signal]) }).catch(() => {});
  try {
    await Promise.race([promise, pause]);
  } finally {
    settled.abort();
  }
}

async function tryEndpoint(endpoint: Endpoint, settings: ProbeSettings, signal: AbortSignal): Promise<Outcome> {
  const started = performance.now();
  let connectMs: number | undefined;
  try {
    if (!settings.isNetOpen) requireNet(hostPort(endpoint.address, endpoint.port));
    const conn = await connect(endpoint, signal);
    connectMs = performance.now() - started;
    if (settings.check === "tcp") {
      conn.close();
      return { endpoint, state: "up", connectMs };
    }
    return { endpoint, state: "up", connectMs, status: await requestStatus(conn, endpoint, signal) };
  } catch (error) {
    const fault = signal.aborted && !(error instanceof ProbeFault) ? signal.reason : error;
    const failure = connectMs === undefined ? connectFailure(fault) : responseFailure(fault);
    const isLocal = failure.code === "denied" || failure.code === "local-resource";
    const state = isLocal ? "unknown" : connectMs === undefined ? "down" : "unhealthy";
    return connectMs === undefined ? { endpoint, state, failure } : { endpoint, state, connectMs, failure };
  }
}

async function connect({ address, port }: Endpoint, signal: AbortSignal): Promise<Deno.TcpConn> {
  const isLiteral = address.includes(":") || /^\d+\.\d+\.\d+\.\d+$/.test(address);
  if (isLiteral) return await connectTo(address, port, signal);
  let fault: unknown;
  for (const resolved of await lookUp(address, port, signal)) {
    // By its address where that is permitted, else by its name again, as the flag says.
    const isPermitted = netState(hostPort(resolved, port)) === "granted";
    try {
      return await connectTo(isPermitted ? resolved : address, port, signal);
    } catch (error) {
      fault = error;
      if (signal.aborted || !isPermitted) break;
    }
  }
  throw fault;
}

async function connectTo(hostname: string, port: number, signal: AbortSignal): Promise<Deno.TcpConn> {
  let shortage: ProbeFault | undefined;
  for (let waitMs = 5;; waitMs = Math.min(waitMs * 2, 100)) {
    try {
      return await Deno.connect({ hostname, port, signal });
    } catch (error) {
      // The node had only the rest of its time: that it did not answer within it says nothing.
      if (shortage && signal.aborted) throw shortage;
      if (!["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"].includes(errorCode(error))) throw error;
      shortage = new ProbeFault("local-resource", `this machine ran out of descriptors (${errorCode(error)})`);
      // Other checks of this very sweep give their descriptors back: wait, with jitter, until the node's deadline.
      await delay(waitMs * (0.5 + Math.random()), { signal }).catch(() => {});
      if (signal.aborted) throw shortage;
    }
  }
}

let lookupsRunning = 0;
const lookupsWaiting = new Set<() => void>();

/**
 * The addresses of a name. A lookup cannot be cancelled and occupies a thread until it ends, however long after the
 * deadline, so its turn is given on only then.
 */
async function lookUp(name: string, port: number, signal: AbortSignal): Promise<string[]> {
  // Loaded for names alone: it doubles the time that a program takes to start.
  const { lookup } = await import("node:dns");
  const timedOut = new ProbeFault("timeout", "the name lookup did not end in time");
  return await new Promise((resolve, reject) => {
    const abort = () => {
      lookupsWaiting.delete(start);
      reject(timedOut);
    };
    const start = () => {
      lookupsRunning++;
      // Deno checks the net permission of exactly this port, where it is given.
      const options = { all: true, port } as { all: true };
      lookup(name, options, (error, found) => {
        lookupsRunning--;
        const next = lookupsWaiting.values().next().value;
        if (next) {
          lookupsWaiting.delete(next);
          next();
        }
        signal.removeEventListener("abort", abort);
        if (error) reject(new ProbeFault("dns", `the name does not resolve (${error.code ?? error.message})`));
        else resolve(found.map(({ address }) => address));
      });
    };
    if (signal.aborted) return reject(timedOut);
    signal.addEventListener("abort", abort);
    if (lookupsRunning < MAX_LOOKUPS) start();
    else lookupsWaiting.add(start);
  });
}

/** A failed check whose reason is known where it is found. */
class ProbeFault extends Error {
  readonly code: FailureCode;

  constructor(code: FailureCode, message: string) {
    super(message);
    this.code = code;
  }
}

function connectFailure(error: unknown): ProbeFailure {
  if (error instanceof ProbeFault) return { code: error.code, message: error.message };
  if (error instanceof Deno.errors.NotCapable) return { code: "denied", message: error.message };
  if (isTimeout(error)) return { code: "timeout", message: errorText(error) };
  switch (errorCode(error)) {
    case "ECONNREFUSED":
      return { code: "refused", message: "connection refused" };
    case "ENETUNREACH":
    case "EHOSTUNREACH":
      return { code: "unreachable", message: "no route to the host" };
    case "EACCES":
    case "EPERM":
    case "EINVAL":
      return { code: "unreachable", message: "blocked by a route or a firewall of this machine" };
    case "ETIMEDOUT":
      return { code: "timeout", message: "the system gave up connecting" };
    case "EADDRNOTAVAIL":
      return { code: "local-resource", message: "this machine has no local address or port left for it" };
  }
  if (/failed to lookup address/.test(errorText(error))) return { code: "dns", message: "the name does not resolve" };
  return { code: "other", message: errorText(error) };
}

function responseFailure(error: unknown): ProbeFailure {
  if (error instanceof ProbeFault) return { code: error.code, message: error.message };
  if (isTimeout(error)) return { code: "timeout", message: `accepted, but ${errorText(error)}` };
  if (error instanceof Deno.errors.InvalidData) return { code: "bad-response", message: `TLS: ${errorText(error)}` };
  return { code: "bad-response", message: `the connection broke (${errorText(error)})` };
}

function isTimeout(error: unknown): boolean {
  return error instanceof DOMException && error.name === "TimeoutError";
}

/**
 * One GET over a connection that is already made. Neither `fetch` nor `node:http` fits a sweep: the one obeys proxies
 * of the environment, the other takes twice the time and memory (README, Performance).
 */
async function requestStatus(tcp: Deno.TcpConn, endpoint: Endpoint, signal: AbortSignal): Promise<StatusDocument> {
  const { address, port, path, isTls } = endpoint;
  let conn: Deno.Conn = tcp;
  let isOpen = true;
  const close = () => {
    if (!isOpen) return;
    isOpen = false;
    try {
      conn.close();
    } catch {
      // A TLS handshake has taken it over, and is closed in its place.
    }
  };
  // Closing the connection is what ends a read that never returns.
  signal.addEventListener("abort", close);
  try {
    signal.throwIfAborted();
    if (isTls) {
      conn = await Deno.startTls(tcp, { hostname: address });
      isOpen = true;
      signal.throwIfAborted();
    }
    const request = new TextEncoder().encode(
      `GET ${path} HTTP/1.1\r\nHost: ${hostPort(address, port)}\r\nAccept: application/json\r\n` +
        "Accept-Encoding: identity\r\nUser-Agent: cluster-hosts\r\nConnection: close\r\n\r\n",
    );
    for (let sent = 0; sent < request.length;) sent += await conn.write(request.subarray(sent));
    return parseStatus(await readBody(new ResponseReader(conn)));
  } finally {
    signal.removeEventListener("abort", close);
    close();
  }
}

/** Reads an answer piece by piece, never more than it may have. */
class ResponseReader {
  readonly #conn: Deno.Conn;
  #buffer = new Uint8Array(2048);
  #start = 0;
  #end = 0;

  constructor(conn: Deno.Conn) {
    this.#conn = conn;
  }

  /** What was read and not taken yet. */
  get pending(): Uint8Array<ArrayBuffer> {
    return this.#buffer.subarray(this.#start, this.#end);
  }

  /** Reads once; `false` at the end of the stream. */
  async fill(): Promise<boolean> {
    if (this.#end === this.#buffer.length) {
      const larger = new Uint8Array(Math.max(this.#buffer.length, 2 * this.pending.length));
      larger.set(this.pending);
      this.#end -= this.#start;
      this.#start = 0;
      this.#buffer = larger;
    }
    const count = await this.#conn.read(this.#buffer.subarray(this.#end));
    this.#end += count ?? 0;
    return count !== null;
  }

  /** Takes `length` bytes, which are valid until the next read. */
  async take(length: number): Promise<Uint8Array<ArrayBuffer>> {
    while (this.#end - this.#start < length) {
      if (!await this.fill()) throw new ProbeFault("bad-response", "the answer ended before it was complete");
    }
    this.#start += length;
    return this.#buffer.subarray(this.#start - length, this.#start);
  }

  /** Takes the text up to `end`, and `end` itself: `\n`, or `\n\n` for a head with its empty line. */
  async text(end: "\n" | "\n\n", maxBytes: number): Promise<string> {
    for (let searched = 0;;) {
      const pending = this.pending;
      for (let at = pending.indexOf(10, searched); at >= 0; at = pending.indexOf(10, at + 1)) {
        if (at > maxBytes) break;
        const next = pending[at + 1] === 13 ? at + 2 : at + 1;
        if (end === "\n") return LATIN1.decode(await this.take(at + 1)).trimEnd();
        if (pending[next] === 10) return LATIN1.decode(await this.take(next + 1)).trimEnd();
        searched = at;
      }
      if (end === "\n") searched = pending.length;
      if (pending.length > maxBytes) {
        throw end === "\n"
          ? new ProbeFault("bad-response", "a chunk without a size, or longer than it")
          : new ProbeFault("too-large", `the head of the answer is larger than ${MAX_HEAD_BYTES} bytes`);
      }
      if (!await this.fill()) throw new ProbeFault("bad-response", "the connection was closed without an answer");
    }
  }

  /** Takes all that comes until the stream ends. */
  async rest(maxBytes: number): Promise<Uint8Array<ArrayBuffer>> {
    while (await this.fill()) if (this.pending.length > maxBytes) throw tooLarge();
    return await this.take(this.pending.length);
  }
}

const LATIN1 = new TextDecoder("latin1");

function tooLarge(): ProbeFault {
  return new ProbeFault("too-large", `the answer is larger than ${MAX_BODY_BYTES} bytes`);
}

async function readBody(reader: ResponseReader): Promise<Uint8Array<ArrayBuffer>> {
  const { status, headers } = await readHead(reader);
  if (status >= 300 && status < 400) {
    const location = headers.get("location");
    throw new ProbeFault("redirect", `HTTP ${status}, a redirect${location ? ` to ${location.slice(0, 200)}` : ""}`);
  }
  if (status < 200 || status >= 300) throw new ProbeFault("http-status", `HTTP ${status}`);
  if (status === 204 || status === 205) throw new ProbeFault("bad-response", `HTTP ${status}, without a body`);
  const encoding = headers.get("content-encoding");
  if (encoding && encoding.toLowerCase() !== "identity") {
    throw new ProbeFault("bad-response", "the answer is compressed, which was not asked for");
  }
  const transfer = headers.get("transfer-encoding");
  if (transfer !== undefined) {
    if (transfer.toLowerCase() !== "chunked") throw new ProbeFault("bad-response", "an unknown transfer encoding");
    return await readChunks(reader);
  }
  const length = headers.get("content-length");
  if (length === undefined) return await reader.rest(MAX_BODY_BYTES);
  if (!/^\d+$/.test(length)) throw new ProbeFault("bad-response", "a content length that is no number");
  if (Number(length) > MAX_BODY_BYTES) throw tooLarge();
  return await reader.take(Number(length));
}

async function readHead(reader: ResponseReader): Promise<{ status: number; headers: Map<string, string> }> {
  // Answers 1xx may come before the one that counts; all of them share the limit.
  for (let budget = MAX_HEAD_BYTES;;) {
    while (reader.pending.length < 5) {
      if (!await reader.fill()) throw new ProbeFault("bad-response", "the connection was closed without an answer");
    }
    if (LATIN1.decode(reader.pending.subarray(0, 5)) !== "HTTP/") {
      throw new ProbeFault("bad-response", "the answer is not HTTP");
    }
    const head = await reader.text("\n\n", budget);
    const [start = "", ...lines] = head.split("\n");
    const status = Number(/^HTTP\/1\.\d (\d{3})(?:\s|$)/.exec(start)?.[1]);
    if (!status) throw new ProbeFault("bad-response", "the answer is not HTTP/1");
    budget -= head.length;
    if (status < 200) continue;
    const headers = new Map<string, string>();
    for (const line of lines) {
      const colon = line.indexOf(":");
      if (colon > 0) headers.set(line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim());
    }
    return { status, headers };
  }
}

async function readChunks(reader: ResponseReader): Promise<Uint8Array<ArrayBuffer>> {
  const chunks: Uint8Array<ArrayBuffer>[] = [];
  let total = 0;
  while (true) {
    const digits = /^([0-9a-f]{1,8})\s*(?:;.*)?$/i.exec(await reader.text("\n", 1024))?.[1];
    if (!digits) throw new ProbeFault("bad-response", "a chunk without a size");
    const size = parseInt(digits, 16);
    total += size;
    if (total > MAX_BODY_BYTES) throw tooLarge();
    if (size === 0) break;
    chunks.push((await reader.take(size)).slice());
    if (await reader.text("\n", 2) !== "") throw new ProbeFault("bad-response", "a chunk longer than its size");
  }
  const body = new Uint8Array(total);
  let offset = 0;
  for (const chunk of chunks) {
    body.set(chunk, offset);
    offset += chunk.length;
  }
  return body;
}

function parseStatus(body: Uint8Array<ArrayBuffer>): StatusDocument {
  let document: unknown;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(body);
    document = JSON.parse(text);
    if (depthOf(text) > MAX_STATUS_DEPTH) throw new RangeError("nested too deeply");
  } catch (error) {
    const reason = error instanceof RangeError ? "is nested too deeply" : "is not JSON";
    throw new ProbeFault("bad-response", `the answer ${reason}`);
  }
  if (isMapping(document)) return document;
  throw new ProbeFault("bad-response", `the answer is JSON, but ${typeName(document)}, not an object`);
}

/** How deeply JSON is nested: what `JSON.parse` takes can be too deep for `JSON.stringify`. */
function depthOf(json: string): number {
  // Below this, it cannot be too deep.
  if (json.length <= 2 * MAX_STATUS_DEPTH) return 0;
  let depth = 0;
  let deepest = 0;
  for (const [token] of json.matchAll(/"(?:[^"\\]|\\.)*"|[[{]|[\]}]/g)) {
    if (token === "[" || token === "{") deepest = Math.max(deepest, ++depth);
    else if (token === "]" || token === "}") depth--;
  }
  return deepest;
}

/**
 * The active nodes of an inventory that are up, in its order.
 *
 * Permissions: those of {@linkcode getClusterNodes}, and net to each `address:port` of the nodes.
 *
 * @example Who answers?
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const answer = () => Response.json({ version: "2" });
 * await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, answer);
 * const hosts = { "gpu-1": { tailscale_ip: "127.0.0.1", data_server_port: server.addr.port }, "gpu-2": {} };
 * const reachable = await discoverReachableNodes({ source: { hosts, elo_sync: {} } });
 * assertEquals(reachable.map(({ node, status }) => `${node.name}: ${status.version}`), ["gpu-1: 2"]);
 * ```
 *
 * @throws {Deno.errors.NotCapable} if a permission is missing: a node that may not be checked never looks down
 * @throws {HostsConfigError} if the inventory cannot be used
 */
export async function discoverReachableNodes(options: DiscoverOptions = {}): Promise<ReachableNode[]> {
  const nodes = selectNodes((await getClusterNodes(options.source)).values(), options.selection);
  return await reachableNodes(nodes, nodeEndpoints, options);
}

async function reachableNodes(
  nodes: readonly ClusterNode[],
  endpointsOf: (node: ClusterNode, settings: ProbeSettings) => Endpoint[],
  options: SweepOptions,
): Promise<ReachableNode[]> {
  const probes = await sweep(nodes, endpointsOf, options);
  throwIfDenied(probes, options.port);
  return probes.flatMap(({ node, state, status = {}, address, connectMs }) =>
    state === "up" && address !== undefined && connectMs !== undefined ? [{ node, status, address, connectMs }] : []
  );
}

/**
 * `http://ADDRESS:PORT/PATH` of each active node whose `/status` on that port answers, in the order of the inventory,
 * without duplicates, at the address that answered.
 *
 * Permissions: those of {@linkcode discoverReachableNodes}; with `excludeSelf` those of {@linkcode getDataSyncUrls}.
 *
 * @example The model servers
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const source = { hosts: { "gpu-1": { tailscale_ip: "100.64.0.1" } }, elo_sync: {} };
 * const urls = await getSyncUrls({ source, port: MODEL_SYNC_PORT, path: "/models", reachableOnly: false });
 * assertEquals(urls, ["http://100.64.0.1:8765/models"]);
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 */
export async function getSyncUrls(options: SyncUrlOptions = {}): Promise<string[]> {
  const { port = DATA_SYNC_PORT, path = "/db", ...rest } = options;
  probeSettings({ port, path });
  const url = (address: string) => `http://${hostPort(address, port)}${path}`;
  return await syncUrls({ excludeSelf: false, ...rest }, {
    check: { port, path: "/status" },
    endpointsOf: nodeEndpoints,
    checkedUrl: (_node, address) => url(address),
    uncheckedUrl: ({ bestIp }) => bestIp === undefined ? undefined : url(bestIp),
  });
}

/**
 * The URLs of the Elo database on the nodes that answer: {@linkcode getSyncUrls} at the port that `elo_sync.sync_port`
 * sets.
 *
 * Permissions and errors: those of {@linkcode getSyncUrls}.
 *
 * @example The configured port
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const source = { hosts: { "gpu-1": { tailscale_ip: "fd7a::1" } }, elo_sync: { sync_port: 9000 } };
 * assertEquals(await getEloSyncUrls({ source, reachableOnly: false }), ["http://[fd7a::1]:9000/db"]);
 * ```
 */
export async function getEloSyncUrls(options: SyncUrlOptions = {}): Promise<string[]> {
  const source = await loadHostsConfig(options.source);
  return await getSyncUrls({ ...options, source, port: options.port ?? eloSyncConfig(source).syncPort });
}

/**
 * The base URL of the data server of each active node that answers, this host left out: each is checked at its own
 * data server port, or at its `data_server_url`.
 *
 * This host is a node named like it (`RINGRIFT_NODE_ID`, else the hostname, whole or to its first dot, in any case), or
 * one with an address of this host, where `networkInterfaces` may be read.
 *
 * Permissions: those of {@linkcode discoverReachableNodes}; with `excludeSelf`, env of `RINGRIFT_NODE_ID` (unset where
 * it may not be read), sys of `hostname` where that is unset, and of `networkInterfaces` where it is granted.
 *
 * @example Every configured data server
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const source = { hosts: { "gpu-1": { ssh_host: "192.0.2.1", data_server_port: 9001 } }, elo_sync: {} };
 * assertEquals(await getDataSyncUrls({ source, excludeSelf: false, reachableOnly: false }), ["http://192.0.2.1:9001"]);
 * ```
 *
 * @throws {HostsConfigError} if the inventory cannot be used
 * @throws {Deno.errors.NotCapable} if a permission is missing; the message names the flag
 */
export async function getDataSyncUrls(options: DataSyncUrlOptions = {}): Promise<string[]> {
  return await syncUrls({ excludeSelf: true, ...options }, {
    check: {},
    endpointsOf: dataServerEndpoints,
    checkedUrl: (node, address) => node.dataServerUrl ?? `http://${hostPort(address, node.dataServerPort)}`,
    uncheckedUrl: (node) => node.dataServerBaseUrl,
  });
}

async function syncUrls(
  options: DataSyncUrlOptions,
  kind: {
    readonly check: { readonly port?: number; readonly path?: string };
    readonly endpointsOf: (node: ClusterNode, settings: ProbeSettings) => Endpoint[];
    readonly checkedUrl: (node: ClusterNode, address: string) => string;
    readonly uncheckedUrl: (node: ClusterNode) => string | undefined;
  },
): Promise<string[]> {
  const { source, selection, excludeSelf, reachableOnly = true, ...sweepOptions } = options;
  sweepOptions.signal?.throwIfAborted();
  const selected = selectNodes((await getClusterNodes(source)).values(), selection);
  const isSelf = excludeSelf ? selfTest() : () => false;
  const nodes = selected.filter((node) => !isSelf(node));
  const urls = reachableOnly
    ? (await reachableNodes(nodes, kind.endpointsOf, { ...sweepOptions, ...kind.check }))
      .map(({ node, address }) => kind.checkedUrl(node, address))
    : nodes.map(kind.uncheckedUrl).filter((url) => url !== undefined);
  return [...new Set(urls)];
}

function selfTest(): (node: ClusterNode) => boolean {
  const nodeId = readEnv("RINGRIFT_NODE_ID");
  if (nodeId === undefined) {
    requirePermission({ name: "sys", kind: "hostname" }, "--allow-sys=hostname", "to leave out this host itself");
  }
  const name = (nodeId ?? Deno.hostname()).toLowerCase();
  const names = new Set([name, name.split(".", 1)[0]!]);
  const mayReadAddresses = Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" }).state === "granted";
  const addresses = new Set(
    (mayReadAddresses ? Deno.networkInterfaces() : []).map(({ address }) => address.toLowerCase()),
  );
  return (node) =>
    names.has(node.name.toLowerCase()) || node.addresses.some((address) => addresses.has(address.toLowerCase()));
}

/**
 * The argument list, `ssh` first, that runs a command on a node, without a password prompt and with a bounded
 * connect. The command is what ssh itself takes: its words are joined by spaces and read by the remote shell.
 *
 * Permissions: none; running it needs run of `ssh`.
 *
 * @example Ask for the load
 * ```ts
 * import { assertEquals } from "jsr:@std/assert@^1.0.19";
 *
 * const node = new ClusterNode({ name: "gpu-1", tailscaleIp: "100.64.0.1" });
 * assertEquals(
 *   sshCommand(node, ["uptime"]).join(" "),
 *   "ssh -o BatchMode=yes -o ConnectTimeout=10 -p 22 -- ubuntu@100.64.0.1 uptime",
 * );
 * ```
 *
 * @throws {TypeError} if the node has no address, or if a host, a user, a key or an option could be taken for something
 * else by ssh or by a shell
 * @throws {RangeError} if the port or the connect timeout is out of range
 */
export function sshCommand(node: ClusterNode, command: readonly string[], options: SshOptions = {}): string[] {
  const { connectTimeoutMs = 10_000, options: extra = [] } = options;
  const user = nonBlank(options.user) ?? node.sshUser;
  const fault = (reason: string) => new TypeError(`Cannot build the ssh command of "${node.name}": ${reason}`);
  const host = node.bestIp;
  if (host === undefined) throw fault("it has no address: set tailscale_ip or ssh_host");
  if (!isPort(node.sshPort)) throw new RangeError(`Cannot use ssh port ${node.sshPort} of "${node.name}"`);
  if (!(connectTimeoutMs > 0 && connectTimeoutMs < 2 ** 31)) {
    throw new RangeError(`Cannot wait for ${connectTimeoutMs} ms: expected a number above 0 and below 2 ** 31`);
  }
  const problems = [
    ["address", PLACEHOLDER.test(host) ? "is a placeholder" : checkHost(host)],
    ["user", checkUser(user)],
    ["key", node.sshKey === undefined ? undefined : checkKeyPath(node.sshKey)],
    ...extra.map((option) => ["ssh option", checkSshOption(option)]),
  ].filter(([, message]) => message !== undefined).map(([what, message]) => `${what}: ${message}`);
  if (command.some((word) => word.includes("\0"))) problems.push("command: holds a NUL character");
  if (problems.length > 0) throw fault(problems.join("; "));

  // The first value that ssh is given wins, so that a default is left out where the caller sets it.
  const isSet = (key: string) => extra.some((option) => option.toLowerCase().startsWith(`${key.toLowerCase()}=`));
  return [
    "ssh",
    ...(isSet("BatchMode") ? [] : ["-o", "BatchMode=yes"]),
    ...(isSet("ConnectTimeout") ? [] : ["-o", `ConnectTimeout=${Math.ceil(connectTimeoutMs / 1000)}`]),
    ...(isSet("Port") ? [] : ["-p", String(node.sshPort)]),
    ...(node.sshKey === undefined ? [] : ["-i", node.sshKey]),
    ...extra.flatMap((option) => ["-o", option]),
    "--",
    `${user}@${host}`,
    ...command,
  ];
}

function checkSshOption(option: string): string | undefined {
  const [, key, value] = /^([A-Za-z][A-Za-z0-9]*)=(.*)$/s.exec(option) ?? [];
  if (key === undefined || value === undefined) return "expected KEY=VALUE, as in ServerAliveInterval=15";
  if (CONTROL_TEXT.test(value)) return `${key}: holds a control character`;
  // These name hosts and users to a process; a command is what ProxyCommand is for.
  if (/^(ProxyJump|HostName|User|IdentityFile)$/i.test(key)) {
    const unsafe = value.split(",").map((hop) => checkWord(hop.replace(/[[\]]/g, ""), "hosts and users"));
    const message = unsafe.find((reason) => reason !== undefined);
    return message && `${key}: ${message}`;
  }
}

function splitUser(sshHost: string): { user: string | undefined; host: string } {
  const at = sshHost.lastIndexOf("@");
  return at < 0 ? { user: undefined, host: sshHost } : { user: sshHost.slice(0, at), host: sshHost.slice(at + 1) };
}

function hostOf(sshHost: string | undefined): string | undefined {
  return sshHost === undefined ? undefined : nonBlank(splitUser(sshHost).host);
}

function withoutBrackets(host: string): string {
  return host.startsWith("[") && host.endsWith("]") ? host.slice(1, -1) : host;
}

/** `host:port`, an IPv6 address in brackets. */
export function hostPort(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

function nonBlank(text: string | undefined): string | undefined {
  return text?.trim() || undefined;
}

function isUnset(value: unknown): boolean {
  return value === undefined || value === null || (typeof value === "string" && !/\S/.test(value));
}

function isPort(value: number): boolean {
  return Number.isInteger(value) && value >= 1 && value <= 65535;
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function typeName(value: unknown): string {
  if (value === null || value === undefined) return "nothing";
  if (Array.isArray(value)) return "a list";
  return typeof value === "object" ? "a mapping" : `a ${typeof value}`;
}

function errorText(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function errorCode(error: unknown): string {
  return String((error as { code?: unknown } | null)?.code ?? "");
}

/** A variable that is not set, is blank or may not be read is `undefined`. */
function readEnv(variable: string): string | undefined {
  if (Deno.permissions.querySync({ name: "env", variable }).state !== "granted") return undefined;
  return nonBlank(Deno.env.get(variable));
}

function netState(host: string): Deno.PermissionState {
  try {
    return Deno.permissions.querySync({ name: "net", host }).state;
  } catch {
    // Not a host that Deno can parse: let the connection say so.
    return "granted";
  }
}

function requireNet(host: string): void {
  if (netState(host) !== "granted") throw denied("net access", `--allow-net=${host}`);
}

function requirePermission(permission: Deno.PermissionDescriptor, flag: string, purpose?: string): void {
  if (Deno.permissions.querySync(permission).state === "granted") return;
  throw denied(`${permission.name} access${purpose ? ` ${purpose}` : ""}`, flag);
}

function denied(what: string, flag: string): Error {
  return new Deno.errors.NotCapable(`Requires ${what}: run again with ${flag}`);
}

function throwIfDenied(probes: readonly NodeProbe[], port: number | undefined): void {
  const flag = missingNetFlag(probes, port);
  if (flag) throw denied("net access", flag);
}

/** The flag that would have let the denied checks be done, or `undefined` where none was denied. */
export function missingNetFlag(probes: readonly NodeProbe[], port?: number): string | undefined {
  const hosts = probes.filter(({ failure }) => failure?.code === "denied")
    .flatMap(({ node }) => netHosts(node, port));
  if (hosts.length === 0) return undefined;
  // Past this, nobody reads or types the list; `permissions` prints it.
  return hosts.length > 64 ? "--allow-net" : `--allow-net=${[...new Set(hosts)].join(",")}`;
}

/** Each `host:port` to which a check of the node may connect. */
export function netHosts(node: ClusterNode, port?: number): string[] {
  return nodeEndpoints(node, probeSettings({ port })).map((endpoint) => hostPort(endpoint.address, endpoint.port));
}
