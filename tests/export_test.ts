import {
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "jsr:@std/assert@^1.0.19";
import { hostAt, type Hosts, runOnHosts, runOnYaml } from "./cluster.ts";
import {
  denoRun,
  programMissing,
  run,
  tempFolder,
  testUnless,
  writeInventory,
} from "./process.ts";
import { runMain } from "./run_main.ts";

const HOSTS: Hosts = {
  "gpu-1": hostAt({ port: 48_761 }, {
    ssh_host: "root@127.0.0.2",
    gpu: "RTX 5090",
    role: "gpu-worker",
    rack: [{ row: 7 }],
  }),
  "gpu-2": hostAt({ port: 48_762, hostname: "::1" }, {
    gpu: 4090,
    ssh_key: "~/.ssh/id_gpu",
    ssh_port: 2222,
    role: "gpu-worker",
  }),
  // A port other than 22 is the one of a proxy in front of ssh_host.
  "proxied": hostAt({ port: 48_763 }, {
    ssh_host: "ops@127.0.0.3",
    ssh_port: 41_022,
    ssh_options: ["ProxyJump=head", "StrictHostKeyChecking=accept-new"],
    role: "gpu-worker",
    status_path: "/health",
  }),
  "head": { ssh_host: "localhost", status: "ready", role: "coordinator" },
  "homeless": { data_server_url: "https://127.0.0.5/x/", status: "active" },
  "nowhere": { status: "active" },
  "old": { tailscale_ip: "127.0.0.9", status: "retired" },
};

const sshMissing = programMissing("ssh");
const ansibleMissing = programMissing("ansible-inventory");
const promtoolMissing = programMissing("promtool");

// --- ssh-config ---

/** Writes an ssh-config of these hosts, and asks ssh what it makes of a name. */
async function sshSettings(hosts: Hosts, names: readonly string[]) {
  await using temp = await tempFolder();
  const path = `${temp.folder}/config`;
  const { stdout } = await runOnHosts(hosts, ["export", "ssh-config"]);
  await Deno.writeTextFile(path, stdout);

  const settings: Record<string, string>[] = [];
  for (const name of names) {
    const args = ["-T", "-G", "-F", path, "--", name];
    const { code, stdout, stderr } = await run("ssh", args);
    assertEquals([code, stderr], [0, ""], name);
    const lines = stdout.split("\n").map((line) => line.split(" ", 2));
    settings.push(Object.fromEntries(lines));
  }
  return settings;
}

const SSH_SETTINGS: readonly (readonly [
  name: string,
  settings: Record<string, string>,
])[] = [
  ["gpu-1", { hostname: "127.0.0.1", user: "root", port: "22" }],
  ["gpu-2", {
    hostname: "::1",
    user: "ubuntu",
    port: "2222",
    identityfile: "~/.ssh/id_gpu",
    identitiesonly: "yes",
  }],
  ["proxied", {
    hostname: "127.0.0.3",
    user: "ops",
    port: "41022",
    proxyjump: "head",
    stricthostkeychecking: "accept-new",
  }],
  ["head", { hostname: "localhost", user: "ubuntu", port: "22" }],
  // It was left out.
  ["old", { hostname: "old" }],
];

for (const [name, settings] of SSH_SETTINGS) {
  testUnless(
    sshMissing,
    `ssh -G reads the settings of ${name} that export ssh-config prints`,
    async () => {
      const [read = {}] = await sshSettings(HOSTS, [name]);

      for (const [key, value] of Object.entries(settings)) {
        assertEquals(read[key], value, key);
      }
    },
  );
}

testUnless(
  sshMissing,
  "ssh -G finds odd names in what export ssh-config prints",
  async () => {
    const names = ["=equal", "a=b", "ü", "n.dc1", "10", "%h"];
    const entry = { tailscale_ip: "127.0.0.1" };
    const hosts = Object.fromEntries(names.map((name) => [name, entry]));

    const settings = await sshSettings(hosts, names);

    for (const { hostname } of settings) assertEquals(hostname, "127.0.0.1");
  },
);

testUnless(
  sshMissing,
  "ssh -G reads the zone of an IPv6 address that export ssh-config prints",
  async () => {
    const hosts = { a: { tailscale_ip: "fe80::1%lo" } };

    const [settings] = await sshSettings(hosts, ["a"]);

    assertEquals(settings?.hostname, "fe80::1%lo");
  },
);

Deno.test("cluster-hosts export ssh-config prints a comment for a node without an address", async () => {
  const result = await runOnHosts(HOSTS, ["export", "ssh-config"]);

  assertEquals([result.code, result.stderr], [0, ""]);
  assertStringIncludes(result.stdout, "# homeless: no address\n");
});

const MISREAD = [
  "!gpu",
  "#gpu",
  'a"b',
  "a b",
  "it's",
  "back\\slash",
  "a;b",
  "$a",
  "(a)",
  "-a",
  "~a",
  "root@a",
  "a:22",
];

for (const name of MISREAD) {
  for (const kind of ["ansible", "prometheus", "ssh-config"]) {
    Deno.test(`cluster-hosts export ${kind} rejects the name ${name}, and prints nothing`, async () => {
      const hosts = { [name]: hostAt({ port: 1 }), ok: hostAt({ port: 2 }) };

      const result = await runOnHosts(hosts, ["export", kind]);

      assertEquals([result.code, result.stdout], [2, ""]);
      assertStringIncludes(result.stderr, JSON.stringify(name));
      assertStringIncludes(result.stderr, "--exclude");
    });
  }
}

// --- prometheus ---

Deno.test("cluster-hosts export prometheus prints the URL that status checks", async () => {
  const result = await runOnHosts(HOSTS, ["export", "prometheus"]);

  const stderr = "cluster-hosts: nowhere: left out (no address)\n";
  assertEquals([result.code, result.stderr], [0, stderr]);
  const targets = JSON.parse(result.stdout);
  assertEquals(targets[0], {
    targets: ["127.0.0.1:48761"],
    labels: {
      node: "gpu-1",
      role: "gpu-worker",
      status: "active",
      gpu: "RTX 5090",
      __param_target: "http://127.0.0.1:48761/status",
    },
  });
  const urls = targets.map(
    ({ labels }: { labels: Record<string, string> }) => labels.__param_target,
  );
  assertEquals(urls, [
    "http://127.0.0.1:48761/status",
    "http://[::1]:48762/status",
    "http://127.0.0.1:48763/health",
    "http://localhost:8766/status",
    "https://127.0.0.5/x/status",
  ]);
});

Deno.test("cluster-hosts export prometheus --port --path prints these instead", async () => {
  const options = ["--port", "9100", "--path", "/m"];
  const args = ["export", "prometheus", "gpu-[1-2]", ...options];

  const { stdout } = await runOnHosts(HOSTS, args);

  const urls = JSON.parse(stdout).map(
    ({ labels }: { labels: Record<string, string> }) => labels.__param_target,
  );
  assertEquals(urls, ["http://127.0.0.1:9100/m", "http://[::1]:9100/m"]);
});

testUnless(
  promtoolMissing,
  "promtool accepts what export prometheus prints",
  async () => {
    await using temp = await tempFolder();
    const { stdout } = await runOnHosts(HOSTS, ["export", "prometheus"]);
    const config = `${temp.folder}/prometheus.yml`;
    const yaml = "scrape_configs: [{ job_name: nodes, " +
      "file_sd_configs: [{ files: [targets.json] }] }]\n";
    await Deno.writeTextFile(config, yaml);

    // It does read the targets: broken ones fail.
    const broken = stdout.replace('"targets"', '"target"');
    for (const [targets, expected] of [[stdout, 0], [broken, 1]] as const) {
      await Deno.writeTextFile(`${temp.folder}/targets.json`, targets);
      const { code, stderr } = await run("promtool", [
        "check",
        "config",
        config,
      ]);
      assertEquals(code, expected, stderr);
    }
  },
);

// --- ansible ---

Deno.test("cluster-hosts export ansible prints the variables of each node, its own keys kept", async () => {
  const { code, stdout } = await runOnHosts(HOSTS, ["export", "ansible"]);

  assertEquals(code, 0);
  const { _meta: { hostvars } } = JSON.parse(stdout);
  assertEquals(Object.keys(hostvars), [
    "gpu-1",
    "gpu-2",
    "proxied",
    "head",
    "homeless",
    "nowhere",
  ]);
  assertEquals(hostvars["gpu-1"], {
    ansible_host: "127.0.0.1",
    ansible_user: "root",
    ansible_port: 22,
    ...HOSTS["gpu-1"],
  });
  const { "gpu-2": gpu2, proxied } = hostvars;
  assertEquals([gpu2.ansible_host, gpu2.ansible_port], ["::1", 2222]);
  assertEquals(gpu2.ansible_ssh_private_key_file, "~/.ssh/id_gpu");
  assertEquals(gpu2.ansible_ssh_common_args, "-o IdentitiesOnly=yes");
  assertEquals(
    [proxied.ansible_host, proxied.ansible_port, proxied.ansible_user],
    ["127.0.0.3", 41_022, "ops"],
  );
  assertEquals(
    proxied.ansible_ssh_common_args,
    "-o ProxyJump=head -o StrictHostKeyChecking=accept-new",
  );
});

Deno.test("cluster-hosts export ansible groups the nodes by role, status and GPU", async () => {
  const { stdout } = await runOnHosts(HOSTS, ["export", "ansible"]);

  const { _meta, all, ...groups } = JSON.parse(stdout);
  const expected = ["ungrouped", ...Object.keys(groups)].toSorted();
  assertEquals(all.children.toSorted(), expected);
  assertEquals(groups, {
    role_gpu_worker: { hosts: ["gpu-1", "gpu-2", "proxied"] },
    status_active: {
      hosts: ["gpu-1", "gpu-2", "proxied", "homeless", "nowhere"],
    },
    gpu_RTX_5090: { hosts: ["gpu-1"] },
    gpu_4090: { hosts: ["gpu-2"] },
    role_coordinator: { hosts: ["head"] },
    status_ready: { hosts: ["head"] },
    role_unknown: { hosts: ["homeless", "nowhere"] },
  });
});

Deno.test("cluster-hosts export ansible rejects two roles that would be one group", async () => {
  const hosts = {
    a: hostAt({ port: 1 }, { role: "gpu worker" }),
    b: hostAt({ port: 2 }, { role: "gpu-worker" }),
  };

  const { code, stdout, stderr } = await runOnHosts(hosts, [
    "export",
    "ansible",
  ]);

  assertEquals([code, stdout], [2, ""]);
  assertMatch(stderr, /"gpu worker".*"gpu-worker".*role_gpu_worker\n$/);
});

for (const name of ["all", "ungrouped", "role_worker"]) {
  Deno.test(`cluster-hosts export ansible rejects a node that has the same name as the group ${name}`, async () => {
    const hosts = { [name]: hostAt({ port: 1 }, { role: "worker" }) };

    const result = await runOnHosts(hosts, ["export", "ansible"]);

    assertEquals([result.code, result.stdout], [2, ""]);
    assertStringIncludes(
      result.stderr,
      `the node ${name} has the same name as a group`,
    );
  });
}

Deno.test("cluster-hosts export ansible marks every template of an inventory as text", async () => {
  const templates = ["{{ lookup('pipe', 'id') }}", "{% if x %}", "{# x #}"];
  const hosts = {
    a: hostAt({ port: 1 }, {
      note: templates[0],
      deep: [{ own: templates[1] }],
      gpu: templates[2],
      plain: "no { template }",
    }),
  };

  const { stdout } = await runOnHosts(hosts, ["export", "ansible"]);

  const { a } = JSON.parse(stdout)._meta.hostvars;
  assertEquals(a.note, { __ansible_unsafe: templates[0] });
  assertEquals(a.deep, [{ own: { __ansible_unsafe: templates[1] } }]);
  assertEquals(a.gpu, { __ansible_unsafe: templates[2] });
  assertEquals(a.plain, "no { template }");
});

/** Writes the script of two lines that Ansible asks for its inventory. */
async function writeScript(path: string, config: string): Promise<void> {
  const command = ["deno", ...denoRun(["-P=cli"], "cli.ts")].join(" ");
  const script = `#!/bin/sh\nexec ${command} export ansible -c ${config}\n`;
  await Deno.writeTextFile(path, script, { mode: 0o755 });
}

testUnless(
  ansibleMissing,
  "ansible-inventory reads what a script with export ansible prints",
  async () => {
    await using inventory = await writeInventory(HOSTS);
    const script = `${inventory.folder}/inventory`;
    await writeScript(script, inventory.path);
    const env = {
      LC_ALL: "C.UTF-8",
      ANSIBLE_LOCAL_TEMP: inventory.folder,
    };

    const args = ["-i", script, "--list"];
    const { code, stdout, stderr } = await run("ansible-inventory", args, {
      env,
    });

    assertEquals([code, stderr], [0, ""]);
    const { _meta: { hostvars }, role_gpu_worker } = JSON.parse(stdout);
    assertEquals(hostvars["gpu-1"].ansible_host, "127.0.0.1");
    assertEquals(hostvars["gpu-1"].rack, [{ row: 7 }]);
    assertEquals(role_gpu_worker, { hosts: ["gpu-1", "gpu-2", "proxied"] });
  },
);

testUnless(
  ansibleMissing,
  "ansible runs no template that an inventory holds",
  async () => {
    await using inventory = await writeInventory({});
    const ran = `${inventory.folder}/ran`;
    const hosts = {
      a: hostAt({ port: 1 }, { own: `{{ lookup('pipe', 'touch ${ran}') }}` }),
    };
    await Deno.writeTextFile(inventory.path, JSON.stringify({ hosts }));
    const script = `${inventory.folder}/inventory`;
    await writeScript(script, inventory.path);

    const command = `ansible -i ${script} a -c local -m debug -a var=own`;
    const { stdout, stderr } = await run("sh", ["-c", command], {
      env: { LC_ALL: "C.UTF-8", ANSIBLE_LOCAL_TEMP: inventory.folder },
    });

    assertStringIncludes(stdout, "lookup('pipe'", stderr);
    const files = Array.from(Deno.readDirSync(inventory.folder), ({ name }) => {
      return name;
    });
    assertEquals(files.includes("ran"), false);
  },
);

// --- An inventory of forty nodes in fifty lines ---

const FORTY = `# Forty nodes behind a jump host, in fifty lines.
defaults:
  ssh_user: trainer
  ssh_key: ~/.ssh/id_cluster
  ssh_port: 2222
  ssh_options: [ProxyJump=head, StrictHostKeyChecking=accept-new]
  role: worker
  status: active
  data_server_port: 9100
hosts:
  head: { tailscale_ip: 127.0.1.1, role: head, ssh_port: 22, ssh_options: [] }
${
  Array.from({ length: 39 }, (_, index) => {
    const number = index + 1;
    return `  gpu-${number}: { tailscale_ip: 127.0.2.${number} }`;
  }).join("\n")
}
`;

Deno.test("cluster-hosts nodes --json gives forty nodes of fifty lines what they inherit", async () => {
  assertEquals(FORTY.trimEnd().split("\n").length, 50);

  const { code, stdout } = await runOnYaml(FORTY, ["nodes", "--json"]);

  assertEquals(code, 0);
  const { nodes } = JSON.parse(stdout);
  assertEquals(nodes.length, 40);
  for (const node of nodes) {
    const isHead = node.name === "head";
    const { sshUser, sshKey, sshPort, role, dataServerPort } = node;
    assertEquals(
      { sshUser, sshKey, sshPort, role, dataServerPort },
      {
        sshUser: "trainer",
        sshKey: "~/.ssh/id_cluster",
        sshPort: isHead ? 22 : 2222,
        role: isHead ? "head" : "worker",
        dataServerPort: 9100,
      },
      node.name,
    );
  }
});

/** Every command on the forty nodes; none of them is up. */
const FORTY_LINES: readonly (readonly [line: string, code: number])[] = [
  ["status -t 300ms", 1],
  ["status --ssh -t 300ms", 1],
  ["nodes", 0],
  ["urls data --unchecked --include-self", 0],
  ["urls elo --unchecked", 0],
  ["wait -t 300ms", 1],
  ["validate --strict", 0],
  ["export ansible", 0],
  ["export prometheus", 0],
  ["export ssh-config", 0],
  ["permissions status", 0],
  ["ssh * --dry-run -- true", 0],
];

for (const [line, code] of FORTY_LINES) {
  Deno.test(`cluster-hosts ${line} returns ${code} on forty nodes with defaults`, async () => {
    const result = await runOnYaml(FORTY, line.split(" "));

    assertEquals(result.code, code, result.stdout + result.stderr);
  });
}

testUnless(
  sshMissing,
  "ssh -G reads what forty nodes inherit from export ssh-config",
  async () => {
    await using temp = await tempFolder();
    const path = `${temp.folder}/config`;
    const { stdout } = await runOnYaml(FORTY, ["export", "ssh-config"]);
    await Deno.writeTextFile(path, stdout);

    for (const name of ["gpu-1", "gpu-39"]) {
      const result = await run("ssh", ["-T", "-G", "-F", path, "--", name]);
      const lines = result.stdout.split("\n");
      const wanted = [
        "user trainer",
        "port 2222",
        "proxyjump head",
        "identityfile ~/.ssh/id_cluster",
        "identitiesonly yes",
        "stricthostkeychecking accept-new",
      ];
      for (const line of wanted) assertEquals(lines.includes(line), true, line);
    }
  },
);

testUnless(
  ansibleMissing,
  "ansible-inventory reads what forty nodes inherit from export ansible",
  async () => {
    await using temp = await tempFolder();
    const config = `${temp.folder}/hosts.yaml`;
    const script = `${temp.folder}/inventory`;
    await Deno.writeTextFile(config, FORTY);
    await writeScript(script, config);

    const args = ["-i", script, "--host", "gpu-39"];
    const { code, stdout, stderr } = await run("ansible-inventory", args, {
      env: { LC_ALL: "C.UTF-8", ANSIBLE_LOCAL_TEMP: temp.folder },
    });

    assertEquals([code, stderr], [0, ""]);
    const variables = JSON.parse(stdout);
    assertEquals(variables.ansible_host, "127.0.2.39");
    assertEquals(variables.ansible_user, "trainer");
    assertEquals(variables.ansible_port, 2222);
    assertEquals(variables.ansible_ssh_private_key_file, "~/.ssh/id_cluster");
    assertStringIncludes(variables.ansible_ssh_common_args, "ProxyJump=head");
  },
);

testUnless(
  promtoolMissing,
  "promtool accepts forty nodes from export prometheus",
  async () => {
    await using temp = await tempFolder();
    const { stdout } = await runOnYaml(FORTY, ["export", "prometheus"]);
    const config = `${temp.folder}/prometheus.yml`;
    const yaml = "scrape_configs: [{ job_name: nodes, " +
      "file_sd_configs: [{ files: [targets.json] }] }]\n";
    await Deno.writeTextFile(config, yaml);
    await Deno.writeTextFile(`${temp.folder}/targets.json`, stdout);

    const { code, stderr } = await run("promtool", ["check", "config", config]);

    assertEquals([code, JSON.parse(stdout).length], [0, 40], stderr);
  },
);

Deno.test("cluster-hosts export prints nothing where there is no inventory, so that `export > file` is seen to fail", async () => {
  const missing = "/tmp/no-such-folder/hosts.yaml";

  const result = await runMain(["export", "ansible", "-c", missing]);

  assertEquals([result.code, result.stdout], [2, ""]);
});
