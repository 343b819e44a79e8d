/**
 * Tells linear time from quadratic time, on a machine that is busy too.
 *
 * @module
 */

/** How often it is tried. Only what is slow at each try is slow. */
const TRIES = 4;

/** Less than this says more about the clock and the compiler. */
const LEAST_MS = 2;

/**
 * Throws unless `run` takes far less than quadratic time.
 *
 * It is run with a size and with a tenth of it: ten times as long would be
 * linear, a hundred times as long quadratic. Other programs can only make a run
 * longer, so one good try is enough.
 */
export async function assertLinear(
  size: number,
  run: (size: number) => unknown,
): Promise<void> {
  const seen: string[] = [];

  for (let attempt = 1; attempt <= TRIES; attempt++) {
    const small = Math.max(
      LEAST_MS,
      Math.min(await msOf(run, size / 10), await msOf(run, size / 10)),
    );
    const large = await msOf(run, size);
    if (large < 40 * small) return;

    seen.push(`${small.toFixed(1)} and ${large.toFixed(1)} ms`);
  }

  throw new Error(`for ${size / 10} and ${size}: ${seen.join("; ")}`);
}

async function msOf(
  run: (size: number) => unknown,
  size: number,
): Promise<number> {
  const started = performance.now();
  await run(size);
  return performance.now() - started;
}
