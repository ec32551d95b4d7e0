// The generator in model.onnx, run here by onnxruntime-web. For tests and for the curious there is `limbeck`:
//   await limbeck.ready
//   x = await limbeck.generate(z, labels)   z: Float32Array, n samples one after the other, ~ N(0, 1)
//                                           labels: n class numbers, -1 for none; left out for a model without classes
const root = document.documentElement;
const at = id => document.getElementById(id);
const { points, shape, latent, classes, megabytes } = JSON.parse(at("facts").textContent);
const [size, noiseSize] = [shape, latent].map(sides => sides.reduce((a, b) => a * b, 1));   // of a sample, of its noise
const count = points ? 2000 : shape[1] > 64 ? 12 : 24;
const address = new URLSearchParams(location.hash.slice(1));
const whole = (text, low, high) => Math.min(high, Math.max(low, Math.trunc(Number(text)) || 0));

let ort, session, pace;                                                                 // pace: milliseconds per sample
let seed = address.has("seed") ? whole(address.get("seed"), 0, 2 ** 31) : 0;
let label = address.has("class") ? whole(address.get("class"), 0, classes - 1) : -1;    // -1: all classes in turn
let noise, labels, samples, ends = [0, 1], next = 0, extent = 0;

const tell = text => {
  at("status").hidden = !text;
  at("status").textContent = text;
};
const fault = error => {
  tell(`This did not work: ${error?.message ?? error}`);
  root.dataset.error = at("status").textContent;
};
addEventListener("error", event => fault(event.message));
addEventListener("unhandledrejection", event => fault(event.reason));

const add = (parent, name, kind) => {
  const node = parent.appendChild(document.createElement(name));
  node.className = kind ?? "";
  return node;
};

// --- noise and the network -------------------------------------------------------------------------------------------

// Standard normals of sample `index` of a seed: mulberry32, then Box-Muller.
function normals(seed, index, out) {
  let state = (Math.imul(seed + 1, 0x9e3779b1) ^ Math.imul(index + 1, 0x85ebca6b)) >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  for (let i = 0; i < out.length; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < out.length) out[i + 1] = radius * Math.sin(angle);
  }
}

function rowsOf(labels) {
  const rows = new Float32Array(labels.length * classes);
  labels.forEach((k, i) => { if (k >= 0) rows[i * classes + k] = 1; });
  return rows;
}

let queue = Promise.resolve();                                                          // the runtime runs one at a time
function call(z, rows) {
  const run = async () => {
    const n = z.length / noiseSize, start = performance.now();
    const feeds = { z: new ort.Tensor("float32", z, [n, ...latent]) };
    if (classes) feeds.cond = new ort.Tensor("float32", rows, [n, classes]);
    const { x } = await session.run(feeds);
    return { x: x.data, milliseconds: performance.now() - start };
  };
  queue = queue.then(run, run);
  return queue;
}

// The noise between two samples, on the arc that keeps its length typical; the rows of their classes mix in proportion.
function between(t) {
  const [a, b] = ends.map(k => noise.subarray(k * noiseSize, (k + 1) * noiseSize));
  let dot = 0, aa = 0, bb = 0;
  for (let i = 0; i < noiseSize; i++) { dot += a[i] * b[i]; aa += a[i] * a[i]; bb += b[i] * b[i]; }
  const angle = Math.acos(Math.max(-1, Math.min(1, dot / Math.sqrt(aa * bb)))), sine = Math.sin(angle);
  const [p, q] = sine < 1e-4 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  const row = new Float32Array(classes);
  if (classes) { row[labels[ends[0]]] += 1 - t; row[labels[ends[1]]] += t; }
  return { z: a.map((value, i) => p * value + q * b[i]), row };
}

async function path(stops) {
  const z = new Float32Array(stops.length * noiseSize), rows = new Float32Array(stops.length * classes);
  stops.forEach((t, i) => { const part = between(t); z.set(part.z, i * noiseSize); rows.set(part.row, i * classes); });
  return (await call(z, rows)).x;
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function canvas(parent, width, height, kind) {
  const node = add(parent, "canvas", kind);
  node.width = width;
  node.height = height;
  return node;
}

const imageCanvas = parent => canvas(parent, shape[2], shape[1], shape[1] < 96 ? "pixels" : "");

// Image `index` of x, channels in [-1, 1]: grey, RGB or RGBA.
function paint(target, x, index) {
  const [channels, height, width] = shape, area = height * width, image = new ImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 4; c++) {
      const from = channels === 1 ? 0 : c;
      image.data[4 * i + c] = c === 3 && channels < 4 ? 255 : 127.5 * x[index * size + from * area + i] + 128;
    }
  }
  target.getContext("2d").putImageData(image, 0, 0);
}

// Points of x within [-extent, extent]^2, and for a path a line through them.
function plot(target, x, role, { alpha = 0.55, radius = 3.2, line = false } = {}) {
  const context = target.getContext("2d"), half = target.width / 2, scale = half / extent;
  context.globalAlpha = alpha;
  target.style.color = `var(${role})`;
  context.fillStyle = context.strokeStyle = getComputedStyle(target).color;
  context.lineWidth = 5;
  context.lineJoin = context.lineCap = "round";
  context.beginPath();
  for (let i = 0; i < x.length; i += 2) {
    const left = half + scale * x[i], top = half - scale * x[i + 1];
    if (line) context.lineTo(left, top);
    else { context.moveTo(left + radius, top); context.arc(left, top, radius, 0, 7); }
  }
  line ? context.stroke() : context.fill();
}

function name(target, text, [x, y]) {
  const context = target.getContext("2d"), half = target.width / 2;
  target.style.color = "var(--ink)";
  context.globalAlpha = 1;
  context.fillStyle = getComputedStyle(target).color;
  context.font = "650 36px system-ui, sans-serif";
  context.fillText(text, half + (half * x) / extent + 14, half - (half * y) / extent - 14);
}

const wipe = target => target.getContext("2d").clearRect(0, 0, target.width, target.height);

// --- the gallery -----------------------------------------------------------------------------------------------------

let turn = 0;                                                                           // a newer click ends older work
async function fresh() {
  const mine = ++turn;
  noise = new Float32Array(count * noiseSize);
  labels = Array.from({ length: count }, (_, i) => (!classes ? -1 : label >= 0 ? label : i % classes));
  for (let i = 0; i < count; i++) normals(seed, i, noise.subarray(i * noiseSize, (i + 1) * noiseSize));
  at("seed").textContent = seed;
  history.replaceState(null, "", `#seed=${seed}${label >= 0 ? `&class=${label}` : ""}`);
  samples = new Float32Array(count * size);
  let spent = 0;
  for (let start = 0; start < count;) {
    const many = Math.min(count - start, Math.max(1, Math.floor(150 / pace)));          // what 150 ms are enough for
    const { x, milliseconds } = await call(noise.slice(start * noiseSize, (start + many) * noiseSize), rowsOf(labels.slice(start, start + many)));
    if (mine !== turn) return;
    samples.set(x, start * size);
    if (!points) for (let i = 0; i < many; i++) paint(gallery[start + i], x, i);
    start += many;
    spent += milliseconds;
    pace = spent / start;
  }
  const shown = points ? 1000 * pace : pace;
  at("pace").textContent = `${shown.toFixed(shown < 1 ? 2 : shown < 20 ? 1 : 0)} ms`;
  if (points) cloud();
  await travel(true);
  root.dataset.drawn = seed;
}

function cloud() {
  if (!extent) {
    const sorted = Float32Array.from(samples, Math.abs).sort();
    extent = 1.25 * sorted[Math.floor(0.995 * sorted.length)] || 1;
  }
  wipe(gallery[0]);
  plot(gallery[0], samples, "--student");
}

// Sample k becomes A or B, by turns.
function choose(k) {
  ends[next] = k;
  next = 1 - next;
  travel(true);
}

let gallery = [];
function layOut() {
  if (points) {
    at("gallery").className = "cloud";
    gallery = [canvas(at("gallery"), 1000, 1000)];
    gallery[0].addEventListener("click", event => {
      const frame = gallery[0].getBoundingClientRect(), place = k => samples[k] / extent;
      const left = (2 * (event.clientX - frame.left)) / frame.width - 1, up = 1 - (2 * (event.clientY - frame.top)) / frame.height;
      const distance = k => Math.hypot(place(2 * k) - left, place(2 * k + 1) - up);
      let near = 0;
      for (let k = 1; k < count; k++) if (distance(k) < distance(near)) near = k;
      choose(near);
    });
    return;
  }
  at("gallery").className = shape[1] > 32 ? "" : "small";
  for (let k = 0; k < count; k++) {
    const button = add(at("gallery"), "button", "sample");
    button.type = "button";
    button.setAttribute("aria-label", `Sample ${k + 1}: choose as an end`);
    button.addEventListener("click", () => choose(k));
    gallery.push(imageCanvas(button));
  }
}

// --- between two samples ---------------------------------------------------------------------------------------------

let middle, thumbs = [], strip = [], route, wanted = false, busy = false;
function layOutBetween() {
  const place = document.querySelector(".ends");
  if (points) {
    place.classList.add("cloud");
    middle = canvas(place, 1000, 1000);
    return;
  }
  const end = name => { const box = add(place, "div", "end"); box.dataset.end = name; return imageCanvas(box); };
  const first = end("A");
  middle = imageCanvas(place);
  thumbs = [first, end("B")];
  strip = Array.from({ length: 9 }, () => imageCanvas(at("strip")));
}

// Draw the sample at the slider, and after a change of ends all of the way; while a draw runs only the latest wish counts.
async function travel(all) {
  wanted = wanted === "all" || all ? "all" : "one";
  if (busy) return;
  busy = true;
  while (wanted) {
    const everything = wanted === "all";
    wanted = false;
    if (everything && points) route = await path(Array.from({ length: 201 }, (_, i) => i / 200));
    else if (everything) {
      document.querySelectorAll(".sample").forEach((node, k) => {
        const names = ["A", "B"].filter((_, i) => ends[i] === k);
        if (names.length) node.dataset.end = names[0]; else delete node.dataset.end;
      });
      thumbs.forEach((node, i) => paint(node, samples, ends[i]));
      const x = await path(strip.map((_, i) => i / (strip.length - 1)));
      strip.forEach((node, i) => paint(node, x, i));
    }
    const here = await path([Number(at("where").value)]);
    if (points) {
      wipe(middle);
      plot(middle, samples, "--target", { alpha: 0.25 });
      plot(middle, route, "--student", { alpha: 0.9, line: true });
      plot(middle, here, "--student", { alpha: 1, radius: 16 });
      ends.forEach((k, i) => name(middle, "AB"[i], samples.subarray(2 * k, 2 * k + 2)));
    } else paint(middle, here, 0);
  }
  busy = false;
}

// --- controls --------------------------------------------------------------------------------------------------------

function pick(k) {
  label = k;
  document.querySelectorAll(".chip").forEach(chip => chip.setAttribute("aria-pressed", chip.value === String(k)));
  fresh();
}

function layOutClasses() {
  if (!classes) return;
  const names = [[-1, "All"], ...Array.from({ length: classes }, (_, k) => [k, String(k)])], box = at("classes");
  box.hidden = false;
  if (classes > 24) {
    const select = add(box, "select");
    select.setAttribute("aria-label", "Class");
    for (const [k, name] of names) select.add(new Option(k < 0 ? "All classes" : `Class ${name}`, k, false, k === label));
    select.addEventListener("change", () => pick(Number(select.value)));
    return;
  }
  for (const [k, name] of names) {
    const chip = add(box, "button", "chip");
    chip.type = "button";
    chip.value = k;
    chip.textContent = name;
    chip.setAttribute("aria-pressed", k === label);
    chip.addEventListener("click", () => pick(k));
  }
}

function themeButton(button) {
  let stored = null;
  try { stored = localStorage.getItem("limbeck-theme"); } catch { /* storage may be denied */ }
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("limbeck-theme", root.dataset.theme); } catch { /* as above */ }
    if (points && session) { cloud(); travel(); }
  });
}

async function start() {
  if (location.protocol === "file:") {
    tell("A browser lets no page on disk read its model: run `python3 -m http.server` in this folder and open http://localhost:8000");
    return;
  }
  tell(`Loading the generator: ${megabytes} MB, and 14 MB that run it …`);
  ort = await import("./ort.wasm.min.mjs");
  const answer = await fetch("model.onnx");
  if (!answer.ok) throw Error(`model.onnx: ${answer.status} ${answer.statusText}`);
  session = await ort.InferenceSession.create(new Uint8Array(await answer.arrayBuffer()), { executionProviders: ["wasm"] });
  for (const n of [1, 4]) pace = (await call(new Float32Array(n * noiseSize), new Float32Array(n * classes))).milliseconds / n;   // the first call is slower
  layOut();
  layOutBetween();
  layOutClasses();
  at("again").addEventListener("click", () => { seed += 1; fresh(); });
  at("where").addEventListener("input", () => travel());
  tell("");
  at("studio").hidden = false;
  await fresh();
}

themeButton(at("theme"));
const ready = start();
ready.catch(fault);
window.limbeck = { ready, generate: async (z, labels = []) => (await call(z, rowsOf(labels))).x };
