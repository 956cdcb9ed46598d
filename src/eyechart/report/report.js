"use strict";
// Reads the page's data, draws the figures, makes tables of heads sort and filter, and opens heads.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // Sorting and filtering.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const headers = [...table.tHead.rows[0].cells];
    const places = new Map(original.map((row, index) => [row, index]));
    // What a row is sorted by; null where it has nothing to be sorted by.
    const key = (row, column, words) => {
      if (column === 0) return places.get(row);
      const text = row.cells[column].textContent;
      if (words) return text || null;
      const number = parseFloat(text);
      return Number.isNaN(number) ? null : number;
    };
    headers.forEach((header, column) => {
      const words = header.dataset.sort === "text";
      header.querySelector("button").addEventListener("click", () => {
        // Large values first, except for names and words; again turns the order round.
        const [first, other] = column === 0 || words ? ["ascending", "descending"] : ["descending", "ascending"];
        const order = header.getAttribute("aria-sort") === first ? other : first;
        headers.forEach((cell) => cell.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const keyed = original.map((row) => [key(row, column, words), row]);
        keyed.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (a < b ? -1 : a > b);
        });
        body.append(...keyed.map(([, row]) => row));
      });
    });
    // A row is shown where every control lets it: text is looked for in the name, a choice must be
    // the whole of its column.
    const controls = document.getElementById(table.dataset.controls);
    const wishes = [...controls.querySelectorAll("input, select")];
    const fits = (row) =>
      wishes.every(({ value, dataset }) => {
        if (dataset.column) return !value || row.cells[dataset.column].textContent === value;
        return row.cells[0].textContent.toLowerCase().includes(value.trim().toLowerCase());
      });
    controls.addEventListener("input", () => {
      let shown = 0;
      for (const row of original) shown += !(row.hidden = !fits(row));
      controls.querySelector("output").textContent = `${shown} of ${original.length} heads`;
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
  const plots = new Set(Object.entries(data.figures).map(([name, figure]) => plot(name, figure)));
  // Figures that share their places, one choice at a time, and the words that go with a choice.
  for (const [name, options] of Object.entries(data.choices)) {
    const radios = [...document.getElementsByName(name)];
    const places = new Set(Object.values(options).flatMap((figures) => Object.keys(figures)));
    const choose = () => {
      const chosen = radios.find((radio) => radio.checked).value;
      for (const part of document.querySelectorAll(`[data-choice="${name}"]`)) {
        part.hidden = part.dataset.value !== chosen;
      }
      for (const place of places) {
        const figure = options[chosen][place];
        const panel = document.getElementById(`panel-${place}`);
        if (panel) panel.hidden = !figure;
        if (figure) plots.add(plot(place, figure));
      }
    };
    for (const radio of radios) radio.addEventListener("change", choose);
    choose();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of plots) Plotly.relayout(place, { "font.color": ink() });
  });

  // Attention patterns. Large views are drawn when first asked for and kept, because drawing one
  // takes a moment. They grey out what no query can see, and so need the rows, which end at the
  // query, made as long as one another.
  const draw = (id, props) => CircuitsVis.render(id, CircuitsVis.AttentionPattern, props);
  const square = (rows) => rows.map((row) => row.concat(Array(rows.length - row.length).fill(0)));
  const viewer = (name, props, rowsOf) => (head, words) => {
    const view = document.getElementById(`${name}-view`);
    const id = `${name}-${head}`;
    if (!document.getElementById(id)) {
      view.append(Object.assign(document.createElement("div"), { id }));
      draw(id, { ...props, attention: square(rowsOf(head)), zoomed: true });
    }
    for (const large of view.children) large.hidden = large.id !== id;
    document.getElementById(`${name}-name`).textContent = words;
  };

  // Of the heads that stand out: small ones in the buttons, a large one of the one that is chosen.
  if (data.patterns) {
    const { props, steps } = data.patterns;
    const heads = data.patterns.heads.map((rows) => rows.map((row) => row.map((n) => n / steps)));
    const open = viewer("attention", props, (head) => heads[head]);
    const buttons = [...document.querySelectorAll("button[data-head]")];
    const show = (head) => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === head)));
      open(head, [...buttons[head].children].slice(1).map((part) => part.textContent).join(": "));
    };
    buttons.forEach((button, head) => {
      draw(`thumb-${head}`, { ...props, attention: heads[head], showAxisLabels: false });
      button.addEventListener("click", () => show(head));
    });
    show(0);
  }

  // Of every head of a census: lower triangles one after the other, in the order of the table.
  if (data.census) {
    const { props, size, steps, first } = data.census;
    const packed = atob(data.census.packed);
    const each = (size * (size + 1)) / 2;
    const triangle = (head) =>
      Array.from({ length: size }, (_, query) => {
        const start = head * each + (query * (query + 1)) / 2;
        return Array.from({ length: query + 1 }, (_, key) => packed.charCodeAt(start + key) / steps);
      });
    const open = viewer("census", props, triangle);
    const table = document.getElementById("census-table");
    table.classList.add("opens");
    const body = table.tBodies[0];
    // Only heads whose bytes are there can be opened.
    const rows = [...body.rows].slice(0, Math.floor(packed.length / each));
    const buttons = rows.map((row) => {
      const button = Object.assign(document.createElement("button"), { type: "button", tabIndex: -1 });
      button.append(...row.cells[0].childNodes);
      row.cells[0].append(button);
      return button;
    });
    const show = (head) => {
      rows.forEach((row, i) => buttons[i].setAttribute("aria-pressed", String(i === head)));
      const [name, kind, verdict] = [...rows[head].cells].map((cell) => cell.textContent);
      open(head, `${name}: ${kind}, ${verdict || "not tried"}`);
    };
    const choose = (head) => {
      if (head < 0) return;
      show(head);
      document.getElementById("census-view").parentElement.scrollIntoView({ block: "nearest" });
    };
    // One of the buttons is in the order of the tab key, and arrow keys go on from there: nobody
    // should have to step through thousands.
    const reach = (button) => {
      for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
    };
    const places = new Map(rows.map((row, index) => [row, index]));
    const visible = () => [...body.rows].filter((row) => !row.hidden && places.has(row)).map((row) => buttons[places.get(row)]);
    document.getElementById("census-controls").addEventListener("input", () => {
      const shown = visible();
      if (!shown.some((button) => button.tabIndex === 0)) reach(shown[0]);
    });
    body.addEventListener("click", (event) => choose(buttons.indexOf(event.target.closest("button"))));
    body.addEventListener("keydown", (event) => {
      const shown = visible();
      const at = shown.indexOf(event.target);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
      if (at < 0 || !shown[to]) return;
      event.preventDefault();
      reach(shown[to]);
      shown[to].focus();
    });
    const byName = new Map(rows.map((row, i) => [row.cells[0].textContent, i]));
    document.getElementById("figure-kinds").on("plotly_click", ({ points }) => {
      choose(byName.get(`L${points[0].y}H${points[0].x}`) ?? -1);
    });
    if (rows.length) {
      reach(buttons[0]);
      show(rows[first] ? first : 0);
    }
  }
})();
