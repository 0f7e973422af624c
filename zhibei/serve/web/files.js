// Conversations as files, in two forms that can be trained on, and back. Knows no page.

const FROM = { human: "user", user: "user", gpt: "assistant", assistant: "assistant", chatgpt: "assistant", system: "system" };

// One line for each side: {"messages": [...]}, which `zhibei chat` loads with /load.
export function asMessages(conversations) {
  return conversations.map((messages) => JSON.stringify({ messages })).join("\n") + "\n";
}

// [{"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}]
export function asShareGpt(conversations, name) {
  const from = { user: "human", assistant: "gpt", system: "system" };
  const rows = conversations.map((messages, number) => ({
    id: `${name}-${number + 1}`,
    conversations: messages.map(({ role, content }) => ({ from: from[role], value: content })),
  }));
  return JSON.stringify(rows, null, 1) + "\n";
}

// {system, turns: [[question, answer], ...]}; throws an Error that says what does not fit.
export function read(text) {
  const document = parse(text);
  const first = Array.isArray(document) ? document[0] : document;
  const rows = first?.messages ?? first?.conversations;
  if (!Array.isArray(rows)) throw new Error("messages / conversations");
  const messages = rows.map((row) => ({ role: row?.role ?? FROM[row?.from], content: row?.content ?? row?.value }));
  const system = messages[0]?.role === "system" ? messages.shift().content : "";
  const turns = [];
  messages.forEach((message, number) => {
    const expected = number % 2 ? "assistant" : "user";
    if (message.role !== expected || typeof message.content !== "string") throw new Error(`${number + 1}: ${expected}`);
    if (expected === "user") turns.push([message.content, null]);
    else turns.at(-1)[1] = message.content;
  });
  if (turns.length && turns.at(-1)[1] === null) turns.pop();
  return { system: String(system ?? ""), turns };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return JSON.parse(text.trim().split("\n")[0]);
  }
}

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
