/**
 * What README.md and config/README.md show, and a user's folder to try it in.
 *
 * @module
 */
import { ROOT, run, type TempFolder, tempFolder } from "./process.ts";

export const README = await Deno.readTextFile(`${ROOT}README.md`);
export const RECIPES = await Deno.readTextFile(`${ROOT}config/README.md`);

export type Hosts = Readonly<Record<string, Readonly<Record<string, unknown>>>>;

/** Returns the texts of the code blocks in one language. */
export function codeBlocks(markdown: string, language: string): string[] {
  const fence = new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\``, "gms");
  return [...markdown.matchAll(fence)].map(([, text]) => text!);
}

/** Returns the code block that begins with a comment that names a file. */
export function fileIn(
  markdown: string,
  language: string,
  name: string,
): string {
  const isNamed = (text: string) => {
    const comments = text.split("\n").slice(0, 2);
    return comments.some((line) =>
      /^(?:\/\/|#) (\S+?)[,:]?(?: |$)/.exec(line)?.[1]?.endsWith(name)
    );
  };
  const text = codeBlocks(markdown, language).find(isNamed);
  if (text === undefined) throw new Error(`No code block is ${name}`);
  return text;
}

/** A home folder with an inventory, where `cluster-hosts` is installed. */
export interface UserFolder extends TempFolder {
  /** The variables with which a shell finds `cluster-hosts`. */
  readonly env: Readonly<Record<string, string>>;
  /** Writes the inventory at the default path. */
  write(
    hosts: Hosts,
    sections?: Readonly<Record<string, unknown>>,
  ): Promise<void>;
  /** Runs a line of shell there, as its user would type it. */
  shell(line: string): ReturnType<typeof run>;
}

/** Makes the home folder of a user who has installed `cluster-hosts`. */
export async function userFolder(
  hosts: Hosts,
  sections: Readonly<Record<string, unknown>> = {},
): Promise<UserFolder> {
  const temp = await tempFolder();
  const { folder } = temp;
  const bin = `${folder}/.deno/bin`;
  await Deno.mkdir(bin, { recursive: true });
  await Deno.mkdir(`${folder}/config`);
  await writeProgram(`${bin}/cluster-hosts`, await installedScript());

  const write: UserFolder["write"] = (hosts, sections = {}) =>
    Deno.writeTextFile(
      `${folder}/config/distributed_hosts.yaml`,
      JSON.stringify({ hosts, ...sections }),
    );
  await write(hosts, sections);

  const env = { HOME: folder, PATH: `${bin}:${Deno.env.get("PATH")}` };
  const shell = (line: string) => run("sh", ["-c", line], { cwd: folder, env });
  return { ...temp, env, write, shell };
}

/** Writes a file that can be executed. */
export function writeProgram(path: string, text: string): Promise<void> {
  return Deno.writeTextFile(path, text, { mode: 0o755 });
}

/** Returns what `deno install` would have installed, for any environment. */
async function installedScript(): Promise<string> {
  const { stdout: deno } = await run("deno", ["eval", "-p", "Deno.execPath()"]);
  const { stdout: info } = await run("deno", ["info", "--json"]);
  const flags = `-q --no-prompt -P=cli --config ${ROOT}deno.json`;
  return `#!/bin/sh
export DENO_DIR=${JSON.parse(info).denoDir}
exec ${deno.trim()} run ${flags} ${ROOT}cli.ts "$@"
`;
}
