import { assert, assertEquals, assertStringIncludes } from "jsr:@std/assert@^1.0.19";
import { USES_JSR } from "./checkout.ts";
import { ROOT, run, tempFolder, testUnless } from "./process.ts";

const CONFIG = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
const SHIPPED = [
  "CHANGELOG.md",
  "LICENSE",
  "README.md",
  "cli.ts",
  "cluster_hosts.ts",
  "config/README.md",
  "config/demo_hosts.yaml",
  "config/distributed_hosts.example.yaml",
  "deno.json",
  "mod.ts",
];

/** A copy of what is shipped, with files around it that must not be. */
async function copyWithStrays() {
  const temp = await tempFolder();
  const strays = [
    ".env",
    "notes.txt",
    "other.ts",
    "config/distributed_hosts.yaml",
    "tests/x_test.ts",
    ".github/ci.yml",
  ];
  for (const folder of ["config", "tests", ".github"]) await Deno.mkdir(`${temp.folder}/${folder}`);
  for (const file of [...SHIPPED, "deno.lock"]) {
    await Deno.copyFile(ROOT + file, `${temp.folder}/${file}`).catch((error) => {
      // The job that takes @std from JSR has no lock.
      if (file !== "deno.lock" || !(error instanceof Deno.errors.NotFound)) throw error;
    });
  }
  for (const stray of strays) await Deno.writeTextFile(`${temp.folder}/${stray}`, "");
  return temp;
}

async function publishedFiles(folder: string): Promise<string[]> {
  const args = ["publish", "--dry-run", "--allow-dirty"];
  const { code, stdout, stderr } = await run("deno", args, { cwd: folder, env: { NO_COLOR: "1" } });
  assertEquals(code, 0, stderr);
  const listed = (stdout + stderr).matchAll(/^ +file:\/\/(\S+) \(/gm);
  return [...listed].map(([, path]) => path!.slice(path!.indexOf(folder) + folder.length + 1)).toSorted();
}

/** The commands of a workflow's step. */
async function step(workflow: string, name: string): Promise<string> {
  const text = await Deno.readTextFile(`${ROOT}.github/workflows/${workflow}.yml`);
  const command = text.split(`- name: ${name}\n`)[1]?.match(/^ +run: (.*)$/m)?.[1];
  if (!command) throw new Error(`${workflow}.yml has no step "${name}"`);
  return command;
}

// Only a map to a registry stands in for JSR: files beside the package could not be published.
const maps: string[] = Object.values(CONFIG.imports ?? {});
const missing = USES_JSR || maps.every((target) => target.startsWith("npm:"))
  ? undefined
  : "needs JSR, or the import map of the checkout";

testUnless(missing, "deno publish ships the package, and nothing that lies around it", async () => {
  await using copy = await copyWithStrays();
  assertEquals(await publishedFiles(copy.folder), SHIPPED);
});

Deno.test("the workflows drop the import map and nothing else before @std comes from JSR", async () => {
  const command = await step("release", "Drop the import map");
  assertEquals(await step("ci", "Drop the import map"), command);
  const [, script] = /^npx -y deno@2\.9\.6 eval '([^']*)'$/.exec(command) ?? [];
  await using copy = await copyWithStrays();
  await Deno.writeTextFile(`${copy.folder}/deno.lock`, "{}");
  const { code, stderr } = await run("deno", ["eval", "--no-config", script!], { cwd: copy.folder });
  assertEquals([code, stderr], [0, ""]);

  const { imports: _imports, ...others } = CONFIG;
  assertEquals(JSON.parse(await Deno.readTextFile(`${copy.folder}/deno.json`)), others);
  const files = Array.from(Deno.readDirSync(copy.folder), ({ name }) => name);
  assert(!files.includes("deno.lock"));
  for (const file of SHIPPED.filter((name) => name.endsWith(".ts"))) {
    assert(!/ from "npm:/.test(await Deno.readTextFile(`${copy.folder}/${file}`)), `${file} imports from npm`);
  }
  const { code: unformatted } = await run("deno", ["fmt", "-q", "--check", "deno.json"], { cwd: copy.folder });
  assertEquals(unformatted, 0);
  if (USES_JSR) assertEquals(await publishedFiles(copy.folder), SHIPPED);
});

Deno.test("the changelog's newest version is that of deno.json", async () => {
  const changelog = await Deno.readTextFile(`${ROOT}CHANGELOG.md`);
  assertEquals(/^## \[(.+?)\]/m.exec(changelog)?.[1], CONFIG.version);
});

Deno.test("each task runs with a permission set, none with every permission", () => {
  for (const [name, { command }] of Object.entries<{ command: string }>(CONFIG.tasks)) {
    assert(!/ -A\b|--allow-all/.test(command), name);
    const set = /-P=(\w+)/.exec(command)?.[1];
    assert(!/deno (run|test|compile)/.test(command) || set && set in CONFIG.permissions, name);
  }
});

Deno.test("CI runs the commands of the README", async () => {
  const readme = await Deno.readTextFile(`${ROOT}README.md`);
  const script = await Deno.readTextFile(`${ROOT}.ci/run`);
  for (const command of ["npx -y deno@2.9.6 task test"]) {
    assertStringIncludes(readme, command);
    assertStringIncludes(script, `\n${command}\n`);
  }
  // One version of Deno everywhere.
  for (const file of ["README.md", ".ci/run", ".github/workflows/ci.yml", ".github/workflows/release.yml"]) {
    const versions = (await Deno.readTextFile(ROOT + file)).match(/deno@[\d.]+/g) ?? [];
    assertEquals(new Set(versions), new Set(["deno@2.9.6"]), file);
  }
});
