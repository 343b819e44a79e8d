/**
 * Runs the command line in this process, with streams that record what it writes.
 *
 * @module
 */
import { type Io, main } from "../cli.ts";

export interface MainOptions {
  /**
   * The width of a terminal; a pipe if it is not set.
   *
   * @default {undefined}
   */
  readonly columns?: number;
  /** @default {24} */
  readonly rows?: number;
  /** Whether progress goes to a terminal, too. */
  readonly isErrTerminal?: boolean;
  /** Whether there are colours. */
  readonly hasColour?: boolean;
  /** As with `TERM=dumb`. */
  readonly isDumb?: boolean;
  /** What it reads. */
  readonly stdin?: string;
}

/** How a command ended. */
export interface MainResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A command that {@linkcode startMain} started. */
export interface RunningMain {
  readonly stdout: string;
  readonly stderr: string;
  /** Sends a signal to it alone. */
  kill(signal: Deno.Signal): void;
  /** Returns as soon as what it wrote passes the test, and fails when it ends before. */
  until(test: (output: { stdout: string; stderr: string }) => boolean): Promise<void>;
  /** How it ends. */
  readonly ended: Promise<MainResult>;
}

/** Runs one command line to its end. */
export async function runMain(args: readonly string[], options: MainOptions = {}): Promise<MainResult> {
  return await startMain(args, options).ended;
}

/** Starts one command line. */
export function startMain(args: readonly string[], options: MainOptions = {}): RunningMain {
  const { columns, rows = 24, isErrTerminal = false, hasColour = false, isDumb = false, stdin = "" } = options;
  const written = { stdout: "", stderr: "" };
  const listeners = new Set<(signal: Deno.Signal) => void>();
  let changed = Promise.withResolvers<void>();
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
  let isEnded = false;
  const ended = main(args, io).then((code) => {
    isEnded = true;
    changed.resolve();
    return { code, ...written };
  });
  return {
    get stdout() {
      return written.stdout;
    },
    get stderr() {
      return written.stderr;
    },
    ended,
    kill: (signal) => listeners.forEach((listener) => listener(signal)),
    async until(test) {
      while (!test(written)) {
        if (isEnded) throw new Error(`It ended before: ${JSON.stringify(written)}`);
        await changed.promise;
      }
    },
  };
}
