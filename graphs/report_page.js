// Draws a report. What computes is apart from what draws, so that it can be tested without a page.
// page.js comes before it.

// An op is [name, phase, line, call, is a view, bytes read, bytes written, buffers].
const NAME = 0, PHASE = 1, LINE = 2, CALL = 3, VIEW = 4, READ = 5, WRITTEN = 6, BUFFERS = 7;
// A block is [buffer, name, first op, last op, offset, bytes, whose place it took].
const BUFFER = 0, LABEL = 1, FIRST = 2, LAST = 3, OFFSET = 4, BYTES = 5, TAKEN = 6;
const ROW = 22, MOST_BARS = 24, MOST_DECISIONS = 500, MOST_HOLDERS = 12;

function timeText(us) {
  if (us >= 1e6) return (us / 1e6).toPrecision(3) + " s";
  if (us >= 1e3) return (us / 1e3).toPrecision(3) + " ms";
  return us >= 1 ? us.toPrecision(3) + " µs" : Math.round(us * 1e3) + " ns";
}

function lineText(data, number) { return number < 0 ? "" : data.lines[number][0]; }

// Microseconds of each op; undefined for one that was not timed.
function timesOf(capture) {
  const times = new Array(capture.ops.length);
  if (capture.profile) for (const [op, us] of capture.profile.times) times[op] = us;
  return times;
}

// Groups of the ops that run: [{name, total, ops, parts: by phase}], the largest first.
function grouped(data, capture, group, measure) {
  const times = timesOf(capture), groups = new Map();
  const weight = { time: (op, at) => times[at] || 0, ops: () => 1,
    bytes: (op) => op[READ] + op[WRITTEN] }[measure];
  const key = { op: (op) => op[NAME], phase: (op) => data.phases[op[PHASE]],
    line: (op) => op[LINE] }[group];
  capture.ops.forEach((op, at) => {
    if (op[VIEW]) return;
    const name = key(op);
    if (!groups.has(name)) groups.set(name, { name, total: 0, ops: 0, parts: [0, 0, 0] });
    const found = groups.get(name), value = weight(op, at);
    found.total += value;
    found.ops += 1;
    found.parts[op[PHASE]] += value;
  });
  return [...groups.values()].sort((a, b) => b.total - a.total);
}

// The largest groups, and one for the rest.
function shortened(groups, most) {
  if (groups.length <= most) return groups;
  const rest = groups.slice(most - 1);
  const sum = { name: null, total: 0, ops: 0, parts: [0, 0, 0], groups: rest.length };
  for (const one of rest) {
    sum.total += one.total;
    sum.ops += one.ops;
    one.parts.forEach((value, phase) => { sum.parts[phase] += value; });
  }
  return [...groups.slice(0, most - 1), sum];
}

// Numbers of the ops that hold every word of a query.
function search(data, capture, query, views) {
  const words = query.toLowerCase().split(/\s+/).filter((word) => word), found = [];
  capture.ops.forEach((op, at) => {
    if (op[VIEW] && !views) return;
    const text = [at, op[NAME], data.phases[op[PHASE]], lineText(data, op[LINE]), op[CALL]]
      .join(" ").toLowerCase();
    if (words.every((word) => text.includes(word))) found.push(at);
  });
  return found;
}

// The block at an op and an offset, -1: none. Where one takes another's place, the newer one.
function blockAt(blocks, op, offset) {
  let found = -1;
  blocks.forEach((b, i) => {
    if (b[FIRST] <= op && op <= b[LAST] && b[OFFSET] <= offset && offset < b[OFFSET] + b[BYTES])
      found = i;
  });
  return found;
}

// Who holds an arena's memory where most is live: [line, bytes, buffers], the most first.
function holders(capture, arena) {
  const sums = new Map();
  for (const number of arena.at_peak) {
    const block = arena.blocks[number], line = capture.ops[block[FIRST]][LINE];
    if (!sums.has(line)) sums.set(line, [line, 0, 0]);
    sums.get(line)[1] += block[BYTES];
    sums.get(line)[2] += 1;
  }
  return [...sums.values()].sort((a, b) => b[1] - a[1]);
}

function main(data) {
  const at = (id) => document.getElementById(id);
  const canvas = at("plan"), context = canvas.getContext("2d");
  let capture, times, arena, from, to, shown = [], chosen = -1, hovered = -1;

  function make(tag, text, parent, name) {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    if (name) made.className = name;
    if (parent) parent.appendChild(made);
    return made;
  }

  function rows(table, head, list) {
    table.textContent = "";
    const top = make("tr", null, make("thead", null, table));
    for (const name of head) make("th", name, top);
    const body = make("tbody", null, table);
    for (const cells of list) {
      const row = make("tr", null, body);
      for (const cell of cells) make("td", String(cell), row);
    }
  }

  function options(select, texts) {
    select.textContent = "";
    texts.forEach(([value, text]) => { make("option", text, select).value = value; });
  }

  function summary() {
    const box = at("summary");
    box.textContent = "";
    const add = (value, text) => {
      const one = make("div", null, box);
      make("b", value, one);
      make("span", text, one);
    };
    const count = capture.ops.filter((op) => !op[VIEW]).length;
    add(count.toLocaleString("en"), "ops of " + capture.recorded.toLocaleString("en") + " recorded");
    add(capture.replays.toLocaleString("en"), capture.replays === 1 ? "replay" : "replays");
    if (capture.profile) add(timeText(capture.profile.replay),
      "a replay, median of " + capture.profile.runs + "; op by op " + timeText(capture.profile.total));
    for (const one of capture.arenas) {
      const above = one.bound ? 100 * (one.nbytes / one.bound - 1) : 0;
      add(bytesText(one.nbytes), "arena on " + one.device + ", " + above.toFixed(1) +
        "% above the least possible, " + one.blocks.length + " buffers");
      if (one.blocks.length) {
        const peak = capture.ops[one.peak];
        add("op " + one.peak, peak[NAME] + ": there most is live (" + data.phases[peak[PHASE]] +
          ", " + lineText(data, peak[LINE]) + ")");
      }
    }
    add(bytesText(capture.memory.state || 0), "state: weights, moments, inputs");
    if (capture.memory.constant) add(bytesText(capture.memory.constant), "constants");
    add(bytesText(capture.memory.output || 0), "results and gradients");
    add(capture.bound.startsWith("bit") ? "bitwise" : "bounded", "results are " + capture.bound);
    const list = at("again");
    list.textContent = "";
    for (const text of capture.again) make("li", text, list);
  }

  function bars() {
    const group = at("group").value, measure = at("measure").value, box = at("bars");
    const all = grouped(data, capture, group, measure);
    const total = all.reduce((sum, one) => sum + one.total, 0) || 1;
    const text = { time: timeText, ops: (n) => n.toLocaleString("en"), bytes: bytesText }[measure];
    const list = shortened(all, MOST_BARS);
    const largest = list.reduce((most, one) => Math.max(most, one.total), 0) || 1;
    box.textContent = "";
    box.className = group === "line" ? "wide" : "";
    for (const one of list) {
      const row = make("div", null, box, "bar");
      const line = group === "line" && one.name !== null ? data.lines[one.name] : undefined;
      const name = one.name === null ? one.groups + " others"
        : group !== "line" ? one.name : line ? line[0] + "  " + line[4] : "no line";
      make("span", name, row);
      const bar = make("div", null, row);
      one.parts.forEach((value, phase) => {
        if (value) make("div", null, bar, data.phases[phase]).style.width =
          100 * value / largest + "%";
      });
      make("span", text(one.total) + "  " + (100 * one.total / total).toFixed(1) + "%  " +
        one.ops + (one.ops === 1 ? " op" : " ops"), row);
      row.addEventListener("mousemove", (event) => showTip(event,
        (line ? line[1] + ":" + line[2] + " " + line[3] + "\n" + line[4] : name) + "\n" +
        one.parts.map((value, phase) => [value, data.phases[phase]]).filter(([value]) => value)
          .map(([value, phase]) => phase + " " + text(value)).join(", ")));
      row.addEventListener("mouseleave", (event) => showTip(event, ""));
    }
  }

  function ink(name) { return getComputedStyle(document.body).getPropertyValue(name).trim(); }

  // Of the canvas in CSS pixels, without the strip of phases.
  const STRIP = 8;
  const width = () => canvas.clientWidth, height = () => canvas.clientHeight - STRIP;
  const xOf = (op) => (op - from) / (to - from) * width();
  const yOf = (bytes) => height() * (1 - bytes / (1.04 * Math.max(arena.nbytes, 1)));

  function plan() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (!arena) return;
    const marked = new Set(chosen < 0 ? [] : capture.ops[chosen][BUFFERS]);
    arena.blocks.forEach((b, i) => {
      const x = xOf(b[FIRST]), right = xOf(b[LAST] + 1);
      if (right < 0 || x > width()) return;
      const y = yOf(b[OFFSET] + b[BYTES]), w = Math.max(right - x, 1);
      const h = Math.max(yOf(b[OFFSET]) - y, 1), line = capture.ops[b[FIRST]][LINE];
      const bright = i === hovered || marked.has(b[BUFFER]);
      context.fillStyle = "hsl(" + hueOf(line + 1) + " 60% " + (bright ? 75 : 46 + b[FIRST] * 7 % 13) + "%)";
      context.fillRect(x, y, w, h);
      context.strokeStyle = bright ? ink("--ink") : ink("--paper");
      context.lineWidth = bright ? 1.5 : 0.5;
      if (w > 3 && h > 3 || bright) context.strokeRect(x, y, w, h);
    });
    context.lineWidth = 1.2;
    context.strokeStyle = ink("--ink");
    context.beginPath();
    arena.live.forEach((bytes, op) => {
      context.lineTo(xOf(op), yOf(bytes));
      context.lineTo(xOf(op + 1), yOf(bytes));
    });
    context.stroke();
    context.setLineDash([5, 4]);
    context.beginPath();
    context.moveTo(0, yOf(arena.bound));
    context.lineTo(width(), yOf(arena.bound));
    context.stroke();
    context.setLineDash([]);
    let start = 0;
    capture.ops.forEach((op, n) => {
      const next = capture.ops[n + 1];
      if (next && next[PHASE] === op[PHASE]) return;
      context.fillStyle = ink("--" + data.phases[op[PHASE]]);
      context.fillRect(xOf(start), height(), xOf(n + 1) - xOf(start), STRIP);
      start = n + 1;
    });
    at("scale").textContent = "ops " + Math.max(0, Math.floor(from)) + " to " +
      Math.min(capture.ops.length - 1, Math.ceil(to) - 1) + ", " + bytesText(arena.nbytes) +
      " high, least possible " + bytesText(arena.bound);
  }

  function opText(number) {
    const op = capture.ops[number], line = op[LINE] < 0 ? null : data.lines[op[LINE]];
    return "op " + number + ", " + data.phases[op[PHASE]] +
      (times[number] === undefined ? "" : ", " + timeText(times[number])) + "\n" + op[CALL] +
      (op[VIEW] ? "\n(only names memory)"
        : "\nreads " + bytesText(op[READ]) + ", writes " + bytesText(op[WRITTEN])) +
      (line ? "\n" + line[1] + ":" + line[2] + " " + line[3] + "\n" + line[4] : "");
  }

  canvas.addEventListener("mousemove", (event) => {
    if (!arena || !capture.ops.length) return;
    const op = Math.min(Math.max(Math.floor(from + (to - from) * event.offsetX / width()), 0),
      capture.ops.length - 1);
    const offset = (1 - event.offsetY / height()) * 1.04 * Math.max(arena.nbytes, 1);
    const found = blockAt(arena.blocks, op, offset);
    if (found !== hovered) { hovered = found; plan(); }
    const b = arena.blocks[found];
    showTip(event, b
      ? b[LABEL] + ": " + bytesText(b[BYTES]) + " at " + b[OFFSET].toLocaleString("en") +
        ", ops " + b[FIRST] + " to " + b[LAST] + (b[TAKEN] ? ", in place of " + b[TAKEN] : "") +
        "\nmade by " + opText(b[FIRST])
      : bytesText(arena.live[op]) + " live at " + opText(op));
  });
  canvas.addEventListener("mouseleave", (event) => {
    showTip(event, "");
    if (hovered >= 0) { hovered = -1; plan(); }
  });
  const whole = () => { from = 0; to = Math.max(capture.ops.length, 1); };
  dragZoom(canvas, (a, b) => {
    [from, to] = [from + (to - from) * a, from + (to - from) * b];
    if (to - from < 1) to = from + 1;
    plan();
  }, () => { whole(); plan(); });

  function passes() {
    rows(at("passes"), ["pass", "ops before", "after"], capture.passes);
    const refused = capture.decisions.filter((d) => !d[1]).length;
    at("verdicts").style.display = capture.decisions.length ? "" : "none";
    const list = capture.decisions.filter((d) => at(d[1] ? "made" : "refused").checked);
    const box = at("decisions");
    box.textContent = "";
    for (const [by, made, text, op, line, place] of list.slice(0, MOST_DECISIONS)) {
      const row = make("div", null, box, made ? "decision" : "decision refused");
      make("span", by, row);
      make("span", made ? "made" : "refused", row);
      make("span", text, row);
      make("span", (place < 0 ? "" : place + " ") + op + " " + lineText(data, line), row);
    }
    if (list.length > MOST_DECISIONS)
      make("div", "and " + (list.length - MOST_DECISIONS) + " more", box, "note");
    at("made").disabled = refused === capture.decisions.length;
    at("refused").disabled = refused === 0;
  }

  // Only the rows in sight are elements of the page.
  function tape() {
    const box = at("tape");
    box.textContent = "";
    make("div", null, box).style.height = shown.length * ROW + "px";
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 5);
    const last = Math.min(shown.length, first + Math.ceil(440 / ROW) + 10);
    for (let n = first; n < last; ++n) {
      const number = shown[n], op = capture.ops[number];
      const row = make("div", null, box, "row" + (op[VIEW] ? " view" : "") +
        (number === chosen ? " chosen" : ""));
      row.style.top = n * ROW + "px";
      for (const text of [number, op[NAME], data.phases[op[PHASE]], lineText(data, op[LINE]),
        times[number] === undefined ? "" : timeText(times[number]), op[CALL]])
        make("span", String(text), row);
      row.addEventListener("mousemove", (event) => showTip(event, opText(number)));
      row.addEventListener("mouseleave", (event) => showTip(event, ""));
      row.addEventListener("click", () => {
        chosen = chosen === number ? -1 : number;
        tape();
        plan();
      });
    }
  }

  function find() {
    shown = search(data, capture, at("search").value, at("views").checked);
    at("found").textContent = shown.length === 1 ? "1 op" : shown.length.toLocaleString("en") + " ops";
    at("tape").scrollTop = 0;
    tape();
  }

  function chooseArena() {
    arena = capture.arenas[Number(at("arena").value) || 0];
    hovered = -1;
    const list = arena ? holders(capture, arena) : [];
    at("peak").textContent = list.length ? "Live at op " + arena.peak + ", where most is" : "";
    rows(at("holders"), list.length ? ["bytes", "buffers", "line", ""] : [],
      list.slice(0, MOST_HOLDERS).map(([line, bytes, buffers]) => [bytesText(bytes), buffers,
        lineText(data, line) || "no line", line < 0 ? "" : data.lines[line][4]]));
    whole();
    plan();
  }

  function choose() {
    capture = data.captures[Number(at("capture").value)];
    times = timesOf(capture);
    chosen = -1;
    options(at("measure"), [...(capture.profile ? [["time", "Time"]] : []), ["ops", "Ops"],
      ["bytes", "Bytes read and written"]]);
    options(at("arena"), capture.arenas.map((one, n) => [n, one.device]));
    at("untimed").style.display = capture.profile ? "none" : "";
    rows(at("facts"), ["", ""], capture.facts);
    summary();
    bars();
    chooseArena();
    passes();
    find();
  }

  options(at("capture"), data.captures.map((one, n) => [n, one.number + " of " +
    data.captures.length + (one.again[0] ? ": " + one.again[0].replace("captured again: ", "") : "")]));
  at("capture").value = String(data.shown);
  at("choice").style.display = data.captures.length > 1 ? "" : "none";
  for (const phase of data.phases) {
    const one = make("span", null, at("legend"));
    make("i", null, one, phase);
    one.appendChild(document.createTextNode(phase));
  }
  for (const [id, act] of [["capture", choose], ["measure", bars], ["group", bars],
    ["arena", chooseArena], ["made", passes], ["refused", passes], ["views", find]])
    at(id).addEventListener("change", act);
  at("search").addEventListener("input", find);
  at("tape").addEventListener("scroll", tape);
  window.addEventListener("resize", plan);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plan);
  choose();
}

if (typeof document !== "undefined") main(JSON.parse(document.getElementById("data").textContent));
