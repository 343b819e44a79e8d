/**
 * Networks of their own, in which packets get lost and names resolve as a test
 * wants it. Root makes them, and any user to whom the system gives user
 * namespaces.
 *
 * @module
 */
import {
  programMissing,
  run,
  type RunOptions,
  type RunResult,
  start,
  tempFolder,
} from "./process.ts";

/** A network that {@linkcode startNetns} made. Its disposal ends it. */
export interface Netns extends AsyncDisposable {
  /** What a command line begins with that runs the rest in it. */
  readonly enter: readonly string[];

  /** Runs a program in it. */
  run(
    program: string,
    args: readonly string[],
    options?: Omit<RunOptions, "flags">,
  ): Promise<RunResult>;
}

/** Options of {@linkcode startNetns}. */
export interface NetnsOptions {
  /**
   * Shell commands that set it up, such as `iptables -A INPUT -d 127.0.0.66 -j
   * DROP`. Its loopback is up already.
   *
   * @default {"true"}
   */
  readonly setup?: string;

  /**
   * The content of files there, such as /etc/hosts. They have to exist.
   *
   * @default {{}}
   */
  readonly files?: Readonly<Record<string, string>>;
}

/**
 * Returns the command that drops this share of all packets of the network,
 * answers included.
 */
export function dropPackets(share: number): string {
  return `iptables -A INPUT -m statistic --mode random --probability ${share} -j DROP`;
}

const isRoot = Deno.build.os === "linux" && Deno.uid() === 0;

const UNSHARE = isRoot
  ? ["unshare", "--net", "--mount"]
  : ["unshare", "--user", "--map-root-user", "--net", "--mount"];

const NSENTER = isRoot
  ? ["nsenter", "--net", "--mount", "--wd"]
  : ["nsenter", "--user", "--preserve-credentials", "--net", "--mount", "--wd"];

/**
 * Returns why no network can be made here that `setup` works in, or `undefined`
 * if one can.
 */
export function netnsMissing(setup = "true"): string | undefined {
  if (Deno.build.os !== "linux") {
    return "needs Linux, which has network namespaces";
  }

  for (const program of ["unshare", "nsenter", "ip", "iptables"]) {
    const missing = programMissing(program);
    if (missing !== undefined) {
      return `${missing}: install util-linux, iproute2 and iptables`;
    }
  }

  const script = [
    "ip link set lo up",
    dropPackets(0.5),
    "mount --bind /etc/hosts /etc/resolv.conf",
    setup,
  ];
  const [program, ...args] = [...UNSHARE, "sh", "-c", script.join(" && ")];
  const command = new Deno.Command(program!, { args, stdout: "null" });
  const { success, stderr } = command.outputSync();
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

  const script = [
    "ip link set lo up",
    ...mounts,
    setup,
    "echo $$",
    "exec sleep 600",
  ];
  const [program, ...args] = [...UNSHARE, "sh", "-ec", script.join("\n")];
  const holder = stack.use(start(program!, args, { limitMs: 600_000 }));
  const { value: pid } = await holder.stdout.next();
  if (pid === undefined) {
    const { stderr } = await holder.end();
    throw new Error(`No network namespace: ${stderr.join("\n")}`);
  }

  const enter = [...NSENTER, "--target", pid, "--"];
  const held = stack.move();
  return {
    enter,
    run: (program, args, options) => {
      return run(enter[0]!, [...enter.slice(1), program, ...args], options);
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}
