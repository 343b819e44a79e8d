/** Prints how many milliseconds a bare `parse()` of a file takes, in a process that is as new as the one it is compared to. */
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

const text = await Deno.readTextFile(Deno.args[0]!);
const started = performance.now();
parse(text);
console.log(performance.now() - started);
