/**
 * Random numbers for tests that try more than anybody would write down.
 *
 * @module
 */

/** Returns a random number from 0 to `limit - 1`. */
export type Random = (limit: number) => number;

const GIVEN_SEED = Deno.env.get("FUZZ_SEED");

/**
 * Runs `check` with random numbers.
 *
 * If it fails, the error begins with the seed; `FUZZ_SEED` repeats that run.
 */
export async function withRandom(
  check: (random: Random) => Promise<void> | void,
): Promise<void> {
  const seed = Number(GIVEN_SEED ?? Math.floor(Math.random() * 1_000_000));

  try {
    await check(randomFrom(seed));
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    throw new Error(`FUZZ_SEED=${seed}: ${message}`, { cause });
  }
}

/** Returns the same numbers for the same seed (mulberry32). */
function randomFrom(seed: number): Random {
  let state = seed;

  return (limit) => {
    state = (state + 0x6d2b79f5) | 0;
    const first = Math.imul(state ^ (state >>> 15), state | 1);
    const mixed = first ^
      (first + Math.imul(first ^ (first >>> 7), first | 61));

    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };
}
