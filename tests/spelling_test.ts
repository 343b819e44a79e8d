/**
 * Names and numbers as they are written: YAML reads `010` as 8, and a plain
 * object has integers first.
 *
 * @module
 */
import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import {
  type ConfigProblem,
  getActiveNodes,
  getClusterNodes,
  HostsConfigError,
  parseHostsConfig,
  selectNodes,
  validateHostsConfig,
} from "../mod.ts";
import { withRandom } from "./random.ts";

/** Variables of whoever runs the tests count as unset. */
const permissions = { env: false } as const;

type Style = (names: readonly string[]) => string;

/** Ways to write hosts, each without a field. */
const STYLES: Record<string, Style> = {
  "block style": (names) =>
    `hosts:\n${names.map((name) => `  ${name}: {}\n`).join("")}`,
  "block style with fields": (names) =>
    `hosts:\n${names.map((name) => `  ${name}:\n    cpus: 1\n`).join("")}`,
  "block style after ---": (names) =>
    `---\nhosts:\n${names.map((name) => `  ${name}: {}\n`).join("")}`,
  "block style with CRLF": (names) =>
    `hosts:\r\n${names.map((name) => `  ${name}: {}\r\n`).join("")}`,
  "block style with an anchor": (names) =>
    `hosts: &h\n${names.map((name) => `  ${name}: {}\n`).join("")}`,
  "flow style": (names) =>
    `hosts: { ${names.map((name) => `${name}: {}`).join(", ")} }\n`,
  "flow style over lines": (names) =>
    `hosts: {\n${names.map((name) => `  ${name}: {}`).join(", # 5: x\n")}\n}\n`,
  "JSON without quotes": (names) =>
    `{"hosts":{${names.map((name) => `${name}:{"cpus":1}`).join(",")}}}`,
};

/** Names that YAML reads as something that is written in another way. */
const MISREAD = [
  ...["010", "007", "00", "-010", "+5", "-0", "0_7"],
  ...["0x1F", "0b11", "1_000", "1__0"],
  ...["1.10", "1.0", ".5", "5.", "12e5", "1e3", "0.1e1", "1e400"],
  ...["123456789012345678901234567890", "0.0000001"],
  ...[".inf", ".Inf", ".INF", "-.inf", "+.inf", ".nan", ".NaN"],
  ...["True", "TRUE", "False", "Null", "NULL", "~"],
];

for (const [style, write] of Object.entries(STYLES)) {
  for (const name of MISREAD) {
    Deno.test(`parseHostsConfig() rejects the name ${name} in ${style}`, () => {
      const error: HostsConfigError = assertThrows(
        () => parseHostsConfig(write(["head", name, "gpu-1"])),
        HostsConfigError,
      );

      const [problem, ...more] = error.problems;
      assertEquals(more, []);
      assertEquals(problem?.path, `hosts.${name}`);
      assert(problem!.line! >= 1 && problem!.column! >= 1);
      assert(/put it in quotes/.test(problem!.message), problem?.message);
    });
  }
}

/** Names that stay what they are. */
const KEPT = [
  ...["0", "1", "10", "29031159", "-5", "1.5", "08", "09", "0o17", "0xZZ"],
  ...["true", "false", "null", "yes", "no", "on", "off"],
  ...["2025-01-02", "1:30", "gpu-010", "010a", "1.2.3", "1e3x", "e5", "."],
];

for (const [style, write] of Object.entries(STYLES)) {
  Deno.test({
    name: `getClusterNodes() returns names like numbers as written in ${style}`,
    permissions,
    async fn() {
      for (const name of KEPT) {
        const config = parseHostsConfig(write([name]));
        const nodes = await getClusterNodes(config);
        assertEquals([...nodes.keys()], [name]);
      }
    },
  });
}

for (const quote of ['"', "'"]) {
  Deno.test({
    name: `getClusterNodes() returns any name as written between ${quote}`,
    permissions,
    async fn() {
      const names = [...MISREAD, ...KEPT];
      const quoted = names.map((name) => `${quote}${name}${quote}`);

      for (const [style, write] of Object.entries(STYLES)) {
        const config = parseHostsConfig(write(quoted));
        const nodes = await getClusterNodes(config);
        assertEquals([...nodes.keys()], names, style);
      }
    },
  });
}

Deno.test("parseHostsConfig() accepts names like numbers outside of hosts", () => {
  const text = "other:\n  hosts:\n    010: {}\nranks: { 1.10: a, 012: b }\n" +
    "hosts:\n  a:\n    racks: { 010: x }\n    ssh_host: x\n";

  assertEquals(validateHostsConfig(text), {
    config: parseHostsConfig(text),
    problems: [],
    warnings: [],
  });
});

Deno.test("parseHostsConfig() reports 010 beside 8, which YAML reads as one name", () => {
  for (const names of [["010", "8"], ["8", "010"], ["1.0", "1"]]) {
    const text = STYLES["block style"]!(names);
    const [problem] = validateHostsConfig(text).problems;

    assertEquals(problem?.line, 3);
    assertEquals(problem?.column, 3);
    assert(/put it in quotes/.test(problem!.message), problem!.message);
  }
});

// --- The order of the file ---

const ORDER = ["head", "29031159", "b", "7", "gpu-2", "10", "a", "0"];

for (const [style, write] of Object.entries(STYLES)) {
  Deno.test({
    name: `getClusterNodes() has the order of the file in ${style}`,
    permissions,
    async fn() {
      const config = parseHostsConfig(write(ORDER));

      const nodes = await getClusterNodes(config);
      assertEquals([...nodes.keys()], ORDER);

      const active = await getActiveNodes(config);
      assertEquals(active.map(({ name }) => name), ORDER);

      const selected = selectNodes(nodes.values(), { names: ["*"] });
      assertEquals(selected.map(({ name }) => name), ORDER);
    },
  });
}

Deno.test({
  name:
    "getClusterNodes() has the order of the file in JSON.stringify's output",
  permissions,
  async fn() {
    const names = ORDER.map((name) => `"${name}": { "cpus": 1 }`);
    const text = `{\n  "hosts": {\n    ${names.join(",\n    ")}\n  }\n}\n`;

    const nodes = await getClusterNodes(parseHostsConfig(text));
    assertEquals([...nodes.keys()], ORDER);
  },
});

Deno.test({
  name:
    "getClusterNodes() has the order of the file with texts that look like keys",
  permissions,
  async fn() {
    const config = parseHostsConfig(`# 9: {}
hosts: # 8: {}
  head: {} # 5: {}
  # 6: {}
  b:
    note: |
      7: x
      hosts:
        3: {}
    more: "7: x
  3: {}"
  7:
    note: a b
      c d
    list: [7, 3]
  c: { note: 'it''s, 3: {', q: "}, 3: {" }
  3:
    hosts: { 0: x, 9: y }
  d: {}
3: { hosts: { 7: {} } }
`);
    const nodes = await getClusterNodes(config);
    assertEquals([...nodes.keys()], ["head", "b", "7", "c", "3", "d"]);
  },
});

Deno.test({
  name:
    "getClusterNodes() has the order of the file for random names and styles",
  permissions,
  async fn() {
    await withRandom(async (random) => {
      const pick = <T>(items: readonly T[]): T => items[random(items.length)]!;
      const newName = () =>
        pick([
          String(random(1000)),
          `gpu-${random(100)}`,
          `'${String(random(100)).padStart(3, "0")}'`,
          `"${random(50)}.${random(20)}"`,
          `n${random(9)}.dc${random(9)}`,
        ]);

      for (let round = 0; round < 300; round++) {
        const written = new Map<string, string>();
        for (let count = 1 + random(12); count > 0; count--) {
          const name = newName();
          written.set(name.replaceAll(/['"]/g, ""), name);
        }

        const text = pick(Object.values(STYLES))([...written.values()]);
        const nodes = await getClusterNodes(parseHostsConfig(text));
        assertEquals([...nodes.keys()], [...written.keys()], text);
      }
    });
  },
});

// --- Numbers with leading zeros ---

/** Ports with a leading zero, wherever a port may stand. */
const ZERO_PORTS: [path: string, text: string][] = [
  ["hosts.a.ssh_port", "hosts:\n  a:\n    ssh_port: 022\n"],
  ["hosts.a.ssh_port", "hosts:\n  a:\n    ssh_port: 022 # why\n"],
  ["hosts.a.ssh_port", "hosts:\r\n  a:\r\n    ssh_port: 022\r\n"],
  ["hosts.a.ssh_port", "hosts:\n  a: { ssh_port: 022 }\n"],
  ["hosts.a.ssh_port", "hosts:\n  a: { ssh_port: 022, cpus: 1 }\n"],
  ["hosts.a.ssh_port", '{"hosts": {"a": {"ssh_port": 022}}}'],
  ["hosts.a.ssh_port", "---\nhosts:\n  a:\n    ssh_port: 022\n"],
  ["hosts.a.ssh_port", "hosts:\n  a: &a\n    ssh_port: 022\n"],
  ["hosts.a.ssh_port", "hosts:\n  a:\n    ssh_port: 08022\n"],
  ["hosts.a.ssh_port", 'hosts:\n  a:\n    ssh_port: "022"\n'],
  ["hosts.a.ssh_port", "hosts:\n  a:\n    ssh_port: &p 022\n"],
  ["hosts.a.ssh_port", "hosts:\n  a:\n    ssh_port:\n      022\n"],
  ["hosts.a.data_server_port", "hosts:\n  a:\n    data_server_port: 010\n"],
  ["defaults.ssh_port", "defaults:\n  ssh_port: 022\nhosts: { a: {} }\n"],
  ["elo_sync.sync_port", "elo_sync: { sync_port: 0100 }\nhosts: { a: {} }\n"],
  [
    "distributed.data_server_port",
    "distributed:\n  data_server_port: 010\nhosts: { a: {} }\n",
  ],
];

for (const [path, text] of ZERO_PORTS) {
  const shown = JSON.stringify(text);

  Deno.test(`parseHostsConfig() rejects a leading zero in ${shown}`, () => {
    const error: HostsConfigError = assertThrows(
      () => parseHostsConfig(text),
      HostsConfigError,
    );
    const [problem, ...more] = error.problems as [ConfigProblem];

    assertEquals(more, []);
    assertEquals(problem.path, path);
    assert(/leading zero/.test(problem.message), problem.message);
    assert(problem.line! >= 1);
  });
}

/** What YAML reads as octal, and nobody means. */
const OCTAL = ["rack: 012", "memory_gb: 0144", "cpus: 010", "gpu: 0700"];

for (const field of OCTAL) {
  Deno.test(`validateHostsConfig() warns of ${field}`, () => {
    const text = `hosts:\n  a:\n    ssh_host: x\n    ${field}\n`;
    const { problems, warnings } = validateHostsConfig(text);

    assertEquals(problems, []);
    assertEquals(warnings.map(({ path, line }) => `${path}:${line}`), [
      `hosts.a.${field.split(":")[0]}:4`,
    ]);
    assert(/octal/.test(warnings[0]!.message));
  });
}

/** Numbers and texts with zeros that say what they mean. */
const ZEROS = [
  ...["rack: 0", 'rack: "012"', "rack: 08", "rack: 0.5", "rack: a 012"],
  ...["rack: 012a", "rack: 2025-01-02", "rack: 10.0.0.012", "rack: 00"],
];

for (const field of ZEROS) {
  Deno.test(`validateHostsConfig() does not warn of ${field}`, () => {
    const text = `hosts:\n  a:\n    ssh_host: x\n    ${field}\n`;
    const { problems, warnings } = validateHostsConfig(text);
    assertEquals([...problems, ...warnings], []);
  });
}
