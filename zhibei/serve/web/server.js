// The server's API: the models, and answers as they are written. Knows no page.

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

// The key comes behind # in the address, which browsers send to nobody, and stays with this tab.
export function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem("key", given);
    history.replaceState(null, "", location.pathname);
  }
  const key = sessionStorage.getItem("key") ?? "";
  // The report is a page of its own, which a link must reach.
  if (key) document.cookie = `zhibei_key=${encodeURIComponent(key)}; path=/report; SameSite=Strict`;
  return key;
}

export class Server {
  constructor(key) {
    this.headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  }

  async models() {
    const response = await fetch("v1/models", { headers: this.headers });
    if (!response.ok) throw await refusal(response);
    return (await response.json()).data;
  }

  // Calls `hear(text)` for each piece; the reason of the end and the tokens used.
  async answer(body, hear, signal) {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: this.headers,
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!response.ok) throw await refusal(response);
    let finish = null;
    let usage = null;
    for await (const event of events(response.body)) {
      if (event.error) throw new Refused(500, event.error);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        if (choice.delta.content) hear(choice.delta.content);
        finish = choice.finish_reason ?? finish;
      }
    }
    return { finish, usage };
  }
}

async function refusal(response) {
  const document = await response.json().catch(() => null);
  return new Refused(response.status, document?.error);
}

async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
