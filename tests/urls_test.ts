import { assertEquals, assertRejects } from "jsr:@std/assert@^1.0.19";
import { type DataSyncUrlOptions, getDataSyncUrls, getEloSyncUrls, getSyncUrls, type HostEntry } from "../mod.ts";
import { evaluate } from "./evaluate.ts";
import { startNode, unusedPort } from "./loopback_cluster.ts";

/** Whatever the variables of whoever runs the tests are: they count as unset. */
const permissions = { env: false, net: "inherit", sys: "inherit" } as const;

const UNCHECKED = { reachableOnly: false, excludeSelf: false } as const;

Deno.test({
  name: "getSyncUrls() and its kin give URLs in the order of the config, without duplicates",
  permissions,
  async fn() {
    const source = {
      hosts: {
        b: { tailscale_ip: "100.64.0.2", ssh_host: "192.0.2.2", data_server_port: 9001 },
        a: { ssh_host: "root@192.0.2.1" },
        twin: { tailscale_ip: "192.0.2.1" },
        six: { tailscale_ip: "2001:db8::1", data_server_url: "https://six.example.com/data/" },
        bare: {},
        off: { tailscale_ip: "100.64.0.3", status: "offline" },
      },
      elo_sync: { sync_port: 9000 },
    };
    const options = { source, ...UNCHECKED };
    const urls = (port: number, path: string) =>
      ["100.64.0.2", "192.0.2.1", "[2001:db8::1]"].map((host) => `http://${host}:${port}${path}`);
    const only = { ...options, selection: { names: ["off"] } };
    const cases: [call: Promise<string[]>, urls: string[]][] = [
      [getSyncUrls(options), urls(8766, "/db")],
      [getSyncUrls({ ...options, port: 8765, path: "/models" }), urls(8765, "/models")],
      [getSyncUrls({ ...options, port: 80 }), urls(8765, "/db").map((url) => url.replace(":8765", ""))],
      [getEloSyncUrls(options), urls(9000, "/db")],
      [getEloSyncUrls({ ...options, port: 9002, path: "/x" }), urls(9002, "/x")],
      [getDataSyncUrls(options), ["http://100.64.0.2:9001", "http://192.0.2.1:8766", "https://six.example.com/data"]],
      [getSyncUrls(only), ["http://100.64.0.3:8766/db"]],
      [getDataSyncUrls(only), ["http://100.64.0.3:8766"]],
      [getSyncUrls({ source: { hosts: {} } }), []],
    ];
    for (const [call, expected] of cases) assertEquals(await call, expected);
  },
});

Deno.test({
  name: "getDataSyncUrls() gives one URL for the spellings of one server",
  permissions,
  async fn() {
    const hosts = {
      a: { data_server_url: "http://192.0.2.1:80/data" },
      b: { data_server_url: "HTTP://192.0.2.1/data/" },
      c: { data_server_url: "http://192.0.2.2:8766/" },
      d: { tailscale_ip: "192.0.2.2" },
    };
    assertEquals(await getDataSyncUrls({ source: { hosts }, ...UNCHECKED }), [
      "http://192.0.2.1/data",
      "http://192.0.2.2:8766",
    ]);
  },
});

Deno.test("getSyncUrls() throws at a fault of the caller", async () => {
  const options = { source: { hosts: {} }, ...UNCHECKED };
  for (const path of ["db", "", "/a b", "/a\r\nb", "http://x/db"]) {
    await assertRejects(() => getSyncUrls({ ...options, path }), TypeError, "", path);
  }
  for (const port of [0, 65536, 1.5, NaN]) {
    await assertRejects(() => getSyncUrls({ ...options, port }), RangeError, "port");
  }
  for (const get of [getSyncUrls, getEloSyncUrls, getDataSyncUrls]) {
    await assertRejects(() => get({ ...options, selection: { names: ["gone"] } }), RangeError, "gone");
    const reason = await get({ ...options, signal: AbortSignal.abort("enough") }).catch((reason) => reason);
    assertEquals(reason, "enough");
  }
});

Deno.test({
  name: "the URLs are those of the nodes that are up, at the address that answered",
  permissions,
  async fn() {
    await using up = await startNode("ok");
    await using broken = await startNode("http-500");
    const dead = unusedPort();
    const paths: string[] = [];
    await using behind = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
      paths.push(new URL(url).pathname);
      return Response.json({});
    });
    const url = `http://127.0.0.1:${behind.addr.port}/data/`;
    const host = (port: number, fields: HostEntry = {}) => ({
      ssh_host: "127.0.0.1",
      data_server_port: port,
      ...fields,
    });
    const source = {
      hosts: {
        broken: host(broken.port),
        second: host(up.port, { tailscale_ip: "127.0.0.9" }),
        up: host(up.port),
        url: host(dead, { data_server_url: url }),
        dead: host(dead),
        off: host(up.port, { status: "offline" }),
      },
      elo_sync: { sync_port: up.port },
    };
    const options = { source, excludeSelf: false };
    const asked: string[] = [];
    const onProbe: DataSyncUrlOptions["onProbe"] = ({ node, state }) => void asked.push(`${node.name} ${state}`);
    assertEquals(await getDataSyncUrls({ ...options, onProbe }), [`http://127.0.0.1:${up.port}`, url.slice(0, -1)]);
    assertEquals(asked.toSorted(), ["broken unhealthy", "dead down", "second up", "up up", "url up"]);
    assertEquals(paths, ["/data/status"]);

    // What is checked is the status path; `path` is the one of the URLs.
    assertEquals(await getSyncUrls({ source, port: up.port, path: "/x" }), [`http://127.0.0.1:${up.port}/x`]);
    assertEquals(await getSyncUrls({ source, port: broken.port }), []);
    assertEquals(await getEloSyncUrls({ source }), [`http://127.0.0.1:${up.port}/db`]);
  },
});

Deno.test({
  name: "getDataSyncUrls() leaves out this host, by its name and by its addresses",
  permissions,
  async fn() {
    const hostname = Deno.hostname();
    const addresses = Deno.networkInterfaces().map(({ address }) => address).filter((address) =>
      !address.includes("%")
    );
    const own = { ssh_host: "192.0.2.1" };
    const cases: [name: string, fields: HostEntry, isLeftOut: boolean][] = [
      ["another", own, false],
      [hostname, own, true],
      [hostname.toUpperCase(), own, true],
      [hostname.split(".", 1)[0]!, own, true],
      [`${hostname}-2`, own, false],
      ["another", { ssh_host: "localhost" }, true],
      ["another", { ssh_host: "LOCALHOST" }, true],
      ["another", { ssh_host: "root@127.0.0.1" }, true],
      ["another", { tailscale_ip: "::1" }, true],
      ["another", { tailscale_ip: hostname }, true],
      ["another", { tailscale_ip: "192.0.2.9", ssh_host: "127.0.0.1" }, true],
      ["another", { data_server_url: "http://localhost:9000/data" }, true],
      ["another", { data_server_url: "http://[::1]:9000" }, true],
      ["another", { data_server_url: "http://192.0.2.1:9000", ssh_host: "localhost" }, true],
      ...addresses.map((address): [string, HostEntry, boolean] => ["another", { tailscale_ip: address }, true]),
      // A cluster on loopback lives at these.
      ["another", { tailscale_ip: "127.0.0.2" }, false],
      ["another", { tailscale_ip: "127.1.0.1" }, false],
    ];
    for (const [name, fields, isLeftOut] of cases) {
      const source = { hosts: { [name]: fields, other: { ssh_host: "198.51.100.1" } } };
      const urls = await getDataSyncUrls({ source, reachableOnly: false });
      assertEquals(urls.length, isLeftOut ? 1 : 2, `${name}: ${JSON.stringify(fields)}`);
      assertEquals((await getDataSyncUrls({ source, ...UNCHECKED })).length, 2);
      // The others do so only if they are told to.
      const count = "tailscale_ip" in fields || "ssh_host" in fields ? 2 : 1;
      assertEquals((await getSyncUrls({ source, reachableOnly: false })).length, count);
      const others = await getSyncUrls({ source, reachableOnly: false, excludeSelf: true });
      assertEquals(others.length, isLeftOut ? 1 : count);
    }
  },
});

Deno.test("getDataSyncUrls() takes for this host what RINGRIFT_NODE_ID says", async () => {
  const hostname = Deno.hostname();
  const outcomes = await evaluate(`
    const urls = async (id, name, fields = { ssh_host: "192.0.2.1" }) =>
      await withVariable("RINGRIFT_NODE_ID", id, () =>
        api.getDataSyncUrls({ source: { hosts: { [name]: fields } }, reachableOnly: false }));
    const ID = "GPU-7.example.com";
    console.log(JSON.stringify({
      whole: await urls(ID, "gpu-7.example.com"),
      "to the first dot": await urls(ID, "gpu-7"),
      another: await urls(ID, "gpu-77"),
      "the hostname": await urls(ID, ${JSON.stringify(hostname)}),
      localhost: await urls(ID, "another", { ssh_host: "localhost" }),
      "the address is the hostname": await urls(ID, "another", { ssh_host: ${JSON.stringify(hostname)} }),
      blank: await urls(" ", ${JSON.stringify(hostname)}),
    }));`);
  const left = ["http://192.0.2.1:8766"];
  assertEquals(outcomes, {
    whole: [],
    "to the first dot": [],
    another: left,
    "the hostname": left,
    localhost: [],
    "the address is the hostname": [],
    blank: [],
  });
});

Deno.test({
  name: "without sys permission, getDataSyncUrls() asks for the flag of the hostname",
  permissions: { sys: false, env: false, net: false },
  async fn() {
    const source = { hosts: { "gpu-1": { ssh_host: "192.0.2.1" } } };
    await assertRejects(
      () => getDataSyncUrls({ source, reachableOnly: false }),
      Deno.errors.NotCapable,
      "--allow-sys=hostname",
    );
    assertEquals((await getDataSyncUrls({ source, ...UNCHECKED })).length, 1);
  },
});

Deno.test({
  name: "without networkInterfaces, this host is known by its name and by loopback",
  permissions: { sys: ["hostname"], env: false, net: false },
  async fn() {
    const hosts = {
      [Deno.hostname()]: { ssh_host: "192.0.2.1" },
      local: { ssh_host: "127.0.0.1" },
      other: { ssh_host: "192.0.2.2" },
    };
    assertEquals(await getDataSyncUrls({ source: { hosts }, reachableOnly: false }), ["http://192.0.2.2:8766"]);
  },
});

Deno.test({
  name: "without net permission, the error names the flag; nothing looks down",
  permissions: { net: false, env: false },
  async fn() {
    const source = { hosts: { "gpu-1": { tailscale_ip: "192.0.2.1", data_server_port: 9 } } };
    const flag = "--allow-net=192.0.2.1:9";
    await assertRejects(() => getSyncUrls({ source, port: 9 }), Deno.errors.NotCapable, flag);
    await assertRejects(() => getDataSyncUrls({ source, excludeSelf: false }), Deno.errors.NotCapable, flag);
  },
});
