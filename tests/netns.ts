/**
 * Networks of their own, in which packets get lost and names resolve as a test wants it. Root makes them, and any user
 * to whom the system gives user namespaces.
 *
 * @module
 */
import { programMissing, run, type RunOptions, type RunResult, start, tempFolder } from "./process.ts";

/** A network that {@linkcode startNetns} made. Its disposal ends it. */
export interface Netns extends AsyncDisposable {
  /** What a command line begins with that runs the rest in it. */
  readonly enter: readonly string[];
  /** Runs a program in it. */
  run(program: string, args: readonly string[], options?: Omit<RunOptions, "flags">): Promise<RunResult>;
}

export interface NetnsOptions {
  /** Shell commands that set it up, such as `iptables -A INPUT -d 127.0.0.66 -j DROP`. Its loopback is up already. */
  readonly setup?: string;
  /** What files have as their content there, such as /etc/hosts. They have to exist. */
  readonly files?: Readonly<Record<string, string>>;
}

/** Drops this share of all packets of the network, answers included. */
export function dropPackets(share: number): string {
  return `iptables -A INPUT -m statistic --mode random --probability ${share} -j DROP`;
}

const isRoot = Deno.build.os === "linux" && Deno.uid() === 0;
const UNSHARE = ["unshare", ...(isRoot ? [] : ["--user", "--map-root-user"]), "--net", "--mount"];
const NSENTER = ["nsenter", ...(isRoot ? [] : ["--user", "--preserve-credentials"]), "--net", "--mount", "--wd"];

/** Why no network can be made here that `setup` works in, or `undefined` if one can. */
export function netnsMissing(setup = "true"): string | undefined {
  if (Deno.build.os !== "linux") return "needs Linux, which has network namespaces";
  const programs = ["unshare", "nsenter", "ip", "iptables"];
  const missing = programs.map(programMissing).find((missing) => missing !== undefined);
  if (missing !== undefined) return `${missing}: install util-linux, iproute2 and iptables`;
  const script = `ip link set lo up && ${dropPackets(0.5)} && mount --bind /etc/hosts /etc/resolv.conf && ${setup}`;
  const [program, ...args] = [...UNSHARE, "sh", "-c", script];
  const { success, stderr } = new Deno.Command(program!, { args, stdout: "null" }).outputSync();
  if (success) return undefined;
  const [reason = ""] = new TextDecoder().decode(stderr).split("\n");
  return `needs a network namespace, which cannot be made here: ${reason}`;
}

/** Makes a network that has nothing but its loopback. */
export async function startNetns(options: NetnsOptions = {}): Promise<Netns> {
  const { setup = "true", files = {} } = options;
  await using stack = new AsyncDisposableStack();
  const { folder } = stack.use(await tempFolder());
  const mounts: string[] = [];
  for (const [index, [path, content]] of Object.entries(files).entries()) {
    await Deno.writeTextFile(`${folder}/${index}`, content);
    mounts.push(`mount --bind ${folder}/${index} ${path}`);
  }
  const script = ["ip link set lo up", ...mounts, setup, "echo $$", "exec sleep 600"].join("\n");
  const [program, ...args] = [...UNSHARE, "sh", "-ec", script];
  const holder = stack.use(start(program!, args, { limitMs: 600_000 }));
  const { value: pid } = await holder.stdout.next();
  if (pid === undefined) throw new Error(`No network namespace: ${(await holder.end()).stderr.join("\n")}`);
  const enter = [...NSENTER, "--target", pid, "--"];
  const held = stack.move();
  return {
    enter,
    run: (program, args, options) => run(enter[0]!, [...enter.slice(1), program, ...args], options),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}
