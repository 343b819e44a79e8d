/**
 * What an inventory may and may not be: a bad one ends in one
 * `HostsConfigError`, soon, with path and line, and without a word of the file.
 *
 * @module
 */
import {
  assert,
  assertEquals,
  assertRejects,
  assertThrows,
} from "jsr:@std/assert@^1.0.19";
import {
  type ConfigProblem,
  getClusterNodes,
  type HostsConfig,
  HostsConfigError,
  loadHostsConfig,
  parseHostsConfig,
  selectNodes,
  sshCommand,
  validateHostsConfig,
} from "../mod.ts";
import { assertLinear } from "./linear.ts";
import { ROOT, tempFolder } from "./process.ts";
import { type Random, withRandom } from "./random.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false, read: "inherit", write: "inherit" } as const;

/** Stands in bad values, and may be in no message. */
const SECRET = "hunter2";

/** Returns `path:line` of each problem, either of which may be missing. */
function places(problems: readonly ConfigProblem[]): string[] {
  return problems.map(({ path, line }) =>
    line === undefined ? path : `${path}:${line}`
  );
}

function host(field: string): string {
  return `hosts:\n  a:\n    ${field}\n`;
}

function lines(count: number, line: (index: number) => string): string {
  return Array.from({ length: count }, (_, index) => line(index)).join("\n");
}

/** What is no inventory; each with the places of its problems. */
const REFUSED: [name: string, text: string, ...places: string[]][] = [
  ["a list", `- ${SECRET}\n`, ""],
  ["a string", `${SECRET}\n`, ""],
  ["a number", "22\n", ""],
  ["hosts that are a list", `hosts:\n  - ${SECRET}\n`, "hosts:1"],
  ["hosts that are a string", `# hosts\nhosts: ${SECRET}\n`, "hosts:2"],
  ["a host that is null", "hosts:\n  a: {}\n  b:\n", "hosts.b:3"],
  ["a host that is a list", `hosts:\n  a: [${SECRET}]\n`, "hosts.a:2"],
  ["a host that is a string", `hosts:\n  a: ${SECRET}\n`, "hosts.a:2"],
  ["an elo_sync that is a list", `elo_sync: [${SECRET}]\n`, "elo_sync:1"],
  ["defaults that are a list", `defaults: [${SECRET}]\n`, "defaults:1"],
  ["a host without a name", 'hosts:\n  "": {}\n', "hosts.:2"],
  ["a name with a newline", 'hosts:\n  "a\\nb": {}\n', 'hosts."a\\nb":2'],
  [
    "a name with an escape sequence",
    'hosts:\n  "a\\e[31mb": {}\n',
    'hosts."a\\u001b[31mb":2',
  ],
  [
    "a name with a C1 control",
    'hosts:\n  "a\\x9b31mb": {}\n',
    'hosts."a\x9b31mb":2',
  ],
  ["a name with a comma", 'hosts:\n  "a,b": {}\n', "hosts.a,b:2"],
  ["a name with a bracket", 'hosts:\n  "a[1]": {}\n', "hosts.a[1]:2"],
  ["a name with a wildcard", 'hosts:\n  "a*": {}\n', "hosts.a*:2"],
  ["a name with a blank at its end", 'hosts:\n  "a ": {}\n', "hosts.a :2"],
  [
    "a field of a host called __proto__",
    "hosts:\n  __proto__:\n    cpus: x\n",
    "hosts.__proto__.cpus:3",
  ],

  ["NUL", `hosts:\n  a: { note: "${SECRET}\0" }\n`, ""],
  ["two documents", `hosts: {}\n---\nnote: ${SECRET}\n`, ":2"],
  ["an unknown tag", `hosts: !${SECRET} {}\n`, ":1"],
  ["an unknown tag with brackets", `hosts: !<a>${SECRET}> {}\n`, ":1"],
  ["an unknown tag handle", `hosts: !${SECRET}!x {}\n`, ":1"],
  ["a tag that does not fit", `hosts: !!int ${SECRET}\n`, ":1"],
  ["a directive", `%YAML ${SECRET}\n---\nhosts: {}\n`, ":2"],
  ["an unknown alias", `hosts: *${SECRET}\n`, ":1"],
  ["an unknown alias with quotes", `hosts: *a"${SECRET}"\n`, ":1"],
  ["an open quote", `hosts:\n  a: { note: "${SECRET} }\n`, ":3"],
  ["an open brace", `hosts:\n  a: { note: ${SECRET}\n`, ":3"],
  ["an unknown escape", `hosts:\n  a: { note: "${SECRET}\\q" }\n`, ":2"],
  [
    "a key in the wrong column",
    `hosts:\n  a:\n    gpu: x\n   ${SECRET}: y\n`,
    ":4",
  ],
  ["HTML", `<!doctype html>\n<title>${SECRET}: gone</title>\n`, ""],
  ["HTML that is a mapping", `\n<title>${SECRET}: gone</title>\n`, ""],
  ["XML", `<?xml version="1.0"?><a>${SECRET}</a>`, ""],

  ["a tab before a host", `hosts:\n\ta: { note: ${SECRET} }\n`, ":2"],
  ["a tab before a field", `hosts:\n  a:\n\tnote: ${SECRET}\n`, ":3"],
  ["a tab after spaces", `hosts:\n  a:\n  \tnote: ${SECRET}\n`, ":3"],
  ["a tab before a comment", `hosts: {}\n\t# ${SECRET}\n`, ":2"],
  [
    "a tab after a block of text",
    `${host("note: |\n      a\n      \tb")}\tc: ${SECRET}\n`,
    ":6",
  ],
  ["a tab below a block of text", host("note: |\n      a\n    \tb: c"), ":5"],

  ["a merge of what is no mapping", `hosts:\n  a: { <<: ${SECRET} }\n`, ""],
  [
    "a merge of a list with what is no mapping",
    `hosts:\n  a: { <<: [{ b: 1 }, ${SECRET}] }\n`,
    "",
  ],
  ["an alias to itself", "hosts:\n  a: &a { self: *a }\n", ""],
  ["a mapping that merges itself", "hosts:\n  a: &a { <<: *a, cpus: 1 }\n", ""],
  ["two lists that hold each other", "x: &x\n  - &y [*x]\nhosts: {}\n", ""],

  [
    "a problem with CRLF",
    `hosts:\r\n  a:\r\n    ssh_user: ${SECRET} x\r\n`,
    "hosts.a.ssh_user:3",
  ],
];

for (const [name, text, ...expected] of REFUSED) {
  Deno.test(`parseHostsConfig() rejects ${name}`, () => {
    assertRefused(text, expected);
  });
}

function assertRefused(text: string, expected: string[]): void {
  const error: HostsConfigError = assertThrows(
    () => parseHostsConfig(text),
    HostsConfigError,
  );
  assertEquals(places(error.problems), expected);
  assertEquals(validateHostsConfig(text).problems, [...error.problems]);
  assertEquals(validateHostsConfig(text).config, undefined);

  const shown = Deno.inspect(error);
  assert(!shown.includes(SECRET), "the text of the file is shown");

  assertEquals(error.message.split("\n").length, expected.length);
  // deno-lint-ignore no-control-regex
  const hasControl = /[\x00-\x09\x0b-\x1f\x7f]/.test(error.message);
  assert(!hasControl, "a control character is shown");
}

Deno.test("parseHostsConfig() reports every problem, in the order of the file", () => {
  const text = `distributed:
  data_server_port: 70000
hosts:
  a: { ssh_port: 0, cpus: ${SECRET} }
  "b c":
    'ssh_port': 0 # why
    ssh_host: "-o${SECRET}"
    data_server_port: 22
  'it''s':
    cpus: -1
  c: {
    note: "ssh_port: 22",
    ssh_port: 0 }
  d:
    note: |
      ssh_port: 22
    ssh_port: 65536
  e: ${SECRET}
  7: { cpus: ${SECRET} }
elo_sync: { sync_port: 0, transports: ${SECRET} }
defaults: { ssh_port: 0, ssh_host: ${SECRET} }
`;
  assertRefused(text, [
    "distributed.data_server_port:2",
    "hosts.a.ssh_port:4",
    "hosts.a.cpus:4",
    "hosts.b c.ssh_port:6",
    "hosts.b c.ssh_host:7",
    "hosts.it's.cpus:10",
    "hosts.c.ssh_port:13",
    "hosts.d.ssh_port:17",
    "hosts.e:18",
    "hosts.7.cpus:19",
    "elo_sync.sync_port:20",
    "elo_sync.transports:20",
    "defaults.ssh_port:21",
    "defaults.ssh_host:21",
  ]);
});

/** Ways to write the same host, whose `ssh_port` is in the line that is given. */
const WRITTEN: [name: string, text: string, line: number][] = [
  ["after ---", "---\nhosts:\n  a:\n    ssh_port: 0\n", 4],
  ["after a comment and ---", "# x\n---\nhosts:\n  a: { ssh_port: 0 }\n", 4],
  ["after --- and a comment", "--- # x\nhosts:\n  a: { ssh_port: 0 }\n", 3],
  ["after a directive", "%YAML 1.2\n---\nhosts:\n  a: { ssh_port: 0 }\n", 4],
  ["beside ---", "--- { hosts: { a: { ssh_port: 0 } } }\n", 1],
  ["after a byte order mark", "\ufeffhosts:\n  a: { ssh_port: 0 }\n", 2],
  ["in hosts with an anchor", "hosts: &h\n  a:\n    ssh_port: 0\n", 3],
  ["in a host with an anchor", "hosts:\n  a: &a\n    ssh_port: 0\n", 3],
  ["in a host with a tag", "hosts:\n  a: !!map\n    ssh_port: 0\n", 3],
  [
    "in a host with an anchor and a comment",
    "hosts:\n  a: &a # x\n    ssh_port: 0\n",
    3,
  ],
  ["in JSON", '{\n"hosts": {\n"a": {\n"ssh_port": 0\n}}}', 4],
  ["in JSON without blanks", '{"hosts":{"a":{"ssh_port":0}}}', 1],
  ["in braces over lines", "hosts: {\n  a: {\n\n    ssh_port: 0 } }\n", 4],
  ["in quotes", "'hosts':\n  \"a\":\n    'ssh_port': 0\n", 3],
  ["with one blank of indentation", "hosts:\n a:\n  ssh_port: 0\n", 3],
  [
    "after a text of several lines",
    "hosts:\n  a:\n    note: b\n      c\n    ssh_port: 0\n",
    5,
  ],
  [
    "after a folded text",
    "hosts:\n  a:\n    note: >-\n      ssh_port: 1\n    ssh_port: 0\n",
    5,
  ],
  [
    "after a quoted text of several lines",
    'hosts:\n  a:\n    note: "b\n  ssh_port: 1"\n    ssh_port: 0\n',
    5,
  ],
  [
    "after a list",
    "hosts:\n  a:\n    b:\n    - ssh_port: 1\n    ssh_port: 0\n",
    5,
  ],
];

for (const [name, text, line] of WRITTEN) {
  Deno.test(`parseHostsConfig() reports the line of a field ${name}`, () => {
    assertRefused(text, [`hosts.a.ssh_port:${line}`]);
  });
}

const LINES: [text: string, line: string][] = [
  [
    host("ssh_port: 0"),
    "x.yaml:3: hosts.a.ssh_port: expected an integer from 1 to 65535",
  ],
  [
    "- a\n",
    'x.yaml: expected a mapping with a "hosts" section, got a list',
  ],
];

for (const [text, line] of LINES) {
  Deno.test(`parseHostsConfig() rejects with the line "${line}"`, () => {
    const { message }: Error = assertThrows(
      () => parseHostsConfig(text, "x.yaml"),
      HostsConfigError,
    );
    assertEquals(message, line);
  });
}

Deno.test("parseHostsConfig() reports line and column of broken YAML", () => {
  const { message }: Error = assertThrows(
    () => parseHostsConfig("hosts:\n  a: {\n", "x.yaml"),
    HostsConfigError,
  );
  assert(/^x\.yaml:3:\d+: is not valid YAML: [a-z]/.test(message), message);
});

// --- Keys that are there twice ---

/** Each with the line, the column and the name of the second one. */
const TWICE: [what: string, text: string, place: string, name: string][] = [
  ["hosts", "hosts:\n  aa: {}\n  bb: {}\n  aa: {}\n", "4:3", "aa"],
  ["hosts in braces", "hosts: { aa: {}, aa: {} }\n", "1:18", "aa"],
  ["hosts in quotes", "hosts:\n  'aa': {}\n  \"aa\": {}\n", "3:3", "aa"],
  ["fields", "hosts:\n  aa:\n    gpu: x\n    gpu: y\n", "4:5", "gpu"],
  ["fields in JSON", '{"hosts":{"a":{"b":1,\n"b":2}}}', "2:1", "b"],
  ["sections", "hosts: {}\nother: 1\nhosts: {}\n", "3:1", "hosts"],
  ["keys in a list", "x:\n  - a: 1\n    a: 2\nhosts: {}\n", "3:5", "a"],
  ["names with an escape", 'hosts:\n  "\\x61": {}\n  a: {}\n', "3:3", "a"],
  ["sections after ---", "---\nhosts: {}\nhosts: {}\n", "3:1", "hosts"],
];

for (const [what, text, place, name] of TWICE) {
  Deno.test(`parseHostsConfig() reports place and name of ${what} that are there twice`, () => {
    const { problems }: HostsConfigError = assertThrows(
      () => parseHostsConfig(text),
      HostsConfigError,
    );
    const [{ line, column, message }] = problems as [ConfigProblem];

    assertEquals(`${line}:${column}`, place);
    assertEquals(message, `duplicate key "${name}"`);
  });
}

Deno.test("parseHostsConfig() never reports a column below 1", async () => {
  await withRandom((random) => {
    const key = () => "x".repeat(1 + random(60));
    const blanks = () => " ".repeat(random(4));

    for (let round = 0; round < 200; round++) {
      const twice = key();
      const text = `hosts:${blanks()}\n  ${twice}: {}\n  y${key()}:\n` +
        `    ${key()}: 1\n  ${twice}: { a: 1 }\n`;
      const [problem] = validateHostsConfig(text).problems;

      assertEquals(problem?.line, 5, text);
      assert(problem!.column! >= 1, text);
    }
  });
});

// --- What is odd, but right ---

const LOADED: [name: string, text: string, hosts: Record<string, unknown>][] = [
  ["an empty file", "", {}],
  ["a comment alone", "\n# nothing\n", {}],
  ["an empty document", "---\n", {}],
  ["empty sections", "hosts:\nelo_sync:\ndefaults:\ndistributed: words\n", {}],
  ["a byte order mark", "\ufeffhosts: { a: {} }", { a: {} }],
  ["CRLF", "hosts:\r\n  a:\r\n    gpu: x\r\n", { a: { gpu: "x" } }],
  [
    "numbers in quotes",
    host('ssh_port: " 22 "\n    cpus: "8"'),
    { a: { ssh_port: " 22 ", cpus: "8" } },
  ],
  [
    "null and blank fields",
    host('ssh_port:\n    gpu: " "\n    cpus: ~'),
    { a: { ssh_port: null, gpu: " ", cpus: null } },
  ],
  [
    "a placeholder",
    host("tailscale_ip: <tailscale-ip>"),
    { a: { tailscale_ip: "<tailscale-ip>" } },
  ],
  [
    "dates and yes as written",
    host("since: 2025-01-02\n    up: yes"),
    { a: { since: "2025-01-02", up: "yes" } },
  ],
  [
    "a tab in a block of text",
    host("note: |\n      a:\n      \tb: c"),
    { a: { note: "a:\n\tb: c\n" } },
  ],
  [
    "tabs between words and at the end",
    "hosts:\t\n  a:\t{}\t# x\ty\n",
    { a: {} },
  ],
  ["JSON with tabs", '{\n\t"hosts": {\n\t\t"a": {}\n\t}\n}\n', { a: {} }],
  [
    "a few laughs",
    "a: &a [lol, lol]\nb: &b [*a, *a]\nhosts: { a: { laughs: *b } }\n",
    { a: { laughs: [["lol", "lol"], ["lol", "lol"]] } },
  ],
  [
    "one mapping as two hosts",
    "hosts:\n  a: &a { cpus: 1 }\n  b: *a\n",
    { a: { cpus: 1 }, b: { cpus: 1 } },
  ],
  [
    "merge keys: own keys win, then the first merged",
    "x: &x { cpus: 1, gpu: x }\ny: &y { <<: *x, cpus: 2, role: y }\n" +
    "hosts:\n  a: { role: a, <<: [*y, *x] }\n",
    { a: { cpus: 2, gpu: "x", role: "a" } },
  ],
  [
    "a merge of nothing",
    "hosts:\n  a: { <<: [], cpus: 1 }\n",
    { a: { cpus: 1 } },
  ],
];

for (const [name, text, hosts] of LOADED) {
  Deno.test({
    name: `parseHostsConfig() accepts ${name}`,
    permissions,
    async fn() {
      const config = parseHostsConfig(text);
      assertEquals(config.hosts, hosts as HostsConfig["hosts"]);

      const nodes = await getClusterNodes(config);
      assertEquals([...nodes.keys()], Object.keys(hosts));
    },
  });
}

Deno.test("parseHostsConfig() keeps keys and sections of the user's own", () => {
  const document = {
    hosts: { b: { rack: 7, ssh_port: "22" }, a: {} },
    defaults: { gpu: "H100" },
    other: { kept: [1] },
    elo_sync: { extra: 1 },
  };
  assertEquals(parseHostsConfig(JSON.stringify(document)), document);
});

Deno.test({
  name: "parseHostsConfig() keeps hosts called __proto__ and constructor",
  permissions,
  async fn() {
    const config = parseHostsConfig(`hosts:
  __proto__: { gpu: p, __proto__: { polluted: 1 } }
  constructor: { gpu: c }
  toString: {}
__proto__: { hosts: { ghost: {} } }
merged: { <<: { __proto__: { polluted: 1 } } }
`);
    const names = ["__proto__", "constructor", "toString"];
    assertEquals(Object.keys(config.hosts), names);

    const nodes = await getClusterNodes(config);
    const gpus = nodes.values().map(({ gpu }) => gpu);
    assertEquals([...nodes.keys()], names);
    assertEquals([...gpus], ["p", "c", ""]);

    const selected = selectNodes(nodes.values(), { names: ["__proto__"] });
    assertEquals(selected.length, 1);

    assert(!("polluted" in {}));
    assert(!("polluted" in (config.merged as object)));
    assert(!("ghost" in config));
  },
});

const ENDLESS: Record<string, unknown> = {};
ENDLESS.self = ENDLESS;

/** Objects that are no inventory, and the place of the problem. */
const OBJECTS: [what: string, config: unknown, place: string][] = [
  ["a port 0", { hosts: { a: { ssh_port: 0 } } }, "hosts.a.ssh_port"],
  ["a list of hosts", { hosts: [] }, "hosts"],
  ["a host that is null", { hosts: { a: null } }, "hosts.a"],
  ["an elo_sync that is a list", { hosts: {}, elo_sync: [] }, "elo_sync"],
  ["defaults that are a list", { hosts: {}, defaults: [] }, "defaults"],
  ["a name with a comma", { hosts: { "a,b": {} } }, "hosts.a,b"],
  ["an object that holds itself", { hosts: { a: ENDLESS } }, ""],
  ["a list", [], ""],
];

for (const [what, config, place] of OBJECTS) {
  Deno.test(`loadHostsConfig() rejects an object: ${what}`, async () => {
    const error: HostsConfigError = await assertRejects(
      () => loadHostsConfig(config as HostsConfig),
      HostsConfigError,
    );
    assertEquals(places(error.problems), [place]);
  });
}

// --- What is meant to take long ---

/** Inputs of any size, and the places of their problems. */
const HOSTILE: [name: string, place: string, text: (size: number) => string][] =
  [
    [
      "levels of lists",
      "",
      (size) => `hosts: ${"[".repeat(size)}${"]".repeat(size)}`,
    ],
    [
      "levels of mappings",
      "",
      (size) => `hosts: ${"{a: ".repeat(size)}${"}".repeat(size)}`,
    ],
    [
      "levels of list items",
      "",
      (size) => `hosts:\n  ${"- ".repeat(size)}a`,
    ],
    ["levels of keys", "", (size) => "? ".repeat(size)],
    ["aliases, nine in each line", "", (size) => {
      const laugh = (index: number) =>
        `l${index + 1}: &l${index + 1} [${Array(9).fill(`*l${index}`)}]`;
      return `l0: &l0 [lol]\n${lines(size / 50, laugh)}\nhosts: {}\n`;
    }],
    ["merges of one large mapping", "", (size) => {
      const keys = Array.from({ length: size / 100 }, (_, i) => `k${i}: 1`);
      const merge = (index: number) =>
        `n${index}: {<<: [${Array(50).fill("*m")}]}`;
      return `m: &m {${keys.join(", ")}}\n${lines(size / 100, merge)}\n`;
    }],
    ["merges, each of the one before", "", (size) => {
      const merge = (index: number) =>
        `m${index + 1}: &m${index + 1} {<<: *m${index}, k${index}: 1}`;
      return `m0: &m0 {k: 1}\n${lines(size / 10, merge)}\n`;
    }],
    ["one merge of many mappings", "hosts:1", (size) => {
      const count = size / 20;
      const source = (index: number) => `m${index}: &m${index} {k${index}: 1}`;
      const names = Array.from({ length: count }, (_, index) => `*m${index}`);
      return `hosts: []\n${lines(count, source)}\nall: {<<: [${names}]}\n`;
    }],
    [
      "blanks in a line after a problem",
      "hosts:1",
      (size) => `hosts: []\nnote: |\n  a${" ".repeat(size)}b\n`,
    ],
    [
      "blanks after a tab",
      ":3",
      (size) => `hosts: {}\nnote: a\n \t${" ".repeat(size)}b\n`,
    ],
    [
      "an open brace in every line",
      "hosts:1",
      (size) =>
        `hosts: []\n${lines(size / 10, (index) => `k${index}: "{ {,"`)}\n`,
    ],
    ["one long line of keys", "elo_sync:2", (size) => {
      const keys = Array.from({ length: size / 10 }, (_, i) => `k${i}: x`);
      return `hosts: { a: { ${keys.join(", ")} } }\nelo_sync: []\n`;
    }],
    [
      "quotes that stay open",
      "hosts:1",
      (size) => `hosts: []\n# ${'"\\'.repeat(size)}\n`,
    ],
    [
      "blanks between a key and its colon",
      "hosts:1",
      (size) => `hosts: []\nnote: |\n  ${"a ".repeat(size)}\n`,
    ],
    ["names of numbers", "hosts.012:2", (size) => {
      const host = (index: number) => `  ${1000 + index}: {}`;
      return `hosts:\n  012: {}\n${lines(size / 10, host)}\n`;
    }],
    ["leading zeros", "hosts.a.ssh_port:3", (size) => {
      const field = (index: number) => `    k${index}: 012`;
      return `hosts:\n  a:\n    ssh_port: 012\n${lines(size / 10, field)}\n`;
    }],
    ["zeros", "hosts:1", (size) => `hosts: []\nnote: ${"0".repeat(size)}\n`],
    ["two keys alike at the end", `:10002`, (size) => {
      const keys = lines(size / 10, (index) => `k${index}: 1`);
      const end = size === 100_000 ? "k1: 1\n" : "";
      return `hosts: {}\n${keys}\n${end}`;
    }],
    ["jump hosts", "hosts.a.ssh_options:1", (size) => {
      const hops = "a:".repeat(size / 2);
      return `hosts: { a: { ssh_options: ["ProxyJump=${hops}"] } }\n`;
    }],
  ];

const FULL = 100_000;

for (const [name, place, text] of HOSTILE) {
  Deno.test(`parseHostsConfig() takes time linear in ${name}`, async () => {
    assertEquals(places(validateHostsConfig(text(FULL)).problems), [place]);

    const sources = new Map(
      [FULL / 10, FULL].map((size) => [size, text(size)]),
    );
    await assertLinear(FULL, (size) => {
      validateHostsConfig(sources.get(size)!);
    });
  });
}

Deno.test("loadHostsConfig() accepts 50 MB, in time linear in its size", async () => {
  await using temp = await tempFolder();
  const note = "what its owner wrote about it. ".repeat(15);
  const host = (index: number) =>
    `  gpu-${index}:\n    tailscale_ip: 100.64.0.1\n    ssh_port: 22\n` +
    `    role: worker\n    note: ${note}`;

  const pathOf = (megabytes: number) => `${temp.folder}/${megabytes}.yaml`;
  const countOf = (megabytes: number) =>
    Math.ceil(megabytes * 1e6 / host(0).length);

  for (const megabytes of [5, 50]) {
    const text = `hosts:\n${lines(countOf(megabytes), host)}\n`;
    assert(text.length > megabytes * 1e6);
    await Deno.writeTextFile(pathOf(megabytes), text);
  }

  await assertLinear(50, async (megabytes) => {
    const { hosts } = await loadHostsConfig(pathOf(megabytes));
    assertEquals(Object.keys(hosts).length, countOf(megabytes));
  });
});

// --- Real inventories, and what becomes of them ---

Deno.test({
  name:
    "loadHostsConfig() accepts a real inventory, with anchors and merge keys",
  permissions,
  async fn() {
    const config = await loadHostsConfig(
      `${ROOT}tests/fixtures/real_inventory.yaml`,
    );
    const nodes = await getClusterNodes(config);

    assertEquals(nodes.size, 42);
    assert(Object.keys(config).length >= 11);
    for (const { entry, sshKey, ringriftPath } of nodes.values()) {
      assert(Object.keys(entry).length >= 40 && !("<<" in entry));
      assert(sshKey?.startsWith("~/.ssh/"));
      assert(ringriftPath.endsWith("/ringrift/ai-service"));
    }

    assertEquals(nodes.get("runpod-a100-1")?.sshUser, "root");
    assertEquals(nodes.get("vultr-a100-20gb")?.sshKey, "~/.ssh/id_ed25519");

    const ready = selectNodes(nodes.values(), {
      names: ["lambda-gh200-[1-12]"],
      statuses: ["ready"],
    });
    assertEquals(ready.length, 12);
  },
});

/** Changes bits, deletes, copies or mixes lines. */
function mutate(
  original: Uint8Array<ArrayBuffer>,
  random: Random,
): Uint8Array<ArrayBuffer> {
  let bytes = original.slice();

  for (let rounds = 1 + random(3); rounds > 0; rounds--) {
    const kind = random(4);
    if (kind === 0) {
      const at = random(bytes.length);
      const flipped = bytes[at]! ^ (1 << random(8));
      bytes[at] = random(2) === 0 ? flipped : random(256);
      continue;
    }

    // As latin1, so that bytes that are not UTF-8 stay as they are.
    const characters = Array.from(bytes, (byte) => String.fromCharCode(byte));
    const text = characters.join("").split("\n");
    mixLines(text, kind, random);
    bytes = Uint8Array.from(text.join("\n"), (it) => it.charCodeAt(0));
  }

  return bytes;
}

function mixLines(text: string[], kind: number, random: Random): void {
  const at = random(text.length);
  const other = random(text.length);
  const count = 1 + random(3);

  if (kind === 1) {
    text.splice(at, count);
  } else if (kind === 2) {
    text.splice(other, 0, ...text.slice(at, at + count));
  } else {
    const halves = (line: string) => /^([^:]*:?)(.*)$/s.exec(line)!;
    const [, key, value] = halves(text[at]!);
    const [, otherKey, otherValue] = halves(text[other]!);
    text[at] = `${key}${otherValue}`;
    text[other] = `${otherKey}${value}`;
  }
}

/** Asserts that what loads can be used. */
async function assertUsable(config: HostsConfig): Promise<void> {
  const nodes = await getClusterNodes(config);
  const all = selectNodes(nodes.values(), { includeInactive: true });
  assertEquals(all.length, nodes.size);

  for (const node of nodes.values()) {
    const selected = selectNodes(nodes.values(), { names: [node.name] });
    assertEquals(selected, [node]);

    if (node.bestIp !== undefined) {
      assertEquals(sshCommand(node, ["true"]).at(-1), "true");
    }
    const hasUrl = node.bestIp ?? node.dataServerUrl;
    assertEquals(node.dataServerBaseUrl !== undefined, hasUrl !== undefined);
  }
}

/** Checks one mutation, and reports whether it could be loaded. */
async function isLoaded(bytes: Uint8Array<ArrayBuffer>, path: string) {
  await Deno.writeFile(path, bytes);
  const text = new TextDecoder().decode(bytes);
  const { problems } = validateHostsConfig(text);
  const loading = await loadHostsConfig(path).catch((error) => error);

  if (!(loading instanceof Error)) {
    const hasHosts = Object.keys(loading.hosts).length > 0;
    assertEquals(problems.length, hasHosts ? 0 : 1);
    await assertUsable(loading);
    return true;
  }

  if (!(loading instanceof HostsConfigError)) throw loading;
  assert(loading.problems.length > 0);
  for (const { line = 1, column = 1 } of loading.problems) {
    assert(line >= 1 && column >= 1);
  }
  // What is not UTF-8 is a problem of the file, not of its text.
  const isUtf8 = !text.includes("\uFFFD");
  if (isUtf8) assertEquals(problems, [...loading.problems]);
  return false;
}

Deno.test({
  name:
    "2,000 mutations of the example each load, or reject with a HostsConfigError",
  permissions,
  async fn() {
    const example = await Deno.readFile(
      `${ROOT}config/distributed_hosts.example.yaml`,
    );
    await using temp = await tempFolder();
    const path = `${temp.folder}/hosts.yaml`;
    let loaded = 0;

    await withRandom(async (random) => {
      for (let round = 0; round < 2000; round++) {
        const bytes = mutate(example, random);
        try {
          if (await isLoaded(bytes, path)) loaded++;
        } catch (cause) {
          const text = new TextDecoder().decode(bytes);
          const message = `mutation ${round}:\n${Deno.inspect(cause)}\n${text}`;
          throw new Error(message, { cause });
        }
      }

      // Where one of the two is rare, the mutations test little.
      assert(loaded > 200 && loaded < 1800, `${loaded} of 2,000 were loaded`);
    });
  },
});
