"use strict";
// What is shown is a function of the address: #train-3 is a step, #train-3/MLA a block of it.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const programs = all(".program");
  const on = (element, is) => element.classList.toggle("on", is);
  let step = null;

  function show() {
    const wanted = decodeURIComponent(location.hash.slice(1)) || document.body.dataset.start;
    const [anchor, block] = wanted.split("/");
    const found = document.getElementById(anchor);
    if (found && found.closest("#sources")) {
      found.closest("details").open = true;
      found.scrollIntoView({ block: "center" });
      return;
    }
    step = found && found.matches(".step") ? found : (step ?? all(".step")[0]);
    for (const program of programs) on(program, program.contains(step));
    for (const other of all(".step")) on(other, other === step);
    for (const link of all("#programs a, .steps a")) {
      const target = link.getAttribute("href").slice(1);
      on(link, target === step.id || (!!link.closest("#programs") && belongs(target)));
    }
    const current = all(".steps a.on", step.closest(".program"))[0];
    if (current) current.scrollIntoView({ block: "nearest" });
    zoom(block);
  }

  function belongs(target) {
    return document.getElementById(target).closest(".program").contains(step);
  }

  // Shows one block, or all that the step changed; the outermost where it changed none.
  function zoom(block) {
    const chips = all(".chip", step);
    const changed = chips.filter((chip) => !chip.classList.contains("same"));
    const named = chips.filter((chip) => chip.dataset.block === block);
    const chosen = named.length ? named : changed.length ? changed : chips.slice(0, 1);
    for (const chip of chips) on(chip, chosen.includes(chip));
    for (const version of all(".version")) on(version, false);
    for (const chip of chosen) {
      const version = document.getElementById(chip.getAttribute("href").slice(1));
      version.classList.toggle("plain", chip.classList.contains("same"));
      on(version, true);
    }
  }

  function to(address) {
    location.hash = address;
    show();
  }

  function go(by) {
    const steps = all(".step", step.closest(".program"));
    const next = steps[steps.indexOf(step) + by];
    if (next) to(next.id);
  }

  // The lines of the block that make or read the values of the clicked one.
  function trace(row) {
    const values = (text) => text.match(/%\w+/g) ?? [];
    const code = row.querySelector("code");
    const was = code.classList.contains("hit");
    for (const hit of all(".hit")) hit.classList.remove("hit");
    if (was) return;
    const made = new Set(values(code.textContent.split("=")[0]));
    for (const other of all(".row > code", row.closest(".version")))
      if (values(other.textContent).some((value) => made.has(value))) other.classList.add("hit");
  }

  document.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    const call = event.target.closest("a.call");
    const button = event.target.closest("button");
    if (chip || call) {
      event.preventDefault();
      const block = chip ? chip.dataset.block : call.getAttribute("href").slice("#block-".length);
      to(`${step.id}/${block}`);
    } else if (button) go(Number(button.dataset.go));
    else if (event.target.closest(".row code")) trace(event.target.closest(".row"));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "Escape") to(step.id);
    else if (programs[event.key - 1]) to(all(".step", programs[event.key - 1])[0].id);
  });
  window.addEventListener("hashchange", show);
  document.documentElement.classList.add("js");
  show();
})();
