// Draws the data that the page carries. What computes is apart from what draws, so that it can be
// tested without a page. page.js comes before it.

// An allocation is [start, end, size, stack, address, stream]; they come in the order of starts.
const START = 0, END = 1, SIZE = 2, STACK = 3, ADDRESS = 4, STREAM = 5;

// Calls visit(column, live) for ascending positions; live holds the numbers of the allocations that
// are live there, the oldest first.
function sweep(allocations, positions, visit) {
  let live = [], next = 0;
  positions.forEach((position, column) => {
    while (next < allocations.length && allocations[next][START] <= position) live.push(next++);
    live = live.filter((i) => allocations[i][END] > position);
    visit(column, live);
  });
}

// The allocation that a stack of those live at `position` shows at `height` bytes; -1: none.
function hit(allocations, position, height) {
  let found = -1;
  sweep(allocations, [position], (_, live) => {
    let bytes = 0;
    for (const i of live) {
      if (height >= bytes && height < bytes + allocations[i][SIZE]) found = i;
      bytes += allocations[i][SIZE];
    }
  });
  return found;
}

// The value of steps [[position, value], ...] at a position.
function valueAt(steps, position) {
  let value = 0;
  for (const [from, to] of steps) if (from <= position) value = to;
  return value;
}

// The last event at or before a time; -1: none.
function eventAt(times, time) {
  let low = 0, high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= time) low = middle + 1; else high = middle;
  }
  return low - 1;
}

function stackText(data, stack) {
  const lines = data.stacks[stack].map((line) => data.lines[line]);
  return lines.length ? lines.join("\n") : "(no stack was recorded)";
}

// A colour by the place of allocation, as canvas pixels hold it: 0xAABBGGRR.
function colour(stack) {
  const hue = hueOf(stack), part = (shift) => {
    const k = (shift + hue / 30) % 12;
    return Math.round(255 * (0.58 - 0.26 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return (255 << 24 | part(4) << 16 | part(8) << 8 | part(0)) >>> 0;
}

function main(data) {
  const at = (id) => document.getElementById(id);
  const canvas = at("timeline"), context = canvas.getContext("2d");
  const width = canvas.width, height = canvas.height;
  let line, from, to, top, chosen = -1;

  const byTime = () => at("axis").value === "time";
  const whole = () => {
    const count = line.times.length;
    from = 0;
    to = (byTime() ? line.times[count - 1] : count) || 1;
  };
  const valueOf = (x) => from + (to - from) * x / width;
  // The last event that a pixel column shows; -1: what was there before the first one.
  const position = (x) => {
    const end = valueOf(Math.floor(x) + 1);
    const event = byTime() ? eventAt(line.times, end) : Math.ceil(end) - 1;
    return Math.min(event, line.times.length - 1);
  };
  const place = (event) =>
    width * ((byTime() ? line.times[Math.max(event, 0)] : event) - from) / (to - from);

  function draw() {
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const columns = Array.from({ length: width }, (_, x) => position(x));
    const sum = (live) => live.reduce((bytes, i) => bytes + line.allocations[i][SIZE], 0);
    top = 1;
    sweep(line.allocations, columns, (_, live) => { top = Math.max(top, sum(live)); });
    columns.forEach((p) => { top = Math.max(top, valueAt(line.reserved, p)); });
    top *= 1.05;
    sweep(line.allocations, columns, (x, live) => {
      let bytes = 0, done = 0;
      for (const i of live) {
        bytes += line.allocations[i][SIZE];
        const end = Math.round(height * bytes / top);
        const ink = i === chosen ? 0xff000000 : colour(line.allocations[i][STACK]);
        for (; done < end; ++done) pixels[(height - 1 - done) * width + x] = ink;
      }
    });
    context.putImageData(image, 0, 0);
    context.strokeStyle = "#888";
    context.beginPath();
    columns.forEach((p, x) => {
      const y = height - height * valueAt(line.reserved, p) / top;
      if (x) context.lineTo(x, y); else context.moveTo(x, y);
    });
    context.stroke();
    context.fillStyle = "#d22";
    context.font = "12px sans-serif";
    for (const [event, size] of line.ooms) {
      const x = place(event);
      context.fillRect(x - 1, 0, 2, height);
      context.fillText("out of memory: " + bytesText(size), x + 4, 14);
    }
    at("scale").textContent = "top " + bytesText(top) + ", " + (byTime()
      ? (from / 1000).toFixed(1) + " to " + (to / 1000).toFixed(1) + " ms"
      : "events " + Math.round(from) + " to " + Math.round(to));
  }

  function segments(device) {
    const list = at("segments"), shown = data.segments.filter((s) => s.device === device);
    const largest = Math.max(1, ...shown.map((s) => s.size));
    list.textContent = "";
    for (const segment of shown) {
      const row = document.createElement("div"), label = document.createElement("div");
      label.textContent = segment.label;
      row.className = "segment";
      row.style.width = Math.max(1, 100 * segment.size / largest) + "%";
      for (const [size, requested, state, stack, address] of segment.blocks) {
        const block = document.createElement("div");
        block.className = state;
        block.style.flexGrow = size;
        block.addEventListener("mousemove", (event) => showTip(event,
          "0x" + address.toString(16) + "  " + bytesText(size) + "  " + state +
          (state === "inactive" ? "" : "\nasked for " + requested + " bytes\n" +
            stackText(data, stack))));
        row.appendChild(block);
      }
      list.append(label, row);
    }
  }

  function choose() {
    const device = Number(at("device").value);
    line = data.timelines[device];
    chosen = -1;
    whole();
    draw();
    segments(device);
  }

  canvas.addEventListener("mousemove", (event) => {
    const y = height * (1 - event.offsetY / canvas.clientHeight);
    const p = position(width * event.offsetX / canvas.clientWidth);
    const found = hit(line.allocations, p, top * y / height);
    if (found !== chosen) { chosen = found; draw(); }
    if (found < 0) return showTip(event, "");
    const a = line.allocations[found];
    showTip(event, bytesText(a[SIZE]) + " at 0x" + a[ADDRESS].toString(16) + " on stream " + a[STREAM] +
      "\nevents " + (a[START] < 0 ? "before the record" : a[START]) + " to " +
      (a[END] < line.times.length ? a[END] : "the end") + "\n" + stackText(data, a[STACK]));
  });
  dragZoom(canvas, (a, b) => {
    [from, to] = [valueOf(width * a), valueOf(width * b)];
    draw();
  }, () => { whole(); draw(); });
  document.addEventListener("mouseout", () => showTip({ clientX: 0, clientY: 0 }, ""));
  at("axis").addEventListener("change", () => { whole(); draw(); });
  at("device").addEventListener("change", choose);
  choose();
}

if (typeof document !== "undefined") main(JSON.parse(document.getElementById("data").textContent));
