import { assert, assertEquals, assertThrows } from "jsr:@std/assert@^1.0.19";
import {
  ClusterNode,
  type ClusterNodeFields,
  HostsConfigError,
  parseHostsConfig,
} from "../mod.ts";

type Fields = Omit<ClusterNodeFields, "name">;
type FieldName = Exclude<keyof Fields, "entry">;

/** Stands in bad values, and may be in no message. */
const SECRET = "hunter2";

function node(fields: Fields = {}): ClusterNode {
  return new ClusterNode({ name: "gpu-1", ...fields });
}

/** One host of an inventory, with `key: yaml` in its third line. */
function host(key: string, yaml: string): string {
  return `hosts:\n  a:\n    ${key}: ${yaml}\n`;
}

/** Returns the value that the YAML of one field stands for. */
function valueOf(yaml: string): never {
  const { hosts } = parseHostsConfig(host("other", yaml));
  return hosts.a!.other as never;
}

const DEFAULTS = {
  name: "gpu-1",
  tailscaleIp: undefined,
  sshHost: undefined,
  sshUser: "ubuntu",
  sshKey: undefined,
  sshPort: 22,
  sshOptions: [],
  ringriftPath: "~/ringrift/ai-service",
  status: "unknown",
  note: undefined,
  role: "unknown",
  memoryGb: 0,
  cpus: 0,
  gpu: "",
  dataServerPort: 8766,
  dataServerUrl: undefined,
  statusPath: "/status",
};

Deno.test("ClusterNode has the defaults", () => {
  const { entry, ...fields } = node();

  assertEquals(fields, DEFAULTS);
  assertEquals(entry, {});
});

/** The key of every field in an inventory. */
const KEYS: Record<FieldName, string> = {
  tailscaleIp: "tailscale_ip",
  sshHost: "ssh_host",
  sshUser: "ssh_user",
  sshKey: "ssh_key",
  sshPort: "ssh_port",
  sshOptions: "ssh_options",
  ringriftPath: "ringrift_path",
  status: "status",
  note: "note",
  role: "role",
  memoryGb: "memory_gb",
  cpus: "cpus",
  gpu: "gpu",
  dataServerPort: "data_server_port",
  dataServerUrl: "data_server_url",
  statusPath: "status_path",
};

/** What may be written, and what that means. */
const GOOD: [name: FieldName, yaml: string, value: unknown][] = [
  ["tailscaleIp", "100.64.0.1", "100.64.0.1"],
  ["tailscaleIp", '" 100.64.0.1 "', "100.64.0.1"],
  ["tailscaleIp", "2001:db8::1", "2001:db8::1"],
  ["tailscaleIp", '"[2001:db8::1]"', "2001:db8::1"],
  ["tailscaleIp", "gpu-1.tail-net.ts.net", "gpu-1.tail-net.ts.net"],
  ["tailscaleIp", "gpu_1", "gpu_1"],
  // Zones of IPv6.
  ["tailscaleIp", "fe80::1%eth0", "fe80::1%eth0"],
  ["tailscaleIp", '"[fe80::1%eth0.7]"', "fe80::1%eth0.7"],
  ["tailscaleIp", "fe80::1%2", "fe80::1%2"],
  // A name that is not ASCII is used in its ASCII form; an ASCII one stays.
  ["tailscaleIp", "münchen.example", "xn--mnchen-3ya.example"],
  ["tailscaleIp", "bücher.example", "xn--bcher-kva.example"],
  ["tailscaleIp", "GPU-1.Example.com", "GPU-1.Example.com"],
  ["tailscaleIp", "0x7f.1", "0x7f.1"],

  ["sshHost", "gpu.example.com", "gpu.example.com"],
  ["sshHost", "root@192.0.2.1", "root@192.0.2.1"],
  ["sshHost", '" root@192.0.2.1 "', "root@192.0.2.1"],
  ["sshHost", '"root@[2001:db8::1]"', "root@2001:db8::1"],
  ["sshHost", "root@fe80::1%eth0", "root@fe80::1%eth0"],
  ["sshHost", "root@münchen.example", "root@xn--mnchen-3ya.example"],

  ["sshUser", "ops", "ops"],
  ["sshUser", "first.last", "first.last"],
  ["sshUser", '"7"', "7"],
  ["sshKey", "~/.ssh/id_ed25519", "~/.ssh/id_ed25519"],
  ["sshKey", "/keys/a-b_c.pem", "/keys/a-b_c.pem"],
  ["sshPort", "1", 1],
  ["sshPort", "65535", 65535],
  ["sshPort", '"22"', 22],
  ["sshPort", '" 22 "', 22],

  ["sshOptions", "[]", []],
  ["sshOptions", "[ProxyJump=head]", ["ProxyJump=head"]],
  ["sshOptions", '["ProxyJump=me@head:2222"]', ["ProxyJump=me@head:2222"]],
  [
    "sshOptions",
    '["ProxyCommand=cloudflared access ssh --hostname %h", "SendEnv=A B"]',
    ["ProxyCommand=cloudflared access ssh --hostname %h", "SendEnv=A B"],
  ],
  [
    "sshOptions",
    "[StrictHostKeyChecking=accept-new, UserKnownHostsFile=/dev/null]",
    ["StrictHostKeyChecking=accept-new", "UserKnownHostsFile=/dev/null"],
  ],

  ["ringriftPath", "/srv/a b", "/srv/a b"],
  ["ringriftPath", "~/x", "~/x"],
  ["status", "active", "active"],
  ["status", "Offline", "Offline"],
  ["status", "anything at all", "anything at all"],
  [
    "note",
    '"its disk is full: ask Ann (#7)"',
    "its disk is full: ask Ann (#7)",
  ],
  ["note", '"two\\nlines\\tof it"', "two\nlines\tof it"],
  ["role", "gpu_training_primary", "gpu_training_primary"],
  ["memoryGb", "96", 96],
  ["memoryGb", "0.5", 0.5],
  ["memoryGb", '"8"', 8],
  ["memoryGb", "0", 0],
  ["cpus", "72", 72],
  ["cpus", '"8"', 8],
  ["gpu", "RTX 5090", "RTX 5090"],
  ["gpu", "4090", "4090"],
  ["gpu", '"H100"', "H100"],

  ["dataServerPort", "9001", 9001],
  ["dataServerPort", '"9001"', 9001],
  ["dataServerUrl", "http://192.0.2.1", "http://192.0.2.1"],
  ["dataServerUrl", "http://192.0.2.1/", "http://192.0.2.1"],
  ["dataServerUrl", "https://gpu.example/data/", "https://gpu.example/data"],
  ["dataServerUrl", "HTTP://GPU.example:80/data", "http://gpu.example/data"],
  ["dataServerUrl", "https://gpu.example:443", "https://gpu.example"],
  ["dataServerUrl", "http://192.0.2.1/data//", "http://192.0.2.1/data"],
  ["dataServerUrl", '"http://[2001:db8::1]:9000"', "http://[2001:db8::1]:9000"],
  ["statusPath", "/health", "/health"],
  ["statusPath", "/a/b?full=1", "/a/b?full=1"],
  ["statusPath", "/", "/"],
];

for (const [name, yaml, value] of GOOD) {
  const key = KEYS[name];

  Deno.test(`ClusterNode accepts ${key}: ${yaml}`, () => {
    parseHostsConfig(host(key, yaml));
    assertEquals(node({ [name]: valueOf(yaml) })[name], value);
  });
}

Deno.test("parseHostsConfig() accepts a note of several lines as a block of text", () => {
  const { hosts } = parseHostsConfig(host("note", "|\n      a\n      b"));
  assertEquals(hosts.a!.note, "a\nb\n");
});

for (const [name, key] of Object.entries(KEYS)) {
  Deno.test(`ClusterNode counts a blank or a placeholder as unset: ${key}`, () => {
    const blanks = [undefined, null, "", " \t"];
    const placeholders = ["<to-be-set>", " root@<public-ip> "];

    for (const value of [...blanks, ...placeholders]) {
      const { entry: _, ...fields } = node({ [name]: value });
      assertEquals(fields, DEFAULTS, JSON.stringify(value));
    }
  });
}

Deno.test("ClusterNode keeps the host's mapping as written in its entry", () => {
  const entry = { rack: 7, ssh_port: "22" };
  assertEquals(node({ entry }).entry, entry);
});

const PORTS = [
  ...["0", "65536", "-1", "22.5", `"${SECRET}"`, ".inf", "-.inf", ".nan"],
  ...['"22 23"', '"0x16"', '"1e3"', '"22.0"', '"022"', '"1_000"'],
  ...["true", "[22]", "{}"],
];

const NOT_TEXTS = ["7", "true", `[${SECRET}]`, `{${SECRET}: 1}`];
const ESCAPES = [`"${SECRET}\\e"`, `"${SECRET}\\x9b"`, `"${SECRET}\\0"`];
const TEXTS = [...NOT_TEXTS, ...ESCAPES, `"a\\n${SECRET}"`];
const AMOUNTS = ["-1", ".inf", ".nan", SECRET, "true", "[]", "{}"];

/** What ssh or a shell could take for something else. */
const METACHARACTERS = [
  ...["-oX", "a b", "a\\tb", "a;b", "a|b", "a&b", "$(b)", "${b}", "`b`"],
  ...["a'b", 'a\\"b', "a<b", "a>b", "a*", "a?b", "a#b", "a%b", "a\\\\b"],
  ...["a(b", "a[b", "a{b", "a!b", "a^b"],
].map((text) => `"${text}${SECRET}"`);

/** What cannot be seen. */
const INVISIBLE = ["200b", "202e", "2066", "00ad", "061c", "feff"]
  .map((code) => `"a\\u${code}${SECRET}"`);

const WORDS = [...TEXTS, ...METACHARACTERS, ...INVISIBLE];

/** What a field may not be. */
const BAD: Record<FieldName, string[]> = {
  tailscaleIp: [
    ...WORDS,
    ...["100.64.0.999", "1.2.3", "1.2.3.4.5", `${SECRET}@x`, `${SECRET}/x`],
    ...[`"a:${SECRET}"`, `"::${SECRET}"`, `"${SECRET},x"`, "1::2::3", '"[]"'],
    ...[`${SECRET}:22`, '"fe80::1%"', '"fe80::1%a b"', '"fe80::1%-oX"'],
    ...["192.0.2.1%eth0", '"fe80::1%$(id)"', `"münchen ${SECRET}"`],
  ],
  sshHost: [
    ...WORDS,
    ...[`"-x@${SECRET}"`, `"a b@${SECRET}"`, `"${SECRET}@"`, `"@${SECRET}"`],
    ...[`ssh://${SECRET}`, `root@${SECRET}:2222`, `"[::1]:2222"`],
  ],
  sshUser: [...WORDS, `"${SECRET}@x"`, `"${SECRET}:x"`, `"${SECRET}/x"`],
  sshKey: WORDS,
  sshPort: PORTS,
  sshOptions: [
    ...[SECRET, "7", "{}", "[7]", "[[]]", '[""]', `[${SECRET}]`],
    ...[`["=${SECRET}"]`, '["Port="]', `["-oPort=${SECRET}"]`],
    ...[`["A B=${SECRET}"]`, `["A=${SECRET}\\e"]`, `["A=a\\n${SECRET}"]`],
    ...[`["Include=${SECRET}"]`, `["Match=exec ${SECRET}"]`],
    ...[`["ProxyJump=-oX${SECRET}"]`, `["ProxyJump=a b${SECRET}"]`],
    ...[`["HostName=-x${SECRET}"]`, `["User=$(${SECRET})"]`],
  ],
  ringriftPath: TEXTS,
  status: TEXTS,
  note: [...NOT_TEXTS, ...ESCAPES],
  role: TEXTS,
  memoryGb: AMOUNTS,
  cpus: AMOUNTS,
  gpu: ["true", ".nan", "[]", "{}", `"${SECRET}\\e"`],
  dataServerPort: PORTS,
  dataServerUrl: [
    ...TEXTS,
    ...[SECRET, `ftp://${SECRET}`, "http://", `"http://x/${SECRET} y"`],
    ...[`"http://${SECRET}:0"`, `http://me:${SECRET}@x`, `http://${SECRET}@x`],
    ...[
      `http://:${SECRET}@x`,
      `http://x/?key=${SECRET}`,
      `"http://x/#${SECRET}"`,
    ],
    ...["http://x?"],
    ...["'", "`", "<", ">", "\\\\", '\\"']
      .map((mark) => `"http://x/${SECRET}${mark}"`),
  ],
  statusPath: [
    ...TEXTS,
    ...[SECRET, `http://x/${SECRET}`, `"/${SECRET} x"`, `"/ä${SECRET}"`],
    ...[`"/#${SECRET}"`],
  ],
};

for (const [name, values] of Object.entries(BAD) as [FieldName, string[]][]) {
  const key = KEYS[name];

  for (const yaml of values) {
    Deno.test(`ClusterNode rejects ${key}: ${yaml}`, () => {
      const refused: HostsConfigError = assertThrows(
        () => parseHostsConfig(host(key, yaml)),
        HostsConfigError,
      );
      const [problem, ...more] = refused.problems;
      assertEquals(more, []);
      assertEquals(problem?.path, `hosts.a.${key}`);
      assertEquals(problem?.line, 3);

      const { message } = problem!;
      assert(message.length > 10 && !message.includes("\n"), message);

      // The same value in a script.
      const thrown: TypeError = assertThrows(
        () => node({ [name]: valueOf(yaml) }),
        TypeError,
      );
      const expected = `Cannot make node "gpu-1": ${name}: ${message}`;
      assertEquals(thrown.message, expected);

      const shown = Deno.inspect([refused, thrown]);
      assert(!shown.includes(SECRET), "the value is shown");
    });
  }
}

/** What is wrong with a field, in words that say how to mend it. */
const ADVICE: [key: string, yaml: string, advice: RegExp][] = [
  ["ssh_host", "root@gpu1:2222", /put the port in ssh_port/],
  ["ssh_host", '"root@[::1]:2222"', /put the port in ssh_port/],
  ["tailscale_ip", "gpu1:2222", /put the port in its own field/],
  ["role", "[a, b]", /put it in quotes/],
  ["role", "7", /put it in quotes/],
  ["status", "true", /put it in quotes/],
  ["ssh_port", '"022"', /leading zero/],
  ["ssh_options", "ProxyJump=head", /list of KEY=VALUE/],
  ["ssh_options", "[ProxyJump]", /KEY=VALUE, as in ssh_config\(5\)/],
];

for (const [key, yaml, advice] of ADVICE) {
  Deno.test(`parseHostsConfig() says how to mend ${key}: ${yaml}`, () => {
    const error: HostsConfigError = assertThrows(
      () => parseHostsConfig(host(key, yaml)),
      HostsConfigError,
    );
    assert(advice.test(error.message), error.message);
  });
}

Deno.test("ClusterNode lists in one TypeError everything that is wrong", () => {
  const fields = {
    sshPort: 0,
    tailscaleIp: "a b",
    cpus: -1,
    statusPath: "health",
  };
  const { message }: TypeError = assertThrows(() => node(fields), TypeError);

  const [start, list] = message.split(/(?<=": )/, 2);
  assertEquals(start, 'Cannot make node "gpu-1": ');

  const named = list!.split("; ").map((it) => it.split(":", 1)[0]);
  assertEquals(named, ["tailscaleIp", "sshPort", "cpus", "statusPath"]);
});

/** Not a name, or one that could not be selected. */
const BAD_NAMES = [
  ...["", "  ", "a\nb", "a\x1b[31m", "a\x9b"],
  ...["a,b", "a[1]", "a]", "[", "a*", "a?", " a", "a ", "\ta"],
  ...[undefined, null, 7],
];

for (const name of BAD_NAMES) {
  Deno.test(`ClusterNode rejects the name ${JSON.stringify(name)}`, () => {
    const bad = name as string;
    assertThrows(() => new ClusterNode({ name: bad }), TypeError, "name");
  });
}

for (const name of ["__proto__", "a b", "gpu-1", "节点", "n.dc1", "a/b"]) {
  Deno.test(`ClusterNode accepts the name ${name}`, () => {
    assertEquals(new ClusterNode({ name }).name, name);
  });
}

interface AddressRow {
  readonly fields: Fields;
  readonly addresses: string[];
  readonly sshUser: string;
}

const ADDRESSES: AddressRow[] = [
  { fields: {}, addresses: [], sshUser: "ubuntu" },
  { fields: { sshUser: "ops" }, addresses: [], sshUser: "ops" },
  {
    fields: { tailscaleIp: "100.64.0.1", sshHost: "192.0.2.1" },
    addresses: ["100.64.0.1", "192.0.2.1"],
    sshUser: "ubuntu",
  },
  {
    fields: { tailscaleIp: "  ", sshHost: "192.0.2.1" },
    addresses: ["192.0.2.1"],
    sshUser: "ubuntu",
  },
  {
    fields: { sshHost: "root@192.0.2.1" },
    addresses: ["192.0.2.1"],
    sshUser: "root",
  },
  {
    fields: { sshHost: "root@192.0.2.1", sshUser: "ops" },
    addresses: ["192.0.2.1"],
    sshUser: "ops",
  },
  {
    fields: { sshHost: "root@192.0.2.1", sshUser: " " },
    addresses: ["192.0.2.1"],
    sshUser: "root",
  },
  {
    fields: { tailscaleIp: "192.0.2.1", sshHost: "a@192.0.2.1" },
    addresses: ["192.0.2.1"],
    sshUser: "a",
  },
  {
    fields: { tailscaleIp: "[2001:db8::1]" },
    addresses: ["2001:db8::1"],
    sshUser: "ubuntu",
  },
  {
    fields: { sshHost: "root@fe80::1%eth0" },
    addresses: ["fe80::1%eth0"],
    sshUser: "root",
  },
];

for (const { fields, addresses, sshUser } of ADDRESSES) {
  const given = JSON.stringify(fields);

  Deno.test(`ClusterNode has addresses and a user: ${given}`, () => {
    const made = node(fields);

    assertEquals(made.addresses, addresses);
    assertEquals(made.bestIp, addresses[0]);
    assertEquals(made.sshUser, sshUser);
  });
}

const BASE_URLS: [fields: Fields, url: string | undefined][] = [
  [{}, undefined],
  [{ tailscaleIp: "100.64.0.1" }, "http://100.64.0.1:8766"],
  [{ tailscaleIp: "100.64.0.1", dataServerPort: 80 }, "http://100.64.0.1"],
  [{ sshHost: "root@gpu.example", dataServerPort: 1 }, "http://gpu.example:1"],
  [{ tailscaleIp: "2001:db8::1" }, "http://[2001:db8::1]:8766"],
  [{ tailscaleIp: "fe80::1%eth0" }, "http://[fe80::1%25eth0]:8766"],
  [{ tailscaleIp: "100.64.0.1", dataServerUrl: "https://x/d/" }, "https://x/d"],
  [{ dataServerUrl: "http://[2001:db8::1]:9" }, "http://[2001:db8::1]:9"],
];

for (const [fields, url] of BASE_URLS) {
  const given = JSON.stringify(fields);

  Deno.test(`ClusterNode.dataServerBaseUrl of ${given} is ${url}`, () => {
    assertEquals(node(fields).dataServerBaseUrl, url);
  });
}

Deno.test("ClusterNode.isActive is true for any status but five, in any case", () => {
  for (const status of ["active", "ready", "unknown", "proxy_only", ""]) {
    assert(node({ status }).isActive, status);
  }

  const inactive = ["terminated", "offline", "setup", "retired", "archived"];
  for (const status of [...inactive, "Offline", "RETIRED"]) {
    assert(!node({ status }).isActive, status);
  }
});

/** A node made of another one takes the user of its own host. */
const COPIES: [of: Fields, change: Fields, user: string][] = [
  [{}, { sshHost: "root@192.0.2.2" }, "root"],
  [{ sshHost: "a@192.0.2.1" }, { sshHost: "root@192.0.2.2" }, "root"],
  [{ sshHost: "a@192.0.2.1" }, { sshHost: "192.0.2.2" }, "ubuntu"],
  [{ sshHost: "a@192.0.2.1" }, { sshPort: 2222 }, "a"],
  [{ sshUser: "ops" }, { sshHost: "root@192.0.2.2" }, "ops"],
  [{ sshUser: "ubuntu" }, { sshHost: "root@192.0.2.2" }, "ubuntu"],
  [{ sshHost: "a@192.0.2.1" }, { sshUser: "b" }, "b"],
];

for (const [of, change, user] of COPIES) {
  const given = `${JSON.stringify(of)} with ${JSON.stringify(change)}`;

  Deno.test(`ClusterNode made of ${given} has the user ${user}`, () => {
    assertEquals(node({ ...node(of), ...change }).sshUser, user);
  });
}

/** What the sections may not be. */
const BAD_SECTIONS: Record<string, string[]> = {
  "elo_sync.coordinator": TEXTS,
  "elo_sync.sync_port": PORTS,
  "elo_sync.sync_interval": [...AMOUNTS, "0"],
  "elo_sync.divergence_threshold": AMOUNTS,
  "elo_sync.transports": [SECRET, "7", `{${SECRET}: 1}`, `[${SECRET}, 7]`],
  "distributed.data_server_port": PORTS,
};

for (const [path, values] of Object.entries(BAD_SECTIONS)) {
  for (const yaml of values) {
    Deno.test(`parseHostsConfig() rejects ${path}: ${yaml}`, () => {
      const text = `${path.replace(".", ":\n  ")}: ${yaml}\n`;
      const error: HostsConfigError = assertThrows(
        () => parseHostsConfig(text),
        HostsConfigError,
      );

      const [problem, ...more] = error.problems;
      assertEquals(more, []);
      assertEquals(problem?.path, path);
      assertEquals(problem?.line, 2);
      assert(!Deno.inspect(error).includes(SECRET), "the value is shown");
    });
  }
}
