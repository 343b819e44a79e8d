import { assertEquals, assertMatch } from "jsr:@std/assert@^1.0.19";
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ClusterNode, probeNode } from "../mod.ts";
import {
  type Behaviour,
  jsonAnswer,
  type LoopbackNode,
  send,
  startNode,
  untilClosed,
} from "./loopback_cluster.ts";
import { programMissing, testUnless } from "./process.ts";
import { outcomeOf, sweepElsewhere, tally } from "./sweep_process.ts";
import {
  type Certificate,
  type CertificateKind,
  makeCertificates,
  overTls,
  type TlsPeer,
} from "./tls.ts";

const NO_OPENSSL = programMissing("openssl");

/** For nodes that do not answer in time. */
const SHORT_MS = 1000;

const OK = "HTTP/1.1 200 OK\r\n";
const JSON_TEXT = '{"version":"1.4.2"}';

function urlOf({ port }: { port: number }, host = "localhost"): string {
  return `https://${host}:${port}`;
}

/** Starts a real HTTPS server. */
function startHttps({ key, cert }: Certificate, hostname = "127.0.0.1") {
  const options = { hostname, port: 0, key, cert, onListen() {} };
  const server = Deno.serve(options, ({ url }) => {
    const { pathname } = new URL(url);
    return pathname.endsWith("/status")
      ? Response.json({ version: "1.4.2" })
      : new Response("not found", { status: 404 });
  });

  return {
    port: server.addr.port,
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

/** Checks one URL in a process that trusts the CA of the tests. */
async function checkElsewhere(
  dataServerUrl: string,
  env: Readonly<Record<string, string>>,
): Promise<{ outcome: string; message: string }> {
  const plan = { nodes: [{ name: "a", dataServerUrl }], options: {} };
  const { outcomes, messages } = await sweepElsewhere(plan, { env });
  return { outcome: outcomes[0]!, message: messages[0] ?? "" };
}

for (const host of ["localhost", "127.0.0.1"]) {
  testUnless(
    NO_OPENSSL,
    `probeNodes() reports an https data_server_url at ${host} as up, base path included`,
    async () => {
      await using certificates = await makeCertificates();
      await using server = startHttps(await certificates.of("good"));

      const url = `${urlOf(server, host)}/data/`;
      const { outcome } = await checkElsewhere(url, certificates.env);
      assertEquals(outcome, "up");
    },
  );
}

const CERTIFICATES: Record<Exclude<CertificateKind, "good">, RegExp> = {
  "expired": /expired/,
  "self-signed": /self-signed|unknown/,
  "unknown-ca": /unknown|CA|issuer/,
  "other-name": /name|localhost/,
};

for (const [kind, words] of Object.entries(CERTIFICATES)) {
  testUnless(
    NO_OPENSSL,
    `probeNodes() reports a certificate that is ${kind} as unhealthy: tls`,
    async () => {
      await using certificates = await makeCertificates();
      const certificate = await certificates.of(kind as CertificateKind);
      await using server = startHttps(certificate);

      const url = urlOf(server);
      const { outcome, message } = await checkElsewhere(url, certificates.env);
      assertEquals(outcome, "unhealthy tls");
      assertMatch(message, words);
    },
  );
}

testUnless(
  NO_OPENSSL,
  "probeNode() reports a CA that it does not know as unhealthy: tls, and names DENO_CERT",
  async () => {
    await using certificates = await makeCertificates();
    await using server = startHttps(await certificates.of("good"));

    const node = new ClusterNode({ name: "a", dataServerUrl: urlOf(server) });
    const probe = await probeNode(node);
    assertEquals(outcomeOf(probe), "unhealthy tls");
    assertMatch(probe.failure!.message, /DENO_CERT/);
  },
);

Deno.test("probeNode() reports plain HTTP on an https port as unhealthy: tls", async () => {
  await using server = await startNode(async (conn) => {
    await send(conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
    await untilClosed(conn);
  });

  const node = new ClusterNode({ name: "a", dataServerUrl: urlOf(server) });
  const probe = await probeNode(node);
  assertEquals(outcomeOf(probe), "unhealthy tls");
  assertMatch(probe.failure!.message, /does not speak TLS/);
});

const ENDS: Record<
  string,
  { talk: (peer: TlsPeer) => Promise<unknown>; outcome: string }
> = {
  "a whole body without a length, and no close_notify": {
    talk: (peer) => peer.send(`${OK}\r\n${JSON_TEXT}`),
    outcome: "up",
  },
  "a whole body without a length, and close_notify": {
    talk: async (peer) => {
      await peer.send(`${OK}\r\n${JSON_TEXT}`);
      await peer.sayGoodbye();
    },
    outcome: "up",
  },
  "a whole body with its length": {
    talk: async (peer) => {
      await peer.send(`${OK}Content-Length: 19\r\n\r\n${JSON_TEXT}`);
      await peer.untilClosed();
    },
    outcome: "up",
  },
  "a body in three records, and no close_notify": {
    talk: async (peer) => {
      await peer.send(`${OK}\r\n`);
      await peer.send(JSON_TEXT.slice(0, 5));
      await delay(50);
      await peer.send(JSON_TEXT.slice(5));
    },
    outcome: "up",
  },
  "a body cut short of its length, and no close_notify": {
    talk: (peer) => peer.send(`${OK}Content-Length: 100\r\n\r\n${JSON_TEXT}`),
    outcome: "unhealthy bad-response",
  },
  "a body cut short of its length, and close_notify": {
    talk: async (peer) => {
      await peer.send(`${OK}Content-Length: 100\r\n\r\n${JSON_TEXT}`);
      await peer.sayGoodbye();
    },
    outcome: "unhealthy bad-response",
  },
  "chunks without the last, and no close_notify": {
    talk: (peer) => {
      return peer.send(`${OK}Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n`);
    },
    outcome: "unhealthy bad-response",
  },
  "half a head, and no close_notify": {
    talk: (peer) => peer.send("HTTP/1.1 200 OK\r\nServer: x"),
    outcome: "unhealthy bad-response",
  },
};

for (const [what, { talk, outcome }] of Object.entries(ENDS)) {
  testUnless(
    NO_OPENSSL,
    `probeNodes() reports over TLS ${what} as ${outcome}`,
    async () => {
      await using certificates = await makeCertificates();
      const conversation = overTls(
        await certificates.of("good"),
        async (peer) => {
          await peer.readHead();
          await talk(peer);
        },
      );
      await using server = await startNode(conversation);

      const url = urlOf(server);
      const result = await checkElsewhere(url, certificates.env);
      assertEquals(result.outcome, outcome, result.message);
      assertEquals(/https?:/.test(result.message), false, result.message);
    },
  );
}

testUnless(
  NO_OPENSSL,
  "probeNodes() sends over https the name and the port of the URL as Host",
  async () => {
    await using certificates = await makeCertificates();
    const conversation = overTls(
      await certificates.of("good"),
      async (peer) => {
        const head = await peer.readHead();
        await peer.send(jsonAnswer({ head }));
        await peer.untilClosed();
      },
    );
    await using server = await startNode(conversation);

    const nodes = [{ name: "a", dataServerUrl: urlOf(server) }];
    const { env } = certificates;
    const { statuses } = await sweepElsewhere({ nodes, options: {} }, { env });
    const head = String(statuses[0]?.head);
    assertMatch(head, new RegExp(`^Host: localhost:${server.port}$`, "mi"));
  },
);

const STALLS = ["silent", "trickle-body", "black-hole"] as const;

for (const behaviour of STALLS) {
  Deno.test(`probeNodes() leaves no descriptor of 50 https checks that are ${behaviour}`, async () => {
    await using server = await startNode(behaviour);
    const nodes = Array.from({ length: 50 }, (_, index) => {
      const host = index % 2 === 0 ? "localhost" : "127.0.0.1";
      return { name: `node-${index}`, dataServerUrl: urlOf(server, host) };
    });

    const options = { timeoutMs: SHORT_MS };
    const { outcomes } = await sweepElsewhere({ nodes, options });

    const expected: Record<string, Record<string, number>> = {
      "silent": { "unhealthy timeout": 50 },
      "trickle-body": { "unhealthy tls": 50 },
      "black-hole": { "down timeout": 50 },
    };
    assertEquals(tally(outcomes), expected[behaviour]);
  });
}

Deno.test("probeNodes() leaves no descriptor of https checks that are aborted in the handshake", async () => {
  await using server = await startNode("silent");
  const nodes = Array.from({ length: 50 }, (_, index) => {
    return { name: `node-${index}`, dataServerUrl: urlOf(server) };
  });

  const options = { timeoutMs: 20_000 };
  const { reason } = await sweepElsewhere({ nodes, options, abortMs: 300 });
  assertEquals(reason, "enough");
});

testUnless(
  NO_OPENSSL,
  "probeNodes() leaves no descriptor of https checks, however they end",
  async () => {
    await using certificates = await makeCertificates();
    await using servers = new AsyncDisposableStack();
    const ports: number[] = [];
    const add = ({ port }: { port: number }) => void ports.push(port);

    for (const kind of ["good", "expired", "self-signed"] as const) {
      add(servers.use(startHttps(await certificates.of(kind))));
    }
    const plain: Behaviour[] = ["closes", "reset", "ok", "refuses"];
    for (const behaviour of plain) {
      add(servers.use(await startNode(behaviour)));
    }
    const good = await certificates.of("good");
    const silentAfterHandshake = overTls(good, (peer) => peer.untilClosed());
    add(servers.use(await startNode(silentAfterHandshake)));

    const nodes = ports.flatMap((port) => {
      return Array.from({ length: 10 }, (_, index) => {
        return { name: `${port}-${index}`, dataServerUrl: urlOf({ port }) };
      });
    });
    const plan = { nodes, options: { timeoutMs: SHORT_MS } };
    const { outcomes } = await sweepElsewhere(plan, { env: certificates.env });

    const [up, ...others] = ports.map((_, index) => {
      return tally(outcomes.slice(index * 10, index * 10 + 10));
    });
    assertEquals(up, { up: 10 });
    assertEquals(others, [
      { "unhealthy tls": 10 },
      { "unhealthy tls": 10 },
      { "unhealthy tls": 10 },
      { "unhealthy tls": 10 },
      { "unhealthy tls": 10 },
      { "down refused": 10 },
      { "unhealthy timeout": 10 },
    ]);
  },
);

testUnless(
  NO_OPENSSL,
  "probeNodes() asks an https server once",
  async () => {
    await using certificates = await makeCertificates();
    const conversation = overTls(
      await certificates.of("good"),
      async (peer) => {
        await peer.readHead();
        await peer.send(jsonAnswer({}));
        await peer.untilClosed();
      },
    );
    await using server: LoopbackNode = await startNode(conversation);

    const { outcome } = await checkElsewhere(urlOf(server), certificates.env);
    assertEquals([outcome, server.connections], ["up", 1]);
  },
);
