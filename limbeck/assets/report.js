"use strict";
// Whatever goes wrong is left on <html data-error>, where a test (or a reader of the source) finds it.
const root = document.documentElement;
const fault = text => { root.dataset.error = (root.dataset.error || "") + text + "; "; };
addEventListener("error", event => fault(event.message || "cannot load " + event.target.tagName), true);
addEventListener("securitypolicyviolation", event => fault("blocked " + event.blockedURI));

let stored = null;
try { stored = localStorage.getItem("limbeck-theme"); } catch { /* storage may be denied to a page on disk */ }
if (stored === "light" || stored === "dark") root.dataset.theme = stored;

function themeButton(button) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("limbeck-theme", root.dataset.theme); } catch { /* as above */ }
  });
}

function figure(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size >= 1e6 || size < 1e-3) return value.toExponential(3);
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

const add = (parent, name, kind, text) => {
  const node = parent.appendChild(document.createElement(name));
  node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
};

// The curves themselves are drawn in the page's source; this adds the read-out under the pointer or the arrow keys.
function readout(plot) {
  const data = JSON.parse(plot.querySelector("script").textContent);
  const along = (axis, value) => ((axis.log ? Math.log10(value) : value) - axis.low) / (axis.high - axis.low);
  const stops = [...new Set(data.lines.flatMap(line => line.x))].sort((a, b) => a - b);
  if (!stops.length) return;
  const layer = add(plot, "div", "layer");
  let at = -1;

  const show = index => {
    at = Math.max(0, Math.min(stops.length - 1, index));
    layer.replaceChildren();
    const x = stops[at], left = along(data.x, x);
    add(layer, "div", "cursor").style.left = 100 * left + "%";
    const box = add(layer, "div", "readout");
    add(box, "b", "", data.x.label + " " + figure(x));
    for (const line of data.lines) {
      let near = 0;
      line.x.forEach((value, i) => { if (Math.abs(along(data.x, value) - left) < Math.abs(along(data.x, line.x[near]) - left)) near = i; });
      if (!line.x.length || Math.abs(along(data.x, line.x[near]) - left) > 0.015) continue;
      const height = along(data.y, line.y[near]);
      if (height >= 0 && height <= 1) {
        const dot = add(layer, "div", "dot " + line.role);
        dot.style.left = 100 * along(data.x, line.x[near]) + "%";
        dot.style.bottom = 100 * height + "%";
      }
      const row = add(box, "div", line.role);
      add(row, "span", "key");
      row.append(line.name + " " + figure(line.y[near]));
    }
    if (left < 0.5) box.style.left = `calc(${100 * left}% + 12px)`;
    else box.style.right = `calc(${100 - 100 * left}% + 12px)`;
  };
  const hide = () => { at = -1; layer.replaceChildren(); };
  const follow = event => {
    const frame = plot.getBoundingClientRect(), left = (event.clientX - frame.left) / frame.width;
    let near = 0;
    stops.forEach((x, i) => { if (Math.abs(along(data.x, x) - left) < Math.abs(along(data.x, stops[near]) - left)) near = i; });
    show(near);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { show(at < 0 ? stops.length - 1 : at + move); event.preventDefault(); }
  });
}

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if ((a === undefined) !== (b === undefined)) return a === undefined ? 1 : -1;      // what is missing stays below
      if (a === undefined) return 0;
      return sign * (head.classList.contains("num") ? a - b : a.localeCompare(b, "en", { numeric: true }));
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  }));
}

function copyButton(block) {
  const button = add(block, "button", "", "Copy"), text = block.querySelector("pre");
  button.type = "button";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; } catch { button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

addEventListener("DOMContentLoaded", () => {
  themeButton(document.getElementById("theme"));
  document.querySelectorAll(".plot").forEach(readout);
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll(".code").forEach(copyButton);
  root.dataset.ready = "yes";
});
