// How answers are drawn: a slider or field for each option, with its explanation. Knows no conversation.

import { word } from "./words.js";

const CONTROLS = [
  { name: "temperature", kind: "range", min: 0, max: 2, step: 0.05, value: 0.7 },
  { name: "top_p", kind: "range", min: 0.05, max: 1, step: 0.05, value: 1, off: 1 },
  { name: "top_k", kind: "number", min: 0, step: 1, value: 0, off: 0 },
  { name: "min_p", kind: "range", min: 0, max: 0.5, step: 0.01, value: 0, off: 0 },
  { name: "repetition_penalty", kind: "range", min: 1, max: 1.5, step: 0.01, value: 1, off: 1 },
  { name: "max_tokens", kind: "number", min: 1, step: 1, value: "" },
  { name: "seed", kind: "number", min: 0, step: 1, value: "" },
  { name: "stop_texts", kind: "lines", value: "" },
];

// Filters that change nothing where the likeliest token is taken anyway.
const IDLE_WHEN_GREEDY = ["top_p", "top_k", "min_p", "seed"];

export class Controls {
  constructor(place) {
    this.inputs = {};
    for (const control of CONTROLS) place.append(this.build(control));
    place.addEventListener("input", () => this.show());
    this.show();
  }

  build({ name, kind, min, max, step, value }) {
    const label = document.createElement("label");
    label.className = "field";
    const title = document.createElement("span");
    title.dataset.word = name;
    const shown = document.createElement("output");
    const input = document.createElement(kind === "lines" ? "textarea" : "input");
    if (kind === "lines") input.rows = 2;
    else Object.assign(input, { type: kind, step });
    if (min !== undefined) input.min = min;
    if (max !== undefined) input.max = max;
    input.value = value;
    input.id = name;
    const help = document.createElement("small");
    help.dataset.word = `${name}Help`;
    label.append(title, ...(kind === "range" ? [shown] : []), input, help);
    this.inputs[name] = { input, shown, label };
    return label;
  }

  show() {
    const isGreedy = Number(this.inputs.temperature.input.value) === 0;
    for (const { name } of CONTROLS) {
      const { input, shown, label } = this.inputs[name];
      shown.textContent = input.value;
      const isIdle = isGreedy && IDLE_WHEN_GREEDY.includes(name);
      input.disabled = isIdle;
      label.title = isIdle ? word("noEffect") : "";
    }
  }

  // The fields of a request. What is off or empty is left out; the first field that does not fit is shown.
  values() {
    const found = {};
    for (const { name, kind, off } of CONTROLS) {
      const { input } = this.inputs[name];
      if (input.disabled || input.value.trim() === "") continue;
      if (kind !== "lines" && !input.reportValidity()) return null;
      if (kind === "lines") found.stop = input.value.split("\n").filter(Boolean);
      else if (Number(input.value) !== off) found[name] = Number(input.value);
    }
    return found;
  }
}
