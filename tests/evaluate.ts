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
  const program = `import * as api from "${ROOT}mod.ts";
    const withVariable = async (name, value, call) => {
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
      const outcome = await call().catch((error) => error.message);
      Deno.env.delete(name);
      return outcome;
    };
    ${statements}`;
  const { code, stdout, stderr } = await run("deno", ["eval", "-q", "--config", `${ROOT}deno.json`, program], { env });
  if (stderr !== "" || code !== 0) throw new Error(`${stderr}exit code ${code}`);
  return JSON.parse(stdout);
}
