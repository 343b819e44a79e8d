/**
 * A pseudo-terminal that a program runs on, for what only a terminal does: it
 * sends SIGINT at Ctrl-C, and shows prompts and lines that are drawn anew.
 *
 * @module
 */
import { programMissing, run, start, tempFolder } from "./process.ts";
import { eventually } from "./ssh_process.ts";

/** The key that interrupts. */
export const CTRL_C = "\x03";

/** A terminal of {@linkcode startTerminal}. Its disposal ends the program. */
export interface Terminal extends AsyncDisposable {
  type(keys: string): Promise<void>;
  /** All that was shown until now, without carriage returns. */
  shown(): Promise<string>;
  /** Returns what was shown as soon as it has this, or after twenty seconds. */
  until(expected: RegExp): Promise<string>;
  /** How the program ended. */
  ended(): Promise<{ readonly code: number; readonly shown: string }>;
}

/** Why there is no terminal here, or `undefined` if there can be one. */
export function terminalMissing(): string | undefined {
  return programMissing("script");
}

/** Runs a program on a terminal of 24 lines and 80 columns. */
export async function startTerminal(
  command: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Promise<Terminal> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const keys = `${folder}/keys`;
  const screen = `${folder}/screen`;
  await run("sh", ["-c", 'mkfifo "$0"', keys]);

  const quoted = command.map((word) => `'${word.replaceAll("'", `'\\''`)}'`);
  const line = `stty rows 24 cols 80; exec ${quoted.join(" ")}`;
  // Opened for both, a pipe keeps what nobody has read yet, does not block its
  // writer, and never comes to its end.
  const keyboard = stack.use(
    await Deno.open(keys, { read: true, write: true }),
  );
  const script = 'exec script -qefc "$0" /dev/null <> "$2" > "$1"';
  const program = stack.use(
    start("sh", ["-c", script, line, screen, keys], {
      env: { TERM: "xterm-256color", ...env },
      limitMs: 60_000,
    }),
  );

  const shown = async () => {
    const text = await Deno.readTextFile(screen).catch(() => "");
    return text.replaceAll("\r", "");
  };
  const held = stack.move();
  return {
    shown,
    async type(text) {
      await keyboard.write(new TextEncoder().encode(text));
    },
    until: (expected) => eventually(shown, (text) => expected.test(text)),
    async ended() {
      const { code } = await program.end();
      return { code, shown: await shown() };
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}
