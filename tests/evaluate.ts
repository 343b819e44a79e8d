/**
 * Statements in a process of their own: variables and the working directory
 * belong to a process, and test files that run in parallel share one.
 *
 * @module
 */
import { ROOT, run } from "./process.ts";

/** What the statements may use. */
const PRELUDE = `
  import * as api from "${ROOT}cluster_hosts.ts";

  const withVariable = async (name, value, call) => {
    if (value === undefined) Deno.env.delete(name);
    else Deno.env.set(name, value);

    const outcome = await call().catch((error) => error.message);
    Deno.env.delete(name);
    return outcome;
  };
`;

/** How the statements run. */
export interface EvaluateOptions {
  /** Variables beside those that Deno itself needs. */
  readonly env?: Readonly<Record<string, string>>;

  /** The working directory. */
  readonly cwd?: string;
}

/**
 * Runs statements that print JSON, and returns what they printed.
 *
 * In them, `api` is cluster_hosts.ts, and `withVariable(name, value, call)`
 * calls while a variable is set, or is not set if the value is `undefined`; a
 * call that fails gives its message.
 */
export async function evaluate(
  statements: string,
  options: EvaluateOptions = {},
): Promise<unknown> {
  const config = `${ROOT}deno.json`;
  const program = PRELUDE + statements;
  const args = ["eval", "-q", "--config", config, program];

  const { code, stdout, stderr } = await run("deno", args, options);
  if (stderr !== "" || code !== 0) {
    throw new Error(`${stderr}exit code ${code}`);
  }

  return JSON.parse(stdout);
}
