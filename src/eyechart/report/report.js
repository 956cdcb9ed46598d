"use strict";
// Reads the page's data, draws the figures, and makes the table of heads sort and filter.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // Sorting and filtering.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const headers = [...table.tHead.rows[0].cells];
    const key = (row, column) =>
      column === 0 ? original.indexOf(row) : parseFloat(row.cells[column].textContent);
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        // Large values first, except for the names; again turns the order round.
        const first = column === 0 ? "ascending" : "descending";
        const other = column === 0 ? "descending" : "ascending";
        const order = header.getAttribute("aria-sort") === first ? other : first;
        headers.forEach((cell) => cell.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const keyed = original.map((row) => [key(row, column), row]);
        keyed.sort(([a], [b]) => {
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return sign * (a - b);
        });
        body.append(...keyed.map(([, row]) => row));
      });
    });
    const input = document.getElementById(table.dataset.filter);
    const count = document.getElementById(table.dataset.count);
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of original) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${original.length} heads`;
    });
  }

  // Plotly figures, in the page's own ink, which follows the colour scheme.
  const ink = () => getComputedStyle(document.body).color;
  const plot = (name, figure) => {
    const place = document.getElementById(`figure-${name}`);
    Object.assign(figure.layout.font, { color: ink(), family: getComputedStyle(document.body).fontFamily });
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
    return place;
  };
  const plots = Object.entries(data.figures).map(([name, figure]) => plot(name, figure));
  // Maps of the information flow share one place.
  const choices = [...document.getElementsByName("map")];
  const choose = () => plot("map", data.maps[choices.find((choice) => choice.checked).value]);
  for (const choice of choices) choice.addEventListener("change", choose);
  if (choices.length) plots.push(choose());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of plots) Plotly.relayout(place, { "font.color": ink() });
  });

  // Attention patterns: small ones in the buttons, a large one of the head that is chosen. Large
  // ones are drawn when first asked for and kept, because drawing one takes a moment.
  if (data.patterns) {
    const { props, steps } = data.patterns;
    const heads = data.patterns.heads.map((rows) => rows.map((row) => row.map((n) => n / steps)));
    const draw = (id, more) =>
      CircuitsVis.render(id, CircuitsVis.AttentionPattern, { ...props, ...more });
    // Rows end at the query. The large view greys out what no query can see, and so needs it.
    const square = (rows) =>
      rows.map((row) => row.concat(Array(rows.length - row.length).fill(0)));
    const view = document.getElementById("attention-view");
    const buttons = [...document.querySelectorAll("button[data-head]")];
    const show = (head) => {
      const id = `attention-${head}`;
      if (!document.getElementById(id)) {
        view.append(Object.assign(document.createElement("div"), { id }));
        draw(id, { attention: square(heads[head]), zoomed: true });
      }
      for (const large of view.children) large.hidden = large.id !== id;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === head)));
      document.getElementById("attention-name").textContent = [...buttons[head].children].slice(1).map((part) => part.textContent).join(": ");
    };
    buttons.forEach((button, head) => {
      draw(`thumb-${head}`, { attention: heads[head], showAxisLabels: false });
      button.addEventListener("click", () => show(head));
    });
    show(0);
  }
})();
