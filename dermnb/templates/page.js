"use strict";
(function () {
  var styles = null, boxes = [], paper = false;
  var scheme = window.matchMedia("(prefers-color-scheme: dark)");

  function dark() {
    return scheme.matches && !paper;
  }

  // The figure in the colors of the page; one with a style of its own keeps it.
  function read(box) {
    var text = document.getElementById(box.dataset.figure).textContent;
    var figure = JSON.parse(text);
    if (figure.layout.template) return figure;
    if (dark()) {
      text = text.replace(/"(#[0-9A-F]{6})"/g, function (all, color) {
        return styles.swap[color] ? '"' + styles.swap[color] + '"' : all;
      });
      figure = JSON.parse(text);
    }
    figure.layout.template = dark() ? styles.dark : styles.light;
    if (paper) figure.layout.width = Math.min(box.clientWidth, 660);
    return figure;
  }

  function show(box) {
    var figure = read(box);
    Plotly.react(box, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      // Of plotly's own buttons, those that send nothing anywhere.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      showSendToCloud: false,
      plotlyServerURL: "",
    });
    // The drawing is the image; the buttons beside it are not part of one.
    var drawings = box.querySelectorAll("svg.main-svg");
    Array.prototype.forEach.call(drawings, function (svg, i) {
      svg.setAttribute(i ? "aria-hidden" : "role", i ? "true" : "img");
      if (!i) svg.setAttribute("aria-label", box.getAttribute("aria-label"));
    });
    box.setAttribute("role", "group");
  }

  // Figures are drawn when they come near the screen, or when the page is printed.
  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "1";
    var fallback = box.querySelector(".fallback");
    if (typeof Plotly === "undefined") {
      fallback.hidden = false;
      return;
    }
    fallback.remove();
    show(box);
  }

  function redraw() {
    boxes.forEach(function (box) {
      if (box.dataset.drawn && typeof Plotly !== "undefined") show(box);
    });
  }

  function print(on) {
    if (paper === on) return;
    paper = on;
    if (on) {
      document.querySelectorAll("details:not(.code)").forEach(function (d) {
        if (!d.open) d.dataset.closed = "1";
        d.open = true;
      });
      boxes.forEach(draw);
    } else {
      document.querySelectorAll("details[data-closed]").forEach(function (d) {
        d.open = false;
        delete d.dataset.closed;
      });
    }
    redraw();
  }

  // What a row is sorted by: the number that a cell shows, or its text; null is last.
  function key(cell, numeric) {
    if (!cell) return null;
    var text = cell.dataset.v;
    if (text === undefined) text = (numeric ? cell.firstChild || cell : cell).textContent.trim();
    if (text === "" || (numeric && text === "\u2013")) return null;
    if (!numeric) return text;
    return Number(text.replace(/,/g, "").replace("\u2212", "-"));
  }

  function sortable(table) {
    var body = table.tBodies[0];
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener("click", function () {
        var now = head.getAttribute("aria-sort");
        var numeric = head.classList.contains("n");
        var up = now ? now === "descending" : !numeric;
        var sign = up ? 1 : -1;
        Array.prototype.forEach.call(table.tHead.rows[0].cells, function (other) {
          other.removeAttribute("aria-sort");
        });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        Array.prototype.slice
          .call(body.rows)
          .sort(function (a, b) {
            var x = key(a.cells[column], numeric), y = key(b.cells[column], numeric);
            if (x === null || y === null) return (x === null) - (y === null);
            return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
          })
          .forEach(function (row) { body.appendChild(row); });
      });
    });
  }

  // A link into a fold opens it.
  function unfold() {
    var target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    var part = target && target.querySelector(":scope > details.part");
    if (part) part.open = true;
    for (var at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView();
  }

  document.addEventListener("DOMContentLoaded", function () {
    styles = JSON.parse(document.getElementById("figure-style").textContent);
    boxes = Array.prototype.slice.call(document.querySelectorAll("[data-figure]"));
    if ("IntersectionObserver" in window) {
      var near = new IntersectionObserver(
        function (entries) {
          entries.forEach(function (entry) {
            if (!entry.isIntersecting) return;
            near.unobserve(entry.target);
            draw(entry.target);
          });
        },
        { rootMargin: "600px" }
      );
      boxes.forEach(function (box) {
        var seen = box.checkVisibility ? box.checkVisibility() : box.getClientRects().length > 0; // in no closed fold
        if (seen && box.getBoundingClientRect().top < window.innerHeight) draw(box);
        else near.observe(box);
      });
    } else {
      boxes.forEach(draw);
    }
    document.querySelectorAll("table.sortable").forEach(sortable);
    window.addEventListener("hashchange", unfold);
    unfold();
    scheme.addEventListener("change", redraw);
    window.addEventListener("beforeprint", function () { print(true); });
    window.addEventListener("afterprint", function () { print(false); });
    var media = window.matchMedia("print");
    media.addEventListener("change", function () { print(media.matches); });
  });
})();
