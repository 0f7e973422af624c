// How turns look: questions, answers beside each other, their figures and buttons. Knows the conversation, no server.

import { render } from "./markdown.js";
import { word } from "./words.js";

// `acts` are what buttons do: {again, rewrite, leaveOut}.
export class Turns {
  constructor(place, talk, acts) {
    Object.assign(this, { place, talk, acts, answers: [] });
  }

  // All turns anew. The lines of `hint` stand where nothing was said yet.
  show(hint = []) {
    this.answers = [];
    this.place.replaceChildren(...this.talk.turns.map((turn, number) => this.turn(turn, number)));
    if (!this.talk.turns.length) this.place.append(...hint.map((line) => element("p", "hint", line)));
    this.toEnd();
  }

  turn(turn, number) {
    const node = element("article", number < this.talk.firstSent ? "turn left-out" : "turn");
    node.append(this.question(turn, number));
    const row = element("div", turn.answers.length > 1 ? "answers two" : "answers");
    this.answers[number] = turn.answers.map((answer) => {
      const shown = this.answer(answer, number, turn.answers.length > 1);
      row.append(shown.node);
      return shown;
    });
    node.append(row);
    return node;
  }

  question(turn, number) {
    const box = element("div", "question");
    const text = element("div", "text", turn.question);
    const edit = button(word("edit"), () => this.edit(number));
    edit.classList.add("edit");
    const who = number < this.talk.firstSent ? `${word("you")} (${word("leftOut")})` : word("you");
    box.append(edit, element("span", "who", who), text);
    return box;
  }

  answer(answer, number, isNamed) {
    const node = element("div", "answer");
    const text = element("div", "text");
    const below = element("div", "below-answer");
    if (isNamed) node.append(element("span", "who", answer.model));
    node.append(text, below);
    const shown = { node, text, below };
    this.fill(shown, answer, number);
    return shown;
  }

  // What is new of an answer that is being written.
  update(number, side, answer) {
    const isAtEnd = this.isAtEnd();
    this.fill(this.answers[number][side], answer, number);
    if (isAtEnd) this.toEnd();
  }

  fill({ node, text, below }, answer, number) {
    node.setAttribute("aria-busy", String(answer.finish === null));
    const isEmpty = !answer.text.trim();
    text.hidden = isEmpty && Boolean(answer.error);
    text.replaceChildren(render(isEmpty ? (answer.finish ? word("nothing") : word("thinking")) : answer.text));
    text.classList.toggle("pale", isEmpty);
    below.replaceChildren();
    if (answer.finish === null) return;
    if (answer.error) below.append(element("span", "error", reason(answer.error)));
    const isLast = number === this.talk.turns.length - 1;
    if (isLast && answer.error?.canLeaveOut) below.append(button(word("leaveOut"), () => this.acts.leaveOut(number)));
    below.append(element("span", "figures", figures(answer)));
    if (!isEmpty) below.append(copyButton(answer.text));
    if (isLast) below.append(button(word("again"), () => this.acts.again(number)));
  }

  edit(number) {
    const box = this.place.children[number].querySelector(".question");
    const input = element("textarea", "rewrite");
    input.value = this.talk.turns[number].question;
    input.rows = Math.min(10, input.value.split("\n").length + 1);
    const save = () => input.value.trim() && this.acts.rewrite(number, input.value);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        this.show();
      }
    });
    const buttons = element("div", "below-answer");
    buttons.append(button(word("save"), save), button(word("cancel"), () => this.show()));
    box.replaceChildren(input, buttons);
    input.focus();
  }

  isAtEnd() {
    return this.place.scrollTop + this.place.clientHeight >= this.place.scrollHeight - 40;
  }

  toEnd() {
    this.place.scrollTop = this.place.scrollHeight;
  }
}

function figures(answer) {
  const ends = { stop: word("ended"), length: word("cut"), stopped: word("stopped"), failed: word("failed") };
  const end = ends[answer.finish] ?? answer.finish;
  if (answer.tokens === null) return answer.finish === "stop" ? "" : end; // read from a file
  const places = { tokens: answer.tokens, speed: answer.speed.toFixed(0), first: answer.first.toFixed(2) };
  return word("together", { figures: word("figures", places), end });
}

// Known errors in the language of the page, others as the server said them.
function reason({ code, message }) {
  return { context_length_exceeded: word("tooLong"), unreachable: word("unreachable") }[code] ?? message;
}

function copyButton(text) {
  const made = button(word("copy"), async () => {
    await navigator.clipboard.writeText(text);
    made.textContent = word("copied");
  });
  return made;
}

export function element(kind, name, text = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.textContent = text;
  return node;
}

function button(text, act) {
  const node = element("button", "small", text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}
