/**
 * Prints how many milliseconds it takes to read a file and `parse` it, or to `load` it as an inventory: each in a process
 * that is as new as the other's.
 *
 * @module
 */
import { parse } from "jsr:@std/yaml@^1.2.0/parse";
import { getClusterNodes } from "../../mod.ts";

const [work, path = ""] = Deno.args;
const started = performance.now();
if (work === "load") await getClusterNodes(path);
else parse(await Deno.readTextFile(path));
console.log(performance.now() - started);
