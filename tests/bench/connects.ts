/** What a TCP sweep of an inventory cannot do without: a process, a parse(), a connection to each host, 64 at once. */
import { parse } from "jsr:@std/yaml@^1.2.0/parse";

const { hosts } = parse(await Deno.readTextFile(Deno.args[0]!)) as {
  hosts: Record<string, Record<string, string>>;
};
const targets = Object.values(hosts).map((host) => ({
  hostname: host.tailscale_ip!,
  port: Number(host.data_server_port),
}));
const signal = AbortSignal.timeout(60_000);
let next = 0;
await Promise.all(Array.from({ length: 64 }, async () => {
  while (next < targets.length) {
    (await Deno.connect({ ...targets[next++]!, signal })).close();
  }
}));
