/**
 * Has every timer of a process end a hundred times as fast, so that what would
 * happen after a minute or never is seen in a second.
 *
 * @module
 */
const { setTimeout } = globalThis;
const { timeout } = AbortSignal;

globalThis.setTimeout =
  ((callback: () => void, ms = 0) =>
    setTimeout(callback, ms / 100)) as typeof setTimeout;
AbortSignal.timeout = (ms) => timeout.call(AbortSignal, Math.ceil(ms / 100));
