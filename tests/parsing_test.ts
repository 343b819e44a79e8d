/**
 * What an inventory may and may not be: a bad one ends in one `HostsConfigError`, soon, with path and line, and without
 * a word of the file.
 *
 * @module
 */
import { assert, assertEquals, assertRejects, assertThrows } from "jsr:@std/assert@^1.0.19";
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
import { ROOT, tempFolder } from "./process.ts";
import { type Random, withRandom } from "./random.ts";

/** Whatever the variables of whoever runs the tests are: they count as unset. */
const permissions = { env: false, read: "inherit", write: "inherit" } as const;

/** Stands in bad values, and may be in no message. */
const SECRET = "hunter2";

/** `path:line` of each, either of which may be missing. */
function places(problems: readonly ConfigProblem[]): string[] {
  return problems.map(({ path, line }) => line === undefined ? path : `${path}:${line}`);
}

function host(field: string): string {
  return `hosts:\n  a:\n    ${field}\n`;
}

function lines(count: number, line: (index: number) => string): string {
  return Array.from({ length: count }, (_, index) => line(index)).join("\n");
}

/** Each with the places of its problems. */
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
  ["a host without a name", 'hosts:\n  "": {}\n', "hosts.:2"],
  ["a host's name with a newline", 'hosts:\n  "a\\nb": {}\n', 'hosts."a\\nb":1'],
  ["a host's name with an escape sequence", 'hosts:\n  "a\\e[31mb": {}\n', 'hosts."a\\u001b[31mb":1'],
  ["a host's name with a C1 control", 'hosts:\n  "a\\x9b31mb": {}\n', 'hosts."a\x9b31mb":1'],
  ["a field of a host whose name is __proto__", "hosts:\n  __proto__:\n    cpus: x\n", "hosts.__proto__.cpus:3"],

  ["NUL", `hosts:\n  a: { note: "${SECRET}\0" }\n`, ""],
  ["a duplicate host", `hosts:\n  ${SECRET}: {}\n  ${SECRET}: {}\n`, ":3"],
  ["a duplicate key", host(`${SECRET}: 1\n    ${SECRET}: 2`), ":4"],
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
  ["a key in the wrong column", `hosts:\n  a:\n    gpu: x\n   ${SECRET}: y\n`, ":4"],
  ["HTML", `<!doctype html>\n<title>${SECRET}: gone</title>\n`, ""],
  ["HTML that is a mapping", `\n<title>${SECRET}: gone</title>\n`, ""],
  ["XML", `<?xml version="1.0"?><a>${SECRET}</a>`, ""],

  ["a tab before a host", `hosts:\n\ta: { note: ${SECRET} }\n`, ":2"],
  ["a tab before a field", `hosts:\n  a:\n\tnote: ${SECRET}\n`, ":3"],
  ["a tab after spaces", `hosts:\n  a:\n  \tnote: ${SECRET}\n`, ":3"],
  ["a tab before a comment", `hosts: {}\n\t# ${SECRET}\n`, ":2"],
  ["a tab behind a block of text", `${host("note: |\n      a\n      \tb")}\tc: ${SECRET}\n`, ":6"],

  ["a tab below a block of text", host("note: |\n      a\n    \tb: c"), ":5"],
  ["a merge of what is no mapping", `hosts:\n  a: { <<: ${SECRET} }\n`, ""],
  ["a merge of a list with what is no mapping", `hosts:\n  a: { <<: [{ b: 1 }, ${SECRET}] }\n`, ""],
  ["an alias to itself", "hosts:\n  a: &a { self: *a }\n", ""],
  ["a mapping that merges itself", "hosts:\n  a: &a { <<: *a, cpus: 1 }\n", ""],
  ["two lists that hold each other", "x: &x\n  - &y [*x]\nhosts: {}\n", ""],

  ["a problem with CRLF", `hosts:\r\n  a:\r\n    ssh_user: ${SECRET} x\r\n`, "hosts.a.ssh_user:3"],
];

for (const [name, text, ...expected] of REFUSED) {
  Deno.test(`parseHostsConfig() refuses ${name}`, () => assertRefused(text, expected));
}

function assertRefused(text: string, expected: string[]): void {
  const error: HostsConfigError = assertThrows(() => parseHostsConfig(text), HostsConfigError);
  assertEquals(places(error.problems), expected);
  const shown = Deno.inspect(error);
  assert(!shown.includes(SECRET) || expected.some((place) => place.includes(SECRET)), "the text of the file is shown");
  assertEquals(error.message.split("\n").length, expected.length, "one line for each problem");
  // deno-lint-ignore no-control-regex
  assert(!/[\x00-\x09\x0b-\x1f\x7f]/.test(error.message), "a control character is shown");
  assertEquals(validateHostsConfig(text), { problems: [...error.problems], warnings: [] });
}

Deno.test("parseHostsConfig() tells every problem, in the order of the file", () => {
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
elo_sync: { sync_port: 0, transports: ${SECRET} }
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
    "elo_sync.sync_port:19",
    "elo_sync.transports:19",
  ]);
});

Deno.test("HostsConfigError has the origin, the line and the path of each problem in its message", () => {
  const cases = [
    [
      host("ssh_port: 0"),
      "x.yaml:3: hosts.a.ssh_port: expected an integer from 1 to 65535",
    ],
    ["hosts:\n  a: {\n", /^x\.yaml:3:\d+: is not valid YAML: [a-z]/],
    ["- a\n", 'x.yaml: expected a mapping with a "hosts" section, got a list'],
  ] as const;
  for (const [text, expected] of cases) {
    const { message }: Error = assertThrows(() => parseHostsConfig(text, "x.yaml"), HostsConfigError);
    assert(typeof expected === "string" ? message === expected : expected.test(message), message);
  }
});

/** What is odd, but right; each with its hosts. */
const LOADED: [name: string, text: string, hosts: Record<string, unknown>][] = [
  ["an empty file", "", {}],
  ["a comment alone", "\n# nothing yet\n", {}],
  ["an empty document", "---\n", {}],
  ["empty sections", "hosts:\nelo_sync:\ndistributed: words of another program\n", {}],
  ["a byte order mark", "\ufeffhosts: { a: {} }", { a: {} }],
  ["CRLF", "hosts:\r\n  a:\r\n    gpu: x\r\n", { a: { gpu: "x" } }],
  ["numbers in quotes", host('ssh_port: " 22 "\n    cpus: "8"'), { a: { ssh_port: " 22 ", cpus: "8" } }],
  ["null and blank fields", host('ssh_port:\n    gpu: " "\n    cpus: ~'), {
    a: { ssh_port: null, gpu: " ", cpus: null },
  }],
  ["a placeholder", host("tailscale_ip: <tailscale-ip>"), { a: { tailscale_ip: "<tailscale-ip>" } }],
  ["dates and yes as written", host("since: 2025-01-02\n    up: yes"), { a: { since: "2025-01-02", up: "yes" } }],
  ["a tab in a block of text", host("note: |\n      a:\n      \tb: c"), { a: { note: "a:\n\tb: c\n" } }],
  ["tabs between words and at the end", "hosts:\t\n  a:\t{}\t# x\ty\n", { a: {} }],
  ["JSON with tabs", '{\n\t"hosts": {\n\t\t"a": {}\n\t}\n}\n', { a: {} }],
  ["a few laughs", "a: &a [lol, lol]\nb: &b [*a, *a]\nhosts: { a: { laughs: *b } }\n", {
    a: { laughs: [["lol", "lol"], ["lol", "lol"]] },
  }],
  ["one mapping as two hosts", "hosts:\n  a: &a { cpus: 1 }\n  b: *a\n", { a: { cpus: 1 }, b: { cpus: 1 } }],
  [
    "merge keys: a mapping's own keys win, then the first merged",
    "x: &x { cpus: 1, gpu: x }\ny: &y { <<: *x, cpus: 2, role: y }\nhosts:\n  a: { role: a, <<: [*y, *x] }\n",
    { a: { cpus: 2, gpu: "x", role: "a" } },
  ],
  ["a merge of nothing", "hosts:\n  a: { <<: [], cpus: 1 }\n", { a: { cpus: 1 } }],
];

for (const [name, text, hosts] of LOADED) {
  Deno.test({
    name: `parseHostsConfig() takes ${name}`,
    permissions,
    async fn() {
      const config = parseHostsConfig(text);
      assertEquals(config.hosts, hosts as HostsConfig["hosts"]);
      assertEquals([...(await getClusterNodes(config)).keys()], Object.keys(hosts));
      assertEquals(validateHostsConfig(text).problems, []);
    },
  });
}

Deno.test("parseHostsConfig() keeps the YAML as written, sections and keys of the user's own included", () => {
  const document = { hosts: { b: { rack: 7, ssh_port: "22" }, a: {} }, other: { kept: [1] }, elo_sync: { extra: 1 } };
  assertEquals(parseHostsConfig(JSON.stringify(document)), document);
});

Deno.test({
  name: "parseHostsConfig() keeps hosts named __proto__ and constructor as ordinary ones",
  permissions,
  async fn() {
    const text =
      "hosts:\n  __proto__: { gpu: p, __proto__: { polluted: 1 } }\n  constructor: { gpu: c }\n  toString: {}\n" +
      "__proto__: { hosts: { ghost: {} } }\nmerged: { <<: { __proto__: { polluted: 1 } } }\n";
    const config = parseHostsConfig(text);
    assertEquals(Object.keys(config.hosts), ["__proto__", "constructor", "toString"]);
    const nodes = await getClusterNodes(config);
    assertEquals([...nodes.values()].map(({ name, gpu }) => `${name}: ${gpu}`), [
      "__proto__: p",
      "constructor: c",
      "toString: ",
    ]);
    assertEquals(selectNodes(nodes.values(), { names: ["__proto__"] }).length, 1);
    assert(!("polluted" in {}) && !("polluted" in (config.merged as object)) && !("ghost" in config));
  },
});

Deno.test("loadHostsConfig() holds an object to the same rules", async () => {
  const endless: Record<string, unknown> = {};
  endless.self = endless;
  const cases: [config: unknown, place: string][] = [
    [{ hosts: { a: { ssh_port: 0 } } }, "hosts.a.ssh_port"],
    [{ hosts: [] }, "hosts"],
    [{ hosts: { a: null } }, "hosts.a"],
    [{ hosts: {}, elo_sync: [] }, "elo_sync"],
    [{ hosts: { a: endless } }, ""],
    [[], ""],
  ];
  for (const [config, place] of cases) {
    const error: HostsConfigError = await assertRejects(() => loadHostsConfig(config as HostsConfig), HostsConfigError);
    assertEquals(places(error.problems), [place]);
  }
});

/**
 * Inputs of any size that are meant to take much more time than their size, or more memory than there is; and the places
 * of their problems.
 */
const HOSTILE: [name: string, place: string, text: (size: number) => string][] = [
  ["levels of lists", "", (size) => `hosts: ${"[".repeat(size)}${"]".repeat(size)}`],
  ["levels of mappings", "", (size) => `hosts: ${"{a: ".repeat(size)}${"}".repeat(size)}`],
  ["levels of list items", "", (size) => `hosts:\n  ${"- ".repeat(size)}a`],
  ["levels of keys", "", (size) => "? ".repeat(size)],
  ["aliases, nine in each line", "", (size) => {
    const laugh = (index: number) => `l${index + 1}: &l${index + 1} [${Array(9).fill(`*l${index}`)}]`;
    return `l0: &l0 [lol]\n${lines(size / 50, laugh)}\nhosts: {}\n`;
  }],
  ["merges of one large mapping", "", (size) => {
    const keys = Array.from({ length: size / 100 }, (_, index) => `k${index}: 1`).join(", ");
    return `m: &m {${keys}}\n${lines(size / 100, (index) => `n${index}: {<<: [${Array(50).fill("*m")}]}`)}\n`;
  }],
  [
    "merges, each of the one before",
    "",
    (size) =>
      `m0: &m0 {k: 1}\n${
        lines(size / 10, (index) => `m${index + 1}: &m${index + 1} {<<: *m${index}, k${index}: 1}`)
      }\n`,
  ],
  ["blanks in a line behind a problem", "hosts:1", (size) => `hosts: []\nnote: |\n  a${" ".repeat(size)}b\n`],
  ["blanks behind a tab", ":3", (size) => `hosts: {}\nnote: a\n \t${" ".repeat(size)}b\n`],
  [
    "an open brace in every line",
    "hosts:1",
    (size) => `hosts: []\n${lines(size / 10, (index) => `k${index}: "{ {,"`)}\n`,
  ],
  ["one long line of keys", "elo_sync:2", (size) => {
    const keys = Array.from({ length: size / 10 }, (_, index) => `k${index}: x`);
    return `hosts: { a: { ${keys.join(", ")} } }
elo_sync: []
`;
  }],
  ["quotes that stay open", "hosts:1", (size) => `hosts: []\n# ${'"\\'.repeat(size)}\n`],
  ["blanks between a key and its colon", "hosts:1", (size) => `hosts: []\nnote: |\n  ${"a ".repeat(size)}\n`],
];

const FULL = 100_000;

for (const [name, place, text] of HOSTILE) {
  Deno.test(`parseHostsConfig() does not take long with ${name}`, () => {
    const msOf = (size: number) => {
      const source = text(size);
      const times = Array.from({ length: 3 }, () => {
        const started = performance.now();
        const { problems } = validateHostsConfig(source);
        const ms = performance.now() - started;
        if (size === FULL) assertEquals(places(problems), [place]);
        return ms;
      });
      // Less than this says more about the clock and about the compiler.
      return Math.max(Math.min(...times), 2);
    };
    const [small, large] = [msOf(FULL / 10), msOf(FULL)];
    // In quadratic time, it would be 100 times as long.
    assert(large < 40 * small, `${small.toFixed(1)} ms for a tenth, ${large.toFixed(1)} ms for all`);
  });
}

Deno.test("loadHostsConfig() takes 50 MB, in time linear in its size", async () => {
  await using temp = await tempFolder();
  const path = `${temp.folder}/hosts.yaml`;
  const note = "what its owner wrote about it. ".repeat(15);
  const thousand = lines(
    1000,
    (index) =>
      `  gpu-NUMBER-${index}:\n    tailscale_ip: 100.64.0.1\n    ssh_port: 22\n    role: worker\n    note: ${note}`,
  );
  const msPerMegabyte = async (megabytes: number) => {
    const count = Math.ceil(megabytes * 1e6 / thousand.length);
    const text = `hosts:\n${lines(count, (index) => thousand.replaceAll("NUMBER", String(index).padStart(6, "0")))}\n`;
    await Deno.writeTextFile(path, text);
    const started = performance.now();
    const { hosts } = await loadHostsConfig(path);
    const ms = performance.now() - started;
    assert(text.length > megabytes * 1e6 && Object.keys(hosts).length === count * 1000);
    return ms / megabytes;
  };
  await msPerMegabyte(1);
  const [small, large] = [await msPerMegabyte(5), await msPerMegabyte(50)];
  assert(large < 4 * small, `${small.toFixed(1)} ms per MB of 5 MB, ${large.toFixed(1)} of 50 MB`);
});

Deno.test({
  name: "loadHostsConfig() takes a real inventory, its anchors and merge keys",
  permissions,
  async fn() {
    const config = await loadHostsConfig(`${ROOT}tests/fixtures/real_inventory.yaml`);
    const nodes = await getClusterNodes(config);
    assertEquals(nodes.size, 42);
    for (const { entry, sshKey, ringriftPath } of nodes.values()) {
      assert(Object.keys(entry).length >= 40 && !("<<" in entry));
      assert(sshKey?.startsWith("~/.ssh/") && ringriftPath.endsWith("/ringrift/ai-service"));
    }
    assert(Object.keys(config).length >= 11);
    assertEquals(nodes.get("runpod-a100-1")?.sshUser, "root");
    assertEquals(nodes.get("vultr-a100-20gb")?.sshKey, "~/.ssh/id_ed25519");
    assertEquals(selectNodes(nodes.values(), { names: ["lambda-gh200-[1-12]"], statuses: ["ready"] }).length, 12);
  },
});

function mutate(original: Uint8Array<ArrayBuffer>, random: Random): Uint8Array<ArrayBuffer> {
  let bytes = original.slice();
  for (let rounds = 1 + random(3); rounds > 0; rounds--) {
    const kind = random(4);
    if (kind === 0) {
      const at = random(bytes.length);
      bytes[at] = random(2) === 0 ? bytes[at]! ^ (1 << random(8)) : random(256);
      continue;
    }
    // As latin1, so that bytes that are not UTF-8 stay as they are.
    const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("").split("\n");
    const [at, other] = [random(text.length), random(text.length)];
    if (kind === 1) text.splice(at, 1 + random(3));
    else if (kind === 2) text.splice(other, 0, ...text.slice(at, at + 1 + random(3)));
    else {
      const value = (line: string) => /^([^:]*:?)(.*)$/s.exec(line)!.slice(1) as [string, string];
      const [[key, first], [otherKey, second]] = [value(text[at]!), value(text[other]!)];
      text[at] = key + second;
      text[other] = otherKey + first;
    }
    bytes = Uint8Array.from(text.join("\n"), (character) => character.charCodeAt(0));
  }
  return bytes;
}

Deno.test({
  name: "2,000 mutations of the example each end in a config that can be used, or in a HostsConfigError",
  permissions,
  async fn() {
    const example = await Deno.readFile(`${ROOT}config/distributed_hosts.example.yaml`);
    await using temp = await tempFolder();
    const path = `${temp.folder}/hosts.yaml`;
    const outcomes = { loaded: 0, refused: 0 };

    const check = async (bytes: Uint8Array<ArrayBuffer>) => {
      await Deno.writeFile(path, bytes);
      const text = new TextDecoder().decode(bytes);
      const [outcome] = await Promise.allSettled([loadHostsConfig(path)]);
      const { problems } = validateHostsConfig(text);
      if (outcome.status === "rejected") {
        outcomes.refused++;
        const error = outcome.reason;
        if (!(error instanceof HostsConfigError)) throw error;
        assert(error.problems.length > 0);
        // What is not UTF-8 is a problem of the file, not of its text.
        if (!text.includes("\uFFFD")) assertEquals(problems, [...error.problems]);
        return;
      }
      outcomes.loaded++;
      const config = outcome.value;
      assertEquals(problems, []);
      const nodes = await getClusterNodes(config);
      assertEquals(selectNodes(nodes.values(), { includeInactive: true }).length, nodes.size);
      for (const node of nodes.values()) {
        const selected = selectNodes(nodes.values(), { names: [node.name] });
        assert(selected.length === 1 && selected[0] === node);
        // What loads can be used.
        if (node.bestIp !== undefined) assertEquals(sshCommand(node, ["true"]).at(-1), "true");
        assertEquals(typeof node.dataServerBaseUrl, node.bestIp || node.dataServerUrl ? "string" : "undefined");
      }
    };

    await withRandom(async (random) => {
      for (let round = 0; round < 2000; round++) {
        const bytes = mutate(example, random);
        try {
          await check(bytes);
        } catch (cause) {
          throw new Error(`mutation ${round}:\n${Deno.inspect(cause)}\n${new TextDecoder().decode(bytes)}`, { cause });
        }
      }
      // Where one of them is rare, the mutations test little.
      assert(outcomes.loaded > 200 && outcomes.refused > 200, JSON.stringify(outcomes));
    });
  },
});
