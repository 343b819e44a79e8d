import { assert, assertEquals, assertStringIncludes, assertThrows } from "jsr:@std/assert@^1.0.19";
import { ClusterNode, type ClusterNodeFields, HostsConfigError, parseHostsConfig } from "../mod.ts";

type Fields = Omit<ClusterNodeFields, "name">;

/** Stands in bad values, and may be in no message. */
const SECRET = "hunter2";

function node(fields: Fields = {}): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** One host of an inventory, with `key: yaml` in its third line. */
function host(key: string, yaml: string): string {
  return `hosts:\n  a:\n    ${key}: ${yaml}\n`;
}

Deno.test("ClusterNode has the defaults", () => {
  const { entry, ...fields } = node();
  assertEquals(fields, {
    name: "gpu-1",
    tailscaleIp: undefined,
    sshHost: undefined,
    sshUser: "ubuntu",
    sshKey: undefined,
    sshPort: 22,
    ringriftPath: "~/ringrift/ai-service",
    status: "unknown",
    reason: undefined,
    role: "unknown",
    memoryGb: 0,
    cpus: 0,
    gpu: "",
    dataServerPort: 8766,
    dataServerUrl: undefined,
    statusPath: "/status",
  });
  assertEquals(entry, {});
});

/** Every field: its key, what may be written, and what that means. */
const GOOD: Record<keyof Fields, [key: string, ...values: (readonly [yaml: string, value: unknown])[]]> = {
  entry: ["rack", ["7", 7]],
  tailscaleIp: [
    "tailscale_ip",
    ["100.64.0.1", "100.64.0.1"],
    ['" 100.64.0.1 "', "100.64.0.1"],
    ['"[2001:db8::1]"', "2001:db8::1"],
    ["2001:db8::1", "2001:db8::1"],
    ["gpu-1.tail-net.ts.net", "gpu-1.tail-net.ts.net"],
    ["gpu_1", "gpu_1"],
  ],
  sshHost: [
    "ssh_host",
    ["gpu.example.com", "gpu.example.com"],
    ["root@192.0.2.1", "root@192.0.2.1"],
    ['" root@192.0.2.1 "', "root@192.0.2.1"],
    ['"root@[2001:db8::1]"', "root@2001:db8::1"],
  ],
  sshUser: ["ssh_user", ["ops", "ops"], ["first.last", "first.last"], ['"7"', "7"]],
  sshKey: ["ssh_key", ["~/.ssh/id_ed25519", "~/.ssh/id_ed25519"], ["/keys/a-b_c.pem", "/keys/a-b_c.pem"]],
  sshPort: ["ssh_port", ["1", 1], ["65535", 65535], ['"22"', 22], ['" 22 "', 22]],
  ringriftPath: ["ringrift_path", ["/srv/a b", "/srv/a b"], ["~/x", "~/x"]],
  status: ["status", ["active", "active"], ["Offline", "Offline"], ["anything at all", "anything at all"]],
  reason: ["reason", ['"its disk is full: ask Ann (#7)"', "its disk is full: ask Ann (#7)"]],
  role: ["role", ["gpu_training_primary", "gpu_training_primary"]],
  memoryGb: ["memory_gb", ["96", 96], ["0.5", 0.5], ['"8"', 8], ["0", 0]],
  cpus: ["cpus", ["72", 72], ['"8"', 8]],
  gpu: ["gpu", ["RTX 5090", "RTX 5090"], ["4090", "4090"], ['"H100"', "H100"]],
  dataServerPort: ["data_server_port", ["9001", 9001], ['"9001"', 9001]],
  dataServerUrl: [
    "data_server_url",
    ["http://192.0.2.1", "http://192.0.2.1"],
    ["http://192.0.2.1/", "http://192.0.2.1"],
    ["https://gpu.example.com/data/", "https://gpu.example.com/data"],
    ["HTTP://GPU.example.com:80/data", "http://gpu.example.com/data"],
    ["https://gpu.example.com:443", "https://gpu.example.com"],
    ["http://192.0.2.1/data//", "http://192.0.2.1/data"],
    ['"http://[2001:db8::1]:9000"', "http://[2001:db8::1]:9000"],
  ],
  statusPath: ["status_path", ["/health", "/health"], ["/a/b?full=1", "/a/b?full=1"], ["/", "/"]],
};

for (const [name, [key, ...values]] of Object.entries(GOOD) as [keyof Fields, (typeof GOOD)[keyof Fields]][]) {
  if (name === "entry") continue;
  Deno.test(`ClusterNode takes ${name}, and an inventory ${key}`, () => {
    for (const [yaml, value] of values) {
      const { hosts } = parseHostsConfig(host(key, yaml));
      assertEquals(node({ [name]: hosts.a![key] })[name], value, yaml);
    }
  });
}

Deno.test("ClusterNode takes nothing, a blank and a placeholder for unset, in every field", () => {
  const { entry: _, ...defaults } = node();
  for (const name of Object.keys(GOOD).filter((name) => name !== "entry")) {
    for (const value of [undefined, null, "", " \t", "<to-be-set>", " root@<public-ip> "]) {
      const { entry: _, ...fields } = node({ [name]: value });
      assertEquals(fields, defaults, `${name}: ${JSON.stringify(value)}`);
    }
  }
});

Deno.test("ClusterNode keeps the host's mapping as written in its entry", () => {
  const entry = { rack: 7, ssh_port: "22" };
  assertEquals(node({ entry }).entry, entry);
});

const PORTS = [
  ...["0", "65536", "-1", "22.5", `"${SECRET}"`, ".inf", "-.inf", ".nan", '"22 23"', '"0x16"', '"1e3"', '"22.0"'],
  ...["true", "[22]", "{}"],
];
const TEXTS = ["7", "true", `[${SECRET}]`, `{${SECRET}: 1}`, `"${SECRET}\\e"`, `"${SECRET}\\x9b"`, `"a\\n${SECRET}"`];
const AMOUNTS = ["-1", ".inf", ".nan", SECRET, "true", "[]", "{}"];
/** What ssh or a shell could take for something else, and what cannot be seen. */
const WORDS = [
  ...TEXTS,
  ...["-oX", "a b", "a\\tb", "a;b", "a|b", "a&b", "$(b)", "${b}", "`b`", "a'b", "a<b", "a*", "a#b", "a%b", "a\\\\b"]
    .map((text) => `"${text}${SECRET}"`),
  ...["200b", "202e", "2066", "00ad", "061c", "feff"].map((code) => `"a\\u${code}${SECRET}"`),
  ...['a\\"b', "a?b", "a(b", "a[b", "a{b", "a!b", "a^b", "a>b"].map((text) => `"${text}${SECRET}"`),
];

/** What a field may not be. */
const BAD: Partial<Record<keyof Fields, string[]>> = {
  tailscaleIp: [
    ...WORDS,
    ...["100.64.0.999", "1.2.3", "1.2.3.4.5", `${SECRET}@x`, `${SECRET}/x`, `"a:${SECRET}"`, `"::${SECRET}"`],
    ...[`"${SECRET},x"`, "1::2::3", '"[]"'],
  ],
  sshHost: [...WORDS, `"-x@${SECRET}"`, `"a b@${SECRET}"`, `"${SECRET}@"`, `"@${SECRET}"`, `ssh://${SECRET}`],
  sshUser: [...WORDS, `"${SECRET}@x"`, `"${SECRET}:x"`, `"${SECRET}/x"`],
  sshKey: WORDS,
  sshPort: PORTS,
  ringriftPath: TEXTS,
  status: TEXTS,
  reason: TEXTS,
  role: TEXTS,
  memoryGb: AMOUNTS,
  cpus: AMOUNTS,
  gpu: ["true", ".nan", "[]", "{}", `"${SECRET}\\e"`],
  dataServerPort: PORTS,
  dataServerUrl: [
    ...[...TEXTS, SECRET, `ftp://${SECRET}`, "http://", `"http://x/${SECRET} y"`, `"http://${SECRET}:0"`],
    ...[
      `http://me:${SECRET}@x`,
      `http://:${SECRET}@x`,
      `http://${SECRET}@x`,
      `http://x/?key=${SECRET}`,
      `"http://x/#${SECRET}"`,
      "http://x?",
    ],
    ...["'", "`", "<", ">", "\\\\", '\\"'].map((mark) => `"http://x/${SECRET}${mark}"`),
  ],
  statusPath: [...TEXTS, SECRET, `http://x/${SECRET}`, `"/${SECRET} x"`, `"/ä${SECRET}"`, `"/#${SECRET}"`],
};

for (const [name, values] of Object.entries(BAD) as [keyof Fields, string[]][]) {
  const [key] = GOOD[name];
  Deno.test(`ClusterNode refuses a wrong ${name}, and an inventory a wrong ${key}`, () => {
    for (const yaml of values) {
      const refused: HostsConfigError = assertThrows(
        () => parseHostsConfig(host(key, yaml)),
        HostsConfigError,
        "",
        yaml,
      );
      assertEquals(refused.problems.map(({ path, line }) => [path, line]), [[`hosts.a.${key}`, 3]], yaml);

      // The same value in a script.
      const { hosts } = parseHostsConfig(host("other", yaml));
      const thrown: TypeError = assertThrows(() => node({ [name]: hosts.a!.other }), TypeError, "", yaml);
      const { message } = refused.problems[0]!;
      assertEquals(thrown.message, `Cannot make node "gpu-1": ${name}: ${message}`);
      assert(!Deno.inspect([refused, thrown]).includes(SECRET), `the value ${yaml} is shown`);
      assert(message.length > 10 && !message.includes("\n"), message);
    }
  });
}

Deno.test("ClusterNode says in one TypeError everything that is wrong", () => {
  const fields = { sshPort: 0, tailscaleIp: "a b", cpus: -1, statusPath: "health" };
  const { message }: TypeError = assertThrows(() => node(fields), TypeError);
  assertStringIncludes(message, 'Cannot make node "gpu-1": ');
  const named = message.replace(/^.*?": /, "").split("; ").map((problem) => problem.split(":", 1)[0]);
  assertEquals(named, ["tailscaleIp", "sshPort", "cpus", "statusPath"]);
});

Deno.test("ClusterNode wants a name", () => {
  for (const name of ["", "  ", "a\nb", "a\x1b[31m", "a\x9b", undefined, 7]) {
    assertThrows(() => new ClusterNode({ name: name as string }), TypeError, "name");
  }
  for (const name of ["__proto__", "a b", "gpu-1", "节点"]) assertEquals(new ClusterNode({ name }).name, name);
});

Deno.test("ClusterNode.bestIp, addresses and sshUser", () => {
  const cases = [
    [{}, undefined, [], "ubuntu"],
    [{ tailscaleIp: "100.64.0.1", sshHost: "192.0.2.1" }, "100.64.0.1", ["100.64.0.1", "192.0.2.1"], "ubuntu"],
    [{ tailscaleIp: "  ", sshHost: "192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "ubuntu"],
    [{ sshHost: "root@192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "root"],
    [{ sshHost: "root@192.0.2.1", sshUser: "ops" }, "192.0.2.1", ["192.0.2.1"], "ops"],
    [{ sshHost: "root@192.0.2.1", sshUser: " " }, "192.0.2.1", ["192.0.2.1"], "root"],
    [{ sshUser: "ops" }, undefined, [], "ops"],
    [{ tailscaleIp: "192.0.2.1", sshHost: "a@192.0.2.1" }, "192.0.2.1", ["192.0.2.1"], "a"],
    [{ tailscaleIp: "[2001:db8::1]" }, "2001:db8::1", ["2001:db8::1"], "ubuntu"],
  ] as const;
  for (const [fields, bestIp, addresses, sshUser] of cases) {
    const { bestIp: best, addresses: all, sshUser: user } = node(fields);
    assertEquals([best, all, user], [bestIp, [...addresses], sshUser], JSON.stringify(fields));
  }
});

Deno.test("ClusterNode.dataServerBaseUrl is data_server_url, else made of address and port", () => {
  const cases = [
    [{}, undefined],
    [{ tailscaleIp: "100.64.0.1" }, "http://100.64.0.1:8766"],
    [{ tailscaleIp: "100.64.0.1", dataServerPort: 80 }, "http://100.64.0.1"],
    [{ sshHost: "ubuntu@gpu.example.com", dataServerPort: 9001 }, "http://gpu.example.com:9001"],
    [{ tailscaleIp: "2001:db8::1" }, "http://[2001:db8::1]:8766"],
    [{ tailscaleIp: "100.64.0.1", dataServerUrl: "https://gpu.example.com/data/" }, "https://gpu.example.com/data"],
    [{ dataServerUrl: "http://[2001:db8::1]:9000" }, "http://[2001:db8::1]:9000"],
  ] as const;
  for (const [fields, url] of cases) assertEquals(node(fields).dataServerBaseUrl, url);
});

Deno.test("ClusterNode.isActive by status, in any case", () => {
  for (const status of ["active", "ready", "unknown", "proxy_only", ""]) assert(node({ status }).isActive, status);
  for (const status of ["terminated", "offline", "setup", "retired", "archived", "Offline", "RETIRED"]) {
    assert(!node({ status }).isActive, status);
  }
});

/** What the sections may not be. */
const BAD_SECTIONS: Record<string, string[]> = {
  "elo_sync.coordinator": TEXTS,
  "elo_sync.sync_port": PORTS,
  "elo_sync.sync_interval": [...AMOUNTS, "0"],
  "elo_sync.divergence_threshold": AMOUNTS,
  "elo_sync.transports": [SECRET, "7", `{${SECRET}: 1}`, `[${SECRET}, 7]`],
  "distributed.data_server_port": PORTS,
  "distributed.status_path": [SECRET, "7", `"/${SECRET} x"`],
};

for (const [path, values] of Object.entries(BAD_SECTIONS)) {
  Deno.test(`parseHostsConfig() refuses a wrong ${path}`, () => {
    for (const yaml of values) {
      const text = `${path.replace(".", ":\n  ")}: ${yaml}\n`;
      const error: HostsConfigError = assertThrows(() => parseHostsConfig(text), HostsConfigError, "", yaml);
      assertEquals(error.problems.map(({ path, line }) => [path, line]), [[path, 2]], yaml);
      assert(!Deno.inspect(error).includes(SECRET), yaml);
    }
  });
}
