import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import { ClusterNode, foldNames, selectNodes } from "../mod.ts";
import { assertLinear } from "./linear.ts";
import { type Random, withRandom } from "./random.ts";

/** Returns the names that a folded list selects out of all. */
function takenBack(all: readonly string[], folded: string): string[] {
  const nodes = all.map((name) => new ClusterNode({ name }));
  return selectNodes(nodes, { names: [folded] }).map(({ name }) => name);
}

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
  [
    "gpu-0 gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-6 gpu-7 gpu-8 gpu-9 gpu-10 gpu-11",
    "gpu-[0-11]",
  ],
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
  // Numbers that are too long to count with stay as they are.
  [
    "99999999999999999998 99999999999999999999",
    "99999999999999999998,99999999999999999999",
  ],
  ["節1 節2", "節[1-2]"],
];

/** Returns other names, which a list that is too wide would take. */
function decoys(names: readonly string[]): string[] {
  const near = new Set<string>();

  for (const name of names) {
    for (const { 0: digits, index } of name.matchAll(/\d+/g)) {
      const number = Number(digits);
      const others = [`0${digits}`, `${digits}0`, number + 1, number - 1];
      for (const other of others) {
        const after = name.slice(index + digits.length);
        near.add(`${name.slice(0, index)}${other}${after}`);
      }
    }
  }

  return [...near].filter((name) => !names.includes(name));
}

for (const [text, folded] of FOLDS) {
  Deno.test(`foldNames() of "${text}" returns "${folded}"`, () => {
    const names = text.split(" ").filter(Boolean);
    assertEquals(foldNames(names), folded);
    assertEquals(foldNames(new Set(names)), folded);
    if (names.length === 0) return;

    const taken = takenBack([...decoys(names), ...names], folded);
    assertEquals(new Set(taken), new Set(names));
  });
}

/** Names that no node can have, as a list could not take them back. */
const REFUSED = ["a,b", " a", "a ", "a[1]", "a]", "a*1", "a?", "", "a\nb"];

for (const name of REFUSED) {
  const shown = JSON.stringify(name);

  Deno.test(`foldNames() rejects ${shown}, which no node can be called`, () => {
    assertThrows(() => foldNames(["gpu-1", name]), RangeError, shown);
  });
}

Deno.test("foldNames() rejects a text, which is a list of letters to it", () => {
  assertThrows(() => foldNames("gpu-1"), TypeError, "list");
});

/** Returns a name out of so few words and numbers that many are alike. */
function randomName(random: Random): string {
  const pick = <T>(items: readonly T[]) => items[random(items.length)]!;

  const number = () => {
    const digits = String(pick([random(12), random(120), random(1200)]));
    const padded = [digits.padStart(2, "0"), digits.padStart(3, "0")];
    return pick([digits, digits, ...padded, `${digits}0000000000000000`]);
  };
  const word = () =>
    pick(["gpu-", "n", ".dc", "-ib", "a", "", "節", "\u{1f600}", " ", "x.y-"]);
  const part = () => word() + pick([number(), number(), ""]);

  const parts = Array.from({ length: 1 + random(3) }, part);
  const end = pick(["", "", ".example.com", "-", "{}", "!", "(1)"]);
  return (parts.join("") + end).trim() || "head";
}

Deno.test("selectNodes() takes back whatever foldNames() returns, and no more", async () => {
  await withRandom((random) => {
    for (let round = 0; round < 500; round++) {
      const names = Array.from(
        { length: 1 + random(60) },
        () => randomName(random),
      );
      const all = [...new Set(names)];
      const chosen = all.filter(() => random(3) > 0);
      if (chosen.length === 0) continue;

      const folded = foldNames(chosen);
      const message = JSON.stringify({ all, folded });
      assertEquals(takenBack(all, folded), chosen, message);
    }
  });
});

const letters = (index: number) =>
  index.toString(26).replaceAll(/\d/g, (it) => "qrstuvwxyz"[Number(it)]!);

/** Names of many kinds, by their index. */
const KINDS: Record<string, (index: number) => string> = {
  "that fold to one": (index) => `gpu-${index}`,
  "without a number": (index) => `gpu-${letters(index)}`,
  "with numbers that all vary": (index) =>
    `r${index}n${7 * index}.dc${13 * index}`,
  "that each have a word of their own": (index) => `${letters(index)}-1`,
};

for (const [kind, nameOf] of Object.entries(KINDS)) {
  Deno.test(`foldNames() of names ${kind} takes time linear in their number`, async () => {
    await assertLinear(10_000, (count) => {
      const names = Array.from({ length: count }, (_, index) => nameOf(index));
      assert(foldNames(names).length > 0);
    });
  });
}
