"use strict";
(function () {
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));

  // Linked highlighting: a model under the pointer or the focus stands out in every plot and table.
  let current = null;
  const light = (place) => {
    if (place === current) return;
    current = place;
    document.body.classList.toggle("linked", place !== null);
    all("[data-m]").forEach((node) => node.classList.toggle("on", node.dataset.m === place));
  };
  const placeOf = (event) => {
    const node = event.target instanceof Element ? event.target.closest("[data-m]") : null;
    return node ? node.dataset.m : null;
  };
  ["pointerover", "focusin"].forEach((kind) =>
    document.addEventListener(kind, (event) => light(placeOf(event))));

  // The full table: search, column filters, sorting, CSV.
  const table = document.getElementById("all-rows");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const original = rows.slice();
  const heads = all("th button", table);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const search = document.getElementById("search");
  const selects = all("select[data-column]");
  const count = document.getElementById("count");

  const shown = (row) => !row.hidden;
  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => {
      const found = wanted.every((word) => texts[i].includes(word));
      const chosen = selects.every((select) =>
        select.value === "*" || row.cells[+select.dataset.column].textContent === select.value);
      row.hidden = !(found && chosen);
    });
    count.textContent = rows.filter(shown).length + " of " + rows.length + " rows";
  };
  selects.forEach((select) => {
    const column = +select.dataset.column;
    const values = new Set(rows.map((row) => row.cells[column].textContent));
    Array.from(values).sort().forEach((value) => select.add(new Option(value || "(empty)", value)));
    select.addEventListener("change", filter);
  });
  search.addEventListener("input", filter);
  document.getElementById("tools").hidden = false;
  filter();

  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v === undefined) return cell.textContent.toLowerCase();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  heads.forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentNode;
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    const order = next[head.getAttribute("aria-sort") || "none"];
    all("th[aria-sort]", table).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const sorted = original.slice();
    if (order !== "none") sorted.sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * sign;
    });
    body.append(...sorted);
  }));

  // A text that a spreadsheet would take for a formula gets an apostrophe in front.
  const quoted = (text) => '"' + text.replace(/"/g, '""') + '"';
  const field = (cell) => cell.dataset.v !== undefined ? cell.dataset.v
    : quoted(/^[=+\-@\t]/.test(cell.textContent) ? "'" + cell.textContent : cell.textContent);
  document.getElementById("csv").addEventListener("click", (event) => {
    const lines = [heads.map((button) => quoted(button.textContent)).join(",")];
    Array.from(body.rows).filter(shown).forEach((row) =>
      lines.push(Array.from(row.cells).map(field).join(",")));
    const blob = new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv;charset=utf-8" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = event.target.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}());
