import { ROOT } from "./loopback_cluster.ts";

/** The checkout as a web server gives it out. */
export interface CheckoutServer extends AsyncDisposable {
  /** Where the files are, without a slash at the end. */
  readonly url: string;
  /** `host:port`, for `--allow-import`. */
  readonly host: string;
  /**
   * The flags with which code from there runs. It is loaded anew, since another checkout may have had the port before. Where JSR
   * cannot be reached, the import map comes from there too.
   */
  readonly flags: readonly string[];
}

/** Serves the files of the checkout over HTTP on loopback. */
export function serveCheckout(): CheckoutServer {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async ({ url }) => {
    const name = new URL(url).pathname.slice(1);
    try {
      const type = name.endsWith(".ts") ? "application/typescript" : "application/json";
      return new Response(await Deno.readTextFile(ROOT + name), { headers: { "content-type": type } });
    } catch {
      return new Response("Not found", { status: 404 });
    }
  });
  const host = `127.0.0.1:${server.addr.port}`;
  const url = `http://${host}`;
  const usesJsr = Deno.env.get("CLUSTER_HOSTS_JSR") === "1";
  return {
    url,
    host,
    flags: [
      `--reload=${url}`,
      `--allow-import=${host}`,
      ...(usesJsr ? [] : [`--import-map=${url}/deno.json`]),
    ],
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}
