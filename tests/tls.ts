/**
 * Certificates of a CA of the tests' own, and nodes that speak TLS over a
 * connection which the test can cut.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { Duplex } from "node:stream";
import { TLSSocket } from "node:tls";
import type { Conversation } from "./loopback_cluster.ts";
import { run, tempFolder } from "./process.ts";

/** A key and its certificate, as PEM, and the files that hold them. */
export interface Certificate {
  readonly key: string;
  readonly cert: string;
  readonly keyPath: string;
  readonly certPath: string;
}

/** What is wrong with a certificate. */
export type CertificateKind =
  | "good"
  | "expired"
  | "other-name"
  | "self-signed"
  | "unknown-ca";

/**
 * Certificates that {@linkcode makeCertificates} made. Its disposal removes the
 * files.
 */
export interface Certificates extends AsyncDisposable {
  readonly folder: string;

  /** The environment in which Deno trusts the CA of the tests. */
  readonly env: Readonly<Record<string, string>>;

  /** Reads the certificate of this kind. */
  of(kind: CertificateKind): Promise<Certificate>;
}

const NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

const MAKE_CERTIFICATES = `
ca() {
  openssl req -x509 ${NEW_KEY} -days 2 -subj "/CN=$1" -keyout $1.key -out $1.pem
}
leaf() {
  openssl req -new ${NEW_KEY} -subj "/CN=$1" -addext "subjectAltName=$2" \
    -addext basicConstraints=critical,CA:FALSE -keyout $1.key -out $1.csr
  openssl x509 -req -in $1.csr -CA $3.pem -CAkey $3.key -CAcreateserial \
    -days $4 -copy_extensions copy -out $1.pem
}
ca tests-ca
ca stranger
leaf good "$0" tests-ca 2
leaf expired "$0" tests-ca -1
leaf other-name DNS:other.example tests-ca 2
leaf unknown-ca "$0" stranger 2
openssl req -x509 ${NEW_KEY} -days 2 -subj /CN=self-signed \
  -addext "subjectAltName=$0" -addext basicConstraints=critical,CA:FALSE \
  -keyout self-signed.key -out self-signed.pem
`;

const LOOPBACK_NAMES = "DNS:localhost,IP:127.0.0.1,IP:127.0.0.2,IP:::1";

/**
 * Makes one certificate of each kind with openssl, by default for the names of
 * loopback.
 */
export async function makeCertificates(
  names: string = LOOPBACK_NAMES,
): Promise<Certificates> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());

  const script = `cd ${folder} && set -e\n${MAKE_CERTIFICATES}`;
  const { code, stderr } = await run("sh", ["-c", script, names]);
  if (code !== 0) throw new Error(`openssl made no certificates: ${stderr}`);

  const held = stack.move();
  return {
    folder,
    env: { DENO_CERT: `${folder}/tests-ca.pem` },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
    async of(kind) {
      const keyPath = `${folder}/${kind}.key`;
      const certPath = `${folder}/${kind}.pem`;
      const key = await Deno.readTextFile(keyPath);
      const cert = await Deno.readTextFile(certPath);
      return { key, cert, keyPath, certPath };
    },
  };
}

/** The server's side of a connection, its handshake done. */
export interface TlsPeer {
  /** Returns the head of the request. */
  readHead(): Promise<string>;

  /** Sends all of `text`. */
  send(text: string): Promise<void>;

  /** Says close_notify, as TLS wants it before a connection is closed. */
  sayGoodbye(): Promise<void>;

  /** Returns when the client has closed. */
  untilClosed(): Promise<void>;
}

/**
 * Returns a conversation over TLS. What `talk` does not say is not said: when
 * it returns, the TCP connection is closed without a close_notify.
 */
export function overTls(
  { key, cert }: Certificate,
  talk: (peer: TlsPeer, conn: Deno.TcpConn) => Promise<unknown>,
): Conversation {
  return async (conn, signal) => {
    const closed = Promise.withResolvers<void>();
    const secured = Promise.withResolvers<void>();
    const stream = duplexOf(conn, closed.resolve);
    const options = { isServer: true, key, cert };
    const socket = new TLSSocket(stream as never, options);

    const giveUp = () => {
      closed.resolve();
      secured.reject(new Deno.errors.ConnectionReset());
    };
    socket.on("error", giveUp);
    socket.on("close", giveUp);
    socket.once("secure", () => secured.resolve());
    signal.addEventListener("abort", giveUp, { once: true });
    closed.promise.then(() =>
      secured.reject(new Deno.errors.ConnectionReset())
    );

    try {
      await secured.promise;
      await talk(peerOf(socket, closed.promise), conn);
    } finally {
      signal.removeEventListener("abort", giveUp);
      socket.destroy();
      stream.destroy();
    }
  };
}

function peerOf(socket: TLSSocket, closed: Promise<void>): TlsPeer {
  let received = "";
  let arrived = Promise.withResolvers<void>();
  socket.on("data", (bytes: Uint8Array) => {
    received += new TextDecoder().decode(bytes);
    arrived.resolve();
    arrived = Promise.withResolvers();
  });

  return {
    async readHead() {
      while (!received.includes("\r\n\r\n")) await arrived.promise;
      return received.slice(0, received.indexOf("\r\n\r\n"));
    },
    send: (text) => {
      return new Promise((resolve, reject) => {
        socket.write(text, (error) => error ? reject(error) : resolve());
      });
    },
    sayGoodbye: () => {
      return new Promise((resolve) => socket.end(() => resolve()));
    },
    untilClosed: () => closed,
  };
}

/** Returns a stream over a connection that the test itself closes. */
function duplexOf(conn: Deno.TcpConn, onEnd: () => void): Duplex {
  const buffer = new Uint8Array(16 * 1024);

  return new Duplex({
    async read() {
      const count = await conn.read(buffer).catch(() => null);
      if (count === null) {
        onEnd();
        this.push(null);
      } else {
        this.push(Buffer.from(buffer.slice(0, count)));
      }
    },
    async write(bytes: Uint8Array, _encoding, done) {
      try {
        let sent = 0;
        while (sent < bytes.length) {
          sent += await conn.write(bytes.subarray(sent));
        }
        done();
      } catch (error) {
        done(error as Error);
      }
    },
  });
}
