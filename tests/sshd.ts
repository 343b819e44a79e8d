/**
 * A real sshd on loopback for the tests and the benchmark of commands over ssh.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { unusedPort } from "./loopback_cluster.ts";
import { programMissing, run, tempFolder, testUnless } from "./process.ts";

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

/** Why no sshd can be started here, or `undefined` if one can. */
export function sshdMissing(): string | undefined {
  if (Deno.build.os !== "linux") return "needs Linux, where all of 127.0.0.0/8 is this machine";
  const missing = [SSHD, "ssh", "ssh-keygen"].map(programMissing).find((missing) => missing !== undefined);
  if (missing !== undefined) return `${missing}: install OpenSSH's server and client`;
  const script = Deno.uid() === 0
    // Where it was never started as a service, sshd misses this folder.
    ? "mkdir -p /run/sshd"
    // It admits nobody but the user who started it, and that only to a shell.
    : 'getent passwd "$(id -un)" | grep -qv "/nologin$\\|/false$"';
  const { success } = new Deno.Command("sh", { args: ["-c", script], stdout: "null", stderr: "null" }).outputSync();
  if (!success) return Deno.uid() === 0 ? "needs /run/sshd, which cannot be made" : "needs a user with a login shell";
}

/** Starts an sshd on a free port of loopback. */
export async function startSshd(): Promise<Sshd> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const user = (await run("sh", ["-c", "id -un"])).stdout.trim();
  const [hostKey, keyPath, otherKeyPath] = [`${folder}/host`, `${folder}/user`, `${folder}/other`];
  for (const path of [hostKey, keyPath, otherKeyPath]) {
    const { code, stderr } = await run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", path]);
    if (code !== 0) throw new Error(`ssh-keygen: ${stderr}`);
  }
  const port = unusedPort();
  const [configPath, logPath] = [`${folder}/sshd_config`, `${folder}/sshd.log`];
  await Deno.writeTextFile(
    configPath,
    [
      ...SSHD_ADDRESSES.map((address) => `ListenAddress ${address}:${port}`),
      `HostKey ${hostKey}`,
      "PidFile none",
      `AuthorizedKeysFile ${keyPath}.pub`,
      // The folder is in one that everybody may write.
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
  const options = [
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    // The cheapest: tests and benchmarks connect often.
    "KexAlgorithms=curve25519-sha256",
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

async function isListening(hostname: string, port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname, port })).close();
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.ConnectionRefused) return false;
    throw error;
  }
}

/** Registers a test that has an sshd of its own; ignored, aloud, if none can be started. */
export function sshdTest(name: string, test: (sshd: Sshd) => Promise<void>): void {
  testUnless(sshdMissing(), name, async () => {
    await using sshd = await startSshd();
    await test(sshd);
  });
}
