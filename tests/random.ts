/**
 * Random numbers for tests that try more than anybody would write down.
 *
 * @module
 */

/** A random number from 0 to `limit - 1`. */
export type Random = (limit: number) => number;

const GIVEN_SEED = Deno.env.get("FUZZ_SEED");

/** Runs `check` with random numbers. If it fails, the error begins with the seed; `FUZZ_SEED` repeats that very run. */
export async function withRandom(check: (random: Random) => Promise<void> | void): Promise<void> {
  const seed = Number(GIVEN_SEED ?? Math.floor(Math.random() * 1_000_000));
  try {
    await check(randomFrom(seed));
  } catch (cause) {
    throw new Error(`FUZZ_SEED=${seed}: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
}

/** The same numbers for the same seed (mulberry32). */
function randomFrom(seed: number): Random {
  return (limit) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };
}
