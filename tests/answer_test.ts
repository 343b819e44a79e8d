import { assertEquals } from "jsr:@std/assert@^1.0.19";
import { readBody, readHead, ResponseReader } from "../cluster_hosts.ts";
import { jsonOfSize } from "./loopback_cluster.ts";

const MIB = 1024 * 1024;
const OK = "HTTP/1.1 200 OK\r\n";
const JSON_TEXT = '{"version":"1.4.2"}';

/**
 * What the connection does after the last byte: it ends, or it stays open and
 * nothing more comes.
 */
type End = "closed" | "open";

/**
 * What reading gave: a text, a failure, or that it waits for more on a
 * connection that stays open.
 */
type Result =
  | { readonly text: string }
  | { readonly failure: string }
  | "waits";

class Waits extends Error {}

/** Returns a connection whose reads give one piece each. */
function fakeConn(pieces: readonly string[], end: End): Deno.Conn {
  const left = pieces.filter((piece) => piece !== "").map(toBytes);

  const read = (buffer: Uint8Array): Promise<number | null> => {
    const piece = left.shift();
    if (piece === undefined) {
      return end === "open"
        ? Promise.reject(new Waits())
        : Promise.resolve(null);
    }

    const given = piece.subarray(0, buffer.length);
    buffer.set(given);
    if (given.length < piece.length) left.unshift(piece.subarray(given.length));
    return Promise.resolve(given.length);
  };

  return { read } as Deno.Conn;
}

function toBytes(text: string): Uint8Array {
  return Uint8Array.from(text, (char) => char.charCodeAt(0));
}

type Read = (reader: ResponseReader) => Promise<unknown>;

async function resultOf(
  read: Read,
  pieces: readonly string[],
  end: End,
): Promise<Result> {
  const reader = new ResponseReader(fakeConn(pieces, end));
  try {
    return { text: textOf(await read(reader)) };
  } catch (error) {
    if (error instanceof Waits) return "waits";
    if (!(error instanceof Error && "code" in error)) throw error;

    return { failure: `${error.code}: ${error.message}` };
  }
}

function textOf(value: unknown): string {
  if (value instanceof Uint8Array) {
    return new TextDecoder("latin1").decode(value);
  }
  return JSON.stringify(value, (_, part) => {
    return part instanceof Map ? Object.fromEntries(part) : part;
  });
}

/**
 * Yields all ways to cut a text: not at all, into bytes, in two at every byte,
 * in three if it is short.
 */
function* cuts(text: string): Generator<string[]> {
  yield [text];
  yield [...text];

  for (let first = 1; first < text.length; first++) {
    yield [text.slice(0, first), text.slice(first)];
    if (text.length > 100) continue;

    for (let second = first + 1; second < text.length; second++) {
      const middle = text.slice(first, second);
      yield [text.slice(0, first), middle, text.slice(second)];
    }
  }
}

/**
 * Asserts that reading an answer gives the same however it is cut. Of a
 * failure, the beginning is compared.
 */
async function assertReads(
  read: Read,
  answer: string,
  end: End,
  expected: Result,
): Promise<void> {
  const isLong = answer.length > 2000;
  const ways = isLong ? [[answer]] : cuts(answer);

  for (const pieces of ways) {
    const result = await resultOf(read, pieces, end);
    const what = `${end}, as ${JSON.stringify(pieces.slice(0, 3))}`;
    assertEquals(shortened(result, expected), expected, what);
  }
}

/** Cuts the message of a failure to the length of the expected one. */
function shortened(result: Result, expected: Result): Result {
  if (result === "waits" || expected === "waits") return result;
  if (!("failure" in result && "failure" in expected)) return result;

  return { failure: result.failure.slice(0, expected.failure.length) };
}

function body(text: string): Result {
  return { text };
}

function bad(message = ""): Result {
  return { failure: `bad-response: ${message}` };
}

const TOO_LARGE: Result = { failure: "too-large: " };

type Row = readonly [name: string, answer: string, expected: Result];

/**
 * Registers a test for each row: on a connection that stays open, and on one
 * that ends.
 */
function testRows(what: string, read: Read, rows: readonly Row[]): void {
  for (const [name, answer, expected] of rows) {
    Deno.test(`${what} ${name}`, async () => {
      await assertReads(read, answer, "open", expected);

      // What waits on an open connection is an answer that broke off on a
      // closed one.
      const atEnd = expected === "waits" ? bad("the ") : expected;
      await assertReads(read, answer, "closed", atEnd);
    });
  }
}

function head(status: number, headers: Record<string, string> = {}): Result {
  return { text: JSON.stringify({ status, headers }) };
}

const CONTINUE = "HTTP/1.1 100 Continue\r\n\r\n";
const HINTS = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n";

testRows("readHead() returns", readHead, [
  ["headers", `${OK}A: 1\r\nb:2\r\n\r\nrest`, head(200, { a: "1", b: "2" })],
  [
    "headers after bare line feeds",
    "HTTP/1.0 404 Not Found\nA: 1\n\n",
    head(404, { a: "1" }),
  ],
  ["a status without a reason", "HTTP/1.1 200\r\n\r\n", head(200)],
  ["the answer after 100 and 103", `${CONTINUE}${HINTS}${OK}\r\n`, head(200)],
  [
    "a head without the line that is no header",
    `${OK}what\r\n\r\n`,
    head(200),
  ],
  [
    "headers after two carriage returns",
    "HTTP/1.1 200 OK\r\r\nA: 1\r\r\n\r\r\n",
    head(200, { a: "1" }),
  ],
  [
    "headers before an empty line with a blank",
    `${OK}A: 1\r\n \r\n`,
    head(200, { a: "1" }),
  ],
]);

const TWO_LENGTHS = "Content-Length: 1\r\nContent-Length: 2\r\n";

testRows("readHead() rejects", readHead, [
  [
    "the greeting of an ssh server",
    "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3\r\n",
    bad("the answer is not HTTP"),
  ],
  ["one byte that is not HTTP", "S", bad("the answer is not HTTP")],
  ["four bytes that are not HTTP", "HTT ", bad("the answer is not HTTP")],
  ["an empty line", "\r\n", bad("the answer is not HTTP")],
  ["HTTP/2", "HTTP/2 200\r\n\r\n", bad("the answer is not HTTP/1")],
  ["HTTP/2 without an end", "HTTP/2 200\r\n", bad("the answer is not HTTP/1")],
  [
    "two lengths that differ, before the head ends",
    `${OK}${TWO_LENGTHS}`,
    bad("two different Content-Length headers"),
  ],
  [
    "a status of two digits",
    "HTTP/1.1 20\r\n\r\n",
    bad("the answer is not HTTP/1"),
  ],
  [
    "a status of four digits",
    "HTTP/1.1 2000 OK\r\n\r\n",
    bad("the answer is not HTTP/1"),
  ],
]);

testRows("readHead() waits after", readHead, [
  ["half a head", "HTTP/1.1 200 OK\r\nServer: x", "waits"],
  ["a head without its empty line", `${OK}Server: x\r\n`, "waits"],
  ["less than HTTP", "HTTP", "waits"],
  ["nothing", "", "waits"],
]);

testRows("readHead() rejects more than 64 KiB", readHead, [
  ["in one header without an end", `${OK}X: ${"x".repeat(70_000)}`, TOO_LARGE],
  ["in one header", `${OK}X: ${"x".repeat(70_000)}\r\n\r\n`, TOO_LARGE],
  ["in 20,000 headers", `${OK}${"X: y\r\n".repeat(20_000)}\r\n`, TOO_LARGE],
  [
    "in answers 1xx",
    "HTTP/1.1 102 Processing\r\n\r\n".repeat(4000),
    TOO_LARGE,
  ],
]);

async function readWhole(reader: ResponseReader): Promise<Uint8Array> {
  const { headers } = await readHead(reader);
  return await readBody(reader, headers);
}

const CHUNKED = `${OK}Transfer-Encoding: chunked\r\n\r\n`;

function readChunked(reader: ResponseReader): Promise<Uint8Array> {
  return readBody(reader, new Map([["transfer-encoding", "chunked"]]));
}

testRows("readBody() returns", readChunked, [
  ["one chunk", "3\r\nabc\r\n0\r\n\r\n", body("abc")],
  [
    "two chunks with an extension and a trailer",
    "A;n=v\r\n0123456789\r\n1\r\nx\r\n0\r\nT: y\r\n\r\n",
    body("0123456789x"),
  ],
  ["a chunk between bare line feeds", "3\nabc\n0\n\n", body("abc")],
  [
    "the line ends inside a chunk",
    "4\r\n\r\n\r\n\r\n0\r\n\r\n",
    body("\r\n\r\n"),
  ],
  ["nothing of no chunk", "0\r\n\r\n", body("")],
]);

testRows("readBody() rejects", readChunked, [
  ["a chunk without a size", "\r\nabc\r\n", bad()],
  ["a chunk size that is not hexadecimal", "zz\r\n", bad()],
  ["a negative chunk size", "-1\r\nabc\r\n", bad()],
  ["a chunk longer than its size", "2\r\nabc\r\n0\r\n\r\n", bad()],
  ["a chunk shorter than its size", "5\r\nabc\r\n0\r\n\r\n", bad()],
  ["a chunk size of nine digits", "100000000\r\n", bad()],
  ["a chunk size beyond 1 MiB", "100001\r\n", TOO_LARGE],
  ["a chunk size of 4 GiB", "ffffffff\r\n", TOO_LARGE],
]);

testRows("readBody() waits after", readChunked, [
  ["a chunk that does not end", "5\r\nabc", "waits"],
  ["a chunk without its line end", "3\r\nabc", "waits"],
  ["chunks without the last", "3\r\nabc\r\n", "waits"],
]);

const LENGTH = "Content-Length";

function withLength(text: string, length = text.length): string {
  return `${OK}${LENGTH}: ${length}\r\n\r\n${text}`;
}

function chunked(text: string, size = 65_536): string {
  const chunks = text.match(new RegExp(`.{1,${size}}`, "gs")) ?? [];
  const sent = chunks.map((chunk) => {
    return `${chunk.length.toString(16)};name=value\r\n${chunk}\r\n`;
  });
  return `${CHUNKED}${sent.join("")}0\r\nTrailer: yes\r\n\r\n`;
}

const FULL = jsonOfSize(MIB);
const OVER = jsonOfSize(MIB + 1);
const IDENTITY = "Transfer-Encoding: identity\r\n";

type BodyRow = readonly [
  name: string,
  answer: string,
  end: End,
  expected: Result,
];

const BODIES: readonly BodyRow[] = [
  ["of a length", withLength(JSON_TEXT), "open", body(JSON_TEXT)],
  [
    "of a length, and no more",
    withLength(JSON_TEXT, 5),
    "open",
    body(JSON_TEXT.slice(0, 5)),
  ],
  ["of a length of 0", withLength(""), "open", body("")],
  [
    "of the same length twice",
    `${OK}${LENGTH}: 2\r\n${LENGTH}: 2\r\n\r\n{}`,
    "open",
    body("{}"),
  ],
  ["in chunks", chunked(JSON_TEXT, 3), "open", body(JSON_TEXT)],
  ["without a length", `${OK}\r\n${JSON_TEXT}`, "closed", body(JSON_TEXT)],
  ["of HTTP/1.0", `HTTP/1.0 200 OK\n\n${JSON_TEXT}`, "closed", body(JSON_TEXT)],
  [
    "with identity as its transfer encoding",
    `${OK}${IDENTITY}${LENGTH}: 2\r\n\r\n{}`,
    "open",
    body("{}"),
  ],
  [
    "with identity and no length",
    `${OK}${IDENTITY}\r\n{}`,
    "closed",
    body("{}"),
  ],
  ["of 1 MiB with its length", withLength(FULL), "open", body(FULL)],
  ["of 1 MiB in chunks", chunked(FULL), "open", body(FULL)],
  ["of 1 MiB until the end", `${OK}\r\n${FULL}`, "closed", body(FULL)],
];

for (const [name, answer, end, expected] of BODIES) {
  Deno.test(`readBody() returns a body ${name}`, async () => {
    await assertReads(readWhole, answer, end, expected);
  });
}

const BROKEN: readonly BodyRow[] = [
  [
    "two lengths that differ",
    `${OK}${LENGTH}: 2\r\n${LENGTH}: 3\r\n\r\n{} `,
    "open",
    bad(),
  ],
  ["two lengths in one line", `${OK}${LENGTH}: 2, 3\r\n\r\n{} `, "open", bad()],
  ["a negative length", `${OK}${LENGTH}: -1\r\n\r\n{}`, "open", bad()],
  [
    "a length that is not decimal",
    `${OK}${LENGTH}: 0x2\r\n\r\n{}`,
    "open",
    bad(),
  ],
  [
    "a body cut short of its length",
    withLength(JSON_TEXT, 5000),
    "closed",
    bad("the answer ended"),
  ],
  [
    "chunks without their end",
    chunked(JSON_TEXT).slice(0, -25),
    "closed",
    bad("the answer ended"),
  ],
  [
    "another transfer encoding",
    `${OK}Transfer-Encoding: gzip, chunked\r\n\r\n`,
    "open",
    bad(),
  ],
  [
    "a byte more than 1 MiB with its length",
    withLength(OVER),
    "open",
    TOO_LARGE,
  ],
  ["a byte more than 1 MiB in chunks", chunked(OVER), "open", TOO_LARGE],
  [
    "a byte more than 1 MiB until the end",
    `${OK}\r\n${OVER}`,
    "closed",
    TOO_LARGE,
  ],
  [
    "a length beyond all bounds",
    `${OK}${LENGTH}: 1${"0".repeat(30)}\r\n\r\n`,
    "open",
    TOO_LARGE,
  ],
];

for (const [name, answer, end, expected] of BROKEN) {
  Deno.test(`readBody() rejects ${name}`, async () => {
    await assertReads(readWhole, answer, end, expected);
  });
}

const UNFINISHED: readonly BodyRow[] = [
  ["less than its length", withLength(JSON_TEXT, 5000), "open", "waits"],
  ["a body without a length", `${OK}\r\n${JSON_TEXT}`, "open", "waits"],
];

for (const [name, answer, end, expected] of UNFINISHED) {
  Deno.test(`readBody() waits after ${name}, kept open`, async () => {
    await assertReads(readWhole, answer, end, expected);
  });
}

Deno.test("readHead() leaves what comes after the head", async () => {
  const length = new Map([["content-length", "4"]]);

  for (const pieces of cuts(`${OK}A: 1\r\n\r\nrest`)) {
    const reader = new ResponseReader(fakeConn(pieces, "open"));
    await readHead(reader);
    const rest = await readBody(reader, length);
    assertEquals(textOf(rest), "rest", JSON.stringify(pieces));
  }
});
