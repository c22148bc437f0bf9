// Formulas on standard input as JSON [{tex, display}], HTML on standard output as JSON [string].
import katex from "katex";
import fs from "node:fs";

const formulas = JSON.parse(fs.readFileSync(0, "utf8"));
const html = formulas.map(({ tex, display }) => {
  try { return katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "ignore" }); }
  catch (error) { console.error(`a formula that KaTeX cannot read: ${tex}\n${error.message}`); process.exit(1); }
});
process.stdout.write(JSON.stringify(html));
