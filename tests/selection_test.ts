import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import { compilePattern } from "../cluster_hosts.ts";
import {
  ClusterNode,
  type ClusterNodeFields,
  getClusterNodes,
  type NodeSelection,
  parseHostsConfig,
  selectNodes,
} from "../mod.ts";
import { assertLinear } from "./linear.ts";
import { withRandom } from "./random.ts";

function node(
  name: string,
  fields: Omit<ClusterNodeFields, "name"> = {},
): ClusterNode {
  return new ClusterNode({ name, ...fields });
}

function namesOf(
  nodes: Iterable<ClusterNode>,
  selection?: NodeSelection,
): string[] {
  return selectNodes(nodes, selection).map(({ name }) => name);
}

// --- By name ---

const NAMED = ["gpu-1", "gpu-2", "gpu-10", "gpu-08", "gpu-09", "n.a", "nXa"]
  .map((name) => node(name))
  .concat(node("old-1", { status: "retired" }));

/** Patterns, and the names that they select. */
const BY_NAME: [names: string[], selected: string][] = [
  [["gpu-2", "gpu-1"], "gpu-1 gpu-2"],
  [["gpu-1", "gpu-1", "gpu-*"], "gpu-1 gpu-2 gpu-10 gpu-08 gpu-09"],
  [["gpu-?"], "gpu-1 gpu-2"],
  [["gpu-[1-9]"], "gpu-1 gpu-2"],
  [["gpu-[1-10]"], "gpu-1 gpu-2 gpu-10"],
  [["gpu-[08-10]"], "gpu-10 gpu-08 gpu-09"],
  [["gpu-[2,08-09]"], "gpu-2 gpu-08 gpu-09"],
  [["gpu-2,gpu-[08-09],n.a"], "gpu-2 gpu-08 gpu-09 n.a"],
  [[" gpu-1 , gpu-2 ,"], "gpu-1 gpu-2"],
  [["n.*"], "n.a"],
  // An inactive node is selected by its exact name alone.
  [["old-1"], "old-1"],
  [["gpu-1,old-1"], "gpu-1 old-1"],
  [["old-*", "gpu-1"], "gpu-1"],
  [[], ""],
];

for (const [names, selected] of BY_NAME) {
  const given = JSON.stringify(names);

  Deno.test(`selectNodes() by names ${given} returns "${selected}"`, () => {
    assertEquals(namesOf(NAMED, { names }).join(" "), selected);
  });
}

const EXCLUDED: [selection: NodeSelection, selected: string][] = [
  [{}, "gpu-1 gpu-2 gpu-10 gpu-08 gpu-09 n.a nXa"],
  [{ exclude: [] }, "gpu-1 gpu-2 gpu-10 gpu-08 gpu-09 n.a nXa"],
  [{ exclude: ["gpu-*,n?a"] }, ""],
  [{ exclude: ["gpu-*", "nXa"] }, "n.a"],
  [{ names: ["gpu-[1-2]"], exclude: ["gpu-1"] }, "gpu-2"],
];

for (const [selection, selected] of EXCLUDED) {
  const given = JSON.stringify(selection);

  Deno.test(`selectNodes() of ${given} returns "${selected}"`, () => {
    assertEquals(namesOf(NAMED, selection).join(" "), selected);
  });
}

/** Patterns that match nothing, and what is said of them. */
const UNMATCHED: [selection: NodeSelection, message: string][] = [
  [
    { names: ["gpu-3", "tpu-*", "gpu-1"] },
    'No node matches "gpu-3" (did you mean "gpu-1"?), "tpu-*"',
  ],
  [
    { names: ["GPU-1"] },
    'No node matches "GPU-1" (did you mean "gpu-1"?)',
  ],
  [{ names: ["head,gone"] }, 'No node matches "gone"'],
  [{ names: ["hea"] }, 'No node matches "hea" (did you mean "head"?)'],
  [{ names: [""] }, 'No node matches ""'],
  [{ names: ["gpu-[7-9]"] }, 'No node matches "gpu-[7-9]"'],
  [{ exclude: ["gone"] }, 'No node matches "gone"'],
  [
    { names: ["gpu-[12]"] },
    'No node matches "gpu-[12]" (did you mean "gpu-[1,2]"?)',
  ],
];

for (const [selection, message] of UNMATCHED) {
  const given = JSON.stringify(selection);

  Deno.test(`selectNodes() of ${given} rejects with a hint`, () => {
    const nodes = ["gpu-1", "gpu-2", "head", "old"].map((name) => node(name));
    const error = assertThrows(() => selectNodes(nodes, selection), RangeError);
    assertEquals(error.message, message);
  });
}

/** What other tools write, and what is to be written instead. */
const OPERATORS: [pattern: string, advice: RegExp][] = [
  ["!gpu-2", /"gpu-2" .*--exclude/],
  ["^gpu-2", /"gpu-2" .*--exclude/],
  ["-gpu-2", /"gpu-2" .*--exclude/],
  ["gpu-[1-5],!gpu-2", /"gpu-2" .*--exclude/],
  ["gpu-1&gpu-2", /--role.*--gpu.*--where/],
  ["@worker", /"worker" .*--role/],
  ["gpu-{1..3}", /"gpu-\[1-3\]"/],
  ["gpu-{1,3}", /brackets/],
  ["gpu-[!2]", /--exclude/],
];

for (const [pattern, advice] of OPERATORS) {
  Deno.test(`selectNodes() by "${pattern}" says what to write instead`, () => {
    const nodes = ["gpu-1", "gpu-2"].map((name) => node(name));
    const { message } = assertThrows(
      () => selectNodes(nodes, { names: [pattern] }),
      RangeError,
    );
    assert(advice.test(message), message);
    assert(!/did you mean/.test(message), message);
  });
}

// --- By fields ---

const MIXED = [
  node("a", { role: "Worker", status: "active", gpu: "NVIDIA GH200" }),
  node("b", { role: "worker", status: "Offline", gpu: "H100" }),
  node("c", { role: "coordinator", status: "ready" }),
];

const BY_FIELD: [selection: NodeSelection, selected: string][] = [
  [{}, "a c"],
  [{ includeInactive: true }, "a b c"],
  [{ roles: ["worker"] }, "a"],
  [{ roles: ["WORKER"], includeInactive: true }, "a b"],
  [{ roles: ["worker", "coordinator"] }, "a c"],
  [{ roles: ["work"] }, ""],
  [{ roles: [] }, ""],
  [{ gpus: ["gh2", "none"] }, "a"],
  [{ gpus: ["h"], includeInactive: true }, "a b"],
  [{ statuses: ["READY"] }, "c"],
  [{ statuses: ["offline"] }, "b"],
  [{ names: ["b"], roles: ["worker"] }, "b"],
  [{ names: ["b"], roles: ["coordinator"] }, ""],
  [{ names: ["*"], exclude: ["a"] }, "c"],
  [{ roles: ["worker"], gpus: ["h100"], includeInactive: true }, "b"],
];

for (const [selection, selected] of BY_FIELD) {
  const given = JSON.stringify(selection);

  Deno.test(`selectNodes() by ${given} returns "${selected}"`, () => {
    assertEquals(namesOf(MIXED, selection).join(" "), selected);
  });
}

type Where = NonNullable<NodeSelection["where"]>;

const RACKS = `
defaults: { gpu: H100, ssh_options: [ProxyJump=head] }
hosts:
  a: { rack: 7, tier: [a, b], ssh_port: 2222, spot: true, role: worker }
  b: { rack: "7", tier: c, mark: ~ }
  c: { rack: 8, tier: [b, 3], ssh_port: "", role: worker, gpu: none }
  d: { owner: { name: x }, data_server_port: 1 }
`;

/** What is wanted, and the nodes that have it. */
const BY_WHERE: [where: Where, selected: string][] = [
  [{}, "a b c d"],
  [{ rack: "7" }, "a b"],
  [{ rack: ["7", "8"] }, "a b c"],
  [{ tier: "b" }, "a c"],
  [{ tier: ["a", "3"] }, "a c"],
  [{ tier: "a,b" }, ""],
  [{ rack: "7", tier: "c" }, "b"],
  [{ rack: "7", tier: ["b", "c"], spot: "true" }, "a"],
  [{ ssh_port: "2222" }, "a"],
  // Known keys have what defaults gives, or their own defaults.
  [{ ssh_port: "22" }, "b c d"],
  [{ ssh_user: "ubuntu", role: "worker" }, "a c"],
  [{ status: "unknown" }, "a b c d"],
  [{ gpu: "H100" }, "a b d"],
  [{ ssh_options: "ProxyJump=head" }, "a b c d"],
  // What a node does not have is not any text.
  [{ none: "undefined" }, ""],
  [{ mark: "null" }, ""],
  [{ toString: "x" } as unknown as Where, ""],
  [{ rack: [] }, ""],
];

for (const [where, selected] of BY_WHERE) {
  const given = JSON.stringify(where);

  Deno.test({
    name: `selectNodes() by where ${given} returns "${selected}"`,
    permissions: { env: false },
    async fn() {
      const nodes = await getClusterNodes(parseHostsConfig(RACKS));
      assertEquals(namesOf(nodes.values(), { where }).join(" "), selected);
    },
  });
}

// --- Faults of the caller ---

const OPTIONS = [
  ...["names", "exclude", "roles", "statuses", "gpus"],
  ...["where", "includeInactive"],
] as const;

for (const option of OPTIONS) {
  Deno.test(`selectNodes() with ${option}: undefined selects the active nodes`, () => {
    assertEquals(namesOf(MIXED, { [option]: undefined }), ["a", "c"]);
  });
}

Deno.test("selectNodes() with an undefined selection selects the active nodes", () => {
  assertEquals(namesOf(MIXED, undefined), ["a", "c"]);
});

for (const option of OPTIONS.slice(0, 5)) {
  Deno.test(`selectNodes() rejects ${option} that is a text`, () => {
    const selection = { [option]: "gpu-1" } as NodeSelection;
    const { message } = assertThrows(
      () => selectNodes(MIXED, selection),
      TypeError,
    );
    assert(
      message.includes(option) && /list of strings/.test(message),
      message,
    );
  });
}

/** What is no list of nodes, and the advice. */
const NO_NODES: [what: string, nodes: unknown, advice: RegExp][] = [
  ["a Map", new Map([["a", node("a")]]), /values\(\)/],
  ["a promise", Promise.resolve([node("a")]), /await/],
  ["one node", node("a"), /list/],
  ["a text", "a", /ClusterNodes/],
  ["names", ["a", "b"], /ClusterNodes/],
  ["a list that holds undefined", [undefined], /ClusterNodes/],
  ["undefined", undefined, /ClusterNodes/],
];

for (const [what, nodes, advice] of NO_NODES) {
  Deno.test(`selectNodes() rejects ${what} where nodes are meant`, () => {
    const given = nodes as ClusterNode[];
    const { message } = assertThrows(() => selectNodes(given), TypeError);
    assert(advice.test(message), message);
  });
}

// --- Patterns ---

/** ClusterShell's grammar, and where it differs: a pattern, what it takes, and what it does not. */
const PATTERNS: [pattern: string, taken: string, left: string][] = [
  // Names, wildcards.
  ["gpu-1", "gpu-1", "gpu-11 gpu- GPU-1"],
  ["gpu-*", "gpu- gpu-1 gpu-x-1", "xgpu-1 gpu"],
  ["*", "a gpu-1 n1.dc1", ""],
  ["*1", "1 a1 a11", "a a12"],
  ["a**b", "ab axb", "a b"],
  ["*-*-*", "a-b-c --", "a-b"],
  ["gpu-?", "gpu-1 gpu-a gpu-é gpu-\u{1f600}", "gpu- gpu-10"],
  ["node.a", "node.a", "nodeXa"],
  ["a+b", "a+b", "aab"],
  ["n(1)|x^$", "n(1)|x^$", "n1"],
  // Ranges and lists.
  ["n[5]", "n5", "n n55 n05"],
  ["n[1-3]", "n1 n2 n3", "n0 n4 n11 n01 n"],
  ["n[1,5-6]", "n1 n5 n6", "n2 n15"],
  ["n[5,1,5]", "n1 n5", "n2"],
  ["n[0-2]", "n0 n1 n2", "n00 n3"],
  ["[1-3]", "1 2 3", "n1 4"],
  ["n[1-3].dc1", "n1.dc1 n3.dc1", "n1xdc1 n4.dc1 n1.dc2"],
  ["n[8-12]", "n8 n9 n10 n12", "n08 n13"],
  ["n[99-101]", "n99 n100 n101", "n099 n98"],
  ["r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2", "r3n1 r1n3"],
  ["n[1-2][0-1]", "n10 n11 n20 n21", "n1 n12 n00"],
  ["n[0-999999999]", "n0 n7 n999999999", "n1000000000"],
  // Padding is significant.
  ["n[01-03]", "n01 n02 n03", "n1 n001"],
  ["n[08-12]", "n08 n09 n10 n12", "n8 n010"],
  ["n[08-120]", "n08 n10 n99 n100 n120", "n8 n008 n010"],
  ["n[000-002]", "n000 n002", "n0 n00"],
  ["n[00]", "n00", "n0"],
  ["n[1,01]", "n1 n01", "n001"],
  // Steps.
  ["n[0-14/2]", "n0 n2 n14", "n1 n15 n16"],
  ["n[1-5/2,20]", "n1 n3 n5 n20", "n2 n4"],
  ["n[01-09/4]", "n01 n05 n09", "n1 n02"],
  ["n[1-3/9]", "n1", "n2 n3"],
  // Blanks in brackets.
  ["n[1, 5]", "n1 n5", "n2 n"],
  ["n[ 1 - 3 ,  5 ]", "n1 n2 n3 n5", "n4"],
  ["n[ 0 - 4 / 2 ]", "n0 n2 n4", "n1"],
  // A bracket beside a wildcard is a whole number, unlike ClusterShell's.
  ["*[1-3]", "gpu-1 n3", "gpu-11 n4 n"],
  ["*[10-12]", "gpu-10 gpu-12 10", "gpu-1 gpu-110 gpu-0"],
  ["n[1-2]*", "n1 n2 n1x n2.dc1", "n15 n3 n10"],
  ["*[1-2]*", "foo1-ib0 foo1-ib1 foo9-ib2 n1", "foo3-ib0 foo12-ib0"],
  ["?[1-3]", "a1 b3", "11 1 ab1"],
  ["n[1-2]?", "n1a n2.", "n1 n11 n3a"],
  ["*[01-03]", "n01 n03", "n1 n001 n101"],
  ["n[1-2]-*", "n1-a n2-", "n1 n3-a"],
  ["*-[1-2]", "a-1 a-b-2", "a-11 a-3"],
  ["n[10-12]*[1-2]", "n10-1 n12x2", "n10 n10-3 n1-1"],
];

for (const [pattern, taken, left] of PATTERNS) {
  Deno.test(`compilePattern() of ${pattern} matches ${taken}`, () => {
    const matches = compilePattern(pattern);
    const wanted = taken.split(" ").filter(Boolean);
    const others = left.split(" ").filter(Boolean);

    assertEquals(wanted.filter((name) => !matches(name)), []);
    assertEquals(others.filter(matches), []);
  });
}

/** What cannot be read, where, and why. */
const REFUSED: [pattern: string, character: number, reason: RegExp][] = [
  ["gpu-[]", 5, /numbers/],
  ["gpu-[ ]", 5, /numbers/],
  ["gpu-[a-b]", 5, /numbers/],
  ["gpu-[8-1]", 5, /numbers/],
  ["gpu-[1-]", 5, /numbers/],
  ["gpu-[-1]", 5, /numbers/],
  ["gpu-[1,]", 5, /numbers/],
  ["gpu-[,1]", 5, /numbers/],
  ["gpu-[1,,2]", 5, /numbers/],
  ["gpu-[1 2]", 5, /numbers/],
  ["gpu-[1-2-3]", 5, /numbers/],
  ["gpu-[1-5/0]", 5, /numbers/],
  ["gpu-[1-5/]", 5, /numbers/],
  ["gpu-[5/2]", 5, /numbers/],
  ["gpu-[1.5]", 5, /numbers/],
  ["gpu-[0x1]", 5, /numbers/],
  ["gpu-[١]", 5, /numbers/],
  ["gpu-[1-*]", 5, /numbers/],
  // Which width would it have?
  ["gpu-[1-044]", 5, /numbers/],
  ["gpu-[01-044]", 5, /numbers/],
  ["gpu-[001-44]", 5, /numbers/],
  ["gpu-[00-1]", 5, /numbers/],
  ["gpu-[1-", 5, /"\[" without "\]"/],
  ["gpu-[", 5, /"\[" without "\]"/],
  ["gpu-[[1]]", 5, /numbers/],
  ["gpu-1]", 6, /"\]" without "\["/],
  ["gpu-[1]]", 8, /"\]" without "\["/],
  ["r[1-2]n[x]", 8, /numbers/],
  ["*n[1-", 3, /"\[" without "\]"/],
];

for (const [pattern, character, reason] of REFUSED) {
  Deno.test(`compilePattern() rejects ${pattern} at character ${character}`, () => {
    const nodes = [node("gpu-1"), node("gpu-2")];
    const calls = [
      () => compilePattern(pattern),
      () => selectNodes(nodes, { names: ["gpu-1", pattern] }),
      () => selectNodes(nodes, { exclude: [pattern] }),
      // Before anything is read or contacted.
      () => selectNodes([], { names: [pattern] }),
    ];

    for (const call of calls) {
      const { message } = assertThrows(call, RangeError);
      assert(message.startsWith(`Cannot read ${JSON.stringify(pattern)}: `));
      assert(reason.test(message), message);
      assert(message.endsWith(` at character ${character}`), message);
    }
  });
}

/** Returns the same as a regular expression: each number that may be there. */
function reference(parts: readonly string[]): RegExp {
  const isWildcard = (part = "") => part === "*" || part === "?";

  const sources = parts.map((part, index) => {
    if (part === "*") return ".*";
    if (part === "?") return ".";

    const [, first, last] = /^\[(\d+)-(\d+)\]$/.exec(part) ?? [];
    if (first === undefined) return part;

    const count = Number(last) - Number(first) + 1;
    const numbers = Array.from({ length: count }, (_, i) => Number(first) + i);
    const before = isWildcard(parts[index - 1]) ? "(?<!\\d)" : "";
    const after = isWildcard(parts[index + 1]) ? "(?!\\d)" : "";
    return `${before}(?:${numbers.join("|")})${after}`;
  });

  return new RegExp(`^${sources.join("")}$`);
}

Deno.test("compilePattern() matches what a regular expression does, in random mixtures", async () => {
  await withRandom((random) => {
    const pick = <T>(items: readonly T[]) => items[random(items.length)]!;
    const range = () => `[${random(3)}-${3 + random(9)}]`;
    const newPart = () => pick(["*", "*", "?", "n", "1", "-", range()]);
    const newPiece = () => pick(["n", "-", "1", "2", "10", "11", "0"]);

    for (let round = 0; round < 2000; round++) {
      // Two asterisks are one.
      const parts = Array.from({ length: 1 + random(5) }, newPart)
        .filter((it, at, all) => it !== "*" || all[at - 1] !== "*");
      const pattern = parts.join("");
      const matches = compilePattern(pattern);
      const expected = reference(parts);

      for (let tries = 0; tries < 20; tries++) {
        const name = Array.from({ length: random(5) }, newPiece).join("");
        const isExpected = expected.test(name);
        assertEquals(matches(name), isExpected, `${pattern} and ${name}`);
      }
    }
  });
});

/** Patterns whose parts can end in many places. */
const SLOW = [
  "*a*a*a*a*a*a*a*b",
  "*?*?*?*?*?*?*?b",
  "*[1-9]*[1-9]*[1-9]*[1-9]*b",
  "[1-9]*[0-9]*a*a*a*a*a*a*a*b",
];

for (const pattern of SLOW) {
  Deno.test(`compilePattern() of ${pattern} takes time linear in the name`, async () => {
    const matches = compilePattern(pattern);
    const nameOf = (size: number) => "1a".repeat(size / 2);

    await assertLinear(3000, (size) => {
      assert(!matches(nameOf(size)));
    });
  });
}

Deno.test("selectNodes() by seven asterisks takes time linear in long names", async () => {
  const names = ["*a*a*a*a*a*a*a*b"];

  await assertLinear(2000, (size) => {
    const nodes = [1, 2, 3].map((index) => node("a".repeat(size) + index));
    assertThrows(() => selectNodes(nodes, { names }), RangeError);
  });
});
