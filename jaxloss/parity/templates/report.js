"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const table = document.querySelector(".places");
  const rows = [...table.tBodies];
  const headers = [...table.tHead.querySelectorAll("th")];
  const find = $("find"), least = $("least"), failed = $("failed");

  const dtype = () => document.querySelector("input[name=dtype]:checked")?.value;
  const ratio = (row, column) =>
    Number(row.querySelector(`.${column} [data-dtype="${dtype()}"]`)?.dataset.ratio ?? -1);

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits =
        row.dataset.name.toLowerCase().includes(wanted) &&
        (!failed.checked || row.dataset.failed !== "0") &&
        (least.value === "0" || Math.max(ratio(row, "forced"), ratio(row, "free")) >= Number(least.value));
      row.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
    $("nothing").hidden = shown > 0;
  }

  const largestFirst = new Set(["forced", "free", "failed"]);
  function value(row, key) {
    if (key === "flax") return row.dataset.flax || "\uffff"; // what has no name comes last
    return key === "order" || key === "failed" ? Number(row.dataset[key]) : ratio(row, key);
  }

  function sort() {
    const header = headers.find((each) => each.ariaSort) ?? headers[0];
    const key = header.querySelector(".sort").dataset.key;
    const sign = header.ariaSort === "ascending" ? 1 : -1;
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    rows.sort((a, b) => sign * compare(value(a, key), value(b, key)) || a.dataset.order - b.dataset.order);
    table.append(...rows);
    table.classList.toggle("in-order", key === "order" && sign === 1);
  }

  for (const header of headers) {
    const button = header.querySelector(".sort");
    button.disabled = false;
    button.addEventListener("click", () => {
      const first = largestFirst.has(button.dataset.key) ? "descending" : "ascending";
      const next = header.ariaSort === first ? (first === "ascending" ? "descending" : "ascending") : first;
      for (const other of headers) other.ariaSort = null;
      header.ariaSort = next;
      sort();
    });
  }
  for (const row of rows) {
    row.querySelector(".head").addEventListener("click", (event) => {
      const details = row.querySelector("details");
      if (!event.target.closest("a, summary") && !getSelection().toString()) details.open = !details.open;
    });
  }
  find.addEventListener("input", filter);
  for (const control of [least, failed]) control.addEventListener("change", filter);
  for (const radio of document.querySelectorAll("input[name=dtype]"))
    radio.addEventListener("change", () => (filter(), sort()));
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  table.classList.add("in-order", "live");
  filter();
})();
