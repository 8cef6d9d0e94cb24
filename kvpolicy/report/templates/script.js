"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const size = 25;
  let page = 0;

  const add = (parent, tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    parent.append(element);
    return element;
  };
  const option = (select, value, text) => { add(select, "option", text === undefined ? value : text).value = value; };
  const shown = (value) => (value === undefined || value === null ? "-" : String(value));

  // A text, or a window of it; from where texts part it is marked.
  const text = (parent, title, out) => {
    const box = add(parent, "div");
    add(box, "h4", title);
    const pre = add(box, "pre", undefined, "text");
    pre.tabIndex = 0;
    if (out === undefined) { pre.textContent = "(not kept)"; return; }
    if (out.b) add(pre, "small", `… ${out.b} characters, the same in both …\n`);
    const at = out.p === undefined ? out.t.length : out.p;
    pre.append(out.t.slice(0, at));
    if (at < out.t.length) add(pre, "mark", out.t.slice(at));
    if (!out.t.length && !out.b) add(pre, "small", "(empty)");
    if (out.a) add(pre, "small", `\n… ${out.a} more characters`);
  };

  const open = (box, record, arm) => {
    if (box.dataset.full) return;
    box.dataset.full = "1";
    const base = data.arms[0], ours = record.arms[arm], theirs = record.arms[base];
    if (ours && ours.error) { add(box, "h4", `${arm} failed`); add(box, "pre", ours.error, "text").tabIndex = 0; }
    const outputs = (ours && ours.out !== undefined) || (theirs && theirs.out !== undefined);
    if (outputs) {
      const pair = add(box, "div", undefined, "pair");
      text(pair, `${base} (${shown(theirs && theirs.v)})`, ours && ours.base ? ours.base : theirs && theirs.out);
      text(pair, `${arm} (${shown(ours && ours.v)})`, ours && ours.out);
      if (ours && ours.part !== undefined && theirs && theirs.out !== undefined)
        add(box, "p", ours.part === null ? "The outputs are the same." : `The outputs part at character ${ours.part + 1}.`, "note");
    } else if (!(ours && ours.error)) add(box, "p", "No output was kept for this sample.", "note");
    if (record.answer !== undefined) { add(box, "h4", "Asked for"); add(box, "pre", record.answer, "text").tabIndex = 0; }
    if (record.prompt !== undefined) { add(box, "h4", "End of the prompt"); add(box, "pre", record.prompt, "text").tabIndex = 0; }
    const others = data.arms.filter((name) => name !== base && name !== arm && record.arms[name]);
    if (others.length) add(box, "p", "Others: " + others.map((name) => `${name} ${shown(record.arms[name].v)}`).join("; "), "note");
  };

  const rank = { loss: 1, gain: -1 };
  const lower = (metric) => /(^|_)(nll|kl|l1|l2|bits|bytes|seconds|perplexity|ppl|brier|error|errors|loss|wer|ter|mse|mae|latency)(_|,|$)|^dropped_mass$/.test(metric.toLowerCase());
  const gain = (record, arm) => {
    const ours = record.arms[arm], theirs = record.arms[data.arms[0]];
    if (ours && ours.error) return -Infinity;
    if (!ours || !theirs || ours.v === null || theirs.v === null) return 0;
    return (ours.v - theirs.v) * (lower(record.metric) ? -1 : 1);
  };

  const list = () => {
    const arm = $("arm").value, task = $("task").value, order = $("order").value;
    let found = data.samples.filter((r) => (task === "" || r.task === task) && r.arms[arm]);
    if ($("apart").checked) found = found.filter((r) => r.arms[arm].error || (r.arms[arm].part !== null && r.arms[arm].part !== undefined));
    if (rank[order]) found = [...found].sort((a, b) => rank[order] * (gain(a, arm) - gain(b, arm)) || 0);
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(page, pages - 1);
    const target = $("list");
    target.replaceChildren();
    for (const record of found.slice(page * size, (page + 1) * size)) {
      const box = add(target, "details", undefined, "sample");
      const line = add(box, "summary");
      add(line, "span", `${record.task}, sample ${record.sample}`);
      const ours = record.arms[arm], theirs = record.arms[data.arms[0]];
      add(line, "b", `${record.metric} ${shown(theirs && theirs.v)} → ${ours.error ? "failed" : shown(ours.v)}`);
      if (record.document) add(line, "small", `document ${record.document}`);
      if (ours.part !== undefined && ours.part !== null) add(line, "small", `part at character ${ours.part + 1}`);
      box.addEventListener("toggle", () => { if (box.open) open(box, record, arm); });
    }
    const first = found.length ? page * size + 1 : 0;
    $("status").textContent = `${first} to ${Math.min(found.length, (page + 1) * size)} of ${found.length} samples`;
    $("before").disabled = page === 0;
    $("after").disabled = page >= pages - 1;
  };

  if (data.tasks.length !== 1) option($("task"), "", "all tasks");
  data.tasks.forEach((name) => option($("task"), name));
  data.arms.slice(1).forEach((name) => option($("arm"), name));
  if (data.arms.length === 1) option($("arm"), data.arms[0]);
  for (const id of ["task", "arm", "order", "apart"]) $(id).addEventListener("change", () => { page = 0; list(); });
  $("choose").addEventListener("submit", (event) => event.preventDefault());
  $("before").addEventListener("click", () => { page -= 1; list(); });
  $("after").addEventListener("click", () => { page += 1; list(); });
  list();

  // A legend's entry picks its curve out.
  for (const button of document.querySelectorAll("button[data-pick]"))
    button.addEventListener("click", () => {
      const figure = button.closest("figure"), was = button.getAttribute("aria-pressed") === "true";
      for (const other of figure.querySelectorAll("button[data-pick]")) other.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", String(!was));
      for (const line of figure.querySelectorAll("path[data-name]")) {
        line.classList.toggle("dim", !was && line.dataset.name !== button.dataset.pick);
        line.classList.toggle("picked", !was && line.dataset.name === button.dataset.pick);
      }
    });

  // On paper everything that is folded is open.
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details:not([open])")) { box.dataset.folded = "1"; box.open = true; }
  });
  addEventListener("afterprint", () => {
    for (const box of document.querySelectorAll("details[data-folded]")) { box.open = false; delete box.dataset.folded; }
  });
})();
