/**
 * Statements in a process of their own: variables and the working directory belong to a process, and test files that run
 * in parallel share one.
 *
 * @module
 */
import { ROOT, run } from "./process.ts";

/**
 * Runs statements that print JSON, and gives what they printed. `api` is mod.ts; `withVariable(name, value, call)` calls
 * while a variable is set, or is not set if the value is `undefined`; a call that fails gives its message.
 */
export async function evaluate(statements: string, env: Readonly<Record<string, string>> = {}): Promise<unknown> {
  const code = `import * as api from "${ROOT}mod.ts";
    const withVariable = async (name, value, call) => {
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
      const outcome = await call().catch((error) => error.message);
      Deno.env.delete(name);
      return outcome;
    };
    ${statements}`;
  const { stdout, stderr } = await run("deno", ["eval", "-q", "--config", `${ROOT}deno.json`, code], { env });
  if (stderr !== "") throw new Error(stderr);
  return JSON.parse(stdout);
}
