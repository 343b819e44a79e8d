import { ROOT } from "./process.ts";

/** The checkout as a web server gives it out. */
export interface CheckoutServer extends AsyncDisposable {
  /** Where the files are, without a slash at the end. */
  readonly url: string;
  /**
   * What a test adds to the flags of code from there: it is loaded anew, since another checkout may have had the port
   * before, and without JSR it needs the import map.
   */
  readonly flags: readonly string[];
}

/** Whether `@std` comes from JSR here, as it does for everybody outside. */
export const USES_JSR = Deno.env.get("CLUSTER_HOSTS_JSR") === "1";

/** Serves the files of the checkout over HTTP on loopback. */
export function serveCheckout(): CheckoutServer {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async ({ url }) => {
    const name = new URL(url).pathname.slice(1);
    try {
      // As the raw files of most Git hosts are served.
      return new Response(await Deno.readFile(ROOT + name), { headers: { "content-type": "text/plain" } });
    } catch {
      return new Response("Not found", { status: 404 });
    }
  });
  const url = `http://127.0.0.1:${server.addr.port}`;
  const flags = [`--reload=${url}`, ...(USES_JSR ? [] : [`--import-map=${url}/deno.json`])];
  return { url, flags, [Symbol.asyncDispose]: () => server.shutdown() };
}
