/**
 * Runs the command line in this process, with streams that record what it
 * writes.
 *
 * @module
 */
import { type Io, main } from "../cli.ts";

/** Options of {@linkcode runMain} and {@linkcode startMain}. */
export interface MainOptions {
  /**
   * The width of a terminal; a pipe if it is not set.
   *
   * @default {undefined}
   */
  readonly columns?: number;

  /**
   * The height of the terminal.
   *
   * @default {24}
   */
  readonly rows?: number;

  /**
   * True if stderr is a terminal, too.
   *
   * @default {false}
   */
  readonly isErrTerminal?: boolean;

  /**
   * True if the terminal shows colours.
   *
   * @default {false}
   */
  readonly hasColour?: boolean;

  /**
   * True for a terminal as with `TERM=dumb`.
   *
   * @default {false}
   */
  readonly isDumb?: boolean;

  /**
   * The text on stdin.
   *
   * @default {""}
   */
  readonly stdin?: string;
}

/** How a command ended. */
export interface MainResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A command that {@linkcode startMain} started. Its disposal ends it. */
export interface RunningMain extends AsyncDisposable {
  readonly stdout: string;
  readonly stderr: string;

  /** Sends a signal to it alone. */
  kill(signal: Deno.Signal): void;

  /** Resolves as soon as what it wrote passes the test; rejects when it ends before. */
  until(
    test: (output: { stdout: string; stderr: string }) => boolean,
  ): Promise<void>;

  /** Resolves when it has ended. */
  readonly ended: Promise<MainResult>;
}

/** Runs one command line to its end. */
export async function runMain(
  args: readonly string[],
  options: MainOptions = {},
): Promise<MainResult> {
  return await startMain(args, options).ended;
}

/** Starts one command line. */
export function startMain(
  args: readonly string[],
  options: MainOptions = {},
): RunningMain {
  const {
    columns,
    rows = 24,
    isErrTerminal = false,
    hasColour = false,
    isDumb = false,
    stdin = "",
  } = options;

  const written = { stdout: "", stderr: "" };
  const listeners = new Set<(signal: Deno.Signal) => void>();
  let changed = Promise.withResolvers<void>();
  let isEnded = false;

  const write = (stream: "stdout" | "stderr") => (text: string) => {
    written[stream] += text;
    changed.resolve();
    changed = Promise.withResolvers();
  };
  const io: Io = {
    out: write("stdout"),
    err: write("stderr"),
    readStdin: () => Promise.resolve(new TextEncoder().encode(stdin)),
    onSignal(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    size: () => ({ columns: columns ?? 80, rows }),
    isTerminal: columns !== undefined,
    isErrTerminal,
    hasCursor: !isDumb,
    hasColour: hasColour && !isDumb,
  };

  const run = async () => {
    const code = await main(args, io);
    isEnded = true;
    changed.resolve();
    return { code, ...written };
  };
  const ended = run();

  const kill = (signal: Deno.Signal) => {
    for (const listener of listeners) listener(signal);
  };

  return {
    get stdout() {
      return written.stdout;
    },
    get stderr() {
      return written.stderr;
    },
    ended,
    kill,
    async until(test) {
      while (!test(written)) {
        if (isEnded) {
          throw new Error(`It ended before: ${JSON.stringify(written)}`);
        }
        await changed.promise;
      }
    },
    async [Symbol.asyncDispose]() {
      kill("SIGTERM");
      await ended;
    },
  };
}
