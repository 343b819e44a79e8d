/**
 * Programs in processes of their own, and what the tests need around them.
 *
 * @module
 */

/** The folder of the project. */
export const ROOT = new URL("..", import.meta.url).pathname;

/** A folder that its disposal removes, with all that is in it. */
export interface TempFolder extends AsyncDisposable {
  readonly folder: string;
}

/** Makes a folder where `TMPDIR` says, else under /tmp if only that may be written. */
export async function tempFolder(prefix = ""): Promise<TempFolder> {
  const folder = await Deno.makeTempDir({ prefix }).catch((error) => {
    if (!(error instanceof Deno.errors.NotCapable)) throw error;
    return Deno.makeTempDir({ prefix, dir: "/tmp" });
  });

  return {
    folder,
    [Symbol.asyncDispose]: () => Deno.remove(folder, { recursive: true }),
  };
}

/** An inventory in a folder of its own. */
export interface InventoryFile extends TempFolder {
  readonly path: string;
}

/** Writes an inventory. JSON is YAML too. */
export async function writeInventory(
  hosts: Readonly<Record<string, Readonly<Record<string, unknown>>>>,
  sections: Readonly<Record<string, unknown>> = {},
): Promise<InventoryFile> {
  const temp = await tempFolder();
  const path = `${temp.folder}/hosts.yaml`;
  const text = JSON.stringify({ hosts, ...sections }, null, 2);
  await Deno.writeTextFile(path, text);
  return { ...temp, path };
}

/** Registers a test that is ignored if something is missing, and then says so in its name. */
export function testUnless(
  missing: string | undefined,
  name: string,
  fn: () => Promise<void> | void,
): void {
  const isMissing = missing !== undefined;
  const note = isMissing ? ` (ignored: ${missing})` : "";
  Deno.test({ name: name + note, ignore: isMissing, fn });
}

/** Says that a program is missing; `undefined` if it is installed. */
export function programMissing(program: string): string | undefined {
  const { success } = new Deno.Command("sh", {
    args: ["-c", 'command -v "$0"', program],
    stdout: "null",
    stderr: "null",
  }).outputSync();
  return success ? undefined : `needs ${program}`;
}

/** Options of {@linkcode runCli} and {@linkcode run}. */
export interface RunOptions {
  /**
   * The flags of `deno run`.
   *
   * @default {["-P=cli"]}
   */
  readonly flags?: readonly string[];

  /** Variables beside those that Deno itself needs; no others are kept. */
  readonly env?: Readonly<Record<string, string>>;

  /**
   * The working directory.
   *
   * @default {ROOT}
   */
  readonly cwd?: string;

  /** The text on its stdin; nothing by default. */
  readonly stdin?: string;
}

/** How a process ended. */
export interface RunResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;

  /** Milliseconds from its start to its end. */
  readonly ms: number;
}

/** Runs cli.ts in a process of its own. */
export function runCli(
  args: readonly string[],
  options: RunOptions = {},
): Promise<RunResult> {
  const { flags = ["-P=cli"], ...others } = options;
  return run("deno", [...denoRun(flags, "cli.ts"), ...args], others);
}

/** Returns the arguments with which Deno runs a file of the project from any folder. */
export function denoRun(flags: readonly string[], file: string): string[] {
  const config = ["--config", `${ROOT}deno.json`];
  return ["run", "-q", "--no-prompt", ...config, ...flags, ROOT + file];
}

/** Runs a program without a terminal and without this process's environment; ends it after a minute. */
export async function run(
  program: string,
  args: readonly string[],
  options: Omit<RunOptions, "flags"> = {},
): Promise<RunResult> {
  const { env = {}, cwd = ROOT, stdin } = options;
  const started = performance.now();

  const child = new Deno.Command(program, {
    args: [...args],
    clearEnv: true,
    env: { ...keptVariables(), ...env },
    cwd,
    stdin: stdin === undefined ? "null" : "piped",
    stdout: "piped",
    stderr: "piped",
    signal: AbortSignal.timeout(60_000),
  }).spawn();
  if (stdin !== undefined) await feed(child.stdin, stdin);

  const { code, stdout, stderr } = await child.output();
  const decoder = new TextDecoder();
  return {
    code,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
    ms: performance.now() - started,
  };
}

async function feed(
  stream: WritableStream<Uint8Array<ArrayBuffer>>,
  text: string,
): Promise<void> {
  const writer = stream.getWriter();
  try {
    await writer.write(new TextEncoder().encode(text));
    await writer.close();
  } catch {
    // It may end without having read all.
  }
}

function keptVariables(): Record<string, string> {
  const names = [
    "PATH",
    "HOME",
    "DENO_DIR",
    "XDG_CACHE_HOME",
    "TMPDIR",
    "NPM_CONFIG_REGISTRY",
    "DENO_COVERAGE_DIR",
  ];

  const kept: Record<string, string> = {};
  for (const name of names) {
    const value = Deno.env.get(name);
    if (value !== undefined) kept[name] = value;
  }
  return kept;
}

/** A process that goes on while the test does. Its disposal kills it. */
export interface RunningProcess extends AsyncDisposable {
  readonly process: Deno.ChildProcess;
  readonly stdout: AsyncGenerator<string>;
  readonly stderr: AsyncGenerator<string>;

  /** Resolves to its exit code, and the lines that nobody has read. */
  end(): Promise<{ code: number; stdout: string[]; stderr: string[] }>;
}

export type RunningCli = RunningProcess;

/** Starts cli.ts in a process of its own, to be read line by line while it runs; ends it after half a minute. */
export function startCli(
  args: readonly string[],
  options: Pick<RunOptions, "flags" | "env" | "cwd"> = {},
): RunningCli {
  const { flags = ["-P=cli"], ...others } = options;
  return start("deno", [...denoRun(flags, "cli.ts"), ...args], others);
}

/** Starts a program, to be read line by line while it runs; ends it after `limitMs`, by default half a minute. */
export function start(
  program: string,
  args: readonly string[],
  options: Pick<RunOptions, "env" | "cwd"> & {
    readonly limitMs?: number;
  } = {},
): RunningProcess {
  const { env = {}, cwd = ROOT, limitMs = 30_000 } = options;
  const process = new Deno.Command(program, {
    args: [...args],
    clearEnv: true,
    env: { ...keptVariables(), ...env },
    cwd,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();

  const stdout = linesOf(process.stdout);
  const stderr = linesOf(process.stderr);
  let isEnded = false;

  // It might ignore a milder signal: that is what is tested.
  const guard = setTimeout(() => process.kill("SIGKILL"), limitMs);
  const ended = process.status.finally(() => {
    isEnded = true;
    clearTimeout(guard);
  });

  const end = async () => {
    const [{ code }, out, err] = await Promise.all([
      ended,
      Array.fromAsync(stdout),
      Array.fromAsync(stderr),
    ]);
    return { code, stdout: out, stderr: err };
  };

  return {
    process,
    stdout,
    stderr,
    end,
    async [Symbol.asyncDispose]() {
      if (!isEnded) process.kill("SIGKILL");
      await end();
    },
  };
}

async function* linesOf(
  stream: ReadableStream<Uint8Array<ArrayBuffer>>,
): AsyncGenerator<string> {
  let last = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (last + text).split("\n");
    last = lines.pop()!;
    yield* lines;
  }
  if (last !== "") yield last;
}

/** Returns the next line of a process that is expected to print one. */
export async function nextLine(
  lines: RunningProcess["stdout"],
): Promise<string> {
  const { value, done } = await lines.next();
  if (done) throw new Error("There is no further line");
  return value;
}
