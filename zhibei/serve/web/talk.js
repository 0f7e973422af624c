// What was said: turns of a question and the answers of one model or two. Knows no page and no server.

export class Talk {
  constructor() {
    this.system = "";
    this.turns = [];
    this.firstSent = 0; // turns before it no longer fit into the context and are not sent
  }

  // The messages that lead to the answer of `side` in turn `number`; each model remembers its own answers.
  messages(number, side) {
    const said = this.system.trim() ? [{ role: "system", content: this.system }] : [];
    for (const turn of this.turns.slice(this.firstSent, number)) {
      const answer = turn.answers[side] ?? turn.answers[0];
      if (answer.finish === "failed") continue; // there was no answer, so it is as if nobody had asked
      said.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
    }
    return [...said, { role: "user", content: this.turns[number].question }];
  }

  // Finished conversations, one for each side, as files keep them.
  conversations() {
    const numSides = Math.max(1, ...this.turns.map((turn) => turn.answers.length));
    return Array.from({ length: numSides }, (_, side) => {
      const rows = this.system.trim() ? [{ role: "system", content: this.system }] : [];
      for (const turn of this.turns) {
        const answer = turn.answers[side] ?? turn.answers[0];
        if (!answer?.text) continue;
        rows.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
      }
      return rows;
    });
  }

  ask(question, models) {
    this.turns.push({ question, answers: models.map(unanswered) });
    return this.turns.length - 1;
  }

  // A question in other words: what came after it is forgotten.
  rewrite(number, question, models) {
    this.turns.length = number;
    this.firstSent = Math.min(this.firstSent, number);
    return this.ask(question, models);
  }

  leaveOutOldest() {
    this.firstSent = Math.min(this.firstSent + 1, this.turns.length - 1);
  }

  load({ system, turns }) {
    this.system = system;
    this.firstSent = 0;
    this.turns = turns.map(([question, text]) => ({ question, answers: [{ ...unanswered(""), text, finish: "stop" }] }));
  }
}

function unanswered(model) {
  return { model, text: "", finish: null, tokens: null, speed: null, first: null, error: null };
}
