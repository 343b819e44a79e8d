/**
 * A real sshd on a free port of this machine's loopback, with keys of its own.
 *
 * @module
 */
import { delay } from "jsr:@std/async@^1.5.0/delay";

const SSHD = "/usr/sbin/sshd";

/** Why the tests of ssh cannot run here, or `undefined` where they can. */
export const whyNoSshd = missingPart();

function missingPart(): string | undefined {
  try {
    Deno.statSync(SSHD);
  } catch {
    return `no ${SSHD}: install openssh-server`;
  }
}

/** What a client needs to reach it. */
export interface Sshd extends AsyncDisposable {
  readonly port: number;
  readonly user: string;
  readonly keyPath: string;
  /** Options as `ssh -o` takes them, with which the client's own files stay out of it. */
  readonly options: readonly string[];
}

/** Starts sshd, and waits until it accepts. */
export async function startSshd(): Promise<Sshd> {
  const folder = await Deno.makeTempDir({ dir: "/tmp" });
  for (const name of ["host_key", "user_key"]) {
    await new Deno.Command("ssh-keygen", { args: ["-q", "-t", "ed25519", "-N", "", "-f", `${folder}/${name}`] })
      .output();
  }
  const port = freePort();
  await Deno.writeTextFile(
    `${folder}/sshd_config`,
    [
      `Port ${port}`,
      "ListenAddress 127.0.0.1",
      `HostKey ${folder}/host_key`,
      `AuthorizedKeysFile ${folder}/user_key.pub`,
      "PidFile none",
      "StrictModes no",
      "UsePAM no",
      "PasswordAuthentication no",
      // Many come at once, all from one address.
      "MaxStartups 1000",
      // The developer's own shell may say more at a login, and take longer, than what a test asks for.
      'ForceCommand /bin/sh -c "$SSH_ORIGINAL_COMMAND"',
      "",
    ].join("\n"),
  );
  const sshd = new Deno.Command(SSHD, {
    args: ["-D", "-e", "-f", `${folder}/sshd_config`],
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const log = new Response(sshd.stderr).text();
  const stop = async () => {
    try {
      sshd.kill();
    } catch {
      // It has ended already.
    }
    await sshd.status;
    await log;
    await Deno.remove(folder, { recursive: true });
  };
  try {
    await accepts(port);
  } catch (cause) {
    await stop();
    throw new Error(`sshd does not start: ${await log}`, { cause });
  }
  return {
    port,
    user: Deno.env.get("USER") || "root",
    keyPath: `${folder}/user_key`,
    options: ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"],
    [Symbol.asyncDispose]: stop,
  };
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

async function accepts(port: number): Promise<void> {
  for (let attempt = 0;; attempt++) {
    try {
      (await Deno.connect({ hostname: "127.0.0.1", port })).close();
      return;
    } catch (error) {
      if (attempt === 50) throw error;
      await delay(50);
    }
  }
}
