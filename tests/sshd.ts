/**
 * Real ssh servers and agents on loopback, for the tests and the benchmark of
 * commands over ssh.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";
import { unusedPort } from "./loopback_cluster.ts";
import {
  programMissing,
  run,
  start,
  tempFolder,
  testUnless,
} from "./process.ts";
import { childrenOf, kill, processesWith } from "./ssh_process.ts";

const SSHD = "/usr/sbin/sshd";

/**
 * The addresses that an sshd listens at. The same command prints different
 * things on them, since `$SSH_CONNECTION` names the address.
 */
export const SSHD_ADDRESSES = ["127.0.0.1", "127.0.0.2", "127.0.0.9"] as const;

/** Prints the address of the server that the command runs on. */
export const PRINT_ADDRESS = "set -- $SSH_CONNECTION; echo $3";

/** Options of {@linkcode startSshd}. */
export interface SshdOptions {
  /** Further lines of sshd_config(5). */
  readonly config?: readonly string[];
}

/** A server that {@linkcode startSshd} started. Its disposal stops it. */
export interface Sshd extends AsyncDisposable {
  readonly port: number;
  readonly user: string;
  /** A folder of its own; it is the HOME of commands. */
  readonly folder: string;
  /** The private key that it admits. */
  readonly keyPath: string;
  /** A private key that it does not admit. */
  readonly otherKeyPath: string;
  /** The public key of the server. */
  readonly hostKey: string;
  /** What ssh needs to trust it and to use no other key, `KEY=VALUE` each. */
  readonly options: readonly string[];
  /** The fields with which it stands in an inventory. */
  readonly host: Readonly<Record<string, unknown>>;
  /** {@linkcode options} as arguments of `cluster-hosts ssh`. */
  readonly flags: readonly string[];
  /** Ends it with all its sessions, as a machine that goes down. */
  stop(): Promise<void>;
  /** Starts it again, with the same port and the same keys. */
  restart(): Promise<void>;
  /** Ends the commands that go on although their connection is gone. */
  endCommands(): Promise<void>;
  /** How many connections it has accepted since it was started. */
  connections(): Promise<number>;
}

/** Why no sshd can be started here, or `undefined` if one can. */
export function sshdMissing(): string | undefined {
  if (Deno.build.os !== "linux") {
    return "needs Linux, where all of 127.0.0.0/8 is this machine";
  }

  const programs = [SSHD, "ssh", "ssh-keygen"];
  const missing = programs.map(programMissing).find((it) => it !== undefined);
  if (missing !== undefined) {
    return `${missing}: install OpenSSH's server and client`;
  }

  const isRoot = Deno.uid() === 0;
  const script = isRoot
    // Where it was never started as a service, sshd misses this folder.
    ? "mkdir -p /run/sshd"
    // It admits nobody but the user who started it, and that only to a shell.
    : 'getent passwd "$(id -un)" | grep -qv "/nologin$\\|/false$"';
  const command = new Deno.Command("sh", {
    args: ["-c", script],
    stdout: "null",
    stderr: "null",
  });
  if (command.outputSync().success) return undefined;

  return isRoot
    ? "needs /run/sshd, which cannot be made"
    : "needs a user with a login shell";
}

/** Why no terminal can be had over ssh here, or `undefined` if one can. */
export function remoteTerminalMissing(): string | undefined {
  return sshdMissing() ??
    (Deno.uid() === 0
      ? undefined
      : "needs root, whose sshd hands out terminals");
}

/** Starts an sshd on a free port of loopback. */
export async function startSshd(options: SshdOptions = {}): Promise<Sshd> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const user = (await run("sh", ["-c", "id -un"])).stdout.trim();

  const hostKeyPath = `${folder}/host`;
  const keyPath = `${folder}/user`;
  const otherKeyPath = `${folder}/other`;
  for (const path of [hostKeyPath, keyPath, otherKeyPath]) await makeKey(path);

  const port = unusedPort();
  const configPath = `${folder}/sshd_config`;
  const logPath = `${folder}/sshd.log`;
  await Deno.writeTextFile(
    configPath,
    [
      ...SSHD_ADDRESSES.map((address) => `ListenAddress ${address}:${port}`),
      `HostKey ${hostKeyPath}`,
      "PidFile none",
      `AuthorizedKeysFile ${keyPath}.pub`,
      // The folder is in one that everybody may write.
      "StrictModes no",
      "UsePAM no",
      "PasswordAuthentication no",
      "KbdInteractiveAuthentication no",
      "PermitRootLogin yes",
      "MaxStartups 1000",
      // One line a connection.
      "LogLevel VERBOSE",
      // What the login shell reads there could take long, and say something.
      `SetEnv HOME=${folder}`,
      ...options.config ?? [],
      "",
    ].join("\n"),
  );

  const endCommands = async () => kill(await processesWith(`HOME=${folder}`));
  let server: AsyncDisposable | undefined;
  const restart = async () => {
    server = await startServer(configPath, logPath, port);
  };
  const stop = async () => {
    await server?.[Symbol.asyncDispose]();
    server = undefined;
    await endCommands();
  };
  stack.defer(stop);
  await restart();

  const sshOptions = [
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    // The cheapest: tests and benchmarks connect often.
    "KexAlgorithms=curve25519-sha256",
  ];
  const publicKey = await Deno.readTextFile(`${hostKeyPath}.pub`);
  const held = stack.move();

  return {
    port,
    user,
    folder,
    keyPath,
    otherKeyPath,
    hostKey: publicKey.split(" ").slice(0, 2).join(" "),
    options: sshOptions,
    host: {
      tailscale_ip: SSHD_ADDRESSES[0],
      ssh_port: port,
      ssh_user: user,
      ssh_key: keyPath,
      status: "active",
    },
    flags: sshOptions.flatMap((option) => ["--ssh-option", option]),
    stop,
    restart,
    endCommands,
    async connections() {
      const log = await Deno.readTextFile(logPath);
      return log.match(/^Connection from /gm)?.length ?? 0;
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Makes a key pair without a passphrase. */
export async function makeKey(path: string): Promise<void> {
  const args = ["-q", "-t", "ed25519", "-N", "", "-f", path];
  const { code, stderr } = await run("ssh-keygen", args);
  if (code !== 0) throw new Error(`ssh-keygen: ${stderr}`);
}

async function startServer(
  configPath: string,
  logPath: string,
  port: number,
): Promise<AsyncDisposable> {
  await Deno.writeTextFile(logPath, "");
  const sshd = new Deno.Command(SSHD, {
    args: ["-D", "-f", configPath, "-E", logPath],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  let isEnded = false;
  const ended = sshd.status.then(() => {
    isEnded = true;
  });

  const server = {
    async [Symbol.asyncDispose]() {
      // Sessions outlive the server unless they are ended too.
      const sessions = await childrenOf(sshd.pid);
      if (!isEnded) sshd.kill("SIGTERM");
      await ended;
      await kill(sessions);
    },
  };
  // A connection would be counted as one of the test's.
  const listens = `Server listening on ${SSHD_ADDRESSES.at(-1)} port ${port}.`;
  while (!(await Deno.readTextFile(logPath)).includes(listens)) {
    if (isEnded) {
      const log = await Deno.readTextFile(logPath);
      throw new Error(`sshd does not listen: ${log}`);
    }
    await delay(20);
  }
  return server;
}

/** Registers a test with an sshd of its own; ignored if none can be started. */
export function sshdTest(
  name: string,
  test: (sshd: Sshd) => Promise<void>,
): void {
  testUnless(sshdMissing(), name, async () => {
    await using sshd = await startSshd();
    await test(sshd);
  });
}

/** An agent that {@linkcode startAgent} started. Its disposal ends it. */
export interface Agent extends AsyncDisposable {
  /** The variable with which ssh finds it. */
  readonly env: Readonly<Record<string, string>>;
}

/** Starts an ssh-agent with this many keys that no server here admits. */
export async function startAgent(keys: number): Promise<Agent> {
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const env = { SSH_AUTH_SOCK: `${folder}/agent` };

  const script = `exec ssh-agent -D -a ${env.SSH_AUTH_SOCK}`;
  const agent = stack.use(start("sh", ["-c", script], { limitMs: 600_000 }));
  // It prints its variables when it listens.
  await agent.stdout.next();

  const paths = Array.from(
    { length: keys },
    (_, index) => `${folder}/key${index}`,
  );
  for (const path of paths) await makeKey(path);
  const added = await run("sh", ["-c", `exec ssh-add -q ${paths.join(" ")}`], {
    env,
  });
  if (added.code !== 0) throw new Error(`ssh-add: ${added.stderr}`);

  const held = stack.move();
  return { env, [Symbol.asyncDispose]: () => held.disposeAsync() };
}
