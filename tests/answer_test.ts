import { assertEquals } from "jsr:@std/assert@^1.0.19";
import { readBody, readChunks, readHead, ResponseReader } from "../cluster_hosts.ts";
import { jsonOfSize } from "./loopback_cluster.ts";

const MIB = 1024 * 1024;
const OK = "HTTP/1.1 200 OK\r\n";
const JSON_TEXT = '{"version":"1.4.2"}';

/** How the connection goes on once all of an answer was read: it ends, or it stays open and nothing more comes. */
type End = "closed" | "open";

/** What reading gave: a text, or `CODE: MESSAGE` of what it threw. It waits if the connection has to stay open for it. */
type Result = { readonly text: string } | { readonly failure: string } | "waits";

class Waits extends Error {}

/** A connection whose reads give one piece each. */
function fakeConn(pieces: readonly string[], end: End): Deno.Conn {
  const left = pieces.filter((piece) => piece !== "").map((piece) =>
    Uint8Array.from(piece, (byte) => byte.charCodeAt(0))
  );
  const read = (buffer: Uint8Array): Promise<number | null> => {
    const piece = left.shift();
    if (piece === undefined) return end === "open" ? Promise.reject(new Waits()) : Promise.resolve(null);
    const taken = piece.subarray(0, buffer.length);
    buffer.set(taken);
    if (taken.length < piece.length) left.unshift(piece.subarray(taken.length));
    return Promise.resolve(taken.length);
  };
  return { read } as Deno.Conn;
}

type Read = (reader: ResponseReader) => Promise<unknown>;

async function resultOf(read: Read, pieces: readonly string[], end: End): Promise<Result> {
  try {
    const value = await read(new ResponseReader(fakeConn(pieces, end)));
    if (value instanceof Uint8Array) return { text: new TextDecoder("latin1").decode(value) };
    return { text: JSON.stringify(value, (_, part) => part instanceof Map ? Object.fromEntries(part) : part) };
  } catch (error) {
    if (error instanceof Waits) return "waits";
    if (!(error instanceof Error && "code" in error)) throw error;
    return { failure: `${error.code}: ${error.message}` };
  }
}

/** All ways to cut a text: in two at every byte, in three if it is short, into single bytes, and not at all. */
function* cuts(text: string): Generator<string[]> {
  yield [text];
  yield [...text];
  for (let first = 1; first < text.length; first++) {
    yield [text.slice(0, first), text.slice(first)];
    if (text.length > 100) continue;
    for (let second = first + 1; second < text.length; second++) {
      yield [text.slice(0, first), text.slice(first, second), text.slice(second)];
    }
  }
}

/** Asserts that however an answer is cut, reading it gives the same. A failure is given by how it begins. */
async function assertReads(read: Read, answer: string, end: End, expected: Result): Promise<void> {
  for (const pieces of answer.length > 2000 ? [[answer]] : cuts(answer)) {
    const result = await resultOf(read, pieces, end);
    const what = `${end}, as ${JSON.stringify(pieces.slice(0, 3))}`;
    if (expected === "waits" || "text" in expected) assertEquals(result, expected, what);
    else {
      if (result === "waits" || "text" in result) throw new Error(`Gives ${JSON.stringify(result)}: ${what}`);
      assertEquals(result.failure.slice(0, expected.failure.length), expected.failure, what);
    }
  }
}

const body = (text: string): Result => ({ text });
const bad = (message: string): Result => ({ failure: `bad-response: ${message}` });
const TOO_LARGE: Result = { failure: "too-large: " };

function withLength(text: string, length = text.length): string {
  return `${OK}Content-Length: ${length}\r\n\r\n${text}`;
}

function chunked(text: string, size = 65_536): string {
  const chunks = text.match(new RegExp(`.{1,${size}}`, "gs")) ?? [];
  const sent = chunks.map((chunk) => `${chunk.length.toString(16)};name=value\r\n${chunk}\r\n`).join("");
  return `${OK}Transfer-Encoding: chunked\r\n\r\n${sent}0\r\nTrailer: yes\r\n\r\n`;
}

type Answers = readonly (readonly [name: string, answer: string, expected: Result])[];

/** Asserts what reading each answer gives, on a connection that stays open and on one that ends. */
async function assertReadsAll(read: Read, answers: Answers): Promise<void> {
  for (const [name, answer, expected] of answers) {
    await assertReads(read, answer, "open", expected).catch((error) => {
      throw new Error(`${name}: ${error.message}`);
    });
    // What waits on an open connection is an answer that broke off on a closed one.
    await assertReads(read, answer, "closed", expected === "waits" ? bad("the ") : expected);
  }
}

const HEADS: Answers = [
  ["a status line and headers", `${OK}A: 1\r\nb:2\r\n\r\nrest`, body('{"status":200,"headers":{"a":"1","b":"2"}}')],
  ["bare line feeds", "HTTP/1.0 404 Not Found\nA: 1\n\n", body('{"status":404,"headers":{"a":"1"}}')],
  ["no reason phrase", "HTTP/1.1 200\r\n\r\n", body('{"status":200,"headers":{}}')],
  [
    "100 and 103 first",
    `HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n${OK}\r\n`,
    body('{"status":200,"headers":{}}'),
  ],
  ["a line that is no header", `${OK}what\r\n\r\n`, body('{"status":200,"headers":{}}')],
  ["the greeting of an ssh server", "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3\r\n", bad("the answer is not HTTP")],
  ["one byte that is not HTTP", "S", bad("the answer is not HTTP")],
  ["four bytes that are not HTTP", "HTT ", bad("the answer is not HTTP")],
  ["an empty line", "\r\n", bad("the answer is not HTTP")],
  ["HTTP/2", "HTTP/2 200\r\n\r\n", bad("the answer is not HTTP/1")],
  ["HTTP/2, and no more", "HTTP/2 200\r\n", bad("the answer is not HTTP/1")],
  ["two lengths, and no end", `${OK}Content-Length: 1\r\nContent-Length: 2\r\n`, bad("two Content-Length that differ")],
  ["two carriage returns", "HTTP/1.1 200 OK\r\r\nA: 1\r\r\n\r\r\n", body('{"status":200,"headers":{"a":"1"}}')],
  ["a blank in the empty line", `${OK}A: 1\r\n \r\n`, body('{"status":200,"headers":{"a":"1"}}')],
  ["a status of two digits", "HTTP/1.1 20\r\n\r\n", bad("the answer is not HTTP/1")],
  ["a status of four digits", "HTTP/1.1 2000 OK\r\n\r\n", bad("the answer is not HTTP/1")],
  ["the beginning of a head", "HTTP/1.1 200 OK\r\nServer: x", "waits"],
  ["a head without its empty line", `${OK}Server: x\r\n`, "waits"],
  ["less than HTTP", "HTTP", "waits"],
  ["nothing", "", "waits"],
];

Deno.test("readHead() reads a head, however it is cut, and refuses at once what is not one", async () => {
  await assertReadsAll(readHead, HEADS);
});

Deno.test("readHead() leaves what comes after the head", async () => {
  for (const pieces of cuts(`${OK}A: 1\r\n\r\nrest`)) {
    const reader = new ResponseReader(fakeConn(pieces, "closed"));
    await readHead(reader);
    assertEquals(new TextDecoder().decode(await reader.rest()), "rest", JSON.stringify(pieces));
  }
});

Deno.test("readHead() refuses more than 64 KiB, in one header, in many, or in answers 1xx", async () => {
  const heads = [
    `${OK}X: ${"x".repeat(70_000)}`,
    `${OK}X: ${"x".repeat(70_000)}\r\n\r\n`,
    `${OK}${"X: y\r\n".repeat(20_000)}\r\n`,
    "HTTP/1.1 102 Processing\r\n\r\n".repeat(4000),
  ];
  for (const head of heads) await assertReads(readHead, head, "open", TOO_LARGE);
});

const CHUNKS: Answers = [
  ["one chunk", "3\r\nabc\r\n0\r\n\r\n", body("abc")],
  ["two chunks, an extension, a trailer", "A;n=v\r\n0123456789\r\n1\r\nx\r\n0\r\nT: y\r\n\r\n", body("0123456789x")],
  ["bare line feeds", "3\nabc\n0\n\n", body("abc")],
  ["line ends inside a chunk", "4\r\n\r\n\r\n\r\n0\r\n\r\n", body("\r\n\r\n")],
  ["none", "0\r\n\r\n", body("")],
  ["no size", "\r\nabc\r\n", bad("")],
  ["a size that is not hexadecimal", "zz\r\n", bad("")],
  ["a negative size", "-1\r\nabc\r\n", bad("")],
  ["a chunk longer than its size", "2\r\nabc\r\n0\r\n\r\n", bad("")],
  ["a chunk shorter than its size", "5\r\nabc\r\n0\r\n\r\n", bad("")],
  ["a size of nine digits", "100000000\r\n", bad("")],
  ["a size beyond 1 MiB", "100001\r\n", TOO_LARGE],
  ["a size of 4 GiB", "ffffffff\r\n", TOO_LARGE],
  ["a chunk that does not end", "5\r\nabc", "waits"],
  ["a chunk without its line end", "3\r\nabc", "waits"],
  ["chunks without the last", "3\r\nabc\r\n", "waits"],
];

Deno.test("readChunks() puts chunks together, however they are cut, and refuses what are none", async () => {
  await assertReadsAll(readChunks, CHUNKS);
});

async function readWhole(reader: ResponseReader): Promise<Uint8Array> {
  return await readBody(reader, (await readHead(reader)).headers);
}

const FULL = jsonOfSize(MIB);
const OVER = jsonOfSize(MIB + 1);

const BODIES: readonly (readonly [name: string, answer: string, end: End, expected: Result])[] = [
  ["a length", withLength(JSON_TEXT), "open", body(JSON_TEXT)],
  ["a length, and more after it", withLength(JSON_TEXT, 5), "open", body(JSON_TEXT.slice(0, 5))],
  ["a length of 0", withLength(""), "open", body("")],
  ["a length twice, the same", `${OK}Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}`, "open", body("{}")],
  ["two lengths", `${OK}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} `, "open", bad("")],
  ["two lengths in one line", `${OK}Content-Length: 2, 3\r\n\r\n{} `, "open", bad("")],
  ["a negative length", `${OK}Content-Length: -1\r\n\r\n{}`, "open", bad("")],
  ["a length that is not decimal", `${OK}Content-Length: 0x2\r\n\r\n{}`, "open", bad("")],
  ["a length that is not all there", withLength(JSON_TEXT, 5000), "open", "waits"],
  ["half a body, then the end", withLength(JSON_TEXT, 5000), "closed", bad("the answer ended")],
  ["chunks", chunked(JSON_TEXT, 3), "open", body(JSON_TEXT)],
  ["chunks without their end", chunked(JSON_TEXT).slice(0, -25), "closed", bad("the answer ended")],
  ["no length", `${OK}\r\n${JSON_TEXT}`, "closed", body(JSON_TEXT)],
  ["no length, kept open", `${OK}\r\n${JSON_TEXT}`, "open", "waits"],
  ["HTTP/1.0", `HTTP/1.0 200 OK\n\n${JSON_TEXT}`, "closed", body(JSON_TEXT)],
  [
    "identity as its transfer encoding",
    `${OK}Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}`,
    "open",
    body("{}"),
  ],
  ["identity, and no length", `${OK}Transfer-Encoding: Identity\r\n\r\n{}`, "closed", body("{}")],
  ["another transfer encoding", `${OK}Transfer-Encoding: gzip, chunked\r\n\r\n`, "open", bad("")],
  ["1 MiB with its length", withLength(FULL), "open", body(FULL)],
  ["1 MiB in chunks", chunked(FULL), "open", body(FULL)],
  ["1 MiB until the end", `${OK}\r\n${FULL}`, "closed", body(FULL)],
  ["a byte more with its length", withLength(OVER), "open", TOO_LARGE],
  ["a byte more in chunks", chunked(OVER), "open", TOO_LARGE],
  ["a byte more until the end", `${OK}\r\n${OVER}`, "closed", TOO_LARGE],
  ["a length beyond all bounds", `${OK}Content-Length: 1${"0".repeat(30)}\r\n\r\n`, "open", TOO_LARGE],
];

for (const [name, answer, end, expected] of BODIES) {
  Deno.test(`readBody() of ${name}`, () => assertReads(readWhole, answer, end, expected));
}
