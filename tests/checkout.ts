/**
 * The checkout as a web server gives it out.
 *
 * @module
 */
import { ROOT } from "./process.ts";

/** A web server with the files of the checkout. Its disposal ends it. */
export interface CheckoutServer extends AsyncDisposable {
  /** The folder of the files, without a slash at the end. */
  readonly url: string;

  /**
   * Flags that a test adds for code from there.
   *
   * It is loaded anew, since another checkout may have had the port before, and
   * without JSR it needs the import map.
   */
  readonly flags: readonly string[];
}

/** True if `@std` comes from JSR here, as it does for everybody outside. */
export const USES_JSR = Deno.env.get("CLUSTER_HOSTS_JSR") === "1";

/**
 * Why `@std` comes from no registry here, neither JSR nor npm, or `undefined` if
 * it does. Deno can neither publish nor document a package with other imports.
 */
export async function registryMissing(): Promise<string | undefined> {
  const config = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
  const targets: string[] = Object.values(config.imports ?? {});

  const isMapped = targets.every((target) => target.startsWith("npm:"));
  return USES_JSR || isMapped
    ? undefined
    : "needs JSR, or the import map of the checkout";
}

/** Serves the files of the checkout over HTTP on loopback. */
export function serveCheckout(): CheckoutServer {
  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };

  const server = Deno.serve(options, async ({ url }) => {
    const name = new URL(url).pathname.slice(1);
    try {
      // As the raw files of most Git hosts are served.
      return new Response(await Deno.readFile(ROOT + name), {
        headers: { "content-type": "text/plain" },
      });
    } catch {
      return new Response("Not found", { status: 404 });
    }
  });

  const url = `http://127.0.0.1:${server.addr.port}`;
  const flags = [`--reload=${url}`];
  if (!USES_JSR) flags.push(`--import-map=${url}/deno.json`);
  return { url, flags, [Symbol.asyncDispose]: () => server.shutdown() };
}
