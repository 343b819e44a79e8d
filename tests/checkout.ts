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
