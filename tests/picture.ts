/**
 * `deno task picture`: draws tests/status.svg, the README's picture, from what `status` really prints on a terminal.
 *
 * @module
 */
import { startDemoCluster } from "./loopback_cluster.ts";
import { ROOT } from "./process.ts";

const ESC = "\x1b";
const COLOURS: Readonly<Record<string, string>> = {
  "1": "#ffffff",
  "2": "#7d8590",
  "31": "#ff7b72",
  "32": "#7ee787",
  "33": "#e3b341",
  "35": "#d2a8ff",
};
const TEXT_COLOUR = "#c9d1d9";
const [CHARACTER_WIDTH, LINE_HEIGHT, MARGIN] = [8.43, 20, 16];

await using _cluster = await startDemoCluster();
const command = "status --config config/demo_hosts.yaml --timeout 1";
// script(1) is the terminal: without one there is no colour.
const { stdout } = await new Deno.Command("script", {
  args: [
    "-qec",
    `stty cols 200; deno run -q -P=cli cli.ts ${command}`,
    "/dev/null",
  ],
  cwd: ROOT,
  stdin: "null",
}).output();
// What comes before the table is progress, which erases itself.
const output = new TextDecoder().decode(stdout).replaceAll("\r\n", "\n").split(
  `\r${ESC}[K`,
).at(-1)!.trimEnd();
const lines = [
  `${ESC}[2m$${ESC}[0m cluster-hosts ${command}`,
  ...output.split("\n"),
];
const columns = Math.max(
  ...lines.map((line) =>
    line.replaceAll(new RegExp(`${ESC}\\[\\d+m`, "g"), "").length
  ),
);
const [width, height] = [
  columns * CHARACTER_WIDTH + 2 * MARGIN,
  lines.length * LINE_HEIGHT + 2 * MARGIN,
];
const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${
  width.toFixed(0)
} ${height}" font-size="14"
  font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace">
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>
${lines.map(drawLine).join("\n")}
</svg>
`;
await Deno.writeTextFile(`${ROOT}tests/status.svg`, svg);

function drawLine(line: string, index: number): string {
  const y = MARGIN + (index + 0.75) * LINE_HEIGHT;
  const spans = line.split(new RegExp(`(?=${ESC}\\[\\d+m)`)).map((part) => {
    const [, code = "0", text = part] =
      new RegExp(`^${ESC}\\[(\\d+)m(.*)$`, "s").exec(part) ?? [];
    return `<tspan fill="${COLOURS[code] ?? TEXT_COLOUR}">${
      escapeXml(text)
    }</tspan>`;
  });
  return `<text x="${MARGIN}" y="${y}" xml:space="preserve">${
    spans.join("")
  }</text>`;
}

function escapeXml(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(
    ">",
    "&gt;",
  );
}
