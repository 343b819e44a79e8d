/**
 * A real nginx with virtual hosts of a test's own, over HTTP and HTTPS.
 *
 * @module
 */
import { unusedPort } from "./loopback_cluster.ts";
import { start, tempFolder } from "./process.ts";

/** An nginx that {@linkcode startNginx} started. Its disposal ends it. */
export interface Nginx extends AsyncDisposable {
  readonly httpPort: number;
  readonly httpsPort: number;
}

/** A virtual host. */
export interface VirtualHost {
  readonly name: string;
  readonly keyPath: string;
  readonly certPath: string;

  /** The directives of its `server` block. */
  readonly directives: string;
}

/** Debian has it where the PATH of users does not look. */
const WITH_SBIN = "PATH=$PATH:/usr/sbin:/sbin";

/** Returns what is missing to start nginx, or `undefined`. */
export function nginxMissing(): string | undefined {
  const args = ["-c", `${WITH_SBIN} command -v nginx`];
  const options = { args, stdout: "null", stderr: "null" } as const;
  const { success } = new Deno.Command("sh", options).outputSync();
  return success ? undefined : "needs nginx";
}

/**
 * Starts nginx on loopback; the first host answers for names that are none of
 * the others.
 */
export async function startNginx(
  hosts: readonly VirtualHost[],
): Promise<Nginx> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const httpPort = unusedPort();
  const httpsPort = unusedPort();

  const config = configOf(folder, hosts, httpPort, httpsPort);
  const path = `${folder}/nginx.conf`;
  await Deno.writeTextFile(path, config);

  const command = `${WITH_SBIN} exec nginx -p ${folder} -c ${path}`;
  const running = stack.use(start("sh", ["-c", command], { limitMs: 60_000 }));
  await accepted(httpsPort);

  const held = stack.move();
  return {
    httpPort,
    httpsPort,
    async [Symbol.asyncDispose]() {
      running.process.kill("SIGTERM");
      await held.disposeAsync();
    },
  };
}

/** Returns when something accepts connections on a port. */
async function accepted(port: number): Promise<void> {
  const started = performance.now();
  while (true) {
    try {
      (await Deno.connect({ hostname: "127.0.0.1", port })).close();
      return;
    } catch (error) {
      if (performance.now() - started > 20_000) throw error;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

const TEMPORARY = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];

function configOf(
  folder: string,
  hosts: readonly VirtualHost[],
  httpPort: number,
  httpsPort: number,
): string {
  const paths = TEMPORARY.map((name) => `${name}_temp_path ${folder}/${name};`);
  const servers = hosts.map(({ name, keyPath, certPath, directives }) => {
    return `
      server {
        listen 127.0.0.1:${httpPort};
        listen 127.0.0.1:${httpsPort} ssl;
        server_name ${name};
        ssl_certificate ${certPath};
        ssl_certificate_key ${keyPath};
        ${directives}
      }`;
  });

  return `
    daemon off;
    master_process off;
    pid ${folder}/nginx.pid;
    error_log stderr;
    events {}
    http {
      access_log off;
      default_type application/json;
      gzip on;
      gzip_min_length 0;
      gzip_types application/json;
      ${paths.join("\n")}
      ${servers.join("\n")}
    }
  `;
}
