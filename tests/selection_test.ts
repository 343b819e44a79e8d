import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import { compilePattern } from "../cluster_hosts.ts";
import { ClusterNode, type ClusterNodeFields, foldNames, type NodeSelection, selectNodes } from "../mod.ts";
import { type Random, withRandom } from "./random.ts";

function node(name: string, fields: Omit<ClusterNodeFields, "name"> = {}): ClusterNode {
  return new ClusterNode({ name, ...fields });
}

function namesOf(nodes: Iterable<ClusterNode>, selection?: NodeSelection): string[] {
  return selectNodes(nodes, selection).map(({ name }) => name);
}

Deno.test("selectNodes() by names, in the order of the nodes, each once", () => {
  const names = ["gpu-1", "gpu-2", "gpu-10", "gpu-08", "gpu-09", "node.a", "nodeXa", "[odd]", "a,b", "old-1"];
  const nodes = names.map((name) => node(name, { status: name === "old-1" ? "retired" : "active" }));
  const cases = [
    [["gpu-2", "gpu-1"], ["gpu-1", "gpu-2"]],
    [["gpu-1", "gpu-1", "gpu-*"], ["gpu-1", "gpu-2", "gpu-10", "gpu-08", "gpu-09"]],
    [["gpu-?"], ["gpu-1", "gpu-2"]],
    [["gpu-[1-9]"], ["gpu-1", "gpu-2"]],
    [["gpu-[1-10]"], ["gpu-1", "gpu-2", "gpu-10"]],
    [["gpu-[08-10]"], ["gpu-10", "gpu-08", "gpu-09"]],
    [["gpu-[2,08-09]"], ["gpu-2", "gpu-08", "gpu-09"]],
    [["gpu-2,gpu-[08-09],node.a"], ["gpu-2", "gpu-08", "gpu-09", "node.a"]],
    [[" gpu-1 , gpu-2 ,"], ["gpu-1", "gpu-2"]],
    [["node.*"], ["node.a"]],
    [["[odd]"], ["[odd]"]],
    [["a,b"], ["a,b"]],
    [["a,b", "gpu-1"], ["gpu-1", "a,b"]],
    [["old-1"], ["old-1"]],
    [["gpu-1,old-1"], ["gpu-1", "old-1"]],
    [["old-*", "gpu-1"], ["gpu-1"]],
    [[], []],
  ] as const;
  for (const [patterns, expected] of cases) {
    assertEquals(namesOf(nodes, { names: patterns }), [...expected], JSON.stringify(patterns));
  }
  assertEquals(namesOf(nodes), names.slice(0, -1));
  assertEquals(namesOf(nodes, { exclude: ["gpu-*,node?a", "a,b"] }), ["[odd]"]);
  assertEquals(namesOf(nodes, { names: ["gpu-[1-2]"], exclude: ["gpu-1"] }), ["gpu-2"]);
});

Deno.test("selectNodes() throws at a pattern that matches nothing, with a did-you-mean", () => {
  const nodes = ["gpu-1", "gpu-2", "head", "old"].map((name) => node(name));
  const cases: [selection: NodeSelection, message: string][] = [
    [
      { names: ["gpu-3", "tpu-*", "gpu-1"] },
      'No node matches "gpu-3" (did you mean "gpu-1"?), "tpu-*"',
    ],
    [{ names: ["GPU-1"] }, 'No node matches "GPU-1" (did you mean "gpu-1"?)'],
    [{ names: ["head,gone"] }, 'No node matches "gone"'],
    [{ names: ["hea"] }, 'No node matches "hea" (did you mean "head"?)'],
    [{ names: [""] }, 'No node matches ""'],
    [{ names: ["gpu-[7-9]"] }, 'No node matches "gpu-[7-9]"'],
    [{ exclude: ["gone"] }, 'No node matches "gone"'],
  ];
  for (const [selection, message] of cases) {
    assertEquals(assertThrows(() => selectNodes(nodes, selection), RangeError).message, message);
  }
});

Deno.test("selectNodes() by role, status and GPU in any case, and with the inactive ones", () => {
  const nodes = [
    node("a", { role: "Worker", status: "active", gpu: "NVIDIA GH200" }),
    node("b", { role: "worker", status: "Offline", gpu: "H100" }),
    node("c", { role: "coordinator", status: "ready" }),
  ];
  const cases = [
    [{}, ["a", "c"]],
    [{ includeInactive: true }, ["a", "b", "c"]],
    [{ roles: ["worker"] }, ["a"]],
    [{ roles: ["WORKER"], includeInactive: true }, ["a", "b"]],
    [{ roles: ["worker", "coordinator"] }, ["a", "c"]],
    [{ roles: ["work"] }, []],
    [{ gpus: ["gh2", "none"] }, ["a"]],
    [{ gpus: ["h"], includeInactive: true }, ["a", "b"]],
    [{ statuses: ["READY"] }, ["c"]],
    [{ statuses: ["offline"] }, ["b"]],
    [{ names: ["b"], roles: ["worker"] }, ["b"]],
    [{ names: ["b"], roles: ["coordinator"] }, []],
    [{ names: ["*"], exclude: ["a"] }, ["c"]],
    [{ roles: ["worker"], gpus: ["h100"], includeInactive: true }, ["b"]],
  ] as const;
  for (const [selection, expected] of cases) {
    assertEquals(namesOf(nodes, selection), [...expected], JSON.stringify(selection));
  }
});

Deno.test("selectNodes() by where: own and known keys, as text, any member of a list, all keys", () => {
  const entries: Record<string, Record<string, unknown>> = {
    a: { rack: 7, tier: ["a", "b"], ssh_port: 2222, spot: true, role: "worker" },
    b: { rack: "7", tier: "c", note: null },
    c: { rack: 8, tier: ["b", 3], ssh_port: "", role: "worker" },
    d: { owner: { name: "x" } },
  };
  const nodes = Object.entries(entries).map(([name, entry]) => {
    const { ssh_port: sshPort, role } = entry as { ssh_port?: number; role?: string };
    return node(name, { entry, sshPort, role });
  });
  const cases: [where: NonNullable<NodeSelection["where"]>, names: string][] = [
    [{}, "a b c d"],
    [{ rack: "7" }, "a b"],
    [{ rack: ["7", "8"] }, "a b c"],
    [{ tier: "b" }, "a c"],
    [{ tier: ["a", "3"] }, "a c"],
    [{ tier: "a,b" }, ""],
    [{ rack: "7", tier: "c" }, "b"],
    [{ rack: "7", tier: ["b", "c"], spot: "true" }, "a"],
    [{ ssh_port: "2222" }, "a"],
    // Known keys have their defaults.
    [{ ssh_port: "22" }, "b c d"],
    [{ ssh_user: "ubuntu", role: "worker" }, "a c"],
    [{ status: "unknown" }, "a b c d"],
    // What a node does not have is not any text.
    [{ none: "undefined" }, ""],
    [{ note: "null" }, ""],
    [{ toString: "x" } as Record<string, string>, ""],
    [{ rack: [] }, ""],
  ];
  for (const [where, expected] of cases) {
    assertEquals(namesOf(nodes, { where }).join(" "), expected, JSON.stringify(where));
  }
});

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
  Deno.test(`compilePattern() of ${pattern}`, () => {
    const fits = compilePattern(pattern);
    const [wanted, others] = [taken, left].map((names) => names.split(" ").filter((name) => name !== ""));
    assertEquals(wanted!.filter((name) => !fits(name)), [], "not taken");
    assertEquals(others!.filter(fits), [], "taken");
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

Deno.test("compilePattern() says of what it refuses where and why, and selectNodes() with it", () => {
  const nodes = [node("gpu-1"), node("gpu-2")];
  for (const [pattern, character, reason] of REFUSED) {
    for (const call of [() => compilePattern(pattern), () => selectNodes(nodes, { names: ["gpu-1", pattern] })]) {
      const { message }: RangeError = assertThrows(call, RangeError, `Cannot read ${JSON.stringify(pattern)}: `);
      assert(reason.test(message), message);
      assert(message.includes(` at character ${character}`), message);
    }
  }
});

Deno.test("a name in which a pattern cannot be read is still that name", () => {
  for (const name of ["gpu-[", "[x]", "n[1-044]", "]"]) {
    assertEquals(namesOf([node(name), node("b")], { names: [name] }), [name]);
  }
});

/** Names, and what they fold to. */
const FOLDS: [names: string, folded: string][] = [
  ["", ""],
  ["a", "a"],
  ["a b", "a,b"],
  ["gpu-1", "gpu-1"],
  ["gpu-1 gpu-1", "gpu-1"],
  ["gpu-1 gpu-2 gpu-3", "gpu-[1-3]"],
  ["gpu-3 gpu-1 gpu-2", "gpu-[1-3]"],
  ["gpu-1 gpu-2 gpu-5", "gpu-[1-2,5]"],
  ["a-1 a-3 a-5", "a-[1,3,5]"],
  ["gpu-0 gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-6 gpu-7 gpu-8 gpu-9 gpu-10 gpu-11", "gpu-[0-11]"],
  ["gpu-2 head gpu-1", "gpu-[1-2],head"],
  ["1 2 3", "[1-3]"],
  // The one number that varies, wherever it stands.
  ["n1.dc1 n2.dc1 n3.dc1", "n[1-3].dc1"],
  ["n1.us-east-1 n2.us-east-1", "n[1-2].us-east-1"],
  ["n1-ib0 n1-ib1", "n1-ib[0-1]"],
  ["r1n1 r1n2 r2n7 r3n7", "r1n[1-2],r[2-3]n7"],
  ["100.64.0.1 100.64.0.2", "100.64.0.[1-2]"],
  // Widths are never mixed.
  ["a08 a09 a10", "a[08-10]"],
  ["a8 a9 a10", "a[8-10]"],
  ["a1 a01", "a1,a01"],
  ["a00 a0 a1 a01", "a[00-01],a[0-1]"],
  ["a098 a099 a100 a101", "a[098-101]"],
  ["a007 a07 a7", "a007,a07,a7"],
  // In a range, these would not be what they are.
  ["a[1] a[2]", "a[1],a[2]"],
  ["a*1 a*2", "a*1,a*2"],
  ["99999999999999999998 99999999999999999999", "99999999999999999998,99999999999999999999"],
  ["節1 節2", "節[1-2]"],
];

/** Other nodes, which a list that is too wide would take. */
function decoys(names: readonly string[]): string[] {
  const near = names.flatMap((name) =>
    [...name.matchAll(/\d+/g)].flatMap(({ 0: digits, index }) =>
      [`0${digits}`, `${digits}0`, String(Number(digits) + 1), String(Number(digits) - 1)]
        .map((other) => name.slice(0, index) + other + name.slice(index + digits.length))
    )
  );
  return [...new Set(near)].filter((name) => !names.includes(name));
}

for (const [text, folded] of FOLDS) {
  Deno.test(`foldNames() of ${text || "no names"}`, () => {
    const names = text.split(" ").filter((name) => name !== "");
    assertEquals(foldNames(names), folded);
    if (names.length === 0) return;
    const nodes = [...decoys(names), ...names].map((name) => node(name));
    assertEquals(new Set(namesOf(nodes, { names: [folded] })), new Set(names));
  });
}

/** A name as people give them, out of so few words and numbers that many are alike. */
function randomName(random: Random): string {
  const pick = <T>(items: readonly T[]) => items[random(items.length)]!;
  const number = () => {
    const digits = String(pick([random(12), random(120), random(1200), random(3)]));
    return pick([digits, digits, digits.padStart(2, "0"), digits.padStart(3, "0"), `${digits}0000000000000000`]);
  };
  const word = () => pick(["gpu-", "n", ".dc", "-ib", "a", "", "節", "\u{1f600}", " ", "x.y-"]);
  const parts = Array.from({ length: 1 + random(3) }, () => word() + pick([number(), number(), ""]));
  const name = parts.join("") + pick(["", "", ".example.com", pick(["*", "?", "[", "]", "[1-2]"])]);
  // A comma in a name, or a bracket that is open, can only be written in a list of one.
  return name.replaceAll(/\[(?!1-2\])|(?<!\[1-2)\]/g, "").trim() || "head";
}

Deno.test("whatever foldNames() gives, selectNodes() takes back whole, and no more", async () => {
  await withRandom((random) => {
    for (let round = 0; round < 1000; round++) {
      const all = [...new Set(Array.from({ length: 1 + random(60) }, () => randomName(random)))];
      const chosen = all.filter(() => random(3) > 0);
      // A node that is named like what others fold to is that node.
      const folded = foldNames(chosen);
      const elements = folded.split(/,(?![^[\]]*\])/);
      const isAnother = all.some((name) => !chosen.includes(name) && elements.includes(name));
      if (chosen.length === 0 || isAnother || new Set(elements).size < elements.length) continue;
      const taken = namesOf(all.map((name) => node(name)), { names: [folded] });
      assert(
        taken.join("\n") === chosen.join("\n"),
        `${JSON.stringify({ all, folded })} gives ${JSON.stringify(taken)}`,
      );
    }
  });
});

Deno.test("compilePattern() takes what its parts say, in any mixture of wildcards and ranges", async () => {
  /** The same in another way: each number that a bracket may be, as a regular expression. */
  const reference = (parts: readonly string[]) => {
    const isWildcard = (part = "") => part === "*" || part === "?";
    const sources = parts.map((part, index) => {
      const [, first, last] = /^\[(\d+)-(\d+)\]$/.exec(part) ?? [];
      if (part === "*") return ".*";
      if (part === "?") return ".";
      if (first === undefined) return part;
      const numbers = Array.from({ length: Number(last) - Number(first) + 1 }, (_, it) => Number(first) + it);
      const [before, behind] = [isWildcard(parts[index - 1]), isWildcard(parts[index + 1])];
      return `${before ? "(?<!\\d)" : ""}(?:${numbers.join("|")})${behind ? "(?!\\d)" : ""}`;
    });
    return new RegExp(`^${sources.join("")}$`);
  };
  await withRandom((random) => {
    const pick = <T>(items: readonly T[]) => items[random(items.length)]!;
    for (let round = 0; round < 2000; round++) {
      const part = () => pick(["*", "*", "?", "n", "1", "-", `[${random(3)}-${3 + random(9)}]`]);
      // Two asterisks are one.
      const parts = Array.from({ length: 1 + random(5) }, part).filter((it, at, all) =>
        it !== "*" || all[at - 1] !== "*"
      );
      const [fits, expected] = [compilePattern(parts.join("")), reference(parts)];
      for (let tries = 0; tries < 20; tries++) {
        const name = Array.from({ length: random(5) }, () => pick(["n", "-", "1", "2", "10", "11", "0"])).join("");
        assertEquals(fits(name), expected.test(name), `${parts.join("")} and ${name}`);
      }
    }
  });
});

Deno.test("foldNames() takes time linear in the number of names, fold they or not", () => {
  const letters = (index: number) => index.toString(26).replaceAll(/\d/g, (digit) => "qrstuvwxyz"[Number(digit)]!);
  const kinds: Record<string, (index: number) => string> = {
    "that fold to one": (index) => `gpu-${index}`,
    "without a number": (index) => `gpu-${letters(index)}`,
    "with numbers of which all vary": (index) => `r${index}n${7 * index}.dc${13 * index}`,
    "that each have a word of their own": (index) => `${letters(index)}-1`,
  };
  for (const [kind, nameOf] of Object.entries(kinds)) {
    const msOf = (count: number) => {
      const names = Array.from({ length: count }, (_, index) => nameOf(index));
      const times = Array.from({ length: 5 }, () => {
        const started = performance.now();
        foldNames(names);
        return performance.now() - started;
      });
      return Math.max(Math.min(...times), 0.5);
    };
    msOf(4000);
    const [small, large] = [msOf(4000), msOf(40_000)];
    // In quadratic time, it would be 100 times as long.
    assert(large < 50 * small, `names ${kind}: ${small.toFixed(1)} ms for 4,000, ${large.toFixed(1)} ms for 40,000`);
  }
});
