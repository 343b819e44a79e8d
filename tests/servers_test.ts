import { assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { type Nginx, nginxMissing, startNginx } from "./nginx.ts";
import { programMissing, testUnless } from "./process.ts";
import { sweepElsewhere, type SweepReport } from "./sweep_process.ts";
import { type Certificates, makeCertificates } from "./tls.ts";

const MISSING = nginxMissing() ?? programMissing("openssl");

const STATUS =
  `{"host":"$host","accept":"$http_accept","padding":"$request_id$request_id"}`;

/** An nginx with a default host that is nobody's, and one host that answers. */
interface Hosts extends AsyncDisposable {
  readonly nginx: Nginx;
  readonly certificates: Certificates;
}

async function startHosts(): Promise<Hosts> {
  await using stack = new AsyncDisposableStack();
  const certificates = stack.use(await makeCertificates("DNS:localhost"));
  const good = await certificates.of("good");
  const other = await certificates.of("other-name");

  const nginx = stack.use(
    await startNginx([
      { name: "nobody.invalid", ...other, directives: "return 404;" },
      {
        name: "localhost",
        ...good,
        directives: `
          location = /data/status { return 200 '${STATUS}'; }
          location = /data/health { default_type text/plain; return 200 fine; }
          location = /data/empty { return 204; }
          location = /data/moved { return 301 https://$host/; }
          location = /data/broken { return 502; }
        `,
      },
    ]),
  );

  const held = stack.move();
  return {
    nginx,
    certificates,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Checks one path of a URL in a process that trusts the CA of the tests. */
function check(
  { certificates }: Hosts,
  dataServerUrl: string,
  statusPath = "/status",
): Promise<SweepReport> {
  const nodes = [{ name: "a", dataServerUrl, statusPath }];
  const { env } = certificates;
  return sweepElsewhere({ nodes, options: {} }, { env });
}

for (const protocol of ["http", "https"] as const) {
  testUnless(
    MISSING,
    `probeNodes() reports the ${protocol} host of nginx that its URL names as up`,
    async () => {
      await using hosts = await startHosts();
      const port = hosts.nginx[`${protocol}Port`];

      const url = `${protocol}://localhost:${port}/data`;
      const { outcomes, statuses } = await check(hosts, url);
      assertEquals(outcomes, ["up"]);
      assertEquals(statuses[0]?.host, "localhost");
      assertEquals(statuses[0]?.accept, "application/json");
    },
  );

  const PATHS: Record<string, string> = {
    "/health": "up",
    "/empty": "up",
    "/moved": "unhealthy redirect",
    "/broken": "unhealthy http-status",
  };

  testUnless(
    MISSING,
    `probeNodes() reports the paths of an ${protocol} host of nginx as what they are`,
    async () => {
      await using hosts = await startHosts();
      const url = `${protocol}://localhost:${hosts.nginx[`${protocol}Port`]}`;

      const nodes = Object.keys(PATHS).map((statusPath) => {
        return { name: statusPath, dataServerUrl: `${url}/data`, statusPath };
      });
      const { env } = hosts.certificates;
      const { outcomes } = await sweepElsewhere({ nodes, options: {} }, {
        env,
      });
      assertEquals(outcomes, Object.values(PATHS));
    },
  );
}

testUnless(
  MISSING,
  "probeNodes() reports the default host of nginx, where a URL names none of its hosts",
  async () => {
    await using hosts = await startHosts();

    const url = `http://127.0.0.1:${hosts.nginx.httpPort}/data`;
    const { outcomes, messages } = await check(hosts, url);
    assertEquals(outcomes, ["unhealthy http-status"]);
    assertMatch(messages[0]!, /404/);
  },
);

testUnless(
  MISSING,
  "probeNodes() reports the certificate of nginx for another name as unhealthy: tls",
  async () => {
    await using hosts = await startHosts();

    const url = `https://127.0.0.1:${hosts.nginx.httpsPort}/data`;
    const { outcomes } = await check(hosts, url);
    assertEquals(outcomes, ["unhealthy tls"]);
  },
);

testUnless(
  MISSING,
  "probeNodes() reports plain HTTP on the https port of nginx, and TLS on its http port",
  async () => {
    await using hosts = await startHosts();
    const { httpPort, httpsPort } = hosts.nginx;

    // nginx says "The plain HTTP request was sent to HTTPS port".
    const plain = await check(hosts, `http://localhost:${httpsPort}/data`);
    assertEquals(plain.outcomes, ["unhealthy http-status"]);

    const secure = await check(hosts, `https://localhost:${httpPort}/data`);
    assertEquals(secure.outcomes, ["unhealthy tls"]);
  },
);
