import {
  assert,
  assertEquals,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { registryMissing, USES_JSR } from "./checkout.ts";
import {
  ROOT,
  run,
  type TempFolder,
  tempFolder,
  testUnless,
} from "./process.ts";

const CONFIG = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));

const NO_REGISTRY = await registryMissing();

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

const STRAYS = [
  ".env",
  "notes.txt",
  "other.ts",
  "config/distributed_hosts.yaml",
  "tests/x_test.ts",
  ".github/ci.yml",
];

/** Copies what is shipped, with files around it that must not be. */
async function copyWithStrays(): Promise<TempFolder> {
  const temp = await tempFolder();

  for (const folder of ["config", "tests", ".github"]) {
    await Deno.mkdir(`${temp.folder}/${folder}`);
  }
  for (const file of SHIPPED) {
    await Deno.copyFile(ROOT + file, `${temp.folder}/${file}`);
  }
  for (const stray of STRAYS) {
    await Deno.writeTextFile(`${temp.folder}/${stray}`, "");
  }

  // The job that takes @std from JSR has no lock.
  if (!USES_JSR && NO_REGISTRY === undefined) {
    await Deno.copyFile(`${ROOT}deno.lock`, `${temp.folder}/deno.lock`);
  }
  return temp;
}

/** Lists the files that `deno publish` would ship. */
async function publishedFiles(folder: string): Promise<string[]> {
  const args = ["publish", "--dry-run", "--allow-dirty"];
  const env = { NO_COLOR: "1" };
  const { code, stdout, stderr } = await run("deno", args, {
    cwd: folder,
    env,
  });
  assertEquals(code, 0, stderr);

  const listed = (stdout + stderr).matchAll(/^ +file:\/\/(\S+) \(/gm);
  const files = Array.from(listed, ([, path = ""]) => {
    return path.slice(path.indexOf(folder) + folder.length + 1);
  });
  return files.toSorted();
}

/** Returns the command of a workflow's step. */
async function stepCommand(workflow: string, name: string): Promise<string> {
  const path = `${ROOT}.github/workflows/${workflow}.yml`;
  const text = await Deno.readTextFile(path);

  const [, after = ""] = text.split(`- name: ${name}\n`);
  const [, command] = /^ +run: (.*)$/m.exec(after) ?? [];
  if (!command) throw new Error(`${workflow}.yml has no step "${name}"`);
  return command;
}

testUnless(
  NO_REGISTRY,
  "deno publish ships the package, and no file around it",
  async () => {
    await using copy = await copyWithStrays();

    assertEquals(await publishedFiles(copy.folder), SHIPPED);
  },
);

Deno.test("the workflows remove the import map, and nothing else, before @std comes from JSR", async () => {
  const command = await stepCommand("release", "Drop the import map");
  assertEquals(await stepCommand("ci", "Drop the import map"), command);
  const [, script = ""] = /^npx -y deno@[\d.]+ eval '([^']*)'$/.exec(command) ??
    [];
  assert(script, command);

  await using copy = await copyWithStrays();
  const cwd = copy.folder;
  await Deno.writeTextFile(`${cwd}/deno.lock`, "{}");
  const args = ["eval", "--no-config", script];
  const { code, stderr } = await run("deno", args, { cwd });
  assertEquals([code, stderr], [0, ""]);

  const { imports: _imports, ...others } = CONFIG;
  const left = JSON.parse(await Deno.readTextFile(`${cwd}/deno.json`));
  assertEquals(left, others);
  const files = Array.from(Deno.readDirSync(cwd), ({ name }) => name);
  assert(!files.includes("deno.lock"));
  if (USES_JSR) assertEquals(await publishedFiles(cwd), SHIPPED);
});

for (const file of SHIPPED.filter((name) => name.endsWith(".ts"))) {
  Deno.test(`${file} imports @std by specifiers of JSR, and each is in the import map`, async () => {
    const source = await Deno.readTextFile(ROOT + file);
    const imported = Array.from(
      source.matchAll(/ from "((?:jsr|npm|https?):[^"]*)"/g),
      ([, specifier = ""]) => specifier,
    );

    for (const specifier of imported) {
      assert(specifier.startsWith("jsr:@std/"), specifier);
      assert(USES_JSR || specifier in CONFIG.imports, specifier);
    }
  });
}

Deno.test("the changelog's newest version is that of deno.json", async () => {
  const changelog = await Deno.readTextFile(`${ROOT}CHANGELOG.md`);

  const [, version] = /^## \[(.+?)\]/m.exec(changelog) ?? [];
  assertEquals(version, CONFIG.version);
});

Deno.test("each task of deno.json runs with a permission set, none with every permission", () => {
  const tasks = Object.entries<{ command: string }>(CONFIG.tasks);

  for (const [name, { command }] of tasks) {
    assert(!/ -A\b|--allow-all/.test(command), name);
    if (!/deno (run|test|compile)/.test(command)) continue;

    const [, set] = /-P=(\w+)/.exec(command) ?? [];
    assert(set !== undefined && set in CONFIG.permissions, name);
  }
});

Deno.test("CI runs the command of the README that tests", async () => {
  const readme = await Deno.readTextFile(`${ROOT}README.md`);
  const script = await Deno.readTextFile(`${ROOT}.ci/run`);
  const command = "npx -y deno@2.9.6 task test";

  assertStringIncludes(readme, command);
  assertStringIncludes(script, `\n${command}\n`);
});

const WITH_VERSION = [
  "README.md",
  ".ci/run",
  ".github/workflows/ci.yml",
  ".github/workflows/release.yml",
];

for (const file of WITH_VERSION) {
  Deno.test(`${file} names the one version of Deno that is tested`, async () => {
    const text = await Deno.readTextFile(ROOT + file);

    const versions = new Set(text.match(/deno@[\d.]*\d/g));
    assertEquals(versions, new Set(["deno@2.9.6"]));
  });
}
