import { assert, assertEquals, assertMatch, assertRejects } from "jsr:@std/assert@^1.0.19";
import { type ConfigSource, HostsConfigError, loadHostsConfig, type LoadOptions, readHostsConfig } from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { unusedPort } from "./loopback_cluster.ts";
import { programMissing, ROOT, run, tempFolder, testUnless, writeInventory } from "./process.ts";

const INVENTORY = "hosts: { gpu-1: {} }\n";

/** What the error says beside the place, which it begins with. */
async function faultOf(source: ConfigSource, options: LoadOptions = {}): Promise<string> {
  const error: HostsConfigError = await assertRejects(() => loadHostsConfig(source, options), HostsConfigError);
  assertEquals(error.problems.map(({ path }) => path), [""]);
  assertEquals(error.message, `${source}: ${error.problems[0]!.message}`);
  return error.problems[0]!.message;
}

Deno.test("loadHostsConfig() takes what is named, then the variable, then the default path", async () => {
  await using named = await writeInventory({ named: {} });
  await using variable = await writeInventory({ variable: {} });
  const outcomes = await evaluate(`
    const [named, variable, folder] = ${JSON.stringify([named.path, variable.path, named.folder])};
    const none = folder + "/none.yaml";
    const load = (source, value) => withVariable("RINGRIFT_HOSTS_CONFIG", value, async () =>
      Object.keys((await api.loadHostsConfig(source)).hosts).join());
    Deno.chdir(folder);
    const outcomes = {
      named: await load(named, variable),
      url: await load("file://" + named, variable),
      variable: await load(undefined, variable),
      "variable, trimmed": await load(undefined, " " + variable + " "),
      "missing default": await load(undefined),
      exists: (await api.readHostsConfig()).exists,
    };
    Deno.mkdirSync("config");
    Deno.writeTextFileSync("config/distributed_hosts.yaml", "hosts: { default: {} }");
    Object.assign(outcomes, {
      default: await load(undefined),
      "blank variable": await load(undefined, " "),
      "missing file": await load(none),
      "missing file of the variable": await load(undefined, none),
    });
    console.log(JSON.stringify(outcomes));
  `);
  const none = `${named.folder}/none.yaml`;
  assertEquals(outcomes, {
    named: "named",
    url: "named",
    variable: "variable",
    "variable, trimmed": "variable",
    "missing default": "",
    exists: false,
    default: "default",
    "blank variable": "default",
    "missing file": `${none}: there is no such file`,
    "missing file of the variable": `${none}: there is no such file (RINGRIFT_HOSTS_CONFIG names it)`,
  });
});

Deno.test("loadHostsConfig() takes a path, a file: URL as text or as a URL, an empty file and an object", async () => {
  await using file = await writeInventory({ "gpu-1": {} });
  const config = await loadHostsConfig(file.path);
  for (const source of [file.path, `file://${file.path}`, new URL(`file://${file.path}`), config, { ...config }]) {
    assertEquals((await loadHostsConfig(source)).hosts, { "gpu-1": {} }, String(source));
  }
  assertEquals(await loadHostsConfig(config), config);
  await Deno.writeTextFile(file.path, "");
  assertEquals((await loadHostsConfig(file.path)).hosts, {});
});

Deno.test("readHostsConfig() gives the text and its origin", async () => {
  await using file = await writeInventory({});
  await Deno.writeTextFile(file.path, "# nothing yet\n");
  assertEquals(await readHostsConfig(file.path), { text: "# nothing yet\n", origin: file.path, exists: true });
  const url = new URL(`file://${file.path}`);
  assertEquals((await readHostsConfig(url)).origin, url.href);
});

Deno.test("loadHostsConfig() refuses a folder, a missing file and one that may not be read", async () => {
  await using temp = await tempFolder();
  assertEquals(await faultOf(temp.folder), "is a folder, not a file");
  assertEquals(await faultOf(`${temp.folder}/none.yaml`), "there is no such file");
  assertEquals(await faultOf(`file://${temp.folder}/none.yaml`), "there is no such file");
  await Deno.writeTextFile(`${temp.folder}/file`, "");
  assertMatch(await faultOf(`${temp.folder}/file/hosts.yaml`), /^(cannot be read \(.+\)|there is no such file)$/);
});

Deno.test("loadHostsConfig() refuses a file that is not UTF-8", async () => {
  await using file = await writeInventory({});
  const cases: [message: string, bytes: number[]][] = [
    ["is not UTF-8: save it as UTF-8", [...new TextEncoder().encode("hosts:\n  a: {}\n  # hunter2 "), 0xe4]],
    ["is UTF-16: save it as UTF-8", [0xff, 0xfe, 104, 0, 111, 0]],
    ["is UTF-16: save it as UTF-8", [0xfe, 0xff, 0, 104, 0, 111]],
  ];
  for (const [message, bytes] of cases) {
    await Deno.writeFile(file.path, Uint8Array.from(bytes));
    assertEquals(await faultOf(file.path), message);
  }
  await Deno.writeFile(file.path, Uint8Array.of(0xef, 0xbb, 0xbf, ...new TextEncoder().encode(INVENTORY)));
  assertEquals((await loadHostsConfig(file.path)).hosts, { "gpu-1": {} });
});

Deno.test("loadHostsConfig() fetches a URL, and says what is wrong with one", async () => {
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url, signal }) => {
    switch (new URL(url).pathname) {
      case "/hosts.yaml":
        return new Response(INVENTORY);
      case "/html":
        return new Response("<!doctype html><html><body>Log in: x</body></html>");
      case "/latin1":
        return new Response(Uint8Array.of(0x23, 0xe4));
      case "/empty":
        return new Response(null, { status: 204 });
      case "/moved":
        return new Response(null, { status: 302, headers: { location: "/hosts.yaml" } });
      case "/never":
        // Until the client leaves: the server waits for its answers before it ends.
        return new Promise<Response>((resolve) => signal.addEventListener("abort", () => resolve(new Response())));
    }
    return new Response("no", { status: 404 });
  });
  const base = `http://127.0.0.1:${server.addr.port}`;
  const url = `${base}/hosts.yaml`;
  for (const source of [url, new URL(url), url.replace("http", "HTTP")]) {
    assertEquals((await loadHostsConfig(source)).hosts, { "gpu-1": {} });
  }
  assertEquals(await readHostsConfig(url), { text: INVENTORY, origin: url, exists: true });

  assertEquals(await faultOf(`${base}/none`), "answered HTTP 404");
  assertEquals(await faultOf(`${base}/empty`), "answered HTTP 204");
  await assertRejects(() => loadHostsConfig(`${base}/never`, { timeoutMs: 0 }), RangeError);
  assertEquals(await faultOf(`${base}/moved`), "answered HTTP 302, a redirect: use the URL it leads to");
  assertEquals(await faultOf(`${base}/html`), "is HTML or XML, not YAML");
  assertEquals(await faultOf(`${base}/latin1`), "is not UTF-8: save it as UTF-8");
  assertEquals(await faultOf(`${base}/never`, { timeoutMs: 100 }), "did not answer within 100 ms");
  assertEquals(await faultOf("http://"), "is not a URL");
  assertMatch(await faultOf(`http://127.0.0.1:${unusedPort()}/`), /refused/);
});

Deno.test("loadHostsConfig() of a URL ends at its signal with the reason", async () => {
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    ({ signal }) => new Promise<Response>((resolve) => signal.addEventListener("abort", () => resolve(new Response()))),
  );
  const url = `http://127.0.0.1:${server.addr.port}/hosts.yaml`;
  const later = new AbortController();
  setTimeout(() => later.abort("enough"), 50);
  for (const signal of [AbortSignal.abort("enough"), later.signal]) {
    const reason = await loadHostsConfig(url, { signal }).then(() => "loaded", (reason) => reason);
    assertEquals(reason, "enough");
  }
});

/** Makes a CA, and a certificate for each name, the last one over since yesterday. */
const MAKE_CERTIFICATES = `
  cd "$0" && new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  openssl req -x509 $new -keyout ca.key -out ca.pem -subj /CN=ca -days 2
  here=DNS:localhost,IP:127.0.0.1
  openssl req -x509 $new -keyout self.key -out self.pem -subj /CN=self -addext subjectAltName=$here -days 2
  leaf() {
    openssl req $new -keyout $1.key -out $1.csr -subj /CN=$1
    echo "subjectAltName=$2" > $1.ext
    openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -out $1.pem -extfile $1.ext -days $3
  }
  leaf good $here 2; leaf other DNS:other.example.com 2; leaf expired $here -1`;

testUnless(programMissing("openssl"), "loadHostsConfig() says in words what is wrong with https", async () => {
  await using temp = await tempFolder();
  const { code, stderr } = await run("sh", ["-c", MAKE_CERTIFICATES, temp.folder]);
  assertEquals(code, 0, stderr);

  await using servers = new AsyncDisposableStack();
  const urlOf = (name: string) => {
    const [cert, key] = ["pem", "key"].map((kind) => Deno.readTextFileSync(`${temp.folder}/${name}.${kind}`));
    const options = { hostname: "127.0.0.1", port: 0, cert: cert!, key: key!, onListen() {} };
    return `https://localhost:${servers.use(Deno.serve(options, () => new Response(INVENTORY))).addr.port}/hosts.yaml`;
  };
  const [good, self, other, expired] = ["good", "self", "other", "expired"].map(urlOf) as [
    string,
    string,
    string,
    string,
  ];
  await using plain = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, () => new Response(INVENTORY));

  assertEquals(await faultOf(good), "the certificate is from an unknown CA: name that CA's file in DENO_CERT");
  // A certificate that says of itself that it is a CA's is refused even if DENO_CERT names it: that would be no help.
  assertMatch(await faultOf(self), /^the certificate is self-signed(?:.*CA:FALSE|(?!.*DENO_CERT))/);
  assertEquals(await faultOf(`https://localhost:${plain.addr.port}/`), "the server does not speak TLS");

  const script = `const urls = ${JSON.stringify([good, other, expired])};
    const load = async (url) => Object.keys((await api.loadHostsConfig(url)).hosts).join();
    console.log(JSON.stringify(await Promise.all(urls.map((url) => load(url).catch((error) => error.message)))));`;
  const outcomes = await evaluate(script, { DENO_CERT: `${temp.folder}/ca.pem` });
  assertEquals(outcomes, [
    "gpu-1",
    `${other}: the certificate is for another name`,
    `${expired}: the certificate has expired`,
  ]);
});

Deno.test({
  name: "without read permission, the error names the flag",
  permissions: { read: false, env: false },
  async fn() {
    const flags = [
      [undefined, "--allow-read=config/distributed_hosts.yaml"],
      ["other.yaml", "--allow-read=other.yaml"],
      ["file:///srv/hosts.yaml", "--allow-read=/srv/hosts.yaml"],
    ] as const;
    for (const [source, flag] of flags) {
      const { message }: Error = await assertRejects(() => loadHostsConfig(source), Deno.errors.NotCapable, flag);
      assert(!message.includes("\n"), message);
    }
  },
});

Deno.test({
  name: "without net permission, the error names the host and the port of the URL",
  permissions: { net: false },
  async fn() {
    const flags = [
      ["https://example.com/a.yaml", "--allow-net=example.com:443"],
      ["http://example.com/a.yaml", "--allow-net=example.com:80"],
      ["http://[::1]:8000/a.yaml", "--allow-net=[::1]:8000"],
    ] as const;
    for (const [source, flag] of flags) {
      await assertRejects(
        () => loadHostsConfig(source),
        Deno.errors.NotCapable,
        `Requires net access: run again with ${flag}`,
      );
    }
  },
});

Deno.test({
  name: "without env permission, a variable counts as unset",
  permissions: { read: ["/tmp", ROOT], env: false },
  async fn() {
    const { origin } = await readHostsConfig();
    assertEquals(origin, "config/distributed_hosts.yaml");
  },
});
