"use strict";
// What the scripts of all pages use.

function bytesText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 4) { bytes /= 1024; ++unit; }
  return (unit ? bytes.toFixed(2) : bytes) + " " + units[unit];
}

// A hue for the nth of many things: neighbours are far apart.
function hueOf(number) { return (number * 137.508) % 360; }

// Text beside the mouse; an empty one hides it.
function showTip(event, text) {
  const tip = document.getElementById("tip");
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  tip.style.left = Math.max(0, Math.min(event.clientX + 14, window.innerWidth - 480)) + "px";
  tip.style.top = event.clientY + 14 + "px";
}

// Dragging over a canvas calls zoom(from, to), parts of its width; a double click calls whole().
function dragZoom(canvas, zoom, whole) {
  let start = null;
  canvas.addEventListener("mousedown", (event) => { start = event.offsetX; });
  canvas.addEventListener("mouseup", (event) => {
    const end = event.offsetX, from = start;
    start = null;
    if (from === null || Math.abs(end - from) <= 4) return;
    zoom(Math.min(from, end) / canvas.clientWidth, Math.max(from, end) / canvas.clientWidth);
  });
  canvas.addEventListener("dblclick", whole);
}
