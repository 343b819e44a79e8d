/**
 * A real sshd on loopback for the tests and the benchmark of `cluster-hosts ssh`, and a command line that goes on while
 * the test does.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { ROOT, run, type RunOptions } from "./loopback_cluster.ts";

const SSHD = "/usr/sbin/sshd";

/** Where it listens. The same command prints different things on them: `$SSH_CONNECTION` names the address. */
export const SSHD_ADDRESSES = ["127.0.0.1", "127.0.0.2"] as const;

/** A server that {@linkcode startSshd} started. Its disposal stops it. */
export interface Sshd extends AsyncDisposable {
  readonly port: number;
  readonly user: string;
  /** The private key that it admits. */
  readonly keyPath: string;
  /** A private key that it does not admit. */
  readonly otherKeyPath: string;
  /** What ssh needs to trust it and to use no other key, `KEY=VALUE` each. */
  readonly options: readonly string[];
  /** The fields with which it stands in an inventory. */
  readonly host: Readonly<Record<string, unknown>>;
  /** {@linkcode options} as arguments of `cluster-hosts ssh`. */
  readonly flags: readonly string[];
}

/** Why no sshd can be started here, or `undefined` where one can. */
export function sshdMissing(): string | undefined {
  if (Deno.build.os !== "linux") return "needs Linux, where all of 127.0.0.0/8 is this machine";
  if (Deno.uid() !== 0) return "needs root, which starts sshd";
  try {
    Deno.statSync(SSHD);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    return `needs ${SSHD}: install openssh-server`;
  }
}

/** Starts an sshd on a free port of loopback. */
export async function startSshd(): Promise<Sshd> {
  await using stack = new AsyncDisposableStack();
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  stack.defer(() => Deno.remove(folder, { recursive: true }));
  const [hostKey, keyPath, otherKeyPath] = [`${folder}/host`, `${folder}/user`, `${folder}/other`];
  for (const path of [hostKey, keyPath, otherKeyPath]) {
    const { code, stderr } = await run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", path]);
    if (code !== 0) throw new Error(`ssh-keygen: ${stderr}`);
  }
  const port = freePort();
  const [configPath, logPath] = [`${folder}/sshd_config`, `${folder}/sshd.log`];
  await Deno.writeTextFile(
    configPath,
    [
      ...SSHD_ADDRESSES.map((address) => `ListenAddress ${address}:${port}`),
      `HostKey ${hostKey}`,
      "PidFile none",
      `AuthorizedKeysFile ${keyPath}.pub`,
      // The folder is under /tmp, which everybody may write.
      "StrictModes no",
      "UsePAM no",
      "PasswordAuthentication no",
      "KbdInteractiveAuthentication no",
      "PermitRootLogin yes",
      "MaxStartups 1000",
      // What the login shell reads there could take long, and say something.
      `SetEnv HOME=${folder}`,
      "",
    ].join("\n"),
  );
  const sshd = new Deno.Command(SSHD, {
    args: ["-D", "-f", configPath, "-E", logPath],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  let isEnded = false;
  const ended = sshd.status.then(() => isEnded = true);
  stack.defer(async () => {
    if (!isEnded) sshd.kill("SIGTERM");
    await ended;
  });
  for (const deadline = performance.now() + 10_000;; await delay(20)) {
    if (isEnded || performance.now() > deadline) {
      throw new Error(`sshd does not listen: ${await Deno.readTextFile(logPath)}`);
    }
    if (await isListening(SSHD_ADDRESSES.at(-1)!, port)) break;
  }
  const user = "root";
  const options = [
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
  ];
  const held = stack.move();
  return {
    port,
    user,
    keyPath,
    otherKeyPath,
    options,
    host: { tailscale_ip: SSHD_ADDRESSES[0], ssh_port: port, ssh_user: user, ssh_key: keyPath, status: "active" },
    flags: options.flatMap((option) => ["--ssh-option", option]),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

function freePort(): number {
  using listener = Deno.listen({ hostname: SSHD_ADDRESSES[0], port: 0 });
  return listener.addr.port;
}

async function isListening(hostname: string, port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname, port })).close();
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.ConnectionRefused) return false;
    throw error;
  }
}

/** A command line that {@linkcode startCli} started. Its disposal kills it. */
export interface RunningCli extends AsyncDisposable {
  readonly process: Deno.ChildProcess;
  readonly stdout: AsyncGenerator<string>;
  readonly stderr: AsyncGenerator<string>;
  /** Its exit code, and the lines that nobody has read. */
  end(): Promise<{ code: number; stdout: string[]; stderr: string[] }>;
}

/** Starts cli.ts in a process of its own, to be read line by line while it runs; ends it after half a minute. */
export function startCli(args: readonly string[], options: Pick<RunOptions, "flags" | "env"> = {}): RunningCli {
  const { flags = ["-P=cli"], env = {} } = options;
  const ownEnv = Object.entries(Deno.env.toObject()).filter(([name]) => !name.startsWith("RINGRIFT_"));
  const process = new Deno.Command("deno", {
    args: ["run", "-q", "--no-prompt", "--config", `${ROOT}deno.json`, ...flags, `${ROOT}cli.ts`, ...args],
    clearEnv: true,
    env: { ...Object.fromEntries(ownEnv), ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const [stdout, stderr] = [linesOf(process.stdout), linesOf(process.stderr)];
  let isEnded = false;
  // It might ignore a milder signal: that is what is tested.
  const guard = setTimeout(() => process.kill("SIGKILL"), 30_000);
  const ended = process.status.finally(() => {
    isEnded = true;
    clearTimeout(guard);
  });
  const end = async () => {
    const [{ code }, out, err] = await Promise.all([ended, Array.fromAsync(stdout), Array.fromAsync(stderr)]);
    return { code, stdout: out, stderr: err };
  };
  return {
    process,
    stdout,
    stderr,
    end,
    async [Symbol.asyncDispose]() {
      if (!isEnded) process.kill("SIGKILL");
      await end();
    },
  };
}

async function* linesOf(stream: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncGenerator<string> {
  let last = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (last + text).split("\n");
    last = lines.pop()!;
    yield* lines;
  }
  if (last !== "") yield last;
}
