"use strict";
(function () {
  // Figures are drawn when they come near the screen, or when the page is printed.
  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "1";
    var fallback = box.querySelector(".fallback");
    if (typeof Plotly === "undefined") {
      fallback.hidden = false;
      return;
    }
    var source = document.getElementById(box.dataset.figure);
    var figure = JSON.parse(source.textContent);
    fallback.remove();
    if (!figure.layout.template) {
      figure.layout.template = JSON.parse(document.getElementById("figure-template").textContent);
    }
    Plotly.newPlot(box, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      // Of plotly's own buttons, those that send nothing anywhere.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      showSendToCloud: false,
      plotlyServerURL: "",
    });
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
        var up = now ? now === "descending" : !head.classList.contains("num");
        var sign = up ? 1 : -1;
        Array.prototype.forEach.call(table.tHead.rows[0].cells, function (other) {
          other.removeAttribute("aria-sort");
        });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var key = function (row) {
          var cell = row.cells[column];
          if (!cell) return null;
          var text = cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v;
          if (text === "") return null;
          return head.classList.contains("num") ? Number(text) : text;
        };
        Array.prototype.slice
          .call(body.rows)
          .sort(function (a, b) {
            var x = key(a), y = key(b);
            if (x === null || y === null) return (x === null) - (y === null);
            return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
          })
          .forEach(function (row) { body.appendChild(row); });
      });
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    var boxes = Array.prototype.slice.call(document.querySelectorAll("[data-figure]"));
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
        var seen = box.getClientRects().length > 0; // not inside a closed fold
        if (seen && box.getBoundingClientRect().top < window.innerHeight) draw(box);
        else near.observe(box);
      });
    } else {
      boxes.forEach(draw);
    }
    document.querySelectorAll("table.sortable").forEach(sortable);
    window.addEventListener("beforeprint", function () {
      document.querySelectorAll("details:not(.code)").forEach(function (d) { d.open = true; });
      boxes.forEach(draw);
    });
  });
})();
