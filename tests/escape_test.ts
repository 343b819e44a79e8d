// deno-lint-ignore-file no-control-regex
import {
  assert,
  assertEquals,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt } from "./cluster.ts";
import { type LoopbackNode, send, startNode } from "./loopback_cluster.ts";
import { type InventoryFile, writeInventory } from "./process.ts";
import { type MainResult, runMain } from "./run_main.ts";

/** A colour, a window title, the same from C1, a way back over the line, and bidirectional controls. */
const CONTROLS = "\x1b[31m\x1b]0;owned\x07\x9b2J\x9d0;t\x9c\r" +
  "\u202e\u2066\u200f\u061c\x00\x7f";

/** The part of it that an inventory may hold; it refuses the others. */
const BIDI = "\u202ereversed\u202c\u2066\u200e";

const HARMFUL =
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/;

function assertHarmless({ stdout, stderr }: MainResult): void {
  const text = stdout + stderr;
  const found = HARMFUL.exec(text);
  if (!found) return;

  const around = text.slice(Math.max(0, found.index - 60), found.index + 9);
  throw new Error(JSON.stringify(around));
}

/** Puts `--config` before the remote command. */
function lineOf(line: string, path: string): string[] {
  const [before = "", remote] = line.split(" -- ");
  const after = remote === undefined ? [] : ["--", remote];
  return [...before.split(" "), "--config", path, ...after];
}

// --- What a node answers ---

/** Starts nodes that answer with control characters, each in its own way. */
async function startHostile() {
  await using stack = new AsyncDisposableStack();

  const say = async (text: string): Promise<LoopbackNode> => {
    return stack.use(await startNode((conn) => send(conn, text)));
  };
  const document = {
    version: CONTROLS,
    game_count: CONTROLS,
    [CONTROLS]: [CONTROLS],
  };
  const server = stack.use(Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    () => Response.json(document),
  ));
  const redirect = `HTTP/1.1 302 Found\r\nLocation: ${CONTROLS}\r\n\r\n`;
  const line = `HTTP/1.1 500 ${CONTROLS}\r\n${CONTROLS}\r\n\r\n`;
  const { path } = stack.use(
    await writeInventory({
      "chatty": hostAt(server.addr),
      "redirect": hostAt(await say(redirect)),
      "banner": hostAt(await say(`SSH-2.0-${CONTROLS}\r\n\r\n`)),
      "status-line": hostAt(await say(line)),
    }),
  );

  const held = stack.move();
  return {
    path,
    document,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

const HOSTILE = [
  "status",
  "status --json",
  "status --gather",
  `status --show ${CONTROLS.replace("\x00", "").replace("\r", "")},version`,
  "wait --timeout 300ms",
  "wait --timeout 300ms --json",
];

for (const [index, line] of HOSTILE.entries()) {
  const name = index === 3 ? "status --show with controls" : line;

  Deno.test(`cluster-hosts ${name} escapes what a node answers`, async () => {
    await using hostile = await startHostile();

    const result = await runMain(lineOf(line, hostile.path));

    assertHarmless(result);
    assertStringIncludes(result.stdout, "chatty");
  });
}

Deno.test("cluster-hosts status shows what it escapes, and JSON keeps what a node answers", async () => {
  await using hostile = await startHostile();

  const table = await runMain(["status", "-c", hostile.path]);
  const json = await runMain(["status", "--json", "-c", hostile.path]);

  assertStringIncludes(table.stdout, String.raw`\u{1b}[31m`);
  assertStringIncludes(json.stdout, String.raw`"version":"\u001b[31m`);
  const { nodes } = JSON.parse(json.stdout);
  assertEquals(nodes[0].status, hostile.document);
  assertEquals(
    nodes.slice(2).map(
      ({ failure }: { failure: { code: string } }) => failure.code,
    ),
    ["bad-response", "http-status"],
  );
});

// --- What an inventory holds ---

const NAME = `gpu-${BIDI}`;

async function startBidi() {
  await using stack = new AsyncDisposableStack();
  const node = stack.use(await startNode("ok"));
  const fields = {
    role: BIDI,
    gpu: BIDI,
    status: BIDI,
    note: BIDI,
    // Keys of the user's own may hold anything.
    own: CONTROLS,
  };
  const hosts = { [NAME]: hostAt(node, fields), [`dead-${BIDI}`]: {} };
  const elo_sync = { coordinator: BIDI };
  const inventory: InventoryFile = stack.use(
    await writeInventory(hosts, { elo_sync }),
  );

  const held = stack.move();
  return {
    path: inventory.path,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

const LINES = [
  "status",
  "status --json",
  "status --names",
  "status --gather",
  "nodes",
  "nodes --names",
  "nodes --json",
  "nodes --role x",
  "nodes --where own=x",
  "urls data --include-self",
  "wait --timeout 100ms",
  "wait --timeout 100ms --json",
  "coordinator",
  "validate",
  "validate --json",
  "export ansible",
  "export prometheus",
  "export ssh-config",
  "status gpu",
  "permissions status",
  "ssh * --dry-run -- true",
];

for (const line of LINES) {
  Deno.test(`cluster-hosts ${line} escapes what an inventory holds`, async () => {
    await using bidi = await startBidi();

    const result = await runMain(lineOf(line, bidi.path));

    assert(result.stdout + result.stderr !== "");
    assertHarmless(result);
    if (line.includes("--json")) JSON.parse(result.stdout);
  });
}

Deno.test("cluster-hosts nodes --json keeps what an inventory holds", async () => {
  await using bidi = await startBidi();

  const { stdout } = await runMain(["nodes", "--json", "-c", bidi.path]);

  const [{ name, gpu, role, own }] = JSON.parse(stdout).nodes;
  assertEquals([name, gpu, role, own], [NAME, BIDI, BIDI, CONTROLS]);
});

// --- What is wrong ---

const TEXT = CONTROLS.replace("\x00", "");

const BAD_HOSTS = JSON.stringify({
  hosts: {
    [`name${CONTROLS}`]: {},
    a: {
      ssh_port: CONTROLS,
      tailscale_ip: CONTROLS,
      status: CONTROLS,
      data_server_url: `http://${CONTROLS}`,
    },
  },
});

const TYPOS = JSON.stringify({
  hosts: { a: { ["tailscale_ip\u202e"]: "x", ["ssh_user\x1b"]: "x" } },
});

const GOOD = "hosts: { a: { ssh_host: h } }";

/** Lines whose errors quote control characters. */
const ERRORS: readonly (readonly [
  name: string,
  args: readonly string[],
  stdin?: string,
])[] = [
  ["a bad inventory", ["nodes", "-c", "-"], BAD_HOSTS],
  ["a bad inventory, validated", ["validate", "-c", "-"], BAD_HOSTS],
  ["a bad one as JSON", ["validate", "-c", "-", "--json"], BAD_HOSTS],
  ["keys that are typos", ["validate", "-c", "-"], TYPOS],
  ["broken YAML", ["nodes", "-c", "-"], `hosts: "${TEXT}\n`],
  ["a YAML tag", ["nodes", "-c", "-"], `hosts: !<${TEXT}> x\n`],
  ["a path", ["nodes", "-c", `/tmp/${TEXT}`]],
  ["a URL", ["nodes", "-c", `http://127.0.0.1:1/${TEXT}`]],
  ["a command", [TEXT]],
  ["an option", ["status", `--${TEXT}`]],
  ["a letter", ["status", `-${TEXT}`]],
  ["a value", ["status", "--timeout", TEXT]],
  ["a kind", ["export", TEXT]],
  ["a kind of urls", ["urls", TEXT]],
  ["a NODE", ["nodes", TEXT, "-c", "-"], GOOD],
  ["a role", ["nodes", "--role", TEXT, "-c", "-"], GOOD],
  ["a path of urls", ["urls", "elo", "--path", `/${TEXT}`, "-c", "-"], GOOD],
  [
    "a user",
    ["ssh", "a", "-c", "-", "--user", TEXT, "--dry-run", "--", "true"],
    GOOD,
  ],
  ["a remote command", ["ssh", "a", "-c", "-", "--dry-run", "--", TEXT], GOOD],
];

for (const [name, args, stdin = ""] of ERRORS) {
  Deno.test(`cluster-hosts escapes what it says of ${name} with control characters`, async () => {
    const result = await runMain(args, { stdin });

    assert(result.stdout + result.stderr !== "");
    assertHarmless(result);
  });
}
