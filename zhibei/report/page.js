"use strict";
(function () {
  // The language is remembered per browser where storage is allowed (a page opened from file:// may not).
  var chinese = document.getElementById("language-zh");
  var english = document.getElementById("language-en");
  function remember() {
    document.documentElement.lang = chinese.checked ? "zh-Hans" : "en";
    try { localStorage.setItem("zhibei-language", chinese.checked ? "zh" : "en"); } catch (error) { /* not allowed here */ }
  }
  var wanted = null;
  try { wanted = localStorage.getItem("zhibei-language"); } catch (error) { /* not allowed here */ }
  if (location.hash === "#zh") { wanted = "zh"; }
  if (wanted === null && /^zh/i.test(navigator.language || "")) { wanted = "zh"; }
  if (wanted === "zh") { chinese.checked = true; document.documentElement.lang = "zh-Hans"; }
  chinese.addEventListener("change", remember);
  english.addEventListener("change", remember);

  function nearest(steps, step) {
    var low = 0, high = steps.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (steps[middle] < step) { low = middle; } else { high = middle; }
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  }
  function numbers(text) { return text.split(" ").map(Number); }

  document.querySelectorAll("figure.chart svg[data-first]").forEach(function (svg) {
    var readout = svg.parentNode.querySelector(".readout");
    var cursor = svg.querySelector(".cursor");
    var first = Number(svg.dataset.first), last = Number(svg.dataset.last);
    var left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    var series = null;
    function load() {
      series = Array.prototype.map.call(svg.querySelectorAll("polyline"), function (line) {
        return { en: line.dataset.en, zh: line.dataset.zh, steps: numbers(line.dataset.steps), values: numbers(line.dataset.values) };
      });
    }
    svg.addEventListener("pointermove", function (event) {
      if (series === null) { load(); }
      var box = svg.getBoundingClientRect();
      var x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (x < left || x > right) { return hide(); }
      var step = first + (x - left) / (right - left) * (last - first);
      readout.textContent = "";
      var at = null;
      series.forEach(function (one) {
        var index = nearest(one.steps, step);
        if (at === null) { at = one.steps[index]; }
        var row = document.createElement("div");
        row.textContent = (chinese.checked ? one.zh : one.en) + ": " + one.values[index] +
          (one.steps[index] === at ? "" : (chinese.checked ? "（步 " : " (step ") + one.steps[index].toLocaleString("en") + (chinese.checked ? "）" : ")"));
        readout.appendChild(row);
      });
      var head = document.createElement("b");
      head.textContent = (chinese.checked ? "步 " : "step ") + at.toLocaleString("en");
      readout.insertBefore(head, readout.firstChild);
      readout.hidden = false;
      var place = left + (at - first) / (last - first) * (right - left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.style.visibility = "visible";
      var pixels = event.clientX - box.left;
      readout.style.left = (pixels > box.width / 2 ? Math.max(0, pixels - readout.offsetWidth - 16) : pixels + 16) + "px";
    });
    function hide() { readout.hidden = true; cursor.style.visibility = "hidden"; }
    svg.addEventListener("pointerleave", hide);
  });
})();
